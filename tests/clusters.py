"""Clusters on this machine for tests: a tiny training, and what the simulation makes of it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.cluster.dealer import master_key
from lpgan_jax.cluster.reporting import Reporter
from lpgan_jax.cluster.roles import local_cluster
from lpgan_jax.cluster.settings import load_cluster
from lpgan_jax.cluster.supervisor import Supervisor
from lpgan_jax.cluster.worker import Job
from lpgan_jax.gan import GENERATE, MeanLosses, mean_losses
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.programs import initial_state
from lpgan_jax.programs.simulation import Simulation
from lpgan_jax.training import config
from lpgan_jax.training.building import build, training_of
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


class Running:
    """Supervisors of some jobs, in threads."""

    def __init__(self, work, cluster):
        self.supervisors = {job.role: Supervisor(job, cluster) for job in work}
        self.statuses = {}
        self._threads = {
            role: threading.Thread(target=self._run, args=(role,)) for role in self.supervisors
        }
        for thread in self._threads.values():
            thread.start()

    def _run(self, role):
        self.statuses[role] = self.supervisors[role].run()

    def wait(self, role, seconds):
        self._threads[role].join(seconds)
        assert not self._threads[role].is_alive(), f"{role} is still at it after {seconds} s"
        return self.statuses[role]

    def pid(self, role):
        return self.supervisors[role].process.pid

    def stop(self):
        for supervisor in self.supervisors.values():
            supervisor.stop()
        for thread in self._threads.values():
            thread.join(30)


class Simulated:
    """DS, S1 and S2 in this process, from the same keys as a cluster's."""

    def __init__(self, settings: config.TrainConfig, seed: int = SEED) -> None:
        self.settings, self.seed = settings, seed
        self.gan = build(settings)
        self.training = training_of(settings)
        self.draw = self.training.feed(seed, None)
        self.images: dict[int, np.ndarray] = {}
        self.losses: dict[int, MeanLosses | None] = {}
        self.shares: dict[int, Any] = {}
        self.last: Simulation | None = None
        self._state_at: dict[int, Any] = {}

    def attempt(self, number: int, start: int, end: int) -> None:
        """Go through an attempt's tasks from one step to another."""
        master = master_key(self.seed, number)
        if start == 0:
            initial = initial_state(self.gan.program, self.seed)
            simulation = Simulation.begin(self.gan, initial, master)
        else:
            state = jax.tree.map(jnp.asarray, self._state_at[start])
            simulation = Simulation(self.gan, state, DealerKeys(master))
        self.last, trainer = simulation, SecureTrainer(simulation)
        noise = self.training.sample_question(self.seed)
        if start == 0 and self.settings.open_samples:
            self.images[0] = simulation.answer(GENERATE, noise)
        for step in range(start, end):
            told = trainer.step(step, self.draw(step))
            self.losses[step + 1] = mean_losses(told, self.settings.batch_size)
            if self.training.guards_after(step + 1):
                trainer.guard()
            if self.settings.open_samples and self.training.samples_after(step + 1):
                self.images[step + 1] = simulation.answer(GENERATE, noise)
            if self.training.saves_after(step + 1):
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
