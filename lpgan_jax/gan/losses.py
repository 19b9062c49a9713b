"""What SD and SG minimise, from SD's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import relu, softplus

LossName = Literal["logistic", "hinge", "least_squares", "wasserstein"]


@dataclass(frozen=True)
class Loss:
    """A loss of each of the two networks, for each example.

    Attributes:
        real: SD's, of its logit of an image.
        fake: SD's, of its logit of a generated one.
        generator: SG's, of SD's logit of a generated image.
        penalised: whether the norm of SD's gradient, between images and generated ones, is held
            near 1 (Gulrajani et al. 2017).
    """

    real: Callable[[jax.Array], jax.Array]
    fake: Callable[[jax.Array], jax.Array]
    generator: Callable[[jax.Array], jax.Array]
    penalised: bool = False


LOSSES: dict[LossName, Loss] = {
    # -ln D(x), -ln(1 - D(G(z))) and -ln D(G(z)), where D is the sigmoid of the logit.
    "logistic": Loss(lambda o: softplus(-o), softplus, lambda o: softplus(-o)),
    "hinge": Loss(lambda o: relu(1 - o), lambda o: relu(1 + o), jnp.negative),
    "least_squares": Loss(lambda o: (o - 1) ** 2, jnp.square, lambda o: (o - 1) ** 2),
    "wasserstein": Loss(jnp.negative, jnp.positive, jnp.negative, penalised=True),
}


def gradient_penalty(
    critic: Callable[..., jax.Array], images: jax.Array, *labels: jax.Array
) -> jax.Array:
    """(|d critic(x) / dx| - 1)^2 for each image x of [N, H, W, C]; with its labels, if any."""

    def gradient(image: jax.Array, *label: jax.Array) -> jax.Array:
        of_one = [one[None] for one in label]
        return jax.grad(lambda x: critic(x[None], *of_one)[0])(image)

    squares = jnp.square(jax.vmap(gradient)(images, *labels)).sum((1, 2, 3))
    return jnp.square(jnp.sqrt(squares + _SMALLEST) - 1)


_SMALLEST = 1e-6  # where the root has a derivative
