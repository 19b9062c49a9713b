"""Convolutions modulo 2^bits against plain loops over Python integers, and against jax.lax."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpgan_jax.ring import Conv2D, patches

# strides, padding, input size, kernel size: odd sizes, borders the stride does not reach, padding
# on one side, strides longer than the kernel.
GEOMETRIES = [
    ((2, 2), ((1, 1), (1, 1)), (6, 6), (4, 4)),
    ((1, 1), ((0, 0), (0, 0)), (3, 4), (2, 3)),
    ((1, 2), ((2, 0), (0, 1)), (5, 7), (3, 2)),
    ((3, 2), ((1, 0), (1, 2)), (7, 5), (2, 3)),
    ((3, 3), ((0, 0), (0, 0)), (8, 5), (1, 2)),
    ((2, 3), ((0, 3), (1, 1)), (1, 2), (4, 3)),
]
IDS = [str(g) for g in GEOMETRIES]
geometries = pytest.mark.parametrize(
    ("strides", "padding", "input_hw", "kernel_hw"), GEOMETRIES, ids=IDS
)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def words(seed, shape, dtype=np.uint64):
    """Uniform words, every other one within 2 of 0, half the ring or its end."""
    rng, bits = np.random.default_rng(seed), 8 * np.dtype(dtype).itemsize
    edges = [0, 1, 2, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 2, 2**bits - 1]
    uniform = rng.integers(0, 2**bits, shape, dtype)
    return np.where(rng.integers(0, 2, shape), rng.choice(np.array(edges, dtype), shape), uniform)


def taps(conv, input_hw, kernel_hw):
    """Every (output pixel, kernel pixel, input pixel) that meet."""
    output_hw = conv.output_hw(input_hw, kernel_hw)
    for out in np.ndindex(*output_hw):
        for tap in np.ndindex(*kernel_hw):
            pixel = tuple(
                o * s + t - p[0]
                for o, s, t, p in zip(out, conv.strides, tap, conv.padding, strict=True)
            )
            if all(0 <= i < n for i, n in zip(pixel, input_hw, strict=True)):
                yield out, tap, pixel


def plain(conv, x, w, dy):
    """Convolution and its two gradients, in Python integers."""
    bits = 8 * x.dtype.itemsize
    xs, ws, dys = (v.astype(object) for v in (x, w, dy))
    y, dx, dw = (np.zeros_like(v) for v in (dys, xs, ws))
    for (a, b), (c, d), (i, j) in taps(conv, x.shape[1:3], w.shape[:2]):
        y[:, a, b] += xs[:, i, j] @ ws[c, d]
        dx[:, i, j] += dys[:, a, b] @ ws[c, d].T
        dw[c, d] += xs[:, i, j].T @ dys[:, a, b]
    return [(v % 2**bits).astype(x.dtype) for v in (y, dx, dw)]


def operands(conv, input_hw, kernel_hw, dtype=np.uint64, images=2, channels=3, features=2):
    x = words(1, (images, *input_hw, channels), dtype)
    w = words(2, (*kernel_hw, channels, features), dtype)
    dy = words(3, (images, *conv.output_hw(input_hw, kernel_hw), features), dtype)
    return x, w, dy


def check(conv, x, w, dy):
    y, dx, dw = plain(conv, x, w, dy)
    np.testing.assert_array_equal(jax.jit(conv.forward)(x, w), y)
    np.testing.assert_array_equal(
        jax.jit(conv.input_grad, static_argnums=2)(dy, w, x.shape[1:3]), dx
    )
    np.testing.assert_array_equal(
        jax.jit(conv.weight_grad, static_argnums=2)(x, dy, w.shape[:2]), dw
    )


@geometries
def test_exact(strides, padding, input_hw, kernel_hw):
    conv = Conv2D(strides, padding)
    check(conv, *operands(conv, input_hw, kernel_hw))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_smaller_rings(dtype):
    conv = Conv2D()
    check(conv, *operands(conv, (5, 6), (4, 4), dtype))


def test_products_beyond_the_tiny():
    conv = Conv2D()
    check(conv, *operands(conv, (9, 8), (4, 4), images=3, channels=8, features=16))


@geometries
def test_against_lax_and_its_vjp(strides, padding, input_hw, kernel_hw):
    conv, rng = Conv2D(strides, padding), np.random.default_rng(4)
    x, w, dy = (rng.integers(-99, 100, v.shape) for v in operands(conv, input_hw, kernel_hw))

    def float_conv(x, w):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=dimensions)

    y, vjp = jax.vjp(float_conv, x.astype(np.float64), w.astype(np.float64))
    dx, dw = vjp(dy.astype(np.float64))
    x, w, dy = (v.astype(np.uint64) for v in (x, w, dy))
    results = (
        conv.forward(x, w),
        conv.input_grad(dy, w, input_hw),
        conv.weight_grad(x, dy, kernel_hw),
    )
    for result, expected in zip(results, (y, dx, dw), strict=True):
        np.testing.assert_array_equal(result.astype(np.int64), expected)


@geometries
def test_deconvolution_size_is_the_least_that_convolves_back(strides, padding, input_hw, kernel_hw):
    conv = Conv2D(strides, padding)
    small = conv.output_hw(input_hw, kernel_hw)
    try:
        large = conv.deconv_hw(small, kernel_hw)
    except ValueError:
        return  # all padding: covered by test_refused
    assert conv.output_hw(large, kernel_hw) == small
    assert all(n <= m for n, m in zip(large, input_hw, strict=True))


def test_deconvolution_of_the_generator():
    conv = Conv2D()
    assert conv.deconv_hw((4, 4), (4, 4)) == (8, 8)
    x, w = words(5, (1, 4, 4, 3)), words(6, (4, 4, 2, 3))
    y = conv.input_grad(x, w, conv.deconv_hw((4, 4), (4, 4)))
    np.testing.assert_array_equal(y, plain(conv, words(7, (1, 8, 8, 2)), w, x)[1])


@geometries
def test_patches(strides, padding, input_hw, kernel_hw):
    conv = Conv2D(strides, padding)
    x = words(8, (2, *input_hw, 3))
    expected = np.zeros((2, *conv.output_hw(input_hw, kernel_hw), *kernel_hw, 3), np.uint64)
    for (a, b), (c, d), (i, j) in taps(conv, input_hw, kernel_hw):
        expected[:, a, b, c, d] = x[:, i, j]
    result = patches(x, kernel_hw, conv)
    np.testing.assert_array_equal(result, expected.reshape(result.shape))
    # Transposed, it is the input gradient by a kernel that copies the patches.
    size = kernel_hw[0] * kernel_hw[1] * 3
    copy = np.eye(size, dtype=np.uint64).reshape(*kernel_hw, 3, size)
    np.testing.assert_array_equal(conv.forward(x, copy), result)


@pytest.mark.parametrize("batched", list(itertools.product([0, None], repeat=2))[:-1], ids=str)
def test_batching_equals_loops(batched):
    conv = Conv2D()
    stacks = [np.stack([v, v + np.uint64(5)]) for v in operands(conv, (5, 6), (4, 4))]

    def compare(f, first, second):
        def at(v, axis, i):
            return v[i] if axis == 0 else v[0]

        inputs = [
            v if axis == 0 else v[0] for v, axis in zip((first, second), batched, strict=True)
        ]
        loop = [f(at(first, batched[0], i), at(second, batched[1], i)) for i in range(2)]
        np.testing.assert_array_equal(jax.jit(jax.vmap(f, batched))(*inputs), np.stack(loop))

    x, w, dy = stacks
    compare(conv.forward, x, w)
    compare(lambda dy, w: conv.input_grad(dy, w, (5, 6)), dy, w)
    compare(lambda x, dy: conv.weight_grad(x, dy, (4, 4)), x, dy)


def test_is_a_value():
    assert Conv2D((1, 1)) == Conv2D((1, 1)) != Conv2D()
    assert hash(Conv2D((1, 1))) == hash(Conv2D((1, 1)))


@pytest.mark.parametrize("strides", [(0, 1), (1,), 2, (1.0, 1), [1, 1], (True, 1)])
def test_refused_strides(strides):
    with pytest.raises(ValueError, match="strides"):
        Conv2D(strides=strides)


@pytest.mark.parametrize("padding", [1, (1, 1), ((1, 1),), ((-1, 1), (1, 1)), ((1, 1), (1.5, 1))])
def test_refused_padding(padding):
    with pytest.raises(ValueError, match="padding"):
        Conv2D(padding=padding)


def test_refused_shapes():
    conv, x, w = Conv2D(), jnp.zeros((1, 6, 6, 3), jnp.uint64), jnp.zeros((4, 4, 3, 2), jnp.uint64)
    dy = jnp.zeros((1, 3, 3, 2), jnp.uint64)
    with pytest.raises(ValueError, match="larger than"):
        conv.output_hw((1, 6), (4, 4))
    with pytest.raises(ValueError, match="input_hw"):
        conv.output_hw((0, 6), (4, 4))
    with pytest.raises(ValueError, match="kernel_hw"):
        conv.deconv_hw((4, 4), (4, 0))
    with pytest.raises(ValueError, match="no pixels"):
        conv.deconv_hw((1, 1), (2, 2))
    with pytest.raises(ValueError, match="channels"):
        conv.forward(x[..., :2], w)
    with pytest.raises(ValueError, match="4 axes"):
        conv.forward(x[0], w)
    with pytest.raises(ValueError, match="channels"):
        conv.input_grad(dy[..., :1], w, (6, 6))
    with pytest.raises(ValueError, match="dy has size"):
        conv.input_grad(dy, w, (8, 8))
    with pytest.raises(ValueError, match="dy has size"):
        conv.weight_grad(x, dy[:, :2], (4, 4))
    with pytest.raises(ValueError, match="images"):
        conv.weight_grad(jnp.concatenate([x, x]), dy, (4, 4))
