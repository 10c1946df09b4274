"""Look into an adapter: how far it moves hidden states, where to, and what the model predicts.

Everything is measured on a `ReftModel` in evaluation mode; its own mode comes back.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..adapters.library import OWN, AdapterLibrary
from ..data.conversations import Messages, prompt_text
from ..engine.base.peft import inner_model
from ..engine.base.sites import find_layers, is_encoder_decoder
from ..engine.base.threads import undone_in_children
from ..engine.units import PlacedUnit
from ..evaluation.scoring import evaluating
from ..interventions import NoiseIntervention, has_factors
from ..model import ReftModel
from .overlaps import Spaces, overlap_matrix, row_space, row_spaces

Prompt: TypeAlias = str | Messages
"""A text, or a conversation for the tokenizer's chat template."""


@dataclass(frozen=True)
class EditNorms:
    """How far hidden states are moved: `norms[i, j]` at `sites[i]` and `tokens[j]`."""

    sites: list[str]
    tokens: list[str]
    norms: Float[Tensor, "sites tokens"]


class Guess(NamedTuple):
    """A token and its probability."""

    token: str
    probability: float


@dataclass(frozen=True)
class LensRow:
    """The likeliest next tokens by a layer's hidden state at the last token."""

    layer: int
    base: list[Guess]
    adapted: list[Guess]


@dataclass(frozen=True)
class NoiseLosses:
    """The loss per label without noise, and with each of its draws."""

    clean: float
    noisy: list[float]


def edit_norms(reft_model: ReftModel, tokenizer: Any, prompt: Prompt) -> EditNorms:
    r"""How far each edit moves the hidden states of a prompt: $\|h' - h\| / \|h\|$.

    h is the hidden state that reaches a site, after the edits at earlier sites, and h′ is what the
    site's units make of it. Sites are in the order in which the base runs them; units that share a
    site are one row.

    Raises:
        ValueError: an encoder-decoder model, whose sites have two sequences.
    """
    if is_encoder_decoder(inner_model(reft_model.model)):
        raise ValueError("edit norms: expected a model with one sequence, not an encoder-decoder")
    inputs = _encode(reft_model, tokenizer, prompt)
    seen: dict[str, Tensor] = {}
    with evaluating(reft_model), observed(reft_model, seen.__setitem__):
        reft_model(**inputs)
    tokens = [tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist()]
    width = len(tokens)
    rows = [row[0, -width:].cpu() for row in seen.values()]
    return EditNorms(list(seen), tokens, torch.stack(rows) if rows else torch.empty(0, width))


@contextlib.contextmanager
def observed(
    reft_model: ReftModel, see: Callable[[str, Float[Tensor, "batch tokens"]], None]
) -> Iterator[None]:
    r"""Within the block, call `see` with $\|h' - h\| / \|h\|$ of each edited site as calls run.

    `see` gets the site's name and a number for each row and token of the call, such as a step of a
    generation. It is not called where nothing is edited any more.
    """

    def observer(placed: Sequence[PlacedUnit], before: Tensor, after: Tensor) -> None:
        if any(unit.positions is not None for unit in placed):
            moved = (after.float() - before.float()).norm(dim=-1)
            see(str(placed[0].site), moved / before.float().norm(dim=-1))

    with reft_model.engine.settings.block(observer=observer):
        yield


def subspaces(reft_model: ReftModel) -> dict[str, Float[Tensor, "rank hidden"]]:
    """Orthonormal rows that span what each unit adds by site: R's row space, or W₂'s.

    A site's further units have numbers: `model.layers.3.output#1`. Units without such a projection,
    such as `bias`, are left out.
    """
    by_site: dict[str, Tensor] = {}
    for placed in reft_model.engine.units:
        unit = placed.unit
        if has_factors(unit) and unit.has_subspaces:
            names = (f"{placed.site}#{n}" if n else str(placed.site) for n in itertools.count())
            with torch.no_grad():
                rows = row_space(unit.factors().up.double())
            by_site[next(name for name in names if name not in by_site)] = rows
    return by_site


def subspace_cosine(a: Spaces, b: Spaces) -> dict[str, float]:
    r"""How alike the subspaces are that two adapters edit, at each site that both edit.

    With the adapters' `subspaces`, the mean squared cosine of the principal angles θ between the
    row spaces of $R_a$ and $R_b$:
    $\frac1k \sum_{i=1}^k \cos^2\theta_i = \|R_a R_b^\top\|_F^2 / k$ with $k = \min(r_a, r_b)$. It
    is 1 where one space holds the other, 0 where they are orthogonal, and $\max(r_a, r_b)/d$ on
    average for random ones.

    Raises:
        ValueError: there is no site that both edit in a subspace of the same width.
    """
    common = [site for site in a if site in b and a[site].shape[1] == b[site].shape[1]]
    if not common:
        raise ValueError(f"no common site: one adapter edits {_sites(a)}, the other {_sites(b)}")
    products = {site: a[site].double() @ b[site].to(a[site]).double().mT for site in common}
    return {site: float(p.square().sum() / min(p.shape)) for site, p in products.items()}


def _sites(spaces: Spaces) -> str:
    if not spaces:
        return "no subspaces"
    first, *others = spaces
    return f"subspaces at {first}" + (f" and {len(others)} other sites" if others else "")


def library_overlaps(library: AdapterLibrary) -> tuple[list[str], Float[Tensor, "n n"]]:
    r"""How alike the subspaces are that loaded adapters edit: their names, and a matrix.

    An entry is the mean over common sites of $\|Q_a Q_b^\top\|_F^2 / \min(r_a, r_b)$, where the
    rows of Q are an orthonormal basis of what an adapter adds there, as in `subspace_cosine`. It is
    NaN where two adapters have no common site. Units that scale all dimensions, as RED does, add in
    no subspace, and are left out.
    """
    spaces = [
        row_spaces(
            (str(place.site), factors.up)
            for place, factors in adapter.factors()
            if factors.diagonal is None
        )
        for adapter in library.values()
    ]
    return list(library), overlap_matrix(spaces)


def logit_lens(
    reft_model: ReftModel, tokenizer: Any, prompt: Prompt, *, top: int = 5
) -> list[LensRow]:
    """The likeliest next tokens that each layer's hidden state gives, without and with the edit.

    At the last token, each layer's output goes through what the base runs between its last layer
    and its head (the final norm, where there is one) and through the head. The scaling or capping
    of logits in some bases, which keeps their order, is left out. The last layer's row is the
    model's own prediction.

    Raises:
        ValueError: the base is an encoder-decoder or has no language model's head.
    """
    base = inner_model(reft_model.model)
    head = None if is_encoder_decoder(base) else base.get_output_embeddings()
    if head is None:
        raise ValueError(f"logit lens: {type(base).__name__} is no causal language model")
    inputs = _encode(reft_model, tokenizer, prompt)

    def guesses() -> list[list[Guess]]:
        with _outputs(base) as (layers, final):
            reft_model(**inputs)
        hidden = torch.stack([layer[0, -1:] for layer in layers])
        for module in final:
            hidden = module(hidden)
        values, indices = head(hidden)[:, 0].float().softmax(-1).topk(top)
        return [
            [Guess(tokenizer.decode([t]), p) for t, p in zip(tokens, probabilities, strict=True)]
            for tokens, probabilities in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    with evaluating(reft_model):
        adapted = guesses()
        with reft_model.disabled():
            bare = guesses()
    return [LensRow(n, *row) for n, row in enumerate(zip(bare, adapted, strict=True))]


def noise_losses(
    reft_model: ReftModel, batches: Sequence[Mapping[str, Any]], *, draws: int = 8, seed: int = 0
) -> NoiseLosses:
    """The loss on the same rows without noise, and with the config's noise as in training.

    Dropout stays off, so that the noise is all that differs; SymNoise's loss is the pair's mean.
    torch's random state comes back as it was. Batches are collated rows with labels, for a causal
    language model or a classifier; each draw is over all rows.

    Raises:
        ValueError: the config has no noise.
    """
    noises = [u for u in reft_model.interventions.values() if isinstance(u, NoiseIntervention)]
    if not noises:
        raise ValueError("the config has no noise: there are no two losses to compare")
    with evaluating(reft_model, seed), reft_model.using(adapter=OWN):
        clean = _mean_loss(reft_model, batches)  # which draws nothing
        with reft_model.engine.settings.block(is_noised=True):
            return NoiseLosses(clean, [_mean_loss(reft_model, batches) for _ in range(draws)])


def _mean_loss(reft_model: ReftModel, batches: Sequence[Mapping[str, Any]]) -> float:
    """The mean over all labels, those of tokens or of a classifier's rows."""
    total = count = 0.0
    for batch in batches:
        inputs = {
            name: values.to(reft_model.device) if isinstance(values, Tensor) else values
            for name, values in batch.items()
        }
        labels = inputs["labels"]
        weight = int((labels[:, 1:] != -100).sum()) if labels.dim() == 2 else len(labels)
        total += float(reft_model(**inputs, return_logits=False).loss) * weight
        count += weight
    return total / count


def _encode(reft_model: ReftModel, tokenizer: Any, prompt: Prompt) -> dict[str, Tensor]:
    is_text = isinstance(prompt, str)
    text = prompt if isinstance(prompt, str) else prompt_text(tokenizer, prompt)
    # A chat template writes the special tokens itself.
    encoded = tokenizer(text, add_special_tokens=is_text, return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise ValueError(f"prompt {prompt!r}: it has no tokens")
    return {n: encoded[n].to(reft_model.device) for n in ("input_ids", "attention_mask")}


@contextlib.contextmanager
def _outputs(base: Any) -> Iterator[tuple[list[Tensor], list[nn.Module]]]:
    """Each layer's output, and the modules that run between the last layer and the head."""
    layers = find_layers(base)
    around = next(m for m in base.modules() if any(child is layers for child in m.children()))
    outputs: list[Tensor] = []
    final: list[nn.Module] = []
    thread = get_ident()  # others may run the base meanwhile

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if get_ident() == thread:
            outputs.append(output[0] if isinstance(output, tuple) else output)

    def follow(module: nn.Module, *_: Any) -> None:
        if get_ident() == thread and len(outputs) == len(layers):
            final.append(module)

    others = [child for child in around.children() if child is not layers]
    with undone_in_children() as stack:
        for module, hook in [*((m, keep) for m in layers), *((m, follow) for m in others)]:
            stack.callback(module.register_forward_hook(hook).remove)
        yield outputs, final
