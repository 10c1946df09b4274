"""Answers of a model in this process: base and adapters as rows of one batch."""

import itertools
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextvars import copy_context
from queue import Queue
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ...adapters.library import AdapterChoice
from ...analysis.inspection import EditNorms, observed
from ...config.interventions import argument_defaults
from ...config.positions import POSITION_FIELDS
from ...data.templates import fill
from ...data.tokenization import prompt_tokens, smallest_limit
from ...engine.base.sites import input_embeddings, layer_of
from ...evaluation.generation import ends_of
from ...evaluation.scoring import evaluating
from ...interventions import NoiseIntervention
from ...interventions.registry import INTERVENTIONS, intervention_class
from ...model import ReftModel
from ..loading import BASE
from ..prompts import default_template, generate_arguments
from .asking import NO_NOISE, TOGETHER, Answer, Answerer, AnswerRequest

_PARTS = itertools.count()
"""Numbers of requests, so that parts of adapters have other names in each."""


class LocalModel(Answerer):
    """A base with adapters that are loaded by name.

    Args:
        reft_model: model with the adapters.
        tokenizer: tokenizer of the base.
        title: what the page calls the base.
        templates: template that each adapter was trained with; those that have none get the
            tokenizer's chat template, if there is one. Base and all adapters together get that of
            the adapters, if it is the same.
    """

    noises = tuple(
        name
        for name, unit in INTERVENTIONS.items()
        if issubclass(unit, NoiseIntervention) and "alpha" in argument_defaults(unit)
    )

    def __init__(
        self,
        reft_model: ReftModel,
        tokenizer: Any,
        title: str,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        self._model, self._tokenizer, self.title = reft_model, tokenizer, title
        adapters = list(reft_model.adapters)
        default = default_template(tokenizer)
        own = {name: (templates or {}).get(name, default) for name in adapters}
        shared = next(iter(own.values())) if len(set(own.values())) == 1 else default
        self.templates = {BASE: shared, **own, TOGETHER: shared}
        self.scaled = adapters
        self.names = [BASE, *adapters, *([TOGETHER] if len(adapters) > 1 else [])]
        units = [shape for frozen in reft_model.adapters.values() for shape in frozen.shapes]
        layers = {layer_of(reft_model.model, unit.site) for unit in units}
        self.layers = sorted(layer for layer in layers if layer is not None)
        self.positions = [
            name for name in POSITION_FIELDS if any(getattr(u.positions, name) for u in units)
        ]

    def answers(self, request: AnswerRequest) -> Iterator[Mapping[str, Answer]]:
        """All answers as they grow, while the model writes in a thread of its own."""
        tokens = self._tokens(request)
        ends = ends_of(self._model, self._tokenizer)
        writing = _Writing(self._tokenizer, tokens, ends)
        prefix = f"part {next(_PARTS)} of "
        choices = self._choices(request, prefix)
        errors: list[Exception] = []

        def generate() -> None:
            try:
                with (
                    evaluating(self._model, request.decoding.seed),
                    observed(self._model, writing.see),
                ):
                    self._model.generate(
                        **self._inputs(request, tokens),
                        **generate_arguments(request.decoding, self._tokenizer, self._model),
                        adapter_names=[choices[name] for name in request.names],
                        streamer=writing,
                        stopping_criteria=StoppingCriteriaList([writing.is_stopped]),
                    )
            except Exception as error:  # raised again in the thread that reads
                errors.append(error)
            finally:
                writing.answers.put(None)

        thread = threading.Thread(
            target=copy_context().run, args=(generate,), name="reftnoise", daemon=True
        )
        thread.start()
        try:
            while (answers := writing.answers.get()) is not None:
                yield answers
        finally:
            writing.stop.set()
            thread.join()
            for part in [name for name in self._model.adapters if name.startswith(prefix)]:
                self._model.delete_adapter(part)
        if errors:
            raise errors[0]

    def _tokens(self, request: AnswerRequest) -> dict[str, list[int]]:
        """The prompt's tokens by answer's name, in the template of the request or of the adapter.

        Raises:
            ValueError: a template does not fit, or leaves no room for new tokens.
        """
        limit = smallest_limit(self._tokenizer, self._model, None)
        room = None if limit is None else limit - (request.decoding.max_new_tokens or 0)
        tokens = {}
        for name in request.names:
            template = request.decoding.template_or(self.templates[name])
            prompt = fill(template, request.prompt, {})
            tokens[name] = prompt_tokens(self._tokenizer, prompt)
            if room is not None and len(tokens[name]) > room:
                raise ValueError(
                    f"the prompt has {len(tokens[name])} tokens, but the model has room for "
                    f"{max(room, 0)} before {request.decoding.max_new_tokens} new ones"
                )
        return tokens

    def _choices(self, request: AnswerRequest, prefix: str) -> dict[str, AdapterChoice]:
        """By answer's name, the adapters that edit its row.

        The part of an adapter at the chosen layers and positions has `prefix` before its name.
        """
        layers, positions = request.layers, request.positions
        is_part = layers is not None or positions is not None
        scales = {}
        for name in self.scaled:
            chosen = prefix + name if is_part else name
            if is_part:
                self._model.adapters.derive(chosen, name, layers=layers, positions=positions)
            scales[chosen] = request.scales.get(name, 1.0)
        alone = {name.removeprefix(prefix): {name: scale} for name, scale in scales.items()}
        return {BASE: None, **alone, TOGETHER: scales}

    def _inputs(self, request: AnswerRequest, tokens: Mapping[str, list[int]]) -> dict[str, Any]:
        """Rows, padded on the left with their own first token; noise is on the prompt alone."""
        prompts = list(tokens.values())
        width = max(map(len, prompts))
        rows = [prompt[:1] * (width - len(prompt)) + prompt for prompt in prompts]
        ids = torch.tensor(rows, device=self._model.device)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=ids.device)
        mask = (torch.arange(width, device=ids.device) >= width - lengths).long()
        if request.noise == NO_NOISE:
            return {"input_ids": ids, "attention_mask": mask}
        noise_class: Any = intervention_class(request.noise)
        embeds = input_embeddings(self._model.model)(ids)
        # One draw for each prompt, so that only adapters differ; the first one of a pair.
        draws: dict[tuple[int, ...], Tensor] = {}
        for row, prompt in enumerate(prompts):
            states = embeds[row : row + 1, -len(prompt) :]
            if tuple(prompt) not in draws:
                noise = noise_class(alpha=request.alpha).delta(states.repeat(2, 1, 1))
                draws[tuple(prompt)] = noise[0]
            states += draws[tuple(prompt)]
        return {"inputs_embeds": embeds, "attention_mask": mask}


class _Writing(BaseStreamer):
    """Takes each step's tokens and edit norms, and puts answers into a queue."""

    def __init__(self, tokenizer: Any, prompts: Mapping[str, list[int]], ends: list[int]) -> None:
        self.answers: Queue[dict[str, Answer] | None] = Queue()
        self.stop = threading.Event()
        self._tokenizer, self._prompts, self._ends = tokenizer, prompts, ends
        self._width = max(map(len, prompts.values()))
        self._norms: dict[str, list[Float[Tensor, "rows tokens"]]] = defaultdict(list)
        self._written: list[list[int]] = [[] for _ in prompts]
        self._is_prompt = True

    def see(self, site: str, norms: Float[Tensor, "rows tokens"]) -> None:
        self._norms[site].append(norms.cpu())

    def put(self, value: Int[Tensor, " rows"]) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for tokens, new in zip(self._written, value.tolist(), strict=True):
            if not (tokens and tokens[-1] in self._ends):
                tokens.append(new)
        if self.answers.empty():  # the reader keeps up
            self._show()

    def end(self) -> None:
        self._show()

    def _show(self) -> None:
        joint = {site: torch.cat(parts, dim=1) for site, parts in self._norms.items()}
        self.answers.put(
            {name: self._answer(row, name, joint) for row, name in enumerate(self._prompts)}
        )

    def is_stopped(self, ids: Tensor, _: Any, **__: Any) -> Tensor:
        return torch.full(ids.shape[:1], self.stop.is_set(), device=ids.device)

    def _answer(self, row: int, name: str, joint: Mapping[str, Tensor]) -> Answer:
        tokens, prompt = self._written[row], self._prompts[name]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        read = [*prompt, *tokens[:-1]]  # the model has not read the last one
        padding = self._width - len(prompt)
        own = {site: norms[row, padding:] for site, norms in joint.items()}
        edited = {site: norms for site, norms in own.items() if norms.any()}
        if not edited:
            return Answer(text)
        width = len(read)
        norms = [pad(row[:width], (0, max(width - len(row), 0))) for row in edited.values()]
        labels = [self._tokenizer.decode([token]) for token in read]
        return Answer(text, EditNorms(list(edited), labels, torch.stack(norms)), len(prompt))
