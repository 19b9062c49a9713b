"""S1's places for corrections take no memory."""

from pathlib import Path

import jax
import numpy as np
import pytest

from lpgan_jax.cluster.servers import unwritten

STATUS = Path("/proc/self/statm")


def resident():
    return int(STATUS.read_text().split()[1]) * 4096


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc")
def test_zeros_take_no_memory_read_or_not():
    shapes = [
        jax.ShapeDtypeStruct((2, 2**24), np.uint64),
        jax.ShapeDtypeStruct((2**24,), np.uint32),
    ]
    before = resident()
    first, second = jax.block_until_ready(unwritten(shapes))
    assert not np.asarray(first).any()  # looks at all of it, at where it is
    assert not np.asarray(second).any()
    assert (first.shape, second.dtype) == ((2, 2**24), np.uint32)
    assert resident() - before < 2**26  # of 2**28 bytes, and 2**26 more


def test_of_nothing_there_is_nothing():
    assert unwritten([]) == []
    (empty,) = unwritten([jax.ShapeDtypeStruct((0, 3), np.uint64)])
    assert empty.shape == (0, 3)
