"""ChaCha20: RFC 8439's vectors, an independent implementation, and how JAX draws from it."""

import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chacha20 import CHUNK, reference_bits, reference_block

from lpgan_jax.mpc.prng import CHACHA20, chacha20_block, key, require_cryptographic


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def block_bytes(key_bytes, counter, nonce_bytes):
    def words(data):
        return jnp.array(np.frombuffer(data, "<u4").astype(np.uint32))

    block = chacha20_block(words(key_bytes), counter, words(nonce_bytes))
    return np.asarray(block).astype("<u4").tobytes()


class TestRFC8439:
    KEY = bytes(range(32))

    def test_block_function_2_3_2(self):
        nonce = bytes.fromhex("000000090000004a00000000")
        expected = (
            "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
            "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
        )
        assert block_bytes(self.KEY, 1, nonce).hex() == expected

    def test_encryption_2_4_2(self):
        text = (
            b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the"
            b" future, sunscreen would be it."
        )
        nonce = bytes.fromhex("000000000000004a00000000")
        stream = block_bytes(self.KEY, np.array([1, 2]), nonce)
        cipher = bytes(a ^ b for a, b in zip(text, stream, strict=False))
        assert cipher.hex() == (
            "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b"
            "f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8"
            "07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
            "5af90bbf74a35be6b40b8eedf2785e42874d"
        )

    @pytest.mark.parametrize(
        ("counter", "expected"),
        [
            (
                0,
                "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
                "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
            ),
            (
                1,
                "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
                "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
            ),
        ],
    )
    def test_zero_key_a_1(self, counter, expected):
        assert block_bytes(bytes(32), counter, bytes(12)).hex() == expected

    def test_blocks_of_every_shape_and_both_round_loops(self):
        k, nonce = np.arange(8, dtype=np.uint32) * 0x9E3779B9, np.array([7, 8, 9], np.uint32)
        counters = np.array([[0, 1], [2**31, 2**32 - 1]], np.uint32)
        few = chacha20_block(jnp.array(k), counters, nonce)
        assert few.shape == (2, 2, 16)
        for index in np.ndindex(2, 2):
            expected = reference_block(k.tolist(), int(counters[index]), nonce.tolist())
            assert np.asarray(few[index]).tolist() == expected
        many = chacha20_block(jnp.array(k), np.arange(CHUNK, dtype=np.uint32), nonce)
        some = chacha20_block(jnp.array(k), np.arange(CHUNK - 1, dtype=np.uint32), nonce)
        np.testing.assert_array_equal(many[:-1], some)
        assert np.asarray(many[-1]).tolist() == reference_block(
            k.tolist(), CHUNK - 1, nonce.tolist()
        )


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("size", [0, 1, 3, 17, 1000])
def test_bits_are_the_key_stream(width, size):
    bits = jax.random.bits(key(3), (size,), f"uint{width}")
    np.testing.assert_array_equal(bits, reference_bits(key(3), width, size))


@pytest.mark.parametrize("excess", [-1, 0, 1, 8 * CHUNK + 5])
def test_chunks_join(excess):
    bits = jax.random.bits(key(4), (8 * CHUNK + excess,), "uint64")
    np.testing.assert_array_equal(bits, reference_bits(key(4), 64, bits.size))
    assert np.unique(bits).size == bits.size  # no key-stream word twice: 2^-32 to fail by chance


@pytest.mark.parametrize("width", [8, 32])
def test_chunks_join_in_narrow_words(width):
    size = 16 * CHUNK * 32 // width + 21
    bits = jax.random.bits(key(4), (size,), f"uint{width}")
    np.testing.assert_array_equal(bits, reference_bits(key(4), width, size))


def test_split_and_fold_in_follow_the_scheme():
    k = key(5)
    words = [int(w) for w in jax.random.key_data(k)]
    children = jax.random.key_data(jax.random.split(k, (2, 3))).reshape(6, 8)
    for i, child in enumerate(children):
        assert child.tolist() == reference_block(words, i, (2, 0, 0))[:8]
    for data in (0, 1, 2**32 - 1):
        folded = jax.random.key_data(jax.random.fold_in(k, np.uint32(data)))
        assert folded.tolist() == reference_block(words, data, (3, 0, 0))[:8]


def test_streams_of_a_key_never_share_words():
    k = key(6)
    words = [jax.random.bits(k, (4096,), "uint32"), jax.random.bits(k, (2048,), "uint64")]
    words += [jax.random.bits(k, (8192,), "uint16"), jax.random.bits(k, (16384,), "uint8")]
    words += [jax.random.key_data(jax.random.split(k, 512))]
    words += [jax.random.key_data(jax.vmap(lambda i: jax.random.fold_in(k, i))(jnp.arange(512)))]
    words += [jax.random.key_data(k)]
    as_bytes = b"".join(np.asarray(w).astype(w.dtype.newbyteorder("<")).tobytes() for w in words)
    pairs = np.frombuffer(as_bytes, "<u8")  # 64 bits at a time: chance of a repeat is 2^-36
    assert np.unique(pairs).size == pairs.size


def test_a_draw_too_long_for_the_counter_is_refused():
    longest = 2**32 * 8
    with pytest.raises(ValueError, match=r"2\^32 blocks"):
        jax.jit(lambda k: jax.random.bits(k, (longest + 1,), "uint64")).lower(key(0))
    with pytest.raises(ValueError, match=r"2\^32 blocks"):
        jax.jit(lambda k: jax.random.split(k, 2**32 + 1)).lower(key(0))


@pytest.mark.parametrize("size", [5, 8 * CHUNK + 3])
def test_vmap_jit_and_scan_agree_with_eager(size):
    keys = jax.random.split(key(7), 3)

    def draw(k):
        return jax.random.bits(k, (size,), "uint64")

    one_by_one = np.stack([draw(k) for k in keys])
    np.testing.assert_array_equal(jax.vmap(draw)(keys), one_by_one)
    np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(keys), one_by_one)
    np.testing.assert_array_equal(jax.jit(draw)(keys[1]), one_by_one[1])
    np.testing.assert_array_equal(jax.lax.map(draw, keys), one_by_one)
    nested = jax.vmap(jax.vmap(draw))(keys[None])
    np.testing.assert_array_equal(nested[0], one_by_one)


def test_vmap_of_split_and_fold_in():
    keys = jax.random.split(key(8), 3)
    data = jnp.arange(3, dtype=jnp.uint32)

    def both(k, n):
        return jax.random.key_data(jax.random.split(jax.random.fold_in(k, n), 2))

    one_by_one = np.stack([both(k, n) for k, n in zip(keys, data, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(both))(keys, data), one_by_one)


def test_inside_shard_map():
    mesh = jax.make_mesh((1,), ("party",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("party")

    def draw(k):
        return jax.vmap(lambda k: jax.random.bits(k, (8 * CHUNK + 1,), "uint64"))(
            jax.random.split(k[0], 1)
        )

    keys = jax.random.split(key(9), 1)
    sharded = jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=spec, out_specs=spec))(keys)
    np.testing.assert_array_equal(sharded, draw(keys))


def test_bytes_are_uniform():
    """Chi-square, 255 degrees of freedom: false alarm 2e-6 over seeds (this one is fixed)."""
    counts = np.bincount(np.asarray(jax.random.bits(key(10), (2**20,), "uint8")), minlength=256)
    expected = 2**20 / 256
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Wilson-Hilferty: (statistic / 255)^(1/3) is about normal.
    spread = 2 / (9 * 255)
    deviation = ((statistic / 255) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    assert abs(deviation) < 4.75


def test_jax_distributions():
    uniform = np.asarray(jax.random.uniform(key(11), (100_000,)))
    assert 0 <= uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 / math.sqrt(12 * 100_000)  # 5 sigma: 6e-7
    normal = np.asarray(jax.random.normal(key(12), (100_000,)))
    assert abs(normal.mean()) < 5 / math.sqrt(100_000)
    assert abs(normal.var() - 1) < 5 * math.sqrt(2 / 100_000)
    order = jax.random.permutation(key(13), 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() != list(range(1000))


class TestKey:
    def test_from_the_operating_system(self):
        keys = [jax.random.key_data(key()) for _ in range(4)]
        assert len({k.tobytes() for k in map(np.asarray, keys)}) == 4
        assert all(k.shape == (8,) and k.dtype == jnp.uint32 for k in keys)

    @pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, 2**64, 2**255 + 3, 2**256 - 1])
    def test_from_a_seed(self, seed):
        words = struct.unpack("<8I", seed.to_bytes(32, "little"))
        assert jax.random.key_data(key(seed)).tolist() == reference_block(words, 0, (4, 0, 0))[:8]

    @pytest.mark.parametrize("seed", [0, 7, 2**31, 2**63 - 1])
    def test_agrees_with_jax_random_key(self, seed):
        assert (jax.random.key(seed, impl=CHACHA20) == key(seed)).all()

    def test_agrees_without_64_bit_types(self):
        expected = jax.random.key_data(key(7))
        with jax.enable_x64(False):
            np.testing.assert_array_equal(jax.random.key_data(key(7)), expected)
            seeded = jax.random.key(7, impl=CHACHA20)
            np.testing.assert_array_equal(jax.random.key_data(seeded), expected)

    @pytest.mark.parametrize("seed", [-1, 2**256])
    def test_seed_out_of_range(self, seed):
        with pytest.raises(ValueError, match="seed"):
            key(seed)

    @pytest.mark.parametrize("seed", [1.0, "1", True, [1]])
    def test_seed_of_another_type(self, seed):
        with pytest.raises(TypeError, match="seed"):
            key(seed)


class TestRequireCryptographic:
    def test_accepts_chacha20(self):
        require_cryptographic(key(0))
        require_cryptographic(jax.random.split(key(0), 3))
        jax.jit(jax.vmap(require_cryptographic))(jax.random.split(key(0), 3))

    @pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
    def test_refuses_other_generators(self, impl):
        with pytest.raises(TypeError, match="not to ChaCha20"):
            require_cryptographic(jax.random.key(0, impl=impl))

    def test_refuses_raw_words(self):
        with pytest.raises(TypeError, match="typed key"):
            require_cryptographic(jax.random.key_data(key(0)))
        with pytest.raises(TypeError, match="typed key"):
            require_cryptographic(0)
