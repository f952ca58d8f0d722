"""gRPC over HTTP/2, both ends on one connection core; knows nothing of what the messages mean.

``frames`` and ``headers`` are pure; ``core`` is what both ends of a connection do alike; ``server`` answers hostile
peers (thousands of silent connections, small messages); ``client`` calls a server whose certificate was verified or
that is ours; ``calls`` keeps a client's connection to a unix socket.

Why it is written here: ``docs/decisions/0028-one-rpc.md``.
"""
