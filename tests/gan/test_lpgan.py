"""LP-GAN's step against the same written plainly: one pass after the other, in float64."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lpgan_jax.gan import LOSSES, LPGAN, NETWORKS, Batch, Discriminator, Generator
from lpgan_jax.gan.losses import gradient_penalty

M, NOISE, SHAPE = 4, 3, (8, 8, 1)


def gan_of(loss="logistic", norm="batch", **fields):
    optimizers = {"generator": optax.adam(1e-3), "discriminator": optax.sgd(1e-2)}
    generator = Generator(features=2, depth=1)
    discriminator = Discriminator(features=2, depth=2, norm=norm)
    return LPGAN(generator, discriminator, optimizers, LOSSES[loss], NOISE, SHAPE, **fields)


def as_float64(tree):
    def leaf(value):
        value = jnp.asarray(value)
        return value.astype(jnp.float64) if value.dtype == jnp.float32 else value

    return jax.tree.map(leaf, tree)


def batch_of(mix=False):
    rng = np.random.default_rng(1)
    images = np.tanh(rng.normal(size=(M, *SHAPE)))
    noise = [rng.normal(size=(M, NOISE)) for _ in range(2)]
    return Batch(images, *noise, rng.uniform(size=M) if mix else None)


FORMULAS = {  # SD's of real and of generated images, SG's; of logits
    "logistic": (
        lambda o: -np.log(1 / (1 + np.exp(-o))),
        lambda o: -np.log(1 - 1 / (1 + np.exp(-o))),
        lambda o: -np.log(1 / (1 + np.exp(-o))),
    ),
    "hinge": (lambda o: np.maximum(0, 1 - o), lambda o: np.maximum(0, 1 + o), lambda o: -o),
    "least_squares": (lambda o: (o - 1) ** 2, lambda o: o**2, lambda o: (o - 1) ** 2),
    "wasserstein": (lambda o: -o, lambda o: o, lambda o: -o),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_formulas(name):
    logits = np.array([-3.0, -1.0, -0.2, 0.0, 0.3, 1.0, 4.0])
    loss = LOSSES[name]
    for function, formula in zip(
        (loss.real, loss.fake, loss.generator), FORMULAS[name], strict=True
    ):
        np.testing.assert_allclose(function(jnp.asarray(logits)), formula(logits), atol=1e-12)


def test_the_penalty_of_a_linear_critic_is_that_of_its_weights():
    weights = np.random.default_rng(0).normal(size=SHAPE)
    penalty = gradient_penalty(lambda x: (x * weights).sum((1, 2, 3)), jnp.ones((M, *SHAPE)))
    norm = np.sqrt((weights**2).sum())
    np.testing.assert_allclose(penalty, np.full(M, (norm - 1) ** 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "norm"), [("logistic", "batch"), ("hinge", "none"), ("wasserstein", "group")]
)
def test_a_step_is_one_of_sd_and_one_of_sg(loss, norm):
    gan = gan_of(loss, norm)
    state = as_float64(gan.init(np.random.default_rng(0)))
    batch = batch_of(mix=loss == "wasserstein")
    after, losses = jax.jit(gan.train_step)(state, batch)

    real, fake, generator = (getattr(LOSSES[loss], n) for n in ("real", "fake", "generator"))
    g, d = gan.generator, gan.discriminator

    def apply(module, params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        return module.apply(variables, x, train=True, mutable=["batch_stats"])

    def images(params, noise):
        return apply(g, params, state.stats["generator"], noise)

    def logits(params, x):
        return apply(d, params, state.stats["discriminator"], x)

    made = images(state.params["generator"], batch.noise_d)[0]

    def d_loss(params):
        total = real(logits(params, batch.images)[0]).sum() + fake(logits(params, made)[0]).sum()
        if loss == "wasserstein":
            mix = batch.mix[:, None, None, None]
            between = mix * batch.images + (1 - mix) * made
            slopes = jax.grad(lambda x: logits(params, x)[0].sum())(between)  # no batch statistics
            norms = jnp.sqrt((slopes**2).sum((1, 2, 3)) + 1e-6)
            total += gan.penalty * ((norms - 1) ** 2).sum()
        return total / M

    def update(name, gradients):
        own = gan.optimizers[name]
        updates, _ = own.update(gradients, state.optimizer[name], state.params[name])
        return optax.apply_updates(state.params[name], updates)

    value, gradients = jax.value_and_grad(d_loss)(state.params["discriminator"])
    new_d = update("discriminator", gradients)

    def g_loss(params):
        return generator(logits(new_d, images(params, batch.noise_g)[0])[0]).sum() / M

    g_value, gradients = jax.value_and_grad(g_loss)(state.params["generator"])
    wanted = {"generator": update("generator", gradients), "discriminator": new_d}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), after.params, wanted)
    np.testing.assert_allclose(losses.discriminator / M, value, rtol=1e-12)
    np.testing.assert_allclose(losses.generator / M, g_value, rtol=1e-12)

    two = [images(state.params["generator"], z)[1] for z in (batch.noise_d, batch.noise_g)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *two)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
        after.stats["generator"],
        mean["batch_stats"],
    )


def test_generation_uses_running_statistics():
    gan = gan_of()
    state = as_float64(gan.init(np.random.default_rng(0)))
    noise = np.random.default_rng(2).normal(size=(2, NOISE))
    stats = jax.tree.map(lambda v: v + 0.25, state.stats["generator"])
    variables = {"params": state.params["generator"], "batch_stats": stats}
    together = gan.generate(variables, noise)
    alone = gan.generate(variables, noise[:1])  # of a batch of one, its own would be 0
    np.testing.assert_allclose(together[:1], alone, atol=1e-12)
    assert together.shape == (2, *SHAPE)


class Critic(nn.Module):
    outputs: int = 1

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs)(x.reshape(x.shape[0], -1))


def test_a_module_without_a_flag_is_not_given_one():
    gan = dataclasses.replace(gan_of(), discriminator=Critic())
    state = gan.init(np.random.default_rng(0))
    assert state.stats["discriminator"] == {}
    after, _ = gan.train_step(state, batch_of())
    assert set(after.params) == set(NETWORKS)


def test_wrong_shapes_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"discriminator: expected \(1, 1\) from .*got \(1, 2\)"):
        dataclasses.replace(gan_of(), discriminator=Critic(2)).init(rng)
    with pytest.raises(ValueError, match=r"generator: expected \(1, 16, 16, 1\) from .*\(1, 8, 8"):
        dataclasses.replace(gan_of(), image_shape=(16, 16, 1)).init(rng)
