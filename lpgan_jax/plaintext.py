"""The same training in the clear: Flax twins and optax, step for step as `gan.LPGAN`.

It says what the secure program should compute, and what secrecy costs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from lpgan_jax.config import OptimizerConfig
from lpgan_jax.models.dcgan import DCGAN
from lpgan_jax.models.twin import (
    Discriminator,
    Generator,
    Variables,
    discriminator_twin,
    generator_twin,
    to_flax,
)
from lpgan_jax.nn.layer import Params


class PlaintextState(NamedTuple):
    """What training changes.

    Attributes:
        variables: {network: Flax variables {"params", "batch_stats"}}.
        optimizer: {network: state of its optax optimizer}.
    """

    variables: dict[str, Variables]
    optimizer: dict[str, Any]


class PlaintextLosses(NamedTuple):
    """Sums of losses over the batch, [], as `gan.Losses`.

    Attributes:
        real: -ln D(x) for the images.
        fake: -ln(1 - D(G(z))) for the generated ones.
        generator: -ln D(G(z)) for SG's step.
    """

    real: jax.Array
    fake: jax.Array
    generator: jax.Array


@dataclass(frozen=True)
class PlaintextLPGAN:
    """A DCGAN and its two optimizers, in the clear.

    Attributes:
        model: the shapes.
        generator_tx: SG's optimizer.
        discriminator_tx: SD's optimizer.
        dtype: float32 or float64, of everything.
    """

    model: DCGAN
    generator_tx: optax.GradientTransformation
    discriminator_tx: optax.GradientTransformation
    dtype: DTypeLike = jnp.float32

    @property
    def generator(self) -> Generator:
        """SG's twin."""
        return generator_twin(self.model, self.dtype)

    @property
    def discriminator(self) -> Discriminator:
        """SD's twin."""
        return discriminator_twin(self.model, self.dtype)

    def init(self, params: Params, stats: Params) -> PlaintextState:
        """The state before the first step.

        Args:
            params: {network: {layer: {name: value}}}, as of `LPGAN.init`: both trainings can then
                start from the same networks.
            stats: running statistics, in the same form.
        """
        variables = {
            name: jax.tree.map(
                lambda v: jnp.asarray(v, self.dtype), to_flax(params[name], stats[name])
            )
            for name in ("generator", "discriminator")
        }
        optimizer = {
            "generator": self.generator_tx.init(variables["generator"]["params"]),
            "discriminator": self.discriminator_tx.init(variables["discriminator"]["params"]),
        }
        return PlaintextState(variables, optimizer)

    def variables(self, state: PlaintextState, network: str) -> Variables:
        """Flax variables {"params", "batch_stats"} of the "generator" or the "discriminator"."""
        return state.variables[network]

    @functools.partial(jax.jit, static_argnums=0)
    def train_step(
        self, state: PlaintextState, images: ArrayLike, noise_d: ArrayLike, noise_g: ArrayLike
    ) -> tuple[PlaintextState, PlaintextLosses]:
        """One step of SD and one of SG; see `LPGAN.train_step`.

        Args:
            state: the state before the step.
            images: [m, H, W, C], in [-1, 1].
            noise_d: [m, noise_size], for the images that SD is trained on.
            noise_g: [m, noise_size], for those that SG is trained on.

        Returns:
            (the state after the step, losses).
        """
        images, noise_d, noise_g = (jnp.asarray(v, self.dtype) for v in (images, noise_d, noise_g))
        g, d = state.variables["generator"], state.variables["discriminator"]

        def generated(noise: jax.Array) -> Any:
            return jax.vjp(lambda p: _apply(self.generator, g, p, noise), g["params"], has_aux=True)

        # Both batches in one pass, each normalised with its own statistics.
        fakes, backwards, g_stats = jax.vmap(generated)(jnp.stack([noise_d, noise_g]))

        def d_loss(params: Params) -> tuple[jax.Array, Any]:
            pair = jnp.stack([images, fakes[0]])
            logits, stats = jax.vmap(lambda x: _apply(self.discriminator, d, params, x))(pair)
            real, fake = jax.nn.softplus(-logits[0]).sum(), jax.nn.softplus(logits[1]).sum()
            return (real + fake) / len(images), (real, fake, stats)

        grads, (real, fake, d_stats) = jax.grad(d_loss, has_aux=True)(d["params"])
        d_params, d_optimizer = _update(
            self.discriminator_tx, grads, state.optimizer["discriminator"], d["params"]
        )

        def g_loss(fakes: jax.Array) -> tuple[jax.Array, jax.Array]:
            loss = jax.nn.softplus(-_apply(self.discriminator, d, d_params, fakes)[0]).sum()
            return loss / len(fakes), loss

        d_fakes, generator = jax.grad(g_loss, has_aux=True)(fakes[1])
        (grads,) = jax.tree.map(lambda residual: residual[1], backwards)(d_fakes)
        g_params, g_optimizer = _update(
            self.generator_tx, grads, state.optimizer["generator"], g["params"]
        )
        variables = {
            "generator": {"params": g_params, "batch_stats": self._running(g, g_stats)},
            "discriminator": {"params": d_params, "batch_stats": self._running(d, d_stats)},
        }
        optimizer = {"generator": g_optimizer, "discriminator": d_optimizer}
        return PlaintextState(variables, optimizer), PlaintextLosses(real, fake, generator)

    def _running(self, variables: Variables, added: Params) -> Params:
        """Running statistics after two batches, one by one; see `_apply`."""
        stats = variables["batch_stats"]
        for batch in range(2):
            stats = jax.tree.map(
                lambda old, new: self.model.norm_momentum * old + new[batch],  # noqa: B023
                stats,
                added,
            )
        return stats

    @functools.partial(jax.jit, static_argnums=0)
    def generate(self, state: PlaintextState, noise: ArrayLike) -> jax.Array:
        """Images [n, H, W, C] from noise [n, noise_size], with running statistics."""
        noise = jnp.asarray(noise, self.dtype)
        images = self.generator.apply(state.variables["generator"], noise, use_running_average=True)
        assert isinstance(images, jax.Array)  # and not with updated variables
        return images


def _apply(
    network: Generator | Discriminator, variables: Variables, params: Params, x: jax.Array
) -> tuple[jax.Array, Params]:
    """(output with batch statistics, what these add to running ones: 1 - momentum times them)."""
    nothing = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    y, updated = network.apply({"params": params, "batch_stats": nothing}, x, mutable="batch_stats")
    return y, updated.get("batch_stats", {})


def _update(
    tx: optax.GradientTransformation, grads: Params, state: Any, params: Params
) -> tuple[Params, Any]:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def optax_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optax optimizer that a configuration names, of all parameters as one vector."""
    if config.name == "sgd":
        optimizer = optax.sgd(config.learning_rate, config.momentum or None)
    else:
        rate, eps_root = config.learning_rate, config.eps_root
        optimizer = optax.adam(rate, config.b1, config.b2, eps=0.0, eps_root=eps_root)
    return optax.flatten(optimizer)
