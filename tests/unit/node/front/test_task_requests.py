"""Which requests about a container the manager has, for users below administrator."""

import pytest
from aiohttp import web

from skep.api.access.permissions import rule_for, sees
from skep.api.http.framing import read_head, with_target
from skep.errors import NotFound, PermissionDenied
from skep.manager.routes.reach import routes
from skep.model.permissions.access import Identity, Origin, Role, parse_binding
from skep.node.front.task_requests import TaskContainer, as_task_request


class Containers:
    """A task's container, with an exec; a plain container, and one that claims to be an odd task's."""

    has_docker_engine = False

    def container_of(self, identity: Identity, word: str) -> TaskContainer:
        known = {
            "c1": TaskContainer("t1", "shop"),
            "our name": TaskContainer("t1", "shop"),
            "odd": TaskContainer("t1/../../services", "shop"),
            "plain": TaskContainer(),
        }
        found = known.get(word)
        if found is None or not sees(identity, found.stack):
            raise NotFound(f"No such container: {word}")
        return found

    def container_of_exec(self, identity: Identity, id: str) -> TaskContainer:
        if id != "e1" or not sees(identity, "shop"):
            raise NotFound(f"No such exec instance: {id}")
        return TaskContainer("t1", "shop")


class WithEngine(Containers):
    has_docker_engine = True


def asked(role: str, request: str, containers: Containers | None = None) -> str:
    identity = Identity(name="bob", origin=Origin.TOKEN, bindings=(parse_binding(role),))
    method, target = request.split(" ", 1)
    return as_task_request(identity, method, target, containers or Containers())


@pytest.mark.parametrize("role", ["operator:shop", "operator", "viewer"])
@pytest.mark.parametrize(
    ("request_line", "target"),
    [
        ("POST /v1.41/containers/c1/exec", "/v1.41/skep/tasks/t1/container/exec"),
        ("POST /containers/our%20name/exec", "/skep/tasks/t1/container/exec"),
        ("POST /v1.41/exec/e1/start", "/v1.41/skep/tasks/t1/exec/e1/start"),
        ("POST /v1.41/exec/e1/resize?h=1&w=2", "/v1.41/skep/tasks/t1/exec/e1/resize?h=1&w=2"),
        ("POST /containers/c1/attach?stream=1", "/skep/tasks/t1/container/attach?stream=1"),
        ("POST /containers/c1/wait?condition=next-exit", "/skep/tasks/t1/container/wait?condition=next-exit"),
        ("POST /containers/c1/resize?h=1&w=2", "/skep/tasks/t1/container/resize?h=1&w=2"),
        ("POST /containers/c1/kill?signal=HUP", "/skep/tasks/t1/container/kill?signal=HUP"),
        ("GET /containers/c1/archive?path=/etc", "/skep/tasks/t1/container/archive?path=/etc"),
        ("HEAD /containers/c1/archive?path=/etc", "/skep/tasks/t1/container/archive?path=/etc"),
        ("PUT /containers/c1/archive?path=/tmp", "/skep/tasks/t1/container/archive?path=/tmp"),
    ],
)
def test_what_docker_does_in_a_tasks_container_is_the_managers(
    role: str, request_line: str, target: str
) -> None:
    """Whoever asks: the manager knows the service, and checks the role."""
    assert asked(role, request_line) == target


def test_the_manager_has_a_route_and_a_role_for_each() -> None:
    paths = {(route.method, route.path) for route in routes if isinstance(route, web.RouteDef)}
    for method, what in (("POST", "exec"), ("POST", "kill"), ("POST", "attach"), ("PUT", "archive")):
        path = f"/skep/tasks/{{id}}/container/{what}"
        assert (method, path) in paths
        assert rule_for(method, path).role is Role.OPERATOR


def test_the_exit_code_of_a_command_is_read_by_whoever_may_read_it_here() -> None:
    assert asked("operator:shop", "GET /exec/e1/json") == "/skep/tasks/t1/exec/e1/json"
    assert asked("viewer", "GET /exec/e1/json") == ""


@pytest.mark.parametrize(
    "request_line",
    [
        "GET /containers/c1/json",
        "GET /containers/c1/logs?stdout=1",
        "GET /containers/c1/top",
        "GET /containers/json",
        "POST /containers/odd/exec",
        "POST /containers/c1/rename?name=x",
        "POST /services/create",
        "POST /containers/c1/exec/more",
    ],
)
def test_other_requests_stay_where_they_are(request_line: str) -> None:
    assert asked("operator:shop", request_line) == ""


@pytest.mark.parametrize(
    "request_line", ["POST /v1.41/containers/c1/exec", "POST /containers/c1/stop", "DELETE /containers/c1"]
)
def test_an_administrator_is_served_by_the_node(request_line: str) -> None:
    assert asked("admin", request_line) == ""


@pytest.mark.parametrize(
    "request_line",
    [
        *(
            f"POST /v1.41/containers/c1/{what}?t=1"
            for what in ("stop", "start", "restart", "pause", "unpause")
        ),
        "DELETE /v1.41/containers/c1?force=1",
    ],
)
def test_what_the_cluster_does_is_refused_with_the_command_that_does_it(request_line: str) -> None:
    with pytest.raises(PermissionDenied, match="docker service update --force SERVICE"):
        asked("operator:shop", request_line)


@pytest.mark.parametrize("role", ["operator:blog", "viewer:blog"])
@pytest.mark.parametrize(
    "request_line",
    [
        "POST /containers/{}/exec",
        "POST /containers/{}/attach?stream=1",
        "POST /containers/{}/kill",
        "GET /containers/{}/archive?path=/",
        "POST /containers/{}/stop",
        "DELETE /containers/{}",
    ],
)
def test_a_container_of_another_stack_is_answered_as_a_missing_one(role: str, request_line: str) -> None:
    """A prefix of an id would otherwise be found letter by letter."""
    for word in ("c1", "plain", "missing"):
        with pytest.raises(NotFound, match=f"^No such container: {word}$"):
            asked(role, request_line.format(word))


def test_an_exec_in_a_container_of_another_stack_is_answered_as_a_missing_one() -> None:
    for id in ("e1", "e2"):
        with pytest.raises(NotFound, match=f"^No such exec instance: {id}$"):
            asked("operator:blog", f"POST /exec/{id}/start")


@pytest.mark.parametrize("role", ["viewer:shop", "viewer"])
@pytest.mark.parametrize("request_line", ["POST /containers/c1/stop", "DELETE /containers/c1"])
def test_a_viewer_gets_the_refusal_of_the_node_for_a_container_that_it_sees(
    role: str, request_line: str
) -> None:
    assert asked(role, request_line) == ""


def test_a_role_in_the_cluster_sees_plain_containers_and_those_of_an_engine() -> None:
    assert asked("operator", "POST /containers/plain/exec") == "", "the node says who may"
    with pytest.raises(NotFound):
        asked("operator", "POST /containers/missing/exec")
    assert asked("operator", "POST /containers/missing/exec", WithEngine()) == "", "it may be the engine's"
    with pytest.raises(NotFound):
        asked("operator:shop", "POST /containers/missing/exec", WithEngine())


def test_an_operator_of_all_stacks_is_told_the_command() -> None:
    with pytest.raises(PermissionDenied, match="docker service update --force SERVICE"):
        asked("operator", "POST /containers/c1/stop")


def test_a_head_gets_another_target_and_nothing_else() -> None:
    raw = b"POST /v1.41/containers/c1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
    changed = with_target(raw, "/skep/tasks/t1/container/exec")
    assert changed == b"POST /skep/tasks/t1/container/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
    assert read_head(changed).target == "/skep/tasks/t1/container/exec"
