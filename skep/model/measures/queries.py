"""Queries of figures for autoscaling and canaries: Prometheus' API, a page with a number, or a command in a container.

A URL is in a label, which every inspect shows, so it has no password.
"""

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from math import isfinite
from typing import Any, Final
from urllib.parse import quote, urlsplit

import msgspec

from skep.errors import InvalidArgument
from skep.model.networks.addresses import is_machine_host

AUTOSCALE_PROMETHEUS: Final = "skep.autoscale.prometheus"
"""Label with the URL of the Prometheus that answers ``skep.autoscale.query``."""
AUTOSCALE_QUERY: Final = "skep.autoscale.query"
"""Label with an expression in PromQL, whose value is divided among the tasks."""
AUTOSCALE_QUEUE: Final = "skep.autoscale.queue"
"""Label with the URL of a page that has a queue's length, as a number or as a field of a JSON object."""
AUTOSCALE_QUEUE_FIELD: Final = "skep.autoscale.queue-field"
"""Label with the path of the queue's length in a JSON object.  Without it, the page is only a number."""
AUTOSCALE_QUEUE_EXEC: Final = "skep.autoscale.queue.exec"
"""Label with a command in a container of the service, whose first line of output is a queue's length."""
AUTOSCALE_QUEUE_EXEC_IN: Final = "skep.autoscale.queue.exec-in"
"""Label with the name of the service in whose container that command runs, of the same stack."""
UPDATE_PROMETHEUS: Final = "skep.update.prometheus"
"""Label with the URL of the Prometheus that answers ``skep.update.query``."""
UPDATE_QUERY: Final = "skep.update.query"
"""Expression in PromQL, whose value must be within bounds at the end of each step."""
QUERY_LABELS: Final = (
    *(AUTOSCALE_PROMETHEUS, AUTOSCALE_QUERY, AUTOSCALE_QUEUE, AUTOSCALE_QUEUE_FIELD),
    *(UPDATE_PROMETHEUS, UPDATE_QUERY),
)
COMMAND_LABELS: Final = (AUTOSCALE_QUEUE_EXEC, AUTOSCALE_QUEUE_EXEC_IN)

URL_CHARACTERS_MAX: Final = 2048
"""Longest URL.  Servers refuse longer ones."""
EXPRESSION_CHARACTERS_MAX: Final = 4000
"""Longest expression.  Prometheus refuses request lines of more than 8 KiB, and quoting doubles some characters."""
COMMAND_CHARACTERS_MAX: Final = 1000
"""Longest command.  A longer one belongs into the image as a script."""
COMMAND_S: Final = 5.0
"""Time limit of a command in seconds.  The node kills it afterwards."""
LINE_CHARACTERS_MAX: Final = 64
"""Characters of the output's first line that are read as a number."""
BODY_BYTES_MAX: Final = 64 * 1024
"""Longest response that is read.  A response with one sample has a few hundred bytes."""
_REASON_CHARACTERS_MAX: Final = 200
"""Longest reason of Prometheus that is shown."""
_ERROR_STATUSES: Final = (400, 404, 422, 500, 503)
"""Statuses of Prometheus' errors.  Source: prometheus, web/api/v1/api.go (respondError)."""
_ERROR_TYPES: Final = ("bad_data", "execution", "timeout", "canceled", "internal", "unavailable", "not_found")
"""Errors of Prometheus, which are shown.  Source: prometheus, web/api/v1/api.go (errorType)."""
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)
"""Errors of parsing JSON, also if it is nested too deeply or has a number of thousands of digits."""
_SERVICE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_FIELD: Final = re.compile(r"[A-Za-z0-9_-]{1,100}(?:\.[A-Za-z0-9_-]{1,100}){0,9}", re.ASCII)


class MetricQuery(msgspec.Struct, frozen=True, kw_only=True):
    """A query of one figure.

    Attributes:
        url: The Prometheus, or the page.  Empty for a command.
        expression: Expression in PromQL.  Empty for a page.
        field: Path of a field of the page's JSON object, with dots.  Empty if the page is only a number.
        command: Words of a command in a container, or empty.
        service: Name of the service that the container is of.  Empty for the service with the query.
    """

    url: str = ""
    expression: str = ""
    field: str = ""
    command: tuple[str, ...] = ()
    service: str = ""

    @property
    def request_url(self) -> str:
        """Return the URL to get."""
        if not self.expression:
            return self.url
        return f"{self.url.rstrip('/')}/api/v1/query?query={quote(self.expression, safe='')}"

    @property
    def host(self) -> str:
        """Return host and port."""
        return urlsplit(self.url).netloc


class QueryFailed(Exception):
    """The query has no figure.  Every user of the service may see the reason."""


def queries_in(labels: Mapping[str, str]) -> list[MetricQuery]:
    """Return all queries in a service's labels, which may be invalid.  An invalid command is left out."""
    found = []
    for url, expression in ((AUTOSCALE_PROMETHEUS, AUTOSCALE_QUERY), (UPDATE_PROMETHEUS, UPDATE_QUERY)):
        if url in labels:
            found.append(MetricQuery(url=labels[url], expression=labels.get(expression, "")))
    if AUTOSCALE_QUEUE in labels:
        field = labels.get(AUTOSCALE_QUEUE_FIELD, "")
        found.append(MetricQuery(url=labels[AUTOSCALE_QUEUE], field=field))
    if AUTOSCALE_QUEUE_EXEC in labels:
        with suppress(InvalidArgument):
            found.append(command_in(labels))
    return found


def command_in(labels: Mapping[str, str]) -> MetricQuery:
    """Return the command in a service's labels.  Raises: InvalidArgument."""
    service = labels.get(AUTOSCALE_QUEUE_EXEC_IN)
    return MetricQuery(
        command=checked_command(AUTOSCALE_QUEUE_EXEC, labels[AUTOSCALE_QUEUE_EXEC]),
        service=checked_service(AUTOSCALE_QUEUE_EXEC_IN, service) if service is not None else "",
    )


def checked_url(name: str, url: str) -> str:
    """Return the URL in the label ``name``.  Raises: InvalidArgument."""
    wanted = "expected a URL such as http://prometheus.example.org:9090"
    if len(url) > URL_CHARACTERS_MAX or not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidArgument(
            f"invalid label {name}: expected at most {URL_CHARACTERS_MAX} printable ASCII characters without spaces"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidArgument(f"invalid label {name}={url}: {wanted}") from None
    if parts.username is not None or parts.password is not None:
        raise InvalidArgument(
            f"invalid label {name}: every user who sees the service would see its password: use an address that needs "
            "none, such as a proxy"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InvalidArgument(f"invalid label {name}={url}: {wanted}")
    if parts.fragment or (name != AUTOSCALE_QUEUE and parts.query):
        raise InvalidArgument(
            f"invalid label {name}={url}: expected the address only, without {'#' if parts.fragment else '?'}"
        )
    return url


def checked_expression(name: str, text: str) -> str:
    """Return the expression in the label ``name``.  Only Prometheus can parse it.  Raises: InvalidArgument."""
    if not text.strip() or len(text) > EXPRESSION_CHARACTERS_MAX:
        raise InvalidArgument(
            f"invalid label {name}: expected an expression in PromQL of at most {EXPRESSION_CHARACTERS_MAX} characters"
        )
    return text


def checked_field(name: str, text: str) -> str:
    """Return the path of a field in the label ``name``.  Raises: InvalidArgument."""
    if _FIELD.fullmatch(text) is None:
        raise InvalidArgument(
            f"invalid label {name}={text}: expected names of fields with dots, such as messages or queue.length"
        )
    return text


def checked_command(name: str, text: str) -> tuple[str, ...]:
    """Return the words of the command in the label ``name``, which no shell reads.  Raises: InvalidArgument."""
    if len(text) > COMMAND_CHARACTERS_MAX or not text.isprintable():
        raise InvalidArgument(
            f"invalid label {name}: expected at most {COMMAND_CHARACTERS_MAX} printable characters: put a longer "
            "command into the image"
        )
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InvalidArgument(f"invalid label {name}={text}: {error}: close each quotation mark") from None
    if not words or not words[0]:
        raise InvalidArgument(
            f"invalid label {name}: expected a command, such as redis-cli llen jobs: name a program"
        )
    return tuple(words)


def checked_service(name: str, text: str) -> str:
    """Return the name of a service in the label ``name``.  Raises: InvalidArgument."""
    if _SERVICE.fullmatch(text) is None:
        raise InvalidArgument(f"invalid label {name}={text}: expected the name of a service, such as queue")
    return text


def is_of_machine(url: str) -> bool:
    """Return whether the URL's host is certainly an address of the machine itself or of its links, in any spelling.

    An invalid URL has no host, and ``checked_url`` refuses it.
    """
    try:
        return is_machine_host(urlsplit(url).hostname or "")
    except ValueError:
        return False


def figure_in(query: MetricQuery, status: int, body: bytes) -> float:
    """Return the figure in a response.  Raises: QueryFailed."""
    found = _sample(status, body) if query.expression else _number_in_page(query.field, status, body)
    if not isfinite(found) or (not query.expression and found < 0):
        raise QueryFailed(f"the figure is {found:g}, which cannot be used: expected a finite number")
    return found


def length_in(exit_code: int, line: str) -> float:
    """Return the figure of a command, from the first line of its output.  Raises: QueryFailed."""
    if exit_code:
        raise QueryFailed(f"its command ended with exit code {exit_code}: run it with skep exec to see why")
    try:
        found = float(line.strip())
    except ValueError:
        raise QueryFailed("the first line of its command's output is not a number") from None
    if not isfinite(found) or found < 0:
        raise QueryFailed(f"the figure is {found:g}, which cannot be used: expected a finite number")
    return found


def _sample(status: int, body: bytes) -> float:
    """Return the value of the only sample.

    Source: https://prometheus.io/docs/prometheus/latest/querying/api/ (instant queries).
    """
    try:
        answer = msgspec.json.decode(body)
    except _UNREADABLE:
        answer = None
    if not isinstance(answer, dict) or answer.get("status") not in ("success", "error"):
        raise QueryFailed(f"it is not a Prometheus: it responded {status} without its API's JSON")
    if answer["status"] == "error":
        if status not in _ERROR_STATUSES or answer.get("errorType") not in _ERROR_TYPES:
            raise QueryFailed(
                f"it responded {status} with an error that is none of Prometheus, which is not shown"
            )
        words = "".join(filter(str.isprintable, str(answer.get("error", ""))))[:_REASON_CHARACTERS_MAX]
        raise QueryFailed(f"Prometheus refused the query: {words}")
    if status != 200:
        raise QueryFailed(f"it responded {status}, and not 200 with a sample")
    data = answer.get("data")
    kind, result = (data.get("resultType"), data.get("result")) if isinstance(data, dict) else (None, None)
    if kind == "vector" and isinstance(result, list):
        if len(result) != 1:
            count = "no sample" if not result else f"{len(result)} samples"
            raise QueryFailed(
                f"the query returned {count}: write it so that it has exactly one, such as sum(...)"
            )
        result = result[0].get("value") if isinstance(result[0], dict) else None
    elif kind != "scalar":
        raise QueryFailed("the query returns neither an instant vector nor a scalar: remove the range [...]")
    if not isinstance(result, list) or len(result) != 2:
        raise QueryFailed("the sample has no value: use a query without native histograms")
    return _as_float(result[1])


def _number_in_page(field: str, status: int, body: bytes) -> float:
    if status != 200:
        raise QueryFailed(f"it responded {status}, and not 200 with a number")
    if not field:
        return _as_float(body.decode(errors="replace").strip())
    try:
        value: Any = msgspec.json.decode(body)
    except _UNREADABLE:
        raise QueryFailed("its response is not JSON") from None
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None or isinstance(value, bool):
        raise QueryFailed(f"its response has no number in the field {field}")
    return _as_float(value)


def _as_float(value: object) -> float:
    # No part of a response is shown: the author of the label may lack the right to read the page.
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        return float(value) if isinstance(value, str) and len(value) <= 64 else float("")
    except (ValueError, OverflowError):
        raise QueryFailed("its response is not a number") from None
