"""How fast is it on this machine? Writes docs/performance.csv, performance.md and performance.png.

    python experiments/performance.py measure
    python experiments/performance.py

The first runs every command of the page; the second writes the page and the plot again.
"""

import argparse
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from compare_peers import NAMES

from lpgan_jax.common import tables
from lpgan_jax.common.files import atomic_write
from lpgan_jax.common.tables import Row
from lpgan_jax.training import bench

ROOT = Path(__file__).parent.parent
COMMAND = "python experiments/performance.py"
FIELDS = ("command", "key", "value")
PUBLISHED = [f"lpgan bench --config mnist --batch-size {m} --json" for m in (4, 16, 64)]
DIGITS = "lpgan bench --config digits --json"
MICRO = "lpgan bench --micro --json"
PEERS = [f"python experiments/compare_peers.py --batch-size {m} --json" for m in (4, 16)]
COMMANDS = [*PUBLISHED, DIGITS, MICRO, *PEERS]

Figures = dict[str, dict[str, Any]]
"""{command: {key: value}}."""

MACHINE = ("cpu", "cores", "memory_bytes", "device", "native", "python", "jax", "jaxlib")

# Measured by compare_twin.py, which is run when the protocols change and not for speed.
AGREEMENT = """## Agreement with plaintext training

`python experiments/compare_twin.py` (digits, batch 64, 18 fraction bits, against the same step in float64, from the same parameters, batches and noise):

| optimizer | steps | largest difference of a parameter | largest move of a parameter |
|---|---|---|---|
| SGD, 2e-3 on the mean gradient | 1 | 1.4e-5 (3.7 LSB) | 2.3e-3 |
| | 20 | 4.5e-5 (11.8 LSB) | 1.8e-2 |
| Adam, 1e-3 | 1 | 2.0e-3 | 1.0e-3 |
| | 20 | 8.2e-3 | 2.6e-2 |

Adam's first step is the sign of the gradient, so where a gradient is near 0 any rounding decides the direction: the largest
difference is such an element.
"""  # noqa: E501


# Measuring ----------------------------------------------------------------------------------------


def run(command: str) -> dict[str, Any]:
    """What a command of the page prints; Python and `lpgan` are those that run this script."""
    program, *arguments = shlex.split(command)
    module = ["-m", "lpgan_jax.cli"] if program == "lpgan" else []
    line = [sys.executable, *module, *arguments]
    done = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def to_csv(figures: Figures) -> str:
    """In long form, with six digits."""
    rows: list[Row] = [
        {
            "command": command,
            "key": key,
            "value": f"{value:.6g}" if isinstance(value, float) else str(value),
        }
        for command in COMMANDS
        for key, value in figures.get(command, {}).items()
    ]
    return tables.to_csv(rows, FIELDS)


def from_csv(text: str) -> Figures:
    """The figures of `to_csv`."""
    figures: Figures = {}
    for row in tables.from_csv(text, {"command": str, "key": str, "value": _value}):
        figures.setdefault(str(row["command"]), {})[str(row["key"])] = row["value"]
    return figures


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


# Writing ------------------------------------------------------------------------------------------


def _machine(figures: Figures) -> str:
    machines = [{key: own[key] for key in MACHINE} for own in figures.values()]
    if any(machine != machines[0] for machine in machines):
        raise ValueError("figures of different machines or versions: measure them all again")
    cpu, cores, memory, device, native, python, jax, jaxlib = (
        bench.shown(key, value) for key, value in machines[0].items()
    )
    on = "" if device == "cpu" else f" {device},"
    return (
        f"{cpu},{on} {cores} cores, {memory} of memory; Python {python}, JAX {jax}, "
        f"jaxlib {jaxlib}; native kernels: {native}."
    )


def _commands(commands: Iterable[str]) -> str:
    return "\n".join(["```sh", *commands, "```"])


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    columns = lines[0].count("|") - 1
    return "\n".join([lines[0], "|---|" + "---:|" * (columns - 1), *lines[1:]])


def _heads(corner: str, columns: list[dict[str, Any]]) -> list[str]:
    return [corner, *(f"batch {own['batch_size']}" for own in columns)]


def _step(columns: list[dict[str, Any]]) -> str:
    hidden = ("config", "batch_size", *MACHINE, *(f"share_{part}" for part in bench.PARTS))
    keys = [key for key in bench.LABELS if key in columns[0] and key not in hidden]
    rows = ([bench.label(key), *(bench.shown(key, own[key]) for own in columns)] for key in keys)
    return _table(_heads("", columns), rows)


def _breakdown(columns: list[dict[str, Any]]) -> str:
    def cell(part: str, own: dict[str, Any]) -> str:
        seconds, share = (bench.shown(key, own[key]) for key in (f"{part}_s", f"share_{part}"))
        return f"{seconds} ({share})"

    rows = ([part.replace("_", " "), *(cell(part, own) for own in columns)] for part in bench.PARTS)
    return _table(_heads("", columns), rows)


def _micro(own: dict[str, Any]) -> tuple[str, str]:
    """The tables of protocols and of ring products."""
    protocols, products = [], []
    for key, value in own.items():
        if key.endswith("_gmacs"):
            name, shape = key.removeprefix("micro_").removesuffix("_gmacs").split("_")
            ratio = own[key.replace("_gmacs", "_to_float32")]
            ring = shape.replace("x", " x ") + (", 2^32" if name == "product32" else "")
            products.append([ring, bench.shown(key, value), f"{ratio:.3g}"])
        elif key.endswith("_per_s"):
            protocols.append([bench.label(key), bench.shown(key, value)])
    return _table(["", ""], protocols), _table(["shape", "", "/ float32"], products)


def _peers(columns: list[dict[str, Any]]) -> str:
    def cell(system: str, own: dict[str, Any]) -> str:
        if f"{system}_step_s" not in own:
            return "-"
        return f"{own[f'{system}_step_s']:.3g} ({own[f'{system}_ratio']:.3g})"

    rows = []
    for system, name in NAMES.items():
        versions = {own[f"{system}_version"] for own in columns if f"{system}_version" in own}
        if versions:
            title = f"{name} {', '.join(sorted(versions))}"
            rows.append([title, *(cell(system, own) for own in columns)])
    return _table(_heads("seconds a step", columns), rows)


def _line(columns: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, Any]:
    """Batches, seconds a step, and (slope, intercept) of the least squares' line, if any."""
    batches, seconds = (
        np.array([own[key] for own in columns], np.float64) for key in ("batch_size", "step_s")
    )
    return batches, seconds, np.polyfit(batches, seconds, 1) if len(columns) > 1 else None


def to_markdown(figures: Figures) -> str:
    """The page, with a section for whatever was measured."""
    published = {command: figures[command] for command in PUBLISHED if command in figures}
    peers = {command: figures[command] for command in PEERS if command in figures}
    parts = [
        f"""# Performance

Written by `{COMMAND}` from the figures of [performance.csv](performance.csv),
which `{COMMAND} measure` writes.

Measured on {_machine(figures)}
Both servers, DS and SP run in one process.
"""
    ]
    if published:
        steps = list(published.values())
        _, _, line = _line(steps)
        fit = "" if line is None else f" About {line[1]:.2g} s and {line[0]:.2g} s an image."
        parts.append(f"""## The published 32x32 network

{_commands(published)}

{_step(steps)}

Random images; the figures do not depend on what is in them. DS deals ahead of time. Rounds and
bytes are those of the trace (`lpgan cost`).{fit}

![seconds a step against the batch, and its parts](performance.png)

Where the time goes: instructions of a profiled step, by the innermost named scope that they come
from. A fused instruction counts as its result does; "other" is mostly sums, copies and openings.

{_breakdown(steps)}
""")
    if DIGITS in figures:
        parts.append(f"""## Digits

16x16, 8 feature maps, Adam.

{_commands([DIGITS])}

{_step([figures[DIGITS]])}
""")
    if peers:
        parts.append(f"""## Next to other systems

One step of the published network with SGD, in turn in one run: CrypTen with two processes and its
own dealer (TFP); SPU's SEMI2K in a 64-bit ring, both parties in one process. In brackets: how many
times ours.

{_commands(peers)}

{_peers(list(peers.values()))}
""")
    if MICRO in figures:
        protocols, products = _micro(figures[MICRO])
        parts.append(f"""## Protocols by themselves

{_commands([MICRO])}

Elements a second of each protocol, with its randomness, both servers and DS; for ChaCha20, 64-bit
words.

{protocols}

Ring products `a @ b` of M x K x N modulo 2^64 (or 2^32, as it says), in 10^9 multiply-adds a
second, and as a part of what float32 reaches.

{products}
""")
    return "\n".join([*parts, AGREEMENT])


def draw(figures: Figures) -> bytes:
    """Seconds a step against the batch with a line, and the parts of a step, as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    published = [figures[command] for command in PUBLISHED if command in figures]
    batches, seconds, line = _line(published)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    left.plot(batches, seconds, "o", color="tab:blue", label="measured, median")
    if line is not None:
        ends = np.array([0, batches.max()])
        text = f"{line[1]:.2g} s + {line[0]:.2g} s an image"
        left.plot(ends, np.polyval(line, ends), color="0.6", zorder=0, label=text)
    left.set(xlim=(0, None), ylim=(0, None), xlabel="images in a batch", ylabel="a step [s]")
    left.set_xticks(batches)
    left.legend(loc="upper left", frameon=False)
    names, bottom = [f"{batch:.0f}" for batch in batches], np.zeros(len(batches))
    for part in bench.PARTS:
        shares = np.array([100 * own[f"share_{part}"] for own in published])
        right.bar(names, shares, 0.6, bottom, label=part.replace("_", " "))
        bottom += shares
    right.set(ylim=(0, 100), xlabel="images in a batch", ylabel="share of a step's time [%]")
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return image.getvalue()


def main() -> None:
    """Measure if asked to, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=["measure"])
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="measure commands with this text; keep others"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR")
    args = parser.parse_args()
    table = args.out / "performance.csv"
    figures = from_csv(table.read_text()) if table.exists() else {}
    if args.action:
        for command in COMMANDS:
            if args.only in command:
                print(f"{command} ...", flush=True)
                figures[command] = run(command)
                atomic_write(table, to_csv(figures).encode(), private=False)
        figures = from_csv(table.read_text())  # the page has what the file has
    if not figures:
        parser.error(f"{table}: no figures yet: {COMMAND} measure")
    atomic_write(args.out / "performance.md", to_markdown(figures).encode(), private=False)
    if any(command in figures for command in PUBLISHED):
        atomic_write(args.out / "performance.png", draw(figures), private=False)
    print(f"{table}, performance.md and performance.png")


if __name__ == "__main__":
    main()
