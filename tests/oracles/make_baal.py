"""What baal's heuristics make of the predictions of an ensemble: BALD, entropy and certainty."""

from __future__ import annotations

import torch
from baal.active.heuristics import BALD, Certainty, Entropy
from golden import write

EXAMPLES, CLASSES, MEMBERS = 12, 17, 10


def main() -> None:
    """Logits [N, V, T] of unlike sharpness, and the scores [N] of softmaxes over them."""
    generator = torch.Generator().manual_seed(0)
    sharpness = torch.linspace(0.2, 8, EXAMPLES, dtype=torch.float64)[:, None, None]
    shared = torch.randn(EXAMPLES, CLASSES, 1, dtype=torch.float64, generator=generator)
    own = torch.randn(EXAMPLES, CLASSES, MEMBERS, dtype=torch.float64, generator=generator)
    logits = ((shared + 0.5 * own) * sharpness).float()
    probabilities = logits.double().softmax(1)
    scores = {
        "bald": BALD().get_uncertainties(probabilities),
        "entropy": Entropy().get_uncertainties(probabilities[..., 0]),
        "certainty": Certainty().get_uncertainties(probabilities[..., 0]),
    }
    tensors = {name: torch.as_tensor(score, dtype=torch.float64) for name, score in scores.items()}
    write("baal", __file__, ["baal"], {"logits": logits, **tensors})


if __name__ == "__main__":
    main()
