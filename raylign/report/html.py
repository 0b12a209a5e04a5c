"""The HTML report of a run: one file, no external reference, readable offline and on a phone.

Every cell that shows a number of `report.json` carries its place there as `data-key`.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from raylign.report import plots
from raylign.report.constraint_section import constraint_section
from raylign.report.cost_section import cost_section
from raylign.report.data import NotMeasured, ReportData
from raylign.report.style import STYLE
from raylign.report.token_section import TOKEN_STYLE, token_section
from raylign.report.wording import (
    METRIC_ROWS,
    Verdict,
    format_interval,
    format_number,
    is_significant,
    judge_outcome,
    shown_name,
)
from raylign.types import Completion, Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES_PER_KIND = 4
_DIRECTION = {"lower": "lower is better", "higher": "higher is better", "none": ""}


def render_html(data: ReportData) -> str:
    """The whole report as one HTML document."""
    verdict = judge_outcome(data.comparison)
    sections = [
        _headline(data, verdict),
        _section("Before and after", _comparison(data)),
        _section("Examples", _examples(data)),
        _section("Reward", _reward(data)),
        _section("Rewards of tokens", token_section(data.token_examples)) if data.token_examples else "",
        _section("Label confidence", _confidence(data)),
        _section("Safety constraint", constraint_section(data.constraint)),
        _section("Training", _figure(plots.training_curves(data.training), "Metric records over updates")),
        _section("Drift: may the old candidates still be used?", _drift(data)),
        _section("How far to trust the judges", _judges(data)),
        _section("Data", _data(data)),
        _section("Time", _figure(plots.phase_seconds(data.seconds), "Wall seconds by phase") + _seconds(data)),
        _section("What it cost", cost_section(data.cost)),
        _section("Reproduce", _reproduce(data)),
    ]
    style = STYLE + TOKEN_STYLE if data.token_examples else STYLE
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>raylign: {escape(data.run_name)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(data: ReportData, verdict: Verdict) -> str:
    css = {"safer": "good", "no significant change": "neutral"}.get(verdict.outcome, "bad")
    css = "mixed" if verdict.outcome == "safer at a price" else css
    return (
        f"<header><p class='kicker'>raylign run {escape(data.run_name)}</p>"
        f"<h1 class='{css}'>{escape(verdict.headline)}</h1>"
        f"<ul>{''.join(f'<li>{escape(reason)}</li>' for reason in verdict.reasons)}</ul>"
        f"<p class='meta'>Objective {escape(data.objective)} on {escape(shown_name(data.dataset, 'data'))}; "
        f"{'LoRA adapter' if data.is_adapter else 'all weights'} of {escape(shown_name(data.base_model, 'model'))}; "
        f"judged by {escape(shown_name(data.judge_name, 'judge'))}. The judge is a model: these are its verdicts, "
        "not a guarantee.</p>"
        + "".join(f"<p class='warning'>{escape(text)}</p>" for text in data.warnings)
        + "</header>"
    )


def _comparison(data: ReportData) -> str:
    comparison = data.comparison
    rows = []
    for row in METRIC_ROWS:
        change = getattr(comparison.difference, row.name)
        cells = [
            _cell(
                format_interval(getattr(getattr(comparison, part), row.name), row.unit), f"comparison.{part}.{row.name}"
            )
            for part in ("before", "after")
        ]
        cells.append(_cell(format_interval(change, row.unit, is_difference=True), f"comparison.difference.{row.name}"))
        cells.append(f"<td>{_mark(change, row.direction)}</td>")
        hint = f"<small>{_DIRECTION[row.direction]}</small>" if row.direction != "none" else ""
        rows.append(f"<tr><th scope='row'>{escape(row.label)} {hint}</th>{''.join(cells)}</tr>")
    harmful = [[c.cost for c in answers if c.harmful] for answers in (data.before, data.after)]
    return (
        _figure(plots.safety_bars(comparison), "Rates before and after with 95 % intervals")
        + "<div class='scroll'><table><thead><tr><th>metric</th><th>before</th><th>after</th><th>change</th><th></th>"
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + f"<p class='note'>{escape(data.sampling)} Means with 95 % intervals over prompts. The change is paired by "
        "prompt, under the same sampling noise; ▲ better and ▼ worse where its interval leaves out 0. Attack "
        "success: judged unsafe and not a refusal. Degenerate: empty or looping.</p>"
        + _figure(plots.cost_histogram(*harmful), "Cost of answers to harmful prompts before and after")
    )


def _mark(change: Interval | None, direction: str) -> str:
    if direction == "none" or change is None or not is_significant(change):
        return ""
    is_better = (change.mean < 0) == (direction == "lower")
    return "<span class='good'>▲ better</span>" if is_better else "<span class='bad'>▼ worse</span>"


def _examples(data: ReportData) -> str:
    parts = [
        "<p class='warning'>Content warning: the prompts ask for harmful things and the answers may be offensive. "
        "They are collapsed. Examples are evenly spaced over the evaluation prompts, not chosen by their result.</p>"
    ]
    for harmful, title in ((True, "Harmful prompts"), (False, "Harmless prompts")):
        couples = [(old, new) for old, new in zip(data.before, data.after, strict=True) if old.harmful == harmful]
        chosen = [couples[index] for index in _evenly_spaced(len(couples), EXAMPLES_PER_KIND)]
        parts.append(f"<h3>{title}</h3>")
        parts += [_example(old, new) for old, new in chosen]
    return "".join(parts)


def _evenly_spaced(num_items: int, num_wanted: int) -> list[int]:
    num = min(num_items, num_wanted)
    return [index * num_items // num for index in range(num)]


def _example(old: Completion, new: Completion) -> str:
    return (
        f"<details><summary>{escape(old.prompt)}</summary><div class='pair'>"
        f"{_answer('before', old)}{_answer('after', new)}</div></details>"
    )


def _answer(title: str, answer: Completion) -> str:
    facts = [f"cost {answer.cost:+.2f} ({'unsafe' if answer.cost > 0 else 'safe'})"]
    facts.append("refusal" if answer.is_refusal else "no refusal")
    facts.append(f"{answer.num_tokens} tokens" + ("" if answer.reached_end else ", cut at the limit"))
    text = escape(answer.response) or "<i>empty answer</i>"
    return f"<div><h4>{title}</h4><pre>{text}</pre><p class='meta'>{'; '.join(facts)}</p></div>"


def _reward(data: ReportData) -> str:
    reward = data.reward
    if isinstance(reward, NotMeasured):
        return _not_measured(reward)
    figure = plots.layer_accuracy(
        reward.layers, whole=reward.test_accuracy, kind=reward.kind, num_pairs=reward.num_test_pairs
    )
    rows = [
        ("Reward model", reward.kind, "reward.kind"),
        (
            "Held-out accuracy: test pairs ordered as labelled",
            format_interval(reward.test_accuracy, "share"),
            "reward.test_accuracy",
        ),
        (
            "Out-of-fold accuracy on training pairs",
            format_number(reward.out_of_fold_accuracy, "share"),
            "reward.out_of_fold_accuracy",
        ),
        ("Calibration error (ECE) of the label confidence", format_number(reward.test_ece, "logit"), "reward.test_ece"),
        ("Brier score; 0.25 is a coin", format_number(reward.test_brier, "logit"), "reward.test_brier"),
        (
            "Standard deviation of test margins, reward units; 0 with one member",
            format_number(reward.test_disagreement, "logit"),
            "reward.test_disagreement",
        ),
        ("Pairs the reward was fitted on", f"{reward.num_train_pairs:,}", "reward.num_train_pairs"),
        ("Test pairs", f"{reward.num_test_pairs:,}", "reward.num_test_pairs"),
    ]
    layers = _figure(figure, "Accuracy and calibration error by layer") if reward.layers else ""
    return layers + _table(rows)


def _confidence(data: ReportData) -> str:
    facts = data.confidence
    if isinstance(facts, NotMeasured):
        return _not_measured(facts)
    return _figure(plots.confidence_histogram(facts), "Histogram of label confidence") + _table(
        [
            ("Training pairs", f"{facts.num_pairs:,}", "confidence.num_pairs"),
            ("Flipped: the loss turns their order round", f"{facts.num_flips:,}", "confidence.num_flips"),
            ("Mean confidence", format_number(facts.mean, "logit"), "confidence.mean"),
        ]
    )


def _drift(data: ReportData) -> str:
    drift = data.drift
    if isinstance(drift, NotMeasured):
        return _not_measured(drift)
    kl = (
        str(NotMeasured(reason="no fresh samples"))
        if drift.kl is None
        else format_interval(drift.kl, "logit") + " nats"
    )
    rows = [
        ("Kendall's tau of candidate order", format_interval(drift.kendall_tau, "logit"), "drift.kendall_tau"),
        (
            "Prompts whose likeliest candidate changed",
            format_number(drift.top1_change_rate, "share"),
            "drift.top1_change_rate",
        ),
        ("Jensen-Shannon divergence (nats)", format_number(drift.js_divergence, "logit"), "drift.js_divergence"),
        ("... by chance, 95 % limit", format_number(drift.js_null_limit, "logit"), "drift.js_null_limit"),
        ("KL from the reference, per answer", kl, "drift.kl"),
    ]
    css = "bad" if drift.is_stale else "good"
    return (
        f"<p class='verdict'><b class='{css}'>{escape(drift.verdict)}</b>: {escape(drift.advice)}</p>"
        + _figure(plots.drift_figure(drift), "Rank drift and distribution drift")
        + _table(rows)
    )


def _judges(data: ReportData) -> str:
    judge, detector = data.judge, data.refusal_detector
    rows: list[tuple[str, str, str]] = [
        (
            f"Judge: AUROC on {judge.num_unsafe} unsafe and {judge.num_safe} safe human-labelled answers",
            format_number(judge.auroc, "logit"),
            "judge.auroc",
        ),
        ("Judge: right side of cost 0", format_number(judge.accuracy, "share"), "judge.accuracy"),
        (
            f"Refusal detector: accuracy on {detector.num} human-labelled answers held out from its rules",
            format_number(detector.accuracy, "share"),
            "refusal_detector.accuracy",
        ),
    ]
    for name in ("precision", "recall", "partial_flagged"):
        label = "partial refusals flagged" if name == "partial_flagged" else name
        rows.append(
            (f"Refusal detector: {label}", format_number(getattr(detector, name), "share"), f"refusal_detector.{name}")
        )
    return _table(rows)


def _data(data: ReportData) -> str:
    counts = _table([(name, f"{value:,}", f"data_counts.{name}") for name, value in data.data_counts.items()])
    if not data.quarantine:
        return counts + "<p>No row was quarantined.</p>"
    total = sum(data.quarantine.values())
    rows = [(reason, f"{number:,}", f"quarantine.{reason}") for reason, number in data.quarantine.items()]
    return counts + f"<h3>Quarantined: {total:,} rows</h3>" + _table(rows)


def _seconds(data: ReportData) -> str:
    return _table([(name, f"{value:.1f} s", f"seconds.{name}") for name, value in data.seconds.items()])


def _reproduce(data: ReportData) -> str:
    commit = data.git_commit or "no git repository"
    versions = _table([(name, version, f"versions.{name}") for name, version in data.versions.items()])
    return (
        f"<p>Commit: <code>{escape(commit)}</code></p><p>{escape(data.license_note)}</p>"
        f"<details><summary>Resolved configuration</summary><pre>{escape(data.config_yaml)}</pre></details>"
        f"<details><summary>Versions</summary>{versions}</details>"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _not_measured(missing: NotMeasured) -> str:
    return f"<p class='missing'>{escape(str(missing))}</p>"


def _figure(figure: Figure, description: str) -> str:
    return f"<img src='{plots.to_data_uri(figure)}' alt='{escape(description)}'>"


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Rows of (label, shown value, place in report.json)."""
    body = "".join(f"<tr><th scope='row'>{escape(label)}</th>{_cell(value, key)}</tr>" for label, value, key in rows)
    return f"<div class='scroll'><table><tbody>{body}</tbody></table></div>"


def _cell(value: str, key: str) -> str:
    return f"<td data-key='{escape(key)}'>{escape(value)}</td>"
