"""Functions that take a range reduction or a series: what is independent runs as one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lpgan_jax.mpc import division, elementary, range_reduction, roots
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret, concatenate
from lpgan_jax.mpc.series import Series, evaluate
from lpgan_jax.transform.bounds import Interval
from lpgan_jax.transform.rules.registry import Node, Value, Values, rule
from lpgan_jax.transform.values import Stored, Term, at, here, power_of_two

Form = Callable[[Stored], Secret]
Run = Callable[..., Secret]


def together(
    values: Values,
    node: Node,
    run: Run,
    *operands: tuple[Stored, Form],
    factor: float = 1.0,
    kind: float = 1.0,
) -> Value:
    """A function of values of one shape, which runs with others of its kind in one.

    Args:
        values: of this evaluation.
        node: its operation, level and bounds tell what may run with it.
        run: (party, *secrets) -> result.
        operands: (value, the form in which it is taken) of each argument.
        factor: of the result.
        kind: what else tells runs apart.
    """
    # What bounds tell, of the argument or the divisor, changes how it is run.
    bounds = values.interval(node.inputs[-1])
    unwatched = id(node) in values.setting.unwatched
    key = (
        node.operation,
        values.levels[id(node)],
        bounds,
        kind,
        values.form.frac_bits,
        unwatched,
    )
    request = values.pending.setdefault(key, Requests(run)).add(node, operands)
    return values.later(node.shape, lambda: request(values.party), factor)


class Requests:
    """Calls of one function that do not depend on each other."""

    def __init__(self, run: Run) -> None:
        """`run`: the function."""
        self._run = run
        self._waiting: list[tuple[Node, Any]] = []
        self._results: dict[int, Secret] = {}

    def add(self, node: Node, operands: Any) -> Callable[[Seat], Secret]:
        """Enter a call; returns what gives its result, which runs all that wait if need be."""
        self._waiting.append((node, operands))

        def result(party: Seat) -> Secret:
            if id(node) not in self._results:
                # If none waits, another's operands take this one, which so comes before them.
                waiting, self._waiting = self._waiting or [(node, operands)], []
                self._run_all(party, waiting)
            return self._results[id(node)]

        return result

    def _run_all(self, party: Seat, waiting: list[tuple[Node, Any]]) -> None:
        formed = [(node, [form(stored) for stored, form in operands]) for node, operands in waiting]
        by_scale: dict[tuple[int, ...], list[tuple[Node, list[Secret]]]] = {}
        for node, secrets in formed:
            if id(node) not in self._results:
                by_scale.setdefault(tuple(s.frac_bits for s in secrets), []).append((node, secrets))
        for group in by_scale.values():
            if len(group) == 1:
                ((node, secrets),) = group
                self._results[id(node)] = self._run(party, *secrets)
            else:
                self._run_flat(party, group)

    def _run_flat(self, party: Seat, group: list[tuple[Node, list[Secret]]]) -> None:
        flat = [[s.reshape(-1) for s in secrets] for _, secrets in group]
        result = self._run(party, *(concatenate(list(c)) for c in zip(*flat, strict=True)))
        start = 0
        for node, secrets in group:
            size = secrets[0].size
            self._results[id(node)] = result[start : start + size].reshape(*secrets[0].shape)
            start += size


_FINEST = 22
_QUOTIENT_GUARD = 2  # bits of x / sqrt(v)'s factors beyond its format's

_SATURATING: dict[str, Callable[..., Secret]] = {
    "tanh": elementary.tanh,
    "logistic": elementary.sigmoid,
    "softplus": elementary.softplus,
    "erf": elementary.erf,
}


@rule(*_SATURATING, together=True)
def _saturating(values: Values, node: Node, x: Value) -> Value:
    return _clamped(values, node, x, _SATURATING[node.operation])


def _clamped(values: Values, node: Node, x: Value, function: Callable[..., Secret]) -> Value:
    f, (factor, source) = _fraction(values), x.factored()
    if power_of_two(factor) is not None or function is elementary.softplus:
        factor, source = 1.0, x.stored

    def form(stored: Stored) -> Secret:
        """At its own scale, unless that leaves a clamp and its series no room."""
        own = stored.form.frac_bits
        has_room = stored.frac_bits <= own + values.frac_bits
        return stored.opened(stored.frac_bits if has_room else own)

    def run(party: Seat, u: Secret) -> Secret:
        return function(party, u, f) if factor == 1 else function(party, u, f, factor)

    return together(values, node, run, (source, form), kind=factor)


def _fraction(values: Values) -> int:
    """Fraction bits of a function's result: no more than its series is good for."""
    return min(values.form.frac_bits, max(values.frac_bits, _FINEST))


def _rounded(stored: Stored) -> Secret:
    """An argument in its own format, opened."""
    return stored.opened(stored.form.frac_bits)


@rule("exp", together=True)
def _exp(values: Values, node: Node, x: Value) -> Value:
    f = _fraction(values)
    _, high = values.interval(node.inputs[0])
    largest = None if math.isinf(high) else math.ceil(high / math.log(2)) + 1
    return together(
        values,
        node,
        lambda p, u: elementary.exp(p, u, f, largest),
        (x.stored, _rounded),
    )


def _range(interval: Interval, frac_bits: int) -> dict[str, Any]:
    """What a range reduction has to look for, in powers of two of LSB."""
    low, high = interval
    smallest = roots.lowest_bit(low / 2, frac_bits) if low > 0 else 0
    if math.isinf(high):
        return {"smallest": smallest}
    largest = min(
        range_reduction.TOP, math.ceil(math.log2(max(high, 2.0**-40)) + 2**-20) + frac_bits + 1
    )
    return {"smallest": smallest, "largest": max(largest, smallest + 1)}


@rule("log", together=True)
def _log(values: Values, node: Node, x: Value) -> Value:
    return _logarithm(values, node, x, values.interval(node.inputs[0]))


@rule("log1p", together=True)
def _log1p(values: Values, node: Node, x: Value) -> Value:
    low, high = values.interval(node.inputs[0])
    return _logarithm(values, node, x + Value(values, x.shape, [Term(1.0)]), (low + 1, high + 1))


def _logarithm(values: Values, node: Node, x: Value, interval: Interval) -> Value:
    f = _fraction(values)
    return together(
        values,
        node,
        lambda p, u: elementary.log(p, u, f, **_range(interval, u.frac_bits)),
        (x.stored, lambda s: s.masked()),
    )


@rule("rsqrt")
def _rsqrt(values: Values, node: Node, x: Value) -> Value:
    (factor, root), f = _root(values, node, x), values.form.frac_bits
    return values.later(node.shape, lambda: root().value(f), factor)


@rule("times_root")
def _times_root(values: Values, node: Node, x: Value, v: Value) -> Value:
    """x / sqrt(v), where 1 / sqrt(v) may be wanted too: both from the same pieces."""
    (factor, root), f = _root(values, node, v), values.form.frac_bits
    c, other = x.factored()
    scale = min(other.frac_bits, other.form.frac_bits)
    return values.later(node.shape, lambda: root().times(other.opened(scale), f), c * factor)


def _root(values: Values, node: Node, x: Value) -> tuple[float, Callable[[], roots.Root]]:
    """(a factor, the inverse root of the rest); once.

    A factor of the value comes out as its root: powers of four stay inside, where they are exact.
    """
    factor, source = x.factored()
    if factor <= 0 or power_of_two(factor) is not None:
        factor, source = 1.0, x.stored
    log = math.floor(math.log(factor, 4))
    factor /= 4.0**log
    low, high = values.interval(node.inputs[-1])
    interval = low / factor, high / factor
    party, place = values.party, here(values.party)
    key = "root", id(source), log

    def make() -> roots.Root:
        if key not in values.kept:
            with at(party, place):
                u = values.stored(source, 4.0**log).stored.masked()
                root = roots.Root(party, u, **_range(interval, u.frac_bits))
            values.kept[key] = source, root
        found: roots.Root = values.kept[key][1]
        return found

    return factor**-0.5, make


@rule("sqrt", together=True)
def _sqrt(values: Values, node: Node, x: Value) -> Value:
    f = values.form.frac_bits
    return together(
        values, node, lambda p, u: roots.sqrt(p, u, f), (x.stored, lambda s: s.masked())
    )


@rule("reciprocal", together=True)
def _reciprocal(values: Values, node: Node, x: Value) -> Value:
    f = min(values.form.frac_bits, range_reduction.MANTISSA_BITS)
    low, high = interval = values.interval(node.inputs[0])

    def run(party: Seat, u: Secret) -> Secret:
        if low > 0 and high / low < 2.0**30:
            return division.inverse_positive(party, u, f, **_range(interval, u.frac_bits))
        return division.inverse(party, u, f, positive=low >= 0)

    def form(stored: Stored) -> Secret:
        return stored.opened(min(stored.frac_bits, range_reduction.TOP))

    return together(values, node, run, (x.stored, form))


@rule("div", together=True)
def _div(values: Values, node: Node, x: Value, y: Value) -> Value:
    f, positive = _fraction(values), values.interval(node.inputs[1])[0] >= 0

    def run(party: Seat, u: Secret, v: Secret) -> Secret:
        scale = max(u.frac_bits, v.frac_bits)
        return division.divide(party, u.at_scale(scale), v.at_scale(scale), f, positive)

    return together(values, node, run, (x.stored, _rounded), (y.stored, _rounded))


@rule("over_root", together=True)
def _over_root(values: Values, node: Node, x: Value, v: Value, eps: Any) -> Value:
    """x / sqrt(v + eps); of eps, 1 LSB of v at the least, so that v may be 0."""
    factor, numerator = x.factored()
    if power_of_two(factor) is None:  # which would have to be multiplied in after
        factor, numerator = 1.0, x.stored
    f = values.form.frac_bits + _QUOTIENT_GUARD

    def squares(stored: Stored) -> Secret:
        u = stored.at(_square_bits(values, stored)).settled(values.party).unmasked()
        least = at_least(values, stored, eps)
        return Secret(u.words + values.words_of(least, u.frac_bits, u.shape), u.frac_bits)

    return together(
        values,
        node,
        lambda p, times, u: roots.over_root(p, times, u, f),
        (numerator, lambda s: s.at(min(s.frac_bits, values.setting.guarded(s.form))).unmasked()),
        (v.stored, squares),
        factor=factor,
    )


def _square_bits(values: Values, stored: Stored) -> int:
    """The even scale at which a root is taken of a value's squares."""
    scale = min(stored.frac_bits, values.setting.doubled(stored.form))
    return scale - scale % 2


def at_least(values: Values, stored: Stored, eps: Any) -> jax.Array:
    """What is added to a value before a root is taken of it: eps, and 1 LSB at the least."""
    return jnp.maximum(jnp.asarray(eps, jnp.float64), 2.0 ** -_square_bits(values, stored))


@rule("erfc", together=True)
def _complementary(values: Values, node: Node, x: Value) -> Value:
    one = Value(values, node.shape, [Term(1.0)])
    return one - _clamped(values, node, x, elementary.erf)


@rule("expm1", together=True)
def _expm1(values: Values, node: Node, x: Value) -> Value:
    return _exp(values, node, x) - Value(values, node.shape, [Term(1.0)])


@rule("sin", "cos", together=True)
def _wave(values: Values, node: Node, x: Value) -> Value:
    """Of x / (2 pi) turns, whose period is a power of two of LSB."""
    f, turns = _fraction(values), x.times(1 / (2 * math.pi)).stored
    wave = (1.0,), (0.0,)
    cosines, sines = wave if node.operation == "cos" else wave[::-1]
    series = Series((1,), cosines, sines, 0.0, 0)
    return together(
        values, node, lambda p, u: evaluate(p, series, u, f), (turns, lambda s: s.masked())
    )
