"""Images of simulated tasks, and what happens to their containers."""

from skep.model.container import ContainerSpec
from skep.model.permissions.processes import is_process
from skep.model.task import Task

BROKEN, CRASHING, HANGING = "broken:1", "crashing:1", "hanging:1"
"""Images whose preparation fails (BROKEN), whose containers fail soon (CRASHING), whose preparation never ends
(HANGING).
"""
HOPELESS = (BROKEN, CRASHING, HANGING)


def image_of(task: Task) -> str:
    """Return the image of a task, or its program if it has none."""
    container = task.spec.container_spec
    return program_of(container) if container else ""


def program_of(container: ContainerSpec) -> str:
    """Return the image, or the program of a process, which has the name of an image and behaves like it."""
    return container.args[0] if is_process(container) else container.image
