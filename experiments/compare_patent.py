"""What does the comparison as the patent prints it cost, and how often is it wrong?

Runs both variants of SecCmp on the same shares, |u - v| from 2^40 to 2^62, and counts what
protocols send. Writes docs/patent.csv, docs/patent.md and docs/patent.png:

    pip install -c constraints.txt -e '.[experiments]'    # once, for the plot
    python experiments/compare_patent.py
"""

import argparse
import functools
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lpgan_jax as lp
from lpgan_jax import protocols as P
from lpgan_jax.common import tables
from lpgan_jax.common.files import atomic_write
from lpgan_jax.common.tables import Row
from lpgan_jax.mpc import arithmetic, boolean, patent
from lpgan_jax.mpc.party import Party, simulate
from lpgan_jax.mpc.prng import KEY_WORDS
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.shares import share_words

DOCS = Path(__file__).parent.parent / "docs"
COMMAND = "python experiments/compare_patent.py"
FRAC_BITS = 18
ELEMENTS = 4096  # whose cost is counted
PAIRS = 2**20  # of one batch
BATCHES = 4
DIFFERENCES = range(40, 63)  # binary logarithms of |u - v|

FIELDS = (
    "table",
    "protocol",
    "rounds",
    "online_bits",
    "dealer_bits",
    "log2_difference",
    "pairs",
    "patent_wrong",
    "patent_expected",
    "ring_wrong",
)


# Costs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """Something whose cost is counted.

    Attributes:
        name: for the table.
        function: (key, *arrays) -> anything.
        arguments: shapes or types of the arrays, as `lp.cost` takes them.
        free: exchanges that are part of the trace and not of the protocol: the opening of its
            argument.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    free: int = 0


def _sign(bits: int, radix: int) -> Protocol:
    def function(key: jax.Array, x: jax.Array) -> jax.Array:
        def seat(party: Party, share: jax.Array, public: None) -> jax.Array:
            x = arithmetic.masked(party, Secret(share, FRAC_BITS))
            return boolean.sign_bit(party, x, bits=bits, radix=radix)

        return simulate(seat, key, x)

    return Protocol(f"sign bit, {bits} bits, radix {radix}", function, ((ELEMENTS,),), free=1)


def _most_significant(sequential: bool) -> Protocol:
    def function(key: jax.Array, rows: jax.Array) -> Any:
        def seat(party: Party, rows: jax.Array, public: None) -> Any:
            search = patent.most_significant if sequential else boolean.most_significant
            return search(party, rows)

        return simulate(seat, key, rows)

    rows = jax.ShapeDtypeStruct((2, 64, ELEMENTS // 64), jnp.uint64)
    name = "sequential, as printed" if sequential else "prefix tree, radix 4"
    return Protocol(f"SecMSB, 64 bits, {name}", function, (rows,))


def protocols() -> list[Protocol]:
    """All that are counted."""
    shape = (ELEMENTS,)
    return [
        Protocol("SecCmp, ours", P.sec_cmp, (shape, shape)),
        Protocol(
            "SecCmp, as printed", functools.partial(P.sec_cmp, variant="patent"), (shape, shape)
        ),
        Protocol("ReLU (sign bit, conversion, selection)", P.sec_relu, (shape,)),
        *(_sign(bits, radix) for bits in (64, 32) for radix in (2, 4, 8)),
        _most_significant(sequential=True),
        _most_significant(sequential=False),
    ]


def costs() -> list[Row]:
    """Rounds, and bits per server (from DS: to S2) and element; from traces alone."""
    rows = []
    for protocol in protocols():
        cost = lp.cost(protocol.function, *protocol.arguments)
        row: Row = dict.fromkeys(FIELDS)
        online = 8 * cost.online_bytes // ELEMENTS - 64 * protocol.free
        dealer = 8 * (cost.dealer_bytes_s2 - 4 * KEY_WORDS) // ELEMENTS
        row |= {
            "table": "cost",
            "protocol": protocol.name,
            "rounds": cost.rounds - protocol.free,
            "online_bits": online,
            "dealer_bits": dealer,
        }
        rows.append(row)
    return rows


# Failures -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("variant", "pairs"))
def wrong(key: jax.Array, difference: jax.Array, variant: str, pairs: int) -> jax.Array:
    """How many of `pairs` comparisons with u - v = +- difference are wrong, with uniform shares.

    u and v are uniform where both lie in the domain, |u|, |v| < 2^62. One key gives both variants
    the same shares, and the servers other masks.
    """
    k_shares, k_place, k_order, *k_run = jax.random.split(key, 5)
    room = (2**63 - 1 - difference).astype(jnp.uint64)  # smaller values below both
    place = jax.random.bits(k_place, (pairs,), jnp.uint64) % room
    low = place.astype(jnp.int64) - (2**62 - 1)
    high = low + difference
    order = jax.random.bits(k_order, (pairs,), jnp.uint8) % 2 == 0
    u, v = jnp.where(order, high, low), jnp.where(order, low, high)
    k_u, k_v = jax.random.split(k_shares)
    shares = [share_words(k, x.astype(jnp.uint64)) for k, x in ((k_u, u), (k_v, v))]
    z = P.sec_cmp(k_run[variant == "ring"], *shares, variant=variant)
    return jnp.sum(z[0] + z[1] != (u > v))


def failures(batches: int, pairs: int) -> Iterator[Row]:
    """One row for each size of |u - v|."""
    for log2 in DIFFERENCES:
        keys = jax.random.split(lp.key(log2), batches)
        counts = {
            variant: sum(int(wrong(k, jnp.int64(2**log2), variant, pairs)) for k in keys)
            for variant in ("patent", "ring")
        }
        row: Row = dict.fromkeys(FIELDS)
        row |= {
            "table": "failures",
            "log2_difference": log2,
            "pairs": batches * pairs,
            "patent_wrong": counts["patent"],
            "patent_expected": batches * pairs * 2.0 ** (log2 - 64),
            "ring_wrong": counts["ring"],
        }
        yield row


# Writing ------------------------------------------------------------------------------------------


def to_csv(rows: list[Row]) -> str:
    """Rows as CSV."""
    return tables.to_csv(rows, FIELDS)


def from_csv(text: str) -> list[Row]:
    """The rows of `to_csv`."""
    types = dict.fromkeys(FIELDS, int) | {"table": str, "protocol": str, "patent_expected": float}
    return tables.from_csv(text, types)


def _of(rows: list[Row], table: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["table"] == table]


def to_markdown(rows: list[Row]) -> str:
    """The page."""
    cost = [
        "| | rounds | bits that a server sends | bytes | bits from DS |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in _of(rows, "cost"):
        bits = row["online_bits"]
        cells = row["protocol"], row["rounds"], bits, f"{bits / 8:.1f}", row["dealer_bits"]
        cost.append("| " + " | ".join(map(str, cells)) + " |")
    failed = _of(rows, "failures")
    rates = [
        f"| \\|u - v\\| | at {FRAC_BITS} bits | as printed: wrong | expected | rate | ours |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in failed:
        log2, count = row["log2_difference"], row["patent_wrong"]
        expected = (
            f"{row['patent_expected']:,.3g}"
            if row["patent_expected"] < 1000
            else (f"{row['patent_expected']:,.0f}")
        )
        cells = (
            f"2^{log2}",
            f"2^{log2 - FRAC_BITS}",
            f"{count:,}" if count else "none",
            expected,
            f"{count / row['pairs']:.2e}" if count else "-",
            f"{row['ring_wrong']:,}" if row["ring_wrong"] else "none",
        )
        rates.append("| " + " | ".join(cells) + " |")
    total = sum(row["pairs"] for row in failed)
    newline = "\n"
    return f"""# The comparison as printed, and ours

Written by `{COMMAND}` from the figures of [patent.csv](patent.csv).

## What it costs

Per element, counted in the trace of {ELEMENTS:,} elements (`lp.cost`). DS sends S2 the bits of the
last column, and S1 a seed. SecCmp ends in arithmetic shares of 0 and 1. A sign bit is that of a
value that is masked and open (which takes a round and 64 bits, once for all uses of the value), and
ends in an XOR-shared bit. On 32 bits it is exact for |x| < 2^31: {2 ** (31 - FRAC_BITS):,} at
{FRAC_BITS} fraction bits.

{newline.join(cost)}

## How often it is wrong

As printed, each server forms its part of u - v and takes it for an integer in sign and magnitude:
right where the difference of the parts does not wrap. On uniform shares it wraps with probability
|u - v| / 2^64, and nothing tells. Ours takes the top bit of the sum modulo 2^64, which does not
depend on the shares.

{failed[0]["pairs"]:,} pairs in each line, the same shares for both; u and v are uniform in the
domain, |u|, |v| < 2^62. Sizes are in LSB, and in real terms in the second column.

{newline.join(rates)}

Ours was wrong in {sum(row["ring_wrong"] for row in failed):,} of {total:,} comparisons.

![failure rate against the difference](patent.png)
"""


def draw(rows: list[Row]) -> bytes:
    """The failure rates as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from scipy.stats import beta

    failed = _of(rows, "failures")
    x = np.array([2.0 ** row["log2_difference"] for row in failed])
    counts = np.array([row["patent_wrong"] for row in failed], np.float64)
    pairs = np.array([row["pairs"] for row in failed], np.float64)
    rates, seen = counts / pairs, counts > 0
    # Clopper and Pearson's exact interval of 95 %.
    low = beta.ppf(0.025, np.maximum(counts, 1), pairs - counts + 1)
    high = beta.ppf(0.975, counts + 1, pairs - counts)

    figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    line = np.array([2.0**39, 2.0**63])
    axes.plot(line, line / 2.0**64, color="0.6", linewidth=1.2, label="|u - v| / 2$^{64}$")
    axes.errorbar(
        x[seen],
        rates[seen],
        yerr=[(rates - low)[seen], (high - rates)[seen]],
        fmt="o",
        markersize=4,
        capsize=3,
        color="tab:red",
        label="as printed, measured, with 95 % interval",
    )
    if not seen.all():
        axes.errorbar(
            x[~seen],
            high[~seen],
            yerr=high[~seen] / 2,
            uplims=True,
            fmt="none",
            color="tab:red",
            alpha=0.5,
            label=f"as printed, none of {int(pairs[0]):,}: upper limit (95 %)",
        )
    floor = 2.0**-30
    ring = np.array([row["ring_wrong"] for row in failed], np.float64) / pairs
    text = f"ours: {int((ring * pairs).sum())} of {int(pairs.sum()):,} wrong"
    axes.plot(x, np.maximum(ring, floor), "v", color="tab:blue", markersize=5, label=text)
    axes.axhline(floor * 2, color="0.8", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(2.0**39, 2.0**63)
    axes.set_ylim(floor / 2, 1)
    ticks = [2.0**-power for power in range(0, 29, 4)]
    axes.set_yticks([*ticks, floor], [*(f"2$^{{{int(math.log2(t))}}}$" for t in ticks), "0"])
    axes.set_xticks([2.0**power for power in range(40, 63, 4)])
    axes.minorticks_off()
    axes.set_xlabel("|u - v| [LSB]")
    axes.set_ylabel("share of wrong comparisons")
    real = axes.secondary_xaxis(
        "top", functions=(lambda v: v * 2.0**-FRAC_BITS, lambda v: v * 2.0**FRAC_BITS)
    )
    real.set_xscale("log", base=2)
    real.set_xticks([2.0**power for power in range(22, 45, 4)])
    real.minorticks_off()
    real.set_xlabel(f"|u - v| at {FRAC_BITS} fraction bits")
    axes.set_title("SecCmp on uniform shares of Z$_{2^{64}}$")
    axes.legend(loc="upper left", frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return image.getvalue()


def main() -> None:
    """Count, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help="default: docs")
    parser.add_argument("--batches", type=int, default=BATCHES, metavar="N", help="of 2^20 pairs")
    args = parser.parse_args()
    rows = costs()
    for row in rows:
        print(f"{row['protocol']}: {row['rounds']} rounds, {row['online_bits']} bits", flush=True)
    for row in failures(args.batches, PAIRS):
        print(
            f"2^{row['log2_difference']}: as printed {row['patent_wrong']} of {row['pairs']:,} "
            f"wrong ({row['patent_expected']:.3g} expected), ours {row['ring_wrong']}",
            flush=True,
        )
        rows.append(row)
    atomic_write(args.out / "patent.csv", to_csv(rows).encode(), private=False)
    atomic_write(args.out / "patent.md", to_markdown(rows).encode(), private=False)
    atomic_write(args.out / "patent.png", draw(rows), private=False)
    print(f"{args.out / 'patent.csv'}, patent.md and patent.png")


if __name__ == "__main__":
    main()
