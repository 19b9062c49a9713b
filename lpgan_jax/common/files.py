"""Files and directories: written whole or not at all, for their owner alone unless others may read.

What a run or a role leaves is as private as the training images, and private from its first byte,
whatever the umask: who opened a file while it was readable reads on. What is loaded from the cache
decides what this process computes, so it comes from where nobody else can write.
"""

import logging
import os
import secrets
import stat
from pathlib import Path
from typing import IO, Literal

_log = logging.getLogger(__name__)


def atomic_write(path: str | os.PathLike[str], data: bytes, *, private: bool = True) -> None:
    """Write `data` to `path`, replacing what was there in one step.

    The bytes go to a hidden file in the same directory, reach the disk, and then take the name. So
    a crash at any moment leaves the old file or the new one. Of several writers at a time, the last
    one wins. Missing parent directories are made.

    Args:
        path: the file to write.
        data: its whole content.
        private: only the owner may read it, and enter the directories that were missing; else what
            the umask allows.

    Raises:
        OSError: the directory or file cannot be written.
    """
    path = Path(path)
    _make_directories(path.parent, private=private)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    descriptor = os.open(temporary, flags, 0o600 if private else 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _make_directories(path: Path, *, private: bool) -> None:
    """Make what is missing of a path; `Path.mkdir` would give its mode to the last part only."""
    for part in (*reversed(path.parents), path):
        part.mkdir(mode=0o700 if private else 0o777, exist_ok=True)


def sync_directory(path: Path) -> None:
    """Make a rename in the directory durable: a power cut may undo it otherwise."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# For their owner alone ----------------------------------------------------------------------------


def private_directory(path: str | os.PathLike[str]) -> Path:
    """Have a directory that only its owner may enter: a new one, or this user's, made private.

    Missing parents are made, and private too.

    Raises:
        PermissionError: it is a symbolic link, or belongs to someone else.
        OSError: it is no directory, or cannot be made.
    """
    path = Path(path)
    try:
        _make_directories(path, private=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        _refuse_link(path, "directory")
        raise
    try:
        _make_private(descriptor, path, "directory", 0o700)
    finally:
        os.close(descriptor)
    return path


def private_open(path: str | os.PathLike[str], mode: Literal["ab", "r+b"]) -> IO[bytes]:
    """Open a file that only its owner may read, and that is made if it is missing.

    What it holds stays; one of this user's that others could read is made private.

    Args:
        path: the file, in a directory that exists.
        mode: to add to it, or to read and write it.

    Raises:
        PermissionError: it is a symbolic link, or belongs to someone else.
        OSError: it is no regular file, or cannot be opened.
    """
    path = Path(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if mode == "ab" else 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError:
        _refuse_link(path, "file")
        raise
    try:
        _make_private(descriptor, path, "file", 0o600)
    except BaseException:
        os.close(descriptor)
        raise
    return open(descriptor, mode)


def _refuse_link(path: Path, what: str) -> None:
    if path.is_symlink():
        raise PermissionError(f"{path}: a symbolic link, expected a {what} itself") from None


def _make_private(descriptor: int, path: Path, what: str, mode: int) -> None:
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        raise PermissionError(
            f"{path}: belongs to user {status.st_uid}, expected a {what} of user {os.geteuid()}"
        )
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise OSError(f"{path}: a device or pipe, expected a {what}")
    if status.st_mode & 0o077:
        os.fchmod(descriptor, mode)


# What can be made again ---------------------------------------------------------------------------


def cache_directory(name: str, without: str) -> Path | None:
    """A directory of this user's cache, mode 0700, that nobody else but root can change.

    It is `$XDG_CACHE_HOME/lpgan_jax/NAME`, by default in ~/.cache.

    Args:
        name: of the directory.
        without: what the lack of it means, for the warning.

    Returns:
        The directory; None, after a warning that says why, if it cannot be had.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(root).absolute() / "lpgan_jax" / name
        require_trusted(path, make=True)
        return private_directory(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        _log.warning("no cache, so %s: %s", without, error)
        return None


def require_trusted(path: Path, *, make: bool = False) -> None:
    """Check that only this user and root can change what a path leads to.

    So each part of it, from the root on, must belong to one of them and not be writable by others,
    nor by a group. Directories where others may only add (with a sticky bit, as /tmp) may be on the
    way. Symbolic links are parts like others, and so is the path that each leads to.

    Args:
        path: of a file or directory, absolute.
        make: what is missing is made, as directories of mode 0700.

    Raises:
        PermissionError: a part is not so; the message names it.
        OSError: a part cannot be looked at, or made.
    """
    for part in (*reversed(path.parents), path):
        if make:
            part.mkdir(mode=0o700, exist_ok=True)
        status = part.lstat()
        if status.st_uid not in (0, os.geteuid()):
            raise PermissionError(
                f"{part}: belongs to user {status.st_uid}, expected user {os.geteuid()} or root"
            )
        if stat.S_ISLNK(status.st_mode):
            target = part.parent / os.readlink(part) / path.relative_to(part)
            return require_trusted(target, make=make)
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & 0o022 and not (sticky and part != path):
            raise PermissionError(
                f"{part}: others can write to it (mode {stat.S_IMODE(status.st_mode):o}), "
                "expected its owner only: make sure of what is there, then chmod go-w"
            )


def use_compilation_cache() -> None:
    """Keep compiled programs between runs; they hold no keys and no shares, which are arguments.

    A directory that the user gave JAX stays.
    """
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        directory = cache_directory("xla", "compiled programs are not kept")
        if directory is not None:
            jax.config.update("jax_compilation_cache_dir", str(directory))
