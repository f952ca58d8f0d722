"""Settings of services in ``skep.*`` labels."""
