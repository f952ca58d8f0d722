"""Users below root: requests with a role, some of which exceed it, concurrent with all other requests.

The production API serves each request with the user's roles.  A client may be killed before or after its request, or
lose the response.  Every object that a user sends has the user's role in the label ``ROLE_LABEL``.  So the rule sees in
the commits what a role has changed, even without a response.

Rule: a viewer changes nothing, and an operator of a stack changes services, secrets and configs of that stack only.
"""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from random import Random
from typing import Any

from sim.cluster import SimulatedCluster
from sim.users.clients import ApiClient, Commands
from sim.users.random_specs import STACKS
from sim.world.committed import Change
from skep.errors import SkepError
from skep.model.network import Network
from skep.model.node import Node
from skep.model.permissions.access import EVERY_STACK, Binding, Identity, Origin, Role, parse_binding
from skep.model.permissions.user import User
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.model.values.stacks import STACK_LABEL
from skep.store.interface import Created, Updated, View

ROLE_LABEL = "sim.role"
"""Label with the role of the user who sent the object."""
FILES_MAX = 4
"""Secrets and configs that users may create in a run, so that they do not fill the store."""
_STACKED: tuple[type[Any], ...] = (Service, Secret, Config)


class RoleUsers(Commands):
    """The users of one cluster that are not root."""

    def __init__(
        self, cluster: SimulatedCluster, random: Random, note: Callable[[Iterable[str]], None]
    ) -> None:
        super().__init__(cluster, random, note)
        self._numbers = count(1)
        self._files = 0
        cluster.observer.rules.append(nothing_beyond_roles)

    def act(self) -> None:
        """Let a user of the cluster send a request, if there is a user."""
        if not (users := self._cluster.view.find(User)):
            return
        user = self._random.choice(users)
        bindings = tuple(parse_binding(one) for one in user.spec.roles)
        identity = Identity(name=user.spec.name, origin=Origin.TOKEN, bindings=bindings)
        client = ApiClient(self._apis, user.spec.name, identity)
        match self._random.randrange(4):
            case 0:
                client.killed_at = 1
            case 1:
                client.loses = 0.5
            case _:
                pass
        self._cluster.trace.add(f"user: {user.spec.name} acts as {', '.join(user.spec.roles)}")
        self._start(self._send(client, bindings[0]), user.spec.name)

    async def end(self) -> None:
        """End the requests whose clients were killed, and wait for the others."""
        await self._end_all()

    async def _send(self, client: ApiClient, binding: Binding) -> None:
        stack = self._random.choice((*STACKS, ""))
        labels = {ROLE_LABEL: str(binding), **({STACK_LABEL: stack} if stack else {})}
        request = self._random.choice((self._file, self._service, self._change, self._remove, self._label))
        with suppress(SkepError):
            await request(client, binding, labels)

    async def _file(self, client: ApiClient, binding: Binding, labels: Mapping[str, str]) -> None:
        if self._files >= FILES_MAX:
            return
        self._files += may(binding, labels)
        kind = self._random.choice(("secrets", "configs"))
        data = base64.b64encode(b"key").decode()
        # An operator of a stack may create objects only with names of that stack.
        name = f"{labels.get(STACK_LABEL, client._name)}_{next(self._numbers)}"
        await client.post(f"/{kind}/create", {"Name": name, "Labels": labels, "Data": data})

    async def _service(self, client: ApiClient, binding: Binding, labels: Mapping[str, str]) -> None:
        """Create a service that the role does not allow.  Allowed services are created by root."""
        if may(binding, labels):
            return
        name = f"{client._name}-{next(self._numbers)}"
        template = {"ContainerSpec": {"Image": "app:1"}}
        spec = {"Name": name, "Labels": labels, "TaskTemplate": template}
        await client.post("/services/create", spec)

    async def _change(self, client: ApiClient, binding: Binding, labels: Mapping[str, str]) -> None:
        """Update a service that is not the user's."""
        if (service := self._foreign(binding)) is None:
            return
        template = {"ContainerSpec": {"Image": "app:2"}}
        own = {**service.spec.labels, ROLE_LABEL: str(binding)}
        if self._random.random() < 0.5:
            own |= labels  # it may also claim the service for another stack
        spec = {"Name": service.spec.name, "Labels": own, "TaskTemplate": template}
        await client.post(f"/services/{service.id}/update", spec, version=str(service.version.index))

    async def _remove(self, client: ApiClient, binding: Binding, labels: Mapping[str, str]) -> None:
        """Remove a service that is not the user's."""
        if (service := self._foreign(binding)) is None:
            return
        await client.delete(f"/services/{service.id}")
        self._note([f"{binding} removed {service.spec.name}"])

    async def _label(self, client: ApiClient, binding: Binding, labels: Mapping[str, str]) -> None:
        """Label a node, which only an administrator may."""
        if binding.role is Role.ADMIN:
            return
        node = self._random.choice(self._cluster.view.find(Node))
        spec = {"Role": node.spec.role.value, "Availability": "drain", "Labels": {ROLE_LABEL: str(binding)}}
        await client.post(f"/nodes/{node.id}/update", spec, version=str(node.version.index))

    def _foreign(self, binding: Binding) -> Service | None:
        """Return a service that the role may not change."""
        found = [one for one in self._cluster.view.find(Service) if not may(binding, one.spec.labels)]
        return self._random.choice(found) if found else None


def may(binding: Binding, labels: Mapping[str, str]) -> bool:
    """Return whether the role may change a service, secret or config with these labels."""
    in_reach = binding.stack in (EVERY_STACK, labels.get(STACK_LABEL))
    return binding.role is Role.ADMIN or (binding.role is Role.OPERATOR and in_reach)


def nothing_beyond_roles(change: Change, _: View) -> Iterator[str]:
    """Check that roles have changed only objects that they may change."""
    for event in change.events:
        match event:
            case Created(Service() | Secret() | Config() | Network() | Node() as new):
                yield from _beyond({}, new)
            case Updated(Service() | Secret() | Config() | Network() | Node() as old, new):
                yield from _beyond(old.spec.labels, new)


def _beyond(before: Mapping[str, str], new: Any) -> Iterator[str]:
    role = new.spec.labels.get(ROLE_LABEL, "")
    if not role or role == before.get(ROLE_LABEL):
        return
    binding = parse_binding(role)
    is_allowed = binding.role is Role.ADMIN or (isinstance(new, _STACKED) and may(binding, new.spec.labels))
    if STACK_LABEL in before:
        is_allowed = is_allowed and may(binding, before)
    if not is_allowed:
        yield f"{role} has changed {type(new).__name__.lower()} {new.spec.name or new.id}"
