"""Trees of shares, of whole words and of float64: each is put together to what it was."""

import jax
import numpy as np
import pytest
from helpers import same_scale, whole

import lpgan_jax as lp
from lpgan_jax.mpc.share_trees import (
    decoded,
    encoded,
    reveal_tree,
    scaled,
    shapes_of,
    share_tree,
    tree_of_shapes,
    unscaled,
)

VALUES = {"a": np.array([0.5, -1.25]), "b": (2.0, None)}
SCALES = {"a": 2, "b": (0, None)}


def assert_same(tree):
    assert jax.tree.structure(tree) == jax.tree.structure(VALUES)
    jax.tree.map(np.testing.assert_array_equal, tree, VALUES)


def test_words_are_values_at_their_scale():
    words = encoded(VALUES, SCALES)
    assert words["a"].share.view(np.int64).tolist() == [2, -5]
    assert words["b"][0].share.view(np.int64).tolist() == 2
    assert words["b"][1] is None
    assert_same(decoded(words))
    at_four = encoded(VALUES, same_scale(VALUES, 4))
    assert at_four["a"].share.view(np.int64).tolist() == [8, -20]


def test_float64_is_not_rounded():
    third = {"a": np.array([1 / 3])}
    assert unscaled(scaled(third, {"a": 1}))["a"].tolist() == third["a"].tolist()
    assert_same(unscaled(scaled(VALUES, SCALES)))


def test_shares_add_up_and_depend_on_the_key():
    shared = [share_tree(lp.key(seed), VALUES, SCALES) for seed in (1, 2)]
    assert [whole(s["a"].share).tolist() for s in shared] == [[2, -5]] * 2
    assert not np.any(shared[0]["a"].share == shared[1]["a"].share)
    for tree in shared:
        assert_same(reveal_tree(tree))


def test_no_two_leaves_share_their_words():
    values = [np.zeros(50) for _ in range(4)]
    shared = share_tree(lp.key(1), values, same_scale(values, 18))
    words = np.concatenate([np.asarray(s.share[0]) for s in shared])
    assert np.unique(words).size == words.size


def test_shapes_are_those_of_shares():
    shapes = tree_of_shapes(VALUES, SCALES)
    shared = share_tree(lp.key(1), VALUES, SCALES)
    assert shapes == jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), shared)
    assert shapes_of((3,), 18).share == jax.ShapeDtypeStruct((2, 3), np.uint64)


def test_trees_of_nothing():
    assert share_tree(lp.key(1), {}, {}) == reveal_tree({}) == decoded({}) == {}


def test_a_tree_of_other_scales_is_refused():
    with pytest.raises(ValueError, match="pytree structure error"):
        share_tree(lp.key(1), {"a": np.zeros(2)}, {"b": 18})
