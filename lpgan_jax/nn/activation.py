"""SR, SLR and tanh. One secret bit serves an activation's forward and backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lpgan_jax.mpc import elementary
from lpgan_jax.mpc.arithmetic import masked, mul, square, truncate
from lpgan_jax.mpc.compare import Bit, positive, select
from lpgan_jax.nn.layer import Params, batch_slice
from lpgan_jax.party import Party
from lpgan_jax.secret import Secret, add_public

LOG_RANGE = 8
"""ReLU and leaky ReLU take |x| < 2^LOG_RANGE in real terms, and |x| < 2^62 as an integer.

A normalised value is at most the root of their number: 2^8 in 64 maps of 32x32. With 9, leaky ReLU
would need a truncation more at twice 18 fraction bits.
"""


@dataclass(frozen=True)
class _Activation:
    frac_bits: int = 18

    def init(
        self, rng: np.random.Generator, shape: tuple[int, ...]
    ) -> tuple[Params, tuple[int, ...]]:
        """No parameters."""
        return {}, shape

    def forward(self, party: Party, params: Params, x: Secret) -> tuple[Secret, Any]:
        raise NotImplementedError

    def group(self, residuals: Any, index: int, groups: int) -> Any:
        """See `Layer.group`."""
        return jax.tree.map(lambda v: v[batch_slice(v.shape[0], index, groups)], residuals)

    def infer(self, party: Party, params: Params, stats: Params, x: Secret) -> Secret:
        """As `forward`."""
        return self.forward(party, params, x)[0]


@dataclass(frozen=True)
class SR(_Activation):
    """ReLU: s*x with s = [x > 0], at `frac_bits`. The derivative at 0 is 0. |x| < 2^`LOG_RANGE`.

    x is opened (masked) once, for the bit, the rescaling and the selection.
    """

    def forward(self, party: Party, params: Params, x: Secret) -> tuple[Secret, Any]:
        """(y, the bit). 4 rounds."""
        x = masked(party, x)  # once, for the bit and for the selection
        bit = positive(party, x, min(party.ring.bits, x.frac_bits + LOG_RANGE + 1))
        return self._apply(party, bit, x), bit

    def backward(
        self, party: Party, residuals: Any, dy: Secret, *, input_grad: bool, param_grads: bool
    ) -> tuple[Secret | None, Params | None]:
        """dx with the same bit: 1 round, no comparison."""
        return (self._apply(party, residuals, dy) if input_grad else None), {}

    def _apply(self, party: Party, bit: Bit, x: Secret) -> Secret:
        return select(party, bit, truncate(party, x, self.frac_bits))


@dataclass(frozen=True)
class SLR(SR):
    """Leaky ReLU: alpha*x + (1 - alpha)*s*x, at `frac_bits`. The derivative at 0 is alpha.

    Like x, what the backward pass is given must be below 2^`LOG_RANGE`.
    """

    alpha: float = 0.2

    def _apply(self, party: Party, bit: Bit, x: Secret) -> Secret:
        return leaky(party, bit, x, self.alpha, self.frac_bits)


def leaky(party: Party, bit: Bit, x: Secret, alpha: float, frac_bits: int) -> Secret:
    """alpha*x + (1 - alpha)*bit*x at frac_bits; |x| < 2^`LOG_RANGE` in real terms. 2 rounds."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a slope between 0 and 1, got {alpha}")
    # |alpha x| 2^shift must stay below 2^62, and alpha's own error, |x| 2^-shift, at an LSB.
    shift = min(24, 62 - LOG_RANGE - x.frac_bits)
    if shift < frac_bits:
        x = truncate(party, x, frac_bits)
        shift = min(24, 62 - LOG_RANGE - frac_bits)
    k = round(alpha * 2**shift)
    x = x.settled(party)
    chosen = select(party, bit, x)
    total = x.unmasked().times_int(k) + chosen.times_int(2**shift - k)
    return truncate(party, total.divided_by_power_of_two(shift), frac_bits)


@dataclass(frozen=True)
class SecTanh(_Activation):
    """tanh, saturating; y is masked, since its derivative and the next layer use it."""

    def forward(self, party: Party, params: Params, x: Secret) -> tuple[Secret, Any]:
        """(y, y). 7 rounds."""
        y = masked(party, elementary.tanh(party, x.settled(party), self.frac_bits))
        return y, y

    def backward(
        self, party: Party, residuals: Any, dy: Secret, *, input_grad: bool, param_grads: bool
    ) -> tuple[Secret | None, Params | None]:
        """dy * (1 - y^2) at double fraction. 2 rounds."""
        if not input_grad:
            return None, {}
        derivative = add_public(party, -square(party, residuals, owing=True), 1.0)
        derivative = truncate(party, derivative, self.frac_bits)
        return mul(party, truncate(party, dy, self.frac_bits), derivative, owing=True), {}


@dataclass(frozen=True)
class SecSquare(_Activation):
    """x^2, for |x| < 2^(31 - frac_bits) in real terms. x is opened (masked) once."""

    def forward(self, party: Party, params: Params, x: Secret) -> tuple[Secret, Any]:
        """(x^2 at double fraction, x at `frac_bits`). 1 round."""
        x = truncate(party, x, self.frac_bits)
        # A truncated value is made of public and dealt parts, so that products of it open nothing.
        x = masked(party, x) if x.mask is None else x
        return square(party, x, owing=True), x

    def backward(
        self, party: Party, residuals: Any, dy: Secret, *, input_grad: bool, param_grads: bool
    ) -> tuple[Secret | None, Params | None]:
        """2 x dy at double fraction. 1 round: only dy is opened."""
        if not input_grad:
            return None, {}
        dy = truncate(party, dy, self.frac_bits)
        return mul(party, residuals.times_int(2), dy, owing=True), {}
