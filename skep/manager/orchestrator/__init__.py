"""Creates and retires the tasks of services: replicated and global services, restarts, rolling updates, task
history.
"""
