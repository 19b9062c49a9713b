"""A run as SP sees it, on a page of this machine: `lpgan watch DIR`.

It reads what SP has and nothing else: the run's configuration, table, samples and summary, and SP's
own log. The page is made anew for each request, has no scripts, and takes nothing from elsewhere.
It is as private as the directory: it is served on the loopback interface only, under a path that
nobody can guess, since other users of the machine can connect to its ports too, and only to who
asks for this machine by name, since a web site's name may be made to point to it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import html
import json
import math
import os
import re
import secrets
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lpgan_jax.cluster.logs import predecessor
from lpgan_jax.cluster.settings import PROVIDER, load_cluster
from lpgan_jax.training.config import ProgramConfig
from lpgan_jax.training.run_directory import RunDirectory

# What there is to see -----------------------------------------------------------------------------

_LOG_TAIL = 2**19  # bytes: half an hour
_RECENT_S = 120.0  # over which speed is measured
_MOST_ROWS = 20_000  # of the table: of a longer one, rows at even distances
_OWN_AXIS = "as the program tells it"
_AXES = {"epsilon": "spent so far, of each example"}
_TOLD = {"restarting", "failed", "gave up", "ended", "warning", "results begin again", "collected"}

Curve = list[tuple[int, float]]
"""Steps and values; values are finite."""


@dataclass(frozen=True)
class Status:
    """What SP said of itself.

    Attributes:
        time: seconds since 1970.
        step: that is done; None before it knows.
        steps: of the training; likewise.
        doing: what, and with whom.
        received: bytes, by server, since SP was last started.
        waited: seconds, likewise.
    """

    time: float
    step: int | None
    steps: int | None
    doing: str
    received: dict[str, int]
    waited: dict[str, float]


@dataclass
class Seen:
    """What SP has of a run at one moment.

    Attributes:
        path: the directory.
        what: is trained.
        step: that is done, of which SP knows.
        steps: of the training; None where only the program knows.
        seconds_per_step: lately; None before there are any.
        finished: whether the run has ended as it should.
        curves: what SP is told, by column; empty where nothing is opened.
        seconds: that each logged step took.
        sample: the newest one's step and file.
        status: SP's last, if it has a log.
        events: of SP, newest last: seconds since 1970, what happened.
        attempt: the number of the attempt that the last result is of; None without a cluster.
        changed: when something was last written, in seconds since 1970.
    """

    path: Path
    what: str
    step: int = 0
    steps: int | None = None
    seconds_per_step: float | None = None
    finished: bool = False
    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: Curve = field(default_factory=list)
    sample: tuple[int, Path] | None = None
    status: Status | None = None
    events: list[tuple[float, str]] = field(default_factory=list)
    attempt: int | None = None
    changed: float = 0.0


def look(path: str | os.PathLike[str], log: str | os.PathLike[str] | None = None) -> Seen:
    """What SP has of a run.

    Args:
        path: the run directory.
        log: SP's log; by default the one that `lpgan up` has in the directory.

    Raises:
        FileNotFoundError: the directory is no run.
        ValueError: its configuration, or summary, is damaged.
    """
    run = RunDirectory.open(path)
    settings, summary = run.config(), run.summary()
    if isinstance(settings, ProgramConfig):
        what = Path(settings.program).name
    else:
        what = settings.data.dataset
    seen = Seen(run.path, what, steps=settings.steps)
    _read_table(run, seen)
    _read_samples(run, seen)
    done = summary.get("steps")
    if isinstance(done, int) and done >= max(seen.step, seen.steps or 0):
        seen.finished, seen.step, seen.steps = True, done, done
    statuses = _read_log(Path(log or run.path / "logs" / f"{PROVIDER}.jsonl"), seen)
    if seen.status is not None and not seen.finished:
        seen.step = seen.step if seen.status.step is None else seen.status.step
        seen.steps = seen.status.steps or seen.steps
    if run.received_file.exists():
        with suppress(OSError, ValueError, KeyError, TypeError):
            seen.attempt = int(json.loads(run.received_file.read_bytes())["attempt"])
    seen.seconds_per_step = _speed(statuses, seen)
    files = (run.metrics_file, run.summary_file, run.config_file)
    written = [file.stat().st_mtime for file in files if file.exists()]
    seen.changed = max([seen.changed, *written])
    return seen


def _read_table(run: RunDirectory, seen: Seen) -> None:
    if not run.metrics_file.exists():
        return
    # Without its end, if that is no newline: it is being written.
    head, *lines = run.metrics_file.read_text(errors="replace").split("\n")[:-1] or [""]
    columns = head.split(",")
    curves: dict[str, Curve] = {name: [] for name in columns[1:-1]}
    every, newest = 1 + len(lines) // _MOST_ROWS, len(lines) - 20
    for line in (line for n, line in enumerate(lines) if n % every == 0 or n > newest):
        cells = line.split(",")
        if len(cells) != len(columns) or not cells[0].isdecimal():
            continue
        seen.step = int(cells[0])
        for curve, cell in zip(curves.values(), cells[1:-1], strict=True):
            with suppress(ValueError):  # what is not opened is empty
                if math.isfinite(value := float(cell)):
                    curve.append((seen.step, value))
    seen.seconds = curves.pop("seconds", [])
    seen.curves = {name: curve for name, curve in curves.items() if curve}


def _read_samples(run: RunDirectory, seen: Seen) -> None:
    # The one that was written last: an attempt may have begun again at an earlier step.
    files = {file: file.stat().st_mtime_ns for file in (run.path / "samples").glob("step_*")}
    for file in sorted(files, key=lambda file: (files[file], file.name)):
        if match := re.fullmatch(r"step_(\d{6,})\.\w+", file.name):
            seen.sample = int(match[1]), file


def _read_log(file: Path, seen: Seen) -> list[Status]:
    """SP's last statuses; of a finished run those before its end: SP may ask questions later."""
    data = b""
    for part in (predecessor(file), file):
        if part.exists():
            with part.open("rb") as opened:
                opened.seek(max(0, part.stat().st_size - _LOG_TAIL))
                data += opened.read(_LOG_TAIL)
    statuses: list[Status] = []
    end = None
    for line in data[-_LOG_TAIL:].split(b"\n"):
        with suppress(
            ValueError, KeyError, TypeError, OverflowError
        ):  # the first line, and one that is written
            report = json.loads(line)
            seen.changed = max(seen.changed, float(report["time"]))
            if report["kind"] == "status":
                statuses.append(_status(report))
            elif report["event"] in _TOLD:
                text = f"{report['event']}: {report.get('reason') or ''}".rstrip(": ")
                seen.events.append((float(report["time"]), text))
                end = len(statuses) if report["event"] == "collected" else end
    if seen.finished:
        statuses = statuses[:end]
    seen.status = statuses[-1] if statuses else None
    return statuses


def _status(report: dict[str, Any]) -> Status:
    step, steps, phase = report["step"], report["steps"], report["phase"]
    return Status(
        float(report["time"]),
        None if step is None else int(step),
        None if steps is None else int(steps),
        f"{phase['name']} {phase['on'] or ''}",
        {str(peer): int(count) for peer, count in dict(report["received"]).items()},
        {str(peer): float(seconds) for peer, seconds in dict(report["waited_s"]).items()},
    )


def _speed(statuses: Sequence[Status], seen: Seen) -> float | None:
    """Seconds a step: of the clock, where there is a log, else as the last rows say."""
    known = [(s.time, s.step) for s in statuses if s.step]
    recent = [(when, step) for when, step in known if when > known[-1][0] - _RECENT_S]
    if recent and recent[-1][1] > recent[0][1]:
        return (recent[-1][0] - recent[0][0]) / (recent[-1][1] - recent[0][1])
    return statistics.median(s for _, s in seen.seconds[-20:]) if seen.seconds else None


# The page -----------------------------------------------------------------------------------------


class _Html(str):
    """Markup. Any other text is escaped where it is put into markup."""


def _tag(name: str, *inside: object, **attributes: object) -> _Html:
    """An element: `class_` is the attribute class, as `stroke_width` is stroke-width."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return _Html(f"<{name}{said}>{_joined(inside)}</{name}>")


def _joined(parts: Sequence[object]) -> _Html:
    return _Html("".join(p if isinstance(p, _Html) else html.escape(str(p)) for p in parts))


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #6b7280; --line: #e3e6ea; --page: #f5f6f8;
  --card: #ffffff; --a: #2563c9; --b: #d9632a; --c: #2f8f5b; --d: #8a4fc4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --dim: #9aa3af; --line: #2d333b;
  --page: #14171b; --card: #1c2026; --a: #6ea4ff; --b: #ff9a66; --c: #6fd39b; --d: #c39bf5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 40px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px; }
h1 { font-size: 22px; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 14px; font-weight: 600; margin: 0 0 10px; }
.state { font-size: 13px; font-weight: 600; padding: 2px 10px; border-radius: 99px;
  border: 1px solid currentColor; }
.going { color: var(--a); } .done { color: var(--c); } .quiet { color: var(--b); }
.dim { color: var(--dim); }
progress { display: block; width: 100%; height: 8px; margin: 18px 0 20px; border: 0;
  border-radius: 99px; overflow: hidden; background: var(--line); accent-color: var(--a); }
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--a); border-radius: 99px; }
progress::-moz-progress-bar { background: var(--a); border-radius: 99px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 16px 18px; min-width: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 14px;
  margin-bottom: 14px; }
.facts section { padding: 12px 18px; }
.facts b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 14px; align-items: start; }
.columns > div { display: grid; gap: 14px; min-width: 0; }
.columns > div:empty { display: none; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--dim); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); } .axis { stroke: var(--dim); }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.band { opacity: 0.16; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .c { stroke: var(--c); } .d { stroke: var(--d); }
.fa { fill: var(--a); } .fb { fill: var(--b); } .fc { fill: var(--c); } .fd { fill: var(--d); }
svg text.fa, svg text.fb, svg text.fc, svg text.fd { font-weight: 600; }
svg text.fa { fill: var(--a); } svg text.fb { fill: var(--b); }
svg text.fc { fill: var(--c); } svg text.fd { fill: var(--d); }
img { display: block; width: 100%; max-width: 480px; margin: 0 auto; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line);
  font-weight: 400; vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--dim); white-space: nowrap; } tr:last-child > * { border-bottom: 0; }
footer { margin-top: 20px; font-size: 13px; color: var(--dim); }
"""
_REFRESH_S, _REFRESH_FINISHED_S = 5, 60
_QUIET_S = 60.0  # without news


def page(seen: Seen, now: float, image: str) -> bytes:
    """The page, HTML in UTF-8.

    Args:
        seen: what there is to see.
        now: seconds since 1970.
        image: the address of the newest sample.
    """
    every = _REFRESH_FINISHED_S if seen.finished else _REFRESH_S
    columns = (
        [_losses(seen), *_others(seen), _times(seen)],
        [_sample(seen, image), _from_servers(seen), _events(seen)],
    )
    body = _tag(
        "main",
        _tag("header", _tag("h1", seen.path.resolve().name), *_state(seen, now)),
        _tag("progress", value=seen.step, max=seen.steps or max(seen.step, 1)),
        _tag("div", *_facts(seen), class_="facts"),
        _tag("div", *(_tag("div", *filter(None, c)) for c in columns), class_="columns"),
        _tag(
            "footer",
            f"What SP has of {seen.path.resolve()}, and nothing else. "
            f"Read anew every {every} s; only this machine can see it.",
        ),
    )
    return _document(seen.path.resolve().name, body, every)


def _document(title: str, body: _Html, every: int) -> bytes:
    head = _joined(
        [
            _Html('<meta charset="utf-8">'),
            _Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            _Html(f'<meta http-equiv="refresh" content="{every}">'),
            _tag("title", f"{title} - lpgan"),
            _tag("style", _Html(_STYLE)),
        ]
    )
    text = _tag("html", _tag("head", head), _tag("body", body), lang="en")
    return b"<!DOCTYPE html>" + text.encode()


def _state(seen: Seen, now: float) -> list[_Html]:
    if seen.finished:
        state = _tag("span", "finished", class_="state done")
    elif now - seen.changed > _QUIET_S:
        state = _tag("span", f"no news for {_duration(now - seen.changed)}", class_="state quiet")
    else:
        state = _tag("span", "running", class_="state going")
    return [state, _tag("span", seen.what, class_="dim")]


def _facts(seen: Seen) -> list[_Html]:
    of = f" of {seen.steps:,}" if seen.steps else ""
    facts = [("step", f"{seen.step:,}", of)]
    speed = seen.seconds_per_step
    facts.append(("speed", "?", "") if speed is None else ("speed", f"{speed:.3g}", " s a step"))
    if seen.finished:
        facts.append(("remaining", "nothing", ""))
    elif speed is not None and seen.steps:
        facts.append(("remaining", _duration(speed * max(0, seen.steps - seen.step)), ""))
    else:
        facts.append(("remaining", "?", ""))
    if seen.attempt is not None:
        facts.append(("attempt", f"{seen.attempt}", ""))
    return [
        _tag("section", _tag("span", name, class_="dim"), _tag("b", value, _dim(unit)))
        for name, value, unit in facts
    ]


def _dim(text: str) -> _Html:
    return _tag("small", text, class_="dim")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days} d {hours_left} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _losses(seen: Seen) -> _Html:
    losses = {name: curve for name, curve in seen.curves.items() if _is_loss(name)}
    if losses:
        plot = _plot(losses, "mean over the batch")
    elif seen.curves:
        return _Html("")
    else:
        why = "They are not opened." if seen.seconds else "SP has been told of no step yet."
        plot = _tag("p", why, class_="dim")
    return _tag("section", _tag("h2", "Losses"), plot)


def _is_loss(name: str) -> bool:
    return "loss" in name


def _others(seen: Seen) -> list[_Html]:
    return [
        _tag("section", _tag("h2", name), _plot({name: curve}, _AXES.get(name, _OWN_AXIS)))
        for name, curve in seen.curves.items()
        if not _is_loss(name)
    ]


def _times(seen: Seen) -> _Html:
    if not seen.seconds:
        return _Html("")
    # The first step's is mostly compilation, and says nothing about the others.
    plot = _plot({"a step": seen.seconds[1:] or seen.seconds}, "seconds")
    return _tag("section", _tag("h2", "Time of a step"), plot)


def _sample(seen: Seen, image: str) -> _Html:
    if seen.sample is None:
        return _Html("")
    step, file = seen.sample
    shown = _tag("p", f"{file.name}: no picture, {file.stat().st_size:,} bytes", class_="dim")
    if file.suffix == ".png":
        shown = _Html(f'<img src="{html.escape(image)}" alt="the sample after step {step}">')
    return _tag("section", _tag("h2", f"Sample after step {step:,}"), shown)


def _from_servers(seen: Seen) -> _Html:
    if (status := seen.status) is None:
        return _Html("")
    rows = [("doing", "finished" if seen.finished else status.doing)]
    rows += [(f"received from {p}", _bytes(n)) for p, n in sorted(status.received.items()) if n]
    rows += [(f"waited for {p}", _duration(s)) for p, s in sorted(status.waited.items()) if s >= 1]
    return _tag("section", _tag("h2", "SP, since it was last started"), _table(rows))


def _events(seen: Seen) -> _Html:
    if not seen.events:
        return _Html("")
    rows = [
        (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)), text)
        for when, text in seen.events[-6:]
    ]
    return _tag("section", _tag("h2", "What happened to SP"), _table(rows))


def _table(rows: Sequence[tuple[str, str]]) -> _Html:
    return _tag("table", *(_tag("tr", _tag("th", name), _tag("td", text)) for name, text in rows))


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


# Plots --------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 520, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 24, 28, 40
_POINTS = 200  # of a curve; more steps than that are one point together


def _plot(curves: dict[str, Curve], unit: str) -> _Html:
    """Curves over steps, as SVG: the mean of each few steps, in a band from least to largest."""
    shortened = {name: _shortened(curve) for name, curve in curves.items()}
    points = [point for curve in shortened.values() for point in curve]
    steps = _ticks(0, max(max(step for step, *_ in points), 1), 6)
    values = _ticks(min(low for _, low, _, _ in points), max(high for *_, high in points), 5)

    def x(step: float) -> float:
        share = (step - steps[0]) / (steps[-1] - steps[0])
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        share = (value - values[0]) / (values[-1] - values[0])
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [_line(x(steps[0]), y(value), x(steps[-1]), y(value), "grid") for value in values]
    parts += [_text(_LEFT - 8, y(value) + 4, _number(value), "end") for value in values]
    parts += [_text(x(step), _HEIGHT - _BOTTOM + 18, _number(step), "middle") for step in steps]
    parts.append(_line(x(steps[0]), y(values[0]), x(steps[-1]), y(values[0]), "axis"))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 4, "step", "end"))
    parts.append(_text(0, 12, unit, "start"))
    right: float = _WIDTH - _RIGHT
    for place, (name, curve) in reversed([*enumerate(shortened.items())]):
        colour = "abcd"[place % 4]
        ends = [(x(s), y(high)) for s, _, _, high in curve]
        ends += [(x(s), y(low)) for s, low, _, _ in reversed(curve)]
        parts.append(_tag("polygon", points=_pairs(ends), class_=f"band f{colour}"))
        means = [(x(s), y(mean)) for s, _, mean, _ in curve]
        parts.append(_tag("polyline", points=_pairs(means), class_=f"curve {colour}"))
        parts.append(_tag("circle", cx=means[-1][0], cy=means[-1][1], r=3, class_=f"f{colour}"))
        label = f"{name} {curves[name][-1][1]:.4g}"
        parts.append(_text(right, 12, label, "end", f"f{colour}"))
        right -= 7.2 * len(label) + 14
    title = f"{', '.join(curves)} over steps"
    return _tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=title)


def _shortened(curve: Curve) -> list[tuple[float, float, float, float]]:
    """(step, least, mean, largest) of every few points."""
    size = math.ceil(len(curve) / _POINTS)
    found = []
    for start in range(0, len(curve), size):
        steps, values = zip(*curve[start : start + size], strict=True)
        mean = statistics.fmean(values)
        found.append((statistics.fmean(steps), min(values), mean, max(values)))
    return found


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers, evenly, from at most `low` to at least `high`: about so many."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}"


def _pairs(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> _Html:
    return _tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=name)


def _text(x: float, y: float, text: str, anchor: str, name: str = "") -> _Html:
    return _tag("text", text, x=round(x, 1), y=y, text_anchor=anchor, class_=name)


# Serving it ---------------------------------------------------------------------------------------

_ADDRESS = "127.0.0.1"
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer: no scripts, nothing from elsewhere, kept by nobody."""


class Watcher:
    """Serves the page of a run to this machine's user.

    Attributes:
        url: where.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        port: int = 0,
        log: str | os.PathLike[str] | None = None,
    ) -> None:
        """Listens; `serve` answers.

        Args:
            path: the run directory.
            port: on which; 0 for any that is free.
            log: SP's, if it is not in the directory.

        Raises:
            FileNotFoundError, ValueError: as `look`.
            OSError: the port is taken.
        """
        look(path, log)
        self._path, self._log = Path(path), log
        self._secret = secrets.token_urlsafe(16)

        class Handler(_Handler):
            watcher = self

        self._server = ThreadingHTTPServer((_ADDRESS, port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://{_ADDRESS}:{self.port}/{self._secret}/"

    def serve(self) -> None:
        """Answer until `close`, from another thread, or an interruption."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()

    def is_for_here(self, host: str | None) -> bool:
        """Whether a request asks for this machine by name."""
        return host in (f"{_ADDRESS}:{self.port}", f"localhost:{self.port}")

    def answer(self, path: str) -> tuple[str, bytes] | None:
        """The type and content of one of the two things there are; None for any other path."""
        if hmac.compare_digest(path.encode(), f"/{self._secret}/".encode()):
            return "text/html; charset=utf-8", self._page()
        if hmac.compare_digest(path.encode(), f"/{self._secret}/sample.png".encode()):
            with suppress(OSError, ValueError):
                sample = look(self._path, self._log).sample
                if sample is not None and sample[1].suffix == ".png":
                    return "image/png", sample[1].read_bytes()
        return None

    def _page(self) -> bytes:
        try:
            return page(look(self._path, self._log), time.time(), "sample.png")
        except (
            OSError,
            ValueError,
            OverflowError,
        ) as error:  # while it is moved, perhaps: look again
            body = _tag("main", _tag("h1", "This run cannot be read"), _tag("p", str(error)))
            return _document(self._path.name, body, _REFRESH_S)


class _Handler(BaseHTTPRequestHandler):
    """GET of what a `Watcher` has, and nothing else."""

    watcher: Watcher
    timeout = 20
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lpgan", ""

    def do_GET(self) -> None:
        if not self.watcher.is_for_here(self.headers["Host"]):
            return self._say(HTTPStatus.MISDIRECTED_REQUEST, "this is not for you\n")
        found = self.watcher.answer(self.path)
        if found is None:
            return self._say(HTTPStatus.NOT_FOUND, "there is nothing here: see what lpgan says\n")
        self._send(HTTPStatus.OK, *found)

    def _refuse(self) -> None:
        self._say(HTTPStatus.METHOD_NOT_ALLOWED, "expected GET\n", Allow="GET")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse

    def _say(self, status: HTTPStatus, text: str, **headers: str) -> None:
        self.close_connection = True  # what else was sent is not read
        self._send(status, "text/plain; charset=utf-8", text.encode(), **headers)

    def _send(self, status: HTTPStatus, kind: str, content: bytes, **headers: str) -> None:
        self.send_response(status)
        size = {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in (size | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def end_headers(self) -> None:
        """Also of what the base class refuses by itself."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Nobody reads it, and it would have the path."""


def watch(path: str | os.PathLike[str], port: int = 0, cluster: str | None = None) -> None:
    """Serve the page of a run, and say where, until an interruption.

    Args:
        path: the run directory.
        port: on which; 0 for any that is free.
        cluster: the configuration by whose state SP's log is found, if it is not in the directory.

    Raises:
        FileNotFoundError, ValueError: the directory is no run, or the configuration is wrong.
        OSError: the port is taken.
    """
    log = None if cluster is None else Path(load_cluster(cluster).state) / "logs" / "sp.jsonl"
    watcher = Watcher(path, port=port, log=log)
    print(f"{watcher.url}   (Ctrl-C ends it; only this machine can see it)", flush=True)
    try:
        watcher.serve()
    except KeyboardInterrupt:
        pass
    finally:
        watcher._server.server_close()
