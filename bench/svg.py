"""Line plots as SVG, made by hand: points with their spread, and a line fitted to them."""
import dataclasses
import html
import math

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 360, 70, 20, 40, 50
COLOURS = ("#1f5fa8", "#b5482a", "#3a7d44", "#7a4fa3", "#8a6d1d")


@dataclasses.dataclass
class Series:
    name: str
    x: list[float]
    y: list[float]
    low: list[float]   # of the spread
    high: list[float]
    line: tuple[float, float] | None = None  # intercept and slope


def fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares: intercept, slope, R^2 (1 when y does not vary at all)."""
    n, mx, my = len(x), sum(x) / len(x), sum(y) / len(y)
    sxx = sum((a - mx) ** 2 for a in x)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y)) / sxx if sxx > 0 and n > 1 else 0.0
    intercept = my - slope * mx
    rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y))
    total = sum((b - my) ** 2 for b in y)
    return intercept, slope, 1 - rest / total if total > 0 else 1.0


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to at least `most`, five or so."""
    if most <= 0:
        return [0.0, 1.0]
    step = 10 ** math.floor(math.log10(most / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if most / (step * m) <= 6)
    return [i * step for i in range(math.ceil(most / step) + 1)]


def text(x: float, y: float, what: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{html.escape(what)}</text>'


def plot(title: str, x_label: str, y_label: str, series: list[Series]) -> str:
    tx = ticks(max(max(s.x) for s in series))
    ty = ticks(max(max(s.high) for s in series))

    def px(v: float) -> float:
        return LEFT + v / tx[-1] * (WIDTH - LEFT - RIGHT)

    def py(v: float) -> float:
        return HEIGHT - BOTTOM - v / ty[-1] * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           'font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           text(WIDTH / 2, 20, title, more='font-size="14"'),
           text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label),
           text(16, (TOP + HEIGHT - BOTTOM) / 2, y_label,
                more=f'transform="rotate(-90 16 {(TOP + HEIGHT - BOTTOM) / 2:.0f})"')]
    for v in ty:
        out.append(f'<path d="M{LEFT} {py(v):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(text(LEFT - 6, py(v) + 4, f"{v:g}", "end"))
    for v in tx:
        out.append(f'<path d="M{px(v):.1f} {HEIGHT - BOTTOM}v5" stroke="#888"/>')
        out.append(text(px(v), HEIGHT - BOTTOM + 18, f"{v:g}"))
    for i, s in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        for x, y, low, high in zip(s.x, s.y, s.low, s.high):
            out.append(f'<path d="M{px(x):.1f} {py(low):.1f}V{py(high):.1f}" stroke="{colour}"/>')
            out.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5" fill="{colour}"/>')
        if s.line:
            a, b = s.line
            ends = [(x, min(max(a + b * x, 0), ty[-1])) for x in (min(s.x), max(s.x))]
            out.append(f'<path d="M{px(ends[0][0]):.1f} {py(ends[0][1]):.1f}L{px(ends[1][0]):.1f} '
                       f'{py(ends[1][1]):.1f}" stroke="{colour}" stroke-dasharray="5 3"/>')
        out.append(text(LEFT + 12, TOP + 14 + 16 * i, s.name, "start", f'fill="{colour}"'))
    return "\n".join(out) + "\n</svg>\n"
