"""LP-GAN as a program of the two servers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from lpgan_jax.gan.lpgan import LPGAN, Batch
from lpgan_jax.programs import Answer, Program

GENERATE = "generate"
"""What SP asks of a trained GAN: SG-FP of noise."""


def gan_program(
    gan: LPGAN,
    batch_size: int,
    frac_bits: int,
    results: Sequence[str] = ("generator",),
    num_samples: int = 64,
) -> Program:
    """Its step, and the images that may be asked of it.

    Args:
        gan: the networks, and how they are trained.
        batch_size: images in a batch of training.
        frac_bits: fraction bits of parameters and batches.
        results: the networks that SP gets.
        num_samples: images in an answer.
    """
    noise, asked = (
        jax.ShapeDtypeStruct((size, gan.noise_size), np.float32)
        for size in (batch_size, num_samples)
    )
    images = jax.ShapeDtypeStruct((batch_size, *gan.image_shape), np.float32)
    mix = jax.ShapeDtypeStruct((batch_size,), np.float32) if gan.loss.penalised else None
    return Program(
        init=gan.init,
        step=gan.train_step,
        batch=Batch(images, noise, None if gan.updates == "simultaneous" else noise, mix),
        learnt=lambda state: state.learnt(results),
        answers={GENERATE: Answer(gan.generate, asked, lambda s: s.learnt()["generator"])},
        frac_bits=frac_bits,
    )
