"""The commands: a role on this machine, or all of them for a try-out."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lpgan_jax.cluster.certificates import load_identity, make_certificates
from lpgan_jax.cluster.display import Display
from lpgan_jax.cluster.settings import (
    DEALER,
    PROVIDER,
    SERVERS,
    ClusterConfig,
    load_cluster,
    require_role,
)
from lpgan_jax.cluster.supervisor import Supervisor
from lpgan_jax.cluster.worker import Job
from lpgan_jax.common.files import atomic_write
from lpgan_jax.training import config
from lpgan_jax.training.building import batches_of, training_of
from lpgan_jax.training.config import ConfigError, ProgramConfig, Settings, TrainConfig
from lpgan_jax.training.private import resolved
from lpgan_jax.training.run_directory import RunDirectory


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop` inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, lambda *_: stop()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def play(job: Job) -> int:
    """Play one role until it is done, or ended by SIGINT or SIGTERM.

    Returns:
        0: done. 1: it was given up.

    Raises:
        FileNotFoundError, ConfigError, ValueError: the configuration or certificates are wrong.
    """
    cluster = load_cluster(job.cluster)
    load_identity(cluster, require_role(cluster, job.role))
    with Display([job.role]) as display:
        supervisor = Supervisor(job, cluster, display.show)
        with _stopped_by_signals(supervisor.stop):
            return supervisor.run()


# All roles on one machine -------------------------------------------------------------------------


def local_cluster(directory: Path, state: str, **fields: Any) -> Path:
    """Make a configuration and certificates for all roles on this machine's loopback.

    Args:
        directory: where to.
        state: the directory of the roles' files, relative to it.
        **fields: of `ClusterConfig`, to change.

    Returns:
        The file of the configuration.
    """
    first, second, line = _free_ports(3)
    cluster = ClusterConfig.model_validate(
        {
            "session": secrets.token_hex(4),
            "servers": {
                "s1": {"host": "127.0.0.1", "port": first},
                "s2": {"host": "127.0.0.1", "port": second},
            },
            "line": {"host": "127.0.0.1", "port": line},
            "certificates": "certificates",
            "state": state,
            **fields,
        }
    )
    make_certificates(directory / "certificates", cluster.roles)
    file = directory / "cluster.yaml"
    atomic_write(file, config.dump(cluster).encode())
    return file


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def up(
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    seed: int | None = None,
    resume: bool = False,
    clients: Sequence[str] = (),
    check: float = 0.05,
) -> int:
    """Train with all four roles as processes of this machine: a try-out of a cluster.

    Args:
        settings: of the training.
        out: the run directory, new or empty unless resuming; it gets what `training.train` leaves,
            `parameters.msgpack`, and `cluster/`, the configuration and certificates.
        seed: as of `training.train`: for experiments only.
        resume: go on with the session in `out`. If all steps are done already, it says so, and
            nothing is written.
        clients: who may ask when training is over; with any, servers and DS go on answering until
            they are interrupted.
        check: the probability with which DS looks at a step of the servers; 0: it does not.

    Returns:
        0: trained, and if there are clients, answered them until it was interrupted. 1: a role was
        given up.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: bad input; nothing is written over.
        KeyboardInterrupt: SIGINT or SIGTERM ended the training.
    """
    out = Path(out)
    if seed is not None:
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        settings = settings.model_copy(update={"seed": seed})
    if isinstance(settings, TrainConfig):
        settings = resolved(settings)
    training = training_of(settings)
    batches_of(settings, training, settings.seed)  # or a clear error, before all
    file = out / "cluster" / "cluster.yaml"
    if resume:
        run = RunDirectory.resume(out)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, expected a run of `lpgan up`")
        if (line := run.finished(training.steps)) and not clients:
            print(line)
            return 0
        if missing := sorted(set(clients) - set(load_cluster(file).clients)):
            raise ValueError(
                f"client: {', '.join(missing)}: of this session are "
                f"{', '.join(load_cluster(file).clients) or 'none'}, expected one of them"
            )
        _take_other_ports(file)
    else:
        RunDirectory.create(out, settings, servers="together")
        module = settings.model.module if isinstance(settings, TrainConfig) else None
        modules = [] if module is None else [module]
        integrity = {"check": check} if check else None
        fields = {"modules": modules, "clients": list(clients), "integrity": integrity}
        local_cluster(file.parent, "..", **fields)
    cluster = load_cluster(file)
    text, path = config.to_json(settings), str(file)
    program = settings.program if isinstance(settings, ProgramConfig) else None
    collect = Job("collect", PROVIDER, path, out=str(out), steps=training.steps, program=program)
    deal = Job("deal", DEALER, path, train=text, seed=seed)
    jobs = [Job("serve", server, path, program=program) for server in SERVERS]
    # The last one's end is the end of all, and DS deals for as long as it is let.
    try:
        return play_all([*jobs, *([collect, deal] if clients else [deal, collect])], cluster)
    except KeyboardInterrupt:
        if clients and RunDirectory.open(out).finished(training.steps):
            return 0
        raise


def _take_other_ports(file: Path) -> None:
    """Others may have the ports by now that were free when the file was made."""
    fields = config.load_yaml(file.read_bytes(), file.name)
    for place, port in zip(
        (*fields["servers"].values(), fields["line"]), _free_ports(3), strict=True
    ):
        place["port"] = port
    atomic_write(file, config.dump(ClusterConfig.model_validate(fields)).encode())


def play_all(jobs: list[Job], cluster: ClusterConfig) -> int:
    """Play several roles until the last one is done, or any was given up.

    Returns:
        The status of the last, or 1.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM ended it.
    """
    statuses: dict[str, int] = {}
    interrupted = threading.Event()
    with Display([job.role for job in jobs]) as display:
        supervisors = [Supervisor(job, cluster, display.show) for job in jobs]

        def stop() -> None:
            for supervisor in supervisors:
                supervisor.stop()

        def run(supervisor: Supervisor, job: Job) -> None:
            statuses[job.role] = 1  # unless it ends otherwise
            try:
                statuses[job.role] = supervisor.run()
            finally:
                if statuses[job.role] or job is jobs[-1]:
                    stop()

        threads = [
            threading.Thread(target=run, args=pair) for pair in zip(supervisors, jobs, strict=True)
        ]

        def interrupt() -> None:
            interrupted.set()
            stop()

        with _stopped_by_signals(interrupt):
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # a join without a limit would keep signals waiting
                    thread.join(0.2)
    if interrupted.is_set():
        raise KeyboardInterrupt
    return max(statuses.values())


def certificates(cluster: str | None, out: str) -> list[str]:
    """Make certificates for a try-out; returns the names that they are for.

    Raises:
        FileExistsError: the directory is not empty.
        ConfigError, FileNotFoundError: the configuration is wrong.
    """
    if cluster is None:
        names = [DEALER, *SERVERS, PROVIDER]
    else:
        settings = load_cluster(cluster)
        names = [settings.certificate_name(role) for role in settings.roles]
        if settings.names:
            raise ConfigError("names: certificates of a try-out have the roles' own names")
    make_certificates(out, names)
    return names
