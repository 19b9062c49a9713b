"""From a configuration to what it promises of each image."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from lpgan_jax.privacy.accounting import Mechanism, Privacy, default_rate, noise_for
from lpgan_jax.training import data
from lpgan_jax.training.config import PrivacyConfig, TrainConfig


def resolved(settings: TrainConfig, examples: int | None = None) -> TrainConfig:
    """A configuration whose privacy says all: noise, sampling rate and number of images.

    Args:
        settings: one with privacy or without.
        examples: how many images there are; None: as configured, or as many as the data has.

    Raises:
        FileNotFoundError, ValueError: the images are not there, or are not as many as configured;
            or a setting is out of range.
    """
    of = settings.privacy
    if of is None:
        return settings
    if examples is None:
        examples = of.examples or len(data.load_images(settings.data))
    if of.examples not in (None, examples):
        raise ValueError(f"privacy.examples: {of.examples} given, and there are {examples}")
    made = _resolved(of, examples, settings.batch_size, settings.discriminator_updates)
    return settings.model_copy(update={"privacy": made})


@lru_cache(32)
def _resolved(of: PrivacyConfig, examples: int, batch_size: int, updates: int) -> PrivacyConfig:
    rate = of.sampling_rate or default_rate(examples, batch_size)
    noise = of.noise_multiplier
    if of.epsilon is not None:
        noise = noise_for(
            of.epsilon,
            of.delta,
            updates,
            examples=examples,
            sampling_rate=rate,
            batch_size=batch_size,
        )
    changed = {
        "epsilon": None,
        "noise_multiplier": noise,
        "sampling_rate": rate,
        "examples": examples,
    }
    return of.model_copy(update=changed)


def privacy_of(settings: TrainConfig) -> Privacy:
    """What a configuration that is `resolved` promises.

    Raises:
        ValueError: draws are larger than a batch too often.
    """
    of = settings.privacy
    assert of is not None
    assert of.examples is not None
    assert of.sampling_rate is not None
    assert of.noise_multiplier is not None
    mechanism = Mechanism(of.examples, of.sampling_rate, settings.batch_size, of.noise_multiplier)
    return Privacy(mechanism, of.delta, of.discriminator_steps)


def expected_batch(settings: TrainConfig) -> float:
    """How many images a batch has on average."""
    mechanism = privacy_of(settings).mechanism
    return mechanism.examples * mechanism.sampling_rate


def generated_batch(settings: TrainConfig) -> int:
    """How many images are generated beside it; by default a power of two, whose means are exact."""
    if settings.privacy is not None and settings.privacy.generated is not None:
        return settings.privacy.generated
    return 2 ** max(1, round(math.log2(expected_batch(settings))))


def promises(settings: TrainConfig) -> dict[str, Any]:
    """What a training promises of each image, before it runs: flat, for people and programs.

    `steps` are noised updates of the discriminator, `noise_multiplier` that of one server's noise.

    Raises:
        ValueError, FileNotFoundError: there is no privacy, or as `resolved`.
    """
    if settings.privacy is None:
        raise ValueError("privacy: not configured, expected privacy: {epsilon: ..., delta: ...}")
    settings = resolved(settings)
    of, made = privacy_of(settings), settings.privacy
    assert made is not None
    return {
        **of.stated(settings.steps),
        "noise": made.noise,
        "clip": made.clip,
        "steps": settings.discriminator_updates,
        "training_steps": settings.steps,
        "batch_size": of.mechanism.batch_size,
    }
