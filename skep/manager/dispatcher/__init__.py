"""Node sessions, heartbeats, assignments, and status reports."""
