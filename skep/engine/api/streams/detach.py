"""Key sequences that detach from a terminal without ending the process in it (``ctrl-p,ctrl-q``).

Source: moby/term, ascii.go (ToBytes), proxy.go (EscapeError).
"""

from skep.errors import InvalidArgument

DEFAULT_KEYS = b"\x10\x11"
_CONTROLS = {"@": 0, "[": 27, "\\": 28, "]": 29, "^": 30, "_": 31}


def parse_keys(text: str) -> bytes:
    """Convert ``ctrl-a,b`` to the bytes that a terminal sends.  An empty text means Docker's default.

    Raises:
        InvalidArgument: a key is unknown.
    """
    if not text:
        return DEFAULT_KEYS
    keys = bytearray()
    for word in text.split(","):
        control = word.lower().removeprefix("ctrl-")
        if len(word) == 1 and word.isascii():
            keys += word.encode()
        elif word.lower().startswith("ctrl-") and len(control) == 1 and control in _CONTROLS:
            keys.append(_CONTROLS[control])
        elif word.lower().startswith("ctrl-") and len(control) == 1 and "a" <= control <= "z":
            keys.append(ord(control) - ord("a") + 1)
        elif word == "DEL":
            keys.append(127)
        else:
            raise InvalidArgument(f"Invalid detach keys ({text}) provided: Unknown character: '{word}'")
    return bytes(keys)


class DetachKeys:
    """Detects the detach keys in a terminal's input."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._seen = 0

    def pass_on(self, data: bytes) -> tuple[bytes, bool]:
        """Return the bytes of ``data`` for the process, and whether the keys were pressed.

        A possible start of the sequence is held back until a later byte shows that it is not the keys.
        """
        passed = bytearray()
        for byte in data:
            if byte == self._keys[self._seen]:
                self._seen += 1
                if self._seen == len(self._keys):
                    return bytes(passed), True
                continue
            passed += self._keys[: self._seen]
            self._seen = int(byte == self._keys[0])
            if not self._seen:
                passed.append(byte)
        return bytes(passed), False
