"""Trees of shares on disk: what comes back, what a file holds, and what is refused."""

import json
import os
import stat
from typing import NamedTuple

import flax
import jax
import numpy as np
import optax
import pytest
from flax import serialization

import lpgan_jax as lp
from lpgan_jax.mpc.share_file import CheckpointError


class Moments(NamedTuple):
    count: object
    mu: object


@flax.struct.dataclass
class State:
    params: object
    moments: object


def shared(*shape, frac_bits=18, seed=0):
    words = np.random.default_rng(seed).integers(0, 2**64, (2, *shape), np.uint64)
    return lp.Shared(jax.numpy.asarray(words), frac_bits)


def tree():
    params = {"kernel": shared(3, 2), "layers": [shared(2), (shared(),)]}
    moments = Moments(np.int32(7), {"kernel": shared(3, 2, frac_bits=36, seed=1)})
    return State(params, (optax.EmptyState(), moments, None, 0.5))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_tree_comes_back_in_its_classes(tmp_path):
    before = tree()
    lp.save(tmp_path / "state", before)
    after = lp.load(tmp_path / "state", like=before)
    assert_same(after, before)
    assert isinstance(after.moments[1], Moments)
    assert after.moments[1].mu["kernel"].frac_bits == 36
    values = lp.reveal(before)
    assert_same(lp.load(tmp_path / "state", like=values), before)  # plain values tell the shapes


def test_without_a_like_it_is_made_of_dicts_lists_and_tuples(tmp_path):
    before = tree()
    lp.save(tmp_path, before)
    plain = lp.load(tmp_path)
    first, moments, none, rate = plain["moments"]
    assert (first, none, rate, moments["count"]) == ({}, None, 0.5, 7)
    assert_same(plain["params"], before.params)
    lp.save(tmp_path / "leaf", shared(2))
    assert_same(lp.load(tmp_path / "leaf"), shared(2))


def test_each_file_holds_one_share_for_its_owner_alone(tmp_path):
    before = tree()
    old = os.umask(0)
    try:
        lp.save(tmp_path / "state", before)
    finally:
        os.umask(old)
    own, other = ((tmp_path / "state" / f"{s}.msgpack").read_bytes() for s in ("s1", "s2"))
    words = np.asarray(before.params["kernel"].words)
    for content, mine, theirs in ((own, 0, 1), (other, 1, 0)):
        assert words[mine].tobytes() in content
        assert words[theirs].tobytes() not in content
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / "s1.msgpack").stat().st_mode) == 0o600


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    lp.save(tmp_path / "one", tree())
    lp.save(tmp_path / "two", tree())
    first, second = (tmp_path / name / "s2.msgpack" for name in ("one", "two"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=r"one/s2.msgpack: of another save"):
        lp.load(tmp_path / "one")
    first.write_bytes((tmp_path / "one" / "s1.msgpack").read_bytes())
    with pytest.raises(CheckpointError, match="server 's1', expected 's2'"):
        lp.load(tmp_path / "one")
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="corrupt"):
        lp.load(tmp_path / "one")
    first.unlink()
    with pytest.raises(CheckpointError, match=r"one/s2.msgpack: missing, expected the shares of"):
        lp.load(tmp_path / "one")


def test_a_pipe_and_a_directory_are_no_shares(tmp_path):
    lp.save(tmp_path, {"a": shared(2)})
    for make in (os.mkfifo, os.mkdir):
        (tmp_path / "s2.msgpack").unlink()
        make(tmp_path / "s2.msgpack")
        with pytest.raises(CheckpointError, match=r"s2.msgpack: missing, expected the shares"):
            lp.load(tmp_path)


def tampered(path, change):
    """Rewrite a file's share, with a header that fits it."""
    from lpgan_jax.mpc import share_file

    line, payload = path.read_bytes().split(b"\n", 1)
    share = serialization.msgpack_restore(payload)
    change(share)
    name = json.loads(line)["save"]
    path.write_bytes(share_file.encoded(path.stem, None, name, share))


def nested(depth):
    return {"a": nested(depth - 1)} if depth else np.zeros(2, np.uint64)


def described(share, change):
    inner = serialization.msgpack_restore(share["tree"])
    change(inner)
    share["tree"] = serialization.msgpack_serialize(inner)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["words"].update(a=s["words"]["a"][:1]), r"tree.a: shape \[1\], expected"),
        (lambda s: s["words"].update(a=np.zeros(2)), "tree.a: expected uint64 arrays"),
        (lambda s: s["words"].update(b=np.zeros(2, np.uint64)), "tree: expected uint64"),
        (lambda s: s.pop("tree"), "expected files that"),
        (lambda s: s.update(tree=np.zeros(2)), "expected files that"),
        (lambda s: s.update(words=nested(400)), "expected files that"),
        (lambda s: described(s, lambda t: t["dict"].update(b={"public": 1})), "same public values"),
    ],
)
def test_a_tampered_half_is_refused(tmp_path, change, message):
    lp.save(tmp_path, {"a": shared(2)})
    tampered(tmp_path / "s2.msgpack", change)
    with pytest.raises(CheckpointError, match=message):
        lp.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["dict"]["a"].update(frac_bits=99),
        lambda t: t["dict"]["a"].update(shared="b"),
        lambda t: t.update(dict={"0": {"other": {}}}, more=1),
        lambda t: t["dict"].update(b=t["dict"]["a"]),  # a small file would take any memory
        lambda t: t["dict"].clear(),
    ],
)
def test_a_description_that_save_did_not_write_is_refused(tmp_path, change):
    lp.save(tmp_path, {"a": shared(2)})
    for server in ("s1", "s2"):
        tampered(tmp_path / f"{server}.msgpack", lambda s: described(s, change))
    with pytest.raises(CheckpointError, match="expected a tree that"):
        lp.load(tmp_path)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": shared(3)}, r"a: shared \[2\] with 18 .* expected shared \[3\]"),
        ({"a": shared(2, frac_bits=36)}, "a: .*expected shared .* with 36"),
        ({"a": np.zeros((2, 2))}, r"a: shape \[2\], expected shape \[2, 2\]"),
        ({"a": shared(2), "b": 1}, "b: missing"),
        ({}, "a: there, but not in `like`"),
    ],
)
def test_a_tree_that_is_not_alike_is_refused(tmp_path, like, message):
    lp.save(tmp_path, {"a": shared(2)})
    with pytest.raises(CheckpointError, match=message):
        lp.load(tmp_path, like=like)


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"a\.0: str given"):
        lp.save(tmp_path, {"a": ["text"]})
    with pytest.raises(TypeError, match=r"key: .* given, expected `Shared`"):
        lp.save(tmp_path, {"key": lp.key(0)})
    with pytest.raises(ValueError, match=r"two leaves named 'a\.b'"):
        lp.save(tmp_path, {"a.b": shared(1), "a": {"b": shared(1)}})
    with pytest.raises(TypeError, match=r"w: uint64 given.*into an `lp\.Shared`"):
        lp.save(tmp_path, {"w": shared(3).words})  # both files would have both halves
    with pytest.raises(ValueError, match=r"w: uint64\[3\] given, expected shares"):
        lp.save(tmp_path, {"w": lp.Shared(np.zeros(3, np.uint64), 18)})
