"""The etcd process of this manager: its program, flags, supervision and output."""
