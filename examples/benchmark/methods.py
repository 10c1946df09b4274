"""The methods that are compared: each makes a training step on a workload."""

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.integrations.neftune import neftune_post_forward_hook
from workload import SHAPES, Workload

import reftnoise as rn
from reftnoise.engine.base.loading import load_base

Step = Callable[[], Any]
"""A training step; returns its loss."""


def new_base(work: Workload, layers: int | None = None) -> Any:
    """A frozen base, the same at every call: of random weights, unless the workload names a model.

    Args:
        work: the workload.
        layers: number of its layers, if it is another than the workload's.
    """
    set_seed(0)
    dtype = getattr(torch, work.dtype)
    if work.model is not None and layers is None:
        base, _ = load_base(work.model, dtype=work.dtype, device=work.device)
        base.config.use_cache = False
        return base.requires_grad_(False).train()
    with torch.device(work.device):  # where random numbers for billions of weights take no time
        base = AutoModelForCausalLM.from_config(_config(work, layers), dtype=dtype)
    return base.requires_grad_(False).train()


def _config(work: Workload, layers: int | None) -> Any:
    if work.model is not None:
        config = load_base(work.model)[0].config
        config.use_cache = False
    else:
        llama = {
            "model_type": "llama",
            "hidden_size": work.hidden_size,
            "intermediate_size": int(2.75 * work.hidden_size),
            "num_hidden_layers": work.layers,
            "num_attention_heads": work.heads,
            "vocab_size": work.vocabulary,
            "max_position_embeddings": max(2048, work.prompt + work.completion),
        }
        shape = llama if work.shape is None else SHAPES[work.shape]
        config = AutoConfig.for_model(**shape, use_cache=False)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


class Bench:
    """A workload's batch, and a base that methods share as long as they do not change it.

    Args:
        work: the workload.
        layers: number of the base's layers, if it is another than the workload's.
        has_values: whether the base has weights, and not only their shapes.
    """

    def __init__(
        self, work: Workload, *, layers: int | None = None, has_values: bool = True
    ) -> None:
        self.work, self._layers = work, layers
        self._values = (
            contextlib.nullcontext() if has_values else FakeTensorMode(allow_non_fake_inputs=True)
        )
        set_seed(1)
        width = work.prompt + work.completion
        vocabulary = self.base.config.vocab_size
        tokens = torch.randint(0, vocabulary, (work.batch_size, width))
        labels = tokens.masked_fill(torch.arange(width) < work.prompt, -100)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        self.batch: dict[str, Tensor] = {n: v.to(work.device) for n, v in batch.items()}

    @functools.cached_property
    def base(self) -> Any:
        """The base that edits share."""
        with self._values:
            return new_base(self.work, self._layers)

    def twin(self) -> Any:
        """A base of its own for a method that changes it, with the same weights in memory."""
        kept = (*self.base.parameters(), *self.base.buffers())
        return copy.deepcopy(self.base, memo={id(tensor): tensor for tensor in kept})

    @property
    def prompts(self) -> dict[str, Tensor]:
        """The batch without its completions."""
        names = ("input_ids", "attention_mask")
        return {name: self.batch[name][:, : self.work.prompt] for name in names}

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

    def reft(
        self, *noises: dict[str, Any], positions: str | None = None, base: Any = None
    ) -> rn.ReftModel:
        """LoReFT on the shared base at the workload's positions, or on others."""
        work = self.work
        entry = {
            "layer": work.edited,
            "intervention": "loreft",
            "low_rank_dimension": work.rank,
            "positions": positions or work.positions,
            "tied": work.tied,
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


def r3f(bench: Bench) -> Step:
    """LoReFT and R3F: every row twice, and the predictions of both compared."""
    model = bench.reft({"intervention": "r3f"})
    return bench.step(model, return_logits=False)


def compiled(bench: Bench) -> Step:
    """`plain` through `torch.compile`, as one graph.

    Without the mask, which is all ones: eager models find that out and drop it, a graph cannot.
    """
    model = torch.compile(bench.reft(base=bench.twin()), fullgraph=True)
    return bench.step(model, attention_mask=None)


def compiled_lora(bench: Bench) -> Step:
    """`lora` through `torch.compile`, also without the mask."""
    model = torch.compile(lora_model(bench), fullgraph=True)
    return bench.step(model, attention_mask=None)


def lora(bench: Bench) -> Step:
    """LoRA of rank 8 on queries and values, by peft."""
    return bench.step(lora_model(bench))


def neftune(bench: Bench) -> Step:
    """The same LoRA under transformers' NEFTune."""
    model = lora_model(bench)
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    return bench.step(model)


def lora_model(bench: Bench) -> Any:
    """A base with LoRA of rank 8 on queries and values, by peft."""
    import peft

    base = bench.twin()
    set_seed(2)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config).train()


def pyreft(bench: Bench) -> Step:
    """LoReFT of pyreft 0.1.0, its model driven directly: its trainer needs transformers 4."""
    model, locations = pyreft_model(bench)
    inputs = {name: bench.batch[name] for name in ("input_ids", "attention_mask")}
    trained = [p for unit in model.interventions.values() for p in unit.parameters()]

    def run() -> Tensor:
        for parameter in trained:
            parameter.grad = None
        _, output = model(inputs, unit_locations=locations, labels=bench.batch["labels"])
        output.loss.backward()
        loss: Tensor = output.loss.detach()
        return loss

    return run


def pyreft_model(bench: Bench) -> tuple[Any, dict[str, Any]]:
    """A model of pyreft with LoReFT, and the places where it edits."""
    import pyreft

    work, base = bench.work, bench.twin()
    layers = range(base.config.num_hidden_layers)
    if work.edited != "all":
        start, end = work.edited.split("-")
        layers = range(int(start), int(end) + 1)
    whole = rn.Positions.parse(work.positions)
    parts = [whole] if work.tied else whole.split()
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
    config = pyreft.ReftConfig(representations=representations)
    model = pyreft.get_reft_model(base, config, set_device=False)
    model.set_device(work.device, set_model=False)  # where the base is already
    columns = [[*range(part.first), *range(work.prompt - part.last, work.prompt)] for part in parts]
    locations = [[chosen] * work.batch_size for chosen in columns for _ in layers]
    return model, {"sources->base": (None, locations)}


METHODS: dict[str, Callable[[Bench], Step]] = {
    method.__name__: method
    for method in (
        *(floor, plain, split, reuse, symnoise, r3f, compiled),
        *(lora, neftune, compiled_lora, pyreft),
    )
}
