"""Logins of the docker command: from its file, and from helper programs."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from skep.cli.apps.registry_logins import RegistryLogins
from skep.errors import InvalidArgument


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def login(folder: Path, image: str) -> Any:
    header = RegistryLogins(folder).of(image)
    return json.loads(base64.urlsafe_b64decode(header)) if header else None


def write(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def test_each_registry_has_its_login(tmp_path: Path) -> None:
    assert login(tmp_path, "busybox") is None, "without a file"
    write(
        tmp_path,
        auths={
            "https://index.docker.io/v1/": {"auth": encoded("hub:pass:word")},
            "r.example:5000": {"auth": encoded("me:secret\0\0")},
            "https://t.example": {"identitytoken": "token"},
            "empty.example": {},
        },
        HttpHeaders={"A": "b"},
    )
    hub = {"username": "hub", "password": "pass:word", "serveraddress": "https://index.docker.io/v1/"}
    assert login(tmp_path, "busybox:1") == hub
    assert login(tmp_path, "docker.io/team/app") == hub
    assert login(tmp_path, "r.example:5000/app:1") == {
        "username": "me",
        "password": "secret",
        "serveraddress": "r.example:5000",
    }
    assert login(tmp_path, "t.example/app") == {"identitytoken": "token", "serveraddress": "t.example"}
    assert login(tmp_path, "empty.example/app") is None
    assert login(tmp_path, "other.example/app") is None


def a_helper(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "docker-credential-test"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    write(folder, credHelpers={"r.example": "test"}, auths={"r.example": {"auth": encoded("a:b")}})


def test_a_helper_is_asked_for_its_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_helper(tmp_path, monkeypatch, 'read s; echo "{\\"Username\\": \\"$s\\", \\"Secret\\": \\"x\\"}"')
    assert login(tmp_path, "r.example/app")["username"] == "r.example"
    a_helper(tmp_path, monkeypatch, 'echo "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"x\\"}"')
    assert login(tmp_path, "r.example/app")["identitytoken"] == "x"
    a_helper(tmp_path, monkeypatch, "echo credentials not found in native keychain; exit 1")
    assert login(tmp_path, "r.example/app") is None


@pytest.mark.parametrize("output", ["secret-word", '{"Username": "secret-word"}'])
def test_what_a_helper_gives_is_in_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    a_helper(tmp_path, monkeypatch, f"echo '{output}'")
    with pytest.raises(
        InvalidArgument, match="docker-credential-test returned an unreadable login"
    ) as caught:
        login(tmp_path, "r.example/app")
    assert "secret-word" not in str(caught.value)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidArgument, match=r"config\.json cannot be read"):
        login(tmp_path, "busybox")
    write(tmp_path, auths={"r.example": {"auth": "%"}})
    with pytest.raises(InvalidArgument, match=r"the login for r\.example cannot be read"):
        login(tmp_path, "r.example/app")
    write(tmp_path, credsStore="missing-one")
    with pytest.raises(InvalidArgument, match="docker-credential-missing-one is not installed"):
        login(tmp_path, "busybox")
