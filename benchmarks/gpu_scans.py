"""What gpu.py measures of the scans of whole sequences and pictures."""

from collections.abc import Mapping
from typing import Any

import gpu_baselines as beside
import numpy as np
from gpu_baselines import Array
from gpu_report import Report, Scan, Settings

from affect_runtimes.compare import max_abs
from affect_runtimes.cuda import Device, DeviceArray
from affect_runtimes.fused.scan import PATHS, selective_scan, selective_scan_2d


def scan_arrays(scan: Scan, dtype: Any) -> dict[str, Array]:
    """Inputs as a model has them; of a picture with four paths."""
    rng = np.random.default_rng(0)
    picture = len(scan.size) == 2
    paths = (PATHS,) if picture else ()
    positions = (1, *scan.size)
    return {
        "x": rng.standard_normal((*positions, scan.channels)).astype(dtype),
        "delta": (10 ** rng.uniform(-3, -1, (*positions, *paths, scan.channels))).astype(dtype),
        "a": -np.exp(rng.standard_normal((*paths, scan.channels, scan.states))).astype(np.float32),
        "b": rng.standard_normal((*positions, *paths, scan.states)).astype(dtype),
        "c": rng.standard_normal((*positions, *paths, scan.states)).astype(dtype),
        "skip": rng.standard_normal((*paths, scan.channels)).astype(np.float32),
    }


def as_sequence(scan: Scan, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """A picture as one sequence of four times the channels, in groups: what a model of PyTorch's scans."""
    if len(scan.size) == 1:
        return dict(arrays)
    height, width = scan.size
    made = {"a": arrays["a"].reshape(-1, scan.states), "skip": arrays["skip"].reshape(-1)}
    for name in ("x", "delta", "b", "c"):
        array = arrays[name]
        if name == "x":
            array = np.repeat(array[:, :, :, None], PATHS, 3)
        rows = array.reshape(1, height * width, *array.shape[3:])
        columns = array.swapaxes(1, 2).reshape(rows.shape)
        by_path = [(rows, columns, rows[:, ::-1], columns[:, ::-1])[p][:, :, p] for p in range(PATHS)]
        made[name] = np.ascontiguousarray(np.stack(by_path, 2))
    made["x"], made["delta"] = (made[n].reshape(1, height * width, -1) for n in ("x", "delta"))
    return made


def scan_in_float64(arrays: Mapping[str, Array]) -> tuple[Array, Array]:
    """y (L, D) and the last state (D, N) of a sequence, by the recurrence."""
    x, delta, b, c = (arrays[n][0].astype(np.float64) for n in ("x", "delta", "b", "c"))
    a, skip = arrays["a"].astype(np.float64), arrays["skip"].astype(np.float64)
    if b.ndim == 3:
        b, c = (np.repeat(v, len(a) // v.shape[1], 1) for v in (b, c))
    else:
        b, c = b[:, None], c[:, None]
    state, y = np.zeros_like(a), np.empty_like(x)
    for t in range(len(x)):
        state = np.exp(delta[t][:, None] * a) * state + (delta[t] * x[t])[:, None] * b[t]
        y[t] = (state * c[t]).sum(-1) + skip * x[t]
    return y, state


def to_pictures(scan: Scan, y: Array) -> Array:
    """y of `as_sequence` -> by path and place, (4, H, W, D)."""
    height, width = scan.size
    by_path = y.reshape(height * width, PATHS, -1)
    turned = [by_path[:, 0], by_path[:, 1], by_path[::-1, 2], by_path[::-1, 3]]
    return np.stack(
        [
            t.reshape(width, height, -1).swapaxes(0, 1) if p % 2 else t.reshape(height, width, -1)
            for p, t in enumerate(turned)
        ]
    )


def scan_row(
    scan: Scan, dtype: Any, device: Device, torch_device: str | None, settings: Settings, report: Report
) -> dict[str, Any]:
    """One scan: how far it is from float64, its time, and what memory alone would need."""
    arrays = scan_arrays(scan, dtype)
    sequence = as_sequence(scan, arrays)
    picture = len(scan.size) == 2
    function: Any = selective_scan_2d if picture else selective_scan
    held = {n: DeviceArray(device, device.upload_bytes(a), a.shape, a.dtype) for n, a in arrays.items()}

    def work() -> Any:
        return function(device, held["x"], held["delta"], held["a"], held["b"], held["c"], held["skip"])

    y, state = (np.asarray(v)[0].astype(np.float64) for v in work())
    expected, last = scan_in_float64(sequence)
    if picture:
        expected, last = to_pictures(scan, expected), last.reshape(state.shape)
    beside.warm(device, work, settings.warm_s)
    us = beside.alone_us(device, work, 10, settings.least_us)
    moved = sum(a.nbytes for a in arrays.values()) + np.dtype(dtype).itemsize * expected.size + 4 * last.size
    row: dict[str, Any] = {
        "name": scan.name,
        "size": list(scan.size),
        "channels": scan.channels,
        "states": scan.states,
        "dtype": np.dtype(dtype).name,
        "kernel_us": float(np.median(us)),
        "bytes": moved,
        "y_max_abs_over_max": max_abs(expected, y) / float(np.abs(expected).max()),
        "state_max_abs_over_max": max_abs(last, state) / float(np.abs(last).max()),
    }
    if torch_device is not None and dtype == np.float32:
        found = report.do(f"PyTorch's scan, {scan.name}", _torch_scan_ms, sequence, torch_device)
        if found is not None:
            row["torch_us"], row["torch_code"] = found
    return row


def _torch_scan_ms(sequence: Mapping[str, Array], device: str) -> tuple[float, str]:
    call, code = beside.torch_scan(sequence, device)
    return 1e3 * float(np.median(beside.timed_ms(call, 20, 1.0))), code
