"""The interpreter: runs a traced program on abstract values, for whoever's program it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from lpgan_jax.analysis.audit.ledger import Ledger
from lpgan_jax.analysis.audit.primitives import (
    BIJECTIVE,
    COMPUTED,
    CUTS,
    JOINS,
    KEY_PRIMITIVES,
    MOVES,
    STEERING,
    UNSTEERED,
    broadcast_in_dim,
    is_key,
    names_axis,
    padded,
    reaches_host,
    summed,
    whole_words,
)
from lpgan_jax.analysis.audit.values import (
    NO_WORD,
    PUBLIC,
    Numbering,
    Rest,
    Value,
    all_of,
    join,
    stacked,
)
from lpgan_jax.mpc.traces import CALLS, bodies, mark, scan_parts

_LARGEST_KNOWN = 2**12  # elements of a public value that is computed


class Interpreter:
    """Runs a traced program on abstract values and writes down what is wrong.

    A subclass says whose program it is (`where`, `axis_index`, `steered`), and what an exchange
    gives (`exchange`).

    Attributes:
        numbering: of all keys and words.
        ledger: of the words.
        problems: what is wrong, in order, each once.
        depth: how many branches that are not known, and loops of unknown length, we are in.
    """

    def __init__(self, numbering: Numbering, ledger: Ledger) -> None:
        self.numbering, self.ledger = numbering, ledger
        self.problems: dict[str, None] = {}
        self.depth = 0

    def problem(self, text: str) -> None:
        """Write down what is wrong, once."""
        self.problems[f"{self.where()}: {text}"] = None

    def where(self) -> str:
        """Where in the program we are."""
        raise NotImplementedError

    def axis_index(self) -> Value:
        """Which server we are."""
        return PUBLIC

    def steered(self, text: str) -> None:
        """Control flow or an address depends on a private value."""
        self.problem(text)

    def check_rules(self, equation: Any) -> None:
        """Whether something else would run where this program does not."""

    def exchange(self, equation: Any, operands: list[Value]) -> Value:
        """What a program has after an exchange."""
        raise NotImplementedError

    def sent(self, equation: Any, received: Value) -> Value:
        """What a message is to its sender from now on."""
        return received

    def call(self, kind: str, equation: Any, operands: list[Value]) -> list[Value] | None:
        """The results of another call that is marked; None to look at what it does."""
        if kind == "seeds":
            return [self._seeds(operands[0])]
        return None

    def _seeds(self, keys: Value) -> Value:
        if keys.ids is None:
            return Value(rest=keys.rest)
        seeds = [[self.numbering.seed(k, s) for s in range(2)] for k in keys.ids.reshape(-1)]
        return Value(np.asarray(seeds).reshape(*keys.ids.shape, 2), keys.rest)

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], operands: Sequence[Value]) -> list[Value]:
        """The abstract values of a program's results."""
        environment: dict[Any, Value] = {}

        def read(atom: Any) -> Value:
            return _constant(atom.val) if isinstance(atom, Literal) else environment[atom]

        inputs = [*map(_constant, consts), *operands]
        environment.update(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))
        last_uses = _last_uses(jaxpr)
        for equation, dead in zip(jaxpr.eqns, last_uses, strict=True):
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            environment.update(zip(equation.outvars, results, strict=True))
            if (
                sent := mark(equation)
            ) and sent.kind == "exchange":  # what was sent is known to both
                environment[equation.invars[0]] = self.sent(equation, results[0])
            for atom in dead:
                environment.pop(atom, None)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if (call := mark(equation)) is not None:
            if call.kind == "exchange":
                return [self.exchange(equation, operands)]
            if (made := self.call(call.kind, equation, operands)) is not None:
                return made
        self.check_rules(equation)
        if name in CALLS:
            return self.run(*bodies(params)[0], operands)
        if name == "cond" and operands[0].known is not None:
            branch = int(np.clip(operands[0].known, 0, len(params["branches"]) - 1))
            return self.run(*bodies(params)[branch], operands[1:])
        if name == "optimization_barrier":
            return operands
        if name == "scan":
            return self._scan(equation, operands)
        self._check_sides(equation, operands)
        if name == "while":
            return self.finish_equation(equation, operands, self._while(params, operands))
        results = self.finish_equation(equation, operands, self._results(equation, operands))
        if (of := summed(equation, operands)) is not None:
            return [result._replace(sum=of) for result in results]
        if any(map(is_key, equation.outvars)):
            return results
        return [self.fresh(result) for result in results]

    def finish_equation(
        self, equation: Any, operands: list[Value], results: list[Value]
    ) -> list[Value]:
        """The results, with what else is to be known of them."""
        return results

    def fresh(self, value: Value) -> Value:
        """The value, with a note if it is a fresh share: where results matter."""
        return value

    def _results(self, equation: Any, operands: list[Value]) -> list[Value]:
        """Of an equation that is neither a call nor a loop."""
        name, params = equation.primitive.name, equation.params
        if len(equation.outvars) == 1:
            result = self._known(equation, operands) or self._single(equation, operands)
            if result is not None:
                return [result]
        if name in CUTS and (cut := self._cut(name, params, operands[0])) is not None:
            return cut
        unknown = Value(rest=all_of(operands))
        if name == "cond":
            branches = [self._opaque(*body, operands[1:]) for body in bodies(params)]
            return [self.either(unknown, cases) for cases in zip(*branches, strict=True)]
        for body in bodies(params):  # what a reduction or a scatter applies
            self._opaque(*body, [unknown] * len(body[0].invars))
        return [unknown] * len(equation.outvars)

    def either(self, unknown: Value, cases: Sequence[Value]) -> Value:
        """A result of a branch, nobody knows which: what all depend on together."""
        return unknown

    def _cut(self, name: str, params: dict[str, Any], value: Value) -> list[Value] | None:
        """The parts of what is known, or padded (or of numbers of keys)."""
        if value.known is not None:
            return [Value(known=part) for part in CUTS[name](value.known, params)]
        if value.ids is None:
            return None
        return [Value(part, value.rest) for part in CUTS[name](value.ids, params)]

    def _check_sides(self, equation: Any, operands: list[Value]) -> None:
        """What an equation does besides its results."""
        name = equation.primitive.name
        if reaches_host(equation):
            self.problem(f"{name} reaches out to the host")
        if name != "axis_index" and names_axis(equation.params):
            self.problem(f"{name} talks to the other server outside of an exchange")
        if name not in KEY_PRIMITIVES | MOVES.keys() | CUTS.keys() | JOINS.keys():
            keys = zip(equation.invars, operands, strict=True)
            if any(is_key(atom) and value.ids is not None for atom, value in keys):
                self.problem(f"a key enters {name}, where the audit cannot follow its words")
        kind = "scatter" if name.startswith("scatter") else name
        if kind not in UNSTEERED and any(value.private for value in operands):
            self.steered(f"{name} of a private value: what it does with it is not known")
        if any(value.private for value in operands[STEERING.get(kind, slice(0))]):
            self.steered(f"{name} is steered by a private value")

    def _known(self, equation: Any, operands: list[Value]) -> Value | None:
        """The result itself, where it is public, small, and easily computed."""
        name, params = equation.primitive.name, equation.params
        shape = equation.outvars[0].aval.shape
        if name == "axis_index":
            return self.axis_index()
        large = math.prod(shape) > _LARGEST_KNOWN
        if large and name not in MOVES:  # a broadcast takes no memory
            return None
        if name == "iota":
            line = np.arange(shape[params["dimension"]], dtype=params["dtype"])
            return Value(known=broadcast_in_dim(line, shape, (params["dimension"],)))
        arrays = [value.known for value in operands]
        if not arrays or any(array is None for array in arrays):
            return None
        # NumPy and XLA agree on integers, but not on floats that are out of an integer's range.
        dtypes = [atom.aval.dtype for atom in (*equation.invars, *equation.outvars)]
        if any(getattr(dtype, "kind", None) not in ("i", "u", "b") for dtype in dtypes):
            return None
        known = [array for array in arrays if array is not None]
        with np.errstate(over="ignore"):
            if name in COMPUTED:
                return Value(known=COMPUTED[name](*known))
            if name in MOVES:
                return Value(known=MOVES[name](known[0], params))
            if name == "convert_element_type":
                return Value(known=known[0].astype(params["new_dtype"]))
        return None

    def _single(self, equation: Any, operands: list[Value]) -> Value | None:
        """The result of a primitive that may keep pads (or numbers of keys)."""
        name, params = equation.primitive.name, equation.params
        if name in KEY_PRIMITIVES:
            return self._keys(name, params, equation.outvars[0].aval.shape, operands)
        if name == "select_n":
            return self._select(operands)
        if name in BIJECTIVE and whole_words(*equation.invars, *equation.outvars):
            if len(operands) == 1:
                return Value(operands[0].ids, operands[0].rest)
            return self._combine(equation.outvars[0].aval.shape, *operands)
        if all(value.ids is None for value in operands):
            return None
        first = operands[0]
        if name in MOVES:
            assert first.ids is not None
            return Value(MOVES[name](first.ids, params), first.rest)
        if name in JOINS:
            shapes = [atom.aval.shape for atom in equation.invars]
            ids = [
                np.zeros(shape, np.int32) if value.ids is None else value.ids
                for value, shape in zip(operands, shapes, strict=True)
            ]
            rest = join(value.rest for value in operands)
            return Value(JOINS[name](ids, params), rest)
        same_width = whole_words(equation.invars[0], equation.outvars[0])
        if name in ("convert_element_type", "bitcast_convert_type") and same_width:
            return Value(first.ids, first.rest)
        if name == "pad" and first.ids is not None and operands[1].ids is None:
            wider = padded(first.ids, params)
            return None if wider is None else Value(wider, join([first.rest, operands[1].rest]))
        return None

    def _keys(
        self, name: str, params: dict[str, Any], shape: tuple[int, ...], operands: list[Value]
    ) -> Value:
        keys = operands[0]
        rest = join(value.rest for value in operands)
        if keys.ids is None:  # a key that is public, or of unknown origin
            return Value(rest=rest)
        numbers = keys.ids.reshape(-1).tolist()
        if name == "random_bits":
            size = math.prod(params["shape"])
            try:
                words = [self.draw(k, params["bit_width"], size) for k in numbers]
            except ValueError as error:
                self.problem(str(error))
                return Value(rest=Rest())
            joined = words[0] if len(words) == 1 else np.concatenate(words)
            return Value(joined.reshape(shape), rest)
        if name == "random_split":
            count = math.prod(params["shape"])
            children = [self.numbering.child(k, i) for k in numbers for i in range(count)]
            return Value(np.asarray(children).reshape(shape), rest)
        data = operands[1].known
        if data is None or data.ndim:
            self.problem("random_fold_in of a value that the audit does not know")
            return Value(rest=Rest())
        children = [self.numbering.child(k, ("fold_in", int(data))) for k in numbers]
        return Value(np.asarray(children).reshape(shape), rest)

    def draw(self, key: int, width: int, size: int) -> np.ndarray:
        """The numbers of the words that a key gives. ValueError as of `Numbering.draw`."""
        words = self.numbering.draw(key, width, size)
        self.ledger.cover(self.numbering.total)
        return words

    def _select(self, operands: list[Value]) -> Value | None:
        chosen = self._chosen(operands)
        if chosen is not None and chosen.ids is not None:
            for case in operands[1:]:  # S1 takes the words, S2 the correction
                if case.rest is not None and case.rest.dealt is not None:
                    self.ledger.pair(chosen.ids, case.rest.dealt)
        return chosen

    def _chosen(self, operands: list[Value]) -> Value | None:
        which, *cases = operands
        if which.known is None:
            return self._chosen_by(which, cases)
        low, high = (int(f(which.known)) if which.known.size else 0 for f in (np.min, np.max))
        if low == high:
            return Value(cases[low].ids, cases[low].rest)
        if all(case.ids is None for case in cases):
            return None
        shape = which.known.shape
        ids = [np.zeros(shape, np.int32) if case.ids is None else case.ids for case in cases]
        rest = join(case.rest for case in cases)
        return Value(np.choose(which.known.astype(np.int8), ids), rest)

    def _chosen_by(self, which: Value, cases: list[Value]) -> Value | None:
        """Of a choice that is not known: padded where all cases are, by the same word."""
        first, *others = (case.ids for case in cases)
        if first is None or any(ids is None for ids in others):
            return None
        same = np.all([first == ids for ids in others if ids is not None], axis=0)
        left_out = [case.ids for case in cases] if not same.all() else []
        rest = join([which.rest, *(case.rest for case in cases)], which.ids, *left_out)
        return Value(np.where(same, first, NO_WORD), rest)

    def _combine(self, shape: tuple[int, ...], x: Value, y: Value) -> Value:
        """x + y, x - y or x ^ y: padded by one word of either, and depending on the other."""
        rests = [x.rest, y.rest]
        if x.ids is None or y.ids is None:
            ids = y.ids if x.ids is None else x.ids
            return Value(None if ids is None else np.broadcast_to(ids, shape), join(rests))
        # Either would do. Masks are written on the right, as in x - mask.
        left, right = np.broadcast_to(x.ids, shape), np.broadcast_to(y.ids, shape)
        spent = self.ledger.spent
        left_pads = (left != NO_WORD) & ((right == NO_WORD) | (spent[right] & ~spent[left]))
        other = np.where(left_pads, right, left)
        return Value(np.where(left_pads, left, right), join(rests, other))

    # Loops -------------------------------------------------------------------------------------

    def _opaque(self, body: Jaxpr, consts: Sequence[Any], operands: Sequence[Value]) -> list[Value]:
        """Run what is executed an unknown number of times: no pads enter."""
        self.depth += 1
        try:
            entering = [Value(rest=all_of([v]), holders=v.holders) for v in operands]
            return self.run(body, consts, entering)
        finally:
            self.depth -= 1

    def _loop(
        self, body: tuple[Jaxpr, Sequence[Any]], operands: list[Value], first: int, count: int
    ) -> list[Value]:
        """Results of a body whose operands first, ..., first + count - 1 come from its results.

        What is private stays so; every private result depends on all operands.
        """
        everything = Value(rest=all_of(operands) or Rest())
        operands, carried = list(operands), range(first, first + count)
        while True:
            results = self._opaque(*body, operands)
            private = [result.private for result in results]
            for i, operand in enumerate(carried):
                private[i] |= operands[operand].private
            changed = [o for i, o in enumerate(carried) if private[i] > operands[o].private]
            if not changed:
                return [everything if p else PUBLIC for p in private]
            for operand in changed:
                operands[operand] = everything

    def _scan(self, equation: Any, operands: list[Value]) -> list[Value]:
        """Every execution of the body, since each must have masks of its own."""
        (body,) = bodies(equation.params)
        sliced, carried = scan_parts(equation)
        fixed, lines = operands[: len(operands) - sliced], operands[len(operands) - sliced :]
        consts, carry = fixed[: len(fixed) - carried], fixed[len(fixed) - carried :]
        order = range(equation.params["length"])
        results: list[list[Value]] = [[] for _ in order]
        for i in reversed(order) if equation.params["reverse"] else order:
            made = self.run(*body, [*consts, *carry, *(line.row(i) for line in lines)])
            carry, results[i] = made[:carried], made[carried:]
        stacks = [
            stacked([result[place] for result in results], atom.aval.shape[1:])
            for place, atom in enumerate(equation.outvars[carried:])
        ]
        return [*carry, *stacks]

    def _while(self, params: dict[str, Any], operands: list[Value]) -> list[Value]:
        (body,), (predicate,) = (bodies({"": params[f"{n}_jaxpr"]}) for n in ("body", "cond"))
        for_predicate = params["cond_nconsts"]
        consts = operands[for_predicate : for_predicate + params["body_nconsts"]]
        carry = operands[for_predicate + len(consts) :]
        carried = self._loop(body, [*consts, *carry], len(consts), len(carry))
        (again,) = self._opaque(*predicate, [*operands[:for_predicate], *carried])
        if again.private:
            self.steered("the trip count of a while loop depends on a private value")
        return carried


def _constant(value: Any) -> Value:
    """A constant of a program: public, whatever it is."""
    is_key = jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended)
    small = math.prod(np.shape(value)) <= _LARGEST_KNOWN
    return Value(known=np.asarray(value)) if small and not is_key else PUBLIC


def _last_uses(jaxpr: Jaxpr) -> list[list[Any]]:
    """For each equation, what nobody reads after it."""
    seen = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    uses: list[list[Any]] = []
    for equation in reversed(jaxpr.eqns):
        names = {a for a in (*equation.invars, *equation.outvars) if not isinstance(a, Literal)}
        uses.append(list(names - seen))
        seen |= names
    return uses[::-1]
