"""Headroom: what is recorded, and where a configuration that overflows is said to."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pair_of, run, whole
from lpgan_jax.models.dcgan import DCGAN
from lpgan_jax.optim import adam, sgd

from lpgan_jax.analysis.headroom import headroom, table, worst
from lpgan_jax.gan import LPGAN, NETWORKS, Batch
from lpgan_jax.mpc import arithmetic, compare, roots
from lpgan_jax.mpc.activation import LOG_RANGE, SLR, SR
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.plain import bits_left
from lpgan_jax.mpc.secret import Secret


def gan_and_batches(model, optimizer, steps=2, size=4):
    rng = np.random.default_rng(0)
    gan = LPGAN(model, dict.fromkeys(NETWORKS, optimizer))
    batches = [
        Batch(
            rng.uniform(-1, 1, (size, *model.image_shape)),
            *rng.normal(size=(2, size, model.noise_size)),
        )
        for _ in range(steps)
    ]
    return gan, gan.init(rng), batches


def left_of(function, values, frac_bits=36):
    """Headroom, place by place, of one protocol."""
    party = ExactSeat()
    with party.at("here"):
        function(party, Secret(jnp.asarray(values, jnp.float64), frac_bits))
    assert {seen.place for seen in party.seen} == {"here"}
    return [float(bits_left(party, seen)) for seen in party.seen]


def test_a_truncation_records_its_largest_magnitude():
    def truncate(party, x):
        assert arithmetic.truncate(party, x, 18).share[1] == -(2.0**22)

    assert left_of(truncate, [2.0**30, -(2.0**40), 5.0]) == [22.0]


def test_a_sum_counts_before_it_is_truncated():
    # Each value fits, their mean fits; their sum does not.
    assert left_of(
        lambda p, x: arithmetic.mean_of_sum(p, x.sum((0,)), 8, 18), np.full(8, 2.0**60)
    ) == [pytest.approx(-1.0)]


def test_what_is_no_number_has_no_room():
    assert left_of(lambda p, x: arithmetic.truncate(p, x, 18), [1.0, np.nan]) == [-np.inf]


def test_comparisons_count_only_out_of_range():
    assert left_of(compare.negative, [-(2.0**61)]) == [np.inf]
    assert left_of(compare.negative, [-(2.0**63)]) == [pytest.approx(-1.0)]


def test_a_range_reduction_counts_only_out_of_range():
    def root(party, u):
        roots.inverse_sqrt(party, u, 18)

    assert min(left_of(root, [1.0, 2.0**35, 2.0**61])) > 2
    assert min(left_of(root, [2.0**64])) < 0


@pytest.mark.parametrize("layer", [SR, SLR])
@pytest.mark.parametrize("frac_bits", [12, 18, 27, 28])
@pytest.mark.parametrize("times", [1, 2])
def test_activations_are_right_below_their_bound_and_counted_beyond(layer, frac_bits, times):
    """At f fraction bits and at twice as many; 62 bits end before 2^8 at twice 28 only."""
    scale = times * frac_bits
    activation = layer(frac_bits) if layer is SR else SLR(frac_bits, alpha=0.25)
    log_bound = min(LOG_RANGE, 62 - scale)
    edge = 2**log_bound * 2**scale - 1
    x = np.array([edge, -edge, edge - 2**frac_bits, 1 - edge, 1, 0, -1], np.int64)

    def forward(party, x):
        return activation.forward(party, {}, x)[0]

    y = run(forward, Secret(pair_of(x), scale))
    assert y.frac_bits == frac_bits
    slope = 0.25 if layer is SLR else 0.0
    exact = np.where(x > 0, x, slope * x) * 2.0 ** (frac_bits - scale)
    assert np.abs(whole(y.share) - exact).max() <= 1
    # In float64 a value of 62 bits less one LSB is that of 62 bits.
    assert 0 <= min(left_of(forward, x, scale)) < 1e-2
    for beyond in (1.001, -1.001):
        left = left_of(forward, [beyond * 2.0 ** (log_bound + scale)], scale)
        assert min(left) == pytest.approx(-np.log2(1.001))


@pytest.mark.parametrize("frac_bits", [12, 18])
def test_both_networks_count_what_their_activations_take(frac_bits):
    """The first layer of SD, whose convolution is not normalised, included."""
    model = DCGAN(noise_size=4, features=2, base_size=2, depth=2, frac_bits=frac_bits)
    gan, state, batches = gan_and_batches(model, sgd(1e-3, 4, frac_bits), steps=1)
    largest = {
        "generator.relu0": 255.5,
        "generator.relu1": 256.5,
        "discriminator.leaky0": 257.0,
        "discriminator.leaky1": 255.0,
    }
    generator, discriminator = (state.params[name] for name in NETWORKS)
    for norm, layer in (
        (generator["bn0"], "generator.relu0"),
        (generator["bn1"], "generator.relu1"),
        (discriminator["bn1"], "discriminator.leaky1"),
    ):
        norm["scale"][:], norm["bias"][:] = 0, largest[layer]
    kernel = discriminator["conv0"]["kernel"]
    kernel[:] = 0
    kernel[1, 1] = largest["discriminator.leaky0"]  # a white pixel's image
    white = replace(batches[0], images=np.ones_like(batches[0].images))
    bits = headroom(gan, state, [white])
    for layer, value in largest.items():
        assert bits[f"{layer}.forward"] == pytest.approx(LOG_RANGE - np.log2(value), abs=1e-6)


def test_truncation_to_more_fraction_bits_is_an_error_as_on_shares():
    with pytest.raises(ValueError, match="cannot truncate 18 fraction bits to 36"):
        arithmetic.truncate(ExactSeat(), Secret(jnp.zeros(1), 18), 36)


def test_a_good_configuration_has_room_everywhere():
    model = DCGAN(noise_size=8, features=2, base_size=4, depth=2, init_std=0.1)
    gan, state, batches = gan_and_batches(model, adam(1e-3, 4, 18))
    bits = headroom(gan, state, batches)
    assert worst(bits)[1] > 2
    assert max(bits.values()) < 62
    layers = ("bn0", "deconv0", "bn1", "deconv1", "tanh", "leaky0", "conv1", "leaky1")
    assert all(any(f".{layer}." in place for place in bits) for layer in layers)
    # More steps can only leave less; a step by itself leaves at least as much.
    assert all(bits[place] <= left for place, left in headroom(gan, state, batches[:1]).items())


def test_an_overflow_is_reported_at_its_place():
    # 64 values a channel, above 1: at 2 * 28 fraction bits their squares must sum to less than 64.
    model = DCGAN(noise_size=8, features=2, base_size=4, depth=1, init_std=0.5, frac_bits=28)
    gan, state, batches = gan_and_batches(model, sgd(1e-3, 4, 28), steps=1)
    bits, cause = headroom(gan, state, batches), "generator.bn0.forward/inverse_sqrt"
    assert worst(bits) == (cause, bits[cause])
    assert bits[cause] < 0
    assert bits["generator.bn0.stats"] < 0  # the variance on its way to the running statistics
    assert all(left > 2 for place, left in bits.items() if place.startswith("discriminator"))
    lines = table(bits).splitlines()
    assert lines[0].split() == ["bits", "place"]
    rows = sorted(bits.items(), key=lambda row: row[1])
    assert [line.split() for line in lines[1:]] == [[f"{left:.1f}", place] for place, left in rows]


def test_no_batches_say_nothing():
    model = DCGAN(noise_size=8, features=2, depth=1)
    gan, state, _ = gan_and_batches(model, sgd(1e-3, 4, 18))
    with pytest.raises(ValueError, match="batches: expected at least one"):
        headroom(gan, state, [])
