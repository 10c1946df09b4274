"""A stand-in for the Hugging Face hub: what `huggingface_hub` asks of it for models, over HTTP."""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"
USER = "me"


@dataclass
class Commit:
    """The files of a repository after one commit."""

    message: str
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        state = [self.message, *(f"{n}{digest(c)}" for n, c in sorted(self.files.items()))]
        return hashlib.sha1("".join(state).encode()).hexdigest()


@dataclass
class Repository:
    """Commits by revision: `main`, `refs/pr/1`, and every commit by its hash."""

    visibility: str | None
    revisions: dict[str, Commit] = field(default_factory=lambda: {"main": Commit("initial", {})})


class LocalHub(ThreadingHTTPServer):
    """Repositories in memory. Only holders of `TOKEN` may write."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}


@contextlib.contextmanager
def running_hub() -> Iterator[LocalHub]:
    """A hub that answers while the block runs."""
    with LocalHub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()


class Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Be silent."""

    def answer(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    # -- reading -----------------------------------------------------------------------------------

    def do_GET(self) -> None:
        match self.parts:
            case ["api", "models", user, name, *rest]:
                repository = self.server.repositories.get(f"{user}/{name}")
                revision = rest[1] if rest else "main"
                if repository is None or revision not in repository.revisions:
                    self.answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                    return
                commit = repository.revisions[revision]
                if rest[:1] == ["tree"]:
                    self.answer([described(path, file) for path, file in commit.files.items()])
                else:
                    self.answer({"id": f"{user}/{name}", "sha": commit.sha, "siblings": []})
            case [user, name, "resolve", revision, *path]:
                commit = self.server.repositories[f"{user}/{name}"].revisions[revision]
                content = commit.files["/".join(path)]
                etag = f'"{digest(content)}"'
                self.answer(content, headers={"ETag": etag, "X-Repo-Commit": commit.sha})
            case _:
                self.answer({"error": f"no such address: {self.path}"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    # -- writing -----------------------------------------------------------------------------------

    def do_PUT(self) -> None:
        content = self.body()
        assert self.parts == ["large-files", hashlib.sha256(content).hexdigest()]
        self.server.large_files[self.parts[1]] = content
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
            return
        match self.parts:
            case ["api", "repos", "create"]:
                self.create(json.loads(body))
            case ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case ["api", "models", _, _, "preupload", _]:
                modes = {True: "lfs", False: "regular"}
                self.answer(
                    {
                        "files": [
                            {
                                "path": file["path"],
                                "uploadMode": modes[file["path"].endswith(".safetensors")],
                                "shouldIgnore": False,
                            }
                            for file in json.loads(body)["files"]
                        ]
                    }
                )
            case [_, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                uploads = [
                    {
                        "oid": one["oid"],
                        "size": one["size"],
                        "actions": {
                            "upload": {"href": f"{self.server.endpoint}/large-files/{one['oid']}"}
                        },
                    }
                    for one in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": uploads})
            case ["api", "models", user, name, "commit", revision]:
                lines = [json.loads(line) for line in body.splitlines()]
                self.commit(f"{user}/{name}", revision, lines)
            case _:
                self.answer({"error": f"no such address: {self.path}"}, 404)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or USER}/{wanted['name']}"
        exists = name in self.server.repositories
        if not exists:
            self.server.repositories[name] = Repository(wanted.get("visibility"))
        url = f"{self.server.endpoint}/{name}"
        self.answer({"url": url, "name": name}, 409 if exists else 200)

    def commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> None:
        revisions = self.server.repositories[name].revisions
        files, message = dict(revisions[revision].files), ""
        for line in lines:
            match line:
                case {"key": "header", "value": value}:
                    message = value["summary"]
                case {"key": "file", "value": value}:
                    files[value["path"]] = base64.b64decode(value["content"])
                case {"key": "lfsFile", "value": value}:
                    files[value["path"]] = self.server.large_files[value["oid"]]
        made = Commit(message, files)
        url = f"{self.server.endpoint}/{name}"
        answer = {"commitUrl": f"{url}/commit/{made.sha}", "commitOid": made.sha, "success": True}
        if "create_pr=1" in urlsplit(self.path).query:
            revision = "refs/pr/1"
            answer["pullRequestUrl"] = f"{url}/discussions/1"
        revisions[revision] = revisions[made.sha] = made
        self.answer(answer)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def described(path: str, content: bytes) -> dict[str, Any]:
    """A file, as the hub lists it."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": digest(content)[:40]}
    if path.endswith(".safetensors"):
        large = {"oid": digest(content), "size": len(content), "pointerSize": 134}
        return entry | {"lfs": large}
    return entry
