"""The filters of the ``prune`` commands."""

from collections.abc import Mapping

from skep.api.filters import Filters
from skep.api.timestamps import parse_time
from skep.model.times import unix_ns


def is_prunable(created_at: str, labels: Mapping[str, str], filters: Filters, now_ns: int) -> bool:
    """Whether an unused object matches.

    ``label`` names those it has to have, ``label!`` those it may not have, ``until`` when it was made at the latest.
    """
    return all(unix_ns(created_at) < parse_time(moment, now_ns) for moment in filters["until"]) and (
        has_prunable_labels(labels, filters)
    )


def has_prunable_labels(labels: Mapping[str, str], filters: Filters) -> bool:
    """Whether ``label`` and ``label!`` of the filters mean an object with these labels."""
    unwanted = [Filters({"label": (label,)}) for label in filters["label!"]]
    return filters.matches_labels("label", labels) and not any(
        one.matches_labels("label", labels) for one in unwanted
    )
