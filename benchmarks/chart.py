"""The chart of a run: CPU per request and per chunk, nginx, Tollgate and the field, as SVG.

Owns the drawing and the figures of the field. Those were measured by us, on another machine
of two cores: they give an order of magnitude and are drawn and labelled apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from benchmarks.measures import NGINX, TOLLGATE
from benchmarks.report import Report, figure

REQUEST, CHUNK = "request", "chunk"
ELSEWHERE = "as published in our measurements, other machine"
# µs of CPU: per 1 KB plain request; per 200-byte event at 500 streams × 20 ms.
FIELD = {
    REQUEST: (
        ("nginx 1.22", 30.5),
        ("HAProxy 2.6", 33.0),
        ("Envoy", 141.0),
        ("SGLang router (Rust)", 257.5),
        ("Ferro (Go)", 405.0),
        ("Portkey (Node)", 1640.0),
        ("LiteLLM 1.106 (Python)", 17500.0),
    ),
    CHUNK: (
        ("nginx 1.22", 21.0),
        ("HAProxy 2.6", 21.0),
        ("Envoy", 32.0),
        ("SGLang router (Rust)", 36.0),
        ("Ferro (Go)", 48.0),
        ("Portkey (Node)", 100.0),
        ("LiteLLM 1.106 (Python)", 1600.0),
    ),
}
PANELS = {  # scenario: title, what of the field it compares with
    "rate": ("CPU µs per request (1 KB in, 0.7 KB out)", REQUEST),
    "cadence": ("CPU µs per chunk (500 streams, one in 20 ms each)", CHUNK),
    "burst": ("CPU µs per chunk (streams without delay)", None),
}
OWN_NAMES = {NGINX: "nginx, plain proxy", TOLLGATE: "Tollgate, everything on"}
COLOURS = {NGINX: "#6b7280", TOLLGATE: "#0f766e"}
WIDTH, LEFT, RIGHT = 860, 210, 90
BAR, GAP, TITLE = 18, 6, 44
INK, FAINT = "#1f2937", "#9ca3af"


class Bar(NamedTuple):
    """One bar: CPU in µs, measured in this run or else of the field."""

    name: str
    us: float
    text: str
    colour: str = ""


def draw(reports: Sequence[Report]) -> str:
    """The chart of those reports it has a panel for; empty without any."""
    known = [report for report in reports if report.scenario in PANELS]
    if not known:
        return ""
    parts, top = [], 34.0
    for report in known:
        drawn, height = panel(report, top)
        parts += drawn
        top += height
    machine = known[0].machine
    foot = f"{machine['processor']}, {machine['python']}, {known[0].at:%Y-%m-%d}; log scale"
    parts.append(text(10, top + 4, f"Filled: this run, {foot}.", 11, FAINT))
    parts.append(text(10, top + 20, f"Outlined: {ELSEWHERE}.", 11, FAINT))
    return svg(parts, top + 32)


def panel(report: Report, top: float) -> tuple[list[str], float]:
    """One scenario's bars, and how high they are together."""
    title, field = PANELS[report.scenario]
    bars = [*measured(report), *reference(field)]
    if not bars:
        return [], 0.0
    low, high = decades([bar.us for bar in bars])
    bottom = top + TITLE - 8 + len(bars) * (BAR + GAP)
    parts = [text(10, top + 10, title, 14, INK, weight="bold")]
    for power in range(low, high + 1):
        x = place(10.0**power, low, high)
        parts.append(
            f'<line x1="{x:.1f}" y1="{top + TITLE - 12:.1f}" x2="{x:.1f}" y2="{bottom:.1f}"'
            ' stroke="#e5e7eb"/>'
        )
        parts.append(text(x, top + TITLE - 15, f"{10**power:,}", 10, FAINT, anchor="middle"))
    for number, bar in enumerate(bars):
        parts += drawn_bar(bar, top + TITLE - 6 + number * (BAR + GAP), low, high)
    return parts, bottom - top + 22


def measured(report: Report) -> list[Bar]:
    """What the run measured: nginx, Tollgate, and any other gateway."""
    bars = []
    for one in report.subjects:
        cpu = one.cpu_us_per_unit.get(one.subject)
        if cpu is not None:
            times = one.times_baseline
            factor = f" = {times:.2f} × nginx" if times and one.subject != NGINX else ""
            name = OWN_NAMES.get(one.subject, one.subject)
            colour = COLOURS.get(one.subject, "#b45309")
            bars.append(Bar(name, cpu.median, figure(cpu.median) + factor, colour))
    return bars


def reference(field: str | None) -> list[Bar]:
    """The field's figures."""
    return [Bar(name, us, figure(us)) for name, us in FIELD.get(field or "", ())]


def decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten that enclose `values`."""
    low = math.floor(math.log10(max(min(values), 0.01)))
    return low, max(low + 1, math.ceil(math.log10(max(*values, 0.1))))


def place(us: float, low: int, high: int) -> float:
    """Where a figure lies on the logarithmic axis."""
    share = (math.log10(max(us, 10.0**low)) - low) / (high - low)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def drawn_bar(bar: Bar, y: float, low: int, high: int) -> list[str]:
    """A bar with its name before it and its figure behind it."""
    end = place(bar.us, low, high)
    look = f'fill="{bar.colour}"' if bar.colour else f'fill="none" stroke="{FAINT}"'
    ink = INK if bar.colour else "#6b7280"
    return [
        text(LEFT - 8, y + 13, bar.name, 12, ink, anchor="end"),
        f'<rect x="{LEFT}" y="{y:.1f}" width="{max(1.0, end - LEFT):.1f}" height="{BAR}"'
        f' rx="2" {look}/>',
        text(end + 6, y + 13, bar.text, 12, ink),
    ]


def text(
    x: float, y: float, words: str, size: int, ink: str, anchor: str = "start", weight: str = ""
) -> str:
    """Words at a place."""
    bold = f' font-weight="{weight}"' if weight else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{ink}"'
        f' text-anchor="{anchor}"{bold}>{escape(words)}</text>'
    )


def svg(parts: Sequence[str], height: float) -> str:
    """The whole picture, on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}"'
        f' viewBox="0 0 {WIDTH} {height:.0f}" font-family="system-ui, sans-serif">'
    )
    white = f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>'
    return "\n".join([head, white, *parts, "</svg>"]) + "\n"
