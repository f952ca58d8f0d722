"""Stack files from what people have: ``fig.yml``, fleet's units, inspected services, a running Docker Swarm.

Everything here makes a Compose document and reads it again as ``skep stack`` would: what the stack would not say of
what came in is a note.  So nothing is dropped silently, also what the importers do not support.
"""
