"""What the unpacking worker may still do while it reads an archive, and what one archive may cost."""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from skep.engine.images.archives.workers import ImageLimits, unpack
from skep.errors import InvalidArgument
from tests.support.images.archives import a_file, a_tar

_INSIDE = """
import ctypes, json, os, socket, sys
from pathlib import Path
from skep.engine.images.archives.confinement import confine
import http.client
def tried(act):
    try:
        act()
        return "done"
    except OSError as error:
        return os.strerror(error.errno)
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    return os.strerror(ctypes.get_errno()) if libc.syscall(number, *arguments) < 0 else "done"
status = os.open("/proc/self/status", os.O_RDONLY)
helper = confine(sys.argv[1])
lines = dict(line.split(":", 1) for line in os.read(status, 1 << 16).decode().splitlines())
os.mkdir("/opaque")
helper.mark_opaque("/opaque")
print(json.dumps({
    "status": {name: lines[name].strip() for name in ("CapEff", "CapPrm", "CapBnd", "NoNewPrivs", "Seccomp")},
    "chroot": tried(lambda: os.chroot("/opaque")),
    "socket": tried(lambda: socket.socket()),
    "fork": tried(lambda: os.fork()),
    "exec": tried(lambda: os.execv("/bin/true", ["true"])),
    "trusted": tried(lambda: os.setxattr("/opaque", "trusted.x", b"y")),
    "device": tried(lambda: os.mknod("/null", 0o20600, os.makedev(1, 3))),
    "owner": tried(lambda: os.chown("/null", 5, 5)),
    "mount": call(165, b"x", b"/opaque", b"tmpfs", 0, None), "ptrace": call(101, 16, os.getppid(), 0, 0),
    "kill": tried(lambda: os.kill(os.getppid(), 0)),
}))
helper.close()
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="calls have other numbers")
def test_the_worker_keeps_what_writing_files_takes(tmp_path: Path) -> None:
    done = subprocess.run(
        (sys.executable, "-I", "-c", _INSIDE, str(tmp_path)), capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    status = found.pop("status")
    capabilities = f"{1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 27 | 1 << 31:016x}"
    assert status == {
        **dict.fromkeys(("CapEff", "CapPrm", "CapBnd"), capabilities),
        "NoNewPrivs": "1",
        "Seccomp": "2",
    }
    refused = "Operation not permitted"
    assert found == {
        **dict.fromkeys(("chroot", "socket", "fork", "exec", "trusted", "mount", "ptrace", "kill"), refused),
        **dict.fromkeys(("device", "owner"), "done"),
    }
    assert os.getxattr(tmp_path / "opaque", "trusted.overlay.opaque") == b"y"


async def unpacked(content: bytes, target: Path) -> float:
    """Seconds that it takes."""
    source = target.with_suffix(".tar")
    source.write_bytes(content)
    target.mkdir()
    begun = time.monotonic()
    with source.open("rb") as file:
        await unpack(file.fileno(), target, limits=ImageLimits(unpack_s=60), is_layer=True)
    return time.monotonic() - begun


def with_times(**records: str) -> bytes:
    member = tarfile.TarInfo("file")
    member.pax_headers = records
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    return content.getvalue()


@pytest.mark.parametrize(
    ("mtime", "expected_ns"),
    [
        ("1e999990", 0),
        ("1e999999", 0),
        ("9" * 5000, 0),
        ("1700000000.123456789123", 1_700_000_000_123_456_789),
        ("1700000000", 1_700_000_000_000_000_000),
        ("-5", 0),
        ("0x10", 0),
        ("inf", 0),
    ],
)
async def test_no_time_takes_long_to_read(tmp_path: Path, mtime: str, expected_ns: int) -> None:
    await unpacked(with_times(mtime=mtime), tmp_path / "layer")
    assert (tmp_path / "layer/file").stat().st_mtime_ns == expected_ns


async def test_a_header_longer_than_gos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="header field too long"):
        await unpacked(with_times(comment="x" * (2 << 20)), tmp_path / "layer")
    await unpacked(with_times(comment="x" * 1000), tmp_path / "short")


async def test_directories_are_opaque_and_devices_are_made_all_the_same(tmp_path: Path) -> None:
    device = tarfile.TarInfo("null")
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
    await unpacked(
        a_tar(a_file("d/.wh..wh..opq", b""), a_file("d/x", b"new"), a_file(".wh.gone", b""), (device, b"")),
        tmp_path / "layer",
    )
    assert os.getxattr(tmp_path / "layer/d", "trusted.overlay.opaque") == b"y"
    assert os.stat(tmp_path / "layer/gone").st_rdev == 0
    assert os.stat(tmp_path / "layer/null").st_rdev == os.makedev(1, 3)
