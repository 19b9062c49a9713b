import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpgan_jax.training.config import (
    ConfigError,
    OptimizerConfig,
    TrainConfig,
    dump,
    from_json,
    load,
    shipped,
    to_json,
)

REPOSITORY = Path(__file__).parent.parent.parent


def refused(*overrides, name="digits"):
    with pytest.raises(ConfigError) as caught:
        load(name, overrides)
    return str(caught.value)


def test_shipped_configs_load():
    depths = {
        "celeba": 4,
        "cifar10": 3,
        "digits": 2,
        "digits-private": 2,
        "digits-wgan": 2,
        "mnist": 3,
        "mnist-private": 3,
        "mnist-small": 3,
        "pneumonia": 3,
    }
    assert shipped() == sorted(depths)
    assert {name: load(name).depth for name in shipped()} == depths
    digits = load("digits")
    assert digits.frac_bits == 18
    assert digits.generator_optimizer == OptimizerConfig(name="adam", learning_rate=1e-3)


def test_every_directory_of_code_is_a_package():
    """What is none, setuptools leaves out of the wheel."""
    used = {file.parent for file in (REPOSITORY / "lpgan_jax").rglob("*.py")}
    assert [str(one) for one in used if not (one / "__init__.py").exists()] == []


def test_these_modules_do_not_import_jax():
    program = """if True:
        import sys, types
        package = sys.modules["lpgan_jax"] = types.ModuleType("lpgan_jax")  # without its __init__
        package.__path__ = ["lpgan_jax"]
        from lpgan_jax.training import checkpoint, config, data, images, run_directory
        from lpgan_jax.common import files
        sys.exit("jax" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_a_path_is_read_like_a_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((REPOSITORY / "configs" / "mnist.yaml").read_text())
    assert load(str(path)) == load("mnist")


def test_overrides_change_fields_and_the_last_one_wins():
    config = load(
        "digits", ["steps=7", "model.features=8", "seed=1", "seed=2", "open_losses=false"]
    )
    assert (config.steps, config.model.features, config.seed) == (7, 8, 2)
    assert config.open_losses is False
    assert config.model.noise_size == load("digits").model.noise_size


@pytest.mark.parametrize(
    ("text", "value"), [("2e-4", 2e-4), ("2E-4", 2e-4), ("1e3", 1e3), (".5e+1", 5.0), ("1", 1.0)]
)
def test_numbers_as_people_write_them(text, value):
    rate = load("digits", [f"generator_optimizer.learning_rate={text}"]).generator_optimizer
    assert rate.learning_rate == value
    assert isinstance(rate.learning_rate, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frac_bits=40", "digits.yaml: frac_bits: 40 given, expected at most 28"),
        ("frac_bits=0", "digits.yaml: frac_bits: 0 given, expected at least 1"),
        ("batch_size='3'", "digits.yaml: batch_size: '3' given, expected an integer"),
        ("batch_size=3.0", "digits.yaml: batch_size: 3.0 given, expected an integer"),
        ("steps=true", "digits.yaml: steps: True given, expected an integer"),
        ("steps=0", "digits.yaml: steps: 0 given, expected at least 1"),
        ("model.noise_size=-1", "digits.yaml: model.noise_size: -1 given, expected at least 1"),
        ("model.init_std=0", "digits.yaml: model.init_std: 0 given, expected more than 0"),
        ("model.init_std=.nan", "model.init_std: nan given, expected a finite number"),
        ("model.leaky_slope=1", "model.leaky_slope: 1 given, expected less than 1"),
        ("model.leaky_slope=x", "model.leaky_slope: 'x' given, expected a number"),
        ("results=[]", "results: [] given, expected a list that is not empty"),
        ("results=[teacher]", "'teacher' given, expected 'generator' or 'discriminator'"),
        ("results=[generator, generator]", "given, expected each network once"),
        ("open_losses=1", "open_losses: 1 given, expected true or false"),
        ("generator_optimizer.name=rms", "'rms' given, expected 'sgd' or 'adam'"),
        ("generator_optimizer=3", "generator_optimizer: 3 given, expected fields with values"),
        ("model.depth=3", "digits.yaml: model.depth: unknown field, expected one of noise_size, "),
        ("colour=3", "digits.yaml: colour: unknown field, expected one of data, model, "),
        ("data.channels=2", "data.channels: 2 given, expected 1 (grey) or 3 (colour)"),
        ("data.split=''", "data.split: '' given, expected a text that is not empty"),
        ("data.split=7", "data.split: 7 given, expected a text"),
        ("data.path=x", "data.path: 'x' given, expected no path"),
        ("data.dataset=idx", "data.path: None given, expected the path of the idx data"),
        (
            "data.dataset=mnist",
            "data.dataset: 'mnist' given, expected 'digits', 'idx', 'npz', 'cifar10', "
            "'folder' or 'private'",
        ),
        ("data.image_size=20", "data.image_size: 20 given, expected 4 * 2**k"),
        ("data.image_size=4", "data.image_size: 4 given, expected 4 * 2**k"),
        ("data.image_size=2", "data.image_size: 2 given, expected 4 * 2**k"),
        ("model.base_size=3", "data.image_size: 16 given, expected 3 * 2**k"),
        ("steps.x.y=1", "digits.yaml: steps.x.y: no such field, steps has no fields"),
        ("seed.x=1", "digits.yaml: seed: {'x': 1} given, expected an integer"),
        ("data.dataset.x=1", "data.dataset.x: no such field, dataset has no fields"),
        ("steps", "override 'steps': expected field=value"),
        ("=3", "override '=3': expected field=value"),
        ("a..b=3", "override 'a..b=3': expected field=value"),
        ("steps=[", "override 'steps=[': expected valid YAML"),
        ("steps=2024-13-45", "override 'steps=2024-13-45': expected valid YAML"),
    ],
)
def test_bad_fields_are_named(override, message):
    assert message in refused(override)


def test_all_errors_are_told_at_once():
    assert len(refused("steps=0", "frac_bits=40", "model.foo=1").splitlines()) == 3


@given(st.integers().filter(lambda bits: not 1 <= bits <= 28))
def test_frac_bits_out_of_range(bits):
    assert "frac_bits" in refused(f"frac_bits={bits}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad.yaml: expected a mapping of fields"),
        ("- 1", "bad.yaml: expected a mapping of fields"),
        ("a: [", "bad.yaml: expected valid YAML"),
        ("steps: 1\nsteps: 2", "bad.yaml: expected valid YAML: steps is given twice"),
        ("steps: 1", "bad.yaml: data: missing, expected a value"),
        ("\x00", "bad.yaml: expected valid YAML"),
        ("[" * 2000, "bad.yaml: expected valid YAML"),
        ("a: 1\nb: &x 2", "expected no anchor or alias, found x in"),
        ("a: 1\nb: *x", "line 2, column 4"),
        ("a: &x [*x]", "expected no anchor or alias, found x in"),
        ("&x a: 1", "expected no anchor or alias, found x in"),
        ("a: {x: 1}\nb: {<<: {y: 1}}", "expected no merge key in"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: " + "x" * 2**16, "bad.yaml: more than 65536 bytes"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert message in refused(name=str(path))


def test_half_a_kilobyte_of_aliases_takes_no_time(tmp_path):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join(9 * [f'*a{n - 1}'])}]}}" for n in range(1, 9)]
    (tmp_path / "bad.yaml").write_text("\n".join(lines))
    start = time.monotonic()
    assert "bad.yaml: expected valid YAML: expected no anchor or alias" in refused(
        name=str(tmp_path / "bad.yaml")
    )
    assert time.monotonic() - start < 1


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match=r"mnits: .* cifar10, digits, digits-private, "):
        load("mnits")


def test_configs_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        load("digits").steps = 3


positive = st.integers(1, 10**20)
fraction = st.floats(0, 1, exclude_max=True)
above_zero = st.floats(0, exclude_min=True, allow_infinity=False)
optimizers = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["sgd", "adam"]),
        "learning_rate": above_zero,
        "b1": fraction,
        "b2": fraction,
        "eps_root": above_zero,
    }
)


@st.composite
def configs(draw):
    base, depth = draw(st.integers(1, 50)), draw(st.integers(1, 8))
    # Texts that a YAML reader may take for something else.
    texts = st.text(min_size=1) | st.sampled_from(["1e5", "2e-4", "no", "null", "010", "1:30", "~"])
    fields = {
        "data": {
            "dataset": draw(st.sampled_from(["idx", "npz"])),
            "path": draw(texts),
            "split": draw(texts),
            "image_size": base * 2**depth,
            "channels": draw(st.sampled_from([1, 3])),
        },
        "model": {
            "noise_size": draw(positive),
            "features": draw(positive),
            "base_size": base,
            "leaky_slope": draw(fraction),
            "init_std": draw(above_zero),
            "norm_eps": draw(above_zero),
        },
        "generator_optimizer": draw(optimizers),
        "discriminator_optimizer": draw(optimizers),
        "frac_bits": draw(st.integers(1, 28)),
        "seed": draw(st.integers(0, 10**30)),
        "open_samples": draw(st.booleans()),
    }
    names = "batch_size steps log_every sample_every num_samples checkpoint_every keep_checkpoints"
    fields |= {name: draw(positive) for name in names.split()}
    return TrainConfig.model_validate(fields), depth


@settings(max_examples=40)
@given(configs())
def test_dump_loads_back_equal(tmp_path_factory, case):
    config, depth = case
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(str(path)) == config
    assert config.depth == depth
    assert from_json(to_json(config), "wire") == config


DIGITS = to_json(load("digits"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wire: expected a configuration in JSON"),
        ("[]", "wire: expected a configuration in JSON: no fields"),
        (DIGITS[:-1], "wire: expected a configuration in JSON"),
        (DIGITS[:-1] + ', "steps": 3}', "wire: expected .* JSON: a field is given twice"),
        (DIGITS.replace("1e-05", "NaN"), "wire: expected .* JSON: NaN is no number"),
        (DIGITS.replace("1e-05", "-Infinity"), "wire: expected .* JSON: -Infinity is no number"),
        (DIGITS.replace("1e-05", "1e999"), "model.norm_eps: inf given, expected a finite number"),
        (DIGITS.replace("1e-05", "9" * 5000), "wire: expected a configuration in JSON"),
        (DIGITS.replace("1e-05", '"1"'), "model.norm_eps: '1' given, expected a number"),
        (DIGITS.replace('"steps"', '"\\ud800"'), "is not the name of a field"),
        (DIGITS.replace('"steps"', '"__class__"'), "__class__: unknown field"),
        ("[" * 2**14, "wire: expected a configuration in JSON"),
        ('{"a":' * 6000, "wire: expected a configuration in JSON"),
        (DIGITS + " " * 2**15, "characters, expected at most 32768"),
        (dump(load("digits")), "wire: expected a configuration in JSON"),
    ],
)
def test_bad_json_is_told(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        from_json(text, "wire")
    assert len(str(caught.value).encode()) < 2000
