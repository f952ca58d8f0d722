"""Sends log subscriptions to agents and log lines to subscribers."""
