"""The messages of the links to DS and SP, and how they are checked.

A message is a msgpack map of known fields, or a *chunk*: raw bytes of the payload that the message
before it announced. Nothing is believed: a size is compared with what the receiver expects before
anything is allocated, and every message to a server names its session and sender, and what belongs
to an attempt names that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import msgpack
import numpy as np
from pydantic import Field

from lpgan_jax.training.config import LONGEST_JSON, ConfigError, Fields, validated
from lpgan_jax.training.tasks import TaskKind

CHUNK = 2**20
"""Bytes of payload in a message, at most."""
LARGEST_MESSAGE = CHUNK + 2**16
"""Bytes of a message, at most: gRPC refuses larger ones unread."""
LONGEST_HEAD = LONGEST_JSON + 2**12
"""Bytes of a message that is no chunk, at most."""
LONGEST_OPENING = 2**20
"""Bytes of an opening: it has four for each operation of the program, in hexadecimal."""
LONGEST_NOTE = 2**16 + 2**15
"""Bytes of what servers say to each other, at most."""
LONGEST_CERTIFICATE = 2**14
"""Characters of a certificate, with those between it and the authority's."""


class Refused(Exception):
    """A message that is not accepted, and why. The session is as it was."""


class Malformed(Refused):
    """It is no message, or has a field or size that it should not have."""


class Forbidden(Refused):
    """Its sender may not send it."""


class Unexpected(Refused):
    """It is of another session or attempt, or comes out of turn."""


class Message(Fields):
    """What every message to a server says of itself."""

    session: str = Field(max_length=64)
    role: str = Field(max_length=64)
    """Its sender."""


class Hello(Message):
    """A question without more to say: `describe`."""


class Received(Message):
    """SP has all results up to one, safely: servers may drop them.

    That is also what SP asks for later results with.
    """

    attempt: int = Field(ge=0)
    """Of that result, as its serial; both are 0 before the first."""
    serial: int = Field(ge=0)
    step: int = Field(ge=0)
    """Steps done when it was computed."""


class Watching(Message):
    """An owner wants to know the progress of an attempt, and is there for as long as it asks."""

    attempt: int


class Save(Fields):
    """A checkpoint that a server has."""

    step: int = Field(ge=0)
    name: str = Field(max_length=64)


class Description(Message):
    """What a server says of itself."""

    phase: str
    """`ready` for a new attempt, `busy` with one."""
    attempt: int = Field(ge=0, lt=2**32 - 1)
    """The last one that was opened; 0 before the first."""
    start: int
    """The step that it started after."""
    prepared: bool
    """Whether the attempt's programs are compiled."""
    config: str | None
    """Of the training, JSON, once it is known."""
    functions: dict[str, str]
    """A digest of each function of its program (`agreement.short`)."""
    steps: int = Field(ge=0)
    """That the attempt's training has in all; 0 without one."""
    saves: list[Save]


class Opening(Message):
    """DS opens an attempt."""

    attempt: int = Field(ge=1, lt=2**32)
    """Higher than any before."""
    config: str = Field(max_length=LONGEST_JSON)
    """Of the training, JSON: public."""
    functions: dict[str, str]
    """The digests of its program's functions (`agreement.digests_of`)."""
    steps: int = Field(ge=1, lt=2**62)
    """That the training has in all."""
    start: int = Field(ge=0, lt=2**62)
    """The step whose checkpoint is gone on from; 0 for a new training."""
    save: str | None = Field(max_length=64)
    """The name of that checkpoint."""
    checked: bool = False
    """Whether DS checks what the servers do."""


ParcelKind = Literal[TaskKind, "inputs", "drop"]


class Parcel(Message):
    """The head of what DS or another owner sends for one task; its payload follows in chunks.

    | kind | payload |
    |---|---|
    | `state` | shares of the initial state |
    | `train` | shares of a batch (if it is DS's turn), a seed, corrections (S2) |
    | `guard` | a seed, corrections (S2) |
    | `answer` | shares of a question (unless who asks shared one), a seed, corrections (S2) |
    | `inputs` | shares of a batch, of another owner |
    | `checkpoint`, `finish` | none |
    | `drop` | none: `request` will not be answered |
    """

    attempt: int
    serial: int = Field(ge=0)
    """Counts a sender's parcels in an attempt."""
    kind: ParcelKind
    step: int = Field(ge=0)
    """Steps done before it."""
    size: int = Field(ge=0)
    """Bytes of payload."""
    answer: str | None = Field(default=None, max_length=64)
    """The name of what is asked."""
    request: str | None = Field(default=None, max_length=64)
    """Whom the answer is for, if it is not the sample of a training."""
    save: str | None = Field(default=None, max_length=64)
    """The name of a checkpoint."""
    spent: int = Field(default=0, ge=0, lt=2**62)
    """Steps with noise that were begun, in all attempts and this one included."""


ResultKind = Literal["told", "step", "alarm", "answer", "learnt"]
"""`told`: what SP is told of a step; `step`: that one is done of which it is told nothing, without
a payload; `alarm`: which tensors were out of range, when some were; `answer`: of the sample;
`learnt`: at the end."""


# What servers say that they did -------------------------------------------------------------------


class Signed(Fields):
    """A message that others hand on, so that it is signed (`signatures`)."""

    attempt: int
    serial: int
    """Of the parcel that it is about."""
    signature: bytes = b""


class Shown(Fields):
    """What a server says to the other one at the beginning, where DS checks."""

    certificate: str = Field(max_length=LONGEST_CERTIFICATE)
    """Its own, PEM, with those between it and the authority's."""


class Sent(Signed):
    """What a server says to the other one, and through it to DS, that it sent in a task."""

    digests: bytes = Field(max_length=2**16)
    """Of its messages (`transcript.Digests`)."""
    received: bytes
    """Digest of the digests of the other's messages, as they came."""


class Alarm(Signed):
    """What both say to open an alarm: own share of it, which is a bit modulo 2^64."""

    share: int = Field(ge=0, lt=2**64)


class Commitment(Signed):
    """What a server says to DS that it did in a task, before it knows whether DS will look."""

    own: Sent
    other: Sent
    """As the other server said."""
    state: bytes
    """Digest of its share of the state after the task."""
    result: bytes
    """Digest of its share of the result."""
    certificate: str = Field(max_length=LONGEST_CERTIFICATE)
    """Its own, PEM."""
    other_certificate: str = Field(max_length=LONGEST_CERTIFICATE)
    """The other server's, as it said."""


class Opened(Fields):
    """How an alarm was opened: what both servers said."""

    own: Alarm
    other: Alarm


class Reveal(Message):
    """DS asks for a server's share of the state before a task; it follows in chunks."""

    attempt: int
    serial: int = Field(ge=-1)
    """Of the task; -1: the state that the attempt began with."""


class Revealed(Fields):
    """The head of a share of the state."""

    size: int


class Voucher(Signed):
    """DS says that a server may hand a result to SP, and what its share is.

    It stands for the checks of the result itself, if it is no `told`, and of the last step that was
    looked at (docs/security). Of one result there are two, one for each server: a digest of a small
    share tells the share to whoever can guess the result.
    """

    server: str
    kind: ResultKind
    step: int
    digest: bytes
    """Of the server's share."""
    certificate: str = Field(max_length=LONGEST_CERTIFICATE)
    """DS's."""


class Release(Message):
    """DS will not ask for states up to a task's any more; and vouches for some results."""

    attempt: int
    upto: int
    heard: int = -1
    """DS has what both servers say of tasks up to this, so that an alarm may be opened."""
    vouchers: list[Voucher] = Field(default=[])
    caught: str | None = Field(default=None, min_length=1, max_length=LONGEST_JSON)
    """A server that deviated, and how: this session is over."""


class Request(Fields):
    """A question that waits, as DS sees it."""

    name: str
    asker: str
    answer: str
    own_question: bool


class Progress(Fields):
    """What a server tells DS when something has changed."""

    attempt: int
    prepared: bool
    received: int
    """Parcels of DS that are there whole."""
    done: int
    """Parcels of DS that are done with."""
    requests: list[Request]
    refused: str | None
    """Why this server will not go on with the attempt."""
    commitments: list[Commitment] = Field(default=[])
    """To tasks that DS has not released."""
    opened: list[Opened] = Field(default=[])
    """Alarms of these."""
    noise_key: bytes = Field(default=b"", max_length=32)
    """What its noise is drawn from, where DS checks what it does."""


class Result(Fields):
    """The head of a share of a result; its payload follows in chunks."""

    attempt: int
    serial: int
    """Of the parcel that it is the result of."""
    kind: ResultKind
    step: int
    """Steps done when it was computed."""
    seconds: float
    """That the step took."""
    size: int
    spent: int = Field(default=0, ge=0, lt=2**62)
    """As of its parcel."""
    voucher: Voucher | None = None
    """In a session whose servers are checked."""


class Question(Message):
    """SP or a client asks; shares of the question follow in chunks."""

    name: str = Field(min_length=8, max_length=64)
    """Of the request, the same at both servers."""
    answer: str = Field(max_length=64)
    """The name of what is asked."""
    size: int = Field(ge=0)
    """Bytes of the question; 0: DS shares one, as of the sample."""


_LONGEST: dict[type[Fields], int] = {
    Opening: LONGEST_OPENING,
    Sent: LONGEST_NOTE,
    Shown: LONGEST_NOTE,
    Progress: 2**20,
    Release: 2**20,
}
"""Bytes of messages that may be longer than `LONGEST_HEAD`."""

_Model = TypeVar("_Model", bound=Fields)


def encode(message: Fields) -> bytes:
    """A message as bytes."""
    return msgpack.packb(message.model_dump())


def decode(model: type[_Model], data: bytes) -> _Model:
    """The message in these bytes.

    Raises:
        Malformed: there is none of this kind.
    """
    longest = _LONGEST.get(model, LONGEST_HEAD)
    if len(data) > longest:
        raise Malformed(f"{len(data)} bytes, expected a {model.__name__} of at most {longest}")
    try:
        fields = msgpack.unpackb(data, strict_map_key=True)
    except Exception as error:  # msgpack's errors have no common class
        raise Malformed(f"expected a {model.__name__} in msgpack: {type(error).__name__}") from None
    try:
        return validated(model, fields, model.__name__)
    except (ConfigError, RecursionError) as error:
        raise Malformed(str(error)[:500]) from None


def chunks(buffers: Iterable[Any]) -> Iterator[bytes]:
    """The bytes of arrays, one after the other, as chunk messages."""
    for buffer in buffers:
        view = memoryview(buffer).cast("B") if len(buffer) else b""
        for start in range(0, len(view), CHUNK):
            yield bytes(view[start : start + CHUNK])


def receive(frames: Iterator[bytes], size: int) -> bytearray:
    """The payload in the chunks that follow a head.

    Raises:
        Malformed: they are not as many bytes as were announced.
    """
    payload, filled = bytearray(size), 0
    while filled < size:
        chunk = next(frames, b"")
        if not 0 < len(chunk) <= min(CHUNK, size - filled):
            raise Malformed(
                f"payload: a chunk of {len(chunk)} bytes after {filled} of {size}, "
                f"expected 1 to {min(CHUNK, size - filled)}"
            )
        payload[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return payload


# Arrays as bytes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Arrays one after the other, little-endian.

    Attributes:
        shapes: of the arrays, as anything with a shape and a dtype.
    """

    shapes: Sequence[Any]

    @classmethod
    def of(cls, tree: Any) -> Layout:
        """Of a pytree's leaves."""
        return cls([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(tree)])

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in self.shapes)

    def split(self, payload: bytearray | bytes | memoryview) -> list[np.ndarray]:
        """The arrays in a payload of the right size."""
        arrays, start = [], 0
        for of in self.shapes:
            size = math.prod(of.shape)
            dtype = np.dtype(of.dtype).newbyteorder("<")
            array = np.frombuffer(payload, dtype, size, start)
            arrays.append(array.reshape(of.shape))
            start += size * dtype.itemsize
        return arrays


def half_shapes(shapes: Any) -> Any:
    """The shapes of one server's halves, of a pytree of those of paired arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)


def buffers(tree: Any) -> list[np.ndarray]:
    """The leaves of a pytree of arrays as `chunks` takes them."""
    leaves = (np.ascontiguousarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree))
    return [leaf.view(np.uint8) for leaf in leaves]


def nbytes(buffers: Iterable[np.ndarray]) -> int:
    """Bytes in all."""
    return sum(buffer.nbytes for buffer in buffers)
