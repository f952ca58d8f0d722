"""Log drivers: options, message formats, and the process that sends messages.

With every driver, conmon writes a container's output to files on this node (``engine.logs``).  ``docker logs`` reads
these files.  If the driver sends the output to a remote, they are also its buffer, so an unreachable remote never
blocks a container.
"""
