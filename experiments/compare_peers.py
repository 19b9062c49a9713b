r"""A training step next to CrypTen and SPU: the same network, batch and optimizer, in turn.

    python experiments/compare_peers.py --batch-size 16 --rounds 2

Ours is `lpgan bench --config mnist`; theirs are peers/dcgan_crypten.py and peers/dcgan_spu.py, each
in a virtual environment of its own, because they need other versions of PyTorch and JAX:

    dir=${LPGAN_PEERS_DIR:-$HOME/.cache/lpgan-peers}
    python3.11 -m venv $dir/crypten
    $dir/crypten/bin/pip install torch==2.13.0 numpy scipy pyyaml omegaconf onnx future \
        tensorboard pandas scikit-learn
    $dir/crypten/bin/pip install --no-deps crypten==0.4.1
    python3.11 -m venv $dir/spu
    $dir/spu/bin/pip install spu==0.9.5

One that is missing is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import lpgan_jax
from lpgan_jax.common import tables
from lpgan_jax.common.files import atomic_write
from lpgan_jax.common.tables import Row
from lpgan_jax.training import bench

HERE = Path(__file__).parent
NAMES = {"lpgan_jax": "lpgan_jax", "crypten": "CrypTen", "spu": "SPU"}
FIELDS = ("round", "system", "version", "batch_size", "step_s")


def interpreter(system: str) -> Path:
    """Where a peer's Python is expected."""
    root = os.environ.get("LPGAN_PEERS_DIR") or Path.home() / ".cache" / "lpgan-peers"
    return Path(root) / system / "bin" / "python"


def commands(batch_size: int, steps: int, pythons: dict[str, Path]) -> dict[str, list[str]]:
    """What measures each system; ours first."""
    size, timed = ["--batch-size", str(batch_size)], ["--steps", str(steps)]
    ours = ["-m", "lpgan_jax.cli", "bench", "--config", "mnist", "--json"]
    theirs = {
        system: [str(python), str(HERE / "peers" / f"dcgan_{system}.py"), str(batch_size), *timed]
        for system, python in pythons.items()
    }
    return {"lpgan_jax": [sys.executable, *ours, *size, *timed], **theirs}


def run(command: list[str]) -> dict[str, Any]:
    """The JSON object that a command prints, after whatever else it prints.

    Raises:
        OSError: the command cannot be run, or fails; its last words.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ChildProcessError(last[0])
    figures: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return figures


def compare(commands: dict[str, list[str]], rounds: int) -> list[Row]:
    """All systems in turn, several times; a peer that fails is named and left out."""
    rows: list[Row] = []
    working = dict(commands)
    for number in range(1, rounds + 1):
        for system, command in list(working.items()):
            try:
                figures = run(command)
            except OSError as error:
                if system == "lpgan_jax":
                    raise
                text = f"{NAMES[system]} is left out: {error}\n  needed: {command[0]} with {system}"
                print(f"{text} installed; see --help", file=sys.stderr, flush=True)
                del working[system]
                continue
            row: Row = {name: figures.get(name) for name in FIELDS}
            row |= {"round": number, "system": system}
            if system == "lpgan_jax":
                row["version"] = lpgan_jax.__version__
            rows.append(row)
            text = f"round {number}: {NAMES[system]} {row['version']}, {row['step_s']:.3g} s a step"
            print(text, file=sys.stderr, flush=True)
    return rows


def summary(rows: list[Row]) -> dict[str, Any]:
    """Medians over the rounds, and how many times as long as ours each peer takes."""
    report: dict[str, Any] = {}
    for system in NAMES:
        own = [row for row in rows if row["system"] == system]
        if own:
            seconds = statistics.median(float(row["step_s"] or 0) for row in own)
            report |= {f"{system}_version": own[0]["version"], f"{system}_step_s": seconds}
            report[f"{system}_ratio"] = seconds / report["lpgan_jax_step_s"]
    return report


def to_markdown(rows: list[Row]) -> str:
    """Seconds a step of every round, their median, and the ratio to ours."""
    report = summary(rows)
    rounds = sorted({int(row["round"] or 0) for row in rows})
    heads = ["seconds a step", *(f"round {number}" for number in rounds), "median", "ratio"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for system, name in NAMES.items():
        own = {row["round"]: f"{row['step_s']:.3g}" for row in rows if row["system"] == system}
        if own:
            cells = [f"{name} {report[f'{system}_version']}", *(own.get(n, "") for n in rounds)]
            cells += [f"{report[f'{system}_{key}']:.3g}" for key in ("step_s", "ratio")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--steps", type=int, default=3, metavar="N", help="timed in a round, after a first one"
    )
    for system in list(NAMES)[1:]:
        parser.add_argument(
            f"--{system}",
            type=Path,
            default=interpreter(system),
            metavar="PYTHON",
            help=f"the interpreter that has {NAMES[system]} (default: {interpreter(system)})",
        )
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write every round's figures")
    parser.add_argument("--json", action="store_true", help="print medians as a JSON object")
    args = parser.parse_args()
    for name in ("batch_size", "rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"{name}: expected at least 1, got {getattr(args, name)}")
    pythons = {"crypten": args.crypten, "spu": args.spu}
    rows = compare(commands(args.batch_size, args.steps, pythons), args.rounds)
    if args.out:
        atomic_write(args.out, tables.to_csv(rows, FIELDS).encode(), private=False)
    if args.json:
        settings = {name: getattr(args, name) for name in ("batch_size", "rounds", "steps")}
        print(json.dumps(settings | bench.machine() | summary(rows), indent=2))
    else:
        print(to_markdown(rows))


if __name__ == "__main__":
    main()
