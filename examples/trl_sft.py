"""TRL's SFTTrainer on rows that are packed here, because its own packing has no anchor.

python examples/trl_sft.py path/to/model corpus.jsonl
"""

import argparse
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from anchor_attn import wrap
from anchor_attn.train import PackedCollator, PackedRows, pack_documents, read_documents


def train(
    model: Any, tokenizer: Any, rows: PackedRows, steps: int, learning_rate: float = 2e-5, **options: Any
) -> list[float]:
    """Train on rows in order, one a step and process, and give back the losses."""
    config = SFTConfig(
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_length=None,  # rows are as long as they were packed
        dataset_kwargs={"skip_prepare_dataset": True},  # and tokenized
        remove_unused_columns=False,  # the collator reads document_lengths
        train_sampling_strategy="sequential",
        logging_steps=1,
        **options,
    )
    trainer = SFTTrainer(
        model=wrap(model, pattern="anchor"),
        args=config,
        train_dataset=Dataset.from_list([{key: list(value) for key, value in row.items()} for row in rows]),
        data_collator=PackedCollator(),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("corpus")
    given = parser.parse_args()
    own_tokenizer = AutoTokenizer.from_pretrained(given.model)
    packed = pack_documents(read_documents(given.corpus), seq_len=8192, tokenizer=own_tokenizer)
    print(train(AutoModelForCausalLM.from_pretrained(given.model), own_tokenizer, packed, steps=100))
