"""The programs of a configuration, as shapes: what a run would execute, to be traced and not run.

A program is (function, secrets, public), as `party.simulate` takes them, where the secrets are
`jax.ShapeDtypeStruct`s. `cost.program_cost` and `audit.audit_program` take its parts.
"""

from __future__ import annotations

from lpgan_jax.gan import SecureLPGAN, State
from lpgan_jax.mpc.party import Program
from lpgan_jax.mpc.share_trees import same_scale, shapes_of, tree_of_shapes
from lpgan_jax.training.building import build
from lpgan_jax.training.config import TrainConfig


def training_program(settings: TrainConfig) -> Program:
    """What the servers run in a training step."""
    gan = build(settings)
    batch = tree_of_shapes(gan.batch, same_scale(gan.batch, settings.frac_bits))
    return gan.train_step, (shared_state(gan), batch), gan.schedule(0)


def sampling_program(settings: TrainConfig, num: int | None = None) -> Program:
    """What the servers run to generate `num` images (default: as many as a sample of a run)."""
    gan = build(settings)
    noise = shapes_of((num or settings.num_samples, gan.gan.noise_size), settings.frac_bits)
    return gan.generate, (shared_state(gan), noise), None


def shared_state(gan: SecureLPGAN) -> State:
    """The shapes of a training state."""
    state: State = tree_of_shapes(gan.shapes, gan.scales)
    return state
