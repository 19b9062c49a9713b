"""The programs of a configuration, as shapes: what a run would execute, to be traced and not run.

A program is (function, secrets, public), as `party.simulate` takes them, where the secrets are
`jax.ShapeDtypeStruct`s. `cost.program_cost` and `audit.audit_program` take its parts.
"""

from __future__ import annotations

from typing import Any

from lpgan_jax.gan import GENERATE
from lpgan_jax.mpc.party import Program
from lpgan_jax.mpc.share_trees import shapes_of, tree_of_shapes
from lpgan_jax.programs import SecureProgram
from lpgan_jax.training.building import build
from lpgan_jax.training.config import TrainConfig


def training_program(settings: TrainConfig) -> Program:
    """What the servers run in a training step."""
    program = build(settings)
    batch = tree_of_shapes(program.batch, program.batch_scales)
    return program.train_step, (shared_state(program), batch), program.schedule(0)


def sampling_program(settings: TrainConfig, num: int | None = None) -> Program:
    """What the servers run to generate `num` images (default: as many as a sample of a run)."""
    program = build(settings)
    noise = shapes_of((num or settings.num_samples, settings.model.noise_size), settings.frac_bits)
    return program.answer(GENERATE), (shared_state(program), noise), None


def shared_state(program: SecureProgram) -> Any:
    """The shapes of a training state."""
    return tree_of_shapes(program.shapes, program.scales)
