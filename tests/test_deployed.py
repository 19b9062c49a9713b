"""The training step on two devices, one a server: the program that S1 and S2 will run."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lpgan_jax as lp
from lpgan_jax import optim, party
from lpgan_jax.gan import LPGAN, Batch
from lpgan_jax.models.dcgan import DCGAN
from lpgan_jax.simulation import share_state, share_tree

BATCH = 2
# What a server may send: a value under a fresh mask, bits likewise, or a bit under a random bit.
OPENINGS = {"mask", "and", "bit"}
SHARDED, REPLICATED = PartitionSpec(party.AXIS), PartitionSpec()


@pytest.fixture(scope="module")
def gan():
    model = DCGAN(channels=1, noise_size=3, features=2, base_size=2, depth=2)
    optimizers = {
        "generator": optim.sgd(2e-3, BATCH, 18),
        "discriminator": optim.adam(1e-3, BATCH, 18),
    }
    return LPGAN(model, optimizers)


@pytest.fixture(scope="module")
def inputs(gan):
    rng = np.random.default_rng(0)
    state = share_state(gan, lp.key(1), gan.init(rng))
    images = rng.uniform(-1, 1, (BATCH, *gan.model.image_shape))
    batch = Batch(images, rng.normal(size=(BATCH, 3)), rng.normal(size=(BATCH, 3)))
    return state, share_tree(lp.key(2), batch, jax.tree.map(lambda _: 18, batch))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2,), (party.AXIS,), devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def deployed(gan, inputs, mesh):
    """(compiled program, its traced form, its inputs, names of the messages it sends)."""
    key, public = lp.key(3), gan.schedule(0)
    corrections = jax.jit(functools.partial(party.deal, gan.train_step))(key, inputs, public)
    dealt = party.Material(party.server_seeds(key), corrections)
    seeds, corrections = dealt.take()
    with pytest.raises(RuntimeError, match="used before"):
        dealt.take()
    # S1 has no use for corrections: it gets zeros.
    material = [jnp.stack([jnp.zeros_like(c), c]) for c in corrections]
    names: list[str] = []

    def server(seed, material, secrets, public):
        mine = jax.tree.map(lambda x: x[0], (seed, material, secrets))

        def step(seat, secrets, public):
            outputs = gan.train_step(seat, secrets, public)
            names[:] = [message.name for message in seat.messages]
            return outputs

        outputs = party.online(step, *mine, public)
        return jax.tree.map(lambda x: x[None], outputs)

    program = jax.jit(
        jax.shard_map(
            server,
            mesh=mesh,
            in_specs=(SHARDED, SHARDED, SHARDED, REPLICATED),
            out_specs=SHARDED,
        )
    )
    placed = jax.device_put((seeds, material, inputs), NamedSharding(mesh, SHARDED))
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


def test_the_deployed_step_is_bit_identical_to_the_simulated_one(gan, inputs, deployed):
    program, _, arguments, _ = deployed
    simulated = jax.jit(functools.partial(party.simulate, gan.train_step))(
        lp.key(3), inputs, gan.schedule(0)
    )
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
