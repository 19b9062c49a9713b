"""LP-GAN as a program of the two servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lpgan_jax.gan.lpgan import LPGAN, Batch, PrivateBatch
from lpgan_jax.privacy.mechanism import Noise
from lpgan_jax.programs import Answer, Program

GENERATE = "generate"
"""What SP asks of a trained GAN: SG-FP of noise."""


def gan_program(
    gan: LPGAN,
    batch_size: int,
    frac_bits: int,
    results: Sequence[str] = ("generator",),
    num_samples: int = 64,
    noise: Noise | None = None,
) -> Program:
    """Its step, and the images that may be asked of it.

    Args:
        gan: the networks, and how they are trained.
        batch_size: images in a batch of training.
        frac_bits: fraction bits of parameters and batches.
        results: the networks that SP gets.
        num_samples: images in an answer.
        noise: with differential privacy.
    """
    asked: Any = _floats(num_samples, gan.noise_size)
    if gan.num_classes:
        asked = {"noise": asked, "labels": _integers(num_samples, gan.num_classes)}
    return Program(
        init=gan.init,
        step=gan.train_step,
        batch=_batch(gan, batch_size) if gan.private is None else _private(gan, batch_size),
        learnt=lambda state: state.learnt(results),
        answers={GENERATE: Answer(gan.generate, asked, lambda s: s.learnt()["generator"])},
        frac_bits=frac_bits,
        noise=noise,
        unprotected=() if noise is None else _drawn(gan),
    )


def _drawn(gan: LPGAN) -> tuple[str, ...]:
    """What of a batch is of no image."""
    labels = ("labels_d", "labels_g") if gan.num_classes else ()
    return "noise_d", "noise_g", *labels


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, np.float32)


def _integers(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, np.int32)


def _labels(gan: LPGAN, *shape: int) -> Any:
    return _integers(*shape, gan.num_classes) if gan.num_classes else None


def _batch(gan: LPGAN, size: int) -> Batch:
    noise = _floats(size, gan.noise_size)
    return Batch(
        images=_floats(size, *gan.image_shape),
        noise_d=noise,
        noise_g=None if gan.updates == "simultaneous" else noise,
        mix=_floats(size) if gan.loss.penalised else None,
        labels=_labels(gan, size),
    )


def _private(gan: LPGAN, size: int) -> PrivateBatch:
    assert gan.private is not None
    count, generated = gan.private.count, gan.private.generated
    return PrivateBatch(
        images=_floats(count, size, *gan.image_shape),
        weights=_integers(count, size),
        noise_d=_floats(count, generated, gan.noise_size),
        noise_g=_floats(generated, gan.noise_size),
        labels=_labels(gan, count, size),
        labels_d=_labels(gan, count, generated),
        labels_g=_labels(gan, generated),
        others=_labels(gan, count, size) if gan.private.mismatched else None,
    )
