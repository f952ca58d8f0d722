"""What runs one task, behind seven verbs: oci, process, simulated."""
