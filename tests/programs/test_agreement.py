"""Two roles' programs are compared by digests, and a difference is named."""

import re

import pytest
import tiny_program

from lpgan_jax.programs import agreement, secured


@pytest.fixture(scope="module")
def program():
    return secured(tiny_program.training().program)


def test_equal_programs_agree(program):
    other = agreement.digests_of(secured(tiny_program.training().program))
    assert agreement.difference(program, other) is None
    assert (
        agreement.differing(agreement.short(agreement.digests_of(program)), agreement.short(other))
        is None
    )
    assert set(other) == {"step", "answers['probability']", "init, what is public"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rate": 0.25}, r"step: operation \d+ of \d+ .*constant"),
        ({"batch_size": 4}, r"step: operation \d+ of .*batch"),
        ({"questions": 2}, r"answers\['probability'\]: operation \d+ of"),
    ],
)
def test_a_difference_is_named(program, options, named):
    own = secured(tiny_program.training(**options).program)
    other = agreement.digests_of(program)
    assert re.search(named, agreement.difference(own, other))
    shortly = agreement.differing(
        agreement.short(agreement.digests_of(own)), agreement.short(other)
    )
    assert named.startswith(shortly.replace("[", r"\[").replace("]", r"\]"))


def test_functions_that_one_lacks_are_named(program):
    digests = agreement.digests_of(program)
    fewer = {name: of for name, of in digests.items() if name != "answers['probability']"}
    assert "answers['probability'], init" in agreement.difference(program, fewer)
    assert agreement.differing(fewer, digests)
    changed = digests | {"init, what is public": "0"}
    assert agreement.difference(program, changed) == "init, what is public"
