"""Shadow mode, and training in the clear, do what secure training does.

Statistical tests have fixed seeds; their level is 10^-6 each, so that a false alarm at another seed
is not to be expected.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from gans import adam, flat, random_batch, shared_batch, small_gan
from helpers import same_scale
from secured import FAST
from uniformity import two_samples

from lpgan_jax import key
from lpgan_jax.gan import GENERATE
from lpgan_jax.mpc import emulated
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.share_trees import decoded, encoded, reveal_tree, share_tree
from lpgan_jax.study.sweep.cells import _moved
from lpgan_jax.training import trainers
from lpgan_jax.training.trainers import PlaintextTrainer, ShadowTrainer

LEVEL = 1e-6


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    with pytest.MonkeyPatch.context() as patch:
        quickly = {"xla_backend_optimization_level": "0"}
        patch.setattr(trainers, "options_to_run_often", lambda: quickly)
        yield


@pytest.fixture(scope="module")
def training():
    """(gan, initial state, batch): large steps, so that roundings and failures show."""
    gan = small_gan(optax.flatten(optax.sgd(0.5, momentum=0.5)), batch_size=4, depth=1, base_size=4)
    rng = np.random.default_rng(5)
    return gan, gan.program.init(rng), random_batch(gan, rng)


def after_a_step(trainer, batch):
    trainer.step(0, batch)
    return flat(trainer.state().params)


@pytest.fixture(scope="module")
def stochastic(training):
    gan, initial, batch = training
    return [after_a_step(ShadowTrainer(gan, initial, key(seed)), batch) for seed in (1, 2)]


def test_the_key_decides_everything(training, stochastic):
    gan, initial, batch = training
    first, other = stochastic
    np.testing.assert_array_equal(first, after_a_step(ShadowTrainer(gan, initial, key(1)), batch))
    assert np.any(first != other)


@pytest.mark.parametrize("rounding", ["nearest", "local"])
def test_other_roundings_train_too(training, stochastic, rounding):
    """They land some LSB away: the values here are too small for local truncation to fail."""
    gan, initial, batch = training
    first, second = stochastic
    usual = np.sqrt(np.mean((first - second) ** 2))  # how much rounding itself moves
    got = after_a_step(ShadowTrainer(gan, initial, key(1), rounding), batch)
    assert 0 < np.sqrt(np.mean((first - got) ** 2)) < 2 * usual


def test_a_float_run_can_be_moved_by_an_lsb_a_step(training):
    """The control of a fidelity study: evenly up to the perturbation, and repeatable."""
    gan, initial, batch = training

    def after(by, seed):
        moving = functools.partial(_moved, by, seed)
        return after_a_step(PlaintextTrainer(gan.program, initial, np.float64, moving), batch)

    moves = (0.0, 1), (2.0**-18, 1), (2.0**-18, 1), (2.0**-18, 2)
    still, moved, same, other = (after(*move) for move in moves)
    np.testing.assert_array_equal(moved, same)
    assert np.all(moved != other)
    by = (moved - still) * 2**18
    assert np.abs(by).max() <= 1
    # Uniform on [-1, 1]: standard deviation 1/sqrt(3), 6 standard errors of it.
    assert abs(by.std() - 3**-0.5) < 6 * 0.26 / np.sqrt(by.size)
    assert abs(by.mean()) < 6 * 3**-0.5 / np.sqrt(by.size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_training_in_the_clear_stays_in_its_dtype(training, dtype):
    gan, initial, batch = training
    trainer = PlaintextTrainer(gan.program, initial, dtype=dtype)
    trainer.step(0, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.state())} == {np.dtype(dtype)}
    assert trainer.answer(GENERATE, batch.noise_d).dtype == dtype


@pytest.mark.slow
def test_a_step_has_the_protocols_distribution():
    """How far each parameter lies from the mean over runs: two-sample KS at level 10^-6.

    16 runs of each; parameters by themselves are discrete, so all of them together are compared.
    """
    gan, rng = small_gan(adam(), batch_size=4), np.random.default_rng(5)
    initial, batch = gan.program.init(rng), random_batch(gan, rng)
    public = gan.schedule(0)
    secret = gan.secret(initial)

    @FAST
    def secure(ds_key, state, batch, public):
        return simulate(gan.train_step, ds_key, (state, batch), public)[0]

    @FAST
    def shadowed(ds_key, state, batch, public):
        return emulated.run(gan.train_step, ds_key, (state, batch), public)[0]

    shares, words = share_tree(key(0), secret, gan.scales), encoded(secret, gan.scales)
    whole = encoded(batch, same_scale(batch, gan.frac_bits))
    runs = range(16)
    given = [shared_batch(gan, batch, 100 + i) for i in runs]
    ours = [reveal_tree(secure(key(i), shares, given[i], public)) for i in runs]
    theirs = [decoded(shadowed(key(50 + i), words, whole, public)) for i in runs]
    first, second = (np.stack([flat(state.params) for state in of]) for of in (ours, theirs))
    assert np.abs(first - flat(initial.params)).max() > 100 * 2.0**-18  # something happened
    centre = np.concatenate([first, second]).mean(0)
    statistic, limit = two_samples(first - centre, second - centre, LEVEL)
    assert statistic < limit
    # Each parameter's mean agrees too: Student's t of 30 degrees of freedom passes 9 once in 10^9.
    spread = np.sqrt(first.var(0, ddof=1) / 16 + second.var(0, ddof=1) / 16)
    assert np.all(np.abs(first.mean(0) - second.mean(0)) <= 9 * spread)
