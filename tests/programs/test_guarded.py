"""The range guard of programs: loops, factors that are not constants, and nothing to look at."""

import jax
import numpy as np
import optax
import pytest

import lpgan_jax as lp
from lpgan_jax.mpc.prng import key
from lpgan_jax.programs import initial_state, secured
from lpgan_jax.programs.simulation import Simulation
from lpgan_jax.training.trainers import SecureTrainer, ShadowTrainer

LARGE = np.float32(9001)  # no power of two: what wraps is not 0


def doubled(state, batch):
    return state + batch, {"sum": state.sum() + batch.sum()}


def in_a_loop(state, batch):
    after, _ = jax.lax.scan(lambda c, _: (c * c, None), state + batch, None, length=3)
    return after, {"sum": after.sum()}


def by_a_schedule(state, batch):
    w, schedule = state
    rule = optax.scale_by_schedule(lambda count: 100.0 / (1.0 + count))
    update, schedule = rule.update(w * batch * 64, schedule)
    return (update, schedule), {"sum": update.sum()}


def init_of(step):
    w = np.full(4, LARGE)
    if step is by_a_schedule:
        return w, optax.scale_by_schedule(lambda count: 1.0).init(w)
    return w


def trainers(step, factor=1.0):
    def init(rng):
        return jax.tree.map(lambda v: v * np.asarray(factor, v.dtype), init_of(step))

    program = secured(
        lp.Program(
            init=init,
            step=step,
            batch=jax.ShapeDtypeStruct((4,), np.float32),
            learnt=lambda state: jax.tree.leaves(state)[0],
            answers={},
        )
    )
    initial = initial_state(program.program, 0)
    return (
        SecureTrainer(Simulation.begin(program, initial, key(1))),
        ShadowTrainer(program, initial, key(1)),
    )


@pytest.mark.parametrize(
    ("step", "factor", "names"),
    [
        (doubled, 1.0, []),
        (in_a_loop, 2.0**-13, []),
        (in_a_loop, 1.0, ["of a loop 1 (truncate, 62 bits)"]),
        (by_a_schedule, 2.0**-13, []),
        (by_a_schedule, 1.0, ["(truncate, 62 bits)"]),
    ],
)
def test_shares_and_shadow_say_the_same(step, factor, names):
    # What wraps is in range in one case in two: elements of their own do not all do that.
    batch = np.array([1.0, 1.1, 1.3, 1.7], np.float32)
    batch = batch * LARGE if factor == 1.0 and step is by_a_schedule else batch / 4
    said = []
    for trainer in trainers(step, factor):
        trainer.step(0, batch)
        said.append(trainer.guard())
    assert (said[0] == []) == (said[1] == []) == (names == [])
    for name in names:
        assert name in said[0][0]
        assert said[0][0] == said[1][0]
