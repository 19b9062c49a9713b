"""Logs keep the newest lines, and are never longer than they may be."""

import json
import subprocess
import sys

from modes import open_to_others

from lpgan_jax.cluster import logs
from lpgan_jax.cluster.logs import LONGEST, Log, predecessor, shorten


def size(*files):
    return sum(file.stat().st_size for file in files if file.exists())


def test_a_log_keeps_the_newest_events_in_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LONGEST", 5000)
    file = tmp_path / "state" / "logs" / "s1.jsonl"
    log, older = Log(file), predecessor(file)
    for number in range(1000):
        log.event({"kind": "event", "number": number})
        assert size(file) <= 5000
        assert size(older) <= 5000
    lines = [*older.read_text().splitlines(), *file.read_text().splitlines()]
    numbers = [json.loads(line)["number"] for line in lines]
    assert numbers == [*range(1000 - len(numbers), 1000)]
    assert len(numbers) > 5000 / 60
    assert not open_to_others(tmp_path / "state")
    assert sorted(path.name for path in file.parent.iterdir()) == ["s1.jsonl", "s1.jsonl.1"]


def test_what_a_worker_prints_is_shortened_while_it_prints(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LONGEST", 2000)
    file = tmp_path / "s1.out"
    with file.open("ab") as output:
        command = "import os\nfor n in range(500): input(); os.write(1, b'line %d\\n' % n)"
        worker = subprocess.Popen(
            [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=output
        )
    for _ in range(500):
        worker.stdin.write(b"\n")
        worker.stdin.flush()
        shorten(file)
        assert size(file) <= 2000 + 100
    worker.stdin.close()
    assert worker.wait(20) == 0
    shorten(file)
    assert size(predecessor(file)) <= 2000
    assert file.read_text().splitlines()[-1:] in (["line 499"], [])
    assert not open_to_others(predecessor(file))
    file.write_bytes(b"x" * 50_000 + b"the end")  # at once
    shorten(file)
    assert (size(file), size(predecessor(file))) == (0, 2000)
    assert predecessor(file).read_bytes().endswith(b"the end")


def test_a_files_bound_is_some_megabytes():
    assert 2**20 < LONGEST < 2**25
