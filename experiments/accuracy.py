"""How exact are the protocols? Errors of each over its whole domain, at six precisions.

Writes docs/accuracy.csv and docs/accuracy.md:

    python experiments/accuracy.py

References are float64, or Python integers where float64 is too coarse.
"""

import argparse
import math
import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lpgan_jax as lp
from lpgan_jax import FixedPoint
from lpgan_jax import protocols as P
from lpgan_jax.common import tables
from lpgan_jax.common.files import atomic_write
from lpgan_jax.common.tables import Row
from lpgan_jax.mpc.shares import share_words

DOCS = Path(__file__).parent.parent / "docs"
COMMAND = "python experiments/accuracy.py"
FRAC_BITS = (12, 16, 18, 20, 24, 26)
INPUTS = 2048  # of every case, besides the edges
GOAL_BITS = 18
SMALL = 2.0**20  # results below this, in LSB, are "small": 2^-24 of them is a sixteenth of an LSB
ALPHA = 0.2

# What makes compiling quick. The programs are used once; they compute with integers (but for DS's
# coefficients), so that the results are the same.
_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 0}
if version("jaxlib") < "0.11":
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False

NEWLINE = "\n"

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Case:
    """A protocol, the inputs it is tried on, and what it should give.

    Attributes:
        call: (key, fxp, *shares) -> shares.
        inputs: (rng, f, n) -> arrays of integers (the values times 2^f).
        compare: (result, f, *inputs) -> (error, exact result), in LSB.
        domain: as text, with {} for each of `exponents`.
        exponents: (a, b) for a + b f.
        stated: (f, |exact|, *inputs) -> the largest error that the protocol's docstring allows, in
            LSB; None: it must be exact.
        stated_text: the same in the docstring's words.
        goal: the relative error that must not be passed at 18 bits, where it is more than 4 LSB.
        fixed: LSB of the stated error that do not grow with the result, if others do.
    """

    call: Callable[..., jax.Array]
    inputs: Callable[[np.random.Generator, int, int], Arrays]
    compare: Callable[..., tuple[np.ndarray, np.ndarray]]
    domain: str
    exponents: tuple[tuple[int, int], ...]
    stated: Callable[..., Any] | None
    stated_text: str
    goal: float = 2.0**-14
    fixed: float | None = None

    def domain_at(self, frac_bits: int | None) -> str:
        """The domain at f, or (None) as a formula of f."""
        powers = []
        for a, b in self.exponents:
            if frac_bits is not None:
                powers.append(f"2^{a + b * frac_bits}")
                continue
            slope = {0: "", 1: "+f", -1: "-f"}.get(b, f"{b:+d}f")
            text = f"{a or ''}{slope}".removeprefix("+")
            powers.append(f"2^{text}" if text.isdigit() else f"2^({text})")
        return self.domain.format(*powers)


# Inputs -------------------------------------------------------------------------------------------


def sizes(rng: np.random.Generator, bits: float | np.ndarray, count: int) -> np.ndarray:
    """Integers from 1 to 2^bits - 1, of every size alike."""
    return np.floor(2.0 ** (rng.uniform(0, 1, count) * bits)).astype(np.int64)


def edges(bits: int) -> np.ndarray:
    """All powers of two below 2^bits and their neighbours, up to 2^bits - 1; without 0."""
    powers = 2 ** np.arange(bits, dtype=np.int64)
    return np.unique(np.concatenate([powers, powers + 1, 2 * (powers - 1) + 1]))[: 3 * bits - 2]


def positive(bits: int, zero: bool = False) -> Callable[..., Arrays]:
    """Integers from 1 (or 0) to 2^bits - 1."""

    def inputs(rng: np.random.Generator, f: int, count: int) -> Arrays:
        smallest = np.arange(1 - zero, 1)
        return (np.concatenate([smallest, edges(bits), sizes(rng, bits, count)]),)

    return inputs


def signed(
    bits: Callable[[int], int],
    zero: bool = True,
    dense: Callable[[int], tuple[float, float]] | None = None,
) -> Callable[..., Arrays]:
    """Integers of both signs below 2^bits; half of them evenly from an interval if one is given."""

    def inputs(rng: np.random.Generator, f: int, count: int) -> Arrays:
        spread = count if dense is None else count // 2
        ends = edges(bits(f))
        values = [np.arange(int(zero)), -ends, ends]
        values.append(sizes(rng, bits(f), spread) * rng.choice([-1, 1], spread))
        if dense is not None:
            reals = rng.uniform(*dense(f), count - spread)
            values.append(np.rint(reals * 2.0**f).astype(np.int64))
        return (np.concatenate(values),)

    return inputs


def factors(rng: np.random.Generator, f: int, count: int) -> Arrays:
    """Pairs with |x y| < 2^62 as integers: of every size, half of them near that."""
    bits = rng.uniform(0, 62, count)
    x = np.floor(2.0**bits).astype(np.int64)
    y = np.floor(2.0 ** (62 - bits) * rng.uniform(0, 0.99, count)).astype(np.int64)
    y[::2] = sizes(rng, 62 - bits, count)[::2] - 1
    top = 2**62 - 1
    x = np.concatenate([[0, top, 1, 2**31 - 1, 0, 2**31], x])
    y = np.concatenate([[0, 1, top, 2**31, top, 2**31 - 1], y])
    return x * rng.choice([-1, 1], len(x)), y * rng.choice([-1, 1], len(x))


def quotients(rng: np.random.Generator, f: int, count: int) -> Arrays:
    """x and y with |y| < 2^(28+f), |x| < 2^62 and |x / y| < 2^(34-f): of every size, and edges."""
    (y,) = positive(28 + f)(rng, f, count)
    largest = [min(int(v) * 2 ** (34 - f), 2**62) - 1 for v in y]
    x = sizes(rng, np.log2(np.asarray(largest, np.float64) + 1), len(y))
    x = np.minimum(x, largest)
    x[::8] = np.asarray(largest)[::8]
    x[1::16] = y[1::16]
    x[9::64] = 0
    return x * rng.choice([-1, 1], len(x)), y * rng.choice([-1, 1], len(x))


def pairs(rng: np.random.Generator, f: int, count: int) -> Arrays:
    """Pairs below 2^62: of every size and over the whole range, ties, neighbours and extremes."""
    top = 2**62 - 1
    extremes = np.array([-top, 1 - top, -(2**61), -1, 0, 1, 2**32, 2**61, top - 1, top])
    u = rng.integers(-top, top, count, endpoint=True)
    v = rng.integers(-top, top, count, endpoint=True)
    quarter = count // 4
    v[:quarter] = u[:quarter]
    v[quarter : 2 * quarter] = u[quarter : 2 * quarter] + rng.choice([-1, 1], quarter)
    near = slice(2 * quarter, 3 * quarter)
    v[near] = u[near] + sizes(rng, 61, quarter) * rng.choice([-1, 1], quarter)
    u = np.concatenate([np.repeat(extremes, len(extremes)), u])
    v = np.concatenate([np.tile(extremes, len(extremes)), v])
    return u, np.clip(v, -top, top)


# References ---------------------------------------------------------------------------------------


def rational(numerator: Callable[..., Any]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The result is numerator / 2^f, in Python integers."""

    def compare(z: np.ndarray, f: int, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exact = numerator(*(x.astype(object) for x in inputs))
        error = (z.astype(object) * 2**f - exact).astype(np.float64) * 2.0**-f
        return error, exact.astype(np.float64) * 2.0**-f

    return compare


def real(function: Callable[..., np.ndarray]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The result is 2^f times a function of the real values, in float64; below 2^53 LSB."""

    def compare(z: np.ndarray, f: int, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exact = function(f, *(x * 2.0**-f for x in inputs)) * 2.0**f
        return z - exact, exact

    return compare


def integer(function: Callable[..., np.ndarray]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The result is an integer function of the inputs."""

    def compare(z: np.ndarray, f: int, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exact = function(*inputs)
        return np.asarray(z.astype(object) - exact, np.float64), np.asarray(exact, np.float64)

    return compare


def compare_softplus(z: np.ndarray, f: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x above 0 as an integer, and ln(1 + e^-|x|), so that nothing is lost for large x."""
    line, rest = np.maximum(x, 0), np.log1p(np.exp(-np.abs(x * 2.0**-f))) * 2.0**f
    return (z - line) - rest, line + rest


def compare_normalised(z: np.ndarray, f: int, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M = u 2^k with 2^61 <= M < 2^62, and 2^k; of u = 0, 0 and 2^61."""
    powers = [2 ** (62 - int(v).bit_length()) if v else 2**61 for v in u]
    exact = np.array([[int(v) * p for v, p in zip(u, powers, strict=True)], powers], object)
    return np.asarray(z.astype(object) - exact, np.float64), exact.astype(np.float64)


def exponential(f: int, x: np.ndarray) -> np.ndarray:
    """e^x up to where `sec_exp` saturates."""
    return np.exp(np.minimum(x, (34 - f) * math.log(2)))


def logistic(f: int, x: np.ndarray) -> np.ndarray:
    """1/(1 + e^-x), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


# Cases --------------------------------------------------------------------------------------------


def lsb_and(lsb: float, relative: int) -> dict[str, Any]:
    """`lsb` LSB and 2^relative of the result, as fields of a `Case`."""
    return {
        "stated": lambda f, size, *_: lsb + 2.0**relative * size,
        "stated_text": f"{lsb:g} LSB and 2^{relative} relative",
        "fixed": lsb,
    }


def saturating(f: int) -> tuple[float, float]:
    """Where sigmoid, tanh and softplus are neither constant nor linear, and a bit more."""
    return -(f + 4) * math.log(2), (f + 4) * math.log(2)


BELOW_1: dict[str, Any] = {"stated": lambda f, size, *_: 1.0, "stated_text": "below 1 LSB"}
EXACT: dict[str, Any] = {"stated": None, "stated_text": "exact"}
WAVE: dict[str, Any] = {
    "stated": lambda f, *_: 2.0 if f <= 24 else 4.0,
    "stated_text": "2 LSB up to f = 24, 4 beyond",
}
SERIES = signed(lambda f: 61, dense=saturating)
UP_TO_61 = ("|x| < {}", ((61, -1),))
RANGE = ("{} <= u < {}", ((0, -1), (62, -1)))

CASES: dict[str, Case] = {
    "sec_mul": Case(
        lambda k, fxp, x, y: P.sec_mul(k, x, y, fxp),
        factors,
        rational(lambda x, y: x * y),
        "|x y| < {}",
        ((62, -2),),
        **BELOW_1,
    ),
    "sec_square": Case(
        lambda k, fxp, x: P.sec_square(k, x, fxp),
        signed(lambda f: 31),
        rational(lambda x: x * x),
        "x^2 < {}",
        ((62, -2),),
        **BELOW_1,
    ),
    "truncate": Case(
        lambda k, fxp, x: P.truncate(k, x, fxp.frac_bits),
        signed(lambda f: 62),
        rational(lambda x: x),
        "|x| < {} at 2f bits, by f bits",
        ((62, -2),),
        **BELOW_1,
    ),
    "sec_cmp": Case(
        lambda k, fxp, u, v: P.sec_cmp(k, u, v),
        pairs,
        integer(lambda u, v: (u > v).astype(np.int64)),
        "|u|, |v| < {}",
        ((62, -1),),
        **EXACT,
    ),
    "sec_relu": Case(
        lambda k, fxp, x: P.sec_relu(k, x),
        signed(lambda f: 63),
        integer(lambda x: np.maximum(x, 0)),
        "|x| < {}",
        ((63, -1),),
        **EXACT,
    ),
    "sec_leaky_relu": Case(
        lambda k, fxp, x: P.sec_leaky_relu(k, x, fxp, ALPHA),
        signed(lambda f: 8 + f),
        real(lambda f, x: np.where(x > 0, x, ALPHA * x)),
        "|x| < {}",
        ((8, 0),),
        stated=lambda f, size, x: 1 + 2.0**-25 * np.abs(x),
        stated_text="below 1 LSB and 2^-25 |x|",
        fixed=1.0,
    ),
    "range_conversion": Case(
        lambda k, fxp, u: jnp.stack(P.range_conversion(k, u, fxp), axis=1),
        positive(62, zero=True),
        compare_normalised,
        "0 <= u < {}",
        ((62, -1),),
        **EXACT,
    ),
    "sec_sqrt": Case(
        lambda k, fxp, u: P.sec_sqrt(k, u, fxp),
        positive(62, zero=True),
        real(lambda f, u: np.sqrt(u)),
        "0 <= u < {}",
        ((62, -1),),
        **lsb_and(1, -25),
    ),
    "sec_inv_sqrt": Case(
        lambda k, fxp, u: P.sec_inv_sqrt(k, u, fxp),
        positive(62),
        real(lambda f, u: 1 / np.sqrt(u)),
        *RANGE,
        **lsb_and(1, -24),
    ),
    "sec_inv": Case(
        lambda k, fxp, u: P.sec_inv(k, u, fxp),
        signed(lambda f: 62, zero=False),
        real(lambda f, u: 1 / u),
        "{} <= |u| < {}",
        ((0, -1), (62, -1)),
        **lsb_and(1, -25),
    ),
    "sec_div": Case(
        lambda k, fxp, x, y: P.sec_div(k, x, y, fxp),
        quotients,
        real(lambda f, x, y: x / y),
        "|x| < {}, {} <= |y| < {}, |x / y| < {}",
        ((62, -1), (0, -1), (28, 0), (34, -1)),
        **lsb_and(2, -23),
    ),
    "sec_log": Case(
        lambda k, fxp, u: P.sec_log(k, u, fxp),
        positive(62),
        real(lambda f, u: np.log(u)),
        *RANGE,
        stated=lambda f, *_: 2 + 2.0 ** (f - 24),
        stated_text="2 LSB and 2^-24",
    ),
    "sec_exp": Case(
        lambda k, fxp, x: P.sec_exp(k, x, fxp),
        signed(lambda f: 54, dense=lambda f: (-(f + 4) * math.log(2), (36 - f) * math.log(2))),
        real(exponential),
        "|x| < {}, constant from (34-f) ln 2 on",
        ((54, -1),),
        goal=2.0**-12,
        stated=lambda f, size, x: 1.25 + (2.0**-24 + 2.0 ** -(f + 9)) * size,
        stated_text="1.25 LSB and 2^-24 + 2^-(f+9) relative",
        fixed=1.25,
    ),
    "sec_sigmoid": Case(
        lambda k, fxp, x: P.sec_sigmoid(k, x, fxp), SERIES, real(logistic), *UP_TO_61, **WAVE
    ),
    "sec_tanh": Case(
        lambda k, fxp, x: P.sec_tanh(k, x, fxp),
        SERIES,
        real(lambda f, x: np.tanh(x)),
        *UP_TO_61,
        **WAVE,
    ),
    "sec_softplus": Case(
        lambda k, fxp, x: P.sec_softplus(k, x, fxp),
        SERIES,
        compare_softplus,
        *UP_TO_61,
        stated=lambda f, *_: 3.0 if f <= 18 else 2.0 ** (f - 19),
        stated_text="3 LSB up to f = 18 and 2^-19 beyond",
    ),
}


# Measuring ----------------------------------------------------------------------------------------

FIELDS = (
    "protocol",
    "frac_bits",
    "domain",
    "inputs",
    "wrong",
    "max_lsb",
    "rms_lsb",
    "max_lsb_small",
    "rms_lsb_small",
    "relative",
    "of_stated",
    "of_goal",
)


@dataclass(frozen=True)
class Measured:
    """Errors and exact results, in LSB, of one protocol at one precision."""

    case: Case
    frac_bits: int
    inputs: Arrays
    errors: np.ndarray
    exact: np.ndarray


def measure(name: str, frac_bits: int, count: int = INPUTS) -> Measured:
    """Run a protocol on its inputs. Seeded by its name and f alone."""
    case, seed = CASES[name], zlib.crc32(name.encode())
    inputs = case.inputs(np.random.default_rng([seed, frac_bits]), frac_bits, count)
    keys = jax.random.split(lp.key(seed + frac_bits), len(inputs) + 1)
    shares = [
        share_words(k, jnp.asarray(x.astype(np.uint64)))
        for k, x in zip(keys[1:], inputs, strict=True)
    ]

    def run(key: jax.Array, *shares: jax.Array) -> jax.Array:
        return case.call(key, FixedPoint(frac_bits), *shares)

    words = np.asarray(jax.jit(run, compiler_options=_OPTIONS)(keys[0], *shares))
    errors, exact = case.compare((words[0] + words[1]).view(np.int64), frac_bits, *inputs)
    return Measured(case, frac_bits, inputs, np.abs(errors), np.abs(exact))


def summarise(name: str, measured: Measured) -> Row:
    """The row of the table."""
    case, f = measured.case, measured.frac_bits
    errors, exact = measured.errors, measured.exact
    row: Row = dict.fromkeys(FIELDS)
    row |= {
        "protocol": name,
        "frac_bits": f,
        "domain": case.domain_at(f),
        "inputs": len(measured.inputs[0]),
        "max_lsb": float(errors.max()),
        "rms_lsb": float(np.sqrt(np.mean(errors**2))),
    }
    if case.stated is None:
        row["wrong"] = int(np.atleast_2d(errors != 0).any(0).sum())
        return row
    small = errors[exact < SMALL]
    row["max_lsb_small"] = float(small.max())
    row["rms_lsb_small"] = float(np.sqrt(np.mean(small**2)))
    row["of_stated"] = float((errors / case.stated(f, exact, *measured.inputs)).max())
    if case.fixed is not None:
        beyond = np.maximum(errors - case.fixed, 0)
        row["relative"] = float((beyond / np.maximum(exact, 1)).max())
    if f == GOAL_BITS:
        row["of_goal"] = float((errors / np.maximum(4, case.goal * exact)).max())
    return row


def table(workers: int, count: int = INPUTS) -> list[Row]:
    """All rows, with progress."""
    jobs = [(name, f) for name in CASES for f in FRAC_BITS]
    rows: dict[tuple[str, int], Row] = {}
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        futures = {
            pool.submit(lambda job: summarise(job[0], measure(*job, count)), job): job
            for job in jobs
        }
        for done, future in enumerate(as_completed(futures), 1):
            row = rows[futures[future]] = future.result()
            print(
                f"[{done:2d}/{len(jobs)}, {time.perf_counter() - start:4.0f} s] "
                f"{row['protocol']} at {row['frac_bits']} bits: "
                f"{row['max_lsb']:.3g} LSB at most, {row['rms_lsb']:.3g} rms",
                flush=True,
            )
    return [rows[job] for job in jobs]


# Writing ------------------------------------------------------------------------------------------


def to_csv(rows: list[Row]) -> str:
    """Rows as CSV, with six digits."""
    rounded = [
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
    ]
    return tables.to_csv(rounded, FIELDS)


def from_csv(text: str) -> list[Row]:
    """The rows of `to_csv`."""
    types = {"protocol": str, "domain": str, "frac_bits": int, "inputs": int, "wrong": int}
    return tables.from_csv(text, types)


def _number(value: Any) -> str:
    """Two decimals, or a power of two if large."""
    return f"{value:.2f}" if value < 1000 else f"2^{math.log2(value):.1f}"


def _power(value: Any) -> str:
    return f"2^{math.log2(value):.1f}" if value else "0"


def _grid(rows: list[Row], form: Callable[..., str], *fields: str) -> list[str]:
    """Protocols down, fraction bits across; protocols that lack the fields are left out."""
    lines = ["| |" + "".join(f" f = {f} |" for f in FRAC_BITS), "|---|" + "---:|" * len(FRAC_BITS)]
    for name in CASES:
        cells = [[row[field] for field in fields] for row in rows if row["protocol"] == name]
        if cells[0][0] is not None:
            texts = (" / ".join(form(value) for value in cell) for cell in cells)
            lines.append(f"| `{name}` |" + "".join(f" {text} |" for text in texts))
    return lines


def _summary(rows: list[Row]) -> list[str]:
    lines = [
        "| protocol | domain | the same at 18 bits | error stated | worst over it | goal |",
        "|---|---|---|---|---:|---:|",
    ]
    for name, case in CASES.items():
        own = [row for row in rows if row["protocol"] == name]
        (row,) = (row for row in own if row["frac_bits"] == GOAL_BITS)
        if case.stated is None:
            wrong, tried = (sum(int(row[key] or 0) for row in own) for key in ("wrong", "inputs"))
            worst, goal = f"{wrong} of {tried:,} wrong", "missed" if wrong else "reached"
        else:
            worst = f"{max(float(row['of_stated'] or 0) for row in own):.2f}"
            of_goal = float(row["of_goal"] or 0)
            goal = f"{'reached' if of_goal <= 1 else 'missed'} ({of_goal:.2f})"
        texts = (case.domain_at(None), case.domain_at(GOAL_BITS), case.stated_text, worst, goal)
        cells = (text.replace("|", "\\|").replace("<=", "≤") for text in texts)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def to_markdown(rows: list[Row]) -> str:
    """The page: a summary, then a table for each kind of error."""
    least, most = (bound(int(row["inputs"] or 0) for row in rows) for bound in (min, max))
    return f"""# Accuracy

Written by `{COMMAND}` from the figures of [accuracy.csv](accuracy.csv). Errors are in LSB: 1 LSB is
2^-f, f the fraction bits.

Every protocol runs at every f on {least:,} to {most:,} inputs of its whole domain: of all sizes
alike, the powers of two and their neighbours up to the ends of the domain, and for functions that
saturate also evenly where they do not. References are float64; Python integers for products,
truncation and what is exact. Seeds are fixed: the CRC-32 of the protocol's name, and f. Rounding is
random, so that other seeds give other last digits.

{NEWLINE.join(_summary(rows))}

*Worst over it*: the largest error, as a part of the error that the docstring states, over all f
and inputs; up to 1 it holds. *Goal*: at 18 bits, 4 LSB or 2^-14 of the result (2^-12 for the
exponential), whichever is larger; in brackets the largest error as a part of that. `sec_leaky_relu`
has the slope {ALPHA}.

## Small results: largest error / root mean square [LSB]

Results below 2^20 LSB, where 2^-24 of the result is little next to an LSB.

{NEWLINE.join(_grid(rows, _number, "max_lsb_small", "rms_lsb_small"))}

## Large results: relative error

The largest of (error - what is stated in LSB) / result, or 0 if no error is larger than that. Only
of protocols whose error grows with the result.

{NEWLINE.join(_grid(rows, _power, "relative"))}

## All results: largest error / root mean square [LSB]

Over the whole domain. Where the error grows with the result, the largest results (up to 2^52 LSB)
decide.

{NEWLINE.join(_grid(rows, _number, "max_lsb", "rms_lsb"))}
"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help="default: docs")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N")
    args = parser.parse_args()
    rows = from_csv(to_csv(table(args.workers)))  # the page has what the file has
    atomic_write(args.out / "accuracy.csv", to_csv(rows).encode(), private=False)
    atomic_write(args.out / "accuracy.md", to_markdown(rows).encode(), private=False)
    print(f"{args.out / 'accuracy.csv'} and accuracy.md")


if __name__ == "__main__":
    main()
