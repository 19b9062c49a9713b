"""What can be trained under sharing, as its analysis sees it."""

from __future__ import annotations

from typing import Any, Protocol

from lpgan_jax.mpc.seat import Seat


class Trainable(Protocol):
    """A training, such as `programs.SecureProgram`.

    Attributes:
        scales: fraction bits at which each leaf of a secret state is shared.
        batch_scales: the same of a batch.
    """

    scales: Any
    batch_scales: Any

    def secret(self, state: Any) -> Any:
        """What is secret in a state."""

    def schedule(self, step: int) -> Any:
        """What is public in a step, counted from 0."""

    def train_step(self, party: Seat, secrets: Any, public: Any) -> tuple[Any, Any]:
        """(the state after a step, losses), from (state, batch)."""
