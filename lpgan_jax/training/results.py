"""What SP gets of a run: images that are generated from its shares, and its parameters."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lpgan_jax.gan import GENERATE, State
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.mpc.share_trees import reveal_tree
from lpgan_jax.programs import SecureProgram
from lpgan_jax.programs.batches import Stream, random_stream
from lpgan_jax.programs.simulation import Simulation, restore_state
from lpgan_jax.training import checkpoint
from lpgan_jax.training.building import build
from lpgan_jax.training.config import TrainConfig
from lpgan_jax.training.images import save_png
from lpgan_jax.training.parameters import save_parameters
from lpgan_jax.training.run_directory import RunDirectory

_AT_ONCE = 500  # images generated in one call


def _open_run(path: str | os.PathLike[str]) -> tuple[TrainConfig, SecureProgram, State]:
    """A run's configuration and the shares of its last checkpoint."""
    run = RunDirectory.open(path)
    settings = run.config()
    gan = build(settings)
    if run.parameters_file.exists() and not run.checkpoints.exists():
        raise ValueError(
            f"{path}: a run without shares, expected one of secure training (where the servers are "
            "elsewhere, `lpgan sp --sample` has images generated)"
        )
    _, tree = checkpoint.load(run.path)
    return settings, gan, restore_state(gan, tree)


def generate(run: str | os.PathLike[str], num: int, *, seed: int | None = None) -> np.ndarray:
    """Generate images with a run's shares: SG-FP on shared noise, opened by SP.

    Args:
        run: a run directory.
        num: how many images.
        seed: fixes the noise and the dealer; both come from the operating system without it.

    Returns:
        float64 [num, H, W, C], about -1 to 1.

    Raises:
        ValueError, FileNotFoundError: bad input.
    """
    if num < 1:
        raise ValueError(f"num: expected at least 1, got {num}")
    settings, gan, state = _open_run(run)
    rng = np.random.default_rng() if seed is None else random_stream(seed, Stream.GENERATION)
    noise = rng.normal(size=(num, settings.model.noise_size))
    simulation = Simulation(gan, state, DealerKeys(make_key(seed)))
    parts = [noise[start : start + _AT_ONCE] for start in range(0, num, _AT_ONCE)]
    return np.concatenate([simulation.answer(GENERATE, part) for part in parts])


def sample(
    run: str | os.PathLike[str], num: int, out: str | os.PathLike[str], *, seed: int | None = None
) -> None:
    """`generate` images, and write them as a PNG grid.

    Args:
        run: a run directory.
        num: how many images.
        out: the PNG file.
        seed: as for `generate`.

    Raises:
        ValueError, FileNotFoundError: bad input; nothing is written.
    """
    save_png(Path(out), generate(run, num, seed=seed), private=False)


def export(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """SP's reconstruction of a run's parameters, as a Flax msgpack file.

    The file holds {"g": variables, "d": variables} in float32, for `gan.networks` or any Flax code.

    Raises:
        ValueError, FileNotFoundError: bad input; nothing is written.
    """
    _, _, state = _open_run(run)
    save_parameters(out, reveal_tree(state.learnt()), private=False)
