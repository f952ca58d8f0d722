"""Inspected services as stack files: what a stack says comes back as it was, and what it cannot say is named."""

import json
from typing import Any

import pytest

from skep.errors import InvalidArgument
from skep.imports.document import read_back
from skep.imports.inspected import imported, specs_in, stack_name_of
from skep.model.values.encoding import to_json
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.document import parse
from skep.stack.compose.merging import canonical
from skep.stack.compose.reading import ProblemReport
from skep.stack.project import Stack

NAMESPACE = {"com.docker.stack.namespace": "shop"}
SERVICES = [
    "command: [a, '$b', 'c d'], entrypoint: [/e]",
    "hostname: '{{.Task.Name}}', user: '1:2', working_dir: /w, group_add: [a]",
    "environment: {A: '1', B: 'x$y', C: ''}",
    "labels: {a: b}, deploy: {labels: {c: 'd$'}}",
    "init: true, tty: true, stdin_open: true, read_only: true, stop_signal: INT, stop_grace_period: 1m30s",
    "security_opt: [no-new-privileges, 'seccomp:unconfined']",
    "volumes: ['data:/d:nocopy', '/etc:/e:ro,rslave', '/only']",
    (
        "volumes: [{type: volume, source: data, target: /d, volume: {subpath: a}},"
        " {type: bind, source: /a, target: /b, bind: {recursive: disabled}}]"
    ),
    "volumes: [{type: tmpfs, target: /t, tmpfs: {size: 10m, mode: 0o700}}, {type: image, source: i, target: /i}]",
    "volumes: [{type: cluster, source: data, target: /d}, {type: cluster, source: 'group:g', target: /g}]",
    "healthcheck: {test: [CMD, a], interval: 1m, timeout: 1500ms, start_period: 2s, start_interval: 3s, retries: 4}",
    "healthcheck: {disable: true}",
    "extra_hosts: ['a=1.2.3.4', 'b=::1'], dns: 1.1.1.1, dns_search: [a, b], dns_opt: [ndots:1]",
    "sysctls: {net.core.somaxconn: 9}, cap_add: [NET_ADMIN], cap_drop: [ALL], oom_score_adj: 5",
    "ulimits: {nproc: 9, nofile: {soft: 1, hard: 2}}",
    "secrets: [s, {source: s, target: /x, uid: '1', gid: '2', mode: 0o400}], configs: [c]",
    "networks: {front: {aliases: [w]}, back: }",
    "network_mode: host",
    "ports: ['80:8080', '90', {target: 90, mode: host, published: 91, protocol: udp, name: dns}, '127.0.0.1:99:99']",
    "logging: {driver: json-file, options: {max-size: 1m}}",
    "platform: linux/arm64",
    "deploy: {mode: global}",
    "deploy: {mode: replicated-job, replicas: 4, restart_policy: {condition: none}}",
    "deploy: {mode: global-job}",
    "deploy: {replicas: 0, endpoint_mode: dnsrr}",
    (
        "deploy: {resources: {limits: {cpus: '0.25', memory: 50M, pids: 9}, reservations: {cpus: '1', memory: 1G,"
        " generic_resources: [{discrete_resource_spec: {kind: gpu, value: 2}}]}}}"
    ),
    "deploy: {restart_policy: {condition: on-failure, delay: 0s, max_attempts: 3, window: 2m}}",
    (
        "deploy: {placement: {constraints: [node.role==worker], preferences: [{spread: node.labels.zone}],"
        " max_replicas_per_node: 2}}"
    ),
    (
        "deploy: {update_config: {parallelism: 0, delay: 1s, failure_action: rollback, monitor: 2s, order: start-first,"
        " max_failure_ratio: 0.25}, rollback_config: {failure_action: continue}}"
    ),
    "privileged: true, shm_size: 64m, x-skep: {drain: 5s}, depends_on: [other]",
]
REST = """
  other: {image: o}
networks: {front: , back: {external: true, name: everywhere}}
volumes: {data: {driver: local, driver_opts: {type: tmpfs, device: tmpfs}, labels: {a: b}}}
secrets: {s: {external: true}}
configs: {c: {external: true, name: config-1}}
"""
NETWORKS: dict[str, dict[str, Any]] = {
    "n1": {"Name": "shop_front", "Driver": "overlay", "Labels": NAMESPACE},
    "n2": {"Name": "everywhere", "Driver": "overlay"},
    "n3": {"Name": "shop_default", "Driver": "overlay", "Labels": NAMESPACE},
}
IDS = {one["Name"]: id for id, one in NETWORKS.items()}


def a_stack(service: str) -> Stack:
    report = ProblemReport()
    document = canonical(parse(f"services:\n  web: {{image: w, {service}}}{REST}", "f"))
    stack = stack_of(document, "shop", {}, report)
    assert not report.problems, [str(one) for one in report.problems]
    return stack


def inspected(stack: Stack) -> str:
    """As ``docker service inspect`` prints it, with networks by their ids."""
    specs = [json.loads(to_json(one.spec)) for one in stack.services.values()]
    for spec in specs:
        for network in spec["TaskTemplate"].get("Networks", ()):
            network["Target"] = IDS.get(network["Target"], network["Target"])
    return json.dumps([{"ID": "x", "Spec": spec, "Endpoint": {}} for spec in specs])


@pytest.mark.parametrize("service", SERVICES)
def test_what_a_stack_says_comes_back_as_it_was(service: str) -> None:
    stack = a_stack(service)
    found = specs_in(inspected(stack))
    assert stack_name_of(spec for spec, _ in found) == "shop"
    made = imported(found, "shop", NETWORKS)
    assert made.notes == ()
    again, report = read_back(made.document)
    assert not report.problems
    assert {key: one.spec for key, one in again.services.items()} == {
        key: one.spec for key, one in stack.services.items()
    }


@pytest.mark.parametrize(
    ("path", "value", "note"),
    [
        (
            "TaskTemplate.ContainerSpec.Isolation",
            "hyperv",
            "TaskTemplate.ContainerSpec.Isolation: 'hyperv' is dropped",
        ),
        ("TaskTemplate.ForceUpdate", 3, "TaskTemplate.ForceUpdate: '3' is dropped"),
        (
            "Mode",
            {"ReplicatedJob": {"MaxConcurrent": 2, "TotalCompletions": 4}},
            "Mode.ReplicatedJob.MaxConcurrent: '2' becomes '4'",
        ),
        (
            "TaskTemplate.ContainerSpec.Surprise",
            {"A": 1},
            "TaskTemplate.ContainerSpec.Surprise: not known, dropped",
        ),
        ("TaskTemplate.Networks", [], "it had no network, and joins the stack's default network"),
    ],
)
def test_what_a_stack_cannot_say_is_named(path: str, value: Any, note: str) -> None:
    services = json.loads(inspected(a_stack("")))
    *parents, last = path.split(".")
    spec = services[0]["Spec"]
    for key in parents:
        spec = spec[key]
    spec[last] = value
    made = imported(specs_in(json.dumps(services)), "shop", NETWORKS)
    assert [str(one) for one in made.notes] == [f"services.web: {note}"]
    assert f"#   services.web: {note}\n" in made.text


def test_what_a_client_writes_and_means_nothing_is_no_loss() -> None:
    """``docker service create`` sends these."""
    services = json.loads(inspected(a_stack("")))
    template = services[0]["Spec"]["TaskTemplate"]
    template["Runtime"] = "container"
    template["ContainerSpec"]["Isolation"] = "default"
    assert imported(specs_in(json.dumps(services)), "shop", NETWORKS).notes == ()


def test_services_of_no_stack_become_one_and_networks_without_names_are_named() -> None:
    spec = {"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "w"}, "Networks": [{"Target": "abc"}]}}
    found = specs_in(json.dumps({"Spec": spec | {"Mode": {"Replicated": {"Replicas": 2}}}}))
    assert stack_name_of(one for one, _ in found) == ""
    made = imported(found, "mine", {})
    assert made.document["services"] == {
        "web": {"image": "w", "networks": {"abc": None}, "deploy": {"replicas": 2}}
    }
    assert made.document["networks"] == {"abc": {"external": True, "name": "abc"}}
    assert [str(one) for one in made.notes] == ["networks.abc: abc is the id of a network: write its name"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "3",
        "[{}]",
        '[{"Spec": {}}]',
        '[{"Spec": {"Name": "a", "TaskTemplate": {"ContainerSpec": 3}}}]',
    ],
)
def test_what_is_no_service_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"docker service inspect|cannot be read"):
        specs_in(text)


@pytest.mark.parametrize(
    ("written", "runs", "expected"),
    [
        ("w", "w:latest@sha256:00", "w"),
        ("docker.io/library/w:1", "w:1@sha256:00", "docker.io/library/w:1"),
        ("r:5000/w", "r:5000/w:latest@sha256:00", "r:5000/w"),
        ("w:1", "w:2@sha256:00", "w:2@sha256:00"),
        ("w:1@sha256:00", "w:1@sha256:11", "w:1@sha256:11"),
        ("", "w:2", "w:2"),
    ],
)
def test_the_image_is_that_which_runs_not_that_of_an_earlier_deploy(
    written: str, runs: str, expected: str
) -> None:
    spec = {
        "Name": "shop_web",
        "Labels": {**NAMESPACE, "com.docker.stack.image": written},
        "TaskTemplate": {"ContainerSpec": {"Image": runs}},
    }
    made = imported(specs_in(json.dumps([{"Spec": spec}])), "shop", {})
    assert made.document["services"]["web"]["image"] == expected


def test_addresses_of_a_network_come_back() -> None:
    network = {
        "Id": "n1",
        "Name": "shop_front",
        "Driver": "overlay",
        "Labels": NAMESPACE,
        "IPAM": {
            "Driver": "default",
            "Options": {"o": "1"},
            "Config": [{"Subnet": "10.9.0.0/24", "AuxiliaryAddresses": {"a": "10.9.0.8"}}],
        },
    }
    spec = {
        "Name": "shop_web",
        "Labels": NAMESPACE,
        "TaskTemplate": {"ContainerSpec": {"Image": "w"}, "Networks": [{"Target": "n1"}]},
    }
    made = imported(specs_in(json.dumps([{"Spec": spec}])), "shop", {"n1": network})
    assert made.document["networks"]["front"]["ipam"] == {
        "config": [{"subnet": "10.9.0.0/24", "aux_addresses": {"a": "10.9.0.8"}}],
        "options": {"o": "1"},
    }


def test_notes_are_a_comment_that_a_reader_of_yaml_takes() -> None:
    spec = {"Name": "web", "Odd\x1b[2J": 1, "TaskTemplate": {"ContainerSpec": {"Image": "w"}}}
    made = imported(specs_in(json.dumps([{"Spec": spec}])), "shop", {})
    assert "Odd[2J: not known, dropped" in made.text
    assert parse(made.text, "f").entries


def test_labels_name_services_of_no_stack_by_their_new_names() -> None:
    """A task would wait for a service that does not exist."""
    labels = {
        "skep.depends-on": "DB=service_healthy+restart,vault=service_started",
        "skep.affinity": "db@zone, cache",
        "skep.anti-affinity.preferred": "other",
    }
    specs = [
        {
            "Name": name,
            "Labels": labels if name == "web" else {},
            "TaskTemplate": {"ContainerSpec": {"Image": "i"}},
        }
        for name in ("web", "db", "cache")
    ]
    made = imported(specs_in(json.dumps([{"Spec": spec} for spec in specs])), "shop", {})
    assert made.document["services"]["web"]["deploy"]["labels"] == {
        "skep.depends-on": "shop_db=service_healthy+restart,vault=service_started",
        "skep.affinity": "shop_db@zone,shop_cache",
        "skep.anti-affinity.preferred": "other",
    }
    again = imported(
        specs_in(json.dumps([{"Spec": specs[1] | {"Name": "shop_web", "Labels": labels}}])), "shop", {}
    )
    assert again.document["services"]["web"]["deploy"]["labels"]["skep.affinity"] == "db@zone,cache"


def test_objects_whose_names_differ_by_the_stack_alone_keep_keys_of_their_own() -> None:
    secrets = [
        {"SecretID": id, "SecretName": name, "File": {"Name": name, "UID": "0", "GID": "0", "Mode": 0o400}}
        for id, name in (("s1", "shop_zero"), ("s2", "zero"))
    ]
    container = {"Image": "a", "Secrets": secrets}
    specs = [{"Name": name, "TaskTemplate": {"ContainerSpec": container}} for name in ("shop_web", "web")]
    made = imported(specs_in(json.dumps([{"Spec": spec} for spec in specs])), "shop", {}).document
    assert sorted(made["services"]) == ["shop_web", "web"]
    assert {key: one["name"] for key, one in made["secrets"].items()} == {
        "shop_zero": "shop_zero",
        "zero": "zero",
    }
    assert [one["source"] for one in made["services"]["web"]["secrets"]] == ["shop_zero", "zero"]
