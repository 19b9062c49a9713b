"""S1 and S2: each runs its side of the programs on its own shares.

Both compile the same program (`mpc.server`), each for itself, and each round of it is a message on
the line between them. A worker is given one share of everything, its own seeds, and (S2)
corrections; nothing else ever reaches it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import jax
import numpy as np

from lpgan_jax.cluster.certificates import line_context, load_identity
from lpgan_jax.cluster.journal import Journal
from lpgan_jax.cluster.line import Alarm, Line, Listener, dial
from lpgan_jax.cluster.parcels import Parcels, server_programs
from lpgan_jax.cluster.reporting import BadInput, Lost, Reporter
from lpgan_jax.cluster.service import Service
from lpgan_jax.cluster.session import GUARD, TRAIN, Session, Task
from lpgan_jax.cluster.settings import DEALER, PROVIDER, SERVERS, ClusterConfig, ServerName
from lpgan_jax.cluster.wire import Layout, Opening, Result, buffers
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.exchange import carrying
from lpgan_jax.mpc.secret import is_secret
from lpgan_jax.programs import SecureProgram, Training, agreement, secured
from lpgan_jax.programs.simulation import Tree, by_name, restore_state
from lpgan_jax.training import checkpoint
from lpgan_jax.training.building import training_of


class Programs:
    """A server's compiled programs, and what they take and give: this server's shares.

    Attributes:
        sizes: bytes of payload of each kind of parcel.
        rounds: a digest of the rounds of each program.
    """

    def __init__(self, program: SecureProgram, server: ServerName, line: int) -> None:
        """Compiles. `line`: the number of the line to the other server."""
        self._place = np.asarray([SERVERS.index(server), line], np.uint32)
        self._corrected = server == "s2"
        options = options_to_run_often()
        programs = server_programs(program)
        self._parcels = Parcels(program, server, programs)
        self.sizes = self._parcels.sizes
        # S1 has no use for corrections, but its program has a place for them.
        self._nothing = {
            which: [] if self._corrected else unwritten(of.corrections)
            for which, of in programs.items()
        }
        self._plans = {which: of.plan for which, of in programs.items()}
        self._elements: Any = None
        # Only a step's secrets are replaced.
        self._compiled = {
            which: of.compile(donate=which == TRAIN, options=options)
            for which, of in programs.items()
        }
        self.rounds = {
            f"the rounds of {which or 'the step'}": plan.digest
            for which, plan in self._plans.items()
        }

    def _placed(self, shapes: Any, payload: bytes | bytearray | memoryview) -> Any:
        """A pytree of own shares, from the bytes of its leaves."""
        return jax.tree.unflatten(jax.tree.structure(shapes), Layout.of(shapes).split(payload))

    def state_from(self, payload: bytearray) -> Any:
        """The initial state that DS sent."""
        return self._placed(self._parcels.state, payload)

    def state_of(self, program: SecureProgram, tree: Tree) -> Any:
        """The state of a checkpoint. ValueError if it is of another program."""
        restored = restore_state(program, jax.tree.map(lambda half: half[None], tree))
        return jax.tree.map(lambda half: half[0], restored)

    def rounds_of(self, which: str) -> int:
        """Messages that one of `server_programs` takes."""
        return self._plans[which].count

    def _run(self, which: str, payload: memoryview, secrets: Any, public: Any) -> Any:
        """A task's material is its payload, which is there once: it masks no other value."""
        seed, corrections = self._parcels.material(which, payload)
        dealt = corrections if self._corrected else self._nothing[which]
        _, outputs = self._compiled[which](self._place, seed, dealt, secrets, public)
        return jax.block_until_ready(outputs)

    def train(
        self, state: Any, payload: memoryview, inputs: memoryview, public: Any
    ) -> tuple[Any, Any]:
        """A step: the state after it, and own shares of what SP is told."""
        batch = self._placed(self._parcels.inputs, inputs)
        state, told, self._elements = self._run(TRAIN, payload, (state, batch), public)
        return state, arrays(told)

    def guard(self, payload: memoryview) -> tuple[np.ndarray, int]:
        """Of the last step, own shares: which tensors were out of range, and the alarm."""
        outside, alarm = arrays(self._run(GUARD, payload, self._elements, None))
        return outside, int(alarm)

    def answer(self, name: str, state: Any, payload: memoryview, question: memoryview) -> Any:
        """Own share of an answer."""
        asked = self._placed(self._parcels.questions[name], question)
        return arrays(self._run(name, payload, (state, asked), None))


def unwritten(shapes: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """Arrays of zeros that take no memory where JAX takes a processor's memory as it is.

    All are the same pages, which nobody writes: the system has one page of zeros for them.
    """
    size = max((math.prod(of.shape) * of.dtype.itemsize for of in shapes), default=0)
    pages = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made: list[jax.Array] = jax.device_put(
        [np.frombuffer(pages, of.dtype, math.prod(of.shape)).reshape(of.shape) for of in shapes]
    )
    return made


def arrays(tree: Any) -> Any:
    """Shares as NumPy arrays."""

    def leaf(value: Any) -> np.ndarray:
        return np.asarray(value.share if is_secret(value) else value)

    return jax.tree.map(leaf, tree, is_leaf=is_secret)


# The worker ---------------------------------------------------------------------------------------


def serve(
    config: ClusterConfig, server: ServerName, program_file: str | None, reporter: Reporter
) -> None:
    """Be a server for one attempt; never returns by itself.

    Args:
        config: of the cluster.
        server: s1 or s2.
        program_file: this server's own copy, if a program is trained.
        reporter: for reports.

    Raises:
        ConfigError, FileNotFoundError: bad input.
        OSError: a port is taken, the disk is full.
    """
    other = SERVERS[1 - SERVERS.index(server)]
    session = Session(
        config,
        server,
        program_file,
        lambda role, reason: reporter.fail(f"lost {role}: {reason}", blames=role),
    )
    journal = Journal(f"{config.state}/results/{server}")
    service = Service(config, load_identity(config, server), session, journal, reporter)
    context = line_context(config, server)
    listener = Listener(config, context) if server == "s1" else None
    reporter.event("listening", port=service.port, attempt=session.describe().attempt)
    with reporter.phase("idle, no attempt yet of", on=DEALER, limit_s=None):
        opening, settings = session.wait_for_opening()
    reporter.event("opened", attempt=opening.attempt, start=opening.start)
    reporter.set(step=opening.start, steps=opening.steps)
    journal.forget(after=opening.start if opening.save else -1)
    wait_s = config.timeouts.wait_s
    with reporter.phase("joining", on=other, limit_s=wait_s + _BEYOND_S):
        if listener is not None:
            line = listener.accept(opening.attempt, wait_s, functools.partial(_refused, reporter))
        else:
            line = dial(config, context, opening.attempt, wait_s)
    reporter.gauge(lambda: reporter.measured(other, sent=line.sent, received=line.received))
    sys.setswitchinterval(_SWITCH_S)
    with closing(line), carrying(line) as number:
        with reporter.phase("compiling", limit_s=config.timeouts.start_s):
            training = training_of(settings)
            program = secured(training.program)
            _agree(training, opening, session)
            programs = Programs(program, server, number)
            state = None
            if opening.save is not None:
                _, tree = checkpoint.load_share(config.state, server, opening.start)
                state = programs.state_of(program, tree)
        start_s = config.timeouts.start_s
        with reporter.phase("comparing with", on=other, limit_s=start_s + _BEYOND_S):
            line.agree(agreement.short(opening.functions) | programs.rounds, start_s)
        checkpoint.drop_shares(config.state, server, after=opening.start)
        session.prepare(programs.sizes)
        _Work(config, training, server, other, line, programs, session, journal, reporter).run(
            state, opening.attempt
        )


_BEYOND_S = 5.0  # after its own limit, the line has said what was wrong
_SWITCH_S = 1e-4  # another thread of Python's gives way after this, so that a message is not late


def _refused(reporter: Reporter, reason: str) -> None:
    reporter.event("refused a caller on the line", reason=reason)


_TO_HEAR_WHY_S = 2.0


def _agree(training: Training, opening: Opening, session: Session) -> None:
    """Check that DS has the same program, before anything is shared.

    Raises:
        Lost: it has another one; names where it differs. DS has been told.
    """
    found = agreement.difference(training, opening.functions)
    if found is None and opening.steps != training.steps:
        found = f"steps: {training.steps}, and {opening.steps} there"
    if found is not None:
        reason = f"the program differs from that of {DEALER}: {found}"
        session.refuse(reason, _TO_HEAR_WHY_S)
        raise Lost(DEALER, reason)


@dataclasses.dataclass
class _Work:
    """The tasks of an attempt, one after the other."""

    config: ClusterConfig
    training: Training
    server: ServerName
    other: str
    line: Line
    programs: Programs
    session: Session
    journal: Journal
    reporter: Reporter
    many: int = 2**28
    """Bytes of results that wait for SP, beyond which the log says so."""

    def run(self, state: Any, attempt: int) -> None:
        """Do what DS says, until this process ends."""
        limits = self.config.timeouts
        limit: float | None = limits.start_s  # until the other server is prepared as well
        finished = False
        while True:
            self.reporter.set(ahead=self.session.ahead)
            with self.reporter.phase("waiting for", on=DEALER, limit_s=limit):
                task = self.session.next_task()
            limit = None if finished else limits.wait_s  # None: for whoever asks
            answer = None
            kind, step = task.parcel.kind, task.parcel.step
            if kind == "state":
                state = self.programs.state_from(task.payload)
            elif kind == "train":
                assert state is not None
                state = self._train(state, task, attempt)
            elif kind == "guard":
                self._guard(task, attempt)
            elif kind == "answer":
                assert state is not None
                answer = self._answer(state, task, attempt)
            elif kind == "checkpoint":
                assert state is not None
                with self.reporter.phase("saving", limit_s=limits.wait_s):
                    self.journal.sync()
                    self._save(state, step, str(task.parcel.save))
            elif kind == "finish":
                assert state is not None
                learnt = secured(self.training.program).learnt(state)
                payload = _bytes(arrays(learnt))
                self._publish(attempt, task, "learnt", 0.0, payload)
                self.journal.sync()
                self.reporter.event("trained", step=step)
                finished, limit = True, None
            self.session.done(task, answer)

    def _train(self, state: Any, task: Task, attempt: int) -> Any:
        step, view = task.parcel.step, memoryview(task.payload)
        owner = self.config.owner_of(step)
        if owner == DEALER:
            size = self.programs.sizes.inputs
            inputs, material = view[:size], view[size:]
        else:
            with self.reporter.phase("waiting for", on=owner, limit_s=self.config.timeouts.wait_s):
                inputs, material = memoryview(self.session.inputs_of(owner, step)), view
        started = time.monotonic()
        with self._talking("step with", TRAIN, f"step {step}"):
            public = secured(self.training.program).schedule(step)
            state, told = self.programs.train(state, material, inputs, public)
        seconds = time.monotonic() - started
        self.reporter.set(step=step + 1, s_per_step=round(seconds, 4))
        payload = _bytes(told)
        self._publish(attempt, task, "told" if payload else "step", seconds, payload)
        return state

    def _guard(self, task: Task, attempt: int) -> None:
        """See whether a step's values were in range; if not, this session ends."""
        step, limit = task.parcel.step, self.config.timeouts.wait_s
        with self._talking("looking at ranges with", GUARD, f"guard at step {step}"):
            outside, share = self.programs.guard(memoryview(task.payload))
        beyond = limit + _BEYOND_S
        with self.reporter.phase("looking at ranges with", on=self.other, limit_s=beyond):
            other = self.line.swap_notes(Alarm(share=share), limit).share
        if not (share + other) % 2**64:
            return
        self.session.end()
        self._publish(attempt, task, "alarm", 0.0, _bytes(outside))
        self.journal.sync()
        self.reporter.event("out of range", step=step)
        with self.reporter.phase("telling", on=PROVIDER, limit_s=beyond):
            # DS, which waits as well, has half of its patience left to hear why.
            told = self.journal.wait_until_received((attempt, task.parcel.serial), limit / 2)
        reason = f"values were out of range after step {step}"
        reason += f": {PROVIDER} knows which" if told else f"; {PROVIDER} was not there to hear it"
        self.session.refuse(reason, _TO_HEAR_WHY_S)
        raise BadInput(reason)

    def _answer(self, state: Any, task: Task, attempt: int) -> bytes:
        name, view, question = str(task.parcel.answer), memoryview(task.payload), task.question
        size = 0 if question is not None else self.programs.sizes.questions[name]
        started = time.monotonic()
        with self._talking("answering with", name, f"answer {name!r} at step {task.parcel.step}"):
            asked = view[:size] if question is None else memoryview(question)
            payload = _bytes(self.programs.answer(name, state, view[size:], asked))
        if task.parcel.request is None:
            self._publish(attempt, task, "answer", time.monotonic() - started, payload)
        return payload

    @contextmanager
    def _talking(self, phase: str, which: str, name: str) -> Iterator[None]:
        """Around a program's run: what is wrong with the line is said by the line."""
        limit = self.config.timeouts.wait_s
        with self.reporter.phase(phase, on=self.other, limit_s=limit + _BEYOND_S):
            self.line.begin(name, self.programs.rounds_of(which), limit)
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                raise self.line.failure or error from error
            self.line.finish()

    def _publish(self, attempt: int, task: Task, kind: Any, seconds: float, payload: bytes) -> None:
        trained = task.parcel.kind == "train"
        result = Result(
            attempt=attempt,
            serial=task.parcel.serial,
            kind=kind,
            step=task.parcel.step + trained,
            seconds=seconds,
            size=len(payload),
        )
        self.journal.append(result, payload)
        if (waiting := self.journal.waiting) > self.many:
            self.many = 2 * waiting
            self.reporter.event(
                "warning",
                reason=f"{waiting / 1e6:.0f} MB of results wait for {PROVIDER}, and stay on this "
                "disk until it has come for them",
            )

    def _save(self, state: Any, step: int, name: str) -> None:
        share = arrays(by_name(state))
        keep = self.training.keep_checkpoints
        checkpoint.save_share(self.config.state, self.server, step, name, share, keep)


def _bytes(tree: Any) -> bytes:
    return b"".join(part.tobytes() for part in buffers(tree))
