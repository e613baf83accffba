# SPDX-License-Identifier: Apache-2.0
"""SVG charts as strings, in the colours of the page: line charts, a heat map, a bar of parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 420, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 30
_POINTS_AT_MOST = 400  # more than the chart has pixels for


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns round numbers between ``low`` and ``high``, about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Writes a number in few characters."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1000:g}k"
    if size < 0.001:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.4g}"


def line_chart(
    title: str, x: Sequence[float], y: Sequence[float], *, x_label: str, from_zero: bool = False
) -> str:
    """Draws one curve.

    Args:
        title: above the curve.
        x: at least one value, rising.
        y: as many.
        x_label: under the axis.
        from_zero: the vertical axis begins at 0.
    """
    stride = max(1, len(x) // _POINTS_AT_MOST)
    if stride > 1:
        y = [sum(y[i : i + stride]) / len(y[i : i + stride]) for i in range(0, len(y), stride)]
        x = [x[min(i + stride, len(x)) - 1] for i in range(0, len(x), stride)]
    x_low, x_high = min(0.0, x[0]), max(x)
    y_low, y_high = (0.0 if from_zero else min(y)), max(y)
    if y_high - y_low < 1e-12:
        y_low, y_high = y_low - (abs(y_low) or 1) * 0.1, y_high + (abs(y_high) or 1) * 0.1
    margin = 0.06 * (y_high - y_low)
    y_high += margin
    y_low -= 0.0 if from_zero else margin

    def at_x(value: float) -> float:
        return _LEFT + (value - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in ticks(y_low, y_high):
        place = at_y(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(x_low, x_high, 5):
        parts.append(
            f'<text x="{at_x(value):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{number(value)}</text>'
        )
    points = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in zip(x, y, strict=True))
    base = _HEIGHT - _BOTTOM
    area = f"{at_x(x[0]):.1f},{base} {points} {at_x(x[-1]):.1f},{base}"
    parts.append(f'<polygon class="area" points="{area}"/><polyline class="curve" points="{points}"/>')
    parts.append(f'<circle class="end" cx="{at_x(x[-1]):.1f}" cy="{at_y(y[-1]):.1f}" r="3.5"/>')
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    last = f'<span class="last">{number(y[-1])}</span>'
    caption = f'<figcaption>{escape(title)} {last}<span class="unit">{escape(x_label)}</span></figcaption>'
    return f'<figure class="chart">{caption}{drawing}</figure>'


def heat_map(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Draws a confusion matrix, a row per true class: colour is the share of the row, the number the count."""
    size, left, top = 46, 150, 118
    extent = len(names) * size
    parts = []
    for i, row in enumerate(counts):
        total = sum(row)
        middle = top + i * size + size / 2
        label = f"{names[i]} ({total})"
        parts.append(f'<text x="{left - 10}" y="{middle + 4}" text-anchor="end">{escape(label)}</text>')
        for j, count in enumerate(row):
            share = count / total if total else 0.0
            kind = "hit" if i == j else "miss"
            x, y = left + j * size, top + i * size
            what = f"{names[i]} taken for {names[j]}" if i != j else f"{names[i]} recognised"
            hint = f"{what}: {count} of {total}"
            parts.append(
                f'<g><title>{escape(hint)}</title><rect class="cell" x="{x + 1}" y="{y + 1}" width="{size - 2}" '
                f'height="{size - 2}" rx="5"/><rect class="{kind}" x="{x + 1}" y="{y + 1}" width="{size - 2}" '
                f'height="{size - 2}" rx="5" style="opacity:{0.9 * share:.3f}"/>'
            )
            if count:
                strong = " strong" if share > 0.55 else ""
                place = f'x="{x + size / 2}" y="{middle + 4}" text-anchor="middle"'
                parts.append(f'<text class="count{strong}" {place}>{count}</text>')
            parts.append("</g>")
    for j, name in enumerate(names):
        column, above = left + j * size + size / 2 + 4, top - 10
        parts.append(
            f'<text x="{column}" y="{above}" transform="rotate(-40 {column} {above})">{escape(name)}</text>'
        )
    width, height = left + extent + 70, top + extent + 8
    head = f'<svg class="confusion" viewBox="0 0 {width} {height}" role="img" aria-label="Confusion matrix">'
    return head + "".join(parts) + "</svg>"


def bar_of_parts(parts: Sequence[tuple[str, float]], unit: str) -> str:
    """Draws parts of a whole as one bar with a legend."""
    total = sum(value for _, value in parts) or 1.0
    bar, legend = [], []
    for i, (name, value) in enumerate(parts):
        bar.append(f'<span class="part p{i % 5}" style="flex-grow:{max(value / total, 0.004):.4f}"></span>')
        shown = f"{number(round(value, 1))} {escape(unit)}"
        legend.append(f'<li><i class="p{i % 5}"></i>{escape(name)} <b>{shown}</b></li>')
    return f'<div class="parts">{"".join(bar)}</div><ul class="legend">{"".join(legend)}</ul>'
