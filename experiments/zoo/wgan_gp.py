"""A Wasserstein GAN with gradient penalty, on digits: LP-GAN's program with another loss."""

import lpgan_jax as lp
from lpgan_jax.training import config
from lpgan_jax.training.building import training_of


def training(batch_size: int = 64) -> lp.Training:
    """The training of the shipped configuration."""
    return training_of(config.load("digits-wgan", [f"batch_size={batch_size}"]))
