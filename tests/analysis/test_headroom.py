"""Headroom: what is recorded, and where a configuration that overflows is said to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gans import adam, random_batch, small_gan, small_lpgan
from secured import FAST

import lpgan_jax as lp
from lpgan_jax.analysis.headroom import headroom, worst
from lpgan_jax.gan import NETWORKS
from lpgan_jax.mpc import arithmetic, compare, roots
from lpgan_jax.mpc.activation import LOG_RANGE
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.plain import bits_left
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.share_trees import scaled


def state_and_batches(gan, steps=2):
    rng = np.random.default_rng(0)
    return gan.program.init(rng), [random_batch(gan, rng) for _ in range(steps)]


def compared(function, *args, frac_bits):
    """Bits left at each comparison of a plain JAX function that takes a part of the range."""
    program = lp.secure(function, frac_bits=frac_bits).program(*args)
    secrets = [scaled(leaf, frac_bits) for leaf in jax.tree.leaves(args)]
    party = ExactSeat()
    program.run(party, secrets, [])
    seen = [seen for seen in party.seen if seen.kind == "compare" and not seen.by_design]
    return [float(bits_left(party, one)) for one in seen]


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
        lambda p, x: arithmetic.truncate(p, x.sum((0,)).divided_by_power_of_two(3), 18),
        np.full(8, 2.0**60),
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


@pytest.mark.parametrize("frac_bits", [12, 18, 27])
@pytest.mark.parametrize("scales", [1, 2])
def test_activations_are_right_below_their_bound_and_counted_beyond(frac_bits, scales):
    """At f fraction bits, and at twice as many: of a product that was not truncated."""

    def activations(x, one):
        x = x * one if scales == 2 else x
        return jax.nn.relu(x), jnp.where(x > 0, x, 0.25 * x)

    lsb = 2.0**-frac_bits
    edge = 2.0**LOG_RANGE - lsb
    x = np.array([edge, -edge, edge - 1, 1 - edge, lsb, 0, -lsb])
    step = lp.secure(activations, frac_bits=frac_bits)
    got = lp.reveal(FAST(step)(lp.key(1), *step.share(lp.key(0), x, 1.0)))
    for y, slope in zip(got, (0, 0.25), strict=True):
        assert np.abs(y - np.where(x > 0, x, slope * x)).max() <= scales * lsb
    # In float64 a value of 62 bits less one LSB is that of 62 bits.
    assert 0 <= min(compared(activations, x, 1.0, frac_bits=frac_bits)) < 1e-2
    for beyond in (1.001, -1.001):
        at = np.full(7, beyond * 2.0**LOG_RANGE)
        left = compared(activations, at, 1.0, frac_bits=frac_bits)
        assert min(left) == pytest.approx(-np.log2(1.001))


@pytest.mark.parametrize("frac_bits", [12, 18])
def test_both_networks_count_what_their_activations_take(frac_bits):
    """The first layer of SD, whose convolution is not normalised, included."""
    networks, gan = small_lpgan(), small_gan(frac_bits=frac_bits)
    state, (batch,) = state_and_batches(gan, steps=1)
    generator, discriminator = (state.learnt()[name] for name in NETWORKS)
    largest = {"generator": [255.5, 256.5], "discriminator": [257.0, 255.0]}
    for norm, value in zip(
        [generator["params"]["bn0"], generator["params"]["bn1"], discriminator["params"]["bn1"]],
        [255.5, 256.5, 255.0],
        strict=True,
    ):
        norm["scale"], norm["bias"] = 0 * norm["scale"], 0 * norm["bias"] + value
    kernel = np.zeros_like(discriminator["params"]["conv0"]["kernel"])
    kernel[1, 1] = 257.0  # a white pixel's image
    discriminator["params"]["conv0"]["kernel"] = kernel
    inputs = {"generator": batch.noise_d, "discriminator": np.ones_like(batch.images)}
    for name, values in largest.items():

        def forward(variables, x, name=name):
            return getattr(networks, name).apply(variables, x, mutable=["batch_stats"])[0]

        left = compared(forward, state.learnt()[name], inputs[name], frac_bits=frac_bits)
        assert left == pytest.approx([LOG_RANGE - np.log2(v) for v in values], abs=1e-6)


def test_truncation_to_more_fraction_bits_is_an_error_as_on_shares():
    with pytest.raises(ValueError, match="cannot truncate 18 fraction bits to 36"):
        arithmetic.truncate(ExactSeat(), Secret(jnp.zeros(1), 18), 36)


def test_a_good_configuration_has_room_everywhere():
    gan = small_gan(adam(1e-3), depth=1)
    state, batches = state_and_batches(gan)
    bits = headroom(gan, state, batches)
    assert worst(bits)[1] > 2
    assert max(bits.values()) < 62
    for layer in ("Generator", "Generator.bn0", "Discriminator.conv0.backward", "generator.update"):
        assert layer in bits
    # More steps can only leave less; a step by itself leaves at least as much.
    assert all(bits[place] <= left for place, left in headroom(gan, state, batches[:1]).items())


def test_an_overflow_is_reported_at_its_place():
    # The deviations that SG's first normalisation takes are above 2^7; at 2 * 28 fraction bits
    # there is room for 2^6.
    gan = small_gan(batch_size=4, frac_bits=28, base_size=4, depth=1, init_std=20.0)
    state, (batch,) = state_and_batches(gan, steps=1)
    assert np.abs(batch.noise_d @ state.params["generator"]["fc"]["kernel"]).max() > 2**7
    bits = headroom(gan, state, [batch])
    assert worst(bits) == ("Generator.bn0", bits["Generator.bn0"])
    assert bits["Generator.bn0"] < 0
    assert bits["Discriminator.fc.backward"] > 2  # which has no such values


def test_no_batches_say_nothing():
    gan = small_gan(depth=1)
    state, _ = state_and_batches(gan, steps=0)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        headroom(gan, state, [])
