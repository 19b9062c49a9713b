"""SecBN: batch normalisation, with shared running statistics for generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc.arithmetic import (
    bilinear,
    masked,
    mean_of_sum,
    mul,
    scale_public,
    truncate,
)
from lpgan_jax.mpc.roots import inverse_sqrt, lowest_bit
from lpgan_jax.nn.layer import Params, batch_slice
from lpgan_jax.party import Party
from lpgan_jax.ring import matmul
from lpgan_jax.secret import Secret, add_public


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Residuals:
    """Per group g and channel c, with n values each."""

    mean: Secret  # [g, c] at double fraction
    squares: Secret  # [g, c] sum of squared centred values, at double fraction
    centred: Secret  # [g, n, c], masked
    inverse: Secret  # [g, c] 1/sqrt(variance + eps), masked
    scale: Secret  # [g, c] gamma * inverse, masked


@dataclass(frozen=True)
class SecBN:
    """y = gamma (x - mean)/sqrt(var + eps) + beta over all axes but the last.

    gamma is folded into the inverse root, so that each element takes one product and the normalised
    value is never formed: with k = gamma*inv,  y = k*(x - mean) + beta, and
    dx = k*dy - k*mean(dy) - (x - mean) * k*inv*mean(dy*x_hat). The variance comes from the centred
    values.

    Attributes:
        epsilon: added to the variance; at double fraction, so that 1e-5 is not lost. At least 1
            LSB^2.
        momentum: of the running statistics.
        frac_bits: fraction bits of y's factors; running statistics are kept at double fraction.
        groups: the batch is this many batches one after the other, each with statistics of its own.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    frac_bits: int = 18
    groups: int = 1

    def __post_init__(self) -> None:
        if self.epsilon < 2.0 ** (-2 * self.frac_bits):
            raise ValueError(
                f"epsilon: expected at least 2^-{2 * self.frac_bits}, got {self.epsilon}"
            )

    def init(
        self, rng: np.random.Generator, shape: tuple[int, ...]
    ) -> tuple[Params, tuple[int, ...]]:
        """Scale (gamma) 1 and bias (beta) 0 per channel."""
        return {"scale": np.ones(shape[-1]), "bias": np.zeros(shape[-1])}, shape

    def init_stats(self, shape: tuple[int, ...]) -> Params:
        """Running mean 0 and variance 1 per channel, as floats."""
        return {"mean": np.zeros(shape[-1]), "var": np.ones(shape[-1])}

    @jax.named_scope("normalisation")
    def forward(self, party: Party, params: Params, x: Secret) -> tuple[Secret, Any]:
        """(y at double fraction, residuals).

        Range: the sum of squares of a channel's centred values below 2^62 at double fraction; for
        the running statistics, a variance below 2^10.
        """
        flat = x.unmasked().reshape(self.groups, -1, x.shape[-1])
        count = flat.shape[1]
        mu = mean_of_sum(party, flat.map(_sum), count, x.frac_bits)
        centred = masked(party, truncate(party, flat - _row(mu), self.frac_bits))
        squares = _inner(party, centred, centred)
        inverse, scale, y = self._normalise(party, params, centred, squares, count)
        return y.reshape(*x.shape), _Residuals(mu, squares, centred, inverse, scale)

    def _normalise(
        self, party: Party, params: Params, centred: Secret, squares: Secret, count: int
    ) -> tuple[Secret, Secret, Secret]:
        """(1/sqrt(squares/count + epsilon), gamma times that, y)."""
        # squares/2^k needs no operation, for 2^k = count * ratio with ratio in [1, 2); the root's
        # argument is then exact, and never below epsilon. The ratio goes into the result.
        log_count = (count - 1).bit_length()
        ratio = 2**log_count / count
        with party.at("inverse_sqrt"):
            epsilon = self.epsilon / ratio
            u = add_public(party, squares.divided_by_power_of_two(log_count), epsilon)
            smallest = lowest_bit(epsilon / 2, u.frac_bits)
            factor = ratio**-0.5
            inverse = inverse_sqrt(party, u, self.frac_bits, factor=factor, smallest=smallest)
            inverse = masked(party, inverse)
        gamma = params["scale"].rearrange(lambda v: v[None])
        scale = masked(
            party, truncate(party, mul(party, gamma, inverse, owing=True), self.frac_bits)
        )
        y = mul(party, centred, _row(scale), owing=True)
        return inverse, scale, y + params["bias"].unmasked().at_scale(y.frac_bits)

    @jax.named_scope("normalisation")
    def backward(
        self, party: Party, residuals: Any, dy: Secret, *, input_grad: bool, param_grads: bool
    ) -> tuple[Secret | None, Params | None]:
        """dx and gradients at double fraction."""
        r: _Residuals = residuals
        shape, f = dy.shape, self.frac_bits
        dy = truncate(party, dy, f).reshape(*r.centred.shape)
        dy = masked(party, dy)
        covariance = truncate(party, _inner(party, dy, r.centred), f)
        d_scale = mul(party, covariance, r.inverse, owing=True)  # sum(dy * x_hat) per group
        grads = None
        if param_grads:
            d_bias = dy.unmasked().map(_sum).sum((0,)).at_scale(d_scale.frac_bits)
            grads = {"scale": d_scale.sum((0,)), "bias": d_bias}
        if not input_grad:
            return None, grads
        count = r.centred.shape[1]
        slope = mean_of_sum(party, d_scale, count, f)
        slope = truncate(party, mul(party, slope, r.inverse, owing=True), f)
        slope = truncate(party, mul(party, slope, r.scale, owing=True), f)
        mean = mean_of_sum(party, dy.unmasked().map(_sum), count, f)
        offset = mul(party, mean, r.scale, owing=True)
        scaled = mul(party, dy, _row(r.scale), owing=True)
        dx = scaled - mul(party, r.centred, _row(slope), owing=True) - _row(offset)
        return dx.reshape(*shape), grads

    @jax.named_scope("normalisation")
    def update_stats(self, party: Party, stats: Params, residuals: Any) -> Params:
        """Running statistics after this batch (each group in turn). 1 round a group."""
        r: _Residuals = residuals
        f = 2 * self.frac_bits
        mu = r.mean.at_scale(f) if r.mean.frac_bits < f else r.mean
        variance = mean_of_sum(party, r.squares, r.centred.shape[1], f)
        batches = {"mean": mu, "var": variance}
        stats = dict(stats)
        for group in range(self.groups):
            for name, batch in batches.items():
                change = batch[group] - stats[name]
                step = scale_public(party, change, 1 - self.momentum, f, 12, factor_bits=14)
                stats[name] = stats[name] + step
        return stats

    def group(self, residuals: Any, index: int, groups: int) -> Any:
        """See `Layer.group`."""
        part = batch_slice(self.groups, index, groups)
        return jax.tree.map(lambda leaf: leaf[part], residuals)

    @jax.named_scope("normalisation")
    def infer(self, party: Party, params: Params, stats: Params, x: Secret) -> Secret:
        """y with the running statistics."""
        flat = x.unmasked().reshape(1, -1, x.shape[-1])
        centred = truncate(party, flat.at_scale(2 * self.frac_bits) - stats["mean"], self.frac_bits)
        variance = stats["var"].rearrange(lambda v: v[None])
        y = self._normalise(party, params, masked(party, centred), variance, count=1)[2]
        return y.reshape(*x.shape)


def _row(x: Secret) -> Secret:
    return x.rearrange(lambda v: v[:, None])


def _inner(party: Party, x: Secret, y: Secret) -> Secret:
    """Sums of products over the values of each group and channel: one dealt word each."""
    return bilinear(party, lambda u, v: _sum(u * v), x, y, owing=True)


def _sum(values: jax.Array) -> jax.Array:
    """Sums over the middle axis; as a matrix product, this long and slow axis is read in order."""
    ones = jnp.ones((1, values.shape[1]), values.dtype)
    return jax.vmap(lambda group: matmul(ones, group)[0])(values)
