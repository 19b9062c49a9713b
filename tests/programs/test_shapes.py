"""What would be executed has the shapes that the program says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program

from lpgan_jax.gan import GENERATE
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.prng import abstract_key
from lpgan_jax.programs import secured, shapes
from lpgan_jax.training import config
from lpgan_jax.training.building import build


def test_the_programs_of_a_configuration():
    program = build(config.load("digits", ["batch_size=2", "model.features=1"]))
    function, (state, batch), public = shapes.step_program(program)
    assert function.__name__ == "guarded_step"
    assert public[0] == 0  # its number
    assert all(isinstance(value, jax.Array) for value in public[1:])
    assert batch.images.share.shape == (2, 2, 16, 16, 1)
    function, (same, noise), public = shapes.answer_program(program, GENERATE)
    assert (function.__name__, public) == ("generate", None)
    assert noise.share.shape == (2, 16, 64)
    _, (_, noise), _ = shapes.answer_program(program, GENERATE, 3)
    assert noise.share.shape == (2, 3, 64)
    assert jax.tree.map(np.shape, same) == jax.tree.map(np.shape, state)


def test_what_comes_out_of_them():
    program = secured(tiny_program.training().program)
    found = (
        shapes.told_shapes(program),
        shapes.answer_shapes(program, "probability"),
        shapes.learnt_shapes(program),
    )
    key = abstract_key()
    for of, shaped in (
        (shapes.step_program(program), found[0]),
        (shapes.answer_program(program, "probability"), found[1]),
    ):
        result = jax.eval_shape(functools.partial(simulate, of[0]), key, *of[1:])
        result = result[1] if isinstance(result, tuple) else result
        assert jax.tree.structure(result) == jax.tree.structure(shaped)  # with the scales
        assert jax.tree.map(np.shape, result) == jax.tree.map(np.shape, shaped)
    assert set(found[2]) == {"w"}
    assert found[2]["w"].share.shape == (2, 3, 1)


def test_what_sp_is_told_is_secret():
    of = tiny_program.training().program
    step = of.step
    told = dataclasses.replace(of, step=lambda s, b: (step(s, b)[0], {"one": jnp.ones(())}))
    with pytest.raises(ValueError, match="what SP is told is public in part"):
        secured(told)


def test_rows_of_a_question():
    assert shapes.rows_of({"a": np.zeros((3, 2)), "b": np.zeros(3)}) == 3
    with pytest.raises(ValueError, match="same number"):
        shapes.rows_of({"a": np.zeros((3, 2)), "b": np.zeros(2)})
    with pytest.raises(ValueError, match="same number"):
        shapes.rows_of(np.zeros(()))
