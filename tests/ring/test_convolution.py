"""Convolutions of all kinds modulo 2^bits, against Python integers with all zeros in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpgan_jax.ring import Convolution
from lpgan_jax.ring.contraction import ring_product_p


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def random_convolution(seed):
    """A convolution of any kind, with shapes of operands that it takes."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 4))
    channel_groups, image_groups = [(1, 1), (1, 1), (3, 1), (1, 2)][rng.integers(4)]
    groups = channel_groups * image_groups
    images, channels = int(rng.integers(1, 3)) * image_groups, int(rng.integers(1, 3))
    sizes, kernel = rng.integers(2, 8, rank), rng.integers(1, 4, rank)
    orders = [tuple(map(int, rng.permutation(rank + 2))) for _ in range(3)]
    padding = tuple((int(a), int(b)) for a, b in rng.integers(-1, 4, (rank, 2)))
    steps = [tuple(map(int, rng.integers(1, 4, rank))) for _ in range(3)]
    conv = Convolution(*orders, steps[0], padding, *steps[1:], channel_groups, image_groups)
    x = placed([images, channels * channel_groups, *sizes], orders[0])
    w = placed([groups * int(rng.integers(1, 3)), channels, *kernel], orders[1])
    return conv, x, w


def placed(sizes, axes):
    return tuple(int(n) for _, n in sorted(zip(axes, sizes, strict=True)))


def plain(conv, x, w):
    """In Python integers, with all the zeros that dilations insert."""
    images = np.transpose(x, conv.input_axes)
    kernel = np.transpose(w, conv.kernel_axes).astype(object)
    rank = len(conv.strides)
    spread = np.zeros(
        (
            *images.shape[:2],
            *((n - 1) * d + 1 for n, d in zip(images.shape[2:], conv.dilation, strict=True)),
        ),
        x.dtype,
    )
    spread[:, :, *(slice(None, None, d) for d in conv.dilation)] = images
    spread = np.pad(spread, [(0, 0)] * 2 + [[max(0, n) for n in p] for p in conv.padding])
    cut = [
        slice(max(0, -a), n - max(0, -b))
        for n, (a, b) in zip(spread.shape[2:], conv.padding, strict=True)
    ]
    spread = spread[:, :, *cut].astype(object)
    outputs = [
        max(0, (n - (k - 1) * r - 1) // s + 1)
        for n, k, r, s in zip(
            spread.shape[2:], kernel.shape[2:], conv.kernel_dilation, conv.strides, strict=True
        )
    ]
    groups = conv.channel_groups * conv.image_groups
    parts = []
    for group in range(groups):
        axis = 1 if conv.channel_groups > 1 else 0
        own = np.split(spread, groups, axis)[group]
        mine = np.split(kernel, groups)[group]
        total = np.zeros((own.shape[0], mine.shape[0], *outputs), object)
        for tap in np.ndindex(*kernel.shape[2:]):
            index = tuple(
                slice(t * r, t * r + (n - 1) * s + 1, s) if n else slice(0, 0)
                for t, r, n, s in zip(tap, conv.kernel_dilation, outputs, conv.strides, strict=True)
            )
            weights = mine[:, :, *tap].reshape(*mine.shape[:2], *[1] * rank)
            total += (own[:, None, :, *index] * weights).sum(2)
        parts.append(total)
    whole = np.concatenate(parts, 1)
    assert whole.ndim == rank + 2
    words = (whole % 2 ** (8 * x.dtype.itemsize)).astype(x.dtype)
    return np.transpose(words, np.argsort(conv.output_axes))


def words(seed, shape, dtype):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype)


def test_convolutions():
    kinds = 0
    for seed in range(30):
        conv, x_shape, w_shape = random_convolution(seed)
        x, w = words(seed, x_shape, np.uint64), words(seed + 1, w_shape, np.uint64)
        want = plain(conv, x, w)
        got = jax.jit(conv)(x, w)
        assert got.shape == conv.shape(x.shape, w.shape) == want.shape
        np.testing.assert_array_equal(got, want)
        kinds += bool(np.any(want))
    assert kinds > 12


@pytest.mark.parametrize("seed", [0, 3])
def test_in_jax_alone(seed):
    """The views of a product, gathered element by element; of the ring of bytes."""
    conv, x_shape, w_shape = random_convolution(seed)
    x, w = words(seed, x_shape, np.uint8), words(seed + 1, w_shape, np.uint8)
    np.testing.assert_array_equal(jax.jit(conv)(x, w), plain(conv, x, w))


def test_in_the_clear_it_is_that_of_jax():
    conv, x_shape, w_shape = random_convolution(3)
    x, w = (words(i, s, np.uint8).astype(np.float64) for i, s in enumerate((x_shape, w_shape)))
    np.testing.assert_array_equal(conv(jnp.asarray(x), jnp.asarray(w)), plain(conv, x, w))


def contractions(function, *args):
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive is ring_product_p:
                found.append(equation.params["contraction"])
        return found

    return walk(jax.make_jaxpr(function)(*args).jaxpr)


def test_no_inserted_zero_is_multiplied():
    """Of a transposed convolution: a product for each input and tap, but for those cut off."""
    axes, kernel = (0, 2, 1), (2, 1, 0)
    conv = Convolution(axes, kernel, axes, (1,), ((2, 2),), (2,), (1,))
    x, w = (jax.ShapeDtypeStruct(s, np.uint64) for s in ((1, 8, 1), (3, 1, 1)))
    total = sum(c.multiply_adds for c in contractions(conv, x, w))
    assert conv.shape(x.shape, w.shape) == (1, 17, 1)
    # 9 even outputs meet two taps, 8 odd ones one.
    assert total == 9 * 2 + 8
