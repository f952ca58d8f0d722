"""Filters of the ``prune`` commands."""

from collections.abc import Mapping

from skep.api.filters import Filters
from skep.api.timestamps import parse_time
from skep.model.times import unix_ns


def is_prunable(created_at: str, labels: Mapping[str, str], filters: Filters, now_ns: int) -> bool:
    """Return whether ``filters`` allow to remove an unused object.

    The filter ``until`` is the latest creation time.
    """
    return all(unix_ns(created_at) < parse_time(moment, now_ns) for moment in filters["until"]) and (
        has_prunable_labels(labels, filters)
    )


def has_prunable_labels(labels: Mapping[str, str], filters: Filters) -> bool:
    """Return whether an object has all labels of ``label``, and not all of ``label!``.

    Source: moby, daemon/prune.go (matchLabels), volume/service/by.go (byLabelFilter).
    """
    is_kept = "label!" in filters and filters.matches_labels("label!", labels)
    return filters.matches_labels("label", labels) and not is_kept
