"""XOR-shared bits, bit-sliced: row i holds bit i of many values, packed into machine words.

A word of a row holds one bit of each of `lanes` values (lanes = the container's width), so that AND
gates cost one bit a value at every level of a tree, and nothing is padded below a byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from lpgan_jax.party import Dealt, Party
from lpgan_jax.ring.words import Ring


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
        upper, lower = tiles[:, 0], tiles[:, 1]
        shift = jnp.asarray(span, rows.dtype)
        swap = ((upper >> shift) ^ lower) & low_bits
        rows = jnp.stack([upper ^ (swap << shift), lower ^ swap], axis=1).reshape(lanes, columns)
        # One pass a stage: fused further, XLA would recompute each stage twice in the next.
        rows = lax.optimization_barrier(rows)
        span //= 2
    return rows[: ring.bits]


def ring_mask(span: int, lanes: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The word whose bits i with (i // span) even are set."""
    value = sum(1 << i for i in range(lanes) if (i // span) % 2 == 0)
    return jnp.asarray(value, dtype)


def unpack(ring: Ring, row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A row of packed bits as an array of 0 and 1, in the ring's dtype, of the given shape."""
    lanes = ring.container_bits
    shifts = jnp.arange(lanes, dtype=ring.dtype)[:, None]
    bits = (row[None, :] >> shifts) & jnp.ones((), ring.dtype)
    size = 1
    for length in shape:
        size *= length
    return bits.reshape(-1)[:size].reshape(shape)


@dataclass(frozen=True)
class _MaskedBits:
    """XOR-shared rows of packed bits under a mask: the mask, and bits ^ mask, which is public."""

    mask: Dealt
    opened: jax.Array

    def __getitem__(self, index: slice) -> _MaskedBits:
        return _MaskedBits(self.mask.map(lambda rows: rows[index]), self.opened[index])


def _open_masked(party: Party, rows: jax.Array) -> _MaskedBits:
    mask = party.mask(rows.shape, rows.dtype, bitwise=True)
    return _MaskedBits(mask, party.open_bits(rows ^ mask.share, "and"))


def _and(party: Party, u: _MaskedBits, v: _MaskedBits) -> jax.Array:
    """SecAnd: SecMul over Z_2 on packed words; local once both operands are masked."""
    c = party.correlate(jnp.bitwise_and, u.mask, v.mask, bitwise=True)
    return (
        c.share ^ (u.opened & (v.mask.share ^ party.only_s1(v.opened))) ^ (u.mask.share & v.opened)
    )


def sign_bit(party: Party, share: jax.Array) -> jax.Array:
    """The top bit of x' + x'', by a carry tree (exact for every x).

    Bit i generates a carry where x'_i x''_i and propagates one where x'_i xor x''_i; segments
    combine as (g, p) o (g', p') = (g xor p g', p p'), and the top bit is x'_top xor x''_top xor the
    carry of all bits below. The first AND is between words that one server knows whole, so each
    side masks its own (one-owner masks), and that message opens p as well, under the sum of both
    masks.

    Args:
        party: this server's seat.
        share: this server's share, ring elements of any shape, n in all.

    Returns:
        XOR-shared packed bits [ceil(n / lanes)], in the order of `bit_slice`. On 64 bits: 7 rounds
        and 182 opened bits per element; DS -> S2: 198 bits.
    """
    rows = bit_slice(party.ring, share)
    top, low = rows[-1], rows[-2::-1]  # from here on the most significant bit comes first
    alpha, beta = party.own_masks(low.shape, low.dtype)
    own_mask = alpha.share ^ beta.share
    first, second = party.exchange(low ^ own_mask, "generate")
    both = party.correlate(jnp.bitwise_and, alpha, beta, bitwise=True)
    generate = both.share ^ jnp.where(party.is_s1, low & second, own_mask & first)
    plain = None if alpha.plain is None or beta.plain is None else alpha.plain ^ beta.plain
    # No carry enters below, so the lowest segment's p is never used: it is dropped throughout.
    masked_p = _MaskedBits(Dealt(own_mask, plain), first ^ second)[slice(0, -1)]
    propagate: jax.Array | None = None  # at first p is open already, by the message above
    while (segments := generate.shape[0]) > 1:
        pairs = segments // 2
        generate_lower = generate[1 : 2 * pairs : 2]
        if propagate is None:
            masked_g = _open_masked(party, generate_lower)
        else:
            opened = _open_masked(party, jnp.concatenate([generate_lower, propagate]))
            masked_g, masked_p = opened[slice(0, pairs)], opened[slice(pairs, None)]
        p_upper, p_lower = masked_p[slice(0, 2 * pairs, 2)], masked_p[slice(1, 2 * pairs, 2)]
        combined = generate[0 : 2 * pairs : 2] ^ _and(party, p_upper, masked_g)
        propagate = _and(party, p_upper[slice(0, p_lower.opened.shape[0])], p_lower)
        generate = jnp.concatenate([combined, generate[2 * pairs :]])
    return top ^ generate[0]
