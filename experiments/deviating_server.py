"""What can SP and a server that deviates learn together? An image of the last batch.

The protocols protect from servers that follow them. Here S1 does so in all steps but the last, in
which it adds constants to words of one message of its own. What is added where a value is opened
masked is added to the value, in every product of it. Added are 16 words of the gradient at SD's
first convolution, one a feature map, each at another place of the first image of the batch: the
kernel's gradient is a sum of patches of images times this gradient, so each map's becomes a 4x4
patch of the image, and the update carries it.

Printed are correlations (Pearson's, of 15x15 pixels, means over several last steps) of what is read
from SD's kernel with the image, and with the other images of the batch; and how often the image is
the closest. *difference*: for who has the kernel before the last step as well. At the end: what DS
says of that step if it looks at it (`integrity` of a cluster), as it does at each last one.

    python experiments/deviating_server.py --steps 100 --images 20
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import lpgan_jax as lp
from lpgan_jax.cluster.dealer import Dealer
from lpgan_jax.cluster.replay import Done, Replay
from lpgan_jax.cluster.settings import SERVERS, Address, ClusterConfig, Servers
from lpgan_jax.cluster.transcript import first_difference
from lpgan_jax.gan import State, mean_losses
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.party import Party
from lpgan_jax.mpc.share_trees import reveal_tree
from lpgan_jax.programs import SecureProgram, initial_state, secured
from lpgan_jax.programs.simulation import Simulation
from lpgan_jax.training import config, data
from lpgan_jax.training.building import build, training_of
from lpgan_jax.training.source import DataSource
from lpgan_jax.training.tasks import Task

SETTINGS = ["model.features=16"]
"""As many maps as patches."""
PLACES = [(row, column) for row in (1, 3, 5, 7) for column in (1, 3, 5, 7)]
"""Outputs of a convolution whose windows tile rows and columns 1 to 15 of the image."""
MESSAGE = ("Discriminator.conv0.backward/mask", 0)
"""Its name, and how many of this name come before it in a step."""
ADDED = -32.0


@contextmanager
def deviating() -> Iterator[None]:
    """Programs that are traced inside have an S1 that adds to what it sends."""
    honest = Party.exchange

    def exchange(party: Party, words: jax.Array, name: str) -> Any:
        path = "/".join((*party.place, name))
        before = sum(message.name == path for message in party.messages)
        if (path, before) == MESSAGE:
            added = np.zeros(words.shape, np.int64)
            for feature, place in enumerate(PLACES):  # of the first image, not of a generated one
                added[(0, 0, *place, feature)] = round(ADDED * 2**18)
            words = words + party.public_share(jnp.asarray(added.view(np.uint64)))
        return honest(party, words, name)

    with mock.patch.object(Party, "exchange", exchange):
        yield


def kernel_of(state: State) -> np.ndarray:
    """SD's first kernel, as SP reconstructs it: [4, 4, 16]."""
    kernel: np.ndarray = reveal_tree(state.params["discriminator"]["conv0"])["kernel"]
    return kernel.reshape(4, 4, len(PLACES))


def read(kernel: np.ndarray) -> np.ndarray:
    """The image in a kernel's patches: [15, 15]."""
    image = np.zeros((18, 18))
    for feature, (row, column) in enumerate(PLACES):
        top, left = 2 * row - 1, 2 * column - 1
        image[top : top + 4, left : left + 4] = kernel[..., feature]
    return image[1:16, 1:16]


def correlations(read: np.ndarray, images: np.ndarray) -> tuple[float, float, float]:
    """With the first of the images; with the others: the mean, and the largest."""
    found = [np.corrcoef(read.ravel(), image.ravel())[0, 1] for image in images]
    return found[0], float(np.mean(found[1:])), max(found[1:])


def looked_at(settings: config.TrainConfig, images: Any, initial: Any, step: int) -> str:
    """What DS says of a step in which S1 deviates: the first message that is another."""
    training = training_of(settings)
    honest = secured(training.program)
    cluster = ClusterConfig(
        session="none",
        servers=Servers(s1=Address(host="s1", port=1), s2=Address(host="s2", port=1)),
        line=Address(host="s1", port=2),
        certificates="none",
        state="none",
    )
    dealer = Dealer(training, images, initial, cluster, lp.key())
    order = dealer.order(Task("train", step))

    def done(program: SecureProgram) -> tuple[Replay, Done]:
        replay = Replay(program, dealer)
        replay.set_state(dealer.state)
        found = replay.do(order)
        assert found is not None
        return replay, found

    replay, right = done(honest)
    with deviating():
        _, wrong = done(SecureProgram(training.program))
    places = [first_difference(*both) for both in zip(wrong.sent, right.sent, strict=True)]
    first = min(place for place in places if place is not None)
    return f"{SERVERS[places.index(first)]} deviated: {replay.message(right.which, first)}"


def main() -> None:
    """Train, deviate in a last step, print what SP can read."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="in all")
    parser.add_argument("--images", type=int, default=20, help="to read, each in a last step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    settings = config.load("digits", SETTINGS)
    gan = build(settings)
    source = DataSource(settings, args.seed, data.load_images(settings.data))
    initial = initial_state(gan.program, args.seed)
    keys = jax.random.split(lp.key(args.seed))
    simulation = Simulation.begin(gan, initial, keys[0])
    last = args.steps - 1
    for step in range(last):
        simulation.train_step(step, source.batch(step))
    before: State = jax.tree.map(np.array, simulation.state)

    def last_step(simulation: Simulation, number: int) -> tuple[State, Any]:
        """A last step with another batch: the state after it, and its losses."""
        simulation.state = jax.tree.map(jnp.asarray, before)
        losses = simulation.train_step(last, source.batch(last + number))
        return simulation.state, mean_losses(reveal_tree(losses), settings.batch_size)

    def show(losses: list[Any]) -> str:
        return "losses {:.2f} (SD) and {:.2f} (SG)".format(*np.mean(losses, axis=0))

    honest = [last_step(simulation, number)[1] for number in range(args.images)]
    print(f"digits, 16 maps, step {args.steps}, {args.images} images; no deviation: {show(honest)}")
    program = Simulation(SecureProgram(gan.program), before, DealerKeys(keys[1]))
    losses = []
    found: dict[str, list[Any]] = {"parameters": [], "difference": []}
    for number in range(args.images):
        with deviating():  # the first call traces
            after, loss = last_step(program, number)
        losses.append(loss)
        images = source.batch(last + number).images[:, 1:16, 1:16, 0]
        kernel = kernel_of(after)
        found["parameters"].append(correlations(read(kernel), images))
        found["difference"].append(correlations(read(kernel - kernel_of(before)), images))
    print(f"S1 deviates: {show(losses)}")
    for what, rows in found.items():
        image, others, closest_other = np.transpose(rows)
        print(
            f"  {what:10}: the image {image.mean():.3f}; others {others.mean():.3f}, the "
            f"closest of them {closest_other.mean():.3f}; "
            f"the image is the closest in {np.sum(image > closest_other)} of {args.images}",
            flush=True,
        )
    print(f"DS, if it looks: {looked_at(settings, source.batch, initial, last)}")


if __name__ == "__main__":
    main()
