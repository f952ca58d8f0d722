"""Writes the nftables tables of one namespace, compares them, and leaves out elements that the kernel refuses."""

from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from skep.dataplane.netns import nft_table
from skep.dataplane.netns.kernel import nft
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.nft_table import Element, NftTable

log = structlog.get_logger()

_PASSES = 2
"""Number of passes over the tables of a namespace in one repair."""


class TableWriter:
    """The tables of one namespace as they are desired and as they were written last."""

    def __init__(self, name: str, path: Path, namespaces: Namespaces) -> None:
        """``name`` is for the log."""
        self._name = name
        self._path = path
        self._namespaces = namespaces
        self.is_new = False
        """Whether the namespace was created without tables."""
        self._goal: Mapping[str, NftTable] = {}
        self._written: dict[str, NftTable] = {}
        self._listings: dict[str, list[str]] = {}
        """How the kernel listed each table after it was written."""
        self._foreign: set[str] = set()
        """Tables that another writer has changed since they were written."""
        self._stale: set[str] = set()
        """Tables of earlier processes that will be removed."""
        self._refused: dict[str, frozenset[Element]] = {}
        """Elements that the kernel has refused, by table.  They are left out as long as they are wanted."""

    def aim_for(self, wanted: Mapping[str, NftTable]) -> None:
        """Set the desired tables, without refused elements.

        A refused element is tried again only after it was not wanted for a while.
        """
        tables = dict(wanted)
        self._refused = {
            name: still
            for name, refused in self._refused.items()
            if name in tables and (still := refused & tables[name].elements)
        }
        for name, refused in self._refused.items():
            tables[name] = msgspec.structs.replace(tables[name], elements=tables[name].elements - refused)
        self._goal = tables

    def remove(self, tables: Collection[str]) -> None:
        """Remove ``tables`` with the next ``apply`` even if an earlier process wrote them."""
        self._stale.update(tables)

    def reset(self) -> None:
        """Forget the written tables, because the namespace was created again."""
        self._written.clear()
        self._listings.clear()

    def note_foreign(self, tables: Collection[str]) -> bool:
        """Record that another writer has changed ``tables``.  Return whether any of them is desired."""
        ours = self._goal.keys() & set(tables)
        self._foreign |= ours
        return bool(ours)

    async def apply(self) -> None:
        """Apply all changes of tables in one transaction.

        If it is refused, write each table in a separate transaction.
        """
        gone = sorted((self._written.keys() | self._stale) - self._goal.keys())
        changed: list[NftTable] = []
        text = "".join(map(nft_table.absent, gone))
        for table in self._goal.values():
            old = self._written.get(table.name)
            if old is None:
                text += nft_table.fresh(table) if self.is_new else nft_table.whole(table)
            else:
                table = nft_table.with_spare_chains(old, table)
                text += nft_table.changes(old, table)
            if table != old:
                changed.append(table)
        try:
            if text:
                await self._run(text)
        except nft.NftFailed:  # another writer has interfered, or an element is refused
            for name in gone:
                await self._run(nft_table.absent(name))
            await self._write_tables(changed)
        else:
            for table in changed:
                self._note_written(table)
        for name in gone:
            self._written.pop(name, None)
            self._listings.pop(name, None)
            self._stale.discard(name)

    async def heal(self, *, is_thorough: bool) -> list[str]:
        """Write tables that are missing or were changed by another writer.  Returns one word for each.

        With ``is_thorough``, all tables are listed and compared.  Raises: NftFailed.
        """
        repaired = []
        if is_thorough:
            for name, table in tuple(self._written.items()):
                if name in self._goal and not await self._is_as_written(table):
                    self._foreign.add(name)
        # Reports that arrive meanwhile belong to the same change, because a flush removes all tables at once.
        for _ in range(_PASSES):
            lacking = [
                table
                for name, table in self._goal.items()
                if name in self._foreign or name not in self._written
            ]
            await self._write_tables(lacking)
            repaired += ["rules"] * len(lacking)
        return repaired

    async def _is_as_written(self, table: NftTable) -> bool:
        """Return whether the kernel lists the table as it did when it was written.

        nft spells rules in its own way, so only listings can be compared.  The first listing after a write is accepted
        if it has as many rules and elements as were written.
        """
        try:
            text = await self._namespaces.run(self._path, nft.run, f"list table {table.name}")
        except nft.NftFailed:  # the table does not exist
            return False
        listing = nft.in_any_order(text)
        if table.name not in self._listings and nft_table.fits(text, table):
            self._listings[table.name] = listing
        return self._listings.get(table.name) == listing

    def _note_written(self, table: NftTable) -> None:
        self._listings.pop(table.name, None)
        self._written[table.name] = table

    async def _write_tables(self, tables: Iterable[NftTable]) -> None:
        """Write all tables.  Raises: NftFailed: the error of the first refused table, after all were tried."""
        refused: list[nft.NftFailed] = []
        for table in tables:
            try:
                await self._write_table(table)
                self._foreign.discard(table.name)
            except nft.NftFailed as error:
                refused.append(error)
        if refused:
            raise refused[0]

    async def _write_table(self, table: NftTable) -> None:
        """Write the whole table without the elements that the kernel refuses.  Raises: NftFailed."""
        self._written.pop(table.name, None)
        try:
            await self._run(nft_table.whole(table))
        except nft.NftFailed as error:
            table = await self._without_refused(table, error)
            await self._run(nft_table.whole(table))
        self._note_written(table)

    async def _without_refused(self, table: NftTable, error: nft.NftFailed) -> NftTable:
        """Return ``table`` without the elements that the kernel refuses.  Raises: ``error``: it has another cause."""
        refused = frozenset([one async for one in self._refused_among(table, sorted(table.elements))])
        if not refused:
            raise error
        named = [" ".join(element) for element in sorted(refused)]
        log.error(
            "elements refused by nftables left out", namespace=self._name, table=table.name, elements=named
        )
        self._refused[table.name] = self._refused.get(table.name, frozenset()) | refused
        table = msgspec.structs.replace(table, elements=table.elements - refused)
        self._goal = {**self._goal, table.name: table}
        return table

    async def _refused_among(self, table: NftTable, elements: Sequence[Element]) -> AsyncIterator[Element]:
        """Yield the refused elements, found by bisection, because they are few."""
        try:
            await self._run(nft_table.trial(table, elements))
        except nft.NftFailed:
            if len(elements) < 2:
                for element in elements:
                    yield element
                return
            middle = len(elements) // 2
            for half in (elements[:middle], elements[middle:]):
                async for element in self._refused_among(table, half):
                    yield element

    async def _run(self, text: str) -> None:
        await self._namespaces.run(self._path, nft.run, text)
