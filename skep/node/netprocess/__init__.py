"""The net process: holds what must survive the node process.

That is reserved host ports (``reservations``), and names and virtual addresses in containers' namespaces (``served`` is
one container, ``serving`` all).  ``handover`` passes sockets on, ``protocol`` is what is said over ``net.sock``,
``process`` serves it; ``client`` and ``naming`` are the node process's side.
"""
