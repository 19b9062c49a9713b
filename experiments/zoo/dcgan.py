"""LP-GAN's DCGAN of the paper, 32x32."""

import lpgan_jax as lp
from lpgan_jax.training import config
from lpgan_jax.training.building import training_of


def training(batch_size: int = 64) -> lp.Training:
    """The training of the shipped configuration, which reads MNIST."""
    return training_of(config.load("mnist", [f"batch_size={batch_size}"]))
