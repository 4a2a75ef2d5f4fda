"""Whatever a bundle, a saved state or a checkpoint holds, only errors of ours come out of opening it."""

import base64
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from affect_export.models.checkpoint import Checkpoint, save_model
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import AffectError, BundleError, SignatureError, StateError
from affect_runtimes.files import read_file
from affect_runtimes.manifest import Manifest, to_text
from affect_runtimes.signing import read_signatures
from affect_runtimes.state import State

HOSTILE = Path(__file__).parent / "hostile.py"
# Of what is drawn, nothing depends on the folder that several examples share.
FUZZED = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**63), 10**400, 0, -1, 1e308, -0.0, 5e-324]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.sampled_from(
        ["", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "batch", "x" * 5000, "manifest.json", "C:\\x", "‮", "é"]
    ),
    st.sampled_from([[], {}, [[]], {"": {}}, deep(60), deep(400)]),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
    st.lists(st.one_of(st.integers(), st.text(max_size=3)), max_size=4),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index of a JSON value, as paths."""
    found = [path] if path else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(inner, (*path, key))
    return found


@pytest.fixture(scope="module")
def raw(exported: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((exported / "manifest.json").read_text())
    return found


@FUZZED
@given(data=st.data())
def test_a_manifest_with_strange_values_is_read_or_refused(data: st.DataObject, raw: dict[str, Any]) -> None:
    """Signed again after each change, so that it is the checks that refuse it, and not its digest."""
    changed = json.loads(json.dumps(raw))
    for path in data.draw(st.lists(st.sampled_from(places(raw)), min_size=1, max_size=3)):
        inside = changed
        try:
            for key in path[:-1]:
                inside = inside[key]
            what = data.draw(st.sampled_from(["replace", "delete", "double", "add"]))
            if what == "replace":
                inside[path[-1]] = data.draw(STRANGE)
            elif what == "delete":
                del inside[path[-1]]
            elif what == "double" and isinstance(inside, list):
                inside.append(inside[path[-1]])
            elif isinstance(inside, dict):
                inside[data.draw(st.text(max_size=4))] = data.draw(STRANGE)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
    try:
        Manifest.read(to_text(changed).encode())
    except BundleError:
        pass


@FUZZED
@given(data=st.binary(max_size=200), at=st.integers(0, 10_000), cut=st.integers(0, 40))
def test_a_manifest_of_other_bytes_is_refused(data: bytes, at: int, cut: int, exported: Path) -> None:
    whole = (exported / "manifest.json").read_bytes()
    changed = whole[: at % len(whole)] + data + whole[at % len(whole) + cut :]
    if changed != whole:
        with pytest.raises(BundleError):
            Manifest.read(changed)


@pytest.mark.parametrize(
    "data",
    [
        b'{"schema": 2, "schema": 2}',
        b'{"schema": NaN}',
        b'{"schema": 1e999}',
        b'{"schema": 2, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"schema": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe{\x00}\x00",
        b'"\\ud800"',
        b"",
    ],
)
def test_json_that_no_export_writes_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        Manifest.read(data)


def test_a_doubled_key_does_not_hide_behind_its_twin(exported: Path) -> None:
    whole = (exported / "manifest.json").read_bytes()
    twice = whole.replace(b'{\n "schema": 2,', b'{\n "schema": 1,\n "schema": 2,', 1)
    assert twice != whole and json.loads(twice) == json.loads(whole)
    with pytest.raises(BundleError):
        Manifest.read(twice)


@pytest.mark.parametrize("name", ["manifest.json", "verify.npz", "parity.json", "MODEL_CARD.md", "manifest.sig"])
def test_what_never_ends_is_not_read(name: str, bundle_folder: Path) -> None:
    path = bundle_folder / name
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)  # holes alone: it takes no room
    with pytest.raises(BundleError, match=rf"{name}.*at most"):
        Bundle.open(bundle_folder, trust=bytes(32) if name == "manifest.sig" else None)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match=name):
        Bundle.open(bundle_folder, trust=bytes(32) if name == "manifest.sig" else None)


def test_only_what_the_manifest_lists_is_ever_opened(bundle_folder: Path) -> None:
    """Every file that Python opens is written down; engines get bytes, and open nothing."""
    for name in ("spare.onnx", "encoder.onnx.data", "config.py", "conftest.py", "labels.txt", "manifest.json.bak"):
        (bundle_folder / name).write_bytes(b"nobody's")
    code = (
        "import json, sys\n"
        "seen = set()\n"
        "sys.addaudithook(lambda event, args: event == 'open' and seen.add(str(args[0])))\n"
        "from affect_runtimes.model import BundleModel\n"
        "from affect_runtimes.verify import replay\n"
        "replay(BundleModel(sys.argv[1], any_machine=True))\n"
        "print(json.dumps(sorted(p for p in seen if p.startswith(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, bundle_folder], capture_output=True, text=True, check=True, cwd=bundle_folder
    )
    listed = {"manifest.json", *Bundle.open(bundle_folder).manifest.files}
    assert {Path(path).name for path in json.loads(done.stdout)} == listed


def saved(header: Any, body: bytes = b"") -> bytes:
    """A saved state whose checksum fits, whatever it says of itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = b"AFFSTATE" + struct.pack("<II", 1, len(text)) + text + body
    return content + hashlib.sha256(content).digest()


@FUZZED
@given(
    arrays=st.lists(st.lists(st.one_of(STRANGE, st.sampled_from(["float32", [1, 2], [2**62, 4], [-1]])), max_size=5)),
    batch=STRANGE,
    body=st.binary(max_size=64),
)
@example(arrays=[["ssm", "float32", [2**62, 4], 0]], batch=None, body=b"")
@example(arrays=[["ssm", "float32", [2**70], 0]], batch=None, body=b"")
@example(arrays=[["ssm", "float32", [-1], 0]], batch=None, body=bytes(8))
@example(arrays=[["ssm", "float32", [1, 0, 2**62], 0]], batch=1, body=b"")
@example(arrays=[], batch=-3, body=b"")
def test_a_state_with_any_header_is_read_or_refused(arrays: Any, batch: Any, body: bytes) -> None:
    try:
        state = State.from_bytes(saved({"model": "m", "batch": batch, "arrays": arrays}, body))
    except StateError:
        return
    assert state.batch >= 1 or state.arrays
    assert State.from_bytes(state.to_bytes()).axes == state.axes


@pytest.mark.parametrize(
    "header",
    [b"[" * 200_000, b"[]", b"{}", b"null", b"\xff", b'{"model": 3, "arrays": []}', b'{"model": "m", "arrays": {}}'],
)
def test_a_state_with_no_header_is_refused(header: bytes) -> None:
    with pytest.raises(StateError, match="malformed"):
        State.from_bytes(saved(header))


@FUZZED
@given(data=st.binary(max_size=300))
def test_a_state_of_any_bytes_is_refused(data: bytes) -> None:
    with pytest.raises(StateError):
        State.from_bytes(data)
    with pytest.raises(StateError):
        State.from_bytes(b"AFFSTATE" + data)


@FUZZED
@given(data=st.one_of(st.binary(max_size=200), STRANGE.map(lambda v: json.dumps({"schema": 1, "signatures": v}))))
@example(data=json.dumps({"schema": 1, "signatures": [{"algorithm": "none", "key": "k", "signature": "AAAA"}]}))
@example(data=json.dumps({"schema": 1, "signatures": []}))
@example(data=json.dumps({"schema": 1, "signatures": [{}] * 17}))
@example(data=json.dumps({"schema": 1, "signatures": [{"algorithm": "ed25519", "key": "k", "signature": "é"}]}))
@example(data=b"[" * 60_000)
@example(data=b"x" * 70_000)
def test_signatures_of_any_bytes_are_refused(data: bytes | str) -> None:
    with pytest.raises(SignatureError):
        read_signatures(data if isinstance(data, bytes) else data.encode())


def test_a_signature_of_another_length_is_refused() -> None:
    entry = {"algorithm": "ed25519", "key": "k", "signature": base64.b64encode(bytes(63)).decode()}
    with pytest.raises(SignatureError, match="64 bytes"):
        read_signatures(json.dumps({"schema": 1, "signatures": [entry]}).encode())


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no plain file"):
        read_file(tmp_path / "pipe", 10)
    with pytest.raises(StateError, match="pipe"):
        State.load(tmp_path / "pipe")


# What other people's parsers see, in processes of their own.


def outcomes(kind: str, path: Path, cases: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, HOSTILE, kind, path, str(cases)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_ours(found: dict[str, Any]) -> None:
    known = {"opened", *(kind.__name__ for kind in subclasses(AffectError))}
    assert set(found) <= known, found


def subclasses(kind: type[AffectError]) -> list[type[AffectError]]:
    return [kind, *(deeper for each in kind.__subclasses__() for deeper in subclasses(each))]


@pytest.mark.slow
def test_damaged_graphs_are_refused_or_run(bundle_folder: Path) -> None:
    found = outcomes("onnx", bundle_folder, 60)
    assert_ours(found)
    assert found.keys() >= {"BundleError", "ParityError"}


@pytest.mark.slow
def test_damaged_native_programs_are_refused_or_run(tmp_path: Path) -> None:
    from affect_edge._recognizer import SHIPPED
    from affect_runtimes import native

    if not native.is_available():
        pytest.skip(str(native.unavailable_reason()))
    found = outcomes("native", Path(shutil.copytree(SHIPPED, tmp_path / "bundle")), 25)
    assert_ours(found)
    assert "BundleError" in found


@pytest.mark.slow
def test_damaged_checkpoints_are_refused_or_loaded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_model(checkpoint.model, path, version="1", trained=False)
    found = outcomes("safetensors", path, 30)
    assert_ours(found)
    assert "AffectError" in found


@pytest.mark.slow
def test_bombs_are_refused_where_something_can_refuse_them(bundle_folder: Path) -> None:
    found = outcomes("bomb", bundle_folder, 0)
    # Nobody can tell from outside whether a graph ends: SECURITY.md says so, and what to do.
    assert found.pop("a loop without an end").startswith("signal")
    assert found.pop("a chain of thousands") == "opened"
    assert set(found.values()) == {"BundleError"}, found


def test_recordings_hold_no_pickles(bundle_folder: Path) -> None:
    """The marker would be made by unpickling."""
    marker = bundle_folder.parent / "unpickled"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    import io

    from affect_runtimes.model import BundleModel
    from affect_runtimes.verify import replay

    buffer = io.BytesIO()
    np.savez(buffer, dt=np.array([Trap()], object))
    raw = json.loads((bundle_folder / "manifest.json").read_text())
    (bundle_folder / "verify.npz").write_bytes(buffer.getvalue())
    raw["files"]["verify.npz"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    (bundle_folder / "manifest.json").write_text(to_text(raw))
    with pytest.raises(BundleError, match="cannot be read"):
        replay(BundleModel(bundle_folder))
    assert not marker.exists()
