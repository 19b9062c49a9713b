"""DS: it shares batches and the initial state, and deals every step's randomness ahead.

It takes its keys in the same order as the simulation does, so that a run with the same seed gives
the same words. Each attempt has a master key of its own, which is written nowhere: without a seed
it comes from the operating system, and with one (for experiments) from the seed and the attempt's
number, which no attempt of the session has after it. So a seed is for one session.
"""

from __future__ import annotations

from typing import Any

import jax

from lpgan_jax.cluster.parcels import Payloads, halves, with_material
from lpgan_jax.cluster.reporting import reading_input
from lpgan_jax.cluster.settings import DEALER, ClusterConfig
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.party import deal, server_seeds
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.mpc.share_trees import share_arrays
from lpgan_jax.programs import Draw, SecureProgram, Training, secured, shapes
from lpgan_jax.programs.simulation import share_state
from lpgan_jax.training.tasks import Task


def master_key(seed: int | None, attempt: int) -> jax.Array:
    """DS's key of an attempt, counted from 1; with a seed, the first one is the simulation's."""
    if seed is None:
        return make_key()
    return make_key(seed) if attempt == 1 else jax.random.fold_in(make_key(seed), attempt)


class Dealer:
    """DS's keys and programs in one attempt: payloads for both servers, task by task."""

    def __init__(
        self,
        training: Training,
        draw: Draw,
        initial: Any,
        cluster: ClusterConfig,
        key: jax.Array,
    ) -> None:
        """Compiles.

        `draw`: DS's own batches; `initial`: the state of a training that begins, else None; `key`:
        the attempt's master key.
        """
        self._draw, self._cluster = draw, cluster
        self._program = program = secured(training.program)
        self._keys = DealerKeys(key)
        options = options_to_run_often()

        def dealt(function: Any, secrets: Any, public: Any) -> Any:
            def run(key: jax.Array, public: Any) -> Any:
                seeds = jax.random.key_data(server_seeds(key))
                return seeds, deal(function, key, secrets, public)

            lowered = jax.jit(run, compiler_options=options).lower(make_key(0), public)
            return lowered.compile()

        self._step = dealt(*shapes.step_program(program))
        self._guard = dealt(*shapes.guard_program(program))
        self._answers = {
            name: dealt(*shapes.answer_program(program, name)) for name in training.program.answers
        }
        self._state: Payloads | None = None
        if initial is not None:
            self._state = halves(share_state(program, self._keys, initial))

    def payloads(self, task: Task, answer: str | None = None, question: Any = None) -> Payloads:
        """What S1 and what S2 get.

        Args:
            task: what is to be done.
            answer: the name of what is asked.
            question: what DS asks, unless somebody else shared a question.
        """
        if task.kind == "state":
            assert self._state is not None
            return self._state
        if task.kind == "train":
            return self._for_training(task.step)
        if task.kind == "guard":
            return with_material([[], []], *self._guard(self._keys.take(), None))
        if task.kind == "answer":
            return self._for_an_answer(str(answer), question)
        return [[], []]

    def _for_training(self, step: int) -> Payloads:
        keys = self._keys.take_two()
        inputs: Payloads = [[], []]
        if self._cluster.owner_of(step) == DEALER:
            turn = self._cluster.turn_of(DEALER, step)
            inputs = share_batch(self._program, keys[0], self._draw, turn)
        return with_material(inputs, *self._step(keys[1], self._program.schedule(step)))

    def _for_an_answer(self, name: str, question: Any) -> Payloads:
        keys = self._keys.take_two()
        inputs: Payloads = [[], []]
        if question is not None:
            self._program.check_question(name, question)
            scales = self._program.question_scales(name, question)
            inputs = halves(share_arrays(keys[0], question, scales))
        return with_material(inputs, *self._answers[name](keys[1], None))


def share_batch(program: SecureProgram, key: jax.Array, draw: Draw, turn: int) -> Payloads:
    """An owner's batch, as S1 and as S2 get it. BadInput if a value is out of range."""
    with reading_input():
        batch = draw(turn)
        program.check_batch(batch)
    return halves(share_arrays(key, batch, program.batch_scales))
