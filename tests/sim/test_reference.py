"""The reference answers as a recorded engine does, and what differs from it is noticed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from sim.users import random_specs
from sim.users.reference import (
    Accepted,
    Create,
    Refused,
    Remove,
    Request,
    Rollback,
    ServiceState,
    SetNode,
    State,
    Update,
    rejection_of,
    respond,
)
from sim.users.responses import MANUAL_ROLLBACK, ResponseCheck
from skep.model.container import SecretReference
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
from skep.model.values.ids import NodeId, SecretId, ServiceId
from skep.model.values.meta import Version
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
        WEB: ServiceState(SPEC, None, 7),
        ServiceId("s0"): ServiceState(published(a_service_spec("zero"), PublishMode.INGRESS), None, 5),
    },
    nodes={W1: (NodeSpec(), 4)},
    networks=frozenset({"x1"}),
)

Invalidate = Callable[[ServiceSpec], ServiceSpec]


@pytest.mark.parametrize(
    ("recorded", "invalidate"),
    [
        ("refused: a name that begins with a dash", random_specs.misnamed),
        ("refused: no image", random_specs.without_image),
        ("refused: too little memory", random_specs.with_too_little_memory),
        ("refused: a negative restart delay", random_specs.with_negative_delay),
        ("refused: a ratio over 1", random_specs.with_ratio_over_one),
        ("refused: a job with an update config", lambda spec: random_specs.with_ratio_over_one(a_job(spec))),
        ("refused: one port twice", random_specs.twice_published),
        ("odd: a constraint with one equals sign", random_specs.placed_by("node.labels.zone=north")),
        ("refused: a constraint with a bad value", random_specs.placed_by("node.role==~")),
        ("odd: a constraint with a blank in its key", random_specs.placed_by("node role==worker")),
    ],
)
def test_the_reference_refuses_the_same_specs_as_an_engine(recorded: str, invalidate: Invalidate) -> None:
    status = status_of(recorded)
    assert respond(State(), Create(WEB, invalidate(SPEC))) == Refused(status)
    assert respond(THERE, Update(WEB, invalidate(SPEC), 7)) == Refused(status)


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
def test_the_reference_refuses_conflicting_requests_as_an_engine(recorded: str, request_: Request) -> None:
    assert respond(THERE, request_) == Refused(status_of(recorded))


def status_of(recorded: str) -> int:
    (status,) = [one["status"] for one in json.loads(RECORDED.read_bytes()) if one["name"] == recorded]
    return int(status)


@pytest.mark.parametrize("constraint", random_specs.CONSTRAINTS)
def test_valid_constraints_are_accepted(constraint: str) -> None:
    assert rejection_of(random_specs.placed_by(constraint)(SPEC)) is None


def a_job(spec: ServiceSpec) -> ServiceSpec:
    return replace(spec, mode=ServiceMode(global_job=GlobalJob()), update_config=None)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (
            Create(ServiceId("s2"), a_service_spec("other")),
            Accepted(ServiceState(a_service_spec("other"), None, 0)),
        ),
        (Create(ServiceId("s2"), a_service_spec("WEB")), Refused(409)),
        (Create(ServiceId("s2"), published(a_service_spec("other"), PublishMode.INGRESS)), Refused(400)),
        (Create(ServiceId("s2"), published(a_service_spec("web"), PublishMode.INGRESS)), Refused(409)),
        (Create(ServiceId("s2"), published(a_service_spec("other"), PublishMode.HOST)), Refused(400)),
        (Create(ServiceId("s2"), on_network(a_service_spec("other"), "gone")), Refused(404)),
        (Create(ServiceId("s2"), with_secret(a_service_spec("other"), "gone")), Refused(400)),
        (Update(WEB, NEXT, 7), Accepted(ServiceState(NEXT, SPEC, 0))),
        (Update(WEB, NEXT, 6), Refused(500)),
        (Update(ServiceId("s2"), NEXT, 7), Refused(404)),
        (Update(WEB, replace(NEXT, name="web2"), 7), Refused(501)),
        (Update(WEB, replace(NEXT, mode=ServiceMode(global_=GlobalService())), 7), Refused(501)),
        (Update(WEB, on_network(NEXT, "x1"), 7), Accepted(ServiceState(on_network(NEXT, "x1"), SPEC, 0))),
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
    assert respond(THERE, request_) == expected


def test_a_rollback_swaps_the_specs_and_runs_a_job_again() -> None:
    old, new = a_job(SPEC), a_job(NEXT)
    state = State(services={WEB: ServiceState(new, old, 7, runs=1)})
    assert respond(state, Rollback(WEB, 7)) == Accepted(ServiceState(old, new, 0, runs=2))


def test_an_update_that_starts_a_service_has_a_spec_before_it_without_the_stop() -> None:
    stopped = replace(SPEC, labels={**SPEC.labels, "skep.stopped": "true"})
    state = State(services={WEB: ServiceState(stopped, None, 7)})
    assert respond(state, Update(WEB, NEXT, 7)) == Accepted(ServiceState(NEXT, SPEC, 0))
    still = replace(NEXT, labels=stopped.labels)
    assert respond(state, Update(WEB, still, 7)) == Accepted(ServiceState(still, stopped, 0))


# -- what happens is compared with it --------------------------------------------------------------------------------


def a_watched_history() -> tuple[History, ResponseCheck]:
    """Service web is there, and node w1."""
    history = History()
    responses = ResponseCheck(history.state)
    history = History(responses)
    history.put(a_node(W1))
    responses.requested(Create(WEB, SPEC), responses.present)
    history.put(Service(id=WEB, spec=SPEC))
    assert history.violations == []
    return history, responses


def the_service(history: History) -> Service:
    return history.state.get(Service, WEB)


def version(history: History) -> int:
    return the_service(history).version.index


def test_an_update_needs_a_matching_request() -> None:
    history, responses = a_watched_history()
    asked = responses.requested(Update(WEB, NEXT, version(history)), responses.present)
    assert list(responses.accepted(asked)) == ["update of web was acknowledged and has not taken effect"]
    history.put(replace(the_service(history), spec=NEXT, previous_spec=SPEC))
    assert history.violations == []
    assert list(responses.accepted(asked)) == []
    history.put(replace(the_service(history), spec=SPEC, previous_spec=NEXT))
    assert history.violations == ["the specs of service web were changed without a request"]


def test_an_update_that_forgets_the_spec_before_is_rejected() -> None:
    history, responses = a_watched_history()
    responses.requested(Update(WEB, NEXT, version(history)), responses.present)
    history.put(replace(the_service(history), spec=NEXT))
    (violation,) = history.violations
    assert violation.startswith("update of web made ")


def test_an_accepted_update_of_an_older_version_is_rejected() -> None:
    history, responses = a_watched_history()
    responses.requested(Update(WEB, NEXT, version(history) - 1), responses.present)
    history.put(replace(the_service(history), spec=NEXT, previous_spec=SPEC))
    assert history.violations == ["update of web has taken effect, but must be refused with 500"]


def test_a_refusal_must_match_one_of_the_states_during_the_request() -> None:
    history, responses = a_watched_history()
    since = responses.present
    asked = responses.requested(Remove(WEB), since)
    assert list(responses.refused(asked, 404)) == ["remove of web got status 404, not 200"]
    other = responses.requested(Remove(WEB), responses.present)
    late = responses.requested(Update(WEB, NEXT, version(history)), since)
    history.put(replace(the_service(history), removed_at="2020-01-01T00:00:00Z"))
    assert list(responses.accepted(other)) == []
    assert list(responses.refused(late, 404)) == []
    wrong = responses.requested(Update(WEB, NEXT, 1), responses.present)
    assert list(responses.refused(wrong, 500)) == ["update of web got status 500, not 404"]


def test_of_two_equal_removals_either_may_be_refused() -> None:
    history, responses = a_watched_history()
    first, second = (responses.requested(Remove(WEB), responses.present) for _ in range(2))
    history.put(replace(the_service(history), removed_at="2020-01-01T00:00:00Z"))
    assert list(responses.refused(first, 404)) == []
    assert list(responses.accepted(second)) == []
    third = responses.requested(Remove(WEB), responses.present)
    assert list(responses.accepted(third)) == ["remove of web was acknowledged and has not taken effect"]


def test_a_refused_request_that_takes_effect_is_rejected() -> None:
    history, responses = a_watched_history()
    asked = responses.requested(Update(WEB, NEXT, version(history)), responses.present)
    history.put(replace(the_service(history), spec=NEXT, previous_spec=SPEC))
    assert "update of web was refused with 500 and has taken effect" in list(responses.refused(asked, 500))


@pytest.mark.parametrize("action", list(UpdateFailureAction))
def test_an_automatic_rollback_needs_the_failure_action(action: UpdateFailureAction) -> None:
    history, responses = a_watched_history()
    requested_spec = replace(NEXT, update_config=UpdateConfig(failure_action=action))
    responses.requested(Update(WEB, requested_spec, version(history)), responses.present)
    history.put(replace(the_service(history), spec=requested_spec, previous_spec=SPEC))
    history.put(replace(the_service(history), spec=SPEC, previous_spec=None))
    is_right = action is UpdateFailureAction.ROLLBACK
    assert history.violations == (
        [] if is_right else ["the specs of service web were changed without a request"]
    )


def test_a_manual_rollback_needs_a_request() -> None:
    history, responses = a_watched_history()
    responses.requested(Update(WEB, NEXT, version(history)), responses.present)
    history.put(replace(the_service(history), spec=NEXT, previous_spec=SPEC))
    by_hand = UpdateStatus(state=UpdateState.ROLLBACK_STARTED, message=MANUAL_ROLLBACK)
    back = replace(the_service(history), spec=SPEC, previous_spec=NEXT, update_status=by_hand)
    responses.requested(Rollback(WEB, version(history)), responses.present)
    history.put(back)
    assert history.violations == []
    later = replace(by_hand, started_at="2020-01-01T00:00:00Z")
    history.put(replace(the_service(history), spec=NEXT, previous_spec=SPEC, update_status=later))
    assert history.violations == ["web was changed without a request"]


def test_a_job_that_is_updated_and_not_run_again_is_rejected() -> None:
    history = History()
    responses = ResponseCheck(history.state)
    history = History(responses)
    responses.requested(Create(WEB, a_job(SPEC)), responses.present)
    history.put(Service(id=WEB, spec=a_job(SPEC), job_status=JobStatus()))
    again = replace(a_job(SPEC), labels={"request": "1"})
    responses.requested(Update(WEB, again, version(history)), responses.present)
    updated = replace(the_service(history), spec=again, previous_spec=a_job(SPEC))
    assert updated.job_status == JobStatus(job_iteration=Version())
    history.put(updated)
    (violation,) = history.violations
    assert violation.startswith("update of web made ")


def test_an_older_request_of_unknown_outcome_is_not_taken_for_an_equal_change_of_now() -> None:
    history, responses = a_watched_history()
    node = history.state.get(Node, W1)
    drained = replace(node.spec, availability=Availability.DRAIN)
    responses.requested(SetNode(W1, drained, node.version.index - 1), responses.present)
    asked = responses.requested(SetNode(W1, drained, node.version.index), responses.present)
    history.put(replace(node, spec=drained))
    assert history.violations == []
    assert list(responses.accepted(asked)) == []


def test_a_change_of_a_node_without_a_request_is_rejected() -> None:
    history, responses = a_watched_history()
    node = history.state.get(Node, W1)
    drained = replace(node.spec, availability=Availability.DRAIN)
    responses.requested(SetNode(W1, drained, node.version.index), responses.present)
    history.put(replace(node, spec=drained), by=OTHER)
    assert history.violations == []
    history.put(replace(history.state.get(Node, W1), spec=NodeSpec()))
    assert history.violations == ["w1 was changed without a request"]
