"""Tiny random models of every kind, with the inputs that each kind reads."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    set_seed,
)

from reftnoise.engine.base.sites import takes_position_ids
from support.models.architectures import BOS, CONFIGS, EOS, PAD, VOCABULARY, with_large_weights

Example = dict[str, Tensor]
"""Inputs of one row, each with a batch dimension of 1."""

PROMPTS, COMPLETIONS = (9, 3, 6), (3, 2, 5)
LAYERS = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}


# -- what each kind of model reads -----------------------------------------------------------------


def _tokens(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length))


def _text(length: int) -> Example:
    return {"input_ids": _tokens(length), "attention_mask": torch.ones(1, length).long()}


def _completed(_: Any, row: int) -> Example:
    """A prompt and its completion, which alone has labels."""
    example = _text(PROMPTS[row] + COMPLETIONS[row])
    labels = example["input_ids"].clone()
    labels[:, : PROMPTS[row]] = -100
    return example | {"labels": labels}


def _filled_in(_: Any, row: int) -> Example:
    example = _text(PROMPTS[row])
    return example | {"labels": example["input_ids"].clone()}


def _classified(_: Any, row: int) -> Example:
    return _text(PROMPTS[row]) | {"labels": torch.tensor([row % 2])}


def _translated(_: Any, row: int) -> Example:
    return _text(PROMPTS[row]) | {"labels": _tokens(COMPLETIONS[row])}


def _image(config: Any, row: int) -> Example:
    pixels = torch.randn(1, 3, config.image_size, config.image_size)
    return {"pixel_values": pixels, "labels": torch.tensor([row % 2])}


def _transcribed(config: Any, row: int) -> Example:
    frames = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": frames, "labels": _tokens(COMPLETIONS[row])}


def _sound(_: Any, row: int) -> Example:
    samples = torch.randn(1, 40 * PROMPTS[row])
    mask = torch.ones_like(samples).long()
    return {"input_values": samples, "attention_mask": mask, "labels": torch.tensor([row % 2])}


def _shown(config: Any, row: int) -> Example:
    """An image, and a prompt about it with its answer."""
    example, vision = _completed(config, row), config.vision_config
    image = torch.full((1, (vision.image_size // vision.patch_size) ** 2), config.image_token_id)
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    before = {"input_ids": image, "attention_mask": torch.ones_like(image)}
    before["labels"] = torch.full_like(image, -100)
    joined = {name: torch.cat([before[name], example[name]], 1) for name in before}
    return joined | {"pixel_values": pixels}


@dataclass(frozen=True)
class Kind:
    """What models of one kind read, and where they have units."""

    auto: Any
    """The class that makes them of a config."""
    example: Callable[[Any, int], Example]
    """From config and number to a row."""
    edited: tuple[str, ...] = ("block_output",)
    noised: str = "embeddings"


CAUSAL = Kind(AutoModelForCausalLM, _completed)
MASKED = Kind(AutoModelForMaskedLM, _filled_in)
CLASSIFIER = Kind(AutoModelForSequenceClassification, _classified)
TRANSLATOR = Kind(AutoModelForSeq2SeqLM, _translated, ("block_output", "decoder.block_output"))
IMAGES = Kind(AutoModelForImageClassification, _image)
TRANSCRIBER = Kind(AutoModelForSpeechSeq2Seq, _transcribed, TRANSLATOR.edited)
SOUNDS = Kind(AutoModelForAudioClassification, _sound, noised="wav2vec2.feature_projection.output")
SHOWN = Kind(AutoModelForImageTextToText, _shown)


# -- architectures ---------------------------------------------------------------------------------

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": VOCABULARY}
_LLAMA = CONFIGS["llama"] | {"num_hidden_layers": 2, "head_dim": 8}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4, **_TEXT}
_STATES = {"state_size": 8, **_SMALL, **_TEXT}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_STACKS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
    **_TEXT,
}
_ENCODER = CONFIGS["llama"] | {"num_hidden_layers": 2}
_IMAGE = {**_SMALL, "intermediate_size": 64, "image_size": 8, "patch_size": 4}

MODELS: dict[str, tuple[Kind, dict[str, Any]]] = {
    **{name: (CAUSAL, config) for name, config in CONFIGS.items()},
    "qwen3_moe": (CAUSAL, _LLAMA | _EXPERTS),
    "mixtral": (CAUSAL, _LLAMA | {"num_local_experts": 4}),
    "gptj": (CAUSAL, _GPT),
    "opt": (CAUSAL, _SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32, **_TEXT}),
    "bloom": (CAUSAL, {"hidden_size": 32, "n_layer": 2, "n_head": 4, **_TEXT}),
    "falcon": (CAUSAL, _SMALL | _TEXT),
    "mpt": (CAUSAL, {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, **_TEXT}),
    "starcoder2": (CAUSAL, _LLAMA),
    "stablelm": (CAUSAL, _LLAMA),
    "granite": (CAUSAL, _LLAMA),
    "cohere2": (CAUSAL, _LLAMA),
    "smollm3": (CAUSAL, _LLAMA),
    "glm4": (CAUSAL, _LLAMA),
    "llama4_text": (CAUSAL, _LLAMA | {"num_local_experts": 2, "intermediate_size_mlp": 64}),
    "deepseek_v3": (
        CAUSAL,
        _LLAMA
        | _EXPERTS
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": (
        CAUSAL,
        _LLAMA | _EXPERTS | {"num_local_experts": 4, "rope_parameters": {"rope_type": "default"}},
    ),
    "mamba": (CAUSAL, _STATES),
    "mamba2": (CAUSAL, _STATES | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": (CAUSAL, _STATES),
    "jamba": (
        CAUSAL,
        _LLAMA
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": (CAUSAL, _LLAMA | _MAMBA | {"attn_layer_indices": [1]}),
    "zamba2": (
        CAUSAL,
        _LLAMA
        | {
            "mamba_d_state": 8,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "hybrid_layer_ids": [1],
        },
    ),
    "nemotron_h": (
        CAUSAL,
        _LLAMA
        | {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "lfm2": (
        CAUSAL,
        _LLAMA
        | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 16},
    ),
    "qwen3_next": (
        CAUSAL,
        _LLAMA
        | _EXPERTS
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "bert": (CLASSIFIER, _ENCODER),
    "roberta": (CLASSIFIER, _ENCODER),
    "deberta-v2": (CLASSIFIER, _ENCODER),
    "distilbert": (CLASSIFIER, {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, **_TEXT}),
    "modernbert": (
        MASKED,
        _ENCODER | {"cls_token_id": BOS, "sep_token_id": EOS, "local_attention": 8},
    ),
    "t5": (
        TRANSLATOR,
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": PAD,
            **_TEXT,
        },
    ),
    "bart": (TRANSLATOR, _STACKS),
    "whisper": (TRANSCRIBER, _STACKS | {"num_mel_bins": 8, "max_source_positions": 8}),
    "wav2vec2": (
        SOUNDS,
        _ENCODER
        | {
            "conv_dim": [16, 16, 16],
            "conv_kernel": [10, 3, 2],
            "conv_stride": [5, 2, 2],
            "feat_extract_norm": "layer",
            "num_feat_extract_layers": 3,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 16,
            "mask_time_prob": 0.0,
        },
    ),
    "vit": (IMAGES, _IMAGE),
    "llava": (
        SHOWN,
        {
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_IMAGE},
            "text_config": {"model_type": "llama", **_LLAMA, "vocab_size": VOCABULARY + 1},
            "image_token_index": VOCABULARY,
        },
    ),
}


@functools.cache
def model_of(architecture: str) -> Any:
    """A random model in evaluation mode without dropout, made once: leave its weights alone."""
    return new_model(MODELS[architecture][0].auto, architecture)


def new_model(auto: Any, architecture: str, **changes: Any) -> Any:
    """The same, made anew, for a task of its own."""
    set_seed(0)
    config = AutoConfig.for_model(architecture, **(MODELS[architecture][1] | changes))
    rates = [n for n, v in config.to_dict().items() if "drop" in n and isinstance(v, float)]
    config.update(dict.fromkeys(rates, 0.0))
    return with_large_weights(auto.from_config(config))


@functools.cache
def examples_of(architecture: str) -> list[Example]:
    """Three rows of other lengths each, where the model's inputs have a length."""
    set_seed(1)
    model = model_of(architecture)
    rows = [MODELS[architecture][0].example(model.config, row) for row in range(len(PROMPTS))]
    if takes_position_ids(model):
        for row in rows:
            row["position_ids"] = torch.arange(row["input_ids"].shape[1])[None]
    return rows


def padded(rows: Sequence[Example], side: str = "right") -> Example:
    """A batch of rows. Labels of a sequence of their own are padded on the right in any case."""
    batch: Example = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0].dim() == 2:
            is_own = name == "labels" and rows[0][name].shape != rows[0][main_input(rows[0])].shape
            width = max(value.shape[1] for value in values)
            missing = [width - value.shape[1] for value in values]
            sides = [(n, 0) if side == "left" and not is_own else (0, n) for n in missing]
            fill = -100 if name == "labels" else 0
            values = [F.pad(v, s, value=fill) for v, s in zip(values, sides, strict=True)]
        batch[name] = torch.cat(values)
    return batch


def main_input(inputs: Example) -> str:
    """Which of the inputs is edited: tokens, pixels or sounds."""
    return next(name for name in inputs if name.startswith(("input_", "pixel_")))
