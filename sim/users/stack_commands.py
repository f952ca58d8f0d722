"""Commands on one stack, concurrent with all other requests of users: deploy, rollback, rotate, stop, start, remove.

Each command is the production coroutine.  It may be killed or suspended between any two requests, or lose responses.
Two commands may run at once.

Rules: a command that succeeds is in force, or concurrent commands have changed the stack; whatever was killed, the
next deploy succeeds, and then a removal leaves nothing.
"""

import asyncio
import base64
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from math import inf
from random import Random
from typing import Any, cast

import msgspec

from sim.cluster import SimulatedCluster
from sim.invariants.acknowledgements import COMMANDED_STACK
from sim.invariants.objects import secrets_of
from sim.trace import COMMAND
from sim.users.client_runs import deploy, label_of, rotate
from sim.users.clients import ApiClient, Commands, Host
from sim.users.random_specs import ENDING_IMAGES
from sim.world.images import BROKEN
from skep.cli.apps.rotation import SECRET
from skep.cli.endpoint import HostOptions
from skep.cli.stack.stack_stops import turn_stack
from skep.errors import AlreadyExists, SkepError
from skep.model.network import Network
from skep.model.options.labels import is_stopped
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.stack.cluster_state import known_revisions
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.document import parse
from skep.stack.compose.reading import ProblemReport
from skep.stack.project import Stack
from skep.stack.recording import carry_out, return_plan
from skep.stack.removing import remove
from skep.stack.revisions import before

AT_ONCE = 2
"""Number of commands that may run at the same time."""
KILLED_BY = 30
"""Largest number of the request at which a command is killed or suspended.  A deploy that waits a second takes some
thirty requests.
"""
PAUSE_S = 15.0
WAIT_S = 20.0
RETRY_S = 1.0
ATTEMPTS_MAX = 25
"""Number of attempts after which a stack counts as damaged."""
IMAGES = ("app:1", "app:2", "app:2", BROKEN, *ENDING_IMAGES)
"""Images that deploys request.  Equal deploys meet often, and some updates are rolled back."""
KINDS = (*("deploy",) * 5, "rotate", "rotate", "rollback", "rm", "stop", "start")
KEY = f"{COMMANDED_STACK}-key"
"""The secret that rotations replace.  It is external, so that a deploy requests its first version."""
SERVICE = f"{COMMANDED_STACK}_web"
_REMOVABLE = re.compile(r"docker config rm ([^\s.]+)")
_KINDS: tuple[type[Any], ...] = (Service, Secret, Config, Network)


class _Command(msgspec.Struct, eq=False):
    name: str
    client: ApiClient
    began: float
    image: str = ""
    """The image that the service has afterwards, or empty if it stays or is unknown."""
    may_undo: bool = False
    """Whether the command may restore an earlier image."""
    removes: bool = False
    stops: bool | None = None
    """Whether the command stops the services, or starts them.  None if it does neither."""
    ended: float = inf


class StackCommands(Commands):
    """The commands on one stack of a cluster."""

    def __init__(
        self, cluster: SimulatedCluster, random: Random, note: Callable[[Iterable[str]], None]
    ) -> None:
        super().__init__(cluster, random, note)
        self._commands: list[_Command] = []

    def act(self) -> None:
        """Begin a command, half of the time two, which are often equal deploys."""
        image = self._random.choice(IMAGES)
        kinds = ("deploy", "deploy") if self._random.random() < 0.3 else self._random.choices(KINDS, k=2)
        for kind in kinds[: self._random.randint(1, AT_ONCE)]:
            self._begin(kind, image)

    async def end(self) -> None:
        """Kill all commands.  Then deploy the stack, stop, start and remove it, with retries."""
        await self._end_all()
        if not self._commands:
            return
        for one in self._commands:
            one.ended = min(one.ended, self._now())
        for name, run, stops in (
            ("last deploy", self._deploy_at_last, None),
            ("last stop", self._turn, True),
            ("last start", self._turn, False),
            ("last removal", self._remove, None),
        ):
            command = self._command(name)
            command.stops = stops
            COMMAND.set(name)
            problem = await self._persist(partial(run, command))
            command.ended = self._now()
            self._note([f"{name} of the stack fails: {problem}"] if problem else self._unmet(command))

    async def _persist(self, run: Callable[[], Awaitable[None]]) -> str:
        """Run a command until it succeeds.  Return the last error if it never does."""
        problem = ""
        for _ in range(ATTEMPTS_MAX):
            try:
                await run()
            except (SkepError, TimeoutError) as error:
                problem = str(error)
            else:
                return ""
            for name in _REMOVABLE.findall(problem):  # an undo was killed, and the error says what to do
                with suppress(SkepError):
                    await self._apis_client("repair").delete(f"/configs/{name}")
            await asyncio.sleep(RETRY_S)
        return problem

    # -- commands --------------------------------------------------------------------------------------------------

    def _begin(self, kind: str, image: str) -> None:
        for one in self._commands:
            if one.client.is_killed:
                one.ended = min(one.ended, self._now())
        if sum(one.ended == inf for one in self._commands) >= AT_ONCE:
            return
        command = self._command(f"{kind} {len(self._commands)}")
        client = command.client
        client.disturb(self._random, KILLED_BY, PAUSE_S)
        match kind:
            case "deploy":
                command.image = image
                command.may_undo = self._random.random() < 0.3
                run = self._deploy
            case "rotate":
                run = self._rotate
            case "rollback":
                command.may_undo = True
                run = self._roll_back
            case "stop" | "start":
                command.stops = kind == "stop"
                run = self._turn
            case _:
                run = self._remove
        self._cluster.trace.add(f"user: {command.name} {command.image}")
        self._start(self._carry_out(command, run), command.name)

    async def _carry_out(self, command: _Command, run: Callable[[_Command], Awaitable[None]]) -> None:
        COMMAND.set(command.name)
        try:
            await run(command)
        except (SkepError, TimeoutError) as error:
            self._cluster.trace.add(f"user: {command.name}: {error}")
        else:
            self._cluster.trace.add(f"user: {command.name} is done")
            self._note(self._unmet(command))
        command.ended = self._now()

    async def _deploy(self, command: _Command) -> None:
        await self._create_key(command.client)
        await deploy(command.client, _stack(command.image), undoes=command.may_undo, wait_s=WAIT_S)

    async def _deploy_at_last(self, command: _Command) -> None:
        command.image = IMAGES[0]
        await self._deploy(command)

    async def _rotate(self, command: _Command) -> None:
        await self._create_key(command.client)
        data = str(self._random.random()).encode() if self._random.random() < 0.7 else None
        new = await rotate(command.client, SECRET, KEY, data)
        if not any(one.name != command.name for one in self._concurrent(command)):
            service = self._service()
            names = (
                [one.secret_name for one in secrets_of(service.spec.task_template)]
                if service is not None
                else [new]
            )
            if new not in names:
                self._note([f"{command.name} has succeeded with {new}, and the service has {names}"])

    async def _roll_back(self, command: _Command) -> None:
        revision = before(COMMANDED_STACK, await known_revisions(command.client, COMMANDED_STACK), None)
        found = await return_plan(command.client, revision)
        command.image = _image(next(iter(found.stack.services.values())).spec)
        await carry_out(found.client, found.stack, found.plan, _say, WAIT_S, _warn)

    async def _remove(self, command: _Command) -> None:
        command.removes = True
        await remove(command.client, COMMANDED_STACK, _say, WAIT_S)

    async def _turn(self, command: _Command) -> None:
        host = cast("HostOptions", Host(command.client))
        await turn_stack(host, COMMANDED_STACK, "stop" if command.stops else "start", WAIT_S, waits=False)

    async def _create_key(self, client: ApiClient) -> None:
        with suppress(AlreadyExists):
            await client.post(
                "/secrets/create", {"Name": KEY, "Labels": {}, "Data": base64.b64encode(b"key").decode()}
            )

    # -- rules -----------------------------------------------------------------------------------------------------

    def _unmet(self, command: _Command) -> Iterator[str]:
        """Yield what a command that has just succeeded has not reached."""
        concurrent = self._concurrent(command)
        if command.removes:
            if not concurrent:
                yield from (f"{command.name} has left {one}" for one in self._objects())
            return
        if command.stops is not None:
            service = self._service()
            if not concurrent and (service is None or is_stopped(service.spec.labels) is not command.stops):
                yield f"{command.name} has succeeded, and the service is as it was before"
            return
        if not command.image or any(one.may_undo for one in concurrent):
            return
        service = self._service()
        if service is None:
            if not any(one.removes for one in concurrent):
                yield f"{command.name} has succeeded, and the service is not there"
            return
        allowed = {command.image, *(one.image for one in concurrent if one.image)}
        if (image := _image(service.spec)) not in allowed:
            yield f"{command.name} has succeeded with {command.image}, and the service has {image}"
        if not concurrent and is_stopped(service.spec.labels):
            yield f"{command.name} has succeeded, and the service is still stopped"

    def _concurrent(self, command: _Command) -> list[_Command]:
        """Return the commands that ran at some time during ``command``."""
        return [one for one in self._commands if one is not command and one.ended > command.began]

    def _service(self) -> Service | None:
        services = (one for one in self._cluster.view.find(Service) if one.removed_at is None)
        return next((one for one in services if one.spec.name == SERVICE), None)

    def _objects(self) -> Iterator[str]:
        for kind in _KINDS:
            for one in self._cluster.view.find(kind):
                if label_of(COMMANDED_STACK).items() <= one.spec.labels.items() and not (
                    isinstance(one, Service) and one.removed_at is not None
                ):
                    yield f"{kind.__name__.lower()} {one.spec.name}"

    # -- inside ----------------------------------------------------------------------------------------------------

    def _command(self, name: str) -> _Command:
        command = _Command(name, self._apis_client(name), self._now())
        self._commands.append(command)
        return command

    def _apis_client(self, name: str) -> ApiClient:
        return ApiClient(self._apis, name)

    def _now(self) -> float:
        return self._cluster.loop.time()


def _stack(image: str) -> Stack:
    action = "pause" if image == IMAGES[0] else "rollback"
    policy = f"update_config: {{monitor: 1s, parallelism: 0, failure_action: {action}}}"
    text = (
        f"services: {{web: {{image: '{image}', secrets: [pw, key], deploy: {{replicas: 2, {policy}}}}}}}\n"
        f"secrets: {{pw: {{file: f}}, key: {{external: true, name: {KEY}}}}}\n"
    )
    report = ProblemReport()
    made = stack_of(parse(text, "f"), COMMANDED_STACK, {("secrets", "pw"): image.encode()}, report)
    report.raise_problems()
    return made


def _image(spec: Any) -> str:
    container = spec.task_template.container_spec
    return container.image if container is not None else ""


def _say(*_: str) -> None:
    pass


def _warn(_: object) -> None:
    pass
