"""How far does secure training drift from the same step in float64?

Trains both from the same initial parameters, batches and noise, and prints the largest and
the median difference of parameters next to how far the parameters moved:

    python experiments/compare_twin.py --optimizer sgd --learning-rate 2e-3 --steps 20
"""

import argparse
from typing import Any

import jax
import numpy as np

import lpgan_jax as lp
from lpgan_jax.gan import NETWORKS
from lpgan_jax.mpc.share_trees import reveal_tree
from lpgan_jax.programs import initial_state
from lpgan_jax.programs.simulation import Simulation
from lpgan_jax.training import config, data
from lpgan_jax.training.building import build
from lpgan_jax.training.source import DataSource
from lpgan_jax.training.trainers import PlaintextTrainer


def magnitudes(a: Any, b: Any) -> np.ndarray:
    """Of all differences between two trees of arrays."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return np.concatenate([np.abs(x - y).ravel() for x, y in pairs])


def main() -> None:
    """Train both, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="digits")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--optimizer", choices=["sgd", "adam"], default="sgd")
    parser.add_argument("--learning-rate", default="2e-3")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()

    changes = [*args.set]
    for name in NETWORKS:
        changes += [
            f"{name}_optimizer.name={args.optimizer}",
            f"{name}_optimizer.learning_rate={args.learning_rate}",
        ]
    settings = config.load(args.config, changes)
    gan = build(settings)
    source = DataSource(settings, settings.seed, data.load_images(settings.data))
    initial = initial_state(gan.program, settings.seed)
    plain = PlaintextTrainer(gan.program, initial, dtype=np.float64)
    secure = Simulation.begin(gan, initial, lp.key(settings.seed))

    print(
        f"{settings.frac_bits} fraction bits, {args.optimizer} at {args.learning_rate}, "
        f"batch {settings.batch_size}"
    )
    print(" step   largest difference    in LSB   median   largest move")
    for step in range(args.steps):
        batch = source.batch(step)
        plain.step(step, batch)
        secure.train_step(step, batch)
        if step + 1 in (1, 2, 5, 10, args.steps) or (step + 1) % 20 == 0:
            expected, revealed = plain.state().params, reveal_tree(secure.state.params)
            differences = magnitudes(revealed, expected)
            print(
                f"{step + 1:5d} {differences.max():20.2e} "
                f"{differences.max() * 2**settings.frac_bits:9.1f} {np.median(differences):8.1e} "
                f"{magnitudes(expected, initial.params).max():14.2e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
