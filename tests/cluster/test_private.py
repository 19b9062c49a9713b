"""Noise between two servers: DS's, or each server's own, which it is held to where DS checks."""

import jax
import numpy as np
import pytest
import tiny_private
from checked import S1, S2, SEED, Cluster, Honest
from clusters import local

from lpgan_jax.cluster.owners import _draw, _drawn_anew
from lpgan_jax.cluster.record import Deviation
from lpgan_jax.cluster.reporting import Lost
from lpgan_jax.mpc.prng import key
from lpgan_jax.mpc.share_trees import reveal_tree
from lpgan_jax.programs import initial_state, secured
from lpgan_jax.programs.simulation import Simulation
from lpgan_jax.training import config
from lpgan_jax.training.building import training_of
from lpgan_jax.training.tasks import tasks


def after(training, draw, question):
    """The state of a simulation that does the same in the same order, float64."""
    program = secured(training.program)
    simulation = Simulation.begin(program, initial_state(training.program, SEED), key(SEED))
    for task in tasks(training, 0, True):
        if task.kind == "train":
            simulation.train_step(task.step, draw(task.step))
        elif task.kind == "guard":
            simulation.guard()
        elif task.kind == "answer":
            simulation.answer("logit", question)
    return reveal_tree(simulation.state)


class OtherNoise(Honest):
    """It draws from another key than it shows; or shows none."""

    def __init__(self, place, shown):
        self.place, self._shown = place, shown

    def noise_key(self, own):
        return self._shown


@pytest.mark.parametrize("source", ["dealer", "servers"])
def test_servers_train_as_they_should_and_are_held_to_it(source, tmp_path):
    """With noise of DS's as the simulation, bit by bit; with their own, with the sum of both."""
    training = tiny_private.training(source)
    cluster = Cluster(tmp_path, training)
    session = cluster.session()
    assert session.error is None
    assert session.checker.checked == training.steps
    draw, noise = training.feed(SEED, None), training.program.noise
    inputs, off = training.noised(draw, SEED), 0.0
    if source == "servers":
        keys = session.servers._noise_keys

        def inputs(step):
            return draw(step), sum(noise.draw(k, step, 18) for k in keys) * 2.0**-18

        off = 6 * 2 * 2.0**-18  # other shares are rounded otherwise: 2 LSB in each of 6 updates
    wanted, got = after(training, inputs, cluster.question), reveal_tree(session.servers.state)
    for ours, theirs in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=off)
    if source == "dealer":  # nobody asks servers for keys
        assert cluster.session(OtherNoise(S1, b"")).error is None
        return
    for place, name in ((S1, "s1"), (S2, "s2")):
        session = cluster.session(OtherNoise(place, b"x" * 32))
        assert isinstance(session.error, Deviation)
        assert session.error.server == name
    with pytest.raises(Lost, match="it does not show what its noise is drawn from"):
        cluster.session(OtherNoise(S2, b""))


def test_a_step_that_is_done_again_takes_other_examples(tmp_path):
    """What was drawn for an attempt that failed may be known from it; a seed alone repeats all."""
    settings = config.program_config(tiny_private.__file__)
    training = training_of(settings)
    _, cluster = local(tmp_path)

    def rows(draw):
        return np.concatenate([draw(step)[0][0].ravel() for step in range(3)])

    (seed, one), (same, two) = (_draw(cluster, "ds", settings, training, None) for _ in range(2))
    assert seed == same, "the initial state and the key of a sample stay"
    assert not np.array_equal(rows(one), rows(two))
    fixed = [_draw(cluster, "ds", settings, training, SEED)[1] for _ in range(2)]
    later = [_drawn_anew(settings, training, SEED, attempt) for attempt in (2, 3, 3)]
    first, again, second, third, repeated = map(rows, (*fixed, *later))
    assert np.array_equal(first, again)
    assert np.array_equal(third, repeated)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
