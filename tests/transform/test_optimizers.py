"""What optimizers keep from step to step on shares: many steps of optax's, against float64."""

import numpy as np
import optax
from gans import adam
from secured import FAST, LSB

import lpgan_jax as lp

STEPS = 20


def after_steps(optimizer, gradients):
    """(on shares, in float64): parameters, from 0, after all steps."""

    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = np.zeros(gradients.shape[1:])
    state = plain = params, optimizer.init(params)
    secure = lp.secure(step, carry={0: 0, 1: 1})
    run = FAST(secure)
    for number, gradient in enumerate(gradients):
        *state, given = secure.share(lp.key(2 * number), *state, gradient)
        state = run(lp.key(2 * number + 1), *state, given)
        plain = step(*plain, gradient)
    assert run._cache_size() == 1  # what changes with the step is an argument
    return np.asarray(lp.reveal(state[0])), np.asarray(plain[0])


def test_sgd_keeps_updates_below_an_lsb():
    """On average: a quarter of an LSB moves a quarter of the parameters. 6 standard errors."""
    count = 2**12
    gradients = np.full((STEPS, count), 2.0 * LSB)
    got, expected = after_steps(optax.sgd(0.125), gradients)
    np.testing.assert_allclose(expected, -STEPS * LSB / 4)
    moved = (got - expected) / LSB
    assert np.abs(moved).max() < STEPS  # each step rounds to a neighbour
    assert abs(moved.mean()) < 6 * np.sqrt(STEPS * 0.25 * 0.75 / count)


def test_adam_over_many_steps():
    """Gradients of all sizes from 2^-8 to 2^7, of either and of changing sign, and 0.

    A step rounds an update by 1 LSB. Of a gradient of 2^-8 the moments (26 and 42 fraction bits)
    are within 2^-17 relatively, and 1 - b2 has 12 bits, an error that the root halves.
    """
    rate, rng = 2.0**-7, np.random.default_rng(0)
    sizes = 2.0 ** np.array([-8, -6, -4, -2, 0, 2, 5, 7])
    constant = np.concatenate([sizes, -sizes])
    gradients = np.stack(
        [
            np.concatenate([constant, constant * (-1) ** n, constant * rng.choice([-1, 1]), [0, 0]])
            for n in range(STEPS)
        ]
    )
    got, expected = after_steps(adam(rate, b1=0.5, b2=0.999, eps_root=1e-8), gradients)
    bound = STEPS * (LSB + rate * 2.0**-12)
    assert np.abs(got - expected).max() < bound
    assert np.abs(expected).max() > 0.9 * STEPS * rate > 50 * bound
    assert np.all(got[gradients[0] == 0] == 0)


def test_momentum_over_many_steps():
    """The trace has 42 fraction bits; a step rounds an update by 1 LSB, the rate has 16 bits."""
    rng = np.random.default_rng(1)
    gradients = np.rint(rng.normal(size=(STEPS, 50)) / LSB) * LSB
    got, expected = after_steps(optax.sgd(0.03, momentum=0.9), gradients)
    bound = STEPS * LSB + 2.0**-16 * STEPS * np.abs(expected).max()
    assert np.abs(got - expected).max() < bound
    assert np.abs(expected).max() > 100 * bound
