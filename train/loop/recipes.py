"""Presets of `anchor-attn train`: the paper's recipes, and one for a laptop.

The paper (https://arxiv.org/abs/2411.13476): AdamW with weight decay 0.1 and betas 0.9 and 0.95, a constant learning
rate of 2e-5, 2,000 steps of 8 sequences on 8 A100s; plain RoPE with a larger base, 1e6 for 16K, 5e6 for 64K, 1e7 for
128K. It trained on SlimPajama, sampled and upsampled by length; a preset reads the corpus as it is published.
"""

from collections.abc import Mapping
from typing import Any

THETAS = {16_384: 1e6, 65_536: 5e6, 131_072: 1e7}
DEFAULT = "laptop"

LAPTOP: dict[str, Any] = {
    "model": "laptop",
    "data": {"sources": [{"path": "stdlib"}]},
    "packing": {"seq_len": 4096},
    "training": {
        "max_steps": 100,
        "per_device_train_batch_size": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "seed": 0,
        "save_steps": 25,
        "save_total_limit": 2,
        "logging_steps": 10,
    },
}


def paper_recipe(model: str, seq_len: int) -> dict[str, Any]:
    """The paper's continued pretraining of a model to rows of `seq_len` tokens.

    Memory is our choice: activations are computed again in the backward pass, and where there are several processes
    FSDP2 shares the weights. One process takes all 8 rows one after the other.
    """
    return {
        "model": model,
        "data": {"sources": [{"path": "cerebras/SlimPajama-627B"}]},
        "packing": {"seq_len": seq_len},
        "extension": {"method": "default", "theta": THETAS[seq_len], "target_len": seq_len},
        "rows_per_step": 8,
        "training": {
            "max_steps": 2000,
            "per_device_train_batch_size": 1,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.1,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "bf16": True,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {"version": 2},
            "dataloader_num_workers": 2,
            "seed": 0,
            "save_steps": 200,
            "save_total_limit": 3,
            "logging_steps": 10,
        },
    }


RECIPES: Mapping[str, dict[str, Any]] = {
    "laptop": LAPTOP,
    "llama-2-7b-16k": paper_recipe("meta-llama/Llama-2-7b-hf", 16_384),
    "llama-2-7b-64k": paper_recipe("meta-llama/Llama-2-7b-hf", 65_536),
    "llama-2-7b-128k": paper_recipe("meta-llama/Llama-2-7b-hf", 131_072),
    "llama-3-8b-128k": paper_recipe("meta-llama/Meta-Llama-3-8B", 131_072),
    "mistral-7b-128k": paper_recipe("mistralai/Mistral-7B-v0.3", 131_072),
    "qwen1.5-1.8b-128k": paper_recipe("Qwen/Qwen1.5-1.8B", 131_072),
}


def find_recipe(name: str) -> dict[str, Any]:
    """A preset, as a config file would hold it.

    Raises:
        ValueError: a name that is none.
    """
    if name not in RECIPES:
        raise ValueError(f"preset must be one of {', '.join(RECIPES)}, got {name!r}; pass one of them.")
    return RECIPES[name]
