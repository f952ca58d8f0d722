"""Sends spans to an OpenTelemetry collector: OTLP over HTTP, in JSON.

Source: https://opentelemetry.io/docs/specs/otlp/#otlphttp
"""

from asyncio import Event
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import aiohttp
import msgspec
import structlog

from skep import __version__
from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import describe_error
from skep.api.telemetry.exposition import MetricFamily, Sample, label_text
from skep.model.history import masked_text
from skep.tracing import Span

log = structlog.get_logger()

WAITING_MAX = 4096
"""Largest number of spans that wait.  Further ones are dropped and counted."""
_BATCH = 512
"""Largest number of spans in one export.  Source: the default of OTEL_BSP_MAX_EXPORT_BATCH_SIZE."""
_GATHER_S = 1.0
"""Seconds for which spans are collected into one batch."""
_SENT_WITHIN_S = 10.0
"""Timeout of one export in seconds.  Source: the default of OTEL_EXPORTER_OTLP_TIMEOUT."""
_AGAIN = (429, 502, 503, 504)
"""Status codes after which a batch is sent again.  Source: OTLP's specification, Retryable Response Codes."""


class TraceExporter:
    """Sends the spans of one process in the background."""

    def __init__(
        self, endpoint: str, process: str, host: str, clock: Clock, rng: Callable[[], float]
    ) -> None:
        """``endpoint`` is like ``http://collector:4318``, ``process`` is node or manager, ``host`` is this machine's
        name.
        """
        self._url = f"{endpoint.rstrip('/')}/v1/traces"
        self._process = process
        self._host = host
        self._clock = clock
        self._backoff = Backoff(1.0, 60.0, rng=rng)
        self._waiting: deque[Span] = deque()
        self._is_filled = Event()
        self._is_failing = False
        self._sent = self._dropped = 0

    def now_ns(self) -> int:
        """Return the time for spans."""
        return self._clock.now_ns()

    def add(self, spans: Iterable[Span]) -> None:
        """Queue spans without waiting."""
        for span in spans:
            if len(self._waiting) < WAITING_MAX:
                self._waiting.append(span)
            else:
                self._dropped += 1
        if self._waiting:
            self._is_filled.set()

    async def run(self) -> None:
        """Send queued spans until cancelled.  While the collector does not respond, spans wait up to the limit, and
        further ones are dropped.
        """
        timeout = aiohttp.ClientTimeout(total=_SENT_WITHIN_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                await self._is_filled.wait()
                await self._clock.sleep(_GATHER_S)
                while self._waiting:
                    await self._send_batch(session)
                self._is_filled.clear()

    def families(self) -> list[MetricFamily]:
        """Return the metric families."""
        labels = label_text({"process": self._process})
        return [
            MetricFamily(
                "skep_trace_spans_sent_total", "counter", "Spans sent.", [Sample(labels, self._sent)]
            ),
            MetricFamily(
                "skep_trace_spans_dropped_total",
                "counter",
                "Spans dropped: too many waited, or the collector refused them.",
                [Sample(labels, self._dropped)],
            ),
        ]

    async def _send_batch(self, session: "aiohttp.ClientSession") -> None:
        batch = list(islice(self._waiting, _BATCH))
        problem, is_final = await self._post(session, batch)
        if problem and not self._is_failing:
            log.warning("traces are not sent", url=self._url, reason=problem)
        self._is_failing = bool(problem)
        if problem and not is_final:
            await self._backoff.sleep(self._clock)
            return
        self._backoff.reset()
        for _ in batch:
            self._waiting.popleft()
        if problem:
            self._dropped += len(batch)
        else:
            self._sent += len(batch)

    async def _post(self, session: "aiohttp.ClientSession", batch: Sequence[Span]) -> tuple[str, bool]:
        """Send a batch.  Returns the reason of the failure, or an empty text, and whether a retry is useless."""
        headers = {"Content-Type": "application/json"}
        try:
            # No redirects, because a redirected POST would become a GET without the spans, and its response would look
            # like success.
            async with session.post(
                self._url, data=self._body(batch), headers=headers, allow_redirects=False
            ) as response:
                if response.status < 300:
                    return "", True
                where = f" with {response.headers['Location']}" if "Location" in response.headers else ""
                return f"the collector answers {response.status}{where}", response.status not in _AGAIN
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return str(error) or type(error).__name__, False
        except ValueError as error:  # for example a text with invalid Unicode, which must not end the process
            return describe_error(error), True

    def _body(self, batch: Sequence[Span]) -> bytes:
        about = {
            "service.name": f"skep-{self._process}",
            "service.version": __version__,
            "host.name": self._host,
        }
        spans = {"scope": {"name": "skep"}, "spans": [otlp(span) for span in batch]}
        return msgspec.json.encode(
            {"resourceSpans": [{"resource": {"attributes": _attributes(about)}, "scopeSpans": [spans]}]}
        )


def exporter_to(
    endpoint: str, process: str, host: str, clock: Clock, rng: Callable[[], float]
) -> TraceExporter | None:
    """Return a ``TraceExporter``, or None if ``endpoint`` is empty and traces are off."""
    return TraceExporter(endpoint, process, host, clock, rng) if endpoint else None


def otlp(span: Span) -> Mapping[str, Any]:
    """Return a span in OTLP's JSON, with hexadecimal ids and times as strings."""
    found: dict[str, Any] = {
        "traceId": span.trace,
        "spanId": span.id,
        "name": span.name,
        "kind": 1,  # internal
        "startTimeUnixNano": str(span.begin_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _attributes(span.attributes),
    }
    if span.parent:
        found["parentSpanId"] = span.parent
    if span.error:
        found["status"] = {"code": 2, "message": masked_text(span.error)}
    if span.link is not None:
        found["links"] = [{"traceId": span.link[0], "spanId": span.link[1]}]
    return found


def _attributes(values: Mapping[str, str]) -> Sequence[Mapping[str, Any]]:
    return [{"key": key, "value": {"stringValue": value}} for key, value in values.items()]
