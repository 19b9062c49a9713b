"""SGD and Adam on secret shares, behind optax's init/update interface.

Gradients are sums over the batch (so that they keep more bits than means would); the optimizer
knows the batch size and follows the mean gradient. What changes with the step is public and
computed by `schedule` in float64 on the host, so that both servers use the same integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.fixed_point import public_constant
from lpgan_jax.mpc.arithmetic import masked, scale_public, square, truncate
from lpgan_jax.mpc.normalise import binary_levels
from lpgan_jax.mpc.roots import inverse_sqrt, lowest_bit
from lpgan_jax.nn.layer import Params
from lpgan_jax.party import Party
from lpgan_jax.secret import Secret, concatenate, is_secret

_GRADIENT_BITS = 11  # Adam: a parameter's gradient, at its own scale, stays below 2^11
_MEAN_GRADIENT_BITS = 8  # that scale lets mean gradients reach 2^8
_DECAY_BITS = 8  # significant bits of 1 - b2; with 22 for squares, 32 are left for fractions
_RATE_BITS = 20


class SecureOptimizer(NamedTuple):
    """A pair of pure functions, as `optax.GradientTransformation`, and a public schedule.

    Attributes:
        init: params -> state, as float arrays (zeros) for DS to share.
        scales: params -> the fraction bits of that state, leaf by leaf.
        schedule: step (from 0) -> public words that `update` needs at this step.
        update: (party, gradients, state, public) -> (updates, state); add the updates to the
            parameters with `apply_updates`.
    """

    init: Callable[[Params], Params]
    scales: Callable[[Params], Params]
    schedule: Callable[[int], dict[str, np.ndarray]]
    update: Callable[[Party, Params, Params, dict[str, jax.Array]], tuple[Params, Params]]


def apply_updates(params: Params, updates: Params) -> Params:
    """Params + updates, as new values without masks."""
    return jax.tree.map(lambda p, u: p + u, params, updates, is_leaf=is_secret)


def _flatten(grads: Params) -> tuple[Secret, Callable[[Secret], Params]]:
    """All gradients as one vector, and the way back: one protocol call, not one a tensor."""
    leaves, structure = jax.tree.flatten(grads, is_leaf=is_secret)
    vector = concatenate([g.unmasked().reshape(-1) for g in leaves])

    def restore(flat: Secret) -> Params:
        parts, start = [], 0
        for leaf in leaves:
            part = flat.unmasked()[start : start + leaf.size]
            parts.append(part.reshape(*leaf.shape))
            start += leaf.size
        return jax.tree.unflatten(structure, parts)

    return vector, restore


_MOMENTUM_BITS = 16  # SGD: significant bits of the momentum


def sgd(
    learning_rate: float, batch_size: int, frac_bits: int, momentum: float = 0.0
) -> SecureOptimizer:
    """Stochastic gradient descent, as `optax.sgd(learning_rate, momentum)`.

    The update is -learning_rate * trace, where trace = gradient + momentum * trace, of mean
    gradients. The trace is kept as sums over the batch, like gradients, at f fraction bits. Updates
    below 1 LSB survive on average: truncation rounds at random, without bias.

    Args:
        learning_rate: positive.
        batch_size: how many examples a gradient sums over.
        frac_bits: f, fraction bits of the parameters. Gradients, and traces, need |g| < 2^10.
        momentum: 0 to 1, with a relative error below 2^-16; a steady gradient's trace is 1/(1 -
            momentum) times as large. 0 keeps no state. Costs up to a round and two words a
            parameter.
    """
    rate = learning_rate / batch_size

    def init(params: Params) -> Params:
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
        return {"trace": np.zeros(size)} if momentum else {}

    def scales(params: Params) -> Params:
        return {"trace": frac_bits} if momentum else {}

    def update(
        party: Party, grads: Params, state: Params, public: dict[str, jax.Array]
    ) -> tuple[Params, Params]:
        gradient, restore = _flatten(grads)
        with party.at("sgd"):
            if momentum:
                decayed = scale_public(
                    party, state["trace"], momentum, frac_bits, factor_bits=_MOMENTUM_BITS
                )
                gradient = truncate(party, gradient, frac_bits).unmasked() + decayed.unmasked()
                state = {"trace": gradient}
            return restore(scale_public(party, gradient, -rate, frac_bits, factor_bits=16)), state

    return SecureOptimizer(init, scales, lambda step: {}, update)


def adam(
    learning_rate: float,
    batch_size: int,
    frac_bits: int,
    b1: float = 0.5,
    b2: float = 0.999,
    eps_root: float = 1e-8,
) -> SecureOptimizer:
    """Adam (Kingma and Ba, 2015), as `optax.adam(learning_rate, b1, b2, eps=0, eps_root=eps_root)`.

    optax's eps outside the root is below an LSB; eps_root, inside it, takes its place and defines
    v = 0. Adam does not depend on the gradients' scale: they are sums over at most eight examples'
    worth, so that small batches keep their bits and large ones do not overflow. The second moment
    is kept at double fraction (36 bits at most), where it is never negative; the inverse root finds
    its exponent by a binary search, and the power of two is applied to m/sqrt(.), so that no
    intermediate value is larger than the quotient.

    Args:
        learning_rate: positive.
        batch_size: how many examples a gradient sums over.
        frac_bits: fraction bits of the parameters.
        b1: decay of the first moment.
        b2: decay of the second moment, with 8 significant bits in 1 - b2.
        eps_root: of the mean gradient's second moment. Mean gradients need |g| < 2^8, and less
            with more than 20 fraction bits, since their square is formed at double fraction:
            2^(28 - f) (a discriminator's reach 2^4 in ordinary training, which is too much at 24).
    """
    # Up to 16 fraction bits m gets 8 more and v twice as many; beyond, the ring has no room.
    m_bits = max(frac_bits, min(frac_bits + 8, 26))
    v_bits = min(2 * frac_bits, 62 - 2 * _GRADIENT_BITS - _DECAY_BITS)
    k, shift = public_constant(1 - b2, _DECAY_BITS)
    decay = k * 2.0**-shift  # what takes the place of 1 - b2, in the bias correction too
    log_batch = (batch_size - 1).bit_length()
    reduction = max(0, log_batch + _MEAN_GRADIENT_BITS - _GRADIENT_BITS)
    eps = eps_root * (batch_size / 2**reduction) ** 2
    smallest = lowest_bit(eps * decay, v_bits)
    largest = v_bits + 2 * _GRADIENT_BITS
    # |m|/sqrt(v) < 1/sqrt(decay); its product with the rate must stay below 2^62.
    ratio_bits = m_bits + 31 - (62 - largest) // 2 - v_bits // 2
    rate_bits = min(_RATE_BITS, 61 - ratio_bits - math.ceil(-math.log2(decay) / 2))
    rate_scale = rate_bits - math.ceil(math.log2(learning_rate / (1 - b1)))

    def init(params: Params) -> Params:
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
        return {"m": np.zeros(size), "v": np.zeros(size)}

    def scales(params: Params) -> Params:
        return {"m": m_bits, "v": v_bits}

    def schedule(step: int) -> dict[str, np.ndarray]:
        bias1, bias2 = 1 - b1 ** (step + 1), 1 - (1 - decay) ** (step + 1)
        rate = round(learning_rate * math.sqrt(bias2) / bias1 * 2.0**rate_scale)
        return {
            "rate": np.asarray(-rate % 2**64, np.uint64),
            "eps": np.asarray(max(1, round(eps * bias2 * 2.0**v_bits)), np.uint64),
        }

    def update(
        party: Party, grads: Params, state: Params, public: dict[str, jax.Array]
    ) -> tuple[Params, Params]:
        gradient, restore = _flatten(grads)
        m, v = state["m"], state["v"]
        with party.at("adam"):
            gradient = gradient.divided_by_power_of_two(reduction)
            g = masked(party, truncate(party, gradient, frac_bits))
            change = g.unmasked().at_scale(m_bits) - m
            m = m + scale_public(party, change, 1 - b1, m_bits, _GRADIENT_BITS + 1)
            change = truncate(party, square(party, g), v_bits) - v
            v = v + scale_public(
                party, change, decay, v_bits, 2 * _GRADIENT_BITS, factor_bits=_DECAY_BITS
            )
            epsilon = party.only_s1(jnp.broadcast_to(public["eps"], v.shape).astype(v.share.dtype))
            ratio = inverse_sqrt(
                party,
                Secret(v.share + epsilon, v_bits),
                None,
                times=m,
                smallest=smallest,
                largest=largest,
                search=binary_levels,
            )
            assert ratio.frac_bits == ratio_bits
            step = Secret(_times_word(ratio.share, public["rate"]), ratio.frac_bits + rate_scale)
            return restore(truncate(party, step, frac_bits)), {"m": m, "v": v}

    return SecureOptimizer(init, scales, schedule, update)


def _times_word(share: jax.Array, word: jax.Array) -> jax.Array:
    """Share times a public signed word, in the ring or in the clear."""
    return share * word.astype(jnp.int64).astype(share.dtype)
