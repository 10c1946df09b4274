"""Adapters on transformers' own server, for small setups: one request at a time, no batching.

Each adapter is a model's name in the OpenAI API, and so is the base. (transformers' continuous
batching runs forward passes that edits do not reach; vLLM serves many users.)
"""

from typing import Any

import torch

from .._util.errors import nearest
from ..model import ReftModel
from .loading import BASE

try:
    from fastapi import HTTPException
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager
except ModuleNotFoundError as error:
    raise ValueError(f"serve needs {error.name}: pip install 'reftnoise[serve]'") from None


class _Choice:
    """A model with one of its adapters chosen, or none."""

    def __init__(self, reft_model: ReftModel, choice: str | None) -> None:
        self._reft_model, self._choice = reft_model, choice

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reft_model, name)

    def generate(self, **inputs: Any) -> torch.Tensor:
        rows = len(inputs["input_ids"])
        tokens: torch.Tensor = self._reft_model.generate(
            **inputs, adapter_names=[self._choice] * rows
        )
        return tokens


class _LoadedModels(model_manager.ModelManager):
    """Gives transformers' handlers our models, which are all loaded."""

    def __init__(self, reft_model: ReftModel, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        names = {BASE: None, **{name: name for name in reft_model.adapters}}
        self._named = {name: _Choice(reft_model, choice) for name, choice in names.items()}

    def process_model_name(self, model_id: str) -> str:
        """The name as it is, without the revision that transformers adds."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, **_: Any) -> tuple[Any, Any]:
        """The model of that name, and the tokenizer."""
        if model_id_and_revision not in self._named:
            hint = nearest(model_id_and_revision, self._named)
            raise HTTPException(404, f"model {model_id_and_revision!r} is not served; {hint}")
        return self._named[model_id_and_revision], self._tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The names, as the API lists models."""
        return [{"id": name, "object": "model", "owned_by": "reftnoise"} for name in self._named]


def start_server(
    reft_model: ReftModel, tokenizer: Any, *, host: str, port: int, waits: bool = True
) -> Serve:
    """Run transformers' server, with the base and each loaded adapter as a model.

    It returns when it is interrupted; with `waits=False`, it runs in a thread of its own until
    `kill_server()`.
    """
    manager = _LoadedModels(reft_model.eval(), tokenizer)
    original = model_manager.ModelManager
    model_manager.ModelManager = lambda **_: manager
    try:
        return Serve(host=host, port=port, log_level="error", non_blocking=not waits)
    finally:
        model_manager.ModelManager = original
