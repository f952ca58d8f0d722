"""``skep stack`` as a command: what it waits for, says and leaves behind."""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from skep.errors import FailedPrecondition
from skep.model.network import Network
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.stack.claims import Replaced
from skep.stack.cluster_state import config_names, existing_of, known_revisions
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.document import parse
from skep.stack.compose.reading import ProblemReport
from skep.stack.planning import plan_of
from skep.stack.recording import carry_out
from skep.stack.revisions import KEPT
from skep.store.level import SCHEDULES
from skep.store.space import MemberSpace
from tests.support.clients.command_rig import FAILS, HANGS, Cluster, a_cluster

MIB = 2**20
SOON = "deploy: {update_config: {monitor: 1ms}, restart_policy: {delay: 10ms}}"
"""Keeps deploys from waiting for what these tests are not about."""
FILE = f"name: shop\nservices: {{web: {{image: busybox, {SOON}}}, db: {{image: %s, {SOON}}}}}\n"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with a_cluster(tmp_path) as made:
        yield made


async def a_waiting_deploy(cluster: Cluster) -> asyncio.subprocess.Process:
    """It has written everything, and waits for a task that will not run."""
    cluster.write(FILE % HANGS)
    process = await cluster.start("stack", "deploy", "--resolve-image", "never")
    assert process.stderr is not None
    while b"shop_db: 0 of 1 tasks run" not in await process.stderr.readline():
        assert process.returncode is None
    return process


async def test_an_interrupted_deploy_says_its_state_and_repeating_completes_it(cluster: Cluster) -> None:
    process = await a_waiting_deploy(cluster)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 1
    said = "interrupted: shop_db: 0 of 1 tasks run. Rerun the command to complete the deploy."
    assert said in err.decode().splitlines()
    _, listed, _ = await cluster.run("stack", "history", "--format", "{{.Revision}} {{.State}}", "shop")
    assert listed == "1 interrupted\n"

    cluster.write(FILE % "busybox")
    code, _, err_text = await cluster.deploy()
    assert code == 0, err_text
    _, listed, _ = await cluster.run("stack", "history", "--format", "{{.Revision}} {{.State}}", "shop")
    assert listed == "1 interrupted\n2 deployed\n"


async def test_repeating_a_deploy_that_was_killed_records_that_it_is_complete(cluster: Cluster) -> None:
    """Everything was written before it was killed: there is nothing left to change."""
    process = await a_waiting_deploy(cluster)
    process.kill()
    await process.communicate()
    history = ("stack", "history", "--format", "{{.Revision}} {{.State}}", "shop")
    assert (await cluster.run(*history))[1] == "1 deploying\n"

    code, _, err_text = await cluster.deploy("--detach")
    assert code == 0, err_text
    assert (await cluster.run(*history))[1] == "1 deployed\n"


async def test_a_deploy_waits_or_is_detached_and_names_what_does_not_run(cluster: Cluster) -> None:
    cluster.write(FILE % HANGS)
    code, _, err = await cluster.deploy("--timeout", "1")
    assert code == 1
    # The deadline may end before the node has received the task, or after it.
    said = r"Error: not done within 1 s: shop_db: 0 of 1 tasks run(: m1 has not received it yet)?\. "
    assert re.fullmatch(said + r"Run skep explain shop_db\.", err.splitlines()[-1]), err
    cluster.write(FILE.replace("web", "api") % HANGS)
    code, _, err = await cluster.deploy("--detach")
    assert (code, "shop_api created" in err.replace(":", ""), "tasks run" in err) == (0, True, False), err
    assert cluster.names() == ["shop_api", "shop_db", "shop_web"]
    code, _, err = await cluster.deploy("--detach", "--prune")
    assert (code, cluster.names()) == (0, ["shop_api", "shop_db"]), err
    code, _, err = await cluster.deploy("--rollback-on-failure", "--detach")
    assert (code, "cannot be used with --detach or --only" in err) == (2, True)


async def test_a_plan_ends_with_two_if_something_would_change_and_writes_nothing(cluster: Cluster) -> None:
    cluster.write(FILE % "busybox")
    code, out, _ = await cluster.run("stack", "plan", "--resolve-image", "never")
    assert (code, "+ service shop_db" in out, "1 task on m1" in out) == (2, True, True), out
    view = cluster.store.view()
    written = [one.spec.name for one in view.find(Network)] + [one.spec.name for one in view.find(Config)]
    assert [name for name in (*written, *cluster.names()) if name.startswith("shop")] == []
    code, _, err = await cluster.run("stack", "up", "--resolve-image", "never", "--timeout", "30")
    assert code == 0, err
    assert (await cluster.run("stack", "plan", "--resolve-image", "never"))[:2] == (
        0,
        "Stack shop is up to date.\n",
    )
    cluster.write("name: shop\nservices: {web: {image: [w]}}")
    assert (await cluster.run("stack", "plan"))[0] == 1
    code, _, err = await cluster.run("stack", "down", "shop")
    assert (code, cluster.names()) == (0, []), err


@pytest.mark.parametrize("wait_s", [30.0, None])
async def test_ten_revisions_are_kept_and_the_configs_that_only_older_ones_name_are_removed(
    cluster: Cluster, wait_s: float | None
) -> None:
    text = "services: {web: {image: busybox, configs: [c], secrets: [s], deploy: {update_config: {monitor: 1ms}}}}\n"
    text += "configs: {c: {content: v%d}}\nsecrets: {s: {file: f}}"

    def stack(number: int) -> Any:
        return stack_of(
            parse(text % number, "f"), "shop", {("secrets", "s"): b"%d" % number}, ProblemReport()
        )

    numbers = range(1, KEPT + 4)
    async with cluster.requests() as client:
        for number in numbers:
            made = stack(number)
            plan = plan_of(
                made, await existing_of(client, "shop", config_names(made)), images={}, prune=False
            )
            await carry_out(client, made, plan, lambda *_: None, wait_s, pytest.fail)
        assert [one.number for one in await known_revisions(client, "shop")] == list(numbers)[-KEPT:]
        kept = [stack(number) for number in list(numbers)[-KEPT:]]
        for path, section in (("/secrets", "secrets"), ("/configs", "configs")):
            found = {one["Spec"]["Name"] for one in await client.get(path)}
            wanted = {getattr(one, section)[section[0]].name for one in kept}
            assert {name for name in found if "_revision-" not in name} == wanted


async def test_a_job_with_a_schedule_is_deployed_at_once(cluster: Cluster) -> None:
    """Its first run may be a year away."""
    await cluster.store.update(lambda tx: tx.raise_level(SCHEDULES))
    job = "{image: busybox, deploy: {mode: replicated-job}, x-skep: {cron: '0 0 1 1 *'}}"
    cluster.write(f"name: shop\nservices: {{nightly: {job}}}")
    code, _, err = await cluster.deploy("--timeout", "30")
    assert (code, "shop_nightly: it has a schedule" in err) == (0, True), err


async def test_deploys_beside_each_other_have_revisions_of_their_own(cluster: Cluster) -> None:
    made = stack_of(parse(FILE % "busybox", "f"), "shop", {}, ProblemReport())
    async with cluster.requests() as one, cluster.requests() as other:
        plan = plan_of(made, await existing_of(one, "shop", config_names(made)), images={}, prune=False)
        both = (carry_out(client, made, plan, lambda *_: None, 30.0, pytest.fail) for client in (one, other))
        await asyncio.gather(*both)
        found = {revision.number: revision.state for revision in await known_revisions(one, "shop")}
    assert found == {1: "replaced by revision 2", 2: "deployed"}
    assert cluster.names() == ["shop_db", "shop_web"]


async def beside_each_other(
    cluster: Cluster, *texts: str, wait_s: float = 60.0
) -> list[BaseException | None]:
    """Deploy all these files at the same moment; give how each ended."""
    async with cluster.requests() as client:
        existing = await existing_of(client, "shop")

        async def deployed(text: str) -> None:
            made = stack_of(parse(text, "f"), "shop", {}, ProblemReport())
            plan = plan_of(made, existing, images={}, prune=False)
            async with cluster.requests() as own:
                await carry_out(own, made, plan, lambda *_: None, wait_s, pytest.fail)

        return await asyncio.gather(*map(deployed, texts), return_exceptions=True)


async def test_of_two_different_deploys_one_wins_whole_and_the_other_ends_with_its_revision(
    cluster: Cluster,
) -> None:
    colours = {"red": 5, "blue": 4}
    texts = [
        f"services: {{web: {{image: {colour}, environment: {{C: {colour}}},"
        f" deploy: {{replicas: {count}, update_config: {{monitor: 1ms}}}}}}}}"
        for colour, count in colours.items()
    ]
    ends = await beside_each_other(cluster, *texts)
    (lost,) = [one for one in ends if one is not None]
    assert str(lost).startswith("shop was changed meanwhile by another deploy (revision 2)")
    colour = "red" if ends[0] is None else "blue"
    (service,) = cluster.store.view().find(Service)
    container = service.spec.task_template.container_spec
    assert container is not None
    assert (container.image, container.env, service.spec.replicas) == (
        f"{colour}:latest",
        (f"C={colour}",),
        colours[colour],
    )
    _, listed, _ = await cluster.run("stack", "history", "--format", "{{.Revision}} {{.State}}", "shop")
    assert listed == "1 replaced by revision 2\n2 deployed\n"


async def test_a_hundred_deploys_at_once_leave_one_of_them_and_each_ends_in_order(cluster: Cluster) -> None:
    text = "services: {web: {image: busybox, environment: {N: '%d'}}}"
    ends = await beside_each_other(cluster, *(text % number for number in range(100)))
    assert {type(one) for one in ends} <= {type(None), Replaced}, [
        repr(one) for one in ends if not isinstance(one, Replaced | None)
    ]
    won = [number for number, one in enumerate(ends) if one is None]
    (service,) = cluster.store.view().find(Service)
    container = service.spec.task_template.container_spec
    assert container is not None
    assert container.env == (f"N={won[-1]}",) if len(won) == 1 else container.env[0][2:] in map(str, won)
    async with cluster.requests() as client:
        revisions = await known_revisions(client, "shop")
    assert [one.state for one in revisions if one.number == revisions[-1].number] == ["deployed"]
    assert not [one for one in revisions if one.state == "deploying"]


async def test_a_deploy_that_is_fixed_while_it_waits_ends_and_leaves_the_fix_alone(cluster: Cluster) -> None:
    process = await a_waiting_deploy(cluster)
    cluster.write(FILE % "busybox")
    code, _, err = await cluster.deploy()
    assert code == 0, err
    _, err_bytes = await process.communicate()
    assert process.returncode == 1
    assert "shop was changed meanwhile by another deploy (revision 2)" in err_bytes.decode()


@pytest.mark.parametrize("words", [(), ("--rollback-on-failure",)])
async def test_a_task_that_fails_again_and_again_ends_the_deploy_with_the_cause(
    cluster: Cluster, words: tuple[str, ...]
) -> None:
    restart = "restart_policy: {delay: 10ms}"
    cluster.write(
        f"name: shop\nservices: {{db: {{image: {FAILS}, deploy: {{{restart}}}}}, web: {{image: busybox}}}}"
    )
    code, _, err = await cluster.deploy("--max-failures", "3", *words)
    assert code == 1
    hint = r"\." if words else r"\. Run skep explain shop_db\."
    said = rf"shop_db: 0 of 1 tasks run: [3-5] failures in a row: exit 3{hint}$"
    assert re.search(said, err.splitlines()[-1]), err
    assert cluster.names() == ([] if words else ["shop_db", "shop_web"])
    if not words:
        _, listed, _ = await cluster.run("stack", "history", "--format", "{{.State}}", "shop")
        assert re.match("failed: shop_db: 0 of 1 tasks run: [3-5] failures in a row", listed)


async def test_nothing_is_created_if_the_managers_would_refuse_a_part(cluster: Cluster) -> None:
    cluster.write("name: other\nservices: {web: {image: busybox, ports: ['8080:80']}}")
    code, _, err = await cluster.deploy("--detach")
    assert code == 0, err
    cluster.write(
        "name: shop\nservices:\n  web: {image: busybox, ports: ['8080:80'], configs: [c]}\n  db: {image: busybox}\n"
        "configs: {c: {content: x}}"
    )
    said = "compose.yaml:3:8: services.web: port '8080' is already in use by service 'other_web'"
    for words in (("plan",), ("deploy",), ("deploy", "--only", "web")):
        code, _, err = await cluster.run("stack", *words, "--resolve-image", "never")
        assert (code, said in err) == (1, True), err
        assert "to create" not in err, "a refused plan may be wrong about objects that the user may not see"
    view = cluster.store.view()
    kinds: tuple[type[Any], ...] = (Service, Network, Config)
    names = [one.spec.name for kind in kinds for one in view.find(kind)]
    assert [name for name in names if name.startswith("shop")] == []


async def test_a_deploy_that_the_store_has_no_room_for_creates_nothing(cluster: Cluster) -> None:
    in_use = 76 * MIB

    async def space() -> MemberSpace:
        return MemberSpace(size=in_use, in_use=in_use, quota=100 * MIB)

    cluster.store.space = space  # type: ignore[method-assign]
    small = f"name: shop\nservices: {{web: {{image: busybox, {SOON}}}}}\n"
    cluster.write(small)
    code, _, err = await cluster.deploy()
    assert code == 0, err
    contents = "".join(f"  c{number}: {{file: large}}\n" for number in range(8))
    (cluster.folder / "large").write_bytes(b"x" * 500_000)
    cluster.write(small.replace("web:", "api:") + "networks: {new: {}}\nconfigs:\n" + contents)
    said = "Error: the cluster's store is 76 % full (76.0 of 100.0 MiB), too full for 5.1 MiB more: remove configs"
    for words in (("plan",), ("deploy",)):
        code, _, err = await cluster.run("stack", *words, "--resolve-image", "never")
        assert (code, said in err) == (1, True), err
    view = cluster.store.view()
    assert [one.spec.name for one in view.find(Config)] == ["shop_revision-1"]
    assert [one.spec.name for one in view.find(Network) if "new" in one.spec.name] == []
    assert cluster.names() == ["shop_web"]


async def test_a_deploy_that_creates_nothing_needs_no_room_for_its_revision(cluster: Cluster) -> None:
    """It may be what makes room."""
    cluster.write(FILE % "busybox")
    code, _, err = await cluster.deploy()
    assert code == 0, err

    async def space() -> MemberSpace:
        return MemberSpace(size=85 * MIB, in_use=85 * MIB, quota=100 * MIB)

    cluster.store.space = space  # type: ignore[method-assign]
    cluster.write(f"name: shop\nservices: {{web: {{image: other, {SOON}}}}}\n")
    code, _, err = await cluster.deploy("--prune")
    assert (code, cluster.names()) == (0, ["shop_web"]), err
    assert "the cluster's store is 85 % full (85.0 of 100.0 MiB): remove configs" in err
    assert "You cannot roll back to this deploy." in err


async def test_a_service_with_a_new_name_takes_over_the_port_of_the_one_that_is_pruned(
    cluster: Cluster,
) -> None:
    text = "name: shop\nservices: {%s: {image: busybox, ports: ['8080:80']}}"
    cluster.write(text % "old")
    code, _, err = await cluster.deploy("--detach")
    assert code == 0, err
    cluster.write(text % "new")
    code, _, err = await cluster.deploy("--detach")
    assert (code, "already in use by service 'shop_old'" in err) == (1, True), err
    code, _, err = await cluster.deploy("--detach", "--prune")
    assert (code, cluster.names()) == (0, ["shop_new"]), err


async def test_a_plan_without_changes_names_what_does_not_run_and_a_diff_has_the_last_two(
    cluster: Cluster,
) -> None:
    cluster.write(FILE % "busybox")
    code, _, err = await cluster.deploy()
    assert code == 0, err
    code, _, err = await cluster.run("stack", "diff", "shop")
    assert (code, "shop has only revision 1" in err) == (1, True), err
    cluster.write(FILE % HANGS)
    code, _, err = await cluster.deploy("--detach")
    assert code == 0, err
    code, out, _ = await cluster.run("stack", "plan", "--resolve-image", "never")
    assert code == 0
    first, second, third = out.splitlines()
    assert first == "Stack shop is up to date."
    assert second.startswith("  shop_db: 0 of 1 tasks ")
    assert third == "  Next: skep explain shop_db"
    code, out, err = await cluster.run("stack", "diff", "shop")
    assert (code, f"Image: busybox:latest -> {HANGS}:latest" in out) == (0, True), err


async def test_a_secret_with_a_name_of_its_own_keeps_its_content_and_gets_other_labels(
    cluster: Cluster,
) -> None:
    web = "services: {web: {image: busybox, secrets: [pw]}}"
    text = f"name: shop\n{web}\nsecrets: {{pw: {{name: pw, file: ./pw, labels: {{a: %s}}}}}}\n"
    cluster.write(text % "b")
    (cluster.folder / "pw").write_text("one")
    code, _, err = await cluster.deploy("--detach")
    assert code == 0, err

    def secret() -> Secret:
        (found,) = cluster.store.view().find(Secret)
        return found

    first = secret()
    code, _, err = await cluster.deploy("--detach")
    assert (code, secret()) == (0, first), err
    cluster.write(text % "c")
    code, _, err = await cluster.deploy("--detach")
    assert (code, "pw: secret updated" in err, secret().spec.labels["a"]) == (0, True, "c"), err
    (cluster.folder / "pw").write_text("two")
    code, _, err = await cluster.deploy("--detach")
    assert (code, "secrets.pw: the secret exists with other content" in err) == (1, True), err


async def test_a_rollback_to_an_operators_revision_shows_what_it_lacks_and_waits_for_the_administrator(
    cluster: Cluster,
) -> None:
    cluster.write(FILE % "busybox:1")
    code, _, err = await cluster.deploy()
    assert code == 0, err
    cluster.write(
        FILE.replace("web: {image: busybox,", "web: {image: busybox, volumes: ['/:/host'],") % "busybox:1"
    )
    code, _, err = await cluster.deploy()
    assert code == 0, err
    code, _, err = await cluster.run("stack", "rollback", "shop")
    assert (code, "~ service shop_web" in err) == (0, True), err
    async with cluster.requests() as client:
        found = {one.number: one for one in await known_revisions(client, "shop")}
        assert [str(one.role) for one in found.values()] == ["admin"] * 3
        body = {
            "Name": "shop_revision-4",
            "Labels": {**found[2].labels, "skep.stack.revision": "4"},
            "Data": found[2].data,
        }
        await client.post("/configs/create", body, headers={"X-Skep-Role": "operator:shop"})
    code, _, err = await cluster.run("stack", "rollback", "--to", "4", "shop")
    assert code == 1, err
    assert "~ service shop_web" in err, "the plan is shown"
    assert "a bind mount of /: only administrators may give that" in err
    assert "skep stack rollback --as-admin --to 4 shop" in err
    code, _, err = await cluster.run("stack", "rollback", "--to", "4", "--as-admin", "shop")
    assert (code, "not permitted with the role operator:shop: shop_web" in err) == (0, True), err


async def listed(cluster: Cluster) -> str:
    return (await cluster.run("stack", "history", "--format", "{{.Revision}} {{.State}}", "shop"))[1]


async def test_a_deploy_of_a_part_is_a_revision_of_the_whole_stack(cluster: Cluster) -> None:
    cluster.write(FILE % "busybox")
    assert (await cluster.deploy())[0] == 0
    cluster.write(
        f"name: shop\nservices: {{web: {{image: 'busybox:2', {SOON}}}, db: {{image: 'busybox:2', {SOON}}}}}\n"
    )
    code, _, err = await cluster.deploy("--only", "web")
    assert code == 0, err
    assert await listed(cluster) == "1 deployed\n2 deployed\n"
    async with cluster.requests() as client:
        recorded = (await known_revisions(client, "shop"))[-1].stack()
    containers = {name: one.spec.task_template.container_spec for name, one in recorded.services.items()}
    images = {name: one.image.partition("@")[0] for name, one in containers.items() if one is not None}
    assert images == {"web": "busybox:2", "db": "busybox:latest"}
    assert (await cluster.deploy("--only", "web"))[0] == 0
    assert await listed(cluster) == "1 deployed\n2 deployed\n", "nothing was changed"


async def recorded_images(cluster: Cluster) -> dict[str, str]:
    """The images in the newest revision."""
    async with cluster.requests() as client:
        recorded = (await known_revisions(client, "shop"))[-1].stack()
    containers = {name: one.spec.task_template.container_spec for name, one in recorded.services.items()}
    return {name: one.image.partition("@")[0] for name, one in containers.items() if one is not None}


async def test_a_deploy_of_a_part_after_a_failed_deploy_records_nothing_that_failed(cluster: Cluster) -> None:
    cluster.write(FILE % "busybox")
    assert (await cluster.deploy())[0] == 0
    cluster.write(
        f"name: shop\nservices: {{web: {{image: 'busybox:2', {SOON}}}, db: {{image: {FAILS}, {SOON}}}}}\n"
    )
    assert (await cluster.deploy("--timeout", "20s"))[0] == 1
    cluster.write(
        f"name: shop\nservices: {{web: {{image: 'busybox:3', {SOON}}}, db: {{image: {FAILS}, {SOON}}}}}\n"
    )
    code, _, err = await cluster.deploy("--only", "web")
    assert code == 0, err
    states = (await listed(cluster)).splitlines()
    assert states[1].startswith("2 failed")
    assert states[2] == "3 deployed"
    assert await recorded_images(cluster) == {"web": "busybox:3", "db": "busybox:latest"}


async def test_a_part_of_a_stack_whose_first_deploy_failed_is_not_recorded_alone(cluster: Cluster) -> None:
    """A rollback to a record of this part would remove the other service, which runs."""
    cluster.write(
        f"name: shop\nservices: {{web: {{image: {FAILS}, {SOON}}}, db: {{image: busybox, {SOON}}}}}\n"
    )
    assert (await cluster.deploy("--timeout", "20s"))[0] == 1
    cluster.write(
        f"name: shop\nservices: {{web: {{image: 'busybox:2', {SOON}}}, db: {{image: busybox, {SOON}}}}}\n"
    )
    for _ in range(2):
        code, _, err = await cluster.deploy("--only", "web")
        assert code == 0, err
    assert (await cluster.deploy())[0] == 0
    first, *others = (await listed(cluster)).splitlines()
    assert first.startswith("1 failed: ")
    assert others == ["2 deployed"]
    assert await recorded_images(cluster) == {"web": "busybox:2", "db": "busybox:latest"}


async def test_a_part_that_failed_at_first_is_recorded_when_it_is_deployed(cluster: Cluster) -> None:
    cluster.write(
        f"name: shop\nservices: {{web: {{image: {FAILS}, {SOON}}}, db: {{image: busybox, {SOON}}}}}\n"
    )
    assert (await cluster.deploy("--only", "web", "--timeout", "20s"))[0] == 1
    cluster.write(
        f"name: shop\nservices: {{web: {{image: 'busybox:2', {SOON}}}, db: {{image: busybox, {SOON}}}}}\n"
    )
    code, _, err = await cluster.deploy("--only", "web")
    assert code == 0, err
    assert await recorded_images(cluster) == {"web": "busybox:2"}


async def test_of_two_first_deploys_of_parts_one_is_refused(cluster: Cluster) -> None:
    """Both have read that there is no revision.  The second one's record would lack the first one's services."""
    made = stack_of(parse(FILE % "busybox", "f"), "shop", {}, ProblemReport())
    async with cluster.requests() as one, cluster.requests() as other:
        existing = await existing_of(one, "shop")
        plans = [plan_of(made, existing, images={}, prune=False, only=[name]) for name in ("web", "db")]
        ends = await asyncio.gather(
            *(
                carry_out(client, made, plan, lambda *_: None, 30.0, pytest.fail)
                for client, plan in zip((one, other), plans, strict=True)
            ),
            return_exceptions=True,
        )
    refused = [end for end in ends if end is not None]
    assert len(refused) == 1, ends
    assert isinstance(refused[0], FailedPrecondition), ends
    assert "another deploy of shop is running" in str(refused[0])
    assert await listed(cluster) == "1 deployed\n"
    images = await recorded_images(cluster)
    assert cluster.names() == [f"shop_{name}" for name in images]


async def test_a_deploy_of_a_part_is_refused_while_another_deploy_is_under_way(cluster: Cluster) -> None:
    process = await a_waiting_deploy(cluster)
    cluster.write(
        f"name: shop\nservices: {{web: {{image: 'busybox:2', {SOON}}}, db: {{image: busybox, {SOON}}}}}\n"
    )
    code, _, err = await cluster.deploy("--only", "web")
    assert (code, "another deploy of shop is running (revision 1)" in err) == (1, True), err
    assert await listed(cluster) == "1 deploying\n"
    process.send_signal(signal.SIGINT)
    await process.communicate()


async def test_a_deploy_of_a_part_is_replaced_by_a_newer_deploy(cluster: Cluster) -> None:
    cluster.write(FILE % "busybox")
    assert (await cluster.deploy())[0] == 0
    cluster.write(FILE % HANGS)
    process = await cluster.start("stack", "deploy", "--resolve-image", "never", "--only", "db")
    assert process.stderr is not None
    while b"shop_db: " not in (line := await process.stderr.readline()) or b"tasks" not in line:
        assert process.returncode is None
    cluster.write(
        f"name: shop\nservices: {{web: {{image: busybox, {SOON}}}, db: {{image: 'busybox:3', {SOON}}}}}\n"
    )
    code, _, err = await cluster.deploy()
    assert code == 0, err
    _, said = await process.communicate()
    assert (process.returncode, await listed(cluster)) == (
        1,
        "1 deployed\n2 replaced by revision 3\n3 deployed\n",
    ), said


async def test_a_stack_is_stopped_and_started_again_with_its_numbers(cluster: Cluster) -> None:
    cluster.write(
        "name: shop\n"
        "services:\n"
        f"  web: {{image: busybox, deploy: {{replicas: 3}}, depends_on: [db]}}\n"
        f"  db: {{image: busybox, {SOON}}}\n"
        "  once: {image: busybox, deploy: {mode: replicated-job, restart_policy: {condition: none}}}\n"
    )
    await cluster.deploy("--detach")
    code, _, err = await cluster.run("stack", "stop", "shop")
    assert code == 0, err
    assert "shop_once: a job without a schedule, which ends by itself" in err.splitlines()
    assert err.splitlines()[-2:] == ["shop_db: stopped", "shop_web: stopped"]
    _, listed, _ = await cluster.run("explain", "--output", "json", "shop_web")
    assert json.loads(listed)["Summary"] == "stopped: skep service start shop_web starts its tasks"
    code, planned, _ = await cluster.run("stack", "plan")
    assert "  ~ service shop_web   starts its tasks" in planned.splitlines()
    code, _, err = await cluster.run("stack", "start", "shop")
    assert code == 0, err
    assert "shop_web: 3 of 3 tasks run" in err.splitlines()
    code, _, err = await cluster.run("stack", "stop", "shops")
    assert (code, err) == (1, "Error: stack shops has no services. Show all stacks with skep stack ls.\n")


async def test_a_strict_freeze_refuses_a_deploy_whole_and_its_plan_says_so(cluster: Cluster) -> None:
    end = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    code, _, err = await cluster.run("cluster", "freeze", "--until", end, "--strict")
    assert code == 0, err
    cluster.write(FILE % "busybox")
    code, _, err = await cluster.run("stack", "plan", "--resolve-image", "never")
    assert (code, "the managers refuse a deploy until then" in err) == (2, True), err
    code, _, err = await cluster.deploy()
    assert (code, "have --override-freeze" in err.splitlines()[-1]) == (1, True), err
    view = cluster.store.view()
    kinds: tuple[type[Any], ...] = (Service, Network, Config)
    assert [one for kind in kinds for one in view.find(kind) if "shop" in one.spec.name] == []
    code, _, err = await cluster.deploy("--override-freeze")
    assert code == 0, err
