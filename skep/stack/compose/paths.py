"""Makes the relative paths of a Compose file absolute."""

import os
from pathlib import Path

from msgspec.structs import replace

from skep.stack.compose.document import YamlNode, scalar


def within(directory: Path, text: str) -> Path:
    """Return a path of a file.  A relative one is below ``directory``."""
    return Path(os.path.normpath(directory / os.path.expanduser(text)))


def with_paths(document: YamlNode, directory: Path) -> YamlNode:
    """Return the document with its relative paths made absolute."""
    entries = dict(document.entries or {})
    for section in ("secrets", "configs"):
        if (found := entries.get(section)) is not None and found.entries is not None:
            entries[section] = replace(
                found,
                value={name: _path_below(one, directory, "file") for name, one in found.entries.items()},
            )
    services = entries.get("services")
    if services is not None and services.entries is not None:
        entries["services"] = replace(
            services, value={name: _service_paths(one, directory) for name, one in services.entries.items()}
        )
    return replace(document, value=entries)


def _path_below(node: YamlNode, directory: Path, *keys: str) -> YamlNode:
    if node.entries is None:
        return node
    made = dict(node.entries)
    for key in keys:
        one = made.get(key)
        if one is not None and isinstance(one.value, str):
            made[key] = scalar(str(within(directory, one.text)), one.place)
    return replace(node, value=made)


def _service_paths(service: YamlNode, directory: Path) -> YamlNode:
    if service.entries is None:
        return service
    made = dict(service.entries)
    for key in ("env_file", "label_file"):
        if (found := made.get(key)) is not None and found.items is not None:
            made[key] = replace(found, value=tuple(_file_path(one, directory) for one in found.items))
    if (build := made.get("build")) is not None and build.entries is not None:
        made["build"] = _build_paths(build, directory)
    if (volumes := made.get("volumes")) is not None and volumes.items is not None:
        made["volumes"] = replace(volumes, value=tuple(_volume_path(one, directory) for one in volumes.items))
    return replace(service, value=made)


def _build_paths(build: YamlNode, directory: Path) -> YamlNode:
    context = (build.entries or {}).get("context")
    made = build if context is not None and _is_remote(context) else _path_below(build, directory, "context")
    others = (build.entries or {}).get("additional_contexts")
    if others is None or others.entries is None:
        return made
    local = [name for name, one in others.entries.items() if not _is_remote(one)]
    return replace(
        made,
        value={**(made.entries or {}), "additional_contexts": _path_below(others, directory, *local)},
    )


def with_dockerfiles(document: YamlNode, directory: Path) -> YamlNode:
    """Return the document with each Dockerfile's path made absolute, as it is relative to its build context."""
    services = (document.entries or {}).get("services")
    if services is None or services.entries is None:
        return document
    made = {name: _with_dockerfile(one, directory) for name, one in services.entries.items()}
    return replace(document, value={**(document.entries or {}), "services": replace(services, value=made)})


def _with_dockerfile(service: YamlNode, directory: Path) -> YamlNode:
    build = (service.entries or {}).get("build")
    if build is None or build.entries is None or build.tag:
        return service
    context = build.entries.get("context") or scalar(str(directory), build.place)
    made = replace(build, value={**build.entries, "context": context})
    if not _is_remote(context):
        made = _path_below(made, Path(context.text), "dockerfile")
    return replace(service, value={**(service.entries or {}), "build": made})


def _is_remote(context: YamlNode) -> bool:
    """Return whether the build context is a repository, an image or an archive instead of a local directory."""
    return "://" in context.text or context.text.startswith(("git@", "github.com/", "service:"))


def _file_path(node: YamlNode, directory: Path) -> YamlNode:
    if isinstance(node.value, str):
        return scalar(str(within(directory, node.text)), node.place)
    return _path_below(node, directory, "path")


def _volume_path(node: YamlNode, directory: Path) -> YamlNode:
    if isinstance(node.value, str):
        source, separator, rest = node.text.partition(":")
        is_path = separator and source.startswith((".", "~"))
        return scalar(f"{within(directory, source)}:{rest}", node.place) if is_path else node
    kind = (node.entries or {}).get("type")
    return _path_below(node, directory, "source") if kind is not None and kind.text == "bind" else node
