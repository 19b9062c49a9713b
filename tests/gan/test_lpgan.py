"""LP-GAN's step in the clear, against the protocol written out with Flax, JAX and optax."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gans import SGD, adam, random_batch, small_lpgan
from secured import FAST, as_float64

from lpgan_jax.gan import LOSSES, LPGAN, Batch, Discriminator, Generator, gan_program
from lpgan_jax.gan.losses import gradient_penalty

# Python floats in plain NumPy's words, of a logit.
LOSS = {
    "logistic": (lambda o: np.log1p(np.exp(-o)), lambda o: np.log1p(np.exp(o))),
    "hinge": (lambda o: np.maximum(0, 1 - o), lambda o: np.maximum(0, 1 + o)),
    "least_squares": (lambda o: (o - 1) ** 2, lambda o: o**2),
    "wasserstein": (lambda o: -o, lambda o: o),
}
OF_GENERATOR = {"hinge": lambda o: -o}  # the others take the loss of real images


def written_out(gan, state, batch):
    """(parameters and statistics after a step, losses): batch after batch, each on its own."""
    in_turn = gan.updates == "alternating"
    sg, sd, optimizers = gan.generator, gan.discriminator, gan.optimizers

    def images(params, noise):
        variables = {"params": params, "batch_stats": state.stats["generator"]}
        return sg.apply(variables, noise, mutable=["batch_stats"])

    def logits(params, x):
        variables = {"params": params, "batch_stats": state.stats["discriminator"]}
        return sd.apply(variables, x, mutable=["batch_stats"])

    def updated(name, gradients):
        params = state.params[name]
        updates, _ = optimizers[name].update(gradients, state.optimizer[name], params)
        return optax.apply_updates(params, updates)

    fakes, first = images(state.params["generator"], batch.noise_d)

    def d_loss(params):
        real, of_real = logits(params, batch.images)
        fake, of_fake = logits(params, fakes)
        total = gan.loss.real(real).mean() + gan.loss.fake(fake).mean()
        if gan.loss.penalised:
            mix = batch.mix[:, None, None, None]
            between = (1 - mix) * fakes + mix * batch.images
            slopes = jax.grad(lambda x: logits(params, x)[0].sum())(between)
            norms = jnp.sqrt((slopes**2).sum((1, 2, 3)) + 1e-6)
            total += gan.penalty * ((norms - 1) ** 2).mean()
        return total, (of_real, of_fake)

    (d_value, d_stats), gradients = jax.value_and_grad(d_loss, has_aux=True)(
        state.params["discriminator"]
    )
    d_params = updated("discriminator", gradients)

    def g_loss(params):
        made, after = images(params, batch.noise_g if in_turn else batch.noise_d)
        through = d_params if in_turn else state.params["discriminator"]
        return gan.loss.generator(logits(through, made)[0]).mean(), after

    (g_value, second), gradients = jax.value_and_grad(g_loss, has_aux=True)(
        state.params["generator"]
    )
    params = {"generator": updated("generator", gradients), "discriminator": d_params}
    both = {"generator": (first, second), "discriminator": d_stats}
    stats = {
        name: jax.tree.map(lambda a, b: (a + b) / 2, *pair).get("batch_stats", {})
        for name, pair in both.items()
    }
    m = len(batch.images)
    return params, stats, (m * d_value, m * g_value)


@pytest.mark.parametrize(
    ("loss", "updates"), [*((name, "alternating") for name in LOSSES), ("logistic", "simultaneous")]
)
def test_a_step_is_the_protocol_written_out(loss, updates):
    """Batches of images and of generated ones are normalised apart, and SG goes through the new SD.

    Or, with simultaneous updates, through the old one, on the images that SD is trained on. In
    float64, where only the order of sums differs.
    """
    norm = {"norm": "group"} if loss == "wasserstein" else {}
    optimizers = {"generator": SGD, "discriminator": adam(eps_root=1e-4)}
    gan = small_lpgan(optimizers, loss=loss, updates=updates, of_sd=norm)
    rng = np.random.default_rng(0)
    state, batch = as_float64(gan.init(rng)), as_float64(random_batch(gan_program(gan, 2, 18), rng))
    after, losses = FAST(gan.train_step)(state, batch)
    params, stats, (d_loss, g_loss) = FAST(lambda s, b: written_out(gan, s, b))(state, batch)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)  # noqa: E731
    jax.tree.map(close, after.params, params)
    jax.tree.map(close, after.stats, stats)
    close(losses.discriminator, d_loss)
    close(losses.generator, g_loss)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, state.params)
    # Of the hinge and the critic, SD's last bias has no gradient here: logits cancel.
    assert sum(v < 1e-6 for v in jax.tree.leaves(moved)) <= 1


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_their_formulas(loss):
    logits = np.linspace(-5, 5, 21)
    real, fake = LOSS[loss]
    of_generator = OF_GENERATOR.get(loss, real)
    for function, formula in zip(
        (LOSSES[loss].real, LOSSES[loss].fake, LOSSES[loss].generator),
        (real, fake, of_generator),
        strict=True,
    ):
        np.testing.assert_allclose(function(logits), formula(logits), rtol=1e-12, atol=1e-12)


def test_losses_are_computed_only_if_they_are_opened():
    gan = gan_program(small_lpgan(opens_losses=False), 2, 18)
    rng = np.random.default_rng(0)
    _, losses = jax.eval_shape(gan.step, gan.init(rng), random_batch(gan, rng))
    assert losses is None


def test_generation_uses_the_running_statistics():
    """Images do not depend on what else is in the batch."""
    gan, rng = small_lpgan(), np.random.default_rng(0)
    variables, noise = gan.init(rng).learnt()["generator"], rng.normal(size=(3, 4))
    images = gan.generate(variables, noise)
    np.testing.assert_allclose(gan.generate(variables, noise[:1]), images[:1], atol=1e-6)
    trained = gan.generator.apply(variables, noise, mutable=["batch_stats"])[0]
    assert np.abs(trained - images).max() > 1e-2


def test_an_initial_state_depends_on_the_seed_alone():
    gan = small_lpgan({"generator": SGD, "discriminator": adam()})
    first, same, other = (gan.init(np.random.default_rng(seed)) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    kernels = [s.params["generator"]["fc"]["kernel"] for s in (first, other)]
    assert not np.any(kernels[0] == kernels[1])
    kernels = [first.params[n]["fc"]["kernel"].ravel()[:4] for n in first.params]
    assert not np.any(kernels[0] == kernels[1])  # the networks' words differ too
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((first.params, first.stats)))


@pytest.mark.parametrize(
    ("generator", "discriminator", "message"),
    [
        (Generator(depth=1), Discriminator(depth=2), "generator: expected .1, 16, 16, 1. from"),
        (
            Generator(depth=2, channels=3),
            Discriminator(depth=2),
            "generator: expected .1, 16, 16, 1. from .1, 4., got .1, 16, 16, 3.",
        ),
        (
            Generator(depth=2),
            Generator(depth=2),
            "discriminator: expected .1, 1. from .1, 16, 16, 1., got",
        ),
    ],
)
def test_networks_of_other_shapes_are_refused(generator, discriminator, message):
    optimizers = {"generator": SGD, "discriminator": SGD}
    gan = LPGAN(generator, discriminator, optimizers, LOSSES["logistic"], 4, (16, 16, 1))
    with pytest.raises(ValueError, match=message):
        gan.init(np.random.default_rng(0))


def test_the_penalty_of_a_linear_critic_is_that_of_its_weights():
    weights = np.random.default_rng(0).normal(size=(8, 8, 1))
    penalty = gradient_penalty(lambda x: (x * weights).sum((1, 2, 3)), jnp.ones((3, 8, 8, 1)))
    norm = np.sqrt((weights**2).sum())
    np.testing.assert_allclose(penalty, np.full(3, (norm - 1) ** 2), rtol=1e-6)


class Critic(nn.Module):
    """Without an argument `train`, or statistics."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(1)(images.reshape(images.shape[0], -1))


def test_a_module_without_a_flag_is_not_given_one():
    gan = dataclasses.replace(small_lpgan(SGD), discriminator=Critic())
    state = gan.init(np.random.default_rng(0))
    assert state.stats["discriminator"] == {}
    noise = np.zeros((2, gan.noise_size))
    after, _ = gan.train_step(state, Batch(np.zeros((2, *gan.image_shape)), noise, noise))
    assert after.stats["discriminator"] == {}
