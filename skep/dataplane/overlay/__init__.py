"""The data plane of overlay networks: what the tables say, brought into the kernel and kept there.

``wanted`` derives from tables and local containers what a namespace has to hold, ``actual`` reads what it does hold,
``difference`` names what is to be done; all of that is data.  ``changing`` does it, ``overlays`` and ``healing`` say
when.
"""
