"""Clusters on this machine for tests: a tiny training, and what the simulation makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.cluster.dealer import master_key
from lpgan_jax.cluster.reporting import Reporter
from lpgan_jax.cluster.roles import local_cluster
from lpgan_jax.cluster.settings import load_cluster
from lpgan_jax.cluster.worker import Job
from lpgan_jax.gan import GENERATE, MeanLosses, mean_losses
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.programs.simulation import Simulation
from lpgan_jax.training import config, data
from lpgan_jax.training.building import build
from lpgan_jax.training.source import DataSource
from lpgan_jax.training.trainers import SecureTrainer

TINY = """
data: {dataset: digits, image_size: 8, channels: 1}
model: {noise_size: 4, features: 2, base_size: 4}
generator_optimizer: {name: sgd, learning_rate: 1e-2}
discriminator_optimizer: {name: sgd, learning_rate: 1e-2}
batch_size: 4
steps: 12
seed: 3
log_every: 1
sample_every: 6
num_samples: 4
checkpoint_every: 4
"""
SEED = 3


def tiny(**fields: Any) -> config.TrainConfig:
    settings = config.validated(config.TrainConfig, config.load_yaml(TINY.encode(), "tiny"), "tiny")
    return settings.model_copy(update=fields)


def local(directory: Path, **fields: Any) -> tuple[Path, Any]:
    """(file, configuration) of a cluster on loopback, whose state is in `directory`/state."""
    file = local_cluster(directory / "cluster", "../state", **fields)
    return file, load_cluster(file)


def jobs(file: Path, settings: config.TrainConfig, out: Path, seed: int | None) -> list[Job]:
    text = config.to_json(settings)
    return [
        Job("serve", "s1", str(file)),
        Job("serve", "s2", str(file)),
        Job("deal", "ds", str(file), train=text, seed=seed),
        Job("collect", "sp", str(file), out=str(out)),
    ]


class Simulated:
    """DS, S1 and S2 in this process, from the same keys as a cluster's."""

    def __init__(self, settings: config.TrainConfig, seed: int = SEED) -> None:
        self.settings, self.seed = settings, seed
        self.gan = build(settings)
        self.source = DataSource(settings, seed, data.load_images(settings.data))
        self.images: dict[int, np.ndarray] = {}
        self.losses: dict[int, MeanLosses | None] = {}
        self.shares: dict[int, Any] = {}
        self.last: Simulation | None = None
        self._state_at: dict[int, Any] = {}

    def attempt(self, number: int, start: int, end: int) -> None:
        """Go through an attempt's tasks from one step to another."""
        master = master_key(self.seed, number)
        if start == 0:
            initial = self.source.initial_state(self.gan.program)
            simulation = Simulation.begin(self.gan, initial, master)
        else:
            state = jax.tree.map(jnp.asarray, self._state_at[start])
            simulation = Simulation(self.gan, state, DealerKeys(master))
        self.last, trainer = simulation, SecureTrainer(simulation)
        noise = self.source.sample_noise()
        if start == 0 and self.settings.open_samples:
            self.images[0] = simulation.answer(GENERATE, noise)
        for step in range(start, end):
            told = trainer.step(step, self.source.batch(step))
            self.losses[step + 1] = mean_losses(told, self.settings.batch_size)
            if self.settings.open_samples and self.settings.samples_after(step + 1):
                self.images[step + 1] = simulation.answer(GENERATE, noise)
            if self.settings.saves_after(step + 1):
                self.shares[step + 1] = simulation.shares()
                self._state_at[step + 1] = jax.tree.map(np.array, simulation.state)


def events(state: Path, role: str, event: str | None = None) -> list[dict[str, Any]]:
    """Lines of a role's log: its events, or those of one name."""
    return [r for r in _log(state, role) if r["kind"] == "event" and event in (None, r["event"])]


def statuses(state: Path, role: str) -> list[dict[str, Any]]:
    return [r for r in _log(state, role) if r["kind"] == "status"]


def _log(state: Path, role: str) -> list[dict[str, Any]]:
    file = state / "logs" / f"{role}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class Deaf(Reporter):
    """A reporter that nobody listens to, for a role in this process."""

    def __init__(self, role: str) -> None:
        import os

        self.lines: list[dict[str, Any]] = []
        super().__init__(role, os.open(os.devnull, os.O_WRONLY))

    def event(self, event: str, **fields: Any) -> None:
        self.lines.append({"event": event, **fields})
