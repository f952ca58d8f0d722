"""The Container Storage Interface: finds drivers by their sockets and calls them by gRPC.

A driver is a separate program, which is trusted with its own volumes only.  Each call has a deadline and a size limit,
and its responses are validated.  Reasons: decision 85.
"""
