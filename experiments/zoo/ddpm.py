"""A denoising diffusion model of digits, 16x16, and its sampling (DDIM), both under sharing."""

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

SIZE, FREQUENCIES = 16, 4


def signal(time: np.ndarray) -> np.ndarray:
    """How much of an image is left at a time in [0, 1]: the cosine schedule, never quite 0."""
    return np.cos(0.97 * np.pi / 2 * time)


def embedded(time: np.ndarray) -> np.ndarray:
    """Sines and cosines of times: [..., 2 FREQUENCIES]."""
    angles = time[..., None] * np.pi * 2.0 ** np.arange(FREQUENCIES)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


class UNet(nn.Module):
    """Down to 4x4 and up again, told the time at each size."""

    maps: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """The noise in images [N, SIZE, SIZE, 1], from their embedded times."""

        def block(x: jax.Array, maps: int) -> jax.Array:
            x = nn.Conv(maps, (3, 3))(x) + nn.Dense(maps)(time)[:, None, None]
            return nn.relu(nn.GroupNorm(4)(x))

        first = block(x, self.maps)
        second = block(nn.avg_pool(first, (2, 2), (2, 2)), 2 * self.maps)
        x = block(nn.avg_pool(second, (2, 2), (2, 2)), 2 * self.maps)
        for beside in (second, first):
            x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
            x = block(jnp.concatenate([x, beside], -1), beside.shape[-1])
        return nn.Conv(1, (3, 3))(x)


def training(
    batch_size: int = 32,
    maps: int = 16,
    rate: float = 2e-3,
    steps: int = 6000,
    steps_of_sampling: int = 25,
) -> lp.Training:
    """The training, whose rate falls to 0 over its steps."""
    module, shape = UNet(maps), (SIZE, SIZE, 1)

    def loss(params: Any, batch: Any) -> jax.Array:
        noisy, time, noise = batch
        return ((module.apply(params, noisy, time) - noise) ** 2).mean()

    def feed(seed: int, path: str | None) -> Any:
        draw = lp.shuffled(load(shape, path)[0], batch_size, seed)

        def batch(turn: int) -> Any:  # the owner draws times and noise, and mixes: no root is left
            rng, images = random_stream(seed, Stream.NOISE, turn), draw(turn)
            time, noise = rng.uniform(size=batch_size), rng.normal(size=images.shape)
            left = signal(time)[:, None, None, None]
            noisy = left * images + np.sqrt(1 - left**2) * noise
            return tuple(x.astype(np.float32) for x in (noisy, embedded(time), noise))

        return batch

    times = np.linspace(1, 0, steps_of_sampling + 1)
    left = signal(times)
    schedule = tuple(
        x.astype(np.float32)
        for x in (embedded(times[:-1]), *((s[:-1], s[1:]) for s in (left, np.sqrt(1 - left**2))))
        for x in (x if isinstance(x, tuple) else (x,))
    )

    def generate(params: Any, noise: jax.Array) -> jax.Array:
        def denoise(x: jax.Array, at: Any) -> tuple[jax.Array, None]:
            time, a, a_next, b, b_next = at
            found = module.apply(params, x, jnp.broadcast_to(time, (len(x), *time.shape)))
            image = jnp.clip((x - b * found) / a, -1, 1)
            return a_next * image + b_next * found, None

        return jax.lax.scan(denoise, noise, schedule)[0]

    def rows(*of: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(of, np.float32)

    program = trained(
        lambda key: module.init(
            key, jnp.zeros((1, *shape), jnp.float32), jnp.zeros((1, 2 * FREQUENCIES), jnp.float32)
        ),
        loss,
        adam(optax.cosine_decay_schedule(rate, steps)),
        (rows(batch_size, *shape), rows(batch_size, 2 * FREQUENCIES), rows(batch_size, *shape)),
        answers={"generate": lp.Answer(generate, rows(16, *shape), lambda state: state[0])},
    )
    sample = lp.Sample(
        "generate", lambda rng: rng.normal(size=(16, *shape)), 1000, file=png, suffix=".png"
    )
    return lp.Training(program, feed, steps=steps, sample=sample)
