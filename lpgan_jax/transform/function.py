"""`secure`: a JAX function as a function of secret shares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc.fixed_point import FixedPoint, check_range, encode, require_x64
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.range_reduction import TOP
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret, is_secret
from lpgan_jax.mpc.share_trees import shapes_of
from lpgan_jax.mpc.shares import share_words
from lpgan_jax.transform import (  # noqa: F401
    control,
    definitions,
    evaluate,
    lookups,
    permutations,
)
from lpgan_jax.transform.arguments import Arguments, Declaration, Leaf
from lpgan_jax.transform.check import Difference, first_difference
from lpgan_jax.transform.explain import Explanation, explained
from lpgan_jax.transform.fuse import fuse_roots, fuse_sums
from lpgan_jax.transform.graph import Builder, Graph, Node, argument
from lpgan_jax.transform.plain import opened, widened
from lpgan_jax.transform.plan import Plan, input_scales
from lpgan_jax.transform.refusals import require_rules, translated
from lpgan_jax.transform.rewrites import REWRITES
from lpgan_jax.transform.rules import RULES
from lpgan_jax.transform.shared import Shared, is_shared
from lpgan_jax.transform.values import Setting


@dataclass(frozen=True)
class Program:
    """A traced function, for arguments of certain shapes.

    Attributes:
        graph: what it does.
        leaves: of its arguments, in order.
        structure: of the outputs' tree.
        hits: how often each rewrite applied.
        plan: how its values are kept.
        pairs: (result, argument) nodes of what is handed on to the next call.
        counters: the same of what is public.
        closed_over: arrays that the function closes over, such as "float64[3]": public constants.
        unwatched: as of `Setting`.
    """

    graph: Graph
    leaves: tuple[Leaf, ...]
    structure: Any
    hits: dict[str, int]
    plan: Plan
    pairs: Sequence[tuple[Node, Node]] = ()
    counters: Sequence[tuple[Node, Node]] = ()
    closed_over: tuple[str, ...] = ()
    unwatched: frozenset[int] = frozenset()

    @functools.cached_property
    def setting(self) -> Setting:
        """The plan, of these nodes."""
        formats = self.plan.by_node(self.graph)
        return Setting(self.plan.frac_bits, formats, unwatched=self.unwatched)

    @functools.cached_property
    def _bits(self) -> dict[int, int]:
        return input_scales(self.graph, self.setting, self.pairs)

    @functools.cached_property
    def scales(self) -> tuple[int, ...]:
        """Fraction bits of the secret inputs, in order."""
        return tuple(self._bits[id(n)] for n in self.graph.inputs if n.secret)

    @functools.cached_property
    def log_ranges(self) -> tuple[int, ...]:
        """The range of each secret input: |value| < 2^range, as its examples or its scale say."""
        forms = [self.setting.format(n) for n in self.graph.inputs if n.secret]
        return tuple(
            form.log_range if form.measured else TOP - scale
            for form, scale in zip(forms, self.scales, strict=True)
        )

    @functools.cached_property
    def output_scales(self) -> tuple[int, ...]:
        """Fraction bits of the secret outputs, in order."""
        return tuple(self._bits[id(n)] for n in self.graph.outputs if n.secret)

    @functools.cached_property
    def nodes(self) -> list[Node]:
        """All operations, in order."""
        return self.graph.nodes()

    def public_values(self, leaves: Sequence[Any]) -> dict[int, Any]:
        """All public values, by the id of their nodes, from the public leaves (in order)."""
        inputs = [n for n in self.graph.inputs if not n.secret]
        given = {id(n): _widened(v, n.dtype) for n, v in zip(inputs, leaves, strict=True)}
        return evaluate.plain_values(self.nodes, given)

    def public(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """What the servers must know, from the public leaves (in order): float64 or integers."""
        known = self.public_values(leaves)
        return [jnp.asarray(known[id(n)]) for n in self.frontier]

    def next_public(self, leaves: Sequence[Any]) -> list[Any]:
        """The public leaves of the next call, from those of this one (in order)."""
        known = self.public_values(leaves)
        after = {id(own): known[id(result)] for result, own in self.counters}
        inputs = [n for n in self.graph.inputs if not n.secret]
        return [after.get(id(n), v) for n, v in zip(inputs, leaves, strict=True)]

    @functools.cached_property
    def frontier(self) -> list[Node]:
        """Public values that secret operations take, or that come out."""
        return evaluate.frontier(self.nodes, self.graph.outputs)

    def run(self, party: Seat, secrets: Sequence[Secret], public: Sequence[Any]) -> list[Secret]:
        """The program of a server: (party, secrets, public) -> secret outputs."""
        scales = self.output_scales
        return evaluate.run(self.graph, party, secrets, public, self.setting, scales)

    def __call__(self, party: Seat, secrets: Any, public: Sequence[Any]) -> Any:
        """As `run`, of a pytree of secrets: the outputs' tree, with None for what is public."""
        remaining = iter(self.run(party, jax.tree.leaves(secrets, is_leaf=is_secret), public))
        leaves = [next(remaining) if n.secret else None for n in self.graph.outputs]
        return jax.tree.unflatten(self.structure, leaves)

    def outputs(self, secrets: Sequence[Any], public: Sequence[Any]) -> Any:
        """The outputs' tree, of secret outputs and the frontier."""
        remaining = iter(secrets)
        known = {id(n): v for n, v in zip(self.frontier, public, strict=True)}
        leaves = [
            next(remaining) if n.secret else (n.value if n.value is not None else known[id(n)])
            for n in self.graph.outputs
        ]
        return jax.tree.unflatten(self.structure, leaves)


def _widened(value: Any, traced: Any) -> Any:
    """A public argument as float64, or in the type that it was traced with."""
    if jnp.issubdtype(traced, jax.dtypes.extended):
        return value
    return jnp.asarray(value).astype(widened(np.dtype(traced)))


class Secure:
    """A function whose arguments are secret; made by `secure`."""

    def __init__(
        self,
        function: Callable[..., Any],
        public: Sequence[str | int] = (),
        static: Sequence[str | int] = (),
        carry: Mapping[int, int] | None = None,
        frac_bits: int = 18,
        calibrate: Sequence[Any] | None = None,
        plan: Plan | None = None,
    ) -> None:
        """See `secure`."""
        if calibrate is not None and plan is not None:
            raise ValueError("calibrate, plan: expected one of them, not both")
        if calibrate is not None and _is_abstract(calibrate):
            raise TypeError("calibrate: expected real arrays, got jax.ShapeDtypeStruct")
        if plan is not None and plan.frac_bits != frac_bits:
            raise ValueError(f"plan: made for {plan.frac_bits} fraction bits, not {frac_bits}")
        functools.update_wrapper(self, function)
        del self.__dict__["__wrapped__"]  # whose signature has no key
        self._function = function
        self._declared = Declaration(function, public, static)
        self._carry = dict(carry or {})
        self._fxp = FixedPoint(frac_bits)
        self._examples = calibrate
        self._plan = plan
        self._programs: dict[Any, Program] = {}

    # Arguments ------------------------------------------------------------------------------------

    def _parted(self, args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The (secret, public) leaves of the arguments, in order."""
        values, arguments = self._declared.look_at(args)
        pairs = list(zip(values, arguments.leaves, strict=True))
        return [v for v, x in pairs if not x.public], [v for v, x in pairs if x.public]

    def program(self, *args: Any) -> Program:
        """The traced function, for arguments of these shapes; kept."""
        return self._program(args, self.plan)

    @property
    def plan(self) -> Plan | None:
        """What examples told about the function's values; None if there are none."""
        if self._plan is None and self._examples is not None:
            program = self._program(self._examples, None)
            secret, public = self._parted(self._examples)
            inputs = [n for n in program.graph.inputs if n.secret]
            given = {
                id(n): jnp.asarray(v, jnp.float64) for n, v in zip(inputs, secret, strict=True)
            }
            given |= program.public_values(public)
            frac_bits = self._fxp.frac_bits
            self._plan = Plan.measured(program.graph, frac_bits, given, program.pairs)
        return self._plan

    def _program(self, args: Sequence[Any], plan: Plan | None) -> Program:
        require_x64()
        _, key = self._declared.look_at(args)
        if key not in self._programs:
            self._programs[key] = self._trace(key)
        program = self._programs[key]
        if plan is not None and program.plan is not plan:
            program = dataclasses.replace(program, plan=plan)
            _ = program.setting  # an error if it is the plan of another program
            self._programs[key] = program
        return program

    def traced(self, *args: Any) -> Any:
        """The function's own jaxpr, traced anew, for arguments of these shapes."""
        return self._traced(self._declared.look_at(args)[1])[0]

    def _traced(self, arguments: Arguments) -> tuple[Any, Any]:
        """(the function's jaxpr, the shapes of its results)."""
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in arguments.leaves]
        try:
            with jax.enable_x64(False):  # as the ordinary code that it is
                traced: tuple[Any, Any] = jax.make_jaxpr(
                    lambda *flat: self._function(*arguments.together(flat)), return_shape=True
                )(*shapes)
        except Exception as error:
            if (better := translated(error)) is None:
                raise
            raise better from error
        return traced

    def _trace(self, arguments: Arguments) -> Program:
        traced, results = self._traced(arguments)
        inputs = [argument(x.shape, x.dtype, not x.public, x.name) for x in arguments.leaves]
        builder = Builder(REWRITES)
        with jax.ensure_compile_time_eval():  # constants, also where `step` itself is traced
            outputs = builder.inline(*opened(traced), inputs)
        pairs, counters = [], []
        for after, before in self._carried(arguments, results):
            result, own = outputs[after], inputs[before]
            if result.shape != own.shape:
                raise ValueError(
                    f"carry: {own.place} has shape {own.shape}, what follows it {result.shape}"
                )
            if own.secret:
                outputs[after] = builder.kept_secret(result)
                pairs.append((outputs[after], own))
            elif result.secret:
                raise ValueError(f"carry: {own.place} is public, but what follows it is secret")
            else:
                counters.append((result, own))
        graph = Graph(inputs, outputs)
        builder.hits["fuse_sums"] = fuse_sums(graph)
        builder.hits["fuse_roots"] = fuse_roots(graph)
        require_rules(graph, RULES)
        structure = jax.tree.structure(results)
        plan = Plan.default(graph, self._fxp.frac_bits)
        arrays = [v for v in opened(traced)[1] if np.size(v) > 1]
        closed = tuple(f"{v.dtype}{list(np.shape(v))}" for v in arrays)
        return Program(
            graph, arguments.leaves, structure, builder.hits, plan, pairs, counters, closed
        )

    def _carried(self, arguments: Arguments, results: Any) -> list[tuple[int, int]]:
        """(output leaf, argument leaf) of what is handed on to the next call."""
        numbers = arguments.together(range(len(arguments.leaves)))
        outputs = jax.tree.unflatten(
            jax.tree.structure(results), range(len(jax.tree.leaves(results)))
        )
        several, pairs = type(outputs) in (tuple, list), []  # a named tuple is one result
        for output, number in self._carry.items():
            after = jax.tree.leaves(outputs[output] if several else outputs)
            before = jax.tree.leaves(numbers[number])
            if len(after) != len(before):
                raise ValueError(
                    f"carry: result {output} has {len(after)} arrays, argument {number} "
                    f"{len(before)}"
                )
            pairs += list(zip(after, before, strict=True))
        return pairs

    # What is done with it -------------------------------------------------------------------------

    def share(self, key: jax.Array, *args: Any) -> tuple[Any, ...]:
        """DS's splitting of the arguments; what is public or shared already stays as it is."""
        values, arguments = self._declared.look_at(args)
        program = self.program(*args)
        keys = jax.random.split(key, max(1, len(program.scales)))
        scales = iter(zip(keys, program.scales, program.log_ranges, strict=False))
        shared: list[Any] = []
        for value, leaf in zip(values, arguments.leaves, strict=True):
            if leaf.public:
                shared.append(value)
                continue
            own, scale, log_range = next(scales)
            if is_shared(value):
                shared.append(value)
                continue
            if not isinstance(value, jax.core.Tracer):
                check_range(leaf.name, value, scale, log_range)
            words = share_words(own, encode(value, scale))
            shared.append(Shared(words, scale, leaf.dtype))
        return arguments.together(shared)

    def __call__(self, key: jax.Array, *shared: Any) -> Any:
        """The function of shares, both servers and DS in one program."""
        program = self.program(*shared)
        given, known = self._parted(shared)
        secret = [x for x in program.leaves if not x.public]
        for leaf, value in zip(secret, given, strict=True):
            if not is_shared(value):
                raise TypeError(f"{leaf.name}: secret, but not shared: hand in what share gives")
        public = program.public(known)
        secrets = [Secret(v.words, v.frac_bits) for v in given]
        results = simulate(program.run, key, secrets, public)
        types = [n.dtype for n in program.graph.outputs if n.secret]
        both = zip(results, types, strict=True)
        return program.outputs([Shared(s.share, s.frac_bits, t) for s, t in both], public)

    def check(self, *args: Any, tolerance: float = 8.0) -> Difference | None:
        """Compare each operation's rule with JAX itself, in float64, on these arguments.

        Args:
            args: real values.
            tolerance: LSB, for values up to 1 in magnitude; in proportion beyond.

        Returns:
            The first operation that differs, or None.
        """
        program = self.program(*args)
        secret, public = self._parted(args)
        return first_difference(
            program.graph,
            [jnp.asarray(v, jnp.float64) for v in secret],
            program.scales,
            program.public_values(public),
            program.setting,
            tolerance,
        )

    def explain(self, *args: Any) -> Explanation:
        """What becomes of each operation: scale, bits left, rounds, bytes.

        Args:
            args: real values, which are run in float64 to see how much room they leave; or
                `jax.ShapeDtypeStruct`s (then the examples of `calibrate`, if of these shapes).
        """
        program, secrets, public = self.program(*args), *self.parts(*args)[1:]
        if _is_abstract(args) and self._examples is not None:
            args = tuple(self._examples) if self.program(*self._examples) is program else args
        if _is_abstract(args):
            return explained(program, secrets, public, None)
        values, known = self._parted(args)
        return explained(program, secrets, program.public(known), values)

    def parts(self, *args: Any) -> tuple[Callable[..., Any], Any, Any]:
        """(function, secrets, public) as `party.simulate` takes them, of shapes."""
        program = self.program(*args)
        secret, public = self._parted(args)
        secrets = [
            shapes_of(np.shape(v), scale) for v, scale in zip(secret, program.scales, strict=True)
        ]
        return program.run, secrets, jax.eval_shape(program.public, public)


def _is_abstract(args: Any) -> bool:
    return any(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(args))


def secure(
    function: Callable[..., Any],
    *,
    public: Sequence[str | int] = (),
    static: Sequence[str | int] = (),
    carry: Mapping[int, int] | None = None,
    frac_bits: int = 18,
    calibrate: Sequence[Any] | None = None,
    plan: Plan | None = None,
) -> Secure:
    """A JAX function under sharing: the same code, with secret arguments and results.

    Args:
        function: of pytrees of arrays; ordinary float32 JAX, with `jax.grad`, Flax and optax.
        public: arguments that all may know, or parts of them, by name ("rate"), position or path
            ("batch.rate", "state.opt_state[0].decay", "state['w']"); the step counters of optax
            states, `count`, are public anyway. A key must be, and is none of `lpgan_jax.key`: what
            it generates is known to all.
        static: arguments that are handed to the function as they are, by name or position; each
            value of them, which must have a hash, makes a program of its own.
        carry: {output: argument} of outputs that are that argument in the next call.
        frac_bits: fraction bits f of what is not measured.
        calibrate: example arguments, real arrays: the function is run on them once, in float64, and
            each value gets the fraction bits that its size leaves room for. These are public: of
            private data they tell the largest magnitude of each value, to a power of two.
        plan: such bits, from `Plan.load`.

    Arguments are traced in 32 bits. Integers and booleans are shared as such, without a fraction.

    Raises:
        ValueError: both are given, or the plan is for other fraction bits.

    Its methods raise `NotSecure` for what cannot be done under sharing, with the user's line and
    what to write instead; ValueError for a declared argument that is not there; TypeError for one
    that is no array of real numbers.
    """
    return Secure(function, public, static, carry, frac_bits, calibrate, plan)
