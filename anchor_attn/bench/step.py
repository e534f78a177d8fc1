"""A training step – forward, backward, AdamW – of a Llama under every pattern, and of transformers' own packing.

The rival "transformers packed SDPA" is the unwrapped model on the same rows with positions that restart at every
document, which is how transformers recognises packed rows. All rivals hold the same parameters and optimizer, so that
a model of a billion weights stands in memory once.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch

from anchor_attn.bench.parity import PARITY_LENGTHS
from anchor_attn.bench.timing import Pace, Rival, Row, Timing, Watch, time_rivals
from anchor_attn.engines.choice import choose_route
from anchor_attn.masks import PATTERNS, PackedLayout
from anchor_attn.request import Call
from anchor_attn.results import CheckError

# What `--rivals` calls them, and what records do.
RIVALS: dict[str, str] = {
    **{pattern: f"wrapped {pattern}" for pattern in PATTERNS},
    "anchor-exact": "wrapped anchor, exact RoPE",
    "transformers": "transformers packed SDPA",
}

# TinyLlama 1.1B, https://arxiv.org/abs/2401.02385
ONE_BILLION: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
VOCAB_SIZE = 257  # of a size that names none
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def bench_step(
    row: Row,
    model_size: dict[str, Any],
    rounds: int,
    device: str,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    engine: str = "auto",
    checkpointing: bool = False,
    names: Sequence[str] = tuple(RIVALS),
    budget_s: float = math.inf,
) -> list[Timing]:
    """Time a step of each rival in turn.

    Args:
        row: one packed batch; its distribution is recorded.
        model_size: fields of a LlamaConfig.
        rounds: counted.
        device: "cpu" or "cuda".
        seed: of weights and tokens.
        dtype: of weights, gradients and the optimizer's moments.
        engine: of the wrapped models.
        checkpointing: whether layers keep their inputs alone and run forward once more in the backward.
        names: which of `RIVALS`, in this order.
        budget_s: as `time_rivals`.

    Raises:
        CheckError: intra_doc's loss is not that of transformers' own packing on a small row; then nothing is timed.
        ValueError: an unknown rival.
    """
    if unknown := [name for name in names if name not in RIVALS]:
        known = tuple(RIVALS)
        raise ValueError(f"rivals must be among {known}, got {unknown[0]!r}; pass some of them, comma-separated.")
    layout = row.layout.to(device)
    plain = _create_model(model_size, layout.seq_len, device, dtype, seed)
    check_loss(plain, engine, device, seed)
    if checkpointing:
        # transformers 5.23 has a new name for it, 5.17 the old one alone.
        if hasattr(plain, "activation_checkpointing_enable"):
            plain.activation_checkpointing_enable()
        else:
            plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4)
    inputs = _draw_inputs(plain, layout, seed)

    def rival(name: str) -> Rival:
        pattern: Any = None if name == "transformers" else name.removesuffix("-exact")
        precision = "exact" if name.endswith("-exact") else "model"
        model = plain if pattern is None else _wrapped(plain, pattern, engine, precision)
        extra = {} if pattern is None else {"document_ids": layout}

        def run(watch: Watch) -> None:
            with watch("step"):
                model(**inputs, **extra).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        if pattern is None:
            # A mask of booleans, and one of numbers that torch's SDPA makes of it.
            width = 1 + torch.finfo(dtype).bits / 8
            return Rival(
                RIVALS[name], "transformers", "sdpa, S × S mask", "intra_doc", run,
                phases=("step",), is_dense=True, bytes_a_cell=width,
            )  # fmt: skip
        call = Call(torch.device(device), dtype, plain.model.layers[0].self_attn.head_dim, True, pattern)
        route = choose_route(engine, call)
        return Rival(RIVALS[name], route.engine, route.kernel, pattern, run, route.form, phases=("step",))

    return time_rivals([rival(name) for name in names], Row(layout, row.distribution), rounds, budget_s, Pace())


def check_loss(plain: Any, engine: str, device: str, seed: int) -> float:
    """Compare the loss under intra_doc with that of transformers' own packing, on a small row.

    Returns:
        Their difference, relative to theirs.

    Raises:
        CheckError: it is above 1e-4 in float32, 1e-2 in lower precision.
    """
    layout = PackedLayout.from_lengths([PARITY_LENGTHS]).to(device)
    inputs = _draw_inputs(plain, layout, seed)
    with torch.no_grad():
        ours = float(_wrapped(plain, "intra_doc", engine)(**inputs, document_ids=layout).loss)
        theirs = float(plain(**inputs).loss)
    difference = abs(ours - theirs) / theirs
    if not difference <= LOSS_TOLERANCE[plain.dtype]:
        raise CheckError(
            f"intra_doc must equal transformers' packed attention before it is timed, got losses {ours} and {theirs}; "
            "report this with the versions of torch and transformers."
        )
    return difference


def _create_model(size: dict[str, Any], seq_len: int, device: str, dtype: torch.dtype, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    positions = max(seq_len, sum(PARITY_LENGTHS) + 1)
    config = LlamaConfig(**{"vocab_size": VOCAB_SIZE, **size}, max_position_embeddings=positions)
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype)


def _wrapped(plain: Any, pattern: Any, engine: str, precision: Any = "model") -> Any:
    """A wrapped model over the same parameters."""
    from anchor_attn.hf import wrap

    shared = {id(part): part for part in (*plain.parameters(), *plain.buffers())}
    return wrap(copy.deepcopy(plain, shared), pattern, engine, precision)


def _draw_inputs(plain: Any, layout: PackedLayout, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, plain.config.vocab_size, layout.document_ids.shape, generator=generator).to(layout.device)
    restart = layout.document_ranks().clamp(min=0)  # the anchor stands alone there, as under intra_doc
    return {"input_ids": ids, "labels": ids, "use_cache": False, "position_ids": restart}
