"""A container engine: containers under runc and conmon, images, volumes.  It has no notion of a cluster."""
