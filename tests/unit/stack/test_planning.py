"""What a deploy changes."""

from typing import Any

import pytest
from click import unstyle
from msgspec.structs import replace

from skep.api.formats.service_form import settled
from skep.cli.stack.stack_screens import lines_of, placement_lines
from skep.model.options.autoscaling import with_replicas
from skep.model.service import Service, UpdateState, UpdateStatus
from skep.model.staging.updates import message_of, stages_of
from skep.model.values.ids import ServiceId
from skep.model.values.stacks import STACK_LABEL
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.document import FileProblems, parse
from skep.stack.compose.reading import ProblemReport
from skep.stack.planning import (
    Existing,
    NodeShare,
    PlacementRefusal,
    PlanAction,
    PredictedPlacement,
    StackPlan,
    plan_of,
    planned_again,
    superseded,
    waves,
)
from skep.stack.project import Stack

TEXT = """
services:
  web:
    image: w
    environment: {B: 1, A: 2}
    ports: ["81:81", "80:80"]
    networks: [front]
    configs: [conf]
    deploy: {replicas: 2, update_config: {parallelism: 2}}
  db: {image: d}
networks: {front: {}}
configs: {conf: {content: one}}
"""
LABELS = {"com.docker.stack.namespace": "shop"}


def a_stack(text: str = TEXT, **secrets: bytes) -> Stack:
    """``secrets``: the content of those with a file."""
    report = ProblemReport()
    contents = {("secrets", name): content for name, content in secrets.items()}
    made = stack_of(parse(text, "f"), "shop", contents, report)
    report.raise_problems()
    return made


def deployed(stack: Stack, **images: str) -> Existing:
    """A cluster that has all of it, with ids as an API gives them."""
    networks = tuple(
        {"Id": f"id of {one.name}", "Name": one.name, "Scope": "swarm", **one.body}
        for one in stack.networks.values()
    )
    ids = {one["Name"]: one["Id"] for one in networks}
    services = []
    for name, one in stack.services.items():
        template = one.spec.task_template
        container = template.container_spec
        assert container is not None
        template = replace(
            template,
            container_spec=replace(container, image=images.get(name, container.image)),
            networks=tuple(replace(each, target=ids[each.target]) for each in template.networks),
        )
        spec = settled(replace(one.spec, task_template=template))
        services.append(Service(id=ServiceId(f"id of {name}"), spec=spec))
    configs = tuple({"ID": f"id of {one.name}", "Spec": one.body} for one in stack.configs.values())
    secrets = tuple(
        {"ID": f"id of {one.name}", "Spec": {**one.body, "Data": None}} for one in stack.secrets.values()
    )
    return Existing(services=tuple(services), networks=networks, configs=configs, secrets=secrets)


def plan(text: str, existing: Existing, **options: Any) -> StackPlan:
    return plan_of(a_stack(text), existing, **{"images": {}, "prune": False} | options)


def signs(made: StackPlan) -> list[str]:
    return [f"{one.action.value}{one.kind} {one.name}" for one in made.effective]


def test_a_new_stack_is_created_in_the_order_of_what_needs_what() -> None:
    made = plan(TEXT, Existing())
    assert [one.split("-")[0] for one in signs(made)] == [
        "+network shop_default",
        "+network shop_front",
        "+config shop_conf",
        "+service shop_web",
        "+service shop_db",
    ]


def test_the_same_files_change_nothing() -> None:
    assert signs(plan(TEXT, deployed(a_stack()))) == []


@pytest.mark.parametrize(
    ("before", "after", "path", "restarts"),
    [
        ("replicas: 2", "replicas: 3", "Mode.Replicated.Replicas", False),
        ("image: w", "image: v", "TaskTemplate.ContainerSpec.Image", True),
        ("A: 2", "A: 3", "TaskTemplate.ContainerSpec.Env", True),
        ('"80:80"', '"90:80"', "EndpointSpec.Ports[0].PublishedPort", True),
        ("content: one", "content: two", "TaskTemplate.ContainerSpec.Configs[0].ConfigName", True),
        ("parallelism: 2", "parallelism: 3", "UpdateConfig.Parallelism", False),
        (
            "replicas: 2",
            "replicas: 2, placement: {constraints: [a == b]}",
            "TaskTemplate.Placement.Constraints",
            False,
        ),
        ("replicas: 2", "replicas: 2, labels: {x: y}", "Labels.x", False),
    ],
)
def test_a_change_is_one_field_and_says_whether_tasks_are_replaced(
    before: str, after: str, path: str, restarts: bool
) -> None:
    made = plan(TEXT.replace(before, after), deployed(a_stack()))
    web = next(one for one in made.effective if one.name == "shop_web")
    assert path in [one.path for one in web.differences]
    assert (web.action, web.restarts) == (PlanAction.UPDATE, restarts)
    assert all(one.name != "shop_db" for one in made.effective)


def test_the_number_of_an_autoscaled_service_is_the_clusters_whatever_the_file_says() -> None:
    text = "services: {web: {image: w, deploy: {replicas: 2}, x-skep: {autoscale: 2..9}}}"
    existing = deployed(a_stack(text))
    (service,) = existing.services
    scaled = replace(existing, services=(replace(service, spec=with_replicas(service.spec, 7)),))
    assert signs(plan(text, scaled)) == []
    (change,) = plan(text.replace("image: w", "image: v"), scaled).of("service", PlanAction.UPDATE)
    assert change.spec is not None
    assert change.spec.replicas == 7
    assert not [one for one in change.differences if "Replicas" in one.path]
    off = "services: {web: {image: w, deploy: {replicas: 2}}}"
    (change,) = plan(off, scaled).of("service", PlanAction.UPDATE)
    assert ("Mode.Replicated.Replicas", "7", "2") in [
        (one.path, one.before, one.after) for one in change.differences
    ]


def test_a_new_autoscaled_service_begins_with_the_fewest() -> None:
    made = plan("services: {web: {image: w, x-skep: {autoscale: 3..9}}}", Existing())
    (change,) = made.of("service", PlanAction.CREATE)
    assert change.spec is not None
    assert change.spec.replicas == 3


def test_services_that_are_gone_are_removed_if_asked() -> None:
    text = TEXT.replace("  db: {image: d}\n", "")
    assert signs(plan(text, deployed(a_stack()))) == []
    assert signs(plan(text, deployed(a_stack()), prune=True)) == ["-service shop_db"]
    assert signs(plan(text, deployed(a_stack()), prune=True, only=["web"])) == []


def test_a_plan_made_again_removes_no_service_that_came_after_it() -> None:
    """An undo may remove what its deploy created; another deploy of the stack may add a service at any time."""
    existing, stack = deployed(a_stack()), a_stack(TEXT.replace("  db: {image: d}\n", ""))
    (db,) = (one for one in existing.services if one.spec.name == "shop_db")
    made = plan_of(stack, existing, images={}, prune=True, removable={db.id})
    assert signs(made) == ["-service shop_db"]
    late = replace(db, id=ServiceId("late"), spec=replace(db.spec, name="shop_late"))
    now = replace(existing, services=(*existing.services, late))
    assert signs(planned_again(stack, made, now)) == ["-service shop_db"]
    everything = plan_of(stack, existing, images={}, prune=True)
    assert signs(planned_again(stack, everything, now)) == ["-service shop_db", "-service shop_late"]


def test_only_the_services_asked_for_are_changed() -> None:
    text = TEXT.replace("image: w", "image: v").replace("image: d", "image: e")
    assert signs(plan(text, deployed(a_stack()), only=["db"])) == ["~service shop_db"]


def test_an_image_keeps_its_digest_while_no_registry_answers() -> None:
    existing = deployed(a_stack(), web="w@sha256:1")
    assert signs(plan(TEXT, existing)) == []
    assert signs(plan(TEXT, existing, images={"w": "w@sha256:1"})) == []
    assert signs(plan(TEXT, existing, images={"w": "w@sha256:2"})) == ["~service shop_web"]


def test_a_forced_update_by_others_is_no_change() -> None:
    existing = deployed(a_stack())
    first = existing.services[0]
    template = replace(first.spec.task_template, force_update=3)
    forced = replace(first, spec=replace(first.spec, task_template=template))
    made = plan(TEXT, replace(existing, services=(forced, *existing.services[1:])))
    assert signs(made) == []


@pytest.mark.parametrize(
    ("text", "existing", "problem"),
    [
        (
            "services: {w: {image: w, networks: [n]}}\nnetworks: {n: {external: true}}",
            Existing(),
            (
                'network "n" is declared as external, but could not be found. '
                "You need to create a swarm-scoped network before the stack is deployed"
            ),
        ),
        (
            "services: {w: {image: w, networks: [n]}}\nnetworks: {n: {external: true}}",
            Existing(networks=({"Name": "n", "Id": "1", "Scope": "local"},)),
            'network "n" is declared as external, but it is not in the right scope: "local" instead of "swarm"',
        ),
        (
            "services: {w: {image: w, networks: [n]}}\nnetworks: {n: {name: m, internal: true}}",
            Existing(
                networks=(
                    {
                        "Name": "m",
                        "Id": "1",
                        "Scope": "swarm",
                        "Driver": "overlay",
                        "Internal": False,
                        "Attachable": False,
                    },
                )
            ),
            (
                "the network exists and cannot be changed (Internal is False, not True): "
                "remove it first, or give it another name"
            ),
        ),
        (
            "services: {w: {image: w, networks: [n]}}\nnetworks: {n: {name: m, enable_ipv6: true}}",
            Existing(
                networks=(
                    {"Name": "m", "Id": "1", "Scope": "swarm", "Driver": "overlay", "EnableIPv6": False},
                )
            ),
            (
                "the network exists and cannot be changed (EnableIPv6 is False, not True): "
                "remove it first, or give it another name"
            ),
        ),
        (
            (
                "services: {w: {image: w, networks: [n]}}\nnetworks: {n: {name: m, driver_opts: {encrypted: ''},"
                " ipam: {config: [{subnet: 10.9.0.0/24}]}}}"
            ),
            Existing(
                networks=(
                    {
                        "Name": "m",
                        "Id": "1",
                        "Scope": "swarm",
                        "Driver": "overlay",
                        "IPAM": {"Config": [{"Subnet": "10.8.0.0/24"}]},
                    },
                )
            ),
            (
                "the network exists and cannot be changed (its subnet is 10.8.0.0/24, not 10.9.0.0/24; the option "
                "encrypted is None, not ''): remove it first, or give it another name"
            ),
        ),
        (
            "services: {w: {image: w, configs: [c]}}\nconfigs: {c: {content: x, name: m}}",
            Existing(configs=({"ID": "1", "Spec": {"Name": "m", "Data": "eQ=="}},)),
            (
                "the config exists with other content, which cannot be changed: leave out its name, "
                "and each content has a name of its own"
            ),
        ),
        (
            "services: {w: {image: w, secrets: [s]}}\nsecrets: {s: {external: true}}",
            Existing(),
            "external secret s does not exist: create it first",
        ),
    ],
)
def test_what_cannot_be_made_true_is_refused_before_anything_is_done(
    text: str, existing: Existing, problem: str
) -> None:
    with pytest.raises(FileProblems) as caught:
        plan(text, existing)
    assert [one.text for one in caught.value.problems] == [problem]


@pytest.mark.parametrize(
    ("subnet", "now"),
    [
        ("fd77:1::/64", ("10.0.3.0/24", "fd77:1::/64")),
        ("10.9.0.0/24", ("10.9.0.0/24", "fd00:1::/64")),
        ("10.9.0.1/24", ("10.9.0.0/24",)),
        ("'fd77:0001::/64'", ("10.0.3.0/24", "fd77:1::/64")),
    ],
)
def test_a_network_whose_other_subnet_was_chosen_for_it_is_the_same(
    subnet: str, now: tuple[str, ...]
) -> None:
    """A second deploy of the same file was refused."""
    ipam = f"{{config: [{{subnet: {subnet}}}]}}"
    text = f"services: {{w: {{image: w, networks: [n]}}}}\nnetworks: {{n: {{name: m, ipam: {ipam}}}}}"
    config = [{"Subnet": one} for one in now]
    network = {"Name": "m", "Id": "1", "Scope": "swarm", "Driver": "overlay", "IPAM": {"Config": config}}
    made = plan(text, Existing(networks=(network,)))
    assert [one.split()[-1] for one in signs(made)] == ["shop_w"]


@pytest.mark.parametrize("kind", ["secret", "config"])
def test_labels_of_a_file_with_a_name_of_its_own_are_updated(kind: str) -> None:
    source = "content: x" if kind == "config" else "file: f"
    text = f"services: {{w: {{image: w, {kind}s: [c]}}}}\n{kind}s: {{c: {{{source}, name: m, labels: {{a: b}}}}}}"
    existing = deployed(a_stack(text, c=b"x"))
    made = plan_of(a_stack(text.replace("a: b", "a: c"), c=b"x"), existing, images={}, prune=False)
    assert signs(made) == [f"~{kind} m"]
    assert [unstyle(line) for line in lines_of(made)][1:] == [
        f"  ~ {kind} m   restarts no tasks",
        "      Labels.a: b -> c",
    ]
    assert signs(plan_of(a_stack(text, c=b"x"), existing, images={}, prune=False)) == []


@pytest.mark.parametrize("labels", [{}, {STACK_LABEL: "another", "a": "b"}])
def test_a_secret_of_others_is_used_and_does_not_become_the_stacks(labels: dict[str, str]) -> None:
    stack = a_stack("services: {w: {image: w, secrets: [c]}}\nsecrets: {c: {file: f, name: m}}", c=b"x")
    existing = replace(deployed(stack), secrets=({"ID": "x", "Spec": {"Name": "m", "Labels": labels}},))
    assert signs(plan_of(stack, existing, images={}, prune=True)) == []


@pytest.mark.parametrize("labels", [{}, {STACK_LABEL: "another"}])
def test_what_has_the_name_of_this_stacks_content_and_is_anothers_is_refused(labels: dict[str, str]) -> None:
    stack = a_stack("services: {w: {image: w, secrets: [c]}}\nsecrets: {c: {file: f}}", c=b"x")
    (name,) = (one.name for one in stack.secrets.values())
    existing = replace(deployed(stack), secrets=({"ID": "x", "Spec": {"Name": name, "Labels": labels}},))
    with pytest.raises(FileProblems, match="belongs to another stack or none"):
        plan_of(stack, existing, images={}, prune=True)


def test_the_image_that_a_service_has_counts_only_if_it_is_the_files_with_a_digest() -> None:
    """Whoever updates the service last writes both, its image and the label."""
    stack = a_stack("services: {w: {image: 'w:1'}}")
    for image in ("evil.example/w@sha256:1", "w:1.evil@sha256:1", "w:1"):
        plan = plan_of(stack, deployed(stack, w=image), images={}, prune=False)
        (change,) = plan.of("service", *PlanAction)
        assert change.spec is not None
        assert change.spec.task_template.container_spec is not None
        assert change.spec.task_template.container_spec.image == "w:1"


def test_a_secret_with_a_certificate_in_use_is_not_superseded() -> None:
    stack = a_stack()
    objects = [{"ID": "s", "Spec": {"Name": "shop_cert-1", "Labels": {STACK_LABEL: stack.name}}}]
    services = list(deployed(stack).services)
    assert superseded(stack, "secret", objects, services) == objects
    labels = {"skep.http": "a.example", "skep.http.tls": "shop_cert-1"}
    services[0] = replace(services[0], spec=replace(services[0].spec, labels=labels))
    assert superseded(stack, "secret", objects, services) == []


def test_superseded_configs_are_those_that_nothing_uses_nor_returns_to() -> None:
    old, new = a_stack(), a_stack(TEXT.replace("content: one", "content: two"))
    before, after = deployed(old), deployed(new)
    other = {"ID": "x", "Spec": {"Name": "elses", "Labels": {}}}
    objects = [*before.configs, *after.configs, other]
    name = next(iter(old.configs.values())).name
    assert [one["Spec"]["Name"] for one in superseded(new, "config", objects, after.services)] == [name]
    returning = [replace(one, previous_spec=one.spec) for one in before.services]
    assert superseded(new, "config", objects, returning) == []
    assert superseded(new, "config", objects, after.services, kept=[name]) == []


def test_services_come_in_the_order_of_their_dependencies() -> None:
    text = "services: {a: {image: a, depends_on: [b, c]}, b: {image: b, depends_on: [c]}, c: {image: c}, d: {image: d}}"
    assert waves(a_stack(text).services) == [["c", "d"], ["b"], ["a"]]


def test_a_plan_reads_like_a_list_of_changes() -> None:
    text = (
        TEXT.replace("image: w", "image: v")
        .replace("replicas: 2", "replicas: 3")
        .replace("  db: {image: d}\n", "")
    )
    made = plan(text, deployed(a_stack()), prune=True)
    assert [unstyle(line) for line in lines_of(made)] == [
        "Stack shop: 1 object to update, 1 object to remove",
        "  ~ service shop_web   replaces tasks, 2 at a time, stopping old tasks first, because of Image",
        "      Image: w -> v:latest",
        "      Mode.Replicated.Replicas: 2 -> 3",
        "  - service shop_db",
    ]
    assert lines_of(plan(TEXT, deployed(a_stack()))) == ["Stack shop is up to date."]


def test_a_plan_says_where_services_would_run_and_why_not() -> None:
    made = plan(TEXT, Existing())
    fits = PredictedPlacement("shop_web", 3, (NodeShare("n1", 1), NodeShare("n2", 2)))
    refused = (PlacementRefusal("n1", ("insufficient resources: 2 CPUs requested, 1 not reserved",)),)
    assert [unstyle(line) for line in placement_lines(PredictedPlacement("a", 0, error="no"))] == [
        "would be refused: no"
    ]
    hostile = PredictedPlacement(
        "a", 1, (NodeShare("\x1b[2Jn", 1),), "\x1b]0;x\x07", verdicts=(PlacementRefusal("\x1bm", ("\x1bn",)),)
    )
    assert not any("\x1b" in unstyle(line) for line in placement_lines(hostile))
    full = PredictedPlacement(
        "shop_db", 2, (NodeShare("n2", 1),), "no suitable node (insufficient resources)", verdicts=refused
    )
    lines = [
        unstyle(line) for line in lines_of(replace(made, placements={"shop_web": fits, "shop_db": full}))
    ]
    at = lines.index("  + service shop_web")
    assert lines[at + 1 : at + 3] == ["      3 tasks: 2 on n2, 1 on n1", "  + service shop_db"]
    assert lines[at + 3 :] == [
        "      does not fit: 1 of 2 tasks would run on n2",
        "        no suitable node (insufficient resources)",
        "        n1: insufficient resources: 2 CPUs requested, 1 not reserved",
    ]
    beside = PredictedPlacement("a", 6, error="no suitable node", old=6)
    assert unstyle(placement_lines(beside)[0]) == "does not fit: 0 of 6 new tasks would run, next to 6 old"
    alike = replace(full, verdicts=(*refused, PlacementRefusal("n2", refused[0].reasons)))
    assert [unstyle(line) for line in placement_lines(alike)][2:] == [
        "  all 2 nodes: insufficient resources: 2 CPUs requested, 1 not reserved",
    ]


def test_a_plan_says_which_tasks_a_changed_constraint_replaces() -> None:
    """Only those whose node does not meet it, which the update moves."""
    before, after = (
        f"services: {{web: {{image: w, deploy: {{placement: {{{placement}}}}}}}}}"
        for placement in ("constraints: []", "constraints: [node.labels.disk == ssd]")
    )
    made = plan(after, deployed(a_stack(before)))
    assert "  ~ service shop_web   replaces only tasks on nodes that no longer fit" in [
        unstyle(line) for line in lines_of(made)
    ]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("busybox", "busybox:latest"),
        ("registry:5000/a/b", "registry:5000/a/b:latest"),
        ("busybox:1", "busybox:1"),
        ("busybox@sha256:1", "busybox@sha256:1"),
        ("a" * 64, "a" * 64),
    ],
)
def test_an_image_has_a_tag_as_docker_writes_it_so_that_a_scale_by_docker_replaces_no_task(
    given: str, written: str
) -> None:
    stack = a_stack(f"services: {{web: {{image: '{given}'}}}}")
    (change,) = plan_of(stack, Existing(), images={}, prune=False).of("service", PlanAction.CREATE)
    assert change.spec is not None
    assert change.spec.task_template.container_spec is not None
    assert change.spec.task_template.container_spec.image == written
    assert not plan_of(stack, deployed(stack), images={}, prune=False).effective, (
        "an earlier deploy wrote no tag"
    )


@pytest.mark.parametrize(("step", "image"), [(0, "app:1"), (1, "app:1"), (2, "app:2")])
def test_a_deploy_that_replaces_a_canary_is_rolled_back_to_the_tasks_that_the_canary_kept(
    step: int, image: str
) -> None:
    text = "services: {web: {image: %s, x-skep: {update: canary}}}"
    before, present = (deployed(a_stack(text % one)).services[0] for one in ("app:1", "app:2"))
    message = message_of(stages_of(present.spec.labels), step)
    canary = replace(
        present,
        previous_spec=before.spec,
        update_status=UpdateStatus(state=UpdateState.UPDATING, message=message),
    )
    existing = replace(deployed(a_stack(text % "app:2")), services=(canary,))
    plan = plan_of(a_stack(text % "app:3"), existing, images={}, prune=False)
    (change,) = plan.of("service", PlanAction.UPDATE)
    assert change.rolls_back_to is not None
    assert change.rolls_back_to.task_template.container_spec is not None
    assert change.rolls_back_to.task_template.container_spec.image == image


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("command: [sh, -c, sleep, '5']", "command: [sh, -c, sleep 5]"),
        ("command: [a, '']", "command: [a, ' ']"),
        ('command: ["\'a", "b\'"]', "command: [a b]"),
        ("environment: {A: 1 B=2}", "environment: {A: 1, B: 2}"),
        ("deploy: {}", "deploy: {labels: {a: ''}}"),
        ("labels: [a]", "labels: []"),
        ("logging: {driver: x}", "logging: {driver: x, options: {a: ''}}"),
        ("deploy: {mode: replicated, replicas: 0}", "deploy: {mode: global}"),
        ("deploy: {mode: global}", "deploy: {mode: global-job}"),
    ],
)
def test_specs_that_read_the_same_once_they_are_joined_differ(before: str, after: str) -> None:
    text = "services: {{web: {{image: w, {0}}}}}"
    was, wanted = (a_stack(text.format(one)) for one in (before, after))
    found = plan_of(wanted, deployed(was), images={}, prune=False)
    assert [one.name for one in found.of("service", PlanAction.UPDATE)] == ["shop_web"]
    assert not plan_of(was, deployed(was), images={}, prune=False).effective
