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
