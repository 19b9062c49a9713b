"""DS looks at what the servers did: at random, after they have said what it was.

The programs are deterministic, and DS knows all that goes into them but the state, which it asks
for. After each task both servers sign, to each other, digests of what they sent, and to DS digests
of their shares of state and result. Then DS draws: it runs the step itself (`replay`), or lets it
be. The first message that differs is the deviation of who sent it. Results go to SP when DS has
signed them: grids, what was learnt and answers to DS's questions after they were looked at, losses
with the next step that was. What is looked at with certainty: steps before such a result and before
a checkpoint. So a deviation in one other step is caught with probability q, and in n of them with
1 - (1 - q)^n (covert security: Aumann, Lindell, TCC 2007).

Who does not answer when asked, or goes away in time, gains nothing: DS then runs all steps since it
last knew the state.
"""

from __future__ import annotations

import functools
import math
import queue
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from lpgan_jax.cluster.certificates import Identity
from lpgan_jax.cluster.dealer import Dealer
from lpgan_jax.cluster.hearing import Contradiction, Hearing, Lines
from lpgan_jax.cluster.record import Deviation, Record
from lpgan_jax.cluster.replay import Done, Replay, difference
from lpgan_jax.cluster.reporting import Lost, Reporter
from lpgan_jax.cluster.settings import DEALER, SERVERS, ClusterConfig
from lpgan_jax.cluster.signatures import Signer, Verifier
from lpgan_jax.cluster.transcript import digest, digests_of
from lpgan_jax.cluster.units import Unit
from lpgan_jax.cluster.wire import (
    Layout,
    Opened,
    Release,
    ResultKind,
    Signed,
    Voucher,
    half_shapes,
)
from lpgan_jax.privacy.noise import SEED_BYTES
from lpgan_jax.programs import SecureProgram, shapes
from lpgan_jax.training.tasks import Task

_OF_SYSTEM = secrets.SystemRandom()
_WAITING = 1  # units whose states are here and that are not yet run
_AT_ONCE = 25  # vouchers in a message


class Server(Protocol):
    """One of them (`client.Client`)."""

    server: Any

    def reveal(self, attempt: int, serial: int, size: int) -> bytearray:
        """Its share of the state before a task."""

    def release(self, release: Release) -> None:
        """What it may let go, and hand on."""


class Checker:
    """DS's checks of one attempt, in threads of their own.

    Attributes:
        checked: steps that were looked at.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        identity: Identity,
        program: SecureProgram,
        dealer: Dealer,
        lines: Lines,
        servers: Sequence[Server],
        record: Record,
        reporter: Reporter,
        attempt: int,
        save: str | None,
        random: Callable[[], float] = _OF_SYSTEM.random,
    ) -> None:
        """`save`: the checkpoint that is gone on from; `random`: uniform in [0, 1)."""
        assert cluster.integrity is not None
        self._cluster, self._program, self._dealer = cluster, program, dealer
        self._lines, self._servers, self._record = lines, servers, record
        self._reporter, self._attempt, self._random = reporter, attempt, random
        self._probability = cluster.integrity.check
        self._signer = Signer(cluster, identity, DEALER)
        self._hearing = Hearing(Verifier(cluster, identity), lines, attempt)
        told = Layout.of(half_shapes(shapes.told_shapes(program))).size
        self._told: ResultKind = "told" if told else "step"
        self._save = save
        # Of the state after the last unit.
        self._digests = digests_of(dealer.state) if save is None else record.of(save)
        self._units: queue.Queue[Unit | None] = queue.Queue()
        self._unit: Unit | None = None  # that is being decided on
        self._unrun: list[Unit] = []  # since the state that the replay has, or will have
        self._most_unrun = math.ceil(8 / self._probability)
        self._unvouched: list[_Pair] = []
        self._to_run: queue.Queue[_Look | None] = queue.Queue(_WAITING)
        self._replay: Replay | None = None
        self._noise_keys: list[bytes] = []
        self._caught: Deviation | None = None
        self._ran = threading.Event()
        self.checked = 0
        self._threads = [
            threading.Thread(target=self._guarded, args=(target,), daemon=True)
            for target in (self._decide_all, self._run_all)
        ]

    # For DS's main thread ---------------------------------------------------------------------

    def start(self) -> None:
        """Both servers are prepared, and nothing is dealt yet.

        Raises:
            Deviation: a server has another state than the one that DS checked.
            Lost: a server is gone, or does not show what it draws its noise from.
        """
        if self._program.servers_draw is not None:
            # Once and for all, before anything is done: that is what they are held to.
            self._noise_keys = [self._lines.progress[server].noise_key for server in SERVERS]
            for server, key in zip(SERVERS, self._noise_keys, strict=True):
                if len(key) != SEED_BYTES:
                    raise Lost(server, "it does not show what its noise is drawn from")
        if self._save is not None:
            try:
                self._to_run.put(_Look([], self._reveal(-1), None))
            except Deviation as error:
                self._tell(error)
                raise
        for thread in reversed(self._threads):  # who runs, before who says what is to be run
            thread.start()

    def expect(self, first: int, tasks: Sequence[Task], save: str | None = None) -> Unit:
        """Tasks will be dealt that belong together.

        Args:
            first: serial of the first of them.
            tasks: in order.
            save: the name of the checkpoint, if one is of them.
        """
        unit = Unit(dict(enumerate(tasks, first)), save)
        self._units.put(unit)
        return unit

    def settle(self) -> None:
        """The attempt has failed: run what was chosen, without asking for anything.

        And choose, of what the servers have committed to and was not decided on.

        Raises:
            Deviation: a server did something else than its program.
        """
        self._units.put(None)
        self._wait_for(self._threads[0])
        pending = [self._unit, *_iter_now(self._units)]
        for unit in [u for u in pending if u is not None]:
            if self._caught is not None:
                break
            with suppress(Exception):  # of what a server says: what was said before stays
                self._listen(unit)
            if not unit.said:
                break
            if unit.chosen is None:
                unit.chosen = unit.results_at_once or self._random() < self._probability
            self._unrun.append(unit)
            if unit.chosen:
                self._put(_Look([*self._unrun], None, None))
                self._unrun.clear()
        self._put(None)
        self._wait_for(self._threads[1])
        if self._caught is not None:
            self._tell(self._caught)
            raise self._caught
        if not self._to_run.empty():
            self._reporter.event(
                "not looked at", reason=f"DS's own run failed: {self._lines.error}"
            )

    def _wait_for(self, thread: threading.Thread) -> None:
        """Wait for a thread to end, in a phase for each unit that is run meanwhile."""
        limit = self._cluster.timeouts.start_s
        while thread.is_alive():
            self._ran.clear()
            with self._reporter.phase("looking at what servers did", limit_s=limit):
                while thread.is_alive() and not self._ran.wait(0.1):
                    pass

    def _put(self, run: _Look | None) -> None:
        """Have something run, once there is room."""
        while self._threads[1].is_alive():
            with suppress(queue.Full):
                return self._to_run.put(run, timeout=0.2)

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Deviation as error:
            self._tell(error)
            self._lines.fail(error)
        except Exception as error:
            self._lines.fail(error)

    # What the servers say ---------------------------------------------------------------------

    def _decide_all(self) -> None:
        while (unit := self._units.get()) is not None:
            self._unit = unit
            self._decide(unit)

    def _decide(self, unit: Unit) -> None:
        """Wait for what servers say of a unit, and choose whether to look at it."""
        for serial, task in unit.tasks.items():
            if task.kind in ("state", "checkpoint"):
                continue
            self._lines.wait(functools.partial(self._said, unit, serial))
            if task.kind == "guard":
                unit.confirmed = True
                self._release(-2, heard=serial)
                self._lines.wait(functools.partial(self._opened, unit))
            if unit.alarm:
                break  # the servers do nothing more
        wanted = unit.results_at_once or len(self._unrun) >= self._most_unrun
        unit.chosen = wanted or self._random() < self._probability
        if unit.chosen:
            # The replay is where it was left, or goes on from what the servers show.
            first = min(unit.said, default=None)
            state = self._reveal(first) if self._unrun and first is not None else None
            vouchers = [*self._unvouched, *self._vouchers(unit)]
            self._unrun, self._unvouched, self._unit = [], [], None
            self._put(_Look([unit], state, vouchers))
        else:
            self._unrun.append(unit)
            self._unvouched += self._vouchers(unit)
            self._unit = None
        self._digests = self._state_after(unit) or self._digests
        self._release(unit.last)

    def _said(self, unit: Unit, serial: int) -> bool:
        """Whether both servers have said what they did in a task."""
        self._listen(unit)
        return all(unit.said.get(serial, [None]))

    def _opened(self, unit: Unit) -> bool:
        """Whether both servers have said how they opened an alarm."""
        self._listen(unit)
        return unit.opened_by_both

    def _listen(self, unit: Unit) -> None:
        try:
            self._hearing.listen(unit)
        except Contradiction as error:
            at = unit, error.serial, error.server
            raise self._catch(*at, str(error), said=[error.said]) from None

    def _state_after(self, unit: Unit) -> list[bytes] | None:
        for serial in sorted(unit.said, reverse=True):
            return [said.state for said in unit.said[serial] if said is not None]
        return None

    # What DS asks, and says -------------------------------------------------------------------

    def _reveal(self, serial: int) -> Any:
        """Both shares of the state before a task, as it was committed to: paired arrays."""
        like = shapes.state_shapes(self._program)
        layout = Layout.of(half_shapes(like))
        halves = []
        for place, server in enumerate(self._servers):
            payload = server.reveal(self._attempt, serial, layout.size)
            arrays = layout.split(payload)
            if digest(payload) != self._digests[place]:
                what = "the state that it shows is not the one that it had"
                raise self._catch(self._unit, serial, server.server, what)
            halves.append(arrays)
        paired = [np.stack(pair) for pair in zip(*halves, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(like), paired)

    def _release(self, upto: int, vouchers: Sequence[_Pair] = (), heard: int = -1) -> None:
        for start in range(0, max(1, len(vouchers)), _AT_ONCE):
            pairs = vouchers[start : start + _AT_ONCE]
            for place, server in enumerate(self._servers):
                server.release(self._message(upto, [pair[place] for pair in pairs], heard))

    def _message(
        self,
        upto: int,
        vouchers: Sequence[Voucher] = (),
        heard: int = -1,
        caught: str | None = None,
    ) -> Release:
        return Release(
            session=self._cluster.session,
            role=DEALER,
            attempt=self._attempt,
            upto=upto,
            heard=heard,
            vouchers=[*vouchers],
            caught=caught,
        )

    def _tell(self, caught: Deviation) -> None:
        """Tell both servers that the session is over, the honest one first."""
        for server in sorted(self._servers, key=lambda each: each.server == caught.server):
            with suppress(Exception):  # it may be gone
                server.release(self._message(-2, caught=str(caught)))

    def _vouchers(self, unit: Unit) -> list[_Pair]:
        """Of a unit's results, as the servers say they are; unsigned."""
        kinds: dict[str, ResultKind] = {"train": self._told, "answer": "answer", "finish": "learnt"}
        kinds |= {"guard": "alarm"} if unit.alarm else {}

        def voucher(serial: int, task: Task, place: int) -> Voucher:
            said = unit.said[serial][place]
            assert said is not None
            return Voucher(
                attempt=self._attempt,
                serial=serial,
                server=SERVERS[place],
                kind=kinds[task.kind],
                step=task.step + (task.kind == "train"),
                digest=said.result,
                certificate=self._signer.certificate,
            )

        return [
            (voucher(serial, task, 0), voucher(serial, task, 1))
            for serial, task in unit.tasks.items()
            if task.kind in kinds and serial in unit.said
        ]

    # Looking ----------------------------------------------------------------------------------

    def _run_all(self) -> None:
        while (run := self._to_run.get()) is not None:
            if self._replay is None:
                self._replay = Replay(self._program, self._dealer, self._noise_keys)
            if run.state is not None:
                self._replay.set_state(run.state)
            for unit in run.units:
                self._look(self._replay, unit)
                self._ran.set()
            if run.vouchers is not None and self._lines.error is None:
                self._pass(run.units[-1], run.vouchers)

    def _look(self, replay: Replay, unit: Unit) -> None:
        """Run a unit, and compare."""
        if unit.of_kind("state"):
            replay.set_state(self._dealer.state)
        for serial in unit.tasks:
            if serial not in unit.orders:
                continue
            if (done := replay.do(unit.orders[serial])) is not None:
                found = difference(replay, done, unit.said.get(serial), unit.opened.get(serial))
                if found is not None:
                    raise self._catch(unit, serial, *found, done)
        self.checked += len(unit.of_kind("train"))

    def _pass(self, unit: Unit, vouchers: Sequence[_Pair]) -> None:
        """All went as it should: checkpoints may be kept, and results go to SP."""
        after = self._state_after(unit)
        if unit.save is not None and not unit.alarm:
            assert after is not None
            self._record.add(unit.save, after)
        sign = self._signer.sign
        try:
            self._release(unit.last, [(sign(first), sign(second)) for first, second in vouchers])
        except Exception as error:  # what was chosen is still to be run
            self._lines.fail(error)

    def _catch(
        self,
        unit: Unit | None,
        serial: int,
        server: str,
        what: str,
        done: Done | None = None,
        said: Sequence[Signed | Opened] = (),
    ) -> Deviation:
        """Remember that a server deviated, and keep what shows it."""
        task = None if unit is None else unit.tasks.get(serial)
        where = "" if task is None else f" ({task.kind} at step {task.step})"
        self._caught = caught = Deviation(server, what + where)
        heard = [*said]
        if unit is not None:
            both = [*unit.said.get(serial, []), *unit.opened.get(serial, [])]
            heard += [each for each in both if each is not None]
        evidence = {
            "reason": str(caught),
            "session": self._cluster.session,
            "attempt": self._attempt,
            "serial": serial,
            "said": [each.model_dump() for each in heard],
            "expected": None if done is None else vars(done),
        }
        file = self._record.catch(str(caught), evidence, f"{self._attempt}-{serial}")
        self._reporter.event("caught", server=server, reason=str(caught), evidence=str(file))
        return caught


_Pair = tuple[Voucher, Voucher]
"""For S1 and for S2, of one result."""


@dataclass(frozen=True)
class _Look:
    """What is to be run, and what then goes to SP.

    Attributes:
        units: in order.
        state: to go on from; None: where the replay is.
        vouchers: unsigned; None: nothing goes anywhere.
    """

    units: list[Unit]
    state: Any
    vouchers: list[_Pair] | None


def _iter_now(of: queue.Queue[Any]) -> Iterator[Any]:
    """What is in a queue by now."""
    while not of.empty():
        yield of.get()
