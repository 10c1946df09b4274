"""LoReFT and SymNoise in TRL's SFTTrainer: the embedded tiny model learns to answer in emoji.

    python examples/trl/sft.py
    python examples/trl/sft.py --packing true
    python examples/trl/sft.py --model MODEL --data DATA.jsonl --positions f7+l7 --output adapter

Data: lines of {"prompt", "completion"}, texts or messages, one turn of the assistant in each; TRL
masks the prompts, which is how the units know where these end.
"""

import tempfile

import torch
from jsonargparse import auto_cli
from questions import supervised
from stages import be_quiet, show_bar
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY


def main(
    model: str = str(DIRECTORY),
    data: str | None = None,
    positions: str = "l1",
    rank: int = 4,
    steps: int = 60,
    learning_rate: float = 4e-3,
    packing: bool = False,
    output: str | None = None,
    question: str = "Where does a bear live?",
) -> None:
    """Train, and answer a question before and after.

    Args:
        model: directory or hub name of the base.
        data: a JSONL file.
        positions: of the edits.
        rank: of the edits.
        steps: of the optimizer.
        learning_rate: learning rate of AdamW, falling linearly to 0.
        packing: several documents in a row; each is edited and perturbed as if it were alone.
        output: where to save the adapter.
        question: answered greedily.
    """
    be_quiet()
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    loreft = {
        "layer": "all",
        "intervention": "loreft",
        "low_rank_dimension": rank,
        "positions": positions,
    }
    noise = {"intervention": "symnoise", "alpha": 5.0}
    reft_model = rn.get_reft_model(base, rn.ReftConfig([loreft, noise]))
    reft_model.print_trainable_parameters()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )
    with tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(
            output_dir=scratch,
            max_steps=steps,
            learning_rate=learning_rate,
            packing=packing,
            max_length=512,
            bf16=torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = SFTTrainer(
            reft_model,
            args=args,
            train_dataset=supervised(data),
            processing_class=tokenizer,
        )
        show_bar(trainer, "training")
        trainer.train()
    chat = chat.to(reft_model.device)
    width = chat["input_ids"].shape[1]
    reft_model.eval()
    with reft_model.disabled():
        before = reft_model.generate(**chat, max_new_tokens=12, do_sample=False)
    after = reft_model.generate(**chat, max_new_tokens=12, do_sample=False)
    for name, tokens in (("base", before), ("adapted", after)):
        print(f"{name}: {tokenizer.decode(tokens[0, width:], skip_special_tokens=True)}")
    if output is not None:
        reft_model.save_pretrained(output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
