"""The reboot lock: who gets it, who is refused, and how an overdue one is shown."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from skep.api.client.client import ApiClient
from skep.api.client.requests import Requests
from skep.cli.maintain.maintenance import (
    LockHolder,
    change_by_nodes,
    described,
    overdue,
    read,
    taken,
    written,
)
from skep.cli.maintain.reboot_lock import _release_one
from skep.cli.maintain.upgrade_plan import UpgradableNode
from skep.errors import FailedPrecondition, InvalidArgument, OutOfSequence
from skep.model.options.labels import MAINTENANCE

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
WORKERS = [UpgradableNode(id=f"id-{name}", name=name) for name in ("w1", "w2")]
MANAGERS = [UpgradableNode(id=f"id-{name}", name=name, is_manager=True) for name in ("m1", "m2", "m3")]
MEMBERS = [*MANAGERS, *WORKERS]


def a_holder(node: str, *, minutes: float = 30, is_upgrade: bool = False, by: str = "ops@desk") -> LockHolder:
    return LockHolder(
        node=node and f"id-{node}", by=by, until=NOW + timedelta(minutes=minutes), is_upgrade=is_upgrade
    )


def test_a_free_lock_is_given_and_survives_being_written() -> None:
    holders = taken((), a_holder("w1"), MEMBERS, NOW)
    assert holders == (a_holder("w1"),)
    assert read(written(holders)) == holders
    assert written(()) == ""


def test_a_second_node_is_refused_with_the_first_ones_name_and_the_same_one_renews_it() -> None:
    held = (a_holder("w1", minutes=5),)
    words = r"held by ops@desk for w1 for another 5 minutes\. Wait, or run skep reboot-lock release w1\.$"
    with pytest.raises(FailedPrecondition, match=words):
        taken(held, a_holder("w2"), MEMBERS, NOW)
    assert taken(held, a_holder("w1"), MEMBERS, NOW) == (a_holder("w1"),)


def test_as_many_as_are_allowed_at_once_get_it() -> None:
    held = (a_holder("w1"),)
    assert taken(held, a_holder("w2"), MEMBERS, NOW, at_once=2) == (*held, a_holder("w2"))


def test_an_overdue_one_may_be_taken_over() -> None:
    assert taken((a_holder("w1", minutes=-1),), a_holder("w2"), MEMBERS, NOW) == (a_holder("w2"),)


def test_a_reboot_and_an_upgrade_exclude_each_other_both_ways() -> None:
    upgrade = a_holder("", is_upgrade=True)
    with pytest.raises(
        FailedPrecondition, match=r"an upgrade is held by .* Wait, or run skep upgrade --abort\."
    ):
        taken((upgrade,), a_holder("w1"), MEMBERS, NOW)
    with pytest.raises(FailedPrecondition, match="the reboot lock is held"):
        taken((a_holder("w1"),), upgrade, MEMBERS, NOW, at_once=5)


def test_a_second_upgrade_is_refused_and_the_same_one_renews() -> None:
    held = (a_holder("w1", is_upgrade=True, by="a"),)
    with pytest.raises(FailedPrecondition, match="an upgrade is held by a for w1"):
        taken(held, a_holder("", is_upgrade=True, by="b"), MEMBERS, NOW)
    assert taken(held, a_holder("w2", is_upgrade=True, by="a"), MEMBERS, NOW)[0].node == "id-w2"


def test_a_manager_is_refused_while_another_is_away_or_may_be() -> None:
    away = [UpgradableNode(id="id-m2", name="m2", is_manager=True, is_ready=False)]
    with pytest.raises(FailedPrecondition, match="the manager m2 is unreachable"):
        taken((), a_holder("m1"), [MANAGERS[0], *away, MANAGERS[2]], NOW)
    with pytest.raises(FailedPrecondition, match="the manager m2 is unreachable"):
        taken((a_holder("m2"),), a_holder("m1"), MEMBERS, NOW, at_once=2)


def test_the_longer_it_is_overdue_the_louder_it_is_shown() -> None:
    gone = [UpgradableNode(id="id-w1", name="w1", is_ready=False)]
    assert described(a_holder("w1", minutes=-5), gone, NOW).endswith("for w1, overdue for 5 minutes")
    assert described(a_holder("w1", minutes=-150), gone, NOW).endswith(
        "OVERDUE for 2 hours: THE NODE IS STILL NOT READY"
    )
    assert described(a_holder("w1", minutes=-150), MEMBERS, NOW).endswith(
        "OVERDUE for 2 hours: it was not released"
    )
    assert list(overdue((a_holder("w2"),), MEMBERS, NOW)) == []


def test_a_damaged_label_is_an_error_that_says_how_to_go_on() -> None:
    with pytest.raises(FailedPrecondition, match="Remove it with skep reboot-lock release --all"):
        read("{")


class Racing:
    """A manager at which the lock is written by someone else, and a node goes down, while this client decides."""

    def __init__(self) -> None:
        self.reads = 0
        self.written: list[str] = []

    async def get(self, path: str, **_: object) -> Any:
        if path == "/swarm":
            self.reads += 1
            return {"Version": {"Index": self.reads}, "Spec": {"Labels": {}}}
        if path == "/info":
            return {"SystemTime": (NOW + timedelta(hours=self.reads)).isoformat()}
        state = "ready" if self.reads < 2 else "down"
        return [
            {
                "ID": "id-m1",
                "Description": {"Hostname": "m1"},
                "Status": {"State": state},
                "Spec": {"Role": "manager"},
            }
        ]

    async def post(self, path: str, spec: Mapping[str, Any], **_: object) -> None:
        if self.reads < 2:
            raise OutOfSequence("update out of sequence")
        self.written.append(spec["Labels"][MAINTENANCE])


async def test_each_attempt_to_take_the_lock_decides_by_the_present_nodes_and_time() -> None:
    client, seen = Racing(), list[tuple[bool, datetime]]()

    def decide(text: str, members: Sequence[UpgradableNode], now: datetime) -> str:
        seen.append((members[0].is_ready, now))
        return f"held until {now:%H}"

    await change_by_nodes(cast("Requests", client), decide)
    assert seen == [(True, NOW + timedelta(hours=1)), (False, NOW + timedelta(hours=2))]
    assert client.written == ["held until 05"]


class Holding:
    """A manager where m1 holds the lock."""

    def __init__(self) -> None:
        self.lock = written((a_holder("m1"),))

    async def get(self, path: str, **_: object) -> Any:
        if path == "/swarm":
            return {"Version": {"Index": 1}, "Spec": {"Labels": {MAINTENANCE: self.lock}}}
        if path == "/info":
            return {"SystemTime": NOW.isoformat()}
        return [
            {"ID": one.id, "Description": {"Hostname": one.name}, "Status": {"State": "ready"}, "Spec": {}}
            for one in MEMBERS
        ]

    async def post(self, path: str, spec: Mapping[str, Any], **_: object) -> None:
        self.lock = spec["Labels"].get(MAINTENANCE, "")


async def test_a_release_for_a_node_that_does_not_hold_the_lock_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = Holding()
    await _release_one(cast("ApiClient", client), "w1")
    assert "w1 does not hold the lock. Run skep reboot-lock status" in capsys.readouterr().err
    assert client.lock
    await _release_one(cast("ApiClient", client), "m1")
    assert (client.lock, capsys.readouterr().err) == ("", "")


async def test_the_lock_of_a_removed_node_is_released_by_its_id() -> None:
    client = Holding()
    client.lock = written((a_holder("m1"), a_holder("removed")))
    await _release_one(cast("ApiClient", client), "id-removed")
    assert read(client.lock) == (a_holder("m1"),)
    with pytest.raises(InvalidArgument, match="no node is called 'id-removed'"):
        await _release_one(cast("ApiClient", client), "id-removed")
