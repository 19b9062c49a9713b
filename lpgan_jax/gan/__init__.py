"""LP-GAN: its networks, and how they are trained."""

from lpgan_jax.gan.losses import LOSSES, Loss, LossName
from lpgan_jax.gan.lpgan import LPGAN, NETWORKS, Batch, Losses, State
from lpgan_jax.gan.networks import Discriminator, Generator
from lpgan_jax.gan.secured import SecureLPGAN

__all__ = [
    "LOSSES",
    "LPGAN",
    "NETWORKS",
    "Batch",
    "Discriminator",
    "Generator",
    "Loss",
    "LossName",
    "Losses",
    "SecureLPGAN",
    "State",
]
