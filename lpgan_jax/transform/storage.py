"""Trees of shared arrays on disk: each server's shares in a file of its own.

    PATH/s1.msgpack    S1's shares, and what is public
    PATH/s2.msgpack    S2's shares, and the same

A tree is stored as what it is made of: dicts, lists and tuples, and the fields of any other class
by their names. So no file names a class, and reading one makes none: `load` takes the classes from
a tree like the one that was saved.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from lpgan_jax.common.files import atomic_write, private_directory
from lpgan_jax.mpc import share_file
from lpgan_jax.mpc.share_file import SERVERS, CheckpointError
from lpgan_jax.transform.shared import Shared, is_shared

_FINEST = 62  # fraction bits of a word


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a tree of shares: PATH/s1.msgpack for S1, PATH/s2.msgpack for S2, mode 0600.

    Each file appears whole or not at all, and says nothing of a secret without the other. A tree
    that is there is replaced, one file after the other: if that is cut short, `load` refuses the
    pair. To keep the last one until the next is complete, give each a path of its own.

    Args:
        path: a directory; made if missing, and then or now for its owner alone (0700).
        tree: a pytree of `Shared`, such as a state; other leaves (arrays, numbers) are public, and
            stand in both files.

    Raises:
        TypeError: a leaf is neither shared nor numbers, or uint64, as shares are that are in no
            `Shared`; names it.
        ValueError: shares are not uint64[2, ...], or two leaves have the same name.
        OSError: a file cannot be written.
    """
    names = [_name(keys) for keys, _ in _flat(tree)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two leaves named {name!r}, expected different names")
    words: dict[str, Any] = {}
    described = serialization.msgpack_serialize(_described(tree, "", words))
    name_of_save = share_file.new_name()
    for number, (server, file) in enumerate(zip(SERVERS, _files(path), strict=True)):
        share = {"words": share_file.half(words, number), "tree": described}
        private_directory(file.parent)
        atomic_write(file, share_file.encoded(server, None, name_of_save, share))


def load(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Read a tree of shares that `save` wrote.

    Args:
        path: the directory.
        like: a tree of the same structure, such as the one that was saved, or shapes of it: the
            result has its classes (NamedTuples of optax, states of flax). By default the result is
            made of dicts, lists and tuples, where the fields of other classes are dicts.

    Returns:
        The tree, with leaves `Shared`, arrays and numbers.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt or foreign, the two do not belong
            together, or the tree is not like `like`; names the file, and the leaf.
    """
    files = _files(path)
    first, second = share_file.of_one_save(files, None)
    if not (_is_save(first) and _is_save(second)):
        raise CheckpointError(f"{path}: expected files that `lpgan_jax.save` wrote")
    if first["tree"] != second["tree"]:
        raise CheckpointError(f"{files[1]}: expected the same public values as at the other server")
    words = share_file.paired(first["words"], second["words"], files[1])
    try:
        tree = _restored(serialization.msgpack_restore(first["tree"]), words)
        if words:
            raise ValueError("words")
    except Exception as error:  # msgpack's errors have no common class
        raise CheckpointError(f"{path}: expected a tree that `lpgan_jax.save` wrote") from error
    return tree if like is None else _alike(tree, like, path)


def _is_save(share: Any) -> bool:
    if not isinstance(share, dict) or share.keys() != {"words", "tree"}:
        return False
    words, tree = share["words"], share["tree"]
    flat = isinstance(words, dict) and not any(isinstance(w, dict) for w in words.values())
    return flat and isinstance(tree, bytes)


def _files(path: str | os.PathLike[str]) -> list[Path]:
    return [Path(path) / f"{server}.msgpack" for server in SERVERS]


# From a tree to what it is made of, and back ------------------------------------------------------


def _described(node: Any, name: str, words: dict[str, Any]) -> Any:
    """{kind: content} of a node; the shares go to `words`, by the leaf's name."""
    if is_shared(node):
        words[name] = node.words
        return {"shared": name, "frac_bits": node.frac_bits, "dtype": str(node.dtype)}
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if node is None or [path for path, _ in children] == [()]:
        return {"public": _public(node, name)}
    kind = type(node).__name__ if type(node) in (dict, list, tuple) else "dict"
    content: dict[str, Any] = {}
    for path, child in children:
        key = _name(path)
        content[key] = _described(child, f"{name}.{key}" if name else key, words)
    return {kind: content}


def _public(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    dtype = getattr(value, "dtype", None)
    numbers = dtype is not None and any(jnp.issubdtype(dtype, t) for t in (np.number, np.bool_))
    if not numbers:
        raise TypeError(
            f"{name or 'tree'}: {type(value).__name__} given, expected `Shared`, an array of "
            "numbers or a number"
        )
    if dtype == np.uint64:  # both halves of a secret, perhaps, which would stand in both files
        raise TypeError(
            f"{name or 'tree'}: uint64 given, which is public here: put shares into an `lp.Shared`"
        )
    return np.asarray(value)


def _restored(node: Mapping[str, Any], words: dict[str, Any]) -> Any:
    """The tree of a description, which takes each of the words once."""
    if "shared" in node:
        frac_bits = node["frac_bits"]
        if type(frac_bits) is not int or not 0 <= frac_bits <= _FINEST:
            raise ValueError("frac_bits")
        if node["dtype"] not in ("float32", "int32", "uint32", "bool"):
            raise ValueError("dtype")
        return Shared(jnp.asarray(words.pop(node["shared"])), frac_bits, np.dtype(node["dtype"]))
    ((kind, content),) = node.items()
    if kind == "public":
        return jnp.asarray(content) if isinstance(content, np.ndarray) else content
    children = {key: _restored(child, words) for key, child in content.items()}
    if kind == "dict":
        return children
    ordered = [children[str(i)] for i in range(len(children))]
    return tuple(ordered) if kind == "tuple" else ordered


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _flat(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_shared)[0]


def _alike(tree: Any, like: Any, path: str | os.PathLike[str]) -> Any:
    """The leaves of one tree in the structure of another; they have the same names."""
    have, want = ({_name(keys): x for keys, x in _flat(t)} for t in (tree, like))
    for name in sorted(want.keys() ^ have.keys()):
        rather = "missing, but" if name in want else "there, but not"
        raise CheckpointError(f"{path}: {name}: {rather} in `like`, expected the same leaves")

    def leaf(keys: Any, wanted: Any) -> Any:
        found = have[_name(keys)]
        expected, given = _form(wanted, found), _form(found, wanted)
        if given != expected:
            raise CheckpointError(f"{path}: {_name(keys)}: {given}, expected {expected} as `like`")
        return found

    return jax.tree_util.tree_map_with_path(leaf, like, is_leaf=is_shared)


def _form(leaf: Any, other: Any) -> str:
    """What has to be equal of two leaves: a shape; of two shared ones, the scale too."""
    shape = list(leaf.shape) if hasattr(leaf, "shape") else list(np.shape(leaf))
    if is_shared(leaf) and is_shared(other):
        return f"shared {shape} with {leaf.frac_bits} fraction bits"
    # Plain values tell nothing but a shape: of what is shared too.
    return f"shape {shape}"
