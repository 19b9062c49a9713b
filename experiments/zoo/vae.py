"""A variational autoencoder of digits, 16x16."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from classification import load
from gradients import adam, trained

import lpgan_jax as lp
from lpgan_jax.programs.batches import Stream, random_stream
from lpgan_jax.training.images import png

SIZE, LATENT = 16, 8


class VAE(nn.Module):
    """Two layers each way."""

    def setup(self) -> None:
        """Encoder and decoder."""
        self.encoder = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(2 * LATENT)])
        self.decoder = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(SIZE * SIZE)])

    def __call__(self, x: jax.Array, noise: jax.Array) -> tuple[jax.Array, ...]:
        """(logits of pixels, mean, log variance) of pixels [N, SIZE^2] and noise [N, LATENT]."""
        mean, log_variance = jnp.split(self.encoder(x), 2, -1)
        return self.decode(mean + jnp.exp(log_variance / 2) * noise), mean, log_variance

    def decode(self, z: jax.Array) -> jax.Array:
        """Logits of pixels."""
        return self.decoder(z)


def training(batch_size: int = 64, rate: float = 1e-3) -> lp.Training:
    """The training."""
    module = VAE()

    def loss(params: Any, batch: Any) -> jax.Array:
        x, noise = batch
        logits, mean, log_variance = module.apply(params, x, noise)
        fit = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
        kl = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(-1)
        return (fit + kl).mean() / x.shape[-1]

    def feed(seed: int, path: str | None) -> Any:
        images, _ = load((SIZE, SIZE, 1), path)
        draw = lp.shuffled((images.reshape(len(images), -1) + 1) / 2, batch_size, seed)

        def batch(turn: int) -> Any:
            rng = random_stream(seed, Stream.NOISE, turn)
            return draw(turn), rng.normal(size=(batch_size, LATENT)).astype(np.float32)

        return batch

    def generate(params: Any, z: jax.Array) -> jax.Array:
        pixels = nn.sigmoid(module.apply(params, z, method="decode"))
        return 2 * pixels.reshape(-1, SIZE, SIZE, 1) - 1

    def rows(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.float32)

    program = trained(
        lambda key: module.init(
            key, jnp.zeros((1, SIZE * SIZE), jnp.float32), jnp.zeros((1, LATENT), jnp.float32)
        ),
        loss,
        adam(rate),
        (rows(batch_size, SIZE * SIZE), rows(batch_size, LATENT)),
        answers={"generate": lp.Answer(generate, rows(64, LATENT), lambda state: state[0])},
    )
    sample = lp.Sample(
        "generate", lambda rng: rng.normal(size=(64, LATENT)), 200, file=png, suffix=".png"
    )
    return lp.Training(program, feed, steps=1000, sample=sample)
