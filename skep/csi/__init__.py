"""The Container Storage Interface: drivers found by their sockets, and called by gRPC.

A driver is another program, trusted with its own volumes and nothing else.  Each call has a deadline and a size limit,
and its responses are validated.  Reasons: decision 85.
"""
