"""Which versions of runc and crun are warned of."""

import gzip
from pathlib import Path

import pytest

from skep.engine.runtime.runtime_flaws import changelog_of, flaws_of, warning

OF_2024, OF_2025 = ["CVE-2024-21626"], ["CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"]
CHANGELOG = (
    "runc (1.1.5+ds1-1+deb12u1) bookworm-security\n\n  * CVE-2024-21626: several container breakouts\n"
)


@pytest.mark.parametrize(
    ("version", "flaws"),
    [
        ("1.1.5", OF_2024 + OF_2025),
        ("1.1.11", OF_2024 + OF_2025),
        ("1.1.12", OF_2025),
        ("1.2.7", OF_2025),
        ("1.2.8", []),
        ("1.3.0", OF_2025),
        ("1.3.3", []),
        ("1.4.0-rc.2", OF_2025),
        ("1.4.0", []),
        ("1.5.1", []),
        ("2.0.0", []),
    ],
)
def test_a_version_has_the_flaws_of_its_series(version: str, flaws: list[str]) -> None:
    assert flaws_of("runc", f"runc version {version}\ncommit: v{version}\nspec: 1.0.2-dev\n") == flaws


def test_what_a_distribution_has_mended_is_not_warned_of() -> None:
    debian = "runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1+deb12u1\nspec: 1.0.2-dev\n"
    assert flaws_of("runc", debian) == OF_2025  # known of that package, where it has no documents
    assert flaws_of("runc", debian.replace("+deb12u1", "")) == OF_2024 + OF_2025
    assert flaws_of("runc", debian.replace("+deb12u1", ""), CHANGELOG) == OF_2025
    assert flaws_of("runc", debian, CHANGELOG + "".join(f"  * {name}\n" for name in OF_2025)) == []


def test_the_warning_names_the_version_and_what_to_do() -> None:
    sentence = warning("runc", "runc version 1.2.5\ncommit: v1.2.5-0-g59923ef\n", "")
    assert sentence == (
        f"runc 1.2.5 has known container escapes ({', '.join(OF_2025)}): upgrade it, or set another runc "
        "with --runc"
    )
    assert warning("runc", "", "") == ""


@pytest.mark.parametrize(
    ("version", "flaws"),
    [("1.8.1", ["CVE-2026-47766"]), ("1.14", ["CVE-2026-47766"]), ("1.28", []), ("1.29.1", [])],
)
def test_a_crun_is_warned_of_as_a_runc_is(version: str, flaws: list[str]) -> None:
    output = f"crun version {version}\ncommit: f8a096be\nrundir: /run/crun\nspec: 1.0.0\n+SYSTEMD +SELINUX\n"
    assert flaws_of("crun", output) == flaws
    assert flaws_of("crun", output, "  * CVE-2026-47766: do not follow /dev\n") == []
    assert warning("crun", output, "") == (
        f"crun {version} has known container escapes (CVE-2026-47766): upgrade it, or set another crun with --crun"
        if flaws
        else ""
    )


def test_the_changelog_is_that_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "runc").mkdir()
    (tmp_path / "runc/changelog.Debian.gz").write_bytes(gzip.compress(CHANGELOG.encode()))
    (tmp_path / "runc/changelog.gz").write_bytes(b"no gzip")
    (tmp_path / "runc/changelog.damaged.gz").write_bytes(gzip.compress(b"x" * 99)[:10] + b"\xff" * 20)
    assert changelog_of("runc", Path("/usr/sbin/runc"), tmp_path).strip() == CHANGELOG.strip()
    assert changelog_of("runc", Path("/usr/local/bin/runc"), tmp_path) == ""
    assert changelog_of("runc", Path("/opt/runc"), tmp_path) == ""
