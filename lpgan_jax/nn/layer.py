"""What a secure layer is."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from lpgan_jax.party import Party
from lpgan_jax.secret import Secret

Params = dict[str, Any]  # of Secret, or of float arrays before they are shared


class Layer(Protocol):
    """A layer with hyper-parameters as fields, a forward and a backward function.

    Values enter and leave at any scale of at least the layer's fraction bits; each layer truncates
    where it must. Activations are NHWC. Masks are per value: what a backward function needs is in
    the residuals, masked and opened already.
    """

    def init(
        self, rng: np.random.Generator, shape: tuple[int, ...]
    ) -> tuple[Params, tuple[int, ...]]:
        """(initial float64 parameters, output shape) for one example of the given shape."""

    def forward(self, party: Party, params: Params, x: Secret) -> tuple[Secret, Any]:
        """(y, residuals)."""

    def backward(
        self, party: Party, residuals: Any, dy: Secret, *, input_grad: bool, param_grads: bool
    ) -> tuple[Secret | None, Params | None]:
        """(dx, gradients), each only if asked for: what is not computed is not sent."""

    def group(self, residuals: Any, index: int, groups: int) -> Any:
        """The residuals of one of `groups` batches that went through `forward` together."""

    def infer(self, party: Party, params: Params, stats: Params, x: Secret) -> Secret:
        """The forward pass for generation, with running statistics."""


def batch_slice(size: int, index: int, groups: int) -> slice:
    """Where one of `groups` equal batches lies along an axis of the given size."""
    length = size // groups
    return slice(index * length, (index + 1) * length)
