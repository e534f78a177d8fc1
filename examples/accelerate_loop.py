"""The same loop under Accelerate, on one process or on many (DDP, FSDP2): wrap first, then prepare.

accelerate launch examples/accelerate_loop.py path/to/model corpus.jsonl
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from anchor_attn import wrap
from anchor_attn.train import PackedCollator, PackedRows, pack_documents, read_documents


def train(model: torch.nn.Module, rows: PackedRows, steps: int, learning_rate: float = 2e-5) -> list[float]:
    """Train on rows in order, one a step and process, and give back the losses over all processes."""
    accelerator = Accelerator()
    wrap(model, pattern="anchor")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    loader = DataLoader(rows, batch_size=1, collate_fn=PackedCollator())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _, batch in zip(range(steps), loader, strict=False):  # the loader moves the layout with the tensors
        # Processes label different numbers of tokens, and DDP takes the mean of their gradients: count over all.
        labelled = accelerator.reduce((batch["labels"][:, 1:] != -100).sum())
        loss = model(**batch, use_cache=False, num_items_in_batch=labelled).loss
        accelerator.backward(loss * accelerator.num_processes)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach()).item())
    return losses


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("corpus")
    given = parser.parse_args()
    packed = pack_documents(read_documents(given.corpus), seq_len=8192, tokenizer=given.model)
    print(train(AutoModelForCausalLM.from_pretrained(given.model), packed, steps=100))
