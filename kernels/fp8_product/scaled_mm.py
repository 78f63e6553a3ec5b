"""`fp8_product` by the vendor's matrix product, whose sums are float32."""

import torch
from torch import Tensor

from effbench.kernels.fp8_quantize.reference import E4M3, choose_type
from effbench.ops import Declined

KERNELS = r"e4m3|e5m2|f8f8|nvjet_q"  # in the names of the library's kernels, as traces have them


def fp8_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, gradients: bool = False) -> Tensor:
    """See `reference.fp8_product`; sizes are filled up with zeros to multiples of 16. Declined before Ada."""
    if a.is_cuda and torch.cuda.get_device_capability(a.device) < (8, 9):
        raise Declined("this device has no 8-bit floats")
    rows, columns = len(a), len(b)
    wide = -a.shape[1] % 16
    a = torch.nn.functional.pad(a, (0, wide, 0, -rows % 16))
    b = torch.nn.functional.pad(b, (0, wide, 0, -columns % 16))
    product = torch._scaled_mm(
        a.view(choose_type(gradients)),
        b.view(E4M3).T,
        scale_a=scale_a.reciprocal(),
        scale_b=scale_b.reciprocal(),
        out_dtype=torch.float32,
    )
    return product[:rows, :columns].contiguous()
