"""The Container Storage Interface: drivers found by their sockets, and called by gRPC.

A driver is another program, trusted with the volumes that it made and nothing else: each call has a deadline and a
bound, and what it says is checked.  Reasons: decision 85.
"""
