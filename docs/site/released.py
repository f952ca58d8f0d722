"""Names the version of a release, and its date, in texts that call it unreleased.

The changelog and the README say so until somebody changes them, and a release is made from a commit before that.
``python -m docs.site.released VERSION DATE`` filters its input: ``setup/`` uses it for packages and release notes.
"""

import re
import sys


def released(text: str, version: str, date: str) -> str:
    """Return the text of a release, in which the changelog's heading and the README's status have its date."""
    number = re.escape(version)
    text = re.sub(rf"^(## {number}) \(unreleased\)$", rf"\1 ({date})", text, flags=re.MULTILINE)
    return re.sub(
        rf"^(Status: {number}), not released yet and not", rf"\1 of {date}, not", text, flags=re.MULTILINE
    )


if __name__ == "__main__":
    _, version, date = sys.argv
    sys.stdout.write(released(sys.stdin.read(), version, date))
