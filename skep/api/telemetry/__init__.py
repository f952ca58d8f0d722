"""Metrics in Prometheus' format, and spans for OpenTelemetry."""
