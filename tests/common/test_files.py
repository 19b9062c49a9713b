"""What runs and roles leave is for their owner alone from its first byte, and goes through no link;
what is loaded from the cache comes from where nobody else can write."""

import ctypes
import os
import shutil
import stat
import threading
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from clusters import events, local, tiny
from modes import open_to_others, watched

from lpgan_jax import native
from lpgan_jax.cluster import worker
from lpgan_jax.cluster.certificates import make_certificates
from lpgan_jax.cluster.journal import Journal
from lpgan_jax.cluster.logs import Log
from lpgan_jax.cluster.supervisor import Supervisor
from lpgan_jax.cluster.wire import Result
from lpgan_jax.cluster.worker import Job
from lpgan_jax.common.files import atomic_write, use_compilation_cache
from lpgan_jax.study import features
from lpgan_jax.training import checkpoint
from lpgan_jax.training.building import training_of
from lpgan_jax.training.loop import train
from lpgan_jax.training.run_directory import Metrics, RunDirectory

OTHER = 12345  # another user
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def shared(tmp_path):
    """An empty directory that others may read, as `mkdir` leaves it."""
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o755)
    return directory


# For their owner alone ----------------------------------------------------------------------------

# (tests/test_training.py watches a secure run, tests/test_cluster.py looks at a cluster's files.)


def test_a_plaintext_run_is_private(shared):
    settings = tiny(steps=1, sample_every=1)
    with watched(shared) as found:
        train(settings, shared, mode="plaintext", report=lambda text: None)
    assert not found
    names = {path.name for path in shared.iterdir()}
    assert {"config.yaml", "metrics.csv", "samples", "summary.json", "parameters.msgpack"} < names


def test_a_run_that_goes_on_becomes_private(tmp_path):
    run = RunDirectory.create(tmp_path / "run", tiny())
    Metrics(run.metrics_file, 0, GAN)
    run.path.chmod(0o755)
    run.metrics_file.chmod(0o644)
    assert RunDirectory.open(run.path) == run
    assert mode(run.path) == 0o755, "who only reads changes nothing"
    assert RunDirectory.resume(run.path) == run
    assert mode(run.path) == 0o700
    Metrics(run.metrics_file, 0, GAN).append(1, {"loss_d": 0.5, "loss_g": 0.5}, 1.0)
    assert mode(run.metrics_file) == 0o600


def test_what_roles_write_is_private(shared, monkeypatch):
    monkeypatch.setattr(worker, "_held", [])
    with watched(shared) as found:
        Log(shared / "logs" / "s1.jsonl").event({"kind": "event"})
        worker._lock(shared / "s1.lock")
        with closing(Journal(shared / "results" / "s1")) as journal:
            head = Result(attempt=1, serial=0, kind="told", step=0, seconds=0.0, size=3)
            journal.append(head, b"abc")
        checkpoint.save_share(shared, "s1", 1, "name", {"w": np.zeros(3, np.uint64)}, keep=1)
        make_certificates(shared / "certificates", ["s1"])
        local(shared)
    for file in worker._held:
        file.close()
    assert not found
    assert len([path for path in shared.rglob("*") if path.is_file()]) > 12


def test_what_is_for_others_follows_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        atomic_write(tmp_path / "some" / "where" / "file", b"for the group", private=False)
        atomic_write(tmp_path / "no" / "where" / "file", b"for nobody")
    finally:
        os.umask(umask)
    assert mode(tmp_path / "some" / "where" / "file") == 0o640
    assert mode(tmp_path / "some") == mode(tmp_path / "some" / "where") == 0o750
    assert not open_to_others(tmp_path / "no")


# Links, and what belongs to others ----------------------------------------------------------------

GAN = training_of(tiny())
FILES = {
    "lock": worker._lock,
    "log": lambda path: Log(path).event({"kind": "event"}),
    "metrics": lambda path: _metrics(path).append(1, {"loss_d": 0.5, "loss_g": 0.5}, 1.0),
}
DIRECTORIES = {
    "run": lambda path: RunDirectory.create(path, tiny()),
    "state": lambda path: Log(path / "logs" / "s1.jsonl"),
    "logs": lambda path: Log(path / "s1.jsonl"),
    "results": lambda path: Journal(path / "s1"),
    "journal": Journal,
    "checkpoints": lambda path: checkpoint.save_share(path.parent, "s1", 1, "name", {}, keep=1),
    "certificates": lambda path: make_certificates(path, ["s1"]),
}


def _metrics(path):
    """A table that is somewhere else by the time a row comes."""
    metrics = Metrics(path.with_name("metrics.csv"), 0, GAN)
    metrics._path = path
    return metrics


@pytest.fixture
def victim(tmp_path):
    file = tmp_path / "victim"
    file.write_text("precious")
    file.chmod(0o644)
    return file


@pytest.mark.parametrize("what", FILES)
def test_no_file_is_written_through_a_link(what, tmp_path, victim):
    (tmp_path / "own").mkdir()
    link = tmp_path / "own" / "link"
    for target in (victim, tmp_path / "nothing"):
        link.symlink_to(target)
        with pytest.raises(PermissionError, match=r"own/link: a symbolic link, expected a file"):
            FILES[what](link)
        link.unlink()
    assert victim.read_text() == "precious"
    assert mode(victim) == 0o644
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("what", DIRECTORIES)
def test_no_directory_is_a_link(what, tmp_path, shared):
    link = tmp_path / "checkpoints"
    for target in (shared, tmp_path / "nothing"):
        link.symlink_to(target)
        with pytest.raises(PermissionError, match=r"checkpoints: a symbolic link, expected a dir"):
            DIRECTORIES[what](link)
        link.unlink()
    assert not list(shared.iterdir())
    assert mode(shared) == 0o755


@as_root
@pytest.mark.parametrize("what", FILES)
def test_no_file_is_someone_elses(what, victim):
    os.chown(victim, OTHER, -1)
    with pytest.raises(PermissionError, match=f"victim: belongs to user {OTHER}, expected a file"):
        FILES[what](victim)
    assert victim.read_text() == "precious"
    assert mode(victim) == 0o644


@as_root
@pytest.mark.parametrize("what", DIRECTORIES)
def test_no_directory_is_someone_elses(what, tmp_path):
    path = tmp_path / "checkpoints"
    path.mkdir()
    os.chown(path, OTHER, -1)
    with pytest.raises(
        PermissionError, match=f"checkpoints: belongs to user {OTHER}, expected a d"
    ):
        DIRECTORIES[what](path)
    assert not list(path.iterdir())


def test_a_worker_whose_lock_is_a_link_ends_and_is_not_started_again(tmp_path, victim):
    file, cluster = local(tmp_path)
    supervisor = Supervisor(Job("serve", "s1", str(file)), cluster)
    (tmp_path / "state" / "s1.lock").symlink_to(victim)
    stop = threading.Timer(60, supervisor.stop)
    stop.start()
    assert supervisor.run() == 1
    stop.cancel()
    assert victim.read_text() == "precious"
    names = [event["event"] for event in events(tmp_path / "state", "s1")]
    assert names == ["started", "failed", "ended"]
    assert "s1.lock: a symbolic link" in events(tmp_path / "state", "s1", "ended")[0]["reason"]


# The cache ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where the cache is: not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    return tmp_path / "home" / "cache"


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """What `native` loads, in vain; its compiler leaves empty libraries that anybody may change."""
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\numask 0\nfor out; do :; done\n: > "$out"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    monkeypatch.delenv("LPGAN_NATIVE", raising=False)
    libraries = []

    def load(path):
        libraries.append(Path(path))
        raise OSError("empty")

    monkeypatch.setattr(ctypes, "CDLL", load)
    return libraries


def build():
    assert not native.available.__wrapped__()


def test_the_library_is_built_and_loaded_in_private(cache, loaded):
    cache.parent.mkdir(0o755)
    with watched(cache.parent) as found:
        build()
        build()
    (library,) = set(loaded)
    assert library.parent == cache / "lpgan_jax" / "native"
    assert [path for path in library.parent.iterdir()] == [library]
    assert mode(library) == 0o600
    assert {mode(directory) for directory in (cache, *library.parents[:2])} == {0o700}
    assert not [line for line in found if "native/kernels" in line], "private when it has its name"


def test_directories_of_before_become_private(cache, loaded):
    (cache / "lpgan_jax" / "native").mkdir(parents=True)
    for directory in (cache, cache / "lpgan_jax", cache / "lpgan_jax" / "native"):
        directory.chmod(0o755)
    build()
    assert len(loaded) == 1
    assert mode(cache / "lpgan_jax" / "native") == 0o700


def writable(bits):
    return lambda path: path.chmod(mode(path) | bits)


def given_away(path):
    os.chown(path, OTHER, -1)


def behind_a_link(spoil):
    """The part is elsewhere, where a link leads to, and the link or the way there is spoilt."""

    def change(path):
        elsewhere = path.parent / "way" / "elsewhere"
        elsewhere.parent.mkdir()
        path.rename(elsewhere)
        path.symlink_to(Path("way") / "elsewhere")
        spoil(path, elsewhere)

    return change


SPOILT = {
    "world": (writable(0o002), "others can write to it"),
    "group": (writable(0o020), "others can write to it"),
    "owner": (given_away, f"belongs to user {OTHER}, expected user 0 or root"),
    "link": (
        behind_a_link(lambda link, _: os.chown(link, OTHER, -1, follow_symlinks=False)),
        f"belongs to user {OTHER}",
    ),
    "target": (behind_a_link(lambda _, target: given_away(target)), f"belongs to user {OTHER}"),
    "way": (behind_a_link(lambda _, target: target.parent.chmod(0o777)), "way: others can write"),
}
PARTS = ["home", "home/cache", "home/cache/lpgan_jax", "home/cache/lpgan_jax/native", "library"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", SPOILT)
def test_what_others_could_have_written_is_not_loaded(how, part, cache, loaded, tmp_path, caplog):
    if how in ("owner", "link", "target") and os.geteuid():
        pytest.skip("only root can give files away")
    spoil, reason = SPOILT[how]
    build()
    library = loaded.pop()
    caplog.clear()
    spoil(library if part == "library" else tmp_path / part)
    build()
    assert not loaded
    assert reason in caplog.text
    assert caplog.text.count("the portable code runs") == 1


def test_where_others_may_only_add_the_cache_is_safe(cache, loaded, caplog):
    """As in /tmp; but not if they may add to the directory itself."""
    cache.mkdir(parents=True)
    cache.chmod(0o1777)
    build()
    assert len(loaded) == 1
    (cache / "lpgan_jax" / "native").chmod(0o1777)
    build()
    assert len(loaded) == 1
    assert "native: others can write to it (mode 1777)" in caplog.text


def test_a_link_of_ones_own_is_followed(cache, loaded, tmp_path):
    cache.parent.mkdir()
    (tmp_path / "disk").mkdir()
    cache.symlink_to("../disk")
    build()
    assert len(loaded) == 1
    assert (tmp_path / "disk" / "lpgan_jax" / "native").is_dir()


@pytest.fixture
def compilation_cache():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_lie_where_only_the_user_can_write(cache, compilation_cache, caplog):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    use_compilation_cache()
    assert compilation_cache() is None
    assert "compiled programs are not kept" in caplog.text
    assert not list(cache.iterdir())
    cache.chmod(0o755)
    use_compilation_cache()
    assert compilation_cache() == str(cache / "lpgan_jax" / "xla")
    assert mode(cache / "lpgan_jax" / "xla") == 0o700


def test_a_directory_that_the_user_gave_jax_stays(cache, compilation_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    use_compilation_cache()
    assert compilation_cache() == str(tmp_path)
    assert not cache.exists()


def test_a_classifier_is_not_taken_from_where_others_write(cache, monkeypatch, caplog):
    trained = []

    def train(num_classes, variables, *_):
        trained.append(num_classes)
        return variables

    monkeypatch.setattr(features, "_train", train)
    images, labels = np.zeros((20, 8, 8, 1), np.float32), np.arange(20) % 2
    for _ in range(2):
        features.classifier(images, labels)
    assert trained == [2], "the second one is the first"
    cache.chmod(0o777)
    features.classifier(images, labels)
    assert trained == [2, 2]
    assert "the classifier is not kept" in caplog.text
    shutil.rmtree(cache / "lpgan_jax")
    features.classifier(images, labels)
    assert not list(cache.iterdir())
