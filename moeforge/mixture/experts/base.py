"""The protocol of experts: a module that answers a list of pairs.

A kind of experts is one class. It gets the tokens and the Pairs and returns what is added to the residual stream, weighted and
summed: so a kind whose experts share work (a frozen base, one wide matrix product) does that work once a token, and a kind
without shared work calls one kernel. In memory its parameters are stacked [E, ...]; on disk every expert has its own tensors
under the names that the dense model used. `stored` is that mapping, as data, read in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor, nn

from moeforge_kernels.pairs import Pairs

from ...errors import BadInput
from ..config import ExpertsConfig


@dataclass(frozen=True)
class Place:
    """What experts are told about the site where they will stand.

    Attributes:
        width, out_width: D, D'.
        names: role (gate, up, gate_up, down; q, k, v, qkv, o) -> path of that linear map below the root, `""` where the site is it.
        transposed: the dense model stores its matrices [inputs, outputs].
        root: how messages call the site.
    """

    width: int
    out_width: int
    names: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    root: str = "a site"

    def require_ffn(self, config: ExpertsConfig) -> None:
        """Refuse feed-forward networks of a shape that the site's network does not have.

        Raises:
            BadInput: names what is asked and what is there.
        """
        wanted = [{"gate", "up", "down"}, {"gate_up", "down"}] if config.gated else [{"up", "down"}]
        if set(self.names) not in wanted:
            raise BadInput(
                f"experts of type {config.type!r}, gated = {str(config.gated).lower()}, at {self.root}: the network there has "
                f"the linear maps {', '.join(sorted(self.names)) or 'none'}"
            )
        if config.width < 1:
            raise BadInput(f"experts at {self.root}: width = {config.width}: must be positive")


@dataclass(frozen=True)
class Stored:
    """How a stacked parameter [E, R, ...] lies on disk: one tensor a part and expert, the parts one after the other along R.

    Attributes:
        parts: names below `experts.{e}.`, such as `gate_proj.weight`.
        rows: their sizes along R; their sum is R.
        transposed: on disk each matrix is [columns, rows] (GPT-2's Conv1D).
        shared: the parameter has no expert axis and is stored once, below the mixture's root: what keeps the name of the dense
            model's own projection there.
    """

    parts: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool = False
    shared: bool = False


class Experts(nn.Module):
    """Base class of every kind of experts.

    Attributes:
        count: E.
        width: D, of the hidden states that come in; and go out, unless the site is one linear map D -> D'.
    """

    count: int
    width: int
    adopts = False
    """Whether this kind is built on the modules that stood at the site (:meth:`adopt`), instead of on copies of their weights."""

    @classmethod
    def at(cls, place: Place, config: ExpertsConfig) -> Self:
        """Build them from an entry of `mixtures`; values are not set.

        Raises:
            BadInput: the entry or the site does not suit this kind.
        """
        raise NotImplementedError

    def adopt(self, maps: Mapping[str, tuple[str, nn.Module]], activation: str | None) -> None:
        """Take in the linear maps that stood at the site, as they are: role -> (path below the site's root, module). A kind that
        builds on a frozen base keeps them and declares them `stored` as shared."""

    def reset_parameters(self, std: float) -> None:
        """New values: matrices normal with `std`, vectors zero. A kind that must start otherwise (LoRA: B = 0) says so here."""
        for parameter in self.parameters():
            if parameter.ndim > 2:
                nn.init.normal_(parameter, std=std)
            else:
                nn.init.zeros_(parameter)

    def prepare(self, hidden: Tensor) -> Tensor:
        """[..., D] as the site gets it -> [T, ...], what `forward` gets: the one place where experts see how tokens lie in a batch
        (frequency bands of an image, heads). By default the tokens, flat."""
        return hidden.reshape(-1, hidden.shape[-1])

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        """out_t = sum over the pairs (t, e, w) of w * expert_e(x_t): [T, D] -> [T, D'], in x's dtype."""
        raise NotImplementedError

    def stored(self) -> Mapping[str, Stored]:
        """Parameter name -> how it lies on disk, for every parameter."""
        raise NotImplementedError
