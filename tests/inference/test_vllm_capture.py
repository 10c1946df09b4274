"""Hidden states that vLLM's workers write, against those of transformers here."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import reftnoise as rn
from reftnoise.config.positions import Positions
from reftnoise.engine.layout import named_tokens
from support.adapters import save
from support.vllm_engine import QUIET, capture, lora_request, started_engine, vllm
from support.vllm_server import saved_base

pytestmark = QUIET

CHUNK, TOLERANCE = 16, 1e-4
ENTRY = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "all"}
POSITIONS: list[Any] = [None, "l1", "all", "f3+l4", "f1", [-2, 0]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[rn.ReftModel, Path]:
    """The base with an adapter by name, and the adapter's directory."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    save(rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig([ENTRY])), directory)
    reft_model = rn.get_reft_model(rn.load_tiny_model()[0]).eval()
    reft_model.load_adapter(directory, "edited")
    return reft_model, directory


def engine(base: Path, folder: Path, **settings: Any) -> Any:
    return started_engine(
        base,
        max_model_len=128,
        enable_prefix_caching=True,
        additional_config={"reft": ["block_output"], "reft_capture": str(folder)},
        **settings,
    )


@pytest.fixture(scope="module")
def captured(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An engine of small chunks, with too few blocks for all that it may run, and its folder."""
    folder = tmp_path_factory.mktemp("states") / "made"
    settings = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 8, "num_gpu_blocks_override": 10}
    return engine(base, folder, **settings), folder


def drawn(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Prompts of which many begin alike."""
    draw = random.Random(seed)
    beginning = [draw.randrange(3, 300) for _ in range(40)]
    return [
        beginning * (index % 3 == 0)
        + [draw.randrange(3, 300) for _ in range(draw.randint(1, longest))]
        for index in range(count)
    ]


def sampling(name: str | None = None, positions: Any = None, **settings: Any) -> Any:
    extra = {"reft_capture": name, "reft_capture_positions": positions}
    extra = {key: value for key, value in extra.items() if value is not None}
    settings = {"temperature": 0, "max_tokens": 4, "ignore_eos": True} | settings
    return vllm.SamplingParams(**settings, extra_args=extra or None)


def expected(reft_model: rn.ReftModel, prompt: list[int], name: str | None = None) -> torch.Tensor:
    """What transformers computes: [layers, tokens, hidden]."""
    last: list[torch.Tensor] = []
    norm = reft_model.model.model.norm
    handle = norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.no_grad():
        outputs = reft_model(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            adapter_names=[name],
            output_hidden_states=True,
        )
    handle.remove()
    return torch.cat([*outputs.hidden_states[1:-1], *last])


def expect_file(folder: Path, name: str, states: torch.Tensor, positions: Any) -> None:
    tensors = load_file(folder / f"{name}.safetensors")
    length = states.shape[1]
    where = Positions.parse(positions or "l1")
    tokens = named_tokens(where, torch.arange(length), torch.tensor(length)).nonzero()[:, 0]
    assert int(tensors["prompt_length"]) == length
    assert tensors["positions"].tolist() == tokens.tolist()
    assert tensors["states"].shape == (states.shape[0], len(tokens), states.shape[2])
    difference = (tensors["states"] - states[:, tokens]).abs().max()
    assert difference <= TOLERANCE * max(1, states.abs().max())


def run(engine: Any, requests: dict[str, tuple[Any, ...]], peak: list[int]) -> dict[str, list[int]]:
    """What requests write that come in a random order, at any step."""
    running, draw, written = engine.llm_engine, random.Random(1), {}
    captures = captures_of(engine)
    waiting = draw.sample(sorted(requests), len(requests))
    while waiting or running.has_unfinished_requests():
        for _ in range(min(len(waiting), draw.choice([0, 1, 4]))):
            name = waiting.pop()
            prompt, settings, adapter = requests[name]
            running.add_request(name, {"prompt_token_ids": prompt}, settings, lora_request=adapter)
        for output in running.step():
            written[output.request_id] = list(output.outputs[0].token_ids)
        peak.append(captures.held())
    return written


def captures_of(engine: Any) -> Any:
    return served_by(engine).captures


def served_by(engine: Any) -> Any:
    core = engine.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.reftnoise


def test_states_of_mixed_requests_are_those_of_transformers(
    captured: tuple[Any, Path], ours: tuple[rn.ReftModel, Path]
) -> None:
    """In chunks, with and without capture, with and without an adapter, in one batch."""
    (running, folder), (reft_model, directory) = captured, ours
    requests, plain, places = {}, {}, {}
    for index, prompt in enumerate(drawn(40)):
        name = f"request-{index}"
        places[name] = positions = POSITIONS[index % len(POSITIONS)] if len(prompt) > 1 else None
        adapter = lora_request("edited", 1, directory) if index % 4 == 1 else None
        is_captured = index % 5 != 4
        settings = sampling(name, positions) if is_captured else sampling()
        requests[name] = prompt, settings, adapter
        plain[name] = prompt, sampling(), adapter
    peak: list[int] = []
    written = run(running, requests, peak)
    for index, (name, (prompt, settings, adapter)) in enumerate(requests.items()):
        if settings.extra_args:
            states = expected(reft_model, prompt, adapter and "edited")
            expect_file(folder, name, states, places[name])
        else:
            assert not (folder / f"{name}.safetensors").exists(), index
    assert written == run(running, plain, peak)
    assert not captures_of(running)
    # Prompts are computed one after the other, so that the states of few are held at a time.
    layers, _, width = states.shape
    assert 0 < max(peak) <= 2 * 100 * layers * width * 4
    assert all(path.suffix == ".safetensors" for path in folder.iterdir())


def test_cached_tokens_are_computed_where_they_are_read(
    captured: tuple[Any, Path], ours: tuple[rn.ReftModel, Path]
) -> None:
    (running, folder), prompt = captured, max(drawn(9), key=len)
    states = expected(ours[0], prompt)
    for name, positions, is_cached in (("a", "all", False), ("b", "all", False), ("c", "l1", True)):
        (output,) = running.generate(
            [{"prompt_token_ids": prompt}], sampling(name, positions), use_tqdm=False
        )
        expect_file(folder, name, states, positions)
        assert (output.num_cached_tokens > 0) == is_cached


def test_an_aborted_request_leaves_nothing(captured: tuple[Any, Path]) -> None:
    running, folder = captured
    before, prompt = set(folder.iterdir()), max(drawn(9, seed=5), key=len)
    engine, captures = running.llm_engine, captures_of(running)
    engine.add_request("x", {"prompt_token_ids": prompt}, sampling("aborted", "all"))
    engine.step()
    assert captures.held() > 0
    assert served_by(running).acts_on_batch()  # so that it takes no graph of the whole model
    engine.abort_request(["x"])
    running.generate([{"prompt_token_ids": prompt}], sampling(), use_tqdm=False)
    assert not captures
    assert set(folder.iterdir()) == before


def test_a_file_that_cannot_be_written_ends_its_request_alone(captured: tuple[Any, Path]) -> None:
    running, folder = captured
    (folder / "taken.safetensors").mkdir()
    prompt = drawn(1)[0]
    requests = {"taken": (prompt, sampling("taken"), None), "bare": (prompt, sampling(), None)}
    requests["other"] = prompt, sampling("other"), None
    written = run(running, requests, [])
    assert written["taken"] == []
    assert written["bare"] == written["other"] != []
    assert (folder / "other.safetensors").is_file()
    (folder / "taken.safetensors").rmdir()
    assert all(path.suffix == ".safetensors" for path in folder.iterdir())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"reft_capture": "../up"}, r"reft_capture '\.\./up': expected a name of at most 128"),
        ({"reft_capture": "a/b"}, "letters, digits, - and _"),
        ({"reft_capture": "a" * 129}, "at most 128"),
        ({"reft_capture": "a\n"}, "expected a name"),
        ({"reft_capture": ""}, "expected a name"),
        ({"reft_capture": 3}, "reft_capture 3: expected a name"),
        ({"reft_capture": "a", "reft_capture_positions": "x3"}, "positions 'x3': expected terms"),
        ({"reft_capture": "a", "reft_capture_positions": "l1+decode"}, "of the prompt alone"),
        ({"reft_capture": "a", "reft_capture_positions": [70]}, "a prompt of 5 tokens has none"),
        ({"reft_capture_positions": "l1"}, "expected reft_capture, a name, with it"),
    ],
)
def test_mistakes_are_refused(captured: tuple[Any, Path], extra: Any, message: str) -> None:
    running, folder = captured
    before = set(folder.iterdir())
    settings = vllm.SamplingParams(max_tokens=1, extra_args=extra)
    with pytest.raises(vllm.exceptions.VLLMValidationError, match=message):
        running.generate([{"prompt_token_ids": [5, 6, 7, 8, 9]}], settings, use_tqdm=False)
    assert set(folder.iterdir()) == before


def config(**additional: Any) -> Any:
    parallel = SimpleNamespace(pipeline_parallel_size=additional.pop("stages", 1))
    return SimpleNamespace(additional_config=additional, parallel_config=parallel)


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        ({"reft": ["mlp_output"], "reft_capture": "x"}, "expected 'block_output' in 'reft'"),
        ({"reft": ["block_output"], "reft_capture": 3}, "reft_capture 3: expected a path"),
        ({"reft": ["block_output"], "reft_capture": "x", "stages": 2}, "pipeline-parallel-size 1"),
    ],
)
def test_settings_that_cannot_be_combined(additional: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        capture.folder_of(config(**additional))


def test_a_server_without_a_folder_captures_nothing() -> None:
    processor: Any = SimpleNamespace(vllm_config=config(reft=["block_output"]))
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="the server has no folder"):
        capture.prepare_capture(lambda *_: None, processor, "1", [5], sampling("a"))


def test_a_compiled_model_is_read_too(
    base: Path, ours: tuple[rn.ReftModel, Path], tmp_path: Path
) -> None:
    running, (reft_model, directory) = engine(base, tmp_path, enforce_eager=False), ours
    prompts = drawn(6)
    outputs = running.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [sampling(str(index), "f1+l2") for index in range(6)],
        lora_request=[
            lora_request("edited", 1, directory) if index % 2 else None for index in range(6)
        ],
        use_tqdm=False,
    )
    assert len(outputs) == 6
    for index, prompt in enumerate(prompts):
        states = expected(reft_model, prompt, "edited" if index % 2 else None)
        expect_file(tmp_path, str(index), states, "f1+l2")


@pytest.mark.slow
def test_a_thousand_prompts(base: Path, ours: tuple[rn.ReftModel, Path], tmp_path: Path) -> None:
    running, prompts = engine(base, tmp_path), drawn(1000, seed=2)
    running.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [sampling(f"prompt-{index}") for index in range(1000)],
        use_tqdm=False,
    )
    for index, prompt in enumerate(prompts):
        expect_file(tmp_path, f"prompt-{index}", expected(ours[0], prompt), "l1")
