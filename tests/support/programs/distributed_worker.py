"""Training runs that two processes share; test_sharding.py starts them and knows the results.

    python -m torch.distributed.run --nproc_per_node 2 distributed_worker.py RUNS FOLDER

RUNS is a name of `LAUNCHES`. The first process writes what its runs gave to FOLDER/RUNS.pt.
"""

import datetime
import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, TrainingArguments, set_seed

import reftnoise as rn
from reftnoise.adapters import saving
from reftnoise.adapters.directory import AdapterFiles
from reftnoise.engine.base.tiny import DIRECTORY
from support.models.architectures import tiny_model
from support.programs import cpus_as_accelerators
from support.waiting import PATIENCE

PROMPTS = ["Where does a fish live?", "What is it?", "What colour is the big banana?", "Who?"] * 2
COMPLETIONS = ["🐟", "🌊🌊", "🍌🟡 and more words", "🤖💬🌐🧠"] * 2
SILENT_SYMNOISE = {"intervention": "symnoise", "alpha": 0.0}  # noise would differ by process


def loreft(**entry: Any) -> dict[str, Any]:
    defaults = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    return defaults | {"positions": "f1+l1"} | entry


def wrapped(*entries: dict[str, Any], base: Any = None, **config: Any) -> rn.ReftModel:
    base = tiny_model(**config) if base is None else base
    set_seed(1)
    return rn.get_reft_model(base, rn.ReftConfig(list(entries) or [loreft()])).train()


def whole(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


# -- loops by hand ---------------------------------------------------------------------------------


def batches(kind: str = "usual") -> list[dict[str, Tensor]]:
    """Two micro-batches of four rows; odd rows, the second process's, have fewer tokens."""
    found = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, 101, (4, 24), generator=generator)
        lengths, prompts = torch.tensor([24, 15, 22, 13]), torch.tensor([16, 9, 15, 11])
        column = torch.arange(24)
        mask = (column < lengths[:, None]).long()
        labels = tokens.masked_fill((mask == 0) | (column < prompts[:, None]), -100)
        if kind == "uneven":  # nothing to split, or nothing to predict, in the second process
            labels[1, 1:15], labels[3] = tokens[1, 1:15], -100
            labels[1] = labels[1] if seed == 0 else -100
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def train_by_hand(
    model: rn.ReftModel,
    wrap: Callable[[rn.ReftModel], nn.Module] = lambda model: model,
    kind: str = "usual",
    steps: int = 3,
) -> dict[str, Any]:
    """Steps of SGD over the micro-batches, of which each process takes every n-th row."""
    called = wrap(model)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches(kind))
    for _ in range(steps):
        optimizer.zero_grad()
        for batch in batches(kind):
            mine = {name: value[rank::world] for name, value in batch.items()}
            if kind == "uneven" and rank:
                mine = {name: value[:, :15] for name, value in mine.items()}
            loss = called(**mine, num_items_in_batch=tokens).loss
            (loss * world).backward()  # processes' gradients are averaged
        named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        gradients = {name: whole(gradient) for name, gradient in named}
        optimizer.step()
    weights = {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}
    largest = {n: whole(b) for n, b in model.named_buffers() if n.endswith("largest")}
    return {"gradients": gradients, "weights": weights | largest}


def shard(model: rn.ReftModel, *apart: Any, **options: Any) -> nn.Module:
    for module in (*model.model.model.layers, *apart):
        fully_shard(module)
    return fully_shard(model, **options)


def shard_units(model: rn.ReftModel) -> nn.Module:
    units = model.interventions.values()
    return shard(model, *[unit for unit in units if list(unit.parameters())])


def shard_everything(model: rn.ReftModel) -> nn.Module:
    """As accelerate does, and the base itself."""
    inner = model.model.model
    return shard(model, inner.embed_tokens, [inner.norm, model.model.lm_head], model.model)


def split_always(model: rn.ReftModel) -> rn.ReftModel:
    model.split = "always"
    return model


WRAPS: dict[str, Callable[[rn.ReftModel], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp that splits": lambda model: DistributedDataParallel(split_always(model)),
    "fsdp": shard,
    "fsdp, resharded": partial(shard, reshard_after_forward=True),
    "fsdp of units": shard_units,
    "fsdp of everything": shard_everything,
    "fsdp of the root": fully_shard,
}
ENTRIES: dict[str, list[dict[str, Any]]] = {
    "f1+l1": [loreft()],
    "l1": [loreft(positions="l1")],
    "symnoise": [loreft(), SILENT_SYMNOISE],
    "other kinds": [
        loreft(layer=0, tied=False, act_fn="gelu"),
        loreft(layer=1, intervention="noreft", positions="l1", act_fn="relu"),
        loreft(layer=1, intervention="nodireft", component="mlp_output"),
        loreft(layer=2, intervention="consreft", component="attention_output", positions="all"),
        loreft(layer=2, intervention="lobireft", positions="l2"),
    ],
    # Its sparsity is of rows, of which labels count unequally many.
    "reftr1": [loreft(layer=1, intervention="reftr1", positions="all", sparsity=0.0)],
}


def sharded_model_saves_and_generates(folder: Path) -> dict[str, Any]:
    model = wrapped()
    train_by_hand(model, shard)
    is_main = dist.get_rank() == 0
    register_fsdp_forward_method(model, "generate")
    batch = {n: v for n, v in batches()[0].items() if n != "labels"}
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    try:
        model.save_pretrained(folder / "in parts")
        error = ""
    except ValueError as raised:
        error = str(raised)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    directory = folder / ("by hand" if is_main else "by the second process")
    model.save_pretrained(directory, state_dict=state, is_main_process=is_main)
    before = whole(next(iter(model.interventions.parameters())))
    with torch.no_grad():
        for parameter in model.interventions.parameters():
            parameter.zero_()
        model.eval()(**batch)
    dist.barrier()
    saving.load_weights(model, AdapterFiles.read(folder / "by hand"))
    after = whole(next(iter(model.interventions.parameters())))
    with torch.no_grad():
        loaded_logits = model(**batch).logits
    return {
        "logits": logits,
        "tokens": tokens,
        "error": error,
        "is same": torch.equal(before, after) and torch.equal(logits, loaded_logits),
    }


def sharded_model_refuses(_: Path) -> dict[str, Any]:
    found = {}
    for name, change in {
        "split": lambda model: shard(split_always(model)),
        "part of a unit": lambda m: shard(m, next(iter(m.interventions.values())).learned_source),
    }.items():
        try:
            train_by_hand(wrapped(loreft(positions="l1")), change)
        except ValueError as raised:
            found[name] = str(raised)
    return found


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """Every process has every row, and parts of the base's matrices."""
    if dist.get_rank() == 0:
        tiny_model().save_pretrained(folder / "base")
    dist.barrier()
    plan = transformers.distributed.DistributedConfig(tp_plan="auto")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=plan)
    model = wrapped(base=base)
    batch = batches()[0]
    model(**batch).loss.backward()
    return {"gradients": {n: p.grad for n, p in model.interventions.named_parameters()}}


# -- Trainers --------------------------------------------------------------------------------------

FSDP: dict[str, dict[str, Any]] = {
    "full": {"state_dict_type": "FULL_STATE_DICT"},
    "sharded": {"state_dict_type": "SHARDED_STATE_DICT"},
    "ram": {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True},
    "recomputed": {"state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": True},
}


def train(
    folder: Path,
    fsdp: str | None = None,
    entries: str = "symnoise",
    trainer: type[transformers.Trainer] = rn.ReftTrainer,
    resume: str | bool | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Four steps of a Trainer, on eight examples by the four, in micro-batches of two."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if fsdp is not None:
        cpus_as_accelerators.install()
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, **FSDP[fsdp]}}
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": 2 // world,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.03,
        "adam_epsilon": 1e-2,  # far above rounding, which Adam would blow up for tiny gradients
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    args = TrainingArguments(output_dir=str(folder), **(defaults | settings))
    assert args.world_size == world
    AcceleratorState._reset_state()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
    special = {n: getattr(tokenizer, n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = wrapped(*ENTRIES[entries], vocab_size=len(tokenizer), **special)
    if fsdp == "ram" and dist.get_rank():
        for parameter in model.parameters():
            parameter.data.zero_()  # the first process has the weights
    data = rn.make_last_position_supervised_data_module(tokenizer, model, PROMPTS, COMPLETIONS)
    if args.eval_strategy != "no":
        data["eval_dataset"] = data["train_dataset"]
    running = trainer(model=model, args=args, **data, **(options or {}))
    running.train(resume_from_checkpoint=resume)
    running.save_model(str(folder / "final"))
    weights = {n: whole(p) for n, p in model.interventions.named_parameters()}
    losses = [entry["loss"] for entry in running.state.log_history if "loss" in entry]
    return {"weights": weights, "losses": losses}


BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # the best is then known to be the first, not the last
}
TRAINERS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, plain Trainer": {"trainer": transformers.Trainer},
    "ddp, kept prompts": {
        "entries": "l1",
        "options": {"split": "always", "prefix_cache": "memory"},
        "gradient_accumulation_steps": 1,
        "max_steps": 8,
    },
    "ddp, best": BEST,
    "ddp, recomputed": {"gradient_checkpointing": True},
    "fsdp": {"fsdp": "full"},
    "fsdp, plain Trainer": {"fsdp": "full", "trainer": transformers.Trainer},
    "fsdp, sharded": {"fsdp": "sharded"},
    "fsdp, ram": {"fsdp": "ram"},
    "fsdp, best": {"fsdp": "sharded"} | BEST,
    "fsdp, recomputed": {"fsdp": "recomputed"},
    "fsdp, recomputed by the base": {"fsdp": "full", "gradient_checkpointing": True},
}


def resumed(folder: Path, name: str) -> dict[str, Any]:
    checkpoint = str(folder / name / "checkpoint-2")
    return train(folder / f"{name}, resumed", resume=checkpoint, **TRAINERS[name])


def die_within_second_save(folder: Path) -> None:
    """Killed when the adapter's weights have their name and its config has not."""
    replace = os.replace

    def last_rename(source: Any, target: Any) -> None:
        if Path(target).parent.name == "checkpoint-4" and Path(target).name == saving.CONFIG_NAME:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = last_rename
    train(folder / "killed")


# -- launches --------------------------------------------------------------------------------------

Runs = dict[str, Callable[[Path], dict[str, Any]]]

BY_HAND: Runs = {
    **{
        f"{wrap}: {entries}": lambda _, w=wrap, e=entries: train_by_hand(
            wrapped(*ENTRIES[e]), WRAPS[w]
        )
        for wrap in WRAPS
        for entries in (ENTRIES if wrap in ("ddp", "fsdp", "fsdp of units") else ["l1"])
    },
    "ddp: uneven": lambda _: train_by_hand(
        wrapped(loreft(positions="l1")), DistributedDataParallel, "uneven"
    ),
    "saved": sharded_model_saves_and_generates,
    "refused": sharded_model_refuses,
    "tensor parallel": tensor_parallel,
}
BY_TRAINER: Runs = {
    **{
        name: lambda folder, n=name: train(folder / n, **TRAINERS[n])
        for name in TRAINERS
        if name.startswith("ddp")
    },
    "ddp, resumed": lambda folder: resumed(folder, "ddp"),
    "killed, resumed": lambda folder: train(folder / "killed", resume=True),
    **{
        name: lambda folder, n=name: train(folder / n, **TRAINERS[n])
        for name in TRAINERS
        if name.startswith("fsdp")
    },
    "fsdp, resumed": lambda folder: resumed(folder, "fsdp"),
    "fsdp, sharded, resumed": lambda folder: resumed(folder, "fsdp, sharded"),
}
LAUNCHES: dict[str, Runs] = {
    "killed": {"killed": die_within_second_save},
    "trained": BY_HAND | BY_TRAINER,
}


def main(launch: str, folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # a Trainer collects garbage, which takes long among all that was imported
    # Of a layer's output, in-place operations would go wrong. Nobody changes units' or logits.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    warnings.filterwarnings("error", message=".*FSDPLlama.*returned a view tensor")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))
    written: list[str] = []

    def note_what_is_written(event: str, args: tuple[Any, ...]) -> None:
        is_open = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        target = args[0] if is_open else args[1] if event == "os.rename" else None
        if isinstance(target, str | Path) and str(target).startswith(str(folder)):
            written.append(str(Path(target).relative_to(folder)))

    if dist.get_rank():
        sys.addaudithook(note_what_is_written)
    results: dict[str, Any] = {}
    for name, run in LAUNCHES[launch].items():
        try:
            results[name] = run(folder)
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, ({n: r.get("failed") for n, r in results.items()}, written))
    for failed, _ in everywhere:
        for name, error in failed.items():
            if error is not None:
                results[name] = {"failed": error}
    results["written by the second process"] = everywhere[-1][1]
    if dist.get_rank() == 0:
        torch.save(results, folder / f"{launch}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
