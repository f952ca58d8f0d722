"""Files and directories that tasks get from outside their image."""
