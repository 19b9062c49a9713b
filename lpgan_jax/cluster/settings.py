"""The configuration of a cluster: where the roles are, and how long they wait for each other."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from lpgan_jax.mpc.share_file import SERVERS as SERVERS
from lpgan_jax.mpc.share_file import ServerName as ServerName
from lpgan_jax.training.config import (
    LONGEST_YAML,
    ConfigError,
    Fields,
    ProgramConfig,
    Settings,
    expected,
    load_yaml,
    validated,
)

DEALER, PROVIDER = "ds", "sp"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"


class Address(Fields):
    """Where a server is found."""

    host: str = Field(min_length=1)
    """A name or an address."""
    port: int = Field(ge=1, le=65535)
    listen: str | None = None
    """The address to listen at, if it is not that of `host` (behind a translated address, say)."""

    @property
    def target(self) -> str:
        """Where to connect to, as gRPC writes it."""
        return _target(self.host, self.port)

    @property
    def place(self) -> str:
        """Where to listen."""
        return _target(self.listen or self.host, self.port)


def _target(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Servers(Fields):
    """Both servers."""

    s1: Address
    s2: Address


class Timeouts(Fields):
    """How long a role waits, in seconds, before the attempt is over.

    Without a limit wait only those who are not needed yet or any more: a server or an owner before
    DS has opened an attempt, SP for the next result of servers that answer, DS for SP's wishes.
    """

    silence_s: float = Field(default=20.0, ge=2)
    """A worker that reports nothing, and a line that answers nothing, for so long, is dead."""
    wait_s: float = Field(default=60.0, ge=2)
    """For another role to be there, to do its part of a step, or to take in what a step needs: more
    than a step takes, and than DS needs to send its randomness."""
    start_s: float = Field(default=900.0, ge=10)
    """For the programs to be compiled, at the start of an attempt."""

    @property
    def patience_s(self) -> float:
        """After this, whoever should have waited `wait_s` and said so is stuck itself."""
        return self.wait_s + self.silence_s + 5


class Integrity(Fields):
    """How DS finds out whether a server deviates."""

    check: float = Field(gt=0, le=1)
    """The probability with which DS looks at a step, after it is done. Steps before a result that
    is more than losses, and before a checkpoint, are always looked at."""


class ClusterConfig(Fields):
    """One session of training, as its roles agree on it."""

    session: str = Field(pattern=_NAME)
    """Its name."""
    servers: Servers
    line: Address
    """Where S1 listens for S2, and S2 finds it: the line between the servers."""
    turns: list[str] = Field(default=[DEALER], min_length=1)
    """Whose images a step takes: the owners, in turn. `ds` deals the randomness of every step."""
    clients: list[str] = Field(default=[])
    """Who may ask questions of what was trained, besides `sp`."""
    most_questions: int | None = Field(default=None, ge=1)
    """How many a client may ask in this session, each of as many rows as the program says: answers
    tell of a model, and enough of them all."""
    names: dict[str, str] = Field(default_factory=dict)
    """The name in a role's certificate, if it is not the role's own."""
    certificates: str = Field(min_length=1)
    """The directory of ca.pem and, for the roles that this machine plays, ROLE.pem and ROLE.key;
    relative to the file of this configuration."""
    state: str = Field(min_length=1)
    """The directory of this machine's files: a server's shares, everybody's logs; relative to the
    file of this configuration."""
    modules: list[str] = Field(default=[])
    """Networks of your own that may be trained, as `my_nets:Networks`: what a training's
    `model.module` names is imported here only if it is one of them."""
    look_ahead: int = Field(default=2, ge=1)
    """How many steps' randomness a server takes before it needs it."""
    integrity: Integrity | None = None
    """Whether, and how often, DS checks what the servers do; it needs to know all images."""
    timeouts: Timeouts = Timeouts()
    restarts: int = Field(default=5, ge=0)
    """Attempts in a row that may fail without a step of progress."""

    @field_validator("turns")
    @classmethod
    def _turns_are_owners(cls, turns: list[str]) -> list[str]:
        if {*SERVERS, PROVIDER} & set(turns) or not all(re.match(_NAME, name) for name in turns):
            raise expected("names of data owners: neither server, nor sp")
        return turns

    @model_validator(mode="after")
    def _clients_are_others(self) -> ClusterConfig:
        taken = {*SERVERS, PROVIDER, *self.owners}
        if set(self.clients) & taken or not all(re.match(_NAME, name) for name in self.clients):
            raise expected("names of clients: neither server, nor sp, nor an owner")
        shown = [self.certificate_name(role) for role in self.roles]
        if len(set(shown)) < len(shown):
            raise expected("a certificate name of its own for every role")
        return self

    @model_validator(mode="after")
    def _dealer_knows_all(self) -> ClusterConfig:
        if self.integrity is not None and self.owners != [DEALER]:
            raise expected(
                "no integrity with other owners than ds: to check a step, ds would see their images"
            )
        return self

    @property
    def owners(self) -> list[str]:
        """Who feeds images or deals, DS first."""
        return list(dict.fromkeys([DEALER, *self.turns]))

    @property
    def roles(self) -> list[str]:
        """Everybody."""
        return [*self.owners, *SERVERS, *self.askers]

    @property
    def askers(self) -> list[str]:
        """Who may ask."""
        return [PROVIDER, *self.clients]

    def certificate_name(self, role: str) -> str:
        """The name that a role's certificate must have."""
        return self.names.get(role, role)

    def owner_of(self, step: int) -> str:
        """Whose images a step takes, counted from 0."""
        return self.turns[step % len(self.turns)]

    def turn_of(self, owner: str, step: int) -> int:
        """How many of an owner's turns there were before this step."""
        rounds, place = divmod(step, len(self.turns))
        return rounds * self.turns.count(owner) + self.turns[:place].count(owner)

    def address(self, server: ServerName) -> Address:
        """Where a server is."""
        found: Address = getattr(self.servers, server)
        return found


def load_cluster(path: str | os.PathLike[str]) -> ClusterConfig:
    """Read a cluster's configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: a field is wrong; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a cluster's configuration")
    with path.open("rb") as file:
        text = file.read(LONGEST_YAML + 1)
    fields = load_yaml(text, path.name)
    if "link" in fields:
        number = next(n for n, line in enumerate(text.splitlines(), 1) if b"link" in line)
        raise ConfigError(
            f"{path.name}: link (line {number}): of an older version. The servers talk over TLS of "
            "their own now: write `line: {host: HOST, port: PORT}`, where S1 listens for S2, and "
            "needs no tunnel"
        )
    config = validated(ClusterConfig, fields, path.name)
    return config.model_copy(
        update={
            "certificates": str(path.parent / config.certificates),
            "state": str(path.parent / config.state),
        }
    )


def require_role(config: ClusterConfig, role: str) -> str:
    """The role.

    Raises:
        ConfigError: nobody plays it.
    """
    if role not in config.roles:
        raise ConfigError(f"role {role!r}: expected one of {', '.join(config.roles)}")
    return role


# What is trained, as others than its owner may know it --------------------------------------------

_MAY_CHANGE = {
    "steps",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "guard_every",
}


def with_own_code(config: ClusterConfig, settings: Settings, program: str | None) -> Settings:
    """A configuration that came over the line, with this role's own code.

    Args:
        config: of the cluster, as this role has it.
        settings: what came.
        program: this role's file of a program, if it was given one.

    Raises:
        ConfigError: there is no such code here.
    """
    if isinstance(settings, ProgramConfig):
        if program is None or Path(program).name != Path(settings.program).name:
            raise ConfigError(
                f"program: {settings.program} is trained, and this role has {program or 'none'} "
                "(--program): code never comes over the line, so each role needs a copy of its "
                "own, under the same name"
            )
        return settings.model_copy(update={"program": program})
    module = settings.model.module
    if program is not None:
        raise ConfigError(f"--program: {program} given, and a GAN of a configuration is trained")
    if module is not None and module not in config.modules:
        raise ConfigError(
            f"model.module: {module}, expected one of this role's own configuration (modules: "
            f"{config.modules}): code never comes over the line"
        )
    return settings


def changed_field(before: Settings, after: Settings) -> str | None:
    """The name of a field that differs and may not, in one session; None if there is none."""
    if type(before) is not type(after):
        return "program"
    for name in type(before).model_fields:
        if name not in _MAY_CHANGE and getattr(before, name) != getattr(after, name):
            return name
    return None
