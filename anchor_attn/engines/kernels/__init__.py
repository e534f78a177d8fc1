"""Varlen kernels behind one interface: each takes packed tokens and boundaries, and says what it cannot do.

base       what a kernel is and what may be asked of it
plan       a layout as segments: boundaries, lengths on the host
gather     the anchor's keys in front of each document's, and their gradient
flash      flash_attn 2, 3 and 4, and torch's own varlen_attn; CUDA
segments   scaled_dot_product_attention a segment at a time; any device
"""

from anchor_attn.engines.kernels.base import Kernel as Kernel
from anchor_attn.engines.kernels.base import Scoring as Scoring
from anchor_attn.engines.kernels.flash_attn import FlashAttention2, FlashAttention3, FlashAttention4
from anchor_attn.engines.kernels.plan import KernelPlan as KernelPlan
from anchor_attn.engines.kernels.plan import create_kernel_plan as create_kernel_plan
from anchor_attn.engines.kernels.plan import padding_alone as padding_alone
from anchor_attn.engines.kernels.segments import SegmentSDPA
from anchor_attn.engines.kernels.torch_flash import VarlenAttn

# The fastest first, where nothing is measured: on Hopper 3 is, and it is not built for Blackwell, where 4 is.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (FlashAttention3(), FlashAttention4(), FlashAttention2(), VarlenAttn(), SegmentSDPA())
}
