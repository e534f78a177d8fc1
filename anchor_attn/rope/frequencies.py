"""Inverse frequencies of the extension methods that transformers lacks, and the figures that they all share.

    θᵢ = b^(−2i/R)     λᵢ = 2π / θᵢ     L the original length     s the factor     rᵢ = L / λᵢ, turns in L tokens

    NTK-aware       b' = b · s^(R / (R − 2)): the slowest pair is interpolated by s, the fastest not at all
    NTK-by-parts    θ' = (1 − γ) θ/s + γ θ, with γ = clamp((r − 1) / (32 − 1), 0, 1)
    YaRN            by parts, and √(1/t) = 0.1 · ln s + 1 on cos and sin; transformers ramps in i, the paper in r
    LongRoPE        θ/λ with searched λ, for positions from n̂ on

Sources: NTK-aware, by parts and YaRN, https://arxiv.org/abs/2309.00071, sections 3.1 to 3.4; LongRoPE,
https://arxiv.org/abs/2402.13753, equation 2.
"""

import math

from torch import Tensor


def ntk_theta(theta: float, factor: float, rotary_dim: int) -> float:
    """The base of NTK-aware scaling.

        ntk_theta(10_000.0, 4.0, 128)      40_890

    Raises:
        ValueError: a single pair, whose frequency no base changes.
    """
    if rotary_dim <= 2:
        raise ValueError(f"rotary_dim must be above 2 for NTK-aware scaling, got {rotary_dim}; pass method='linear'.")
    return theta * factor ** (rotary_dim / (rotary_dim - 2))


def by_parts(inv_freq: Tensor, factor: float, original_len: int, slow: float = 1.0, fast: float = 32.0) -> Tensor:
    """NTK-by-parts: pairs that turn at most `slow` times in the original length are interpolated, from `fast` on kept.

        θ = 10_000^(-60/128), factor 16, length 4,096      0.2952 θ

    Args:
        inv_freq: float32 [R/2].
        factor: how many times longer the context becomes.
        original_len: tokens the model was trained on.
        slow: turns, the paper's α.
        fast: turns, its β.
    """
    kept = ((turns_in(inv_freq, original_len) - slow) / (fast - slow)).clamp(0, 1)
    return (inv_freq.double() * ((1 - kept) / factor + kept)).float()


def yarn_attention_factor(factor: float) -> float:
    """√(1/t) of YaRN, which multiplies cos and sin.

    yarn_attention_factor(16.0)      1.2773
    """
    return 0.1 * math.log(factor) + 1.0


def rescale_factors(inv_freq: Tensor, extended: Tensor) -> list[float]:
    """θ/θ' of every pair, in which form transformers' "longrope" takes any static method."""
    return (inv_freq.double() / extended.double()).tolist()


def turns_in(inv_freq: Tensor, length: int) -> Tensor:
    """How often each pair turns in so many tokens, float64 [R/2]."""
    return length * inv_freq.double() / (2 * math.pi)
