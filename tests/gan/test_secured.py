"""The secure program, in the clear and on shares, against ordinary Flax and optax.

Run in the clear, it differs from its twin by its series and public constants alone, each within
2^-17 of the exact value (relative, at 18 fraction bits): the slope of SLR and means over counts
that are no powers of two; tanh and sigmoid are within 2^-20, the inverse root within 2^-24. A chain
of up to four such factors gives the `RELATIVE` error of outputs and gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_grid, real, secret
from lpgan_jax.models.dcgan import DCGAN
from lpgan_jax.models.twin import discriminator_twin, from_flax, generator_twin, to_flax
from lpgan_jax.optim import adam, sgd
from lpgan_jax.plaintext import PlaintextLPGAN, optax_optimizer

from lpgan_jax import key
from lpgan_jax.gan import LPGAN, NETWORKS, Batch
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.training.config import OptimizerConfig

F = 18
LSB = 2.0**-F
RELATIVE = 4 * 2.0**-17

DIGITS = DCGAN(noise_size=16, features=4, base_size=4, depth=2, init_std=0.2)
# Nothing is a power of two, the kernel and so its padding are uneven.
ODD = DCGAN(3, noise_size=7, features=3, base_size=3, depth=2, kernel_size=5, init_std=0.2)
SMALL = DCGAN(noise_size=8, features=2, base_size=2, depth=2, init_std=0.2)
SHALLOW = DCGAN(noise_size=8, features=2, depth=1)
TWINS = {"generator": generator_twin, "discriminator": discriminator_twin}
both_models = pytest.mark.parametrize("model", [DIGITS, ODD], ids=["digits", "odd"])


def scaled(values, frac_bits):
    """As `ExactSeat` holds a value."""
    return Secret(jnp.asarray(values, jnp.float64) * 2.0**frac_bits, frac_bits)


def unscaled(tree):
    return jax.tree.map(
        lambda s: np.asarray(s.share) * 2.0**-s.frac_bits, tree, is_leaf=lambda x: type(x) is Secret
    )


def revealed(tree):
    return jax.tree.map(real, tree, is_leaf=lambda x: type(x) is Secret)


def batch_of(model, rng, size):
    """A batch that fixed point holds exactly."""
    images = np.clip(on_grid(rng, (size, *model.image_shape), std=0.5), -1, 1)
    return Batch(images, *(on_grid(rng, (size, model.noise_size)) for _ in range(2)))


def assert_close(got, expected, relative, absolute=0.0):
    """Equal to within a part of the largest value of all."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=relative * largest + absolute),
        got,
        expected,
    )


# Networks -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def secure_pass(model, name, params, x, cotangent):
    """(output, gradient at the input, gradients of the parameters) of the secure layers."""
    network = getattr(model, name)()
    shared = jax.tree.map(lambda v: scaled(v, F), params)
    party = ExactSeat()
    y, residuals = network.forward(party, shared, scaled(x, F))
    dx, grads = network.backward(party, residuals, scaled(cotangent, 2 * F), input_grad=True)
    return y, dx, grads


@functools.partial(jax.jit, static_argnums=(0, 1))
def twin_pass(model, name, variables, x, cotangent):
    twin = TWINS[name](model, jnp.float64)
    y, vjp = jax.vjp(
        lambda x, params: twin.apply({**variables, "params": params}, x, mutable="batch_stats")[0],
        x,
        variables["params"],
    )
    return y, *vjp(cotangent)


@both_models
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_the_twins(model, name):
    rng = np.random.default_rng(1)
    params, stats = getattr(model, name)().init(rng)
    params = jax.tree.map(lambda v: v + rng.normal(0, 0.1, v.shape), params)  # biases too
    size = model.noise_size if name == "generator" else model.image_shape
    x, y_shape = rng.normal(0, 0.5, np.append(6, size)), (6, *model.image_shape)
    cotangent = rng.normal(size=y_shape if name == "generator" else (6, 1))
    variables = to_flax(params, stats)
    y, dx, grads = unscaled(secure_pass(model, name, params, x, cotangent))
    twin_y, twin_dx, twin_grads = twin_pass(model, name, variables, x, cotangent)
    assert_close(y, twin_y, RELATIVE)
    assert_close(dx, twin_dx, RELATIVE)
    assert_close(grads, from_flax(model, name, {**variables, "params": twin_grads})[0], RELATIVE)


# Conversions --------------------------------------------------------------------------------------


@both_models
@pytest.mark.parametrize("name", NETWORKS)
def test_conversions_undo_each_other_and_fit_flax(model, name):
    params, stats = getattr(model, name)().init(np.random.default_rng(0))
    variables = to_flax(params, stats)
    jax.tree.map(np.testing.assert_array_equal, from_flax(model, name, variables), (params, stats))
    x = jnp.zeros((2, model.noise_size) if name == "generator" else (2, *model.image_shape))
    made_by_flax = jax.eval_shape(TWINS[name](model, jnp.float32).init, jax.random.key(0), x)
    shapes = jax.tree.map(lambda v: (v.shape, jnp.float32), variables)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), made_by_flax) == shapes


def without(tree, *path):
    first, *rest = path
    copy = dict(tree)
    if rest:
        copy[first] = without(tree[first], *rest)
    else:
        del copy[first]
    return copy


def replaced(tree, value, *path):
    first, *rest = path
    return {**tree, first: replaced(tree[first], value, *rest) if rest else value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: without(v, "params", "deconv0"), "params.deconv0: missing"),
        (lambda v: without(v, "params", "bn1", "scale"), "params.bn1.scale: missing"),
        (lambda v: without(v, "batch_stats"), "batch_stats.bn0: missing"),
        (lambda v: without(v, "params"), "params: missing"),
        (lambda v: replaced(v, {}, "params", "deconv7"), "params.deconv7: unknown, expected fc"),
        (lambda v: replaced(v, {}, "opt"), "opt: unknown, expected params, batch_stats"),
        (
            lambda v: replaced(v, np.zeros((4, 4, 4, 8)), "params", "deconv0", "kernel"),
            r"params.deconv0.kernel: expected shape \(4, 4, 8, 4\), got \(4, 4, 4, 8\)",
        ),
        (lambda v: replaced(v, 1.0, "params", "fc"), "params.fc: expected kernel, got an array"),
        (lambda v: 3, "expected params, batch_stats, got int"),
    ],
)
def test_from_flax_names_the_layer_that_does_not_fit(change, message):
    variables = to_flax(*DIGITS.generator().init(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=message):
        from_flax(DIGITS, "generator", change(variables))


def test_a_network_without_normalisation_needs_no_statistics():
    params, stats = SHALLOW.discriminator().init(np.random.default_rng(0))
    assert stats == {}
    got = from_flax(SHALLOW, "discriminator", {"params": to_flax(params, stats)["params"]})
    jax.tree.map(np.testing.assert_array_equal, got, (params, {}))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_step_stays_in_its_dtype(dtype):
    model, rng = DIGITS, np.random.default_rng(0)
    twin, _, start = both(model, OptimizerConfig(name="adam", learning_rate=1e-3), 4, dtype, rng)
    batch = batch_of(model, rng, 4)
    state = twin.init(start.params, start.stats)
    after = jax.eval_shape(twin.train_step, state, batch.images, batch.noise_d, batch.noise_g)
    images = jax.eval_shape(twin.generate, state, batch.noise_d)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((after, images))}
    assert dtypes == {np.dtype(dtype), np.dtype(np.int32)}  # Adam counts its steps


@pytest.mark.parametrize("twin", TWINS.values())
def test_half_precision_is_refused(twin):
    with pytest.raises(ValueError, match="expected float32 or float64, got bfloat16"):
        twin(DIGITS, jnp.bfloat16)


# Training -----------------------------------------------------------------------------------------


def both(model, config, size, dtype, rng):
    """The twin and the secure program of one configuration, and an initial state on the grid."""
    if config.name == "sgd":
        secure = sgd(config.learning_rate, size, F)
    else:
        secure = adam(config.learning_rate, size, F, config.b1, config.b2, config.eps_root)
    gan = LPGAN(model, dict.fromkeys(NETWORKS, secure))
    tx = optax_optimizer(config)
    start = jax.tree.map(lambda v: np.rint(v / LSB) * LSB, gan.init(rng))
    return PlaintextLPGAN(model, tx, tx, dtype), gan, start


def in_secure_layout(model, twin, state):
    """{network: (params, stats)}."""
    return {name: from_flax(model, name, twin.variables(state, name)) for name in NETWORKS}


def secure_layout(state):
    return {name: (state.params[name], state.stats[name]) for name in NETWORKS}


@pytest.mark.parametrize(
    ("model", "size", "config"),
    [
        (DIGITS, 4, OptimizerConfig(name="sgd", learning_rate=0.1)),
        (ODD, 12, OptimizerConfig(name="adam", learning_rate=1e-2, eps_root=1e-4)),
    ],
    ids=["sgd-digits", "adam-odd"],
)
def test_steps_in_the_clear_are_the_twins(model, size, config):
    rng = np.random.default_rng(2)
    twin, gan, start = both(model, config, size, jnp.float64, rng)
    secure = jax.tree.map(scaled, start, gan.scales(start))
    state = twin.init(start.params, start.stats)
    step = jax.jit(lambda state, batch, public: gan.train_step(ExactSeat(), (state, batch), public))
    steps, rate = 2, config.learning_rate
    for number in range(steps):
        batch = batch_of(model, rng, size)
        encoded = jax.tree.map(lambda v: scaled(v, F), batch)
        secure, losses = step(secure, encoded, gan.schedule(number))
        state, twin_losses = twin.train_step(state, batch.images, batch.noise_d, batch.noise_g)
    # Gradients are below 1. SGD passes their errors on; Adam divides them by sqrt(eps_root) at
    # worst, and takes 1 - b2 to 12 bits, an error that the root halves.
    error = RELATIVE * rate
    if config.name == "adam":
        error = rate * (2.0**-13 + RELATIVE / config.eps_root**0.5)
    before = secure_layout(start)
    got, expected = secure_layout(unscaled(secure)), in_secure_layout(model, twin, state)
    for name in NETWORKS:
        assert_close(got[name][0], expected[name][0], 0, steps * error)
        assert_close(got[name][1], expected[name][1], RELATIVE, error)  # some are quite still: 1e-2
        for old, new in zip(*map(jax.tree.leaves, (before[name], expected[name])), strict=True):
            assert np.abs(new - old).max() > 20 * steps * error  # else the comparison says little
    for field in ("real", "fake", "generator"):
        total = np.sum(getattr(twin_losses, field))
        assert_close(unscaled(getattr(losses, field)), total, 50 * error)
    noise = batch.noise_d
    images = jax.jit(lambda s, z: gan.generate(ExactSeat(), (s, z), None))(secure, scaled(noise, F))
    assert_close(unscaled(images), twin.generate(state, noise), 50 * error)


@pytest.mark.slow
def test_secure_steps_are_the_twins():
    """The whole protocol, on shares, with its one-LSB roundings.

    A step rounds an update by 1 LSB. A gradient is a sum over the 16 pixels at SD's first layer, of
    a real and a generated image, of products of two factors below 1, each with an error of 1 LSB,
    and twice as much after each of two normalisations (deviations are near 1/2): 2 * 16 * 2 * 4
    LSB, times the rate.
    """
    rng, steps, config = np.random.default_rng(3), 2, OptimizerConfig(name="sgd", learning_rate=0.1)
    twin, gan, start = both(SMALL, config, 4, jnp.float64, rng)
    secure = jax.tree.map(secret, start, gan.scales(start))
    state = twin.init(start.params, start.stats)
    step = jax.jit(lambda key, secrets, public: simulate(gan.train_step, key, secrets, public))
    error = LSB * (1 + config.learning_rate * 2 * 16 * 2 * 4)
    for number in range(1, steps + 1):
        batch = batch_of(SMALL, rng, 4)
        secrets = secure, jax.tree.map(secret, batch)
        secure, losses = step(key(number), secrets, gan.schedule(number - 1))
        state, twin_losses = twin.train_step(state, batch.images, batch.noise_d, batch.noise_g)
        got = secure_layout(revealed(secure))
        expected = in_secure_layout(SMALL, twin, state)
        assert_close(got, expected, 0, number * error)
        for field in ("real", "fake", "generator"):
            # Logits sum 32 features times weights near 1/5; softplus errs by 3 LSB.
            assert_close(
                real(getattr(losses, field)),
                np.sum(getattr(twin_losses, field)),
                0,
                4 * (3 * LSB + 32 / 5 * number * error),  # of each of four examples
            )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), secure_layout(start), expected)
    assert min(jax.tree.leaves(moved)) > 5 * steps * error
