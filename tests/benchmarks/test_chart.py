"""The chart: measured bars filled, the field's outlined and labelled, longer means dearer."""

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import chart, report
from benchmarks.catalogue import SCENARIOS
from benchmarks.measures import Plan
from tests.benchmarks.test_report import measured

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*scenarios: str) -> ElementTree.Element:
    runs = [measured("direct", 0, 1.0), measured("nginx", 0, 20.0), measured("tollgate", 0, 50.0)]
    runs[0].cpu_us_per_unit.clear()
    made = [report.report_of(SCENARIOS[name], Plan(), runs) for name in scenarios]
    return ElementTree.fromstring(chart.draw(made))


def words(picture: ElementTree.Element) -> list[str]:
    return [part.text or "" for part in picture.iter(f"{SVG}text")]


def test_measured_bars_are_filled_and_those_of_the_field_outlined():
    picture = drawn("rate")
    bars = list(picture.iter(f"{SVG}rect"))[1:]
    filled = [bar for bar in bars if bar.get("fill") != "none"]
    assert (len(filled), len(bars)) == (2, 2 + len(chart.FIELD["request"]))
    said = words(picture)
    assert "50.0 = 2.50 × nginx" in said
    assert "LiteLLM 1.106 (Python)" in said
    assert any("as published in our measurements, other machine" in line for line in said)


def test_a_dearer_subject_has_a_longer_bar():
    bars = list(drawn("rate").iter(f"{SVG}rect"))[1:]
    nginx, ours = (float(bar.get("width", 0)) for bar in bars[:2])
    assert nginx < ours < chart.WIDTH - chart.LEFT - chart.RIGHT


def test_each_scenario_has_its_panel_and_others_have_none():
    said = words(drawn("rate", "cadence", "burst"))
    assert sum(title in said for title, _ in chart.PANELS.values()) == 3
    assert chart.draw([report.report_of(SCENARIOS["mixed"], Plan(), [measured("a", 0, 1)])]) == ""


@pytest.mark.parametrize("values", [[0.0], [5.0, 17_500.0], [10.0], [1000.0]])
def test_the_axis_encloses_what_it_shows(values):
    low, high = chart.decades(values)
    assert low < high
    for value in values:
        assert chart.LEFT <= chart.place(value, low, high) <= chart.WIDTH - chart.RIGHT
