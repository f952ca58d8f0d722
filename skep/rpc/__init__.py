"""gRPC over HTTP/2, both ends on one connection core; the content of messages is opaque to it.

``frames`` and ``headers`` are pure; ``core`` is what both ends of a connection have in common; ``server`` serves
possibly hostile peers (thousands of silent connections, small messages); ``client`` calls a server whose certificate
was verified, or this machine's etcd; ``calls`` keeps a client's connection to a unix socket.

Reasons: ``docs/decisions/0028-one-rpc.md``.
"""
