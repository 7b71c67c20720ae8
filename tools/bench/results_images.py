"""The part of docs/results.md that is about images, from rows that tools/results measured.  Nothing here measures or reads files."""

import collections
import statistics

import plot
from report import table

BUSY = 0.05  # as results_page has it
MARK = "°"

LAYER = 5  # of twelve: behind it tokens leave in the table of scores and modes, half way
RATIOS = ["0.3", "0.5", "0.7"]
PAPER = "0.2,0,0,0.2,0,0,0.2"
FIDELITY = ["fidelity-224", "fidelity-518"]

# How many points of accuracy may go, and how many times as many images a second that should bring.
Goal = collections.namedtuple("Goal", "loss speed")
GOALS = [Goal(1, 1.25), Goal(3, 1.5)]

SERIES = [("prune", "prune"), ("merge", "merge"), ("restore", "restore"), ("fold", "fold"), ("random, any mode", None), ("chosen on other images", None)]
RANDOM, CHOSEN = 4, 5

# The reference's own numbers (PyTorch, f32, 300 images of the same set, what is left pooled), its schedule `0.2,0,0,0.2,0,0,0.2`.
REFERENCE = {"mlp": 75.7, "-mlp": 72.7, "attention": 71.0, "-attention": 78.3, "block": 71.3, "-block": 75.7, "attn-colsum": 77.7, "norm": 77.0,
             "-norm": 69.7, "random": 79.0}
REFERENCE_FULL = 86.3


def at_layer(ratio):
    return ",".join(["0"] * LAYER + [ratio])


def parts(drop):
    return dict(word.split("=", 1) for word in drop.split())


def lost(row):
    return row["dropped"]["quality"] - row["full"]["quality"]


def speed(row):
    """Images a second over those without dropping, of the same call, which took turns."""
    return statistics.median(row["full"]["seconds"]) / statistics.median(row["dropped"]["seconds"])


def mark(row):
    return MARK if row["others"] is not None and row["others"] > BUSY else ""


def points(value):
    return ("%+.1f" % value).replace("-", "−")


def short(drop):
    """A schedule for people: where scores differ, those of the layers that drop."""
    p = parts(drop)
    scores = p["score"].split(",")
    if len(scores) > 1:
        scores = [s for s, ratio in zip(scores, p["ratios"].split(",")) if float(ratio) > 0]
    return "`%s` `%s` %s" % (p["ratios"], scores[0] if len(set(scores)) == 1 else ",".join(scores), p["mode"])


class Rows:
    def __init__(self, rows):
        self.found = collections.defaultdict(list)
        for r in rows:
            p = parts(r["drop"])
            self.found[r["task"], p["ratios"], p["score"], p["mode"]].append(r)

    def mean(self, *which):
        rows = self.found.get(which)
        return statistics.fmean(lost(r) for r in rows) if rows else None


# ---------------------------------------------------------------------------------------------------- tables

def goal_rows(final):
    out = []
    for goal in GOALS:
        good = [r for r in final if r["type"] == "q8" and lost(r) >= -goal.loss]
        wanted = "images (CIFAR-10): ≥ %g times as many a second at ≤ %g point%s lost" % (goal.speed, goal.loss, "" if goal.loss == 1 else "s")
        if not good:
            out.append([wanted, "no schedule that was tried stays within that", "", "✗"])
            continue
        best = max(good, key=speed)
        out.append([wanted, "**%.2f times**%s at %s points" % (speed(best), mark(best), points(lost(best))), short(best["drop"]),
                    "✓" if speed(best) >= goal.speed else "✗"])
    return out


def score_tables(rows):
    """A table a ratio: scores by modes; the best of a column is bold."""
    by, out = Rows(rows), []
    for ratio in RATIOS:
        ratios = at_layer(ratio)
        scores = list(dict.fromkeys(s for t, r, s, _ in by.found if (t, r) == ("images", ratios)))
        modes = [m for m, _ in SERIES[:4] if any(("images", ratios, s, m) in by.found for s in scores)]
        if not scores:
            continue
        best = {m: max(by.mean("images", ratios, s, m) for s in scores if ("images", ratios, s, m) in by.found) for m in modes}
        body = []
        for s in scores:
            cells = []
            for m in modes:
                value = by.mean("images", ratios, s, m)
                text = "–" if value is None else points(value)
                cells.append("**%s**" % text if value is not None and value == best[m] else text)
            body.append(["`%s`" % s] + cells)
        left = next(r["dropped"]["share_left"] for key, found in by.found.items() if key[:2] == ("images", ratios) for r in found)
        out += ["`%s`: %s %% behind layer %d, %.0f %% fewer token-layers (`fold`: a little less):\n" % (ratios, round(100 * float(ratio)), LAYER, 100 * (1 - left)),
                table(["score"] + modes, body)]
    return out


def paper_table(rows):
    by = Rows(rows)
    scores = list(dict.fromkeys(s for t, r, s, m in by.found if (t, r, m) == ("images", PAPER, "prune")))
    if not scores:
        return None
    body = []
    for s in sorted(scores, key=lambda s: -by.mean("images", PAPER, s, "prune")):
        reference = REFERENCE.get(s)
        merge = by.mean("images", PAPER, s, "merge")
        body.append(["`%s`" % s, points(by.mean("images", PAPER, s, "prune")), "–" if merge is None else points(merge),
                     "–" if reference is None else points(reference - REFERENCE_FULL)])
    return table(["score", "prune", "merge", "reference, prune"], body)


def against_chance(rows):
    by = Rows(rows)
    rule, chance = (by.mean("images", PAPER, s, "prune") for s in ("mlp", "random"))
    if rule is None or chance is None:
        return ""
    return " On this model, with its 64 patches, the rule changes accuracy by %s points; leaving out patches by lot, by %s." % (points(rule), points(chance))


def final_table(final):
    body = []
    for r in final:
        arenas = [r[k]["arena_bytes"] / 2**20 for k in ("full", "dropped")]
        body.append([r["type"], short(r["drop"]), "%.1f" % r["full"]["quality"], "%.1f" % r["dropped"]["quality"], points(lost(r)),
                     "%.0f %%" % (100 * (1 - r["dropped"]["share_left"])), "%.1f%s" % (r["full"]["images_per_second"], mark(r)),
                     "%.1f%s" % (r["dropped"]["images_per_second"], mark(r)), "%.2f%s" % (speed(r), mark(r)), "%.1f" % arenas[0], "%.1f" % arenas[1]])
    return table(["weights", "schedule", "accuracy", "dropping", "points", "token-layers saved", "images/s", "dropping", "times as fast", "arena, MiB",
                  "dropping"], body, 2)


def fidelity_table(rows, limits):
    cells = collections.OrderedDict()
    tasks = [t for t in FIDELITY if any(r["task"] == t for r in rows)]
    for r in rows:
        if r["task"] in tasks:
            cells.setdefault(r["drop"], {}).setdefault(r["task"], []).append(r)
    body = []
    for drop, of in cells.items():
        line = [short(drop)]
        for t in tasks:
            if t not in of:
                line += ["–"] * 4
                continue
            r = of[t][0]
            m = r["dropped"]["metrics"]
            line += ["%.4f" % m["cosine"], "–" if m.get("patches") is None else "%.4f" % m["patches"], "%.0f %%" % (100 * (1 - r["dropped"]["share_left"])),
                     "%.2f%s" % (speed(r), mark(r))]
        body.append(line)
    head = ["schedule"]
    for t in tasks:
        head += ["%s: class" % t.split("-")[1], "patches", "token-layers saved", "times as fast"]
    counts = ", ".join("%s photographs at %s pixels" % (next(r["full"]["images"] for r in rows if r["task"] == t), t.split("-")[1]) for t in tasks)
    return counts, table(head, body)


# ---------------------------------------------------------------------------------------------------- the section

ABOUT = """cifar10-dinov2-s, a DINOv2-S with a head on the class token and the mean of the patches, classifies 1,000 test images of CIFAR-10 at 112
pixels: 64 patches and the class token, which never leaves; %s. Images are decoded and resized outside of the clock. What is compared is accuracy in points; one
point is ten images, and chance alone (which of them change sides) moves it by about one.
"""

PAPER_TEXT = """Representation Shift (arXiv 2508.00367) keeps what the MLP changes most and drops 20 %% behind layers 0, 3 and 6 of twelve. It reports accuracy on ImageNet
with DeiT and speed on GPUs; **its tables have no counterpart here**: other models, images of 224 pixels with three times the tokens, other weights, and CPUs. What is the
same is the rule and the schedule.%s The column "reference" is plain PyTorch (f32) on 300 of these images:
"""


def markdown(images, limits, plots):
    rows, final = images["rows"], images["final"]
    out = []
    mine = [r for r in rows if r["task"] == "images"]
    if mine:
        q8 = next(r for r in mine if r["type"] == "q8")
        limit = "; only `%s`" % " ".join(limits["images"]) if limits.get("images") else ""
        out += ["## Images\n", ABOUT % ("without dropping %.1f (q8)%s" % (q8["full"]["quality"], limit))]
        if final:
            out += ["These schedules were chosen on 1,000 other images (of the training set) and judged by these once. Median of %d rounds, without and with dropping "
                    "in turns:\n" % max(r["rounds"] for r in final), final_table(final)]
        if "images" in plots:
            out += ["![accuracy against speed](%s)\n" % plots["images"], "A point is a schedule: one ratio behind layer %d, by score and mode; one that falls "
                    "below the plot stands at its lower edge as an arrow.\n" % LAYER]
        tables = score_tables(mine)
        if tables:
            out += ["### Scores and modes\n", "Points of accuracy lost, q8. The best of a column is bold; `random`: mean of its seeds.\n"] + tables
        text = paper_table(mine)
        if text:
            out += ["### The paper's schedule\n", PAPER_TEXT % against_chance(mine), text]
    fidelity = [r for r in rows if r["task"] in FIDELITY]
    if fidelity:
        counts, text = fidelity_table(fidelity, limits)
        out += ["### Features of photographs\n", "dinov2-small, q8: mean cosine of the class feature, and of the features of patches, with those without dropping; %s. Patches are "
                "compared where all of them come back (`restore`).\n" % counts, text]
    return out


def plots(images, where, trial):
    """{name: SVG}."""
    mine = [r for r in images["rows"] + images["final"] if r["task"] == "images" and r["type"] == "q8"]
    if not mine:
        return {}
    before, series = mine[0]["full"]["quality"], {}
    final = {id(r) for r in images["final"]}
    numbers = {mode: number for number, (_, mode) in enumerate(SERIES) if mode}
    for r in mine:
        p = parts(r["drop"])
        number = CHOSEN if id(r) in final else RANDOM if p["score"] == "random" else numbers[p["mode"]]
        series.setdefault(number, []).append((speed(r), r["dropped"]["quality"], "%s: %.1f, %.2f times as fast" % (r["drop"], r["dropped"]["quality"], speed(r))))
    xs = [x for found in series.values() for x, _, _ in found]
    front = plot.pareto([(x, y) for n, found in series.items() if n != RANDOM for x, y, _ in found])
    lines = [("y", before, "without dropping")] + [("y", before - g.loss, "%g point%s lost" % (g.loss, "" if g.loss == 1 else "s")) for g in GOALS]
    lines += [("x", g.speed, "goal at %g" % g.loss) for g in GOALS]
    panel = {"title": "CIFAR-10 at 112 pixels", "x": "images a second, times those without dropping", "y": "accuracy", "series": series, "lines": lines,
             "x range": (min(0.95, *xs), max(*xs, 1.6) + 0.05), "y range": (before - 16, before + 2), "curves": [front]}
    return {"images": plot.scatter("Accuracy against images a second by token dropping%s" % trial, where, [s[0] for s in SERIES], [panel], size=(620, 400))}

