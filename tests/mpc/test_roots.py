"""Quotients by a root, and comparisons that leave out the lowest bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pair_of, run, whole

from lpgan_jax import key
from lpgan_jax.mpc import arithmetic, compare, emulated, roots
from lpgan_jax.mpc.secret import Secret

F = 20


def on_shares(function, *values):
    """function(party, *values) of signed integers [(array, fraction bits), ...], on shares."""
    return whole(
        run(function, *(Secret(pair_of(v, i), f) for i, (v, f) in enumerate(values))).share
    )


def in_shadow(function, *values):
    """The same in shadow mode."""
    secrets = [Secret(jnp.asarray(v.astype(np.uint64)), f) for v, f in values]
    program = jax.jit(lambda k, s: emulated.run(lambda p, v, _: function(p, *v), k, s))
    return np.asarray(program(key(0), secrets).share).astype(np.int64)


@pytest.mark.parametrize("way", [on_shares, in_shadow])
def test_a_quotient_by_a_root_errs_by_its_factors_roundings(way):
    """x / sqrt(u) = a y with y = 1/sqrt(m) in (1, 2]: each factor errs by an LSB at F.

    So the product by y + a < 2 + |quotient| LSB; the series by 2^-24 of it, which is less than
    another one.
    """
    rng = np.random.default_rng(0)
    u = np.maximum(1, 2.0 ** rng.uniform(0, 62, 4000)).astype(np.int64)
    u[:6] = [1, 2, 3, 4, 2**62 - 1, 2**50]
    size = np.sqrt(u * 2.0**-42)
    x = np.rint(rng.normal(size=u.size) * np.minimum(size, 2.0**7) * 2.0**26).astype(np.int64)
    quotient = x * 2.0**-26 / size
    got = way(lambda p, a, b: roots.over_root(p, a, b, F), (x, 26), (u, 42)) * 2.0 ** (-2 * F)
    assert np.all(np.abs(got - quotient) * 2.0**F < 3 + np.abs(quotient))


@pytest.mark.parametrize("way", [on_shares, in_shadow])
def test_without_the_lowest_bits_a_value_counts_as_less(way):
    """By up to 2^low: certain elsewhere, and neither always nor never so there."""
    low, limit = 30, 5 << 30
    x = np.random.default_rng(1).integers(limit - 2**32, limit + 2**32, 4000)

    def below(party, x):
        bits = compare.less_than_public(party, arithmetic.masked(party, x), [limit], 63, low)
        return compare.b2a(party, bits[0])

    found = way(below, (x, 0))
    assert np.all(found[x < limit] == 1)
    assert np.all(found[x >= limit + 2**low] == 0)
    between = found[(x >= limit) & (x < limit + 2**low)]
    assert 0 < between.mean() < 1
