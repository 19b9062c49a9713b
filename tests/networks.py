"""Four machines: network namespaces with addresses of their own, and lines of some speed."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from pathlib import Path

FORWARDER = Path(__file__).parent / "forwarder.py"
ROLES = ("s1", "s2", "ds", "sp")
LINK = {"s1": "10.77.1.1", "s2": "10.77.1.2"}
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

    Each end sends at most so many bits a second; each packet takes so long.
    """

    def __init__(self, bits_per_s: float, delay_s: float, mtu: int) -> None:
        self._tag = secrets.token_hex(2)
        self._etc: list[Path] = []
        for role in ROLES:
            self._ip("netns", "add", self.namespace(role))
            self._ip("-n", self.namespace(role), "link", "set", "lo", "up")
        for role, address in LINK.items():
            etc = Path("/etc/netns") / self.namespace(role)
            etc.mkdir(parents=True)
            # gloo listens where the machine's name points to
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
            self._etc.append(etc)
        ends = [["line", self.namespace(r), a] for r, a in LINK.items()]
        ends += [["wide", self.namespace(r), a] for r, a in WIDE.items()]
        settings = {"delay_s": delay_s, "ends": ends, "mtu": mtu}
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
            "link": {**LINK, "port": 7002},
            "certificates": str(certificates),
            "state": str(state),
            **fields,
        }

    def close(self) -> None:
        self._forwarder.kill()
        self._forwarder.wait()
        self._forwarder.stdin.close()
        self._forwarder.stdout.close()
        for role in ROLES:
            with contextlib.suppress(subprocess.CalledProcessError):
                self._ip("netns", "del", self.namespace(role))
        for etc in self._etc:
            shutil.rmtree(etc)
