"""Waiting for services goes on while no manager answers."""

import pytest

from skep.api import waiting as api_waiting
from skep.errors import Unavailable
from skep.stack import waiting
from skep.stack.progress import ServiceProgress
from skep.stack.waiting import wait_done


class Managers:
    """They answer ``looks`` one after the other."""

    def __init__(self, *looks: ServiceProgress | Exception) -> None:
        self._looks = list(looks)

    async def look(self, names: set[str]) -> dict[str, ServiceProgress]:
        found = self._looks.pop(0)
        if isinstance(found, Exception):
            raise found
        return dict.fromkeys(names, found)


async def test_a_change_of_leader_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_waiting, "_FIRST_S", 0.01)
    monkeypatch.setattr(waiting, "_LOOK_S", 0.0)
    gone, shown = Unavailable("no leader"), []
    managers = Managers(
        ServiceProgress("1 of 2"), gone, gone, OSError("reset"), ServiceProgress("2 of 2", is_done=True)
    )
    await wait_done(["web"], managers.look, lambda name, text: shown.append((name, text)))
    assert shown == [
        ("web", "1 of 2"),
        ("managers", "no response, trying again: no leader"),
        ("managers", "no response, trying again: reset"),
        ("web", "2 of 2"),
    ]


async def test_an_address_where_nothing_answers_is_an_error_at_once() -> None:
    with pytest.raises(Unavailable):
        await wait_done(["web"], Managers(Unavailable("nothing there")).look, lambda *_: None)


async def test_what_does_not_go_on_is_an_error_that_names_the_next_step_and_is_not_shown_before() -> None:
    shown: list[str] = []
    managers = Managers(ServiceProgress("update paused due to t", is_stuck=True))
    with pytest.raises(Unavailable, match=r"^web: update paused due to t \(skep explain web\)$"):
        await wait_done(["web"], managers.look, lambda _, text: shown.append(text))
    assert shown == []
