"""A private step: noised updates of SD, and one of SG; against its parts in plain JAX and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gans import SGD, flat, small_lpgan
from scipy.stats import ks_2samp
from secured import FAST, as_float64

import lpgan_jax as lp
from lpgan_jax.analysis.audit import audit_program
from lpgan_jax.gan import PrivateBatch, PrivateUpdates, gan_program
from lpgan_jax.mpc import clipping
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.share_trees import reveal_tree, scaled, share_tree, unscaled
from lpgan_jax.privacy.mechanism import Noise
from lpgan_jax.programs import shapes
from lpgan_jax.programs.secured import SecureProgram

CLASSES, ROWS, GENERATED, UPDATES, CLIP = 3, 5, 2, 2, 0.25
BITS, LSB, RATE = 18, 2.0**-18, 0.1
APART, WRONG = 0.3, 0.5
RELATIVE = 4 * 2.0**-17  # as of test_program


@pytest.fixture(scope="module")
def gan():
    private = PrivateUpdates(CLIP, UPDATES, 2.5, GENERATED, 2.0, APART, WRONG)
    of_sd = {"norm": "none"}
    lpgan = small_lpgan(SGD, depth=1, of_sd=of_sd, num_classes=CLASSES, private=private)
    size = flat(lpgan.init(np.random.default_rng(0)).params["discriminator"]).size
    noise = Noise(1.0, CLIP, size, UPDATES)
    return SecureProgram(gan_program(lpgan, ROWS, BITS, noise=noise))


def one_hot(rng, *shape):
    return np.eye(CLASSES, dtype=np.int32)[rng.integers(CLASSES, size=shape)]


def inputs(gan, rng):
    """(a batch, its noise), on the grid of an LSB; some images do not count."""

    def grid(values):
        return np.rint(values / LSB) * LSB

    of = gan.program.batch
    batch = PrivateBatch(
        grid(rng.uniform(-1, 1, of.images.shape)),
        np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], np.int32),
        grid(rng.normal(size=of.noise_d.shape)),
        grid(rng.normal(size=of.noise_g.shape)),
        one_hot(rng, UPDATES, ROWS),
        one_hot(rng, UPDATES, GENERATED),
        one_hot(rng, GENERATED),
        one_hot(rng, UPDATES, ROWS),
    )
    return batch, gan.program.noise.draw(rng.bytes(32), 0, BITS) * LSB


def by_hand(gan, state, batch, noise):
    """SD's parameters after a step of SGD: one image after the other, clipped by NumPy."""
    lpgan = gan.program.step.__self__
    params = state.params["discriminator"]

    def logits(p, images, labels):
        return lpgan.discriminator.apply({"params": p}, images, labels)

    @jax.jit
    def of_one(p, image, label, other):
        def real(p):
            right, wrong = (logits(p, image[None], of[None]).sum() for of in (label, other))
            return jax.nn.softplus(-right) + WRONG * jax.nn.softplus(wrong)

        return jax.grad(real)(p)

    @jax.jit
    def of_fakes(p, images, labels):
        return jax.grad(lambda p: jax.nn.softplus(logits(p, images, labels)).mean())(p)

    variables = {
        "params": state.params["generator"],
        "batch_stats": state.stats["generator"],
    }
    for k in range(UPDATES):
        fakes, _ = lpgan.generator.apply(
            variables, batch.noise_d[k], batch.labels_d[k], train=True, mutable=["batch_stats"]
        )
        total = noise[k].copy()
        for i in range(ROWS):
            given = batch.images[k, i], batch.labels[k, i], batch.others[k, i]
            gradient = flat(of_one(params, *given))
            norm = np.linalg.norm(gradient)
            allowed = clipping.allowed(CLIP)
            total += batch.weights[k, i] * gradient * min(1, allowed / norm)
        change = total / 2.5 + flat(of_fakes(params, fakes, batch.labels_d[k]))
        leaves, structure = jax.tree.flatten(params)
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = np.split(change, ends)
        leaves = [p - RATE * c.reshape(p.shape) for p, c in zip(leaves, parts, strict=True)]
        params = jax.tree.unflatten(structure, leaves)
    return params


def test_a_step_is_its_parts(gan):
    rng = np.random.default_rng(1)
    state = as_float64(gan.program.init(rng))
    batch, noise = as_float64(inputs(gan, rng))
    after, told = FAST(gan.program.run)(state, (batch, noise))
    wanted = by_hand(gan, state, batch, np.asarray(noise))
    # The same sums in float64, in another order: of a thousand terms below 1, at the most.
    np.testing.assert_allclose(flat(after.params["discriminator"]), flat(wanted), atol=1e-12)
    assert told is None
    assert np.abs(flat(after.params["generator"]) - flat(state.params["generator"])).max() > 1e-4
    assert after.stats["discriminator"] == {}


def test_in_float64_it_is_plain_jax(gan):
    rng = np.random.default_rng(2)
    state = as_float64(gan.program.init(rng))
    given = inputs(gan, rng)
    step = FAST(lambda s, b, public: gan.train_step(ExactSeat(), (s, b), public)[0])
    secret = scaled(gan.secret(state), gan.scales)
    got = unscaled(step(secret, scaled(given, gan.batch_scales), gan.schedule(0)))
    after, _ = FAST(gan.program.run)(state, as_float64(given))
    largest = max(1, np.abs(flat(after.params) - flat(state.params)).max() / RATE)
    error = UPDATES * RELATIVE * RATE * largest
    np.testing.assert_allclose(flat(got.params), flat(after.params), rtol=0, atol=error)
    assert np.abs(flat(after.params) - flat(state.params)).max() > 20 * error


def test_images_of_a_class_are_kept_apart(gan):
    """The loss is of pairs, one of each half: what is missing in their mean squared difference."""
    lpgan, rng = gan.program.step.__self__, np.random.default_rng(6)
    images = rng.uniform(-1, 1, (5, 4, 4, 1)) * np.array([1, 0.1, 1, 0.1, 9])[:, None, None, None]
    apart = [((images[i] - images[i + 2]) ** 2).mean() for i in (0, 1)]
    assert apart[0] > APART > apart[1]
    np.testing.assert_allclose(lpgan._alike(jnp.asarray(images)), (APART - apart[1]) / 2, rtol=1e-6)


@pytest.mark.slow
def test_on_shares_it_is_plain_jax(gan):
    """An update is rounded by 1 LSB. A gradient sums up 16 pixels of at most 4 images, of products
    of two factors below 1 that are each off by an LSB, and the norm that is allowed has 12 bits.
    """
    rng = np.random.default_rng(3)
    state = as_float64(gan.program.init(rng))
    given = inputs(gan, rng)
    step = FAST(lambda key, secrets, public: simulate(gan.train_step, key, secrets, public)[0])
    secrets = (
        share_tree(lp.key(1), gan.secret(state), gan.scales),
        share_tree(lp.key(2), given, gan.batch_scales),
    )
    got = reveal_tree(step(lp.key(3), secrets, gan.schedule(0)))
    after, _ = gan.program.run(state, as_float64(given))
    error = UPDATES * (LSB * (1 + RATE * 16 * 4 * 2 * 4) + RATE * ROWS * CLIP * 2.0**-11 / 2.5)
    np.testing.assert_allclose(flat(got.params), flat(after.params), rtol=0, atol=error)


@pytest.mark.slow
def test_secure_and_plain_training_agree_in_distribution(gan):
    """100 runs of one step each, all random numbers of their own: data, noise, masks and rounding.

    Kolmogorov and Smirnov's test of two samples of 100, at a level of 0.001 (which is 1 in 100 for
    ten of them), finds normal distributions in 80 of 100 cases if their means are 0.7 standard
    deviations apart, and in 98 if they are 0.9.
    """
    runs, level = 100, 1e-3
    secure = FAST(lambda key, secrets, public: simulate(gan.train_step, key, secrets, public)[0])
    plain = FAST(gan.program.run)
    state = gan.program.init(np.random.default_rng(0))
    looked_at = np.random.default_rng(1).normal(size=(10, flat(state.params).size))
    found = {"secure": [], "plain": []}
    for _ in range(runs):
        secrets = (
            share_tree(lp.key(), gan.secret(state), gan.scales),
            share_tree(lp.key(), inputs(gan, np.random.default_rng()), gan.batch_scales),
        )
        after = reveal_tree(secure(lp.key(), secrets, gan.schedule(0)))
        found["secure"].append(looked_at @ (flat(after.params) - flat(state.params)))
        after, _ = plain(state, inputs(gan, np.random.default_rng()))
        found["plain"].append(looked_at @ (flat(after.params) - flat(state.params)))
    both = [np.array(found[name]).T for name in ("secure", "plain")]
    least = min(ks_2samp(a, b).pvalue for a, b in zip(*both, strict=True))
    print(f"smallest of 10 p-values: {least:.3f}")
    assert least > level
    # And it would see a mechanism whose mean is elsewhere.
    moved = both[1][0] + 1.2 * both[1][0].std()
    assert ks_2samp(both[0][0], moved).pvalue < level


def test_each_message_of_it_is_masked(gan):
    report = audit_program(*shapes.step_program(gan))
    assert report.problems == []
    assert all(opening.problems == [] for opening in report.openings)


def test_the_range_guard_sees_no_image(gan):
    """Of SD's layer, 2 x 2 pixels of two maps, it looks at generated images, which are fewer."""
    sizes = {of.size for of in gan.watched}
    assert UPDATES * GENERATED * 8 in sizes
    assert UPDATES * ROWS * 8 not in sizes


def test_a_discriminator_that_keeps_statistics_is_refused():
    private = PrivateUpdates(CLIP, UPDATES, 2.5, GENERATED)
    with pytest.raises(ValueError, match="discriminator: normalises over a batch, which mixes"):
        small_lpgan(SGD, depth=2, private=private).init(np.random.default_rng(0))


def test_labels_decide_what_is_generated(gan):
    """And SD's logits: each class has a bias of its own in each layer."""
    lpgan, rng = gan.program.step.__self__, np.random.default_rng(4)
    state = lpgan.init(rng)
    noise = np.repeat(rng.normal(size=(1, 4)), CLASSES, 0)
    each = {"noise": noise, "labels": np.eye(CLASSES, dtype=np.int32)}
    images = lpgan.generate(state.learnt()["generator"], each)
    assert np.abs(np.diff(images, axis=0)).max((1, 2, 3)).min() > 1e-3
    same = jnp.repeat(images[:1], CLASSES, 0)
    logits = lpgan.discriminator.apply(
        {"params": state.params["discriminator"]}, same, each["labels"]
    )
    assert len({round(float(v), 6) for v in logits[:, 0]}) == CLASSES
