"""What DS remembers of a session whose servers it checks."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpgan_jax.cluster.reporting import BadInput
from lpgan_jax.cluster.settings import DEALER, ClusterConfig
from lpgan_jax.common.files import atomic_write


class Deviation(BadInput):
    """A server did something else than its program.

    Attributes:
        server: which one.
    """

    def __init__(self, server: str, what: str) -> None:
        super().__init__(f"{server} deviated: {what}")
        self.server = server


class Record:
    """DS's file of a session: the checkpoints that it has checked, and whether it caught a server.

    Attributes:
        caught: who, and how; None if nobody was.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        """Reads it. BadInput: it is of another session, or a server was caught."""
        self._cluster = cluster
        self._file = Path(cluster.state) / f"checks-{DEALER}.json"
        self._saves: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self.caught: str | None = None
        if self._file.exists():
            kept = json.loads(self._file.read_bytes())
            if kept["session"] != cluster.session:
                raise BadInput(f"{self._file}: of another session: expected a directory of its own")
            self._saves, self.caught = kept["saves"], kept["caught"]
        if self.caught is not None:
            raise BadInput(f"this session is over: {self.caught}")

    def add(self, save: str, digests: Sequence[bytes]) -> None:
        """A checkpoint of a state that was checked."""
        with self._lock:
            self._saves[save] = [d.hex() for d in digests]
            self._write()

    def of(self, save: str) -> list[bytes]:
        """Digests of both shares of a checkpoint. BadInput: DS did not check it."""
        if save not in self._saves:
            raise BadInput(
                f"{self._file}: knows nothing of the checkpoint that both servers have, which DS "
                "then cannot check: begin another session"
            )
        return [bytes.fromhex(d) for d in self._saves[save]]

    def catch(self, reason: str, evidence: dict[str, Any], name: str) -> Path:
        """A server was caught: keep what shows it."""
        with self._lock:
            self.caught = reason
            self._write()
        file = Path(self._cluster.state) / f"evidence-{DEALER}-{name}.json"
        atomic_write(file, json.dumps(evidence, indent=2, default=bytes.hex).encode())
        return file

    def _write(self) -> None:
        kept = {"session": self._cluster.session, "saves": self._saves, "caught": self.caught}
        atomic_write(self._file, json.dumps(kept).encode())
