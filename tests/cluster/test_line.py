"""The line between the servers: who may be on it, and that whatever is done to it is refused."""

import contextlib
import queue
import socket
import ssl
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from servers import QUICKLY, dealt, run_servers, server_program

import lpgan_jax as lp
from lpgan_jax.cluster.certificates import line_context, make_certificates
from lpgan_jax.cluster.line import HEAD, Line, LineBroken, Listener, dial
from lpgan_jax.cluster.roles import local_cluster
from lpgan_jax.cluster.settings import load_cluster
from lpgan_jax.mpc.party import simulate

QUICK_S = 5.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    return load_cluster(local_cluster(tmp_path_factory.mktemp("line"), "state"))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def moved(config, port):
    return config.model_copy(update={"line": config.line.model_copy(update={"port": port})})


def in_thread(function, *arguments):
    """Where what it returns, or the error that it raises, will be."""
    results = queue.Queue()

    def run():
        try:
            results.put(function(*arguments))
        except Exception as error:
            results.put(error)

    threading.Thread(target=run, daemon=True).start()
    return results


def joined(config, *, s2=None, limit_s=QUICK_S):
    """(S1's line, S2's, why callers were refused): lines, or the errors instead.

    Args:
        s2: S2's configuration, if it is another one.
    """
    config = moved(config, free_port()) if s2 is None else config
    refused = []
    listener = Listener(config, line_context(config, "s1"))
    first = in_thread(listener.accept, 3, limit_s, refused.append)
    second = in_thread(dial, s2 or config, line_context(s2 or config, "s2"), 3, limit_s)
    return first.get(), second.get(), refused


@contextlib.contextmanager
def lines(config, **others):
    first, second, _ = joined(config, **others)
    assert isinstance(first, Line), first
    assert isinstance(second, Line), second
    with contextlib.closing(first), contextlib.closing(second):
        yield first, second


def swap(line, number, sizes):
    """A round of random words; what came."""
    rng = np.random.default_rng([number, line.other == "s1"])
    words = [memoryview(rng.bytes(size)) for size in sizes]
    came = [memoryview(bytearray(size)) for size in sizes]
    line.swap(number, words, came)
    return [bytes(w) for w in words], [bytes(c) for c in came]


def both(first, second, number, sizes):
    """The same on both lines: results, or errors."""
    other = in_thread(swap, second, number, sizes)
    own = in_thread(swap, first, number, sizes)
    return own.get(timeout=60), other.get(timeout=60)


def begin(pair, rounds, limit_s=QUICK_S):
    for line in pair:
        line.begin("step 3", rounds, limit_s)


# Messages -----------------------------------------------------------------------------------------


def test_messages_arrive_whole_and_are_counted(cluster):
    shapes = [[8], [0], [1, 0, 7], [40_000, 40_000, 3], [], [2**25, 5]]
    with lines(cluster) as pair:
        before = [(line.sent, line.received) for line in pair]
        for _ in range(2):
            begin(pair, len(shapes), 60)
            for number, sizes in enumerate(shapes):
                (sent, came), (sent_back, came_back) = both(*pair, number, sizes)
                assert came == sent_back
                assert came_back == sent
            for line in pair:
                line.finish()
        size = 2 * sum(HEAD.size + sum(sizes) for sizes in shapes)
        for line, (sent, received) in zip(pair, before, strict=True):
            assert (line.sent - sent, line.received - received) == (size, size)


def test_two_servers_compute_over_it(cluster):
    """Bit-identical to the simulation."""

    def function(seat, x, _):
        for _ in range(3):
            mask = seat.mask(x.shape)
            x = seat.public_share(seat.open(x - mask.share, "mask")) + mask.share
        return x

    x = np.random.default_rng(0).integers(0, 2**64, (2, 50), np.uint64)
    program, key = server_program(function, x), lp.key(1)
    corrections = dealt(function, key, x, None)
    with lines(cluster) as pair:
        begin(pair, program.plan.count, 60)
        run = program.compile(options=QUICKLY)
        outputs, _ = run_servers(program, run, key, corrections, x, None, pair)
        np.testing.assert_array_equal(outputs, simulate(function, key, x))
        # Afterwards a step of the same program fails: its error comes out of the program.
        pair[1].close()
        begin(pair, program.plan.count)
        with lp.mpc.exchange.carrying(pair[0]) as number:
            place = np.asarray([0, number], np.uint32)
            words = jax.random.key_data(lp.key(2))
            with pytest.raises(jax.errors.JaxRuntimeError, match="step 3, round 1 of 3: it hung"):
                jax.block_until_ready(run(place, words, corrections, x[0], None))


def test_notes_tell_what_differs(cluster):
    with lines(cluster) as (first, second):
        other = in_thread(second.agree, {"step": "b", "told": "c"}, QUICK_S)
        with pytest.raises(LineBroken, match="the program differs from that of s2: step"):
            first.agree({"step": "a", "told": "c"}, QUICK_S)
        assert "differs from that of s1: step" in str(other.get())
    with lines(cluster) as (first, second):
        other = in_thread(second.agree, {"step": "a"}, QUICK_S)
        first.agree({"step": "a"}, QUICK_S)
        assert other.get() is None


# Who may be on it ---------------------------------------------------------------------------------


def _other_names(config, tmp_path, **names):
    """The configuration of somebody who has other files: {role: whose certificate it shows}."""
    directory = tmp_path / "certificates"
    directory.mkdir()
    given = Path(config.certificates)
    for role in ("s1", "s2"):
        for end in ("pem", "key"):
            source = given / f"{names.get(role, role)}.{end}"
            (directory / f"{role}.{end}").write_bytes(source.read_bytes())
            (directory / f"{role}.{end}").chmod(0o600)
    (directory / "ca.pem").write_bytes((given / "ca.pem").read_bytes())
    return config.model_copy(update={"certificates": str(directory)})


def test_sps_certificate_is_not_s2s(cluster, tmp_path):
    config = moved(cluster, free_port())
    first, second, refused = joined(config, s2=_other_names(config, tmp_path, s2="sp"), limit_s=1.5)
    assert "its certificate is of sp, expected s2" in refused[0]
    assert "s2 did not call" in str(first)
    assert isinstance(second, LineBroken)


def test_sps_certificate_is_not_s1s(cluster, tmp_path):
    config = moved(cluster, free_port())
    posing = _other_names(config, tmp_path, s1="sp")
    first, second, _ = joined(posing, s2=config, limit_s=1.5)
    assert isinstance(first, LineBroken)
    assert "its certificate is of sp, expected s1" in str(second)


def test_another_sessions_authority_is_refused_at_both_ends(cluster, tmp_path):
    make_certificates(tmp_path / "certificates", cluster.roles)
    config = moved(cluster, free_port())
    foreign = config.model_copy(update={"certificates": str(tmp_path / "certificates")})
    first, second, refused = joined(config, s2=foreign, limit_s=1.5)
    assert isinstance(first, LineBroken)
    assert "certificate" in str(second)
    assert refused


@pytest.mark.parametrize("name", ["session", "attempt"])
def test_another_session_or_attempt_is_refused(cluster, name):
    config = moved(cluster, free_port())
    refused = []
    other = config.model_copy(update={"session": "another"}) if name == "session" else config
    listener = Listener(config, line_context(config, "s1"))
    first = in_thread(listener.accept, 3, 1.5, refused.append)
    attempt = 3 if name == "session" else 2
    second = in_thread(dial, other, line_context(other, "s2"), attempt, 1.5)
    assert "s2 did not call" in str(first.get())
    assert f"it is in attempt {attempt} of {other.session!r}, expected 3" in refused[0]
    assert "it is in attempt 3" in str(second.get())


def test_strangers_do_not_keep_s2_out(cluster):
    """Without a certificate, with nothing to say, in plain text: each is turned away."""
    config = moved(cluster, free_port())
    listener = Listener(config, line_context(config, "s1"))
    refused = []
    first = in_thread(listener.accept, 3, 30.0, refused.append)
    address = ("127.0.0.1", config.line.port)
    silent = [socket.create_connection(address) for _ in range(40)]  # more than it talks to
    with socket.create_connection(address) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        with contextlib.suppress(OSError):
            plain.recv(100)
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.check_hostname, anonymous.verify_mode = False, ssl.CERT_NONE
    with (
        contextlib.suppress(OSError),
        socket.create_connection(address) as connection,
        anonymous.wrap_socket(connection) as tls,
    ):
        tls.recv(1)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(address) as connection, pytest.raises(ssl.SSLError):
        old.wrap_socket(connection)
    second = dial(config, line_context(config, "s2"), 3, QUICK_S)
    with contextlib.closing(second), contextlib.closing(first.get()) as own:
        assert isinstance(own, Line)
        assert len(refused) >= 3
    for connection in silent:
        connection.close()


def test_a_taken_port_is_named(cluster):
    config = moved(cluster, free_port())
    listener = Listener(config, line_context(config, "s1"))
    with pytest.raises(OSError, match=rf"line: 127.0.0.1, port {config.line.port}: .*in use"):
        Listener(config, line_context(config, "s1"))
    listener.close()


# What is done to it -------------------------------------------------------------------------------


class Middle:
    """Somebody between S2 and S1, who passes on TLS records, or does something with one of them."""

    def __init__(self, port):
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.change = None
        self._sockets = [self._listener]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                target = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [caller, target]
                for pair in ((caller, target), (target, caller)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source, target):
        with contextlib.suppress(OSError), source.makefile("rb") as reader:
            while head := reader.read(5):
                record = head + reader.read(int.from_bytes(head[3:5], "big"))
                records = [record]
                if self.change is not None and source.getpeername()[1] != self._target:
                    records = self.change(record)
                for each in records:
                    target.sendall(each)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        for end in self._sockets:
            end.close()


def _flipped(record):
    return [record[:-3] + bytes([record[-3] ^ 1]) + record[-2:]]


def _held_back():
    kept = []

    def swap_two(record):
        if not kept:
            kept.append(record)
            return []
        return [record, kept.pop()]

    return swap_two


ATTACKS = {
    "changed": lambda: _flipped,
    "changed length": lambda: lambda record: [record[:4] + bytes([record[4] ^ 1]) + record[5:]],
    "another type": lambda: lambda record: [b"\x15" + record[1:]],
    "dropped": lambda: lambda record: [],
    "repeated": lambda: lambda record: [record, record],
    "reordered": _held_back,
    "truncated": lambda: lambda record: [record[:-7]],
    "made up": lambda: lambda record: [b"\x17\x03\x03\x00\x40" + bytes(64)],
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_who_is_in_the_middle_only_ends_it(cluster, attack):
    """From a moment on: a refusal that names the round, at both ends, and never other words."""
    config = moved(cluster, free_port())
    middle = Middle(config.line.port)
    sizes = [40_000, 9]
    try:
        with lines(config, s2=moved(config, middle.port)) as pair:
            begin(pair, 9, 1.5)
            assert both(*pair, 0, sizes)[0][1] == both_sent(1, 0, sizes)
            middle.change = ATTACKS[attack]()
            for number in range(1, 9):
                first, second = both(*pair, number, sizes)
                if isinstance(first, Exception):
                    break
                assert first[1] == both_sent(1, number, sizes)
            for error, line in ((first, pair[0]), (second, pair[1])):
                if not isinstance(error, Exception):  # it had all that it needs: the next will tell
                    error = in_thread(swap, line, number + 1, sizes).get(timeout=60)
                assert isinstance(error, LineBroken)
                assert f"step 3, round {number + 1} of 9" in str(error) or (
                    f"step 3, round {number + 2} of 9" in str(error)
                )
                assert line.failure is error
                again = in_thread(swap, line, number + 2, sizes).get()
                assert again is error, "a broken line stays so"
    finally:
        middle.close()


def both_sent(sender, number, sizes):
    """What `swap` sends: S1 has 1 at the other end."""
    rng = np.random.default_rng([number, sender == 1])
    return [rng.bytes(size) for size in sizes]


@pytest.mark.parametrize(
    ("head", "text"),
    [
        ((0, 1, 24), "of this task, round 2, 24 bytes came, expected round 1 of this, 24 bytes"),
        ((1, 0, 24), "a message of another task, round 1, 24 bytes"),
        ((0, 0, 2**62), "a message of this task, round 1, 4611686018427387904 bytes"),
        ((0, 0, 23), "a message of this task, round 1, 23 bytes"),
    ],
)
def test_a_server_that_sends_something_else_is_refused_unread(cluster, head, text):
    with lines(cluster) as (first, second):
        begin([first], 4)
        second._socket.setblocking(True)
        task, *others = head
        second._socket.sendall(HEAD.pack(first._task + task, *others) + bytes(24))
        came = [memoryview(bytearray(24))]
        with pytest.raises(LineBroken, match=text):
            first.swap(0, [memoryview(bytes(24))], came)
        assert bytes(came[0]) == bytes(24)


def test_who_is_silent_or_gone_is_named_in_time(cluster):
    with lines(cluster) as (first, _):
        begin([first], 4, 0.5)
        started = time.monotonic()
        with pytest.raises(LineBroken, match=r"step 3, round 1 of 4: no answer in time"):
            swap(first, 0, [8])
        assert 0.4 < time.monotonic() - started < 3
    with lines(cluster) as (first, second):
        begin([first], 4, 30)
        waiting = in_thread(swap, first, 0, [2**24])  # more than buffers hold
        time.sleep(0.2)
        second.close()
        assert isinstance(waiting.get(timeout=5), LineBroken)


def test_servers_with_different_tasks_do_not_combine_their_words(cluster):
    with lines(cluster) as (first, second):
        first.begin("answer 'a'", 1, QUICK_S)
        second.begin("answer 'b'", 1, QUICK_S)
        for result in both(first, second, 0, [8]):
            assert "a message of another task" in str(result) or "hung up" in str(result)


def test_a_call_ends_in_time_though_s1_does_not_answer(cluster):
    config = moved(cluster, free_port())
    with socket.create_server(("127.0.0.1", config.line.port)):
        started = time.monotonic()
        with pytest.raises(LineBroken, match=r"s1 at .*: no answer in time \(called for 1.5 s\)"):
            dial(config, line_context(config, "s2"), 3, 1.5)
        assert time.monotonic() - started < 4


def test_rounds_are_taken_in_turn_and_all(cluster):
    with lines(cluster) as pair:
        begin(pair, 2)
        both(*pair, 0, [8])
        with pytest.raises(LineBroken, match="step 3: 1 of 2 rounds took place"):
            pair[0].finish()
    with lines(cluster) as pair:
        begin(pair, 2)
        with pytest.raises(LineBroken, match="round 2 of 2: out of turn, expected round 1"):
            swap(pair[0], 1, [8])
