"""The catalog of services, and the registrations of services outside of the cluster."""
