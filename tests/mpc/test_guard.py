"""The range guard: what it looks at, and what it says of it."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pair_of, run, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lpgan_jax import key
from lpgan_jax.mpc import arithmetic, compare, elementary, guard
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.secret import Secret

SIZES = (3, 5, 1, 4)
BITS = (26, 62, 40, 62)
TENSORS = [
    guard.Watched(f"t {i}", "truncate", bits, size, size)
    for i, (bits, size) in enumerate(zip(BITS, SIZES, strict=True))
]
CHECK = jax.jit(lambda k, s: simulate(lambda party, x, _: guard.check(party, TENSORS, x), k, s))


def said(values, seed=0):
    """(the tensors' bits, the alarm) of the check of integers."""
    outside, alarm = CHECK(key(seed), Secret(pair_of(values, seed), 0))
    return whole(outside.share).tolist(), int(whole(alarm.share))


def of_bits(bits):
    """Integers at and around the ends of a range, and at the ends of the ring."""
    ends = [s * 2**bits + d for s in (1, -1) for d in (-1, 0, 1)]
    ring = [2**63 - 1, -(2**63), 2**63 - 2**bits, -(2**63) + 2**bits - 1]
    return st.sampled_from([*ends, *ring, 0]) | st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*(of_bits(b) for b, n in zip(BITS, SIZES, strict=True) for _ in range(n))))
def test_it_says_which_tensors_are_out_of_range(values):
    """Exact for every integer of the ring: in [-2^bits, 2^bits), or not."""
    within = np.repeat(BITS, SIZES)
    out = [not -(2 ** int(b)) <= v < 2 ** int(b) for v, b in zip(values, within, strict=True)]
    ends = np.cumsum(SIZES)
    wanted = [int(any(out[end - n : end])) for n, end in zip(SIZES, ends, strict=True)]
    assert said(np.array(values, np.int64)) == (wanted, int(any(wanted)))


def test_a_program_without_truncations_raises_no_alarm():
    def function(party, x):
        return guard.check(party, [], x)[1]

    assert whole(run(function, Secret(pair_of(np.zeros(0, np.int64)), 0)).share) == 0


# What it looks at -----------------------------------------------------------------------------


def program(party, x, y, turn):
    """A product that is truncated, a sum that is compared, the same of both in a loop."""
    party.samples = guard.Samples(turn)
    with party.at("first"):
        product = arithmetic.mul(party, x, x)
        arithmetic.truncate(party, product, 10)
        compare.negative(party, y, 27)

    def body(party, carry, row):
        with party.at("loop"):
            return arithmetic.truncate(
                party, arithmetic.mul(party, carry, row), 10
            ).unmasked(), None

    rows = y.rearrange(lambda v: v.reshape(4, -1)[:, :2000])
    party.scan(body, rows[0].unmasked(), rows, 4)
    watched, elements = party.samples.result(party)
    seen[:] = watched
    return elements


seen = []
X = np.arange(5000)
Y = np.arange(20000) % 50
LOOK = jax.jit(
    lambda k, x, y, turn: simulate(
        lambda party, s, turn: program(party, *s, turn), k, (Secret(x, 10), Secret(y, 10)), turn
    )
)


def looked(turn):
    """The elements that are looked at in a turn, by tensor."""
    found = whole(LOOK(key(turn), pair_of(X), pair_of(Y, 1), np.uint64(turn)).share)
    return dict(
        zip(map(str, seen), np.split(found, np.cumsum([t.count for t in seen])[:-1]), strict=True)
    )


def test_it_looks_at_a_part_of_everything_that_is_truncated_or_compared():
    found = looked(0)
    first, second, loop = seen
    assert (first.name, first.operation, first.bits, first.size) == (
        "first 1",
        "truncate",
        62,
        5000,
    )
    assert (second.name, second.operation, second.bits) == ("first 2", "compare", 26)
    assert (loop.name, loop.size, loop.count) == ("loop 1 of a loop 1", 8000, guard.looked_at(8000))
    assert second.count == guard.looked_at(20000) == 625
    # What was owed is settled: the elements are the products' own.
    assert set(found[str(first)]) <= {int(v) ** 2 for v in X}
    assert set(found[str(second)]) <= set(Y.tolist())


def test_all_elements_are_looked_at_alike():
    """A row at random in each turn: as often as a coin with so many sides says."""
    turns, rows = 400, -(-X.size // 512)
    times = collections.Counter()
    for turn in range(turns):
        found = looked(25 * turn)["first 1 (truncate, 62 bits)"]
        times.update(np.sqrt(found).astype(int).tolist())
    low, high = stats.binom.interval(1 - 1e-7, turns, 1 / rows)
    overlap = range((rows - 1) * 512 - (rows * 512 - X.size), (rows - 1) * 512)  # of the last two
    assert all(low <= times[x] <= high for x in range(X.size) if x not in overlap)
    assert all(2 * low <= times[x] <= 2 * high for x in overlap)


def test_all_elements_of_a_loop_are_looked_at():
    """Rows of an iteration, and then of what all iterations gave, are chosen apart."""

    def function(party, x, turn):
        party.samples = guard.Samples(turn)
        _in_a_loop(party, x)
        return party.samples.result(party)[1]

    look = jax.jit(lambda k, x, turn: simulate(function, k, Secret(x, 10), turn))
    x, times = pair_of(X), collections.Counter()
    turns = 400
    for turn in range(turns):
        times.update(whole(look(key(turn), x, np.uint64(turn)).share).tolist())
    # One row of two within an iteration, then one of five: overlaps only add to it.
    low, _ = stats.binom.interval(1 - 1e-7, turns, 1 / 10)
    assert all(times[value] >= low for value in X.tolist())


def _times_small(party, x):
    arithmetic.times_small(party, x, ((1, 3),), 10)


def _in_a_loop(party, x):
    def body(party, carry, row):
        arithmetic.truncate(party, row, 0)
        return carry, None

    party.scan(body, x[0], x.reshape(5, -1), 5)


KINDS = {
    "truncate": (62, lambda party, x: arithmetic.truncate(party, x, 0)),
    "times_small": (62, _times_small),
    "compare": (26, lambda party, x: compare.negative(party, x, 27)),
    "in a loop": (62, _in_a_loop),
    "truncate_by": (62, lambda party, x: arithmetic.truncate_by(party, x, jnp.asarray(3))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", [1, 40])
def test_elements_out_of_range_are_seen_as_often_as_is_said(kind, out):
    """1 - (1 - n/N)^k for k elements, one bit too large, at places of their own, in any step."""
    rng = np.random.default_rng(out)
    bits, operation = KINDS[kind]
    looks = []

    def function(party, x, turn):
        party.samples = guard.Samples(turn)
        operation(party, x)
        looks[:], elements = party.samples.result(party)
        return guard.check(party, looks, elements)[1]

    step = jax.jit(lambda k, x, turn: simulate(function, k, Secret(x, 10), turn))
    trials, alarms = 300, 0
    for trial in range(trials):
        values = X.copy()
        values[rng.choice(X.size, out, replace=False)] = 2**bits
        turn = np.uint64(rng.integers(10**6))
        alarms += int(whole(step(key(trial), pair_of(values, trial), turn).share))
    (look,) = looks
    assert (look.bits, look.size, look.count) == (bits, X.size, 512)
    unseen = stats.hypergeom.pmf(0, X.size, out, look.count)
    assert unseen == pytest.approx((1 - look.count / X.size) ** out, rel=0.03)
    low, high = stats.binom.interval(1 - 1e-6, trials, 1 - unseen)
    assert low <= alarms <= high


def test_values_that_fill_the_range_by_design_are_not_looked_at():
    """What a series truncates is small, whatever it is of."""

    def function(party, x):
        party.samples = guard.Samples(jnp.zeros((), jnp.uint64))
        elementary.tanh(party, x, 18)
        operations[:] = [of.operation for of, _ in party.samples.taken]
        return x

    operations = []
    run(function, Secret(pair_of(np.arange(8)), 18))
    assert operations == ["compare"]


def test_what_has_no_elements_is_left_out():
    def function(party, x):
        party.samples = guard.Samples(jnp.zeros((), jnp.uint64))
        arithmetic.truncate(party, x[:0], 0)
        arithmetic.truncate(party, x, 0)
        watched, elements = party.samples.result(party)
        outside, alarm = guard.check(party, watched, elements)
        names[:] = [of.name for of in watched]
        return outside, alarm

    names = []
    outside, alarm = run(function, Secret(pair_of(np.array([1, 2**62])), 10))
    assert names == ["(no place) 2"]
    assert (whole(outside.share).tolist(), int(whole(alarm.share))) == ([1], 1)
