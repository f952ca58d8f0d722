"""An event that uses little memory while no task waits for it."""

import asyncio


class Event:
    """``asyncio.Event`` without its deque of waiters, which takes 600 bytes when it is empty."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = False
        self._waiters: list[asyncio.Future[None]] | None = None

    def is_set(self) -> bool:
        """Return whether the event is set."""
        return self._is_set

    def set(self) -> None:
        """Set the event and wake up all waiting tasks."""
        self._is_set = True
        for waiter in self._waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        """Reset the event.  Later calls of ``wait`` wait again."""
        self._is_set = False

    async def wait(self) -> bool:
        """Return once the event is set, even if it is cleared right after that."""
        if self._is_set:
            return True
        waiter = asyncio.get_running_loop().create_future()
        self._waiters = [*(self._waiters or ()), waiter]
        try:
            await waiter
        finally:
            self._waiters = [other for other in self._waiters if other is not waiter] or None
        return True
