"""What containers of this node are confined by, as far as it is the machine's and not this program's."""

import shutil
from pathlib import Path

from skep.node import requirements
from skep.node.conditions import Conditions
from skep.node.oci import apparmor, runc_flaws


def check_isolation(runc: str, conditions: Conditions) -> tuple[str, ...]:
    """Sentences for ``docker info`` about ``runc``, a program or its name.  Blocks.

    An AppArmor profile that is missing is a condition: containers do not start without it.
    """
    if problem := apparmor.problem():
        conditions.raise_("apparmor", problem)
    program = shutil.which(runc) or ""
    output = requirements.version_output(program) or ""
    flaws = runc_flaws.warning(output, runc_flaws.changelog_of(Path(program)))
    return (flaws,) if flaws else ()
