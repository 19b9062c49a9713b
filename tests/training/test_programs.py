"""A configuration's programs have the shapes that it says."""

import jax
import numpy as np

from lpgan_jax.training import config, programs


def test_the_programs_of_a_configuration():
    settings = config.load("digits", ["batch_size=2", "model.features=1"])
    function, (state, batch), public = programs.training_program(settings)
    assert function.__name__ == "train_step"
    assert all(isinstance(value, jax.Array) for value in public)
    assert batch.images.share.shape == (2, 2, 16, 16, 1)
    function, (same, noise), public = programs.sampling_program(settings)
    assert (function.__name__, public) == ("generate", None)
    assert noise.share.shape == (2, 16, 64)
    _, (_, noise), _ = programs.sampling_program(settings, 3)
    assert noise.share.shape == (2, 3, 64)
    assert jax.tree.map(np.shape, same) == jax.tree.map(np.shape, state)
