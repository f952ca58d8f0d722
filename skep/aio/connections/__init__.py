"""Incoming connections: how many are admitted, their TLS handshakes, and their memory."""
