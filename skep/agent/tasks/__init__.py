"""The tasks of this node: their drivers, their files on disk, their logs and their volumes."""
