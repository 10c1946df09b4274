"""LoReFT in TRL's DPOTrainer, with the bare base as reference: emoji are preferred to words.

    python examples/trl/dpo.py
    python examples/trl/dpo.py --model MODEL --data DATA.jsonl --adapter sft-adapter --output dpo

Data: lines of {"prompt", "chosen", "rejected"}. No second model is loaded: the reference is the
base, without edits, or with those of an adapter that both sides begin with.
"""

import tempfile
from typing import Any

import torch
from jsonargparse import auto_cli
from questions import preferences
from stages import be_quiet, show_bar
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY


def main(
    model: str = str(DIRECTORY),
    data: str | None = None,
    adapter: str | None = None,
    steps: int = 30,
    learning_rate: float = 2e-3,
    beta: float = 0.1,
    output: str | None = None,
) -> None:
    """Train, and print how far the chosen answers are ahead.

    Args:
        model: directory or hub name of the base.
        data: a JSONL file.
        adapter: directory of an adapter to begin with, such as one of supervised training.
        steps: of the optimizer.
        learning_rate: learning rate of AdamW, falling linearly to 0.
        beta: what a nat of difference from the reference costs.
        output: where to save the adapter.
    """
    be_quiet()
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference: Any = base
    if adapter is None:
        loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
        policy = rn.get_reft_model(base, rn.ReftConfig([loreft | {"positions": "l1"}]))
    else:
        policy = rn.ReftModel.from_pretrained(base, adapter)
        reference = rn.ReftModel.from_pretrained(base, adapter)
    with tempfile.TemporaryDirectory() as scratch:
        args = DPOConfig(
            output_dir=scratch,
            max_steps=steps,
            learning_rate=learning_rate,
            beta=beta,
            logging_steps=5,
            bf16=torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = DPOTrainer(
            policy,
            ref_model=reference,
            args=args,
            train_dataset=preferences(data),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        show_bar(trainer, "training")
        trainer.train()
    for entry in trainer.state.log_history[:-1]:
        margin, accuracy = entry["rewards/margins"], entry["rewards/accuracies"]
        print(f"step {entry['step']:3d}  margin {margin:6.3f}  accuracy {accuracy:.2f}")
    if output is not None:
        policy.eval().save_pretrained(output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
