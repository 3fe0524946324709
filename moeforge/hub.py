"""Uploads to the Hugging Face Hub through its own client, with its errors in one line each."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import BadInput, MachineLacks, MoeforgeError, UsageProblem, one_line

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{6,}")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Pushed:
    """Where an upload ended."""

    commit: str
    url: str
    """Of the commit, or of the pull request."""
    pull_request: str | None = None


def check_repo(name: str) -> str:
    """`name` when it can be a repository's.

    Raises:
        UsageProblem: it is not `org/name`.
    """
    if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith((".git", ".", "-")):
        raise UsageProblem(f"{name!r} is not a Hub repository: write ORG/NAME with letters, digits, '-', '_' and '.'")
    return name


def push_files(
    repo: str,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    private: bool = False,
    branch: str = "main",
    pull_request: bool = False,
    on_bytes: Callable[[float], object] = lambda count: None,
) -> Pushed:
    """Make `repo` hold `files`, in one commit.

    Weights go up first, file by file; what the Hub already has by content is not sent again, so that the same call
    after an interruption continues where it stopped. Other files of the repository stay. The token is the one of `hf auth
    login` or `HF_TOKEN`.

    Args:
        files: path in the repository -> local file or content.
        private: the repository is made private; one that is there and public is refused.
        branch: created when it is missing.
        pull_request: propose the commit instead of making it.
        on_bytes: called with the size of each file that is up.

    Raises:
        MoeforgeError: the Hub refused or cannot be reached.
    """
    import huggingface_hub as hub
    from huggingface_hub.utils import disable_progress_bars

    # its own bars would fight with ours over the terminal
    disable_progress_bars()
    api = hub.HfApi()
    what = f"push to {repo}"
    with hub_errors(what):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UsageProblem(
                f"{what}: --private, but the repository is there already and public; make it private on the Hub, or leave --private out"
            )
        if branch != "main":
            api.create_branch(repo, branch=branch, exist_ok=True)
        additions = [hub.CommitOperationAdd(name, str(held) if isinstance(held, Path) else held)
                     for name, held in sorted(files.items())]  # fmt: skip
        for addition in additions:
            size = addition.upload_info.size
            api.preupload_lfs_files(repo, [addition], revision=branch, create_pr=pull_request)
            on_bytes(size)
        made = api.create_commit(repo, additions, commit_message=message, revision=branch, create_pr=pull_request)
    return Pushed(made.oid, made.pr_url or made.commit_url, made.pr_url)


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what the client raises into one line that says what to do; tokens are blotted out of everything.

    Raises:
        MoeforgeError: 401 and 403 as UsageProblem, 404 as BadInput, no network as MachineLacks.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UsageProblem(f"{what}: no token; run `hf auth login` or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise MachineLacks(f"{what}: HF_HUB_OFFLINE is set; unset it to use the network") from error
    except HFValidationError as error:
        raise UsageProblem(f"{what}: {redact(error)}") from error
    except HfHubHTTPError as error:
        raise _of_status(what, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
            raise
        raise MachineLacks(
            f"{what}: the Hub cannot be reached ({type(error).__name__}: {redact(error)}); run the same command again, it resumes"
        ) from error


def _of_status(what: str, error: Exception) -> MoeforgeError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    told = redact(getattr(error, "server_message", None) or error)
    if status == 401:
        return UsageProblem(
            f"{what}: the Hub does not accept the token, or there is none ({told}); run `hf auth login` or set HF_TOKEN"
        )
    if status == 403:
        return UsageProblem(
            f"{what}: the token may not write there ({told}); use a token with write access, or another ORG/NAME"
        )
    if status == 404:
        return BadInput(f"{what}: not found ({told}); check the name and the branch")
    if status is not None and status >= 500:
        return MachineLacks(
            f"{what}: the Hub has trouble (HTTP {status}: {told}); run the same command later, it resumes"
        )
    return MoeforgeError(f"{what}: the Hub refused (HTTP {status}: {told})")


def redact(text: object) -> str:
    """`text` in one line without anything that looks like a token."""
    return _TOKEN.sub(r"\1_***", one_line(text))
