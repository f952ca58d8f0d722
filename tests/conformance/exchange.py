"""Steps of the script turned into requests, and answers into what can be compared."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from tests.conformance.script import Step

HEADERS = ("Content-Type", "Api-Version", "Docker-Experimental", "Ostype")
"""Headers that are compared (``Server`` names who answers)."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An answer without what differs from run to run: ids, times, versions, addresses."""

    name: str
    status: int
    headers: dict[str, str] = {}
    message: str | None = None
    """Of an error."""
    body: Any = None
    """Of any other answer, if it is JSON."""


class Memory:
    """The objects seen so far, by the names of the script."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._beginnings: Counter[str] = Counter()

    def keep(self, name: str, response: Any) -> None:
        """Remember the object in ``answer``: its id, the beginning of that, and its version."""
        if isinstance(response, str):
            response = {"ID": response}
        if not isinstance(response, dict):
            return
        id = response.get("ID") or response.get("Id")
        if id:
            self._words[f"{{{name}}}"] = id
            self._words[f"{{{name}.prefix}}"] = id[:18]
            if name.startswith("twin"):
                self._beginnings[id[0]] += 1
                self._words["{twins}"] = self._beginnings.most_common(1)[0][0]
        if "Version" in response:
            self._words[f"{{{name}.version}}"] = str(response["Version"]["Index"])

    def fill(self, text: str) -> str:
        """``text`` with the words it stands for."""
        for word, value in self._words.items():
            text = text.replace(word, value)
        return text

    def hide(self, text: str) -> str:
        """``text`` with ids as the script names them."""
        ids = ((word, value) for word, value in self._words.items() if "." not in word and word != "{twins}")
        for word, value in ids:
            text = text.replace(value, f"<{word[1:-1]}>")
        return text


def request_of(step: Step, memory: Memory) -> tuple[str, bytes | None]:
    """Path with query, and body."""
    path = memory.fill(step.path)
    bare, question, query = path.partition("?")
    path = bare + question + quote(query, safe='=&{}[]",:~') if query else bare
    if step.body is None or isinstance(step.body, bytes):
        return path.replace('"', "%22").replace("{", "%7B").replace("}", "%7D"), step.body
    body = memory.fill(msgspec.json.encode(step.body).decode()).encode()
    return path.replace('"', "%22").replace("{", "%7B").replace("}", "%7D"), body


_ID = re.compile(r"\b[0-9a-z]{25}\b")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_SIZE = re.compile(r"\(\d+ vs\.")
"""The engine counts its own encoding of a body, not the body."""
_AMBIGUOUS = re.compile(r"service \w is ambiguous \(\d+ matches found\)")
_TOKEN = re.compile(r"SWMTKN-1-[0-9a-z-]+")


def recorded(step: Step, status: int, headers: Mapping[str, str], content: bytes, memory: Memory) -> Recorded:
    """What is kept of an answer, and remembered of its object."""
    try:
        response = msgspec.json.decode(content) if content.strip() else None
        is_json = content.strip() != b""
    except msgspec.DecodeError:
        response, is_json = None, False
    if step.keep and status < 300:
        memory.keep(step.keep, response)
    message = None
    if status >= 400:
        message = (
            response["message"]
            if isinstance(response, dict)
            else content.decode(errors="replace").rstrip("\n")
        )
        message = _neutral(message, memory)
        response = None
    return Recorded(
        name=step.name,
        status=status,
        headers={name: headers[name] for name in HEADERS if name in headers},
        message=message,
        body=_neutral_value(response, memory) if is_json else None,
    )


def _neutral(text: str, memory: Memory) -> str:
    text = _TOKEN.sub("<token>", memory.hide(text))
    text = _ID.sub("<id>", text)
    text = _TIME.sub("<time>", text)
    text = _SIZE.sub("(<size> vs.", text)
    text = _AMBIGUOUS.sub("service <beginning> is ambiguous (<several> matches found)", text)
    return text if len(text) < 2000 else text[:200] + "..."


def _neutral_value(value: Any, memory: Memory) -> Any:
    match value:
        case dict():
            return {key: _neutral_field(key, item, memory) for key, item in value.items()}
        case list():
            return [_neutral_value(item, memory) for item in value]
        case str():
            return _neutral(value, memory)
        case _:
            return value


def _neutral_field(key: str, value: Any, memory: Memory) -> Any:
    if key == "Index":
        return "<version>"
    if key in {"TrustRoot", "CertIssuerSubject", "CertIssuerPublicKey"} and value:
        return f"<{key}>"
    return _neutral_value(value, memory)
