"""The machine: its features, disks, devices, ports and conditions."""
