"""NF4 codes, block factors and double quantization of bitsandbytes."""

from __future__ import annotations

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, quantize_4bit
from golden import write

if __name__ == "__main__":
    weight = torch.randn(80, 448, generator=torch.Generator().manual_seed(0)) * 0.02
    tensors = {"weight": weight, "dynamic_map": create_dynamic_map()}
    for double in (False, True):
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
        codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(weight.shape)
        if double:
            assert torch.equal(codes, tensors["codes"])
            tensors |= {
                "absmax_code": state.absmax,
                "absmax_scale": state.state2.absmax,
                "absmax_mean": state.offset,
                "dense_double": dequantize_4bit(packed, state),
            }
        else:
            tensors |= {"codes": codes, "levels": state.code, "absmax": state.absmax}
    write("nf4", __file__, ["bitsandbytes"], tensors, seed=0, block=64)
