"""Sorting: a network of comparators, whose places are public and whose outcomes are secret bits.

What is moved like the sorted array (other operands, whatever is gathered or scattered by the order
that a sort gives) takes selections by the same bits, and no comparison: see `permutations`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc import compare
from lpgan_jax.mpc.arithmetic import masked
from lpgan_jax.mpc.secret import Secret, concatenate
from lpgan_jax.transform.rules.comparison import without_factor
from lpgan_jax.transform.rules.moves import moved
from lpgan_jax.transform.rules.registry import Node, Value, Values, lifted, rule
from lpgan_jax.transform.values import Stored, View, at, here

Layer = tuple[np.ndarray, np.ndarray]  # places i and j, all different: the smaller goes to i


def layers(count: int, wanted: int) -> list[Layer]:
    """Comparators that sort `count` elements of which the first `wanted` are looked at.

    Batcher's merge exchange (Knuth, volume 3, algorithm 5.2.2M), t (t + 1) / 2 layers for up to 2^t
    elements; what no wanted element depends on is left out.
    """
    found = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top if count > 1 else 0
    while p:
        q, r, d = top, 0, p
        while True:
            i = np.arange(count - d)
            i = i[(i & p) == r]
            found.append((i, i + d))
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    needed, kept = np.arange(count) < wanted, []
    for i, j in reversed(found):
        used = needed[i] | needed[j]
        i, j = i[used], j[used]
        needed[i] = needed[j] = True
        if len(i):
            kept.append((i, j))
    return kept[::-1]


class Network:
    """An array that is sorted along its last axis."""

    def __init__(self, values: Values, x: Stored, integer: bool, ties: bool, wanted: int) -> None:
        """`ties`: equal elements stay in their order; `wanted`: how many are looked at."""
        self._values, self._x, self._integer, self._ties = values, x, integer, ties
        self.count, self.wanted = x.shape[-1], wanted
        self._layers = layers(self.count, wanted)
        self._bits: list[compare.Bit] = []
        self._place = here(values.party)

    @functools.cached_property
    def sorted(self) -> Secret:
        """The elements, the smallest first: [..., wanted]."""
        party, form = self._values.party, self._x.form
        f = min(form.frac_bits, self._x.frac_bits)
        bits = (self.count - 1).bit_length() if self._ties else 0
        width = party.ring.bits if self._integer else f + form.log_range + 2 + bits
        with at(party, self._place):
            rows = self._x.at(f).settled(party).unmasked()[None]
            if self._ties:  # a key of which no two are equal
                number = jnp.broadcast_to(
                    jnp.arange(self.count).astype(rows.words.dtype), rows.shape
                )
                scaled = rows.times_int(1 << bits)
                key = Secret(scaled.words + party.public_share(number), f)
                rows = concatenate([key, rows])
            for layer in self._layers:
                change = masked(party, rows[..., layer[1]] - rows[..., layer[0]])
                self._bits.append(compare.negative(party, change[0], min(width, party.ring.bits)))
                rows = _exchanged(rows, layer, compare.select(party, self._bits[-1], change))
        return rows[-1, ..., : self.wanted]

    def permuted(self, x: Stored, inverse: bool) -> Secret:
        """Another array's last axis in the order of the sorted one; or back, with 0 for the rest.

        Args:
            x: [..., count], or back [..., wanted], with more axes at the end of `...` perhaps.
            inverse: back.
        """
        _ = self.sorted
        party = self._values.party
        current = x.at(min(x.form.frac_bits, x.frac_bits)).settled(party).unmasked()
        if inverse:
            rest = [(0, 0)] * (len(x.shape) - 1) + [(0, self.count - self.wanted)]
            current = current.map(lambda v: jnp.pad(v, rest))
        steps: Iterable[Any] = zip(self._layers, self._bits, strict=True)
        for layer, bit in reversed(list(steps)) if inverse else steps:
            own = bit.flipped.shape
            shape = (*own[:-1], *(1,) * (len(x.shape) - len(own)), own[-1])
            spread = jax.tree.map(lambda v, shape=shape: v.reshape(shape), bit)
            change = masked(party, current[..., layer[1]] - current[..., layer[0]])
            current = _exchanged(current, layer, compare.select(party, spread, change))
        return current if inverse else current[..., : self.wanted]


def _exchanged(rows: Secret, layer: Layer, change: Secret) -> Secret:
    """Pairs of which the first gets the change, and the second loses it."""
    i, j = layer
    rest = np.setdiff1d(np.arange(rows.shape[-1]), np.concatenate(layer))
    back = np.argsort(np.concatenate([i, j, rest]))
    parts = [rows[..., i] + change, rows[..., j] - change, rows[..., rest].unmasked()]
    return concatenate(parts, -1)[..., back]


class Sorted(list[Value]):
    """The results of a sort, and what moves other values alike."""

    def __init__(self, results: Iterable[Value], network: Network) -> None:
        """`network`: that sorted them."""
        super().__init__(results)
        self.network = network


def _along(values: Values, x: Value, axis: int, of: Any, size: int) -> Value:
    """A function of the last axis, of `size` after it, along another one."""
    source = View(x.stored, _last(x.shape, axis), lambda v: jnp.moveaxis(v, axis, -1))
    others = source.shape[:-1]
    result = values.later((*others, size), lambda: of(source))
    there = (*others[:axis], size, *others[axis:])
    return moved(values, result, there, lambda v: jnp.moveaxis(v, -1, axis))


def _last(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :], shape[axis])


def _network(
    values: Values, node: Node, x: Value, axis: int, ties: bool, wanted: int
) -> tuple[Network, Value]:
    source = View(x.stored, _last(x.shape, axis), lambda v: jnp.moveaxis(v, axis, -1))
    network = Network(values, source, node.inputs[0].is_integer, ties, wanted)
    return network, _along(values, x, axis, lambda _: network.sorted, wanted)


@rule("sort")
def _sort(values: Values, node: Node, key: Any, *others: Any) -> Sorted:
    axis = int(node.params["dimension"])
    if node.params["num_keys"] != 1 or not isinstance(key, Value):
        raise NotImplementedError(
            "a sort by several keys, or of secrets by a public one: sort one secret key, with "
            "jnp.argsort, and index with the order"
        )
    factor, key = without_factor(key)
    size = key.shape[axis]
    ties = node.params["is_stable"] and bool(others)
    network, first = _network(values, node, key, axis, ties, size)
    rest = [
        _along(values, lifted(values, x), axis, lambda v: network.permuted(v, False), size)
        for x in others
    ]
    return Sorted([first.times(factor), *rest], network)


@rule("top_k")
def _top(values: Values, node: Node, x: Value) -> Sorted:
    axis, k = int(node.params["axis"]), int(node.params["k"])
    factor, x = without_factor(x)
    network, first = _network(values, node, x.times(-1.0), axis, True, k)
    shape = [1] * len(x.shape)
    shape[axis] = x.shape[axis]
    numbers = np.broadcast_to(np.arange(x.shape[axis]).reshape(shape), x.shape)
    places = _along(values, values.public(numbers), axis, lambda v: network.permuted(v, False), k)
    return Sorted([first.times(-factor), places], network)


@rule("permute")
def _permute(values: Values, node: Node, order: Sorted, x: Any) -> Value:
    axis, inverse, network = node.params["axis"], node.params["inverse"], order.network
    size = network.count if inverse else network.wanted
    return _along(values, lifted(values, x), axis, lambda v: network.permuted(v, inverse), size)
