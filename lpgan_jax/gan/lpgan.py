"""LP-GAN's training protocol and its generation protocol, as the plain JAX that they are.

Run as it is, this is training in the clear. Under `lp.secure` it is the protocol of the two
servers: the patent's SG-FP, SD-FP, SD-BP and SG-BP are the passes below and their derivatives.

The patent's steps: (1) DS shares the parameters; (2) SD is trained on m images and m generated
ones; (3) SG is trained through SD on m generated images; (4) the servers return their shares to SP.
SG does not change between (2) and (3), so both of its batches are generated in one pass, each
normalised with its own statistics; SD's real and generated batches likewise.

With simultaneous updates, which are not the patent's, SG is trained through SD as it was before
(2), and on the same m images: a pass of each of the two is saved, and half of the rounds of (3).

With differential privacy, a step is several updates of SD and one of SG. Images come in through
the gradients of SD's loss on each of them, which are clipped, summed up and noised
(`transform.private_sum`; DP-SGD: Abadi et al. 2016, of a GAN's SD: Xie et al. 2018). Whatever
follows from that has their privacy, and so has SG, which is trained through SD alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lpgan_jax.gan.losses import Loss, gradient_penalty
from lpgan_jax.mpc.prng import CHACHA20, KEY_WORDS
from lpgan_jax.transform import private_sum

NETWORKS = ("generator", "discriminator")

Variables = Mapping[str, Any]
Updates = Literal["alternating", "simultaneous"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What training changes.

    Attributes:
        params: {network: Flax's params}.
        stats: {network: Flax's batch_stats}; {} of one without normalisations over a batch.
        optimizer: {network: optax's state}.
        average: {"generator": a running average of its params}, or {}.
    """

    params: dict[str, Any]
    stats: dict[str, Any]
    optimizer: dict[str, Any]
    average: dict[str, Any] = field(default_factory=dict)

    def learnt(self, networks: Collection[str] = NETWORKS) -> dict[str, Variables]:
        """{network: variables}: what SP gets, not the optimizers'; of an average, that."""
        params = {**self.params, **self.average}
        return {n: {"params": params[n], "batch_stats": self.stats[n]} for n in networks}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What DS shares for one step.

    Attributes:
        images: [m, H, W, C], in [-1, 1].
        noise_d: [m, noise_size], for the images that SD is trained on.
        noise_g: [m, noise_size], for those that SG is trained on; None if they are the same.
        mix: [m], between 0 and 1: where between an image and a generated one SD's gradient is
            looked at; None if the loss does not.
        labels: integers [m, classes], one-hot, of images and of generated ones alike; None if there
            are no classes.
    """

    images: Any
    noise_d: Any
    noise_g: Any = None
    mix: Any = None
    labels: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrivateBatch:
    """The same for a step with differential privacy, of n updates of SD.

    Labels are integers, one-hot; None if there are no classes. Those of generated images are
    drawn, since what is known of an image goes into its own gradient alone.

    Attributes:
        images: [n, m, H, W, C], in [-1, 1].
        weights: integers [n, m], 1 of images that were drawn, 0 of those that fill a batch.
        noise_d: [n, k, noise_size], for the images that SD is trained on.
        noise_g: [k, noise_size], for those that SG is trained on.
        labels: [n, m, classes], of the images.
        labels_d: [n, k, classes], of generated ones.
        labels_g: [k, classes], the first k // 2 the same as the next.
        others: [n, m, classes], for each image a class that is not its own; None without
            `PrivateUpdates.mismatched`.
    """

    images: Any
    weights: Any
    noise_d: Any
    noise_g: Any
    labels: Any = None
    labels_d: Any = None
    labels_g: Any = None
    others: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Losses:
    """Sums of losses over the batch, []; they go to SP as shares.

    SP gets no example's own loss, which would tell how well SD remembers it.

    Attributes:
        discriminator: of images and generated ones.
        generator: SG's.
    """

    discriminator: Any
    generator: Any


MeanLosses = tuple[float, float]  # (discriminator's, generator's), means over the batch


def mean_losses(losses: Losses | None, size: int) -> MeanLosses | None:
    """Of float sums over a batch of a size, as SP reconstructs them."""
    if losses is None:
        return None
    return float(losses.discriminator) / size, float(losses.generator) / size


@dataclass(frozen=True)
class PrivateUpdates:
    """How SD is trained with differential privacy.

    Attributes:
        clip: the norm of an image's gradient, at most.
        count: updates of SD in a step.
        expected: how many images a batch has on average, which their sum is divided by.
        generated: how many images are generated for each update.
        diversity: weight of a loss of SG for pairs of images of one class: how far their mean
            squared difference is below a distance. A noised SD hardly sees that they are alike
            (after Mao et al., "Mode Seeking GANs", 2019, without a division).
        distance: what it is.
        mismatched: weight of SD's loss of an image with a class that is not its own, as of a
            generated one, in the gradient of this image (Reed et al. 2016): it learns what classes
            are, and not only what images are.
    """

    clip: float
    count: int
    expected: float
    generated: int
    diversity: float = 0.0
    distance: float = 0.2
    mismatched: float = 0.0


@dataclass(frozen=True, eq=False)
class LPGAN:
    """Two networks, their optimizers and what they minimise.

    Compared by identity: what is compiled for one is kept with it.

    Attributes:
        generator: SG, noise [N, noise_size] to images [N, H, W, C].
        discriminator: SD, images to logits [N, 1] or [N].
        optimizers: {network: optimizer}, of mean gradients.
        loss: what they minimise.
        noise_size: of a generator's input.
        image_shape: height, width, channels.
        opens_losses: whether a step computes the losses (training itself needs none).
        penalty: weight of a gradient penalty.
        updates: whether SG is trained through SD as it is after its update, or as it was before.
        num_classes: of labels, which both networks take as a second argument; 0 if there are none.
        private: how SD is trained with differential privacy; None without it.
        average: the share that a step keeps of a running average of SG's parameters, which it
            generates with; 0: with the parameters themselves.
    """

    generator: nn.Module
    discriminator: nn.Module
    optimizers: Mapping[str, optax.GradientTransformation]
    loss: Loss
    noise_size: int
    image_shape: tuple[int, int, int]
    opens_losses: bool = True
    penalty: float = 10.0
    updates: Updates = "alternating"
    num_classes: int = 0
    private: PrivateUpdates | None = None
    average: float = 0.0

    def init(self, rng: np.random.Generator) -> State:
        """DS's initial state, float32.

        Raises:
            ValueError: SG's images, or SD's logits, have another shape than they should, or SD
                has statistics of batches, with differential privacy.
        """
        keys = {}
        for name in NETWORKS:
            words = rng.integers(2**32, size=KEY_WORDS, dtype=np.uint32)
            keys[name] = jax.random.wrap_key_data(jnp.asarray(words), impl=CHACHA20)
        variables: dict[str, Any] = jax.tree.map(np.asarray, self._initial(keys))
        for name, own in variables.items():
            if unknown := sorted(set(own) - {"params", "batch_stats"}):
                raise ValueError(
                    f"{name}: has {', '.join(unknown)}, expected a module of parameters and batch "
                    "statistics alone"
                )
        params = {name: own["params"] for name, own in variables.items()}
        stats = {name: own.get("batch_stats", {}) for name, own in variables.items()}
        self._check_shapes(params, stats)
        if self.private is not None and stats["discriminator"]:
            raise ValueError(
                "discriminator: normalises over a batch, which mixes examples, and keeps statistics"
                " of them, which nothing hides: expected none with differential privacy"
            )
        optimizer = {name: self.optimizers[name].init(params[name]) for name in NETWORKS}
        average = {"generator": params["generator"]} if self.average else {}
        return State(params, stats, optimizer, average)

    @property
    def _inputs(self) -> dict[str, tuple[int, ...]]:
        """{network: the shape of one input}."""
        return {"generator": (1, self.noise_size), "discriminator": (1, *self.image_shape)}

    @property
    def _one_label(self) -> list[jax.Array]:
        return [jnp.zeros((1, self.num_classes), np.int32)] if self.num_classes else []

    @functools.cached_property
    def _initial(self) -> Any:
        """{network: key} to {network: variables}, compiled once."""

        def initial(keys: dict[str, jax.Array]) -> dict[str, Variables]:
            variables: dict[str, Variables] = {}
            for name, shape in self._inputs.items():
                module = getattr(self, name)
                given = [jnp.zeros(shape, np.float32), *self._one_label]
                variables[name] = dict(module.init(keys[name], *given, **_flag(module, True)))
            return variables

        return jax.jit(initial)

    def _check_shapes(self, params: Any, stats: Any) -> None:
        allowed: dict[str, list[tuple[int, ...]]] = {
            "generator": [(1, *self.image_shape)],
            "discriminator": [(1, 1), (1,)],
        }
        for name, wanted in allowed.items():
            inputs = jax.ShapeDtypeStruct(self._inputs[name], np.float32)
            shapes = jax.eval_shape(
                lambda p, s, *x, name=name: self._apply(name, p, s, *x)[0],
                params[name],
                stats[name],
                inputs,
                *self._one_label,
            )
            if getattr(shapes, "shape", None) not in wanted:
                raise ValueError(
                    f"{name}: expected {wanted[0]} from {inputs.shape}, got "
                    f"{getattr(shapes, 'shape', type(shapes).__name__)}"
                )

    def _apply(
        self, name: str, params: Any, stats: Any, x: jax.Array, labels: Any = None
    ) -> tuple[Any, Any]:
        """(output with the batch's statistics, running ones after it)."""
        module = getattr(self, name)
        variables = {"params": params, "batch_stats": stats}
        given = (x,) if labels is None else (x, labels)
        y, updated = module.apply(variables, *given, mutable=["batch_stats"], **_flag(module, True))
        return y, dict(updated.get("batch_stats", {}))

    def train_step(
        self, state: State, batch: Any, noise: jax.Array | None = None
    ) -> tuple[State, Losses | None]:
        """A step: an update of SD and one of SG; with differential privacy, several of SD.

        Args:
            state: before it.
            batch: a `Batch`, or with differential privacy a `PrivateBatch`.
            noise: [updates of SD, parameters of SD], with differential privacy.

        Returns:
            (the state after the step, losses or None).
        """
        if self.private is not None:
            return self._privately(state, batch, noise), None
        simultaneous = self.updates == "simultaneous"
        after, losses = (self._both if simultaneous else self._in_turn)(state, batch)
        return after, losses if self.opens_losses else None

    def _in_turn(self, state: State, batch: Batch) -> tuple[State, Losses]:
        """SD's update, then SG's through the new SD."""
        # SG-FP, of both batches.
        noise = jnp.stack([batch.noise_d, batch.noise_g])
        generated = functools.partial(self._generated, state, labels=batch.labels)
        fakes, backward, g_stats = jax.vmap(generated)(noise)

        # SD-FP and SD-BP.
        def d_loss(p: Any) -> tuple[jax.Array, Any]:
            logits, after = self._judged(p, state, batch, fakes[0])
            loss = self._d_loss(p, state, batch, fakes[0], logits)
            return loss / len(batch.images), (loss, after)

        d_gradients = jax.grad(d_loss, has_aux=True)
        gradients, (d_sum, d_stats) = d_gradients(state.params["discriminator"])
        after = self._updated("discriminator", state, gradients)

        # SG-BP, through SD as it is now.
        d_fakes, g_sum = self._by_images(after, fakes[1], batch.labels)
        second = jax.tree.map(lambda residual: residual[1], backward)
        after = self._updated("generator", after, second(d_fakes)[0])

        both = {"generator": g_stats, "discriminator": d_stats}
        stats = jax.tree.map(lambda two: two.mean(0), both)
        return replace(after, stats=stats), Losses(d_sum, g_sum)

    def _by_images(self, state: State, images: jax.Array, labels: Any) -> Any:
        """(the derivative of SG's mean loss by generated images, the sum of losses)."""

        def g_loss(images: jax.Array) -> tuple[jax.Array, jax.Array]:
            params, stats = (of["discriminator"] for of in (state.params, state.stats))
            logits, _ = self._apply("discriminator", params, stats, images, labels)
            loss = self.loss.generator(logits).sum()
            return loss / len(images), loss

        return jax.grad(g_loss, has_aux=True)(images)

    def _privately(self, state: State, batch: PrivateBatch, noise: Any) -> State:
        """Updates of SD from noised gradients, then one of SG through it."""
        private = self.private
        assert private is not None

        # SG does not change: all images for SD are generated at once.
        fakes = jax.vmap(lambda z, labels: self._generated(state, z, labels)[0])(
            batch.noise_d, batch.labels_d
        )

        def real_loss(p: Any, image: jax.Array, *classes: jax.Array) -> jax.Array:
            """Of an image, its class if there are classes, and another one if that counts."""
            images = jnp.stack([image] * max(1, len(classes)))
            labels = jnp.stack(classes) if classes else None
            logits, _ = self._apply("discriminator", p, {}, images, labels)
            loss = self.loss.real(logits[0]).sum()
            if len(classes) > 1:
                loss += private.mismatched * self.loss.fake(logits[1]).sum()
            return loss

        def fake_loss(p: Any, images: jax.Array, labels: Any) -> jax.Array:
            return self.loss.fake(self._apply("discriminator", p, {}, images, labels)[0]).mean()

        def update(before: State, given: Any) -> tuple[State, None]:
            images, classes, weights, fakes, labels_d, hiding = given
            params = before.params["discriminator"]
            axes = (None, *(0 for _ in (images, *classes)))
            each = jax.vmap(jax.grad(real_loss), axes)(params, images, *classes)
            with jax.named_scope("private_sum"):
                total = private_sum(each, weights, hiding, private.clip)
            of_fakes = jax.grad(fake_loss)(params, fakes, labels_d)
            gradients = jax.tree.map(lambda a, b: a / private.expected + b, total, of_fakes)
            return self._updated("discriminator", before, gradients), None

        classes = [c for c in (batch.labels, batch.others) if c is not None]
        given = (batch.images, classes, batch.weights, fakes, batch.labels_d, noise)
        state, _ = jax.lax.scan(update, state, given)
        images, backward, g_stats = self._generated(state, batch.noise_g, batch.labels_g)
        d_images, _ = self._by_images(state, images, batch.labels_g)
        if private.diversity:
            d_images += private.diversity * jax.grad(self._alike)(images)
        after = self._updated("generator", state, backward(d_images)[0])
        return replace(after, stats={**state.stats, "generator": g_stats})

    def _alike(self, images: jax.Array) -> jax.Array:
        """How far pairs of images, one of each half, are below the distance that they should be."""
        private, half = self.private, len(images) // 2
        assert private is not None
        difference = jnp.square(images[:half] - images[half : 2 * half]).mean((1, 2, 3))
        return jax.nn.relu(private.distance - difference).mean()

    def _updated(self, name: str, state: State, gradients: Any) -> State:
        """A state in which one network was updated."""
        with jax.named_scope(f"{name}.update"):
            params = state.params[name]
            updates, optimizer = self.optimizers[name].update(
                gradients, state.optimizer[name], params
            )
            params = optax.apply_updates(params, updates)
            average = state.average
            if name in average:
                average = {name: optax.incremental_update(params, average[name], 1 - self.average)}
        return replace(
            state,
            params={**state.params, name: params},
            optimizer={**state.optimizer, name: optimizer},
            average=average,
        )

    def _both(self, state: State, batch: Batch) -> tuple[State, Losses]:
        """Both updates from one pass of SG and one of SD, as they were."""
        fakes, backward, g_stats = self._generated(state, batch.noise_d, batch.labels)

        def losses(p: Any, images: jax.Array) -> tuple[Any, Any]:
            logits, after = self._judged(p, state, batch, images)
            sums = (
                self._d_loss(p, state, batch, images, logits),
                self.loss.generator(logits[1]).sum(),
            )
            return tuple(loss / len(images) for loss in sums), (sums, after)

        params = state.params["discriminator"]
        (one, _), pullback, (sums, d_stats) = jax.vjp(losses, params, fakes, has_aux=True)
        unit, nothing = jnp.ones_like(one), jnp.zeros_like(one)
        gradients, _ = pullback((unit, nothing))
        _, d_fakes = pullback((nothing, unit))
        after = self._updated("discriminator", state, gradients)
        after = self._updated("generator", after, backward(d_fakes)[0])
        d_stats = jax.tree.map(lambda two: two.mean(0), d_stats)
        stats = {"generator": g_stats, "discriminator": d_stats}
        return replace(after, stats=stats), Losses(*sums)

    def _generated(self, state: State, noise: jax.Array, labels: Any) -> Any:
        """(images, the derivative by SG's parameters, running statistics after it)."""
        stats = state.stats["generator"]
        forward = lambda p: self._apply("generator", p, stats, noise, labels)  # noqa: E731
        return jax.vjp(forward, state.params["generator"], has_aux=True)

    def _judged(self, params: Any, state: State, batch: Batch, fakes: jax.Array) -> tuple[Any, Any]:
        """SD's logits of images and generated ones, and running statistics after each."""
        stats, labels = state.stats["discriminator"], batch.labels
        return jax.vmap(lambda x: self._apply("discriminator", params, stats, x, labels))(
            jnp.concatenate([batch.images[None], fakes[None]])
        )

    def _d_loss(
        self, params: Any, state: State, batch: Batch, fakes: jax.Array, logits: jax.Array
    ) -> jax.Array:
        loss = self.loss.real(logits[0]).sum() + self.loss.fake(logits[1]).sum()
        if self.loss.penalised:
            stats = state.stats["discriminator"]
            loss += self.penalty * self._penalty(params, stats, batch, fakes)
        return loss

    def _penalty(self, params: Any, stats: Any, batch: Batch, fakes: jax.Array) -> jax.Array:
        mix = batch.mix.reshape(-1, 1, 1, 1)
        between = fakes + mix * (batch.images - fakes)

        def critic(images: jax.Array, *labels: jax.Array) -> jax.Array:
            return self._apply("discriminator", params, stats, images, *labels)[0].reshape(-1)

        labels = () if batch.labels is None else (batch.labels,)
        return gradient_penalty(critic, between, *labels).sum()

    def generate(self, variables: Variables, question: Any) -> jax.Array:
        """SG-FP with running statistics: images [n, H, W, C], for SP.

        Args:
            variables: SG's, {"params", "batch_stats"}.
            question: [n, noise_size]; with classes {"noise": that, "labels": [n, classes]}.
        """
        given = (question["noise"], question["labels"]) if self.num_classes else (question,)
        images: Any = self.generator.apply(variables, *given, **_flag(self.generator, False))
        return images

    def judge(self, variables: Variables, images: jax.Array, *labels: jax.Array) -> jax.Array:
        """SD's logits of images [n, H, W, C], with running statistics.

        Args:
            variables: SD's, {"params", "batch_stats"}.
            images: what is judged.
            labels: integers [n, classes], if there are classes.
        """
        flag = _flag(self.discriminator, False)
        logits: Any = self.discriminator.apply(variables, images, *labels, **flag)
        return logits


def _flag(module: nn.Module, train: bool) -> dict[str, Any]:
    """The argument that tells a module whether it is trained, if it has one."""
    return {"train": train} if "train" in inspect.signature(module.__call__).parameters else {}
