"""The audit passes on every protocol, and finds every leak that is planted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gans import SGD, adam, small_gan
from helpers import same_scale
from jax import lax
from jax.experimental import io_callback
from jax.sharding import NamedSharding, PartitionSpec

import lpgan_jax as lp
from lpgan_jax.analysis.audit import audit, audit_compiled, audit_program, check_compiled
from lpgan_jax.analysis.audit.ledger import Ledger
from lpgan_jax.analysis.audit.servers import Dealer
from lpgan_jax.analysis.audit.values import Numbering, Value
from lpgan_jax.gan import GENERATE
from lpgan_jax.mpc import arithmetic, boolean, compare, elementary, patent, roots
from lpgan_jax.mpc.exchange import ROUND, exchange_p
from lpgan_jax.mpc.party import AXIS, Dealt, Party, Source, Words, simulate
from lpgan_jax.mpc.rounds import planned
from lpgan_jax.mpc.secret import Secret, is_secret
from lpgan_jax.mpc.server import ServerProgram
from lpgan_jax.mpc.share_trees import shapes_of, tree_of_shapes
from lpgan_jax.programs import shapes
from lpgan_jax.ring.words import RING64

SHAPE = (2, 3)
PAIR = jax.ShapeDtypeStruct((2, *SHAPE), np.uint64)
PUBLIC_KEY = lp.key(0)


def secret(share):
    return Secret(share, 18)


def audited(function, public=None):
    """The report on function(party, x, y[, public])."""

    def program(party, shares, public):
        return results(function(party, *shares, *(() if public is None else (public,))))

    return audit_program(program, (PAIR, PAIR), public)


def results(outputs):
    """What leaves a program: values without their masks, no bits that are for selections."""

    def leaf(value):
        if isinstance(value, compare.Bit):
            return None
        return value.unmasked() if is_secret(value) else value

    return jax.tree.map(leaf, outputs, is_leaf=lambda v: is_secret(v) or isinstance(v, compare.Bit))


# Everything that is in use ----------------------------------------------------------------------


def _mul_of_truncated(party, x, y):
    x, y = (arithmetic.truncate(party, Secret(v, 36), 18) for v in (x, y))
    return arithmetic.mul(party, x, y)


def _bits(party, x):
    return boolean.decompose(party, arithmetic.masked(party, secret(x)))


def _select_twice(party, x, y):
    bit = compare.negative(party, secret(x))
    return compare.select(party, bit, secret(x)), compare.select(party, bit, secret(y))


PROTOCOLS = {
    "mul": lambda party, x, y: arithmetic.mul(party, secret(x), secret(y)),
    "bilinear": lambda p, x, y: arithmetic.bilinear(p, lambda a, b: a @ b.T, secret(x), secret(y)),
    "square": lambda party, x, y: arithmetic.square(party, secret(x)),
    "truncate": lambda party, x, y: arithmetic.truncate(party, secret(x), 4),
    "mul of truncated": _mul_of_truncated,
    "select": _select_twice,
    "greater": lambda party, x, y: compare.greater(party, secret(x), secret(y)),
    "greater, as published": lambda p, x, y: patent.greater(p, secret(x), secret(y)),
    "decompose": lambda party, x, y: _bits(party, x),
    "most significant": lambda party, x, y: boolean.most_significant(party, _bits(party, x)),
    "inverse root": lambda party, x, y: roots.inverse_sqrt(party, secret(x), 18),
    "a root times a factor": lambda party, x, y: roots.Root(party, secret(x)).times(secret(y), 18),
    "over a root": lambda party, x, y: roots.over_root(party, secret(y), secret(x), 20),
    "tanh": lambda party, x, y: elementary.tanh(party, secret(x), 18),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_pass(name):
    report = audited(PROTOCOLS[name])
    assert report.ok, report.table()
    assert report.openings


def test_a_mask_counts_on_either_side():
    """Whatever the other side is: a share of a dealt value, or what was opened before."""

    def program(party, x, y):
        opened = party.open(x - _mask(party), "mask")
        dealt = party.correlate(lambda v: v >> np.uint64(1), party.mask(SHAPE)).share
        for value in (x, opened, dealt, opened + dealt):
            party.open(_mask(party) - value, "mask")
            party.open(value + _mask(party), "mask")
            party.open(_mask(party) ^ value, "mask")

    report = audited(program)
    assert report.ok, report.table()
    assert len(report.openings) == 13


def test_a_training_step_passes():
    """SD with Adam, SG with SGD."""
    gan = small_gan({"generator": SGD, "discriminator": adam()}, depth=1)
    batch = tree_of_shapes(gan.batch, same_scale(gan.batch, 18))
    report = audit_program(gan.train_step, (shapes.state_shapes(gan), batch), gan.schedule(0))
    assert report.ok, report.table()
    assert {o.name.rsplit("/")[-1] for o in report.openings} == {"mask", "and", "bit"}


def test_sampling_passes():
    gan = small_gan(depth=1)
    secrets = shapes.state_shapes(gan), shapes_of((2, gan.batch.noise_d.shape[1]), 18)
    report = audit_program(gan.answer(GENERATE), secrets)
    assert report.ok, report.table()


def test_the_report():
    def program(party, x, y):
        with party.at("first"):
            arithmetic.mul(party, secret(x), secret(y))
        return party.open(x, "bare")

    report = audited(program)
    good, _, bad = report.openings
    assert (good.name, good.shape, good.dtype) == ("first/mask", SHAPE, np.uint64)
    assert (good.elements, good.bytes, good.problems) == (6, 48, [])
    assert good.mask == "6 words of key 0"
    assert bad.mask == "none"
    assert len(bad.problems) == 2
    table = report.table()
    for line in (
        "first: 2 messages, 12 elements, 96 bytes from each server",
        "   mask  uint64[2, 3]              6 words of key 0",
        " ! bare  uint64[2, 3]              none",
        "in all: 3 messages, 18 elements, 144 bytes from each server",
        "PROBLEM: S1 -> S2 bare: 6 of 6 elements are not masked by a word of the sender's own",
    ):
        assert line in table.splitlines()


# Planted leaks: messages ------------------------------------------------------------------------

BARE = "not masked by a word"
REUSED = "an earlier message depends on"
INSIDE = "the message depends on otherwise"
REPEATED = "repeat the mask of another element"
DEALT = "nothing but a share of a dealt value"


def _mask(party, shape=SHAPE, dtype=None):
    return party.mask(shape, dtype).share


def _opened_secret(party, x, y):
    party.open(x, "leak")


def _reused_mask(party, x, y):
    mask = _mask(party)
    party.open(x - mask, "good")
    party.open(y - mask, "leak")


def _constant_mask(party, x, y):
    party.open(x - jnp.uint64(12345), "leak")


def _public_mask(party, x, y, public):
    party.open(x - public, "leak")


def _mask_of_a_public_key(party, x, y):
    party.open(x - jax.random.bits(PUBLIC_KEY, SHAPE, np.uint64), "leak")


def _one_sided_mask(party, x, y):
    party.open(x - party.public_share(_mask(party)), "leak")


def _share_of_a_dealt_mask(party, x, y):
    dealt = party.correlate(lambda v: v, party.mask(SHAPE))
    party.open(x - dealt.share, "leak")


def _word_of_a_correction(party, x, y):
    """S1's share of a dealt product masks a message too."""
    arithmetic.mul(party, secret(x), secret(y)).settled(party)
    words = Words(party._source._shares._keys).draw(SHAPE, np.uint64)
    party.open(x - words, "leak")


def _low_bits(party, x, y):
    party.open(x - (_mask(party) & jnp.uint64(0xFF)), "leak")


def _narrow_words(party, x, y):
    party.open(x - _mask(party, dtype=np.uint32).astype(np.uint64), "leak")


def _float_mask(party, x, y):
    noise = _mask(party).astype(np.float64)
    party.exchange(x.astype(np.float64) + noise, "leak")


def _row_for_all(party, x, y):
    party.open(x - _mask(party, SHAPE[1:]), "leak")


def _word_for_all(party, x, y):
    party.open(x - _mask(party, (1,)), "leak")


def _repeated_in_part(party, x, y):
    mask = _mask(party)
    party.open(jnp.stack([x, y]) - jnp.stack([mask, mask[::-1]]), "leak")


def _scaled_mask(party, x, y):
    party.open(x - 2 * _mask(party), "leak")


def _two_scales(party, x, y):
    masked = x - _mask(party)
    party.open(masked, "good")
    party.open(2 * masked, "leak")


def _masked_sum(party, x, y):
    """Each element has its mask, their sum is sent as well."""
    masked = x - _mask(party)
    party.open(jnp.concatenate([masked.reshape(-1), masked.sum()[None]]), "leak")


def _product_of_masked(party, x, y):
    party.open((x - _mask(party)) * (y - _mask(party)), "leak")


def _mask_twice(party, x, y):
    mask = _mask(party)
    party.open(x - mask + mask, "leak")


def _half_of_the_mask(party, x, y):
    mask = _mask(party)
    party.open(x - mask + (mask >> np.uint64(1)), "leak")


def _mask_told_before(party, x, y):
    mask = _mask(party)
    party.open(y + (mask >> np.uint64(1)) - _mask(party), "good")
    party.open(x - mask, "leak")


def _mask_with_its_dealt_copy(party, x, y):
    """S2 knows x' + s - a for the correction a + b - s: what is left is x' + b."""
    mask = party.mask(SHAPE)
    copy = party.correlate(lambda v: v, mask)
    party.open(x + copy.share - mask.share, "leak")


def _mask_with_its_dealt_half(party, x, y):
    mask = party.mask(SHAPE)
    half = party.correlate(lambda v: v >> np.uint64(1), mask)
    party.open(x + half.share - mask.share, "leak")


def _pool_twice(party, x, y):
    """Another stream from the same keys."""
    mask = _mask(party)
    again = Words(party._source._masks._keys)
    words = again.draw(SHAPE, np.uint64)
    if party._source._both:
        words = jnp.where(party.is_s1, words[0], words[1])
    party.open(x - mask, "good")
    party.open(y - words, "leak")


MESSAGES = [
    (_opened_secret, BARE),
    (_reused_mask, REUSED),
    (_constant_mask, BARE),
    (_mask_of_a_public_key, BARE),
    (_low_bits, BARE),
    (_narrow_words, BARE),
    (_float_mask, BARE),
    (_row_for_all, REPEATED),
    (_word_for_all, REPEATED),
    (_repeated_in_part, REPEATED),
    (_scaled_mask, BARE),
    (_two_scales, BARE),
    (_masked_sum, INSIDE),
    (_product_of_masked, BARE),
    (_mask_twice, INSIDE),
    (_half_of_the_mask, INSIDE),
    (_mask_told_before, REUSED),
    (_mask_with_its_dealt_copy, INSIDE),
    (_mask_with_its_dealt_half, INSIDE),
    (_pool_twice, REUSED),
]


def found(report):
    """{name: problems} of the messages that are not as they should be."""
    return {o.name: o.problems for o in report.openings if o.problems}


@pytest.mark.parametrize(("leak", "text"), MESSAGES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_leak_in_a_message_is_found(leak, text):
    report = audited(leak)
    problems = found(report)
    assert set(problems) == {"leak"}
    assert [p.split(" leak: ")[0] for p in problems["leak"] if text in p] == [
        "S1 -> S2",
        "S2 -> S1",
    ]
    assert set(problems["leak"]) <= set(report.problems)


def test_a_public_input_is_no_mask():
    problems = found(audited(_public_mask, jax.ShapeDtypeStruct(SHAPE, np.uint64)))
    assert len(problems["leak"]) == 2


def test_a_one_sided_mask_is_found():
    (problem,) = found(audited(_one_sided_mask))["leak"]
    assert problem.startswith("S2 -> S1 leak: 6 of 6 elements are not masked")


def test_words_of_a_public_key_among_others_are_found():
    def program(party, x, y):
        party.mask(SHAPE)  # so that the keys below are those of other words
        mine = party._source._masks._keys[..., 9]
        if party._source._both:
            mine = mine[0]
        keys = jnp.stack([mine, PUBLIC_KEY])
        keys = jax.vmap(lambda key: jax.random.split(key)[1])(keys)
        words = jax.vmap(lambda key: jax.random.bits(key, SHAPE[1:], np.uint64))(keys)
        party.open(x - words, "leak")

    for problem in found(audited(program))["leak"]:
        assert problem.endswith("3 of 6 elements are not masked by a word of the sender's own")


@pytest.mark.parametrize("leak", [_share_of_a_dealt_mask, _word_of_a_correction])
def test_a_word_behind_a_correction_is_no_mask(leak):
    """S2 holds the dealt value minus that word."""
    problems = [p for p in found(audited(leak))["leak"] if DEALT in p]
    assert [p[:8] for p in problems] == ["S1 -> S2"]


# Planted leaks: corrections ---------------------------------------------------------------------


def _two_products(party, x, y):
    x = arithmetic.masked(party, secret(x))
    return [arithmetic.mul(party, x, secret(y)) for _ in range(2)]


def dealers(report):
    """What is wrong in DS's program; the results that are made of it may be wrong as well."""
    return [problem for problem in report.problems if problem.startswith("DS")]


def test_one_pseudo_random_share_for_two_dealt_values_is_found(monkeypatch):
    monkeypatch.setattr(
        Source, "shares", lambda self, shape, dtype: Words(self._shares._keys).draw(shape, dtype)
    )
    problems = dealers(audited(_two_products))
    assert problems == [
        "DS: correction 2 (top): a word pads it and another element of a correction"
    ]


def test_corrections_in_the_clear_are_found(monkeypatch):
    monkeypatch.setattr(Source, "shares", lambda self, shape, dtype: jnp.zeros(shape, dtype))
    problems = dealers(audited(_two_products))
    assert len(problems) == 2
    assert all("not padded by words of S1's seed" in problem for problem in problems)


def test_corrections_in_the_clear_in_part_are_found(monkeypatch):
    def shares(self, shape, dtype):
        words = self._shares.draw(shape, dtype)
        return jnp.concatenate([words[:1], jnp.zeros_like(words[1:])])

    monkeypatch.setattr(Source, "shares", shares)
    (problem,) = dealers(audited(PROTOCOLS["mul"]))
    assert problem == "DS: correction 1 (top) is not padded by words of S1's seed"


def test_corrections_padded_by_what_s2_knows_are_found(monkeypatch):
    def shares(self, shape, dtype):
        words = self._masks.draw(shape, dtype)
        return words[1] if self._both else words

    monkeypatch.setattr(Source, "shares", shares)
    assert any("not padded by words of S1's seed" in p for p in audited(_two_products).problems)


def test_a_correction_padded_by_a_mask_that_it_depends_on_is_found(monkeypatch):
    """a b - a for the masks a, b."""

    def shares(self, shape, dtype):
        words = Words(self._masks._keys).draw(shape, dtype)
        return words[0] if self._both else words

    monkeypatch.setattr(Source, "shares", shares)
    problems = audited(PROTOCOLS["mul"]).problems
    assert "DS: correction 1 (top): a word that pads it is used otherwise" in problems


def test_a_correction_that_depends_on_an_opened_value_is_found():
    def program(party, x, y):
        opened = party.open(x - _mask(party), "mask")
        party.correlate(lambda v: v >> np.uint64(1), party.mask(SHAPE).map(lambda v: v * opened))

    (problem,) = audited(program).problems
    assert problem == "DS: correction 1 (top) depends on what the servers open"


# Planted leaks: results -------------------------------------------------------------------------

NO_SUM = "is no sum of fresh shares"
TELLS = "depends on the masks of 1 messages and not on these messages"
TWICE = "one dealt share blinds two of them"


def _truncated_locally(party, x, y):
    return x >> np.uint64(3)


def _a_share_times_a_share(party, x, y):
    return x * y


def _the_mask(party, x, y):
    mask = _mask(party)
    party.open(x - mask, "mask")
    return mask


def _what_is_masked(party, x, y):
    masked = x - _mask(party)
    party.open(masked, "mask")
    return masked


def _the_opened_value(party, x, y):
    return party.open(x - _mask(party), "mask")


def _a_value_with_its_mask(party, x, y):
    return arithmetic.masked(party, secret(x)).mask.share


def _a_dealt_copy_of_the_mask(party, x, y):
    mask = party.mask(SHAPE)
    party.open(x - mask.share, "mask")
    return party.correlate(lambda v: v, mask).share


def _products_without_a_share_of_their_own(party, x, y):
    """The opened value times a share of another mask: SP's halves have the same factor."""
    x, y = (arithmetic.masked(party, secret(v)) for v in (x, y))
    return x.opened * y.mask.share


def _one_dealt_share_for_two(party, x, y):
    x, y = (arithmetic.masked(party, secret(v)) for v in (x, y))
    dealt = party.correlate(lambda a, b: a * b, x.mask, y.mask).share
    common = x.opened * y.mask.share + party.public_share(x.opened * y.opened)
    return dealt + common + x.mask.share * y.opened, dealt + common


RESULTS = [
    (_truncated_locally, NO_SUM),
    (_a_share_times_a_share, NO_SUM),
    (_the_mask, TELLS),
    (_what_is_masked, NO_SUM),
    (_the_opened_value, NO_SUM),
    (_a_value_with_its_mask, TELLS),
    (_a_dealt_copy_of_the_mask, TELLS),
    (_products_without_a_share_of_their_own, NO_SUM),
    (_one_dealt_share_for_two, TWICE),
]


@pytest.mark.parametrize(("leak", "text"), RESULTS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_leak_in_a_result_is_found(leak, text):
    report = audited(leak)
    assert not found(report)
    assert all(p.startswith("S1") for p in report.problems)
    assert [p for p in report.problems if text in p], report.problems


def test_a_share_whose_correction_s2_puts_elsewhere_is_found(monkeypatch):
    """No message tells anything; but S1's half of the second product is not what S2's leaves."""
    received = []

    def next_correction(self, expected):
        received.append(next(self._received))
        is_second = len(received) % 2 == 0  # of two products, in each trace
        return received[-2] if is_second else received[-1]

    monkeypatch.setattr(Party, "_next_correction", next_correction)
    report = audited(_two_products)
    assert not found(report)
    assert report.problems == ["S1 after mask: result[1].words is no sum of fresh shares"]


def _sums_of_shares(party, x, y):
    product = arithmetic.truncate(party, arithmetic.mul(party, secret(x), secret(y)), 18).share
    lines = product.sum(0), jnp.cumsum(product, 1), product[::-1] * np.uint64(3), -product + 5
    return x, x, x + y, x.sum(), 3 * x - y, product, product + x, lines


def test_sums_of_fresh_shares_pass():
    """Also if they overlap: SP learns the same sums of the values."""
    report = audited(_sums_of_shares)
    assert report.ok, report.problems


def test_masks_of_results_do_not_leave_a_program():
    masked = audit_program(lambda party, x, _: arithmetic.masked(party, secret(x)), PAIR)
    assert masked.ok, masked.problems


# Planted leaks: what is traced is not what runs -------------------------------------------------


def test_a_function_that_is_traced_otherwise_the_second_time_is_found():
    calls = []

    def program(party, x, y):
        calls.append(1)
        mask = _mask(party)
        party.open(x - mask if len(calls) < 5 else x - 1, "mask")
        return y + 1 if len(calls) % 2 else y

    assert [p for p in audited(program).problems if "traced otherwise the second time" in p]


def test_a_constant_that_changes_is_found():
    rng = np.random.default_rng(0)
    report = audited(lambda party, x, y: x * rng.integers(0, 2**60, SHAPE, np.uint64))
    assert len([p for p in report.problems if "traced otherwise the second time" in p]) == 2


@pytest.mark.parametrize("where", ["rule", "function"])
def test_a_rule_that_drops_a_mask_in_one_place_only_is_found(where):
    """Simulated, `vmap` runs the rule; deployed, the function runs."""

    @jax.custom_batching.custom_vmap
    def masked(x, mask):
        return x - mask if where == "rule" else x

    @masked.def_vmap
    def rule(size, batched, x, mask):
        return (x if where == "rule" else x - mask), True

    def program(party, x, y):
        party.open(masked(x, _mask(party)), "mask")
        return y

    problems = audited(program).problems
    assert [p for p in problems if "custom_vmap" in p]
    report = audit(lambda key, x: simulate(lambda p, s, _: program(p, s, s), key, x), SHAPE)
    assert report.ok == (where == "function"), report.problems


# Planted leaks: besides messages ----------------------------------------------------------------


def _opened(party, x):
    return party.open(x - _mask(party), "mask")


def _branch(party, x, y):
    lax.cond(x[0, 0] & np.uint64(1) == 0, lambda v: v + 1, lambda v: v * v, y)


def _bound(party, x, y):
    lax.fori_loop(0, x[0, 0].astype(np.int32), lambda i, v: v + y, y)


def _condition(party, x, y):
    lax.while_loop(lambda v: v[0, 0] != 0, lambda v: v >> np.uint64(1), x)


def _condition_in_a_scan(party, x, y):
    def body(carry, row):
        return lax.cond(carry == 0, lambda v: v, lambda v: v + 1, row[0]), carry

    lax.scan(body, jnp.uint64(0), x)


def _bound_by_an_opened_value(party, x, y):
    lax.fori_loop(0, _opened(party, x)[0, 0].astype(np.int32), lambda i, v: v + y, y)


def _bound_by_a_received_value(party, x, y):
    first, second = party.exchange(x - _mask(party), "mask")
    received = jnp.where(party.is_s1, second, first)
    lax.fori_loop(0, received[0, 0].astype(np.int32), lambda i, v: v + 1, 0)


def _branch_on_what_a_loop_may_leave(party, x, y, public):
    """No round of the loop, and x is what it was."""
    x = lax.fori_loop(0, public, lambda i, v: jnp.zeros_like(v), x)
    lax.cond(x[0, 0] == 0, lambda v: v, lambda v: v + 1, y)


def _lookup(party, x, y):
    jnp.arange(8)[x[0, 0] % 8]


def _gather(party, x, y):
    jnp.arange(8)[x % 8]


def _scatter(party, x, y):
    jnp.zeros(8, np.uint64).at[x % 8].add(1)


def _slice(party, x, y):
    lax.dynamic_slice(y, (x[0, 0].astype(np.int64), 0), (1, 1))


def _update(party, x, y):
    lax.dynamic_update_slice(y, y[:1, :1], (0, _mask(party)[0, 0].astype(np.int64)))


def _sort(party, x, y):
    jnp.sort(x)


def _print(party, x, y):
    jax.debug.print("{}", x)


def _debug_callback(party, x, y):
    jax.debug.callback(lambda v: None, x)


def _pure_callback(party, x, y):
    return jax.pure_callback(lambda v: v, PAIR.update(shape=SHAPE), x, vmap_method="sequential")


def _io_callback(party, x, y):
    io_callback(lambda v: None, None, x)


def _callback_of_the_dealer(party, x, y):
    def function(v):
        jax.debug.callback(lambda v: None, v)
        return v >> np.uint64(1)

    party.correlate(function, party.mask(SHAPE))


def _psum(party, x, y):
    lax.psum(x, AXIS)


def _gathered(party, x, y):
    lax.all_gather(x, AXIS)


def _permuted(party, x, y):
    lax.ppermute(x - _mask(party), AXIS, [(0, 1), (1, 0)])


def _disguised(party, x, y):
    party.marked("exchange", "leak", lambda v: exchange_p.bind(v) + v)(x)


def _unmarked(party, x, y):
    exchange_p.bind(x - _mask(party))


def _raw_key(party, x, y):
    keys = party._source._masks._keys
    return jax.random.key_data(keys)


def _loop_over_keys(party, x, y):
    keys = party._source._shares._keys

    def body(state):
        return state[0] + 1, jax.random.bits(keys[state[0]], (), np.uint64)

    return lax.while_loop(lambda state: state[0] < 3, body, (0, jnp.uint64(0)))[1]


def _two_sizes(party, x, y):
    key = party._source._shares._keys[-2]
    return jax.random.bits(key, (3,), np.uint64), jax.random.bits(key, (4,), np.uint64)


def _top(party, x, y):
    lax.top_k(x.astype(jnp.int64), 1)


def _iteration(party, x, y):
    jax.scipy.special.gammainc(x.astype(jnp.float64), y.astype(jnp.float64))


def _native_code(party, x, y):
    out = jax.ShapeDtypeStruct(SHAPE, np.uint64)
    jax.ffi.ffi_call("send_it_home", out, vmap_method="broadcast_all")(x)


OTHERS = [
    (_top, "top_k of a private value"),
    (_iteration, "of a private value: what it does with it is not known"),
    (_native_code, "ffi_call reaches out to the host"),
    (_branch, "cond is steered"),
    (_bound, "the trip count of a while loop depends"),
    (_condition, "the trip count of a while loop depends"),
    (_condition_in_a_scan, "cond is steered"),
    (_bound_by_an_opened_value, "after mask: the trip count of a while loop depends"),
    (_bound_by_a_received_value, "after mask: the trip count of a while loop depends"),
    (_lookup, "dynamic_slice is steered"),
    (_gather, "gather is steered"),
    (_scatter, "scatter"),
    (_slice, "dynamic_slice is steered"),
    (_update, "dynamic_update_slice is steered"),
    (_sort, "sort is steered"),
    (_print, "reaches out to the host"),
    (_debug_callback, "debug_callback reaches out to the host"),
    (_pure_callback, "pure_callback reaches out to the host"),
    (_io_callback, "io_callback reaches out to the host"),
    (_psum, "talks to the other server outside of an exchange"),
    (_gathered, "all_gather talks to the other server outside of an exchange"),
    (_permuted, "ppermute talks to the other server outside of an exchange"),
    (_unmarked, "exchange of a private value: what it does with it is not known"),
    (_disguised, "leak is no plain exchange"),
    (_raw_key, "a key enters random_unwrap"),
    (_loop_over_keys, "a key enters while"),
    (_two_sizes, "one key draws words twice, in two sizes"),
]


@pytest.mark.parametrize(("leak", "text"), OTHERS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_leak_besides_messages_is_found(leak, text):
    report = audited(leak)
    assert not found(report)
    for server in ("S1", "S2"):
        assert any(p.startswith(server) and text in p for p in report.problems), report.problems


def test_floats_are_not_evaluated():
    """300.0 as uint8 is 255 to XLA and 44 to NumPy: a mask that counts in one case is none."""

    def leak(party, x, y):
        mask = party.mask(SHAPE).share
        saturated = lax.convert_element_type(jnp.full(SHAPE, 300.0), jnp.uint8)
        party.open(jnp.where(saturated == 255, x, x - mask), "leak")

    assert not audited(leak).ok


def test_what_a_loop_may_leave_is_private():
    problems = audited(_branch_on_what_a_loop_may_leave, jnp.int64(0)).problems
    assert problems == [f"{server}: cond is steered by a private value" for server in ("S1", "S2")]


def test_a_callback_of_the_dealer_is_found():
    (problem,) = audited(_callback_of_the_dealer).problems
    assert problem == "DS: debug_callback reaches out to the host"


def test_an_exchange_in_a_loop_whose_length_is_not_known_is_found(monkeypatch):
    """`StaleParty` refuses it; were it not for that, one mask would serve every round."""
    monkeypatch.setattr(Party, "_check_fresh", lambda self: None)

    def program(party, x, y, public):
        return lax.fori_loop(0, public, lambda i, v: party.open(v - _mask(party), "leak"), x)

    problems = audited(program, jnp.int64(3)).problems
    for server in ("S1", "S2"):
        assert (
            f"{server}: leak is sent in a branch, or a loop, whose course is not known" in problems
        )


def test_what_only_one_server_sends_is_found(monkeypatch):
    monkeypatch.setattr(Party, "_check_fresh", lambda self: None)

    def program(party, x, y):
        masked = x - _mask(party)
        return lax.cond(party.is_s1, lambda v: party.open(v, "mask"), lambda v: v, masked)

    # Under vmap, DS's program has no branches.
    monkeypatch.setattr(lax, "all_gather", lambda v, axis: jnp.stack([v, v]))
    assert "the two servers do not send the same messages" in audited(program).problems


def test_public_loops_branches_and_indices_pass():
    def program(party, x, y, public):
        x = lax.fori_loop(0, public, lambda i, v: v + y, x)
        x = lax.cond(public > 3, lambda v: v + 1, lambda v: v * v, x)
        x = x + lax.dynamic_slice(y, (public % 2, 0), (1, 3)) + y[:, jnp.full(3, public % 3)]
        x = x + lax.scan(lambda c, row: (c + 1, row * c), jnp.uint64(0), y)[1]
        return arithmetic.mul(party, secret(x), secret(y))

    report = audited(program, jnp.int64(3))
    assert report.ok, report.table()


# The parts of the interpretation ----------------------------------------------------------------

MOVES = {
    "reshape": lambda v: v.reshape(4, 3, 2),
    "reshape of a transpose": lambda v: lax.reshape(v, (6, 4), dimensions=(2, 0, 1)),
    "squeeze": lambda v: v[:, :1].squeeze(1),
    "transpose": lambda v: v.transpose(2, 0, 1),
    "rev": lambda v: v[::-1, :, ::-1],
    "slice": lambda v: v[1:, 0:3:2, 1:],
    "broadcast": lambda v: jnp.broadcast_to(v[:, None], (2, 5, 3, 4)),
    "concatenate": lambda v: jnp.concatenate([v, v[:, :1], v], axis=1),
    "stack": lambda v: jnp.stack([v, v[::-1]], axis=2),
    "signed": lambda v: v.astype(np.int64),
    "bits": lambda v: lax.bitcast_convert_type(v, np.int64),
    "barrier": lambda v: lax.optimization_barrier((v, v + 1))[0],
    "negation": lambda v: -v,
    "complement": lambda v: ~v,
    "difference": lambda v: 5 - v,
    "sum with a row": lambda v: v + jnp.arange(4, dtype=np.uint64),
    "choice": lambda v: jnp.where(np.arange(4) % 2 == 0, v, v[::-1]),
    "no choice": lambda v: jnp.where(np.ones((2, 3, 0), bool), v[..., :0], v[..., 4:]),
    "static indices": lambda v: v[1, :, 2],
    "jit": jax.jit(lambda v: v.T ^ v.T[::-1] * np.uint64(0)),
    "padding": lambda v: jnp.pad(v, ((1, 0), (0, 2), (0, 0))),
}


@pytest.mark.parametrize("name", MOVES)
def test_pads_move_with_their_elements(name):
    """An element that changes with a word is padded by that word and no other."""
    move, size = MOVES[name], 24
    words = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(1000)
    changed = words + np.diag(np.ones(size, np.uint64))
    results = [np.asarray(move(jnp.asarray(v.reshape(2, 3, 4)))) for v in (words, *changed)]
    depends = np.stack([r != results[0] for r in results[1:]])  # [word, ...]
    expected = np.where(depends.any(0), 1 + depends.argmax(0), 0)
    traced = jax.make_jaxpr(move)(jax.ShapeDtypeStruct((2, 3, 4), np.uint64))
    interpreter = Dealer(Numbering(), Ledger())
    interpreter.ledger.spent = np.zeros(size + 1, bool)
    value = Value(ids=np.arange(1, size + 1).reshape(2, 3, 4))
    (result,) = interpreter.run(traced.jaxpr, traced.consts, [value])
    np.testing.assert_array_equal(result.ids, expected)


# The compiled program ---------------------------------------------------------------------------


def _compiled(function, *arguments):
    mesh = jax.make_mesh((2,), (AXIS,), devices=jax.devices()[:2])
    shards = [jax.device_put(a, NamedSharding(mesh, PartitionSpec(AXIS))) for a in arguments]
    return jax.jit(function).lower(*shards).compile().as_text()


def test_the_compiled_program_passes():
    def program(party, shares, _):
        product = arithmetic.mul(party, *map(secret, shares))
        return arithmetic.truncate(party, product, 18)

    assert audit_compiled(program, (PAIR, PAIR)) == []


@pytest.mark.parametrize(
    ("function", "collective"),
    [(lambda x: x.sum(0), "all-reduce"), (lambda x: x[::-1], "collective-permute")],
)
def test_what_xla_sends_of_itself_is_found(function, collective):
    """Outside of shard_map, XLA adds up or moves shares as it sees fit."""
    nothing = planned(jax.make_jaxpr(lambda: ())())
    (problem,) = check_compiled(_compiled(function, np.zeros((2, 3), np.uint64)), nothing)
    assert problem.startswith(f"{collective} is no message of the protocol")


def test_a_callback_in_the_compiled_program_is_found():
    def program(party, share, _):
        jax.debug.callback(lambda v: None, share)
        return share

    (problem,) = audit_compiled(program, PAIR)
    assert re.match(r"a call of \S*callback\S*, which is no round", problem)


@pytest.fixture(scope="module")
def looped():
    """(HLO, plan) of a program with two rounds, and one in a loop of three."""

    def function(seat, x, _):
        def body(seat, carry, _):
            return arithmetic.truncate(seat, Secret(carry, 36), 18).share, None

        product = arithmetic.mul(seat, Secret(x, 18), Secret(x, 18))
        product = arithmetic.truncate(seat, product, 18)
        return seat.scan(body, product.share, None, 3)[0]

    program = ServerProgram(function, jax.ShapeDtypeStruct(PAIR.shape[1:], PAIR.dtype))
    return program.compile().as_text(), program.plan


def _calls(text):
    return [line for line in text.splitlines() if f'"{ROUND}"' in line]


def test_a_compiled_loop_passes(looped):
    text, plan = looped
    assert [times for _, times in plan.rounds()] == [1, 1, 3]
    assert len(_calls(text)) == 3
    assert check_compiled(text, plan) == []


def _without(text):
    return text.replace(_calls(text)[1], "")


def _twice(text):
    return text.replace(_calls(text)[1], "\n".join(_calls(text)[1:2] * 2))


def _in_another_order(text):
    """The second round no longer waits for the first."""
    rounds = sorted(_calls(text), key=lambda line: line[line.index("number") :])
    tokens = [re.search(r"custom-call\(%([^,)]+)", line)[1] for line in rounds]
    return text.replace(rounds[1], rounds[1].replace(tokens[1], tokens[0]))


def _words_for_a_token(text):
    """The second round's token is what the first one received."""
    rounds = sorted(_calls(text), key=lambda line: line[line.index("number") :])
    token = re.search(r"custom-call\(%([^,)]+)", rounds[1])[1]
    (made,) = [line for line in text.splitlines() if re.search(rf"%{re.escape(token)} = ", line)]
    return text.replace(made, made.replace("index=0", "index=1"))


CHANGES = [
    (_words_for_a_token, "round 1 has words of round 0 for its token"),
    (_without, "round . is missing"),
    (_twice, "a call of lpgan_round, which is no round"),
    (_in_another_order, "2 rounds have one token, of the beginning"),
    (lambda text: text.replace(f'"{ROUND}"', '"lpgan_other"'), "a call of lpgan_other"),
    (lambda text: text.replace(f'"{ROUND}"', '"xla_python_callback"'), "a call of xla_python"),
    (lambda text: text.replace("number = 2 ", "number = 7 "), "a call of lpgan_round, which is no"),
    (lambda text: text.replace('"n":"3"', '"n":"4"'), "takes place 4 times, expected 3"),
    (lambda text: text.replace('"known_trip_count"', '"x"'), "takes place None times"),
    (
        lambda text: text.replace(_calls(text)[0], _calls(text)[0].replace("u64[", "u32[", 1)),
        r"round \d sends .*uint32.*, expected .*uint64",
    ),
    (
        lambda text: text + "\n  %s = (u64[3]{0}, u32[], token[]) send(%y, %t), channel_id=2",
        "send is no message of the protocol",
    ),
    (
        lambda text: text + "\n  %o = token[] outfeed(%y, %t)",
        "outfeed is no message of the protocol",
    ),
]


@pytest.mark.parametrize(("change", "problem"), CHANGES)
def test_what_is_changed_in_a_compiled_program_is_found(looped, change, problem):
    text, plan = looped
    changed = change(text)
    assert changed != text
    found = check_compiled(changed, plan)
    assert found
    assert any(re.search(problem, text) for text in found), found


# Executed: the rank of the messages over the masks ----------------------------------------------


class _Given(Source):
    """Hands out given words: masks[2, n]."""

    def __init__(self, words):
        self._words, self.used = words, 0

    def masks(self, shape, dtype):
        size = int(np.prod(shape))
        words = self._words[:, self.used : self.used + size].reshape(2, *shape)
        self.used += size
        return words[0], words[1]


class _Dealt(Party):
    """A party to whom DS gives the same corrections whatever the masks are."""

    def _deal(self, function, plains, bitwise):
        plain = function(*plains)
        self.corrections.append(plain)
        word = jnp.uint64(0x9E3779B97F4A7C15 * len(self.corrections) % 2**64)
        correction = word * (1 + lax.iota(np.uint64, plain.size).reshape(plain.shape))
        correction = correction.astype(plain.dtype)
        first = plain ^ correction if bitwise else plain - correction
        return Dealt(jnp.where(self.is_s1, first, correction), plain)


def _lowest_bits(function, shares, count):
    """The lowest bits of all messages [2, m] as a function of the masks [2, count], and their use.

    What S2 is dealt is fixed, so that this is S2's view of S1 (and S1's of S2).
    """
    used = []

    def run(words):
        source = _Given(words)

        def seat(x, y):
            party = _Dealt(source, RING64)
            function(party, x, y)
            return jnp.concatenate([m.words.reshape(-1) & np.uint64(1) for m in party.messages])

        sent = jax.vmap(seat, axis_name=AXIS)(*shares)
        used[:] = [source.used]
        return sent

    jax.eval_shape(run, jax.ShapeDtypeStruct((2, count), np.uint64))
    return run, used[0]


def _rank(rows):
    """Over GF(2)."""
    rank, rows = 0, [int("".join(map(str, row)), 2) for row in rows.tolist()]
    while rows:
        row = rows.pop()
        if row:
            rank += 1
            lead = 1 << (row.bit_length() - 1)
            rows = [other ^ row if other & lead else other for other in rows]
    return rank


def _ranks(function):
    """For each sender, (rank of its messages' lowest bits over its masks', number of elements)."""
    rng = np.random.default_rng(5)
    shares = rng.integers(0, 2**64, (2, 2, 1), np.uint64)
    run, count = _lowest_bits(function, list(shares), 2**10)
    words = rng.integers(0, 2**64, (2, count), np.uint64)

    @jax.jit
    def jacobian(words):
        flips = jnp.eye(2 * count, dtype=np.uint64).reshape(2, count, 2, count)
        flipped = lax.map(lambda f: lax.map(lambda one: run(words ^ one), f), flips)
        return flipped ^ run(words)  # [flipped server, word, sender, element]

    bits = np.asarray(jacobian(words))
    return [(_rank(bits[i, :, i].T), bits.shape[-1]) for i in (0, 1)]


@pytest.mark.parametrize("name", ["mul", "mul of truncated", "select"])
def test_messages_have_full_rank_over_their_masks(name):
    for rank, elements in _ranks(PROTOCOLS[name]):
        assert rank == elements > 0


def test_a_mask_for_two_values_lacks_rank():
    def program(party, x, y):
        mask = party.mask(x.shape).share
        party.open(x - mask, "first")
        party.open(y - mask, "second")

    assert _ranks(program) == [(1, 2), (1, 2)]
