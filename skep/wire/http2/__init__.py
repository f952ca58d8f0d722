"""HTTP/2 and gRPC as a manager's server speaks them: thousands of silent connections, small messages, hostile peers.

``headers`` is pure, as ``aio.http2`` is; ``connection`` holds one peer's connection, ``stream`` one call on it.  Why it
is written here: ``docs/decisions/0015-own-http2-server.md``.
"""
