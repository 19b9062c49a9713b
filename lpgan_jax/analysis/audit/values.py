"""Abstract values: which numbered word pads an element of an array, and on which it depends.

A word has one number in DS's program and in those of the servers (`Numbering`). What a value
depends on is a graph (`Rest`), so that no operation has to copy sets of words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

NO_WORD = 0  # the number of no word, and of a key that everybody knows
INPUT = 0  # the number of all shares that a program is given


@dataclass(frozen=True)
class WordSet:
    """A set of words, packed: it lives as long as anything that depends on them.

    Attributes:
        start: the first.
        stop: after the last.
        held: which of those between are in the set, a bit each; None for all.
    """

    start: int
    stop: int
    held: np.ndarray | None = None

    @classmethod
    def of(cls, ids: np.ndarray) -> WordSet:
        """The words of an array in which there is at least one."""
        flat = ids.reshape(-1)
        start, stop = int(flat.min()), int(flat.max()) + 1
        if start == NO_WORD:
            flat = flat[flat != NO_WORD]
            start = int(flat.min())
        held = np.zeros(stop - start, bool)
        held[flat - start] = True
        return cls(start, stop, None if held.all() else np.packbits(held))

    @property
    def index(self) -> slice | np.ndarray:
        """An index into arrays over all words."""
        if self.held is None:
            return slice(self.start, self.stop)
        return self.start + np.flatnonzero(np.unpackbits(self.held, count=self.stop - self.start))


@dataclass(eq=False)
class Rest:
    """What a value depends on: words, a dealt value, a message (by their numbers), others."""

    words: tuple[WordSet, ...] = ()
    dealt: int | None = None
    message: int | None = None
    parents: tuple[Rest, ...] = ()


class Sum(NamedTuple):
    """That every element of a value is a sum of fresh shares, the same sum at both servers.

    Whoever has both halves of such values learns the same sums of what was shared, and no more.

    Attributes:
        terms: numbers of these shares.
        bits: whether the sum is over bits (xor), or modulo a power of two; None: there is none yet.
    """

    terms: frozenset[int]
    bits: bool | None = None


class Value(NamedTuple):
    """What is known of an array.

    Attributes:
        ids: of an array of words: for each element, the number of the word that pads it, or
            `NO_WORD`. The claim is void where that word occurs in `rest` too. Of an array of keys:
            the keys' numbers. None: no element has one.
        rest: what all elements together depend on besides; None: only on what is public.
        known: the array itself, where it is public and was computed.
        sum: what its elements are sums of, with public coefficients; None: not known.
        holders: in a program of both servers, for each element who could compute it (see
            `holders`); None: everybody.
        rows: of what a scan stacks or takes apart, each iteration's, which depends on less than all
            of them together; None: not known.
    """

    ids: np.ndarray | None = None
    rest: Rest | None = None
    known: np.ndarray | None = None
    sum: Sum | None = None
    holders: np.ndarray | None = None
    rows: tuple[Value, ...] | None = None

    @property
    def private(self) -> bool:
        """Whether it depends on more than what is public."""
        return self.ids is not None or self.rest is not None

    def row(self, index: int) -> Value:
        """What an iteration of a scan gets of it."""
        if self.rows is not None:
            return self.rows[index]

        def at(array: np.ndarray | None) -> Any:
            return None if array is None else array[index]

        return self._replace(ids=at(self.ids), known=at(self.known), holders=at(self.holders))


PUBLIC = Value()


def sum_of(values: Sequence[Value], bits: bool | None = None) -> Sum | None:
    """What a sum (over `bits` or not, if it is known) of values is a sum of, if they all are sums.

    What is public does not count. None also if all are public, or some are sums of the other kind.
    """
    private = [value for value in values if value.private]
    sums = [value.sum for value in private if value.sum is not None]
    kinds = {bits, *(of.bits for of in sums)} - {None}
    if not private or len(sums) < len(private) or len(kinds) > 1:
        return None
    return Sum(frozenset().union(*(of.terms for of in sums)), *kinds)


def stacked(rows: Sequence[Value], shape: tuple[int, ...]) -> Value:
    """What a scan makes of its iterations' results; `shape`: of one of them."""

    def stack(name: str, absent: Any) -> Any:
        arrays = [getattr(row, name) for row in rows]
        if all(array is None for array in arrays):
            return None
        return np.stack([np.broadcast_to(absent if a is None else a, shape) for a in arrays])

    known = [row.known for row in rows if row.known is not None]
    return Value(
        stack("ids", np.int32(NO_WORD)),
        join(row.rest for row in rows),
        np.stack(known) if known and len(known) == len(rows) else None,
        sum_of(rows),
        stack("holders", np.uint8(0)),
        tuple(rows),
    )


def given(dtype: Any) -> Value:
    """A server's share that the program is given: of bits, if it is narrower than the ring."""
    return Value(rest=Rest(), sum=Sum(frozenset([INPUT]), np.dtype(dtype).itemsize < 8))


def join(rests: Iterable[Rest | None], *ids: np.ndarray | None) -> Rest | None:
    """All of these dependences, and the words of `ids`; None if there is nothing private."""
    parents = tuple(dict.fromkeys(rest for rest in rests if rest is not None))
    arrays = [array for array in ids if array is not None]
    words = tuple(WordSet.of(array) for array in arrays if array.any())
    if words or len(parents) > 1:
        return Rest(words, parents=parents)
    return parents[0] if parents else (Rest() if arrays else None)


def all_of(values: Sequence[Value]) -> Rest | None:
    """All that some values depend on, their pads too."""
    return join((value.rest for value in values), *(value.ids for value in values))


class Numbering:
    """Numbers for all keys and words, the same in DS's program and the servers'.

    Attributes:
        root: the number of DS's key.
        total: how many words there are so far, with `NO_WORD`.
    """

    def __init__(self) -> None:
        self.root = 1
        self.total = 1
        self._children: dict[tuple[int, Any], int] = {}
        # Of each key: the server whose seed it comes from (None: DS's alone), and its path from it.
        self._names: dict[int, tuple[Any, str]] = {self.root: (None, "")}
        self._draws: dict[tuple[int, int], slice] = {}  # (key, width) -> words

    def child(self, key: int, index: Any) -> int:
        """The number of a key derived from another one. A public key has public children."""
        if key == NO_WORD:
            return NO_WORD
        child = self._children.setdefault((key, index), self.root + 1 + len(self._children))
        server, path = self._names[key]
        self._names.setdefault(child, (server, f"{path}/{index}".strip("/")))
        return child

    def seed(self, key: int, server: int) -> int:
        """The number of the seed that a server (0 or 1) gets under DS's key."""
        seed = self.child(key, ("seed", server))
        if seed != NO_WORD:
            self._names[seed] = (server, "")
        return seed

    def server_of(self, key: int) -> int | None:
        """Whose seed a key comes from; None for DS's own and for public ones."""
        return None if key == NO_WORD else self._names[key][0]

    def draw(self, key: int, width: int, size: int) -> np.ndarray:
        """The numbers of the words of `jax.random.bits`.

        Raises:
            ValueError: the same words were drawn in another size.
        """
        if key == NO_WORD:
            return np.zeros(size, np.int32)
        words = self._draws.setdefault((key, width), slice(self.total, self.total + size))
        if words.stop - words.start != size:
            raise ValueError("one key draws words twice, in two sizes")
        self.total = max(self.total, words.stop)
        dtype = np.int32 if words.stop < 2**31 else np.int64
        return np.arange(words.start, words.stop, dtype=dtype)

    def origins(self, ids: np.ndarray) -> dict[tuple[Any, str], int]:
        """How many of the words come from which (server, key)."""
        draws = list(self._draws.items())
        starts = [words.start for _, words in draws]
        counts = np.bincount(np.searchsorted(starts, ids[ids != NO_WORD], side="right"))
        return {self._names[draws[i - 1][0][0]]: n for i, n in enumerate(counts.tolist()) if n}


def closure(start: Rest | None, seen: set[Rest]) -> list[Rest]:
    """All that `start` depends on and that is not in `seen`, which it joins."""
    found, stack = [], [start] if start is not None else []
    while stack:
        rest = stack.pop()
        if rest not in seen:
            seen.add(rest)
            found.append(rest)
            stack += rest.parents
    return found


def grown(array: np.ndarray, size: int) -> np.ndarray:
    """An array over all words, with zeros for new ones; the same array if it has room."""
    if len(array) >= size:
        return array
    larger = np.zeros(max(size, len(array) * 5 // 4), array.dtype)
    larger[: len(array)] = array
    return larger
