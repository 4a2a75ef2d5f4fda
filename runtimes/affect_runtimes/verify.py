"""Replaying verify.npz: is this engine, on this machine, still the float model?"""

import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes._checked import shown
from affect_runtimes.base import engine_version, machine
from affect_runtimes.compare import STATE, Figure, compare_outputs
from affect_runtimes.errors import BundleError, DeviceError, InputError, ParityError
from affect_runtimes.interface import check_names
from affect_runtimes.model import BundleModel

__all__ = ["recorded_inputs", "replay", "replay_elsewhere", "replay_here"]

Array = NDArray[Any]
_MOST_STEPS = 4096
_MOST_BYTES = 2**30
"""Of the recording's arrays, unpacked: an archive of a megabyte may say that it holds a thousand."""
_log = logging.getLogger(__name__)


def replay(model: BundleModel) -> list[Figure]:
    """Runs the recorded steps and measures against the recorded float outputs and states.

    Args:
        model: an opened bundle.

    Returns:
        Every figure, in the manifest's order of outputs, then states as "state.NAME".

    Raises:
        BundleError: verify.npz lacks what the manifest promises, or no bound applies to anything it holds.
        ParityError: a figure outside the bundle's bounds; the message names the output and by how much.
    """
    manifest, path = model.bundle.manifest, model.bundle.path / "verify.npz"
    dt, given, expected, kept = _recorded(model)
    state, steps, states = model.initial_state(1), [], []
    try:
        for t, interval in enumerate(dt):
            inputs = {name: values[t][None] for name, values in given.items()}
            if manifest.image is not None:
                inputs[manifest.image.name] = model.normalise(inputs[manifest.image.name])
            outputs, state = model.step(inputs, state, float(interval))
            steps.append(outputs)
            if t in kept:
                states.append({f"state.{name}": array for name, array in state.arrays.items()})
    except InputError as error:
        raise BundleError(f"{path}: what it recorded cannot be given to the model: {error}") from None
    found = {name: np.stack([s[name] for s in steps]) for name in steps[0]}
    found |= {name: np.stack([s[name] for s in states]) for name in states[0]}
    kinds = {o.name: o.kind for o in manifest.outputs} | {f"state.{s.name}": STATE for s in manifest.states}
    figures = compare_outputs(expected, found, kinds, model.bundle.bounds)
    if all(f.limit is None for f in figures):
        stated = ", ".join(f"{b.output} {b.metric}" for b in model.bundle.bounds)
        raise BundleError(f"{model.bundle.path}: no figure has a bound; it states {stated}, which no output here has")
    missed = [f for f in figures if f.passed is False]
    if missed:
        ran = " and ".join(sorted(set(model.engines.values())))
        raise ParityError(
            f"{model.bundle.path}: {ran} on this machine is not the exported model: "
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
    manifest, made_on = model.bundle.manifest, model.bundle.parity.get("machine")
    arch = made_on.get("arch") if isinstance(made_on, dict) else None
    try:
        known = all(engine_version(name) == manifest.made_with.get(name) for name in model.engines.values())
    except ImportError:
        known = False  # built from source, or under another name: what it does is not known
    if known and arch == machine() and manifest.verified_on_target:
        return False
    if model.engine_identity:
        from affect_runtimes.cache import EngineCache

        if EngineCache().verdict(_verdict_key(model)) is not None:
            return False
    replay_here(model)
    return True


def replay_here(model: BundleModel) -> list[Figure]:
    """As `replay`; of an engine that was made on this device, the verdict is kept beside it if the bounds are.

    Raises:
        BundleError, ParityError: see `replay`.
    """
    figures = replay(model)
    if model.engine_identity:
        # Needs what not every system has, and only these engines do.
        from affect_runtimes.cache import EngineCache

        try:
            EngineCache().keep_verdict(_verdict_key(model), {"figures": [f.to_json() for f in figures]})
        except DeviceError as error:
            # Not worth an error: the next start replays again.
            _log.warning("the verdict is not kept: %s", error)
    return figures


def _verdict_key(model: BundleModel) -> dict[str, str]:
    return {**model.engine_identity, "manifest": str(model.bundle.manifest.raw["manifest_sha256"])}


def recorded_inputs(model: BundleModel) -> tuple[Array, dict[str, Array]]:
    """What verify.npz has the model see: dt (steps,) and inputs by name, (steps, ...); pictures as uint8 crops.

    Raises:
        BundleError: verify.npz lacks what the manifest promises.
    """
    dt, given, _, _ = _recorded(model)
    return dt, given


def _recorded(model: BundleModel) -> tuple[Array, dict[str, Array], dict[str, Array], list[int]]:
    """dt (steps,), the inputs (steps, ...), the expected outputs and states, and the steps that the states are after.

    `at.NAME` says which row of an input each step sees, and `state_steps` after which steps states were kept; without
    them it is one row a step.
    """
    manifest, path = model.bundle.manifest, model.bundle.path / "verify.npz"
    arrays = _load(model)
    given = {k.removeprefix("input."): v for k, v in arrays.items() if k.startswith("input.")}
    try:
        check_names(model.bundle.model_name, manifest.inputs, given)
    except InputError as error:
        raise BundleError(f"{path}: its inputs are not the model's: {error}; export the bundle again") from None
    outputs = {f"output.{o.name}": o.tensor.sized(1) for o in manifest.outputs}
    states = {f"state.{s.name}": s.sized(1) for s in manifest.states}
    if lacking := [name for name in ("dt", *outputs, *states) if name not in arrays]:
        raise BundleError(f"{path}: lacks {', '.join(lacking)}; export the bundle again")
    dt = arrays["dt"]
    if dt.ndim != 1 or len(dt) < 1:
        raise BundleError(f"{path}: dt has shape {dt.shape}, expected (steps,) with at least one step")
    steps = len(dt)
    if steps > _MOST_STEPS:
        raise BundleError(f"{path}: records {steps} steps; at most {_MOST_STEPS} are replayed")
    for name, rows in given.items():
        at = _rows(arrays, f"at.{name}", steps, len(rows) if rows.ndim else 0, path)
        if at is None:
            continue
        if (unfolded := steps * (rows.nbytes // max(1, len(rows)))) > _MOST_BYTES:
            raise BundleError(f"{path}: {name!r} unfolds to {unfolded} bytes; at most {_MOST_BYTES} are replayed")
        given[name] = rows[at]
    at = _rows(arrays, "state_steps", None, steps, path)
    kept = list(range(steps)) if at is None else [int(t) for t in at]
    if not kept or sorted(set(kept)) != kept:
        raise BundleError(f"{path}: its state_steps are {shown(kept)}, expected rising steps")
    counts = dict.fromkeys(states, len(kept))
    for name, array in (*given.items(), *((n, arrays[n]) for n in ("dt", *outputs, *states))):
        count = counts.get(name, steps)
        if array.dtype.kind not in "biuf" or array.shape[:1] != (count,):
            raise BundleError(
                f"{path}: {name!r} is {array.dtype} {array.shape}, expected numbers for each of {count} steps"
            )
    if (image := manifest.image) is not None:
        found, wanted = given[image.name].shape, (steps, image.size, image.size, 3)
        if found != wanted:
            raise BundleError(f"{path}: {image.name!r} has shape {found}, expected {wanted}")
    for name, shape in (outputs | states).items():
        if arrays[name].shape[1:] != shape:
            raise BundleError(
                f"{path}: {name!r} has shape {arrays[name].shape}, expected {(len(arrays[name]), *shape)}"
            )
    return dt, given, {name.removeprefix("output."): arrays[name] for name in (*outputs, *states)}, kept


def _rows(arrays: dict[str, Array], name: str, count: int | None, below: int, path: Path) -> Array | None:
    """Row numbers in [0, below), `count` of them, or None where there are none."""
    rows = arrays.get(name)
    if rows is None:
        return None
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or (count is not None and len(rows) != count):
        wanted = "whole numbers" if count is None else f"one whole number for each of {count} steps"
        raise BundleError(f"{path}: {name!r} is {rows.dtype} {rows.shape}, expected {wanted}")
    if len(rows) and not (0 <= rows.min() and rows.max() < below):
        raise BundleError(f"{path}: {name!r} has {rows.min()} to {rows.max()}, expected 0 to {below - 1}")
    return rows


def _load(model: BundleModel) -> dict[str, Array]:
    data = model.bundle.read("verify.npz")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # No member gives more than it states.
            stated = sum(member.file_size for member in archive.infolist())
        if stated > _MOST_BYTES:
            raise ValueError(f"it unpacks to {stated} bytes; at most {_MOST_BYTES} are read")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds at bytes that are no archive of arrays
        raise BundleError(f"{model.bundle.path / 'verify.npz'}: cannot be read ({error})") from None
