"""Exchanges that do not depend on each other travel as one message, and nothing else changes."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from servers import QUICKLY, dealt, halves, run_servers, server_program

import lpgan_jax as lp
from lpgan_jax.analysis.cost import program_cost
from lpgan_jax.mpc import exchange
from lpgan_jax.mpc.exchange import exchange_p
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.rounds import planned
from lpgan_jax.mpc.server import ServerProgram

WORDS = st.lists(st.integers(0, 10**6), min_size=2, max_size=2)


def shares(count, shape=(3,)):
    rng = np.random.default_rng(count)
    return [jnp.asarray(rng.integers(0, 2**64, (2, *shape), np.uint64)) for _ in range(count)]


@st.composite
def graphs(draw):
    """Operations: (kind, operands), operands being numbers of inputs and earlier operations."""
    operations = []
    for number in range(2, 2 + draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["open", "open", "open", "add", "scan"]))
        operands = draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=2))
        operations.append((kind, operands, draw(st.integers(1, 3))))
    return operations


def opened(seat, x):
    """Something that takes an exchange: x - mask, opened, plus a share of the mask."""
    mask = seat.mask(x.shape)
    return seat.public_share(seat.open(x - mask.share, "mask")) + mask.share


def program_of(operations):
    def function(seat, inputs, _):
        values = list(inputs)
        for kind, operands, length in operations:
            x = sum(values[n] for n in operands[1:]) + values[operands[0]]
            if kind == "open":
                values.append(opened(seat, x))
            elif kind == "scan":

                def body(seat, carry, row):
                    return opened(seat, carry) + opened(seat, row), opened(seat, row)

                carry, rows = seat.scan(body, x, jnp.stack([x] * length), length)
                values.append(carry + rows.sum(0))
            else:
                values.append(x)
        return values[-1], values[len(values) // 2]

    return function


def expected_rounds(operations):
    """By hand: an operation's level is that of its latest operand, and what is opened is beyond."""
    levels, rounds, loops = [0, 0], set(), 0
    for kind, operands, length in operations:
        level = max(levels[n] for n in operands)
        if kind == "open":
            rounds.add(level)
        if kind == "scan":
            loops += length  # in the body, all three depend on the same
        levels.append(level + (kind != "add"))
    return len(rounds) + loops


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_any_program_gives_the_same_words_in_as_many_messages_as_it_has_levels(operations):
    function, inputs, key = program_of(operations), shares(2), lp.key(5)
    program = server_program(function, inputs)
    rounds = expected_rounds(operations)
    assert program.plan.count == program_cost(function, inputs).rounds == rounds
    simulated = jax.jit(lambda: simulate(function, key, inputs), compiler_options=QUICKLY)()
    corrections = dealt(function, key, inputs, None)
    run = program.compile(options=QUICKLY)
    outputs, lines = run_servers(program, run, key, corrections, inputs)
    jax.tree.map(np.testing.assert_array_equal, simulated, outputs)
    openings = sum(1 if kind == "open" else 3 * n for kind, _, n in operations if kind != "add")
    for line in lines:
        assert len(line.sizes) == rounds
        assert sum(line.sizes) == openings * 3 * 8


@pytest.mark.parametrize("by_ffi", [True, False])
def test_parts_of_a_message_keep_their_shapes_and_types(monkeypatch, by_ffi):
    """Also where XLA's interface is another one, so that the call is JAX's callback."""
    assert exchange._on_cpu()
    monkeypatch.setattr(exchange, "_on_cpu", lambda: by_ffi)

    def function(seat, inputs, _):
        wide, bits = inputs
        mask = seat.mask(bits.shape, jnp.uint8, bitwise=True)
        packed = seat.open_bits(bits ^ mask.share, "and")
        return opened(seat, wide), packed, opened(seat, wide[:0]), opened(seat, wide[1, 2])

    inputs = [*shares(1, (2, 3)), jnp.asarray([[1, 2, 255], [7, 0, 9]], jnp.uint8)]
    program, key = server_program(function, inputs), lp.key(1)
    ((level, times),) = program.plan.rounds()
    assert times == 1
    assert [(m.name, m.shape, m.dtype) for m in level.messages] == [
        ("and", (3,), np.uint8),
        ("mask", (2, 3), np.uint64),
        ("mask", (0, 3), np.uint64),
        ("mask", (), np.uint64),
    ]
    run = program.compile(options=QUICKLY)
    assert (exchange.ROUND in run.as_text()) == by_ffi
    outputs, lines = run_servers(program, run, key, [], inputs)
    simulated = simulate(function, key, inputs)
    jax.tree.map(np.testing.assert_array_equal, simulated, outputs)
    assert lines[0].sizes == [3 + 6 * 8 + 8]


def test_a_digest_tells_programs_apart():
    def chain(seat, inputs, _):
        return opened(seat, opened(seat, inputs[0])), inputs[1]

    def side_by_side(seat, inputs, _):
        return [opened(seat, x) for x in inputs]

    inputs = shares(2)
    one, other = (server_program(f, inputs).plan for f in (chain, side_by_side))
    assert one.digest != other.digest
    assert one.digest == server_program(chain, inputs).plan.digest
    assert server_program(chain, shares(2, (4,))).plan.digest != one.digest


def test_what_is_exchanged_in_a_branch_is_refused():
    def function(seat, x, flag):
        return jax.lax.cond(flag, lambda v: exchange_p.bind(v), lambda v: v, x)

    def marked(seat, x, flag):
        send = seat.marked("exchange", "leak", exchange_p.bind)
        return jax.lax.cond(flag, send, lambda v: v, x)

    inputs, flag = shares(1)[0], jnp.asarray(True)
    program = ServerProgram(marked, halves(inputs)[0], flag)
    with pytest.raises(ValueError, match="cond: something is exchanged in it"):
        program.lower()
    # And what is exchanged without a mark has no code.
    with pytest.raises(NotImplementedError):
        ServerProgram(function, halves(inputs)[0], flag).lower()


def test_an_exchange_does_nothing_but_send():
    def function(seat, x, _):
        return seat.marked("exchange", "leak", lambda v: exchange_p.bind(v) + v)(x)

    program = ServerProgram(function, halves(shares(1)[0])[0])
    with pytest.raises(ValueError, match="leak is no plain exchange between the two servers"):
        program.lower()


def test_what_is_exchanged_an_unknown_number_of_times_is_refused():
    def function(seat, x, _):
        send = seat.marked("exchange", "leak", exchange_p.bind)
        return jax.lax.while_loop(lambda v: v[0] > 0, send, x)

    with pytest.raises(ValueError, match="while: a protocol runs inside it"):
        ServerProgram(function, halves(shares(1)[0])[0])


def test_calls_of_one_function_have_values_of_their_own():
    """JAX has one program for all calls of a jitted function: each has its own messages."""

    def function(seat, inputs, _):
        marked = seat.marked("exchange", "words", exchange_p.bind)
        send = jax.jit(lambda x: marked(x))
        return [send(x) for x in inputs] if seat._deployed is not None else inputs

    inputs = shares(3)
    program = ServerProgram(function, halves(inputs)[0])
    ((level, _),) = program.plan.rounds()
    assert len(level.messages) == 3
    outputs, _ = run_servers(program, program.compile(options=QUICKLY), lp.key(0), [], inputs)
    for sent, received in zip(inputs, outputs, strict=True):
        np.testing.assert_array_equal(received, sent[::-1])


def test_a_plan_is_of_a_trace():
    closed = jax.make_jaxpr(lambda x: x + 1)(jnp.arange(3))
    token, (result,) = planned(closed).run(None, "token", [jnp.arange(3)])
    assert token == "token"
    np.testing.assert_array_equal(result, [1, 2, 3])
    assert list(planned(closed).rounds()) == []
