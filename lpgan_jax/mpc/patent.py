"""SecCmp as the LP-GAN patent prints it, for comparison with `compare.greater`.

Its last steps take sign-magnitude bits, an OR of the signs and a product with zeta. They are right
for integers that do not wrap; on uniform shares of the ring they fail with probability about |u -
v| / 2^64, and nobody notices. Its SecMSB is sequential: one round a bit.
"""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp

from lpgan_jax.mpc.boolean import bit_slice, complement, conjunction
from lpgan_jax.mpc.compare import Bit, bit_of_rows
from lpgan_jax.mpc.party import Party
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret


def greater(party: Party, u: Secret, v: Secret) -> Bit:
    """[u > v] by the published steps.

    S1 forms a = u' - v' and S2 b = v'' - u''; on their sign-magnitude bits: c = a xor b, (d, zeta)
    = SecMSB(c), e_i = a_i d_i, xi = sum e_i, iota = OR of the sign bits, nu = iota xor xi, f = nu
    zeta.

    Returns:
        The bit; wrong where a or b wrapped. On 64 bits: 66 rounds and 259 opened bits.
    """
    ring = party.ring
    difference = (u - v).settled(party).share
    own = ring.reduce(jnp.where(party.is_s1, difference, jnp.zeros_like(difference) - difference))
    top = ring.constant(1 << (ring.bits - 1))
    magnitude = jnp.where(own & top != 0, ring.reduce(jnp.zeros_like(own) - own) | top, own)
    rows = bit_slice(ring, magnitude)[::-1]  # the sign first; S1's are a's bits, S2's b's
    none = jnp.zeros_like(rows)
    a = jnp.where(party.is_s1, rows, none)
    b = jnp.where(party.is_s1, none, rows)
    one_hot, zeta = most_significant(party, a ^ b)
    xi = jnp.bitwise_xor.reduce(conjunction(party, a, one_hot))
    # u or v = u xor v xor (u and v)
    iota = a[0] ^ b[0] ^ conjunction(party, a[0], b[0])
    return bit_of_rows(party, conjunction(party, iota ^ xi, zeta)[None], u.shape)[0]


def most_significant(party: Seat, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SecMSB as printed: t_l = 1, t_i = t_{i+1} (1 - u_i), one after the other. l - 1 rounds."""
    t = [complement(party, jnp.zeros_like(rows[0])), complement(party, rows[0])]
    for row in rows[1:]:
        t.append(conjunction(party, t[-1], complement(party, row)))
    return jnp.stack([before ^ after for before, after in pairwise(t)]), complement(party, t[-1])
