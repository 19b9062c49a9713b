"""A product with a small public real by one truncation: against Python integers, in all seats."""

from fractions import Fraction

import jax
import numpy as np
import pytest
from helpers import pair_of, run, whole
from hypothesis import given
from hypothesis import strategies as st

import lpgan_jax as lp
from lpgan_jax.mpc import emulated
from lpgan_jax.mpc.arithmetic import signed_digits, times_small
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.share_trees import encoded, scaled

EDGES = [0, 1, -1, 2**40 + 12345, -(2**52), 2**61 + 7, -(2**62), 2**62 - 1]
RATES = [1e-3, 1e-2, 0.3, 2.0**-7, 0.0625]


def factor(digits):
    return sum(Fraction(sign, 2**shift) for sign, shift in digits)


@given(st.floats(2.0**-20, 0.49), st.integers(1, 20))
def test_digits_are_few_and_close(value, bits):
    digits = signed_digits(value, bits)
    assert abs(float(factor(digits)) - value) <= value * 2.0**-bits
    shifts = [shift for _, shift in digits]
    assert shifts == sorted(set(shifts))
    assert len(digits) <= bits // 2 + 2  # of a real, each leaves a third of the last at most


@pytest.mark.parametrize("value", [0.0, -0.1, 0.5, 2.0])
def test_a_factor_that_is_not_small_is_refused(value):
    with pytest.raises(ValueError, match="more than 0 and less than 1/2"):
        signed_digits(value, 10)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dropped", [0, 5])
def test_it_is_within_an_lsb_a_digit_wherever_it_fits(rate, dropped):
    """Also at the ends of the range, where an integer times x would be 2^70."""
    digits, count = signed_digits(rate, 13), 512
    x = np.repeat(np.array(EDGES, np.int64), count)
    shared = Secret(pair_of(x), 42)
    got = whole(run(lambda p, v: times_small(p, v, digits, 42 - dropped), shared).share)
    by = factor(digits) / 2**dropped
    for place, value in enumerate(EDGES):
        errors = [Fraction(int(g)) - value * by for g in got[place * count : (place + 1) * count]]
        assert max(map(abs, errors)) < len(digits)
        # Unbiased: each digit's rounding has a variance of 1/4 at most. 6 standard errors.
        mean = float(sum(errors) / count)
        assert abs(mean) <= 6 * len(digits) / 2 / np.sqrt(count)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "local"])
def test_shadow_mode_rounds_it_likewise(rounding):
    digits = signed_digits(1e-3, 13)
    x = np.linspace(-900.0, 900.0, 4001)
    if rounding == "local":  # which is wrong with probability |x| / 2^64 as an integer
        x *= 1e-6

    def function(party, values, _):
        return times_small(party, values, digits, 42)

    result = jax.jit(lambda k, s: emulated.run(function, k, s, None, rounding))
    got = np.asarray(result(lp.key(0), encoded(x, 42)).share).astype(np.int64)
    off = np.abs(got * 2.0**-42 - x * float(factor(digits))) * 2.0**42
    assert off.max() <= len(digits) + 1
    if rounding == "nearest":
        assert off.max() <= len(digits) / 2 + 1


def test_the_exact_seat_rounds_nothing_and_sees_its_range():
    party, digits = ExactSeat(), signed_digits(1e-3, 13)
    result = times_small(party, scaled(np.array([900.0]), 42), digits, 40)
    assert float(result.share[0]) == pytest.approx(900 * float(factor(digits)) * 2.0**40)
    assert [seen.kind for seen in party.seen] == ["truncate"]
