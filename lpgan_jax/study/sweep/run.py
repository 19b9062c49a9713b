"""Running a sweep: a process for each kind of run, so that a crash loses one cell."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lpgan_jax.common.files import atomic_write, use_compilation_cache
from lpgan_jax.common.tables import Row, write_csv
from lpgan_jax.study.quality import MEASURES
from lpgan_jax.study.sweep.cells import cached_judge, run_cell
from lpgan_jax.study.sweep.plan import FIELDS, Cell, Variant, settings_of, variants
from lpgan_jax.training import config
from lpgan_jax.training.config import SweepConfig, TrainConfig

_VARIANT = (*FIELDS, "seed")
TABLES = {
    "training": (
        *_VARIANT,
        "step",
        "loss_d",
        "loss_g",
        *MEASURES,
        "distance",
        "distance_lsb",
    ),
    "gradients": (*_VARIANT, "network", "parameter", "relative_error"),
    "layers": (
        *_VARIANT,
        "place",
        "scale",
        "low",
        "high",
        "bits_left",
        "lost_rms",
        "lost_max",
    ),
    "protocols": (*_VARIANT, "protocol", "error_rms", "error_max"),
    "times": (*_VARIANT, "seconds_per_step", "cell_seconds"),
}
"""The CSV files of a sweep, and their columns. All but `times` depend on the seeds alone."""


def run_sweep(
    sweep: SweepConfig,
    out: str | os.PathLike[str],
    workers: int | None = None,
    report: Callable[[str], None] = print,
) -> list[str]:
    """Run what is not done yet of a sweep, then write its tables.

    Each cell is a run of one kind with one seed. A finished one is a file in `out`/cells, so that
    an interrupted sweep goes on where it was; a cell whose process died is reported and left out,
    and tried again by the next call.

    Args:
        sweep: the study.
        out: the directory; new, empty, or of the same sweep.
        workers: processes at once; by default one for each core.
        report: receives lines of text.

    Returns:
        What went wrong, a line for each cell that failed.

    Raises:
        FileExistsError: the directory holds something else.
        ValueError, FileNotFoundError: the base configuration is not valid, or has no data.
    """
    out = Path(out)
    kinds = variants(sweep)
    # A mistake should show at once, not in each process; and the classifier is trained once.
    resolved = {variant.name: settings_of(sweep, variant) for variant in kinds}
    cached_judge(next(iter(resolved.values())).data, sweep.num_images)
    _claim(out, sweep, resolved)
    cells = [Cell(variant, seed) for variant in kinds for seed in sweep.seeds]
    missing = [cell for cell in cells if not _file(out, cell).is_file()]
    if len(missing) < len(cells):
        report(f"{len(cells) - len(missing)} of {len(cells)} cells are there already")
    failures = _run_all(sweep, out, missing, len(cells), workers or os.cpu_count() or 1)
    done = [cell for cell in cells if _file(out, cell).is_file()]
    _write_tables(out, done)
    lines = [f"{name}: {reason}" for name, reason in failures.items()]
    for line in lines:
        report(f"FAILED {line}")
    return lines


def _file(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.name}.json"


def _claim(out: Path, sweep: SweepConfig, resolved: dict[str, TrainConfig]) -> None:
    """Write the sweep's and its runs' configurations into its directory, or find them there."""
    runs = {name: settings.model_dump() for name, settings in resolved.items()}
    wanted = {"sweep.yaml": config.dump(sweep), "runs.json": json.dumps(runs, indent=1) + "\n"}
    found = {name: (out / name).read_text() for name in wanted if (out / name).is_file()}
    if found == wanted:
        return
    if found or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(
            f"{out}: holds another sweep, one whose base configuration was another, or something "
            "else; expected a new directory or this sweep"
        )
    for name in sorted(wanted):
        atomic_write(out / name, wanted[name].encode(), private=False)


def _write_tables(out: Path, cells: list[Cell]) -> None:
    tables: dict[str, list[Row]] = {name: [] for name in TABLES}
    for cell in cells:
        for name, rows in json.loads(_file(out, cell).read_text()).items():
            tables[name] += rows
    for name, fields in TABLES.items():
        write_csv(out / f"{name}.csv", tables[name], fields)


# Processes ----------------------------------------------------------------------------------------


class _Bar:
    """Cells done and failed, and the remaining time."""

    def __init__(self, missing: int, total: int) -> None:
        self._missing, self._total, self._started = missing, total, time.time()
        console = Console(file=sys.stderr)
        self._terminal = console.is_terminal
        self._bar = Progress(
            TextColumn("cells"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"),
            console=console,
            disable=not self._terminal,
            speed_estimate_period=3600,
        )
        self._task = self._bar.add_task("", total=total, completed=total - missing, last="")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def ended(self, count: int, last: str) -> None:
        """So many of the missing cells have ended."""
        self._bar.update(self._task, completed=self._total - self._missing + count, last=last)
        if not self._terminal:
            left = (time.time() - self._started) / count * (self._missing - count)
            print(
                f"{count}/{self._missing} cells  {left:.0f} s left  {last}",
                file=sys.stderr,
                flush=True,
            )


def _run_all(
    sweep: SweepConfig, out: Path, missing: list[Cell], total: int, workers: int
) -> dict[str, str]:
    """Run the missing cells; {cell: why it failed}."""
    waiting = _turns(missing, workers)
    failures: dict[str, str] = {}
    free = _shares_of_cores(workers)
    running: list[tuple[BaseProcess, list[Cell], set[int]]] = []
    os.environ["PYTHONSAFEPATH"] = "1"  # cells take no code from the directory we are in
    context = multiprocessing.get_context("spawn")  # JAX has threads, which do not survive a fork
    ended = 0
    with _Bar(len(missing), total) as bar:
        try:
            while waiting or running:
                while waiting and free:
                    cells, cores = waiting.pop(0), free.pop()
                    with_errors = [cell.seed == sweep.seeds[0] for cell in cells]
                    arguments = (sweep, cells, with_errors, out / "cells", cores)
                    process: BaseProcess = context.Process(target=_work, args=arguments)
                    process.start()
                    running.append((process, cells, cores))
                time.sleep(0.2)
                for entry in [entry for entry in running if not entry[0].is_alive()]:
                    process, cells, cores = entry
                    running.remove(entry)
                    free.append(cores)
                    rest = [cell for cell in cells if not _file(out, cell).is_file()]
                    if rest:  # it ended in the first of them; the others get a process of their own
                        failures[rest[0].name] = _reason(out, rest[0], process.exitcode)
                        waiting += _turns(rest[1:], workers)
                done = [cell for cell in missing if _file(out, cell).is_file()]
                if len(done) + len(failures) > ended:
                    ended = len(done) + len(failures)
                    bar.ended(
                        ended,
                        max(done, key=lambda c: _file(out, c).stat().st_mtime).name if done else "",
                    )
        finally:
            for process, *_ in running:
                process.terminate()
    return failures


_TURNS = 4  # of each worker, at least: few starts of processes, and nobody waits long at the end


def _turns(cells: list[Cell], workers: int) -> list[list[Cell]]:
    """Groups of cells for one process each: of one variant, whose programs are in the cache."""
    most = -(-len(cells) // (_TURNS * workers)) or 1
    by_variant: dict[Variant, list[Cell]] = {}
    for cell in cells:
        by_variant.setdefault(cell.variant, []).append(cell)
    return [
        group[start : start + most]
        for group in by_variant.values()
        for start in range(0, len(group), most)
    ]


def _shares_of_cores(workers: int) -> list[set[int]]:
    """The cores of each worker; empty sets where the system does not let us choose."""
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(workers)]
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::workers]) or {cores[i % len(cores)]} for i in range(workers)]


def _work(
    sweep: SweepConfig, cells: list[Cell], with_errors: list[bool], folder: Path, cores: set[int]
) -> None:
    """A worker process: the cells of one variant."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX starts its threads
    use_compilation_cache()
    for cell, errors in zip(cells, with_errors, strict=True):
        error_file = folder / f"{cell.name}.error"
        error_file.unlink(missing_ok=True)
        try:
            run_cell(sweep, cell, folder, errors)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}\n"
            atomic_write(error_file, reason.encode(), private=False)
            traceback.print_exc()
            sys.exit(1)


def _end_with_parent() -> None:
    """Whatever ends the parent, no worker goes on for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _reason(out: Path, cell: Cell, exit_code: int | None) -> str:
    file = out / "cells" / f"{cell.name}.error"
    if file.is_file():
        return file.read_text().strip()
    return f"its process ended with exit code {exit_code}"
