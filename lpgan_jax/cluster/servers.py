"""S1 and S2: each runs its side of the programs on its own shares.

The two workers are the two processes of a JAX runtime (`jax.distributed`): the exchanges of the
programs are JAX's own collectives, gloo between CPUs and NCCL between GPUs. A worker is given one
share of everything, its own seeds, and (S2) corrections; nothing else ever reaches it.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import socket
import time
from typing import Any

import jax
import numpy as np

from lpgan_jax.cluster import tcp
from lpgan_jax.cluster.certificates import load_identity
from lpgan_jax.cluster.journal import Journal
from lpgan_jax.cluster.parcels import TRAIN, Parcels
from lpgan_jax.cluster.reporting import Lost, Reporter
from lpgan_jax.cluster.service import Service
from lpgan_jax.cluster.session import Session, Task
from lpgan_jax.cluster.settings import DEALER, PROVIDER, SERVERS, ClusterConfig, ServerName
from lpgan_jax.cluster.wire import Layout, Opening, Result, buffers
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.mesh import server_mesh, server_program, whole_sharding
from lpgan_jax.mpc.prng import KEY_WORDS
from lpgan_jax.mpc.secret import is_secret
from lpgan_jax.programs import SecureProgram, Training, agreement, secured, shapes
from lpgan_jax.programs.simulation import Tree, by_name, restore_state
from lpgan_jax.training import checkpoint
from lpgan_jax.training.building import training_of
from lpgan_jax.training.config import ConfigError


class Programs:
    """A server's compiled programs, and what they take and give: this server's halves.

    Attributes:
        sizes: bytes of payload of each kind of parcel.
    """

    def __init__(self, program: SecureProgram, server: ServerName) -> None:
        """Compiles. The JAX runtime of both servers must be there."""
        firsts = [
            next(d for d in jax.devices() if d.process_index == process)
            for process in range(len(SERVERS))
        ]
        mesh = server_mesh(firsts)
        self._place = whole_sharding(mesh)
        self._device = jax.local_devices()[0]
        self._corrected = server == "s2"
        options = options_to_run_often()
        self._parcels = Parcels(program, server)
        self.sizes = self._parcels.sizes
        dealt = self._parcels.corrections
        # S1 has no use for corrections, but its program has a place for them.
        self._nothing = {
            which: [] if self._corrected else [self._own(np.zeros(x.shape, x.dtype)) for x in of]
            for which, of in dealt.items()
        }

        def compiled(which: str, function: Any, secrets: Any, public: Any, donate: bool) -> Any:
            program = server_program(function, mesh, donate=donate, compiler_options=options)
            seeds = jax.ShapeDtypeStruct((2, KEY_WORDS), np.uint32)
            corrections = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in dealt[which]]
            placed = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._place),
                (seeds, corrections, secrets),
            )
            return program.lower(*placed, public).compile()

        self._train = compiled(TRAIN, *shapes.step_program(program), donate=True)
        self._answers = {
            name: compiled(name, *shapes.answer_program(program, name), donate=False)
            for name in program.program.answers
        }

    def _own(self, half: Any) -> jax.Array:
        """This server's half of a paired array, of which the other half is elsewhere."""
        local = jax.device_put(np.asarray(half)[None], self._device)
        return jax.make_array_from_single_device_arrays(
            (len(SERVERS), *local.shape[1:]), self._place, [local]
        )

    def _placed(self, shapes: Any, payload: bytes | bytearray | memoryview) -> Any:
        """A pytree of own halves, from the bytes of its leaves."""
        arrays = Layout.of(shapes).split(payload)
        return jax.tree.unflatten(jax.tree.structure(shapes), [self._own(a) for a in arrays])

    def state_from(self, payload: bytearray) -> Any:
        """The initial state that DS sent."""
        return self._placed(self._parcels.state, payload)

    def state_of(self, program: SecureProgram, tree: Tree) -> Any:
        """The state of a checkpoint. ValueError if it is of another program."""
        restored = restore_state(program, jax.tree.map(lambda half: half[None], tree))
        return jax.tree.map(lambda half: self._own(np.asarray(half)[0]), restored)

    # A task's material is its payload, which is there once: no value is masked by it but this one.
    def _material(self, which: str, payload: memoryview) -> tuple[jax.Array, list[jax.Array]]:
        seed, corrections = self._parcels.material(which, payload)
        own = [self._own(c) for c in corrections] if self._corrected else self._nothing[which]
        return self._own(seed), own

    def train(
        self, state: Any, payload: memoryview, inputs: memoryview, public: Any
    ) -> tuple[Any, Any]:
        """A step: the state after it, and own shares of what SP is told."""
        seeds, corrections = self._material(TRAIN, payload)
        batch = self._placed(self._parcels.inputs, inputs)
        state, told = self._train(seeds, corrections, (state, batch), public)
        return state, own_half(told)

    def answer(self, name: str, state: Any, payload: memoryview, question: memoryview) -> Any:
        """Own share of an answer."""
        seeds, corrections = self._material(name, payload)
        asked = self._placed(self._parcels.questions[name], question)
        return own_half(self._answers[name](seeds, corrections, (state, asked), None))


def own_half(tree: Any) -> Any:
    """The shares that this process holds of paired arrays, as NumPy arrays.

    It looks at this process's own shard; an operation on the whole array would be a message.
    """

    def half(array: jax.Array) -> np.ndarray:
        return np.asarray(array.addressable_shards[0].data)[0]

    def leaf(value: Any) -> Any:
        return half(value.share) if is_secret(value) else half(value)

    return jax.tree.map(leaf, tree, is_leaf=is_secret)


# The worker ---------------------------------------------------------------------------------------


def serve(
    config: ClusterConfig, server: ServerName, program_file: str | None, reporter: Reporter
) -> None:
    """Be a server for one attempt; never returns by itself.

    Args:
        config: of the cluster.
        server: s1 or s2.
        program_file: this server's own copy, if a program is trained.
        reporter: for reports.

    Raises:
        ConfigError, FileNotFoundError: bad input.
        OSError: a port is taken, the disk is full.
    """
    other = SERVERS[1 - SERVERS.index(server)]
    session = Session(
        config,
        server,
        program_file,
        lambda role, reason: reporter.fail(f"lost {role}: {reason}", blames=role),
    )
    journal = Journal(f"{config.state}/results/{server}")
    service = Service(config, load_identity(config, server), session, journal, reporter)
    reporter.event("listening", port=service.port, attempt=session.describe().attempt)
    with reporter.phase("idle, no attempt yet of", on=DEALER, limit_s=None):
        opening, settings = session.wait_for_opening()
    reporter.event("opened", attempt=opening.attempt, start=opening.start)
    reporter.set(step=opening.start, steps=opening.steps)
    journal.forget(after=opening.start if opening.save else -1)
    with reporter.phase("joining", on=other, limit_s=config.timeouts.wait_s + 5):
        _join(config, server, reporter)
    reporter.gauge(functools.partial(_measure_link, config, server, other, reporter))
    with reporter.phase("compiling", limit_s=config.timeouts.start_s):
        training = training_of(settings)
        program = secured(training.program)
        _agree(training, opening, session)
        programs = Programs(program, server)
        state = None
        if opening.save is not None:
            _, tree = checkpoint.load_share(config.state, server, opening.start)
            state = programs.state_of(program, tree)
    checkpoint.drop_shares(config.state, server, after=opening.start)
    session.prepare(programs.sizes)
    _Work(config, training, server, other, programs, session, journal, reporter).run(
        state, opening.attempt
    )


_TO_HEAR_WHY_S = 2.0


def _agree(training: Training, opening: Opening, session: Session) -> None:
    """Check that DS has the same program, before anything is shared.

    Raises:
        Lost: it has another one; names where it differs. DS has been told.
    """
    found = agreement.difference(training, opening.functions)
    if found is None and opening.steps != training.steps:
        found = f"steps: {training.steps}, and {opening.steps} there"
    if found is not None:
        reason = f"the program differs from that of {DEALER}: {found}"
        session.refuse(reason, _TO_HEAR_WHY_S)
        raise Lost(DEALER, reason)


def _join(config: ClusterConfig, server: ServerName, reporter: Reporter) -> None:
    """Meet the other server in a JAX runtime."""
    link, limit = config.link, config.timeouts
    own = getattr(link, server)
    _check_host_name(config, own, reporter)
    jax.distributed.initialize(
        link.coordinator,
        len(SERVERS),
        SERVERS.index(server),
        initialization_timeout=int(limit.wait_s),
        heartbeat_timeout_seconds=max(10, int(limit.silence_s)),
        coordinator_bind_address=link.coordinator,
    )


def _check_host_name(config: ClusterConfig, own: str, reporter: Reporter) -> None:
    """Gloo listens where the machine's name points to, so that must be the link's address.

    Raises:
        ConfigError: the messages would take another way than the one that is configured.
    """
    name = socket.gethostname()
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except OSError:
        found = set()
    if config.link.on_one_machine:
        if any(not ipaddress.ip_address(address).is_loopback for address in found):
            reporter.event(
                "warning",
                reason=f"this machine's name, {name}, points to {', '.join(sorted(found))}: gloo "
                "listens there, and other machines may reach it",
            )
        return
    if found != {own}:
        raise ConfigError(
            f"link: this machine's name, {name}, points to "
            f"{', '.join(sorted(found)) or 'nothing'}, expected {own} alone: gloo listens there "
            f"(put `{own} {name}` into /etc/hosts)"
        )


def _measure_link(
    config: ClusterConfig, server: ServerName, other: str, reporter: Reporter
) -> None:
    """Report the bytes on the line to the other server, as the kernel counts them."""
    own_port = config.address(server).port  # not of gRPC
    sent, received = tcp.bytes_with({config.link.s1, config.link.s2}, without_port=own_port)
    reporter.measured(other, sent=sent, received=received)


@dataclasses.dataclass
class _Work:
    """The tasks of an attempt, one after the other."""

    config: ClusterConfig
    training: Training
    server: ServerName
    other: str
    programs: Programs
    session: Session
    journal: Journal
    reporter: Reporter
    many: int = 2**28
    """Bytes of results that wait for SP, beyond which the log says so."""

    def run(self, state: Any, attempt: int) -> None:
        """Do what DS says, until this process ends."""
        limits = self.config.timeouts
        limit: float | None = limits.start_s  # until the other server is prepared as well
        finished = False
        while True:
            self.reporter.set(ahead=self.session.ahead)
            with self.reporter.phase("waiting for", on=DEALER, limit_s=limit):
                task = self.session.next_task()
            limit = None if finished else limits.wait_s  # None: for whoever asks
            answer = None
            kind, step = task.parcel.kind, task.parcel.step
            if kind == "state":
                state = self.programs.state_from(task.payload)
            elif kind == "train":
                assert state is not None
                state = self._train(state, task, attempt)
            elif kind == "answer":
                assert state is not None
                answer = self._answer(state, task, attempt)
            elif kind == "checkpoint":
                assert state is not None
                with self.reporter.phase("saving", limit_s=limits.wait_s):
                    self.journal.sync()
                    self._save(state, step, str(task.parcel.save))
            elif kind == "finish":
                assert state is not None
                learnt = secured(self.training.program).learnt(state)
                payload = _bytes(own_half(learnt))
                self._publish(attempt, task, "learnt", 0.0, payload)
                self.journal.sync()
                self.reporter.event("trained", step=step)
                finished, limit = True, None
            self.session.done(task, answer)

    def _train(self, state: Any, task: Task, attempt: int) -> Any:
        step, view = task.parcel.step, memoryview(task.payload)
        owner = self.config.owner_of(step)
        if owner == DEALER:
            size = self.programs.sizes.inputs
            inputs, material = view[:size], view[size:]
        else:
            with self.reporter.phase("waiting for", on=owner, limit_s=self.config.timeouts.wait_s):
                inputs, material = memoryview(self.session.inputs_of(owner, step)), view
        started = time.monotonic()
        with self.reporter.phase("step with", on=self.other, limit_s=self.config.timeouts.wait_s):
            public = secured(self.training.program).schedule(step)
            state, told = self.programs.train(state, material, inputs, public)
            jax.block_until_ready(state)
        seconds = time.monotonic() - started
        self.reporter.set(step=step + 1, s_per_step=round(seconds, 4))
        payload = _bytes(told)
        self._publish(attempt, task, "told" if payload else "step", seconds, payload)
        return state

    def _answer(self, state: Any, task: Task, attempt: int) -> bytes:
        name, view, question = str(task.parcel.answer), memoryview(task.payload), task.question
        size = 0 if question is not None else self.programs.sizes.questions[name]
        started = time.monotonic()
        limit = self.config.timeouts.wait_s
        with self.reporter.phase("answering with", on=self.other, limit_s=limit):
            asked = view[:size] if question is None else memoryview(question)
            payload = _bytes(self.programs.answer(name, state, view[size:], asked))
        if task.parcel.request is None:
            self._publish(attempt, task, "answer", time.monotonic() - started, payload)
        return payload

    def _publish(self, attempt: int, task: Task, kind: Any, seconds: float, payload: bytes) -> None:
        trained = task.parcel.kind == "train"
        result = Result(
            attempt=attempt,
            serial=task.parcel.serial,
            kind=kind,
            step=task.parcel.step + trained,
            seconds=seconds,
            size=len(payload),
        )
        self.journal.append(result, payload)
        if (waiting := self.journal.waiting) > self.many:
            self.many = 2 * waiting
            self.reporter.event(
                "warning",
                reason=f"{waiting / 1e6:.0f} MB of results wait for {PROVIDER}, and stay on this "
                "disk until it has come for them",
            )

    def _save(self, state: Any, step: int, name: str) -> None:
        share = own_half(by_name(state))
        keep = self.training.keep_checkpoints
        checkpoint.save_share(self.config.state, self.server, step, name, share, keep)


def _bytes(tree: Any) -> bytes:
    return b"".join(part.tobytes() for part in buffers(tree))
