"""A Hub on the loopback interface: enough of the real protocol for the unmodified huggingface_hub client to create
repositories, upload (plain, LFS, multi-part), commit, branch, open pull requests, list, and download (with ranges and
redirects). It keeps everything in memory, remembers requests, and fails on demand.

    with HubServer() as hub:
        hub.fail("PUT", "/lfs/", status=500, times=2)
        subprocess.run([...], env={**os.environ, **hub.environment(home)})
        hub.repos["org/name"].files("main")["config.json"]

Set the environment before huggingface_hub is imported: it reads the endpoint once, so use a subprocess.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

from .hub_repo import File, Repo, goes_through_lfs
from .hub_requests import Handler


@dataclass
class Fault:
    """Answer the next `times` matching requests with `status`; 0 cuts the connection before the request's body is read, `MIDWAY`
    after half of it."""

    method: str
    pattern: re.Pattern[str]
    status: int
    times: int
    after: int


class HubServer:
    """The server; starts with `with`.

    Args:
        tokens: token -> user; any other token is refused as expired.
        part_size: LFS objects larger than this are asked for in parts.

    Attributes:
        url: `http://127.0.0.1:PORT`.
        repos: by full name.
        objects: LFS objects by sha256.
        requests: (method, path) of every request, in order.
    """

    def __init__(self, tokens: dict[str, str] | None = None, part_size: int | None = None) -> None:
        self.tokens = tokens if tokens is not None else {"hf_testtoken": "tester"}
        self.part_size = part_size
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self._faults: list[Fault] = []
        self.lock = threading.RLock()
        server = self

        class Bound(Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        # large files come from another host, as on the real Hub: clients treat such redirects differently
        self.cdn = self.url.replace("127.0.0.1", "localhost")

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: Path, token: str | None = "hf_testtoken") -> dict[str, str]:
        """What a child process needs to talk to this server and to nobody else."""
        found = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(home),
                 "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}  # fmt: skip
        return found if token is None else found | {"HF_TOKEN": token}

    def fail(self, method: str, pattern: str, *, status: int, times: int = 1, after: int = 0) -> None:
        """Fail requests whose path matches (see `Fault`); `after` lets some through first."""
        with self.lock:
            self._faults.append(Fault(method, re.compile(pattern), status, times, after))

    def fault_for(self, method: str, path: str) -> int | None:
        with self.lock:
            for fault in self._faults:
                if fault.method == method and fault.pattern.search(path) and fault.times:
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault.status
        return None

    def put(self, name: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """Fill a repository without going through the client; returns the commit."""
        repo = self.repos.setdefault(name, Repo(name, private))
        held = dict(repo.commits[repo.refs["main"]])
        held |= {path: File(data, goes_through_lfs(path, len(data))) for path, data in files.items()}
        repo.refs["main"] = repo.add(held, "put")
        return repo.refs["main"]
