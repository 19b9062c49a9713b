"""Two roles' programs are compared by digests, and a difference is named."""

import dataclasses
import re

import jax.numpy as jnp
import pytest
import tiny_program

from lpgan_jax.programs import agreement, secured


@pytest.fixture(scope="module")
def training():
    return tiny_program.training()


def changed(training, **fields):
    return dataclasses.replace(training, program=dataclasses.replace(training.program, **fields))


def test_equal_programs_agree(training):
    other = agreement.digests_of(tiny_program.training())
    assert agreement.difference(training, other) is None
    own = agreement.short(agreement.digests_of(training))
    assert agreement.differing(own, agreement.short(other)) is None
    assert set(other) == {
        "the code of lpgan_jax",
        "step",
        "answers['probability']",
        "init, what is public",
        "what is opened",
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rate": 0.25}, r"step: operation \d+ of \d+ .*constant"),
        ({"batch_size": 4}, r"step: operation \d+ of .*batch"),
        ({"questions": 2}, r"answers\['probability'\]: operation \d+ of"),
    ],
)
def test_a_difference_is_named(training, options, named):
    own, other = tiny_program.training(**options), agreement.digests_of(training)
    assert re.search(named, agreement.difference(own, other))
    shortly = agreement.differing(
        agreement.short(agreement.digests_of(own)), agreement.short(other)
    )
    assert named.startswith(shortly.replace("[", r"\[").replace("]", r"\]"))


def test_what_is_opened_is_compared_too(training):
    digests = agreement.digests_of(training)
    step = training.program.step

    def renamed(params, batch):
        params, told = step(params, batch)
        return params, {"error": told["loss"]}

    others = [
        changed(training, learnt=lambda state: {}),
        changed(training, learnt=lambda state: {"b": state["b"]}),
        changed(training, step=renamed),
        dataclasses.replace(training, sample=None),
    ]
    for other in others:
        assert agreement.difference(other, digests) == "what is opened"


def test_functions_that_one_lacks_are_named(training):
    digests = agreement.digests_of(training)
    fewer = {name: of for name, of in digests.items() if name != "answers['probability']"}
    assert "answers['probability'], init" in agreement.difference(training, fewer)
    for name in ("init, what is public", "the code of lpgan_jax"):
        assert agreement.difference(training, digests | {name: "0"}) == name


def test_what_sp_gets_is_chosen_and_nothing_else(training):
    """A function of shares could be a message, of both halves."""
    for learnt, message in (
        (lambda state: state["w"].sum(0), "learnt: expected to choose leaves alone"),
        (lambda state: {"w": state["w"], "one": 1.0}, "expected leaves of the state alone, got"),
    ):
        with pytest.raises(ValueError, match=message):
            secured(changed(training, learnt=learnt).program)
    chosen = secured(training.program).learnt({"w": 1, "b": 2})
    assert chosen == {"w": 1}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda params, x: jnp.ones(4), r"answers\['probability'\]: is public in part"),
        (lambda params, x: (x @ params["w"]).sum(), r"shape \(\), expected \(4,\) rows"),
    ],
)
def test_an_answer_has_a_row_for_each_of_the_question(training, function, message):
    answer = dataclasses.replace(training.program.answers["probability"], function=function)
    other = changed(training, answers={"probability": answer})
    with pytest.raises(ValueError, match=message):
        agreement.digests_of(other)
