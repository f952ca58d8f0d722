"""The node's own nftables tables: written here, and back when somebody else changed or flushed them.

nftables tells every change to who listens (NFNLGRP_NFTABLES); each carries the number of the transaction it came with.
A change of one of our tables by a transaction that is not ours is undone: the whole table is written again.  Others'
tables are never looked at.

Source: linux, net/netfilter/nf_tables_api.c (nf_tables_gen_notify: 16 bits of the generation are in each message).
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.dataplane.netns import netlink, nft
from skep.dataplane.netns.namespaces import Namespaces

log = structlog.get_logger()

_SUBSYSTEM_NFTABLES = 10
_NEWGEN, _GETGEN = 15, 16
_GENERATION_ID = 1
_TABLE_ATTRIBUTE = 1
"""Of all kinds of messages that concern a table."""
_CHANGES = netlink.NETFILTER, (netlink.GROUP_NFTABLES,)
_RECEIVE_BYTES = 1 << 16
_OWN_MAX = 256
_TIMEOUT_S = 5.0
_FAMILIES = {socket.AF_INET: "ip", socket.AF_INET6: "ip6"}

SETTLE_S = 0.2
"""Somebody who flushes everything often writes his own rules next: both are one change."""
COMPARE_S = 60.0
"""How often all tables are looked at without a notification, which may get lost."""
_FIRST_RETRY_S, _RETRY_S_MAX = 0.2, 5.0


class NodeTables:
    """The tables of the node process in the node's own namespace.

    ``keep`` says which; the texts that ``run`` applies are known to be ours.
    """

    def __init__(self, namespaces: Namespaces, clock: Clock, chance: Callable[[], float]) -> None:
        self._namespaces = namespaces
        self._clock = clock
        self._backoff = Backoff(_FIRST_RETRY_S, _RETRY_S_MAX, chance=chance)
        self._kept: dict[str, Callable[[], str]] = {}
        self._own: deque[int] = deque(maxlen=_OWN_MAX)
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._seen: set[int] = set()
        self._is_unsure = False
        self.repairs = 0
        """How often a table was put right since the start."""

    def keep(self, table: str, whole: Callable[[], str]) -> None:
        """Watch ``table`` (``ip skep``); ``whole`` gives at any time the text that makes it from anything."""
        self._kept[table] = whole

    def forget(self, table: str) -> None:
        """It is no longer wanted."""
        self._kept.pop(table, None)

    async def run(self, text: str) -> None:
        """Apply ``text``, all or nothing.  Raises: NftFailed."""
        async with self._turn:
            await self._run(text)

    async def watch(self) -> None:
        """Repair until cancelled."""
        while True:
            try:
                notices = await self._namespaces.run(self._namespaces.home, netlink.listening, *_CHANGES)
            except OSError as error:
                log.warning("changes of nftables are not told", reason=str(error))
                await self._backoff.sleep(self._clock)
                continue
            loop = asyncio.get_running_loop()
            loop.add_reader(notices, self._read, notices)
            try:
                self._doubt()  # what happened before we listened
                await self._repair_changes()
            finally:
                loop.remove_reader(notices)
                notices.close()

    async def repair(self) -> tuple[str, ...]:
        """Write again what differs from what it should be; gives which tables did."""
        async with self._turn:
            repaired = []
            for table, whole in tuple(self._kept.items()):
                before = await self._listing(table)
                await self._run(whole())
                if before != await self._listing(table):
                    repaired.append(table)
            self.repairs += len(repaired)
        return tuple(repaired)

    async def _repair_changes(self) -> None:
        while True:
            try:
                async with asyncio.timeout(COMPARE_S):
                    await self._changed.wait()
                await self._clock.sleep(SETTLE_S)
            except TimeoutError:
                self._is_unsure = await self._is_missing()
            self._changed.clear()
            try:
                repaired = await self.repair() if await self._was_foreign() else ()
            except nft.NftFailed as error:
                log.error("own nftables tables cannot be put right", reason=str(error))
                await self._backoff.sleep(self._clock)
                self._doubt()
                continue
            self._backoff.reset()
            if repaired:
                log.warning("somebody changed our nftables tables, they are back", tables=repaired)

    async def _was_foreign(self) -> bool:
        """Whether anybody else changed our tables; the answer is given once."""
        async with self._turn:  # what is being written is ours, and is entered when it is done
            was_foreign = self._is_unsure or not self._seen.issubset(self._own)
            self._is_unsure = False
            self._seen.clear()
        return was_foreign

    def _doubt(self) -> None:
        self._is_unsure = True
        self._changed.set()

    async def _is_missing(self) -> bool:
        """Whether a kept table is not there at all."""
        present = await self._namespaces.run(self._namespaces.home, nft.run, "list tables")
        names = {line.removeprefix("table ") for line in present.splitlines()}
        return not names.issuperset(self._kept)

    async def _listing(self, table: str) -> list[str]:
        """What is in ``table``, whatever its order."""
        try:
            text = await self._namespaces.run(self._namespaces.home, nft.run, f"list table {table}")
        except nft.NftFailed:
            return []  # there is none
        return nft.in_any_order(text)

    async def _run(self, text: str) -> None:
        before, after = await self._namespaces.run(self._namespaces.home, _counted, text)
        if after == before + 1:  # else somebody else was there too, and it is looked at
            self._own.append(after & 0xFFFF)

    def _read(self, notices: socket.socket) -> None:
        try:
            while True:
                received = notices.recv(_RECEIVE_BYTES)
                seen = {generation for table, generation in changes(received) if table in self._kept}
                if seen:
                    self._seen |= seen
                    self._changed.set()
        except BlockingIOError:
            return
        except OSError:  # more than the socket holds: something was lost
            self._doubt()


def changes(received: bytes) -> Iterator[tuple[str, int]]:
    """The tables that notifications tell of, with 16 bits of the transaction's number."""
    for kind, body in netlink.messages(received):
        if kind >> 8 != _SUBSYSTEM_NFTABLES or kind & 0xFF == _NEWGEN or len(body) < 4:
            continue
        family, _, generation = struct.unpack_from("!BBH", body)
        for attribute, value in netlink.attributes(body[4:]):
            if attribute == _TABLE_ATTRIBUTE and family in _FAMILIES:
                yield f"{_FAMILIES[family]} {value.rstrip(bytes(1)).decode(errors='replace')}", generation
                break


def _counted(text: str) -> tuple[int, int]:
    """Apply ``text``; the generation before and after."""
    before = _generation()
    nft.run(text)
    return before, _generation()


def _generation() -> int:
    """The number of the last transaction in the present namespace.  Raises: OSError."""
    with netlink.opened(netlink.NETFILTER, _TIMEOUT_S) as link:
        link.send(netlink.request(_SUBSYSTEM_NFTABLES << 8 | _GETGEN, 0, bytes(4)))
        for _, body in netlink.messages(link.recv(_RECEIVE_BYTES)):
            for attribute, value in netlink.attributes(body[4:]):
                if attribute == _GENERATION_ID:
                    return int.from_bytes(value, "big")
    raise OSError("the kernel tells no generation of nftables")
