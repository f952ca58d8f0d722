"""Ansible's modules for Docker (community.docker): each changes what differs, and nothing the second time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines.playground_rig import CLIS, IDLE, TestNode
from tests.support.machines.plugins import plugin

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Task = dict[str, Any]

SHOP = {
    "version": "3.8",
    "services": {
        "api": {
            "image": "busybox:1",
            "command": "sleep 600",
            "stop_grace_period": "0s",
            "environment": {"WORD": "one"},
            "secrets": ["password"],
            "deploy": {"replicas": 1, "labels": {"of": "shop"}, "update_config": {"order": "start-first"}},
        }
    },
    "secrets": {"password": {"external": True, "name": "key"}},
}
WEB = {
    "name": "web",
    "image": "busybox:1",
    "command": list(IDLE),
    "replicas": 2,
    "env": {"WORD": "one"},
    "labels": {"of": "web"},
    "container_labels": {"in": "web"},
    "publish": [{"published_port": 8088, "target_port": 80}],
    "networks": ["front"],
    "secrets": [{"secret_name": "key", "filename": "/run/secrets/key", "mode": 0o400}],
    "configs": [{"config_name": "conf", "filename": "/conf"}],
    "mounts": [{"type": "volume", "source": "data", "target": "/data"}],
    "limits": {"memory": "64M", "cpus": 0.5},
    "reservations": {"memory": "16M"},
    "placement": {"constraints": ["node.role == manager"]},
    "update_config": {"parallelism": 2, "delay": "100ms", "order": "stop-first"},
    "rollback_config": {"parallelism": 1},
    "restart_config": {"condition": "on-failure", "delay": "1s"},
    "healthcheck": {"test": ["CMD", "true"], "interval": "1s", "retries": 3},
    "stop_grace_period": "1s",
}
"""What a play of 2015 said of a container (image, command, ports, count, memory, links, volumes), as a service."""


def changing(hostname: str) -> list[Task]:
    """One use of each module after the other, each of which has something to change."""
    gone: list[tuple[str, Task]] = [
        ("docker_swarm_service", {"name": "web"}),
        ("docker_secret", {"name": "key"}),
        ("docker_config", {"name": "conf"}),
        ("docker_network", {"name": "front"}),
    ]
    uses: list[tuple[str, Task]] = [
        ("docker_swarm", {"state": "present", "task_history_retention_limit": 7, "labels": {"team": "a"}}),
        ("docker_node", {"hostname": hostname, "labels": {"zone": "west"}, "labels_state": "merge"}),
        ("docker_secret", {"name": "key", "data": "secret", "labels": {"a": "b"}}),
        ("docker_config", {"name": "conf", "data": "content"}),
        (
            "docker_network",
            {
                "name": "front",
                "driver": "overlay",
                "attachable": True,
                "ipam_config": [{"subnet": "10.77.0.0/24", "gateway": "10.77.0.1"}],
                "labels": {"a": "b"},
            },
        ),
        ("docker_swarm_service", WEB),
        ("docker_swarm_service", WEB | {"replicas": 1, "env": {"WORD": "two"}}),
        ("docker_stack", {"name": "shop", "compose": [SHOP], "resolve_image": "never"}),
        ("docker_stack", {"name": "shop", "state": "absent"}),
        *((module, {**given, "state": "absent"}) for module, given in gone),
        ("docker_node", {"hostname": hostname, "labels_to_remove": ["zone"], "labels_state": "merge"}),
        ("docker_swarm", {"state": "present", "task_history_retention_limit": 5, "labels": {}}),
    ]
    return [{f"community.docker.{module}": given} for module, given in uses]


def looking(hostname: str) -> list[Task]:
    """The modules that only read, and what they find while the service is there."""
    uses: list[tuple[str, Task, list[str]]] = [
        (
            "docker_swarm_info",
            {"nodes": True, "services": True, "tasks": True, "unlock_key": True},
            ["found.docker_swarm_active", "found.services[0].Name == 'web'", "found.nodes | length == 1"],
        ),
        ("docker_node_info", {"self": True}, [f"found.nodes[0].Description.Hostname == '{hostname}'"]),
        (
            "docker_swarm_service_info",
            {"name": "web"},
            ["found.exists", "found.service.Spec.Labels.of == 'web'"],
        ),
        ("docker_network_info", {"name": "front"}, ["found.exists", "found.network.Driver == 'overlay'"]),
        (
            "docker_host_info",
            {"containers": True, "networks": True},
            ["found.host_info.Swarm.ControlAvailable"],
        ),
        ("docker_stack_info", {}, ["found.results == []"]),
    ]
    return [
        task
        for module, given, checks in uses
        for task in (
            {f"community.docker.{module}": given, "register": "found"},
            {"ansible.builtin.assert": {"that": [*checks, "found is not changed"]}},
        )
    ]


def play(tasks: list[Task], node: TestNode, directory: Path) -> str:
    """What ``ansible-playbook`` prints.  Its modules run on this machine, with its Python and docker command."""
    book = directory / "play.json"
    book.write_text(
        json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}])
    )  # JSON is YAML
    (directory / "bin").mkdir()
    (directory / "bin/docker").symlink_to(CLIS[-1])
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "--inventory", "localhost,", str(book)],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
        env={
            "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
            "HOME": str(directory),
            "ANSIBLE_COLLECTIONS_PATH": str(plugin("ansible_collections").parent),
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
            "ANSIBLE_TRANSPORT": "local",
            "DOCKER_HOST": node.socket,
            "LC_ALL": "C.UTF-8",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_module_changes_what_differs_and_nothing_the_second_time(m1: TestNode, tmp_path: Path) -> None:
    hostname = m1.docker("node", "inspect", "self", "--format", "{{.Description.Hostname}}").stdout.strip()
    tasks: list[Task] = []
    for task in changing(hostname):
        tasks += [
            task | {"register": "first"},
            task | {"register": "second"},
            {"ansible.builtin.assert": {"that": ["first is changed", "second is not changed"]}},
        ]
    stack = next(index for index, task in enumerate(tasks) if "community.docker.docker_stack" in task)
    tasks[stack:stack] = looking(hostname)
    shown = play(tasks, m1, tmp_path)
    assert "failed=0" in shown
    swarm = m1.client().api.inspect_swarm()
    assert swarm["Spec"]["Orchestration"]["TaskHistoryRetentionLimit"] == 5
