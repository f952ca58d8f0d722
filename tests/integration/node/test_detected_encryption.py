"""Which WireGuard a node takes when the kernel's module is there, and making or using a device fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skep.dataplane.wireguard.methods import choose, reasons_for_fallback
from skep.model.networks.wireguard import EncryptionMethod
from skep.node.host.features import detect

pytestmark = [pytest.mark.needs("root", "ip", "wireguard-go"), pytest.mark.timeout(60)]

REFUSING = """echo 'RTNETLINK answers: Operation not permitted' >&2; exit 2"""
OTHER_DEVICE = """exec {ip} link add w0 type dummy"""
"""Made, and not to be configured."""


@pytest.mark.parametrize(
    ("instead", "reason"),
    [(REFUSING, "wireguard: RTNETLINK answers: Operation not permitted"), (OTHER_DEVICE, "wireguard: ")],
    ids=["no right to make a device", "a device that takes no key"],
)
def test_a_kernel_that_refuses_a_device_gives_way_to_wireguard_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instead: str, reason: str
) -> None:
    """``ip`` is the real one but for the WireGuard device."""
    ip = next(path for folder in os.get_exec_path() if (path := Path(folder, "ip")).exists())
    wrapper = tmp_path / "bin" / "ip"
    wrapper.parent.mkdir()
    case = instead.format(ip=ip)
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *wireguard*) {case} ;; esac\nexec {ip} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    features = detect(tmp_path / "data")
    assert choose(features) is EncryptionMethod.USER_SPACE
    assert reasons_for_fallback(features).startswith(reason)
    assert "veth" not in features.missing, "the probe's devices are otherwise the real ones"


def test_a_node_that_can_make_no_namespace_tries_nothing_in_its_own(tmp_path: Path) -> None:
    """As in a container without CAP_SYS_ADMIN: no device may stay behind in the machine's own namespace."""
    probe = (
        "import sys; from pathlib import Path; from skep.node.host.features import detect;"
        "print(detect(Path(sys.argv[1])).missing.get('wireguard'));"
        "print(Path('/proc/net/dev').read_text())"
    )
    program = ("unshare", "--net", "setpriv", "--bounding-set=-sys_admin", sys.executable, "-c", probe)
    done = subprocess.run([*program, str(tmp_path)], capture_output=True, text=True, check=True, timeout=50)
    reason, _, devices = done.stdout.partition("\n")
    assert reason == "no network namespace can be made: Operation not permitted"
    names = {line.partition(":")[0].strip() for line in devices.splitlines()[2:] if line}
    assert not {"v0", "v1", "b0", "x0", "w0"} & names
