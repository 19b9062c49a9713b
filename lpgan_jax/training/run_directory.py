"""The directory of a training run: what lies where, and the table of its metrics."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lpgan_jax.common.files import atomic_write, private_directory, private_open
from lpgan_jax.training import checkpoint
from lpgan_jax.training.config import ProgramConfig, Settings, TrainConfig, dump, load_run

if TYPE_CHECKING:  # which would import JAX
    from lpgan_jax.programs import Row, Training

Servers = Literal["simulated", "together", "apart", "none"]
"""Where the servers were: in one process, on one machine, elsewhere (so that only SP's results are
in a directory), or nowhere: there was no sharing."""

_README = """\
A training run of lpgan_jax.

    config.yaml    what was run
    metrics.csv    what SP was told of steps, such as losses, and speed
    samples/       answers to the same question on the way, such as grids of generated images
    summary.json   how the run ended
"""
_SHARES = """\
    data.sha256    by which the training data are known again
    checkpoints/   s1/ and s2/: the servers' shares of everything secret

Keep this directory as private as the training data. The run was SIMULATED: one machine played
both servers, so both servers' shares lie here, and whoever reads s1/ and s2/ can add them up and
reconstruct the parameters. In a deployment each server has only its own share.
"""
_SHARES_TOGETHER = """\
    parameters.msgpack    what SP got, in the format of `lpgan export`
    checkpoints/   s1/ and s2/: the servers' shares of everything secret
    results/       the servers' shares of what SP put together
    received.json  up to which result SP has put them together
    cluster/       the configuration and certificates
    logs/          what each role did
    session-*.json, private-ds.json, *.lock    what each role must remember

Keep this directory as private as the training data: all roles were played on one machine, to try
a cluster out, so both servers' shares lie here, and whoever reads them can add them up.
"""
_SHARES_APART = """\
    parameters.msgpack    what SP got, in the format of `lpgan export`
    received.json         up to which result it has those of the servers

Keep this directory as private as the training data: it holds what SP put together from the shares
of two servers.
"""
_NO_SHARES = """\
    parameters.msgpack    what was learnt, as `lpgan export` writes it

The run was in the clear, on plaintext integers or floats: nothing was shared.
"""
_WHERE: dict[Servers, str] = {
    "simulated": _SHARES,
    "together": _SHARES_TOGETHER,
    "apart": _SHARES_APART,
    "none": _NO_SHARES,
}


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run. Make one with `create` or `open`."""

    path: Path

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Settings,
        *,
        servers: Servers = "simulated",
    ) -> RunDirectory:
        """Start a run in a new or empty directory, and write its configuration and a README.

        The directory becomes private, and so is all that is written there.

        Args:
            path: the directory.
            config: of the run.
            servers: where they are, which the README explains.

        Raises:
            FileExistsError: there is something already.
            PermissionError: it is a symbolic link, or belongs to someone else.
            OSError: the directory cannot be written.
        """
        path = Path(path)
        _require_empty(path)
        private_directory(path)
        _require_empty(path)  # still: others may have been able to write there until now
        run = cls(path)
        readme = _README + _WHERE[servers]
        atomic_write(path / "README.txt", readme.encode())
        atomic_write(run.config_file, dump(config).encode())
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Return the run in an existing directory.

        Raises:
            FileNotFoundError: there is no run.
        """
        run = cls(Path(path))
        if not run.config_file.is_file():
            raise FileNotFoundError(f"{path}: not a run directory, expected a config.yaml in it")
        return run

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """`open`, to go on with the run; makes the directory private.

        Raises:
            FileNotFoundError: there is no run.
            PermissionError: it is a symbolic link, or belongs to someone else.
        """
        run = cls.open(path)
        private_directory(run.path)
        return run

    def config(self) -> Settings:
        """Read the configuration of the run.

        Raises:
            FileNotFoundError: it is gone.
            ConfigError: it was changed into something invalid.
        """
        return load_run(self.config_file)

    def gan_config(self) -> TrainConfig:
        """The same, of a GAN's run.

        Raises:
            ValueError: it is a program's.
        """
        settings = self.config()
        if isinstance(settings, ProgramConfig):
            raise ValueError(
                f"{self.path}: a run of {settings.program}, expected one of a GAN: `lpgan ask` asks"
                " programs"
            )
        return settings

    @property
    def config_file(self) -> Path:
        """The configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """The table that `Metrics` writes."""
        return self.path / "metrics.csv"

    @property
    def ledger_file(self) -> Path:
        """How many noised steps were begun."""
        return self.path / "spent.json"

    @property
    def data_file(self) -> Path:
        """A digest of the training data, by which they are known again."""
        return self.path / "data.sha256"

    @property
    def summary_file(self) -> Path:
        """How the run ended, JSON."""
        return self.path / "summary.json"

    @property
    def parameters_file(self) -> Path:
        """What a run without shares leaves: its parameters, Flax's msgpack."""
        return self.path / "parameters.msgpack"

    @property
    def received_file(self) -> Path:
        """Up to which result SP of a cluster has them, JSON."""
        return self.path / "received.json"

    @property
    def checkpoints(self) -> Path:
        """Where `checkpoint.save(run.path, ...)` puts the servers' shares."""
        return self.path / checkpoint.DIRECTORY

    def summary(self) -> dict[str, Any]:
        """How the run ended; empty as long as it has not.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.summary_file.exists():
            return {}
        try:
            return dict(json.loads(self.summary_file.read_bytes()))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{self.summary_file}: damaged, expected a JSON object") from None

    def finished(self, steps: int) -> str | None:
        """What to say where nothing is left to do of so many steps; None where something is.

        Raises:
            ValueError: more are done, or the summary is damaged.
        """
        done = checkpoint.latest_step(self.path) or 0
        if steps < done:
            raise ValueError(f"steps: {steps} given, and {done} are done: expected more")
        if done < steps or self.summary().get("steps") != steps:
            return None
        return f"nothing to do: all {steps} steps are done (more of them: --steps)"

    def sample_file(self, step: int, suffix: str) -> Path:
        """The sample after a step."""
        return self.path / "samples" / f"step_{step:06d}{suffix}"


def _require_empty(path: Path) -> None:
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(
            f"{path}: exists and is not empty, expected a new directory: "
            f"go on with that run by --resume, or choose another --out"
        )


class Metrics:
    """Appends rows to a CSV file: each is in the file when `append` returns.

    Args:
        path: the file; made if it is not there.
        last_step: the step that the run starts from or resumes at. Later rows are dropped, because
            those steps will be run again, and so is a last line that a crash cut short.
        training: whose.

    Raises:
        ValueError: the file is not such a table; the message names the file and the line.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], last_step: int, training: Training) -> None:
        self._path, self._training = Path(path), training
        speed = f"{training.examples}_per_s"
        self.columns = ("step", *training.columns, "seconds", speed)
        kept = [row for row in self._read() if int(row[0]) <= last_step]
        table = "".join(_line(*row) for row in [self.columns, *kept])
        atomic_write(self._path, table.encode())

    def append(self, step: int, row: Row, seconds: float) -> None:
        """Add a row; what is not opened is None and stays empty."""
        told = [row[column] for column in self._training.columns]
        values = (step, *told, seconds, self._training.batch_size / seconds)
        with private_open(self._path, "ab") as file:
            file.write(_line(*("" if value is None else value for value in values)).encode())

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        with private_open(self._path, "ab") as file:
            os.fsync(file.fileno())

    def last(self) -> tuple[dict[str, float | None], list[float]]:
        """The last row as `append` took it, and the seconds of all rows."""
        rows = self._read()
        told = [float(value) if value else None for value in rows[-1][1:-2]] if rows else None
        columns = self._training.columns
        row = dict.fromkeys(columns) if told is None else dict(zip(columns, told, strict=True))
        return row, [float(row[-2]) for row in rows]

    def _read(self) -> list[list[str]]:
        """Return the whole rows, without the header."""
        text = self._path.read_bytes().decode(errors="replace") if self._path.exists() else ""
        if not text:
            return []
        *lines, _ = text.split("\n")  # what follows the last newline was cut short
        rows = [line.split(",") for line in lines]
        if rows[:1] != [[*self.columns]]:
            raise ValueError(f"{self._path}: line 1: expected the columns {','.join(self.columns)}")
        for number, row in enumerate(rows[1:], start=2):
            if len(row) != len(self.columns) or not row[0].isdecimal():
                raise ValueError(f"{self._path}: line {number}: expected a step and its metrics")
        return rows[1:]


def _line(*values: object) -> str:
    return ",".join(map(str, values)) + "\n"
