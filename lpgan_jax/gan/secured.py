"""LP-GAN's two protocols under sharing, as programs of a party."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lpgan_jax.gan.lpgan import LPGAN, Batch, Losses, State
from lpgan_jax.mpc.compiling import options_to_run_once
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.transform.function import Program, secure


class SecureLPGAN:
    """What the servers run: `train_step` and `generate`, (party, secrets, public) -> secrets.

    A secret state is a `State` whose optimizers' step counters are None: they are public, and
    follow from the step's number.

    Attributes:
        gan: the same in the clear.
        frac_bits: fraction bits of parameters and batches.
        shapes: of a secret state.
        scales: the fraction bits at which each leaf of it is shared.
        batch: the shapes of a batch, all of whose leaves are shared at `frac_bits`.
    """

    def __init__(self, gan: LPGAN, batch_size: int, frac_bits: int) -> None:
        """`batch_size`: images in a batch of training."""
        self.gan, self.frac_bits = gan, frac_bits
        noise = jax.ShapeDtypeStruct((batch_size, gan.noise_size), np.float32)
        images = jax.ShapeDtypeStruct((batch_size, *gan.image_shape), np.float32)
        mix = jax.ShapeDtypeStruct((batch_size,), np.float32) if gan.loss.penalised else None
        self.batch = Batch(images, noise, noise, mix)
        self._example = gan.init(np.random.default_rng(0))
        step = secure(gan.train_step, carry={0: 0}, frac_bits=frac_bits)
        self._train = step.program(self._example, self.batch)
        self._generation = secure(gan.generate, frac_bits=frac_bits)
        self._public, self.scales = self._parted()
        self._counted = 0, self._public
        train = self._train
        self._advance = jax.jit(
            lambda leaves: (train.public(leaves), train.next_public(leaves)),
            compiler_options=options_to_run_once(),
        )
        self.shapes: State = jax.eval_shape(lambda v: v, self.secret(self._example))

    def _parted(self) -> tuple[list[Any], State]:
        """(the public leaves of the initial state, the scales of the others)."""
        values, structure = jax.tree.flatten(self._example)
        known = self._train.leaves[: len(values)]
        scales = iter(self._train.scales)
        public = [v for v, leaf in zip(values, known, strict=True) if leaf.public]
        return public, jax.tree.unflatten(
            structure, [None if leaf.public else next(scales) for leaf in known]
        )

    def secret(self, state: State) -> State:
        """What is secret in a state."""
        return jax.tree.map(
            lambda scale, value: None if scale is None else value,
            self.scales,
            state,
            is_leaf=lambda x: x is None,
        )

    def init(self, rng: np.random.Generator) -> State:
        """DS's initial state, what is secret in it."""
        return self.secret(self.gan.init(rng))

    def schedule(self, step: int) -> list[jax.Array]:
        """What is public in a step, counted from 0; computed alike by all who ask."""
        done, leaves = self._counted if self._counted[0] <= step else (0, self._public)
        for _ in range(done, step):
            leaves = self._advance(leaves)[1]
        self._counted = step, leaves
        public: list[jax.Array] = self._advance(leaves)[0]
        return public

    def train_step(
        self, party: Seat, secrets: tuple[State, Batch], public: list[jax.Array]
    ) -> tuple[State, Losses | None]:
        """One step of SD and one of SG. Nothing is opened but masked values.

        Args:
            party: this server's seat.
            secrets: (state, batch).
            public: `schedule` of this step.

        Returns:
            (the state after the step, losses or None).
        """
        after: tuple[State, Losses | None] = self._train(party, secrets, public)
        return after

    def generate(self, party: Seat, secrets: tuple[State, Secret], public: None = None) -> Secret:
        """SG-FP with running statistics: images [n, H, W, C] at f fraction bits, for SP.

        Args:
            party: this server's seat.
            secrets: (state, noise [n, noise_size]).
            public: nothing.
        """
        state, noise = secrets
        images: Secret = self._generator(noise.shape)(
            party, (state.learnt()["generator"], noise), []
        )
        return images

    def _generator(self, shape: tuple[int, ...]) -> Program:
        noise = jax.ShapeDtypeStruct(shape, np.float32)
        return self._generation.program(self._example.learnt()["generator"], noise)
