"""The process that plays a role for one attempt: `python -m lpgan_jax.cluster.worker`.

The supervisor starts it, gives it its job in the first line of its standard input (nobody else can
read that), and reads its reports from a pipe. When its input ends, so does the worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
import threading
import time
import traceback
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import IO, Literal

from lpgan_jax.cluster.reporting import FAILED, REFUSED, BadInput, Lost, Reporter
from lpgan_jax.cluster.settings import DEALER, SERVERS, load_cluster, require_role
from lpgan_jax.common.files import private_open

Play = Literal["serve", "deal", "feed", "collect", "sample", "ask"]


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Attributes:
        play: what.
        role: as whom.
        cluster: the file of the cluster's configuration.
        train: the training's configuration, JSON (DS and other owners).
        program: this role's own file, if a program is trained (servers, SP, clients).
        seed: that fixes DS's keys, for experiments.
        out: the directory or file of results (SP).
        steps: that the training has in all (SP); by default as many as the servers know of.
        num: rows of a sample (SP).
        own: whether SP draws its question.
        label: of it, the class that all images are of.
        answer: what is asked; None for the only one.
        question: its file.
        as_text: whether `out` gets the answer as text.
    """

    play: Play
    role: str
    cluster: str
    _: KW_ONLY
    train: str | None = None
    program: str | None = None
    seed: int | None = None
    out: str | None = None
    steps: int | None = None
    num: int = 0
    own: bool = False
    label: int | None = None
    answer: str | None = None
    question: str = ""
    as_text: bool = False

    def command(self) -> list[str]:
        """The command of a worker that does it."""
        return [sys.executable, "-P", "-m", __name__, self.role]  # -P: no code of this directory

    def line(self) -> bytes:
        """The job as the worker reads it."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"


def play(job: Job, reporter: Reporter) -> None:
    """Do the job, as far as it goes in one attempt."""
    from lpgan_jax.common.files import use_compilation_cache
    from lpgan_jax.training.config import from_json

    use_compilation_cache()
    cluster = load_cluster(job.cluster)
    role = require_role(cluster, job.role)
    if job.play in ("serve", "deal", "feed"):
        _lock(Path(cluster.state) / f"{role}.lock")
    if job.play == "serve":
        from lpgan_jax.cluster.servers import serve

        serve(cluster, SERVERS[SERVERS.index(role)], job.program, reporter)
    elif job.play in ("deal", "feed"):
        from lpgan_jax.cluster.owners import deal_and_feed, feed

        settings = from_json(job.train or "", "the training's configuration")
        if role == DEALER:
            deal_and_feed(cluster, settings, job.seed, reporter)
        else:
            feed(cluster, settings, role, reporter)
    elif job.play == "collect":
        from lpgan_jax.cluster.provider import collect

        collect(cluster, Path(job.out or "."), reporter, job.steps, job.program)
    elif job.play == "sample":
        from lpgan_jax.cluster.askers import sample

        sample(
            cluster,
            job.num,
            str(job.out),
            job.program,
            reporter,
            own=job.own,
            seed=job.seed,
            label=job.label,
        )
    else:
        from lpgan_jax.cluster.askers import ask

        out, text = str(job.out), job.as_text
        ask(cluster, role, job.program, job.answer, job.question, out, text, reporter)


_held: list[IO[bytes]] = []
_PATIENCE_S = 5.0  # for a process that is about to end, because its supervisor has


def _lock(path: Path) -> None:
    """Hold a file until this process ends.

    Raises:
        BadInput: another process does, and does not end either.
        PermissionError: it is a symbolic link, or belongs to someone else.
    """
    file, end = private_open(path, "ab"), time.monotonic() + _PATIENCE_S
    _held.append(file)
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise BadInput(
                    f"{path}: another {path.stem} runs with this state: stop it, or use another"
                ) from None
        time.sleep(0.1)


def _end_with_supervisor() -> None:
    sys.stdin.buffer.read()
    os._exit(FAILED)


def main() -> None:
    """Play a role; never returns."""
    job = Job(**json.loads(sys.stdin.buffer.readline()))
    reporter = Reporter(job.role, int(os.environ["LPGAN_REPORTS"]))
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    _play_and_report(job, reporter)
    reporter.report()
    reporter.event("done")
    os._exit(0)


def _play_and_report(job: Job, reporter: Reporter) -> None:
    from lpgan_jax.cluster.client import RefusedBy
    from lpgan_jax.cluster.wire import Refused
    from lpgan_jax.training.config import ConfigError

    try:
        play(job, reporter)
    except Lost as error:
        reporter.fail(str(error), blames=error.role)
    except (RefusedBy, Refused) as error:
        # A server that restarts may take the next attempt; images are there or not.
        reporter.fail(str(error), REFUSED if job.play in ("sample", "ask") else FAILED)
    except (
        BadInput,
        ConfigError,
        FileNotFoundError,
        FileExistsError,
        PermissionError,
        ImportError,
    ) as error:
        reporter.fail(str(error), REFUSED)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the disk may be full, and that the reason
            traceback.print_exc()
            sys.stderr.flush()
        # The line that broke, say; the phase knows with whom.
        reason, other = f"{type(error).__name__}: {error}", reporter.waits_for
        reporter.fail(f"lost {other}: {reason}" if other else reason, blames=other)


if __name__ == "__main__":
    main()
