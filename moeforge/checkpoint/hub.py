"""A repository on the Hugging Face Hub, pinned to a commit. Headers come by range request; a weight file is downloaded
into the Hub's own cache (`HF_HOME`) when its bytes are first asked for. `HF_HUB_OFFLINE` and a missing network leave what
the cache holds.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import BadInput, MachineLacks
from .base import Checkpoint
from .companions import CONFIG
from .directory import open_directory
from .index import Weights, choose_weights, lone_gguf, read_index
from .safetensors import LENGTH_BYTES, Header, header_length, parse_header, parse_json, read_header
from .sharded import COMPANIONS, ShardedCheckpoint, is_companion
from .tensor import Companion

FIRST_REQUEST = 100_000
"""Bytes of a file asked for at first: nearly every header is smaller."""
ADAPTER = "adapter_config.json"
LOCAL = "if a local path is meant, check its spelling: there is none of this name"
UNREACHED = f"{LOCAL}; HF_HUB_OFFLINE=1 makes do with what was downloaded before"
"""What to do where the network does not answer."""


@contextlib.contextmanager
def hub_errors(ref: str) -> Iterator[None]:
    """What the client raises, as one line. Nothing that a server said is repeated, as it may quote a token.

    Raises:
        BadInput: no such repository, revision or file, or no right to it.
        MachineLacks: no network, a server in trouble, or a full disk.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise BadInput(
            f"{ref}: the repository is gated; accept its terms on the Hub, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BadInput(
            f"{ref}: no such repository on the Hub, or a private one; check the name, or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BadInput(
            f"{ref}: the repository has no such revision; name a branch, a tag or a commit after the @"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise MachineLacks(
            f"{ref}: not in the local cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is set); {LOCAL}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise BadInput(f"{ref}: the repository lacks a file that it should have; its upload is incomplete") from error
    except errors.HFValidationError as error:
        raise BadInput(f"{ref}: not a valid Hub id; write org/name or org/name@revision") from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise BadInput(
                f"{ref}: the Hub refused the token (HTTP {status}); run `hf auth login` or set HF_TOKEN"
            ) from error
        if status is not None and status < 500 and status != 429:
            raise BadInput(f"{ref}: the Hub refused (HTTP {status})") from error
        raise MachineLacks(f"{ref}: the Hub has trouble (HTTP {status}); try again later") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineLacks(f"{ref}: the disk of the Hub's cache is full; free some room or set HF_HOME") from error
        if not _of_network(error):
            raise
        raise MachineLacks(f"{ref}: the Hub cannot be reached ({type(error).__name__}); {UNREACHED}") from error
    except Exception as error:
        if not _of_network(error):
            raise
        raise MachineLacks(f"{ref}: the Hub cannot be reached ({type(error).__name__}); {UNREACHED}") from error


def _of_network(error: Exception) -> bool:
    packages = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in packages


def open_hub(
    name: str,
    revision: str | None,
    *,
    file: str | None = None,
    allow_pickle: bool,
    open_adapter: Callable[[Path, str, str], Checkpoint],
) -> Checkpoint:
    """The checkpoint `name` (`org/name`) at `revision` (default: the main branch).

    Args:
        file: the GGUF file that is meant.
        open_adapter: opens a downloaded adapter directory.

    Raises:
        BadInput: there is none, it is not accessible, damaged, pickled, or holds no weights.
        MachineLacks: the Hub cannot be reached and the cache does not hold it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    ref = "/".join(filter(None, (name, file))) + (f"@{revision}" if revision else "")
    try:
        with hub_errors(ref):
            info = HfApi().model_info(name, revision=revision)
    except MachineLacks:
        snapshot = _cached_snapshot(name, revision, file)
        if snapshot is None:
            raise
        if file is not None:
            from .hub_gguf import HubGGUF

            return HubGGUF(ref, name, snapshot.name, file, None)
        if (snapshot / ADAPTER).exists() and not (snapshot / CONFIG).exists():
            return open_adapter(snapshot, ref, snapshot.name)
        return open_directory(snapshot, ref=ref, revision=snapshot.name, allow_pickle=allow_pickle)
    commit = info.sha
    files = {sibling.rfilename for sibling in info.siblings or ()}
    if commit is None:
        raise BadInput(f"{ref}: the Hub names no commit for it")

    def download(*patterns: str) -> Path:
        with hub_errors(ref):
            return Path(
                snapshot_download(
                    name, revision=commit, allow_patterns=[*patterns, *COMPANIONS], ignore_patterns=["*.py"]
                )
            )

    if ADAPTER in files and CONFIG not in files:
        return open_adapter(download("adapter_*"), ref, commit)
    licence = getattr(info.card_data, "license", None)
    licence = licence if isinstance(licence, str) else None
    at = f"@{revision}" if revision else ""
    gguf = file or (lone_gguf(files) if CONFIG not in files else None)
    if gguf is not None:
        from .hub_gguf import HubGGUF

        ref = f"{name}/{gguf}{at}"
        if gguf not in files:
            raise BadInput(f"{ref}: the repository has no such file")
        return HubGGUF(ref, name, commit, gguf, licence)
    weights = choose_weights(files, ref, allow_pickle, lambda file: f"{name}/{file}{at}")
    if weights.pickled:
        snapshot = download(CONFIG, "pytorch_model*.bin", "pytorch_model.bin.index.json")
        return open_directory(snapshot, ref=ref, revision=commit, allow_pickle=True)
    return HubCheckpoint(ref, name, commit, files, weights, licence)


def _cached_snapshot(name: str, revision: str | None, file: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for held in (file,) if file else (CONFIG, ADAPTER):
        found = try_to_load_from_cache(name, held, revision=revision)
        if isinstance(found, str):
            return Path(found).parents[held.count("/")]
    return None


def read_range(name: str, file: str, commit: str, start: int, count: int, where: str) -> tuple[bytes, int]:
    """At most `count` bytes of a repository's file from byte `start`, and the file's size.

    Raises:
        BadInput, MachineLacks: it cannot be had.
    """
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    data, skip = bytearray(), 0
    with (
        hub_errors(where),
        get_session().stream("GET", hf_hub_url(name, file, revision=commit), headers=headers, follow_redirects=True,
                             timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
    ):  # fmt: skip
        if response.status_code == 416:  # an empty file has no first byte
            return b"", 0
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        # a server that ignores the range sends the whole file: stop after what was asked for
        skip = start if response.status_code == 200 else 0
        for piece in response.iter_bytes():
            data += piece
            if len(data) >= skip + count:
                break
        total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get(
            "Content-Length", ""
        )
    if not total.isdigit():
        raise BadInput(f"{where}: the Hub does not say how large it is")
    return bytes(data[skip : skip + count]), int(total)


class HubCheckpoint(ShardedCheckpoint):
    """Safetensors in a Hub repository; see the module. Made by :func:`open_hub`."""

    def __init__(self, ref: str, name: str, commit: str, files: set[str], weights: Weights, licence: str | None):
        self._name, self._commit, self._names, self._license, self.ref = name, commit, files, licence, ref
        config = parse_json(self._local(CONFIG).read_bytes(), f"{ref}: {CONFIG}")
        weight_map, shards = None, [weights.file or ""]
        if weights.index is not None:
            weight_map = read_index(self._local(weights.index).read_bytes(), f"{ref}: {weights.index}")
            shards = sorted(set(weight_map.values()))
        with ThreadPoolExecutor(8) as pool:
            headers = dict(zip(shards, pool.map(self._header, shards), strict=True))
        super().__init__(ref, None, config, headers, weight_map)

    def _local(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        if file not in self._names:
            raise BadInput(f"{self.ref}: {file} is missing from the repository; its upload is incomplete")
        with hub_errors(self.ref):
            return Path(hf_hub_download(self._name, file, revision=self._commit))

    def _header(self, file: str) -> Header:
        from huggingface_hub import try_to_load_from_cache

        where = f"{self.ref}: {file}"
        if file not in self._names:
            raise BadInput(f"{where} is missing from the repository; its upload is incomplete")
        cached = try_to_load_from_cache(self._name, file, revision=self._commit)
        if isinstance(cached, str):
            return read_header(Path(cached), where)
        start, size = read_range(self._name, file, self._commit, 0, FIRST_REQUEST, where)
        whole = LENGTH_BYTES + header_length(start, size, where)
        if whole > len(start):
            start, size = read_range(self._name, file, self._commit, 0, whole, where)
        if whole > len(start):
            raise BadInput(f"{where}: the Hub sent {len(start)} of the header's {whole} bytes; try again")
        return parse_header(start[:whole], size, where)

    def companions(self) -> Sequence[Companion]:
        return [Companion(file, path=self._local(file)) for file in sorted(self._names) if is_companion(file)]

    def provenance(self) -> dict[str, Any]:
        found = {
            "ref": self.ref,
            "format": "safetensors",
            "revision": self._commit,
            "digest": self.header_digest(self._commit),
        }
        return found | ({"license": self._license} if self._license else {})
