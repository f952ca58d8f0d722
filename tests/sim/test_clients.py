"""Commands that plan and then act, beside each other and beside the control loops, killed and suspended anywhere."""

import base64

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.users.client_runs import Commands, label_of, show_version
from sim.users.users import forced
from sim.world.images import BROKEN
from skep.cli.apps.rotation import SECRET
from skep.model.node import Availability, Node, NodeRole
from skep.model.options.schedules import CRON
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.model.task import Task
from skep.stack.cluster_state import known_revisions
from skep.stack.project import Stack
from tests.support.builders import a_service_spec
from tests.unit.stack.test_planning import a_stack

SEEDS = range(6)
CPU = 1_000_000_000


def a_version(image: str, *, own: str = "", password: bytes = b"one", ports: str = "") -> Stack:
    """``own``: a service that only this version has."""
    deploy = "deploy: {replicas: 2, update_config: {monitor: 1ms, parallelism: 0}}"
    text = f"services:\n  web: {{image: '{image}', secrets: [pw], {deploy}{ports}}}\n"
    if own:
        text += f"  {own}: {{image: 'app:1', deploy: {{replicas: 1}}}}\n"
    return a_stack(text + "secrets: {pw: {file: f}}\n", pw=password)


def before(commands: Commands, cluster: SimulatedCluster) -> None:
    """Objects of the stack that no deploy has made: a secret that nobody can read back, and a network."""

    async def make() -> None:
        client = commands.client("person")
        data = base64.b64encode(b"key").decode()
        await client.post("/secrets/create", {"Name": "shop_tls", "Labels": label_of("shop"), "Data": data})
        body = {"Name": "shop_old", "Driver": "overlay", "Labels": label_of("shop")}
        await client.post("/networks/create", body)

    cluster.do(make())


@pytest.mark.parametrize("seed", SEEDS)
def test_two_first_deploys_of_a_stack_of_which_one_fails_and_is_undone(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        before(Commands(cluster), cluster)
        commands = Commands(cluster)
        good = commands.deploy("good", a_version("app:1", own="api"), undoes=True)
        cluster.run_for(cluster.random.uniform(0.0, 3.0))
        bad = commands.deploy("bad", a_version(BROKEN, own="cron"), undoes=True, wait_s=8.0)
        for one in (good, bad):
            commands.disturb(one)
        commands.finish()


@pytest.mark.parametrize("seed", range(13, 21))
def test_an_undo_leaves_what_a_deploy_beside_it_has_found_and_counts_on(seed: int) -> None:
    """The one that fails has created a service that the other one finds as its files say."""
    with SimulatedCluster(managers=3, workers=3, seed=800 + seed) as cluster:
        commands = Commands(cluster)
        bad = commands.deploy("bad", a_version(BROKEN, own="shared"), undoes=True, wait_s=4.0)
        bad.pauses[cluster.random.randint(35, 60)] = 6.0
        cluster.run_for(
            cluster.random.choice((cluster.random.uniform(0.0, 1.0), cluster.random.uniform(4.0, 9.0)))
        )
        good = a_version("app:1", own="shared")
        commands.deploy("good", replace(good, services={"shared": good.services["shared"]}), undoes=False)
        commands.finish()


@pytest.mark.parametrize("seed", SEEDS)
def test_two_deploys_of_a_stack_that_is_there(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=100 + seed) as cluster:
        first = Commands(cluster)
        first.deploy("first", a_version("app:1"), undoes=False)
        first.finish()
        commands = Commands(cluster)
        images = ("app:2", cluster.random.choice(("app:3", BROKEN)))
        for number, image in enumerate(images):
            stack = a_version(image, own=f"own{number}", password=b"%d" % number)
            commands.disturb(commands.deploy(f"d{number}", stack, undoes=True, wait_s=10.0))
            cluster.run_for(cluster.random.uniform(0.0, 1.0))
        commands.finish()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_newest_deploy_succeeds_whatever_another_one_prunes(seed: int) -> None:
    """Its secret is created and not used yet when the other one looks for what nothing uses.

    Deploys that overlap end with the revision that replaced them, and the service is whole that of the newest.
    """
    with SimulatedCluster(managers=3, workers=3, seed=500 + seed) as cluster:
        for number in range(2):
            first = Commands(cluster)
            first.deploy("first", a_version("app:1", password=b"%d" % number), undoes=False)
            first.finish()
        commands = Commands(cluster)
        slow = commands.deploy("slow", a_version("app:2", password=b"slow"), undoes=False)
        slow.pauses[cluster.random.randint(8, 14)] = 10.0
        commands.deploy("fast", a_version("app:3", password=b"fast"), undoes=False)
        commands.finish()
        done = [one.removesuffix(": done") for one in commands.outcomes if one.endswith(": done")]
        lost = [one for one in commands.outcomes if not one.endswith(": done")]
        assert done
        assert all("was changed meanwhile by another deploy (revision 4)" in one for one in lost)
        (service,) = cluster.view.find(Service)
        container = service.spec.task_template.container_spec
        assert container is not None
        assert container.image in [{"slow": "app:2", "fast": "app:3"}[name] for name in done]
        (used,) = container.secrets
        assert used.secret_id in cluster.view.ids(Secret)


def only_service(cluster: SimulatedCluster) -> Service:
    (service,) = cluster.view.find(Service)
    return service


def image_of(cluster: SimulatedCluster) -> str:
    container = only_service(cluster).spec.task_template.container_spec
    assert container is not None
    return container.image


@pytest.mark.parametrize("seed", SEEDS)
def test_a_deploy_makes_the_changes_of_a_newer_one_with_the_same_content_that_was_killed(seed: int) -> None:
    """The newer one has recorded its revision, which replaces the older one, and has changed nothing."""
    with SimulatedCluster(managers=3, workers=3, seed=900 + seed) as cluster:
        for image in ("app:1", "app:3"):
            first = Commands(cluster)
            first.deploy("first", a_version(image), undoes=False)
            first.finish()
        commands = Commands(cluster)
        older = commands.deploy("older", a_version("app:2"), undoes=False)
        cluster.run_until(lambda: len(cluster.view.find(Config)) == 3, within_s=10)
        older.pauses[older.requests + cluster.random.randint(1, 2)] = 9.0
        cluster.run_until(lambda: not older.pauses, within_s=10)
        newer = commands.deploy("newer", a_version("app:2"), undoes=False)
        cluster.run_until(lambda: len(cluster.view.find(Config)) == 4, within_s=8)
        newer.killed_at = 0
        commands.finish()
        assert commands.outcomes == ["older: done"]
        assert image_of(cluster) == "app:2"
        revisions = cluster.do(known_revisions(commands.client("person"), "shop"))
        assert [one.state for one in revisions] == ["deployed"] * 2 + ["replaced by revision 4", "deployed"]


@pytest.mark.parametrize("is_repeated", [False, True])
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_a_deploy_whose_service_was_rolled_back_fails_although_it_was_updated_once_more(
    seed: int, is_repeated: bool
) -> None:
    """The deploy is suspended during the rollback, and before it looks, an upgrade redistributes the tasks."""
    with SimulatedCluster(managers=3, workers=3, seed=950 + seed) as cluster:
        for node in cluster.nodes.values():
            node.ending_images["ends:1"] = (2.0, 1)
        policy = "update_config: {monitor: 5s, failure_action: rollback}"
        text = "services: {web: {image: '%s', deploy: {replicas: 2, " + policy + "}}}"
        first = Commands(cluster)
        first.deploy("first", a_stack(text % "app:1"), undoes=False)
        first.finish()
        commands = Commands(cluster)
        deploys = [commands.deploy("deploy", a_stack(text % "ends:1"), undoes=False, wait_s=90.0)]
        cluster.run_until(lambda: image_of(cluster) == "ends:1", within_s=10)
        if is_repeated:  # it finds nothing to change, and only waits
            deploys.append(commands.deploy("repeated", a_stack(text % "ends:1"), undoes=False, wait_s=90.0))
            cluster.run_for(0.5)
        for client in deploys:
            client.pauses |= {client.requests + number: 10.0 for number in range(1, 4)}
        cluster.run_until(lambda: image_of(cluster) == "app:1", within_s=9)
        cluster.update(only_service(cluster).id, forced)
        commands.finish()
        said = "shop_web: its update was rolled back. Run skep explain shop_web."
        assert sorted(commands.outcomes) == sorted(f"{client._name}: {said}" for client in deploys)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_deploy_beside_the_autoscaler(seed: int) -> None:
    """The load rises between the plan and the update."""
    text = "services: {web: {image: 'app:%d', deploy: {replicas: 2, labels: {skep.autoscale: 2..12}}}}"
    with SimulatedCluster(managers=3, workers=3, seed=200 + seed) as cluster:
        load = [0.5]

        def of_task(task: Task) -> int:
            return round(load[0] * CPU / max(cluster.containers(str(task.service_id)), 1))

        cluster.nano_cpus = of_task
        commands = Commands(cluster)
        commands.deploy("first", a_stack(text % 1), undoes=False)
        commands.finish()
        load[0] = 6.0
        cluster.run_for(cluster.random.uniform(0.0, 20.0))
        commands = Commands(cluster)
        client = commands.deploy("second", a_stack(text % 2), undoes=False, wait_s=60.0)
        client.pauses[cluster.random.randint(4, 12)] = 40.0
        commands.finish()


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_an_update_of_ports_alone_is_waited_for(seed: int) -> None:
    # The store is slower than the command, which looks before the leader has acted.
    with SimulatedCluster(managers=3, workers=3, seed=300 + seed, latency_s=0.2) as cluster:
        for ports in ("", ", ports: ['8080:80']"):
            commands = Commands(cluster)
            commands.deploy("deploy", a_version("app:1", ports=ports), undoes=False)
            commands.finish()
            assert commands.outcomes == ["deploy: done"]


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_a_rotation_beside_a_deploy_reaches_every_service_and_scheduled_job(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=400 + seed) as cluster:
        commands = Commands(cluster)

        async def make() -> None:
            person = commands.client("person")
            data = base64.b64encode(b"key").decode()
            found = await person.post("/secrets/create", {"Name": "pw", "Labels": {}, "Data": data})
            reference = {"SecretID": found["ID"], "SecretName": "pw", "File": {"Name": "pw", "Mode": 0o444}}
            template = {"ContainerSpec": {"Image": "app:1", "Secrets": [reference]}}
            replicated, job = {"Replicated": {"Replicas": 2}}, {"ReplicatedJob": {}}
            for name, mode, labels in (("web", replicated, {}), ("nightly", job, {CRON: "0 3 * * *"})):
                spec = {"Name": name, "Labels": labels, "Mode": mode, "TaskTemplate": template}
                await person.post("/services/create", spec)

        def service(name: str) -> Service:
            (found,) = (one for one in cluster.view.find(Service) if one.spec.name == name)
            return found

        cluster.do(make())
        cluster.run_until(lambda: cluster.running(service("web").id) == 2, within_s=20)
        commands.deploy("deploy", a_version("app:1"), undoes=True)
        killed = commands.rotate("killed", SECRET, "pw", b"new")
        killed.killed_at = cluster.random.randint(1, 12)
        commands.finish()
        is_made = len(cluster.view.find(Secret)) > 2
        again = Commands(cluster)
        again.rotate("again", SECRET, "pw", None if is_made else b"new")
        again.finish()
        assert again.outcomes == ["again: done"]
        for name in ("web", "nightly"):
            container = service(name).spec.task_template.container_spec
            assert container is not None
            assert [one.secret_name for one in container.secrets] == ["pw-v2"], name


@pytest.mark.parametrize("pause", [1, 2])
def test_a_rotation_fails_if_a_service_was_rolled_back_to_the_previous_secret(pause: int) -> None:
    """The rotation is suspended meanwhile, and the service is updated once more before it continues."""
    with SimulatedCluster(managers=3, workers=3, seed=450) as cluster:
        policy = "update_config: {monitor: 5s, failure_action: rollback}"
        text = "services: {web: {image: 'app:1', secrets: [pw], deploy: {replicas: 2, " + policy + "}}}\n"
        commands = Commands(cluster)
        commands.deploy(
            "first", a_stack(text + "secrets: {pw: {name: pw, file: f}}\n", pw=b"1"), undoes=False
        )
        commands.finish()
        for node in cluster.nodes.values():
            node.ending_images["app:1"] = (2.0, 1)  # only containers that start from now on
        commands = Commands(cluster)
        client = commands.rotate("rotate", SECRET, "pw", b"2")

        def secret() -> str:
            container = only_service(cluster).spec.task_template.container_spec
            assert container is not None
            return container.secrets[0].secret_name

        def suspend(*_: object) -> None:
            if secret() == "pw-v2" and not client.pauses:
                client.pauses[client.requests + pause] = 20.0

        cluster.committed.watchers.append(suspend)
        cluster.run_until(lambda: secret() == "pw-v2", within_s=10)
        cluster.run_until(lambda: secret() == "pw", within_s=10)
        for node in cluster.nodes.values():
            node.ending_images.clear()
        cluster.update(only_service(cluster).id, forced)
        commands.finish()
        (outcome,) = commands.outcomes
        assert outcome.startswith("rotate: shop_web: it uses the previous secret again")


def drained(cluster: SimulatedCluster) -> list[str]:
    return [
        one.id
        for one in cluster.view.find(Node)
        if one.spec.role is NodeRole.WORKER and one.spec.availability is not Availability.ACTIVE
    ]


def versions(cluster: SimulatedCluster) -> set[str]:
    return {cluster.view.get(Node, id).description.engine.engine_version for id in cluster.workers}


@pytest.mark.parametrize("seed", SEEDS)
def test_an_upgrade_that_is_killed_is_completed_by_one_of_two_that_continue_it(seed: int) -> None:
    """One node is drained at a time, whoever believes that it is their turn."""
    with SimulatedCluster(managers=3, workers=3, seed=600 + seed) as cluster:
        for id in cluster.workers:
            show_version(cluster, id, "1")
        cluster.create(a_service_spec("web", replicas=2))
        cluster.run_until(lambda: cluster.running("web") == 2 and versions(cluster) == {"1"}, within_s=60)
        at_most: list[int] = [0]

        def check(*_: object) -> None:
            at_most[0] = max(at_most[0], len(drained(cluster)))

        cluster.committed.watchers.append(check)
        commands = Commands(cluster)
        first = commands.upgrade("first", "2", continues=False)
        first.killed_at = cluster.random.randint(1, 120)
        cluster.run_for(cluster.random.uniform(5.0, 60.0))
        second = commands.upgrade("second", "2", continues=True)
        second.pauses[cluster.random.randint(5, 60)] = 20.0
        cluster.run_for(cluster.random.uniform(0.0, 20.0))
        commands.upgrade("third", "2", continues=True)
        commands.finish(within_s=900.0)
        assert any(one in ("first: done", "second: done", "third: done") for one in commands.outcomes)
        assert (versions(cluster), drained(cluster), at_most[0]) == ({"2"}, [], 1)
        assert cluster.running("web") == 2


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_an_upgrade_ends_at_a_node_that_does_not_come_back_which_has_its_version_again(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=700 + seed) as cluster:
        for id in cluster.workers:
            show_version(cluster, id, "1")
        cluster.run_until(lambda: versions(cluster) == {"1"}, within_s=60)
        commands = Commands(cluster)
        broken = cluster.random.choice(cluster.workers)
        commands.upgrade("upgrade", "2", continues=False, broken=[broken])
        commands.finish(within_s=900.0)
        (outcome,) = commands.outcomes
        assert f"{broken} did not become healthy with 2" in outcome
        assert cluster.view.get(Node, broken).description.engine.engine_version == "1"
        assert drained(cluster) == []
        print("what others print stays visible")
        said = f"{broken}: draining"
        assert any(line.endswith(f"upgrade: {said}") for line in cluster.trace.lines())
        out, err = capsys.readouterr()
        assert "what others print stays visible" in out
        assert said not in out + err
