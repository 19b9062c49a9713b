"""Whatever is killed, frozen, cut or slowed, the session ends in a clear error or goes on.

Four machines (network namespaces), a supervisor and a worker on each. Slow: `pytest -m slow`.
"""

import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from clusters import SEED, Simulated, events, tiny
from networks import ROLES, Machines, Roles, possible

from lpgan_jax.training import checkpoint, config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not possible(), reason="needs root, iproute2 and TUN devices"),
]

FAULTS = int(os.environ.get("LPGAN_FAULTS", "56"))
SILENCE, WAIT, START = 8.0, 15.0, 120.0
LIMIT = SILENCE + 2 * WAIT + START / 2
"""Seconds from the end of a fault to the next step: noticed, named, started again, compiled."""


LIMITS = {"silence_s": SILENCE, "wait_s": WAIT, "start_s": START}


class Operated(Roles):
    """With an operator, who starts again what was given up."""

    def keep_running(self):
        """Start again what was given up, as an operator would; the roles."""
        again = [role for role in ROLES if self.status(role) is not None]
        for role in again:
            if self.status(role) == 1:
                assert ": gave up  reason=" in self.errors(role)
            self.start(role)
        return again

    def wait_for_progress(self, role, after, seconds):
        """Wait until a step is done that was begun after a time; seconds it took."""
        end, first = time.time() + seconds, None
        while time.time() < end:
            self.keep_running()
            when, step = self.last(role)
            if when > after:
                if first is not None and step > first:
                    return time.time() - after
                first = step if first is None else min(first, step)
            time.sleep(0.2)
        tails = {r: self.errors(r)[-600:] for r in ROLES}
        raise AssertionError(f"{role}: no step within {seconds} s: {tails}")


@pytest.fixture
def machines():
    machines = Machines(1e9, 0.2e-3, 9000)
    yield machines
    machines.close()


def _replayed(settings, opened, steps):
    """The simulation's shares after the same attempts, each from its start."""
    simulated = Simulated(settings)
    starts = [(e["attempt"], e["start"]) for e in opened]
    for (attempt, start), (_, end) in zip(starts, [*starts[1:], (0, steps)], strict=True):
        if end > start:  # else it came to nothing that anything was built on
            simulated.attempt(attempt, start, end)
    return simulated.shares[steps]


def _inject(rng, roles, machines):
    """One fault, until it is over; its name, and whether someone must have noticed."""
    role = ROLES[rng.integers(4)]
    kinds = ["kill worker", "kill worker", "kill supervisor", "freeze", "blink"]
    kinds += ["cut line", "cut wide", "blip line", "blip wide", "delay"]
    kind = kinds[rng.integers(len(kinds))]
    net = kind.split()[-1]
    pause = float(rng.uniform(0.5, 2.5))
    if kind in ("kill worker", "freeze", "blink"):
        pid = roles.worker(role)
        if pid is None:
            return "nobody there"
        os.kill(pid, signal.SIGKILL if kind == "kill worker" else signal.SIGSTOP)
        if kind == "freeze":
            end = time.time() + SILENCE + 5
            while roles.worker(role) == pid:
                assert time.time() < end, f"{role}'s supervisor did not notice that it is frozen"
                time.sleep(0.1)
        if kind == "blink":
            time.sleep(pause)
            os.kill(pid, signal.SIGCONT)
        return f"{kind} {role}"
    if kind == "kill supervisor":
        worker = roles.worker(role)
        os.kill(roles.supervisor(role), signal.SIGKILL)
        roles.wait(role, 10)
        end = time.time() + 5
        while worker is not None and Path(f"/proc/{worker}/cmdline").exists():
            assert time.time() < end, f"{role}'s worker outlives its supervisor"
            time.sleep(0.1)
        return f"{kind} {role}"
    if kind == "delay":
        machines.tell("delay 0.2")
        time.sleep(3)
        machines.tell("delay 0.0002")
        return kind
    machines.tell(f"cut {net}")
    time.sleep(SILENCE + WAIT + 5 if kind.startswith("cut") else pause)
    machines.tell(f"heal {net}")
    return kind


def test_fifty_faults(machines, tmp_path):
    settings = tiny(steps=10**6, checkpoint_every=10, sample_every=10**6, keep_checkpoints=2)
    fields = {"timeouts": LIMITS, "restarts": 4, "integrity": {"check": 0.3}}
    roles = Operated(machines, tmp_path, settings, SEED, **fields)
    rng = np.random.default_rng(int(os.environ.get("LPGAN_FAULTS_SEED", "0")))
    took: dict[str, list[float]] = {}
    try:
        roles.wait_for_progress("s1", 0.0, START)
        for number in range(FAULTS):
            fault = _inject(rng, roles, machines)
            over = time.time()
            seconds = roles.wait_for_progress("s1", over, LIMIT)
            roles.wait_for_progress("sp", over, LIMIT)
            took.setdefault(fault, []).append(seconds)
            print(f"{number}: {fault}: {seconds:.1f} s", flush=True)
            time.sleep(float(rng.uniform(0, 2)))
        # To the end, for the newest step that there is.
        roles.stop("ds")
        steps = 10 * (roles.last("s1")[1] // 10) + 40
        settings = settings.model_copy(update={"steps": steps})
        roles.train.write_text(config.dump(settings))
        roles.start("ds")
        end = time.time() + LIMIT
        while checkpoint.saves(tmp_path / "s2", "s2").get(steps) is None:
            assert time.time() < end
            roles.keep_running()
            time.sleep(0.5)
        time.sleep(2)
    finally:
        roles.stop()
    # Every failure was named, with its role, and its step if it had one.
    reasons = [
        e["reason"] for role in ROLES for e in events(tmp_path / role, role) if "reason" in e
    ]
    for reason in reasons:
        assert re.match(r"(lost )?(s1|s2|ds|sp)( refuses)?: ", reason), reason
    failed = [e for role in ("s1", "s2") for e in events(tmp_path / role, role, "failed")]
    assert all(e["step"] is not None or e["phase"] in ("idle", "starting") for e in failed)
    print(Counter(reason.split(":")[0] for reason in reasons))
    print({fault: (len(s), round(max(s), 1)) for fault, s in sorted(took.items())})
    # No attempt was repeated, and the result is that of the same attempts without any fault.
    opened = events(tmp_path / "ds", "ds", "opened")
    attempts = [e["attempt"] for e in opened]
    assert attempts == sorted(set(attempts))
    halves = [checkpoint.load_share(tmp_path / server, server, steps) for server in ("s1", "s2")]
    assert halves[0][0] == halves[1][0]
    expected = _replayed(settings, opened, steps)
    for place, (_, share) in enumerate(halves):
        jax.tree.map(
            lambda own, both, place=place: np.testing.assert_array_equal(own, both[place]),
            share,
            expected,
        )


def test_a_full_disk_stops_the_session_and_loses_nothing(machines, tmp_path):
    settings = tiny(steps=60, checkpoint_every=10, sample_every=60)
    state = tmp_path / "s1"
    state.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(state)]
    subprocess.run(mount, check=True)
    roles = None
    try:
        filler = state / "filler"
        roles = Operated(machines, tmp_path, settings, SEED, timeouts=LIMITS, restarts=4)
        end = time.time() + START
        while not checkpoint.saves(state, "s1"):
            assert time.time() < end
            time.sleep(0.05)
        command = ["dd", "if=/dev/zero", f"of={filler}", "bs=1k"]
        assert b"No space left" in subprocess.run(command, capture_output=True).stderr
        assert roles.wait("ds", 6 * LIMIT) == 1
        assert "restarting  reason=s1: saving at step" in roles.errors("s1")
        assert "No space left on device" in roles.errors("s1")
        gave_up = roles.errors("ds").splitlines()[-1]
        assert re.match("ds: gave up .*s1 refuses: state: cannot be written here: .*No sp", gave_up)
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(state)], check=True)
        for role in ROLES:
            if roles.status(role) is not None:
                roles.start(role)
        assert roles.wait("sp", 2 * LIMIT) == 0
        assert checkpoint.load_share(tmp_path / "s2", "s2", 60)[0]
        share = checkpoint.load_share(state, "s1", 60)[1]
        opened = events(tmp_path / "ds", "ds", "opened")
        expected = _replayed(settings, opened, 60)
        jax.tree.map(lambda own, both: np.testing.assert_array_equal(own, both[0]), share, expected)
    finally:
        if roles is not None:
            roles.stop()
        subprocess.run(["umount", str(state)], check=True)
