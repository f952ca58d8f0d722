"""Composes the ``oci`` executor: the engine, its network, and the adapter of tasks."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from skep.agent.executor.adapter import NodeFacts
from skep.agent.executor.attaching import ClusterAttachments
from skep.agent.executor.oci import OciExecutor
from skep.agent.executor.payloads import Payloads
from skep.aio.clock import Clock
from skep.dataplane.container_network import ContainerNetwork
from skep.dataplane.endpoint_allocation import EndpointAllocation
from skep.dataplane.gateway import BRIDGE, Gateway
from skep.dataplane.ingress.mesh import Mesh
from skep.dataplane.ingress.reply_routing import ReplyRouting
from skep.dataplane.local.endpoints import LocalEndpoints
from skep.dataplane.local.networks import LocalNetworks
from skep.dataplane.name_registration import NameRegistration, NameRegistry
from skep.dataplane.netns.deferred import DeferredChanges
from skep.dataplane.netns.healer import Healer
from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.netns.repairs import Repairs
from skep.dataplane.overlays import Overlays, node_reconciler
from skep.dataplane.ports import OwnReservations, PortReservations
from skep.dataplane.probe.data_path import DataPath
from skep.dataplane.probe.namespace import ProbeNamespace
from skep.dataplane.probe.port_probe import PortChecks, PortProbe
from skep.dataplane.probe.prober import PathProber
from skep.dataplane.wireguard.tunnels import NO_ENCRYPTION, Options, Tunnels
from skep.engine.bundle import Bundles
from skep.engine.capacity import Programs, capacity_of, find_programs
from skep.engine.cgroups import Cgroups
from skep.engine.engine import Engine, EngineConfig
from skep.engine.images.store import ImageStore
from skep.engine.runtime import Runtime
from skep.engine.volumes import Volumes
from skep.model.ids import NodeId, new_container_id
from skep.model.meta import Driver
from skep.node.conditions import Conditions
from skep.paths import Paths


def oci_executor(
    paths: Paths,
    images: ImageStore,
    *,
    clock: Clock,
    rng: Callable[[], float],
    hostname: str,
    cgroup_parent: str = "skep",
    ports: PortReservations | None = None,
    names: NameRegistry | None = None,
    mesh_ports: PortReservations | None = None,
    namespaces: Namespaces | None = None,
    log_default: Driver | None = None,
    programs: Programs | None = None,
    resolver: Path = Path("/etc/resolv.conf"),
    conditions: Conditions | None = None,
    encryption: Options | None = None,
) -> OciExecutor:
    """The executor of one node.

    Args:
        cgroup_parent: below each cgroup hierarchy; two nodes on one machine need two.
        ports: holds published ports in host mode; None: this process does, for as long as it lives.
        mesh_ports: the same for those of the routing mesh.
        names: serves names in containers' namespaces; None: names are not served.
        namespaces: None: containers' in ``paths.netns``, the node's own being this process's.
        log_default: log driver and options of tasks that name none.
        resolver: name servers for containers that name none.
        encryption: how networks are encrypted; None: this node does not.
    """
    namespaces = namespaces or Namespaces(paths.netns)
    naming = NameRegistration(names, resolver) if names is not None else None
    attachments = ClusterAttachments()
    network = container_network(
        paths,
        attachments=attachments,
        names=names,
        namespaces=namespaces,
        ports=ports or OwnReservations(namespaces),
        mesh_ports=mesh_ports,
        clock=clock,
        rng=rng,
        naming=naming,
        conditions=conditions,
        encryption=encryption,
    )
    config = EngineConfig(
        starts_max=2 * (os.cpu_count() or 1),
        hostname=hostname,
        log_default=log_default or Driver(name="json-file"),
        report_restore=conditions.reporter("restore") if conditions is not None else lambda _: None,
    )
    runtime = runtime_of(paths, programs or find_programs(), Cgroups(cgroup_parent), resolver)
    engine = Engine(
        runtime=runtime,
        images=images,
        volumes=Volumes(paths.volumes),
        network=network,
        clock=clock,
        config=config,
    )
    return OciExecutor(
        engine=engine,
        images=images,
        payloads=Payloads(paths.secrets),
        network=network,
        attachments=attachments,
        clock=clock,
        node=NodeFacts(id=NodeId(""), hostname=hostname, architecture=os.uname().machine),
    )


def runtime_of(paths: Paths, programs: Programs, cgroups: Cgroups, resolver: Path) -> Runtime:
    """runc and conmon with the containers' directories.  ``resolver``: the node's /etc/resolv.conf."""
    capacity = capacity_of(cgroups, programs)
    return Runtime(
        runc=programs.runc,
        conmon=programs.conmon,
        root=paths.runc,
        bundles=Bundles(paths.containers, paths.bundles, cgroups, capacity, resolver),
        cgroups=cgroups,
        capacity=capacity,
    )


def container_network(
    paths: Paths,
    *,
    namespaces: Namespaces,
    ports: PortReservations,
    mesh_ports: PortReservations | None = None,
    clock: Clock,
    rng: Callable[[], float],
    naming: NameRegistration | None = None,
    names: NameRegistry | None = None,
    attachments: ClusterAttachments | None = None,
    conditions: Conditions | None = None,
    encryption: Options | None = None,
) -> ContainerNetwork:
    """All networks of one node's containers.

    ``attachments``: plain containers' endpoints on the cluster's networks; None: there are none.
    ``encryption``: None: the node does not encrypt.
    """
    repairs, deferred = Repairs(), DeferredChanges(clock)
    healer = Healer(namespaces, clock, repairs, rng=rng)
    home = node_reconciler(namespaces, repairs)
    tunnels = Tunnels(
        paths,
        namespaces,
        encryption or NO_ENCRYPTION,
        repairs,
        clock,
        conditions.reporter("encrypted-networks") if conditions is not None else lambda _: None,
    )
    probe_namespace = ProbeNamespace(
        pins=Namespaces(paths.probes, namespaces.home),
        home=home,
        repairs=repairs,
        healer=healer,
        bridges=(BRIDGE,),
    )
    data_path = DataPath(probe_namespace, namespaces, clock, _random_number)
    overlays = Overlays(
        namespaces=namespaces,
        pins=Namespaces(paths.overlays, namespaces.home),
        home=home,
        healer=healer,
        deferred=deferred,
        tunnels=tunnels,
        measurements=data_path,
    )
    gateway = Gateway(
        namespaces=namespaces, home=home, deferred=deferred, ports=ports, state=paths.networks / "gateway"
    )
    local = LocalNetworks(paths.networks / "local", gateway, clock=clock, new_id=new_container_id)
    attachments = attachments or ClusterAttachments()
    mesh = Mesh(
        namespaces=namespaces,
        home=home,
        reply_routing=ReplyRouting(healer),
        ports=mesh_ports or OwnReservations(namespaces),
        relays=paths.relays,
        clock=clock,
        rng=rng,
    )
    prober = PathProber(
        data_path,
        PortChecks(PortProbe(namespaces, clock, _random_number), tunnels),
        paths.measured_paths,
        overlays.remeasured,
        clock,
        rng,
    )
    return ContainerNetwork(
        local=local,
        allocation=EndpointAllocation(LocalEndpoints(local, paths.tables, names), attachments),
        namespaces=namespaces,
        home=home,
        gateway=gateway,
        overlays=overlays,
        tunnels=tunnels,
        mesh=mesh,
        healer=healer,
        deferred=deferred,
        prober=prober,
        naming=naming,
        clock=clock,
        rng=rng,
        say=conditions.reporter("networks") if conditions is not None else lambda _: None,
    )


def _random_number() -> int:
    return secrets.randbits(64)
