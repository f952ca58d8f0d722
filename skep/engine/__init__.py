"""A container engine: containers under runc and conmon, images, volumes.  It knows nothing of clusters."""
