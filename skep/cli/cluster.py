"""``skep cluster``: operations on the cluster for which Docker has no command."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from skep.cli.endpoint import HostOptions
from skep.cli.recover import recover
from skep.cli.running import run_requests
from skep.model.labels import FORGET_NODES, HEARTBEAT_GRACE, WORKER_READS, allows_worker_reads
from skep.model.rights import ALLOW_LABEL

_ANSWERS_WITHIN_S = 15.0


@click.group()
def cluster() -> None:
    """Settings and actions of the cluster that docker has no command for.

    \b
    Examples:
      skep cluster grace 10s
      skep cluster pools --add 10.20.0.0/16
      skep cluster recover --dry-run
    """


cluster.add_command(recover)


@cluster.command()
@click.pass_obj
def resume(host: HostOptions) -> None:
    """Resume the replacement of tasks after it was suspended because many nodes went down at once.

    \b
    Examples:
      skep cluster resume
    """
    run_requests(_resume(host))
    click.echo("Tasks of nodes that are down are replaced again.")


@cluster.command()
@click.argument("duration", required=False)
@click.pass_obj
def grace(host: HostOptions, duration: str | None) -> None:
    """Show or set how long a silent node counts as alive (DURATION, or "default": three heartbeats).

    \b
    Examples:
      skep cluster grace 10s
      skep cluster grace default
    """
    click.echo(run_requests(_grace(host, duration)))


@cluster.command("forget-nodes")
@click.argument("duration", required=False)
@click.pass_obj
def forget_nodes(host: HostOptions, duration: str | None) -> None:
    """Show or set how long a worker that is down is kept before it is removed (DURATION, or "never").

    At least a minute.  Managers are never removed, nor anything unless more than half of all nodes are ready, nor
    nodes with tasks that are to stay there (skep.on-disconnect=keep, skep.volumes=keep).  A removed node that
    comes back has to join again.  skep node forget removes one now.

    \b
    Examples:
      skep cluster forget-nodes 24h
      skep cluster forget-nodes never
    """
    value = "" if duration == "never" else duration
    click.echo(run_requests(_label(host, FORGET_NODES, value)) or "never")


@cluster.command()
@click.option("--add", multiple=True, metavar="SUBNET", help="Add an address pool.")
@click.option(
    "--remove", multiple=True, metavar="SUBNET", help="Remove an address pool that no network uses."
)
@click.option(
    "--size", type=int, default=0, metavar="LENGTH", help="Prefix length of further networks' subnets."
)
@click.pass_obj
def pools(host: HostOptions, add: Sequence[str], remove: Sequence[str], size: int) -> None:
    """Show or change the address pools that networks get their subnets from.

    Networks keep the subnets they have.

    \b
    Examples:
      skep cluster pools
      skep cluster pools --add 10.20.0.0/16 --remove 10.0.0.0/8
      skep cluster pools --size 26
    """
    change = {"Add": add, "Remove": remove, "SubnetSize": size}
    shown = run_requests(_pools(host, change if add or remove or size else None))
    for pool in shown["DefaultAddrPool"]:
        click.echo(f"{pool}\tsubnets of /{shown['SubnetSize']}")


@cluster.command()
@click.argument("rights", metavar="[RIGHT]...", nargs=-1)
@click.pass_obj
def allow(host: HostOptions, rights: tuple[str, ...]) -> None:
    """Show or set the rights over their nodes that services may have (RIGHT: privileged, devices, gpus,
    namespaces, resources, api, api-inspect; "all"; "none").

    Services ask for them by labels of their containers, such as skep.devices=/dev/ttyUSB0.  What was allowed stays with
    the services that have it until they are updated.

    \b
    Examples:
      skep cluster allow devices resources
      skep cluster allow none
    """
    click.echo(run_requests(_allow(host, rights)))


@cluster.command("worker-reads")
@click.argument("switch", required=False, type=click.Choice(["on", "off"]))
@click.pass_obj
def worker_reads(host: HostOptions, switch: str | None) -> None:
    """Show or set whether clients of workers may read services, tasks, nodes, networks and events there.

    Proxies and dashboards need no manager then.  They see what clients of managers see, the environment of services
    among it.

    \b
    Examples:
      skep cluster worker-reads on
    """
    click.echo(run_requests(_worker_reads(host, switch)))


@cluster.command("rotate-keys")
@click.pass_obj
def rotate_keys(host: HostOptions) -> None:
    """Encrypt the managers' store with a new data key.

    New values use it at once, existing ones are re-encrypted in the background.  Nothing restarts.

    \b
    Examples:
      skep cluster rotate-keys
    """
    run_requests(_rotate_keys(host))
    click.echo("A new data key is in use; what was written before is re-encrypted in the background.")


async def _pools(host: HostOptions, change: Mapping[str, Any] | None) -> Mapping[str, Any]:
    async with host.client() as client:
        if change is None:
            swarm: dict[str, Any] = await client.get("/swarm", timeout_s=_ANSWERS_WITHIN_S)
            return swarm
        changed: dict[str, Any] = await client.post(
            "/skep/cluster/pools", change, timeout_s=_ANSWERS_WITHIN_S
        )
        return changed


async def _resume(host: HostOptions) -> None:
    async with host.client() as client:
        await client.post("/skep/cluster/resume", timeout_s=_ANSWERS_WITHIN_S)


async def _rotate_keys(host: HostOptions) -> None:
    async with host.client() as client:
        await client.post("/skep/cluster/rotate-keys", timeout_s=_ANSWERS_WITHIN_S)


async def _grace(host: HostOptions, duration: str | None) -> str:
    value = "" if duration == "default" else duration
    return await _label(host, HEARTBEAT_GRACE, value) or "three heartbeat periods"


async def _allow(host: HostOptions, rights: tuple[str, ...]) -> str:
    value = "" if rights == ("none",) else ",".join(rights) or None
    return await _label(host, ALLOW_LABEL, value) or "none"


async def _worker_reads(host: HostOptions, switch: str | None) -> str:
    value = None if switch is None else "true" if switch == "on" else ""
    return "on" if allows_worker_reads({WORKER_READS: await _label(host, WORKER_READS, value)}) else "off"


async def _label(host: HostOptions, name: str, value: str | None) -> str:
    """Set a label of the cluster's spec, as any client may; empty removes it.  Gives what holds then."""
    async with host.client() as client:
        swarm: dict[str, Any] = await client.get("/swarm", timeout_s=_ANSWERS_WITHIN_S)
        labels = dict(swarm["Spec"].get("Labels") or {})
        if value is not None:
            labels.pop(name, None)
            if value:
                labels[name] = value
            spec = {**swarm["Spec"], "Labels": labels}
            version = str(swarm["Version"]["Index"])
            await client.post("/swarm/update", spec, timeout_s=_ANSWERS_WITHIN_S, version=version)
        return str(labels.get(name, ""))
