"""Plots and a page from the tables of a sweep. Every number on the page is in a CSV beside it."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lpgan_jax.common.files import atomic_write
from lpgan_jax.common.tables import Row, read_csv, write_csv
from lpgan_jax.study import quality
from lpgan_jax.study.sweep.plan import FIELDS, Cell, Variant, variants
from lpgan_jax.training import config
from lpgan_jax.training.config import SweepConfig

MEASURES = (*quality.MEASURES, "distance", "loss_d", "loss_g")
_FINAL = ("variant", *FIELDS, "seeds", "step")
FINAL_FIELDS = (*_FINAL, *(f"{m}_{s}" for m in MEASURES for s in ("mean", "sd")))
PAIRED_FIELDS = (
    "variant",
    "against",
    "measure",
    "pairs",
    "mean_difference",
    "standard_error",
    "sd_of_differences",
)
_MANY_BITS = 3  # from so many precisions on, they are an axis


def write_report(out: str | os.PathLike[str], command: str) -> None:
    """Write final.csv, paired.csv, plots and summary.md into a sweep's directory.

    Args:
        out: the directory, with the tables of `run_sweep`.
        command: what made them, for the page.

    Raises:
        ValueError: there are no figures yet, or Matplotlib is missing.
    """
    out = Path(out)
    sweep = config.load_sweep(str(out / "sweep.yaml"))
    training = [row | {"variant": _variant(row).name} for row in read_csv(out / "training.csv")]
    if not training:
        raise ValueError(f"{out}: no cell of the sweep has finished, there is nothing to report")
    final, paired = final_rows(training), paired_rows(training)
    write_csv(out / "final.csv", final, FINAL_FIELDS)
    write_csv(out / "paired.csv", paired, PAIRED_FIELDS)
    plots = _pyplot()
    pictures = []
    if len({row["frac_bits"] for row in training if row["mode"] == "shadow"}) >= _MANY_BITS:
        gradients, protocols = (read_csv(out / f"{n}.csv") for n in ("gradients", "protocols"))
        _save(
            out / "precision.png", plots, _precision(plots, sweep, training, gradients, protocols)
        )
        pictures.append(("precision.png", "Precision: quality, gradients and protocols"))
        _save(out / "layers.png", plots, _layers(plots, sweep, read_csv(out / "layers.csv")))
        pictures.append(("layers.png", "What each layer's result lost, with stochastic rounding"))
    _save(out / "curves.png", plots, _curves(plots, sweep, training))
    pictures.append(("curves.png", "Training: mean over seeds, band from the least to the most"))
    if _samples(out, sweep):
        pictures.append(("samples.png", f"Images from the same noise, seed {sweep.seeds[0]}"))
    page = _page(sweep, command, final, paired, pictures)
    atomic_write(out / "summary.md", page.encode(), private=False)


def _variant(row: Row) -> Variant:
    of: dict[str, Any] = {name: row[name] for name in FIELDS if name in row}
    return Variant(**of)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")  # no screen is needed
        from matplotlib import pyplot
    except ImportError:
        raise ValueError(
            "plots need Matplotlib: pip install 'lpgan-jax[experiments]', and run this again"
        ) from None
    return pyplot


def _save(path: Path, plots: Any, figure: Any) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plots.close(figure)
    atomic_write(path, buffer.getvalue(), private=False)


# Figures ------------------------------------------------------------------------------------------


def _last_rows(training: list[Row]) -> list[Row]:
    last = max(row["step"] for row in training)
    return [row for row in training if row["step"] == last]


def final_rows(training: list[Row]) -> list[Row]:
    """Mean and standard deviation over seeds, of each variant at the last step."""
    groups: dict[str, list[Row]] = {}
    for row in _last_rows(training):
        groups.setdefault(row["variant"], []).append(row)
    rows = []
    for group in groups.values():
        summary: Row = {name: group[0].get(name) for name in _FINAL if name != "seeds"}
        summary["seeds"] = len(group)
        for measure in MEASURES:
            values = np.array([r[measure] for r in group if r.get(measure) is not None])
            if not len(values):  # losses, where nobody opened them
                continue
            summary[f"{measure}_mean"] = float(values.mean())
            summary[f"{measure}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else None
        rows.append(summary)
    return rows


def paired_rows(training: list[Row]) -> list[Row]:
    """Differences between runs of the same seed, at the last step.

    Of each variant from float32 with the same privacy, and of the shadow from the protocols at the
    same precision.
    """
    by_variant: dict[str, dict[int, Row]] = {}
    for row in _last_rows(training):
        by_variant.setdefault(row["variant"], {})[row["seed"]] = row
    plain = {name: "".join(["float32", *name.partition("-epsilon-")[1:]]) for name in by_variant}
    pairs = [(name, against) for name, against in plain.items() if name != against]
    pairs += [
        (name, name.replace("shadow-stochastic", "secure"))
        for name in by_variant
        if name.startswith("shadow-stochastic")
    ]
    rows = []
    for name, against in pairs:
        for measure in MEASURES:
            seeds = sorted(by_variant[name].keys() & by_variant.get(against, {}).keys())
            seeds = [s for s in seeds if by_variant[name][s].get(measure) is not None]
            if len(seeds) < 2:
                continue
            differences = np.array(
                [by_variant[name][s][measure] - by_variant[against][s][measure] for s in seeds]
            )
            spread = float(differences.std(ddof=1))
            rows.append(
                {
                    "variant": name,
                    "against": against,
                    "measure": measure,
                    "pairs": len(seeds),
                    "mean_difference": float(differences.mean()),
                    "standard_error": spread / len(seeds) ** 0.5,
                    "sd_of_differences": spread,
                }
            )
    return rows


MARGIN = 1.25  # of the Fréchet distance; single runs differ by more from the last bit alone


def good_bits(final: list[Row]) -> list[int]:
    """The fraction bits at which secure training does as well as float32, in a row.

    As well: the mean Fréchet distance over the seeds is below `MARGIN` times float32's. Of the
    sweep's precisions (stochastic rounding) the longest unbroken row that is. A description of
    these runs, not a test.
    """
    plain = next((row for row in final if row["variant"] == "float32"), None)
    if plain is None:
        return []
    rows: list[list[int]] = [[]]
    shadows = [r for r in final if r["variant"].startswith("shadow-stochastic")]
    for row in sorted(shadows, key=lambda r: r["frac_bits"]):
        if row["frechet_mean"] < MARGIN * plain["frechet_mean"]:
            rows[-1].append(row["frac_bits"])
        else:
            rows.append([])
    return max(rows, key=len)


# Plots --------------------------------------------------------------------------------------------

_COLOURS = {"stochastic": "tab:blue", "nearest": "tab:green", "local": "tab:red"}
_LABELS = {
    "stochastic": "shadow, stochastic (the protocols')",
    "nearest": "shadow, nearest",
    "local": "shadow, local truncation",
}


def _title(sweep: SweepConfig) -> str:
    changes = "".join(f", {change}" for change in sweep.set)
    first, last = min(sweep.seeds), max(sweep.seeds)
    seeds = f"seeds {', '.join(map(str, sweep.seeds))}"
    if len(sweep.seeds) > 3 and len(sweep.seeds) == last - first + 1:
        seeds = f"seeds {first} to {last}"
    return f"{sweep.base}{changes}; {seeds}"


def _bands(axes: Any, points: dict[Any, list[float]], **style: Any) -> None:
    """A line through the means over seeds, and a band from the least to the most."""
    xs = sorted(points)
    axes.plot(xs, [np.mean(points[x]) for x in xs], **style)
    low, high = [min(points[x]) for x in xs], [max(points[x]) for x in xs]
    axes.fill_between(xs, low, high, color=style.get("color"), alpha=0.2, linewidth=0)


def _collect(rows: list[Row], key: str, value: str, **wanted: Any) -> dict[Any, list[float]]:
    """Values by key, of the rows whose fields are as wanted."""
    points: dict[Any, list[float]] = {}
    for row in rows:
        if row[value] is not None and all(row[n] == v for n, v in wanted.items()):
            points.setdefault(row[key], []).append(row[value])
    return points


def _precision(
    plots: Any,
    sweep: SweepConfig,
    training: list[Row],
    gradients: list[Row],
    protocols: list[Row],
) -> Any:
    figure, (quality, gradient, protocol) = plots.subplots(
        1, 3, figsize=(17, 5), layout="constrained"
    )
    last = _last_rows(training)
    overall = [row for row in gradients if row["parameter"] == "all"]
    panels = ((quality, last, "frechet"), (gradient, overall, "relative_error"))
    for axes, rows, value in panels:
        for rounding, colour in _COLOURS.items():
            points = _collect(rows, "frac_bits", value, mode="shadow", rounding=rounding)
            if points:
                _bands(axes, points, color=colour, marker=".", label=_LABELS[rounding])
        secure = [r for r in rows if r["mode"] == "secure" and r[value] is not None]
        if secure:
            xs, ys = [r["frac_bits"] for r in secure], [r[value] for r in secure]
            axes.plot(xs, ys, "kx", label="secure: the protocols")
        axes.set_xlabel("fraction bits")
        axes.set_yscale("log")
    plain = [row["frechet"] for row in last if row["variant"] == "float32"]
    if plain:
        quality.axhline(np.mean(plain), color="gray", label="float32")
        quality.axhspan(min(plain), max(plain), color="gray", alpha=0.2, linewidth=0)
    quality.set_ylabel("Fréchet distance in features of a classifier")
    quality.set_title(f"generated images after step {last[0]['step']}")
    gradient.set_ylabel("relative error of a step's gradient, both networks")
    gradient.set_title(f"gradients, from the twin's parameters, seed {sweep.seeds[0]}")
    for name in dict.fromkeys(row["protocol"] for row in protocols):
        of: Row = {"protocol": name, "mode": "shadow", "rounding": "stochastic"}
        points = _collect(protocols, "frac_bits", "error_rms", **of)
        xs = sorted(points)
        protocol.plot(xs, [np.mean(points[x]) for x in xs], marker=".", label=name)
    protocol.set_xlabel("fraction bits")
    protocol.set_ylabel("root mean square error [LSB]")
    protocol.set_title("protocols, stochastic rounding")
    for axes in (quality, gradient, protocol):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(_title(sweep))
    return figure


def _layers(plots: Any, sweep: SweepConfig, layers: list[Row]) -> Any:
    """A map: layers by precision, the loss of each layer's last truncation in LSB."""
    lost: dict[str, dict[int, float]] = {}
    for row in layers:
        if row["rounding"] == "stochastic":
            place = row["place"].split(" ")[0].split("/")[0]  # later rows replace earlier ones
            lost.setdefault(place, {})[row["frac_bits"]] = row["lost_rms"]
    places, bits = list(lost), sorted({b for of in lost.values() for b in of})
    table = np.array([[lost[place].get(b, np.nan) for b in bits] for place in places])
    figure, axes = plots.subplots(figsize=(9, 2 + 0.22 * len(places)), layout="constrained")
    image = axes.imshow(np.log2(np.maximum(table, 0.1)), aspect="auto", cmap="magma_r")
    axes.set_xticks(range(len(bits)), bits)
    axes.set_yticks(range(len(places)), places, fontsize="x-small")
    axes.set_xlabel("fraction bits")
    axes.set_ylabel("layer, in the order of the program")
    axes.set_title(f"{_title(sweep)}; first seed", fontsize="small")
    figure.colorbar(image, label="log2 of the root mean square loss [LSB]")
    return figure


def _curves(plots: Any, sweep: SweepConfig, training: list[Row]) -> Any:
    """Measures over steps. Of shadow runs, those that round as the protocols do."""
    figure, grid = plots.subplots(2, 2, figsize=(13, 9), layout="constrained")
    shown = [r for r in training if r["mode"] != "shadow" or r["rounding"] == "stochastic"]
    names = list(dict.fromkeys(row["variant"] for row in shown))
    colours = plots.get_cmap("viridis" if len(names) > 10 else "tab10")
    panels = {
        "frechet": "Fréchet distance in features of a classifier",
        "distance": "distance from the float64 twin / way from the start",
        "loss_d": "discriminator's loss [nats]",
        "loss_g": "generator's loss [nats]",
    }
    for axes, (value, label) in zip(grid.flat, panels.items(), strict=True):
        for index, name in enumerate(names):
            points = _collect(shown, "step", value, variant=name)
            colour = colours(index / len(names) if len(names) > 10 else index)
            if points:
                _bands(axes, points, color=colour, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if value in ("frechet", "distance"):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    grid.flat[0].legend(fontsize="x-small")
    figure.suptitle(f"{_title(sweep)}: mean, and from the least to the most")
    return figure


def _samples(out: Path, sweep: SweepConfig) -> bool:
    """The pictures of the first seed's cells side by side, each under its name."""
    tiles: list[tuple[str, Image.Image]] = []
    for variant in variants(sweep):
        file = out / "cells" / f"{Cell(variant, sweep.seeds[0]).name}.png"
        if file.is_file() and (variant.mode != "shadow" or variant.rounding == "stochastic"):
            with Image.open(file) as opened:
                tiles.append((variant.name, opened.convert("RGB")))
    if not tiles:
        return False
    columns, head = min(5, len(tiles)), 14
    width, height = tiles[0][1].size
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * (width + 6), rows * (height + head + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (name, picture) in enumerate(tiles):
        row, column = divmod(index, columns)
        left, top = column * (width + 6), row * (height + head + 4)
        draw.text((left + 2, top + 1), name, fill="black")
        canvas.paste(picture, (left, top + head))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    atomic_write(out / "samples.png", buffer.getvalue(), private=False)
    return True


# The page -----------------------------------------------------------------------------------------


_SHOWN = {
    "frechet": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "coverage": "classes covered",
    "accuracy": "accuracy of a classifier of generated images",
    "distance": "distance from the float64 twin",
}


def _page(
    sweep: SweepConfig,
    command: str,
    final: list[Row],
    paired: list[Row],
    pictures: Sequence[tuple[str, str]],
) -> str:
    lines = [
        f"Made by `{command}`: {_title(sweep)}; {final[0]['step']} steps, quality of "
        f"{sweep.num_images} images.",
        "",
    ]
    for file, caption in pictures:
        lines += [f"![{caption}]({file})", "", f"*{caption}.*", ""]
    bits = good_bits(final)
    precisions = {row["frac_bits"] for row in final if row["mode"] == "shadow"}
    if len(precisions) >= _MANY_BITS:
        lines += [
            f"The mean Fréchet distance is below {MARGIN:g} times float32's "
            + (f"from **{bits[0]} to {bits[-1]} fraction bits**." if bits else "at no precision."),
            "",
        ]
    lines += [
        "Last step, mean ± standard deviation over the seeds (final.csv):",
        "",
        f"| run | seeds | {' | '.join(_SHOWN.values())} |",
        "|---|---:|" + "---:|" * len(_SHOWN),
    ]
    for row in final:
        cells = [_plus_minus(row, measure) for measure in _SHOWN]
        lines.append(f"| {row['variant']} | {row['seeds']} | {' | '.join(cells)} |")
    shown = [row for row in paired if row["measure"] == "frechet"]
    if shown:
        lines += [
            "",
            "Fréchet distance, differences between runs of one seed (paired.csv):",
            "",
            "| run | against | pairs | mean difference | standard error | standard deviation |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for row in shown:
            lines.append(
                f"| {row['variant']} | {row['against']} | {row['pairs']} | "
                f"{row['mean_difference']:+.3g} | {row['standard_error']:.3g} | "
                f"{row['sd_of_differences']:.3g} |"
            )
    return "\n".join(lines) + "\n"


def _plus_minus(row: Row, measure: str) -> str:
    mean, spread = row.get(f"{measure}_mean"), row.get(f"{measure}_sd")
    if mean is None:
        return ""
    return f"{mean:.3g}" if spread is None else f"{mean:.3g} ± {spread:.2g}"
