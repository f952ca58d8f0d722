"""Runs a command with a directory in which it cannot follow symbolic links.

Usage: ``python -m skep.linux.without_links DIRECTORY COMMAND...``.  The command gets the directory as its last
argument.

Other writers of the directory can create links at any time.  A command that first checks whether a path is a link, and
then uses the path, can be led outside.  Here the kernel refuses such a path.
"""

import os
import sys

from skep.linux.syscalls import clone_mount, restrict_mount


def open_without_links(directory: str) -> int:
    """Return a detached mount of ``directory`` alone that does not follow symbolic links.  Raises: OSError."""
    mounted = clone_mount(directory)
    try:
        restrict_mount(mounted, follows_links=False)
    except BaseException:
        os.close(mounted)
        raise
    return mounted


def path_of(mounted: int) -> str:
    """Return the path of an open mount for a process that has its descriptor."""
    return f"/proc/self/fd/{mounted}/."


def main() -> None:
    """Execute the command in place of this process."""
    directory, *command = sys.argv[1:]
    try:
        mounted = open_without_links(directory)
    except OSError as error:
        sys.exit(f"{directory}: {error.strerror}")
    os.set_inheritable(mounted, True)
    os.execvp(command[0], [*command, path_of(mounted)])


if __name__ == "__main__":
    main()
