"""The command `lpgan`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # JAX takes seconds to import: each command imports what it needs
    from lpgan_jax.training.config import Settings, TrainConfig


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lpgan",
        description="Train a GAN, or a program of yours, on data that nobody may see: two servers, "
        "secret shares.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train on secret-shared data (both servers simulated)"
    )
    _add_configuration(train, required=False, program=True)  # a resumed run has its own
    train.add_argument("--out", required=True, metavar="DIR", help="the run directory, to be made")
    train.add_argument("--steps", type=int, metavar="N", help="training steps in all")
    train.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="fix initial parameters, order, noise and the dealer: repeatable, not for secrets "
        "(default: the config's seed fixes all but the dealer)",
    )
    train.add_argument("--init", metavar="FILE", help="start from parameters that `export` wrote")
    train.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, with new dealer keys"
    )
    modes = train.add_mutually_exclusive_group()
    modes.add_argument(
        "--plaintext",
        dest="mode",
        action="store_const",
        const="plaintext",
        help="train in the clear instead: the same step, in Flax and optax",
    )
    modes.add_argument(
        "--shadow",
        dest="mode",
        action="store_const",
        const="shadow",
        help="train on plaintext integers that round as the protocols do: faster, hides nothing",
    )
    train.set_defaults(mode="secure")

    sample = commands.add_parser(
        "sample", help="generate images with the shared parameters of a run"
    )
    sample.add_argument("--run", required=True, metavar="DIR", help="a run directory")
    sample.add_argument("--num", required=True, type=int, metavar="N", help="how many images")
    sample.add_argument("--out", required=True, metavar="FILE.png", help="the image grid")
    sample.add_argument("--seed", type=int, metavar="N", help="fix the noise and the dealer")
    sample.add_argument(
        "--label", type=int, metavar="N", help="all of one class (default: as many of each)"
    )

    ask = commands.add_parser(
        "ask", help="ask what was trained: nobody else sees the question or the answer"
    )
    where = ask.add_mutually_exclusive_group(required=True)
    where.add_argument("--run", metavar="DIR", help="a run directory, of simulated servers")
    where.add_argument("--config", metavar="FILE", help="the configuration of a cluster, YAML")
    ask.add_argument(
        "--as", dest="role", default="sp", metavar="NAME", help="of a cluster: who asks"
    )
    ask.add_argument("--program", metavar="FILE.py", help="of a cluster: your copy of the program")
    ask.add_argument("--answer", metavar="NAME", help="which one, if the program has several")
    ask.add_argument("--in", dest="question", required=True, metavar="FILE", help="the question")
    ask.add_argument(
        "--out", metavar="FILE.npy", help="where the answer goes, instead of being shown"
    )

    export = commands.add_parser("export", help="reconstruct the parameters, as SP would")
    export.add_argument("--run", required=True, metavar="DIR", help="a run directory")
    export.add_argument(
        "--out", required=True, metavar="FILE", help='Flax msgpack of {"g": ..., "d": ...}, float32'
    )

    quality = commands.add_parser(
        "quality", help="measure a run's images against the real ones, as SP could with the data"
    )
    quality.add_argument("--run", required=True, metavar="DIR", help="a run directory")
    quality.add_argument(
        "--num", type=int, default=2000, metavar="N", help="how many images (default: 2000)"
    )
    quality.add_argument("--seed", type=int, metavar="N", help="fix the noise and the dealer")
    quality.add_argument(
        "--inception",
        metavar="FILE",
        help="weights of Inception-v3 as FID takes them (.pth or .npz), for its features instead "
        "of those of a small classifier trained on the real images",
    )

    quality.add_argument(
        "--membership",
        action="store_true",
        help="attack the networks instead: can one tell which images were trained on?",
    )

    cost = commands.add_parser(
        "cost", help="what a training step sends, without running it: bytes, rounds, per layer"
    )
    _add_configuration(cost, required=False, program=True)
    cost.add_argument(
        "--bandwidth", type=float, metavar="MBIT/S", help="of a network of yours (default: 1000)"
    )
    cost.add_argument(
        "--latency", type=float, metavar="MS", help="one way, of that network (default: 0.5)"
    )
    cost.add_argument("--json", action="store_true", help="print a JSON object instead of a table")

    privacy = commands.add_parser(
        "privacy", help="what a training promises of each image, before it runs"
    )
    _add_configuration(privacy)
    privacy.add_argument(
        "--steps", type=int, metavar="N", help="training steps in all (default: as configured)"
    )
    privacy.add_argument("--json", action="store_true", help="print a JSON object instead")

    bench = commands.add_parser(
        "bench", help="measure a training step, or the protocols it is made of, on this machine"
    )
    _add_configuration(bench, required=False)  # or --micro alone
    bench.add_argument(
        "--steps", type=int, default=5, metavar="N", help="steps to time (default: 5)"
    )
    bench.add_argument(
        "--micro", action="store_true", help="measure protocols, ring products and ChaCha20"
    )
    bench.add_argument("--json", action="store_true", help="print a JSON object instead of a table")

    ranges = commands.add_parser(
        "ranges",
        help="train in shadow mode, and say where values leave the range or lose precision",
    )
    _add_configuration(ranges)
    ranges.add_argument(
        "--steps", type=int, default=5, metavar="N", help="steps to look at (default: 5)"
    )
    ranges.add_argument(
        "--rounding",
        choices=["stochastic", "nearest", "local"],
        default="stochastic",
        help="as the protocols round (default), or as they do not",
    )

    sweep = commands.add_parser(
        "sweep", help="run a study: many runs from the same seeds, with tables and plots"
    )
    sweep.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a YAML file, or a shipped one: precision, ...",
    )
    sweep.add_argument(
        "--out", required=True, metavar="DIR", help="its directory; an interrupted sweep goes on"
    )
    sweep.add_argument(
        "--workers", type=int, metavar="N", help="processes at once (default: one a core)"
    )

    audit = commands.add_parser(
        "audit", help="list every message of training and sampling, and check that it tells nothing"
    )
    _add_configuration(
        audit,
        required=False,
        program=True,
        batch="images in a batch (default: as configured, or as many as half of the memory allows)",
    )
    audit.add_argument("--no-compile", action="store_true", help="only the traced programs")
    _add_cluster_commands(commands)
    return parser


def _add_configuration(
    command: argparse.ArgumentParser,
    required: bool = True,
    program: bool = False,
    batch: str = "images in a batch",
) -> None:
    command.add_argument(
        "--config",
        required=required,
        metavar="FILE",
        help="of a GAN: a YAML file, or the name of a shipped one: digits, mnist, ...",
    )
    command.add_argument("--batch-size", type=int, metavar="N", help=batch)
    _add_set(command)
    if program:
        command.add_argument("--program", metavar="FILE.py", help="a program of your own instead")
        command.add_argument("--data", metavar="PATH", help="where the program's data is")


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the config, e.g. --set model.features=8, or give an option of the "
        "program (repeatable)",
    )


def _settings(args: argparse.Namespace, source: str | None = None) -> TrainConfig:
    """The configuration of a GAN that the arguments of `_add_configuration` (and --steps) say.

    `source`: instead of --config.
    """
    from lpgan_jax.training import config

    source = source or args.config
    if source is None:
        raise ValueError("--config: expected a YAML file or the name of a shipped config")
    overrides = list(args.set)
    if args.command in ("train", "up", "ds", "privacy") and args.steps is not None:
        overrides.append(f"steps={args.steps}")
    if getattr(args, "batch_size", None) is not None:
        overrides.append(f"batch_size={args.batch_size}")
    return config.load(source, overrides)


def _any_settings(args: argparse.Namespace) -> Settings:
    """The same, of a GAN or a program; of a resumed run what it has, changed."""
    from lpgan_jax.training import config
    from lpgan_jax.training.run_directory import RunDirectory

    program, options = args.program, list(args.set)
    gan = args.train if args.command in ("ds", "doctor") else args.config
    fields = {"steps": getattr(args, "steps", None), "data": args.data}
    if gan is None and program is None and getattr(args, "resume", False):
        run = RunDirectory.open(args.out)
        before = run.config()
        if isinstance(before, config.TrainConfig):
            gan = str(run.config_file)
        else:
            program = before.program
            kept = {"seed": before.seed, "data": before.data, "steps": before.steps}
            fields = kept | {name: value for name, value in fields.items() if value is not None}
            options = [f"{k}={json.dumps(v)}" for k, v in before.options.items()] + options
    if (gan is None) == (program is None):
        raise ValueError("expected --config, of a GAN, or --program, a Python file")
    if program is None:
        if args.data is not None:
            raise ValueError("--data: of a program; a GAN's is --set data.path=...")
        return _settings(args, gan)
    if getattr(args, "batch_size", None) is not None:
        raise ValueError("--batch-size: of a GAN; a program has options of its own (--set)")
    return config.program_config(program, options, **fields)


def _add_cluster_commands(commands: Any) -> None:
    up = commands.add_parser(
        "up", help="train with DS, S1, S2 and SP as processes of this machine: try a cluster out"
    )
    _add_configuration(up, required=False, program=True)
    up.add_argument("--out", required=True, metavar="DIR", help="the run directory, to be made")
    up.add_argument("--steps", type=int, metavar="N", help="training steps in all")
    up.add_argument("--seed", type=int, metavar="N", help="as for train: not for secrets")
    up.add_argument("--resume", action="store_true", help="go on with the session in DIR")
    up.add_argument(
        "--check",
        type=float,
        default=0.05,
        metavar="Q",
        help="the probability with which DS checks a step of the servers (default: 0.05; 0: none)",
    )
    up.add_argument(
        "--client",
        action="append",
        default=[],
        metavar="NAME",
        help="who may ask when training is over (repeatable): go on answering until Ctrl-C",
    )

    cluster = {"required": True, "metavar": "FILE", "help": "the cluster's configuration, YAML"}
    serve = commands.add_parser("serve", help="be a server: S1 or S2")
    serve.add_argument("server", choices=["s1", "s2"])
    serve.add_argument("--config", **cluster)
    serve.add_argument("--program", metavar="FILE.py", help="this role's copy of the program")

    ds = commands.add_parser("ds", help="be DS: share data, and deal the randomness")
    ds.add_argument("--config", **cluster)
    of = ds.add_mutually_exclusive_group(required=True)
    of.add_argument("--train", metavar="FILE", help="the configuration of a GAN's training")
    of.add_argument("--program", metavar="FILE.py", help="a program instead")
    ds.add_argument("--data", metavar="PATH", help="where the program's data is")
    ds.add_argument("--steps", type=int, metavar="N", help="training steps in all")
    _add_set(ds)
    ds.add_argument("--seed", help=argparse.SUPPRESS)  # refused, with the reason
    ds.add_argument(
        "--owner", default="ds", metavar="NAME", help="be another data owner, who deals nothing"
    )

    sp = commands.add_parser("sp", help="be SP: put results together, or have images generated")
    sp.add_argument("--config", **cluster)
    sp.add_argument("--program", metavar="FILE.py", help="this role's copy of the program")
    sp.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the run directory (with --sample: the PNG file)",
    )
    sp.add_argument("--sample", type=int, metavar="N", help="have N images generated")
    sp.add_argument(
        "--label", type=int, metavar="N", help="all of one class, with --sample and --own-noise"
    )
    sp.add_argument(
        "--own-noise", action="store_true", help="SP shares the noise of the images, instead of DS"
    )
    sp.add_argument("--seed", type=int, metavar="N", help="fix SP's own noise, and nothing else")

    doctor = commands.add_parser(
        "doctor", help="look at all that a role of a cluster needs, before a session"
    )
    doctor.add_argument("--config", **cluster)
    doctor.add_argument(
        "--as", dest="role", metavar="ROLE", help="of this machine (default: whose key is there)"
    )
    known = doctor.add_mutually_exclusive_group()
    known.add_argument("--train", metavar="FILE", help="the configuration of a GAN's training")
    known.add_argument("--program", metavar="FILE.py", help="a program instead")
    _add_set(doctor)
    doctor.set_defaults(data=None)
    doctor.add_argument(
        "--measure",
        action="store_true",
        help="at s1 and s2 at the same time: compare them, and measure the line between them",
    )

    watch = commands.add_parser("watch", help="show a run on a page of this machine, as it goes on")
    watch.add_argument("run", metavar="DIR", help="a run directory")
    watch.add_argument("--port", type=int, default=0, metavar="N", help="(default: a free one)")
    watch.add_argument(
        "--config",
        metavar="FILE",
        help="of a run of `lpgan sp`: the cluster's configuration, by which SP's log is found",
    )

    certificates = commands.add_parser("certificates", help="make certificates for a try-out")
    certificates.add_argument(
        "--config", metavar="FILE", help="a cluster's configuration with more data owners"
    )
    certificates.add_argument("--out", required=True, metavar="DIR", help="a new directory")


def _train(args: argparse.Namespace) -> None:
    from lpgan_jax.training.loop import train

    train(
        _any_settings(args),
        args.out,
        seed=args.seed,
        resume=args.resume,
        mode=args.mode,
        init=args.init,
    )


def _quality(args: argparse.Namespace) -> None:
    from lpgan_jax.study.runs import quality

    if args.membership:
        return _membership(args)
    report = quality(args.run, args.num, seed=args.seed, inception=args.inception, report=print)
    coverage = "not measured" if report.coverage is None else f"{100 * report.coverage:.0f} %"
    print(
        f"{report.images} images, opened by SP\n"
        f"Fréchet distance   {report.frechet:.4g}\n"
        f"precision          {report.precision:.3f}   of generated images look like real ones\n"
        f"recall             {report.recall:.3f}   of real images look like generated ones\n"
        f"classes covered    {coverage}"
    )
    if report.accuracy is not None:
        print(
            f"accuracy           {100 * report.accuracy:.1f} %  of a classifier that has seen "
            "generated images alone,\n                            on real ones beside the data"
        )


def _membership(args: argparse.Namespace) -> None:
    from lpgan_jax.study.runs import membership

    found = membership(args.run, args.num, seed=args.seed)
    for of, shown in zip(found.attacks, found.shown, strict=True):
        print(
            f"attack on {of.name}, of {of.members} members and as many others:\n"
            f"  area under the curve  {of.area:.3f}   (0.5 by chance)\n"
            f"  advantage             {of.advantage:.3f}   within {of.error:.3f} (0 by chance)\n"
            f"  shows epsilon         {shown:.2f}   at least, with 95 %"
        )
    if found.bounds is None:
        print("no differential privacy: nothing bounds an attack")
    else:
        print(
            f"epsilon {found.epsilon:.3g} at delta {found.delta:g} bounds every attack: area "
            f"{found.bounds[1]:.3f}, advantage {found.bounds[0]:.3f}"
        )


def _cost(args: argparse.Namespace) -> None:
    from lpgan_jax.analysis.cost import LAN, WAN, Network, program_cost
    from lpgan_jax.programs import secured, shapes
    from lpgan_jax.training.building import training_of

    network = None
    if args.bandwidth is not None or args.latency is not None:
        bandwidth = LAN.bandwidth_bits_per_s if args.bandwidth is None else 1e6 * args.bandwidth
        latency = LAN.latency_s if args.latency is None else 1e-3 * args.latency
        network = Network(bandwidth, latency).checked()
    training = training_of(_any_settings(args))
    program, every = secured(training.program), training.guard_every
    function, secrets, public = shapes.step_program(program)
    step = program_cost(function, secrets, public, inputs=secrets[1])
    guard = program_cost(*shapes.guard_program(program)) if every else None
    if args.json:
        report = step.to_json()
        report["guard"] = None if guard is None else {"every": every, **guard.to_json()}
        if network is not None:
            report["seconds"] = step.seconds(*network)
        print(json.dumps(report, indent=2))
    else:
        print(f"One training step, batch of {training.batch_size}, from its trace:\n")
        print(step.table([LAN, WAN] if network is None else [LAN, WAN, network]))
        if guard is not None:
            print(guard.beside(step, every))


def _privacy(args: argparse.Namespace) -> None:
    from lpgan_jax.training.private import promises

    found = promises(_settings(args))
    if args.json:
        print(json.dumps(found, indent=2))
        return
    whose = "of each server" if found["noise"] == "servers" else "dealt by DS"
    drawn = found["sampling_rate"] * found["examples"]
    print(
        f"epsilon           {found['epsilon']:8.4g}   of each image, at delta {found['delta']:g}\n"
        f"noise multiplier  {found['noise_multiplier']:8.4g}   {whose}, in clips of "
        f"{found['clip']:g}\n"
        f"noised updates    {found['steps']:8d}   of the discriminator, in "
        f"{found['training_steps']} steps\n"
        f"sampling rate     {found['sampling_rate']:8.4g}   of {found['examples']} images: "
        f"{drawn:.1f} on average in a batch of {found['batch_size']}\n"
        "Both networks and all that they generate keep it. Outside of it: the choice of "
        "hyper-parameters on\nthese images, further runs on them, and whatever else is published."
    )


def _bench(args: argparse.Namespace) -> None:
    from rich.console import Console

    from lpgan_jax.training import bench

    if args.config is None and not args.micro:
        raise ValueError("bench: expected --config FILE, --micro, or both")

    def note(text: str) -> None:
        if not args.json:
            print(f"{text} ...", file=sys.stderr, flush=True)

    report: bench.Report = {}
    if args.config is not None:
        report |= {"config": args.config} | bench.measure(_settings(args), args.steps, note)
    if args.micro:
        report |= bench.micro(note=note)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        Console().print(bench.table(report))


def _ranges(args: argparse.Namespace) -> None:
    from rich.console import Console

    from lpgan_jax.analysis.ranges import ranges, table, verdict
    from lpgan_jax.mpc.prng import key
    from lpgan_jax.programs import initial_state
    from lpgan_jax.training.building import batches_of, build, training_of

    if args.steps < 1:
        raise ValueError(f"--steps: expected at least 1, got {args.steps}")
    settings = _settings(args)
    gan, training = build(settings), training_of(settings)
    draw = training.noised(batches_of(settings, training, settings.seed), settings.seed)
    batches = (draw(step) for step in range(args.steps))
    rows = ranges(
        gan, initial_state(gan.program, settings.seed), batches, key(settings.seed), args.rounding
    )
    # As wide as the table needs, where nobody's terminal sets a limit.
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows))
    print(f"{args.steps} steps, {settings.frac_bits} fraction bits: {verdict(rows)}")
    if training.program.noise is not None:
        print("of the images themselves: what is said here is covered by no epsilon")


def _sweep(args: argparse.Namespace) -> int:
    """0, or 1 if a cell failed."""
    from lpgan_jax.study.sweep import run_sweep, write_report
    from lpgan_jax.training import config

    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers: expected at least 1, got {args.workers}")
    failures = run_sweep(config.load_sweep(args.config), args.out, args.workers)
    write_report(args.out, f"lpgan sweep --config {args.config} --out {args.out}")
    print(f"tables, plots and summary.md are in {args.out}")
    return 1 if failures else 0


def _audit(args: argparse.Namespace) -> int:
    """0 if there are no problems, else 1."""
    import jax

    if not getattr(jax.config, "jax_platforms", None):
        jax.config.update("jax_platforms", "cpu")  # programs are compiled, and not run

    from lpgan_jax.analysis.audit import audit_compiled, audit_program, largest_batch
    from lpgan_jax.programs import shapes
    from lpgan_jax.training.building import build, training_of
    from lpgan_jax.training.config import TrainConfig

    settings = _any_settings(args)
    size = training_of(settings).batch_size
    if isinstance(settings, TrainConfig) and args.batch_size is None:
        size = largest_batch(shapes.step_program(build(settings)), size)
        if size < settings.batch_size:
            print(
                f"The configured batch of {settings.batch_size} would take more than half of the "
                "memory."
            )
            settings = settings.model_copy(update={"batch_size": size})
    of = build(settings)
    programs = {f"A training step, batch of {size}": shapes.step_program(of)}
    programs["Looking whether its values are in range"] = shapes.guard_program(of)
    for name, answer in of.program.answers.items():
        rows = min(size, shapes.rows_of(answer.question))
        title = f"Answering ({name}), {rows} at once"
        programs[title] = shapes.answer_program(of, name, rows)
    failed = False
    for title, program in programs.items():
        report = audit_program(*program)
        print(f"{title}\n\n{report.table()}", flush=True)
        failed |= not report.ok
        if not args.no_compile:
            note = f"compiling {title[0].lower()}{title[1:]} to match its rounds ..."
            print(note, file=sys.stderr, flush=True)
            compiled = audit_compiled(*program)
            for problem in compiled:
                print(f"PROBLEM in the compiled program: {problem}")
            if not compiled:
                print("the compiled program sends these messages and nothing else")
            failed |= bool(compiled)
        print(flush=True)
    return 1 if failed else 0


def _up(args: argparse.Namespace) -> int:
    from lpgan_jax.cluster.roles import up

    status = up(
        _any_settings(args),
        args.out,
        seed=args.seed,
        resume=args.resume,
        clients=args.client,
        check=args.check,
    )
    if status == 0:
        print(f"samples are in {args.out}/samples, what SP got in {args.out}/parameters.msgpack")
    return status


def _role(args: argparse.Namespace) -> int:
    """Play a role of a cluster: 0, or 1 if it was given up."""
    from lpgan_jax.cluster.roles import play
    from lpgan_jax.cluster.worker import Job
    from lpgan_jax.training import config

    if args.command == "serve":
        return play(Job("serve", args.server, args.config, program=args.program))
    if args.command == "ds":
        if args.seed is not None:
            raise ValueError(
                "--seed: for `lpgan up` and `lpgan train` only: if DS lost its state, it would use "
                "the same masks for other values"
            )
        settings = _any_settings(args)
        if isinstance(settings, config.TrainConfig):
            from lpgan_jax.training.private import resolved

            settings = resolved(settings)
        kind: Literal["deal", "feed"] = "deal" if args.owner == "ds" else "feed"
        return play(Job(kind, args.owner, args.config, train=config.to_json(settings)))
    if args.seed is not None and (args.seed < 0 or not (args.sample and args.own_noise)):
        raise ValueError("--seed: expected at least 0, with --sample and --own-noise")
    if args.label is not None and not (args.sample and args.own_noise):
        raise ValueError("--label: expected with --sample and --own-noise")
    if args.sample is None:
        return play(Job("collect", "sp", args.config, out=args.out, program=args.program))
    if args.sample < 1:
        raise ValueError(f"--sample: expected at least 1, got {args.sample}")
    if os.path.isdir(args.out):
        raise ValueError(f"--out: {args.out} is a directory, expected the file to write")
    return play(
        Job(
            "sample",
            "sp",
            args.config,
            seed=args.seed,
            out=args.out,
            num=args.sample,
            own=args.own_noise,
            label=args.label,
            program=args.program,
        )
    )


def _doctor(args: argparse.Namespace) -> int:
    """0, or 1 if something will not work."""
    import jax

    if not getattr(jax.config, "jax_platforms", None):
        jax.config.update("jax_platforms", "cpu")  # a running server may need all of a GPU

    from rich.console import Console

    from lpgan_jax.cluster.doctor import examine
    from lpgan_jax.cluster.findings import table

    def note(text: str) -> None:
        print(f"{text} ...", file=sys.stderr, flush=True)

    settings = None if args.train is None and args.program is None else _any_settings(args)
    findings = examine(args.config, args.role, settings, measure=args.measure, note=note)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table(findings))
    return 1 if any(finding.status == "failed" for finding in findings) else 0


def _ask(args: argparse.Namespace) -> int:
    """0, or 1 if the asking was given up."""
    from lpgan_jax.cluster.roles import play
    from lpgan_jax.cluster.worker import Job
    from lpgan_jax.common.files import atomic_write
    from lpgan_jax.programs.training import npy
    from lpgan_jax.training.building import training_of
    from lpgan_jax.training.results import ask
    from lpgan_jax.training.run_directory import RunDirectory

    if args.config is not None:
        with tempfile.TemporaryDirectory() as scratch:  # nobody else may read it
            text = Path(scratch) / "answer.txt"
            status = play(
                Job(
                    "ask",
                    args.role,
                    args.config,
                    program=args.program,
                    answer=args.answer,
                    question=args.question,
                    out=args.out or str(text),
                    as_text=args.out is None,
                )
            )
            if text.exists():
                print(text.read_text())
        return status
    program = training_of(RunDirectory.open(args.run).config()).program
    name, of = program.answer_named(args.answer)
    found = ask(args.run, name, of.read(args.question))
    if args.out is None:
        print(of.show(found))
    else:
        atomic_write(args.out, npy(found), private=False)
        print(f"the answer, opened by who asked, in {args.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    It is 0; 1 for bad input, and where an audit or the doctor found problems; 130 for Ctrl-C.
    """
    args = _parser().parse_args(argv)
    from lpgan_jax.common.files import use_compilation_cache

    try:
        use_compilation_cache()
        if args.command == "train":
            _train(args)
        elif args.command == "sample":
            from lpgan_jax.training.results import sample

            sample(args.run, args.num, args.out, seed=args.seed, label=args.label)
            print(f"{args.num} images, opened by SP, in {args.out}")
        elif args.command == "ask":
            return _ask(args)
        elif args.command == "quality":
            _quality(args)
        elif args.command == "cost":
            _cost(args)
        elif args.command == "privacy":
            _privacy(args)
        elif args.command == "bench":
            _bench(args)
        elif args.command == "sweep":
            return _sweep(args)
        elif args.command == "ranges":
            _ranges(args)
        elif args.command == "audit":
            return _audit(args)
        elif args.command == "up":
            return _up(args)
        elif args.command in ("serve", "ds", "sp"):
            return _role(args)
        elif args.command == "doctor":
            return _doctor(args)
        elif args.command == "watch":
            from lpgan_jax.cluster.watch import watch

            watch(args.run, args.port, args.config)
        elif args.command == "certificates":
            from lpgan_jax.cluster.roles import certificates

            names = certificates(args.config, args.out)
            print(f"certificates of {', '.join(names)} in {args.out}: each machine gets its own")
        else:
            from lpgan_jax.training.results import export

            export(args.run, args.out)
            print(f"parameters, reconstructed by SP, in {args.out}")
    except Exception as error:
        from lpgan_jax.transform.graph import NotSecure

        is_told = isinstance(error, NotSecure)  # it says where
        place = "" if is_told else _place_in_program(error, getattr(args, "program", None))
        known = (ValueError, TypeError, OSError, ImportError, NotSecure)
        if not place and not isinstance(error, known):
            raise
        print(f"lpgan: {error}{place}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = {
            "train": ": go on with --resume",
            "up": ": go on with --resume",
            "sweep": ": go on with the same command",
        }
        print(f"lpgan: interrupted{hint.get(args.command, '')}", file=sys.stderr)
        return 130
    return 0


def _place_in_program(error: Exception, program: str | None) -> str:
    """The last line of the user's file that an error came through, as " (model.py:12, in step)"."""
    path = os.path.realpath(program or "")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if frame.filename == path]
    where = os.path.basename(path)
    return f" ({where}:{lines[-1].lineno}, in {lines[-1].name})" if lines else ""


if __name__ == "__main__":
    sys.exit(main())
