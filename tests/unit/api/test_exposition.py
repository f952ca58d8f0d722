"""Metrics as text: what Prometheus' own parser reads is what was meant."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from skep.api.telemetry.exposition import (
    Histogram,
    MetricFamily,
    Sample,
    by_label,
    gauge,
    label_text,
    merged,
    render,
)


def read(text: bytes) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Sample name -> labels -> value, by Prometheus' parser."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_families_without_samples_are_left_out() -> None:
    text = render([gauge("up", "Whether it is up.", 1), by_label("none", "gauge", "Nothing.", "x", {})])
    assert text == b"# HELP up Whether it is up.\n# TYPE up gauge\nup 1\n"
    assert render([]) == b""


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.text(st.characters(blacklist_categories=["Cs"]))))
def test_any_value_of_a_label_comes_back(labels: dict[str, str]) -> None:
    labels = {name: "".join(value.splitlines()) + '\n\\"' for name, value in labels.items()}
    assert read(render([MetricFamily("x", "gauge", "X.", [Sample(label_text(labels), 1.5)])])) == {
        "x": {tuple(sorted(labels.items())): 1.5}
    }


def test_a_histogram_counts_up_to_each_bound() -> None:
    times = Histogram((1, 5))
    for value in (0.5, 1, 3, 70):
        times.observe(value)
    assert read(render([times.family("start_seconds", "Start.")])) == {
        "start_seconds_bucket": {(("le", "1"),): 2, (("le", "5"),): 3, (("le", "+Inf"),): 4},
        "start_seconds_sum": {(): 74.5},
        "start_seconds_count": {(): 4},
    }


def test_a_name_stands_on_a_page_once() -> None:
    both = merged(
        [gauge("a", "A.", 1), gauge("b", "B.", 2), MetricFamily("a", "gauge", "A.", [Sample('{p="m"}', 3)])]
    )
    assert [one.name for one in both] == ["a", "b"]
    assert read(render(both))["a"] == {(): 1, (("p", "m"),): 3}
