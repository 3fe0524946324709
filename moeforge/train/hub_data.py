"""Datasets of the Hugging Face Hub as text to train on: the parquet or JSON lines files of a repository, pinned to a
commit, read through huggingface_hub alone and kept in its cache. No torch.

    org/name      hub:org/name@revision:split
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from ..checkpoint.hub import hub_errors
from ..errors import BadInput, MachineLacks
from ..texts import PREFIX as BUILTIN
from .data import TEXT, split_weight

PREFIX = "hub:"
SUFFIXES = (".jsonl", ".parquet")
"""The first kind that a repository has is read: many hold the same rows in both."""
_SPEC = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^@:\s]+))?(:(?P<split>[\w.-]+))?", re.ASCII)


@dataclass(frozen=True)
class Dataset:
    """What a source asks for.

    Attributes:
        revision: branch, tag or commit; None is the main branch.
        split: None is `train` where there is such a split, else every file.
    """

    name: str
    revision: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "") + (f":{self.split}" if self.split else "")


def parse(spec: str) -> Dataset | None:
    """The dataset that `hub:org/name[@revision][:split]` names (the prefix may be left out); None for anything else."""
    found = _SPEC.fullmatch(spec.removeprefix(PREFIX))
    # a file that is not there is not to be looked for on the Hub
    if found is None or (not spec.startswith(PREFIX) and found["name"].endswith((*SUFFIXES, *TEXT))):
        return None
    return Dataset(found["name"], found["revision"], found["split"])


def pinned(spec: str) -> str:
    """A source (and its weight) with the commit that it means now; sources that are not on the Hub stay as they are."""
    source, weight = split_weight(spec)
    dataset = None if source.startswith(BUILTIN) or Path(source).expanduser().exists() else parse(source)
    if dataset is None:
        return spec
    commit, _ = _listed(dataset.name, dataset.revision)
    return f"{PREFIX}{Dataset(dataset.name, commit, dataset.split)}" + ("" if weight is None else f"={weight:g}")


def files(dataset: Dataset) -> list[tuple[Path, str]]:
    """The files that hold its documents, downloaded, by name; and what each is called in messages: repository, commit, path.

    Raises:
        BadInput: no such dataset, revision or split, or no file of a kind that is read.
        MachineLacks: the Hub cannot be reached and the cache does not hold it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    commit, names = _listed(dataset.name, dataset.revision)
    found = []
    for name in choose(names, dataset):
        with hub_errors(f"--data {dataset}: {name}"):
            path = hf_hub_download(dataset.name, name, repo_type="dataset", revision=commit)
        found.append((Path(path), f"{PREFIX}{dataset.name}@{commit}/{name}"))
    return found


def choose(names: tuple[str, ...], dataset: Dataset) -> list[str]:
    """The files of one split, by the Hub's habits: `data/train-00000-of-00002.parquet`, `train.jsonl`, `train/0000.parquet`.

    Raises:
        BadInput: none; says what there is.
    """
    kinds = [[name for name in names if name.endswith(suffix)] for suffix in SUFFIXES]
    held = next(filter(None, kinds), [])
    if not held:
        raise BadInput(f"--data {dataset}: no {' or '.join(SUFFIXES)} files among the dataset's {len(names)} files; "
                       "download it and convert it to JSON lines with a text column")  # fmt: skip
    wanted = [name for name in held if (dataset.split or "train") in _split_words(name)]
    if wanted or dataset.split is None:
        return sorted(wanted or held)
    raise BadInput(f"--data {dataset}: no file of split {dataset.split!r}; there are {', '.join(sorted(held)[:8])}")


def _split_words(name: str) -> set[str]:
    path = PurePosixPath(name)
    return {*path.parts[:-1], path.stem, re.split(r"[-.]", path.stem)[0]}


@cache
def _listed(name: str, revision: str | None) -> tuple[str, tuple[str, ...]]:
    """Commit and file names. Asked once a process, so that plan and run mean one commit."""
    from huggingface_hub import HfApi

    what = f"--data {Dataset(name, revision)}"
    try:
        with hub_errors(what):
            info = HfApi().dataset_info(name, revision=revision)
    except MachineLacks:
        root = _cached(name, revision)
        if root is None:
            raise
        names = tuple(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        _check_parts(names, what)
        return root.name, names
    if info.sha is None:
        raise BadInput(f"{what}: the Hub names no commit for it")
    return info.sha, tuple(sibling.rfilename for sibling in info.siblings or ())


def _check_parts(names: tuple[str, ...], what: str) -> None:
    """
    Raises:
        MachineLacks: of files that say how many they are (`train-00000-of-00002.parquet`) the cache holds only some.
    """
    parts: dict[tuple[str, int], int] = {}
    for name in names:
        if found := re.fullmatch(r"(.*?)-\d+-of-(\d+)(\.\w+)", name):
            kind = (found[1] + found[3], int(found[2]))
            parts[kind] = parts.get(kind, 0) + 1
    for (name, whole), held in parts.items():
        if held < whole:
            raise MachineLacks(f"{what}: the Hub cannot be reached, and the cache holds {held} of the {whole} parts of {name}; "
                               "run it once with a network")  # fmt: skip


def _cached(name: str, revision: str | None) -> Path | None:
    """The newest snapshot of a dataset in the Hub's cache. Only commits can be told apart there: files are asked for by
    commit, so the cache knows no branches of them."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return None
    held = [found for repo in repos if (repo.repo_type, repo.repo_id) == ("dataset", name)
            for found in repo.revisions if revision in (None, found.commit_hash, *found.refs)]  # fmt: skip
    newest = max(held, key=lambda found: found.last_modified, default=None)
    return None if newest is None else newest.snapshot_path
