"""From configurations, and networks of one's own, to GANs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpgan_jax as lp
from lpgan_jax.analysis.cost import program_cost
from lpgan_jax.programs import shapes
from lpgan_jax.training import config
from lpgan_jax.training.building import build, imported, optimizer

MODULE = """
import dataclasses
import flax.linen as nn
import jax.numpy as jnp


class G(nn.Module):
    @nn.compact
    def __call__(self, noise):
        return jnp.tanh(nn.Dense(64)(noise)).reshape(-1, 8, 8, 1)


class D(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(1)(images.reshape(images.shape[0], -1))


@dataclasses.dataclass
class Networks:
    generator: nn.Module = dataclasses.field(default_factory=G)
    discriminator: nn.Module = dataclasses.field(default_factory=D)


class Half:
    generator = G()
"""


class OwnGenerator(nn.Module):
    @nn.compact
    def __call__(self, noise):
        x = nn.relu(nn.Dense(8)(noise))
        return jnp.tanh(nn.Dense(64)(x)).reshape(-1, 8, 8, 1)


class OwnDiscriminator(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Dense(6)(images.reshape(images.shape[0], -1)))
        return nn.Dense(1)(x)


TINY = ["data.image_size=8", "model.noise_size=4", "batch_size=4", "steps=2", "num_samples=4"]


def test_a_rate_falls_to_its_share_over_all_updates():
    private = ["privacy.noise_multiplier=1", "privacy.delta=1e-3", "privacy.clip=1"]
    options = ["discriminator_optimizer.name=sgd", "discriminator_optimizer.learning_rate=1"]
    options += [*private, "privacy.discriminator_steps=2", "model.norm=none"]
    falling = "discriminator_optimizer.final_rate=0.25"
    settings = config.load("digits", [*TINY, *options, falling])
    assert settings.discriminator_updates == 4
    rule = optimizer(settings.discriminator_optimizer, settings.discriminator_updates)
    state, rates = rule.init(jnp.zeros(())), []
    for _ in range(6):
        update, state = rule.update(jnp.ones(()), state)
        rates.append(-float(update))
    assert rates == [1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25]
    same = config.load("digits", [*TINY, *options])
    assert build(same) is build(same.model_copy(update={"seed": 5}))


@pytest.fixture
def my_nets(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def images():
    return np.random.default_rng(0).uniform(-1, 1, (16, 8, 8)).astype(np.float32)


def test_the_same_program_is_built_once():
    settings = config.load("digits", TINY)
    assert build(settings) is build(settings.model_copy(update={"seed": 5, "steps": 9}))


@pytest.mark.parametrize("mode", ["plaintext", pytest.param("secure", marks=pytest.mark.slow)])
def test_ones_own_networks_are_trained(tmp_path, mode):
    result = lp.train(
        config.load("digits", TINY),
        tmp_path / "run",
        seed=0,
        mode=mode,
        images=images(),
        generator=OwnGenerator(),
        discriminator=OwnDiscriminator(),
        report=lambda text: None,
    )
    # Nearly as unsure as at the start: both losses are those of a logit near 0.
    assert abs(result.last["loss_g"] - np.log(2)) < 0.3
    assert (tmp_path / "run" / "samples").is_dir()


def test_the_configuration_names_them(my_nets):
    settings = config.load("digits", [*TINY, "model.module=my_nets:Networks"])
    assert program_cost(*shapes.step_program(build(settings))).rounds > 10
    parameters = sum(x.size for x in jax.tree.leaves(build(settings).shapes.params))
    assert parameters == 4 * 64 + 64 + 64 + 1


def test_what_is_not_there_is_named(my_nets):
    with pytest.raises(config.ConfigError, match=r"model\.module: 'no_such:Thing' given"):
        imported("no_such:Thing")
    with pytest.raises(config.ConfigError, match="module 'my_nets' has no attribute 'Nothing'"):
        imported("my_nets:Nothing")
    with pytest.raises(config.ConfigError, match="expected a Flax module as its discriminator"):
        imported("my_nets:Half")
    with pytest.raises(config.ConfigError, match=r"model.module: .* expected a text such as"):
        config.load("digits", ["model.module=os.system"])


def test_a_gradient_penalty_needs_no_batch_statistics():
    with pytest.raises(config.ConfigError, match="norm: group or none"):
        config.load("digits", ["model.loss=wasserstein"])
    settings = config.load("digits", [*TINY, "model.loss=wasserstein", "model.norm=group"])
    assert build(settings).batch.mix.shape == (4,)
