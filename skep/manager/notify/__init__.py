"""Notifications: tells people about problems of the cluster, by webhook, chat or mail."""
