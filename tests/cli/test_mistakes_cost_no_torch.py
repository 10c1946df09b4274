"""A mistyped path, name or option is reported before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reftnoise.cli.main import COMMANDS

UNIT = '{"intervention": "%s", "layer": "all", "low_rank_dimension": 4, "positions": "%s"}'
TRAIN = ("train", "{tmp}/good.yaml", "--output_dir", "{tmp}/new")
STUDY = ("study", "{tmp}/study.yaml", "--output_dir", "{tmp}/new")
TUNE = ("tune", "{tmp}/good.yaml", "--output_dir", "{tmp}/new")
SERVER = ("--server", "http://localhost:8000/v1")
SERVED = (
    *("steer", "nowhere.jsonl", "--model", "tiny-chat", "--layers", "2", "--sizes", "[0.5]"),
    *("--methods", "[mean]", *SERVER, "--captures", "{tmp}"),
)
OTHER = ("--others.other", "nowhere")
MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("trian",), "did you mean 'train'?"),
    (("demo", "--sed", "1"), "did you mean '--seed'?"),
    (("demo", "--base", "./nowhere"), "./nowhere: no such directory of a model"),
    (("demo", "--output_dir", "{tmp}/good.yaml"), "expected a directory, found a file"),
    (("train", "nowhere.yaml"), "no such file"),
    (("train", "{tmp}"), "expected a YAML file, found a directory"),
    (("train", "{tmp}/good.yaml", "--sed", "1"), "did you mean '--seed'?"),
    ((*TRAIN, "--task", "boolk"), "did you mean 'boolq'?"),
    ((*TRAIN, "--task", '{"name": "glue", "dat": "a"}'), "no argument 'dat'"),
    ((*TRAIN, "--representations", f"[{UNIT % ('lorft', 'l1')}]"), "did you mean 'loreft'?"),
    ((*TRAIN, "--representations", f"[{UNIT % ('loreft', 'q1')}]"), "positions 'q1'"),
    ((*TRAIN, "--data.train", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ((*TRAIN, "--data.eval", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ((*TRAIN, "--data.template", "alpacca"), "template 'alpacca': expected plain"),
    ((*TRAIN, "--evaluation.data", "nowhere.csv"), "nowhere.csv: no such file"),
    ((*TRAIN, "--evaluation.by", "chance"), "evaluation.by: expected one of 'generation'"),
    ((*TRAIN, "--evaluation.limit", "0"), "evaluation.limit 0"),
    ((*TRAIN, "--training.learning_rate", "-1"), "training.learning_rate -1"),
    ((*TRAIN, "--model", "./nowhere"), "./nowhere: no such directory of a model"),
    ((*TRAIN, "--dtype", "float8"), "dtype 'float8': expected one of auto"),
    (("train", "{tmp}/good.yaml", "--output_dir", "{tmp}/run"), "holds a finished run"),
    (("train", "--resume", "--output_dir", "{tmp}/none"), "so no run to resume"),
    (("eval", "nowhere"), "expected the directory of a run or of an adapter"),
    (("eval", "{tmp}/begun"), "an unfinished run, which has no adapter yet"),
    (("eval", "{tmp}/run", "--bas"), "did you mean '--base'?"),
    (("eval", "{tmp}/run", "--task", "boolk"), "did you mean 'boolq'?"),
    (("eval", "{tmp}/run", "--evaluation.data", "null"), "nothing to score"),
    (("eval", "{tmp}/run", "--evaluation.data", "nowhere.csv"), "nowhere.csv: no such file"),
    (("eval", "{tmp}/run", "--data", "nowhere.csv"), "nowhere.csv: no such file"),
    (("eval", "{tmp}/run", "--by", "chance"), "evaluation.by: expected one of 'generation'"),
    ((*TRAIN, "--lr=-1"), "training.learning_rate -1"),
    ((*TRAIN, "--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (
        (*STUDY, "--subset", "rte"),
        "--subset may mean several options: expected --recipe.data.subset or --recipe.evaluation",
    ),
    ((*STUDY, "--seed", "3"), "did you mean '--seeds'?"),
    (("study", "nowhere.yaml"), "no such file"),
    ((*STUDY, "--jbs", "2"), "did you mean '--jobs'?"),
    ((*STUDY, "--baseline", '{"nose": "none"}'), "no axis 'nose'; did you mean 'noise'?"),
    ((*STUDY, "--recipe.task", "boolk"), "did you mean 'boolq'?"),
    (("steer", "nowhere.jsonl", "--model", "tiny-chat"), "nowhere.jsonl: no such file"),
    (("steer", "{tmp}/good.yaml", "--model", "tiny-chat"), "expected a file that ends in .jsonl"),
    (("steer", "nowhere.jsonl"), "steer: expected --model"),
    (("steer", "nowhere.jsonl", "--model", "./no"), "no such directory of a model"),
    (
        ("steer", "nowhere.jsonl", "--model", "tiny-chat", "--output_dir", "{tmp}/run"),
        "holds recipe.yaml already",
    ),
    (
        ("steer", "nowhere.jsonl", "--model", "tiny-chat", "--server", "http://localhost:8000"),
        "expected --server and --captures",
    ),
    (
        (
            *("steer", "nowhere.jsonl", "--model", "tiny-chat", "--layers", "2-3"),
            *("--server", "http://localhost:8000", "--captures", "{tmp}"),
        ),
        "layers 2-3: with a server, nothing is searched for: expected only one",
    ),
    ((*SERVED, "--budget", "1"), "budget 1.0: with a server, nothing is searched for"),
    ((*SERVED, "--dtype", "bfloat16"), "dtype 'bfloat16': a server has its own"),
    (("steer", "nowhere.jsonl", "--scales", "[0]"), "scales 0.0: expected numbers above 0"),
    (("steer", "nowhere.jsonl", "--metods", "[pca]"), "did you mean '--methods'?"),
    (("tune", "nowhere.yaml"), "no such file"),
    ((*TUNE, "--space.rnks", "[1]"), "did you mean '--space.ranks'?"),
    ((*TUNE, "--space.noises", "[neftun]"), "did you mean 'neftune'?"),
    ((*TUNE, "--space.positions", "[q1]"), "positions 'q1'"),
    ((*TUNE, "--held_out", "0"), "held_out 0"),
    ((*TUNE, "--pruning", "some"), "pruning: expected one of 'median'"),
    ((*TUNE, "--recipe.task", "boolk"), "did you mean 'boolq'?"),
    (("generate", "nowhere", "--prompt", "a"), "nowhere: no such directory"),
    (("generate", "{tmp}/begun", "--prompt", "a"), "an unfinished run"),
    (("generate", "{tmp}/run"), "no prompts"),
    (("generate", "{tmp}/run", "--prompt", "a", "--model", "./no"), "no such directory of a model"),
    (("generate", "{tmp}/run", "--input", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (("generate", "{tmp}/run", "--prompt", "a", "--output", "nowhere/a"), "no such directory"),
    (("generate", "{tmp}/run", "--prompt", "a", "--template", "chad"), "template 'chad': expected"),
    (("chat", "nowhere"), "nowhere: no such directory"),
    (("chat", "{tmp}/run", "--template", "chad"), "template 'chad': expected"),
    (("chat", "{tmp}/run", "--top_q", "1"), "did you mean '--top_p'?"),
    (("serve", "nowhere"), "nowhere: no such directory"),
    (("serve", "{tmp}/run", *OTHER), "nowhere: no such directory"),
    (("serve", "{tmp}/run", "--port", "99999"), "port 99999"),
    (("serve", "{tmp}/run", "--dtype", "float8"), "dtype 'float8': expected one of auto"),
    (("playground", "nowhere"), "nowhere: no such directory"),
    (("playground", "{tmp}/run", *OTHER), "nowhere: no such directory"),
    (("playground", "{tmp}/run", "--model", "./no"), "no such directory of a model"),
    (("report", "nowhere"), "expected a run (recipe.yaml) or a study"),
    (("report", "{tmp}/run", "--against", "nowhere"), "nowhere: no such directory"),
    (("inspect", "nowhere"), "nowhere: no such directory"),
    (("inspect", "{tmp}/run", *OTHER), "nowhere: no such directory"),
    (("inspect", "{tmp}/run", "--output", "a.png"), "the picture is of overlaps"),
    (("heads", "nowhere"), "nowhere: no such directory"),
    (("heads", "{tmp}/run", "--k", "0"), "k 0: expected at least 1"),
    (("export", "nowhere", "{tmp}/new", "--to", "lora"), "nowhere: no such directory"),
    (("export", "{tmp}/run", "{tmp}/new"), "to is missing: expected one of merged, lora"),
    (
        ("export", "{tmp}/run", "{tmp}/new", "--to", "gguf"),
        "to 'gguf': possible: merged, lora, gguf-control-vector",
    ),
    (("export", "{tmp}/run", "{tmp}/run", "--to", "lora"), "holds other files"),
    (("verify", "{tmp}/run"), "expected --server"),
    (("verify", "{tmp}/run", "--server", "localhost:8000"), "server 'localhost:8000': expected an"),
    (("verify", "nowhere", *SERVER), "nowhere: no such directory"),
    (("verify", "{tmp}/run", *SERVER, "--requests", "0"), "requests 0: expected at least 1"),
    (("verify", "{tmp}/run", *SERVER, "--longest", "0"), "longest 0: expected at least 1"),
    (("verify", "{tmp}/run", *SERVER, "--tolerance", "0"), "tolerance 0.0: expected a positive"),
    (("verify", "{tmp}/run", *SERVER, "--prompts", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (("convert", "nowhere", "{tmp}/new", "--base", "tiny-chat"), "nowhere: no such directory"),
    (("convert", "{tmp}/run/adapter", "{tmp}/new"), "expected --base"),
    (
        ("convert", "{tmp}/run/adapter", "{tmp}/new", "--base", "./no"),
        "no such directory of a model",
    ),
]
PROGRAM = """
import contextlib, io, json, sys
from reftnoise.cli.main import main

for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(arguments)
    heavy = [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
    print(json.dumps([code, said.getvalue(), heavy]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, list[str]]]:
    """Exit code, message and heavy modules of each mistake."""
    tmp = tmp_path_factory.mktemp("mistakes")
    recipe = f"representations: [{UNIT % ('loreft', 'l1')}]\ndata: {{train: tiny-chat}}\n"
    recipe += "evaluation: {data: tiny-chat}\n"
    (tmp / "good.yaml").write_text(recipe)
    study = "recipe:\n" + "".join(f"  {line}\n" for line in recipe.splitlines())
    (tmp / "study.yaml").write_text(study + "axes: {noise: {none: {}, some: {}}}\n")
    for name in ("run", "begun"):
        (tmp / name).mkdir()
        (tmp / name / "recipe.yaml").write_text(recipe)
    (tmp / "run" / "summary.json").write_text("{}")
    (tmp / "run" / "adapter").mkdir()
    (tmp / "run" / "adapter" / "reft_config.json").write_text("{}")
    commands = [[part.replace("{tmp}", str(tmp)) for part in parts] for parts, _ in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands), capture_output=True, text=True, check=True, cwd=tmp,
    )  # fmt: skip
    assert not (tmp / "new").exists()
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(MISTAKES)), ids=lambda i: " ".join(MISTAKES[i][0])[:60])
def test_a_mistake(index: int, outcomes: list[tuple[int, str, list[str]]]) -> None:
    code, message, heavy = outcomes[index]
    assert code == 2
    assert len(message.splitlines()) == 1
    assert MISTAKES[index][1] in message
    assert heavy == []


def test_every_command_is_mistaken() -> None:
    assert {arguments[0] for arguments, _ in MISTAKES} >= set(COMMANDS)


def test_the_names_of_units_are_known() -> None:
    code = (
        "from reftnoise.interventions import INTERVENTIONS\n"
        "from reftnoise.interventions import NoiseIntervention\n"
        "from reftnoise.training.resolved_run import noise_names, unit_names\n"
        "assert unit_names() == tuple(INTERVENTIONS)\n"
        "noises = {n for n, c in INTERVENTIONS.items() if issubclass(c, NoiseIntervention)}\n"
        "assert set(noise_names()) == noises"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
