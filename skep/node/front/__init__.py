"""The node's API sockets: passes each request to the process that answers it.

Only the head of a request is parsed here.  If this node answers the request itself, an aiohttp application gets the
connection.  If the request is for the cluster, the manager process gets it.  Every other request is sent byte for byte
to the machine's Docker Engine, if there is one.

``routing`` decides, ``connection`` is one end of a connection, ``handover`` passes connections to the manager process
and takes them back, ``splice`` copies bytes between two connections, and ``server`` listens.
"""
