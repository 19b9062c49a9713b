"""DS's keys are handed out once, in an order that the master key alone decides."""

import jax
import numpy as np
import pytest

import lpgan_jax as lp
from lpgan_jax.mpc.dealer_keys import DealerKeys


def words(key):
    return jax.random.key_data(key).tobytes()


def test_keys_never_repeat():
    keys = DealerKeys(lp.key(3))
    taken = [words(keys.take()) for _ in range(32)]
    taken += [words(key) for _ in range(16) for key in keys.take_two()]
    taken += [words(keys.for_state()), words(lp.key(3))]
    assert len(set(taken)) == len(taken)


def test_two_keys_are_the_next_two():
    first, second = DealerKeys(lp.key(3)), DealerKeys(lp.key(3))
    pair = [words(key) for key in first.take_two()]
    assert pair == [words(second.take()), words(second.take())]
    # Whether the state was split has no part in it: an attempt may go on from a checkpoint.
    second.for_state()
    np.testing.assert_array_equal(words(first.take()), words(second.take()))


def test_the_state_is_split_once():
    keys = DealerKeys(lp.key(3))
    keys.for_state()
    with pytest.raises(RuntimeError, match="split already"):
        keys.for_state()
