"""The store on etcd: a supervised member, and everything this manager asks of it."""

from skep.store.etcd.store import EtcdStore, open_store

__all__ = ["EtcdStore", "open_store"]
