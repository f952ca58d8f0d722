"""Containers: their records, requests, execs, health checks and commits."""
