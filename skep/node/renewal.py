"""When a node renews its certificate.

Source: swarmkit, ca/renewer.go and certificates.go (calculateRandomExpiry).
"""

from datetime import datetime
from random import Random

EARLIEST = 0.5
LATEST = 0.8


def seconds_until_renewal(not_before: datetime, not_after: datetime, now: datetime, random: Random) -> float:
    """Seconds to wait before asking for the next certificate: at a random point of 50 to 80 % of its span.

    Random, so that nodes that joined together do not renew together.  0 when the time has come.
    """
    span_s = (not_after - not_before).total_seconds()
    passed_s = (now - not_before).total_seconds()
    return max(random.uniform(EARLIEST, LATEST) * span_s - passed_s, 0.0)
