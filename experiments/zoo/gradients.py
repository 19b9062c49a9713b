"""A step of plain gradient descent by an optimizer of optax, for programs of the zoo."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import lpgan_jax as lp

Loss = Callable[[Any, Any], jax.Array]


def trained(
    initial: Callable[[jax.Array], Any],
    loss: Loss,
    optimizer: optax.GradientTransformation,
    batch: Any,
    **fields: Any,
) -> lp.Program:
    """A program that minimises a loss.

    Args:
        initial: a key to parameters.
        loss: (params, batch) to a mean, of which SP is told.
        optimizer: of optax.
        batch: shapes.
        fields: of `lp.Program`.
    """

    def init(rng: np.random.Generator) -> Any:
        params = initial(jax.random.key(int(rng.integers(2**31))))
        return params, optimizer.init(params)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), {"loss": value}

    def learnt(state: Any) -> Any:
        return state[0]

    return lp.Program(init=init, step=step, batch=batch, learnt=learnt, **fields)


def adam(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adam of all parameters as one vector; an epsilon outside of the root is below an LSB."""
    return optax.flatten(optax.adam(rate, eps=0.0, eps_root=1e-8))
