"""The order of examples: every one once an epoch, repeatable, and the same for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpgan_jax.programs.batches import Batches, shuffled


@given(st.integers(1, 60), st.data(), st.integers(0, 2**70), st.integers(0, 1000))
def test_batches(num_examples, data, seed, epoch):
    batch_size = data.draw(st.integers(1, num_examples))
    batches = Batches(num_examples, batch_size, seed)
    assert batches.per_epoch == num_examples // batch_size
    steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
    taken = [batches.indices(step) for step in steps]
    assert all(one.shape == (batch_size,) and one.dtype == np.int64 for one in taken)
    flat = np.concatenate(taken).tolist()
    assert len(set(flat)) == len(flat)  # without replacement
    assert set(flat) <= set(range(num_examples))
    # A resumed run is a new object that starts anywhere, and nobody can spoil the order.
    taken[0][:] = 0
    resumed = Batches(num_examples, batch_size, seed)
    for step, one in list(zip(steps, taken, strict=True))[:0:-1]:
        np.testing.assert_array_equal(resumed.indices(step), one)
    np.testing.assert_array_equal(batches.indices(steps[0]), resumed.indices(steps[0]))


def test_epochs_and_seeds_differ():
    orders = [Batches(100, 100, seed).indices(step) for seed in (0, 1, 2**32) for step in range(4)]
    assert len({tuple(order) for order in orders}) == len(orders)
    firsts = np.array([Batches(10, 10, 0).indices(step)[0] for step in range(2000)])
    counts = np.bincount(firsts, minlength=10)
    assert counts.min() > 140  # 200 expected each, standard deviation 13
    assert counts.max() < 260


def test_the_order_never_changes():
    """A run may be resumed under another version of NumPy or of this package."""
    assert Batches(8, 4, 3).indices(5).tolist() == [2, 7, 4, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 0), "batch_size: 11 given, expected 1 to 10, the number of examples"),
        ((10, 0, 0), "batch_size: 0 given"),
        ((0, 1, 0), "batch_size: 1 given"),
        ((10, 5, -1), "seed: -1 given"),
    ],
)
def test_bad_batches(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(*arguments)


def test_negative_step():
    with pytest.raises(ValueError, match="step: -1 given"):
        Batches(10, 5, 0).indices(-1)


def test_shuffled_rows_are_of_one_order():
    arrays = {"x": np.arange(10), "y": np.arange(10)[:, None] + 100}
    draw = shuffled(arrays, 4, seed=3)
    for turn in (0, 1, 5):
        batch = draw(turn)
        np.testing.assert_array_equal(batch["x"], Batches(10, 4, 3).indices(turn))
        np.testing.assert_array_equal(batch["y"], batch["x"][:, None] + 100)


def test_rows_of_several_lengths_are_refused():
    with pytest.raises(ValueError, match=r"arrays: expected one length, got \[3, 4\]"):
        shuffled((np.zeros(3), np.zeros(4)), 2, seed=0)
