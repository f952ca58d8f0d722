"""Clients of the catalog: balancers, registrars, and read-only views for programs that know Consul, DNS or etcd."""
