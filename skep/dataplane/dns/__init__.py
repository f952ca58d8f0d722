"""The name server of containers at 127.0.0.11.

``index`` has a network's table by name, ``resolution`` resolves queries and ``messages`` encodes them.  ``server``
serves the sockets of one container, ``upstream`` forwards other names, and ``redirection`` redirects port 53 to those
sockets.
"""
