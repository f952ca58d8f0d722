"""The rules on revisions and on notifications: each rejects what is wrong."""

import asyncio
from random import Random

from msgspec.structs import replace

from sim.invariants.services.revisions import RevisionsAreKept
from sim.users.receivers import TARGET, Receiver
from skep.manager.notify.messages import Message
from skep.manager.notify.records import Incident, Notice
from skep.manager.services.spec_history import keep_spec
from skep.model.options.notifications import Topic
from skep.model.service import ReplicatedService, Service, ServiceMode, SpecAuthor
from skep.model.values.ids import ServiceId
from skep.store.interface import Transaction
from skep.store.kinds import Payload, spec_history_id
from tests.sim.histories import History
from tests.support.builders import a_service_spec

WEB = ServiceId("web")
NOTICE = Notice(
    status="began",
    incident=Incident(id="i1", key="k", topic=Topic.NODE, message="w1 is down", began_ns=1, reminded_ns=1),
    at_ns=1,
)


def change(history: History, replicas: int, *, keeps: bool = True) -> None:
    """Update the service, as a request does, or without its revision."""

    def body(tx: Transaction) -> None:
        service = tx.get(Service, WEB)
        mode = ServiceMode(replicated=ReplicatedService(replicas=replicas))
        spec = replace(service.spec, mode=mode)
        if keeps:
            keep_spec(tx, service, spec, SpecAuthor())
        tx.put(replace(service, spec=spec, author=SpecAuthor(by=f"root@{replicas}")))

    history.commit(body)


def a_history() -> History:
    history = History(RevisionsAreKept())
    history.put(Service(id=WEB, spec=a_service_spec("web", replicas=0)))
    return history


def test_twenty_specs_in_a_row_are_ten_revisions() -> None:
    history = a_history()
    for replicas in range(1, 21):
        change(history, replicas)
    assert history.violations == []


def test_a_spec_that_is_no_revision_is_rejected() -> None:
    history = a_history()
    change(history, 1)
    change(history, 2, keeps=False)
    assert history.violations == ["the former spec of web is not among its revisions [1, 2]"]


def test_a_number_that_is_used_again_is_rejected() -> None:
    history = a_history()
    change(history, 1)
    history.commit(lambda tx: tx.delete(Payload, spec_history_id(WEB)))
    change(history, 2)
    assert history.violations == ["revision 1 of web is another spec than before"]


def received(*messages: Message | None) -> list[str]:
    """Return the violations when messages reach a receiver, repeated until it accepts each one.  None: a restore."""
    found: list[str] = []
    receiver = Receiver(Random(1), lambda violations: found.extend(violations), slow_s=0.0)

    async def send() -> None:
        for message in messages:
            if message is None:
                receiver.restore()
                continue
            while await receiver.notify(TARGET, message):
                pass

    asyncio.run(send())
    return found


def a_message(id: str, *notices: Notice) -> Message:
    return Message(id=id, cluster="", cluster_id="", at_ns=1, notices=notices, missed=0)


def test_a_notice_that_is_told_in_two_messages_is_rejected() -> None:
    ended = replace(NOTICE, status="ended")
    assert received(a_message("1", NOTICE), a_message("1", NOTICE), a_message("2", ended)) == []
    assert received(a_message("1", NOTICE), a_message("2", NOTICE)) == [
        "incident i1 is told 2 times when it begins, 0 times when it ends"
    ]


def test_a_notice_may_be_told_again_after_a_restore_and_an_id_means_the_same_content() -> None:
    other = a_message("1", replace(NOTICE, at_ns=2))
    assert received(a_message("1", NOTICE), None, a_message("2", NOTICE)) == []
    assert received(a_message("1", NOTICE), None, other) == ["a copy of notification 1 has another content"]


def test_a_copy_with_another_content_is_rejected() -> None:
    assert received(a_message("1", NOTICE), a_message("1", replace(NOTICE, at_ns=2))) == [
        "a copy of notification 1 has another content"
    ]
