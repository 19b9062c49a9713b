"""The doctor finds nothing in what is sound, and each planted fault in a line of its own."""

import contextlib
import datetime
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_program
import yaml
from clusters import Deaf, Running, events, local
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lpgan_jax import cli
from lpgan_jax.cluster import doctor, service
from lpgan_jax.cluster.certificates import load_identity
from lpgan_jax.cluster.client import Client, RefusedBy
from lpgan_jax.cluster.condition import own_condition
from lpgan_jax.cluster.doctor import examine
from lpgan_jax.cluster.roles import _free_ports
from lpgan_jax.cluster.service import Service
from lpgan_jax.cluster.session import Session
from lpgan_jax.cluster.settings import load_cluster
from lpgan_jax.cluster.worker import Job
from lpgan_jax.programs import agreement
from lpgan_jax.training import config
from lpgan_jax.training.building import training_of

GUIDE = Path(__file__).parent.parent.parent / "docs" / "deployment.md"
DAY = datetime.timedelta(days=1)
PROGRAM = config.program_config(tiny_program.__file__)
ROLES = ("ds", "s1", "s2", "sp")


class Authority:
    """Signs certificates, as `lpgan certificates` and others would."""

    def __init__(self):
        self._key, self._name = ec.generate_private_key(ec.SECP256R1()), secrets.token_hex(4)
        ca = x509.BasicConstraints(ca=True, path_length=0)
        self.certificate = self._signed(self._name, self._key, [ca], -DAY, 400 * DAY)

    def _signed(self, name, key, extensions, start, end):
        named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self._name)])
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(issuer, named, key.public_key(), secrets.randbits(60))
        builder = builder.not_valid_before(now + start).not_valid_after(now + end)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        signed = builder.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)

    def issue(self, directory, role, name=None, start=-DAY, end=90 * DAY):
        """ROLE.pem and ROLE.key."""
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        extensions = [
            x509.SubjectAlternativeName([x509.DNSName(name or role)]),
            x509.ExtendedKeyUsage(usages),
        ]
        (directory / f"{role}.pem").write_bytes(self._signed(role, key, extensions, start, end))
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        file = directory / f"{role}.key"
        file.unlink(missing_ok=True)
        file.touch(0o600)
        file.write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture(scope="module")
def served(authority, tmp_path_factory):
    """The directory of a cluster both of whose servers answer, in this process."""
    directory = tmp_path_factory.mktemp("served")
    file, cluster = local(directory)
    certificates = file.parent / "certificates"
    (certificates / "ca.pem").write_bytes(authority.certificate)
    for role in ROLES:
        authority.issue(certificates, role)
    functions = agreement.short(agreement.digests_of(training_of(PROGRAM)))
    services = []
    (directory / "state").mkdir()
    for server in ("s1", "s2"):
        known = {
            "session": cluster.session,
            "attempt": 1,
            "config": config.to_json(PROGRAM.public()),
            "functions": functions,
        }
        (directory / "state" / f"session-{server}.json").write_text(json.dumps(known))
        session = Session(cluster, server, None, lambda *_: None, print)
        identity = load_identity(cluster, server)
        services.append(Service(cluster, identity, session, None, Deaf(server)))
    line = socket.create_server(("127.0.0.1", cluster.line.port))
    yield file.parent
    line.close()
    for each in services:
        each._server.stop(0).wait()


@pytest.fixture
def machine(served, tmp_path):
    """A role's own copy of the configuration and certificates, to plant a fault in."""
    copy = tmp_path / "machine"
    shutil.copytree(served, copy)
    fields = yaml.safe_load((copy / "cluster.yaml").read_text())

    def change(**changes):
        fields.update(changes)
        (copy / "cluster.yaml").write_text(yaml.safe_dump(fields))

    change(state="state")
    return SimpleNamespace(
        file=copy / "cluster.yaml", papers=copy / "certificates", fields=fields, change=change
    )


def wrong(findings, status="failed"):
    """{check: text} of those that are not OK; none of another status."""
    assert {finding.status for finding in findings} <= {"OK", status}
    return {finding.check: finding.text for finding in findings if finding.status == status}


def checks(report):
    """What was looked at, without the numbers of ports."""
    names = (re.split(r"\s{2,}", line)[1] for line in report.splitlines())
    return [re.sub(r"\d{4,}", "PORT", name) for name in names]


# Nothing is wrong ---------------------------------------------------------------------------------


def test_nothing_is_found_in_a_sound_cluster(machine):
    for role in ("ds", "sp"):
        findings = examine(machine.file, role, PROGRAM)
        assert wrong(findings) == {}
        told = {finding.check: finding.text for finding in findings}
        for server in ("s1", "s2"):
            assert told[f"{server}: program"] == "the same"
            assert told[f"{server}: code"].endswith("the same")
            assert {f"{server}: port", f"{server}: clock", f"{server}: versions"} < told.keys()
    (key,) = (machine.papers / "ds.key").read_text().splitlines()[1:2]
    assert not any(key in finding.text for finding in findings)


def test_real_processes(tmp_path, capsys):
    """`lpgan serve` twice, looked at by everybody; then, without them, the line is measured."""
    file, cluster = local(tmp_path)
    state = tmp_path / "state"
    running = Running([Job("serve", server, str(file)) for server in ("s1", "s2")], cluster)
    try:
        end = time.monotonic() + 60
        while not all(events(state, server, "listening") for server in ("s1", "s2")):
            assert time.monotonic() < end
            time.sleep(0.1)
        for role in ROLES:
            assert cli.main(["doctor", "--config", str(file), "--as", role]) == 0
            told = capsys.readouterr().out
            assert "failed" not in told
            assert "warning" not in told
            assert ("of `lpgan serve s1`, which runs" in told) == (role == "s1")
        found = examine(file, "s1", measure=True)
        assert "runs here, and the line is its own: stop it" in wrong(found)["line"]
    finally:
        running.stop()
    refused = [event for s in ("s1", "s2") for event in events(state, s, "refused")]
    assert not refused

    command = ["doctor", "--config", str(file), "--program", PROGRAM.program, "--measure"]
    other = subprocess.Popen(
        [sys.executable, "-m", "lpgan_jax.cli", *command, "--as", "s1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert cli.main([*command, "--as", "s2"]) == 0
    reports = [other.communicate(timeout=60)[0], capsys.readouterr().out]
    assert other.returncode == 0
    for report in reports:
        assert "failed" not in report
        assert "warning" not in report
        for line in ("mutual TLS", "clock", "code", "program", "one way", "messages, "):
            assert line in report
    (shown,) = re.findall(r"```\n(OK .*?)```", GUIDE.read_text(), re.S)[:1]
    assert checks(shown) == checks(reports[0]), "what the guide shows"


# Something is -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("issued", "check", "message"),
    [
        ({"name": "dx"}, "name in ds.pem", "dx, expected ds, as its DNS name"),
        ({"end": -DAY / 2}, "dates of ds.pem", "expired at "),
        ({"start": DAY}, "dates of ds.pem", "valid from "),
    ],
    ids=["name", "expired", "too early"],
)
def test_a_certificate(machine, authority, issued, check, message):
    authority.issue(machine.papers, "ds", **issued)
    findings = examine(machine.file, "ds")
    ((found, text),) = wrong(findings).items()
    assert found == check
    assert text.startswith(message)
    assert any(f.text.endswith("as ds cannot show who it is") for f in findings)


def test_a_certificate_that_expires_soon_is_a_warning(machine, authority):
    authority.issue(machine.papers, "ds", end=13 * DAY)
    ((check, text),) = wrong(examine(machine.file, "ds"), "warning").items()
    assert check == "dates of ds.pem"
    assert "expires at" in text


def test_a_key_that_others_can_read(machine):
    (machine.papers / "ds.key").chmod(0o640)
    ((check, text),) = wrong(examine(machine.file, "ds")).items()
    assert check == "mode of ds.key"
    assert text.startswith("640, others can read it, expected 600: chmod 600 ")


def test_the_key_of_another_certificate(machine):
    shutil.copy(machine.papers / "sp.key", machine.papers / "ds.key")
    ((check, text),) = wrong(examine(machine.file, "ds")).items()
    assert (check, text[:30]) == ("ds.key", "belongs to another certificate")


@pytest.mark.parametrize("role", ["ds", "s1", "s2"])
def test_a_foreign_authority(machine, role):
    Authority().issue(machine.papers, role)
    if role != "ds":  # others than those that this process has
        s1, s2, line = ({"host": "127.0.0.1", "port": port} for port in _free_ports(3))
        machine.change(servers={"s1": s1, "s2": s2}, line=line)
    found = wrong(examine(machine.file, role))
    assert "signed" in found.pop(f"authority of {role}.pem")
    assert found.keys() <= ({"line"} if role == "s2" else set())  # where nobody listens


def test_a_file_is_damaged_or_missing(machine):
    (machine.papers / "ca.pem").write_text("none")
    assert wrong(examine(machine.file, "ds")).keys() == {"ca.pem"}
    (machine.papers / "ca.pem").unlink()
    assert wrong(examine(machine.file, "ds")).keys() == {"ca.pem"}


def test_servers_of_another_authority(machine):
    other = Authority()
    other.issue(machine.papers, "ds")
    (machine.papers / "ca.pem").write_bytes(other.certificate)
    found = wrong(examine(machine.file, "ds"))
    assert found.keys() == {"s1: certificate", "s2: certificate"}


def test_a_server_that_refuses_a_certificate_says_why(machine):
    """Sound as far as can be seen here: the server has another authority."""
    other = Authority()
    other.issue(machine.papers, "ds")
    both = (machine.papers / "ca.pem").read_bytes() + other.certificate
    (machine.papers / "ca.pem").write_bytes(both)
    found = wrong(examine(machine.file, "ds"))
    assert found.keys() == {"s1: certificate", "s2: certificate"}
    assert all("does not take this role's certificate" in text for text in found.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"port": _free_ports(1)[0]}, "Connection refused: start `lpgan serve s2` there"),
        ({"host": "nowhere.invalid"}, ": mend servers.s2.host"),
    ],
)
def test_a_port_that_nobody_listens_at(machine, changed, message):
    s2 = machine.fields["servers"]["s2"] | changed
    machine.change(servers={**machine.fields["servers"], "s2": s2})
    ((check, text),) = wrong(examine(machine.file, "ds")).items()
    assert check == "s2: port"
    assert message in text


def test_a_server_that_does_not_answer(machine, monkeypatch):
    monkeypatch.setattr(doctor, "_ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        s2 = machine.fields["servers"]["s2"] | {"port": deaf.getsockname()[1]}
        machine.change(servers={**machine.fields["servers"], "s2": s2})
        ((check, text),) = wrong(examine(machine.file, "ds")).items()
    assert check == "s2: certificate"
    assert "no TLS: no answer within 0.3 s" in text


def test_another_server_at_the_address(machine):
    servers = machine.fields["servers"]
    machine.change(servers={**servers, "s1": dict(servers["s2"])})
    ((check, text),) = wrong(examine(machine.file, "ds")).items()
    assert (check, text[:18]) == ("s1: certificate", "of s2, expected s1")


@pytest.mark.parametrize(
    ("seconds", "status"), [(60, "warning"), (-60, "warning"), (-2 * 86400, "failed")]
)
def test_a_clock_that_is_off(machine, monkeypatch, seconds, status):
    def off():
        condition = own_condition()
        return condition.model_copy(update={"now": condition.now + seconds})

    monkeypatch.setattr(service, "own_condition", off)
    found = wrong(examine(machine.file, "ds"), status)
    assert found.keys() == {"s1: clock", "s2: clock"}
    assert f"{abs(seconds)}.0 s {'ahead' if seconds > 0 else 'behind'}" in found["s1: clock"]


def test_other_code_and_other_versions(machine, monkeypatch):
    def other(**changes):
        monkeypatch.setattr(
            service, "own_condition", lambda: own_condition().model_copy(update=changes)
        )
        return examine(machine.file, "ds", PROGRAM)

    assert wrong(other(code="f" * 64)).keys() == {"s1: code", "s2: code"}
    assert wrong(other(jax="0.1"), "warning").keys() == {"s1: versions", "s2: versions"}

    def refuse(_):
        raise RefusedBy("s1 refuses: Method not found!")

    monkeypatch.setattr(Client, "condition", refuse)
    found = wrong(examine(machine.file, "ds"), "warning")
    assert found["s1: versions"].startswith("an older version")


def test_another_program(machine, monkeypatch):
    other = config.program_config(PROGRAM.program, ["batch_size=4"])
    found = wrong(examine(machine.file, "ds", other))
    assert found.keys() == {"s1: program", "s2: program"}
    assert found["s1: program"].startswith(
        "trains with options = {}, expected {'batch_size': 4}, as here"
    )
    real = agreement.digests_of
    monkeypatch.setattr(agreement, "digests_of", lambda of: real(of) | {"step": "other"})
    found = wrong(examine(machine.file, "ds", PROGRAM))
    assert found["s1: program"].startswith("differs: step")


def test_a_program_that_cannot_be_read(machine, tmp_path):
    (tmp_path / "mine.py").write_text("1 / 0")
    settings = config.program_config(str(tmp_path / "mine.py"), [])
    ((check, text),) = wrong(examine(machine.file, "ds", settings)).items()
    assert check == "program"
    assert "ZeroDivisionError" in text


def test_ports_of_a_server(machine):
    """Somebody else's: here those of this process, which is no `lpgan serve`."""
    found = wrong(examine(machine.file, "s1"))
    port = machine.fields["servers"]["s1"]["port"]
    assert found.keys() == {f"port {port} of s1", "line"}
    assert all("another program has it" in text for text in found.values())


@pytest.mark.parametrize(
    ("role", "host", "message"),
    [
        ("s1", "192.0.2.7", "expected an address of this machine: mend line.host"),
        ("s2", "nowhere.invalid", ": mend line.host"),
    ],
)
def test_a_wrong_host_of_the_line(machine, role, host, message):
    ports = {"host": "127.0.0.1", "port": _free_ports(1)[0]}
    servers = {**machine.fields["servers"], role: ports}
    machine.change(line={"host": host, "port": 7002}, servers=servers)
    ((check, text),) = wrong(examine(machine.file, role)).items()
    assert check == "line"
    assert message in text


def test_the_other_doctor_does_not_come(machine, monkeypatch):
    ports = [{"host": "127.0.0.1", "port": port} for port in _free_ports(2)]
    machine.change(
        servers={**machine.fields["servers"], "s1": ports[0]},
        line=ports[1],
        timeouts={"wait_s": 2.0},
    )
    ((check, text),) = wrong(examine(machine.file, "s1", measure=True)).items()
    assert check == "line"
    assert "s2 did not call" in text


def test_a_disk_that_is_full(machine, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert wrong(examine(machine.file, "ds")).keys() == {"disk of state"}
    monkeypatch.undo()
    monkeypatch.setattr(os, "sysconf", lambda _: 1)
    assert wrong(examine(machine.file, "ds", PROGRAM)).keys() == {"memory"}


def test_a_configuration(machine, capsys):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))):
        machine.change(link={"s1": "10.0.0.1", "s2": "10.0.0.2", "port": 7})
        assert cli.main(["doctor", "--config", str(machine.file)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith("failed configuration cluster.yaml: link")
    assert "write `line: {host: HOST, port: PORT}`" in told


def test_as_whom(machine, capsys):
    assert cli.main(["doctor", "--config", str(machine.file)]) == 1
    assert "--as: expected one of ds, s1, s2, sp" in capsys.readouterr().err
    for role in ROLES[1:]:
        (machine.papers / f"{role}.key").unlink()
    assert wrong(examine(machine.file)) == {}
    assert cli.main(["doctor", "--config", str(machine.file), "--measure"]) == 1
    assert "at these two only" in capsys.readouterr().err
    assert load_cluster(machine.file).roles == list(ROLES)
