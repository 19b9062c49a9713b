"""DS: it shares batches and the initial state, and deals every step's randomness ahead.

It takes its keys in the same order as the simulation does, so that a run with the same seed gives
the same words. Each attempt has a master key of its own, which is written nowhere: without a seed
it comes from the operating system, and with one (for experiments) from the seed and the attempt's
number, which no attempt of the session has after it. So a seed is for one session.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from lpgan_jax.cluster.parcels import Payloads, halves, with_material
from lpgan_jax.cluster.reporting import BadInput, reading_input
from lpgan_jax.cluster.session import GUARD, TRAIN
from lpgan_jax.cluster.settings import DEALER, ClusterConfig
from lpgan_jax.cluster.transcript import digests_of
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.party import deal, server_seeds
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.mpc.share_trees import share_arrays
from lpgan_jax.privacy.mechanism import noise_keys, seeded
from lpgan_jax.programs import Draw, SecureProgram, Training, secured, shapes
from lpgan_jax.programs.simulation import share_state
from lpgan_jax.training.tasks import Task


def master_key(seed: int | None, attempt: int) -> jax.Array:
    """DS's key of an attempt, counted from 1; with a seed, the first one is the simulation's."""
    if seed is None:
        return make_key()
    return make_key(seed) if attempt == 1 else jax.random.fold_in(make_key(seed), attempt)


class Dealt(NamedTuple):
    """What DS knows of a task that the servers run a program for.

    Attributes:
        which: of the programs (`parcels.server_programs`).
        inputs: what DS shares for it, paired arrays; None for nothing.
        seeds: words of both servers' seeds, uint32[2, 8].
        corrections: of S2.
        public: what both servers know.
    """

    which: str
    inputs: Any
    seeds: jax.Array
    corrections: list[jax.Array]
    public: Any

    def payloads(self) -> Payloads:
        """What S1 and what S2 get."""
        inputs: Payloads = [[], []] if self.inputs is None else halves(self.inputs)
        return with_material(inputs, self.seeds, self.corrections)


@dataclass
class Order:
    """A task as DS deals it, of which it can deal the same again.

    Attributes:
        task: what is to be done.
        keys: DS's, of this task alone.
        answer: the name of what is asked.
        question: what DS asks, unless somebody else shared a question.
        inputs: digests of what was shared, once it was.
        public: what both servers know in it, likewise.
    """

    task: Task
    keys: Any
    answer: str | None = None
    question: Any = None
    inputs: list[bytes] | None = None
    public: Any = None


class Dealer:
    """DS's keys and programs in one attempt.

    Attributes:
        state: the initial state, paired arrays, of a training that begins.
    """

    def __init__(
        self,
        training: Training,
        draw: Draw,
        initial: Any,
        cluster: ClusterConfig,
        key: jax.Array,
        noise_key: bytes = b"",
    ) -> None:
        """Compiles.

        `draw`: DS's own batches; `initial`: the state of a training that begins, else None; `key`:
        the attempt's master key; `noise_key`: of the noise that DS deals.
        """
        self._noise_key = noise_key
        self._draw, self._cluster = draw, cluster
        self._drawing = threading.Lock()
        self._program = program = secured(training.program)
        self._keys = DealerKeys(key)
        options = options_to_run_often()

        def dealt(function: Any, secrets: Any, public: Any) -> Any:
            def run(key: jax.Array, public: Any) -> Any:
                seeds = jax.random.key_data(server_seeds(key))
                return seeds, deal(function, key, secrets, public)

            lowered = jax.jit(run, compiler_options=options).lower(make_key(0), public)
            return lowered.compile()

        self._programs = {
            TRAIN: dealt(*shapes.step_program(program)),
            GUARD: dealt(*shapes.guard_program(program)),
        }
        for name in training.program.answers:
            self._programs[name] = dealt(*shapes.answer_program(program, name))
        self.state = None if initial is None else share_state(program, self._keys, initial)

    def order(self, task: Task, answer: str | None = None, question: Any = None) -> Order:
        """The next task, with new keys."""
        if task.kind in ("train", "answer"):
            return Order(task, self._keys.take_two(), answer, question)
        return Order(task, self._keys.take() if task.kind == "guard" else None)

    def payloads(self, order: Order) -> Payloads:
        """What S1 and what S2 get."""
        if order.task.kind == "state":
            assert self.state is not None
            return halves(self.state)
        dealt = self.deal(order)
        return [[], []] if dealt is None else dealt.payloads()

    def deal(self, order: Order) -> Dealt | None:
        """What the servers' programs take; None for a task without one.

        Raises:
            BadInput: the batch is not the one that it was: a `feed` has to give the same again.
        """
        kind, inputs, public = order.task.kind, None, None
        if kind == "guard":
            seeds, corrections = self._programs[GUARD](order.keys, None)
            return Dealt(GUARD, None, seeds, corrections, None)
        if kind == "train":
            which, step = TRAIN, order.task.step
            order.public = public = order.public or self._program.schedule(step)
            inputs = self._inputs(order.keys[0], step)
        elif kind == "answer":
            which = str(order.answer)
            if (question := order.question) is not None:
                self._program.check_question(which, question)
                scales = self._program.question_scales(which, question)
                inputs = share_arrays(order.keys[0], question, scales)
        else:
            return None
        if inputs is not None and self._cluster.integrity is not None:  # it may be asked again
            found = digests_of(inputs)
            if order.inputs is not None and found != order.inputs:
                raise BadInput(f"feed: step {order.task.step} has another batch when asked again")
            order.inputs = found
        seeds, corrections = self._programs[which](order.keys[1], public)
        return Dealt(which, inputs, seeds, corrections, public)

    def _inputs(self, key: jax.Array, step: int) -> Any:
        """What DS shares of what a step takes, paired arrays: its batch and noise, or either."""
        program, scales, parts = self._program, self._program.batch_scales, []
        if self._cluster.owner_of(step) == DEALER:
            with self._drawing:  # a `feed` is not asked by two threads at a time
                batch = drawn_batch(program, self._draw, self._cluster.turn_of(DEALER, step))
            parts.append((batch, program.batch_of(scales)))
        if program.deals_noise:
            noise, bits = program.program.noise, program.frac_bits
            assert noise is not None
            parts.append((noise.draw(self._noise_key, step, bits) * 2.0**-bits, scales[1]))
        shared = share_arrays(key, [part for part, _ in parts], [scale for _, scale in parts])
        return tuple(shared) if len(shared) > 1 else next(iter(shared), None)


def drawn_batch(program: SecureProgram, draw: Draw, turn: int) -> Any:
    """An owner's batch. BadInput if a value is out of range."""
    with reading_input():
        batch = draw(turn)
        program.check_batch(batch)
    return batch


def share_batch(program: SecureProgram, key: jax.Array, draw: Draw, turn: int) -> Any:
    """An owner's batch, paired arrays. BadInput if a value is out of range."""
    scales = program.batch_of(program.batch_scales)
    return share_arrays(key, drawn_batch(program, draw, turn), scales)


def noise_key(training: Training, seed: int | None, attempt: int) -> bytes:
    """Of the noise that DS deals in an attempt; with a seed, the first one is the simulation's."""
    noise = training.program.noise
    if noise is None:
        return b""
    if seed is None or attempt == 1:
        return noise_keys(noise, seed)[0]
    return seeded(f"noise of attempt {attempt}", seed)
