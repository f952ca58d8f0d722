"""The processes of containers: the runtime specification, runc, conmon, and a container's directories."""
