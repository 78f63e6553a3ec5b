"""SqueezeLLM: weighted k-means per row, weights of large gradient or size kept apart (Kim et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effbench.core.kinds import Weights
from effbench.core.views import Layer
from effbench.formats.codebook import LutLinear, nearest
from effbench.methods.quant._kmeans import kmeans


def keep_apart(weight: Tensor, importance: Tensor, sensitive: float, outliers: float) -> Tensor:
    """Bool [out, in]: the fraction `sensitive` of largest importance, and of the rest `outliers` of largest |w|.

    The authors' rule for outliers, a symmetric threshold from the quartiles and their distance times a factor, is
    tuned to a fraction; here the threshold of each matrix is the one that gives that fraction.
    """
    apart = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    apart[importance.flatten().topk(int(sensitive * len(apart))).indices] = True
    magnitude = weight.abs().flatten().masked_fill(apart, 0)
    apart[magnitude.topk(int(outliers * len(apart))).indices] = True
    return apart.view(weight.shape)


@dataclass(frozen=True)
class SqueezeLLM(Weights):
    """The weights of the k-means are squared gradients of the loss (the diagonal of the Fisher information).

    Clusters are the best there are, or nearly; those that the authors' scikit-learn finds have up to 15 % more error.
    """

    paper = "arXiv:2306.07629"
    published = "squeezellm()"
    caveats = (
        "tables take 16 * 2^bits / width bits a weight: at 4 bits 2.0 for 128 inputs, 0.06 for 4,096",
        "one share of outliers for every matrix; the authors take one threshold rule for the model",
    )
    type = "PTQ"
    weight_update = "none"
    needs = {"grad2"}
    trials = ({"bits": 3}, {"bits": 2})

    bits: int = 4  # 2, 3 or 4
    sensitive: float = 0.0005  # fraction of weights kept in float16 for their gradients
    outliers: float = 0.004  # fraction kept in float16 for their size

    def check(self) -> None:
        self.require(self.bits in (2, 3, 4), "bits must be one of (2, 3, 4)")
        self.require(self.sensitive >= 0 and self.outliers >= 0, "sensitive and outliers must not be negative")
        self.require(self.sensitive + self.outliers < 1, "sensitive and outliers must leave weights to cluster")

    def compress(self, layer: Layer) -> nn.Module:
        # Step 1, dense-and-sparse decomposition: a few weights are kept apart.
        weight, importance, kept = layer.weight, layer.inputs.grad2, layer.kept
        if kept is not None:
            importance = importance * kept
        apart = keep_apart(weight, importance, self.sensitive, self.outliers)
        # Step 2, sensitivity-based non-uniform quantization: the table of a row minimises the weighted squared error.
        dense = weight.masked_fill(apart, 0)
        lut = kmeans(dense, importance.masked_fill(apart, 0), 2**self.bits, zero=kept is not None).half()
        codes = nearest(dense, lut.float())
        # Step 3, the sparse part: the errors of the table at the positions kept apart, so that table and sparse part
        # add up to the weight.
        left = (weight - lut.float().gather(1, codes)) * apart
        return LutLinear.of(codes, lut, bits=self.bits, outliers=left, bias=layer.bias, keep=layer.kept)
