"""Commands about services, jobs, secrets and the containers of tasks."""
