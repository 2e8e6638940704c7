"""Trust domains: how chunks are named and sealed, and how records are (docs/format.md).

BLAKE3's key derivation mode makes each subkey (the BLAKE3 paper, section 2.1); AES-256-GCM seals
(NIST SP 800-38D). A chunk's key comes from its content and the domain key, so equal windows of one
domain have equal ciphertexts and those of two domains nothing in common.
"""

from __future__ import annotations

import abc
import functools
import secrets
from typing import Final

import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from torpor.errors import Damaged

KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 8
SALT_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16

_CONTEXT: Final = "torpor repository 1: "
_RECORD_NONCE: Final = bytes(NONCE_BYTES)


class Domain(abc.ABC):
    """Names and seals; immutable, any thread may use it."""

    key_id: bytes
    """Eight bytes that tell which key, and nothing of the key."""

    is_plain: bool = False
    """Whether what this domain writes can be read by everybody."""

    @abc.abstractmethod
    def chunk_id(self, data: bytes | memoryview) -> bytes:
        """The 32-byte id of a window's content."""

    @abc.abstractmethod
    def seal_chunk(self, chunk_id: bytes, encoded: bytes) -> bytes:
        """Encoded content as it is stored."""

    @abc.abstractmethod
    def open_chunk(self, chunk_id: bytes, sealed: bytes | memoryview) -> bytes:
        """Encoded content. Raises Damaged. The caller compares the id of what it decodes."""

    @abc.abstractmethod
    def seal_record(self, header: bytes, name: str, body: bytes) -> bytes:
        """A record's body behind `header`, bound to both header and object name."""

    @abc.abstractmethod
    def open_record(self, header: bytes, name: str, sealed: bytes | memoryview) -> bytes:
        """A record's body. Raises Damaged when any of the three is not what was sealed."""

    @abc.abstractmethod
    def object_id(self, kind: str, name: str) -> str:
        """The 32 hexadecimal digits that stand for a digest in object names."""


class SealedDomain(Domain):
    """A domain with a key of 32 bytes."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a domain key has {KEY_BYTES} bytes")
        derive = functools.partial(_derive, key)
        self.key_id = derive("key id")[:KEY_ID_BYTES]
        self._id_key = derive("chunk id")
        self._chunk_key = derive("chunk key")
        self._nonce_key = derive("chunk nonce")
        self._record_key = derive("record key")
        self._name_key = derive("object name")

    def chunk_id(self, data: bytes | memoryview) -> bytes:
        """See Domain."""
        return blake3.blake3(data, key=self._id_key).digest()

    def seal_chunk(self, chunk_id: bytes, encoded: bytes) -> bytes:
        """See Domain. The nonce is a keyed hash of `encoded`: never one nonce for two contents."""
        nonce = blake3.blake3(encoded, key=self._nonce_key).digest(NONCE_BYTES)
        return nonce + self._cipher(chunk_id).encrypt(nonce, encoded, None)

    def open_chunk(self, chunk_id: bytes, sealed: bytes | memoryview) -> bytes:
        """See Domain."""
        if len(sealed) < NONCE_BYTES + TAG_BYTES:
            raise Damaged("a chunk is too short", reason=f"{len(sealed)} bytes")
        try:
            return self._cipher(chunk_id).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
        except InvalidTag:
            raise Damaged("a chunk is not what was sealed") from None

    def seal_record(self, header: bytes, name: str, body: bytes) -> bytes:
        """See Domain. A random salt gives each record a key of its own, so the nonce is zero."""
        salt = secrets.token_bytes(SALT_BYTES)
        cipher = AESGCM(blake3.blake3(salt, key=self._record_key).digest())
        return salt + cipher.encrypt(_RECORD_NONCE, body, _bound(header, name))

    def open_record(self, header: bytes, name: str, sealed: bytes | memoryview) -> bytes:
        """See Domain."""
        salt, rest = sealed[:SALT_BYTES], memoryview(sealed)[SALT_BYTES:]
        if len(rest) < TAG_BYTES:
            raise Damaged("a record is too short")
        try:
            cipher = AESGCM(blake3.blake3(salt, key=self._record_key).digest())
            return cipher.decrypt(_RECORD_NONCE, rest, _bound(header, name))
        except InvalidTag:
            raise Damaged("a record is not what was sealed") from None

    def object_id(self, kind: str, name: str) -> str:
        """See Domain."""
        return blake3.blake3(f"{kind}/{name}".encode(), key=self._name_key).hexdigest(16)

    def _cipher(self, chunk_id: bytes) -> AESGCM:
        return AESGCM(blake3.blake3(chunk_id, key=self._chunk_key).digest())


class PlainDomain(Domain):
    """A domain without a key: content is only hashed, whoever reads the store reads it."""

    key_id = bytes(KEY_ID_BYTES)
    is_plain = True

    def chunk_id(self, data: bytes | memoryview) -> bytes:
        """See Domain."""
        return blake3.blake3(data, derive_key_context=f"{_CONTEXT}plain chunk id").digest()

    def seal_chunk(self, chunk_id: bytes, encoded: bytes) -> bytes:
        """See Domain."""
        return encoded

    def open_chunk(self, chunk_id: bytes, sealed: bytes | memoryview) -> bytes:
        """See Domain."""
        return bytes(sealed)

    def seal_record(self, header: bytes, name: str, body: bytes) -> bytes:
        """See Domain."""
        return _checksum(header, name, body) + body

    def open_record(self, header: bytes, name: str, sealed: bytes | memoryview) -> bytes:
        """See Domain."""
        checksum, body = sealed[:SALT_BYTES], bytes(sealed[SALT_BYTES:])
        if checksum != _checksum(header, name, body):
            raise Damaged("a record is not what was written")
        return body

    def object_id(self, kind: str, name: str) -> str:
        """See Domain."""
        context = f"{_CONTEXT}plain object name"
        return blake3.blake3(f"{kind}/{name}".encode(), derive_key_context=context).hexdigest(16)


def _derive(key: bytes, purpose: str) -> bytes:
    return blake3.blake3(key, derive_key_context=f"{_CONTEXT}{purpose}").digest()


def _bound(header: bytes, name: str) -> bytes:
    return header + name.encode()


def _checksum(header: bytes, name: str, body: bytes) -> bytes:
    bound = len(name.encode()).to_bytes(4, "little") + _bound(header, name)
    context = f"{_CONTEXT}plain record"
    return blake3.blake3(bound + body, derive_key_context=context).digest()
