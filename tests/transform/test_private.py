"""Clipped sums of examples' gradients under sharing, against plain JAX and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from secured import LSB

import lpgan_jax as lp
from lpgan_jax.mpc import clipping

RNG = np.random.default_rng(3)
X = RNG.normal(size=(6, 8)).astype(np.float32)
Y = RNG.integers(0, 2, 6).astype(np.float32)
PARAMS = {"w": RNG.normal(size=(8, 3)).astype(np.float32), "b": np.zeros(3, np.float32)}
WEIGHTS = np.array([1, 1, 0, 1, 0, 1], np.int32)


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jax.nn.softplus(hidden.sum() * (1 - 2 * y)) * 4


def private(params, x, y, weights):
    gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)
    return lp.clipped_sum(gradients, weights, 0.5)


def by_numpy(gradients, weights, clip):
    rows = np.concatenate([np.reshape(g, (len(weights), -1)) for g in gradients], 1)
    norms = np.linalg.norm(rows.astype(float), axis=1)
    factors = np.minimum(1, clip / norms) * (norms < 64 * clip) * weights
    return factors @ rows, norms


def test_it_clips_as_numpy_does():
    gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(PARAMS, X, Y)
    leaves = jax.tree.leaves(gradients)
    wanted, norms = by_numpy(leaves, WEIGHTS, 0.5)
    assert (norms > 0.5).any()
    got = jax.tree.leaves(private(PARAMS, X, Y, WEIGHTS))
    flat = np.concatenate([np.ravel(g) for g in got])
    np.testing.assert_allclose(flat, wanted, rtol=2 * clipping.margin(0.5), atol=1e-6)


@pytest.fixture(scope="module")
def step():
    return lp.secure(private)


def test_under_sharing_it_is_the_same(step):
    """Gradients are off by some LSB, factors by 3 of 2^-20, and the sum is rounded to an LSB."""
    k1, k2 = jax.random.split(lp.key())
    args = PARAMS, X, Y, WEIGHTS
    got = lp.reveal(step(k2, *step.share(k1, *args)))
    wanted = private(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=80 * LSB)
    leaves = jax.tree.leaves(jax.vmap(jax.grad(loss), (None, 0, 0))(PARAMS, X, Y))
    one = np.zeros(6, np.int32)
    one[int(np.argmax(by_numpy(leaves, WEIGHTS, 0.5)[1]))] = 1
    alone = lp.reveal(step(k1, *step.share(k2, PARAMS, X, Y, one)))
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(alone)))
    assert 0.49 < norm <= 0.5 + np.sqrt(27) * LSB


def test_nothing_of_it_is_opened(step):
    report = lp.audit(step, PARAMS, X, Y, WEIGHTS)
    assert report.problems == []
    assert all(opening.problems == [] for opening in report.openings)


def test_its_headroom_is_known(step):
    assert "clipped_sum" in str(step.explain(PARAMS, X, Y, WEIGHTS))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lp.clipped_sum({"w": X}, Y, 1.0), TypeError, r"weights: float32\[6\], expected"),
        (lambda: lp.clipped_sum({"w": X[:3]}, WEIGHTS, 1.0), ValueError, r"shape \(3, 8\)"),
        (lambda: lp.clipped_sum({"w": X.astype(int)}, WEIGHTS, 1.0), TypeError, "expected floats"),
        (lambda: lp.clipped_sum({"w": X}, WEIGHTS, 100.0), ValueError, "clip: 100, expected"),
    ],
)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
