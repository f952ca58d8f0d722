"""Imports of stack files from ``fig.yml``, fleet's units, inspected services, and a running Docker Swarm.

Every importer makes a Compose document and reads it back as ``skep stack`` would.  A note reports each part of the
input that the stack lacks, even settings that importers do not know, so nothing is dropped silently.
"""
