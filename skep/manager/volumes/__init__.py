"""Cluster volumes: the leader has drivers make them, publish them where tasks need them, and delete them."""
