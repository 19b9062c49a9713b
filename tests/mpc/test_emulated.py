"""Shadow mode: its law is the protocols', in range and out of it.

Statistical tests have fixed seeds; their level is 10^-6 each, so that a false alarm at another seed
is not to be expected.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import integers, on_grid, pair_of, real, run, secret, whole
from uniformity import two_samples

from lpgan_jax import key
from lpgan_jax.mpc import arithmetic, boolean, compare, elementary, emulated, plain, roots
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.ring.words import RING64

LEVEL = 1e-6


def in_shadow(function, *values, seed=0, rounding="stochastic"):
    """function(party, *values) on signed integers [(array, fraction bits), ...]."""
    secrets = [Secret(jnp.asarray(np.asarray(v).astype(np.uint64)), f) for v, f in values]
    program = jax.jit(
        lambda k, s: emulated.run(lambda p, v, _: function(p, *v), k, s, None, rounding)
    )
    return program(key(seed), secrets)


def signed(result):
    return np.asarray(result.share).astype(np.int64)


# Truncation ---------------------------------------------------------------------------------------


def test_truncation_rounds_to_a_neighbour_with_the_dropped_fraction_as_probability():
    """The number of ups is binomial: 6 standard errors, a false alarm in 5 * 10^8."""
    count, shift = 2**16, 18
    for value in (5, -3 * 2**17, 2**61 + 12345, -(2**62), 2**62 - 1):
        x = np.full(count, value, np.int64)
        result = signed(in_shadow(lambda p, v: arithmetic.truncate(p, v, 18), (x, 36)))
        fraction = value % 2**shift / 2**shift
        assert set(np.unique(result)) <= {value >> shift, (value >> shift) + 1}
        ups = (result == (value >> shift) + 1).mean()
        assert abs(ups - fraction) <= 6 * np.sqrt(fraction * (1 - fraction) / count)


@pytest.mark.parametrize("value", [2**62, 3 * 2**61, 2**63 - 1, -(2**62) - 2**60, -(2**63)])
def test_out_of_range_truncations_are_wrong_as_often_as_the_protocols(value):
    """Few outcomes are possible, and both give them with the same frequencies."""
    count = 2**14
    x = np.full(count, value, np.int64)
    shadowed = signed(in_shadow(lambda p, v: arithmetic.truncate(p, v, 18), (x, 36)))
    shared = Secret(pair_of(x), 36)
    secure = whole(run(lambda p, v: arithmetic.truncate(p, v, 18), shared).share)
    outcomes = np.unique(np.concatenate([shadowed, secure]))
    if value < 2**62:  # -2^62 is the last that is never wrong
        assert np.abs(outcomes - (value >> 18)).max() > 2**40
    # One LSB up or down is a matter of the fraction; which multiple of 2^46 is what counts.
    multiple = [np.round((r - (value >> 18)) / 2.0**46) for r in (shadowed, secure)]
    for outcome in np.unique(multiple):
        shares = [(m == outcome).mean() for m in multiple]
        mean = np.mean(shares)
        assert abs(shares[0] - shares[1]) <= 6 * np.sqrt(2 * mean * (1 - mean) / count)


def test_nearest_is_integer_division_after_adding_a_half():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.integers(-(2**61), 2**61, 1000), [0, 2**17, -(2**17), 3 * 2**17]])
    result = signed(
        in_shadow(lambda p, v: arithmetic.truncate(p, v, 18), (x, 36), rounding="nearest")
    )
    assert result.tolist() == [(int(v) + 2**17) // 2**18 for v in x]  # halves up


@pytest.mark.parametrize("log_size", [57, 60, 62])
def test_local_truncation_fails_with_probability_x_over_2_to_the_64(log_size):
    """Wrong by 2^46; otherwise within 1 LSB. 6 standard errors of a binomial."""
    count = 2**16
    for sign in (1, -1):
        x = np.full(count, sign * 2**log_size, np.int64)
        result = signed(
            in_shadow(lambda p, v: arithmetic.truncate(p, v, 18), (x, 36), rounding="local")
        )
        error = result - (x >> 18)
        failed = np.abs(error) > 1
        assert np.all(np.abs(np.abs(error[failed]) - 2**46) <= 1)
        rate = 2.0 ** (log_size - 64)
        assert abs(failed.mean() - rate) <= 6 * np.sqrt(rate * (1 - rate) / count)


def test_truncation_to_the_same_scale_is_free_and_to_more_bits_an_error():
    for rounding in emulated.ROUNDINGS:
        x = np.arange(-3, 3)
        same = in_shadow(lambda p, v: arithmetic.truncate(p, v, 18), (x, 18), rounding=rounding)
        assert signed(same).tolist() == x.tolist()


# What the random words cannot change --------------------------------------------------------------


def test_products_selections_and_comparisons_are_the_protocols():
    """To the bit, of words from the whole ring."""
    rng = np.random.default_rng(1)
    x, y = rng.integers(-(2**63), 2**63 - 1, (2, 500))
    x[:5], y[:5] = [0, 1, -1, 2**62, -(2**63)], [0, -1, 2**63 - 1, 3, 1]

    def product(party, u, v):
        return arithmetic.mul(party, u, v)

    def square(party, u, v):
        return arithmetic.square(party, u)

    def inner(party, u, v):
        return arithmetic.bilinear(party, lambda a, b: (a * b).reshape(50, 10).sum(1), u, v)

    def chosen(party, u, v):
        return compare.select(party, compare.positive(party, u), v)

    def bit(party, u, v):
        return compare.b2a(party, compare.greater(party, u, v))

    def narrow(party, u, v):
        return compare.b2a(party, compare.negative(party, u, 40))

    for function in (product, square, inner, chosen, bit, narrow):
        shared = run(function, Secret(pair_of(x), 18), Secret(pair_of(y, 1), 18))
        shadowed = in_shadow(function, (x, 18), (y, 18))
        np.testing.assert_array_equal(signed(shadowed), whole(shared.share))
        assert shadowed.frac_bits == shared.frac_bits


def test_bit_protocols_run_in_shadow_mode_as_they_are():
    """Nothing is replaced there: the carry trees, on one server that holds everything."""
    rng = np.random.default_rng(2)
    x, y = rng.integers(-(2**40), 2**40, (2, 70))

    def bits(party, u, v):
        u = arithmetic.masked(party, u)
        return Secret(boolean.decompose(party, u), 0)

    rows = np.asarray(in_shadow(bits, (x, 0), (y, 0)).share)
    expected = np.asarray(boolean.bit_slice(RING64, jnp.asarray(x.astype(np.uint64))))
    np.testing.assert_array_equal(rows, expected)

    def sign(party, u, v):
        top = boolean.sign_bit(party, arithmetic.masked(party, u))
        return Secret(boolean.unpack(party.ring, top[0], x.shape), 0)

    assert signed(in_shadow(sign, (x, 0), (y, 0))).tolist() == (x < 0).astype(int).tolist()

    def chosen(party, u, v):
        """By a bit that was opened under a random one."""
        rows = boolean.sign_bit(party, arithmetic.masked(party, u))
        return compare.select(party, compare.bit_of_rows(party, rows, x.shape)[0], v)

    assert signed(in_shadow(chosen, (x, 0), (y, 0))).tolist() == np.where(x < 0, y, 0).tolist()


# Whole protocols ----------------------------------------------------------------------------------


FUNCTIONS = {
    "sigmoid": (elementary.sigmoid, (-8, 8), lambda x: 1 / (1 + np.exp(-x))),
    "tanh": (elementary.tanh, (-8, 8), np.tanh),
    "softplus": (elementary.softplus, (-8, 8), lambda x: np.logaddexp(0, x)),
    "inverse_sqrt": (roots.inverse_sqrt, (0.3, 9), lambda x: x**-0.5),
    "exp": (elementary.exp, (-3, 3), np.exp),
    "log": (elementary.log, (0.1, 50), np.log),
}


@pytest.mark.parametrize(
    ("name", "frac_bits"),
    [*((name, 26) for name in FUNCTIONS), ("sigmoid", 22), ("softplus", 22), ("tanh", 18)],
)
def test_errors_have_the_protocols_distribution(name, frac_bits):
    """Two-sample Kolmogorov-Smirnov at level 10^-6.

    At 26 bits the series' own errors show, which are as large as an LSB; 22 bits are the finest at
    which the shadow leaves them out.
    """
    function, interval, exact = FUNCTIONS[name]
    values = on_grid(np.random.default_rng(3), 2**13, frac_bits, 1.0)
    values = np.round(np.interp(values, [-3, 3], interval) * 2.0**frac_bits) * 2.0**-frac_bits
    words = integers(values, frac_bits)

    def protocol(party, x):
        return function(party, x, frac_bits)

    def error(result):
        return result * 2.0**frac_bits - exact(values) * 2.0**frac_bits

    secure = error(real(run(protocol, secret(values, frac_bits))))
    shadowed = error(signed(in_shadow(protocol, (words, frac_bits))) * 2.0**-frac_bits)
    statistic, limit = two_samples(secure, shadowed, LEVEL)
    assert statistic < limit
    # The test can tell: another precision of the rounding would be noticed.
    assert np.greater(*two_samples(secure, 1.3 * shadowed, LEVEL)) or name == "exp"


def test_a_shadow_party_is_refused_in_another_trace():
    def stale(party, x):
        return jax.vmap(lambda v: arithmetic.truncate(party, Secret(v, 36), 18).share)(x.share)

    with pytest.raises(Exception, match="another trace"):
        in_shadow(lambda p, x: Secret(stale(p, x), 18), (np.arange(4), 36))


def test_what_lies_outside_of_an_exponentials_window_is_no_lack_of_range():
    seat = emulated.EmulatedSeat(key(0))
    x = np.array([-1e6, -1e3, -20.0, 0.0, 5.0, 20.0, 1e6])
    words = np.rint(x * 2.0**18).astype(np.int64).astype(np.uint64)
    result = elementary.exp(seat, Secret(jnp.asarray(words), 18), 18)
    exact = np.exp(np.minimum(x, 16 * np.log(2)))
    # LSB: 1.25, and 2^-24 and the rounding of 2^16's cap, relative.
    np.testing.assert_allclose(seat.real(result), exact, rtol=2.0**-23, atol=1.25 * 2.0**-18)
    assert all(plain.bits_left(seat, seen) > 0 for seen in seat.seen)
