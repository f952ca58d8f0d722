"""Placeholders of services, secrets and configs: their data, and the fields in which they are expanded.

Source: swarmkit, template/{context,expand,getter}.go.
"""

from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from skep.errors import InvalidArgument, SkepError
from skep.gotemplate import (
    CallError,
    Function,
    Struct,
    TemplateBudget,
    TemplateError,
    expand,
    quoted,
    to_bytes,
    to_text,
)
from skep.model.container import ContainerSpec, Mount

_SERVICE = "struct { ID string; Name string; Labels map[string]string }"
_NODE = "struct { ID string; Hostname string; Platform template.Platform }"
_TASK = "struct { ID string; Name string; Slot string }"

DRIVER = "golang"
"""The only template driver of secrets and configs."""

Read = Callable[[str], str]
"""A function for templated payloads that returns a text by name.  Raises: SkepError: the name is unknown."""


def context(
    *,
    service_id: str,
    service_name: str,
    service_labels: Mapping[str, str],
    node_id: str,
    hostname: str,
    os: str,
    architecture: str,
    task_id: str,
    task_name: str,
    slot: str,
) -> Struct:
    """Return the data of a task for placeholders.  ``slot``: the slot, or the node's id for a task without one."""
    platform = Struct("template.Platform", {"Architecture": architecture, "OS": os})
    return Struct(
        "*template.Context",
        {
            "Service": Struct(
                _SERVICE, {"ID": service_id, "Name": service_name, "Labels": dict(service_labels)}
            ),
            "Node": Struct(_NODE, {"ID": node_id, "Hostname": hostname, "Platform": platform}),
            "Task": Struct(_TASK, {"ID": task_id, "Name": task_name, "Slot": slot}),
        },
    )


def expand_container(container: ContainerSpec, seen: Struct) -> ContainerSpec:
    """Return ``container`` with the placeholders of its environment, mounts and hostname expanded.

    Raises: InvalidArgument, in SwarmKit's words.
    """
    budget = TemplateBudget(tokens=20_000, steps=20_000, produced=1 << 20, output=1 << 20)

    def filled(text: str, where: str, *shown: str) -> str:
        try:
            return expand(text, seen, budget=budget)
        except TemplateError as error:
            raise InvalidArgument(f"expanding {where.format(*map(quoted, shown))}{error}") from None

    def variable(entry: str) -> str:
        name, sign, value = entry.partition("=")
        return name + sign + filled(value, "env failed: expanding env {}: ", entry)

    def table(values: Mapping[str, str], where: str) -> dict[str, str]:
        return {
            key: filled(value, f"{where}expanding map entry {{}}={{}}: ", key, value)
            for key, value in values.items()
        }

    def mount(one: Mount) -> Mount:
        where = "mounts failed: expanding "
        options = one.volume_options
        if options is not None:
            driver = options.driver_config
            if driver is not None:
                driver = replace(driver, options=table(driver.options, f"{where}volume driver config: "))
            labels = table(options.labels, f"{where}volume labels: ")
            options = replace(options, labels=labels, driver_config=driver)
        return replace(
            one,
            source=filled(one.source, f"{where}mount source {{}}: ", one.source),
            target=filled(one.target, f"{where}mount target {{}}: ", one.target),
            volume_options=options,
        )

    return replace(
        container,
        env=tuple(variable(entry) for entry in container.env),
        mounts=tuple(mount(one) for one in container.mounts),
        hostname=filled(container.hostname, "hostname failed: "),
    )


def expand_payload(data: bytes, seen: Struct, env: Iterable[str], secret: Read, config: Read) -> bytes:
    """Return a templated secret or config with its placeholders expanded.

    Args:
        env: the task's environment, expanded.
        secret: returns the data of the task's secret with a target, unexpanded.
        config: returns the data of the task's config with a target, unexpanded.

    Raises: TemplateError.
    """
    variables = dict(entry.split("=", 1) for entry in env if "=" in entry)

    def reading(read: Read) -> Function:
        def call(name: str) -> str:
            try:
                return read(name)
            except SkepError as error:
                raise CallError(str(error)) from None

        return Function(call, 1, texts=1)

    functions = {
        "secret": reading(secret),
        "config": reading(config),
        "env": Function(lambda name: variables.get(name, ""), 1, texts=1),
    }
    payload = Struct("*template.PayloadContext", seen.fields)
    return to_bytes(expand(to_text(data), payload, functions))
