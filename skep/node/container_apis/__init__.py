"""The Engine API for containers that mount its socket (decision 87).

``policy`` decides which requests a container may make, ``redaction`` removes secrets from responses, and
``connection_limits`` limits connections.  ``exchange`` handles one connection, ``server`` the sockets of all
containers.
"""
