"""Checksums: of numbers in files, and of texts that carry their own."""

import hashlib
import zlib
from collections.abc import Callable, Iterable

BLANK = b"0" * 64
# CRC-32 is about four times as fast: for files of terabytes
SHA256, CRC32 = "sha256", "crc32"


def sealed(start: bytes, rest: bytes) -> bytes:
    """A text with its own SHA-256 between two parts, computed with zeros in its place."""
    digest = hashlib.sha256(start + BLANK + rest).hexdigest().encode()
    return start + digest + rest


def is_sealed(text: bytes, start: bytes) -> bool:
    """Whether a text is unchanged since ``sealed`` made it."""
    if not text.startswith(start):
        return False
    stop = len(start) + len(BLANK)
    digest, rest = text[len(start) : stop], text[stop:]
    expected = hashlib.sha256(start + BLANK + rest).hexdigest().encode()
    return digest == expected


def checksum(parts: Iterable[memoryview], algorithm: str = SHA256) -> str:
    """The checksum of bytes, with the name of its algorithm: ``sha256:...`` or ``crc32:...``."""
    return _CHECKSUMS[algorithm](parts)


def is_checksum(parts: Iterable[memoryview], expected: str) -> bool:
    """Whether a checksum, of any supported algorithm, is that of some bytes."""
    algorithm = expected.partition(":")[0]
    return algorithm in _CHECKSUMS and checksum(parts, algorithm) == expected


def _sha256(parts: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return f"{SHA256}:{digest.hexdigest()}"


def _crc32(parts: Iterable[memoryview]) -> str:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return f"{CRC32}:{value:08x}"


_CHECKSUMS: dict[str, Callable[[Iterable[memoryview]], str]] = {SHA256: _sha256, CRC32: _crc32}
