"""The node's API sockets: passes each request to the process that answers it.

Only the head of a request is parsed here.  Requests that this node answers itself are given to an aiohttp application
together with their connection.  The connection of a request to the cluster is passed to the manager process.  Every
other request is sent byte for byte to the machine's Docker Engine, if there is one.

``routing`` decides, ``connection`` is one end of a connection, ``handover`` passes connections to the manager process
and takes them back, ``splice`` copies bytes between two connections, and ``server`` listens.
"""
