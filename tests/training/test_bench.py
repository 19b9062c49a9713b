"""Measurements are of what they say, whatever the machine; the page has the file's figures."""

import contextlib
import io
import json
import sys
from pathlib import Path

import jax
import pytest
from helpers import script
from rich.console import Console

from lpgan_jax import cli
from lpgan_jax.programs import shapes
from lpgan_jax.training import bench
from lpgan_jax.training.building import build

DOCS = Path(__file__).parent.parent.parent / "docs"
compare_peers, performance = script("compare_peers"), script("performance")

TINY = (
    "data.image_size=8",
    "model.features=4",
    "model.noise_size=4",
    "generator_optimizer.name=sgd",
    "discriminator_optimizer.name=sgd",
    "open_losses=false",
)
POSITIVE = (
    *("trace_s", "compile_s", "warm_start_s", "step_s", "plaintext_step_s", "slowdown"),
    *("images_per_s", "comparisons_per_s", "multiply_adds_per_s", "peak_bytes"),
    *("online_bytes", "dealer_bytes", "rounds", "exchanges", "cores", "memory_bytes"),
)


def command(*arguments):
    """What `lpgan` prints on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert cli.main(arguments) == 0
    return out.getvalue(), err.getvalue()


def printed(report):
    """The table, in a terminal that is wide enough."""
    console = Console(file=io.StringIO(), width=120)
    console.print(bench.table(report))
    return console.file.getvalue()


# A training step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "digits-private"])
def test_inputs_of_any_step(name):
    """With classes and with noise: what a program takes, of random images."""
    settings = bench.config.load(name, ["data.labels=true", *TINY, "batch_size=32"])
    program = build(settings).program
    given = bench._random_inputs(settings)(1)
    batch, noise = given if program.noise is not None else (given, None)
    for ours, wanted in zip(*map(jax.tree.leaves, (batch, program.batch)), strict=True):
        assert ours.shape == wanted.shape
    if program.noise is not None:
        assert noise.shape == (program.noise.sums, program.noise.size)
        assert noise.any()


def test_a_training_step():
    """One run for all that is said of it: it compiles a step."""
    changes = (argument for change in TINY for argument in ("--set", change))
    size = ("--batch-size", "4", "--steps", "2")
    out, err = command("bench", "--config", "digits", *changes, *size, "--json")
    assert err == ""
    report = json.loads(out)
    assert all(isinstance(value, bool | int | float | str) for value in report.values())
    assert all(report[name] > 0 for name in POSITIVE)
    assert (report["config"], report["batch_size"], report["steps"]) == ("digits", 4, 2)
    assert report["trace_s"] < report["compile_s"]
    assert report["step_s"] < report["warm_start_s"]
    assert 1e8 < report["peak_bytes"] < report["memory_bytes"]

    # As of `lpgan cost`:
    settings = bench.config.load("digits", [*TINY, "batch_size=4"])
    function, secrets, public = shapes.step_program(build(settings))
    cost = bench.program_cost(function, secrets, public)
    for name in ("rounds", "exchanges", "online_bytes", "comparisons"):
        assert report[name] == getattr(cost, name)
    assert report["dealer_bytes"] == cost.dealer_bytes_s1 + cost.dealer_bytes_s2
    products = 2 * cost.multiply_adds + cost.dealer_multiply_adds
    assert report["multiply_adds_per_s"] * report["step_s"] == pytest.approx(products)
    assert report["images_per_s"] * report["step_s"] == pytest.approx(4)
    assert report["slowdown"] == pytest.approx(report["step_s"] / report["plaintext_step_s"])

    shares = [report[f"share_{part}"] for part in bench.PARTS]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    for part in ("linear_algebra", "comparison", "truncation", "randomness"):
        assert 0 < report[f"share_{part}"] < 1
    seconds = [report[f"{part}_s"] for part in bench.PARTS]
    assert sum(seconds) == pytest.approx(report["step_s"])

    text = printed(report)
    for name in bench.LABELS.keys() & report.keys():
        assert bench.label(name) in text
        assert bench.shown(name, report[name]) in text

    # And on the page:
    figures = {performance.PUBLISHED[0]: report, performance.DIGITS: report}
    read = performance.from_csv(performance.to_csv(figures))
    assert read.keys() == figures.keys()
    for own in read.values():
        assert own == {
            name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            for name, value in report.items()
        }
    page = performance.to_markdown(read)
    assert bench.shown("step_s", report["step_s"]) in page
    assert performance.to_csv(read) == performance.to_csv(figures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --config FILE, --micro, or both"),
        (["--config", "nowhere"], "nowhere: no such configuration"),
        (["--config", "digits", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["--config", "digits", "--batch-size", "0"], "batch_size: 0 given"),
        (["--config", "digits", "--set", "model.width=3"], "model.width: unknown field"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_people_get_a_table_and_are_told_what_is_going_on(monkeypatch):
    def micro(note):
        note("relu")
        return {"micro_relu_per_s": 4.2e6, "jax": "0.10.2"}

    monkeypatch.setattr(bench, "micro", micro)
    out, err = command("bench", "--micro")
    assert out.split() == ["JAX", "0.10.2", "relu", "4.2", "M/s"]
    assert err == "relu ...\n"
    out, err = command("bench", "--micro", "--json")
    assert json.loads(out) == micro(str)
    assert err == ""


def test_a_process_that_fails_tells_why(tmp_path):
    with pytest.raises(ChildProcessError, match=r"the warm start failed: .*config.yaml"):
        bench._in_process("warm", str(tmp_path), "1")


# Where the time goes ------------------------------------------------------------------------------

HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(u64[2]{0})->u64[2]{0}}

%body (arg: (s64[], u64[2])) -> (s64[], u64[2]) {
  %arg = (s64[], u64[2]{0}) parameter(0)
  %inside = u64[2]{0} fusion(%arg), kind=kLoop, calls=%f, metadata={op_name="jit(step)/while/body/comparison/vmap(truncation)/add" stack_frame_id=1}
  ROOT %tuple = (s64[], u64[2]{0}) tuple(%arg, %inside)
}

ENTRY %main (x: u64[2]) -> u64[2] {
  %x = u64[2]{0} parameter(0), metadata={op_name="x"}
  %while.1 = (s64[], /*index=1*/u64[2]{0}) while(%x), condition=%c, body=%body, metadata={op_name="jit(step)/comparison/while"}
  %call.2 = u64[2]{0} call(%x), to_apply=%body, metadata={op_name="jit(step)/comparison/call"}
  %product = u64[2]{0} custom-call(%x), custom_call_target="lpgan_ring_product", metadata={op_name="jit(step)/truncation/linear_algebra/ffi_call"}
  %words.3 = u64[2]{0} custom-call(%x), custom_call_target="lpgan_chacha20", metadata={op_name="jit(step)/truncation/ffi_call"}
  %dot.4 = u64[2]{0} dot(%x, %x), metadata={op_name="jit(step)/truncation/linear_algebra/dot"}
  %mean = u64[2]{0} fusion(%x), kind=kInput, calls=%f, metadata={op_name="jit(step)/vmap(comparison)/reduce_sum"}
  %elsewhere = u64[2]{0} add(%x, %x), metadata={op_name="jit(step)/my_comparison/add"}
  ROOT %copy.5 = u64[2]{0} copy(%x)
}
"""  # noqa: E501


def test_the_innermost_scope_names_the_part():
    parts = bench.parts(HLO)
    assert {name: parts[name] for name in parts if parts[name] != "other"} == {
        "inside": "truncation",
        "product": "linear_algebra",
        "words.3": "randomness",
        "dot.4": "linear_algebra",
        "mean": "comparison",
    }
    assert parts["elsewhere"] == parts["copy.5"] == "other"
    assert not {"while.1", "call.2"} & parts.keys()


def test_shares_are_of_the_programs_own_instructions():
    profiled = [
        ("jit_step", "while.1", 99),  # holds the two after it
        ("jit_step", "inside", 1),
        ("jit_step", "inside", 2),
        ("jit_step", "mean", 3),
        ("jit_step", "copy.5", 6),
        ("jit_step", "unheard", 99),
        ("jit_split", "mean", 99),
    ]
    shares = bench.breakdown(HLO, profiled)
    assert tuple(shares) == bench.PARTS
    assert {part: share for part, share in shares.items() if share} == {
        "truncation": 0.25,
        "comparison": 0.25,
        "other": 0.5,
    }
    assert bench.breakdown(HLO, []) == {}


# Protocols by themselves --------------------------------------------------------------------------


def test_protocols_by_themselves():
    notes = []
    report = bench.micro(elements=32, products=[(4, 3, 2)], repeats=1, note=notes.append)
    rates = {name: value for name, value in report.items() if name.startswith("micro_")}
    assert len(rates) == len(bench._PROTOCOLS) + 5
    assert {"micro_relu_per_s", "micro_tanh_per_s", "micro_product_4x3x2_gmacs"} <= rates.keys()
    assert all(value > 0 for value in rates.values())
    assert notes[-2:] == ["a product of 4 x 3 and 3 x 2", "ChaCha20"]
    text = printed(report)
    for name, value in rates.items():
        assert bench.label(name) in text
        assert bench.shown(name, value) in text
    page = performance.to_markdown({performance.MICRO: report})
    assert "| 4 x 3 x 2 |" in page
    assert "| 4 x 3 x 2, 2^32 |" in page
    with pytest.raises(ValueError, match="elements: expected at least 1"):
        bench.micro(elements=0)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("step_s", 1.2345, "1.23 s"),
        ("online_bytes", 68_659_976, "68.7 MB"),
        ("images_per_s", 3.71, "3.71 /s"),
        ("micro_relu_per_s", 999_900, "1 M/s"),
        ("share_other", 0.126, "12.6 %"),
        ("micro_product_1x2x3_gmacs", 15.84, "15.8 G/s"),
        ("micro_product_1x2x3_to_float32", 0.3333, "0.333"),
        ("rounds", 1236, "1,236"),
        ("native", True, "yes"),
        ("jax", "0.10.2", "0.10.2"),
    ],
)
def test_figures_have_the_unit_of_their_name(name, value, text):
    assert bench.shown(name, value) == text


# The page -----------------------------------------------------------------------------------------


def test_the_page_has_the_figures_of_the_file():
    text = (DOCS / "performance.csv").read_text()
    figures = performance.from_csv(text)
    assert list(figures) == performance.COMMANDS
    assert performance.to_csv(figures) == text
    assert performance.to_markdown(figures) == (DOCS / "performance.md").read_text()


def test_figures_of_different_machines_are_not_put_on_a_page():
    one = dict.fromkeys(performance.MACHINE, "this")
    with pytest.raises(ValueError, match="different machines"):
        performance.to_markdown(
            {performance.MICRO: one, performance.PEERS[0]: one | {"cpu": "that"}}
        )


def test_peers_that_fail_are_named_and_left_out(capsys):
    def printing(seconds):
        figures = json.dumps({"step_s": seconds, "batch_size": 2, "version": "1.0"}, indent=2)
        return [sys.executable, "-c", f"print('a line of a log'); print('''{figures}''')"]

    commands = {
        "lpgan_jax": printing(2.0),
        "crypten": printing(5.0),
        "spu": [sys.executable, "-c", "import nothing_of_that_name"],
    }
    rows = compare_peers.compare(commands, rounds=2)
    assert [(row["round"], row["system"], row["step_s"]) for row in rows] == [
        (1, "lpgan_jax", 2.0),
        (1, "crypten", 5.0),
        (2, "lpgan_jax", 2.0),
        (2, "crypten", 5.0),
    ]
    told = capsys.readouterr().err
    assert told.count("SPU is left out") == 1
    assert "No module named 'nothing_of_that_name'" in told
    assert "| CrypTen 1.0 | 5 | 5 | 5 | 2.5 |" in compare_peers.to_markdown(rows)
    assert compare_peers.summary(rows)["crypten_ratio"] == 2.5
    missing = compare_peers.compare({"crypten": ["/nowhere/python"]}, rounds=1)
    assert missing == []
    assert "needed: /nowhere/python with crypten installed" in capsys.readouterr().err
    with pytest.raises(OSError, match="nowhere"):
        compare_peers.compare({"lpgan_jax": ["/nowhere/python"]}, rounds=1)
