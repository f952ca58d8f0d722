"""Orders certificates for the host names of services from an authority, by ACME (RFC 8555)."""
