"""What a role leaves of what happened to it: two files, each with one predecessor, and no more.

`ROLE.jsonl` has events and statuses, `ROLE.out` what its workers print. What would make one longer
than `LONGEST` begins it anew, and what was there is then in `ROLE.jsonl.1` or `ROLE.out.1`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from lpgan_jax.common.files import atomic_write, private_directory, private_open

LONGEST = 2**23
"""Bytes of a file."""


def predecessor(path: Path) -> Path:
    """Where a file's older lines are."""
    return path.with_name(f"{path.name}.1")


class Log:
    """JSON lines of what happened to one role, with the time; no line depends on a secret."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """`path`: appended to; made with its directory, and the one above, if it is not there.

        Raises:
            PermissionError: one of the three is a symbolic link, or belongs to someone else.
        """
        self.path = Path(path)
        private_directory(self.path.parent.parent)
        private_directory(self.path.parent)
        private_open(self.path, "ab").close()
        self._last = -1.0

    def event(self, report: dict[str, Any]) -> None:
        """Write an event."""
        line = json.dumps({"time": round(time.time(), 3), **report}).encode() + b"\n"
        # A full disk must not end the one who would tell.
        with contextlib.suppress(OSError):
            if self.path.exists() and self.path.stat().st_size + len(line) > LONGEST:
                os.replace(self.path, predecessor(self.path))
            with private_open(self.path, "ab") as file:
                file.write(line)

    def status(self, report: dict[str, Any]) -> None:
        """Write a status, at most one a second."""
        if time.monotonic() - self._last >= 1.0:
            self._last = time.monotonic()
            self.event(report)


def shorten(path: Path) -> None:
    """Move what a file has to its predecessor, once it is long, while others append to it.

    What they write in the moment between is lost.
    """
    with contextlib.suppress(OSError), private_open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LONGEST:
            file.seek(size - LONGEST)
            atomic_write(predecessor(path), file.read(LONGEST))
            file.truncate(0)
