"""Log subscriptions to agents, log messages to subscribers."""
