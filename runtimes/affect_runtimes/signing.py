"""Signed bundles: Ed25519 over the bytes of manifest.json, which pins every file that is read by its sha256.

`manifest.sig` lies beside the manifest, because a signature cannot be inside of what it signs::

    {"schema": 1, "signatures": [{"algorithm": "ed25519", "key": "...", "signature": "..."}]}

`key` is the first 32 hex digits of the sha256 of the public key's 32 bytes, and only says which key to try; `signature`
is base64. What is signed is `DOMAIN` and then the manifest, so that a signature made for another purpose with the same
key never fits. There may be several signers; one whom the caller trusts is enough, and a key is revoked by trusting it
no longer.

Why not the signatures of OpenSSF's model-signing: it brings 34 more packages, among them clients for the transparency
logs of Sigstore, and a device verifies without a network. Installed with what they need, CPython 3.11 on x86-64 Linux
(benchmarks/install_sizes.py): model-signing 1.1.1 is 48.1 MB, cryptography 50.0.2, which is among it, 16.0 MB.

Source: RFC 8032, Edwards-Curve Digital Signature Algorithm.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect_runtimes._checked import Fields, parse_object, shown
from affect_runtimes.errors import AffectError, InputError, MissingDependencyError, SignatureError
from affect_runtimes.files import read_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["DOMAIN", "SIGNATURES", "PublicKey", "Trust", "key_id", "read_signatures", "sign", "trusted_keys", "verify"]

PublicKey = bytes | str | Path
"""32 raw bytes, PEM text, or the path of a file with either."""
Trust = PublicKey | Sequence[PublicKey]

SIGNATURES = "manifest.sig"
DOMAIN = b"affect-edge bundle manifest, version 1\0"
_SCHEMA = 1
_MOST_BYTES = 64 * 1024
_MOST_SIGNATURES = 16
_KEY_BYTES, _SIGNATURE_BYTES = 32, 64


def verify(manifest: bytes, signatures: bytes | None, trust: Trust, name: str = SIGNATURES) -> str:
    """Checks that a key which the caller trusts has signed these very bytes.

    Args:
        manifest: the bytes of manifest.json; parse these, and not the file again.
        signatures: the bytes of manifest.sig, or None where there is none.
        trust: one key, or several of which one is enough.
        name: of the file, for messages.

    Returns:
        The id of the key.

    Raises:
        SignatureError: not signed, not by a trusted key, or changed since; or no list of signatures.
        InputError: a trusted key that is none.
        MissingDependencyError: cryptography is not installed.
    """
    keys = trusted_keys(trust)
    known = f"trusted: {', '.join(keys)}"
    if signatures is None:
        raise SignatureError(f"{name}: missing, so the bundle is not signed; sign it with affect-sign ({known})")
    from cryptography.exceptions import InvalidSignature

    given = read_signatures(signatures, name)
    for key, signature in given:
        try:
            if key in keys:
                keys[key].verify(signature, DOMAIN + manifest)
                return key
        except InvalidSignature:
            continue
    tried = [key for key, _ in given if key in keys]
    if tried:
        raise SignatureError(
            f"{name}: the signature of {', '.join(tried)} does not fit the manifest: one of the two was changed after "
            "signing; copy the bundle again"
        )
    raise SignatureError(
        f"{name}: signed by {', '.join(key for key, _ in given) or 'nobody'}, and none of them is trusted; {known}"
    )


def trusted_keys(trust: Trust) -> "dict[str, Ed25519PublicKey]":
    """Keys by their id.

    Raises:
        InputError: no key at all, or something that is no Ed25519 public key; the message names it.
        MissingDependencyError: cryptography is not installed.
    """
    _need()
    several: Iterable[PublicKey] = [trust] if isinstance(trust, bytes | str | Path) else trust
    try:
        keys = [_public(each) for each in several]
    except TypeError:
        raise InputError(f"trust is a public key or a list of them; found {shown(trust)}") from None
    if not keys:
        # An empty list is a configuration that went wrong; taking it for "trust anybody" would open the door.
        raise InputError("trust is an empty list of keys, so no bundle could be opened; leave it out to trust any")
    return {key_id(key): key for key in keys}


def key_id(key: "Ed25519PublicKey") -> str:
    """What a key is called in manifest.sig and in messages."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:32]


def sign(manifest: bytes, key: "Ed25519PrivateKey", signatures: bytes | None = None) -> bytes:
    """The bytes of manifest.sig with a signature of this key.

    Args:
        manifest: the bytes of manifest.json.
        key: signs.
        signatures: of others, to be kept; what this key had signed before is replaced.

    Raises:
        SignatureError: `signatures` is no list of them.
        InputError: more signatures than a device reads.
    """
    own = key_id(key.public_key())
    kept = [] if signatures is None else [entry for entry in read_signatures(signatures) if entry[0] != own]
    given = [*kept, (own, key.sign(DOMAIN + manifest))]
    if len(given) > _MOST_SIGNATURES:
        raise InputError(f"a bundle has at most {_MOST_SIGNATURES} signatures; these would be {len(given)}")
    entries = [
        {"algorithm": "ed25519", "key": name, "signature": base64.b64encode(data).decode()} for name, data in given
    ]
    return (json.dumps({"schema": _SCHEMA, "signatures": entries}, indent=1) + "\n").encode()


def read_signatures(data: bytes, name: str = SIGNATURES) -> list[tuple[str, bytes]]:
    """Id of the key and signature, of each signer.

    Raises:
        SignatureError: anything else than affect-sign writes.
    """
    if len(data) > _MOST_BYTES:
        raise SignatureError(f"{name}: {len(data)} bytes; at most {_MOST_BYTES} are read")
    try:
        fields = Fields(parse_object(data, name))
        fields.whole("schema", _SCHEMA, _SCHEMA)
        listed = fields.objects("signatures", least=1)
        if len(listed) > _MOST_SIGNATURES:
            raise SignatureError(f"{len(listed)} signatures; at most {_MOST_SIGNATURES} are read")
        given = []
        for entry in listed:
            entry.choice("algorithm", ("ed25519",))
            signature = _decoded(entry.text("signature"))
            if len(signature) != _SIGNATURE_BYTES:
                entry.refuse("signature", f"{_SIGNATURE_BYTES} bytes in base64")
            given.append((entry.text("key"), signature))
        return given
    except AffectError as error:
        words = str(error)
        raise SignatureError(words if words.startswith(name) else f"{name}: {words}") from None


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _public(given: Any) -> "Ed25519PublicKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if isinstance(given, str) and given.lstrip().startswith("-----BEGIN"):
        data, name = given.encode(), "the trusted key"
    elif isinstance(given, str | Path):
        name = str(given)
        try:
            data = read_file(Path(given), _MOST_BYTES)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise InputError(f"{shown(name)}: the trusted key cannot be read ({error})") from None
    elif isinstance(given, bytes):
        data, name = given, "the trusted key"
    else:
        raise TypeError
    if len(data) == _KEY_BYTES:
        return Ed25519PublicKey.from_public_bytes(data)
    if b"PRIVATE KEY" in data:
        raise InputError(f"{name}: is a private key, which belongs on no device; trust the .pub file beside it")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(
            f"{name}: is no public key: expected PEM as affect-keygen writes it, or {_KEY_BYTES} raw bytes; found "
            f"{len(data)} bytes"
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{name}: is a key of another algorithm ({type(key).__name__}); bundles are signed by Ed25519")
    return key


def _need() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"verifying who signed a bundle needs cryptography: pip install 'affect-edge[trust]' ({error})"
        ) from None
