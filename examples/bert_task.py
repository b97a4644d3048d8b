"""A task of Hugging Face's: a small BERT, drawn at random, reads a digit as a sentence of 16 words.

What `transformers` builds is an `nn.Module` like any other: inputs go to it by name, and of its answer the logits
count. A word is one of the 16 patterns that 2x2 pixels, each dark or bright, can have.
"""

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from orchestrator.tasks import Task
from orchestrator.tasks.digits import task as digits


def words(images: Tensor) -> dict[str, Tensor]:
    patches = (images > 0.5).reshape(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    return {"input_ids": (patches * torch.tensor([1, 2, 4, 8])).sum(2)}


def in_feed_forward(name: str, weight: Tensor) -> bool:
    """Only these widths can a config say: it has one `intermediate_size`, and no room for fewer heads."""
    return name.endswith("dense.weight") and ".encoder.layer." in name and ".attention." not in name


def task(intermediate: int = 128) -> Task:
    config = BertConfig(
        vocab_size=16,
        max_position_embeddings=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=intermediate,
        initializer_range=0.2,
        num_labels=10,
    )
    data = digits()
    return Task(
        model=lambda: BertForSequenceClassification(config),
        train=(words(data.train[0]), data.train[1]),
        valid=(words(data.valid[0]), data.valid[1]),
        test=(words(data.test[0]), data.test[1]),
        classes=data.classes,
        prunable=in_feed_forward,
    )
