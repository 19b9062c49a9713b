"""LP-GAN's training protocol and its generation protocol, as one server runs them.

The patent's steps: (1) DS shares the parameters; (2) SD is trained on m images and m generated
ones; (3) SG is trained through SD on m generated images; (4) the servers return their shares to SP.
SG does not change between (2) and (3), so both of its batches are generated in one pass, each
normalised with its own statistics; SD's real and generated batches likewise.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lpgan_jax.models.dcgan import DCGAN
from lpgan_jax.mpc import elementary
from lpgan_jax.mpc.arithmetic import masked
from lpgan_jax.nn.layer import Params
from lpgan_jax.optim import SecureOptimizer, apply_updates
from lpgan_jax.party import Party
from lpgan_jax.secret import Secret, add_public, concatenate

NETWORKS = ("generator", "discriminator")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What training changes; everything in it is secret.

    Attributes:
        params: {network: {layer: {name: value}}}.
        stats: running statistics of the normalisations, in the same form.
        optimizer: {network: state of its optimizer}.
    """

    params: Params
    stats: Params
    optimizer: Params

    def learnt(self, networks: Collection[str] = NETWORKS) -> tuple[Params, Params]:
        """(params, running statistics) of these networks: what SP gets, not the optimizers'."""
        return {n: self.params[n] for n in networks}, {n: self.stats[n] for n in networks}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What DS shares for one step, all at f fraction bits.

    Attributes:
        images: [m, H, W, C], in [-1, 1].
        noise_d: [m, noise_size], for the images that SD is trained on.
        noise_g: [m, noise_size], for those that SG is trained on.
    """

    images: Any
    noise_d: Any
    noise_g: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Losses:
    """Sums of losses over the batch, at f fraction bits, []; they go to SP as shares.

    SP gets no example's own loss, which would tell how well SD remembers it.

    Attributes:
        real: -ln D(x) for the images.
        fake: -ln(1 - D(G(z))) for the generated ones.
        generator: -ln D(G(z)) for SG's step.
    """

    real: Secret
    fake: Secret
    generator: Secret


@dataclass(frozen=True, eq=False)
class LPGAN:
    """A DCGAN and its two optimizers.

    Compared by identity: what is compiled for one is kept with it.

    Attributes:
        model: the shapes.
        optimizers: {network: optimizer}.
        losses: whether a step computes the losses (training itself needs none).
    """

    model: DCGAN
    optimizers: dict[str, SecureOptimizer]
    losses: bool = True

    def init(self, rng: np.random.Generator) -> State:
        """DS's initial state, as float64 arrays."""
        params, stats = {}, {}
        for name, network in self._networks():
            params[name], stats[name] = network.init(rng)
        optimizer = {name: self.optimizers[name].init(params[name]) for name in NETWORKS}
        return State(params, stats, optimizer)

    def scales(self, state: State) -> State:
        """The fraction bits at which each leaf of the state is shared."""
        f = self.model.frac_bits
        return State(
            jax.tree.map(lambda _: f, state.params),
            jax.tree.map(lambda _: 2 * f, state.stats),
            {name: self.optimizers[name].scales(state.params[name]) for name in NETWORKS},
        )

    def schedule(self, step: int) -> dict[str, dict[str, np.ndarray]]:
        """Public words of a step, counted from 0."""
        return {name: self.optimizers[name].schedule(step) for name in NETWORKS}

    def _networks(self) -> tuple[tuple[str, Any], ...]:
        return ("generator", self.model.generator()), ("discriminator", self.model.discriminator())

    def train_step(
        self, party: Party, secrets: tuple[State, Batch], public: dict[str, dict[str, jax.Array]]
    ) -> tuple[State, Losses | None]:
        """One step of SD and one of SG. Nothing is opened but masked values.

        Args:
            party: this server's seat.
            secrets: (state, batch).
            public: `schedule` of this step.

        Returns:
            (the state after the step, losses or None).
        """
        state, batch = secrets
        m = batch.images.shape[0]
        generator = self.model.generator(groups=2)
        discriminator = self.model.discriminator(groups=2)

        noise = concatenate([batch.noise_d, batch.noise_g])
        fakes, g_residuals = generator.forward(party, state.params["generator"], noise)

        with party.at("images"):
            images = concatenate([masked(party, batch.images), fakes[:m]])
        logits, d_residuals = discriminator.forward(party, state.params["discriminator"], images)
        logits = logits.settled(party)
        with party.at("discriminator.loss"):
            sigmoid = elementary.sigmoid(party, logits, self.model.frac_bits)
            d_logits = concatenate([add_public(party, sigmoid[:m], -1.0), sigmoid[m:].unmasked()])
        _, grads = discriminator.backward(party, d_residuals, d_logits)
        d_params, d_optimizer = self._update("discriminator", party, state, grads, public)

        critic = self.model.discriminator()
        g_logits, residuals = critic.forward(party, d_params, fakes[m:])
        g_logits = g_logits.settled(party)
        with party.at("generator.loss"):
            sigmoid = elementary.sigmoid(party, g_logits, self.model.frac_bits)
            d_g_logits = add_public(party, sigmoid, -1.0)
        d_fakes, _ = critic.backward(
            party, residuals, d_g_logits, input_grad=True, param_grads=False
        )
        assert d_fakes is not None
        second = generator.group(g_residuals, 1, 2)
        _, grads = generator.backward(party, second, d_fakes)
        g_params, g_optimizer = self._update("generator", party, state, grads, public)

        stats = {
            "generator": generator.update_stats(party, state.stats["generator"], g_residuals),
            "discriminator": discriminator.update_stats(
                party, state.stats["discriminator"], d_residuals
            ),
        }
        new = State(
            {"generator": g_params, "discriminator": d_params},
            stats,
            {"generator": g_optimizer, "discriminator": d_optimizer},
        )
        return new, self._losses(party, logits, g_logits) if self.losses else None

    def _update(
        self, name: str, party: Party, state: State, grads: Params, public: dict[str, Any]
    ) -> tuple[Params, Params]:
        with party.at(f"{name}.update"):
            updates, optimizer = self.optimizers[name].update(
                party, grads, state.optimizer[name], public[name]
            )
        return apply_updates(state.params[name], updates), optimizer

    def _losses(self, party: Party, logits: Secret, g_logits: Secret) -> Losses:
        """-ln sigmoid(o) = softplus(-o), -ln(1 - sigmoid(o)) = softplus(o)."""
        m = g_logits.shape[0]
        signed = concatenate([-logits[:m].unmasked(), logits[m:].unmasked(), -g_logits.unmasked()])
        with party.at("losses"):
            values = elementary.softplus(party, signed, self.model.frac_bits).unmasked()[:, 0]
        sums = values.reshape(3, m).sum((1,))
        return Losses(sums[0], sums[1], sums[2])

    def generate(self, party: Party, secrets: tuple[State, Secret], public: None) -> Secret:
        """SG-FP with running statistics: images [n, H, W, C] at f fraction bits, for SP.

        Args:
            party: this server's seat.
            secrets: (state, noise [n, noise_size]).
            public: nothing.
        """
        state, noise = secrets
        network = self.model.generator()
        images = network.infer(party, state.params["generator"], state.stats["generator"], noise)
        # The last truncation gave fresh shares at f bits: SP's two say nothing but their sum.
        return images.unmasked()
