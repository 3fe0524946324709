"""Which checkpoint tensors make which parameters of a model, and how.

On disk a mixture's experts have a name each; transformers (5 and newer) holds them stacked as `[E, ...]`. The rules for that
are transformers' own, declared for every architecture, so whatever its `from_pretrained` reads, this reads: but
tensor by tensor, from any :class:`Checkpoint`, straight into the final memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..checkpoint.base import Checkpoint
from ..checkpoint.tensor import FLOATS, SAFETENSORS_DTYPES
from ..errors import BadInput, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

BLOCK = 1 << 24
"""Bytes of a large tensor that are read at once."""


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A numpy array as a torch tensor over the same memory, bfloat16 and float8 included.

    Raises:
        BadInput: a dtype that torch does not hold.
    """
    name = SAFETENSORS_DTYPES.get(array.dtype)
    if name not in _TORCH_DTYPES:
        raise BadInput(f"a tensor of dtype {array.dtype} cannot be loaded into a model")
    if name in ("BF16", "F8_E4M3", "F8_E5M2"):
        raw = array.view(np.int16 if name == "BF16" else np.uint8)
        return torch.from_numpy(raw).view(_TORCH_DTYPES[name])
    return torch.from_numpy(array)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a `config.json` name such as `bfloat16`.

    Raises:
        BadInput: not a floating-point type of torch.
    """
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BadInput(f"{name!r} is not a floating-point type; use float32, bfloat16 or float16")
    return found


@dataclass
class _Group:
    """Checkpoint tensors that together make some parameters."""

    targets: tuple[str, ...]
    converter: Any = None
    """transformers' WeightConverter, None for one tensor that is copied."""
    sources: list[tuple[str, str]] = field(default_factory=list)
    """(checkpoint name, the converter's source pattern), in natural order."""


class WeightMap:
    """The strict correspondence of a checkpoint's tensors and a model's parameters and persistent buffers.

    Args:
        checkpoint: read lazily; only headers are looked at here.
        model: as :func:`moeforge.model.build.build` returns it.

    Raises:
        BadInput: a parameter without tensors, a tensor without a parameter, or a shape that does not fit; names up to
            three of each.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self._wanted = dict(model.state_dict(keep_vars=True))
        self._groups = self._match()
        self._by_target = {target: group for group in self._groups for target in group.targets}
        self._alias = self._tied()
        self._check()

    def _match(self) -> list[_Group]:
        from transformers.core_model_loading import WeightConverter, rename_source_key

        from .layout import weight_rules

        rules = weight_rules(self.model)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = self.model.base_model_prefix
        groups: dict[str, _Group] = {}
        for name in sorted(self.checkpoint.tensors, key=_natural):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._wanted)
            if target not in self._wanted and name in self._wanted:
                target, pattern = name, None
            if pattern is None:
                if target in groups:
                    raise BadInput(f"{self._where()}: {name} and {groups[target].sources[0][0]} are both {target}")
                groups[target] = _Group((target,), None, [(name, name)])
                continue
            rule = by_pattern[pattern]
            first = rule.target_patterns[0]
            group = groups.setdefault(
                target, _Group(tuple(target.replace(first, other) for other in rule.target_patterns), rule)
            )
            group.sources.append((name, pattern))
        return list(groups.values())

    def _tied(self) -> dict[str, str]:
        """Parameters without tensors of their own -> the parameter that they are tied to."""
        owners: dict[int, str] = {}
        for target in self._by_target:
            if target in self._wanted:
                owners.setdefault(id(self._wanted[target]), target)
        return {
            name: owners[id(value)]
            for name, value in self._wanted.items()
            if name not in self._by_target and id(value) in owners
        }

    def _check(self) -> None:
        ignored = [re.compile(p) for p in (getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        missing = [name for name in self._wanted if name not in self._by_target and name not in self._alias]
        stray = [group.sources[0][0] for group in self._groups if not any(t in self._wanted for t in group.targets)]
        stray = [
            name
            for name in stray
            if not any(p.search(name) for p in ignored) and not name.endswith(".rotary_emb.inv_freq")
        ]
        if missing or stray:
            told = [f"{what} {_some(names)}" for what, names in (("missing", missing), ("unexpected", stray)) if names]
            raise BadInput(
                f"{self._where()} does not hold the weights of {type(self.model).__name__}: {'; '.join(told)}; "
                "the checkpoint is incomplete or its config.json belongs to another model"
            )
        for target, group in self._by_target.items():
            if target in self._wanted:
                self._check_shape(target, group)

    def _check_shape(self, target: str, group: _Group) -> None:
        wanted = tuple(self._wanted[target].shape)
        shapes = {name: self.checkpoint.tensors[name].shape for name, _ in group.sources}
        if group.converter is None:
            name, found = next(iter(shapes.items()))
        elif _stacks(group.converter):
            columns = self._columns(group)
            counts = {len(names) for names in columns}
            turned = _transposes(group.converter)
            rows, *rest = zip(
                *(shapes[names[0]][::-1] if turned else shapes[names[0]] for names in columns), strict=True
            )
            uniform = all(
                shapes[name] == shapes[names[0]] and _expert(name) == index
                for names in columns
                for index, name in enumerate(names)
            )
            name = columns[0][0]
            found = (counts.pop() if len(counts) == 1 and uniform else -1, sum(rows), *(sizes[0] for sizes in rest))
        else:
            return  # an unusual rule: what it makes is checked when it has run
        if found != wanted:
            raise BadInput(
                f"{self._where()}: {name}{' and its siblings' if len(shapes) > 1 else ''} make a tensor of shape "
                f"{list(found)}, {target} has {list(wanted)}; the checkpoint and its config.json disagree"
            )

    def _columns(self, group: _Group) -> list[list[str]]:
        """Checkpoint names by source pattern, in the order in which the converter joins them."""
        return [
            [name for name, found in group.sources if found == pattern] for pattern in group.converter.source_patterns
        ]

    def _where(self) -> str:
        return str(self.checkpoint.ref)

    def __contains__(self, name: str) -> bool:
        return name in self._wanted

    def names(self) -> list[str]:
        """Every parameter and persistent buffer of the model."""
        return list(self._wanted)

    def sources(self, name: str) -> list[list[str]]:
        """The checkpoint tensors that make a parameter: one list for each block of its rows, experts in order.

        Empty where an unusual rule joins them, which only :meth:`fill` can follow.
        """
        group = self._by_target[self._alias.get(name, name)]
        if group.converter is None:
            return [[group.sources[0][0]]]
        return self._columns(group) if _stacks(group.converter) else []

    def under(self, prefix: str) -> list[str]:
        """Names of the parameters and persistent buffers of the module called `prefix`, inner modules included."""
        return [name for name in self._wanted if name.startswith(prefix + ".")]

    def nbytes(self, names: Iterable[str], dtype: torch.dtype) -> int:
        """Memory that these parameters take in `dtype`."""
        return sum(self._wanted[name].numel() for name in names) * dtype.itemsize

    def fill(self, names: Iterable[str], dtype: torch.dtype, device: torch.device | str = "cpu",
             keep: Mapping[str, torch.dtype] | None = None) -> None:  # fmt: skip
        """Give the named parameters and buffers of the model their values, floating-point ones in `dtype`.

        Args:
            keep: another dtype for some names.
        """
        keep = keep or {}
        done: set[str] = set()
        for name in names:
            if name in done:
                continue
            source = self._alias.get(name, name)
            owner, leaf = _owner(self.model, source)
            if source != name and owner._parameters[leaf].device.type != "meta":  # pyright: ignore[reportOptionalMemberAccess]
                module, tied = _owner(self.model, name)
                module._parameters[tied] = owner._parameters[leaf]
                continue
            for target, value in self._make(self._by_target[source], keep.get(name, dtype), device).items():
                target = name if target == source else target
                if target in self._wanted:
                    self._put(target, value)
                    done.add(target)

    def _make(self, group: _Group, dtype: torch.dtype, device: torch.device | str) -> dict[str, torch.Tensor]:
        if group.converter is None:
            return {group.targets[0]: self._read(group.sources[0][0], dtype, device)}
        if _stacks(group.converter):
            target = group.targets[0]
            out = torch.empty(tuple(self._wanted[target].shape), dtype=dtype, device=device)
            start = 0
            turned = _transposes(group.converter)
            for names in self._columns(group):
                rows = self.checkpoint.tensors[names[0]].shape[-1 if turned else 0]
                for expert, name in enumerate(names):
                    value = to_torch(self.checkpoint.read(name))
                    out[expert, start : start + rows].copy_(value.T if turned else value)
                start += rows
            return {target: out}
        rule = copy.deepcopy(group.converter)
        for name, pattern in group.sources:
            rule.add_tensor(group.targets[0], name, pattern, self._read(name, dtype, device))
        try:
            made = rule.convert(group.targets[0], model=self.model, config=self.model.config)
        except Exception as error:  # whatever transformers raises, the cause is these tensors
            raise BadInput(
                f"{self._where()}: {group.sources[0][0]} does not become {group.targets[0]}: {one_line(error)}"
            ) from error
        values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        # transformers' operations take any size: a chunk of too few rows is shorter, or one of the parts is not there
        for target in group.targets:
            wanted = list(self._wanted[target].shape) if target in self._wanted else None
            found = list(values[target].shape) if target in values else None
            if wanted is not None and found != wanted:
                raise BadInput(
                    f"{self._where()}: {group.sources[0][0]} makes {'nothing' if found is None else found} of {target}, "
                    f"which has {wanted}; the checkpoint and its config.json disagree"
                )
        return values

    def _read(self, name: str, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        info = self.checkpoint.tensors[name]
        if info.nbytes <= BLOCK or info.dtype not in FLOATS or len(info.shape) < 2:
            value = to_torch(self.checkpoint.read(name))
            return value.to(device, dtype if value.is_floating_point() else value.dtype)
        # an embedding table: block by block, so that it is not held twice
        out = torch.empty(info.shape, dtype=dtype, device=device)
        step = max(1, BLOCK * info.shape[0] // info.nbytes)
        for start in range(0, info.shape[0], step):
            rows = slice(start, min(start + step, info.shape[0]))
            out[rows].copy_(to_torch(self.checkpoint.read(name, rows)))
        return out

    def _put(self, name: str, value: torch.Tensor) -> None:
        module, leaf = _owner(self.model, name)
        if leaf in module._parameters:
            old = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(
                value, requires_grad=old is not None and old.requires_grad and value.is_floating_point()
            )
        else:
            module._buffers[leaf] = value

    def free(self, names: Iterable[str]) -> None:
        """Put the named parameters back on the meta device."""
        for name in names:
            module, leaf = _owner(self.model, name)
            if leaf in module._parameters:
                module._parameters[leaf] = self._wanted[name]  # pyright: ignore[reportArgumentType]

    def retie(self) -> None:
        """Make parameters that the config ties one object again, unless the checkpoint holds different values for them."""
        owners: dict[int, tuple[nn.Module, str]] = {}
        for name, original in self._wanted.items():
            module, leaf = _owner(self.model, name)
            value = module._parameters.get(leaf)
            if value is None:
                continue
            owner, owner_leaf = owners.setdefault(id(original), (module, leaf))
            shared = owner._parameters[owner_leaf]
            assert shared is not None
            if value is not shared and torch.equal(value, shared):
                module._parameters[leaf] = shared


def _stacks(converter: Any) -> bool:
    """Whether a rule is the common one: stack the experts, then join gate and up rows; columns, where matrices lie transposed."""
    names = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    joined = ("Concatenate", 1)
    if _transposes(converter):
        names, joined = names[:-1], ("Concatenate", 2)
    one = len(converter.source_patterns) == 1
    return len(converter.target_patterns) == 1 and (
        (one and names == [("MergeModulelist", 0)]) or names == [("MergeModulelist", 0), joined]
    )


def _transposes(converter: Any) -> bool:
    """Whether the stacked matrices are transposed at the end."""
    last = converter.operations[-1]
    return type(last).__name__ == "Transpose" and (last.dim0, last.dim1) == (1, 2)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which expert 10 comes after expert 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _expert(name: str) -> int:
    """The expert's number in a tensor name: its last numeric part."""
    return int(re.findall(r"\.(\d+)\.", name)[-1])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
