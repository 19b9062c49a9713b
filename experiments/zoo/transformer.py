"""A Transformer that learns to reverse sequences: attention alone can move a token."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from gradients import adam, trained

import lpgan_jax as lp

LENGTH, TOKENS, WIDTH = 8, 8, 32


class Transformer(nn.Module):
    """Two blocks: attention of four heads, and a layer of twice the width."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, LENGTH, TOKENS] of one-hot tokens of the same shape."""
        place = self.param("place", nn.initializers.normal(0.5), (LENGTH, WIDTH))
        x = nn.Dense(WIDTH)(x) + place
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(TOKENS)(nn.LayerNorm()(x))


def training(batch_size: int = 64, rate: float = 3e-3) -> lp.Training:
    """The training."""
    module, shape = Transformer(), (LENGTH, TOKENS)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = module.apply(params, tokens)
        return optax.softmax_cross_entropy(logits, tokens[:, ::-1]).mean()

    def feed(seed: int, path: str | None) -> Any:
        tokens = np.random.default_rng(seed).integers(TOKENS, size=(4096, LENGTH))
        return lp.shuffled(np.eye(TOKENS, dtype=np.float32)[tokens], batch_size, seed)

    def reverse(params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.argmax(module.apply(params, tokens), -1)

    program = trained(
        lambda key: module.init(key, jnp.zeros((1, *shape), jnp.float32)),
        loss,
        adam(rate),
        jax.ShapeDtypeStruct((batch_size, *shape), np.float32),
        answers={
            "reverse": lp.Answer(
                reverse, jax.ShapeDtypeStruct((32, *shape), np.float32), lambda state: state[0]
            )
        },
    )
    return lp.Training(program, feed, steps=600)
