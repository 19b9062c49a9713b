"""Every layer, forward and backward, against Flax or an independent definition in float64.

Inputs are on the grid of their scale (f = 18 or 2f = 36 fraction bits), so that errors come from
the protocols alone. e = 2^-18 is one LSB; a truncation errs by less than e.
"""

import functools

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_grid, real, run, secret
from jax import lax
from lpgan_jax.nn.activation import SLR, SR, SecTanh
from lpgan_jax.nn.linear import SecConv, SecDeconv, SecFC
from lpgan_jax.nn.normalization import SecBN

from lpgan_jax.mpc.secret import is_secret

F = 18
E = 2.0**-F
scales = pytest.mark.parametrize("scale", [F, 2 * F])


def train(layer, params, x, dy, scale, group=None, log=None):
    """y, dx, gradients (and running statistics) as float64, of a forward and a backward pass.

    `group`: (index, groups), then dy belongs to that part of the batch only. `log` receives the
    names and sizes of the messages, forward and backward.
    """

    def function(party, params, x, dy, *stats):
        y, residuals = layer.forward(party, params, x)
        if log is not None:
            log["forward"] = [(m.name, m.words.size) for m in party.messages]
        sent = len(party.messages)
        stats = layer.update_stats(party, *stats, residuals) if stats else None
        if group is not None:
            residuals = layer.group(residuals, *group)
        dx, grads = layer.backward(party, residuals, dy, input_grad=True, param_grads=True)
        if log is not None:
            log["backward"] = [(m.name, m.words.size) for m in party.messages[sent:]]
        return y, dx, grads, stats

    secrets = [
        {name: secret(value, F, i) for i, (name, value) in enumerate(params.items())},
        secret(x, scale, 11),
        secret(dy, scale, 12),
    ]
    if isinstance(layer, SecBN):
        stats = layer.init_stats(x.shape[1:])
        secrets.append({name: secret(value, 2 * F, 13) for name, value in stats.items()})
    is_secret = functools.partial(lambda kind, v: isinstance(v, kind), type(secrets[1]))
    return jax.tree.map(real, run(function, *secrets), is_leaf=is_secret)


def assert_within(actual, exact, tolerance):
    assert actual.shape == exact.shape
    # 2^-40 is what float64 references themselves may be off by.
    excess = np.abs(actual - exact) - (np.asarray(tolerance) + 2.0**-40)
    assert np.all(excess <= 0), (excess / E).max()


# Linear layers ----------------------------------------------------------------------------------

STRIDES, PADDING, KERNEL = (2, 1), ((1, 0), (1, 2)), (3, 2)


def _convolve(x, w, **options):
    return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def _deconvolve(x, w):
    """A convolution over the image with zeros inserted, by the flipped kernel."""
    padding = [(k - 1 - p, k - 1 - q) for k, (p, q) in zip(KERNEL, PADDING, strict=True)]
    return _convolve(x, w[::-1, ::-1], window_strides=(1, 1), padding=padding, lhs_dilation=STRIDES)


geometry = {"kernel_size": KERNEL, "strides": STRIDES, "padding": PADDING}
LINEAR = {
    "fc": (SecFC(5, use_bias=True), (4, 7), (7, 5), jnp.matmul),
    "conv": (
        SecConv(5, use_bias=True, **geometry),
        (2, 5, 4, 3),
        (*KERNEL, 3, 5),
        lambda x, w: _convolve(x, w, window_strides=STRIDES, padding=PADDING),
    ),
    "deconv": (SecDeconv(5, use_bias=True, **geometry), (2, 4, 5, 3), (*KERNEL, 3, 5), _deconvolve),
}
linear = pytest.mark.parametrize("name", LINEAR)


def _linear_case(name, scale):
    layer, x_shape, w_shape, product = LINEAR[name]
    rng = np.random.default_rng(1)
    x, w, b = (on_grid(rng, s, f) for s, f in ((x_shape, scale), (w_shape, F), (5, F)))
    dy = on_grid(rng, product(x, w).shape, scale)
    return layer, product, x, {"kernel": w, "bias": b}, dy


@scales
@linear
def test_linear_layers_are_exact_up_to_the_truncation_of_their_inputs(name, scale):
    """At scale f the ring computes the exact integers. At 2f, x and dy are first rounded to f."""
    layer, product, x, params, dy = _linear_case(name, scale)
    w, b = params["kernel"], params["bias"]
    y, dx, grads, _ = train(layer, params, x, dy, scale)
    exact_y, vjp = jax.vjp(product, x, w)
    exact_dx, exact_dw = vjp(dy)
    rounding = 0.0 if scale == F else E  # of each element of x and of dy
    one_x, one_dy = np.full(x.shape, rounding), np.full(dy.shape, rounding)
    size_x = jax.vjp(product, np.abs(x) + one_x, np.abs(w))[1]
    assert_within(y, exact_y + b, product(one_x, np.abs(w)))
    assert_within(dx, exact_dx, size_x(one_dy)[0])
    from_x = jax.vjp(product, one_x, np.abs(w))[1](np.abs(dy))[1]
    assert_within(grads["kernel"], exact_dw, size_x(one_dy)[1] + from_x)
    axes = tuple(range(dy.ndim - 1))
    assert_within(grads["bias"], dy.sum(axes), one_dy.sum(axes))


@linear
def test_init_gives_the_shapes_that_forward_takes_and_returns(name):
    layer, _, x, params, dy = _linear_case(name, F)
    initial, output_shape = layer.init(np.random.default_rng(0), x.shape[1:])
    if name != "fc":
        assert layer.kernel_size == KERNEL
    assert {k: v.shape for k, v in initial.items()} == {k: v.shape for k, v in params.items()}
    assert output_shape == dy.shape[1:]


def test_deconv_is_flaxs_conv_transpose_after_a_spatial_flip():
    rng = np.random.default_rng(2)
    x, w = on_grid(rng, (2, 3, 5, 3)), on_grid(rng, (4, 4, 3, 2))
    flax = linen.ConvTranspose(2, (4, 4), (2, 2), padding="SAME", use_bias=False)
    exact = flax.apply({"params": {"kernel": w[::-1, ::-1]}}, x)
    dy = np.zeros(exact.shape)
    assert_within(train(SecDeconv(2), {"kernel": w}, x, dy, F)[0], np.asarray(exact), 0)


def test_conv_opens_its_input_its_kernel_and_the_incoming_gradient_once_each():
    layer, _, x, params, dy = _linear_case("conv", F)
    log = {}
    train(layer, params, x, dy, F, log=log)
    assert log == {"forward": [("mask", x.size), ("mask", params["kernel"].size)],
                   "backward": [("mask", dy.size)]}  # fmt: skip


def test_what_is_not_asked_for_is_not_computed():
    layer, _, x, params, dy = _linear_case("conv", F)

    def function(party, params, x, dy):
        _, residuals = layer.forward(party, params, x)
        dealt = [len(party.corrections)]
        dx, grads = layer.backward(party, residuals, dy, input_grad=True, param_grads=False)
        assert grads is None
        dx = dx.settled(party)
        dealt.append(len(party.corrections))
        none, grads = layer.backward(party, residuals, dy, input_grad=False, param_grads=True)
        assert none is None
        grads = jax.tree.map(lambda g: g.settled(party), grads, is_leaf=is_secret)
        dealt.append(len(party.corrections))
        assert np.diff(dealt).tolist() == [1, 1]
        return dx, grads

    run(
        function, {k: secret(v, F, 1) for k, v in params.items()}, secret(x, F, 2), secret(dy, F, 3)
    )


# Activations ------------------------------------------------------------------------------------


def _activation_case(scale):
    rng = np.random.default_rng(3)
    x, dy = on_grid(rng, (4, 16), scale, 2.0), on_grid(rng, (4, 16), scale)
    edges = [0.0, 2.0**-scale, -(2.0**-scale), 250.0, -250.0]
    x[:, :5] = edges
    return x, dy


@scales
def test_relu_and_its_backward_pass_opens_only_the_gradient(scale):
    """Exact at scale f; at 2f what is selected is first rounded to f. Nothing else is ever sent."""
    x, dy = _activation_case(scale)
    log = {}
    y, dx, grads, _ = train(SR(), {}, x, dy, scale, log=log)
    rounding = 0.0 if scale == F else E
    assert_within(y, np.maximum(x, 0), rounding)
    assert_within(dx, np.where(x > 0, dy, 0), rounding)
    assert np.all(y[x <= 0] == 0)
    assert np.all(dx[x <= 0] == 0)
    assert np.all(y * 2.0**F % 1 == 0)
    assert grads == {}
    assert log["backward"] == [("mask", dy.size)]


@scales
@pytest.mark.parametrize("alpha", [0.2, 0.25])
def test_leaky_relu(scale, alpha):
    """1 LSB, and alpha's rounding to a multiple of 2^-24, or of 2^-18 at scale 2f (62 - 8 - 36)."""
    x, dy = _activation_case(scale)
    log = {}
    y, dx, _, _ = train(SLR(alpha=alpha), {}, x, dy, scale, log=log)
    rounding = 0.0 if alpha == 0.25 else 2.0**-25 if scale == F else 2.0**-19
    for actual, value in ((y, x), (dx, dy)):
        exact = np.where(x > 0, value, alpha * value)
        assert_within(actual, exact, E + rounding * np.abs(value))
    assert [name for name, _ in log["backward"]] == ["mask", "mask"]  # dy, and to truncate


@scales
def test_tanh(scale):
    """y errs by 2 LSB, so 1 - y^2 by 4 |y| + 1 LSB; dy is rounded first at scale 2f."""
    x, dy = _activation_case(scale)
    y, dx, _, _ = train(SecTanh(), {}, x, dy, scale)
    exact, vjp = jax.vjp(jnp.tanh, x)
    assert_within(y, np.asarray(exact), 2 * E)
    rounding = 0.0 if scale == F else E
    derivative = (4 * np.abs(exact) + 1) * E + 4 * E**2
    tolerance = (np.abs(dy) + rounding) * derivative + rounding
    assert_within(dx, np.asarray(vjp(dy)[0]), tolerance)


# Groups -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("layer", [SecFC(5), SR(), SLR(), SecTanh()], ids=repr)
def test_group_picks_the_residuals_of_one_part_of_the_batch(layer, index):
    """Against the whole backward pass with zero gradients for the other part."""
    rng = np.random.default_rng(4)
    x, w = on_grid(rng, (4, 6)), on_grid(rng, (6, 5))
    params = {"kernel": w} if isinstance(layer, SecFC) else {}
    part = slice(2 * index, 2 * index + 2)
    width = 5 if params else 6
    dy = np.zeros((4, width))
    dy[part] = on_grid(rng, (2, width))
    _, whole_dx, whole_grads, _ = train(layer, params, x, dy, F)
    _, dx, grads, _ = train(layer, params, x, dy[part], F, group=(index, 2))
    tolerance = 0 if isinstance(layer, SecFC | SR) and not isinstance(layer, SLR) else 16 * E
    assert_within(dx, whole_dx[part], tolerance)
    for name in grads:
        assert_within(grads[name], whole_grads[name], 0)


# Batch normalisation ----------------------------------------------------------------------------

MOMENTUM, EPSILON = 0.9, 1e-5


def _flax_batch_norm(params, stats, x, running=False):
    layer = linen.BatchNorm(running, momentum=MOMENTUM, epsilon=EPSILON, use_fast_variance=False)
    return layer.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])


def _batch_norm_tolerances(x, dy, gamma, scale):
    """(of y, dx, dgamma, batch mean, batch variance) of one batch, to first order, in real terms.

    Each truncation errs by e. The constant of a count that is no power of two has 20 bits, or 16 at
    scale 2f and for the running variance; `inverse_sqrt` errs by 2^-24 and e, with the count's part
    in its series. What is of second order (the mean's error squared in the variance) is covered by
    the factor 1.25 at the end.
    """
    axes, count = tuple(range(x.ndim - 1)), x[..., 0].size
    power = count & (count - 1) == 0
    mu, var = np.abs(x.mean(axes)), x.var(axes)
    inverse = 1 / np.sqrt(var + EPSILON)
    k, centred, size = np.abs(gamma) * inverse, np.abs(x - x.mean(axes)), np.abs(dy)
    constant = 0.0 if power else 2.0**-16
    d_dy = 0.0 if scale == F else E
    d_mu = E + mu * (0.0 if power else 2.0**-20 if scale == F else 2.0**-16)
    d_centred = d_mu + (0.0 if scale == F else E)
    # The sum of squares sees errors of centred values of every sign: 2 |c| d, unless all are equal.
    d_var = d_centred**2 + (0 if scale == F else 2 * centred.mean(axes) * E)
    d_inverse = E + inverse * (2.0**-24 + d_var / (2 * (var + EPSILON)))
    d_k = E + np.abs(gamma) * d_inverse
    d_y = centred * d_k + k * d_centred
    covariance = np.abs((dy * (x - x.mean(axes))).sum(axes))
    d_covariance = E + (size * d_centred + centred * d_dy).sum(axes)
    d_gamma = d_covariance * inverse + covariance * d_inverse
    slope1 = covariance * inverse / count
    d_slope = E + d_gamma / count + constant * slope1
    slope2 = slope1 * inverse
    d_slope = E + d_slope * inverse + slope1 * d_inverse
    slope3 = slope2 * k / inverse * inverse
    d_slope = E + d_slope * k + slope2 * d_k
    d_offset = np.abs(dy.mean(axes)) * (d_k + k * constant) + k * (E + d_dy)
    d_x = size * d_k + k * d_dy + centred * d_slope + slope3 * d_centred + d_offset
    return [1.25 * v for v in (d_y, d_x, d_gamma, d_mu, d_var + constant * var + E**2)]


@pytest.mark.parametrize(
    ("images", "groups", "scale"), [(4, 1, F), (4, 2, 2 * F), (6, 1, 2 * F), (6, 2, F)]
)
def test_batch_norm_and_its_running_statistics(images, groups, scale):
    """16, 8 (powers of two), 24 and 12 values a channel; the groups update in turn."""
    rng = np.random.default_rng(5)
    x = on_grid(rng, (images, 2, 2, 3), scale) * [1.0, 4.0, 0.5] + [0.0, 2.0, -1.0]
    dy = on_grid(rng, x.shape, scale)
    params = {"scale": on_grid(rng, 3), "bias": on_grid(rng, 3)}
    layer = SecBN(EPSILON, MOMENTUM, F, groups)
    y, dx, grads, stats = train(layer, params, x, dy, scale)

    exact_stats, d_stats = layer.init_stats(x.shape[1:]), {"mean": 0.0, "var": 0.0}
    exact_grads, d_gamma = {"scale": 0.0, "bias": 0.0}, 0.0
    for part in np.split(np.arange(images), groups):
        old = exact_stats

        def forward(params, x, old=old):
            y, new = _flax_batch_norm(params, old, x)
            return y, new["batch_stats"]

        exact_y, vjp, exact_stats = jax.vjp(forward, params, x[part], has_aux=True)
        param_grads, exact_dx = vjp(dy[part])
        d_y, d_x, d_scale, *d_batch = _batch_norm_tolerances(
            x[part], dy[part], params["scale"], scale
        )
        assert_within(y[part], np.asarray(exact_y), d_y)
        assert_within(dx[part], np.asarray(exact_dx), d_x)
        exact_grads = {k: exact_grads[k] + param_grads[k] for k in exact_grads}
        d_gamma = d_gamma + d_scale
        for name, d in zip(("mean", "var"), d_batch, strict=True):
            # 1 - momentum has 14 bits (62 - 12 - 36).
            change = np.abs(exact_stats[name] - old[name])
            d_stats[name] = d_stats[name] + 0.1 * d + change * 2.0**-14 + E**2
    assert_within(grads["scale"], np.asarray(exact_grads["scale"]), d_gamma)
    rounding = 0.0 if scale == F else dy[..., 0].size * E
    assert_within(grads["bias"], np.asarray(exact_grads["bias"]), rounding)
    for name in stats:
        assert_within(stats[name], np.asarray(exact_stats[name]), d_stats[name])


@pytest.mark.parametrize("index", [0, 1])
def test_batch_norms_group_is_a_batch_of_its_own(index):
    rng = np.random.default_rng(6)
    x, dy = on_grid(rng, (4, 2, 2, 3)), on_grid(rng, (2, 2, 2, 3))
    params = {"scale": on_grid(rng, 3), "bias": on_grid(rng, 3)}
    part = slice(2 * index, 2 * index + 2)
    layer = SecBN(EPSILON, MOMENTUM, F, groups=2)
    _, dx, grads, _ = train(layer, params, x, dy, F, group=(index, 2))
    stats = layer.init_stats(x.shape[1:])
    _, vjp = jax.vjp(lambda p, v: _flax_batch_norm(p, stats, v)[0], params, x[part])
    exact_grads, exact_dx = vjp(dy)
    _, d_x, d_gamma, _, _ = _batch_norm_tolerances(x[part], dy, params["scale"], F)
    assert_within(dx, np.asarray(exact_dx), d_x)
    assert_within(grads["scale"], np.asarray(exact_grads["scale"]), d_gamma)
    assert_within(grads["bias"], np.asarray(exact_grads["bias"]), 0)


@scales
def test_batch_norm_infers_with_running_statistics(scale):
    """The centred values err by e, 1/sqrt by e and 2^-24, k = gamma/sqrt by e more."""
    rng = np.random.default_rng(7)
    x = on_grid(rng, (2, 3, 2, 4), scale, 2.0)
    params = {"scale": on_grid(rng, 4), "bias": on_grid(rng, 4)}
    stats = {"mean": on_grid(rng, 4, 2 * F), "var": np.array([1e-3, 0.5, 2.0, 100.0])}
    layer = SecBN(EPSILON, MOMENTUM, F)

    def function(party, params, stats, x):
        return layer.infer(party, params, stats, x)

    shared = [{k: secret(v, f, f) for k, v in d.items()} for d, f in ((params, F), (stats, 2 * F))]
    y = real(run(function, *shared, secret(x, scale, 1)))
    exact, _ = _flax_batch_norm(params, stats, x, running=True)
    inverse = 1 / np.sqrt(stats["var"] + EPSILON)
    gamma = np.abs(params["scale"])
    d_k = E + gamma * (E + 2.0**-24 * inverse)
    assert_within(
        y, np.asarray(exact), np.abs(x - stats["mean"]) * d_k + gamma * inverse * E + E * d_k
    )


def test_batch_norm_refuses_an_epsilon_below_its_resolution():
    with pytest.raises(ValueError, match="epsilon"):
        SecBN(epsilon=2.0**-37)
