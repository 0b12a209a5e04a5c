"""The main job end to end on the embedded model and a cut of the embedded data: real Ray, small numbers."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from pathlib import Path

import pytest

from raylign.config import RunConfig, load_config
from raylign.errors import CacheMismatchError, OutputExistsError, ResourceError

SMALL = [
    "data.max_pairs=160",
    "data.max_length=192",
    "data.max_bad_fraction=1",
    "data.test_fraction=0.2",
    "reward.folds=2",
    "reward.epochs=2",
    "train.max_steps=4",
    "train.batch_size=8",
    "evaluate.num_prompts=8",
    "evaluate.max_new_tokens=8",
    "evaluate.drift_prompts=4",
    "evaluate.drift_candidates=2",
    "evaluate.bootstrap_samples=100",
]
PHASES = ["ingest", "features", "reward", "rank", "train", "evaluate"]


def small(storage: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"run.storage={storage}", *SMALL, *overrides])


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def aligned(ray_cluster: None, storage: Path):
    from raylign.runtime.pipeline import align

    return align(small(storage))


@pytest.mark.ray
@pytest.mark.slow
def test_run_leaves_what_it_promises(aligned, storage):
    assert list(aligned.seconds) == PHASES
    content = json.loads((aligned.directory / "report.json").read_text())
    counts = content["data_counts"]
    assert counts["read"] == counts["used"] + counts["sampled out"] + sum(content["quarantine"].values())
    assert counts["used"] == counts["train"] + counts["valid"] + counts["test"] == 160
    assert content["confidence"]["num_pairs"] == counts["train"]
    html = aligned.report.read_text()
    assert "Over-refusal" in html
    assert not re.findall(r"""(?:src|href)=["']https?://""", html)
    assert "Over-refusal" in aligned.table
    assert len(content["reward"]["layers"]) == 6
    for phase in PHASES:
        manifest = json.loads((aligned.directory / phase / "manifest.json").read_text())
        assert manifest["status"] == "done"
        assert manifest["versions"]["ray"]


@pytest.mark.ray
@pytest.mark.slow
def test_checkpoint_is_a_plain_hf_directory_with_a_card(aligned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    link = aligned.directory / "checkpoint"
    assert link.resolve() == aligned.checkpoint.resolve()
    model = AutoModelForCausalLM.from_pretrained(link)
    tokenizer = AutoTokenizer.from_pretrained(link)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model(**ids).logits.isfinite().all()
    assert "label_confidence" in (link / "README.md").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_the_ledger_prices_every_phase_once(aligned):
    from raylign.cost.rows import read_ledger, total, totals

    rows = read_ledger(aligned.directory / "ledger")
    stages, phases = totals(rows), totals(rows, by="phase")
    assert list(stages) == PHASES
    for name, seconds in aligned.seconds.items():
        assert stages[name].wall_s == pytest.approx(seconds, rel=0.05, abs=1)  # two clocks on a busy machine
    assert stages["features"].device_s["cpu"] == pytest.approx(2 * stages["features"].wall_s)  # an actor and its reader
    assert stages["train"].device_s["cpu"] == pytest.approx(stages["train"].wall_s)
    assert phases["reference_forward"].counts.num_items == 160
    assert phases["policy_update"].counts.num_items == 4 * 8
    assert phases["answer"].counts.num_items == 2 * 8
    assert 0 < phases["answer"].counts.decode_steps <= 2 * 8  # one batch each, of at most 8 tokens
    reference, update = phases["reference_forward"].counts, phases["policy_update"].counts
    assert update.backward_tokens == update.forward_tokens < reference.forward_tokens
    # full training: a backward is two forwards; FLOPs per token differ by the lengths of the pairs alone
    ratio = (update.flops / update.forward_tokens) / (reference.flops / reference.forward_tokens)
    assert ratio == pytest.approx(3, rel=0.2)
    assert all(row.is_finished and not row.error for row in rows)
    content = json.loads((aligned.directory / "report.json").read_text())["cost"]
    assert content["total"]["device_s"]["cpu"] == pytest.approx(total(rows).device_s["cpu"])
    assert content["money"] == {"not_measured": "no prices are given (cost.prices)"}


@pytest.mark.ray
@pytest.mark.slow
def test_second_run_reuses_the_features_and_resume_skips_everything(aligned, storage):
    from raylign.runtime.pipeline import align

    again = align(small(storage, "run.resume=true"))
    assert again.table == aligned.table
    caches = list((storage / "cache").iterdir())
    assert len(caches) == 1
    made = (caches[0] / "manifest.json").stat().st_mtime_ns
    other = align(small(storage, "run.name=plain", "train.objective=dpo", "policy.adapter=lora"))
    facts = json.loads((other.directory / "features" / "manifest.json").read_text())["facts"]
    assert facts["is_reused"]
    first, second = (json.loads((run.directory / "report.json").read_text())["cost"] for run in (again, other))
    assert first["reused"]["device_s"] == {}
    spent = {name: first["phases"][name]["device_s"]["cpu"] for name in ("extract", "reference_forward")}
    assert second["reused"]["device_s"]["cpu"] == pytest.approx(sum(spent.values()))
    assert "reference_forward" not in second["phases"]
    assert (caches[0] / "manifest.json").stat().st_mtime_ns == made
    assert (other.checkpoint / "adapter_config.json").is_file()
    assert "not measured" in (other.directory / "report.html").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_directory_in_use_and_changed_inputs_are_refused(aligned, storage):
    from raylign.runtime.pipeline import align

    with pytest.raises(OutputExistsError, match=r"run\.resume=true"):
        align(small(storage))
    with pytest.raises(CacheMismatchError, match=r"train\.beta: was 0\.15, now 0\.3"):
        align(small(storage, "run.resume=true", "train.beta=0.3"))


@pytest.mark.ray
def test_demand_beyond_the_cluster_fails_before_anything_starts(ray_cluster, tmp_path):
    from raylign.runtime.pipeline import align

    with pytest.raises(ResourceError, match=r"16 training worker\(s\).*the cluster has 2"):
        align(small(tmp_path, "resources.num_workers=16"))
    assert not any(tmp_path.iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_readme_snippet_runs(ray_cluster, tmp_path, monkeypatch):
    """The eight lines of the README, on rows and a model that exist."""
    from raylign.assets import PAIRS, TINY_CHAT, asset_path

    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 8
    with gzip.open(asset_path(PAIRS), "rt", encoding="utf-8") as stream:
        Path("pairs.jsonl").write_text("".join(itertools.islice(stream, 120)), encoding="utf-8")
    snippet = snippet.replace('"my-model"', repr(str(asset_path(TINY_CHAT))))
    # the cluster's workers were started elsewhere, so a relative path would not be theirs
    snippet = snippet.replace('"pairs.jsonl"', repr(str(tmp_path / "pairs.jsonl")))
    scope: dict[str, object] = {}
    exec(snippet.replace("beta=0.1", "beta=0.1, max_steps=2, batch_size=4"), scope)
    policy = Path(scope["result"].checkpoint.path) / "policy"
    assert (policy / "model.safetensors").is_file()
    assert set(scope["ranked"].columns()) >= {"label_confidence", "margin_mean", "chosen_ids"}
