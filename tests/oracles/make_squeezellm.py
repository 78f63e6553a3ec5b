"""SqueezeLLM's tables by its authors' code, of all weights of a matrix and of those that it does not keep apart."""

from __future__ import annotations

import numpy
import torch
from golden import clone, write
from torch import Tensor

REPOSITORY, COMMIT = "SqueezeAILab/SqueezeLLM", "a5fd71f353bf569feb7b55737c1c1493e78e8f31"
clone(REPOSITORY, COMMIT, "quantization", "squeezellm")
numpy.cast = {"byte": numpy.int8}  # gone from numpy 2

from quantization.nuq import kmeans_fit  # noqa: E402
from squeezellm.outliers import remove_outliers  # noqa: E402

ROWS, WIDTH = 8, 256
SENSITIVE, LARGE = 9, 20  # weights kept apart; their code keeps one less than the share asked for has


def fit(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Tables [rows, 2^bits], with the sample weights of their script."""
    rows = []
    for row, sample in zip(weight.numpy(), importance.numpy(), strict=True):
        rows.append(kmeans_fit((row[:, None], sample * (row != 0), 2**bits))[0])
    return torch.from_numpy(numpy.stack(rows)).float()


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, generator=generator) * 0.02
    importance = torch.randn(ROWS, WIDTH, generator=generator).square()
    weight.view(-1)[importance.flatten().topk(3).indices] = 0.09  # would be kept apart for their size too
    tensors = {"weight": weight, "importance": importance}

    share = 100 * (SENSITIVE + 1.5) / weight.numel()
    least = importance.flatten().topk(SENSITIVE).values[-1]
    threshold = weight.masked_fill(importance >= least, 0).abs().flatten().topk(LARGE).values[-1]
    matrices = {"q": weight.clone()}
    apart = remove_outliers(matrices, share, {"q": threshold.item()}, {"q": importance})[0][0]
    rest = matrices["q"]
    tensors["apart"] = apart != 0
    for bits in (2, 3, 4):
        tensors |= {f"b{bits}.lut": fit(weight, importance, bits), f"b{bits}.rest.lut": fit(rest, importance, bits)}
    facts = {"source": f"{REPOSITORY}@{COMMIT}", "sensitive": SENSITIVE, "large": LARGE}
    write("squeezellm", __file__, ["scikit-learn"], tensors, seed=0, **facts)
