"""``skep stack``: docker's commands, and commands that read Compose files completely: config, plan, deploy."""

import asyncio
import functools
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import click
import msgspec

from skep.api.client.requests import Requests, overriding
from skep.cli import options, passthrough
from skep.cli.apps.registry_logins import RegistryLogins
from skep.cli.cluster.freezes import freeze_stack, strict_freezes, unfreeze_stack, window_of_stack
from skep.cli.endpoint import HostOptions
from skep.cli.output import OutputOptions, Shown, shows
from skep.cli.running import errors_shown, run_requests
from skep.cli.stack.stack_builds import build_images
from skep.cli.stack.stack_files import GivenFiles, chooses_services, plan_with_cluster, reads_files
from skep.cli.stack.stack_lists import ls, ps, services
from skep.cli.stack.stack_quota import quota
from skep.cli.stack.stack_screens import (
    ProgressPrinter,
    compared,
    dumped,
    lines_of,
    max_failures,
    planned,
    revisions,
    warn,
)
from skep.cli.stack.stack_stops import start, stop
from skep.errors import NotFound, PermissionDenied, SkepError, Unavailable
from skep.model.task_end import printable
from skep.stack.claims import Replaced
from skep.stack.cluster_state import (
    NO_LOGINS,
    check,
    known_revisions,
    with_placements,
)
from skep.stack.compose.document import FileProblems
from skep.stack.created import CreatedObjects
from skep.stack.deploying import Deployment
from skep.stack.planning import StackPlan
from skep.stack.project import Stack
from skep.stack.recording import carry_out, return_plan, undo
from skep.stack.removing import remove
from skep.stack.revisions import before, by_number, pair_of, refused

_HINT = re.compile(r"\. Run skep explain \S+\.$")


_ALIASES = {"up": "deploy", "down": "rm", "remove": "rm", "list": "ls"}
"""Docker's aliases of stack commands."""


class _Stack(click.Group):
    """A command group that accepts docker's aliases."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, _ALIASES.get(cmd_name, cmd_name))


@click.group(cls=_Stack)
def stack() -> None:
    """Deploy and manage Compose stacks.

    \b
    Examples:
      skep stack plan -c compose.yaml shop       show what a deploy would change
      skep stack deploy -c compose.yaml shop     deploy it
      skep stack services shop                   list its services
    """


for command in (ls, services, ps, quota, start, stop, freeze_stack, unfreeze_stack, window_of_stack):
    stack.add_command(command)


# --- config --------------------------------------------------------------------------------------------------------


@stack.command()
@reads_files
@click.option("-q", "--quiet", is_flag=True, help="Only check the files.")
@click.option("--services", "names_only", is_flag=True, help="Print the service names, one per line.")
def config(
    *,
    given: GivenFiles,
    quiet: bool,
    names_only: bool,
) -> None:
    """Check and print merged Compose files.

    Replaces variables. Prints $ as $$, so that the output is a valid Compose file.

    \b
    Examples:
      skep stack config -c compose.yaml
      skep stack config -q -c compose.yaml -c production.yaml
    """
    with errors_shown():
        _, loaded = msgspec.structs.replace(given, name=given.name or "config").read()
    if names_only:
        click.echo("\n".join(loaded.document.plain().get("services", {})))
    elif not quiet:
        click.echo(dumped(loaded.document))


# --- plan ----------------------------------------------------------------------------------------------------------


def _show_plan(plan: StackPlan) -> None:
    click.echo("\n".join(lines_of(plan)), err=True)


async def _all_or_nothing(
    client: Requests, plan: StackPlan, work: Callable[[CreatedObjects], Awaitable[None]], timeout: float
) -> None:
    """Deploy, and undo the deploy if it fails.  Raises: SkepError: it failed.  The error has the result of the undo."""
    created = CreatedObjects(began_ns=time.time_ns())
    try:
        await work(created)
    except (Replaced, FileProblems):
        raise  # this deploy changed nothing, or another deploy has taken over
    except SkepError as error:
        # The undo removes what a next step would name.
        cause = _HINT.sub("", str(error)).rstrip(".")
        click.echo(f"The deploy failed: {cause}", err=True)
        done = await _undone(client, plan, error, timeout, created)
        # Services of the failed deploy can no longer be explained.  A stack that is back keeps the failed revision.
        hint = "" if plan.is_new or created.is_whole else f" Run skep stack history {plan.stack}."
        raise Unavailable(f"the deploy failed, and {done}. Reason: {cause}.{hint}") from error


async def _undone(
    client: Requests, failed: StackPlan, error: SkepError, timeout: float, created: CreatedObjects
) -> str:
    """Undo a deploy that failed with ``error``, and return the result.  Raises: Unavailable, with both errors."""
    try:
        return await undo(client, failed, ProgressPrinter().show, timeout, warn, created)
    except SkepError as problem:
        cause = _HINT.sub("", str(error)).rstrip(".")
        raise Unavailable(
            f"the deploy failed: {cause}. The previous revision cannot be deployed again: {problem}"
        ) from error


@stack.command()
@reads_files
@click.option("--prune", is_flag=True, help="Plan the removal of services that the files no longer have.")
@chooses_services
@shows
@click.pass_obj
def plan(
    host: HostOptions,
    *,
    given: GivenFiles,
    prune: bool,
    only: tuple[str, ...],
    resolve_image: str,
    output: OutputOptions,
) -> None:
    """Show what a deploy would change.

    Compares the files with the cluster and shows the changed fields, the nodes that would get tasks, and the reasons if
    tasks do not fit. Anything that the managers would refuse is an error. Nothing changes in the cluster.

    Exit code 0: nothing would change. 2: something would change. 1: the files are invalid, or the managers refuse them.

    \b
    Examples:
      skep stack plan -c compose.yaml shop
      skep stack plan --prune --only web
    """

    async def fetch() -> Shown:
        made, _ = given.read()
        async with host.requests() as client:
            found = await plan_with_cluster(client, made, prune=prune, only=only, resolve=resolve_image)
            await check(client, made, found, warn)
            for refusal in await strict_freezes(client, made.name):
                warn(refusal)
            if not found.effective:
                return planned(
                    found, await Deployment(client, made, found, lambda *_: None).find_unfinished()
                )
            return planned(await with_placements(client, found, warn))

    output.show(fetch)


# --- deploy and rm -------------------------------------------------------------------------------------------------


def _logins(host: HostOptions, stack: Stack, only: Sequence[str]) -> Mapping[str, str]:
    """Return registry logins by image.  Raises: InvalidArgument: the logins of docker are unreadable."""
    logins = RegistryLogins(host.docker_folder)
    images = {
        one.spec.task_template.container_spec.image
        for name, one in stack.services.items()
        if one.spec.task_template.container_spec and (not only or name in only)
    }
    return {image: login for image in sorted(images) if (login := logins.of(image))}


@stack.command()
@reads_files
@click.option("--prune", is_flag=True, help="Remove services that the files no longer have.")
@chooses_services
@click.option(
    "--rollback-on-failure",
    is_flag=True,
    help="Deploy the previous revision again if this deploy fails.",
)
@click.option(
    "--with-registry-auth",
    is_flag=True,
    help="Send the credentials of docker login to the nodes.",
)
@click.option("-d", "--detach", is_flag=True, help="Do not wait until the services run.")
@options.timeout()
@max_failures
@options.override_freeze
@click.pass_obj
def deploy(
    host: HostOptions,
    *,
    given: GivenFiles,
    prune: bool,
    only: tuple[str, ...],
    resolve_image: str,
    rollback_on_failure: bool,
    with_registry_auth: bool,
    detach: bool,
    timeout: float,
    max_failures: int,
    override_freeze: bool,
) -> None:
    """Deploy a stack and wait until its services run.

    Tasks start in the order of depends_on. If the content of a secret or config changes, the services that use it are
    updated. If a deploy is interrupted, rerun it.

    The command fails early if tasks keep failing or no node can run them. If you deploy the stack again meanwhile, the
    newer deploy replaces the older one.

    Exit code 0: all services run. 1: the deploy failed. 2: the options are invalid.

    \b
    Examples:
      skep stack deploy -c compose.yaml shop
      skep stack deploy --prune --detach
    """
    progress = ProgressPrinter()
    if rollback_on_failure and (detach or only):
        raise click.UsageError("--rollback-on-failure cannot be used with --detach or --only")

    async def run(made: Stack) -> None:
        async with host.requests() as plain:
            client = overriding(plain, is_override=override_freeze)
            found = await plan_with_cluster(
                client, made, prune=prune, only=only, resolve=resolve_image, logins=logins, built=built
            )
            wait_s = None if detach else timeout
            work = functools.partial(
                carry_out,
                *(client, made, found, progress.show, wait_s, warn, logins),
                failures_max=max_failures,
                show_plan=_show_plan,
            )
            await (_all_or_nothing(client, found, work, timeout) if rollback_on_failure else work())

    with errors_shown():
        made, _ = given.read()
        docker = (passthrough.find_docker(), *host.endpoint().docker_flags)
        built = build_images(docker, made, only) if any(one.build for one in made.services.values()) else {}
        logins = _logins(host, made, only) if with_registry_auth else NO_LOGINS
    run_requests(run(made))


@stack.command()
@options.timeout("2m", "Longest time to wait for tasks to stop.")
@click.argument("names", metavar="STACK...", nargs=-1, required=True)
@click.pass_obj
def rm(host: HostOptions, names: tuple[str, ...], timeout: float) -> None:
    """Remove stacks and wait until they are gone.

    Removes the services, networks, secrets and configs of the stacks, but not their volumes.

    \b
    Example:
      skep stack rm shop
    """
    progress = ProgressPrinter()

    async def run() -> list[str]:
        async with host.requests() as client:
            found = await asyncio.gather(*(remove(client, name, progress.show, timeout) for name in names))
            return [name for name, was_there in zip(names, found, strict=True) if not was_there]

    for name in run_requests(run()):
        click.echo(f"Nothing found in stack: {name}", err=True)


# --- revisions -----------------------------------------------------------------------------------------------------


@stack.command()
@click.argument("name", metavar="STACK")
@shows
@click.pass_obj
def history(host: HostOptions, name: str, output: OutputOptions) -> None:
    """List the revisions of a stack.

    Shows when each revision was deployed, what it changed, and whether it succeeded. The last ten revisions are kept
    until you remove the stack.

    \b
    Example:
      skep stack history shop
    """

    async def run() -> Shown:
        async with host.requests() as client:
            found = await known_revisions(client, name)
        if not found:
            raise NotFound(f"stack {name} has no revisions. Create one with skep stack deploy.")
        return revisions(found, time.time())

    output.show(run)


@stack.command()
@click.option(
    "--to",
    type=click.IntRange(1),
    metavar="N",
    help="Revision to deploy. Default: the revision deployed before.",
)
@click.option("--as-admin", is_flag=True, help="Use all your rights, not the revision author's.")
@options.timeout()
@click.argument("name", metavar="STACK")
@click.pass_obj
def rollback(host: HostOptions, *, to: int | None, as_admin: bool, timeout: float, name: str) -> None:
    """Deploy an earlier revision of a stack.

    Restores the images, secrets and configs of that revision, and removes services that it does not have. The rollback
    becomes a new revision.

    The rollback has the rights of the revision's author. If these do not suffice, the command shows the missing rights
    and changes nothing.

    \b
    Examples:
      skep stack rollback shop
      skep stack rollback --to 3 shop
      skep stack rollback --to 3 --as-admin shop
    """
    progress = ProgressPrinter()

    async def run() -> None:
        async with host.requests() as client:
            revision = before(name, await known_revisions(client, name), to)
            found = await return_plan(client, revision, is_admin=as_admin)
            if found.beyond and not as_admin:
                _show_plan(found.plan)
                raise PermissionDenied(refused(revision, found.beyond))
            for line in found.beyond:
                warn(printable(f"not permitted with the role {revision.role}: {line}"))
            await carry_out(
                *(found.client, found.stack, found.plan, progress.show, timeout, warn), show_plan=_show_plan
            )

    run_requests(run())


@stack.command()
@click.argument("name", metavar="STACK")
@options.two_revisions
@shows
@click.pass_obj
def diff(host: HostOptions, name: str, first: int | None, second: int | None, output: OutputOptions) -> None:
    """Compare the services of two revisions of a stack.

    Without numbers, compares the last two revisions. With one number, compares it with the last revision.

    \b
    Examples:
      skep stack diff shop
      skep stack diff shop 2 3
    """

    async def fetch() -> Shown:
        async with host.requests() as client:
            found = by_number(await known_revisions(client, name))
            older, newer = pair_of(name, found, first, second, kind="stack")
            return compared(older.stack(), newer.stack())

    output.show(fetch)
