"""Secret bits: comparisons, and what selects by them."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc import compare
from lpgan_jax.mpc.arithmetic import masked
from lpgan_jax.mpc.range_reduction import TOP
from lpgan_jax.mpc.secret import Secret, concatenate
from lpgan_jax.transform.rules.arithmetic import product
from lpgan_jax.transform.rules.moves import moved
from lpgan_jax.transform.rules.registry import Node, Value, Values, known_scalar, lifted, rule
from lpgan_jax.transform.values import SecretBit, Stored, Term, View, at, here

Request = tuple[float, bool]  # a threshold; whether [x < threshold], not [x <= threshold]


class Comparisons:
    """All comparisons of one value with public thresholds.

    Those that are known before the first is needed share one opening and the mask's dealt bits.
    """

    def __init__(self, values: Values, source: Stored, integer: bool, spare: int) -> None:
        """`integer`: it is an integer, which may be large; `spare`: bits beyond its range."""
        self._values, self._source, self._integer = values, source, integer
        self._log_range = source.form.log_range + spare
        self._bits: dict[Request, compare.Bit | None] = {}
        self._place = here(values.party)

    def requested(self, request: Request) -> SecretBit:
        """The bit of a comparison."""
        self._bits.setdefault(request, None)
        return SecretBit(self._source.shape, lambda: self._bit(request))

    def _bit(self, request: Request) -> compare.Bit:
        if self._bits[request] is None:
            self._compare([r for r, bit in self._bits.items() if bit is None])
        bit = self._bits[request]
        assert bit is not None
        return bit

    def _compare(self, requests: list[Request]) -> None:
        values, source = self._values, self._source
        own, bits = source.form.frac_bits, values.party.ring.bits
        ordinary = not self._integer and all(c == 0 for c, _ in requests)
        # Of an activation, the sign as rounded: it is narrow, and what is selected is rounded too.
        scale = min(own, source.frac_bits)
        width = scale + self._log_range + 1
        rounded = ordinary and width + source.frac_bits - scale <= bits
        if not rounded:
            scale = source.frac_bits if source.frac_bits <= own + values.frac_bits else own
            width = scale + self._log_range + 1
        limits = [
            math.ceil(c * 2.0**scale) if strict else math.floor(c * 2.0**scale) + 1
            for c, strict in requests
        ]
        limits = [max(-(2**TOP), min(limit, 2**TOP)) for limit in limits]  # beyond which none lies
        with at(values.party, self._place):
            x = source.known(scale) if rounded else source.opened(scale)
            found = compare.less_than_public(
                values.party, x, limits, min(bits, width) if ordinary else None
            )
        self._bits.update((r, found[i]) for i, r in enumerate(requests))


def below(values: Values, x: Value, threshold: float, strict: bool, integer: bool) -> Value:
    """[x < threshold], or [x <= threshold] if not strict."""
    factor, source = x.factored()
    if factor <= 0 or integer:
        factor, source = 1.0, x.stored
    threshold /= factor
    spare = max(0, -math.floor(math.log2(factor)))
    of_source = values.comparisons.setdefault(
        id(source), (source, Comparisons(values, source, integer, spare))
    )[1]
    key = (source, threshold, strict)
    bits = values.bits
    if key not in bits:
        bits[key] = of_source.requested((threshold, strict))
    return values.bit(bits[key])


def difference(values: Values, x: Any, y: Any) -> tuple[Value, float]:
    """(d, c) with x < y where d < c."""
    constant = known_scalar(y)
    if isinstance(x, Value) and constant is not None and math.isfinite(constant):
        return x, constant
    return lifted(values, x) - lifted(values, y), 0.0


@rule("lt", "le", "gt", "ge")
def _compare(values: Values, node: Node, x: Any, y: Any) -> Value:
    integer = all(n.is_integer for n in node.inputs)
    flipped = not isinstance(x, Value)
    if flipped:
        x, y = y, x
    name = (
        {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}[node.operation]
        if flipped
        else (node.operation)
    )
    d, threshold = difference(values, x, y)
    result = below(values, d, threshold, name in ("lt", "ge"), integer)
    return result if name in ("lt", "le") else complement(values, result)


def complement(values: Values, x: Value) -> Value:
    """1 - x."""
    if (bit := x.as_bit) is not None:
        return values.bit(bit.negated)
    return Value(values, x.shape, [Term(1.0)]) - x


@rule("eq", "ne")
def _equal(values: Values, node: Node, x: Any, y: Any) -> Value:
    if not isinstance(x, Value):
        x, y = y, x
    integer = all(n.is_integer for n in node.inputs)
    d, threshold = difference(values, x, y)
    under = below(values, d, threshold, True, integer)
    equal = below(values, d, threshold, False, integer) - under
    return equal if node.operation == "eq" else complement(values, equal)


@rule("not")
def _not(values: Values, node: Node, x: Value) -> Value:
    return complement(values, x)


@rule("and", "or", "xor")
def _gate(values: Values, node: Node, x: Any, y: Any) -> Value:
    x, y = lifted(values, x), lifted(values, y)
    both = product(values, x, y)
    match node.operation:
        case "and":
            return both
        case "or":
            return x + y - both
    return x + y - both.times(2.0)


@rule("max", "min")
def _extreme(values: Values, node: Node, x: Any, y: Any) -> Value:
    if not isinstance(x, Value):
        x, y = y, x
    integer = all(n.is_integer for n in node.inputs)
    d, threshold = difference(values, x, y)
    beyond = abs(threshold) >= 2.0 ** (TOP - values.form.frac_bits)
    if beyond and (threshold < 0) == (node.operation == "max"):
        return d
    over = complement(values, below(values, d, threshold, False, integer))
    above = product(values, over, d - Value(values, d.shape, [Term(threshold)]))
    if node.operation == "max":
        return lifted(values, y) + above
    return lifted(values, x) - above


@rule("abs")
def _abs(values: Values, node: Node, x: Value) -> Value:
    over = complement(values, below(values, x, 0.0, False, node.is_integer))
    return product(values, over, x).times(2.0) - x


@rule("sign")
def _sign(values: Values, node: Node, x: Value) -> Value:
    integer = node.is_integer
    over = complement(values, below(values, x, 0.0, False, integer))
    return over - below(values, x, 0.0, True, integer)


# The largest of several ---------------------------------------------------------------------------


class Tournament:
    """The largest along the last axis: pairs of neighbours, then pairs of winners.

    4 rounds and half as many comparisons at each level. The first of equal ones wins.
    """

    def __init__(self, values: Values, x: Stored, integer: bool) -> None:
        """`x`: [..., n], n at least 1; `integer`: which may be large."""
        self._values, self._x, self._integer = values, x, integer
        self._bits: list[compare.Bit] = []
        self._place = here(values.party)

    @functools.cached_property
    def largest(self) -> Stored:
        """[...]."""
        party = self._values.party
        form = self._x.form
        f = min(form.frac_bits, self._x.frac_bits)
        width = None if self._integer else min(party.ring.bits, f + form.log_range + 2)
        with at(party, self._place):
            current = self._x.at(f).settled(party).unmasked()
            while (count := current.shape[-1]) > 1:
                pairs = 2 * (count // 2)
                first, second = current[..., 0:pairs:2], current[..., 1:pairs:2]
                change = masked(party, second - first)
                bit = compare.positive(party, change, width)
                winner = first + compare.select(party, bit, change)
                self._bits.append(bit)
                rest = [current[..., pairs:]] if count % 2 else []
                current = concatenate([winner, *rest], -1)
        result = current[..., 0]
        return Stored(party, result.shape, lambda: result, form)

    def taken(self, x: Stored) -> Secret:
        """[...]: another array's elements, of [..., n], at the places of the largest."""
        _ = self.largest
        party = self._values.party
        current = x.at(min(x.form.frac_bits, x.frac_bits)).settled(party).unmasked()
        for bit in self._bits:
            pairs = 2 * (current.shape[-1] // 2)
            first, second = current[..., 0:pairs:2], current[..., 1:pairs:2]
            winner = first + compare.select(party, bit, second - first)
            current = concatenate([winner, current[..., pairs:]], -1)
        return current[..., 0]

    def given(self, x: Value) -> Value:
        """[..., n]: x of [...] at the place of the largest, 0 elsewhere.

        From the last level back to the first, each gives what it has to one of two: a selection
        for each pair, 1 round a level.
        """
        _ = self.largest
        values = self._values
        current = values.stored(x.stored)
        source = current.stored
        f = min(source.form.frac_bits, source.frac_bits)
        shares = source.at(f).settled(values.party).unmasked().rearrange(lambda v: v[..., None])
        count = [self._x.shape[-1]]
        while count[-1] > 1:
            count.append(-(-count[-1] // 2))
        for bit, size in zip(reversed(self._bits), reversed(count[:-1]), strict=True):
            pairs = size // 2
            paired = shares[..., :pairs]
            second = compare.select(values.party, bit, paired)
            first = paired - second
            both = Secret(
                jnp.stack([first.words, second.words], -1).reshape(*first.shape[:-1], 2 * pairs),
                f,
            )
            rest = [shares[..., pairs:].unmasked()] if size % 2 else []
            shares = concatenate([both, *rest], -1)
        return values.of(shares)


def flattened(values: Values, x: Stored, axes: tuple[int, ...], shape: tuple[int, ...]) -> View:
    """x with the axes that are reduced as one last axis; `shape`: of the others."""
    kept = [a for a in range(len(x.shape)) if a not in axes]
    size = math.prod(x.shape[a] for a in axes)
    return View(x, (*shape, size), lambda v: v.transpose(*kept, *axes).reshape(*shape, size))


def tournament(values: Values, node: Node, x: Value, axes: tuple[int, ...]) -> Tournament:
    """The tournament of a value over some axes; kept, for what asks for the winner later."""
    source = x.stored
    key = "tournament", id(source), axes
    if key not in values.kept:
        shape = tuple(n for a, n in enumerate(x.shape) if a not in axes)
        flat = flattened(values, source, axes, shape)
        values.kept[key] = source, Tournament(values, flat, node.inputs[0].is_integer)
    return values.kept[key][1]


def without_factor(x: Value) -> tuple[float, Value]:
    """(a positive factor, the rest): the largest stays the same."""
    factor, _ = x.factored()
    return (factor, x.times(1 / factor)) if factor > 0 else (1.0, x)


@rule("reduce_max")
def _reduce_max(values: Values, node: Node, x: Value) -> Value:
    axes = tuple(map(int, node.params["axes"]))
    factor, x = without_factor(x)
    return values.stored(tournament(values, node, x, axes).largest, factor)


@rule("reduce_min")
def _reduce_min(values: Values, node: Node, x: Value) -> Value:
    axes = tuple(map(int, node.params["axes"]))
    return values.stored(tournament(values, node, x.times(-1.0), axes).largest, -1.0)


@rule("winner")
def _winner(values: Values, node: Node, x: Value, given: Any) -> Value:
    """Another array's elements at the places of the largest of x, 0 elsewhere; in x's shape."""
    axes = tuple(map(int, node.params["axes"]))
    _, x = without_factor(x)
    found = tournament(values, node, x, axes).given(lifted(values, given))
    kept = [a for a in range(len(node.shape)) if a not in axes]
    order = np.argsort([*kept, *axes])
    split = [node.shape[a] for a in (*kept, *axes)]
    return moved(values, found, node.shape, lambda v: v.reshape(split).transpose(*order))


@rule("argmax", "argmin")
def _argmax(values: Values, node: Node, x: Value) -> Value:
    """The number of the largest: the numbers of the places, as the tournament gives them."""
    axes = tuple(map(int, node.params["axes"]))
    _, x = without_factor(x if node.operation == "argmax" else x.times(-1.0))
    found = tournament(values, node, x, axes)
    one = Value(values, node.shape, [Term(1.0)])
    where = found.given(one).stored
    numbers = np.arange(math.prod(x.shape[a] for a in axes))

    def make() -> Secret:
        return where.raw.map(lambda v: (v * numbers.astype(v.dtype)).sum(-1, dtype=v.dtype))

    return values.now(node.shape, make)
