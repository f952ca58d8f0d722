"""A simulated etcd: its keys and transactions, consensus by arithmetic, and the client's calls without sockets."""
