"""The audit follows scans: it looks at the messages and corrections of each iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import own_models
import pytest

import lpgan_jax as lp
from lpgan_jax.analysis.audit import audit_compiled, audit_program
from lpgan_jax.mpc import arithmetic
from lpgan_jax.mpc.party import Party, Source
from lpgan_jax.mpc.secret import Secret

LENGTH = 3
ROWS = jax.ShapeDtypeStruct((2, LENGTH, 2), np.uint64)


def _agrees_with_the_cost(step, args):
    """Whether no problem is found in as many messages, of as many bytes, as they cost."""
    report, cost = lp.audit(step, *args), lp.cost(step, *args)
    assert report.ok, report.problems[:10]
    assert len(report.openings) == cost.exchanges > 0
    assert sum(opening.bytes for opening in report.openings) == cost.online_bytes


def test_every_iteration_is_looked_at():
    """A secret carry; a function that opens; and a scan in a scan, backwards."""

    def function(x, rows):
        def product(total, value):
            return total * value, total

        def body(x, row):
            last, products = jax.lax.scan(product, x, row, reverse=True)
            return jnp.tanh(x + last), products

        return jax.lax.scan(body, x, rows)

    _agrees_with_the_cost(lp.secure(function), (np.zeros(2), np.zeros((2, 2, 2))))


def test_a_scan_of_nothing_sends_nothing():
    step = lp.secure(lambda x, rows: jax.lax.scan(lambda x, row: (x * row, x), x, rows))
    report = lp.audit(step, np.zeros(2), np.zeros((0, 2)))
    assert report.ok, report.problems
    assert not report.openings


@pytest.mark.slow
@pytest.mark.parametrize("name", own_models.EXAMPLES)
def test_every_step_hides_its_messages(name):
    example = own_models.EXAMPLES[name]()
    step = lp.secure(example.step, public=example.public, carry=example.carry)
    _agrees_with_the_cost(step, example.args)


def _multiply(party, carry, row):
    product = arithmetic.mul(party, Secret(carry, 18), Secret(row, 18))
    carry = arithmetic.truncate(party, product, 18).unmasked().words
    return carry, carry


def _scan(body, reverse=False):
    """The program that scans over rows, carrying what the first one is."""
    return lambda party, rows, _: party.scan(body, rows[0], rows, LENGTH, reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_products_of_all_rows_pass(reverse):
    report = audit_program(_scan(_multiply, reverse), ROWS)
    assert report.ok, report.problems
    assert len(report.openings) == 3 * LENGTH


def _found(report, text):
    """The messages, by number, in which both servers tell something."""
    return [
        number
        for number, opening in enumerate(report.openings)
        if len([p for p in opening.problems if text in p]) == 2
    ]


REUSED = "an earlier message depends on"


def test_a_carry_that_is_opened_is_found():
    def body(party, carry, row):
        party.open(carry, "leak")
        return _multiply(party, carry, row)

    report = audit_program(_scan(body), ROWS)
    leaks = [i for i, opening in enumerate(report.openings) if opening.name == "leak"]
    assert len(leaks) == LENGTH
    assert _found(report, "masked by") == leaks


def test_a_mask_that_is_carried_is_found():
    """Each iteration masks its row by what the one before used."""

    def body(party, mask, row):
        party.open(row - mask, "before")
        mask = party.mask(row.shape).share
        party.open(row + 1 - mask, "now")
        return mask, row

    report = audit_program(_scan(body), ROWS)
    assert _found(report, REUSED) == [2, 4]


def test_a_mask_of_all_iterations_is_found(monkeypatch):
    """`StaleParty` refuses it."""
    monkeypatch.setattr(Party, "_check_fresh", lambda self: None)

    def program(party, rows, _):
        mask = party.mask(rows.shape[1:]).share
        return jax.lax.map(lambda row: party.open(row - mask, "leak"), rows)

    assert _found(audit_program(program, ROWS), REUSED) == [1, 2]


def test_a_key_of_all_iterations_is_found(monkeypatch):
    children = Source.children

    def same(self, count):
        keys = children(self, 1)
        return jnp.concatenate([keys] * count)

    monkeypatch.setattr(Source, "children", same)
    report = audit_program(_scan(_multiply), ROWS)
    assert _found(report, REUSED) == list(range(3, 3 * LENGTH))
    numbers = [p.split()[2] for p in report.problems if "a word pads it and another element" in p]
    assert numbers == ["2", "3", "5", "6"]  # those of an iteration are not side by side


def test_corrections_of_another_iteration_are_found(monkeypatch):
    following = Party._next_correction

    def next_correction(self, expected):
        correction = following(self, expected)
        whole = expected.shape[:1] == (LENGTH,)
        return jnp.roll(correction, 1, 0) if whole else correction

    monkeypatch.setattr(Party, "_next_correction", next_correction)
    report = audit_program(_scan(_multiply), ROWS)
    assert [o for o in report.openings if any(REUSED in p for p in o.problems)]
    assert not [p for p in report.problems if p.startswith("DS")]


def test_what_a_compiled_loop_sends_is_counted():
    assert audit_compiled(_scan(_multiply), ROWS) == []
