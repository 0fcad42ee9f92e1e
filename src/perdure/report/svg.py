"""Plots as inline SVG text: small, deterministic, no plotting library. Every function returns one `<svg>` element.

Charts scale with the page (a 440-unit wide view box, legible down to a phone); heat maps keep their size and scroll.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Okabe and Ito's palette for colour-blind readers, its light tones darkened to be seen on white.
COLOURS = ("#0b6e99", "#c8500a", "#00805d", "#a8487f", "#7a6200", "#5b4b9a", "#3a87c9", "#4a4a4a")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
INK, MUTED, GRID, BAD = "#16202a", "#53616e", "#e3e8ec", "#b3402a"
WIDTH = 440
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Pale to deep: deep is always the better end.
_RAMP = ((242, 247, 247), (199, 227, 224), (126, 190, 186), (45, 138, 137), (8, 84, 92))


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        points: (x, y) by rising x.
        band: (x, low, high), drawn pale behind the line.
        style: index into the palette; None for a thin grey line without marks.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    style: int | None = 0
    marks: bool = True
    width: float = 2.2


@dataclass(frozen=True)
class Point:
    """One labelled point of a plane; `open` draws a hollow mark (upper bounds and controls)."""

    name: str
    x: float
    y: float
    style: int = 0
    open: bool = False
    xs: tuple[float, float] | None = None
    ys: tuple[float, float] | None = None


@dataclass
class Axis:
    """A range with its ticks; `log` needs positive values."""

    low: float
    high: float
    label: str
    show: Callable[[float], str]
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.log:
            self.ticks = self.ticks or _log_ticks(self.low, self.high)
            self.low, self.high = self.ticks[0], self.ticks[-1]
        else:
            self.ticks = self.ticks or nice_ticks(self.low, self.high)
            self.low, self.high = min(self.low, self.ticks[0]), max(self.high, self.ticks[-1])

    def place(self, value: float) -> float:
        """Position of a value in [0, 1]."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def clean(value: object) -> str:
    """Text without what no page may hold or what turns its neighbours round: controls, surrogates, bidi overrides."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI else c for c in str(value))


def shorten(text: str, limit: int) -> str:
    text = clean(text)
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round tick values that cover [low, high]."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Ticks at 1, 2, 5 per decade over a short range, else at powers of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if len(decades) <= 3:
        fine = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        first = max((i for i, t in enumerate(fine) if t <= low), default=0)
        last = next((i for i, t in enumerate(fine) if t >= high and i > first), len(fine) - 1)
        return fine[first : last + 1]
    step = 1 + len(decades) // 7
    last = decades[0] + step * math.ceil((decades[-1] - decades[0]) / step)
    return [10.0**d for d in range(decades[0], last + 1, step)]


def colour(share: float) -> str:
    """The ramp's colour at a share in [0, 1]."""
    at = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    i = min(int(at), len(_RAMP) - 2)
    mixed = (round(a + (b - a) * (at - i)) for a, b in zip(_RAMP[i], _RAMP[i + 1], strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)


def _n(value: float) -> str:
    text = f"{value:.1f}"
    return text.removesuffix(".0")


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "", fill: str = MUTED) -> str:
    return (
        f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}" fill="{fill}"{extra}>{html.escape(clean(text))}</text>'
    )


def _title(text: str) -> str:
    return f"<title>{html.escape(clean(text))}</title>"


def _svg(width: float, height: float, parts: Sequence[str], title: str, fixed: bool = False) -> str:
    size = f' width="{_n(width)}" height="{_n(height)}"' if fixed else ""
    kind = "fixed" if fixed else "chart"
    return (
        f'<svg class="{kind}" viewBox="0 0 {_n(width)} {_n(height)}"{size} role="img" '
        f'aria-label="{html.escape(clean(title))}" font-size="12">' + "".join(parts) + "</svg>"
    )


# ---- frame of a chart
@dataclass(frozen=True)
class _Frame:
    x: Axis
    y: Axis
    height: float = 290
    left: float = 52
    right: float = 24
    top: float = 14
    bottom: float = 44

    def px(self, value: float) -> float:
        return self.left + self.x.place(value) * (WIDTH - self.left - self.right)

    def py(self, value: float) -> float:
        return self.height - self.bottom - self.y.place(value) * (self.height - self.top - self.bottom)

    def draw(self) -> list[str]:
        parts = []
        base, end = self.height - self.bottom, WIDTH - self.right
        for tick in self.y.ticks:
            y = self.py(tick)
            parts.append(f'<path d="M{_n(self.left)} {_n(y)}H{_n(end)}" stroke="{GRID}"/>')
            parts.append(_text(self.left - 7, y + 4, self.y.show(tick), "end"))
        for tick in self.x.ticks:
            x = self.px(tick)
            parts.append(f'<path d="M{_n(x)} {_n(base)}v4" stroke="{MUTED}"/>')
            parts.append(_text(x, base + 17, self.x.show(tick), "middle"))
        parts.append(f'<path d="M{_n(self.left)} {_n(base)}H{_n(end)}" stroke="{MUTED}"/>')
        parts.append(_text((self.left + end) / 2, self.height - 6, self.x.label, "middle", fill=INK))
        middle = (self.top + base) / 2
        turn = f' transform="rotate(-90 12 {_n(middle)})"'
        parts.append(_text(12, middle, self.y.label, "middle", turn, INK))
        return parts


def integer_ticks(low: int, high: int, at_most: int = 12) -> list[float]:
    """Whole-number ticks, the last one always shown."""
    least = (high - low + 1) / at_most
    step = next(m * 10**p for p in range(9) for m in (1, 2, 5) if m * 10**p >= least)
    ticks = list(dict.fromkeys([low, *range(step * (low // step + 1), high + 1, step)]))
    if ticks[-1] != high:
        if high - ticks[-1] < step / 2 and len(ticks) > 1:
            ticks.pop()
        ticks.append(high)
    return [float(t) for t in ticks]


def mark(style: int, x: float, y: float, hollow: bool = False, r: float = 4.2) -> str:
    """A mark whose shape, not only its colour, tells the series."""
    tone = COLOURS[style % len(COLOURS)]
    paint = f'fill="{"#fff" if hollow else tone}" stroke="{tone if hollow else "#fff"}" stroke-width="1.4"'
    shape = style % 4
    if shape == 0:
        return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}" {paint}/>'
    if shape == 1:
        return f'<rect x="{_n(x - r)}" y="{_n(y - r)}" width="{_n(2 * r)}" height="{_n(2 * r)}" {paint}/>'
    if shape == 2:
        d = f"M{_n(x)} {_n(y - r * 1.3)}L{_n(x + r * 1.2)} {_n(y + r)}H{_n(x - r * 1.2)}Z"
    else:
        d = f"M{_n(x)} {_n(y - r * 1.4)}L{_n(x + r * 1.4)} {_n(y)}L{_n(x)} {_n(y + r * 1.4)}L{_n(x - r * 1.4)} {_n(y)}Z"
    return f'<path d="{d}" {paint}/>'


def dash(style: int) -> str:
    pattern = DASHES[style // 4 % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def swatch(style: int, hollow: bool = False) -> str:
    """The legend's sample of a series."""
    tone = COLOURS[style % len(COLOURS)]
    line = f'<path d="M1 7H27" stroke="{tone}" stroke-width="2.2"{dash(style)}/>'
    return f'<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true">{line}{mark(style, 14, 7, hollow)}</svg>'


def lines(series: Sequence[Series], x: Axis, y: Axis, title: str, rules: Sequence[tuple[float, str]] = ()) -> str:
    """A line chart; `rules` are (x, hint) of vertical hairlines."""
    frame = _Frame(x, y)
    parts = frame.draw()
    for at, hint in rules:
        d = f"M{_n(frame.px(at))} {_n(frame.top)}V{_n(frame.height - frame.bottom)}"
        parts.append(f'<path d="{d}" stroke="#b9c3cb" stroke-dasharray="2 3">{_title(hint)}</path>')
    for one in series:
        if len(one.band) > 1:
            tone = COLOURS[(one.style or 0) % len(COLOURS)]
            upper = [f"{_n(frame.px(a))} {_n(frame.py(h))}" for a, _, h in one.band]
            lower = [f"{_n(frame.px(a))} {_n(frame.py(low))}" for a, low, _ in reversed(one.band)]
            parts.append(f'<path d="M{"L".join(upper + lower)}Z" fill="{tone}" fill-opacity="0.13"/>')
    for one in series:
        parts.append(_line(one, frame))
    return _svg(WIDTH, frame.height, parts, title)


def _line(one: Series, frame: _Frame) -> str:
    at = [(frame.px(a), frame.py(b)) for a, b in one.points]
    tone = "#9aa7b2" if one.style is None else COLOURS[one.style % len(COLOURS)]
    pattern = "" if one.style is None else dash(one.style)
    path = "L".join(f"{_n(a)} {_n(b)}" for a, b in at)
    parts = [_title(one.name)]
    if len(at) > 1:
        width = one.width if one.style is not None else 1.1 if one.marks else 0.6
        parts.append(
            f'<path d="M{path}" fill="none" stroke="{tone}" stroke-width="{width}" stroke-linejoin="round"{pattern}/>'
        )
    if one.style is None and one.marks:
        parts += [f'<circle cx="{_n(a)}" cy="{_n(b)}" r="1.8" fill="{tone}"/>' for a, b in at]
    elif one.style is not None and one.marks:
        every = max(1, len(at) // 25)
        kept = [p for n, p in enumerate(at) if n % every == 0 or n == len(at) - 1]
        parts += [mark(one.style, a, b) for a, b in kept]
    return "<g>" + "".join(parts) + "</g>"


# ---- planes
def plane(points: Sequence[Point], x: Axis, y: Axis, title: str) -> str:
    """A scatter of labelled points with optional error bars; labels avoid each other."""
    frame = _Frame(x, y)
    parts = frame.draw()
    marks, boxes = [], []
    for p in points:
        a, b = frame.px(p.x), frame.py(p.y)
        tone = COLOURS[p.style % len(COLOURS)]
        for d in _error_bars(p, frame):
            parts.append(f'<path d="{d}" stroke="{tone}" stroke-width="1.4" stroke-opacity="0.6"/>')
        parts.append(f"<g>{_title(p.name)}{mark(p.style, a, b, p.open, 5.2)}</g>")
        marks.append((p, a, b))
        boxes.append((a - 6, b - 6, a + 6, b + 6))
    for p, a, b in sorted(marks, key=lambda m: (m[2], m[1])):
        parts += _label(p, a, b, boxes, frame)
    return _svg(WIDTH, frame.height, parts, title)


def _error_bars(p: Point, frame: _Frame) -> list[str]:
    bars = []
    if p.xs:
        bars.append(f"M{_n(frame.px(p.xs[0]))} {_n(frame.py(p.y))}H{_n(frame.px(p.xs[1]))}")
    if p.ys:
        bars.append(f"M{_n(frame.px(p.x))} {_n(frame.py(p.ys[0]))}V{_n(frame.py(p.ys[1]))}")
    return bars


def _label(p: Point, a: float, b: float, boxes: list[tuple[float, float, float, float]], frame: _Frame) -> list[str]:
    name = shorten(p.name, 30)
    wide = 7.0 * len(name)
    places = [(10, 4, "start"), (-10, 4, "end")]
    places += [(10, dy, "start") for dy in (-10, 18, -24, 32, -38, 46, -52, 60)]
    places += [(-10, dy, "end") for dy in (-10, 18, -24, 32, -38, 46, -52, 60)]
    places += [(0, -11, "middle"), (0, 20, "middle")]
    chosen = None
    for dx, dy, anchor in places:
        x = a + dx - (0 if anchor == "start" else wide if anchor == "end" else wide / 2)
        box = (x, b + dy - 10, x + wide, b + dy + 3)
        inside = box[0] >= frame.left and box[2] <= WIDTH - 2 and box[1] >= 2 and box[3] <= frame.height - frame.bottom
        free = not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in boxes)
        if inside and free:
            chosen = (dx, dy, anchor, box)
            break
    if chosen is None:
        # No room: the legend below the chart still tells the mark.
        return []
    dx, dy, anchor, box = chosen
    boxes.append(box)
    parts = []
    if dy != 4 and anchor != "middle":
        parts.append(f'<path d="M{_n(a)} {_n(b)}L{_n(a + dx)} {_n(b + dy - 4)}" stroke="#b9c3cb"/>')
    return [*parts, _text(a + dx, b + dy, name, anchor, fill=INK)]


# ---- bars
def bars(names: Sequence[str], values: Sequence[float | None], show: Callable[[float], str], title: str) -> str:
    """Bars from zero, one for each name; positive values (loss) in red, negative ones in green."""
    known = [v for v in values if v is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    if high == low:
        high = low + 1e-9
    if len(names) > 24:
        return _columns(names, values, show, title)
    row, left, right = 24, 132, 52
    room = WIDTH - left - right - (44 if low < 0 else 0)
    zero = left + (44 if low < 0 else 0) + room * (0 - low) / (high - low)
    parts = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        y = 6 + i * row
        parts.append(_text(left - 8, y + 15, shorten(name, 19), "end", fill=INK))
        if value is None:
            parts.append(_text(zero + 6, y + 15, "not measured"))
            continue
        wide = room * abs(value) / (high - low)
        tone, x = (BAD, zero) if value > 0 else ("#00805d", zero - wide)
        parts.append(
            f'<rect x="{_n(x)}" y="{y + 3}" width="{_n(max(wide, 1))}" height="{row - 7}" rx="2" fill="{tone}">'
            f"{_title(f'{name}: {show(value)}')}</rect>"
        )
        parts.append(
            _text(x + wide + 6 if value >= 0 else x - 6, y + 15, show(value), "start" if value >= 0 else "end")
        )
    height = 12 + row * len(names)
    parts.append(f'<path d="M{_n(zero)} 4V{_n(height - 4)}" stroke="{MUTED}"/>')
    return _svg(WIDTH, height, parts, title)


def _columns(names: Sequence[str], values: Sequence[float | None], show: Callable[[float], str], title: str) -> str:
    known = [v for v in values if v is not None]
    x = Axis(0.5, len(names) + 0.5, "experience", lambda v: f"{v:.0f}", ticks=integer_ticks(1, len(names)))
    frame = _Frame(x, Axis(min([0.0, *known]), max([0.0, *known]) or 1.0, "forgetting", show))
    parts = frame.draw()
    wide = (WIDTH - frame.left - frame.right) / len(names) * 0.7
    for i, (name, value) in enumerate(zip(names, values, strict=True), start=1):
        if value is None:
            continue
        a, b = sorted((frame.py(value), frame.py(0)))
        parts.append(
            f'<rect x="{_n(frame.px(i) - wide / 2)}" y="{_n(a)}" width="{_n(wide)}" height="{_n(max(b - a, 0.5))}" '
            f'fill="{BAD if value > 0 else "#00805d"}">{_title(f"{name}: {show(value)}")}</rect>'
        )
    return _svg(WIDTH, frame.height, parts, title)


# ---- heat maps
def heatmap(
    cells: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    show: Callable[[float], str],
    shade: Callable[[float], float],
    title: str,
    *,
    diagonal: bool = False,
    extra: Sequence[float | None] | None = None,
    numbers: bool | None = None,
    compact: bool = False,
) -> str:
    """A matrix of shaded cells; with numbers in them while they fit.

    Args:
        shade: value -> share of the ramp, 1 for the deep end.
        diagonal: outlines cell (i, i): the score just after learning.
        extra: a column set apart at the right, such as the row's average.
        numbers: overrides whether cells show their numbers (by default up to 20 columns).
        compact: narrow cells, for a map that stands beside another.
    """
    wide_n = len(columns)
    numbers = wide_n <= 20 if numbers is None else numbers
    cw, ch, size = (44, 28, 12) if wide_n <= 10 else (34, 24, 11) if wide_n <= 20 else (13, 13, 10)
    if numbers and wide_n > 20:
        cw, ch, size = 34, 24, 11
    if compact and numbers:
        cw, ch, size = 29, 24, 11
    chars = max((len(shorten(r, 22)) for r in rows), default=0)
    left = 14 + 6.6 * chars
    slanted = numbers and max((len(c) for c in columns), default=0) > 4
    top = 88.0 if slanted else 24.0
    parts = _heat_labels(rows, columns, left, top, cw, ch, slanted)
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            place = (left + j * cw, top + i * ch, cw, ch, size)
            hint = f"{rows[i]} / {columns[j]}"
            parts.append(_heat_cell(value, place, hint, show, shade, numbers, diagonal and i == j))
        if extra is not None:
            place = (left + wide_n * cw + 10, top + i * ch, 48, ch, size)
            parts.append(_heat_cell(extra[i], place, f"{rows[i]}: average", show, shade, True, False))
    right = left + wide_n * cw + (48 if slanted else 12)
    if extra is not None:
        parts.append(_text(left + wide_n * cw + 34, top - 8, "average", "middle", fill=INK))
        right = max(right, left + wide_n * cw + 66)
    return _svg(right, top + len(cells) * ch + 6, parts, title, fixed=True)


def _heat_labels(
    rows: Sequence[str], columns: Sequence[str], left: float, top: float, cw: float, ch: float, slanted: bool
) -> list[str]:
    parts = []
    for i, name in enumerate(rows):
        if ch >= 20 or i % 2 == 0:
            parts.append(_text(left - 8, top + (i + 0.5) * ch + 4, shorten(name, 22), "end", fill=INK))
    every = 1 if cw >= 20 else 5
    for j, name in enumerate(columns):
        x = left + (j + 0.5) * cw
        if slanted:
            turn = f' transform="rotate(-38 {_n(x)} {_n(top - 8)})"'
            parts.append(_text(x - 4, top - 8, shorten(name, 16), "start", turn, INK))
        elif j % every == 0:
            parts.append(_text(x, top - 8, shorten(name, 6), "middle", fill=INK))
    return parts


def _heat_cell(
    value: float | None,
    place: tuple[float, float, float, float, int],
    hint: str,
    show: Callable[[float], str],
    shade: Callable[[float], float],
    numbers: bool,
    outlined: bool,
) -> str:
    x, y, w, h, size = place
    box = f'x="{_n(x + 0.5)}" y="{_n(y + 0.5)}" width="{_n(w - 1)}" height="{_n(h - 1)}"'
    if value is None:
        return f'<rect {box} fill="none" stroke="{GRID}"/>'
    share = shade(value)
    edge = f' stroke="{INK}" stroke-width="1.6"' if outlined and numbers else ""
    cell = f'<rect {box} fill="{colour(share)}"{edge}>{_title(f"{hint}: {show(value)}")}</rect>'
    if not numbers:
        return cell
    fill = "#fff" if share > 0.6 else INK
    return cell + _text(x + w / 2, y + h / 2 + 4, show(value), "middle", f' font-size="{size}"', fill)
