"""The name server of containers at 127.0.0.11.

``index`` has a network's table by name, ``records`` resolves queries, ``messages`` is the wire format, ``server``
serves the sockets of one container, ``upstream`` forwards other names, ``rules`` redirects port 53 to those sockets.
"""
