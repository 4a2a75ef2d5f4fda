"""What installing a package brings: how many packages, and how many megabytes. Wants an index to install from.

    python benchmarks/install_sizes.py cryptography==50.0.2 model-signing==1.1.1

Each goes, with all that it needs, into an empty folder of its own, without compiled byte code.
"""

import subprocess
import sys
import tempfile
from pathlib import Path


def main(names: list[str]) -> int:
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
            subprocess.run([*pip, "--target", folder, name], check=True)
            size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
            packages = len(list(Path(folder).glob("*.dist-info")))
        print(f"{name}: {packages} packages, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
