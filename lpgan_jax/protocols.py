"""The protocols over paired arrays: pure functions with an explicit DS key.

Each takes DS's typed ChaCha20 key first, then secrets as `uint64[2, *shape]` (S1's share first),
and returns the result's shares. They run both servers and DS in one program
(`lpgan_jax.party.simulate`), and may be jitted, vmapped over keys and data, scanned and
rematerialised. Elementwise protocols broadcast the axes after the party axis as NumPy does.

A protocol is deterministic in its key, as functions of `jax.random` are: **a key must be used
once**. Two calls with one key use the same masks, and the difference of their messages is the
difference of their secrets. `jax.vmap` over data with an unbatched key would do just that, and is
refused.

Costs count online words (8 bytes) each server sends per element, and words DS sends S2 per element;
DS sends S1 one seed. Errors are in LSB, 2^-f. Outside the stated domain results are meaningless but
well-formed; nothing is revealed.

All raise TypeError for a key of a non-cryptographic PRNG and for shares that are not uint64, and
ValueError for shapes that do not fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lpgan_jax.fixed_point import FixedPoint
from lpgan_jax.mpc import arithmetic, compare, elementary, roots
from lpgan_jax.nn.activation import leaky
from lpgan_jax.nn.linear import SecConv, SecDeconv, SecFC
from lpgan_jax.nn.normalization import SecBN
from lpgan_jax.party import Party, simulate
from lpgan_jax.prng import require_cryptographic
from lpgan_jax.secret import Secret
from lpgan_jax.shares import require_shares

__all__ = [
    "sec_add",
    "sec_batch_norm",
    "sec_cmp",
    "sec_conv",
    "sec_deconv",
    "sec_fc",
    "sec_inv_sqrt",
    "sec_leaky_relu",
    "sec_matmul",
    "sec_mul",
    "sec_relu",
    "sec_sigmoid",
    "sec_softplus",
    "sec_square",
    "sec_tanh",
    "truncate",
]

Padding = tuple[tuple[int, int], tuple[int, int]]


def _run(
    function: Callable[[Party, dict[str, Secret]], Secret],
    key: jax.Array,
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


def sec_add(x: jax.Array, y: jax.Array) -> jax.Array:
    """SecAdd: x + y, local and exact. Broadcasts. Source: LP-GAN patent."""
    _check_broadcast(x=x, y=y)
    x, y = _align(x, y)
    return x + y


@functools.partial(jax.jit, static_argnames="fxp")
def sec_mul(key: jax.Array, x: jax.Array, y: jax.Array, fxp: FixedPoint) -> jax.Array:
    """SecMul: x * y at f fraction bits, for |x y| < 2^(62-2f). Broadcasts.

    Error below 1 LSB, unbiased. 2 rounds, 3 words online; DS: 3 words. Source: Beaver 1991, LP-GAN
    patent; truncation as in `truncate`.
    """
    _check_broadcast(x=x, y=y)
    x, y = _align(x, y)
    f = fxp.frac_bits
    return _run(
        lambda p, s: arithmetic.truncate(p, arithmetic.mul(p, s["x"], s["y"]), f), key, f, x=x, y=y
    )


@functools.partial(jax.jit, static_argnames="fxp")
def sec_square(key: jax.Array, x: jax.Array, fxp: FixedPoint) -> jax.Array:
    """SecSq: x^2 at f fraction bits, for x^2 < 2^(62-2f). Error below 1 LSB, unbiased.

    2 rounds, 2 words online; DS: 3 words. Source: LP-GAN patent, with one mask (see
    `arithmetic.square`).
    """
    f = fxp.frac_bits
    return _run(lambda p, s: arithmetic.truncate(p, arithmetic.square(p, s["x"]), f), key, f, x=x)


@functools.partial(jax.jit, static_argnames="fxp")
def sec_matmul(key: jax.Array, x: jax.Array, y: jax.Array, fxp: FixedPoint) -> jax.Array:
    """X @ y for x [M, K] and y [K, N], at f fraction bits, for |x y| < 2^(62-2f).

    Error below 1 LSB, unbiased: one truncation of the exact sum. 2 rounds; MK + KN + MN words
    online;
    DS: 3 MN words.
    """
    return sec_fc(key, x, y, fxp)


@functools.partial(jax.jit, static_argnames="bits")
def truncate(key: jax.Array, x: jax.Array, bits: int) -> jax.Array:
    """X / 2^bits in the ring, rounded down or up at random, for |x| < 2^62 as integers.

    Error below 1 LSB, mean 0: up with probability equal to the fraction dropped. 1 round, 1 word
    online; DS: 2 words. Outside the range the error is about 2^(64 - bits).

    Raises:
        ValueError: bits is outside 0 to 62.
    """
    if not 0 <= bits <= 62:
        raise ValueError(f"bits: expected 0 to 62, got {bits}")
    return _run(lambda p, s: arithmetic.truncate(p, s["x"], 0), key, bits, x=x)


@jax.jit
def sec_cmp(key: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """SecCmp: shares of the integer 1 if u > v, else 0, for integers |u|, |v| < 2^62. Broadcasts.

    Exact, for all shares. 8 rounds; 183 bits and no words online; DS: 1 word and 198 bits. Source:
    LP-GAN patent (steps (5)-(7) there are for shares that do not wrap); here the top bit of v - u
    from a carry tree, see `boolean.sign_bit`.
    """
    _check_broadcast(u=u, v=v)
    u, v = _align(u, v)
    return _run(
        lambda p, s: compare.arithmetic(p, compare.greater(p, s["u"], s["v"])), key, 0, u=u, v=v
    )


@functools.partial(jax.jit, static_argnames="fxp")
def sec_inv_sqrt(key: jax.Array, u: jax.Array, fxp: FixedPoint) -> jax.Array:
    """Inverse SSqrt: 1/sqrt(u) for u from 1 LSB up to 2^(62-f).

    Error: 1 LSB and 2^-17 relative up to f = 18, 2^-25 beyond. u = 0 gives a large finite value, u
    < 0 a meaningless one. 25 rounds (29 beyond f = 18), 30 comparisons. Source:
    `roots.inverse_sqrt`.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: roots.inverse_sqrt(p, s["u"], f), key, f, u=u)


@functools.partial(jax.jit, static_argnames="fxp")
def sec_sigmoid(key: jax.Array, x: jax.Array, fxp: FixedPoint) -> jax.Array:
    """1/(1 + e^-x) for |x| < 2^(61-f); saturates. Error: see `sec_tanh`. 11 rounds."""
    f = fxp.frac_bits
    return _run(lambda p, s: elementary.sigmoid(p, s["x"], f), key, f, x=x)


@functools.partial(jax.jit, static_argnames="fxp")
def sec_tanh(key: jax.Array, x: jax.Array, fxp: FixedPoint) -> jax.Array:
    """tanh(x) for |x| < 2^(61-f); saturates.

    Error below 2 LSB up to f = 20 and 2^-22 beyond. 11 rounds, 2 comparisons; see `elementary`.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: elementary.tanh(p, s["x"], f), key, f, x=x)


@functools.partial(jax.jit, static_argnames="fxp")
def sec_softplus(key: jax.Array, x: jax.Array, fxp: FixedPoint) -> jax.Array:
    """ln(1 + e^x) for |x| < 2^(61-f): the loss -ln sigmoid(o) is softplus(-o). 12 rounds.

    Error below 3 LSB up to f = 18 and 2^-19 beyond.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: elementary.softplus(p, s["x"], f), key, f, x=x)


@jax.jit
def sec_relu(key: jax.Array, x: jax.Array) -> jax.Array:
    """SR: max(x, 0), exact, at any scale, for |x| < 2^63 as integers. 8 rounds, 31 bytes online."""
    return _run(lambda p, s: compare.select(p, compare.positive(p, s["x"]), s["x"]), key, 0, x=x)


@functools.partial(jax.jit, static_argnames=("fxp", "alpha"))
def sec_leaky_relu(key: jax.Array, x: jax.Array, fxp: FixedPoint, alpha: float = 0.2) -> jax.Array:
    """SLR: x where x > 0, else alpha * x, for |x| < 2^8.

    Error below 1 LSB and 2^-25 |x| (alpha's own rounding). 9 rounds.

    Raises:
        ValueError: alpha is not between 0 and 1.
    """
    f = fxp.frac_bits
    return _run(lambda p, s: leaky(p, compare.positive(p, s["x"]), s["x"], alpha, f), key, f, x=x)


@functools.partial(jax.jit, static_argnames="fxp")
def sec_fc(
    key: jax.Array, x: jax.Array, w: jax.Array, fxp: FixedPoint, bias: jax.Array | None = None
) -> jax.Array:
    """SecFC: x w + bias, x [N, I], w [I, O], bias [O]; cost and error as `sec_matmul`."""
    _require_rank("x", x, 2, "N, I")
    _require_rank("w", w, 2, "I, O")
    if x.shape[2] != w.shape[1]:
        raise ValueError(f"x {x.shape[1:]} and w {w.shape[1:]} do not fit: the inner sizes differ")
    layer = SecFC(w.shape[-1], bias is not None, fxp.frac_bits)
    return _linear(layer, key, x, w, fxp, bias)


@functools.partial(jax.jit, static_argnames=("fxp", "strides", "padding"))
def sec_conv(
    key: jax.Array,
    x: jax.Array,
    w: jax.Array,
    fxp: FixedPoint,
    strides: tuple[int, int] = (2, 2),
    padding: Padding = ((1, 1), (1, 1)),
    bias: jax.Array | None = None,
) -> jax.Array:
    """SecConv: convolution of x [N, H, W, I] with w [kh, kw, I, O], at f fraction bits.

    The image is opened (masked) once, not its patches. Error below 1 LSB, unbiased. 2 rounds; DS: 3
    words per element of the result.
    """
    _check_conv(x, w)
    kernel_size = (w.shape[1], w.shape[2])
    layer = SecConv(
        w.shape[-1], bias is not None, fxp.frac_bits, 0.0, kernel_size, strides, padding
    )
    return _linear(layer, key, x, w, fxp, bias)


@functools.partial(jax.jit, static_argnames=("fxp", "strides", "padding"))
def sec_deconv(
    key: jax.Array,
    x: jax.Array,
    w: jax.Array,
    fxp: FixedPoint,
    strides: tuple[int, int] = (2, 2),
    padding: Padding = ((1, 1), (1, 1)),
    bias: jax.Array | None = None,
) -> jax.Array:
    """SecDeconv: y[i*s + a - p] += x[i] w[a]; sizes (n-1)s + k - 2p; w [kh, kw, I, O], I of x.

    As a convolution's input gradient: nothing is multiplied with inserted zeros. Cost and error as
    `sec_conv`.
    """
    _check_conv(x, w)
    kernel_size = (w.shape[1], w.shape[2])
    layer = SecDeconv(
        w.shape[-1], bias is not None, fxp.frac_bits, 0.0, kernel_size, strides, padding
    )
    return _linear(layer, key, x, w, fxp, bias)


def _check_conv(x: jax.Array, w: jax.Array) -> None:
    _require_rank("x", x, 4, "N, H, W, I")
    _require_rank("w", w, 4, "kh, kw, I, O")
    if x.shape[-1] != w.shape[-2]:
        raise ValueError(f"x has {x.shape[-1]} channels, w expects {w.shape[-2]}")


def _linear(
    layer: SecFC | SecConv | SecDeconv,
    key: jax.Array,
    x: jax.Array,
    w: jax.Array,
    fxp: FixedPoint,
    bias: jax.Array | None,
) -> jax.Array:
    if bias is not None:
        _require_rank("bias", bias, 1, "O")
        if bias.shape[-1] != layer.features:
            raise ValueError(f"bias: expected {layer.features} values, got {bias.shape[-1]}")
    f = fxp.frac_bits

    def function(party: Party, s: dict[str, Secret]) -> Secret:
        params = {"kernel": s["w"]} | ({"bias": s["bias"]} if "bias" in s else {})
        return arithmetic.truncate(party, layer.forward(party, params, s["x"])[0], f)

    return _run(function, key, f, x=x, w=w, bias=bias)


@functools.partial(jax.jit, static_argnames=("fxp", "eps"))
def sec_batch_norm(
    key: jax.Array,
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    fxp: FixedPoint,
    eps: float = 1e-5,
) -> jax.Array:
    """SecBN: gamma (x - mean)/sqrt(var + eps) + beta, statistics over all axes of x but the last.

    x [..., C], gamma and beta [C]. Range: the squares of a channel's centred values sum to less
    than 2^(62-2f). Error: (1 + |gamma|) |x - mean| LSB and a few more, since 1/sqrt and its product
    with gamma have 1 LSB each, and 2^-17 relative.

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
    f = fxp.frac_bits
    layer = SecBN(epsilon=eps, frac_bits=f)

    def function(party: Party, s: dict[str, Secret]) -> Secret:
        params = {"scale": s["gamma"], "bias": s["beta"]}
        return arithmetic.truncate(party, layer.forward(party, params, s["x"])[0], f)

    return _run(function, key, f, x=x, gamma=gamma, beta=beta)
