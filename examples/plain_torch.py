"""Anchor attention in a loop of one's own: wrap the model, and pass the collator's batch on.

python examples/plain_torch.py path/to/model corpus.jsonl
"""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from anchor_attn import wrap
from anchor_attn.train import PackedCollator, PackedRows, pack_documents, read_documents


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors and the layout move alike."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def train(model: torch.nn.Module, rows: PackedRows, steps: int, learning_rate: float = 2e-5) -> list[float]:
    """Train on rows in order, one a step, and give back the losses."""
    wrap(model, pattern="anchor")
    model.train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    batches: Iterable[dict[str, Any]] = DataLoader(rows, batch_size=1, collate_fn=PackedCollator())
    losses = []
    for _, batch in zip(range(steps), batches, strict=False):
        loss = model(**to_device(batch, device), use_cache=False).loss  # document_ids is among the batch
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("corpus")
    given = parser.parse_args()
    packed = pack_documents(read_documents(given.corpus), seq_len=8192, tokenizer=given.model)
    pretrained = AutoModelForCausalLM.from_pretrained(given.model)
    print(train(pretrained, packed, steps=100))
    pretrained.save_pretrained("trained")  # a plain checkpoint: wrap it again after loading
