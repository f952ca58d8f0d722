"""The Compose files that are given to a command, and the plan for a deploy from them."""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from skep.api.client.requests import Requests
from skep.cli.stack.stack_screens import warn
from skep.errors import InvalidArgument, NotFound
from skep.model.values.encoding import to_json
from skep.model.values.images import registry_of
from skep.stack.address_needs import shortages
from skep.stack.cluster_state import NO_LOGINS, config_names, existing_of, kept_images, pinned_images
from skep.stack.compose.bound_files import with_bound_files
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.loading import FileReader, LoadedStack, LoadOptions, load
from skep.stack.compose.reading import ProblemReport
from skep.stack.planning import PlanAction, StackPlan, plan_of
from skep.stack.project import Stack

_DEFAULT_FILES = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")


class GivenFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The options with the files and the name of a stack."""

    files: tuple[str, ...]
    env_files: tuple[str, ...]
    profiles: tuple[str, ...]
    directory: str | None
    name: str | None

    def read(self) -> tuple[Stack, LoadedStack]:
        """Return the stack, and print warnings on stderr.

        Raises: FileProblems; InvalidArgument: a file is unreadable.
        """
        paths = self._paths()
        report = ProblemReport()
        choices = LoadOptions(
            environment=os.environ,
            env_files=tuple(map(Path, self.env_files)),
            profiles=self.profiles + tuple(filter(None, os.environ.get("COMPOSE_PROFILES", "").split(","))),
            directory=Path(self.directory).absolute() if self.directory else None,
        )
        loaded = load(paths, choices, FileReader(sys.stdin.read() if "-" in paths else ""), report)
        name = self.name or loaded.name
        if not name:
            raise InvalidArgument(
                "The stack has no name. Add it to the command, or write name: at the top of the file."
            )
        stack = stack_of(loaded.document, name, loaded.contents, report)
        if not report.problems:
            stack = with_bound_files(stack, loaded.directory, report)
        for warning in report.warnings:
            warn(warning)
        report.raise_problems()
        return stack, loaded

    def _paths(self) -> tuple[str, ...]:
        if self.files:
            return self.files
        if named := os.environ.get("COMPOSE_FILE"):
            return tuple(named.split(os.environ.get("COMPOSE_PATH_SEPARATOR", ":")))
        for name in _DEFAULT_FILES:
            if Path(name).is_file():
                return (name,)
        raise InvalidArgument(f"There is no {_DEFAULT_FILES[0]} in this directory. Specify a file with -c.")


def reads_files(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options and the stack's name to a command that reads files.  The command gets them as ``given``."""

    @functools.wraps(command)
    def run(
        *args: Any,
        files: tuple[str, ...],
        env_files: tuple[str, ...],
        profiles: tuple[str, ...],
        directory: str | None,
        name: str | None,
        **options: Any,
    ) -> None:
        given = GivenFiles(
            files=files, env_files=env_files, profiles=profiles, directory=directory, name=name
        )
        command(*args, given=given, **options)

    return _with(
        run,
        click.option(
            "-c",
            "-f",
            "--compose-file",
            "files",
            multiple=True,
            metavar="FILE",
            help="Compose file, or - for standard input. Repeat to override. "
            "Default: COMPOSE_FILE, or compose.yaml in this directory.",
        ),
        click.option(
            "--env-file",
            "env_files",
            multiple=True,
            metavar="FILE",
            help="File with variables. Default: .env next to the first Compose file.",
        ),
        click.option(
            "--profile",
            "profiles",
            multiple=True,
            metavar="NAME",
            help="Include the services of this profile.",
        ),
        click.option(
            "--project-directory", "directory", metavar="DIRECTORY", help="Base directory of relative paths."
        ),
        click.argument("name", metavar="[STACK]", required=False),
    )


def chooses_services(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of commands that compare a stack with the cluster."""
    return _with(
        command,
        click.option(
            "--only", multiple=True, metavar="SERVICE", help="Change only this service. Repeat for several."
        ),
        click.option(
            "--resolve-image",
            type=click.Choice(["always", "never"]),
            default="always",
            show_default=True,
            help="Resolve image tags to digests at the registries.",
        ),
    )


def _with(command: Callable[..., None], *decorators: Callable[[Any], Any]) -> Callable[..., None]:
    """Add options to a command, in this order."""
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


async def plan_with_cluster(
    client: Requests,
    stack: Stack,
    *,
    prune: bool,
    only: Sequence[str],
    resolve: str,
    logins: Mapping[str, str] = NO_LOGINS,
    built: Mapping[str, str] = NO_LOGINS,
) -> StackPlan:
    """Read what exists and resolve images, print warnings on stderr, and return the plan of a deploy.

    Args:
        only: services to change, or empty for all of them.
        resolve: ``never`` leaves the images' tags as they are.
        logins: registry logins, encoded, by registry.
        built: images that were built for services, by the name in the files.

    Raises: NotFound: the files have no service of ``only``; SkepError: a request failed.
    """
    unknown = [name for name in only if name not in stack.services]
    if unknown:
        raise NotFound(f"the files have no service {unknown[0]}. Choose one of {', '.join(stack.services)}")
    existing = await existing_of(client, stack.name, config_names(stack))
    for shortage in shortages(stack, existing.networks):
        warn(shortage)
    images: Mapping[str, str] = {}
    if resolve != "never":
        local = {
            one.spec.task_template.container_spec.image
            for one in stack.services.values()
            if one.build and one.spec.task_template.container_spec
        }
        chosen = [one.spec for name, one in stack.services.items() if not only or name in only]
        names = {one.task_template.container_spec.image for one in chosen if one.task_template.container_spec}
        asked = (name for name in names if name not in local or registry_of(name))
        images = await pinned_images(client, asked, warn, logins, kept_images(chosen, existing.services))
    images = {**images, **built}
    return plan_of(stack, existing, images=images, prune=prune, only=only)


def supposed_services(plan: StackPlan, *actions: PlanAction) -> msgspec.Raw:
    """Return the body of a request that supposes services: the specs of those with one of ``actions`` in the plan."""
    return msgspec.Raw(to_json([one.spec for one in plan.of("service", *actions) if one.spec]))
