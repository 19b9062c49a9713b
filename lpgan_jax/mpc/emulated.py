"""Shadow mode: the secure program on plaintext integers, with the protocols' own rounding.

The same code as on shares, modulo 2^64, and the same random variables decide how a value is
rounded; but there is one word for each value and nothing is dealt, so that it runs several times as
fast. Its results follow the protocols' law: a truncation draws the mask that DS would have drawn,
and wraps where the servers' would. Anything that the random words cannot change (products,
comparisons, selections) is computed directly, and so are series where the result is coarse.

It is for experiments on data that need no protection, and hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc import arithmetic, clipping, compare, exponential, series
from lpgan_jax.mpc.dealt import Dealt, Owed
from lpgan_jax.mpc.party import Words, call_keys
from lpgan_jax.mpc.plain import PlainSeat
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.ring.words import Ring

Rounding = Literal["stochastic", "nearest", "local"]
"""How values are truncated: as the protocols do, or in one of two other ways (`ROUNDINGS`)."""


class EmulatedSeat(PlainSeat):
    """The seat of nobody: values are whole words of the ring, as uint64."""

    def __init__(self, key: jax.Array, rounding: Rounding = "stochastic") -> None:
        """`key`: a typed key, of any PRNG; valid in the trace that makes this."""
        super().__init__()
        self._round = ROUNDINGS[rounding]
        self._words = Words(call_keys(key))

    def real(self, value: Secret) -> jax.Array:
        """A value as float64 (exact below 2^53 LSB)."""
        ring = self.ring_of(value.words)
        return ring.signed(value.share).astype(jnp.float64) * 2.0**-value.frac_bits

    # What a party does, with one server that holds everything ------------------------------------

    def exchange(self, words: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        """There is nobody else: the other message is 0."""
        return words, jnp.zeros_like(words)

    def mask(self, shape: tuple[int, ...], dtype: Any = None, bitwise: bool = False) -> Dealt:
        """A uniform word for each element."""
        self._check_fresh()
        words = self._words.draw(shape, dtype or self.ring.dtype)
        return Dealt(words, words)

    def correlate(
        self, function: Callable[..., jax.Array], *values: Dealt, bitwise: bool = False
    ) -> Dealt:
        """function(values)."""
        result = function(*(value.plain for value in values))
        return Dealt(result, result)

    def compute(self, function: Callable[..., jax.Array], *values: Dealt) -> Owed:
        """function(values)."""
        return Owed(function(*(value.plain for value in values)))

    def settle(self, owed: Owed, like: jax.Array) -> Dealt:
        """What was owed."""
        assert owed.plain is not None
        return Dealt(owed.plain, owed.plain)

    def _seeds(self, count: int) -> Any:
        return self._words.children(count)

    def _child(self, seed: Any) -> EmulatedSeat:
        child = EmulatedSeat(seed)
        child._round, child.place = self._round, self.place
        return child

    def round(self, x: Secret, frac_bits: int, ring: Ring | None = None) -> Secret:
        """A truncation, recorded; none where scale and ring stay."""
        own = self.ring_of(x.words)
        ring = ring or own
        if x.frac_bits == frac_bits and ring.bits <= own.bits:
            return arithmetic.narrowed(x, ring)
        result = self._round(self, x, frac_bits, ring)
        self.saw_truncation(x, result)
        return result

    def times_small(self, x: Secret, digits: arithmetic.Digits, frac_bits: int) -> Secret:
        """A product with a public real, rounded as a truncation is."""
        if self._round is _stochastic:
            return _by_one_mask(self, x, digits, frac_bits)
        ring = self.ring_of(x.words)
        parts = [(sign, self._round(self, x, frac_bits - shift, ring)) for sign, shift in digits]
        total: Any = sum(sign * part.share.astype(np.int64) for sign, part in parts)
        return Secret(total.astype(ring.dtype), frac_bits)


def run(
    function: Callable[..., Any],
    key: jax.Array,
    values: Any,
    public: Any = None,
    rounding: Rounding = "stochastic",
) -> Any:
    """Run a protocol on plaintext integers, where `party.simulate` runs it on shares.

    Args:
        function: (party, values, public) -> outputs, as for `party.simulate`.
        key: a typed key; it decides the rounding.
        values: a pytree of `Secret`s whose words are whole: uint64, without the leading axis of
            paired arrays (`share_trees.encoded`).
        public: what both servers would know.
        rounding: "stochastic", as the protocols round; or one of the two that they do not use.

    Returns:
        The outputs, whole.
    """
    return function(EmulatedSeat(key, rounding), values, public)


# Truncation ---------------------------------------------------------------------------------------

_stochastic = arithmetic.truncate.dispatch(Seat)


def _nearest(party: EmulatedSeat, x: Secret, frac_bits: int, ring: Ring) -> Secret:
    """To the nearest multiple, halves up. Under sharing it would take a comparison a value."""
    shift = x.frac_bits - frac_bits
    own = party.ring_of(x.words)
    half = own.constant((1 << shift) >> 1)
    rounded = own.signed(x.share + half).astype(np.int64) >> np.int64(shift)
    return Secret(rounded.astype(ring.dtype), frac_bits)


def _local(party: EmulatedSeat, x: Secret, frac_bits: int, ring: Ring) -> Secret:
    """Each server truncates its own share (SecureML, Mohassel and Zhang 2017; CrypTen).

    x' >> f and -(-x'' >> f): off by up to 1 LSB, and wrong by 2^(64-f) with probability |x|/2^64.
    Range reductions fill the range by design; no local truncation would do there, and they stay as
    they are.
    """
    shift = x.frac_bits - frac_bits
    if party.filling:
        return _stochastic(party, x, frac_bits, ring)
    own = party.ring_of(x.words)
    first = party.mask(x.shape, own.dtype).share
    second = x.share - first
    result = own.signed(own.shift_right(first, shift) - own.shift_right(-second, shift))
    return Secret(result.astype(ring.dtype), frac_bits)


ROUNDINGS: dict[str, Callable[[Any, Secret, int, Ring], Secret]] = {
    "stochastic": _stochastic,
    "nearest": _nearest,
    "local": _local,
}


@arithmetic.truncate.register
def _truncate(party: EmulatedSeat, x: Secret, frac_bits: int, ring: Ring | None = None) -> Secret:
    return party.round(x, frac_bits, ring)


_by = arithmetic.truncate_by.dispatch(Seat)


@arithmetic.truncate_by.register
def _truncate_by(party: EmulatedSeat, x: Secret, shift: jax.Array) -> Secret:
    result = _by(party, x, shift)
    party.saw_truncation(x, result)
    return result


_by_one_mask = arithmetic.times_small.dispatch(Seat)


@arithmetic.times_small.register
def _times_small(
    party: EmulatedSeat, x: Secret, digits: arithmetic.Digits, frac_bits: int
) -> Secret:
    result = party.times_small(x, digits, frac_bits)
    party.saw_truncation(x, result)
    return result


# What the random words cannot change ------------------------------------------------------------


@compare.less_than_public.register
def _less_than_public(
    party: EmulatedSeat,
    x: Secret,
    thresholds: Sequence[int],
    bits: int | None = None,
    low: int = 0,
) -> compare.Bit:
    party.saw_comparison(x, bits)
    ring = party.ring_of(x.words)
    limits = np.stack([ring.constant(t >> low) for t in thresholds])
    limits = limits.reshape((-1,) + (1,) * len(x.shape))
    words = x.share
    if low:  # the carry out of the lowest bits is lost
        a, e = arithmetic.opening(arithmetic.masked(party, x))
        words = ring.shift_right(e, low) + ring.shift_right(a.share, low)
    # The top bit of the narrower sum, as the carry tree computes it: also out of range.
    top = ring.shift_right(words[None] - limits, (bits or ring.bits) - low - 1) & ring.constant(1)
    return compare.Bit(top != 0, Dealt(jnp.zeros(top.shape, ring.dtype), None))


# The protocol's sines add errors of up to 2^-26 to a series. Where a result's LSB is 16 times as
# large, they are lost in its rounding.
_COARSE_BITS = 22


@clipping.clipped_sum.register
def _clipped_sum(party: EmulatedSeat, gradients: Secret, weights: Secret, clip: float) -> Secret:
    """As the protocol; what it truncates and compares fits, whatever the gradients are."""
    before = len(party.seen)
    total = clipping.clipped_sum.dispatch(Seat)(party, gradients, weights, clip)
    del party.seen[before:]
    return total


@series.waves.register
def _waves(
    party: EmulatedSeat,
    function: series.Series,
    x: Secret,
    frac_bits: int = series.WAVE_BITS,
) -> Secret:
    if frac_bits > _COARSE_BITS:
        return series.waves.dispatch(Seat)(party, function, x, frac_bits)
    total = _series_at(function, _turns(x.share, x.frac_bits + function.log_period))
    words = jnp.round((total + function.constant) * 2.0**series.WAVE_BITS).astype(jnp.int64)
    return Secret(words.astype(party.ring.dtype), series.WAVE_BITS)


@exponential.evaluate.register
def _exponential(
    party: EmulatedSeat, window: exponential.Window, x: Secret, frac_bits: int
) -> Secret:
    # Elsewhere it may be anything: what fits, since what is truncated is looked at.
    words = jnp.clip(party.ring.signed(x.share), window.low, window.high - 1)
    inside = Secret(words.astype(party.ring.dtype), x.frac_bits)
    with party.filling_the_range():
        return exponential.evaluate.dispatch(Seat)(party, window, inside, frac_bits)


def _turns(words: jax.Array, log_turn: int) -> jax.Array:
    """The angle that a word stands for, in turns of 2^log_turn, from -1/2 to 1/2."""
    top = words << np.uint64(64 - log_turn)
    return top.astype(jnp.int64).astype(jnp.float64) * 2.0**-64


def _series_at(function: series.Series, turns: jax.Array) -> jax.Array:
    """The sum of the waves, by Horner's rule for complex numbers."""
    cosine, sine = jnp.cos(2 * jnp.pi * turns), jnp.sin(2 * jnp.pi * turns)
    steps = np.diff(function.multiples)
    assert function.multiples[0] == 1
    assert set(steps) in ({1}, {2})
    step_cos, step_sin = cosine, sine
    if steps[0] == 2:
        step_cos, step_sin = cosine**2 - sine**2, 2 * cosine * sine
    real = imaginary = jnp.zeros_like(turns)
    for a, b in zip(reversed(function.cosines), reversed(function.sines), strict=True):
        real, imaginary = (
            real * step_cos - imaginary * step_sin + a,
            real * step_sin + imaginary * step_cos - b,
        )
    return real * cosine - imaginary * sine
