"""Values in a ring of half the bits: conversions exhaustively in tiny rings, protocols on words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pair_of, run

import lpgan_jax as lp
from lpgan_jax.analysis.audit import audit_program
from lpgan_jax.analysis.cost import program_cost
from lpgan_jax.mpc import arithmetic, compare, emulated, party
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.ring import matmul
from lpgan_jax.ring.words import RING32, RING64, Ring

# (bits of the two rings), in words by which they are told apart.
TINY = [
    (Ring(8, words=16), Ring(4)),
    pytest.param(Ring(12), Ring(6), marks=pytest.mark.slow),
]


def modulo(words, ring):
    return np.asarray(words).astype(np.int64) % 2**ring.bits


def under_every_mask(monkeypatch, protocol, wide, half, values, own):
    """protocol(party, secret) for each value and mask: integers [values, masks]."""
    masks = np.arange(2**own.bits)
    everywhere = np.repeat(values, len(masks)), np.tile(masks, len(values))

    def given(_, shape, dtype):
        return jnp.asarray(everywhere[1], dtype).reshape(shape), jnp.zeros(shape, dtype)

    monkeypatch.setattr(party.Source, "masks", given)
    first = np.random.default_rng(0).integers(0, 2**own.bits, len(everywhere[0]))
    pair = np.stack([first, (everywhere[0] - first) % 2**own.bits]).astype(own.dtype)

    def seat(server, shares, _):
        return protocol(server, shares)

    run = jax.jit(lambda key, pair: party.simulate(seat, key, pair, ring=wide, half=half))
    shares = np.asarray(run(lp.key(0), pair)).astype(np.int64)
    return shares.sum(0).reshape(len(values), len(masks))


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize(("wide", "half"), TINY, ids=str)
def test_every_value_and_mask_from_ring_to_ring(wide, half, widened, monkeypatch):
    """floor(x / 2^s) or one more, modulo the new ring, as often as the dropped fraction says."""
    own, new = (half, wide) if widened else (wide, half)
    most = 2 ** (own.bits - 2)
    values = np.arange(-most, most)
    for shift in range(own.bits - 1):

        def protocol(server, x, shift=shift):
            return arithmetic.truncate(server, Secret(x, shift), 0, new).share

        got = under_every_mask(monkeypatch, protocol, wide, half, values, own)
        more = modulo(got - (values >> shift)[:, None], new)
        assert set(np.unique(more)) <= {0, 1}
        np.testing.assert_array_equal(
            more.sum(1) << shift, (values % 2**shift) * 2**own.bits, err_msg=str(shift)
        )


def summed(secret, ring):
    """The signed integers of a paired secret."""
    both = np.asarray(secret.share).astype(np.uint64)
    with np.errstate(over="ignore"):
        return np.asarray(ring.signed((both[0] + both[1]).astype(ring.dtype))).astype(np.int64)


RNG = np.random.default_rng(1)
X, Y = (RNG.integers(-(2**37), 2**37, shape) for shape in ((40, 30), (30, 20)))


def test_a_product_of_what_was_truncated_into_it_opens_nothing():
    """Each word is opened once, to truncate it: 4 bytes from DS for each, and 4 a result's."""

    def protocol(server, x, y):
        x, y = (arithmetic.truncate(server, v, 10, RING32) for v in (x, y))
        return x.unmasked(), y.unmasked(), arithmetic.bilinear(server, matmul, x, y)

    given = [Secret(pair_of(v, seed), 30) for seed, v in enumerate((X, Y))]
    x, y, product = run(protocol, *given)
    low = [summed(v, RING32) for v in (x, y)]
    for integers, wide in zip(low, (X, Y), strict=True):
        assert np.abs(integers * 2.0**20 - wide).max() < 2**20
    np.testing.assert_array_equal(
        summed(product, RING32), (low[0] @ low[1]).astype(np.int32), strict=False
    )
    cost = program_cost(lambda server, given, _: protocol(server, *given), tuple(given))
    assert cost.rounds == 1
    assert cost.online_bytes == 8 * (X.size + Y.size)
    assert cost.dealer_bytes_s2 == 32 + 4 * (X.size + Y.size + 40 * 20)


def activation(server, x):
    """A ReLU and a product in the smaller ring, and back."""
    x = arithmetic.truncate(server, x, 10, RING32)
    positive = compare.positive(server, x, 24)
    chosen = compare.select(server, positive, x)
    squares = arithmetic.mul(server, chosen, x)
    return chosen.unmasked(), arithmetic.truncate(server, squares, 10, RING64)


def test_an_activation():
    reals = RNG.uniform(-14, 14, 20_000)
    integers = np.rint(reals * 2**30).astype(np.int64)
    chosen, squares = run(activation, Secret(pair_of(integers), 30))
    low, high = summed(chosen, RING32), summed(squares, RING64)
    relu = np.maximum(integers, 0)
    assert np.abs(low * 2.0**20 - relu).max() < 2**20
    # Exact products of the very words that were selected, rounded down or up.
    assert np.abs(high * 2**10 - low**2).max() < 2**10
    # Unbiased: a rounding has a variance of 1/4 at most. 5 standard errors.
    assert abs((high - low**2 / 2**10).mean()) < 2.5 / np.sqrt(reals.size)


def test_shadow_mode_has_both_rings():
    integers = RNG.integers(-(2**33), 2**33, 1000)
    words = Secret(jnp.asarray(integers.astype(np.uint64)), 30)
    for rounding in ("stochastic", "nearest"):  # a local one is wrong in so small a ring
        chosen, squares = emulated.run(
            lambda server, x, _: activation(server, x), lp.key(0), words, None, rounding
        )
        low = np.asarray(chosen.share).astype(np.int32).astype(np.int64)
        assert np.abs(low * 2.0**20 - np.maximum(integers, 0)).max() < 2**20
        high = np.asarray(squares.share).astype(np.int64)
        assert np.abs(high * 2**10 - low**2).max() < 2**10


def test_every_message_is_hidden():
    given = Secret(jax.ShapeDtypeStruct((2, 5), np.uint64), 30)
    report = audit_program(lambda server, x, _: activation(server, x), given)
    assert report.problems == []
    widths = [np.dtype(opening.dtype).itemsize for opening in report.openings]
    assert (widths[0], max(widths[1:])) == (8, 4)


def test_rings_do_not_mix():
    wide, narrow = (Secret(jnp.zeros(3, dtype), 10) for dtype in (np.uint64, np.uint32))
    for join in (
        lambda server, v, _: wide + narrow,
        lambda server, v, _: arithmetic.mul(server, wide, narrow),
        lambda server, v, _: arithmetic.bilinear(server, jnp.multiply, narrow, wide),
    ):
        with pytest.raises(TypeError, match=r"rings differ: uint\d+ and uint\d+ words"):
            party.simulate(join, lp.key(0), jnp.zeros((2, 1)))
