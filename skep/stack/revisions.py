"""The revisions of a stack: what each deploy asked for, kept with the stack.

A revision is a config of the cluster named ``STACK_revision-N``: ``docker stack rm`` takes it with the stack, and
everything that can read configs can read it.  It has specs and names, no content of secrets or configs; those that
kept revisions name are kept, too.
"""

import asyncio
import base64
import gzip
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.labels import STACK_CHANGES, STACK_REVISION, STACK_STATE
from skep.model.unknown import leniently
from skep.stack.planning import Plan
from skep.stack.project import NAMESPACE, Stack, StackFile, StackService

KEPT: Final = 10
DEPLOYED: Final = "deployed"
_BYTES_MAX: Final = 900_000
"""Of a revision, compressed: a config has less than 1000 KiB."""
_UNPACKED_MAX: Final = 64 << 20
_CAUSE_MAX: Final = 300
_NAME_MAX: Final = 40


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """``id`` and ``version``: of the config."""

    number: int
    id: str
    version: int
    created_at: str
    labels: Mapping[str, str]
    data: str
    """Compressed, in base64."""

    @property
    def state(self) -> str:
        """Of the deploy."""
        return self.labels.get(STACK_STATE, "")

    @property
    def changes(self) -> str:
        """What the deploy changed."""
        return self.labels.get(STACK_CHANGES, "")

    def stack(self) -> Stack:
        """What it asked for.  Raises: InvalidArgument: it cannot be read."""
        try:
            with gzip.open(io.BytesIO(base64.b64decode(self.data))) as packed:
                data = packed.read(_UNPACKED_MAX + 1)
            if len(data) > _UNPACKED_MAX:
                raise ValueError("it is too large")
            return leniently(data, Stack)
        except (OSError, EOFError, ValueError, msgspec.DecodeError) as error:
            raise InvalidArgument(f"revision {self.number} cannot be read: {error}") from error

    def is_of(self, asked: Stack) -> bool:
        """Whether it has exactly what a deploy has ``asked`` for; false: it cannot be read."""
        try:
            return self.stack() == asked
        except InvalidArgument:
            return False


def revisions_of(stack: str, configs: Iterable[Mapping[str, Any]]) -> list[Revision]:
    """The revisions of a stack, the oldest first."""
    made: list[Revision] = []
    for one in configs:
        labels = one["Spec"].get("Labels") or {}
        number = labels.get(STACK_REVISION, "")
        if labels.get(NAMESPACE) != stack or not (number.isascii() and number.isdigit() and len(number) < 10):
            continue
        made.append(
            Revision(
                number=int(number),
                id=one["ID"],
                version=one["Version"]["Index"],
                created_at=one["CreatedAt"],
                labels=labels,
                data=one["Spec"].get("Data", ""),
            )
        )
    return sorted(made, key=lambda one: one.number)


def asked_for(stack: Stack, plan: Plan) -> Stack:
    """What a deploy of ``stack`` asks for: with the digests of images, secrets and configs by their names."""
    specs = {one.name: one.spec for one in plan.changes if one.kind == "service"}
    return replace(
        stack,
        services={name: _with_spec(one, specs.get(one.spec.name)) for name, one in stack.services.items()},
        secrets={name: _by_name(one) for name, one in stack.secrets.items()},
        configs={name: _by_name(one) for name, one in stack.configs.items()},
    )


def body_of(stack: Stack, plan: Plan, number: int) -> dict[str, Any]:
    """A revision as ``POST /configs/create`` has it.  Raises: InvalidArgument: it is too large."""
    data = gzip.compress(msgspec.json.encode(asked_for(stack, plan)), mtime=0)
    if len(data) > _BYTES_MAX:
        raise InvalidArgument(f"the stack is too large for a revision: {len(data)} bytes, compressed")
    return {
        "Name": f"{_short(stack.name)}_revision-{number}",
        "Labels": {
            NAMESPACE: stack.name,
            STACK_REVISION: str(number),
            STACK_STATE: "deploying",
            STACK_CHANGES: summary(plan),
        },
        "Data": base64.b64encode(data).decode(),
    }


def _short(name: str) -> str:
    """A name that leaves room for the rest of a config's; no other stack has it."""
    return (
        name
        if len(name) <= _NAME_MAX
        else f"{name[: _NAME_MAX - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    )


def _with_spec(service: StackService, spec: Any) -> StackService:
    """With the digests of its images."""
    return service if spec is None else replace(service, spec=spec)


def _by_name(file: StackFile) -> StackFile:
    return StackFile(place=file.place, name=file.name, is_external=True)


def summary(plan: Plan) -> str:
    """``1 created, 2 updated``."""
    words = {"+": "created", "~": "updated", "-": "removed"}
    counts = [
        f"{count} {word}"
        for sign, word in words.items()
        if (count := sum(one.action.value == sign for one in plan.effective))
    ]
    return ", ".join(counts) or "nothing"


def state_after(error: BaseException | None) -> str:
    """What a deploy that has ended leaves as the state of its revision."""
    if error is None:
        return DEPLOYED
    if isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
        return "interrupted"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"failed: {text[:_CAUSE_MAX]}"


def names_kept(revisions: Sequence[Revision]) -> set[str]:
    """The names of secrets and configs that the newest ``KEPT`` revisions need; one that cannot be read needs none."""
    made: set[str] = set()
    for one in revisions[-KEPT:]:
        try:
            stack = one.stack()
        except InvalidArgument:
            continue
        made |= {file.name for file in (*stack.secrets.values(), *stack.configs.values())}
    return made


def before(revisions: Sequence[Revision], number: int | None) -> Revision:
    """The revision to return to: ``number``, or the newest deployed one before the last.  Raises: InvalidArgument."""
    if number is not None:
        found = [one for one in revisions if one.number == number]
        if not found:
            known = ", ".join(str(one.number) for one in revisions) or "none"
            raise InvalidArgument(f"there is no revision {number}: there are {known}")
        return found[0]
    deployed = [one for one in revisions if one.state == DEPLOYED]
    if deployed and deployed[-1] is revisions[-1]:
        deployed.pop()
    return newest_deployed(deployed)


def newest_deployed(revisions: Sequence[Revision]) -> Revision:
    """What a deploy that failed changed.  Raises: InvalidArgument: there is none."""
    deployed = [one for one in revisions if one.state == DEPLOYED]
    if not deployed:
        raise InvalidArgument("there is no earlier revision that was deployed (skep stack history STACK)")
    return deployed[-1]
