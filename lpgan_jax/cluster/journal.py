"""A server's shares of results, in a file, until SP has them.

SP reads the journal from its start whenever it connects, so that it needs no memory of its own, and
nothing is lost if either of them ends. Results up to a checkpoint's step are on the disk when that
checkpoint is.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgpack

from lpgan_jax.cluster.wire import Malformed, Result, decode, encode
from lpgan_jax.common.files import private_directory, private_open


class Journal:
    """Results in their order; thread-safe. A tail that a crash cut short is dropped.

    Attributes:
        generation: counts the calls of `forget`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """`path`: the file, made if it is not there.

        Raises:
            OSError: it cannot be read or written, is a symbolic link, or belongs to someone else.
        """
        private_directory(Path(path).parent)
        self._heads: list[tuple[Result, int]] = []  # with the place of each in the file
        self._changed = threading.Condition()
        self.generation = 0
        self._file = private_open(path, "r+b")
        self._recover()

    def _recover(self) -> None:
        end = 0
        unpacker = msgpack.Unpacker(self._file, max_buffer_size=0)
        try:
            for head, payload in unpacker:
                result = decode(Result, head)
                if not isinstance(payload, bytes) or len(payload) != result.size:
                    break
                self._heads.append((result, end))
                end = unpacker.tell()
        except (Malformed, ValueError, TypeError, msgpack.UnpackException):
            pass
        self._file.seek(end)
        self._file.truncate()

    def append(self, result: Result, payload: bytes) -> None:
        """Add a result."""
        with self._changed:
            place = self._file.tell()
            self._file.write(msgpack.packb((encode(result), payload)))
            self._file.flush()
            self._heads.append((result, place))
            self._changed.notify_all()

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def forget(self, after: int) -> None:
        """Drop the results of later steps, and what was learnt: they will be computed again."""
        with self._changed:
            void = [h.step > after or h.kind == "learnt" for h, _ in self._heads]
            if True in void:
                first = void.index(True)  # what is later is of later steps
                end = self._heads[first][1]
                del self._heads[first:]
                self._file.seek(end)
                self._file.truncate()
            self.generation += 1
            self._changed.notify_all()

    def wait(self, index: int, seconds: float) -> tuple[Result, bytes] | None:
        """The result at a place, from 0; None if it is not there after so long.

        Places mean something within one `generation`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: index < len(self._heads), seconds):
                return None
            head, place = self._heads[index]
            return head, self._payload(head, place)

    def _payload(self, head: Result, place: int) -> bytes:
        length = len(msgpack.packb((encode(head), b""))) + head.size + 8
        data = os.pread(self._file.fileno(), length, place)
        unpacker = msgpack.Unpacker(max_buffer_size=0)
        unpacker.feed(data)
        payload: bytes = next(unpacker)[1]
        return payload
