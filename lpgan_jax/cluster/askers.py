"""Questions to what was trained: SP, or a client, shares one and alone gets the answer.

Neither server sees model, question or answer; DS deals for the answer, and sees none of them.
"""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from lpgan_jax.cluster.client import Client
from lpgan_jax.cluster.parcels import Payloads, halves
from lpgan_jax.cluster.provider import connect, put_together, size_of_half
from lpgan_jax.cluster.reporting import BadInput, Reporter, reading_input
from lpgan_jax.cluster.settings import DEALER, PROVIDER, ClusterConfig
from lpgan_jax.cluster.vouchers import require_vouched, verifier_of
from lpgan_jax.cluster.wire import Question, Result, nbytes
from lpgan_jax.common.files import atomic_write
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.mpc.share_trees import share_arrays
from lpgan_jax.programs import SecureProgram, secured, shapes
from lpgan_jax.programs.training import npy
from lpgan_jax.training.building import of_class


class Asker:
    """A role's lines to both servers of one cluster, for questions.

    Attributes:
        training: what was trained.
    """

    def __init__(
        self, cluster: ClusterConfig, role: str, program_file: str | None, reporter: Reporter
    ) -> None:
        """Connects; waits until there is a training.

        Args:
            cluster: whose servers have trained.
            role: who asks.
            program_file: its own copy, if a program is trained.
            reporter: for reports.

        Raises:
            Lost: a server is gone.
            BadInput: this role has another program; names where it differs.
        """
        self._cluster, self._role, self._reporter = cluster, role, reporter
        self._clients, _, self.training = connect(cluster, role, program_file, reporter)
        self._program: SecureProgram = secured(self.training.program)
        self._verifier = verifier_of(cluster, role)

    def ask(self, name: str, question: Any) -> Any:
        """The answer to a question of any number of rows, float64.

        Rows go in parts of as many as the program says, the last filled up with zeros.

        Raises:
            Lost: a server, or DS, is not there.
            RefusedBy: a server refuses; says why.
            BadInput: the question has other shapes, or a value is out of range.
        """
        with reading_input():
            _, answer = self.training.program.answer_named(name)
            question = jax.tree.map(np.asarray, question)
            self._program.check_rows(name, question)
            count = shapes.rows_of(question)
            at_once = shapes.rows_of(answer.question)
        parts = []
        self._reporter.set(step=0, steps=count)
        for start in range(0, count, at_once):
            part = jax.tree.map(lambda x: _rows(x, start, at_once), question)  # noqa: B023
            with reading_input():
                self._program.check_question(name, part)
            scales = self._program.question_scales(name, part)
            parts.append(self._one(name, halves(share_arrays(make_key(), part, scales))))
            self._reporter.set(step=min(count, start + at_once))
        return jax.tree.map(lambda *rows: np.concatenate(rows)[:count], *parts)

    def ask_of_dealer(self, name: str) -> Any:
        """The answer to a new question of DS's, as of the sample, which only SP may have."""
        return self._one(name, [[], []])

    def _one(self, name: str, shared: Payloads) -> Any:
        request, limit = secrets.token_hex(16), self._cluster.timeouts.patience_s
        if self._verifier is not None:
            limit += self._cluster.timeouts.start_s
        of = shapes.answer_shapes(self._program, name)

        def ask(client: Client, payload: list[np.ndarray]) -> tuple[Result, bytearray]:
            question = Question(
                session=self._cluster.session,
                role=self._role,
                name=request,
                answer=name,
                size=nbytes(payload),
            )
            return client.ask(question, payload, size_of_half(of), limit)

        phase = self._reporter.phase("waiting for an answer, dealt by", on=DEALER, limit_s=limit)
        with phase, ThreadPoolExecutor(len(self._clients)) as threads:
            heads, payloads = zip(*threads.map(ask, self._clients, shared), strict=True)
        if self._verifier is not None and shared == [[], []]:  # DS knows its own questions alone
            require_vouched(self._verifier, heads, payloads)
        return put_together(of, [*payloads])


def _rows(array: np.ndarray, start: int, count: int) -> np.ndarray:
    """So many rows from a place on, zeros where there are no more."""
    part = array[start : start + count]
    missing = np.zeros((count - len(part), *array.shape[1:]), array.dtype)
    return np.concatenate([part, missing])


def ask(
    cluster: ClusterConfig,
    role: str,
    program_file: str | None,
    name: str | None,
    path: str,
    out: str,
    as_text: bool,
    reporter: Reporter,
) -> None:
    """Ask what a file says, and write the answer.

    Args:
        cluster: whose servers have trained.
        role: who asks.
        program_file: its own copy, if a program is trained.
        name: of the answer; None of the only one.
        path: of the question.
        out: the file.
        as_text: as `Answer.show` shows it, instead of .npy (.npz of several arrays).
        reporter: for reports.

    Raises:
        Lost, RefusedBy, BadInput: as `Asker`.
    """
    asker = Asker(cluster, role, program_file, reporter)
    with reading_input():
        name, answer = asker.training.program.answer_named(name)
        question = answer.read(path)
    found = asker.ask(name, question)
    # What is shown is for nobody's log, nor anybody else's eyes.
    atomic_write(out, answer.show(found).encode() if as_text else npy(found), private=as_text)
    reporter.event("answered", answer=name)


def sample(
    cluster: ClusterConfig,
    num: int,
    out: str,
    program_file: str | None,
    reporter: Reporter,
    *,
    own: bool = False,
    seed: int | None = None,
    label: int | None = None,
) -> None:
    """Be SP and have the training's sample answered anew, for a file such as a grid of images.

    Args:
        cluster: whose servers have trained.
        num: how many rows.
        out: the file.
        program_file: SP's own copy, if a program is trained.
        reporter: for reports.
        own: whether SP draws the question; else DS does, and SP does not know it.
        seed: fixes SP's own.
        label: of SP's own, a class that all images are of.

    Raises:
        Lost, RefusedBy, BadInput: as `Asker`.
    """
    asker, rng = Asker(cluster, PROVIDER, program_file, reporter), np.random.default_rng(seed)
    wanted = asker.training.sample
    if wanted is None:
        raise BadInput("sample: the program has none")
    parts: list[Any] = []
    count = 0
    while count < num:
        if own:
            with reading_input():
                question = wanted.question(rng)
                question = question if label is None else of_class(question, label)
            parts.append(asker.ask(wanted.answer, question))
        else:
            parts.append(asker.ask_of_dealer(wanted.answer))
        count += shapes.rows_of(parts[-1])
        reporter.set(step=min(num, count), steps=num)
    rows = jax.tree.map(lambda *rows: np.concatenate(rows)[:num], *parts)
    atomic_write(out, wanted.file(rows), private=False)
    reporter.event("sampled", rows=num, out=out)
