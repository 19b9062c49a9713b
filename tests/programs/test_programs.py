"""Programs of plain JAX: trained and asked on shares, in shadow mode and in the clear."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpgan_jax as lp
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.share_trees import reveal_tree
from lpgan_jax.programs import Answer, Program, SecureProgram
from lpgan_jax.programs import simulation as simulating
from lpgan_jax.programs.simulation import Simulation, by_name, restore_state
from lpgan_jax.training import trainers
from lpgan_jax.training.trainers import PlaintextTrainer, ShadowTrainer

CLASSES, SIZE = 3, 8
LSB = 2.0**-18
RATE, STEPS = 0.5, 3
PARAMETERS = 4 * CLASSES + CLASSES
# Its rates come from a step counter, which is public.
MODEL, OPTIMIZER = nn.Dense(CLASSES), optax.sgd(optax.linear_schedule(RATE, RATE / 2, 4))


def init(rng):
    params = MODEL.init(jax.random.key(int(rng.integers(2**31))), jnp.zeros((1, 4)))
    return params, OPTIMIZER.init(params)


def step(state, batch):
    params, optimizer = state
    images, labels = batch

    def loss(params):
        return optax.softmax_cross_entropy(MODEL.apply(params, images), labels).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, optimizer = OPTIMIZER.update(gradients, optimizer, params)
    return (optax.apply_updates(params, updates), optimizer), {"loss": value}


def classify(params, images):
    return jnp.argmax(MODEL.apply(params, images), -1)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def parameters(state):
    return state[0]


FIELDS = {
    "init": init,
    "step": step,
    "batch": (floats(SIZE, 4), floats(SIZE, CLASSES)),
    "learnt": parameters,
    "answers": {"class": Answer(classify, floats(SIZE, 4), parameters)},
}


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    with pytest.MonkeyPatch.context() as patch:
        for module in (trainers, simulating):
            patch.setattr(
                module, "options_to_run_often", lambda: {"xla_backend_optimization_level": "0"}
            )
        yield


@pytest.fixture(scope="module")
def program():
    return SecureProgram(Program(**FIELDS))


def batch(turn):
    rng = np.random.default_rng(turn)
    images = rng.normal(size=(SIZE, 4))
    classes = (images[:, 0] > 0).astype(int) + (images[:, 1] > 0)
    return images, np.eye(CLASSES)[classes]


@pytest.fixture(scope="module")
def trained(program):
    """(steps done three ways, what was told): on shares, on integers, in float64."""
    initial = program.program.init(np.random.default_rng(1))
    ways = (
        Simulation.begin(program, initial, lp.key(5)),
        ShadowTrainer(program, initial, lp.key(6)),
        PlaintextTrainer(program.program, initial, np.float64),
    )
    told = []
    for number in range(STEPS):
        first = reveal_tree(ways[0].train_step(number, batch(number)))
        told.append([first, *(way.step(number, batch(number)) for way in ways[1:])])
    return ways, told


def furthest(steps):
    """How far parameters are after so many steps, at most, in LSB (Euclidean).

    The loss is convex and RATE below 2 / its curvature, so that a step spreads no error. Each adds
    to a parameter RATE times a gradient's: half of a logit's rounding (1), what softmax takes (2)
    and its own rounding (1); and the update's rounding (1). Encoding adds 1/2 before the first.
    """
    return PARAMETERS**0.5 * (0.5 + steps * (RATE * (0.5 + 2 + 1) + 1))


def test_all_three_ways_tell_the_same(trained):
    (simulation, shadow, plain), told = trained
    for number, rows in enumerate(told):
        losses = [float(row["loss"]) for row in rows]
        images = np.c_[batch(number)[0], np.ones(SIZE)]
        assert RATE * (images**2).sum(1).mean() / 2 < 2  # the curvature is half of that at most
        assert (np.abs(images).mean(0) <= 1).all()  # so a gradient's error is that of softmax
        # |p - y| is 2^(1/2) at most; logits, softmax, mean: 4 roundings.
        size = np.sqrt(2 * (images**2).sum(1)).mean()
        np.testing.assert_allclose(losses, losses[2], atol=(furthest(number) * size + 4) * LSB)
    states = reveal_tree(simulation.state), shadow.state(), plain.state()
    ours = [np.concatenate([np.ravel(v) for v in jax.tree.leaves(s[0])]) for s in states]
    for found in ours[:2]:
        assert np.linalg.norm(found - ours[2]) < furthest(STEPS) * LSB


def test_answers_are_the_same_and_of_any_number(trained):
    (simulation, shadow, plain), _ = trained
    for count in (SIZE, 3):
        question = batch(9)[0][:count]
        answers = [way.answer("class", question) for way in (simulation, shadow, plain)]
        assert answers[0].shape == (count,)
        for answer in answers:
            np.testing.assert_array_equal(answer, answers[2])


def test_a_state_goes_through_a_checkpoint(program, trained):
    (simulation, *_), _ = trained
    arrays = simulation.shares()
    assert arrays.keys() == by_name(program.shapes).keys()
    again = Simulation(program, restore_state(program, arrays), DealerKeys(lp.key(8)))
    question = batch(9)[0]
    np.testing.assert_array_equal(
        again.answer("class", question), simulation.answer("class", question)
    )
    missing = dict(list(arrays.items())[1:])
    with pytest.raises(ValueError, match=r"expected shape .* by the configuration, got nothing"):
        restore_state(program, missing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images, labels[:3]), r"batch\[1\]: expected shape \(8, 3\), got"),
        (lambda images, labels: (images * 1e30, labels), r"batch\[0\]: expected \|x\| < 2\^44"),
        (lambda images, labels: (images * np.nan, labels), r"batch\[0\]: expected finite numbers"),
        (lambda images, labels: images, "batch: expected PyTreeDef"),
    ],
)
def test_bad_batches_are_named(program, change, message):
    with pytest.raises(ValueError, match=message):
        program.check_batch(change(*batch(0)))


def test_bad_questions_are_named(program):
    with pytest.raises(ValueError, match=r"images: expected \|x\| < 2\^44"):
        program.check_question("class", np.full((2, 4), 1e20))


def test_bad_programs_are_named():
    with pytest.raises(TypeError, match=r"batch: expected jax.ShapeDtypeStructs, got ndarray"):
        Program(**FIELDS | {"batch": np.zeros(3)})
    with pytest.raises(TypeError, match=r"answers\['class'\].question: expected jax.ShapeDtype"):
        Program(**FIELDS | {"answers": {"class": Answer(classify, 3.0)}})
    counted = Answer(lambda s, x: classify(s[0], x) + s[1][1].count, floats(2, 4))
    program = SecureProgram(Program(**FIELDS | {"answers": {"class": counted}}))
    with pytest.raises(ValueError, match="part: expected secrets alone, no step counters"):
        program.check_question("class", np.zeros((2, 4)))
