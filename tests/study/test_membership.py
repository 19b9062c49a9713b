"""Attacks on membership, against loops, known distributions, and what epsilon allows."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from lpgan_jax.study.membership import (
    advantage_bound,
    area_bound,
    attack,
    least_epsilon,
    nearness,
)

RNG = np.random.default_rng(5)


def test_an_attack_is_the_loops():
    members, others = RNG.integers(0, 6, 40).astype(float), RNG.integers(0, 6, 30).astype(float)
    found = attack("x", members, others)
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert found.area == pytest.approx(np.mean(pairs))
    wanted = max(np.mean(members >= t) - np.mean(others >= t) for t in range(7))
    assert found.advantage == pytest.approx(wanted)
    assert found.members == 30


def test_an_attack_on_known_distributions():
    """Normal scores whose means differ by d: area and advantage are those of normal tails."""
    d, count = 1.0, 20_000
    found = attack("x", RNG.normal(d, 1, count), RNG.normal(0, 1, count))
    assert abs(found.area - norm.cdf(d / math.sqrt(2))) < 5 * 0.5 / math.sqrt(count)
    assert abs(found.advantage - (2 * norm.cdf(d / 2) - 1)) < found.error < 0.03
    chance = attack("x", RNG.normal(size=count), RNG.normal(size=count))
    assert chance.advantage < chance.error


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-5), (1.0, 0.01), (10.0, 1e-5)])
def test_bounds_are_the_best_of_all_thresholds(epsilon, delta):
    """Of the region that (epsilon, delta) allows, point by point."""
    x = np.linspace(0, 1, 200_001)
    y = np.minimum(np.exp(epsilon) * x + delta, 1 - np.exp(-epsilon) * (1 - delta - x))
    y = np.clip(y, 0, 1)
    assert advantage_bound(epsilon, delta) == pytest.approx((y - x).max(), abs=1e-4)
    assert area_bound(epsilon, delta) == pytest.approx(y.mean(), abs=1e-4)


def test_randomised_response_shows_its_epsilon_and_no_more():
    """A bit that is true with probability e^eps / (1 + e^eps) spends epsilon, and the attack on it
    shows nearly as much; of 40 trials at 95 % more than 6 that show more are chance at 1 in 100.
    """
    epsilon, count, more = 1.0, 4000, 0
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    found = []
    for _ in range(40):
        members = (RNG.uniform(size=count) < truth).astype(float)
        others = (RNG.uniform(size=count) > truth).astype(float)
        found.append(least_epsilon(members, others, 0.0))
        more += found[-1] > epsilon
    assert more <= 6
    assert 0.7 < np.median(found) <= 1.0
    assert least_epsilon(RNG.normal(size=200), RNG.normal(size=200), 0.0) < 0.8


def test_the_nearest_image_counts():
    images, generated = RNG.normal(size=(7, 3, 3, 1)), RNG.normal(size=(300, 3, 3, 1))
    wanted = [-min(((a - b) ** 2).sum() for b in generated) for a in images]
    np.testing.assert_allclose(nearness(images, generated), wanted, rtol=1e-4)


def test_bad_scores():
    with pytest.raises(ValueError, match="others: expected finite scores"):
        attack("x", np.ones(3), np.array([np.nan]))
