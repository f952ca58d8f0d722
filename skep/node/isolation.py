"""What containers of this node are confined by, as far as it is the machine's and not this program's."""

import shutil
from pathlib import Path

from skep.node import requirements
from skep.node.conditions import Conditions
from skep.node.oci import apparmor, runc_flaws


def check_isolation(runc: str, conditions: Conditions) -> None:
    """Raise a condition for whatever is missing.  ``runc``: the program, or its name.  Blocks."""
    program = shutil.which(runc) or ""
    output = requirements.version_output(program) or ""
    flaws = runc_flaws.warning(output, runc_flaws.changelog_of(Path(program)))
    for name, sentence in (("runc", flaws), ("apparmor", apparmor.problem())):
        if sentence:
            conditions.raise_(name, sentence)
