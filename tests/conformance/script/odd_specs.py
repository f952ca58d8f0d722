"""Specs that ask for something odd: what cannot be read, what can never be met, what contradicts itself.

The engine takes some of them; those are shown again and removed.
"""

from collections.abc import Iterator
from typing import Any

from tests.conformance.script.steps import Step, create, delete, get, port, service


def _placement(**placement: Any) -> Any:
    return {"Placement": placement}


def _spread(preference: Any) -> Any:
    return _placement(Preferences=[preference])


_SPECS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("a constraint with one equals sign", {"task": _placement(Constraints=["node.role=manager"])}),
    ("a constraint without key", {"task": _placement(Constraints=["==manager"])}),
    ("a constraint without value", {"task": _placement(Constraints=["node.role=="])}),
    ("a constraint with a blank for a value", {"task": _placement(Constraints=["node.role==  "])}),
    ("an empty constraint", {"task": _placement(Constraints=[""])}),
    ("a constraint with a blank in its key", {"task": _placement(Constraints=["node role==x"])}),
    ("a constraint with blanks around", {"task": _placement(Constraints=["  node.role  ==  manager  "])}),
    ("a constraint on nothing known", {"task": _placement(Constraints=["foo==bar"])}),
    ("a constraint that compares", {"task": _placement(Constraints=["node.role>x"])}),
    ("a constraint with two operators", {"task": _placement(Constraints=["node.role==a==b"])}),
    ("a constraint that is a number", {"task": _placement(Constraints=[7])}),
    ("a preference for nothing", {"task": _spread({})}),
    ("a preference without descriptor", {"task": _spread({"Spread": {"SpreadDescriptor": ""}})}),
    ("a preference for nonsense", {"task": _spread({"Spread": {"SpreadDescriptor": "no sense!"}})}),
    ("a preference that is a word", {"task": _spread("node.labels.zone")}),
    ("a spread that is a word", {"task": _spread({"Spread": "node.labels.zone"})}),
    ("a negative number of replicas per node", {"task": _placement(MaxReplicas=-1)}),
    ("a mode that is none", {"Mode": {"Sometimes": {}}}),
    ("a mode that is a word", {"Mode": "global"}),
    ("a negative number of replicas", {"Mode": {"Replicated": {"Replicas": -1}}}),
    ("one and a half replicas", {"Mode": {"Replicated": {"Replicas": 1.5}}}),
    ("a word for replicas", {"Mode": {"Replicated": {"Replicas": "three"}}}),
    ("a replicated job with an update config", {"Mode": {"ReplicatedJob": {}}, "UpdateConfig": {}}),
    (
        "a job with a rollback config",
        {"Mode": {"ReplicatedJob": {"TotalCompletions": 0}}, "RollbackConfig": {"Parallelism": 1}},
    ),
    ("a job with fewer than no runs at a time", {"Mode": {"ReplicatedJob": {"MaxConcurrent": -1}}}),
    ("completions beyond 63 bits", {"Mode": {"ReplicatedJob": {"TotalCompletions": 2**64 - 1}}}),
    ("two modes of jobs", {"Mode": {"ReplicatedJob": {}, "GlobalJob": {}}}),
    (
        "a job that is always restarted",
        {"Mode": {"GlobalJob": {}}, "task": {"RestartPolicy": {"Condition": "any"}}},
    ),
    ("a negative number of attempts", {"task": {"RestartPolicy": {"MaxAttempts": -1}}}),
    ("a negative parallelism", {"UpdateConfig": {"Parallelism": -1}}),
    ("a negative delay of a rollback", {"RollbackConfig": {"Delay": -1}}),
    ("a rollback that rolls back", {"RollbackConfig": {"FailureAction": "rollback"}}),
    ("a ratio of seven for a rollback", {"RollbackConfig": {"MaxFailureRatio": 7}}),
    ("a failure action in capitals", {"UpdateConfig": {"FailureAction": "PAUSE"}}),
    ("a negative port", {"EndpointSpec": port(PublishedPort=-1)}),
    ("a port without target", {"EndpointSpec": {"Ports": [{"PublishedPort": 81}]}}),
    (
        "one host port twice",
        {
            "EndpointSpec": {
                "Ports": [
                    {"TargetPort": 80, "PublishedPort": 82, "PublishMode": "host"},
                    {"TargetPort": 81, "PublishedPort": 82, "PublishMode": "host"},
                ]
            }
        },
    ),
    (
        "more reserved than allowed",
        {
            "task": {
                "Resources": {"Limits": {"NanoCPUs": 1_000_000}, "Reservations": {"NanoCPUs": 1_000_000_000}}
            }
        },
    ),
)


def _steps() -> Iterator[Step]:
    for number, (name, requested) in enumerate(_SPECS):
        yield create(f"odd: {name}", service(f"odd{number}", **requested))
        yield get(f"kept: {name}", f"/v1.41/services/odd{number}")
        yield delete(f"gone: {name}", f"/v1.41/services/odd{number}")


ODD_SPECS = tuple(_steps())
