"""Registries that run as services: used as ``localhost`` from every node, as a mirror, with passwords that change."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skep.playground.commands import find
from skep.playground.images.archive import ArchivedDirectory, Entry, File, image_archive
from skep.playground.images.busybox import PATH, applets
from tests.support.images.registry_rig import registry_image
from tests.support.machines.playground_rig import (
    CLIS,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    ready,
    running,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.timeout(400), pytest.mark.needs("docker-registry")]

NODES = ("m1", "w1", "w2")
REGISTRY, MIRROR, GUARDED, HELPED = 5000, 5001, 5002, 5003
"""Ports.  The last two lead to one registry with passwords; nodes have a credential helper for the last."""

CONFIGURATION = f"""\
registry-mirrors = ["http://localhost:{MIRROR}"]
credential-helpers = {{ "localhost:{HELPED}" = "skeptest" }}
"""


def app_image(version: str) -> bytes:
    """A busybox that no other image is."""
    entries: dict[str, Entry] = {
        **asyncio.run(applets(Path(find("busybox")))),
        "etc/version": File(version.encode()),
        "tmp": ArchivedDirectory(0o1777),
    }
    config = {"Cmd": ["sleep", "100000"], "Env": [f"PATH={PATH}"]}
    return image_archive(entries, tags=[version], created="2026-01-01T00:00:00Z", config=config).data


class Helper:
    """``docker-credential-skeptest`` on the path of every node: gives ``user`` and what a test says."""

    def __init__(self, directory: Path) -> None:
        self._password = directory / "password"
        program = directory / "docker-credential-skeptest"
        program.write_text(
            f'#!/bin/sh\necho "{{\\"Username\\": \\"user\\", \\"Secret\\": \\"$(cat {self._password})\\"}}"\n'
        )
        program.chmod(0o755)

    def gives(self, password: str) -> None:
        self._password.write_text(password)


@pytest.fixture(scope="module")
def helper() -> Iterator[Helper]:
    with tempfile.TemporaryDirectory(prefix="skep-helper-") as directory:
        path = os.environ["PATH"]
        os.environ["PATH"] = f"{directory}:{path}"
        try:
            yield Helper(Path(directory))
        finally:
            os.environ["PATH"] = path


@pytest.fixture(scope="module")
def trio(helper: Helper) -> Iterator[TestCluster]:
    configured = dict.fromkeys(NODES, CONFIGURATION)
    with a_playground("regs", managers=1, workers=2, configured=configured) as cluster:
        m1 = cluster.node("m1")
        wait_until(lambda: ready(m1) == set(NODES), "all nodes are ready", 120)
        m1.client().images.load(registry_image())
        m1.docker("network", "create", "-d", "overlay", "registries")
        serve(m1, "registry", REGISTRY)
        for node in cluster.nodes():
            wait_until(
                lambda node=node: responds(node, REGISTRY), f"the registry responds at {node.name}", 120
            )
        yield cluster


def serve(manager: TestNode, name: str, *ports: int, **environment: str) -> None:
    """A registry as a service on the manager; its files outlive its tasks."""
    manager.docker(
        *(
            "service",
            "create",
            "--detach",
            "--name",
            name,
            "--update-monitor",
            "500ms",
            "--network",
            "registries",
        ),
        *("--constraint", "node.hostname==m1", "--mount", f"type=volume,src={name},dst=/registry"),
        *(word for port in ports for word in ("--publish", f"{port}:5000")),
        *(word for key, value in environment.items() for word in ("--env", f"{key}={value}")),
        "registry:1",
    )
    wait_running(manager, name, 1, 120)


ASK = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=5)
connection.request("GET", "/v2/")
sys.exit(connection.getresponse().status not in (200, 401))
"""


def responds(node: TestNode, port: int) -> bool:
    """Whether a registry responds at the loopback address of ``node``, where its daemon looks for it."""
    command = [
        "nsenter",
        f"--net={node.description['netns']}",
        "--",
        sys.executable,
        "-I",
        "-c",
        ASK,
        str(port),
    ]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def image_of(node: TestNode, service: str) -> str:
    found: dict[str, Any] = node.client().api.inspect_service(service)
    return str(found["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"])


def provide(node: TestNode, name: str, version: str, home: Path | None = None) -> None:
    """Push an image that no other is to ``name``; no node has it afterwards."""
    api = node.client()
    api.images.load(app_image(version))
    node.docker("tag", version, name)
    docker_at(node, "push", name, home=home)
    for one in (name, version):
        node.docker("rmi", one)


def docker_at(
    node: TestNode, *words: str, home: Path | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The docker command with a home of its own, where logins are kept."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home or "/nonexistent"),
        "DOCKER_HOST": node.socket,
    }
    done = subprocess.run(
        [CLIS[-1], *words],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}{done.stdout}"
    return done


def test_a_registry_run_as_a_service_is_pushed_to_and_pulled_from_at_localhost_of_every_node(
    trio: TestCluster,
) -> None:
    m1, w1 = trio.node("m1"), trio.node("w1")
    name = f"localhost:{REGISTRY}/team/app:1"
    w1.client().images.load(app_image("app:talk"))
    w1.docker("tag", "app:talk", name)
    pushed = w1.docker("push", name).stdout.splitlines()
    assert pushed[0] == f"The push refers to repository [localhost:{REGISTRY}/team/app]"
    digest = pushed[-1].split()[2]
    assert pushed[-1].startswith(f"1: digest: {digest} size: ")
    for node in trio.nodes():
        pulled = node.docker("pull", name).stdout
        assert f"Digest: {digest}" in pulled
    ids = {node.client().api.inspect_image(name)["Id"] for node in trio.nodes()}
    assert len(ids) == 1
    created = m1.docker("service", "create", "--detach", "--name", "app", "--mode", "global", name)
    assert created.stderr == ""
    assert image_of(m1, "app") == f"{name}@{digest}"
    wait_running(m1, "app", 3, 120)
    m1.docker("service", "rm", "app")


def test_a_registry_that_is_away_is_named_in_dockers_warning(trio: TestCluster) -> None:
    m1 = trio.node("m1")
    for cli in CLIS:
        created = m1.docker(
            *("service", "create", "--detach", "--name", "away", "--replicas", "0", "localhost:1/app:1"),
            cli=cli,
        )
        assert (
            "image localhost:1/app:1 could not be accessed on a registry to record\nits digest."
            in created.stderr
        )
        assert image_of(m1, "away") == "localhost:1/app:1"
        m1.docker("service", "rm", "away")


def test_a_pull_through_mirror_run_as_a_service_is_asked_first(trio: TestCluster) -> None:
    m1, w2 = trio.node("m1"), trio.node("w2")
    provide(m1, f"localhost:{REGISTRY}/team/mirrored:1", "app:mirrored")
    serve(m1, "mirror", MIRROR, REGISTRY_PROXY_REMOTEURL="http://registry:5000")
    wait_until(lambda: responds(w2, MIRROR), "the mirror responds", 120)
    pulled = w2.docker("pull", "team/mirrored:1").stdout
    assert pulled.splitlines()[-2:] == [
        "Status: Downloaded newer image for team/mirrored:1",
        "docker.io/team/mirrored:1",
    ]
    m1.docker("service", "rm", "mirror")


@pytest.fixture(scope="module")
def guarded(trio: TestCluster) -> TestCluster:
    """A registry with passwords, at two ports."""
    serve(
        trio.node("m1"),
        "guarded",
        GUARDED,
        HELPED,
        REGISTRY_AUTH="htpasswd",
        REGISTRY_AUTH_HTPASSWD_REALM="tests",
        REGISTRY_AUTH_HTPASSWD_PATH="/etc/registry/secret",
    )
    for node in trio.nodes():
        wait_until(lambda node=node: responds(node, GUARDED), f"it responds at {node.name}", 120)
    return trio


def has_password(cluster: TestCluster, name: str) -> None:
    """``name``: the file of the registry's passwords."""
    m1 = cluster.node("m1")
    setting = f"REGISTRY_AUTH_HTPASSWD_PATH=/etc/registry/{name}"
    m1.docker("service", "update", "--quiet", "--env-add", setting, "guarded")
    for node in cluster.nodes():
        wait_until(lambda node=node: responds(node, GUARDED), f"it responds at {node.name}", 120)


@pytest.mark.slow
def test_an_update_with_registry_auth_renews_the_credentials_of_a_service(
    guarded: TestCluster, tmp_path: Path
) -> None:
    m1, name = guarded.node("m1"), f"localhost:{GUARDED}/app:1"
    has_password(guarded, "secret")
    login = ("login", "-u", "user", "--password-stdin", f"localhost:{GUARDED}")
    docker_at(m1, *login, home=tmp_path, stdin="secret")
    provide(m1, name, "app:renewed", tmp_path)
    has_password(guarded, "next")
    create = (
        "service",
        "create",
        "--detach",
        "--with-registry-auth",
        "--name",
        "app",
        "--restart-delay",
        "1s",
    )
    created = docker_at(m1, *create, "--constraint", "node.hostname==w1", name, home=tmp_path)
    assert "could not be accessed on a registry" in created.stderr

    def is_refused() -> bool:
        tasks = m1.client().api.tasks(filters={"service": "app"})
        return any("pull access denied" in task["Status"].get("Err", "") for task in tasks)

    wait_until(is_refused, "a task is rejected with the credentials that have expired", 120)
    assert not running(m1, "app")
    docker_at(m1, *login, home=tmp_path, stdin="next")
    update = ("service", "update", "--detach", "--with-registry-auth", "--image", name, "app")
    assert docker_at(m1, *update, home=tmp_path).stderr == ""
    wait_running(m1, "app", 1, 120)
    assert image_of(m1, "app").startswith(f"{name}@sha256:")
    m1.docker("service", "rm", "app")


@pytest.mark.slow
def test_a_stack_takes_the_logins_of_its_client_to_the_nodes(guarded: TestCluster, tmp_path: Path) -> None:
    """``skep stack deploy --with-registry-auth``; without it the nodes are refused."""
    m1, name = guarded.node("m1"), f"localhost:{GUARDED}/app:3"
    has_password(guarded, "secret")
    login = ("login", "-u", "user", "--password-stdin", f"localhost:{GUARDED}")
    docker_at(m1, *login, home=tmp_path, stdin="secret")
    provide(m1, name, "app:stacked", tmp_path)
    for node in guarded.nodes():
        node.docker("rmi", name, check=False)
    (tmp_path / "compose.yaml").write_text(
        f"name: private\nservices: {{app: {{image: '{name}', deploy: "
        "{placement: {constraints: [node.hostname==w1]}}}}\n"
    )

    def deploy(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SKEP, "--host", m1.socket, "stack", "deploy", "--timeout", "60", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            timeout=120,
            check=False,
        )

    sent = deploy("--detach")
    assert sent.returncode == 0, sent.stderr

    def refusals() -> list[str]:
        tasks = m1.client().api.tasks(filters={"service": "private_app"})
        return [task["Status"].get("Err", "") for task in tasks if task["Status"]["State"] == "rejected"]

    wait_until(refusals, "a task is rejected without credentials", 60)
    assert all("access denied" in error or "No such image" in error for error in refusals()), refusals()
    done = deploy("--with-registry-auth")
    assert done.returncode == 0, done.stderr
    assert len(running(m1, "private_app")) == 1
    assert image_of(m1, "private_app").startswith(f"{name}@sha256:")
    (spec,) = m1.client().api.services(filters={"name": "private_app"})
    assert "secret" not in str(spec)
    m1.docker("stack", "rm", "private")


def test_nodes_pull_from_a_private_registry_with_their_credential_helper(
    guarded: TestCluster, helper: Helper
) -> None:
    """No credentials in any request; the password changes between the push and the tasks."""
    m1, name = guarded.node("m1"), f"localhost:{HELPED}/app:2"
    has_password(guarded, "secret")
    helper.gives("secret")
    provide(m1, name, "app:helped")
    has_password(guarded, "next")
    helper.gives("next")
    created = m1.docker("service", "create", "--detach", "--name", "app", "--mode", "global", name)
    assert created.stderr == ""
    assert image_of(m1, "app").startswith(f"{name}@sha256:")
    wait_running(m1, "app", 3, 120)
    m1.docker("service", "rm", "app")
