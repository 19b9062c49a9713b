"""Training and inference of a classifier, as one server runs them, and in the clear.

The loss is one-against-all logistic: each class has a logit o and a label y of 0 or 1, and costs
softplus(o) - y o. Its gradient at the logits, sigmoid(o) - y, takes no protocol but the sigmoid.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from lpgan_jax.models.small_nets import CLASSES, SmallNet
from lpgan_jax.mpc import elementary
from lpgan_jax.mpc.arithmetic import truncate
from lpgan_jax.nn.layer import Params
from lpgan_jax.optim import SecureOptimizer, apply_updates
from lpgan_jax.party import Party
from lpgan_jax.secret import Secret


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What training changes; everything in it is secret.

    Attributes:
        params: {layer: {name: value}}.
        optimizer: state of the optimizer.
    """

    params: Params
    optimizer: Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What DS shares for one step, all at f fraction bits.

    Attributes:
        images: [m, *input_shape].
        labels: [m, 10], one-hot.
    """

    images: Any
    labels: Any


@dataclass(frozen=True)
class Classifier:
    """A network and its optimizer, on shares.

    Attributes:
        model: the network.
        optimizer: of its parameters.
    """

    model: SmallNet
    optimizer: SecureOptimizer

    def init(self, rng: np.random.Generator) -> State:
        """DS's initial state, as float64 arrays."""
        params, _ = self.model.network().init(rng)
        return State(params, self.optimizer.init(params))

    def scales(self, state: State) -> State:
        """The fraction bits at which each leaf of the state is shared."""
        f = self.model.frac_bits
        return State(jax.tree.map(lambda _: f, state.params), self.optimizer.scales(state.params))

    def schedule(self, step: int) -> dict[str, np.ndarray]:
        """Public words of a step, counted from 0."""
        return self.optimizer.schedule(step)

    def train_step(
        self, party: Party, secrets: tuple[State, Batch], public: dict[str, jax.Array]
    ) -> State:
        """One step on a batch. Nothing is opened but masked values.

        With `optim.sgd` and momentum 22 rounds; 24 for `conv-relu`.

        Args:
            party: this server's seat.
            secrets: (state, batch).
            public: `schedule` of this step.

        Returns:
            The state after the step.

        Raises:
            ValueError: the batch's images or labels have another shape than the model's.
        """
        state, batch = secrets
        _check_batch(self.model, batch.images.shape, batch.labels.shape)
        network = self.model.network()
        logits, residuals = network.forward(party, state.params, batch.images)
        with party.at("loss"):
            o = logits.settled(party)
            d_logits = elementary.sigmoid(party, o, self.model.frac_bits) - batch.labels
        _, grads = network.backward(party, residuals, d_logits)
        with party.at("update"):
            updates, optimizer = self.optimizer.update(party, grads, state.optimizer, public)
        return State(apply_updates(state.params, updates), optimizer)

    def infer(self, party: Party, secrets: tuple[Params, Secret], public: None) -> Secret:
        """Logits [n, 10] at f fraction bits, for SP. 8 rounds; 12 for `conv-relu`.

        Args:
            party: this server's seat.
            secrets: (params, images [n, *input_shape] at f fraction bits).
            public: nothing.

        Raises:
            ValueError: the images have another shape than the model's.
        """
        params, images = secrets
        _check_images(self.model, images.shape)
        logits = self.model.network().infer(party, params, {}, images)
        # At double fraction the low bits would tell SP more than the logits. And a truncation's
        # shares are fresh: SP's two say nothing but their sum.
        with party.at("logits"):
            return truncate(party, logits, self.model.frac_bits).unmasked()


class PlaintextState(NamedTuple):
    """What training in the clear changes.

    Attributes:
        params: of the Flax twin, in the secure network's layout.
        optimizer: state of its optax optimizer.
    """

    params: Params
    optimizer: Any


@dataclass(frozen=True)
class PlaintextClassifier:
    """The same in the clear: the Flax twin and optax, step for step as `Classifier`.

    Attributes:
        model: the network.
        tx: its optimizer, on mean gradients.
        dtype: float32 or float64, of everything.
    """

    model: SmallNet
    tx: optax.GradientTransformation
    dtype: DTypeLike = jnp.float32

    def init(self, params: Params) -> PlaintextState:
        """The state before the first step, from parameters as of `Classifier.init`."""
        own = jax.tree.map(lambda v: jnp.asarray(v, self.dtype), params)
        return PlaintextState(own, self.tx.init(own))

    @functools.partial(jax.jit, static_argnums=0)
    def train_step(self, state: PlaintextState, batch: Batch) -> PlaintextState:
        """One step on a batch of float arrays.

        Raises:
            ValueError: as `Classifier.train_step`.
        """
        _check_batch(self.model, batch.images.shape, batch.labels.shape)
        labels = jnp.asarray(batch.labels, self.dtype)

        def loss(params: Params) -> jax.Array:
            logits = self.infer(params, batch.images)
            return optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1).mean()

        updates, optimizer = self.tx.update(jax.grad(loss)(state.params), state.optimizer)
        return PlaintextState(optax.apply_updates(state.params, updates), optimizer)

    @functools.partial(jax.jit, static_argnums=0)
    def infer(self, params: Params, images: ArrayLike) -> jax.Array:
        """Logits [n, 10] from images [n, *input_shape].

        Raises:
            ValueError: as `Classifier.infer`.
        """
        images = jnp.asarray(images, self.dtype)
        _check_images(self.model, images.shape)
        logits = self.model.twin(self.dtype).apply({"params": params}, images)
        assert isinstance(logits, jax.Array)  # and not with updated variables
        return logits


def one_hot(labels: ArrayLike) -> np.ndarray:
    """Labels as DS shares them: integers [n], 0 to 9, to float64 [n, 10].

    Raises:
        ValueError: they are not such integers.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: expected integers [n], got {labels.dtype}{list(labels.shape)}")
    if not np.isin(labels, np.arange(CLASSES)).all():
        raise ValueError(f"labels: expected 0 to {CLASSES - 1}, got {np.unique(labels)}")
    return np.eye(CLASSES)[labels]


def _check_images(model: SmallNet, shape: tuple[int, ...]) -> None:
    if shape[1:] != model.input_shape:
        expected = ", ".join(map(str, model.input_shape))
        raise ValueError(f"images: expected [n, {expected}], got {list(shape)}")


def _check_batch(model: SmallNet, images: tuple[int, ...], labels: tuple[int, ...]) -> None:
    _check_images(model, images)
    if labels != (images[0], CLASSES):
        raise ValueError(f"labels: expected [{images[0]}, {CLASSES}], one-hot, got {list(labels)}")
