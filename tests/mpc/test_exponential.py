"""Powers of e from one opening, against float64; and what the servers compute, in integers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lpgan_jax.mpc.exponential import Window, dealt_powers, public_power

# Fraction bits of the result, log2 of the largest, and where it lies.
KINDS = {"capped": (18, 16), "at most 1": (18, 1), "fine": (22, 12), "coarse": (8, 26)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_public_power_and_a_dealt_one_make_the_power(kind):
    f, top = KINDS[kind]
    scale = f + 8
    low, high = (round(v * math.log(2) * 2**scale) for v in (-(f + 2), top))
    window = Window(low, high - 4, scale, top, f)
    rng = np.random.default_rng(0)
    ends = [low, low + 1, high - 5, 0, -1, 1]
    x = np.concatenate([rng.integers(low, high - 4, 5000), ends]).astype(np.int64)
    # Masks also where a window ends, and where its parity changes.
    mask = rng.integers(0, 2**64, x.shape, dtype=np.uint64)
    edges = np.array([0, 1, 2**64 - 1, 2**window.bits - 1, 2**window.bits], np.uint64)
    mask[: 5 * 200] = np.repeat(edges, 200)

    power, entry = public_power(window, jnp.asarray(x.astype(np.uint64) - mask))
    dealt = np.asarray(dealt_powers(window, jnp.asarray(mask)))
    assert dealt.shape == (2 * window.entries, *x.shape)
    taken = dealt[np.asarray(entry), np.arange(x.size)]
    product = [int(p) * int(d) for p, d in zip(np.asarray(power), taken, strict=True)]
    assert min(product) >= 0
    assert max(product) < 2**62

    exact = np.exp(x * 2.0**-scale)
    error = np.abs(np.array([p / 2.0**window.result_scale for p in product]) - exact)
    # What is dealt is rounded to 2^-(f+2) in the result, what is public to 2^-25 of it (and its
    # series to 2^-27), with an argument rounded to 2^-32 windows of up to 2^6.
    assert (error <= 2.0 ** -(f + 2) + 2.0**-24 * exact).all()
