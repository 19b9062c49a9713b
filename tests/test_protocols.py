"""Every public protocol against exact integers or float64 over its stated domain.

Inputs are integers X = x 2^f, so that references are exact; errors are in LSB of the result. Exact
references that fit neither float64 nor int64 are Python integers (object arrays).
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import integers, on_grid, pair, pair_of, whole
from jax import lax

from lpgan_jax import FixedPoint, key
from lpgan_jax import protocols as P

F18 = FixedPoint(18)
N = 4096
fractions = pytest.mark.parametrize("f", [12, 18, 24])


def log_uniform(rng, largest_bits, size=N):
    """Signed integers of every size below 2^largest_bits, and the edges."""
    sizes = rng.uniform(0, largest_bits, size)
    values = np.floor(2.0**sizes).astype(np.int64) * rng.choice([-1, 1], size)
    top = 2**largest_bits - 1
    edges = [0, 1, -1, 2, -2, top, -top, top - 1, 1 - top, (top + 1) // 2, -(top + 1) // 2]
    values[: len(edges)] = edges
    return np.clip(values, -top, top)


def assert_rounded(shares, exact, shift):
    """|z - exact / 2^shift| < 1 LSB, strictly, in Python integers."""
    difference = whole(shares).astype(object) * 2**shift - exact
    assert np.all(np.abs(difference) < 2**shift), np.abs(difference).max() / 2**shift


# Products ---------------------------------------------------------------------------------------


def factors(rng):
    """Pairs of integers of every size with |x y| < 2^62, most of them near that."""
    bits = rng.uniform(0, 62, N)
    x = np.floor(2.0**bits).astype(np.int64)
    y = np.floor(2.0 ** (62 - bits) * rng.uniform(0, 0.99, N)).astype(np.int64)
    top = 2**62 - 1
    x[:6], y[:6] = [0, top, 1, 2**31 - 1, 0, 2**31], [0, 1, top, 2**31, top, 2**30]
    return x * rng.choice([-1, 1], N), y * rng.choice([-1, 1], N)


@fractions
def test_mul_errs_below_one_lsb_on_its_whole_domain(f):
    x, y = factors(np.random.default_rng(1))
    z = P.sec_mul(key(1), pair_of(x, 1), pair_of(y, 2), FixedPoint(f))
    assert_rounded(z, x.astype(object) * y, f)


@fractions
def test_square_errs_below_one_lsb_on_its_whole_domain(f):
    x = log_uniform(np.random.default_rng(2), 31)
    z = P.sec_square(key(2), pair_of(x), FixedPoint(f))
    assert_rounded(z, x.astype(object) ** 2, f)


@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [((), ()), ((2, 3), ()), ((3, 1), (4,)), ((0, 3), (3,))],
)
def test_mul_add_and_cmp_broadcast_as_numpy_does(x_shape, y_shape):
    rng = np.random.default_rng(3)
    x, y = (rng.integers(-(2**25), 2**25, shape) for shape in (x_shape, y_shape))
    u, v = pair_of(x, 1), pair_of(y, 2)
    z = P.sec_mul(key(3), u, v, F18)
    assert z.shape == (2, *np.broadcast_shapes(x_shape, y_shape))
    assert_rounded(z, (x * y).astype(object), 18)
    np.testing.assert_array_equal(whole(P.sec_add(u, v)), x + y)
    np.testing.assert_array_equal(whole(P.sec_cmp(key(4), u, v)), x > y)


ELEMENTWISE = {
    "square": lambda k, x: P.sec_square(k, x, F18),
    "truncate": lambda k, x: P.truncate(k, x, 18),
    "relu": P.sec_relu,
    "leaky_relu": lambda k, x: P.sec_leaky_relu(k, x, F18),
    "tanh": lambda k, x: P.sec_tanh(k, x, F18),
    "sigmoid": lambda k, x: P.sec_sigmoid(k, x, F18),
    "softplus": lambda k, x: P.sec_softplus(k, x, F18),
    "inv_sqrt": lambda k, x: P.sec_inv_sqrt(k, x, F18),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_protocols_keep_the_shapes_of_scalars_and_empty_arrays(name):
    for shape in ((), (0,), (0, 3), (1, 1)):
        result = jax.eval_shape(ELEMENTWISE[name], key(5), pair(np.zeros(shape)))
        assert (result.shape, result.dtype) == ((2, *shape), jnp.uint64)


@pytest.mark.parametrize(
    ("name", "at_one"), [("relu", 1.0), ("tanh", np.tanh(1)), ("inv_sqrt", 1.0)]
)
def test_elementwise_protocols_run_on_scalars_and_empty_arrays(name, at_one):
    assert ELEMENTWISE[name](key(5), pair(np.zeros((0, 3)))).shape == (2, 0, 3)
    # 3 LSB is the largest bound of these; the inverse root's is 1 LSB + 2^-17.
    assert abs(whole(ELEMENTWISE[name](key(6), pair(1.0))) - at_one * 2**18) < 3


# Truncation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 1, 18, 36, 61, 62])
def test_truncate_at_every_kind_of_shift(bits):
    x = log_uniform(np.random.default_rng(4), 62)
    assert_rounded(P.truncate(key(7), pair_of(x), bits), x.astype(object), bits)


@functools.partial(jax.jit, static_argnames="quarter")
def _truncation_errors(ds_key, quarter):
    """z 2^18 - x for 10^6 random |x| < 2^62; with `quarter`, all drop the fraction 1/4."""
    k1, k2, k3 = jax.random.split(ds_key, 3)
    x = jax.random.bits(k1, (10**6,), jnp.uint64).astype(jnp.int64) >> 1
    if quarter:
        x = (x >> 18 << 18) + 2**16
    first = jax.random.bits(k2, x.shape, jnp.uint64)
    shares = jnp.stack([first, x.astype(jnp.uint64) - first])
    z = P.truncate(k3, shares, 18)
    return ((z[0] + z[1]) << 18).astype(jnp.int64) - x


def _check_truncation(chunks):
    # |x| < 2^62 leaves -2^62 out, which a chunk draws with probability 10^-13. The mean of n errors
    # has the standard error s/sqrt(n); 4 of them give a false alarm once in 16,000 seeds.
    whole_range, squares, ups, count = 0, 0, 0, chunks * 10**6
    for ds_key in jax.random.split(key(8), chunks):
        k1, k2 = jax.random.split(ds_key)
        errors = np.asarray(_truncation_errors(k1, quarter=False))
        assert np.abs(errors).max() < 2**18
        whole_range, squares = whole_range + errors.sum(), squares + np.sum((errors / 2**18) ** 2)
        errors = np.asarray(_truncation_errors(k2, quarter=True))
        assert set(np.unique(errors)) == {-(2**16), 3 * 2**16}  # down by 1/4 or up by 3/4
        ups += np.sum(errors > 0)
    assert abs(whole_range / 2**18) < 4 * np.sqrt(squares)
    assert abs(ups - count / 4) < 4 * np.sqrt(count * 3 / 16)


def test_truncate_errs_below_one_lsb_without_bias():
    _check_truncation(1)


@pytest.mark.slow
def test_truncate_errs_below_one_lsb_without_bias_over_10_to_the_8():
    _check_truncation(100)


# Comparison and selection -----------------------------------------------------------------------


def _comparison_pairs(seed, size):
    """Full-range random pairs, of which a quarter are ties, a quarter off by one, some extremes."""
    rng, top = np.random.default_rng(seed), 2**62 - 1
    u, v = rng.integers(-top, top, (2, size), endpoint=True)
    quarter = size // 4
    v[:quarter] = u[:quarter]
    v[quarter : 2 * quarter] = np.clip(
        u[quarter : 2 * quarter] + rng.choice([-1, 1], quarter), -top, top
    )
    extremes = [-top, 1 - top, -(2**61), -1, 0, 1, 2**32, 2**61, top - 1, top]
    u[-100:], v[-100:] = np.repeat(extremes, 10), np.tile(extremes, 10)
    return u, v


def _check_cmp(seeds, size):
    for seed in seeds:
        u, v = _comparison_pairs(seed, size)
        result = whole(P.sec_cmp(key(seed), pair_of(u, seed), pair_of(v, seed + 1)))
        np.testing.assert_array_equal(result, u > v)


def test_cmp_is_exact_on_full_range_pairs_ties_and_off_by_ones():
    _check_cmp([9], 10**6)


@pytest.mark.slow
def test_cmp_is_exact_on_10_to_the_7_pairs():
    _check_cmp(range(100, 110), 10**6)


def test_cmp_is_exact_for_extreme_shares():
    """Every pair of secrets with every split whose first share is an edge of the ring."""
    edges = np.array([0, 1, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1], np.uint64)
    secrets = np.array([-(2**62) + 1, -1, 0, 1, 2**62 - 1])
    u, v, i, j = (a.ravel() for a in np.meshgrid(secrets, secrets, range(7), range(7)))
    pairs = [
        jnp.asarray(np.stack([first, secret.astype(np.uint64) - first]))
        for first, secret in ((edges[i], u), (edges[j], v))
    ]
    np.testing.assert_array_equal(whole(P.sec_cmp(key(10), *pairs)), u > v)


def test_relu_is_exact_on_its_whole_domain():
    x = log_uniform(np.random.default_rng(5), 63)
    np.testing.assert_array_equal(whole(P.sec_relu(key(11), pair_of(x))), np.maximum(x, 0))


@pytest.mark.parametrize(("f", "alpha"), [(12, 0.2), (18, 0.01), (28, 0.01)])
def test_leaky_relu_errs_below_one_lsb_and_alphas_rounding(f, alpha):
    x = log_uniform(np.random.default_rng(6), f + 8)
    z = whole(P.sec_leaky_relu(key(12), pair_of(x), FixedPoint(f), alpha))
    exact = np.where(x > 0, x, alpha * x)
    assert np.all(np.abs(z - exact) < 1 + 2.0**-25 * np.abs(x))
    assert np.all(z[x == 0] == 0)


# Elementary functions ---------------------------------------------------------------------------


def arguments(f):
    """Integers with |x| < 2^(61 - f) in real terms: every size, and densely near 0."""
    rng = np.random.default_rng(7)
    dense = integers(rng.uniform(-24, 24, N), f)
    return np.concatenate([log_uniform(rng, 61), dense])


@pytest.mark.parametrize("f", [12, 18, 20, 24])
def test_tanh(f):
    x = arguments(f)
    z = whole(P.sec_tanh(key(13), pair_of(x), FixedPoint(f)))
    bound = 2 if f <= 20 else 2.0 ** (f - 22)  # of the docstring
    assert np.abs(z - 2.0**f * np.tanh(x * 2.0**-f)).max() < bound


@pytest.mark.parametrize("f", [18, 28])
def test_sigmoid(f):
    x = arguments(f)
    z = whole(P.sec_sigmoid(key(14), pair_of(x), FixedPoint(f)))
    bound = 2 if f <= 20 else 2.0 ** (f - 22)  # of the docstring of sec_tanh
    assert np.abs(z - 2.0**f * np.exp(-np.logaddexp(0, -x * 2.0**-f))).max() < bound


@pytest.mark.parametrize("f", [12, 18, 24])
def test_softplus(f):
    x = arguments(f)
    z = whole(P.sec_softplus(key(15), pair_of(x), FixedPoint(f)))
    bound = 3 if f <= 18 else 2.0 ** (f - 19)  # of the docstring
    exact = np.logaddexp(0, x * 2.0**-f) * 2.0**f
    # Where x > 0 is large the reference itself is rounded to 53 bits.
    assert np.all(np.abs(z - exact) < bound + 2.0**-52 * np.abs(exact))


def squares_and_others(rng):
    """Integers from 1 to 2^62 - 1 of every size, and the edges of the range reduction."""
    powers = 2 ** np.arange(62)
    u = np.concatenate([np.floor(2 ** rng.uniform(0, 62, N)), powers, powers + 1, 2 * powers - 1])
    return np.minimum(u.astype(np.int64), 2**62 - 1)


@pytest.mark.parametrize("f", [12, 17, 18, 24])
def test_inv_sqrt(f):
    u = squares_and_others(np.random.default_rng(8))
    z = whole(P.sec_inv_sqrt(key(16), pair_of(u), FixedPoint(f)))
    exact = 2.0**f / np.sqrt(u * 2.0**-f)
    relative = 2.0**-17 if f <= 18 else 2.0**-25  # of the docstring
    excess = np.abs(z - exact) / (1 + relative * exact)
    assert excess.max() < 1, (u[excess.argmax()], excess.max())


def test_inv_sqrt_of_zero_is_large_and_of_negative_numbers_well_formed():
    u = squares_and_others(np.random.default_rng(8))
    u[:3] = [0, -1, -(2**40)]
    z = whole(P.sec_inv_sqrt(key(17), pair_of(u), F18))
    assert z[0] > 2**18 * 2**9  # 1/sqrt of 1 LSB is 2^9


# Linear layers ----------------------------------------------------------------------------------

# |X W| summed over K stays below 2^53, so that float64 references are exact integers.


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("f", [12, 18])
def test_fc_errs_below_one_lsb(f, use_bias):
    rng = np.random.default_rng(9)
    x, w, b = (integers(rng.normal(0, 4, shape), f) for shape in ((5, 7), (7, 3), (3,)))
    bias = pair_of(b, 3) if use_bias else None
    z = P.sec_fc(key(18), pair_of(x, 1), pair_of(w, 2), FixedPoint(f), bias=bias)
    assert_rounded(z, (x @ w + use_bias * (b << f)).astype(object), f)


def test_matmul_errs_below_one_lsb_up_to_its_range():
    # 16 products of 29 bits each: sums just below 2^62; rows of zeros and of one sign.
    x = np.full((3, 16), 2**29 - 1) * np.array([1, -1, 0])[:, None]
    w = np.full((16, 2), 2**29) * np.array([1, -1])
    z = P.sec_matmul(key(19), pair_of(x, 1), pair_of(w, 2), F18)
    assert_rounded(z, x.astype(object) @ w.astype(object), 18)


GEOMETRIES = [
    ((2, 2), ((1, 1), (1, 1)), (6, 6), (4, 4), False),
    ((1, 2), ((2, 0), (0, 1)), (5, 7), (3, 2), True),
    ((3, 2), ((1, 0), (1, 2)), (7, 5), (2, 3), True),
]
geometries = pytest.mark.parametrize(
    ("strides", "padding", "hw", "kernel_hw", "use_bias"), GEOMETRIES, ids=map(str, GEOMETRIES)
)


def _image_kernel_bias(hw, kernel_hw):
    rng = np.random.default_rng(10)
    return [integers(rng.normal(0, 2, s), 18) for s in ((2, *hw, 3), (*kernel_hw, 3, 5), (5,))]


@geometries
def test_conv_errs_below_one_lsb(strides, padding, hw, kernel_hw, use_bias):
    x, w, b = _image_kernel_bias(hw, kernel_hw)
    exact = lax.conv_general_dilated(
        x.astype(float),
        w.astype(float),
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    exact = np.asarray(exact) + use_bias * b * 2.0**18
    bias = pair_of(b, 3) if use_bias else None
    z = P.sec_conv(key(20), pair_of(x, 1), pair_of(w, 2), F18, strides, padding, bias)
    assert z.shape == (2, *exact.shape)
    assert_rounded(z, exact.astype(np.int64).astype(object), 18)


@geometries
def test_deconv_errs_below_one_lsb(strides, padding, hw, kernel_hw, use_bias):
    """Against the formula of the docstring, y[i*s + a - p] += x[i] w[a], in loops."""
    x, w, b = _image_kernel_bias(hw, kernel_hw)
    full = [(n - 1) * s + k for n, s, k in zip(hw, strides, kernel_hw, strict=True)]
    y = np.zeros((2, *full, 5), np.int64)
    for i, j, a, c in np.ndindex(*hw, *kernel_hw):
        y[:, i * strides[0] + a, j * strides[1] + c] += x[:, i, j] @ w[a, c]
    (top, bottom), (left, right) = padding
    y = y[:, top : full[0] - bottom, left : full[1] - right] + use_bias * (b << 18)
    bias = pair_of(b, 3) if use_bias else None
    z = P.sec_deconv(key(21), pair_of(x, 1), pair_of(w, 2), F18, strides, padding, bias)
    assert z.shape == (2, *y.shape)
    assert_rounded(z, y.astype(object), 18)


def _normalised(x, gamma, beta, eps=1e-5):
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    return gamma / np.sqrt(var + eps) * (x - mean) + beta, 1 / np.sqrt(var + eps)


def batch_norm_tolerance(x, gamma, inverse, f):
    """Of y, in LSB.

    Errors below 1 LSB each: the mean, 1/sqrt (and 2^-17 of it, and as much for the constant of a
    count that is no power of two), k = gamma/sqrt and the result, in y = k (x - mean) + beta. The
    mean's error d enters the variance as d^2; with |x - mean| < 6 sqrt(var + eps) and, at f = 12,
    d < 0.08 sqrt(eps), that adds less than a quarter of the mean's own k d.
    """
    centred = np.abs(x - x.mean(tuple(range(x.ndim - 1))))
    scale = 1 + np.abs(gamma) * (1 + 2.0**-16 * inverse * 2.0**f)
    return centred * scale + (1.25 * np.abs(gamma) * inverse + 1) + 1


@pytest.mark.parametrize(
    ("f", "shape"), [(18, (64, 8)), (18, (4, 3, 5, 8)), (12, (64, 8)), (24, (64, 8))]
)
@pytest.mark.parametrize("std", [0.01, 1.0])
def test_batch_norm(f, shape, std):
    rng = np.random.default_rng(11)
    x = on_grid(rng, shape, f, std) + np.arange(-4, 4)
    x[..., 0] = 3.0  # a channel of variance 0
    gamma, beta = on_grid(rng, 8, f), on_grid(rng, 8, f)
    exact, inverse = _normalised(x, gamma, beta)
    z = P.sec_batch_norm(key(22), pair(x, f, 1), pair(gamma, f, 2), pair(beta, f, 3), FixedPoint(f))
    error = np.abs(whole(z) - exact * 2.0**f)
    assert np.all(error < batch_norm_tolerance(x, gamma, inverse, f))


@pytest.mark.parametrize("shape", [(64, 8), (4, 3, 5, 8)], ids=["64 values", "60 values"])
def test_batch_norm_near_the_end_of_its_range(shape):
    """Squares sum to 2^25 < 2^(62 - 2f)."""
    rng, count = np.random.default_rng(12), np.prod(shape[:-1])
    x = rng.choice([-1.0, 1.0], shape) * np.sqrt(2.0**25 / count)
    x = np.rint(x * 2**18) / 2**18
    exact, inverse = _normalised(x, np.ones(8), np.zeros(8))
    z = P.sec_batch_norm(key(23), pair(x, seed=1), pair(np.ones(8)), pair(np.zeros(8)), F18)
    error = np.abs(whole(z) - exact * 2**18)
    assert np.all(error < batch_norm_tolerance(x, np.ones(8), inverse, 18))


# Transformations --------------------------------------------------------------------------------

PROTOCOLS = {
    "mul": lambda k, x: P.sec_mul(k, x, x, F18),
    "matmul": lambda k, x: P.sec_matmul(k, x[:, None], x[:, :, None], F18),
    "cmp": lambda k, x: P.sec_cmp(k, x, x[:, :1]),
    "conv": lambda k, x: P.sec_conv(k, x.reshape(2, 1, 2, 2, 2), x.reshape(2, 2, 2, 2, 1), F18),
    "batch_norm": lambda k, x: P.sec_batch_norm(k, x.reshape(2, 4, 2), x[:, :2], x[:, :2], F18),
    **ELEMENTWISE,
}


@pytest.mark.parametrize("name", ["mul", "cmp", "tanh"])
def test_vmap_over_keys_is_a_loop(name):
    keys = jax.random.split(key(24), 3)
    x = jnp.stack([pair(np.arange(1, 9) * 0.25, seed=i) for i in range(3)])
    loop = jnp.stack([PROTOCOLS[name](k, v) for k, v in zip(keys, x, strict=True)])
    np.testing.assert_array_equal(jax.vmap(PROTOCOLS[name])(keys, x), loop)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_vmap_over_data_with_one_key_is_refused(name):
    x = jnp.stack([pair(np.arange(1, 9) * 0.25, seed=i) for i in range(3)])
    with pytest.raises(ValueError, match="batch of keys"):
        jax.vmap(PROTOCOLS[name], in_axes=(None, 0))(key(25), x)
    with pytest.raises(ValueError, match="batch of keys"):
        jax.jit(lambda k, v: jax.vmap(lambda row: PROTOCOLS[name](k, row))(v))(key(25), x)


def test_nested_vmap_over_data_with_one_batch_of_keys_is_refused():
    """The inner vmap has a key for each element, the outer one repeats those keys."""
    keys = jax.random.split(key(25), 3)
    x = pair(np.ones((3, 3, 8))).transpose(1, 2, 0, 3)
    nested = jax.vmap(jax.vmap(P.sec_relu), in_axes=(None, 0))
    with pytest.raises(ValueError, match="batch of keys"):
        nested(keys, x)


def test_a_batch_of_keys_over_one_secret_is_allowed():
    x = pair(np.arange(8.0))
    z = jax.vmap(P.sec_relu, in_axes=(0, None))(jax.random.split(key(26), 3), x)
    assert len(np.unique(np.asarray(z)[:, 0], axis=0)) == 3
    np.testing.assert_array_equal(
        np.asarray(z[:, 0] + z[:, 1]), np.tile(integers(np.arange(8), 18), (3, 1))
    )


def test_jit_equals_eager():
    x = pair(np.arange(8.0))
    expected = PROTOCOLS["mul"](key(27), x)
    np.testing.assert_array_equal(P.sec_mul.__wrapped__(key(27), x, x, F18), expected)
    np.testing.assert_array_equal(jax.jit(PROTOCOLS["mul"])(key(27), x), expected)


def test_equal_keys_give_equal_shares_and_other_keys_others():
    x = pair(np.arange(8.0))
    a, b = P.sec_relu(key(28), x), P.sec_relu(key(28), x)
    np.testing.assert_array_equal(a, b)
    assert np.all(P.sec_relu(key(29), x) != a)


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize(
    "bad_key",
    [jax.random.key(0), jax.random.PRNGKey(0), jnp.zeros(8, jnp.uint32), 0, None],
    ids=str,
)
def test_keys_of_other_generators_are_refused(name, bad_key):
    with pytest.raises(TypeError):
        PROTOCOLS[name](bad_key, pair(np.ones(8)))


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("dtype", [jnp.int64, jnp.float64, jnp.uint32, jnp.float32])
def test_shares_of_other_types_are_refused(name, dtype):
    with pytest.raises(TypeError, match="uint64"):
        PROTOCOLS[name](key(30), jnp.ones((2, 8), dtype))


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("shape", [(), (3, 8), (1,)])
def test_a_missing_party_axis_is_refused(name, shape):
    with pytest.raises(ValueError, match="leading axis"):
        ELEMENTWISE[name](key(31), jnp.ones(shape, jnp.uint64))


def ones(*shape):
    return jnp.ones((2, *shape), jnp.uint64)


MISFITS = {
    "add": lambda k: P.sec_add(ones(2), ones(3)),
    "mul": lambda k: P.sec_mul(k, ones(2), ones(3), F18),
    "mul without party axis": lambda k: P.sec_mul(k, ones(3), ones(3)[0], F18),
    "cmp": lambda k: P.sec_cmp(k, ones(2), ones(3)),
    "matmul": lambda k: P.sec_matmul(k, ones(2, 3), ones(2, 3), F18),
    "matmul rank": lambda k: P.sec_matmul(k, ones(3), ones(3, 2), F18),
    "fc bias": lambda k: P.sec_fc(k, ones(2, 3), ones(3, 2), F18, bias=ones(3)),
    "conv channels": lambda k: P.sec_conv(k, ones(1, 4, 4, 2), ones(2, 2, 3, 1), F18),
    "conv rank": lambda k: P.sec_conv(k, ones(4, 4, 2), ones(2, 2, 2, 1), F18),
    "conv kernel too large": lambda k: P.sec_conv(k, ones(1, 2, 2, 1), ones(5, 5, 1, 1), F18),
    "conv bias": lambda k: P.sec_conv(k, ones(1, 4, 4, 2), ones(2, 2, 2, 1), F18, bias=ones(2)),
    "deconv channels": lambda k: P.sec_deconv(k, ones(1, 4, 4, 2), ones(2, 2, 3, 1), F18),
    "deconv nothing left": lambda k: P.sec_deconv(k, ones(1, 1, 1, 1), ones(2, 2, 1, 1), F18),
    "batch norm gamma": lambda k: P.sec_batch_norm(k, ones(4, 2), ones(3), ones(2), F18),
    "batch norm rank": lambda k: P.sec_batch_norm(k, ones(4), ones(4), ones(4), F18),
    "truncate below": lambda k: P.truncate(k, ones(3), -1),
    "truncate above": lambda k: P.truncate(k, ones(3), 63),
    "alpha 0": lambda k: P.sec_leaky_relu(k, ones(3), F18, 0.0),
    "alpha 1": lambda k: P.sec_leaky_relu(k, ones(3), F18, 1.0),
    "alpha NaN": lambda k: P.sec_leaky_relu(k, ones(3), F18, float("nan")),
    "eps 0": lambda k: P.sec_batch_norm(k, ones(4, 2), ones(2), ones(2), F18, eps=0.0),
    "eps below 1 LSB": lambda k: P.sec_batch_norm(
        k, ones(4, 2), ones(2), ones(2), F18, eps=2.0**-37
    ),
    "eps NaN": lambda k: P.sec_batch_norm(k, ones(4, 2), ones(2), ones(2), F18, eps=float("nan")),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_raise_value_errors(name):
    with pytest.raises(ValueError, match=r"."):
        MISFITS[name](key(32))


def test_64_bit_types_turned_off_after_import_are_noticed():
    """In a process of its own. Nothing may run on in silence with 32-bit words."""
    program = """
import jax, numpy as np
import lpgan_jax
from lpgan_jax import FixedPoint, key, protocols as P
k, fxp = key(0), FixedPoint(18)
words = np.ones((2, 3), np.uint64)
jax.config.update("jax_enable_x64", False)
calls = {
    "share": lambda: lpgan_jax.share(k, [1.0], fxp),
    "reveal": lambda: lpgan_jax.reveal(words, fxp),
    "encode": lambda: fxp.encode([1.0]),
    "decode": lambda: fxp.decode(words),
    "add": lambda: P.sec_add(words, words),
    "mul": lambda: P.sec_mul(k, words, words, fxp),
    "cmp": lambda: P.sec_cmp(k, words, words),
    "truncate": lambda: P.truncate(k, words, 18),
    "relu": lambda: P.sec_relu(k, words),
    "tanh": lambda: P.sec_tanh(k, words, fxp),
    "inv_sqrt": lambda: P.sec_inv_sqrt(k, words, fxp),
}
for name, call in calls.items():
    try:
        call()
    except RuntimeError as error:
        assert "64-bit" in str(error), (name, error)
    else:
        raise SystemExit(f"{name}: ran without 64-bit types")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
