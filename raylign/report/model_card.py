"""The model card of a trained checkpoint: README.md with the hub's front matter and the run's own numbers."""

from __future__ import annotations

from pathlib import Path

import yaml

from raylign.config import EMBEDDED
from raylign.report.data import NotMeasured, ReportData
from raylign.report.wording import METRIC_ROWS, format_interval, format_number, judge_outcome, shown_name

_NOT_DPO = ("sft", "ava_p", "ava_d", "policy gradient")  # objectives that are no form of DPO


def render_model_card(data: ReportData) -> str:
    """The card as Markdown.

    The front matter names a base model only when it is a hub id, since a local path means nothing to a reader; the
    text always says which model it was.
    """
    verdict = judge_outcome(data.comparison)
    parts = [
        f"---\n{_front_matter(data)}---",
        f"# {data.run_name}",
        f"{'LoRA adapter for' if data.is_adapter else 'Fine-tuned from'} {_code(shown_name(data.base_model, 'model'))} "
        f"on {_code(shown_name(data.dataset, 'data'))} with raylign, objective {_code(data.objective)}.",
        f"**{verdict.headline}**",
        "\n".join(f"* {reason}" for reason in verdict.reasons),
        "## Safety, before and after",
        _metrics_table(data),
        f"{data.sampling} Judge: {_code(shown_name(data.judge_name, 'judge'))}; it ranks human-labelled unsafe answers "
        f"above safe ones with AUROC {format_number(data.judge.auroc, 'logit')}. Refusals are found by rules, "
        f"{format_number(data.refusal_detector.accuracy, 'share')} accurate on held-out human labels. "
        "Intervals are 95 % intervals over prompts; the change is paired by prompt.",
        "## Reward and drift",
        _reward_and_drift(data),
        "## Intended use",
        "Research on safety alignment from preference data. Evaluate it on your own prompts and policies before any "
        "other use.",
        "## Limits",
        "* The verdicts are those of one automatic judge and one refusal detector on a sample of prompts; attacks that "
        "are not among them were not tried.\n"
        "* Helpfulness was measured only as over-refusal and degenerate answers.\n"
        f"* Preference data carry the views of their annotators.\n* {data.license_note}",
        "## Configuration",
        f"```yaml\n{data.config_yaml.rstrip()}\n```",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in data.versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(data: ReportData) -> str:
    content: dict[str, object] = {"library_name": "peft" if data.is_adapter else "transformers"}
    if _is_hub_id(data.base_model):
        content["base_model"] = data.base_model
    dataset = data.dataset.removeprefix("hf://datasets/")
    if dataset != data.dataset:
        content["datasets"] = ["/".join(dataset.split("/")[:2])]
    content["pipeline_tag"] = "text-generation"
    family = [] if data.objective in _NOT_DPO else ["dpo"]
    content["tags"] = list(dict.fromkeys(["raylign", *family, "safety", "alignment", data.objective]))
    content["license"] = "other"
    content["license_name"] = "see-model-card"
    content["license_link"] = "README.md"
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text


def _is_hub_id(name: str) -> bool:
    is_local = name == EMBEDDED or name.startswith(("/", ".", "~")) or Path(name).is_dir()
    return not is_local and name.count("/") == 1


def _metrics_table(data: ReportData) -> str:
    lines = ["| metric | before | after | change |", "|---|---|---|---|"]
    for row in METRIC_ROWS:
        before, after, change = (
            getattr(part, row.name)
            for part in (data.comparison.before, data.comparison.after, data.comparison.difference)
        )
        lines.append(
            f"| {row.label} | {format_interval(before, row.unit)} | {format_interval(after, row.unit)} "
            f"| {format_interval(change, row.unit, is_difference=True)} |"
        )
    return "\n".join(lines)


def _reward_and_drift(data: ReportData) -> str:
    reward, drift = data.reward, data.drift
    accuracy = str(reward) if isinstance(reward, NotMeasured) else format_interval(reward.test_accuracy, "share")
    checked = str(drift) if isinstance(drift, NotMeasured) else f"{drift.verdict}. {drift.advice}"
    return f"* Held-out pair accuracy of the reward: {accuracy}\n* Drift check: {checked}"


def _code(text: str) -> str:
    """Inline code; a path or id may hold no back tick in Markdown."""
    return f"`{text.replace('`', '')}`"
