"""The cost model: by hand, by its own laws, and against bytes counted on a line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import real, secret
from servers import QUICKLY, dealt, run_servers, server_program

import lpgan_jax as lp
from lpgan_jax import cli
from lpgan_jax import protocols as P
from lpgan_jax.analysis import audit
from lpgan_jax.analysis.cost import LAN, UNPLACED, WAN, Cost, Network, program_cost
from lpgan_jax.common.tables import si
from lpgan_jax.mpc import arithmetic, boolean, compare
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.share_trees import shapes_of
from lpgan_jax.ring import matmul

FXP = lp.FixedPoint(18)
SEED = 32  # bytes
ADDITIVE = (
    "exchanges",
    "online_bytes",
    "dealer_bytes_s1",
    "dealer_bytes_s2",
    "input_bytes",
    "multiply_adds",
    "dealer_multiply_adds",
    "comparisons",
)


def mul(key, x, y):
    return P.sec_mul(key, x, y, FXP)


def paired(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.uint64)


def numbers(cost: Cost):
    return {name: getattr(cost, name) for name in ("rounds", *ADDITIVE)}


# By hand ------------------------------------------------------------------------------------------


def test_a_product_opens_both_factors_and_then_its_truncation():
    cost = lp.cost(mul, (64, 10), (64, 10))
    n = 640
    assert numbers(cost) == {
        "rounds": 2,
        "exchanges": 3,
        "online_bytes": 3 * 8 * n,
        "dealer_bytes_s1": SEED,
        "dealer_bytes_s2": SEED
        + 12 * n,  # a word and a half to truncate (the product of masks is owed)
        "input_bytes": 0,
        "multiply_adds": 0,
        "dealer_multiply_adds": 0,
        "comparisons": 0,
    }
    assert list(cost.layers) == [UNPLACED]


def test_a_square_opens_one_word_less():
    cost = lp.cost(lambda key, x: P.sec_square(key, x, FXP), (7,))
    assert (cost.rounds, cost.exchanges, cost.online_bytes) == (2, 2, 2 * 8 * 7)
    assert cost.dealer_bytes_s2 == SEED + 12 * 7


def test_a_matrix_product_opens_matrices_and_multiplies_twice_at_each_server():
    m, k, n = 3, 5, 4
    cost = lp.cost(lambda key, x, y: P.sec_matmul(key, x, y, FXP), (m, k), (k, n))
    assert (cost.rounds, cost.exchanges) == (2, 3)
    assert cost.online_bytes == 8 * (m * k + k * n + m * n)
    assert cost.dealer_bytes_s2 == SEED + 12 * m * n
    assert cost.multiply_adds == 2 * m * k * n  # e [b] and [a] d
    assert cost.dealer_multiply_adds == m * k * n


def test_a_convolution_multiplies_by_the_kernel_at_every_output():
    cost = lp.cost(lambda key, x, w: P.sec_conv(key, x, w, FXP), (2, 8, 8, 3), (4, 4, 3, 5))
    image, kernel, out = 2 * 8 * 8 * 3, 4 * 4 * 3 * 5, 2 * 4 * 4 * 5
    assert cost.online_bytes == 8 * (image + kernel + out)
    assert cost.dealer_multiply_adds == out * 4 * 4 * 3
    assert cost.multiply_adds == 2 * out * 4 * 4 * 3


def relu(seat, x):
    x = arithmetic.masked(seat, x)
    return compare.select(seat, compare.positive(seat, x), x)


def test_a_relu_opens_its_argument_and_the_bits_of_a_carry_tree():
    n = 64 * 5

    def function(key, x):
        return simulate(lambda seat, s, _: relu(seat, s), key, Secret(x, 18)).share

    cost = lp.cost(function, (n,))
    assert cost.rounds == 4  # the argument, two levels of the tree, the bit
    assert cost.exchanges == 4
    # 28 and 7 bits in the tree (16 nodes of four bits each, then 4), and the bit itself
    assert cost.online_bytes == 8 * n + (28 + 6 + 1) * n // 8
    assert cost.comparisons == n


@pytest.mark.parametrize(("bits", "dealt"), [(27, 123 + 83), (64, 233 + 103), (5, 5 + 11)])
def test_a_carry_tree_is_dealt_what_it_uses(bits, dealt):
    """Its bits, their products in leaves of almost one length, and those of a node."""
    n = 64 * 5

    def function(key, x):
        def sign(seat, s, _):
            return boolean.sign_bit(seat, arithmetic.masked(seat, s), bits=bits)

        return simulate(sign, key, Secret(x, 18))

    assert lp.cost(function, (n,)).dealer_bytes_s2 == SEED + dealt * n // 8


def test_a_truncation():
    cost = lp.cost(lambda key, x: P.truncate(key, x, 3), (10,))
    assert (cost.rounds, cost.online_bytes, cost.dealer_bytes_s2) == (1, 80, SEED + 120)


def test_a_local_operation_is_free():
    assert numbers(lp.cost(lambda key, x, y: P.sec_add(x, y), (3,), (3,))) == numbers(Cost())


def test_elements_of_other_types_count_their_own_bytes():
    def xor(key, bits):
        def seat(p, bits, _):
            mask = p.mask(bits.shape, bits.dtype, bitwise=True)
            return p.open_bits(bits ^ mask.share, "bits")

        return simulate(seat, key, bits)

    cost = lp.cost(xor, jax.ShapeDtypeStruct((2, 8), jnp.uint8))
    assert (cost.rounds, cost.online_bytes, cost.dealer_bytes_s2) == (1, 8, SEED)


# Laws ---------------------------------------------------------------------------------------------


def two(chained):
    def function(key, x, y):
        first, second = jax.random.split(key)
        product = mul(first, x, y)
        return mul(second, product if chained else x, y), product

    return function


@pytest.mark.parametrize("chained", [False, True])
def test_rounds_add_up_only_along_a_chain(chained):
    once, twice = lp.cost(mul, (5,), (5,)), lp.cost(two(chained), (5,), (5,))
    assert twice.rounds == once.rounds * (2 if chained else 1)
    for name in ADDITIVE:
        assert getattr(twice, name) == 2 * getattr(once, name)


def test_rounds_count_exchanges_that_nobody_waits_for():
    def function(key, x, y):
        first, second = jax.random.split(key)
        mul(first, mul(second, x, y), y)
        return x

    assert lp.cost(function, (5,), (5,)).rounds == 4


def test_a_call_joins_only_what_depends_on_each_other():
    @jax.jit
    def both(key, x, y, fresh):
        first, second = jax.random.split(key)
        return mul(first, x, y), mul(second, fresh, fresh)

    def function(key, x, y):
        first, second, third = jax.random.split(key, 3)
        _, independent = both(first, mul(second, x, y), y, x)
        return mul(third, independent, y)

    assert lp.cost(function, (5,), (5,)).rounds == 4


def test_vmap_over_keys_multiplies_volume_and_no_rounds():
    def products(key, x, y):
        return P.sec_matmul(key, x, y, FXP)

    def function(key, x, y):
        return jax.vmap(products, in_axes=(0, 1, 0))(jax.random.split(key, 3), x, y)

    once = lp.cost(products, (4, 5), (5, 2))
    many = lp.cost(function, paired(2, 3, 4, 5), paired(3, 2, 5, 2))
    assert (many.rounds, many.exchanges) == (once.rounds, once.exchanges)
    for name in ADDITIVE[1:]:
        assert getattr(many, name) == 3 * getattr(once, name)


@pytest.mark.parametrize("length", [0, 1, 6])
def test_scan_multiplies_everything(length):
    def function(key, x, y):
        def body(product, key):
            return mul(key, product, y), None

        return jax.lax.scan(body, x, jax.random.split(key, length))[0]

    once, many = lp.cost(mul, (5,), (5,)), lp.cost(function, (5,), (5,))
    for name in ("rounds", *ADDITIVE):
        assert getattr(many, name) == length * getattr(once, name)


def test_a_scan_starts_after_its_inputs_and_nests():
    def function(key, x, y):
        outer, inner = jax.random.split(key)

        def body(product, key):
            def innermost(product, key):
                return mul(key, product, y), product

            return jax.lax.scan(innermost, product, jax.random.split(key, 3))[0], None

        return jax.lax.scan(body, mul(outer, x, y), jax.random.split(inner, 2))[0]

    cost = lp.cost(function, (5,), (5,))
    assert cost.rounds == 2 * (1 + 3 * 2)
    assert cost.exchanges == 3 * (1 + 3 * 2)


def test_jit_and_remat_change_nothing():
    plain = lp.cost(two(True), (5,), (5,))
    assert lp.cost(jax.jit(two(True)), (5,), (5,)) == plain
    assert lp.cost(jax.checkpoint(two(True)), (5,), (5,)) == plain


def test_a_cond_costs_as_much_as_its_dearest_branch():
    def function(key, x, y):
        return jax.lax.cond(
            x[0, 0] > 0,  # in earnest, only a public value
            lambda: mul(key, x, y),
            lambda: two(True)(key, x, y)[0],
        )

    assert numbers(lp.cost(function, (5,), (5,))) == numbers(lp.cost(two(True), (5,), (5,)))


def test_a_while_loop_has_no_known_cost():
    def function(key, x, y):
        def body(carry):
            key, product = carry
            key, step = jax.random.split(key)
            return key, mul(step, product, y)

        return jax.lax.while_loop(lambda carry: carry[1][0, 0] > 0, body, (key, x))

    with pytest.raises(ValueError, match=r"while: a protocol runs inside"):
        lp.cost(function, (5,), (5,))


def test_a_while_loop_without_protocols_is_free():
    def function(key, x, y):
        x = jax.lax.while_loop(lambda v: v[0, 0] > 0, lambda v: v >> jnp.uint64(1), x)
        return mul(key, x, y)

    assert lp.cost(function, (5,), (5,)) == lp.cost(mul, (5,), (5,))


def test_empty_arrays_cost_messages_but_no_bytes():
    cost = lp.cost(mul, (0, 3), (0, 3))
    assert (cost.rounds, cost.exchanges, cost.online_bytes) == (2, 3, 0)
    assert cost.dealer_bytes_s2 == SEED
    assert (
        lp.cost(lambda key, x, y: P.sec_matmul(key, x, y, FXP), (2, 0), (0, 3)).online_bytes == 48
    )


def test_nothing_runs_and_nothing_is_compiled():
    compiled, seen = [], []

    def note(event, seconds, **details):
        compiled.extend([event] if "backend_compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(note)

    def function(key, x, y):
        seen.extend([x, y])
        return mul(key, x, y)

    n = 10**7
    assert lp.cost(function, (n, 1000), (n, 1000)).online_bytes == 3 * 8 * n * 1000  # 240 GB
    assert all(isinstance(x, jax.core.Tracer) for x in seen)
    assert not compiled
    jax.jit(lambda x: x + 1)(np.zeros(3))
    assert compiled  # the listener listens


def test_arrays_stand_for_their_shapes():
    x = np.zeros((2, 5), np.uint64)
    expected = lp.cost(mul, (5,), (5,))
    assert lp.cost(mul, x, jnp.asarray(x)) == expected
    assert lp.cost(mul, paired(2, 5), [np.int64(5)]) == expected


@pytest.mark.parametrize("shape", [(2.5,), 5, "ab", (True,), None, ((1,),)])
def test_what_is_no_shape(shape):
    with pytest.raises(TypeError, match=r"shapes: expected a tuple of integers"):
        lp.cost(mul, shape, (5,))


def test_a_negative_size():
    with pytest.raises(ValueError, match=r"shapes: expected sizes of at least 0, got \(-1,\)"):
        lp.cost(mul, (-1,), (5,))


def test_a_function_of_other_arguments():
    with pytest.raises(TypeError, match="expected to be called with a key and 2 paired arrays"):
        lp.cost(lambda x, y: P.sec_add(x, y), (5,), (5,))
    with pytest.raises(TypeError, match="'fxp'"):
        lp.cost(P.sec_mul, (5,), (5,))
    with pytest.raises(TypeError, match="expected uint64 shares"):
        lp.cost(P.sec_add, (5,))


# Places -------------------------------------------------------------------------------------------


def test_layers_are_the_outermost_places_in_program_order():
    def function(key, x, y):
        def seat(p, s, _):
            with p.at("second"):
                mask = arithmetic.masked(p, s[0])
            with p.at("first"), p.at("inner"):
                product = arithmetic.bilinear(p, matmul, mask, s[1])
            with p.at("second"):
                return arithmetic.truncate(p, product, 18)

        return simulate(seat, key, (Secret(x, 18), Secret(y, 18)))

    cost = lp.cost(function, (3, 4), (4, 5))
    assert list(cost.layers) == [UNPLACED, "second", "first"]
    rows = [numbers(row) for row in cost.layers.values()]
    assert [row["rounds"] for row in rows] == [0, 2, 1]
    assert [row["online_bytes"] for row in rows] == [0, 8 * (12 + 15), 8 * 20]
    assert [row["dealer_bytes_s2"] for row in rows] == [SEED, 12 * 15, 0]
    assert [row["multiply_adds"] for row in rows] == [0, 0, 2 * 60]
    assert [row["dealer_multiply_adds"] for row in rows] == [0, 0, 60]


# Reports ------------------------------------------------------------------------------------------


def test_seconds_are_latency_and_transfer():
    cost = Cost(rounds=10, exchanges=12, online_bytes=10**6, dealer_bytes_s2=2 * 10**6)
    assert cost.seconds(1e6, 0.1) == pytest.approx(10 * 0.1 + 8.0)
    assert cost.seconds(*LAN) < cost.seconds(*WAN)
    assert cost.dealer_seconds(1e6) == pytest.approx(16.0)
    for bandwidth, latency in ((0, 0.1), (-1, 0.1), (float("nan"), 0.1), (1e6, -1), (1e6, np.nan)):
        with pytest.raises(ValueError, match=r"bandwidth|latency"):
            cost.seconds(bandwidth, latency)


def test_the_table_is_aligned():
    table = lp.cost(mul, (64, 10), (64, 10)).table([Network(1e9, 1e-3)])
    header, _, row, _, total, *rest = table.splitlines()
    assert header.index("comparisons") + len("comparisons") == row.index(" 0  ", 60) + 2
    assert total.startswith("in all")
    assert "15.4 kB" in total
    assert "1000 Mbit/s and 1 ms" in rest[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999_999, "1 MB"),
        (1000, "1 kB"),
        (15360, "15.4 kB"),
        (123456789, "123 MB"),
    ],
)
def test_sizes_have_up_to_three_digits(value, text):
    assert si(value, "B") == text


def test_the_command(capsys):
    assert cli.main(["cost", "--config", "digits", "--batch-size", "4", "--json"]) == 0
    totals = json.loads(capsys.readouterr().out)
    layers = totals.pop("layers")
    for name in ADDITIVE:
        assert totals[name] == sum(layer[name] for layer in layers.values())
    assert max(layer["rounds"] for layer in layers.values()) < totals["rounds"]
    assert totals["rounds"] < totals["exchanges"]
    assert totals["input_bytes"] == 4 * 8 * (16 * 16 + 2 * 64)
    assert totals["dealer_bytes_s1"] == SEED
    # Forward D on reals and fakes, and G's step through it; back as much, two kernel gradients and
    # an input gradient.
    for name in ("Discriminator.conv0", "Discriminator.conv0.backward"):
        assert layers[name]["dealer_multiply_adds"] == 3 * 4 * (8 * 8) * (4 * 4 * 8)


def test_the_command_explains_bad_input(capsys):
    for options, message in (
        (["--batch-size", "0"], "batch_size"),
        (["--bandwidth", "0"], "bandwidth: expected more than 0"),
        (["--latency", "-1"], "latency: expected at least 0"),
    ):
        assert cli.main(["cost", "--config", "digits", *options]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("problems", "compiled", "status"), [([], [], 0), (["told"], [], 1), ([], ["sent"], 1)]
)
def test_the_audit_command_fails_on_any_problem(monkeypatch, capsys, problems, compiled, status):
    report, sizes = audit.Report([], problems), []

    def audited(function, secrets, public=None):
        sizes.append(jax.tree.leaves(secrets)[-1].shape[1])
        return report

    monkeypatch.setattr(audit, "audit_program", audited)
    monkeypatch.setattr(audit, "audit_compiled", lambda *program: compiled)
    monkeypatch.setattr(audit, "largest_batch", lambda program, size: size)
    small = ["--set", "data.image_size=8", "--set", "model.features=2"]
    assert cli.main(["audit", "--config", "digits", *small]) == status
    printed = capsys.readouterr()
    assert "A training step, batch of 64" in printed.out  # as configured
    batch, elements, answer = sizes
    assert (batch, answer) == (64, 16)  # images
    assert "Looking whether its values are in range" in printed.out
    assert elements > 1000
    assert "compiling a training step" in printed.err
    assert all(problem in printed.out for problem in problems + compiled)
    # Only the traced programs, whose problems are told alone:
    command = ["audit", "--config", "digits", *small, "--no-compile", "--batch-size", "3"]
    assert cli.main(command) == bool(problems)
    printed = capsys.readouterr()
    assert (sizes[3], sizes[5]) == (3, 3)
    assert all(problem in printed.out for problem in problems)
    assert "compil" not in printed.out + printed.err


def test_an_audit_takes_the_largest_batch_that_half_of_the_memory_is_enough_for():
    def program(size):
        return (lambda party, x, _: party.mask(x.shape), shapes_of((size,), 18), None)

    base = 2 * 10**9
    assert audit.largest_batch(program(10**8), 10**8, base + 10**10) == 10**8
    for memory in (base + 10**9, base + 3 * 10**9):
        size = audit.largest_batch(program(10**8), 10**8, memory)
        words = 2 * size + 2**11  # of both seeds, and a pool's rest
        assert 0.8 < 2 * 20 * words / (memory - base) < 1.2
    assert audit.largest_batch(program(10**8), 10**8, 1) == 1


# Against a line ---------------------------------------------------------------------------------


def test_a_layer_sends_what_was_predicted():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(6, 7)), rng.normal(size=(7, 5))
    secrets, key = (secret(x, seed=1), secret(w, seed=2)), lp.key(0)

    def function(seat, s, _):
        product = arithmetic.bilinear(seat, matmul, *s)
        return relu(seat, arithmetic.truncate(seat, product, 18))

    program = server_program(function, secrets)
    corrections = dealt(function, key, secrets, None)
    run = program.compile(options=QUICKLY)
    shares, lines = run_servers(program, run, key, corrections, secrets)
    # Half an LSB in each input, times its factors; and the truncation.
    bound = 2.0**-19 * (np.abs(x).sum(1).max() + np.abs(w).sum(0).max()) + 1.01 * 2.0**-18
    assert bound < 1e-4
    np.testing.assert_allclose(real(shares), np.maximum(x @ w, 0), rtol=0, atol=bound)
    cost = program_cost(function, secrets)
    for line in lines:
        assert (sum(line.sizes), len(line.sizes)) == (cost.online_bytes, cost.rounds)
    assert cost.dealer_bytes_s2 == SEED + sum(c.nbytes for c in corrections)
