"""The output of containers: log files, and the process that forwards lines to log drivers."""
