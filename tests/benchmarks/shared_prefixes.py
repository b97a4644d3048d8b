"""The fixed list of 40 proposals as an Orchardist study, on two Ray workers; what was run, as JSON."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from orchestrator import Study, StudySpec

CRITERIA = {"l1": "magnitude", "random": "random"}


def spec(proposals: list[dict[str, object]]) -> StudySpec:
    """LeNet-300-100 on 4,000 digits: 10 epochs dense, then 4 to fine-tune or 10 after a rewind to init, each round."""
    return StudySpec(
        name="proposals",
        task="mnist",
        trials=len(proposals),
        sampler="random",
        train={"epochs": 10, "retrain_epochs": 4, "optimizer": "adam", "lr": 1.2e-3, "batch_size": 60},
        space={
            "criterion": sorted({CRITERIA[str(p["criterion"])] for p in proposals}),
            "scope": "layer",
            "rate": sorted({p["amount"] for p in proposals}),
            "rounds": {"low": 1, "high": 8},
            "retrain": ["finetune", "rewind"],
        },
        enqueue=[
            {
                "criterion": CRITERIA[str(p["criterion"])],
                "rate": p["amount"],
                "rounds": p["rounds"],
                "retrain": p["strategy"],
            }
            for p in proposals
        ],
    )


def main() -> None:
    """Run the proposals in a fresh store and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--store", default=None)
    options = parser.parse_args()
    proposals = json.loads((Path(__file__).parent / "proposals.json").read_text())[: options.limit]
    with tempfile.TemporaryDirectory() as folder:
        study = Study(spec(proposals), options.store or folder)
        standing = study.run(workers=options.workers)
        rows = study.store.table("proposals", "outcomes", ["trial", "round", "test_accuracy", "params"]).to_pylist()
    found = {
        "epochs_asked": round(standing.epochs_asked, 1),
        "epochs_run": round(standing.epochs_run, 1),
        "done": standing.done,
        "accuracies": [round(row["test_accuracy"], 4) for row in rows],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
