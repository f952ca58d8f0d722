"""What the name servers of a node's containers have done since their process began."""

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
    """``questions`` by type; ``responses`` by source (network, forwarded, none: malformed) and code."""

    def __init__(self) -> None:
        self.questions: Counter[str] = Counter()
        self.responses: Counter[tuple[str, str]] = Counter()
        self.upstream_timeouts = 0
        self.upstream_failures = 0
        """Errors of connections, and responses of other servers that are errors themselves."""

    def question(self, type: int) -> None:
        """A query came."""
        self.questions[_TYPES.get(type, "other")] += 1  # any number may be asked for: labels are bounded

    def response(self, source: str, message: bytes) -> None:
        """``message`` is the response."""
        self.responses[source, _CODES.get(response_code(message), "other")] += 1
