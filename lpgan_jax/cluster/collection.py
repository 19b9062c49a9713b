"""What SP has put together of a training, and up to which result: in its run directory.

Servers drop what SP has on its disk, so it may say so of nothing else. Each step of a training has
one result, so what is missing shows: SP never goes on with a hole in its table.
"""

from __future__ import annotations

import json
import statistics
from collections import deque

from lpgan_jax.cluster.reporting import BadInput, Reporter
from lpgan_jax.cluster.settings import PROVIDER
from lpgan_jax.cluster.wire import Received, Result
from lpgan_jax.common.files import atomic_write
from lpgan_jax.programs import Row, Training
from lpgan_jax.training.config import ConfigError, validated
from lpgan_jax.training.run_directory import Metrics, RunDirectory

_FOR_SPEED = 1000  # last steps


class Collection:
    """A run directory of SP, as it grows.

    Attributes:
        received: up to which result it has them, as of now.
        row: what SP was told of the last step.
    """

    def __init__(
        self, run: RunDirectory, session: str, training: Training, reporter: Reporter
    ) -> None:
        """Goes on from what was `saved`.

        Raises:
            BadInput: the directory has results of another session.
            ConfigError, ValueError: a file in it is damaged.
        """
        self._run, self._training, self._reporter = run, training, reporter
        self.received = Received(session=session, role=PROVIDER, attempt=0, serial=0, step=0)
        if run.received_file.exists():
            self.received = _read(run)
        if self.received.session != session:
            raise BadInput(
                f"{run.path}: has results of session {self.received.session!r}, expected those of "
                f"{session!r}, or a new directory"
            )
        self._metrics = Metrics(run.metrics_file, self.received.step, training)
        self.row, seconds = self._metrics.last()
        self._empty = not seconds
        self._seconds = deque(seconds, _FOR_SPEED)

    def take(self, result: Result) -> None:
        """A result comes. What SP has of later steps is void: it is computed again.

        Raises:
            BadInput: results before it are missing.
        """
        before = result.step - (result.kind in ("told", "step"))
        if before > self.received.step:
            self._miss(before)
        elif before < self.received.step:
            self._metrics = Metrics(self._run.metrics_file, before, self._training)
        self._empty = False
        self.received = self.received.model_copy(
            update={"attempt": result.attempt, "serial": result.serial, "step": result.step}
        )

    def _miss(self, before: int) -> None:
        has = self.received.step
        if not self._empty:
            raise BadInput(
                f"{self._run.path}: has results up to step {has}, and the servers have those after "
                f"step {before}: others were taken to another directory; go on there, or have the "
                "rest in a new one"
            )
        self._reporter.event(
            "warning",
            reason=f"results up to step {before} are not at the servers any more: they were taken "
            "to another directory, and this one begins after them",
        )

    def tell(self, result: Result, row: Row, spent: int) -> None:
        """A step is done.

        Args:
            result: its head.
            row: what SP is told of it, if anything.
            spent: steps with noise that were begun, as of `Training.spent`.
        """
        self._seconds.append(result.seconds)
        self.row |= row
        if self._training.logs_after(result.step) or result.step == 1:
            self.row |= self._training.spent(spent)
            self._metrics.append(result.step, self.row, result.seconds)

    @property
    def seconds_per_step(self) -> float:
        """The median of the last steps."""
        return statistics.median(self._seconds or [0.0])

    def save(self) -> None:
        """Have all that was taken on the disk, and know it after a crash."""
        self._metrics.sync()
        data = json.dumps(self.received.model_dump()).encode()
        atomic_write(self._run.received_file, data)


def _read(run: RunDirectory) -> Received:
    try:
        fields = json.loads(run.received_file.read_bytes())
    except ValueError:
        raise ConfigError(f"{run.received_file}: damaged, expected what SP wrote") from None
    return validated(Received, fields, str(run.received_file))
