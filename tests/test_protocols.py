"""Every public protocol against exact integers or float64 over its stated domain.

Inputs are integers X = x 2^f, so that references are exact; errors are in LSB of the result. Exact
references that fit neither float64 nor int64 are Python integers (object arrays).
"""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import integers, on_grid, pair, pair_of, whole
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
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
    "sqrt": lambda k, x: P.sec_sqrt(k, x, F18),
    "inv_sqrt": lambda k, x: P.sec_inv_sqrt(k, x, F18),
    "inv": lambda k, x: P.sec_inv(k, x, F18),
    "div": lambda k, x: P.sec_div(k, x, x, F18),
    "log": lambda k, x: P.sec_log(k, x, F18),
    "exp": lambda k, x: P.sec_exp(k, x, F18),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_protocols_keep_the_shapes_of_scalars_and_empty_arrays(name):
    for shape in ((), (0, 3), (1, 1)):
        result = jax.eval_shape(ELEMENTWISE[name], key(5), pair(np.zeros(shape)))
        assert (result.shape, result.dtype) == ((2, *shape), jnp.uint64)


@pytest.mark.parametrize(
    ("name", "at_one"), [("relu", 1.0), ("tanh", np.tanh(1)), ("inv_sqrt", 1.0)]
)
def test_elementwise_protocols_run_on_scalars_and_empty_arrays(name, at_one):
    assert ELEMENTWISE[name](key(5), pair(np.zeros((0, 3)))).shape == (2, 0, 3)
    # 2 LSB is the largest bound of these, and the inverse root's is 1 LSB + 2^-24.
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


# Range reduction, roots, division, elementary functions ------------------------------------------

# An error bound is (LSB, part of the exact value), of the docstring at f fraction bits.


@dataclasses.dataclass(frozen=True)
class Function:
    """A protocol of one argument, what it stands for, and where."""

    protocol: Callable[..., jax.Array]
    exact: Callable[[np.ndarray, int], np.ndarray]  # of integers at f fraction bits, in LSB
    bound: Callable[[int], tuple[float, float]]
    log_range: int = 62  # |X| < 2^this as an integer
    lowest: int | None = 1  # None: either sign, and 0; -1: either sign, not 0
    fraction_bits: tuple[int, ...] = (12, 18, 24)


def _real(function):
    """A function of reals as one of integers at f fraction bits."""
    return lambda x, f: function(x * 2.0**-f) * 2.0**f


def _capped_exp(x):
    return np.exp(np.minimum(x, 60.0))


def _exp(x, f):
    return np.minimum(_real(_capped_exp)(x, f), 2.0**34)


FUNCTIONS = {
    "sqrt": Function(P.sec_sqrt, _real(np.sqrt), lambda f: (1, 2.0**-25), 62, 0, (12, 17, 18, 24)),
    "inv_sqrt": Function(
        P.sec_inv_sqrt,
        _real(lambda x: 1 / np.sqrt(x)),
        lambda f: (1, 2.0**-24),
        62,
        1,
        (12, 17, 18, 24),
    ),
    "inv": Function(P.sec_inv, _real(np.reciprocal), lambda f: (1, 2.0**-25), 62, -1),
    "log": Function(P.sec_log, _real(np.log), lambda f: (2 + 2.0 ** (f - 24), 0)),
    "exp": Function(P.sec_exp, _exp, lambda f: (1.25, 2.0**-24 + 2.0 ** -(f + 9)), 54, None),
    "sigmoid": Function(
        P.sec_sigmoid,
        _real(lambda x: np.exp(-np.logaddexp(0, -x))),
        lambda f: (2 if f <= 24 else 4, 0),
        61,
        None,
        (12, 18, 28),
    ),
    "tanh": Function(P.sec_tanh, _real(np.tanh), lambda f: (2 if f <= 24 else 4, 0), 61, None),
    "softplus": Function(
        P.sec_softplus,
        _real(lambda x: np.logaddexp(0, x)),
        lambda f: (3 if f <= 18 else 2.0 ** (f - 19), 0),
        61,
        None,
    ),
}
SLOW = {("sigmoid", 28), ("tanh", 24)}  # series of more than 50 terms
CASES = [
    pytest.param(name, f, marks=[pytest.mark.slow] if (name, f) in SLOW else [])
    for name, function in FUNCTIONS.items()
    for f in function.fraction_bits
]
SIZE = 1024  # values at a time, so that one program serves all examples
# Smaller examples say no more, and each takes a run.
examples = settings(
    max_examples=5, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)


@functools.cache
def program(name, f):
    """Compiled without LLVM's optimisations, in a third of the time; the integers are the same."""
    return jax.jit(
        lambda k, *shares: getattr(P, f"sec_{name}")(k, *shares, FixedPoint(f)),
        compiler_options={"xla_backend_optimization_level": "0"},
    )


def batch(values, log_range, lowest, f, seed):
    """SIZE integers of a domain: the given ones, 2^k and 2^k +- 1, every size, densely near 0."""
    rng = np.random.default_rng(seed)
    powers = 2 ** np.arange(log_range)
    sizes = np.floor(2.0 ** rng.uniform(0, log_range, SIZE // 2)).astype(np.int64)
    dense = np.abs(integers(rng.uniform(-24, 24, SIZE), f))
    values = np.concatenate([values, powers - 1, powers, powers + 1, 2 * powers - 1, sizes, dense])
    values = np.clip(values, 1 - 2**log_range, 2**log_range - 1)[:SIZE].astype(np.int64)
    if lowest in (0, 1):
        return np.maximum(np.abs(values), lowest)
    values *= rng.choice([-1, 1], SIZE)
    return np.where(values == 0, 1, values) if lowest == -1 else values


def assert_close(z, exact, bound):
    lsb, relative = bound
    # The last term is what a float64 reference may be off by.
    excess = np.abs(z - exact) - (lsb + (relative + 2.0**-50) * np.abs(exact))
    worst = excess.argmax()
    assert excess[worst] <= 0, (worst, z[worst], exact[worst])


@pytest.mark.parametrize(("name", "f"), CASES)
@examples
@given(values=st.lists(st.integers(-(2**62), 2**62), max_size=32), seed=st.integers(0, 2**32 - 1))
def test_functions_err_as_documented_on_their_whole_domains(name, f, values, seed):
    function = FUNCTIONS[name]
    x = batch(np.array(values, np.int64), function.log_range, function.lowest, f, seed)
    z = whole(program(name, f)(key(seed), pair_of(x, seed)))
    assert_close(z, function.exact(x, f), function.bound(f))
    if name == "exp":
        assert np.all(z[x * 2.0**-f < -(f + 2) * np.log(2)] == 0)


# What was agreed for 18 bits: 4 LSB or this part of the exact value, whichever is larger.
ACCEPTED = {
    "inv": 2.0**-14,
    "sqrt": 2.0**-14,
    "inv_sqrt": 2.0**-14,
    "log": 2.0**-14,
    "exp": 2.0**-12,
    "sigmoid": 2.0**-14,
    "tanh": 2.0**-14,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_functions_are_as_good_as_agreed_at_18_bits(name):
    """From 1 LSB to the largest value; exp also densely on [-12, 8]."""
    function = FUNCTIONS[name]
    for seed in range(8):
        x = batch(np.zeros(0), function.log_range, function.lowest, 18, [9, seed])
        if name == "exp":
            x[: SIZE // 2] = integers(np.linspace(-12, 8, SIZE // 2), 18) + seed
        z = whole(program(name, 18)(key(seed), pair_of(x, seed)))
        exact = function.exact(x, 18)
        error, allowed = np.abs(z - exact), np.maximum(4, ACCEPTED[name] * np.abs(exact))
        assert np.all(error <= allowed), (error / allowed).max()


OUTSIDE = [0, -1, -(2**40), -(2**61), -(2**62), 2**62, -(2**63), 2**63 - 1, 2**61, 2**54]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_out_of_the_domain_give_some_number_and_do_not_disturb_others(name):
    function = FUNCTIONS[name]
    x = batch(np.zeros(0), function.log_range, function.lowest, 18, 10)
    x[1 : 2 * len(OUTSIDE) : 2] = OUTSIDE
    shares = program(name, 18)(key(17), pair_of(x))
    assert (shares.shape, shares.dtype) == ((2, SIZE), jnp.uint64)
    z, outside = whole(shares), np.isin(np.arange(SIZE), 1 + 2 * np.arange(len(OUTSIDE)))
    inside = ~outside
    assert_close(z[inside], function.exact(x[inside], 18), function.bound(18))
    at_zero = z[1] * 2.0**-18
    if name in ("inv", "inv_sqrt"):  # as large as of 1 LSB, or larger
        assert abs(at_zero) > 2.0**8
    elif name == "sqrt":
        assert abs(at_zero) <= 2.0**-18
    elif name == "log":  # no logarithm of a value of the domain is as large
        assert abs(at_zero) < 64


def quotients(f, seed, drawn=()):
    """x and y of either sign with |y| < 2^28, |x / y| < 2^(34 - f) and |x| < 2^(62 - f)."""
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0, 28 + f, SIZE)
    y = np.floor(2.0**sizes).astype(np.int64)
    powers = 2 ** np.arange(28 + f)
    edges = np.concatenate([np.abs(drawn).astype(np.int64), powers, powers + 1, 2 * powers - 1])
    y[: len(edges)] = edges
    y = np.clip(y, 1, 2 ** (28 + f) - 1)
    # At every size of the quotient, from far below 1 LSB to the largest (34 bits in LSB).
    q = 2.0 ** rng.uniform(-4, 34, SIZE)
    q[:: SIZE // 8] = 2.0**34 * (1 - 2.0**-40)
    x = [int(b * c * 2.0**-f) for b, c in zip(y.tolist(), q.tolist(), strict=True)]
    x = np.minimum(np.array(x, np.int64), 2**62 - 1)
    return x * rng.choice([-1, 1], SIZE), y * rng.choice([-1, 1], SIZE)


@fractions
@examples
@given(drawn=st.lists(st.integers(1, 2**52), max_size=32), seed=st.integers(0, 2**32 - 1))
def test_quotients_err_as_documented_on_their_whole_domain(f, drawn, seed):
    x, y = quotients(f, seed, drawn)
    z = whole(program("div", f)(key(seed), pair_of(x, seed), pair_of(y, seed + 1)))
    assert_close(z, x / y * 2.0**f, (2, 2.0**-23))


def test_quotients_by_zero_do_not_disturb_others():
    x, y = quotients(18, 11)
    y[::5] = 0
    z = whole(program("div", 18)(key(18), pair_of(x, 1), pair_of(y, 2)))
    inside = y != 0
    assert z.shape == (SIZE,)
    assert_close(z[inside], x[inside] / y[inside] * 2.0**18, (2, 2.0**-23))


@pytest.mark.parametrize(("x_shape", "y_shape"), [((), (2, 3)), ((2, 1), (3,))])
def test_quotients_broadcast_as_numpy_does(x_shape, y_shape):
    rng = np.random.default_rng(12)
    x, y = rng.integers(1, 2**20, x_shape), -rng.integers(2**17, 2**20, y_shape)
    z = program("div", 18)(key(19), pair_of(x, 1), pair_of(y, 2))
    assert z.shape == (2, 2, 3)
    assert_close(whole(z).ravel(), (x / y).ravel() * 2.0**18, (2, 2.0**-23))


@functools.cache
def _conversion(f):
    return jax.jit(
        lambda k, u: P.range_conversion(k, u, FixedPoint(f)),
        compiler_options={"xla_backend_optimization_level": "0"},
    )


@fractions
@examples
@given(values=st.lists(st.integers(1, 2**62 - 1), max_size=32), seed=st.integers(0, 2**32 - 1))
def test_range_conversion_is_exact(f, values, seed):
    """u = m 2^p and 1/2 <= m < 1, as fractions; the docstring's m and p of 0."""
    u = batch(np.array(values, np.int64), 62, 1, f, seed)
    u[-1] = 0
    m, power = _conversion(f)(key(seed), pair_of(u, seed))
    *normal, zero = zip(u.tolist(), whole(m).tolist(), whole(power).tolist(), strict=True)
    for value, mantissa, scaled in normal:
        m_real, two_to_p = Fraction(mantissa, 2**62), Fraction(2 ** (62 - f), scaled)
        assert Fraction(1, 2) <= m_real < 1, value
        assert m_real * two_to_p == Fraction(value, 2**f), value
        assert scaled & (scaled - 1) == 0, value
    p = 62 - f - np.log2(zero[2])
    assert (zero[1], p) == (0, 1 - f)


@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_range_conversion_keeps_shapes(shape):
    m, power = jax.eval_shape(_conversion(18), key(20), pair(np.ones(shape)))
    assert m.shape == power.shape == (2, *shape)
    assert m.dtype == power.dtype == jnp.uint64


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

    Errors below 1 LSB each: the mean, 1/sqrt (and 2^-24 of it), k = gamma/sqrt and the result, in y
    = k (x - mean) + beta. The mean also has 2^-20 of itself where the count is no power of two. The
    mean's error d enters the variance as d^2; with |x - mean| < 6 sqrt(var + eps) and, at f = 12,
    d < 0.08 sqrt(eps), that adds less than a quarter of the mean's own k d.
    """
    axes = tuple(range(x.ndim - 1))
    mean, count = x.mean(axes), x[..., 0].size
    of_mean = 1 + (count & (count - 1) != 0) * np.abs(mean) * 2.0 ** (f - 20)
    scale = 1 + np.abs(gamma) * (1 + 2.0**-24 * inverse * 2.0**f)
    return np.abs(x - mean) * scale + (1.25 * np.abs(gamma) * inverse * of_mean + 1) + 1


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
    "published cmp": lambda k, x: P.sec_cmp(k, x, x[:, :1], variant="patent"),
    "decompose": P.bit_decompose,
    "range_conversion": lambda k, x: P.range_conversion(k, x, F18),
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
    "published cmp": lambda k: P.sec_cmp(k, ones(2), ones(3), variant="patent"),
    "div": lambda k: P.sec_div(k, ones(2), ones(3), F18),
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
words, bits = np.ones((2, 3), np.uint64), np.ones((2, 3), np.uint8)
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
    "sigmoid": lambda: P.sec_sigmoid(k, words, fxp),
    "softplus": lambda: P.sec_softplus(k, words, fxp),
    "sqrt": lambda: P.sec_sqrt(k, words, fxp),
    "inv_sqrt": lambda: P.sec_inv_sqrt(k, words, fxp),
    "inv": lambda: P.sec_inv(k, words, fxp),
    "div": lambda: P.sec_div(k, words, words, fxp),
    "log": lambda: P.sec_log(k, words, fxp),
    "exp": lambda: P.sec_exp(k, words, fxp),
    "range_conversion": lambda: P.range_conversion(k, words, fxp),
    "decompose": lambda: P.bit_decompose(k, words),
    "xor": lambda: P.sec_xor(bits, bits),
    "and": lambda: P.sec_and(k, bits, bits),
    "or": lambda: P.sec_or(k, bits, bits),
    "msb": lambda: P.sec_msb(k, bits),
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
