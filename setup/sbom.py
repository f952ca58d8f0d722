"""Print the bill of materials of a release (CycloneDX 1.5): ``sbom.py DIRECTORY VERSION``.

Lists the Python packages of the lock file, and the programs and libraries in the directory's relocatable tarballs.
"""

import json
import os
import re
import sys
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LOCK = Path(__file__).with_name("requirements.lock")
BUILD_TOOLS = {"setuptools"}


def python_packages(lock: str) -> Iterator[dict[str, Any]]:
    """Return a component for each locked package that an installation has."""
    for name, version in re.findall(r"^([a-z0-9_.-]+)==([^\s\\]+)", lock, re.MULTILINE):
        if name not in BUILD_TOOLS:
            yield _component("library", name, version, f"pkg:pypi/{name}@{version}")


def distribution_packages(tarballs: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Return a component for each line of ``bundled.txt`` (package, version, architecture) in a tarball."""
    for tarball in tarballs:
        with tarfile.open(tarball) as archive:
            member = next((one for one in archive if one.name.endswith("/share/doc/skep/bundled.txt")), None)
            content = archive.extractfile(member) if member else None
            for line in content.read().decode().splitlines() if content else ():
                name, version, *architecture = line.split()
                if architecture:
                    purl = f"pkg:deb/debian/{name}@{version}?arch={architecture[0]}"
                else:
                    purl = f"pkg:github/etcd-io/{name}@v{version}"
                yield _component(
                    "application" if not name.startswith("lib") else "library", name, version, purl
                )


def _component(kind: str, name: str, version: str, purl: str) -> dict[str, Any]:
    return {"type": kind, "name": name, "version": version, "purl": purl.replace("+", "%2B"), "bom-ref": purl}


def bill(directory: Path, version: str, epoch: int) -> dict[str, Any]:
    """Return the document.  Its serial number follows from its components, so the same release has the same one."""
    found = {
        one["bom-ref"]: one
        for one in (
            *python_packages(LOCK.read_text()),
            *distribution_packages(sorted(directory.glob("skep-*-linux-*.tar.gz"))),
        )
    }
    components = [found[reference] for reference in sorted(found)]
    product = _component("application", "skep", version, f"pkg:pypi/skep-orchestrator@{version}")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([product, components]))}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {**product, "licenses": [{"license": {"id": "Apache-2.0"}}]},
        },
        "components": components,
    }


if __name__ == "__main__":
    document = bill(Path(sys.argv[1]), sys.argv[2], int(os.environ["SOURCE_DATE_EPOCH"]))
    print(json.dumps(document, indent=2))
