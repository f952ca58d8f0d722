"""Lets a single voter start its election at once instead of after the election timeout.

Raft's library has a call for that (Campaign), which SwarmKit uses and etcd does not expose.  But a member accepts raft
messages from members.  One of them, MsgTimeoutNow, starts an election.  A leader sends it to transfer leadership.  A
manager has its member's peer certificate, so it can send this message to its own member in that member's name.

Thanks to that, a single member can have timers that are so long that an idle one computes little.  With several voters
the message is not sent, although it would be safe, because it starts a regular raft election.

Source: etcd 3.5, server/etcdserver/api/rafthttp/{http,peer}.go; raft/raft.go (stepFollower, MsgTimeoutNow).
"""

import asyncio
import http.client
import socket
import ssl

import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import Unavailable
from skep.model.networks.addresses import from_here, parted
from skep.security.tls import MANAGER_NAME
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.process.flags import MemberSettings

RESPONSE_S = 1.0
"""Timeout in seconds for the member on this machine to accept the message."""
OLDEST_PEER = "3.0.0"
"""The oldest version of peers that the request claims to support."""


class _Listed(msgspec.Struct):
    """A member in the list that the peer port serves."""

    id: int
    name: str = ""


async def campaign(settings: MemberSettings, version: tuple[int, int, int], clock: Clock) -> None:
    """Send MsgTimeoutNow to the member again and again until cancelled, because the member may not be ready yet.

    A member ignores the message if it leads already or has not applied its log.  Failures do no harm, because the
    member's own election timeout has the same effect.
    """
    backoff = Backoff(0.005, 0.2)
    while True:
        try:
            await asyncio.to_thread(campaign_once, settings, version)
        except Unavailable:
            pass  # the member does not listen yet, or its certificate has expired
        await backoff.sleep(clock)


def campaign_once(settings: MemberSettings, version: tuple[int, int, int]) -> None:
    """Send the message once and block for the response.  Raises Unavailable without a response."""
    host, port = parted(from_here(settings.peer_listen))
    try:
        with (
            socket.create_connection((host, int(port)), RESPONSE_S) as plain,
            _context(settings).wrap_socket(plain, server_hostname=MANAGER_NAME) as connection,
        ):
            peer = http.client.HTTPConnection(settings.name)
            peer.sock = connection
            cluster, own = _listed(peer, settings.name)
            message = pb.RaftMessage(type=pb.RaftMessage.TIMEOUT_NOW, to=own, sender=own)
            headers = {
                "X-Etcd-Cluster-ID": cluster,
                "X-Server-Version": ".".join(map(str, version)),
                "X-Min-Cluster-Version": OLDEST_PEER,
            }
            peer.request("POST", "/raft", message.SerializeToString(), headers)
            _response(peer)
    except (
        OSError,
        http.client.HTTPException,
        msgspec.DecodeError,
        UnicodeDecodeError,
    ) as error:  # TLS errors are OSErrors
        raise Unavailable(f"the member does not respond on its peer port: {error}") from error


def _listed(peer: http.client.HTTPConnection, name: str) -> tuple[str, int]:
    """Return the cluster id, which is in a header, and the id of the member ``name``."""
    peer.request("GET", "/members")
    response, body = _response(peer)
    members = msgspec.json.decode(body, type=list[_Listed])
    if len(members) != 1:
        raise Unavailable(f"{name} is not the only member")
    return response.headers.get("X-Etcd-Cluster-Id", ""), members[0].id


def _response(peer: http.client.HTTPConnection) -> tuple[http.client.HTTPResponse, bytes]:
    response = peer.getresponse()
    body = response.read()
    if response.status >= 300:
        raise Unavailable(f"{response.status} {body.decode(errors='replace').strip()}")
    return response, body


def _context(settings: MemberSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(settings.peer_files.roots)
    context.load_cert_chain(settings.peer_files.certificate, settings.peer_files.key)
    return context
