"""An operator of one stack uses the plain docker command in the containers of its services, and in no others."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients.docker_calls import raw_get
from tests.support.machines.playground_rig import (
    CLIS,
    SKEP,
    TestCluster,
    create,
    no_playground_yet,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STACK = "com.docker.stack.namespace"
HANGS_UP = ("sh", "-c", "echo begun; trap 'echo hung up' HUP; trap 'exit 0' TERM; while :; do sleep 1; done")


class Users:
    """Commands of users, by docker contexts in a home of their own."""

    def __init__(self, cluster: TestCluster, home: Path, options: str) -> None:
        self.cluster, self.home, self._options = cluster, home, options.split()

    def add(self, name: str, role: str) -> None:
        options = [*self._options]
        options[options.index("--role") + 1] = role
        socket = self.cluster.node("m1").socket
        done = self._run([SKEP, "-H", socket, "user", "add", name, *options])
        assert done.returncode == 0, done.stderr

    def docker(self, user: str, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return self._run([CLIS[-1], "--context", user, *words], stdin)

    def done(self, user: str, *words: str, stdin: str | None = None) -> str:
        done = self.docker(user, *words, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, user: str, *words: str) -> str:
        done = self.docker(user, *words)
        assert done.returncode != 0, done.stdout
        return done.stderr + done.stdout

    def _run(self, command: list[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"]}
        return subprocess.run(
            command, env=environment, input=stdin, capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    """bob, an operator of the stack shop, vera, a viewer of it, and root; services of shop and blog on m1."""
    with no_playground_yet("ops") as cluster:
        printed = cluster.skep("up", "--managers", "1", "--tls").stdout
        command = re.search(r"users: skep user add NAME (.*)", printed)
        assert command is not None, printed
        users = Users(cluster, tmp_path_factory.mktemp("home"), command[1])
        m1 = cluster.node("m1")
        for stack in ("shop", "blog"):
            create(m1, f"{stack}_web", 1, "--label", f"{STACK}={stack}", command=HANGS_UP)
            wait_running(m1, f"{stack}_web", 1)
        m1.docker("run", "--detach", "--name", "plain", "busybox:1", "sleep", "3600")
        users.add("bob", "operator:shop")
        users.add("root", "admin")
        users.add("vera", "viewer:shop")
        yield users


def container(users: Users, name: str) -> str:
    return users.cluster.node("m1").docker("ps", "-q", "--filter", f"name={name}").stdout.strip()


def test_an_operator_works_in_its_containers_by_docker(users: Users, tmp_path: Path) -> None:
    own = container(users, "shop_web")
    assert users.done("bob", "exec", own, "echo", "hello") == "hello\n"
    assert users.done("bob", "exec", "-i", own, "cat", stdin="typed") == "typed"
    assert users.docker("bob", "exec", own, "sh", "-c", "exit 7").returncode == 7
    assert "begun" in users.done("bob", "logs", own)
    file = tmp_path / "file"
    file.write_text("carried")
    users.done("bob", "cp", str(file), f"{own}:/tmp/file")
    users.done("bob", "cp", f"{own}:/tmp/file", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "carried"
    users.done("bob", "kill", "--signal", "HUP", own)
    wait_until(lambda: "hung up" in users.done("bob", "logs", own), "the signal has come")
    assert container(users, "shop_web") == own
    history = raw_get(users.cluster.node("m1").client().api, "/skep/history")
    assert "exec in the container of task shop_web.1: echo hello" in history.text


def test_output_comes_by_tls_though_a_command_has_no_input(users: Users) -> None:
    """Docker's client closes its direction at once then."""
    own = container(users, "shop_web")
    for user in ("root", "bob"):
        for _ in range(3):
            assert users.done(user, "exec", own, "sh", "-c", "sleep 0.3; echo later") == "later\n"


def test_an_operator_attaches_to_its_container_by_docker(users: Users) -> None:
    own = container(users, "shop_web")
    command = [CLIS[-1], "--context", "bob", "attach", "--no-stdin", "--sig-proxy=false", own]
    environment = {"HOME": str(users.home), "PATH": os.environ["PATH"]}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as attached:
        try:
            assert attached.stdout is not None
            users.done("bob", "kill", "--signal", "HUP", own)
            assert attached.stdout.readline() == "hung up\n"
        finally:
            attached.kill()


def test_it_works_in_no_others_and_does_nothing_that_is_the_clusters(users: Users) -> None:
    own, other, plain = (container(users, name) for name in ("shop_web", "blog_web", "plain"))
    for word in (other, plain, "nosuch"):  # what bob does not see is not there
        for words in (
            ("exec", word, "id"),
            ("kill", word),
            ("logs", word),
            ("inspect", word),
            ("stop", word),
        ):
            assert f"No such container: {word}" in users.refused("bob", *words).replace("object", "container")
    assert "the role operator is needed" in users.refused("vera", "exec", own, "id")
    assert "the role operator is needed" in users.refused("vera", "cp", f"{own}:/etc/passwd", "-")
    assert "Privileged: only administrators" in users.refused("bob", "exec", "--privileged", own, "id")
    for words in (("stop", own), ("restart", own), ("pause", own), ("rm", "-f", own)):
        assert "docker service update --force SERVICE" in users.refused("bob", *words)
    assert container(users, "shop_web") == own


def test_a_container_with_more_rights_than_an_operator_may_give_is_closed_to_it(users: Users) -> None:
    m1 = users.cluster.node("m1")
    create(
        m1,
        "shop_root",
        1,
        "--label",
        f"{STACK}=shop",
        "--mount",
        "type=bind,src=/tmp,dst=/m",
        command=HANGS_UP,
    )
    wait_running(m1, "shop_root", 1)
    own = container(users, "shop_root")
    for words in (("exec", own, "id"), ("cp", f"{own}:/etc/passwd", "-"), ("kill", own)):
        assert "it has a bind mount of /tmp" in users.refused("bob", *words)
    m1.docker("service", "rm", "shop_root")
