"""Data files that are damaged at random or on purpose."""

import io
import json
import random
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet

ROWS = [
    {
        "prompt": f"What is {n} + {n}?",
        "completion": f" {2 * n}",
        "n": n,
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
    }
    for n in range(6)
]
HOSTILE = [
    3,
    -1.5,
    None,
    True,
    "",
    [],
    {},
    [[]],
    "\x00",
    "é" * 50,
    10**18,
    [{"role": "user"}],
    [{"role": 3, "content": {}}],
    [{"role": "assistant", "content": None}],
    [{"role": "assistant", "content": [{"type": "image"}]}],
    [{"role": "assistant", "content": "a", "tool_calls": 3, "weight": "x"}],
    [{"role": "assistant", "content": "a", "tool_calls": [{"function": 3}]}],
    [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}],
]
RAW = ["NaN", "[" * 3000, "9" * 5000, '"\\ud800"', "1e999", "{", '{"a": ' * 200 + "1" + "}" * 200]


def json_lines(rows: list[dict[str, object]]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def separated(rows: list[dict[str, object]], separator: str) -> bytes:
    lines = [["prompt", "completion", "n"]]
    lines += [[f'"{row["prompt"]}"', f'"{row["completion"]}"', str(row["n"])] for row in rows]
    return "\n".join(separator.join(line) for line in lines).encode()


def parquet(rows: list[dict[str, object]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, object]]], bytes]] = {
    ".jsonl": json_lines,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": lambda rows: separated(rows, ","),
    ".tsv": lambda rows: separated(rows, "\t"),
    ".parquet": parquet,
}


def damaged_file(seed: int) -> tuple[str, bytes]:
    """The suffix and the bytes of a damaged file, the same for each seed."""
    rng = random.Random(seed)
    suffix = rng.choice(list(WRITERS))
    kind = rng.choice(("values", "keys", "bytes", "cut", "doubled", "raw", "another", "empty"))
    rows: list[dict[str, object]] = [dict(row) for row in ROWS[: rng.randint(1, 6)]]
    if rng.random() < 0.5:  # conversations alone
        rows = [{"messages": row["messages"], "n": row["n"]} for row in rows]
    if kind == "values":
        row = rng.choice(rows)
        row[rng.choice(list(row))] = rng.choice(HOSTILE)
    elif kind == "keys":
        row = rng.choice(rows)
        row[rng.choice(("", "tools", "documents", "chat_template_kwargs", "subspaces"))] = (
            rng.choice(HOSTILE)
        )
        row.pop(rng.choice(list(row)))
    try:
        content = bytearray(WRITERS[suffix](rows))
    except (pa.ArrowException, KeyError, OverflowError):  # what the format cannot hold
        content = bytearray(WRITERS[suffix]([dict(row) for row in ROWS]))
        kind = "bytes"
    at = rng.randrange(len(content))
    if kind == "bytes":
        for _ in range(rng.choice((1, 1, 3, 20))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == "cut":
        del content[at:]
    elif kind == "doubled":
        content[at:at] = content[: rng.randrange(len(content))]
    elif kind == "raw":
        content[at:at] = rng.choice(RAW).encode()
    elif kind == "another":
        suffix = rng.choice(list(WRITERS))
    elif kind == "empty":
        content = bytearray(rng.choice((b"", b"\n\n", b"\x00" * 64, b"\xff\xfe", b"[", b"{}")))
    return suffix, bytes(content)
