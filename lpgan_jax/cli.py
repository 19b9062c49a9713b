"""The command `lpgan`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lpgan",
        description="Train a DCGAN on images that nobody may see: two servers, secret shares.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train on secret-shared images (both servers simulated)"
    )
    train.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file, or the name of a shipped one: digits, mnist, ...",
    )
    train.add_argument("--out", required=True, metavar="DIR", help="the run directory, to be made")
    train.add_argument("--steps", type=int, metavar="N", help="training steps in all")
    train.add_argument("--batch-size", type=int, metavar="N", help="images in a batch")
    train.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="fix initial parameters, order, noise and the dealer: repeatable, not for secrets "
        "(default: the config's seed fixes all but the dealer)",
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the config, e.g. --set model.features=8 (repeatable)",
    )
    train.add_argument("--init", metavar="FILE", help="start from parameters that `export` wrote")
    train.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, with new dealer keys"
    )
    train.add_argument(
        "--plaintext", action="store_true", help="train the plaintext twin (Flax and optax) instead"
    )

    sample = commands.add_parser(
        "sample", help="generate images with the shared parameters of a run"
    )
    sample.add_argument("--run", required=True, metavar="DIR", help="a run directory")
    sample.add_argument("--num", required=True, type=int, metavar="N", help="how many images")
    sample.add_argument("--out", required=True, metavar="FILE.png", help="the image grid")
    sample.add_argument("--seed", type=int, metavar="N", help="fix the noise and the dealer")

    export = commands.add_parser("export", help="reconstruct the parameters, as SP would")
    export.add_argument("--run", required=True, metavar="DIR", help="a run directory")
    export.add_argument(
        "--out", required=True, metavar="FILE", help='Flax msgpack of {"g": ..., "d": ...}, float32'
    )
    return parser


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs; they hold no keys and no shares, which are arguments."""
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "lpgan_jax" / "xla"))


def _train(args: argparse.Namespace) -> None:
    from lpgan_jax import config
    from lpgan_jax.run_directory import RunDirectory
    from lpgan_jax.training import train

    overrides = list(args.set)
    overrides += [] if args.steps is None else [f"steps={args.steps}"]
    overrides += [] if args.batch_size is None else [f"batch_size={args.batch_size}"]
    source = args.config
    if args.resume and source is None:
        source = str(RunDirectory.open(args.out).config_file)
    elif source is None:
        raise ValueError("--config: expected a YAML file or the name of a shipped config")
    train(
        config.load(source, overrides),
        args.out,
        seed=args.seed,
        resume=args.resume,
        plaintext=args.plaintext,
        init=args.init,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for bad input, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        _use_compilation_cache()
        if args.command == "train":
            _train(args)
        elif args.command == "sample":
            from lpgan_jax.training import sample

            sample(args.run, args.num, args.out, seed=args.seed)
            print(f"{args.num} images, opened by SP, in {args.out}")
        else:
            from lpgan_jax.training import export

            export(args.run, args.out)
            print(f"parameters, reconstructed by SP, in {args.out}")
    except (ValueError, TypeError, OSError) as error:
        print(f"lpgan: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = ": go on with --resume" if args.command == "train" else ""
        print(f"lpgan: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
