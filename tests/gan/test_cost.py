"""LP-GAN's step costs no more than it did: rounds, bytes, comparisons and products.

The step is plain JAX: Flax networks, `jax.grad`, optax. What it costs under sharing hangs on the
rewrites of what JAX's derivatives, Flax and optax write, and so on their versions.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpgan_jax as lp
from lpgan_jax.analysis.cost import program_cost
from lpgan_jax.programs import shapes
from lpgan_jax.training import config
from lpgan_jax.training.building import build

OPTIMIZER = {
    "sgd": "{name: sgd, learning_rate: 2e-3}",
    "adam": "{name: adam, learning_rate: 1e-3}",
}
FIGURES = (
    "rounds",
    "exchanges",
    "online_bytes",
    "dealer_bytes_s2",
    "comparisons",
    "multiply_adds",
    "dealer_multiply_adds",
)
# Of a step with a batch of 16: the configuration, SG's optimizer, SD's, and FIGURES. (A protocol
# of layers that were written by hand took half as many rounds again, or more.)
COSTS = {
    ("digits", "adam", "sgd"): (112, 203, 5617128, 22405324, 265616, 17076432, 8445952),
    ("digits", "sgd", "sgd"): (101, 188, 3639608, 10978252, 79536, 17076432, 8445952),
    ("digits", "adam", "adam"): (123, 218, 5879848, 23929188, 290266, 17076432, 8445952),
    ("mnist", "sgd", "sgd"): (150, 275, 145391184, 280857196, 2391104, 6576805248, 3284402176),
    ("mnist", "adam", "adam"): (
        172, 305, 329006544, 1341935316, 19672394, 6576805248, 3284402176
    ),
}  # fmt: skip
MOST = 1.01  # times that, of all but rounds


def settings_of(name, generator, discriminator, *others):
    return config.load(
        name,
        [
            f"generator_optimizer={OPTIMIZER[generator]}",
            f"discriminator_optimizer={OPTIMIZER[discriminator]}",
            "batch_size=16",
            *others,
        ],
    )


QUICK = ("digits", "adam", "sgd")


@pytest.mark.parametrize(
    "which", [w if w == QUICK else pytest.param(w, marks=pytest.mark.slow) for w in COSTS]
)
def test_a_step_costs_no_more_than_it_did(which):
    cost = program_cost(*shapes.step_program(build(settings_of(*which))))
    before = dict(zip(FIGURES, COSTS[which], strict=True))
    ratios = {name: getattr(cost, name) / before[name] for name in FIGURES}
    print({name: round(ratio, 4) for name, ratio in ratios.items()})
    most = {name: 1.0 if name == "rounds" else MOST for name in FIGURES}
    dearer = [f"{n}: {r:.4f} times" for n, r in ratios.items() if r > most[n]]
    assert not dearer, f"dearer than before: {', '.join(dearer)}"


def test_simultaneous_updates_save_a_pass():
    """Of each network, and most of what SG's update waited for."""
    settings = settings_of("digits", "adam", "adam", "updates=simultaneous")
    cost = program_cost(*shapes.step_program(build(settings)))
    alternating = dict(zip(FIGURES, COSTS["digits", "adam", "adam"], strict=True))
    assert cost.rounds <= 82
    assert all(getattr(cost, name) < alternating[name] for name in FIGURES)


# How often each rewrite that saves something must match in a step, SG with Adam and SD with
# SGD, by the version of JAX ("": any other).
HITS = {
    "": {
        "softplus": 3,
        "logistic_of_softplus": 3,
        "logistic_of_negative": 2,
        "inverse_root_over_its_square": 4,
        "rsqrt_derivative": 4,
        "sum_around_the_mean": 4,
        "tanh_derivative": 1,
        "over_root": 1,
        "public_factors_of_a_root": 1,
        "fuse_sums": 8,
        "fuse_roots": 4,
    }
}
HITS["0.12"] = HITS[""] | {"tanh_derivative": 0}  # JAX writes it so itself

# The same of a network with Flax's own batch normalisation.
OF_FLAX = {
    "": {
        "centred_variance": 1,
        "of_a_variance": 1,
        "no_variance": 1,
        "derivative_of_variance": 1,
        "inverse_root_over_its_square": 1,
        "rsqrt_derivative": 1,
        "fuse_sums": 2,
        "fuse_roots": 1,
    }
}
OF_FLAX["0.12"] = OF_FLAX[""] | {"no_variance": 2}  # whether it is 0, and whether it is more


def assert_hits(program, wanted):
    version = ".".join(jax.__version__.split(".")[:2])
    expected = wanted.get(version, wanted[""])
    missed = [
        f"{name} matches {program.hits.get(name, 0)} times, expected {count}"
        for name, count in expected.items()
        if program.hits.get(name, 0) != count
    ]
    assert not missed, (
        f"{'; '.join(missed)}. What these rewrites look for may be written otherwise in JAX "
        f"{jax.__version__}: see their docstrings in transform/rewrites.py; if the cost is the "
        f"same, enter the counts for {version} here."
    )


def test_every_rewrite_matches_in_a_step():
    gan = build(settings_of(*QUICK))
    batch = gan.batch
    state = gan.program.init(np.random.default_rng(0))
    step = lp.secure(gan.program.step, carry={0: 0}, frac_bits=gan.frac_bits)
    assert_hits(step.program(state, batch), HITS)


def normalised(fast):
    """The gradient of a network with a batch normalisation; its arguments."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(5, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=False, use_fast_variance=fast)(x)
            return nn.Dense(1)(nn.relu(x))

    module, x = Network(), np.random.default_rng(0).normal(size=(16, 3))
    variables = module.init(jax.random.key(0), jnp.asarray(x, jnp.float32))

    def gradient(variables, x):
        def loss(params):
            y, updated = module.apply({**variables, "params": params}, x, mutable="batch_stats")
            return (y**2).sum(), updated

        return jax.grad(loss, has_aux=True)(variables["params"])

    return gradient, (variables, x)


def test_flax_normalises_as_cheaply_by_default():
    """Its variance is E[x^2] - E[x]^2 then, of which the uncentred values would be opened too."""
    costs = []
    for fast in (False, True):
        gradient, args = normalised(fast)
        step = lp.secure(gradient)
        costs.append(lp.cost(step, *args))
        if fast:
            assert_hits(step.program(*args), OF_FLAX)
    assert costs[1] == costs[0]
