"""Figures of the last release, and whether new ones fell behind them: what tools/bench-check decides.  Nothing here measures.

Two kinds of figures.  Ratios: how many times as fast rs is as a yardstick in the same run ("rs-q8 / reference, 1x16"); more is better;
they hold for one CPU, so each row of kernels remembers its.  Instruction counts: less is better; they hold for one compiler, on any
machine.
"""

import json
import math
import os

FALL = 0.10  # more than this is a failure


class CheckError(Exception):
    """Figures that cannot be compared; the text names the file."""


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except OSError as e:
        raise CheckError("%s: %s" % (path, e.strerror)) from None
    except ValueError as e:
        raise CheckError("%s: not JSON: %s" % (path, e)) from None
    if not isinstance(value, dict):
        raise CheckError("%s: expected an object, got %s" % (path, type(value).__name__))
    return value


def part(path, value, *keys):
    """value[key][key]…, which must be an object."""
    for i, key in enumerate(keys):
        if key not in value:
            raise CheckError("%s: no '%s'" % (path, ".".join(keys[:i + 1])))
        value = value[key]
        if not isinstance(value, dict):
            raise CheckError("%s: '%s': expected an object, got %r" % (path, ".".join(keys[:i + 1]), value))
    return value


def numbers(path, where, values):
    for name, v in values.items():
        if isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v) or v <= 0:
            raise CheckError("%s: %s: '%s': expected a number above 0, got %r" % (path, where, name, v))
    return values


def read_baseline(path):
    """{"format": 1, "rows": {isa: {"cpu", "threads", "ratios"}}, "instructions": {compiler: {name: count}}}, all checked."""
    b = read_json(path)
    if b.get("format") != 1:
        raise CheckError("%s: format: expected 1, got %r" % (path, b.get("format")))
    for isa in part(path, b, "rows"):
        row = part(path, b, "rows", isa)
        for key, kind in (("cpu", str), ("threads", int)):
            if not isinstance(row.get(key), kind):
                raise CheckError("%s: rows.%s.%s: expected %s, got %r" % (path, isa, key, kind.__name__, row.get(key)))
        numbers(path, "rows.%s.ratios" % isa, part(path, b, "rows", isa, "ratios"))
    for compiler in part(path, b, "instructions"):
        numbers(path, "instructions.%s" % compiler, part(path, b, "instructions", compiler))
    return b


def read_measured(path):
    """Figures from a file: of --json, or all results of bench-peers."""
    m = read_json(path)
    if m.get("finished") is False:
        raise CheckError("%s: the run of bench-peers that wrote this did not finish" % path)
    m = part(path, m, "check") if "check" in m else m
    for key, kind in (("row", str), ("cpu", str), ("threads", int)):
        if "ratios" in m and not isinstance(m.get(key), kind):
            raise CheckError("%s: %s: expected %s, got %r" % (path, key, kind.__name__, m.get(key)))
    if "instructions" in m and not isinstance(m.get("compiler"), str):
        raise CheckError("%s: compiler: expected str, got %r" % (path, m.get("compiler")))
    found = [k for k in ("ratios", "instructions") if k in m]
    if not found:
        raise CheckError("%s: neither 'ratios' nor 'instructions'" % path)
    for key in found:
        numbers(path, key, part(path, m, key))
    return m


def yardstick(name):
    """What "rs-q8 / reference, 1x16" is measured with: ratios to a peer that is not installed are nobody's fault."""
    return name.partition(" / ")[2].partition(",")[0]


def compare_section(path, where, stored, new, more_is_better, notes):
    """A row (name, stored, new, change, fell) for every figure; what is missing on either side is an error, but for a yardstick that one
    side has not at all: of those that only the new figures have, there are notes."""
    known, lacking = {yardstick(n) for n in stored}, set()
    for name in new:
        if name in stored:
            continue
        if not stored or yardstick(name) in known:
            raise CheckError("%s: %s: no figure for '%s'; bench-check --update stores it" % (path, where, name))
        lacking.add(yardstick(name))
    notes += ["ratios to '%s' are not judged: %s has none; bench-check --update stores them" % (s, where) for s in sorted(lacking)]
    groups = {yardstick(n) for n in new}
    rows = []
    for name, old in stored.items():
        if name not in new:
            if yardstick(name) in groups:
                raise CheckError("%s: %s: '%s' is stored, but was not measured" % (path, where, name))
            continue
        change = new[name] / old - 1
        # A hair of room, so that a fall of exactly the limit passes whatever its binary fractions come to.
        fell = (-change if more_is_better else change) > FALL + 1e-9
        rows.append((name, old, new[name], change, fell))
    return rows


def unjudged(baseline, about):
    """Why ratios of these kernels ("row"), CPU and threads have none to be compared with, or None: known before anything is measured."""
    row = baseline["rows"].get(about["row"])
    if row is None:
        return "no row '%s' (there are: %s); bench-check --update stores one" % (about["row"], ", ".join(sorted(baseline["rows"])) or "none")
    if any(row[k] != about[k] for k in ("cpu", "threads")):
        return "stored for %s, %d threads; this is %s, %d threads" % (row["cpu"], row["threads"], about["cpu"], about["threads"])
    return None


def compare(path, baseline, measured):
    """(rows, notes).  CheckError where there is nothing to compare with."""
    rows, notes = [], []
    if "ratios" in measured:
        isa, why = measured["row"], unjudged(baseline, measured)
        if why and isa not in baseline["rows"] and "instructions" not in measured:
            raise CheckError("%s: rows: %s" % (path, why))
        if why:  # what both sides have is shown all the same
            notes.append("ratios are not judged: " + why)
            stored = baseline["rows"].get(isa, {"ratios": {}})["ratios"]
            rows += [(n, old, measured["ratios"][n], measured["ratios"][n] / old - 1, False) for n, old in stored.items() if n in measured["ratios"]]
        else:
            rows += compare_section(path, "rows.%s.ratios" % isa, baseline["rows"][isa]["ratios"], measured["ratios"], True, notes)
    if "instructions" in measured:
        compiler = measured["compiler"]
        if compiler not in baseline["instructions"]:
            raise CheckError("%s: instructions: none for '%s' (there are: %s); bench-check --update stores them"
                             % (path, compiler, ", ".join(sorted(baseline["instructions"])) or "none"))
        rows += compare_section(path, "instructions.%s" % compiler, baseline["instructions"][compiler], measured["instructions"], False, notes)
    if not rows:
        raise CheckError("%s: none of the measured figures is stored: %s" % (path, "; ".join(notes)))
    return rows, notes


def update(path, measured):
    """The stored figures with the measured ones in their place; what was not measured stays."""
    b = read_baseline(path) if os.path.exists(path) else {"format": 1, "rows": {}, "instructions": {}}
    if "ratios" in measured:
        row = {"cpu": measured["cpu"], "threads": measured["threads"]}
        old = b["rows"].get(measured["row"], {})
        # Ratios of another CPU or another number of threads would be judged as if they were of this one.
        keep = old.get("ratios", {}) if all(old.get(k) == v for k, v in row.items()) else {}
        groups = {yardstick(n) for n in measured["ratios"]}
        row["ratios"] = dict({n: v for n, v in keep.items() if yardstick(n) not in groups}, **measured["ratios"])
        b["rows"][measured["row"]] = row
    if "instructions" in measured:
        b["instructions"][measured["compiler"]] = measured["instructions"]
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.write(json.dumps(b, indent=1, sort_keys=True) + "\n")
    os.replace(path + ".part", path)


def best_of(old, new):
    """Of two measurements the better ratio each: a slower rs is slower every time, a busy machine is not."""
    return {n: max(v, old.get(n, 0)) for n, v in new.items()}
