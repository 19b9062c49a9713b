"""A static audit of all that the two servers send: for every seed, and whatever the secrets are.

The programs that would be deployed are traced and interpreted: `party.deal` once, `party.online` as
S1 and as S2. Every random word has a number. A value knows, element by element, the word that
*pads* it (it is a bijection of that word when all else is fixed), and which others it depends on.

What is checked, for each server as a sender:

1. every element of a message is padded by a word of its sender's own seed, of the element's width;
2. no word pads two elements, of one message or of several;
3. the words that pad a message do not occur in the rest of it, nor in any message before. A share
   of a dealt value counts as all words of the masks that the dealt value depends on;
4. every element of a correction is padded by a word of S1's seed, which pads nothing else and which
   no correction depends on otherwise;
5. predicates, trip counts and addresses depend on public inputs only; nothing calls back to the
   host; and nothing but exchanges, outside of loops, talks to the other server.

Why that suffices. Fix the secrets and what the receiver holds at the start: its shares, its seed.
By 4, S2's corrections are uniform whatever the masks are; and given them, S1's share of a dealt
value is a function of the masks that the dealt value depends on (S2's share is, given S1's seed),
which is how 3 counts it. By 1 to 3 the last message is then uniform given the corrections and all
messages before it, since nothing of these depends on its pads; likewise the last but one, and so
on. So each server's view is uniform given what it held at the start, whatever the secrets are.

The interpretation errs on the safe side: what it does not know loses its pads. It takes for granted
that ChaCha20's words are random, that every execution has a key of its own, and that what a
function closes over is public.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import NamedSharding, PartitionSpec

from lpgan_jax import party
from lpgan_jax.config import TrainConfig
from lpgan_jax.gan import LPGAN, Batch, State
from lpgan_jax.party import AXIS
from lpgan_jax.prng import CHACHA20
from lpgan_jax.secret import Secret
from lpgan_jax.training import build

Function = Callable[[party.Party, Any, Any], Any]
Program = tuple[Function, Any, Any]  # (function, secrets, public), as `party.simulate` takes them

# What is found -----------------------------------------------------------------------------------


@dataclass
class Opening:
    """One exchange: what each server sends to the other.

    Attributes:
        name: place/.../name in the program.
        shape: of a message.
        dtype: of a message.
        mask: where the words come from that pad the messages.
        problems: why a message may tell its receiver something; empty if it cannot.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    mask: str
    problems: list[str] = field(default_factory=list)

    @property
    def elements(self) -> int:
        """Number of elements that each server sends."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Number of bytes that each server sends."""
        return self.elements * self.dtype.itemsize


@dataclass
class Report:
    """What an audit found.

    Attributes:
        openings: every exchange, in the order of the program.
        problems: everything that is wrong; empty if every view is uniform whatever the secrets.
    """

    openings: list[Opening]
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether the audit found no problem."""
        return not self.problems

    def table(self) -> str:
        """The openings by place, the origins of their masks, totals, and the problems."""
        width = max((len(_split(o.name)[1]) for o in self.openings), default=0)
        lines = []
        for place, openings in itertools.groupby(self.openings, key=lambda o: _split(o.name)[0]):
            group = list(openings)
            lines.append(f"{place or '(top)'}: {_totals(group)}")
            for o in group:
                kind = f"{o.dtype}{list(o.shape)}"
                mark = "!" if o.problems else " "
                lines.append(f" {mark} {_split(o.name)[1]:{width}}  {kind:24}  {o.mask}")
        lines.append(f"in all: {_totals(self.openings)}")
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        if self.ok:
            lines.append("every message is uniform given its receiver's view")
        return "\n".join(lines)


def _split(name: str) -> tuple[str, str]:
    place, _, kind = name.rpartition("/")
    return place, kind


def _totals(openings: list[Opening]) -> str:
    sizes = sum(o.elements for o in openings), sum(o.bytes for o in openings)
    return f"{len(openings)} messages, {sizes[0]:,} elements, {sizes[1]:,} bytes from each server"


# Abstract values ---------------------------------------------------------------------------------

_NO_WORD = 0  # the number of no word, and of a key that everybody knows
_LARGEST_KNOWN = 2**12  # elements of a public value that is computed
Index = slice | np.ndarray


@dataclass(eq=False)
class _Rest:
    """What a value depends on: words, a dealt value (by its number), what others depend on."""

    words: tuple[Index, ...] = ()
    dealt: int | None = None
    parents: tuple[_Rest, ...] = ()


class _Value(NamedTuple):
    """What is known of an array.

    Attributes:
        ids: of an array of words: for each element, the number of the word that pads it, or
            `_NO_WORD`. The claim is void where that word occurs in `rest` too. Of an array of keys:
            the keys' numbers. None: no element has one.
        rest: what all elements together depend on besides; None: only on what is public.
        known: the array itself, where it is public and was computed.
    """

    ids: np.ndarray | None = None
    rest: _Rest | None = None
    known: np.ndarray | None = None

    @property
    def private(self) -> bool:
        return self.ids is not None or self.rest is not None


_PUBLIC = _Value()


def _join(rests: Iterable[_Rest | None], *ids: np.ndarray | None) -> _Rest | None:
    """All of these dependences, and the words of `ids`; None if there is nothing private."""
    parents = tuple(dict.fromkeys(rest for rest in rests if rest is not None))
    arrays = [array for array in ids if array is not None]
    words = tuple(_index(array) for array in arrays if array.any())
    if words or len(parents) > 1:
        return _Rest(words, None, parents)
    return parents[0] if parents else (_Rest() if arrays else None)


def _all(values: Sequence[_Value]) -> _Rest | None:
    """All that some values depend on, their pads too."""
    return _join((value.rest for value in values), *(value.ids for value in values))


def _index(ids: np.ndarray) -> Index:
    """The words as an index into arrays over all words: a slice where they are consecutive."""
    flat = ids.reshape(-1)
    flat = flat[flat != _NO_WORD]
    if len(flat) == 1 or (np.diff(flat) == 1).all():
        return slice(int(flat[0]), int(flat[-1]) + 1)
    return flat


class _Numbering:
    """Numbers for all keys and words, the same in DS's program and the servers'."""

    def __init__(self) -> None:
        self.root = 1  # DS's key
        self._children: dict[tuple[int, Any], int] = {}
        # Of each key: the server whose seed it comes from (None: DS's alone), and its path from it.
        self._names: dict[int, tuple[Any, str]] = {self.root: (None, "")}
        self._draws: dict[tuple[int, int], slice] = {}  # (key, width) -> words
        self.total = 1  # words so far, with `_NO_WORD`

    def child(self, key: int, index: Any) -> int:
        """The number of a key derived from another one. A public key has public children."""
        if key == _NO_WORD:
            return _NO_WORD
        child = self._children.setdefault((key, index), self.root + 1 + len(self._children))
        server, path = self._names[key]
        self._names[child] = (
            (index, "") if key == self.root else (server, f"{path}/{index}".strip("/"))
        )
        return child

    def draw(self, key: int, width: int, size: int) -> np.ndarray:
        """The numbers of the words of `jax.random.bits`.

        Raises:
            ValueError: the same words were drawn in another size.
        """
        if key == _NO_WORD:
            return np.zeros(size, np.int64)
        words = self._draws.setdefault((key, width), slice(self.total, self.total + size))
        if words.stop - words.start != size:
            raise ValueError("one key draws words twice, in two sizes")
        self.total = max(self.total, words.stop)
        return np.arange(words.start, words.stop)

    def origins(self, ids: np.ndarray) -> dict[tuple[Any, str], int]:
        """How many of the words come from which (server, key)."""
        draws = list(self._draws.items())
        starts = [words.start for _, words in draws]
        counts = np.bincount(np.searchsorted(starts, ids[ids != _NO_WORD], side="right"))
        return {self._names[draws[i - 1][0][0]]: n for i, n in enumerate(counts.tolist()) if n}


# Primitives --------------------------------------------------------------------------------------


def _broadcast_in_dim(array: np.ndarray, shape: Any, broadcast_dimensions: Any) -> np.ndarray:
    expanded = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, array.shape, strict=True):
        expanded[axis] = size
    return np.broadcast_to(array.reshape(expanded), shape)


def _slice(array: np.ndarray, start: Any, limit: Any, strides: Any) -> np.ndarray:
    return array[tuple(map(slice, start, limit, strides or [None] * array.ndim))]


def _reshape(array: np.ndarray, sizes: Any, dimensions: Any) -> np.ndarray:
    return (array if dimensions is None else array.transpose(dimensions)).reshape(sizes)


# What moves the elements of one array: primitive -> the same on a NumPy array.
_MOVES: dict[str, Callable[[np.ndarray, dict[str, Any]], np.ndarray]] = {
    "reshape": lambda a, p: _reshape(a, p["new_sizes"], p["dimensions"]),
    "squeeze": lambda a, p: a.squeeze(tuple(p["dimensions"])),
    "transpose": lambda a, p: a.transpose(p["permutation"]),
    "rev": lambda a, p: np.flip(a, p["dimensions"]),
    "slice": lambda a, p: _slice(a, p["start_indices"], p["limit_indices"], p["strides"]),
    "broadcast_in_dim": lambda a, p: _broadcast_in_dim(a, p["shape"], p["broadcast_dimensions"]),
    "copy": lambda a, p: a,
    "copy_p": lambda a, p: a,
    "random_clone": lambda a, p: a,
}
# What joins several.
_JOINS: dict[str, Callable[[list[np.ndarray], dict[str, Any]], np.ndarray]] = {
    "concatenate": lambda arrays, p: np.concatenate(arrays, p["dimension"]),
    "stack": lambda arrays, p: np.stack(arrays, p["axis"]),
}
# Bijective in each operand on whole words.
_BIJECTIVE = {"add", "sub", "xor", "neg", "not"}
# What is computed where all operands are known.
_COMPUTED: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.invert,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
}
# Operands that decide which memory is touched, or how often.
_STEERING = {
    "cond": slice(1),
    "dynamic_slice": slice(1, None),
    "dynamic_update_slice": slice(2, None),
    "gather": slice(1, 2),
    "scatter": slice(1, 2),
    "sort": slice(None),
}
_KEY_PRIMITIVES = {"random_bits", "random_split", "random_fold_in"}
_INLINED = {
    "jit",
    "closed_call",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vmap_call",
}
_HOST = re.compile("callback|debug_print|infeed|outfeed")


def _bodies(params: dict[str, Any]) -> list[tuple[Jaxpr, Sequence[Any]]]:
    """The programs that an equation holds, each with its constants."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append((item.jaxpr, item.consts))
            elif isinstance(item, Jaxpr):
                found.append((item, ()))
    return found


def _call_name(equation: Any) -> str:
    return equation.params.get("name", "") if equation.primitive.name == "jit" else ""


def _is_key(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jax.dtypes.prng_key)


def _whole_words(*atoms: Any) -> bool:
    """Whether all are integers of one width."""
    if any(_is_key(atom) for atom in atoms):
        return False
    dtypes = [np.dtype(atom.aval.dtype) for atom in atoms]
    return all(d.kind in "iu" and d.itemsize == dtypes[0].itemsize for d in dtypes)


def _names_axis(params: dict[str, Any]) -> bool:
    """Whether an equation talks over the axis of the servers."""
    names = [value if isinstance(value, tuple) else (value,) for value in params.values()]
    return any(isinstance(name, str) and name == AXIS for name in itertools.chain(*names))


def _has_host_effects(equation: Any) -> bool:
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in equation.effects)


def _is_plain_exchange(body: Jaxpr) -> bool:
    """Whether a program does nothing but swap its only operand with the other server's."""
    if len(body.eqns) != 1 or body.eqns[0].primitive.name != "ppermute":
        return False
    swap = body.eqns[0]
    return (
        list(swap.invars) == list(body.invars)
        and list(swap.outvars) == list(body.outvars)
        and sorted(swap.params["perm"]) == [(0, 1), (1, 0)]
        and tuple(swap.params["axis_name"]) == (AXIS,)
    )


# Interpretation ----------------------------------------------------------------------------------


class _Interpreter:
    """Runs a traced program on abstract values and writes down what is wrong."""

    def __init__(self, numbering: _Numbering) -> None:
        self.problems: dict[str, None] = {}  # in order, each once
        self._numbering = numbering
        self._depth = 0  # of loops and branches that are not inlined
        # Words that can pad nothing (any more). A sum of two padded values keeps one pad.
        self.spent = np.ones(1, bool)

    def problem(self, text: str) -> None:
        """Write down what is wrong, once."""
        self.problems[f"{self.where()}: {text}"] = None

    def where(self) -> str:
        """Where in the program we are."""
        raise NotImplementedError

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], operands: Sequence[_Value]) -> list[_Value]:
        """The abstract values of a program's results."""
        environment: dict[Any, _Value] = {}

        def read(atom: Any) -> _Value:
            return _constant(atom.val) if isinstance(atom, Literal) else environment[atom]

        inputs = [*map(_constant, consts), *operands]
        environment.update(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))
        last_uses = _last_uses(jaxpr)
        for equation, dead in zip(jaxpr.eqns, last_uses, strict=True):
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            environment.update(zip(equation.outvars, results, strict=True))
            for atom in dead:
                environment.pop(atom, None)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[_Value]) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        if _call_name(equation).startswith("exchange:"):
            return [self._exchange(equation, operands)]
        if name in _INLINED:
            return self.run(*_bodies(params)[0], operands)
        if name == "cond" and operands[0].known is not None:
            branch = int(np.clip(operands[0].known, 0, len(params["branches"]) - 1))
            return self.run(*_bodies(params)[branch], operands[1:])
        if name == "optimization_barrier":
            return operands
        self._check_sides(equation, operands)
        if name == "scan":
            return self._scan(equation, operands)
        if name == "while":
            return self._while(params, operands)
        if len(equation.outvars) == 1:
            result = self._known(equation, operands) or self._single(equation, operands)
            if result is not None:
                return [result]
        unknown = _Value(rest=_all(operands))
        for body in _bodies(params):  # of a branch, or what a reduction or a scatter applies
            inputs = operands[1:] if name == "cond" else [unknown] * len(body[0].invars)
            self._opaque(*body, inputs)
        return [unknown] * len(equation.outvars)

    def _check_sides(self, equation: Any, operands: list[_Value]) -> None:
        """What an equation does besides its results."""
        name = equation.primitive.name
        if _HOST.search(name) or _has_host_effects(equation):
            self.problem(f"{name} reaches out to the host")
        if name != "axis_index" and _names_axis(equation.params):
            self.problem(f"{name} talks to the other server outside of an exchange")
        if name not in _KEY_PRIMITIVES and name not in _MOVES and name not in _JOINS:
            keys = zip(equation.invars, operands, strict=True)
            if any(_is_key(atom) and value.ids is not None for atom, value in keys):
                self.problem(f"a key enters {name}, where the audit cannot follow its words")
        steering = _STEERING.get("scatter" if name.startswith("scatter") else name, slice(0))
        if any(value.private for value in operands[steering]):
            self.steered(f"{name} is steered by a private value")

    def steered(self, text: str) -> None:
        """Control flow or an address depends on a private value."""
        self.problem(text)

    def _known(self, equation: Any, operands: list[_Value]) -> _Value | None:
        """The result itself, where it is public, small, and easily computed."""
        name, params = equation.primitive.name, equation.params
        shape = equation.outvars[0].aval.shape
        if name == "axis_index":
            return self.axis_index()
        if math.prod(shape) > _LARGEST_KNOWN:
            return None
        if name == "iota":
            line = np.arange(shape[params["dimension"]], dtype=params["dtype"])
            return _Value(known=_broadcast_in_dim(line, shape, (params["dimension"],)))
        arrays = [value.known for value in operands]
        if not arrays or any(array is None for array in arrays):
            return None
        known = [array for array in arrays if array is not None]
        with np.errstate(over="ignore"):
            if name in _COMPUTED:
                return _Value(known=_COMPUTED[name](*known))
            if name in _MOVES:
                return _Value(known=_MOVES[name](known[0], params))
            if name == "convert_element_type":
                return _Value(known=known[0].astype(params["new_dtype"]))
        return None

    def axis_index(self) -> _Value:
        """Which server we are."""
        return _PUBLIC

    def _single(self, equation: Any, operands: list[_Value]) -> _Value | None:
        """The result of a primitive that may keep pads (or numbers of keys)."""
        name, params = equation.primitive.name, equation.params
        if name in _KEY_PRIMITIVES:
            return self._keys(name, params, equation.outvars[0].aval.shape, operands)
        if name == "select_n":
            return self._select(operands)
        if name in _BIJECTIVE and _whole_words(*equation.invars, *equation.outvars):
            if len(operands) == 1:
                return operands[0]._replace(known=None)
            return self._combine(equation.outvars[0].aval.shape, *operands)
        if all(value.ids is None for value in operands):
            return None
        first = operands[0]
        if name in _MOVES:
            assert first.ids is not None
            return _Value(_MOVES[name](first.ids, params), first.rest)
        if name in _JOINS:
            shapes = [atom.aval.shape for atom in equation.invars]
            ids = [
                np.zeros(shape, np.int64) if value.ids is None else value.ids
                for value, shape in zip(operands, shapes, strict=True)
            ]
            rest = _join(value.rest for value in operands)
            return _Value(_JOINS[name](ids, params), rest)
        same_width = _whole_words(equation.invars[0], equation.outvars[0])
        if name in ("convert_element_type", "bitcast_convert_type") and same_width:
            return first._replace(known=None)
        if name == "pad" and first.ids is not None and operands[1].ids is None:
            config = params["padding_config"]
            if all(low >= 0 and high >= 0 and not interior for low, high, interior in config):
                padded = np.pad(first.ids, [(int(low), int(high)) for low, high, _ in config])
                return _Value(padded, _join([first.rest, operands[1].rest]))
        return None

    def _keys(
        self, name: str, params: dict[str, Any], shape: tuple[int, ...], operands: list[_Value]
    ) -> _Value:
        keys = operands[0]
        rest = _join(value.rest for value in operands)
        if keys.ids is None:  # a key that is public, or of unknown origin
            return _Value(rest=rest)
        numbers = keys.ids.reshape(-1).tolist()
        if name == "random_bits":
            size = math.prod(params["shape"])
            try:
                words = [self._numbering.draw(k, params["bit_width"], size) for k in numbers]
            except ValueError as error:
                self.problem(str(error))
                return _Value(rest=_Rest())
            self.cover()
            joined = words[0] if len(words) == 1 else np.concatenate(words)
            return _Value(joined.reshape(shape), rest)
        if name == "random_split":
            count = math.prod(params["shape"])
            children = [self._numbering.child(k, i) for k in numbers for i in range(count)]
            return _Value(np.asarray(children).reshape(shape), rest)
        data = operands[1].known
        if data is None or data.ndim:
            self.problem("random_fold_in of a value that the audit does not know")
            return _Value(rest=_Rest())
        children = [self._numbering.child(k, ("fold_in", int(data))) for k in numbers]
        return _Value(np.asarray(children).reshape(shape), rest)

    def cover(self) -> None:
        """Make room for new words."""
        self.spent = _grown(self.spent, self._numbering.total)

    def _select(self, operands: list[_Value]) -> _Value | None:
        which, *cases = operands
        if which.known is None:
            return None
        chosen = np.unique(which.known.astype(int))
        if len(chosen) == 1:
            return cases[chosen[0]]
        if all(case.ids is None for case in cases):
            return None
        shape = which.known.shape
        ids = [np.zeros(shape, np.int64) if case.ids is None else case.ids for case in cases]
        rest = _join(case.rest for case in cases)
        return _Value(np.choose(which.known.astype(int), ids), rest)

    def _combine(self, shape: tuple[int, ...], x: _Value, y: _Value) -> _Value:
        """x + y, x - y or x ^ y: padded by one word of either, and depending on the other."""
        rests = [x.rest, y.rest]
        if x.ids is None or y.ids is None:
            ids = y.ids if x.ids is None else x.ids
            return _Value(None if ids is None else np.broadcast_to(ids, shape), _join(rests))
        # Either would do. Masks are written on the right, as in x - mask.
        left, right = np.broadcast_to(x.ids, shape), np.broadcast_to(y.ids, shape)
        spent = self.spent[right]
        other = np.where(spent, right, left)
        return _Value(np.where(spent, left, right), _join(rests, other))

    # Loops -------------------------------------------------------------------------------------

    def _opaque(
        self, body: Jaxpr, consts: Sequence[Any], operands: Sequence[_Value]
    ) -> list[_Value]:
        """Run what is executed an unknown number of times: no pads enter."""
        self._depth += 1
        try:
            return self.run(body, consts, [_Value(rest=_all([v])) for v in operands])
        finally:
            self._depth -= 1

    def _loop(
        self, body: tuple[Jaxpr, Sequence[Any]], operands: list[_Value], first: int, count: int
    ) -> list[_Value]:
        """Results of a body whose operands first, ..., first + count - 1 come from its results.

        What is private stays so; every private result depends on all operands.
        """
        everything = _Value(rest=_all(operands) or _Rest())
        operands, carried = list(operands), range(first, first + count)
        while True:
            results = self._opaque(*body, operands)
            private = [result.private for result in results]
            for i, operand in enumerate(carried):
                private[i] |= operands[operand].private
            changed = [o for i, o in enumerate(carried) if private[i] > operands[o].private]
            if not changed:
                return [everything if p else _PUBLIC for p in private]
            for operand in changed:
                operands[operand] = everything

    def _scan(self, equation: Any, operands: list[_Value]) -> list[_Value]:
        (body,) = _bodies(equation.params)
        # Constants, what is carried, what is sliced; only the last has another rank inside.
        inner: Any = body[0]
        inputs = zip(equation.invars, inner.invars, strict=True)
        results = zip(equation.outvars, inner.outvars, strict=True)
        sliced = sum(a.aval.ndim != b.aval.ndim for a, b in inputs)
        carried = sum(a.aval.ndim == b.aval.ndim for a, b in results)
        return self._loop(body, operands, len(operands) - sliced - carried, carried)

    def _while(self, params: dict[str, Any], operands: list[_Value]) -> list[_Value]:
        (body,), (predicate,) = (_bodies({"": params[f"{n}_jaxpr"]}) for n in ("body", "cond"))
        for_predicate = params["cond_nconsts"]
        consts = operands[for_predicate : for_predicate + params["body_nconsts"]]
        carry = operands[for_predicate + len(consts) :]
        carried = self._loop(body, [*consts, *carry], len(consts), len(carry))
        (again,) = self._opaque(*predicate, [*operands[:for_predicate], *carried])
        if again.private:
            self.steered("the trip count of a while loop depends on a private value")
        return carried

    def _exchange(self, equation: Any, operands: list[_Value]) -> _Value:
        raise NotImplementedError


def _constant(value: Any) -> _Value:
    """A constant of a program: public, whatever it is."""
    is_key = jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended)
    small = math.prod(np.shape(value)) <= _LARGEST_KNOWN
    return _Value(known=np.asarray(value)) if small and not is_key else _PUBLIC


def _last_uses(jaxpr: Jaxpr) -> list[list[Any]]:
    """For each equation, what nobody reads after it."""
    seen = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    uses: list[list[Any]] = []
    for equation in reversed(jaxpr.eqns):
        names = {a for a in (*equation.invars, *equation.outvars) if not isinstance(a, Literal)}
        uses.append(list(names - seen))
        seen |= names
    return uses[::-1]


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([array, np.zeros(max(0, size - len(array)), array.dtype)])


def _closure(start: _Rest | None, seen: set[_Rest]) -> list[_Rest]:
    """All that `start` depends on and that is not in `seen`, which it joins."""
    found, stack = [], [start] if start is not None else []
    while stack:
        rest = stack.pop()
        if rest not in seen:
            seen.add(rest)
            found.append(rest)
            stack += rest.parents
    return found


class _Dealer(_Interpreter):
    """DS's program.

    Attributes:
        owner: for each word, the number of the correction that it pads (from 1), or 0.
        masks: for each correction, the words that it depends on besides.
    """

    def __init__(self, numbering: _Numbering) -> None:
        super().__init__(numbering)
        self.owner = np.zeros(1, np.int32)
        self.masks: list[list[Index]] = []
        self._opened = _Rest()

    def where(self) -> str:
        return "DS"

    def steered(self, text: str) -> None:
        """DS knows the masks: what its program does with them is seen by nobody."""

    def deal(self, program: ClosedJaxpr, operands: Sequence[_Value]) -> None:
        """Interpret the program and check its corrections."""
        corrections = self.run(program.jaxpr, program.consts, operands)
        self.owner = _grown(self.owner, self._numbering.total)
        places = {
            id(atom): _call_name(equation).removeprefix("deal:").strip("/")
            for equation in program.jaxpr.eqns
            for atom in equation.outvars
        }
        names = [
            f"correction {number} ({places.get(id(atom)) or 'top'})"
            for number, atom in enumerate(program.jaxpr.outvars, 1)
        ]
        used = np.zeros(self._numbering.total, bool)
        for number, (name, value) in enumerate(zip(names, corrections, strict=True), 1):
            depends = _closure(value.rest, set())
            self.masks.append([words for rest in depends for words in rest.words])
            if self._opened in depends:
                self.problem(f"{name} depends on what the servers open")
            for words in self.masks[-1]:
                used[words] = True
            pads = np.zeros(1, np.int64) if value.ids is None else value.ids.reshape(-1)
            servers = {server for server, _ in self._numbering.origins(pads)}
            if (pads == _NO_WORD).any() or servers != {0}:
                self.problem(f"{name} is not padded by words of S1's seed")
            elif self.owner[pads].any() or len(np.unique(pads)) < len(pads):
                self.problem(f"{name}: a word pads it and another element of a correction")
            self.owner[pads[pads != _NO_WORD]] = number
        for number in np.unique(self.owner[used]).tolist():
            if number:
                self.problem(f"{names[number - 1]}: a word that pads it is used otherwise")

    def _exchange(self, equation: Any, operands: list[_Value]) -> _Value:
        return _Value(rest=self._opened)


class _Server(_Interpreter):
    """The program of S1 (server 0) or S2 (server 1), its messages checked in order."""

    def __init__(self, numbering: _Numbering, dealer: _Dealer, server: int) -> None:
        super().__init__(numbering)
        self.openings: list[Opening] = []
        self._server = server
        self._masks = dealer.masks
        self._owner = dealer.owner
        # A word that pads a correction is no pad for a message: S2 knows what was subtracted.
        self.spent = self._owner > 0
        self.spent[_NO_WORD] = True
        self._seen: set[_Rest] = set()
        self._seen_dealt: set[int] = set()

    def where(self) -> str:
        after = f" after {self.openings[-1].name}" if self.openings else ""
        return f"S{self._server + 1}{after}"

    def axis_index(self) -> _Value:
        return _Value(known=np.asarray(self._server, np.int32))

    def cover(self) -> None:
        super().cover()
        self._owner = _grown(self._owner, self._numbering.total)

    def _exchange(self, equation: Any, operands: list[_Value]) -> _Value:
        name = _call_name(equation).removeprefix("exchange:")
        (body,) = _bodies(equation.params)
        aval = equation.invars[0].aval if equation.invars else None
        if aval is None or not _is_plain_exchange(body[0]):
            self.problem(f"{name} is no plain exchange between the two servers")
            return _Value(rest=_Rest())
        if self._depth:
            self.problem(f"{name} is sent in a loop or a branch, with the same masks every time")
            return _Value(rest=_Rest())
        (message,) = operands
        ids = np.zeros(aval.shape, np.int64) if message.ids is None else message.ids
        problems = self._check(np.broadcast_to(ids, aval.shape).reshape(-1), message.rest)
        receiver = f"S{self._server + 1} -> S{2 - self._server}"
        self.openings.append(
            Opening(
                name,
                tuple(aval.shape),
                np.dtype(aval.dtype),
                _origin(self._numbering.origins(ids)),
                [f"{receiver} {name}: {problem}" for problem in problems],
            )
        )
        return _Value(rest=_Rest())

    def _check(self, pads: np.ndarray, rest: _Rest | None) -> list[str]:
        """Criteria 1 to 3 for one message; then its words are spent."""
        if not pads.size:
            return []
        problems = []
        bare, dealt = pads == _NO_WORD, self._owner[pads] > 0
        reused = self.spent[pads] & ~bare & ~dealt
        self._spend(rest)
        inside = self.spent[pads] & ~reused & ~bare & ~dealt
        self.spent[pads] = True
        real = pads[~bare]
        repeated = len(real) - len(np.unique(real))
        for count, text in (
            (bare.sum(), "are not masked by a word of the sender's own"),
            (dealt.sum(), "are masked by nothing but a share of a dealt value"),
            (reused.sum(), "have a mask that an earlier message depends on"),
            (inside.sum(), "have a mask that the message depends on otherwise"),
            (repeated, "repeat the mask of another element"),
        ):
            if count:
                problems.append(f"{count:,} of {pads.size:,} elements {text}")
        return problems

    def _spend(self, start: _Rest | None) -> None:
        """All that `start` depends on can mask nothing from here on."""
        for rest in _closure(start, self._seen):
            dealt = set() if rest.dealt is None else {rest.dealt}
            for words in rest.words:
                self.spent[words] = True
                dealt.update(np.unique(self._owner[words]).tolist())
            for number in dealt - self._seen_dealt - {0}:
                self._seen_dealt.add(number)
                for words in self._masks[number - 1]:
                    self.spent[words] = True


def _origin(origins: dict[tuple[Any, str], int]) -> str:
    """How many words come from which key of a server's seed."""
    return ", ".join(f"{n:,} words of key {path}" for (_, path), n in origins.items()) or "none"


# Entry points ------------------------------------------------------------------------------------


def audit(function: Function, secrets: Any, public: Any = None) -> Report:
    """Check every message that the two servers send, and DS's corrections. Runs nothing.

    Args:
        function: (party, secrets, public) -> outputs, as in `party.simulate`.
        secrets: a pytree of paired arrays (leading axis 2) or of their `jax.ShapeDtypeStruct`s.
        public: what both servers know.

    Returns:
        The messages, and what is wrong with them or elsewhere.
    """
    key, _ = _key_shapes()
    numbering = _Numbering()
    dealer = _Dealer(numbering)
    dealing = jax.make_jaxpr(functools.partial(party.deal, function))(key, secrets, public)
    corrections = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in dealing.out_avals]
    ds_key = _Value(ids=np.asarray(numbering.root))
    inputs = len(dealing.in_avals) - 1
    dealer.deal(dealing, [ds_key, *[_PUBLIC] * inputs])

    mine = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), secrets)
    online = jax.make_jaxpr(functools.partial(party.online, function), axis_env=[(AXIS, 2)])(
        key, corrections, mine, public
    )
    servers = [_Server(numbering, dealer, server) for server in range(2)]
    for number, server in enumerate(servers):
        # S1 gets no corrections, but zeros.
        received = [
            _Value(rest=_Rest(dealt=c)) if number else _PUBLIC for c, _ in enumerate(corrections, 1)
        ]
        shares = [_Value(rest=_Rest()) for _ in jax.tree.leaves(mine)]
        known = [_PUBLIC for _ in jax.tree.leaves(public)]
        seed = _Value(ids=np.asarray(numbering.child(numbering.root, number)))
        server.run(online.jaxpr, online.consts, [seed, *received, *shares, *known])
    return _merge(dealer, *servers)


def _merge(dealer: _Dealer, first: _Server, second: _Server) -> Report:
    problems = [*dealer.problems, *first.problems, *second.problems]
    openings = []
    if [o.name for o in first.openings] != [o.name for o in second.openings]:
        problems.append("the two servers do not send the same messages")
    for mine, other in zip(first.openings, second.openings, strict=False):
        mask = mine.mask if mine.mask == other.mask else f"S1: {mine.mask}; S2: {other.mask}"
        found = [*mine.problems, *other.problems]
        openings.append(dataclasses.replace(mine, mask=mask, problems=found))
        problems += found
    return Report(openings, problems)


def audit_compiled(function: Function, secrets: Any, public: Any = None) -> list[str]:
    """Check that the compiled program sends the traced messages and nothing else. Runs nothing.

    Args:
        function: as in `audit`.
        secrets: as in `audit`.
        public: as in `audit`.

    Returns:
        What is wrong: see `check_compiled`.

    Raises:
        ValueError: there are fewer than two devices.
    """
    if len(jax.devices()) < 2:
        raise ValueError(
            "two devices are needed, one for each server: on a CPU, set jax_num_cpu_devices=2"
        )
    mesh = jax.make_mesh((2,), (AXIS,), devices=jax.devices()[:2])
    sharded, replicated = PartitionSpec(AXIS), PartitionSpec()
    messages: list[tuple[str, tuple[int, ...], np.dtype]] = []

    def noted(seat: party.Party, secrets: Any, public: Any) -> Any:
        outputs = function(seat, secrets, public)
        messages[:] = [(m.name, m.words.shape, m.words.dtype) for m in seat.messages]
        return outputs

    def server(seed: jax.Array, corrections: Any, secrets: Any, public: Any) -> Any:
        seed, corrections, secrets = jax.tree.map(lambda x: x[0], (seed, corrections, secrets))
        outputs = party.online(noted, seed, corrections, secrets, public)
        return jax.tree.map(lambda x: x[None], outputs)

    key, seeds = _key_shapes()
    dealt = jax.eval_shape(functools.partial(party.deal, function), key, secrets, public)
    paired = [jax.ShapeDtypeStruct((2, *c.shape), c.dtype) for c in dealt]
    place = NamedSharding(mesh, sharded)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (seeds, paired, secrets)
    )
    specs = (sharded, sharded, sharded, replicated)
    program = jax.shard_map(server, mesh=mesh, in_specs=specs, out_specs=sharded)
    text = jax.jit(program).lower(*placed, public).compile().as_text()
    return check_compiled(text or "", messages)


_INSTRUCTION = re.compile(r"= (?P<type>.*?) ?(?P<name>[a-z][\w-]*)\(")
_COLLECTIVE = re.compile("(all-|reduce-scatter|collective-|ragged-|send|recv|infeed|outfeed)")
_KINDS = {"u": "uint", "s": "int", "f": "float", "pred": "bool"}


def check_compiled(
    text: str, messages: Iterable[tuple[str, tuple[int, ...], np.dtype]]
) -> list[str]:
    """Match what a compiled program sends with the messages of the traced one.

    Args:
        text: optimised HLO.
        messages: (name, shape, dtype) of each.

    Returns:
        Problems: a collective that is no point-to-point exchange between the two servers, or that
        belongs to no message (by its name, shape and dtype), or is there more often than its
        message; a transfer to the host. Messages that nobody reads may be missing.
    """
    left = Counter((name, tuple(shape), np.dtype(dtype)) for name, shape, dtype in messages)
    problems = []
    for line in map(str.strip, text.splitlines()):
        instruction = _INSTRUCTION.search(line)
        name = instruction["name"] if instruction else ""
        if name == "custom-call" and re.search('custom_call_target="[^"]*callback', line):
            problems.append(f"a call of the host: {line[:200]}")
        if instruction is None or not _COLLECTIVE.match(name) or name.endswith("-done"):
            continue
        marker = re.search(r'op_name="[^"]*exchange:([^")]*)\)', line)
        kind = re.search(r"([a-z]+)(\d*)\[([\d,]*)\]", instruction["type"])
        swaps = name.startswith("collective-permute") and "_pairs={{0,1},{1,0}}" in line
        if not swaps or marker is None or kind is None:
            problems.append(f"{name} is no exchange of the protocol: {line[:200]}")
            continue
        shape = tuple(int(size) for size in kind[3].split(",") if size)
        message = marker[1], shape, np.dtype(_KINDS.get(kind[1], kind[1]) + kind[2])
        if not left[message]:
            problems.append(f"{name} sends {marker[1]} in another form or too often: {line[:200]}")
        left[message] -= 1
    return problems


def _key_shapes() -> tuple[Any, Any]:
    """The shapes of DS's key and of the servers' seeds."""
    key = jax.eval_shape(lambda: jax.random.key(0, impl=CHACHA20))
    return key, jax.eval_shape(party.server_seeds, key)


# The programs of a configuration -----------------------------------------------------------------


def training_program(settings: TrainConfig) -> Program:
    """What the servers run in a training step: (function, secrets, public) for `audit`.

    Only shapes are made.
    """
    gan = build(settings)
    noise = np.empty((settings.batch_size, settings.model.noise_size))
    images = np.empty((settings.batch_size, *gan.model.image_shape))
    batch = Batch(*(_shared(values, settings.frac_bits) for values in (images, noise, noise)))
    return gan.train_step, (_state(gan), batch), gan.schedule(0)


def sampling_program(settings: TrainConfig, num: int | None = None) -> Program:
    """What the servers run to generate `num` images: (function, secrets, public) for `audit`."""
    gan = build(settings)
    noise = np.empty((num or settings.num_samples, settings.model.noise_size))
    return gan.generate, (_state(gan), _shared(noise, settings.frac_bits)), None


def _state(gan: LPGAN) -> State:
    state = gan.init(np.random.default_rng(0))
    return jax.tree.map(_shared, state, gan.scales(state))


def _shared(values: np.ndarray, frac_bits: int) -> Secret:
    """The shapes of a shared array."""
    pair: Any = jax.ShapeDtypeStruct((2, *np.shape(values)), np.uint64)
    return Secret(pair, frac_bits)
