"""How fast is it? Measures a training step and its parts, and the protocols it is made of.

A step is measured with random images, both servers, DS and SP in one process. Start, peak memory
and time are those of processes that do nothing else: `measure` starts a cold one, which compiles,
and a warm one, which finds the compiled program in a cache and runs it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from rich import box
from rich.table import Table

from lpgan_jax import native
from lpgan_jax import protocols as P
from lpgan_jax.analysis.cost import program_cost, random_words
from lpgan_jax.common.tables import si
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.fixed_point import FixedPoint, encode
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.mpc.shares import share_words
from lpgan_jax.programs import Draw, initial_state, shapes
from lpgan_jax.programs.simulation import Simulation
from lpgan_jax.ring import matmul
from lpgan_jax.training import config
from lpgan_jax.training.building import build, build_gan, gan_training
from lpgan_jax.training.config import TrainConfig
from lpgan_jax.training.private import resolved
from lpgan_jax.training.trainers import PlaintextTrainer

Report = dict[str, Any]
"""Figures by name: numbers, truth values and text."""

# A training step ----------------------------------------------------------------------------------

PARTS = ("linear_algebra", "comparison", "truncation", "randomness", "other")
"""What a step's time is divided into: the `jax.named_scope`s of the protocols, and the rest."""


def measure(
    settings: TrainConfig, steps: int = 5, note: Callable[[str], None] = lambda text: None
) -> Report:
    """Measure one training step of D and G.

    Args:
        settings: a configuration; its data are not read.
        steps: how many to time, after a first one.
        note: receives what is being done.

    Returns:
        trace_s: seconds to trace the step.
        compile_s: seconds to trace, lower and compile it: the whole cold start of the program, in
            a new process with an empty compilation cache (it is written, which is included).
        warm_start_s: seconds from the start of a process to the end of its first step, where the
            cache has the compiled program: Python's start, imports, tracing and loading included.
        step_s: seconds a step, the median.
        images_per_s: images of the batch in these.
        comparisons_per_s: secret values compared with 0.
        multiply_adds_per_s: multiply-adds of ring products, of both servers and DS.
        peak_bytes: most memory that the warm process held.
        plaintext_step_s: the same of the twin in Flax and optax, compiled, float32.
        slowdown: step_s / plaintext_step_s.
        share_X, X_s: for each X of `PARTS`, its share of the summed time of a profiled step's
            instructions, and this share of step_s; left out if the profile names no instruction.
        rounds, messages, comparisons, online_bytes: see `cost_model.Cost`.
        random_words: uint64 words that the step draws, of all seeds together; and per image.
        random_words_per_s: these in the time that the profile gives randomness.
        dealer_bytes: what DS deals both servers, without the inputs.
        The batch size and the machine.

    Raises:
        ValueError: steps is below 1.
        ChildProcessError: a process failed; its last words.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    report: Report = {"batch_size": settings.batch_size, "steps": steps, **machine()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.yaml").write_text(config.dump(settings))
        note("compiling a step")
        report |= _in_process("cold", scratch)
        note(f"starting again, and running {steps} steps after a first one")
        started = time.time()
        warm = _in_process("warm", scratch, str(steps))
        report["warm_start_s"] = warm.pop("first_step_at") - started
        report |= warm
        try:
            shares = _in_process("shares", scratch)
        except ChildProcessError:  # JAX's reader of profiles may end the process that it is in
            shares = {}
    note("running the plaintext twin")
    report["plaintext_step_s"] = _plaintext_step_s(settings, steps)
    function, secrets, public = shapes.step_program(build(settings))
    cost = program_cost(function, secrets, public, inputs=secrets[1])
    seconds = report["step_s"]
    report |= {
        "slowdown": seconds / report["plaintext_step_s"],
        "images_per_s": settings.batch_size / seconds,
        "comparisons_per_s": cost.comparisons / seconds,
        "multiply_adds_per_s": (2 * cost.multiply_adds + cost.dealer_multiply_adds) / seconds,
        "rounds": cost.rounds,
        "exchanges": cost.exchanges,
        "comparisons": cost.comparisons,
        "online_bytes": cost.online_bytes,
        "dealer_bytes": cost.dealer_bytes_s1 + cost.dealer_bytes_s2,
    }
    for part, share in shares.items():
        report |= {f"share_{part}": share, f"{part}_s": share * seconds}
    words = random_words(function, secrets, public)
    report |= {"random_words": words, "random_words_per_image": words / settings.batch_size}
    if report.get("randomness_s"):
        report["random_words_per_s"] = words / report["randomness_s"]
    return report


def machine() -> Report:
    """What the figures were measured on."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": jax.devices()[0].device_kind,
        "native": native.available(),  # which builds the kernels: nothing waits for that later
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def cpu_model() -> str:
    """This machine's, as it calls itself."""
    try:
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _random_inputs(settings: TrainConfig) -> Draw:
    """What a step takes, of random images, as many as a batch has."""
    data, seed = settings.data, settings.seed
    rng, shape = np.random.default_rng(seed), (data.image_size, data.image_size, data.channels)
    images = rng.uniform(-1, 1, (settings.batch_size, *shape)).astype(np.float32)
    labels = rng.integers(data.classes, size=settings.batch_size)
    settings = resolved(settings)
    training = gan_training(settings, build_gan(settings), images, labels)
    return training.noised(training.feed(seed, None), seed)


def _plaintext_step_s(settings: TrainConfig, steps: int) -> float:
    inputs, program = _random_inputs(settings), build(settings).program
    trainer = PlaintextTrainer(program, initial_state(program, settings.seed))

    def step(number: int) -> Any:
        trainer.step(number, inputs(number))
        return trainer.state()

    (seconds,) = _seconds(steps, step)
    return seconds


def _seconds(times: int, *runs: Callable[[int], Any]) -> list[float]:
    """Median seconds of each of some functions, run in turn after a first time (they compile).

    They are called with the number of the run, the first with 0.
    """
    for run in runs:
        jax.block_until_ready(run(0))
    durations: list[list[float]] = [[] for _ in runs]
    for number in range(1, times + 1):
        for run, own in zip(runs, durations, strict=True):
            before = time.perf_counter()
            jax.block_until_ready(run(number))
            own.append(time.perf_counter() - before)
    return [statistics.median(own) for own in durations]


# In processes of their own ------------------------------------------------------------------------


def _in_process(which: str, *arguments: str) -> Report:
    command = [sys.executable, "-m", "lpgan_jax.training.bench", which, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ChildProcessError(f"the {which} start failed: {last[0]}")
    report: Report = json.loads(done.stdout)
    return report


def _simulation(folder: Path) -> tuple[Simulation, Draw]:
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    settings = config.load(str(folder / "config.yaml"))
    inputs, gan = _random_inputs(settings), build(settings)
    return Simulation.begin(gan, initial_state(gan.program, settings.seed), make_key()), inputs


def _cold(folder: Path) -> Report:
    simulation, inputs = _simulation(folder)
    given, before = inputs(0), time.perf_counter()
    traced = simulation.trace_step(0, given)
    trace_s = time.perf_counter() - before
    compiled = traced.lower().compile()
    compile_s = time.perf_counter() - before
    (folder / "step.hlo").write_text(compiled.as_text() or "")
    return {"trace_s": trace_s, "compile_s": compile_s}


def _warm(folder: Path, steps: int) -> Report:
    simulation, inputs = _simulation(folder)

    def step(number: int) -> Any:
        simulation.train_step(number, inputs(number))
        return jax.block_until_ready(simulation.state)

    step(0)
    report: Report = {"first_step_at": time.time()}
    (report["step_s"],) = _seconds(steps, step)
    report["peak_bytes"] = _peak_bytes()  # before the profile, which takes memory too
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder / "profile", profiler_options=options):
        step(steps + 1)
    return report


def _shares(folder: Path) -> Report:
    return dict(breakdown((folder / "step.hlo").read_text(), _profiled(folder / "profile")))


def _peak_bytes() -> int:
    """Most memory that this process held."""
    try:
        # Linux's `ru_maxrss` starts at what the parent process held.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.findall(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[0])
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


# Where the time goes ------------------------------------------------------------------------------

_MODULE = re.compile(r"HloModule ([^,\s]+)")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%(?P<name>\S+) = .*? (?P<opcode>[a-z][\w-]*)\(")
_SCOPE = re.compile(rf"\b({'|'.join(PARTS[:-1])})\b")
_CALLS = {native.RING_PRODUCT: "linear_algebra", native.CHACHA20: "randomness"}
_CONTAINERS = ("while", "call", "conditional")  # what runs in them is an instruction too


def parts(text: str) -> dict[str, str]:
    """Which of `PARTS` each instruction of a compiled program belongs to, by name.

    The innermost named scope decides; of a fusion, that of its result. The native kernels are known
    by their names. Instructions that only hold others are left out.

    Args:
        text: optimised HLO, as of `jax.stages.Compiled.as_text`.
    """
    found = {}
    for line in text.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction and instruction["opcode"] not in _CONTAINERS:
            scopes = _SCOPE.findall(_field("op_name", line))
            part = _CALLS.get(_field("custom_call_target", line))
            found[instruction["name"]] = part or (scopes[-1] if scopes else "other")
    return found


def _field(name: str, line: str) -> str:
    found = re.search(rf'{name}="([^"]*)"', line)
    return found[1] if found else ""


def breakdown(text: str, profiled: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """Shares of the summed time of a program's instructions, for each of `PARTS`.

    Args:
        text: its optimised HLO.
        profiled: (module, instruction, duration) of every execution; of other modules too.

    Returns:
        {part: share}, which add up to 1; empty if the profile has no instruction of the program.
    """
    module, part_of = _MODULE.match(text), parts(text)
    times = dict.fromkeys(PARTS, 0.0)
    for of, instruction, duration in profiled:
        if module and of == module[1] and instruction in part_of:
            times[part_of[instruction]] += duration
    total = sum(times.values())
    return {part: own / total for part, own in times.items()} if total else {}


def _profiled(folder: Path) -> Iterable[tuple[str, str, float]]:
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    stats = {name: value for name, value in event.stats if name is not None}
                    if "hlo_op" in stats:
                        yield stats.get("hlo_module", ""), stats["hlo_op"], event.duration_ns


# Protocols by themselves --------------------------------------------------------------------------

PRODUCTS = (
    (1024, 1024, 1024),
    (12544, 1024, 64),
    (2048, 1024, 256),
    (4096, 128, 1024),
    (128, 2048, 1024),
)
"""Shapes (m, k, n) of matrix products: a square one, and such as the published network has."""

_FXP = FixedPoint(18)
_FEWER = 16  # as many elements less of what deals kilobits an element
_PROTOCOLS: dict[str, tuple[int, Callable[..., jax.Array]]] = {
    "truncate": (1, lambda key, x, y: P.truncate(key, x, _FXP.frac_bits)),
    "mul": (1, lambda key, x, y: P.sec_mul(key, x, y, _FXP)),
    "square": (1, lambda key, x, y: P.sec_square(key, x, _FXP)),
    "cmp": (1, lambda key, x, y: P.sec_cmp(key, x, y)),
    "relu": (1, lambda key, x, y: P.sec_relu(key, x)),
    "leaky_relu": (1, lambda key, x, y: P.sec_leaky_relu(key, x, _FXP)),
    "sigmoid": (_FEWER, lambda key, x, y: P.sec_sigmoid(key, x, _FXP)),
    "tanh": (_FEWER, lambda key, x, y: P.sec_tanh(key, x, _FXP)),
    "softplus": (_FEWER, lambda key, x, y: P.sec_softplus(key, x, _FXP)),
    "exp": (_FEWER, lambda key, x, y: P.sec_exp(key, x, _FXP)),
    "inv_sqrt": (_FEWER, lambda key, x, y: P.sec_inv_sqrt(key, x, _FXP)),
    "inv": (_FEWER, lambda key, x, y: P.sec_inv(key, x, _FXP)),
}


def micro(
    elements: int = 2**20,
    products: Sequence[tuple[int, int, int]] = PRODUCTS,
    repeats: int = 5,
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measure protocols, ring products and ChaCha20 by themselves: medians of compiled runs.

    Args:
        elements: of a protocol; those that deal kilobits an element get a 16th.
        products: shapes (m, k, n).
        repeats: how many runs.
        note: receives what is being done.

    Returns:
        micro_X_per_s: elements of protocol X a second, with its randomness, both servers and DS.
        micro_product_MxKxN_gmacs: 10^9 multiply-adds a second of `a @ b` modulo 2^64;
            micro_product32_...: modulo 2^32.
        micro_product_MxKxN_to_float32: the same divided by that of `a @ b` in float32, timed in
            turn.
        micro_chacha20_words_per_s: 64-bit words of `jax.random.bits` a second.
        The machine.

    Raises:
        ValueError: a number is below 1.
    """
    for name, number in (("elements", elements), ("repeats", repeats)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    report = machine()
    options = options_to_run_often()
    keys = jax.random.split(make_key(), repeats + 1)
    values = np.random.default_rng(0).uniform(0.5, 2, elements)
    x, y = (share_words(make_key(), encode(values, _FXP.frac_bits)) for _ in range(2))
    for name, (fewer, protocol) in _PROTOCOLS.items():
        note(name)
        size = -(-elements // fewer)
        run = jax.jit(protocol, compiler_options=options)
        few_x, few_y = x[:, :size], y[:, :size]
        (seconds,) = _seconds(repeats, lambda i: run(keys[i], few_x, few_y))  # noqa: B023
        report[f"micro_{name}_per_s"] = size / seconds

    product = jax.jit(matmul, compiler_options=options)
    reference = jax.jit(jnp.matmul)  # as JAX compiles it by default
    for m, k, n in products:
        note(f"a product of {m} x {k} and {k} x {n}")
        words = [jax.random.bits(make_key(), shape, np.uint64) for shape in ((m, k), (k, n))]
        halves = [w.astype(np.uint32) for w in words]
        reals = [w.astype(np.float32) for w in words]
        whole, half, real = _seconds(
            repeats,
            lambda i: product(*words),  # noqa: B023
            lambda i: product(*halves),  # noqa: B023
            lambda i: reference(*reals),  # noqa: B023
        )
        for name, ring in (("product", whole), ("product32", half)):
            report[f"micro_{name}_{m}x{k}x{n}_gmacs"] = 1e-9 * m * k * n / ring
            report[f"micro_{name}_{m}x{k}x{n}_to_float32"] = real / ring

    note("ChaCha20")
    bits = jax.jit(lambda key: jax.random.bits(key, (8 * elements,), np.uint64))
    (seconds,) = _seconds(repeats, lambda i: bits(keys[i]))
    report["micro_chacha20_words_per_s"] = 8 * elements / seconds
    return report


# For people ---------------------------------------------------------------------------------------

LABELS = {
    "config": "configuration",
    "batch_size": "images in a batch",
    "steps": "steps timed",
    "step_s": "a step of D and G, median",
    "images_per_s": "images",
    "comparisons_per_s": "comparisons with 0",
    "multiply_adds_per_s": "multiply-adds of both servers and DS",
    "plaintext_step_s": "a step of the plaintext twin",
    "slowdown": "secure / plaintext",
    "trace_s": "tracing a step",
    "compile_s": "cold start of the program: tracing, lowering, compiling",
    "warm_start_s": "from the start of Python to the end of the first step, compiled before",
    "peak_bytes": "peak memory",
    "rounds": "rounds: longest chain of dependent messages",
    "exchanges": "exchanges of protocols",
    "comparisons": "secret values compared with 0",
    "online_bytes": "a server sends the other",
    "dealer_bytes": "DS deals, ahead of time",
    "random_words": "random 64-bit words drawn, of all seeds together",
    "random_words_per_image": "random words an image",
    "random_words_per_s": "random words, in the time that the profile gives them",
    **{f"share_{part}": f"{part.replace('_', ' ')}, of a step's time" for part in PARTS},
    "cpu": "CPU",
    "cores": "cores",
    "memory_bytes": "memory",
    "device": "device",
    "native": "native kernels",
    "python": "Python",
    "jax": "JAX",
    "jaxlib": "jaxlib",
}
"""What figures are, in the order in which they are shown."""


def label(name: str) -> str:
    """What a figure of `measure` or `micro` is, in words."""
    words = name.removeprefix("micro_").removesuffix("_per_s").replace("_", " ")
    words = words.replace("product32", "product modulo 2^32")
    product = words.replace(" gmacs", ", multiply-adds").replace(" to float32", " / float32")
    return LABELS.get(name, product)


def shown(name: str, value: Any) -> str:
    """A figure as text, with its unit, which its name tells."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if name.startswith("share_"):
        return f"{100 * value:.1f} %"
    for suffix, unit in (("_bytes", "B"), ("_per_s", "/s"), ("words", ""), ("_per_image", "")):
        if name.endswith(suffix):
            return si(value, unit)
    unit = " s" if name.endswith("_s") else " G/s" if name.endswith("_gmacs") else ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}{unit}"


def table(report: Report) -> Table:
    """A report for a terminal."""
    result = Table(box=box.SIMPLE_HEAD, show_header=False)
    result.add_column(overflow="fold")
    result.add_column(justify="right", overflow="fold")
    for name in [*LABELS, *(name for name in report if name.startswith("micro_"))]:
        if name in report:
            text = shown(name, report[name])
            part = f"{name.removeprefix('share_')}_s"
            if part in report and name != part:
                text = f"{shown(part, report[part])}  {text}"
            result.add_row(label(name), text)
    return result


def _main(which: str, folder: str, *steps: str) -> None:
    start: dict[str, Callable[..., Report]] = {"cold": _cold, "warm": _warm, "shares": _shares}
    print(json.dumps(start[which](Path(folder), *map(int, steps))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
