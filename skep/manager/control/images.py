"""Recognises image references.

Source: distribution/reference, normalize.go and regexp.go.
"""

import re

_NAME_LENGTH_MAX = 255

_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|[-]+)[a-z0-9]+)*"
_DOMAIN_PART = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = rf"(?:{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_DIGEST = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}"
_REFERENCE = re.compile(
    rf"(?P<name>{_DOMAIN}/{_COMPONENT}(?:/{_COMPONENT})*)(?::(?P<tag>\w[\w.-]{{0,127}}))?(?:@(?P<digest>{_DIGEST}))?",
    re.ASCII,
)
_IMAGE_ID = re.compile(r"[a-f0-9]{64}")
_DIGEST_LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}


def is_image_reference(text: str) -> bool:
    """Whether ``text`` names an image: ``busybox``, ``host:5000/team/web:1.2@sha256:...``.  An image ID does not."""
    if len(text) > 1024 or _IMAGE_ID.fullmatch(text):
        return False
    match = _REFERENCE.fullmatch(_with_domain(text))
    if match is None or len(match["name"]) > _NAME_LENGTH_MAX:
        return False
    algorithm, _, hexadecimal = (match["digest"] or "").partition(":")
    return not algorithm or _DIGEST_LENGTHS.get(algorithm) == len(hexadecimal)


def _with_domain(text: str) -> str:
    """``text`` with the registry that a short form leaves out."""
    first, slash, _ = text.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        return text
    return f"docker.io/{text}" if slash else f"docker.io/library/{text}"
