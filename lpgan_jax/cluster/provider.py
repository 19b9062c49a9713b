"""SP: it pulls shares of results from both servers, and puts them together.

What it has is in its directory, and whenever it connects it asks for what comes after that. About
once a second it tells the servers what is safely on its disk, and they drop it.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lpgan_jax.cluster.certificates import load_identity
from lpgan_jax.cluster.client import Client
from lpgan_jax.cluster.collection import Collection
from lpgan_jax.cluster.owners import require_same_functions
from lpgan_jax.cluster.reporting import BadInput, Lost, Reporter, reading_input
from lpgan_jax.cluster.settings import (
    PROVIDER,
    SERVERS,
    ClusterConfig,
    changed_field,
    with_own_code,
)
from lpgan_jax.cluster.signatures import Verifier
from lpgan_jax.cluster.vouchers import require_vouched, verifier_of
from lpgan_jax.cluster.wire import Description, Layout, Received, Result, half_shapes
from lpgan_jax.common.files import atomic_write
from lpgan_jax.mpc.share_trees import reveal_tree
from lpgan_jax.programs import Training, agreement, secured, shapes
from lpgan_jax.training import config
from lpgan_jax.training.building import training_of
from lpgan_jax.training.config import Settings
from lpgan_jax.training.run_directory import RunDirectory
from lpgan_jax.training.tasks import require_in_range


class Results:
    """What a result of each kind is, and how its two shares are put together."""

    def __init__(self, training: Training) -> None:
        self._program = program = secured(training.program)
        self._shapes: dict[str, Any] = {
            "step": (),
            "told": shapes.told_shapes(program),
            "learnt": shapes.learnt_shapes(program),
        }
        if training.sample is not None:
            self._shapes["answer"] = shapes.answer_shapes(program, training.sample.answer)
        self._sizes = {kind: size_of_half(of) for kind, of in self._shapes.items()}

    def size_of(self, kind: str) -> int | None:
        """Bytes of one server's share; None if there is no such kind."""
        if kind == "alarm" and kind not in self._sizes:  # takes seconds, and is rarely asked
            self._shapes[kind] = shapes.alarm_shapes(self._program)
            self._sizes[kind] = size_of_half(self._shapes[kind])
        return self._sizes.get(kind)

    def put_together(self, kind: str, payloads: list[bytearray]) -> Any:
        """The result, as float64 arrays, from S1's and S2's share."""
        return put_together(self._shapes[kind], payloads)

    def outside(self, payloads: list[bytearray]) -> list[str]:
        """The tensors that an alarm is about."""
        outside = self._program.out_of_range(self.put_together("alarm", payloads))
        return [str(of) for of in outside]


def size_of_half(of: Any) -> int:
    """Bytes of one server's shares of a pytree of shapes."""
    return Layout.of(half_shapes(of)).size


def put_together(of: Any, payloads: list[bytearray]) -> Any:
    """Float64 arrays of shared shapes, from S1's and S2's share."""
    layout = Layout.of(half_shapes(of))
    both = [layout.split(payload) for payload in payloads]
    paired = [np.stack(halves) for halves in zip(*both, strict=True)]
    return reveal_tree(jax.tree.unflatten(jax.tree.structure(of), paired))


def connect(
    cluster: ClusterConfig, role: str, program_file: str | None, reporter: Reporter
) -> tuple[list[Client], Settings, Training]:
    """Lines to both servers, once there is a training, and what is trained.

    Raises:
        Lost: a server is gone.
        BadInput: this role has another program; names where it differs.
    """
    identity = load_identity(cluster, role)
    clients = [Client(cluster, identity, role, server, reporter) for server in SERVERS]
    known: list[Description] = []
    for client in clients:
        with reporter.phase("looking for", on=client.server, limit_s=cluster.timeouts.patience_s):
            client.wait_until(lambda d: True)
        with reporter.phase("waiting for a training at", on=client.server, limit_s=None):
            known.append(client.wait_until(lambda d: d.config is not None, patient=True))
    if known[0].config != known[1].config:
        raise Lost("s2", "its configuration of the training is not the one of s1")
    with reading_input():
        came = config.from_json(str(known[0].config), "the servers' configuration")
        settings = with_own_code(cluster, came, program_file)
        training = training_of(settings)
        own = agreement.short(agreement.digests_of(training))
    for description in known:
        require_same_functions(description, own)
    return clients, settings, training


# The results of a training ------------------------------------------------------------------------


def collect(
    cluster: ClusterConfig,
    out: str | os.PathLike[str],
    reporter: Reporter,
    steps: int | None = None,
    program_file: str | None = None,
) -> None:
    """Pull results into a run directory; returns when what was learnt is there.

    Args:
        cluster: whose servers train.
        out: the directory.
        reporter: for reports.
        steps: that the training has; by default, as many as the servers know of. With it, SP waits
            for DS to go on with a training that was finished at fewer.
        program_file: SP's own copy, if a program is trained.

    Raises:
        Lost: a server is gone.
        BadInput, FileExistsError: the directory has another run in it.
    """
    while not _collect_from_both(cluster, Path(out), reporter, steps, program_file):
        reporter.event("results begin again")


def _collect_from_both(
    cluster: ClusterConfig,
    out: Path,
    reporter: Reporter,
    steps: int | None,
    program_file: str | None,
) -> bool:
    """Take results; False if a new attempt began meanwhile, which computes some again."""
    clients, settings, training = connect(cluster, PROVIDER, program_file, reporter)
    if steps is not None:  # what the servers know may be of a training that is about to go on
        settings = settings.model_copy(update={"steps": steps})
        training = replace(training, steps=steps)
    try:
        run = _run_directory(out, settings)
        with reading_input():
            collection = Collection(run, cluster.session, training, reporter)
        verifier = verifier_of(cluster, PROVIDER)
        return _collect(clients, training, run, collection, reporter, verifier)
    finally:
        for client in clients:
            client.close()


def _collect(
    clients: list[Client],
    training: Training,
    run: RunDirectory,
    collection: Collection,
    reporter: Reporter,
    verifier: Verifier | None,
) -> bool:
    reporter.set(step=collection.received.step, steps=training.steps)
    results, sample = Results(training), training.sample
    pairs, known = _Pairs(clients, results, collection.received), False
    started = told_at = time.monotonic()
    while True:
        with reporter.phase("waiting for results of", on="s1", limit_s=None):
            pair = pairs.next()
        if pair is None:
            return False
        heads, payloads = pair
        head = heads[0]
        if verifier is not None:
            require_vouched(verifier, heads, payloads)
        if head.kind == "learnt":  # servers are never told that it is here, and keep it
            if head.step < training.steps:
                continue
            break
        collection.take(head)
        if head.kind == "answer":
            assert sample is not None
            file = sample.file(results.put_together("answer", payloads))
            atomic_write(run.sample_file(head.step, sample.suffix), file)
            reporter.set(step=head.step)
        elif head.kind == "alarm":
            outside = results.outside(payloads)
            reporter.event("out of range", step=head.step, tensors=", ".join(outside))
            with suppress(Exception):  # the servers end once they know, or without
                _tell(clients, collection)
            with reading_input():
                require_in_range(outside, head.step)
        else:
            told = head.kind == "told"
            row = training.row(results.put_together("told", payloads)) if told else {}
            collection.tell(head, row, max(head.spent for head in heads))
            if not known:  # it takes seconds, and an alarm is not to wait for it
                threading.Thread(target=results.size_of, args=("alarm",), daemon=True).start()
                known = True
            reporter.set(step=head.step, s_per_step=round(head.seconds, 4))
        if time.monotonic() - told_at > _TELL_EVERY_S:
            _tell(clients, collection)
            told_at = time.monotonic()
    _tell(clients, collection)
    collection.take(head)
    learnt = results.put_together("learnt", payloads)
    atomic_write(run.parameters_file, training.save(learnt))
    summary = {
        **collection.row,
        **training.promised(max(head.spent for head in heads)),
        "mode": "two servers",
        "steps": head.step,
        "attempts": head.attempt,
        "seconds": round(time.monotonic() - started, 3),
        "seconds_per_step": round(collection.seconds_per_step, 4),
        "jax": jax.__version__,
    }
    atomic_write(run.summary_file, (json.dumps(summary, indent=2) + "\n").encode())
    reporter.set(step=head.step)
    reporter.event("collected", step=head.step, out=str(run.path))
    return True


_TELL_EVERY_S = 1.0


def _tell(clients: list[Client], collection: Collection) -> None:
    """Have everything on the disk, then let the servers drop it."""
    collection.save()
    for client in clients:
        client.received(collection.received)


def _run_directory(path: Path, settings: Settings) -> RunDirectory:
    """The run's directory, new or as SP left it."""
    if not (path / "config.yaml").exists():
        return RunDirectory.create(path, settings, servers="apart")
    run = RunDirectory.resume(path)
    before = run.config()  # of SP, or on one machine of DS, who knows more
    if (field := changed_field(before.public(), settings.public())) is not None:
        raise BadInput(f"{path}: has another run in it ({field}), expected a new directory")
    kept = {name: getattr(before, name) for name in ("data", "seed")}
    now = settings.model_copy(update=kept)
    atomic_write(run.config_file, config.dump(now).encode())
    return run


class _Pairs:
    """Results of which both servers' shares are there, in order."""

    def __init__(self, clients: list[Client], results: Results, after: Received) -> None:
        self._queues: list[queue.Queue[Any]] = [queue.Queue(16) for _ in clients]
        for client, into in zip(clients, self._queues, strict=True):
            threading.Thread(
                target=self._pull, args=(client, after, results.size_of, into), daemon=True
            ).start()

    @staticmethod
    def _pull(
        client: Client,
        after: Received,
        size_of: Callable[[str], int | None],
        into: queue.Queue[Any],
    ) -> None:
        try:
            for result in client.results(after, size_of):
                into.put(result)
            into.put(None)
        except Exception as error:
            into.put(error)

    def next(self) -> tuple[list[Result], list[bytearray]] | None:
        """The next result's heads, and both shares; None if there are no more."""
        heads = [self._take(index) for index in range(len(self._queues))]
        while None not in heads:
            first, second = (_order(head) for head, _ in heads)
            if first == second:
                return [head for head, _ in heads], [payload for _, payload in heads]
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
