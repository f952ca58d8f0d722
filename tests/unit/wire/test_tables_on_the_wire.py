"""Tables in pieces, and put together again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.errors import InvalidArgument
from skep.model.networks.publishing import PublishOptions
from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    Segment,
    TableChange,
    TableEndpoint,
    TableNode,
    TablePort,
    TableService,
    changed,
)
from skep.model.networks.wireguard import PublicKey
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from skep.wire import skep_pb2 as pb
from skep.wire.convert import tables as convert
from skep.wire.convert.tables import messages_of, pieces_of, table_set_from_pb

WORDS = st.text("abcdefghij0123456789", min_size=1, max_size=12)
LISTS = st.lists(WORDS, max_size=3).map(tuple)
HEADS = st.builds(
    NetworkHead,
    id=WORDS.map(NetworkId),
    name=WORDS,
    segments=st.lists(st.builds(Segment, WORDS, WORDS, st.integers(1, 2**24 - 1)), max_size=2).map(tuple),
    mtu=st.integers(0, 9000),
    port=st.integers(1, 65535),
    is_ingress=st.booleans(),
    is_internal=st.booleans(),
    is_encrypted=st.booleans(),
    is_door=st.booleans(),
)
KEYS = st.builds(PublicKey, st.binary(min_size=32, max_size=32), st.integers(1, 65535))
NODES = st.builds(
    TableNode,
    id=WORDS.map(NodeId),
    underlay=WORDS,
    addresses=LISTS,
    wireguard_keys=st.lists(KEYS, max_size=2).map(tuple),
)
ENDPOINTS = st.builds(
    TableEndpoint,
    task_id=WORDS.map(TaskId),
    node_id=WORDS.map(NodeId),
    service_id=WORDS.map(ServiceId),
    slot=st.integers(0, 100_000),
    name=WORDS,
    aliases=LISTS,
    addresses=LISTS,
    is_running=st.booleans(),
    is_serving=st.booleans(),
)
PORTS = st.builds(
    TablePort,
    protocol=st.sampled_from(["tcp", "udp", "sctp"]),
    published=st.integers(1, 65535),
    target=st.integers(1, 65535),
    options=st.builds(
        PublishOptions,
        host_ip=WORDS,
        is_sticky=st.booleans(),
        prefers_local=st.booleans(),
        proxy_protocol=st.integers(0, 2),
    ),
)
SERVICES = st.builds(
    TableService,
    id=WORDS.map(ServiceId),
    labels=st.dictionaries(WORDS, WORDS, max_size=2),
    created_at=WORDS,
    name=WORDS,
    aliases=LISTS,
    virtual_ips=LISTS,
    ports=st.lists(PORTS, max_size=2).map(tuple),
)
CHANGES = st.builds(
    TableChange,
    head=HEADS,
    revision=st.just(9),
    is_whole=st.booleans(),
    nodes=st.lists(NODES, max_size=4, unique_by=lambda one: one.id).map(tuple),
    removed_nodes=st.lists(WORDS.map(NodeId), max_size=2).map(tuple),
    endpoints=st.lists(ENDPOINTS, max_size=6, unique_by=lambda one: one.task_id).map(tuple),
    removed_endpoints=st.lists(WORDS.map(TaskId), max_size=2).map(tuple),
    services=st.lists(SERVICES, max_size=4, unique_by=lambda one: one.id).map(tuple),
    removed_services=st.lists(WORDS.map(ServiceId), max_size=2).map(tuple),
)


@given(
    change=CHANGES,
    before=CHANGES.map(lambda one: changed(None, one)),
    piece_bytes=st.sampled_from([1, 100, 10**6]),
    message_bytes=st.sampled_from([1, 300, 10**6]),
)
def test_pieces_lead_where_the_whole_leads(
    change: TableChange, before: NetworkTable, piece_bytes: int, message_bytes: int
) -> None:
    usual, convert.PIECE_BYTES = convert.PIECE_BYTES, piece_bytes
    try:
        pieces = list(pieces_of(change))
    finally:
        convert.PIECE_BYTES = usual
    messages = list(
        messages_of(
            pieces,
            incarnation=3,
            revision=9,
            is_complete=True,
            removed=(NetworkId("gone"),),
            message_bytes=message_bytes,
        )
    )
    assert [message.more for message in messages] == [True] * (len(messages) - 1) + [False]
    sent = [pb.NetworkTables.FromString(message.SerializeToString()) for message in messages]
    got = table_set_from_pb(sent)
    assert (got.revision, got.is_complete, got.removed) == (9, True, ("gone",))
    after = before
    for piece in got.changes:
        after = changed(after, piece)
    assert after == changed(before, change)


def test_nothing_to_say_is_a_message_too() -> None:
    (message,) = messages_of((), incarnation=1, revision=5, is_complete=True)
    got = table_set_from_pb([message])
    assert (got.revision, got.is_complete, got.changes) == (5, True, ())


def test_pieces_of_different_sets_are_refused() -> None:
    pieces = [pb.NetworkTables(incarnation=1, revision=revision) for revision in (5, 6)]
    with pytest.raises(InvalidArgument, match="pieces of different sets"):
        table_set_from_pb(pieces)


@pytest.mark.parametrize("id", ["", "../etc/passwd", "a/b", ".", "net\0"])
def test_an_id_that_is_none_is_refused(id: str) -> None:
    """It would name a file."""
    message = pb.NetworkTables(changes=[pb.NetworkChange(head=pb.NetworkHead(id=id), whole=True)])
    with pytest.raises(InvalidArgument, match="is no network's id"):
        table_set_from_pb([message])
