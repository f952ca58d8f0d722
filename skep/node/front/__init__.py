"""The node's API sockets: which request goes where.

Only the head of a request is parsed here.  What this node answers itself is handed to an aiohttp application
together with its connection; what belongs to the cluster is relayed to the manager process over kept connections;
everything else goes byte for byte to the machine's Docker Engine, if there is one.

``routing`` decides, ``framing`` knows where a message ends, ``side`` is one end of a connection, ``relay`` and
``splice`` connect two of them, ``server`` listens.
"""
