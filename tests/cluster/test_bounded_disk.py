"""A long training takes no more disk, nor memory, late than it took early. Slow, and as a script:

LPGAN_STEPS=20000 python -m pytest -m slow -s tests/cluster/test_bounded_disk.py
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny_program

from lpgan_jax.cluster.journal import SEGMENT
from lpgan_jax.cluster.logs import LONGEST

STEPS = int(os.environ.get("LPGAN_STEPS", "20000"))
KEPT = {"metrics.csv", "samples"}
"""What SP is to have: a row a log, a file a sample."""
EVERY_S, STEADY_S = 5.0, 60.0
OPTIONS = {"questions": 1024, "every": 5, "log_every": 50, "checkpoint_every": 100}
ROLES = ("s1", "s2", "ds", "sp")


NAMED = {"results/s1", "results/s2", "logs", "checkpoints", *KEPT}


def disk(run):
    """Bytes of what lies in a run's directory, by name; all small files together are `rest`."""
    found = Counter()
    for path in run.rglob("*"):
        try:
            size = path.lstat().st_size
        except FileNotFoundError:
            continue
        if path.is_file():
            parts = path.relative_to(run).parts
            name = "/".join(parts[: 2 if parts[0] == "results" else 1])
            found[name if name in NAMED else "rest"] += size
    return found


def memory(parent):
    """Resident bytes of each worker of a process."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(
                line.split(":", 1) for line in (directory / "status").read_text().splitlines()
            )
            role = (directory / "cmdline").read_text().split("\0")[-2:][0]
        except (OSError, ValueError):
            continue
        if int(status["PPid"]) == parent and role in ROLES:
            found[role] = 1024 * int(status.get("VmRSS", "0 kB").split()[0])
    return found


@pytest.mark.slow
def test_disk_and_memory_do_not_grow(tmp_path):
    run = tmp_path / "run"
    options = [part for name, value in OPTIONS.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "lpgan_jax.cli", "up", "--program", tiny_program.__file__]
    command += ["--out", str(run), "--steps", str(STEPS), *options]
    started, found = time.time(), []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None:
            time.sleep(EVERY_S)
            rows = (run / "metrics.csv").read_text() if (run / "metrics.csv").exists() else ""
            step = rows.splitlines()[-1].split(",")[0] if rows.count("\n") > 1 else "0"
            found.append((time.time() - started, int(step), disk(run), memory(process.pid)))
            seconds, step, sizes, resident = found[-1]
            print(
                f"{seconds:5.0f} s  step {step}  "
                + "  ".join(f"{name} {size / 1e6:.2f}" for name, size in sorted(sizes.items()))
                + " MB  |  "
                + "  ".join(f"{role} {size / 1e6:.0f}" for role, size in sorted(resident.items()))
                + " MB",
                flush=True,
            )
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-2000:]
    answer = 8 * OPTIONS["questions"]
    steady = [entry for entry in found if entry[0] > STEADY_S and entry[1] > STEPS / 10]
    assert len(steady) > 3, "longer, please"
    for _, _, sizes, _ in steady:
        for server in ("s1", "s2"):
            # A segment that is written, one that SP is about to have, what waits in a second.
            assert sizes[f"results/{server}"] < 2 * SEGMENT + 20 * answer
        assert sizes["logs"] < 2 * len(ROLES) * 2 * LONGEST
    rest = [sizes["rest"] + sizes["checkpoints"] for _, _, sizes, _ in steady]
    assert max(rest) < min(rest) + 2**16, rest
    # All that the servers had for SP would not have fitted.
    assert STEPS < 10_000 or STEPS / OPTIONS["every"] * answer > 5 * 2 * SEGMENT
    half = len(steady) // 2
    for role in ROLES:
        early, late = (
            max(entry[3].get(role, 0) for entry in part) for part in (steady[:half], steady[half:])
        )
        assert late < 1.1 * early + 2**24, role
    samples = len(list((run / "samples").iterdir()))
    assert samples == 1 + STEPS // OPTIONS["every"] + (STEPS % OPTIONS["every"] > 0)
