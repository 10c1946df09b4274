"""Train an intervention of your own, which scales hidden states as (IA)³ scales activations.

python examples/custom_intervention.py
"""

from typing import Any

import torch

import reftnoise as rn


@rn.register_intervention("scaling")
class ScalingIntervention(rn.ReftIntervention):
    """h + s ⊙ h, with s from 0. Its name is now one for configs, recipes and adapters."""

    def __init__(self, *, embed_dim: int, dropout: float = 0.0, **pyvene: Any) -> None:
        super().__init__(embed_dim=embed_dim, dropout=dropout, **pyvene)
        self.scale = torch.nn.Parameter(torch.zeros(embed_dim))

    def edit(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.scale * hidden


model, tokenizer = rn.load_tiny_model()
entry = {"layer": "all", "intervention": "scaling", "positions": "all", "dropout": 0.1}
reft_model = rn.get_reft_model(model, rn.ReftConfig(entry)).train()
examples = rn.load_tiny_examples("train")[:8]  # questions with answers in emoji
data_module = rn.make_last_position_supervised_data_module(
    tokenizer, model, [e.prompt for e in examples], [e.completion for e in examples]
)
batch = data_module["data_collator"](list(data_module["train_dataset"]))
optimizer = torch.optim.AdamW(reft_model.parameters(), lr=3e-2)
for step in range(31):
    optimizer.zero_grad()
    loss = reft_model(**batch).loss
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
