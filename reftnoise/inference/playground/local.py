"""Answers of a model in this process: base and adapters as rows of one batch."""

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from queue import Queue
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ...adapters.library import AdapterChoice
from ...analysis.inspection import observed
from ...config.positions import POSITION_FIELDS
from ...data.templates import fill
from ...data.tokenization import smallest_limit
from ...engine.base.sites import input_embeddings, layer_of
from ...evaluation.decoding import Decoding
from ...evaluation.generation import ends_of, prompt_tokens
from ...evaluation.scoring import evaluating
from ...interventions import NoiseIntervention
from ...interventions.registry import INTERVENTIONS, intervention_class
from ...model import ReftModel
from ..prompts import default_new_tokens
from .asking import BASE, NO_NOISE, TOGETHER, Answer, Answerer, Norms, Question

_PART = "part of "
"""Before an adapter's name: what of it is at the chosen layers and positions."""


class LocalModel(Answerer):
    """A base with adapters that were loaded by name.

    Args:
        reft_model: the model.
        tokenizer: of its base.
        title: what to call it.
    """

    noises = tuple(
        name for name, unit in INTERVENTIONS.items() if issubclass(unit, NoiseIntervention)
    )

    def __init__(self, reft_model: ReftModel, tokenizer: Any, title: str) -> None:
        self._model, self._tokenizer, self.title = reft_model, tokenizer, title
        adapters = list(reft_model.adapters)
        self.scaled = adapters
        self.names = [BASE, *adapters, *([TOGETHER] if len(adapters) > 1 else [])]
        places = [slot.place for one in reft_model.adapters.values() for slot in one.slots]
        layers = {layer_of(reft_model.model, place.site) for place in places}
        self.layers = sorted(layer for layer in layers if layer is not None)
        self.positions = [
            name for name in POSITION_FIELDS if any(getattr(one.positions, name) for one in places)
        ]

    def answers(self, question: Question) -> Iterator[Mapping[str, Answer]]:
        """All answers as they grow; see `Answerer`."""
        tokens = self._tokens(question)
        writing = _Writing(self._tokenizer, tokens, question.names, self._ends())
        routes = self._routes(question)
        failed: list[Exception] = []

        def generate() -> None:
            try:
                with (
                    evaluating(self._model, question.decoding.seed),
                    observed(self._model, writing.see),
                ):
                    self._model.generate(
                        **self._inputs(question, tokens),
                        **self._settings(question.decoding),
                        adapter_names=[routes[name] for name in question.names],
                        streamer=writing,
                        stopping_criteria=StoppingCriteriaList([writing.is_stopped]),
                    )
            except Exception as error:  # raised again where it is seen
                failed.append(error)
            finally:
                writing.answers.put(None)

        thread = threading.Thread(target=generate, name="reftnoise", daemon=True)
        thread.start()
        try:
            while (found := writing.answers.get()) is not None:
                yield found
        finally:
            writing.stop.set()
            thread.join()
            for part in [name for name in self._model.adapters if name.startswith(_PART)]:
                self._model.delete_adapter(part)
        if failed:
            raise failed[0]

    def _tokens(self, question: Question) -> list[int]:
        template = "plain" if self._tokenizer.chat_template is None else "chat"
        template = question.decoding.template_or(template)
        tokens = prompt_tokens(self._tokenizer, fill(template, question.prompt, {}))
        limit = smallest_limit(self._tokenizer, self._model, None)
        room = None if limit is None else limit - (question.decoding.max_new_tokens or 0)
        if room is not None and len(tokens) > room:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, but for {question.decoding.max_new_tokens} "
                f"new ones the model has room for {max(room, 0)}"
            )
        return tokens

    def _ends(self) -> list[int]:
        return ends_of(self._model, self._tokenizer)

    def _settings(self, decoding: Decoding) -> dict[str, Any]:
        ends = self._ends()
        count = decoding.max_new_tokens or default_new_tokens(self._tokenizer, self._model)
        padding = next(n for n in (self._tokenizer.pad_token_id, *ends, 0) if n is not None)
        ending = {"pad_token_id": padding, "eos_token_id": ends or None}
        return decoding.arguments() | ending | {"max_new_tokens": count}

    def _routes(self, question: Question) -> dict[str, AdapterChoice]:
        """By answer's name, which edits its row gets."""
        library, chosen = self._model.adapters, {}
        for name in self.scaled:
            chosen[name] = name
            if question.layers is not None or question.positions is not None:
                chosen[name] = _PART + name
                layers, positions = question.layers, question.positions
                library.derive(_PART + name, name, layers=layers, positions=positions)
        each = {name: {chosen[name]: question.scales.get(name, 1.0)} for name in self.scaled}
        together = {name: scale for one in each.values() for name, scale in one.items()}
        return {BASE: None, **each, TOGETHER: together}

    def _inputs(self, question: Question, tokens: list[int]) -> dict[str, Any]:
        ids = torch.tensor([tokens] * len(question.names), device=self._model.device)
        mask = torch.ones_like(ids)
        if question.noise == NO_NOISE:
            return {"input_ids": ids, "attention_mask": mask}
        noise_class: Any = intervention_class(question.noise)
        embeds = input_embeddings(self._model.model)(ids)
        # One draw for all answers, so that adapters alone differ; of a pair, the first.
        noise = noise_class(alpha=question.alpha).delta(embeds[:1].repeat(2, 1, 1))[:1]
        return {"inputs_embeds": embeds + noise, "attention_mask": mask}


class _Writing(BaseStreamer):
    """Takes each step's tokens and edit norms, and puts answers into a queue."""

    def __init__(
        self, tokenizer: Any, prompt: list[int], names: Sequence[str], ends: list[int]
    ) -> None:
        self.answers: Queue[dict[str, Answer] | None] = Queue()
        self.stop = threading.Event()
        self._tokenizer, self._prompt, self._names, self._ends = tokenizer, prompt, names, ends
        self._norms: dict[str, list[Float[Tensor, "rows tokens"]]] = defaultdict(list)
        self._written: list[list[int]] = [[] for _ in names]
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
        if self.answers.empty():  # whoever reads them has time for more
            self._show()

    def end(self) -> None:
        self._show()

    def _show(self) -> None:
        joint = {site: torch.cat(parts, dim=1) for site, parts in self._norms.items()}
        self.answers.put({name: self._answer(row, joint) for row, name in enumerate(self._names)})

    def is_stopped(self, ids: Tensor, _: Any, **__: Any) -> Tensor:
        return torch.full(ids.shape[:1], self.stop.is_set(), device=ids.device)

    def _answer(self, row: int, joint: Mapping[str, Tensor]) -> Answer:
        tokens = self._written[row]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        read = [*self._prompt, *tokens[:-1]]  # the last is not read yet
        edited = {site: values[row] for site, values in joint.items() if values[row].any()}
        if not edited:
            return Answer(text)
        width = len(read)
        values = [pad(one[:width], (0, max(width - len(one), 0))) for one in edited.values()]
        labels = [self._tokenizer.decode([token]) for token in read]
        norms = Norms(list(edited), labels, len(self._prompt), torch.stack(values))
        return Answer(text, norms)
