"""Write the rows of data sets as the studies on SmolLM2 and MiniLM read them.

python examples/studies/data.py FOLDER

FOLDER holds the data sets' own files: glue/CoLA.train.tsv, glue/CoLA.dev.tsv, glue/RTE.train.tsv,
glue/RTE.dev.tsv, ultrafeedback/ultrafeedback_1k.json, and of sst2/ and e2e/ a train.jsonl and a
test.jsonl of {"prompt", "output"} lines. The rows go to cola/, rte/, e2e_shuffled/,
ultrafeedback_short/ and, as the hub's GLUE has them, to glue_rows/ of the working directory. They
are shuffled with a fixed seed. Long ones are left out: of RTE, premises of more than 250
characters; of UltraFeedback, rows of more than 1,000.
"""

import csv
import json
import random
import sys
from pathlib import Path

PREMISE = 250
ROW = 1000


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write shuffled rows as JSON lines."""
    random.Random(0).shuffle(rows)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def tsv(path: Path, header: list[str] | None = None) -> list[dict[str, str]]:
    """The rows of a table of tabs without quotes."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, header, delimiter="\t", quoting=csv.QUOTE_NONE))


def cola(path: Path) -> list[dict[str, str]]:
    """Sentences, and whether linguists accept them."""
    return [
        {"sentence": row["sentence"], "label": ("unacceptable", "acceptable")[int(row["label"])]}
        for row in tsv(path, ["source", "label", "mark", "sentence"])
    ]


def rte(path: Path) -> list[dict[str, str]]:
    """Pairs of texts, and whether the first entails the second."""
    names = ("sentence1", "sentence2", "label")
    rows = [{name: row[name] for name in names} for row in tsv(path)]
    return [row for row in rows if len(row["sentence1"]) <= PREMISE]


def sst2(path: Path) -> list[dict[str, str]]:
    """Sentences of reviews, taken out of their prompts."""
    return [
        {
            "sentence": row["prompt"].removeprefix("Review: ").removesuffix("\nThe movie is"),
            "label": "positive" if row["output"] == " good" else "negative",
        }
        for row in json_lines(path)
    ]


def asked_grammar(row: dict[str, str]) -> dict[str, str]:
    """A row of CoLA as a prompt and its completion."""
    return {
        "prompt": f"Sentence: {row['sentence']}\nThe grammar is",
        "output": " good" if row["label"] == "acceptable" else " bad",
    }


def asked_entailment(row: dict[str, str]) -> dict[str, str]:
    """A row of RTE as a prompt and its completion."""
    return {
        "prompt": f"{row['sentence1']}\nQuestion: {row['sentence2']} True or false?\nAnswer:",
        "output": " true" if row["label"] == "entailment" else " false",
    }


def json_lines(path: Path) -> list[dict[str, str]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ultrafeedback(path: Path) -> list[dict[str, str]]:
    """Instructions with an answer, both short and in plain letters, which are few tokens."""
    return [row for row in json_lines(path) if is_short(row["instruction"] + row["output"])]


def is_short(text: str) -> bool:
    """Whether a row is short."""
    return len(text) <= ROW and text.isascii()


def main(folder: Path) -> None:
    """Read the data sets' files, and write the studies' own."""
    for split, origin in {"train": "train", "test": "dev"}.items():
        acceptability = cola(folder / f"glue/CoLA.{origin}.tsv")
        entailment = rte(folder / f"glue/RTE.{origin}.tsv")
        write(Path(f"cola/{split}.jsonl"), list(map(asked_grammar, acceptability)))
        write(Path(f"rte/{split}.jsonl"), list(map(asked_entailment, entailment)))
        write(Path(f"e2e_shuffled/{split}.jsonl"), json_lines(folder / f"e2e/{split}.jsonl"))
        write(Path(f"glue_rows/cola_{split}.jsonl"), acceptability)
        write(Path(f"glue_rows/rte_{split}.jsonl"), entailment)
        write(Path(f"glue_rows/sst2_{split}.jsonl"), sst2(folder / f"sst2/{split}.jsonl"))
    write(
        Path("ultrafeedback_short/rows.jsonl"),
        ultrafeedback(folder / "ultrafeedback/ultrafeedback_1k.json"),
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: data.py FOLDER")
    main(Path(sys.argv[1]))
