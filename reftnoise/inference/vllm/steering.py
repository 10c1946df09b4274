"""Steering vectors of hidden states that a running vLLM reads, for the same server."""

import uuid
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..._util.errors import value_errors
from ..._util.files import local_path
from ..._util.progress import progress_of
from ...adapters.location import ADAPTER
from ...analysis.steering.directions import steering_vector
from ...analysis.steering.fit import set_vector
from ...analysis.steering.options import SteerOptions, VectorChoice, expect_room
from ...analysis.steering.pairs import read_pairs, split_pairs
from ...analysis.steering.search import tokenized_pairs, vector_config, write_results
from ...analysis.steering.states import ReadStates, ReadTokens
from ...analysis.steering.sweep import differing_tokens
from ...engine.base.loading import load_structure
from ...evaluation.likelihood import Progress
from ...model import get_reft_model
from . import CAPTURE, CAPTURE_POSITIONS, captured_file
from .client import VllmClient

if TYPE_CHECKING:
    from rich.console import Console

_AT_A_TIME = 256
"""Prompts whose files lie in the folder at a time."""


def steer_server(
    pairs: str | Path,
    model: str,
    output_dir: str | Path,
    options: SteerOptions,
    *,
    server: str,
    captures: str | Path,
    api_key: str | None = None,
    overwrite: bool = False,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Fit a vector from states that a server reads, write it, and load it into the server.

    There is no search: all pairs fit one vector, of the layer, method and size, or factor, that the
    options name. Only the base's tokenizer and config are read here. The server gets the adapter
    under the name of the directory.

    Args:
        pairs: file of pairs, as of `read_pairs`.
        model: name or directory of the base.
        output_dir: directory for the adapter and `steering.json`, which the server can read.
        options: layer, method, size or factor, positions, template and limit of pairs.
        server: address of a server of vLLM that captures states.
        captures: folder of its `reft_capture`.
        api_key: key that the server asks for.
        overwrite: whether the results of an earlier search in the directory are replaced.
        console: console for progress.

    Returns:
        What `steering.json` has.

    Raises:
        OSError: there is no such file, base or server.
        ValueError: the options name several vectors, a pair cannot be read, the server refuses a
            request or serves another base, or the directory holds something else.
    """
    choice = VectorChoice.of(options)
    if options.component != "block_output":
        raise ValueError(f"component {options.component!r}: a server reads 'block_output' alone")
    directory, folder = local_path(output_dir, "output_dir"), local_path(captures, "captures")
    expect_room(directory, overwrite=overwrite)
    if not folder.is_dir():
        raise ValueError(f"captures {folder}: expected the folder of the server's {CAPTURE}")
    rows = read_pairs(pairs)
    base, tokenizer = load_structure(model)
    with value_errors(pairs):
        contrasts = tokenized_pairs(tokenizer, rows, options.template)
    parts = split_pairs(contrasts, limit=options.limit, seed=options.seed).values()
    used = [pair for part in parts for pair in part]
    reft_model = get_reft_model(base, vector_config(options, choice.layer)).eval()
    client = VllmClient(server, api_key=api_key)
    with progress_of(console, "Reading pairs") as progress:
        rows_read = differing_tokens(used)
        states = served_states(client, folder, rows_read, choice.layer, progress=progress)
    vector, chosen = _fitted(states, choice)
    unit = reft_model.engine.units[0]
    if len(vector) != unit.unit.hidden_size:
        raise ValueError(
            f"server {client.address}: its states have {len(vector)} elements, and those of model "
            f"{model} have {unit.unit.hidden_size}: expected the same base"
        )
    set_vector(unit, vector)
    name = directory.absolute().name
    results = {
        "model": model,
        "server": client.address,
        "name": name,
        "pairs": {"fit": len(used)},
        "positions": options.positions,
        "chosen": chosen,
    }
    write_results(directory, results)  # first, so that a killed run's directory may be replaced
    reft_model.save_pretrained(directory / ADAPTER)
    client.load(name, (directory / ADAPTER).absolute())
    return results


def _fitted(states: ReadStates, choice: VectorChoice) -> tuple[Tensor, dict[str, Any]]:
    """The vector times its factor, and what it is."""
    count = len(states.means) // 2
    vector = steering_vector(choice.method, states.means[:count], states.means[count:])
    ratio = float(vector.norm() / states.norms.mean())
    if not ratio:
        raise ValueError("the halves of the pairs have the same states: no vector parts them")
    scale = choice.scale if choice.size is None else choice.size / ratio
    assert scale is not None
    described = {"method": choice.method, "layer": choice.layer}
    return vector * scale, described | {"scale": scale, "size": scale * ratio}


def served_states(
    client: VllmClient,
    folder: Path,
    rows: Sequence[ReadTokens],
    layer: int,
    *,
    progress: Progress | None = None,
) -> ReadStates:
    """The bare base's states after a block, averaged over the read tokens of each row.

    Args:
        client: client of a server that captures states.
        folder: folder of its captures, whose files are removed once they are read.
        rows: prompts, and which tokens are read.
        layer: number of the block.
        progress: function that is called with the numbers of rows done and of all rows.

    Raises:
        ValueError: the folder gets no states, or states that are not finite.
    """
    base, run = client.base_name(), uuid.uuid4().hex
    means, norms = [], []
    # The first one alone, so that a wrong folder is seen before others get files in the right one.
    for start, end in pairwise([0, *range(1, len(rows), _AT_A_TIME), len(rows)]):
        batch = rows[start:end]
        names = [f"steer-{run}-{start + index}" for index in range(len(batch))]
        places = [captured_file(folder, name) for name in names]
        try:
            client.complete(
                [_request(base, row, name) for row, name in zip(batch, names, strict=True)]
            )
            for place in places:
                states = _states(place, layer)
                means.append(states.mean(0))
                norms.append(states.norm(dim=-1).mean())
        finally:
            for place in places:
                place.unlink(missing_ok=True)
        if progress is not None:
            progress(end, len(rows))
    return ReadStates(torch.stack(means), torch.stack(norms))


def _request(base: str, row: ReadTokens, name: str) -> dict[str, Any]:
    read = [index for index, is_read in enumerate(row.are_read) if is_read]
    return {
        "model": base,
        "prompt": row.tokens,
        "max_tokens": 1,
        "temperature": 0,
        "vllm_xargs": {CAPTURE: name, CAPTURE_POSITIONS: read},
    }


def _states(place: Path, layer: int) -> Tensor:
    """The states of a file after a block, [positions, hidden]."""
    if not place.is_file():
        raise ValueError(
            f"captures {place.parent}: the server has written no states there, expected the folder "
            f"of its {CAPTURE}"
        )
    with safe_open(place, framework="pt") as file:
        states: Tensor = file.get_slice("states")[layer].double()
    if not states.isfinite().all():
        raise ValueError(f"layer {layer}: the base's states there are not finite")
    return states
