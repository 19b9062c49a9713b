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
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.cluster.accounts import Held
from lpgan_jax.cluster.certificates import line_context, load_identity
from lpgan_jax.cluster.conduct import Conduct
from lpgan_jax.cluster.journal import Journal
from lpgan_jax.cluster.line import Line, Listener, dial
from lpgan_jax.cluster.parcels import Parcels, server_programs
from lpgan_jax.cluster.reporting import FAILED, REFUSED, BadInput, Lost, Reporter
from lpgan_jax.cluster.service import Service
from lpgan_jax.cluster.session import GUARD, TRAIN, Session, Task
from lpgan_jax.cluster.settings import DEALER, PROVIDER, SERVERS, ClusterConfig, ServerName
from lpgan_jax.cluster.signatures import Signer, Verifier
from lpgan_jax.cluster.transcript import MOST_MESSAGES, arrays
from lpgan_jax.cluster.wire import (
    Alarm,
    Layout,
    Opening,
    Result,
    buffers,
)
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.exchange import carrying
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.privacy.noise import SEED_BYTES
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

    def __init__(
        self, program: SecureProgram, server: ServerName, line: int, keeps: bool = False
    ) -> None:
        """Compiles.

        `line`: the number of the line to the other server; `keeps`: whether the state before a step
        is there after it.
        """
        self._place = np.asarray([SERVERS.index(server), line], np.uint32)
        self._corrected = server == "s2"
        options = options_to_run_often()
        programs = server_programs(program)
        count = max(of.plan.count for of in programs.values())
        if keeps and count > MOST_MESSAGES:
            raise BadInput(
                f"integrity: a program of {count} messages, expected at most {MOST_MESSAGES}"
            )
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
            which: of.compile(donate=which == TRAIN and not keeps, options=options)
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
        self,
        state: Any,
        payload: memoryview,
        inputs: memoryview,
        public: Any,
        noise: Secret | None = None,
    ) -> tuple[Any, Any]:
        """A step: the state after it, and own shares of what SP is told.

        Args:
            state: own share.
            payload: what DS deals.
            inputs: own share of a batch.
            public: what both servers know.
            noise: own share of the noise, if servers draw it.
        """
        batch = self._placed(self._parcels.inputs, inputs)
        if (size := self.sizes.noise) > 0:
            noise, payload = self._placed(self._parcels.noise, payload[:size]), payload[size:]
        if noise is not None:
            batch = batch, noise
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
    journal = Journal(f"{config.state}/results/{server}")
    session = Session(
        config,
        server,
        program_file,
        functools.partial(_lost, reporter),
        _Outbox(journal, reporter).add,
    )
    identity = load_identity(config, server)
    service = Service(config, identity, session, journal, reporter)
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
    conduct = None
    if opening.checked:
        with reporter.phase("joining", on=other, limit_s=wait_s + _BEYOND_S):
            conduct = Conduct(
                Signer(config, identity, server),
                Verifier(config, identity),
                line,
                session.accounts,
                opening.attempt,
                wait_s,
            )
    with closing(line), carrying(conduct.witness if conduct else line) as number:
        with reporter.phase("compiling", limit_s=config.timeouts.start_s):
            training = training_of(settings)
            program = secured(training.program)
            _agree(training, opening, session)
            programs = Programs(program, server, number, keeps=opening.checked)
            state = None
            if opening.save is not None:
                _, tree = checkpoint.load_share(config.state, server, opening.start)
                state = programs.state_of(program, tree)
                if opening.checked:
                    session.accounts.begin(state)
        start_s = config.timeouts.start_s
        with reporter.phase("comparing with", on=other, limit_s=start_s + _BEYOND_S):
            line.agree(agreement.short(opening.functions) | programs.rounds, start_s)
        checkpoint.drop_shares(config.state, server, after=opening.start)
        noise_key = secrets.token_bytes(SEED_BYTES)
        shown = opening.checked and program.servers_draw is not None
        session.prepare(programs.sizes, noise_key if shown else b"")
        work = _Work(
            config=config,
            training=training,
            server=server,
            other=other,
            attempt=opening.attempt,
            line=line,
            programs=programs,
            session=session,
            journal=journal,
            reporter=reporter,
            conduct=conduct,
            noise_key=noise_key,
        )
        work.run(state)


_BEYOND_S = 5.0  # after its own limit, the line has said what was wrong
_SWITCH_S = 1e-4  # another thread of Python's gives way after this, so that a message is not late


def _lost(reporter: Reporter, role: str, reason: str, over: bool = False) -> None:
    reporter.fail(f"lost {role}: {reason}", REFUSED if over else FAILED, blames=role)


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


class _Outbox:
    """The journal of results, and a word in the log when it has grown."""

    def __init__(self, journal: Journal, reporter: Reporter) -> None:
        self._journal, self._reporter = journal, reporter
        self._many = 2**28  # bytes

    def add(self, result: Held) -> None:
        """A result for SP."""
        try:
            self._journal.append(result.head, result.payload)
        except OSError as error:  # in a thread of gRPC's, too
            self._reporter.fail(f"results: {error}")
        if (waiting := self._journal.waiting) > self._many:
            self._many = 2 * waiting
            self._reporter.event(
                "warning",
                reason=f"{waiting / 1e6:.0f} MB of results wait for {PROVIDER}, and stay on this "
                "disk until it has come for them",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """The tasks of an attempt, one after the other."""

    config: ClusterConfig
    training: Training
    server: ServerName
    other: str
    attempt: int
    line: Line
    programs: Programs
    session: Session
    journal: Journal
    reporter: Reporter
    conduct: Conduct | None
    noise_key: bytes

    def run(self, state: Any) -> None:
        """Do what DS says, until this process ends."""
        limits = self.config.timeouts
        limit: float | None = limits.start_s  # until the other server is prepared as well
        finished = False
        while True:
            self.reporter.set(ahead=self.session.ahead)
            with self.reporter.phase("waiting for", on=DEALER, limit_s=limit):
                task = self.session.next_task()
            if self.conduct is not None:
                self._wait_for_checks(self.session.accounts.wait_for_room)
            limit = None if finished else limits.wait_s  # None: for whoever asks
            kind, step = task.parcel.kind, task.parcel.step
            if kind == "state":
                state = self.programs.state_from(task.payload)
            elif kind == "train":
                assert state is not None
                state = self._train(state, task)
            elif kind == "guard":
                assert state is not None
                self._guard(state, task)
            elif kind == "answer":
                assert state is not None
                self._answer(state, task)
            elif kind == "checkpoint":
                assert state is not None
                self._wait_for_vouchers()
                with self.reporter.phase("saving", limit_s=limits.wait_s):
                    self.journal.sync()
                    self._save(state, step, str(task.parcel.save))
            elif kind == "finish":
                assert state is not None
                self._finish(state, task)
                finished, limit = True, None
            self.session.done()

    def _train(self, state: Any, task: Task) -> Any:
        step, view = task.parcel.step, memoryview(task.payload)
        owner = self.config.owner_of(step)
        if owner == DEALER:
            size = self.programs.sizes.inputs
            inputs, material = view[:size], view[size:]
        else:
            with self.reporter.phase("waiting for", on=owner, limit_s=self.config.timeouts.wait_s):
                inputs, material = memoryview(self.session.inputs_of(owner, step)), view
        started, program, noise = time.monotonic(), secured(self.training.program), None
        if (of := program.servers_draw) is not None:
            bits = program.frac_bits
            noise = Secret(jnp.asarray(of.share(self.noise_key, step, bits)), bits)
        with self._talking("step with", TRAIN, f"step {step}"):
            public = program.schedule(step)
            after, told = self.programs.train(state, material, inputs, public, noise)
        seconds = time.monotonic() - started
        self.reporter.set(step=step + 1, s_per_step=round(seconds, 4))
        payload = _bytes(told)
        self._hand_over(task, "told" if payload else "step", payload, seconds)
        self._commit(task, state, after, payload)
        return after

    def _guard(self, state: Any, task: Task) -> None:
        """See whether a step's values were in range; if not, this session ends."""
        step, limit = task.parcel.step, self.config.timeouts.wait_s
        with self._talking("looking at ranges with", GUARD, f"guard at step {step}"):
            outside, share = self.programs.guard(memoryview(task.payload))
        payload = _bytes(outside)
        self._commit(task, state, state, payload)
        serial, beyond = task.parcel.serial, limit + _BEYOND_S
        if self.conduct is not None:
            self._wait_for_checks(lambda: self.session.accounts.wait_until_heard(serial))
        opened = None
        with self.reporter.phase("looking at ranges with", on=self.other, limit_s=beyond):
            if self.conduct is None:
                own = Alarm(attempt=self.attempt, serial=serial, share=share)
                other = self.line.swap_notes(own, limit)
            else:
                opened = self.conduct.open_alarm(serial, share)
                other = opened.other
        alarm = (share + other.share) % 2**64
        if alarm:
            self._hand_over(task, "alarm", payload)
        if opened is not None:
            self.session.accounts.open(opened)
        if alarm:
            self._end_by_alarm(task)

    def _end_by_alarm(self, task: Task) -> None:
        step, limits = task.parcel.step, self.config.timeouts
        self._wait_for_vouchers()
        self.session.end()
        self.journal.sync()
        self.reporter.event("out of range", step=step)
        with self.reporter.phase("telling", on=PROVIDER, limit_s=limits.wait_s + _BEYOND_S):
            # DS, which waits as well, has half of its patience left to hear why.
            order = self.attempt, task.parcel.serial
            told = self.journal.wait_until_received(order, limits.wait_s / 2)
        reason = f"values were out of range after step {step}"
        reason += f": {PROVIDER} knows which" if told else f"; {PROVIDER} was not there to hear it"
        self.session.refuse(reason, _TO_HEAR_WHY_S)
        raise BadInput(reason)

    def _answer(self, state: Any, task: Task) -> None:
        name, view, question = str(task.parcel.answer), memoryview(task.payload), task.question
        size = 0 if question is not None else self.programs.sizes.questions[name]
        started = time.monotonic()
        with self._talking("answering with", name, f"answer {name!r} at step {task.parcel.step}"):
            asked = view[:size] if question is None else memoryview(question)
            payload = _bytes(self.programs.answer(name, state, view[size:], asked))
        # DS does not know what somebody else asked, and so cannot look.
        known = question is None
        self._hand_over(task, "answer", payload, time.monotonic() - started, known)
        if known:
            self._commit(task, state, state, payload)

    def _finish(self, state: Any, task: Task) -> None:
        if self.conduct is not None:
            self.conduct.witness.begin()
        payload = _bytes(arrays(secured(self.training.program).learnt(state)))
        self._hand_over(task, "learnt", payload)
        self._commit(task, state, state, payload)
        self._wait_for_vouchers()
        self.journal.sync()
        self.reporter.event("trained", step=task.parcel.step)

    def _commit(self, task: Task, before: Any, after: Any, payload: bytes) -> None:
        """Say to the other server and to DS what was done, if DS checks it."""
        if self.conduct is None:
            return
        beyond = self.config.timeouts.wait_s + _BEYOND_S
        with self.reporter.phase("comparing with", on=self.other, limit_s=beyond):
            self.conduct.commit(task.parcel.serial, before, after, payload)

    def _wait_for_vouchers(self) -> None:
        if self.conduct is not None:
            self._wait_for_checks(self.session.accounts.wait_for_all)

    def _wait_for_checks(self, wait: Callable[[], None]) -> None:
        limit = self.config.timeouts.start_s
        with self.reporter.phase("waiting for checks of", on=DEALER, limit_s=limit):
            wait()

    @contextmanager
    def _talking(self, phase: str, which: str, name: str) -> Iterator[None]:
        """Around a program's run: what is wrong with the line is said by the line."""
        limit = self.config.timeouts.wait_s
        with self.reporter.phase(phase, on=self.other, limit_s=limit + _BEYOND_S):
            rounds = self.programs.rounds_of(which)
            self.line.begin(name, rounds, limit)
            if self.conduct is not None:
                self.conduct.witness.begin()
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                raise self.line.failure or error from error
            self.line.finish()

    def _hand_over(
        self, task: Task, kind: Any, payload: bytes, seconds: float = 0.0, vouched: bool = True
    ) -> None:
        """A result is ready; `vouched`: whether it waits for DS, if DS checks."""
        parcel = task.parcel
        head = Result(
            attempt=self.attempt,
            serial=parcel.serial,
            kind=kind,
            step=parcel.step + (parcel.kind == "train"),
            seconds=seconds,
            size=len(payload),
            spent=parcel.spent,
        )
        held = Held(head, payload, parcel.request)
        if self.conduct is not None and vouched:
            self.session.accounts.hold(parcel.serial, held)
        else:
            self.session.hand_over(held)

    def _save(self, state: Any, step: int, name: str) -> None:
        share = arrays(by_name(state))
        keep = self.training.keep_checkpoints
        checkpoint.save_share(self.config.state, self.server, step, name, share, keep)


def _bytes(tree: Any) -> bytes:
    return b"".join(part.tobytes() for part in buffers(tree))
