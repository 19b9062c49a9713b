"""Publish what a secure training run made: its generator, a model card, and the figures behind it.

    python experiments/release.py --run runs/digits --out docs/results/digits \
        --title "Handwritten digits at 16x16, trained under sharing" \
        --command "lpgan train --config digits --out runs/digits --seed 0"

Writes generator.msgpack (Flax variables), README.md (the card), samples.png, losses.csv, losses.png
and quality.csv. The discriminator is not published: it knows more about the images.
"""

import argparse
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from flax import serialization

from lpgan_jax.common.files import atomic_write
from lpgan_jax.common.tables import Row, read_csv, write_csv
from lpgan_jax.gan import Generator
from lpgan_jax.study.features import classifier
from lpgan_jax.study.quality import MEASURES
from lpgan_jax.study.runs import quality
from lpgan_jax.training import data
from lpgan_jax.training.building import asked, build_gan, columns_of
from lpgan_jax.training.config import TrainConfig
from lpgan_jax.training.images import save_png
from lpgan_jax.training.results import generate, networks
from lpgan_jax.training.run_directory import RunDirectory

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHOWN = 64
QUALITY = ("images", "seed", *MEASURES, "classifier_accuracy")


def measured(run: Path, settings: TrainConfig, num: int, seed: int) -> Row:
    """The quality of the run's images, and how good the classifier is that measured it."""
    figures = asdict(quality(run, num, seed=seed))
    labels = data.load_labels(settings.data)
    assert labels is not None  # or `quality` would have refused
    accuracy = classifier(data.load_images(settings.data), labels).accuracy
    return {"seed": seed, **figures, "classifier_accuracy": accuracy}


def draw_losses(rows: list[Row], title: str, path: Path) -> None:
    """Losses over steps, as SP opened them."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, label in (("loss_d", "discriminator"), ("loss_g", "generator")):
        axes.plot([r["step"] for r in rows], [r[name] for r in rows], label=label, linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss [nats], opened by SP")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shown_of(settings: TrainConfig) -> int:
    """How many images the picture has: ten of each class, if there are classes."""
    return 10 * settings.data.classes if settings.data.labels else SHOWN


def publish_generator(run: Path, settings: TrainConfig, out: Path) -> None:
    """SP's reconstruction of the generator alone, as `{"params", "batch_stats"}` in float32."""
    gan, learnt = networks(run)
    variables = jax.tree.map(lambda v: np.asarray(v, np.float32), learnt["generator"])
    atomic_write(out / "generator.msgpack", serialization.to_bytes(variables), private=False)
    question = asked(settings, np.random.default_rng(0), 2)
    assert np.isfinite(gan.generate(variables, question)).all()


CARD = """\
# {title}

![generated images](samples.png)

*{pictures} images from noise of seed {noise_seed}{from_shares}.*

**What it is.** The generator of a DCGAN ({parameters:,} parameters, {size}x{size}, {channels}
channel{s}), {how}: {steps} steps on batches of {batch}.

```sh
{command}
```

{simulated}
{privacy}
**How good it is** (quality.csv): measured on {images:,} generated and as many real images, in the
features of a small classifier of the real ones ({accuracy:.1f} % of held-out images right).

| Fréchet distance | precision | recall | classes covered |{accuracy_head}
|---:|---:|---:|---:|{accuracy_line}
| {frechet:.3g} | {precision:.3f} | {recall:.3f} | {coverage:.0f} % |{accuracy_cell}

{losses}
**How to use it.**

```python
from pathlib import Path

import jax
from flax import serialization
from lpgan_jax.gan import Generator

generator = {network}
variables = serialization.msgpack_restore(Path("generator.msgpack").read_bytes())
noise = jax.random.normal(jax.random.key(0), ({shown}, {noise_size}), "float32")
images = generator.apply(variables, noise{labels}, train=False)  # -1 to 1
```

**Intended use.** To see what secure training gives, and to compare with. {data}

**Limits.** {limits} Quality is that of a small network and short training.

Licence: Apache-2.0.
"""


SHARED = """trained under two-server secret sharing from its initial parameters to its last update,
at {frac_bits} fraction bits. No value was opened on the way but masked ones; SP opened {opened}"""
CLEAR = "trained in the clear, in float32"
SHADOW = "trained by the servers' program in shadow mode, on integers that are rounded alike"
SIMULATED = """\
Both servers were simulated in one process, and the seed ({seed}) fixed the dealer too, so that the
run can be repeated: the images are public.
"""
NOT_PRIVATE = """\
Secret sharing protects images and parameters while training. It says nothing about what the
published parameters remember: no privacy mechanism was added, and a generator may reproduce
features of single images."""
PRIVATE = """\
Differential privacy bounds what the generator tells of one image. It does not say that the images
are good, nor that nothing of the data as a whole can be learnt: that is what they are for."""
PROMISE = """
**What is promised.** (epsilon, delta) = ({epsilon:.4g}, {delta:g}), of each image: one more or less
in the data. {updates:,} noised updates of the discriminator with a noise multiplier of
{noise_multiplier:.4g} ({noise}) at a clip of {clip:g}; Poisson sampling at a rate of
{sampling_rate:.4g} of {examples:,} images; accounted for with dp-accounting's privacy loss
distributions. {search}
"""


def promise(summary: Row, search: str) -> str:
    """The paragraph on privacy; none without."""
    if "epsilon" not in summary:
        return ""
    whose = {"dealer": "dealt by DS", "servers": "of each of the servers"}[summary["noise"]]
    fields = {**summary, "noise": whose, "updates": summary["noised_updates"]}
    return PROMISE.format(**fields, search=search)


def as_code(generator: Generator) -> str:
    """What makes the generator: its fields that are not the default."""
    own = {
        field.name: value
        for field in fields(Generator)
        if (value := getattr(generator, field.name)) != field.default
        and field.name not in ("parent", "name")
    }
    return f"Generator({', '.join(f'{name}={value!r}' for name, value in own.items())})"


def card(settings: TrainConfig, figures: Row, summary: Row, args: argparse.Namespace) -> str:
    """The model card."""
    private, mode = "epsilon" in summary, summary["mode"]
    how = {"plaintext": CLEAR, "shadow": SHADOW}.get(mode, "")
    if shares := not how:
        opened = "sample grids, and these parameters"
        opened = opened if private else f"the losses, {opened}"
        how = SHARED.format(frac_bits=settings.frac_bits, opened=opened)
    accuracy = figures["accuracy"]
    classes = settings.data.classes
    gan = build_gan(settings)
    if not isinstance(gan.generator, Generator):
        raise ValueError("--run: a network of your own, whose code a card cannot import")
    leaves = jax.tree.leaves(gan.init(np.random.default_rng(0)).params["generator"])
    channels = settings.data.channels
    values: dict[str, Any] = {
        "title": args.title,
        "shown": SHOWN,
        "pictures": shown_of(settings),
        "from_shares": ", generated from the shares and opened by SP" if shares else "",
        "parameters": sum(leaf.size for leaf in leaves),
        "size": settings.data.image_size,
        "channels": channels,
        "s": "" if channels == 1 else "s",
        "steps": f"{summary['steps']:,}",
        "how": how,
        "simulated": SIMULATED.format(seed=settings.seed) if args.seeded else "",
        "privacy": promise(summary, args.search),
        "limits": PRIVATE if private else NOT_PRIVATE,
        "losses": "" if private else "![losses](losses.png)\n",
        "labels": f", jax.nn.one_hot(jax.numpy.arange({SHOWN}) % {classes}, {classes})"
        if settings.data.labels
        else "",
        "accuracy_head": "" if accuracy is None else " accuracy of a classifier of these |",
        "accuracy_line": "" if accuracy is None else "---:|",
        "accuracy_cell": "" if accuracy is None else f" {100 * accuracy:.1f} % |",
        "batch": settings.batch_size,
        "command": args.command,
        "accuracy": 100 * figures["classifier_accuracy"],
        "network": as_code(gan.generator),
        "noise_size": gan.noise_size,
        "data": args.data,
        "seed": settings.seed,
        "noise_seed": args.seed,
    }
    return CARD.format(**{**figures, "coverage": 100 * figures["coverage"]} | values)


def main() -> None:
    """Measure, export, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--command", required=True, help="what made the run, for the card")
    parser.add_argument("--title", required=True)
    parser.add_argument("--data", default="", help="a sentence about the data, for the card")
    parser.add_argument(
        "--search", default="", help="of a private run: how it was chosen, a sentence"
    )
    parser.add_argument("--seeded", action="store_true", help="the run can be repeated (--seed)")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    run = RunDirectory.open(args.run)
    settings = run.gan_config()
    summary = run.summary()
    args.out.mkdir(parents=True, exist_ok=True)
    if "epsilon" not in summary:
        losses = read_csv(run.metrics_file)
        write_csv(args.out / "losses.csv", losses, ("step", "loss_d", "loss_g"))
        title = f"{args.title}, {settings.frac_bits} fraction bits; seed {settings.seed}"
        draw_losses(losses, title, args.out / "losses.png")
    shown = shown_of(settings)
    images = generate(args.run, shown, seed=args.seed)
    columns = columns_of(settings, shown)
    save_png(args.out / "samples.png", images, columns, private=False)
    publish_generator(args.run, settings, args.out)
    write_csv(
        args.out / "quality.csv", [measured(args.run, settings, args.num, args.seed)], QUALITY
    )
    (figures,) = read_csv(args.out / "quality.csv")  # the card says what the file says
    atomic_write(
        args.out / "README.md", card(settings, figures, summary, args).encode(), private=False
    )
    print(f"{args.out}: {figures}")


if __name__ == "__main__":
    main()
