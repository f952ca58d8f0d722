"""Programs for two processors, small enough to be written down: each creates the directory ``/made``."""

_AMD64 = bytes.fromhex(
    "b853000000"  # mov eax, 83 (mkdir)
    "488d3d10000000"  # lea rdi, [the path]
    "beed010000"  # mov esi, 0755
    "0f05b83c00000031ff0f05"  # syscall; mov eax, 60 (exit); xor edi, edi; syscall
)
_ARM64 = b"".join(
    word.to_bytes(4, "little")
    for word in (
        0x92800C60,  # mov x0, -100 (the working directory)
        0x100000E1,  # adr x1, the path
        0xD2803DA2,  # mov x2, 0755
        0xD2800448,  # mov x8, 34 (mkdirat)
        0xD4000001,  # svc 0
        0xD2800000,  # mov x0, 0
        0xD2800BA8,  # mov x8, 93 (exit)
        0xD4000001,  # svc 0
    )
)
_ADDRESS = 0x400000
_HEADERS = 64 + 56


def program(architecture: str) -> bytes:
    """Return a static program for ``amd64`` or ``arm64``."""
    number, code = {"amd64": (62, _AMD64), "arm64": (183, _ARM64)}[architecture]
    code += b"/made\0"
    size = _HEADERS + len(code)

    def numbers(*pairs: tuple[int, int]) -> bytes:
        return b"".join(value.to_bytes(count, "little") for value, count in pairs)

    start = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = numbers((2, 2), (number, 2), (1, 4), (_ADDRESS + _HEADERS, 8), (64, 8), (0, 8), (0, 4))
    header += numbers((64, 2), (56, 2), (1, 2), (0, 2), (0, 2), (0, 2))
    segment = numbers((1, 4), (5, 4), (0, 8), (_ADDRESS, 8), (_ADDRESS, 8), (size, 8), (size, 8), (4096, 8))
    return start + header + segment + code
