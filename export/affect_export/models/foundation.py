"""The foundation models that the published systems stand on, built by transformers from sizes alone: no download.

transformers knows them best; parameter names are its own. Weights come with the checkpoint that is loaded afterwards.
Checkpoints saved under transformers 4 have other parameter names; `modernise` renames them.
"""

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from affect_runtimes.errors import MissingDependencyError

__all__ = ["dinov2", "modernise", "vit", "wavlm"]


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError(
            f"this model's backbone is built by transformers: pip install 'affect-edge[systems]' ({error})"
        ) from None


def vit(*, image_px: int, patch: int, width: int, layers: int, heads: int, mlp: int) -> nn.Module:
    """A plain vision transformer, as MAE trains it; `last_hidden_state[:, 0]` is the CLS token.

    transformers' ViTMAEModel itself masks patches at random, which fine-tuned encoders do not; ViTModel is the same
    network without that and takes the same weights.
    """
    t = _transformers()
    config = t.ViTConfig(
        image_size=image_px,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
    )
    model: nn.Module = t.ViTModel(config, add_pooling_layer=False)
    return model.eval()


def dinov2(*, image_px: int, patch: int, width: int, layers: int, heads: int, mlp_ratio: int = 4) -> nn.Module:
    """DINOv2; `last_hidden_state` is the CLS token, then the patches row by row."""
    t = _transformers()
    config = t.Dinov2Config(
        image_size=image_px,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        mlp_ratio=mlp_ratio,
    )
    model: nn.Module = t.Dinov2Model(config)
    return model.eval()


def wavlm(
    *, width: int, layers: int, heads: int, mlp: int, conv: tuple[int, ...], large: bool, pos_kernel: int = 128
) -> nn.Module:
    """WavLM on 16 kHz samples; `last_hidden_state` has one token for every 320 samples.

    Args:
        width: of the tokens.
        layers: of the transformer.
        heads: of its attention.
        mlp: of its feed-forward part.
        conv: channels of the seven convolutions in front.
        large: the large model's way (layer norm in the convolutions and before the attention), else the base model's.
        pos_kernel: tokens seen by the convolution that stands for positions.
    """
    t = _transformers()
    config = t.WavLMConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        conv_dim=conv,
        feat_extract_norm="layer" if large else "group",
        conv_bias=False,
        do_stable_layer_norm=large,
        num_conv_pos_embeddings=pos_kernel,
        # Masking is a training device of its own: off, so that forward is a function of its input.
        apply_spec_augment=False,
    )
    model: nn.Module = t.WavLMModel(config)
    return model.eval()


_LAYER = r"encoder\.layer\.(\d+)\."

_ATTENTION = (
    (_LAYER + r"attention\.attention\.query\.", "attention.q_proj."),
    (_LAYER + r"attention\.attention\.key\.", "attention.k_proj."),
    (_LAYER + r"attention\.attention\.value\.", "attention.v_proj."),
    (_LAYER + r"attention\.output\.dense\.", "attention.o_proj."),
)
_DINOV2 = tuple((old, r"encoder.layer.\1." + new) for old, new in _ATTENTION)
_VIT = (
    *((old, r"layers.\1." + new) for old, new in _ATTENTION),
    (_LAYER + r"intermediate\.dense\.", r"layers.\1.mlp.fc1."),
    (_LAYER + r"output\.dense\.", r"layers.\1.mlp.fc2."),
    (_LAYER, r"layers.\1."),
)
# Only WavLM has this convolution, and neither of the others anything that these match.
_WAVLM = (
    (r"encoder\.pos_conv_embed\.conv\.weight_g$", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"encoder\.pos_conv_embed\.conv\.weight_v$", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
)


def modernise(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Renames a transformers-4 backbone under `prefix` to the names of transformers 5; others pass unchanged.

    Knows ViT (and ViTMAE's encoder), DINOv2 and WavLM. The first two share names but not the new ones: ViT lost the
    level `encoder.layer`, DINOv2 kept it. Their layer norms tell them apart.

    Args:
        weights: name -> tensor, of a whole model.
        prefix: what stands before the backbone's own names, such as "encoder."; "" where nothing does.

    Returns:
        The same tensors.
    """
    is_vit = any(re.match(re.escape(prefix) + _LAYER + r"layernorm_before\.", name) for name in weights)
    rules = (*(_VIT if is_vit else _DINOV2), *_WAVLM)
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith(prefix):
            name = prefix + _first_rule(rules, name.removeprefix(prefix))
        renamed[name] = tensor
    return renamed


def _first_rule(rules: Iterable[tuple[str, str]], name: str) -> str:
    for old, new in rules:
        changed, found = re.subn(f"^{old}", new, name)
        if found:
            return changed
    return name
