"""The training step on two devices, one a server: the program that S1 and S2 will run."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gans import SGD, adam, random_batch, shared_batch, small_gan
from helpers import same_scale
from jax.sharding import NamedSharding, PartitionSpec

import lpgan_jax as lp
from lpgan_jax.mpc import party
from lpgan_jax.mpc.mesh import BATCH_AXIS, server_mesh, server_program, whole_sharding
from lpgan_jax.mpc.party import AXIS
from lpgan_jax.mpc.share_trees import share_tree

# What a server may send: a value under a fresh mask, bits likewise, or a bit under a random bit.
OPENINGS = {"mask", "and", "bit"}
QUICKLY = {"xla_backend_optimization_level": "0"}


@pytest.fixture(scope="module")
def gan():
    return small_gan({"generator": SGD, "discriminator": adam()}, depth=1)


@pytest.fixture(scope="module")
def inputs(gan):
    rng = np.random.default_rng(0)
    state = share_tree(lp.key(1), gan.init(rng), gan.scales)
    return state, shared_batch(gan, random_batch(gan, rng))


@pytest.fixture(scope="module")
def mesh():
    return server_mesh()


@pytest.fixture(scope="module")
def deployed(gan, inputs, mesh):
    """(compiled program, its traced form, its inputs, names of the messages it sends)."""
    key, public = lp.key(3), gan.schedule(0)
    dealing = functools.partial(party.deal, gan.train_step)
    corrections = jax.jit(dealing, compiler_options=QUICKLY)(key, inputs, public)
    seeds = jax.random.key_data(party.server_seeds(key))
    # S1 has no use for corrections: it gets zeros.
    material = [jnp.stack([jnp.zeros_like(c), c]) for c in corrections]
    names: list[str] = []

    def step(seat, secrets, public):
        outputs = gan.train_step(seat, secrets, public)
        names[:] = [message.name for message in seat.messages]
        return outputs

    program = server_program(step, mesh, compiler_options=QUICKLY)
    placed = jax.device_put((seeds, material, inputs), whole_sharding(mesh))
    arguments = (*placed, public)
    with pytest.MonkeyPatch.context() as patch:
        _forbid_plaintext(patch)
        traced = program.trace(*arguments)
    return traced.lower().compile(), traced, arguments, names


def _forbid_plaintext(patch):
    """Fail if an online party ever holds what only the dealer may know."""

    def checked(method):
        @functools.wraps(method)
        def wrapper(self, *args, **kwargs):
            dealt = method(self, *args, **kwargs)
            for value in dealt if isinstance(dealt, tuple) else (dealt,):
                assert value.plain is None
            return dealt

        return wrapper

    for name in ("mask", "correlate", "compute", "settle"):
        patch.setattr(party.Party, name, checked(getattr(party.Party, name)))


def simulation(function):
    return jax.jit(functools.partial(party.simulate, function), compiler_options=QUICKLY)


def test_the_deployed_step_is_bit_identical_to_the_simulated_one(gan, inputs, deployed):
    program, _, arguments, _ = deployed
    simulated = simulation(gan.train_step)(lp.key(3), inputs, gan.schedule(0))
    jax.tree.map(np.testing.assert_array_equal, simulated, program(*arguments))


def test_every_exchange_is_a_masked_opening_in_the_traced_program(deployed):
    _, traced, _, names = deployed
    assert {name.rsplit("/", 1)[-1] for name in names} == OPENINGS
    counts = _primitives(traced.jaxpr.jaxpr)
    assert counts["ppermute"] == len(names)
    assert not counts.keys() & {"psum", "psum_invariant", "all_gather", "all_to_all", "pmax"}


def test_the_compiled_program_sends_nothing_else(deployed):
    program, _, _, names = deployed
    text = program.as_text()
    collectives = re.findall(
        r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+|send|recv)(?:-start)?\(",
        text,
    )
    assert set(collectives) == {"collective-permute"}
    assert len(collectives) <= len(names)  # XLA may drop what nobody uses, and add nothing


def test_an_online_program_holds_no_large_constants(deployed):
    """Keys, shares and corrections are arguments; a constant would land in the cache."""
    _, traced, _, _ = deployed
    assert all(np.size(constant) <= 64 for constant in traced.jaxpr.consts)


def _primitives(jaxpr):
    counts: dict[str, int] = {}
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] = counts.get(equation.primitive.name, 0) + 1
        for sub in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns"),
        ):
            inner = getattr(sub, "jaxpr", sub)
            if hasattr(inner, "eqns"):
                for name, count in _primitives(inner).items():
                    counts[name] = counts.get(name, 0) + count
    return counts


# Several devices a server ------------------------------------------------------------------------


class Layers(nn.Module):
    """A convolution, its normalisation and its activation."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (4, 4), (2, 2), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        return jnp.where(x > 0, x, 0.2 * x)


def _forth_and_back(variables, x, dy):
    def forward(params, x):
        return Layers().apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    y, vjp = jax.vjp(forward, variables["params"], x)
    return y, vjp(dy)


@pytest.fixture(scope="module")
def layers():
    """(the program, inputs that devices have whole, those that they share)."""
    rng = np.random.default_rng(3)
    x, dy = rng.normal(size=(4, 8, 8, 2)), rng.normal(size=(4, 4, 4, 4))
    variables = Layers().init(jax.random.key(0), jnp.asarray(x, jnp.float32))
    program = lp.secure(_forth_and_back).program(variables, x, dy)
    shared = [
        share_tree(lp.key(4 + n), value, same_scale(value, 18))
        for n, value in enumerate((variables, x, dy))
    ]
    return program, *shared


@pytest.fixture(scope="module")
def spread(layers):
    """(compiled program for two devices a server, its inputs)."""
    mesh = server_mesh(per_server=2)
    key = lp.key(6)
    program, variables, *values = layers
    dealing = functools.partial(party.deal, program)
    secrets = (variables, *values)
    corrections = jax.jit(dealing, compiler_options=QUICKLY)(key, secrets, [])
    material = [jnp.stack([jnp.zeros_like(c), c]) for c in corrections]
    whole, shared = whole_sharding(mesh), NamedSharding(mesh, PartitionSpec(AXIS, BATCH_AXIS))
    placed = (
        *jax.device_put((jax.random.key_data(party.server_seeds(key)), material), whole),
        (jax.device_put(variables, whole), *jax.device_put(values, shared)),
        [],
    )
    return server_program(program, mesh, compiler_options=QUICKLY).lower(*placed).compile(), placed


def test_two_devices_a_server_give_the_same_words(layers, spread):
    compiled, placed = spread
    outputs = compiled(*placed)
    program, *secrets = layers
    simulated = simulation(program)(lp.key(6), tuple(secrets), [])
    jax.tree.map(np.testing.assert_array_equal, simulated, outputs)
    assert len(outputs[0].share.sharding.device_set) == 4


def test_nothing_leaves_a_servers_devices_but_exchanges(spread):
    """A collective is an exchange between counterparts, or stays in a server's row of the mesh."""
    text = spread[0].as_text()
    rows, exchanges = 0, 0
    for line in text.splitlines():
        if not re.search(r" (all|reduce-scatter|collective|ragged)-[\w-]+\(", line):
            continue
        pairs = re.search(r"source_target_pairs={([^ ]*)}", line)
        if pairs and "exchange:" in line:
            assert pairs[1] == "{0,2},{2,0},{1,3},{3,1}", line
            exchanges += 1
            continue
        groups = re.search(r"replica_groups=([^ ]*)", line)
        found = pairs[1] if pairs else groups[1]
        assert set(re.findall(r"{(\d),(\d)}", found)) <= {
            ("0", "1"),
            ("1", "0"),
            ("2", "3"),
            ("3", "2"),
        } or (found.startswith("[2,2]<=[4]") and "T" not in found), line
        rows += 1
    assert rows
    assert exchanges
