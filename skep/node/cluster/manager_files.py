"""Writes the files that this node's manager process reads at its start (``skep.bootstrap``)."""

import os
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from skep import bootstrap
from skep.api.formats.swarm_requests import Founding
from skep.bootstrap import Bootstrap, ManagerConfig, Recovery, load_recovery, save_recovery
from skep.configuration.configuration import Configuration
from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.linux.files import file_exists, replace_file
from skep.linux.own_user_namespace import is_rootless
from skep.model.values.times import Timestamp
from skep.node.cluster.founding import NewCluster, bind_error, check_listening, chosen_peer_addr, peer_warning
from skep.node.cluster.local import LocalNode
from skep.node.cluster.restoring import RestoredData

log = structlog.get_logger()


class ManagerFiles:
    """Files of one node's manager.  All methods that write block.

    ``configuration`` returns the present configuration, which may be reloaded.
    """

    def __init__(self, configuration: Callable[[], Configuration], hostname: str) -> None:
        self._configuration = configuration
        self._paths = configuration().paths
        self._hostname = hostname

    def write_new(self, node: LocalNode, new: NewCluster | None) -> None:
        """Write the files for a manager's first start.

        ``new`` is the cluster to create, or None to join ``node.managers``.
        """
        configuration, paths = self._configuration(), self._paths
        paths.manager_keys.mkdir(mode=0o700, parents=True, exist_ok=True)
        if new is not None:
            replace_file(paths.root_ca_key, new.root_key_pem, mode=0o600)
        peer_addr = chosen_peer_addr(node.listen_addr, configuration.peer_addr)
        self._log_peer_addr(node.listen_addr, peer_addr)
        self._write(
            ManagerConfig(
                data_dir=str(paths.data),
                run_dir=str(paths.run),
                node_id=node.node_id,
                cluster_id=node.cluster_id,
                listen_addr=node.listen_addr,
                peer_addr=peer_addr,
                advertise_addr=node.advertise_addr,
                hostname=self._hostname,
                bootstrap=_bootstrap(new.plan) if new is not None else None,
                managers=() if new is not None else _others(node),
                look_at=configuration.managers,
                etcd_binary=str(configuration.etcd_binary or ""),
                store_quota=configuration.store_quota,
                trace_endpoint=configuration.trace_endpoint,
                acme_dns_hook=str(configuration.acme_dns_hook or ""),
            )
        )

    def write_restored(self, restored: RestoredData) -> None:
        """Write the files for a manager that starts from a backup, as the only one of its cluster."""
        paths = self._paths
        self.write_new(restored.node, None)
        config = bootstrap.load(paths.manager_config)
        self._write(msgspec.structs.replace(config, managers=()))
        replace_file(paths.wrapping_key, restored.wrapping_key, mode=0o600)
        os.replace(restored.snapshot, paths.recovery_snapshot)
        save_recovery(paths, Recovery())

    def write_recovery(self, node: LocalNode, lost_at: Timestamp) -> None:
        """Write the files for a manager that continues its cluster alone, with its data.

        Continues an unfinished recovery.  ``lost_at``: as in ``Recovery``.

        Raises: Unavailable: etcd's port is in use.
        """
        paths = self._paths
        config = bootstrap.load(paths.manager_config)
        config = msgspec.structs.replace(
            config, listen_addr=node.listen_addr, advertise_addr=node.advertise_addr, managers=()
        )
        if (error := bind_error(config.peer_listen)) is not None:
            raise Unavailable(f"etcd cannot listen on {config.peer_listen}: {error.strerror}: free the port")
        self._write(config)
        if load_recovery(paths) is None:
            paths.recovery_snapshot.unlink(missing_ok=True)
            save_recovery(paths, Recovery(lost_at=lost_at))

    def update(self, node: LocalNode) -> None:
        """Write the node's present address and the reloadable settings for the next start of the manager."""
        path = self._paths.manager_config
        if not file_exists(path):
            return  # the manager process reports the damage
        before = bootstrap.load(path)
        self._log_peer_addr(before.listen_addr, before.peer_listen)
        configuration = self._configuration()
        config = msgspec.structs.replace(
            before,
            advertise_addr=node.advertise_addr or before.advertise_addr,
            look_at=configuration.managers,
            store_quota=configuration.store_quota,
            trace_endpoint=configuration.trace_endpoint,
            acme_dns_hook=str(configuration.acme_dns_hook or ""),
        )
        if config != before:
            self._write(config)

    def check_ports(self, listen_addr: str) -> None:
        """Check that a new manager and its etcd can listen.

        Raises: Untranslated: a port is not free; FailedPrecondition: the node is rootless.
        """
        if is_rootless():
            raise FailedPrecondition(
                "a rootless node cannot manage a cluster, because other nodes do not reach it: "
                "join one with the worker token, or start skep as root"
            )
        check_listening(listen_addr, self._configuration().peer_addr)

    def peer_section(self, node: LocalNode) -> dict[str, Any]:
        """Return fields of ``/info``: ``PeerAddr``, where other managers reach this manager's etcd, and ``Warnings``
        about its port.

        Empty if the file is missing or damaged, which the manager process reports.
        """
        try:
            config = bootstrap.load(self._paths.manager_config)
        except SkepError:
            return {}
        section: dict[str, Any] = {"PeerAddr": config.peer_advertised}
        warning = peer_warning(node.listen_addr, self._configuration().peer_addr, config.peer_listen)
        return section | ({"Warnings": [f"WARNING: {warning}"]} if warning else {})

    def _write(self, config: ManagerConfig) -> None:
        replace_file(self._paths.manager_config, bootstrap.encode(config), mode=0o600)

    def _log_peer_addr(self, listen_addr: str, peer_addr: str) -> None:
        if warning := peer_warning(listen_addr, self._configuration().peer_addr, peer_addr):
            log.warning("etcd's peer port", peer_addr=peer_addr, warning=warning)


def _others(node: LocalNode) -> tuple[str, ...]:
    """Return the addresses of the other managers, any of which may admit this node as a manager."""
    return tuple(peer.addr for peer in node.managers if peer.node_id != node.node_id)


def _bootstrap(plan: Founding) -> Bootstrap:
    return Bootstrap(
        spec=plan.spec,
        default_addr_pool=plan.default_addr_pool,
        subnet_size=plan.subnet_size,
        data_path_port=plan.data_path_port,
        availability=plan.availability,
    )
