"""Responses to queries: every content is a figure, or a failure with a reason."""

import pytest

from skep.model.measures.queries import MetricQuery, QueryFailed, figure_in

PAGE = MetricQuery(url="http://queue.example", field="n")
PROMETHEUS = MetricQuery(url="http://prometheus.example:9090", expression="up")
DIGITS = b"1" + b"0" * 400


def scalar(value: bytes) -> bytes:
    return b'{"status":"success","data":{"resultType":"scalar","result":[1,' + value + b"]}}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"null",
        b"[" * 60_000,
        b'{"n":' * 10_000,
        *(
            form % value
            for form in (b"%s", b'{"n": %s}', scalar(b"%s"))
            for value in (
                *(DIGITS, b"-" + DIGITS, b"1" * 5_000, b"1e999", b"NaN", b'"nan"', b'"' + DIGITS + b'"'),
                *(b"true", b"null", b"[" * 30_000, b'"\xed\xa0\x80"', b'"\\ud800"'),
            )
        ),
    ],
)
@pytest.mark.parametrize("query", [PAGE, PROMETHEUS, MetricQuery(url="http://queue.example")])
def test_no_response_raises_anything_but_a_failed_query(query: MetricQuery, body: bytes) -> None:
    for status in (200, 500):
        with pytest.raises(QueryFailed):
            figure_in(query, status, body)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, scalar(b'"7"')),
        (401, b'{"status":"error","errorType":"bad_data","error":"s3cr3t"}'),
        (400, b'{"status":"error","errorType":"unauthorized","error":"s3cr3t"}'),
        (400, b'{"status":"error","errorType":["bad_data"],"error":"s3cr3t"}'),
        (503, b'{"status":"error","error":"s3cr3t"}'),
    ],
)
def test_only_errors_of_prometheus_are_shown_and_only_successes_count(status: int, body: bytes) -> None:
    with pytest.raises(QueryFailed) as found:
        figure_in(PROMETHEUS, status, body)
    assert "s3cr3t" not in str(found.value)
    assert f"it responded {status}" in str(found.value)


def test_an_error_of_prometheus_is_shown() -> None:
    body = b'{"status":"error","errorType":"execution","error":"found duplicate series"}'
    with pytest.raises(QueryFailed, match="Prometheus refused the query: found duplicate series"):
        figure_in(PROMETHEUS, 422, body)
