"""Adapters in vLLM's engine, against our own `generate`, token for token.

`make test-vllm` runs these, in an environment of their own: vLLM pins what it needs.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import reftnoise as rn
from reftnoise.adapters.directory import AdapterFiles
from support.adapters import MISTAKES, moved, save
from support.vllm_engine import QUIET, graphs, lora_request, plugin, started_engine, vllm, worker

pytestmark = QUIET

COMPONENTS = ["block_output", "attention_output", "mlp_output", "embeddings", "head_output"]
ENTRIES: dict[str, list[dict[str, Any]]] = {
    "last": [{"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}],
    "ends": [
        {
            "layer": [0, 2],
            "intervention": "loreft",
            "low_rank_dimension": 2,
            "positions": "f7+l7",
            "tied": False,
            "act_fn": "gelu",
        }
    ],
    "all": [
        {"layer": 1, "intervention": "noreft", "low_rank_dimension": 3, "positions": "all"},
        {"intervention": "neftune", "alpha": 5.0},
    ],
    "decode": [
        {
            "layer": [1, 3],
            "intervention": "direft",
            "low_rank_dimension": 2,
            "positions": "all+decode",
        }
    ],
    "first": [
        {"layer": "all", "intervention": "noreft", "low_rank_dimension": 4, "positions": "f3"}
    ],
    "mlp": [
        {
            "layer": "all",
            "component": "mlp_output",
            "intervention": "adapter",
            "low_rank_dimension": 5,
        }
    ],
    "attention": [{"layer": "0-2", "component": "attention_output", "intervention": "bias"}],
    "red": [{"layer": "all", "component": "mlp_output", "intervention": "red"}],
    "gated": [
        {"layer": "0-1", "component": "mlp_output", "intervention": "red", "gate": "probe"},
        {"layer": 2, "intervention": "bias", "gate": "norm"},
    ],
    "heads": [
        {
            "layer": "0-2",
            "component": "head_output",
            "heads": [0, 2],
            "intervention": "loreft",
            "low_rank_dimension": 3,
            "positions": "all+decode",
        },
        {"layer": [1, 3], "component": "head_output", "heads": [3], "intervention": "bias"},
    ],
    "embeddings": [
        {
            "component": "embeddings",
            "intervention": "lobireft",
            "low_rank_dimension": 2,
            "positions": "l2",
        },
        {"layer": 2, "intervention": "nodireft", "low_rank_dimension": 8, "positions": [0, -1]},
        {"layer": 3, "intervention": "consreft", "low_rank_dimension": 2},
    ],
}
NAMES = [None, *ENTRIES]
TOKENS, VOCABULARY = 20, 512


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose heads are as wide as vLLM wants them."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.08,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def loaded(base: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(base).eval()


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, entries) in enumerate(ENTRIES.items()):
        torch.manual_seed(seed)
        save(rn.get_reft_model(loaded(base), rn.ReftConfig(entries)), folder / name)
    return {name: folder / name for name in ENTRIES}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """50 prompts of 1 to 90 tokens, of which many begin alike."""
    draw = random.Random(0)
    beginning = [draw.randrange(3, VOCABULARY) for _ in range(40)]
    return [
        beginning * (index % 3 == 0)
        + [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 50))]
        for index in range(50)
    ]


@pytest.fixture(scope="module")
def ours(base: Path, adapters: dict[str, Path]) -> rn.ReftModel:
    reft_model = rn.get_reft_model(loaded(base))
    for name, directory in adapters.items():
        reft_model.load_adapter(directory, name)
    return reft_model


def expected(ours: rn.ReftModel, prompt: list[int], choice: Any) -> list[int]:
    ids = torch.tensor([prompt])
    tokens = ours.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=[choice],
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens[0, len(prompt) :].tolist()


def engine(base: Path, components: list[str] = COMPONENTS, **settings: Any) -> Any:
    return started_engine(
        base,
        skip_tokenizer_init=True,
        max_model_len=256,
        enable_prefix_caching=True,
        disable_log_stats=False,
        **{"additional_config": {"reft": components}} | settings,
    )


@pytest.fixture(scope="module")
def small_engine(base: Path) -> Any:
    """Chunks of 16 tokens, and too few blocks for all that it may run at once."""
    return engine(base, max_num_batched_tokens=16, max_num_seqs=16, num_gpu_blocks_override=12)


def sampling(**extra: Any) -> Any:
    return vllm.SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, **extra
    )


def request_for(name: str | None, adapters: dict[str, Path]) -> Any:
    return None if name is None else lora_request(name, NAMES.index(name), adapters[name])


def test_this_vllm_is_as_the_plugin_knows_it() -> None:
    assert list(plugin.differences()) == []


def test_a_continuous_batch_of_all_adapters_is_ours_token_for_token(
    small_engine: Any, prompts: Any, ours: rn.ReftModel, adapters: dict[str, Path]
) -> None:
    draw = random.Random(1)
    choices = {index: NAMES[index % len(NAMES)] for index in range(len(prompts))}
    waiting = draw.sample(sorted(choices), len(choices))
    written: dict[int, list[int]] = {}
    running = small_engine.llm_engine
    while waiting or running.has_unfinished_requests():
        for _ in range(min(len(waiting), draw.choice([0, 0, 1, 5]))):
            index = waiting.pop()
            prompt = {"prompt_token_ids": prompts[index]}
            lora = request_for(choices[index], adapters)
            running.add_request(str(index), prompt, sampling(), lora_request=lora)
        for output in running.step():
            if output.finished:
                written[int(output.request_id)] = list(output.outputs[0].token_ids)
    for index, prompt in enumerate(prompts):
        assert written[index] == expected(ours, prompt, choices[index]), choices[index]
    texts = {name: [expected(ours, prompt, name) for prompt in prompts[:6]] for name in NAMES}
    assert all(texts[name] != texts[other] for name, other in combinations(NAMES, 2))
    counts = {one.name: one.value for one in small_engine.get_metrics() if hasattr(one, "value")}
    assert counts["vllm:num_preemptions"] > 0


def test_cached_prompts_are_not_read_by_other_adapters(
    small_engine: Any, prompts: Any, ours: rn.ReftModel, adapters: dict[str, Path]
) -> None:
    prompt = max(prompts, key=len)
    for name in [name for name in NAMES for _ in range(2)]:
        lora = request_for(name, adapters)
        (output,) = small_engine.generate(
            [{"prompt_token_ids": prompt}], sampling(), lora_request=lora, use_tqdm=False
        )
        assert list(output.outputs[0].token_ids) == expected(ours, prompt, name)
    assert output.num_cached_tokens > 0


@pytest.mark.parametrize("name", ["last", "ends", "all", "decode", "embeddings"])
def test_a_longer_prompt_reads_no_state_that_a_shorter_one_has_edited(
    small_engine: Any, ours: rn.ReftModel, adapters: dict[str, Path], name: str
) -> None:
    """As in the next turn of a chat, which begins with the last prompt and its answer."""
    lora, draw = request_for(name, adapters), random.Random(7)

    def written(prompt: list[int]) -> tuple[list[int], int]:
        (output,) = small_engine.generate(
            [{"prompt_token_ids": prompt}], sampling(), lora_request=lora, use_tqdm=False
        )
        return list(output.outputs[0].token_ids), output.num_cached_tokens

    for length in (30, 32, 75):
        small_engine.reset_prefix_cache()
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        answer, _ = written(prompt)
        assert answer == expected(ours, prompt, name)
        longer = [*prompt, *answer, *(draw.randrange(3, VOCABULARY) for _ in range(15))]
        answer, cached = written(longer)
        assert answer == expected(ours, longer, name)
    assert cached >= 64  # whole blocks before the shorter prompt's end


def test_an_adapter_saved_again_under_one_path_is_another(
    small_engine: Any, prompts: Any, base: Path, tmp_path: Path
) -> None:
    prompt = max(prompts, key=len)
    written = []
    for seed in range(2):
        torch.manual_seed(seed)
        save(rn.get_reft_model(loaded(base), rn.ReftConfig(ENTRIES["all"])), tmp_path)
        ours = rn.get_reft_model(loaded(base))
        ours.load_adapter(tmp_path, "again")
        lora = lora_request("again", 1, tmp_path)
        (output,) = small_engine.generate(
            [{"prompt_token_ids": prompt}], sampling(), lora_request=lora, use_tqdm=False
        )
        written.append(list(output.outputs[0].token_ids))
        assert written[-1] == expected(ours, prompt, "again")
    assert written[0] != written[1]


def test_equal_weights_at_other_positions_are_another_adapter(
    small_engine: Any, prompts: Any, base: Path, tmp_path: Path
) -> None:
    for positions in ("all", "f1"):
        torch.manual_seed(0)
        entry = ENTRIES["all"][0] | {"positions": positions}
        save(rn.get_reft_model(loaded(base), rn.ReftConfig([entry])), tmp_path / positions)
        ours = rn.get_reft_model(loaded(base))
        ours.load_adapter(tmp_path / positions, "one")
        lora = lora_request(positions, 1, tmp_path / positions)
        (output,) = small_engine.generate(
            [{"prompt_token_ids": prompts[0]}], sampling(), lora_request=lora, use_tqdm=False
        )
        assert list(output.outputs[0].token_ids) == expected(ours, prompts[0], "one")
    weights, others = (AdapterFiles.read(tmp_path / name).weights() for name in ("all", "f1"))
    assert all(torch.equal(weights[name], others[name]) for name in weights | others)


def test_a_runs_directory_stands_for_its_adapter(
    small_engine: Any, prompts: Any, ours: rn.ReftModel, adapters: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(adapters["first"], tmp_path / "adapter")
    lora = lora_request("run", 1, tmp_path)
    (output,) = small_engine.generate(
        [{"prompt_token_ids": prompts[0]}], sampling(), lora_request=lora, use_tqdm=False
    )
    assert list(output.outputs[0].token_ids) == expected(ours, prompts[0], "first")


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0])
def test_a_request_scales_its_edits(
    small_engine: Any, prompts: Any, ours: rn.ReftModel, adapters: dict[str, Path], scale: float
) -> None:
    prompt = max(prompts, key=len)
    (output,) = small_engine.generate(
        [{"prompt_token_ids": prompt}],
        sampling(extra_args={"reft_scale": scale}),
        lora_request=request_for("all", adapters),
        use_tqdm=False,
    )
    assert list(output.outputs[0].token_ids) == expected(ours, prompt, {"all": scale})


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_harms_its_request_alone(
    small_engine: Any,
    prompts: Any,
    ours: rn.ReftModel,
    adapters: dict[str, Path],
    tmp_path: Path,
    mistake: str,
) -> None:
    make, message = MISTAKES[mistake]
    make(adapters["last"], tmp_path)
    prompt = {"prompt_token_ids": prompts[0]}
    lora = lora_request("wrong", 1, tmp_path)
    with pytest.raises(vllm.exceptions.VLLMValidationError, match=message):
        small_engine.generate([prompt], sampling(), lora_request=lora, use_tqdm=False)
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="reft_scale 'much': expected"):
        small_engine.generate(
            [prompt],
            sampling(extra_args={"reft_scale": "much"}),
            lora_request=request_for("all", adapters),
            use_tqdm=False,
        )
    lora = request_for("last", adapters)
    (output,) = small_engine.generate([prompt], sampling(), lora_request=lora, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == expected(ours, prompts[0], "last")


def test_a_path_cannot_carry_a_digest(
    small_engine: Any, prompts: Any, adapters: dict[str, Path]
) -> None:
    digest = AdapterFiles.read(adapters["last"]).identity()
    lora = lora_request("forged", 1, f"{adapters['last']}#sha256:{digest}")
    prompt = {"prompt_token_ids": prompts[0]}
    with pytest.raises(vllm.exceptions.VLLMValidationError, match=r"no reft_config\.json"):
        small_engine.generate([prompt], sampling(), lora_request=lora, use_tqdm=False)


def written_together(
    engine: Any, prompt: list[int], requests: dict[str, Any], between: Callable[[], None]
) -> dict[str, Any]:
    """What requests write that run together; `between` is called before their first step."""
    running, written = engine.llm_engine, {}
    for name, lora in requests.items():
        running.add_request(name, {"prompt_token_ids": prompt}, sampling(), lora_request=lora)
    between()
    while running.has_unfinished_requests():
        written.update({output.request_id: output.outputs[0] for output in running.step()})
    return written


def test_an_edit_that_fails_ends_its_requests_alone(
    small_engine: Any,
    prompts: Any,
    ours: rn.ReftModel,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And leaves no state in the cache of prompts that a later request would read."""
    small_engine.reset_prefix_cache()
    prompt = max(prompts, key=len)
    requests = {"bare": None, "edited": request_for("all", adapters)}
    applied = 0

    def fail_in_the_third_step(edits: Any, *states: Any) -> None:
        nonlocal applied
        applied += len(edits)
        if applied == 3:  # which fills the first block of 32 tokens: it edits 15 in a step
            raise RuntimeError("a planted fault")
        worker_apply(edits, *states)

    worker_apply = worker.apply_
    with monkeypatch.context() as patch:
        plant = partial(patch.setattr, worker, "apply_", fail_in_the_third_step)
        written = written_together(small_engine, prompt, requests, plant)
        assert written["edited"].finish_reason == "error"
        assert list(written["edited"].token_ids) == []
        assert list(written["bare"].token_ids) == expected(ours, prompt, None)
    written = written_together(small_engine, prompt, requests, lambda: None)
    assert list(written["edited"].token_ids) == expected(ours, prompt, "all")


def test_an_adapter_that_is_gone_ends_its_requests_alone(
    small_engine: Any, prompts: Any, ours: rn.ReftModel, base: Path, tmp_path: Path
) -> None:
    torch.manual_seed(9)
    save(rn.get_reft_model(loaded(base), rn.ReftConfig(ENTRIES["all"])), tmp_path / "gone")
    requests = {"bare": None, "gone": lora_request("gone", 1, tmp_path / "gone")}
    remove = partial(shutil.rmtree, tmp_path / "gone")
    written = written_together(small_engine, prompts[0], requests, remove)
    assert written["gone"].finish_reason == "error"
    assert list(written["bare"].token_ids) == expected(ours, prompts[0], None)


# -- compiled, and tensor parallel -----------------------------------------------------------------


def expect_equal(
    engine: Any, prompts: Any, ours: rn.ReftModel, adapters: dict[str, Path], *without: str
) -> None:
    """All adapters, in one call."""
    names = [name for name in NAMES if name not in without]
    names = [names[index % len(names)] for index in range(len(prompts))]
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling(),
        lora_request=[request_for(name, adapters) for name in names],
        use_tqdm=False,
    )
    for output, prompt, name in zip(outputs, prompts, names, strict=True):
        assert list(output.outputs[0].token_ids) == expected(ours, prompt, name), name


def test_a_compiled_model_is_edited_too(
    base: Path, prompts: Any, ours: rn.ReftModel, adapters: dict[str, Path]
) -> None:
    expect_equal(engine(base, enforce_eager=False), prompts, ours, adapters)


@pytest.fixture
def compiled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs, vLLM compiles a model as a whole; here in pieces, as on GPUs, without Inductor."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    own = current_platform.check_and_update_config

    def check_and_update_config(config: Any) -> None:
        compilation = config.compilation_config
        mode = compilation.mode
        own(config)
        if mode == CompilationMode.VLLM_COMPILE:
            compilation.mode, compilation.backend, compilation.compile_sizes = mode, "eager", []

    monkeypatch.setattr(current_platform, "check_and_update_config", check_and_update_config)
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")


@pytest.mark.usefixtures("compiled_in_pieces")
def test_pieces_of_a_model_end_at_edits(
    base: Path,
    prompts: Any,
    ours: rn.ReftModel,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.compilation.counter import compilation_counter

    steps: list[tuple[bool, bool, bool]] = []
    step = worker.ServedAdapters.step

    @contextmanager
    def recorded(served: Any) -> Iterator[None]:
        batch, count = served._runner.input_batch, served._runner.input_batch.num_reqs
        decodes = batch.num_computed_tokens_cpu[:count] >= batch.num_prompt_tokens[:count]
        excluded = served.acts_on_batch()
        with step(served):
            steps.append((bool(decodes.all()), excluded, bool(worker._current)))
            yield

    monkeypatch.setattr(worker.ServedAdapters, "step", recorded)
    before = compilation_counter.num_piecewise_graphs_seen
    settings = {"reft": ["block_output"], "reft_graphs": True}
    pieces = engine(base, enforce_eager=False, additional_config=settings)
    # 4 attentions, 4 edits, and the 9 pieces between them.
    assert compilation_counter.num_piecewise_graphs_seen - before == 17
    others = ["mlp", "attention", "red", "gated", "heads", "embeddings"]
    expect_equal(pieces, prompts, ours, adapters, *others)
    expect_equal(pieces, prompts[:2], ours, adapters, *others, "all", "decode", "ends", "first")
    # A graph of the whole model is left to steps in which no edit acts.
    assert all(excluded for _, excluded, acts in steps if acts)
    assert all(excluded == acts for decodes, excluded, acts in steps if decodes)
    assert {excluded for decodes, excluded, _ in steps if decodes} == {True, False}


def test_a_step_with_edits_takes_no_graph_of_the_whole_model() -> None:
    from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    plugin.register()
    config = VllmConfig()
    compilation = config.compilation_config
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.splitting_ops = list(compilation._attention_ops)
    compilation.cudagraph_capture_sizes = [1, 2, 4, 8]
    compilation.max_cudagraph_capture_size, compilation.compile_sizes = 8, []
    compilation.post_init_cudagraph_sizes()
    dispatcher = CudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(compilation.cudagraph_mode, 1)

    def modes() -> list[str]:
        steps = [(4, True), (4, False), (100, False)]  # tokens, and whether all requests decode
        return [dispatcher.dispatch(n, uniform_decode=all_)[0].name for n, all_ in steps]

    assert modes() == ["FULL", "PIECEWISE", "NONE"]
    dispatcher.reftnoise = SimpleNamespace(acts_on_batch=lambda: True)
    assert modes() == ["PIECEWISE", "PIECEWISE", "NONE"]
    dispatcher.reftnoise = SimpleNamespace(acts_on_batch=lambda: False)
    assert modes() == ["FULL", "PIECEWISE", "NONE"]
    wrong = SimpleNamespace(additional_config={"reft_graphs": "yes"})
    with pytest.raises(ValueError, match="reft_graphs 'yes': expected true or false"):
        graphs.uses_graphs(wrong)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_a_model_in_two_parts_is_edited_too(
    base: Path,
    prompts: Any,
    ours: rn.ReftModel,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    parts = SimpleNamespace(
        additional_config={"reft": COMPONENTS},
        lora_config=None,
        compilation_config=SimpleNamespace(mode=None),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
    )
    with pytest.raises(ValueError, match="'head_output' needs --tensor-parallel-size 1"):
        worker.components_of(parts)
    components = [name for name in COMPONENTS if name != "head_output"]
    expect_equal(engine(base, components, tensor_parallel_size=2), prompts, ours, adapters, "heads")


# -- exports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_exports_need_no_plugin(to: str, tmp_path: Path) -> None:
    """vLLM's own LoRA, and a checkpoint that has biases for an edit, on 50 prompts."""
    pytest.importorskip("peft", reason="needs peft: pip install peft")
    _, tokenizer = rn.load_tiny_model()
    torch.manual_seed(3)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, initializer_range=0.08)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    unit = {"intervention": "ablate"} if to == "lora" else {"intervention": "bias"}
    entries = [
        {"layer": "all", "component": component, "positions": "all+decode", **unit}
        for component in ("mlp_output", "attention_input")
    ]
    reft_model = rn.get_reft_model(loaded(tmp_path / "base"), rn.ReftConfig(entries)).eval()
    moved(reft_model)
    for name, buffer in reft_model.interventions.named_buffers():
        if name.endswith("vector"):
            buffer.normal_()
    reft_model.save_pretrained(tmp_path / "adapter")
    place, base = tmp_path / "export", tmp_path / "base"
    rn.export_adapter(tmp_path / "adapter", place, to, model=str(base), prompts=["Who are you?"])

    draw = random.Random(0)
    lengths = [draw.randint(1, 40) for _ in range(50)]
    asked = [[draw.randrange(3, len(tokenizer)) for _ in range(length)] for length in lengths]
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 128}
    if to == "lora":
        settings |= {"enable_lora": True, "max_lora_rank": 8}
    engine = started_engine(place if to == "merged" else base, **settings)
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in asked],
        sampling(),
        lora_request=lora_request("edits", 1, place) if to == "lora" else None,
        use_tqdm=False,
    )
    for output, prompt in zip(outputs, asked, strict=True):
        ids = torch.tensor([prompt])
        own = reft_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(output.outputs[0].token_ids) == own[0, len(prompt) :].tolist()
