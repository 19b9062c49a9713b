"""What DS brings to the training of a GAN: batches of images and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lpgan_jax.gan import LOSSES, Batch, PrivateBatch
from lpgan_jax.programs.batches import Batches, Stream, poisson, random_stream
from lpgan_jax.training import data
from lpgan_jax.training.config import TrainConfig
from lpgan_jax.training.private import generated_batch, privacy_of


class DataSource:
    """DS's images and noise: everything that a run's seed decides, step by step.

    With differential privacy the seed decides which images are drawn: whoever knows it is not
    protected from. (The noise that hides them is not from it.)
    """

    def __init__(
        self,
        settings: TrainConfig,
        seed: int,
        images: np.ndarray,
        labels: np.ndarray | None = None,
    ) -> None:
        """Check the data.

        Args:
            settings: the configuration, `resolved` if there is privacy.
            seed: decides everything.
            images: float32 [N, H, W, C] in [-1, 1].
            labels: int [N], if the configuration wants labels.

        Raises:
            ValueError: images or labels do not fit the configuration.
        """
        expected = (settings.data.image_size, settings.data.image_size, settings.data.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"images: expected [N, {', '.join(map(str, expected))}], got {images.shape}"
            )
        self._settings, self._seed, self._images = settings, seed, images
        self._labels = None
        if settings.data.labels:
            self._labels = _checked(labels, len(images), settings.data.classes)
        self.batch: Callable[[int], Any]
        """The batch of a step, counted from 0; the same after a resumption."""
        if settings.privacy is None:
            self._order = Batches(len(images), settings.batch_size, seed)
            self.batch = self._batch
        else:
            self._sampled = _sampled(settings, (images, self._labels), seed)
            self.batch = self._private_batch

    @classmethod
    def load(cls, settings: TrainConfig, seed: int) -> DataSource:
        """That of the data that a configuration names.

        Raises:
            FileNotFoundError, ValueError: as `data.load_images`, or the data do not fit.
        """
        labels = data.load_labels(settings.data) if settings.data.labels else None
        return cls(settings, seed, data.load_images(settings.data), labels)

    def _batch(self, step: int) -> Batch:
        rng = random_stream(self._seed, Stream.NOISE, step)
        size, noise_size = self._settings.batch_size, self._settings.model.noise_size
        penalised = LOSSES[self._settings.model.loss].penalised
        once = self._settings.updates == "simultaneous"
        chosen = self._order.indices(step)
        return Batch(
            self._images[chosen],
            rng.normal(size=(size, noise_size)),
            None if once else rng.normal(size=(size, noise_size)),
            rng.uniform(size=size) if penalised else None,
            None if self._labels is None else self._labels[chosen],
        )

    def _private_batch(self, step: int) -> PrivateBatch:
        settings, labels = self._settings, self._labels
        assert settings.privacy is not None
        rng = random_stream(self._seed, Stream.NOISE, step)
        count, generated = settings.privacy.discriminator_steps, generated_batch(settings)
        (images, own), weights = self._sampled(step)

        def classes(*shape: int) -> np.ndarray:
            number = settings.data.classes
            return data.one_hot(rng.integers(number, size=shape), number)

        pair = classes(generated // 2)
        pairs = np.concatenate([pair, pair, classes(generated % 2)])

        return PrivateBatch(
            images=images,
            weights=weights,
            noise_d=rng.normal(size=(count, generated, settings.model.noise_size)),
            noise_g=rng.normal(size=(generated, settings.model.noise_size)),
            labels=own,
            labels_d=None if labels is None else classes(count, generated),
            labels_g=None if labels is None else pairs,
            others=_others(own, rng) if settings.privacy.mismatched else None,
        )


def _sampled(settings: TrainConfig, arrays: Any, seed: int) -> Callable[[int], Any]:
    """A step's images and labels, and their weights.

    Raises:
        ValueError: draws are larger than a batch too often.
    """
    privacy, count = privacy_of(settings), len(arrays[0])
    if count != privacy.mechanism.examples:  # another owner's; what is promised is for all
        own = replace(privacy, mechanism=replace(privacy.mechanism, examples=count))
        own.epsilon(settings.steps)
    rate = privacy.mechanism.sampling_rate
    return poisson(arrays, rate, settings.batch_size, seed, privacy.updates)


def _others(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One-hot classes, each another one, and any other one with the same probability."""
    classes = labels.shape[-1]
    shift = rng.integers(1, classes, labels.shape[:-1])
    return data.one_hot((labels.argmax(-1) + shift) % classes, classes)


def _checked(labels: np.ndarray | None, count: int, classes: int) -> np.ndarray:
    """int32 [N, classes].

    Raises:
        ValueError: there are none, or a class is too large.
    """
    if labels is None:
        raise ValueError("data.labels: the data has no classes (a folder has one for each folder)")
    if len(labels) != count:
        raise ValueError(f"labels: {len(labels)} given, expected one for each of {count} images")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels: {labels.min()} to {labels.max()}, expected classes below {classes} "
            "(data.classes)"
        )
    return data.one_hot(labels, classes)
