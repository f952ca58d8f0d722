"""Replaces the store's wrapping key during an eviction, and waits until all values are encrypted with new keys."""

from collections.abc import Callable

from skep.errors import FailedPrecondition, Unavailable, Unimplemented
from skep.manager.eviction.steps import Eviction, names, note_damaged
from skep.manager.storage.keys import StoreKeys
from skep.model.node import Node
from skep.model.values.ids import NodeId
from skep.store.etcd.encryption.cipher import new_wrapping_key
from skep.store.interface import Term, View
from skep.wire import methods
from skep.wire import skep_pb2 as pb
from skep.wire.client import ManagerChannel

KEEP_S = 10.0
"""Timeout in seconds for a manager to store a key on its disk."""

DAMAGED_MAX = 100
"""Maximum damaged values that are listed."""


def managers_in(view: View) -> list[Node]:
    """Return the nodes that are managers."""
    return [node for node in view.find(Node) if node.manager_status is not None]


class KeyReplacement:
    """Gives all managers a new wrapping key, then uses it.  The key stays the same during retries.

    Args:
        channel: Returns the connection to another manager, or raises Unavailable.
    """

    def __init__(
        self, term: Term, own: NodeId, keys: StoreKeys, channel: Callable[[NodeId], ManagerChannel]
    ) -> None:
        self._term = term
        self._own = own
        self._keys = keys
        self._channel = channel
        self._offered: tuple[NodeId, bytes] | None = None
        """The node whose eviction is in progress, and its new wrapping key."""

    async def replace(self, eviction: Eviction) -> str:
        """Have every manager store a new wrapping key, then rewrap the store's keys with it in one fenced write.

        A manager that joins meanwhile receives all keys of the manager that it joins through.  If it was admitted
        before the last of the others had the new key, it is among the managers that receive the key here.  A key that
        was offered before the node's eviction began may be known to the node.

        Returns the reason for a wait, or an empty string once the key is replaced.
        """
        if self._offered is None or self._offered[0] != eviction.node_id:
            self._offered = eviction.node_id, new_wrapping_key()
        key = self._offered[1]
        await self._keys.keep(key)
        stored_on: set[NodeId] = {self._own}
        while others := [node for node in managers_in(self._term.view()) if node.id not in stored_on]:
            for node in others:
                try:
                    await self._send(node, key)
                except Unavailable:
                    return f"manager {names([node])} must store the new key but cannot be reached: start or remove it"
                stored_on.add(node.id)
            await self._keys.store.barrier()
        await self._keys.store.replace_wrapping_key(self._term, key)
        self._offered = None
        return ""

    async def wait_encrypted(self, eviction: Eviction) -> str:
        """Wait until all values are encrypted with the new key, and list values that cannot be decrypted.

        These values are left as they are: no key that the node had decrypts them either.
        """
        damaged = self._keys.store.unreadable_values
        if self._keys.store.is_rotating and not damaged:
            return "waiting until all values are re-encrypted"
        await self._term.update(note_damaged, eviction.node_id, damaged[:DAMAGED_MAX])
        return ""

    async def _send(self, node: Node, key: bytes) -> None:
        request = pb.KeepWrappingKeyRequest(key=key)
        try:
            await self._channel(node.id).call(methods.KEEP_WRAPPING_KEY, request, timeout_s=KEEP_S)
        except Unimplemented as error:
            raise FailedPrecondition(
                f"manager {names([node])} runs a version of Skep that cannot replace its wrapping key: upgrade it"
            ) from error
