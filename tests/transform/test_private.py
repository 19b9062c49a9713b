"""Private sums under sharing, against plain JAX and NumPy; and that nothing else is released."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from secured import FAST, LSB

import lpgan_jax as lp
from lpgan_jax.mpc import clipping
from lpgan_jax.privacy.mechanism import Noise
from lpgan_jax.programs import Program
from lpgan_jax.programs.secured import SecureProgram
from lpgan_jax.transform.releases import Sums, Unhidden, releases

RNG = np.random.default_rng(3)
X = RNG.normal(size=(6, 8)).astype(np.float32)
Y = RNG.integers(0, 2, 6).astype(np.float32)
PARAMS = {"w": RNG.normal(size=(8, 3)).astype(np.float32), "b": np.zeros(3, np.float32)}
WEIGHTS = np.array([1, 1, 0, 1, 0, 1], np.int32)
SIZE, CLIP = 27, 0.5
NOISE = (RNG.integers(-(2**20), 2**20, SIZE) * LSB).astype(np.float32)  # as exact as LSBs


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jax.nn.softplus(hidden.sum() * (1 - 2 * y)) * 4


def gradients(params, x, y):
    return jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)


def private(params, x, y, weights, noise):
    return lp.private_sum(gradients(params, x, y), weights, noise, CLIP)


def flat(tree, lead=0):
    return np.concatenate(
        [np.reshape(v, (*np.shape(v)[:lead], -1)) for v in jax.tree.leaves(tree)], -1
    )


def by_numpy(rows, weights, clip):
    norms = np.linalg.norm(rows.astype(float), axis=1)
    factors = np.minimum(1, clip / norms) * (norms < 64 * clip) * weights
    return factors @ rows, norms


def test_it_clips_and_adds_noise_as_numpy_does():
    rows = flat(gradients(PARAMS, X, Y), 1)
    wanted, norms = by_numpy(rows, WEIGHTS, CLIP)
    assert (norms > CLIP).any()
    got = flat(private(PARAMS, X, Y, WEIGHTS, NOISE))
    # The norm that is allowed is below the clip by the margin; noise of up to 4, in float32.
    np.testing.assert_allclose(got - NOISE, wanted, rtol=2 * clipping.margin(CLIP), atol=1e-6)


@pytest.fixture(scope="module")
def step():
    return lp.secure(private)


def test_under_sharing_it_is_the_same():
    """Of vectors that are shared: rounded to LSBs; the norm that is allowed has 12 bits, and
    a factor is off by what the proof of the bound says.
    """
    rows = flat(gradients(PARAMS, X, Y), 1).astype(np.float32)
    of_rows = lp.secure(lambda g, w, z: lp.private_sum(g, w, z, CLIP))
    k1, k2 = jax.random.split(lp.key())
    got = lp.reveal(FAST(of_rows)(k2, *of_rows.share(k1, rows, WEIGHTS, NOISE)))
    exact = np.round(rows.astype(float) / LSB) * LSB
    wanted, norms = by_numpy(exact, WEIGHTS, clipping.allowed(CLIP))
    factors = np.minimum(1, CLIP / norms)
    error = factors * (2.0**-11 + 2.0**-24) + (CLIP + 1) * 2.0**-clipping.FACTOR_BITS
    off = (WEIGHTS * error) @ np.abs(exact) + LSB
    assert (np.abs(got - NOISE - wanted) <= off).all()


def test_no_example_counts_for_more_than_the_clip(step):
    k1, k2 = jax.random.split(lp.key())
    one = np.zeros(6, np.int32)
    one[int(np.argmax(by_numpy(flat(gradients(PARAMS, X, Y), 1), WEIGHTS, CLIP)[1]))] = 1
    alone = flat(lp.reveal(FAST(step)(k1, *step.share(k2, PARAMS, X, Y, one, NOISE))))
    assert 0.49 < np.linalg.norm(alone - NOISE) <= CLIP + np.sqrt(SIZE) * LSB


def test_nothing_of_it_is_opened(step):
    report = lp.audit(step, PARAMS, X, Y, WEIGHTS, NOISE)
    assert report.problems == []
    assert all(opening.problems == [] for opening in report.openings)


def test_its_headroom_is_known(step):
    assert "private_sum" in str(step.explain(PARAMS, X, Y, WEIGHTS, NOISE))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lp.private_sum(X, Y, NOISE[:8], 1.0), TypeError, r"weights: float32\[6\], expec"),
        (lambda: lp.private_sum(X[:3], WEIGHTS, NOISE[:8], 1.0), ValueError, r"shape \(3, 8\)"),
        (lambda: lp.private_sum(X.astype(int), WEIGHTS, NOISE[:8], 1.0), TypeError, "expected flo"),
        (lambda: lp.private_sum(X, WEIGHTS, NOISE[:8], 100.0), ValueError, "clip: 100, expected"),
        (lambda: lp.private_sum(X, WEIGHTS, NOISE, 1.0), ValueError, r"noise: shape \(27,\), exp"),
    ],
)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_sum_that_does_not_fit_is_refused():
    of = lp.secure(lambda g, w, z: lp.private_sum(g, w, z, 64.0), frac_bits=22)
    many = jax.ShapeDtypeStruct((2**15, 1), np.float32)
    weights = jax.ShapeDtypeStruct((2**15,), np.int32)
    with pytest.raises(ValueError, match="32768 vectors and 22 fraction bits: their sum does not"):
        lp.cost(of, many, weights, jax.ShapeDtypeStruct((1,), np.float32))


# What is released ---------------------------------------------------------------------------------


BATCH = {"x": X, "y": Y, "weights": WEIGHTS, "beside": np.float32(1.0)}
SHAPES = jax.tree.map(lambda v: jax.ShapeDtypeStruct(np.shape(v), np.asarray(v).dtype), BATCH)


def descend(params, total, rate=0.1):
    return jax.tree.map(lambda p, g: p - rate * g, params, total)


def once(params, batch, noise):
    """One update, from one sum."""
    total = private(params, batch["x"], batch["y"], batch["weights"], noise[0])
    return descend(params, total, batch["beside"]), None


def thrice(params, batch, noise):
    """An update in each iteration of a loop, each with weights of its own."""

    def update(params, given):
        weights, hiding = given
        return once(params, {**batch, "weights": weights}, hiding[None])[0], None

    return jax.lax.scan(update, params, (batch["weights"], noise))


def program(step, sums=1, noise=True, unprotected=("beside",), each=True):
    """`each`: whether every sum has weights of its own."""
    made = Noise(1.0, CLIP, SIZE, sums) if noise else None
    rows = (sums, 6) if sums > 1 and each else (6,)
    shapes = {**SHAPES, "weights": jax.ShapeDtypeStruct(rows, np.int32)}
    return Program(lambda rng: PARAMS, step, shapes, noise=made, unprotected=unprotected)


def test_what_a_step_releases_is_known():
    for step, sums in ((once, 1), (thrice, 3)):
        traced = SecureProgram(program(step, sums))
        inputs = traced._step.graph.inputs
        assert releases(traced._step.graph, inputs[3:6], inputs[-1]).sums == (
            Sums(CLIP, SIZE, 6, sums),
        )


def test_no_alarm_tells_of_examples():
    """The range guard looks at what follows from noised sums, and at nothing before these."""
    beside = SecureProgram(program(once)).watched
    without = {of.name for of in beside}
    assert without
    assert not any("private_sum" in name or "tanh" in name for name in without)
    plain = Program(lambda rng: PARAMS, lambda p, b: (descend(p, mean(p, b)), None), SHAPES)
    assert {of.size for of in SecureProgram(plain).watched} > {of.size for of in beside}


def mean(params, batch):
    return jax.tree.map(lambda g: g.mean(0), gradients(params, batch["x"], batch["y"]))


def told(params, batch, noise):
    return once(params, batch, noise)[0], gradients(params, batch["x"], batch["y"])["b"].sum()


def clipped_rate(params, batch, noise):
    """Something of the images beside the sum."""
    new, _ = once(params, batch, noise)
    return jax.tree.map(lambda p: p * (1 + 1e-6 * batch["x"].mean()), new), None


def in_a_loop(params, batch, noise):
    """The first iteration's rest of the images comes out of the second."""

    def update(carry, given):
        weights, hiding = given
        params, before = carry
        new, _ = once(params, {**batch, "weights": weights}, hiding[None])
        new = descend(new, {"w": before, "b": 0.0})
        return (new, batch["x"].sum() + jnp.zeros((8, 3))), None

    start = params, jnp.zeros((8, 3))
    (params, _), _ = jax.lax.scan(update, start, (batch["weights"], noise))
    return params, None


def noise_taken_off(params, batch, noise):
    new, _ = once(params, batch, noise)
    return {**new, "b": new["b"] + 0.1 * noise[0, -3:]}, None


def the_same_noise(params, batch, noise):
    def update(params, weights):
        return once(params, {**batch, "weights": weights}, noise)[0], None

    return jax.lax.scan(update, params, batch["weights"])


def noise_of_a_carry(params, batch, noise):
    """Of which the second iteration has none."""

    def update(carry, weights):
        params, hiding = carry
        new, _ = once(params, {**batch, "weights": weights}, hiding[None])
        return (new, 0.0 * hiding), None

    (params, _), _ = jax.lax.scan(update, (params, noise[0]), batch["weights"])
    return params, None


def one_part_twice(params, batch, noise):
    first, _ = once(params, {**batch, "weights": batch["weights"][0]}, noise[:1])
    return once(first, {**batch, "weights": batch["weights"][1]}, noise[:1])


def half_the_noise(params, batch, noise):
    return once(params, batch, 0.5 * noise)


def twice_the_weights(params, batch, noise):
    return once(params, {**batch, "weights": 2 * batch["weights"]}, noise)


def no_weights(params, batch, noise):
    return once(params, {**batch, "weights": jnp.ones(6, jnp.int32)}, noise)


def the_same_draw(params, batch, noise):
    first, _ = once(params, batch, noise[:1])
    return once(first, batch, noise[1:])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: program(told), r"result 2 .* depends on batch\[0\]\['x'\] otherwise"),
        (lambda: program(clipped_rate), r"depends on batch\[0\]\['x'\] otherwise than through"),
        (lambda: program(in_a_loop, 3), r"depends on batch\[0\]\['x'\] otherwise than through"),
        (lambda: program(once, unprotected=()), r"depends on batch\[0\]\['beside'\] otherwise"),
        (lambda: program(noise_taken_off), r"depends on batch\[1\] .*the noise hides"),
        (lambda: program(the_same_noise, 3), "noise: expected an argument, or what a loop goes"),
        (lambda: program(noise_of_a_carry, 2), "noise: expected an argument, or what a loop goes"),
        (lambda: program(one_part_twice, 2), "private sums take 27 of them in 54 places"),
        (lambda: program(half_the_noise), "noise: expected an argument, .* nothing that was comp"),
        (lambda: program(twice_the_weights), "weights: expected an argument, .* nothing that was"),
        (lambda: program(no_weights), "weights: expected an argument"),
        (lambda: program(the_same_draw, 2, each=False), "weights: expected those of the batch, ea"),
        (lambda: program(once, 2, each=False), "noise: 54 values, and private sums take 27"),
        (lambda: program(lambda p, b: (p, None), noise=False), None),
    ],
)
def test_what_would_tell_more_is_refused(made, message):
    if message is None:
        SecureProgram(made())
        return
    with pytest.raises(Unhidden, match=message):
        SecureProgram(made())


def test_noise_of_another_clip_is_refused():
    other = Program(
        lambda rng: PARAMS, once, SHAPES, noise=Noise(1.0, 1.0, SIZE), unprotected=("beside",)
    )
    with pytest.raises(Unhidden, match=r"made for a clip of 1 and 27 .* has 0\.5 and 27"):
        SecureProgram(other)
    with pytest.raises(ValueError, match=r"unprotected: 'beyond' is no leaf of a batch"):
        SecureProgram(program(once, unprotected=("beyond",)))
