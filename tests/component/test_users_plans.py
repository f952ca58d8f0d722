"""Plans of deploys by users below administrator: what a manager spends on them, and what it tells of other stacks."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from skep.model.network import Network, NetworkSpec
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Service
from skep.model.values.ids import ConfigId, NetworkId, SecretId, ServiceId, VolumeId
from skep.model.values.stacks import STACK_LABEL
from skep.model.volume import Volume, VolumeSpec
from skep.store.kinds import Payload
from tests.component.test_users_on_a_manager import OPERATOR, SHOP, Rig, a_spec, labeled, rig
from tests.support.builders import a_service
from tests.support.managers.wire_rig import until
from tests.support.store.store_transactions import put

__all__ = ("rig",)


async def test_a_plan_of_an_operator_stops_no_other_request(rig: Rig) -> None:
    for number in range(1_500):
        spec = ConfigSpec(name=f"blog_{number}", labels={STACK_LABEL: "blog"}, data=b"x")
        await rig.api.store.update(put, Config(id=ConfigId(f"c{number}"), spec=spec))
    scans: Counter[str] = Counter()
    table = rig.api.store.view().table_by_type[Config]  # type: ignore[attr-defined]
    found_ids = table.found_ids

    def counted(by: Mapping[str, str]) -> Any:
        scans["all" if not by else "by " + next(iter(by))] += 1
        return found_ids(by)

    table.found_ids = counted
    planned = [{"Name": f"shop_{number}", "Labels": SHOP, "DataBytes": 3} for number in range(501)]
    for role in (OPERATOR, "operator:shop"):
        status, text, _ = await rig.exchange(role, "POST /skep/stacks/check", {"Configs": planned[:500]})
        assert (status, text.strip()) == (200, "[]")
        status, text, _ = await rig.exchange(role, "POST /skep/stacks/check", {"Configs": planned})
        assert (status, "only administrators may check more than 500" in text) == (500, True), text
    assert scans["all"] <= 2, "of the stacks' names, once a request"
    assert scans["by stack"] <= 2, scans
    assert (await rig.exchange("admin", "POST /skep/stacks/check", {"Configs": planned}))[0] == 200


async def test_a_plan_waits_for_a_slot_before_its_rights_are_computed(rig: Rig) -> None:
    body = {"Configs": [{"Name": "shop_c", "Labels": SHOP, "DataBytes": 3}]}
    async with rig.api.checks.hold(), rig.api.checks.hold():
        with pytest.raises(TimeoutError):
            # It has no right to this: but for the slot, the refusal would come at once.
            await asyncio.wait_for(rig.exchange("operator:blog", "POST /skep/stacks/check", body), 0.2)
    assert (await rig.exchange("operator:blog", "POST /skep/stacks/check", body))[0] == 403


async def test_one_user_has_one_of_the_places_and_administrators_have_all(rig: Rig) -> None:
    plans = rig.api.plans

    def asked(role: str) -> asyncio.Task[tuple[int, str, object]]:
        return asyncio.ensure_future(rig.exchange(role, "GET /skep/verify"))

    async with plans.hold(), plans.hold():
        one_users = [asked("viewer") for _ in range(4)]
        administrators = [asked("admin") for _ in range(4)]
        await until(lambda: plans.waiting == 5)
        (refused,), _ = await asyncio.wait(one_users, return_when=asyncio.FIRST_COMPLETED)
        status, text, _ = refused.result()
        assert (status, "3 of your requests wait" in text) == (500, True), (status, text)
        assert plans.waiting == 5, "one of the user and four of administrators"
    statuses = [(await one)[0] for one in (*one_users, *administrators)]
    assert sorted(statuses) == [200] * 7 + [500]


def using(kind: str, word: str) -> dict[str, Any]:
    """A service of the stack that refers to an object of ``kind``."""
    spec = a_spec()
    container = spec["TaskTemplate"]["ContainerSpec"]
    file = {"Name": "a", "UID": "0", "GID": "0", "Mode": 256}
    match kind:
        case "secret":
            container["Secrets"] = [{"SecretName": word, "File": file}]
        case "config":
            container["Configs"] = [{"ConfigName": word, "File": file}]
        case "network":
            spec["TaskTemplate"]["Networks"] = [{"Target": word}]
        case "volume":
            container["Mounts"] = [{"Type": "cluster", "Source": word, "Target": "/data"}]
        case _:
            spec["Labels"] = SHOP | {"skep.depends-on": f"{word}=service_started"}
    return spec


@pytest.mark.parametrize("kind", ["secret", "config", "network", "volume", "service"])
async def test_a_plan_does_not_tell_what_other_stacks_have(rig: Rig, kind: str) -> None:
    blog = {STACK_LABEL: "blog"}
    for one in (
        Secret(id=SecretId("s" * 25), spec=SecretSpec(name="blog_there", labels=blog)),
        Config(id=ConfigId("c" * 25), spec=ConfigSpec(name="blog_there", labels=blog)),
        Network(id=NetworkId("n" * 25), spec=NetworkSpec(name="blog_there", labels=blog)),
        Volume(id=VolumeId("v" * 25), spec=VolumeSpec(name="blog_there", labels=blog)),
        labeled(a_service("blog_there"), blog),
    ):
        await rig.api.store.update(put, one)
    words = ["blog_there", "blog_none"]
    if kind in ("network", "volume"):  # the managers also take ids
        words += [f"{kind[0] * 25}", f"{kind[0]}", "x" * 25]
    requests: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("POST /skep/stacks/check", lambda spec: {"Services": [{"Spec": spec}]}),
        ("POST /skep/services/placement", lambda spec: [spec]),
    ]
    for request, body_of in requests:
        for word in words:
            status, text, _ = await rig.exchange("operator:shop", request, body_of(using(kind, word)))
            assert (status, f"the {kind} {word} does not belong to the stack shop" in text) == (403, True), (
                text
            )
        if kind in ("secret", "config") and request.endswith("check"):
            status, text, _ = await rig.exchange(OPERATOR, request, body_of(using(kind, "blog_there")))
            assert status == 200, "a user of all stacks uses them"


async def test_a_plan_uses_what_it_creates_and_what_its_stack_has(rig: Rig) -> None:
    secret = Secret(id=SecretId("s" * 25), spec=SecretSpec(name="old_name", labels=SHOP))
    await rig.api.store.update(put, secret)
    await rig.api.store.update(put, Payload(id=f"secret/{secret.id}", data=b"x"))
    services = [using("secret", "old_name"), using("secret", "shop_new") | {"Name": "shop_db"}]
    body = {
        "Secrets": [{"Name": "shop_new", "Labels": SHOP, "DataBytes": 3}],
        "Services": [{"Spec": spec} for spec in services],
    }
    assert (await rig.exchange("operator:shop", "POST /skep/stacks/check", body))[:2] == (200, "[]\n")
    del body["Secrets"]
    status, text, _ = await rig.exchange("operator:shop", "POST /skep/stacks/check", body)
    assert (status, "shop_db" in text) == (200, True), (
        "a missing name of the stack itself is a problem of its service"
    )


async def test_an_id_of_a_service_of_another_stack_is_as_an_unknown_one(rig: Rig) -> None:
    theirs = labeled(replace(a_service("blog_web"), id=ServiceId("w" * 25)), {STACK_LABEL: "blog"})
    await rig.api.store.update(put, theirs)
    for id in (theirs.id, "x" * 25):
        for body in (
            {"Services": [{"Spec": a_spec()}], "Removed": [id]},
            {"Services": [{"Spec": a_spec(), "ID": id, "Version": 1}]},
        ):
            status, text, _ = await rig.exchange("operator:shop", "POST /skep/stacks/check", body)
            assert (status, "blog_web" in text, f"{id} does not belong to the stack" in text) == (
                403,
                False,
                True,
            ), text


async def test_a_revision_of_another_stack_tells_nothing_to_any_request(rig: Rig) -> None:
    labels = {STACK_LABEL: "blog", "skep.stack.revision": "7", "skep.stack.state": "interrupted"}
    revision = Config(id=ConfigId("r" * 25), spec=ConfigSpec(name="blog_r", labels=labels, data=b"x"))
    await rig.api.store.update(put, revision)
    await rig.api.store.update(put, labeled(replace(a_service("shop_old"), id=ServiceId("o" * 25)), SHOP))
    version = rig.api.store.view().get(Service, "o" * 25).version.index
    change = {"Spec": a_spec() | {"Name": "shop_old"}, "ID": "o" * 25, "Version": version}
    requests: list[tuple[str, Any]] = [
        ("POST /services/create", a_spec()),
        (f"POST /services/shop_old/update?version={version}", a_spec() | {"Name": "shop_old"}),
        ("POST /skep/services/changes", [{"Spec": a_spec()}, change]),
        ("DELETE /services/shop_old", None),
    ]
    for request, body in requests:
        _, text, _ = await rig.exchange("operator:shop", request, body, {"X-Skep-Revision": revision.id})
        assert "the revision of this deploy was removed: deploy the stack again" in text, request
        assert "interrupted" not in text


async def test_a_refused_port_names_the_service_that_has_it_to_users_who_see_it(rig: Rig) -> None:
    def published(name: str, stack: str) -> dict[str, Any]:
        ports = {"EndpointSpec": {"Ports": [{"TargetPort": 80, "PublishedPort": 8080}]}}
        return {**a_spec(), **ports, "Name": name, "Labels": {STACK_LABEL: stack}}

    wanted = published("shop_web", "shop")
    status, text, _ = await rig.exchange("operator", "POST /services/create", published("blog_web", "blog"))
    assert status == 201, text
    for role, may_see in (("operator:shop", False), (OPERATOR, True)):
        for request, body in (
            ("POST /services/create", wanted),
            ("POST /skep/services/changes", [{"Spec": wanted}]),
            ("POST /skep/stacks/check", {"Services": [{"Spec": wanted}]}),
        ):
            _, text, _ = await rig.exchange(role, request, body)
            assert "port '8080' is already in use by" in text, text
            assert ("blog_web" in text) is may_see, text
            assert ("a service of another stack" in text) is not may_see, text


async def test_nobody_measures_throughput_with_the_request_of_viewers(rig: Rig) -> None:
    for role in ("viewer", "admin"):
        status, text, _ = await rig.exchange(role, "GET /skep/doctor/network?throughput=1")
        assert status == 400
        assert "measure throughput with POST" in text
