"""A sum of vectors, none of which counts for more than a given norm: for differential privacy.

    sum of w_i g_i min(1, C / |g_i|)

(Abadi et al., "Deep Learning with Differential Privacy", 2016, of weights 0 and 1). Whoever adds or
leaves out one vector must not change the sum by more than C, or noise that is made for C does not
hide it. That has to hold for the integers that are added up, whatever they are, not for the reals
that they stand for. So here nothing is assumed of a vector: it is any words of the ring.

The bound. Let g be the integers of a vector of d elements, at f fraction bits, and c = C 2^f.

1. A vector with an element beyond 2^B LSB counts for nothing, where d 2^(2B) <= 2^61: its elements
   are compared with -2^B and 2^B, exactly for each word of the ring, and the bits added up. What is
   left of it is a product with 0, which is 0.
2. So S, the sum of g's squares, is below 2^61: it does not wrap, and is exact. If S >= R^2 c^2, the
   vector counts for nothing either.
3. The others get the factor phi = C' / sqrt(max(S / 2^(2f), C'^2)) at F fraction bits: an inverse
   root within 2^-24 of itself and an LSB (`roots.inverse_sqrt`), times C', truncated: an LSB more.
   In all phi <= min(1, C' / |g|) (1 + 2^-24) + (C' + 1) 2^-F.
4. The product phi g is exact in the ring, at f + F bits, and so is the sum. With |g| < R C its norm
   is at most C' (1 + 2^-24) + R C (C' + 1) 2^-F, which is at most C for C' = C (1 - margin) and
   margin = R (C + 1) 2^-F + 2^-24 (as C' <= C).

Nothing is rounded after that, so noise may be added to exactly these integers. Each vector's own
randomness decides how its factor is rounded: the other vectors' parts stay as they are, bit by bit,
whether it is there or not.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lpgan_jax.mpc.arithmetic import bilinear, masked, mul, truncate
from lpgan_jax.mpc.compare import b2a, less_than_public, select
from lpgan_jax.mpc.guard import bits_of, outside
from lpgan_jax.mpc.roots import inverse_sqrt
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret, add_public

FACTOR_BITS = 20
"""F: fraction bits of a factor."""
LARGEST = 64.0
"""R: vectors of so many times the norm that is allowed count for nothing."""
_ROOM = 61  # bits of a sum of squares
_CLIP_BITS = 12


def margin(clip: float) -> float:
    """What the norm of a clipped vector stays below `clip`, in parts of it."""
    return LARGEST * (clip + 1) * 2.0**-FACTOR_BITS + 2.0**-24


def allowed(clip: float) -> float:
    """C': the norm to which vectors are scaled."""
    return clip * (1 - margin(clip))


def element_bits(size: int) -> int:
    """B: elements of 2^B LSB and more make a vector of so many elements count for nothing."""
    return (_ROOM - math.ceil(math.log2(max(size, 2)))) // 2


@functools.singledispatch
@jax.named_scope("clipping")
def clipped_sum(party: Seat, gradients: Secret, weights: Secret, clip: float) -> Secret:
    """The sum over i of weights[i] gradients[i], each of norm `clip` at most.

    Args:
        party: this server's seat.
        gradients: [m, d], any words, at f fraction bits.
        weights: [m], 0 or 1, at 0 fraction bits.
        clip: 2^-6 to 2^6.

    Returns:
        [d] at f + 20 fraction bits, exactly as the module says. 11 rounds, 17 bytes an element; DS
        -> S2: 72 bytes an element.

    Raises:
        ValueError: the clip is out of range, or R clip is more than a sum of squares has room for.
    """
    check_clip(clip, gradients.frac_bits)
    with party.filling_the_range():  # nothing here is out of range
        return _clipped_sum(party, gradients, weights, clip)


def check_clip(clip: float, frac_bits: int) -> None:
    """Raise ValueError if a clip is out of range, or too large for so many fraction bits."""
    if not 2.0**-6 <= clip <= 2.0**6:
        raise ValueError(f"clip: {clip:g}, expected 2^-6 to 2^6")
    if (LARGEST * clip) ** 2 * 4.0**frac_bits >= 2.0**_ROOM:
        raise ValueError(
            f"clip: {clip:g}, and {frac_bits} fraction bits: squares of norms do not fit"
        )


def check_sum(clip: float, count: int, frac_bits: int) -> None:
    """Raise ValueError if a sum of so many vectors is more than a truncation takes."""
    if count * clip * 2.0 ** (frac_bits + FACTOR_BITS) >= 2.0**62:
        raise ValueError(
            f"clip: {clip:g}, {count} vectors and {frac_bits} fraction bits: their sum does not fit"
        )


def _clipped_sum(party: Seat, gradients: Secret, weights: Secret, clip: float) -> Secret:
    f, lower = gradients.frac_bits, allowed(clip)
    least, most = (round(bound**2 * 4.0**f) for bound in (lower, LARGEST * clip))
    gradients = masked(party, gradients.settled(party))
    bits = element_bits(gradients.shape[1])
    beyond = outside(party, gradients, bits).sum((1,))
    within = b2a(party, less_than_public(party, beyond, [1], bits_of(2 * gradients.shape[1])))[0]

    squares = bilinear(party, _dots, gradients, gradients).settled(party)
    squares = masked(party, dataclasses.replace(squares, frac_bits=2 * f))
    below = less_than_public(party, squares, [least, most])
    small, short = below[0], b2a(party, below[1])
    rest = add_public(party, -squares, least / 4.0**f)
    floored = squares.unmasked() + select(party, small, rest)
    log_least, log_most = least.bit_length() - 1, most.bit_length()
    root = inverse_sqrt(party, floored, FACTOR_BITS, log_least, log_most)
    more = _CLIP_BITS - math.ceil(math.log2(lower))  # fraction bits of C', which is rounded down
    scaled = root.times_int(math.floor(lower * 2.0**more))
    scaled = dataclasses.replace(scaled, frac_bits=FACTOR_BITS + more)
    factors = truncate(party, scaled, FACTOR_BITS)
    counts = mul(party, mul(party, within, short), weights)
    factors = mul(party, factors, counts)
    return bilinear(party, _weighted, factors, gradients)


def _dots(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x * y).sum(1)


def _weighted(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("i,id->d", x, y)


def of_reals(vectors: jax.Array, weights: jax.Array, clip: float) -> jax.Array:
    """The same of floats, [m, d] and [m]: what the protocol is close to."""
    norms = jnp.sqrt(jnp.square(vectors).sum(1))
    vectors = jnp.where((norms < LARGEST * clip)[:, None], vectors, 0.0)  # also what is not finite
    factors = jnp.minimum(1.0, allowed(clip) / jnp.maximum(norms, allowed(clip) / 2))
    return jnp.where(norms < LARGEST * clip, factors * weights, 0.0) @ vectors
