"""Log drivers: options, message formats, and the process that sends messages.

Whatever the driver, conmon writes a container's output to files on this node (``engine.logs``).  ``docker logs`` reads
them, and for a driver that sends elsewhere they are also the buffer.  An unreachable remote therefore never blocks a
container.
"""
