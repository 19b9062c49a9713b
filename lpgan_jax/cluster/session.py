"""What a server knows of the training that it takes part in, and what it accepts from whom.

No gRPC here, and no JAX program: messages come in, tasks come out, and all that is refused leaves
everything as it was.

An attempt has a number, higher than all before it; a server writes it down before it accepts
anything of that attempt. So nothing of an earlier attempt can be replayed, and DS, who takes a new
master key for each attempt, never has two values masked by one mask.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lpgan_jax.cluster import wire
from lpgan_jax.cluster.accounts import Accounts, Held, Publish
from lpgan_jax.cluster.settings import (
    DEALER,
    PROVIDER,
    ClusterConfig,
    ServerName,
    changed_field,
    with_own_code,
)
from lpgan_jax.cluster.wire import (
    Description,
    Forbidden,
    Message,
    Opening,
    Parcel,
    Progress,
    Question,
    Release,
    Request,
    Reveal,
    Save,
    Unexpected,
    Watching,
)
from lpgan_jax.common.files import atomic_write
from lpgan_jax.programs import agreement
from lpgan_jax.training import checkpoint
from lpgan_jax.training.config import ConfigError, Settings, from_json

_MOST_WAITING = 64  # questions in all

TRAIN, GUARD = "", "(guard)"
"""The names of what a step takes, and a look at its values' ranges, beside those of answers."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of payload that this server expects.

    Attributes:
        state: shares of the initial state.
        inputs: shares of a batch.
        noise: shares of a step's noise, if DS deals it.
        questions: shares of a question, by the name of the answer.
        material: seed and corrections, by that name, and of a step and the guard (`parcels`).
    """

    state: int
    inputs: int
    noise: int
    questions: dict[str, int]
    material: dict[str, int]


@dataclass(frozen=True)
class Task:
    """Something to do.

    Attributes:
        parcel: of DS.
        payload: its own.
        question: that somebody else shared for it.
    """

    parcel: Parcel
    payload: bytearray
    question: bytearray | None = None


@dataclass
class _Wish:
    """A question that waits: who asks what, its shares (or None: DS's), where the answer goes."""

    asker: str
    request: Question
    shares: bytearray | None
    answer: Future[Held]


class Session:
    """A server's side of a session; thread-safe.

    Args:
        config: of the cluster.
        server: s1 or s2.
        program: this server's own file of a program, if one is trained.
        lost: called with (role, reason) when a sender of the attempt is gone: the attempt is over.
            And with (ds, reason, True) when DS has caught a server: the session is. It need not
            return.
        publish: takes results for SP.

    Attributes:
        accounts: what DS may look at, where it checks what servers do.
    """

    def __init__(
        self,
        config: ClusterConfig,
        server: ServerName,
        program: str | None,
        lost: Callable[..., None],
        publish: Publish,
    ) -> None:
        self.config, self.server = config, server
        self._program = program
        self._report_loss, self._over = lost, False
        self._file = Path(config.state) / f"session-{server}.json"
        self._asked: dict[str, int] = {}
        self._attempt, self._known, self._functions = self._remembered()
        self._noise_key = b""
        self._saves = self._intact_saves()
        self._changed = threading.Condition()
        self._opening: Opening | None = None
        self._sizes: Sizes | None = None
        self._bound: set[str] = set()
        self._serial = dict.fromkeys(config.owners, 0)
        self._settings: Settings | None = None
        self._next_step = self._steps = 0
        self._watched = False
        self._finished = False
        self._received = self._done = 0
        self._inputs: dict[str, queue.Queue[tuple[int, bytearray]]] = {
            owner: queue.Queue(config.look_ahead) for owner in config.owners
        }
        self._tasks: queue.Queue[Task] = queue.Queue(config.look_ahead)
        self._wishes: dict[str, _Wish] = {}
        self._refused: str | None = None
        self._publish = publish
        self.accounts = Accounts(self._changed, self.hand_over)

    # What is written down ---------------------------------------------------------------------

    def _remembered(self) -> tuple[int, str | None, dict[str, str]]:
        if not self._file.exists():
            return 0, None, {}
        try:
            known = json.loads(self._file.read_bytes())
            session, attempt, config = known["session"], int(known["attempt"]), known["config"]
            functions = dict(known.get("functions") or {})
            self._asked = {str(role): int(n) for role, n in known.get("asked", {}).items()}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self._file}: damaged, expected what a session wrote") from None
        if session != self.config.session:
            raise ConfigError(
                f"{self._file}: of session {session!r}, expected {self.config.session!r}: "
                "every session needs a directory (state) of its own"
            )
        if config is None:  # no attempt has got so far that this program was agreed on
            return attempt, None, {}
        try:
            from_json(str(config), str(self._file))
            if not functions:
                raise ConfigError(f"{self._file}: has no functions")
        except ConfigError as error:  # older versions wrote YAML, and no functions
            raise ConfigError(
                f"{error}; a session of another version cannot go on: begin another session, "
                "with a directory (state) of its own"
            ) from None
        return attempt, str(config), functions

    def _write_down(self, attempt: int) -> None:
        known = {
            "session": self.config.session,
            "attempt": attempt,
            "config": self._known,
            "functions": self._functions,
            "asked": self._asked,
        }
        atomic_write(self._file, json.dumps(known).encode())

    def _intact_saves(self) -> dict[int, str]:
        """Checkpoints whose checksums are right."""
        state, found = self.config.state, {}
        for step in checkpoint.saves(state, self.server):
            try:
                found[step] = checkpoint.load_share(state, self.server, step)[0]
            except checkpoint.CheckpointError:
                continue
        return found

    # For everybody ----------------------------------------------------------------------------

    def check(self, message: Message, sender: str) -> None:
        """Check what a message says of itself.

        Args:
            message: any.
            sender: the role that was authenticated, and may send it.

        Raises:
            Forbidden: another role's message.
            Unexpected: of another session.
        """
        if message.role != sender:
            raise Forbidden(f"role: {message.role!r}, expected {sender!r}, as the certificate says")
        if message.session != self.config.session:
            raise Unexpected(f"session: {message.session!r}, expected {self.config.session!r}")

    def describe(self) -> Description:
        """What there is to know for those who want to begin."""
        with self._changed:
            return Description(
                session=self.config.session,
                role=self.server,
                phase="busy" if self._opening else "ready",
                attempt=self._attempt,
                start=self._opening.start if self._opening else 0,
                prepared=self._sizes is not None,
                config=self._known,
                functions=self._functions,
                steps=self._steps,
                saves=[Save(step=step, name=name) for step, name in sorted(self._saves.items())],
            )

    # For DS -----------------------------------------------------------------------------------

    def open(self, opening: Opening) -> None:
        """Begin an attempt.

        Raises:
            Unexpected: there is one already, or it does not fit what is known.
            Malformed: its configuration is none.
        """
        settings = self._read(opening.config)
        with self._changed:
            if self._opening is not None:
                raise Unexpected(f"attempt: busy with attempt {self._attempt}")
            if opening.attempt <= self._attempt:
                raise Unexpected(
                    f"attempt: {opening.attempt}, expected more than {self._attempt}: an attempt "
                    "is never repeated"
                )
            if (opening.start > 0) != (opening.save is not None) or (
                opening.save is not None and self._saves.get(opening.start) != opening.save
            ):
                raise Unexpected(f"start: step {opening.start}, which has no such checkpoint here")
            if opening.checked != (self.config.integrity is not None):
                raise Unexpected(
                    f"integrity: {DEALER} {'checks' if opening.checked else 'does not check'} what "
                    "servers do, expected as this server's configuration says"
                )
            if opening.start > opening.steps:
                raise Unexpected(f"start: step {opening.start} of {opening.steps}")
            try:
                self._write_down(opening.attempt)
            except OSError as error:
                raise Unexpected(f"state: cannot be written here: {error}") from None
            self._attempt, self._settings = opening.attempt, settings
            self._opening, self._next_step, self._steps = opening, opening.start, opening.steps
            self._changed.notify_all()
        limit = self.config.timeouts.wait_s
        timer = threading.Timer(
            limit, self._unless_watched, [f"it did not come back in {limit:g} s"]
        )
        timer.daemon = True
        timer.start()

    def _unless_watched(self, reason: str) -> None:
        if not self._watched:
            self._lost(DEALER, reason)

    def watch(self, watching: Watching) -> None:
        """An owner begins to watch an attempt; `gone` when it ends to.

        Raises:
            Unexpected: it is another attempt.
        """
        with self._changed:
            if self._opening is None or watching.attempt != self._attempt:
                raise Unexpected(f"attempt: {watching.attempt}, which is not going on")
            if watching.role == DEALER and self._watched:
                raise Unexpected(f"{DEALER} watches this attempt already")
            self._watched |= watching.role == DEALER

    def gone(self, owner: str) -> None:
        """An owner has ended to watch. DS is there from an attempt's beginning to its end."""
        if owner == DEALER:
            self._lost(DEALER, "it is gone")

    def caught(self, reason: str) -> None:
        """DS has found a server that deviates, and ends the session."""
        self._report_loss(DEALER, f"it ended this session: {reason}", True)

    def _lost(self, role: str, reason: str) -> None:
        if not self._over:
            self._report_loss(role, reason)

    def _read(self, text: str) -> Settings:
        try:
            settings = from_json(text, "config")
            before = None if self._known is None else from_json(self._known, "config")
        except ConfigError as error:
            raise wire.Malformed(str(error)[:500]) from None
        if before is not None and (field := changed_field(before, settings)) is not None:
            raise Unexpected(f"config: {field} differs from what this session trains with")
        try:
            return with_own_code(self.config, settings, self._program)
        except ConfigError as error:
            raise Unexpected(str(error)) from None

    def progress(self, seen: Progress | None, seconds: float) -> Progress:
        """What DS should know, once it differs from what it has seen, or after so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._progress() != seen, seconds)
            return self._progress()

    def _progress(self) -> Progress:
        requests = [
            Request(
                name=name,
                asker=wish.asker,
                answer=wish.request.answer,
                own_question=wish.shares is not None,
            )
            for name, wish in self._wishes.items()
        ]
        commitments, opened = self.accounts.outstanding()
        return Progress(
            attempt=self._attempt,
            prepared=self._sizes is not None,
            received=self._received,
            done=self._done,
            requests=requests,
            refused=self._refused,
            commitments=commitments,
            opened=opened,
            noise_key=self._noise_key,
        )

    def of_attempt(self, message: Reveal | Release) -> None:
        """Check that DS means the attempt that goes on, and that it checks what servers do.

        Raises:
            Unexpected: it is another, or DS does not.
        """
        if self._opening is None or message.attempt != self._attempt:
            raise Unexpected(f"attempt: {message.attempt}, which is not going on")
        if not self._opening.checked:
            raise Unexpected(f"{DEALER} does not check servers in this session")

    def accept(self, sender: str, frames: Iterator[bytes]) -> None:
        """Take the parcels of a stream, until it ends; returns when it does.

        The first good parcel binds the stream to the attempt. If a bound stream ends before the
        attempt does, its sender is lost. Blocks while enough parcels wait to be worked on.

        Raises:
            Refused: the stream is not, or no longer, accepted.
        """
        with self._stream(sender) as check:
            for head in frames:
                parcel = wire.decode(Parcel, head)
                check(parcel)
                payload = wire.receive(frames, parcel.size)
                self._put(sender, parcel, payload)

    @contextmanager
    def _stream(self, sender: str) -> Iterator[Callable[[Parcel], None]]:
        mine = False

        def check(parcel: Parcel) -> None:
            nonlocal mine
            self.check(parcel, sender)
            with self._changed:
                if sender in self._bound and not mine:
                    raise Unexpected(f"{sender} sends in another stream already")
                self._check_parcel(sender, parcel)
                self._bound.add(sender)
                mine = True

        reason = "its stream ended"
        try:
            yield check
        except Exception as error:
            reason = f"its stream broke: {str(error) or type(error).__name__}"
            raise
        finally:
            if mine and not self._has_given_all(sender):
                self._lost(sender, reason)

    def _has_given_all(self, owner: str) -> bool:
        """Whether an owner, other than DS, has had all its turns."""
        if owner == DEALER or self._opening is None:
            return False
        first, end = (self.config.turn_of(owner, s) for s in (self._opening.start, self._steps))
        return self._serial[owner] >= end - first

    def _check_parcel(self, sender: str, parcel: Parcel) -> None:
        sizes = self._sizes
        if sizes is None:
            raise Unexpected("there is no attempt that is prepared")
        if parcel.attempt != self._attempt:
            raise Unexpected(f"attempt: {parcel.attempt}, expected {self._attempt}")
        if parcel.serial != self._serial[sender]:
            raise Unexpected(f"serial: {parcel.serial}, expected {self._serial[sender]}")
        if parcel.kind == "inputs":
            self._check_inputs(sender, parcel, sizes)
        elif sender != DEALER:
            raise Forbidden(f"kind: {parcel.kind} is for {DEALER} to send")
        else:
            self._check_task(parcel, sizes)

    def _check_inputs(self, sender: str, parcel: Parcel, sizes: Sizes) -> None:
        if sender == DEALER:
            raise Unexpected(f"kind: inputs of {DEALER} come with its tasks")
        assert self._opening is not None
        first = self.config.turn_of(sender, self._opening.start)
        if self.config.owner_of(parcel.step) != sender or parcel.serial != (
            self.config.turn_of(sender, parcel.step) - first
        ):
            raise Unexpected(f"step: {parcel.step}, which is not {sender}'s next turn")
        _expect_size(parcel, sizes.inputs)

    def _check_task(self, parcel: Parcel, sizes: Sizes) -> None:
        if parcel.step != self._next_step:
            raise Unexpected(f"step: {parcel.step}, expected {self._next_step}")
        new = self._opening is not None and self._opening.save is None
        if (parcel.kind == "state") != (new and parcel.serial == 0):
            raise Unexpected(
                f"kind: {parcel.kind}, expected the state first, and only in the first"
            )
        if (parcel.kind == "checkpoint") != (parcel.save is not None):
            raise Unexpected("save: expected the name of a checkpoint, and only for one")
        if self._finished and parcel.kind not in ("answer", "drop"):
            raise Unexpected(f"kind: {parcel.kind}, expected answer: training is over")
        if (parcel.kind == "answer") != (parcel.answer in sizes.questions):
            raise Unexpected(
                f"answer: {parcel.answer!r}, expected one of the program's, and only for one"
            )
        expected = 0
        if parcel.kind == "state":
            expected = sizes.state
        elif parcel.kind == "train":
            own = self.config.owner_of(parcel.step) == DEALER
            expected = sizes.material[TRAIN] + sizes.noise + sizes.inputs * own
        elif parcel.kind == "guard":
            expected = sizes.material[GUARD]
        elif parcel.kind == "answer":
            name = str(parcel.answer)
            expected = sizes.material[name] + sizes.questions[name]
        if parcel.request is not None and parcel.kind != "drop":  # one may drop what is not here
            wish = self._wishes.get(parcel.request)
            if wish is None or wish.request.answer != parcel.answer:
                raise Unexpected(f"request: {parcel.request!r} is nobody's, or of another answer")
            if wish.shares is not None:
                expected = sizes.material[wish.request.answer]
        _expect_size(parcel, expected)

    def _put(self, sender: str, parcel: Parcel, payload: bytearray) -> None:
        with self._changed:
            self._serial[sender] += 1
            if sender == DEALER:
                self._next_step += parcel.kind == "train"
                self._finished |= parcel.kind == "finish"
                self._received += 1
                self._changed.notify_all()
            wish = self._wishes.get(parcel.request or "")
            if wish is not None and parcel.kind == "drop":
                del self._wishes[str(parcel.request)]
                wish.answer.set_exception(
                    Unexpected("the other server does not know this question")
                )
        if sender == DEALER:
            self._tasks.put(Task(parcel, payload, None if wish is None else wish.shares))
        else:
            self._inputs[sender].put((parcel.step, payload))

    # For SP and clients -----------------------------------------------------------------------

    def check_question(self, asker: str, question: Question) -> None:
        """Check a question before its shares are taken.

        Raises:
            Unexpected: there is no attempt, it is there already, or too many are.
            Malformed: it has a wrong name or size.
        """
        with self._changed:
            if self._sizes is None or not self._finished:
                raise Unexpected(
                    f"answers come after training, while {DEALER} is there to deal for them"
                )
            if question.answer not in self._sizes.questions:
                raise wire.Malformed(
                    f"answer: {question.answer!r}, expected one of "
                    f"{', '.join(self._sizes.questions) or 'none'}"
                )
            if question.name in self._wishes:
                raise Unexpected(f"name: {question.name!r} is asked already")
            waiting = sum(wish.asker == asker for wish in self._wishes.values())
            if waiting >= max(1, _MOST_WAITING // len(self.config.askers)):
                raise Unexpected(f"{waiting} questions of {asker} are waiting: ask later")
            most = self.config.most_questions if asker in self.config.clients else None
            if most is not None and self._asked.get(asker, 0) >= most:
                raise Unexpected(f"{asker} has asked {most} questions, as many as it may")
            size = self._sizes.questions[question.answer]
            # A question of DS's is the sample's, which is for SP.
            allowed = (0, size) if asker == PROVIDER else (size,)
            if question.size not in allowed:
                raise wire.Malformed(
                    f"size: {question.size}, expected {size} bytes of a question"
                    + ", or 0" * (asker == PROVIDER)
                )

    def ask(self, asker: str, question: Question, shares: bytearray | None) -> Future[Held]:
        """Ask: the future has this server's share of the answer.

        A question stays if nobody waits any more: DS may be about to deal for it, at both servers.
        """
        answer: Future[Held] = Future()
        with self._changed:
            self.check_question(asker, question)
            if asker in self.config.clients:
                self._asked[asker] = self._asked.get(asker, 0) + 1
                self._write_down(self._attempt)
            self._wishes[question.name] = _Wish(asker, question, shares, answer)
            self._changed.notify_all()
        return answer

    # For this server's worker -----------------------------------------------------------------

    def wait_for_opening(self) -> tuple[Opening, Settings]:
        """The attempt that DS opens, and the configuration with this server's own code."""
        with self._changed:
            self._changed.wait_for(lambda: self._opening is not None)
            assert self._opening is not None
            assert self._settings is not None
            return self._opening, self._settings

    def prepare(self, sizes: Sizes, noise_key: bytes = b"") -> None:
        """The program is agreed on, and compiled: parcels of these sizes may come.

        `noise_key`: of this server's own noise, for DS to look at what it does.
        """
        with self._changed:
            self._noise_key = noise_key
            assert self._opening is not None
            self._known = self._opening.config
            self._functions = agreement.short(self._opening.functions)
            self._write_down(self._attempt)
            self._sizes = sizes
            self._changed.notify_all()

    def end(self) -> None:
        """This server ends by itself: whoever is gone from now on is not missed."""
        self._over = True

    def refuse(self, reason: str, seconds: float) -> None:
        """This attempt will not go on; DS has so long to hear why."""
        self.end()
        with self._changed:
            self._refused = reason
            self._changed.notify_all()
        time.sleep(seconds)

    def next_task(self) -> Task:
        """The next task; waits for it."""
        return self._tasks.get()

    def inputs_of(self, owner: str, step: int) -> bytearray:
        """The shares of another owner's batch; waits for them."""
        of, payload = self._inputs[owner].get()
        assert of == step, "owners' parcels are checked to be in order"
        return payload

    def done(self) -> None:
        """A task is done."""
        with self._changed:
            self._done += 1
            self._changed.notify_all()

    def hand_over(self, result: Held) -> None:
        """A result goes to SP, and an answer to whoever asked."""
        if result.request is None:
            return self._publish(result)
        with self._changed:
            wish = self._wishes.pop(result.request, None)
            self._changed.notify_all()
        if wish is not None and not wish.answer.done():
            wish.answer.set_result(result)

    @property
    def ahead(self) -> int:
        """DS's parcels that wait to be worked on."""
        return self._received - self._done


def _expect_size(parcel: Parcel, expected: int) -> None:
    if parcel.size != expected:
        raise wire.Malformed(
            f"size: {parcel.size} bytes of {parcel.kind}, expected {expected} by the configuration"
        )
