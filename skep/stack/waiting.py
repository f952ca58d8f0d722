"""Waiting until services are on their spec, with their progress shown."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial

from skep.api.waiting import persistently
from skep.errors import Unavailable
from skep.stack.progress import ServiceProgress

_LOOK_S = 0.5


async def wait_done(
    names: Iterable[str],
    look: Callable[[set[str]], Awaitable[Mapping[str, ServiceProgress]]],
    show: Callable[[str, str], None],
) -> None:
    """Look at the services ``names`` until all are done; ``show``: called with what each look finds.

    Raises: Unavailable: one does not go on by itself; what the first ``look`` raises.
    """
    waiting = set(names)
    looked = await look(waiting) if waiting else {}
    while waiting:
        for name, found in looked.items():
            if name not in waiting:
                continue
            if found.is_stuck:
                raise Unavailable(f"{name}: {found.text} (skep explain {name})")
            show(name, found.text)
            if found.is_done:
                waiting.discard(name)
        if waiting:
            await asyncio.sleep(_LOOK_S)
            looked = await persistently(partial(look, waiting), partial(show, "managers"))
