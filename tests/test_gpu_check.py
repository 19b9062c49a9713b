"""The script for GPUs, on a CPU: it runs, and tells what differs."""

import json

import jax
import pytest
from helpers import script

gpu_check = script("gpu_check")


def run(folder, *arguments):
    """The exit status, and what was written."""
    status = gpu_check.main([*arguments, "--platform", "cpu", "--quick", "--out", str(folder)])
    return status, json.loads((folder / "gpu_check.json").read_text())


@pytest.mark.slow  # what it compares is tested by itself
def test_it_runs(tmp_path):
    status, found = run(tmp_path)
    assert set(found["checks"].values()) == {"exact"}
    assert found["exact"]
    assert status == 0
    assert all(value > 0 for own in found["timings"].values() for value in own.values())
    page = (tmp_path / "gpu_check.md").read_text()
    assert all(f"| {name} | " in page for name in (*found["checks"], *found["timings"]))


def test_it_tells_what_differs_and_goes_on(tmp_path, monkeypatch):
    def one_off():
        gpu_check.equal({"x": 1}, {"x": 2})

    def out_of_memory():
        raise RuntimeError("out of | memory")

    monkeypatch.setattr(gpu_check, "checks", lambda *_: [("a", one_off), ("b", lambda: None)])
    monkeypatch.setattr(gpu_check, "timings", lambda *_: [("c", out_of_memory)])
    status, found = run(tmp_path)
    assert status == 1
    assert not found["exact"]
    assert "AssertionError" in found["checks"]["a"]
    assert found["checks"]["b"] == "exact"
    assert found["timings"]["c"] == "RuntimeError: out of / memory"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_it_says_that_there_is_no_gpu(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "no GPU: JAX sees" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
