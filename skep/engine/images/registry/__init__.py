"""Registries: the distribution protocol, credentials, pulls and pushes."""
