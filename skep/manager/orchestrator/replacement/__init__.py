"""Rules for replacing tasks: restarts, down nodes, and disruptions."""
