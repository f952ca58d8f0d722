"""gRPC over HTTP/2: a client and a server on one connection core.  Message contents are opaque to this package.

``frames`` and ``headers`` are pure functions.  ``core`` has the code that both ends share.  ``server`` serves thousands
of idle, possibly hostile peers.  ``client`` calls a server with a verified certificate, or etcd on this machine.

Reasons: ``docs/decisions/0028-rpc-one-connection-core-grpc-servers-clients.md``.
"""
