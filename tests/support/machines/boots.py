"""Boots of playground nodes: each start of a node after ``skep playground kill`` counts as a boot of its machine."""

from pathlib import Path

_LAUNCHER = """#!/bin/sh
# Each boot of a node has its own id, and the first one ends with a mark as a new kernel leaves it.
name=$(cat /proc/sys/kernel/hostname)
if [ "$1" = daemon ] && [ ! -e /run/boot-id ]; then
    cat /proc/sys/kernel/random/uuid >/run/boot-id
    mount --bind /run/boot-id /proc/sys/kernel/random/boot_id
    echo boot >>"{folder}/boots.$name"
    case $name in
    {due}) [ "$(wc -l <"{folder}/boots.$name")" -gt 1 ] || echo linux >/run/reboot-required ;;
    esac
fi
exec "{command}" "$@"
"""


def count_boots(command: Path, folder: Path, *due: str) -> None:
    """Replace the nodes' ``command`` by a script that counts boots in ``folder``, and then runs it.

    Args:
        due: names of the nodes that need a reboot until their second boot.
    """
    real = command.rename(command.with_name(f"{command.name}-of-a-boot"))
    command.write_text(_LAUNCHER.format(folder=folder, command=real, due=" | ".join(due)))
    command.chmod(0o755)


def boots(folder: Path) -> dict[str, int]:
    """Return the number of boots of each node."""
    return {path.suffix[1:]: len(path.read_text().splitlines()) for path in folder.glob("boots.*")}
