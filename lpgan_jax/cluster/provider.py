"""SP: it pulls shares of results from both servers, and puts them together.

It keeps no memory of what it had: whenever it connects, it reads both servers' results from the
first on, and makes the tables and pictures of its directory again.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lpgan_jax.cluster.certificates import load_identity
from lpgan_jax.cluster.client import Client
from lpgan_jax.cluster.reporting import BadInput, Lost, Reporter
from lpgan_jax.cluster.settings import (
    DEALER,
    PROVIDER,
    SERVERS,
    ClusterConfig,
    changed_field,
    public_part,
    refused_module,
)
from lpgan_jax.cluster.wire import Layout, Result, SampleRequest, buffers, half_shapes, nbytes
from lpgan_jax.common.files import atomic_write
from lpgan_jax.gan import Losses, MeanLosses, mean_losses
from lpgan_jax.mpc.fixed_point import FixedPoint
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.mpc.share_trees import reveal_tree, shapes_of
from lpgan_jax.mpc.shares import share
from lpgan_jax.training import config
from lpgan_jax.training.building import build
from lpgan_jax.training.config import TrainConfig
from lpgan_jax.training.images import save_png
from lpgan_jax.training.parameters import save_parameters
from lpgan_jax.training.programs import shared_state
from lpgan_jax.training.run_directory import Metrics, RunDirectory


class Results:
    """What a result of each kind is, and how its two shares are put together."""

    def __init__(self, settings: TrainConfig) -> None:
        gan, f = build(settings), settings.frac_bits
        one = shapes_of((), f)
        self._shapes: dict[str, Any] = {
            "losses": Losses(one, one),
            "images": shapes_of((settings.num_samples, *gan.batch.images.shape[1:]), f),
            "parameters": gan.program.learnt(shared_state(gan)),
        }
        self._layouts = {kind: Layout.of(half_shapes(of)) for kind, of in self._shapes.items()}
        self.sizes = {"step": 0} | {k: layout.size for k, layout in self._layouts.items()}

    def put_together(self, kind: str, payloads: list[bytearray]) -> Any:
        """The result, as float64 arrays, from S1's and S2's share."""
        both = [self._layouts[kind].split(payload) for payload in payloads]
        paired = [np.stack(halves) for halves in zip(*both, strict=True)]
        structure = jax.tree.structure(self._shapes[kind])
        return reveal_tree(jax.tree.unflatten(structure, paired))


def _connect(cluster: ClusterConfig, reporter: Reporter) -> tuple[list[Client], TrainConfig]:
    """Lines to both servers, once there is a training, and what is trained."""
    identity = load_identity(cluster, PROVIDER)
    clients = [Client(cluster, identity, PROVIDER, server, reporter) for server in SERVERS]
    texts = []
    for client in clients:
        with reporter.phase("looking for", on=client.server, limit_s=cluster.timeouts.patience_s):
            client.wait_until(lambda d: True)
        with reporter.phase("waiting for a training at", on=client.server, limit_s=None):
            known = client.wait_until(lambda d: d.config is not None, patient=True)
        texts.append(str(known.config))
    if texts[0] != texts[1]:
        raise Lost("s2", "its configuration of the training is not the one of s1")
    settings = config.from_json(texts[0], "the servers' configuration")
    if (reason := refused_module(cluster, settings)) is not None:
        raise BadInput(reason)
    return clients, settings


# The results of a training ------------------------------------------------------------------------


def collect(
    cluster: ClusterConfig,
    out: str | os.PathLike[str],
    reporter: Reporter,
    steps: int | None = None,
) -> None:
    """Pull results into a run directory; returns when the training's parameters are there.

    Args:
        cluster: whose servers train.
        out: the directory.
        reporter: for reports.
        steps: that the training has; by default, as many as the servers know of. With it, SP waits
            for DS to go on with a training that was finished at fewer.

    Raises:
        Lost: a server is gone.
        BadInput, FileExistsError: the directory has another run in it.
    """
    while not _collect_from_the_first(cluster, Path(out), reporter, steps):
        reporter.event("results begin again")


def _collect_from_the_first(
    cluster: ClusterConfig, out: Path, reporter: Reporter, steps: int | None
) -> bool:
    """Read all results; False if a new attempt began meanwhile, which computes some again."""
    clients, settings = _connect(cluster, reporter)
    try:
        return _collect(clients, settings, out, reporter, steps or settings.steps)
    finally:
        for client in clients:
            client.close()


def _collect(
    clients: list[Client], settings: TrainConfig, out: Path, reporter: Reporter, steps: int
) -> bool:
    run = _run_directory(out, settings)
    reporter.set(step=0, steps=settings.steps)
    results = Results(settings)
    pairs = _Pairs(clients, results)
    metrics = Metrics(run.metrics_file, 0)
    started, attempts = time.time(), 0
    durations: list[float] = []
    losses: MeanLosses | None = None
    while True:
        with reporter.phase("waiting for results of", on="s1", limit_s=None):
            pair = pairs.next()
        if pair is None:
            return False
        head, payloads = pair
        attempts = max(attempts, head.attempt)
        if head.kind in ("losses", "step"):
            durations.append(head.seconds)
            size = settings.batch_size
            if head.kind == "losses":
                losses = mean_losses(results.put_together("losses", payloads), size)
            if settings.logs_after(head.step) or head.step == 1:
                loss_d, loss_g = losses or (None, None)
                metrics.append(head.step, loss_d, loss_g, head.seconds, size / head.seconds)
            reporter.set(step=head.step, s_per_step=round(head.seconds, 4))
        elif head.kind == "images":
            save_png(run.sample_file(head.step), results.put_together("images", payloads))
            reporter.set(step=head.step)
        elif head.step >= steps:  # or they are of a training that is about to go on
            save_parameters(run.parameters_file, results.put_together("parameters", payloads))
            break
    summary = {
        "mode": "two servers",
        "steps": head.step,
        "attempts": attempts,
        "seconds": round(time.time() - started, 3),
        "seconds_per_step": round(statistics.median(durations or [0.0]), 4),
        "loss_discriminator": losses[0] if losses else None,
        "loss_generator": losses[1] if losses else None,
        "jax": jax.__version__,
    }
    atomic_write(run.summary_file, (json.dumps(summary, indent=2) + "\n").encode())
    reporter.set(step=head.step)
    reporter.event("collected", step=head.step, out=str(out))
    return True


def _run_directory(path: Path, settings: TrainConfig) -> RunDirectory:
    """The run's directory, new or as SP left it."""
    if not (path / "config.yaml").exists():
        return RunDirectory.create(path, settings, servers="apart")
    run = RunDirectory.resume(path)
    before = run.config()  # of SP, or on one machine of DS, who knows more
    if (field := changed_field(public_part(before), settings)) is not None:
        raise BadInput(f"{path}: has another run in it ({field}), expected a new directory")
    now = settings.model_copy(update={"data": before.data, "seed": before.seed})
    atomic_write(run.config_file, config.dump(now).encode())
    return run


class _Pairs:
    """Results of which both servers' shares are there, in order."""

    def __init__(self, clients: list[Client], results: Results) -> None:
        self._queues: list[queue.Queue[Any]] = [queue.Queue(16) for _ in clients]
        for client, into in zip(clients, self._queues, strict=True):
            threading.Thread(
                target=self._pull, args=(client, results.sizes, into), daemon=True
            ).start()

    @staticmethod
    def _pull(client: Client, sizes: dict[str, int], into: queue.Queue[Any]) -> None:
        try:
            for result in client.results(sizes):
                into.put(result)
            into.put(None)
        except Exception as error:
            into.put(error)

    def next(self) -> tuple[Result, list[bytearray]] | None:
        """The next result's head as S1 gives it, and both shares; None if there are no more."""
        heads = [self._take(index) for index in range(len(self._queues))]
        while None not in heads:
            first, second = (_order(head) for head, _ in heads)
            if first == second:
                return heads[0][0], [payload for _, payload in heads]
            # A server may have a result that the other one lost in a crash: it was computed again.
            behind = 0 if first < second else 1
            heads[behind] = self._take(behind)
        return None

    def _take(self, index: int) -> Any:
        result = self._queues[index].get()
        if isinstance(result, Exception):
            raise result
        return result


def _order(head: Result) -> tuple[int, int]:
    return head.attempt, head.serial


# Images on demand ---------------------------------------------------------------------------------


def sample(
    cluster: ClusterConfig,
    num: int,
    out: str | os.PathLike[str],
    reporter: Reporter,
    *,
    own_noise: bool = False,
    seed: int | None = None,
) -> None:
    """Have images generated, put them together, and write them as a PNG grid.

    Args:
        cluster: whose servers have trained.
        num: how many.
        out: the PNG file.
        reporter: for reports.
        own_noise: whether SP shares the noise; else DS does, and SP does not know it.
        seed: fixes SP's own noise.

    Raises:
        Lost: a server, or DS, is not there.
    """
    clients, settings = _connect(cluster, reporter)
    results = Results(settings)
    fxp, rng = FixedPoint(settings.frac_bits), np.random.default_rng(seed)
    batch = settings.num_samples
    images: list[np.ndarray] = []
    reporter.set(step=0, steps=num)
    limit = cluster.timeouts.patience_s
    while len(images) * batch < num:
        noise: list[list[np.ndarray]] = [[], []]
        if own_noise:
            values = rng.normal(size=(batch, settings.model.noise_size))
            noise = [buffers([half]) for half in np.asarray(share(make_key(), values, fxp))]
        name = secrets.token_hex(16)
        with (
            reporter.phase("waiting for images, dealt by", on=DEALER, limit_s=limit),
            ThreadPoolExecutor(len(clients)) as threads,
        ):

            def ask(place: int, name: str = name, noise: Any = noise) -> bytearray:
                request = SampleRequest(
                    session=cluster.session, role=PROVIDER, name=name, size=nbytes(noise[place])
                )
                return clients[place].sample(request, noise[place], results.sizes, limit)[1]

            payloads = list(threads.map(ask, range(len(clients))))
        images.append(results.put_together("images", payloads))
        reporter.set(step=min(num, len(images) * batch))
    save_png(Path(out), np.concatenate(images)[:num], private=False)
    reporter.event("sampled", images=num, out=str(out))
