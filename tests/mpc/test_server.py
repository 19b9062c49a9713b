"""The program that S1 and S2 run: a training step, and a server of several devices."""

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
from servers import QUICKLY, Again, dealt, run_servers, server_program

import lpgan_jax as lp
from lpgan_jax.analysis.cost import program_cost
from lpgan_jax.mpc import party
from lpgan_jax.mpc.exchange import ROUND
from lpgan_jax.mpc.server import BATCH_AXIS, server_mesh
from lpgan_jax.mpc.share_trees import share_tree

# What a server may send: a value under a fresh mask, bits likewise, or a bit under a random bit.
OPENINGS = {"mask", "and", "bit"}


@pytest.fixture(scope="module")
def gan():
    return small_gan({"generator": SGD, "discriminator": adam()}, depth=1)


@pytest.fixture(scope="module")
def inputs(gan):
    rng = np.random.default_rng(0)
    state = share_tree(lp.key(1), gan.init(rng), gan.scales)
    return state, shared_batch(gan, random_batch(gan, rng))


@pytest.fixture(scope="module")
def deployed(gan, inputs):
    """(the program, compiled, names of its exchanges)."""
    names: list[str] = []

    def step(seat, secrets, public):
        outputs = gan.train_step(seat, secrets, public)
        if seat._deployed is not None:
            names[:] = [message.name for message in seat.messages]
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        _forbid_plaintext(patch)
        program = server_program(step, inputs, gan.schedule(0))
    return program, program.compile(options=QUICKLY), names


def _forbid_plaintext(patch):
    """Fail if an online party ever holds what only the dealer may know."""

    def checked(method):
        @functools.wraps(method)
        def wrapper(self, *args, **kwargs):
            made = method(self, *args, **kwargs)
            if self._deployed is None:  # DS
                return made
            for value in made if isinstance(made, tuple) else (made,):
                assert value.plain is None
            return made

        return wrapper

    for name in ("mask", "correlate", "compute", "settle"):
        patch.setattr(party.Party, name, checked(getattr(party.Party, name)))


def simulation(function):
    return jax.jit(functools.partial(party.simulate, function), compiler_options=QUICKLY)


def test_the_deployed_step_is_bit_identical_to_the_simulated_one(gan, inputs, deployed):
    program, compiled, names = deployed
    key, public = lp.key(3), gan.schedule(0)
    simulated = simulation(gan.train_step)(key, inputs, public)
    corrections = dealt(gan.train_step, key, inputs, public)
    outputs, lines = run_servers(program, compiled, key, corrections, inputs, public)
    jax.tree.map(np.testing.assert_array_equal, simulated, outputs)
    cost = program_cost(gan.train_step, inputs, public)
    for line in lines:
        assert (len(line.sizes), sum(line.sizes)) == (cost.rounds, cost.online_bytes)
    assert len(names) == cost.exchanges


def test_every_exchange_is_a_masked_opening_in_the_traced_program(deployed):
    program, _, names = deployed
    assert {name.rsplit("/", 1)[-1] for name in names} == OPENINGS
    sent = [m.name for level, times in program.plan.rounds() for m in level.messages * times]
    assert sorted(sent) == sorted(names)


def test_the_compiled_program_sends_nothing_else(deployed):
    program, compiled, _ = deployed
    text = compiled.as_text()
    assert not re.search(r" (all-|reduce-scatter|collective-|send|recv|infeed|outfeed)", text)
    calls = re.findall(f'custom_call_target="{ROUND}"', text)
    assert len(calls) == program.plan.count


def test_an_online_program_holds_no_large_constants(deployed):
    """Keys, shares and corrections are arguments; a constant would land in the cache."""
    program, _, _ = deployed
    assert all(np.size(constant) <= 64 for constant in program.plan.constants.values())


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
    """(the program for two devices, compiled, its simulated and its own outputs)."""
    mesh, key = server_mesh(2), lp.key(6)
    function, *secrets = layers
    secrets = tuple(secrets)
    program = server_program(function, secrets, [], mesh)
    whole, shared = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (BATCH_AXIS,)))
    words, corrections, (variables, *values), public = program.shapes
    placed = (
        *_placed(whole, (jax.ShapeDtypeStruct((2,), jnp.uint32), words, corrections)),
        (_placed(whole, variables), *_placed(shared, values)),
        public,
    )
    compiled = program.jitted(options=QUICKLY).lower(*placed).compile()

    def run(*arguments):
        shardings = compiled.input_shardings[0]
        return compiled(*jax.tree.map(jax.device_put, arguments, shardings))

    corrections = dealt(function, key, secrets, [])
    alone = server_program(function, secrets, [])
    _, lines = run_servers(alone, alone.compile(options=QUICKLY), key, corrections, secrets, [])
    # Both at once would wait for each other's turn on the devices of this process.
    again = Again(*lines), Again(*reversed(lines))
    outputs, _ = run_servers(program, run, key, corrections, secrets, [], again, in_turn=True)
    return program, compiled, outputs, simulation(function)(key, secrets, [])


def _placed(sharding, tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def test_two_devices_a_server_give_the_same_words(spread):
    _, compiled, outputs, simulated = spread
    jax.tree.map(np.testing.assert_array_equal, simulated, outputs)
    assert len(jax.tree.leaves(compiled.input_shardings)[0].device_set) == 2


def test_the_work_is_shared_and_the_line_is_the_first_ones(spread):
    """Collectives are between the devices of this one server; the call is in a branch."""
    program, compiled, _, _ = spread
    text = compiled.as_text()
    assert re.search(r" (all|reduce-scatter|collective)-[\w-]+\(", text)  # of these two alone
    assert "num_partitions=2" in text
    assert len(re.findall(f'custom_call_target="{ROUND}"', text)) == program.plan.count
    assert text.count("conditional(") >= program.plan.count


def test_as_many_devices_as_there_are():
    with pytest.raises(ValueError, match=r"devices: 99 of a server, expected 1 to \d+"):
        server_mesh(99)
