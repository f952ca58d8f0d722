"""``skep cluster``: operations on the cluster for which Docker has no command."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from skep.cli.endpoint import HostOptions
from skep.cli.maintenance import settings_of
from skep.cli.output import Output, Shown, shows
from skep.cli.recover import recover
from skep.cli.running import run_requests
from skep.model.labels import FORGET_NODES, HEARTBEAT_GRACE, PREEMPTION, SHARE_IMAGES, WORKER_READS
from skep.model.rights import ALLOW_LABEL

_RESPONSE_TIMEOUT_S = 15.0


@click.group()
def cluster() -> None:
    """Manage cluster settings and recovery.

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
    """Resume replacing the tasks of lost nodes.

    Replacement is suspended when many nodes go down at once.

    \b
    Examples:
      skep cluster resume
    """
    run_requests(_resume(host))
    click.echo("Tasks of nodes that are down are replaced again.")


@cluster.command()
@click.argument("duration", required=False)
@shows
@click.pass_obj
def grace(host: HostOptions, duration: str | None, output: Output) -> None:
    """Show or set how long a silent node counts as alive.

    DURATION can be "default": three heartbeats.

    \b
    Examples:
      skep cluster grace 10s
      skep cluster grace default
    """
    _show_setting(
        host,
        output,
        HEARTBEAT_GRACE,
        "" if duration == "default" else duration,
        lambda value: Shown(
            data={"Grace": value or "default"}, lines=lambda _: iter([value or "three heartbeat periods"])
        ),
    )


@cluster.command("forget-nodes")
@click.argument("duration", required=False)
@shows
@click.pass_obj
def forget_nodes(host: HostOptions, duration: str | None, output: Output) -> None:
    """Show or set when down workers are removed.

    DURATION is the time that a down worker is kept, or "never".

    The shortest time is a minute. Managers are never removed. Nothing is removed unless more than half of all nodes are
    ready. Nodes with a published cluster volume, or with tasks that stay there (skep.on-disconnect=keep,
    skep.volume-affinity=required), are kept. skep status shows why. A removed node has to join again when it returns.
    To remove one now, run skep node forget.

    \b
    Examples:
      skep cluster forget-nodes 24h
      skep cluster forget-nodes never
    """
    _show_setting(
        host,
        output,
        FORGET_NODES,
        "" if duration == "never" else duration,
        lambda value: Shown(data={"ForgetNodes": value or "never"}, lines=lambda _: iter([value or "never"])),
    )


@cluster.command()
@click.option("--add", multiple=True, metavar="SUBNET", help="Add an address pool.")
@click.option(
    "--remove", multiple=True, metavar="SUBNET", help="Remove an address pool that no network uses."
)
@click.option(
    "--size", type=int, default=0, metavar="LENGTH", help="Prefix length of further networks' subnets."
)
@shows
@click.pass_obj
def pools(host: HostOptions, add: Sequence[str], remove: Sequence[str], size: int, output: Output) -> None:
    """Show or change the address pools of networks.

    Networks keep the subnets they have.

    \b
    Examples:
      skep cluster pools
      skep cluster pools --add 10.20.0.0/16 --remove 10.0.0.0/8
      skep cluster pools --size 26
    """
    if add or remove or size:
        run_requests(_change_pools(host, {"Add": add, "Remove": remove, "SubnetSize": size}))

    async def fetch() -> Shown:
        swarm = await _swarm(host)
        rows = [{"Subnet": pool, "SubnetSize": swarm["SubnetSize"]} for pool in swarm["DefaultAddrPool"]]
        lines = [f"{row['Subnet']}\tsubnets of /{row['SubnetSize']}" for row in rows]
        return Shown(data=rows, rows=rows, lines=lambda _: iter(lines))

    output.show(fetch)


@cluster.command()
@click.argument("rights", metavar="[RIGHT]...", nargs=-1)
@shows
@click.pass_obj
def allow(host: HostOptions, rights: tuple[str, ...], output: Output) -> None:
    """Show or set the rights that services can get.

    RIGHT is privileged, devices, gpus, namespaces, resources, api, api-inspect, all or none.

    Services ask for them by labels of their containers, such as skep.devices=/dev/ttyUSB0.  What was allowed stays with
    the services that have it until they are updated.

    \b
    Examples:
      skep cluster allow devices resources
      skep cluster allow none
    """
    _show_setting(
        host,
        output,
        ALLOW_LABEL,
        "" if rights == ("none",) else ",".join(rights) or None,
        lambda value: Shown(
            data={"Allowed": value.split(",") if value else []}, lines=lambda _: iter([value or "none"])
        ),
    )


@cluster.command("worker-reads")
@click.argument("switch", required=False, type=click.Choice(["on", "off"]))
@shows
@click.pass_obj
def worker_reads(host: HostOptions, switch: str | None, output: Output) -> None:
    """Show or set whether workers' APIs show the cluster.

    If on, clients of workers can read services, tasks, nodes, networks and events.

    Proxies and dashboards need no manager then.  They see what clients of managers see, the environment of services
    among it.

    \b
    Examples:
      skep cluster worker-reads on
    """
    _show_switch(host, output, WORKER_READS, "WorkerReads", switch)


@cluster.command()
@click.argument("switch", required=False, type=click.Choice(["on", "off"]))
@shows
@click.pass_obj
def preemption(host: HostOptions, switch: str | None, output: Output) -> None:
    """Show or set whether higher priorities preempt tasks.

    With preemption on, tasks are stopped if a task with a higher priority has no other node.

    Services get a priority by their label skep.priority.  As few tasks as possible are stopped, those of the lowest
    priority first, and wait until there is room again.  When it is off, tasks of higher priority come first only among
    those that wait.

    \b
    Examples:
      skep cluster preemption on
    """
    _show_switch(host, output, PREEMPTION, "Preemption", switch)


@cluster.command("share-images")
@click.argument("switch", required=False, type=click.Choice(["on", "off"]))
@shows
@click.pass_obj
def share_images(host: HostOptions, switch: str | None, output: Output) -> None:
    """Show or set whether nodes share all their images.

    If on, every node can read the images of every other node.

    When it is off, a worker gets from other nodes only images that its own tasks use, and managers get every image.
    Turn it on if people pull images on workers that only another node has.

    \b
    Examples:
      skep cluster share-images on
    """
    _show_switch(host, output, SHARE_IMAGES, "ShareImages", switch)


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


def _show_setting(
    host: HostOptions, output: Output, label: str, value: str | None, shown: Callable[[str], Shown]
) -> None:
    """Set a label of the cluster's spec and show the result.  An empty value removes the label, None only shows it."""
    if value is not None:
        run_requests(_set_label(host, label, value))

    async def fetch() -> Shown:
        labels = (await _swarm(host))["Spec"].get("Labels") or {}
        return shown(str(labels.get(label, "")))

    output.show(fetch)


def _show_switch(host: HostOptions, output: Output, label: str, name: str, switch: str | None) -> None:
    """Set and show a label that is ``true`` or unset, as ``_show_setting`` does."""

    def shown(value: str) -> Shown:
        is_on = value.lower() == "true"
        return Shown(data={name: is_on}, lines=lambda _: iter(["on" if is_on else "off"]))

    value = None if switch is None else "true" if switch == "on" else ""
    _show_setting(host, output, label, value, shown)


async def _swarm(host: HostOptions) -> Mapping[str, Any]:
    async with host.client() as client:
        return await settings_of(client)


async def _set_label(host: HostOptions, name: str, value: str) -> None:
    async with host.client() as client:
        swarm: dict[str, Any] = await client.get("/swarm", timeout_s=_RESPONSE_TIMEOUT_S)
        labels = dict(swarm["Spec"].get("Labels") or {})
        labels.pop(name, None)
        if value:
            labels[name] = value
        spec = {**swarm["Spec"], "Labels": labels}
        version = str(swarm["Version"]["Index"])
        await client.post("/swarm/update", spec, timeout_s=_RESPONSE_TIMEOUT_S, version=version)


async def _change_pools(host: HostOptions, change: Mapping[str, Any]) -> None:
    async with host.client() as client:
        await client.post("/skep/cluster/pools", change, timeout_s=_RESPONSE_TIMEOUT_S)


async def _resume(host: HostOptions) -> None:
    async with host.client() as client:
        await client.post("/skep/cluster/resume", timeout_s=_RESPONSE_TIMEOUT_S)


async def _rotate_keys(host: HostOptions) -> None:
    async with host.client() as client:
        await client.post("/skep/cluster/rotate-keys", timeout_s=_RESPONSE_TIMEOUT_S)
