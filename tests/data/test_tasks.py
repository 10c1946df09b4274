"""Tasks: what they make of rows, which answers they read of texts, and which they take as right."""

import json
import math
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

import reftnoise as rn
from reftnoise._util import yaml
from reftnoise.data.tasks.base import Question, parse_rows
from reftnoise.data.tasks.classifier import ClassifierTask
from reftnoise.data.tasks.examples import as_examples
from reftnoise.data.tasks.glue import SUBSETS, score
from reftnoise.data.tasks.registry import TASKS, get_task
from reftnoise.engine.base.tiny import DIRECTORY
from support.data import REAL

COMMONSENSE = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "arc_easy": ("answer1", "answer2", "answer3", "answer4"),
    "arc_challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}
PASSAGES = {
    "The cat sat on it.": ("The", " cat sat on it."),
    "\n One\ttwo": ("\n One", "\ttwo"),
    "猫がいる": ("猫", "がいる"),
    " ab ": (" a", "b "),
    "猫" * 400 + "\n次の文": ("猫", "猫" * 399 + "\n次の文"),
}
NUMBERS = ["gsm8k", "mawps", "svamp", "addsub"]


# -- by name ---------------------------------------------------------------------------------------


ARGUMENTS: dict[str, dict[str, Any]] = {
    "classification": {"labels": ["good", "bad"]},
    "glue": {"subset": "rte"},
}


@pytest.mark.parametrize("name", TASKS)
def test_every_name_is_its_tasks(name: str) -> None:
    task = get_task({"name": name} | ARGUMENTS.get(name, {}))
    assert task.name == name
    assert type(task).__doc__


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("textt", r"task 'textt' is not known; did you mean 'text'\? possible: text, raw_text"),
        ({"name": "classification", "label": []}, "no argument 'label'; did you mean 'labels'"),
        ({"name": "classification"}, "'classification' lacks its argument 'labels'"),
        ({"name": "text", "labels": []}, "'text' has no argument 'labels'; possible: none"),
        ({"labels": []}, r"task {'labels': \[\]}: expected a 'name'"),
        ({"name": "classification", "labels": "good"}, "labels 'good': expected a list of two"),
        ({"name": "classification", "labels": ["a", "a"]}, "two or more different labels"),
        ({"name": "classification", "labels": 3}, "labels 3: expected a list of two or more"),
        ({"name": "classification", "labels": [1, "1"]}, "two or more different labels"),
        (
            {"name": "classification", "labels": ["a", None]},
            "label None: expected a text, a number",
        ),
        ({"name": "classification", "labels": ["a", " b"]}, "label ' b': expected a text without"),
        ({"name": "glue", "subset": "wnli"}, "subset 'wnli': expected one of mnli, sst2"),
        ({"name": "aqua", "letter": "any"}, "letter 'any': expected 'first' or 'last'"),
        ({"name": "instruct", "repetition_penalty": 0}, "repetition_penalty 0: expected above 0"),
        ({"name": "instruct", "no_repeat_ngram_size": -1}, "-1: expected at least 0"),
    ],
)
def test_mistaken_names_and_arguments(spec: str | dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        get_task(spec)


# -- texts and labels ------------------------------------------------------------------------------


def test_text() -> None:
    task = get_task("text")
    question = task.question({"prompt": "2 + 2 =", "completion": " four\n", "more": 1})
    assert question == Question("2 + 2 =", " four\n", "four")
    assert task.extract(" four ") == "four"
    found = task.scores(["four", "five", "Four"], ["four"] * 3)
    assert found == {"exact_match": 1 / 3}


@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_classification(space: str) -> None:
    task = get_task({"name": "classification", "labels": ["good", "not good"]})
    question = task.question({"prompt": "It is", "completion": f"{space}good"})
    choices = (f"{space}good", f"{space}not good")
    assert question == Question(
        "It is", f"{space}good", "good", choices, choice_answers=("good", "not good")
    )
    texts = [" good", "good\n", " not good", "good film", ""]
    right = [task.is_right(task.extract(text), "good") for text in texts]
    assert right == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "It is", "completion": " fine"}, "completion ' fine': expected one of good, b"),
        ({"prompt": "It is", "output": " good"}, "no column 'completion' in prompt, output"),
        ({"prompt": 3, "completion": " good"}, "column 'prompt': expected a text, got 3"),
    ],
)
def test_rows_that_are_no_classification(row: dict[str, Any], expected: str) -> None:
    task = get_task({"name": "classification", "labels": ["good", "bad"]})
    with pytest.raises(ValueError, match=expected):
        task.question(row)


@pytest.mark.parametrize(
    ("labels", "value", "completion"),
    [
        ([0, 1], 1, "1"),
        ([0, 1], "1", "1"),
        ([0, 1], 1.0, "1"),  # a column with nulls in it
        ([0.5, 1.5], 0.5, "0.5"),
        ([True, False], True, "true"),
        ([True, False], " false", " false"),
        (["01", "1"], "01", "01"),
    ],
)
def test_labels_of_any_scalar_type(labels: list[Any], value: Any, completion: str) -> None:
    task = get_task({"name": "classification", "labels": labels})
    question = task.question({"prompt": "a", "completion": value})
    assert (question.completion, question.answer) == (completion, completion.strip())
    assert completion in question.choices


def test_a_recipes_yes_and_no() -> None:
    task = get_task({"name": "classification", "labels": yaml.load("[yes, no]")})
    with pytest.raises(ValueError, match="'yes': expected one of true, false; a recipe's yes and"):
        task.question({"prompt": "a", "completion": "yes"})


@pytest.mark.parametrize("streaming", [False, True])
def test_class_labels_have_their_names(streaming: bool) -> None:
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"prompt": datasets.Value("string"), "completion": label})
    columns = {"prompt": ["a", "b"], "completion": [1, 0]}
    rows: Any = datasets.Dataset.from_dict(columns, features=features)
    rows = rows.to_iterable_dataset() if streaming else rows
    task = get_task({"name": "classification", "labels": ["good", "bad"]})
    assert [row.question.answer for row in parse_rows(task, rows)] == ["good", "bad"]
    examples = as_examples(rows, task, "plain", None)
    assert [row["completion"] for row in examples] == ["good", "bad"]
    if not streaming:
        tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
        module = rn.make_last_position_supervised_data_module(tokenizer, None, rows, nonstop=True)
        texts = [
            tokenizer.decode(row["input_ids"][row["prompt_lengths"] :])
            for row in module["train_dataset"]
        ]
        assert texts == ["good", "bad"]


def test_labels_of_glue_as_texts() -> None:
    classes, numbers = (get_task({"name": "glue", "subset": name}) for name in ("sst2", "stsb"))
    assert isinstance(classes, ClassifierTask)
    assert isinstance(numbers, ClassifierTask)
    assert [classes.label({"label": label}) for label in ("1", "negative", 1.0)] == [1, 0, 1]
    assert numbers.label({"label": "3.5"}) == 3.5


def test_instructions() -> None:
    task = get_task({"name": "instruct", "repetition_penalty": 1.2})
    row = {"instruction": "Add.", "output": "That is 3.", "input": "1 and 2"}
    assert task.question(row) == Question("Add.\n\n1 and 2", "That is 3.", "That is 3.")
    assert task.question(row | {"input": ""}).prompt == "Add."
    # Of 3 + 1 runs of four words one was there before, of 5 + 2 pairs all but "b c", twice.
    assert task.scores(["b c b c b c", "a b c"], ["a", ""]) == {
        "words": 4.5,
        "repetition": 1 / 3,
        "distinct": 3 / 7,
        "words_of_answers": 0.5,
        "repetition_of_answers": 0.0,
        "distinct_of_answers": 0.0,
    }
    assert task.generation == {
        "do_sample": False,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 5,
    }


# -- commonsense -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMONSENSE)
def test_commonsense(name: str) -> None:
    task, choices = get_task(name), COMMONSENSE[name]
    asked = f"Which? Answer format: {'/'.join(choices)}"
    question = task.question({"instruction": asked, "answer": choices[1], "input": ""})
    assert (question.prompt, question.answer) == (f"{asked}\n", choices[1])
    assert question.completion == f"the correct answer is {choices[1]}"
    assert question.choices == tuple(f"the correct answer is {choice}" for choice in choices)
    assert question.choice_answers == choices
    assert (task.max_new_tokens, task.generation) == (32, {"do_sample": False})
    for choice in choices:
        assert task.extract(f" the correct answer is {choice}\n\nQ: {choices[0]}") == choice
        assert task.is_right(choice, choices[1]) == (choice == choices[1])
    assert task.extract("I do not know") == ""
    assert task.scores([choices[1], "", choices[0], choices[0]], [choices[1]] * 4) == {
        "accuracy": 1 / 4
    }
    with pytest.raises(ValueError, match=f"answer 'maybe': expected one of {choices[0]}, "):
        task.question({"instruction": asked, "answer": "maybe"})


def test_choices_are_the_rows_own() -> None:
    task = get_task("arc_easy")
    row = {"instruction": "Which?\n\nAnswer format: answer1/answer2/answer3 ", "answer": "answer3"}
    assert len(task.question(row).choices) == 3
    with pytest.raises(ValueError, match="answer 'answer4': expected one of answer1, answer2, an"):
        task.question(row | {"answer": "answer4"})
    assert len(task.question({"instruction": "Which?", "answer": "answer5"}).choices) == 5


# -- arithmetic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    ("text", "answer", "is_right"),
    [
        ("4 * 8 = 32. The answer is 32.", "32.0", True),
        ("The answer is 1,450,000 dollars", "1450000.0", True),
        ("The answer is -15", "-15.0", True),
        ("It is 1.8333", "1.8333333333333335", True),
        ("It is 1.83", "1.8333333333333335", False),
        ("It is 12, not 13", "12.0", False),
        ("32 and then 5-3", "-3", True),  # as the published evaluation reads it
        ("The answer is unknown.", "0.0", False),
        ("", "0.0", False),
        ("so $ 2.50 .", "2.5", True),
        ("9.001", "9", True),
        ("9.0011", "9", False),
    ],
)
def test_numbers(name: str, text: str, answer: str, is_right: bool) -> None:
    task = get_task(name)
    question = task.question({"instruction": "How many?", "output": text, "answer": answer})
    assert (question.prompt, question.completion) == ("How many?\n", text)
    assert task.is_right(task.extract(text), question.answer) is is_right
    assert task.scores([task.extract(text)], [question.answer]) == {"accuracy": float(is_right)}


def test_answers_that_are_no_numbers() -> None:
    task, row = get_task("svamp"), {"instruction": "How many?", "output": "3"}
    assert task.question(row | {"answer": 3.0}).answer == "3.0"
    for answer in ("three", "", "nan", "inf"):
        with pytest.raises(ValueError, match=f"answer '{answer}': expected a number"):
            task.question(row | {"answer": answer})
    with pytest.raises(ValueError, match="no column 'answer' in instruction, output"):
        task.question(row)


def test_how_answers_are_drawn() -> None:
    assert get_task("gsm8k").generation == {"do_sample": False}
    drawn = get_task({"name": "gsm8k", "sampling": True}).generation
    assert drawn == {"do_sample": True, "temperature": 0.3, "top_p": 0.75, "top_k": 40}
    assert get_task("gsm8k").max_new_tokens == 512


def test_gsm8ks_own_rows() -> None:
    task, reasoning = get_task("gsm8k"), "48 + 24 = <<48+24=72>>1,072\n#### 1,072"
    question = task.question({"question": "How many clips?", "answer": reasoning})
    assert question == Question("How many clips?\n", reasoning, "1072")
    assert task.is_right(task.extract(reasoning), question.answer)
    with pytest.raises(ValueError, match="answer '72': expected reasoning, '####' and a number"):
        task.question({"question": "How many clips?", "answer": "72"})


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("The answer is (D).", "D", "D"),
        ("By car, A is 3.The answer is (C).", "B", "C"),
        ("E", "E", "E"),
        ("the sum is 5", "", ""),
        ("Both", "B", ""),
    ],
)
def test_letters(text: str, first: str, last: str) -> None:
    row = {"instruction": "Which?", "output": text, "answer": "D"}
    for name, expected in (("first", first), ("last", last)):
        task = get_task({"name": "aqua", "letter": name})
        assert task.question(row).answer == "D"
        assert task.extract(text) == expected
        assert task.is_right(task.extract(text), "D") is (expected == "D")
    with pytest.raises(ValueError, match="answer 'F': expected a letter from A to E"):
        task.question(row | {"answer": "F"})


# -- classifiers -----------------------------------------------------------------------------------


def glue(subset: str) -> ClassifierTask:
    task = get_task({"name": "glue", "subset": subset})
    assert isinstance(task, ClassifierTask)
    return task


@pytest.mark.parametrize("subset", [name for name in SUBSETS if name != "stsb"])
def test_glues_classes(subset: str) -> None:
    task = glue(subset)
    texts = {name: f"a {name}" for name in SUBSETS[subset].texts}
    assert task.num_labels == len(task.classes) == (3 if subset == "mnli" else 2)
    for index, name in enumerate(task.classes):
        row = texts | {"label": index}
        assert task.texts(row) == tuple(texts.values())
        assert task.label(row) == task.label(texts | {"label": name}) == index
        question = task.question(row)
        assert (question.prompt, question.answer) == ("\n".join(texts.values()), name)
        logits = [float(n == index) for n in range(len(task.classes))]
        assert task.prediction(logits) == name
        assert task.is_right(name, question.answer)
    first, second = task.classes[:2]
    metric = SUBSETS[subset].metric
    found = task.scores([first, first, second, second], [first, first, second, first])
    # Of 2 classes: (2·1 − 1·0) / √(3·1·2·2), with `first` as what is counted
    expected = 3 / 4 if metric == "accuracy" else 2 / math.sqrt(12)
    assert found == {metric: pytest.approx(expected)}
    for label in (-1, 7, "other", True, None):
        with pytest.raises(ValueError, match=f"label {label!r}: expected one of {first}, "):
            task.label(texts | {"label": label})


def test_glues_numbers() -> None:
    task, row = glue("stsb"), {"sentence1": "a", "sentence2": "b", "label": 3.5}
    assert (task.num_labels, task.label(row)) == (1, 3.5)
    assert task.question(row).answer == "3.5"
    assert [task.is_right(p, "3.5") for p in ("3.0", "4.0", "4.1")] == [True, True, False]
    predictions, answers = ["1.0", "2.0", "4.0"], ["0.0", "1.0", "2.0"]
    expected = float(np.corrcoef([1, 2, 4], [0, 1, 2])[0, 1])
    assert task.scores(predictions, answers) == {"pearson": pytest.approx(expected)}
    assert task.scores(["1.0", "1.0"], ["0.0", "1.0"]) == {"pearson": 0.0}
    with pytest.raises(ValueError, match="label 'high': expected a number"):
        task.label(row | {"label": "high"})


def test_scores_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    predicted, labels = np.random.default_rng(0).integers(2, size=(2, 200))
    assert score("accuracy", predicted, labels) == metrics.accuracy_score(labels, predicted)
    matthews = metrics.matthews_corrcoef(labels, predicted)
    assert score("matthews", predicted, labels) == pytest.approx(matthews)


# -- real rows -------------------------------------------------------------------------------------

FOLDERS = {
    "boolq": "commonsense/boolq",
    "piqa": "commonsense/piqa",
    "social_i_qa": "commonsense/social_i_qa",
    "winogrande": "commonsense/winogrande",
    "arc_easy": "commonsense/ARC-Easy",
    "arc_challenge": "commonsense/ARC-Challenge",
    "openbookqa": "commonsense/openbookqa",
}
# Outputs of the arithmetic sets are another model's answers, of which this share is right. They
# were found without these tasks: by the number or letter after "The answer is".
WRITTEN = {
    "aqua": ("math/AQuA", {"letter": "last"}),
    "gsm8k": ("math/gsm8k", {}),
    "svamp": ("math/SVAMP", {}),
    "addsub": ("math/AddSub", {}),
}


def rows_of(path: str) -> list[Mapping[str, Any]]:
    file = REAL / "data" / path
    if not file.is_file():
        pytest.skip(f"needs REFTNOISE_REAL: data/{path}")
    text = file.read_text(encoding="utf-8")
    return (
        [json.loads(line) for line in text.splitlines()] if path.endswith("l") else json.loads(text)
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_real_outputs_are_their_answers(name: str) -> None:
    task = get_task(name)
    rows = rows_of(f"{FOLDERS[name]}/test.json")
    questions = [task.question(row) for row in rows]
    assert [question.completion for question in questions] == [row["output"] for row in rows]
    answers = [question.answer for question in questions]
    assert task.scores([task.extract(row["output"]) for row in rows], answers) == {"accuracy": 1.0}
    assert all(question.completion in question.choices for question in questions)


@pytest.mark.parametrize("name", WRITTEN)
def test_real_reasoning(name: str) -> None:
    folder, arguments = WRITTEN[name]
    task, rows = get_task({"name": name} | arguments), rows_of(f"{folder}/test.json")
    questions = [task.question(row) for row in rows]
    agreed = said = 0
    for row, question in zip(rows, questions, strict=True):
        _, mark, ending = row["output"].rpartition("The answer is ")
        ending = ending.strip(" .$()").replace(",", "").removesuffix("%")
        is_plain = ending.replace(".", "", 1).isdigit() or ending in "ABCDE"
        if mark and ending and is_plain:
            said += 1
            by_hand = (
                ending == question.answer
                if name == "aqua"
                else math.isclose(float(ending), float(question.answer), abs_tol=1e-3, rel_tol=0)
            )
            agreed += by_hand == task.is_right(task.extract(row["output"]), question.answer)
    assert said > len(rows) / 2
    assert agreed == said


def test_every_real_row_of_mawps() -> None:
    task = get_task("mawps")
    assert len([task.question(row) for row in rows_of("math/mawps/test.json")]) == 238


def test_real_rows_of_gsm8ks_authors() -> None:
    task, rows = get_task("gsm8k"), rows_of("math/gsm8k/train_official.jsonl")
    questions = [task.question(row) for row in rows]
    predictions = [task.extract(question.completion) for question in questions]
    assert task.scores(predictions, [q.answer for q in questions]) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("path", "labels"),
    [
        ("rt_polarity/test.jsonl", ["good", "bad"]),
        ("sst2/test.jsonl", ["good", "bad"]),
        (
            "trec/test.jsonl",
            ["number", "place", "person", "description", "thing", "abbreviation"],
        ),
    ],
)
def test_real_labels(path: str, labels: list[str]) -> None:
    task = get_task({"name": "classification", "labels": labels})
    for row in rows_of(path):
        question = task.question({"prompt": row["prompt"], "completion": row["output"]})
        assert question.choices[question.choice_answers.index(question.answer)] == row["output"]


@pytest.mark.parametrize("text", PASSAGES)
def test_all_of_a_raw_text_is_learnt_but_its_beginning(text: str) -> None:
    question = get_task("raw_text").question({"text": text})
    assert (question.prompt, question.completion) == PASSAGES[text]
    assert question.prompt + question.completion == text


@pytest.mark.parametrize("text", ["", " ", "a", " a\n"])
def test_a_raw_text_of_nothing_to_learn(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected more than a word|'text'"):
        get_task("raw_text").question({"text": text})
