"""Secure training and inference of three small networks on MNIST, next to the same in the clear.

    python experiments/small_nets.py --mnist DIR --out DIR

Each network is plain Flax, and a step of its training plain JAX and optax: run as it is, in
float32, and under `lp.secure` (both servers and DS simulated), from the same parameters and on the
same batches. Then the securely trained one classifies the test images on shares. OUT gets
small_nets.csv, small_nets_curve.csv and small_nets.png, which the seed determines,
small_nets_times.csv, and small_nets.md with the tables. A network that is in the tables already is
not trained again.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from zoo.small import NETWORKS, RATES

import lpgan_jax as lp
from lpgan_jax.common import tables
from lpgan_jax.common.files import atomic_write
from lpgan_jax.common.tables import Row
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.programs.batches import Batches
from lpgan_jax.training.config import DataConfig
from lpgan_jax.training.data import load_images, load_labels

BATCH, MOMENTUM, FRAC_BITS = 64, 0.9, 18
INFERENCE = 100  # images that are classified at once
POINTS, SUBSET = 20, 1000  # of the curve, and test images for each

SETTINGS = ("train", "test", "epochs", "seed")
FILES = ("small_nets_times.csv", "small_nets_curve.csv", "small_nets.csv")
INTEGERS = (
    *(*SETTINGS, "batch_size", "frac_bits", "steps", "step", "parameters"),
    *("inference_batch", "rounds", "server_bytes_one_image"),
)
TYPES: dict[str, Callable[[str], Any]] = {"network": str, **dict.fromkeys(INTEGERS, int)}

Results = dict[str, list[Row]]
"""{file: rows}, for each of FILES."""


class Data(NamedTuple):
    """Images [N, 28, 28, 1] in [0, 1], 0 is black, and labels [N]."""

    images: np.ndarray
    labels: np.ndarray


def load(path: str, split: str, number: int) -> Data:
    """The first so many images of a split."""
    config = DataConfig(
        dataset="idx", path=path, split=split, image_size=28, channels=1, limit=number
    )
    images, labels = load_images(config), load_labels(config)
    assert labels is not None  # IDX files have some
    if len(images) < number:
        raise ValueError(f"--{split}: {number} given, but there are {len(images)} images")
    return Data((images + 1) / 2, labels)


def watched(items: Iterable[Any], number: int, text: str) -> Iterable[Any]:
    """The items, with a bar and the remaining time."""
    return track(items, text, number, console=Console(stderr=True))


def timed(seconds: list[float], function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns; the seconds that it takes are added to the list."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    seconds.append(time.perf_counter() - start)
    return result


def median(seconds: list[float]) -> float:
    """Without the first, which compiles, if there are more."""
    return statistics.median(seconds[1:] or seconds)


def rounded(row: Row) -> Row:
    """Floats with six digits."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


# Training -----------------------------------------------------------------------------------------


class Classifier:
    """A network, its optimizer, and a step of its training: ordinary JAX."""

    def __init__(self, name: str) -> None:
        """`name`: which network."""
        self.network = NETWORKS[name]
        self._optimizer = optax.sgd(RATES[name], MOMENTUM)

    def init(self, seed: int) -> Any:
        """The state before the first step."""
        images = np.zeros((1, 28, 28, 1), np.float32)
        params = jax.tree.map(np.asarray, self.network.init(jax.random.key(seed), images))
        return {"params": params, "optimizer": self._optimizer.init(params)}

    def train_step(self, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        """The state after a step; labels are one-hot, each class against all others."""

        def loss(params: Any) -> jax.Array:
            logits = self.logits(params, images)
            return optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1).mean()

        params, gradients = state["params"], jax.grad(loss)(state["params"])
        updates, optimizer = self._optimizer.update(gradients, state["optimizer"])
        return {"params": optax.apply_updates(params, updates), "optimizer": optimizer}

    def logits(self, params: Any, images: jax.Array) -> Any:
        """Logits [n, 10] of images [n, 28, 28, 1]."""
        return self.network.apply(params, images)


# Measuring ----------------------------------------------------------------------------------------


def bits_left(step: Any, *arguments: Any) -> float:
    """The fewest bits that any value of a step leaves free of its range, run in the clear."""
    left = [row.bits_left for row in step.explain(*arguments).rows]
    return min(bits for bits in left if bits is not None)


def inference_cost(infer: Any, params: Any, images: np.ndarray) -> Row:
    """Of the images together, and of one alone; each server sends as much as the other."""
    size, together = len(images), lp.cost(infer, params, images)
    return {
        "inference_batch": size,
        "rounds": together.rounds,
        "server_bytes_per_image": together.online_bytes / size,
        "server_bytes_one_image": lp.cost(infer, params, images[:1]).online_bytes,
        "dealer_bytes_per_image": together.dealer_bytes_s2 / size,
    }


def measure(name: str, args: argparse.Namespace, train: Data, test: Data) -> Results:
    """Train one network on shares and in the clear, and classify the test images with both."""
    own = Classifier(name)
    step = lp.secure(own.train_step, carry={0: 0}, frac_bits=FRAC_BITS)
    infer = lp.secure(own.logits, frac_bits=FRAC_BITS)
    options = options_to_run_often()
    secure_step, secure_infer = (jax.jit(f, compiler_options=options) for f in (step, infer))
    plain_step, plain_infer = jax.jit(own.train_step), jax.jit(own.logits)

    order = Batches(len(train.images), BATCH, args.seed)
    steps = args.epochs * order.per_epoch
    labels = np.eye(10, dtype=np.float32)[train.labels]
    # A network's results do not depend on which others were trained before it.
    keys = DealerKeys(jax.random.split(lp.key(args.seed), len(NETWORKS))[[*NETWORKS].index(name)])
    initial = plain = own.init(args.seed)
    chosen = order.indices(0)
    secret, *_ = step.share(keys.for_state(), initial, train.images[chosen], labels[chosen])

    def point(number: int) -> Row:
        row: Row = {"network": name, "step": number}
        secure = jax.tree.map(np.float32, lp.reveal(secret["params"]))
        for kind, params in (("secure", secure), ("plaintext", plain["params"])):
            predicted = np.asarray(plain_infer(params, test.images[:SUBSET])).argmax(1)
            row[f"{kind}_accuracy"] = np.mean(predicted == test.labels[:SUBSET])
        return rounded(row)

    curve: list[Row] = []
    free: list[float] = []
    secure_s: list[float] = []
    plain_s: list[float] = []
    for number in watched(range(steps), steps, f"{name}: training"):
        chosen = order.indices(number)
        batch = train.images[chosen], labels[chosen]
        if number % -(-steps // POINTS) == 0:
            curve.append(point(number))
        if number in (0, steps - 1):
            free.append(bits_left(step, plain, *batch))
        shared = step.share(keys.take(), secret, *batch)
        secret = timed(secure_s, secure_step, keys.take(), *shared)
        plain = timed(plain_s, plain_step, plain, *batch)
    curve.append(point(steps))

    params = secret["params"]
    parts = np.array_split(test.images, range(INFERENCE, len(test.images), INFERENCE))
    infer_s: list[float] = []
    opened = []
    for part in watched(parts, len(parts), f"{name}: inference"):
        shared = infer.share(keys.take(), params, part)
        opened.append(lp.reveal(timed(infer_s, secure_infer, keys.take(), *shared)))
    logits = np.concatenate(opened)
    exact = plain_infer(lp.reveal(params), np.float64(test.images))
    difference = np.abs(logits - np.asarray(exact)).max()
    ours, theirs = logits.argmax(1), np.asarray(plain_infer(plain["params"], test.images)).argmax(1)
    row: Row = {
        "network": name,
        **{setting: vars(args)[setting] for setting in SETTINGS},
        "batch_size": BATCH,
        "learning_rate": RATES[name],
        "momentum": MOMENTUM,
        "frac_bits": FRAC_BITS,
        "steps": steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(initial["params"])),
        "headroom_bits": min(free),
        "secure_accuracy": np.mean(ours == test.labels),
        "plaintext_accuracy": np.mean(theirs == test.labels),
        "agreement": np.mean(ours == theirs),
        "largest_logit": np.abs(logits).max(),
        "logit_difference": difference,
        "logit_difference_lsb": difference * 2**FRAC_BITS,
        **inference_cost(infer, initial["params"], parts[0]),
    }
    whole = [s for s, part in zip(infer_s, parts, strict=True) if len(part) == len(parts[0])]
    times: Row = {
        "network": name,
        "secure_step_s": median(secure_s),
        "plaintext_step_s": median(plain_s),
        "secure_image_ms": 1e3 * median(whole) / len(parts[0]),
    }
    return dict(zip(FILES, ([rounded(times)], curve, [rounded(row)]), strict=True))


# Writing ------------------------------------------------------------------------------------------


def read(out: Path) -> Results:
    """The rows of the networks that are done, which small_nets.csv names: it is written last."""
    results: Results = {}
    for file in FILES:
        text = (out / file).read_text() if (out / file).exists() else ""
        results[file] = tables.from_csv(text, TYPES)
    done = {row["network"] for row in results["small_nets.csv"]}
    return {file: [row for row in rows if row["network"] in done] for file, rows in results.items()}


def to_markdown(results: Results) -> str:
    """The tables for a page, and the command that makes them."""
    rows = results["small_nets.csv"]
    times = {row["network"]: row for row in results["small_nets_times.csv"]}
    settings = " ".join(f"--{name} {rows[0][name]}" for name in SETTINGS)
    first = rows[0]
    text = [
        f"`python experiments/small_nets.py --mnist DIR --out DIR {settings}`: batches of "
        f"{first['batch_size']}, SGD with momentum {first['momentum']:g}, {first['frac_bits']} "
        "fraction bits; in the clear, float32, from the same parameters and on the same "
        "batches. Both servers and DS are simulated in one process.",
        "",
        "| network | accuracy, secure | accuracy, plaintext | same class | largest difference of a "
        "logit | a training step, secure | plaintext | bits of range left, first and last step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = times[row["network"]]
        text.append(
            f"| {row['network']} | {row['secure_accuracy']:.2%} | {row['plaintext_accuracy']:.2%} "
            f"| {row['agreement']:.2%} "
            f"| {row['logit_difference']:.1e} ({row['logit_difference_lsb']:.1f} LSB) "
            f"| {1e3 * own['secure_step_s']:.3g} ms | {1e3 * own['plaintext_step_s']:.3g} ms "
            f"| {row['headroom_bits']:.1f} |"
        )
    text += [
        "",
        "Logits: inference on shares against float64, with the same parameters. What inference of "
        f"{first['inference_batch']} images at once takes:",
        "",
        "| network | rounds | a server sends, per image | of one image alone | DS to S2, per image "
        "| time per image |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        volumes = ("server_bytes_per_image", "server_bytes_one_image", "dealer_bytes_per_image")
        text.append(
            f"| {row['network']} | {row['rounds']} "
            + "".join(f"| {row[volume] / 1e3:.3g} kB " for volume in volumes)
            + f"| {times[row['network']]['secure_image_ms']:.2g} ms |"
        )
    return "\n".join(text) + "\n"


def draw(results: Results) -> bytes:
    """Accuracy against steps, secure and plaintext, a panel for each network, as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = results["small_nets.csv"]
    figure, axes = plt.subplots(
        2,
        len(rows),
        figsize=(3.6 * len(rows), 5),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for row, column in zip(rows, axes.T, strict=True):
        points = [p for p in results["small_nets_curve.csv"] if p["network"] == row["network"]]
        steps = [point["step"] for point in points]
        for panel, lowest in zip(column, (0, 90), strict=True):
            for kind, style in (("secure", "-"), ("plaintext", "--")):
                accuracies = [100 * point[f"{kind}_accuracy"] for point in points]
                panel.plot(steps, accuracies, style, label=kind)
            panel.set_ylim(lowest, 100)
            panel.grid(color="0.9")
        column[0].set_title(row["network"])
        column[1].set_xlabel("training steps")
    axes[0][0].legend(loc="lower right", frameon=False)
    for panel in axes.flat:
        panel.label_outer()
    first = rows[0]
    figure.supylabel(f"accuracy on {min(SUBSET, first['test'])} test images [%]")
    figure.suptitle(
        f"Training on shares and in the clear: {first['train']:,} images of MNIST, "
        f"{first['epochs']} epochs, batch {first['batch_size']}, seed {first['seed']}"
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return image.getvalue()


def positive(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} given, expected at least 1")
    return number


def main() -> None:
    """Measure what is missing, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", required=True, metavar="DIR", help="MNIST's four IDX files")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--train", type=positive, default=12800, metavar="N", help="training images"
    )
    parser.add_argument("--test", type=positive, default=2000, metavar="N", help="test images")
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of parameters, order and the dealer")
    args = parser.parse_args()
    results = read(args.out)
    for row in results["small_nets.csv"]:
        for name in SETTINGS:
            if row[name] != getattr(args, name):
                parser.error(f"--{name}: {args.out} has results for {row[name]}: use another --out")
    done = [row["network"] for row in results["small_nets.csv"]]
    try:
        for network in [name for name in NETWORKS if name not in done]:
            train, test = (
                load(args.mnist, split, vars(args)[split]) for split in ("train", "test")
            )
            for file, rows in measure(network, args, train, test).items():
                results[file] += rows
            for file, rows in results.items():
                atomic_write(
                    args.out / file, tables.to_csv(rows, list(rows[0])).encode(), private=False
                )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    results = read(args.out)  # the page has what the files have
    atomic_write(args.out / "small_nets.md", to_markdown(results).encode(), private=False)
    atomic_write(args.out / "small_nets.png", draw(results), private=False)
    print(f"{args.out}: {', '.join([*FILES, 'small_nets.md', 'small_nets.png'])}")


if __name__ == "__main__":
    main()
