"""What a wait of the playground says if its condition does not come true."""

import pytest

from skep.errors import Unavailable
from skep.playground.commands import wait_until


async def test_a_wait_that_fails_names_the_condition_and_the_next_step() -> None:
    async def never() -> bool:
        return False

    with pytest.raises(Unavailable) as refused:
        await wait_until(never, "every node is ready", 0.05)
    assert str(refused.value) == (
        "This did not happen in time (0.05 s): every node is ready. "
        "Run skep playground ps to see which nodes respond, then rerun the command."
    )


async def test_the_next_step_is_one_that_is_accepted() -> None:
    """A playground that came up in part refuses a second ``up``."""

    async def never() -> bool:
        return False

    with pytest.raises(Unavailable, match=r"respond, then run skep playground down and rerun the command\.$"):
        await wait_until(never, "m1 serves its API", 0.05, "run skep playground down and rerun the command")
