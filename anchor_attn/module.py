"""AnchorAttention as an nn.Module, for models that are not transformers'.

B batch · S tokens · H query heads · K key heads · D head size

hidden_states [B, S, hidden] -> q_proj, k_proj, v_proj -> q_norm, k_norm -> RoPE -> anchor_attention -> o_proj
"""

from typing import Any

import torch
from torch import Tensor, nn

from anchor_attn.attention import anchor_attention, as_layout, check_scoring
from anchor_attn.engines.choice import check_engine
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import PositionPolicy, check_position_policy, checked_int
from anchor_attn.masks.patterns import Pattern, check_pattern
from anchor_attn.parallel.layout import ShardedLayout
from anchor_attn.rope.precision import (
    RopePrecision,
    RotaryTable,
    apply_rotary,
    check_rope_precision,
    inverse_frequencies,
    packed_rotary_table,
    rotary_table,
)


class AnchorAttention(nn.Module):
    """Multi-head attention over packed documents that see themselves and one shared anchor.

        layout = PackedLayout.from_lengths([[300, 50, 161]])      # 512 tokens with the anchor
        attention = AnchorAttention(256, num_heads=8, num_kv_heads=2)
        out = attention(torch.randn(1, 512, 256), layout)         # [1, 512, 256]

    The parameters are named as in transformers' Llama and Qwen3, whose weights load as they are: `q_proj`, `k_proj`,
    `v_proj`, `o_proj`, with `qk_norm` also `q_norm` and `k_norm`, with `sinks` also `sinks`. There are no buffers: the
    rotary table is made once a batch from `rope_theta`, kept with the layout and shared by all layers.

    Under torch.compile the attention itself stays outside, one graph break a layer, so that other documents compile
    nothing again and the precision stays as stated.

    Args:
        hidden_size: numbers a token, in and out.
        num_heads: query heads [H].
        num_kv_heads: key and value heads [K], of which H is a multiple; H when None.
        head_dim: numbers a head [D]; hidden_size / H when None.
        pattern: as `anchor_attention`.
        engine: as `anchor_attention`.
        rope_theta: the base of RoPE; None for no rotary embedding.
        rope_precision: as `anchor_attn.rope`. "exact" costs one float64 table a batch and is never worse than the
            others; "model" is transformers' arithmetic to the bit, for weights that are to be continued there.
        rotary_dim: numbers of a head that are rotated, even; all when None.
        rotary_interleaved: rotated pairs are neighbours (GPT-J, Llama as released) instead of halves.
        position_policy: "continuous" or "reset", the positions where a call gives none.
        qk_norm: RMSNorm over each head of query and key before RoPE, as Qwen3 has it.
        norm_eps: of these norms.
        bias: of all four projections.
        scale: of the scores; 1/√D when None.
        softcap: as `anchor_attention`.
        sliding_window: as `anchor_attention`.
        keep_anchor: as `anchor_attention`.
        sinks: learn a logit a head that joins every softmax without a value, as gpt-oss has it; 0 at first.
        dropout: of the attention weights in training, in [0, 1).
        device: of the parameters; after "meta", call `to_empty(device=…)` and `reset_parameters()`.
        dtype: of the parameters.

    Raises:
        TypeError: sizes that are no integers.
        ValueError: sizes that do not fit each other, or an option without meaning.

    Source: https://arxiv.org/abs/2411.13476
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        pattern: Pattern = "anchor",
        engine: str = "auto",
        rope_theta: float | None = 10_000.0,
        rope_precision: RopePrecision = "exact",
        rotary_dim: int | None = None,
        rotary_interleaved: bool = False,
        position_policy: PositionPolicy = "continuous",
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        keep_anchor: bool = True,
        sinks: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = _checked_sizes(hidden_size, num_heads, num_kv_heads, head_dim)
        self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim = sizes
        self.pattern, self.engine = pattern, engine
        self.rope_theta, self.rope_precision = rope_theta, rope_precision
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        self.rotary_interleaved = rotary_interleaved
        self.position_policy = position_policy
        self.scale, self.softcap, self.dropout = scale, softcap, dropout
        self.sliding_window, self.keep_anchor = sliding_window, keep_anchor
        _check_options(self)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(self.hidden_size, self.num_heads * self.head_dim, bias, **options)
        self.k_proj = nn.Linear(self.hidden_size, self.num_kv_heads * self.head_dim, bias, **options)
        self.v_proj = nn.Linear(self.hidden_size, self.num_kv_heads * self.head_dim, bias, **options)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, self.hidden_size, bias, **options)
        self.q_norm = nn.RMSNorm(self.head_dim, norm_eps, **options) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, norm_eps, **options) if qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(self.num_heads, **options)) if sinks else None

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as `nn.Linear` does; norms to 1, sinks to 0."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]  # Linear and RMSNorm have it
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self,
        hidden_states: Tensor,
        document_ids: PackedLayout | ShardedLayout | Tensor,
        position_ids: Tensor | None = None,
        rotary: RotaryTable | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: floating [B, S, hidden].
            document_ids: the `PackedLayout` of the batch, on the device of the states; or int [B, S], which every
                layer checks at the cost of a sync: make a layout where layers are many.
            position_ids: int [B, S], [1, S] or [S]; by the position policy when None. Every layer makes its table
                from them: with many layers give `rotary`.
            rotary: cos and sin of a `rotary_table` of the same precision, in place of the module's own: for
                extension methods, and for position_ids that layers share.

        Returns:
            [B, S, hidden]; at padding the bias of `o_proj`, or zeros.

        Raises:
            TypeError: document_ids or position_ids of another type.
            ValueError: shapes, devices or values that do not fit.
        """
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states must have shape [B, S, {self.hidden_size}], got {list(hidden_states.shape)}; "
                "pass one row of hidden_size numbers a token."
            )
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))
        key = self.k_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast the states are lower than the weights: torch has no fused norm for the two, and warns.
            query = self.q_norm(query.to(self.q_norm.weight.dtype))
            key = self.k_norm(key.to(self.k_norm.weight.dtype))
        states = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = self._attend(*states, hidden_states.dtype, document_ids, position_ids, rotary)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    @torch.compiler.disable(reason="a layout is other Python values each batch, which a compiler would compile in")
    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_dtype: torch.dtype,
        document_ids: PackedLayout | ShardedLayout | Tensor,
        position_ids: Tensor | None,
        rotary: RotaryTable | tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """RoPE and attention, [B, H, S, D]."""
        layout = _checked_layout(document_ids, value)
        table = self._rotary_table(layout, hidden_dtype, position_ids, rotary)
        if table is not None:
            query, key = (
                apply_rotary(states, *table, self.rope_precision, self.rotary_interleaved) for states in (query, key)
            )
        return anchor_attention(
            # A norm in float32, or transformers' own float32 table under autocast, leaves them in float32.
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            layout,
            pattern=self.pattern,
            engine=self.engine,
            scale=self.scale,
            softcap=self.softcap,
            sliding_window=self.sliding_window,
            keep_anchor=self.keep_anchor,
            sinks=self.sinks,
            dropout=self.dropout if self.training else 0.0,
        )

    def _rotary_table(
        self,
        layout: PackedLayout | ShardedLayout,
        dtype: torch.dtype,
        position_ids: Tensor | None,
        rotary: RotaryTable | tuple[Tensor, Tensor] | None,
    ) -> RotaryTable | tuple[Tensor, Tensor] | None:
        """The table that was given, or one of the given or the policy's positions; None without RoPE."""
        if position_ids is not None:
            _check_position_ids(position_ids, layout)
            if rotary is not None or self.rope_theta is None:
                beside = "rope_theta=None" if rotary is None else "rotary"
                raise ValueError(
                    f"position_ids must be left out beside {beside}, got {list(position_ids.shape)}; "
                    "nothing would use them."
                )
        if rotary is not None or self.rope_theta is None:
            return rotary
        inv_freq = inverse_frequencies(self.rotary_dim, self.rope_theta)
        if position_ids is None and isinstance(layout, PackedLayout):
            return packed_rotary_table(
                layout, inv_freq, self.rope_precision, dtype, position_policy=self.position_policy
            )
        if position_ids is None:
            position_ids = layout.position_ids(self.position_policy)
        return rotary_table(position_ids.reshape(-1, layout.seq_len), inv_freq, self.rope_precision, dtype)

    def extra_repr(self) -> str:
        """The arguments; of the optional ones those that are set."""
        names = ["hidden_size", "num_heads", "num_kv_heads", "head_dim", "pattern", "engine", "rope_theta"]
        if self.rope_theta is not None:
            names += ["rope_precision", "rotary_dim", "position_policy"]
        names += [
            name
            for name in ("rotary_interleaved", "scale", "softcap", "sliding_window", "dropout")
            if getattr(self, name)
        ]
        if self.sliding_window is not None:
            names.append("keep_anchor")
        shown = [f"{name}={getattr(self, name)!r}" for name in names]
        return ", ".join(shown if self.sinks is None else [*shown, "sinks=True"])


def _checked_sizes(
    hidden_size: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int, int, int]:
    given = {
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
        "head_dim": head_dim,
    }
    sizes = {name: checked_int(size, name) for name, size in given.items() if size is not None}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}; pass the size of your model.")
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}; change one of them."
        )
    if head_dim is None and sizes["hidden_size"] % sizes["num_heads"]:
        raise ValueError(
            f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}; or pass head_dim."
        )
    sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_heads"])
    return sizes["hidden_size"], sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"]


def _check_options(module: AnchorAttention) -> None:
    """Raise at the start what the first forward would raise."""
    check_pattern(PackedLayout.from_lengths([[1]]), module.pattern, module.sliding_window)
    check_engine(module.engine)
    check_rope_precision(module.rope_precision)
    check_position_policy(module.position_policy)
    if module.rope_theta is not None:
        inverse_frequencies(module.rotary_dim, module.rope_theta)
        if module.rotary_dim > module.head_dim:
            raise ValueError(
                f"rotary_dim must be at most head_dim={module.head_dim}, got {module.rotary_dim}; pass None for all."
            )
    check_scoring(module.scale, module.softcap, module.dropout)


def _checked_layout(
    document_ids: PackedLayout | ShardedLayout | Tensor, states: Tensor
) -> PackedLayout | ShardedLayout:
    """The layout of [B, K, S, D] states."""
    given = as_layout(document_ids)
    layout = given if given is document_ids else given.to(states.device)
    shape = [states.shape[0], states.shape[2]]
    if [layout.batch_size, layout.seq_len] != shape:
        raise ValueError(
            f"document_ids must have the shape of hidden_states {shape}, got {[layout.batch_size, layout.seq_len]}; "
            "pass the ids of this batch."
        )
    if layout.device != states.device:  # a layout moved here would make its plans anew in every layer
        raise ValueError(
            f"document_ids must be on the device of hidden_states, {states.device}, got a layout on {layout.device}; "
            "move it once a batch with layout.to(device)."
        )
    return layout


def _check_position_ids(position_ids: Tensor, layout: PackedLayout | ShardedLayout) -> None:
    if not isinstance(position_ids, Tensor):
        raise TypeError(
            f"position_ids must be a torch tensor, got {type(position_ids).__name__}; wrap it in torch.tensor(…)."
        )
    shapes = ([layout.batch_size, layout.seq_len], [1, layout.seq_len], [layout.seq_len])
    if list(position_ids.shape) not in shapes:
        raise ValueError(
            f"position_ids must have shape {shapes[0]}, {shapes[1]} or {shapes[2]}, got {list(position_ids.shape)}; "
            "pass one position a token."
        )
    if position_ids.device != layout.device:
        raise ValueError(
            f"position_ids must be on the device of hidden_states, {layout.device}, got {position_ids.device}; "
            "move them with position_ids.to(device)."
        )
