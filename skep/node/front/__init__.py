"""The node's API sockets: the process that answers each request.

Only the head of a request is parsed here.  Requests that this node answers itself go to an aiohttp application
together with their connection; the connection of a request to the cluster is passed to the manager process; every
other request goes byte for byte to the machine's Docker Engine, if there is one.

``routing`` decides, ``connection`` is one end of a connection, ``handover`` passes connections to the manager
process and takes them back, ``splice`` copies bytes between two, ``server`` listens.
"""
