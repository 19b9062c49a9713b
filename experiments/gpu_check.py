"""Is a GPU exact, and how fast is it? One script for whoever has one.

    python experiments/gpu_check.py
    python experiments/gpu_check.py --platform cpu --quick

Compares, word for word: ring products and convolutions with NumPy's 64-bit words, which wrap;
ChaCha20 and a whole training step with what the CPU computes from the same keys. Then measures ring
products, ChaCha20, a ReLU and steps of the published network. Writes gpu_check.json and
gpu_check.md, anew after every line, so that a run that is cut off leaves what it has.

The second command tries the script where there is no GPU, at small sizes: there, the CPU is
compared with itself. Exit status: 0 if everything is exact, 1 if not, 2 without a GPU.

(DS's coefficients of the sigmoid are the one place where a step rounds real numbers. A GPU that
fuses their products and sums may differ in the last of 30 bits, about once in a million values.)
"""

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax import key
from lpgan_jax import protocols as P
from lpgan_jax.common.files import atomic_write
from lpgan_jax.mpc.fixed_point import encode
from lpgan_jax.mpc.prng import CHACHA20
from lpgan_jax.mpc.shares import share_words
from lpgan_jax.programs import initial_state
from lpgan_jax.programs.simulation import Simulation
from lpgan_jax.ring import Convolution, matmul
from lpgan_jax.ring.matmul import matmul_digits
from lpgan_jax.training import bench, config
from lpgan_jax.training.building import build
from lpgan_jax.training.config import TrainConfig
from lpgan_jax.training.source import DataSource

FRAC_BITS = 18
NO_GPU = """no GPU: JAX sees {devices} only.
Install JAX for it (such as `pip install "jax[cuda12]"`) and leave JAX_PLATFORMS unset, or try the
script without one: --platform cpu --quick"""


@dataclass(frozen=True)
class Sizes:
    """How much is tried.

    Attributes:
        products: (m, k, n) whose exactness is checked.
        channels: of the convolutions.
        draws: words of a draw from ChaCha20.
        step: changes to the configuration "digits" for the step that is compared.
        timed_products: (m, k, n).
        elements: of a ReLU; eight times as many words are drawn.
        steps: (configuration, changes to it) of the steps that are timed.
        repeats: how often anything is timed.
    """

    products: tuple[tuple[int, int, int], ...]
    channels: tuple[int, int]
    draws: tuple[int, ...]
    step: tuple[str, ...]
    timed_products: tuple[tuple[int, int, int], ...]
    elements: int
    steps: tuple[tuple[str, tuple[str, ...]], ...]
    repeats: int


_TINY_NETWORK = (
    "data.image_size=8",
    "model.noise_size=4",
    "model.features=2",
    "generator_optimizer.name=sgd",
    "discriminator_optimizer.name=sgd",
    "batch_size=2",
)
FULL = Sizes(
    products=(
        (1, 1, 1),
        (5, 7, 3),
        (33, 70, 65),
        (1, 1000, 400),
        (500, 300, 1),
        (3, 20_000, 4),
        (256, 512, 128),
        (1000, 1024, 1000),
    ),
    channels=(64, 128),
    draws=(1, 1000, 8192, 100_003),
    step=("batch_size=8",),
    timed_products=bench.PRODUCTS,
    elements=2**20,
    steps=(("mnist", ("batch_size=16",)), ("mnist", ("batch_size=64",))),
    repeats=5,
)
QUICK = Sizes(
    products=((5, 7, 3), (33, 70, 65)),
    channels=(3, 4),
    draws=(1000,),
    step=_TINY_NETWORK,
    timed_products=((64, 64, 64),),
    elements=2**8,
    steps=(("digits", _TINY_NETWORK),),
    repeats=1,
)


# Exactness ----------------------------------------------------------------------------------------

Check = tuple[str, Callable[[], None]]
"""A name, and what raises if anything differs."""


def checks(device: jax.Device, cpu: jax.Device, sizes: Sizes) -> Iterator[Check]:
    """All comparisons."""
    for m, k, n in sizes.products:
        for kind, product in (("matmul", matmul), ("matmul_digits", matmul_digits)):
            name = f"{kind} of {m} x {k} and {k} x {n}"
            yield name, functools.partial(check_product, device, product, m, k, n)
    yield "matmul in a batch", functools.partial(check_batches, device)
    for strides in ((2, 2), (1, 1), (3, 2)):
        name = f"convolution and its gradients, strides {strides}"
        yield name, functools.partial(check_convolution, device, strides, *sizes.channels)
    for width in (8, 16, 32, 64):
        for size in sizes.draws:
            name = f"ChaCha20: {size} words of {width} bits"
            yield name, functools.partial(check_draw, device, cpu, width, size)
    yield "ChaCha20: split and fold_in", functools.partial(check_keys, device, cpu)
    settings = config.load("digits", sizes.step)
    yield "a training step", functools.partial(check_step, device, cpu, settings)


def words(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform words; a quarter of them with extreme digits."""
    rng = np.random.default_rng(seed)
    edges = np.array([0, 1, 2**63, 2**64 - 1, 0x7F7F7F7F7F7F7F80, 0x8080808080808080], np.uint64)
    uniform = rng.integers(0, 2**64, shape, np.uint64)
    return np.where(rng.integers(0, 4, shape) == 0, rng.choice(edges, shape), uniform)


def on(device: jax.Device, function: Callable[..., Any], *operands: Any) -> Any:
    """The result of a function, compiled for a device, as NumPy arrays."""
    with jax.default_device(device):
        return jax.tree.map(np.asarray, jax.jit(lambda *given: function(*given))(*operands))


def equal(result: Any, expected: Any) -> None:
    """Raise AssertionError unless trees of arrays are the same."""
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def check_product(
    device: jax.Device, product: Callable[..., jax.Array], m: int, k: int, n: int
) -> None:
    """`product` against NumPy, and an element of it against Python integers."""
    a, b = words(1, (m, k)), words(2, (k, n))
    result = on(device, product, a, b)
    equal(result, a @ b)
    exact = sum(int(x) * int(y) for x, y in zip(a[-1], b[:, -1], strict=True))
    equal(int(result[-1, -1]), exact % 2**64)


def check_batches(device: jax.Device) -> None:
    """`vmap` over either operand, and over both."""
    a, b = words(3, (3, 40, 50)), words(4, (3, 50, 30))
    equal(on(device, jax.vmap(matmul), a, b), a @ b)
    equal(on(device, jax.vmap(matmul, (0, None)), a, b[0]), a @ b[0])
    equal(on(device, jax.vmap(matmul, (None, 0)), a[0], b), a[0] @ b)


def check_convolution(
    device: jax.Device, strides: tuple[int, int], channels: int, features: int
) -> None:
    """A convolution and its two gradients."""
    x, w = words(5, (2, *INPUT, channels)), words(6, (*KERNEL, channels, features))
    sizes = [(n + 2 - k) // s + 1 for n, k, s in zip(INPUT, KERNEL, strides, strict=True)]
    dy = words(7, (2, *sizes, features))

    def maps(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        forward, input_gradient, kernel_gradient = convolutions(strides, sizes)
        return forward(x, w), input_gradient(dy, w[::-1, ::-1]), kernel_gradient(x, dy)

    equal(on(device, maps, x, w, dy), plain_convolution(strides, x, w, dy))


INPUT, KERNEL = (8, 8), (4, 4)  # sizes; a zero lies around the input


def convolutions(strides: tuple[int, int], sizes: list[int]) -> list[Convolution]:
    """(forward, gradient at the input, at the kernel), as JAX's derivatives have them."""
    spans = [s * (n - 1) for s, n in zip(strides, sizes, strict=True)]
    ends = [n - span for n, span in zip(INPUT, spans, strict=True)]
    images, kernel, one = (0, 3, 1, 2), (3, 2, 0, 1), (1, 1)
    around_dy = tuple((k - 2, end) for k, end in zip(KERNEL, ends, strict=True))
    around_x = tuple((1, k - 1 - end) for k, end in zip(KERNEL, ends, strict=True))
    return [
        Convolution(images, kernel, images, strides, ((1, 1), (1, 1)), one, one),
        Convolution(images, (2, 3, 0, 1), images, one, around_dy, strides, one),
        Convolution((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1), one, around_x, one, strides),
    ]


def plain_convolution(
    strides: tuple[int, int], x: np.ndarray, w: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The same in NumPy, one tap of the kernel after the other."""
    image = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, dx, dw = (np.zeros_like(v) for v in (dy, image, w))
    spans = [s * (n - 1) + 1 for s, n in zip(strides, dy.shape[1:3], strict=True)]
    for i, j in np.ndindex(*w.shape[:2]):
        rows, columns = (
            slice(first, first + span, stride)
            for first, span, stride in zip((i, j), spans, strides, strict=True)
        )
        y += image[:, rows, columns] @ w[i, j]
        dx[:, rows, columns] += dy @ w[i, j].T
        dw[i, j] = np.tensordot(image[:, rows, columns], dy, ((0, 1, 2), (0, 1, 2)))
    return y, dx[:, 1:-1, 1:-1], dw


def check_draw(device: jax.Device, cpu: jax.Device, width: int, size: int) -> None:
    """Words of three keys."""

    def draw(data: jax.Array) -> jax.Array:
        own = jax.random.wrap_key_data(data, impl=CHACHA20)
        return jax.random.bits(own, (size,), f"uint{width}")

    data = np.arange(24, dtype=np.uint32).reshape(3, 8)
    equal(on(device, jax.vmap(draw), data), on(cpu, jax.vmap(draw), data))


def check_keys(device: jax.Device, cpu: jax.Device) -> None:
    """Keys from keys."""

    def derive(data: jax.Array) -> tuple[jax.Array, jax.Array]:
        parent = jax.random.wrap_key_data(data, impl=CHACHA20)
        children = jax.random.split(parent, 100)
        numbered = jax.vmap(functools.partial(jax.random.fold_in, parent))(jnp.arange(100))
        return jax.random.key_data(children), jax.random.key_data(numbered)

    data = np.arange(8, dtype=np.uint32)
    equal(on(device, derive, data), on(cpu, derive, data))


def check_step(device: jax.Device, cpu: jax.Device, settings: TrainConfig) -> None:
    """Both servers' shares of everything after a step, and of its losses."""
    equal(after_a_step(device, settings), after_a_step(cpu, settings))


@functools.cache  # a CPU that is compared with itself does a step once
def after_a_step(device: jax.Device, settings: TrainConfig) -> Any:
    """The shares of the state and the losses after one step with fixed keys."""
    with jax.default_device(device):
        simulation, source = simulated(device, settings)
        losses = simulation.train_step(0, source.batch(0))
        return jax.tree.map(np.asarray, (simulation.state, losses))


@functools.cache  # what one has compiled, the next one need not
def simulated(device: jax.Device, settings: TrainConfig) -> tuple[Simulation, DataSource]:
    """A run on random images, with fixed keys, on the default device."""
    size = settings.data.image_size
    shape = (settings.batch_size, size, size, settings.data.channels)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    source, gan = DataSource(settings, 0, images), build(settings)
    return Simulation.begin(gan, initial_state(gan.program, settings.seed), key(1)), source


# Speed --------------------------------------------------------------------------------------------

Figures = dict[str, float]
Timing = tuple[str, Callable[[], Figures]]


def timings(device: jax.Device, sizes: Sizes) -> Iterator[Timing]:
    """All measurements."""
    for shape in sizes.timed_products:
        name = "product of {0} x {1} and {1} x {2}".format(*shape)
        yield name, functools.partial(time_product, *shape, sizes.repeats)
    yield "ChaCha20", functools.partial(time_draw, 8 * sizes.elements, sizes.repeats)
    yield "ReLU", functools.partial(time_relu, sizes.elements, sizes.repeats)
    for name, changes in sizes.steps:
        settings = config.load(name, changes)
        title = f"step of {name}, batch {settings.batch_size}"
        yield title, functools.partial(time_step, device, settings, sizes.repeats)


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median of some runs, after a first one."""
    durations = []
    for _ in range(repeats + 1):
        before = time.perf_counter()
        jax.block_until_ready(run())
        durations.append(time.perf_counter() - before)
    return statistics.median(durations[1:])


def time_product(m: int, k: int, n: int, repeats: int) -> Figures:
    """A ring product, and one of float32 that keeps all bits of it."""
    a, b = jnp.asarray(words(1, (m, k))), jnp.asarray(words(2, (k, n)))
    x, y = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    ring, real = seconds(lambda: matmul(a, b), repeats), seconds(lambda: product(x, y), repeats)
    return {"G multiply-adds/s": 1e-9 * m * k * n / ring, "of float32's speed": real / ring}


def time_draw(size: int, repeats: int) -> Figures:
    """64-bit words of ChaCha20."""
    draw = jax.jit(lambda k: jax.random.bits(k, (size,), np.uint64))
    k = key(1)
    return {"M words/s": 1e-6 * size / seconds(lambda: draw(k), repeats)}


def time_relu(size: int, repeats: int) -> Figures:
    """A ReLU with its randomness, both servers and DS."""
    relu, k = jax.jit(P.sec_relu), key(1)
    x = share_words(key(2), encode(np.linspace(-2, 2, size), FRAC_BITS))
    return {"M elements/s": 1e-6 * size / seconds(lambda: relu(k, x), repeats)}


def time_step(device: jax.Device, settings: TrainConfig, repeats: int) -> Figures:
    """A step of D and G, both servers, DS and SP."""
    simulation, source = simulated(device, settings)

    def step() -> Any:
        simulation.train_step(0, source.batch(0))
        return simulation.state

    before = time.perf_counter()
    jax.block_until_ready(step())
    first = time.perf_counter() - before
    duration = seconds(step, repeats)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    figures = {"s": duration, "images/s": settings.batch_size / duration, "s for the first": first}
    return (
        figures if memory is None else {**figures, "GB of memory at the most so far": 1e-9 * memory}
    )


# The report ---------------------------------------------------------------------------------------


@dataclass
class Report:
    """What was found, as it is written."""

    machine: dict[str, Any]
    checks: dict[str, str] = field(default_factory=dict)
    """"exact", or what went wrong."""
    timings: dict[str, Figures | str] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether nothing differed or failed."""
        return all(result == "exact" for result in self.checks.values())

    def write(self, folder: Path) -> None:
        """As JSON and as Markdown."""
        found = {"exact": self.exact, **vars(self)}
        atomic_write(
            folder / "gpu_check.json", (json.dumps(found, indent=2) + "\n").encode(), private=False
        )
        atomic_write(folder / "gpu_check.md", self.markdown().encode(), private=False)

    def markdown(self) -> str:
        """Tables of everything."""
        machine = "\n".join(f"| {name} | {value} |" for name, value in self.machine.items())
        checks = "\n".join(f"| {name} | {result} |" for name, result in self.checks.items())
        timings = "\n".join(f"| {name} | {shown(own)} |" for name, own in self.timings.items())
        return (
            f"# Check of {self.machine['device']}\n\n| | |\n|---|---|\n{machine}\n"
            f"\n## Exactness\n\n| compared | result |\n|---|---|\n{checks}\n"
            f"\n## Speed\n\n| measured | |\n|---|---|\n{timings}\n"
        )


def shown(figures: Figures | str) -> str:
    """Figures with their units, or what went wrong."""
    if isinstance(figures, str):
        return figures
    return ", ".join(f"{value:.3g} {unit}" for unit, value in figures.items())


def first_line(error: Exception) -> str:
    """An error in a line of a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}".replace("|", "/")


def driver() -> str:
    """What the GPU's driver says of itself."""
    if not (program := shutil.which("nvidia-smi")):
        return "unknown"
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip().replace("\n", "; ") or "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Run everything; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--quick", action="store_true", help="small sizes: does the script run?")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="a folder")
    options = parser.parse_args(arguments)
    if options.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    device = jax.devices()[0]
    if options.platform == "gpu" and device.platform == "cpu":
        print(NO_GPU.format(devices=", ".join(map(str, jax.devices()))), file=sys.stderr)
        return 2
    cpu = jax.devices("cpu")[0]

    runtime = " ".join(device.client.platform_version.split())
    report = Report({**bench.machine(), "runtime": runtime, "driver": driver()})
    for name, value in report.machine.items():
        print(f"{name}: {value}", flush=True)
    sizes = QUICK if options.quick else FULL
    for name, check in checks(device, cpu, sizes):
        before = time.perf_counter()
        try:
            check()
            report.checks[name] = "exact"
        except Exception as error:  # the others may still tell something
            report.checks[name] = first_line(error)
        print(f"{name}: {report.checks[name]} ({time.perf_counter() - before:.1f} s)", flush=True)
        report.write(options.out)
    for name, measure in timings(device, sizes):
        try:
            with jax.default_device(device):
                report.timings[name] = measure()
        except Exception as error:
            report.timings[name] = first_line(error)
        print(f"{name}: {shown(report.timings[name])}", flush=True)
        report.write(options.out)
    print(f"{'exact' if report.exact else 'NOT EXACT'}; see {options.out}/gpu_check.md")
    return 0 if report.exact else 1


if __name__ == "__main__":
    sys.exit(main())
