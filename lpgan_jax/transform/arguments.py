"""The arguments of a function: which of their leaves are secret, and what each is called."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lpgan_jax.mpc import prng
from lpgan_jax.transform.shared import is_shared

_MOST_NAMES = 40


@dataclass(frozen=True)
class Leaf:
    """An argument's leaf.

    Attributes:
        name: its path, such as "state['w']".
        shape: of the value.
        dtype: as it is traced: 32 bits, or a key's.
        public: whether all may know it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    public: bool


@dataclass(frozen=True)
class Arguments:
    """What a function is traced for.

    Attributes:
        leaves: of the arguments, in order.
        structure: of their tree, with None for those that are static.
        static: (position, type, value) of the static ones; True, 1 and 1.0 are not the same.
    """

    leaves: tuple[Leaf, ...]
    structure: Any
    static: tuple[tuple[int, type, Any], ...]

    def together(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with these leaves, and the static ones."""
        arguments = list(jax.tree.unflatten(self.structure, leaves))
        for position, _, value in self.static:
            arguments[position] = value
        return tuple(arguments)


class Declaration:
    """What a user says of a function's arguments."""

    def __init__(
        self,
        function: Callable[..., Any],
        public: Sequence[str | int],
        static: Sequence[str | int],
    ) -> None:
        """`public`, `static`: as of `secure`."""
        for name, given in (("public", public), ("static", static)):
            if isinstance(given, str):
                raise TypeError(f"{name}: expected a sequence of names, such as ({given!r},)")
        try:
            self._parameters = list(inspect.signature(function).parameters.values())
        except ValueError:
            self._parameters = []
        self._public, self._static = tuple(public), tuple(static)

    def names(self, count: int) -> list[str]:
        """Of so many arguments."""
        found: list[str] = []
        for parameter in self._parameters:
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                found += [f"{parameter.name}[{i}]" for i in range(count - len(found))]
            else:
                found.append(parameter.name)
        return (found + [f"args[{i}]" for i in range(len(found), count)])[:count]

    def look_at(self, args: Sequence[Any]) -> tuple[list[Any], Arguments]:
        """(the leaves' values, what is known of them) of arguments.

        Raises:
            TypeError: a leaf is no array of real numbers, or a static argument has no hash.
            ValueError: something is declared public or static that is not there.
        """
        names = self.names(len(args))
        static = tuple(
            (i, type(v), self._hashable(names[i], v))
            for i, v in enumerate(args)
            if any(p in (i, names[i]) for p in self._static)
        )
        numbers = {i for i, *_ in static}
        traced = tuple(None if i in numbers else v for i, v in enumerate(args))
        flat, structure = jax.tree_util.tree_flatten_with_path(traced, is_leaf=is_shared)
        found = [
            (names[p[0].idx] + jax.tree_util.keystr(p[1:]), _spelled(names[p[0].idx], p[1:]), p, v)
            for p, v in flat
        ]
        self._check([n for n, *_ in found], {s for _, ways, *_ in found for s in ways}, names)
        leaves = tuple(
            Leaf(
                name,
                _shape(value),
                traced_dtype(name, value),
                self._is_public(ways, path) or _counts_steps(traced, path, value),
            )
            for name, ways, path, value in found
        )
        for leaf in leaves:
            _require_usable(leaf)
        return [v for _, v in flat], Arguments(leaves, structure, static)

    def _is_public(self, ways: Sequence[str], path: Any) -> bool:
        return any(p == path[0].idx or _plainly(p) in ways for p in self._public)

    def _check(self, leaves: list[str], ways: set[str], names: list[str]) -> None:
        known = {"public": ways.union(names), "static": set(names)}
        for what, declared in (("public", self._public), ("static", self._static)):
            for one in declared:
                if isinstance(one, int) and not isinstance(one, bool):
                    there = 0 <= one < len(names)
                else:
                    there = _plainly(one) in known[what]
                if not there:
                    rows = leaves if what == "public" else names
                    some = ", ".join(rows[:_MOST_NAMES]) + ", ..." * (len(rows) > _MOST_NAMES)
                    raise ValueError(f"{what}: there is no {one!r} among the arguments: {some}")

    def _hashable(self, name: str, value: Any) -> Any:
        if isinstance(value, jax.core.Tracer):
            raise TypeError(
                f"{name}: a static argument is being traced: name it in jax.jit's static_argnums"
            )
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"{name}: a static argument must have a hash; {type(value).__name__} has none"
            ) from None
        return value


def _spelled(name: str, path: Any) -> list[str]:
    """What may name a leaf: the paths of all that it is part of, and its own; with .x for ['x']."""
    ways = [name.partition("[")[0], name]
    for key in path:
        by_name = isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str)
        ways.append(f"{ways[-1]}.{key.key}" if by_name else f"{ways[-1]}{key}")
    return ways


def _plainly(path: str | int) -> str:
    return re.sub(r"\[['\"]([^'\"]*)['\"]\]", r".\1", str(path))


def _counts_steps(args: Any, path: Any, value: Any) -> bool:
    """Whether a leaf is the step counter of an optax state; data may have a count too."""
    if str(path[-1]) != ".count" or is_shared(value) or _dtype(value).kind not in "iu":
        return False
    state = args
    for key in path[:-1]:
        if isinstance(key, jax.tree_util.GetAttrKey):
            state = getattr(state, key.name)
        elif isinstance(key, jax.tree_util.DictKey | jax.tree_util.SequenceKey):
            state = state[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]
        else:  # of a class that does not say
            return False
    return type(state).__module__.partition(".")[0] == optax.__name__


def _require_usable(leaf: Leaf) -> None:
    """Raise TypeError for a key that is secret, or one that masks may come from."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return
    if not leaf.public:
        raise TypeError(
            f"{leaf.name}: a key cannot be secret: declare it public (what it generates is then "
            "known to all), or draw the numbers outside and hand them in"
        )
    if leaf.dtype == prng.abstract_key().dtype:
        raise TypeError(
            f"{leaf.name}: a public ChaCha20 key: who knows DS's keys knows the masks, so take one "
            "of another generator, jax.random.key"
        )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape if hasattr(value, "shape") else np.shape(value))


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype


def traced_dtype(name: str, value: Any) -> Any:
    """The type of a value in ordinary code: 32 bits.

    Raises:
        TypeError: it is no real number.
    """
    if is_shared(value):
        return value.dtype
    dtype = _dtype(value)
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return dtype
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float32)
    if jnp.issubdtype(dtype, jnp.bool_):
        return np.dtype(bool)
    if jnp.issubdtype(dtype, jnp.integer):
        return np.dtype(np.uint32 if dtype in (np.uint32, np.uint64) else np.int32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{name}: {dtype} given: hand in the real and the imaginary part")
    raise TypeError(
        f"{name}: {type(value).__name__} given, expected an array of numbers: what is none is a "
        "static argument (static=)"
    )
