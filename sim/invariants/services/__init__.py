"""Rules on services, their tasks and jobs."""
