"""A fitted reward of tokens on disk, as the reward phase leaves it, without Ray: two members that hardly learned."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from raylign.config import PolicySection, RewardModelSection, RewardSection
from raylign.runtime.fitted_reward import FittedTexts
from raylign.runtime.text_reward_job import FitTask, fit_group
from raylign.runtime.token_members import kind_facts

SECTION = RewardModelSection(lora_rank=2, lora_alpha=4, epochs=1, batch_size=8, learning_rate=1e-2, batch_tokens=512)


def save_token_reward(directory: Path, table: pa.Table, policy_dir: Path) -> Path:
    """Fit members of AVA to the training pairs of a table, one fold for all, and return the directory."""
    (directory / "full").mkdir(parents=True)
    task = FitTask(
        reward=RewardSection(kind="ava_p", num_heads=2, head_data="all"),
        reward_model=SECTION,
        policy=PolicySection(dtype="float32"),
        model_path=str(policy_dir),
        output_dir=directory / "full",
        seed=3,
        num_cpus=1,
        num_gpus=0,
    )
    parts = tuple(table.filter(pc.equal(table["split"], split)) for split in ("train", "valid"))
    for member in range(2):
        fit_group(parts, task, [member])
    facts = {"kind": "ava_p", "names": task.names, "scale": None, "shift": None, "seed": 3, **kind_facts(task)}
    (directory / "full" / "text_reward.json").write_text(json.dumps(facts))
    FittedTexts(
        kind="ava_p", centers=(0.0,), full_center=0.0, temperature=1.0, fold_seed=0, metrics={}, directory=directory
    ).save(directory)
    return directory
