"""Whether two tasks of one slot may run at the same time, so that a drain can start the replacement first."""

from typing import Final

from skep.model.service import ServiceSpec, TaskSpec, UpdateConfig, UpdateOrder

_DATA: Final = {
    "": "the volume",
    "volume": "the volume",
    "cluster": "the cluster volume",
    "bind": "the host path",
}
"""Mounts whose data remains after a task, in words.  The data may be on a server, where two tasks would write to it."""


def why_stop_first(spec: ServiceSpec) -> str:
    """Return why a task of ``spec`` has to stop before its replacement starts.  Empty if both may run at a time.

    The update order ``start-first`` says that two tasks may write to the same data.
    """
    order = (spec.update_config or UpdateConfig()).order
    return "" if order is UpdateOrder.START_FIRST else written_data(spec.task_template)


def written_data(template: TaskSpec) -> str:
    """Return the volume or host path that tasks of ``template`` write to, such as ``the volume data``, or nothing."""
    container = template.container_spec
    for mount in container.mounts if container is not None else ():
        if mount.type in _DATA and mount.source and not mount.read_only:
            return f"{_DATA[mount.type]} {mount.source}"
    return ""
