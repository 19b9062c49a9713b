"""What a sweep consists of: kinds of runs, and for each of them a run of every seed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

from lpgan_jax.mpc.emulated import Rounding
from lpgan_jax.training import config
from lpgan_jax.training.config import SweepConfig, TrainConfig
from lpgan_jax.training.private import resolved
from lpgan_jax.training.trainers import Mode


@dataclass(frozen=True)
class Variant:
    """A kind of training run.

    Attributes:
        mode: see `trainers`.
        rounding: of shadow runs.
        frac_bits: fraction bits; of perturbed plaintext runs, their unit. Else those of the base.
        perturbation: of plaintext runs, in LSB a step.
        epsilon: of differential privacy; None: as the base says.
    """

    mode: Mode
    rounding: Rounding
    frac_bits: int
    perturbation: float
    epsilon: float | None = None

    @property
    def name(self) -> str:
        """For files, and people."""
        private = "" if self.epsilon is None else f"-epsilon-{self.epsilon:g}"
        return self._kind + private

    @property
    def _kind(self) -> str:
        if self.mode == "plaintext":
            if not self.perturbation:
                return "float32"
            return f"float32-moved-{self.perturbation:g}-lsb-f{self.frac_bits:02d}"
        kind = "secure" if self.mode == "secure" else f"shadow-{self.rounding}"
        return f"{kind}-f{self.frac_bits:02d}"


FIELDS = tuple(field.name for field in fields(Variant))
"""Of a variant, in tables."""


@dataclass(frozen=True)
class Cell:
    """One run: a variant and a seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.variant.name}-seed{self.seed}"


def variants(sweep: SweepConfig) -> list[Variant]:
    """All kinds of runs, in the order of the configuration, each once."""
    own = config.load(sweep.base, sweep.set).frac_bits
    found: dict[Variant, None] = {}
    for runs in sweep.runs:
        floats = runs.mode == "plaintext" and not runs.perturbation  # which have no fraction bits
        bits = [own] if floats else runs.frac_bits or [own]
        epsilons: list[float | None] = [*runs.epsilon] or [None]
        for rounding, frac_bits, epsilon in itertools.product(runs.rounding, bits, epsilons):
            found[Variant(runs.mode, rounding, frac_bits, runs.perturbation, epsilon)] = None
    return list(found)


def settings_of(sweep: SweepConfig, variant: Variant) -> TrainConfig:
    """The training configuration of a variant's runs."""
    changed = [f"frac_bits={variant.frac_bits}"]
    if variant.epsilon is not None:
        changed += ["privacy.noise_multiplier=null", f"privacy.epsilon={variant.epsilon}"]
    return resolved(config.load(sweep.base, [*sweep.set, *changed]))
