"""The reference answers as a recorded engine does, and what differs from it is noticed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from sim import random_specs
from sim.reference import (
    Accepted,
    Create,
    Held,
    Refused,
    Remove,
    Request,
    Rollback,
    SetNode,
    State,
    Update,
    answer,
    fault_of,
)
from sim.responses import BY_HAND, ResponseCheck
from skep.model.container import SecretReference
from skep.model.ids import NodeId, SecretId, ServiceId
from skep.model.meta import Version
from skep.model.node import Availability, Node, NodeSpec
from skep.model.service import (
    EndpointSpec,
    GlobalJob,
    GlobalService,
    JobStatus,
    NetworkAttachmentConfig,
    PortConfig,
    PublishMode,
    Service,
    ServiceMode,
    ServiceSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateState,
    UpdateStatus,
)
from tests.sim.histories import OTHER, W1, History, a_node
from tests.support.builders import a_service_spec

RECORDED = Path(__file__).parents[1] / "conformance" / "recorded" / "in_swarm.json"
WEB = ServiceId("web")
SPEC = a_service_spec("web", replicas=2)
NEXT = a_service_spec("web", replicas=3)


def published(spec: ServiceSpec, mode: PublishMode) -> ServiceSpec:
    port = PortConfig(target_port=80, published_port=90, publish_mode=mode)
    return replace(spec, endpoint_spec=EndpointSpec(ports=(port,)))


def on_network(spec: ServiceSpec, id: str) -> ServiceSpec:
    networks = (NetworkAttachmentConfig(target=id),)
    return replace(spec, task_template=replace(spec.task_template, networks=networks))


def with_secret(spec: ServiceSpec, id: str) -> ServiceSpec:
    container = spec.task_template.container_spec
    assert container is not None
    secrets = (SecretReference(secret_id=SecretId(id), secret_name=id),)
    return replace(
        spec, task_template=replace(spec.task_template, container_spec=replace(container, secrets=secrets))
    )


THERE = State(
    services={
        WEB: Held(SPEC, None, 7),
        ServiceId("s0"): Held(published(a_service_spec("zero"), PublishMode.INGRESS), None, 5),
    },
    nodes={W1: (NodeSpec(), 4)},
    networks=frozenset({"x1"}),
)

Odd = Callable[[ServiceSpec], ServiceSpec]


@pytest.mark.parametrize(
    ("recorded", "odd"),
    [
        ("refused: a name that begins with a dash", random_specs._called),
        ("refused: no image", random_specs._without_image),
        ("refused: too little memory", random_specs._too_small),
        ("refused: a negative restart delay", random_specs._hurried),
        ("refused: a ratio over 1", random_specs._beyond_all),
        ("refused: a job with an update config", lambda spec: random_specs._beyond_all(a_job(spec))),
        ("refused: one port twice", random_specs._twice_published),
        ("odd: a constraint with one equals sign", random_specs._placed("node.labels.zone=north")),
        ("refused: a constraint with a bad value", random_specs._placed("node.role==~")),
        ("odd: a constraint with a blank in its key", random_specs._placed("node role==worker")),
    ],
)
def test_what_an_engine_refuses_the_reference_refuses_likewise(recorded: str, odd: Odd) -> None:
    status = status_of(recorded)
    assert answer(State(), Create(WEB, odd(SPEC))) == Refused(status)
    assert answer(THERE, Update(WEB, odd(SPEC), 7)) == Refused(status)


@pytest.mark.parametrize(
    ("recorded", "request_"),
    [
        ("a service with the same name", Create(ServiceId("s2"), SPEC)),
        ("a service with the name in another case", Create(ServiceId("s2"), a_service_spec("WEB"))),
        ("a stale update", Update(WEB, NEXT, 6)),
        ("another name", Update(WEB, replace(NEXT, name="web2"), 7)),
        ("another mode", Update(WEB, replace(NEXT, mode=ServiceMode(global_=GlobalService())), 7)),
        ("a rollback with nothing before", Rollback(WEB, 7)),
    ],
)
def test_what_does_not_fit_what_is_there_is_refused_as_by_an_engine(recorded: str, request_: Request) -> None:
    assert answer(THERE, request_) == Refused(status_of(recorded))


def status_of(recorded: str) -> int:
    (status,) = [one["status"] for one in json.loads(RECORDED.read_bytes()) if one["name"] == recorded]
    return int(status)


@pytest.mark.parametrize("constraint", random_specs.CONSTRAINTS)
def test_a_constraint_that_can_be_read_is_no_fault(constraint: str) -> None:
    assert fault_of(random_specs._placed(constraint)(SPEC)) is None


def a_job(spec: ServiceSpec) -> ServiceSpec:
    return replace(spec, mode=ServiceMode(global_job=GlobalJob()), update_config=None)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Create(ServiceId("s2"), a_service_spec("other")), Accepted(Held(a_service_spec("other"), None, 0))),
        (Create(ServiceId("s2"), a_service_spec("WEB")), Refused(409)),
        (Create(ServiceId("s2"), published(a_service_spec("other"), PublishMode.INGRESS)), Refused(400)),
        (Create(ServiceId("s2"), published(a_service_spec("web"), PublishMode.INGRESS)), Refused(409)),
        (Create(ServiceId("s2"), published(a_service_spec("other"), PublishMode.HOST)), Refused(400)),
        (Create(ServiceId("s2"), on_network(a_service_spec("other"), "gone")), Refused(404)),
        (Create(ServiceId("s2"), with_secret(a_service_spec("other"), "gone")), Refused(400)),
        (Update(WEB, NEXT, 7), Accepted(Held(NEXT, SPEC, 0))),
        (Update(WEB, NEXT, 6), Refused(500)),
        (Update(ServiceId("s2"), NEXT, 7), Refused(404)),
        (Update(WEB, replace(NEXT, name="web2"), 7), Refused(501)),
        (Update(WEB, replace(NEXT, mode=ServiceMode(global_=GlobalService())), 7), Refused(501)),
        (Update(WEB, on_network(NEXT, "x1"), 7), Accepted(Held(on_network(NEXT, "x1"), SPEC, 0))),
        (Update(WEB, on_network(NEXT, "gone"), 7), Refused(404)),
        (Update(WEB, with_secret(NEXT, "gone"), 7), Refused(400)),
        (Rollback(WEB, 7), Refused(400)),
        (Rollback(WEB, 6), Refused(500)),
        (Remove(WEB), Accepted()),
        (Remove(ServiceId("s2")), Refused(404)),
        (SetNode(W1, NodeSpec(), 4), Accepted()),
        (SetNode(W1, NodeSpec(), 3), Refused(500)),
        (SetNode(NodeId("w9"), NodeSpec(), 4), Refused(404)),
    ],
)
def test_the_reference_answers(request_: Request, expected: Accepted | Refused) -> None:
    assert answer(THERE, request_) == expected


def test_a_rollback_swaps_the_specs_and_runs_a_job_again() -> None:
    old, new = a_job(SPEC), a_job(NEXT)
    state = State(services={WEB: Held(new, old, 7, runs=1)})
    assert answer(state, Rollback(WEB, 7)) == Accepted(Held(old, new, 0, runs=2))


# -- what happens is compared with it --------------------------------------------------------------------------------


def a_watched_history() -> tuple[History, ResponseCheck]:
    """Service web is there, and node w1."""
    history = History()
    answers = ResponseCheck(history.state)
    history = History(answers)
    history.put(a_node(W1))
    answers.asked(Create(WEB, SPEC), answers.present)
    history.put(Service(id=WEB, spec=SPEC))
    assert history.violations == []
    return history, answers


def the_service(history: History) -> Service:
    return history.state.get(Service, WEB)


def version(history: History) -> int:
    return the_service(history).version.index


def test_an_update_that_is_done_as_asked_is_right_and_one_that_nobody_asked_for_is_not() -> None:
    history, answers = a_watched_history()
    asked = answers.asked(Update(WEB, NEXT, version(history)), answers.present)
    assert list(answers.accepted(asked)) == ["update of web was acknowledged and has not happened"]
    history.put(replace(the_service(history), spec=NEXT, previous_spec=SPEC))
    assert history.violations == []
    assert list(answers.accepted(asked)) == []
    history.put(replace(the_service(history), spec=SPEC, previous_spec=NEXT))
    assert history.violations == ["service web changed its specs by itself"]


def test_an_update_that_forgets_the_spec_before_is_rejected() -> None:
    history, answers = a_watched_history()
    answers.asked(Update(WEB, NEXT, version(history)), answers.present)
    history.put(replace(the_service(history), spec=NEXT))
    (violation,) = history.violations
    assert violation.startswith("update of web made ")


def test_an_update_of_an_older_version_that_is_taken_is_rejected() -> None:
    history, answers = a_watched_history()
    answers.asked(Update(WEB, NEXT, version(history) - 1), answers.present)
    history.put(replace(the_service(history), spec=NEXT, previous_spec=SPEC))
    assert history.violations == ["update of web has happened, which is to be refused with 500"]


def test_a_refusal_is_right_in_one_of_the_states_that_the_request_has_met() -> None:
    history, answers = a_watched_history()
    since = answers.present
    asked = answers.asked(Remove(WEB), since)
    assert list(answers.refused(asked, 404)) == ["remove of web was answered 404, not 200"]
    other = answers.asked(Remove(WEB), answers.present)
    late = answers.asked(Update(WEB, NEXT, version(history)), since)
    history.put(replace(the_service(history), removed_at="2020-01-01T00:00:00Z"))
    assert list(answers.accepted(other)) == []
    assert list(answers.refused(late, 404)) == []
    wrong = answers.asked(Update(WEB, NEXT, 1), answers.present)
    assert list(answers.refused(wrong, 500)) == ["update of web was answered 500, not 404"]


def test_of_two_removals_that_are_alike_one_is_acknowledged_and_one_refused_whichever_it_was() -> None:
    history, answers = a_watched_history()
    first, second = (answers.asked(Remove(WEB), answers.present) for _ in range(2))
    history.put(replace(the_service(history), removed_at="2020-01-01T00:00:00Z"))
    assert list(answers.refused(first, 404)) == []
    assert list(answers.accepted(second)) == []
    third = answers.asked(Remove(WEB), answers.present)
    assert list(answers.accepted(third)) == ["remove of web was acknowledged and has not happened"]


def test_what_was_refused_and_happens_all_the_same_is_rejected() -> None:
    history, answers = a_watched_history()
    asked = answers.asked(Update(WEB, NEXT, version(history)), answers.present)
    history.put(replace(the_service(history), spec=NEXT, previous_spec=SPEC))
    assert "update of web was refused with 500 and has happened" in list(answers.refused(asked, 500))


@pytest.mark.parametrize("action", list(UpdateFailureAction))
def test_a_service_goes_back_by_itself_only_if_its_settings_say_so(action: UpdateFailureAction) -> None:
    history, answers = a_watched_history()
    wish = replace(NEXT, update_config=UpdateConfig(failure_action=action))
    answers.asked(Update(WEB, wish, version(history)), answers.present)
    history.put(replace(the_service(history), spec=wish, previous_spec=SPEC))
    history.put(replace(the_service(history), spec=SPEC, previous_spec=None))
    is_right = action is UpdateFailureAction.ROLLBACK
    assert history.violations == ([] if is_right else ["service web changed its specs by itself"])


def test_a_rollback_by_hand_needs_somebody_who_asked_for_it() -> None:
    history, answers = a_watched_history()
    answers.asked(Update(WEB, NEXT, version(history)), answers.present)
    history.put(replace(the_service(history), spec=NEXT, previous_spec=SPEC))
    by_hand = UpdateStatus(state=UpdateState.ROLLBACK_STARTED, message=BY_HAND)
    back = replace(the_service(history), spec=SPEC, previous_spec=NEXT, update_status=by_hand)
    answers.asked(Rollback(WEB, version(history)), answers.present)
    history.put(back)
    assert history.violations == []
    later = replace(by_hand, started_at="2020-01-01T00:00:00Z")
    history.put(replace(the_service(history), spec=NEXT, previous_spec=SPEC, update_status=later))
    assert history.violations == ["web was changed, which nobody asked for"]


def test_a_job_that_is_updated_and_not_run_again_is_rejected() -> None:
    history = History()
    answers = ResponseCheck(history.state)
    history = History(answers)
    answers.asked(Create(WEB, a_job(SPEC)), answers.present)
    history.put(Service(id=WEB, spec=a_job(SPEC), job_status=JobStatus()))
    again = replace(a_job(SPEC), labels={"request": "1"})
    answers.asked(Update(WEB, again, version(history)), answers.present)
    updated = replace(the_service(history), spec=again, previous_spec=a_job(SPEC))
    assert updated.job_status == JobStatus(job_iteration=Version())
    history.put(updated)
    (violation,) = history.violations
    assert violation.startswith("update of web made ")


def test_a_node_that_changes_without_a_wish_is_rejected() -> None:
    history, answers = a_watched_history()
    node = history.state.get(Node, W1)
    drained = replace(node.spec, availability=Availability.DRAIN)
    answers.asked(SetNode(W1, drained, node.version.index), answers.present)
    history.put(replace(node, spec=drained), by=OTHER)
    assert history.violations == []
    history.put(replace(history.state.get(Node, W1), spec=NodeSpec()))
    assert history.violations == ["w1 was changed, which nobody asked for"]
