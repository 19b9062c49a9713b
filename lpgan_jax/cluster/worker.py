"""The process that plays a role for one attempt: `python -m lpgan_jax.cluster.worker JOB`.

The supervisor starts it, reads its reports from a pipe, and holds its standard input: when that
ends, so does the worker.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lpgan_jax.cluster.reporting import FAILED, REFUSED, Lost, Reporter
from lpgan_jax.cluster.settings import DEALER, SERVERS, load_cluster, require_role

Play = Literal["serve", "deal", "feed", "collect", "sample"]


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Attributes:
        play: what.
        role: as whom.
        cluster: the file of the cluster's configuration.
        train: the training's configuration, YAML (DS and other owners).
        seed: that fixes DS's keys, for experiments.
        out: the directory or file of results (SP).
        num: how many images (SP).
        own_noise: whether SP shares the noise.
    """

    play: Play
    role: str
    cluster: str
    train: str | None = None
    seed: int | None = None
    out: str | None = None
    num: int = 0
    own_noise: bool = False

    def command(self) -> list[str]:
        """The command of a worker that does it."""
        return [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(self))]


def play(job: Job, reporter: Reporter) -> None:
    """Do the job, as far as it goes in one attempt."""
    from lpgan_jax.config import parse
    from lpgan_jax.files import use_compilation_cache

    use_compilation_cache()
    cluster = load_cluster(job.cluster)
    role = require_role(cluster, job.role)
    if job.play == "serve":
        from lpgan_jax.cluster.servers import serve

        serve(cluster, SERVERS[SERVERS.index(role)], reporter)
    elif job.play in ("deal", "feed"):
        from lpgan_jax.cluster.dealer import deal_and_feed, feed

        settings = parse(job.train or "", "the training's configuration")
        if role == DEALER:
            deal_and_feed(cluster, settings, job.seed, reporter)
        else:
            feed(cluster, settings, role, reporter)
    elif job.play == "collect":
        from lpgan_jax.cluster.provider import collect

        collect(cluster, Path(job.out or "."), reporter)
    else:
        from lpgan_jax.cluster.provider import sample

        out, own = Path(job.out or "."), job.own_noise
        sample(cluster, job.num, out, reporter, own_noise=own, seed=job.seed)


def _end_with_supervisor() -> None:
    sys.stdin.buffer.read()
    os._exit(FAILED)


def main(arguments: list[str]) -> None:
    """Play a role; never returns."""
    job = Job(**json.loads(arguments[0]))
    reporter = Reporter(job.role, int(os.environ["LPGAN_REPORTS"]))
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    _play_and_report(job, reporter)
    reporter.report()
    reporter.event("done")
    os._exit(0)


def _play_and_report(job: Job, reporter: Reporter) -> None:
    from lpgan_jax.cluster.client import RefusedBy
    from lpgan_jax.cluster.wire import Refused

    try:
        play(job, reporter)
    except Lost as error:
        reporter.fail(str(error)[:600], blames=error.role)
    except (RefusedBy, Refused) as error:
        # A server that restarts may take the next attempt; images are there or not.
        reporter.fail(str(error)[:600], REFUSED if job.play == "sample" else FAILED)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError) as error:
        _trace()
        reporter.fail(str(error)[:600], REFUSED)
    except BaseException as error:
        _trace()
        # A collective that broke, say; the phase knows with whom.
        reason, other = f"{type(error).__name__}: {error}", reporter.waits_for
        lost = f"lost {other}: {reason}" if other else reason
        reporter.fail(" ".join(lost.split())[:600], blames=other)


def _trace() -> None:
    import traceback

    traceback.print_exc()
    sys.stderr.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
