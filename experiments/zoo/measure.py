"""The zoo, measured: what a step of each model costs, and how exact it is.

    python experiments/zoo/measure.py --out docs

Each model runs in a process of its own: a step on shares (both servers and DS simulated), beside
the same step in float64. OUT gets zoo.csv, where a model that is there is not measured again, and
zoo.md, the page. `--only resnet18:8` measures one, at a batch size.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

Model = tuple[str, str, int, dict[str, Any]]
MODELS: list[Model] = [
    ("logistic regression", "logistic_regression", 128, {}),
    ("A (SecureML)", "network_a", 128, {}),
    ("B (MiniONN)", "network_b", 128, {}),
    ("C (LeNet)", "network_c", 128, {}),
    ("D (Chameleon)", "network_d", 128, {}),
    ("small: fc", "small", 64, {"network": "fc"}),
    ("small: conv-square", "small", 64, {"network": "conv-square"}),
    ("small: conv-relu", "small", 64, {"network": "conv-relu"}),
    ("AlexNet", "alexnet", 8, {}),
    ("AlexNet", "alexnet", 128, {}),
    ("VGG-16", "vgg16", 8, {}),
    ("ResNet-18", "resnet18", 8, {"frac_bits": 24}),
    ("ResNet-18", "resnet18", 64, {}),
    ("LSTM", "lstm", 32, {}),
    ("Transformer", "transformer", 64, {}),
    ("VAE", "vae", 64, {}),
    ("WGAN-GP", "wgan_gp", 32, {}),
    ("DCGAN", "dcgan", 16, {}),
    ("DDPM", "ddpm", 32, {}),
]
"""(what it is called, file, batch size, options)."""
COLUMNS = (
    *("model", "batch_size", "parameters", "rounds", "exchanges", "online_bytes", "dealer_bytes"),
    *("lan_s", "trace_s", "compile_s", "step_s", "plaintext_s", "peak_bytes", "frac_bits"),
    *("largest_lsb", "median_lsb", "told_lsb", "processes_s"),
)
STEPS = 3
"""That are timed, after one."""
PROCESSES = ("network_a", "network_b", "network_c", "network_d")
"""What is also trained by `lpgan up`: DS, S1, S2 and SP as processes, over loopback."""
STEPS_OF_PROCESSES = 40
OF_DIGITS = ("vae", "ddpm")
"""What trains on scikit-learn's digits, 16x16, whatever the data."""


def measure(file: str, batch_size: int, options: dict[str, Any], data: str | None) -> Any:
    """A row of the table, of this process."""
    import jax
    import numpy as np

    from lpgan_jax.analysis.cost import LAN, program_cost
    from lpgan_jax.mpc.prng import key
    from lpgan_jax.mpc.share_trees import reveal_tree
    from lpgan_jax.programs import initial_state, secured, shapes
    from lpgan_jax.programs.simulation import Simulation
    from lpgan_jax.training import program_file

    training = program_file.load(str(HERE / f"{file}.py"), {"batch_size": batch_size, **options})
    before = time.time()
    program = secured(training.program)
    trace_s = time.time() - before
    function, secrets, public = shapes.step_program(program)
    cost = program_cost(function, secrets, public, inputs=secrets[1])
    initial, draw = initial_state(training.program, 0), training.feed(0, data)
    batch = draw(0)

    exact, times = jax.jit(training.program.step), []
    wide = jax.tree.map(_wide, (initial, batch))
    expected = jax.tree.map(np.asarray, exact(*wide))
    for _ in range(STEPS):
        before = time.time()
        jax.block_until_ready(exact(*wide))
        times.append(time.time() - before)
    plaintext_s = float(np.median(times))

    simulation, seconds = Simulation.begin(program, initial, key(0)), []
    for step in range(1 + STEPS):
        before = time.time()
        told = simulation.train_step(step, batch if step == 0 else draw(step))
        jax.block_until_ready((simulation.state, told))
        seconds.append(time.time() - before)
        if step == 0:
            found = reveal_tree((program.learnt(simulation.state), told))
    learnt = program.learnt(program.secret(expected[0]))
    errors = jax.tree.map(lambda a, b: 2**18 * np.abs(a - b).ravel(), found, (learnt, expected[1]))
    of_learnt, of_told = (np.concatenate(jax.tree.leaves(of)) for of in errors)
    step_s = float(np.median(seconds[1:]))
    parameters = sum(x.size for x in jax.tree.leaves(training.program.learnt(initial)))
    return {
        "parameters": parameters,
        "rounds": cost.rounds,
        "exchanges": cost.exchanges,
        "online_bytes": cost.online_bytes,
        "dealer_bytes": cost.dealer_bytes_s2,
        "lan_s": cost.seconds(*LAN),
        "trace_s": trace_s,
        "compile_s": seconds[0] - step_s,
        "step_s": step_s,
        "plaintext_s": plaintext_s,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "frac_bits": program.frac_bits,
        "largest_lsb": float(of_learnt.max()),
        "median_lsb": float(np.median(of_learnt)),
        "told_lsb": float(of_told.max()),
    }


def measure_processes(
    file: str, batch_size: int, options: dict[str, Any], data: str | None
) -> float:
    """Seconds a step of four processes, from an answer's to the next: the median of the later."""
    from lpgan_jax.common.tables import read_csv

    with tempfile.TemporaryDirectory() as folder:
        run, program = Path(folder) / "run", HERE / f"{file}.py"
        command = [sys.executable, "-m", "lpgan_jax.cli", "up", "--program", str(program)]
        command += ["--out", str(run), "--steps", str(STEPS_OF_PROCESSES), "--seed", "0"]
        for name, value in {"batch_size": batch_size, **options}.items():
            command += ["--set", f"{name}={value}"]
        command += ["--data", data] if data else []
        _output_of(command)
        rows = read_csv(run / "metrics.csv")
    return statistics.median(row["seconds"] for row in rows[1:])


def _output_of(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def chosen(only: str) -> list[Model]:
    """The models of "file", or of "file:batch size" at that batch size."""
    file, _, size = only.partition(":")
    models = [model for model in MODELS if model[1] == file]
    if not models:
        files = ", ".join(sorted({model[1] for model in MODELS}))
        raise SystemExit(f"--only {only}: expected one of {files}")
    if not size:
        return models
    return list({name: (name, file, int(size), options) for name, _, _, options in models}.values())


def _wide(leaf: Any) -> Any:
    import jax.numpy as jnp

    array = jnp.asarray(leaf)
    return array.astype(jnp.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def main() -> None:
    """Measure what is not in the table, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the directory of zoo.csv")
    parser.add_argument("--data", help="MNIST's directory; without, scikit-learn's digits")
    parser.add_argument("--only", help="a file, or file:batch size")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        file, batch_size, options = json.loads(args.one)
        print(json.dumps(measure(file, batch_size, options, args.data)))
        return

    from lpgan_jax.common.files import atomic_write
    from lpgan_jax.common.tables import read_csv, write_csv

    table = args.out / "zoo.csv"
    rows = {(r["model"], r["batch_size"]): r for r in read_csv(table)} if table.exists() else {}
    for name, file, batch_size, options in chosen(args.only) if args.only else MODELS:
        if (name, batch_size) in rows and not args.only:
            continue
        print(f"{name}, batch {batch_size} ...", file=sys.stderr, flush=True)
        job = json.dumps([file, batch_size, options])
        command = [sys.executable, __file__, "--out", str(args.out), "--one", job]
        command += ["--data", args.data] if args.data and file not in OF_DIGITS else []
        row = {"model": name, "batch_size": batch_size, "processes_s": None}
        try:
            rows[name, batch_size] = row | json.loads(_output_of(command))
            write_csv(table, list(rows.values()), COLUMNS)
            if file in PROCESSES:
                seconds = measure_processes(file, batch_size, options, args.data)
                rows[name, batch_size]["processes_s"] = seconds
                write_csv(table, list(rows.values()), COLUMNS)
        except subprocess.CalledProcessError as error:
            print(f"  {error}\n{error.stderr[-2000:]}", file=sys.stderr)  # -9: out of memory
    text = page(list(rows.values()))
    atomic_write(args.out / "zoo.md", text.encode(), private=False)


HEAD = """\
# The zoo

Models of the field and others, each 10 to 40 lines of plain Flax in
[experiments/zoo](../experiments/zoo), trained on shares: what one step costs. Written by
`python experiments/zoo/measure.py --out docs` ({machine}; JAX {jax}; both servers and DS simulated
in one process, so that *step* is all their computation and no network). *Largest error* and
*median*: of all parameters and statistics after one step, beside the same step in float64, and
*loss*: of what SP is told, all in LSB of 2^-18; *bits* are the fraction bits; scales are the
default ones, without examples. Where a ReLU's input is nearer to 0 than its own error, its gradient
is all or nothing; where Adam begins, an update is the gradient's sign: of such elements is the
largest error. GANs' losses are sums, SG's after SD's update. *LAN*: the messages alone, at 1 Gbit/s
and 0.5 ms, by `lpgan cost`.
"""
HEADS = (
    *("model", "batch", "parameters", "rounds", "online", "DS", "LAN", "compile", "step"),
    *("in the clear", "memory", "bits", "largest error", "median", "loss"),
)
PUBLISHED = """
## Beside what others publish

Seconds a training step, as their authors report them, on other machines, with other trust: none of
these has a dealer who prepares randomness, and most have three servers of which no two collude.

*Processes*: DS, S1, S2 and SP by `lpgan up`, all four on this machine, over loopback.

| model, batch | others | ours, simulated | processes | LAN's messages |
|---|---|---|---|---|
| A, 128 | MP-SPDZ 0.098 [1] | {network_a} |
| B, 128 | MP-SPDZ 0.571 [1] | {network_b} |
| C, 128 | MP-SPDZ 1.175 [1]; Piranha on GPUs 0.888 [2] | {network_c} |
| D, 128 | MP-SPDZ 0.134 [1] | {network_d} |
| AlexNet, 128 | Piranha on GPUs 1.419 [2] | {alexnet} |
| ResNet-18 | SPU 264 s and 26.0 GB sent by a party [3] | {resnet18} |

[1] Keller and Sun, Secure Quantized Training for Deep Learning, ICML 2022: three servers, honest
majority, LAN. [2] Watson, Wagh and Popa, Piranha: A GPU Platform for Secure Computation, USENIX
Security 2022. [3] A user's measurement of SPU's own example, three parties:
[secretflow/spu#1270](https://github.com/secretflow/spu/issues/1270).
"""


def page(rows: list[dict[str, Any]]) -> str:
    """The table, and what others publish."""
    import jax

    from lpgan_jax.common.tables import si
    from lpgan_jax.training.bench import cpu_model

    machine = f"{cpu_model()}, {os.cpu_count()} cores"
    lines = [HEAD.format(machine=machine, jax=jax.__version__)]
    lines += [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    order = {(name, batch_size): n for n, (name, _, batch_size, _) in enumerate(MODELS)}
    rows = sorted(rows, key=lambda r: order.get((r["model"], r["batch_size"]), len(order)))
    for row in rows:
        cells = [
            *(row["model"], row["batch_size"], f"{row['parameters']:,}", row["rounds"]),
            *(si(row["online_bytes"], "B"), si(row["dealer_bytes"], "B"), f"{row['lan_s']:.2f} s"),
            *(f"{row['compile_s']:.0f} s", f"{row['step_s']:.3g} s", f"{row['plaintext_s']:.2g} s"),
            *(si(row["peak_bytes"], "B"), row["frac_bits"]),
            *(
                f"{row[name]:,.0f}" if row[name] >= 10 else f"{row[name]:.2g}"
                for name in ("largest_lsb", "median_lsb", "told_lsb")
            ),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    of_model = {row["model"]: row for row in sorted(rows, key=lambda r: r["batch_size"])}
    largest = {file: of_model.get(name) for name, file, _, _ in MODELS}

    def ours(file: str) -> str:
        row = largest[file]
        if row is None:
            return "not measured | |"
        size = f" (batch {row['batch_size']})" if row["batch_size"] != 128 else ""
        processes = f"{row['processes_s']:.3g} s" if row["processes_s"] else ""
        return f"{row['step_s']:.3g} s{size} | {processes} | {row['lan_s']:.2f} s"

    files = ("network_a", "network_b", "network_c", "network_d", "alexnet", "resnet18")
    published = PUBLISHED.format(**{file: ours(file) for file in files})
    return "\n".join(lines) + "\n" + published


if __name__ == "__main__":
    main()
