"""``skep stack`` on a whole node: plan, deploy, change, fail, remove."""

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.machines.playground_rig import SKEP, TestNode, running, wait_until

pytestmark = pytest.mark.timeout(240)

FILE = """
name: shop
services:
  web:
    image: busybox
    command: sleep 600
    stop_grace_period: 0s
    depends_on: {migrate: {condition: service_completed_successfully}}
    configs: [{source: conf, target: /conf}]
    secrets: [password]
    deploy: {replicas: 2, update_config: {parallelism: 2, monitor: 500ms}}
    x-skep: {drain: 0s}
  migrate:
    image: busybox
    command: sh -c "echo migrated"
    restart: "no"
    depends_on: {db: {condition: service_healthy}}
  db:
    image: busybox
    command: sleep 600
    stop_grace_period: 0s
    healthcheck: {test: "true", interval: 500ms}
    deploy: {update_config: {monitor: 500ms}}
configs: {conf: {content: "version ${VERSION:-1}"}}
secrets: {password: {environment: PASSWORD}}
"""


def skep(
    node: TestNode, *words: str, check: bool = True, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [SKEP, "-H", node.socket, *words],
        capture_output=True, text=True, timeout=200, check=False, cwd=cwd,
        env=os.environ | {"PASSWORD": "secret"} | variables,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}{done.stdout}"
    return done


@pytest.fixture
def folder(m1: TestNode, tmp_path: Path) -> Iterator[Path]:
    """With the file; the stack is removed before and after."""
    (tmp_path / "compose.yaml").write_text(FILE)
    skep(m1, "stack", "rm", "shop")
    yield tmp_path
    skep(m1, "stack", "rm", "shop")


def deploy(
    node: TestNode, folder: Path, *words: str, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    words = ("stack", "deploy", "--resolve-image", "never", "--timeout", "100", *words)
    return skep(node, *words, check=check, cwd=folder, **variables)


def names(node: TestNode, noun: str) -> set[str]:
    field = "{{.Spec.Name}}" if noun in ("config", "secret") else "{{.Name}}"
    ids = node.docker(noun, "ls", "-q", "--filter", "label=com.docker.stack.namespace=shop").stdout.split()
    found = node.docker(noun, "inspect", "--format", field, *ids).stdout.split() if ids else []
    return {name.rpartition("-")[0] if noun in ("config", "secret") else name for name in found}


def test_a_stack_is_planned_deployed_changed_and_removed(m1: TestNode, folder: Path) -> None:
    planned = skep(m1, "stack", "plan", "--resolve-image", "never", check=False, cwd=folder)
    assert planned.returncode == 2
    lines = planned.stdout.splitlines()
    hostname = m1.docker("node", "inspect", "--format", "{{.Description.Hostname}}", "self").stdout.strip()
    assert lines[lines.index("  + service shop_web") + 1].strip() == f"2 tasks: 2 on {hostname}"
    assert names(m1, "config") == set(), "a plan wrote something"

    done = deploy(m1, folder)
    assert "waits for shop_migrate to complete" in done.stderr
    (migrated,) = json.loads(
        m1.docker("inspect", *m1.docker("service", "ps", "-q", "shop_migrate").stdout.split()).stdout
    )
    assert len(running(m1, "shop_web")) == 2
    assert all(
        task["Status"]["Timestamp"] > migrated["Status"]["Timestamp"] for task in running(m1, "shop_web")
    )
    assert m1.docker("stack", "ls", "--format", "{{.Name}} {{.Services}}").stdout == "shop 3\n"
    assert skep(m1, "stack", "ls", "--format", "{{.Name}} {{.Services}}").stdout == "shop 3\n"
    of_docker, of_skep = (
        command(
            "stack", "services", "shop", "--format", "{{.Name}} {{.Mode}} {{.Replicas}} {{.Image}}"
        ).stdout
        for command in (m1.docker, partial(skep, m1))
    )
    assert sorted(of_skep.splitlines()) == sorted(of_docker.splitlines())
    listed = json.loads(skep(m1, "stack", "ps", "-o", "json", "shop").stdout)
    assert {one["Node"] for one in listed} == {hostname}
    assert {one["ID"] for one in listed} == {
        *m1.docker("stack", "ps", "-q", "--no-trunc", "shop").stdout.split()
    }
    again = skep(m1, "stack", "plan", "--resolve-image", "never", cwd=folder)
    assert again.stdout == "Stack shop is up to date.\n"

    services = m1.docker("service", "inspect", "shop_web", "shop_migrate", "shop_db").stdout
    networks = m1.docker("network", "inspect", "shop_default").stdout
    (folder / "services.json").write_text(services)
    (folder / "networks.json").write_text(networks)
    imported = skep(m1, "import", "service", "--networks", "networks.json", "services.json", cwd=folder)
    assert imported.stderr == "", "notes on what is lost"
    (folder / "imported.yaml").write_text(imported.stdout)
    again = skep(m1, "stack", "plan", "--resolve-image", "never", "-c", "imported.yaml", "shop", cwd=folder)
    assert again.stdout == "Stack shop is up to date.\n"

    skep(m1, "import", "swarm", "--output", "moved", cwd=folder)
    (config,) = (folder / "moved/configs").iterdir()
    assert config.read_text() == "version 1"
    page = (folder / "moved/MOVING.md").read_text()
    (secret,) = m1.docker("secret", "ls", "--format", "{{.Name}}", "--filter", "name=shop_").stdout.split()
    assert f"docker secret create --label com.docker.stack.namespace=shop {secret} FILE" in page
    assert "skep stack deploy --compose-file shop.yaml shop" in page
    words = ("stack", "plan", "-o", "json", "--resolve-image", "never", "-c", "shop.yaml", "shop")
    planned = skep(m1, *words, check=False, cwd=folder / "moved")
    assert {one["Name"] for one in json.loads(planned.stdout) if one["Kind"] == "service"} <= {"shop_web"}

    before = {task["ID"] for task in running(m1, "shop_db")}
    deploy(m1, folder, VERSION="2")
    contents = [
        m1.docker("exec", task["Status"]["ContainerStatus"]["ContainerID"], "cat", "/conf").stdout
        for task in running(m1, "shop_web")
    ]
    assert contents == ["version 2", "version 2"]
    assert {task["ID"] for task in running(m1, "shop_db")} == before

    skep(m1, "stack", "rm", "shop")
    for noun in ("service", "network", "config", "secret"):
        assert m1.docker(noun, "ls", "-q", "--filter", "label=com.docker.stack.namespace=shop").stdout == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stack_is_removed_and_deployed_again_a_hundred_times(m1: TestNode, folder: Path) -> None:
    """Names, networks and addresses are free when ``rm`` returns."""
    (folder / "compose.yaml").write_text(
        "name: shop\nsecrets: {password: {environment: PASSWORD}}\n"
        "services: {web: {image: busybox, command: sleep 600, stop_grace_period: 0s, secrets: [password]}}\n"
    )
    for _ in range(100):
        deploy(m1, folder, "--detach")
        skep(m1, "stack", "rm", "shop")
    deploy(m1, folder)
    assert len(running(m1, "shop_web")) == 1
    skep(m1, "stack", "rm", "shop")
    for noun in ("service", "network", "config", "secret"):
        assert names(m1, noun) == set()


def test_a_plan_says_why_a_service_would_not_fit(m1: TestNode, folder: Path) -> None:
    place = "placement: {constraints: ['node.labels.zone==west']}"
    (folder / "compose.yaml").write_text(
        f"name: shop\nservices: {{web: {{image: busybox, deploy: {{{place}}}}}}}"
    )
    done = skep(m1, "stack", "plan", "--resolve-image", "never", check=False, cwd=folder)
    assert done.returncode == 2
    assert "does not fit: 0 of 1 task would run" in done.stdout
    assert "no suitable node (scheduling constraints not satisfied on 1 node)" in done.stdout
    assert ": constraints not satisfied: node.labels.zone == west" in done.stdout


def test_an_earlier_revision_is_deployed_again(m1: TestNode, folder: Path) -> None:
    text = (
        "name: shop\nservices: {web: {image: busybox, command: sleep 600, stop_grace_period: 0s, configs: [c], "
        "deploy: {update_config: {monitor: 500ms}}, x-skep: {drain: 0s}}%s}\nconfigs: {c: {content: '%s'}}"
    )
    (folder / "compose.yaml").write_text(text % ("", "one"))
    deploy(m1, folder)
    (folder / "compose.yaml").write_text(text % (", more: {image: busybox, deploy: {replicas: 0}}", "two"))
    deploy(m1, folder)
    listed = skep(m1, "stack", "history", "shop").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["REVISION", "1", "2"]
    assert all(line.endswith("deployed") for line in listed[1:])
    assert skep(m1, "stack", "diff", "shop", "1", "2").stdout.splitlines()[0] == "+ more"

    done = skep(m1, "stack", "rollback", "--to", "1", "shop")
    assert "- service shop_more" in done.stderr
    container = running(m1, "shop_web")[0]["Status"]["ContainerStatus"]["ContainerID"]
    assert m1.docker("exec", container, "cat", "/c").stdout == "one"

    new = ", new: {image: busybox, command: sleep 600, stop_grace_period: 0s}"
    (folder / "compose.yaml").write_text(text.replace("sleep 600", "no-such-command") % (new, "three"))
    failed = deploy(m1, folder, "--rollback-on-failure", check=False)
    assert failed.returncode == 1
    said, _, cause = failed.stderr.splitlines()[-1].partition(" Reason: ")
    assert "the deploy failed, and shop is back at revision 3." in said
    assert cause.startswith("shop_web: ")
    assert "no-such-command" in cause
    assert m1.docker("stack", "services", "shop", "--format", "{{.Name}}").stdout == "shop_web\n"
    states = [
        line.split("  ")[-1].strip() for line in skep(m1, "stack", "history", "shop").stdout.splitlines()[1:]
    ]
    assert [state.partition(":")[0] for state in states] == [
        "deployed",
        "deployed",
        "deployed",
        "failed",
        "deployed",
    ]
    assert "no-such-command" in states[3]


def test_a_service_that_cannot_run_ends_the_deploy_with_its_cause(m1: TestNode, folder: Path) -> None:
    (folder / "compose.yaml").write_text(FILE.replace('sh -c "echo migrated"', "no-such-command"))
    done = deploy(m1, folder, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: shop_migrate: its tasks ended and are not started")
    assert "no-such-command" in last
    explained = skep(m1, "explain", "shop_web").stdout
    assert "it waits for shop_migrate to complete, which has failed; 0 of 2 tasks run" in explained
    shown = m1.docker(
        "service", "ps", "--no-trunc", "--format", "{{.CurrentState}} {{.Error}}", "shop_web"
    ).stdout
    assert all(line.startswith("Pending") for line in shown.splitlines())
    assert shown.count("waits for shop_migrate to complete") == 2
    (folder / "compose.yaml").write_text(FILE)  # repeating completes it
    deploy(m1, folder)
    assert len(running(m1, "shop_web")) == 2


def test_an_interrupted_deploy_is_completed_by_repeating_it(m1: TestNode, folder: Path) -> None:
    command = [SKEP, "-H", m1.socket, "stack", "deploy", "--resolve-image", "never"]
    with subprocess.Popen(
        command, cwd=folder, stderr=subprocess.DEVNULL, env=os.environ | {"PASSWORD": "x"}
    ) as process:
        wait_until(lambda: "shop_default" in names(m1, "network"), "the network")
        process.kill()
    deploy(m1, folder, PASSWORD="x")
    assert len(running(m1, "shop_web")) == 2
    listed = json.loads(skep(m1, "stack", "history", "shop", "-o", "json").stdout)
    assert listed[-1]["State"] == "deployed"


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_a_deploy_may_follow_a_removal_at_once(m1: TestNode, folder: Path, times: int) -> None:
    soon = "deploy: {update_config: {monitor: 500ms}}, x-skep: {drain: 0s}"
    service = f"{{image: busybox, command: sleep 600, stop_grace_period: 0s, {soon}}}"
    text = f"name: shop\nservices: {{web: {service}}}"
    (folder / "compose.yaml").write_text(text)
    for _ in range(times):
        deploy(m1, folder)
        skep(m1, "stack", "rm", "shop")


def test_services_that_the_files_no_longer_have_go_when_asked(m1: TestNode, folder: Path) -> None:
    service = "{image: busybox, deploy: {replicas: 0}}"
    (folder / "compose.yaml").write_text(f"name: shop\nservices: {{a: {service}, b: {service}}}")
    deploy(m1, folder)
    (folder / "compose.yaml").write_text(f"name: shop\nservices: {{a: {service}}}")
    planned = skep(
        m1, "stack", "plan", "--prune", "-o", "json", "--resolve-image", "never", check=False, cwd=folder
    )
    assert [(one["Action"], one["Name"]) for one in json.loads(planned.stdout)] == [("remove", "shop_b")]
    deploy(m1, folder, "--prune")
    assert m1.docker("stack", "services", "shop", "--format", "{{.Name}}").stdout == "shop_a\n"


def test_one_service_is_deployed_and_the_others_stay_as_they_are(m1: TestNode, folder: Path) -> None:
    service = "{image: busybox, environment: {WORD: '%s'}, deploy: {replicas: 0}}"
    text = f"name: shop\nservices: {{a: {service}, b: {service}}}"
    (folder / "compose.yaml").write_text(text.replace("%s", "one"))
    deploy(m1, folder)
    (folder / "compose.yaml").write_text(text.replace("%s", "two"))
    deploy(m1, folder, "--only", "a")
    shown = m1.docker(
        "service", "inspect", "--format", "{{.Spec.TaskTemplate.ContainerSpec.Env}}", "shop_a", "shop_b"
    )
    assert shown.stdout.split() == ["[WORD=two]", "[WORD=one]"]
    listed = skep(m1, "stack", "history", "shop", "-o", "json").stdout
    assert len(json.loads(listed)) == 2, "the last revision with the chosen service changed is one of its own"
    unknown = deploy(m1, folder, "--only", "c", check=False)
    assert (unknown.returncode, unknown.stderr.splitlines()[-1]) == (
        1,
        "Error: the files have no service c. Choose one of a, b",
    )


def test_a_mounted_file_with_other_content_updates_its_service(m1: TestNode, folder: Path) -> None:
    (folder / "site.conf").write_text("one")
    service = (
        "{image: busybox, command: sleep 600, stop_grace_period: 0s, volumes: ['./site.conf:/site.conf:ro'], "
    )
    service += "deploy: {update_config: {monitor: 500ms}}, x-skep: {drain: 0s}}"
    (folder / "compose.yaml").write_text(f"name: shop\nservices: {{web: {service}}}")
    deploy(m1, folder)
    before = running(m1, "shop_web")[0]["ID"]
    (folder / "new").write_text("two")
    (folder / "new").rename(folder / "site.conf")  # as editors write: the container has the file that was
    planned = skep(m1, "stack", "plan", "--resolve-image", "never", check=False, cwd=folder)
    assert planned.returncode == 2
    assert "site.conf" in planned.stdout
    deploy(m1, folder)
    (task,) = running(m1, "shop_web")
    assert task["ID"] != before
    container = task["Status"]["ContainerStatus"]["ContainerID"]
    assert m1.docker("exec", container, "cat", "/site.conf").stdout == "two"


def test_an_image_is_built_and_its_service_runs(m1: TestNode, folder: Path) -> None:
    (folder / "app").mkdir()
    (folder / "app/Containerfile").write_text(
        'FROM busybox\nARG WORD\nENV WORD=$WORD\nCMD ["sleep", "600"]\n'
    )
    build = "{context: app, dockerfile: Containerfile, args: {WORD: built}, extra_hosts: ['h:127.0.0.1']}"
    soon = "stop_grace_period: 0s, deploy: {update_config: {monitor: 500ms}}"
    text = f"name: shop\nservices: {{app: {{build: {build}, {soon}}}}}"
    (folder / "compose.yaml").write_text(text)
    deploy(m1, folder)
    container = running(m1, "shop_app")[0]["Status"]["ContainerStatus"]["ContainerID"]
    assert m1.docker("exec", container, "sh", "-c", "echo $WORD").stdout == "built\n"
    (folder / "compose.yaml").write_text(text.replace("built", "again"))
    assert (
        "replaces tasks, 1 at a time, stopping old tasks first, because of Image" in deploy(m1, folder).stderr
    )
    container = running(m1, "shop_app")[0]["Status"]["ContainerStatus"]["ContainerID"]
    assert m1.docker("exec", container, "sh", "-c", "echo $WORD").stdout == "again\n"
    assert "is up to date" in deploy(m1, folder).stderr


def test_what_is_wrong_in_a_file_is_said_and_nothing_is_done(m1: TestNode, folder: Path) -> None:
    (folder / "compose.yaml").write_text(FILE.replace("replicas: 2", "replica: 2"))
    done = deploy(m1, folder, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("services.web.deploy.replica: unknown key: did you mean replicas?\n")
    assert names(m1, "network") == set()


def test_a_one_shot_service_that_is_deployed_again_is_done_again(m1: TestNode, folder: Path) -> None:
    """Docker pauses its update: the task has ended early."""
    deploy(m1, folder)
    (folder / "compose.yaml").write_text(FILE.replace("echo migrated", "echo migrated again"))
    deploy(m1, folder)

    def update() -> str:
        words = ("service", "inspect", "--format", "{{.UpdateStatus.State}}", "shop_migrate")
        return m1.docker(*words).stdout.strip()

    assert wait_until(lambda: update() not in ("", "updating") and update(), "its update ends") == "completed"
    found = json.loads(skep(m1, "status", "-o", "json", check=False).stdout)
    rows = {one["Name"]: one for one in found["Cluster"]["Services"]}
    assert (rows["shop_migrate"]["IsHealthy"], rows["shop_migrate"]["Reason"]) == (True, "")
    explained = skep(m1, "explain", "shop_migrate").stdout
    assert "paused" not in explained
