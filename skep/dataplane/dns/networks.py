"""Reads the network tables on tmpfs, and indexes them for names and virtual addresses.

Each version of a table is read once for all containers.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import msgspec
import structlog

from skep.dataplane.dns.index import Index
from skep.dataplane.plan.vip import VipBackends, vip_backends
from skep.linux.files import is_no_file
from skep.model.networks.tables import NetworkHead, NetworkTable
from skep.model.values.ids import NetworkId, ServiceId

log = structlog.get_logger()

Services = frozenset[tuple[NetworkId, ServiceId]]


class _Version:
    """One version of a table.  Its index is built at the first query."""

    def __init__(self, table: NetworkTable) -> None:
        self.backends = vip_backends(table)
        self._table = table

    @cached_property
    def index(self) -> Index:
        return Index(self._table)


class NetworkFiles:
    """The tables in ``directory``, which has a file per network, named after the network's id."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[NetworkId, _Version] = {}
        self.unread: set[NetworkId] = set()
        """Networks whose file exists but could not be read.  The previous version of the table stays in use."""

    def index(self, id: NetworkId) -> Index:
        """Return the names of a network."""
        return self._of(id).index

    def backends(self, id: NetworkId) -> Mapping[ServiceId, VipBackends]:
        """Return the backends of each service's virtual addresses."""
        return self._of(id).backends

    def refresh(self, ids: Iterable[NetworkId]) -> Services:
        """Read the tables of ``ids`` again, and all unreadable tables.

        Return the services whose backends have changed.

        Tables that were never needed are not read.
        """
        changed: set[tuple[NetworkId, ServiceId]] = set()
        for id in {*ids, *self.unread}:
            if id in self._read:
                before = self._read[id].backends
                self._read[id] = self._from_file(id)
            elif id in self.unread:
                before = {}
            else:
                continue
            after = self._of(id).backends
            changed |= {
                (id, one) for one in before.keys() | after.keys() if before.get(one) != after.get(one)
            }
        return frozenset(changed)

    def known(self) -> tuple[NetworkId, ...]:
        """Return the networks whose tables were read."""
        return tuple(self._read)

    def keep(self, ids: Iterable[NetworkId]) -> None:
        """Drop all tables except the tables of ``ids``."""
        wanted = set(ids)
        self._read = {id: read for id, read in self._read.items() if id in wanted}
        self.unread &= wanted

    def _of(self, id: NetworkId) -> _Version:
        if id in self._read:
            return self._read[id]
        version = self._from_file(id)
        if id not in self.unread:
            self._read[id] = version
        return version

    def _from_file(self, id: NetworkId) -> _Version:
        was_unread = id in self.unread
        self.unread.discard(id)
        try:
            return _Version(msgspec.msgpack.decode((self._directory / id).read_bytes(), type=NetworkTable))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:  # ValueError: not a table, or one with invalid addresses
            if isinstance(error, OSError) and not is_no_file(error):
                self.unread.add(id)
            if not was_unread:
                log.error("table of a network cannot be read", network=id, reason=str(error))
            if id in self._read:
                return self._read[id]
        return _Version(NetworkTable(head=NetworkHead(id=id, name="")))
