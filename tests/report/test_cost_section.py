"""The cost tables: numbers of report.json, no price without prices, no table without a ledger."""

from __future__ import annotations

from shown import Page, look_up

from raylign.report.cost_section import cost_section, format_device_seconds
from raylign.report.data import NotMeasured, report_json
from raylign.report.html import render_html


def cells(html: str) -> dict[str, str]:
    return dict(Page(html).cells)


def test_cells_show_the_numbers_of_the_json(report_data):
    content = report_json(report_data)
    shown = cells(cost_section(report_data.cost))
    assert {key.split(".")[1] for key in shown} == {"stages", "phases", "total", "money", "reused", "num_killed"}
    for key, text in shown.items():
        value = look_up(content, key)
        match key.rpartition(".")[2]:
            case "device_s":
                assert text == format_device_seconds(value)
            case "flops":
                assert text == (f"{value:.2e}" if value else "-")
            case "money":
                assert text == f"{value:.2f} EUR"
            case "peak_rss_mib":
                assert text.startswith(f"{value:,.0f} MiB")
            case "wall_s":
                assert text == f"{value:,.1f}"
            case _:
                assert text == f"{value:,}"
    assert shown["cost.total.device_s"] == "cpu 128.5, H200 60.0"
    assert shown["cost.stages.train.peak_rss_mib"] == "900 MiB + 2,048 MiB device"


def test_the_page_has_the_section(report_data):
    html = render_html(report_data)
    assert "What it cost" in html and cost_section(report_data.cost) in html


def test_without_prices_there_is_no_price(report_data, replace):
    cost = replace(report_data.cost, money=NotMeasured(reason="no prices are given (cost.prices)"))
    assert cells(cost_section(cost))["cost.money"] == "not measured: no prices are given (cost.prices)"


def test_a_run_that_reused_nothing_and_was_not_killed_does_not_mention_it(report_data, replace):
    cost = replace(report_data.cost, num_killed=0, reused=type(report_data.cost.reused)())
    assert not {"cost.reused.device_s", "cost.num_killed"} & set(cells(cost_section(cost)))


def test_no_ledger_is_said(report_data):
    assert cost_section(NotMeasured(reason="the run kept no <ledger>")) == (
        "<p class='missing'>not measured: the run kept no &lt;ledger&gt;</p>"
    )
