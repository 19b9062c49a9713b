"""What the roles are doing, for people: a table that stays up to date, or a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table

_LINE_EVERY_S = 10.0


class Display:
    """Shows reports of one role or several; thread-safe."""

    def __init__(self, roles: list[str]) -> None:
        self._console = Console(file=sys.stderr)
        self._status: dict[str, dict[str, Any]] = {role: {} for role in roles}
        self._seen: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._line_at = time.monotonic()
        self._live = Live(
            get_renderable=self._table, console=self._console, refresh_per_second=2, transient=False
        )

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, report: dict[str, Any]) -> None:
        """Take a report."""
        with self._lock:
            if report["kind"] == "event":
                self._tell(report)
            else:
                self._status[report["role"]] = report
            now = time.monotonic()
            if not self._console.is_terminal and now - self._line_at > _LINE_EVERY_S:
                self._line_at = now
                for role, status in self._status.items():
                    seen = status and (status["phase"]["name"], status["step"])
                    if seen and self._seen.get(role) != seen:  # nothing new, nothing said
                        self._seen[role] = seen
                        print(_line(status), file=sys.stderr, flush=True)

    def _tell(self, report: dict[str, Any]) -> None:
        known = ("kind", "role", "event")
        rest = "  ".join(f"{k}={v}" for k, v in report.items() if k not in known and v is not None)
        text = f"{report['role']}: {report['event']}  {rest}".rstrip()
        if self._console.is_terminal:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _table(self) -> Table:
        table = Table(title="LP-GAN", box=None, pad_edge=False, title_justify="left")
        for name in ("role", "step", "s/step", "doing", "ahead", "sent", "received", "waited, s"):
            table.add_column(name, justify="left" if name in ("role", "doing") else "right")
        for role, status in self._status.items():
            table.add_row(role, *_cells(status))
        return table


def _cells(status: dict[str, Any]) -> list[str]:
    if not status:
        return ["", "", "starting", "", "", "", ""]
    phase = status["phase"]
    doing = phase["name"] + (f" {phase['on']}" if phase["on"] else "")
    step = "" if status["step"] is None else f"{status['step']}/{status['steps']}"
    speed = "" if status["s_per_step"] is None else f"{status['s_per_step']:.3f}"

    def volume(of: dict[str, int]) -> str:
        return decimal(sum(of.values())) if any(of.values()) else ""

    waited = ", ".join(f"{role} {s:.0f}" for role, s in status["waited_s"].items() if s >= 1)
    ahead = str(status["ahead"]) if status["ahead"] else ""
    return [
        step,
        speed,
        doing,
        ahead,
        volume(status["sent"]),
        volume(status["received"]),
        waited,
    ]


def _line(status: dict[str, Any]) -> str:
    step, speed, doing, ahead, sent, received, waited = _cells(status)
    parts = [f"{status['role']}: {doing}", f"step {step}" if step else ""]
    parts += [f"{speed} s/step" if speed else "", f"ahead {ahead}" if ahead else ""]
    parts += [f"sent {sent}" if sent else "", f"received {received}" if received else ""]
    parts += [f"waited {waited} s" if waited else ""]
    return "  ".join(filter(None, parts))
