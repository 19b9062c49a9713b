"""Idioms that have a cheaper form under sharing, among them those of JAX's own derivatives.

Each rule looks at a node that is about to be made, and at what it takes, which was rewritten
before; it returns a better node or None. A rule that stops matching makes a program dearer, never
wrong: tests count what each one does, for each version of JAX.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc.activation import LOG_RANGE
from lpgan_jax.transform.bounds import SHAPES, repeats
from lpgan_jax.transform.graph import Builder, Node, Rewrite
from lpgan_jax.transform.plain import Plain

REWRITES: dict[str, list[Rewrite]] = {}


def rewrite(*operations: str) -> Callable[[Rewrite], Rewrite]:
    """Enter a function into the table of rewrites."""

    def entered(rule: Rewrite) -> Rewrite:
        for operation in operations:
            REWRITES.setdefault(operation, []).append(rule)
        return rule

    return entered


# Making and taking apart --------------------------------------------------------------------------

_PLAIN: dict[str, Plain] = {
    "add": jnp.add,
    "add_any": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "div": jnp.divide,
    "neg": jnp.negative,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "square": jnp.square,
    "sqrt": jnp.sqrt,
    "rsqrt": jax.lax.rsqrt,
    "logistic": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "pow": jnp.power,
    "exp": jnp.exp,
    "log": jnp.log,
    "reciprocal": lambda x: 1.0 / x,
    "over_root": lambda x, v, eps: x / jnp.sqrt(v + eps),
}


def make(builder: Builder, operation: str, *inputs: Node, **params: Any) -> Node:
    """A node of an elementwise operation; its operands broadcast."""
    shape = np.broadcast_shapes(*(n.shape for n in inputs))
    dtype = next((n.dtype for n in inputs if not n.is_integer), inputs[0].dtype)
    result = jax.ShapeDtypeStruct(shape, dtype)
    return builder.add(operation, inputs, result, _PLAIN[operation], params)


def number(builder: Builder, value: float, like: Node) -> Node:
    """A constant of a node's type and shape."""
    return builder.constant(np.broadcast_to(np.float64(value), like.shape), like.dtype)


def _is(node: Node, operation: str) -> bool:
    return node.operation == operation


def _split(node: Node, operation: str) -> tuple[Node, float] | None:
    """(x, c) of an operation of x and a number."""
    if node.operation == operation and len(node.inputs) == 2:
        x, c = node.inputs
        if c.scalar is not None:
            return x, c.scalar
        if x.scalar is not None and operation in ("add", "mul", "max", "min", "add_any"):
            return c, x.scalar
    return None


def _negated(node: Node) -> Node | None:
    """x of -x."""
    if _is(node, "neg"):
        return node.inputs[0]
    found = _split(node, "mul")
    return found[0] if found is not None and found[1] == -1 else None


def _same_elements(node: Node) -> Node:
    """What a node only gives another shape."""
    while node.operation in SHAPES and node.size == node.inputs[0].size:
        node = node.inputs[0]
    return node


def _few(node: Node) -> Node:
    """What a node repeats, or gives another shape."""
    while node.operation in SHAPES:
        node = node.inputs[0]
    return node


def _inside(node: Node) -> tuple[Node, float] | None:
    """(x, c) of c x, with one c."""
    return (node.inputs[0], -1.0) if _is(node, "neg") else _split(node, "mul")


def _multiple(node: Node) -> tuple[Node, float]:
    """(x, c) of c x, with as much as there is in c."""
    factor = 1.0
    while inner := _inside(node):
        node, factor = inner[0], factor * inner[1]
    return node, factor


def _source(node: Node) -> tuple[Node, float]:
    """(x, c) of c x, repeated or in another shape."""
    factor = 1.0
    while inner := _inside(_few(node)):
        node, factor = inner[0], factor * inner[1]
    return _few(node), factor


def _summands(node: Node) -> list[Node]:
    """What a sum of cotangents adds up."""
    if not _is(node, "add_any"):
        return [node]
    return [n for part in node.inputs for n in _summands(part)]


def _picked(node: Node) -> tuple[Node, int]:
    """(x, 1) of x[i], and (x, 0) of x itself."""
    if _is(node, "squeeze") and _is(node.inputs[0], "slice"):
        (x,) = node.inputs[0].inputs
        if x.shape[1:] == node.shape:
            return x, 1
    return node, 0


# Nothing to do ------------------------------------------------------------------------------------


@rewrite("copy", "copy_p", "stop_gradient", "reduce_precision")
def same(builder: Builder, node: Node) -> Node | None:
    """What changes nothing."""
    return node.inputs[0] if len(node.inputs) == 1 and not node.results else None


@rewrite("convert_element_type")
def same_type(builder: Builder, node: Node) -> Node | None:
    """Floats that stay floats; [x is not 0] for numbers that become booleans."""
    (x,) = node.inputs
    if not x.secret:
        return None
    if node.dtype == bool and x.dtype != bool:
        return builder.add("ne", [x, number(builder, 0.0, x)], node, jnp.not_equal)
    both_floats = not (node.is_integer or x.is_integer)
    return x if both_floats or node.dtype == x.dtype else None


@rewrite("reshape", "broadcast_in_dim", "squeeze", "transpose")
def same_shape(builder: Builder, node: Node) -> Node | None:
    """A move that moves nothing."""
    (x, *_) = node.inputs
    if node.shape != x.shape:
        return None
    if _is(node, "transpose"):
        order = tuple(map(int, node.params["permutation"]))
        return x if order == tuple(range(len(order))) else None
    return x


@rewrite("add", "add_any", "sub")
def plus_zero(builder: Builder, node: Node) -> Node | None:
    """x + 0."""
    x, y = node.inputs
    if y.scalar == 0 and x.shape == node.shape:
        return x
    if x.scalar == 0 and y.shape == node.shape and not _is(node, "sub"):
        return y
    return None


@rewrite("mul", "div")
def times_one(builder: Builder, node: Node) -> Node | None:
    """x * 1 and x * 0."""
    x, y = node.inputs
    if y.scalar == 1 and x.shape == node.shape:
        return x
    if _is(node, "mul"):
        if x.scalar == 1 and y.shape == node.shape:
            return y
        if 0 in (x.scalar, y.scalar):
            return number(builder, 0.0, node)
    return None


@rewrite("reduce_sum", "neg", "reshape", "broadcast_in_dim", "transpose", "slice")
def of_zeros(builder: Builder, node: Node) -> Node | None:
    """Sums and moves of zeros."""
    return number(builder, 0.0, node) if node.inputs[0].scalar == 0 else None


@rewrite("reduce_sum", "reduce_max", "reduce_min")
def over_nothing(builder: Builder, node: Node) -> Node | None:
    """A reduction over axes of length 1."""
    (x,) = node.inputs
    return _reshape(builder, x, node) if node.size == x.size else None


def _reshape(builder: Builder, x: Node, like: Node) -> Node:
    """The elements of x in another node's shape."""
    shape = like.shape
    return builder.add("reshape", [x], like, lambda v: jnp.reshape(v, shape), {"new_sizes": shape})


@rewrite("reshape")
def reshaped_twice(builder: Builder, node: Node) -> Node | None:
    """A reshape of a reshape."""
    (x, *_) = node.inputs
    return _reshape(builder, x.inputs[0], node) if _is(x, "reshape") and x.secret else None


@rewrite("reshape", "squeeze", "broadcast_in_dim")
def there_and_back(builder: Builder, node: Node) -> Node | None:
    """Another shape, and then that of before."""
    before = node.inputs[0]
    while before.operation in SHAPES and before.size == before.inputs[0].size == node.size:
        before = before.inputs[0]
        if before.shape == node.shape:
            return before
    return None


@rewrite("slice")
def of_a_tanhs_derivative(builder: Builder, node: Node) -> Node | None:
    """A part of 1 - y^2, of that part of y.

    Newer versions of JAX keep it for all that goes forward, and SG goes back through one of two.
    """
    (x,) = node.inputs
    if not (_is(x, "sub") and x.secret and x.inputs[0].scalar == 1 and _is(x.inputs[1], "square")):
        return None
    params = dict(node.params)
    bounds = [params[name] for name in ("start_indices", "limit_indices", "strides")]
    part = builder.add(
        "slice", [*x.inputs[1].inputs], node, lambda v: jax.lax.slice(v, *bounds), params
    )
    return make(builder, "sub", number(builder, 1.0, part), make(builder, "square", part))


@rewrite("slice")
def of_what_is_repeated(builder: Builder, node: Node) -> Node | None:
    """A part of what is repeated along the axes that are cut: it is repeated less often."""
    (x,) = node.inputs
    if not _is(x, "broadcast_in_dim") or not x.secret:
        return None
    axes = tuple(map(int, x.params["broadcast_dimensions"]))
    few, shape = x.inputs[0], node.shape
    if any(shape[a] != x.shape[a] and few.shape[i] != 1 for i, a in enumerate(axes)):
        return None
    return builder.add(
        "broadcast_in_dim",
        [few],
        node,
        lambda v: jax.lax.broadcast_in_dim(jnp.asarray(v), shape, axes),
        {"shape": shape, "broadcast_dimensions": axes},
    )


@rewrite("slice", "squeeze")
def of_a_multiple(builder: Builder, node: Node) -> Node | None:
    """Elements of c x, c + x and x^n as these of elements: the idioms below are seen then."""
    (x,) = node.inputs
    if not x.secret or x.operation not in ("mul", "neg", "add", "sub", "integer_pow"):
        return None
    if sum(n.scalar is None for n in x.inputs) != 1:
        return None
    inputs = [
        builder.add(node.operation, [n], node, node.plain, node.params)
        if n.scalar is None
        else number(builder, n.scalar, node)
        for n in x.inputs
    ]
    return builder.add(x.operation, inputs, node, x.plain, x.params)


@rewrite("integer_pow")
def small_power(builder: Builder, node: Node) -> Node | None:
    """x^0, x^1 and x^2."""
    (x,) = node.inputs
    match node.params["y"]:
        case 0:
            return number(builder, 1.0, node)
        case 1:
            return x
        case 2:
            return make(builder, "square", x)
    if node.params["y"] < 0 and x.secret:
        return make(builder, "pow", x, number(builder, node.params["y"], x))
    return None


@rewrite("eq", "ne", "is_finite")
def never_infinite(builder: Builder, node: Node) -> Node | None:
    """Tests for NaN and infinity: there are none in the ring."""
    if not node.inputs[0].secret and (_is(node, "is_finite") or not node.inputs[1].secret):
        return None
    if _is(node, "is_finite"):
        return builder.constant(np.broadcast_to(True, node.shape))
    x, y = node.inputs
    infinite = any(n.scalar is not None and not math.isfinite(n.scalar) for n in (x, y))
    if x is y or infinite:
        equal = x is y and not infinite
        return builder.constant(np.broadcast_to(equal == _is(node, "eq"), node.shape))
    return None


@rewrite("lt", "le", "gt", "ge")
def below_infinity(builder: Builder, node: Node) -> Node | None:
    """x < inf."""
    x, y = node.inputs
    for one, other in ((x, y), (y, x)):
        if one.scalar is not None and math.isinf(one.scalar) and other.secret:
            under = (one is y) == (one.scalar > 0)
            found = under == (node.operation in ("lt", "le"))
            return builder.constant(np.broadcast_to(found, node.shape))
    return None


@rewrite("max", "min")
def with_infinity(builder: Builder, node: Node) -> Node | None:
    """max(-inf, x)."""
    x, y = node.inputs
    for one, other in ((x, y), (y, x)):
        if one.scalar is not None and math.isinf(one.scalar) and other.shape == node.shape:
            return other if (one.scalar < 0) == _is(node, "max") else None
    return None


@rewrite("max", "min")
def of_itself(builder: Builder, node: Node) -> Node | None:
    """max(x, x)."""
    x, y = node.inputs
    return x if x is y and x.shape == node.shape else None


@rewrite("clamp")
def clamped(builder: Builder, node: Node) -> Node | None:
    """clamp(low, x, high)."""
    low, x, high = node.inputs
    return make(builder, "min", make(builder, "max", x, low), high) if x.secret else None


@rewrite("select_n")
def known_choice(builder: Builder, node: Node) -> Node | None:
    """A selection that is known, or between equal values."""
    which, *cases = node.inputs
    if which.scalar is not None and cases[int(which.scalar)].shape == node.shape:
        return cases[int(which.scalar)]
    if all(c is cases[0] for c in cases) and cases[0].shape == node.shape:
        return cases[0]
    return None


# Quotients and powers -----------------------------------------------------------------------------


@rewrite("div")
def by_number(builder: Builder, node: Node) -> Node | None:
    """x / c as x * (1/c), also for a public c: the quotient is then public work."""
    x, y = node.inputs
    if y.secret or not x.secret or node.is_integer:
        return None
    return make(builder, "mul", x, make(builder, "div", number(builder, 1.0, y), y))


_UNSEEN = 2.0**-16  # added to a root, it is below what the root itself is off by


@rewrite("div")
def over_root(builder: Builder, node: Node) -> Node | None:
    """x / sqrt(v) and x / (sqrt(v) + eps), as of Adam: one inverse root, no division.

    A small eps goes into the root, where it is as good at keeping the quotient finite.
    """
    x, y = node.inputs
    root, eps = _split(y, "add") or (y, 0.0)
    if not y.secret or not _is(root, "sqrt"):
        return None
    v = root.inputs[0]
    if eps == 0 and (not x.secret or v.size < node.size):
        return make(builder, "mul", x, make(builder, "rsqrt", v))
    if not x.secret or not 0 <= eps <= _UNSEEN:
        return None
    inner, offset = _split(v, "add") or (v, 0.0)
    v, offset = (inner, offset) if offset > 0 else (v, 0.0)
    inside = builder.constant(np.float64(offset + eps**2), node.dtype)
    return make(builder, "over_root", x, v, inside)


@rewrite("mul")
def times_inverse_root(builder: Builder, node: Node) -> Node | None:
    """x * rsqrt(v + eps) of a running average v, as of RMSprop: small x and v keep their bits."""
    for x, root in (node.inputs, node.inputs[::-1]):
        if not (_is(root, "rsqrt") and x.secret and x.shape == root.shape == node.shape):
            continue
        v, offset = _split(root.inputs[0], "add") or (root.inputs[0], 0.0)
        terms = [_split(n, "mul") for n in v.inputs] if _is(v, "add") else []
        rates = [found[1] for found in terms if found is not None]
        if len(rates) == 2 and abs(sum(rates) - 1) < 1e-6:
            eps = builder.constant(np.float64(offset), node.dtype)
            return make(builder, "over_root", x, v, eps)
    return None


@rewrite("div")
def inverse_root_over_its_square(builder: Builder, node: Node) -> Node | None:
    """r / x with r = 1/sqrt(x), of its derivative, as r^3."""
    r, x = node.inputs
    if not (_is(r, "rsqrt") and r.inputs[0] is x and x.secret):
        return None
    return builder.add("integer_pow", [r], node, lambda v: v**3, {"y": 3})


@rewrite("div")
def by_few(builder: Builder, node: Node) -> Node | None:
    """x / y as x * (1/y) where y is public divided by, or has fewer elements than x."""
    x, y = node.inputs
    if not y.secret:
        return None
    few = y
    while few.operation in SHAPES and few.inputs[0].size <= few.size:
        few = few.inputs[0]
    if x.secret and few.size == node.size:
        return None
    inverted = _reshaped(builder, y, make(builder, "reciprocal", few), few)
    if x.scalar == 1 and inverted.shape == node.shape:
        return inverted
    return make(builder, "mul", x, inverted)


def _reshaped(builder: Builder, node: Node, inner: Node, stop: Node) -> Node:
    """The moves that lead from `stop` to a node, applied to another node of stop's shape."""
    if node is stop:
        return inner
    moved = _reshaped(builder, node.inputs[0], inner, stop)
    return builder.add(node.operation, [moved], node, node.plain, node.params)


@rewrite("pow")
def constant_power(builder: Builder, node: Node) -> Node | None:
    """x^c; of whole c also where x is negative."""
    x, y = node.inputs
    if y.value is None or not x.secret or not y.size:
        return None
    if y.scalar == 0.5:
        return make(builder, "sqrt", x)
    if y.scalar == -0.5:
        return make(builder, "rsqrt", x)
    whole = y.value.astype(np.int64)
    if (whole != y.value).any() or np.abs(whole).max() >= 64:
        return make(builder, "exp", make(builder, "mul", y, make(builder, "log", x)))
    return builder.call(lambda x: _whole_power(x, whole), [x])[0]


def _whole_power(x: Any, y: np.ndarray) -> Any:
    """x^y by the bits of y; of a negative one, that of 1 / x: a small power has few bits left."""
    if (y < 0).any():
        x, y = jnp.where(y < 0, 1 / x, x), np.abs(y)
    result = jnp.ones_like(x)
    while y.any():
        result = result * jnp.where(y % 2 == 1, x, 1)
        x, y = x * x, y // 2
    return result


@rewrite("over_root")
def public_factors_of_a_root(builder: Builder, node: Node) -> Node | None:
    """(a x) / sqrt(p v + eps) with public a, p > 0, as of Adam's corrections: they come after."""
    x, v, eps = node.inputs
    (x, a), (inner, p) = _public_factor(builder, x), _public_factor(builder, v)
    v, p = (inner, p) if p is not None and _is_positive(p) else (v, None)
    if a is None and p is None:
        return None
    one = builder.constant(np.float64(1.0), node.dtype)
    after = make(builder, "mul", a or one, make(builder, "rsqrt", p or one))
    inside = make(builder, "div", eps, p or one)
    quotient = make(builder, "over_root", x, v, inside)
    return make(builder, "mul", quotient, after)


def _public_factor(builder: Builder, node: Node) -> tuple[Node, Node | None]:
    """(x, p) of x * p with a public number p."""
    if _is(node, "mul"):
        for x, p in (node.inputs, node.inputs[::-1]):
            if not p.secret and x.secret and x.shape == node.shape:
                p = _same_elements(p) if p.value is None else p
                scalar = p.scalar if p.value is not None else None
                if scalar is not None:
                    return x, builder.constant(np.float64(scalar), node.dtype)
                while p.operation == "broadcast_in_dim" and p.inputs[0].size == 1:
                    p = _same_elements(p.inputs[0])
                if p.shape == ():
                    return x, p
    return node, None


def _is_positive(node: Node) -> bool:
    """Whether a public number is known to be: a constant, or made of 1 - b^t of a step t."""
    if node.scalar is not None:
        return node.scalar > 0
    if _is(node, "sub") and _is(node.inputs[1], "pow"):
        one, power = node.inputs
        base = power.inputs[0].scalar
        return one.scalar == 1 and base is not None and 0 <= base < 1
    made = node.operation in ("div", "mul", "sqrt", "convert_element_type", *SHAPES)
    return made and all(map(_is_positive, node.inputs))


@rewrite("mul")
def public_factors(builder: Builder, node: Node) -> Node | None:
    """(x * p) * q with public p and q as x * (p q)."""
    for product, q in (node.inputs, node.inputs[::-1]):
        if q.secret or not _is(product, "mul") or not product.secret:
            continue
        for x, p in (product.inputs, product.inputs[::-1]):
            if not p.secret and not (p.scalar is not None and q.scalar is not None):
                return make(builder, "mul", x, make(builder, "mul", p, q))
    return None


# Logistic functions -------------------------------------------------------------------------------


@rewrite("add")
def softplus(builder: Builder, node: Node) -> Node | None:
    """max(x, 0) + log1p(exp(-|x|)), as JAX writes log(e^x + 1)."""
    for larger, rest in (node.inputs, node.inputs[::-1]):
        if not (_is(larger, "max") and _is(rest, "log1p") and _is(rest.inputs[0], "exp")):
            continue
        distance = _negated(rest.inputs[0].inputs[0])
        if distance is None or not _is(distance, "abs"):
            continue
        x, y = larger.inputs
        (difference,) = distance.inputs
        if y.scalar == 0 and difference is x:
            return make(builder, "softplus", x)
        if _is(difference, "sub") and difference.inputs == (x, y):
            return make(builder, "add", y, make(builder, "softplus", difference))
    return None


@rewrite("exp")
def logistic_of_softplus(builder: Builder, node: Node) -> Node | None:
    """exp(x - softplus(x)), the derivative of softplus."""
    (difference,) = node.inputs
    if _is(difference, "sub"):
        x, y = difference.inputs
        if _is(y, "softplus") and y.inputs[0] is x:
            return make(builder, "logistic", x)
    return None


@rewrite("logistic")
def logistic_of_negative(builder: Builder, node: Node) -> Node | None:
    """1 - logistic(x) for logistic(-x): both sides of a loss share one."""
    x = _negated(node.inputs[0])
    if x is None:
        return None
    return make(builder, "sub", number(builder, 1.0, node), make(builder, "logistic", x))


@rewrite("add_any", "add")
def tanh_derivative(builder: Builder, node: Node) -> Node | None:
    """t (1 - y) + t (1 - y) y as t (1 - y^2), whose second factor is known before t is."""
    for first, second in (node.inputs, node.inputs[::-1]):
        if not (_is(second, "mul") and _is(first, "mul")):
            continue
        for y, product in (second.inputs, second.inputs[::-1]):
            if product is not first:
                continue
            for t, rest in (first.inputs, first.inputs[::-1]):
                if _is(rest, "sub") and rest.inputs[0].scalar == 1 and rest.inputs[1] is y:
                    one = number(builder, 1.0, y)
                    return make(
                        builder, "mul", t, make(builder, "sub", one, make(builder, "square", y))
                    )
    return None


# Roots --------------------------------------------------------------------------------------------


@rewrite("mul")
def rsqrt_derivative(builder: Builder, node: Node) -> Node | None:
    """t * c r^3 with an inverse root r, as (t r) (r r): factors that stay small.

    The second is known before t is. Of t = g * s with a parameter s (a normalisation's scale), or
    where r * s is there already, it is (g r) (r (r s)): g r is the gradient of that scale.
    """
    for t, slope in (node.inputs, node.inputs[::-1]):
        power, factor = _multiple(slope)
        if not (_is(power, "integer_pow") and power.params["y"] == 3 and t.secret):
            continue
        (r,) = power.inputs
        if not _is(_picked(r)[0], "rsqrt"):
            continue
        result, last = t, r
        for g, s in (t.inputs, t.inputs[::-1]) if _is(t, "mul") else ():
            scale = builder.known("mul", r, s) if g.secret and s.secret else None
            if scale is not None or (s.secret and _is(_source(s)[0], "input")):
                result, last = g, make(builder, "mul", r, s) if scale is None else scale
                break
        result = make(builder, "mul", result, r)
        result = make(builder, "mul", result, make(builder, "mul", r, last))
        return make(builder, "mul", result, number(builder, factor, result))
    return None


@rewrite("sub")
def centred_variance(builder: Builder, node: Node) -> Node | None:
    """E[x^2] - E[x]^2 as E[(x - E[x])^2], which does not cancel."""
    squares, square = node.inputs
    if not (_is(square, "square") and (mean := _mean(square.inputs[0]))):
        return None
    found = _mean(squares)
    if found is None or not _is(found[0], "square") or found[1:] != mean[1:]:
        return None
    x, axes, count = mean
    if found[0].inputs[0] is not x:
        return None
    centred = make(builder, "square", _centred(builder, x, square.inputs[0], axes))
    total = builder.add("reduce_sum", [centred], node, lambda v: jnp.sum(v, axes), {"axes": axes})
    return make(builder, "mul", total, number(builder, 1.0 / count, total))


def _mean(node: Node) -> tuple[Node, tuple[int, ...], float] | None:
    """(x, axes, n) of the mean of x over axes."""
    found = _split(node, "mul")
    if found is None or not _is(found[0], "reduce_sum"):
        return None
    total, factor = found
    (x,) = total.inputs
    axes = tuple(map(int, total.params["axes"]))
    count = math.prod(x.shape[a] for a in axes)
    return (x, axes, float(count)) if abs(factor * count - 1) < 1e-6 else None


def _centred(builder: Builder, x: Node, mean: Node, axes: tuple[int, ...]) -> Node:
    """x less its mean over axes, written as Flax does."""
    kept = tuple(a for a in range(len(x.shape)) if a not in axes)
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    spread = builder.add(
        "broadcast_in_dim",
        [mean],
        jax.ShapeDtypeStruct(shape, x.dtype),
        lambda v: jnp.reshape(v, shape),
        {"shape": shape, "broadcast_dimensions": kept},
    )
    return make(builder, "sub", x, spread)


@rewrite("reduce_sum")
def sum_around_the_mean(builder: Builder, node: Node) -> Node | None:
    """The sum of s (x - E[x]), where s is repeated: 0, as of the derivative of a variance."""
    axes = tuple(map(int, node.params["axes"]))
    product, _ = _multiple(node.inputs[0])
    for spread, multiple in (product.inputs, product.inputs[::-1]) if _is(product, "mul") else ():
        centred, lead = _picked(_multiple(multiple)[0])
        if not _is(centred, "sub"):
            continue
        few, own = _few(centred.inputs[1]), tuple(a + lead for a in axes)
        mean = _mean(few)
        of_axes = mean and mean[0] is centred.inputs[0] and mean[1] == own
        if of_axes and repeats(centred.inputs[1], few, own) and repeats(spread, _few(spread), axes):
            return number(builder, 0.0, node)
    return None


@rewrite("add_any")
def derivative_of_variance(builder: Builder, node: Node) -> Node | None:
    """s x + (q - s sum(x)) / n as s (x - E[x]) + q / n, of the derivative of E[x^2] - E[x]^2.

    s and q have few elements, which are repeated. x needs not be opened, beside what is centred.
    """
    summands = _summands(node)
    products = [n for n in summands if _is(n, "mul")]
    shifts = [n for n in summands if _is(_multiple(_few(n))[0], "add_any")]
    for product, shift in itertools.product(products, shifts):
        if (better := _around_the_mean(builder, product, shift)) is not None:
            for other in summands:
                if other is not product and other is not shift:
                    better = make(builder, "add_any", other, better)
            return better
    return None


def _around_the_mean(builder: Builder, product: Node, shift: Node) -> Node | None:
    few, c = _multiple(_few(shift))
    for spread, multiple in (product.inputs, product.inputs[::-1]):
        (s, slope), (x, factor) = _source(spread), _multiple(multiple)
        for cross, q in (few.inputs, few.inputs[::-1]):
            mean, inner = _times_mean(cross, s, x)
            if mean is None or abs(c * inner / (slope * factor) + 1) > 1e-6:
                continue
            _, axes, _ = _mean(mean) or (x, (), 1.0)
            if not all(repeats(n, _few(n), axes) for n in (spread, shift)):
                continue
            centred = _centred(builder, x, mean, axes)
            scaled = make(builder, "mul", centred, number(builder, factor, x))
            left = make(builder, "mul", q, number(builder, c, q))
            left = _reshaped(builder, shift, left, _few(shift))
            return make(builder, "add_any", make(builder, "mul", spread, scaled), left)
    return None


def _times_mean(node: Node, s: Node, x: Node) -> tuple[Node | None, float]:
    """(the mean of x, c) of c s E[x]."""
    product, factor = _multiple(node)
    for one, other in (product.inputs, product.inputs[::-1]) if _is(product, "mul") else ():
        found, c = _source(one)
        if found is not s:
            continue
        while not (mean := _mean(other)) and (inner := _inside(other)):
            other, c = inner[0], c * inner[1]
        if mean and mean[0] is x:
            return other, factor * c
    return None, 0.0


@rewrite("eq", "gt")
def no_variance(builder: Builder, node: Node) -> Node | None:
    """Whether a variance is 0, of the derivative of max(0, variance): it never is."""
    pairs = (node.inputs, node.inputs[::-1]) if _is(node, "eq") else (node.inputs[::-1],)
    for zero, x in pairs:
        if zero.scalar != 0 or not (found := _mean(x)) or not _is(found[0], "square"):
            continue
        (centred,) = found[0].inputs
        mean = _mean(_few(centred.inputs[1])) if _is(centred, "sub") else None
        if mean and mean[0] is centred.inputs[0]:
            return builder.constant(np.broadcast_to(_is(node, "gt"), node.shape))
    return None


@rewrite("max")
def of_a_variance(builder: Builder, node: Node) -> Node | None:
    """max(0, mean of squares)."""
    for zero, x in (node.inputs, node.inputs[::-1]):
        if zero.scalar == 0 and (found := _mean(x)) and _is(found[0], "square"):
            return x
    return None


# The largest --------------------------------------------------------------------------------------

_LEAST = 1 - 2.0**LOG_RANGE  # nearly the least that is compared: a mask's must lie below logits


@rewrite("exp")
def masked_softmax(builder: Builder, node: Node) -> Node | None:
    """exp(x - max(x)) where a mask writes or adds -1e9, or less, into x: no such number fits."""
    (difference,) = node.inputs
    if not _is(difference, "sub"):
        return None
    x, spread = difference.inputs
    if not _is(_few(spread), "reduce_max") or (y := _saturated(builder, x)) is x:
        return None
    if _few(spread).inputs[0] is not y:
        return None
    return make(builder, "exp", make(builder, "sub", y, spread))


@rewrite("reduce_max", "argmax")
def masked_largest(builder: Builder, node: Node) -> Node | None:
    """The largest of what a mask leaves; if that is nothing, `_LEAST`."""
    (x,) = node.inputs
    if not x.secret or x.is_integer or (y := _saturated(builder, x)) is x:
        return None
    return builder.add(node.operation, [y], node, node.plain, node.params)


def _saturated(builder: Builder, x: Node) -> Node:
    """x, where what a mask makes very small is `_LEAST`."""
    if x.operation in (*SHAPES, "transpose"):
        inner = _saturated(builder, x.inputs[0])
        if inner is x.inputs[0]:
            return x
        return builder.add(x.operation, [inner], x, x.plain, x.params)
    if _is(x, "select_n"):
        cases = [
            number(builder, _LEAST, n)
            if n.scalar is not None and n.scalar < _LEAST
            else _saturated(builder, n)
            for n in x.inputs[1:]
        ]
        if all(a is b for a, b in zip(cases, x.inputs[1:], strict=True)):
            return x
        return builder.add("select_n", [x.inputs[0], *cases], x, x.plain, x.params)
    if _is(x, "add"):
        for logits, bias in (x.inputs, x.inputs[::-1]):
            if not bias.secret and not _is_saturated(bias):
                least = number(builder, _LEAST, bias)
                return make(builder, "add", logits, make(builder, "max", bias, least))
    return x


def _is_saturated(public: Node) -> bool:
    """Whether a public value is known to be `_LEAST` at the least."""
    if public.value is not None:
        return bool(public.value.min(initial=0.0) >= _LEAST)
    found = _split(public, "max")
    return found is not None and found[1] >= _LEAST


def _winner(builder: Builder, x: Node, given: Node, axes: tuple[int, ...]) -> Node:
    """`given`, of the axes that are left, at the places of the first of the largest of x."""
    kept = tuple(a for a in range(len(x.shape)) if a not in axes)

    def plain(x: Any, given: Any) -> Any:
        order = (*kept, *axes)
        flat = jnp.asarray(x).transpose(order).reshape(*(x.shape[a] for a in kept), -1)
        one = jax.nn.one_hot(jnp.argmax(flat, -1), flat.shape[-1], dtype=jnp.float64)
        found = (one * jnp.asarray(given)[..., None]).reshape([x.shape[a] for a in order])
        return found.transpose(np.argsort(order))

    return builder.add("winner", [x, given], x, plain, {"axes": axes})


@rewrite("eq")
def largest(builder: Builder, node: Node) -> Node | None:
    """x == max(x), of the derivative of max: the bits that found it tell which one it was."""
    for x, y in (node.inputs, node.inputs[::-1]):
        source = _few(y)
        if source.operation == "reduce_max" and x.secret and not x.is_integer:
            x = _saturated(builder, x)
        if source.operation in ("reduce_max", "reduce_min") and source.inputs[0] is x:
            axes = tuple(map(int, source.params["axes"]))
            if not repeats(y, source, axes):
                continue
            if _is(source, "reduce_min"):
                x = make(builder, "neg", x)
            shape = tuple(n for a, n in enumerate(x.shape) if a not in axes)
            return _winner(builder, x, builder.constant(np.ones(shape)), axes)
    return None


@rewrite("reduce_sum")
def one_winner(builder: Builder, node: Node) -> Node | None:
    """How many are the largest: one."""
    (x,) = node.inputs
    if (
        _is(x, "winner")
        and x.inputs[1].scalar == 1
        and x.params["axes"] == tuple(map(int, node.params["axes"]))
    ):
        return number(builder, 1.0, node)
    return None


@rewrite("mul")
def given_to_the_winner(builder: Builder, node: Node) -> Node | None:
    """g at the places of the largest, instead of g times a one."""
    for g, one in (node.inputs, node.inputs[::-1]):
        if not (_is(one, "winner") and one.inputs[1].scalar == 1):
            continue
        axes = one.params["axes"]
        shape = tuple(n for a, n in enumerate(one.shape) if a not in axes)
        few = g
        while few.operation in SHAPES and few.shape != shape:
            few = few.inputs[0]
        if few.shape == shape and few.secret and repeats(g, few, axes):
            return _winner(builder, one.inputs[0], few, axes)
    return None


@rewrite("div")
def derivative_of_max(builder: Builder, node: Node) -> Node | None:
    """[x is the larger of x and y], as JAX writes it: with a half where they are equal."""
    one, ties = node.inputs
    if not (_chooses(one, 0, 1) and _chooses(ties, 1, 2)):
        return None
    (x, z), (y, w) = one.inputs[0].inputs, ties.inputs[0].inputs
    if z is not w or z.operation not in ("max", "min") or {x, y} != set(z.inputs):
        return None
    first, second = z.inputs
    larger, smaller = (first, second) if _is(z, "max") else (second, first)
    boolean = jax.ShapeDtypeStruct(node.shape, np.bool_)
    bit = builder.add("gt", [larger, smaller], boolean, jnp.greater)
    if x is second:
        bit = builder.add("not", [bit], boolean, jnp.logical_not)
    return builder.add("convert_element_type", [bit], node, lambda v: jnp.asarray(v, jnp.float64))


@rewrite("select_n")
def derivative_of_max_by_order(builder: Builder, node: Node) -> Node | None:
    """[x > y], as JAX from 0.11 on writes the derivative of max, with a half where x = y."""
    which, no, yes = node.inputs if len(node.inputs) == 3 else (node,) * 3
    if not (_is(which, "gt") and which.secret and yes.scalar == 1 and _chooses(no, 0, 0.5)):
        return None
    if set(no.inputs[0].inputs) != set(which.inputs):
        return None
    mirrored = builder.known("gt", *which.inputs[::-1])
    if mirrored is not None:  # one comparison for both sides, one of which has the ties
        which = builder.add("not", [mirrored], which, jnp.logical_not)
    return builder.add("convert_element_type", [which], node, lambda v: jnp.asarray(v, jnp.float64))


def _chooses(node: Node, no: float, yes: float) -> bool:
    """Whether a node is `yes` where two values are equal, and `no` elsewhere."""
    if not (_is(node, "select_n") and _is(node.inputs[0], "eq")):
        return False
    return node.inputs[1].scalar == no and node.inputs[2].scalar == yes
