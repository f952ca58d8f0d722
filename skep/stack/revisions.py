"""Revisions of a stack.  Each is the desired state of one deploy, stored in the cluster.

A revision is a config with the name ``STACK_revision-N``, so ``docker stack rm`` removes it with the stack, and every
program that can read configs can read it.  It contains specs and names, but not the content of secrets and configs.
These stay in the cluster as long as a revision names them.
"""

import asyncio
import base64
import gzip
import hashlib
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.options.labels import DEPLOYING, REPLACED, STACK_CHANGES, STACK_REVISION, STACK_STATE
from skep.model.permissions.access import Binding, Role, parse_binding
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import SECOND_NS, unix_ns
from skep.model.values.unknown import leniently
from skep.stack.planning import StackPlan
from skep.stack.project import Stack, StackFile, StackService

T = TypeVar("T")

KEPT: Final = 10
"""Largest number of revisions of a stack.  As many as specs of a service."""
KEPT_BYTES: Final = 512 * 1024
"""Largest size of all revisions of a stack together, in bytes of base64.  It is limited because every manager has all
configs of the cluster in memory.  A usual stack has 2 to 5 KB compressed, so ten revisions fit.  Very large stacks keep
only two.
"""
KEPT_AT_LEAST: Final = 2
"""The current revision and the one to which a rollback returns, whatever their size."""
UNFINISHED_MAX_S: Final = 3600
"""Age in seconds up to which the next deploy takes over a deploy that did not end.  The objects of an older one may be
in use, so that no undo may remove them.
"""
DEPLOYED: Final = "deployed"
INTERRUPTED: Final = "interrupted"
UNDOING: Final = "rolling back"
UNDOINGS: Final = (UNDOING, "being undone")
"""The state and its former name, which commands of earlier versions write."""
"""State of a failed deploy while the objects that it created are being removed.  No other deploy may use these
objects.
"""
_BYTES_MAX: Final = 900_000
"""Largest size of a compressed revision in bytes.  A config must be smaller than 1000 KiB."""
_UNPACKED_MAX: Final = 64 << 20
"""Largest size of a revision after decompression, in bytes, because users can write revisions of any content."""
_CAUSE_MAX: Final = 300
"""Longest cause of a failure that a revision keeps, in characters."""
_NAME_MAX: Final = 40
"""Longest stack name, in characters, within a config's name, which may have 64."""


class StackRevision(msgspec.Struct, frozen=True, kw_only=True):
    """A revision of a stack.  ``id`` and ``version`` belong to its config."""

    number: int
    id: str
    version: int
    created_at: str
    labels: Mapping[str, str]
    data: str
    """The stack's desired state, compressed and in base64."""
    of: str
    """The stack that it belongs to."""
    written_by: str = ""
    """The weakest role that has written it, as recorded by the managers, or empty if not recorded."""

    @property
    def config(self) -> str:
        """Return the name of the config."""
        return _name(self.of, self.number)

    @property
    def role(self) -> Binding:
        """Return the role with which a rollback runs: the writer's role, or operator of the stack if it is unknown."""
        try:
            return parse_binding(self.written_by)
        except InvalidArgument:
            return Binding(Role.OPERATOR, self.of)

    @property
    def state(self) -> str:
        """Return the state of the deploy."""
        return self.labels.get(STACK_STATE, "")

    @property
    def changes(self) -> str:
        """Return a summary of the deploy's changes."""
        return self.labels.get(STACK_CHANGES, "")

    def stack(self) -> Stack:
        """Return the desired state.

        Raises: InvalidArgument: the revision cannot be read, or contains objects of another stack.  This is checked
            because users who may write configs of a stack can write anything into a revision.
        """
        stack = self._decoded()
        if stack.name != self.of:
            raise InvalidArgument(
                f"revision {self.number} of {self.of} describes the stack {stack.name}, so it was not "
                f"written by a deploy of {self.of}"
            )
        for one in stack.services.values():
            name, labels = one.spec.name, one.spec.labels
            if labels.get(STACK_LABEL) != self.of or not name.startswith(f"{self.of}_"):
                raise InvalidArgument(
                    f"revision {self.number} of {self.of} has the service {name} of another stack, so it was not "
                    f"written by a deploy of {self.of}"
                )
        return stack

    def _decoded(self) -> Stack:
        try:
            with gzip.open(io.BytesIO(base64.b64decode(self.data))) as packed:
                data = packed.read(_UNPACKED_MAX + 1)
            if len(data) > _UNPACKED_MAX:
                raise ValueError("it is too large")
            return leniently(data, Stack)
        except (OSError, EOFError, ValueError, msgspec.DecodeError) as error:
            raise InvalidArgument(f"revision {self.number} cannot be read: {error}") from error

    @property
    def is_readable(self) -> bool:
        """Return whether ``stack`` can read it."""
        try:
            self.stack()
        except InvalidArgument:
            return False
        return True

    def is_of(self, asked: Stack) -> bool:
        """Return whether its desired state is equal to ``asked``.  An unreadable revision counts as different."""
        try:
            return self.stack() == asked
        except InvalidArgument:
            return False


def revisions_of(stack: str, configs: Iterable[Mapping[str, Any]]) -> list[StackRevision]:
    """Return the revisions of a stack, oldest first."""
    made: list[StackRevision] = []
    for one in configs:
        labels = one["Spec"].get("Labels") or {}
        number = labels.get(STACK_REVISION, "")
        if labels.get(STACK_LABEL) != stack or not (
            number.isascii() and number.isdigit() and len(number) < 10
        ):
            continue
        if one["Spec"]["Name"] != _name(stack, int(number)):
            continue  # Revisions are ordered by their names, because labels can be changed and names cannot.
        made.append(
            StackRevision(
                of=stack,
                written_by=str(one.get("WrittenBy") or ""),
                number=int(number),
                id=one["ID"],
                version=one["Version"]["Index"],
                created_at=one["CreatedAt"],
                labels=labels,
                data=one["Spec"].get("Data", ""),
            )
        )
    return sorted(made, key=lambda one: one.number)


def with_part(base: Stack, stack: Stack, only: Collection[str]) -> Stack:
    """Return ``base`` with the services ``only`` of ``stack``, for the revision of a deploy of these services.

    If a secret or config has other content in the files than in ``base``, both are kept, because other services still
    use the one in ``base``.
    """

    def files(before: Mapping[str, StackFile], now: Mapping[str, StackFile]) -> dict[str, StackFile]:
        kept = {
            key if key not in now or now[key].name == one.name else one.name: one
            for key, one in before.items()
        }
        return {**kept, **now}

    return replace(
        base,
        services={**base.services, **{name: stack.services[name] for name in only}},
        networks={**base.networks, **stack.networks},
        secrets=files(base.secrets, stack.secrets),
        configs=files(base.configs, stack.configs),
    )


def asked_for(stack: Stack, plan: StackPlan) -> Stack:
    """Return the desired state of a deploy of ``stack``, with digests of images, and with secrets and configs by name
    only.
    """
    specs = {one.name: one.spec for one in plan.changes if one.kind == "service"}
    return replace(
        stack,
        services={name: _with_spec(one, specs.get(one.spec.name)) for name, one in stack.services.items()},
        secrets={name: _by_name(one) for name, one in stack.secrets.items()},
        configs={name: _by_name(one) for name, one in stack.configs.items()},
    )


def body_of(stack: Stack, plan: StackPlan, number: int) -> dict[str, Any]:
    """Return the body of ``POST /configs/create`` for a revision.  Raises: InvalidArgument: it is too large."""
    data = gzip.compress(msgspec.json.encode(asked_for(stack, plan)), mtime=0)
    if len(data) > _BYTES_MAX:
        raise InvalidArgument(f"the stack is too large for a revision: {len(data)} bytes, compressed")
    return {
        "Name": _name(stack.name, number),
        "Labels": {
            STACK_LABEL: stack.name,
            STACK_REVISION: str(number),
            STACK_STATE: DEPLOYING,
            STACK_CHANGES: summary(plan),
        },
        "Data": base64.b64encode(data).decode(),
    }


def _name(stack: str, number: int) -> str:
    return f"{_short(stack)}_revision-{number}"


def _short(name: str) -> str:
    """Return the stack's name, cut to fit into a config's name, with a hash that keeps it unique."""
    return (
        name
        if len(name) <= _NAME_MAX
        else f"{name[: _NAME_MAX - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    )


def _with_spec(service: StackService, spec: Any) -> StackService:
    """Return the service with its spec in the plan, which has the image's digest."""
    return service if spec is None else replace(service, spec=spec)


def _by_name(file: StackFile) -> StackFile:
    return StackFile(place=file.place, name=file.name, is_external=True)


def summary(plan: StackPlan) -> str:
    """Return a summary of the plan's changes, such as ``1 created, 2 updated``."""
    words = {"+": "created", "~": "updated", "-": "removed"}
    counts = [
        f"{count} {word}"
        for sign, word in words.items()
        if (count := sum(one.action.value == sign for one in plan.effective))
    ]
    return ", ".join(counts) or "nothing"


def state_after(error: BaseException | None) -> str:
    """Return the revision's state after a deploy ended, with ``error`` if it failed."""
    if error is None:
        return DEPLOYED
    if isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
        return INTERRUPTED
    text = " ".join(str(error).split()) or type(error).__name__
    return f"failed: {text[:_CAUSE_MAX]}"


def unfinished_of(revisions: Sequence[StackRevision], began_ns: int) -> Sequence[StackRevision]:
    """Return the newest readable revisions whose deploys were killed, interrupted or replaced, oldest first.

    Those that are older than ``UNFINISHED_MAX_S`` at ``began_ns`` are left out.
    """
    made: list[StackRevision] = []
    since = began_ns - UNFINISHED_MAX_S * SECOND_NS
    for one in reversed(revisions):
        is_unfinished = one.state.startswith((DEPLOYING, INTERRUPTED, REPLACED))
        if not is_unfinished or unix_ns(one.created_at) < since or not one.is_readable:
            break
        made.append(one)
    return made[::-1]


def kept_of(revisions: Sequence[StackRevision]) -> Sequence[StackRevision]:
    """Return the revisions to keep: the newest ones within the limits of number and size, and the newest deployed one,
    which an undo needs.
    """
    made: list[StackRevision] = []
    size = 0
    for one in reversed(revisions):
        size += len(one.data)
        if len(made) == KEPT or (size > KEPT_BYTES and len(made) >= KEPT_AT_LEAST):
            break
        made.append(one)
    last = next((one for one in reversed(revisions) if one.state == DEPLOYED), None)
    if last is not None and last not in made:
        made.append(last)
    return made[::-1]


def names_of(revisions: Iterable[StackRevision]) -> set[str]:
    """Return the names of the secrets and configs that the revisions need.  Unreadable revisions are skipped."""
    made: set[str] = set()
    for one in revisions:
        try:
            stack = one.stack()
        except InvalidArgument:
            continue
        made |= {file.name for file in (*stack.secrets.values(), *stack.configs.values())}
    return made


_NONE_DEPLOYED = "no earlier revision of {} was deployed"


def before(stack: str, revisions: Sequence[StackRevision], number: int | None) -> StackRevision:
    """Return the revision to roll back to: ``number``, or the newest deployed revision before the last.

    Raises: InvalidArgument.
    """
    if number is not None:
        return numbered(by_number(revisions), number)
    deployed = [one for one in revisions if one.state == DEPLOYED]
    if deployed and deployed[-1] is revisions[-1]:
        deployed.pop()
    earlier = revisions[:-1]
    if not deployed and earlier:
        number = earlier[-1].number
        raise InvalidArgument(
            f"{_NONE_DEPLOYED.format(stack)}. skep stack rollback --to {number} {stack} deploys a failed revision."
        )
    return newest_deployed(stack, deployed)


def by_number(revisions: Iterable[StackRevision]) -> Mapping[int, StackRevision]:
    """Return the revisions of a stack by number, in their order."""
    return {one.number: one for one in revisions}


def numbered(revisions: Mapping[int, T], number: int) -> T:
    """Return the revision ``number`` of a stack or service.  Raises: InvalidArgument."""
    if number not in revisions:
        known = ", ".join(map(str, revisions)) or "none"
        raise InvalidArgument(f"there is no revision {number}. Choose one of {known}.")
    return revisions[number]


def pair_of(
    name: str, revisions: Mapping[int, T], first: int | None, second: int | None, *, kind: str
) -> tuple[T, T]:
    """Return the revisions to compare: by default the last two, or with one number that revision and the last.

    Args:
        name: Name of the stack or service.
        revisions: Its revisions by number, in order.
        kind: ``stack`` or ``service``.

    Raises: InvalidArgument.
    """
    numbers = list(revisions)
    if first is None and len(numbers) < 2:
        known = f"only revision {numbers[0]}" if numbers else "no revision"
        raise InvalidArgument(
            f"there is nothing to compare, because {name} has {known}. Run skep {kind} history {name}."
        )
    older = numbered(revisions, numbers[-2] if first is None else first)
    newer = numbered(revisions, numbers[-1] if second is None else second)
    return older, newer


def newest_deployed(stack: str, revisions: Sequence[StackRevision]) -> StackRevision:
    """Return the newest deployed revision, to which an undo returns.  Raises: InvalidArgument: no revision was
    deployed.
    """
    deployed = [one for one in revisions if one.state == DEPLOYED]
    if not deployed:
        raise InvalidArgument(f"{_NONE_DEPLOYED.format(stack)}. Run skep stack history {stack}.")
    return deployed[-1]


def refused(revision: StackRevision, beyond: Collection[str]) -> str:
    """Return the error of a rollback for which the rights of the revision's writer do not suffice."""
    name, number = revision.of, revision.number
    return (
        f"revision {number} of {name} was written with the role {revision.role}, which does not permit "
        f"{'; '.join(beyond)}. To use your own rights, run skep stack rollback --as-admin --to {number} {name}."
    )
