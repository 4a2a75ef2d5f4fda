"""Writes an EfficientNet-B0 for 224 x 224 pixels and 8 classes, of random weights, as ONNX; wants the project's torch.

python benchmarks/peers/random_b0.py FILE
"""

import sys
import warnings

import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification


class Logits(torch.nn.Module):
    """The network's logits alone."""

    def __init__(self) -> None:
        super().__init__()
        config = EfficientNetConfig(
            width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280, dropout_rate=0.2
        )
        config.num_labels = 8
        self.network = EfficientNetForImageClassification(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, 3, 224, 224) -> (1, 8)."""
        logits: torch.Tensor = self.network(pixel_values=x).logits
        return logits


torch.manual_seed(0)
model = Logits().eval()
print(f"EfficientNet-B0, {sum(p.numel() for p in model.parameters())} parameters, random")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.onnx.export(
        model,
        (torch.zeros(1, 3, 224, 224),),
        sys.argv[1],
        input_names=["input"],
        output_names=["output"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
