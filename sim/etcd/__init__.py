"""A simulated etcd: keys and transactions, consensus without messages, and the client's calls without sockets."""
