"""Adapters for the embedded model whose answers differ from the base's, without any training."""

from pathlib import Path

import torch

import reftnoise as rn

UNITS = [
    {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "l1"},
    {"layer": 1, "component": "mlp_output", "intervention": "bias", "positions": "f1"},
    {"intervention": "symnoise", "alpha": 5.0},
]
QUESTIONS = ["Where does a bear live?", "What does a cow eat?", "Who are you?"]


def moved(reft_model: rn.ReftModel, std: float = 0.5) -> rn.ReftModel:
    """The model, its units drawn far from the identity at which they may start."""
    with torch.no_grad():
        for name, parameter in reft_model.interventions.named_parameters():
            if "rotate_layer" not in name:
                parameter.normal_(std=std)
    return reft_model


def save_adapter(directory: Path) -> Path:
    """An adapter directory for the embedded model, of random edits."""
    torch.manual_seed(3)
    model, _ = rn.load_tiny_model()
    reft_model = rn.get_reft_model(model, rn.ReftConfig(UNITS)).eval()
    moved(reft_model).save_pretrained(directory)
    return directory


def answer(model: torch.nn.Module, tokenizer, messages, max_new_tokens: int = 16) -> str:  # type: ignore[no-untyped-def]
    """What the model writes greedily, by `generate` alone."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
    written = tokens[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True))
