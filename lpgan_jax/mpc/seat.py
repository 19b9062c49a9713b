"""A seat: what a protocol may ask of its party.

Every protocol is written once, as code over what one seat holds, and runs on any of these:

| seat | holds | for |
|---|---|---|
| `party.Party` | one server's share of each value | `simulate`, `deal` and `online` |
| `emulated.EmulatedSeat` | whole words, rounded as the protocols round | what needs no secrecy |
| `exact.ExactSeat` | whole values as float64, of any size and precision | ranges and headroom |

The primitives (`arithmetic`, `compare`, `series`) are dispatched on the class of the seat: on
shares by default, and otherwise where a seat that holds whole values can do better.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from lpgan_jax.mpc import traces
from lpgan_jax.mpc.dealt import Dealt, Owed
from lpgan_jax.mpc.fixed_point import encode
from lpgan_jax.mpc.traces import named
from lpgan_jax.ring.words import RING32, RING64, Elements, Ring


class StaleParty(RuntimeError):
    """A party was used outside of the trace that made it: its masks would serve several values."""


class SourceLine(str):
    """A line of the user's code, as part of a place: it names tensors, but no message.

    Messages are compared between roles, whose copies of a file may differ in a comment.
    """

    __slots__ = ()


class Seat(ABC):
    """What a protocol may ask of its party.

    Attributes:
        ring: the ring of arithmetic shares.
        half: a smaller one, for values that fit: of half the bytes.
        place: where in the program we are, for the names of messages.
        filling: whether what is truncated now fills the range by design.
    """

    def __init__(self, ring: Ring = RING64, half: Ring = RING32) -> None:
        self.ring, self.half = ring, half
        self.place: tuple[str, ...] = ()
        self.filling = False
        self._trace = traces.current()

    def ring_of(self, words: Any) -> Ring:
        """The ring that words are elements of, by their type."""
        is_half = words.dtype == self.half.dtype != self.ring.dtype
        return self.half if is_half else self.ring

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Name a part of the program: messages in it are called place/.../name."""
        outer, self.place = self.place, (*self.place, name)
        try:
            yield
        finally:
            self.place = outer

    @contextmanager
    def filling_the_range(self) -> Iterator[None]:
        """What is truncated here fills the range by design."""
        outer, self.filling = self.filling, True
        try:
            yield
        finally:
            self.filling = outer

    def watch(self, value: Any, operation: str, bits: int | None = None) -> None:  # noqa: B027
        """Hear of a value that is about to be truncated or compared; for `guard`.

        Args:
            value: a `Secret`.
            operation: "truncate" or "compare".
            bits: width of a comparison; None: all.
        """

    def marked(self, kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as a call named kind:place/.../name (see `traces.named`)."""
        return named(f"{kind}:{self._path(name)}", function)

    def _path(self, name: str) -> str:
        places = (part for part in self.place if not isinstance(part, SourceLine))
        return "/".join(filter(None, (*places, name)))

    @property
    def tensor_place(self) -> str:
        """Where in the program we are, for the names of tensors."""
        return "/".join(filter(None, self.place))

    def _check_fresh(self) -> None:
        if traces.current() != self._trace:
            raise StaleParty(
                "this party belongs to another trace: inside the body of a scan, vmap, jit or "
                "checkpoint, make a new party from a key that is an argument of the body"
            )

    # The servers ------------------------------------------------------------------------------

    @abstractmethod
    def public_share(self, public: Num[jax.Array, "*shape"]) -> Num[jax.Array, "*shape"]:
        """What this seat holds of a public value."""

    def encoded(self, values: Float[jax.Array, "*shape"], frac_bits: int) -> jax.Array:
        """Public reals as words of the ring."""
        return encode(values, frac_bits).astype(self.ring.dtype)

    @abstractmethod
    def exchange(self, words: Elements, name: str) -> tuple[Elements, Elements]:
        """Send `words` to the other server.

        Returns:
            (S1's message, S2's message), known to both.
        """

    def open(self, share: Elements, name: str) -> Elements:
        """Reveal x' + x'' to both servers: one round, one word per element."""
        ring = self.ring_of(share)
        first, second = self.exchange(ring.reduce(share), name)
        return ring.reduce(first + second)

    def open_bits(self, share: Elements, name: str) -> Elements:
        """Reveal u' xor u'' of packed bits to both servers: one round."""
        # A reduction, which XLA does not compute again for each use of a word's 64 bits.
        return jnp.bitwise_xor.reduce(jnp.stack(self.exchange(share, name)))

    # The dealer -------------------------------------------------------------------------------

    @abstractmethod
    def mask(self, shape: tuple[int, ...], dtype: Any = None, bitwise: bool = False) -> Dealt:
        """A uniform mask of ring elements, or with `bitwise` of packed bits (then XOR-shared)."""

    @abstractmethod
    def correlate(
        self, function: Callable[..., Elements], *values: Dealt, bitwise: bool = False
    ) -> Dealt:
        """Shares of function(values), which DS alone can compute. Fresh at every call.

        Args:
            function: of the plain values; any function, also of several arrays.
            values: dealt values; their plains exist in simulate and deal mode only.
            bitwise: the result is packed bits, XOR-shared, instead of ring elements.

        Returns:
            The result as a dealt value. DS -> S2: one word per element of it.
        """

    @abstractmethod
    def compute(self, function: Callable[..., Elements], *values: Dealt) -> Owed:
        """function(values), which DS alone can compute; it deals no shares of it (yet)."""

    @abstractmethod
    def settle(self, owed: Owed, like: Elements) -> Dealt:
        """Shares of a computed value of the shape and dtype of `like`. Fresh at every call."""

    # Loops ------------------------------------------------------------------------------------

    @abstractmethod
    def scan(
        self,
        body: Callable[[Any, Any, Any], tuple[Any, Any]],
        carry: Any,
        xs: Any,
        length: int,
        reverse: bool = False,
    ) -> tuple[Any, Any]:
        """`lax.scan` of a protocol: every iteration has a seat, and so masks, of its own.

        Args:
            body: (seat, carry, x) -> (carry, y).
            carry: of the first iteration.
            xs: scanned over; None for nothing.
            length: iterations.
            reverse: from the last x to the first.

        Returns:
            (the last carry, stacked ys), as of `lax.scan`.
        """
