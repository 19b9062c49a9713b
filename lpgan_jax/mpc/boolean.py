"""XOR-shared bits, bit-sliced: row i holds bit i of many values, packed into machine words.

A word of a row holds one bit of each of `lanes` values (lanes = the container's width), so that AND
gates cost one bit a value at every level of a tree, and nothing is padded below a byte.

The bits of a secret x come from the sum x = e + a of its opened part and its mask. The bits of e
are public and DS deals those of a, so that all bits of both are known or masked before the first
gate: bit i generates a carry where e_i a_i, and propagates one where e_i xor a_i.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lpgan_jax.mpc.dealt import Dealt
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Part, Secret
from lpgan_jax.ring.words import Ring, bit_and, bit_xor

RADIX = 4  # segments that a node of a tree combines
_WIDEST_LEAF, _WIDEST_NODE = 6, 7  # of a tree with one level above its leaves


def _lane_count(ring: Ring, size: int) -> int:
    return -(-size // ring.container_bits)


def bit_slice(ring: Ring, words: jax.Array) -> jax.Array:
    """Transpose bits: ring elements to rows of packed bits.

    Args:
        ring: the ring; its container has `lanes` bits.
        words: any shape, n elements.

    Returns:
        [ring.bits, ceil(n / lanes)]: row i holds bit i (0 is the lowest). Element k sits in lane
        k // ceil(n / lanes) of word k mod ceil(n / lanes); missing elements are 0.
    """
    lanes, columns = ring.container_bits, _lane_count(ring, words.size)
    flat = jnp.pad(words.reshape(-1), (0, lanes * columns - words.size))
    rows = flat.reshape(lanes, columns)
    # A bit-matrix transpose: swap the off-diagonal blocks of 2s x 2s tiles, s = lanes/2 ... 1.
    span = lanes // 2
    while span:
        low_bits = ring_mask(span, lanes, rows.dtype)
        tiles = rows.reshape(lanes // (2 * span), 2, span, columns)
        upper, lower = jnp.unstack(tiles, axis=1)
        shift = np.asarray(span, rows.dtype)
        swap = bit_and(bit_xor(lax.shift_right_logical(upper, shift), lower), low_bits)
        swapped = [bit_xor(upper, lax.shift_left(swap, shift)), bit_xor(lower, swap)]
        rows = jnp.stack(swapped, axis=1).reshape(lanes, columns)
        # One pass a stage: fused further, XLA would recompute each stage twice in the next.
        rows = lax.optimization_barrier(rows)
        span //= 2
    return rows[: ring.bits]


def pack(ring: Ring, bits: jax.Array) -> jax.Array:
    """An array of 0 and 1 as a row of packed bits, in the order of `bit_slice`."""
    lanes, columns = ring.container_bits, _lane_count(ring, bits.size)
    flat = jnp.pad(bits.reshape(-1), (0, lanes * columns - bits.size)).astype(ring.dtype)
    shifts = np.arange(lanes, dtype=ring.dtype)[:, None]
    # Each has a place of its own: xor is as good as or, and linear, which the audit can follow.
    return jnp.bitwise_xor.reduce(flat.reshape(lanes, columns) << shifts)


def ring_mask(span: int, lanes: int, dtype: jax.typing.DTypeLike) -> np.ndarray:
    """The word whose bits i with (i // span) even are set."""
    value = sum(1 << i for i in range(lanes) if (i // span) % 2 == 0)
    return np.asarray(value, dtype)


def unpack(ring: Ring, row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A row of packed bits as an array of 0 and 1, in the ring's dtype, of the given shape."""
    lanes = ring.container_bits
    shifts = np.arange(lanes, dtype=ring.dtype)[:, None]
    bits = (row[None, :] >> shifts) & np.ones((), ring.dtype)
    size = 1
    for length in shape:
        size *= length
    return bits.reshape(-1)[:size].reshape(shape)


@dataclass(frozen=True)
class Masked:
    """XOR-shared bits under a mask: the mask, and bits ^ mask, which is public."""

    mask: Dealt
    opened: jax.Array

    def __getitem__(self, index: object) -> Masked:
        return Masked(self.mask.map(lambda rows: rows[index]), self.opened[index])

    def unstack(self, axis: int) -> list[Masked]:
        """Each along an axis."""
        share, plain = self.mask.share, self.mask.plain
        shares = jnp.unstack(share, axis=axis)
        plains = [None] * len(shares) if plain is None else jnp.unstack(plain, axis=axis)
        masks = map(Dealt, shares, plains)
        return list(map(Masked, masks, jnp.unstack(self.opened, axis=axis)))


def open_masked(party: Seat, rows: jax.Array, name: str = "and") -> Masked:
    """Open shared bits under a fresh mask: 1 round, one bit each."""
    mask = party.mask(rows.shape, rows.dtype, bitwise=True)
    return Masked(mask, party.open_bits(rows ^ mask.share, name))


Masks = tuple[int, ...]


class Term(NamedTuple):
    """A product of bits, by their numbers: all `factors`, and the carry that `generate` generates.

    Bit number i = opened_i ^ mask_i generates a carry where both of its parts are set.
    """

    factors: tuple[int, ...]
    generate: int | None = None


def combine(party: Seat, bits: list[Masked], sums: list[list[Term]]) -> list[jax.Array]:
    """SecAnd of any number of masked bits, and XORs of such products; local.

    A product of sums opened_i ^ mask_i is expanded: DS deals a share of every product of masks that
    occurs, once, and the servers know the factors. With two factors that is SecMul over Z_2.

    Args:
        party: this server's seat.
        bits: the values; their shapes broadcast.
        sums: what to compute: for each result, the terms to XOR.

    Returns:
        This server's share of each result. DS -> S2: one bit for each product of two or more masks.
    """
    # Each sum becomes a polynomial in the masks: a public coefficient for each product of masks.
    polynomials = [_expand(terms) for terms in sums]
    dealt = _deal_products(party, bits, {masks for p in polynomials for masks in p})
    opened = _Products([b.opened for b in bits])
    results = []
    for polynomial in polynomials:
        parts = []
        for masks, coefficients in polynomial.items():
            # A product of no opened parts is 1.
            products = [opened(c) for c in coefficients if c]
            if not products:
                parts.append(dealt[masks])
                continue
            public = functools.reduce(bit_xor, products)
            public = ~public if () in coefficients else public
            parts.append(bit_and(dealt[masks], public) if masks else party.public_share(public))
        results.append(functools.reduce(bit_xor, parts))
    return results


class _Products:
    """Products of bits by their numbers, each computed once."""

    def __init__(self, bits: Sequence[jax.Array]) -> None:
        self._known: dict[tuple[int, ...], jax.Array] = {(i,): b for i, b in enumerate(bits)}

    def __call__(self, factors: tuple[int, ...]) -> jax.Array:
        if factors not in self._known:
            self._known[factors] = bit_and(self(factors[:-1]), self(factors[-1:]))
        return self._known[factors]


def _expand(terms: list[Term]) -> dict[Masks, list[tuple[int, ...]]]:
    """The XOR of terms as a polynomial: for each product of masks, products of opened parts."""
    polynomial: dict[Masks, list[tuple[int, ...]]] = {}
    for factors, generate in terms:
        extra = () if generate is None else (generate,)
        for count in range(len(factors) + 1):
            for chosen in itertools.combinations(factors, count):
                public = tuple(i for i in factors if i not in chosen)
                masks = tuple(sorted((*chosen, *extra)))
                polynomial.setdefault(masks, []).append((*public, *extra))
    return polynomial


def _deal_products(party: Seat, bits: list[Masked], wanted: set[Masks]) -> dict[Masks, jax.Array]:
    """Shares of products of masks; those of one shape are dealt together."""
    shares: dict[Masks, jax.Array] = {m: bits[m[0]].mask.share for m in wanted if len(m) == 1}
    by_shape: dict[tuple[int, ...], list[Masks]] = {}
    for masks in sorted(m for m in wanted if len(m) > 1):
        shape = jnp.broadcast_shapes(*(bits[i].mask.share.shape for i in masks))
        by_shape.setdefault(shape, []).append(masks)
    for group in by_shape.values():

        def products(*rows: jax.Array, group: list[Masks] = group) -> jax.Array:
            return jnp.stack(list(map(_Products(rows), group)))

        dealt = party.correlate(products, *(b.mask for b in bits), bitwise=True)
        shares |= zip(group, jnp.unstack(dealt.share), strict=True)
    return shares


def conjunction(party: Seat, u: jax.Array, v: jax.Array) -> jax.Array:
    """SecAnd of XOR-shared rows of one shape. 1 round, two bits each; DS -> S2: one bit."""
    both = open_masked(party, jnp.stack([u, v]))
    return combine(party, both.unstack(0), [[Term((0, 1))]])[0]


def complement(party: Seat, rows: jax.Array) -> jax.Array:
    """1 - u of XOR-shared rows; local: S1 inverts its share."""
    return rows ^ party.public_share(~jnp.zeros_like(rows))


def _parts(party: Seat, x: Secret, offsets: Sequence[int], bits: int, low: int = 0) -> Masked:
    """The bits of the two parts of x + offset, lowest first: rows [bits, offsets, words] each.

    The offsets go to the public part, so that the bits of the mask are dealt once for all of them.
    Of each, `bits` bits above the `low` lowest.
    """
    assert x.opened is not None
    ring = party.ring_of(x.words)
    column = (-1,) + (1,) * len(x.shape)
    added = np.stack([ring.constant(o >> low) for o in offsets]).reshape(column)
    sums = ring.shift_right(x.opened, low)[None] + added
    opened = jax.vmap(lambda words: bit_slice(ring, words)[:bits], out_axes=1)(sums)
    dealt = party.correlate(
        lambda words: bit_slice(ring, ring.shift_right(words, low))[:bits, None],
        x.parts[0].dealt,
        bitwise=True,
    )
    return Masked(dealt, opened)


def _digits(segments: jax.Array, digits: int) -> jax.Array:
    """[n, ...] segments, the lowest first, to [nodes, digits, ...]; neutral ones join below.

    A segment of zeros neither generates nor propagates a carry.
    """
    missing = -segments.shape[0] % digits
    padded = jnp.concatenate([jnp.zeros_like(segments[:1])] * missing + [segments])
    return padded.reshape(padded.shape[0] // digits, digits, *segments.shape[1:])


def _carry_terms(digits: int, generate: int | None, above_first: bool = False) -> list[Term]:
    """The carry out of the highest of `digits` segments: from those below, and its own.

    g_top ^ p_top g ^ p_top p g ^ ...: bits 0 to digits - 1 propagate (`above_first`: those of all
    segments but the lowest, from 0 on); bit generate + d is the carry of segment d (and the highest
    one's is left out). None: each segment's bit generates for itself.
    """
    above = [tuple(range(d + 1 - above_first, digits - above_first)) for d in range(digits)]
    if generate is None:
        return [Term(above[d], d) for d in range(digits)]
    return [Term((*above[d], generate + d)) for d in range(digits - 1)]


def sign_bit(
    party: Seat,
    x: Secret,
    offsets: Sequence[int] = (0,),
    bits: int | None = None,
    radix: int | None = None,
    low: int = 0,
) -> jax.Array:
    """The top bits of a masked x + offset, by carry trees (exact for every x).

    A node combines up to `radix` segments: g = g3 ^ p3 g2 ^ p3 p2 g1 ^ p3 p2 p1 g0, p = p3 p2 p1
    p0. The bits of e and a need no opening, so that the first level is local (its segments are as
    short as the rounds allow: less is dealt for them); on 64 bits, two more follow, and one on 43
    or fewer.

    Args:
        party: this server's seat.
        x: masked (`arithmetic.masked`): e = x - a is open. Or truncated, where `bits` stop below
            what wraps (`is_comparable`). n elements.
        offsets: public integers to add.
        bits: width of the sum; exact for |x + offset| < 2^(bits-1). The ring's by default.
        radix: 2 or more; chosen by the width if it is not given.
        low: leave out so many of the lowest bits, of the offsets' too, and their carry: x + offset
            then counts as up to 2^low less.

    Returns:
        XOR-shared packed bits [offsets, ceil(n / lanes)], in the order of `bit_slice`. On 64 bits,
        without the opening of x: 2 rounds, and 35 opened bits per element and offset; DS -> S2: 233
        bits per element, and 103 for each offset. On 27 bits (an activation's): 1 round, 11 bits;
        DS -> S2: 123 and 83.
    """
    bits = (bits or party.ring_of(x.words).bits) - low
    rows = _parts(party, x, offsets, bits, low)
    top = party.public_share(rows.opened[-1]) ^ rows.mask.share[-1]
    leaves, radix = _tree(bits - 1, len(offsets), radix)
    generate, *propagate = _combined_leaves(party, rows, leaves)
    while (nodes := generate.shape[0]) > 1:
        digits = min(radix, nodes)
        g, p = _digits(generate, digits), _digits(propagate[0], digits)
        last = g.shape[0] == 1
        if last:  # whether the lowest segment propagates does not matter
            p = p[:, 1:]
        opened = open_masked(party, jnp.concatenate([p, g[:, :-1]], axis=1))
        carried, *propagate = combine(
            party,
            opened.unstack(1),
            [_carry_terms(digits, digits - last, last), [Term(tuple(range(digits)))]][: 2 - last],
        )
        generate = g[:, -1] ^ carried
    return top ^ generate[0]


def _combined_leaves(party: Seat, rows: Masked, leaves: tuple[int, ...]) -> list[jax.Array]:
    """Whether leaves of so many bits, the lowest first, generate a carry and propagate one; local.

    Each as [leaves, offsets, words]. Of one leaf nobody asks whether it propagates.
    """
    found, start = [], 0
    for size, alike in itertools.groupby(leaves):
        count = len(list(alike))
        own = rows[start : start + count * size]
        start += count * size

        def nodes(v: jax.Array, count: int = count, size: int = size) -> jax.Array:
            return v.reshape(count, size, *v.shape[1:])

        sums = [_carry_terms(size, None), [Term(tuple(range(size)))]][: min(2, len(leaves))]
        own = Masked(own.mask.map(nodes), nodes(own.opened))
        found.append(combine(party, own.unstack(1), sums))
    return [jnp.concatenate(of) for of in zip(*found, strict=True)]


def is_comparable(party: Seat, x: Secret, bits: int | None) -> bool:
    """Whether the lowest bits of x are those of a public and one dealt part.

    Of a truncated value the second part counts above 2^(64 - shift) only.
    """

    def is_above(part: Part) -> bool:
        return part.shift >= (bits or party.ring_of(x.words).bits)

    return x.opened is not None and all(map(is_above, x.parts[1:]))


def _tree(bits: int, offsets: int, radix: int | None = None) -> tuple[tuple[int, ...], int]:
    """(bits of each leaf, segments of a node) of the carry tree of so many bits.

    With one level above the leaves, if they and its node stay small: of these, where DS deals the
    least. Else of `RADIX`. Or of a radix that is given.
    """

    def dealt(node: int) -> int:
        carries = 2**node + 2 ** (node - 1) - 2 * node - 1 if node > 1 else 0
        return sum(2**leaf - 1 - leaf for leaf in _leaves(bits, node)) + offsets * carries

    nodes = [n for n in range(1, min(bits, _WIDEST_NODE) + 1) if -(-bits // n) <= _WIDEST_LEAF]
    if radix is not None or not nodes:
        radix = radix or RADIX
        return _leaves(bits, -(-bits // _first_digits(bits, radix))), radix
    node = 1 if bits <= RADIX else min(nodes, key=dealt)
    return _leaves(bits, node), max(2, node)


def _leaves(bits: int, count: int) -> tuple[int, ...]:
    """So many bits in parts that are as equal as can be, the longer ones first."""
    shorter, longer = divmod(bits, count)
    return (shorter + 1,) * longer + (shorter,) * (count - longer)


def _first_digits(bits: int, radix: int) -> int:
    """The shortest segments of the first level with which a tree has no more levels."""

    def levels(digits: int) -> int:
        nodes, count = -(-bits // digits), 0
        while nodes > 1:
            nodes, count = -(-nodes // radix), count + 1
        return count

    longest = min(radix, bits)
    return next(d for d in range(1, longest + 1) if levels(d) == levels(longest))


def decompose(party: Seat, x: Secret, radix: int = RADIX) -> jax.Array:
    """All bits of a masked x, by a prefix tree (Sklansky 1960) of higher radix.

    Args:
        party: this server's seat.
        x: masked; n elements.
        radix: 2 or more.

    Returns:
        XOR-shared rows [ring.bits, ceil(n / lanes)], the lowest bit first. On 64 bits, without the
        opening of x: 2 rounds.
    """
    rows = _parts(party, x, (0,), party.ring_of(x.words).bits)[:, 0]
    size = rows.opened.shape[0]
    digits = min(radix, size)

    def leaves(v: jax.Array) -> jax.Array:
        padded = jnp.concatenate([v, jnp.zeros((-size % digits, *v.shape[1:]), v.dtype)])
        return padded.reshape(padded.shape[0] // digits, digits, *v.shape[1:])

    low = Masked(rows.mask.map(leaves), leaves(rows.opened))
    prefixes = combine(
        party,
        low.unstack(1),
        [_carry_terms(d + 1, None) for d in range(digits)]
        + [[Term(tuple(range(d + 1)))] for d in range(digits)],
    )
    # [blocks, positions of a block, words]: carries into the position after each, within its block
    generate = jnp.stack(prefixes[:digits], axis=1)
    propagate = jnp.stack(prefixes[digits:], axis=1)
    total, _ = _scan_blocks(party, propagate, generate, radix)
    assert total is not None
    carries = total[0, : size - 1]  # one block is left
    carry_in = jnp.concatenate([jnp.zeros_like(carries[:1]), carries])
    return party.public_share(rows.opened) ^ rows.mask.share ^ carry_in


def _scan_blocks(
    party: Seat, propagate: jax.Array, generate: jax.Array | None, radix: int
) -> tuple[jax.Array | None, jax.Array]:
    """Join blocks' prefixes [blocks, span, words] until one block is left: a round a level.

    A position's prefix absorbs the totals of the blocks below its own within a group of `radix`.
    Without `generate`, plain products (SecMSB).
    """
    while (blocks := propagate.shape[0]) > 1:
        digits = min(radix, blocks)
        groups = -(-blocks // digits)

        def grouped(v: jax.Array, groups: int = groups, digits: int = digits) -> jax.Array:
            missing = groups * digits - v.shape[0]
            padded = jnp.concatenate([v, jnp.zeros((missing, *v.shape[1:]), v.dtype)])
            return padded.reshape(groups, digits, *v.shape[1:])

        p = grouped(propagate)
        span, words = p.shape[2:]
        # Every position but those of the lowest block; of that one, its total is enough.
        sent = [p[:, 1:].reshape(groups, (digits - 1) * span, words), p[:, 0, -1:]]
        if generate is not None:
            g = grouped(generate)
            sent.append(g[:, :-1, -1])
        opened = open_masked(party, jnp.concatenate(sent, axis=1))
        at = (digits - 1) * span
        own = opened[:, :at]
        totals = [opened[:, at : at + 1]]  # of block 0, 1, ...
        totals += [opened[:, d * span - 1 : d * span] for d in range(1, digits - 1)]
        carry = [opened[:, at + 1 + d : at + 2 + d] for d in range(digits - 1)]
        new_p, new_g = [p[:, 0]], [] if generate is None else [g[:, 0]]
        for d in range(1, digits):
            here = own[:, (d - 1) * span : d * span]
            # 0: this position, 1 to d: totals of the blocks below, d + 1 to 2d: their carries
            values = [here, *totals[:d], *(carry[:d] if generate is not None else [])]
            product = Term(tuple(range(d + 1)))
            if generate is None:
                new_p += combine(party, values, [[product]])
                continue
            terms = [Term((0, *range(i + 2, d + 1), d + 1 + i)) for i in range(d)]
            carried, propagated = combine(party, values, [terms, [product]])
            new_g.append(g[:, d] ^ carried)
            new_p.append(propagated)
        propagate = jnp.stack(new_p, axis=1).reshape(groups, digits * span, words)
        if generate is not None:
            generate = jnp.stack(new_g, axis=1).reshape(groups, digits * span, words)
    return generate, propagate


def most_significant(
    party: Seat, rows: jax.Array, radix: int = RADIX
) -> tuple[jax.Array, jax.Array]:
    """SecMSB: one-hot at the highest set bit, and whether there is one.

    t_l = 1, t_i = t_{i+1} (1 - u_i), f_i = t_{i+1} - t_i, zeta = sum f_i = 1 - t_0, where the
    products are a prefix tree (the published protocol takes l rounds).

    Args:
        party: this server's seat.
        rows: XOR-shared [l, ...], the highest bit first.
        radix: 2 or more.

    Returns:
        (f [l, ...], zeta [...]), XOR-shared. ceil(log_radix l) rounds.
    """
    length = rows.shape[0]
    inverted = complement(party, rows)
    flat = inverted.reshape(length, 1, inverted.size // length)
    _, products = _scan_blocks(party, flat, None, radix)
    t = products[0, :length].reshape(rows.shape)
    before = jnp.concatenate([complement(party, jnp.zeros_like(t[:1])), t[:-1]])
    return before ^ t, complement(party, t[-1])
