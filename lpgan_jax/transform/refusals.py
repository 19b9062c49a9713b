"""What cannot be done under sharing, and what to write instead."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lpgan_jax.transform.graph import Builder, Graph, Node, NotSecure, Place, is_users, structure

_PUBLIC = (
    "what all may know and decides about the program is a static argument (static=), or a value of "
    "the Python program around it"
)

_ERRORS: dict[type[Exception], tuple[str, str]] = {
    jax.errors.TracerBoolConversionError: (
        "a secret decides what is done (if, while, and, or, bool())",
        f"select with jnp.where or jax.lax.cond, which do both; {_PUBLIC}",
    ),
    jax.errors.TracerIntegerConversionError: (
        "a secret is taken as a Python integer (an index of a list, a range, a size)",
        f"multiply with jax.nn.one_hot of it, or select with jnp.where; {_PUBLIC}",
    ),
    jax.errors.TracerArrayConversionError: (
        "a secret is taken as a NumPy array",
        "use jax.numpy in the place of numpy",
    ),
    jax.errors.NonConcreteBooleanIndexError: (
        "a secret mask as an index, whose result has a secret size",
        "keep all elements and multiply with the mask, or use jnp.where with three arguments",
    ),
    jax.errors.ConcretizationTypeError: (
        "a secret is taken as a number that must be known while the function is traced (a size, "
        "an axis, a number of steps, float() or int())",
        _PUBLIC,
    ),
}

_RANDOM = (
    "draw outside and hand the numbers in, as an argument (noise that hides something is a secret "
    "one); or hand in a public key, if all may know what it generates"
)
_BITS = "a secret's bits are not at hand: use comparisons and sums of numbers"
_DECOMPOSED = "use products, sums and divisions of its elements, or do it outside"
_ONE_HOT = (
    "one may name whole rows along one axis, to read them or to add to them; anything else is a "
    "product with jax.nn.one_hot of it"
)
_INSTEAD = {
    "fft": "multiply with the real and the imaginary part of jnp.fft.fft(jnp.eye(n))",
    "complex": "keep real and imaginary parts apart",
    **dict.fromkeys(
        ["cholesky", "lu", "qr", "householder_product", "eig", "eigh", "svd", "schur"], _DECOMPOSED
    ),
    **dict.fromkeys(["triangular_solve", "tridiagonal_solve"], _DECOMPOSED),
    **dict.fromkeys(
        [
            "bitcast_convert_type",
            "shift_left",
            "shift_right_logical",
            "shift_right_arithmetic",
            "population_count",
            "clz",
            "nextafter",
            "reduce_xor",
            "and",
            "or",
            "xor",
            "not",
        ],
        _BITS,
    ),
    **dict.fromkeys(
        ["pure_callback", "io_callback", "debug_callback", "debug_print"],
        "return the value, and look at it after lp.reveal",
    ),
    **dict.fromkeys(
        [
            "random_seed",
            "random_wrap",
            "random_bits",
            "random_split",
            "random_fold_in",
            "random_unwrap",
            "random_gamma",
            "random_clone",
            "threefry2x32",
        ],
        _RANDOM,
    ),
}
_INDICES = {
    "gather": slice(1, 2),
    "scatter": slice(1, 2),
    "scatter-add": slice(1, 2),
    "dynamic_slice": slice(1, None),
    "dynamic_update_slice": slice(2, None),
}
"""Which of an operation's inputs are indices."""

_KEYS = frozenset(["random_seed", "random_wrap"])
_OTHERWISE = "write it with the operations of docs/primitives.md, or do it outside"


@structure("pure_callback", "io_callback", "debug_callback", "debug_print")
def _callback(builder: Builder, equation: JaxprEqn, inputs: list[Node]) -> list[Node] | None:
    raise refusal(equation.primitive.name, "there is no host inside", builder.place)


@structure("and", "or", "xor", "not")
def _bitwise(builder: Builder, equation: JaxprEqn, inputs: list[Node]) -> list[Node] | None:
    if any(n.secret and n.dtype != bool for n in inputs):
        raise refusal(equation.primitive.name, "the bits of a secret number", builder.place)
    return None


def refusal(operation: str, why: str, place: Place) -> NotSecure:
    """The error for an operation."""
    return NotSecure(f"{operation}: {why}: {_INSTEAD.get(operation, _OTHERWISE)} ({place})")


def translated(error: Exception) -> NotSecure | None:
    """JAX's error of a traced function as one that says what to do; None of others."""
    for kind, (what, instead) in _ERRORS.items():
        if isinstance(error, kind):
            return NotSecure(f"{what}: {instead} ({_line(error)})")
    if isinstance(error, TypeError) and "Shapes must be 1D sequences of concrete" in str(error):
        return NotSecure(f"a secret as a size of an array: {_PUBLIC} ({_line(error)})")
    return None


def _line(error: Exception) -> str:
    """The innermost of the user's lines."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(frame.filename):
            return f"{frame.filename}:{frame.lineno} ({frame.name})"
    return "the function"


def require_rules(graph: Graph, known: Iterable[str]) -> None:
    """Refuse what there is no rule for, before anything runs.

    Raises:
        NotSecure: names the first such operation.
    """
    there = {*known, "input", "constant", "output"}
    for node in _all(graph):  # a key that nothing depends on is none of them
        if node.operation in _KEYS and node.inputs[0].value is not None:
            raise refusal(node.operation, "a key that is made inside", node.place)
    nodes = [n for n in _all(graph) if n.secret]
    for node in nodes:
        if node.operation not in there:
            why = "there is no such operation under sharing"
            raise refusal(node.operation, why, node.place)
    for node in nodes:
        if jnp.issubdtype(node.dtype, jnp.complexfloating):
            raise refusal("complex", "secrets are real numbers", node.place)
        if any(n.secret for n in node.inputs[_INDICES.get(node.operation, slice(0))]):
            raise NotSecure(f"{node.operation}: a secret index: {_ONE_HOT} ({node.place})")


def _all(graph: Graph) -> Sequence[Node]:
    found: list[Node] = []
    for node in graph.nodes():
        found += _all(node.params["body"]) if node.operation == "scan" and node.secret else []
        found.append(node)
    return found
