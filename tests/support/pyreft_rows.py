"""What pyreft's data functions make of a few texts, in pyreft or here.

    python tests/support/pyreft_rows.py pyreft

wrote the expected values beside this file, with pyreft dafd099 on transformers 4.45.1.
"""

import json
import sys
from importlib import import_module
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

TINY = Path(__file__).parents[2] / "reftnoise" / "engine" / "base" / "tiny-chat"
WIDTH = 32
INSTRUCTIONS = [
    {"instruction": "Where does a bear live?", "input": "", "output": "in a forest"},
    {"instruction": "Say it", "input": "100% {sure}", "output": "yes"},
]
ANSWERS = [
    {"instruction": "Say it", "input": "", "good": "yes", "bad": "no, never"},
    {"instruction": "Say it", "good": "a long answer", "bad": "no"},
]
FIELDS = {"input_field": "input", "instruction_field": "instruction"}


def tokenizer() -> Any:
    settings = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = ("bos_token", "eos_token", "pad_token", "model_max_length", "chat_template")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(TINY / "tokenizer.json"),
        padding_side="right",
        **{name: settings[name] for name in names},
    )


def plain(value: Any) -> Any:
    """Tensors as lists, inside mappings and lists too."""
    if hasattr(value, "items"):
        return {name: plain(entry) for name, entry in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def rows(library: Any) -> dict[str, Any]:
    """By name, what each function and dataset of `pyreft` makes."""
    return {
        "positions": {p: plain(library.parse_positions(p)) for p in ("f3+l3", "f1", "l5", "f0+l2")},
        "locations": locations(library),
        **datasets(library),
        **pairs(library),
        **modules(library),
        **losses(library),
    }


def locations(library: Any) -> dict[str, Any]:
    found = {}
    positions = ("f3+l3", "f3+l1", "l3", "f2", "f1+l2", "f0+l2")
    for k, name, shared, mode in product(
        (1, 2, 3, 5, 6, 7, 12), positions, (False, True), ("first", "last")
    ):
        found[f"{k} {name} {shared} {mode}"] = library.get_intervention_locations(
            last_position=k,
            positions=name,
            num_interventions=4,
            share_weights=shared,
            pad_mode=mode,
        )
    return found


def datasets(library: Any) -> dict[str, Any]:
    tok = tokenizer()

    def made(cls: Any, rows: list[dict[str, Any]], positions: str, **kwargs: Any) -> Any:
        settings = {"num_interventions": 4, "position": positions} | kwargs
        dataset = cls("task", None, tok, dataset=rows, **settings)
        return [plain(dataset[i]) for i in range(len(dataset))]

    class Own(library.ReftDataset):  # type: ignore[name-defined]
        def preprocess(self, kwargs: dict[str, Any]) -> None:
            self.pad_mode, self.fields_to_pad = "last", ["input_ids"]

        def tokenize(self, data_item: Any, **_: Any) -> Any:
            ids = self.tokenizer(data_item["text"], return_tensors="pt")["input_ids"][0]
            return {"input_ids": ids, "labels": data_item["label"]}, len(ids)

    pairs = [{"prompt": "Say it", "completion": " yes"}, {"prompt": "a", "completion": "b"}]
    in_subspaces = [row | {"subspaces": [0, 2]} for row in INSTRUCTIONS]
    texts = [{"text": "Where does a bear live?", "label": 1}, {"text": "b", "label": 0}]
    named = {**FIELDS, "output_field": "output"}
    return {
        "supervised": made(library.ReftSupervisedDataset, INSTRUCTIONS, "f2+l3", **named),
        "supervised, shared, no stop": made(
            library.ReftSupervisedDataset,
            in_subspaces,
            "f2+l2",
            share_weights=True,
            no_stop=True,
            **named,
        ),
        "generation": made(
            library.ReftGenerationDataset,
            pairs,
            "f1+l1",
            prompt_field="prompt",
            completion_field="completion",
        ),
        "classification": made(
            library.dataset.ReftClassificationDataset,
            [{"text": "a bear", "answer": "in a forest"}],
            "f1+l1",
            input_field="text",
            label_field="answer",
        ),
        "raw": made(library.ReftRawDataset, in_subspaces, "f1+l1"),
        "raw, test": made(library.ReftRawDataset, INSTRUCTIONS, "l3", data_split="test"),
        "own": made(Own, texts, "f3+l3"),
    }


def pairs(library: Any) -> dict[str, Any]:
    tok = tokenizer()
    settings: dict[str, Any] = {"num_interventions": 2, "position": "f1+l1"}
    fields = {"chosen_output_field": "good", "rejected_output_field": "bad", **FIELDS}
    preferences = library.ReftPreferenceDataset(
        "task", None, tok, dataset=ANSWERS, share_weights=True, **fields, **settings
    )

    def asked(question: str, answer: str) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    talks = [
        {"a": asked("2+2?", "4"), "b": asked("2+2?", "I do not know"), "x": 0.2, "y": 0.7},
        {"a": asked("Hi", "Hello"), "b": asked("Hi", "Hell"), "x": 1.0, "y": 0.5},
    ]
    sides = {"conv_A_field": "a", "conv_B_field": "b"}
    rated = library.ReftRewardDataset(
        "task",
        None,
        tok,
        dataset=talks,
        conv_A_reward_field="x",
        conv_B_reward_field="y",
        **sides,
        **settings,
    )
    answers = [{"q": "Where?", "a": "here", "b": "there and not here"}]
    unrated = library.ReftRewardDataset(
        "task", None, tok, dataset=answers, prompt_field="q", **sides, **settings
    )
    collator = library.ReftRewardCollator(tokenizer=tok, padding="longest")
    judge = model(library, (0, 1), "SequenceClassification")
    judge.eval()  # which returns nothing in pyreft
    batch = collator([rated[0]])
    columns = {"sources->base": (None, batch["intervention_locations"].permute(1, 0, 2).tolist())}
    with torch.no_grad():
        masked = {name: batch[name] for name in ("input_ids", "attention_mask")}
        _, output = judge(masked, unit_locations=columns)
    # Of the longer conversation: where a shorter one ends differs between versions of transformers.
    longer = int(batch["attention_mask"].sum(1).argmax())
    return {
        "reward of the longer conversation": output.logits[longer].tolist(),
        "preferences": [plain(preferences[i]) for i in range(2)],
        "rewards": [plain(rated[i]) for i in range(2)],
        "rewards of answers": plain(unrated[0]),
        "batch of rewards": plain(collator([rated[0], rated[1]])),
        "batch of answers": plain(collator([unrated[0]])),
    }


def modules(library: Any) -> dict[str, Any]:
    tok = tokenizer()
    prompts, answers = ["Where does a bear live?", "b"], [" in a forest", "c d"]

    def made(module: dict[str, Any]) -> dict[str, Any]:
        examples = list(module["train_dataset"])
        return {"rows": plain(examples), "batch": plain(module["data_collator"](examples))}

    last = library.make_last_position_supervised_data_module
    multiple = library.make_multiple_position_supervised_data_module
    return {
        "last": made(last(tok, None, prompts, answers, num_interventions=2)),
        "last, by name": made(
            last(tokenizer=tok, model=None, inputs=prompts, outputs=answers, nonstop=True)
        ),
        # Of a prompt of one token, locations have another width, which no collator accepts.
        "multiple, short": plain(
            list(multiple(tok, None, prompts, answers, "f2+l3", 4)["train_dataset"])
        ),
        "multiple": made(multiple(tok, None, [prompts[0], "Say it"], answers, "f2+l3", 4)),
        "multiple, shared": made(
            multiple(tok, None, prompts, answers, positions="f1+l1", share_weights=True)
        ),
        "chat": made(
            library.dataset.make_last_position_supervised_chat_data_module(
                tok, None, prompts, answers, 1, True
            )
        ),
    }


def model(library: Any, layers: tuple[int, ...], kind: str = "CausalLM") -> Any:
    """A Llama and NoReFT units of layers, with the same weights in each library."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        num_labels=1,
    )
    base = getattr(transformers, f"LlamaFor{kind}")(config).eval()
    if kind != "CausalLM":
        generator = torch.Generator().manual_seed(0)
        base.score.weight.data = torch.randn(base.score.weight.shape, generator=generator)
    representations = []
    for seed, layer in enumerate(layers):
        unit = library.NoreftIntervention(
            embed_dim=WIDTH, low_rank_dimension=4, dtype=torch.float32, add_bias=False
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (
                unit.proj_layer.weight,
                unit.learned_source.weight,
                unit.learned_source.bias,
            ):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        representations.append(
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": 4,
                "intervention": unit,
            }
        )
    return library.get_reft_model(base, library.ReftConfig(representations=representations))


def losses(library: Any) -> dict[str, Any]:
    """Losses of three steps on the datasets."""
    tok = tokenizer()
    settings = {"num_interventions": 4, "position": "f2+l3"}
    fields = {**FIELDS, "output_field": "output"}
    answers = {**FIELDS, "chosen_output_field": "good", "rejected_output_field": "bad"}
    supervised = library.ReftSupervisedDataset(
        "task", None, tok, dataset=INSTRUCTIONS, **settings, **fields
    )
    preferences = library.ReftPreferenceDataset(
        "task", None, tok, dataset=ANSWERS, share_weights=True, **settings, **answers
    )
    collator = library.reft_trainer.make_data_collator(tok, None)
    prompts, outputs = ["Where does a bear live?", "Say it"], [" in a forest", "c d"]
    last = library.make_last_position_supervised_data_module(tok, None, prompts, outputs, 4)
    # No more positions than the shorter prompt has: of a column that locations name twice, pyreft
    # counts the gradient twice.
    multiple = library.make_multiple_position_supervised_data_module(
        tok, None, prompts, outputs, "f1+l1", 4
    )
    return {
        "losses, supervised": trained(library, supervised, collator, (0, 1, 0, 1)),
        "losses, preferences": trained(library, preferences, collator, (0, 1, 2, 2)),
        "losses, last": trained(
            library, last["train_dataset"], last["data_collator"], (0, 1, 2, 2)
        ),
        "losses, multiple": trained(
            library, multiple["train_dataset"], multiple["data_collator"], (0, 2, 0, 2)
        ),
    }


def trained(library: Any, rows: Any, collator: Any, layers: tuple[int, ...]) -> list[float]:
    with TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=3,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = library.ReftTrainerForCausalLM(
            model=model(library, layers), args=args, train_dataset=rows, data_collator=collator
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    text = json.dumps(rows(import_module(sys.argv[1])))
    Path(__file__).with_suffix(".json").write_text(f"{text}\n", encoding="utf-8")
