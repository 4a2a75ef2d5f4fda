"""Makes an environment for each peer, with that peer alone in it, and says what it takes on disk.

    python benchmarks/peers/prepare.py FOLDER [NAME ...]

`peers.py prepare` calls it with build/peers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARTS = Path(__file__).resolve().parent
REPOSITORY = PARTS.parent.parent
ENVIRONMENTS = ("ours", "fer", "facex", "face-api", "mediapipe", "hsemotion")


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Makes one environment; what it came to, or why it could not be made."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: installing", flush=True)
    try:
        figures = _prepare_node(folder) if name == "face-api" else _prepare_python(name, folder)
    except subprocess.CalledProcessError as error:
        figures = {"failed": _last_words(error.stderr) or str(error)}
    except OSError as error:
        figures = {"failed": str(error)}
    (folder / "prepared.json").write_text(json.dumps(figures, indent=1))
    print(f"{name}: {figures.get('failed') or format(figures['install_mb'], '.0f') + ' MB'}", flush=True)
    return figures


def _prepare_python(name: str, folder: Path) -> dict[str, Any]:
    venv = folder / "venv"
    _run([sys.executable, "-m", "venv", "--clear", str(venv)])
    packages = next(venv.glob("lib/python*/site-packages"))
    before = _megabytes(packages)  # pip, and what came with it
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    if name == "ours":
        # As `make wheel` builds it: isolated, with the project's own versions.
        constraints = str(REPOSITORY / "constraints.txt")
        wheels = folder / "wheel"
        for old in wheels.glob("*.whl"):
            old.unlink()
        _run(
            [*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(REPOSITORY)],
            PIP_CONSTRAINT=constraints,
            PIP_BUILD_CONSTRAINT=constraints,
        )
        _run([*pip, "install", "-c", constraints, *map(str, wheels.glob("*.whl"))])
    else:
        _run([*pip, "install", "-r", str(PARTS / f"{name}.txt")])
    figures: dict[str, Any] = {"install_mb": _megabytes(packages) - before}
    # Pulled in by a dependency's dependency and never touched on a processor.
    figures["cuda_mb"] = sum(_megabytes(p) for p in packages.iterdir() if p.name.startswith(("nvidia", "triton")))
    if name == "hsemotion":
        model = folder / "home" / ".hsemotion" / "enet_b0_8_best_vgaf.onnx"
        model.parent.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, str(PARTS / "random_b0.py"), str(model)])
        figures["install_mb"] += _megabytes(model)  # its own is as large, and no file of its package
    frozen = _run([*pip, "freeze"]).stdout.splitlines()
    figures["versions"] = {k: v for k, _, v in (line.partition("==") for line in frozen) if v}
    return figures


def _prepare_node(folder: Path) -> dict[str, Any]:
    (folder / "package.json").write_bytes((PARTS / "package.json").read_bytes())
    _run(["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder)
    modules = folder / "node_modules"
    models = modules / "@vladmandic" / "face-api" / "model"
    page = [
        modules / "@vladmandic" / "face-api" / "dist" / "face-api.js",
        *models.glob("tiny_face_detector*"),
        *models.glob("face_expression*"),
    ]
    return {
        "install_mb": _megabytes(modules),
        "page_mb": sum(_megabytes(p) for p in page),
        "versions": json.loads((folder / "package.json").read_text())["dependencies"],
    }


def _run(command: Sequence[str], cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=True)


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and not p.is_symlink()]
    return sum(p.stat().st_size for p in files) / 1e6


def _last_words(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1][:200]


def main() -> None:
    """See the module."""
    build, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or ENVIRONMENTS
    if unknown := set(names) - set(ENVIRONMENTS):
        raise SystemExit(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(ENVIRONMENTS)}")
    for name in names:
        prepare(name, build / name)


if __name__ == "__main__":
    main()
