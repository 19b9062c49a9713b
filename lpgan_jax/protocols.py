"""The protocols over paired arrays: pure functions with an explicit DS key.

Each takes DS's typed ChaCha20 key first, then secrets as `uint64[2, *shape]` (S1's share first),
and returns the result's shares. They run both servers and DS in one program
(`lpgan_jax.mpc.party.simulate`), and may be jitted, vmapped over keys and data, scanned and
rematerialised. Elementwise protocols broadcast the axes after the party axis as NumPy does.

A protocol is deterministic in its key, as functions of `jax.random` are: **a key must be used
once**. Two calls with one key use the same masks, and the difference of their messages is the
difference of their secrets. `jax.vmap` over data with an unbatched key would do just that, and so
would the body of a `scan`, `map`, loop or `jit` with a key from outside of it: both are refused
where the protocol is called. Behind a `jit` of the caller's own in such a body, `lp.audit` sees it.

A line "Cost" says, per element and for large arrays: the longest chain of dependent exchanges, the
bits that each server sends the other, and the bits that DS sends S2 (at 18 fraction bits); DS sends
S1 one seed. Errors are in LSB, 2^-f. Outside the stated domain results are meaningless but
well-formed; nothing is revealed.

All raise TypeError for a key of a non-cryptographic PRNG and for shares that are not uint64,
ValueError for shapes that do not fit and for data that `vmap` batches without the key, and StaleKey
for data that belong to a trace that the key does not belong to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PRNGKeyArray, UInt8, UInt64

from lpgan_jax.mpc import (
    arithmetic,
    boolean,
    compare,
    division,
    elementary,
    patent,
    range_reduction,
    roots,
)
from lpgan_jax.mpc.activation import leaky
from lpgan_jax.mpc.fixed_point import FixedPoint
from lpgan_jax.mpc.party import Party, simulate
from lpgan_jax.mpc.prng import require_cryptographic
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.shares import Shares, require_shares
from lpgan_jax.mpc.traces import require_own_keys
from lpgan_jax.transform.function import secure
from lpgan_jax.transform.shared import Shared

__all__ = [
    "bit_decompose",
    "range_conversion",
    "sec_add",
    "sec_and",
    "sec_batch_norm",
    "sec_cmp",
    "sec_conv",
    "sec_deconv",
    "sec_div",
    "sec_exp",
    "sec_fc",
    "sec_inv",
    "sec_inv_sqrt",
    "sec_leaky_relu",
    "sec_log",
    "sec_matmul",
    "sec_msb",
    "sec_mul",
    "sec_or",
    "sec_relu",
    "sec_sigmoid",
    "sec_softplus",
    "sec_sqrt",
    "sec_square",
    "sec_tanh",
    "sec_xor",
    "truncate",
]

Broadcast = UInt64[jax.Array, "2 *#shape"]
"""Shares of operands, or of a result, whose axes after the party axis broadcast as NumPy's do."""
BroadcastBits = UInt8[jax.Array, "2 *#shape"]
"""Likewise XOR-shared bits, 0 or 1."""
Padding = tuple[tuple[int, int], tuple[int, int]]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _protocol(*static: str) -> Callable[[_Function], _Function]:
    """Compile a protocol; `static` arguments are no arrays.

    Whether the key belongs where the data do is looked at first: inside of `jit` all do.
    """

    def decorated(function: _Function) -> _Function:
        compiled = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(key: PRNGKeyArray, *args: Any, **kwargs: Any) -> Any:
            require_own_keys(key, (args, kwargs))
            return compiled(key, *args, **kwargs)

        return cast(_Function, call)

    return decorated


def _run(
    function: Callable[[Party, dict[str, Secret]], Secret],
    key: PRNGKeyArray,
    frac_bits: int,
    **shares: jax.Array | None,
) -> jax.Array:
    require_cryptographic(key)
    given = {name: array for name, array in shares.items() if array is not None}
    for name, array in given.items():
        require_shares(name, array)
    secrets = {name: Secret(jnp.asarray(array), frac_bits) for name, array in given.items()}
    return simulate(lambda party, s, _: function(party, s), key, secrets).share


def _check_broadcast(**shares: jax.Array) -> None:
    for name, array in shares.items():
        require_shares(name, array)
    _check_broadcast_shapes(**shares)


def _check_broadcast_shapes(**shares: jax.Array) -> None:
    try:
        jnp.broadcast_shapes(*(array.shape[1:] for array in shares.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {array.shape[1:]}" for name, array in shares.items())
        raise ValueError(f"shapes after the party axis do not broadcast: {shapes}") from None


def _align(*arrays: jax.Array) -> list[jax.Array]:
    """Put axes of length 1 after the party axis, so that values broadcast as NumPy's do."""
    rank = max(array.ndim for array in arrays)
    return [a.reshape(a.shape[:1] + (1,) * (rank - a.ndim) + a.shape[1:]) for a in arrays]


def _require_rank(name: str, array: jax.Array, rank: int, axes: str) -> None:
    require_shares(name, array)
    if array.ndim != rank + 1:
        raise ValueError(f"{name}: expected shape (2, {axes}), got {array.shape}")


def sec_add(x: Broadcast, y: Broadcast) -> Broadcast:
    """SecAdd: x + y, local and exact (modulo 2^64). Broadcasts. Source: LP-GAN patent.

    Cost: 0 rounds; 0 bits online; 0 bits from DS.
    """
    _check_broadcast(x=x, y=y)
    x, y = _align(x, y)
    return x + y


@_protocol("fxp")
def sec_mul(key: PRNGKeyArray, x: Broadcast, y: Broadcast, fxp: FixedPoint) -> Broadcast:
    """SecMul: x * y at f fraction bits, for |x y| < 2^(62-2f). Broadcasts.

    Open e = x - a and d = y - b; z = c + e [b] + [a] d, and S1 adds e d; DS deals c = a b.
    Error below 1 LSB, unbiased. Source: Beaver 1991, LP-GAN patent; truncation as in `truncate`.

    Cost: 2 rounds; 192 bits online; 96 bits from DS.
    """
    _check_broadcast(x=x, y=y)
    x, y = _align(x, y)
    f = fxp.frac_bits
    return _run(
        lambda p, s: arithmetic.truncate(p, arithmetic.mul(p, s["x"], s["y"]), f),
        key,
        f,
        x=x,
        y=y,
    )


@_protocol("fxp")
def sec_square(key: PRNGKeyArray, x: Shares, fxp: FixedPoint) -> Shares:
    """SecSq: x^2 at f fraction bits, for x^2 < 2^(62-2f). Error below 1 LSB, unbiased.

    Source: LP-GAN patent, with one mask (see `arithmetic.square`).

    Cost: 2 rounds; 128 bits online; 96 bits from DS.
    """
    f = fxp.frac_bits
    return _run(
        lambda p, s: arithmetic.truncate(p, arithmetic.square(p, s["x"]), f),
        key,
        f,
        x=x,
    )


@_protocol("fxp")
def sec_matmul(
    key: PRNGKeyArray,
    x: UInt64[jax.Array, "2 M K"],
    y: UInt64[jax.Array, "2 K N"],
    fxp: FixedPoint,
) -> UInt64[jax.Array, "2 M N"]:
    """X @ y for x [M, K] and y [K, N], at f fraction bits, for |x y| < 2^(62-2f).

    Error below 1 LSB, unbiased: one truncation of the exact sum. 2 rounds; MK + KN + MN words
    online; DS: 3 MN words. Source: Beaver 1991, LP-GAN patent.
    """
    return sec_fc(key, x, y, fxp)


@_protocol("bits")
def truncate(key: PRNGKeyArray, x: Shares, bits: int) -> Shares:
    """X / 2^bits in the ring, rounded down or up at random, for |x| < 2^62 as integers.

    Error below 1 LSB, mean 0: up with probability equal to the fraction dropped. Outside the range
    the error is about 2^(64 - bits). The published scheme names no truncation; the local one of
    other systems fails with probability |x| / 2^64 a value. Source: `arithmetic.truncate`.

    Cost: 1 round; 64 bits online; 96 bits from DS.

    Raises:
        ValueError: bits is outside 0 to 62.
    """
    if not 0 <= bits <= 62:
        raise ValueError(f"bits: expected 0 to 62, got {bits}")
    return _run(lambda p, s: arithmetic.truncate(p, s["x"], 0), key, bits, x=x)


# Bits ------------------------------------------------------------------------------------------


def _bit_operands(**shares: jax.Array) -> list[jax.Array]:
    """Check and broadcast XOR-shared bits; only their lowest bits count."""
    for name, array in shares.items():
        require_shares(name, array, np.uint8)
    _check_broadcast_shapes(**shares)
    aligned = _align(*(jnp.asarray(array) for array in shares.values()))
    return [array & jnp.uint8(1) for array in jnp.broadcast_arrays(*aligned)]


def _run_bits(
    function: Callable[[Seat, Any], Any], key: PRNGKeyArray, secrets: Any, shape: tuple[int, ...]
) -> jax.Array:
    """Run a protocol that ends in packed rows [..., words] of the value's shape; rows come last."""
    require_cryptographic(key)

    def seat(party: Seat, secrets: Any, _: None) -> jax.Array:
        rows = function(party, secrets)
        flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
        bits = jax.vmap(lambda row: boolean.unpack(party.ring, row, shape))(flat)
        return jnp.moveaxis(bits.reshape(*rows.shape[:-1], *shape), 0, -1).astype(jnp.uint8)

    return simulate(seat, key, secrets)


def sec_xor(b: BroadcastBits, c: BroadcastBits) -> BroadcastBits:
    """SecXor: b xor c of XOR-shared bits, local and exact. Broadcasts.

    b, c: uint8[2, ...] of 0 and 1, whose xor over the leading axis is the bit. Raises TypeError for
    other dtypes. Source: LP-GAN patent.

    Cost: 0 rounds; 0 bits online; 0 bits from DS.
    """
    b, c = _bit_operands(b=b, c=c)
    return b ^ c


@_protocol()
def sec_and(key: PRNGKeyArray, b: BroadcastBits, c: BroadcastBits) -> BroadcastBits:
    """SecAnd: b and c of XOR-shared bits uint8[2, ...], exact. Broadcasts.

    SecMul over Z_2 on packed words: open b xor alpha and c xor beta under fresh masks; DS deals
    alpha beta. Source: LP-GAN patent.

    Cost: 1 round; 2 bits online; 1 bits from DS.
    """
    return _gate(key, b, c, lambda party, u, v: boolean.conjunction(party, u, v))


@_protocol()
def sec_or(key: PRNGKeyArray, b: BroadcastBits, c: BroadcastBits) -> BroadcastBits:
    """SecOr: b or c = b xor c xor (b and c) of XOR-shared bits uint8[2, ...], exact. Broadcasts.

    Source: LP-GAN patent.

    Cost: 1 round; 2 bits online; 1 bits from DS.
    """
    return _gate(key, b, c, lambda party, u, v: u ^ v ^ boolean.conjunction(party, u, v))


def _gate(
    key: PRNGKeyArray,
    b: jax.Array,
    c: jax.Array,
    gate: Callable[[Seat, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    b, c = _bit_operands(b=b, c=c)

    def function(party: Seat, bits: list[jax.Array]) -> jax.Array:
        u, v = (boolean.pack(party.ring, array) for array in bits)
        return gate(party, u, v)[None]

    return _run_bits(function, key, [b, c], b.shape[1:])[..., 0]


@_protocol()
def bit_decompose(key: PRNGKeyArray, x: Shares) -> UInt8[jax.Array, "2 *shape 64"]:
    """DFC: XOR-shared bits of a ring value: uint8[2, ..., 64], the last axis u_63 ... u_0.

    Two's complement, exact for every x. x - a is opened, DS deals the bits of a, and a prefix tree
    adds the two. The published DFC gives each server the bits of its own share, which is local, and
    leaves the carries to whoever uses them. Source: LP-GAN patent, `boolean.decompose`.

    Cost: 3 rounds; 180 bits online; 994 bits from DS.
    """
    require_shares("x", x)
    return _run_bits(
        lambda p, s: boolean.decompose(p, arithmetic.masked(p, Secret(s, 0)))[::-1],
        key,
        jnp.asarray(x),
        x.shape[1:],
    )


@_protocol()
def sec_msb(
    key: PRNGKeyArray, bits: UInt8[jax.Array, "2 ... l"]
) -> tuple[UInt8[jax.Array, "2 ... l"], UInt8[jax.Array, "2 ..."]]:
    """SecMSB: which bit is the highest one that is set.

    t_l = 1, t_i = t_{i+1} (1 - u_i), f_i = t_{i+1} - t_i, zeta = sum f_i. The products are a prefix
    tree of radix 4: ceil(log_4 l) rounds, where the published loop takes l. 00011010 gives f =
    00010000 and zeta = 1; zeros give zeros. Source: LP-GAN patent.

    Args:
        key: DS's key.
        bits: uint8[2, ..., l], l at least 1, the last axis u_{l-1} ... u_0.

    Returns:
        f: uint8[2, ..., l], one-hot at the highest set bit; zeta: uint8[2, ...], whether there is
        one.

    Cost: 3 rounds; 165 bits online; 633 bits from DS.
    """
    (bits,) = _bit_operands(bits=bits)
    if bits.ndim < 2 or not bits.shape[-1]:
        raise ValueError(f"bits: expected shape (2, ..., l) with l >= 1, got {bits.shape}")

    def function(party: Seat, shares: jax.Array) -> jax.Array:
        rows = jax.vmap(lambda row: boolean.pack(party.ring, row))(jnp.moveaxis(shares, -1, 0))
        one_hot, found = boolean.most_significant(party, rows)
        return jnp.concatenate([one_hot, found[None]])

    both = _run_bits(function, key, bits, bits.shape[1:-1])
    return both[..., :-1], both[..., -1]


@_protocol("variant")
def sec_cmp(key: PRNGKeyArray, u: Broadcast, v: Broadcast, variant: str = "ring") -> Broadcast:
    """SecCmp: shares of the integer 1 if u > v, else 0, for integers |u|, |v| < 2^62. Broadcasts.

    Exact, for all shares: the top bit of v - u, whose opened part and dealt mask are added by a
    carry tree of radix 4 (`boolean.sign_bit`). Outside the domain: the sign of v - u modulo 2^64.

    `variant="patent"` is the published form, for comparison: sign-magnitude bits, a sequential
    SecMSB, an OR of the signs. It is made for integers that do not wrap: on uniform shares it is
    wrong with probability about |u - v| / 2^64. It takes 66 rounds, 259 bits online, 193 from DS.

    Source: LP-GAN patent.

    Cost: 4 rounds; 99 bits online; 400 bits from DS.

    Raises:
        ValueError: the variant is neither "ring" nor "patent".
    """
    if variant not in ("ring", "patent"):
        raise ValueError(f'variant: expected "ring" or "patent", got {variant!r}')
    _check_broadcast(u=u, v=v)
    u, v = jnp.broadcast_arrays(*_align(u, v))
    greater = compare.greater if variant == "ring" else patent.greater
    return _run(lambda p, s: compare.b2a(p, greater(p, s["u"], s["v"])), key, 0, u=u, v=v)


# Range reduction, roots and division -----------------------------------------------------------


class Normalised(NamedTuple):
    """u = m 2^p with 1/2 <= m < 1.

    Attributes:
        m: shares of m at 62 fraction bits (exactly u's bits, moved up).
        power: shares of 2^-p at 62 - f fraction bits: a power of two between 1 and 2^61 as an
            integer, so that nothing is lost; p = 62 - f - log2(integer).
    """

    m: Shares
    power: Shares


@_protocol("fxp")
def range_conversion(key: PRNGKeyArray, u: Shares, fxp: FixedPoint) -> Normalised:
    """SRC: m and 2^-p with u = m 2^p, 1/2 <= m < 1, for u from 1 LSB up to 2^(62-f); exact.

    m comes at 62 fraction bits and 2^-p at 62 - f (see `Normalised`). u = 0 gives m = 0 and p = 1 -
    f; u < 0 gives meaningless values.

    The exponent is found by comparing u with all powers of two under sharing. The published SRC
    finds p from each server's own share: that needs small shares, sends the size of each share to
    the other server, and misses [1/2, 1) where shares cancel. Source: LP-GAN patent, `normalise`.

    Cost: 4 rounds; 2199 bits online; 14324 bits from DS.
    """
    f = fxp.frac_bits
    require_cryptographic(key)
    require_shares("u", u)

    def function(party: Seat, share: jax.Array, public: None) -> Normalised:
        normalised, exponent, _ = range_reduction.normalise(party, Secret(share, f))
        return Normalised(normalised.share, exponent.power(party, 1).share)

    return simulate(function, key, jnp.asarray(u))


@_protocol("fxp")
def sec_sqrt(key: PRNGKeyArray, u: Shares, fxp: FixedPoint) -> Shares:
    """SSqrt: sqrt(u) for u from 0 up to 2^(62-f).

    Error: 1 LSB and 2^-25 relative. u < 0 gives a meaningless value. u = m 4^p by comparisons; for
    each p beside them, sqrt(m) by one trigonometric series where the published protocol iterates.
    Source: LP-GAN patent, `roots.sqrt`.

    Cost: 4 rounds; 3098 bits online; 64499 bits from DS.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: roots.sqrt(p, s["u"], f), key, f, u=u)


@_protocol("fxp")
def sec_inv_sqrt(key: PRNGKeyArray, u: Shares, fxp: FixedPoint) -> Shares:
    """Inverse SSqrt: 1/sqrt(u) for u from 1 LSB up to 2^(62-f).

    Error: 1 LSB and 2^-24 relative. u = 0 gives a large finite value, u < 0 a meaningless one. As
    `sec_sqrt`. Source: LP-GAN patent, `roots.inverse_sqrt`.

    Cost: 4 rounds; 3098 bits online; 56563 bits from DS.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: roots.inverse_sqrt(p, s["u"], f), key, f, u=u)


@_protocol("fxp")
def sec_inv(key: PRNGKeyArray, u: Shares, fxp: FixedPoint) -> Shares:
    """SecInv: 1/u for u of either sign, 1 LSB <= |u| < 2^(62-f).

    Error: 1 LSB and 2^-25 relative. u = 0 gives a large finite value. |u| = m 2^p and the sign by
    comparisons, 1/m by a series. (The published iteration x (2 - u x) from a fixed start diverges
    for large u.) Source: LP-GAN patent, `division.inverse`.

    Cost: 8 rounds; 4625 bits online; 54086 bits from DS.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: division.inverse(p, s["u"], f), key, f, u=u)


@_protocol("fxp")
def sec_div(key: PRNGKeyArray, x: Broadcast, y: Broadcast, fxp: FixedPoint) -> Broadcast:
    """SecDiv: x / y for y of either sign, 1 LSB <= |y| < 2^28, |x / y| < 2^(34-f). Broadcasts.

    |x| < 2^(62-f). Error: 2 LSB and 2^-23 relative, also where x and y are small. y = 0 gives a
    meaningless, finite value. Source: LP-GAN patent, `division.divide`.

    Cost: 7 rounds; 3569 bits online; 28966 bits from DS.
    """
    _check_broadcast(x=x, y=y)
    x, y = jnp.broadcast_arrays(*_align(x, y))
    f = fxp.frac_bits
    return _run(lambda p, s: division.divide(p, s["x"], s["y"], f), key, f, x=x, y=y)


# Elementary functions --------------------------------------------------------------------------


@_protocol("fxp")
def sec_log(key: PRNGKeyArray, u: Shares, fxp: FixedPoint) -> Shares:
    """SecLog: ln u for u from 1 LSB up to 2^(62-f).

    Error: 2 LSB and 2^-24. u = 0 gives a finite value, u < 0 a meaningless one. ln u = ln m + p ln
    2, ln m by a series on [1/2, 1). (The published series of 11 terms without range reduction errs
    by 0.16 at u = 0.1.) Source: LP-GAN patent, `elementary.log`.

    Cost: 6 rounds; 2391 bits online; 16084 bits from DS.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: elementary.log(p, s["u"], f), key, f, u=u)


@_protocol("fxp")
def sec_exp(key: PRNGKeyArray, x: Shares, fxp: FixedPoint) -> Shares:
    """SecExp: e^x for |x| < 2^(54-f); up to x = (34 - f) ln 2 (11.09 at 18 bits), then constant.

    Error: 1.25 LSB and 2^-24 + 2^-(f+9) relative; 0 below x = -(f + 2) ln 2, where e^x is less than
    a quarter of an LSB. Two comparisons tell where; between, e^x is a public power of what was
    opened times a dealt one of its mask. (The published product e^(u') e^(u'') fails for shares
    that wrap.) Source: LP-GAN patent, `elementary.exp`, `exponential`.

    Cost: 4 rounds; 198 bits online; 2903 bits from DS.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: elementary.exp(p, s["x"], f), key, f, x=x)


@_protocol("fxp")
def sec_sigmoid(key: PRNGKeyArray, x: Shares, fxp: FixedPoint) -> Shares:
    """1/(1 + e^-x) for |x| < 2^(61-f); saturates.

    Error: 2 LSB up to f = 24, 4 beyond. Two comparisons tell where it saturates, a series of sines
    does the rest. Source: LP-GAN patent, `elementary.sigmoid`.

    Cost: 4 rounds; 198 bits online; 3899 bits from DS.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: elementary.sigmoid(p, s["x"], f), key, f, x=x)


@_protocol("fxp")
def sec_tanh(key: PRNGKeyArray, x: Shares, fxp: FixedPoint) -> Shares:
    """tanh(x) for |x| < 2^(61-f); saturates.

    Error: 2 LSB up to f = 24, 4 beyond. As `sec_sigmoid`. Source: LP-GAN patent,
    `elementary.tanh`.

    Cost: 4 rounds; 198 bits online; 3899 bits from DS.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: elementary.tanh(p, s["x"], f), key, f, x=x)


@_protocol("fxp")
def sec_softplus(key: PRNGKeyArray, x: Shares, fxp: FixedPoint) -> Shares:
    """ln(1 + e^x) for |x| < 2^(61-f): the loss -ln sigmoid(o) is softplus(-o).

    Error: 3 LSB up to f = 18 and 2^-19 beyond. Source: `elementary.softplus`.

    Cost: 5 rounds; 262 bits online; 3611 bits from DS.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: elementary.softplus(p, s["x"], f), key, f, x=x)


# Layers ----------------------------------------------------------------------------------------


@_protocol()
def sec_relu(key: PRNGKeyArray, x: Shares) -> Shares:
    """SR: max(x, 0), exact, at any scale, for |x| < 2^63 as integers.

    x is opened once, masked, for the comparison and the selection. Source: LP-GAN patent,
    `compare.positive`.

    Cost: 4 rounds; 99 bits online; 464 bits from DS.
    """

    def function(party: Seat, s: dict[str, Secret]) -> Secret:
        x = arithmetic.masked(party, s["x"])
        return compare.select(party, compare.positive(party, x), x)

    return _run(function, key, 0, x=x)


@_protocol("fxp", "alpha")
def sec_leaky_relu(key: PRNGKeyArray, x: Shares, fxp: FixedPoint, alpha: float = 0.2) -> Shares:
    """SLR: x where x > 0, else alpha * x, for |x| < 2^8.

    Error below 1 LSB and 2^-25 |x| (alpha's own rounding). Source: LP-GAN patent,
    `mpc.activation.leaky`.

    Cost: 5 rounds; 163 bits online; 560 bits from DS.

    Raises:
        ValueError: alpha is not between 0 and 1.
    """
    f = fxp.frac_bits

    def function(party: Seat, s: dict[str, Secret]) -> Secret:
        x = arithmetic.masked(party, s["x"])
        return leaky(party, compare.positive(party, x), x, alpha, f)

    return _run(function, key, f, x=x)


# Layers: plain JAX under `secure` -----------------------------------------------------------------


def _layer(
    function: Callable[..., jax.Array],
    key: PRNGKeyArray,
    fxp: FixedPoint,
    *shares: jax.Array | None,
) -> jax.Array:
    """A function of real arrays, on shares at f fraction bits."""
    require_cryptographic(key)
    given = [Shared(jnp.asarray(s), fxp.frac_bits) for s in shares if s is not None]
    result: jax.Array = secure(function, frac_bits=fxp.frac_bits)(key, *given).words
    return result


def _biased(y: jax.Array, bias: Sequence[jax.Array]) -> jax.Array:
    return y + bias[0] if bias else y


@_protocol("fxp")
def sec_fc(
    key: PRNGKeyArray,
    x: UInt64[jax.Array, "2 N I"],
    w: UInt64[jax.Array, "2 I O"],
    fxp: FixedPoint,
    bias: UInt64[jax.Array, "2 O"] | None = None,
) -> UInt64[jax.Array, "2 N O"]:
    """SecFC: x w + bias, x [N, I], w [I, O], bias [O]; cost and error as `sec_matmul`."""
    _require_rank("x", x, 2, "N, I")
    _require_rank("w", w, 2, "I, O")
    if x.shape[2] != w.shape[1]:
        raise ValueError(f"x {x.shape[1:]} and w {w.shape[1:]} do not fit: the inner sizes differ")
    _check_bias(bias, w)
    return _layer(lambda x, w, *b: _biased(x @ w, b), key, fxp, x, w, bias)


@_protocol("fxp", "strides", "padding")
def sec_conv(
    key: PRNGKeyArray,
    x: UInt64[jax.Array, "2 N H W I"],
    w: UInt64[jax.Array, "2 kh kw I O"],
    fxp: FixedPoint,
    strides: tuple[int, int] = (2, 2),
    padding: Padding = ((1, 1), (1, 1)),
    bias: UInt64[jax.Array, "2 O"] | None = None,
) -> UInt64[jax.Array, "2 N Hout Wout O"]:
    """SecConv: convolution of x [N, H, W, I] with w [kh, kw, I, O], at f fraction bits.

    The image is opened (masked) once, not its patches. Error below 1 LSB, unbiased, for results
    below 2^(62-2f). 2 rounds; one word online per element of x, w and the result; DS: 3 words per
    element of the result. Source: LP-GAN patent.
    """
    _check_conv(x, w)
    _check_bias(bias, w)
    for n, k, (p, q) in zip(x.shape[2:4], w.shape[1:3], padding, strict=True):
        if n + p + q < k:
            raise ValueError(f"w: a kernel of {k} is larger than the padded image, {n + p + q}")

    def function(x: jax.Array, w: jax.Array, *b: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=_NHWC)
        return _biased(y, b)

    return _layer(function, key, fxp, x, w, bias)


@_protocol("fxp", "strides", "padding")
def sec_deconv(
    key: PRNGKeyArray,
    x: UInt64[jax.Array, "2 N H W I"],
    w: UInt64[jax.Array, "2 kh kw I O"],
    fxp: FixedPoint,
    strides: tuple[int, int] = (2, 2),
    padding: Padding = ((1, 1), (1, 1)),
    bias: UInt64[jax.Array, "2 O"] | None = None,
) -> UInt64[jax.Array, "2 N Hout Wout O"]:
    """SecDeconv: y[i*s + a - p] += x[i] w[a]; sizes (n-1)s + k - 2p; w [kh, kw, I, O], I of x.

    Nothing is multiplied with inserted zeros. Flax's ConvTranspose has the same kernel flipped in
    both spatial axes. Cost and error as `sec_conv`. Source: LP-GAN patent.
    """
    _check_conv(x, w)
    _check_bias(bias, w)
    sizes = w.shape[1:3]
    for n, k, s, (p, q) in zip(x.shape[2:4], sizes, strides, padding, strict=True):
        if (n - 1) * s + k - p - q < 1:
            raise ValueError(f"padding: {p} and {q} leave nothing of {(n - 1) * s + k}")
    margins = [(k - 1 - p, k - 1 - q) for k, (p, q) in zip(sizes, padding, strict=True)]

    def function(x: jax.Array, w: jax.Array, *b: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(
            x, w[::-1, ::-1], (1, 1), margins, lhs_dilation=strides, dimension_numbers=_NHWC
        )
        return _biased(y, b)

    return _layer(function, key, fxp, x, w, bias)


_NHWC = ("NHWC", "HWIO", "NHWC")


def _check_conv(x: jax.Array, w: jax.Array) -> None:
    _require_rank("x", x, 4, "N, H, W, I")
    _require_rank("w", w, 4, "kh, kw, I, O")
    if x.shape[-1] != w.shape[-2]:
        raise ValueError(f"x has {x.shape[-1]} channels, w expects {w.shape[-2]}")


def _check_bias(bias: jax.Array | None, w: jax.Array) -> None:
    if bias is not None:
        _require_rank("bias", bias, 1, "O")
        if bias.shape[-1] != w.shape[-1]:
            raise ValueError(f"bias: expected {w.shape[-1]} values, got {bias.shape[-1]}")


@_protocol("fxp", "eps")
def sec_batch_norm(
    key: PRNGKeyArray,
    x: UInt64[jax.Array, "2 ... C"],
    gamma: UInt64[jax.Array, "2 C"],
    beta: UInt64[jax.Array, "2 C"],
    fxp: FixedPoint,
    eps: float = 1e-5,
) -> UInt64[jax.Array, "2 ... C"]:
    """SecBN: gamma (x - mean)/sqrt(var + eps) + beta, statistics over all axes of x but the last.

    x [..., C], gamma and beta [C]. Range: the squares of a channel's centred values sum to less
    than 2^(62-2f). Error: (1 + |gamma|) |x - mean| LSB and a few more, since 1/sqrt and its product
    with gamma have 1 LSB each, and 2^-17 relative. 6 rounds; 3 words online per element and 53 per
    channel; DS: 3.5 words per element and 750 per channel. Source: LP-GAN patent.

    Raises:
        ValueError: eps is below 1 LSB at double fraction.
    """
    require_shares("x", x)
    _require_rank("gamma", gamma, 1, "C")
    _require_rank("beta", beta, 1, "C")
    if x.ndim < 3 or not x.shape[-1] == gamma.shape[-1] == beta.shape[-1]:
        raise ValueError(
            "expected x (2, ..., C), gamma and beta (2, C), "
            f"got {x.shape}, {gamma.shape}, {beta.shape}"
        )
    if not eps >= 2.0 ** (-2 * fxp.frac_bits):  # nor NaN
        raise ValueError(f"eps: expected at least 2^-{2 * fxp.frac_bits}, got {eps}")
    count = math.prod(x.shape[1:-1])
    log_count = (count - 1).bit_length()
    ratio = 2**log_count / count

    def function(x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim - 1))
        centred = x - x.mean(axes)
        # By the power of two above the count, exactly; the ratio goes into the result.
        squares = jnp.square(centred).sum(axes) * 2.0**-log_count
        inverse = lax.rsqrt(squares + eps / ratio) * ratio**-0.5
        return centred * (gamma * inverse) + beta

    return _layer(function, key, fxp, x, gamma, beta)
