"""A traced function as a graph of operations: calls inlined, constants folded, equal nodes shared.

What depends on a secret argument is secret; the rest is public, and stays ordinary JAX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from lpgan_jax.transform import plain
from lpgan_jax.transform.plain import Plain

Shape = tuple[int, ...]


class NotSecure(NotImplementedError):
    """The function does something that cannot be done under sharing, or not yet."""


@dataclass(frozen=True)
class Place:
    """Where in the user's code an operation stands.

    Attributes:
        module: JAX's name stack, such as "Generator.bn0", or "Generator.bn0.backward".
        line: "file:line (function)" of the user's code; "" if it is not known.
        backward: whether it is part of a derivative.
    """

    module: str = ""
    line: str = ""
    backward: bool = False

    def __str__(self) -> str:
        return " at ".join(filter(None, (self.module, self.line))) or "the function"


@dataclass(eq=False)
class Node:
    """One operation and its result; of an operation of several results, each is a node "output".

    Attributes:
        operation: JAX's name of the primitive, or one of ours; "input" and "constant".
        inputs: what it takes.
        params: JAX's parameters of the primitive, or ours.
        shape: of the result.
        dtype: of the result, as it was traced.
        secret: whether it depends on a secret argument.
        plain: the operation as a function of float64 arrays; of an operation with several results,
            of which it returns the list.
        place: where it stands.
        value: of a constant: an array (of one element repeated, without memory of its own).
        results: of an operation with several results: theirs.
    """

    operation: str
    inputs: tuple[Node, ...]
    params: dict[str, Any]
    shape: Shape
    dtype: Any
    secret: bool
    plain: Plain
    place: Place = Place()
    value: np.ndarray | None = None
    results: tuple[jax.ShapeDtypeStruct, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_integer(self) -> bool:
        """Whether its elements are integers or booleans."""
        return not jax.dtypes.issubdtype(self.dtype, np.inexact)

    @property
    def scalar(self) -> float | None:
        """The element of a constant that is one number, repeated; else None."""
        if self.value is None or not self.value.size:
            return None
        if self.value.size == 1 or not any(
            s and n > 1 for s, n in zip(self.value.strides, self.value.shape, strict=True)
        ):
            return self.value.reshape(-1)[0].item()
        return None

    def __repr__(self) -> str:
        return f"<{self.operation} {self.dtype}{list(self.shape)}{' secret' * self.secret}>"


@dataclass
class Graph:
    """A function of arrays.

    Attributes:
        inputs: its arguments, in order.
        outputs: its results, in order.
    """

    inputs: list[Node]
    outputs: list[Node]

    def nodes(self) -> list[Node]:
        """All that the outputs need, each after what it takes (and all inputs)."""
        order: dict[int, Node] = {}
        stack: list[tuple[Node, bool]] = [(n, False) for n in reversed(self.outputs)]
        for node in self.inputs:
            order[id(node)] = node
        while stack:
            node, ready = stack.pop()
            if id(node) in order:
                continue
            if ready:
                order[id(node)] = node
                continue
            stack.append((node, True))
            stack.extend((n, False) for n in reversed(node.inputs) if id(n) not in order)
        return list(order.values())


def _is_key(node: Node) -> bool:
    return jax.dtypes.issubdtype(node.dtype, jax.dtypes.extended)


def constant(value: Any, dtype: Any = None) -> Node:
    """A public value that is known while tracing."""
    array = np.asarray(value)
    dtype = np.dtype(dtype or array.dtype)
    kept = plain.literal(array, dtype)
    return Node(
        "constant",
        (),
        {},
        array.shape,
        dtype,
        False,
        lambda: kept,
        value=kept,
    )


def argument(shape: Shape, dtype: Any, secret: bool, name: str) -> Node:
    """An argument of the function."""
    params = {"name": name}

    def missing() -> Any:
        raise TypeError(f"{name}: an argument has no value of its own")

    return Node("input", (), params, tuple(shape), dtype, secret, missing, Place(name))


Rewrite = Callable[["Builder", Node], Node | None]


@dataclass
class Builder:
    """Makes nodes: folds constants, rewrites, and returns the same node for the same operation.

    Attributes:
        rewrites: {operation: rules}, each of which may give another node for one.
        hits: how often each rule did, by its name.
        most: words of the largest constant that a function may close over.
    """

    rewrites: dict[str, list[Rewrite]] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)
    most: int = 1024
    place: Place = Place()
    _shared: dict[Any, Node] = field(default_factory=dict)
    _constants: dict[Any, Node] = field(default_factory=dict)

    def constant(self, value: Any, dtype: Any = None) -> Node:
        """A constant; what is one number, repeated or not, is shared."""
        array = np.asarray(value)
        if array.size > 1 and (array == array.flat[0]).all():
            array = np.broadcast_to(array.flat[0], array.shape)
        node = constant(array, dtype)
        if node.scalar is None:
            return node
        return self._constants.setdefault((node.shape, node.dtype, node.scalar), node)

    def add(
        self,
        operation: str,
        inputs: Sequence[Node],
        result: Any,
        plain: Plain,
        params: Mapping[str, Any] | None = None,
        results: Sequence[jax.ShapeDtypeStruct] = (),
    ) -> Node:
        """The node of an operation; another one that gives the same, if there is a better.

        Args:
            operation: its name.
            inputs: what it takes.
            result: something with the shape and dtype of its result.
            plain: see `Node.plain`.
            params: see `Node.params`.
            results: of several results, in the place of `result`.
        """
        node = Node(
            operation,
            tuple(inputs),
            dict(params or {}),
            tuple(result.shape),
            result.dtype,
            any(n.secret for n in inputs),
            plain,
            self.place,
            results=tuple(results),
        )
        secret = node.secret
        known = all(n.value is not None for n in inputs) and not _is_key(node)
        if known and not secret and not results:
            return self._folded(node)
        for rule in () if _is_key(node) else self.rewrites.get(operation, ()):
            better = rule(self, node)
            if better is not None:
                self.hits[rule.__name__] = self.hits.get(rule.__name__, 0) + 1
                return better
        return self._shared.setdefault(_key(operation, inputs, node.shape, node.params), node)

    def known(self, operation: str, *inputs: Node) -> Node | None:
        """The node of an elementwise operation without parameters, if there is one."""
        shape = np.broadcast_shapes(*(n.shape for n in inputs))
        return self._shared.get(_key(operation, inputs, shape, {}))

    def _folded(self, node: Node) -> Node:
        scalars = [n.scalar for n in node.inputs]
        uniform = all(s is not None for s in scalars) and node.size > 1
        if node.operation in _ELEMENTWISE and uniform:
            single = np.asarray(node.plain(*scalars)).astype(plain.widened(np.dtype(node.dtype)))
            return self.constant(np.broadcast_to(single.reshape(()), node.shape), node.dtype)
        if node.operation in MOVES and scalars[0] is not None:
            value = node.inputs[0].value
            assert value is not None
            return self.constant(np.broadcast_to(value.reshape(-1)[0], node.shape), node.dtype)
        values = [n.value for n in node.inputs]
        return self.constant(np.asarray(node.plain(*values)), node.dtype)

    def output(self, node: Node, index: int) -> Node:
        """One of the results of an operation that has several."""
        result = node.results[index]
        keys = jax.dtypes.issubdtype(result.dtype, jax.dtypes.extended)
        if not node.secret and not keys and all(n.value is not None for n in node.inputs):
            values = node.plain(*(n.value for n in node.inputs))
            return self.constant(np.asarray(values[index]), result.dtype)
        return self.add("output", [node], result, lambda v: v[index], {"index": index})

    def kept_secret(self, node: Node) -> Node:
        """A node that counts as secret even if it is not."""
        if node.secret:
            return node
        kept = Node("keep_secret", (node,), {}, node.shape, node.dtype, True, lambda v: v)
        kept.place = self.place
        return kept

    # A jaxpr ------------------------------------------------------------------------------------

    def inline(self, program: Jaxpr, consts: Sequence[Any], inputs: Sequence[Node]) -> list[Node]:
        """The nodes of a program's outputs."""
        known: dict[Any, Node] = dict(zip(program.invars, inputs, strict=True))
        for variable, value in zip(program.constvars, consts, strict=True):
            known[variable] = value if isinstance(value, Node) else self._closed_over(value)

        def read(atom: Any) -> Node:
            if isinstance(atom, Literal):
                aval: Any = atom.aval
                return self.constant(np.asarray(atom.val), aval.dtype)
            return known[atom]

        for equation in program.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in program.outvars]

    def call(self, function: Callable[..., Any], inputs: Sequence[Node]) -> list[Node]:
        """The results of a JAX function of nodes, inlined; what it closes over is constant."""
        with jax.enable_x64(False):  # as ordinary code
            program = jax.make_jaxpr(function)(
                *(jax.ShapeDtypeStruct(n.shape, n.dtype) for n in inputs)
            )
        opened, consts = plain.opened(program)
        return self.inline(opened, [self.constant(np.asarray(c)) for c in consts], inputs)

    def _closed_over(self, value: Any) -> Node:
        if isinstance(value, jax.core.Tracer):
            raise NotSecure(
                "the function closes over a value that is being traced: make it an argument"
            )
        if jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.extended):
            raise NotSecure(
                "the function closes over a key: make it a public argument, if all may know what "
                "it generates; or draw outside and hand the numbers in"
            )
        if np.size(value) > self.most:
            raise NotSecure(
                f"the function closes over an array of shape {np.shape(value)}, which would be a "
                "public constant of the program: make it an argument (a public one, if all may "
                "know it)"
            )
        return self.constant(np.asarray(value))

    def _equation(self, equation: JaxprEqn, inputs: list[Node]) -> list[Node]:
        outer, self.place = self.place, _place(equation, self.place)
        try:
            if (inner := plain.called(equation)) is not None:
                return self.inline(*inner, inputs)
            special = _STRUCTURE.get(equation.primitive.name)
            if special is not None and (nodes := special(self, equation, inputs)) is not None:
                return nodes
            avals: list[Any] = [v.aval for v in equation.outvars]
            function = plain.operation(equation)
            name = equation.primitive.name
            params = {k: v for k, v in equation.params.items() if "sharding" not in k}
            if len(avals) == 1 and not equation.primitive.multiple_results:
                return [self.add(name, inputs, avals[0], function, params)]
            results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
            node = self.add(name, inputs, SEVERAL, function, params, results)
            return [self.output(node, i) for i in range(len(avals))]
        finally:
            self.place = outer


MOVES = frozenset(
    ["reshape", "broadcast_in_dim", "transpose", "squeeze", "expand_dims", "slice", "rev"]
)
"""Operations that move elements, repeat them or leave some out."""

SEVERAL = jax.ShapeDtypeStruct((), np.int32)  # what stands for the shape of several results

Structure = Callable[[Builder, JaxprEqn, list[Node]], list[Node] | None]
_STRUCTURE: dict[str, Structure] = {}


def structure(*primitives: str) -> Callable[[Structure], Structure]:
    """What becomes of primitives that are no operations: loops, say, or what others define."""

    def entered(function: Structure) -> Structure:
        _STRUCTURE.update(dict.fromkeys(primitives, function))
        return function

    return entered


_ELEMENTWISE = frozenset(
    [
        "abs",
        "add",
        "add_any",
        "and",
        "convert_element_type",
        "copy",
        "div",
        "eq",
        "exp",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "pow",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tanh",
        "xor",
    ]
)


_COMMUTATIVE = frozenset(["add", "add_any", "max", "min", "mul"])


def _key(
    operation: str, inputs: Sequence[Node], shape: Shape, params: Mapping[str, Any]
) -> tuple[Any, ...]:
    """What is equal for operations that give the same."""
    operands = tuple(map(id, inputs))
    if operation in _COMMUTATIVE:
        operands = tuple(sorted(operands))
    return operation, operands, shape, _hashable({k: v for k, v in params.items() if v is not None})


def _hashable(value: Any) -> Any:
    """Something that is equal for equal parameters."""
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(value.items()))
    if isinstance(value, tuple | list):
        return tuple(map(_hashable, value))
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype, value.tobytes()
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


_LIBRARIES = tuple(
    str(Path(module.__file__).parent) for module in (jax, flax, optax) if module.__file__
)
_OWN = str(Path(__file__).parent)


def _place(equation: JaxprEqn, call: Place) -> Place:
    """Where an equation comes from, for messages and names; `call`: that its program is part of."""
    info = equation.source_info
    stack = "/".join(filter(None, (call.module, str(info.name_stack))))
    backward = call.backward or "transpose(" in stack
    return Place(_module(stack), _line(info.traceback) or call.line, backward)


def _module(stack: str) -> str:
    """transpose(jvp(Generator))/bn0 as Generator.bn0.backward."""
    backward, parts = "transpose(" in stack or ".backward" in stack, []
    stack = stack.replace(".backward", "").replace(".", "/")
    for part in stack.split("/"):
        while part.endswith(")") and "(" in part:
            part = part.partition("(")[2][:-1]
        parts += [part] * bool(part)
    return ".".join([*parts, "backward"] if backward and parts else parts)


def is_users(file_name: str) -> bool:
    """Whether code is that of a user, not of a library."""
    return not file_name.startswith((*_LIBRARIES, _OWN, "<"))


def _line(traceback: Any) -> str:
    for frame in _frames(traceback):
        if is_users(frame.file_name):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return ""


def _frames(traceback: Any) -> Iterable[Any]:
    return () if traceback is None else traceback.frames
