"""What a protocol costs, from its trace alone: nothing is compiled, and nothing runs.

A `Party` marks exchanges, dealings and comparisons as named calls (`Seat.marked`), and these names
survive `jit`, `vmap` and `scan`. So a traced simulation tells everything that the servers and DS
would send each other, and in which order: an exchange depends on another if its words do.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from lpgan_jax.common.tables import aligned, si
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.prng import KEY_WORDS, abstract_key
from lpgan_jax.mpc.rounds import planned
from lpgan_jax.mpc.shares import PARTIES
from lpgan_jax.mpc.traces import mark
from lpgan_jax.ring.contraction import ring_product_p

UNPLACED = "(no place)"
"""The layer of what happens outside of every `Seat.at`: inputs, seeds, and a bare protocol."""

_SEED_BYTES = 4 * KEY_WORDS


class Network(NamedTuple):
    """A link between the servers, for `Cost.seconds(*network)`.

    Attributes:
        bandwidth_bits_per_s: in each direction, at the same time.
        latency_s: one way.
    """

    bandwidth_bits_per_s: float
    latency_s: float

    def checked(self) -> Network:
        """Itself; ValueError unless the bandwidth is positive and the latency at least 0."""
        if not self.bandwidth_bits_per_s > 0:
            raise ValueError(
                f"bandwidth: expected more than 0 bit/s, got {self.bandwidth_bits_per_s:g}"
            )
        if not self.latency_s >= 0:
            raise ValueError(f"latency: expected at least 0 s, got {self.latency_s:g}")
        return self

    def __str__(self) -> str:
        return f"{self.bandwidth_bits_per_s / 1e6:g} Mbit/s and {1e3 * self.latency_s:g} ms"


LAN = Network(1e9, 0.5e-3)
WAN = Network(100e6, 20e-3)


@dataclass(frozen=True)
class Cost:
    """What one execution costs. Bytes are of the words alone, without any framing or encryption.

    Attributes:
        rounds: messages that each server sends: all exchanges that do not depend on each other
            travel in one (`mpc.rounds`). Of a layer: exchanges in the longest chain of its own.
        exchanges: of protocols, of which a round carries one or many.
        online_bytes: bytes that each server sends to the other.
        dealer_bytes_s1: bytes that DS sends S1: its seed.
        dealer_bytes_s2: bytes that DS sends S2: its seed and the corrections.
        input_bytes: bytes of shares of the batch that DS sends each server.
        multiply_adds: in ring products (matrix products, convolutions), of each server.
        dealer_multiply_adds: the same of DS.
        comparisons: secret values that are compared with 0.
        layers: the same for each part of the program, in its order. All but rounds add up.
    """

    rounds: int = 0
    exchanges: int = 0
    online_bytes: int = 0
    dealer_bytes_s1: int = 0
    dealer_bytes_s2: int = 0
    input_bytes: int = 0
    multiply_adds: int = 0
    dealer_multiply_adds: int = 0
    comparisons: int = 0
    layers: dict[str, Cost] = field(default_factory=dict)

    def seconds(self, bandwidth_bits_per_s: float, latency_s: float) -> float:
        """Seconds of communication between the servers of a cluster, without any computation.

        They exchange one message after the other, in both directions at the same time.

        Args:
            bandwidth_bits_per_s: in each direction; positive.
            latency_s: one way; at least 0.

        Raises:
            ValueError: out of range.
        """
        Network(bandwidth_bits_per_s, latency_s).checked()
        return self.rounds * latency_s + 8 * self.online_bytes / bandwidth_bits_per_s

    def dealer_seconds(self, bandwidth_bits_per_s: float) -> float:
        """Seconds in which DS streams to S2 what it deals, ahead of the servers or beside them."""
        Network(bandwidth_bits_per_s, 0.0).checked()
        return 8 * self.dealer_bytes_s2 / bandwidth_bits_per_s

    def to_json(self) -> dict[str, Any]:
        """The fields as plain numbers, with `layers` as {layer: fields}."""
        rows = asdict(self)
        for row in rows["layers"].values():
            del row["layers"]
        return rows

    def table(self, networks: Sequence[Network] = (LAN, WAN)) -> str:
        """Layers and totals as aligned text, with the time that messages take on each network."""
        header = ["layer", "rounds", "exchanges", "a server sends", "DS to S2", "comparisons"]
        header += ["multiply-adds", "DS's"]
        rows = [header, *(row._cells(name) for name, row in self.layers.items())]
        rows.append(self._cells("in all"))
        lines = aligned(rows)
        rule = "-" * max(map(len, lines))
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1], ""]
        lines.append(
            f"DS sends each server {si(self.input_bytes, 'B')} of inputs; "
            f"ahead of time {si(self.dealer_bytes_s1, 'B')} to S1 and "
            f"{si(self.dealer_bytes_s2, 'B')} to S2."
        )
        for network in networks:
            lines.append(
                f"At {network}: the servers' messages take {self.seconds(*network):.3g} s, "
                f"DS's to S2 {self.dealer_seconds(network.bandwidth_bits_per_s):.3g} s."
            )
        return "\n".join(lines)

    def beside(self, step: Cost, every: int) -> str:
        """A line on a range guard that runs once in so many steps."""
        own = [self.online_bytes, self.dealer_bytes_s2]
        part = sum(own) / every / max(1, step.online_bytes + step.dealer_bytes_s2)
        return (
            f"Every {every} steps, and before each checkpoint, the range guard: {self.rounds} "
            f"rounds, {si(own[0], 'B')}, DS's {si(own[1], 'B')}: {100 * part:.2g} % of all bytes."
        )

    def _cells(self, name: str) -> list[str]:
        exact = [f"{n:,}" for n in (self.rounds, self.exchanges)]
        volumes = [si(n, "B") for n in (self.online_bytes, self.dealer_bytes_s2)]
        work = [si(n, "") for n in (self.multiply_adds, self.dealer_multiply_adds)]
        return [name, *exact, *volumes, f"{self.comparisons:,}", *work]


_ADDITIVE = tuple(f.name for f in fields(Cost) if f.name not in ("rounds", "layers"))


# From a function to its cost ----------------------------------------------------------------------

Shape = Sequence[int] | jax.ShapeDtypeStruct | jax.Array | np.ndarray


def cost(function: Callable[..., Any], *shapes: Shape) -> Cost:
    """The cost of one call of a function of paired arrays, such as those of `protocols`.

        cost(lambda key, x, y: P.sec_mul(key, x, y, fxp), (64, 10), (64, 10))

    Args:
        function: (DS's key, *paired arrays) -> anything. It may call several protocols, with keys
            that it splits, and use `jit`, `vmap` and `scan`. It is only traced. Or a function
            that was made `secure`, with its own arguments (or their `jax.ShapeDtypeStruct`s).
        shapes: of the values, without the party axis; or a `jax.ShapeDtypeStruct` or an array for
            an argument that is to be taken as it is.

    Returns:
        The cost. `input_bytes` is 0: where the arguments come from is not known. A `cond` costs as
        much as its dearest branch, in each respect; the steps of a `scan` follow one another.

    Raises:
        TypeError: a shape is not one, or the function does not take a key and these arrays.
        ValueError: a size is negative, or the function runs protocols in a `while_loop`, so that
            the cost is not known.
    """
    if (parts := getattr(function, "parts", None)) is not None:
        return program_cost(*parts(*shapes))
    return _cost_of_trace(jax.make_jaxpr(function)(*arguments(function, shapes)))


def random_words(function: Callable[..., Any], secrets: Any, public: Any) -> float:
    """uint64 words that one simulated execution of a program draws; from its trace."""

    def drawn(program: Jaxpr) -> float:
        total = 0.0
        for equation in program.eqns:
            if equation.primitive.name == "random_bits":
                words: Any = equation.outvars[0].aval
                total += words.size * words.dtype.itemsize / 8
            total += sum(map(drawn, jaxprs_in_params(equation.params)))
        return total

    key = abstract_key()
    traced = jax.make_jaxpr(functools.partial(simulate, function))(key, secrets, public)
    return drawn(traced.jaxpr)


def arguments(function: Callable[..., Any], shapes: Sequence[Shape]) -> tuple[Any, ...]:
    """What a function of a key and paired arrays is traced with; errors as of `cost`."""
    operands = (abstract_key(), *(_argument(shape) for shape in shapes))
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function that has none; tracing will tell
        pass
    else:
        try:
            signature.bind(*operands)
        except TypeError as error:
            raise TypeError(
                f"function: expected to be called with a key and {len(shapes)} paired arrays, "
                f"but its signature is {signature}: {error}"
            ) from None
    return operands


def program_cost(
    function: Callable[..., Any], secrets: Any, public: Any = None, inputs: Any = ()
) -> Cost:
    """The cost of one execution of a program as `party.simulate` takes it; only traced.

    Args:
        function: (party, secrets, public) -> outputs, such as `LPGAN.train_step`.
        secrets: a pytree of paired arrays or of their `jax.ShapeDtypeStruct`s.
        public: what both servers know.
        inputs: those of the secrets that DS shares for this execution, for `input_bytes`.
    """
    program = functools.partial(simulate, function)
    shares = (math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(inputs))
    traced = jax.make_jaxpr(program)(abstract_key(), secrets, public)
    return _cost_of_trace(traced, sum(shares) // PARTIES)


def _argument(shape: Shape) -> jax.ShapeDtypeStruct:
    if isinstance(shape, jax.ShapeDtypeStruct | jax.Array | np.ndarray):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype)
    try:
        if isinstance(shape, str) or any(isinstance(n, bool) for n in shape):
            raise TypeError
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        raise TypeError(
            "shapes: expected a tuple of integers, a jax.ShapeDtypeStruct or an array, "
            f"got {shape!r}"
        ) from None
    if any(n < 0 for n in sizes):
        raise ValueError(f"shapes: expected sizes of at least 0, got {sizes}")
    return jax.ShapeDtypeStruct((PARTIES, *sizes), np.uint64)


# From a trace to its cost -------------------------------------------------------------------------

Depth = np.ndarray
"""Exchanges of each layer alone in the longest chain that ends at a value."""


def _cost_of_trace(traced: ClosedJaxpr, input_bytes: int = 0) -> Cost:
    program = traced.jaxpr
    walk = _Walk(dict.fromkeys(_exchanging_layers(program)))
    walk.count(UNPLACED, "input_bytes", input_bytes)
    walk.follow(program, [walk.start] * len(program.invars), 1)
    counts, layers = +walk.counts, {}
    for layer in dict.fromkeys(layer for layer, _ in counts):
        row: dict[str, Any] = {name: counts[layer, name] for name in _ADDITIVE}
        rounds = walk.deepest[walk.numbers[layer]] if layer in walk.numbers else 0
        layers[layer] = Cost(rounds=int(rounds), **row)
    total: dict[str, Any] = {
        name: sum(getattr(row, name) for row in layers.values()) for name in _ADDITIVE
    }
    return Cost(rounds=planned(traced).count, layers=layers, **total)


def _mark(equation: JaxprEqn) -> tuple[str, str] | None:
    """(kind, layer) of a marked call that costs something."""
    found = mark(equation)
    if found is None or found.kind not in ("exchange", "deal", "compare", "seeds"):
        return None
    return found.kind, found.places[0] if found.places else UNPLACED


def _exchanging_layers(program: Jaxpr) -> Iterator[str]:
    for equation in program.eqns:
        match _mark(equation):
            case "exchange", layer:
                yield layer
            case None:
                for inner in jaxprs_in_params(equation.params):
                    yield from _exchanging_layers(inner)


class _Walk:
    """A walk over a program in its order: adds up counts, and follows each value's depth.

    Attributes:
        numbers: each layer's place in a `Depth`.
        start: the depth of an input.
        counts: {(layer, field): amount}.
        deepest: of all values so far.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self.numbers = {layer: number for number, layer in enumerate(layers)}
        self.start: Depth = np.zeros(len(self.numbers), np.int64)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.deepest = self.start
        self._layer = UNPLACED  # the one that was named last: products have no name of their own
        self._dealing = False

    def count(self, layer: str, name: str, amount: int) -> None:
        """Add to a field of a layer."""
        self.counts[layer, name] += amount

    def follow(self, program: Jaxpr, inputs: Sequence[Depth], times: int) -> list[Depth]:
        """Walk a program that runs `times` times (for the counts); its outputs' depths."""
        known = dict(zip(program.invars, inputs, strict=True))

        def depth(atom: Any) -> Depth:
            return self.start if isinstance(atom, Literal) else known.get(atom, self.start)

        for equation in program.eqns:
            depths = [depth(atom) for atom in equation.invars]
            known.update(zip(equation.outvars, self._step(equation, depths, times), strict=True))
        return [depth(atom) for atom in program.outvars]

    def _step(self, equation: JaxprEqn, depths: list[Depth], times: int) -> Sequence[Depth]:
        joined = self._join(depths)
        plain = [joined] * len(equation.outvars)
        match _mark(equation):
            case "exchange", layer:
                # The output holds both servers' messages.
                self.count(layer, "exchanges", times)
                self.count(layer, "online_bytes", times * _nbytes(equation, 0) // PARTIES)
                after = joined.copy()
                after[self.numbers[layer]] += 1
                self.deepest = np.maximum(self.deepest, after)
                self._layer = layer
                return [after]
            case "deal", layer:
                # (plain, correction): both of DS; the second goes to S2. (Or the plain alone.)
                if len(equation.outvars) == 2:
                    self.count(layer, "dealer_bytes_s2", times * _nbytes(equation, 1))
                self._layer, self._dealing = layer, True
                self.follow(_only(equation), depths, times)
                self._dealing = False
                return plain
            case "compare", layer:
                self.count(layer, "comparisons", times * _aval(equation.outvars[0]).size)
                return plain
            case "seeds", _:
                keys = _aval(equation.invars[0])  # one, or many
                for name in ("dealer_bytes_s1", "dealer_bytes_s2"):
                    self.count(UNPLACED, name, times * keys.size * _SEED_BYTES)
                return plain
        primitive = equation.primitive.name
        if primitive == "scan":
            return self._scan(equation, joined, times)
        if primitive == "cond":
            return self._cond(equation, depths, times)
        if equation.primitive is ring_product_p:
            self._count_product(equation, times)
            return plain
        inner = list(jaxprs_in_params(equation.params))
        if not inner:
            return plain
        is_call = len(inner) == 1 and len(inner[0].invars) == len(depths)
        if is_call and len(inner[0].outvars) == len(plain) and primitive != "shard_map":
            return self.follow(inner[0], depths, times)
        self._refuse_counts(inner, primitive)
        return plain

    def _join(self, depths: Iterable[Depth]) -> Depth:
        different = {id(depth): depth for depth in depths if depth is not self.start}
        return functools.reduce(np.maximum, different.values()) if different else self.start

    def _count_product(self, equation: JaxprEqn, times: int) -> None:
        name = "dealer_multiply_adds" if self._dealing else "multiply_adds"
        # A server's product is traced for both servers (one operand at least is a share).
        traced = times * equation.params["contraction"].multiply_adds
        self.count(self._layer, name, traced if self._dealing else traced // PARTIES)

    def _scan(self, equation: JaxprEqn, joined: Depth, times: int) -> Sequence[Depth]:
        body, length = _only(equation), equation.params["length"]
        outside, self.deepest = self.deepest, self.start
        self.follow(body, [self.start] * len(body.invars), times * length)
        after = joined + length * self.deepest
        self.deepest = np.maximum(outside, after) if self.deepest.any() else outside
        return [after] * len(equation.outvars)

    def _cond(self, equation: JaxprEqn, depths: list[Depth], times: int) -> Sequence[Depth]:
        before, branches, outputs = self.counts, [], []
        for branch in jaxprs_in_params(equation.params):
            self.counts = Counter()
            outputs.append(self.follow(branch, depths[1:], times))
            branches.append(self.counts)
        self.counts = before + functools.reduce(operator.or_, branches)
        return [self._join([depths[0], *depth]) for depth in zip(*outputs, strict=True)]

    def _refuse_counts(self, programs: list[Jaxpr], primitive: str) -> None:
        before, self.counts = self.counts, Counter()
        for program in programs:
            self.follow(program, [self.start] * len(program.invars), 1)
        if +self.counts:
            raise ValueError(
                f"{primitive}: a protocol runs inside it, and how often is not known from a trace; "
                "use scan, or fori_loop with bounds that are Python integers"
            )
        self.counts = before


def _only(equation: JaxprEqn) -> Jaxpr:
    (program,) = jaxprs_in_params(equation.params)
    return program


def _nbytes(equation: JaxprEqn, output: int) -> int:
    words = _aval(equation.outvars[output])
    return words.size * words.dtype.itemsize


def _aval(atom: Any) -> Any:
    """Shape and dtype; typed as anything, because JAX's own type for it is any abstract value."""
    return atom.aval
