"""Tasks to agents: sessions, heartbeats, assignments, status reports."""
