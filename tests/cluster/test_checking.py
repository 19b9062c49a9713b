"""What DS finds out about servers that deviate, and what it does not."""

import dataclasses
import datetime
import json
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_program
from checked import S1, S2, Broken, Cluster, Deviation, Honest, Silent, tiny

from lpgan_jax.cluster import servers
from lpgan_jax.cluster.replay import Done, Replay, difference
from lpgan_jax.cluster.reporting import BadInput, Lost
from lpgan_jax.cluster.settings import SERVERS
from lpgan_jax.cluster.signatures import Verifier
from lpgan_jax.cluster.transcript import DIGEST, digest
from lpgan_jax.cluster.vouchers import require_vouched
from lpgan_jax.cluster.wire import Commitment, Sent
from lpgan_jax.training.tasks import OutOfRange


def _with_an_extension_twice():
    """A certificate that cannot be read: it has one extension two times."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "s1")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        name,
        name,
        key.public_key(),
        x509.random_serial_number(),
        now,
        now + datetime.timedelta(days=1),
    )
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("s1")]), False)
    twice = [*builder._extensions, *builder._extensions]
    made = x509.CertificateBuilder(
        name, name, key.public_key(), builder._serial_number, now, builder._not_valid_after, twice
    ).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


_TWICE = _with_an_extension_twice()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    return Cluster(tmp_path_factory.mktemp("checked"), tiny(guard_every=2))


def test_honest_servers_pass_and_every_result_is_vouched_for(cluster):
    session = cluster.session()
    assert session.error is None
    assert session.checker.checked == cluster.training.steps
    assert [c.asked for c in session.clients] == [[], []]  # DS had the state all along
    first, second = session.servers.published
    told, answer = ["told"], ["answer"]
    kinds = [held.head.kind for held in first]
    assert kinds == [*answer, *4 * told, *answer, *2 * told, *answer, "learnt"]
    verifier = Verifier(cluster.config, cluster.identities["sp"])
    for pair in zip(first, second, strict=True):
        require_vouched(verifier, [h.head for h in pair], [h.payload for h in pair])


def test_without_a_look_losses_wait_for_the_next_one(cluster):
    session = cluster.session(check=0.5, random=lambda: 0.9)
    assert session.error is None
    # Of 3 and 6, since they are saved, and of 4, before a sample.
    assert session.checker.checked == 3
    assert [c.asked for c in session.clients] == 2 * [[5, 12]]  # before steps 2 and 5


class Pixels(Honest):
    """Constants on words of one message, as those that read an image into a kernel."""

    def message(self, number, words):
        if number == 2:
            words[0][:16] ^= 0x5A


class OtherSeed(Honest):
    def material(self, dealt, secrets, servers):
        seeds = dealt.seeds.at[self.place, 0].add(1)
        return dealt._replace(seeds=seeds), secrets


class OtherCorrection(Honest):
    place = S2

    def material(self, dealt, secrets, servers):
        changed = [x + np.ones((), x.dtype) for x in dealt.corrections]
        return dealt._replace(corrections=changed), secrets


class OldState(Honest):
    def material(self, dealt, secrets, servers):
        state, inputs = secrets
        return dealt, (_half_of(state, servers._dealer.state, self.place), inputs)


class OtherImages(Honest):
    def material(self, dealt, secrets, servers):
        state, inputs = secrets
        return dealt, (state, _half_of(inputs, jax.tree.map(lambda x: x + 1, inputs), self.place))


class SkippedUpdate(Honest):
    place = S2

    def state(self, before, after):
        return before


class OtherProgram(Honest):
    """It subtracts half of the gradient only."""

    place = S2

    def state(self, before, after):
        return jax.tree.map(lambda b, a: b + (a - b) // np.uint64(2), before, after)


class OtherResult(Honest):
    place = S2

    def result(self, payload):
        return bytes([payload[0] ^ 1]) + payload[1:]


class OtherAlarm(Honest):
    kind, step = "guard", 2

    def alarm(self, share):
        return (share + 1) % 2**64


class OtherSaid(Honest):
    """It tells DS that it sent what it should have."""

    place = S2

    def says(self, message, to):
        digests = getattr(message, "digests", b"")
        if to == "ds" and digests:
            return message.model_copy(update={"digests": bytes(DIGEST) + digests[DIGEST:]})
        return message


class Unsigned(Honest):
    def signed(self, message, to, conduct):
        signed = super().signed(message, to, conduct)
        made_up = isinstance(message, Commitment)
        return signed.model_copy(update={"signature": b"\x30\x00"}) if made_up else signed


class Earlier(Honest):
    """It says what it signed for another task."""

    def says(self, message, to):
        other_task = to == "ds" and isinstance(message, Sent)
        return message.model_copy(update={"serial": 1} if other_task else {})


class OtherLearnt(OtherResult):
    kind, step = "finish", 6


class OtherGrid(OtherResult):
    kind, step = "answer", 4


def _half_of(paired, other, place):
    return jax.tree.map(lambda a, b: a.at[place].set(b[place]), paired, other)


CHEATS = {
    Pixels: "message 3 of 7",
    OtherSeed: "message 1 of 7",
    OtherCorrection: "message",
    OldState: "message 1 of 7",
    OtherImages: "message 1 of 7",
    SkippedUpdate: "its share of the state",
    OtherProgram: "its share of the state",
    OtherResult: "its share of the result",
    OtherAlarm: "its share of the alarm",
    OtherSaid: "it says that it sent something else than what s1 says has come",
    Unsigned: "is not signed",
    Earlier: "signed for another task",
    OtherLearnt: "its share of the result (finish at step 6)",
    OtherGrid: "its share of the result (answer at step 4)",
}


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_a_deviation_is_caught_and_named(cluster, cheat):
    deviating = type("", (cheat,), {} if cheat.kind else {"kind": "train", "step": 1})()
    session = cluster.session(deviating)
    server = SERVERS[cheat.place]
    assert isinstance(session.error, Deviation)
    assert session.error.server == server
    assert str(session.error).startswith(f"{server} deviated: ")
    assert CHEATS[cheat] in str(session.error)
    assert f"({deviating.kind} at step {deviating.step})" in str(session.error)
    # What it is known by is kept, both servers are told, and nothing more goes to SP.
    (evidence,) = session.state.glob("evidence-*.json")
    kept = json.loads(evidence.read_text())
    assert kept["reason"] == str(session.error)
    assert kept["said"]
    assert {client.caught for client in session.clients} == {str(session.error)}
    for published in session.servers.published:
        steps = [held.head.step for held in published if held.head.kind == "told"]
        assert max(steps, default=0) <= deviating.step
    with pytest.raises(BadInput, match=f"this session is over: {server} deviated"):
        type(session.checker._record)(session.checker._cluster)


class Shows(Honest):
    """Another state than it had, when DS asks for it."""

    place = S2

    def shows(self, payload):
        return payload[:-1] + bytes([payload[-1] ^ 1])


def test_a_state_that_a_server_did_not_have_is_caught(cluster):
    session = cluster.session(Shows(), check=0.5, random=lambda: 0.9)
    assert str(session.error).startswith("s2 deviated: the state that it shows is not the one")


class Leaves(Pixels):
    """It goes away instead of showing its state."""

    kind, step = "train", 1

    def shows(self, payload):
        raise Lost("s1", "it hung up")


def test_who_leaves_when_it_is_asked_is_looked_at_all_the_same(cluster):
    """DS runs all from where it last knew the state."""
    draws = iter([0.9, 0.1])
    session = cluster.session(Leaves(), check=0.5, random=lambda: next(draws))
    assert [c.asked for c in session.clients] == [[3], []]
    assert isinstance(session.error, Deviation)
    assert "s1 deviated: message 3 of 7" in str(session.error)


@pytest.mark.parametrize("draw", [0.1, 0.9])
def test_who_leaves_early_is_looked_at_with_the_same_probability(cluster, draw):
    """It has sent its messages, and leaves before DS has heard of them from both."""
    cheat = type("", (Pixels,), {"kind": "train", "step": 1, "commits": "leaves"})()

    def leave(task):
        return (task.kind, task.step) == ("train", 1)

    draws = iter([0.9, draw])
    session = cluster.session(cheat, check=0.5, random=lambda: next(draws), leave=leave)
    assert isinstance(session.error, Deviation) == (draw < 0.5)
    if draw < 0.5:
        assert "s1 deviated: message 3 of 7" in str(session.error)


def test_who_leaves_the_other_server_without_its_word_is_named(cluster):
    """It alone commits, to messages that it should have sent."""
    alone = type("", (OtherSaid,), {"kind": "train", "step": 1, "commits": "alone"})()
    session = cluster.session(alone, leave=lambda task: (task.kind, task.step) == ("train", 1))
    assert isinstance(session.error, Deviation)
    assert session.error.server == "s2"


class Guard(Pixels):
    """It adds to what a look at ranges compares: does a value lie beyond?"""

    kind, step = "guard", 2

    def message(self, number, words):
        if number == 0:
            words[0][:8] ^= 0x5A


@pytest.mark.parametrize("draw", [0.1, 0.9])
def test_no_alarm_is_opened_before_both_have_committed(cluster, draw):
    """Who keeps the alarm for itself, and who leaves when it has it, is looked at with certainty;
    who leaves before, with the probability of any step, and has seen nothing.
    """
    keeps = type("", (Guard,), {"opens": lambda *_: None})()
    session = cluster.session(keeps, check=0.5, random=lambda: draw, leave=_of_guard)
    assert isinstance(session.error, Deviation)
    assert session.error.server == "s1"
    assert "(guard at step 2)" in str(session.error)
    before = type("", (Guard,), {"commits": "leaves"})()
    draws = iter([0.9, draw])
    session = cluster.session(before, check=0.5, random=lambda: next(draws), leave=_of_train)
    assert isinstance(session.error, Lost)
    assert session.servers.alarms == []


def _of_guard(task):
    return task.kind == "guard"


def _of_train(task):
    return (task.kind, task.step) == ("train", 1)


class OldAlarm(Honest):
    """It shows DS an alarm that the other server opened before."""

    kind, step = "guard", 4

    def opens(self, opened, servers):
        return opened.model_copy(update={"other": servers.alarms[0][1 - self.place]})


def test_an_alarm_of_another_look_is_no_evidence(cluster):
    session = cluster.session(OldAlarm())
    assert str(session.error).startswith("s1 deviated: how an alarm was opened was said of another")


def test_a_server_is_told_the_digest_of_its_own_result_alone(cluster):
    """A loss has few values: a digest of the other share and the own share would give it away."""
    session = cluster.session()
    for place, published in enumerate(session.servers.published):
        for held in published:
            assert held.head.voucher.server == SERVERS[place]
            assert held.head.voucher.digest == digest(held.payload)
    swapped = [[h.head for h in published][1:3] for published in session.servers.published]
    payloads = [[h.payload for h in published][1:3] for published in session.servers.published]
    verifier = Verifier(cluster.config, cluster.identities["sp"])
    require_vouched(verifier, [h[0] for h in swapped], [p[0] for p in payloads])
    wrong = (
        ("s2: its share .* vouched for another", [swapped[0][0], swapped[0][0]], [0, 0]),
        ("told: s1 and s2 give shares of different", [swapped[0][0], swapped[1][1]], [0, 1]),
        ("s2: its share of told at step 1: not the one", [swapped[0][0], swapped[1][0]], [0, 1]),
        (
            "s1: its share .* has not vouched",
            [swapped[0][0].model_copy(update={"voucher": None}), swapped[1][0]],
            [0, 0],
        ),
    )
    for message, heads, which in wrong:
        taken = [payloads[place][number] for place, number in enumerate(which)]
        with pytest.raises(BadInput, match=message):
            require_vouched(verifier, heads, taken)


def test_a_certificate_that_nobody_can_read_is_no_word_of_anybody(cluster):
    """Whatever a server shows instead of a certificate, it is the one that is named."""

    class Shown(Honest):
        kind, step = "train", 0

        def says(self, message, to):
            if isinstance(message, Commitment):
                return message.model_copy(update={"certificate": _TWICE})
            return message

    session = cluster.session(Shown())
    assert "s1 deviated: what it says is not signed: no certificate of s1" in str(session.error)


class Garbage(Honest):
    """It shows the other server something else than its certificate."""

    def certificate(self, own):
        return _TWICE


class Relayed(Honest):
    """It says that the other server showed that."""

    kind, step = "train", 1

    def relays(self, certificate):
        return _TWICE


def test_nobody_is_blamed_for_the_other_servers_certificate(cluster):
    """An honest server verifies what DS will verify, before it says it."""
    session = cluster.session(Garbage())
    assert isinstance(session.error, Broken)
    assert "no certificate of s1 by this session's authority" in str(session.error)
    assert session.checker._record.caught is None
    session = cluster.session(Relayed())
    assert isinstance(session.error, Deviation)
    assert session.error.server == "s1"


def test_an_alarm_is_the_last_of_its_unit(tmp_path):
    """Before a sample, a checkpoint and the end: none of them takes place, and SP hears of it."""
    training = dataclasses.replace(
        tiny_program.training(rate=1e8, every=1), steps=3, guard_every=1, checkpoint_every=1
    )
    session = Cluster(tmp_path, training).session(check=0.1)
    assert isinstance(session.error, OutOfRange)
    for published in session.servers.published:
        last = published[-1].head
        assert last.kind == "alarm"
        assert last.voucher.kind == "alarm"
    saved = {f"save{step}" for step in range(1, last.step)}
    assert set(session.checker._record._saves) == saved


def test_what_both_servers_have_otherwise_is_dss_own(cluster):
    """One that deviates cannot change the other's message of the same round."""
    replay = Replay(cluster.program, cluster.dealer)
    done = Done("", [b"a" * DIGEST, b"b" * DIGEST], [b"r", b"r"], [b"s", b"s"])
    for changed in ({"sent": [b"x" * DIGEST] * 2}, {"state": [b"x"] * 2}, {"result": [b"x"] * 2}):
        other = dataclasses.replace(done, **changed)
        sent = [Sent(attempt=1, serial=0, digests=d, received=b"") for d in other.sent]
        said = [
            Commitment(
                attempt=1,
                serial=0,
                own=sent[place],
                other=sent[1 - place],
                state=other.state[place],
                result=other.result[place],
                certificate="",
                other_certificate="",
            )
            for place in (S1, S2)
        ]
        with pytest.raises(BadInput, match="both servers have another than ds"):
            difference(replay, done, said, None)
        if "sent" not in changed:
            assert difference(replay, done, [said[S1], None], None)[0] == "s1"


@pytest.mark.parametrize("alarm", [0, 1])
def test_a_server_opens_no_alarm_before_ds_has_heard(cluster, alarm):
    """Its own order, which the sessions of this file do not go through."""
    calls = []

    def noted(name, result=None):
        return lambda *args, **kwargs: (calls.append(name), result)[1]

    opened = SimpleNamespace(other=SimpleNamespace(share=alarm - 5))
    accounts = SimpleNamespace(
        wait_until_heard=noted("heard"), open=noted("told"), hold=noted("held")
    )
    conduct = SimpleNamespace(
        witness=SimpleNamespace(begin=noted("begin")),
        commit=noted("commit"),
        open_alarm=noted("alarm", opened),
    )
    work = servers._Work(
        config=cluster.config,
        training=None,
        server="s1",
        other="s2",
        attempt=1,
        line=SimpleNamespace(begin=noted("line"), finish=noted("finish")),
        programs=SimpleNamespace(
            guard=noted("run", (np.zeros(2, np.uint64), 5)), rounds_of=lambda which: 1
        ),
        session=SimpleNamespace(accounts=accounts),
        journal=None,
        reporter=Silent(),
        conduct=conduct,
        noise_key=b"",
    )
    task = SimpleNamespace(
        parcel=SimpleNamespace(serial=7, step=2, kind="guard", request=None, spent=0),
        payload=bytearray(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers._Work, "_end_by_alarm", noted("end"))
        work._guard(None, task)
    expected = ["line", "begin", "run", "finish", "commit", "heard", "alarm"]
    assert calls == [*expected, *(["held", "told", "end"] if alarm else ["told"])]


def test_a_program_of_too_many_messages_is_refused_at_the_beginning(cluster, monkeypatch):
    monkeypatch.setattr(servers, "MOST_MESSAGES", 6)
    with pytest.raises(BadInput, match="integrity: a program of 7 messages, expected at most 6"):
        servers.Programs(cluster.program, "s1", 1, keeps=True)


def test_a_batch_that_is_another_when_asked_again_is_nobodys_deviation(cluster, monkeypatch):
    draws, draw = Counter(), cluster.dealer._draw

    def another(turn):
        batch = draw(turn)
        draws[turn] += 1
        return batch | {"x": batch["x"] + draws[turn] % 2}

    monkeypatch.setattr(cluster.dealer, "_draw", another)
    session = cluster.session()
    assert isinstance(session.error, BadInput)
    assert not isinstance(session.error, Deviation)
    assert "feed: step 0 has another batch when asked again" in str(session.error)


def test_a_record_of_another_state_is_compared_before_anything_is_dealt(cluster):
    """An attempt that goes on from a checkpoint which is not what was checked."""
    session = cluster.session()
    record = session.checker._record
    assert record.of("save3") != record.of("save6")
    with pytest.raises(BadInput, match="knows nothing of the checkpoint"):
        record.of("save5")
    for save, caught in (("save6", False), ("save3", True)):
        later = cluster.resumed(session, save)
        if not caught:
            later.start()
            later.settle()
            continue
        with pytest.raises(Deviation, match="the state that it shows is not the one"):
            later.start()


@pytest.mark.parametrize("check", [0.05, 0.5, 1.0])
def test_detection_is_as_likely_as_was_said(cluster, check):
    """A cheat in a random step but the last is caught with probability `check`; then the last one,
    which is looked at, is honest, and the others are missed. 50 sessions; the bounds have a false
    alarm rate of 1e-6.
    """
    from scipy.stats import binom

    rng, sessions, steps = np.random.default_rng(int(100 * check)), 50, 3
    plain = dataclasses.replace(
        cluster.training, steps=steps, sample=None, checkpoint_every=100, guard_every=0
    )
    caught = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "training", plain)
        for _ in range(sessions):
            deviating = type("", (Pixels,), {"kind": "train", "step": int(rng.integers(steps - 1))})
            session = cluster.session(deviating(), check=check, random=rng.random)
            assert session.error is None or isinstance(session.error, Deviation)
            caught += session.error is not None
            if session.error is None:  # missed: SP has its results
                assert [h.head.kind for h in session.servers.published[0]][-1] == "learnt"
    print(f"{caught} of {sessions} at {check}")
    low, high = binom.ppf([5e-7, 1 - 5e-7], sessions, check)
    assert low <= caught <= high
