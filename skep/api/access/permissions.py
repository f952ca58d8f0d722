"""The roles that requests need, in one table of all endpoints, for users and for containers that mount the API's
socket.

A path that is not in the table needs an administrator.  Paths are without their version.
"""

import re
from collections.abc import Collection
from enum import Enum, auto
from typing import Final

import msgspec

from skep.errors import NamesAnother, NotFound, SkepError
from skep.model.permissions.access import EVERY_STACK, Identity, Role
from skep.model.permissions.rights import ApiAccess
from skep.model.permissions.value_rights import image_rights
from skep.model.values.stacks import STACK_LABEL


class PermissionScope(Enum):
    """The subject of a request, which decides whether a role in a single stack suffices."""

    ANY = auto()
    """Nothing that belongs to a stack.  A role in any stack suffices."""
    CLUSTER = auto()
    """The whole cluster, or a part that all stacks share.  This needs a role in the whole cluster."""
    LIST = auto()
    """Objects of a kind.  Only objects in the identity's stacks are shown."""
    OBJECT = auto()
    """The object that the path names."""
    NEW = auto()
    """An object that the body describes."""
    CHANGE = auto()
    """An existing object, which changes to the body's description."""


class PermissionRule(msgspec.Struct, frozen=True, kw_only=True):
    """Requests by one of ``methods`` with a matching path.

    ``kind`` is the kind of the objects.  ``container`` is the access that containers need, or None for full access.
    ``is_document`` tells that the response is one JSON document, which may contain secrets.
    """

    methods: frozenset[str]
    pattern: re.Pattern[str]
    role: Role
    scope: PermissionScope
    kind: str = ""
    container: ApiAccess | None = None
    is_document: bool = True


class KnownObject(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about an existing object.  ``stack`` is empty if it belongs to none."""

    id: str
    stack: str = ""
    machine_rights: str = ""
    """Right over its machine that only administrators may grant, or empty."""


class NewObject(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about an object that a request's body describes."""

    name: str
    stack: str = ""
    machine_rights: str = ""
    raised_priority: int = 0
    """The priority of a service, if it is above 0 and above the service's current one."""
    uses: tuple[tuple[str, KnownObject | None, str], ...] = ()
    """Objects to which it refers: the kind, the facts (None if it does not exist), and the name or id in the body."""
    is_planned: bool = False
    """Whether the same deploy may create the objects that it uses before it.  They then must have a name of its
    stack.
    """
    excess: str = ""
    """Reason why users below administrator may not add it, if its stack has too many such objects.  Otherwise empty."""
    volumes: tuple[str, ...] = ()
    """Names of local volumes.  Only its name shows to which stack a local volume belongs."""


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Objects of a request.  ``stacks`` has every stack of the cluster."""

    known: KnownObject | None = None
    new: tuple[NewObject, ...] = ()
    stacks: Collection[str] = ()


def rule_for(method: str, path: str) -> PermissionRule:
    """Return the rule of a request.  A request that is not in the table needs an administrator.

    Args:
        path: Path as sent, or the pattern of a route: ``/services/{id}``.
    """
    method = "GET" if method == "HEAD" else method
    for rule in RULES:
        if method in rule.methods and rule.pattern.fullmatch(path):
            return rule
    return UNKNOWN


def may(identity: Identity, rule: PermissionRule, facts: RequestFacts | None = None) -> str | None:
    """Return the reason why ``identity`` may not make a request of ``rule``, or None if it may.

    Args:
        facts: Facts about the request.  With None, only the role is checked.
    """
    if identity.is_admin:
        return None
    if rule.role is Role.ADMIN:
        return "only administrators may do this"
    in_cluster = (identity.role_in(EVERY_STACK) or 0) >= rule.role
    somewhere = max((one.role for one in identity.bindings), default=0) >= rule.role
    if not somewhere or (rule.scope is PermissionScope.CLUSTER and not in_cluster):
        where = "" if rule.scope is not PermissionScope.CLUSTER else " of the whole cluster"
        return f"the role {rule.role.word}{where} is needed, and the user has {_roles(identity)}"
    if facts is None:
        return None
    changes = rule.role is Role.OPERATOR
    if changes and facts.known is not None and facts.known.machine_rights:
        return f"it has {facts.known.machine_rights}, which only administrators may give"
    for new in facts.new:
        if new.machine_rights:
            return f"{new.machine_rights}: only administrators may give that"
    if facts.known is not None:
        if not in_cluster and (why := _outside(identity, rule, facts.known.stack)):
            return why
        if any(new.stack != facts.known.stack for new in facts.new):
            return f"only administrators may move a {rule.kind} to another stack"
    reasons = [new.excess for new in facts.new]
    if not in_cluster:
        reasons = [_why_not_new(identity, rule, new, facts.stacks) for new in facts.new] + reasons
    return next(filter(None, reasons), None)


def sees(identity: Identity, stack: str) -> bool:
    """Return whether ``identity`` may see an object of ``stack``, which is empty for objects without a stack."""
    return identity.role_in(stack or EVERY_STACK) is not None


def shown_error(identity: Identity, error: SkepError) -> SkepError:
    """Return ``error`` without the name of an object that ``identity`` may not see."""
    if isinstance(error, NamesAnother) and not sees(identity, error.stack):
        return error.without_name()
    return error


def missing(rule: PermissionRule, name: str, why: str) -> NotFound | None:
    """Return the error for a user who may not read objects of this kind, or None if ``rule`` reads no single object.

    ``docker inspect NAME`` tries one kind after the other, and continues only after 404.

    Args:
        why: The reason from ``may``.
    """
    match rule.kind, rule.scope:
        case "image", PermissionScope.CLUSTER:
            return NotFound(f"No such image: {name} ({why})")
        case "plugin", PermissionScope.CLUSTER:
            return NotFound(f'plugin "{name}" not found ({why})')
        case _:
            return None


def why_not_ps(arguments: str) -> str:
    """Return why only administrators may run ``ps`` with ``arguments`` (``docker top``), or an empty text.

    ``ps`` runs as root, and can print the environment of processes, or other processes.
    """
    if _PS_ARGUMENTS.fullmatch(arguments.strip(" ")):
        return ""
    return (
        f"only administrators may run ps with {arguments!r}; "
        "others may with -ef, aux and the like, or with columns (-eo pid,args)"
    )


def why_not_image(image: str) -> str:
    """Return why only an administrator may have the node look up an image, or an empty string."""
    return next((f"{why}: only administrators may use it" for why in image_rights(image)), "")


def is_name_of(name: str, stack: str, stacks: Collection[str]) -> bool:
    """Return whether an object called ``name`` belongs to ``stack`` and not to one of ``stacks`` with a longer name.

    A volume's name may have placeholders, which can expand to any text.  Then the part before the first placeholder
    decides.
    """
    name, is_open, _ = name.partition("{{")
    if is_open:
        name = name.rstrip()  # {{- trims spaces as well
    longer = [f"{one}_" for one in stacks if one.startswith(f"{stack}_")]
    return name.startswith(f"{stack}_") and not any(
        name.startswith(one) or (is_open and one.startswith(name)) for one in longer
    )


def _roles(identity: Identity) -> str:
    return ", ".join(map(str, identity.bindings)) or "none"


def _outside(identity: Identity, rule: PermissionRule, stack: str) -> str:
    if (identity.role_in(stack) or 0) >= rule.role if stack else False:
        return ""
    owner = f"the stack {stack}" if stack else "no stack"
    return f"the {rule.kind} belongs to {owner}, and the user's roles are {_roles(identity)}"


def _why_not_new(identity: Identity, rule: PermissionRule, new: NewObject, stacks: Collection[str]) -> str:
    """Return why an identity with roles in single stacks may not create ``new``, or an empty text."""
    if not new.stack:
        label = f"the {rule.kind} {new.name} needs the label {STACK_LABEL}"
        return f"{label}, because the user's roles are {_roles(identity)}"
    if why := _outside(identity, rule, new.stack):
        return why
    for name in (new.name, *new.volumes):
        if not is_name_of(name, new.stack, stacks):
            more = (
                ", and with no other stack's name, whatever its placeholders become" if "{{" in name else ""
            )
            return f"the name {name} is not one of the stack {new.stack}: it has to begin with {new.stack}_{more}"
    if new.raised_priority:
        return f"priority {new.raised_priority}: only users with a role in the whole cluster may give more than 0"
    for kind, used, word in new.uses:
        if used is None and (kind == "service" or new.is_planned) and is_name_of(word, new.stack, stacks):
            continue  # a dependency may be created after the service
        if used is None or used.stack != new.stack:
            return f"the {kind} {word} does not belong to the stack {new.stack}"
    return ""


_PS_COLUMNS = r" *(?!environ)[a-z_%]+(?::[0-9]+)?(?:,(?!environ)[a-z_%]+(?::[0-9]+)?)*"
_PS_ARGUMENTS: Final = re.compile(
    r"|-[AFLefjlw]+"
    r"|-?[acjlnuvwx]+"
    rf"|(?:(?:-[Ae]+|[ax]+) +)?(?:-[Ae]*|[ax]*)o{_PS_COLUMNS}(?: +-?o{_PS_COLUMNS})*"
)
"""Arguments of ps that choose columns.

If arguments contradict each other, ps parses all of them again in the BSD syntax, in which ``-e`` shows the
environment.  None of these combinations causes that.  Users cannot choose titles of columns.

Source: procps, src/ps/parser.c (arg_parse).
"""


# --- the table ---------------------------------------------------------------------------------------------------


def _rule(
    methods: str,
    pattern: str,
    role: Role,
    scope: PermissionScope,
    kind: str = "",
    *,
    container: ApiAccess | None = None,
    is_document: bool = True,
) -> PermissionRule:
    return PermissionRule(
        methods=frozenset(methods.split()),
        pattern=re.compile(pattern),
        role=role,
        scope=scope,
        kind=kind,
        container=container,
        is_document=is_document,
    )


def _of(kind: str, prefix: str) -> tuple[PermissionRule, ...]:
    """Return the rules of a kind of objects whose details are the same as in the list."""
    name = rf"{prefix}/[^/]+"
    return (
        _rule("GET", prefix, _VIEWER, PermissionScope.LIST, kind, container=_READ),
        _rule("GET", name, _VIEWER, PermissionScope.OBJECT, kind, container=_READ),
        _rule("POST", f"{prefix}/create", _OPERATOR, PermissionScope.NEW, kind),
        _rule("POST", f"{name}/update", _OPERATOR, PermissionScope.CHANGE, kind),
        _rule("DELETE", name, _OPERATOR, PermissionScope.OBJECT, kind),
    )


_VIEWER, _OPERATOR, _ADMIN = Role.VIEWER, Role.OPERATOR, Role.ADMIN
_READ, _INSPECT = ApiAccess.READ, ApiAccess.INSPECT
_NAME = r"[^/]+"

UNKNOWN: Final = _rule("", "", _ADMIN, PermissionScope.CLUSTER)

RULES: Final = (
    _rule("GET", r"/(?:_ping|version)", _VIEWER, PermissionScope.ANY, container=_READ, is_document=False),
    _rule("GET", r"/info", _VIEWER, PermissionScope.ANY, container=_READ),
    # Events include commands that containers ran, and the activity of other stacks.
    _rule("GET", r"/events", _VIEWER, PermissionScope.CLUSTER, container=_READ, is_document=False),
    _rule(
        "GET",
        r"/skep/(?:events|history|rebalance|state|verify|view|view/stream)",
        _VIEWER,
        PermissionScope.CLUSTER,
    ),
    _rule(
        "GET",
        r"/metrics|/skep/cluster/(?:store|level)|/skep/doctor/network",
        _VIEWER,
        PermissionScope.CLUSTER,
    ),
    _rule("POST DELETE", r"/skep/rebalance", _OPERATOR, PermissionScope.CLUSTER),
    # the throughput test uses the full bandwidth of every link
    _rule("POST", r"/skep/doctor/network", _OPERATOR, PermissionScope.CLUSTER),
    _rule("GET", r"/ui(?:/.*)?", _VIEWER, PermissionScope.ANY),  # the dashboard's files
    _rule("GET", r"/skep/quorum|/skep/access|/skep/cluster/freezes", _VIEWER, PermissionScope.ANY),
    # Its answer names the services of the user's stacks only.
    _rule("GET", r"/skep/what-if(?:/survive)?|/skep/(?:catalog|door)", _VIEWER, PermissionScope.ANY),
    _rule("PUT", rf"/skep/registrations/{_NAME}", _OPERATOR, PermissionScope.NEW, "registration"),
    _rule("POST", rf"/skep/registrations/{_NAME}/renew", _OPERATOR, PermissionScope.OBJECT, "registration"),
    _rule("DELETE", rf"/skep/registrations/{_NAME}", _OPERATOR, PermissionScope.OBJECT, "registration"),
    _rule("GET", r"/distribution/.+/json", _OPERATOR, PermissionScope.ANY),
    # Objects of the cluster.
    *_of("service", "/services"),
    _rule("POST", r"/networks/[^/]+/update", _ADMIN, PermissionScope.CLUSTER),  # its subnets
    *_of("network", "/networks"),
    *_of("secret", "/secrets"),
    *_of("config", "/configs"),
    _rule("GET", r"/tasks", _VIEWER, PermissionScope.LIST, "task", container=_READ),
    _rule("GET", rf"/tasks/{_NAME}", _VIEWER, PermissionScope.OBJECT, "task", container=_READ),
    # Every user sees nodes and their names, by which tasks are listed.
    _rule("GET", r"/nodes(?:/[^/]+)?", _VIEWER, PermissionScope.ANY, container=_READ),
    # Only administrators see join tokens, because a machine with a token can become a manager.  The handler refuses
    # other users with that reason, because a larger role would not help them.
    _rule("GET", r"/swarm", _VIEWER, PermissionScope.ANY, container=_READ),
    _rule(
        "GET",
        rf"/services/{_NAME}/logs",
        *(_VIEWER, PermissionScope.OBJECT, "service"),
        container=_INSPECT,
        is_document=False,
    ),
    _rule(
        "GET",
        rf"/tasks/{_NAME}/logs",
        _VIEWER,
        PermissionScope.OBJECT,
        "task",
        container=_INSPECT,
        is_document=False,
    ),
    _rule(
        "GET",
        rf"/skep/services/{_NAME}/(?:explain|revisions|runs)",
        _VIEWER,
        PermissionScope.OBJECT,
        "service",
    ),
    _rule("GET", rf"/skep/tasks/{_NAME}/explain", _VIEWER, PermissionScope.OBJECT, "task"),
    _rule("GET", rf"/skep/tasks/{_NAME}/target", _VIEWER, PermissionScope.OBJECT, "target"),
    _rule(
        "GET",
        rf"/skep/tasks/{_NAME}/container/(?:json|top|stats|logs)",
        _VIEWER,
        PermissionScope.OBJECT,
        "target",
    ),
    _rule(
        "POST",
        rf"/skep/services/{_NAME}/(?:stop|start|update/(?:pause|resume|abort|promote|switch-back))",
        _OPERATOR,
        PermissionScope.OBJECT,
        "service",
    ),
    _rule("GET", r"/skep/jobs", _VIEWER, PermissionScope.LIST, "service"),
    _rule("POST", rf"/skep/services/{_NAME}/(?:run|retry)", _OPERATOR, PermissionScope.OBJECT, "service"),
    _rule("POST", r"/skep/services/changes", _OPERATOR, PermissionScope.NEW, "service"),
    _rule("POST", r"/skep/access/certificates", _VIEWER, PermissionScope.ANY),
    _rule(
        "POST",
        r"/skep/services/placement|/skep/what-if/(?:services|survive)",
        _OPERATOR,
        PermissionScope.NEW,
        "service",
    ),
    _rule("POST", r"/skep/stacks/check", _OPERATOR, PermissionScope.NEW, "stack"),
    # A user who can run commands in a container, or read its files, can read its secrets.
    _rule(
        "GET POST PUT",
        rf"/skep/tasks/{_NAME}/(?:container/(?:exec|attach|resize|wait|kill|archive)|exec/[^/]+/[a-z]+|port/[^/]+)",
        *(_OPERATOR, PermissionScope.OBJECT, "target"),
    ),
    _rule("GET", rf"/skep/stacks/{_NAME}/quota", _VIEWER, PermissionScope.OBJECT, "stack"),
    _rule("PUT DELETE", rf"/skep/stacks/{_NAME}/(freeze|window)", _OPERATOR, PermissionScope.OBJECT, "stack"),
    # Objects of one node.  A local volume can be any directory of the machine.
    _rule("GET", r"/containers/json", _VIEWER, PermissionScope.LIST, "container", container=_READ),
    _rule("GET", rf"/containers/{_NAME}/json", _VIEWER, PermissionScope.OBJECT, "container", container=_READ),
    # command lines, and with options the environment
    _rule(
        "GET", rf"/containers/{_NAME}/top", _VIEWER, PermissionScope.OBJECT, "container", container=_INSPECT
    ),
    _rule(
        "GET",
        rf"/containers/{_NAME}/stats",
        *(_VIEWER, PermissionScope.OBJECT, "container"),
        container=_READ,
        is_document=False,
    ),
    _rule(
        "GET",
        rf"/containers/{_NAME}/logs",
        *(_VIEWER, PermissionScope.OBJECT, "container"),
        container=_INSPECT,
        is_document=False,
    ),
    _rule(
        "GET",
        rf"/containers/{_NAME}/changes",
        _VIEWER,
        PermissionScope.OBJECT,
        "container",
        container=_INSPECT,
    ),
    _rule("GET", r"/volumes", _VIEWER, PermissionScope.LIST, "volume", container=_READ),
    _rule("GET", rf"/volumes/{_NAME}", _VIEWER, PermissionScope.OBJECT, "volume", container=_READ),
    _rule("GET", r"/skep/cluster/volumes", _VIEWER, PermissionScope.LIST, "volume"),
    _rule("GET", r"/skep/cluster/volumes/[^/]+", _VIEWER, PermissionScope.OBJECT, "volume"),
    _rule("GET", r"/images/json", _VIEWER, PermissionScope.CLUSTER, container=_READ),
    _rule("GET", r"/images/.+/json", _VIEWER, PermissionScope.CLUSTER, "image", container=_READ),
    _rule("GET", r"/images/.+/attestations", _VIEWER, PermissionScope.CLUSTER, "image", container=_READ),
    # The history contains the values of ENV and ARG.
    _rule("GET", r"/images/.+/history", _VIEWER, PermissionScope.CLUSTER, container=_INSPECT),
    _rule("GET", r"/exec/[^/]+/json", _VIEWER, PermissionScope.CLUSTER, container=_INSPECT),
    _rule("GET", r"/system/df", _VIEWER, PermissionScope.CLUSTER, container=_INSPECT),
    _rule("GET", r"/plugins", _VIEWER, PermissionScope.CLUSTER),
    _rule("GET", r"/plugins/.+/json", _VIEWER, PermissionScope.CLUSTER, "plugin"),
)
"""The first matching rule applies."""
