"""Commands for maintenance: upgrades, backups, reboots and diagnosis."""
