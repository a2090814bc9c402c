"""Small plain charts as inline SVG: points and lines on two axes, text in the page's colour.

A value that is not finite, or not positive on a logarithmic axis, is left out and counted, so that
the page can say so. Colours are the classes ``s0`` to ``s5``, which the page's style sheet defines.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from ternq.shown import number, printable

WIDTH, HEIGHT = 340, 236
_LEFT, _TOP, _BOTTOM = 46, 12, 42
_LETTER, _LINE = 6.8, 14  # the room that a letter and a line of text take
_COLOURS = 6
_LONGEST = 24  # letters of a label


@dataclass(frozen=True)
class Point:
    """A measured value at ``x``, with its standard error where it has one."""

    label: str
    x: float
    y: float
    error: float | None = None


@dataclass(frozen=True)
class Series:
    """A named curve."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """An SVG element, how many values it does not show, and whether its y axis is logarithmic."""

    svg: str
    left_out: int = 0
    log: bool = False


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high`` on pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, here = map(self._scaled, (self.low, self.high, value))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers in the range: three to six of them, as a rule."""
        found = _log_ticks(self.low, self.high) if self.log else []
        return found if len(found) > 2 else _linear_ticks(self.low, self.high)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value


def axis(values: Iterable[float], start: float, end: float, *, zero: bool = False, log: bool = False
         ) -> Axis:  # fmt: skip
    """An axis that holds all values, with a margin; from 0 on where ``zero``."""
    found = list(values)
    low, high = min(found), max(found)
    if log:
        margin = (high / low) ** 0.08 if high > low else 2.0
        return Axis(low / margin, high * margin, start, end, log=True)
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(0.0 if zero and low >= 0 else low - margin, high + margin, start, end)


def _tight(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis from the least value to the largest."""
    low, high = min(values), max(values)
    return Axis(low, high if high > low else low + 1, start, end)


def scatter(
    points: Sequence[Point], title: str, x_title: str, y_title: str, ident: str, log_from: float = 4
) -> Chart | None:
    """Labelled points; the y axis is logarithmic where its values span a factor of ``log_from``."""
    shown = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not shown:
        return None
    log = (
        min(p.y for p in shown) > 0
        and max(p.y for p in shown) / min(p.y for p in shown) >= log_from
    )
    x = axis((p.x for p in shown), _LEFT, WIDTH - 12, zero=True)
    ends = [p.y + sign * e for p in shown for sign in (-1, 1) for e in (0.0, _error(p))]
    y = axis((e for e in ends if not log or e > 0), HEIGHT - _BOTTOM, _TOP, log=log)
    said = "; ".join(f"{p.label}: {number(p.y)} at {number(p.x)}" for p in shown)
    svg = _canvas(title, f"{y_title} against {x_title}. {said}.", ident)
    _frame(svg, x, y, x_title)
    taken = [Box(x.at(p.x) - 5, y.at(p.y) - 5, 10, 10) for p in shown]
    for place, point in enumerate(shown):
        _mark(svg, point, x, y, place)
        box = free_place(x.at(point.x), y.at(point.y), _short(point.label), taken)
        if box:
            taken.append(box)
            left_of = box.x + box.width < x.at(point.x)
            at = box.x + box.width if left_of else box.x
            _text(svg, at, box.y + 11, _short(point.label), "label end" if left_of else "label")
    return Chart(_markup(svg), len(points) - len(shown), log)


def lines(
    series: Sequence[Series], title: str, x_title: str, ident: str, log_from: float = 30
) -> Chart | None:
    """Curves over a shared x, each named at its end."""
    finite = [_finite(curve) for curve in series]
    values = [y for curve in finite for y in curve.ys]
    if not values:
        return None
    positive = [y for y in values if y > 0]
    log = bool(positive) and max(positive) / min(positive) >= log_from and min(values) >= 0
    drawn = [_positive(curve) if log else curve for curve in finite]
    drawn = [curve for curve in drawn if curve.xs]
    left_out = sum(len(s.ys) for s in series) - sum(len(s.ys) for s in drawn)
    several = len(drawn) > 1
    room = max(len(_short(s.label)) for s in drawn) * _LETTER + 14 if several else 12
    x = _tight([v for s in drawn for v in s.xs], _LEFT, WIDTH - room)
    y = axis((v for s in drawn for v in s.ys), HEIGHT - _BOTTOM, _TOP, log=log)
    said = "; ".join(
        f"{s.label}: {number(s.ys[0])} at first, {number(s.ys[-1])} at last" for s in drawn
    )
    svg = _canvas(title, f"{title} over {x_title}. {said}.", ident)
    _frame(svg, x, y, x_title)
    for place, curve in enumerate(drawn):
        _curve(svg, curve, x, y, place)
    heights = spread([y.at(s.ys[-1]) + 4 for s in drawn], _LINE - 2, _TOP + 6, HEIGHT - _BOTTOM)
    for place, (curve, height) in enumerate(zip(drawn, heights, strict=True)):
        if several:
            style = f"lead s{place % _COLOURS}"
            _add(svg, "line", style, x1=x.at(curve.xs[-1]), y1=y.at(curve.ys[-1]),
                 x2=WIDTH - room + 9, y2=height - 4)  # fmt: skip
            _text(svg, WIDTH - room + 12, height, _short(curve.label), "label")
    return Chart(_markup(svg), left_out, log)


def strip(
    values: Sequence[float | None],
    names: Sequence[str],
    title: str,
    ident: str,
    groups: Sequence[str],
) -> Chart | None:
    """One dot per layer, in order; ``groups`` names the block of each, which a line begins."""
    shown = {i: v for i, v in enumerate(values) if v is not None and math.isfinite(v)}
    if not shown:
        return None
    x = Axis(0, len(values), _LEFT, WIDTH - 12)
    y = axis(shown.values(), HEIGHT - _BOTTOM, _TOP)
    most, least = max(shown, key=lambda i: shown[i]), min(shown, key=lambda i: shown[i])
    said = " to ".join(f"{number(shown[i])} in {names[i]}" for i in (least, most))
    svg = _canvas(title, f"{title}, of {len(values)} layers in their order: {said}.", ident)
    _frame(svg, x, y, "decoder block", x_ticks=False)
    _starts(svg, groups, x)
    radius = min(3.2, max(1.2, 0.45 * (x.end - x.start) / len(values)))
    for place, value in shown.items():
        dot = _add(svg, "circle", "dot s0", cx=x.at(place + 0.5), cy=y.at(value), r=radius)
        ET.SubElement(dot, "title").text = printable(f"{names[place]}: {number(value)}")
    return Chart(_markup(svg), len(values) - len(shown))


# -- labels that do not collide --------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A rectangle, its corner at the top left."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: "Box") -> bool:
        """Whether the two have a point in common."""
        apart_x = self.x >= other.x + other.width or other.x >= self.x + self.width
        apart_y = self.y >= other.y + other.height or other.y >= self.y + self.height
        return not (apart_x or apart_y)


def free_place(x: float, y: float, text: str, taken: Sequence[Box]) -> Box | None:
    """Where a label of the point ``x, y`` meets nothing; None where there is no such place near."""
    width = len(text) * _LETTER
    sides: list[Callable[[], float]] = [
        lambda: x + 8, lambda: x - 8 - width, lambda: x - width / 2
    ]  # fmt: skip
    for lines_off in (0, -1, 1, -2, 2):
        for side in sides:
            if lines_off == 0 and side is sides[2]:
                continue  # on the point itself
            left = min(max(side(), _LEFT + 2), WIDTH - width - 2) if lines_off else side()
            box = Box(left, y - 7 + lines_off * _LINE, width, _LINE)
            inside = box.x >= _LEFT and box.x + width <= WIDTH
            inside = inside and box.y >= 0 and box.y + _LINE <= HEIGHT - _BOTTOM
            if inside and not any(box.meets(other) for other in taken):
                return box
    return None


def spread(heights: Sequence[float], apart: float, top: float, bottom: float) -> list[float]:
    """The heights moved as little as it takes to be ``apart``, in the same order."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [0.0] * len(heights)
    last = top - apart
    for i in order:
        placed[i] = last = max(heights[i], last + apart)
    limit = max(bottom, top + apart * (len(heights) - 1))
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - apart
    return placed


# -- drawing ---------------------------------------------------------------------------------------


def _canvas(title: str, description: str, ident: str) -> ET.Element:
    svg = ET.Element(
        "svg",
        {
            "viewBox": f"0 0 {WIDTH} {HEIGHT}",
            "role": "img",
            "aria-labelledby": f"{ident}-t {ident}-d",
        },
    )
    ET.SubElement(svg, "title", id=f"{ident}-t").text = printable(title)
    ET.SubElement(svg, "desc", id=f"{ident}-d").text = printable(description)
    return svg


def _frame(svg: ET.Element, x: Axis, y: Axis, x_title: str, *, x_ticks: bool = True) -> None:
    """Grid lines, the numbers of both axes, and the title of the x axis."""
    for tick, text in zip(y.ticks(), _tick_texts(y.ticks()), strict=True):
        _add(svg, "line", "grid", x1=x.start, x2=x.end, y1=y.at(tick), y2=y.at(tick))
        _text(svg, x.start - 6, y.at(tick) + 4, text, "tick end")
    _add(svg, "line", "axis", x1=x.start, x2=x.end, y1=y.start, y2=y.start)
    ticks = x.ticks() if x_ticks else []
    for tick, text in zip(ticks, _tick_texts(ticks), strict=True):
        _add(svg, "line", "axis", x1=x.at(tick), x2=x.at(tick), y1=y.start, y2=y.start + 4)
        _text(svg, x.at(tick), y.start + 17, text, "tick middle")
    _text(svg, (x.start + x.end) / 2, HEIGHT - 6, x_title, "name middle")


def _mark(svg: ET.Element, point: Point, x: Axis, y: Axis, place: int) -> None:
    colour = f"s{place % _COLOURS}"
    if error := _error(point):
        low = max(point.y - error, y.low)
        _add(svg, "line", f"whisker {colour}", x1=x.at(point.x), x2=x.at(point.x),
             y1=y.at(low), y2=y.at(point.y + error))  # fmt: skip
    dot = _add(svg, "circle", colour, cx=x.at(point.x), cy=y.at(point.y), r=4.5)
    said = f"{point.label}: {number(point.y)} at {number(point.x)}"
    ET.SubElement(dot, "title").text = printable(said)


def _curve(svg: ET.Element, curve: Series, x: Axis, y: Axis, place: int) -> None:
    places = [f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in zip(curve.xs, curve.ys, strict=True)]
    line = ET.SubElement(svg, "path", {"class": f"line s{place % _COLOURS}"})
    line.set("d", "M" + "L".join(places if len(places) > 1 else places * 2))
    ET.SubElement(line, "title").text = printable(curve.label)


def _starts(svg: ET.Element, groups: Sequence[str], x: Axis) -> None:
    """A line where each block begins, and the names of so many that they do not collide."""
    starts = [i for i, g in enumerate(groups) if i == 0 or g != groups[i - 1]]
    free = -math.inf
    for i in starts:
        _add(svg, "line", "grid", x1=x.at(i), x2=x.at(i), y1=_TOP, y2=HEIGHT - _BOTTOM + 4)
        following = min((j for j in starts if j > i), default=len(groups))
        middle = (x.at(i) + x.at(following)) / 2
        half = len(groups[i]) * _LETTER / 2 + 3
        if middle - half >= free:
            _text(svg, middle, HEIGHT - _BOTTOM + 17, groups[i], "tick middle")
            free = middle + half


def _add(svg: ET.Element, tag: str, style: str, **places: float) -> ET.Element:
    numbers = {name: f"{value:.1f}" for name, value in places.items()}
    return ET.SubElement(svg, tag, {"class": style, **numbers})


def _text(svg: ET.Element, x: float, y: float, text: str, style: str) -> None:
    _add(svg, "text", style, x=x, y=y).text = printable(text)


def _markup(svg: ET.Element) -> str:
    return ET.tostring(svg, encoding="unicode", short_empty_elements=False)


# -- numbers ---------------------------------------------------------------------------------------


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(n for n in (1, 2, 2.5, 5, 10) if n * power >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(found) > 2:
            return found[:: math.ceil(len(found) / 6)]
    return []


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    return [_tick_text(tick) for tick in ticks]


def _tick_text(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return number(value).replace("-", "−", 1)
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _short(label: str) -> str:
    """A label with its middle left out where it is long."""
    half = _LONGEST // 2 - 1
    return label if len(label) <= _LONGEST else f"{label[:half]}…{label[-half:]}"


def _error(point: Point) -> float:
    error = point.error
    return error if error is not None and math.isfinite(error) else 0.0


def _finite(curve: Series) -> Series:
    both = zip(curve.xs, curve.ys, strict=True)
    kept = [(x, y) for x, y in both if math.isfinite(x) and math.isfinite(y)]
    return Series(curve.label, [x for x, _ in kept], [y for _, y in kept])


def _positive(curve: Series) -> Series:
    kept = [(x, y) for x, y in zip(curve.xs, curve.ys, strict=True) if y > 0]
    return Series(curve.label, [x for x, _ in kept], [y for _, y in kept])
