"""The whole way in Python: describe a study, run it, choose from its front, take a model home and use it.

python examples/python_api.py [STORE]
"""

import sys
from pathlib import Path

import torch

from orchestrator import Study, StudySpec, load
from orchestrator.pools.local import LocalPool
from orchestrator.tasks.digits import task as digits

STUDY = StudySpec(
    name="from-python",
    task="digits",
    trials=8,
    objectives=("accuracy", "sparsity"),
    train={"epochs": 5, "retrain_epochs": 2, "lr": 2e-3},
    space={
        "criterion": ["magnitude", "taylor"],
        "rate": {"low": 0.3, "high": 0.7, "step": 0.1},
        "rounds": {"low": 1, "high": 3},
    },
)


def main(store: str = "./orchard") -> None:
    study = Study(STUDY, store)
    study.run(LocalPool())  # in this process; study.run(workers=4) starts Ray workers

    everything = study.front()
    assert everything.dense is not None
    print(f"dense: accuracy {everything.dense['accuracy']:.3f}")
    for point in everything.points:
        print(f"{point['key'][:12]}: accuracy {point['accuracy']:.3f}, sparsity {point['sparsity']:.3f}")

    good = study.front(where=["accuracy >= dense - 0.03"])
    smallest = max(good.points, key=lambda point: point["sparsity"])
    folder = study.fetch(smallest["key"], Path(store) / "from-python-model")

    model = load(folder)
    x, y = digits().test
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(f"loaded from {folder}: accuracy on test {accuracy:.3f}, recorded {smallest['test_accuracy']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
