"""Resources and placement."""

from skep.model.service import (
    DiscreteResource,
    GenericResource,
    Limits,
    NamedResource,
    Placement,
    PlacementPreference,
    Platform,
    ResourceRequirements,
    Resources,
    SpreadOver,
)
from skep.wire import swarm_pb2 as pb


def resources_to_pb(resources: Resources) -> pb.Resources:
    return pb.Resources(
        nano_cpus=resources.nano_cpus,
        memory_bytes=resources.memory_bytes,
        generic=[generic_to_pb(generic) for generic in resources.generic_resources],
    )


def resources_from_pb(message: pb.Resources) -> Resources:
    return Resources(
        nano_cpus=message.nano_cpus,
        memory_bytes=message.memory_bytes,
        generic_resources=tuple(generic_from_pb(generic) for generic in message.generic),
    )


def requirements_to_pb(requirements: ResourceRequirements) -> pb.ResourceRequirements:
    """Convert requirements, without the limit of processes (see ``task_spec.py``)."""
    message = pb.ResourceRequirements()
    if (limits := requirements.limits) is not None:
        message.limits.CopyFrom(pb.Resources(nano_cpus=limits.nano_cpus, memory_bytes=limits.memory_bytes))
    if requirements.reservations is not None:
        message.reservations.CopyFrom(resources_to_pb(requirements.reservations))
    if requirements.swap_bytes is not None:
        message.swap_bytes.value = requirements.swap_bytes
    if requirements.memory_swappiness is not None:
        message.memory_swappiness.value = requirements.memory_swappiness
    return message


def requirements_from_pb(message: pb.ResourceRequirements, pids: int) -> ResourceRequirements:
    """Convert a message with ``pids``, the limit of processes, which SwarmKit keeps in the container's spec."""
    limits = message.limits
    return ResourceRequirements(
        limits=(
            Limits(nano_cpus=limits.nano_cpus, memory_bytes=limits.memory_bytes, pids=pids)
            if message.HasField("limits") or pids
            else None
        ),
        reservations=(resources_from_pb(message.reservations) if message.HasField("reservations") else None),
        swap_bytes=message.swap_bytes.value if message.HasField("swap_bytes") else None,
        memory_swappiness=message.memory_swappiness.value if message.HasField("memory_swappiness") else None,
    )


def generic_to_pb(generic: GenericResource) -> pb.GenericResource:
    if (named := generic.named_resource_spec) is not None:
        return pb.GenericResource(
            named_resource_spec=pb.NamedGenericResource(kind=named.kind, value=named.value)
        )
    if (discrete := generic.discrete_resource_spec) is not None:
        return pb.GenericResource(
            discrete_resource_spec=pb.DiscreteGenericResource(kind=discrete.kind, value=discrete.value)
        )
    return pb.GenericResource()


def generic_from_pb(message: pb.GenericResource) -> GenericResource:
    """Convert a resource.  It is empty if it is neither named nor a number of units."""
    match message.WhichOneof("resource"):
        case "named_resource_spec":
            named = message.named_resource_spec
            return GenericResource(named_resource_spec=NamedResource(kind=named.kind, value=named.value))
        case "discrete_resource_spec":
            discrete = message.discrete_resource_spec
            return GenericResource(
                discrete_resource_spec=DiscreteResource(kind=discrete.kind, value=discrete.value)
            )
        case _:
            return GenericResource()


def platform_to_pb(platform: Platform) -> pb.Platform:
    return pb.Platform(architecture=platform.architecture, os=platform.os)


def platform_from_pb(message: pb.Platform) -> Platform:
    return Platform(architecture=message.architecture, os=message.os)


def placement_to_pb(placement: Placement) -> pb.Placement:
    return pb.Placement(
        constraints=placement.constraints,
        preferences=[_preference_to_pb(preference) for preference in placement.preferences],
        platforms=[platform_to_pb(platform) for platform in placement.platforms],
        max_replicas=placement.max_replicas,
    )


def placement_from_pb(message: pb.Placement) -> Placement:
    return Placement(
        constraints=tuple(message.constraints),
        preferences=tuple(
            PlacementPreference(
                spread=SpreadOver(spread_descriptor=preference.spread.spread_descriptor)
                if preference.HasField("spread")
                else None
            )
            for preference in message.preferences
        ),
        max_replicas=message.max_replicas,
        platforms=tuple(platform_from_pb(platform) for platform in message.platforms),
    )


def _preference_to_pb(preference: PlacementPreference) -> pb.PlacementPreference:
    message = pb.PlacementPreference()
    if preference.spread is not None:
        message.spread.CopyFrom(pb.SpreadOver(spread_descriptor=preference.spread.spread_descriptor))
    return message
