"""The discrete Gaussian: its distribution, and where float64 leaves a coin open."""

from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import chi2

from lpgan_jax.privacy import noise
from lpgan_jax.privacy.noise import Stream, discrete_gaussian

SEED = bytes(range(32))


def probabilities(sigma, bound):
    """Of the integers from -bound to bound."""
    x = np.arange(-bound, bound + 1)
    weights = np.exp(-(x**2) / (2 * sigma**2))
    return x, weights / weights.sum()


def statistic(values, sigma, bins):
    """Chi-square against the exact distribution, and its degrees of freedom."""
    x, p = probabilities(sigma, 12 * sigma)
    edges = np.linspace(-5 * sigma, 5 * sigma, bins).round().astype(int)
    expected = np.add.reduceat(p, np.searchsorted(x, edges)) * len(values)
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    below = len(values) - expected.sum()
    expected = np.concatenate([[below], expected])
    return ((counts - expected) ** 2 / expected).sum(), len(expected) - 1


def test_ten_million_values_have_its_distribution():
    """False alarms: 1e-6; a standard deviation that is larger by 0.3 % is seen."""
    sigma = 2**18
    values = discrete_gaussian(Stream(SEED), sigma, 10**7)
    found, freedom = statistic(values, sigma, 101)
    assert found < chi2.isf(1e-6, freedom)
    wider = np.round(values * 1.003).astype(np.int64)
    assert statistic(wider, sigma, 101)[0] > chi2.isf(1e-6, freedom)


@pytest.mark.parametrize("sigma", [1, 3])
def test_small_noise_has_its_distribution(sigma):
    """Each integer by itself, where a rounded Gaussian would have another."""
    values = discrete_gaussian(Stream(SEED), sigma, 10**6)
    found, freedom = statistic(values, sigma, 10 * sigma + 1)
    assert found < chi2.isf(1e-6, freedom)
    rounded = np.random.default_rng(0).normal(0, sigma, 10**6).round().astype(np.int64)
    assert sigma > 1 or statistic(rounded, sigma, 11)[0] > chi2.isf(1e-6, freedom)


def test_neighbours_are_independent():
    values = discrete_gaussian(Stream(SEED), 1000, 10**6) / 1000
    for lag in (1, 2, 64):
        # Of 1e6 values, five standard deviations.
        assert abs(np.mean(values[lag:] * values[:-lag])) < 5e-3


def test_a_seed_gives_the_same_and_another_seed_none_of_it():
    first = discrete_gaussian(Stream(SEED), 2**18, 1000)
    np.testing.assert_array_equal(first, discrete_gaussian(Stream(SEED), 2**18, 1000))
    other = discrete_gaussian(Stream(SEED[::-1]), 2**18, 1000)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.2
    assert (first != other).mean() > 0.99


def test_close_coins_are_decided_exactly(monkeypatch):
    """With nothing left to float64, the values have the same distribution."""
    monkeypatch.setattr(noise, "_CLOSE", 2.0)
    values = discrete_gaussian(Stream(SEED), 3, 20_000)
    found, freedom = statistic(values, 3, 15)
    assert found < chi2.isf(1e-6, freedom)


class Fixed:
    """A stream of given words."""

    def __init__(self, *words):
        self._words = list(words)

    def words(self, count):
        taken, self._words = self._words[:count], self._words[count:]
        return np.array(taken, np.uint64)


def test_a_coin_takes_as_many_bits_as_it_needs():
    third = Fraction(1, 3)
    word = int(third * 2**64)  # the first 64 bits of a third
    assert noise._is_below(Fixed(), word - 1, third)
    assert not noise._is_below(Fixed(), word + 1, third)
    assert noise._is_below(Fixed(word - 1), word, third)
    assert not noise._is_below(Fixed(word, word + 1), word, third)
    assert noise._is_below(Fixed(), 2**64 - 1, Fraction(1))
    assert not noise._is_below(Fixed(), 0, Fraction(0))


def test_words_are_those_of_rfc_8439():
    """Section 2.4.2's key stream has another nonce; of zeros it is appendix A.1's first vector."""
    stream = Stream(bytes(32)).words(8).tobytes()
    assert stream.hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )


@pytest.mark.parametrize("sigma", [0, 2**40 + 1])
def test_a_sigma_out_of_range_is_refused(sigma):
    with pytest.raises(ValueError, match=r"sigma: .* LSB, expected 1 to 2\^40"):
        discrete_gaussian(Stream(SEED), sigma, 1)


def test_a_short_seed_is_refused():
    with pytest.raises(ValueError, match="seed: 31 bytes, expected 32"):
        Stream(SEED[1:])
