"""Imports of stack files from ``fig.yml``, fleet's units, inspected services, and a running Docker Swarm.

Every importer makes a Compose document and reads it back as ``skep stack`` would.  A note reports each part of the
input that the stack does not express.  So nothing is dropped silently, not even settings that importers do not support.
"""
