"""Tiny random causal language models, one per architecture, with one vocabulary."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

try:
    from transformers.integrations.neftune import neftune_post_forward_hook
except ModuleNotFoundError:  # where transformers 5.0 has it
    from transformers.trainer_utils import neftune_post_forward_hook

__all__ = ["ARCHITECTURES", "neftune_post_forward_hook", "tiny_model"]

VOCABULARY = 101
PAD, BOS, EOS = 0, 1, 2

_SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_SPECIAL,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE | {"head_dim": 8},
    "gemma2": _LLAMA_LIKE | {"head_dim": 8},
    "gemma3_text": _LLAMA_LIKE | {"head_dim": 8},
    "mistral": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "gpt_neox": _LLAMA_LIKE,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **_SPECIAL,
    },
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "max_position_embeddings": 128,
        **_SPECIAL,
    },
}
ARCHITECTURES = list(CONFIGS)


def tiny_model(architecture: str = "llama", **changes: Any) -> Any:
    """A random model in evaluation mode, the same at every call."""
    set_seed(0)
    config = AutoConfig.for_model(architecture, **(CONFIGS[architecture] | changes))
    return with_large_weights(AutoModelForCausalLM.from_config(config))


def with_large_weights(model: Any) -> Any:
    """The model in evaluation mode, with weights that let an edit change what it generates."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval()
