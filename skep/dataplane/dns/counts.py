"""Counters of a node's name servers since the net process started."""

from collections import Counter

from skep.dataplane.dns.messages import (
    AAAA,
    FORMERR,
    MX,
    NOERROR,
    NOTIMP,
    NXDOMAIN,
    PTR,
    REFUSED,
    SERVFAIL,
    SRV,
    A,
    response_code,
)

_TYPES = {A: "A", AAAA: "AAAA", PTR: "PTR", SRV: "SRV", MX: "MX"}
_CODES = {
    NOERROR: "NOERROR",
    FORMERR: "FORMERR",
    SERVFAIL: "SERVFAIL",
    NXDOMAIN: "NXDOMAIN",
    NOTIMP: "NOTIMP",
    REFUSED: "REFUSED",
}


class DnsCounts:
    """Number of ``questions`` by type, and of ``responses`` by source and code.

    The source of a response is ``network``, ``forwarded``, or ``none`` for a malformed query.
    """

    def __init__(self) -> None:
        self.questions: Counter[str] = Counter()
        self.responses: Counter[tuple[str, str]] = Counter()
        self.upstream_timeouts = 0
        self.upstream_failures = 0
        """Number of failed connections to other servers and of their error responses."""

    def question(self, type: int) -> None:
        """Count a query."""
        # count unknown types together: clients can ask for any number, and metrics must not grow without a limit
        self.questions[_TYPES.get(type, "other")] += 1

    def response(self, source: str, message: bytes) -> None:
        """Count the response ``message``, which has been sent."""
        self.responses[source, _CODES.get(response_code(message), "other")] += 1
