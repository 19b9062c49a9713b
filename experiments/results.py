"""docs/results.md from the tables, plots and pages that the experiments left in docs/results.

    python experiments/results.py

Nothing is measured here: every number on the page comes from a CSV in docs/results.
"""

import argparse
import itertools
import re
from pathlib import Path

from lpgan_jax.common.files import atomic_write
from lpgan_jax.common.tables import Row, read_csv
from lpgan_jax.study.sweep.report import MARGIN, good_bits
from lpgan_jax.training.config import TrainConfig

DOCS = Path(__file__).parent.parent / "docs"

HEAD = """\
# Results

What secure training gives, beside training in the clear: precision, fidelity, quality. Written by
`python experiments/results.py` from the tables in [results](results); each section names the
command that made its own. All runs are seeded. Both servers were simulated in one process, which
changes speed and nothing else.

*Fréchet distance*, *precision*, *recall* and *classes covered* compare generated with real images
in the features of a small classifier, trained on the real images
([quality.py](../lpgan_jax/study/quality.py)); they cannot be compared with distances in other
features, such as Inception's. *Shadow mode* is the secure program on plaintext integers, rounded as
the protocols round.
"""


def fragment(folder: Path, name: str = "summary.md") -> str:
    """A page that an experiment wrote, its links seen from docs/."""
    text = (folder / name).read_text()
    place = folder.relative_to(DOCS)
    return re.sub(r"\]\((?!http)", f"]({place}/", text)


def precision(results: Path) -> str:
    """Where training breaks, and where more bits stop helping."""
    final = {row["variant"]: row for row in read_csv(results / "precision" / "final.csv")}
    plain, bits = final["float32"], good_bits(list(final.values()))
    own = TrainConfig.model_fields["frac_bits"].default
    coarse = {row["variant"]: row for row in read_csv(results / "coarse" / "final.csv")}
    lines = [
        "## Precision: how many fraction bits?",
        _limit(list(final.values()), plain),
        f"**From {bits[0]} to {bits[-1]} bits** its mean stays below {MARGIN:g} times float32's: "
        "more bits do not help. Beyond, the ring itself ends: `lpgan ranges --config digits --set "
        "frac_bits=24 --steps 300` names the square of the discriminator's gradient, in Adam, "
        f"which needs the rest of the 64 bits. The default of **{own} bits** lies between, with a "
        "margin on both sides.",
        *(_best_of(final, rounding, plain) for rounding in ("nearest", "local")),
        "With a larger epsilon in the normalisations, so that double fraction still holds it, the "
        "sweep goes down to fewer bits ([below](#where-training-breaks)). "
        + _limit(list(coarse.values()), coarse["float32"]),
        fragment(results / "precision"),
        "### Where training breaks",
        fragment(results / "coarse"),
    ]
    return "\n\n".join(lines)


def _limit(rows: list[Row], plain: Row) -> str:
    """Up to how many bits images are much worse than float32's, with the protocols' rounding."""
    shadows = sorted(
        (row for row in rows if row["variant"].startswith("shadow-stochastic")),
        key=lambda row: row["frac_bits"],
    )
    broken = list(
        itertools.takewhile(lambda r: r["frechet_mean"] > 2 * plain["frechet_mean"], shadows)
    )
    fewest = shadows[0]
    if not broken:
        return (
            f"With stochastic rounding, even {fewest['frac_bits']} fraction bits train: the "
            f"Fréchet distance is {fewest['frechet_mean']:.3g}, and "
            f"{plain['frechet_mean']:.3g} in float32."
        )
    last = broken[-1]
    return (
        f"With stochastic rounding, training breaks at {last['frac_bits']} fraction bits and "
        f"fewer: the Fréchet distance is {last['frechet_mean']:.3g} there, more than twice the "
        f"{plain['frechet_mean']:.3g} of float32."
    )


def _best_of(final: dict[str, Row], rounding: str, plain: Row) -> str:
    """What a rounding that the protocols do not use comes to."""
    rows = [row for row in final.values() if row["rounding"] == rounding]
    good = [r["frac_bits"] for r in rows if r["frechet_mean"] <= MARGIN * plain["frechet_mean"]]
    best = min(rows, key=lambda row: row["frechet_mean"])
    name = {"nearest": "Rounding to nearest", "local": "Local truncation of shares"}[rounding]
    reached = (
        f"reaches that at {', '.join(map(str, sorted(good)))}" if good else "never reaches that"
    )
    tried = ", ".join(str(row["frac_bits"]) for row in rows)
    return (
        f"{name} {reached} (of {tried} fraction bits); its best distance is "
        f"{best['frechet_mean']:.3g}, at {best['frac_bits']}."
    )


def fidelity(results: Path) -> str:
    """Secure against float32, paired by seeds."""
    folder = results / "fidelity"
    rows: dict[str, Row] = {
        row["variant"]: row
        for row in read_csv(folder / "paired.csv")
        if row["measure"] == "frechet" and row["against"] == "float32"
    }
    secure = next(row for name, row in rows.items() if name.startswith("secure"))
    moved = next(row for name, row in rows.items() if "moved" in name)
    difference, error = secure["mean_difference"], secure["standard_error"]
    within = {True: "within", False: "NOT within"}
    spread = moved["sd_of_differences"]
    free = abs(moved["mean_difference"]) <= 2 * moved["standard_error"]
    cost = "makes no difference" if free else "makes a difference"
    text = f"""\
## Fidelity: does secrecy change what is learnt?

Over {secure["pairs"]} seeds, the Fréchet distance after secure training differs from that after
float32 training of the same seed by {difference:+.3g} ± {error:.2g} (standard error) on average:
**{within[abs(difference) <= 2 * error]} two standard errors** of 0. A float32 run whose parameters
move by up to 1 LSB a step differs from the same run left alone by {spread:.3g} (standard deviation
over seeds; mean {moved["mean_difference"]:+.3g} ± {moved["standard_error"]:.2g}): the secure runs'
mean difference is **{within[abs(difference) <= spread]}** that spread, and their own standard
deviation is {secure["sd_of_differences"]:.3g}. So an LSB a step, whoever adds it, {cost} beyond two
standard errors in these runs, and secrecy adds nothing to it that they could show. A GAN amplifies
the smallest change of a single run; what can agree are distributions.

"""
    return text + fragment(folder)


def agreement(results: Path) -> str:
    """Shadow mode against the protocols."""
    title = "## Shadow mode: is it the protocols?\n\n"
    return title + fragment(results / "agreement")


def release(results: Path, name: str, title: str) -> str:
    """A generator trained under sharing."""
    folder = results / name
    (quality,) = read_csv(folder / "quality.csv")
    place, how = folder.relative_to(DOCS), "with differential privacy"
    if (folder / "losses.csv").exists():
        losses = read_csv(folder / "losses.csv")
        how = f"after {losses[-1]['step']:,} steps under sharing, seed {quality['seed']}"
    cells = {
        "images": f"{quality['images']:,}",
        "Fréchet distance": f"{quality['frechet']:.3g}",
        "precision": f"{quality['precision']:.3f}",
        "recall": f"{quality['recall']:.3f}",
        "classes covered": f"{100 * quality['coverage']:.1f} %",
        "the classifier's accuracy": f"{100 * quality['classifier_accuracy']:.1f} %",
    }
    if (accuracy := quality.get("accuracy")) is not None:
        cells["accuracy of one that has seen generated images alone"] = f"{100 * accuracy:.1f} %"
    return f"""\
## {title}

![{title}]({place}/samples.png)

*Generated {how}. Command and how to use the generator: [model card]({place}/README.md).*

| {" | ".join(cells)} |
|{"---:|" * len(cells)}
| {" | ".join(cells.values())} |
"""


def small_nets(results: Path) -> str:
    """Other networks from the same layers."""
    place = results.relative_to(DOCS)
    return f"""\
## Other networks: training and inference of three classifiers

Three small networks for MNIST, in plain Flax, trained and applied under `lp.secure`. `fc` is
784-128-128-10 with squares, `conv-square` and `conv-relu` have a 5x5 convolution of stride 2
before 100-10.

![accuracy over steps]({place}/small_nets.png)

{fragment(results, "small_nets.md")}"""


def document(of: Path) -> str:
    """The page."""
    sections = [
        HEAD,
        precision(of),
        fidelity(of),
        agreement(of),
        release(of, "digits", "Digits at 16x16"),
        release(of, "mnist-small", "MNIST at 32x32"),
        release(of, "pneumonia", "The medical case: chest X-rays"),
        release(of, "digits-private", "Digits that may be released: differential privacy"),
        release(of, "mnist-private", "MNIST with differential privacy"),
        small_nets(of),
    ]
    return "\n".join(sections)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=DOCS / "results")
    parser.add_argument("--out", type=Path, default=DOCS / "results.md")
    args = parser.parse_args()
    atomic_write(args.out, document(args.results).encode(), private=False)
    print(args.out)


if __name__ == "__main__":
    main()
