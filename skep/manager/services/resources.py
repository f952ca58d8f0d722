"""Reservations of tasks on a node: CPU, memory, and generic resources.

A generic resource is counted (``gpu=2``) or named (``gpu=uuid1,uuid2``).  A task always requests a number.  If the node
has named resources, the task gets that many names.

Source: swarmkit, api/genericresource/resource_management.go.
"""

from collections.abc import Iterable

from skep.model.needs import kind_and_amount
from skep.model.service import DiscreteResource, GenericResource, NamedResource


class GenericStock:
    """The free generic resources of one node."""

    def __init__(self, resources: Iterable[GenericResource] = ()) -> None:
        self.counts: dict[str, int] = {}
        self._names: dict[str, dict[str, None]] = {}
        self.give_back(resources)

    def has(self, wanted: GenericResource) -> bool:
        """Return whether the amount of ``wanted`` is free."""
        kind, amount = kind_and_amount(wanted)
        return self.free(kind) >= amount

    def free(self, kind: str) -> int:
        """Return how much of the resource ``kind`` a task could get."""
        return max(self.counts.get(kind, 0), len(self._names.get(kind, ())))

    def holds(self, given: GenericResource) -> bool:
        """Return whether the resource that was assigned to a task exists and is free."""
        if (named := given.named_resource_spec) is not None:
            return named.value in self._names.get(named.kind, {})
        kind, amount = kind_and_amount(given)
        return self.counts.get(kind, 0) >= amount

    def chosen(self, wanted: Iterable[GenericResource]) -> tuple[GenericResource, ...]:
        """Return the resources that a task would get, with names in the node's order.  They stay free until
        ``take``.
        """
        chosen: list[GenericResource] = []
        for resource in wanted:
            kind, amount = kind_and_amount(resource)
            names = list(self._names.get(kind, ()))[:amount]
            if names:
                chosen += [
                    GenericResource(named_resource_spec=NamedResource(kind=kind, value=name))
                    for name in names
                ]
            else:
                spec = DiscreteResource(kind=kind, value=amount)
                chosen.append(GenericResource(discrete_resource_spec=spec))
        return tuple(chosen)

    def take(self, resources: Iterable[GenericResource]) -> None:
        """Reserve the resources of a task.  Resources that the node no longer has are ignored."""
        for resource in resources:
            if (named := resource.named_resource_spec) is not None:
                self._names.get(named.kind, {}).pop(named.value, None)
            else:
                # May become negative when the node lost resources that its tasks use.  Then none is free.
                kind, amount = kind_and_amount(resource)
                self.counts[kind] = self.counts.get(kind, 0) - amount

    def give_back(self, resources: Iterable[GenericResource]) -> None:
        """Release resources."""
        for resource in resources:
            if (named := resource.named_resource_spec) is not None:
                self._names.setdefault(named.kind, {})[named.value] = None
            else:
                kind, amount = kind_and_amount(resource)
                self.counts[kind] = self.counts.get(kind, 0) + amount
