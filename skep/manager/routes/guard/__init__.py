"""Authorization of requests, and the audit log."""
