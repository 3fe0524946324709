"""Where a mixture can stand in a model: found by structure, never by the name of the model's type.

    ffn                   the feed-forward network of a layer
    q, k, v, qkv, o       one linear map of the layer's attention
    gate, up, gate_up, down   one linear map of its feed-forward network
    in                    the linear map into a state-space mixer (Mamba); in training the one that leads out is no module that is
                          called, only weights for a fused function: nothing can stand there
    attention, layer      the whole attention module, the whole layer

of the text model where there are several towers, of another one when its name stands before: `vision.ffn`, `vision.layer`. The
tower is named by the config that holds it (`vision_config`). Nothing is read but modules, shapes and, to learn what a network
computes, its own `forward` on a handful of numbers: so a model on the meta device will do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ..errors import BadInput
from .formulas import Activation, Formula, activation_beside, gated_formula

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FFN = "ffn"
ATTENTION_ROLES = {
    "q_proj": "q", "query": "q", "q": "q", "k_proj": "k", "key": "k", "k": "k", "v_proj": "v", "value": "v", "v": "v",
    "qkv_proj": "qkv", "query_key_value": "qkv", "c_attn": "qkv", "qkv": "qkv", "Wqkv": "qkv",
    "o_proj": "o", "out_proj": "o", "c_proj": "o", "output": "o", "o": "o", "projection": "o",
}  # fmt: skip
"""What linear maps of attention are called; `dense` is called by what holds it."""
MIXER_ROLES = {"in_proj": "in"}
"""What linear maps of a state-space mixer are called, which is no attention."""
SINGLE = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "in")
KINDS = (FFN, *SINGLE, "attention", "layer")


@dataclass(frozen=True)
class Projection:
    """One linear map of a site: [inputs] -> [outputs].

    Attributes:
        role: gate, up, gate_up (fused, the gate's rows first), down, q, k, v, qkv or o.
        path: module path in the model.
        bias: whether it adds one.
        transposed: its weight is [inputs, outputs] (Conv1D), not [outputs, inputs].
    """

    role: str
    path: str
    inputs: int
    outputs: int
    bias: bool
    transposed: bool


@dataclass(frozen=True)
class Site:
    """A place in one layer.

    Attributes:
        kind: one of KINDS.
        tower: `text`, `vision`, ..., or empty in a model of one tower.
        layer: its number in the tower.
        root: the smallest module that holds all projections: experts and router are stored below it.
        mount: the module whose place a mixture takes. It is the root where the module at the root does nothing else; a plain
            network keeps its own forward (with its dropout and norms), and the mixture takes the place of its first projection.
        silenced: modules or functions (`path.attribute`) that become identities then: the activation and the second projection.
        projections: role -> linear map.
        activation: what moeforge_kernels.activations calls it; None where the site has none.
    """

    kind: str
    tower: str
    layer: int
    root: str
    mount: str
    silenced: tuple[str, ...] = ()
    projections: Mapping[str, Projection] = field(default_factory=dict)
    activation: str | None = None

    @property
    def name(self) -> str:
        """As MixtureConfig.site names it."""
        return f"{self.tower}.{self.kind}" if self.tower not in ("", "text") else self.kind

    @property
    def gated(self) -> bool:
        return "gate" in self.projections or "gate_up" in self.projections

    @property
    def width(self) -> int:
        """D, what goes in."""
        return next(iter(self.projections.values())).inputs

    @property
    def out_width(self) -> int:
        """What comes out: D, unless the site is one linear map."""
        return list(self.projections.values())[-1].outputs

    @property
    def ffn_width(self) -> int:
        """F of a feed-forward network."""
        return self.projections["down"].inputs

    @property
    def bias(self) -> bool:
        return any(p.bias for p in self.projections.values())

    def below(self, role: str) -> str:
        """Path of a projection below the root; empty where the root is the projection."""
        return self.projections[role].path[len(self.root) :].lstrip(".")


@dataclass(frozen=True)
class Tower:
    """A stack of layers.

    Attributes:
        name: see :attr:`Site.tower`.
        path: of the list of layers.
    """

    name: str
    path: str
    layers: nn.ModuleList

    def layer_path(self, index: int) -> str:
        return f"{self.path}.{index}"


def find_sites(model: PreTrainedModel, site: str = FFN, layers: Iterable[int] | None = None) -> list[Site]:
    """The sites of that name, one a layer.

    Args:
        model: built, on any device.
        layers: which; default all.

    Raises:
        BadInput: no such tower, layer or site, or several candidates, which are named.
    """
    tower_name, _, kind = site.rpartition(".")
    if kind not in KINDS:
        raise BadInput(f"site {site!r}: expected one of {', '.join(KINDS)}, after a tower's name and a dot or alone")
    tower = find_tower(model, tower_name)
    depth = len(tower.layers)
    wanted = list(range(depth) if layers is None else layers)
    if outside := [index for index in wanted if not 0 <= index < depth]:
        raise BadInput(
            f"site {site!r}: layer {outside[0]} does not exist; {type(model).__name__} has layers 0 to {depth - 1}"
        )
    return [_find(model, tower, index, kind) for index in wanted]


def towers(model: PreTrainedModel) -> dict[str, Tower]:
    """Every stack of layers by name; a model of one tower calls it by the empty name.

    Raises:
        BadInput: two stacks of one config, such as an encoder and its decoder.
    """
    config = getattr(model.config, "base_config", model.config)
    found: list[Tower] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{t.path}.") for t in found):
            continue
        owner = _owner_config(model, path)
        depth = getattr(owner.get_text_config(), "num_hidden_layers", None)
        if len(module) == depth and all(any(_linears(layer)) or _has_matrices(layer) for layer in module):
            found.append(Tower(_tower_name(config, owner), path, module))
    names = [tower.name for tower in found]
    if not found or len(set(names)) != len(names):
        listed = ", ".join(f"{t.path} ({len(t.layers)} layers)" for t in found) or "none"
        raise BadInput(f"{type(model).__name__}: expected one list of layers for each tower, found {listed}")
    return {"" if len(found) == 1 else tower.name: tower for tower in found}


def find_tower(model: PreTrainedModel, name: str = "") -> Tower:
    """A tower by name; without one the only tower, or the text model's.

    Raises:
        BadInput: there is none of that name.
    """
    found = towers(model)
    chosen = found.get(name) or (
        found.get("text") if name == "" else found.get("") if _only_is(found, model, name) else None
    )
    if chosen is None:
        raise BadInput(
            f"{type(model).__name__} has no tower {name!r}; it has {', '.join(sorted(found)) or 'one without a name'}"
        )
    return chosen


def _only_is(found: Mapping[str, Tower], model: PreTrainedModel, name: str) -> bool:
    """`text.ffn` of a plain language model and `vision.ffn` of a plain encoder of images mean its only tower."""
    main = "pixel_values" if name == "vision" else "input_ids"
    return len(found) == 1 and name in ("text", "vision") and model.main_input_name == main


def _owner_config(model: PreTrainedModel, path: str) -> Any:
    """The config of the innermost model that holds a module."""
    from transformers import PreTrainedModel

    owner, module = model.config, cast(nn.Module, model)
    for part in path.split("."):
        module = module.get_submodule(part)
        if isinstance(module, PreTrainedModel):
            owner = module.config
    return getattr(owner, "base_config", owner)


def _tower_name(config: Any, owner: Any) -> str:
    for key in config.sub_configs:
        if type(getattr(config, key, None)) is type(owner):
            return key.removesuffix("_config")
    return ""


def _find(model: nn.Module, tower: Tower, index: int, kind: str) -> Site:
    path = tower.layer_path(index)
    layer = tower.layers[index]
    where = f"{type(model).__name__}, {path}"
    place = (tower.name, index)
    if kind == "layer":
        return Site(kind, *place, path, path)
    attention = _attention(layer)
    if kind == "attention":
        if len(attention) != 1:
            raise BadInput(f"{where}: expected one attention module, found {sorted(attention) or 'none'}")
        root = f"{path}.{next(iter(attention))}"
        return Site(kind, *place, root, root)
    if kind in ("q", "k", "v", "qkv", "o"):
        found = _attention_projections(layer, path, attention, kind)
        if len(found) != 1:
            raise BadInput(
                f"{where}: expected one projection {kind!r} of attention, found {[p.path for p in found] or 'none'}"
            )
        return Site(kind, *place, found[0].path, found[0].path, projections={kind: found[0]})
    if kind == "in":
        mixer = [(name, module) for name, module in _linears(layer) if MIXER_ROLES.get(name.rpartition(".")[2]) == kind
                 and not any(name.startswith(f"{a}.") for a in attention)]  # fmt: skip
        if len(mixer) != 1:
            raise BadInput(
                f"{where}: expected one projection {kind!r} of a state-space mixer, found {[n for n, _ in mixer] or 'none'}"
            )
        one = _projection(kind, f"{path}.{mixer[0][0]}", mixer[0][1])
        return Site(kind, *place, one.path, one.path, projections={kind: one})
    ffn = _ffn(model, layer, path, attention, place)
    if kind == FFN:
        return ffn
    if kind not in ffn.projections:
        raise BadInput(f"{where}: the feed-forward network has {', '.join(ffn.projections)}, no {kind}")
    one = ffn.projections[kind]
    return Site(kind, *place, one.path, one.path, projections={kind: one})


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear map below a module: torch's, transformers' Conv1D, and whatever stands in for them when weights are packed."""
    for name, module in layer.named_modules():
        if name and _sizes(module) is not None:
            yield name, module


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map, None for any other module."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs, outputs
    if _is_transposed(module):
        return getattr(module, "nx"), getattr(module, "nf")  # noqa: B009 - not torch's own class
    return None


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def _has_matrices(layer: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in layer.parameters())


def _attention(layer: nn.Module) -> dict[str, nn.Module]:
    """The outermost attention modules of a layer, cross-attention included."""
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        called = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and not inside and _has_matrices(module) and ("attention" in called or "attn" in called):
            found[name] = module
    return found


def _projection(role: str, path: str, module: nn.Module) -> Projection:
    sizes = _sizes(module)
    assert sizes is not None
    return Projection(role, path, *sizes, getattr(module, "bias", None) is not None, _is_transposed(module))


def _attention_projections(
    layer: nn.Module, path: str, attention: Mapping[str, nn.Module], kind: str
) -> list[Projection]:
    return [
        _projection(kind, f"{path}.{name}", module)
        for name, module in _linears(layer)
        if any(name.startswith(f"{other}.") for other in attention) and _attention_role(name) == kind
    ]


def _attention_role(name: str) -> str | None:
    *holders, leaf = name.split(".")
    if leaf == "dense":  # BERT's `output.dense` and GPT-NeoX's `dense` both lead out
        return ATTENTION_ROLES.get(holders[-1], "o")
    return ATTENTION_ROLES.get(leaf)


def _ffn(
    model: nn.Module, layer: nn.Module, path: str, attention: Mapping[str, nn.Module], place: tuple[str, int]
) -> Site:
    """The feed-forward network of a layer: its linear maps outside attention, which must be two or three that fit together."""
    linears = {name: module for name, module in _linears(layer) if not any(name.startswith(f"{a}.") for a in attention)}
    shapes = {name: cast(tuple[int, int], _sizes(module)) for name, module in linears.items()}
    where = f"{type(model).__name__}, {path}"
    listed = ", ".join(f"{name} {i} -> {o}" for name, (i, o) in shapes.items()) or "none"
    if len(linears) not in (2, 3):
        raise BadInput(
            f"{where}: a feed-forward network is two or three linear maps, found outside attention: {listed}"
        )
    down = _down(shapes)
    if down is None:
        raise BadInput(f"{where}: no linear map leads from the others' outputs back to their inputs: {listed}")
    inner = [name for name in linears if name != down]
    root = common_path(linears)
    holder = layer.get_submodule(root)
    if len(inner) == 2 or shapes[inner[0]][1] == 2 * shapes[down][0]:
        formula = _gated(holder, [name[len(root) :].lstrip(".") for name in (*inner, down)], where)
        at = f"{path}.{root}"
        below = {"gate": formula.gate, "up": formula.up, "gate_up": formula.gate_up, "down": formula.down}
        projections = {
            role: _projection(role, f"{at}.{name}", holder.get_submodule(name)) for role, name in below.items() if name
        }
        return _check_ffn(Site(FFN, *place, at, at, (), projections, formula.activation), where)
    act = _plain_activation(layer, (*inner, down), where)
    projections = {
        role: _projection(role, f"{path}.{name}", linears[name]) for role, name in (("up", inner[0]), ("down", down))
    }
    silenced = (f"{path}.{act.path}", f"{path}.{down}")
    site = Site(FFN, *place, f"{path}.{root}".rstrip("."), f"{path}.{inner[0]}", silenced, projections, act.name)
    return _check_ffn(site, where)


def _down(shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """The linear map that leads out: from the others' width F to their inputs' D. Where F = D it is the last one."""
    for name, (inputs, outputs) in reversed(list(shapes.items())):
        others = [size for other, size in shapes.items() if other != name]
        if all(i == outputs and (o == inputs or (len(others) == 1 and o == 2 * inputs)) for i, o in others):
            return name
    return None


def common_path(paths: Iterable[str]) -> str:
    """The innermost module that holds all of some modules."""
    parts = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return ".".join(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, parts))


def _gated(holder: nn.Module, names: list[str], where: str) -> Formula:
    if isinstance(holder, nn.ModuleList):
        raise BadInput(f"{where}: the linear maps {', '.join(names)} lie in no module of their own")
    return gated_formula(holder, names, where)


def _plain_activation(layer: nn.Module, names: tuple[str, ...], where: str) -> Activation:
    holders = dict.fromkeys(name.rpartition(".")[0] for name in names)
    found = [act for holder in holders for act in activation_beside(layer, holder)]
    if len(found) != 1:
        listed = ", ".join(f"{act.path} ({act.name})" for act in found) or "none"
        raise BadInput(f"{where}: expected one activation beside {' and '.join(names)}, found {listed}")
    return found[0]


def _check_ffn(site: Site, where: str) -> Site:
    """Experts have biases on all of their maps or on none, and are stored one way round."""
    for what in ("bias", "transposed"):
        values = {role: getattr(p, what) for role, p in site.projections.items()}
        if len(set(values.values())) > 1:
            raise BadInput(f"{where}: its linear maps differ in {what}: {values}; experts are alike in it")
    return site
