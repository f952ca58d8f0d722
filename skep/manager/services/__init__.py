"""Rules about services: jobs, quotas, reservations, credentials, dependents."""
