"""Who watches a worker: it names what went wrong, at which step, and starts another one, or ends.

JAX's runtime aborts a process whose peer is gone, and a process may be killed or frozen at any
moment; so what is to be said about it is said here. A supervisor touches no share and no key.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpgan_jax.cluster.logs import Log, shorten
from lpgan_jax.cluster.reporting import REFUSED
from lpgan_jax.cluster.settings import ClusterConfig
from lpgan_jax.cluster.worker import Job
from lpgan_jax.common.files import private_open

Report = dict[str, Any]

_TICK_S = 0.1
_BEFORE_RESTART_S = 0.5


@dataclass
class _Watched:
    """What is known of a worker."""

    status: Report
    since: float  # the beginning of its phase, by the supervisor's clock
    failure: str | None = None
    advanced: bool = False


class Supervisor:
    """Keeps a role played, from attempt to attempt.

    Args:
        job: what the workers do.
        config: of the cluster.
        show: called with every report, from the thread that runs `run`.
    """

    def __init__(
        self, job: Job, config: ClusterConfig, show: Callable[[Report], None] = lambda report: None
    ) -> None:
        self._job, self._config, self._show = job, config, show
        logs = Path(config.state) / "logs"
        self.log = Log(logs / f"{job.role}.jsonl")
        self._output = logs / f"{job.role}.out"
        private_open(self._output, "ab").close()
        self._stopping = threading.Event()
        self._best_step = -1
        self.process: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """End the worker, and have `run` return."""
        self._stopping.set()
        if self.process is not None:
            self.process.kill()

    def run(self) -> int:
        """Play the role until it is done.

        Returns:
            0: done, or stopped. 1: it was given up; the last event says why.
        """
        failures = 0
        while True:
            watched, status = self._play_once()
            if self._stopping.is_set():
                self._say("stopped")
                return 0
            if status == 0:
                return 0
            failures = 0 if watched.advanced else failures + 1
            reason = watched.failure or "?"
            if status == REFUSED:
                self._say("ended", reason=reason)
                return 1
            if failures > self._config.restarts:
                self._say("gave up", reason=reason, failures=failures)
                return 1
            self._say("restarting", reason=reason, failures=failures)
            self._stopping.wait(_BEFORE_RESTART_S)

    def _say(self, event: str, **fields: Any) -> None:
        report = {"kind": "event", "role": self._job.role, "event": event, **fields}
        self.log.event(report)
        self._show(report)

    def _play_once(self) -> tuple[_Watched, int]:
        starting = {"phase": {"name": "starting", "number": -1, "on": None, "limit_s": None}}
        watched = _Watched({"step": None, **starting}, time.monotonic())
        reading, writing = os.pipe()
        try:
            process = self.process = self._start(writing)
            os.close(writing)
            self._say("started", pid=process.pid)
            killed = self._listen(reading, watched)
        finally:
            os.close(reading)
            if self.process is not None:
                self.process.kill()
                self.process.communicate()  # waits, and closes its input
        status = process.returncode
        if status != 0 and not self._stopping.is_set():
            watched.failure = self._explain(watched, status, killed)
        return watched, status

    def _start(self, reports: int) -> subprocess.Popen[bytes]:
        with private_open(self._output, "ab") as output:
            process = subprocess.Popen(
                self._job.command(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[reports],
                start_new_session=True,  # Ctrl-C is for the supervisor
                env=os.environ | {"LPGAN_REPORTS": str(reports)},
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(self._job.line())
            process.stdin.flush()
        return process

    def _listen(self, reading: int, watched: _Watched) -> str | None:
        """Read reports until the worker ends; why it was ended, if the supervisor did it."""
        limit, rest, heard = self._config.timeouts.silence_s, b"", time.monotonic()
        while not self._stopping.is_set():
            shorten(self._output)
            ready = select.select([reading], [], [], _TICK_S)[0]
            now = time.monotonic()
            if ready:
                data = os.read(reading, 2**16)
                if not data:
                    return None
                *lines, rest = (rest + data).split(b"\n")
                heard = now
                for line in lines:
                    with contextlib.suppress(ValueError, KeyError):  # half a line, of a full pipe
                        self._hear(json.loads(line), watched, now)
            phase = watched.status["phase"]
            if now - heard > limit:
                return f"it was silent for {limit:g} s"
            if phase["limit_s"] is not None and now - watched.since > phase["limit_s"]:
                return f"it took more than {phase['limit_s']:g} s"
        return None

    def _hear(self, report: Report, watched: _Watched, now: float) -> None:
        if report["kind"] == "status":
            if report["phase"]["number"] != watched.status["phase"]["number"]:
                watched.since = now
            watched.status = report
            if (report["step"] or 0) > self._best_step:
                watched.advanced = self._best_step >= 0 or watched.advanced
                self._best_step = report["step"] or 0
            self.log.status(report)
        else:
            if report["event"] == "failed":
                watched.failure = report["reason"]
                phase = {**watched.status["phase"], "name": report["phase"], "on": report["on"]}
                watched.status = {**watched.status, "phase": phase, "step": report["step"]}
            watched.advanced |= report["event"] == "trained"
            self.log.event(report)
        self._show(report)

    def _explain(self, watched: _Watched, status: int, killed: str | None) -> str:
        phase, step = watched.status["phase"], watched.status["step"]
        where = f"{self._job.role}: {phase['name']}"
        where += f" {phase['on']}" if phase["on"] else ""
        where += f" at step {step}" if step is not None else ""
        if killed is not None:
            return f"{where}: {killed}, and was ended"
        if watched.failure is not None:
            return f"{where}: {watched.failure}"
        if status < 0:
            name = signal.Signals(-status).name if -status in list(signal.Signals) else -status
            return f"{where}: ended by {name} (see {self._output})"
        return f"{where}: ended with status {status} (see {self._output})"
