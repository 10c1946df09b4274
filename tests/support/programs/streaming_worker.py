"""Train a tiny model on each file, as a stream of its rows, and print the peak memory so far.

python streaming_worker.py CACHE FILE ...
"""

import resource
import sys

import datasets
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

import reftnoise as rn
from reftnoise.data.sources import load_rows
from reftnoise.data.tasks.examples import as_examples
from reftnoise.data.tasks.text import TextTask
from reftnoise.engine.base.tiny import DIRECTORY

BATCH = 1000


def train(path: str, cache: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    rows = load_rows(path, streaming=True)
    with open(path, "rb") as file:
        number = sum(1 for _ in file)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    reft_model = rn.get_reft_model(
        base, rn.ReftConfig([{"layer": 0, "intervention": "loreft", "low_rank_dimension": 1}])
    )
    module = rn.make_last_position_supervised_data_module(
        tokenizer,
        base,
        as_examples(rows, TextTask(), "plain", tokenizer),
        shuffle_seed=0,
        shuffle_buffer=1000,
    )
    args = TrainingArguments(
        output_dir=cache,
        max_steps=number // BATCH,
        per_device_train_batch_size=BATCH,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rn.ReftTrainerForCausalLM(reft_model, args, processing_class=tokenizer, **module).train()


def main(cache: str, *paths: str) -> None:
    datasets.config.HF_DATASETS_CACHE = cache
    torch.set_num_threads(1)
    for path in paths:
        train(path, cache)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
