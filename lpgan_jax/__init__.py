"""LP-GAN in JAX: train a DCGAN on secret-shared images; two servers learn nothing.

Importing this package enables JAX's 64-bit types, which the ring Z_{2^64} needs.
"""

import jax

jax.config.update("jax_enable_x64", True)

from lpgan_jax import protocols  # noqa: E402
from lpgan_jax.analysis.audit import audit  # noqa: E402
from lpgan_jax.analysis.cost import cost  # noqa: E402
from lpgan_jax.mpc.fixed_point import FixedPoint  # noqa: E402
from lpgan_jax.mpc.prng import key  # noqa: E402
from lpgan_jax.mpc.shares import share  # noqa: E402
from lpgan_jax.privacy.accounting import Mechanism, Privacy  # noqa: E402
from lpgan_jax.privacy.mechanism import Noise  # noqa: E402
from lpgan_jax.programs import Answer, Program, Sample, Training  # noqa: E402
from lpgan_jax.programs.batches import poisson, shuffled  # noqa: E402
from lpgan_jax.training.loop import train  # noqa: E402
from lpgan_jax.training.results import ask, sample  # noqa: E402
from lpgan_jax.transform import Plan, Shared, load, private_sum, reveal, save, secure  # noqa: E402

__all__ = [
    "Answer",
    "FixedPoint",
    "Mechanism",
    "Noise",
    "Plan",
    "Privacy",
    "Program",
    "Sample",
    "Shared",
    "Training",
    "ask",
    "audit",
    "cost",
    "key",
    "load",
    "poisson",
    "private_sum",
    "protocols",
    "reveal",
    "sample",
    "save",
    "secure",
    "share",
    "shuffled",
    "train",
]
__version__ = "0.2.0"
