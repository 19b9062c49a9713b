"""What DS brings to the training of a GAN: batches of images and noise."""

from __future__ import annotations

import numpy as np

from lpgan_jax.gan import LOSSES, Batch
from lpgan_jax.programs.batches import Batches, Stream, random_stream
from lpgan_jax.training.config import TrainConfig


class DataSource:
    """DS's images and noise: everything that a run's seed decides, step by step."""

    def __init__(self, settings: TrainConfig, seed: int, images: np.ndarray) -> None:
        """`images`: float32 [N, H, W, C] in [-1, 1]."""
        expected = (settings.data.image_size, settings.data.image_size, settings.data.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"images: expected [N, {', '.join(map(str, expected))}], got {images.shape}"
            )
        self._settings, self._seed, self._images = settings, seed, images
        self._order = Batches(len(images), settings.batch_size, seed)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0; the same after a resumption."""
        rng = random_stream(self._seed, Stream.NOISE, step)
        size, noise_size = self._settings.batch_size, self._settings.model.noise_size
        penalised = LOSSES[self._settings.model.loss].penalised
        once = self._settings.updates == "simultaneous"
        return Batch(
            self._images[self._order.indices(step)],
            rng.normal(size=(size, noise_size)),
            None if once else rng.normal(size=(size, noise_size)),
            rng.uniform(size=size) if penalised else None,
        )
