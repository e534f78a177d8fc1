"""The load-balancing loss of a mixture of experts over document tokens only.

transformers takes it over every token that `attention_mask` does not leave out, and in packed rows that mask may leave
out padding only: anchors, one a row and routed alike in all, would be balanced too. Here the model hands out its
router's logits and adds nothing; the same function of the same module is then called with the documents' tokens.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anchor_attn.hf.wrapping import decoder_of
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import ANCHOR_ID
from anchor_attn.parallel.layout import ShardedLayout

LOSS = "load_balancing_loss_func"
WEIGHT = "router_aux_loss_coef"


@dataclass(frozen=True)
class RouterLoss:
    """A model's own load-balancing loss, its anchors and padding left out.

    Attributes:
        weight: what it is multiplied by.
        num_experts: of each layer.
        experts_per_token: that a token is sent to.
        loss_of: the model's own function.
    """

    weight: float
    num_experts: int
    experts_per_token: int
    loss_of: Callable[..., Any]

    def __call__(self, router_logits: Any, layout: PackedLayout | ShardedLayout) -> Tensor:
        """The loss, not weighted.

        Args:
            router_logits: what the model gave, per layer [B·S, experts].
            layout: of the batch.
        """
        documents = (layout.document_ids > ANCHOR_ID).to(router_logits[0].device)
        loss: Tensor = self.loss_of(router_logits, self.num_experts, self.experts_per_token, documents)
        return loss


def take_router_loss(model: Any, weight: float | None) -> RouterLoss | None:
    """Make a model leave its load-balancing loss to us; None where there is none to add.

    The forward must then be asked for `output_router_logits=True`.

    Args:
        model: a decoder, wrapped or under PEFT; its config is its own.
        weight: of the loss; what the config says when None, which is nothing where it asks for no router logits.

    Raises:
        ValueError: a model that asks for such a loss, or is asked for one, and has it in a form that is not known.
    """
    decoder = decoder_of(model)
    wanted = bool(getattr(decoder.config, "output_router_logits", False)) if weight is None else weight > 0
    if not wanted:
        if hasattr(decoder, WEIGHT):
            setattr(decoder, WEIGHT, 0.0)
        return None
    loss_of = getattr(sys.modules[type(decoder).__module__], LOSS, None)
    sizes: list[Any] = [getattr(decoder, name, None) for name in (WEIGHT, "num_experts", "num_experts_per_tok")]
    if loss_of is None or None in sizes:
        raise ValueError(
            f"router_weight must be 0 for {type(decoder).__name__}, whose load-balancing loss cannot be taken over "
            f"document tokens alone, got {weight}; pass router_weight: 0."
        )
    own, num_experts, experts_per_token = sizes
    setattr(decoder, WEIGHT, 0.0)  # of this model, not of its config: a checkpoint says what it always said
    return RouterLoss(float(own if weight is None else weight), num_experts, experts_per_token, loss_of)
