import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpgan_jax.common import files
from lpgan_jax.common.files import atomic_write
from lpgan_jax.training.checkpoint import CheckpointError, latest_step, load, save

REPOSITORY = Path(__file__).parent.parent.parent


def tree(seed=0):
    random = np.random.default_rng(seed)

    def pair(*shape):
        return random.integers(0, 2**64, (2, *shape), np.uint64)

    return {
        "generator": {"dense": {"kernel": pair(3, 4), "bias": pair(4)}, "scale": pair()},
        "discriminator": {"kernel": pair(2, 2, 1, 5), "empty": pair(0), "nothing": {}},
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_same(value, other[key])
        else:
            assert other[key].dtype == np.uint64
            np.testing.assert_array_equal(value, other[key])


def file_of(run, server, step):
    return run / "checkpoints" / server / f"step_{step:08d}.msgpack"


def steps_of(run, server):
    return sorted(int(p.stem[5:]) for p in (run / "checkpoints" / server).iterdir())


def rewrite_header(path, **fields):
    line, payload = path.read_bytes().split(b"\n", 1)
    header = json.dumps(json.loads(line) | fields).encode()
    path.write_bytes(header + b"\n" + payload)


def test_round_trip(tmp_path):
    save(tmp_path, 100, tree(), keep=3)
    assert latest_step(tmp_path) == 100
    step, loaded = load(tmp_path)
    assert step == 100
    assert_same(tree(), loaded)
    loaded["generator"]["dense"]["bias"][:] = 0  # writable


arrays = st.lists(st.integers(0, 3), max_size=3).map(
    lambda shape: np.random.default_rng(len(shape)).integers(0, 2**64, (2, *shape), np.uint64)
)
trees = st.dictionaries(
    st.text(), st.recursive(arrays, lambda inner: st.dictionaries(st.text(), inner), max_leaves=8)
)


@settings(max_examples=40, deadline=None)
@given(trees, st.integers(0, 10**12))
def test_any_tree_round_trips(tmp_path_factory, paired, step):
    run = tmp_path_factory.mktemp("run")
    save(run, step, paired, keep=1)
    assert load(run)[0] == latest_step(run) == step
    assert_same(paired, load(run, step)[1])
    shutil.rmtree(run)


def test_each_server_has_only_its_share(tmp_path):
    save(tmp_path, 1, tree(), keep=1)
    kernel = tree()["generator"]["dense"]["kernel"]
    for server, own, other in (("s1", 0, 1), ("s2", 1, 0)):
        content = file_of(tmp_path, server, 1).read_bytes()
        assert kernel[own].tobytes() in content
        assert kernel[other].tobytes() not in content


def test_only_the_owner_may_read(tmp_path):
    before = os.umask(0)
    try:
        save(tmp_path, 1, tree(), keep=1)
    finally:
        os.umask(before)
    for path in (tmp_path / "checkpoints").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert stat.S_IMODE((tmp_path / "checkpoints").stat().st_mode) == 0o700


def test_jax_arrays_are_taken_too(tmp_path):
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True):
        save(tmp_path, 0, jax.tree.map(jnp.asarray, tree()), keep=1)
    assert_same(tree(), load(tmp_path)[1])


def test_keeps_the_last_steps(tmp_path):
    for step in (0, 5, 10, 15, 20):
        save(tmp_path, step, tree(step), keep=3)
    assert steps_of(tmp_path, "s1") == steps_of(tmp_path, "s2") == [10, 15, 20]
    assert_same(tree(15), load(tmp_path, 15)[1])
    save(tmp_path, 25, tree(), keep=1)
    assert steps_of(tmp_path, "s1") == steps_of(tmp_path, "s2") == [25]


def test_a_damaged_step_takes_no_intact_ones_place(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, tree(step), keep=2)
    file_of(tmp_path, "s1", 2).write_bytes(b"")
    save(tmp_path, 3, tree(3), keep=2)
    assert steps_of(tmp_path, "s1") == [1, 3]


def test_saving_an_earlier_step_voids_the_later_ones(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, tree(step), keep=3)
    save(tmp_path, 2, tree(20), keep=3)
    assert latest_step(tmp_path) == 2
    assert_same(tree(20), load(tmp_path)[1])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            np.zeros((2, 3), np.float32),
            r"a\.b: float32\[2, 3\] given, expected shares: uint64\[2, ",
        ),
        (np.zeros((2, 3), np.int64), r"a\.b: int64\[2, 3\] given"),
        (np.zeros((3, 2), np.uint64), r"a\.b: uint64\[3, 2\] given"),
        (np.uint64(7), r"a\.b: uint64\[\] given"),
        (3, r"a\.b: int\[\] given"),
        (None, r"a\.b: NoneType\[\] given"),
        ([np.zeros(2, np.uint64)], r"a\.b: list\[\] given"),
        ({1: np.zeros(2, np.uint64)}, r"a\.b\.1: expected keys that are strings"),
    ],
)
def test_only_shares_are_saved(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path, 1, {"a": {"b": bad}}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_bad_numbers(tmp_path):
    with pytest.raises(ValueError, match="step: -1 given, expected at least 0"):
        save(tmp_path, -1, tree(), keep=1)
    with pytest.raises(ValueError, match="keep: 0 given, expected at least 1"):
        save(tmp_path, 1, tree(), keep=0)


# Crashes

KILLED_AT = """
import os, signal, sys
import numpy as np
from lpgan_jax.training.checkpoint import save

replace, seen = os.replace, 0
def killing_replace(*names):
    global seen
    seen += 1
    if seen == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = killing_replace
save(sys.argv[1], 2, {{"w": np.full((2, 3), 2, np.uint64)}}, keep=1)
"""


@pytest.mark.parametrize("call", [1, 2])  # before S1's file takes its name, before S2's does
def test_a_kill_leaves_the_last_checkpoint(tmp_path, call):
    old = {"w": np.full((2, 3), 1, np.uint64)}
    save(tmp_path, 1, old, keep=1)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT.format(call=call), str(tmp_path)], cwd=REPOSITORY
    )
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "checkpoints").rglob("*.tmp"))
    assert latest_step(tmp_path) == 1
    step, loaded = load(tmp_path)
    assert step == 1
    assert_same(old, loaded)
    save(tmp_path, 3, tree(), keep=1)  # and the next save tidies up
    assert sorted(p.name for p in (tmp_path / "checkpoints").rglob("*.*")) == [
        "step_00000003.msgpack",
        "step_00000003.msgpack",
    ]


def test_a_crash_between_the_servers_never_mixes_two_saves(tmp_path, monkeypatch):
    save(tmp_path, 1, tree(1), keep=2)
    save(tmp_path, 2, tree(2), keep=2)
    replace = os.replace

    def failing_replace(source, target):
        if "s2" in str(target):
            raise OSError("power cut")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", failing_replace)
        with pytest.raises(OSError, match="power cut"):
            save(tmp_path, 2, tree(3), keep=2)
    assert latest_step(tmp_path) == 1
    with pytest.raises(CheckpointError, match=r"s2/.*2\.msgpack: of another save.* step 1 is"):
        load(tmp_path)
    assert not list((tmp_path / "checkpoints").rglob("*.tmp"))


def test_atomic_write(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    atomic_write(path, b"old", private=False)
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def failing_replace(*_):
        raise OSError("disk")

    monkeypatch.setattr(files.os, "replace", failing_replace)
    with pytest.raises(OSError, match="disk"):
        atomic_write(path, b"newer")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path):
    """Of one of them; each has a temporary file of its own, and none is left."""
    path = tmp_path / "file"
    contents = [bytes([i]) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: atomic_write(path, content), contents * 8))
    assert path.read_bytes() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Damage


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = [
    (Path.unlink, "missing, expected the shares of s2"),
    (truncated, r"bytes \d+, expected \d+"),
    (flipped, "corrupt, expected the sha256 that its header gives"),
    (lambda path: path.write_bytes(b""), "not a checkpoint, expected 'lpgan_jax shares'"),
    (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "not a checkpoint"),
    (lambda path: path.write_bytes(b"[" * 9999), "not a checkpoint"),
    (lambda path: path.write_bytes(b'{"magic": "other"}\n'), "not a checkpoint"),
    (lambda path: path.write_bytes(b"[1]\n"), "not a checkpoint"),
    (lambda path: rewrite_header(path, version=3), "version 3, expected 2"),
    (lambda path: rewrite_header(path, version=1), "version 1, which lpgan_jax 0.1 reads"),
    (lambda path: rewrite_header(path, server="s1"), "server 's1', expected 's2'"),
    (lambda path: rewrite_header(path, step=9), "step 9, expected 2"),
    (lambda path: rewrite_header(path, save="x"), "of another save"),
    (lambda path: rewrite_header(path, sha256=None), "corrupt"),
    (lambda path: shutil.copy(str(path).replace("s2", "s1"), path), "server 's1', expected 's2'"),
    (lambda path: shutil.copy(str(path).replace("02.", "01."), path), "step 1, expected 2"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(tmp_path, damage, message):
    run = tmp_path / "run"
    save(run, 1, tree(1), keep=2)
    save(run, 2, tree(2), keep=2)
    damage(file_of(run, "s2", 2))
    with pytest.raises(CheckpointError, match=rf"s2/step_00000002\.msgpack: {message}"):
        load(run, 2)
    if damage is Path.unlink:  # what a crash leaves: never complete, so nothing is lost
        assert load(run)[0] == 1
        return
    with pytest.raises(CheckpointError, match=rf"00002\.msgpack: {message}.*; .*step 1 is: ask"):
        load(run)
    flipped(file_of(run, "s1", 1))
    with pytest.raises(CheckpointError, match=rf"00002\.msgpack: {message}.*no older one is"):
        load(run)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_flipped_byte_goes_unnoticed(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("run")
    save(run, 1, {"w": np.arange(4, dtype=np.uint64).reshape(2, 2)}, keep=1)
    path = file_of(run, data.draw(st.sampled_from(["s1", "s2"])), 1)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_00000001\.msgpack"):
        load(run)
    shutil.rmtree(run)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": np.zeros((2, 4), np.uint64)}, r"tree\.w: shape \[4\], expected \[3\]"),
        ({"v": np.zeros((2, 3), np.uint64)}, "tree: expected uint64 arrays under the same names"),
        ({"w": {}}, r"tree\.w: expected uint64 arrays"),
    ],
)
def test_halves_of_different_shapes(tmp_path, other, message):
    for name, paired in (("one", {"w": np.zeros((2, 3), np.uint64)}), ("other", other)):
        save(tmp_path / name, 1, paired, keep=1)
        for server in ("s1", "s2"):
            rewrite_header(file_of(tmp_path / name, server, 1), save="same")
    shutil.copy(file_of(tmp_path / "other", "s2", 1), file_of(tmp_path / "one", "s2", 1))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "one")


def test_nothing_there(tmp_path):
    assert latest_step(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="checkpoints/s1: expected a step that both servers"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"s1/step_00000007\.msgpack: missing"):
        load(tmp_path, 7)
