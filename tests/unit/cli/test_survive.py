"""``skep survive``: the table of losses, and when it ends with another exit code."""

from typing import Any

from skep.cli.output import Screen
from skep.cli.see.survive import survived
from skep.cli.see.what_if import DIFFERS


def a_loss(kind: str, name: str, **fields: Any) -> dict[str, Any]:
    empty = {"Down": [], "Reduced": [], "Interrupted": [], "WithoutData": [], "NotStartable": []}
    return {"Kind": kind, "Name": name, "Seconds": 0.0, **empty, **fields}


def test_losses_are_a_table_and_fatal_ones_an_exit_code() -> None:
    losses = [
        a_loss("node", "w1", Interrupted=["api"], Seconds=17.2),
        a_loss("zone", "b", Down=["db"], Note="no quorum is left, so nothing is replaced"),
        a_loss("volume", "data on w1", WithoutData=["db"]),
        a_loss("registry", "docker.io"),
    ]
    found = {"Services": ["api", "db"], "Losses": losses}
    assert list(survived(found).lines(Screen())) == [
        "2 services: 2 of 4 single losses take a service down, or its data away",
        "",
        "LOSS OF   NAME        RECOVERY  EFFECT",
        "node      w1          17 s      interrupted: api",
        "zone      b           -         down: db; no quorum is left, so nothing is replaced",
        "volume    data on w1  -         data lost: db",
        "registry  docker.io   -         survived",
    ]
    assert survived(found).exit_code == DIFFERS
    assert survived(found, ("zone",)).exit_code == DIFFERS
    assert survived(found, ("zone", "volume")).exit_code == 0
