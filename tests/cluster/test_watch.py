"""The page of a run says what SP's files say, to this machine's user only."""

import base64
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny_program
from clusters import tiny
from PIL import Image

from lpgan_jax import cli
from lpgan_jax.cluster.logs import Log
from lpgan_jax.cluster.watch import HEADERS, Watcher, look
from lpgan_jax.training import config
from lpgan_jax.training.building import training_of
from lpgan_jax.training.run_directory import Metrics, RunDirectory

SETTINGS = tiny(steps=2000)
MAGENTA = (255, 0, 255)


class Run:
    """A run directory as SP of `lpgan up` writes it."""

    def __init__(self, path):
        self.run = RunDirectory.create(path, SETTINGS, servers="together")
        self.path = path
        self.metrics = Metrics(self.run.metrics_file, 0, training_of(SETTINGS))
        self.log = Log(path / "logs" / "sp.jsonl")

    def row(self, step, d, g, seconds=0.25):
        self.metrics.append(step, {"loss_d": d, "loss_g": g}, seconds)

    def sample(self, step, colour=MAGENTA):
        file = self.run.sample_file(step, ".png")
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (520, 520), colour).save(file)
        return file

    def status(self, step, phase="waiting for results of", when=None, **fields):
        report = {
            "kind": "status",
            "role": "sp",
            "phase": {"name": phase, "number": 1, "on": "s1", "limit_s": None},
            "step": step,
            "steps": SETTINGS.steps,
            "s_per_step": 0.25,
            "received": {"s1": 5_300_000, "s2": 5_400_000},
            "sent": {},
            "waited_s": {"s1": 75.0, "s2": 0.2},
        }
        line = json.dumps({"time": time.time() if when is None else when, **report, **fields})
        with self.log.path.open("a") as file:
            file.write(line + "\n")


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


@pytest.fixture
def serve():
    """Starts to serve a directory: its watcher."""
    started = []

    def serve(path, **fields):
        watcher = Watcher(path, **fields)
        thread = threading.Thread(target=watcher.serve)
        thread.start()
        started.append((watcher, thread))
        return watcher

    yield serve
    for watcher, thread in started:
        watcher.close()
        thread.join(10)


def ask(watcher, path="", method="GET", whole=False, **headers):
    """(status, headers, content) of a path below the secret one, or a whole path."""
    connection = http.client.HTTPConnection("127.0.0.1", watcher.port, timeout=20)
    try:
        path = path if whole else "/" + watcher.url.split("/", 3)[3] + path
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


class Text(HTMLParser):
    """The text of a page, and its elements."""

    def __init__(self, page):
        super().__init__()
        self.parts, self.tags = [], []
        self.feed(page.decode())
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.parts.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def shown(watcher):
    status, _, content = ask(watcher)
    assert status == 200
    return Text(content)


# What it says -------------------------------------------------------------------------------------


def test_the_page_says_what_the_files_say_while_the_run_goes_on(run, serve):
    watcher = serve(run.path)
    assert "step 0 of 2,000" in shown(watcher).text
    assert "SP has been told of no step yet." in shown(watcher).text
    now = time.time()
    for step in (1, *range(10, 410, 10)):
        run.row(step, 1.5 - step / 1000, 0.5 + step / 1000)
    for seconds in range(100):
        run.status(200 + 2 * seconds, when=now - 100 + seconds)
    file = run.sample(390)
    (run.path / "received.json").write_text(json.dumps({"attempt": 4}))
    page = shown(watcher)
    for said in (
        "step 398 of 2,000",
        "speed 0.5 s a step",
        "remaining 13 min 21 s",
        "attempt 4",
        "running digits",
        "loss_d 1.1",
        "loss_g 0.9",
        "mean over the batch",
        "Sample after step 390",
        "received from s1 5.3 MB",
        "received from s2 5.4 MB",
        "waited for s1 1 min 15 s",
        "doing waiting for results of s1",
    ):
        assert said in page.text, said
    assert "waited for s2" not in page.text
    assert page.all("progress") == [{"value": "398", "max": "2000"}]
    assert ask(watcher, "sample.png")[2] == file.read_bytes()
    # And again, as it goes on.
    run.row(410, 0.25, 0.75)
    run.status(410)
    newer = run.sample(400, (1, 2, 3))
    page = shown(watcher)
    assert "loss_d 0.25" in page.text
    assert "step 410 of 2,000" in page.text
    assert ask(watcher, "sample.png")[2] == newer.read_bytes()
    assert page.all("meta")[-1] == {"http-equiv": "refresh", "content": "5"}


def test_losses_that_are_not_opened_are_not_there(run, serve):
    run.row(10, None, None)
    page = shown(serve(run.path))
    assert "They are not opened." in page.text
    assert "speed 0.25 s a step" in page.text


def test_curves_are_the_tables(run):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 2))
    for step, (d, g) in enumerate(values, 1):
        run.row(step, d if step != 7 else float("nan"), g)
    seen = look(run.path)
    assert [step for step, _ in seen.curves["loss_d"]] == [n for n in range(1, 301) if n != 7]
    assert [value for _, value in seen.curves["loss_g"]] == list(values[:, 1])
    assert seen.step == 300
    assert seen.seconds_per_step == 0.25


def test_lines_are_drawn_where_values_are(run, serve):
    """The drawing, read back by its axes' labels."""
    losses = {10: 1.0, 20: 3.0, 30: 2.0}
    for step, value in losses.items():
        run.row(step, value, value + 0.5)
    _, _, content = ask(serve(run.path))
    svg = content.decode().split("<svg")[1]
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"[^>]*>([^<]+)', svg)
    ys = {float(t): float(y) - 4 for x, y, anchor, t in labels if anchor == "end" and float(x) < 99}
    xs = {float(text): float(x) for x, _, anchor, text in labels if anchor == "middle"}
    low, high = min(ys), max(ys)
    left, right = min(xs), max(xs)
    lines = re.findall(r'<polyline points="([^"]+)" class="curve (\w)"', svg)
    assert [colour for _, colour in lines] == ["b", "a"]
    for points, extra in ((lines[1][0], 0.0), (lines[0][0], 0.5)):
        found = [tuple(map(float, pair.split(","))) for pair in points.split()]
        assert len(found) == 3
        for (x, y), (step, value) in zip(found, losses.items(), strict=True):
            read = low + (y - ys[low]) / (ys[high] - ys[low]) * (high - low)
            assert abs(read - value - extra) < 0.02
            at = left + (x - xs[left]) / (xs[right] - xs[left]) * (right - left)
            assert abs(at - step) < 0.2


def test_a_long_table_is_drawn_quickly_and_its_end_is_exact(run, serve):
    with run.run.metrics_file.open("a") as file:
        for step in range(1, 300_001):
            file.write(f"{step},{step % 7},{step % 5},0.5,8.0\n")
    watcher, started = serve(run.path), time.monotonic()
    _, _, content = ask(watcher)
    assert time.monotonic() - started < 5
    assert len(content) < 100_000
    assert f"loss_d {300_000 % 7}" in Text(content).text
    assert "step 300,000 of 2,000" in Text(content).text


def test_after_the_run_it_says_so(run, serve):
    run.row(2000, 1.0, 1.0)
    run.status(2000)
    run.log.event({"kind": "event", "role": "sp", "event": "collected", "step": 2000})
    run.run.summary_file.write_text(json.dumps({"steps": 2000, "mode": "two servers"}))
    run.status(64, steps=64)  # SP asks for 64 images
    page = shown(serve(run.path))
    assert "finished" in page.text
    assert "step 2,000 of 2,000" in page.text
    assert "remaining nothing" in page.text
    assert page.all("meta")[-1]["content"] == "60"


def test_a_run_without_a_cluster_has_a_page(tmp_path, serve):
    """As `lpgan train` writes it, of a program whose steps only the program knows."""
    settings = config.program_config(tiny_program.__file__)
    run = RunDirectory.create(tmp_path / "run", settings)
    run.metrics_file.write_text(
        "step,accuracy,epsilon,seconds,examples_per_s\n10,0.5,1.25,2.0,4.0\n20,"
    )
    run.sample_file(10, ".npy").parent.mkdir()
    np.save(run.sample_file(10, ".npy"), np.zeros(3))
    watcher = serve(run.path)
    page = shown(watcher)
    for said in (
        "step 10 speed 2 s a step",
        "remaining ?",
        "accuracy 0.5",
        "spent so far, of each example",
        "no picture, 152 bytes",
    ):
        assert said in page.text, said
    assert not page.all("img")
    assert ask(watcher, "sample.png")[0] == 404


def test_silence_is_told(run, serve):
    run.row(10, 1.0, 1.0)
    for path in run.path.rglob("*"):
        os.utime(path, (time.time() - 7200,) * 2)
    assert "no news for 2 h 0 min" in shown(serve(run.path)).text


def test_the_log_of_another_directory(run, tmp_path, serve):
    """Of `lpgan sp`, whose log is in its state."""
    log = tmp_path / "state" / "logs" / "sp.jsonl"
    run.status(77)
    log.parent.mkdir(parents=True)
    shutil.move(run.log.path, log)
    assert look(run.path).status is None
    assert "step 77 of 2,000" in shown(serve(run.path, log=log)).text


# To whom, and what not ----------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere_and_says_so(run, serve):
    run.row(10, 1.0, 1.0)
    run.sample(10)
    watcher = serve(run.path)
    secret = watcher.url.split("/")[3]
    for path, status in (("", 200), ("sample.png", 200), ("nothing", 404)):
        found, headers, content = ask(watcher, path)
        assert found == status
        for name, value in HEADERS.items():
            assert headers[name] == value
        assert len(content) == int(headers["Content-Length"])
        assert secret.encode() not in content
    policy = dict(
        part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy.keys() == {
        *("default-src", "style-src", "img-src", "base-uri", "form-action", "frame-ancestors")
    }
    text = ask(watcher)[2].decode()
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy["style-src"] == f"'sha256-{digest}'"
    page = Text(text.encode())
    assert not page.all("script") + page.all("link") + page.all("iframe") + page.all("a")
    assert [image["src"] for image in page.all("img")] == ["sample.png"]
    assert not re.search(r"https?:|url\(|@import| on\w+=| style=", text)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"])
def test_it_only_gives(run, serve, method):
    watcher = serve(run.path)
    status, headers, _ = ask(watcher, method=method)
    assert status in (405, 501)
    assert headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]


def test_there_are_two_paths(run, serve):
    watcher = serve(run.path)
    run.sample(10)
    secret = watcher.url.split("/")[3]
    assert len(secret) > 20
    assert ask(watcher, f"/{secret}/", whole=True)[0] == 200
    wrong = ["/", "", "*", f"/{secret}", f"/{secret}//", "/x/", "/sample.png"]
    wrong += [f"/{secret}/{p}" for p in ("?", "../", "config.yaml", "sample.png/", "%2e%2e/x")]
    wrong += [f"/{secret[:-1]}/"]
    for path in wrong:
        status, _, content = ask(watcher, path, whole=True)
        assert status == 404, path
        assert b"digits" not in content
    other = Watcher(run.path)
    assert other.url.split("/")[3] != secret
    other._server.server_close()


def test_nonsense_is_answered_by_nothing_of_the_run(run, serve):
    watcher = serve(run.path)
    for line in (b"GET /\xe9\xff HTTP/1.1\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"GET\r\n\r\n", b"\0"):
        with socket.create_connection(("127.0.0.1", watcher.port), timeout=5) as connection:
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert b"digits" not in answer
    assert ask(watcher)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "", "[::1]:1"]
)
def test_a_site_whose_name_points_here_gets_nothing(run, serve, host):
    watcher = serve(run.path)
    assert ask(watcher, Host=host.format(port=watcher.port))[0] == 421
    for mine in ("127.0.0.1", "localhost"):
        assert ask(watcher, Host=f"{mine}:{watcher.port}")[0] == 200


def test_it_listens_on_loopback_only(run, serve):
    assert serve(run.path)._server.server_address[0] == "127.0.0.1"


def test_what_is_in_files_is_text(tmp_path, serve):
    evil = "<script>alert('1')</script>&\"<img src=x>"
    settings = config.program_config(tiny_program.__file__)
    settings = settings.model_copy(update={"program": f"{evil.replace('/', '|')}.py"})
    path = tmp_path / "<b>run"
    run = RunDirectory.create(path, settings)
    run.metrics_file.write_text(f"step,{evil},loss{evil},seconds,x\n10,0.5,0.25,2.0,4.0\n")
    log = Log(path / "logs" / "sp.jsonl")
    log.event({"kind": "event", "role": "sp", "event": "restarting", "reason": evil})
    status = {"phase": {"name": evil, "on": evil}, "step": 3, "steps": 9}
    status |= {"received": {evil: 10**6}, "waited_s": {evil: 9.0}}
    log.event({"kind": "status", "role": "sp", **status})
    (path / "samples").mkdir()
    (path / "samples" / "step_000010.png").write_bytes(b"no picture")
    _, _, content = ask(serve(path))
    page = Text(content)
    assert content.decode().count("<script") == 0
    assert len(page.all("img")) == 1
    assert not page.all("b") or all(not attributes for attributes in page.all("b"))
    assert page.text.count(evil) >= 6


def test_nothing_is_read_but_what_sp_has(run, monkeypatch):
    """In a directory of `lpgan up`, where everybody's files are."""
    run.row(10, 1.0, 1.0)
    run.sample(10)
    run.status(10)
    (run.path / "received.json").write_text("{}")
    for other in ("logs/s1.jsonl", "checkpoints/s1/x", "results/s1/0", "session-s1.json"):
        (run.path / other).parent.mkdir(parents=True, exist_ok=True)
        (run.path / other).write_text("of another")
    opened, original = set(), Path.open

    def noting(path, *args, **kwargs):
        opened.add(str(path.relative_to(run.path)))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", noting)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    watcher = Watcher(run.path)
    watcher.answer("/" + watcher.url.split("/", 3)[3])
    watcher._server.server_close()
    assert opened == {"config.yaml", "metrics.csv", "received.json", "logs/sp.jsonl"}
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_damage_is_told_on_the_page(run, serve):
    watcher = serve(run.path)
    run.log.path.write_bytes(b'\xff\n{"kind": 3}\n[]\n{"kind": "status", "time": Infinity}\n{')
    run.run.metrics_file.write_bytes(b"step,loss_d,seconds,x\nx,1,2,3\n5,nan,,\n6,0.5,1.0,2\n7,0.")
    assert "step 6 of 2,000" in shown(watcher).text
    run.run.summary_file.write_text("{")
    assert "This run cannot be read" in shown(watcher).text
    assert "summary.json: damaged" in shown(watcher).text
    run.run.summary_file.unlink()
    run.run.config_file.rename(run.path / "elsewhere")
    assert "not a run directory" in shown(watcher).text
    (run.path / "elsewhere").rename(run.run.config_file)
    assert "step 6 of 2,000" in shown(watcher).text


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    assert cli.main(["watch", str(tmp_path)]) == 1
    assert "not a run directory, expected a config.yaml in it" in capsys.readouterr().err
    assert cli.main(["watch", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: not a run directory" in capsys.readouterr().err
    run = Run(tmp_path / "run")
    watcher = Watcher(run.path)
    assert cli.main(["watch", str(run.path), "--port", str(watcher.port)]) == 1
    assert "in use" in capsys.readouterr().err
    watcher._server.server_close()


# In a browser -------------------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium on this machine")
def test_a_browser_shows_losses_and_the_sample(run, serve, tmp_path):
    """Rendered by Chromium under the page's own policy, which it complains of if it is broken."""
    for step in range(10, 500, 10):
        run.row(step, 1.4 - step / 1000, 0.7 + step / 1000)
    run.status(490)
    run.sample(400)
    watcher, picture = serve(run.path), tmp_path / "page.png"
    command = [
        BROWSER,
        "--headless",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,1000"]
    command += [f"--screenshot={picture}", watcher.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.exists(), done.stderr[-2000:]
    assert "Content Security Policy" not in done.stderr
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)

    def count(colour):
        return int((pixels == colour).all(1).sum())

    assert count((0xF5, 0xF6, 0xF8)) > 50_000, "the page's own style"
    assert count(MAGENTA) > 400 * 400, "the sample"
    for colour in ((0x25, 0x63, 0xC9), (0xD9, 0x63, 0x2A)):
        assert count(colour) > 300, "a curve and its label"
