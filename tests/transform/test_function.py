"""Functions as JAX users write them, under sharing, against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_models
import pytest
from secured import FAST, LSB, close, expected, in_the_clear, largest_error
from servers import QUICKLY, dealt, run_servers, server_program

import lpgan_jax as lp
from lpgan_jax.mpc import emulated
from lpgan_jax.mpc.fixed_point import encode
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.transform.rules import RULES

# What the functions themselves are off by, in LSB: series are within 2^-26 and up to 1/4 LSB, which
# later layers and divisions amplify; roots take Adam's epsilon into the root.
CLEAR = dict.fromkeys(own_models.EXAMPLES, 2.0) | {
    "mlp, adam": 4.0,  # where a second moment is below an LSB of its own, 2^-42
    "mlp, adamw": 4.0,
}


SOME = {"mlp, adam", "lenet", "transformer", "wgan-gp"}


@pytest.mark.parametrize(
    "name",
    [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in own_models.EXAMPLES],
)
def test_the_program_is_the_function(name):
    example = own_models.EXAMPLES[name]()
    step = lp.secure(example.step, public=example.public, carry=example.carry)
    error = largest_error(in_the_clear(step, example.args), expected(example.step, *example.args))
    assert error / LSB < CLEAR[name]


def shared_result(name, calibrated=False):
    """(what comes out of a step on shares, what should)."""
    example = own_models.EXAMPLES[name]()
    examples = example.args if calibrated else None
    step = lp.secure(example.step, public=example.public, carry=example.carry, calibrate=examples)
    k1, k2 = jax.random.split(lp.key(5))
    run = FAST(step)
    return lp.reveal(run(k2, *step.share(k1, *example.args))), expected(example.step, *example.args)


def test_a_step_on_shares():
    assert largest_error(*shared_result("gru")) / LSB < 8


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", own_models.EXAMPLES)
def test_every_step_on_shares(name, calibrated):
    """Values in LSB; the gradient (the last result) within 1 % of its largest."""
    got, want = shared_result(name, calibrated)
    error = largest_error(got, want) / LSB
    largest = max(float(np.abs(np.asarray(v)).max()) for v in jax.tree.leaves(want[-1]))
    relative = largest_error(got[-1], want[-1]) / largest
    print(f"{name}{', calibrated' * calibrated}: {error:.2f} LSB, gradients {relative:.2%}")
    assert error < (4 if calibrated else 32)
    assert relative < 0.01


def test_every_message_is_hidden():
    example = own_models.mlp()
    step = lp.secure(example.step, public=example.public, carry=example.carry)
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(np.shape(v), np.float32), example.args)
    assert lp.audit(step, *shapes).problems == []


def assert_dealt_is_used(step, *args):
    """Deal and online apart give the words of the simulation."""
    program, _, _ = step.parts(*args)
    secret, public = step._parted(step.share(lp.key(1), *args))
    secrets = [Secret(s.words, s.frac_bits) for s in secret]
    public = step.program(*args).public(public)
    key = lp.key(2)
    both = FAST(lambda k, s, p: simulate(program, k, s, p))(key, secrets, public)
    corrections = dealt(program, key, secrets, public)
    servers = server_program(program, secrets, public)
    run = servers.compile(options=QUICKLY)
    online, _ = run_servers(servers, run, key, corrections, secrets, public)
    jax.tree.map(np.testing.assert_array_equal, online, both)


def test_what_is_dealt_is_what_is_used_in_a_scan():
    def function(x, y):
        def body(total, row):
            return jnp.tanh(total * 0.5 + row), total * row

        return jax.lax.scan(body, y, x)

    assert_dealt_is_used(
        lp.secure(function), np.linspace(-1, 1, 12).reshape(3, 4), np.linspace(0, 1, 4)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp, adam", "lenet", "gru", "vae", "dp-sgd"])
def test_what_is_dealt_is_what_is_used(name):
    example = own_models.EXAMPLES[name]()
    step = lp.secure(example.step, public=example.public, carry=example.carry)
    assert_dealt_is_used(step, *example.args)


def test_shadow_mode_runs_it_too():
    example = own_models.mlp()
    step = lp.secure(example.step, carry=example.carry)
    program = step.program(*example.args)
    secret, public = step._parted(example.args)
    both = zip(secret, program.scales, strict=True)
    secrets, public = [Secret(encode(v, s), s) for v, s in both], program.public(public)
    outputs = jax.jit(lambda k: emulated.run(program.run, k, secrets, public))(jax.random.key(0))
    got = program.outputs([v.share.view(np.int64) * 2.0**-v.frac_bits for v in outputs], public)
    assert largest_error(got, expected(example.step, *example.args)) < 8 * LSB


RNG = np.random.default_rng(1)
X = RNG.normal(size=(3, 4))


def test_elementwise_functions():
    def function(x):
        return {
            "abs": jnp.abs(x),
            "sign": jnp.sign(x),
            "clip": jnp.clip(x, -0.5, 0.7),
            "max": jnp.maximum(x, x[::-1]),
            "erf": jax.lax.erf(x),
            "sin": jnp.sin(3 * x),
            "cos": jnp.cos(x - 1),
            "expm1": jnp.expm1(x),
            "power": x**3,
            "where": jnp.where((x > 0.2) & (x < 1), x, -2 * x),
        }

    close(function, X)


def test_functions_that_run_together_may_take_each_other():
    """Neither all exponentials can come first, nor all tanh."""
    step = lp.secure(lambda x, y: (jnp.tanh(jnp.exp(x) + y), jnp.exp(jnp.tanh(y) + x)))
    assert step.check(X, X[::-1]) is None


def test_a_public_mask_of_a_softmax():
    step = lp.secure(lambda x, mask: jax.nn.softmax(x + mask), public=("mask",))
    assert step.check(X, np.where(np.arange(X.shape[-1]) < 2, -1e9, 0.0)) is None


def test_the_largest_and_its_gradient():
    def function(x, y):
        value, pull = jax.vjp(lambda v: v.max(-1), x)
        (dx,) = pull(y)
        return value, dx, x.min(0), jnp.argmax(x, -1), jax.nn.softmax(x)

    close(function, X, np.array([0.3, -1.0, 2.0]))


def test_indices_that_are_public():
    def function(x, rows, start):
        table = jnp.zeros((5, 4)).at[rows].add(x)
        part = jax.lax.dynamic_slice(x, (0, start), (3, 2))
        known = jnp.zeros((3, 4)).at[0, 1].add(0.5)  # while tracing
        tiled = jax.lax.optimization_barrier(jnp.tile(x, (2, 3)))
        return table, x * known, tiled, x[rows[:2]], part, jnp.cumsum(x, 1), jnp.pad(x, 1)

    close(function, X, np.array([0, 3, 3]), 1, public=("rows", "start"), lsb=2)


def test_branches_and_loops():
    def function(x, flag):
        y = jax.lax.fori_loop(0, 3, lambda i, c: c * 0.5 + i, x)
        z = jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + x), (0, y))[1]
        return jax.lax.cond(x[0, 0] > 0, lambda: z, lambda: -z), jnp.where(flag, x, z)

    close(function, X, True, public=("flag",))


def test_a_scan_of_what_is_public():
    def function(x, rates):
        return x * jax.lax.scan(lambda total, rate: (total + rate, total), 0.0, rates)[1]

    step = lp.secure(function, public=("rates",), calibrate=(X, np.arange(4.0)))
    assert step.check(X, np.arange(4.0)) is None


def test_a_log_shows_no_shares():
    (shared,) = lp.secure(lambda x: x).share(lp.key(1), X)
    assert "words" not in repr([shared])


def test_what_depends_on_a_step_is_public():
    """A rate of 2e-4 keeps its bits; so does a bias correction."""

    def function(x, rate, count):
        return x * rate, x / (1 - 0.999 ** (count + 1.0))

    close(function, X, 2e-4, 0, public=("rate", "count"), lsb=2000)
    step = lp.secure(function, public=("rate", "count"))
    first, _ = lp.reveal(step(lp.key(2), *step.share(lp.key(1), X, 2e-4, 0)))
    assert np.abs(first - X * 2e-4).max() < LSB


def test_a_sum_that_becomes_a_mean_may_be_large():
    x = np.random.default_rng(3).normal(size=3000)
    # The factor 1/144 has 17 bits after the sum: half of 2^-17 of a root of 4.5, and an LSB.
    close(lambda x: ((x**2).mean(), jnp.sqrt(((x / 12) ** 2).sum())), x, lsb=5.5)


def test_a_sum_of_means_has_room_for_both():
    rng = np.random.default_rng(5)
    total, rows, weights = rng.normal(size=5), rng.normal(8, 1, (1024, 5)), rng.normal(1, 1, 1024)

    def means(total, rows, weights):
        return total / 773.7 + rows.T @ (weights / 1024) / 4

    # The sum of 1,024 products is 8,000, and its factor 2^-12. Rounding what is given is at most
    # half an LSB times a quarter of the other factor's mean, 8 and 1; what comes out is within one.
    close(means, total, rows, weights, lsb=2.3)


def test_schedules_count_in_integers():
    schedules = [
        optax.warmup_cosine_decay_schedule(1e-4, 3e-3, 3, 100),
        optax.linear_schedule(3e-3, 1e-3, 10),
        optax.join_schedules(
            [optax.constant_schedule(0.1), optax.exponential_decay(0.1, 9, 2)], [4]
        ),
    ]
    step = lp.secure(lambda x, count: [x * rate(count) for rate in schedules], public=("count",))
    for count in (0, 5):
        assert step.check(X, count) is None
    assert not step.explain(X, 5).too_large


def test_a_step_in_a_scan_and_in_vmap():
    optimizer = optax.sgd(0.1)

    def function(w, x):
        grad = jax.grad(lambda w: ((x @ w) ** 2).mean())(w)
        return optax.apply_updates(w, optimizer.update(grad, optimizer.init(w))[0])

    w = RNG.normal(size=(4, 2))
    step = lp.secure(function, carry={0: 0})
    shared_w, shared_x = step.share(lp.key(1), w, X)
    keys = jax.random.split(lp.key(2), 3)
    scanned = jax.lax.scan(lambda w, k: (step(k, w, shared_x), None), shared_w, keys)[0]
    want = w
    for _ in range(3):
        want = expected(function, want, X)
    assert np.abs(lp.reveal(scanned) - want).max() < 4 * LSB
    both = jax.vmap(step)(
        keys[:2], *jax.tree.map(lambda v: jnp.stack([v, v]), (shared_w, shared_x))
    )
    for i in range(2):
        one = jax.tree.map(lambda v, i=i: v[i], both)
        assert np.abs(lp.reveal(one) - expected(function, w, X)).max() < 3 * LSB


def test_check_names_the_operation_that_is_wrong(monkeypatch):
    example = own_models.mlp()
    step = lp.secure(example.step, carry=example.carry)
    assert step.check(*example.args) is None
    monkeypatch.setitem(RULES, "tanh", lambda values, node, x: x)
    found = step.check(*example.args)
    assert found.operation == "tanh"
    assert "own_models.py" in found.place
    assert found.error > 1000


def test_a_step_may_be_traced_inside_of_a_jit():
    def function(x):
        return x.mean() * jnp.sqrt(2.0)

    shared = lp.secure(function).share(lp.key(1), X)
    got = jax.jit(lp.secure(function))(lp.key(2), *shared)
    assert np.abs(lp.reveal(got) - X.mean() * 2**0.5) < 2 * LSB


def test_cost_takes_a_function_as_it_is():
    example = own_models.mlp()
    step = lp.secure(example.step, carry=example.carry)
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(np.shape(v), np.float32), example.args)
    cost = lp.cost(step, *shapes)
    assert cost == lp.cost(step, *example.args)
    assert cost.multiply_adds > 0
    assert any(layer.startswith("MLP.Dense_0") for layer in cost.layers)
