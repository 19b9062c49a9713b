"""Checkpoints of shares: each server's share in a directory, and a file, of its own.

    RUN/checkpoints/s1/step_00000100.msgpack    a line of JSON that says what the file is, then
    RUN/checkpoints/s2/step_00000100.msgpack    that server's uint64 arrays in flax's msgpack

Neither directory says anything about the secrets without the other. Two halves that do not belong
together would add up to noise, and nothing would show it: so both carry the random name of the
save that wrote them, and `load` compares the two.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lpgan_jax.files import atomic_write, private_directory

DIRECTORY = "checkpoints"
ServerName = Literal["s1", "s2"]
SERVERS: tuple[ServerName, ServerName] = ("s1", "s2")

Tree = dict[str, Any]
"""A nested dict whose leaves are NumPy arrays."""

_MAGIC = "lpgan_jax shares"
_VERSION = 1
_LONGEST_HEADER = 4096


class CheckpointError(ValueError):
    """A checkpoint that is missing or cannot be trusted; the message names the file."""


def save(
    run_dir: str | os.PathLike[str], step: int, paired_tree: Mapping[str, Any], keep: int
) -> None:
    """Write both servers' checkpoints of a step, then remove those no longer wanted.

    Each file appears whole or not at all, and nothing is removed before both are there. Removed are
    all but the last `keep` complete steps, and steps after this one: a run that saves an earlier
    step has gone back to it, and its old future is void.

    Args:
        run_dir: the directory of the run.
        step: the number of the step, at least 0.
        paired_tree: nested dict with leaves uint64[2, *shape]: S1's and S2's share.
        keep: how many steps to keep, at least 1.

    Raises:
        ValueError: a leaf is not uint64[2, ...], a key is not a string, or a number is too small.
        OSError: a file cannot be written.
    """
    for name, number, least in (("step", step, 0), ("keep", keep, 1)):
        if number < least:
            raise ValueError(f"{name}: {number} given, expected at least {least}")
    shares = [_share(paired_tree, server, "") for server in range(len(SERVERS))]
    name_of_save = new_name()
    for server, share in zip(SERVERS, shares, strict=True):
        _write(run_dir, server, step, name_of_save, share)
    _prune(run_dir, step, keep)


def new_name() -> str:
    """A random name for a save, by which its two halves are known to belong together."""
    return secrets.token_hex(16)


def latest_step(run_dir: str | os.PathLike[str]) -> int | None:
    """Return the newest step of which both servers hold files of one save, or None.

    Only headers and sizes are read: `load` also compares the checksums.
    """
    return next((step for step in _steps(run_dir) if _is_complete(run_dir, step)), None)


def load(run_dir: str | os.PathLike[str], step: int | None = None) -> tuple[int, Tree]:
    """Read a checkpoint, checking everything about it.

    Args:
        run_dir: the directory of the run.
        step: the step to read; by default the newest of which both servers have a file. If that
            one is damaged, it is an error: going back further is the user's decision.

    Returns:
        The step, and the nested dict with writable leaves uint64[2, *shape].

    Raises:
        CheckpointError: a file is missing, truncated, corrupt, foreign, of another format version
            or another server, or the two files do not belong together.
    """
    steps = _steps(run_dir)
    if step is not None:
        return step, _load_step(run_dir, step)
    if not steps:
        missing = _file(run_dir, SERVERS[0], 0).parent
        raise CheckpointError(f"{missing}: expected a step that both servers have a file of")
    newest, *older = steps
    try:
        return newest, _load_step(run_dir, newest)
    except CheckpointError as error:
        intact = next((other for other in older if _is_intact(run_dir, other)), None)
        advice = "no older one is" if intact is None else f"step {intact} is: ask for it"
        raise CheckpointError(f"{error}; the newest step is not intact, {advice}") from None


# --- One server's half, as a server of a cluster keeps it -----------------------------------------


def save_share(
    run_dir: str | os.PathLike[str],
    server: str,
    step: int,
    name_of_save: str,
    share: Mapping[str, Any],
    keep: int,
) -> None:
    """Write a server's own checkpoint, then remove those no longer wanted, as `save` does.

    At least two are kept: while this server has the newest one, the other may still be about to
    write it, and the session must find a step that both have.

    Args:
        run_dir: the server's directory.
        server: s1 or s2.
        step: the number of the step, at least 0.
        name_of_save: that both servers give it.
        share: nested dict with leaves uint64[*shape].
        keep: how many to keep.

    Raises:
        OSError: the file cannot be written.
    """
    _write(run_dir, server, step, name_of_save, share)
    past = sorted(other for other in saves(run_dir, server) if other <= step)
    _keep_only(run_dir, server, past[-max(keep, 2) :])


def saves(run_dir: str | os.PathLike[str], server: str) -> dict[int, str]:
    """The steps that a server has a checkpoint of, with the names of the saves.

    Only headers and sizes are read: `load_share` also compares the checksum.
    """
    found = {}
    for step, path in _files(run_dir, server).items():
        with contextlib.suppress(CheckpointError):
            found[step] = _read(path, server, step)[0]
    return found


def load_share(run_dir: str | os.PathLike[str], server: str, step: int) -> tuple[str, Tree]:
    """Read a server's own checkpoint: the name of the save, and leaves uint64[*shape].

    Raises:
        CheckpointError: as `load`.
    """
    return _load_half(_file(run_dir, server, step), server, step)


def drop_shares(run_dir: str | os.PathLike[str], server: str, after: int) -> None:
    """Remove a server's checkpoints of later steps, and what killed writers left."""
    _keep_only(run_dir, server, [step for step in _files(run_dir, server) if step <= after])


# --- Steps on disk --------------------------------------------------------------------------------


def _file(run_dir: str | os.PathLike[str], server: str, step: int) -> Path:
    return Path(run_dir) / DIRECTORY / server / f"step_{step:08d}.msgpack"


def _write(
    run_dir: str | os.PathLike[str],
    server: str,
    step: int,
    name_of_save: str,
    share: Mapping[str, Any],
) -> None:
    file = _file(run_dir, server, step)
    for directory in (file.parent.parent, file.parent):
        private_directory(directory)
    atomic_write(file, _encode(step, server, name_of_save, share))


def _steps(run_dir: str | os.PathLike[str]) -> list[int]:
    """Return the steps that both servers have a file of, newest first."""
    first, second = (set(_files(run_dir, server)) for server in SERVERS)
    return sorted(first & second, reverse=True)


def _files(run_dir: str | os.PathLike[str], server: str) -> dict[int, Path]:
    directory = Path(run_dir) / DIRECTORY / server
    matches = ((re.fullmatch(r"step_(\d{8,})\.msgpack", p.name), p) for p in directory.glob("*"))
    return {int(match[1]): path for match, path in matches if match}


def _is_complete(run_dir: str | os.PathLike[str], step: int) -> bool:
    try:
        names = {_read(_file(run_dir, server, step), server, step)[0] for server in SERVERS}
    except CheckpointError:
        return False
    return len(names) == 1


def _is_intact(run_dir: str | os.PathLike[str], step: int) -> bool:
    try:
        _load_step(run_dir, step)
    except CheckpointError:
        return False
    return True


def _prune(run_dir: str | os.PathLike[str], step: int, keep: int) -> None:
    """Remove what `save` of this step makes superfluous, including what killed writers left."""
    past = [other for other in _steps(run_dir) if other <= step and _is_complete(run_dir, other)]
    for server in SERVERS:
        _keep_only(run_dir, server, past[:keep])


def _keep_only(run_dir: str | os.PathLike[str], server: str, steps: Collection[int]) -> None:
    """Remove a server's files of other steps, and what killed writers left."""
    for step, path in _files(run_dir, server).items():
        if step not in steps:
            path.unlink()
    for path in (Path(run_dir) / DIRECTORY / server).glob(".step_*.tmp"):
        path.unlink()


# --- Trees of pairs -------------------------------------------------------------------------------


def _share(tree: Mapping[str, Any], server: int, parent: str) -> Tree:
    """Return one server's half of every pair, as NumPy arrays."""
    share: Tree = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ValueError(f"{parent}{key!r}: expected keys that are strings")
        name = f"{parent}{key}"
        if isinstance(value, Mapping):
            share[key] = _share(value, server, f"{name}.")
        elif _is_paired(value):
            share[key] = np.asarray(value[server])
        else:
            shape = list(getattr(value, "shape", []))
            kind = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"{name}: {kind}{shape} given, expected shares: uint64[2, ...]")
    return share


def _is_paired(value: Any) -> bool:
    return getattr(value, "dtype", None) == np.uint64 and value.shape[:1] == (2,)


def _pair(first: Any, second: Any, file: Path, name: str = "tree") -> Any:
    """Join the servers' trees; `file` is the second server's, for errors."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: _pair(first[key], second[key], file, f"{name}.{key}") for key in first}
    for half in (first, second):
        if isinstance(half, dict) or getattr(half, "dtype", None) != np.uint64:
            raise CheckpointError(f"{file}: {name}: expected uint64 arrays under the same names")
    if first.shape != second.shape:
        raise CheckpointError(
            f"{file}: {name}: shape {list(second.shape)}, "
            f"expected {list(first.shape)} as at the other server"
        )
    return np.stack([first, second])


# --- Bytes of a file ------------------------------------------------------------------------------


def _encode(step: int, server: str, name_of_save: str, share: Mapping[str, Any]) -> bytes:
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


def _read(path: Path, server: str, step: int) -> tuple[str, str, int]:
    """Check a file's header and size.

    Returns:
        The name of the save, the payload's checksum, and where the payload starts.
    """
    try:
        with open(path, "rb") as file:
            line = file.readline(_LONGEST_HEADER)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, expected the shares of {server}") from None
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("magic") != _MAGIC:
        raise CheckpointError(f"{path}: not a checkpoint, expected {_MAGIC!r} in its first line")
    expected = {"version": _VERSION, "server": server, "step": step, "bytes": size - len(line)}
    for field, value in expected.items():
        if header.get(field) != value:
            raise CheckpointError(f"{path}: {field} {header.get(field)!r}, expected {value!r}")
    return str(header.get("save")), str(header.get("sha256")), len(line)


def _load_half(path: Path, server: str, step: int) -> tuple[str, Any]:
    from flax import serialization  # imports JAX

    name_of_save, checksum, start = _read(path, server, step)
    payload = path.read_bytes()[start:]
    if hashlib.sha256(payload).hexdigest() != checksum:
        raise CheckpointError(f"{path}: corrupt, expected the sha256 that its header gives")
    try:
        return name_of_save, serialization.msgpack_restore(payload)
    except Exception as error:  # msgpack's errors have no common class
        raise CheckpointError(f"{path}: expected flax's msgpack: {error}") from None


def _load_step(run_dir: str | os.PathLike[str], step: int) -> Tree:
    shares, names = [], set()
    for server in SERVERS:
        path = _file(run_dir, server, step)
        name_of_save, share = _load_half(path, server, step)
        shares.append(share)
        names.add(name_of_save)
    if len(names) > 1:
        raise CheckpointError(f"{path}: of another save, expected the one of the other server")
    first, second = shares
    return _pair(first, second, path)
