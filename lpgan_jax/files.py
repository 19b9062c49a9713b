"""Writing files so that a crash at any moment leaves the old file or the new one, never half."""

import os
import secrets
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], data: bytes, *, mode: int = 0o666) -> None:
    """Write `data` to `path`, replacing what was there in one step.

    The bytes go to a hidden file in the same directory, reach the disk, and then take the name.
    Missing parent directories are made. Of several writers at a time, the last one wins.

    Args:
        path: the file to write.
        data: its whole content.
        mode: its permissions, narrowed by the process's umask.

    Raises:
        OSError: the directory or file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Make a rename in the directory durable: a power cut may undo it otherwise."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_directory() -> Path:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/lpgan_jax`, by default in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lpgan_jax"


def use_compilation_cache() -> None:
    """Keep compiled programs between runs; they hold no keys and no shares, which are arguments."""
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
