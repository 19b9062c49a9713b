"""The workers of DS and of further data owners: one attempt, from its opening to its end."""

from __future__ import annotations

import json
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lpgan_jax.cluster.certificates import load_identity
from lpgan_jax.cluster.checking import Checker
from lpgan_jax.cluster.client import Client
from lpgan_jax.cluster.dealer import Dealer, Order, master_key, noise_key, share_batch
from lpgan_jax.cluster.parcels import Payloads, halves
from lpgan_jax.cluster.record import Record
from lpgan_jax.cluster.reporting import BadInput, Lost, Reporter, reading_input
from lpgan_jax.cluster.settings import DEALER, PROVIDER, SERVERS, ClusterConfig, changed_field
from lpgan_jax.cluster.units import Unit, units
from lpgan_jax.cluster.wire import (
    Description,
    Opening,
    Parcel,
    ParcelKind,
    Progress,
    Request,
    chunks,
    encode,
    nbytes,
)
from lpgan_jax.common.files import atomic_write
from lpgan_jax.mpc import share_file
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.privacy.mechanism import seeded
from lpgan_jax.programs import Draw, Training, agreement, initial_state, secured, shapes
from lpgan_jax.training import config
from lpgan_jax.training.building import batches_of, training_of
from lpgan_jax.training.config import Settings
from lpgan_jax.training.ledger import Ledger
from lpgan_jax.training.loop import headroom_line
from lpgan_jax.training.tasks import Task, tasks


class _Lines:
    """Both servers, as an owner of one attempt sees them: streams out, progress in."""

    def __init__(self, clients: list[Client], attempt: int) -> None:
        self.clients, self._attempt = clients, attempt
        self._changed = threading.Condition()
        self.progress: dict[str, Progress] = {}
        self.error: Exception | None = None
        self._queues: dict[str, queue.Queue[Any]] = {}
        for client in clients:
            # One being sent, one ready: with the server's own look-ahead, memory has a bound.
            self._queues[client.server] = queue.Queue(1)
            self._start(self._watch, client)

    def _start(self, target: Callable[[Client], None], client: Client) -> None:
        def run() -> None:
            try:
                target(client)
                raise Lost(client.server, "its stream ended")
            except Exception as error:  # all of it ends the attempt
                self.fail(error)

        threading.Thread(target=run, daemon=True).start()

    def _watch(self, client: Client) -> None:
        for progress in client.watch(self._attempt):
            if progress.attempt != self._attempt:
                raise Lost(client.server, "another attempt was opened there")
            if progress.refused is not None:
                raise BadInput(f"{client.server} refuses: {progress.refused}")
            with self._changed:
                self.progress[client.server] = progress
                self._changed.notify_all()

    def send_from_now_on(self) -> None:
        """Open the streams for parcels."""
        for client in self.clients:
            self._start(self._send, client)

    def _send(self, client: Client) -> None:
        client.send(self._frames(client))

    def _frames(self, client: Client) -> Iterator[bytes]:
        while True:
            parcel, payload = self._queues[client.server].get()
            if client.server == "s1" and parcel.kind in ("train", "guard", "answer"):
                # S1 would start, and wait in the middle of a task, which has its own limit, until
                # S2 has got its corrections: so it gets its little when S2 has its much.
                self._wait_received("s2", parcel.serial)
            yield encode(parcel)
            yield from chunks(payload)

    def _wait_received(self, server: str, serial: int) -> None:
        def there() -> bool:
            return server in self.progress and self.progress[server].received > serial

        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or there())

    def put(
        self, server: str, parcel: Parcel, payload: list[np.ndarray], limit_s: float | None
    ) -> None:
        """Send a parcel, once there is room.

        Raises:
            Lost: there is none for so long.
        """
        end = math.inf if limit_s is None else time.monotonic() + limit_s
        while time.monotonic() < end:
            self.check()
            with suppress(queue.Full):
                return self._queues[server].put((parcel, payload), timeout=0.2)
        raise Lost(server, f"it took nothing for {limit_s:g} s")

    def wait(self, wanted: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until something is so, or for so long, or until an error ends the attempt.

        Returns:
            Whether it is so.
        """
        with self._changed:
            found = self._changed.wait_for(lambda: self.error is not None or wanted(), seconds)
        self.check()
        return found

    def fail(self, error: Exception) -> None:
        """End the attempt."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what ended the attempt, if something did."""
        if self.error is not None:
            raise self.error

    def prepared(self, server: str) -> bool:
        """Whether a server's programs are compiled."""
        return server in self.progress and self.progress[server].prepared

    def advanced(self, server: str, done: int) -> bool:
        """Whether a server has done more parcels than these."""
        return self.progress[server].done > done

    def done(self) -> int:
        """Parcels that both servers are done with."""
        return min((p.done for p in self.progress.values()), default=0)


def newest_common(
    descriptions: Sequence[Description], training: Training
) -> tuple[int, str | None]:
    """The newest checkpoint that both servers have: (step, name), or (0, None) for none.

    Raises:
        BadInput: going on would throw away what was trained.
    """
    first, second = ({(s.step, s.name) for s in d.saves} for d in descriptions)
    if common := first & second:
        newest = max(common)
        if newest[0] > training.steps:
            raise BadInput(
                f"steps: {training.steps} given, and {newest[0]} are done: expected more"
            )
        return newest
    # Without a common one, a server may have the session's very first, which the other one was
    # about to write. Anything else means that shares are lost.
    beginning = next(s for s in range(1, training.steps + 1) if training.saves_after(s))
    known = all(d.attempt > 0 for d in descriptions)
    if (first or second) and not (known and {s for s, _ in first | second} <= {beginning}):
        have = [sorted(step for step, _ in saves) for saves in (first, second)]
        raise BadInput(
            f"checkpoints: s1 has steps {have[0]} and s2 {have[1]}, expected a step of one save at "
            "both: a server's state is lost, so start a new session"
        )
    return 0, None


def _require_same(
    descriptions: Sequence[Description], settings: Settings, functions: Mapping[str, str]
) -> None:
    """Check that the session trains with these settings, and the same program.

    Raises:
        BadInput: it trains with others; names the field or function.
    """
    for known in {d.config for d in descriptions if d.config is not None}:
        trained = config.from_json(known, "the session's configuration")
        if (field := changed_field(settings.public(), trained)) is not None:
            raise BadInput(
                f"{field}: {getattr(settings, field, None)!r} given, and this session trains with "
                f"{getattr(trained, field, None)!r}: another training needs another session and "
                "states"
            )
    for description in descriptions:
        if description.config is not None:
            require_same_functions(description, functions)


def require_same_functions(known: Description, functions: Mapping[str, str]) -> None:
    """Check that a session has the same program as this role (`agreement.short`).

    Raises:
        BadInput: it has not; names the function that differs.
    """
    if (found := agreement.differing(functions, known.functions)) is not None:
        raise BadInput(f"the program differs from that of this session: {found}")


def new_attempt(cluster: ClusterConfig, descriptions: Sequence[Description]) -> int:
    """A number that no attempt had, neither here nor at a server; written down here.

    Raises:
        OSError: it cannot be written.
    """
    file, last = Path(cluster.state) / f"session-{DEALER}.json", 0
    if file.exists():
        kept = json.loads(file.read_bytes())
        last = int(kept["attempt"]) if kept.get("session") == cluster.session else 0
    attempt = 1 + max(last, *(d.attempt for d in descriptions))
    kept = {"session": cluster.session, "attempt": attempt}
    atomic_write(file, json.dumps(kept).encode())
    return attempt


def _draw(
    cluster: ClusterConfig,
    owner: str,
    settings: Settings,
    training: Training,
    seed: int | None,
) -> tuple[int, Draw]:
    """The seed of a run, and an owner's batches.

    Without a seed (of `lpgan up`), one that nobody can guess is made, and kept, so that a later
    attempt goes on with the same order; with privacy, the batches are drawn anew each time.
    """
    anew = seed is None and training.privacy is not None
    if seed is None:
        file = Path(cluster.state) / f"private-{owner}.json"
        if not file.exists():
            drawn = {"session": cluster.session, "seed": secrets.randbits(128)}
            atomic_write(file, json.dumps(drawn).encode())
        kept = json.loads(file.read_bytes())
        if kept.get("session") != cluster.session:
            raise BadInput(f"{file}: of another session, expected a directory (state) of its own")
        seed = int(kept["seed"])
    with reading_input():
        return seed, batches_of(settings, training, secrets.randbits(128) if anew else seed)


def _drawn_anew(settings: Settings, training: Training, seed: int, attempt: int) -> Draw:
    """Those of a later attempt of a private training whose seed is given.

    Others than before, since a step that is done again is another one.
    """
    return batches_of(settings, training, int.from_bytes(seeded(f"{attempt}", seed)))


def deal_and_feed(
    cluster: ClusterConfig, settings: Settings, seed: int | None, reporter: Reporter
) -> None:
    """Be DS for one attempt; goes on dealing for answers after training, until this process ends.

    Raises:
        Lost: a server is gone: there should be another attempt.
        RefusedBy: a server accepts none.
        BadInput, FileNotFoundError: bad input.
    """
    limits, checked = cluster.timeouts, cluster.integrity is not None
    record = Record(cluster) if checked else None
    identity = load_identity(cluster, DEALER)
    clients = _clients(cluster, DEALER, reporter)
    with reading_input():
        training = training_of(settings)
        functions = agreement.digests_of(training)
    batches_seed, draw = _draw(cluster, DEALER, settings, training, seed)
    descriptions = []
    for client in clients:
        with reporter.phase("looking for", on=client.server, limit_s=limits.patience_s):
            descriptions.append(client.wait_until(lambda d: d.phase == "ready"))
    _require_same(descriptions, settings, agreement.short(functions))
    start, name = newest_common(descriptions, training)
    attempt = new_attempt(cluster, descriptions)
    if training.privacy is not None and seed is not None and attempt > 1:
        draw = _drawn_anew(settings, training, seed, attempt)
    ledger = Ledger(Path(cluster.state) / f"spent-{DEALER}.json")
    if training.privacy is not None:
        with reading_input():
            ledger.require(start)
    opening = Opening(
        session=cluster.session,
        role=DEALER,
        attempt=attempt,
        config=config.to_json(settings.public()),
        functions=functions,
        steps=training.steps,
        start=start,
        save=name,
        checked=checked,
    )
    for client in clients:
        with reporter.phase("opening an attempt at", on=client.server, limit_s=limits.patience_s):
            client.open(opening)
    reporter.event("opened", attempt=attempt, start=start)
    reporter.set(step=start, steps=training.steps)
    lines = _Lines(clients, attempt)
    with reporter.phase("compiling", limit_s=limits.start_s):
        initial = initial_state(training.program, batches_seed)
        begins = initial if start == 0 else None
        keys = master_key(seed, attempt), noise_key(training, seed, attempt)
        dealer = Dealer(training, draw, begins, cluster, *keys)
    for server in SERVERS:
        with reporter.phase("waiting for the programs of", on=server, limit_s=limits.start_s):
            lines.wait(partial(lines.prepared, server))
    lines.send_from_now_on()
    if start == 0 and training.privacy is None:  # it tells of images what no noise hides
        printing = (lines, training, initial, draw(0))
        threading.Thread(target=_print_headroom, args=printing, daemon=True).start()
    question = None
    if training.sample is not None:
        with reading_input():
            question = training.sample_question(batches_seed)
            _require_rows(training, question)
    checker = None
    if record is not None:
        checker = Checker(
            cluster=cluster,
            identity=identity,
            program=secured(training.program),
            dealer=dealer,
            lines=lines,
            servers=clients,
            record=record,
            reporter=reporter,
            attempt=attempt,
            save=name,
        )
        with reporter.phase("comparing checkpoints of servers", limit_s=limits.start_s):
            checker.start()
    try:
        _Run(cluster, training, question, dealer, lines, reporter, opening, checker, ledger).run()
    except Exception as error:
        if checker is not None:
            lines.fail(error)
            checker.settle()
        raise


def _print_headroom(lines: _Lines, training: Training, initial: Any, batch: Any) -> None:
    """Once the first step is done, since it takes seconds."""
    sampled = training.sample is not None and training.sample.opened
    try:
        lines.wait(lambda: lines.done() >= 2 + sampled)
    except Exception:  # what ends the attempt is said elsewhere
        return
    line = headroom_line(secured(training.program), initial, batch)
    print(line, flush=True)  # of DS's data: not into the log


def _require_rows(training: Training, question: Any) -> None:
    """Check that the sample's question is as long as the servers' programs take it."""
    assert training.sample is not None
    wanted = shapes.rows_of(training.program.answers[training.sample.answer].question)
    if (rows := shapes.rows_of(question)) != wanted:
        raise ValueError(f"sample.question: {rows} rows, expected {wanted}, as its answer says")


def _clients(cluster: ClusterConfig, role: str, reporter: Reporter) -> list[Client]:
    identity = load_identity(cluster, role)
    return [Client(cluster, identity, role, server, reporter) for server in SERVERS]


@dataclass
class _Run:
    """The parcels of one attempt. `question`: of the sample."""

    cluster: ClusterConfig
    training: Training
    question: Any
    dealer: Dealer
    lines: _Lines
    reporter: Reporter
    opening: Opening
    checker: Checker | None
    ledger: Ledger
    serial: int = 0

    @property
    def _limit(self) -> float:
        """Seconds for servers to take something: they may wait for checks."""
        limits = self.cluster.timeouts
        return limits.wait_s if self.checker is None else limits.start_s + limits.wait_s

    @property
    def _beyond(self) -> float:
        """After this, this process is stuck itself, and looks at nothing any more."""
        return self._limit + self.cluster.timeouts.silence_s

    def _expect(self, tasks: Sequence[Task], save: str | None = None) -> Unit | None:
        return None if self.checker is None else self.checker.expect(self.serial, tasks, save)

    def run(self) -> None:
        """Deal for training, then for whoever asks."""
        started, first, sample = time.monotonic(), self.opening.start, self.training.sample
        sampled = sample is not None and sample.opened
        for group in units(tasks(self.training, self.opening.start, sampled)):
            saved = any(task.kind == "checkpoint" for task in group)
            save = share_file.new_name() if saved else None
            unit = self._expect(group, save)
            for task in group:
                answer = sample.answer if sample is not None and task.kind == "answer" else None
                question = None if answer is None else self.question
                self._deal(unit, self.dealer.order(task, answer, question), None, save)
                step = task.step + (task.kind == "train")
                if step > first:
                    seconds = (time.monotonic() - started) / (step - first)
                    self.reporter.set(s_per_step=round(seconds, 4))
                self.reporter.set(step=step)
        for server in SERVERS:
            while (done := self.lines.progress[server].done) < self.serial:
                with self.reporter.phase("finishing with", on=server, limit_s=self._beyond):
                    advanced = partial(self.lines.advanced, server, done)
                    if not self.lines.wait(advanced, self._limit):
                        raise Lost(server, f"it did nothing for {self._limit:g} s")
        looked = {} if self.checker is None else {"checked": self.checker.checked}
        spent = self.training.spent(self.ledger.steps)
        self.reporter.event("trained", step=self.training.steps, **looked, **spent)
        self._serve()

    def _serve(self) -> None:
        """Deal for questions of which both servers know; the others are dropped, in time."""
        rng, patience = np.random.default_rng(), self.cluster.timeouts.patience_s
        over: set[str] = set()
        first_seen: dict[str, float] = {}
        askers = ", ".join((PROVIDER, *self.cluster.clients))
        self.reporter.event("answering", questions_of=askers)
        with self.reporter.phase(f"idle, no questions of {askers}", limit_s=None):
            while True:
                # What one server knows may be lost, or on its way to the other: look again later.
                self.lines.wait(
                    lambda: any(q.name not in over for q in self._questions_of_both()), patience
                )
                both, waiting = self._questions_of_both(), self._questions()
                over.intersection_update(question.name for question in waiting)
                first_seen = {q.name: first_seen[q.name] for q in waiting if q.name in first_seen}
                for question in waiting:
                    name, now = question.name, time.monotonic()
                    if name in over:
                        continue
                    if question in both and self._answer(question, rng):
                        over.add(name)
                    elif question in both or now - first_seen.setdefault(name, now) > patience:
                        over.add(name)
                        self._send("drop", self.training.steps, [[], []], request=name)
                self.reporter.set(ahead=self.serial - self.lines.done())

    def _questions(self) -> list[Request]:
        """What waits at either server."""
        return [r for server in SERVERS for r in self.lines.progress[server].requests]

    def _questions_of_both(self) -> list[Request]:
        """Questions of which both servers know, and know the same."""
        first, second = (self.lines.progress[server].requests for server in SERVERS)
        return [question for question in first if question in second]

    def _answer(self, asked: Request, rng: np.random.Generator) -> bool:
        """Deal for a question; False if DS is to share it, and has none of this kind."""
        own, sample = None, self.training.sample
        if not asked.own_question:
            if sample is None or sample.answer != asked.answer:
                return False
            own = sample.question(rng)
        task = Task("answer", self.training.steps)
        unit = None if own is None else self._expect([task])
        self._deal(unit, self.dealer.order(task, asked.answer, own), asked.name, None)
        return True

    def _deal(self, unit: Unit | None, order: Order, request: str | None, save: str | None) -> None:
        task = order.task
        if unit is not None:
            unit.orders[self.serial] = order
        limit = self.cluster.timeouts.wait_s
        if task.kind == "train" and self.training.privacy is not None:
            self.ledger.begin()
        with self.reporter.phase(f"dealing {task.kind}", limit_s=limit):
            payloads = self.dealer.payloads(order)
        fields = {"answer": order.answer, "request": request}
        fields |= {"save": save} if task.kind == "checkpoint" else {}
        self._send(task.kind, task.step, payloads, **fields)

    def _send(self, kind: ParcelKind, step: int, payloads: Payloads, **fields: Any) -> None:
        for server, payload in zip(SERVERS, payloads, strict=True):
            parcel = Parcel(
                session=self.cluster.session,
                role=DEALER,
                attempt=self.opening.attempt,
                serial=self.serial,
                kind=kind,
                step=step,
                size=nbytes(payload),
                spent=self.ledger.steps,
                **fields,
            )
            with self.reporter.phase("sending to", on=server, limit_s=self._beyond):
                self.lines.put(server, parcel, payload, self._limit)
        self.serial += 1
        self.reporter.set(ahead=self.serial - self.lines.done())


# Another data owner -------------------------------------------------------------------------------


def feed(cluster: ClusterConfig, settings: Settings, owner: str, reporter: Reporter) -> None:
    """Be a data owner other than DS for one attempt: share a batch whenever it is one's turn.

    Raises:
        Lost: a server is gone.
        RefusedBy: a server accepts nothing.
        BadInput, FileNotFoundError: bad input.
    """
    clients = _clients(cluster, owner, reporter)
    with reading_input():
        training = training_of(settings)
        program = secured(training.program)
    _, draw = _draw(cluster, owner, settings, training, None)
    descriptions: list[Description] = []
    for client in clients:
        with reporter.phase("waiting for an attempt at", on=client.server, limit_s=None):
            descriptions.append(client.wait_until(lambda d: d.prepared, patient=True))
    if len({(d.attempt, d.start, d.config) for d in descriptions}) > 1:
        raise Lost("s2", "in another attempt than s1")
    attempt, start = descriptions[0].attempt, descriptions[0].start
    _require_same(descriptions, settings, agreement.short(agreement.digests_of(training)))
    steps = descriptions[0].steps
    lines = _Lines(clients, attempt)
    lines.send_from_now_on()
    keys = DealerKeys(make_key())  # never from a seed: DS may have the same one
    reporter.set(step=start, steps=steps)
    turns = (s for s in range(start, steps) if cluster.owner_of(s) == owner)
    for serial, step in enumerate(turns):
        payloads = halves(share_batch(program, keys.take(), draw, cluster.turn_of(owner, step)))
        for server, payload in zip(SERVERS, payloads, strict=True):
            parcel = Parcel(
                session=cluster.session,
                role=owner,
                attempt=attempt,
                serial=serial,
                kind="inputs",
                step=step,
                size=nbytes(payload),
            )
            # Between an owner's turns there may be many of others: the servers' lives are enough.
            with reporter.phase("feeding", on=server, limit_s=None):
                lines.put(server, parcel, payload, None)
        reporter.set(step=step + 1)
    with reporter.phase("idle, feeds no more of", on=DEALER, limit_s=None):
        lines.wait(lambda: False)
