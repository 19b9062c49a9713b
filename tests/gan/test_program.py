"""LP-GAN under sharing is its plain JAX, in float64 and on shares.

Run in float64 (`ExactSeat`) the program differs from plain JAX by its series and public constants
alone, each within 2^-17 of the exact value (relative, at 18 fraction bits): slopes, and means over
counts that are no powers of two; tanh and the losses' slopes are within 2^-20, the inverse root
within 2^-24. A chain of up to four such factors gives `RELATIVE`, of gradients.
"""

import jax
import numpy as np
import optax
import pytest
from gans import SGD, adam, flat, random_batch, shared_batch, small_gan
from helpers import same_scale
from secured import FAST, as_float64

import lpgan_jax as lp
from lpgan_jax.gan import GENERATE, NETWORKS
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.share_trees import reveal_tree, scaled, share_tree, unscaled

LSB = 2.0**-18
RELATIVE = 4 * 2.0**-17
RATE, SLOW = 0.1, 1e-3  # slow with a gradient penalty, whose gradients are near 100
EPS = 1e-4

GANS = {
    "sgd": lambda: small_gan(SGD, batch_size=4),
    # Nothing is a power of two, the kernel and so its padding are uneven.
    "adam, odd": lambda: small_gan(
        adam(RATE, eps_root=EPS),
        batch_size=3,
        channels=3,
        noise_size=5,
        features=3,
        base_size=3,
        kernel_size=5,
        depth=1,
    ),
    "hinge": lambda: small_gan(SGD, loss="hinge", depth=1),
    "least squares": lambda: small_gan(SGD, loss="least_squares", depth=1, average=0.75),
    "wasserstein": lambda: small_gan(
        optax.sgd(SLOW), loss="wasserstein", of_sd={"norm": "group"}, opens_losses=False
    ),
}


@pytest.mark.parametrize("name", GANS)
def test_steps_in_float64_are_plain_jax(name):
    gan, rng = GANS[name](), np.random.default_rng(2)
    start = as_float64(gan.program.init(rng))
    state, secret = start, scaled(gan.secret(start), gan.scales)
    step = FAST(lambda state, batch, public: gan.train_step(ExactSeat(), (state, batch), public))
    plain, steps = FAST(gan.program.step), 2
    for number in range(steps):
        batch = random_batch(gan, rng)
        given = scaled(batch, same_scale(batch, gan.frac_bits))
        secret, losses = step(secret, given, gan.schedule(number))
        kept = state.average
        state, expected = plain(state, as_float64(batch))
        if kept:
            own = 0.75 * flat(kept) + 0.25 * flat(state.params["generator"])
            np.testing.assert_allclose(flat(state.average), own, rtol=1e-12)
            kept = state.learnt()["generator"]["params"]
            np.testing.assert_array_equal(flat(kept), flat(state.average))
    # SGD passes on the errors of gradients, of which the largest here has this size; Adam divides
    # them by sqrt(EPS) at worst, and takes 1 - b2 to 12 bits, an error that the root halves.
    before, after = flat(start.params), flat(state.params)
    rate = SLOW if name == "wasserstein" else RATE
    largest = max(1, np.abs(after - before).max() / rate)
    error = RELATIVE * rate * largest
    if name.startswith("adam"):
        error = RATE * (2.0**-13 + RELATIVE / EPS**0.5)
    got = unscaled(secret)
    np.testing.assert_allclose(flat(got.params), after, rtol=0, atol=steps * error)
    jax.tree.map(
        lambda own, of: np.testing.assert_allclose(own, of, rtol=0, atol=steps * error),
        got.average,
        state.average,
    )
    np.testing.assert_allclose(flat(got.stats), flat(state.stats), rtol=RELATIVE, atol=error)
    assert np.abs(after - before).max() > 20 * steps * error  # else the comparison says little
    for ours, theirs in zip(*map(jax.tree.leaves, (unscaled(losses), expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=RELATIVE, atol=50 * error)
    noise = batch.noise_d
    images = gan.answer(GENERATE)(ExactSeat(), (secret, scaled(noise, gan.frac_bits)), None)
    expected = gan.program.answers[GENERATE].function(state.learnt()["generator"], noise)
    np.testing.assert_allclose(unscaled(images), expected, rtol=0, atol=50 * error)


@pytest.mark.slow
def test_steps_on_shares_are_plain_jax():
    """The whole protocol with its roundings of one LSB.

    A step rounds an update by 1 LSB. A gradient is a sum over the 16 pixels at SD's first layer, of
    a real and a generated image, of products of two factors below 1, each with an error of 1 LSB,
    and twice as much after each of two normalisations (deviations are near 1/2): 2 * 16 * 2 * 4
    LSB, times the rate.
    """
    gan, rng, steps = small_gan(SGD, batch_size=4, init_std=0.2), np.random.default_rng(3), 2
    start = state = as_float64(gan.program.init(rng))
    shared = share_tree(lp.key(1), gan.secret(start), gan.scales)
    step = FAST(lambda key, secrets, public: simulate(gan.train_step, key, secrets, public))
    error = LSB * (1 + RATE * 2 * 16 * 2 * 4)
    for number in range(1, steps + 1):
        batch = random_batch(gan, rng)
        given = shared, shared_batch(gan, batch, 10 * number)
        shared, losses = step(lp.key(10 * number + 1), given, gan.schedule(number - 1))
        state, expected = gan.program.step(state, as_float64(batch))
        got = reveal_tree(shared)
        for ours, theirs in ((got.params, state.params), (got.stats, state.stats)):
            np.testing.assert_allclose(flat(ours), flat(theirs), rtol=0, atol=number * error)
        # Logits sum 16 features times weights near 1/5; softplus errs by 3 LSB, of 8 images.
        np.testing.assert_allclose(
            flat(reveal_tree(losses)),
            flat(expected),
            rtol=0,
            atol=8 * (3 * LSB + 16 / 5 * number * error),
        )
    assert np.abs(flat(state.params) - flat(start.params)).max() > 20 * steps * error


def test_a_state_has_no_counters_and_the_schedule_has_them():
    """Adam's bias corrections are public; what servers know of a step follows from its number."""
    gan = small_gan({"generator": SGD, "discriminator": adam()}, depth=1)
    state = gan.init(np.random.default_rng(0))
    counters = [state.optimizer["discriminator"][0].count, gan.scales.optimizer["discriminator"]]
    assert counters[0] is None
    assert counters[1][0].count is None
    assert jax.tree.map(np.shape, state) == jax.tree.map(lambda v: v.shape, gan.shapes)
    first, third = (np.concatenate(list(map(np.ravel, gan.schedule(s)))) for s in (0, 2))
    assert first.size
    assert np.any(first != third)
    again = [np.concatenate(list(map(np.ravel, gan.schedule(s)))) for s in (0, 2)]
    np.testing.assert_array_equal(again, [first, third])  # in any order
    # Everything but the counters is shared.
    whole = gan.program.init(np.random.default_rng(0))
    assert len(jax.tree.leaves(whole)) == len(jax.tree.leaves(state)) + 1


def test_sgd_has_nothing_public():
    gan = small_gan(depth=1)
    assert (gan.schedule(0), gan.schedule(5)) == ([0], [5])  # but the number of the step
    assert all(
        gan.scales.optimizer[n] == gan.init(np.random.default_rng(0)).optimizer[n] for n in NETWORKS
    )
