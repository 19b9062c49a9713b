"""What DS looks at together: a step, and what follows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from lpgan_jax.cluster.dealer import Order
from lpgan_jax.cluster.wire import Commitment, Opened
from lpgan_jax.training.tasks import Task


@dataclass
class Unit:
    """A step, and what follows it up to the next one.

    Attributes:
        tasks: with their serials.
        save: the name of a checkpoint, if one is among them.
        orders: as they were dealt, by their serials.
        said: what servers said of each task, by serial: S1, S2, or None where one did not.
        opened: likewise of alarms.
        confirmed: whether the servers were told to open an alarm.
        chosen: whether DS looks at it; None before it is decided.
    """

    tasks: dict[int, Task]
    save: str | None = None
    orders: dict[int, Order] = field(default_factory=dict)
    said: dict[int, list[Commitment | None]] = field(default_factory=dict)
    opened: dict[int, list[Opened | None]] = field(default_factory=dict)
    confirmed: bool = False
    chosen: bool | None = None

    @property
    def last(self) -> int:
        """Serial of its last task."""
        return max(self.tasks)

    def of_kind(self, *kinds: str) -> list[int]:
        """Serials of its tasks of some kinds."""
        return [serial for serial, task in self.tasks.items() if task.kind in kinds]

    @property
    def results_at_once(self) -> bool:
        """Whether something follows from it at once that is more than losses."""
        seen = self.confirmed and not self.opened_by_both  # by one, which then left
        return bool(self.of_kind("answer", "checkpoint", "finish")) or self.alarm or seen

    @property
    def opened_by_both(self) -> bool:
        """Whether both servers say how an alarm was opened."""
        return all(all(self.opened.get(serial, [None])) for serial in self.of_kind("guard"))

    @property
    def alarm(self) -> bool:
        """Whether the servers opened an alarm."""
        return any(
            (of.own.share + of.other.share) % 2**64 != 0
            for both in self.opened.values()
            for of in both
            if of is not None
        )


def units(tasks: Iterator[Task]) -> Iterator[list[Task]]:
    """The tasks of a training, in units.

    A checkpoint, which waits for the check, is the last of its unit.
    """
    unit: list[Task] = []
    for task in tasks:
        if task.kind in ("train", "finish") and unit:
            yield unit
            unit = []
        unit.append(task)
    yield unit
