"""Parameters as a file: what SP exports (of both networks or one), and what a run starts from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from lpgan_jax.common.bounded import require_size
from lpgan_jax.gan import NETWORKS, State

_SHORT = {"generator": "g", "discriminator": "d"}  # names in the file

Learnt = Mapping[str, Mapping[str, Any]]
"""{network: Flax variables {"params", "batch_stats"}}."""


def parameters_file(learnt: Learnt) -> bytes:
    """{"g": variables, "d": variables} in float32 as Flax's msgpack.

    Args:
        learnt: {network: variables}; a network that is not there is not in the file.
    """
    variables = {
        _SHORT[name]: jax.tree.map(lambda v: np.asarray(v, np.float32), learnt[name])
        for name in NETWORKS
        if name in learnt
    }
    data: bytes = serialization.to_bytes(variables)
    return data


def load_parameters(path: str | os.PathLike[str], like: State) -> dict[str, Any]:
    """{network: variables} of both networks from a file of `parameters_file`.

    Args:
        path: the file.
        like: a state of the same networks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, has one network only, is much larger than the networks, of
            other ones, or with values that are no finite numbers; names what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file, expected parameters as `lpgan export` writes"
        )
    require_size(path.stat().st_size, str(path), _largest(like))
    expected = f'{path}: expected a Flax msgpack file of {{"g": ..., "d": ...}}'
    try:
        variables = serialization.msgpack_restore(path.read_bytes())
        both: dict[str, Any] = {n: variables[s] for n, s in _SHORT.items() if s in variables}
    except Exception as error:
        raise ValueError(expected) from error
    if not both:
        raise ValueError(expected)
    if missing := [f'"{_SHORT[name]}" (the {name})' for name in NETWORKS if name not in both]:
        raise ValueError(
            f"{path}: has no {' and no '.join(missing)}, expected parameters of both networks, as "
            "`lpgan export` writes, or SP gets with results: [generator, discriminator]"
        )
    learnt = {}
    for name in NETWORKS:
        try:
            _check("", both[name], like.learnt()[name])
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        learnt[name] = {"batch_stats": {}, **both[name]}
        for keys, value in jax.tree.leaves_with_path(learnt[name]):
            if not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
                place = jax.tree_util.keystr(keys, simple=True, separator=".")
                raise ValueError(f"{path}: {name}: {place}: expected finite floating-point values")
    return learnt


def _check(prefix: str, given: Any, expected: Mapping[str, Any]) -> None:
    """Compare names and shapes, level by level."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{prefix[:-1]}: expected {', '.join(expected)}, got an array")
    for name, value in expected.items():
        if name not in given and not (isinstance(value, Mapping) and not value):
            raise ValueError(f"{prefix}{name}: missing")
    for name in given:
        if name not in expected:
            raise ValueError(f"{prefix}{name}: unknown, expected {', '.join(expected) or 'none'}")
    for name, value in expected.items():
        if isinstance(value, Mapping):
            _check(f"{prefix}{name}.", given.get(name, {}), value)
        elif (shape := getattr(given[name], "shape", None)) != value.shape:
            found = type(given[name]).__name__ if shape is None else shape
            raise ValueError(f"{prefix}{name}: expected shape {value.shape}, got {found}")


def _largest(like: State) -> int:
    """Bytes that a file may have: the values in float64, and names. Reading takes a multiple."""
    return sum(8 * value.size for value in jax.tree.leaves(like.learnt())) + 2**16
