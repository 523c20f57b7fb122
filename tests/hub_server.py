"""A Hub for tests: the few endpoints that `huggingface_hub` needs to make a repository, fill it and read it, on this machine.

Weights go the way of large files. Whatever changes something needs the token, and is noted in `writes`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_of_the_tests"
NAME = r"(?P<name>(?:spaces/)?[\w.-]+/[\w.-]+)"  # of a Space with its kind, as in addresses
API = rf"/api/(?:models/|(?=spaces/)){NAME}"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}})
    commits: list[list[str]] = field(default_factory=list)  # names of the files that each changed

    def files(self, revision: str) -> dict[str, bytes]:
        """Of a branch, or of a commit hash, which only the present state of a branch has."""
        return self.branches.get(revision) or next(files for files in self.branches.values() if self.sha(files) == revision)

    @staticmethod
    def sha(files: dict[str, bytes]) -> str:
        return hashlib.sha1(repr(sorted((name, git_hash(content)) for name, content in files.items())).encode()).hexdigest()


class HubServer:
    """Context manager; `url` is what `HF_ENDPOINT` is to be set to."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.writes: list[str] = []
        self.failures: dict[str, int] = {}  # HTTP status by a part of the path
        self.damage: set[str] = set()  # names of files that arrive otherwise than they were sent
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        """Find the method for this request, and send what it returns: JSON or bytes, and perhaps a status and headers."""
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if self.headers.get("Transfer-Encoding") != "chunked" else b"".join(self._chunks())
        status = next((status for part, status in self.hub.failures.items() if part in path), None)
        if status is not None:
            return self.send(status, {"error": "the server was told to fail"})
        for method, pattern, function in ROUTES:
            if self.command in method.split("|") and (match := re.fullmatch(pattern, path)):
                if self.command in ("POST", "PUT") and "validate-yaml" not in path:
                    # Objects go to storage, whose addresses are signed: no token there.
                    if not path.startswith("/objects/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        return self.send(401, {"error": "Invalid username or password."})
                    self.hub.writes.append(f"{self.command} {path}")
                name = match.groupdict().get("name")
                if name is not None and name not in self.hub.repositories:
                    return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return function(self, **match.groupdict())
        return self.send(404, {"error": f"no such page: {path}"}, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def send(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- writing

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked.get("type") == "space":
            if asked.get("sdk") != "gradio":
                return self.send(400, {"error": "a Space of these tests has the SDK gradio"})
            name = f"spaces/{name}"
        exists = name in self.hub.repositories
        private = asked.get("private", False) or asked.get("visibility") == "private"  # older clients say the one, newer the other
        self.hub.repositories.setdefault(name, Repository(private))
        return self.send(409 if exists else 200, {"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, name: str, branch: str) -> None:
        branches = self.hub.repositories[name].branches
        self.send(409 if branch in branches else 201, {})
        branches.setdefault(branch, dict(branches["main"]))

    def validate(self) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        files, answers = self.hub.repositories[name].files(revision), []
        for file in json.loads(self.body)["files"]:
            path, large = file["path"], file["path"].endswith(".safetensors")
            known = files.get(path)
            oid = None if known is None else hashlib.sha256(known).hexdigest() if large else git_hash(known)
            answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answers})

    def batch(self, name: str) -> None:
        objects = []
        for large in json.loads(self.body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/objects/{large['oid']}"}}}
            objects.append({**large, **({} if large["oid"] in self.hub.large_files else upload)})
        self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        intact = hashlib.sha256(self.body).hexdigest() == oid
        if intact:
            self.hub.large_files[oid] = self.body
        self.send(200 if intact else 400, {})

    def commit(self, name: str, revision: str) -> None:
        repository = self.hub.repositories[name]
        files, changed = repository.branches[revision], []
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] in ("file", "lfsFile"):
                value = entry["value"]
                content = base64.b64decode(value["content"]) if entry["key"] == "file" else self.hub.large_files[value["oid"]]
                files[value["path"]] = content[::-1] if value["path"] in self.hub.damage else content
                changed.append(value["path"])
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        repository.commits.append(changed)
        sha = repository.sha(files)
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "hookOutput": ""})

    # --- reading

    def info(self, name: str, revision: str | None = None) -> None:
        repository = self.hub.repositories[name]
        files = repository.files(revision or "main")
        siblings = [{"rfilename": path} for path in files]
        self.send(
            200,
            {
                "id": name.removeprefix("spaces/"),
                "private": repository.private,
                "sha": repository.sha(files),
                "siblings": siblings,
                "tags": [],
            },
        )

    def tree(self, name: str, revision: str) -> None:
        entries = []
        for path, content in self.hub.repositories[name].files(revision).items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if path.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.send(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        files = self.hub.repositories[name].files(revision)
        commit = {"X-Repo-Commit": Repository.sha(files)}
        if path not in files:
            return self.send(404, {"error": "Entry not found"}, {**commit, "X-Error-Code": "EntryNotFound"})
        return self.send(200, files[path], {**commit, "ETag": f'"{git_hash(files[path])}"', "Content-Type": "application/octet-stream"})


ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"{API}/branch/(?P<branch>.+)", _Handler.branch),
    ("POST", rf"{API}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/objects/(?P<oid>\w+)", _Handler.store),
    ("POST", rf"{API}/commit/(?P<revision>.+)", _Handler.commit),
    ("GET", rf"{API}", _Handler.info),
    ("GET", rf"{API}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET|HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
