"""When a task is replaced: restarts, down nodes, and disruptions."""
