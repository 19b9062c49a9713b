"""No mask serves twice: across transformations, pools, servers and executions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pair
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from scipy import stats
from servers import QUICKLY, dealt, run_servers, server_program

import lpgan_jax
from lpgan_jax import FixedPoint, key, share
from lpgan_jax import protocols as P
from lpgan_jax.mpc import arithmetic, compare, elementary, roots
from lpgan_jax.mpc import party as party_module
from lpgan_jax.mpc.party import Source, Words, server_seeds, simulate
from lpgan_jax.mpc.seat import StaleParty
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.shares import share_words
from lpgan_jax.mpc.traces import StaleKey

ZEROS = jnp.zeros((2, 16), jnp.uint64)
EXECUTIONS = 6


def assert_distinct(words, least=1):
    """No 64-bit word twice: among n < 10^5 uniform ones a repeat has probability below 10^-9."""
    words = np.asarray(words).ravel()
    assert words.dtype == np.uint64
    assert least <= len(words) < 10**5
    assert len(np.unique(words)) == len(words)


# Transformations --------------------------------------------------------------------------------


def execution(ds_key):
    """All words that a server or DS sends while zeros are multiplied, compared and selected.

    With zero shares a message is a mask, or a fresh share of a dealt value: uniform, and the same
    word twice only if the same randomness was used twice.
    """

    def seat(party, zeros, _):
        x, y = Secret(zeros, 18), Secret(zeros, 18)
        product = arithmetic.truncate(party, arithmetic.mul(party, x, y), 18)
        compare.select(party, compare.positive(party, product), product)
        sent = [message.words.reshape(-1) for message in party.messages]
        return jnp.concatenate(sent), jnp.concatenate([c.reshape(-1) for c in party.corrections])

    sent, dealt = simulate(seat, ds_key, ZEROS)
    return jnp.concatenate([sent.reshape(-1), dealt[0]])


def _scan(keys):
    return lax.scan(lambda carry, k: (carry, execution(k)), 0, keys)[1]


def _scan_in_vmap(keys):
    return jax.vmap(_scan)(keys.reshape(2, -1))


def _checkpoint(keys):
    return [jax.checkpoint(execution)(k) for k in keys]


def _checkpoint_in_scan(keys):
    return lax.scan(lambda carry, k: (carry, jax.checkpoint(execution)(k)), 0, keys)[1]


def _one_jitted_function(keys):
    compiled = jax.jit(execution)
    words = [compiled(k) for k in keys]
    assert compiled._cache_size() == 1  # one trace, several executions
    return words


@pytest.mark.parametrize(
    "executions",
    [
        jax.vmap(execution),
        _scan,
        _scan_in_vmap,
        _checkpoint,
        _checkpoint_in_scan,
        _one_jitted_function,
    ],
    ids=["vmap", "scan", "scan in vmap", "checkpoint", "checkpoint in scan", "one jitted function"],
)
def test_no_word_is_sent_twice_in_several_executions(executions):
    keys = jax.random.split(key(1), EXECUTIONS)
    jitted = executions if executions is _one_jitted_function else jax.jit(executions)
    assert_distinct(jitted(keys), least=EXECUTIONS * 400)


def test_rematerialised_masks_are_the_same_and_not_new_ones():
    """The backward pass of a checkpoint repeats the same execution with the same words."""

    def loss(weight, ds_key):
        return jnp.sum(jnp.sin(weight * execution(ds_key).astype(jnp.float64) * 2.0**-64))

    expected = jax.jit(jax.grad(loss))(1.5, key(2))
    rematerialised = jax.jit(jax.grad(jax.checkpoint(loss)))(1.5, key(2))
    np.testing.assert_allclose(rematerialised, expected, rtol=1e-12)


def test_a_reused_key_is_found():
    """Negative control of the test above."""
    words = np.asarray(jax.jit(_scan)(jnp.stack([key(1), key(2), key(1)])))
    assert_distinct(words[:2])
    with pytest.raises(AssertionError):
        assert_distinct(words)


@pytest.mark.parametrize("transformation", ["vmap", "scan"])
def test_public_protocols_use_fresh_words_in_every_execution(transformation):
    """Their result shares of zero, each blinded by a dealt share."""

    def call(k):
        k1, k2, k3 = jax.random.split(k, 3)
        fxp = FixedPoint(18)
        return [
            P.sec_mul(k1, ZEROS, ZEROS, fxp),
            P.sec_relu(k2, ZEROS),
            P.sec_cmp(k3, ZEROS, ZEROS),
        ]

    keys = jax.random.split(key(3), EXECUTIONS)
    run = {"vmap": jax.vmap(call), "scan": lambda ks: lax.scan(lambda c, k: (c, call(k)), 0, ks)[1]}
    results = jax.jit(run[transformation])(keys)
    assert_distinct(np.stack(results), least=EXECUTIONS * 3 * 32)


# Stale parties ----------------------------------------------------------------------------------

USES = {
    "mask": lambda party, x: party.mask(x.shape).share,
    "bitwise mask": lambda party, x: party.mask(x.shape, x.dtype, bitwise=True).share,
    "exchange": lambda party, x: party.exchange(x, "x")[0],
    "open": lambda party, x: party.open(x, "x"),
    "mul": lambda party, x: arithmetic.mul(party, Secret(x, 0), Secret(x, 0)).settled(party).share,
    "compare": lambda party, x: compare.negative(party, Secret(x, 0)).random.share,
}

BODIES = {
    "scan": lambda use, x: lax.scan(lambda c, row: (c, use(row)), 0, jnp.stack([x, x]))[1][0],
    "fori_loop": lambda use, x: lax.fori_loop(0, 2, lambda i, v: use(v), x),
    "cond": lambda use, x: lax.cond(x[0] == 0, use, lambda v: v, x),
    "map": lambda use, x: lax.map(use, jnp.stack([x, x]))[0],
    "vmap": lambda use, x: jax.vmap(use)(jnp.stack([x, x]))[0],
    "jit": lambda use, x: jax.jit(use)(x),
    "checkpoint": lambda use, x: jax.checkpoint(use)(x),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("body", BODIES)
def test_a_party_is_refused_in_a_body_that_was_entered_later(body, use, jitted):
    def program(k):
        return simulate(
            lambda party, x, _: BODIES[body](lambda v: USES[use](party, v), x), k, ZEROS
        )

    with pytest.raises(StaleParty):
        (jax.jit(program) if jitted else program)(key(4))


def test_values_dealt_outside_are_refused_inside_a_body():
    """`correlate` draws S1's share: it is refused as well."""

    def seat(party, x, _):
        mask = party.mask(x.shape)
        return jax.jit(lambda: party.correlate(lambda v: v * v, mask).share)()

    with pytest.raises(StaleParty):
        simulate(seat, key(5), ZEROS)


def test_a_party_is_refused_after_its_trace():
    kept = []
    simulate(lambda party, x, _: (kept.append(party), x)[1], key(6), ZEROS)
    with pytest.raises(StaleParty):
        kept[0].mask((2,))
    with pytest.raises(StaleParty):
        simulate(lambda party, x, _: kept[0].open(x, "x"), key(7), ZEROS)


# Pools ------------------------------------------------------------------------------------------

POOL_SIZES = [0, 1, 3, 1020, 1, 0, 1024, 1025, 1, 2047, 2048, 5000, 17, 0, 20000]


def _draws(words, sizes):
    return [words.draw((size,), jnp.uint64).reshape(-1) for size in sizes]


@pytest.mark.parametrize("servers", [1, 2])
def test_requests_of_many_sizes_never_share_a_word(servers):
    @jax.jit
    def draw(k):
        keys = jax.random.split(k, 64)
        return _draws(Words(keys if servers == 1 else keys.reshape(2, 32)), POOL_SIZES)

    draws = draw(key(8))
    assert [d.size for d in draws] == [servers * size for size in POOL_SIZES]
    assert_distinct(np.concatenate(draws))


@pytest.fixture
def small_pools(monkeypatch):
    monkeypatch.setattr(party_module, "_SMALLEST_POOL", 4)
    monkeypatch.setattr(party_module, "_LARGEST_POOL", 16)
    monkeypatch.setattr(party_module, "_CALL_KEYS", 8)


@pytest.mark.usefixtures("small_pools")
@pytest.mark.parametrize("seed", range(3))
def test_more_requests_than_call_keys_and_larger_ones_than_pools(seed):
    """The calls' keys run out several times; a third of the requests reach the largest pool."""
    sizes = np.random.default_rng(seed).choice([0, 1, 3, 4, 5, 15, 16, 17, 40], 60).tolist()

    @jax.jit
    def draw(k):
        words = Words(jax.random.split(k, 4))
        return _draws(words, sizes)

    assert_distinct(np.concatenate(draw(key(seed))), least=sum(sizes))


@pytest.mark.usefixtures("small_pools")
def test_every_call_of_the_generator_has_a_key_of_its_own(monkeypatch):
    """Also for narrow types, whose words repeat by chance."""
    used = []
    original = Words._next_key

    def spy(self):
        used.append(original(self))
        return used[-1]

    monkeypatch.setattr(Words, "_next_key", spy)

    @jax.jit
    def draw(k):
        words = Words(jax.random.split(k, 4))
        for i in range(60):
            words.draw((1 + i % 20,), [jnp.uint8, jnp.uint32, jnp.uint64][i % 3])
        return [jax.random.key_data(k) for k in used]

    data = np.stack(draw(key(9)))
    assert len(data) > 20
    assert len(np.unique(data, axis=0)) == len(data)


def test_streams_of_servers_and_of_dealt_shares_are_distinct_and_the_same_online():
    """DS expands both seeds; each server expands its own, to the same words."""
    sizes = [5, 2000, 1, 1024]

    @jax.jit
    def draw(k):
        seeds = server_seeds(k)
        dealer, online = Source(seeds), [Source(seed) for seed in seeds]

        def masks(source):
            return [source.masks((size,), jnp.uint64) for size in sizes]

        def shares(source):
            return [source.shares((size,), jnp.uint64) for size in sizes]

        both = [jnp.concatenate(words) for words in zip(*masks(dealer), strict=True)]
        dealt = jnp.concatenate(shares(dealer))
        own = [jnp.concatenate(masks(source)) for source in online]
        return both, dealt, own, jnp.concatenate(shares(online[0]))

    both, dealt, own, own_dealt = draw(key(10))
    assert_distinct(np.concatenate([*both, dealt]), least=3 * sum(sizes))
    np.testing.assert_array_equal(both, own)
    np.testing.assert_array_equal(dealt, own_dealt)


# Deal and online --------------------------------------------------------------------------------


def _several(party, s, public):
    x, y = Secret(s["x"], 18), Secret(s["y"], 18)
    product = arithmetic.truncate(party, arithmetic.mul(party, x, y), 18)
    chosen = compare.select(party, compare.positive(party, x), product)
    root = roots.inverse_sqrt(party, arithmetic.square(party, x), 18)
    return [v.share + public for v in (product, chosen, root, elementary.tanh(party, x, 18))]


def test_deal_and_two_servers_are_bit_identical_to_simulate():
    """S1 gets zeros for corrections; both run one compiled program."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 2, (2, 7))
    secrets = {"x": pair(x, seed=1), "y": pair(y, seed=2)}
    public, ds_key = jnp.zeros((), jnp.uint64), lpgan_jax.key(11)
    expected = jax.jit(lambda k, s, p: simulate(_several, k, s, p))(ds_key, secrets, public)
    corrections = dealt(_several, ds_key, secrets, public)
    assert {c.dtype for c in corrections} <= {jnp.dtype("uint32"), jnp.dtype("uint64")}
    program = server_program(_several, secrets, public)
    assert [(c.shape, c.dtype) for c in corrections] == [
        (c.shape, c.dtype) for c in program.corrections
    ]
    run = program.compile(options=QUICKLY)
    outputs, _ = run_servers(program, run, ds_key, corrections, secrets, public)
    for ours, theirs in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    product = (np.asarray(expected[0][0]) + np.asarray(expected[0][1])).astype(np.int64) * 2.0**-18
    assert np.abs(product - x * y).max() < 2.0**-15  # inputs rounded by half an LSB, below 2^3


@pytest.mark.parametrize("change", [lambda c: [*c, c[-1]], lambda c: c[:-1], lambda c: c[::-1]])
def test_other_corrections_than_the_program_needs_are_refused(change):
    secrets = {"x": pair(np.ones(3)), "y": pair(np.ones(3))}
    mine, public = jax.tree.map(lambda v: v[0], secrets), jnp.zeros((), jnp.uint64)
    corrections = change(server_program(_several, secrets, public).corrections)
    with pytest.raises(ValueError, match="corrections: "):
        jax.eval_shape(
            lambda *given: party_module.online(_several, *given),
            *(jnp.asarray(True), key(1), corrections, mine, public),
        )


# Shares -----------------------------------------------------------------------------------------

KEYS = 2**16


def _assert_uniform_bytes(shares):
    """Chi-square over 256 values of each byte of each share, at 10^-6 a test on either side.

    With 16 bytes a secret and 5 secrets: a false alarm for one seed in 6,000.
    """
    data = np.ascontiguousarray(shares).view(np.uint8).reshape(KEYS, 2, 8)
    for server, byte in np.ndindex(2, 8):
        counts = np.bincount(data[:, server, byte], minlength=256)
        chi_square = np.sum((counts - KEYS / 256) ** 2) / (KEYS / 256)
        low, high = stats.chi2.ppf(1e-6, 255), stats.chi2.isf(1e-6, 255)
        assert low < chi_square < high, (server, byte)


@pytest.mark.parametrize("secret", [0, 1, -1, 2**62 - 1])
def test_each_share_of_a_fixed_integer_is_uniform(secret):
    keys = jax.random.split(key(12), KEYS)
    words = jnp.asarray(secret % 2**64, jnp.uint64)
    shares = np.asarray(jax.jit(jax.vmap(share_words, (0, None)))(keys, words))
    np.testing.assert_array_equal(shares.sum(1, dtype=np.uint64), np.asarray(words))
    _assert_uniform_bytes(shares)


def test_each_share_of_a_fixed_real_is_uniform():
    keys = jax.random.split(key(13), KEYS)
    shares = np.asarray(jax.jit(jax.vmap(lambda k: share(k, 1.0, FixedPoint(18))))(keys))
    assert np.all(shares.sum(1, dtype=np.uint64) == 2**18)
    _assert_uniform_bytes(shares)


# One key for a batch --------------------------------------------------------------------------


def _product_opened(party, x, factor):
    return party.open(x * factor - party.mask(x.shape).share, "mask")


def test_vmap_over_public_data_with_one_key_is_refused():
    """Two multiples of a secret under one mask differ by the secret."""
    factors = jnp.asarray([3, 4], jnp.uint64)
    with pytest.raises(ValueError, match="batch of keys"):
        jax.vmap(lambda factor: simulate(_product_opened, key(1), ZEROS, factor))(factors)
    with pytest.raises(ValueError, match="batch of keys"):
        jax.vmap(lambda factor: party_module.deal(_product_opened, key(1), ZEROS, factor))(factors)


def test_vmap_over_the_data_of_an_online_program_with_one_seed_is_refused():
    seeds, shares = server_seeds(key(1)), jnp.zeros((2, 16), jnp.uint64)

    def program(seed, shares):
        of = _product_opened, jnp.asarray(True), seed, []
        return jax.vmap(lambda x: party_module.online(*of, x, jnp.uint64(3)))(shares)

    with pytest.raises(ValueError, match="batch of keys"):
        jax.make_jaxpr(program, axis_env=[(party_module.AXIS, 2)])(seeds[0], shares)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_body_that_runs_on_several_devices_is_refused(check_vma):
    """The key may be the same on all of them; nothing tells."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    own, everywhere = PartitionSpec(None, "data"), PartitionSpec()
    mapped = jax.shard_map(
        P.sec_relu,
        mesh=mesh,
        in_specs=(everywhere, own),
        out_specs=own,
        check_vma=check_vma,
    )
    with pytest.raises(StaleKey, match=r"inside of a shard_map or pmap \(over data\)"):
        jax.eval_shape(mapped, key(1), ZEROS)
    with pytest.raises(StaleKey, match="inside of a shard_map or pmap"):
        jax.pmap(P.sec_relu, in_axes=(None, 1), out_axes=1)(key(1), ZEROS[:, None])
