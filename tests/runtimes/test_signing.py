"""Whoever trusts a key gets exactly what that key signed, or nothing."""

import base64
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from affect_edge import AffectFaceDetector
from affect_edge.cli import verify_main
from affect_export.export import export_model
from affect_export.models.checkpoint import Checkpoint
from affect_export.signing import keygen_main, sign_main
from affect_export.targets import TARGETS
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import BundleError, InputError, IntegrityError, MissingDependencyError, SignatureError
from affect_runtimes.manifest import Manifest, to_text
from affect_runtimes.model import BundleModel
from affect_runtimes.signing import DOMAIN, key_id, sign, trusted_keys, verify

PEM, RAW = serialization.Encoding.PEM, serialization.Encoding.Raw
SPKI, RAW_KEY = serialization.PublicFormat.SubjectPublicKeyInfo, serialization.PublicFormat.Raw


@pytest.fixture(scope="module")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def other() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


@pytest.fixture
def signed(bundle_folder: Path, key: Ed25519PrivateKey) -> Path:
    """A bundle that `key` signed."""
    manifest = (bundle_folder / "manifest.json").read_bytes()
    (bundle_folder / "manifest.sig").write_bytes(sign(manifest, key))
    return bundle_folder


def test_rfc_8032_test_1_is_what_we_verify_with() -> None:
    """Source: RFC 8032, 7.1, TEST 1: the empty message. Ours is never empty: the domain comes first."""
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    wanted = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    key = Ed25519PrivateKey.from_private_bytes(secret)
    assert public(key) == wanted
    (entry,) = json.loads(sign(b"", key))["signatures"]
    assert base64.b64decode(entry["signature"]) == key.sign(DOMAIN) != key.sign(b"")


def test_a_signed_bundle_opens_and_says_who(signed: Path, key: Ed25519PrivateKey) -> None:
    bundle = Bundle.open(signed, trust=public(key))
    assert bundle.signed_by == key_id(key.public_key())
    assert BundleModel(signed, trust=public(key)).bundle.signed_by == bundle.signed_by
    # Who does not ask is not told.
    assert Bundle.open(signed).signed_by is None
    assert BundleModel(Bundle.open(signed), trust=public(key)).bundle.signed_by == bundle.signed_by


def test_a_key_is_given_in_any_form(signed: Path, tmp_path: Path, key: Ed25519PrivateKey) -> None:
    pem = key.public_key().public_bytes(PEM, SPKI)
    files = [tmp_path / "k.pub", tmp_path / "k.raw"]
    files[0].write_bytes(pem)
    files[1].write_bytes(public(key))
    forms: list[Any] = [public(key), pem, pem.decode(), *files, str(files[0])]
    for trust in [*forms, forms, (forms[0],)]:
        assert Bundle.open(signed, trust=trust).signed_by == key_id(key.public_key())


@pytest.mark.parametrize(
    ("trust", "words"),
    [
        ([], "empty list"),
        (b"", "no public key"),
        (b"x" * 31, "31 bytes"),
        (7, "found 7"),
        ([None], "a list of them"),
        ("/nowhere/key.pub", "cannot be read"),
        ("a\0b", "cannot be read"),
        (
            Ed25519PrivateKey.generate().private_bytes(
                PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            "private key",
        ),
        (ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(PEM, SPKI), "another algorithm"),
    ],
)
def test_what_is_no_key_is_refused(trust: Any, words: str, signed: Path) -> None:
    with pytest.raises(InputError, match=words):
        Bundle.open(signed, trust=trust)


def test_an_unsigned_bundle_is_refused_and_named(bundle_folder: Path, key: Ed25519PrivateKey) -> None:
    with pytest.raises(SignatureError, match=r"manifest\.sig: missing.*affect-sign"):
        Bundle.open(bundle_folder, trust=public(key))
    with pytest.raises(SignatureError, match="missing"):
        BundleModel(Bundle.open(bundle_folder), trust=public(key))


def test_another_signer_is_refused_and_named(signed: Path, key: Ed25519PrivateKey, other: Ed25519PrivateKey) -> None:
    with pytest.raises(SignatureError, match=rf"signed by {key_id(key.public_key())}.*none of them is trusted"):
        Bundle.open(signed, trust=public(other))


def change_manifest(folder: Path) -> None:
    """Everything fits but the signature."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    raw["model"]["version"] = "9"
    path.write_text(to_text(raw))


def change_signature(folder: Path) -> None:
    raw = json.loads((folder / "manifest.sig").read_text())
    data = bytearray(base64.b64decode(raw["signatures"][0]["signature"]))
    data[5] ^= 1
    raw["signatures"][0]["signature"] = base64.b64encode(bytes(data)).decode()
    (folder / "manifest.sig").write_text(json.dumps(raw))


@pytest.mark.parametrize("change", [change_manifest, change_signature])
def test_what_was_changed_since_is_refused_unread(
    change: Callable[[Path], None], signed: Path, key: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(signed)
    Bundle.open(signed)
    # Before a byte of it is parsed.
    monkeypatch.setattr(Manifest, "read", lambda *arguments: pytest.fail("it was parsed"))
    with pytest.raises(SignatureError, match="does not fit the manifest"):
        Bundle.open(signed, trust=public(key))


@pytest.mark.parametrize("name", ["encoder.onnx", "step.onnx", "verify.npz", "parity.json", "MODEL_CARD.md"])
def test_a_signature_covers_every_file_that_is_read(name: str, signed: Path, key: Ed25519PrivateKey) -> None:
    path = signed / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match=name):
        Bundle.open(signed, trust=public(key))


def test_the_bytes_that_were_verified_are_those_that_are_parsed(
    signed: Path, key: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever swaps the manifest right after the check changes nothing, for nobody looks again."""
    from affect_runtimes import bundle as module

    def swap(*arguments: Any) -> str:
        found = verify(*arguments)
        change_manifest(signed)
        return found

    monkeypatch.setattr(module, "verify", swap)
    assert Bundle.open(signed, trust=public(key)).manifest.model_version != "9"
    assert json.loads((signed / "manifest.json").read_text())["model"]["version"] == "9"


def test_a_signature_for_something_else_does_not_fit(signed: Path, key: Ed25519PrivateKey) -> None:
    """The same key, over the manifest alone: what another program might have it sign."""
    manifest = (signed / "manifest.json").read_bytes()
    raw = json.loads((signed / "manifest.sig").read_text())
    raw["signatures"][0]["signature"] = base64.b64encode(key.sign(manifest)).decode()
    (signed / "manifest.sig").write_text(json.dumps(raw))
    with pytest.raises(SignatureError, match="does not fit"):
        Bundle.open(signed, trust=public(key))


def test_keys_are_rotated_and_revoked(signed: Path, key: Ed25519PrivateKey, other: Ed25519PrivateKey) -> None:
    manifest = (signed / "manifest.json").read_bytes()
    old, new = public(key), public(other)
    # First devices trust both, then bundles carry both, then the old one goes.
    assert Bundle.open(signed, trust=[new, old]).signed_by == key_id(key.public_key())
    (signed / "manifest.sig").write_bytes(sign(manifest, other, (signed / "manifest.sig").read_bytes()))
    for trust in (old, new, [old, new]):
        Bundle.open(signed, trust=trust)
    (signed / "manifest.sig").write_bytes(sign(manifest, other))
    with pytest.raises(SignatureError):
        Bundle.open(signed, trust=old)
    # One that is broken does not spoil another that fits.
    change_signature(signed)
    broken = (signed / "manifest.sig").read_bytes()
    (signed / "manifest.sig").write_bytes(sign(manifest, key, broken))
    assert Bundle.open(signed, trust=[old, new]).signed_by == key_id(key.public_key())


def test_signing_again_replaces_ones_own(key: Ed25519PrivateKey, other: Ed25519PrivateKey) -> None:
    both = sign(b"b", key, sign(b"a", other, sign(b"a", key)))
    assert len(json.loads(both)["signatures"]) == 2
    assert verify(b"b", both, public(key)) == key_id(key.public_key())
    many = sign(b"", key)
    for _ in range(15):
        many = sign(b"", Ed25519PrivateKey.generate(), many)
    with pytest.raises(InputError, match="at most 16"):
        sign(b"", other, many)


def test_without_cryptography_the_pip_line_is_said(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'affect-edge\[trust\]'"):
        Bundle.open(signed, trust=bytes(32))
    Bundle.open(signed)


def test_detectors_trust_too(tmp_path: Path, key: Ed25519PrivateKey, other: Ed25519PrivateKey) -> None:
    import shutil

    from affect_edge._faces import SHIPPED_FACE, SHIPPED_LANDMARKS

    first, second = (Path(shutil.copytree(f, tmp_path / f.name)) for f in (SHIPPED_FACE, SHIPPED_LANDMARKS))
    with pytest.raises(SignatureError, match="face-cpu"):
        AffectFaceDetector(bundle=first, landmarks=second, trust=public(key))
    (first / "manifest.sig").write_bytes(sign((first / "manifest.json").read_bytes(), key))
    with pytest.raises(SignatureError, match="face-landmarks-cpu"):
        AffectFaceDetector(bundle=first, landmarks=second, trust=public(key))
    AffectFaceDetector(bundle=first, trust=public(key))
    (second / "manifest.sig").write_bytes(sign((second / "manifest.json").read_bytes(), other))
    AffectFaceDetector(bundle=first, landmarks=second, trust=[public(key), public(other)])
    AffectFaceDetector(bundle=Bundle.open(first), refine=False, trust=public(key))
    with pytest.raises(SignatureError):
        AffectFaceDetector(bundle=Bundle.open(first), refine=False, trust=public(other))
    with pytest.raises(InputError, match="bundles of yours"):
        AffectFaceDetector(trust=public(key))


# The commands.


def test_from_key_to_device(bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [tmp_path / "one", tmp_path / "two"]
    for path in keys:
        assert keygen_main(["--output", str(path)]) == 0
    assert [stat.S_IMODE(p.stat().st_mode) for p in (keys[0], tmp_path / "one.pub")] == [0o600, 0o644]
    trust = ["--trust", f"{keys[0]}.pub"]
    assert verify_main([str(bundle_folder), *trust]) == 1
    assert "missing" in capsys.readouterr().err
    assert sign_main([str(bundle_folder), "--key", str(keys[0])]) == 0
    assert verify_main([str(bundle_folder), *trust]) == 0
    ids = list(trusted_keys([f"{path}.pub" for path in keys]))
    assert f"signed by {ids[0]}, which is trusted" in capsys.readouterr().out
    # A second signer, and nobody's signature is lost by a slip.
    assert sign_main([str(bundle_folder), "--key", str(keys[1])]) == 2
    assert f"signatures of {ids[0]}; --add" in capsys.readouterr().err
    assert sign_main([str(bundle_folder), "--key", str(keys[1]), "--add"]) == 0
    for path in keys:
        assert verify_main([str(bundle_folder), "--trust", f"{path}.pub"]) == 0
    assert {p.name for p in bundle_folder.iterdir()} == {
        "manifest.sig",
        "manifest.json",
        *Bundle.open(bundle_folder).manifest.files,
    }


def test_a_key_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for there in ("key", "key.pub"):
        (tmp_path / there).write_text("somebody's")
        assert keygen_main(["--output", str(tmp_path / "key")]) == 2
        assert "never written over" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == [there] and (tmp_path / there).read_text() == "somebody's"
        (tmp_path / there).unlink()
    assert keygen_main(["--output", str(tmp_path / "none" / "key")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_the_mode_holds_from_the_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = {}
    real = os.fsync

    def fsync(file: int) -> None:
        modes[os.fstat(file).st_ino] = stat.S_IMODE(os.fstat(file).st_mode)
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    before = os.umask(0)
    try:
        assert keygen_main(["--output", str(tmp_path / "key")]) == 0
    finally:
        os.umask(before)
    assert modes[(tmp_path / "key").stat().st_ino] == 0o600


@pytest.mark.parametrize("way", ["env", "file"])
def test_a_passphrase_is_asked_for_again(
    way: str, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words").write_text("correct horse\n")
    monkeypatch.setenv("AFFECT_WORDS", "correct horse")
    monkeypatch.setenv("AFFECT_OTHERS", "wrong horse")
    given = ["--passphrase-env", "AFFECT_WORDS"] if way == "env" else ["--passphrase-file", str(tmp_path / "words")]
    path = tmp_path / "key"
    assert keygen_main(["--output", str(path), *given]) == 0
    assert b"ENCRYPTED" in path.read_bytes()
    for wrong, words in (
        ([], "is encrypted"),
        (["--passphrase-env", "AFFECT_OTHERS"], "another passphrase"),
        (["--passphrase-env", "AFFECT_NOWHERE"], "holds no passphrase"),
        (["--passphrase-file", str(tmp_path / "nowhere")], "cannot be read"),
    ):
        assert sign_main([str(bundle_folder), "--key", str(path), *wrong]) == 2
        assert words in capsys.readouterr().err
    assert not (bundle_folder / "manifest.sig").exists()
    assert sign_main([str(bundle_folder), "--key", str(path), *given]) == 0
    Bundle.open(bundle_folder, trust=f"{path}.pub")


def test_what_is_damaged_is_not_signed(bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keygen_main(["--output", str(tmp_path / "key")]) == 0
    for wrong in (f"{tmp_path / 'key'}.pub", str(tmp_path / "nowhere"), str(bundle_folder / "step.onnx")):
        assert sign_main([str(bundle_folder), "--key", wrong]) == 2
    (bundle_folder / "step.onnx").write_bytes(b"another")
    assert sign_main([str(bundle_folder), "--key", str(tmp_path / "key")]) == 1
    assert "step.onnx" in capsys.readouterr().err
    assert not (bundle_folder / "manifest.sig").exists()


def test_a_signed_bundle_is_replaced_by_an_export(checkpoint: Checkpoint, signed: Path, key: Ed25519PrivateKey) -> None:
    """And what a killed affect-sign left with it; the new bundle is not signed yet."""
    (signed / ".manifest.sig.part").write_bytes(b"half")
    export_model(checkpoint, TARGETS["onnx"], signed, force=True, parity_steps=2)
    with pytest.raises(SignatureError, match="missing"):
        Bundle.open(signed, trust=public(key))
    (signed / "notes.txt").write_text("somebody's")
    with pytest.raises(InputError, match="not a bundle"):
        export_model(checkpoint, TARGETS["onnx"], signed, force=True, parity_steps=2)


def test_signing_needs_no_torch(bundle_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from affect_export.signing import keygen_main, sign_main\n"
        "assert keygen_main(['--output', sys.argv[2]]) == 0 and sign_main([sys.argv[1], '--key', sys.argv[2]]) == 0\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, bundle_folder, tmp_path / "key"], check=True, capture_output=True)
    with pytest.raises(BundleError):
        Bundle.open(bundle_folder, trust=bytes(32))
