"""Low-rank adaptation (LoRA) of linear layers, and its merging away before export.

    y = W x + b + (alpha / r) B A x        A (r, in), B (out, r); B starts at zero, so that training starts from W

These few lines stand in for peft, whose install requires accelerate and psutil and whose import loads all of its other
methods, for one formula that is gone again when the model is exported. Parameter names are peft's own, so what its
`get_peft_model(...).state_dict()` holds loads once the prefix `base_model.model.` is cut off:

    q_proj.base_layer.weight, q_proj.base_layer.bias, q_proj.lora_A.default.weight, q_proj.lora_B.default.weight

An adapter file (peft's `save_pretrained`) holds A and B alone and leaves `default.` out of their names.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from affect_runtimes.errors import InputError

__all__ = ["LoRALinear", "add_lora", "merge_lora"]


class LoRALinear(nn.Module):
    """A linear layer and its low-rank correction.

    Args:
        base: the layer; it becomes a part of this one and its parameters stop training.
        rank: r, at least 1.
        alpha: the correction is multiplied by alpha / rank.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"the rank of a LoRA layer is at least 1, found {rank}")
        self.scaling = alpha / rank
        self.base_layer = base.requires_grad_(False)
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        # peft names adapters; "default" is the name of the only one.
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False, **like)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False, **like)})
        nn.init.kaiming_uniform_(self._a.weight, a=math.sqrt(5))
        nn.init.zeros_(self._b.weight)

    @property
    def _a(self) -> nn.Linear:
        layer = self.lora_A["default"]
        assert isinstance(layer, nn.Linear)  # made above; ModuleDict forgets the type
        return layer

    @property
    def _b(self) -> nn.Linear:
        layer = self.lora_B["default"]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y: Tensor = self.base_layer(x) + self.scaling * self._b(self._a(x))
        return y

    def randomise_(self, generator: torch.Generator) -> None:
        """A correction half as large as the layer itself; at the usual start, B = 0, it could be lost unnoticed."""
        rank, inputs = self._a.weight.shape
        with torch.no_grad():
            self._a.weight.normal_(0.0, inputs**-0.5, generator=generator)
            self._b.weight.normal_(0.0, 0.5 * rank**-0.5 / self.scaling, generator=generator)

    def merged(self) -> nn.Linear:
        """A new plain layer with the weight W + (alpha / r) B A."""
        base = self.base_layer
        plain = nn.Linear(
            base.in_features,
            base.out_features,
            bias=base.bias is not None,
            device=base.weight.device,
            dtype=base.weight.dtype,
        )
        with torch.no_grad():
            # In float64, so that the only rounding is that of the sum.
            correction = self.scaling * self._b.weight.double() @ self._a.weight.double()
            plain.weight.copy_(base.weight.double() + correction)
            if base.bias is not None:
                plain.bias.copy_(base.bias)
        return plain.train(self.training)


def add_lora(model: nn.Module, names: Collection[str] = ("q_proj", "v_proj"), *, rank: int, alpha: float) -> None:
    """Adapts every linear layer of these names, in place; all other parameters of `model` stop training.

    Args:
        model: holds the layers, at any depth.
        names: last parts of the layers' names; the default is query and value of transformers' attention.
        rank: r of each layer.
        alpha: see `LoRALinear`.

    Raises:
        InputError: a name that no linear layer has.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in names and isinstance(child, nn.Linear)
    ]
    if absent := set(names) - {name for _, name, _ in found}:
        linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise InputError(f"no linear layer to adapt is called {sorted(absent)}; there are {sorted(linear)}")
    model.requires_grad_(False)
    for parent, name, child in found:
        setattr(parent, name, LoRALinear(child, rank, alpha))


def merge_lora(module: nn.Module) -> None:
    """Puts a plain linear layer in the place of every `LoRALinear` within `module`.

    In place, and for good: an export works on a deep copy, whose graph then has no trace of LoRA.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())
