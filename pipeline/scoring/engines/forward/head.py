"""Log-probs of chosen tokens from hidden states, the vocabulary a tile at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.scoring.engines.forward.vocabulary import KeptGradient

if TYPE_CHECKING:
    import torch

TILE = 2048
"""Rows of the output layer that are multiplied at once: their logits fit in a core's cache."""

_LOGITS = 1 << 23
"""How many logits a GPU computes at once, unless a tile has more."""

ROWS = 8
"""Fewer rows than this give other bits in MKL's matrix product."""

LOG_SUM_SQUARES, ENTROPY, IS_TOP1 = "log_sum_squares", "entropy", "is_top1"
EXTRAS = (LOG_SUM_SQUARES, ENTROPY, IS_TOP1)
"""What the pass over the vocabulary can tell of a token's distribution p beside a log-prob.

`log_sum_squares`: log sum_v p(v)^2, nats (WPO, arXiv 2406.11827); `entropy`: -sum_v p(v) log p(v),
nats; `is_top1`: 1 where no other token has a larger logit, else 0.
"""


@dataclass(frozen=True)
class Head:
    """An output layer [V, d] with its bias [V], and what a config says is done to its logits.

    The weight's gradient goes to `kept`, if there is one, and autograd sees none.
    """

    weight: "torch.Tensor"
    bias: "torch.Tensor | None"
    scale: float = 1.0
    cap: float | None = None
    kept: KeptGradient | None = None


def head_of(model: Any) -> Head | None:
    """The output layer of a model of transformers; None where it is not a plain linear layer."""
    import torch

    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, scale, cap, getattr(layer, "kept_gradient", None))


@dataclass(frozen=True)
class TargetScores:
    """Log-probs, float32 [n], nats, and by name what else was asked for, float32 [n] each.

    The log-probs alone have a gradient.
    """

    logprobs: "torch.Tensor"
    extras: "dict[str, torch.Tensor]"

    def to(self, device: str) -> "TargetScores":
        """On another device; the gradient goes back over it."""
        extras = {name: x.to(device) for name, x in self.extras.items()}
        return TargetScores(self.logprobs.to(device), extras)

    def split(self, sizes: list[int]) -> "list[TargetScores]":
        """Its rows in runs of these sizes."""
        import torch

        cut = {name: torch.split(x, sizes) for name, x in self.extras.items()}
        return [
            TargetScores(logprobs, {name: runs[i] for name, runs in cut.items()})
            for i, logprobs in enumerate(torch.split(self.logprobs, sizes))
        ]


def joined(rows: Sequence[TargetScores]) -> TargetScores:
    """One after another; all have the same extras."""
    import torch

    extras = {name: torch.cat([row.extras[name] for row in rows]) for name in rows[0].extras}
    return TargetScores(torch.cat([row.logprobs for row in rows]), extras)


def target_logprobs(
    hidden: "torch.Tensor", targets: "torch.Tensor", head: Head, tile: int | None = None
) -> "torch.Tensor":
    """Log-probs of `targets`, int64 [n], after `hidden` [n, d]: float32 [n], nats.

    Logit minus log-sum-exp (torch's float32 log_softmax over a large vocabulary is itself off by up
    to 3e-3 nats per sequence), the sum gathered over tiles: never [n, V] at once, and on the way
    back the tiles are computed anew.
    """
    return target_scores(hidden, targets, head, tile=tile).logprobs


def target_scores(
    hidden: "torch.Tensor",
    targets: "torch.Tensor",
    head: Head,
    extras: Sequence[str] = (),
    tile: int | None = None,
) -> TargetScores:
    """`target_logprobs`, with `extras` (some of `EXTRAS`) gathered in the same pass.

    They change no bit of the log-probs.
    """
    import torch

    tile = tile or _tile_of(hidden)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        # The way back is outside the block: what it multiplies must be of one dtype by itself.
        dtype = torch.get_autocast_dtype(kind)
        bias = None if head.bias is None else head.bias.to(dtype)
        hidden = hidden.to(dtype)
        head = replace(head, weight=head.weight.to(dtype), bias=bias, kept=None)
    n, wanted = len(targets), tuple(extras)
    if missing := max(0, ROWS - n):
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, missing))
        targets = torch.nn.functional.pad(targets, (0, missing))
    if torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad):
        logprobs, *found = _function().apply(
            hidden, targets, head.weight, head.bias, head, tile, wanted
        )
    else:
        chosen, total, found = _forward(hidden, targets, head, tile, wanted)
        logprobs = chosen - total
    return TargetScores(logprobs[:n], {name: x[:n] for name, x in zip(wanted, found, strict=True)})


def extras_of(
    logits: "torch.Tensor",
    chosen: "torch.Tensor",
    total: "torch.Tensor",
    extras: Sequence[str],
    tile: int = TILE,
) -> "dict[str, torch.Tensor]":
    """The same of logits that are there already, float32 [n, V], whatever tile they are read in.

    Args:
        logits: as the model has them; not written over.
        chosen: those of the targets, [n].
        total: their log-sum-exps, [n].
        extras: some of `EXTRAS`.
        tile: how many are copied at once.
    """
    import torch

    found = {name: torch.zeros_like(total) for name in extras}
    if IS_TOP1 in found:
        found[IS_TOP1] = (chosen >= logits.amax(1)).float()
    if LOG_SUM_SQUARES in found or ENTROPY in found:
        for part in torch.split(logits, tile, dim=1):
            probabilities = (part - total[:, None]).exp_()
            if ENTROPY in found:
                found[ENTROPY] += torch.special.entr(probabilities).sum(1)
            if LOG_SUM_SQUARES in found:
                found[LOG_SUM_SQUARES] += probabilities.square_().sum(1)
    if LOG_SUM_SQUARES in found:
        found[LOG_SUM_SQUARES].log_()
    return found


def _forward(
    hidden: "torch.Tensor",
    targets: "torch.Tensor",
    head: Head,
    tile: int,
    extras: tuple[str, ...] = (),
) -> "tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]":
    """Logits of the targets, log-sum-exps and the extras in their order, float32 [n] each."""
    import torch

    n = len(targets)
    top = torch.full((n,), -torch.inf, device=hidden.device)
    mass, chosen = torch.zeros_like(top), torch.zeros_like(top)
    # Sums over the vocabulary of e^2 and -e log e, where e = exp(logit - top) as mass is of e.
    squares, disorder = torch.zeros_like(top), torch.zeros_like(top)
    for start in range(0, len(head.weight), tile):
        logits = _logits(hidden, head, start, tile)
        inside, at = _inside(targets, start, logits.shape[1])
        chosen = torch.where(inside, logits.gather(1, at[:, None])[:, 0], chosen)
        higher = torch.maximum(top, logits.amax(1))
        exponentials = logits.sub_(higher[:, None]).exp_()
        shrunk = torch.exp(top - higher)
        if ENTROPY in extras:
            entr = torch.special.entr
            disorder = disorder * shrunk + mass * entr(shrunk) + entr(exponentials).sum(1)
        mass = mass * shrunk + exponentials.sum(1)
        if LOG_SUM_SQUARES in extras:
            squares = squares * shrunk.square() + exponentials.square_().sum(1)
        top = higher
    found = {}
    if LOG_SUM_SQUARES in extras:
        found[LOG_SUM_SQUARES] = squares.log() - 2 * mass.log()
    if ENTROPY in extras:
        found[ENTROPY] = mass.log() + disorder / mass
    if IS_TOP1 in extras:
        found[IS_TOP1] = (chosen >= top).float()
    return chosen, top + mass.log(), [found[name] for name in extras]


def _tile_of(hidden: "torch.Tensor") -> int:
    """Rows of the output layer at once: a GPU has no cache to keep to, and few rows are slow."""
    if hidden.device.type == "cpu":
        return TILE
    return max(1, _LOGITS // (TILE * max(1, len(hidden)))) * TILE


def _logits(hidden: "torch.Tensor", head: Head, start: int, tile: int) -> "torch.Tensor":
    """Logits of a tile as the model has them, float32 [n, tile]; they may be written over."""
    import torch

    bias = None if head.bias is None else head.bias[start : start + tile]
    logits = torch.nn.functional.linear(hidden, head.weight[start : start + tile], bias).float()
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.cap is not None:
        logits = torch.tanh(logits / head.cap) * head.cap
    return logits


def _inside(targets: "torch.Tensor", start: int, width: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Which targets are in a tile, and where (anywhere for the others)."""
    at = targets - start
    return (at >= 0) & (at < width), at.clamp(0, width - 1)


@cache
def _function() -> Any:
    """The autograd function, made when torch is loaded."""
    import torch

    class TargetLogProbs(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            hidden: torch.Tensor,
            targets: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            head: Head,
            tile: int,
            extras: tuple[str, ...],
        ) -> tuple[torch.Tensor, ...]:
            chosen, total, found = _forward(hidden, targets, head, tile, extras)
            ctx.save_for_backward(hidden, targets, weight, bias, total)
            ctx.how = head.scale, head.cap, head.kept, tile
            ctx.mark_non_differentiable(*found)
            return chosen - total, *found

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> Any:
            hidden, targets, weight, bias, total = ctx.saved_tensors
            scale, cap, kept, tile = ctx.how
            head = Head(weight, bias, scale, cap)
            wanted = ctx.needs_input_grad
            d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None
            d_weight, beta = None, 0  # beta: whether what is there counts
            if wanted[2]:
                d_weight, anew = (torch.empty_like(weight), True) if kept is None else kept.begin()
                beta = 0 if anew else 1
            d_bias = torch.zeros_like(bias) if bias is not None and wanted[3] else None
            for start in range(0, len(weight), tile):
                logits = _logits(hidden, head, start, tile)
                # The slope of capping, before the logits are written over.
                slope = None if cap is None else 1 - (logits / cap).square()
                inside, at = _inside(targets, start, logits.shape[1])
                back = logits.sub_(total[:, None]).exp_().neg_()
                back.scatter_add_(1, at[:, None], inside.to(back.dtype)[:, None])
                back.mul_(grad[:, None] * scale)
                back = (back if slope is None else back.mul_(slope)).to(weight.dtype)
                part = slice(start, start + tile)
                if d_hidden is not None:
                    d_hidden += back @ weight[part]
                if d_weight is not None:
                    d_weight[part].addmm_(back.T, hidden, beta=beta)
                if d_bias is not None:
                    d_bias[part] = back.sum(0)
            if d_hidden is not None:
                d_hidden = d_hidden.to(hidden.dtype)
            unkept = d_weight if kept is None else None
            return d_hidden, None, unkept, d_bias, None, None, None

    return TargetLogProbs
