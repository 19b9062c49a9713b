"""A Python function that compiled programs call."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpgan_jax.native import host_call

_names = (f"test_host_call_{number}" for number in itertools.count())


def called(handler, results, *operands):
    name = next(_names)
    host_call.register(name, handler)
    call = jax.ffi.ffi_call(name, results)
    return jax.jit(lambda *operands: call(*operands))(*operands)


def test_it_works_here():
    assert host_call.works()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.float32])
def test_buffers_are_handed_over_as_they_are(dtype):
    rng = np.random.default_rng(0)
    operands = [rng.integers(0, 100, shape).astype(dtype) for shape in [(), (3, 5), (0, 4), (7,)]]

    def reverse(given, results):
        assert [bytes(view) for view in given] == [x.tobytes() for x in operands]
        for view, result in zip(reversed(given), results, strict=True):
            result[:] = view

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in reversed(operands)]
    for result, operand in zip(called(reverse, shapes, *operands), reversed(operands), strict=True):
        np.testing.assert_array_equal(result, operand)


def test_errors_come_out_with_their_text_and_the_process_goes_on():
    def fail(given, results):
        raise ConnectionError("step 7, round 3 of 9: gone – really")

    shape = jax.ShapeDtypeStruct((), jnp.uint32)
    for _ in range(3):
        with pytest.raises(jax.errors.JaxRuntimeError, match="round 3 of 9: gone – really"):
            jax.block_until_ready(called(fail, shape, np.uint32(1)))
    assert jnp.arange(3).sum() == 3


def test_a_name_is_taken_once():
    host_call.register("test_host_call_twice", lambda given, results: None)
    with pytest.raises(ValueError, match="test_host_call_twice: registered already"):
        host_call.register("test_host_call_twice", lambda given, results: None)
