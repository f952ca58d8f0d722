"""Runs a command with a directory in which it cannot follow symbolic links.

Usage: ``python -m skep.linux.without_links DIRECTORY NAMESPACE COMMAND...``.  The command gets the directory as its
last argument.  ``NAMESPACE`` is empty, or the descriptor of a user namespace in which it runs and in which the
directory's files have their owners.

Other writers of the directory can create links at any time.  A command that first checks whether a path is a link, and
then uses the path, can be led outside.  Here the kernel refuses such a path.
"""

import os
import sys
from contextlib import suppress

from skep.linux.syscalls import clone_mount, map_mount, restrict_mount
from skep.linux.user_namespaces import enter


def open_without_links(directory: str, namespace: int | None = None) -> int:
    """Return a detached mount of ``directory`` alone that does not follow symbolic links.  Raises: OSError.

    Its owners are mapped by the user namespace if the file system supports that.
    """
    mounted = clone_mount(directory)
    try:
        if namespace is not None:
            with suppress(OSError):
                map_mount(mounted, namespace)
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
    directory, descriptor, *command = sys.argv[1:]
    namespace = int(descriptor) if descriptor else None
    try:
        mounted = open_without_links(directory, namespace)
        if namespace is not None:
            enter(namespace)
    except OSError as error:
        sys.exit(f"{directory}: {error.strerror}")
    os.set_inheritable(mounted, True)
    os.execvp(command[0], [*command, path_of(mounted)])


if __name__ == "__main__":
    main()
