"""Operations of users on registers, which are the values of some keys, with their results."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from math import inf
from typing import Any

from msgspec.structs import replace

from sim.invariants.linearizable import Operation, is_linearizable
from skep.errors import FailedPrecondition, NotFound, SkepError
from skep.store.interface import Transaction
from skep.store.kinds import Payload


class Registers:
    """The history of operations on the registers."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._operations: dict[str, list[Operation]] = defaultdict(list)

    async def record_swap(self, key: str, value: bytes, work: Awaitable[bytes | None]) -> None:
        operation = Operation(self._now(), inf, writes=value.decode(), is_write=True)
        await self._await_result(key, operation, work)

    async def swapped_each(self, items: list[tuple[str, bytes]], work: Awaitable[Any]) -> None:
        began = self._now()
        outcomes = await work
        for (key, value), outcome in zip(items, outcomes, strict=True):
            operation = Operation(began, inf, writes=value.decode(), is_write=True)
            self._note(key, operation, outcome)

    async def record_compare(
        self, key: str, expected: bytes, value: bytes, work: Awaitable[bytes | None]
    ) -> None:
        operation = Operation(
            self._now(), inf, expects=expected.decode(), is_seen=True, writes=value.decode(), is_write=True
        )
        try:
            await work
        except _IsAnother as error:
            seen = error.value.decode() if error.value is not None else None
            self._operations[key].append(Operation(operation.began, self._now(), expects=seen, is_seen=True))
        except SkepError:
            self._operations[key].append(operation)
        else:
            self._operations[key].append(replace(operation, returned=self._now()))

    async def record_delete(self, key: str, work: Awaitable[bytes | None]) -> None:
        """Delete a register.  The removed value is not recorded: after a lost response a retry may have removed
        another one.
        """
        began = self._now()
        try:
            await work
        except NotFound:
            self._operations[key].append(Operation(began, self._now(), is_seen=True))
        except SkepError:
            self._operations[key].append(Operation(began, inf, is_write=True))
        else:
            self._operations[key].append(Operation(began, self._now(), is_write=True))

    def record_read(self, key: str, began: float, found: bytes | None) -> None:
        seen = found.decode() if found is not None else None
        self._operations[key].append(Operation(began, self._now(), expects=seen, is_seen=True))

    def violations(self) -> Iterable[str]:
        """Yield the registers whose history is not linearizable."""
        for key, operations in sorted(self._operations.items()):
            seen = {one.expects for one in operations if one.is_seen}
            # An operation of unknown outcome whose value was never read may have had no effect.
            relevant = [one for one in operations if one.returned < inf or one.writes in seen]
            if not is_linearizable(relevant):
                yield f"the operations on {key} are not linearizable: {relevant}"

    async def _await_result(self, key: str, operation: Operation, work: Awaitable[bytes | None]) -> None:
        try:
            outcome: bytes | SkepError | None = await work
        except SkepError as error:
            outcome = error
        self._note(key, operation, outcome)

    def _note(self, key: str, operation: Operation, outcome: bytes | SkepError | None) -> None:
        match outcome:
            case NotFound():
                self._operations[key].append(Operation(operation.began, self._now(), is_seen=True))
            case SkepError():
                self._operations[key].append(operation)
            case before:
                seen = before.decode() if before is not None else None
                self._operations[key].append(
                    replace(operation, returned=self._now(), expects=seen, is_seen=True)
                )


class _IsAnother(FailedPrecondition):
    """The register does not hold the expected value."""

    def __init__(self, value: bytes | None) -> None:
        super().__init__(f"it is {value!r}")
        self.value = value


def swap(tx: Transaction, key: str, value: bytes) -> bytes | None:
    before = tx.rely_on(Payload, key)
    tx.put(Payload(id=key, data=value))
    return before.data if before is not None else None


def swap_each(tx: Transaction, item: tuple[str, bytes]) -> bytes | None:
    return swap(tx, *item)


def compare(tx: Transaction, key: str, expected: bytes, value: bytes) -> None:
    present = tx.rely_on(Payload, key)
    if present is None or present.data != expected:
        raise _IsAnother(present.data if present is not None else None)
    tx.put(Payload(id=key, data=value))


def delete(tx: Transaction, key: str) -> bytes | None:
    before = tx.get(Payload, key)
    tx.delete(Payload, key)
    return before.data
