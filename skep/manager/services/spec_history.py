"""The last specs of a service, with their authors and times.

They are stored apart from the service, so that the progress of an update does not write them again.
"""

import zlib
from collections.abc import Sequence
from itertools import pairwise

import msgspec
from msgspec.structs import replace

from skep.errors import SkepError
from skep.model.options.schedules import without_stop
from skep.model.service import Service, ServiceSpec, SpecAuthor
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import ServiceId
from skep.model.values.unknown import leniently
from skep.store.interface import Transaction, View
from skep.store.kinds import Payload, spec_history_id

SPECS_KEPT = 10
"""Number of specs that are kept for a service, with the present one.  Stacks keep as many revisions."""
BYTES_MAX = 128 << 10
"""Largest stored size of the past specs of one service.  With larger specs, fewer are kept: a value of the store has at
most 1.5 MiB, and a command that shows them reads all.
"""


class ServiceRevision(ApiObject):
    """One spec of a service.  ``number`` counts from 1 and is never used again, even after the history was damaged."""

    number: int
    spec: ServiceSpec = always(ServiceSpec())
    author: SpecAuthor = always(SpecAuthor())


class _Past(ApiObject):
    """The stored specs.  ``last``: number of the last one before the present spec, also if it was too large to keep."""

    last: int = 0
    revisions: tuple[ServiceRevision, ...] = ()


def keep_spec(tx: Transaction, service: Service, spec: ServiceSpec, author: SpecAuthor) -> SpecAuthor | None:
    """Keep the present spec of ``service`` before ``spec`` by ``author`` replaces it.

    Specs that differ only in whether the service is stopped are one revision.

    Returns: The author of the revision with ``spec``: the present one if it is the same revision.
    """
    if comparable(service.spec) == comparable(spec):
        return service.author
    found = revisions(tx, service)
    last = found[-1].number
    while len(found) >= SPECS_KEPT:
        found = _without_one(found)
    data = _encoded(last, found)
    if len(data) > BYTES_MAX and len(_encoded(last, found[-1:])) > BYTES_MAX:
        found = found[:-1]  # it would drive out all others and not be kept either
        data = _encoded(last, found)
    while len(data) > BYTES_MAX:
        found = found[1:]
        data = _encoded(last, found)
    tx.put(Payload(id=spec_history_id(service.id), data=data))
    return author


def _without_one(found: Sequence[ServiceRevision]) -> Sequence[ServiceRevision]:
    """Leave out the first revision that only scaled the service, or the oldest one.

    Otherwise, ten changes of the number of replicas would leave no earlier spec to return to.
    """
    for number, (before, one) in enumerate(pairwise(found), 1):
        if replace(before.spec, mode=one.spec.mode) == one.spec:
            return (*found[:number], *found[number + 1 :])
    return found[1:]


def revisions(view: View, service: Service) -> Sequence[ServiceRevision]:
    """Return the kept specs of ``service``, the present one last."""
    past = _past_of(view, service)
    author = service.author or SpecAuthor()
    return (*past.revisions, ServiceRevision(number=past.last + 1, spec=service.spec, author=author))


def forget_specs(tx: Transaction, id: ServiceId) -> None:
    """Delete the past specs of a removed service."""
    if tx.lookup(Payload, spec_history_id(id)) is not None:
        tx.delete(Payload, spec_history_id(id))


def comparable(spec: ServiceSpec) -> ServiceSpec:
    """Return ``spec`` without the labels of a stop, which belong to the service and not to one of its specs."""
    return replace(spec, labels=without_stop(spec.labels))


def _past_of(view: View, service: Service) -> _Past:
    """Return the past specs of ``service``.  A damaged history must not prevent the next update, so it reads as empty.

    The spec's version takes the place of a lost number: it is larger than all earlier numbers, since each of them was
    one write of the store.
    """
    id = spec_history_id(service.id)
    payload = view.lookup(Payload, id)
    if payload is None and id not in view.unreadable(Payload):
        return _Past()
    try:
        if payload is not None:
            return leniently(zlib.decompress(payload.data), _Past)
    except (zlib.error, SkepError, msgspec.MsgspecError):
        pass
    return _Past(last=(service.spec_version or service.version).index)


def _encoded(last: int, found: Sequence[ServiceRevision]) -> bytes:
    return zlib.compress(msgspec.json.encode(_Past(last=last, revisions=tuple(found))), 1)
