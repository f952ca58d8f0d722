"""What a rotation of secrets decides, and what it does before a manager's API."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from skep.cli.apps.rotation import (
    CONFIG,
    SECRET,
    VersionProgress,
    _prune,
    _rotate,
    _Rotation,
    moved,
    next_name,
    unused,
    version_progress,
    versions,
)
from skep.errors import InvalidArgument, NotFound, SkepError, Unavailable
from skep.manager.routes import ManagerApi
from skep.model.options.labels import ROTATION_OF
from skep.model.options.schedules import CRON
from skep.model.secret import Secret
from skep.model.service import Service
from skep.model.task import TaskState, TaskStatus
from skep.model.values.stacks import STACK_LABEL
from skep.security.authority import Authority
from skep.store.level import SCHEDULES
from tests.support import builders
from tests.support.harness.clocks import on_virtual_time
from tests.support.security.external_ca import server_certificate
from tests.support.store.store_transactions import put


def an_object(id: str, name: str, of: str = "") -> dict[str, Any]:
    return {"ID": id, "Spec": {"Name": name, "Labels": {ROTATION_OF: of} if of else {}}}


OBJECTS = [
    an_object("i3", "key-v10", "key"),
    an_object("i1", "key"),
    an_object("i2", "key-v2", "key"),
    an_object("i4", "key-v11"),
    an_object("i5", "other"),
]


def a_spec(*ids: str, field: str = "Secrets") -> dict[str, Any]:
    kind = field[:-1]
    references = [
        {f"{kind}ID": id, f"{kind}Name": f"name of {id}", "File": {"Name": "password"}} for id in ids
    ]
    return {
        "Name": "web",
        "Mode": {"Replicated": {"Replicas": 2}},
        "TaskTemplate": {"ContainerSpec": {"Image": "app", field: references}},
    }


def of_stack(found: dict[str, Any], stack: str) -> dict[str, Any]:
    labels = found["Spec"]["Labels"] | {STACK_LABEL: stack}
    return {**found, "Spec": found["Spec"] | {"Labels": labels}}


PAYMENTS = of_stack(an_object("a", "payments_db"), "payments")
PLANTED = [
    of_stack(an_object("z", "shop_z", "payments_db"), "shop"),
    of_stack(an_object("y", "payments_db-v7", "payments_db"), "shop"),
    of_stack(an_object("x", "payments_other", "payments_db"), "payments"),
    an_object("w", "payments_db-v8", "payments_db"),
]


@pytest.mark.parametrize("planted", PLANTED)
def test_a_version_has_the_name_of_one_and_is_of_the_same_stack(planted: dict[str, Any]) -> None:
    for objects in ([PAYMENTS, planted], [planted, PAYMENTS]):
        assert versions(objects, "payments_db") == [PAYMENTS]
        assert unused(SECRET, objects, [], all=False) == [], "none supersedes another"
    second = of_stack(an_object("b", "payments_db-v2", "payments_db"), "payments")
    assert versions([planted, second, PAYMENTS], "payments_db") == [PAYMENTS, second]


@pytest.mark.parametrize("name", ["key", "key-v2", "key-v10"])
def test_versions_are_found_by_any_of_their_names_in_the_order_of_their_numbers(name: str) -> None:
    assert [one["ID"] for one in versions(OBJECTS, name)] == ["i1", "i2", "i3"]


def test_a_name_that_no_object_has_is_an_error() -> None:
    with pytest.raises(NotFound, match=r"^nothing does not exist\. "):
        versions(OBJECTS, "nothing")


def test_a_secret_of_a_stacks_file_is_rotated_by_a_deploy() -> None:
    made = an_object("i9", "shop_pw-5cb5fb91cd")
    made["Spec"]["Labels"] = {STACK_LABEL: "shop"}
    with pytest.raises(NotFound, match=r"shop_pw is in the file of stack shop.*skep stack deploy"):
        versions([made], "shop_pw")


def test_the_next_name_is_after_every_version_and_is_free() -> None:
    assert next_name(OBJECTS, versions(OBJECTS, "key")) == "key-v12"
    assert next_name(OBJECTS, versions(OBJECTS, "other")) == "other-v2"


def test_references_move_to_the_new_version_and_files_keep_their_names() -> None:
    spec = a_spec("i1", "i5", "i2")
    made = moved(SECRET, spec, {"i1", "i2"}, OBJECTS[0])
    references = made["TaskTemplate"]["ContainerSpec"]["Secrets"]
    assert [one["SecretID"] for one in references] == ["i3", "i5", "i3"]
    assert [one["SecretName"] for one in references] == ["key-v10", "name of i5", "key-v10"]
    assert {one["File"]["Name"] for one in references} == {"password"}
    assert spec == a_spec("i1", "i5", "i2"), "what was given is as it was"


@pytest.mark.parametrize(
    "spec", [a_spec("i5"), {"TaskTemplate": {}}, {"TaskTemplate": {"ContainerSpec": {}}}]
)
def test_a_service_that_uses_none_of_the_versions_is_left_alone(spec: dict[str, Any]) -> None:
    assert moved(SECRET, spec, {"i1"}, OBJECTS[0]) is None


def test_labels_that_name_a_certificate_move_to_the_new_version() -> None:
    labels = {
        "skep.http": "a.example",
        "skep.http.tls": "site",
        "skep.http.more.tls": "auto",
        "other": "site",
    }
    made = moved(SECRET, {"Labels": labels}, {"i1"}, {"ID": "i2", "Spec": {"Name": "site-v2"}}, ["site"])
    assert made == {"Labels": {**labels, "skep.http.tls": "site-v2"}}
    assert moved(SECRET, {"Labels": labels}, {"i1"}, OBJECTS[0], ["another"]) is None
    assert moved(CONFIG, {"Labels": labels}, {"i1"}, OBJECTS[0], ["site"]) is None


def test_a_secret_with_a_certificate_in_use_is_not_pruned() -> None:
    objects = [{"ID": "i1", "Spec": {"Name": "site"}}, {"ID": "i2", "Spec": {"Name": "old"}}]
    service = {
        "Spec": {"Labels": {"skep.http": "a.example", "skep.http.tls": "site"}},
        "PreviousSpec": {"Labels": {"skep.http": "a.example", "skep.http.tls": "old"}},
    }
    assert unused(SECRET, objects, [service], all=True) == []
    assert unused(SECRET, objects, [{"Spec": service["Spec"]}], all=True) == objects[1:]


def test_configs_are_moved_by_their_own_references() -> None:
    assert moved(CONFIG, a_spec("i1"), {"i1"}, OBJECTS[0]) is None
    made = moved(CONFIG, a_spec("i1", field="Configs"), {"i1"}, OBJECTS[0])
    assert made["TaskTemplate"]["ContainerSpec"]["Configs"][0]["ConfigID"] == "i3"


def a_task(id: str, state: str = "running") -> dict[str, Any]:
    return {"Spec": a_spec(id)["TaskTemplate"], "Status": {"State": state}}


@pytest.mark.parametrize(
    ("tasks", "update", "expected"),
    [
        ([a_task("new"), a_task("new")], {"State": "completed"}, VersionProgress(2, 2, is_complete=True)),
        ([a_task("new"), a_task("new")], None, VersionProgress(2, 2, is_complete=True)),
        ([a_task("new"), a_task("new")], {"State": "updating"}, VersionProgress(2, 2)),
        ([a_task("new"), a_task("old")], None, VersionProgress(1, 2)),
        ([a_task("new"), a_task("new", "preparing")], None, VersionProgress(1, 2)),
        ([a_task("new"), a_task("new"), a_task("old")], None, VersionProgress(2, 3)),
        ([a_task("new")], None, VersionProgress(1, 2)),
        ([a_task("old")], {"State": "paused", "Message": "why"}, VersionProgress(0, 2, stuck="why")),
        ([], {"State": "rollback_completed"}, VersionProgress(0, 2, stuck="rollback_completed")),
    ],
)
def test_a_service_is_done_when_every_wanted_task_runs_with_the_version(
    tasks: list[dict[str, Any]], update: dict[str, str] | None, expected: VersionProgress
) -> None:
    service = {"Spec": a_spec("new"), "UpdateStatus": update}
    assert version_progress(SECRET, service, tasks, "new") == expected


def test_a_stopped_service_is_done_when_its_tasks_have_stopped() -> None:
    service = {"Spec": {**a_spec("new"), "Labels": {"skep.stopped": "true"}}}
    assert version_progress(SECRET, service, [], "new") == VersionProgress(0, 0, is_complete=True)
    assert not version_progress(SECRET, service, [a_task("old")], "new").is_complete


BACK = "it uses the previous secret again, because its update was rolled back or its spec was changed"


@pytest.mark.parametrize("labels", [{}, {CRON: "0 3 * * *"}])
def test_a_service_that_uses_an_earlier_version_again_is_not_done(labels: dict[str, str]) -> None:
    service = {"Spec": {**a_spec("old"), "Labels": labels}, "UpdateStatus": {"State": "completed"}}
    tasks = [] if labels else [a_task("old"), a_task("old")]
    found = version_progress(SECRET, service, tasks, "new", ["old"])
    assert (found.stuck, found.is_complete) == (BACK, False)


def test_a_service_that_uses_no_version_any_longer_is_done() -> None:
    service = {"Spec": a_spec("other")}
    assert version_progress(SECRET, service, [a_task("other")], "new", ["old"]).is_complete


def test_superseded_versions_that_no_service_uses_or_returns_to_are_pruned() -> None:
    services = [{"Spec": a_spec("i3"), "PreviousSpec": a_spec("i2")}]
    assert [one["ID"] for one in unused(SECRET, OBJECTS, services, all=False)] == ["i1"]
    assert [one["ID"] for one in unused(SECRET, OBJECTS, services, all=True)] == ["i1", "i4", "i5"]
    assert [one["ID"] for one in unused(CONFIG, OBJECTS, services, all=False)] == ["i1", "i2"]


class _Services:
    """The API of services, of which some cannot be updated; ``moved``: those that were."""

    def __init__(self, refused: dict[str, SkepError], *ids: str) -> None:
        self._refused = refused
        self._specs = {id: {**a_spec("i1"), "Name": id} for id in ids}
        self.moved: list[str] = []

    async def get(self, path: str, *, timeout_s: float) -> Any:
        found = [
            {"ID": id, "Spec": spec, "Version": {"Index": 1}}
            for id, spec in self._specs.items()
            if path in ("/services", f"/services/{id}")
        ]
        if path == "/services":
            return found
        if not found:
            raise NotFound(path)
        return found[0]

    async def request(self, method: str, path: str, *, body: Any, **_: Any) -> None:
        id = path.split("/")[2]
        if id in self._refused:
            if isinstance(self._refused[id], NotFound) and id == "removed":
                del self._specs[id]
            raise self._refused[id]
        self._specs[id] = body
        self.moved.append(id)


async def test_a_service_that_cannot_be_updated_is_named_and_the_others_are_updated() -> None:
    refused = {
        "broken": InvalidArgument("no such mount"),
        "without-network": NotFound("network gone"),
        "removed": NotFound("service removed"),
    }
    services = _Services(refused, "broken", "removed", "without-network", "whole")
    rotation = _Rotation(SECRET, services)  # type: ignore[arg-type]
    using = await rotation.move({"i1": "password"}, an_object("i2", "key-v2", "key"))
    assert using == services.moved == ["whole"]
    assert rotation.problems == ["broken: no such mount", "without-network: network gone"]


class _Flaky(_Services):
    """Between two leaders for the next ``outage`` requests."""

    outage = 0

    async def get(self, path: str, *, timeout_s: float, **query: Any) -> Any:
        if self.outage:
            self.outage -= 1
            raise Unavailable("The swarm does not have a leader.")
        return (
            [a_task("i3"), a_task("i3")] if path == "/tasks" else await super().get(path, timeout_s=timeout_s)
        )


@on_virtual_time
async def test_a_rotation_is_waited_for_over_a_change_of_leader(capsys: pytest.CaptureFixture[str]) -> None:
    services = _Flaky({}, "web")
    rotation = _Rotation(SECRET, services)  # type: ignore[arg-type]
    new = an_object("i3", "key-v3")
    ids = await rotation.move({"i1": "password"}, new)
    services.outage = 3
    await rotation.wait(ids, new)
    assert rotation.problems == []
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        "no response, trying again: The swarm does not have a leader.",
        "web: 2 of 2 tasks have key-v3",
    ]


class _Late(_Services):
    """Nothing runs yet, a service is stuck, and the command's deadline is reached behind the first look at each."""

    def __init__(self, refused: dict[str, SkepError], *ids: str) -> None:
        super().__init__(refused, *ids)
        self._looks = 0

    @asynccontextmanager
    async def client(self) -> AsyncIterator["_Late"]:
        yield self

    async def get(self, path: str, *, timeout_s: float, **query: Any) -> Any:
        if path == "/secrets":
            return [an_object("i1", "key"), an_object("i2", "key-v2", "key")]
        if path == "/tasks":
            self._looks += 1
            return [a_task("i2", "preparing") | {"ID": "t2"}, a_task("i1") | {"ID": "t1"}]
        if self._looks == 4:  # one at what is stuck, three at what is not complete
            raise TimeoutError
        found = await super().get(path, timeout_s=timeout_s)
        return found | {"UpdateStatus": {"State": "paused"}} if path == "/services/stuck" else found


@on_virtual_time
async def test_what_is_not_done_in_time_is_named_with_what_is_stuck_or_could_not_be_updated() -> None:
    host: Any = _Late({"broken": InvalidArgument("no such mount")}, "broken", "stuck", "web")
    waited = "web: 0 of 2 tasks have key-v2. Run skep explain web."
    problems = "broken: no such mount. stuck: paused. Run skep explain stuck."
    text = re.escape(f"not done within 9 s: {waited} {problems}")
    with pytest.raises(Unavailable, match=f"^{text}$"):
        await _rotate(host, SECRET, "key", None, 9)


async def test_a_version_that_every_service_refuses_is_removed_again(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    manager, host = cluster
    pair = b"".join(server_certificate(Authority.create(name="own"), "app.example.com"))
    async with host.client() as client:
        spec = {"Name": "tls", "Labels": {}, "Data": base64.b64encode(pair).decode()}
        await client.post("/secrets/create", spec, timeout_s=10)
    labels = {"skep.http": "app.example.com", "skep.http.tls": "tls"}
    key = await make(host, "key")
    await serve(host, "web", key, "key", {"Replicated": {"Replicas": 1}}, **labels)
    with pytest.raises(Unavailable, match=r"web: .*tls-v2"):
        await _rotate(host, SECRET, "tls", b"not a certificate", 9)
    assert capsys.readouterr().err.endswith("tls-v2 removed again, because no service uses it\n")
    assert sorted(one.spec.name for one in manager.store.view().find(Secret)) == ["key", "tls"]


class _Failing(_Late):
    """The tasks with the new version fail again and again, or are not started again."""

    def __init__(self, *, is_given_up: bool) -> None:
        super().__init__({}, "web")
        self._is_given_up = is_given_up

    async def get(self, path: str, *, timeout_s: float, **query: Any) -> Any:
        failed = a_task("i2", "failed") | {"ID": "t5", "Slot": 1, "DesiredState": "shutdown"}
        if path == "/tasks" and "desired-state" not in query["filters"]:
            return [failed | {"Status": {"State": "failed", "Err": "task: non-zero exit (3)"}}]
        if path == "/skep/services/web/explain":
            count = 1 if self._is_given_up else 5
            problem = {
                "Kind": "exit",
                "Failures": count,
                "TaskID": "t5",
                "IsGivenUp": self._is_given_up,
            }
            return {"Reason": 'exit 3, last line "no such key"', "Problem": problem}
        self._looks = 0
        return await super().get(path, timeout_s=timeout_s, **query)


@pytest.mark.parametrize(
    ("is_given_up", "why"),
    [(True, "not restarted, by its restart policy"), (False, "5 failures in a row")],
)
@on_virtual_time
async def test_a_rotation_whose_tasks_cannot_run_ends_with_the_reason(is_given_up: bool, why: str) -> None:
    host: Any = _Failing(is_given_up=is_given_up)
    with pytest.raises(Unavailable) as ended:
        await _rotate(host, SECRET, "key", None, 9)
    reason = f'{why}: exit 3, last line "no such key". Run skep explain web.'
    assert str(ended.value) == f"web: 0 of 2 tasks run: {reason}"


class _Once(_Services):
    """A one-shot service that ends with the new version, or is removed between two requests of a look."""

    def __init__(self, *, is_removed: bool) -> None:
        super().__init__({}, "web")
        self._is_removed = is_removed
        policy = {"RestartPolicy": {"Condition": "none"}}
        self._specs["web"]["TaskTemplate"] |= policy
        self._specs["web"]["Mode"] = {"Replicated": {"Replicas": 1}}

    async def get(self, path: str, *, timeout_s: float, **query: Any) -> Any:
        if path != "/tasks":
            return await super().get(path, timeout_s=timeout_s)
        if "desired-state" in query["filters"]:
            if self._is_removed:
                self._specs.clear()
            return []
        ended = a_task("i2", "complete") | {"ID": "t1", "Slot": 1, "DesiredState": "shutdown"}
        ended["Spec"]["RestartPolicy"] = {"Condition": "none"}
        return [ended]


@pytest.mark.parametrize("is_removed", [False, True])
@on_virtual_time
async def test_a_rotation_ends_with_a_service_whose_tasks_ended_or_that_was_removed(is_removed: bool) -> None:
    rotation = _Rotation(SECRET, _Once(is_removed=is_removed))  # type: ignore[arg-type]
    new = an_object("i2", "key-v2")
    ids = await rotation.move({"i1": "password"}, new)
    async with asyncio.timeout(9.0):
        await rotation.wait(ids, new)
    assert rotation.problems == []


class _Blinking(_Failing):
    """The tasks run for a moment between two failures."""

    def __init__(self) -> None:
        super().__init__(is_given_up=False)
        self._failures = 0
        self._runs = False

    async def get(self, path: str, *, timeout_s: float, **query: Any) -> Any:
        if path == "/tasks" and "desired-state" in query["filters"]:
            self._runs = not self._runs
            if not self._runs:
                return [a_task("i2"), a_task("i2")]
            self._failures += 1
        found = await super().get(path, timeout_s=timeout_s, **query)
        if path == "/skep/services/web/explain":
            return found | {"Problem": found["Problem"] | {"Failures": self._failures}}
        return found


@on_virtual_time
async def test_tasks_that_run_for_a_moment_between_failures_have_no_new_version() -> None:
    host: Any = _Blinking()
    with pytest.raises(Unavailable, match="web: 0 of 2 tasks run: 5 failures in a row: exit 3"):
        await _rotate(host, SECRET, "key", None, 9)


async def make(host: Any, name: str, **labels: str) -> str:
    """A secret by the API; gives its id."""
    async with host.client() as client:
        spec = {"Name": name, "Labels": labels, "Data": base64.b64encode(b"one").decode()}
        return str((await client.post("/secrets/create", spec, timeout_s=10))["ID"])


async def serve(
    host: Any, name: str, secret: str, secret_name: str, mode: dict[str, Any], **labels: str
) -> str:
    """A service with the secret as the file ``password``; gives its id."""
    file = {"Name": "password", "UID": "0", "GID": "0", "Mode": 0o444}
    reference = {"SecretID": secret, "SecretName": secret_name, "File": file}
    spec = {
        "Name": name,
        "Labels": labels,
        "Mode": mode,
        "TaskTemplate": {"ContainerSpec": {"Image": "app", "Secrets": [reference]}},
    }
    async with host.client() as client:
        return str((await client.post("/services/create", spec, timeout_s=10))["ID"])


def secrets_of(manager: ManagerApi, service: str) -> list[tuple[str, str]]:
    """The names of a service's secrets, and of their files."""
    container = manager.store.view().get(Service, service).spec.task_template.container_spec
    assert container is not None
    return [(one.secret_name, one.file.name) for one in container.secrets if one.file is not None]


async def test_a_next_version_has_the_labels_and_moves_every_service_but_jobs_that_would_run_again(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    manager, host = cluster
    key, other = await make(host, "key", team="red"), await make(host, "other")
    replicated = {"Replicated": {"Replicas": 1}}
    web = await serve(host, "web", key, "key", replicated)
    agent = await serve(host, "agent", key, "key", {"Global": {}})
    bystander = await serve(host, "bystander", other, "other", replicated)
    job = await serve(host, "job", key, "key", {"ReplicatedJob": {"TotalCompletions": 1}})
    async with host.client() as client:
        rotation = _Rotation(SECRET, client)
        new, old = await rotation.next_version("key", b"two")
        using = await rotation.move(old, new)
        assert set(using) == {web, agent}
        (problem,) = rotation.problems
        assert problem.startswith("job: this job is not complete")
        made = manager.store.view().get(Secret, new["ID"])
        assert (made.spec.name, dict(made.spec.labels)) == ("key-v2", {"team": "red", ROTATION_OF: "key"})
        assert secrets_of(manager, web) == secrets_of(manager, agent) == [("key-v2", "password")]
        assert secrets_of(manager, bystander) == [("other", "password")]
        assert secrets_of(manager, job) == [("key", "password")]
        said = capsys.readouterr().err.splitlines()
        assert said == ["key-v2 created"]
        # Without content: the latest version there is, whichever of them is named.
        later, _ = await rotation.next_version("key-v2", b"three")
        for name in ("key", "key-v2", "key-v3"):
            latest, before = await rotation.next_version(name, None)
            assert (latest["ID"], set(before)) == (later["ID"], {key, new["ID"]})


async def test_the_labels_of_a_next_version_are_the_first_ones_whatever_a_later_version_says(
    cluster: tuple[ManagerApi, Any],
) -> None:
    manager, host = cluster
    await make(host, "key", team="red")
    await make(host, "key-v2", **{ROTATION_OF: "key", "team": "blue"})
    async with host.client() as client:
        new, _ = await _Rotation(SECRET, client).next_version("key", b"three")
    made = manager.store.view().get(Secret, new["ID"])
    assert (made.spec.name, dict(made.spec.labels)) == ("key-v3", {"team": "red", ROTATION_OF: "key"})


async def test_a_job_with_a_schedule_is_moved_and_its_present_run_goes_on(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    manager, host = cluster
    await manager.store.update(lambda tx: tx.raise_level(SCHEDULES))
    key = await make(host, "key")
    job = await serve(host, "nightly", key, "key", {"ReplicatedJob": {}}, **{CRON: "0 3 * * *"})
    before = manager.store.view().get(Service, job).job_status
    assert await _rotate(host, SECRET, "key", b"two", 9) == "key-v2"
    assert secrets_of(manager, job) == [("key-v2", "password")]
    after = manager.store.view().get(Service, job).job_status
    assert before is not None
    assert after is not None
    assert after.job_iteration == before.job_iteration, "no run was started"
    assert "nightly: its next run has key-v2" in capsys.readouterr().err


async def test_a_config_is_not_rotated_as_a_secret_and_leads_to_the_command_for_configs(
    cluster: tuple[ManagerApi, Any],
) -> None:
    _, host = cluster
    await make(host, "key")
    async with host.client() as client:
        body = {"Name": "site.conf", "Data": "b25l"}
        await client.post("/configs/create", body, timeout_s=10)
        with pytest.raises(NotFound, match=r"site\.conf is a config\. Run skep config rotate site\.conf"):
            await _Rotation(SECRET, client).next_version("site.conf", b"two")
        with pytest.raises(NotFound, match=r"key is a secret\. Run skep secret rotate key"):
            await _Rotation(CONFIG, client).next_version("key", b"two")
        with pytest.raises(NotFound, match="site does not exist"):
            await _Rotation(SECRET, client).next_version("site", b"two")


async def test_a_rotation_names_the_file_of_a_stack_that_would_undo_it(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, host = cluster
    key, mode = await make(host, "key"), {"Global": {}}
    await serve(host, "shop_web", key, "key", mode, **{STACK_LABEL: "shop"})
    await serve(host, "plain", key, "key", mode)
    async with host.client() as client:
        rotation = _Rotation(SECRET, client)
        new, old = await rotation.next_version("key", b"two")
        await rotation.move(old, new)
    said = "shop_web: name key-v2 in the file of stack shop, whose next deploy otherwise returns to key"
    assert capsys.readouterr().err.splitlines() == ["key-v2 created", said]


async def test_a_completed_job_keeps_its_version_without_a_problem(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    manager, host = cluster
    key = await make(host, "key")
    job = await serve(host, "migrate", key, "key", {"ReplicatedJob": {"TotalCompletions": 1}})
    service = manager.store.view().get(Service, job)
    assert service.job_status is not None
    done = replace(
        builders.a_task("t1", service=service, desired=TaskState.COMPLETE),
        status=TaskStatus(state=TaskState.COMPLETE),
        job_iteration=service.job_status.job_iteration,
    )
    await manager.store.update(put, done)
    assert await _rotate(host, SECRET, "key", b"two", 9) == "key-v2"
    assert secrets_of(manager, job) == [("key", "password")]
    assert "migrate: completed job, keeps the previous secret" in capsys.readouterr().err


async def test_prune_removes_superseded_versions_and_with_all_whatever_is_unused(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    manager, host = cluster
    await make(host, "key")
    second = await make(host, "key-v2", **{ROTATION_OF: "key"})
    await make(host, "spare")
    await serve(host, "web", second, "key-v2", {"Replicated": {"Replicas": 1}})
    await _prune(host, SECRET, all=False)
    assert capsys.readouterr().out == "key\n"
    await _prune(host, SECRET, all=True)
    assert capsys.readouterr().out == "spare\n"
    assert [one.spec.name for one in manager.store.view().find(Secret)] == ["key-v2"]
