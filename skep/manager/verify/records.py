"""The violations that the leader has found last, in the store, and their forms in responses, events and texts."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from skep.manager.verify.rules import RULES, Invariant, InvariantViolation
from skep.model.values.encoding import ApiObject, always
from skep.model.values.times import Timestamp, timestamp
from skep.store.interface import Transaction, View
from skep.store.kinds import Payload

VIOLATIONS_ID: Final = "verify/violations"
"""Id of the payload with the violations.  Managers of older versions ignore it."""
ViolationAction: TypeAlias = Literal["violate", "recover"]
"""Actions of events."""
SHOWN_MAX = 50
"""Violations that are recorded and shown.  So many have one cause."""


class ShownViolation(ApiObject):
    """A violation of an invariant.

    Attributes:
        subjects: Ids of the objects that it is about.
        since: Time at which the leader found it, or empty if only this request did.
    """

    rule: str = always("")
    text: str = always("")
    meaning: str = always("")
    action: str = always("")
    subjects: tuple[str, ...] = always(())
    since: Timestamp = always(Timestamp(""))

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """Return what identifies it."""
        return self.rule, self.subjects


class Verification(ApiObject):
    """Response of ``/skep/verify``."""

    violations: tuple[ShownViolation, ...] = always(())
    count: int = always(0)
    """Number of violations, of which at most ``SHOWN_MAX`` are shown."""
    rules: int = always(0)
    """Number of rules that were checked."""
    seconds: float = always(0.0)


def shown(violations: Iterable[InvariantViolation]) -> Verification:
    """Return violations in the order of the rules."""
    order = list(RULES)
    found = [
        ShownViolation(
            rule=one.rule,
            text=one.text,
            meaning=RULES.get(one.rule, _UNKNOWN).meaning,
            action=RULES.get(one.rule, _UNKNOWN).action,
            subjects=one.subjects,
        )
        for one in sorted(violations, key=lambda one: (order.index(one.rule), one.text))
    ]
    return Verification(violations=tuple(found[:SHOWN_MAX]), count=len(found), rules=len(RULES))


_UNKNOWN: Final = Invariant("", "")


def recorded(view: View) -> Verification:
    """Return what the leader has found last.  A record that cannot be read counts as none."""
    return decoded(view.lookup(Payload, VIOLATIONS_ID))


def decoded(payload: Payload | None) -> Verification:
    """Return the record in a payload."""
    if payload is None:
        return Verification()
    try:
        return msgspec.json.decode(payload.data, type=Verification)
    except msgspec.DecodeError:
        return Verification()


def is_new(view: View, found: Verification) -> bool:
    """Return whether ``found`` differs from the record."""
    before = recorded(view)
    keys = [{one.key for one in each.violations} for each in (before, found)]
    return before.count != found.count or keys[0] != keys[1]


def record(tx: Transaction, found: Verification, now_ns: int) -> None:
    """Record what the leader has found.  Violations that last keep the time at which they were found first."""
    tx.rely_on(Payload, VIOLATIONS_ID)
    since = {one.key: one.since for one in recorded(tx).violations}
    now = timestamp(now_ns)
    violations = tuple(
        msgspec.structs.replace(one, since=since.get(one.key, now)) for one in found.violations
    )
    data = msgspec.json.encode(msgspec.structs.replace(found, violations=violations, seconds=0.0))
    tx.put(Payload(id=VIOLATIONS_ID, data=data))


def violation_changes(old: Payload | None, new: Payload) -> Iterator[tuple[ViolationAction, ShownViolation]]:
    """Yield the violations that began and ended between two records, as the actions of events."""
    before, after = decoded(old).violations, decoded(new).violations
    yield from (("violate", one) for one in _without(after, before))
    yield from (("recover", one) for one in _without(before, after))


def _without(some: Sequence[ShownViolation], others: Sequence[ShownViolation]) -> list[ShownViolation]:
    keys = {one.key for one in others}
    return [one for one in some if one.key not in keys]


def violations_by_rule(view: View) -> dict[str, list[str]]:
    """Return the texts of the recorded violations by rule."""
    found: dict[str, list[str]] = {}
    for one in recorded(view).violations:
        found.setdefault(one.rule, []).append(one.text)
    return found


def warning(view: View) -> str:
    """Return a sentence about the recorded violations, or nothing.  It names no objects, as every user reads it."""
    found = recorded(view)
    if not found.count:
        return ""
    rules = ", ".join(dict.fromkeys(one.rule for one in found.violations))
    noun = "invariant is" if found.count == 1 else "invariants are"
    return f"{found.count} {noun} violated ({rules}): run skep verify"
