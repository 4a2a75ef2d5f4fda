"""Checkpoints of published training code, renamed to the parameters of the models here.

Mamba-VA (github.com/FreedomPuppy77/Charon) trains in two parts with a file each, so its state dict may be given alone
or merged with the encoder's:

    temporal.network.I.conv1, conv2, relu1, relu2, downsample, relu    the TCN, weight-normed
    temporal.network.I.net.J              the same modules a second time, in the order of their calls
    mamba.mamba.layers.I.0, .1            Mamba block and layer norm
    mamba.mamba.proj                      Linear after the blocks
    mamba.adaptor                         made but never called
    dual_reg                              the head
    cls_token, pos_embed, patch_embed, blocks, norm    the encoder, in the naming of github.com/facebookresearch/mae
    decoder_*, mask_token, head           of its training only

The file of the TCN class is not stored where the rest of that repository is; its names are those of the code that the
rest was made from (github.com/upczww/abaw5), which has every other module of it under the same name.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from affect_export.models.tcn import modern_weight_norm_names

__all__ = ["PIXEL_MEAN", "PIXEL_STD", "from_public", "is_public"]

PIXEL_MEAN = (0.471, 0.363, 0.333)
"""Per channel, on the [0, 1] scale: what the public code's encoder was fine-tuned with."""

PIXEL_STD = (0.220, 0.193, 0.180)
"""Likewise; `MambaVAConfig.mean` and `std` take the two."""

_UNUSED = re.compile(r"temporal\.network\.\d+\.net\.|mamba\.adaptor\.|decoder_|mask_token$|head\.")

_RENAMED: tuple[tuple[str, str], ...] = (
    (r"temporal\.network\.(\d+)\.relu([12]?)\.", r"tcn.levels.\1.act\2."),
    (r"temporal\.network\.(\d+)\.", r"tcn.levels.\1."),
    (r"mamba\.mamba\.layers\.(\d+)\.0\.", r"blocks.\1."),
    (r"mamba\.mamba\.layers\.(\d+)\.1\.", r"norms.\1."),
    (r"mamba\.mamba\.proj\.", "project."),
    (r"dual_reg\.", "head."),
    (r"cls_token$", "encoder.embeddings.cls_token"),
    (r"pos_embed$", "encoder.embeddings.position_embeddings"),
    (r"patch_embed\.proj\.", "encoder.embeddings.patch_embeddings.projection."),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.layers.\1.layernorm_before."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.layers.\1.layernorm_after."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.attention.o_proj."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"norm\.", "encoder.layernorm."),
)

_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")


def is_public(state_dict: Mapping[str, Any]) -> bool:
    """Whether these are the names of Mamba-VA's public training code, with or without the encoder's beside them."""
    names = {name.removeprefix("module.") for name in state_dict}
    return {"temporal.network.0.conv1.bias", "dual_reg.0.weight"} <= names


def from_public(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Mamba-VA's public training code under the names of `MambaVA`.

    Args:
        state_dict: of the public code; "module." in front, from training on several GPUs, is taken off.

    Returns:
        Name -> tensor for `MambaVA.load_state_dict`. Names that the public code does not have are kept as they are, so
        that the loading reports them.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.")
        if _UNUSED.match(name):
            continue
        if fused := _QKV.match(name):
            layer, kind = fused.groups()
            # timm stacks the three projections; rows of q first.
            for part, rows in zip("qkv", torch.chunk(tensor, 3), strict=True):
                renamed[f"encoder.layers.{layer}.attention.{part}_proj.{kind}"] = rows
            continue
        for pattern, replacement in _RENAMED:
            changed, found = re.subn(f"^{pattern}", replacement, name)
            if found:
                name = changed
                break
        renamed[name] = tensor
    return modern_weight_norm_names(renamed)
