"""After a rollback, by the user or by the leader, tasks get the newest credentials of the image's registry."""

from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from skep.manager.control.services import rollback_service
from skep.manager.services.spec_history import revisions
from skep.model.permissions.registry_auth import decoded_auth
from skep.model.service import Service, UpdateConfig, UpdateFailureAction, UpdateState
from skep.model.task import TaskState
from skep.model.values.times import timestamp
from skep.store.kinds import Payload, previous_registry_auth_id, registry_auth_id
from tests.support.builders import a_service, a_service_spec, an_auth
from tests.unit.manager.orchestrator.test_refused_changes import Led

NOW = timestamp(0)
OLD, NEW = "expired", "fresh"
UPDATE = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.ROLLBACK)

CASES = pytest.mark.parametrize(
    ("before", "after", "stored", "expected"),
    [
        ("r.example.com/app:1", "r.example.com/app:2", (NEW, OLD), NEW),
        ("app:1", "team/app:2", (NEW, OLD), NEW),
        ("r.example.com/app:1", "other.example.com/app:2", (NEW, OLD), OLD),
        ("r.example.com/app:1", "other.example.com/app:2", (NEW, None), None),
        ("r.example.com/app:1", "r.example.com/app:2", (NEW, None), NEW),
        ("r.example.com/app:1", "r.example.com/app:2", (None, OLD), OLD),
    ],
)


@pytest.fixture
def led() -> Iterator[Led]:
    it = Led()
    yield it
    it.close()


def keep(led: Led, current: str | None, previous: str | None) -> None:
    stored = {registry_auth_id("web"): current, previous_registry_auth_id("web"): previous}
    led.write(
        lambda tx: [
            tx.put(Payload(id=id, data=an_auth(username=name).encode()))
            for id, name in stored.items()
            if name is not None
        ]
    )


def kept(led: Led, id: str) -> str | None:
    payload = led.store.view().lookup(Payload, id)
    return decoded_auth(payload.data.decode())["username"] if payload is not None else None


@CASES
def test_the_leaders_rollback_keeps_the_newest_credentials_of_a_registry(
    led: Led, before: str, after: str, stored: tuple[str | None, str | None], expected: str | None
) -> None:
    old, new = (a_service_spec(update=UPDATE, image=image) for image in (before, after))
    led.write(lambda tx: tx.put(a_service(spec=old)))
    led.run_for(1)
    led.report(TaskState.RUNNING)
    led.write(lambda tx: tx.put(replace(tx.get(Service, "web"), spec=new, previous_spec=old)))
    keep(led, *stored)
    led.run_for(1)
    led.report(TaskState.READY)
    led.run_for(1)
    led.report(TaskState.FAILED)
    led.run_for(1)
    assert led.service.update_status is not None
    assert led.service.update_status.state in (UpdateState.ROLLBACK_STARTED, UpdateState.ROLLBACK_COMPLETED)
    assert led.service.spec == old
    assert kept(led, registry_auth_id("web")) == expected
    failed, present = revisions(led.store.view(), led.service)
    assert (failed.spec, present.spec, present.author.by) == (new, old, "cluster")


@CASES
def test_a_users_rollback_keeps_the_newest_credentials_of_a_registry(
    led: Led, before: str, after: str, stored: tuple[str | None, str | None], expected: str | None
) -> None:
    old, new = (a_service_spec(image=image) for image in (before, after))
    led.write(lambda tx: tx.put(replace(a_service(spec=new), previous_spec=old)))
    keep(led, *stored)
    version = led.service.version.index
    led.write(lambda tx: rollback_service(tx, led.service.id, new, version, now=NOW))
    assert led.service.spec == old
    assert kept(led, registry_auth_id("web")) == expected
    assert kept(led, previous_registry_auth_id("web")) == stored[0]
