"""Four machines: network namespaces with addresses of their own, and lines of some speed."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from clusters import events

from lpgan_jax.cluster.certificates import make_certificates
from lpgan_jax.cluster.worker import Job
from lpgan_jax.training import config

FORWARDER = Path(__file__).parent / "forwarder.py"
ROLES = ("s1", "s2", "ds", "sp")
LINE = {"s1": "10.77.1.1", "s2": "10.77.1.2"}
WIDE = {"s1": "10.77.2.1", "s2": "10.77.2.2", "ds": "10.77.2.3", "sp": "10.77.2.4"}
IP_AND_TCP = 20 + 32  # bytes of headers of a packet, with the timestamps that Linux sends


def possible() -> bool:
    """Whether this machine lets us make namespaces and TUN devices."""
    if os.geteuid() or not shutil.which("ip") or not os.path.exists("/dev/net/tun"):
        return False
    probe = f"lpgan-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return False
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return True


class Machines:
    """Namespaces of S1, S2, DS and SP: `line` between S1 and S2, and `wide` for all.

    Each end sends at most so many bits a second; each packet takes so long. `record`: a file for
    the packets of `line`.
    """

    def __init__(
        self, bits_per_s: float, delay_s: float, mtu: int, record: Path | None = None
    ) -> None:
        self._tag = secrets.token_hex(2)
        for role in ROLES:
            self._ip("netns", "add", self.namespace(role))
            self._ip("-n", self.namespace(role), "link", "set", "lo", "up")
        ends = [["line", self.namespace(r), a] for r, a in LINE.items()]
        ends += [["wide", self.namespace(r), a] for r, a in WIDE.items()]
        recorded = None if record is None else ["line", str(record)]
        settings = {"delay_s": delay_s, "ends": ends, "mtu": mtu, "record": recorded}
        self._forwarder = subprocess.Popen(
            [sys.executable, str(FORWARDER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._forwarder.stdout.readline() == b"ready\n"
        for net, namespace, _ in ends:
            rate = ["rate", f"{bits_per_s:.0f}bit", "burst", "256kb", "latency", "200ms"]
            command = ["tc", "-n", namespace, "qdisc", "add", "dev", net, "root", "tbf", *rate]
            subprocess.run(command, check=True)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    def namespace(self, role: str) -> str:
        return f"lpgan-{self._tag}-{role}"

    def command(self, role: str, *command: str) -> list[str]:
        """A command on a role's machine."""
        return ["ip", "netns", "exec", self.namespace(role), *command]

    def tell(self, command: str) -> None:
        """`cut NET`, `heal NET` or `delay SECONDS`."""
        self._forwarder.stdin.write(command.encode() + b"\n")
        self._forwarder.stdin.flush()

    def counted(self, role: str, net: str) -> dict[str, int]:
        """Bytes and packets that left a machine over a line so far."""
        command = ["ip", "-n", self.namespace(role), "-s", "-j", "link", "show", net]
        (found,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return found["stats64"]["tx"]

    def cluster(self, certificates: Path, state: Path, **fields: object) -> dict[str, object]:
        """The cluster's configuration on these machines."""
        return {
            "session": "networks",
            "servers": {
                "s1": {"host": WIDE["s1"], "port": 7001},
                "s2": {"host": WIDE["s2"], "port": 7001},
            },
            "line": {"host": LINE["s1"], "port": 7002},
            "certificates": str(certificates),
            "state": str(state),
            **fields,
        }

    def close(self) -> None:
        self._forwarder.stdin.close()  # it ends
        self._forwarder.wait(30)
        self._forwarder.stdout.close()
        for role in ROLES:
            with contextlib.suppress(subprocess.CalledProcessError):
                self._ip("netns", "del", self.namespace(role))


class Roles:
    """The commands of the four roles on their machines, as operators would run them."""

    def __init__(self, machines, directory, settings, seed=None, **fields):
        """`seed`: of DS's keys; `fields`: of the cluster's configuration."""
        self._machines, self.directory = machines, directory
        self._seed = seed
        make_certificates(directory / "certificates", ROLES)
        for role in ROLES:
            cluster = machines.cluster(directory / "certificates", directory / role, **fields)
            (directory / f"{role}.yaml").write_text(yaml.safe_dump(cluster))
        self.train = directory / "train.yaml"
        self.train.write_text(config.dump(settings))
        self._processes = {}
        for role in ROLES:
            self.start(role)

    def start(self, role):
        own = {
            "s1": ["serve", "s1"],
            "s2": ["serve", "s2"],
            "ds": ["ds", "--train", str(self.train)],
            "sp": ["sp", "--out", str(self.directory / "run")],
        }[role]
        command = [sys.executable, "-m", "lpgan_jax.cli", *own]
        command += ["--config", str(self.directory / f"{role}.yaml")]
        if role == "ds" and self._seed is not None:
            command = [sys.executable, "-c", self._seeded_dealer()]
        with open(self.directory / f"{role}.err", "a") as errors:
            self._processes[role] = subprocess.Popen(
                self._machines.command(role, *command), stderr=errors
            )

    def _seeded_dealer(self):
        """What `lpgan ds` does, with a seed, which the command refuses."""
        text = config.to_json(config.load(str(self.train)))
        file = str(self.directory / "ds.yaml")
        job = Job("deal", "ds", file, train=text, seed=self._seed)
        return (
            "import sys; from lpgan_jax.cluster.roles import play\n"
            "from lpgan_jax.cluster.worker import Job\n"
            f"sys.exit(play({job!r}))"
        )

    def status(self, role):
        """The exit status of its command; None while it runs."""
        return self._processes[role].poll()

    def wait(self, role, seconds):
        return self._processes[role].wait(seconds)

    def errors(self, role):
        return (self.directory / f"{role}.err").read_text()

    def supervisor(self, role):
        return self._processes[role].pid  # `ip netns exec` becomes the command

    def worker(self, role):
        """The process of the role's newest worker; None if there is none."""
        started = events(self.directory / role, role, "started")
        pid = started[-1]["pid"] if started else 0
        alive = Path(f"/proc/{pid}/cmdline")
        return pid if alive.exists() and b"worker" in alive.read_bytes() else None

    def last(self, role):
        """(time, step) of its last status; (0, -1) before the first."""
        log = self.directory / role / "logs" / f"{role}.jsonl"
        if log.exists():
            for line in reversed(log.read_text().splitlines()[-40:]):
                report = json.loads(line)
                if report["kind"] == "status" and report["step"] is not None:
                    return report["time"], report["step"]
        return 0.0, -1

    def stop(self, *roles):
        for role in roles or ROLES:
            if self.status(role) is None:
                self._processes[role].terminate()
        for role in roles or ROLES:
            self._processes[role].wait(30)
