"""Parameters and arithmetic of the five systems at full size, next to what is published.

    python benchmarks/systems_table.py

Nothing is computed: the models are built on torch's meta device, so this runs in seconds on any machine. One MAC is
one multiplication with its addition; convolutions, linear layers and attention are counted (torch's FlopCounterMode),
element-wise work and the scans' recurrences are not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from affect_export.models import MODELS, find_model
from affect_export.models.base import AffectModel
from affect_export.models.reno import RENOConfig
from affect_runtimes.interface import Tensor


@dataclass(frozen=True)
class Row:
    """One line of the table: what is counted, ours, the published figure and why they differ."""

    what: str
    ours: float
    published: float | None
    unit: str
    note: str = ""

    def __str__(self) -> str:
        if self.published is None:
            return f"| {self.what} | {self.ours:.2f} {self.unit} | | | {self.note} |"
        ratio = f"{self.ours / self.published:.3f}"
        return f"| {self.what} | {self.ours:.2f} {self.unit} | {self.published:g} {self.unit} | {ratio} | {self.note} |"


def on_meta(name: str, **changes: Any) -> AffectModel:
    """A model at full size without memory."""
    kind = find_model(name)
    config = kind.CONFIG.from_json(changes)
    with torch.device("meta"):
        return kind(config).eval()


def millions(module: nn.Module | None) -> float:
    """Parameters in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6 if module is not None else 0.0


def gmac(call: Callable[[], object]) -> float:
    """Multiply-accumulates of a call in units of 1e9."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 2e9


def zeros(tensors: tuple[Tensor, ...], batch: int = 1) -> dict[str, torch.Tensor]:
    """Inputs without content."""
    return {t.name: torch.zeros(t.sized(batch), device="meta") for t in tensors}


def halves(model: AffectModel) -> tuple[float, float]:
    """GMAC of one moment's encoding and of one recurrent step."""
    seen, features = zeros(model.encoder_tensors()), zeros(model.features())
    state = zeros(model.states())
    encode = gmac(lambda: model.encode(seen))
    return encode, gmac(lambda: model.step_features(features, state))


def state_kib(model: AffectModel) -> float:
    """What one stream carries."""
    return sum(4 * torch.Size(s.sized(1)).numel() for s in model.all_states()) / 1024


def part(model: nn.Module, name: str) -> nn.Module:
    """A submodule by name."""
    return model.get_submodule(name)


def rows(models: Mapping[str, AffectModel]) -> list[Row]:
    """The comparisons for which somebody published a figure."""
    va, fer, ag, vssm = (models[n] for n in ("mamba-va", "mamba-fer", "ag-ssm", "ms-vssm"))
    found = [
        Row("Mamba-VA, TCN", millions(part(va, "tcn")), 66.2, "M parameters"),
        Row("Mamba-VA, receptive field of the TCN", float(va.get_submodule("tcn").receptive_field), 421, "frames"),
        Row(
            "Mamba-VA, ViT-L/16",
            millions(part(va, "encoder")),
            307,
            "M parameters",
            "ViT paper; ours without its classifier",
        ),
        Row(
            "Mamba-FER, one clip of 16 frames at 128 px",
            16 * halves(fer)[0] + halves(fer)[1],
            15.2,
            "GMAC",
            "the paper says GFLOPs; at this size only a count of multiply-accumulates fits it",
        ),
        Row(
            "AG-SSM, DINOv2 ViT-L/14",
            millions(part(ag, "face.backbone")),
            300,
            "M parameters",
            "DINOv2 repository, rounded; ours with LoRA",
        ),
        Row(
            "AG-SSM, WavLM-Large",
            millions(part(ag, "voice.backbone")),
            316.62,
            "M parameters",
            "WavLM paper; ours without pre-training's parts",
        ),
    ]
    for size, width, published in (("tiny", 192, 4.8), ("small", 384, 17.9), ("base", 768, 69.3)):
        theirs = on_meta("reno", **RENOConfig.published(size).to_json())
        note = "the published encoder; the published count has its pre-training head, not its positions"
        found.append(Row(f"RENO, {size}, one-way", millions(part(theirs, "mamba")), published, "M parameters", note))
        ours = on_meta("reno", mamba_width=width)
        note = "the default, 24 blocks that scan both ways"
        found.append(Row(f"RENO, {size}, two-way", millions(part(ours, "mamba")), published, "M parameters", note))
    encode, _ = halves(vssm)
    found.append(
        Row(
            "MS-VSSM (VMamba-Tiny)",
            millions(vssm),
            31,
            "M parameters",
            "DSPP and squeeze-and-excite added, some norms and 996 classes less",
        )
    )
    found.append(Row("MS-VSSM (VMamba-Tiny)", encode, 4.9, "GMAC", "as above; VMamba's figure has the scans in it"))
    return found


def main() -> None:
    """Prints both tables."""
    models = {name: on_meta(name) for name in MODELS}
    print("| model | parameters, M | encode, GMAC | step, MMAC | state a stream, KiB |")
    print("|---|---:|---:|---:|---:|")
    for name, model in models.items():
        encode, step = halves(model)
        print(f"| {name} | {millions(model):.1f} | {encode:.2f} | {step * 1e3:.2f} | {state_kib(model):.1f} |")
    print()
    print("| | ours | published | ratio | why |")
    print("|---|---:|---:|---:|---|")
    for row in rows(models):
        print(row)


if __name__ == "__main__":
    main()
