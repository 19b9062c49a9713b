"""Poisson sampling: how often, who with whom, and what does not fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from lpgan_jax.privacy.sampling import PoissonBatches

KEY = bytes(range(32))


@given(
    examples=st.integers(1, 300),
    rate=st.floats(1e-4, 1.0),
    size=st.integers(1, 300),
    step=st.integers(0, 2**40),
)
def test_a_batch_has_what_was_drawn_and_then_nothing(examples, rate, size, step):
    batches = PoissonBatches(examples, rate, size, KEY)
    rows, weights = batches.draw(step)
    assert rows.shape == weights.shape == (size,)
    count = int(weights.sum())
    assert (weights == (np.arange(size) < count)).all()
    drawn = rows[:count]
    assert (np.diff(drawn) > 0).all()
    assert ((rows >= 0) & (rows < examples)).all()
    assert (rows[count:] == 0).all()
    again = batches.draw(step)
    np.testing.assert_array_equal(rows, again[0])
    if rate == 1.0 and size >= examples:
        assert count == examples


@pytest.fixture(scope="module")
def memberships():
    """[step, example]: who was drawn."""
    batches, steps = PoissonBatches(50, 0.2, 50, KEY), 20_000
    found = np.zeros((steps, 50), bool)
    for step in range(steps):
        rows, weights = batches.draw(step)
        found[step, rows[weights > 0]] = True
    return found


def test_each_example_is_drawn_as_often_as_it_should(memberships):
    """False alarms: 1e-6 for all 50."""
    low, high = binom.ppf([1e-8, 1 - 1e-8], len(memberships), 0.2)
    counts = memberships.sum(0)
    assert ((low <= counts) & (counts <= high)).all()
    sizes = memberships.sum(1)
    # The variance of a binomial draw; that of batches of fixed size would be 0.
    assert abs(sizes.var() / (50 * 0.2 * 0.8) - 1) < 0.06  # six standard deviations


def test_examples_and_steps_are_independent(memberships):
    centred = (memberships - 0.2) / 0.4
    together = centred.T @ centred / len(centred)
    np.fill_diagonal(together, 0)
    assert np.abs(together).max() < 6 / np.sqrt(len(centred))
    following = (centred[1:] * centred[:-1]).mean(0)
    assert np.abs(following).max() < 6 / np.sqrt(len(centred))


def test_of_too_many_a_random_part_is_taken():
    """Each as likely as any other."""
    batches, steps = PoissonBatches(20, 0.9, 5, KEY), 20_000
    counts = np.zeros(20)
    for step in range(steps):
        rows, weights = batches.draw(step)
        assert weights.sum() == 5
        counts[rows] += 1
    low, high = binom.ppf([1e-8, 1 - 1e-8], steps, 0.25)
    assert ((low <= counts) & (counts <= high)).all()


def test_another_key_draws_others():
    first, other = (PoissonBatches(1000, 0.1, 200, key) for key in (KEY, KEY[::-1]))
    common = len(set(first.draw(0)[0]) & set(other.draw(0)[0]))
    assert common < 40  # of about 100, where 10 are expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_examples": 0}, "num_examples: 0, expected at least 1"),
        ({"sampling_rate": 1.01}, "sampling_rate: 1.01, expected above 0, at most 1"),
        ({"sampling_rate": float("nan")}, "sampling_rate: nan, expected above 0"),
        ({"batch_size": 0}, "batch_size: 0, expected at least 1"),
        ({"key": b"short"}, "key: 5 bytes, expected 32"),
    ],
)
def test_what_is_out_of_range_is_named(fields, message):
    good = {"num_examples": 10, "sampling_rate": 0.5, "batch_size": 5, "key": KEY}
    with pytest.raises(ValueError, match=message):
        PoissonBatches(**(good | fields))
    with pytest.raises(ValueError, match="step: -1 given"):
        PoissonBatches(**good).draw(-1)
