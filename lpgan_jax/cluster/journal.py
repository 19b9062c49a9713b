"""A server's shares of results, on its disk, until SP has them.

A journal is a directory of segments, files of about a megabyte. Results are added to the last one,
and what SP says that it has is dropped by removing files: nothing is copied, so that no crash comes
at a wrong moment. Memory does not grow with what waits.

Results up to a checkpoint's step are on the disk when that checkpoint is. Later ones may be void:
an attempt that goes on from the checkpoint computes them again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgpack

from lpgan_jax.cluster.wire import Malformed, Result, decode, encode
from lpgan_jax.common.files import private_directory, private_open, sync_directory

SEGMENT = 2**20
"""Bytes of a segment, before its last result."""

Order = tuple[int, int]
"""Attempt and serial: what comes later is larger."""

Place = tuple[int, int]
"""The number of a segment, and bytes from its beginning."""


class Journal:
    """Results in their order; thread-safe, but only one thread at a time may append.

    A tail that a crash cut short is dropped.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """`path`: the directory, made if it is not there.

        Raises:
            OSError: it cannot be read or written, is a symbolic link, or belongs to someone else.
        """
        self._path = Path(path)
        private_directory(self._path.parent)
        private_directory(self._path)
        self._changed = threading.Condition()
        self._generation = 0
        self._received: Order = (0, 0)  # the last result that SP says it has
        found = sorted(int(p.stem) for p in self._path.glob("*.msgpack") if p.stem.isdecimal())
        # In order, here and later: the last one is written to.
        self._sizes = {number: self._file_of(number).stat().st_size for number in found} or {0: 0}
        self._newest: dict[int, Order] = {}  # the last result of a segment, where it is known
        self._open_last()
        number = next(reversed(self._sizes))
        self._cut(number, max((end for *_, end in self._entries(number)), default=0))

    def _file_of(self, number: int) -> Path:
        return self._path / f"{number:08}.msgpack"

    def _open_last(self) -> None:
        self._file = private_open(self._file_of(next(reversed(self._sizes))), "r+b")
        self._file.seek(0, os.SEEK_END)
        sync_directory(self._path)  # it may be new

    def _entries(self, number: int, start: int = 0) -> Iterator[tuple[Result, bytes, int]]:
        """A segment's results with their payloads, and where each ends; up to a damage."""
        with self._file_of(number).open("rb") as file:
            file.seek(start)
            unpacker = msgpack.Unpacker(file, max_buffer_size=0)
            with suppress(Malformed, ValueError, TypeError, msgpack.UnpackException):
                for head, payload in unpacker:
                    result = decode(Result, head)
                    if not isinstance(payload, bytes) or len(payload) != result.size:
                        return
                    yield result, payload, start + unpacker.tell()

    # Writing ----------------------------------------------------------------------------------

    def append(self, result: Result, payload: bytes) -> None:
        """Add a result."""
        with self._changed:
            number = next(reversed(self._sizes))
            if self._sizes[number] >= SEGMENT:
                self._file.close()
                number += 1
                self._sizes[number] = 0
                self._open_last()
            self._file.write(msgpack.packb((encode(result), payload)))
            self._file.flush()
            if self._file.tell() >= SEGMENT:
                self.sync()  # so that only the last segment can be cut short
            self._sizes[number] = self._file.tell()
            self._newest[number] = _order(result)
            self._changed.notify_all()

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        with self._changed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def forget(self, after: int) -> None:
        """Drop the results of later steps, and what was learnt: they will be computed again."""
        with self._changed:
            self._file.close()
            for number in [*reversed(self._sizes)]:
                # What is later is of later steps. Newest first: a crash leaves no gap.
                kept = 0
                for head, _, end in self._entries(number):
                    if head.step > after or head.kind == "learnt":
                        break
                    kept = end
                self._newest.pop(number, None)
                if kept or len(self._sizes) == 1:
                    break
                self._file_of(number).unlink()
                del self._sizes[number]
            self._open_last()
            self._cut(number, kept)
            self._generation += 1
            self._changed.notify_all()

    def _cut(self, number: int, end: int) -> None:
        self._file.seek(end)
        self._file.truncate()
        self._sizes[number] = end

    # For SP -----------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Bytes on the disk, most of which SP does not have."""
        with self._changed:
            return sum(self._sizes.values())

    def wait_until_received(self, order: Order, seconds: float) -> bool:
        """Wait for SP to have a result, but not longer; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self._received >= order, seconds)

    def drop(self, upto: Order) -> None:
        """Remove what SP has: all up to a result, as far as it fills segments.

        The last segment stays, and so what was learnt, which is the last result.
        """
        with self._changed:
            self._received = max(self._received, upto)
            self._changed.notify_all()
            for number in [*self._sizes][:-1]:
                if number not in self._newest:
                    orders = [_order(head) for head, *_ in self._entries(number)]
                    self._newest[number] = max(orders, default=(0, 0))
                if self._newest[number] > upto:
                    break
                self._file_of(number).unlink()
                del self._sizes[number], self._newest[number]

    def results(self, after: Order, seconds: float) -> Iterator[tuple[Result, bytes] | None]:
        """The results after one, as they come; ends when `forget` is called.

        A damaged segment is left out from the damage on.

        Args:
            after: the last one that is not wanted; (0, 0) for all.
            seconds: None is given whenever there was no other for so long.
        """
        generation, place = self._generation, (0, 0)
        while True:
            with self._changed:
                found = self._wait(generation, place, seconds)
                if self._generation != generation:
                    return
                entry = next(self._entries(*found), None) if found else None
                if found:
                    number, _ = found
                    place = number, entry[2] if entry else self._sizes[number]
            if entry and _order(entry[0]) > after:
                yield entry[:2]
            elif not found:
                yield None

    def _wait(self, generation: int, place: Place, seconds: float) -> Place | None:
        """`_next`, once there is a result, or the generation is over, or after so long."""

        def something() -> bool:
            return self._generation != generation or self._next(place) is not None

        return self._next(place) if self._changed.wait_for(something, seconds) else None

    def _next(self, place: Place) -> Place | None:
        """The first place, from one on, at which there is a result."""
        number, offset = place
        for other, size in self._sizes.items():
            start = offset if other == number else 0
            if other >= number and start < size:
                return other, start
        return None


def _order(result: Result) -> Order:
    return result.attempt, result.serial
