"""What a server accepts and what it refuses, over real gRPC with real certificates."""

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
import time
from pathlib import Path

import grpc
import msgpack
import numpy as np
import pytest
from clusters import Deaf, tiny

from lpgan_jax.cluster import journal, wire
from lpgan_jax.cluster.accounts import Held
from lpgan_jax.cluster.certificates import Identity, load_identity, make_certificates
from lpgan_jax.cluster.client import Client, RefusedBy
from lpgan_jax.cluster.journal import Journal
from lpgan_jax.cluster.owners import _Lines, new_attempt, newest_common
from lpgan_jax.cluster.reporting import BadInput, Lost
from lpgan_jax.cluster.roles import local_cluster
from lpgan_jax.cluster.service import SERVICE, Service, link_options
from lpgan_jax.cluster.session import Session, Sizes
from lpgan_jax.cluster.settings import load_cluster
from lpgan_jax.cluster.wire import (
    Hello,
    Opening,
    Parcel,
    Question,
    Received,
    Release,
    Result,
    Reveal,
    Save,
    Watching,
)
from lpgan_jax.training import checkpoint, config
from lpgan_jax.training.building import training_of

SIZES = Sizes(
    state=3000,
    inputs=200,
    noise=0,
    questions={"generate": 50},
    material={"": 5000, "(guard)": 700, "generate": 900},
)
METHODS = (
    "Describe",
    "Condition",
    "Open",
    "Send",
    "Watch",
    "Results",
    "Received",
    "Ask",
    "Reveal",
    "Release",
)
SETTINGS = config.to_json(tiny())
# Each line merges the one before nine times: as YAML, it would take longer than anyone waits.
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join(9 * [f'*a{n - 1}'])}]}}\n" for n in range(1, 12)
)


class Server:
    """S1 without its programs: it takes tasks, and notes what was in them."""

    def __init__(self, directory, **fields):
        self.file = local_cluster(directory / "cluster", "../state", **fields)
        self.config = load_cluster(self.file)
        self.reporter = Deaf("s1")
        self.lost = []
        self.session = Session(
            self.config, "s1", None, lambda *of: self.lost.append(of), self.publish
        )
        self.journal = Journal(directory / "state" / "results" / "s1")
        self.service = Service(
            self.config, load_identity(self.config, "s1"), self.session, self.journal, self.reporter
        )
        self.taken = []
        self.at_work = threading.Event()
        self.at_work.set()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        while self.at_work.wait():
            task = self.session.next_task()
            self.taken.append((task.parcel.serial, hashlib.sha256(task.payload).hexdigest()))
            if task.parcel.request:
                head = Result(
                    attempt=1, serial=0, kind="answer", step=0, seconds=0.0, size=len(b"answer")
                )
                self.session.hand_over(Held(head, b"answer", task.parcel.request))
            self.session.done()

    def publish(self, held):
        self.journal.append(held.head, held.payload)

    def client(self, role, identity=None):
        identity = identity or load_identity(self.config, role)
        return Client(self.config, identity, role, "s1", self.reporter)

    def opening(self, attempt=1, **fields):
        opening = Opening(
            session=self.config.session,
            role="ds",
            attempt=attempt,
            config=SETTINGS,
            functions={"step": "0" * 64},
            steps=3,
            start=0,
            save=None,
        )
        return opening.model_copy(update=fields)

    def parcel(self, kind="train", serial=0, step=0, role="ds", size=None, **fields):
        sizes = {"state": 3000, "train": 5200, "guard": 700, "answer": 950, "inputs": 200}
        if kind == "answer":
            fields = {"answer": "generate"} | fields
        size = sizes.get(kind, 0) if size is None else size
        return Parcel(
            session=self.config.session,
            role=role,
            attempt=fields.pop("attempt", 1),
            serial=serial,
            kind=kind,
            step=step,
            size=size,
            **fields,
        )

    def begin(self):
        self.client("ds").open(self.opening())
        self.session.prepare(SIZES)

    def close(self):
        self.service._server.stop(0).wait()
        self.journal.close()


@pytest.fixture
def start(tmp_path):
    """Starts a server, which the test's end stops."""
    started = []

    def start(**fields):
        started.append(Server(tmp_path, **fields))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def server(start):
    return start()


def payload(parcel):
    """Bytes that are a parcel's own."""
    return np.random.default_rng([parcel.serial, parcel.step]).bytes(parcel.size)


def frames(*parcels):
    """Parcels with their payloads."""
    for parcel in parcels:
        yield wire.encode(parcel)
        yield from wire.chunks([payload(parcel)] if parcel.size else [])


def taken(parcels):
    """What a server notes of these parcels."""
    return [(parcel.serial, hashlib.sha256(payload(parcel)).hexdigest()) for parcel in parcels]


def call(channel, method, data):
    """A raw call: what it answers, or the code of its refusal."""
    try:
        answers = channel.stream_stream(f"/{SERVICE}/{method}")(iter([data]), timeout=20)
        return next(answers, b"")
    except grpc.RpcError as error:
        return error.code()


def channel_of(server, credentials):
    options = [("grpc.ssl_target_name_override", "s1"), *link_options(server.config.timeouts)]
    where = f"127.0.0.1:{server.service.port}"
    if credentials is None:
        return grpc.insecure_channel(where, options)
    return grpc.secure_channel(where, credentials, options)


# Who are you? -------------------------------------------------------------------------------------


def test_without_a_certificate_of_this_cluster_there_is_no_answer(server, tmp_path):
    make_certificates(tmp_path / "others", ["ds", "sp", "s1", "s2"])
    others = load_identity(
        server.config.model_copy(update={"certificates": str(tmp_path / "others")}), "ds"
    )
    own = load_identity(server.config, "ds")
    for credentials in (
        None,  # in the clear
        grpc.ssl_channel_credentials(own.authority),  # no certificate
        Identity(own.authority, others.certificate, others.key).for_channel(),  # a stranger's
    ):
        with channel_of(server, credentials) as channel:
            for method in METHODS:
                data = wire.encode(Hello(session=server.config.session, role="ds"))
                assert call(channel, method, data) == grpc.StatusCode.UNAVAILABLE
    assert server.client("ds").describe().phase == "ready"


def test_the_other_servers_certificate_gets_nothing(server):
    with channel_of(server, load_identity(server.config, "s2").for_channel()) as channel:
        for role in ("s2", "ds", "sp"):
            hello = wire.encode(Hello(session=server.config.session, role=role))
            opening = wire.encode(server.opening(role=role))
            parcel = wire.encode(server.parcel(role=role))
            question = wire.encode(
                Question(
                    session=server.config.session,
                    role=role,
                    name="n" * 16,
                    answer="generate",
                    size=0,
                )
            )
            messages = {"Open": opening, "Send": parcel, "Ask": question}
            for method in METHODS:
                answer = call(channel, method, messages.get(method, hello))
                assert answer == grpc.StatusCode.PERMISSION_DENIED, (method, role)
    assert server.session.describe().attempt == 0


def test_a_role_may_do_its_own_part_only(start):
    server = start(turns=["ds", "clinic"])
    allowed = {
        "ds": {"Describe", "Open", "Watch"},
        "clinic": {"Describe", "Watch"},
        "sp": {"Describe", "Results", "Received"},
    }
    for role, methods in allowed.items():
        identity = load_identity(server.config, role)
        with channel_of(server, identity.for_channel()) as channel:
            hello = wire.encode(Hello(session=server.config.session, role=role))
            for method in ("Describe", "Open", "Watch", "Results", "Received"):
                data = hello
                if method in ("Results", "Received"):
                    data = wire.encode(received(server).model_copy(update={"role": role}))
                if method == "Open":
                    data = wire.encode(server.opening(role=role))
                if method == "Watch":
                    watching = Watching(session=server.config.session, role=role, attempt=1)
                    data = wire.encode(watching)
                if method == "Results":
                    server.journal.append(
                        Result(attempt=1, serial=0, kind="told", step=1, seconds=0, size=3),
                        b"abc",
                    )
                answer = call(channel, method, data)
                if method in methods:
                    assert isinstance(answer, bytes), (role, method)
                else:
                    assert answer == grpc.StatusCode.PERMISSION_DENIED, (role, method)
    server.session.prepare(SIZES)
    assert server.lost == [("ds", "it is gone")]  # its call of Watch has ended
    with pytest.raises(RefusedBy, match="sp may not do this"):
        server.client("sp").send(frames(server.parcel("state", role="sp")))
    with pytest.raises(RefusedBy, match="kind: state is for ds to send"):
        server.client("clinic").send(frames(server.parcel("state", role="clinic")))


def test_a_client_knows_a_server_by_its_certificate(server, tmp_path):
    """At S1's address somebody answers with S2's certificate: nothing is sent to it."""
    swapped = server.config.model_copy(update={"names": {"s1": "s2"}})
    client = Client(swapped, load_identity(server.config, "ds"), "ds", "s1", server.reporter)
    with pytest.raises(Lost, match="lost s1"):
        client.describe()


def test_a_key_that_others_can_read_is_refused(server):
    key = f"{server.config.certificates}/ds.key"
    os.chmod(key, 0o644)
    with pytest.raises(ValueError, match=r"others can read it, expected mode 600"):
        load_identity(server.config, "ds")


# Attempts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"session": "another"}, "session: 'another'"),
        ({"role": "sp"}, "role: 'sp', expected 'ds'"),
        ({"start": 5}, "start: step 5, which has no such checkpoint"),
        ({"start": 5, "save": "x"}, "start: step 5, which has no such checkpoint"),
        ({"start": 5, "save": "x", "steps": 4}, "start: step 5, which has no such checkpoint"),
        ({"config": '{"steps": 3}'}, "config: data: missing"),
        ({"config": "["}, "config: expected a configuration in JSON"),
        ({"config": MERGES}, "config: expected a configuration in JSON"),
        ({"config": SETTINGS[:-1] + ', "steps": 3}'}, "a field is given twice"),
    ],
)
def test_an_attempt_that_does_not_fit_is_refused(server, fields, reason):
    with pytest.raises(RefusedBy, match=reason):
        server.client("ds").open(server.opening(**fields))
    assert server.client("ds").describe().phase == "ready"
    server.begin()


def test_an_attempt_is_opened_once_and_remembered(server, tmp_path):
    server.begin()
    for attempt in (1, 2):
        with pytest.raises(RefusedBy, match="attempt: busy with attempt 1"):
            server.client("ds").open(server.opening(attempt))
    # The next process of this server knows it too.
    later = Session(server.config, "s1", None, lambda *of: None, print)
    for attempt in (0, 1):
        with pytest.raises((wire.Unexpected, ValueError)):
            later.open(server.opening(attempt))
    with pytest.raises(wire.Unexpected, match="config: frac_bits differs"):
        later.open(server.opening(2, config=config.to_json(tiny(frac_bits=17))))
    longer = config.to_json(tiny(steps=99, sample_every=7))
    later.open(server.opening(2, config=longer, steps=99))
    file = Path(server.config.state) / "session-s1.json"
    known = json.loads(file.read_bytes())
    for other in ({"config": config.dump(tiny())}, {"functions": {}}):
        file.write_text(json.dumps(known | other))
        with pytest.raises(ValueError, match=r"session-s1\.json: .* session of another version"):
            Session(server.config, "s1", None, lambda *of: None, print)
    with pytest.raises(ValueError, match="of session"):
        Session(server.config.model_copy(update={"session": "other"}), "s1", None, print, print)


def test_a_program_that_was_refused_binds_nobody(server):
    """What DS opens is the session's once this server has agreed to it, not before."""
    server.client("ds").open(server.opening())
    later = Session(server.config, "s1", None, lambda *of: None, print)
    assert (later.describe().attempt, later.describe().config) == (1, None)
    with pytest.raises(wire.Unexpected, match="attempt: 1, expected more than 1"):
        later.open(server.opening(1))
    other = config.to_json(tiny(batch_size=2))
    later.open(server.opening(2, config=other, functions={"step": "f" * 64}))
    later.prepare(SIZES)
    again = Session(server.config, "s1", None, lambda *of: None, print)
    assert again.describe().config == other
    with pytest.raises(wire.Unexpected, match="config: batch_size differs"):
        again.open(server.opening(3))


def test_ds_hears_why_an_attempt_is_refused(server):
    server.client("ds").open(server.opening())
    watch = server.client("ds").watch(1)
    assert next(watch).refused is None
    server.session.refuse("another program", 0.0)
    assert next(watch).refused == "another program"
    server.session.gone("ds")
    assert server.lost == []  # it may go


def test_an_attempt_goes_on_from_a_checkpoint_that_is_intact(server):
    state = server.config.state
    for step in (4, 8):
        checkpoint.save_share(state, "s1", step, f"save{step}", {"a": np.arange(3, dtype="u8")}, 3)
    file = next((server.file.parent.parent / "state" / "checkpoints" / "s1").glob("*8.msgpack"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    session = Session(server.config, "s1", None, lambda *of: None, print)
    assert session.describe().saves == [Save(step=4, name="save4")]
    with pytest.raises(wire.Unexpected, match="start: step 8"):
        session.open(server.opening(start=8, save="save8"))
    session.open(server.opening(start=4, save="save4", steps=4))


def test_ds_is_there_from_the_beginning_to_the_end(start):
    """It opens an attempt and dies before its first parcel: the attempt is over."""
    server = start(timeouts={"wait_s": 2.0})
    server.client("ds").open(server.opening())
    _until(lambda: server.lost == [("ds", "it did not come back in 2 s")])
    again = Session(server.config, "s1", None, lambda *of: again_lost.append(of), print)
    again_lost = []
    again.open(server.opening(2))
    again.watch(Watching(session=server.config.session, role="ds", attempt=2))
    with pytest.raises(wire.Unexpected, match="ds watches this attempt already"):
        again.watch(Watching(session=server.config.session, role="ds", attempt=2))
    with pytest.raises(wire.Unexpected, match="attempt: 1, which is not going on"):
        again.watch(Watching(session=server.config.session, role="clinic", attempt=1))
    time.sleep(2.5)
    assert again_lost == []
    again.gone("clinic")
    again.gone("ds")
    assert again_lost == [("ds", "it is gone")]


def test_a_watching_ds_that_dies_is_missed(server):
    server.begin()
    client = server.client("ds")
    watch = client.watch(1)
    assert next(watch).attempt == 1
    client.close()
    _until(lambda: server.lost == [("ds", "it is gone")])


# Parcels ------------------------------------------------------------------------------------------


def whole_training(server):
    """The parcels of a short training."""
    kinds = [("state", 0), ("answer", 0), ("train", 0), ("train", 1), ("checkpoint", 2)]
    kinds += [("train", 2), ("finish", 3)]
    return [
        server.parcel(kind, serial, step, save="name" if kind == "checkpoint" else None)
        for serial, (kind, step) in enumerate(kinds)
    ]


def test_parcels_arrive_whole_and_in_order(server):
    server.begin()
    parcels = whole_training(server)
    server.client("ds").send(frames(*parcels))
    _until(lambda: len(server.taken) == len(parcels))
    assert server.taken == taken(parcels)
    assert server.lost == [("ds", "its stream ended")]


def test_nobody_is_missed_by_a_server_that_ends(server):
    """DS hears why, and is gone before the server is: that is no failure."""
    server.begin()
    parcels = whole_training(server)[:3]
    stream, ended = frames(*parcels), threading.Event()

    def until_ended():
        yield from stream
        ended.wait()

    sending = threading.Thread(target=server.client("ds").send, args=(until_ended(),))
    sending.start()
    _until(lambda: len(server.taken) == len(parcels))
    server.session.refuse("values were out of range", 0.0)
    ended.set()
    sending.join()
    server.session.gone("ds")
    assert server.lost == []


def _until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"session": "another"}, "session: 'another'"),
        ({"role": "sp"}, "role: 'sp'"),
        ({"attempt": 7}, "attempt: 7, expected 1"),
        ({"serial": 0}, "serial: 0, expected 3"),  # a replay
        ({"serial": 4}, "serial: 4, expected 3"),  # one is missing
        ({"step": 0}, "step: 0, expected 1"),
        ({"step": 2}, "step: 2, expected 1"),
        ({"kind": "state", "size": 3000}, "expected the state first"),
        ({"kind": "inputs", "size": 200}, "inputs of ds come with its tasks"),
        ({"size": 5201}, "size: 5201 bytes of train, expected 5200"),
        ({"size": 2**50}, "size: 1125899906842624 bytes"),
        ({"save": "name"}, "save: expected the name of a checkpoint, and only for one"),
        ({"request": "nobody"}, "request: 'nobody' is nobody's"),
    ],
)
def test_a_parcel_out_of_turn_is_refused_and_changes_nothing(server, wrong, reason):
    server.begin()
    good = whole_training(server)
    bad = good[3].model_copy(update=wrong)
    with pytest.raises(RefusedBy, match=reason):
        server.client("ds").send([*frames(*good[:3]), wire.encode(bad)])
    _until(lambda: len(server.taken) == 3)
    # The attempt is over for the sender, and that is all: the next parcel is still expected.
    server.session._bound.clear()
    server.client("ds").send(frames(*good[3:]))
    _until(lambda: len(server.taken) == len(good))


@pytest.mark.parametrize("chunk", [b"", b"x" * 4000, b"x" * (wire.CHUNK + 1)])
def test_a_payload_of_another_size_is_refused(server, chunk):
    server.begin()
    with pytest.raises(RefusedBy, match=r"payload: a chunk of|larger than max"):
        server.client("ds").send([wire.encode(server.parcel("state")), chunk])
    assert server.taken == []


def test_a_second_stream_is_refused_and_the_first_goes_on(server):
    server.begin()
    parcels, gate = whole_training(server), threading.Event()

    def slowly():
        yield from frames(*parcels[:2])
        gate.wait(30)
        yield from frames(*parcels[2:])

    first = threading.Thread(target=lambda: server.client("ds").send(slowly()))
    first.start()
    _until(lambda: len(server.taken) == 2)
    with pytest.raises(RefusedBy, match="ds sends in another stream already"):
        server.client("ds").send(frames(parcels[2]))
    assert server.lost == []
    gate.set()
    first.join()
    _until(lambda: len(server.taken) == len(parcels))


def test_a_server_takes_so_many_parcels_ahead_and_no_more(start):
    server, size = start(look_ahead=2), 2**22
    server.at_work.clear()
    time.sleep(0.1)
    server.client("ds").open(server.opening())
    server.session.prepare(dataclasses.replace(SIZES, material={"": size}, inputs=0))
    parcels = [server.parcel("state")]
    parcels += [server.parcel(serial=step, step=step - 1, size=size) for step in range(1, 30)]
    sent = []

    def counted():
        for parcel in parcels:
            yield wire.encode(parcel)
            yield from wire.chunks([bytes(parcel.size)])
            sent.append(parcel.serial)

    client = server.client("ds")
    stream = threading.Thread(target=_quietly(client.send), args=(counted(),))
    stream.start()
    time.sleep(3)
    # The worker has one, two wait, and one waits for a place; gRPC's buffers hold a few megabytes.
    assert server.session.ahead <= 4
    assert len(sent) <= 4 + 16 * 2**20 // size
    server.at_work.set()
    stream.join()
    _until(lambda: len(server.taken) == len(parcels))


def _quietly(function):
    def run(*arguments):
        with contextlib.suppress(Exception):
            function(*arguments)

    return run


def test_owners_send_when_it_is_their_turn(start):
    server = start(turns=["ds", "clinic", "clinic"])
    server.begin()
    inputs = [
        server.parcel("inputs", serial, step, "clinic") for serial, step in ((0, 1), (1, 2), (2, 4))
    ]
    for wrong in (
        server.parcel("inputs", 0, 0, "clinic"),  # of ds
        server.parcel("inputs", 0, 2, "clinic"),  # not yet
        server.parcel("inputs", 1, 2, "clinic"),
    ):
        with pytest.raises(RefusedBy, match=r"step: \d|serial: 1, expected 0"):
            server.client("clinic").send([wire.encode(wrong)])
    threading.Thread(
        target=_quietly(server.client("clinic").send), args=(frames(*inputs),), daemon=True
    ).start()
    for parcel in inputs:
        assert server.session.inputs_of("clinic", parcel.step) == payload(parcel)


# SP and clients -----------------------------------------------------------------------------------


def received(server, attempt=0, serial=0, step=0):
    session = server.config.session
    return Received(session=session, role="sp", attempt=attempt, serial=serial, step=step)


def test_sp_reads_the_results_that_it_does_not_have(server):
    sizes = {"told": 3, "answer": 4}
    heads = [
        Result(attempt=1, serial=n, kind=kind, step=n, seconds=0.5, size=sizes[kind])
        for n, kind in enumerate(["told", "answer", "told"], 1)
    ]
    for head in heads:
        server.journal.append(head, b"x" * head.size)
    for has in (0, 0, 2):
        results = server.client("sp").results(received(server, has and 1, has), sizes.get)
        wanted = heads[has:]
        assert [next(results) for _ in wanted] == [(h, b"x" * h.size) for h in wanted]
    with pytest.raises(wire.Malformed, match="4 bytes of answer"):
        list(server.client("sp").results(received(server), (sizes | {"answer": 5}).get))


def test_a_server_drops_what_sp_has(server, monkeypatch):
    """SP says so while it reads, and when it asks for more."""
    monkeypatch.setattr(journal, "SEGMENT", 2000)
    heads = [
        Result(attempt=1, serial=n, kind="told", step=n, seconds=0.5, size=300)
        for n in range(1, 61)
    ]
    for head in heads:
        server.journal.append(head, bytes(300))
    client, whole = server.client("sp"), server.journal.waiting
    assert whole > 60 * 300
    results = client.results(received(server), {"told": 300}.get)
    for head in heads[:40]:
        assert next(results)[0] == head
    client.received(received(server, 1, 40, 40))
    assert server.journal.waiting < whole / 3 + 2000 + 500
    assert [next(results)[0] for _ in heads[40:]] == heads[40:]
    again = client.results(received(server, 1, 55, 55), {"told": 300}.get)
    assert [next(again)[0] for _ in heads[55:]] == heads[55:]
    assert server.journal.waiting < 5 * 400 + 2000 + 500
    # Who has less than that gets what there is, and sees that steps are missing.
    assert 41 <= next(client.results(received(server), {"told": 300}.get))[0].step <= 56


def test_sp_begins_again_when_results_are_dropped(server):
    """A new attempt computes them again: what SP has read, and not on its disk, is void."""
    sizes = {"told": 3}
    heads = [
        Result(attempt=1, serial=n, kind="told", step=n, seconds=0.5, size=3) for n in range(1, 7)
    ]
    for head in heads:
        server.journal.append(head, b"old")
    results = server.client("sp").results(received(server), sizes.get)
    assert [next(results)[0] for _ in heads] == heads
    server.journal.forget(after=3)
    again = [head.model_copy(update={"attempt": 2}) for head in heads[3:]]
    for head in again:
        server.journal.append(head, b"new")
    assert list(results) == []
    for has in (0, 2, 5):  # of the first attempt
        results = server.client("sp").results(received(server, 1, has, has), sizes.get)
        wanted = heads[min(has, 3) : 3] + again
        assert [next(results)[0] for _ in wanted] == wanted


@pytest.mark.parametrize("checked", [False, True])
def test_only_a_dealer_that_checks_may_look(start, checked):
    """Several owners' sessions are never checked: DS must not see what others' images made."""
    server = start(integrity={"check": 0.5} if checked else None)
    server.client("ds").open(server.opening(checked=checked))
    server.session.prepare(SIZES)
    server.session.accounts.begin({"w": np.arange(3, dtype=np.uint64)})
    ds = server.client("ds")
    release = Release(session=server.config.session, role="ds", attempt=1, upto=-2)
    if checked:
        assert bytes(ds.reveal(1, -1, 24)) == np.arange(3, dtype="<u8").tobytes()
        ds.release(release.model_copy(update={"upto": -1}))
        with pytest.raises(RefusedBy, match="whose state is not here"):
            ds.reveal(1, -1, 24)
        with pytest.raises(RefusedBy, match="attempt: 2, which is not going on"):
            ds.reveal(2, -1, 24)
        ds.release(release.model_copy(update={"caught": "s2 deviated"}))
        assert server.lost == [("ds", "it ended this session: s2 deviated", True)]
    else:
        with pytest.raises(RefusedBy, match="does not check servers in this session"):
            ds.reveal(1, -1, 24)
        with pytest.raises(RefusedBy, match="does not check servers in this session"):
            ds.release(release)
    other = server.opening(attempt=2, checked=not checked)
    server.session._opening = None
    with pytest.raises(RefusedBy, match=r"integrity: ds .* expected as this server's"):
        server.client("ds").open(other)


def test_answers_are_for_who_asked(start):
    server = start(clients=["alice", "bob"], most_questions=1)
    server.begin()

    def question(role, name, size=50, answer="generate"):
        session = server.config.session
        return Question(session=session, role=role, name=name * 16, answer=answer, size=size)

    shares = [np.arange(50, dtype=np.uint8)]

    def ask(role, *of, shares=shares):
        return server.client(role).ask(question(role, *of), shares, 6, 20)[1]

    with pytest.raises(RefusedBy, match="answers come after training"):
        ask("sp", "r", 0, shares=[])
    parcels = whole_training(server)

    def dealt():
        yield from frames(*parcels)
        sizes = (("r", 950), ("q", 900), ("a", 900), ("b", 900))
        for serial, (name, size) in enumerate(sizes, len(parcels)):
            _until(lambda name=name: name * 16 in server.session._wishes)
            yield from frames(server.parcel("answer", serial, 3, size=size, request=name * 16))

    threading.Thread(
        target=_quietly(server.client("ds").send), args=(dealt(),), daemon=True
    ).start()
    _until(lambda: len(server.taken) == len(parcels))
    assert ask("sp", "r", 0, shares=[]) == b"answer"  # to a question of DS's
    assert ask("sp", "q") == b"answer"
    with pytest.raises(RefusedBy, match="size: 49, expected 50 bytes of a question, or 0"):
        ask("sp", "w", 49)
    with pytest.raises(RefusedBy, match=r"size: 0, expected 50 bytes of a question$"):
        ask("alice", "w", 0, shares=[])
    with pytest.raises(RefusedBy, match="answer: 'predict', expected one of generate"):
        ask("alice", "w", 50, "predict")
    assert ask("alice", "a") == b"answer"
    with pytest.raises(RefusedBy, match="alice has asked 1 questions, as many as it may"):
        ask("alice", "c")
    assert ask("bob", "b") == b"answer"  # who has asked nothing yet
    # The server's next process, in another attempt, has counted too.
    again = Session(server.config, "s1", None, lambda *of: None, print)
    again.open(server.opening(2))
    again.prepare(SIZES)
    again._finished = True
    with pytest.raises(wire.Unexpected, match="alice has asked 1 questions"):
        again.check_question("alice", question("alice", "d"))


def test_a_question_that_one_server_knows_is_dropped(start):
    server = start(clients=["alice"])
    server.begin()
    question = Question(
        session=server.config.session, role="alice", name="a" * 16, answer="generate", size=50
    )

    parcels = whole_training(server)

    def dealt():
        yield from frames(*parcels)
        _until(lambda: question.name in server.session._wishes)
        for serial, request in enumerate((question.name, "nobody's"), len(parcels)):
            yield from frames(server.parcel("drop", serial, 3, request=request))

    threading.Thread(
        target=_quietly(server.client("ds").send), args=(dealt(),), daemon=True
    ).start()
    _until(lambda: len(server.taken) == len(parcels))
    with pytest.raises(RefusedBy, match="the other server does not know this question"):
        server.client("alice").ask(question, [np.arange(50, dtype=np.uint8)], 6, 20)
    _until(lambda: server.session.progress(None, 0).done == len(parcels) + 2)
    assert not server.session._wishes


def test_only_so_many_questions_wait(start):
    server = start(clients=["alice"])
    server.begin()
    server.session._finished = True
    session, most = server.config.session, 64 // 2

    def question(number):
        name = f"{number:016}"
        return Question(session=session, role="alice", name=name, answer="generate", size=50)

    for number in range(most):
        server.session.ask("alice", question(number), bytearray(50))
    with pytest.raises(wire.Unexpected, match=f"{most} questions of alice are waiting"):
        server.session.ask("alice", question(most), bytearray(50))
    with pytest.raises(wire.Unexpected, match="is asked already"):
        server.session.ask("sp", question(0), bytearray(50))


# DS's choice --------------------------------------------------------------------------------------


def _described(saves, attempt=1):
    return wire.Description(
        session="s",
        role="s1",
        phase="ready",
        attempt=attempt,
        start=0,
        prepared=False,
        config=None,
        functions={},
        steps=0,
        saves=[Save(step=step, name=name) for step, name in saves],
    )


def test_ds_goes_on_from_the_newest_step_that_both_have():
    training = training_of(tiny(steps=20, checkpoint_every=4))
    both = [_described([(4, "a"), (8, "b"), (12, "c")]), _described([(4, "a"), (8, "b")])]
    assert newest_common(both, training) == (8, "b")
    half = [_described([(4, "a"), (8, "x")]), _described([(4, "a"), (8, "b")])]
    assert newest_common(half, training) == (4, "a")
    assert newest_common([_described([]), _described([])], training) == (0, None)
    # The first of a session, that one server was about to write.
    assert newest_common([_described([]), _described([(4, "a")])], training) == (0, None)
    with pytest.raises(BadInput, match="steps: 6 given, and 8 are done"):
        newest_common(both, training_of(tiny(steps=6, checkpoint_every=4)))


@pytest.mark.parametrize(
    "descriptions",
    [
        (_described([]), _described([(4, "a"), (8, "b")])),
        (_described([]), _described([(8, "b")])),  # after a resumption
        (_described([], attempt=0), _described([(4, "a")])),  # it has forgotten everything
        (_described([(4, "a")]), _described([(8, "b")])),
    ],
)
def test_ds_does_not_begin_again_where_shares_are_lost(descriptions):
    with pytest.raises(BadInput, match="a server's state is lost, so start a new session"):
        newest_common(descriptions, training_of(tiny(steps=20, checkpoint_every=4)))


def test_an_attempts_number_is_written_down_at_ds_too(server):
    numbers = [new_attempt(server.config, [_described([], n)] * 2) for n in (0, 0, 7, 0)]
    assert numbers == [1, 2, 8, 9]
    other = server.config.model_copy(update={"session": "other"})
    assert new_attempt(other, [_described([], 0)] * 2) == 1


# Nonsense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["s2", "sp"])
def test_no_role_can_keep_the_others_out(server, role):
    """Calls that say nothing, many of them: they wait, or are refused, and DS is answered."""
    silence = threading.Event()

    def nothing():
        silence.wait(60)
        yield b""

    with channel_of(server, load_identity(server.config, role).for_channel()) as channel:
        calls = [
            channel.stream_stream(f"/{SERVICE}/{METHODS[n % len(METHODS)]}")(nothing(), timeout=30)
            for n in range(60)
        ]
        time.sleep(1)
        assert server.client("ds").describe().phase == "ready"
        server.begin()
        for one in calls:
            one.cancel()
        silence.set()


def test_a_large_map_is_refused_unread(server):
    fields = msgpack.packb({f"f{n}": 0 for n in range(100_000)})
    with channel_of(server, load_identity(server.config, "ds").for_channel()) as channel:
        started = time.monotonic()
        assert call(channel, "Describe", fields) == grpc.StatusCode.INVALID_ARGUMENT
        assert time.monotonic() - started < 1


def _mutated(rng, data):
    """A message with some of its bytes changed, cut, doubled or replaced."""
    data = bytearray(data)
    kind = rng.integers(7)
    if kind == 0:
        return rng.bytes(int(rng.integers(0, 200)))
    if kind == 1 and data:
        for place in rng.integers(0, len(data), int(rng.integers(1, 8))):
            data[place] = rng.integers(256)
    elif kind == 2:
        del data[int(rng.integers(0, len(data) + 1)) :]
    elif kind == 3:
        data += rng.bytes(int(rng.integers(1, 40)))
    elif kind == 4:
        data = data * 2
    elif kind == 5:  # a message, but for a field
        fields = msgpack.unpackb(bytes(data))
        odd = (None, -1, 0, 2**63, "", "x" * 70, b"\xff", [], [[]], {}, 1.5, True, "checkpoint")
        fields[list(fields)[rng.integers(len(fields))]] = odd[rng.integers(len(odd))]
        data = msgpack.packb(fields)
    return bytes(data)


def attack(server, count, seed):
    """Send so many malformed, oversized and replayed messages, as several roles; their answers."""
    rng = np.random.default_rng(seed)
    valid = {
        "Describe": [Hello(session=server.config.session, role="ds")],
        "Condition": [Hello(session=server.config.session, role="ds")],
        "Open": [server.opening(1), server.opening(2, session="x")],
        "Send": [server.parcel("state"), server.parcel("train", 2, 0), server.parcel(attempt=9)],
        "Watch": [Watching(session="another", role="ds", attempt=1)],
        "Results": [received(server).model_copy(update={"role": "ds"})],
        "Received": [received(server), received(server, 2**64 - 1, 1)],
        "Ask": [
            Question(
                session=server.config.session,
                role="sp",
                name="f" * 16,
                answer="generate",
                size=10**15,
            )
        ],
        "Reveal": [
            Reveal(session=server.config.session, role="ds", attempt=1, serial=serial)
            for serial in (-1, 0, 10**9)
        ],
        "Release": [
            Release(session=server.config.session, role="ds", attempt=1, upto=-1),
            Release(session=server.config.session, role="ds", attempt=2, upto=9),
        ],
    }
    encoded = {m: [wire.encode(message) for message in of] for m, of in valid.items()}
    channels = {
        role: channel_of(server, load_identity(server.config, role).for_channel())
        for role in ("ds", "sp", "s2")
    }
    answers = {}
    huge = bytes(wire.LARGEST_MESSAGE + 1)
    for number in range(count):
        method = METHODS[int(rng.integers(len(METHODS)))]
        role = ("ds", "sp", "s2")[int(rng.integers(3))]
        data = _mutated(rng, encoded[method][int(rng.integers(len(encoded[method])))])
        if number % 1000 == 0:
            data = huge
        answer = call(channels[role], method, data)
        key = answer if isinstance(answer, grpc.StatusCode) else "answered"
        answers[key] = answers.get(key, 0) + 1
    for channel in channels.values():
        channel.close()
    return answers


def _attacked(server, count):
    """A training's parcels come through, unchanged, between so many messages of nonsense."""
    server.begin()
    watch = server.client("ds").watch(1)
    assert next(watch).prepared
    parcels, gate = whole_training(server), threading.Event()

    def slowly():
        yield from frames(*parcels[:3])
        gate.wait(1200)
        yield from frames(*parcels[3:])

    stream = threading.Thread(target=lambda: server.client("ds").send(slowly()))
    stream.start()
    _until(lambda: len(server.taken) == 3)
    before = server.session.describe()
    answers = attack(server, count, seed=1)
    assert server.lost == []
    assert server.session.describe() == before
    gate.set()
    stream.join()
    _until(lambda: len(server.taken) == len(parcels))
    assert server.taken == taken(parcels)
    refusals = {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
    assert answers.keys() <= refusals | {"answered"}, answers
    # What was answered was left unchanged by the mutation: a question, or an empty stream.
    return answers


def test_nonsense_is_refused(server):
    answers = _attacked(server, 3000)
    assert answers[grpc.StatusCode.INVALID_ARGUMENT] > 500


@pytest.mark.slow
def test_a_hundred_thousand_messages_of_nonsense(server):
    print(_attacked(server, 100_000))


def test_networks_are_imported_only_if_the_server_itself_names_them(start):
    """Whatever DS says: `os:abort`, say, would be called."""
    fields = json.loads(SETTINGS)
    fields["model"]["module"] = "os:abort"
    asked = {"config": json.dumps(fields)}
    server = start(modules=["my_nets:Networks"])
    with pytest.raises(RefusedBy, match=r"model\.module: os:abort, expected one of"):
        server.client("ds").open(server.opening(**asked))
    fields["model"]["module"] = "my_nets:Networks"  # which is not there, nor looked for yet
    server.client("ds").open(server.opening(config=json.dumps(fields)))


def test_a_client_reads_no_more_than_it_asked_for(server, monkeypatch):
    """A server could answer without an end, until memory is full."""
    client, read, closed = server.client("ds"), [], []

    def flood(method, frames, limit_s=None):
        try:
            for number in range(10**6):
                read.append(number)
                yield b"x"
        finally:
            closed.append(method)

    monkeypatch.setattr(client, "_call", flood)
    client.release(Release(session="s", role="ds", attempt=1, upto=0))
    assert (read, closed) == ([0], ["Release"])


def test_a_server_that_takes_nothing_is_lost_in_the_process(server):
    """So DS still looks at what servers did: it is not its supervisor that ends it."""
    server.begin()
    lines = _Lines([server.client("ds")], 1)
    parcel = server.parcel("state")
    lines.put("s1", parcel, [], 1.0)  # nobody sends yet
    started = time.monotonic()
    with pytest.raises(Lost, match="lost s1: it took nothing for 1 s"):
        lines.put("s1", parcel, [], 1.0)
    assert time.monotonic() - started < 10
    assert not lines.wait(lambda: False, 0.2)
    lines.fail(Lost("s1", "it is gone"))
    with pytest.raises(Lost, match="it is gone"):
        lines.wait(lambda: True)
