"""Services -> tasks: replicated and global services, restarts, rolling updates, task history."""
