"""Checkpoints of shares: each server's share in a directory, and a file, of its own.

    RUN/checkpoints/s1/step_00000100.msgpack
    RUN/checkpoints/s2/step_00000100.msgpack

`share_file` says what they are.
"""

import contextlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lpgan_jax.common.files import atomic_write, private_directory
from lpgan_jax.mpc import share_file
from lpgan_jax.mpc.share_file import SERVERS, CheckpointError, Tree

DIRECTORY = "checkpoints"


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
    shares = [share_file.half(paired_tree, number) for number in range(len(SERVERS))]
    name_of_save = share_file.new_name()
    for server, share in zip(SERVERS, shares, strict=True):
        _write(run_dir, server, step, name_of_save, share)
    _prune(run_dir, step, keep)


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
            found[step] = share_file.name_in(path, server, step)
    return found


def load_share(run_dir: str | os.PathLike[str], server: str, step: int) -> tuple[str, Tree]:
    """Read a server's own checkpoint: the name of the save, and leaves uint64[*shape].

    Raises:
        CheckpointError: as `load`.
    """
    return share_file.loaded(_file(run_dir, server, step), server, step)


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
    atomic_write(file, share_file.encoded(server, step, name_of_save, share))


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
        names = {
            share_file.name_in(_file(run_dir, server, step), server, step) for server in SERVERS
        }
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


def _load_step(run_dir: str | os.PathLike[str], step: int) -> Tree:
    files = [_file(run_dir, server, step) for server in SERVERS]
    first, second = share_file.of_one_save(files, step)
    return share_file.paired(first, second, files[1])
