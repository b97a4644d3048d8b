"""What every built-in task promises; subclass `TaskContract` once for each of its variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from orchestrator.tasks.data import InMemory, call
from orchestrator.tasks.load import LoadedTask, load
from orchestrator.tasks.source import collect


class TaskContract:
    """The laws of a built-in task."""

    name: ClassVar[str]
    params: ClassVar[dict[str, Any]] = {}
    sizes: ClassVar[tuple[int, int, int]]
    input_shape: ClassVar[tuple[int, ...]]
    stratified: ClassVar[tuple[str, ...]] = ("train", "valid", "test")
    comes_trained: ClassVar[bool] = False
    last_layer: ClassVar[str] = "out"

    @pytest.fixture
    def loaded(self) -> LoadedTask:
        return load(collect(self.name, Path()), self.params)

    @staticmethod
    def split(loaded: LoadedTask, name: str) -> InMemory:
        split = getattr(loaded, name)
        assert isinstance(split, InMemory)
        return split

    def test_sizes_and_shapes(self, loaded: LoadedTask) -> None:
        for name, size in zip(("train", "valid", "test"), self.sizes, strict=True):
            split = self.split(loaded, name)
            assert len(split) == size
            assert split.inputs.shape == (size, *self.input_shape)
            assert split.inputs.dtype == torch.float32
            assert split.targets.dtype == torch.int64

    def test_splits_share_no_row(self, loaded: LoadedTask) -> None:
        rows = [
            {row.numpy().tobytes() for row in self.split(loaded, name).inputs.flatten(1)}
            for name in ("train", "valid", "test")
        ]
        assert not rows[0] & rows[1]
        assert not rows[0] & rows[2]
        assert not rows[1] & rows[2]

    def test_splits_are_stratified(self, loaded: LoadedTask) -> None:
        assert loaded.classes is not None
        parts = [self.split(loaded, name).targets for name in self.stratified]
        overall = torch.bincount(torch.cat(parts)).double() / sum(map(len, parts))
        assert len(overall) == len(loaded.classes)
        for part in parts:
            assert (torch.bincount(part) - overall * len(part)).abs().max() <= 1

    def test_loading_twice_gives_the_same_object(self, loaded: LoadedTask) -> None:
        assert load(collect(self.name, Path()), self.params) is loaded

    def test_building_the_data_twice_gives_the_same_bits(self, loaded: LoadedTask) -> None:
        from importlib import import_module

        again = import_module(loaded.source.module).task(**self.params)
        for name in ("train", "valid", "test"):
            for ours, theirs in zip(getattr(loaded.task, name), getattr(again, name), strict=True):
                assert torch.equal(ours, theirs)

    def test_model_fits(self, loaded: LoadedTask) -> None:
        inputs, targets = self.split(loaded, "train").take(torch.arange(3))
        outputs = call(loaded.model(), inputs)
        assert loaded.classes is not None
        assert outputs.shape == (3, len(loaded.classes))
        assert torch.isfinite(loaded.task.loss(outputs, targets))

    def test_an_untrained_model_follows_the_seed_alone(self, loaded: LoadedTask) -> None:
        def built(seed: int) -> torch.Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return torch.cat([p.flatten() for p in loaded.model(fresh=True).parameters()])

        assert torch.equal(built(1), built(1))
        assert not torch.equal(built(1), built(2))

    def test_info(self, loaded: LoadedTask) -> None:
        info = loaded.info
        assert info.train_examples == self.sizes[0]
        assert info.metrics == (("accuracy", "maximise"),)
        assert info.classes == loaded.classes
        assert info.comes_trained == self.comes_trained
        model = loaded.model()
        for layer in info.layers:
            assert model.get_parameter(layer.name).shape == layer.shape
        assert info.layers[-1].label == self.last_layer

    def test_loading_leaves_the_global_generators_alone(self) -> None:
        import random

        import numpy as np

        from orchestrator.tasks import load as module

        module._loaded.clear()
        before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
        load(collect(self.name, Path()), self.params).info  # noqa: B018 - read for what it does
        after = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])
