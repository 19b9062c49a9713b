"""A program of a user: two linear classes of points, told apart by logistic regression."""

import jax
import jax.numpy as jnp
import numpy as np

import lpgan_jax as lp

F = np.float32


def training(rate=0.5, batch_size=8, questions=4, every=4, log_every=1, checkpoint_every=3):
    def init(rng):
        return {"w": rng.normal(size=(3, 1)).astype(F) / 4, "b": np.zeros(1, F)}

    def logits(params, x):
        return (x @ params["w"] + params["b"])[:, 0]

    def step(params, batch):
        def loss(params):
            z = logits(params, batch["x"])
            return jnp.mean(jax.nn.softplus(z) - batch["y"] * z)

        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradients), {"loss": value}

    def feed(seed, path):
        if path == "nowhere":
            raise FileNotFoundError("nowhere: no such file")
        points = np.random.default_rng(9).normal(size=(64, 3)).astype(F)
        classes = (points @ np.array([1.0, -2.0, 0.5], F) > 0).astype(F)
        return lp.shuffled({"x": points, "y": classes}, batch_size, seed)

    def of(rows, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), F)

    def probability(params, x):
        return jax.nn.sigmoid(logits(params, x))

    sample = lp.Sample("probability", lambda rng: rng.normal(size=(questions, 3)), every=every)
    program = lp.Program(
        init=init,
        step=step,
        batch={"x": of(batch_size, 3), "y": of(batch_size)},
        learnt=lambda params: {"w": params["w"]},
        answers={"probability": lp.Answer(probability, of(questions, 3))},
    )
    return lp.Training(
        program,
        feed,
        steps=6,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample=sample,
    )
