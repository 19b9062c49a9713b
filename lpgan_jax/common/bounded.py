"""Compressed files, read without believing what they say of their size.

A file of a few megabytes may unfold into terabytes. So what it announces is compared with a limit
before anything is read, and then no more is read than was announced.
"""

import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Protocol

import numpy as np

LARGEST = 2**32
"""Bytes that the arrays of a file may have, at most: CelebA at 64x64 has 2.5e9."""

_CHUNK = 2**20
_HEAD = 2**16  # holds any header that NumPy reads


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Up to so many bytes; none at its end."""
        ...


def require_size(size: int, what: str, largest: int | None = None) -> None:
    """Raise ValueError if it is too large, by default more than `LARGEST`."""
    largest = LARGEST if largest is None else largest
    if size > largest:
        raise ValueError(f"{what}: {size} bytes, expected at most {largest}")


def read_at_most(stream: Readable, limit: int, start: bytes = b"") -> bytearray:
    """The bytes of a stream, no more than `limit`, where `start` are the first ones.

    Memory is taken as they come, not as they were announced.
    """
    content = bytearray(start)
    while chunk := stream.read(min(_CHUNK, limit - len(content))):
        content += chunk
    return content


class Npz(Mapping[str, np.ndarray]):
    """The arrays of numbers in an npz file; each is read when it is asked for.

    Args:
        file: that it reads from.

    Raises:
        ValueError: from it and from reading an array: the array is damaged, not one of numbers, or
            together with those that were read before larger than `LARGEST`. Damage shows as other
            exceptions, too.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file)
        members = self._zip.infolist()
        self._members = {
            info.filename.removesuffix(".npy"): info
            for info in members
            if info.filename.endswith(".npy")
        }
        self._left = LARGEST

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> np.ndarray:
        info = self._members[name]
        require_size(info.file_size, name, self._left)
        self._left -= info.file_size
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name}: compressed as NumPy does not")  # others unfold unboundedly
        with self._zip.open(info) as stream:
            return _read_npy(stream, info.file_size)


def _read_npy(stream: Readable, size: int) -> np.ndarray:
    """The array in an npy file of so many bytes."""
    head = io.BytesIO(read_at_most(stream, min(_HEAD, size)))
    version = np.lib.format.read_magic(head)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(head)
    else:
        raise ValueError(f"npy version {version}, expected 1.0 or 2.0")
    if dtype.kind not in "biufc":
        raise ValueError(f"an array of {dtype}, expected numbers")
    nbytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or head.tell() + nbytes != size:
        raise ValueError(f"{size} bytes, expected {head.tell()} and {nbytes} for {list(shape)}")
    content = read_at_most(stream, nbytes + 1, head.read())  # to the end, where the sum is checked
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
