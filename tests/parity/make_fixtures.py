"""Writes tests/fixtures: small checkpoints, and what transformers makes of them, so that `make test` needs no torch.

    python -m tests.parity.make_fixtures

Each folder holds a checkpoint (config.json, model.safetensors) and expected.npz; `make parity` checks that they
still say what transformers says.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.parity import cases, transformers_reference
from tests.parity.cases import Case
from tests.parity.reference_checkpoints import random_tokens, write_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"


def expectations(case: Case, folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Everything that transformers says about one sequence, the longest; shorter ones are its beginnings.

    Keys: tokens [1, T]; logits [1, T, V]; hidden_states [L + 1, 1, T, D]; routes [L_moe, 1, T, K], ascending; mtp_logits
    [1, T - 1, V] of depth 1 where there is one; greedy [lengths, tokens]; loss; and gradient/<tensor name>.
    """
    model = transformers_reference.load(folder)
    tokens_BT = random_tokens(case, 1, max(cases.LENGTHS))
    out = transformers_reference.forward(model, tokens_BT)
    loss, gradients = transformers_reference.loss_and_gradients(model, tokens_BT)
    expected = {
        "tokens": tokens_BT.astype(np.uint8),
        "logits": out["logits"],
        "hidden_states": np.stack(out["hidden_states"]),
        "routes": out["routes"].astype(np.uint8),
        "greedy": np.array(
            [transformers_reference.greedy(model, tokens_BT[0, :n], cases.GREEDY_TOKENS) for n in cases.LENGTHS], np.uint8
        ),
        "loss": np.array(loss),
    }
    if case.config["num_nextn_predict_layers"]:
        expected["mtp_logits"] = transformers_reference.mtp_logits(model, case.config, tensors, tokens_BT)[0]
    return expected | {f"gradient/{name}": gradient for name, gradient in gradients.items()}


def main() -> None:
    for case in cases.COMMITTED:
        folder = FIXTURES / case.name
        tensors = write_checkpoint(case, folder)
        np.savez_compressed(folder / "expected.npz", **expectations(case, folder, tensors))
        print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
