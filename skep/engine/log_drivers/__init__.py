"""Log drivers: their options, what they send for a line, and the process that sends it.

Whatever the driver, conmon writes a container's output to files on this node (``engine.logs``): they are what
``docker logs`` reads, and for a driver that sends elsewhere, the buffer as well.  A remote that is away therefore never
blocks a container.
"""
