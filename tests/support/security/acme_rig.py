"""A leader that orders certificates from a real authority (Pebble), with a store in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.acme.calls import AuthorityCalls
from skep.manager.acme.loop import Certificates
from skep.manager.acme.records import (
    AcmeAccount,
    HostCertificate,
    account_in,
    challenges_in,
    record_id,
    record_in,
    records_in,
)
from skep.manager.acme.steps import OrderPending, Outcome, Wanted
from skep.manager.acme.writing import configure
from skep.security.keys import new_private_key, private_pem
from skep.store.interface import Transaction
from skep.store.kinds import Payload, write_record
from skep.store.level import LEVEL
from skep.store.memory import MemoryStore
from tests.support.security.pebble import Front, pebble

APP = "app.example.com"
CLOCK = SystemClock()
LOOK_S = 0.1
"""Seconds between two looks at an order, instead of what the authority asks for."""


class AcmeRig:
    """A store whose leaders order from ``front``."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.store = MemoryStore(CLOCK)
        self.publish_s = 0.0
        self.wanted: tuple[str, ...] = (APP,)
        self.outcomes: list[Outcome] = []
        self.run_step = AuthorityCalls().run_step
        front.challenges = lambda: challenges_in(records_in(self.store.view()))

    async def set_up(self) -> None:
        key = private_pem(new_private_key()).decode()
        account = AcmeAccount(
            email="ops@example.com", directory=self.front.directory, roots=self.front.roots, key=key
        )

        def write(tx: Transaction) -> None:
            tx.raise_level(LEVEL)
            configure(tx, account)

        await self.store.update(write)

    async def change(self, name: str, **fields: object) -> None:
        """Set fields of a record, as if time had passed."""
        await self.store.update(
            lambda tx: write_record(tx, record_id(name), replace(record_in(tx, name), **fields))
        )

    @property
    def account(self) -> AcmeAccount:
        account = account_in(self.store.view())
        assert account is not None
        return account

    def record(self, name: str = APP) -> HostCertificate:
        return record_in(self.store.view(), name)

    def certificates(self) -> dict[str, str]:
        """Return the certificates by host name (PEM: chain, then key)."""
        return {name: one.pem for name, one in records_in(self.store.view()).items() if one.pem}

    async def noting_step(self, account: AcmeAccount, record: HostCertificate | None) -> Outcome:
        outcome = await self.run_step(account, record)
        self.outcomes.append(outcome)
        if isinstance(outcome, OrderPending):  # Pebble decides about an order within milliseconds
            return replace(outcome, look_after_s=LOOK_S)
        return outcome

    @asynccontextmanager
    async def leading(self) -> AsyncIterator[None]:
        """Run the loop of one leader.  It ends with the block, as if its machine had lost power."""
        loop = Certificates(
            self.store,
            CLOCK,
            Random(1),
            self.noting_step,
            confirm,
            lambda view: Wanted(dict.fromkeys(self.wanted, "")),
            self.publish_s,
        )
        running = asyncio.create_task(loop.run())
        try:
            yield
            assert not running.done(), running
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the store fulfils a condition."""
        async with asyncio.timeout(25), self.store.watch(Payload) as watch:
            if condition():
                return
            async for _ in watch:
                if condition():
                    return


async def confirm() -> None:
    pass


@asynccontextmanager
async def a_rig(
    directory: Path, validated_at: int = 0, names_at: str = "", **options: str
) -> AsyncIterator[AcmeRig]:
    async with pebble(directory, validated_at, names_at, **options) as front:
        rig = AcmeRig(front)
        await rig.set_up()
        yield rig
