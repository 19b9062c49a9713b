"""Ranges: what a training run loses, tensor by tensor, and where it leaves the ring's range."""

import jax.numpy as jnp
import numpy as np
import pytest
from gans import random_batch, small_gan

from lpgan_jax import key
from lpgan_jax.analysis.ranges import Range, observe, ranges, summary, table, verdict
from lpgan_jax.cli import main
from lpgan_jax.mpc import arithmetic, compare
from lpgan_jax.mpc.plain import Seen
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.share_trees import encoded


def looked_at(function, values, frac_bits, rounding="stochastic"):
    words = encoded(np.asarray(values, np.float64), frac_bits)
    _, _, seen, statistics = observe(
        lambda party, v, _: function(party, v), key(0), words, None, rounding
    )
    return summary(seen, np.asarray(statistics)[None])


def test_a_truncation_loses_what_its_rounding_drops():
    """Stochastic rounding of a fraction p: mean square p (1 - p)."""
    values = np.full(4000, 3.25) * 2.0**-18
    with_place = []

    def function(party, x):
        with party.at("layer"):
            with_place.append(arithmetic.truncate(party, x, 18))

    (row,) = looked_at(function, values, 36)
    assert (row.place, row.operation, row.frac_bits) == ("layer 1", "truncate", 18)
    assert row.low == row.high == 3.25 * 2.0**-18
    assert row.bits_left == pytest.approx(62 - np.log2(3.25 * 2**18))
    assert row.lost_rms == pytest.approx(np.sqrt(0.25 * 0.75), rel=0.1)
    assert row.lost_max == 0.75
    (nearest,) = looked_at(function, values, 36, "nearest")
    assert (nearest.lost_rms, nearest.lost_max) == (0.25, 0.25)


def test_a_comparison_loses_nothing_and_its_width_is_its_range():
    (row,) = looked_at(lambda p, x: compare.negative(p, x, 40), [3.0, -4.0], 36)
    assert (row.operation, row.low, row.high) == ("compare", -4.0, 3.0)
    assert row.bits_left == pytest.approx(39 - 38)
    assert np.isnan(row.lost_rms)
    (row,) = looked_at(compare.negative, [3.0, -4.0], 36)
    assert row.bits_left == np.inf


def test_a_value_out_of_range_is_found_and_named():
    def function(party, x):
        with party.at("first"):
            y = arithmetic.truncate(party, x, 18)
        with party.at("second"):
            arithmetic.truncate(party, arithmetic.mul(party, y, y), 18)

    rows = looked_at(function, [2.0**20, 1.0], 36)
    assert [row.place for row in rows] == ["first 1", "second 1"]
    assert rows[0].bits_left == pytest.approx(6)
    # 2^40 at 36 bits wraps to 2^12 * 2^64 = 0: only the float64 program knows.
    assert rows[1].bits_left == pytest.approx(-14)
    assert rows[1].lost_max == pytest.approx(2.0**58)
    assert verdict(rows).startswith("out of range: second 1, first in step 1, by up to 14.0 bits")
    assert "in range; the fewest bits left, 6.0: first 1" in verdict(rows[:1])


def test_the_verdict_is_on_the_first_step_not_the_first_place():
    """What leaves the range last in one step spoils what comes first in the next."""
    early = Range("early 1", "truncate", 18, 0.0, 1.0, -9.0, 4, 1.0, 2.0)
    late = Range("late 1", "truncate", 18, 0.0, 1.0, -2.0, 3, 1.0, 2.0)
    assert verdict([early, late]).startswith("out of range: late 1, first in step 4")
    seen = [
        Seen(place, Secret(jnp.zeros(1), 36), Secret(jnp.zeros(1), 18), 62, False)
        for place in ("a", "b")
    ]
    statistics = np.zeros((3, 2, 5))
    statistics[:, :, 2] = [[5, 5], [5, -1], [-3, -2]]
    assert [(r.bits_left, r.wrapped_at) for r in summary(seen, statistics)] == [(-3, 2), (-2, 1)]


@pytest.fixture(scope="module")
def rows():
    gan, rng = small_gan(depth=1), np.random.default_rng(0)
    batches = [random_batch(gan, rng) for _ in range(2)]
    state = gan.program.init(rng)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        ranges(gan, state, [], key(0))
    return ranges(gan, state, batches, key(0))


def test_a_training_step_is_looked_at_everywhere(rows):
    places = [row.place for row in rows]
    assert len(set(places)) == len(places)
    for part in ("Generator.bn0", "Discriminator.conv0.backward", "generator.update"):
        assert any(part in place for place in places), part
    assert min(row.bits_left for row in rows) > 2
    assert all(row.low <= row.high for row in rows)
    truncations = [row for row in rows if row.operation == "truncate"]
    # The first truncation has an exact input: it loses less than an LSB. Later ones inherit.
    assert 0 < truncations[0].lost_rms < truncations[0].lost_max < 1
    assert all(np.isfinite(row.lost_rms) for row in truncations)


def test_the_table_shows_every_row_and_marks_what_is_out_of_range(rows):
    bad = Range("x 1", "truncate", 18, -1.0, 2.0, -0.5, 3, 1.0, 2.0)
    shown = table([*rows, bad])
    assert shown.row_count == len(rows) + 1
    assert [str(row.style) for row in shown.rows[-2:]] == ["None", "bold red"]


def ranges_of(config, *changes):
    arguments = [argument for change in changes for argument in ("--set", change)]
    return main(["ranges", "--config", config, "--steps", "1", *arguments])


def test_the_command_prints_a_verdict(capsys):
    assert ranges_of("digits", "model.features=2", "batch_size=4", "frac_bits=28") == 0
    out = capsys.readouterr().out
    assert "Generator.bn0 1" in out
    assert "1 steps, 28 fraction bits: " in out
    assert main(["ranges", "--config", "digits", "--steps", "0"]) == 1


def test_the_command_takes_classes_and_privacy(capsys):
    changes = "model.features=2", "batch_size=24", "frac_bits=16", "privacy.discriminator_steps=1"
    assert ranges_of("digits-private", *changes) == 0
    out = capsys.readouterr().out
    assert "Generator.bn0 1" in out
    assert "1 steps, 16 fraction bits: everything is in range" in out
    assert "covered by no epsilon" in out
