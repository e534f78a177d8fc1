"""What a rank holds: shards of the states, the layers that are gathered, and what forward keeps for backward.

    weights, gradients   float32, sharded over all ranks           4 + 4 bytes a parameter
    optimizer            AdamW's two moments, sharded              8 bytes a parameter
    gathered             two layers and the tables in the compute dtype, and one set of gradients before it is summed
    activations          every layer's, or its input alone with one layer's in full (checkpointing)
    logits               of the loss: nothing when the loss is fused with the head, as Liger's is

Activations are those that a decoder with RMS norms and a gated MLP keeps under flash attention; others differ in the
MLP's part. Attention keeps no scores.
"""

from dataclasses import dataclass
from typing import Literal

from anchor_attn.train.plan.models import ModelShape

Dtype = Literal["bfloat16", "float32"]
BYTES: dict[Dtype, int] = {"bfloat16": 2, "float32": 4}
STATE_BYTES = 4  # of a weight, of a gradient and of each moment
USABLE = 0.9  # of a device's memory: its runtime, buffers of kernels and gaps between tensors take the rest


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: its shard.
        gradients: its shard.
        optimizer: its shard.
        gathered: what is there of other ranks' shards at once, and copies in the compute dtype.
        activations: kept for backward, without checkpointing.
        activations_checkpointed: with it.
        logits: at the loss.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    activations_checkpointed: float
    logits: float

    def total(self, checkpointing: bool) -> float:
        """All of it."""
        kept = self.activations_checkpointed if checkpointing else self.activations
        return self.weights + self.gradients + self.optimizer + self.gathered + kept + self.logits


def plan_memory(shape: ModelShape, tokens: float, ranks: int, dtype: Dtype, fused_loss: bool = False) -> Memory:
    """The bytes of the rank that holds most tokens.

    Args:
        shape: of the model.
        tokens: of one row on that rank.
        ranks: that the states are sharded over.
        dtype: of the compute; states are float32.
        fused_loss: whether logits are never held at once.
    """
    width = BYTES[dtype]
    shard = STATE_BYTES * shape.parameters / ranks
    layer = (shape.parameters - shape.outer_parameters) / shape.layers
    if ranks > 1:
        gathered = width * (2 * layer + shape.outer_parameters) + STATE_BYTES * max(layer, shape.outer_parameters)
    else:
        gathered = 0.0 if dtype == "float32" else float(width * shape.parameters)  # the copies that autocast makes
    a_layer = activation_bytes(shape, dtype) * tokens
    inputs = shape.layers * width * shape.hidden_size * tokens
    # The logits, their log-softmax in float32 and its gradient.
    logits = 0.0 if fused_loss else shape.vocab_size * (width + 8.0) * tokens
    return Memory(shard, shard, 2 * shard, gathered, shape.layers * a_layer, inputs + a_layer, logits)


def activation_bytes(shape: ModelShape, dtype: Dtype) -> int:
    """What one layer keeps of one token for its backward.

    Per norm its input in float32, the normed and the scaled state; query, key, value, the output and its log-sum-exp;
    the MLP's gate before and after its activation, the other half, and their product.
    """
    width = BYTES[dtype]
    norms = 2 * shape.hidden_size * (4 + 2 * width)
    keys = shape.num_kv_heads * (shape.head_dim + shape.value_dim)
    attention = width * (shape.num_heads * (shape.head_dim + shape.value_dim) + keys) + 4 * shape.num_heads
    return norms + attention + 4 * width * shape.mlp_size
