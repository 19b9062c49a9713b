"""docs/primitives.md: what every operation of `lp.secure` costs, and how far it is off.

    python experiments/primitive_reference.py             # writes docs/primitives.md
    python experiments/primitive_reference.py --measure   # measures docs/primitives.csv before

There is a row for each rule of `lpgan_jax.transform.rules`: costs are counted in traces, errors
measured on simulated shares against float64. A test compares the page with the code.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from protocol_reference import publish

import lpgan_jax as lp
from lpgan_jax.common import tables
from lpgan_jax.transform.rules import RULES

DOCUMENT = Path(__file__).parent.parent / "docs" / "primitives.md"
MEASURED = DOCUMENT.with_suffix(".csv")
FRAC_BITS = 18
SIDE = 16
OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": "0"}

Range = tuple[float, float]
SIGNED: Range = (-8.0, 8.0)
UNIT: Range = (-1.0, 1.0)
POSITIVE: Range = (2.0**-8, 64.0)
SMALL: Range = (-2, 2)  # integers


@dataclass(frozen=True)
class Example:
    """A call that uses an operation.

    Attributes:
        text: the call, as one writes it.
        function: of the operands.
        ranges: of each secret operand, [16, 16]: even values; of integers if both ends are.
        public: public operands, after the secret ones.
        carry: as of `lp.secure`.
    """

    text: str
    function: Callable[..., Any]
    ranges: tuple[Range, ...] = (SIGNED,)
    public: tuple[Any, ...] = ()
    carry: Any = None

    def operands(self, seed: int = 0) -> tuple[Any, ...]:
        """Values to call it with: multiples of an LSB, or integers."""
        rng = np.random.default_rng(seed)
        return tuple(_even(rng, *r) for r in self.ranges) + self.public

    def secure(self) -> Any:
        """The function under sharing."""
        first = len(self.ranges)
        return lp.secure(
            self.function,
            public=range(first, first + len(self.public)),
            carry=self.carry,
            frac_bits=FRAC_BITS,
        )


def _even(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    if isinstance(low, int) and isinstance(high, int):
        return rng.integers(low, high, (SIDE, SIDE), endpoint=True)
    values = rng.uniform(low, high, (SIDE, SIDE))
    values.flat[:2] = low, high
    return np.rint(values * 2.0**FRAC_BITS) / 2.0**FRAC_BITS


def _one(text: str, function: Callable[..., Any], domain: Range = SIGNED) -> Example:
    return Example(text, function, (domain,))


def _many(text: str, function: Callable[..., Any], *ranges: Range, public: Any = ()) -> Example:
    return Example(text, function, ranges or (SIGNED, SIGNED), tuple(public))


def _backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """(x, t) -> t times the derivative of a function at x."""
    return lambda x, t: jax.vjp(function, x)[1](t)[0]


def _pooled(x: jax.Array, start: float = -jnp.inf, of: Any = lax.max) -> jax.Array:
    return lax.reduce_window(x, start, of, (2, 2), (2, 2), "VALID")


def _convolved(x: jax.Array, w: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    images, kernel = x.reshape(1, SIDE, SIDE, 1), w[:3, :3, None, None]
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def _scanned(x: jax.Array, y: jax.Array) -> jax.Array:
    return lax.scan(lambda carry, row: (carry * row, None), x[0], y[:4])[0]


def _over_root(x: jax.Array, v: jax.Array) -> jax.Array:
    return x / (jnp.sqrt(v) + 1e-8)


ROWS = np.array([3, 1, 4, 1])
POSITION = np.int32(3)

EXAMPLES: dict[str, Example] = {
    # arithmetic
    "add": _many("x + y", jnp.add),
    "add_any": _many("grad of x + flip(x)", _backward(lambda x: x + jnp.flip(x))),
    "sub": _many("x - y", jnp.subtract),
    "neg": _one("-x", jnp.negative),
    "mul": _many("x * y", jnp.multiply),
    "square": _one("x ** 2", jnp.square),
    "integer_pow": _one("x ** 3", lambda x: lax.integer_pow(x, 3)),
    "convert_element_type": _many(
        "grad of maximum(x, 0.5)", _backward(lambda x: jnp.maximum(x, 0.5))
    ),
    # private sums
    "private_sum": _many(
        "private_sum(x, n, z[0], 1.0), n of 0 and 1",
        lambda x, n, z: lp.private_sum(x, n[:, 0], z[0], 1.0),
        SIGNED,
        (0, 1),
        SIGNED,
    ),
    # comparison
    "lt": _many("x < y", jnp.less),
    "le": _many("x <= y", jnp.less_equal),
    "gt": _one("x > 0", lambda x: x > 0),
    "ge": _one("x >= 0", lambda x: x >= 0),
    "eq": _many("i == j, integers", jnp.equal, SMALL, SMALL),
    "ne": _many("i != j, integers", jnp.not_equal, SMALL, SMALL),
    "not": _one("~(x > 0)", lambda x: ~(x > jnp.flip(x))),
    "and": _many("(x > 0) & (y > 0)", lambda x, y: (x > 0) & (y > 0)),
    "or": _many("(x > 0) | (y > 0)", lambda x, y: (x > 0) | (y > 0)),
    "xor": _many("(x > 0) ^ (y > 0)", lambda x, y: (x > 0) ^ (y > 0)),
    "max": _one("maximum(x, 0)", lambda x: jnp.maximum(x, 0.0)),
    "min": _many("minimum(x, y)", jnp.minimum),
    "abs": _one("abs(x)", jnp.abs),
    "sign": _one("sign(x)", jnp.sign),
    "reduce_max": _one("x.max(1), of 16", lambda x: x.max(1)),
    "reduce_min": _one("x.min(1), of 16", lambda x: x.min(1)),
    "winner": _many("grad of x.max(1)", lambda x, t: jax.vjp(lambda v: v.max(1), x)[1](t[0])[0]),
    "argmax": _one("argmax(x, 1), of 16", lambda x: jnp.argmax(x, 1)),
    "argmin": _one("argmin(x, 1), of 16", lambda x: jnp.argmin(x, 1)),
    # functions
    "tanh": _one("tanh(x)", jnp.tanh),
    "logistic": _one("sigmoid(x)", jax.nn.sigmoid),
    "softplus": _one("softplus(x)", jax.nn.softplus),
    "erf": _one("erf(x)", lax.erf),
    "erfc": _one("erfc(x)", lax.erfc),
    "exp": _one("exp(x)", jnp.exp, (-16.0, 4.0)),
    "expm1": _one("expm1(x)", jnp.expm1, (-16.0, 4.0)),
    "log": _one("log(x)", jnp.log, POSITIVE),
    "log1p": _one("log1p(x)", jnp.log1p, (-0.99, 64.0)),
    "sqrt": _one("sqrt(x)", jnp.sqrt, POSITIVE),
    "rsqrt": _one("rsqrt(x)", lax.rsqrt, POSITIVE),
    "times_root": _many("x * rsqrt(v)", lambda x, v: x * lax.rsqrt(v), SIGNED, POSITIVE),
    "over_root": _many("x / (sqrt(v) + eps)", _over_root, UNIT, POSITIVE),
    "reciprocal": _one("1 / x", lambda x: 1 / x, POSITIVE),
    "div": _many("x / y", jnp.divide, SIGNED, POSITIVE),
    "sin": _one("sin(x)", jnp.sin),
    "cos": _one("cos(x)", jnp.cos),
    # indices
    "gather": _many("x[rows], public rows", lambda x, i: x[i], SIGNED, public=[ROWS]),
    "dynamic_slice": _many(
        "dynamic_slice(x, public)",
        lambda x, i: lax.dynamic_slice_in_dim(x, i, 4),
        SIGNED,
        public=[POSITION],
    ),
    "dynamic_update_slice": _many(
        "dynamic_update_slice(x, y, public)",
        lambda x, y, i: lax.dynamic_update_slice_in_dim(x, y[:2], i, 0),
        public=[POSITION],
    ),
    "scatter": _many(
        "x.at[rows].set(y), public rows",
        lambda x, y, i: x.at[i].set(y[:3], unique_indices=True),
        public=[ROWS[:3]],
    ),
    "scatter-add": _many(
        "x.at[rows].add(y), public rows", lambda x, y, i: x.at[i].add(y[:4]), public=[ROWS]
    ),
    # linear
    "reduce_sum": _one("x.sum(1), of 16", lambda x: x.sum(1)),
    "cumsum": _one("cumsum(x, 1)", lambda x: jnp.cumsum(x, 1)),
    "inner": _many("(x * y).sum(1)", lambda x, y: (x * y).sum(1)),
    "dot_general": _many("x @ y, 16 x 16", jnp.matmul),
    "conv_general_dilated": _many("conv(x, w), 16 x 16 by 3 x 3", _convolved),
    # loops
    "scan": _many("scan of 4 products", _scanned, UNIT, UNIT),
    # moves
    "reshape": _one("x.reshape(4, 64)", lambda x: x.reshape(4, -1)),
    "squeeze": _one("x[0]", lambda x: lax.squeeze(x[:1], (0,))),
    "transpose": _one("x.T", jnp.transpose),
    "broadcast_in_dim": _one("broadcast_to(x)", lambda x: jnp.broadcast_to(x[0], (SIDE, SIDE))),
    "rev": _one("flip(x)", jnp.flip),
    "slice": _one("x[:4]", lambda x: x[:4]),
    "split": _one("split(x, 2)", lambda x: jnp.split(x, 2)),
    "pad": _one("pad(x, 1)", lambda x: jnp.pad(x, 1)),
    "concatenate": _many("concatenate([x, y])", lambda x, y: jnp.concatenate([x, y])),
    "keep_secret": Example("zeros, carried as x", jnp.zeros_like, carry={0: 0}),
    "select_n": _many("where(x > 0, x, y)", lambda x, y: jnp.where(x > 0, x, y)),
    # rounding
    "floor": _one("floor(x)", jnp.floor),
    # sorting
    "sort": _one("sort(x), of 16", jnp.sort),
    "top_k": _one("top_k(x, 2), of 16", lambda x: lax.top_k(x, 2)[0]),
    "permute": _many(
        "y in the order of x, of 16",
        lambda x, y: jnp.take_along_axis(y, jnp.argsort(x, 1), 1),
    ),
    # windows
    "reduce_window_sum": _one("2 x 2 sums", lambda x: _pooled(x, 0.0, lax.add)),
    "reduce_window_max": _one("max_pool 2 x 2", _pooled),
    "reduce_window_min": _one("min_pool 2 x 2", lambda x: _pooled(x, jnp.inf, lax.min)),
    "select_and_gather_add": _many(
        "tangent of max_pool 2 x 2", lambda x, t: jax.jvp(_pooled, (x,), (t,))[1]
    ),
    "select_and_scatter_add": _many(
        "grad of max_pool 2 x 2", lambda x, t: jax.vjp(_pooled, x)[1](t[:8, :8])[0]
    ),
}


HEAD = """# Primitives

Generated by `experiments/primitive_reference.py`; a test compares it with the code. What each
operation of a function under `lp.secure` costs, and how far its result is off. Rounds and bytes
come from traces at 18 fraction bits, for secret arrays of 16 x 16. Bytes are those that
each server sends (online) and those that S2 gets from DS, for each element of the largest array
among operands and result. The result is brought back to 18 fraction bits, which is one of the
two rounds of a product; in a longer program the next operation often takes an opening that is
there. Errors are the largest of 16^2 random operands of the range, on shares, against float64, in
LSB (2^-18). [Protocols](protocols.md) has the ranges in which they hold, [scales](scales.md)
what to do beyond.

Operations without a row are inlined (calls, `jax.checkpoint`, custom derivatives), made of these
(`pow`, `tan`, `cumprod` and others of `transform/definitions`; rows that a secret index names,
`transform/lookups`), or refused by name. Names are JAX's, as errors show them; `winner`, `inner`,
`times_root`, `over_root`, `reciprocal`, `softplus` and `permute` are ours, for what JAX writes in
several operations.
"""

FIELDS = ("operation", "error_lsb")


def family(operation: str) -> str:
    """The module that holds an operation's rule."""
    return RULES[operation].__module__


def row(operation: str, error: float | None) -> str:
    """A line of the table; SystemExit if the example does not use the operation."""
    example = EXAMPLES[operation]
    step, operands = example.secure(), example.operands()
    nodes = step.program(*operands).nodes
    if operation not in {node.operation for node in nodes if node.secret}:
        raise SystemExit(f"{operation}: {example.text} does not use it")
    cost = lp.cost(step, *operands)
    count = max(node.size for node in nodes if node.secret)
    dealt = cost.dealer_bytes_s2 - cost.dealer_bytes_s1  # both include a seed
    cells = [
        f"`{operation}`",
        example.text.replace("|", "\\|"),
        str(cost.rounds),
        _bytes(cost.online_bytes / count),
        _bytes(dealt / count),
        ", ".join(f"{low:.4g} to {high:.4g}" for low, high in dict.fromkeys(example.ranges)),
        "exact" if error == 0 else f"{error:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _bytes(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def document() -> str:
    """The whole page."""
    errors = {r["operation"]: r["error_lsb"] for r in tables.read_csv(MEASURED)}
    require_complete(errors)
    parts = [HEAD]
    for module in dict.fromkeys(map(family, RULES)):
        title = (sys.modules[module].__doc__ or module).split("\n")[0].rstrip(".")
        lines = [f"## {title}", ""]
        lines.append("| operation | for example | rounds | online | DS | range | error |")
        lines.append("|---|---|---:|---:|---:|---|---:|")
        lines += [row(name, errors[name]) for name in RULES if family(name) == module]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def require_complete(errors: Any) -> None:
    """SystemExit unless every rule has an example and a measured error."""
    if missing := sorted(RULES.keys() - EXAMPLES.keys()):
        raise SystemExit(f"rules without an example here: {', '.join(missing)}")
    if unknown := sorted(EXAMPLES.keys() - RULES.keys()):
        raise SystemExit(f"examples of no rule: {', '.join(unknown)}")
    if missing := sorted(RULES.keys() - set(errors)):
        raise SystemExit(f"rules without a measured error (--measure): {', '.join(missing)}")


def measured(example: Example, seed: int = 0) -> float:
    """The largest error of a call on simulated shares, in LSB."""
    step, operands = example.secure(), example.operands(seed)
    k1, k2 = jax.random.split(lp.key(seed))
    run = jax.jit(step, compiler_options=OPTIONS)
    got = lp.reveal(run(k2, *step.share(k1, *operands)))
    want = example.function(*map(jnp.asarray, operands))
    errors = jax.tree.map(lambda a, b: np.abs(np.float64(a) - np.float64(b)).max(), got, want)
    return float(max(jax.tree.leaves(errors))) * 2.0**FRAC_BITS


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--measure", nargs="*", metavar="OPERATION", help="errors; of all, or these"
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    for name in [] if args.measure is None else args.measure or EXAMPLES:
        rows = tables.read_csv(MEASURED) if MEASURED.exists() else []
        known = {row["operation"]: row["error_lsb"] for row in rows if row["operation"] in EXAMPLES}
        known[name] = measured(EXAMPLES[name])
        print(f"{name}: {known[name]:.3f} LSB", flush=True)
        rows = [{"operation": n, "error_lsb": known[n]} for n in sorted(known)]
        tables.write_csv(MEASURED, rows, FIELDS)
    publish(__file__, DOCUMENT, document(), args.check)


if __name__ == "__main__":
    main()
