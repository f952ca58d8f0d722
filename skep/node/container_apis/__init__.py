"""The Engine API for containers that mount its socket (decision 87).

``policy`` says which requests a container may make, ``redaction`` what is left out of responses, ``places`` whose
connections have room.  ``exchange`` carries out one connection, ``server`` the sockets of all containers.
"""
