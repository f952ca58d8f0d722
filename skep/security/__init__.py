"""The cluster's certificate authority, node certificates, join tokens and keys."""
