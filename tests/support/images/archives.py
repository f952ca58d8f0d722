"""Image archives for tests, built in memory: valid archives, and one for each known kind of damage.

``HOSTILE`` names each damaged archive.  A real engine's response to each is recorded next to the tests.
"""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Member = tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]


def a_file(name: str, content: bytes = b"", mode: int = 0o644, **fields: Any) -> Member:
    """Return a regular file.  ``fields``: further fields of ``tarfile.TarInfo``."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), mode
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def an_entry(name: str, type: bytes, linkname: str = "", mode: int = 0o755, **fields: Any) -> tarfile.TarInfo:
    """Return a member without content: a directory, link or device.  ``type`` is a constant of ``tarfile``."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = type, linkname, mode
    for field, value in fields.items():
        setattr(member, field, value)
    return member


def a_tar(*members: Member, format: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar archive of ``members``, without any cleaning."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member in members:
            info, content = member if isinstance(member, tuple) else (member, b"")
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def a_config(*layers: bytes, **fields: Any) -> bytes:
    """Return the configuration of an image with these uncompressed layers."""
    document = {
        "architecture": "amd64",
        "os": "linux",
        "created": "2026-01-01T00:00:00Z",
        "config": {"Cmd": ["sh"], "Env": ["PATH=/bin"], "Labels": {"test": "yes"}},
        "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
        "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "a test"} for _ in layers],
    }
    return json.dumps(document | fields).encode()


def a_docker_archive(
    *layers: bytes,
    tags: Sequence[str] = ("hostile:1",),
    config: bytes | None = None,
    manifest: Any = None,
    extra: Sequence[Member] = (),
    stored: Mapping[int, bytes] | None = None,
) -> bytes:
    """Return an archive as ``docker save`` wrote it up to version 24.

    ``stored`` replaces a layer's bytes without changing the digests.
    """
    config = a_config(*layers) if config is None else config
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    if manifest is None:
        manifest = [{"Config": "config.json", "RepoTags": list(tags), "Layers": names}]
    bodies = [(stored or {}).get(number, layer) for number, layer in enumerate(layers)]
    return a_tar(
        *extra,
        *(a_file(name, body) for name, body in zip(names, bodies, strict=True)),
        a_file("config.json", config),
        a_file("manifest.json", json.dumps(manifest).encode()),
    )


def a_layer(*members: Member) -> bytes:
    """Return a small harmless layer, followed by ``members``."""
    return a_tar(an_entry("etc", tarfile.DIRTYPE), a_file("etc/hostname", b"box\n"), *members)


_GOOD = a_layer()


def a_legacy_archive(tag: str = "old") -> bytes:
    """Return an archive as ``docker save`` wrote it before 1.10, with a directory per layer and without digests."""
    base = b'{"id":"1","created":"2015-01-01T00:00:00Z","container_config":{"Cmd":["a","<b>"]}}'
    top = (
        b'{"id":"2","parent":"1","created":"2015-01-02T00:00:00Z","docker_version":"1.9.1","os":"linux",'
        b'"architecture":"amd64","config":{"Cmd":["sh"]},"container_config":{"Cmd":["c & d"]}}'
    )
    return a_tar(
        *(an_entry(name, tarfile.DIRTYPE) for name in "12"),
        a_file("1/json", base),
        a_file("1/layer.tar", _GOOD),
        a_file("2/json", top),
        a_file("2/layer.tar", a_tar(a_file("x", b"y"))),
        a_file("repositories", json.dumps({tag: {"1": "2"}}).encode()),
    )


GOOD: Mapping[str, Callable[[], bytes]] = {
    "legacy:1": lambda: a_legacy_archive("legacy"),
    "plain:1": lambda: a_docker_archive(_GOOD, a_tar(a_file("x", b"y")), tags=["plain:1"]),
}
"""Valid archives by the name of their image."""


def _headless() -> bytes:
    """Return a layer whose second header is garbage."""
    return _GOOD[:512] + b"\xff" * 512 + _GOOD[1024:]


HOSTILE: Mapping[str, Callable[[], bytes]] = {
    "truncated": lambda: a_docker_archive(a_layer(a_file("big", b"x" * 100_000)))[:50_000],
    "truncated inside a layer": lambda: a_docker_archive(
        a_layer(a_file("big", b"x" * 100_000)), stored={0: a_layer(a_file("big", b"x" * 100_000))[:40_000]}
    ),
    "truncated gzip layer": lambda: a_docker_archive(_GOOD, stored={0: gzip.compress(_GOOD)[:-30]}),
    "no archive at all": lambda: b"this is not a tar archive, whatever its sender says" * 100,
    "empty": lambda: b"",
    "empty tar": lambda: a_tar(),
    "wrong digest of a layer": lambda: a_docker_archive(_GOOD, stored={0: a_layer(a_file("evil", b"1"))}),
    "garbage in a layer": lambda: a_docker_archive(_GOOD, stored={0: _headless()}),
    "fewer layers than digests": lambda: a_docker_archive(
        _GOOD, manifest=[{"Config": "config.json", "RepoTags": None, "Layers": []}]
    ),
    "manifest is no JSON": lambda: a_tar(a_file("manifest.json", b"{")),
    "manifest is null": lambda: a_tar(a_file("manifest.json", b"null")),
    "manifest is an object": lambda: a_tar(a_file("manifest.json", b"{}")),
    "configuration missing": lambda: a_docker_archive(
        _GOOD, manifest=[{"Config": "nowhere.json", "RepoTags": None, "Layers": ["0/layer.tar"]}]
    ),
    "configuration is no JSON": lambda: a_docker_archive(_GOOD, config=b"nonsense"),
    "configuration without rootfs": lambda: a_docker_archive(_GOOD, config=b'{"os":"linux"}'),
    "image of another system": lambda: a_docker_archive(_GOOD, config=a_config(_GOOD, os="windows")),
    "layer missing": lambda: a_docker_archive(
        _GOOD, manifest=[{"Config": "config.json", "RepoTags": None, "Layers": ["gone/layer.tar"]}]
    ),
    "configuration outside": lambda: a_docker_archive(
        _GOOD, manifest=[{"Config": "../../../../etc/passwd", "RepoTags": None, "Layers": ["0/layer.tar"]}]
    ),
    "layer is a link outside": lambda: a_docker_archive(
        _GOOD,
        manifest=[{"Config": "config.json", "RepoTags": None, "Layers": ["link"]}],
        extra=[an_entry("link", tarfile.SYMTYPE, "/etc/passwd")],
    ),
    "layer is a link loop": lambda: a_docker_archive(
        _GOOD,
        manifest=[{"Config": "config.json", "RepoTags": None, "Layers": ["a"]}],
        extra=[an_entry("a", tarfile.SYMTYPE, "b"), an_entry("b", tarfile.SYMTYPE, "a")],
    ),
    "layer is a named pipe": lambda: a_docker_archive(
        _GOOD,
        manifest=[{"Config": "config.json", "RepoTags": None, "Layers": ["pipe"]}],
        extra=[an_entry("pipe", tarfile.FIFOTYPE)],
    ),
    "tag that cannot be parsed": lambda: a_docker_archive(_GOOD, tags=["Bad:Name:x"]),
    "tag without a tag": lambda: a_docker_archive(_GOOD, tags=["hostile"]),
    "name outside in a layer": lambda: a_docker_archive(a_layer(a_file("../../escaped", b"x"))),
    "absolute name in a layer": lambda: a_docker_archive(a_layer(a_file("/absolute", b"x"))),
    "write through a link outside": lambda: a_docker_archive(
        a_layer(an_entry("out", tarfile.SYMTYPE, "/tmp"), a_file("out/escaped", b"x"))
    ),
    "write through a link upwards": lambda: a_docker_archive(
        a_layer(an_entry("out", tarfile.SYMTYPE, "../../../../../../tmp"), a_file("out/escaped", b"x"))
    ),
    "hard link outside": lambda: a_docker_archive(
        a_layer(an_entry("shadow", tarfile.LNKTYPE, "../../../../../../etc/shadow"))
    ),
    "hard link to nothing": lambda: a_docker_archive(a_layer(an_entry("x", tarfile.LNKTYPE, "nowhere"))),
    "device nodes": lambda: a_docker_archive(
        a_layer(
            an_entry("sda", tarfile.BLKTYPE, mode=0o666, devmajor=8, devminor=0),
            an_entry("mem", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=1),
        )
    ),
    "unknown member type": lambda: a_docker_archive(a_layer(an_entry("odd", b"Y"))),
    "file in place of a directory": lambda: a_docker_archive(
        a_layer(a_file("etc", b"now a file"), a_file("etc/below", b"x"))
    ),
    "whiteout of nothing": lambda: a_docker_archive(a_layer(a_file(".wh.", b""))),
    "whiteout of the parent": lambda: a_docker_archive(a_layer(a_file("etc/.wh...", b""))),
    "outer name outside": lambda: a_docker_archive(_GOOD, extra=[a_file("../../outside", b"x")]),
    "outer device node": lambda: a_docker_archive(
        _GOOD, extra=[an_entry("sda", tarfile.BLKTYPE, devmajor=8, devminor=0)]
    ),
    "too many layers": lambda: a_docker_archive(*(a_tar(a_file(f"f{n}", b"")) for n in range(130))),
}
"""Damaged archives by the kind of damage."""
