"""LP-GAN's DCGAN of the paper, 32x32."""

from dataclasses import replace
from typing import Any

from classification import load

import lpgan_jax as lp
from lpgan_jax.training import config
from lpgan_jax.training.building import build_gan, gan_training


def training(batch_size: int = 64) -> lp.Training:
    """The training of the shipped configuration."""
    settings = config.load("mnist", [f"batch_size={batch_size}"])
    gan = build_gan(settings)

    def feed(seed: int, path: str | None) -> Any:
        images, _ = load((32, 32, 1), path)
        return gan_training(settings, gan, images).feed(seed, None)

    return replace(gan_training(settings, gan), feed=feed)
