"""`tiny_program`, with differential privacy: two noised updates a step."""

import jax
import jax.numpy as jnp
import numpy as np

import lpgan_jax as lp

F = np.float32
CLIP, UPDATES, ROWS, RATE, MULTIPLIER = 0.5, 2, 24, 1 / 64, 1.5
POINTS = np.random.default_rng(9).normal(size=(128, 3)).astype(F)
CLASSES = (POINTS @ np.array([1.0, -2.0, 0.5], F) > 0).astype(F)


def init(rng):
    return {"w": rng.normal(size=(3, 1)).astype(F) / 4, "b": np.zeros(1, F)}


def logit(params, x):
    return (x @ params["w"] + params["b"])[..., 0]


def loss(params, x, y):
    z = logit(params, x)
    return jax.nn.softplus(z) - y * z


def step(params, batch, noise):
    (x, y), weights = batch

    def update(params, given):
        x, y, weights, noise = given
        each = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)
        total = lp.private_sum(each, weights, noise, CLIP)
        return jax.tree.map(lambda p, g: p - 0.25 * g, params, total), None

    return jax.lax.scan(update, params, (x, y, weights, noise))[0], None


def training(source="servers", **fields):
    def feed(seed, _):
        return lp.poisson((POINTS, CLASSES), RATE, ROWS, seed, UPDATES)

    def of(*shape, dtype=F):
        return jax.ShapeDtypeStruct(shape, dtype)

    program = lp.Program(
        init=init,
        step=step,
        batch=(
            (of(UPDATES, ROWS, 3), of(UPDATES, ROWS)),
            of(UPDATES, ROWS, dtype=np.int32),
        ),
        learnt=lambda params: {"w": params["w"]},
        answers={"logit": lp.Answer(lambda p, x: jnp.tanh(logit(p, x)), of(2, 3))},
        noise=lp.Noise(MULTIPLIER, CLIP, 4, UPDATES, source),
    )
    mechanism = lp.Mechanism(len(POINTS), RATE, ROWS, MULTIPLIER)
    sample = lp.Sample("logit", lambda rng: rng.normal(size=(2, 3)), every=2)
    fields = {"steps": 3, "checkpoint_every": 2, "sample": sample} | fields
    return lp.Training(program, feed, privacy=lp.Privacy(mechanism, 1e-5, UPDATES), **fields)
