"""A small server of the OpenAI API around a real model, with a prefix cache and faults to plant."""

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import DynamicCache

import reftnoise as rn
from reftnoise.config.positions import Positions
from reftnoise.inference.vllm.flat_batch import settled_tokens

BLOCK, PIECE = 16, 24
"""Tokens of a block of the cache, and of a piece of a prompt."""


@dataclass
class Engine:
    """A model that completes prompts piece by piece, and keeps what prompts have left.

    Args:
        fault: one of `FAULTS`, or None.
        offers: what it takes and gives: `ids`, `token_ids`, `log_probs`, `echo`, or `no echo`,
            which is to take `echo` without heeding it.
    """

    reft_model: rn.ReftModel
    tokenizer: Any
    fault: str | None = None
    offers: frozenset[str] = frozenset({"ids", "token_ids", "log_probs", "echo"})
    lock: Any = field(default_factory=threading.Lock)
    kept: dict[str, list[tuple[list[int], Any]]] = field(default_factory=dict)
    hits: int = 0
    requests: int = 0

    @torch.no_grad()
    def complete(self, name: str, prompt: list[int], count: int) -> tuple[list[int], Any]:
        """New tokens, and log-probabilities of all tokens after the first, row by row."""
        is_base = name == "base"
        length = len(prompt) - (self.fault == "position")
        cache, known = self._beginning(name, prompt)
        tokens, rows = list(prompt), []
        bare = self.fault == "base" or (is_base and self.fault != "leak")
        with self.reft_model.disabled() if bare else nullcontext():
            self.reft_model.scale = 1.1 if self.fault == "scale" else 1.0
            while len(tokens) < len(prompt) + count or len(rows) + known < len(prompt):
                done = cache.get_seq_length()
                piece = tokens[done : done + PIECE]
                seen = length if self.fault != "pieces" else min(length, done + len(piece))
                logits = self.reft_model(
                    input_ids=torch.tensor([piece]),
                    attention_mask=torch.ones(1, done + len(piece), dtype=torch.long),
                    past_key_values=cache,
                    use_cache=True,
                    prompt_lengths=torch.tensor([seen]),
                ).logits[0]
                rows += list(logits.log_softmax(-1))
                if done + len(piece) == len(tokens):
                    tokens.append(int(logits[-1].argmax()))
                    if tokens[-1] == self.tokenizer.eos_token_id:
                        break
            self.reft_model.scale = 1.0
        self._keep(name, prompt, tokens, cache)
        return tokens[len(prompt) :], rows

    def _beginning(self, name: str, prompt: list[int]) -> tuple[Any, int]:
        """The states of a beginning that another prompt has left, and its length."""
        best, length = None, 0
        for tokens, cache in self.kept.get(self._key(name), []):
            pairs = zip(tokens, prompt[:-1], strict=False)
            same = next(
                (i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(prompt) - 1)
            )
            if same // BLOCK * BLOCK > length:
                best, length = cache, same // BLOCK * BLOCK
        if best is None:
            return DynamicCache(), 0
        self.hits += 1
        return _first(best, length), length

    def _key(self, name: str) -> str:
        return "all" if self.fault == "shared cache" else name

    def _keep(self, name: str, prompt: list[int], tokens: list[int], cache: Any) -> None:
        entries = self.reft_model.reft_config.representations
        settled = settled_tokens([Positions.parse(e.positions) for e in entries], len(prompt))
        if settled is None or name == "base" or self.fault == "stale cache":
            settled = cache.get_seq_length()
        length = min(settled, cache.get_seq_length())
        if length:
            entry = tokens[:length], _first(cache, length)
            self.kept.setdefault(self._key(name), []).append(entry)

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer of a request for a completion."""
        prompt = body["prompt"]
        if body["model"] not in ("base", "edited"):
            return 404, {"error": {"message": f"no model {body['model']}"}}
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        elif "ids" not in self.offers:
            return 422, {"error": {"message": "prompt: expected a text"}}
        echo = body.get("echo", False)
        if "no echo" in self.offers:
            echo = False
        if (echo and "echo" not in self.offers) or (
            "logprobs" in body and "log_probs" not in self.offers
        ):
            return 400, {"error": {"message": "not supported"}}
        with self.lock:
            self.requests += 1
            if echo:  # which needs all rows
                kept, self.kept = self.kept, {}
            written, rows = self.complete(body["model"], prompt, body["max_tokens"])
            if echo:
                self.kept = kept
        if self.fault == "short":
            written = written[:3]
        said = written
        if (
            written
            and written[-1] == self.tokenizer.eos_token_id
            and "token_ids" not in self.offers
        ):
            said = written[:-1]
        shown = [*prompt, *said] if echo else said
        choice: dict[str, Any] = {"text": self.tokenizer.decode(shown, skip_special_tokens=True)}
        if "log_probs" in self.offers:
            all_of = [*prompt, *said] if echo else said
            first = len(prompt) + len(written) - len(all_of) - (len(written) - len(said))
            offset = len(prompt) + len(written) - 1 - len(rows)  # states that were kept
            values = [
                None if first + i == 0 else float(rows[first + i - 1 - offset][token])
                for i, token in enumerate(all_of)
            ]
            names = [
                f"token_id:{t}" if "token_ids" in self.offers else self.tokenizer.decode([t])
                for t in all_of
            ]
            choice["logprobs"] = {"tokens": names, "token_logprobs": values}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}


def _first(cache: Any, length: int) -> Any:
    """A copy of the states of the first tokens."""
    copied = copy.deepcopy(cache)
    if surplus := copied.get_seq_length() - length:
        copied.crop(-surplus)
    return copied


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """The address of a running server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the library's name
            models = [{"id": "edited", "parent": "base"}, {"id": "base", "parent": None}]
            self._send(200, {"data": models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*engine.answer(body))

        def _send(self, status: int, answer: dict[str, Any]) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
