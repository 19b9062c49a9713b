"""Accounting, against dp-accounting called directly, published settings, and the exact Gaussian."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from lpgan_jax.privacy.accounting import Mechanism, default_rate, noise_for

DELTA = 1e-5
NEIGHBOURS = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
MNIST = 60_000


def poisson(rate, noise):
    """Without a limit on a batch."""
    return Mechanism(MNIST, rate, MNIST, noise)


def test_published_settings():
    """Abadi et al. (2016), section 5: moments accountant 1.26; and, at a large rate, the 2.92 of
    the older accountant of Renyi divergences, as TensorFlow Privacy's tutorial had it.
    """
    abadi = poisson(0.01, 4.0).epsilon(10_000, DELTA)
    assert 0.90 < abadi <= 1.26
    assert abadi == pytest.approx(0.947, abs=0.002)
    # A sampling rate of a quarter, by the other accountant, whose bound is never lower.
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(8.0)), 500
    )
    other = rdp.RdpAccountant(neighboring_relation=NEIGHBOURS)
    other.compose(event)
    own = poisson(0.25, 8.0).epsilon(500, DELTA)
    assert 0.7 * other.get_epsilon(DELTA) < own <= other.get_epsilon(DELTA)


@pytest.mark.parametrize(
    ("rate", "noise", "updates"), [(0.01, 1.1, 600), (0.001, 0.6, 10_000), (0.5, 20.0, 100)]
)
def test_as_dp_accounting_says(rate, noise, updates):
    gaussian = dp_accounting.GaussianDpEvent(noise)
    accountant = pld.PLDAccountant(NEIGHBOURS)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), updates)
    assert poisson(rate, noise).epsilon(updates, DELTA) == accountant.get_epsilon(DELTA)


def test_the_exact_gaussian_without_sampling():
    """Balle and Wang (2018): delta of one Gaussian, exactly."""
    noise = 1.5
    epsilon = poisson(1.0, noise).epsilon(1, DELTA)

    def delta(eps):
        half, shift = 1 / (2 * noise), eps * noise
        return norm.cdf(half - shift) - math.exp(eps) * norm.cdf(-half - shift)

    assert delta(epsilon) <= DELTA
    assert delta(epsilon - 1e-3) > DELTA


@settings(deadline=None, max_examples=6)
@given(
    rate=st.floats(1e-3, 0.3),
    noise=st.floats(0.7, 5.0),
    updates=st.integers(1, 500),
    more=st.floats(1.05, 2.0),
)
def test_what_costs_more(rate, noise, updates, more):
    """More updates, a higher rate, less noise, a smaller delta."""
    epsilon = poisson(rate, noise).epsilon(updates, DELTA)
    assert poisson(rate, noise).epsilon(math.ceil(updates * more), DELTA) >= epsilon
    assert poisson(min(1.0, rate * more), noise).epsilon(updates, DELTA) >= epsilon
    assert poisson(rate, noise * more).epsilon(updates, DELTA) <= epsilon
    assert poisson(rate, noise).epsilon(updates, DELTA / 10) >= epsilon
    assert poisson(rate, noise).epsilon(0, DELTA) == 0


def test_a_draw_larger_than_the_batch_is_accounted_for():
    """It costs what it takes of delta, and is refused where that is more than a tenth of it."""
    rate = default_rate(MNIST, 256)
    mean = rate * MNIST
    assert mean + 9 * math.sqrt(mean) == pytest.approx(256)
    cut = Mechanism(MNIST, rate, 256, 1.0)
    drawn = np.random.default_rng(0).binomial(MNIST, rate, 10**6)
    assert (drawn <= 256).all()
    assert 0 < cut.too_large < 1e-12
    free = poisson(rate, 1.0)
    assert cut.epsilon(1000, DELTA) == pytest.approx(free.epsilon(1000, DELTA), rel=1e-6)
    some = Mechanism(MNIST, rate, 228, 1.0)  # of 147 on average
    spent = some.epsilon(1000, DELTA)
    kept = (1 + math.exp(spent)) * 1000 * some.too_large
    assert 0.01 * DELTA < kept < 0.1 * DELTA
    assert free.epsilon(1000, DELTA) < spent <= free.epsilon(1000, 0.9 * DELTA)
    assert spent >= free.epsilon(1000, DELTA - kept)
    message = "batch_size: 180 rows, and a draw has more with probability .*, too often"
    with pytest.raises(ValueError, match=message):
        Mechanism(MNIST, rate, 180, 1.0).epsilon(1000, DELTA)
    # Just so much that a larger epsilon makes it too much.
    edge = Mechanism(MNIST, rate, 235, 1.0)
    assert edge.epsilon(10, DELTA) < 1
    with pytest.raises(ValueError, match="too often for delta"):
        edge.epsilon(10**6, DELTA)


def test_the_least_noise():
    setting = {"examples": MNIST, "sampling_rate": default_rate(MNIST, 256), "batch_size": 256}
    for epsilon in (1.0, 4.0):
        noise = noise_for(epsilon, DELTA, 2000, **setting)
        assert Mechanism(noise_multiplier=noise, **setting).epsilon(2000, DELTA) <= epsilon
        less = Mechanism(noise_multiplier=noise - 0.001, **setting)
        assert less.epsilon(2000, DELTA) > epsilon


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mechanism(10, 1.5, 5, 1.0), "sampling_rate: 1.5, expected above 0, at most 1"),
        (lambda: Mechanism(10, 0.0, 5, 1.0), "sampling_rate: 0, expected above 0"),
        (lambda: Mechanism(10, 0.5, 5, 0.0), "noise_multiplier: 0, expected above 0"),
        (lambda: Mechanism(10, 0.5, 0, 1.0), "batch_size: 0, expected at least 1"),
        (lambda: Mechanism(0, 0.5, 1, 1.0), "examples: 0, expected at least 1"),
        (lambda: poisson(0.5, 1.0).epsilon(3, 1.0), "delta: 1, expected between 0 and 1"),
        (lambda: default_rate(10, 11), "batch_size: 11, expected at most the 10 examples"),
    ],
)
def test_a_number_out_of_range_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
