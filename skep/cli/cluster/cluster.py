"""``skep cluster``: operations on the cluster for which Docker has no command."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from skep.cli.cluster.address import address
from skep.cli.cluster.freezes import freeze, unfreeze, window
from skep.cli.cluster.recover import recover
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.maintain.maintenance import settings_of
from skep.cli.maintain.rebalance import rebalance_setting
from skep.cli.output import OutputOptions, Shown, shows
from skep.cli.running import run_requests
from skep.errors import InvalidArgument
from skep.model.options.labels import FORGET_NODES, HEARTBEAT_GRACE, PREEMPTION, SHARE_IMAGES, WORKER_READS
from skep.model.permissions.rights import ALLOW_LABEL


@click.group()
def cluster() -> None:
    """Manage cluster settings and recovery.

    \b
    Examples:
      skep cluster grace 10s
      skep cluster pools --add 10.20.0.0/16
      skep cluster recover --dry-run
    """


for command in (address, recover, freeze, unfreeze, window, rebalance_setting):
    cluster.add_command(command)


@cluster.command()
@click.pass_obj
def resume(host: HostOptions) -> None:
    """Resume replacing the tasks of lost nodes.

    Replacement is suspended when many nodes go down at once.

    \b
    Example:
      skep cluster resume
    """
    run_requests(_resume(host))
    click.echo("Skep replaces tasks of nodes that are down again.")


@cluster.command()
@click.argument("duration", required=False)
@shows
@click.pass_obj
def grace(host: HostOptions, duration: str | None, output: OutputOptions) -> None:
    """Show or set how long a silent node counts as alive.

    DURATION is a time such as 10s, or "default" for three heartbeats.

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
def forget_nodes(host: HostOptions, duration: str | None, output: OutputOptions) -> None:
    """Show or set when down workers are removed.

    DURATION is the time that a down worker is kept, or "never".

    The minimum is one minute. Managers are never removed, nor workers with a published cluster volume or with tasks
    that must stay there. Nothing is removed unless more than half of all nodes are ready.

    A removed node has to join again when it returns. To remove a node now, run skep node forget.

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
    "--size", type=int, default=0, metavar="LENGTH", help="Prefix length of the subnets of new networks."
)
@shows
@click.pass_obj
def pools(
    host: HostOptions, add: Sequence[str], remove: Sequence[str], size: int, output: OutputOptions
) -> None:
    """Show or change the address pools of networks.

    Existing networks keep their subnets.

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
        lines = [f"{row['Subnet']}, in subnets of /{row['SubnetSize']}" for row in rows]
        return Shown(data=rows, rows=rows, lines=lambda _: iter(lines))

    output.show(fetch)


@cluster.command()
@click.argument("rights", metavar="[RIGHT]...", nargs=-1)
@shows
@click.pass_obj
def allow(host: HostOptions, rights: tuple[str, ...], output: OutputOptions) -> None:
    """Show or set the rights that services can get.

    RIGHT is privileged, devices, gpus, namespaces, resources, api, api-inspect, processes, all or none.

    Services request rights by labels of their containers, such as skep.devices=/dev/ttyUSB0. If you withdraw a right,
    services keep it until their next update.

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
def worker_reads(host: HostOptions, switch: str | None, output: OutputOptions) -> None:
    """Show or set whether workers' APIs show the cluster.

    If on, clients of workers can read services, tasks, nodes, networks and events, including the environment variables
    of services. Proxies and dashboards can then connect to a worker.

    \b
    Example:
      skep cluster worker-reads on
    """
    _show_switch(host, output, WORKER_READS, "WorkerReads", switch)


@cluster.command()
@click.argument("switch", required=False, type=click.Choice(["on", "off"]))
@shows
@click.pass_obj
def preemption(host: HostOptions, switch: str | None, output: OutputOptions) -> None:
    """Show or set whether higher priorities preempt tasks.

    The label skep.priority of a service sets its priority.

    If on, the scheduler stops tasks of lower priority when a task of higher priority fits on no node. It stops as few
    tasks as possible, the lowest priority first. Stopped tasks wait for free resources. If off, the priority only
    orders the tasks that wait.

    \b
    Example:
      skep cluster preemption on
    """
    _show_switch(host, output, PREEMPTION, "Preemption", switch)


@cluster.command("share-images")
@click.argument("switch", required=False, type=click.Choice(["on", "off"]))
@shows
@click.pass_obj
def share_images(host: HostOptions, switch: str | None, output: OutputOptions) -> None:
    """Show or set whether nodes share all their images.

    If on, every node can read all images of every other node. If off, a worker can only read the images that its own
    tasks use. Managers can always read all images.

    \b
    Example:
      skep cluster share-images on
    """
    _show_switch(host, output, SHARE_IMAGES, "ShareImages", switch)


@cluster.command("rotate-keys")
@click.pass_obj
def rotate_keys(host: HostOptions) -> None:
    """Encrypt the managers' store with a new data key.

    New values use the new key at once. Existing values are re-encrypted in the background. Nothing restarts.

    \b
    Example:
      skep cluster rotate-keys
    """
    run_requests(_rotate_keys(host))
    click.echo("A new data key is in use. Existing values are re-encrypted in the background.")


def _show_setting(
    host: HostOptions, output: OutputOptions, label: str, value: str | None, shown: Callable[[str], Shown]
) -> None:
    """Set a label of the cluster's spec and show the result.  An empty value removes the label, None only shows it."""
    if value is not None:
        run_requests(_set_label(host, label, value))

    async def fetch() -> Shown:
        labels = (await _swarm(host))["Spec"].get("Labels") or {}
        return shown(str(labels.get(label, "")))

    output.show(fetch)


def _show_switch(host: HostOptions, output: OutputOptions, label: str, name: str, switch: str | None) -> None:
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
        swarm: dict[str, Any] = await client.get("/swarm", timeout_s=RESPONSE_TIMEOUT_S)
        labels = dict(swarm["Spec"].get("Labels") or {})
        labels.pop(name, None)
        if value:
            labels[name] = value
        spec = {**swarm["Spec"], "Labels": labels}
        version = str(swarm["Version"]["Index"])
        try:
            await client.post("/swarm/update", spec, timeout_s=RESPONSE_TIMEOUT_S, version=version)
        except InvalidArgument as error:
            _, is_about_label, reason = str(error).partition(f"label {name}={value}: ")
            if not is_about_label:
                raise
            raise InvalidArgument(
                f"invalid value {value!r}: {reason}. Run the command with --help to see examples."
            ) from error


async def _change_pools(host: HostOptions, change: Mapping[str, Any]) -> None:
    async with host.client() as client:
        await client.post("/skep/cluster/pools", change, timeout_s=RESPONSE_TIMEOUT_S)


async def _resume(host: HostOptions) -> None:
    async with host.client() as client:
        await client.post("/skep/cluster/resume", timeout_s=RESPONSE_TIMEOUT_S)


async def _rotate_keys(host: HostOptions) -> None:
    async with host.client() as client:
        await client.post("/skep/cluster/rotate-keys", timeout_s=RESPONSE_TIMEOUT_S)
