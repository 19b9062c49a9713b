"""One server's seat in a protocol: its side of the named axis, and the dealer that feeds it.

Every protocol is written once, from the view of one server, as code over that server's own shares.
The only way that the two servers talk is `open` and
`exchange`. The same code then runs simulated (`simulate`: `vmap` over paired arrays, where the two
servers are the two places of the axis `AXIS`) and deployed (`online`: each server by itself).

The dealer DS hands out two kinds of correlated randomness:

- a *mask* (`mask`): each server expands its own part from its own seed; DS alone knows the sum;
- *shares of a value that depends on masks* (`correlate`): S1 expands a fresh pseudo-random share
  and DS sends S2 the correction.

| entry point | knows | does |
|---|---|---|
| `simulate` | both seeds | everything inline, both servers, in one program |
| `deal` | both seeds | the same code on zero shares; returns only the corrections for S2 |
| `online` | one server's seed and the corrections | what S1 and S2 run; no plaintext of DS's |

Freshness. A `Party` counts its draws while a function is traced, so it is valid in the one trace
that made it: used in the body of a `scan`, `vmap`, `jit` or `checkpoint` that was entered later, it
would hand the same words to several executions. It refuses that with `StaleParty`. Inside such a
body, make a new party from a key (or corrections) that is an argument of the body: a key from
outside, with data of the body, is refused with `StaleKey`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.custom_batching import custom_vmap
from jaxtyping import Num, PRNGKeyArray

from lpgan_jax.mpc import prng, traces
from lpgan_jax.mpc.dealt import Dealt, Owed
from lpgan_jax.mpc.exchange import correction_p, exchange_p
from lpgan_jax.mpc.guard import Samples, Watched, range_of
from lpgan_jax.mpc.prng import require_cryptographic
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.traces import StaleKey, named
from lpgan_jax.ring.words import RING32, RING64, Elements, Ring, bit_xor

AXIS = "party"
_SMALLEST_POOL, _LARGEST_POOL = 2**10, 2**16
_CALL_KEYS = 128


class Words:
    """A stream of pseudo-random words, each handed out once.

    Small requests are cut from pools, so that a program holds few generator calls; large ones get a
    call of their own, so that their memory lives no longer than they do. Every call has a key of
    its own; these keys are derived many at a time, since each derivation is a generator call too.
    """

    def __init__(self, call_keys: jax.Array) -> None:
        """`call_keys`: typed keys [..., n]; leading axes (the servers) are those of the words."""
        self._keys = call_keys
        self._used = 0
        self._pools: dict[Any, tuple[jax.Array, int]] = {}

    def _next_key(self) -> jax.Array:
        if self._used == self._keys.shape[-1] - 1:  # the last one is the parent of the next
            self._keys, self._used = call_keys(self._keys[..., -1]), 0
        self._used += 1
        return self._keys[..., self._used - 1]

    def _call(self, size: int, dtype: Any) -> jax.Array:
        keys = self._next_key()
        if not keys.ndim:
            return jax.random.bits(keys, (size,), dtype)
        return jax.vmap(lambda key: jax.random.bits(key, (size,), dtype))(keys)

    def children(self, count: int) -> jax.Array:
        """Keys for as many other streams, [..., count]."""
        key = self._next_key()
        if not key.ndim:
            return jax.random.split(key, count)
        return jax.vmap(lambda own: jax.random.split(own, count))(key)

    def draw(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Fresh words of the given shape (after the leading axes of the keys)."""
        lead, size = self._keys.shape[:-1], math.prod(shape)
        if size > _LARGEST_POOL // 8:  # cut from a pool, it might waste the pool's rest
            return self._call(size, dtype).reshape(lead + shape)
        pool, used = self._pools.get(dtype, (None, 0))
        if pool is None or used + size > pool.shape[-1]:
            previous = 0 if pool is None else pool.shape[-1]
            length = min(max(2 * previous, size, _SMALLEST_POOL), _LARGEST_POOL)
            pool, used = self._call(length, dtype), 0
        self._pools[dtype] = (pool, used + size)
        return lax.slice_in_dim(pool, used, used + size, axis=-1).reshape(lead + shape)


def call_keys(parent: jax.Array) -> jax.Array:
    """Children of a key, or of each of a vector of keys: [..., n]."""
    if not parent.ndim:
        return jax.random.split(parent, _CALL_KEYS)
    return jax.vmap(lambda key: jax.random.split(key, _CALL_KEYS))(parent)


class Source:
    """Where a party's random words come from: the servers' seeds, or one of them."""

    def __init__(self, seeds: jax.Array) -> None:
        """`seeds`: both servers' (DS's view, [2]) or a server's own."""
        self._both = seeds.ndim == 1
        keys = call_keys(seeds)
        half = _CALL_KEYS // 2
        self._masks = Words(keys[..., :half])
        # Only S1's are used: its shares of dealt values. (S2 expands its own too, to no purpose.)
        self._shares = Words(keys[0, half:] if self._both else keys[half:])

    def masks(self, shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array] | jax.Array:
        """Words of S1's seed and of S2's; or of the only seed."""
        words = self._masks.draw(shape, dtype)
        if not self._both:
            return words
        first, second = jnp.unstack(words)
        return first, second

    def shares(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Words of S1's seed, for its share of a dealt value."""
        return self._shares.draw(shape, dtype)

    def children(self, count: int) -> jax.Array:
        """Seeds for as many other sources, [count] or [count, 2]."""
        return jnp.moveaxis(self._masks.children(count), -1, 0)


@dataclass(frozen=True)
class Message:
    """What this server sends in one exchange: a name and the words."""

    name: str
    words: jax.Array


class Party(Seat):
    """One server's seat. Made by `simulate`, `deal` and `online`, valid in the trace that made it.

    Attributes:
        is_s1: whether this server is S1 (a traced bool: both servers run the same program).
        messages: every message sent so far, in order.
        corrections: what DS must send to S2, in order (deal mode).
        samples: of what the program truncates and compares, if it is guarded.
    """

    def __init__(
        self,
        source: Source,
        ring: Ring = RING64,
        received: Iterator[jax.Array] | None = None,
        is_s1: jax.Array | None = None,
        half: Ring = RING32,
    ) -> None:
        """`received`: S2's corrections, `is_s1`: which server this is, both in online mode."""
        super().__init__(ring, half)
        self._deployed = is_s1
        self.is_s1 = lax.axis_index(AXIS) == 0 if is_s1 is None else is_s1
        self.messages: list[Message] = []
        self.corrections: list[jax.Array] = []
        self.samples: Samples | None = None
        self._source = source
        self._received = received

    # The servers ------------------------------------------------------------------------------

    def public_share(self, public: Num[jax.Array, "*shape"]) -> Num[jax.Array, "*shape"]:
        """A share of a public value: the value at S1, zeros at S2."""
        return lax.select(self.is_s1, public, lax.full_like(public, 0))

    def exchange(self, words: Elements, name: str) -> tuple[Elements, Elements]:
        """See `Seat.exchange`."""
        self._check_fresh()
        self.messages.append(Message(self._path(name), words))
        if self._deployed is None:
            both = self.marked("exchange", name, lambda w: lax.all_gather(w, AXIS))(words)
            first, second = jnp.unstack(both)
            return first, second
        other = self.marked("exchange", name, exchange_p.bind)(words)
        return lax.select(self.is_s1, words, other), lax.select(self.is_s1, other, words)

    def watch(self, value: Secret, operation: str, bits: int | None = None) -> None:
        """See `Seat.watch`."""
        if self.samples is not None:
            self.samples.take(self.tensor_place, value, operation, range_of(bits), self.filling)

    # The dealer -------------------------------------------------------------------------------

    def mask(self, shape: tuple[int, ...], dtype: Any = None, bitwise: bool = False) -> Dealt:
        """See `Seat.mask`."""
        self._check_fresh()
        words = self._source.masks(shape, dtype or self.ring.dtype)
        if not isinstance(words, tuple):
            return Dealt(words, None)
        first, second = words
        plain = bit_xor(first, second) if bitwise else lax.add(first, second)
        return Dealt(lax.select(self.is_s1, first, second), plain)

    def correlate(
        self, function: Callable[..., Elements], *values: Dealt, bitwise: bool = False
    ) -> Dealt:
        """See `Seat.correlate`."""
        plains = [value.plain for value in values]
        if any(plain is None for plain in plains):
            return self._receive(jax.eval_shape(function, *(value.share for value in values)))
        return self._deal(function, plains, bitwise)

    def compute(self, function: Callable[..., Elements], *values: Dealt) -> Owed:
        """See `Seat.compute`."""
        plains = [value.plain for value in values]
        if any(plain is None for plain in plains):
            return Owed(None)
        return Owed(self.marked("deal", "", lambda *plains: (function(*plains),))(*plains)[0])

    def settle(self, owed: Owed, like: Elements) -> Dealt:
        """See `Seat.settle`."""
        if owed.plain is None:
            return self._receive(jax.ShapeDtypeStruct(like.shape, like.dtype))
        return self._deal(lambda plain: plain, [owed.plain], bitwise=False)

    # Loops ------------------------------------------------------------------------------------

    def scan(
        self,
        body: Callable[[Party, Any, Any], tuple[Any, Any]],
        carry: Any,
        xs: Any,
        length: int,
        reverse: bool = False,
    ) -> tuple[Any, Any]:
        """See `Seat.scan`."""
        self._check_fresh()
        seeds = self._seeds(length)
        dealt = [
            self._next_correction(jax.ShapeDtypeStruct((length, *c.shape), c.dtype))
            for c in self._needed(body, carry, (seeds, xs), length)
        ]

        watched: list[Watched] = []  # known once `step` was traced

        def step(carry: Any, iteration: Any) -> tuple[Any, Any]:
            seed, received, x = iteration
            party = self._child(seed, received)
            if self.samples is not None:
                party.samples = Samples(self.samples.turn)
            carry, y = body(party, carry, x)
            taken = [] if party.samples is None else party.samples.taken
            watched[:] = [of for of, _ in taken]
            return carry, (y, party.corrections, [elements for _, elements in taken])

        carry, (ys, corrections, taken) = lax.scan(step, carry, (seeds, dealt, xs), length, reverse)
        self.corrections += corrections
        if self.samples is not None:
            self.samples.out_of_loop(watched, taken)
        return carry, ys

    def _seeds(self, count: int) -> Any:
        """What the parties of as many iterations are made from."""
        return self._source.children(count)

    def _child(self, seed: Any, received: Sequence[jax.Array]) -> Party:
        """The party of an iteration; `received`: its corrections, in online mode."""
        queue = None if self._deployed is None else iter(received)
        party = Party(Source(seed), self.ring, queue, self._deployed, self.half)
        party.place = self.place
        return party

    def _needed(
        self, body: Callable[..., Any], carry: Any, rows: Any, length: int
    ) -> list[jax.ShapeDtypeStruct]:
        """The corrections that S2 receives for an iteration, in online mode."""
        if self._deployed is None:
            return []
        needed: list[jax.ShapeDtypeStruct] = []

        def trial(carry: Any, row: Any) -> Any:
            seed, x = row
            party = _Trial(Source(seed), self.ring, iter(()), self._deployed)
            result = body(party, carry, x)
            needed[:] = party.needed
            return result

        jax.eval_shape(lambda first, rows: lax.scan(trial, first, rows, length), carry, rows)
        return needed

    def _receive(self, expected: jax.ShapeDtypeStruct) -> Dealt:
        self._check_fresh()
        correction = self._next_correction(expected)
        pseudo_random = self._source.shares(expected.shape, expected.dtype)
        return Dealt(lax.select(self.is_s1, pseudo_random, correction), None)

    def _deal(self, function: Callable[..., jax.Array], plains: list[Any], bitwise: bool) -> Dealt:
        self._check_fresh()
        traced = jax.jit(function)  # once, for its shape and in `deal`
        result = traced.eval_shape(*plains)
        first = self._source.shares(result.shape, result.dtype)

        def deal(first: jax.Array, *plains: jax.Array) -> tuple[jax.Array, jax.Array]:
            plain = traced(*plains)
            return plain, bit_xor(plain, first) if bitwise else lax.sub(plain, first)

        plain, correction = self.marked("deal", "", deal)(first, *plains)
        self.corrections.append(correction)
        return Dealt(lax.select(self.is_s1, first, correction), plain)

    def _next_correction(self, expected: jax.ShapeDtypeStruct) -> jax.Array:
        if self._deployed is not None and self._received is None:
            later: jax.Array = correction_p.bind(like=ShapedArray(expected.shape, expected.dtype))
            return later
        correction = next(self._received or iter(()), None)
        if correction is None:
            raise ValueError("corrections: fewer were dealt than this program uses")
        if (correction.shape, correction.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"corrections: expected {expected.dtype}{list(expected.shape)} next, "
                f"got {correction.dtype}{list(correction.shape)}"
            )
        return correction


class _Trial(Party):
    """A party that is only traced, to see which corrections a program needs."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.needed: list[jax.ShapeDtypeStruct] = []

    def _next_correction(self, expected: jax.ShapeDtypeStruct) -> jax.Array:
        self.needed.append(expected)
        return jnp.zeros(expected.shape, expected.dtype)

    def _child(self, seed: Any, received: Sequence[jax.Array]) -> Party:
        return _Trial(Source(seed), self.ring, iter(()), self._deployed)


class _Dealing(Party):
    """DS in a server's seat: it deals, and nothing is sent."""

    def __init__(self, source: Source, ring: Ring = RING64) -> None:
        super().__init__(source, ring, is_s1=jnp.asarray(True))
        self._deployed = None  # it receives nothing either

    def exchange(self, words: Elements, name: str) -> tuple[Elements, Elements]:
        """Nothing: no correction depends on what is opened."""
        self._check_fresh()
        # As a call with its name: the audit sees whether a correction depends on it after all.
        nothing = self.marked("exchange", name, lambda w: lax.full_like(w, 0))(words)
        return nothing, nothing

    def _child(self, seed: Any, received: Sequence[jax.Array]) -> Party:
        party = _Dealing(Source(seed), self.ring)
        party.place = self.place
        return party


# Entry points -----------------------------------------------------------------------------------


server_seeds = named("seeds:", prng.server_seeds)
"""The servers' seeds under DS's key: see `prng.server_seeds`. The audit knows it by this name."""


@custom_vmap
def _bind(key: jax.Array, arrays: list[jax.Array]) -> list[jax.Array]:
    """The arrays; refuses, when batched, to be batched without the key."""
    return arrays


@_bind.def_vmap
def _bind_batched(size: int, batched: list[Any], key: jax.Array, arrays: list[jax.Array]) -> Any:
    key_batched, arrays_batched = batched
    if any(arrays_batched) and not key_batched:
        raise ValueError(
            "key: vmap over data needs a batch of keys (jax.random.split(key, n)): with one key "
            "all elements would share their masks, which reveals their differences"
        )
    return _bind(key, arrays), arrays_batched  # and so for every vmap around this one


def is_own_rule(rule: Any) -> bool:
    """Whether this is how `bound` is batched: a rule of ours, which computes nothing."""
    return inspect.unwrap(rule) is _bind_batched


def bound(key: jax.Array, tree: Any) -> Any:
    """The tree, whose arrays may be batched by `vmap` only together with the key.

    Raises:
        StaleKey: some of it belongs to a trace that the key does not belong to; or it lies on
            several devices, under `shard_map` or `pmap`.
        ValueError: some of it is batched, and the key is not.
    """
    traces.require_own_keys(key, tree)
    if axes := traces.mapped_axes() - {AXIS}:
        raise StaleKey(
            f"key: inside of a shard_map or pmap (over {', '.join(sorted(axes))}), where it may be "
            "the same on all devices, whose data would share their masks: use vmap over keys and "
            "data, and jit, which splits it over devices"
        )
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _bind(key, leaves))


def _settled(party: Party, outputs: Any) -> Any:
    """What leaves a program: shares without masks, for which DS deals what it still owes."""

    def can_owe(node: Any) -> bool:
        return hasattr(node, "settled")

    return jax.tree.map(
        lambda v: v.settled(party).unmasked() if can_owe(v) else v, outputs, is_leaf=can_owe
    )


Program = tuple[Callable[[Seat, Any, Any], Any], Any, Any]
"""(function, secrets, public), as `simulate` takes them, often of shapes: to be traced, not run."""


def simulate(
    function: Callable[..., Any],
    key: PRNGKeyArray,
    secrets: Any,
    public: Any = None,
    *,
    ring: Ring = RING64,
    half: Ring = RING32,
) -> Any:
    """Run a protocol with both servers and DS in one program.

    Args:
        function: (party, secrets, public) -> outputs; the secrets and outputs are pytrees of this
            server's shares.
        key: DS's ChaCha20 key; every execution needs one of its own.
        secrets: the same pytree with paired arrays: leading axis 2, S1's share first.
        public: a pytree that both servers know; None for nothing.
        ring: the ring of the arithmetic shares.
        half: the smaller one.

    Returns:
        The outputs as paired arrays.

    Raises:
        TypeError: the key is not of a cryptographic PRNG.
        ValueError: under `vmap`, the secrets or the public values are batched and the key is not.
        StaleKey: the secrets or the public values belong to the body of a `scan`, `jit` or the
            like, and the key comes from outside of it; or the body is a `shard_map`'s. (What
            `function` closes over is not looked at: hand over whatever may change.)
    """
    keys = server_seeds(key)
    secrets, public = bound(key, (secrets, public))

    def seat(shares: Any) -> Any:
        party = Party(Source(keys), ring, half=half)
        return _settled(party, function(party, shares, public))

    return jax.vmap(seat, axis_name=AXIS)(secrets)


def deal(
    function: Callable[..., Any], key: PRNGKeyArray, secrets: Any, public: Any = None
) -> list[Elements]:
    """DS's program: the corrections that S2 needs to run `function` online.

    Runs the same code as `simulate` from one seat, on zero shares, with nobody to talk to. The
    corrections depend on the key alone, so that XLA removes all of the servers' work when this is
    jitted.

    Args:
        function: as in `simulate`.
        key: as in `simulate`.
        public: as in `simulate`.
        secrets: as in `simulate`; only shapes and dtypes are looked at.

    Returns:
        Arrays in the order in which `online` consumes them.
    """
    keys = server_seeds(key)
    public = bound(key, public)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), secrets)

    party = _Dealing(Source(keys))
    _settled(party, function(party, zeros, public))
    return party.corrections


def online(
    function: Callable[..., Any],
    is_s1: jax.Array,
    seed: PRNGKeyArray,
    corrections: list[Elements] | None,
    secrets: Any,
    public: Any = None,
) -> Any:
    """One server's program: to be traced, for `rounds`, which puts its exchanges into messages.

    Args:
        function: as in `simulate`.
        public: as in `simulate`.
        is_s1: whether this server is S1, bool[]; both servers run the same program.
        seed: this server's key.
        corrections: what `deal` returned (zeros, or anything, at S1, which ignores them). None:
            `rounds` will make inputs of those that the program asks for.
        secrets: a pytree of this server's shares.

    Returns:
        This server's outputs.
    """
    require_cryptographic(seed)
    corrections, secrets, public = bound(seed, (corrections, secrets, public))
    received = None if corrections is None else iter(corrections)
    party = Party(Source(seed), received=received, is_s1=is_s1)
    outputs = _settled(party, function(party, secrets, public))
    if received is not None and next(received, None) is not None:
        raise ValueError("corrections: more were dealt than this program uses")
    return outputs
