"""What a server sees, exhaustively: in a tiny ring, over every random word and every share.

A server's view is its shares of the secrets, the words of its own seed, its corrections and every
message of the other server. For each primitive, all random bits (shares, masks, S1's shares of
dealt values) are enumerated, and the multiset of views must be the same for all secrets. The view
contains the server's input shares, so this is equality given its own share. When one element is
processed, the bits of packed words beyond lane 0 hold no value: they are all 0 or all 1.

The rings have 2 to 4 bits, so that a case has at most 24 random bits. In a scan each iteration
gets some of them (and of the coins), as it gets a key in earnest. Larger protocols are
enumerated with the coins of the server that looks held at a few random values: its shares and the
words of its own seed, which are parts of its view. The views must then agree for each of them.
"""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpgan_jax as lp
from lpgan_jax.mpc import arithmetic, boolean, compare, patent
from lpgan_jax.mpc.party import AXIS, Party, Source
from lpgan_jax.mpc.secret import Secret, add_public
from lpgan_jax.ring.words import RING32, Ring

CHUNK_BITS = 20
SAMPLES = 4  # of the coins of the server that looks, where they are not enumerated
COINS = 96  # at most, each a byte
ITERATION_BITS, ITERATION_COINS = 6, 6  # of an iteration of a scan


class Script(Source):
    """Hands out the bits of a number, so that all numbers give all random words.

    With `looking`, the words that server knows come from `coins` instead.
    """

    def __init__(self, number, looking=None, coins=None, repeat_shares=False):
        self.number, self.used, self.width = number, 0, 0
        self.words = ([], [])  # (word, width) of S1's seed and of S2's
        self._looking, self._coins, self._coins_used = looking, coins, 0
        self._repeat_shares, self._last_share = repeat_shares, None

    def take(self, server, shape=(), width=None):
        width, count = width or self.width, math.prod(shape)
        if server == self._looking:
            words = self._coins[self._coins_used : self._coins_used + count]
            self._coins_used += count
            assert self._coins_used <= COINS
        else:
            starts = self.used + width * np.arange(count, dtype=np.uint32)
            self.used += width * count
            words = self.number >> starts
        return (words & (2**width - 1)).astype(jnp.uint8).reshape(shape)

    def parts(self, count):
        """(bits, coins) of as many iterations."""
        starts = self.used + ITERATION_BITS * np.arange(count, dtype=np.uint32)
        self.used += ITERATION_BITS * count
        coins = self._coins[self._coins_used :][: ITERATION_COINS * count]
        self._coins_used += ITERATION_COINS * count
        return self.number >> starts, coins.reshape(count, ITERATION_COINS)

    def part(self, number, coins):
        """The script of an iteration."""
        return Script(number & (2**ITERATION_BITS - 1), self._looking, coins, self._repeat_shares)

    def sharing(self, secret, width, ring):
        """Shares of a secret: the given one of the server that looks, or S1's, is drawn."""
        drawn = self.take(self._looking or 0, width=width)
        other = secret ^ drawn if width == 1 else ring.reduce(secret - drawn)
        return jnp.stack([other, drawn] if self._looking == 1 else [drawn, other])

    def masks(self, shape, dtype):
        both = tuple(self.take(server, shape).astype(dtype) for server in (0, 1))
        for own, words in zip(self.words, both, strict=True):
            own.append((words, self.width))
        return both

    def shares(self, shape, dtype):
        if self._repeat_shares and self._last_share is not None:
            return self._last_share
        self._last_share = self.take(0, shape).astype(dtype)
        self.words[0].append((self._last_share, self.width))
        return self._last_share


class Seat(Party):
    """A party that tells its script how many bits of a word count, and writes down what is sent."""

    def __init__(self, source, ring, half):
        super().__init__(source, ring, half=half)
        self.sent, self.dealt = [], []  # (words, width)
        self._message_width = 1

    def _seeds(self, count):
        return self._source.parts(count)

    def _child(self, seed, received):
        return Seat(self._source.part(*seed), self.ring, self.half)

    def scan(self, body, carry, xs, length, reverse=False):
        widths = []

        def recorded(party, carry, x):
            carry, y = body(party, carry, x)
            fields = party.sent, party.dealt, *party._source.words
            widths[:] = [[width for _, width in part] for part in fields]
            return carry, (y, [[words for words, _ in part] for part in fields])

        carry, (ys, parts) = super().scan(recorded, carry, xs, length, reverse)
        fields = self.sent, self.dealt, *self._source.words
        for part, words, each in zip(fields, parts, widths, strict=True):
            part += zip(words, each, strict=True)
        return carry, ys

    def mask(self, shape, dtype=None, bitwise=False):
        words = jax.ShapeDtypeStruct(shape, np.dtype(dtype or self.ring.dtype))
        self._source.width = 1 if bitwise else self.ring_of(words).bits
        return super().mask(shape, dtype, bitwise)

    def _deal(self, function, plains, bitwise):
        ring = self.ring_of(jax.eval_shape(function, *plains))
        self._source.width = 1 if bitwise else ring.bits
        result = super()._deal(function, plains, bitwise)
        correction = self.corrections[-1]
        # The container's bits beyond the ring's are no part of a message.
        self.dealt.append((correction if bitwise else ring.reduce(correction), self._source.width))
        return result

    def open(self, share, name):
        self._message_width = self.ring_of(share).bits
        result = super().open(share, name)
        self._message_width = 1
        return result

    def exchange(self, words, name):
        self.sent.append((words, self._message_width))
        return super().exchange(words, name)


def code_of(fields):
    """Words of given widths as one number, and whether a word has bits beyond its width.

    Of a packed word, the lanes beyond the first must be all equal; they count as one bit more.
    """
    code, position, beyond = jnp.zeros((), jnp.uint64), 0, jnp.zeros((), bool)
    for words, width in fields:
        for word in words.reshape(-1).astype(jnp.uint64):
            rest = word >> width
            lanes = width == 1
            beyond |= (rest != 0) & ~(lanes & (rest == 127))
            code |= (word & (2 ** (width + lanes) - 1)) << position
            position += width + lanes
    assert position <= 64
    return code, beyond


class Experiment:
    """All executions of protocol(party, *shares), which returns a list of (share, width).

    `widths`: of the secrets; 1 is an XOR-shared bit, otherwise a ring element. `looking`: the
    server (0 or 1) whose coins are given and whose view counts; None for both, over all coins.
    `half`: the smaller ring.
    """

    def __init__(self, protocol, ring, widths, looking=None, repeat_shares=False, half=RING32):
        self._protocol, self._ring, self._widths, self._half = protocol, ring, widths, half
        self._looking, self._repeat_shares = looking, repeat_shares
        self._run = jax.jit(jax.vmap(self._execute, in_axes=(None, None, 0)))
        jax.eval_shape(
            self._execute,
            jnp.zeros(len(widths), jnp.uint8),
            jnp.zeros(COINS, jnp.uint8),
            jnp.zeros((), jnp.uint32),
        )
        assert self.random_bits <= 24

    def _execute(self, secrets, coins, number):
        ring = self._ring
        script = Script(number, self._looking, coins, self._repeat_shares)
        given = zip(secrets, self._widths, strict=True)
        inputs = [script.sharing(secret, width, ring) for secret, width in given]
        records = {}

        def seat(shares):
            party = Seat(script, ring, self._half)
            outputs = self._protocol(party, *shares)
            records["sent"] = [width for _, width in party.sent]
            records["dealt"] = [width for _, width in party.dealt]
            records["outputs"] = [width for _, width in outputs]
            batched = [words for words, _ in (*party.sent, *outputs)]
            return batched, [words for words, _ in party.dealt]

        batched, dealt = jax.vmap(seat, out_axes=(0, None), axis_name=AXIS)(inputs)
        self.random_bits = script.used
        sent, outputs = batched[: len(records["sent"])], batched[len(records["sent"]) :]
        views = []
        for server in (0, 1) if self._looking is None else (self._looking,):
            own = [(pair[server], width) for pair, width in zip(inputs, self._widths, strict=True)]
            own += script.words[server]
            received = [(m[1 - server], w) for m, w in zip(sent, records["sent"], strict=True)]
            corrections = list(zip(dealt, records["dealt"], strict=True)) if server else []
            # Coins that are given are the same in all executions.
            views.append(
                code_of([*(own if self._looking is None else []), *corrections, *received])
            )
        codes, beyond = zip(*views, strict=True)
        results = [
            ((pair[0] ^ pair[1]) & 1 if width == 1 else ring.reduce(pair[0] + pair[1])).reshape(())
            for pair, width in zip(outputs, records["outputs"], strict=True)
        ]
        return jnp.stack(codes), jnp.stack(beyond).any(), results

    def run(self, secrets, sample=0):
        """(views [server, execution], results [output, execution])."""
        secrets = jnp.asarray(secrets, jnp.uint8)
        coins = np.random.default_rng(sample).integers(0, 256, COINS, np.uint8)
        total = 2**self.random_bits
        codes, results = [], []
        for start in range(0, total, 2**CHUNK_BITS):
            numbers = jnp.arange(start, min(total, start + 2**CHUNK_BITS), dtype=jnp.uint32)
            views, beyond, outputs = self._run(secrets, coins, numbers)
            assert not beyond.any()
            codes.append(views)
            results.append(np.array(outputs).reshape(len(outputs), len(numbers)))
        return np.concatenate(codes).T, np.concatenate(results, axis=1)

    def leaks(self, cases, expected=None, sample=0):
        """The servers (1, 2) whose multiset of views is not the same for all secrets in `cases`.

        `expected`: secrets -> the right results, or None where the inputs are out of range.
        """
        servers = (1, 2) if self._looking is None else (self._looking + 1,)
        reference, leaking = None, set()
        for secrets in cases:
            views, results = self.run(secrets, sample)
            if expected is not None and (right := expected(*secrets)) is not None:
                allowed = [np.atleast_1d(np.asarray(r)) % 2**self._ring.bits for r in right]
                for result, values in zip(results, allowed, strict=True):
                    assert np.isin(result, values).all(), secrets
            views = np.sort(views, axis=1)
            reference = views if reference is None else reference
            unequal = (views != reference).any(axis=1)
            leaking |= {server for server, differs in zip(servers, unequal, strict=True) if differs}
        return leaking


def leaks_to_each(protocol, ring, widths, cases, expected=None, **options):
    """As `Experiment.leaks`, each server given samples of its own coins."""
    leaking = set()
    for looking in (0, 1):
        experiment = Experiment(protocol, ring, widths, looking, **options)
        for sample in range(SAMPLES):
            leaking |= experiment.leaks(cases, expected, sample)
    return leaking


def everything(ring, count):
    """All tuples of ring elements."""
    return list(np.ndindex((2**ring.bits,) * count))


def _halves(x, bits, shift):
    """x / 2^shift rounded down and up; None where truncation does not promise it."""
    x = x - 2**bits if x >= 2 ** (bits - 1) else x
    in_range = -(2 ** (bits - 2)) <= x < 2 ** (bits - 2)
    return [x >> shift, -(-x >> shift)] if in_range else None


def _mul(party, x, y):
    return [
        (arithmetic.mul(party, Secret(x, 0), Secret(y, 0)).settled(party).share, party.ring.bits)
    ]


@pytest.mark.parametrize("bits", [2, 3])
def test_mul(bits):
    ring = Ring(bits)
    cases = everything(ring, 2) if bits == 2 else [(0, 0), (0, 5), (3, 4), (7, 7)]
    experiment = Experiment(_mul, ring, (bits, bits))
    assert experiment.leaks(cases, lambda x, y: [x * y]) == set()


@pytest.mark.parametrize("bits", [3, 4])
def test_square(bits):
    def protocol(party, x):
        return [(arithmetic.square(party, Secret(x, 0)).settled(party).share, bits)]

    ring = Ring(bits)
    experiment = Experiment(protocol, ring, (bits,))
    assert experiment.leaks(everything(ring, 1), lambda x: [x * x]) == set()


def test_one_mask_in_a_square_and_a_truncation():
    def protocol(party, x):
        x = arithmetic.masked(party, Secret(x, 1))
        halved = arithmetic.truncate(party, x, 0)
        return [(arithmetic.square(party, x).settled(party).share, 3), (halved.share, 3)]

    def expected(x):
        return [x * x, _halves(x, 3, 1) or range(8)]

    experiment = Experiment(protocol, Ring(3), (3,))
    assert experiment.leaks(everything(Ring(3), 1), expected) == set()


def _two_products(party, x, y, z):
    x = arithmetic.masked(party, Secret(x, 0))
    return [
        (arithmetic.mul(party, x, Secret(v, 0)).settled(party).share, party.ring.bits)
        for v in (y, z)
    ]


def test_one_mask_in_two_products():
    experiment = Experiment(_two_products, Ring(2), (2, 2, 2))
    cases = [(0, 0, 0), (1, 2, 3), (3, 3, 3), (2, 0, 1)]
    assert experiment.leaks(cases, lambda x, y, z: [x * y, x * z]) == set()


@pytest.mark.parametrize(("bits", "shift"), [(3, 1), (4, 1), (4, 2)])
def test_truncate(bits, shift):
    def protocol(party, x):
        return [(arithmetic.truncate(party, Secret(x, shift), 0).share, bits)]

    def expected(x):
        halves = _halves(x, bits, shift)
        return halves and [halves]

    cases = everything(Ring(bits), 1) if bits == 3 else [(x,) for x in (0, 1, 3, 12, 13, 15, 7, 8)]
    assert Experiment(protocol, Ring(bits), (bits,)).leaks(cases, expected) == set()


WIDE, HALF = Ring(5, words=16), Ring(3)


def test_truncate_into_the_smaller_ring():
    """What comes out is masked: a square of it opens nothing."""

    def protocol(party, x):
        low = arithmetic.truncate(party, Secret(x, 2), 0, HALF)
        return [(arithmetic.square(party, low).settled(party).share.astype(np.uint16), 3)]

    def expected(x):
        rounded = _halves(x, 5, 2)
        # Modulo 8: what the shares' words add up to beyond that does not count.
        return rounded and [[r * r % 8 + 8 * k for r in rounded for k in range(4)]]

    cases = [(x,) for x in (0, 1, 2, 3, 6, 7, 25, 30, 31, 12)]
    assert leaks_to_each(protocol, WIDE, (5,), cases, expected, half=HALF) == set()


def test_truncate_into_the_larger_ring():
    def protocol(party, x):
        x = arithmetic.narrowed(Secret(x, 1), HALF)
        return [(arithmetic.truncate(party, x, 0, WIDE).share, 5)]

    def expected(x):
        halves = _halves(x % 8, 3, 1)
        return halves and [halves]

    cases = [(x,) for x in (0, 1, 7, 6, 9, 30)]
    assert leaks_to_each(protocol, WIDE, (5,), cases, expected, half=HALF) == set()


def test_times_small():
    """x / 2 - x / 4 by one mask: each of the two is rounded down or up."""

    def protocol(party, x):
        halved = arithmetic.times_small(party, Secret(x, 0), ((1, 1), (-1, 2)), 0)
        return [(halved.share, 4)]

    def expected(x):
        halves, quarters = _halves(x, 4, 1), _halves(x, 4, 2)
        return halves and [sorted({h - q for h in halves for q in quarters})]

    cases = [(x,) for x in (0, 1, 3, 12, 13, 15, 7, 8)]
    assert Experiment(protocol, Ring(4), (4,)).leaks(cases, expected) == set()


def test_and():
    def protocol(party, u, v):
        return [(boolean.conjunction(party, u[None], v[None]), 1)]

    cases = list(np.ndindex(2, 2))
    assert Experiment(protocol, Ring(2), (1, 1)).leaks(cases, lambda u, v: [u & v]) == set()


# Truncated values: a mask of two parts ----------------------------------------------------------


def _truncated(party, x):
    return arithmetic.truncate(party, Secret(x, 1), 0)


def _products_of_halves(x, others):
    """All that others(x / 2 rounded down or up) may be; anything where x is out of range."""
    results = [others(half) for half in _halves(x, 3, 1) or range(8)]
    return [list(values) for values in zip(*results, strict=True)]


def test_square_of_a_truncated_value():
    """It opens nothing; exhaustively."""

    def protocol(party, x):
        x = _truncated(party, x)
        sent = len(party.messages)
        square = arithmetic.square(party, x)
        assert len(party.messages) == sent
        return [(square.settled(party).share, 3), (x.share, 3)]

    def expected(x):
        return _products_of_halves(x, lambda half: [half * half, half])

    experiment = Experiment(protocol, Ring(3), (3,))
    assert experiment.leaks([(0,), (1,), (3,), (6,)], expected) == set()


def test_product_of_a_truncated_value_and_a_masked_one():
    def protocol(party, x, y):
        y = arithmetic.masked(party, Secret(y, 0))
        return [(arithmetic.mul(party, _truncated(party, x), y).settled(party).share, 3)]

    def expected(x, y):
        return _products_of_halves(x, lambda half: [half * y])

    cases = [(0, 0), (1, 1), (6, 5), (7, 7), (3, 4)]
    assert leaks_to_each(protocol, Ring(3), (3, 3), cases, expected) == set()


def test_product_of_two_truncated_values():
    """Both flags and both parts of both masks: four dealt products. (x and -x share theirs.)"""

    def protocol(party, x):
        x = _truncated(party, x)
        return [(arithmetic.mul(party, x, -x).settled(party).share, 3)]

    def expected(x):
        return _products_of_halves(x, lambda half: [-half * half])

    cases = everything(Ring(3), 1)
    assert leaks_to_each(protocol, Ring(3), (3,), cases, expected) == set()


def test_selection_of_a_truncated_value():
    """The bit's random part times each part of the mask."""

    def protocol(party, d, x):
        return [(compare.select(party, _bit(party, d), _truncated(party, x)).share, 3)]

    def expected(d, x):
        return _products_of_halves(x, lambda half: [d * half])

    cases = [(0, 0), (1, 0), (0, 1), (1, 7), (1, 6)]
    assert leaks_to_each(protocol, Ring(3), (1, 3), cases, expected) == set()


def test_a_mask_survives_negation_scaling_and_public_addition():
    """x, 1 - x and 3 x under one mask, in a product each: one opening of x."""

    def protocol(party, x, y):
        x = arithmetic.masked(party, Secret(x, 0))
        y = arithmetic.masked(party, Secret(y, 0))
        opened = len(party.messages)
        products = [
            arithmetic.mul(party, v, y) for v in (x, add_public(party, -x, 1.0), x.times_int(3))
        ]
        assert len(party.messages) == opened == 2
        return [(product.settled(party).share, 2) for product in products]

    experiment = Experiment(protocol, Ring(2), (2, 2))
    cases = everything(Ring(2), 2)
    assert experiment.leaks(cases, lambda x, y: [x * y, (1 - x) * y, 3 * x * y]) == set()


# Bits -------------------------------------------------------------------------------------------


def _signed(x, bits):
    return x - 2**bits if x >= 2 ** (bits - 1) else x


def _masked(party, x):
    return arithmetic.masked(party, Secret(x, 0))


@pytest.mark.parametrize(("bits", "radix"), [(2, 4), (3, 4), (3, 2), (4, 4)])
def test_sign_bit(bits, radix):
    def protocol(party, x):
        return [(boolean.sign_bit(party, _masked(party, x), radix=radix), 1)]

    experiment = Experiment(protocol, Ring(bits), (bits,))
    assert experiment.leaks(everything(Ring(bits), 1), lambda x: [x >> (bits - 1)]) == set()


def test_sign_bit_with_a_level_that_opens():
    """With radix 2 the tree over 3 bits has two nodes, which a second level joins."""

    def protocol(party, x):
        sign = boolean.sign_bit(party, _masked(party, x), radix=2)
        assert len(party.messages) == 2  # x, and the upper level
        return [(sign, 1)]

    cases = everything(Ring(4), 1)
    assert leaks_to_each(protocol, Ring(4), (4,), cases, lambda x: [x >> 3]) == set()


def test_sign_of_a_truncated_value():
    """Its bits below what wraps are those of a public and one dealt part: nothing is opened."""

    def protocol(party, x):
        x = arithmetic.truncate(party, Secret(x, 2), 0)
        sent = len(party.messages)
        sign = boolean.sign_bit(party, x, bits=2)
        assert len(party.messages) == sent
        return [(sign, 1), (x.share, 4)]

    def expected(x):
        quarters = _halves(x, 4, 2)
        return quarters and [[int(q < 0) for q in quarters], quarters]

    assert leaks_to_each(protocol, Ring(4), (4,), everything(Ring(4), 1), expected) == set()


def test_sign_without_the_lowest_bit():
    """The carry out of it is left out: x counts as up to 2 less."""

    def protocol(party, x):
        return [(boolean.sign_bit(party, _masked(party, x), offsets=(-2,), low=1), 1)]

    def expected(x):
        half = _signed(x, 4) // 2 - 1
        return [[int(half < 0), int(half - 1 < 0)]] if half > -4 else None

    experiment = Experiment(protocol, Ring(4), (4,))
    assert experiment.leaks(everything(Ring(4), 1), expected) == set()


def test_two_truncations_of_one_opening():
    """As the pieces of a root (whose shifts differ, for which Ring(3) is too small)."""

    def protocol(party, x):
        both = arithmetic.masked(party, Secret(x, 0)).rearrange(lambda v: jnp.stack([v, v]))
        halves = arithmetic.truncate_by(party, both, np.array([1, 1])).share
        return [(halves[0], 3), (halves[1], 3)]

    def expected(x):
        return _halves(x, 3, 1) and [_halves(x, 3, 1)] * 2

    experiment = Experiment(protocol, Ring(3), (3,))
    assert experiment.leaks(everything(Ring(3), 1), expected) == set()


def test_selection_of_a_value_truncated_by_a_shift_of_its_own():
    def protocol(party, d, x):
        halved = arithmetic.truncate_by(party, Secret(x, 0), np.array(1))
        return [(compare.select(party, _bit(party, d), halved).share, 3)]

    def expected(d, x):
        return _products_of_halves(x, lambda half: [d * half])

    cases = [(0, 0), (1, 0), (0, 1), (1, 7), (1, 6)]
    assert leaks_to_each(protocol, Ring(3), (1, 3), cases, expected) == set()


def test_decompose():
    def protocol(party, x):
        rows = boolean.decompose(party, _masked(party, x), radix=2)
        assert len(party.messages) == 2
        return [(row, 1) for row in rows]

    cases = everything(Ring(3), 1)
    right = lambda x: [x & 1, x >> 1 & 1, x >> 2]  # noqa: E731
    assert leaks_to_each(protocol, Ring(3), (3,), cases, right) == set()


@pytest.mark.parametrize("find", [boolean.most_significant, patent.most_significant])
def test_most_significant(find):
    def protocol(party, *bits):
        one_hot, found = find(party, jnp.stack(bits)[:, None])
        return [(row, 1) for row in (*one_hot, found)]

    def expected(*bits):
        before = [0, *np.maximum.accumulate(bits)]
        return [after - earlier for earlier, after in pairwise(before)] + [before[-1]]

    experiment = Experiment(protocol, Ring(2), (1, 1, 1))
    assert experiment.leaks(list(np.ndindex(2, 2, 2)), expected) == set()


def _comparison(greater, bits):
    def protocol(party, u, v):
        bit = greater(party, Secret(u, 0), Secret(v, 0))
        return [(compare.b2a(party, bit).share, bits)]

    return protocol


def _greater(bits):
    def expected(u, v):
        u, v = _signed(u, bits), _signed(v, bits)
        in_range = all(-(2 ** (bits - 2)) <= a < 2 ** (bits - 2) for a in (u, v))
        return [int(u > v)] if in_range else None

    return expected


@pytest.mark.parametrize("bits", [2, 3])
def test_comparison(bits):
    """[u > v] as an arithmetic share: for all pairs in Ring(2), for some in Ring(3)."""
    some = [(0, 0), (1, 0), (0, 1), (7, 6), (6, 7), (1, 6), (3, 4)]
    cases = everything(Ring(2), 2) if bits == 2 else some
    experiment = Experiment(_comparison(compare.greater, bits), Ring(bits), (bits, bits))
    assert experiment.leaks(cases, _greater(bits)) == set()


def test_comparison_with_a_level_that_opens(monkeypatch):
    """As on 64 bits: local leaves, a level above them, the conversion; in Ring(4) with radix 2."""
    sign_bit = boolean.sign_bit
    monkeypatch.setattr(compare, "sign_bit", lambda *a, **k: sign_bit(*a, radix=2, **k))
    cases = [(0, 0), (1, 0), (0, 1), (15, 12), (12, 15), (5, 11)]
    protocol = _comparison(compare.greater, 4)
    assert leaks_to_each(protocol, Ring(4), (4, 4), cases, _greater(4)) == set()


def test_published_comparison():
    """Its views are fine; its results are not: out of 2 bits, wrong where shares wrap."""
    protocol, cases = _comparison(patent.greater, 2), everything(Ring(2), 2)
    assert leaks_to_each(protocol, Ring(2), (2, 2), cases) == set()
    with pytest.raises(AssertionError):
        leaks_to_each(protocol, Ring(2), (2, 2), cases, _greater(2))


def test_two_thresholds_under_one_mask():
    def protocol(party, x):
        bits = compare.less_than_public(party, Secret(x, 0), (0, 1))
        values = compare.b2a(party, bits).share
        return [(value, 3) for value in values]

    def expected(x):
        x = _signed(x, 3)
        return [int(x < 0), int(x < 1)] if x > -4 else None  # |x - 1| < 4

    assert leaks_to_each(protocol, Ring(3), (3,), everything(Ring(3), 1), expected) == set()


def _bit(party, share):
    return compare.bit_of_rows(party, share[None, None], ())[0]


def test_bit_to_arithmetic():
    def protocol(party, d):
        return [(compare.b2a(party, _bit(party, d)).share, 4)]

    assert Experiment(protocol, Ring(4), (1,)).leaks([(0,), (1,)], lambda d: [d]) == set()


def test_select():
    def protocol(party, d, x):
        return [(compare.select(party, _bit(party, d), Secret(x, 0)).share, 3)]

    cases = list(np.ndindex(2, 8))
    assert Experiment(protocol, Ring(3), (1, 3)).leaks(cases, lambda d, x: [d * x]) == set()


def test_one_bit_selects_forward_and_backward():
    def protocol(party, d, x, dy):
        bit = _bit(party, d)
        return [(compare.select(party, bit, Secret(v, 0)).share, 2) for v in (x, dy)]

    cases = [(0, 0, 0), (1, 0, 0), (0, 3, 1), (1, 3, 1), (1, 2, 2)]
    experiment = Experiment(protocol, Ring(2), (1, 2, 2))
    assert experiment.leaks(cases, lambda d, x, dy: [d * x, d * dy]) == set()


def test_two_bits_select_one_masked_value():
    def protocol(party, c, d, x):
        x = arithmetic.masked(party, Secret(x, 0))
        return [(compare.select(party, _bit(party, bit), x).share, 2) for bit in (c, d)]

    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 3), (1, 1, 1), (1, 0, 2)]
    experiment = Experiment(protocol, Ring(2), (1, 1, 2))
    assert experiment.leaks(cases, lambda c, d, x: [c * x, d * x]) == set()


# What `secure` adds -----------------------------------------------------------------------------


def _products(party, *rows):
    """The product of three values, in a scan over the last two."""

    def body(party, carry, row):
        carry = arithmetic.mul(party, Secret(carry, 0), Secret(row, 0)).settled(party).share
        return carry, carry

    last, products = party.scan(body, rows[0], jnp.stack(rows[1:]), 2)
    return [(last, 2), (products[0], 2)]


SCANNED = [(0, 0, 0), (1, 1, 1), (3, 2, 1), (1, 3, 2), (2, 1, 3)]


def test_products_in_a_scan():
    """Each iteration opens a secret that the one before made."""
    expected = lambda x, y, z: [x * y * z, x * y]  # noqa: E731
    assert leaks_to_each(_products, Ring(2), (2,) * 3, SCANNED, expected) == set()


def test_a_scan_whose_iterations_share_their_masks_is_found(monkeypatch):
    parts = Script.parts

    def same(self, count):
        return [jnp.stack([part[0]] * count) for part in parts(self, count)]

    monkeypatch.setattr(Script, "parts", same)
    assert leaks_to_each(_products, Ring(2), (2,) * 3, SCANNED) == {1, 2}


def _secured(function, count):
    """The protocol of a function of whole numbers."""
    program = lp.secure(function).program(*[np.int32(0)] * count)

    def protocol(party, *shares):
        results = program.run(party, [Secret(share, 0) for share in shares], [])
        words = jnp.concatenate([result.share.reshape(-1) for result in results])
        return [(word, party.ring.bits) for word in words]

    return protocol


def _near(*numbers):
    """Whether no two of them differ by half of Ring(2)."""
    return {_signed(x, 2) for x in numbers} <= {-1, 0}


def test_the_largest_of_three():
    def expected(*rows):
        return [max(_signed(x, 2) for x in rows)] if _near(*rows) else None

    protocol = _secured(lambda *rows: jnp.stack(rows).max(), 3)
    cases = [(0, 0, 0), (3, 0, 3), (3, 3, 0), (3, 3, 3), (2, 1, 3)]
    assert leaks_to_each(protocol, Ring(2), (2,) * 3, cases, expected) == set()


def test_numbers_that_are_sorted_with_others():
    """(A stable sort puts places into the numbers' lowest bits, for which Ring(2) has no room.)"""

    def function(first, second, *others):
        keys = jnp.stack([first, second])
        return jax.lax.sort((keys, jnp.stack(others)), num_keys=1, is_stable=False)

    def expected(first, second, *others):
        order = sorted([(_signed(first, 2), others[0]), (_signed(second, 2), others[1])])
        return (
            [x for pair in zip(*order, strict=True) for x in pair] if _near(first, second) else None
        )

    protocol = _secured(function, 4)
    cases = [(0, 0, 1, 1), (3, 0, 1, 2), (0, 3, 1, 2), (3, 3, 3, 3), (2, 1, 0, 1)]
    assert leaks_to_each(protocol, Ring(2), (2,) * 4, cases, expected) == set()


# Negative controls: planted leaks that the same check must find ---------------------------------


def _reused_mask(party, x, y):
    mask = party.mask(())
    for value in (x, y):
        party.open(value - mask.share, "mask")
    return []


def _one_sided_mask(party, x, y):
    party.open(x - party.public_share(party.mask(()).share), "mask")
    return []


def _narrow_mask(party, x, y):
    party.open(x - (party.mask(()).share & 1), "mask")
    return []


def _scaled_mask(party, x, y):
    party.open(x - 2 * party.mask(()).share, "mask")
    return []


def _opened_secret(party, x, y):
    party.open(x, "secret")
    return []


@pytest.mark.parametrize(
    ("protocol", "leaking"),
    [
        (_reused_mask, {1, 2}),
        (_one_sided_mask, {1}),  # S2's message to S1 is its bare share
        (_narrow_mask, {1, 2}),
        (_scaled_mask, {1, 2}),
        (_opened_secret, {1, 2}),
    ],
)
def test_planted_leaks_are_found(protocol, leaking):
    cases = everything(Ring(3), 2)
    assert Experiment(protocol, Ring(3), (3, 3)).leaks(cases) == leaking
    assert leaks_to_each(protocol, Ring(3), (3, 3), cases) == leaking


def test_one_pseudo_random_share_for_two_dealt_products_is_found():
    """S1's share of a*b reused for a*c: S2's corrections differ by a(b - c)."""
    experiment = Experiment(_two_products, Ring(2), (2, 2, 2), repeat_shares=True)
    cases = [(0, 0, 0), (1, 2, 3), (3, 3, 3), (2, 0, 1)]
    right = lambda x, y, z: [x * y, x * z]  # noqa: E731
    assert experiment.leaks(cases, right) == {2}
    assert leaks_to_each(_two_products, Ring(2), (2,) * 3, cases, right, repeat_shares=True) == {2}


def test_results_that_are_wrong_in_a_single_case_are_found():
    def protocol(party, x):
        square = arithmetic.square(party, Secret(x, 0)).settled(party).share
        wrong = party.public_share((x == 5) & (party._source.number == 77)).astype(jnp.uint8)
        return [(square + wrong, 3)]

    with pytest.raises(AssertionError):
        Experiment(protocol, Ring(3), (3,)).leaks(everything(Ring(3), 1), lambda x: [x * x])
