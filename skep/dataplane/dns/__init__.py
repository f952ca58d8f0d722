"""The name server of containers at 127.0.0.11.

``index`` finds the addresses of a name in a network's table, ``resolution`` resolves queries, and ``messages`` decodes
and encodes them.  ``server`` serves the sockets of one container, ``upstream`` forwards other names, and
``redirection`` redirects port 53 to those sockets.
"""
