"""The fuzzers in Python run, follow the code, and find nothing in a few seconds; `make fuzz-python` takes longer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SECONDS = 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("fuzz_bundle", 100), ("fuzz_safetensors", 20)])
def test_a_few_seconds_find_nothing(name: str, least: int, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="there is no atheris for this machine's Python")
    path = os.pathsep.join([str(HERE.parent / "support"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HERE / f"{name}.py", f"-max_total_time={SECONDS}", "-seed=1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in path.split(os.pathsep) if p)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(tmp_path.glob("crash-*"))
    # Otherwise it saw nothing of the code that it is for.
    assert max(int(n) for n in re.findall(r"cov: (\d+)", done.stderr)) >= least
