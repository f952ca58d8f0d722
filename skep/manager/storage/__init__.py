"""A manager's stored data: keys, backups, recovery, and free space."""
