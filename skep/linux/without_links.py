"""A command with a directory in which it follows no symbolic link (``python -m skep.linux.without_links``).

Arguments: the directory, then the command, which gets the directory as its last argument.

Whoever else writes to the directory can make links at any time: a command that looks whether a path is one, and uses
the path then, is led out of it.  Here the kernel refuses such a path.
"""

import os
import sys

from skep.linux.syscalls import clone_mount, restrict_mount


def open_without_links(directory: str) -> int:
    """A mount of ``directory`` alone, attached nowhere, that follows no symbolic link.  Raises: OSError."""
    mounted = clone_mount(directory)
    try:
        restrict_mount(mounted, follows_links=False)
    except BaseException:
        os.close(mounted)
        raise
    return mounted


def path_of(mounted: int) -> str:
    """The path of an open mount for a process that has its descriptor."""
    return f"/proc/self/fd/{mounted}/."


def main() -> None:
    """Become the command."""
    directory, *command = sys.argv[1:]
    try:
        mounted = open_without_links(directory)
    except OSError as error:
        sys.exit(f"{directory}: {error.strerror}")
    os.set_inheritable(mounted, True)
    os.execvp(command[0], [*command, path_of(mounted)])


if __name__ == "__main__":
    main()
