"""The form of the curvature of a layer's parameters, determined by their gradients.

A parameter whose gradients are sums of outer products has a Kronecker form; another parameter of
the layer joins it as a bias where its gradient is the sum over positions of the same output
gradients. All other parameters have the diagonal. The kinds of gradients are collected over the
whole pass and over all ranks, so that the form depends neither on the batch size nor on the number
of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_kit.core.distributed import texts_of_ranks
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.convolved import Convolved
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Dense, Sum
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rows import Rows

# the kind of a parameter's gradients in a batch: a word, then numbers or names
Kind = tuple[str | int, ...]
TABLE: Kind = ("table",)
OTHER: Kind = ("other",)
TIED: Kind = ("sum",)
MISSING: Kind = ("missing",)

# the largest number of parameters that an error or a warning names
NAMED = 4
NO_PRODUCTS = "its gradient is not a sum of outer products"
SEVERAL_KINDS = "layers of several kinds use it"
NOT_USED = "no example of the data uses it"


def kind_of(form: Form) -> Kind:
    """The kind of a form: a table, a matrix (groups, whether stored transposed), or other."""
    if isinstance(form, Rows):
        return TABLE
    if isinstance(form, Factored):
        return ("matrix", 1, int(form.transposed))
    if isinstance(form, Convolved):
        return ("matrix", form.groups, 0)
    return TIED if isinstance(form, Sum) else OTHER


def is_bias_of(bias: Form, weight: Form) -> bool:
    """Whether a gradient is the sum over positions of the output gradients of a matrix."""
    if isinstance(weight, Factored):
        deltas, dim = weight.deltas, 1
    elif isinstance(weight, Convolved):
        deltas, dim = weight.left.flatten(2), 2
    else:
        return False
    sums = deltas.sum(dim)
    if not isinstance(bias, Dense) or bias.values.shape != sums.shape:
        return False
    # sums may cancel; NaN is refused elsewhere
    size = torch.linalg.vector_norm(deltas, ord=1, dim=dim).max()
    error = (bias.values - sums).abs().max()
    return not bool(error > torch.finfo(sums.dtype).eps ** 0.6 * size)


@dataclass(frozen=True)
class Piece:
    """Parameters of one block whose curvature has one form.

    Args:
        key: the prefix of its tensors in a state: the block's name for the first matrix or table of
            a block, the block's name and the parameter's for the rest.
        names: a parameter; or a weight and its bias.
        kind: the kind of a Kronecker form; None for the diagonal.
        reason: why there is no Kronecker form, if there is none.
    """

    key: str
    names: tuple[str, ...]
    kind: Kind | None = None
    reason: str = field(default="", compare=False)


def own_key(block: str, name: str) -> str:
    """The key of a piece of a block that is not its first."""
    return f"{block}.{name.rpartition('.')[2]}"


class ObservedForms:
    """The kinds of gradients that batches have shown, for the parameters of each block.

    Args:
        blocks: names of parameters by block.
    """

    def __init__(self, blocks: Mapping[str, Sequence[str]]) -> None:
        self.blocks = blocks
        self.seen: dict[str, set[Kind]] = {name: set() for own in blocks.values() for name in own}

    def add(self, gradients: Gradients) -> None:
        """Add a batch."""
        for names in self.blocks.values():
            forms = {n: gradients.forms[n] for n in names if n in gradients.forms}
            matrices = [n for n, form in forms.items() if kind_of(form)[0] == "matrix"]
            for name in names if forms else ():
                self.seen[name].add(self._kind(name, forms, matrices))

    @staticmethod
    def _kind(name: str, forms: Mapping[str, Form], matrices: Iterable[str]) -> Kind:
        if name not in forms:
            return MISSING
        kind = kind_of(forms[name])
        if kind != OTHER:
            return kind
        owners = (n for n in matrices if is_bias_of(forms[name], forms[n]))
        owner = next(owners, None)
        return OTHER if owner is None else ("bias", owner)

    def join_ranks(self, sample: Tensor) -> None:
        """Merge the kinds that all ranks have seen; every rank must call it."""
        mine = {name: sorted(map(list, kinds), key=str) for name, kinds in self.seen.items()}
        for text in texts_of_ranks(json.dumps(mine), sample.device):
            for name, kinds in json.loads(text).items():
                self.seen[name].update(tuple(kind) for kind in kinds)

    def pieces(self) -> dict[str, list[Piece]]:
        """The pieces of each block."""
        return {block: self._pieces_of(block, names) for block, names in self.blocks.items()}

    @property
    def count(self) -> int:
        """The number of parameters."""
        return len(self.seen)

    def without(self, used: bool = False) -> dict[str, str]:
        """Parameters without a Kronecker form, and why; with ``used`` those seen in some batch."""
        pieces = [piece for some in self.pieces().values() for piece in some]
        return {
            piece.names[0]: piece.reason
            for piece in pieces
            if piece.kind is None and not (used and piece.reason == NOT_USED)
        }

    def _pieces_of(self, block: str, names: Sequence[str]) -> list[Piece]:
        found: list[Piece] = []
        left = list(names)
        for name in names:
            kinds = self.seen[name] - {MISSING}
            if len(kinds) != 1 or next(iter(kinds))[0] not in ("matrix", "table"):
                continue
            biases = (n for n in left if self.seen[n] == {("bias", name)})
            own = (name, *list(biases)[:1])
            key = own_key(block, name) if found else block
            found.append(Piece(key, own, next(iter(kinds))))
            left = [n for n in left if n not in own]
        rest = [Piece(own_key(block, n), (n,), None, self._reason(n)) for n in left]
        return found + rest

    def _reason(self, name: str) -> str:
        kinds = self.seen[name] - {MISSING}
        if not kinds:
            return NOT_USED
        has_products = {kind for kind in kinds if kind[0] in ("matrix", "table", "sum")}
        return SEVERAL_KINDS if has_products else NO_PRODUCTS


def named(without: Mapping[str, str]) -> str:
    """Some of the parameters, each with a reason, and how many more there are."""
    texts = [f"'{name}' ({reason})" for name, reason in list(without.items())[:NAMED]]
    more = len(without) - len(texts)
    return ", ".join(texts) + (f" and {more:,} more" if more else "")


def refuse_parameters(without: Mapping[str, str], count: int) -> None:
    """Raise an error that names the parameters without a Kronecker form, if there are any."""
    if without:
        raise InvalidArgumentError(
            f"no Kronecker form for {len(without):,} of {count:,} parameters: {named(without)}. "
            'layers_without_kronecker="diagonal" gives them the exact diagonal of their curvature, '
            '"leave_out" leaves them out, as if they were frozen'
        )
