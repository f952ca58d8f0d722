"""The pool of all messages on the wire, and the standard messages in it."""

from pathlib import Path
from typing import TYPE_CHECKING

from skep.protobuf.messages import module_of, pool_of

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration as Duration
    from google.protobuf.timestamp_pb2 import Timestamp as Timestamp
    from google.protobuf.wrappers_pb2 import BoolValue as BoolValue

POOL = pool_of(Path(__file__).parent / "messages.binpb")

if not TYPE_CHECKING:
    Duration = module_of(POOL, "google/protobuf/duration.proto")["Duration"]
    Timestamp = module_of(POOL, "google/protobuf/timestamp.proto")["Timestamp"]
    BoolValue = module_of(POOL, "google/protobuf/wrappers.proto")["BoolValue"]
