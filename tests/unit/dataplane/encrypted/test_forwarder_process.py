"""A plan that cannot be is said to whoever asked for it; the forwarder goes on, now and at its next start."""

from pathlib import Path
from typing import Any, cast

import msgspec

from skep.dataplane.encrypted.forwarder import Forwarder
from skep.dataplane.encrypted.plan import Plan
from skep.dataplane.encrypted.process import _answered, _resume
from skep.dataplane.encrypted.protocol import Apply, Refused
from skep.paths import Paths


class Odd:
    """Takes no plan."""

    def __init__(self) -> None:
        self.asked: list[Plan] = []

    def apply(self, plan: Plan) -> None:
        self.asked.append(plan)
        raise ValueError("'10.0.0.x' does not appear to be an IPv4 address")


def test_a_plan_that_cannot_be_ends_nothing(tmp_path: Path) -> None:
    paths, odd = Paths(tmp_path / "data", tmp_path), Odd()
    forwarder = cast("Forwarder", cast("Any", odd))
    plan = Plan(address="10.0.0.x")
    answer = _answered(paths, forwarder, Apply(plan))
    assert isinstance(answer, Refused)
    assert "10.0.0.x" in answer.message
    assert msgspec.msgpack.decode(paths.forwarder_plan.read_bytes(), type=Plan) == plan
    _resume(paths, forwarder)
    assert odd.asked == [plan, plan]
