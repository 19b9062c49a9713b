"""What a server sees on 64 bits is distributed alike for secrets as unlike as can be.

Tiny rings are enumerated in test_views.py; here every public protocol runs as it is, once on zeros
and once on large values of either sign (or on bits 0 and 1). A server's view is made of what the
other server sends it, the corrections (S2), and what it knows itself: its own messages and its
shares of the input. All streams of words that are tested, alone and combined, are uniform.

The tests: chi-square of every byte, between the two secrets and against uniform bytes; Kolmogorov
and Smirnov's on words as fractions; correlations of all pairs of bits of words at two distances.
All have fixed seeds; a false alarm anywhere in this file has probability 10^-6 over their choice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pair_of
from scipy import stats
from uniformity import byte_counts, correlations, kolmogorov_smirnov

from lpgan_jax import FixedPoint, key
from lpgan_jax import protocols as P
from lpgan_jax.mpc import arithmetic
from lpgan_jax.mpc.party import AXIS, Party, Source, server_seeds
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.transform import function as transformed

F18 = FixedPoint(18)
ON_RING = {  # name: protocol(key, *shares), and the secrets' shapes
    "mul": (lambda k, x, y: P.sec_mul.__wrapped__(k, x, y, F18), [(16384,)] * 2),
    "square": (lambda k, x: P.sec_square.__wrapped__(k, x, F18), [(16384,)]),
    "truncate": (lambda k, x: P.truncate.__wrapped__(k, x, 18), [(32768,)]),
    "fc": (lambda k, x, w: P.sec_fc.__wrapped__(k, x, w, F18), [(128, 64), (64, 128)]),
    "conv": (
        lambda k, x, w: P.sec_conv.__wrapped__(k, x, w, F18),
        [(16, 16, 16, 4), (4, 4, 4, 8)],
    ),
    "deconv": (
        lambda k, x, w: P.sec_deconv.__wrapped__(k, x, w, F18),
        [(8, 8, 8, 4), (4, 4, 4, 8)],
    ),
    "batch_norm": (
        lambda k, x, g, b: P.sec_batch_norm.__wrapped__(k, x, g, b, F18),
        [(256, 64), (64,), (64,)],
    ),
    "cmp": (lambda k, u, v: P.sec_cmp.__wrapped__(k, u, v), [(8192,)] * 2),
    "published cmp": (lambda k, u, v: P.sec_cmp.__wrapped__(k, u, v, "patent"), [(8192,)] * 2),
    "relu": (lambda k, x: P.sec_relu.__wrapped__(k, x), [(8192,)]),
    "leaky_relu": (lambda k, x: P.sec_leaky_relu.__wrapped__(k, x, F18), [(8192,)]),
    "range_conversion": (lambda k, u: P.range_conversion.__wrapped__(k, u, F18), [(512,)]),
    "sqrt": (lambda k, u: P.sec_sqrt.__wrapped__(k, u, F18), [(512,)]),
    "inv_sqrt": (lambda k, u: P.sec_inv_sqrt.__wrapped__(k, u, F18), [(512,)]),
    "inv": (lambda k, u: P.sec_inv.__wrapped__(k, u, F18), [(192,)]),
    "div": (lambda k, x, y: P.sec_div.__wrapped__(k, x, y, F18), [(256,)] * 2),
    "log": (lambda k, u: P.sec_log.__wrapped__(k, u, F18), [(512,)]),
    "exp": (lambda k, x: P.sec_exp.__wrapped__(k, x, F18), [(512,)]),
    "sigmoid": (lambda k, x: P.sec_sigmoid.__wrapped__(k, x, F18), [(2048,)]),
    "tanh": (lambda k, x: P.sec_tanh.__wrapped__(k, x, F18), [(2048,)]),
    "softplus": (lambda k, x: P.sec_softplus.__wrapped__(k, x, F18), [(2048,)]),
    "decompose": (lambda k, x: P.bit_decompose.__wrapped__(k, x), [(8192,)]),
}
ON_BITS = {
    "and": (lambda k, b, c: P.sec_and.__wrapped__(k, b, c), [(2**20,)] * 2),
    "or": (lambda k, b, c: P.sec_or.__wrapped__(k, b, c), [(2**20,)] * 2),
    "msb": (lambda k, b: P.sec_msb.__wrapped__(k, b), [(8192, 64)]),
}
PROTOCOLS = ON_RING | ON_BITS
# Made of the same parts as others (sigmoid, sqrt, conv, and), or only there to be compared with.
SLOW = ("tanh", "softplus", "inv_sqrt", "deconv", "or", "published cmp")
STREAMS, SECRETS, DISTANCES = 7, 2, 2
TESTS = len(PROTOCOLS) * 2 * (STREAMS * (2 * 8 + SECRETS) + DISTANCES * SECRETS)
THRESHOLD = 1e-6 / TESTS  # Bonferroni's


def spying_simulate(views, function, ds_key, secrets, public=None):
    """As `party.simulate`; appends (messages [server, words], corrections [words]) to `views`."""
    seeds = server_seeds(ds_key)

    def seat(shares):
        party = Party(Source(seeds))
        outputs = function(party, shares, public)
        messages = [message.words.reshape(-1) for message in party.messages]
        corrections = [_wide(correction.reshape(-1)) for correction in party.corrections]
        nothing = [jnp.zeros(0, jnp.uint64)]
        return outputs, jnp.concatenate(messages), jnp.concatenate(corrections or nothing)

    outputs, *view = jax.vmap(seat, out_axes=(0, 0, None), axis_name=AXIS)(secrets)
    views.append(view)
    return outputs


def _wide(words):
    """Words of 64 bits; of narrow ones, two at a time (without the last of an odd number)."""
    if words.dtype == jnp.uint64:
        return words
    assert words.dtype == jnp.uint32
    return jax.lax.bitcast_convert_type(words[: words.size // 2 * 2].reshape(-1, 2), jnp.uint64)


def views_of(protocol, ds_key, shares):
    """(messages, corrections) of one execution of a public protocol, not jitted itself."""
    views = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (P, transformed):  # where protocols are simulated
            patch.setattr(module, "simulate", functools.partial(spying_simulate, views))

        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
        def program(ds_key, shares):
            views.clear()
            protocol(ds_key, *shares)
            (view,) = views
            return view

        return [jax.tree.map(np.asarray, program(key(ds_key + i), s)) for i, s in enumerate(shares)]


def zeros_and_extremes(shapes, seed):
    """Shares of zeros, and of values near -2^62 and 2^62 in turn."""
    signs = [np.where(np.arange(np.prod(shape)) % 2, 1, -1).reshape(shape) for shape in shapes]
    return [
        [pair_of(size * sign, seed + i) for i, sign in enumerate(signs)] for size in (0, 2**62 - 1)
    ]


def zeros_and_ones(shapes, seed):
    """XOR shares of bits 0 and of bits 1."""
    rng = np.random.default_rng(seed)
    first = [[rng.integers(0, 2, shape, np.uint8) for shape in shapes] for _ in (0, 1)]
    return [
        [jnp.asarray(np.stack([f, f ^ bit])) for f in shares]
        for bit, shares in zip(np.uint8([0, 1]), first, strict=True)
    ]


def streams(server, view, shares):
    """Words that the server can form, [STREAMS, n]: each is uniform, whatever the secrets."""
    messages, corrections = view
    received, beside = messages[1 - server], messages[server]
    if server:  # beside a correction, a word from S1
        beside = np.concatenate([beside, np.resize(received, corrections.shape)])
        received = np.concatenate([received, corrections])
    own = np.concatenate([np.asarray(s)[server].reshape(-1) for s in shares])
    if own.dtype == np.uint8:
        own = np.packbits(own, bitorder="little").view(np.uint64)
    own = np.resize(own, received.shape)
    after = np.roll(received, -1)
    return np.stack(
        [
            received,
            received + beside,  # what an opening of ring elements shows
            received ^ beside,  # of bits
            received + own,
            received ^ own,
            received + after,
            received ^ after,
        ]
    )


def p_values(server, views, shares, distance):
    """Of all tests of one server's view."""
    both = [streams(server, view, s) for view, s in zip(views, shares, strict=True)]
    result = []
    for stream in zip(*both, strict=True):
        first, second = (byte_counts(words) for words in stream)
        total = first + second
        between = ((first - second) ** 2 / np.maximum(total, 1)).sum(-1)
        expected = total.sum(-1, keepdims=True) / 256
        uniform = ((total - expected) ** 2 / expected).sum(-1)
        result += stats.chi2.sf(np.concatenate([between, uniform]), 255).tolist()
        result += [kolmogorov_smirnov(words) for words in stream]
    result += [correlations(received, lag) for received, *_ in both for lag in (1, distance)]
    assert len(result) == STREAMS * (2 * 8 + SECRETS) + DISTANCES * SECRETS
    return np.array(result)


def suspicious(protocol, shares, seed=0):
    """The servers (1, 2) whose views tell, and the smallest p-value."""
    views = views_of(protocol, seed, shares)
    first = shares[0][0]
    elements = first[0].size // (1 if first.dtype == np.uint64 else 64)
    smallest = [p_values(server, views, shares, elements).min() for server in (0, 1)]
    return {server + 1 for server in (0, 1) if smallest[server] < THRESHOLD}, smallest


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in PROTOCOLS],
)
def test_views_do_not_depend_on_the_secrets(name):
    protocol, shapes = PROTOCOLS[name]
    secrets = zeros_and_ones if name in ON_BITS else zeros_and_extremes
    servers, smallest = suspicious(protocol, secrets(shapes, 1), seed=100)
    assert servers == set(), smallest


# Negative controls: planted leaks that the same tests must find ---------------------------------


def _planted(function):
    """A protocol of one secret that runs `function(party, share)`."""

    def seat(party, share, _):
        function(party, share)
        return share

    return lambda k, x: P.simulate(seat, k, x)


def _narrow_mask(party, x):
    mask = party.mask(x.shape).share
    party.open(x - (mask & np.uint64(2**61 - 1)), "mask")


def _even_mask(party, x):
    party.open(x - 2 * party.mask(x.shape).share, "mask")


def _bare_share(party, x):
    party.open(x - party.public_share(party.mask(x.shape).share), "mask")


def _reused_mask(party, x):
    mask = party.mask(x.shape).share
    for value in (x, 2 * x):
        party.open(value - mask, "mask")


def _correction_without_a_share(party, x):
    """S2 gets the square of the mask itself."""
    party.correlate(lambda v: v * v, arithmetic.masked(party, Secret(x, 0)).mask)
    mask = party.mask(x.shape)
    if mask.plain is not None:
        party.corrections[-1] = mask.plain * mask.plain
    party.open(x - mask.share, "mask")


def _one_bit_of_the_correction_repeats_the_message(party, x):
    x = arithmetic.masked(party, Secret(x, 0))
    party.correlate(lambda v: v * v, x.mask)
    opened = jax.lax.all_gather(x.share - x.mask.share, AXIS)[0]
    party.corrections[-1] = (party.corrections[-1] & ~np.uint64(1)) | (opened >> np.uint64(63))


@pytest.mark.parametrize(
    ("leak", "leaking"),
    [
        (_narrow_mask, {1, 2}),
        (_even_mask, {1, 2}),
        (_bare_share, {1}),  # S2's message to S1
        (_reused_mask, {1, 2}),
        (_correction_without_a_share, {2}),
        (_one_bit_of_the_correction_repeats_the_message, {2}),
    ],
)
def test_planted_leaks_are_found(leak, leaking):
    servers, smallest = suspicious(_planted(leak), zeros_and_extremes([(16384,)], 2), seed=200)
    assert servers == leaking, smallest
