"""Charts as inline SVG, coloured by the page's style sheet: they follow light and dark, and load nothing."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

_Place = tuple[float, float]
_WIDTH, _HEIGHT = 460, 330
_SHAPES = {
    "none": "M0-7.5L7.5 0L0 7.5L-7.5 0Z",
    "sere": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0Z",
    "random": "M-5.5-5.5h11v11h-11Z",
    "top_k": "M0-6.5L6.8 5.5H-6.8Z",
    "sere_t": "M0-8L2.2-2.6L7.6-2.5L3.4 1.2L4.7 6.5L0 3.5L-4.7 6.5L-3.4 1.2L-7.6-2.5L-2.2-2.6Z",
    "oea": "M-6.5-2h4.5v-4.5h4v4.5h4.5v4h-4.5v4.5h-4v-4.5h-4.5Z",
    "other": "M0 6.5L6.8-5.5H-6.8Z",
}
# Where a point's number goes: the first place that is free, near ones first.
_PLACES = [(math.cos(a) * r, math.sin(a) * r) for r in (18, 27, 38) for a in (-0.8, 0.8, 2.4, -2.4, 0, -1.57, 3.14, 1.57)]


@dataclass(frozen=True)
class Point:
    """A configuration in a scatter chart."""

    x: float
    y: float
    number: int
    label: str
    policy: str
    on_front: bool
    recommended: bool


@dataclass(frozen=True)
class Line:
    """A line of a panel; `style` is a class of the style sheet."""

    points: Sequence[tuple[float, float]]
    style: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _around(values: Sequence[float], share: float = 0.12) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1
    return low - room, high + room


class _Frame:
    """A chart's axes: values to places, and their ticks."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], width: int, height: int) -> None:
        self.x, self.y = x, y
        self.left, self.top, self.right, self.bottom = 50, 12, width - 12, height - 42

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        across = self.left + (x - x0) / (x1 - x0) * (self.right - self.left)
        return across, self.bottom - (y - y0) / (y1 - y0) * (self.bottom - self.top)

    def draw(self, x_label: str, y_label: str, *, x_count: int, y_count: int) -> str:
        from markupsafe import escape

        parts = []
        for value in ticks(*self.y, y_count):
            _, y = self.at(self.x[0], value)
            parts.append(f'<path class="grid" d="M{self.left} {y:.1f}H{self.right}"/>')
            parts.append(f'<text class="tick" x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.5g}</text>')
        for value in ticks(*self.x, x_count):
            x, _ = self.at(value, self.y[0])
            parts.append(f'<path class="grid" d="M{x:.1f} {self.top}V{self.bottom}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{self.bottom + 16}" text-anchor="middle">{value:.6g}</text>')
        middle = (self.left + self.right) / 2
        parts.append(f'<text class="name" x="{middle}" y="{self.bottom + 35}" text-anchor="middle">{escape(x_label)}</text>')
        if y_label:
            middle = (self.top + self.bottom) / 2
            turn = f'transform="translate(12 {middle}) rotate(-90)"'
            parts.append(f'<text class="name" {turn} text-anchor="middle">{escape(y_label)}</text>')
        return "".join(parts)


def symbol(policy: str, *, on_front: bool = True) -> "Markup":
    """The mark of a policy, for legends and tables; hollow if not on the front."""
    from markupsafe import Markup

    return Markup(f'<svg class="symbol" viewBox="-9 -9 18 18" aria-hidden="true">{_mark(policy, on_front)}</svg>')


def style_of(policy: str) -> str:
    """What a policy's marks and lines are styled as: some have a style of their own."""
    return policy if policy in _SHAPES else "other"


def _mark(policy: str, on_front: bool) -> str:
    style = style_of(policy)
    return f'<path class="mark p-{style}{"" if on_front else " off"}" d="{_SHAPES[style]}"/>'


def scatter(points: Sequence[Point], *, x_label: str, y_label: str) -> "Markup":
    """Points with numbers beside them; the front is a dashed line, its points are filled, the recommended one has a ring."""
    from markupsafe import Markup, escape

    frame = _Frame(_around([p.x for p in points]), _around([p.y for p in points]), _WIDTH, _HEIGHT)
    parts = [frame.draw(x_label, y_label, x_count=6, y_count=5)]
    front = [frame.at(*place) for place in sorted((p.x, p.y) for p in points if p.on_front)]
    if front:
        parts.append(f'<path class="front" d="M{_path(front)}"/>')
    places = [frame.at(p.x, p.y) for p in points]
    for p, (x, y) in zip(points, places, strict=True):
        ring = '<circle class="ring" r="11"/>' if p.recommended else ""
        title = escape(f"{p.number}. {p.label}: {p.y:.4g} at {p.x:.4g}")
        parts.append(f'<g transform="translate({x:.1f} {y:.1f})"><title>{title}</title>{ring}{_mark(p.policy, p.on_front)}</g>')
    for p, at, place in zip(points, places, _free_places(places, front, frame), strict=True):
        if math.dist(place, at) > 20:
            parts.append(f'<path class="leader" d="M{_path([at, place])}"/>')
        parts.append(f'<text class="number" x="{place[0]:.1f}" y="{place[1] + 4:.1f}" text-anchor="middle">{p.number}</text>')
    return _svg(_WIDTH, _HEIGHT, f"{y_label} against {x_label}", Markup("".join(parts)))


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _free_places(places: list[_Place], front: list[_Place], frame: _Frame) -> list[_Place]:
    """Where the points' numbers go: off the other marks and numbers, and off the front's line if that is possible."""
    line = [
        (x0 + (x1 - x0) * i / 40, y0 + (y1 - y0) * i / 40)
        for (x0, y0), (x1, y1) in itertools.pairwise(front)
        for i in range(41)
    ]
    taken, found = list(places), []
    for x, y in places:
        wanted = [(x + dx, y + dy) for dx, dy in _PLACES]
        inside = [w for w in wanted if frame.left < w[0] - 8 and w[0] + 8 < frame.right and frame.top < w[1] < frame.bottom]
        free = [w for w in inside if all(math.dist(w, other) > 15 for other in taken)]
        clear = [w for w in free if all(math.dist(w, other) > 9 for other in line)]
        found.append((clear or free or inside or wanted)[0])
        taken.append(found[-1])
    return found


def panel(lines: Sequence[Line], *, x_label: str, x_range: tuple[float, float], high: float, label: str) -> "Markup":
    """A small chart from zero, one of several with the same axes.

    Args:
        lines: Each with at least one point.
        x_label: Name of the horizontal axis.
        x_range: Ends of the horizontal axis.
        high: Upper end of the vertical axis.
        label: What the chart shows, for those who cannot see it.
    """
    from markupsafe import Markup

    x_range = x_range if x_range[1] > x_range[0] else (x_range[0] - 0.5, x_range[1] + 0.5)
    frame = _Frame(x_range, (0, high * 1.08 or 1), 300, 190)
    # Layers have whole numbers.
    parts = [frame.draw(x_label, "", x_count=min(6, max(1, round(x_range[1] - x_range[0]))), y_count=4)]
    for line in lines:
        at = [frame.at(*point) for point in line.points]
        parts.append(f'<path class="line {line.style}" d="M{_path(at)}"/>')
        if len(at) <= 24:
            parts += [f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in at]
    return _svg(300, 190, label, Markup("".join(parts)))


def interval(point: float, low: float | None, high: float | None, *, span: tuple[float, float], allowed: float) -> "Markup":
    """A loss with its interval on a common scale; a line at zero, a dashed one at the loss allowed."""
    from markupsafe import Markup

    def at(value: float) -> float:
        return 4 + (value - span[0]) / (span[1] - span[0] or 1) * 112

    parts = [f'<path class="zero" d="M{at(0):.1f} 0V16"/><path class="allowed" d="M{at(allowed):.1f} 0V16"/>']
    if low is not None and high is not None:
        parts.append(f'<path class="range" d="M{at(low):.1f} 8H{at(high):.1f}"/>')
    parts.append(f'<circle class="point" cx="{at(point):.1f}" cy="8" r="3.4"/>')
    return _svg(120, 16, f"loss {point:.4f}", Markup("".join(parts)), style="interval")


def _svg(width: int, height: int, label: str, body: "Markup", style: str = "chart") -> "Markup":
    from markupsafe import Markup

    start = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(style, width, height, label)
    return start + body + Markup("</svg>")
