"""Benchmarks of Skep and real Docker Swarm.  See README.md."""
