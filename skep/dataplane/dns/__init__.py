"""The name server of containers at 127.0.0.11.

``index`` orders a network's table by name, ``records`` decides what a question is answered with, ``messages`` is the
wire format, ``server`` holds the sockets of one container, ``upstream`` forwards what is not ours, ``rules`` leads
port 53 to those sockets.
"""
