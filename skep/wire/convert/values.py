"""Conversions of points in time, durations and enums, which occur in every object."""

from collections.abc import Mapping

import msgspec
from google.protobuf.duration_pb2 import Duration as DurationType
from google.protobuf.timestamp_pb2 import Timestamp as TimestampType

from skep.errors import InvalidArgument
from skep.model.values.meta import Driver, Version
from skep.model.values.times import SECOND_NS, ZERO_TIME, Timestamp, timestamp, unix_ns
from skep.wire import swarm_pb2 as pb
from skep.wire.descriptors import Duration
from skep.wire.descriptors import Timestamp as PbTimestamp

_SECONDS_MIN = -62_135_596_800  # 0001-01-01, where Go's time begins
_SECONDS_MAX = 253_402_300_799  # 9999-12-31


class EnumTable(msgspec.Struct, frozen=True):
    """Converts an enum between its value in the model and its number on the wire."""

    what: str
    numbers: Mapping[str, int]

    def number(self, word: str) -> int:
        """Return the number.  Raises InvalidArgument for an unknown value."""
        try:
            return self.numbers[word]
        except KeyError:
            raise InvalidArgument(f"invalid {self.what}: {word!r}") from None

    def word(self, number: int) -> str:
        """Return the value.  Raises InvalidArgument for a number that is undefined or from a newer peer."""
        for word, known in self.numbers.items():
            if known == number:
                return word
        raise InvalidArgument(f"unknown {self.what} {number}")


def timestamp_to_pb(stamp: str) -> TimestampType:
    """Convert an RFC 3339 timestamp."""
    seconds, nanos = divmod(unix_ns(stamp), SECOND_NS)
    return PbTimestamp(seconds=seconds, nanos=nanos)


def timestamp_from_pb(stamp: TimestampType) -> Timestamp:
    """Convert a timestamp.  Raises InvalidArgument outside the years 1 to 9999, which Python's calendar cannot show."""
    if not (_SECONDS_MIN <= stamp.seconds <= _SECONDS_MAX and 0 <= stamp.nanos < SECOND_NS):
        raise InvalidArgument(f"invalid timestamp: {stamp.seconds} s and {stamp.nanos} ns")
    if stamp.seconds == _SECONDS_MIN and not stamp.nanos:
        return ZERO_TIME
    return timestamp(stamp.seconds * SECOND_NS + stamp.nanos)


def duration_to_pb(nanoseconds: int) -> DurationType:
    # Seconds and nanoseconds of a protobuf duration have the same sign.
    sign = -1 if nanoseconds < 0 else 1
    seconds, nanos = divmod(abs(nanoseconds), SECOND_NS)
    return Duration(seconds=sign * seconds, nanos=sign * nanos)


def duration_from_pb(duration: DurationType) -> int:
    return duration.seconds * SECOND_NS + duration.nanos


def version_to_pb(version: Version) -> pb.Version:
    return pb.Version(index=version.index)


def version_from_pb(version: pb.Version) -> Version:
    return Version(index=version.index)


def meta_to_pb(version: Version, created_at: str, updated_at: str) -> pb.Meta:
    """Return the metadata message.  Both timestamps are in RFC 3339."""
    return pb.Meta(
        version=version_to_pb(version),
        created_at=timestamp_to_pb(created_at),
        updated_at=timestamp_to_pb(updated_at),
    )


def stamp_of(meta: pb.Meta, field: str) -> Timestamp:
    """Return ``created_at`` or ``updated_at``, or Go's zero time when absent."""
    if field == "created_at":
        return timestamp_from_pb(meta.created_at) if meta.HasField("created_at") else ZERO_TIME
    return timestamp_from_pb(meta.updated_at) if meta.HasField("updated_at") else ZERO_TIME


def driver_to_pb(driver: Driver) -> pb.Driver:
    return pb.Driver(name=driver.name, options=driver.options)


def driver_from_pb(driver: pb.Driver) -> Driver:
    return Driver(name=driver.name, options=dict(driver.options))
