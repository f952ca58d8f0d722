"""Writes the pages of this folder that say what the code says, and the man page: ``make reference``.

``PAGES`` maps a path, relative to the repository, to the function that gives its text; ``tests/test_reference.py``
compares the files with it.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import click
import msgspec

from docs.reference.captures import screens
from docs.reference.label_table import LABELS, LabelTarget
from docs.reference.metric_page import metrics
from skep import __version__
from skep.api.errors import RPC_CODES, STATUSES
from skep.api.http.versions import NEWEST
from skep.cli.main import main
from skep.configuration.configuration import Configuration
from skep.configuration.settings import SETTINGS, Setting
from skep.configuration.sources import DEFAULT_DAEMON_JSON, DEFAULT_TOML
from skep.manager.failover import records as failover_records
from skep.manager.services import freezes
from skep.manager.telemetry import events as manager_events
from skep.manager.telemetry import node_events as from_nodes
from skep.manager.verify import records as verify_records
from skep.model.permissions import field_rights, value_rights
from skep.model.permissions.field_rights import Field
from skep.model.permissions.value_rights import Reach
from skep.node import events as node_events
from skep.rpc.errors import STATUS_OF
from tests.support.harness.sources import parsed

ROOT = Path(__file__).parents[2]
WIDTH = 100
_NOTICE = "<!-- Written by `make reference`; edit the code, or docs/reference/generate.py. -->\n"
_DEFAULT_IN_HELP = re.compile(r"\s*\(([^()]+)\)$")


def paragraph(*sentences: str) -> list[str]:
    """Lines of a paragraph, and an empty one."""
    wrapped = textwrap.wrap(" ".join(sentences), 130, break_long_words=False, break_on_hyphens=False)
    return [*wrapped, ""]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |"


# --- configuration --------------------------------------------------------------------------------------------


def configuration() -> str:
    """Every setting of a node."""
    rows = [_setting_row(setting) for setting in SETTINGS]
    head = ("key", "flag", "`daemon.json`", "form", "default", "what it does", "restart")
    return "\n".join(
        [
            "# Configuration of a node",
            "",
            _NOTICE,
            *paragraph(
                f"Write the settings of a node into `{DEFAULT_TOML}`, or give them as flags of `skep daemon`.",
                "The daemon reads flags first, then this file (`--config FILE` names another one), then Docker's",
                f"`{DEFAULT_DAEMON_JSON}` (`--daemon-json FILE`, or `--daemon-json ''` for none). The first that has a",
                "setting decides it. The daemon refuses a key that does not exist. It logs keys of `daemon.json` that",
                "it does not use.",
            ),
            *paragraph(
                "If the last column says `no`, run `systemctl reload skep` (SIGHUP) after a change. Otherwise run",
                "`systemctl restart skep`. Containers keep running. After a reload, the log says which changes",
                "need a restart. You can repeat a flag whose key is a plural. In TOML such a key is a list.",
            ),
            *table(head, rows),
            "",
            "## Example",
            "",
            "```toml",
            "# /etc/skep/skep.toml",
            'advertise-addr = "192.0.2.7"',
            'data-path-addr = "10.0.0.7"',
            'labels = ["zone=inner", "disk=ssd"]',
            'generic-resources = ["gpu=2"]',
            'registry-mirrors = ["https://mirror.example.com"]',
            'store-quota = "8GiB"',
            "```",
            "",
            "To change settings of the whole cluster, see `docker swarm update --help` and",
            "[labels of the cluster](labels.md#the-cluster).",
            "",
        ]
    )


def _setting_row(setting: Setting) -> tuple[str, ...]:
    short = f"`{setting.short}`, " if setting.short else ""
    text = _DEFAULT_IN_HELP.sub("", setting.help)
    return (
        f"`{setting.toml_key}`",
        f"{short}`--{setting.name}`",
        f"`{setting.docker_key}`" if setting.docker_key else "",
        form_of(setting),
        default_of(setting),
        text,
        "no" if setting.reloads else "yes",
    )


def form_of(setting: Setting) -> str:
    """How its value is written: the first sentence of the docstring of what reads it."""
    sentence = re.split(r"\.(?:\s|$)", inspect.getdoc(setting.read) or "", maxsplit=1)[0]
    return " ".join(sentence.replace("``", "`").split())


def default_of(setting: Setting) -> str:
    """In the words of its help, else as the configuration has it; empty: none."""
    if named := _DEFAULT_IN_HELP.search(setting.help):
        return f"`{named[1]}`" if " " not in named[1] else named[1]
    value = getattr(Configuration(), setting.attribute)
    if value is None or value in ("", (), {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# --- labels ---------------------------------------------------------------------------------------------------


def labels() -> str:
    """Every label of ours."""
    lines = [
        "# Labels",
        "",
        _NOTICE,
        *paragraph(
            "You set Skep's own features with labels that begin with `skep.`, because Docker's API has no fields for",
            "them. Every Docker client can set and read them. Write durations as in Docker: `500ms`, `30s`, `5m`,",
            "`2h`. If a value is wrong, the request is refused.",
        ),
    ]
    for target in LabelTarget:
        ours = [label for label in LABELS if label.target is target]
        title = {
            "ENGINE": "Reported by nodes",
            "CLUSTER": "The cluster",
            "CONTAINER": "Containers of services",
        }.get(target.name)
        lines += [f"## {title or f'{target.name.capitalize()}s'}", "", target.value, ""]
        if target is LabelTarget.ENGINE:
            rows: list[Sequence[str]] = [(f"`{one.name}`", one.values, one.effect) for one in ours]
            lines += [*table(("label", "value", "meaning"), rows), ""]
        else:
            rows = [(f"`{one.name}`", one.values, one.default, one.effect) for one in ours]
            lines += [*table(("label", "values", "default", "effect"), rows), ""]
    lines += [
        *paragraph(
            "Labels like `skep.publish.host-ip` apply to all ports of a service, `skep.publish.8080.host-ip` to port",
            "8080, and `skep.publish.8080/udp.host-ip` to one of two ports with that number.",
            "More: [publish ports](../guide/ports.md).",
        ),
        *paragraph(
            "Containers of tasks carry Docker's labels: `com.docker.swarm.node.id`, `com.docker.swarm.service.id`,",
            "`com.docker.swarm.service.name`, `com.docker.swarm.task`, `com.docker.swarm.task.id`,",
            "`com.docker.swarm.task.name`.",
        ),
    ]
    return "\n".join(lines)


# --- rights ---------------------------------------------------------------------------------------------------


def rights() -> str:
    """Every field and label, with its class."""
    lines = [
        "# Rights by field",
        "",
        _NOTICE,
        *paragraph(
            "Users with the role `operator` create and change services, networks, secrets and configs. Each field and",
            "each `skep.*` label has a class: *container* affects the stack's containers only, *node* reaches the",
            "machine, *cluster* reaches other stacks. The last column says which values only administrators may set.",
            "If a field or label is not listed, only administrators may set it. An error names the field or label.",
            "More: [what a role allows](../guide/roles.md).",
        ),
    ]
    labels_of = {
        "Labels of services": field_rights.SERVICE_LABELS,
        "Labels of containers": field_rights.CONTAINER_LABELS,
        "Labels of networks": field_rights.NETWORK_LABELS,
        "Labels of secrets": field_rights.SECRET_LABELS,
        "Labels of configs": field_rights.CONFIG_LABELS,
        "Options of log drivers": {name: Field(one) for name, one in value_rights.LOG_OPTIONS.items()},
        "Options of networks": {name: Field(one) for name, one in value_rights.NETWORK_OPTIONS.items()},
    }
    for type_, fields in field_rights.FIELDS.items():
        encoded = {one.name: one.encode_name for one in msgspec.structs.fields(type_)}
        rows = [_field_row(encoded[name], field) for name, field in fields.items()]
        if rows:
            lines += [f"## {type_.__name__}", "", *table(("field", "class", "only administrators"), rows), ""]
    for title, named in labels_of.items():
        is_option = title.startswith("Options of log")
        rows = [_field_row(f"`{name}`", field, some=is_option) for name, field in sorted(named.items())]
        lines += [f"## {title}", "", *table(("name", "class", "only administrators"), rows), ""]
    limits = ((f"`{name}`", sentence_of(bound)) for name, bound in sorted(value_rights.ULIMITS.items()))
    lines += ["## Ulimits", "", *table(("name", "only administrators"), limits), ""]
    lines += ["Only administrators may set other ulimits.", ""]
    return "\n".join(lines)


def _field_row(name: str, field: Field, *, some: bool = False) -> tuple[str, str, str]:
    only = "Anything."
    if field.why is not None:
        only = sentence_of(field.why)
    elif field.reach is Reach.CONTAINER:
        only = ""
    elif some:
        only = "Unix sockets and files."
    return name, field.reach.value, only


def sentence_of(function: Callable[..., object]) -> str:
    """Return the docstring of a rule on one line."""
    return " ".join((inspect.getdoc(function) or "").split())


# --- commands -------------------------------------------------------------------------------------------------


def commands(
    command: click.Command = main, name: str = "skep", parent: click.Context | None = None
) -> Iterator[click.Context]:
    """A context of every command, parents first."""
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    yield context
    if isinstance(command, click.Group):
        for verb in command.list_commands(context):
            child = command.get_command(context, verb)
            assert child is not None
            yield from commands(child, verb, context)


def cli() -> str:
    """Every command with its help."""
    lines = [
        "# The `skep` command",
        "",
        _NOTICE,
        *paragraph(
            "`skep --help` and `skep COMMAND --help` print the same texts. All other docker commands also work: `skep",
            "service ls` runs `docker service ls` on the same node.",
        ),
        *paragraph(
            "Commands that list or show something accept `-o wide|json|yaml`, `--format TEMPLATE` (a Go template, or",
            "docker's `json` and `table TEMPLATE`) and `--watch`. Output to a terminal has colors and is cut to its",
            "width. Output to a pipe is plain and complete. `NO_COLOR` turns colors off. See [screens.md](screens.md)",
            "for examples.",
        ),
        "## Exit codes",
        "",
        "Results go to stdout, everything else to stderr.",
        "",
        *table(
            ("code", "command", "meaning"),
            [
                (str(code), f"`{command}`" if command else "every command", meaning)
                for code, command, meaning in EXIT_CODES
            ],
        ),
        "",
    ]
    for context in commands():
        path = context.command_path
        lines += [
            f"{'#' * min(path.count(' ') + 2, 4)} `{path}`",
            "",
            "```text",
            *help_lines(context),
            "```",
            "",
        ]
    return "\n".join(lines)


EXIT_CODES: Sequence[tuple[int | str, str, str]] = (
    (0, "", "The command succeeded and found no problem."),
    (1, "", "The command failed or found a problem. The reason is on stderr."),
    (2, "", "Wrong usage: an unknown option or a missing argument."),
    (2, "skep stack plan", "Something would change."),
    (1, "skep stack plan", "The files are wrong, or the managers would refuse something."),
    (
        1,
        "skep stack deploy",
        "Services do not run, a newer deploy replaced this one, or the API rejected a change.",
    ),
    (1, "skep service wait", "A service does not run in time, or waiting cannot help."),
    (3, "skep status", "A node or a service is not in its desired state."),
    (4, "skep status", "The cluster has no leader."),
    (3, "skep what-if", "Tasks do not run afterwards, or fewer than a service's minimum run meanwhile."),
    (3, "skep survive", "A single loss takes a service down, or its data away."),
    (1, "skep verify", "An invariant is violated."),
    (3, "skep version --all", "Nodes have different versions."),
    (2, "skep upgrade", "With --dry-run: the upgrade is blocked."),
    (3, "skep reboot-lock status", "A lock is overdue."),
    ("any", "skep exec", "Exit code of the command in the container."),
    ("any", "skep run", "Exit code of the container."),
    ("any", "skep attach", "Exit code of the container."),
    ("any", "skep service ls", "Exit code of docker, for all of docker's commands."),
)
"""Code, command (none: every command), meaning."""


def help_lines(context: click.Context) -> list[str]:
    return [line.rstrip() for line in context.command.get_help(context).splitlines()]


def man_page() -> str:
    """``skep.1``."""
    lines = [
        '.\\" Written by `make reference`.',
        f'.TH SKEP 1 "" "skep {__version__}" "User Commands"',
        ".SH NAME",
        "skep \\- container orchestrator that answers the Docker Engine API",
        ".SH SYNOPSIS",
        ".B skep",
        "[\\fB\\-H\\fR \\fIURL\\fR] [\\fB\\-c\\fR \\fICONTEXT\\fR] \\fICOMMAND\\fR [\\fIARGUMENTS\\fR]",
        ".SH DESCRIPTION",
        "Skep runs containers on many machines.",
        "It answers the Docker Engine API of swarm mode, so docker and its libraries work against its socket.",
        "This command does what docker has no command for.",
        "Any other first word that docker knows is run by docker against the same node:",
        ".B skep service ls",
        "is",
        '.BR "docker service ls" .',
        ".SH COMMANDS",
    ]
    for context in commands():
        lines += [f".SS {_roff(context.command_path)}", ".nf", *map(_roff, help_lines(context)), ".fi"]
    lines += [".SH SETTINGS OF THE DAEMON", f"Keys of {_roff(str(DEFAULT_TOML))}, and flags of skep daemon."]
    for setting in SETTINGS:
        lines += [".TP", f".B {_roff(setting.toml_key)}, \\-\\-{_roff(setting.name)}", _roff(setting.help)]
    for section, entries in _MAN_ENTRIES.items():
        lines.append(f".SH {section}")
        for entry, text in entries.items():
            lines += [".TP", f".B {_roff(entry)}", _roff(text)]
    lines += [".SH SEE ALSO", ".BR docker (1),", ".BR runc (8),", ".BR etcd (1)", ""]
    return "\n".join(lines)


_MAN_ENTRIES: Mapping[str, Mapping[str, str]] = {
    "ENVIRONMENT": {
        "SKEP_HOST, DOCKER_HOST": "The node to talk to when -H is not given.",
        "DOCKER_CONTEXT": "The docker context to use when neither is given.",
        "DOCKER_CERT_PATH, DOCKER_TLS_VERIFY": "Client certificates for tcp:// hosts, as for docker.",
    },
    "FILES": {
        "/etc/skep/skep.toml": "Settings of the daemon.",
        "/run/skep/skep.sock": "The API.",
        "/var/lib/skep": "State of this node: its identity, tasks, images, containers, volumes; a manager's store.",
        "/run/skep": "Sockets, secrets of running tasks, and everything else that a reboot may lose.",
    },
    "EXIT STATUS": {
        f"{code}{f', {command}' if command else ''}": meaning for code, command, meaning in EXIT_CODES
    },
}


def _roff(line: str) -> str:
    text = line.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


# --- limits ---------------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """``where``: ``module:NAME``, or ``module:Struct.field`` with its default.  ``unit``: ``bytes``, ``s`` or none."""

    subject: str
    where: str
    beyond: str
    unit: str = ""


LIMITS: Mapping[str, Sequence[Limit]] = {
    "Objects of the cluster": (
        Limit("replicas of a service", "skep.model.service:REPLICAS_MAX", "refused"),
        Limit(
            "tasks of a stack without a quota, for users below administrator",
            "skep.manager.services.quotas:USERS_TASKS_MAX",
            "refused",
        ),
        Limit("published ports of a service", "skep.model.networks.publishing:PORTS_MAX", "refused"),
        Limit("labels `skep.publish.*` of a service", "skep.model.networks.publishing:LABELS_MAX", "refused"),
        Limit("an object, encoded", "skep.store.interface:KindSchema.max_bytes", "refused", "bytes"),
        Limit("a secret", "skep.manager.control.files:SECRET_BYTES_MAX", "refused", "bytes"),
        Limit("a config", "skep.manager.control.files:CONFIG_BYTES_MAX", "refused", "bytes"),
        Limit(
            "services restarted with updates of one",
            "skep.manager.services.dependent_services:RESTARTED_MAX",
            "refused",
        ),
        Limit(
            "their specs together",
            "skep.manager.services.dependent_services:RESTARTED_BYTES_MAX",
            "refused",
            "bytes",
        ),
        Limit("subnets of a network", "skep.manager.control.validation.network_specs:SUBNETS_MAX", "refused"),
        Limit(
            "plain containers of a node on cluster networks",
            "skep.manager.nodes.attachment_service:ATTACHMENTS_MAX",
            "refused",
        ),
        Limit("a delay in a label", "skep.model.options.labels:DELAY_S_MAX", "refused", "s"),
        Limit("grace period of nodes", "skep.model.options.labels:GRACE_S_MAX", "refused", "s"),
        Limit(
            "quota of a manager's store, smallest",
            "skep.configuration.values:STORE_QUOTA_MIN",
            "refused",
            "bytes",
        ),
        Limit(
            "quota of a manager's store, largest",
            "skep.configuration.values:STORE_QUOTA_MAX",
            "refused",
            "bytes",
        ),
        Limit(
            "tasks of one node that are measured for autoscaling",
            "skep.manager.dispatcher.usages:MEASURED_MAX",
            "the others count as not measured",
        ),
        Limit(
            "backends on one node's front door whose requests are measured for autoscaling",
            "skep.dataplane.door.statistics:BACKENDS_MAX",
            "the others count as not measured",
        ),
        Limit(
            "queries that the leader asks at a time",
            "skep.manager.queries.board:AT_ONCE_MAX",
            "the others wait",
        ),
        Limit(
            "queries that the leader asks at one host at a time",
            "skep.manager.queries.board:AT_HOST_MAX",
            "the others wait",
        ),
        Limit(
            "response to a query",
            "skep.model.measures.queries:BODY_BYTES_MAX",
            "the measure is not known",
            "bytes",
        ),
        Limit(
            "what a node reports of a task",
            "skep.manager.dispatcher.statuses:STATUS_BYTES_MAX",
            "cut",
            "bytes",
        ),
        Limit(
            "what a node reports of itself",
            "skep.model.node_reports.description_size:DESCRIPTION_BYTES_MAX",
            "cut, and a condition of the node says what",
            "bytes",
        ),
        Limit("past events kept", "skep.manager.telemetry.events:KEPT", "forgotten, the oldest first"),
        Limit(
            "events that a client may be behind",
            "skep.manager.telemetry.events:BEHIND_MAX",
            "its stream ends",
        ),
        Limit(
            "the history, compressed",
            "skep.manager.journal.chunks:BYTES_MAX",
            "the oldest entries are removed",
            "bytes",
        ),
        Limit(
            "entries of the history that are not written yet, of a manager",
            "skep.manager.journal.pending:PENDING_MAX",
            "the oldest are dropped, and an entry says how many",
        ),
        Limit("entries in one response", "skep.manager.journal.reading:LIMIT_MAX", "refused"),
        Limit("values of an earlier state that are read", "skep.store.etcd.past:KEYS_MAX", "refused"),
    ),
    "Requests to the API": (
        Limit("body that is read as a whole", "skep.api.http.server:MAX_BODY_BYTES", "refused", "bytes"),
        Limit("head of a request", "skep.api.http.framing:HEAD_BYTES_MAX", "431", "bytes"),
        Limit(
            "connections by TCP of clients without an identity",
            "skep.node.front.server:ClientLimits.strangers",
            "the oldest of the address with most is closed",
        ),
        Limit(
            "of these, from one address",
            "skep.node.front.server:ClientLimits.strangers_per_source",
            "the oldest of it is closed",
        ),
        Limit(
            "time for such a client to send its token",
            "skep.node.front.server:ClientLimits.stranger_s",
            "closed",
            "s",
        ),
    ),
    "Containers": (
        Limit(
            "execs of a container, ended ones included",
            "skep.engine.containers.execs:EXECS_MAX",
            "the oldest ended one is forgotten, or refused if all run",
        ),
        Limit("execs that start at one moment", "skep.engine.containers.execs:STARTS_MAX", "wait"),
        Limit(
            "results of health checks kept",
            "skep.engine.containers.health:LOG_MAX",
            "forgotten, the oldest first",
        ),
        Limit(
            "output kept of a health check",
            "skep.engine.containers.limited_execs:OUTPUT_BYTES_MAX",
            "cut",
            "bytes",
        ),
        Limit("bridge networks of a node", "skep.dataplane.local.networks:_BRIDGES_MAX", "refused"),
    ),
    "Images": (
        Limit("layers of an image", "skep.engine.images.image:LAYERS_MAX", "refused"),
        Limit(
            "a layer, unpacked",
            "skep.engine.images.archives.workers:ImageLimits.layer_bytes_max",
            "refused",
            "bytes",
        ),
        Limit(
            "an uploaded archive, unpacked",
            "skep.engine.images.archives.workers:ImageLimits.archive_bytes_max",
            "refused",
            "bytes",
        ),
        Limit("entries of a layer", "skep.engine.images.archives.workers:ImageLimits.entries_max", "refused"),
        Limit(
            "time for unpacking a layer",
            "skep.engine.images.archives.workers:ImageLimits.unpack_s",
            "refused",
            "s",
        ),
        Limit(
            "space that stays free on the disk (of a small one 5 %)",
            "skep.engine.images.archives.workers:ImageLimits.spare_bytes",
            "refused",
            "bytes",
        ),
    ),
    "Networks": (
        Limit(
            "DNS queries forwarded at a time",
            "skep.dataplane.dns.upstream:ForwardingLimits.in_flight",
            "the query fails",
        ),
        Limit(
            "of these, from one container",
            "skep.dataplane.dns.upstream:ForwardingLimits.in_flight_per_container",
            "the query fails",
        ),
        Limit("time to live of names", "skep.dataplane.dns.resolution:TTL_S", "", "s"),
    ),
    "Nodes and managers": (
        Limit("connections of one node to a manager", "skep.wire.server:NODE_CONNECTIONS_MAX", "closed"),
        Limit("connections without a certificate", "skep.wire.server:ANONYMOUS_MAX", "closed"),
        Limit(
            "of these, from one address",
            "skep.wire.server:ANONYMOUS_PER_SOURCE_MAX",
            "the oldest of it is closed",
        ),
        Limit(
            "announced absence of a node",
            "skep.manager.nodes.heartbeats:AWAY_GRACE_S",
            "the node is down",
            "s",
        ),
        Limit(
            "crashes of a manager in a row",
            "skep.node.supervision.supervisor:CRASHES_MAX",
            "it stays stopped, and `docker info` says why",
        ),
        Limit("within", "skep.node.supervision.supervisor:CRASH_WINDOW_S", "", "s"),
    ),
}


def limits() -> str:
    """Bounds that users may meet."""
    lines = [
        "# Limits",
        "",
        _NOTICE,
        *paragraph(
            "You find here the largest sizes, numbers and times that Skep accepts, and the effect of going beyond.",
            "Times that you can set are in [configuration](configuration.md) and [labels](labels.md).",
        ),
    ]
    for title, entries in LIMITS.items():
        rows = [(entry.subject, shown(entry), entry.beyond) for entry in entries]
        lines += [f"## {title}", "", *table(("subject", "limit", "beyond it"), rows), ""]
    return "\n".join(lines)


def shown(limit: Limit) -> str:
    """The value with its unit."""
    module, _, name = limit.where.partition(":")
    struct, _, field = name.partition(".")
    value = getattr(importlib.import_module(module), struct)
    if field:
        value = next(one.default for one in msgspec.structs.fields(value) if one.name == field)
    if limit.unit == "bytes":
        return in_bytes(value)
    if limit.unit == "s":
        return in_time(value)
    return f"{value:,}"


def in_bytes(value: int) -> str:
    """``1 MiB``, ``500 KiB``."""
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= size and value % size == 0:
            return f"{value // size} {unit}"
    return f"{value:,} bytes"


def in_time(seconds: float) -> str:
    """``12 s``, ``30 min``, ``1 h``, ``365 d``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


# --- events ---------------------------------------------------------------------------------------------------


class ClusterEvent(NamedTuple):
    """``derived``: functions of ``skep.manager.telemetry.events`` whose attributes it has."""

    types: tuple[str, ...]
    actions: tuple[str, ...]
    when: str
    derived: tuple[str, ...] = ()


CLUSTER_EVENTS = (
    ClusterEvent(("service",), ("create", "remove"), ""),
    ClusterEvent(
        ("service",), ("update",), "its spec or the state of its update changed", ("_service_changes",)
    ),
    ClusterEvent(("node",), ("create", "remove"), ""),
    ClusterEvent(
        ("node",),
        ("update",),
        "its spec, state or role changed. *Skep*: `paths.failing` (nodes that it does not reach), "
        "`overlay.unavailable` (why tasks on overlay networks avoid it), `conditions`",
        ("_node_changes",),
    ),
    ClusterEvent(("node",), ("evict",), "progress of `skep node evict` (*Skep*)", ("_eviction",)),
    ClusterEvent(("node", "swarm"), ("expire",), "a certificate expires soon (*Skep*)", ("expires",)),
    ClusterEvent(
        ("task",),
        ("drain",),
        "the task leaves load balancing and will be stopped (*Skep*, for proxies)",
        ("_drain",),
    ),
    ClusterEvent(
        ("swarm",),
        ("suspend", "resume"),
        "replacement of tasks is suspended because many nodes went down at once, or resumes (*Skep*)",
        ("_dockers",),
    ),
    ClusterEvent(
        ("swarm",),
        ("begin-freeze", "end-freeze", "open-window", "close-window", "remove-window"),
        "[a freeze](../guide/freezes.md) of the cluster or a stack, or the maintenance window (*Skep*)",
        ("freeze_changes",),
    ),
    ClusterEvent(
        ("task",),
        ("create", "start", "die", "reject", "lost", "remove"),
        "*Skep*, only in `skep events` and with the filter `type=task`. `start`: its process runs and is healthy. "
        "`lost`: its node is down or was removed",
        ("_task",),
    ),
    ClusterEvent(
        ("invariant",),
        ("violate", "recover"),
        "[an invariant](../guide/verify.md) of the cluster's state is violated, or holds again (*Skep*)",
        ("_violation",),
    ),
    ClusterEvent(
        ("address",),
        ("take", "release"),
        "a node is named for [a failover address](../guide/front-door.md), or none is left that holds it (*Skep*)",
        ("_address",),
    ),
    ClusterEvent(
        ("stream",), ("progress",), "`skep events` only: nothing happened up to its cursor (*Skep*)"
    ),
    ClusterEvent(("config", "network", "secret"), ("create", "remove", "update"), ""),
    ClusterEvent(
        ("volume",),
        ("create", "remove", "update"),
        "cluster volumes (*Skep*), only in `skep events` and with the filter `type=volume`. `update`: its "
        "availability, its nodes or its driver's message changed",
        ("_volume_changes",),
    ),
)

CONTAINER_EVENTS = {
    "archive-path": "files are copied out of it (`docker cp`)",
    "attach": "a client attaches to its streams",
    "commit": "an image was made of it",
    "create": "",
    "destroy": "it is removed",
    "detach": "a client that was attached has detached, or is gone",
    "die": "its process has ended",
    "drain": "its stop waits for its last connections (*Skep*)",
    "exec_create": "followed by `: COMMAND`",
    "exec_detach": "a client has detached from a command by its keys",
    "exec_die": "a command of `docker exec` has ended",
    "exec_start": "followed by `: COMMAND`",
    "export": "",
    "extract-to-dir": "files were copied into it (`docker cp`)",
    "health_status": "followed by `: healthy` or `: unhealthy`: the result of its health check changed",
    "kill": "a signal is sent",
    "oom": "it was killed because memory ran out",
    "pause": "",
    "rename": "it has another name",
    "resize": "the size of its terminal changed",
    "start": "",
    "stop": "it was stopped by a request",
    "unpause": "",
    "update": "its resources or restart policy changed",
}


def events() -> str:
    """Events of ``docker events``: actions and attributes as the code publishes them."""
    of_cluster, of_containers = cluster_attributes(), container_attributes()
    cluster_rows = [
        (
            _quoted(event.types),
            _quoted(event.actions),
            event.when,
            _quoted(sorted(name for function in event.derived for name in of_cluster[function])),
        )
        for event in CLUSTER_EVENTS
    ]
    container_rows = [
        (f"`{action}`", CONTAINER_EVENTS[action], _quoted(sorted(attributes)))
        for action, attributes in sorted(of_containers.items())
    ]
    return "\n".join(
        [
            "# Events",
            "",
            _NOTICE,
            *paragraph(
                "You read events with `docker events`, or with `GET /events` and its filters, `since` and `until`. A",
                "node's stream has the events of the cluster, of the node's containers and images, and of a Docker",
                "Engine on the same machine. Events that Docker does not have are marked *Skep*.",
            ),
            *paragraph(
                f"A node keeps the last {node_events.KEPT:,} events in memory, a manager {manager_events.KEPT:,}. With",
                f"`since` you can read no older ones. If your client is more than {manager_events.BEHIND_MAX:,} events",
                "behind, its stream ends, so that no stream has gaps.",
            ),
            "## The cluster",
            "",
            *paragraph("`scope` is `swarm`. Every manager derives these events from the same commits."),
            *table(("type", "action", "when", "attributes in addition to `name`"), cluster_rows),
            "",
            *paragraph(
                "`NAME.*` stands for `NAME.old` and `NAME.new`. An event has these attributes only for what changed.",
            ),
            "### Resume after a cursor",
            "",
            *paragraph(
                "`skep events` (`GET /skep/events`) shows the events of the cluster and of its tasks, from any",
                "manager. Each event has a `Cursor`. With `--after CURSOR` you resume after that event, at the same",
                "manager or another one. You miss no event, but can get the events of one change twice. If Skep no",
                "longer has all events since the cursor, you get an error.",
            ),
            "### Events of all nodes",
            "",
            *paragraph(
                "`skep events --nodes all` (or names of nodes) also shows the events of the nodes' containers, images",
                f"and volumes, from any manager. They have the attributes `{from_nodes.ID}` and `{from_nodes.NAME}`.",
                "The cursor has a part for each node, so each node resumes after its own last event. Messages of type",
                "`stream` report the connection to a node:",
            ),
            *table(
                ("action", "meaning"),
                (
                    ("`connect`", "The node's events follow."),
                    ("`disconnect`", "They cannot be read. `reason` says why."),
                    ("`gap`", "Some events are missing: they are too old, or one is longer than 128 KiB."),
                ),
            ),
            "",
            *paragraph(
                f"You can read at most {from_nodes.NODES_MAX} nodes, and a manager has at most",
                f"{from_nodes.LIMITS.streams} such clients. Any client gets the same with `docker events --filter",
                "scope=swarm --filter type=container` (or `image`, `volume`). Without the scope, you see this node's",
                "events, as in Docker. Events of Docker Engines are not included. Clients of workers do not see these",
                "events, because they have the command lines of every `docker exec`.",
            ),
            "## Containers",
            "",
            *paragraph("`scope` is `local`. The attributes are the container's labels, `image` and `name`."),
            *table(("action", "when", "further attributes"), container_rows),
            "",
            "## Images",
            "",
            *paragraph(f"`scope` is `local`: {_quoted(sorted(image_actions()))}."),
            "",
            "## Volumes",
            "",
            *paragraph(
                "`scope` is `local`.",
            ),
            *table(
                ("action", "when", "attributes"),
                (
                    ("`create`, `destroy`", "", "`driver`"),
                    (
                        "`mount`, `unmount`",
                        "a container with the volume starts or has ended",
                        "`driver`, `container`, `destination`, `read/write`, `propagation`",
                    ),
                    ("`prune`", "", "`reclaimed`"),
                ),
            ),
            "",
            "## Networks of the node",
            "",
            *paragraph(
                "`scope` is `local`. The actions are `create` and `destroy`, and `connect` and `disconnect` with the",
                "attribute `container` when a container starts and ends, or is connected and disconnected while it",
                "runs. Each event has `name` and `type` (the driver). Containers of tasks have these events for their",
                "networks.",
            ),
        ]
    )


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def cluster_attributes() -> dict[str, set[str]]:
    """Attributes by the function of ``skep.manager.telemetry.events`` or ``services.freezes`` that gives them."""
    found: dict[str, set[str]] = {}
    for module in (manager_events, freezes):
        for function in ast.walk(parsed(Path(module.__file__))):
            if isinstance(function, ast.FunctionDef):
                found[function.name] = set(_attributes_in(function)) - {"name"}
    return found


def _attributes_in(function: ast.FunctionDef) -> Iterator[str]:
    """``_changed("image", ...)``, keys of dictionaries, ``changes["updatestate.new"] = ...``."""
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Name(id="_changed"), args=[ast.Constant(value=str(name)), *_]):
                yield f"{name}.*"
            case ast.Dict(keys=keys):
                yield from (key.value for key in keys if isinstance(key, ast.Constant))
            case ast.Subscript(slice=ast.Constant(value=str(name)), ctx=ast.Store()):
                yield f"{name.rpartition('.')[0]}.*"


def cluster_actions() -> set[str]:
    """Actions of all messages that ``skep.manager.telemetry.events`` makes."""
    found = {*manager_events.TASK_ACTIONS.values(), *get_args(freezes.FreezeAction)}
    found |= {*get_args(verify_records.ViolationAction), *get_args(failover_records.HolderAction)}
    for call in ast.walk(parsed(Path(manager_events.__file__))):
        match call:
            case ast.Call(func=ast.Name(id="_message" | "_task"), args=[ast.Constant(value=str(action)), *_]):
                found.add(action)
            case ast.Call(func=ast.Name(id="EventMessage"), keywords=keywords):
                found |= {
                    word.value.value
                    for word in keywords
                    if word.arg == "action" and isinstance(word.value, ast.Constant)
                }
    return found


def container_attributes() -> dict[str, set[str]]:
    """Attributes by action of every ``events.publish(action, container, ...)`` in the package.

    ``execs.py`` has a method for two actions, which appends the command to them.
    """
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "skep").rglob("*.py")):
        if "publish(" not in path.read_text():
            continue
        calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
        for call in calls:
            if not re.search(r"\bevents\.publish$|_events\.publish$", ast.unparse(call.func)):
                continue
            attributes = {word.arg for word in call.keywords if word.arg}
            for action in _actions(call, calls):
                found.setdefault(action, set()).update(attributes)
    return found


def _actions(call: ast.Call, calls: Sequence[ast.Call]) -> Iterator[str]:
    match call.args[0]:
        case ast.Constant(value=str(action)):
            yield action
        case ast.JoinedStr(values=[ast.Constant(value=str(begin)), *_]):
            yield begin.partition(":")[0]
        case _:
            helper = [one for one in calls if ast.unparse(one.func) == "self._publish"]
            yield from (one.args[0].value for one in helper if isinstance(one.args[0], ast.Constant))


def image_actions() -> set[str]:
    """Actions of every ``announce(action, ...)`` of the images."""
    found = set()
    for path in (ROOT / "skep" / "engine" / "images").rglob("*.py"):
        for call in ast.walk(parsed(path)):
            match call:
                case ast.Call(
                    func=ast.Attribute(attr="announce"), args=[ast.Constant(value=str(action)), *_]
                ):
                    found.add(action)
    return found


# --- errors ---------------------------------------------------------------------------------------------------


def api_errors() -> str:
    """Statuses of the Engine API and of the protocol between nodes, by the meaning of an error."""
    of_calls = dict(STATUS_OF)
    codes = dict(RPC_CODES)
    rows = [
        (
            str(status),
            f"`{error.__name__}`",
            (inspect.getdoc(error) or "").partition("\n")[0],
            f"`{codes[error]}`" if error in codes else "",
            f"{of_calls[error].name} ({of_calls[error].value})" if error in of_calls else "",
        )
        for error, status in sorted(STATUSES, key=lambda entry: entry[1])
    ]
    return "\n".join(
        [
            "# Errors",
            "",
            _NOTICE,
            *paragraph(
                "You find here what a status of the API means. Every error has a JSON body with one key, `message`.",
                "An expected error has one of the",
                "classes below (`skep/errors.py`, `skep/api/errors.py`), which determines its status. Any other",
                "exception is a 500 with a short text, and its traceback is in the log.",
            ),
            *paragraph(
                "Errors of the swarm half have Docker's form, `rpc error: code = CODE desc = TEXT`, with the code of",
                "the fourth column. The last column is the gRPC status of calls between nodes and managers.",
            ),
            *table(("HTTP status", "class", "meaning", "code in the text", "gRPC status"), rows),
            "",
        ]
    )


# --- all ------------------------------------------------------------------------------------------------------

# --- options of the Engine API --------------------------------------------------------------------------------


def options() -> str:
    """Return how Skep treats each field of services, containers, networks and volumes in the newest API version."""
    walks = importlib.import_module("tests.unit.test_every_option_of_objects")
    lines = [
        "# Options of services, containers, networks and volumes",
        "",
        _NOTICE,
        *paragraph(
            f"What becomes of every field of the Engine API {NEWEST} that says what a service, a container, a network",
            "or a volume is to be. *Honored*: the container, the scheduler, the allocator or the data plane differs by",
            "it.",
            "*Refused*: the request fails, or the task is rejected, with an error that has the text. *No effect*: it",
            "means nothing here, for the reason given. Tests set each field in turn:",
            "`tests/unit/test_every_option.py`, `tests/unit/test_every_option_of_objects.py`.",
        ),
    ]
    for walk in (walks.WALKS[0], *walks.CONTAINER_WALKS, *walks.WALKS[1:]):
        rows = (
            (f"`{re.sub(r'[.][0-9]+', '', path)}`", walks.outcome(walk, path).replace("<", "&lt;"))
            for path in walk.rows
        )
        lines += [f"## {walk.title}", "", *table(("field", "outcome"), rows), ""]
    return "\n".join(lines)


PAGES: Mapping[str, Callable[[], str]] = {
    "docs/reference/configuration.md": configuration,
    "docs/reference/labels.md": labels,
    "docs/reference/rights.md": rights,
    "docs/reference/cli.md": cli,
    "docs/reference/screens.md": screens,
    "docs/reference/limits.md": limits,
    "docs/reference/events.md": events,
    "docs/reference/errors.md": api_errors,
    "docs/reference/metrics.md": metrics,
    "docs/reference/options.md": options,
    "packaging/skep.1": man_page,
}


def write() -> None:
    """Write every page that differs, and name it."""
    for path, text_of in PAGES.items():
        file, text = ROOT / path, text_of()
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            click.echo(path)


if __name__ == "__main__":
    write()
