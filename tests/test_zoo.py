"""The files of the zoo, and the shipped classifier, are programs whose parts fit together."""

from pathlib import Path

import jax
import numpy as np
import pytest

from lpgan_jax.training import program_file

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SHARED = ("classification", "gradients", "measure")
FILES = [EXPERIMENTS / "classifier.py"] + [
    file for file in sorted((EXPERIMENTS / "zoo").glob("*.py")) if file.stem not in SHARED
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_programs_parts_fit_together(file):
    training = program_file.load(str(file), {"batch_size": 4})
    program = training.program
    try:
        state = jax.eval_shape(lambda: program.init(np.random.default_rng(0)))
    except jax.errors.TracerArrayConversionError:  # a GAN's parameters are made in NumPy
        state = program.init(np.random.default_rng(0))
    after, told = jax.eval_shape(program.step, state, program.batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
    assert training.row(jax.tree.map(lambda leaf: np.zeros(leaf.shape), told))
    for answer in program.answers.values():
        rows = jax.tree.leaves(answer.question)[0].shape[0]
        found = jax.eval_shape(answer.function, answer.part(state), answer.question)
        assert all(leaf.shape[0] == rows for leaf in jax.tree.leaves(found))
    if training.sample is not None:
        question = training.sample_question(0)
        wanted = program.answers[training.sample.answer].question
        assert jax.tree.map(np.shape, question) == jax.tree.map(lambda x: x.shape, wanted)


def test_the_classifiers_batches_are_the_digits():
    draw = program_file.load(str(FILES[0]), {}).feed(0, None)
    images, targets = draw(0)
    assert images.shape == (64, 8, 8, 1)
    np.testing.assert_array_equal(targets.sum(-1), 1)
    assert not np.array_equal(draw(1)[0], images)
    np.testing.assert_array_equal(draw(0)[0], images)
