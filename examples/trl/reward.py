"""LoReFT in TRL's RewardTrainer: a score for answers, learnt from pairs of them.

    python examples/trl/reward.py
    python examples/trl/reward.py --model MODEL --data DATA.jsonl --output adapter

Data: lines of {"prompt", "chosen", "rejected"}; a tenth of them is held out. The units edit the
first and last tokens of prompt and answer together; the head is new, so it is trained and saved
with them.
"""

import tempfile

import torch
from jsonargparse import auto_cli
from questions import preferences
from stages import be_quiet, show_bar
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY


def main(
    model: str = str(DIRECTORY),
    data: str | None = None,
    steps: int = 20,
    learning_rate: float = 4e-3,
    output: str | None = None,
) -> None:
    """Train, and print the accuracy on held-out pairs.

    Args:
        model: directory or hub name of the base.
        data: a JSONL file.
        steps: of the optimizer.
        learning_rate: learning rate of AdamW, falling linearly to 0.
        output: where to save the adapter, with its head.
    """
    be_quiet()
    set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32
    )
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    noise = {"intervention": "neftune", "alpha": 5.0}
    reft_model = rn.get_reft_model(base, rn.ReftConfig([loreft | {"positions": "f2+l2"}, noise]))
    reft_model.print_trainable_parameters()
    parts = preferences(data).train_test_split(0.1, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        args = RewardConfig(
            output_dir=scratch,
            max_steps=steps,
            learning_rate=learning_rate,
            bf16=torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = RewardTrainer(
            reft_model,
            args=args,
            train_dataset=parts["train"],
            eval_dataset=parts["test"],
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        show_bar(trainer, "training")
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    for name, scores in (("before", before), ("after", after)):
        accuracy, margin = scores["eval_accuracy"], scores["eval_margin"]
        print(f"{name:6}  accuracy {accuracy:.2f}  margin {margin:.3f}")
    if output is not None:
        reft_model.eval().save_pretrained(output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
