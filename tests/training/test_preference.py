"""Training on pairs of answers: losses and gradients by hand, data, runs and recipes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor
from transformers import TrainerCallback

import reftnoise as rn
from reftnoise.config.preference import PreferenceObjective
from reftnoise.data.tasks.base import RowError, parse_rows
from reftnoise.data.tasks.registry import get_task
from reftnoise.data.templates import fill
from reftnoise.engine.base.tiny import DIRECTORY
from reftnoise.evaluation import evaluate
from reftnoise.evaluation.likelihood import choice_pairs
from support.command_line import command
from support.trainer_runs import arguments, base_model, weights

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")

LAYER = 1
EXAMPLES = rn.load_tiny_examples("train")
ROWS = [{"prompt": e.prompt, "chosen": e.completion, "rejected": e.words} for e in EXAMPLES]
BIAS = {"layer": LAYER, "intervention": "bias", "dtype": "float64"}

Edit = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(DIRECTORY)


def trainer_of(
    tokenizer: Any,
    directory: Path,
    objective: Any,
    entry: dict[str, Any] = BIAS,
    rows: Any = ROWS,
    callbacks: Any = None,
    **settings: Any,
) -> Any:
    """A trainer of a unit with random weights on a random model in float64."""
    base = base_model(tokenizer).double()
    torch.manual_seed(3)
    reft_model = rn.get_reft_model(base, rn.ReftConfig([entry]))
    with torch.no_grad():
        for parameter in reft_model.interventions.parameters():
            parameter.normal_()
    data = rn.make_preference_data_module(tokenizer, reft_model, rows, eval_rows=rows[:6])
    return rn.ReftPreferenceTrainer(
        reft_model,
        arguments(directory, **settings),
        objective=objective,
        callbacks=callbacks,
        **data,
    )


def batch_of(trainer: Any, count: int = 3) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = trainer.data_collator(
        [trainer.train_dataset[i] for i in range(count)]
    )
    return batch


def log_prob(trainer: Any, pair: dict[str, Any], edit: Edit) -> tuple[Tensor, int]:
    """Of an answer without padding, by a hook on the base; and its number of tokens."""
    base, ids = trainer.model.model, torch.tensor(pair["input_ids"])
    handle = base.model.layers[LAYER].register_forward_hook(lambda _m, _a, output: edit(output))
    try:
        each = base(ids[None]).logits[0].log_softmax(-1)
    finally:
        handle.remove()
    start = pair["prompt_lengths"]
    sums = each[start - 1 : -1].gather(1, ids[start:, None]).sum()
    return sums, len(ids) - start


def unedited(hidden: Tensor) -> Tensor:
    return hidden


def sigma_loss(margins: list[Tensor]) -> Tensor:
    return torch.stack([(1 + (-margin).exp()).log() for margin in margins]).mean()


def expect_loss(trainer: Any, expected: Tensor) -> None:
    """The trainer's loss and gradients of its first batch."""
    loss = trainer.compute_loss(trainer.model.train(), batch_of(trainer))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    parameters = list(trainer.model.interventions.parameters())
    ours, by_hand = (torch.autograd.grad(total, parameters) for total in (loss, expected))
    assert ours[0].abs().max() > 1e-4
    torch.testing.assert_close(ours, by_hand, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("suppression", ["project", "negate", "none"])
def test_reps_is_its_formula(tokenizer: Any, suppression: Any, tmp_path: Path) -> None:
    objective = PreferenceObjective(name="reps", factors=[3.0], suppression=suppression)
    trainer = trainer_of(tokenizer, tmp_path, objective)
    [vector] = trainer.model.interventions.parameters()

    def steered(hidden: Tensor) -> Tensor:
        return hidden + 3.0 * vector

    def suppressed(hidden: Tensor) -> Tensor:
        if suppression == "negate":
            return hidden - 3.0 * vector
        return hidden - torch.relu(hidden @ vector)[..., None] * vector / vector.square().sum()

    def margin(winner: Any, loser: Any, edit: Edit) -> Tensor:
        before = log_prob(trainer, loser, unedited)[0] - log_prob(trainer, winner, unedited)[0]
        weight = max(float(before.detach()), 1.0)
        (won, length), (lost, other) = (
            log_prob(trainer, winner, edit),
            log_prob(trainer, loser, edit),
        )
        return weight * won / length - lost / other

    margins = []
    for index in range(3):
        chosen, rejected = (trainer.train_dataset[index][name] for name in ("chosen", "rejected"))
        margins.append(margin(chosen, rejected, steered))
        if suppression != "none":
            margins.append(margin(rejected, chosen, suppressed))
    expect_loss(trainer, sigma_loss(margins))


@pytest.mark.parametrize(("objective", "seed"), [("bipo", 0), ("bipo", 1), ("dpo", 0)])
def test_bipo_and_dpo_are_their_formulas(
    tokenizer: Any, objective: Any, seed: int, tmp_path: Path
) -> None:
    trainer = trainer_of(tokenizer, tmp_path, PreferenceObjective(name=objective, beta=0.3))
    [vector] = trainer.model.interventions.parameters()
    torch.manual_seed(seed)
    sign = float(torch.randint(2, ()) * 2 - 1) if objective == "bipo" else 1.0
    assert sign == {0: -1.0, 1: 1.0}[seed] or objective == "dpo"

    def steered(hidden: Tensor) -> Tensor:
        return hidden + sign * vector

    def shift(pair: Any) -> Tensor:
        return log_prob(trainer, pair, steered)[0] - log_prob(trainer, pair, unedited)[0]

    pairs = [trainer.train_dataset[index] for index in range(3)]
    margins = [sign * 0.3 * (shift(pair["chosen"]) - shift(pair["rejected"])) for pair in pairs]
    torch.manual_seed(seed)
    expect_loss(trainer, sigma_loss(margins))


@pytest.mark.parametrize("objective", ["bipo", "dpo"])
def test_a_vector_of_zeros_loses_log_two(tokenizer: Any, objective: Any, tmp_path: Path) -> None:
    """Its gradient is −β/2 times that of log p(y⁺) − log p(y⁻), whichever sign is drawn."""
    trainer = trainer_of(tokenizer, tmp_path, PreferenceObjective(name=objective, beta=0.3))
    [vector] = trainer.model.interventions.parameters()
    torch.nn.init.zeros_(vector)
    pairs = [trainer.train_dataset[index] for index in range(3)]
    ahead = sum(
        log_prob(trainer, pair["chosen"], lambda hidden: hidden + vector)[0]
        - log_prob(trainer, pair["rejected"], lambda hidden: hidden + vector)[0]
        for pair in pairs
    )
    [expected] = torch.autograd.grad(-0.15 * ahead / 3, [vector])
    for seed in (0, 1):
        torch.manual_seed(seed)
        loss = trainer.compute_loss(trainer.model.train(), batch_of(trainer))
        assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
        [gradient] = torch.autograd.grad(loss, [vector])
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


def test_each_pair_draws_a_factor_in_training_alone(tokenizer: Any, tmp_path: Path) -> None:
    trainer = trainer_of(tokenizer, tmp_path, "reps")
    batch = batch_of(trainer)
    seen = []
    original = trainer.model.using

    def using(**choices: Any) -> Any:
        seen.append(choices["strengths"])
        return original(**choices)

    trainer.model.using = using
    trainer.model.train()
    with torch.no_grad():
        for _ in range(20):
            trainer.compute_loss(trainer.model, batch)
    drawn = torch.stack([strengths.factors for strengths in seen if strengths is not None])
    assert torch.equal(drawn[:, :3], drawn[:, 3:6])  # chosen and rejected have the pair's
    assert set(drawn.flatten().tolist()) == set(map(float, range(1, 11)))
    assert len(set(map(tuple, drawn[:, :3].tolist()))) > 15
    seen.clear()
    trainer.model.eval()
    losses = {trainer.compute_loss(trainer.model, batch).item() for _ in range(2)}
    assert len(losses) == 1
    assert seen[0].factors[:3].tolist() == [1.0, 2.0, 3.0]


def test_pairs_are_learned_logged_and_saved(tokenizer: Any, tmp_path: Path) -> None:
    settings = {"eval_strategy": "epoch", "logging_steps": 4, "learning_rate": 0.1}
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    trainer = trainer_of(tokenizer, tmp_path, "dpo", loreft, ROWS[:16], **settings)
    trainer.train()
    history = trainer.state.log_history
    margins = [entry["eval_margin"] for entry in history if "eval_margin" in entry]
    assert margins[-1] > margins[0] > 0
    assert history[-2]["eval_accuracy"] == 1.0
    assert {"accuracy", "margin"} <= history[0].keys()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = rn.ReftModel.from_pretrained(base_model(tokenizer).double(), tmp_path / "adapter")
    ids = torch.arange(3, 9)[None]
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_each_evaluation_has_its_own_metrics(tokenizer: Any, tmp_path: Path) -> None:
    settings = {"eval_strategy": "epoch", "logging_steps": 100, "max_steps": 2}
    trainer = trainer_of(tokenizer, tmp_path, "dpo", rows=ROWS[:8], **settings)
    whole = trainer.eval_dataset
    trainer.eval_dataset = {"x": whole.select([0, 1]), "y": whole.select(range(2, 6))}
    trainer.predict(whole)
    trainer.train()
    merged = {key: v for entry in trainer.state.log_history for key, v in entry.items()}
    of_x, of_y = merged["eval_x_margin"], merged["eval_y_margin"]
    assert {"eval_x_accuracy", "eval_y_accuracy"} <= merged.keys()
    assert not {"accuracy", "margin", "eval_margin"} & merged.keys()  # no step was logged
    both = trainer.evaluate(whole, metric_key_prefix="test")
    assert both["test_margin"] == pytest.approx((2 * of_x + 4 * of_y) / 6, rel=1e-6)


def test_accumulated_steps_are_those_of_the_whole_batch(tokenizer: Any, tmp_path: Path) -> None:
    def trained(**settings: Any) -> Tensor:
        settings |= {"max_steps": 3, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9}
        trainer = trainer_of(tokenizer, tmp_path, "dpo", **settings)
        before = weights(trainer.model)
        trainer.train()
        return weights(trainer.model) - before

    whole = trained(per_device_train_batch_size=8)
    parts = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert whole.norm() > 1e-4
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


class StopAtStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_a_run_that_was_stopped_draws_on(tokenizer: Any, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tokenizer, tmp_path / "whole", "reps", **settings)
    whole.train()
    place = tmp_path / "stopped"
    trainer_of(tokenizer, place, "reps", callbacks=[StopAtStep()], **settings).train()
    resumed = trainer_of(tokenizer, place, "reps", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_units_that_have_no_direction(tokenizer: Any, tmp_path: Path) -> None:
    loreft = {"layer": LAYER, "intervention": "loreft", "low_rank_dimension": 2}
    with pytest.raises(ValueError, match=r"'project': LoreftIntervention at .* or supp"):
        trainer_of(tokenizer, tmp_path, "reps", loreft)
    with pytest.raises(ValueError, match=r"ReftR1Intervention at .* has no one direction"):
        trainer_of(tokenizer, tmp_path, "reps", {"layer": LAYER, "intervention": "reftr1"})
    trainer_of(tokenizer, tmp_path, "reps", loreft | {"low_rank_dimension": 1})
    trainer_of(tokenizer, tmp_path, PreferenceObjective(suppression="negate"), loreft)
    with pytest.raises(ValueError, match="expected another noise, such as bernoulli"):
        trainer_of(tokenizer, tmp_path, "dpo", {"intervention": "symnoise"})


def test_there_is_no_loss_but_the_objectives(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_smoothing_factor: the loss is the objective's"):
        trainer_of(tokenizer, tmp_path, "dpo", label_smoothing_factor=0.1)
    base = base_model(tokenizer)
    reft_model = rn.get_reft_model(base, rn.ReftConfig([BIAS]))
    data = rn.make_preference_data_module(tokenizer, reft_model, ROWS)
    own: dict[str, Any] = {"compute_loss_func": lambda *_, **__: torch.zeros(())}
    with pytest.raises(ValueError, match="compute_loss_func: the loss is the objective's"):
        rn.ReftPreferenceTrainer(reft_model, arguments(tmp_path), **data, **own)


# -- data ------------------------------------------------------------------------------------------


def test_a_batch_has_chosen_answers_first_and_equal_prompts(tokenizer: Any) -> None:
    base = base_model(tokenizer)
    data = rn.make_preference_data_module(tokenizer, base, ROWS[:2], template="chat")
    batch = data["data_collator"]([data["train_dataset"][index] for index in range(2)])
    expected = []
    for name in ("chosen", "rejected"):
        for row in ROWS[:2]:
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row[name]},
            ]
            expected.append(tokenizer.apply_chat_template(messages, tokenize=False))
    texts = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts == expected
    assert batch["prompt_lengths"][:2].tolist() == batch["prompt_lengths"][2:].tolist()
    as_messages = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {n: [{"role": "assistant", "content": row[n]}] for n in ("chosen", "rejected")}
        for row in ROWS[:2]
    ]
    of_messages = rn.make_preference_data_module(tokenizer, base, as_messages)["train_dataset"]
    assert of_messages[:] == data["train_dataset"][:]
    task = get_task("preference")  # which scores both alike, with the tokens of training
    scores, pairs = [], []
    for rows, template in ((ROWS[:2], "chat"), (as_messages, "plain")):
        parsed = parse_rows(task, datasets.Dataset.from_list(rows), name="scored")
        results = evaluate(base, tokenizer, task, parsed, by="likelihood", template=template)
        scores.append(results.scores)
        prompts = [fill(template, question.prompt, row) for row, question in parsed]
        pairs.append(choice_pairs(base, tokenizer, prompts, [q.choices for _, q in parsed]))
    assert scores[0] == scores[1]
    assert pairs[0] == pairs[1]
    trained = [row[n]["input_ids"] for row in of_messages for n in ("chosen", "rejected")]
    for (prompt, answer), ids in zip(pairs[1], trained, strict=True):
        assert prompt + answer == ids[: len(prompt + answer)]


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": "a"}] * 2,
    ],
)
def test_an_answer_that_is_scored_is_one_message(answer: Any) -> None:
    row = ROWS[0] | {"chosen": answer}
    with pytest.raises(ValueError, match="column 'chosen': expected a text, or one message"):
        get_task("preference").question(row)


def test_long_prompts_lose_the_same_beginning(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "a b c d e f g h i j k l", "chosen": " yes", "rejected": " no, not that one"}
    base = base_model(tokenizer)
    with caplog.at_level("WARNING", "reftnoise"):
        data = rn.make_preference_data_module(tokenizer, base, [row], max_length=14)
    [pair] = data["train_dataset"]
    prompts = [
        pair[name]["input_ids"][: pair[name]["prompt_lengths"]] for name in ("chosen", "rejected")
    ]
    assert prompts[0] == prompts[1]
    assert max(len(pair[name]["input_ids"]) for name in ("chosen", "rejected")) == 14
    assert (
        tokenizer.decode(pair["rejected"]["input_ids"])
        .removesuffix(tokenizer.eos_token)
        .endswith("l no, not that one")
    )
    assert "1 training pairs were longer than 14 tokens" in caplog.text


def test_answers_that_are_cut_are_counted(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "a", "chosen": " b c d e f g h i j k", "rejected": " b c d e f g h i j l"}
    with caplog.at_level("WARNING", "reftnoise"):
        rn.make_preference_data_module(tokenizer, base_model(tokenizer), [row], max_length=6)
    assert "1 training pairs were longer than 6 tokens" in caplog.text
    assert "1 of them have equal answers now" in caplog.text


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "a", "chosen": "b"}, "column 'rejected': expected a text or a list"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "column 'rejected': .* got 3"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "column 'chosen': expected an answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected are the same: 'b'"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
    ],
)
def test_rows_that_are_no_pairs(row: Any, error: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DIRECTORY, add_bos_token=False)
    with pytest.raises(RowError, match=error):
        rn.make_preference_data_module(tokenizer, base_model(tokenizer), [row])


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"name": "ppo"}, "objective 'ppo': expected 'reps', 'bipo' or 'dpo'"),
        ({"name": "reps", "beta": 0.1}, "beta: reps has none, but factors, suppression"),
        ({"name": "bipo", "factors": [1.0]}, "factors: bipo has none, but beta"),
        ({"name": "bipo", "beta": 0}, "beta 0: expected a positive number"),
        ({"factors": []}, r"factors \[\]: expected a list of positive numbers"),
        ({"factors": [1.0, -2.0]}, "expected a list of positive numbers"),
        ({"suppression": "clamp"}, "suppression 'clamp': expected 'project', 'negate' or 'none'"),
    ],
)
def test_objectives_that_are_none(values: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PreferenceObjective(**values)


# -- recipes ---------------------------------------------------------------------------------------


def test_pairs_train_what_a_recipe_does_not_name(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS[:8])
    (tmp_path / "pairs.jsonl").write_text(lines, encoding="utf-8")
    options = ["--task", "preference", "--data.train", tmp_path / "pairs.jsonl", "--device", "cpu"]
    options += ["--training.max_steps", 2, "--output_dir", tmp_path / "run", "--quiet", "true"]
    assert command("train", *options) == 0
    base = rn.load_tiny_model()[0]
    reft_model = rn.ReftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    moved = weights(reft_model)
    assert moved.isfinite().all()
    assert moved.any()


def test_a_recipe_trains_and_scores_pairs(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS[:8])
    (tmp_path / "pairs.jsonl").write_text(lines, encoding="utf-8")
    recipe = f"""
representations: [{{layer: {LAYER}, intervention: bias}}]
task: {{name: preference, objective: bipo, beta: 0.5}}
data: {{train: {tmp_path / "pairs.jsonl"}, template: chat}}
training: {{learning_rate: 5.0e-2, max_steps: 6}}
evaluation: {{data: {tmp_path / "pairs.jsonl"}}}
device: cpu
dtype: float32
output_dir: {tmp_path / "run"}
"""
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert command("train", tmp_path / "recipe.yaml", "--quiet", "true") == 0
    assert command("eval", tmp_path / "run", "--base", "true", "--quiet", "true") == 0
    entries = json.loads((tmp_path / "run" / "scores.json").read_text(encoding="utf-8"))
    assert [entry["by"] for entry in entries] == ["likelihood", "likelihood"]
    adapted, base = (entry["scores"] for entry in entries)
    assert adapted["margin"] > base["margin"] + 0.1
    model, tokenizer = rn.load_tiny_model()
    ahead = []
    for row in ROWS[:8]:
        asked, sums = [{"role": "user", "content": row["prompt"]}], []
        for name in ("chosen", "rejected"):
            whole = [*asked, {"role": "assistant", "content": row[name]}]
            ids = tokenizer.apply_chat_template(whole, return_tensors="pt")["input_ids"][0]
            prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
            start = len(prompt["input_ids"])
            with torch.no_grad():
                each = model(ids[None]).logits[0].log_softmax(-1)
            sums.append(float(each[start - 1 : -1].gather(1, ids[start:, None]).sum()))
        ahead.append(sums[0] - sums[1])
    assert base["margin"] == pytest.approx(sum(ahead) / 8, rel=1e-4)
    assert base["accuracy"] == sum(value > 0 for value in ahead) / 8
