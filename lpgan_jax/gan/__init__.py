"""LP-GAN: its networks, and how they are trained."""

from lpgan_jax.gan.losses import LOSSES, Loss, LossName
from lpgan_jax.gan.lpgan import (
    LPGAN,
    NETWORKS,
    Batch,
    Losses,
    MeanLosses,
    PrivateBatch,
    PrivateUpdates,
    State,
    Updates,
    mean_losses,
)
from lpgan_jax.gan.networks import Discriminator, Generator
from lpgan_jax.gan.program import GENERATE, gan_program

__all__ = [
    "GENERATE",
    "LOSSES",
    "LPGAN",
    "NETWORKS",
    "Batch",
    "Discriminator",
    "Generator",
    "Loss",
    "LossName",
    "Losses",
    "MeanLosses",
    "PrivateBatch",
    "PrivateUpdates",
    "State",
    "Updates",
    "gan_program",
    "mean_losses",
]
