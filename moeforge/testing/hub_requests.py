"""How the loopback Hub answers one request: the routes of the real protocol, each over the repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_repo import File, Repo, goes_through_lfs

if TYPE_CHECKING:
    from .hub_server import HubServer

MIDWAY = -1
"""The status of a fault that cuts the connection after half of the request's body."""


class _Refused(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    """One request; `hub` is what it is answered from."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet; `HubServer.requests` remembers."""

    def _serve(self) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.raw_path = split.path
        self.hub.requests.append((self.command, path))
        fault = self.hub.fault_for(self.command, path)
        if fault in (0, MIDWAY):
            if fault == MIDWAY:
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read_body()
        try:
            if fault is not None:
                raise _Refused(fault, "injected fault")
            for method, pattern, handler in _ROUTES:
                found = pattern.fullmatch(split.path)
                if found and self.command in method:
                    with self.hub.lock:
                        handler(self, *map(unquote, found.groups()))
                    return
            raise _Refused(404, f"no such route: {self.command} {path}")
        except _Refused as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send(refusal.status, {"error": refusal.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        given = {
            "Content-Type": "application/octet-stream" if isinstance(body, bytes) else "application/json",
            **(headers or {}),
        }
        for name, value in given.items():
            self.send_header(name, value)
        if "Content-Length" not in given:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self, required: bool = True) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and token not in self.hub.tokens:
            raise _Refused(401, "Invalid credentials in Authorization header: the token is expired or was revoked")
        if not token and required:
            raise _Refused(401, "Invalid username or password.")
        return self.hub.tokens.get(token)

    def repo(self, name: str, write: bool = False) -> Repo:
        user = self.user(required=write)
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and user is None):
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.allow(name, user)
        return repo

    def allow(self, name: str, user: str | None) -> None:
        if name.partition("/")[0] in ("forbidden", "readonly"):
            raise _Refused(403, f"Forbidden: you ({user}) don't have the rights to write to {name.partition('/')[0]}")

    def commit(self, repo: Repo, revision: str) -> str:
        found = repo.resolve(revision)
        if found is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    # -- writing

    def create(self) -> None:
        user, asked = self.user(), self.json()
        name = f"{asked.get('organization') or user}/{asked['name']}"
        self.allow(name, user)
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            self._send(409, {"error": "You already created this model repo", **answer})
            return
        self.hub.repos[name] = Repo(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        self._send(200, answer)

    def whoami(self) -> None:
        self._send(200, {"type": "user", "name": self.user(), "orgs": [], "auth": {"type": "access_token"}})

    def validate(self) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def branch(self, name: str, branch: str) -> None:
        repo = self.repo(name, write=True)
        if branch in repo.refs:
            raise _Refused(409, f"Reference already exists: refs/heads/{branch}")
        repo.refs[branch] = self.commit(repo, self.json().get("startingPoint") or "main")
        self._send(201)

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        held = repo.commits[self.commit(repo, revision)]
        files = []
        for asked in self.json()["files"]:
            path = asked["path"]
            lfs = goes_through_lfs(path, asked["size"])
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in held and held[path].lfs == lfs:
                entry["oid"] = held[path].sha256 if lfs else held[path].oid
            files.append(entry)
        self._send(200, {"files": files})

    def lfs_batch(self, name: str) -> None:
        self.repo(name, write=True)
        objects = []
        for asked in self.json()["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
                size = self.hub.part_size
                if size and asked["size"] > size:
                    count = -(-asked["size"] // size)
                    parts = {str(i + 1): f"{self.hub.url}/lfs/{asked['oid']}/{i + 1}" for i in range(count)}
                    upload["header"] = {"chunk_size": str(size), **parts}
                entry["actions"] = {"upload": upload}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid: str) -> None:
        self._keep(oid, self.body)

    def lfs_part(self, oid: str, part: str) -> None:
        self.hub.parts[oid, int(part)] = self.body
        self._send(200, None, {"ETag": f'"{part}"'})

    def lfs_complete(self, oid: str) -> None:
        self._keep(oid, b"".join(self.hub.parts.pop((oid, part["partNumber"])) for part in self.json()["parts"]))

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise _Refused(400, f"content of {oid} has another hash")
        self.hub.objects[oid] = data
        self._send(200, {})

    def make_commit(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        files = dict(repo.commits[self.commit(repo, revision)])
        message = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Refused(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = repo.add(files, message)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"}
        if "create_pr" in self.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            repo.refs[f"refs/pr/{number}"] = commit
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        else:
            repo.refs[revision] = commit
        self._send(200, answer)

    # -- reading

    def info(self, name: str, revision: str = "main") -> None:
        repo = self.repo(name)
        commit = self.commit(repo, revision)
        siblings = []
        for path, file in sorted(repo.commits[commit].items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                sibling |= {"size": len(file.data), "blobId": file.oid}
                if file.lfs:
                    sibling["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": 130}
            siblings.append(sibling)
        self._send(200, {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings,
                         "tags": [], "downloads": 0, "likes": 0, "disabled": False, "gated": False,
                         "lastModified": "2025-01-01T00:00:00.000Z", "createdAt": "2025-01-01T00:00:00.000Z"})  # fmt: skip

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        repo = self.repo(name)
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        files = repo.commits[self.commit(repo, revision)]
        deep = "recursive" in self.query and self.query["recursive"][0].lower() in ("1", "true")
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            head, slash, _ = path[len(prefix) :].partition("/")
            if slash and not deep:
                entries[head] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + head}
            else:
                entries[path] = file.entry(path)
        self._send(200, list(entries.values()))

    def paths_info(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        files = repo.commits[self.commit(repo, revision)]
        form = parse_qs(self.body.decode())
        asked = self.json()["paths"] if self.body.startswith(b"{") else form.get("paths", [])
        self._send(200, [files[path].entry(path) for path in asked if path in files])

    def list_refs(self, name: str) -> None:
        repo = self.repo(name)
        branches = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": commit}
                    for ref, commit in repo.refs.items() if not ref.startswith("refs/")]  # fmt: skip
        self._send(200, {"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        commit = self.commit(repo, revision)
        file = repo.commits[commit].get(path)
        if file is None:
            raise _Refused(404, f"Entry not found: {path}", "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            self.hub.objects[file.sha256] = file.data
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data)),
                        "Location": f"{self.hub.cdn}/cdn/{file.sha256}"}  # fmt: skip
            self._send(302, None, headers)
            return
        self._ranged(file.data, headers)

    def cdn(self, oid: str) -> None:
        if oid not in self.hub.objects:
            raise _Refused(404, "no such object")
        self._ranged(self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, data: bytes, headers: dict[str, str]) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found is None:
            self._send(200, data, headers | {"Content-Length": str(len(data))})
            return
        start = int(found[1])
        stop = min(int(found[2]) + 1 if found[2] else len(data), len(data))
        if start >= stop:
            self._send(416, None, {"Content-Range": f"bytes */{len(data)}"})
            return
        self._send(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def _route(
    methods: str, pattern: str, handler: Callable[..., None]
) -> tuple[list[str], re.Pattern[str], Callable[..., None]]:
    return methods.split(), re.compile(pattern), handler


_NAME = "([^/]+/[^/]+)"
_DATASET = "(datasets/[^/]+/[^/]+)"
_ROUTES = (
    _route("POST", "/api/repos/create", Handler.create),
    _route("GET", "/api/whoami-v2", Handler.whoami),
    _route("POST", "/api/validate-yaml", Handler.validate),
    _route("POST", f"/api/models/{_NAME}/branch/([^/]+)", Handler.branch),
    _route("POST", f"/api/models/{_NAME}/preupload/([^/]+)", Handler.preupload),
    _route("POST", f"/api/models/{_NAME}/commit/([^/]+)", Handler.make_commit),
    _route("POST", f"/api/models/{_NAME}/paths-info/([^/]+)", Handler.paths_info),
    _route("GET", f"/api/models/{_NAME}/revision/([^/]+)", Handler.info),
    _route("GET", f"/api/models/{_NAME}/tree/([^/]+)", Handler.tree),
    _route("GET", f"/api/models/{_NAME}/tree/([^/]+)/(.+)", Handler.tree),
    _route("GET", f"/api/models/{_NAME}/refs", Handler.list_refs),
    _route("GET", f"/api/models/{_NAME}", Handler.info),
    _route("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    _route("PUT", "/lfs/([0-9a-f]{64})", Handler.lfs_put),
    _route("PUT", "/lfs/([0-9a-f]{64})/([0-9]+)", Handler.lfs_part),
    _route("POST", "/lfs/([0-9a-f]{64})", Handler.lfs_complete),
    _route("GET HEAD", "/cdn/([0-9a-f]{64})", Handler.cdn),
    _route("GET HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    # datasets are read only; `HubServer.put("datasets/org/name", ...)` fills one
    _route("GET", f"/api/{_DATASET}/revision/([^/]+)", Handler.info),
    _route("GET", f"/api/{_DATASET}", Handler.info),
    _route("GET HEAD", f"/{_DATASET}/resolve/([^/]+)/(.+)", Handler.resolve),
)
