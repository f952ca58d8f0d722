"""Metrics in Prometheus' text format: families of values, and their rendering.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4).
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["counter", "gauge", "histogram"]


class Sample(NamedTuple):
    """A value.  ``labels``: text from ``label_text``.  ``suffix``: appended to the family's name in histograms."""

    labels: str
    value: float
    suffix: str = ""


class MetricFamily(NamedTuple):
    """All samples with one name."""

    name: str
    kind: Kind
    help: str
    samples: Sequence[Sample]


def gauge(name: str, help: str, value: float) -> MetricFamily:
    """Return a family with one value without labels."""
    return MetricFamily(name, "gauge", help, (Sample("", value),))


def by_label(name: str, kind: Kind, help: str, label: str, values: Mapping[Any, float]) -> MetricFamily:
    """Return a family with a sample for each value of one label."""
    samples = [Sample(label_text({label: key}), value) for key, value in sorted(values.items())]
    return MetricFamily(name, kind, help, samples)


_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def label_text(labels: Mapping[str, str]) -> str:
    """Return labels as ``{a="b",c="d"}``.  Values may be any text, names are not escaped."""
    pairs = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def render(families: Iterable[MetricFamily]) -> bytes:
    """Render the families as text; families without samples are left out."""
    lines: list[str] = []
    for name, kind, help, samples in families:
        found = [f"{name}{suffix}{labels} {value}" for labels, value, suffix in samples]
        if found:
            lines += (f"# HELP {name} {help}", f"# TYPE {name} {kind}", *found)
    return ("\n".join(lines) + "\n").encode(errors="replace") if lines else b""


def merged(families: Iterable[MetricFamily]) -> list[MetricFamily]:
    """Merge families with the same name, from several processes, because a name may occur on a page only once."""
    found: dict[str, MetricFamily] = {}
    for family in families:
        known = found.get(family.name)
        found[family.name] = (
            family if known is None else known._replace(samples=[*known.samples, *family.samples])
        )
    return list(found.values())


class Histogram:
    """Counts observed values by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count ``value``."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, help: str) -> MetricFamily:
        """Return all counts since the start as a family."""
        return MetricFamily(name, "histogram", help, self.samples())

    def samples(self, labels: Mapping[str, str] | None = None) -> list[Sample]:
        """Return all counts since the start as samples with ``labels``."""
        return buckets(self._bounds, self._counts, self._sum, labels)


def buckets(
    bounds: Sequence[float], counts: Sequence[int], total: float, labels: Mapping[str, str] | None = None
) -> list[Sample]:
    """Return the samples of a histogram.

    ``counts``: numbers of values up to each bound, and above the last.  ``total``: sum of all values.
    """
    own = labels or {}
    ends = [*(f"{bound:g}" for bound in bounds), "+Inf"]
    reached = list(accumulate(counts))
    samples = [
        Sample(label_text({**own, "le": end}), count, "_bucket")
        for end, count in zip(ends, reached, strict=True)
    ]
    text = label_text(own)
    return [*samples, Sample(text, total, "_sum"), Sample(text, reached[-1], "_count")]
