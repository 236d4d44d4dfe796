# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A Hub in memory, on 127.0.0.1: what huggingface_hub asks to push and to load models, and connections that break.

It answers the client's requests as the Hub does, down to the headers that tell a missing repository, revision or file.
Large files go by the LFS protocol ("basic" transfers): run clients with `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# Larger files, and all with these endings, are sent by LFS, others within the commit.
LARGE = 1_000_000
LARGE_ENDINGS = (".safetensors",)


class Refusal(Exception):
    """An answer that is an error; `code` is the Hub's name for it."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message or code)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message or code}


@dataclass
class File:
    """A version of a file; `oid` is the git hash of its content, or by LFS the sha256."""

    oid: str
    content: bytes
    lfs: bool


@dataclass
class Repository:
    """Commits by their hash, each with all of its files by path, and the branches and tags that name commits."""

    private: bool
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File], summary: str) -> str:
        """Moves a branch to a new commit, in one step."""
        listing = sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(json.dumps([self.refs.get(branch), summary, listing]).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a hash means."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


@dataclass
class Cut:
    """Breaks the next `times` connections whose request matches the pattern, `after` so many bytes of a body."""

    request: str
    after: int
    times: int = 1


class LoopbackHub(ThreadingHTTPServer):
    """The Hub: one user with one token. `requests` lists what was asked: method, path and `Range`."""

    daemon_threads = True
    user = "someone"
    token = "hf_right"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.offered: set[str] = set()
        self.cuts: list[Cut] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.lock = threading.Lock()

    @contextmanager
    def serving(self) -> Iterator["LoopbackHub"]:
        """Serves from a thread of its own until the context ends."""
        thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: only a client that hangs up comes here."""

    def cut_after(self, request: str) -> int | None:
        """After how many bytes this request is to break, if it is."""
        with self.lock:
            for cut in self.cuts:
                if cut.times > 0 and re.search(cut.request, request):
                    cut.times -= 1
                    return cut.after
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection. `ROUTES`, at the end, names the method that answers a request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: LoopbackHub

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        request = f"{self.command} {url.path}"
        with self.server.lock:
            self.server.requests.append((self.command, url.path, self.headers.get("Range")))
        self.cut = self.server.cut_after(request)
        self.body = self.read_body()
        if self.body is None:
            return self.hang_up()
        self.query = parse_qs(url.query)
        try:
            self.check_token()
            for pattern, answer in ROUTES:
                if match := re.fullmatch(pattern, request):
                    return answer(self, *map(unquote, match.groups()))
            raise Refusal(404, "", f"No such endpoint: {request}")
        except Refusal as refusal:
            self.send(refusal.status, {"error": str(refusal)}, refusal.headers)
        except Exception as error:
            # A fault of this file, which the client's error then names.
            self.send(500, {"error": repr(error)})

    do_HEAD = do_POST = do_PUT = do_GET

    def read_body(self) -> bytes | None:
        """The whole body, or `None` where the connection is to break, or was broken, before its end."""
        length = int(self.headers.get("Content-Length", 0))
        if length and self.cut is not None:
            self.rfile.read(min(self.cut, length))
            return None
        body = self.rfile.read(length)
        return body if len(body) == length else None

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        """Answers with bytes, or anything else as JSON."""
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: self.cut])
        if self.cut is not None:
            self.hang_up()

    def check_token(self) -> None:
        given = self.headers.get("Authorization")
        self.known = given == f"Bearer {self.server.token}"
        if given is not None and not self.known:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if self.command == "POST" and not self.known:
            raise Refusal(401, "", "Invalid username or password.")

    def repository(self, name: str) -> Repository:
        """The repository, unless it is missing or another's secret: who asks cannot tell these apart."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.known):
            raise Refusal(404 if self.known else 401, "RepoNotFound", "Repository not found")
        return found

    def whoami(self) -> None:
        if not self.known:
            raise Refusal(401, "", "Invalid username or password.")
        self.send(200, {"type": "user", "name": self.server.user, "orgs": []})

    def create_repository(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.server.user}/{asked['name']}"
        if not name.startswith(f"{self.server.user}/"):
            raise Refusal(403, "", "You don't have the rights to create a model under this namespace")
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        with self.server.lock:
            if name in self.server.repositories:
                return self.send(409, answer | {"error": "You already created this model repo"})
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.repositories[name] = Repository(private)
            self.server.repositories[name].commit("main", {}, "initial commit")
        self.send(200, answer)

    def validate_card(self) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def choose_upload_modes(self, name: str, revision: str) -> None:
        repository = self.repository(name)
        held = repository.commits[repository.resolve(revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            large = file["size"] > LARGE or file["path"].endswith(LARGE_ENDINGS)
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": held[file["path"]].oid} if file["path"] in held else {}))
        self.send(200, {"files": answers})

    def offer_uploads(self, name: str) -> None:
        self.repository(name)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.large:
                self.server.offered.add(item["oid"])
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{name}/{item['oid']}"}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, name: str, oid: str) -> None:
        # No token comes with this request: the address, which only the offer told, is the permission.
        if oid not in self.server.offered:
            raise Refusal(403, "", "This upload was not offered")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "The content is not what was announced")
        self.server.large[oid] = self.body
        self.send(200, {})

    def commit(self, name: str, branch: str) -> None:
        repository = self.repository(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        summary = lines[0]["value"]["summary"]
        with self.server.lock:
            files = dict(repository.commits[repository.resolve(branch)])
            for key, value in ((line["key"], line["value"]) for line in lines[1:]):
                path = value["path"]
                if key == "file":
                    content = base64.b64decode(value["content"])
                    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                    files[path] = File(oid, content, lfs=False)
                elif key == "lfsFile" and value["oid"] in self.server.large:
                    files[path] = File(value["oid"], self.server.large[value["oid"]], lfs=True)
                elif key == "deletedFile" and path in files:
                    del files[path]
                else:
                    raise Refusal(400, "", f"Cannot {key} {path}")
            sha = repository.commit(branch, files, summary)
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    def create_branch(self, name: str, branch: str) -> None:
        self.create_ref(name, branch, json.loads(self.body).get("startingPoint", "main"))

    def create_tag(self, name: str, revision: str) -> None:
        self.create_ref(name, json.loads(self.body)["tag"], revision)

    def create_ref(self, name: str, ref: str, revision: str) -> None:
        repository = self.repository(name)
        if ref in repository.refs:
            raise Refusal(409, "", f"Reference already exists: {ref}")
        repository.refs[ref] = repository.resolve(revision)
        self.send(200, {})

    def describe(self, name: str, revision: str = "main") -> None:
        repository = self.repository(name)
        sha = repository.resolve(revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        self.send(200, {"id": name, "sha": sha, "private": repository.private, "siblings": siblings})

    def list_tree(self, name: str, revision: str, folder: str | None = None) -> None:
        repository = self.repository(name)
        files = repository.commits[repository.resolve(revision)]
        prefix = f"{folder}/" if folder else ""
        listed: dict[str, dict[str, Any]] = {}
        for path, file in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            child, _, deeper = path.removeprefix(prefix).partition("/")
            if deeper and self.query.get("recursive") != ["true"]:
                listed[prefix + child] = {"type": "directory", "path": prefix + child, "oid": ""}
                continue
            listed[path] = {"type": "file", "path": path, "oid": file.oid, "size": len(file.content)}
            if file.lfs:
                listed[path]["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
        if folder and not listed:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.send(200, list(listed.values()))

    def download(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name)
        if repository.gated:
            # Its files are listed all the same.
            raise Refusal(403 if self.known else 401, "GatedRepo", "Access to this model is restricted")
        sha = repository.resolve(revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        file = repository.commits[sha].get(path)
        if file is None:
            refusal = Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
            return self.send(404, {"error": str(refusal)}, refusal.headers | headers)
        headers["ETag"] = f'"{file.oid}"'
        if (asked := self.headers.get("Range")) is None:
            return self.send(200, file.content, headers)
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
        part = file.content[int(first) : int(last) + 1 if last else None]
        if not part:
            raise Refusal(416, "", f"Range {asked} of {len(file.content)} bytes")
        end = int(first) + len(part) - 1
        self.send(206, part, headers | {"Content-Range": f"bytes {first}-{end}/{len(file.content)}"})


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create_repository),
    (r"POST /api/validate-yaml", Handler.validate_card),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", Handler.choose_upload_modes),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.offer_uploads),
    (rf"PUT /lfs/{NAME}/(\w+)", Handler.upload),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", Handler.commit),
    (rf"POST /api/models/{NAME}/branch/([^/]+)", Handler.create_branch),
    (rf"POST /api/models/{NAME}/tag/([^/]+)", Handler.create_tag),
    (rf"GET /api/models/{NAME}", Handler.describe),
    (rf"GET /api/models/{NAME}/revision/([^/]+)", Handler.describe),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Handler.list_tree),
    (rf"GET /api/models/{NAME}/tree/([^/]+)/(.+)", Handler.list_tree),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.download),
]
