"""Comparisons of a few methods, and phases that note what they were asked for and do nothing. No Ray is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from raylign.compare_config import Comparison, load_comparison
from raylign.config import needs_cost
from raylign.runtime.compare import compare

SEEDS = (0, 1)
METHODS = {
    "dpo": {"train.objective": "dpo"},
    "rerank": {"train.objective": "label_confidence"},
    "online_dpo": {"train.method": "online_dpo"},
}
CONSTRAINED = {
    "dpo": {"train.objective": "dpo"},
    "rerank": {"train.objective": "label_confidence"},
    "rectified": {"confidence.squash": "none", "constraint.kind": "rectified", "constraint.multiplier": "dual"},
    "repo": {"train.method": "policy_gradient", "constraint.kind": "rectified", "constraint.multiplier_window": 8},
}


def load_methods(tmp_path: Path, methods: dict[str, dict[str, object]], **sections: object) -> Comparison:
    file = tmp_path / "compare.yaml"
    content = {
        "run": {"name": "c", "storage": str(tmp_path / "runs")},
        "evaluate": {"bootstrap_samples": 100},
        "cost": {"prices": {"cpu": 36.0}, "currency": "EUR"},
        "compare": {
            "seeds": list(SEEDS),
            "num_points": 1,
            "projections": ["7B"],
            "methods": methods,
        },
        **sections,
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_comparison(file)


class MadeUpPhases:
    """Phases that note what they were asked for and do nothing."""

    def __init__(self, config, calls: list[tuple[object, ...]]) -> None:
        self.run = SimpleNamespace(devices={"evaluate": {}}, directory=Path(config.run.name))
        self.layers, self.model = (1,), "model"
        self._config, self._calls = config, calls

    def ingest(self):
        return Path("ingest"), {"fingerprint": "f"}

    def features(self, ingest, fingerprint):
        return Path("features"), "digest"

    def reward(self, features, features_digest):
        return Path("reward"), {}

    def cost(self, features, features_digest):
        self._calls.append((self._config.run.name, "cost", self._config.cost_model.source))
        return "priced" if needs_cost(self._config) else None

    def rank(self, features, reward, reward_key, cost):
        self._calls.append((self._config.run.name, "rank", cost))
        return Path("ranked"), {}

    def train(self, pairs, key, reward):
        self._calls.append((self._config.run.name, "train", str(pairs)))

    def train_online(self, ingest, fingerprint, reward, reward_key, cost):
        self._calls.append((self._config.run.name, "train_online", cost))


def calls_of(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What a comparison asks its phases for; seeds apart."""
    calls: list[tuple[object, ...]] = []
    module = "raylign.runtime.compare"
    monkeypatch.setattr(f"{module}.open_phases", lambda config, model: MadeUpPhases(config, calls))
    for name in ("check_packages", "check_demand"):
        monkeypatch.setattr(f"{module}.{name}", lambda config: None)
    monkeypatch.setattr(f"{module}._evaluate", lambda *args: {})
    monkeypatch.setattr(f"{module}._collect", lambda *args: "result")
    assert compare(comparison) == "result"
    return [(name.removesuffix("-seed0"), *rest) for name, *rest in calls if not name.endswith("-seed1")]
