"""Reads responses of managers of earlier commits, whose fields had other names (``docs/reference/renamed.md``).

During an upgrade a command may reach a manager of either version.  The client renames the fields where a response
arrives, so that the rest of the code knows the present names only.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec


class _Renamed(msgspec.Struct, frozen=True):
    """Renamed fields of an object.

    ``fields`` and ``values`` map former to present names and texts.  ``parts`` has the renamed fields of nested objects
    and lists, by the present name of the field that contains them.
    """

    fields: Mapping[str, str] = {}
    values: Mapping[str, Mapping[str, str]] = {}
    parts: Mapping[str, "_Renamed"] = {}


_VERDICTS: Final = _Renamed({"Refusals": "Reasons"})
_PROBLEM: Final = _Renamed(
    {"Waiting": "PendingTaskID"},
    {"Kind": {"waits": "waiting", "lost": "node-lost", "progress": "progressing"}},
)
_AUTOSCALING: Final = _Renamed(
    {
        "Least": "Min",
        "Most": "Max",
        "Measures": "Metrics",
        "Unknown": "Unmeasured",
        "Last": "LastChange",
    }
)
_RESPONSES: Final[tuple[tuple[re.Pattern[str], _Renamed], ...]] = (
    (
        re.compile(r"/skep/services/[^/]+/explain"),
        _Renamed(
            {
                "IsAsWanted": "IsHealthy",
                "Wanted": "Desired",
                "Done": "Completed",
                "Course": "RestartSummary",
            },
            parts={"Problem": _PROBLEM, "Autoscaling": _AUTOSCALING},
        ),
    ),
    (re.compile(r"/skep/tasks/[^/]+/explain"), _Renamed(parts={"Nodes": _VERDICTS})),
    (
        re.compile(r"/skep/services/placement"),
        _Renamed({"Wanted": "Desired", "Refusal": "Error"}, parts={"Verdicts": _VERDICTS}),
    ),
    (
        re.compile(r"/skep/quorum"),
        _Renamed(
            parts={"Managers": _Renamed({"Answers": "IsReachable", "SilentSeconds": "UnreachableSeconds"})}
        ),
    ),
    (
        re.compile(r"/skep/cluster/evict"),
        _Renamed(
            {
                "AskedBy": "RequestedBy",
                "AskedThrough": "RequestedVia",
                "AskedAt": "RequestedAt",
                "WaitsFor": "WaitingFor",
                "KeepsContainers": "KeepContainers",
            }
        ),
    ),
)


def with_present_names(path: str, response: Any) -> Any:
    """Return the decoded response to a request for ``path`` with the present names of its fields.

    A field that has its present name is unchanged.
    """
    if not path.startswith("/skep/"):
        return response
    renamed = next((found for pattern, found in _RESPONSES if pattern.fullmatch(path)), None)
    return response if renamed is None else _with_names(response, renamed)


def _with_names(value: Any, renamed: _Renamed) -> Any:
    if isinstance(value, list):
        return [_with_names(one, renamed) for one in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for name, one in value.items():
        present = renamed.fields.get(name, name)
        if present != name and present in value:
            continue
        part, texts = renamed.parts.get(present), renamed.values.get(present, {})
        found[present] = _with_names(one, part) if part is not None else one
        if isinstance(one, str):
            found[present] = texts.get(one, one)
    return found
