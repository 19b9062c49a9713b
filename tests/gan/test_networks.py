"""SG and SD are the DCGAN that their docstrings describe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lpgan_jax.gan import Discriminator, Generator

KERNELS = [4, 5]  # and so padding that is even and uneven


def shapes(tree):
    return jax.tree.map(lambda v: v.shape, tree)


def initial(module, *shape):
    return jax.jit(module.init)(jax.random.key(0), jnp.ones(shape, jnp.float32))


def traced(module, *shape):
    """Shapes of (variables, output)."""
    return jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x)[::-1],
        jax.ShapeDtypeStruct(shape, np.float32),
    )


@pytest.mark.parametrize("kernel_size", KERNELS)
def test_every_layer_doubles_or_halves(kernel_size):
    generator = Generator(3, features=2, base_size=3, depth=3, kernel_size=kernel_size)
    variables, images = traced(generator, 2, 5)
    assert images.shape == (2, 24, 24, 3)
    k = (kernel_size, kernel_size)
    assert shapes(variables["params"]) == {
        "fc": {"kernel": (5, 3 * 3 * 8)},
        "bn0": {"scale": (8,), "bias": (8,)},
        "deconv0": {"kernel": (*k, 8, 4)},
        "bn1": {"scale": (4,), "bias": (4,)},
        "deconv1": {"kernel": (*k, 4, 2)},
        "bn2": {"scale": (2,), "bias": (2,)},
        "deconv2": {"kernel": (*k, 2, 3)},
    }
    discriminator = Discriminator(features=2, depth=3, kernel_size=kernel_size)
    variables, logits = traced(discriminator, 2, 24, 24, 3)
    assert logits.shape == (2, 1)
    assert shapes(variables["params"]) == {
        "conv0": {"kernel": (*k, 3, 2)},
        "conv1": {"kernel": (*k, 2, 4)},
        "bn1": {"scale": (4,), "bias": (4,)},
        "conv2": {"kernel": (*k, 4, 8)},
        "bn2": {"scale": (8,), "bias": (8,)},
        "fc": {"kernel": (3 * 3 * 8, 1), "bias": (1,)},
    }


@pytest.mark.parametrize(("norm", "names"), [("group", {"gn1"}), ("none", set())])
def test_other_normalisations_have_no_statistics(norm, names):
    variables, _ = traced(Discriminator(features=2, depth=2, norm=norm), 2, 8, 8, 1)
    assert variables.keys() == {"params"}
    assert variables["params"].keys() - {"conv0", "conv1", "fc"} == names


@pytest.mark.parametrize("kernel_size", KERNELS)
def test_a_transposed_convolution_is_the_derivative_of_a_convolution(kernel_size):
    """SecDeconv: of the one that halves, with the same kernel and padding, flipped."""
    generator = Generator(2, features=3, base_size=4, depth=1, kernel_size=kernel_size)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(np.asarray, initial(generator, 2, 5))
    kernel = rng.normal(size=(kernel_size, kernel_size, 3, 2))
    variables["params"]["deconv0"]["kernel"] = kernel
    noise = rng.normal(size=(2, 5))
    x = (noise @ variables["params"]["fc"]["kernel"].astype(np.float64)).reshape(2, 4, 4, 3)
    x = np.maximum(x / np.sqrt(1 + 1e-5), 0)  # running statistics at their start
    before = (kernel_size - 2) // 2
    padding = [(before, kernel_size - 2 - before)] * 2

    def halving(images):
        return lax.conv_general_dilated(
            images,
            kernel[::-1, ::-1].swapaxes(2, 3),
            (2, 2),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    (expected,) = jax.linear_transpose(halving, jnp.zeros((2, 8, 8, 2)))(jnp.asarray(x))
    got = generator.apply(variables, noise, train=False)
    np.testing.assert_allclose(got, np.tanh(expected), rtol=0, atol=1e-6)


def test_leaky_relu_has_the_slope_at_0():
    """As under sharing, where a bit of x > 0 selects; it is jax.nn's elsewhere."""
    discriminator = Discriminator(features=1, depth=1, leaky_slope=0.25)
    variables = initial(discriminator, 1, 2, 2, 1)
    slope = jax.grad(lambda x: discriminator.apply(variables, x).sum())
    at_zero, below, above = (slope(np.full((1, 2, 2, 1), v)) for v in (0.0, -1e-3, 1e-3))
    kernel_sign = np.sign(variables["params"]["conv0"]["kernel"][1:3, 1:3].sum())
    for inactive in (at_zero, below if kernel_sign > 0 else above):
        np.testing.assert_allclose(
            inactive, 0.25 * (above if kernel_sign > 0 else below), rtol=1e-6
        )


def test_the_background_counts_as_zero():
    """Before the padding too, which is background then."""
    plain, moved = Discriminator(features=2, depth=2), Discriminator(2, depth=2, background=-0.75)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    variables = initial(plain, 1, 8, 8, 1)
    expected = plain.apply(variables, images + np.float32(0.75), train=False)
    np.testing.assert_array_equal(moved.apply(variables, images, train=False), expected)
