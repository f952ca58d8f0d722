"""The requests of a deploy: many services in one, and each by its own where that fails."""

import json
from typing import Any

import pytest

from skep.api.client.client import ApiClient
from skep.api.errors import Untranslated
from skep.errors import AlreadyExists, InvalidArgument, NotFound, PermissionDenied, SkepError, Unavailable
from skep.model.values.encoding import to_json
from skep.stack.cluster_state import check, with_placements
from skep.stack.compose.document import FileProblems
from skep.stack.deploying import Deployment
from skep.stack.planning import Existing, plan_of
from tests.unit.stack.test_planning import a_stack, deployed

TEXT = "services: {a: {image: a, depends_on: [b]}, b: {image: b}, c: {image: c}}"


class Cluster(ApiClient):
    """Notes requests.  ``batch``: its answer, by names, to many changes at once; None: it knows no such request."""

    def __init__(self, batch: dict[str, str] | None, refused: tuple[str, ...] = ()) -> None:
        super().__init__("http://nowhere")
        self._batch = batch
        self._refused = refused
        self.asked: list[str] = []
        self.is_cut_off = False
        """What is asked for together is done, and nobody is told."""
        self.services: dict[str, Any] = {}
        self.logins: dict[str, str] = {}
        self.placement: SkepError = NotFound("page not found")
        self.written: list[Any] = []
        """The bodies of other requests."""
        self.updated: dict[str, Any] = {}
        """The bodies of updates of secrets and configs."""
        self.refusal = ""
        """Of these, as an error of the type ``refuses``."""
        self.refuses: type[SkepError] = InvalidArgument

    async def request(self, method: str, path: str, **options: Any) -> Any:
        body = json.loads(json.dumps(options.get("body"), default=lambda raw: json.loads(bytes(raw))))
        match method, path:
            case "POST", "/skep/services/changes":
                if self.is_cut_off:
                    self.services = {one["Spec"]["Name"]: one["Spec"] for one in body}
                    raise Unavailable("no response within 30 s")
                if self._batch is None:
                    raise NotFound("page not found")
                self.asked.append("+".join(one["Spec"]["Name"] for one in body))
                self.logins |= {one["Spec"]["Name"]: one["RegistryAuth"] for one in body}
                return [{"Error": self._batch.get(one["Spec"]["Name"], "")} for one in body]
            case "POST", "/services/create":
                self.asked.append(body["Name"])
                if body["Name"] in self._refused or body["Name"] in self.services:
                    raise AlreadyExists(f"service {body['Name']} already exists")
                return {"ID": "x"}
            case "POST", "/skep/services/placement":
                raise self.placement
            case "GET", _ if path.startswith("/services/"):
                name = path.rpartition("/")[2]
                spec = self.services.get(name) or {
                    "Name": name,
                    "Labels": {"com.docker.stack.namespace": "shop"},
                    "TaskTemplate": {"ForceUpdate": 3},
                }
                return {"ID": "i", "Version": {"Index": 7}, "Spec": spec}
            case "GET", _ if path.startswith(("/secrets/", "/configs/")):
                name = path.rpartition("/")[2]
                return {
                    "ID": name,
                    "Version": {"Index": 7},
                    "Spec": {"Name": name, "Labels": {"of": "others"}},
                }
            case "POST", _ if path.startswith(("/secrets/", "/configs/")) and path.endswith("/update"):
                if self.refusal:
                    raise self.refuses(self.refusal)
                self.updated[path] = body
            case "POST", _:
                self.written.append(body)
                self.asked.append(f"{path} {body.get('TaskTemplate', {}).get('ForceUpdate', '')}".strip())
        return []


async def deploy(cluster: Cluster, existing: Existing, **logins: str) -> list[str]:
    stack, shown = a_stack(TEXT), []
    plan = plan_of(stack, existing, images={}, prune=False)
    await Deployment(cluster, stack, plan, lambda *words: shown.append(" ".join(words)), logins).apply(None)
    return [one for one in shown if "network" not in one]


async def test_services_are_asked_for_together_after_what_they_depend_on() -> None:
    cluster = Cluster({})
    shown = await deploy(cluster, Existing(), a="secret")
    assert cluster.asked == ["/networks/create", "shop_b+shop_c", "shop_a"]
    assert shown == ["shop_b created", "shop_c created", "shop_a created"]
    assert cluster.logins == {"shop_a": "secret", "shop_b": "", "shop_c": ""}


async def test_what_fails_together_is_asked_for_alone() -> None:
    cluster = Cluster({"shop_c": "name conflicts with an existing object"}, refused=("shop_c",))
    shown = await deploy(cluster, Existing())
    assert cluster.asked == ["/networks/create", "shop_b+shop_c", "shop_c", "/services/i/update 3", "shop_a"]
    assert "shop_c updated" in shown


async def test_a_service_that_appeared_since_the_plan_keeps_the_autoscalers_number() -> None:
    stack = a_stack("services: {a: {image: a, deploy: {replicas: 2, labels: {skep.autoscale: 2..20}}}}")
    wanted = json.loads(to_json(stack.services["a"].spec))
    cluster = Cluster(None)
    image = {"TaskTemplate": {"ContainerSpec": {"Image": "former"}}}
    cluster.services = {"shop_a": wanted | image | {"Mode": {"Replicated": {"Replicas": 10}}}}
    plan = plan_of(stack, Existing(), images={}, prune=False)
    await Deployment(cluster, stack, plan, lambda *_: None).apply(None)
    assert cluster.asked[-1].startswith("/services/i/update")
    assert cluster.written[-1]["TaskTemplate"]["ContainerSpec"]["Image"] == "a:latest"
    assert cluster.written[-1]["Mode"]["Replicated"]["Replicas"] == 10


async def test_what_was_done_without_a_response_is_not_done_again() -> None:
    cluster = Cluster({})
    cluster.is_cut_off = True
    shown = await deploy(cluster, Existing())
    assert cluster.asked == ["/networks/create", "shop_b", "shop_c", "shop_a"]
    assert "shop_a updated" in shown


async def test_a_cluster_without_the_request_is_asked_for_each() -> None:
    cluster = Cluster(None)
    await deploy(cluster, Existing())
    assert cluster.asked == ["/networks/create", "shop_b", "shop_c", "shop_a"]


async def test_a_cluster_that_cannot_say_where_services_would_run_is_no_error() -> None:
    plan = plan_of(a_stack(TEXT), Existing(), images={}, prune=False)
    warnings: list[str] = []
    assert await with_placements(Cluster({}), plan, warnings.append) == plan
    assert warnings == []
    cluster = Cluster({})
    cluster.placement = Unavailable("too busy")
    assert await with_placements(cluster, plan, warnings.append) == plan
    assert warnings == ["the placement of the services is unknown: too busy"]


FILES = """
services: {a: {image: a, secrets: [named, versioned], configs: [conf]}}
secrets: {named: {name: pw, file: f}, versioned: {file: g}}
configs: {conf: {name: conf, content: x}}
"""


async def deploy_files(
    cluster: Cluster, existing: Existing, text: str = FILES, named: bytes = b"one"
) -> list[str]:
    stack, shown = a_stack(text, named=named, versioned=b"v"), []
    plan = plan_of(stack, existing, images={}, prune=False)
    await Deployment(cluster, stack, plan, lambda *words: shown.append(" ".join(words))).apply(None)
    return shown


async def test_the_cluster_compares_the_content_of_a_secret_with_a_name_of_its_own() -> None:
    cluster, existing = Cluster({}), deployed(a_stack(FILES, named=b"one", versioned=b"v"))
    assert await deploy_files(cluster, existing) == []
    assert list(cluster.updated) == ["/secrets/pw/update"]
    assert cluster.updated["/secrets/pw/update"]["Data"] == "b25l"
    assert cluster.updated["/secrets/pw/update"]["Labels"] == {"of": "others"}, "nothing of it is changed"


async def test_a_secret_that_its_client_may_not_change_is_used_without_a_comparison() -> None:
    cluster, existing = Cluster({}), deployed(a_stack(FILES, named=b"one", versioned=b"v"))
    cluster.refusal, cluster.refuses = "ann may not POST /secrets/pw/update", PermissionDenied
    assert await deploy_files(cluster, existing) == []
    with pytest.raises(PermissionDenied):
        await deploy_files(cluster, existing, FILES.replace("file: f", "file: f, labels: {a: b}"))


async def test_labels_of_files_are_updated() -> None:
    cluster, existing = Cluster({}), deployed(a_stack(FILES, named=b"one", versioned=b"v"))
    text = FILES.replace("name: conf", "name: conf, labels: {a: b}")
    assert await deploy_files(cluster, existing, text) == ["conf config updated"]
    assert cluster.updated["/configs/conf/update"]["Labels"]["a"] == "b"


async def test_other_content_of_a_secret_with_a_name_of_its_own_is_refused_before_anything_is_done() -> None:
    cluster, existing = Cluster({}), deployed(a_stack(FILES, named=b"one", versioned=b"v"))
    cluster.refusal = "rpc error: code = InvalidArgument desc = only updates to Labels are allowed"
    with pytest.raises(FileProblems) as caught:
        await deploy_files(cluster, existing, FILES.replace("image: a", "image: b"), b"two")
    assert str(caught.value) == (
        "f:3:18: secrets.pw: the secret exists with other content, which cannot be changed: leave out its name, "
        "and each content has a name of its own"
    )
    assert cluster.asked == []
    cluster.refusal = "a label is too long"
    with pytest.raises(InvalidArgument, match="a label is too long"):
        await deploy_files(cluster, existing)


async def test_nothing_is_asked_for_when_nothing_changes() -> None:
    cluster = Cluster({})
    assert await deploy(cluster, deployed(a_stack(TEXT))) == []
    assert cluster.asked == []


async def test_a_plan_that_the_managers_are_too_busy_to_check_is_a_warning() -> None:
    class Busy(Cluster):
        async def request(self, method: str, path: str, **options: Any) -> Any:
            assert path == "/skep/stacks/check"
            raise Untranslated("2 deploys are checked by this manager and 128 wait: try again later")

    stack, warnings = a_stack(TEXT), list[str]()
    await check(Busy({}), stack, plan_of(stack, Existing(), images={}, prune=False), warnings.append)
    assert warnings[0].startswith("the managers did not check the plan: 2 deploys are checked")
