"""Do shadow mode and the protocols round alike, and how much faster is the shadow?

From one state of a training run, one step is taken many times in both ways. Each run's error
against the same step in float64 is summed up tensor by tensor, by its root mean square and its
mean, and the two samples of runs are compared by Kolmogorov-Smirnov tests:

    python experiments/shadow_agreement.py --out docs/results/agreement

Writes errors.csv (every run), tests.csv, times.csv, agreement.png and summary.md.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import scipy.stats

import lpgan_jax as lp
from lpgan_jax.common.files import atomic_write
from lpgan_jax.common.tables import Row, read_csv, write_csv
from lpgan_jax.gan import Batch, State
from lpgan_jax.mpc import emulated
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.share_trees import (
    decoded,
    encoded,
    reveal_tree,
    scaled,
    share_tree,
    unscaled,
)
from lpgan_jax.programs import SecureProgram, initial_state
from lpgan_jax.programs.simulation import share_state
from lpgan_jax.training import config, data
from lpgan_jax.training.building import build
from lpgan_jax.training.source import DataSource
from lpgan_jax.training.trainers import ShadowTrainer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LEVEL = 0.01  # of all tests together
STATISTICS = ("rms_lsb", "mean_lsb")
ERRORS = ("mode", "run", "tensor", *STATISTICS)
TESTS = ("tensor", "statistic", "runs", "shadow_mean", "secure_mean", "ks", "p", "level")


def programs(
    gan: SecureProgram, state: State, batch: Batch, step: int
) -> tuple[dict[str, Callable[[int], Any]], Any]:
    """One step of each mode from `state`, as {mode: run -> parameters}, and float64's parameters.

    `state` and `batch` are float arrays that fixed point holds exactly.
    """
    public, options = gan.schedule(step), options_to_run_often()
    all_f = gan.batch_scales

    def secure(keys: jax.Array, state: State, batch: Batch) -> Any:
        shared = share_tree(keys[0], batch, all_f)
        return simulate(gan.train_step, keys[1], (state, shared), public)[0].params

    def shadowed(keys: jax.Array, state: State, batch: Batch) -> Any:
        values = (state, encoded(batch, all_f))
        return emulated.run(gan.train_step, keys[1], values, public)[0].params

    compiled = [jax.jit(p, compiler_options=options) for p in (secure, shadowed)]
    shares = share_state(gan, DealerKeys(lp.key(0)), state)
    words = encoded(state, gan.scales)

    def keys(run: int) -> jax.Array:
        return jax.random.split(lp.key(run), 2)

    floats = scaled((state, batch), (gan.scales, all_f))
    exact = jax.jit(lambda v: gan.train_step(ExactSeat(), v, public)[0].params)(floats)
    return {
        "secure": lambda run: reveal_tree(compiled[0](keys(2 * run + 1), shares, batch)),
        "shadow": lambda run: decoded(compiled[1](keys(2 * run + 2), words, batch)),
    }, jax.tree.map(np.asarray, unscaled(exact))


def trained_state(gan: SecureProgram, source: DataSource, steps: int) -> State:
    """The state after some steps of shadow training."""
    trainer = ShadowTrainer(gan, initial_state(gan.program, 0), lp.key(0))
    for step in range(steps):
        trainer.step(step, source.batch(step))
    return trainer.state()


def errors_of(mode: str, run: int, params: Any, exact: Any, frac_bits: int) -> list[Row]:
    """A row for each tensor: its error in LSB."""
    rows: list[Row] = []
    pairs = zip(jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(params), strict=True)
    for (path, right), found in pairs:
        lsb = (found - right) * 2.0**frac_bits
        tensor = ".".join(str(part.key) for part in path)
        rms, mean = float(np.sqrt((lsb**2).mean())), float(lsb.mean())
        rows.append({"mode": mode, "run": run, "tensor": tensor, "rms_lsb": rms, "mean_lsb": mean})
    return rows


def tests_of(errors: list[Row]) -> list[Row]:
    """A Kolmogorov-Smirnov test for each tensor and statistic; LEVEL is shared by all of them."""
    tensors = list(dict.fromkeys(row["tensor"] for row in errors))
    rows: list[Row] = []
    for tensor in tensors:
        for statistic in STATISTICS:
            samples = {
                mode: [
                    row[statistic]
                    for row in errors
                    if row["tensor"] == tensor and row["mode"] == mode
                ]
                for mode in ("shadow", "secure")
            }
            test = scipy.stats.ks_2samp(samples["shadow"], samples["secure"])
            rows.append(
                {
                    "tensor": tensor,
                    "statistic": statistic,
                    "runs": len(samples["shadow"]),
                    "shadow_mean": float(np.mean(samples["shadow"])),
                    "secure_mean": float(np.mean(samples["secure"])),
                    "ks": float(test.statistic),
                    "p": float(test.pvalue),
                    "level": LEVEL / (len(tensors) * len(STATISTICS)),
                }
            )
    return rows


def plot(errors: list[Row], title: str, path: Path) -> None:
    """Distributions over runs of each tensor's root mean square error."""
    tensors = list(dict.fromkeys(row["tensor"] for row in errors))
    columns = 4
    figure, axes = plt.subplots(
        -(-len(tensors) // columns), columns, figsize=(15, 9), layout="constrained"
    )
    for axis, tensor in zip(axes.flat, tensors, strict=False):
        for mode, colour in (("secure", "black"), ("shadow", "tab:blue")):
            values = sorted(
                r["rms_lsb"] for r in errors if r["tensor"] == tensor and r["mode"] == mode
            )
            shares = np.arange(1, len(values) + 1) / len(values)
            axis.step(values, shares, color=colour, label=mode, where="post")
        axis.set_title(tensor, fontsize="small")
        axis.set_xlabel("rms error of a step [LSB]", fontsize="small")
        axis.set_ylabel("share of runs", fontsize="small")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(tensors) :]:
        axis.remove()
    axes.flat[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Run both, test, time, plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="digits")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--after", type=int, default=200, metavar="STEPS")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("docs/results/agreement"))
    args = parser.parse_args()

    settings = config.load(args.config, args.set)
    gan, f = build(settings), settings.frac_bits
    source = DataSource(settings, settings.seed, data.load_images(settings.data))
    state = trained_state(gan, source, args.after)
    batch = jax.tree.map(lambda v: np.round(v * 2.0**f) * 2.0**-f, source.batch(args.after))
    modes, exact = programs(gan, state, batch, args.after)
    for run in modes.values():
        run(0)  # compiles
    errors: list[Row] = []
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for number in range(1, args.runs + 1):
        for mode, run in modes.items():  # in turn, so that both meet the same disturbances
            before = time.perf_counter()
            params = run(number)
            seconds[mode].append(time.perf_counter() - before)
            errors += errors_of(mode, number, params, exact, f)
        if number % 10 == 0:
            print(f"{number}/{args.runs} runs", flush=True)
    write_csv(args.out / "errors.csv", errors, ERRORS)
    rows = tests_of(read_csv(args.out / "errors.csv"))
    write_csv(args.out / "tests.csv", rows, TESTS)
    median = {mode: float(np.median(values)) for mode, values in seconds.items()}
    times = [{**median, "ratio": median["secure"] / median["shadow"], "steps": args.runs}]
    write_csv(args.out / "times.csv", times, ("secure", "shadow", "ratio", "steps"))
    title = (
        f"{args.config}, {f} fraction bits, batch {settings.batch_size}: step {args.after + 1}, "
        f"{args.runs} runs of each; seed {settings.seed}"
    )
    plot(errors, title, args.out / "agreement.png")
    atomic_write(args.out / "summary.md", page(rows, times[0], title).encode(), private=False)
    print((args.out / "summary.md").read_text())


def page(rows: list[Row], times: Row, title: str) -> str:
    """The findings as Markdown."""
    least = min(rows, key=lambda row: row["p"])
    verdict = "agree" if least["p"] > least["level"] else "DIFFER"
    lines = [
        f"Made by `python experiments/shadow_agreement.py`: {title}.",
        "",
        "![Errors of a step, in both modes](agreement.png)",
        "",
        f"The distributions **{verdict}**: {len(rows)} two-sample Kolmogorov-Smirnov tests "
        f"(tests.csv), the smallest p {least['p']:.3g} ({least['tensor']}, {least['statistic']}); "
        f"each is tested at {least['level']:.2g}, so that all together falsely differ with "
        f"probability {LEVEL:g} at most; distribution functions that differ by "
        f"{(-math.log(least['level'] / 2) / least['runs']) ** 0.5:.2g} somewhere would be noticed.",
        "",
        f"A step takes {times['secure']:.3g} s under sharing and {times['shadow']:.3g} s in shadow "
        f"mode (medians of {times['steps']} steps in turn, times.csv): "
        f"**{times['ratio']:.2g} times** as fast.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
