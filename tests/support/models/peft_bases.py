"""Bases of other tasks than causal language modelling, and the layers that PEFT is to adapt."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

QV = {"target_modules": ["q_proj", "v_proj"]}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=32)).eval()


def seq2seq() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=20, **sizes, **special)).eval()
