"""The part of the HTML report that says what the run cost."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from raylign.report.data import CostFacts, NotMeasured

if TYPE_CHECKING:
    from raylign.cost.rows import Cost

_COUNTS = {
    "generated_tokens": "generated tokens",
    "decode_steps": "decode steps",
    "forward_tokens": "forward tokens",
    "backward_tokens": "backward tokens",
}
_NOTE = (
    "Device-seconds are reserved devices times seconds, idle time included; time inside nested work is counted there. "
    "FLOPs are computed by formula from real tokens, not measured. Tokens of generation are no forward tokens."
)


def cost_section(cost: CostFacts | NotMeasured) -> str:
    """Tables by phase of the run and by what was done, and the total; values at `cost.*` of report.json."""
    if isinstance(cost, NotMeasured):
        return f"<p class='missing'>{escape(str(cost))}</p>"
    money = str(cost.money) if isinstance(cost.money, NotMeasured) else f"{cost.money:,.2f} {cost.currency}"
    reused = ""
    if cost.reused.device_s:
        seconds = _cell(format_device_seconds(cost.reused.device_s), "cost.reused.device_s")
        reused = f"<tr><th scope='row'>found ready, paid for by an earlier run</th>{seconds}</tr>"
    killed = ""
    if cost.num_killed:
        killed = (
            f"<tr><th scope='row'>entries cut short by a kill</th>{_cell(str(cost.num_killed), 'cost.num_killed')}</tr>"
        )
    return (
        _table(cost.stages, "stages", total=cost.total)
        + f"<table><tbody><tr><th scope='row'>price</th>{_cell(money, 'cost.money')}</tr>"
        + f"{reused}{killed}</tbody></table>"
        + f"<p class='note'>{_NOTE}</p>"
        + f"<details><summary>By what was done</summary>{_table(cost.phases, 'phases')}</details>"
    )


def format_device_seconds(device_s: Mapping[str, float]) -> str:
    """For example "cpu 12.5, H200 3.1"."""
    return ", ".join(f"{kind} {seconds:,.1f}" for kind, seconds in device_s.items()) or "0"


def _table(costs: Mapping[str, Cost], place: str, *, total: Cost | None = None) -> str:
    names = ("wall seconds", "device-seconds", *_COUNTS.values(), "FLOPs", "peak memory")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = [_row(name, cost, f"cost.{place}.{name}") for name, cost in costs.items()]
    if total is not None:
        rows.append(_row("total", total, "cost.total"))
    return (
        f"<div class='scroll'><table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(name: str, cost: Cost, place: str) -> str:
    flops = f"{cost.counts.flops:.2e}" if cost.counts.flops else "-"
    memory = f"{cost.peak_rss_mib:,.0f} MiB"
    if cost.peak_device_mib:
        memory += f" + {cost.peak_device_mib:,.0f} MiB device"
    cells = [
        _cell(f"{cost.wall_s:,.1f}", f"{place}.wall_s"),
        _cell(format_device_seconds(cost.device_s), f"{place}.device_s"),
        *(_cell(f"{getattr(cost.counts, count):,}", f"{place}.counts.{count}") for count in _COUNTS),
        _cell(flops, f"{place}.counts.flops"),
        _cell(memory, f"{place}.peak_rss_mib"),
    ]
    return f"<tr><th scope='row'>{escape(name)}</th>{''.join(cells)}</tr>"


def _cell(value: str, key: str) -> str:
    return f"<td data-key='{escape(key)}'>{escape(value)}</td>"
