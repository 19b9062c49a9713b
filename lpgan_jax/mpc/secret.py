"""A secret value as one server holds it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Num

from lpgan_jax.mpc.dealt import Dealt, Owed
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.ring.words import Elements, Ring


class ScaleError(TypeError):
    """Two secrets with unequal fraction bits were combined."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """A dealt part of a value: dealt * 2^shift where all flags are set, else 0.

    Attributes:
        dealt: words, narrower than the ring's if the shift moves the rest out of them.
        shift: static.
        flags: public.
    """

    dealt: Dealt
    shift: int = dataclasses.field(default=0, metadata={"static": True})
    flags: tuple[Bool[jax.Array, "*shape"], ...] = ()

    def share(self, ring: Ring) -> Elements:
        """This server's share of the part."""
        words = self.dealt.share.astype(ring.dtype)
        if self.shift:
            words = ring.shift_left(words, self.shift)
        for flag in self.flags:
            words = jnp.where(flag, words, jnp.zeros_like(words))
        return words

    def map(self, linear: Callable[[jax.Array], jax.Array]) -> Part:
        """The image of the dealt value under a linear map; shift and flags stay."""
        return dataclasses.replace(self, dealt=self.dealt.map(linear))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Secret:
    """One server's share of a fixed-point value.

    A product carries the sum of its factors' fraction bits; sums stay where they are, and
    `truncate` rescales once, where a consumer needs it. A value that was opened under a mask keeps
    both, so that all further products of it (forward, input gradient, weight gradient) reuse them;
    linear maps apply to all three. A truncated value is a public part and two dealt ones, which
    serves elementwise products without another opening (`arithmetic.mul`).

    A product owes a part that DS knows (`arithmetic.bilinear`): then its words and the shares of
    its mask are short by it. Masking it makes up for that without any dealing, since DS adds what
    it owes to the mask; truncation and comparison need no more. Anything else settles it first.

    Attributes:
        words: this server's share (of the value less what is owed), elements of the ring; at an
            exact seat, the value in LSB as float64.
        frac_bits: fraction bits of the value (static).
        opened: the value's public part, once it was masked or truncated.
        parts: the dealt parts that make up the rest: of a masked value its mask.
        owed: what DS has not dealt yet.
    """

    words: Num[jax.Array, "*shape"]
    frac_bits: int = dataclasses.field(metadata={"static": True})
    opened: Elements | None = None
    parts: tuple[Part, ...] = ()
    owed: Owed | None = None

    @property
    def share(self) -> Num[jax.Array, "*shape"]:
        """This server's share.

        Raises:
            TypeError: DS owes a part of it (see `settled`).
        """
        if self.owed is not None:
            raise TypeError(
                "share: DS owes a part of this value: settle, mask or truncate it first"
            )
        return self.words

    def settled(self, party: Seat) -> Secret:
        """The value with nothing owed. DS -> S2: one word per element if there was."""
        if self.owed is None:
            return self
        dealt = party.settle(self.owed, self.words)
        mask = self.mask and Dealt(self.mask.share + dealt.share, self.mask.plain)
        parts = () if mask is None else (Part(mask),)
        return Secret(self.words + dealt.share, self.frac_bits, self.opened, parts)

    @property
    def mask(self) -> Dealt | None:
        """The mask under which the value was opened; of a truncated value None."""
        return self.parts[0].dealt if len(self.parts) == 1 else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.words.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.words.size

    def map(self, linear: Callable[[jax.Array], jax.Array]) -> Secret:
        """The image under a linear map with public static integer coefficients."""
        return (self.unmasked() if self.mask is None else self)._scaled(linear)

    def rearrange(self, move: Callable[[jax.Array], jax.Array]) -> Secret:
        """The image under a map that only moves or repeats elements."""
        return jax.tree.map(move, self)

    def _scaled(self, scale: Callable[[jax.Array], jax.Array]) -> Secret:
        """The image under a map that multiplies each element by a public integer."""
        return Secret(
            scale(self.words),
            self.frac_bits,
            None if self.opened is None else scale(self.opened),
            tuple(part.map(scale) for part in self.parts),
            self.owed and self.owed.map(scale),
        )

    def unmasked(self) -> Secret:
        """Only the share: for a value that leaves the program or starts another life."""
        return Secret(self.words, self.frac_bits, owed=self.owed)

    def reshape(self, *shape: int) -> Secret:
        """As `jnp.reshape`."""
        return self.rearrange(lambda v: v.reshape(shape))

    def __getitem__(self, index: Any) -> Secret:
        """Static indexing."""
        return self.rearrange(lambda v: v[index])

    def sum(self, axis: tuple[int, ...]) -> Secret:
        """Sum over axes; local. The sum, not only each term, must stay in range."""
        return self.map(lambda v: v.sum(axis, dtype=v.dtype))

    def __neg__(self) -> Secret:
        return self._scaled(jnp.negative)

    def __add__(self, other: Secret) -> Secret:
        """SecAdd: local; the sum is a new value without a mask."""
        self.require_scale_of(other)
        self.require_ring_of(other)
        words = self.words + other.words
        return Secret(words, self.frac_bits, owed=_sum_owed(words.shape, self.owed, other.owed))

    def __sub__(self, other: Secret) -> Secret:
        return self + -other.unmasked()

    def times_int(self, factor: int) -> Secret:
        """Multiply by a public integer; local, exact, the scale stays."""
        return self._scaled(lambda v: v * _word(factor, v.dtype))

    def times_ints(self, factors: Sequence[int]) -> Secret:
        """Multiply along the leading axis by public integers; local, exact, the scale stays."""
        column = (-1,) + (1,) * (len(self.shape) - 1)

        def scale(words: jax.Array) -> jax.Array:
            return words * np.stack([_word(f, words.dtype) for f in factors]).reshape(column)

        return self._scaled(scale)

    def divided_by_power_of_two(self, exponent: int) -> Secret:
        """Divide by 2^exponent by reading the same words at a finer scale; local, exact."""
        return dataclasses.replace(self, frac_bits=self.frac_bits + exponent)

    def at_scale(self, frac_bits: int) -> Secret:
        """The same value with more fraction bits; local, exact. Fewer: `truncate`."""
        if frac_bits < self.frac_bits:
            raise ScaleError(
                f"at_scale: {self.frac_bits} -> {frac_bits} fraction bits: use truncate"
            )
        factor = 1 << (frac_bits - self.frac_bits)
        return dataclasses.replace(self.times_int(factor), frac_bits=frac_bits)

    def require_scale_of(self, other: Secret) -> None:
        """Raise `ScaleError` unless the other has as many fraction bits."""
        if self.frac_bits != other.frac_bits:
            raise ScaleError(f"fraction bits differ: {self.frac_bits} and {other.frac_bits}")

    def require_ring_of(self, other: Secret) -> None:
        """Raise TypeError unless the other is in the same ring: in words of one type."""
        if self.words.dtype != other.words.dtype:
            raise TypeError(
                f"rings differ: {self.words.dtype} and {other.words.dtype} words: truncate one"
            )


def _sum_owed(shape: tuple[int, ...], x: Owed | None, y: Owed | None) -> Owed | None:
    if x is None and y is None:
        return None
    plains = [owed.plain for owed in (x, y) if owed is not None and owed.plain is not None]
    if not plains:  # online
        return Owed(None)
    return Owed(jnp.broadcast_to(functools.reduce(jnp.add, plains), shape))


def _owing_zero(secret: Secret, online: bool) -> Secret:
    zeros = None if online else jnp.zeros(secret.shape, secret.words.dtype)
    return dataclasses.replace(secret, owed=Owed(zeros))


def is_secret(leaf: object) -> bool:
    """Whether a node of a tree is a `Secret`: for `is_leaf`."""
    return isinstance(leaf, Secret)


def _word(value: int, dtype: Any) -> np.ndarray:
    """A public integer as a constant of a ring's dtype (or of float64, in the clear)."""
    if np.issubdtype(dtype, np.floating):
        return np.asarray(value, dtype)
    return np.asarray(value % 2 ** (8 * np.dtype(dtype).itemsize), dtype)


def add_public(party: Seat, secret: Secret, value: float) -> Secret:
    """Add a public real; local: S1 adds it to its share. The sum keeps the value's mask."""
    constant = jnp.broadcast_to(
        _word(round(value * 2.0**secret.frac_bits), secret.words.dtype), secret.shape
    )
    opened = None if secret.opened is None else secret.opened + constant
    return dataclasses.replace(
        secret, words=secret.words + party.public_share(constant), opened=opened
    )


def concatenate(secrets: list[Secret], axis: int = 0) -> Secret:
    """Concatenate secrets of one scale; masks are kept if all have one."""
    for secret in secrets[1:]:
        secrets[0].require_scale_of(secret)
    if len({tuple(part.shift for part in secret.parts) for secret in secrets}) > 1:
        secrets = [secret.unmasked() for secret in secrets]
    if any(secret.owed is not None for secret in secrets):
        online = any(s.owed is not None and s.owed.plain is None for s in secrets)
        secrets = [s if s.owed is not None else _owing_zero(s, online) for s in secrets]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *secrets)
