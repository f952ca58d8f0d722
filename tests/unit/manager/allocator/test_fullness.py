"""A nearly full network is reported once, until it has had room again."""

from structlog.testing import capture_logs

from skep.manager.allocator.addresses import AddressAllocations
from skep.manager.allocator.state import FullnessWarnings
from tests.support.builders import an_overlay

NET = an_overlay("net1", subnet="10.0.1.0/29")  # five addresses


def test_it_is_said_once_and_again_after_there_was_room() -> None:
    allocations, fullness = AddressAllocations(), FullnessWarnings()
    said: list[str] = []

    def allocate(owner: str) -> None:
        allocations.allocate(owner, NET)
        with capture_logs() as logs:
            fullness.check([NET, None], allocations)
        said.extend(f"{owner}: {entry['network']}: {entry['usage']}" for entry in logs)

    for owner in "abcde":
        allocate(owner)
    assert said == ["d: net1: 4 of 5 addresses are in use"]
    for owner in "abc":
        allocations.release(owner)
    allocate("f")
    allocate("g")
    assert said[1:] == ["g: net1: 4 of 5 addresses are in use"]
