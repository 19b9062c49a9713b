"""Masking, products and truncation: the primitives on arithmetic shares."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lpgan_jax.fixed_point import public_constant
from lpgan_jax.party import Dealt, Party
from lpgan_jax.secret import Secret, Wrap

Bilinear = Callable[[jax.Array, jax.Array], jax.Array]


@functools.singledispatch
def masked(party: Party, x: Secret) -> Secret:
    """Open x - a under a fresh mask a, unless x already has one.

    1 round, one word per element. x - a is uniform whatever x is, and reusing it in several
    products of x sends nothing more.
    """
    if x.mask is not None and x.wrap is None:
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
def mul(party: Party, x: Secret, y: Secret) -> Secret:
    """Elementwise (broadcasting) product, as `bilinear`; a truncated factor needs no opening.

    A truncated value is a public part plus a mask of two dealt parts, the second of which counts
    where a public flag is set (see `truncate`). So its product takes one dealt share for each pair
    of parts, and no round.
    """
    same = x is y
    x = _known(party, x)
    y = x if same else _known(party, y)
    _, e = _parts(x)
    _, d = _parts(y)
    share = e * y.share + (x.share - party.only_s1(e)) * d
    for a, a_flag in _mask_terms(x):
        for b, b_flag in _mask_terms(y):
            share = share + _where(
                a_flag, _where(b_flag, party.correlate(jnp.multiply, a, b).share)
            )
    return Secret(share, x.frac_bits + y.frac_bits)


@functools.singledispatch
def square(party: Party, x: Secret) -> Secret:
    """SecSq: x^2 with one mask: [a^2] + 2e[a] + (S1) e^2.

    Exact, 2 * x.frac_bits fraction bits. 1 round, one word per element unless x is masked or was
    truncated; DS -> S2: one word per element. The published form splits x' and x'' instead, at the
    same cost, but its mask serves nothing else.
    """
    x = _known(party, x)
    _, e = _parts(x)
    share = e * (2 * x.share - party.only_s1(e))
    terms = _mask_terms(x)
    for i, (a, a_flag) in enumerate(terms):
        for b, b_flag in terms[i:]:
            twice = 1 if a is b else 2
            product = party.correlate(lambda v, w, twice=twice: twice * v * w, a, b)
            share = share + _where(a_flag, _where(b_flag, product.share))
    return Secret(share, 2 * x.frac_bits)


def _known(party: Party, x: Secret) -> Secret:
    """x with a public part: as it is if it was masked or truncated, else masked."""
    return masked(party, x) if x.mask is None else x


def _mask_terms(x: Secret) -> list[tuple[Dealt, jax.Array | None]]:
    """The parts of x's mask, each with the flag that says where it counts (None: everywhere)."""
    terms: list[tuple[Dealt, jax.Array | None]] = [(_parts(x)[0], None)]
    return terms if x.wrap is None else [*terms, (x.wrap.dealt, x.wrap.flag)]


def _where(flag: jax.Array | None, values: jax.Array) -> jax.Array:
    return values if flag is None else jnp.where(flag, values, jnp.zeros_like(values))


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
        is masked; DS -> S2: two words per element. Its parts are public and dealt values, so that
        elementwise products of it open nothing more (`mul`). Local truncation of the shares
        (SecureML) would be free, and catastrophically wrong with probability |x|/2^64 per value.
    """
    shift = x.frac_bits - frac_bits
    if shift == 0:
        return x
    ring = party.ring
    if not 0 < shift <= ring.bits - 2:
        raise ValueError(f"frac_bits: cannot truncate {x.frac_bits} fraction bits to {frac_bits}")
    a, e = _parts(masked(party, x))
    # DS knows r = -a; a negation is as uniform as the mask, so nothing more needs to be opened.
    minus_high = party.correlate(lambda v: -ring.shift_right(-v, shift), a)
    wrap = party.correlate(lambda v: ring.shift_left(ring.top_bit(-v), ring.bits - shift), a)
    c = ring.reduce(e + ring.constant(1 << (ring.bits - 2)))
    public = ring.shift_right(c, shift) - ring.constant(1 << (ring.bits - 2 - shift))
    flag = ring.top_bit(c) == 0
    share = party.only_s1(public) + minus_high.share + _where(flag, wrap.share)
    return Secret(share, frac_bits, minus_high, public, Wrap(wrap, flag))


def rescale(party: Party, x: Secret, frac_bits: int) -> Secret:
    """x at another scale: exact and local if it is finer, else as `truncate`."""
    if x.frac_bits < frac_bits:
        return x.at_scale(frac_bits)
    return truncate(party, x, frac_bits)


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
    return rescale(party, product, frac_bits)


def mean_of_sum(party: Party, total: Secret, count: int, frac_bits: int) -> Secret:
    """total / count; 1 round, or 2 if the count is no power of two (then |mean| < 2^10)."""
    log_count = (count - 1).bit_length()
    finer = total.divided_by_power_of_two(log_count)
    return scale_public(party, finer, 2**log_count / count, frac_bits)
