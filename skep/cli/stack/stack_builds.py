"""Builds the images of a stack, names them, and puts them where the cluster's nodes find them."""

import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import click

from skep.model.values.images import registry_of
from skep.stack.project import Stack

_ID_CHARACTERS: Final = 12
"""Length of Docker's short ids."""


def build_images(docker: Sequence[str], stack: Stack, only: Collection[str]) -> Mapping[str, str]:
    """Build images with ``docker``, the command and its flags, and return the name for services' specs by image.

    An image of a registry is pushed there, and its digest distinguishes its versions.  Other images are known to the
    managers by name.  Each build gets its own name, so that a changed image updates the service, and a rollback to an
    earlier revision finds its image.

    Raises: click.ClickException: a build or a push failed.
    """
    names: dict[str, str] = {}
    for name, service in stack.services.items():
        container = service.spec.task_template.container_spec
        if service.build is None or container is None or (only and name not in only):
            continue
        image = container.image
        click.echo(f"{service.spec.name}: building {image}", err=True)
        arguments = ("build", "--tag", image, *service.build.arguments, service.build.context)
        _run(
            docker, *arguments, failure=f"the image of {name} could not be built from {service.build.context}"
        )
        if registry_of(image):
            click.echo(f"{service.spec.name}: pushing {image}", err=True)
            _run(
                docker,
                "push",
                image,
                failure=f"{image} could not be pushed. Check that you are logged in to its registry with docker login.",
            )
            continue
        names[image] = named_by_content(docker, image)
    return names


def named_by_content(docker: Sequence[str], image: str) -> str:
    command = [*docker, "image", "inspect", "--format", "{{.Id}}", image]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    id = done.stdout.strip().rpartition(":")[2]
    if done.returncode or not id:
        raise click.ClickException(f"{image} was built, but it is missing now. Build it again.")
    head, slash, last = image.rpartition("/")
    made = f"{head}{slash}{last.partition(':')[0]}:build-{id[:_ID_CHARACTERS]}"
    _run(docker, "tag", image, made, failure=f"{image} could not be named {made}")
    return made


def _run(docker: Sequence[str], *words: str, failure: str) -> None:
    if subprocess.run([*docker, *words], stdout=sys.stderr.fileno(), check=False).returncode:
        raise click.ClickException(failure)
