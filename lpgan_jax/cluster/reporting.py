"""A worker's reports to its supervisor: what it does, for whom it waits, and what went wrong.

One JSON object a line, at least once a second: silence means that the worker is dead or frozen.
Nothing in it depends on a secret.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

INTERVAL_S = 0.5
FAILED, REFUSED = 3, 2
"""Exit statuses: the attempt failed and another may do better; or none will (bad input)."""


class Lost(Exception):
    """Another role is gone, or does not do its part.

    Attributes:
        role: which one.
    """

    def __init__(self, role: str, reason: str) -> None:
        super().__init__(f"lost {role}: {reason}")
        self.role = role


class BadInput(Exception):
    """What another attempt would not mend: the configuration, the images."""


@contextmanager
def reading_input() -> Iterator[None]:
    """Errors inside are `BadInput`."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise BadInput(str(error)) from error


_LONGEST_TEXT = 300
_UNPRINTABLE = re.compile(r"[^ -~]+")


class Reporter:
    """Reports of one worker; thread-safe.

    Attributes:
        role: whose.
    """

    def __init__(self, role: str, descriptor: int) -> None:
        """`descriptor`: of the pipe to the supervisor."""
        self.role = role
        self._descriptor = descriptor
        os.set_blocking(descriptor, False)  # a frozen supervisor must not freeze the worker
        self._lock = threading.Lock()
        self._failing = threading.Lock()
        self._sent: Counter[str] = Counter()
        self._received: Counter[str] = Counter()
        self._waited: defaultdict[str, float] = defaultdict(float)
        self._phase: dict[str, Any] = {"name": "starting", "number": 0, "on": None, "limit_s": None}
        self._phase_since = time.monotonic()
        self._values: dict[str, Any] = {"step": None, "steps": None, "s_per_step": None, "ahead": 0}
        self._gauges: list[Callable[[], None]] = []
        threading.Thread(target=self._run, daemon=True, name="reports").start()

    def gauge(self, measure: Callable[[], None]) -> None:
        """Have `measure` called before each regular report."""
        self._gauges.append(measure)

    def set(self, **values: Any) -> None:
        """Set what is reported: step, steps, s_per_step, ahead. A new step is reported at once."""
        with self._lock:
            new = "step" in values and values["step"] != self._values["step"]
            self._values.update(values)
        if new:
            self.report()

    def count(self, peer: str, *, sent: int = 0, received: int = 0) -> None:
        """Add bytes to or from another role."""
        with self._lock:
            self._sent[peer] += sent
            self._received[peer] += received

    def measured(self, peer: str, *, sent: int, received: int) -> None:
        """Set the bytes to and from another role so far."""
        with self._lock:
            self._sent[peer], self._received[peer] = sent, received

    @contextmanager
    def phase(self, name: str, *, on: str | None = None, limit_s: float | None) -> Iterator[None]:
        """What is going on inside.

        Args:
            name: for people.
            on: the role that is waited for.
            limit_s: after so long, the supervisor ends the worker.
        """
        with self._lock:
            outer, started = self._phase, time.monotonic()
            number = outer["number"] + 1
            self._phase = {"name": name, "number": number, "on": on, "limit_s": limit_s}
            self._phase_since = started
        # A failure leaves the phase as it is: the report of it says where it happened.
        yield
        with self._lock:
            ended = time.monotonic()
            if on is not None:
                self._waited[on] += ended - started
            name = "working" if outer["name"] == "starting" else outer["name"]
            self._phase = {**outer, "name": name, "number": number + 1}
            self._phase_since = ended

    @property
    def waits_for(self) -> str | None:
        """The role that is waited for, or worked with, at the moment."""
        with self._lock:
            on: str | None = self._phase["on"]
            return on

    def status(self) -> dict[str, Any]:
        """What the next report says."""
        with self._lock:
            waited = dict(self._waited)
            on = self._phase["on"]
            if on is not None:
                waited[on] = waited.get(on, 0) + time.monotonic() - self._phase_since
            return {
                "kind": "status",
                "role": self.role,
                "phase": dict(self._phase),
                **self._values,
                "sent": dict(self._sent),
                "received": dict(self._received),
                "waited_s": {role: round(seconds, 3) for role, seconds in waited.items()},
            }

    def event(self, event: str, **fields: Any) -> None:
        """Report that something happened; `fields` must not depend on a secret."""
        said = {
            name: _UNPRINTABLE.sub("?", value)[:_LONGEST_TEXT] if isinstance(value, str) else value
            for name, value in fields.items()
        }
        self._write({"kind": "event", "role": self.role, "event": event, **said})

    def fail(self, reason: str, status: int = FAILED, *, blames: str | None = None) -> NoReturn:
        """Report why the worker ends, and end it; the first reason counts."""
        self._failing.acquire()  # whoever comes second waits for the end
        with self._lock:
            where = {"phase": self._phase["name"], "on": self._phase["on"]}
            where["step"] = self._values["step"]
        self.event("failed", reason=reason, blames=blames, **where)
        os._exit(status)

    def report(self) -> None:
        """Report now."""
        self._write(self.status())

    def _run(self) -> None:
        while True:
            for measure in self._gauges:
                with suppress(Exception):  # a gauge that fails must not look like a dead worker
                    measure()
            self.report()
            time.sleep(INTERVAL_S)

    def _write(self, report: dict[str, Any]) -> None:
        line = json.dumps(report).encode() + b"\n"
        try:
            os.write(self._descriptor, line)
        except BlockingIOError:
            pass  # the supervisor is frozen
        except BrokenPipeError:
            os._exit(FAILED)  # the supervisor is gone
