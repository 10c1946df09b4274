"""LoReFT whose predictions are held still under noise: R3F's consistency (arXiv:2008.03156).

The unit `r3f` does that with noise of one scale; here it is NEFTune's, α/√(L·d).

    python examples/papers/consistency.py --model MODEL --data FOLDER --labels good bad

FOLDER holds a train.jsonl and a test.jsonl of {"prompt", "output"} lines. Settings are those of
examples/studies/noise_on_frozen_bases.yaml, whose LoReFT without noise is what to compare with.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

import reftnoise as rn
from reftnoise.data.tasks.registry import get_task
from reftnoise.evaluation import evaluate
from reftnoise.interventions import NoiseIntervention


class ConsistencyTrainer(rn.ReftTrainer):
    r"""Adds $\lambda\,(\mathrm{KL}(p\|q) + \mathrm{KL}(q\|p))$ to the loss without noise.

    p and q are the predictions of each label's token without and with noise.
    """

    weight = 1.0
    """λ"""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        noises = [part for part in model.modules() if isinstance(part, NoiseIntervention)]
        noisy = model(**inputs, return_logits=True)
        for noise in noises:
            noise.eval()
        clean = model(**inputs, return_logits=True)
        for noise in noises:
            noise.train()
        counted = inputs["labels"][:, 1:] != -100
        p, q = (out.logits[:, :-1][counted].float().log_softmax(-1) for out in (clean, noisy))
        apart = ((p.exp() - q.exp()) * (p - q)).sum() / counted.sum()
        loss = clean.loss + self.weight * apart
        return (loss, clean) if return_outputs else loss


def rows(path: Path) -> datasets.Dataset:
    loaded = datasets.load_dataset("json", data_files=str(path), split="train")
    return loaded.rename_column("output", "completion")


def run(options: argparse.Namespace, seed: int) -> float:
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    units = [
        {"layer": "all", "intervention": "loreft", "low_rank_dimension": 3, "positions": "all"},
        {"intervention": "neftune", "alpha": options.alpha},
    ]
    reft_model = rn.get_reft_model(model, rn.ReftConfig(units))
    module = rn.make_last_position_supervised_data_module(
        tokenizer, model, rows(options.data / "train.jsonl")
    )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            seed=seed,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            warmup_steps=options.steps // 10,
            learning_rate=options.learning_rate,
            adam_beta2=0.95,
            train_sampling_strategy="group_by_length",
            report_to="none",
            save_strategy="no",
        )
        trainer = ConsistencyTrainer(reft_model, arguments, processing_class=tokenizer, **module)
        trainer.weight = options.weight
        trainer.train()
    task = get_task({"name": "classification", "labels": options.labels})
    test = rows(options.data / "test.jsonl")
    return evaluate(reft_model.eval(), tokenizer, task, test, batch_size=128).scores["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name or directory of the base")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--labels", required=True, nargs="+")
    parser.add_argument("--alpha", type=float, default=1.0, help="scale of NEFTune's noise")
    parser.add_argument("--weight", type=float, default=1.0, help="λ")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    for seed in options.seeds:
        print(f"seed {seed}: accuracy {run(options, seed):.4f}", flush=True)


if __name__ == "__main__":
    main()
