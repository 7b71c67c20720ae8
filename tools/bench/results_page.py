"""From rows that tools/results measured to docs/results.md and its plots.  Nothing here measures or reads files."""

import collections
import statistics

import plot
import results_images
from report import machine_rows, mib, table, whole

BUSY = 0.05  # others took more of the machine's CPU time than this: a time is marked
MARK = "°"   # of such a time

SCORE_SCHEDULES = ["0,0.3", "0,0.5"]  # the first is that of the reference's table of scores
MODE_SCHEDULES = ["0,0.45", "0,0.3,0,0.3"]  # two of the reference's table of modes
CURVE_SCORES = ["mlp", "-mlp", "norm-mlp-attention", "-mlp:out", "random"]
CURVE_BEST = "norm-mlp-attention"
# Series of the curves: what they are called; the score, the mode and the least length of their schedules.  The last has the rest.
SERIES = [("mlp, the paper's", "mlp", "prune", 0), ("-mlp", "-mlp", "prune", 0), (CURVE_BEST, CURVE_BEST, "prune", 0),
          ("-mlp:out", "-mlp:out", "prune", 0), (CURVE_BEST + ", merge", CURVE_BEST, "merge", 0), ("random", "random", "prune", 0),
          ("found by search", None, None, None), (CURVE_BEST + ", at least 16 tokens", CURVE_BEST, "prune", 16)]
REST = 6

# How much quality may go (per cent of nDCG@10, points of the others), and what that should save.
Goal = collections.namedtuple("Goal", "task loss saved what")
GOALS = [Goal("retrieval", 1, 30, "time"), Goal("retrieval", 3, 45, "time"), Goal("sst2", 0.5, 30, "token-layers"),
         Goal("stsb", 1, 25, "token-layers")]
ARENA_GOAL = 40
SPEED_GOAL = 0.9     # of the speed-up that the arithmetic predicts
OVERHEAD_GOAL = 2.0  # per cent of the time that scoring and moving tokens may take
LEAST, NOISE = 12, 0.02  # tokens below which no short sentence is cut; by how much two equal runs in turns may differ
DROP_OPS = {"shift", "centre_distance", "attn_colsum", "position_score", "standardize", "token_drop", "token_gather", "token_restore",
            "token_assign", "token_merge", "token_sizes"}

NAMES = {"retrieval": "retrieval (Cranfield)", "stsb": "STS-B", "sst2": "SST-2", "cosine": "cosine"}
UNITS = {"retrieval": "%", "stsb": "points", "sst2": "points", "cosine": ""}
ABOUT = {
    "retrieval": "nDCG@10 ×100 on Cranfield, all-MiniLM-L6-v2; documents lose tokens, queries do not; texts are cut at 256 tokens",
    "stsb": "Spearman's correlation ×100 on STS-B test, all-MiniLM-L6-v2; both sentences lose tokens",
    "sst2": "accuracy ×100 on SST-2 validation, sst2-minilm",
    "cosine": "mean cosine of abstracts of Cranfield with their vectors without dropping, all-MiniLM-L6-v2, same weights",
}
SHOWN = {"retrieval": "change of nDCG@10, %", "stsb": "change of Spearman, points", "sst2": "change of accuracy, points", "cosine": "cosine"}

# The project's reference in PyTorch (f32), its own subsets: 500 pairs of STS-B and 300 documents with 60 queries of Cranfield.
REFERENCE = {"none": (82.2, 62.8), "schedule": "0,0.3", "scores": {
    "mlp": (42.9, 30.4), "-mlp": (80.6, 62.2), "attention": (50.1, 37.4), "-attention": (78.6, 62.0), "block": (49.6, 39.1),
    "-block": (77.5, 62.4), "mlp:cos": (40.1, 24.1), "-mlp:cos": (78.5, 62.1), "norm": (80.5, 62.6), "-norm": (53.2, 55.8),
    "centre": (80.5, 62.3), "attn-colsum": (79.4, 56.1), "attn-cls": (75.8, 62.9), "random": (61.6, 60.8)}}
REFERENCE_MODES = {
    ("0,0.45", "prune"): {"-mlp": (78.1, 62.5), "norm": (77.7, 59.3), "centre": (77.4, 58.6), "-attention": (75.3, 61.8), "attn-cls": (70.2, 61.5),
                          "random": (49.2, 54.6)},
    ("0,0.45", "restore"): {"-mlp": (80.2, 57.1), "norm": (80.5, 52.6), "centre": (78.1, 51.0), "-attention": (78.9, 56.4),
                            "attn-cls": (75.4, 55.0), "random": (62.0, 52.9)},
    ("0,0.45", "merge"): {"-mlp": (78.1, 62.4), "norm": (76.6, 61.1), "centre": (77.7, 60.1), "-attention": (78.2, 60.4), "attn-cls": (76.2, 60.0),
                          "random": (75.4, 60.2)},
    ("0,0.3,0,0.3", "prune"): {"-mlp": (78.7, 60.8), "norm": (77.6, 58.9), "centre": (79.0, 60.1), "-attention": (77.2, 62.1),
                               "attn-cls": (71.6, 62.6), "random": (53.6, 53.4)},
    ("0,0.3,0,0.3", "restore"): {"-mlp": (79.4, 52.0), "norm": (79.6, 52.0), "centre": (79.5, 50.0), "-attention": (78.5, 52.3),
                                 "attn-cls": (76.0, 51.0), "random": (64.4, 52.5)},
    ("0,0.3,0,0.3", "merge"): {"-mlp": (77.5, 62.6), "norm": (78.7, 62.8), "centre": (78.5, 62.8), "-attention": (78.3, 62.5),
                               "attn-cls": (76.8, 61.8), "random": (76.3, 59.8)}}


# ---------------------------------------------------------------------------------------------------- numbers

def parts(drop):
    """A schedule's words by their names."""
    return dict(word.split("=", 1) for word in drop.split())


def change(row):
    """What dropping does to the quality: per cent of nDCG, points of the others; of cosines, the cosine."""
    before, after = row["full"]["quality"], row["dropped"]["quality"]
    return after if row["task"] == "cosine" else relative(row["task"], before, after)


def relative(task, before, after):
    return 100 * (after / before - 1) if task == "retrieval" else after - before


def layers_saved(row):
    return 100 * (1 - row["dropped"]["share_left"])


def time_saved(row):
    return 100 * (1 - statistics.median(row["dropped"]["seconds"]) / statistics.median(row["full"]["seconds"]))


def disturbed(row):
    return row["others"] is not None and row["others"] > BUSY


def mark(row):
    return MARK if disturbed(row) else ""


def signed(task, value):
    return "%.4f" % value if task == "cosine" else ("%+.1f" % value).replace("-", "−")


def tasks_of(results):
    return list(dict.fromkeys(r["task"] for r in results["rows"]))


class Rows:
    """Rows by task, weight type and the words of the schedule."""

    def __init__(self, results):
        self.found = collections.defaultdict(dict)
        for r in results["rows"]:
            p = parts(r["drop"])
            self.found[r["task"], r["type"], p["ratios"], p["score"], p["mode"], int(p["min"])][int(p["seed"])] = r

    def values(self, task, kind, ratios, score, mode="prune", least=0):
        return [change(r) for r in self.found.get((task, kind, ratios, score, mode, least), {}).values()]

    def mean(self, *which, **rest):
        values = self.values(*which, **rest)
        return statistics.fmean(values) if values else None

    def one(self, *which):
        return next(iter(self.found.get((*which, 0), {}).values()), None)


def choose(rows):
    """{task: schedules} that save most within each goal's loss: of all; of those that do not lean on position; of those that forget
    dropped tokens."""
    chosen = {}
    for goal in GOALS:
        # What is drawn by lot was lucky.
        good = [r for r in rows if r["task"] == goal.task and change(r) >= -goal.loss and parts(r["drop"])["score"] != "random"]
        for wanted in (lambda p: True, lambda p: "first" not in p["score"], lambda p: p["mode"] == "prune"):
            candidates = [r for r in good if wanted(parts(r["drop"]))]
            if candidates:
                best = min(candidates, key=lambda r: (round(r["dropped"]["share_left"], 3), -change(r)))
                if best["drop"] not in chosen.setdefault(goal.task, []):
                    chosen[goal.task].append(best["drop"])
    return chosen


def predicted(plan):
    """How many times as fast, by multiply-accumulates."""
    macs = [sum(layer["macs"] for layer in p["layers"]) for p in (plan["plan"], plan["dropping"])]
    return macs[0] / macs[1]


def speeds(bench):
    """A row a shape: (shape, measured, predicted, share of the time for scoring and moving, the plan)."""
    out = []
    dropped = [t for t in bench["times"] if "drop" in t]
    shares = {(t["batch"], t["tokens"]): sum(o["share"] for o in t["ops"] if o["op"] in DROP_OPS) for t in bench["ops"] if "drop" in t}
    for t, p in zip(dropped, bench["plans"]):
        out.append(("%dx%d" % (t["batch"], t["tokens"]), t["times_as_fast"], predicted(p), 100 * shares[t["batch"], t["tokens"]], p))
    return out


# ---------------------------------------------------------------------------------------------------- the summary

def short(drop):
    """A schedule for people."""
    p = parts(drop)
    text = "`%s` `%s` %s" % (p.get("ratios", p.get("keeps")), p["score"], p["mode"])
    return text + (", at least %s tokens" % p["min"] if p["min"] != "0" else "")


def with_least(drop):
    return drop.replace(" min=0 ", " min=%d " % LEAST)


def goal_rows(results):
    out = []
    met = {True: "✓", False: "✗"}
    for goal in GOALS:
        if goal.task not in tasks_of(results):
            continue
        saved = time_saved if goal.what == "time" else layers_saved
        good = [r for r in results["final"] if r["task"] == goal.task and r["type"] == "q8" and change(r) >= -goal.loss]
        limit = "%g %%" % goal.loss if goal.task == "retrieval" else "%g points" % goal.loss
        wanted = "%s: ≥ %d %% %s at ≤ %s lost" % (NAMES[goal.task], goal.saved, "less time" if goal.what == "time" else "fewer token-layers", limit)
        if not good:
            out.append([wanted, "no schedule that was tried stays within that", "", met[False]])
            continue
        best = max(good, key=saved)
        text = "**%.0f %%**%s at %s %s" % (saved(best), mark(best) if goal.what == "time" else "", signed(goal.task, change(best)), UNITS[goal.task])
        if goal.what != "time":
            text += " (%.0f %%%s of the time)" % (time_saved(best), mark(best))
        out.append([wanted, text, short(best["drop"]), met[saved(best) >= goal.saved]])
    final = {r["drop"] for r in results["final"] if r["task"] == "retrieval"}
    mine = [(b["drop"], s) for b in results["bench"] if b["drop"] in final and b["type"] == "q8" for s in speeds(b) if s[0] == "8x512"]
    if mine:
        arena = lambda p: 100 * (1 - p["dropping"]["arena_bytes"] / p["plan"]["arena_bytes"])  # noqa: E731
        drop, found = max(mine, key=lambda m: arena(m[1][4]))
        value = arena(found[4])
        out.append(["activations (arena): ≥ %d %% less, 8x512" % ARENA_GOAL, "**%.0f %%**" % value, short(drop), met[value >= ARENA_GOAL]])
    for tokens in ("128", "512"):
        every = [(b, s) for b in results["bench"] for s in speeds(b) if s[0].endswith("x" + tokens)]
        if every:
            b, worst = min(every, key=lambda e: e[1][1] / e[1][2])
            share = worst[1] / worst[2]
            out.append(["measured speed-up ≥ %d %% of what multiply-accumulates predict, %s tokens, every schedule" % (100 * SPEED_GOAL, tokens),
                        "from **%.0f %%**%s (%s, %s)" % (100 * share, mark(b), b["type"], worst[0]), short(b["drop"]), met[share >= SPEED_GOAL]])
    every = [(b, s) for b in results["bench"] for s in speeds(b)]
    if every:
        b, worst = max(every, key=lambda e: e[1][3])
        out.append(["scoring and moving tokens ≤ %g %% of the time" % OVERHEAD_GOAL, "up to **%.1f %%** (%s, %s)" % (worst[3], b["type"], worst[0]),
                    short(b["drop"]), met[worst[3] <= OVERHEAD_GOAL]])
    every = [(b, s) for b in results["short"] if parts(b["drop"])["min"] == str(LEAST) for s in speeds(b)]
    if every:
        b, worst = min(every, key=lambda e: e[1][1])
        out.append(["short sentences: never slower with `--drop-min %d`, but for the noise" % LEAST,
                    "from **%.2f times** as fast%s (%s)" % (worst[1], mark(b), worst[0]), short(b["drop"]), met[worst[1] >= 1 - NOISE]])
    return out


# ---------------------------------------------------------------------------------------------------- tables

def score_table(results, rows, kind, tasks, schedules):
    """Scores by task and schedule; the best of a column is bold."""
    scores = list(dict.fromkeys(parts(r["drop"])["score"] for r in results["rows"]))
    scores = [s for s in scores if any(rows.values(t, kind, x, s) for t in tasks for x in schedules)]
    columns = [(t, x) for t in tasks for x in schedules if any(rows.values(t, kind, x, s) for s in scores)]
    best = {c: max((rows.mean(c[0], kind, c[1], s) for s in scores if rows.values(c[0], kind, c[1], s)), default=None) for c in columns}
    out = []
    for s in scores:
        cells = []
        for c in columns:
            values = rows.values(c[0], kind, c[1], s)
            if not values:
                cells.append("–")
                continue
            text = signed(c[0], statistics.fmean(values))
            if len(values) > 1:
                text += " (%s to %s)" % (signed(c[0], min(values)), signed(c[0], max(values)))
            cells.append("**%s**" % text if statistics.fmean(values) == best[c] else text)
        out.append(["`%s`" % s] + cells)
    return table(["score"] + ["%s `%s`" % (NAMES[t], x) for t, x in columns], out)


def saved_line(rows, tasks, kind, schedules):
    found = []
    for x in schedules:
        of = ["%.0f %% (%s)" % (layers_saved(r), NAMES[t]) for t in tasks for r in [next((r for k, v in rows.found.items() if k[:3] == (t, kind, x)
                                                                                   and k[4:] == ("prune", 0) for r in v.values()), None)] if r]
        if of:
            found.append("`%s` saves %s of all token-layers" % (x, ", ".join(of)))
    return "; ".join(found) + ".\n"


def reference_table(results, rows):
    base, out = REFERENCE["none"], []
    for s, (stsb, ndcg) in REFERENCE["scores"].items():
        cells = []
        for task, value, before in (("stsb", stsb, base[0]), ("retrieval", ndcg, base[1])):
            cells.append(signed(task, relative(task, before, value)))
            for kind in ("f32", "q8"):
                ours = rows.mean(task, kind, REFERENCE["schedule"], s)
                cells.append("–" if ours is None else signed(task, ours))
        out.append(["`%s`" % s] + cells)
    head = ["score"] + ["%s: %s" % (t, w) for t in ("STS-B, points", "nDCG@10, %") for w in ("reference", "rs f32", "rs q8")]
    return table(head, out) if any(c != "–" for row in out for c in row[2:4] + row[5:7]) else None


def mode_tables(results, rows):
    out, p = [], [parts(r["drop"]) for r in results["rows"]]
    modes = [m for m in ("prune", "restore", "merge", "fold") if any(x["mode"] == m for x in p)]
    for task in [t for t in tasks_of(results) if t != "cosine"]:
        for ratios in MODE_SCHEDULES:
            scores = list(dict.fromkeys(x["score"] for x in p if x["ratios"] == ratios and any(rows.values(task, "q8", ratios, x["score"], m)
                                                                                           for m in modes if m != "prune")))
            count = {s: sum(bool(rows.values(task, "q8", ratios, s, m)) for m in modes) for s in scores}
            scores = [s for s in scores if count[s] == max(count.values())]  # those of the curves have one mode or two
            if not scores:
                continue
            body = []
            for s in scores:
                cells = []
                for m in modes:
                    ours, text = rows.mean(task, "q8", ratios, s, m), ""
                    reference = REFERENCE_MODES.get((ratios, m), {}).get(s)
                    if reference and task in ("stsb", "retrieval"):
                        k = 0 if task == "stsb" else 1
                        text = " (%s)" % signed(task, relative(task, REFERENCE["none"][k], reference[k]))
                    cells.append("–" if ours is None else signed(task, ours) + text)
                body.append(["`%s`" % s] + cells)
            out += ["%s, `%s`, %s:\n" % (NAMES[task], ratios, SHOWN[task]), table(["score"] + modes, body)]
    return out


def final_table(results):
    out = []
    for r in results["final"]:
        halves = [signed(h["task"], change(h)) for h in results["halves"] if (h["task"], h["type"], h["drop"]) == (r["task"], r["type"], r["drop"])]
        q = (r["full"]["quality"], r["dropped"]["quality"])
        out.append([NAMES[r["task"]], r["type"], short(r["drop"]), "%.2f" % q[0], "%.2f" % q[1], signed(r["task"], change(r)) + " " + UNITS[r["task"]],
                    ", ".join(halves), "%.0f %%" % layers_saved(r), "%.0f %%%s" % (time_saved(r), mark(r)),
                    whole(r["full"]["tokens_per_second"]) + mark(r), whole(r["dropped"]["tokens_per_second"]) + mark(r)])
    return table(["task", "weights", "schedule", "quality", "dropping", "change", "on each half", "token-layers saved", "time saved", "tokens/s", "dropping"], out, 3)


def speed_table(benches):
    out = []
    for b in benches:
        for shape, measured, by_macs, overhead, p in speeds(b):
            arenas = [p[k]["arena_bytes"] for k in ("plan", "dropping")]
            layers = [sum(x["tokens"] for x in p[k]["layers"]) for k in ("plan", "dropping")]
            out.append([b["type"], short(b["drop"]), shape, "%.2f" % (layers[0] / layers[1]), "%.2f" % by_macs, "%.2f%s" % (measured, mark(b)),
                        "%.0f %%" % (100 * measured / by_macs), "%.1f %%" % overhead, mib(arenas[0]), mib(arenas[1])])
    return table(["weights", "schedule", "batch x tokens", "by token-layers", "by multiply-accumulates", "measured", "of predicted", "scoring, moving",
                  "arena, MiB", "dropping"], out, 3)


def memory_table(b):
    shape, _, _, _, p = max(speeds(b), key=lambda s: s[4]["plan"]["arena_bytes"])
    full, dropping = p["plan"]["layers"][:-1], p["dropping"]["layers"][:-1]
    body = []
    for i, (x, y) in enumerate(zip(full, dropping)):
        body.append([i, whole(x["tokens"]), whole(y["tokens"]), mib(x["activation_bytes"]), mib(y["activation_bytes"]),
                     "%.0f %%" % (100 * (1 - y["activation_bytes"] / x["activation_bytes"])), "%.0f" % (x["macs"] / 1e6), "%.0f" % (y["macs"] / 1e6)])
    return shape, table(["layer", "tokens", "dropping", "activations, MiB", "dropping", "saved", "10⁶ multiply-accumulates", "dropping"], body, 0)


# ---------------------------------------------------------------------------------------------------- what was lost

def lost(results, rows):
    out, first = [], SCORE_SCHEDULES[0]
    tasks = [t for t in tasks_of(results) if t != "cosine"]
    scores = list(dict.fromkeys(parts(r["drop"])["score"] for r in results["rows"]))
    for task in tasks:
        chance = rows.mean(task, "q8", first, "random")
        if chance is None:
            continue
        worse = sorted((rows.mean(task, "q8", first, s), s) for s in scores if s != "random" and rows.values(task, "q8", first, s)
                       and rows.mean(task, "q8", first, s) < chance)
        if worse:
            out.append("- %s, `%s`: worse than at random (%s %s): %s." % (NAMES[task], first, signed(task, chance), UNITS[task], ", ".join(
                "`%s` %s" % (s, signed(task, v)) for v, s in worse)))
    for mode, why in (("restore", "what is dropped keeps its last state: where both sides of a comparison are dropped alike that helps, beside vectors of texts that lost nothing it does harm"),
                      ("merge", "what it forgives a bad score, it may cost a good one"), ("fold", "saves less than its ratios say: one extra token a layer that drops stays")):
        cells = []
        for task in tasks:
            pairs = []
            for ratios in MODE_SCHEDULES:
                for s in scores:
                    a, b = rows.mean(task, "q8", ratios, s), rows.mean(task, "q8", ratios, s, mode)
                    if a is not None and b is not None:
                        pairs.append((s, b - a))
            if pairs:
                better = sum(d > 0 for _, d in pairs)
                cells.append("%s: better than prune in %d of %d, on average %s %s" % (NAMES[task], better, len(pairs), signed(
                    task, statistics.fmean(d for _, d in pairs)), UNITS[task]))
        if cells:
            out.append("- `%s` (%s). %s." % (mode, why, "; ".join(cells)))
    return "\n".join(out) + "\n" if out else None


# ---------------------------------------------------------------------------------------------------- the page

INTRO = """What token dropping costs and what it saves. A schedule such as `0,0.5` gives the share of tokens that leaves behind each layer (layer 0 first;
%s); the score says which stay: those where it is highest (`rs.h` explains the names; a sum has each term brought to mean 0
and deviation 1 first); `prune` forgets the others, `restore` brings their last states back at the end, `merge` averages each into the kept
token most like it, `fold` makes one more token of them. Only the first token is protected. *Token-layers* are tokens that enter a layer,
summed over layers and inputs: what they save does not depend on the machine.
"""

PAPER = """The score `mlp` is that of Representation Shift (arXiv 2508.00367). **Nothing on this page has a counterpart in that paper's tables**: it
measures images and video (classification, video-text retrieval, video question answering; it reports up to 5.5 and 4.4 times the speed on
the latter two, on GPUs), no text encoder, and no quantized weights. Its schedule, 20 % behind layers 0, 3 and 6 of twelve, is for
images (see there). What can be set beside it here is its rule, to keep what the MLP changes most: in these post-norm text
encoders it does harm, and its opposite works.
"""


def layers(results):
    """How many the models of a page have, which is how long its schedules can be."""
    counts = {}
    for name, n in results["layers"].items():
        counts.setdefault(n, []).append(name)
    return "; ".join("%s %s %d" % (" and ".join(names), "have" if len(names) > 1 else "has", n) for n, names in counts.items())


def markdown(results, plots):
    s, tasks, rows = results["settings"], tasks_of(results), Rows(results)
    out = ["# Token dropping: what it costs, what it saves\n",
           "Written by `%s`%s; do not edit.\n" % (results["command"], ", **a trial**: few settings and little data" if s["quick"] else "")]
    head = machine_rows(results)
    head.append("| threads | %d |" % s["threads"])
    head.append("| seeds | %s of the score `random`; 1 of the ids of `rs bench`; data sets in their order |" % ", ".join(map(str, s["seeds"])))
    out.append("\n".join(head) + "\n")
    out.append(INTRO % layers(results))
    out.append("".join("- **%s**: %s%s. Without dropping (q8): %.2f\n" % (
        NAMES[t], ABOUT[t], "; only `%s`" % " ".join(s["limits"][t]) if s["limits"][t] else "",
        next(r["full"]["quality"] for r in results["rows"] if r["task"] == t and r["type"] == "q8")) for t in tasks))
    images = results.get("images", {"rows": [], "final": []})
    timed = [r for r in results["rows"] + results["final"] + images["rows"] + images["final"] if r["timed"]] + results["bench"] + results["short"]
    busy = [r for r in timed if disturbed(r)]
    if busy:
        out.append("**%s: measured while other programs took more than %d %% of the CPUs' time** (here %.0f to %.0f %%); such a time says little, "
                   "but without and with dropping took turns.\n" % (MARK, 100 * BUSY, 100 * min(r["others"] for r in busy),
                                                                    100 * max(r["others"] for r in busy)))
    goals = goal_rows(results) + (results_images.goal_rows(images["final"]) if images["final"] else [])
    if goals:
        out += ["## Summary\n", table(["goal", "found", "schedule", ""], goals, 4)]
    if tasks:
        out += ["Schedules for texts were chosen on the very data that they are judged by, so expect a little less of them elsewhere; how far the two halves of the "
            "data differ (below) says how much is chance. A score with `first` in it leans on how a text begins: of Cranfield's documents, the title. `rs tune` chooses on one half of yours and judges on the other. The comparison with other engines' speed (docs/benchmarks.md) is not "
            "part of this page.\n"]
    if results["final"]:
        out += ["The schedules that save most within a goal's loss, timed (q8: median of %d rounds, without and with dropping in turns; "
                "tokenizer, and queries that lose nothing, included):\n" % max(r["rounds"] for r in results["final"]), final_table(results)]
    if "curves" in plots:
        out += ["## Quality against speed\n", "![quality against time saved](%s)\n" % plots["curves"],
                "A point is a schedule; one that falls below a plot stands at its lower edge as an arrow. The grey line joins those that no other one "
                "beats in both. q8.\n"]
    if not tasks:
        return "\n".join(out + results_images.markdown(images, s["limits"], plots) + left_out(results))
    out += ["## Scores\n", "Change of quality by score, q8, `prune`: per cent of nDCG@10, points of the others; of *cosine*, the mean itself. "
            "The best of a column is bold; `random`: mean%s.\n" % (" and range of %d seeds" % len(s["seeds"]) if len(s["seeds"]) > 1 else ""),
            score_table(results, rows, "q8", tasks, SCORE_SCHEDULES), saved_line(rows, tasks, "q8", SCORE_SCHEDULES)]
    against = reference_table(results, rows)
    if against:
        out += ["Beside the reference (plain PyTorch, f32), `%s`, which the scores of rs follow; it took subsets, 500 pairs and 300 documents with 60 "
                "queries, so only the order and the size of the losses can agree:\n" % REFERENCE["schedule"], against]
    modes = mode_tables(results, rows)
    if modes:
        out += ["## Modes\n", "q8; in brackets the reference's, where it has it (f32, its subsets).\n"] + modes
    out += ["## The paper\n", PAPER]
    if results["bench"]:
        out += ["## Speed-up: measured and predicted\n", "![measured speed-up against the predicted one](%s)\n" % plots["speed"],
                "Fixed shapes, random ids, without and with dropping in turns, at least %g s a case. Predicted: multiply-accumulates of all layers "
                "without dropping over those with it (`rs info --plan`). *Scoring, moving*: the share of the operators' time that went into scores, "
                "choosing and moving tokens.\n" % s["seconds"], speed_table(results["bench"])]
        final = {r["drop"] for r in results["final"] if r["task"] == "retrieval"}
        b = next((x for x in results["bench"] if x["drop"] in final), results["bench"][0])
        shape, text = memory_table(b)
        out += ["## Memory of activations, layer by layer\n", "%s, %s, %s:\n" % (shape, b["type"], short(b["drop"])), text,
                "The arena is what the busiest moment needs, so layers before the first drop decide: it shrinks only where tokens leave early.\n"]
    if results["short"]:
        out += ["## Short sentences\n", "sst2-minilm:\n", speed_table(results["short"])]
    tried = lost(results, rows)
    if tried:
        out += ["## What lost, and what a mode is worth\n", tried]
    out += results_images.markdown(images, s["limits"], plots)
    return "\n".join(out + left_out(results))


def left_out(results):
    return ["## Left out\n", "".join("- %s\n" % x for x in results["left out"])] if results["left out"] else []


# ---------------------------------------------------------------------------------------------------- plots

Y_RANGES = {"retrieval": (0.88, 1.03), "stsb": (-12, 2), "sst2": (-6, 1.5), "cosine": (0.85, 1.0)}


def curve_panel(task, rows):
    """None where nothing was measured."""
    mine = [r for r in rows if r["task"] == task and r["type"] == "q8" and r["timed"]]
    if not mine:
        return None
    before = mine[0]["full"]["quality"]
    low, high = Y_RANGES[task]
    if task == "retrieval":
        low, high = before * low, before * high
    elif task != "cosine":
        low, high = before + low, before + high
    series = {}
    numbers = {tuple(which): number for number, (_, *which) in enumerate(SERIES)}
    for r in mine:
        p = parts(r["drop"])
        number = numbers.get((p["score"], p["mode"], int(p["min"])), REST)
        series.setdefault(number, []).append((time_saved(r), r["dropped"]["quality"], "%s: %.2f, %.0f %% less time" % (
            r["drop"], r["dropped"]["quality"], time_saved(r))))
    if not series:
        return None
    high = max(high, max(y for points in series.values() for _, y, _ in points) + 0.03 * (high - low)) if task != "cosine" else high
    lines = [("y", before, "without dropping")] if task != "cosine" else []
    for goal in GOALS:
        if goal.task == task:
            limit = before * (1 - goal.loss / 100) if task == "retrieval" else before - goal.loss
            lines.append(("y", limit, "%g %s lost" % (goal.loss, UNITS[task])))
            if goal.what == "time":
                lines.append(("x", goal.saved, "goal at %g %%" % goal.loss))
    # The score that is drawn by lot is no choice that anyone could make again.
    front = plot.pareto([(x, y) for n, points in series.items() if SERIES[n][1] != "random" for x, y, _ in points])
    xs = [x for points in series.values() for x, _, _ in points]
    x_low = min(0, *xs)
    return {"title": NAMES[task] if task != "cosine" else "vectors of documents", "x": "time saved, %", "y": mine[0]["metric"], "x range": (max(x_low, -25), max(*xs, 10) + 3), "y range": (low, high),
            "series": series, "lines": lines, "curves": [front]}


def speed_panel(benches):
    shapes, series = [], {}
    for b in benches:
        for shape, measured, by_macs, _, _ in speeds(b):
            if shape not in shapes:
                shapes.append(shape)
            series.setdefault(shapes.index(shape), []).append((by_macs, measured, "%s, %s %s: %.2f measured, %.2f predicted" % (
                shape, b["type"], b["drop"], measured, by_macs)))
    every = [v for points in series.values() for x, y, _ in points for v in (x, y)]
    low, high = min(1.0, *every) - 0.02, max(every) + 0.05
    return shapes, {"title": "times as fast", "x": "predicted by multiply-accumulates", "y": "measured", "x range": (low, high), "y range": (low, high),
                    "series": series, "lines": [], "curves": [[(low, low), (high, high)], [(max(low, low / SPEED_GOAL), max(low, low / SPEED_GOAL) * SPEED_GOAL), (high, SPEED_GOAL * high)]]}


def plots(results):
    """{name: SVG}."""
    where = "%s, %d threads, kernels %s" % (results["machine"]["cpu"], results["settings"]["threads"], results["rs"]["isa"])
    panels = [p for p in (curve_panel(t, results["rows"]) for t in tasks_of(results)) if p]
    trial = " (a trial: little data)" if results["settings"]["quick"] else ""
    out = {}
    if panels:
        out["curves"] = plot.scatter("Quality against time saved by token dropping%s" % trial, where, [s[0] for s in SERIES], panels)
    out.update(results_images.plots(results.get("images", {"rows": [], "final": []}), where, trial))
    if results["bench"]:
        shapes, panel = speed_panel(results["bench"])
        out["speed"] = plot.scatter("Speed-up by token dropping%s" % trial, where + "; lines: as predicted, and %d %% of it" % (100 * SPEED_GOAL),
                                    shapes, [panel], size=(560, 420))
    return out
