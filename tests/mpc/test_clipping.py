"""A clipped sum: no vector counts for more than it may, whatever its words are."""

import functools
import math

import jax
import numpy as np
import pytest
from helpers import pair_of, whole
from hypothesis import given, settings
from hypothesis import strategies as st

import lpgan_jax as lp
from lpgan_jax import key
from lpgan_jax.mpc import clipping
from lpgan_jax.mpc.emulated import EmulatedSeat
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.secret import Secret

F = 18
M, D = 3, 5


@functools.cache
def compiled(clip, frac_bits=F):
    def function(party, secrets, _):
        return clipping.clipped_sum(party, *secrets, clip)

    return jax.jit(lambda k, s: simulate(function, k, s))


def summed(gradients, weights, clip, seed=0, frac_bits=F):
    """The sum, as integers at f + F fraction bits."""
    words = np.array(gradients, object)
    words = np.vectorize(lambda v: (int(v) + 2**63) % 2**64 - 2**63, otypes=[np.int64])(words)
    secrets = (
        Secret(pair_of(words, seed), frac_bits),
        Secret(pair_of(np.array(weights, np.int64), seed + 1), 0),
    )
    found = compiled(clip, frac_bits)(key(seed), secrets)
    assert found.frac_bits == frac_bits + clipping.FACTOR_BITS
    return [int(v) for v in np.asarray(whole(found.share)).astype(np.int64)]


BITS = clipping.element_bits(D)
EDGES = [s * 2**b + o for b in (0, F - 1, F, F + 6, BITS, 62) for s in (1, -1) for o in (-1, 0, 1)]
WORDS = (
    st.sampled_from([*EDGES, 0, 2**63 - 1, -(2**63)])
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-(2 ** (F + 1)), 2 ** (F + 1))
    | st.integers(-(2 ** (F + 6)), 2 ** (F + 6))
)


@pytest.mark.parametrize("clip", [1.0, 2.0**-6, 40.0])
@settings(max_examples=150, deadline=None)
@given(vector=st.tuples(*[WORDS] * D), seed=st.integers(0, 2**32))
def test_no_vector_counts_for_more_than_the_clip(clip, vector, seed):
    """In integers, and so exactly, for any words of the ring."""
    found = summed([vector, [0] * D, [0] * D], [1, 1, 1], clip, seed)
    limit = math.floor(clip * 2 ** (F + clipping.FACTOR_BITS))
    assert sum(v * v for v in found) <= limit * limit


@settings(max_examples=60, deadline=None)
@given(
    vectors=st.tuples(*[st.tuples(*[WORDS] * D)] * M),
    left_out=st.integers(0, M - 1),
    seed=st.integers(0, 2**32),
)
def test_leaving_one_out_moves_the_sum_by_no_more(vectors, left_out, seed):
    """With the same randomness: what others count for stays as it is, bit by bit."""
    weights = np.ones(M, int)
    all_of_them = summed(vectors, weights, 1.0, seed)
    weights[left_out] = 0
    others = summed(vectors, weights, 1.0, seed)
    limit = 2 ** (F + clipping.FACTOR_BITS)
    assert sum((a - b) ** 2 for a, b in zip(all_of_them, others, strict=True)) <= limit**2


@settings(max_examples=40, deadline=None)
@given(
    vectors=st.lists(st.lists(st.floats(-20, 20), min_size=D, max_size=D), min_size=M, max_size=M),
    clip=st.sampled_from([1.0, 2.0**-6, 40.0]),
    seed=st.integers(0, 2**32),
)
def test_it_is_what_it_is_of_reals(vectors, clip, seed):
    """Against NumPy: within the margin, and an LSB of a factor and its truncation."""
    integers = np.round(np.array(vectors) * 2**F)
    weights = np.array([1, 0, 1])
    found = np.array(summed(integers, weights, clip, seed), float) / 2.0 ** (
        F + clipping.FACTOR_BITS
    )
    g = integers / 2.0**F
    norms = np.linalg.norm(g, axis=1)
    factors = np.minimum(1.0, clip / np.maximum(norms, 1e-300)) * weights
    factors[norms >= clipping.LARGEST * clip] = 0  # 45 at most: of the smallest clip alone
    wanted = factors @ g
    off = (clipping.margin(clip) + 2.0**-11 + 2.0**-23) * factors + (clip + 2) * 2.0**-20
    near = np.abs(norms - clipping.LARGEST * clip) < 1e-3 * clip
    assert near.any() or (np.abs(found - wanted) <= off @ np.abs(g) + 1e-9).all()


def test_what_counts_for_nothing_is_exactly_nothing():
    far = round(clipping.LARGEST * 2**F)
    for vector in ([2**BITS, 0, 0, 0, 0], [-(2**63)] * D, [far, 0, 0, 0, 0], [far] * D):
        assert summed([vector, [0] * D, [0] * D], [1, 1, 1], 1.0) == [0] * D
    near = [far - 1, 0, 0, 0, 0]
    (first, *_) = summed([near, [0] * D, [0] * D], [1, 1, 1], 1.0)
    assert 0.998 < first / 2 ** (F + clipping.FACTOR_BITS) <= 1


def test_nothing_is_sent_that_is_not_masked():
    def function(key, gradients, weights):
        def clipped(party, secrets, _):
            of = Secret(secrets[0], F), Secret(secrets[1], 0)
            return clipping.clipped_sum(party, *of, 1.0).settled(party).share

        return simulate(clipped, key, (gradients, weights))

    shapes = [jax.ShapeDtypeStruct((2, *shape), np.uint64) for shape in ((M, D), (M,))]
    report = lp.audit(function, *shapes)
    assert report.openings
    assert report.problems == []
    assert all(opening.problems == [] for opening in report.openings)


def test_shadow_mode_clips_alike():
    """On whole words: within what the rounding of a factor is (3 LSB of 2^-20)."""
    g = np.random.default_rng(0).normal(size=(M, D)) * [[0.1], [1.0], [20.0]]
    integers, weights = np.round(g * 2**F).astype(np.int64), np.array([1, 1, 0])

    @jax.jit
    def shadow(k, words, weights):
        secrets = Secret(words, F), Secret(weights, 0)
        return clipping.clipped_sum(EmulatedSeat(k), *secrets, 1.0).share

    words = shadow(key(0), integers.astype(np.uint64), weights.astype(np.uint64))
    own = np.asarray(words).astype(np.int64) / 2.0 ** (F + clipping.FACTOR_BITS)
    shared = np.array(summed(integers, weights, 1.0), float) / 2.0 ** (F + clipping.FACTOR_BITS)
    assert (np.abs(own - shared) <= 3 * 2.0**-20 * np.abs(g).sum(0)).all()


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 2**20, 2**20 + 1])
def test_squares_have_room(size):
    bits = clipping.element_bits(size)
    assert size * 2 ** (2 * bits) <= 2**61 < size * 2 ** (2 * bits + 4)


@pytest.mark.parametrize(
    ("clip", "frac_bits", "message"),
    [
        (2.0**-7, F, "clip: 0.0078125, expected 2\\^-6 to 2\\^6"),
        (65.0, F, "clip: 65, expected"),
        (64.0, 20, "clip: 64, and 20 fraction bits: squares of norms do not fit"),
    ],
)
def test_a_clip_out_of_range_is_refused(clip, frac_bits, message):
    with pytest.raises(ValueError, match=message):
        summed([[0] * D] * M, [1] * M, clip, frac_bits=frac_bits)
