"""Linear layers that share an input, each perhaps with a LoRA: computed together, both ways.

With h the input, W the frozen weights laid on top of each other, A and B those of the adapters (B
block-diagonal and scaled):

    u = h A'         y = h W' + b + u B'
    t = g B          dA = t' h         dB = g' u         dh = g W + t A

q, k and v are one product instead of three, so are gate and up. W is frozen, so its gradient is
never formed. Where weights are quantised they are dequantised one at a time, in backward again, so
that no more than one exists as a plain matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vicuna.errors import UserError
from vicuna.model import dequantize, onednn_linear, peft_switches
from vicuna.model.dropout import PrefixDropout


def give_up(layer: Any) -> None:
    """Free the weight of a linear layer. It keeps shape and type and reads as NaN, which whoever
    computes with it will see."""
    layer.weight.data = layer.weight.new_full((1, 1), torch.nan).expand(layer.weight.shape)


@dataclass(frozen=True)
class Lora:
    """The adapter of one layer of a group. columns: where its rank lies among the group's."""

    index: int
    a: Tensor
    b: Tensor
    scale: float
    columns: slice
    dropouts: Any
    name: str

    @property
    def dropout(self) -> PrefixDropout | None:
        """What its input passes through in training; None for nothing."""
        module = self.dropouts[self.name]
        return module if isinstance(module, PrefixDropout) else None


@dataclass
class Call:
    """One call of a group: u (T, R), which backward needs, and the adapters in the input's type,
    which are made again for it."""

    u: Tensor | None
    low: Tensor | None
    high: Tensor | None


class Group:
    """The linear layers of one input, in order; outputs lie side by side.

    Args:
        layers: plain linear layers, quantised ones, or PEFT's LoRA layers around them.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.bases: list[Any] = [getattr(m, "base_layer", m) for m in layers]
        outs = [int(base.out_features) for base in self.bases]
        starts = [sum(outs[:i]) for i in range(len(outs))]
        self.rows = [slice(start, start + n) for start, n in zip(starts, outs)]
        self.width, self.depth = sum(outs), int(self.bases[0].in_features)
        # A group made again over the same layers, with adapters since, finds what was laid out.
        self.packed: Tensor | None = None
        if (laid := getattr(self.bases[0], "laid_out", None)) is not None:
            self.weight, (self.packed, self.bias) = None, laid
        else:
            self.weight, self.bias = self._join()
        self.loras: list[Lora] = []
        self._marks: list[peft_switches.Mark] = []
        self._held: tuple[Tensor | None, Tensor | None] | None = None
        self.refresh()

    @property
    def whole(self) -> bool:
        """Whether the weights are one plain matrix, so that rows may be computed in pieces."""
        return self.weight is not None

    @property
    def parameters(self) -> list[Tensor]:
        """A and B of each adapter, in turn: the order of `backward`'s gradients."""
        return [p for lora in self.loras for p in (lora.a, lora.b)]

    def _join(self) -> tuple[Tensor | None, Tensor | None]:
        """Lay plain weights into one storage; the layers' own weights become views of it."""
        if not all(type(base) is nn.Linear for base in self.bases):
            return None, None
        weights = [base.weight for base in self.bases]
        biases = [base.bias for base in self.bases]
        bias = None
        if any(b is not None for b in biases):
            zeros = [w.new_zeros(w.shape[0]) for w in weights]
            bias = torch.cat([z if b is None else b.data for b, z in zip(biases, zeros)])
        if len(weights) == 1:
            return weights[0], bias
        if len({(w.dtype, w.device) for w in weights}) > 1:
            return None, None
        if self._adjacent(weights):
            first = weights[0]
            return first.data.as_strided((self.width, first.shape[1]), (first.shape[1], 1)), bias
        joined = torch.cat([w.data for w in weights])
        for weight, rows in zip(weights, self.rows):
            weight.data = joined[rows]
        return joined, bias

    def pack(self) -> None:
        """Lay the weights out for answering on this CPU, where that is of use, and give the plain
        ones up: what answers through `products.product` alone needs them no more."""
        if self.weight is None:
            return
        self.packed = onednn_linear.packed(self.weight)
        if self.packed is None:
            return
        self.weight = None
        self.bases[0].laid_out = self.packed, self.bias
        for base in self.bases:
            give_up(base)

    def _adjacent(self, weights: Sequence[Tensor]) -> bool:
        """Whether an earlier group has joined these weights already."""
        first = weights[0]
        if first.device.type == "meta":
            return False
        return all(
            w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and w.storage_offset() == first.storage_offset() + rows.start * first.shape[1]
            and w.is_contiguous()
            for w, rows in zip(weights, self.rows)
        )

    def refresh(self) -> None:
        """Take the adapters, and weights that they were merged into, as they are now.

        Raises: UserError where an active adapter is more than a LoRA.
        """
        before, self._marks = self._marks, self._look()
        if any(m[1] for m in (*before, *self._marks)):
            self._follow_merge()
        self.loras = []
        self._held = None
        start = 0
        for index, layer in enumerate(self.layers):
            if layer is self.bases[index]:
                continue
            for name in peft_switches.active(layer):
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                columns = slice(start, start + a.shape[0])
                start = columns.stop
                self.loras.append(
                    Lora(index, a, b, float(layer.scaling[name]), columns, layer.lora_dropout, name)
                )

    def follow(self) -> bool:
        """`refresh` where PEFT's switches stand otherwise than they did; whether they do."""
        if peft_switches.same(self._marks, self._look()):
            return False
        self.refresh()
        return True

    def _look(self) -> list[peft_switches.Mark]:
        adapted = (m for m, base in zip(self.layers, self.bases) if m is not base)
        return [peft_switches.mark(layer) for layer in adapted]

    def _follow_merge(self) -> None:
        """A merge changes weights, and may put them elsewhere than where they were joined."""
        if self.packed is not None:
            raise UserError(
                "an adapter cannot be merged into weights that are laid out for answering",
                where="adapter",
                fix="Choose it with set_adapter; vicuna merge writes a merged base.",
            )
        if self.weight is not None:
            self.weight, self.bias = self._join()

    # -- forward -----------------------------------------------------------------------------------

    def adapters(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """All A on top of each other (R, D); all scaled B as blocks of one matrix (O, R)."""
        if self._held is not None:
            return self._held
        if not self.loras:
            return None, None
        low = torch.cat([lora.a.detach() for lora in self.loras]).to(dtype)
        high = low.new_zeros(self.width, low.shape[0])
        for lora in self.loras:
            high[self.rows[lora.index], lora.columns] = lora.b.detach() * lora.scale
        return low, high

    def hold(self, dtype: torch.dtype) -> None:
        """Keep what `adapters` gives until `refresh`: for answering, where no adapter changes."""
        self._held = self.adapters(dtype)

    def call(self, rows: int, like: Tensor) -> Call:
        """Begin a forward over `rows` rows of the type of `like`."""
        low, high = self.adapters(like.dtype)
        return Call(None if low is None else like.new_empty(rows, low.shape[0]), low, high)

    def again(self, u: Tensor | None, dtype: torch.dtype) -> Call:
        """The call of which forward kept `u`."""
        return Call(u, *self.adapters(dtype))

    def forward(
        self, h: Tensor, call: Call, at: slice, out: Tensor, hashes: Tensor | None = None
    ) -> None:
        """Compute rows `at` of a call: h (t, D) -> out (t, O), u into `call`.

        Args:
            hashes: int64 (t,), of the tokens up to each row, where there is dropout to apply.
        """
        if self.weight is not None:
            if self.bias is None:
                torch.mm(h, self.weight.t(), out=out)
            else:
                torch.addmm(self.bias, h, self.weight.t(), out=out)
        else:
            for base, rows in zip(self.bases, self.rows):
                out[:, rows] = base(h)
        if call.low is None or call.high is None or call.u is None:
            return
        u = call.u[at]
        if hashes is None:
            torch.mm(h, call.low.t(), out=u)
        else:
            for lora in self.loras:
                u[:, lora.columns] = _dropped(h, lora, hashes) @ call.low[lora.columns].t()
        out.addmm_(u, call.high.t())

    # -- backward ----------------------------------------------------------------------------------

    def backward(
        self,
        g: Tensor,
        h: Tensor | None,
        call: Call,
        at: slice,
        sums: Sequence[Tensor],
        needs_input: bool,
        hashes: Tensor | None = None,
    ) -> Tensor | None:
        """Gradients of rows `at`: adds those of A and B to `sums`, returns dh (t, D).

        Args:
            g: (t, O). h: (t, D), the input of forward; None where there is no adapter.
            sums: float32, in `parameters`' order.
        """
        dh = self._through_base(g) if needs_input else None
        if call.low is None or call.high is None or call.u is None or h is None:
            return dh
        t = g @ call.high
        if hashes is None:
            da = t.t() @ h
            if dh is not None:
                dh.addmm_(t, call.low)
        db = call.u[at].t() @ g  # transposed: the faster order of the two on a CPU
        for lora, sum_a, sum_b in zip(self.loras, sums[::2], sums[1::2]):
            own = t[:, lora.columns]
            if hashes is None:
                sum_a += da[lora.columns]
            else:
                sum_a += own.t() @ _dropped(h, lora, hashes)
                if dh is not None:
                    dh += _dropped(own @ call.low[lora.columns], lora, hashes)
            sum_b.add_(db[lora.columns, self.rows[lora.index]].t(), alpha=lora.scale)
        return dh

    def _through_base(self, g: Tensor) -> Tensor:
        if self.weight is not None:
            return g @ self.weight
        dh = g.new_zeros(g.shape[0], self.depth)
        for base, rows in zip(self.bases, self.rows):
            dh.addmm_(g[:, rows], dequantize.dense(base, g.dtype))
        return dh


def _dropped(x: Tensor, lora: Lora, hashes: Tensor) -> Tensor:
    """Dropout is its own gradient: it multiplies by the same mask both ways."""
    return x if lora.dropout is None else lora.dropout.masked(x, hashes)
