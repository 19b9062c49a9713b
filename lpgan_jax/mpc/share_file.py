"""One server's shares as a file: a line of JSON that says what it is, then arrays in msgpack.

It says nothing about the secrets without the other server's. Two halves that do not belong together
would add up to noise, and nothing would show it: so both carry the random name of the save that
wrote them, and whoever reads both compares the two.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

ServerName = Literal["s1", "s2"]
SERVERS: tuple[ServerName, ServerName] = ("s1", "s2")

Tree = dict[str, Any]
"""A nested dict whose leaves are NumPy arrays."""

_MAGIC = "lpgan_jax shares"
_VERSION = 2
_BEFORE = 1  # of lpgan_jax 0.1, whose networks were laid out otherwise
_LONGEST_HEADER = 4096


class CheckpointError(ValueError):
    """A file of shares that is missing or cannot be trusted; the message names the file."""


def new_name() -> str:
    """A random name for a save, by which its two halves are known to belong together."""
    return secrets.token_hex(16)


def encoded(server: str, step: int | None, name_of_save: str, share: Mapping[str, Any]) -> bytes:
    """The bytes of a file.

    Args:
        server: s1 or s2.
        step: of a run; None of shares that are no run's.
        name_of_save: that both servers give it.
        share: nested dict with string keys; leaves are arrays, numbers or None.
    """
    from flax import serialization  # imports JAX

    payload = serialization.msgpack_serialize(share)
    header = {
        "magic": _MAGIC,
        "version": _VERSION,
        "server": server,
        "step": step,
        "save": name_of_save,
        "bytes": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    # No spaces, so that every byte matters and no damage is harmless.
    return json.dumps(header, separators=(",", ":")).encode() + b"\n" + payload


def name_in(path: Path, server: str, step: int | None) -> str:
    """The name of the save that wrote a file; only its header and size are checked.

    Raises:
        CheckpointError: it is missing, truncated, foreign, of another format version, another
            server or another step.
    """
    return _header(path, server, step)[0]


def loaded(path: Path, server: str, step: int | None) -> tuple[str, Any]:
    """(the name of the save, the share) of a file, with everything about it checked.

    Raises:
        CheckpointError: as of `name_in`, or it is corrupt.
    """
    from flax import serialization  # imports JAX

    name_of_save, checksum, start = _header(path, server, step)
    payload = path.read_bytes()[start:]
    if hashlib.sha256(payload).hexdigest() != checksum:
        raise CheckpointError(f"{path}: corrupt, expected the sha256 that its header gives")
    try:
        return name_of_save, serialization.msgpack_restore(payload)
    except Exception as error:  # msgpack's errors have no common class
        raise CheckpointError(f"{path}: expected flax's msgpack: {error}") from None


def of_one_save(files: Sequence[Path], step: int | None) -> list[Any]:
    """The shares in both servers' files.

    Raises:
        CheckpointError: as of `loaded`, or the two files do not belong together.
    """
    halves = [loaded(file, server, step) for file, server in zip(files, SERVERS, strict=True)]
    if len({name for name, _ in halves}) > 1:
        raise CheckpointError(f"{files[-1]}: of another save, expected the one of the other server")
    return [share for _, share in halves]


def _header(path: Path, server: str, step: int | None) -> tuple[str, str, int]:
    """(name of the save, the payload's checksum, where the payload starts)."""
    if not path.is_file():  # a pipe would make us wait
        raise CheckpointError(f"{path}: missing, expected the shares of {server}")
    with open(path, "rb") as file:
        line = file.readline(_LONGEST_HEADER)
        size = os.fstat(file.fileno()).st_size
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("magic") != _MAGIC:
        raise CheckpointError(f"{path}: not a checkpoint, expected {_MAGIC!r} in its first line")
    if header.get("version") == _BEFORE:
        raise CheckpointError(f"{path}: version 1, which lpgan_jax 0.1 reads; expected {_VERSION}")
    expected = {"version": _VERSION, "server": server, "step": step, "bytes": size - len(line)}
    for field, value in expected.items():
        if header.get(field) != value:
            raise CheckpointError(f"{path}: {field} {header.get(field)!r}, expected {value!r}")
    return str(header.get("save")), str(header.get("sha256")), len(line)


# --- Trees of pairs -------------------------------------------------------------------------------


def half(tree: Mapping[str, Any], server: int, parent: str = "") -> Tree:
    """One server's half of every pair, as NumPy arrays.

    Args:
        tree: nested dict with string keys; leaves uint64[2, *shape].
        server: 0 or 1.
        parent: the tree's own name, for errors.

    Raises:
        ValueError: a key is not a string, or a leaf not such an array.
    """
    share: Tree = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ValueError(f"{parent}{key!r}: expected keys that are strings")
        name = f"{parent}{key}"
        if isinstance(value, Mapping):
            share[key] = half(value, server, f"{name}.")
        elif _is_paired(value):
            share[key] = np.asarray(value[server])
        else:
            shape = list(getattr(value, "shape", []))
            kind = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"{name}: {kind}{shape} given, expected shares: uint64[2, ...]")
    return share


def _is_paired(value: Any) -> bool:
    return getattr(value, "dtype", None) == np.uint64 and value.shape[:1] == (2,)


def paired(first: Any, second: Any, file: Path, name: str = "tree") -> Any:
    """The servers' halves as one tree of uint64[2, *shape].

    Args:
        first: S1's.
        second: S2's.
        file: S2's, for errors.
        name: of the tree, for errors.

    Raises:
        CheckpointError: they have other names, dtypes or shapes.
    """
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: paired(first[key], second[key], file, f"{name}.{key}") for key in first}
    for one in (first, second):
        if isinstance(one, dict) or getattr(one, "dtype", None) != np.uint64:
            raise CheckpointError(f"{file}: {name}: expected uint64 arrays under the same names")
    if first.shape != second.shape:
        raise CheckpointError(
            f"{file}: {name}: shape {list(second.shape)}, "
            f"expected {list(first.shape)} as at the other server"
        )
    return np.stack([first, second])
