"""One machine of the cluster: runs its tasks, serves its part of the Engine API, supervises its processes."""
