"""`lpgan doctor`: looks at all that a session needs, from one role's machine, before there is one.

Whatever is wrong is one finding of its own, and nothing waits without a limit. It reads, asks the
servers what any role may ask, and disturbs nothing: it binds no port that a running server of this
machine may need, and only measures when that does not run. (What a name service takes to answer
has the system's own limit.)
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lpgan_jax import native
from lpgan_jax.analysis.cost import program_cost
from lpgan_jax.cluster.certificates import AUTHORITY, load_identity
from lpgan_jax.cluster.client import Client, RefusedBy
from lpgan_jax.cluster.condition import Condition, own_condition
from lpgan_jax.cluster.findings import Finding
from lpgan_jax.cluster.line import LineBroken
from lpgan_jax.cluster.papers import Validity, look_at_papers
from lpgan_jax.cluster.parcels import Parcels, server_programs
from lpgan_jax.cluster.reporting import Lost, Reporter
from lpgan_jax.cluster.session import TRAIN, Sizes
from lpgan_jax.cluster.settings import (
    DEALER,
    SERVERS,
    Address,
    ClusterConfig,
    ServerName,
    changed_field,
    load_cluster,
    require_role,
)
from lpgan_jax.cluster.trial import Trial, try_line
from lpgan_jax.cluster.wire import Description, Malformed
from lpgan_jax.common.tables import si
from lpgan_jax.programs import Training, agreement, secured, shapes
from lpgan_jax.training.building import training_of
from lpgan_jax.training.config import ConfigError, Settings, from_json

_ANSWER_S = 5.0  # for a connection, and for TLS
_CLOCK_S = 5.0  # by which two clocks may differ without a word
_LITTLE_DISK = 10**9
_LOGS = 10**8  # bytes of what every role writes
_MEMORY = Path("/sys/fs/cgroup/memory.max")


def examine(
    file: str | os.PathLike[str],
    role: str | None = None,
    settings: Settings | None = None,
    *,
    measure: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> list[Finding]:
    """Look at everything.

    Args:
        file: the cluster's configuration.
        role: that this machine plays; by default the one whose key is there.
        settings: of what will be trained, if it is known here.
        measure: whether to try out the line with the other server's doctor (S1 and S2).
        note: told what takes a while.

    Raises:
        ConfigError: it is not clear as whom; or somebody else than a server is to measure.
    """
    try:
        config = load_cluster(file)
    except (ConfigError, OSError) as error:
        return [Finding("failed", "configuration", str(error))]
    role = _only_role(config) if role is None else require_role(config, role)
    if measure and role not in SERVERS:
        raise ConfigError("--measure: of the line between s1 and s2, so at these two only")
    return list(_Doctor(config, role, settings, measure, note).findings())


def _only_role(config: ClusterConfig) -> str:
    """The role whose key is on this machine."""
    keys = [r for r in config.roles if (Path(config.certificates) / f"{r}.key").exists()]
    if len(keys) != 1:
        raise ConfigError(f"--as: expected one of {', '.join(config.roles)}")
    return keys[0]


@dataclass
class _Doctor:
    """At one role's machine."""

    config: ClusterConfig
    role: str
    settings: Settings | None
    measure: bool
    note: Callable[[str], None]
    training: Training | None = None
    functions: dict[str, str] = field(default_factory=dict)
    """Of the program (`agreement.short`); none if there is none."""
    sizes: Sizes | None = None
    """Bytes that a server takes for it; DS's for S2 are the most that it has at hand."""
    validity: Validity | None = None

    @property
    def _server(self) -> ServerName | None:
        """This role, if it is a server."""
        return next((server for server in SERVERS if server == self.role), None)

    @cached_property
    def _serving(self) -> bool:
        """Whether `lpgan serve` runs with this state: its worker holds the lock."""
        try:
            with (Path(self.config.state) / f"{self.role}.lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there is none: it never ran
            return False
        return False

    @cached_property
    def _nobody(self) -> Reporter:
        """Nobody is told how many bytes a client counts."""
        return Reporter(self.role, os.open(os.devnull, os.O_WRONLY))

    def findings(self) -> Iterator[Finding]:
        """What is here first, then what is elsewhere."""
        session = f"session {self.config.session!r}, {len(self.config.roles)} roles"
        yield Finding("OK", "configuration", f"{session}; this is {self.role}")
        now = datetime.datetime.now(datetime.UTC)
        papers, self.validity = look_at_papers(self.config, self.role, now)
        yield from papers
        trusted = all(finding.status != "failed" for finding in papers)
        yield self._versions()
        if self.settings is not None:
            yield self._program(self.settings)
        yield from self._room()
        if (server := self._server) is None:
            for each in SERVERS:
                yield from self._reach(each, trusted)
            return
        address = self.config.address(server)
        yield self._free(f"port {address.port} of {server}", f"servers.{server}", address)
        if not self.measure:
            yield self._line(server)
        elif self._serving:
            found = f"`lpgan serve {server}` runs here, and the line is its own"
            yield Finding("failed", "line", found, mend="stop it to measure")
        elif not trusted:
            found = f"not tried, as {server} cannot show who it is"
            yield Finding("warning", "line", found, mend="mend its certificate first")
        elif server == "s1" and (here := self._line(server)).status == "failed":
            yield here
        else:
            yield from self._trial(server)

    # Here -----------------------------------------------------------------------------------------

    def _versions(self) -> Finding:
        own = own_condition()
        found = f"{own.versions}, code {own.code[:12]}"
        if self.role not in (*SERVERS, *self.config.owners):
            return Finding("OK", "versions", found)
        if native.available():
            return Finding("OK", "versions", f"{found}, native kernels")
        return Finding(
            "warning",
            "versions",
            f"{found}, no native kernels: on a CPU steps take several times as long",
            "a C++ compiler (c++, g++ or clang++), and no LPGAN_NATIVE=0",
        )

    def _program(self, settings: Settings) -> Finding:
        self.note("tracing the program")
        try:
            self.training = training_of(settings)
            self.functions = agreement.short(agreement.digests_of(self.training))
            if self._server or self.role == DEALER:
                program = secured(self.training.program)
                programs = server_programs(program)
                self.sizes = Parcels(program, self._server or "s2", programs).sizes
        except Exception as error:  # of a user's file any
            self.training, self.functions = None, {}
            return Finding("failed", "program", f"{type(error).__name__}: {error}")
        return Finding("OK", "program", f"{len(self.functions)} parts, {self._digest}")

    @property
    def _digest(self) -> str:
        """Of the whole program, short enough to be read out."""
        return agreement.short({"all": repr(sorted(self.functions.items()))})["all"][:12]

    def _room(self) -> Iterator[Finding]:
        """On the disk, and in memory."""
        saved = at_hand = 0
        if self.training is not None and (of := self.sizes) is not None:
            # The one being written comes before the oldest goes.
            saved = (self.training.keep_checkpoints + 1) * of.state if self._server else 0
            # What waits, what comes, and what is worked with.
            steps = self.config.look_ahead + 2
            at_hand = steps * (of.inputs + of.material[TRAIN]) + 3 * of.state
        yield self._disk(saved)
        yield self._memory(at_hand)

    def _disk(self, saved: int) -> Finding:
        check, state = "disk of state", Path(self.config.state)
        there = next(p for p in (state, *state.absolute().parents) if p.exists())
        owner = state.lstat().st_uid if state.exists() or state.is_symlink() else os.geteuid()
        if state.is_symlink() or owner != os.geteuid() or not os.access(there, os.W_OK):
            found = f"{state}: a link, another user's, or not to be written"
            return Finding("failed", check, found, f"a directory of user {os.geteuid()}")
        free, needed = shutil.disk_usage(there).free, saved + _LOGS
        found = f"{si(free, 'B')} free for {state}"
        if free < needed:
            return Finding("failed", check, found, f"{si(needed, 'B')} or more for checkpoints")
        if free < max(_LITTLE_DISK, 2 * needed):
            return Finding("warning", check, found, "more than twice the checkpoints and 1 GB")
        return Finding(
            "OK", check, found + (f", checkpoints take {si(saved, 'B')}" if saved else "")
        )

    def _memory(self, at_hand: int) -> Finding:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with suppress(OSError, ValueError):  # no limit
            memory = min(memory, int(_MEMORY.read_text()))
        found = si(memory, "B")
        if not at_hand:
            return Finding("OK", "memory", found)
        found += f"; randomness and state take {si(at_hand, 'B')}, and a step's own values beyond"
        mend = "a smaller batch_size, or look_ahead: 1"
        if at_hand > memory:
            return Finding("failed", "memory", found, "less than all of it", mend)
        if 2 * at_hand > memory:
            return Finding("warning", "memory", found, "less than half of it", mend)
        return Finding("OK", "memory", found)

    def _free(self, check: str, name: str, address: Address) -> Finding:
        """Whether this machine may listen there."""
        place, port = address.listen or address.host, address.port
        where = f"{place}, port {port}"
        try:
            family, kind, *_, found = socket.getaddrinfo(place, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as trial:
                # As servers do. It is not listened at, so that one that starts now is not kept out.
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(found)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and self._serving:
                return Finding("OK", check, f"{where}: of `lpgan serve {self.role}`, which runs")
            if error.errno == errno.EADDRINUSE:
                mend = "stop it (ss -ltnp shows which it is), or take another port at every role"
                return Finding("failed", check, f"{where}: another program has it", mend=mend)
            return Finding(
                "failed",
                check,
                f"{where}: {_said(error)}",
                "an address of this machine",
                f"mend {name}.host, or say in {name}.listen where to listen",
            )
        runs = f"; `lpgan serve {self.role}` runs" if self._serving else ""
        return Finding("OK", check, f"{where}: free{runs}")

    # The line between the servers -----------------------------------------------------------------

    def _line(self, server: ServerName) -> Finding:
        """As far as it can be seen from one end."""
        address = self.config.line
        if server == "s1":
            return self._free("line", "line", address)
        try:
            _connected(address).close()
        except OSError as error:
            if self._serving:  # S1 does not listen while they talk
                found = f"s1, {address.target}: {_said(error)}; `lpgan serve s2` runs here"
                return Finding("warning", "line", found, mend="no fault if an attempt goes on")
            return _unreachable("line", "s1", "line", address, error)
        return Finding("OK", "line", f"s1, {address.target}: somebody listens there")

    def _trial(self, server: ServerName) -> Iterator[Finding]:
        other, wait_s = SERVERS[1 - SERVERS.index(server)], self.config.timeouts.wait_s
        self.note(f"waiting up to {wait_s:g} s for `lpgan doctor --as {other} --measure`")
        try:
            trial = try_line(self.config, server, self.functions, wait_s)
        except (OSError, LineBroken) as error:
            mend = (
                f"run the doctor of {other} with --measure meanwhile, and no `lpgan serve {other}`"
            )
            yield Finding("failed", "line", str(error), mend=mend)
            return
        yield Finding("OK", "line", f"{other}: mutual TLS, its name is right")
        yield self._clock(other, trial.ahead_s, trial.other.now)
        yield from _same_code(other, trial.other)
        if trial.functions and self.functions:
            yield _same_program(other, self.functions, trial.functions)
        yield from self._speed(trial)

    def _speed(self, trial: Trial) -> Iterator[Finding]:
        speed, latency = trial.network
        found = f"{1e3 * latency:.3g} ms one way, {si(speed, 'bit/s')} each way at the same time"
        yield Finding("OK", "line, measured", found)
        if self.training is None:
            return
        function, secrets, public = shapes.step_program(secured(self.training.program))
        cost = program_cost(function, secrets, public)
        seconds, limit = cost.seconds(*trial.network), self.config.timeouts.wait_s
        found = (
            f"{cost.rounds} messages, {si(cost.online_bytes, 'B')} each way: {seconds:.3g} s, and "
            "the servers' computation on top"
        )
        if seconds > limit / 2:
            mend = "raise it at every role"
            yield Finding("warning", "a step", found, f"well below wait_s, {limit:g} s", mend)
        else:
            yield Finding("OK", "a step", found)

    # The servers, as the others see them ----------------------------------------------------------

    def _reach(self, server: ServerName, trusted: bool) -> Iterator[Finding]:
        """`trusted`: whether it makes sense to show one's own certificate."""
        address, check = self.config.address(server), f"{server}: port"
        try:
            connection = _connected(address)
        except OSError as error:
            yield _unreachable(check, server, f"servers.{server}", address, error)
            return
        with connection:
            refused = self._handshake(connection, server, trusted)
        if refused is not None:
            yield refused
            return
        if not trusted:
            found = f"{address.target}: reached; not asked, as {self.role} cannot show who it is"
            yield Finding("OK", check, found)
            return
        yield from self._ask(server, check)

    def _handshake(
        self, connection: socket.socket, server: ServerName, trusted: bool
    ) -> Finding | None:
        """What is wrong with the server's certificate, or what is, to it, with this one's."""
        directory, wanted = Path(self.config.certificates), self.config.certificate_name(server)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # the name is the role's
        context.set_alpn_protocols(["h2"])
        check = f"{server}: certificate"
        try:
            context.load_verify_locations(directory / AUTHORITY)
        except OSError:  # which was found before
            return None
        try:
            if trusted:
                context.load_cert_chain(
                    directory / f"{self.role}.pem", directory / f"{self.role}.key"
                )
            tls = context.wrap_socket(connection, server_hostname=wanted)
        except ssl.SSLCertVerificationError as error:
            mend = f"compare {AUTHORITY} and the clocks of both machines"
            return Finding("failed", check, str(error.verify_message), mend=mend)
        except OSError as error:
            target = self.config.address(server).target
            mend = f"is it `lpgan serve {server}` that listens there?"
            return Finding("failed", check, f"{target}: no TLS: {_said(error)}", mend=mend)
        with tls:
            shown: Any = (tls.getpeercert() or {}).get("subjectAltName", ())
            names = [name for kind, name in shown if kind == "DNS"]
            if wanted not in names:
                found = f"of {', '.join(names) or 'nobody'}"
                mend = f"another server listens there, or mend servers.{server} or names"
                return Finding("failed", check, found, wanted, mend)
            if trusted and not _answered(tls):
                found = f"{server} does not take this role's certificate"
                mend = f"compare {AUTHORITY} and the clocks of both machines"
                return Finding("failed", check, found, mend=mend)
        return None

    def _ask(self, server: ServerName, check: str) -> Iterator[Finding]:
        """What the server says of its session and its machine."""
        identity = load_identity(self.config, self.role)
        client = Client(self.config, identity, self.role, server, self._nobody)
        try:
            try:
                known = client.describe()
            except (Lost, RefusedBy, Malformed) as error:
                yield Finding("failed", check, str(error), mend="compare the configurations")
                return
            target = self.config.address(server).target
            yield Finding("OK", check, f"{target}: mutual TLS, {server} is {known.phase}")
            try:
                asked = time.time()
                condition = client.condition()
                answered = time.time()
            except (Lost, RefusedBy, Malformed):
                found = "an older version, which tells neither its time nor its code"
                yield Finding("warning", f"{server}: versions", found, mend="update it")
            else:
                ahead = condition.now - (asked + answered) / 2
                yield self._clock(server, ahead, condition.now)
                yield from _same_code(server, condition)
            if self.settings is not None and self.functions:
                yield _programs_agree(server, self.settings, self.functions, known)
        finally:
            client.close()

    def _clock(self, other: str, ahead_s: float, now: float) -> Finding:
        """Certificates are valid or not by each machine's own clock."""
        check, mend = f"{other}: clock", "have both machines set by NTP"
        found = f"{abs(ahead_s):.1f} s {'ahead' if ahead_s > 0 else 'behind'}"
        if self.validity is not None:
            start, end = (moment.timestamp() for moment in self.validity)
            if not start <= now <= end:
                found += f", where {self.role}'s certificate is not valid"
                return Finding("failed", check, found, f"at most {_CLOCK_S:g} s", mend)
        if abs(ahead_s) > _CLOCK_S:
            return Finding("warning", check, found, f"at most {_CLOCK_S:g} s", mend)
        return Finding("OK", check, found)


# Two of something, compared -----------------------------------------------------------------------


def _same_code(other: str, condition: Condition) -> Iterator[Finding]:
    own, mend = own_condition(), "install the same release at every role"
    status = (own.lpgan, own.jax) == (condition.lpgan, condition.jax)
    check = f"{other}: versions"
    if status:
        yield Finding("OK", check, condition.versions)
    else:
        yield Finding("warning", check, condition.versions, own.versions, mend)
    check, theirs = f"{other}: code", condition.code[:12]
    if own.code == condition.code:
        yield Finding("OK", check, f"{theirs}, the same")
    else:
        yield Finding("failed", check, theirs, f"{own.code[:12]}, as here", mend)


def _same_program(other: str, own: dict[str, str], theirs: dict[str, str]) -> Finding:
    """But for the code of the package, which is a finding of its own."""
    check = f"{other}: program"
    ours, others = (
        {name: digest for name, digest in of.items() if name != agreement.PROTOCOLS}
        for of in (own, theirs)
    )
    if (found := agreement.differing(ours, others)) is None:
        return Finding("OK", check, "the same")
    mend = "give every role the same file and options"
    return Finding("failed", check, f"differs: {found}", mend=mend)


def _programs_agree(
    server: str, settings: Settings, own: dict[str, str], known: Description
) -> Finding:
    """With what a server's session trains, if it knows that."""
    if known.config is None:
        return Finding("OK", f"{server}: program", "not known there yet, as nothing was trained")
    trained = from_json(known.config, f"{server}'s configuration")
    if (changed := changed_field(settings.public(), trained)) is not None:
        return Finding(
            "failed",
            f"{server}: program",
            f"trains with {changed} = {getattr(trained, changed, None)!r}",
            f"{getattr(settings, changed, None)!r}, as here",
            "mend --train, --program or --set here; another training needs another session",
        )
    return _same_program(server, own, known.functions)


# Connections --------------------------------------------------------------------------------------


def _connected(address: Address) -> socket.socket:
    connection = socket.create_connection((address.host, address.port), _ANSWER_S)
    connection.settimeout(_ANSWER_S)
    return connection


def _answered(tls: ssl.SSLSocket) -> bool:
    """Whether a server goes on after the handshake: gRPC speaks first, unless it takes nobody."""
    try:
        return bool(tls.recv(1))
    except TimeoutError:  # it is slow; who asks next will be told why
        return True
    except OSError:
        return False


def _unreachable(check: str, server: str, name: str, address: Address, error: OSError) -> Finding:
    found = f"{address.target}: {_said(error)}"
    if isinstance(error, socket.gaierror):
        mend = f"mend {name}.host"
    elif isinstance(error, ConnectionRefusedError):
        mend = f"start `lpgan serve {server}` there, or mend {name}"
    else:
        mend = f"open the port in the firewalls between, or mend {name}"
    return Finding("failed", check, found, mend=mend)


def _said(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_ANSWER_S:g} s"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error)
    return error.strerror or str(error)
