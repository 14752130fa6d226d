"""Linear layers that share an input, each perhaps with a LoRA: computed together, both ways.

With x the input, W the frozen weights laid on top of each other, A and B those of the adapters (B
block-diagonal and scaled), and g the gradient of y:

    xa = x A'        y = x W' + b + xa B'
    gb = g B         dA = gb' x       dB = g' xa       dx = g W + gb A

q, k and v are one product instead of three, so are gate and up. W is frozen, so its gradient is
never formed. Quantised weights are dequantised one at a time, in backward again, so that no more
than one exists as a plain matrix.

In inference on a CPU the time goes into reading W. PyTorch hands fp32 products to MKL, which first
copies the weight into a layout of its own; oneDNN reads it as it lies, and reads one that was
packed for it beforehand faster still (`onednn_linear`; `bench/decode.py` shows what that does to
whole answers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicuna.errors import UserError
from vicuna.model import peft_switches
from vicuna.model.dropout import PrefixDropout

# -- one frozen weight, whatever its type ----------------------------------------------------------

Dequantizer = Callable[[Any, torch.dtype], Tensor]
_DEQUANTIZERS: dict[str, Dequantizer] = {}


def register_dequantizer(class_name: str, dequantizer: Dequantizer) -> None:
    """Support the linear layers of a class (by its name, so that its library is not imported).

    Args:
        dequantizer: (layer, dtype) -> its weight (O, D) in that dtype.
    """
    _DEQUANTIZERS[class_name] = dequantizer


def is_supported(layer: nn.Module) -> bool:
    """Whether `dequantized_weight` can read this layer."""
    return type(layer) is nn.Linear or type(layer).__name__ in _DEQUANTIZERS


def dequantized_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (O, D) of a linear layer: a plain layer's own, a quantised one's as a temporary in
    `dtype`, which the caller drops as soon as it is used."""
    if type(layer) is nn.Linear:
        return layer.weight
    return _DEQUANTIZERS[type(layer).__name__](layer, dtype)


def _linear4bit(layer: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' nf4 and fp4, whose block scales may be quantised themselves (QLoRA, arXiv
    2305.14314)."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.to(dtype)


def _linear8bit(layer: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' int8 with a scale for each row (LLM.int8(), arXiv 2208.07339)."""
    state = layer.state
    codes = layer.weight.CB if state.CB is None else state.CB
    scales = layer.weight.SCB if state.SCB is None else state.SCB
    return codes.to(dtype).mul_((scales[:, None] / 127.0).to(dtype))


register_dequantizer("Linear4bit", _linear4bit)
register_dequantizer("Linear8bitLt", _linear8bit)


def release_weight(layer: Any) -> None:
    """Free the weight of a linear layer: replaced by one NaN expanded to its shape, which takes no
    memory and makes an accidental use visible."""
    layer.weight.data = layer.weight.new_full((1, 1), torch.nan).expand(layer.weight.shape)


# -- products of few rows on a CPU -----------------------------------------------------------------

FEW_ROWS = 16


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (t, D) times weight (O, D) transposed, plus bias (O,): (t, O). No gradients.

    Args:
        weight: plain, or from `pack_weight`.
    """
    if weight.is_mkldnn:
        return _onednn(x, weight, bias)
    few = x.shape[0] <= FEW_ROWS and x.device.type == "cpu" and x.dtype == torch.float32
    if few and torch.backends.mkldnn.is_available():
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def pack_weight(weight: Tensor) -> Tensor | None:
    """A copy of a weight (O, D) in the layout that oneDNN reads fastest; only `onednn_linear` reads
    it.

    Returns: None if this machine has nothing to gain: no CPU, or a dtype oneDNN does not compute
    in.
    """
    if weight.device.type != "cpu" or not _can_pack(weight.dtype):
        return None
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), FEW_ROWS)
    return result


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # PyTorch's own operator behind torch.compile's linear layers on CPUs.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


@lru_cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether a packed weight of this dtype gives the product it should: tried, not guessed."""
    if not torch.backends.mkldnn.is_available() or not dtype.is_floating_point:
        return False
    grid = torch.arange(16 * 32, dtype=torch.float32).view(16, 32).sin()
    weight, x = grid.to(dtype), grid[:2].to(dtype)
    try:
        packed = _onednn(x, torch.ops.mkldnn._reorder_linear_weight(weight, FEW_ROWS), None)
    except RuntimeError:
        return False
    return torch.allclose(packed.float(), F.linear(x.float(), weight.float()), atol=0.1)


# -- several layers of one input -------------------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    """The adapter of one layer of a group.

    index: of the layer in the group. a: (r, D). b: (O of the layer, r). ranks: the columns of xa
    that are its own.
    """

    index: int
    a: Tensor
    b: Tensor
    scale: float
    ranks: slice
    dropouts: Any
    name: str

    @property
    def dropout(self) -> PrefixDropout | None:
        """What its input passes through in training; None for nothing."""
        module = self.dropouts[self.name]
        return module if isinstance(module, PrefixDropout) else None


@dataclass
class LoraActivations:
    """The LoRA part of one forward of a group.

    xa: (T, R), which backward needs; R is the sum of the ranks. a: (R, D) and b: (O, R), all
    adapters in the input's dtype, which are made again for backward. All None without an adapter.
    """

    xa: Tensor | None
    a: Tensor | None
    b: Tensor | None


class LinearGroup:
    """The linear layers of one input, in order; outputs lie side by side: (T, D) -> (T, O).

    Args:
        layers: plain linear layers, quantised ones, or PEFT's LoRA layers around them. Plain
            weights are laid into one storage; the layers' own weights become views of it.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.bases: list[Any] = [getattr(m, "base_layer", m) for m in layers]
        outs = [int(base.out_features) for base in self.bases]
        starts = [sum(outs[:i]) for i in range(len(outs))]
        self.out_slices = [slice(start, start + n) for start, n in zip(starts, outs)]
        self.out_features, self.in_features = sum(outs), int(self.bases[0].in_features)
        # A group made anew over the same layers, with adapters since, takes the packed weight over.
        self.packed: Tensor | None = None
        if (packed := getattr(self.bases[0], "packed_weight", None)) is not None:
            self.weight, (self.packed, self.bias) = None, packed
        else:
            self.weight, self.bias = self._join()
        self.loras: list[Lora] = []
        self._marks: list[peft_switches.Mark] = []
        self._cached: tuple[Tensor | None, Tensor | None] | None = None
        self.refresh()

    @property
    def is_joined(self) -> bool:
        """Whether the weights are one plain matrix, so that rows may be computed in chunks."""
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
        if self._are_adjacent(weights):
            first = weights[0]
            shape = (self.out_features, first.shape[1])
            return first.data.as_strided(shape, (first.shape[1], 1)), bias
        joined = torch.cat([w.data for w in weights])
        for weight, rows in zip(weights, self.out_slices):
            weight.data = joined[rows]
        return joined, bias

    def _are_adjacent(self, weights: Sequence[Tensor]) -> bool:
        """Whether an earlier group has joined these weights already."""
        first = weights[0]
        if first.device.type == "meta":
            return False
        return all(
            w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and w.storage_offset() == first.storage_offset() + rows.start * first.shape[1]
            and w.is_contiguous()
            for w, rows in zip(weights, self.out_slices)
        )

    def pack(self) -> None:
        """Pack the weights for inference on this CPU, if that helps, and release the plain ones:
        inference goes through `onednn_linear` alone."""
        if self.weight is None:
            return
        self.packed = pack_weight(self.weight)
        if self.packed is None:
            return
        self.weight = None
        self.bases[0].packed_weight = self.packed, self.bias
        for base in self.bases:
            release_weight(base)

    # -- adapters ----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Take the adapters, and weights that they were merged into, as they are now.

        Raises: UserError if an active adapter is more than a LoRA.
        """
        before, self._marks = self._marks, self._look()
        if any(m[1] for m in (*before, *self._marks)):
            self._follow_merge()
        self.loras = []
        self._cached = None
        start = 0
        for index, layer in enumerate(self.layers):
            if layer is self.bases[index]:
                continue
            for name in peft_switches.active(layer):
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                ranks = slice(start, start + a.shape[0])
                start = ranks.stop
                self.loras.append(
                    Lora(index, a, b, float(layer.scaling[name]), ranks, layer.lora_dropout, name)
                )

    def follow(self) -> bool:
        """`refresh` if PEFT's switches have changed since; whether they have."""
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

    def lora_matrices(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """All A on top of each other (R, D); all scaled B as blocks of one matrix (O, R)."""
        if self._cached is not None:
            return self._cached
        if not self.loras:
            return None, None
        a = torch.cat([lora.a.detach() for lora in self.loras]).to(dtype)
        b = a.new_zeros(self.out_features, a.shape[0])
        for lora in self.loras:
            b[self.out_slices[lora.index], lora.ranks] = lora.b.detach() * lora.scale
        return a, b

    def cache_adapters(self, dtype: torch.dtype) -> None:
        """Keep the result of `lora_matrices` until `refresh`: for inference, where no adapter
        changes."""
        self._cached = self.lora_matrices(dtype)

    # -- inference ---------------------------------------------------------------------------------

    def infer(self, x: Tensor) -> Tensor:
        """x (t, D) -> (t, O), adapters included, without gradients and in as few operations as it
        takes."""
        weight = self.weight if self.packed is None else self.packed
        if weight is None:
            out = x.new_empty(x.shape[0], self.out_features)
            self.forward(x, self.begin(x.shape[0], x), slice(None), out)
            return out
        y = onednn_linear(x, weight, self.bias)
        a, b = self.lora_matrices(x.dtype)
        if a is not None and b is not None:
            y.addmm_(x @ a.t(), b.t())
        return y

    # -- forward -----------------------------------------------------------------------------------

    def begin(self, rows: int, like: Tensor) -> LoraActivations:
        """Begin a forward over `rows` rows in the dtype of `like`."""
        a, b = self.lora_matrices(like.dtype)
        return LoraActivations(None if a is None else like.new_empty(rows, a.shape[0]), a, b)

    def resume(self, xa: Tensor | None, dtype: torch.dtype) -> LoraActivations:
        """In backward: the activations of the forward that kept `xa`."""
        return LoraActivations(xa, *self.lora_matrices(dtype))

    def forward(
        self,
        x: Tensor,
        lora: LoraActivations,
        rows: slice,
        out: Tensor,
        hashes: Tensor | None = None,
    ) -> None:
        """Compute some rows of a forward: x (t, D) -> out (t, O), and xa into `lora`.

        Args:
            rows: where these t rows lie in the whole forward.
            hashes: int64 (t,), of the tokens up to each row, if there is dropout to apply.
        """
        if self.weight is not None:
            if self.bias is None:
                torch.mm(x, self.weight.t(), out=out)
            else:
                torch.addmm(self.bias, x, self.weight.t(), out=out)
        else:
            for base, columns in zip(self.bases, self.out_slices):
                out[:, columns] = base(x)
        if lora.a is None or lora.b is None or lora.xa is None:
            return
        xa = lora.xa[rows]
        if hashes is None:
            torch.mm(x, lora.a.t(), out=xa)
        else:
            for each in self.loras:
                xa[:, each.ranks] = _dropped(x, each, hashes) @ lora.a[each.ranks].t()
        out.addmm_(xa, lora.b.t())

    # -- backward ----------------------------------------------------------------------------------

    def backward(
        self,
        g: Tensor,
        x: Tensor | None,
        lora: LoraActivations,
        rows: slice,
        gradients: Sequence[Tensor],
        needs_input: bool,
        hashes: Tensor | None = None,
    ) -> Tensor | None:
        """The gradient of some rows of the input, dx (t, D); None unless `needs_input`.

        Args:
            g: (t, O), the gradient of the output. x: (t, D), the input of forward; None if there is
                no adapter.
            gradients: float32, those of A and B in the order of `parameters`; added to.
        """
        dx = self._base_backward(g) if needs_input else None
        if lora.a is None or lora.b is None or lora.xa is None or x is None:
            return dx
        gb = g @ lora.b
        if hashes is None:
            da = gb.t() @ x
            if dx is not None:
                dx.addmm_(gb, lora.a)
        db = lora.xa[rows].t() @ g  # transposed: the faster order of the two on a CPU
        for each, sum_a, sum_b in zip(self.loras, gradients[::2], gradients[1::2]):
            own_gb = gb[:, each.ranks]
            if hashes is None:
                sum_a += da[each.ranks]
            else:
                sum_a += own_gb.t() @ _dropped(x, each, hashes)
                if dx is not None:
                    dx += _dropped(own_gb @ lora.a[each.ranks], each, hashes)
            sum_b.add_(db[each.ranks, self.out_slices[each.index]].t(), alpha=each.scale)
        return dx

    def _base_backward(self, g: Tensor) -> Tensor:
        """g W, (t, D)."""
        if self.weight is not None:
            return g @ self.weight
        dx = g.new_zeros(g.shape[0], self.in_features)
        for base, columns in zip(self.bases, self.out_slices):
            dx.addmm_(g[:, columns], dequantized_weight(base, g.dtype))
        return dx


def _dropped(x: Tensor, lora: Lora, hashes: Tensor) -> Tensor:
    """Dropout is its own gradient: it multiplies by the same mask both ways."""
    return x if lora.dropout is None else lora.dropout.masked(x, hashes)
