"""CUDA graphs around our operator: where vLLM splits its model, and which graphs a step may use.

vLLM compiles its model in pieces that end at attention, captures each piece as a CUDA graph, and
runs attention eagerly between them. With `{"reft_graphs": true}` in `--additional-config`, our
operator is one of these ends. vLLM also captures the whole model for steps that only decode. In
such a graph our operator does nothing, so only a step in which no edit acts may take it.
"""

from collections.abc import Collection

from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig

OPERATOR = "vllm::reftnoise_edit"


def uses_graphs(config: VllmConfig) -> bool:
    """Whether edits run between graphs, by `--additional-config`; off by default.

    Raises:
        ValueError: the setting is neither true nor false.
    """
    additional = config.additional_config
    graphs = additional.get("reft_graphs", False) if isinstance(additional, dict) else False
    if not isinstance(graphs, bool):
        raise ValueError(f"additional_config reft_graphs {graphs!r}: expected true or false")
    return graphs


def split_at_edits(config: VllmConfig) -> None:
    """Let the pieces of a model that is compiled in pieces end at our operator, too."""
    compilation = config.compilation_config
    ends = compilation.splitting_ops or []
    if compilation.mode == CompilationMode.VLLM_COMPILE and OPERATOR not in ends:
        compilation.splitting_ops = [*ends, OPERATOR]  # a new list: vLLM's own may be shared


def without_whole_graphs(invalid_modes: Collection[CUDAGraphMode] | None) -> set[CUDAGraphMode]:
    """The kinds of graphs that a step with edits must not use."""
    return {*(invalid_modes or ()), CUDAGraphMode.FULL}
