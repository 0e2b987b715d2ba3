"""A Hugging Face Hub in memory on 127.0.0.1, as much of it as it takes to push and to load a model.

Commits, branches, pull requests, LFS uploads with verification, and downloads of models and datasets; no Xet. A new
process is pointed at it by `HubStub.environment`, which huggingface_hub reads when it is imported; the test's own,
which has imported it, by `HubStub.connect`.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class HubStub:
    """Serves while used as a context manager; what it holds can be read from the test's side at any time."""

    def __init__(self, tokens: dict[str, str]):  # noqa: D107
        self.tokens = tokens  # token to user name
        self.repos: dict[str, dict[str, str]] = {}  # "user/name" to {branch: commit}
        self.commits: dict[str, dict[str, bytes]] = {}  # commit to {path: content}
        self.messages: list[str] = []  # of all commits
        self.blobs: dict[str, bytes] = {}  # LFS content by sha256
        self.verified: set[str] = set()  # the sha256 that the client asked to verify
        self.log: list[tuple[str, str, int]] = []  # (method, path, status)
        self.received: list[bytes] = []  # the body of every request
        self.failing: dict[tuple[str, str], int] = {}  # (method, part of the path) to the status it answers

    def __enter__(self):  # noqa: D105
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *error):  # noqa: D105
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """What a client's environment needs; `home` is its HF_HOME, `token` its HF_TOKEN."""
        environment = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return environment | {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_TOKEN": token or ""}

    def connect(self, patch, home: Path, token: str | None = None) -> None:
        """Do to this process what `environment` does to a new one, as long as the MonkeyPatch `patch` lasts."""
        from diffusers.loaders import lora_base
        from huggingface_hub import constants, hf_api

        for name, value in self.environment(home, token).items():
            patch.setenv(name, value)
        url = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        read = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_CACHE": str(home / "hub")}
        read |= {
            "HF_HOME": str(home),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "tokens"),
        }
        read |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_TELEMETRY": True}
        for name, value in read.items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", self.url)
        patch.setattr(lora_base, "HF_HUB_OFFLINE", False)

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What the repository holds on a branch."""
        return self.commits[self.repos[repo_id][branch]]

    def commit(self, repo_id: str, branch: str, files: dict[str, bytes]) -> str:
        """Add a commit that leaves `files` on the branch; its hash."""
        state = f"{repo_id} {branch} {len(self.commits)}".encode()
        commit = hashlib.sha1(state).hexdigest()
        self.commits[commit] = files
        self.repos.setdefault(repo_id, {})[branch] = commit
        return commit


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args):
        pass

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self._read()
        self.hub.received.append(self.body)
        for (method, part), status in self.hub.failing.items():
            if method == self.command and part in path:
                return self._send(status, {"error": f"the stub was told to answer {status}"})
        for method, pattern, action in _ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return action(self, *match.groups())
        return self._send(501, {"error": f"the stub doesn't know {self.command} {path}"})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: dict | bytes, headers: dict[str, str] | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.hub.log.append((self.command, urlsplit(self.path).path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str):
        return self._send(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _user(self) -> str | None:
        """The token's owner; answers 401 itself where there is none."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            self._send(401, {"error": "Invalid credentials in Authorization header"})
        return self.hub.tokens.get(token)

    def _writer(self, repo_id: str) -> bool:
        user = self._user()
        if user is not None and repo_id.split("/")[0] != user:
            self._send(403, {"error": f"{user} may not write to {repo_id}"})
        return user is not None and repo_id.split("/")[0] == user

    def _revision(self, repo_id: str, revision: str) -> str | None:
        """The commit; answers 404 itself where there is none."""
        branches = self.hub.repos.get(repo_id)
        if branches is None:
            return self._missing("RepoNotFound")
        if revision not in branches and revision not in self.hub.commits:
            return self._missing("RevisionNotFound")
        return branches.get(revision, revision)

    # Pushing

    def whoami(self):
        if user := self._user():
            self._send(200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {}}})

    def create(self):
        wanted = json.loads(self.body)
        if not (user := self._user()):
            return None
        repo_id = f"{wanted.get('organization') or user}/{wanted['name']}"
        if not self._writer(repo_id):
            return None
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.commit(repo_id, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        status = 409 if exists else 200
        return self._send(status, {"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id})

    def branch(self, repo_id, branch):
        if self._writer(repo_id):
            self.hub.commit(repo_id, branch, self.hub.files(repo_id))
            self._send(200, {})

    def validate_yaml(self):
        text = json.loads(self.body)["content"]
        valid = text.startswith("---\n") and "\n---\n" in text
        errors = [] if valid else [{"message": "no metadata"}]
        self._send(200 if valid else 400, {"errors": errors, "warnings": []})

    def preupload(self, repo_id, revision):
        if not (self._asks_for_a_pull_request() or self._writer(repo_id)) or self._revision(repo_id, revision) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._send(200, {"files": files})

    def lfs_batch(self, repo_id):
        if not self._writer(repo_id):
            return
        objects = [
            {
                **wanted,
                "authenticated": True,
                "actions": {
                    "upload": {"href": f"{self.hub.url}/lfs/{repo_id}/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                },
            }
            for wanted in json.loads(self.body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, repo_id, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(400, {"error": "the content isn't what the hash says"})
        self.hub.blobs[oid] = self.body
        return self._send(200, {})

    def lfs_verify(self):
        oid = json.loads(self.body)["oid"]
        self.hub.verified.add(oid)
        self._send(200 if oid in self.hub.blobs else 404, {})

    def _asks_for_a_pull_request(self) -> bool:
        return parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"] and self._user() is not None

    def commit(self, repo_id, revision):
        pull_request = self._asks_for_a_pull_request()
        if not (pull_request or self._writer(repo_id)) or self._revision(repo_id, revision) is None:
            return
        files = dict(self.hub.files(repo_id, revision))
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                self.hub.messages.append(value["summary"])
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        number = sum(branch.startswith("refs/pr/") for branch in self.hub.repos[repo_id]) + 1
        commit = self.hub.commit(repo_id, f"refs/pr/{number}" if pull_request else revision, files)
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        answer = {"success": True, "commitOid": commit, "commitUrl": url}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        self._send(200, answer)

    # Loading

    def info(self, repo_id, revision=None):
        if (commit := self._revision(repo_id, revision or "main")) is None:
            return
        siblings = [{"rfilename": path} for path in self.hub.commits[commit]]
        self._send(200, {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []})

    def paths_info(self, repo_id, revision):
        if (commit := self._revision(repo_id, revision)) is None:
            return
        wanted = json.loads(self.body)["paths"]
        self._send(200, json.dumps([entry for entry in self._entries(commit) if entry["path"] in wanted]).encode())

    def tree(self, repo_id, revision, folder):
        if (commit := self._revision(repo_id, revision)) is None:
            return
        entries = [entry for entry in self._entries(commit) if entry["path"].startswith((folder or "").strip("/"))]
        self._send(200, json.dumps(entries).encode())

    def _entries(self, commit):
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in self.hub.commits[commit].items()
        ]

    def resolve(self, repo_id, revision, path):
        if (commit := self._revision(repo_id, revision)) is None:
            return None
        content = self.hub.commits[commit].get(path)
        if content is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self._send(404, {"error": f"no {path}"}, headers)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), int(span[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(206, content[start : end + 1], headers)
        return self._send(200, content, {**headers, "Accept-Ranges": "bytes"})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [  # the first that matches answers
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), rf"/api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (("POST",), rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), rf"/lfs/{_REPO}/([0-9a-f]{{64}})", _Handler.lfs_put),
    (("POST",), "/lfs/verify", _Handler.lfs_verify),
    (("POST",), rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (("GET",), rf"/api/(?:models|datasets)/{_REPO}/tree/([^/]+)(/.*)?", _Handler.tree),
    (("POST",), rf"/api/datasets/{_REPO}/paths-info/([^/]+)", _Handler.paths_info),
    (("GET",), rf"/api/(?:models|datasets)/{_REPO}(?:/revision/(.+))?", _Handler.info),
    (("GET", "HEAD"), rf"(?:/datasets)?/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
