"""The nodes' sessions: registration, heartbeats, balance, and their adoption after a manager is lost."""
