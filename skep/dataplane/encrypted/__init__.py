"""Encrypted overlays of skep nodes (docs/design/encryption.md)."""
