"""The methods that are compared: each makes a training step on a workload."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.integrations.neftune import neftune_post_forward_hook
from workload import SHAPES, Workload

import reftnoise as rn

Step = Callable[[], Any]
"""A training step; returns its loss."""


def new_base(work: Workload) -> Any:
    """A frozen base with random weights, the same at every call."""
    set_seed(0)
    shape = SHAPES.get(work.shape or "") or {
        "model_type": "llama",
        "hidden_size": work.hidden_size,
        "intermediate_size": int(2.75 * work.hidden_size),
        "num_hidden_layers": work.layers,
        "num_attention_heads": work.heads,
        "vocab_size": work.vocabulary,
        "max_position_embeddings": max(2048, work.prompt + work.completion),
    }
    config = AutoConfig.for_model(**shape, use_cache=False)
    with torch.device(work.device):
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, work.dtype))
    return base.requires_grad_(False).train()


class Bench:
    """A workload's batch, and a base that methods share as long as they do not change it."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        set_seed(1)
        width = work.prompt + work.completion
        vocabulary = self.base.config.vocab_size
        tokens = torch.randint(0, vocabulary, (work.batch_size, width))
        labels = tokens.masked_fill(torch.arange(width) < work.prompt, -100)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        self.batch: dict[str, Tensor] = {n: v.to(work.device) for n, v in batch.items()}

    @functools.cached_property
    def base(self) -> Any:
        return new_base(self.work)

    @property
    def first_edited(self) -> int:
        """The first edited layer."""
        edited = self.work.edited
        return 0 if edited == "all" else int(edited.split("-")[0])

    def step(self, model: Any, **options: Any) -> Step:
        """Gradients of the model's trainable parameters."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def run() -> Tensor:
            for parameter in trained:
                parameter.grad = None
            loss: Tensor = model(**self.batch | options).loss
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            return loss.detach()

        return run

    def reft(self, *noises: dict[str, Any], base: Any = None) -> rn.ReftModel:
        """LoReFT on the shared base, or on another."""
        work = self.work
        entry = {
            "layer": work.edited,
            "intervention": "loreft",
            "low_rank_dimension": work.rank,
            "positions": work.positions,
            "tied": False,
        }
        set_seed(2)
        return rn.get_reft_model(base or self.base, rn.ReftConfig([entry, *noises])).train()


def floor(bench: Bench) -> Step:
    """Forward of the frozen base, backward to the first edited hidden state."""
    layer = bench.base.model.layers[bench.first_edited]

    def run() -> Tensor:
        hook = layer.register_forward_hook(lambda _, __, output: output.requires_grad_())
        try:
            loss: Tensor = bench.base(**bench.batch).loss
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
        finally:
            hook.remove()
        return loss.detach()

    return run


def plain(bench: Bench) -> Step:
    """LoReFT in the base's own forward: all gradients, all logits."""
    model = bench.reft()
    model.split = "never"
    return bench.step(model, return_logits=True)


def split(bench: Bench) -> Step:
    """LoReFT as it trains by default."""
    return bench.step(bench.reft(), return_logits=False)


def reuse(bench: Bench) -> Step:
    """The same with the prompts' keys and values from an earlier epoch."""
    model = bench.reft()
    model.prefix_cache = rn.PrefixCache()
    return bench.step(model, return_logits=False)


def symnoise(bench: Bench) -> Step:
    """LoReFT and SymNoise: every row twice."""
    model = bench.reft({"intervention": "symnoise", "alpha": 5.0})
    return bench.step(model, return_logits=False)


def compiled(bench: Bench) -> Step:
    """`plain` through `torch.compile`, as one graph.

    Without the mask, which is all ones: eager models find that out and drop it, a graph cannot.
    """
    model = torch.compile(bench.reft(base=new_base(bench.work)), fullgraph=True)
    return bench.step(model, attention_mask=None)


def lora(bench: Bench) -> Step:
    """LoRA of rank 8 on queries and values, by peft."""
    return bench.step(_lora_model(bench.work))


def neftune(bench: Bench) -> Step:
    """The same LoRA under transformers' NEFTune."""
    model = _lora_model(bench.work)
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    return bench.step(model)


def _lora_model(work: Workload) -> Any:
    import peft

    base = new_base(work)
    set_seed(2)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config).train()


def pyreft(bench: Bench) -> Step:
    """LoReFT of pyreft 0.1.0, its model driven directly: its trainer needs transformers 4."""
    import pyreft

    work, base = bench.work, new_base(bench.work)
    layers = range(base.config.num_hidden_layers)
    if work.edited != "all":
        start, end = work.edited.split("-")
        layers = range(int(start), int(end) + 1)
    parts = rn.Positions.parse(work.positions).split()
    set_seed(2)
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": work.rank,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=base.config.hidden_size,
                low_rank_dimension=work.rank,
                dtype=getattr(torch, work.dtype),
            ),
        }
        for _ in parts
        for layer in layers
    ]
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))
    model.set_device(work.device)
    columns = [[*range(part.first), *range(work.prompt - part.last, work.prompt)] for part in parts]
    locations = [[chosen] * work.batch_size for chosen in columns for _ in layers]
    inputs = {name: bench.batch[name] for name in ("input_ids", "attention_mask")}
    trained = [p for unit in model.interventions.values() for p in unit.parameters()]

    def run() -> Tensor:
        for parameter in trained:
            parameter.grad = None
        _, output = model(
            inputs,
            unit_locations={"sources->base": (None, locations)},
            labels=bench.batch["labels"],
        )
        output.loss.backward()
        loss: Tensor = output.loss.detach()
        return loss

    return run


METHODS: dict[str, Callable[[Bench], Step]] = {
    method.__name__: method
    for method in (floor, plain, split, reuse, symnoise, compiled, lora, neftune, pyreft)
}
