"""Secret values while a graph is evaluated: what was computed, and what is still to be.

A protocol costs by what it opens and what DS deals, so nothing is computed before it is known in
which form it is needed, and no form is made twice. A `Value` is a sum of terms, coefficient * bit *
source, that are put together when someone needs the words: then ReLU, leaky ReLU and their
gradients are one selection each, and a public factor is absorbed by the next truncation. A `Stored`
is a source: words, which may be opened under a mask and rescaled, once for each scale; its `View`s
share what it has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc import arithmetic, compare
from lpgan_jax.mpc.activation import LOG_RANGE
from lpgan_jax.mpc.range_reduction import TOP
from lpgan_jax.mpc.seat import Seat, SourceLine
from lpgan_jax.mpc.secret import Secret, add_public
from lpgan_jax.transform.graph import Node

Move = Callable[[jax.Array], jax.Array]

_FACTOR_BITS = 24
_MUCH_SMALLER = 64
_RATE_BITS = 6  # of the rate of a running average, however slow, at the least
_FEW = 4
_NARROW = 32  # fraction bits that a truncation drops with narrow words
GUARD_BITS = 8  # that what is divided by a root has beyond its format's
_SQUARE_BITS = 6  # that a running average, or what a root is taken of, has beyond 2f
_SMALLEST, _LARGEST = 2.0**-16, 4.0  # public factors that a linear map leaves for later
_TINY = 2.0**-40  # of a sum, at the least
_MOST_MULTIPLE = 16  # of a term of a sum that is left without its common factor
_OF_MEANS = 2.0**-4  # factors of a sum, at the most, where they are those of means
_ROUNDING = 2.0**-40
_EQUAL = 2.0**-20  # numbers of ordinary code, whose own error is 2^-24


Here = tuple[tuple[str, ...], bool]
"""A seat's place, and whether it is filling the range."""


def here(party: Seat) -> Here:
    """What a value's operations, which may run later, are named after, and looked at as."""
    return party.place, party.filling


@contextmanager
def at(party: Seat, place: Here) -> Iterator[None]:
    """What is sent is named after the place that it is computed for."""
    outer = here(party)
    party.place, party.filling = place
    try:
        yield
    finally:
        party.place, party.filling = outer


@dataclass(frozen=True)
class Format:
    """How a value is kept wherever it is rounded; public.

    Attributes:
        frac_bits: its fraction bits.
        log_range: |value| < 2^log_range in real terms.
        measured: whether examples were looked at; else it is what everything has.
        summed: bits that a sum may need beyond the range, until a factor makes it a mean.
    """

    frac_bits: int
    log_range: int = LOG_RANGE
    measured: bool = False
    summed: int = 0

    @property
    def finest(self) -> int:
        """Fraction bits at which the value can still be truncated."""
        return TOP - self.log_range - self.summed

    def times(self, factor: float) -> Format:
        """That of the value times a public factor."""
        if factor == 0 or not (self.measured or self.summed):
            return self
        k = round(math.log2(abs(factor)))
        if not self.measured:
            return dataclasses.replace(self, summed=max(0, self.summed + k))
        return Format(self.frac_bits - k, self.log_range + k, True)

    def squared(self) -> Format:
        """That of squares of such values; of a measured one it is known."""
        return self if self.measured else dataclasses.replace(self, log_range=2 * LOG_RANGE)

    def of_sum(self, count: int) -> Format:
        """That of a sum of so many values; of a measured one it is known."""
        if self.measured or count < 1:
            return self
        return dataclasses.replace(self, summed=math.ceil(math.log2(count)))


def _module(node: Node) -> str:
    """Its module, or else the line that it comes from."""
    return node.place.module or SourceLine(Path(node.place.line.split(" (")[0]).name)


@dataclass(frozen=True)
class Setting:
    """How a program's values are kept, and its messages named.

    Attributes:
        frac_bits: f, the fraction bits of what is not measured, and of public factors.
        formats: of the nodes that have one of their own, by id.
        place: the name of what a node sends.
        unwatched: ids of nodes whose values no range guard looks at.
    """

    frac_bits: int
    formats: Mapping[int, Format] = field(default_factory=dict)
    place: Callable[[Node], str] = _module
    unwatched: frozenset[int] = frozenset()

    def format(self, node: Node) -> Format:
        """How a node's value is kept; a sum may be as many times as large as its terms."""
        form = self.formats.get(id(node)) or Format(self.frac_bits)
        if node.operation == "square":
            return form.squared()
        if node.operation in ("reduce_sum", "inner"):
            return form.of_sum(node.inputs[0].size // max(1, node.size))
        return form

    def guarded(self, form: Format) -> int:
        """Fraction bits of a value of a format that is divided by a root."""
        return min(form.frac_bits + GUARD_BITS, form.finest)

    def doubled(self, form: Format) -> int:
        """Fraction bits of a running average, and of what a root is taken of."""
        return min(form.frac_bits + self.frac_bits + _SQUARE_BITS, form.finest)


class Stored:
    """A secret in every form in which it is needed; each is made once, when it is asked for."""

    def __init__(
        self, party: Seat, shape: tuple[int, ...], make: Callable[[], Secret], form: Format
    ) -> None:
        """`make`: computes it; `form`: its format."""
        self.party, self.shape, self.form = party, shape, form
        self._make, self._place = make, here(party)
        self._raw: Secret | None = None
        self._scaled: dict[int, Secret] = {}

    @property
    def raw(self) -> Secret:
        """As it was computed, at its own scale."""
        if self._raw is None:
            with at(self.party, self._place):
                self._raw = self._make()
        return self._raw

    @property
    def frac_bits(self) -> int:
        """The scale at which it was computed."""
        return self.raw.frac_bits

    def masked(self) -> Secret:
        """At its own scale, opened under a mask of one part."""
        with at(self.party, self._place):
            self._raw = arithmetic.masked(self.party, self.raw)
        return self._raw

    def at(self, frac_bits: int) -> Secret:
        """At a scale; whether it has a mask depends."""
        if self.raw.frac_bits == frac_bits:
            return self.raw
        if frac_bits not in self._scaled:
            if self.raw.frac_bits < frac_bits:
                return self.raw.at_scale(frac_bits)
            masked = self.masked()
            with at(self.party, self._place):
                self._scaled[frac_bits] = arithmetic.truncate(self.party, masked, frac_bits)
        return self._scaled[frac_bits]

    def opened(self, frac_bits: int) -> Secret:
        """At a scale, opened under a mask of one part: for products of tensors."""
        if self.raw.frac_bits == frac_bits:
            return self.masked()
        if self.raw.frac_bits < frac_bits:
            return self.masked().at_scale(frac_bits)
        scaled = self.at(frac_bits)
        with at(self.party, self._place):
            self._scaled[frac_bits] = arithmetic.masked(self.party, scaled)
        return self._scaled[frac_bits]

    def known(self, frac_bits: int) -> Secret:
        """At a scale, with a public part: for elementwise products and selections."""
        x = self.at(frac_bits)
        return self.opened(frac_bits) if x.opened is None else x

    @property
    def distinct(self) -> int:
        """How many elements are computed for it; fewer than it has if they are repeated."""
        return math.prod(self.shape)

    def times(self, values: Values, factor: float) -> Stored:
        """The value times a public factor, computed of its distinct elements; once."""
        key = "times", id(self), factor
        if key not in values.kept:
            form = self.form.times(factor)
            values.kept[key] = self, Value(values, self.shape, [Term(factor, self)], form).stored
        return values.kept[key][1]

    def has(self, frac_bits: int) -> bool:
        """Whether this scale was asked for already."""
        return self._raw is not None and (
            self._raw.frac_bits == frac_bits or frac_bits in self._scaled
        )


class View(Stored):
    """The elements of another value, moved or repeated: all that it has serves both."""

    def __init__(self, parent: Stored, shape: tuple[int, ...], move: Move) -> None:
        """`move`: of the parent's elements."""
        super().__init__(parent.party, shape, lambda: parent.raw.rearrange(move), parent.form)
        self._parent, self._move = parent, move
        self._moved: dict[int, tuple[Secret, Secret]] = {}

    def _of(self, secret: Secret) -> Secret:
        """The moved elements of one of the parent's forms."""
        if id(secret) not in self._moved:
            self._moved[id(secret)] = secret, secret.rearrange(self._move)
        return self._moved[id(secret)][1]

    @property
    def raw(self) -> Secret:
        """As it was computed."""
        return self._of(self._parent.raw)

    def masked(self) -> Secret:
        """See `Stored.masked`."""
        return self._of(self._parent.masked())

    def at(self, frac_bits: int) -> Secret:
        """See `Stored.at`."""
        return self._of(self._parent.at(frac_bits))

    def opened(self, frac_bits: int) -> Secret:
        """See `Stored.opened`."""
        return self._of(self._parent.opened(frac_bits))

    @property
    def distinct(self) -> int:
        """See `Stored.distinct`."""
        return min(self._parent.distinct, math.prod(self.shape))

    def times(self, values: Values, factor: float) -> Stored:
        """See `Stored.times`."""
        key = "times", id(self), factor
        if key not in values.kept:
            inner = self._parent.times(values, factor)
            values.kept[key] = self, View(inner, self.shape, self._move)
        return values.kept[key][1]

    def has(self, frac_bits: int) -> bool:
        """See `Stored.has`."""
        return self._parent.has(frac_bits)


class Part(Stored):
    """Some of the elements of another value: what that one has serves both, and no more is made."""

    def __init__(self, parent: Stored, shape: tuple[int, ...], move: Move) -> None:
        """`move`: of the parent's elements."""
        super().__init__(parent.party, shape, lambda: parent.raw.rearrange(move), parent.form)
        self._parent, self._move = parent, move

    def at(self, frac_bits: int) -> Secret:
        """See `Stored.at`."""
        known = frac_bits == self.raw.frac_bits or frac_bits in self._scaled
        if not known and self._parent.has(frac_bits):
            self._scaled[frac_bits] = self._parent.at(frac_bits).rearrange(self._move)
        return self._scaled.get(frac_bits) or super().at(frac_bits)


class Scaled(Stored):
    """Another value times plus or minus a power of two: the same words, read at another scale."""

    def __init__(self, parent: Stored, negative: bool, exponent: int) -> None:
        """The parent divided by 2^exponent, and negated if wanted."""
        form = parent.form.times(2.0**-exponent)
        super().__init__(parent.party, parent.shape, lambda: self._of(parent.raw), form)
        self._parent, self._negative, self._exponent = parent, negative, exponent

    def _of(self, secret: Secret) -> Secret:
        same = -secret if self._negative else secret
        return same.divided_by_power_of_two(self._exponent)

    def masked(self) -> Secret:
        """See `Stored.masked`."""
        self._raw = self._of(self._parent.masked())
        return self._raw

    def at(self, frac_bits: int) -> Secret:
        """See `Stored.at`."""
        if self._exponent or frac_bits in self._scaled:
            return super().at(frac_bits)
        self._scaled[frac_bits] = self._of(self._parent.at(frac_bits))
        return self._scaled[frac_bits]


class SecretBit:
    """A secret bit that is computed when somebody selects by it."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], compare.Bit]) -> None:
        """`make`: computes it."""
        self.shape = shape
        self._make = make

    @functools.cached_property
    def bit(self) -> compare.Bit:
        """The bit."""
        return self._make()

    @functools.cached_property
    def negated(self) -> SecretBit:
        """The other bit."""

        def other() -> compare.Bit:
            return compare.Bit(~self.bit.flipped, self.bit.random)

        bit = SecretBit(self.shape, other)
        bit.__dict__["negated"] = self
        return bit

    def number(self, party: Seat) -> Secret:
        """0 or 1, as a share; local."""
        return compare.b2a(party, self.bit)

    def moved(self, shape: tuple[int, ...], move: Move) -> SecretBit:
        """Its elements, moved or repeated."""
        return MovedBit(self, shape, move)


class MovedBit(SecretBit):
    """The elements of another bit, moved or repeated: their shares too, not what makes them."""

    def __init__(self, parent: SecretBit, shape: tuple[int, ...], move: Move) -> None:
        """`move`: of the parent's elements."""
        super().__init__(shape, lambda: jax.tree.map(move, parent.bit))
        self._parent, self._move = parent, move

    @functools.cached_property
    def negated(self) -> SecretBit:
        """See `SecretBit.negated`."""
        bit = MovedBit(self._parent.negated, self.shape, self._move)
        bit.__dict__["negated"] = self
        return bit

    def number(self, party: Seat) -> Secret:
        """See `SecretBit.number`."""
        return self._parent.number(party).rearrange(self._move)


@dataclass(frozen=True, eq=False)
class Public:
    """A public array that is not known while tracing, or not the same everywhere."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape


@dataclass(frozen=True)
class Term:
    """coefficient * bit * source, where a missing one counts as 1."""

    coefficient: float
    source: Stored | Public | None = None
    bit: SecretBit | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is no more than a multiple of a secret."""
        return self.bit is None and isinstance(self.source, Stored)


class Value:
    """A secret value: a sum of terms.

    Attributes:
        shape: its shape; the terms broadcast to it.
        terms: with different (source, bit).
        form: its format.
    """

    def __init__(
        self,
        of: Values,
        shape: tuple[int, ...],
        terms: Sequence[Term],
        form: Format | None = None,
    ) -> None:
        """`of`: what belongs to the evaluation as a whole; `form`: else that of its node."""
        self.form = form or of.form
        merged: dict[tuple[int, int], Term] = {}
        for term in terms:
            key = id(term.source), id(term.bit)
            before = merged[key].coefficient if key in merged else 0.0
            merged[key] = dataclasses.replace(term, coefficient=before + term.coefficient)
        self._of = of
        self.shape = tuple(shape)
        self.terms = tuple(t for t in merged.values() if t.coefficient != 0)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @functools.cached_property
    def stored(self) -> Stored:
        """The value itself, computed when its words are asked for."""
        if len(self.terms) == 1 and self.terms[0].is_plain:
            (term,) = self.terms
            assert isinstance(term.source, Stored)
            if term.source.shape == self.shape:
                if term.coefficient == 1:
                    return term.source
                if (exponent := power_of_two(term.coefficient)) is not None:
                    return Scaled(term.source, term.coefficient < 0, -exponent)
        return Stored(self._of.party, self.shape, lambda: self._of.combined(self), self.form)

    def factored(self) -> tuple[float, Stored]:
        """(a public factor, a value): what a linear map may take instead, and give it back after.

        Of a sum (a leaky ReLU, say) that leaves whole multiples of its terms, which need no
        truncation. Larger factors stay inside, where the value has bits below its scale; of smaller
        ones their power of two.
        """
        return self._common or (1.0, self.stored)

    @functools.cached_property
    def _common(self) -> tuple[float, Stored] | None:
        """(a factor, the rest) where all else are small integers or powers of two."""
        if len(self.terms) == 1 and self.terms[0].is_plain:
            (term,) = self.terms
            assert isinstance(term.source, Stored)
            factor, exponent = math.frexp(term.coefficient)
            if term.source.shape != self.shape or abs(term.coefficient) > _LARGEST:
                return None
            if abs(term.coefficient) >= _SMALLEST:
                return term.coefficient, term.source
            return factor, self._of.stored(term.source, 2.0**exponent).stored
        secret = [t for t in self.terms if t.source is not None or t.bit is not None]
        coefficients = [abs(t.coefficient) for t in secret]
        if not secret or any(isinstance(t.source, Public) for t in secret):
            return None
        # Whole multiples are exact as they are, and 3 i - 5 is not 3 (i - 5/3) to a comparison.
        exact = all(power_of_two(c) is not None for c in coefficients)
        if exact or all(t.coefficient == round(t.coefficient) for t in self.terms):
            return None
        for factor, simple in ((min(coefficients), _small_integer), (max(coefficients), _power)):
            ratios = [simple(t.coefficient / factor) for t in secret]
            if _TINY <= factor <= _LARGEST and None not in ratios:
                whole = {id(t): r for t, r in zip(secret, ratios, strict=True)}
                terms = [
                    dataclasses.replace(t, coefficient=whole.get(id(t)) or t.coefficient / factor)
                    for t in self.terms
                ]
                rest = Value(self._of, self.shape, terms, self.form.times(1 / factor))
                return factor, rest.stored
        return None

    def times(self, factor: float) -> Value:
        """The value times a public factor."""
        if factor == 1:
            return self
        terms = [dataclasses.replace(t, coefficient=t.coefficient * factor) for t in self.terms]
        return Value(self._of, self.shape, terms)

    def __add__(self, other: Value) -> Value:
        shape = np.broadcast_shapes(self.shape, other.shape)
        for one, rest in ((self, other), (other, self)):  # itself, with all that it has
            if not rest.terms and one.shape == shape:
                return one
        return Value(self._of, shape, [*self.terms, *other.terms])

    def __sub__(self, other: Value) -> Value:
        return self + other.times(-1.0)

    @property
    def is_bits(self) -> bool:
        """Whether it is made of bits alone: a product with it is a selection."""
        return all(t.source is None for t in self.terms)

    @property
    def as_bit(self) -> SecretBit | None:
        """The bit that the value is, if it is one."""
        if len(self.terms) == 1 and self.is_bits and self.terms[0].coefficient == 1:
            return self.terms[0].bit
        return None


def power_of_two(factor: float) -> int | None:
    """k if the factor is plus or minus 2^k (but for rounding errors of public factors)."""
    mantissa, exponent = math.frexp(abs(factor))
    if abs(mantissa - 0.5) < _ROUNDING:
        return exponent - 1
    return exponent if 1 - mantissa < _ROUNDING else None


def _power(ratio: float) -> float | None:
    """The power of two that a ratio is."""
    exponent = power_of_two(ratio)
    return None if exponent is None else math.copysign(2.0**exponent, ratio)


def _small_integer(ratio: float) -> float | None:
    """The small integer that a ratio is, as far as ordinary code knows."""
    nearest = float(round(ratio))
    close = 0 < abs(nearest) <= _MOST_MULTIPLE and abs(ratio / nearest - 1) <= _EQUAL
    return nearest if close else None


class Values:
    """What the values of one evaluation have in common.

    Attributes:
        party: the seat.
        setting: how values are kept.
        frac_bits: f, as the setting has it.
        form: the format of the node that is being computed.
        levels: how many operations of its kind a node depends on, by id.
        pending: functions that wait to be run with others of their kind.
        comparisons: of each value that is compared.
        bits: those that were asked for.
        kept: what else serves several operations, by what it is of.
    """

    def __init__(
        self,
        party: Seat,
        setting: Setting,
        intervals: Mapping[int, tuple[float, float]],
        levels: Mapping[int, int],
    ) -> None:
        """See the attributes; `intervals`: of nodes, by id, as `bounds.bounds` gives them."""
        self.party = party
        self.setting = setting
        self.frac_bits = setting.frac_bits
        self.form = Format(self.frac_bits)
        self.levels = levels
        self.pending: dict[Any, Any] = {}
        self._intervals = intervals
        self.comparisons: dict[int, tuple[Stored, Any]] = {}
        self.bits: dict[Any, SecretBit] = {}
        self.kept: dict[Any, Any] = {}
        self._selected: dict[tuple[int, int, int], tuple[Any, Secret]] = {}

    def interval(self, node: Node) -> tuple[float, float]:
        """Where a node's value lies."""
        return self._intervals.get(id(node), (-math.inf, math.inf))

    # Making values ------------------------------------------------------------------------------

    def of(self, secret: Secret) -> Value:
        """A value from words."""
        return self.stored(Stored(self.party, secret.shape, lambda: secret, self.form))

    def stored(self, source: Stored, coefficient: float = 1.0) -> Value:
        """A multiple of what is stored."""
        return Value(self, source.shape, [Term(coefficient, source)])

    def later(
        self, shape: tuple[int, ...], make: Callable[[], Secret], coefficient: float = 1.0
    ) -> Value:
        """A value that is computed when its words are asked for."""
        form = self.form.times(1 / coefficient)
        return self.stored(Stored(self.party, shape, make, form), coefficient)

    def now(
        self, shape: tuple[int, ...], make: Callable[[], Secret], coefficient: float = 1.0
    ) -> Value:
        """A value that is computed: nothing that is known later would make it cheaper."""
        secret = make()
        return self.later(shape, lambda: secret, coefficient)

    def bit(self, bit: SecretBit) -> Value:
        """A bit as a value, 0 or 1."""
        return Value(self, bit.shape, [Term(1.0, None, bit)])

    def public(self, array: Any) -> Value:
        """A public array as a value."""
        if isinstance(array, np.ndarray) and array.size and (array == array.flat[0]).all():
            return Value(self, array.shape, [Term(float(array.flat[0]))])
        return Value(self, array.shape, [Term(1.0, Public(jnp.asarray(array)))])

    def words_of(self, array: Any, frac_bits: int, shape: tuple[int, ...]) -> jax.Array:
        """A share of a public array at a scale."""
        whole = jnp.broadcast_to(jnp.asarray(array, jnp.float64), shape)
        return self.party.public_share(self.party.encoded(whole, frac_bits))

    def rounded(self, value: Value) -> Value:
        """A value that is made at its scale now if it is a multiple that takes a truncation."""
        if len(value.terms) != 1 or not value.terms[0].is_plain:
            return value
        if power_of_two(value.terms[0].coefficient) is not None:
            return value
        return self.stored(_at_scale(value.stored, value.form.frac_bits))

    # Putting terms together ---------------------------------------------------------------------

    def combined(self, value: Value) -> Secret:
        """The sum of a value's terms.

        Factors that are powers of two cost nothing; others get integers of up to 24 bits, and the
        sum more fraction bits, which the next truncation takes off again.
        """
        if (average := self._average(value)) is not None:
            return average
        form, offset = value.form, 0.0
        f = form.frac_bits
        secrets, publics, bits = [], [], []
        terms, small = self._by_size(Value(self, value.shape, self._of_few(value), form))
        for term in terms:
            if isinstance(term.source, Stored):
                secrets.append(term)
            elif term.source is not None:
                publics.append(term)
            elif term.bit is not None:
                bits.append(term)
            else:
                offset += term.coefficient
        factors = [t.coefficient for t in (*secrets, *bits)]
        exact = all(power_of_two(c) is not None for c in factors)
        room = TOP - _log_range(form, secrets, exact)
        finest = room if exact else room - self.frac_bits
        # A selection with whole factors comes after the truncation: it leaves no bits to drop.
        whole = exact or all(c == round(c) for c in factors)
        if whole and any(t.bit is not None for t in secrets):
            finest = f
        parts = [self._part(term, finest, exact) for term in secrets]
        parts += [t.bit.number(self.party) for t in bits if t.bit is not None]
        if parts:
            result = _weighted(parts, factors, value.shape, room, f + TOP)
            if small:  # to the scale at which the others are added, if there is room for them
                result = self._truncated(result, min(result.frac_bits, f + self.frac_bits))
        else:
            result = Secret(self.words_of(0.0, f, value.shape), f)
        if result.frac_bits < f and (publics or offset != round(offset)):
            result = result.at_scale(f)
        if small:
            part = Value(self, value.shape, small, form).stored
            result = result.unmasked() + part.at(result.frac_bits).unmasked()
        if offset:
            result = add_public(self.party, result, offset)
        for term in publics:
            assert isinstance(term.source, Public)
            share = self.words_of(
                term.coefficient * term.source.array, result.frac_bits, value.shape
            )
            result = dataclasses.replace(result.unmasked(), words=result.words + share)
        return result

    def _average(self, value: Value) -> Secret | None:
        """(1 - c) x + c y with a small c as x + c (y - x): in one truncation, and without a drift.

        c needs no more than the bits that a change of x of ordinary size shows. The change, of
        gradients' squares say, may be so large that an integer times it would not fit.
        """
        if len(value.terms) != 2 or not all(t.is_plain for t in value.terms):
            return None
        y, x = sorted(value.terms, key=lambda t: t.coefficient)
        c = y.coefficient
        if not 0 < c * _MUCH_SMALLER < 1 or abs(c + x.coefficient - 1) > _EQUAL:
            return None
        if _stored(x).shape != value.shape:
            return None
        source = _stored(x)
        form = max(source.form, _stored(y).form, key=lambda form: form.log_range)
        both = [dataclasses.replace(t, coefficient=s) for t, s in ((y, 1.0), (x, -1.0))]
        change = Value(self, value.shape, both, form).stored.raw
        before = source.at(min(source.frac_bits, self.setting.doubled(source.form)))
        bits = max(_RATE_BITS, self.frac_bits + 4 + math.ceil(math.log2(c)))
        if change.frac_bits < before.frac_bits:
            change = change.at_scale(before.frac_bits)
        digits = arithmetic.signed_digits(c, bits)
        step = arithmetic.times_small(self.party, change, digits, before.frac_bits)
        return before.unmasked() + step.unmasked()

    def _of_few(self, value: Value) -> list[Term]:
        """The terms, of which those of few distinct elements are brought to the others' scale.

        So that their factors (of a mean, say) do not make the whole finer than it has to be.
        """

        def is_few(term: Term) -> bool:
            return term.is_plain and _stored(term).distinct * _FEW <= value.size

        others = [t for t in value.terms if t.is_plain and not is_few(t)]
        if not others:
            return list(value.terms)
        scale = max(_stored(t).frac_bits - (power_of_two(t.coefficient) or 0) for t in others)
        terms = []
        for term in value.terms:
            if is_few(term) and abs(term.coefficient) != 1:
                source = _stored(term).times(self, term.coefficient)
                if source.frac_bits > max(scale, source.form.frac_bits + _NARROW):
                    term = Term(1.0, _at_scale(source, scale))
            terms.append(term)
        return terms

    def _by_size(self, value: Value) -> tuple[list[Term], list[Term]]:
        """(the terms, those whose factors are so much smaller that they need bits of their own)."""
        factors = [abs(t.coefficient) for t in value.terms if t.source is not None]
        exact = all(power_of_two(c) is not None for c in factors)
        largest = max(factors, default=0.0)
        small = [
            t
            for t in value.terms
            if isinstance(t.source, Stored)
            and not exact
            and abs(t.coefficient) < largest / _MUCH_SMALLER
        ]
        return [t for t in value.terms if t not in small], small

    def _truncated(self, x: Secret, frac_bits: int) -> Secret:
        if x.frac_bits <= frac_bits:
            return x
        return arithmetic.truncate(self.party, x, frac_bits).unmasked()

    def _part(self, term: Term, finest: int, exact: bool) -> Secret:
        """A term without its factor."""
        assert isinstance(term.source, Stored)
        exponent = 0 if not exact else -(power_of_two(term.coefficient) or 0)
        scale = term.source.frac_bits
        if scale + exponent > finest:
            form = term.source.form
            scale = max(0, min(scale, form.frac_bits, form.finest - exponent))
        if term.bit is None:
            return term.source.at(scale).unmasked()
        return self.selected(term.bit, term.source, scale)

    def selected(self, bit: SecretBit, source: Stored, frac_bits: int) -> Secret:
        """bit * source at a scale; once."""
        key = id(bit), id(source), frac_bits
        if key not in self._selected:
            secret = compare.select(self.party, bit.bit, source.known(frac_bits))
            self._selected[key] = (bit, source), secret
        return self._selected[key][1]


def _stored(term: Term) -> Stored:
    assert isinstance(term.source, Stored)
    return term.source


def _log_range(form: Format, terms: Sequence[Term], exact: bool) -> int:
    """How large an integer a sum of terms takes, beyond its fraction bits (and its factors').

    Factors that are powers of two move the scale; others are integers, the largest of them in full.
    Where several terms all have small factors they are means, and what was summed up for them may
    be as many times as large as what comes out.
    """
    if exact:
        ranges = [TOP - _stored(t).form.times(t.coefficient).finest for t in terms]
        return max([form.log_range, *ranges])
    largest = max((abs(t.coefficient) for t in terms), default=1.0)
    means = len(terms) > 1 and largest <= _OF_MEANS
    summed = -math.floor(math.log2(largest)) if means else 0
    ranges = []
    for term in terms:
        own = _stored(term).form
        larger = 0 if own.measured else max(0, summed - own.summed)
        smaller = math.floor(math.log2(abs(term.coefficient) / largest))
        ranges.append(TOP - own.finest + smaller + larger)
    return max([form.log_range, *ranges])


def _at_scale(source: Stored, frac_bits: int) -> Stored:
    """A value whose own scale is this one."""
    return Stored(source.party, source.shape, lambda: source.at(frac_bits), source.form)


def _weighted(
    parts: Sequence[Secret],
    factors: Sequence[float],
    shape: tuple[int, ...],
    room: int,
    finest_sum: int,
) -> Secret:
    """The sum of factor * part, at whatever scale up to `room` it comes; local.

    Tiny factors make it finer than that, as fine as can be truncated.
    """
    exponents = [power_of_two(c) for c in factors]
    finest = max((p.frac_bits for p in parts), default=0)
    if all(e is not None for e in exponents):
        scaled = [
            (-p if c < 0 else p).divided_by_power_of_two(-(e or 0))
            for p, c, e in zip(parts, factors, exponents, strict=True)
        ]
        finest = max(p.frac_bits for p in scaled)
    else:
        bits = min(_FACTOR_BITS, room - finest)
        whole, shift = _integers(factors, bits, finest_sum - finest)
        scaled = [
            dataclasses.replace(p.at_scale(finest).times_int(k), frac_bits=finest + shift)
            for p, k in zip(parts, whole, strict=True)
        ]
        finest += shift
    aligned = [p.at_scale(finest).unmasked() for p in scaled]
    broadcast = [
        p if p.shape == shape else p.rearrange(lambda v: jnp.broadcast_to(v, shape))
        for p in aligned
    ]
    return functools.reduce(lambda x, y: x + y, broadcast)


def _integers(factors: Sequence[float], bits: int, most: int) -> tuple[list[int], int]:
    """(integers k, shift) with factors close to k / 2^shift, the largest of about `bits` bits.

    Tiny ones have fewer, with a shift of `most`.

    Factors that add up to 1 still do, so that a moving average of a constant stays what it is.
    """
    if all(c == round(c) for c in factors):  # of integers, say, which must stay exact
        return [round(c) for c in factors], 0
    shift = min(bits - math.ceil(math.log2(max(map(abs, factors)))), most)
    whole = [round(c * 2.0**shift) for c in factors]
    if abs(sum(factors) - 1) < _EQUAL:
        largest = max(range(len(whole)), key=lambda i: abs(whole[i]))
        whole[largest] += 2**shift - sum(whole)
    return whole, shift
