"""Records of failover addresses in the store, and the transactions that change them.

All addresses are one record, and the renewals of each holder are another one.  A renewal compares the first record, and
a change of holders compares the renewals of the former holder.  So in the store's order, no renewal of a holder comes
after its replacement.  Every manager may write these records, whoever leads.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from skep.model.networks.failover import REASON_CHARACTERS_MAX, UNASKED, AddressOrder
from skep.model.values.ids import NodeId
from skep.store.interface import Transaction, View
from skep.store.kinds import Payload, read_record, write_record

ADDRESSES_ID: Final = "failover/addresses"
HolderAction: TypeAlias = Literal["take", "release"]
"""Actions of events."""
_RENEWALS: Final = "failover/renewals/"
_EPOCHS: Final = 1 << 32
"""Epochs of one incarnation.  A restored store must not use an epoch again."""
REFUSALS_MAX: Final = 16
"""Refusals kept for one address, the latest ones."""


class AddressRefusal(msgspec.Struct, frozen=True, kw_only=True):
    """The reason why a node lost an address or refused it, and when."""

    reason: str
    at_ns: int


class FailoverAddress(msgspec.Struct, frozen=True, kw_only=True):
    """A failover address and its possible holder.

    Attributes:
        node_id: The node that may hold it, or empty.
        epoch: Number of the last naming.
        since_ns: Time of the last naming.
        is_leaving: Whether the node was asked to release it.
        is_removed: Whether a user has removed it.  It exists until no node can hold it.
        refusals: By node.
    """

    address: str
    prefix: int
    interface: str = ""
    node_id: NodeId = NodeId("")
    epoch: int = 0
    since_ns: int = 0
    is_leaving: bool = False
    is_removed: bool = False
    refusals: dict[NodeId, AddressRefusal] = {}

    @property
    def shown(self) -> str:
        """The address with the prefix length of its subnet."""
        return f"{self.address}/{self.prefix}"

    @property
    def order(self) -> AddressOrder:
        """The order for its node."""
        return AddressOrder(
            address=self.address,
            prefix=self.prefix,
            interface=self.interface,
            epoch=self.epoch,
            is_leaving=self.is_leaving,
        )


class FailoverAddresses(msgspec.Struct, frozen=True, kw_only=True):
    """All addresses, sorted.

    Attributes:
        incarnation: The cluster's incarnation at the last naming.  DoorNodes of an earlier one are not known.
    """

    addresses: tuple[FailoverAddress, ...] = ()
    last_epoch: int = 0
    incarnation: int = 0

    def get(self, address: str) -> FailoverAddress | None:
        """Return an address, or None if it does not exist."""
        return next((one for one in self.addresses if one.address == address), None)

    def put(self, changed: FailoverAddress) -> "FailoverAddresses":
        """Return the record with an address added or replaced."""
        others = [one for one in self.addresses if one.address != changed.address]
        return replace(self, addresses=tuple(sorted([*others, changed], key=lambda one: one.address)))

    def without(self, address: str) -> "FailoverAddresses":
        """Return the record without an address."""
        return replace(self, addresses=tuple(one for one in self.addresses if one.address != address))


class Renewals(msgspec.Struct, frozen=True, kw_only=True):
    """The renewals of one node.

    Attributes:
        count: Number of renewals, by which each differs from the one before.
        epochs: The addresses of the last renewal, with their epochs.
    """

    count: int = 0
    epochs: dict[str, int] = {}


class HolderChange(msgspec.Struct, frozen=True, kw_only=True):
    """A change of the holder of one address.

    Attributes:
        epoch: The present naming, on which the decision was based.
        renewals: The last renewals of the present holder, on which the decision was based if ``is_over``.
        is_over: Whether the lease of the present holder is over.
        asks: Whether the present holder is asked to release the address, and nothing else is done.
        node_id: The next holder, or empty.
        reason: Why the present holder loses the address.
    """

    address: str
    epoch: int
    renewals: Renewals | None = None
    is_over: bool = False
    asks: bool = False
    node_id: NodeId = NodeId("")
    reason: str = ""


def renewals_id(node_id: NodeId) -> str:
    """Return the id of the payload with a node's renewals."""
    return f"{_RENEWALS}{node_id}"


def is_failover(id: str) -> bool:
    """Return whether a payload is one of these records."""
    return id == ADDRESSES_ID or id.startswith(_RENEWALS)


def addresses_in(view: View) -> FailoverAddresses:
    """Return the record of all addresses."""
    return decoded_addresses(view.lookup(Payload, ADDRESSES_ID))


def decoded_addresses(payload: Payload | None) -> FailoverAddresses:
    """Return the record in a payload."""
    return read_record(payload, FailoverAddresses())


def renewals_in(view: View, node_id: NodeId) -> Renewals:
    """Return the renewals of a node."""
    return read_record(view.lookup(Payload, renewals_id(node_id)), Renewals())


def holder_changes(
    old: Payload | None, new: Payload
) -> Iterator[tuple[HolderAction, FailoverAddress, NodeId, str]]:
    """Yield the changes of holders between two records: action of events, address, former node and reason.

    The address has its new node, or none if it was released.
    """
    before, after = decoded_addresses(old), decoded_addresses(new)
    for one in after.addresses:
        former = before.get(one.address)
        last = former.node_id if former is not None else NodeId("")
        refusal = one.refusals.get(last)
        reason = refusal.reason if refusal is not None and last else ""
        if one.node_id and (former is None or former.epoch != one.epoch):
            yield "take", one, last, reason
        elif last and not one.node_id:
            yield "release", one, last, reason


def orders_for(view: View, node_id: NodeId, incarnation: int) -> tuple[AddressOrder, ...]:
    """Return the orders for one node.  After a restore, nobody gets orders until all former leases are over."""
    record = addresses_in(view)
    if record.incarnation != incarnation:
        return ()
    return tuple(one.order for one in record.addresses if one.node_id == node_id)


def apply_report(
    tx: Transaction,
    node_id: NodeId,
    renewed: Mapping[str, int],
    released: Sequence[tuple[str, int, str]],
    incarnation: int,
    now_ns: int,
) -> dict[str, int]:
    """Record the releases of a node, and renew its other addresses.  Return the renewed epochs by address.

    Addresses that the node is releasing are renewed as well, since its hook may need longer than a lease.

    Args:
        renewed: Epochs by address.
        released: Addresses with their epochs and the node's reason, which is empty if it was asked to.
    """
    tx.rely_on(Payload, ADDRESSES_ID)
    record = before = addresses_in(tx)
    if record.incarnation != incarnation:
        return {}
    for address, epoch, reason in released:
        found = record.get(address)
        if found is not None and (found.node_id, found.epoch) == (node_id, epoch):
            # Without a reason, it would be named again at once.
            record = record.put(_freed(found, reason or ("" if found.is_leaving else UNASKED), now_ns))
    if record != before:
        write_record(tx, ADDRESSES_ID, record)
    kept = [
        one for one in record.addresses if one.node_id == node_id and renewed.get(one.address) == one.epoch
    ]
    held = {one.address: one.epoch for one in kept}
    if kept:
        tx.rely_on(Payload, renewals_id(node_id))
        count = renewals_in(tx, node_id).count + 1
        write_record(tx, renewals_id(node_id), Renewals(count=count, epochs=held))
    elif not any(one.node_id == node_id for one in record.addresses):
        _forget_renewals(tx, node_id)
    return held


def change_holder(tx: Transaction, change: HolderChange, incarnation: int, now_ns: int) -> bool:
    """Make a change, if nothing has changed since its decision.  Return whether it was made."""
    tx.rely_on(Payload, ADDRESSES_ID)
    record = addresses_in(tx)
    found = record.get(change.address)
    if found is None or found.epoch != change.epoch or record.incarnation not in (incarnation, 0):
        return False
    if change.asks:
        if not found.node_id or found.is_leaving:
            return False
        write_record(tx, ADDRESSES_ID, record.put(replace(found, is_leaving=True)))
        return True
    if former := found.node_id:
        tx.rely_on(Payload, renewals_id(former))
        if not change.is_over or renewals_in(tx, former) != change.renewals:
            return False
        found = _freed(found, change.reason, now_ns)
    if change.node_id:
        epoch = max(record.last_epoch, incarnation * _EPOCHS) + 1
        record = replace(record, last_epoch=epoch, incarnation=incarnation)
        found = replace(found, node_id=change.node_id, epoch=epoch, since_ns=now_ns)
    gone = found.is_removed and not found.node_id
    record = record.without(found.address) if gone else record.put(found)
    write_record(tx, ADDRESSES_ID, record)
    if former and not any(one.node_id == former for one in record.addresses):
        _forget_renewals(tx, former)
    return True


def forget_holders(tx: Transaction, incarnation: int) -> bool:
    """Name no holder, because the store was restored and all former leases are over.  Return whether it was done."""
    tx.rely_on(Payload, ADDRESSES_ID)
    record = addresses_in(tx)
    if record.incarnation == incarnation:
        return False
    for one in record.addresses:
        if one.node_id:
            _forget_renewals(tx, one.node_id)
    free = [replace(one, node_id=NodeId(""), is_leaving=False) for one in record.addresses]
    write_record(tx, ADDRESSES_ID, replace(record, addresses=tuple(free), incarnation=incarnation))
    return True


def _freed(found: FailoverAddress, reason: str, now_ns: int) -> FailoverAddress:
    """Return an address without its holder, and with that node's reason."""
    refusals = found.refusals
    if reason:
        refusal = AddressRefusal(reason=reason[:REASON_CHARACTERS_MAX], at_ns=now_ns)
        latest = {**refusals, found.node_id: refusal}
        kept = sorted(latest, key=lambda node_id: (latest[node_id].at_ns, node_id))[-REFUSALS_MAX:]
        refusals = {id: latest[id] for id in kept}
    return replace(found, node_id=NodeId(""), is_leaving=False, refusals=refusals)


def _forget_renewals(tx: Transaction, node_id: NodeId) -> None:
    if tx.rely_on(Payload, renewals_id(node_id)) is not None:
        tx.delete(Payload, renewals_id(node_id))
