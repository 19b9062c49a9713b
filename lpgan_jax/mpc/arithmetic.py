"""Masking, products and truncation: the primitives on arithmetic shares."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lpgan_jax.mpc.dealt import Dealt
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Part, Secret
from lpgan_jax.ring.words import Ring

Bilinear = Callable[[jax.Array, jax.Array], jax.Array]
Digits = tuple[tuple[int, int], ...]
"""(sign, s), ...: the sum of sign 2^-s."""


@functools.singledispatch
def masked(party: Seat, x: Secret) -> Secret:
    """Open x - a under a fresh mask a, unless x already has one.

    1 round, one word per element. x - a is uniform whatever x is, and reusing it in several
    products of x sends nothing more.
    """
    if x.mask is not None:
        return x
    mask = party.mask(x.shape, x.words.dtype)
    opened = party.open(x.words - mask.share, "mask")
    if x.owed is not None and mask.plain is not None and x.owed.plain is not None:
        mask = Dealt(mask.share, mask.plain + x.owed.plain)
    return Secret(x.words, x.frac_bits, opened, (Part(mask),), x.owed)


def opening(x: Secret) -> tuple[Dealt, jax.Array]:
    """(the mask, the public part) of a masked value; of a truncated one, the first dealt part."""
    assert x.opened is not None
    return x.parts[0].dealt, x.opened


@functools.singledispatch
def bilinear(party: Seat, product: Bilinear, x: Secret, y: Secret) -> Secret:
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
        word per element of x and y that is not yet masked. DS owes a*b: one word per element of
        the result, should its share be wanted before it is masked or truncated.
    """
    same = x is y
    x.require_ring_of(y)
    x = masked(party, x.settled(party))
    y = x if same else masked(party, y.settled(party))
    (a, e), (b, d) = opening(x), opening(y)
    # e*[b] and S1's e*d are one product: each server multiplies e with its share of y's opened
    # part.
    words = product(e, b.share + party.public_share(d)) + product(a.share, d)
    return Secret(words, x.frac_bits + y.frac_bits, owed=party.compute(product, a, b))


@functools.singledispatch
def mul(party: Seat, x: Secret, y: Secret) -> Secret:
    """Elementwise (broadcasting) product, as `bilinear`; a truncated factor needs no opening.

    A masked or truncated value is a public part and dealt ones (see `truncate`). So its product
    takes one dealt share for each pair of dealt parts (that of the first two is owed), and no
    round. x and y may be the same value: SecSq, x^2 = 2e x - e^2 + a^2.
    """
    same = x is y
    x.require_ring_of(y)
    ring = party.ring_of(x.words)
    x = with_public_part(party, x.settled(party))
    y = x if same else with_public_part(party, y.settled(party))
    (a, e), (b, d) = opening(x), opening(y)
    words = e * y.share + (x.share - party.public_share(e)) * d
    pairs: Iterable[tuple[Part, Part]] = itertools.product(y.parts, x.parts)
    if same:
        pairs = itertools.combinations_with_replacement(x.parts, 2)
    for p, q in itertools.islice(pairs, 1, None):
        product = product_of_parts(party, ring, p, q)
        words = words + (2 * product if same and p is not q else product)
    return Secret(words, x.frac_bits + y.frac_bits, owed=party.compute(jnp.multiply, a, b))


def square(party: Seat, x: Secret) -> Secret:
    """SecSq: x^2, as `mul`, with one mask.

    The published form splits x' and x'' instead, at the same cost, but its mask serves nothing
    else.
    """
    return mul(party, x, x)


def with_public_part(party: Seat, x: Secret) -> Secret:
    """x with a public part: as it is if it was masked or truncated, else masked."""
    return masked(party, x) if x.opened is None else x


def product_of_parts(party: Seat, ring: Ring, p: Part, q: Part) -> jax.Array:
    """A share of p * q in a ring; 0 where their shifts fill a word.

    DS -> S2: one word per element, as narrow as the narrower part's.
    """
    shift = p.shift + q.shift
    if shift >= ring.bits:
        return jnp.zeros((), ring.dtype)
    narrow = min((part.dealt.share.dtype for part in (p, q)), key=lambda dtype: dtype.itemsize)
    dealt = party.correlate(lambda u, v: u.astype(narrow) * v.astype(narrow), p.dealt, q.dealt)
    return Part(dealt, shift, p.flags + q.flags).share(ring)


def in_words_of(dealt: Dealt, like: jax.Array) -> Dealt:
    """A dealt value in a ring that is not larger than its own.

    Raises:
        TypeError: it is larger.
    """
    if dealt.share.dtype == like.dtype:
        return dealt
    if dealt.share.dtype.itemsize < like.dtype.itemsize:
        raise TypeError(f"ring: a value in {dealt.share.dtype} words is wanted in {like.dtype}")
    return dealt.map(lambda words: words.astype(like.dtype))


@functools.singledispatch
@jax.named_scope("truncation")
def truncate(party: Seat, x: Secret, frac_bits: int, ring: Ring | None = None) -> Secret:
    """Rescale to fewer fraction bits, with unbiased stochastic rounding.

    With x's mask a and r = -a mod 2^64, the public word c = x + 2^62 + r gives, for the
    shift f,  x >> f = (c >> f) - 2^(62-f) - [r >> f] + (if msb(c) = 0) [msb(r) 2^(64-f)].

    That is an equation of integers, so its parts may be dealt in either ring. In the smaller one
    the last part is 0, if as many bits are dropped as the rings differ by, or fewer; then [r >> f]
    is as uniform as r, and masks the result.

    Args:
        party: this server's seat.
        x: |x| < 2^62 as an integer at its present scale; outside, the error is about 2^(64-f) LSB.
            In another ring of so many bits, 2 less.
        frac_bits: the fraction bits wanted, at most x.frac_bits.
        ring: of the result, into which it must fit; x's by default.

    Returns:
        x at the new scale, rounded down or up at random: the error is below 1 LSB, its mean is 0
        (up with probability equal to the fraction dropped). 1 round, one word per element unless x
        is masked; DS -> S2: a word and a half per element (two if more than 32 bits are dropped).
        Its parts are public and dealt values, so that elementwise products of it open nothing more
        (`mul`). In a smaller ring it is masked, if it has one part; that takes half a word of DS.
        Local truncation of the shares (SecureML) would be free, and catastrophically wrong with
        probability |x|/2^64 per value.
    """
    shift, own = x.frac_bits - frac_bits, party.ring_of(x.words)
    ring = ring or own
    if shift == 0 and ring.bits <= own.bits:
        return narrowed(x, ring)
    if not 0 <= shift <= own.bits - 2:
        raise ValueError(f"frac_bits: cannot truncate {x.frac_bits} fraction bits to {frac_bits}")
    party.watch(x, "truncate")
    # A wrap is a multiple of 2^(own - shift): shares modulo 2^bits are enough.
    bits = ring.bits - (own.bits - shift)
    narrow = np.uint32 if ring.container_bits == 64 and bits <= 32 else ring.dtype
    public, minus_high, wrap, flag = _truncated(
        party, x, lambda words: own.shift_right(words, shift), ring, narrow if bits > 0 else None
    )
    parts: tuple[Part, ...] = (Part(minus_high),)
    if wrap is not None:
        parts = (*parts, Part(wrap, own.bits - shift, (flag,)))
    share = sum((part.share(ring) for part in parts), party.public_share(public))
    return Secret(share, frac_bits, public, parts)


def narrowed(x: Secret, ring: Ring) -> Secret:
    """The same value in a ring that is not larger than its own, if it fits; local, exact.

    What is known of it is known of its remainder: masks and parts stay.
    """
    if x.words.dtype == ring.dtype:
        return x

    def narrow(words: jax.Array) -> jax.Array:
        return words.astype(ring.dtype)

    parts = [
        part if part.dealt.share.dtype.itemsize <= ring.dtype.itemsize else part.map(narrow)
        for part in x.parts
        if part.shift < ring.bits
    ]
    return Secret(
        narrow(x.words),
        x.frac_bits,
        None if x.opened is None else narrow(x.opened),
        tuple(parts),
        x.owed and x.owed.map(narrow),
    )


def _truncated(
    party: Seat,
    x: Secret,
    shifted: Callable[[jax.Array], jax.Array],
    ring: Ring,
    narrow: DTypeLike | None,
) -> tuple[jax.Array, Dealt, Dealt | None, jax.Array]:
    """(public part, first dealt part, the second: a wrap, whether that counts) of a shift of x.

    `shifted`: words to the right by some bits, or a sum of several such; of x's ring, while the
    parts are of another. Of the right by f, the wrap is a multiple of 2^(bits - f): it takes shares
    modulo 2^f only, in words of type `narrow`. None: nobody needs it.
    """
    own = party.ring_of(x.words)
    a, e = opening(masked(party, x))

    def words(values: jax.Array) -> jax.Array:
        return shifted(values).astype(ring.dtype)

    # DS knows r = -a; a negation is as uniform as the mask, so nothing more needs to be opened.
    minus_high = party.correlate(lambda v: -words(-v), a)
    wrap = None
    if narrow is not None:
        wrap = party.correlate(lambda v: own.top_bit(-v).astype(narrow), a)
    c = own.reduce(e + own.constant(1 << (own.bits - 2)))
    half = words(jnp.asarray(own.constant(1 << (own.bits - 2))))
    return words(c) - half, minus_high, wrap, own.top_bit(c) == 0


@functools.singledispatch
@jax.named_scope("truncation")
def times_small(party: Seat, x: Secret, digits: Digits, frac_bits: int) -> Secret:
    """x times a public real that is small: a sum of truncations, by one opening.

    Where x times an integer is truncated, the product must fit into the ring; here
    x alone must.

    Args:
        party: this server's seat.
        x: |x| < 2^62 as an integer.
        digits: of the factor, `signed_digits`.
        frac_bits: of the result, at most x's.

    Returns:
        The product, with an error below 1 LSB for each digit, of mean 0. 1 round, one word per
        element unless x is masked; DS -> S2: as `truncate`.
    """
    party.watch(x, "truncate")
    ring, dropped = party.ring_of(x.words), x.frac_bits - frac_bits
    digits = tuple((sign, shift + dropped) for sign, shift in digits)
    most = max(shift for _, shift in digits)
    narrow = np.uint32 if ring.bits == 64 and most <= 32 else ring.dtype

    def shifted(words: jax.Array) -> jax.Array:
        terms = [ring.shift_right(words, shift) for _, shift in digits]
        total = jnp.zeros_like(terms[0])
        for (sign, _), term in zip(digits, terms, strict=True):
            total = total + term if sign > 0 else total - term
        return total

    public, minus_high, wrap, flag = _truncated(party, x, shifted, ring, narrow)
    assert wrap is not None
    # A wrap counts 2^bits times the factor: a multiple of 2^(bits - most).
    times = sum(sign << (most - shift) for sign, shift in digits)
    up = (wrap.share * np.asarray(times).astype(narrow)).astype(ring.dtype)
    up = ring.shift_left(up, ring.bits - most)
    share = party.public_share(public) + minus_high.share + jnp.where(flag, up, jnp.zeros_like(up))
    return Secret(share, frac_bits)


def signed_digits(value: float, significant_bits: int) -> Digits:
    """A real between 0 and 1/2 as few powers of two, within 2^-significant_bits relative."""
    if not 0 < value < 0.5:
        raise ValueError(f"value: expected more than 0 and less than 1/2, got {value}")
    digits, rest = [], value
    while abs(rest) > value * 2.0**-significant_bits:
        shift = -round(math.log2(abs(rest)))
        digits.append((1 if rest > 0 else -1, shift))
        rest -= math.copysign(2.0**-shift, rest)
    return tuple(digits)


@functools.singledispatch
@jax.named_scope("truncation")
def truncate_by(party: Seat, x: Secret, shift: jax.Array | np.ndarray) -> Secret:
    """x / 2^shift for a shift that is not known while tracing, or not the same everywhere.

    Args:
        party: this server's seat.
        x: |x| < 2^62 as an integer; outside, the error is about 2^(64-shift) LSB.
        shift: public integers 1 to 62 that broadcast to x.

    Returns:
        As `truncate`, at x's scale; of a shift that is known it has its parts. 1 round, one word
        per element unless x is masked; DS -> S2: two words per element.
    """
    party.watch(x, "truncate")
    ring = party.ring_of(x.words)
    words = jnp.broadcast_to(shift, x.shape).astype(ring.dtype)
    public, minus_high, wrap, flag = _truncated(
        party, x, lambda values: ring.shift_right(values, words), ring, ring.dtype
    )
    assert wrap is not None
    left = jnp.asarray(ring.constant(ring.bits)) - words
    up = wrap.map(lambda values: ring.shift_left(values, left))
    parts = Part(minus_high), Part(up, 0, (flag,))
    share = sum((part.share(ring) for part in parts), party.public_share(public))
    if isinstance(shift, np.ndarray):
        return Secret(share, x.frac_bits, public, parts)
    return Secret(share, x.frac_bits)


def rescale(party: Seat, x: Secret, frac_bits: int) -> Secret:
    """x at another scale: exact and local if it is finer, else as `truncate`."""
    if x.frac_bits < frac_bits:
        return x.at_scale(frac_bits)
    return truncate(party, x, frac_bits)
