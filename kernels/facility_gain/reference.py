"""What candidates would add to the facility location of a set of points."""

import torch
from torch import Tensor


def facility_gain(candidates: Tensor, points: Tensor, covered: Tensor, low: float) -> Tensor:
    """mean over i of max(0, s_ji - covered_i) [B], with similarities s_ji = (<candidate_j, point_i> - low) / (1 - low).

    candidates [B, d] and points [N, d], rows of length 1; covered [N] is the best similarity of each point to what was
    chosen before, 0 if nothing was; low < 1 the inner product that counts as none. Computed in float32, in float64 for
    float64 rows.
    """
    wide = torch.promote_types(points.dtype, torch.float32)
    similarity = (candidates.to(wide) @ points.to(wide).T - low) / (1 - low)
    return (similarity - covered.to(wide)).clamp(min=0).mean(1)
