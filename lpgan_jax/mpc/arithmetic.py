"""Masking, products and truncation: the primitives on arithmetic shares."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lpgan_jax.fixed_point import public_constant
from lpgan_jax.party import Dealt, Party
from lpgan_jax.secret import Secret

Bilinear = Callable[[jax.Array, jax.Array], jax.Array]


@functools.singledispatch
def masked(party: Party, x: Secret) -> Secret:
    """Open x - a under a fresh mask a, unless x already has one.

    1 round, one word per element. x - a is uniform whatever x is, and reusing it in several
    products of x sends nothing more.
    """
    if x.mask is not None:
        return x
    mask = party.mask(x.shape)
    return Secret(x.share, x.frac_bits, mask, party.open(x.share - mask.share, "mask"))


def _parts(x: Secret) -> tuple[Dealt, jax.Array]:
    assert x.mask is not None
    assert x.opened is not None
    return x.mask, x.opened


@functools.singledispatch
def bilinear(party: Party, product: Bilinear, x: Secret, y: Secret) -> Secret:
    """SecMul for any bilinear map: a product, a matrix product, a convolution or its gradients.

    z = c + e*[b] + [a]*d + (S1) e*d, with e = x - a and d = y - b open and DS's share of c = a*b
    (Beaver 1991; SecMul of the LP-GAN patent). x and y may be the same value.

    Args:
        party: this server's seat.
        product: bilinear modulo 2^64, with public static coefficients.
        x: a secret.
        y: a secret.

    Returns:
        product(x, y), exact in the ring, with x.frac_bits + y.frac_bits fraction bits. 1 round, one
        word per element of x and y that is not yet masked; DS -> S2: one word per element of the
        result.
    """
    same = x is y
    x = masked(party, x)
    y = x if same else masked(party, y)
    (a, e), (b, d) = _parts(x), _parts(y)
    c = party.correlate(product, a, b)
    # e*[b] and S1's e*d are one product: each server multiplies e with its share of y's opened
    # part.
    share = c.share + product(e, b.share + party.only_s1(d)) + product(a.share, d)
    return Secret(share, x.frac_bits + y.frac_bits)


@functools.singledispatch
def square(party: Party, x: Secret) -> Secret:
    """SecSq: x^2 with one mask: [a^2] + 2e[a] + (S1) e^2.

    Exact, 2 * x.frac_bits fraction bits. 1 round, one word per element unless x is masked; DS ->
    S2: one word per element. The published form splits x' and x'' instead, at the same cost, but
    its mask serves nothing else.
    """
    a, e = _parts(masked(party, x))
    c = party.correlate(lambda v: v * v, a)
    return Secret(c.share + 2 * e * a.share + party.only_s1(e * e), 2 * x.frac_bits)


def mul(party: Party, x: Secret, y: Secret) -> Secret:
    """Elementwise (broadcasting) product; see `bilinear`."""
    return bilinear(party, jnp.multiply, x, y)


@functools.singledispatch
def truncate(party: Party, x: Secret, frac_bits: int) -> Secret:
    """Rescale to fewer fraction bits, with unbiased stochastic rounding.

    With x's mask a and r = -a mod 2^64, the public word c = x + 2^62 + r gives, for the
    shift f,  x >> f = (c >> f) - 2^(62-f) - [r >> f] + (if msb(c) = 0) [msb(r) 2^(64-f)].

    Args:
        party: this server's seat.
        x: |x| < 2^62 as an integer at its present scale; outside, the error is about 2^(64-f) LSB.
        frac_bits: the fraction bits wanted, at most x.frac_bits.

    Returns:
        x at the new scale, rounded down or up at random: the error is below 1 LSB, its mean is 0
        (up with probability equal to the fraction dropped). 1 round, one word per element unless x
        is masked; DS -> S2: two words per element. Local truncation of the shares (SecureML) would
        be free, and catastrophically wrong with probability |x|/2^64 per value.
    """
    shift = x.frac_bits - frac_bits
    if shift == 0:
        return x
    ring = party.ring
    if not 0 < shift <= ring.bits - 2:
        raise ValueError(f"frac_bits: cannot truncate {x.frac_bits} fraction bits to {frac_bits}")
    a, e = _parts(masked(party, x))
    # DS knows r = -a; a negation is as uniform as the mask, so nothing more needs to be opened.
    high = party.correlate(lambda v: ring.shift_right(-v, shift), a)
    wrap = party.correlate(lambda v: ring.shift_left(ring.top_bit(-v), ring.bits - shift), a)
    c = ring.reduce(e + ring.constant(1 << (ring.bits - 2)))
    public = ring.shift_right(c, shift) - ring.constant(1 << (ring.bits - 2 - shift))
    wrapped = jnp.where(ring.top_bit(c) == 0, wrap.share, jnp.zeros_like(wrap.share))
    return Secret(party.only_s1(public) - high.share + wrapped, frac_bits)


def scale_public(
    party: Party,
    x: Secret,
    factor: float,
    frac_bits: int,
    magnitude_bits: int = 10,
    factor_bits: int = 20,
) -> Secret:
    """x times a public real, at the scale wanted.

    The factor gets a scale of its own. 1 round, or 2 where x is so fine that x, the factor and its
    magnitude take more than 62 bits: then x is truncated first.

    Args:
        party: this server's seat.
        x: in real terms, |x| < 2^magnitude_bits.
        factor: finite and not zero. A power of two costs no bits.
        frac_bits: fraction bits of the result.
        magnitude_bits: the range of x.
        factor_bits: significant bits of the factor; its relative error is below 2^-factor_bits.
    """
    k, shift = public_constant(factor, factor_bits)
    finest = 62 - magnitude_bits - abs(k).bit_length()
    if k not in (1, -1) and x.frac_bits > finest:
        x = truncate(party, x, finest)
    product = x.times_int(k).divided_by_power_of_two(shift)
    if product.frac_bits < frac_bits:
        return product.at_scale(frac_bits)
    return truncate(party, product, frac_bits)


def mean_of_sum(party: Party, total: Secret, count: int, frac_bits: int) -> Secret:
    """total / count; 1 round, or 2 if the count is no power of two (then |mean| < 2^10)."""
    log_count = (count - 1).bit_length()
    finer = total.divided_by_power_of_two(log_count)
    return scale_public(party, finer, 2**log_count / count, frac_bits)
