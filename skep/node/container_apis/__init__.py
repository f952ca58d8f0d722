"""The Engine API for containers that mount its socket (decision 87).

``policy`` decides which requests a container may make, and removes secrets from responses.  ``exchange``
handles one connection, ``server`` the sockets of all containers, with limits for their connections.
"""
