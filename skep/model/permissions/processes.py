"""Plain processes: tasks that run a program of their node, by the container label ``skep.executor=process``.

Such a task is a container of the empty image ``scratch`` that sees the node's directories of programs, read-only.  It
runs as an unprivileged user without capabilities.  Everything else is as in any container.
"""

from typing import Final

from skep.errors import InvalidArgument
from skep.model.container import ContainerSpec
from skep.model.permissions.rights import EXECUTOR_LABEL, PROCESS, MachineRights, rights_of

NO_IMAGE: Final = "scratch"
"""Docker's reserved name for the image without files.  No registry can have it."""
USER: Final = "65534:65534"
"""User and group of processes that name none: ``nobody`` and ``nogroup``."""
_LABEL: Final = f"{EXECUTOR_LABEL}={PROCESS}"


def is_process(container: ContainerSpec | None) -> bool:
    """Return whether the container runs a program of its node."""
    return container is not None and container.labels.get(EXECUTOR_LABEL) == PROCESS


def is_empty_image(image: str) -> bool:
    """Return whether ``image`` is the empty image, in any of Docker's spellings."""
    name = image.partition("@")[0].removeprefix("docker.io/").removeprefix("library/")
    return name.removesuffix(":latest") == NO_IMAGE


def check_process(container: ContainerSpec) -> None:
    """Refuse the parts of a process that would open its node further, or would have no effect.

    Nodes check the same again, because they do not trust managers of other versions.  They look up names of users.

    Raises: InvalidArgument.
    """
    if not is_process(container):
        return
    if not is_empty_image(container.image):
        raise InvalidArgument(
            f"{_LABEL} runs a program of the node and not of the image {container.image}: "
            f"use the image {NO_IMAGE}, or remove the label"
        )
    if not container.command and not container.args:
        raise InvalidArgument(f"{_LABEL} needs a command: add a program of your nodes")
    if option := _refused(container, rights_of(container)):
        raise InvalidArgument(f"{_LABEL} does not work with {option}: remove one of them, or use an image")


def _refused(container: ContainerSpec, rights: MachineRights) -> str:
    """Return an option that a process cannot have, or an empty text."""
    if rights.privileged:
        return "skep.privileged"
    if rights.pid or rights.ipc:
        return "skep.pid" if rights.pid else "skep.ipc"
    if container.capability_add:
        return f"capabilities ({', '.join(container.capability_add)})"
    user, _, group = container.user.partition(":")
    if any(one and (one == "root" or one.strip("0") == "") for one in (user, group, *container.groups)):
        return "the user or group root"
    return ""
