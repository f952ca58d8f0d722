"""Numbers of tasks that follow what the tasks use."""
