"""Plots as SVG: what tools/bench-peers and tools/results draw with.  Nothing here measures or reads files."""

import math
from xml.sax.saxutils import escape

# One grey that reads on white and on GitHub's dark background: an image is not told which of them it lies on.
INK = "#6e7681"
# Of series, in this order; each has a marker of its own too, for those who do not tell colours apart.
SERIES = [("#1f6feb", "circle"), ("#d08700", "square"), ("#2da44e", "diamond"), ("#cf222e", "cross"), ("#a371f7", "triangle"),
          ("#8b949e", "plus"), ("#bf3989", "circle"), ("#1b7c83", "square")]
GOOD = "#2da44e"


def nice_step(top):
    """A step of 1, 2 or 5 times a power of ten that divides 0 … top into three to seven."""
    power = 10.0 ** math.floor(math.log10(top / 3))
    return next(power * k for k in (1, 2, 5, 10) if top / (power * k) <= 5)


def document(width, height, title, body):
    return "\n".join(['<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" '
                      'font-size="11" fill="%s" role="img">' % (width, height, width, height, INK),
                      "<title>%s</title>" % escape(title),
                      '<text x="10" y="22" font-size="14" font-weight="bold">%s</text>' % escape(title)] + body + ["</svg>"]) + "\n"


# ---------------------------------------------------------------------------------------------------- points

def pareto(points):
    """Of (x, y) pairs those that no other one beats in both, by ascending x; more is better."""
    front = []
    for x, y in sorted(set(points), key=lambda p: (-p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def marker(kind, x, y, colour, filled=True, size=4.0):
    look = 'fill="%s"' % colour if filled else 'fill="none" stroke="%s" stroke-width="1.5"' % colour
    if kind == "circle":
        return '<circle cx="%.1f" cy="%.1f" r="%.1f" %s' % (x, y, size, look)
    if kind == "square":
        return '<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" %s' % (x - 0.9 * size, y - 0.9 * size, 1.8 * size, 1.8 * size, look)
    if kind in ("diamond", "triangle"):
        corners = [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)] if kind == "diamond" else [(0, -1.3), (1.2, 1), (-1.2, 1)]
        return '<polygon points="%s" %s' % (" ".join("%.1f,%.1f" % (x + size * a, y + size * b) for a, b in corners), look)
    d = "M%.1f %.1fl%.1f %.1fM%.1f %.1fl%.1f %.1f" % (
        (x - size, y - size, 2 * size, 2 * size, x - size, y + size, 2 * size, -2 * size) if kind == "cross" else
        (x - 1.2 * size, y, 2.4 * size, 0, x, y - 1.2 * size, 0, 2.4 * size))
    return '<path d="%s" stroke="%s" stroke-width="2" fill="none"' % (d, colour)


def legend(names, y, width):
    """Names with their markers in lines of at most that width: ([elements], the height that they take)."""
    out, x, line = [], 10, 0
    for i, name in enumerate(names):
        colour, kind = SERIES[i % len(SERIES)]
        need = 30 + 6.5 * len(name)
        if x > 10 and x + need > width:
            x, line = 10, line + 1
        at = y + 18 * line
        out.append(marker(kind, x + 6, at - 4, colour) + "/>")
        out.append('<text x="%.1f" y="%.1f">%s</text>' % (x + 16, at, escape(name)))
        x += need
    return out, 18 * (line + 1)


def ticks(low, high):
    step = nice_step(high - low)
    first = math.ceil(low / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(k * step, "%.*f" % (digits, k * step + 0.0)) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def scatter_panel(panel, x0, y0, width, height):
    """panel: title, x and y (what the axes are), x range, y range, series {number: [(x, y, what it is)]}, lines [(axis, value,
    text)], curves [[(x, y)]].  Points below the range stand at its edge as an arrow."""
    left, top, right, bottom = x0 + 52, y0 + 26, x0 + width - 12, y0 + height - 40
    (x_low, x_high), (y_low, y_high) = panel["x range"], panel["y range"]
    at_x = lambda v: left + (right - left) * (v - x_low) / (x_high - x_low)  # noqa: E731
    at_y = lambda v: bottom - (bottom - top) * (v - y_low) / (y_high - y_low)  # noqa: E731
    out = ['<text x="%.1f" y="%.1f" font-size="13" font-weight="bold">%s</text>' % (left, y0 + 14, escape(panel["title"]))]
    for value, text in ticks(x_low, x_high):
        out.append('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-opacity="0.25"/>' % (at_x(value), top, at_x(value), bottom, INK))
        out.append('<text x="%.1f" y="%.1f" text-anchor="middle">%s</text>' % (at_x(value), bottom + 14, text))
    for value, text in ticks(y_low, y_high):
        out.append('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-opacity="0.25"/>' % (left, at_y(value), right, at_y(value), INK))
        out.append('<text x="%.1f" y="%.1f" text-anchor="end">%s</text>' % (left - 5, at_y(value) + 4, text))
    out.append('<text x="%.1f" y="%.1f" text-anchor="middle">%s</text>' % ((left + right) / 2, bottom + 30, escape(panel["x"])))
    out.append('<text x="%.1f" y="%.1f" text-anchor="middle" transform="rotate(-90 %.1f %.1f)">%s</text>'
               % (x0 + 12, (top + bottom) / 2, x0 + 12, (top + bottom) / 2, escape(panel["y"])))
    for number, (axis, value, text) in enumerate(panel["lines"]):
        inside = x_low <= value <= x_high if axis == "x" else y_low <= value <= y_high
        if not inside:
            continue
        ends = (at_x(value), top, at_x(value), bottom) if axis == "x" else (left, at_y(value), right, at_y(value))
        out.append('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-dasharray="5 4"/>' % (*ends, INK))
        room = axis == "x" and ends[0] + 6 * len(text) < right
        place = (right - 2, ends[1] - 4, "end") if axis == "y" else (
            (ends[0] + 4, bottom - 9 - 14 * (number % 3), "start") if room else (ends[0] - 4, bottom - 9 - 14 * (number % 3), "end"))
        out.append('<text x="%.1f" y="%.1f" text-anchor="%s" font-style="italic">%s</text>' % (*place, escape(text)))
    for curve in panel["curves"]:
        shown = [(at_x(x), at_y(y)) for x, y in curve if x_low <= x <= x_high and y_low <= y <= y_high]
        if len(shown) > 1:
            out.append('<polyline points="%s" fill="none" stroke="%s" stroke-width="1.5"/>' % (" ".join("%.1f,%.1f" % p for p in shown), INK))
    for number, points in panel["series"].items():
        colour, kind = SERIES[number % len(SERIES)]
        for x, y, what in points:
            px = min(max(at_x(x), left), right)
            if y < y_low:
                element = '<path d="M%.1f %.1fl-4 -7h8z" fill="%s"' % (px, bottom - 1, colour)
            else:
                element = marker(kind, px, at_y(min(y, y_high)), colour)
            out.append(element + "><title>%s</title></%s>" % (escape(what), element[1:].split(" ", 1)[0]))
    return out


def scatter(title, note, names, panels, columns=2, size=(400, 300)):
    """Panels of points that share a legend."""
    columns = min(columns, len(panels))
    width = max(columns * size[0] + 10, 620)
    out, used = legend(names, 62, width - 10)
    out.append('<text x="10" y="40">%s</text>' % escape(note))
    top = 62 + used
    for k, panel in enumerate(panels):
        out += scatter_panel(panel, (k % columns) * size[0], top + (k // columns) * size[1], *size)
    return document(width, top + -(-len(panels) // columns) * size[1] + 6, title, out)
