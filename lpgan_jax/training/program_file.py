"""Programs in files of their users: `training`, a `Training` or a function that makes one."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpgan_jax.programs import Training
from lpgan_jax.training.config import ConfigError

# A bool is an int too, hence first.
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text"}


def load(path: str, options: Mapping[str, Any]) -> Training:
    """Run a file and make its training: once, while the file stays as it is.

    Args:
        path: the Python file. It finds modules beside it.
        options: what its `training` is called with.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it has no `training`, or that takes no such option; names it.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a program in Python")
    return _training(str(file.resolve()), file.stat().st_mtime_ns, tuple(sorted(options.items())))


@functools.lru_cache(16)
def _training(path: str, _: int, options: tuple[tuple[str, Any], ...]) -> Training:
    name = Path(path).name
    made = getattr(_module(path), "training", None)
    if callable(made):
        parameters = inspect.signature(made).parameters
        for option, value in options:
            if option not in parameters:
                raise ConfigError(
                    f"{name}: {option}: no option of its training, expected one of "
                    f"{', '.join(parameters) or 'none'}"
                )
            _require_kind(f"{name}: {option}", value, parameters[option].default)
        made = made(**dict(options))
    elif options:
        raise ConfigError(f"{name}: its training is no function, so it takes no options")
    if not isinstance(made, Training):
        raise ConfigError(
            f"{name}: expected `training`, an lpgan_jax.Training or a function that makes one, got "
            f"{type(made).__name__}"
        )
    return made


def _require_kind(name: str, value: Any, default: Any) -> None:
    """Check that an option is of its default's kind, where that tells it."""
    expected = _kind(default)
    if expected is not None and _kind(value) != expected:
        raise ConfigError(f"{name}: {value!r}, expected {expected} (default: {default!r})")


def _kind(value: Any) -> str | None:
    return next((kind for of, kind in _KINDS.items() if isinstance(value, of)), None)


def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"program_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    beside = str(Path(path).parent)
    if beside not in sys.path:
        sys.path.append(beside)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
