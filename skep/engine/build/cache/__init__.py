"""The cache of build steps, on this node and in registries."""
