"""Prune a Hugging Face model, save it with `save_pretrained`, and load it back with nothing but transformers.

python examples/save_pretrained.py [STORE]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from orchestrator import Study, StudySpec, load
from orchestrator.export.pretrained import save_pretrained
from orchestrator.pools.local import LocalPool

HERE = Path(__file__).resolve().parent


def main(store: str = "./orchard", trials: int = 6, epochs: float = 8) -> None:
    spec = StudySpec.load(HERE / "bert.toml")
    train = spec.train.model_copy(update={"epochs": epochs})
    study = Study(spec.model_copy(update={"trials": trials, "train": train}), store, root=HERE)
    study.run(LocalPool())

    narrow = [point for point in study.front().points if point["params"]["structure"] == "neuron"]
    smallest = min(narrow, key=lambda point: point["flops_shrunk"])
    folder = study.fetch(smallest["key"], Path(store) / "bert-fetched")
    model = load(folder, task=str(HERE / "bert_task.py"))

    example = {"input_ids": torch.randint(16, (4, 16), generator=torch.Generator().manual_seed(0))}
    saved = save_pretrained(model, Path(store) / "bert-pretrained", example)
    again = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        apart = (again(**example).logits - model(**example).logits).abs().max().item()
    widths = f"{model.config.intermediate_size} before pruning and {again.config.intermediate_size} after"
    print(f"saved in {saved}: intermediate_size {widths}; the outputs differ by {apart:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
