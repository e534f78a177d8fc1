"""A LightningModule around a wrapped model; Lightning moves the layout with the batch.

python examples/lightning_module.py path/to/model corpus.jsonl
"""

import argparse
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from anchor_attn import wrap
from anchor_attn.train import PackedCollator, PackedRows, pack_documents, read_documents


class AnchorModule(lightning.LightningModule):
    """A causal language model that trains under anchor attention."""

    def __init__(self, model: torch.nn.Module, learning_rate: float = 2e-5) -> None:
        super().__init__()
        self.model = wrap(model, pattern="anchor")
        self.learning_rate = learning_rate
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Any], batch_index: int) -> torch.Tensor:
        """The model's own loss: documents predict nothing of each other."""
        loss = self.model(**batch, use_cache=False).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW as in the paper."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)


def train(
    model: torch.nn.Module, rows: PackedRows, steps: int, learning_rate: float = 2e-5, **options: Any
) -> list[float]:
    """Train on rows in order, one a step, and give back the losses."""
    module = AnchorModule(model.train(), learning_rate)  # Lightning leaves the mode as it finds it
    trainer = lightning.Trainer(max_steps=steps, gradient_clip_val=1.0, **options)
    trainer.fit(module, DataLoader(rows, batch_size=1, collate_fn=PackedCollator()))
    return module.losses


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("corpus")
    given = parser.parse_args()
    packed = pack_documents(read_documents(given.corpus), seq_len=8192, tokenizer=given.model)
    print(train(AutoModelForCausalLM.from_pretrained(given.model), packed, steps=100))
