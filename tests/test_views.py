"""What a server sees, exhaustively: in a tiny ring, over every random word and every share.

A server's view is its shares of the secrets, the words of its own seed, its corrections and every
message of the other server. For each primitive, all random bits (shares, masks, S1's shares of
dealt values) are enumerated, and the multiset of views must be the same for all secrets. The view
contains the server's input shares, so this is equality given its own share. Bits of packed words
beyond lane 0 hold no value when one element is processed; they are 0 here.

The rings have 2 to 4 bits, so that a case has at most 24 random bits. A comparison with its
conversion to arithmetic shares is enumerated in Ring(2) and Ring(3); in Ring(4), where it has 28,
the sign bit and the conversion are each enumerated alone.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpgan_jax.mpc import arithmetic, boolean, compare
from lpgan_jax.party import AXIS, Party, Source
from lpgan_jax.ring.words import Ring
from lpgan_jax.secret import Secret

CHUNK_BITS = 20


class Script(Source):
    """Hands out the bits of a number, so that all numbers give all random words."""

    def __init__(self, number, repeat_shares=False):
        self.number, self.used, self.width = number, 0, 0
        self.words = ([], [])  # (word, width) of S1's seed and of S2's
        self._repeat_shares, self._last_share = repeat_shares, None

    def take(self, shape=(), width=None):
        width, count = width or self.width, math.prod(shape)
        starts = self.used + width * np.arange(count, dtype=np.uint32)
        self.used += width * count
        words = (self.number >> starts) & np.uint32(2**width - 1)
        return words.astype(jnp.uint8).reshape(shape)

    def masks(self, shape, dtype):
        both = self.take(shape), self.take(shape)
        for own, words in zip(self.words, both, strict=True):
            own.append((words, self.width))
        return both

    def shares(self, shape, dtype):
        if self._repeat_shares and self._last_share is not None:
            return self._last_share
        self._last_share = self.take(shape)
        self.words[0].append((self._last_share, self.width))
        return self._last_share


class Seat(Party):
    """A party that tells its script how many bits of a word count, and writes down what is sent."""

    def __init__(self, source, ring):
        super().__init__(source, ring)
        self.sent, self.dealt = [], []  # (words, width)
        self._message_width = 1

    def mask(self, shape, dtype=None, bitwise=False):
        self._source.width = 1 if bitwise else self.ring.bits
        return super().mask(shape, dtype, bitwise)

    def own_masks(self, shape, dtype):
        self._source.width = 1
        return super().own_masks(shape, dtype)

    def correlate(self, function, *values, bitwise=False):
        self._source.width = 1 if bitwise else self.ring.bits
        result = super().correlate(function, *values, bitwise=bitwise)
        correction = self.corrections[-1]
        # The container's bits beyond the ring's are no part of a message.
        self.dealt.append(
            (correction if bitwise else self.ring.reduce(correction), self._source.width)
        )
        return result

    def open(self, share, name):
        self._message_width = self.ring.bits
        result = super().open(share, name)
        self._message_width = 1
        return result

    def exchange(self, words, name):
        self.sent.append((words, self._message_width))
        return super().exchange(words, name)


def pack(fields):
    """Words of given widths as one number, and whether a word has bits beyond its width."""
    code, position, beyond = jnp.zeros((), jnp.uint64), 0, jnp.zeros((), bool)
    for words, width in fields:
        for word in words.reshape(-1).astype(jnp.uint64):
            code |= word << position
            beyond |= (word >> width) != 0
            position += width
    assert position <= 64
    return code, beyond


class Experiment:
    """All executions of protocol(party, *shares), which returns a list of (share, width).

    `widths`: of the secrets; 1 is an XOR-shared bit, otherwise a ring element.
    """

    def __init__(self, protocol, ring, widths, repeat_shares=False):
        self._protocol, self._ring, self._widths = protocol, ring, widths
        self._repeat_shares = repeat_shares
        self._run = jax.jit(jax.vmap(self._execute, in_axes=(None, 0)))
        jax.eval_shape(self._execute, jnp.zeros(len(widths), jnp.uint8), jnp.zeros((), jnp.uint32))
        assert self.random_bits <= 24

    def _execute(self, secrets, number):
        script, ring = Script(number, self._repeat_shares), self._ring
        inputs = []
        for secret, width in zip(secrets, self._widths, strict=True):
            first = script.take(width=width)
            second = secret ^ first if width == 1 else ring.reduce(secret - first)
            inputs.append(jnp.stack([first, second]))
        records = {}

        def seat(shares):
            party = Seat(script, ring)
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
        for server in (0, 1):
            own = [(pair[server], width) for pair, width in zip(inputs, self._widths, strict=True)]
            received = [(m[1 - server], w) for m, w in zip(sent, records["sent"], strict=True)]
            corrections = list(zip(dealt, records["dealt"], strict=True)) if server else []
            views.append(pack([*own, *script.words[server], *corrections, *received]))
        codes, beyond = zip(*views, strict=True)
        results = [
            (pair[0] ^ pair[1] if width == 1 else ring.reduce(pair[0] + pair[1])).reshape(())
            for pair, width in zip(outputs, records["outputs"], strict=True)
        ]
        return jnp.stack(codes), jnp.stack(beyond).any(), results

    def run(self, secrets):
        """(views [server, execution], results [output, execution])."""
        secrets = jnp.asarray(secrets, jnp.uint8)
        total = 2**self.random_bits
        codes, results = [], []
        for start in range(0, total, 2**CHUNK_BITS):
            numbers = jnp.arange(start, min(total, start + 2**CHUNK_BITS), dtype=jnp.uint32)
            views, beyond, outputs = self._run(secrets, numbers)
            assert not beyond.any()
            codes.append(views)
            results.append(np.array(outputs).reshape(len(outputs), len(numbers)))
        return np.concatenate(codes).T, np.concatenate(results, axis=1)

    def leaks(self, cases, expected=None):
        """The servers (1, 2) whose multiset of views is not the same for all secrets in `cases`.

        `expected`: secrets -> the right results, or None where the inputs are out of range.
        """
        reference, leaking = None, set()
        for secrets in cases:
            views, results = self.run(secrets)
            if expected is not None and (right := expected(*secrets)) is not None:
                allowed = [np.atleast_1d(np.asarray(r)) % 2**self._ring.bits for r in right]
                for result, values in zip(results, allowed, strict=True):
                    assert np.isin(result, values).all(), secrets
            views = np.sort(views, axis=1)
            reference = views if reference is None else reference
            leaking |= {i + 1 for i in (0, 1) if not np.array_equal(views[i], reference[i])}
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
    return [(arithmetic.mul(party, Secret(x, 0), Secret(y, 0)).share, party.ring.bits)]


@pytest.mark.parametrize("bits", [2, 3])
def test_mul(bits):
    ring = Ring(bits)
    cases = everything(ring, 2) if bits == 2 else [(0, 0), (0, 5), (3, 4), (7, 7)]
    experiment = Experiment(_mul, ring, (bits, bits))
    assert experiment.leaks(cases, lambda x, y: [x * y]) == set()


@pytest.mark.parametrize("bits", [3, 4])
def test_square(bits):
    def protocol(party, x):
        return [(arithmetic.square(party, Secret(x, 0)).share, bits)]

    ring = Ring(bits)
    experiment = Experiment(protocol, ring, (bits,))
    assert experiment.leaks(everything(ring, 1), lambda x: [x * x]) == set()


def test_one_mask_in_a_square_and_a_truncation():
    def protocol(party, x):
        x = arithmetic.masked(party, Secret(x, 1))
        halved = arithmetic.truncate(party, x, 0)
        return [(arithmetic.square(party, x).share, 3), (halved.share, 3)]

    def expected(x):
        return [x * x, _halves(x, 3, 1) or range(8)]

    experiment = Experiment(protocol, Ring(3), (3,))
    assert experiment.leaks(everything(Ring(3), 1), expected) == set()


def _two_products(party, x, y, z):
    x = arithmetic.masked(party, Secret(x, 0))
    return [(arithmetic.mul(party, x, Secret(v, 0)).share, party.ring.bits) for v in (y, z)]


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


def test_and():
    def protocol(party, u, v):
        u, v = boolean._open_masked(party, u[None]), boolean._open_masked(party, v[None])
        return [(boolean._and(party, u, v), 1)]

    cases = list(np.ndindex(2, 2))
    assert Experiment(protocol, Ring(2), (1, 1)).leaks(cases, lambda u, v: [u & v]) == set()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sign_bit(bits):
    """With 4 bits the tree has two levels, and propagates of its own: 22 random bits."""

    def protocol(party, x):
        return [(boolean.sign_bit(party, x), 1)]

    experiment = Experiment(protocol, Ring(bits), (bits,))
    assert experiment.leaks(everything(Ring(bits), 1), lambda x: [x >> (bits - 1)]) == set()


@pytest.mark.parametrize("bits", [2, 3])
def test_comparison(bits):
    """[u > v] as an arithmetic share: for all pairs in Ring(2), for some in Ring(3)."""

    def protocol(party, u, v):
        bit = compare.greater(party, Secret(u, 0), Secret(v, 0))
        return [(compare.arithmetic(party, bit).share, bits)]

    def expected(u, v):
        u, v = (a - 2**bits if a >= 2 ** (bits - 1) else a for a in (u, v))
        in_range = all(-(2 ** (bits - 2)) <= a < 2 ** (bits - 2) for a in (u, v))
        return [int(u > v)] if in_range else None

    some = [(0, 0), (1, 0), (0, 1), (7, 6), (6, 7), (1, 6), (3, 4)]
    cases = everything(Ring(2), 2) if bits == 2 else some
    assert Experiment(protocol, Ring(bits), (bits, bits)).leaks(cases, expected) == set()


@pytest.fixture
def given_bits(monkeypatch):
    """`negative` of a value takes its XOR-shared lowest bit for the sign: no tree to enumerate."""
    monkeypatch.setattr(compare, "sign_bit", lambda party, share: share[None])


def _bit(party, share):
    return compare.negative(party, Secret(share, 0))


@pytest.mark.usefixtures("given_bits")
def test_bit_to_arithmetic():
    def protocol(party, d):
        return [(compare.arithmetic(party, _bit(party, d)).share, 4)]

    assert Experiment(protocol, Ring(4), (1,)).leaks([(0,), (1,)], lambda d: [d]) == set()


@pytest.mark.usefixtures("given_bits")
def test_select():
    def protocol(party, d, x):
        return [(compare.select(party, _bit(party, d), Secret(x, 0)).share, 3)]

    cases = list(np.ndindex(2, 8))
    assert Experiment(protocol, Ring(3), (1, 3)).leaks(cases, lambda d, x: [d * x]) == set()


@pytest.mark.usefixtures("given_bits")
def test_one_bit_selects_forward_and_backward():
    def protocol(party, d, x, dy):
        bit = _bit(party, d)
        return [(compare.select(party, bit, Secret(v, 0)).share, 2) for v in (x, dy)]

    cases = [(0, 0, 0), (1, 0, 0), (0, 3, 1), (1, 3, 1), (1, 2, 2)]
    experiment = Experiment(protocol, Ring(2), (1, 2, 2))
    assert experiment.leaks(cases, lambda d, x, dy: [d * x, d * dy]) == set()


@pytest.mark.usefixtures("given_bits")
def test_two_bits_select_one_masked_value():
    def protocol(party, c, d, x):
        x = arithmetic.masked(party, Secret(x, 0))
        return [(compare.select(party, _bit(party, bit), x).share, 2) for bit in (c, d)]

    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 3), (1, 1, 1), (1, 0, 2)]
    experiment = Experiment(protocol, Ring(2), (1, 1, 2))
    assert experiment.leaks(cases, lambda c, d, x: [c * x, d * x]) == set()


# Negative controls: planted leaks that the same check must find ---------------------------------


def _reused_mask(party, x, y):
    mask = party.mask(())
    for value in (x, y):
        party.open(value - mask.share, "mask")
    return []


def _one_sided_mask(party, x, y):
    party.open(x - party.only_s1(party.mask(()).share), "mask")
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
    assert Experiment(protocol, Ring(3), (3, 3)).leaks(everything(Ring(3), 2)) == leaking


def test_one_pseudo_random_share_for_two_dealt_products_is_found():
    """S1's share of a*b reused for a*c: S2's corrections differ by a(b - c)."""
    experiment = Experiment(_two_products, Ring(2), (2, 2, 2), repeat_shares=True)
    cases = [(0, 0, 0), (1, 2, 3), (3, 3, 3), (2, 0, 1)]
    assert experiment.leaks(cases, lambda x, y, z: [x * y, x * z]) == {2}


def test_results_that_are_wrong_in_a_single_case_are_found():
    def protocol(party, x):
        square = arithmetic.square(party, Secret(x, 0)).share
        wrong = party.only_s1((x == 5) & (party._source.number == 77)).astype(jnp.uint8)
        return [(square + wrong, 3)]

    with pytest.raises(AssertionError):
        Experiment(protocol, Ring(3), (3,)).leaks(everything(Ring(3), 1), lambda x: [x * x])
