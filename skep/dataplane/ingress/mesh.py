"""The routing mesh of one node, which follows the ingress network's table."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, tick
from skep.aio.failures import isolate, retry
from skep.dataplane.gateway import BRIDGE as GATEWAY
from skep.dataplane.ingress.reply_routing import ReplyRouting
from skep.dataplane.netns.kernel import conntrack, nft
from skep.dataplane.netns.kernel.forwarding import forward_ipv6, ipv6_nat_refusal
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.state import NamespaceState
from skep.dataplane.plan.flows import ACCEPTED_S
from skep.dataplane.plan.ingress import (
    BRIDGE,
    FAMILIES,
    IPV4,
    IngressPlan,
    PortKey,
    ingress_table,
    lose_tcp_backends,
    plan,
    present_table,
    stale_ports,
    unaccepted_ports,
)
from skep.dataplane.ports import AddressNotHere, PortReservations
from skep.dataplane.proxy.relays import relay_ports
from skep.dataplane.stale_flows import delete_flows
from skep.dataplane.underlays import find
from skep.errors import SkepError, Unavailable
from skep.linux.files import replace_file
from skep.model.networks.tables import NetworkTable
from skep.model.values.ids import NetworkId, NodeId

log = structlog.get_logger()

_FIRST_RETRY_S, _RETRY_S_MAX = 1.0, 30.0
"""First and longest delay in seconds before publishing ports is tried again, for instance until another program
releases one.
"""
OBSTACLES_S = 15.0
"""Seconds between two searches for firewall rules of other programs that block forwarding."""
_ADDRESSES_S = 2.0
"""Seconds between checks for missing addresses that ports are bound to.

A virtual address takes longer to move to another node (3 s with keepalived's defaults).
"""
_HELD_S = 15.0
"""Seconds between comparisons with the ports that the net process holds.

After a crash, the new process lacks the ports that another program took meanwhile.
"""
_PART = "published ports"
OUR_TABLES = frozenset({"ip skep", "ip6 skep", "ip skep_ingress", "ip6 skep_ingress", "inet skep_overlay"})
_TABLE = re.compile(r"table (\S+ \S+) {")
_HOOK = re.compile(r"type filter hook forward priority [^;]+; policy (accept|drop);")
DOCKER_USER = "DOCKER-USER"
_COUNTER = re.compile(r"counter packets \d+ bytes \d+ ")
_LAST_WORD = re.compile(rf"\s*(?:{_COUNTER.pattern})?(?:drop|reject\b.*)")


class _Conflict(Exception):
    """A port cannot be held.  The message is Docker's."""

    def __init__(self, key: PortKey, reason: str) -> None:
        super().__init__(reason)
        self.key = key


class Mesh:
    """The published ports of this node.

    Args:
        home: Reconciler of the node's own namespace.
        ports: Reserves the published ports, so that no other program takes them.
        relays: File with the ports that the net process relays (``relays.py``).
    """

    def __init__(
        self,
        *,
        namespaces: Namespaces,
        home: NetnsReconciler,
        reply_routing: ReplyRouting,
        ports: PortReservations,
        relays: Path,
        clock: Clock,
        rng: Callable[[], float],
    ) -> None:
        self._namespaces = namespaces
        self._home = home
        self.reply_routing = reply_routing
        self._ports = ports
        self._relays = relays
        self._clock = clock
        self._rng = rng
        self._backoff = Backoff(_FIRST_RETRY_S, _RETRY_S_MAX, rng=rng)
        self._node_id = NodeId("")
        self._table: NetworkTable | None = None
        self._held: set[PortKey] = set()
        self._is_held_known = False
        """Whether ``_held`` is what the net process holds.

        False before the first request, and after a failed request, which the net process may have carried out.
        """
        self._plan: IngressPlan | None = None
        self._forwards_ipv6 = False
        self._nats_ipv6 = False
        """Whether the kernel accepts the nat chains of the IPv6 table."""
        self._turn = asyncio.Lock()
        self._again = asyncio.Event()
        self._lost_backends = asyncio.Event()
        """Set when a TCP port has lost a backend, to which connections may still be on their way."""
        self._obstacles: tuple[str, ...] = ()
        self._absent: frozenset[str] = frozenset()
        """Addresses that published ports are bound to, but that this node does not have at present."""
        self.conflicts: Mapping[PortKey, str] = {}
        """Ports that this node cannot publish, with the reason in Docker's words.

        Usually another program has the port.
        """

    async def apply(
        self, node_id: NodeId, tables: Mapping[NetworkId, NetworkTable], changed: frozenset[NetworkId]
    ) -> None:
        """Publish the ports of the ingress network's table.  Without that table, publish none.

        A port that cannot be held is retried in the background.  Raises: SkepError: another failure.
        """
        self._node_id = node_id
        self._table = present_table(tables.values(), node_id)
        await self._follow()

    async def apply_nothing(self) -> None:
        """Remove everything that an earlier process has published, because this node has no tables."""
        try:
            await self.apply(NodeId(""), {}, frozenset())
        except SkepError as error:
            log.warning("published ports not cleared", reason=str(error))
            self._again.set()

    async def run(self) -> None:
        """Retry failures, follow addresses that move, and read other firewalls' rules, until cancelled."""
        parts: dict[str, Callable[[], Awaitable[None]]] = {
            "mesh-retries": self._try_again,
            "mesh-connections": self._redirect_unaccepted,
            "mesh-obstacles": self._look_for_obstacles,
            "mesh-addresses": self._look_for_addresses,
            "mesh-held": self._look_at_held,
        }
        keep = partial(retry, clock=self._clock, rng=self._rng)
        async with asyncio.TaskGroup() as group:
            for name, run in parts.items():
                group.create_task(keep(run, "part of the mesh failed", part=name), name=name)

    @property
    def published(self) -> frozenset[tuple[str, int]]:
        """Protocol and number of the ports that this node holds."""
        return frozenset(key[:2] for key in self._held)

    def warnings(self) -> tuple[str, ...]:
        """Return the warnings for ``/info``."""
        conflicts = (
            f"port {port}/{protocol} is not published on this node: {reason}"
            for (protocol, port, _), reason in sorted(self.conflicts.items())
        )
        return (*conflicts, *self._obstacles)

    async def _follow(self) -> None:
        async with self._turn:
            wanted = plan(self._table, self._node_id) if self._table is not None else IngressPlan()
            try:
                await self._publish(wanted)
            except (SkepError, OSError) as error:
                self._plan = None  # it is unknown which state is in force
                raise SkepError(f"published ports cannot be updated: {error}") from error
            if self.conflicts:
                self._again.set()
            else:
                self._backoff.reset()

    async def _publish(self, wanted: IngressPlan) -> None:
        """Apply ``wanted``.  Replies are routed and ports held before packets are sent to a task."""
        if not self._is_held_known:
            self._held = set(await self._ports.list_held())
            self._is_held_known = True
        wanted = await self._hold(wanted)
        if wanted != self._plan:
            await self.reply_routing.apply(wanted)
            await self._write(wanted)
            self._relays.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._relays, msgspec.json.encode(relay_ports(wanted)), is_durable=False)
            await self._move_flows(wanted)
        await self._release(wanted)
        self._plan = wanted

    # --- holding --------------------------------------------------------------------------------------------------

    async def _hold(self, wanted: IngressPlan) -> IngressPlan:
        """Hold the ports.  Return the plan with the held sockets.  Raises: Unavailable: no answer.

        A port that is in use for one address family is published for neither, as in Docker.  Clients that try both
        (``localhost``) would otherwise reach the program or a task at random.
        """
        conflicts: dict[PortKey, str] = {}
        held: set[PortKey] = set()
        self._absent = frozenset()
        for port in wanted.ports:
            # Try first the sockets that failed before, so that a retry does not hold the port of the other family
            # meanwhile.
            keys = sorted(port.keys, key=lambda one: one not in self.conflicts)
            try:
                held.update([key for key in keys if await self._hold_socket(key)])
            except _Conflict as conflict:
                conflicts[conflict.key] = str(conflict)
        for key in sorted(conflicts.keys() - self.conflicts.keys()):
            log.warning(
                "port is not published here",
                port=key[1],
                protocol=key[0],
                address=key[2],
                reason=conflicts[key],
            )
        for key in self.conflicts.keys() - conflicts.keys():
            log.info("port is free again", port=key[1], protocol=key[0], address=key[2])
        self.conflicts = conflicts
        return msgspec.structs.replace(wanted, held=frozenset(held))

    async def _hold_socket(self, key: PortKey) -> bool:
        """Let the net process hold the socket ``key``.

        Return False if this node lacks its address.  Raises: _Conflict; Unavailable: no answer.
        """
        if key in self._held:
            return True
        try:
            await self._ports.reserve(*key)
        except AddressNotHere:
            if key[2] != "::":  # if ``::`` is missing, the machine has no IPv6
                self._absent |= {key[2]}
            return False
        except SkepError as error:
            self._is_held_known = False  # even after a conflict, because an earlier answer may have been lost
            if isinstance(error, Unavailable):  # stop, because other requests would not be answered either
                raise
            raise _Conflict(key, str(error)) from error
        self._held.add(key)
        return True

    async def _release(self, wanted: IngressPlan) -> None:
        for key in sorted(self._held - wanted.held):
            try:
                await self._ports.release(*key)
            except SkepError:
                self._is_held_known = False
                raise
            self._held.discard(key)

    # --- rules ----------------------------------------------------------------------------------------------------

    async def _write(self, wanted: IngressPlan) -> None:
        if not self._nats_ipv6:  # the kernel may have loaded its module meanwhile
            refusal = await self._namespaces.run(self._namespaces.home, ipv6_nat_refusal)
            self._nats_ipv6 = not refusal
            if refusal:
                log.info("ports are published for IPv4 only", reason=refusal)
        families = [family for family in FAMILIES if family is IPV4 or self._nats_ipv6]
        if not wanted.held:
            self._home.remove_part(_PART, [family.table for family in families])
        else:
            if wanted.has_ipv6 and not self._forwards_ipv6:
                await self._namespaces.run(self._namespaces.home, forward_ipv6)
                self._forwards_ipv6 = True
            tables = [ingress_table(wanted, family) for family in families]
            self._home.set_part(_PART, NamespaceState(sysctls=_sysctls(wanted)), *tables)
        await self._home.apply()

    async def _move_flows(self, wanted: IngressPlan) -> None:
        if self._plan is not None and lose_tcp_backends(self._plan, wanted):
            self._lost_backends.set()
        has_ipv6 = wanted.has_ipv6 or (self._plan is not None and self._plan.has_ipv6)
        for version in (4, 6) if has_ipv6 else (4,):
            if stale := stale_ports(self._plan, wanted, version):
                await self._namespaces.run(self._namespaces.home, delete_flows, stale, version)

    # --- background work --------------------------------------------------------------------------------------------

    async def _try_again(self) -> None:
        while True:
            await self._again.wait()
            await self._backoff.sleep(self._clock)
            self._again.clear()
            await isolate(self._follow(), "ports are not published", on_error=lambda _: self._again.set())

    async def _redirect_unaccepted(self) -> None:
        """Delete flows of connections that a removed backend has not accepted, so that their next packet is sent to
        another one.

        Otherwise, a client would get no answer from a lost node for as long as it repeats its request, and for two
        minutes when it uses the same port again.
        """
        while True:
            await self._lost_backends.wait()
            self._lost_backends.clear()
            await self._clock.sleep(ACCEPTED_S)
            current = self._plan if self._plan is not None else IngressPlan()
            for version in (4, 6) if current.has_ipv6 else (4,):
                if ports := unaccepted_ports(current, version):
                    deletion = self._namespaces.run(
                        self._namespaces.home, delete_flows, ports, version, conntrack.UNANSWERED
                    )
                    await isolate(deletion, "connections to removed backends not redirected")

    async def _look_for_addresses(self) -> None:
        """Publish ports that are bound to one address as soon as this node has the address (for instance a virtual
        one).
        """
        while True:
            await tick(self._clock, _ADDRESSES_S)
            if self._absent:
                work = self._namespaces.run(self._namespaces.home, find, self._absent)
                if await isolate(work, "addresses not read"):
                    await isolate(
                        self._follow(), "ports are not published", on_error=lambda _: self._again.set()
                    )

    async def _look_at_held(self) -> None:
        while True:
            await tick(self._clock, _HELD_S)
            self._is_held_known = False
            await isolate(self._follow(), "held ports not compared", on_error=lambda _: self._again.set())

    async def _look_for_obstacles(self) -> None:
        while True:
            is_publishing = self._plan is not None and bool(self._plan.held)
            work = self._namespaces.run(self._namespaces.home, _find_obstacles, is_publishing)
            found = await isolate(work, "others' rules not read") or ()
            for sentence in set(found) - set(self._obstacles):
                log.warning(sentence)
            self._obstacles = found
            await tick(self._clock, OBSTACLES_S)


def _find_obstacles(is_publishing: bool) -> tuple[str, ...]:
    """Add exceptions to Docker's chain for them.  Then find what blocks the forwarding of published ports, if any."""
    chains = nft.run("list chains")
    for table in docker_tables(chains):
        if lacking := exceptions(table, nft.run(f"list chain {table} {DOCKER_USER}")):
            nft.run(lacking)
            log.info("forwarding allowed beside a docker engine", table=table, chain=DOCKER_USER)
    if not is_publishing:
        return ()
    return obstacles((nft.run(f"list table {name}") for name in forwarding_tables(chains)), (BRIDGE,))


def _sysctls(plan: IngressPlan) -> Mapping[str, str]:
    """Return the settings of the node's namespace that forwarding needs.  The bridge may be created later."""
    return {
        "net/ipv4/ip_forward": "1",
        # A client on the node may use 127.0.0.1.  Packets from outside are dropped (chain ``raw``).
        f"net/ipv4/conf/{BRIDGE}/route_localnet": "1",
        f"net/ipv4/conf/{BRIDGE}/rp_filter": "0",
        **({"net/ipv6/conf/all/forwarding": "1"} if plan.has_ipv6 else {}),
    }


# --- firewalls of the machine that block forwarding to containers ---------------
#
# A packet passes nftables only if every base chain accepts it.  Accepting it in our table does not override a drop in
# another program's table, and that table must not be changed by us.  A firewall that blocks forwarding therefore needs
# an exception.  Docker's iptables rules need none, because they are in the blocking chain itself.  A Docker Engine sets
# the policy of that chain to drop.  It has a chain for exceptions of others, DOCKER-USER, which it never changes.  Skep
# makes its own there (decision 224).


def docker_tables(chains: str) -> tuple[str, ...]:
    """Return the tables with Docker's chain for exceptions, from the output of ``nft list chains``."""
    return tuple(table for table, body in _tables(chains) if f"chain {DOCKER_USER} {{" in body)


def exceptions(table: str, chain: str) -> str:
    """Return commands that add the rules that Docker's chain for exceptions lacks for Skep's bridges.

    They come after the administrator's rules, which may close published ports, and before a last ``return``, with which
    older engines end the chain.

    Args:
        chain: The output of ``nft list chain``.  It may count packets, as iptables does.
    """
    present = [_COUNTER.sub("", line.strip()) for line in chain.splitlines() if line.startswith("\t\t")]
    add = f"add rule {table} {DOCKER_USER}"
    if present and present[-1] == "return":
        add = f"insert rule {table} {DOCKER_USER} index {len(present) - 1}"
    rules = (f'{way} "{bridge}" accept' for bridge in (BRIDGE, GATEWAY) for way in ("iifname", "oifname"))
    return "".join(f"{add} {rule}\n" for rule in rules if rule not in present)


def forwarding_tables(chains: str) -> tuple[str, ...]:
    """Return the tables of other programs that have a chain at the forward hook, from the output of ``nft list
    chains``.
    """
    return tuple(dict.fromkeys(table for table, body in _tables(chains) if _HOOK.search(body)))


def obstacles(tables: Iterable[str], bridges: Iterable[str]) -> tuple[str, ...]:
    """Return a sentence for each of the ``tables`` (each a ``nft list table``) that blocks forwarding to ``bridges``.

    A table that names one of our bridges is assumed to have an exception for it.
    """
    names = tuple(bridges)
    found = []
    for text in tables:
        for table, body in _tables(text):
            chain = _forbidding_chain(body)
            missing = [name for name in names if name not in body]
            if chain and missing:
                found.append(
                    f"chain {chain} of nftables table {table} forbids forwarding: published ports lead nowhere until "
                    f"it accepts packets to and from {' and '.join(missing)}"
                )
    return tuple(found)


def _tables(text: str) -> Iterable[tuple[str, str]]:
    for part in re.split(r"(?m)^(?=table )", text):
        match = _TABLE.match(part)
        if match is not None and match[1] not in OUR_TABLES:
            yield match[1], part


def _forbidding_chain(body: str) -> str:
    """Return the chain at the forward hook that refuses packets by default, or an empty text."""
    for part in re.split(r"(?m)^\tchain ", body)[1:]:
        hook = _HOOK.search(part)
        rules = [line for line in part.splitlines()[1:] if line.startswith("\t\t")]
        if hook is not None and (hook[1] == "drop" or _LAST_WORD.fullmatch(rules[-1])):
            return part.partition(" ")[0]
    return ""
