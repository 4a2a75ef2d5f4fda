"""Replaying verify.npz: is this engine, on this machine, still the float model?"""

import io
import platform
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.compare import Figure, compare_outputs
from affect_runtimes.errors import BundleError, ParityError
from affect_runtimes.model import BundleModel

__all__ = ["replay", "replay_elsewhere"]

Array = NDArray[Any]


def replay(model: BundleModel) -> list[Figure]:
    """Runs the recorded steps and measures against the recorded float outputs and states.

    Args:
        model: an opened bundle.

    Returns:
        Every figure, in the manifest's order of outputs, then states as "state.NAME".

    Raises:
        BundleError: verify.npz lacks what the manifest promises.
        ParityError: a figure outside the bundle's bounds; the message names the output and by how much.
    """
    manifest = model.bundle.manifest
    recorded = _load(model)
    try:
        dt = recorded["dt"]
        given = {k.removeprefix("input."): v for k, v in recorded.items() if k.startswith("input.")}
        expected = {o.name: recorded[f"output.{o.name}"] for o in manifest.outputs}
        expected |= {f"state.{s.name}": recorded[f"state.{s.name}"] for s in manifest.states}
    except KeyError as error:
        raise BundleError(f"{model.bundle.path}: verify.npz lacks {error}; export the bundle again") from None
    state, steps = model.initial_state(1), []
    for t, interval in enumerate(dt):
        inputs = {name: values[t][None] for name, values in given.items()}
        if manifest.image is not None:
            inputs[manifest.image.name] = model.normalise(inputs[manifest.image.name])
        outputs, state = model.step(inputs, state, float(interval))
        steps.append(outputs | {f"state.{name}": array for name, array in state.arrays.items()})
    found = {name: np.stack([s[name] for s in steps]) for name in expected}
    kinds = {o.name: o.kind for o in manifest.outputs} | {f"state.{s.name}": "regression" for s in manifest.states}
    figures = compare_outputs(expected, found, kinds, model.bundle.bounds)
    missed = [f for f in figures if f.passed is False]
    if missed:
        raise ParityError(
            f"{model.bundle.path}: {manifest.engine} on this machine is not the exported model: "
            + "; ".join(str(f) for f in missed)
        )
    return figures


def replay_elsewhere(model: BundleModel) -> bool:
    """Replays a bundle that was not verified on this kind of machine with this version of its engine.

    Loading calls it, so that no engine is used that nobody held to the bounds. It takes a fraction of a second.

    Returns:
        Whether a replay was needed.

    Raises:
        BundleError, ParityError: see `replay`.
    """
    # Slow to import, and wanted only here: not at the start of every `import affect_edge`.
    import importlib.metadata

    target, machine = model.bundle.manifest.raw["target"], model.bundle.parity.get("machine", {})
    try:
        version: str | None = importlib.metadata.version(target["engine"])
    except importlib.metadata.PackageNotFoundError:
        version = None  # built from source, or under another name: what it does is not known
    same = version == target["made_with"].get(target["engine"]) and machine.get("arch") == platform.machine()
    if same and target["verified_on_target"]:
        return False
    replay(model)
    return True


def _load(model: BundleModel) -> dict[str, Array]:
    try:
        with np.load(io.BytesIO(model.bundle.read("verify.npz")), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise BundleError(f"{model.bundle.path}: verify.npz cannot be read ({error})") from None
