"""Networks whose subnets are too small for the services of a stack.  Pure.

Only the stack's own services are counted, because no plan knows when tasks of others end.  So a warning is never wrong,
but a network that other stacks use may be too small without one.
"""

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_interface
from typing import Any, Final

from skep.model.service import ServiceSpec
from skep.model.values.counts import counted
from skep.stack.compose.document import FileProblem
from skep.stack.project import Stack, StackNetwork

_DNS_ROUND_ROBIN: Final = "dnsrr"


def shortages(stack: Stack, existing: Sequence[Mapping[str, Any]]) -> Iterator[FileProblem]:
    """Yield a warning for each network with fewer IPv4 addresses than the stack's tasks and services need at once.

    Args:
        existing: Networks of the cluster, as ``GET /networks`` returns them.
    """
    now = {str(one.get("Name", "")): one for one in existing}
    for network in stack.networks.values():
        size = _size(network, now.get(network.name))
        if size is None:
            continue
        specs = [one.spec for one in stack.services.values() if _uses(one.spec, network.name)]
        tasks = sum(map(_tasks, specs))
        virtual = sum(not _has_no_address(spec) for spec in specs)
        if tasks + virtual > size:
            short = min(tasks + virtual - size, tasks)
            text = (
                f"the network {network.name} has {counted(size, 'address', 'addresses')}, and its services need "
                f"{tasks + virtual}, one for each task and each service. {counted(short, 'task')} will wait. Choose a "
                "larger subnet or fewer replicas."
            )
            yield FileProblem(network.place, f"networks.{network.name}", text)


def _size(network: StackNetwork, found: Mapping[str, Any] | None) -> int | None:
    """Return the number of IPv4 addresses for tasks and services, or None if a manager has yet to choose the subnet."""
    ipam = (found if found is not None else network.body).get("IPAM") or {}
    configs = [one for one in ipam.get("Config") or () if one.get("Subnet") and ":" not in one["Subnet"]]
    return sum(map(_addresses, configs)) if configs else None


def _addresses(config: Mapping[str, Any]) -> int:
    """Return the number of addresses of one subnet, or of its range, without the gateway and auxiliary addresses."""
    subnet = ip_interface(config["Subnet"]).network
    hosts = ip_interface(config["IPRange"]).network if config.get("IPRange") else subnet
    reserved = {subnet.network_address, subnet.broadcast_address}
    named = [
        config.get("Gateway", ""),
        *(config.get("AuxiliaryAddresses") or config.get("AuxAddress") or {}).values(),
    ]
    reserved |= {ip_interface(text).ip for text in named if text}
    if not config.get("Gateway"):
        # A manager chooses one of the addresses of the range.
        return hosts.num_addresses - sum(one in hosts for one in reserved) - 1
    return hosts.num_addresses - sum(one in hosts for one in reserved)


def _uses(spec: ServiceSpec, network: str) -> bool:
    return any(one.target == network for one in spec.task_template.networks)


def _tasks(spec: ServiceSpec) -> int:
    """Return how many tasks run at the same time.  A global service has at least one."""
    job = spec.mode.replicated_job
    if job is not None:
        return min(job.max_concurrent or 1, job.total_completions or 1)
    return 1 if spec.mode.name in ("global", "global-job") else spec.replicas


def _has_no_address(spec: ServiceSpec) -> bool:
    return spec.endpoint_spec is not None and spec.endpoint_spec.mode == _DNS_ROUND_ROBIN
