"""Sessions whose servers DS checks, in this process: one of the servers may deviate."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import queue
import threading
from types import SimpleNamespace

import jax
import numpy as np
import tiny_program

from lpgan_jax.cluster.accounts import Accounts, Held
from lpgan_jax.cluster.certificates import load_identity
from lpgan_jax.cluster.checking import Checker
from lpgan_jax.cluster.conduct import Conduct
from lpgan_jax.cluster.dealer import Dealer, master_key, noise_key
from lpgan_jax.cluster.parcels import halves
from lpgan_jax.cluster.record import Deviation, Record
from lpgan_jax.cluster.replay import Replay
from lpgan_jax.cluster.reporting import Lost
from lpgan_jax.cluster.roles import local_cluster
from lpgan_jax.cluster.settings import SERVERS, load_cluster
from lpgan_jax.cluster.signatures import Signer, Verifier
from lpgan_jax.cluster.transcript import Between, arrays, digest, digest_of
from lpgan_jax.cluster.units import units
from lpgan_jax.cluster.wire import Commitment, Progress, Result, Sent
from lpgan_jax.mpc.exchange import carrying
from lpgan_jax.programs import initial_state, secured
from lpgan_jax.training.tasks import OutOfRange, Task, tasks

S1, S2 = 0, 1
SEED = 3


class Honest:
    """What a server may do otherwise, at the tasks of some serials; here it does nothing.

    A cheat changes one or more of these.

    Attributes:
        place: of the server that deviates.
        kind, step: of the task in which it does.
        commits: "both" commit then, or it "leaves" before, or it is "alone", since it leaves the
            other server without its own word.
    """

    place, kind, step, commits = S1, None, None, "both"

    def material(self, dealt, secrets, servers):
        """What its program takes; paired arrays, of which it may change its own half."""
        return dealt, secrets

    def message(self, number, words):
        """The words of its message of this number, a writable array of bytes for each part."""

    def state(self, before, after):
        """Its share of the state after a step; leaves."""
        return after

    def result(self, payload):
        """Its share of the result."""
        return payload

    def alarm(self, share):
        """Its share of the alarm, as it says it."""
        return share

    def opens(self, opened, servers):
        """What it tells DS of an opened alarm; None for nothing."""
        return opened

    def says(self, message, to):
        """What it signs, "ds" or the other server."""
        return message

    def signed(self, message, to, conduct):
        """With its signature."""
        return conduct._signer.sign(message)

    def certificate(self, own):
        """What it shows to the other server at the beginning."""
        return own

    def relays(self, certificate):
        """What it says of the other server's certificate."""
        return certificate

    def noise_key(self, own):
        """What it says that its noise is drawn from."""
        return own

    def shows(self, payload):
        """The state that DS asked for."""
        return payload


class Lines:
    """Both servers as DS sees them."""

    def __init__(self, servers):
        self._servers, self.error = servers, None

    @property
    def progress(self):
        return {
            server: Progress(
                attempt=1,
                prepared=True,
                received=0,
                done=0,
                requests=[],
                refused=None,
                commitments=of.outstanding()[0],
                opened=of.outstanding()[1],
                noise_key=key,
            )
            for server, of, key in zip(
                SERVERS, self._servers.accounts, self._servers.shown, strict=True
            )
        }

    def wait(self, wanted):
        changed = self._servers.changed
        with changed:
            assert changed.wait_for(lambda: self.error is not None or wanted(), 20)
        if self.error is not None:
            raise self.error

    def fail(self, error):
        with self._servers.changed:
            self.error = self.error or error
            self._servers.changed.notify_all()


class Client:
    """DS's line to one server."""

    def __init__(self, servers, place):
        self.server, self._servers, self._place = SERVERS[place], servers, place
        self.asked, self.caught = [], None

    def reveal(self, attempt, serial, size):
        self.asked.append(serial)
        cheat = self._servers.cheat
        payload = b"".join(x.tobytes() for x in self._servers.accounts[self._place].reveal(serial))
        assert len(payload) == size
        return bytearray(cheat.shows(payload) if cheat.place == self._place else payload)

    def release(self, release):
        if release.caught is not None:
            self.caught = release.caught
        else:
            self._servers.accounts[self._place].release(release)


class Servers(Replay):
    """Both, with their accounts."""

    def __init__(self, program, dealer, signers, verifiers, cheat):
        keys = [bytes([place]) * 32 for place in (S1, S2)]
        super().__init__(program, dealer, keys)
        self.shown = [*keys]
        self.shown[cheat.place] = cheat.noise_key(keys[cheat.place])
        self.changed, self.cheat, self.at_it = threading.Condition(), cheat, False
        self.published = [[], []]
        self.accounts = [Accounts(self.changed, published.append) for published in self.published]
        self.outputs, self.alarms = None, []
        self.wait = lambda wanted: None
        queues = queue.Queue(), queue.Queue()
        self.conducts = [None, None]

        def conduct(place):
            signer = signers[place]
            if place == cheat.place:
                signer = copy.copy(signer)
                signer.certificate = cheat.certificate(signer.certificate)
            line = Notes(queues[place], queues[1 - place], SERVERS[1 - place])
            of = signer, verifiers[place], line, self.accounts[place], 1, 30.0
            made = Deviant(self, *of) if place == cheat.place else Conduct(*of)
            made._signer = signers[place]
            self.conducts[place] = made

        self._both(conduct)

    def run(self, dealt, secrets):
        cheat = self.cheat if self.at_it else Honest()
        dealt, secrets = cheat.material(dealt, secrets, self)
        between = _Changed(cheat)
        with carrying(between) as number:
            material = dealt.seeds, dealt.corrections, secrets, dealt.public
            line = np.uint32(number)
            _, outputs = jax.block_until_ready(self._jitted[dealt.which](line, *material))
        self.outputs = outputs
        return outputs, [digests.bytes() for digests in between.sent]

    def play(self, serial, order):
        """A task at both servers, and what they say of it."""
        task, before = order.task, self.state
        cheat = self.cheat
        self.at_it = (task.kind, task.step) == (cheat.kind, cheat.step)
        self.at_it &= cheat.kind is not None
        if (done := self.do(order)) is None:
            return
        if self.at_it:
            change = cheat.state(arrays(before), arrays(self.state))
            self.set_state(_with_half(self.state, change, cheat.place))
        results = self.outputs
        if task.kind == "train":
            results = self.outputs[1]
        elif task.kind == "guard":
            results = self.outputs[0]
        elif task.kind == "finish":
            results = self._program.learnt(self.state)
        payloads = [b"".join(x.tobytes() for x in half) for half in halves(results)]
        if self.at_it:
            payloads[cheat.place] = cheat.result(payloads[cheat.place])
        kinds = {"train": "told", "guard": None, "answer": "answer", "finish": "learnt"}
        if (kind := kinds[task.kind]) is not None:
            self._hold(serial, task, kind, payloads)
        self._commit(serial, done, payloads, before)
        if done.alarm is not None:
            self.wait(lambda: all(a._heard >= serial for a in self.accounts))
            self._open(serial, task, done.alarm, payloads)

    def _hold(self, serial, task, kind, payloads):
        for place, payload in enumerate(payloads):
            head = Result(
                attempt=1,
                serial=serial,
                kind=kind,
                step=task.step + (task.kind == "train"),
                seconds=0.0,
                size=len(payload),
            )
            self.accounts[place].hold(serial, Held(head, payload))

    def _commit(self, serial, done, payloads, before):
        def commit(place):
            half = jax.tree.map(lambda x: x[place], arrays(before))
            after = jax.tree.map(lambda x: x[place], arrays(self.state))
            self.conducts[place].witness = SimpleNamespace(
                sent=Digest(done.sent[place]), received=Digest(done.sent[1 - place])
            )
            self.conducts[place].commit(serial, half, after, payloads[place])

        self._both(commit)

    def _open(self, serial, task, shares, payloads):
        if self.at_it:
            shares[self.cheat.place] = self.cheat.alarm(shares[self.cheat.place])
        found = self._both(lambda place: self.conducts[place].open_alarm(serial, shares[place]))
        self.alarms.append([opened.own for opened in found])
        if alarm := sum(shares) % 2**64:
            self._hold(serial, task, "alarm", payloads)
        for place, opened in enumerate(found):
            if self.at_it and place == self.cheat.place:
                opened = self.cheat.opens(opened, self)
            if opened is not None:
                self.accounts[place].open(opened)
        if alarm:
            self.wait(lambda: not any(a._held for a in self.accounts))
            raise OutOfRange("values were out of range")

    def _both(self, work):
        """Do something at both servers at a time; what S1 and S2 have of it."""
        found, errors = [None, None], []

        def at(place):
            try:
                found[place] = work(place)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=at, args=(place,)) for place in (S1, S2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found


class Digest:
    """As `transcript.Digests`."""

    def __init__(self, of):
        self._of = of

    def bytes(self):
        return self._of


class Broken(Exception):
    """The line between the servers is."""


class Notes:
    """One end of the line between the servers, for notes."""

    def __init__(self, own, other, name):
        self._own, self._other, self.other = own, other, name

    def swap_notes(self, own, limit_s):
        self._own.put(own)
        if (found := self._other.get(timeout=30)) is None:
            raise Broken("it hung up")
        return found

    def broken(self, reason):
        return Broken(reason)


class Deviant(Conduct):
    """The conduct of a server that may deviate in it, too."""

    def __init__(self, servers, *args):
        self._servers = servers
        super().__init__(*args)

    def commit(self, serial, before, after, result):
        servers, cheat = self._servers, self._servers.cheat
        if not servers.at_it:
            return super().commit(serial, before, after, result)
        about = {"attempt": 1, "serial": serial}
        digests, came = self.witness.sent.bytes(), digest(self.witness.received.bytes())
        sent = {
            to: cheat.signed(
                cheat.says(Sent(**about, digests=digests, received=came), to), to, self
            )
            for to in ("ds", self._line.other)
        }
        other = self._line.swap_notes(
            None if cheat.commits == "alone" else sent[self._line.other], self._limit_s
        )
        if cheat.commits == "leaves":
            return
        said = Commitment(
            **about,
            own=sent["ds"],
            other=other,
            state=digest_of(after),
            result=digest(result),
            certificate=self._signer.certificate,
            other_certificate=cheat.relays(self._other_certificate),
        )
        said = cheat.signed(cheat.says(said, "ds"), "ds", self)
        self._accounts.commit(said, before)


def _with_half(paired, changed, place):
    """A pytree of paired secrets with one half of another (arrays)."""

    def leaf(own, other):
        return own.at[place].set(other[place])

    flat, structure = jax.tree.flatten(paired)
    return jax.tree.unflatten(structure, [*map(leaf, flat, jax.tree.leaves(changed))])


class _Changed(Between):
    """A line on which one server sends something else."""

    def __init__(self, cheat):
        super().__init__()
        self._cheat = cheat

    def swap(self, number, sent, received):
        words = [np.array(part).reshape(2, -1) for part in sent]
        self._cheat.message(number, [x[self._cheat.place] for x in words])
        super().swap(number, [memoryview(x.reshape(-1)) for x in words], received)


class Cluster:
    """Everything that sessions share: keys, certificates and compiled programs."""

    def __init__(self, directory, training):
        self.training, self.program = training, secured(training.program)
        file = local_cluster(directory / "cluster", "../state", integrity={"check": 1.0})
        self.config, self.directory = load_cluster(file), directory
        self.identities = {role: load_identity(self.config, role) for role in self.config.roles}
        self.signers = [Signer(self.config, self.identities[s], s) for s in SERVERS]
        self.verifiers = [Verifier(self.config, self.identities[s]) for s in SERVERS]
        initial = initial_state(training.program, SEED)
        draw = training.feed(SEED, None)
        keys = master_key(SEED, 1), noise_key(training, SEED, 1)
        self.dealer = Dealer(training, draw, initial, self.config, *keys)
        self.question = training.sample_question(SEED)
        self._count = 0

    def session(self, cheat=None, check=1.0, random=None, steps=None, leave=None):
        """Train, under checks.

        Args:
            cheat: what one server does.
            check: probability of looking at a step.
            random: its draws.
            steps: how many; as the training says.
            leave: called after each task; the session breaks if it says so.

        Returns:
            a `Session`.
        """
        self._count += 1
        state = self.directory / f"state{self._count}"
        config = self.config.model_copy(
            update={
                "state": str(state),
                "integrity": self.config.integrity.model_copy(update={"check": check}),
            }
        )
        state.mkdir()
        cheat = cheat or Honest()
        servers = Servers(self.program, self.dealer, self.signers, self.verifiers, cheat)
        lines, clients = Lines(servers), [Client(servers, place) for place in (S1, S2)]
        checker = Checker(
            cluster=config,
            identity=self.identities["ds"],
            program=self.program,
            dealer=self.dealer,
            lines=lines,
            servers=clients,
            record=Record(config),
            reporter=Silent(),
            attempt=1,
            save=None,
            **({} if random is None else {"random": random}),
        )
        checker.start()
        training = dataclasses.replace(self.training, steps=steps or self.training.steps)
        servers.set_state(self.dealer.state)
        servers.wait = lines.wait
        found = None
        try:
            self._play(training, servers, checker, lines, leave)
        except Exception as error:
            lines.fail(error)
            found = error
        try:
            checker.settle()
        except Deviation as error:
            found = error
        return Session(found, checker, servers, clients, state)

    def resumed(self, session, save):
        """The checker of an attempt that goes on from where a session ended."""
        servers = session.servers
        for place, accounts in enumerate(servers.accounts):
            half = jax.tree.map(lambda x, place=place: x[place], arrays(servers.state))
            accounts.begin(half)
        return Checker(
            cluster=session.checker._cluster,
            identity=self.identities["ds"],
            program=self.program,
            dealer=self.dealer,
            lines=Lines(servers),
            servers=session.clients,
            record=session.checker._record,
            reporter=Silent(),
            attempt=2,
            save=save,
        )

    def _play(self, training, servers, checker, lines, leave):
        serial = 0
        for group in units(tasks(training, 0, training.sample is not None)):
            saved = any(task.kind == "checkpoint" for task in group)
            unit = checker.expect(serial, group, f"save{group[-1].step}" if saved else None)
            for task in group:
                asked = task.kind == "answer"
                question = self.question if asked else None
                answer = training.sample.answer if asked else None
                order = self.dealer.order(task, answer, question)
                unit.orders[serial] = order
                if task.kind == "checkpoint":
                    lines.wait(lambda: not any(a._held for a in servers.accounts))
                lines.wait(lambda: all(len(a._commitments) < 4 for a in servers.accounts))
                servers.play(serial, order)
                serial += 1
                if leave is not None and leave(task):
                    raise Lost(SERVERS[servers.cheat.place], "it hung up")
        lines.wait(lambda: not any(a._held for a in servers.accounts))


@dataclasses.dataclass
class Session:
    """How one went: its error, if any, and who took part."""

    error: Exception | None
    checker: Checker
    servers: Servers
    clients: list
    state: object


class Silent:
    """A reporter that says nothing."""

    def event(self, event, **fields):
        pass

    @contextlib.contextmanager
    def phase(self, name, **fields):
        yield


def tiny(**fields):
    """A training of the tiny program."""
    return dataclasses.replace(tiny_program.training(), **fields)


__all__ = ["S1", "S2", "Cluster", "Deviation", "Honest", "Task", "tiny"]
