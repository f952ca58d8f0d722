"""The confinement of containers: capabilities, seccomp, AppArmor, devices, limits and cgroups."""
