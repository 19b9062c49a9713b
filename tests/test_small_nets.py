"""Squares, the three small networks and their training, against float64 and the Flax twins.

All inputs are on the grid of their scale, so that errors come from the protocols alone. e = 2^-18
is one LSB; a truncation errs by less than e.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import on_grid, real, run, script, secret
from jax import lax
from lpgan_jax.classification import Batch, Classifier, PlaintextClassifier, State, one_hot
from lpgan_jax.models.dcgan import Reshape
from lpgan_jax.models.small_nets import NAMES, SmallNet
from lpgan_jax.nn.activation import SR, SecSquare
from lpgan_jax.nn.linear import SecConv

from lpgan_jax import key, optim
from lpgan_jax.analysis.audit import audit_program
from lpgan_jax.analysis.cost import program_cost
from lpgan_jax.mpc import emulated
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.fixed_point import encode
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.secret import Secret, is_secret
from lpgan_jax.training.programs import shared
from lpgan_jax.training.simulation import reveal_tree, share_tree, whole_tree

F = 18
E = 2.0**-F
M, RATE, MOMENTUM = 4, 0.5, 0.9
nets = pytest.mark.parametrize("name", NAMES)


def assert_within(actual, exact, tolerance):
    actual, exact = np.asarray(actual), np.asarray(exact)
    assert actual.shape == exact.shape
    # 2^-40 is what float64 references themselves may be off by.
    excess = np.abs(actual - exact) - (np.asarray(tolerance) + 2.0**-40)
    assert np.all(excess <= 0), (excess / E).max()


# Squares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [F, 2 * F])
def test_square_opens_its_input_once_and_the_gradient_once(scale):
    """Exact at scale f; at 2f, x and dy are first rounded to f. Up to the end of the range."""
    rng = np.random.default_rng(0)
    x, dy = on_grid(rng, (4, 16), scale, 2.0), on_grid(rng, (4, 16), scale)
    x[:, :5] = [0.0, 2.0**-scale, -(2.0**-scale), 8191.0, -8191.0]
    layer, sent = SecSquare(F), []

    def function(party, x, dy):
        y, residuals = layer.forward(party, {}, x)
        dx, grads = layer.backward(party, residuals, dy, input_grad=True, param_grads=True)
        sent.extend((message.name, message.words.size) for message in party.messages)
        assert grads == {}
        part = layer.group(residuals, 1, 2)
        half, _ = layer.backward(party, part, dy[2:], input_grad=True, param_grads=True)
        return y, dx, half

    result = run(function, secret(x, scale, 1), secret(dy, scale, 2))
    y, dx, half = jax.tree.map(real, result, is_leaf=is_secret)
    assert sent == [("mask", x.size), ("mask", dy.size)]
    rounding = 0.0 if scale == F else E
    exact, vjp = jax.vjp(lambda v: v**2, x)
    exact_dx = np.asarray(vjp(dy)[0])
    d_dx = 2 * rounding * (np.abs(x) + np.abs(dy) + rounding)
    assert_within(y, exact, rounding * (2 * np.abs(x) + rounding))
    assert_within(dx, exact_dx, d_dx)
    assert_within(half, exact_dx[2:], d_dx[2:])


# Networks -----------------------------------------------------------------------------------------


def _case(name):
    """(model, secure classifier, float64 twin, its state, the same state and batch on the grid)."""
    model = SmallNet(name)
    classifier = Classifier(model, optim.sgd(RATE, M, F, MOMENTUM))
    twin = PlaintextClassifier(model, optax.sgd(RATE, MOMENTUM), np.float64)
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda v: np.round(v / E) * E, classifier.init(rng).params)
    for layer in params.values():
        layer["bias"] = on_grid(rng, layer["bias"].shape, F, 0.1)
    images = np.round(rng.uniform(0, 1, (M, 28, 28)) * (rng.random((M, 28, 28)) < 0.2) / E) * E
    batch = Batch(model.inputs(images), one_hot([3, 0, 9, 3]))

    vector, unravel = jax.flatten_util.ravel_pytree(params)
    trace = on_grid(rng, vector.shape)  # of sums over the batch; optax's is of means
    plain = twin.init(params)
    momentum = plain.optimizer[0]._replace(trace=unravel(trace / M))
    plain = plain._replace(optimizer=(momentum, *plain.optimizer[1:]))
    return model, classifier, twin, plain, State(params, {"trace": trace}), batch


def _flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def _product(layer, x, kernel):
    """A linear layer without its bias, in the clear."""
    if not isinstance(layer, SecConv):
        return jnp.matmul(x, kernel)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, layer.strides, layer.padding, dimension_numbers=numbers
    )


@jax.custom_vjp
def _noisy(x, forward, backward):
    """x + forward; its gradient is that of x, + backward."""
    return x + forward


_noisy.defvjp(
    lambda x, forward, backward: (x + forward, backward), lambda noise, dy: (dy + noise, None, None)
)


def _perturbed(model, params, batch, random):
    """Logits and gradients (sums over the batch), where all that is rounded moves by +-1/2 LSB.

    A truncation is off by less than 1 LSB with mean 0, so by at most 1/2 in the root mean square.
    Layers truncate what comes at double fraction: everything but inputs, and what a ReLU selected.
    """

    def noise(like, wanted=True):
        return random.choice([-E / 2, E / 2], like.shape) if wanted else np.zeros(like.shape)

    def forward(params):
        x, before, margin = batch.images, None, np.inf
        for name, layer in model.network().layers:
            if isinstance(layer, Reshape):
                x = x.reshape(len(x), -1)
                continue
            positive = x > 0
            if before is not None:
                relu = isinstance(before, SR), isinstance(layer, SR)
                x = _noisy(x, noise(x, not relu[0]), noise(x, not relu[1]))
            if isinstance(layer, SR):
                margin = jnp.abs(x).min()  # of the last: the first compares exact values
                x = jnp.where(positive, x, 0)
            elif isinstance(layer, SecSquare):
                x = x**2
            else:
                x = _product(layer, x, params[name]["kernel"]) + params[name]["bias"]
            before = layer
        return x, margin

    logits, vjp, margin = jax.vjp(forward, params, has_aux=True)
    assert margin > 32 * E  # every bit of a ReLU is right
    (grads,) = vjp(jax.nn.sigmoid(logits) - batch.labels + 2 * noise(logits))  # it errs by 2 LSB
    return logits, _flat(grads)


@nets
def test_a_step_and_inference_are_the_twins_up_to_rounding(name):
    """On shares and in shadow mode: within eight times the root mean square of perturbed twins."""
    model, classifier, twin, plain, state, batch = _case(name)
    scales = classifier.scales(state), Batch(F, F)

    @jax.jit
    def on_shares(keys, values, public):
        state, batch = share_tree(keys[0], values, scales)
        new = simulate(classifier.train_step, keys[1], (state, batch), public)
        return new, simulate(classifier.infer, keys[2], (state.params, batch.images))

    @jax.jit
    def in_shadow(keys, values, public):
        state, batch = jax.tree.map(lambda v, f: Secret(encode(v, f), f), values, scales)
        new = emulated.run(classifier.train_step, keys[1], (state, batch), public)
        return new, emulated.run(classifier.infer, keys[2], (state.params, batch.images))

    arguments = jax.random.split(key(0), 3), (state, batch), classifier.schedule(0)
    results = reveal_tree(on_shares(*arguments)), whole_tree(in_shadow(*arguments))

    exact = np.asarray(twin.infer(state.params, batch.images))
    step = twin.train_step(plain, batch)
    before, after = (M * _flat(v.optimizer) for v in (plain, step))
    random = np.random.default_rng(6)
    samples = [_perturbed(model, state.params, batch, random) for _ in range(32)]

    def eight_rms(exact, values):
        return 8 * np.sqrt(np.mean([(value - exact) ** 2 for value in values], 0))

    d_logits = eight_rms(exact, [logits for logits, _ in samples])
    d_grads = eight_rms(after - MOMENTUM * before, [grads for _, grads in samples])
    # The trace and its decay are rounded, and so is the update; momentum and rate have 16 bits.
    d_trace = d_grads + 2 * E + 2.0**-16 * np.abs(before)
    d_params = d_trace * RATE / M + E + 2.0**-16 * np.abs(after) * RATE / M
    assert d_params.max() < 20 * E
    for new, logits in results:
        assert_within(logits, exact, d_logits + E)
        assert_within(new.optimizer["trace"], after, d_trace)
        assert_within(_flat(new.params), _flat(step.params), d_params)


@nets
def test_a_step_in_the_clear_is_the_twins(name):
    """The sigmoid's series errs by 2^-20; momentum and rate by 2^-16 of themselves."""
    _, classifier, twin, plain, state, batch = _case(name)
    scales = classifier.scales(state), Batch(F, F)

    @jax.jit
    def clear(values, public):
        return classifier.train_step(ExactSeat(), jax.tree.map(scaled, values, scales), public)

    new, step = clear((state, batch), classifier.schedule(0)), twin.train_step(plain, batch)
    before, after = (M * _flat(v.optimizer) for v in (plain, step))
    tolerance = E + 2.0**-16 * RATE / M * (np.abs(before) + np.abs(after))
    assert_within(_flat(new.params) * E, _flat(step.params), tolerance)


def test_sizes_and_parameters():
    sizes = {}
    for name in NAMES:
        model = SmallNet(name)
        network, shape = model.network(), model.input_shape
        for _, layer in network.layers:
            _, shape = layer.init(np.random.default_rng(0), shape)
            sizes.setdefault(name, []).append(int(np.prod(shape)))
        params, stats = network.init(np.random.default_rng(0))
        assert stats == {}
        assert all(set(layer) == {"kernel", "bias"} for layer in params.values())
        images = jnp.zeros((1, *model.input_shape))
        flax = jax.eval_shape(model.twin().init, jax.random.key(0), images)["params"]
        assert jax.tree.map(np.shape, flax) == jax.tree.map(np.shape, params)
    assert sizes == {
        "fc": [128, 128, 128, 128, 10],
        "conv-square": [845, 845, 845, 100, 100, 10],
        "conv-relu": [980, 980, 980, 100, 100, 10],
    }


@nets
def test_every_message_is_hidden_and_rounds_are_as_documented(name):
    model = SmallNet(name)
    classifier = Classifier(model, optim.sgd(RATE, 2, F, MOMENTUM))
    state = classifier.init(np.random.default_rng(0))
    state = jax.tree.map(shared, state, classifier.scales(state))
    batch = Batch(shared(np.zeros((2, *model.input_shape)), F), shared(np.zeros((2, 10)), F))
    step = classifier.train_step, (state, batch), classifier.schedule(0)
    inference = classifier.infer, (state.params, batch.images)
    assert audit_program(*step).problems == []
    assert audit_program(*inference).problems == []
    rounds = program_cost(*step).rounds, program_cost(*inference).rounds
    assert rounds == ((24, 12) if name == "conv-relu" else (22, 8))


def test_bad_input_is_named():
    model = SmallNet("conv-relu")
    classifier = Classifier(model, optim.sgd(RATE, M, F))
    twin = PlaintextClassifier(model, optax.sgd(RATE))
    params = classifier.init(np.random.default_rng(0)).params
    with pytest.raises(ValueError, match=r"name: expected one of fc, .* got 'vgg'"):
        SmallNet("vgg")
    with pytest.raises(ValueError, match=r"images: expected \[N, 28, 28, 1\], got \[2, 32, 32\]"):
        model.inputs(np.zeros((2, 32, 32)))
    with pytest.raises(ValueError, match=r"labels: expected integers \[n\], got float64\[2\]"):
        one_hot(np.zeros(2))
    for label in (-1, 10):
        with pytest.raises(ValueError, match=rf"labels: expected 0 to 9, got .*{label}"):
            one_hot([0, label])
    images, labels = scaled(np.zeros((2, 28, 28, 1)), F), scaled(np.zeros((3, 10)), F)
    flat = scaled(np.zeros((2, 784)), F)
    state = State({}, {})
    with pytest.raises(ValueError, match=r"labels: expected \[2, 10\], one-hot, got \[3, 10\]"):
        classifier.train_step(ExactSeat(), (state, Batch(images, labels)), {})
    with pytest.raises(ValueError, match=r"images: expected \[n, 28, 28, 1\], got \[2, 784\]"):
        classifier.train_step(ExactSeat(), (state, Batch(flat, labels)), {})
    with pytest.raises(ValueError, match=r"images: expected \[n, 28, 28, 1\], got \[2, 784\]"):
        classifier.infer(ExactSeat(), ({}, flat), None)
    with pytest.raises(ValueError, match=r"images: expected \[n, 28, 28, 1\], got \[2, 784\]"):
        twin.infer(params, np.zeros((2, 784)))
    with pytest.raises(ValueError, match=r"labels: expected \[2, 10\], one-hot, got \[2\]"):
        twin.train_step(twin.init(params), Batch(np.zeros((2, 28, 28, 1)), np.zeros(2)))


# The experiment -----------------------------------------------------------------------------------


def test_the_experiment_skips_what_is_done_and_refuses_other_settings(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    module = script("small_nets")
    settings = {"train": 640, "test": 20, "epochs": 1, "seed": 1}
    figures = (
        "batch_size momentum frac_bits headroom_bits plaintext_accuracy agreement logit_difference "
        "logit_difference_lsb inference_batch rounds server_bytes_per_image server_bytes_one_image "
        "dealer_bytes_per_image"
    )
    common = settings | dict.fromkeys(figures.split(), 1) | {"secure_accuracy": 0.875}
    accuracies = {"secure_accuracy": 0.1, "plaintext_accuracy": 0.2}
    times = {"secure_step_s": 1.0, "plaintext_step_s": 2.0, "secure_image_ms": 3.0}
    rows = {
        "small_nets_times.csv": [{"network": name} | times for name in NAMES],
        "small_nets_curve.csv": [
            {"network": name, "step": step} | accuracies for name in NAMES for step in (0, 10)
        ],
        "small_nets.csv": [{"network": name} | common for name in NAMES],
    }
    for file in module.FILES:
        known = rows[file][:2] if file == "small_nets.csv" else rows[file]
        (tmp_path / file).write_text(module.tables.to_csv(known, list(known[0])))
    measured = []

    def measure(name, args, train, test):
        measured.append(name)
        return {file: [row for row in rows[file] if row["network"] == name] for file in rows}

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "load", lambda *arguments: None)
    command = ["small_nets.py", "--mnist", "nowhere", "--out", str(tmp_path), "--seed", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--train", "640", "--test", "20"])
    module.main()
    assert measured == [NAMES[2]]  # of which only small_nets.csv knew nothing
    written = [(tmp_path / file).read_bytes() for file in module.FILES]
    module.main()
    assert measured == [NAMES[2]]
    assert [(tmp_path / file).read_bytes() for file in module.FILES] == written
    assert (tmp_path / "small_nets_curve.csv").read_text().count("conv-relu") == 2
    assert (tmp_path / "small_nets.md").read_text().count("| 87.50% |") == 3
    assert (tmp_path / "small_nets.png").stat().st_size > 10_000
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        module.main()
