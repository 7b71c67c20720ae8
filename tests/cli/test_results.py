#!/usr/bin/env python3
"""tools/results: the page that it makes of rows that this test made up, and a trial run on a little data of this test's own.

Reads RS_PROGRAM, RS_TEST_MODELS, as CTest sets them.  The trial needs the weight files of make_models.py.
"""

import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TOOL = os.path.join(ROOT, "tools", "results")
BUILD = os.environ.get("RS_BUILD_DIR") or os.path.join(ROOT, "build")
PROGRAM = os.environ.get("RS_PROGRAM") or os.path.join(BUILD, "rs")
MODELS = os.environ.get("RS_TEST_MODELS") or os.path.join(BUILD, "test-models")

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(ROOT, "tools", "bench"))
# pylint: disable=wrong-import-position
import driver  # noqa: E402
import plot  # noqa: E402
import results_images  # noqa: E402
import results_page as page  # noqa: E402

loader = importlib.machinery.SourceFileLoader("results_tool", TOOL)
tool = importlib.util.module_from_spec(importlib.util.spec_from_loader("results_tool", loader))
loader.exec_module(tool)


def folder_of(test):
    folder = tempfile.TemporaryDirectory(prefix="rs-results-")
    test.addCleanup(folder.cleanup)
    return folder.name


def row(task, drop, before, after, left=0.7, seconds=(10.0, 6.0), kind="q8", others=0.0, timed=True, half=0):
    side = lambda quality, share, s: {"quality": quality, "metrics": {}, "seconds": [s], "tokens_per_second": 1000 / s, "share_left": share}  # noqa: E731
    return {"task": task, "type": kind, "rounds": 1, "timed": timed, "half": half, "metric": "a metric", "isa": "avx2", "threads": 2, "drop": drop,
            "full": side(before, 1.0, seconds[0]), "dropped": side(after, left, seconds[1]), "ratio": {}, "others": others}


def image_row(task, drop, after, seconds=(10.0, 6.0), patches=None, **rest):
    """The same of images; of CIFAR-10, 80 % without dropping."""
    r = row(task, drop, 80.0 if task == "images" else 1.0, after, 0.75, seconds, **rest)
    for side in (r["full"], r["dropped"]):
        side.update(images=1000, arena_bytes=3 << 20, images_per_second=1000 / side["seconds"][0])
        del side["tokens_per_second"]
    r["dropped"]["metrics"] = {"cosine": after, "patches": patches}
    return r


def image_rows(others=0.0):
    s, at = tool.schedule, results_images.at_layer
    rows = [image_row("images", s(at("0.5"), "mlp", "prune"), 70.0, others=others), image_row("images", s(at("0.5"), "mlp", "merge"), 78.0),
            image_row("images", s(at("0.5"), "norm", "merge"), 77.0), image_row("images", s(at("0.5"), "random", "merge"), 76.0),
            image_row("images", s(at("0.5"), "random", "merge", seed=1), 75.0), image_row("images", s(results_images.PAPER, "mlp"), 69.3),
            image_row("fidelity-224", s("0.5", "mlp", "restore"), 0.91, patches=0.87), image_row("fidelity-518", s("0.5", "mlp", "merge"), 0.92)]
    final = [image_row("images", s("0,0.5", "norm", "merge"), 79.5, (10.0, 7.5)), image_row("images", s("0,0.7", "norm", "merge"), 77.5, (10.0, 7.0)),
             image_row("images", s("0,0.9", "norm", "merge"), 40.0, (10.0, 1.0))]
    return {"rows": rows, "final": final}


def bench(drop, fast=1.5, others=0.0):
    layers = lambda tokens: [{"tokens": t, "activation_bytes": t << 12, "macs": 1e6 * t} for t in tokens + [0]]  # noqa: E731
    share = [{"op": "linear", "share": 0.97}, {"op": "shift", "share": 0.01}, {"op": "token_gather", "share": 0.005}]
    shape = {"batch": 8, "tokens": 512}
    return {"drop": drop, "type": "q8", "model": "encoder", "others": others,
            "times": [dict(shape, median_ms=3), dict(shape, drop=drop, times_as_fast=fast)],
            "ops": [dict(shape, ops=[]), dict(shape, drop=drop, ops=share)],
            "plans": [dict(shape, drop=drop, plan={"layers": layers([512, 512]), "arena_bytes": 4 << 20},
                           dropping={"layers": layers([512, 128]), "arena_bytes": 2 << 20})]}


def results(others=0.0):
    s = tool.schedule
    rows = [row("retrieval", s("0,0.3", "mlp"), 50.0, 25.0, others=others), row("retrieval", s("0,0.3", "-mlp"), 50.0, 49.75, 0.75, others=others),
            row("retrieval", s("0,0.5", "-mlp"), 50.0, 49.0, 0.6, (10.0, 5.0)), row("retrieval", s("0,0.45", "-mlp", "merge"), 50.0, 49.6, 0.7),
            row("retrieval", s("0,0.45", "-mlp"), 50.0, 48.5, 0.7), row("retrieval", s("0,0.3", "-mlp"), 50.0, 50.5, kind="f32"),
            row("retrieval", s("0,0.3", "random"), 50.0, 40.0), row("retrieval", s("0,0.3", "random", seed=1), 50.0, 45.0),
            row("stsb", s("0,0.3", "-mlp"), 80.0, 79.5, 0.72), row("stsb", s("0,0.3", "mlp"), 80.0, 40.0, 0.5),
            row("sst2", s("0,0.5", "norm"), 90.0, 89.6, 0.65), row("cosine", s("0,0.3", "norm"), 1.0, 0.9812)]
    chosen = page.choose([r for r in rows if r["type"] == "q8"])
    final = [r for r in rows if r["type"] == "q8" and r["drop"] in chosen.get(r["task"], [])]
    halves = [dict(final[0], half=1), row("retrieval", final[0]["drop"], 50.0, 49.0, half=2)]
    return {"format": 1, "command": "tools/results --rs b", "layers": {"a-model": 6, "another": 6}, "date": "2000-01-01", "python": "3.9", "model": "a-model",
            "machine": {"cpu": "A <CPU> & more", "cpus": 2, "flags": ["avx2"], "system": "Linux 6", "memory": 2**34},
            "settings": {"threads": 2, "seconds": 1, "quick": False, "seeds": [0, 1], "limits": {t: [] for t in page.NAMES}},
            "rs": {"version": "0.1.0", "isa": "avx2", "commit": "abc"}, "minutes": 1.0, "rows": rows, "chosen": chosen, "final": final, "halves": halves,
            "bench": [bench(s("0,0.5", "-mlp"), others=others)], "short": [bench(s("0,0.5", "norm"), 0.9), bench(page.with_least(s("0,0.5", "norm")), 0.97)], "left out": ["a note"]}


def tables(text):
    """{heading row: rows of cells} of a page's tables; AssertionError for one that is not well formed."""
    found, lines = [], text.splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|(-+:?\|)+", line):
            head = lines[i - 1].strip("|").split("|")
            body = []
            for other in lines[i + 1:]:
                if not other.startswith("|"):
                    break
                cells = [c.strip() for c in other.strip().strip("|").split("|")]
                assert len(cells) == len(head) == line.count("|") - 1, other
                body.append(cells)
            found.append(([c.strip() for c in head], body))
    return found


def table_with(text, column):
    return next((head, body) for head, body in tables(text) if column in head)


class Plots(unittest.TestCase):
    def test_pareto(self):
        self.assertEqual(plot.pareto([(1, 5), (2, 4), (2, 3), (0, 4.5), (3, 1), (2.5, 0.5)]), [(1, 5), (2, 4), (3, 1)])
        self.assertEqual(plot.pareto([]), [])

    def test_ticks(self):
        self.assertEqual([t for _, t in plot.ticks(-7, 31)], ["0", "10", "20", "30"])
        self.assertEqual([t for _, t in plot.ticks(0.85, 1.0)], ["0.85", "0.90", "0.95", "1.00"])

    def check_svg(self, text):
        root = xml.etree.ElementTree.fromstring(text)
        width, height = float(root.get("width")), float(root.get("height"))
        for e in root.iter():
            for name, most in (("x", width), ("cx", width), ("x1", width), ("x2", width), ("y", height), ("cy", height), ("y1", height), ("y2", height)):
                if e.get(name) is not None:
                    self.assertTrue(0 <= float(e.get(name)) <= most, (e.tag, e.attrib))
        return ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}title")]

    def test_svgs(self):
        titles = {n: self.check_svg(t) for n, t in page.plots(results()).items()}
        self.assertEqual(set(titles), {"curves", "speed"})
        # A point says what it is, one that fell out of the plot too.
        self.assertTrue(any(t.startswith("ratios=0,0.3 score=mlp mode=prune") and "25.00" in t for t in titles["curves"]))
        self.assertTrue(any("1.50 measured, 1.60 predicted" in t for t in titles["speed"]), titles["speed"])


class Page(unittest.TestCase):
    def test_changes(self):
        self.assertAlmostEqual(page.change(row("retrieval", "d", 50, 49)), -2)
        self.assertAlmostEqual(page.change(row("stsb", "d", 50, 49)), -1)
        self.assertAlmostEqual(page.change(row("cosine", "d", 1, 0.98)), 0.98)
        self.assertAlmostEqual(page.time_saved(row("stsb", "d", 1, 1, seconds=(10.0, 4.0))), 60)

    def test_choice(self):
        chosen = results()["chosen"]
        s = tool.schedule
        # Within 1 %: the lone prune at 0.5 %, and merge, which saves more; within 3 %: more is dropped.
        self.assertEqual(chosen["retrieval"], [s("0,0.45", "-mlp", "merge"), s("0,0.3", "-mlp"), s("0,0.5", "-mlp")])
        # What leans on position is chosen beside the best that does not.
        both = page.choose([row("stsb", s("0,0.5", "norm+first"), 80, 80, 0.5), row("stsb", s("0,0.3", "norm"), 80, 80, 0.7)])
        self.assertEqual(both, {"stsb": [s("0,0.5", "norm+first"), s("0,0.3", "norm")]})
        self.assertEqual(chosen["stsb"], [s("0,0.3", "-mlp")])
        # Nobody can choose what was drawn by lot.
        self.assertEqual(page.choose([row("stsb", s("0,0.3", "random"), 80, 80)]), {})

    def test_tables(self):
        text = page.markdown(results(), {"curves": "c.svg", "speed": "s.svg"})
        self.assertEqual(text.count("![") , 2)
        self.assertIn("\nWritten by `tools/results --rs b`; do not edit.\n", text)
        self.assertIn("layer 0 first;\na-model and another have 6); the score", text)
        head, body = table_with(text, "retrieval (Cranfield) `0,0.3`")
        cells = {r[0]: dict(zip(head, r)) for r in body}
        self.assertEqual(cells["`mlp`"]["retrieval (Cranfield) `0,0.3`"], "−50.0")
        self.assertEqual(cells["`-mlp`"]["retrieval (Cranfield) `0,0.3`"], "**−0.5**")
        self.assertEqual(cells["`random`"]["retrieval (Cranfield) `0,0.3`"], "−15.0 (−20.0 to −10.0)")
        self.assertEqual(cells["`norm`"]["cosine `0,0.3`"], "**0.9812**")
        head, body = table_with(text, "STS-B, points: reference")
        self.assertIn(["`-mlp`", "−1.6", "–", "−0.5", "−1.0", "+1.0", "−0.5"], body)
        head, body = table_with(text, "merge")
        self.assertEqual(body, [["`-mlp`", "−3.0 (−0.5)", "−0.8 (−0.6)"]])
        goals = {r[0].split(":")[0] + r[0][-9:]: r for r in table_with(text, "goal")[1]}
        self.assertEqual(len(goals), len(table_with(text, "goal")[1]))
        self.assertEqual([r[3] for r in table_with(text, "goal")[1]], ["✓", "✓", "✓", "✓", "✓", "✓", "✓", "✗"])
        self.assertIn("**0.97 times**", table_with(text, "goal")[1][7][1])  # not what is cut whatever its length
        self.assertIn("**50 %** at −2.0 %", text)
        self.assertIn("−0.5, −2.0", {r[6] for r in table_with(text, "on each half")[1]})
        self.assertIn("- retrieval (Cranfield), `0,0.3`: worse than at random (−15.0 %): `mlp` −50.0.", text)
        self.assertIn("- a note", text)
        self.assertNotIn(page.MARK, text)

    def with_images(self, **rest):
        r = dict(results(), images=image_rows(**rest))
        r["settings"]["limits"] = {t: [] for t in tool.BY_NAME}
        return r

    def test_images(self):
        r = self.with_images()
        titles = page.plots(r)["images"]
        xml.etree.ElementTree.fromstring(titles)
        self.assertIn("score=norm mode=merge protect=cls min=0 seed=0: 79.5, 1.33 times as fast", titles)
        self.assertNotIn("nan", titles)
        text = page.markdown(r, {n: n + ".svg" for n in page.plots(r)})
        self.assertEqual(text.count("!["), 3)
        # What is faster than the goal but loses too much is not what was found.
        goals = [row for row in table_with(text, "goal")[1] if row[0].startswith("images")]
        self.assertEqual([(g[1], g[3]) for g in goals], [("**1.33 times** at −0.5 points", "✓"), ("**1.43 times** at −2.5 points", "✗")])
        head, body = [(h, b) for h, b in tables(text) if h == ["score", "prune", "merge"]][-1]
        self.assertEqual(body, [["`mlp`", "**−10.0**", "**−2.0**"], ["`norm`", "–", "−3.0"], ["`random`", "–", "−4.5"]])
        head, body = table_with(text, "reference, prune")
        self.assertEqual(body, [["`mlp`", "−10.7", "–", "−10.6"]])
        self.assertNotIn("by lot", text)  # which was not measured
        head, body = table_with(text, "224: class")
        self.assertEqual([r[1:3] for r in body], [["0.9100", "0.8700"], ["–", "–"]])
        self.assertEqual(body[1][5:7], ["0.9200", "–"])

    def test_schedules_for_people(self):
        s = tool.schedule
        self.assertEqual(results_images.short(s("0,0.5,0,0.3", "a,b,b,c", "merge")), "`0,0.5,0,0.3` `b,c` merge")
        self.assertEqual(results_images.short(s("0,0.5", "norm,mlp")), "`0,0.5` `mlp` prune")
        self.assertEqual(results_images.short(s("0,0.5", "norm")), "`0,0.5` `norm` prune")

    def test_images_alone(self):
        r = self.with_images()
        r["rows"], r["final"], r["halves"], r["bench"], r["short"] = [], [], [], [], []
        r["layers"] = {"an-image-model": 12, "a-model": 6}
        longest = max(len(page.parts(x["drop"])["ratios"].split(",")) for x in r["images"]["rows"] + r["images"]["final"])
        self.assertTrue(6 < longest <= 12)
        self.assertIn("layer 0 first;\nan-image-model has 12; a-model has 6);", page.markdown(r, {n: n + ".svg" for n in page.plots(r)}))
        text = page.markdown(r, {n: n + ".svg" for n in page.plots(r)})
        tables(text)
        self.assertIn("## Images", text)
        self.assertNotIn("\n## Scores", text)
        r["images"]["final"] = []  # nothing chosen yet
        tables(page.markdown(r, {}))

    def test_images_that_nothing_meets(self):
        r = self.with_images()
        r["images"]["final"] = r["images"]["final"][2:]
        text = page.markdown(r, {n: n + ".svg" for n in page.plots(r)})
        self.assertEqual([g[1] for g in table_with(text, "goal")[1] if g[0].startswith("images")], ["no schedule that was tried stays within that"] * 2)

    def test_disturbed_times_are_marked(self):
        text = page.markdown(results(others=0.3), {"curves": "c.svg", "speed": "s.svg"})
        self.assertIn("while other programs took more than 5 % of the CPUs' time** (here 30 to 30 %)", text)
        self.assertIn("1.50" + page.MARK, text)

    def test_goals_that_nothing_meets(self):
        r = results()
        r["final"] = []
        text = page.markdown(r, {"curves": "c.svg", "speed": "s.svg"})
        self.assertIn("no schedule that was tried stays within that", text)
        r["rows"] = [x for x in r["rows"] if x["task"] == "stsb"]
        r["bench"], r["short"], r["left out"] = [], [], []
        self.assertEqual(set(page.plots(r)), {"curves"})
        tables(page.markdown(r, {"curves": "c.svg"}))


class Cache(unittest.TestCase):
    def test_survives_half_a_line(self):
        path = os.path.join(folder_of(self), "rows.jsonl")
        cache = tool.Cache(path)
        cache.put("a", {"others": 0.0, "v": 1})
        with open(path, "a", encoding="utf-8") as f:
            f.write('{"key": "b", "row"')
        cache = tool.Cache(path)
        self.assertEqual(cache.rows, {"a": {"others": 0.0, "v": 1}})
        cache.put("b", {"others": None, "v": 2})
        self.assertEqual(tool.Cache(path).rows["b"]["v"], 2)

    def test_disturbed_times_are_measured_again(self):
        cache = tool.Cache(os.path.join(folder_of(self), "rows.jsonl"))
        cache.put("a", {"others": 0.5, "v": 1})
        self.assertIsNone(cache.get("a", True))
        self.assertEqual(cache.get("a", False)["v"], 1)
        cache.put("a", {"others": 0.7, "v": 2})  # still worse: the calmer one stays
        self.assertEqual(cache.get("a", False)["v"], 1)
        cache.put("a", {"others": 0.01, "v": 3})
        self.assertEqual(cache.get("a", True)["v"], 3)


class CacheFile(unittest.TestCase):
    def setUp(self):
        self.tmp = folder_of(self)
        self.build, self.weights = os.path.join(self.tmp, "build"), os.path.join(self.tmp, "w-{type}.rsw")
        write_data(self.tmp)
        for path in ("build/rs", "build/librs.so", "w-q8.rsw", "w-f32.rsw"):
            self.put(path, "one")
        os.chmod(os.path.join(self.build, "rs"), 0o755)

    def put(self, name, text):
        path = os.path.join(self.tmp, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)

    def cache(self, *args):
        prepared = tool.Results(tool.parse_arguments(["--quick", "--tasks", "stsb", "--rs", self.build, "--data", self.tmp, "--model", self.weights, *args]))
        prepared.prepare()
        return prepared.cache.path

    def test_kernels_have_rows_of_their_own(self):
        first = self.cache()
        self.assertEqual(self.cache(), first)
        self.put("build/librs.so", "two")  # the program is the same: it only calls them
        second = self.cache()
        self.put("build/rs", "two")
        self.assertEqual(len({first, second, self.cache(), self.cache("--threads", "7")}), 4)

    def test_a_program_that_is_a_link(self):
        link = os.path.join(self.tmp, "links")
        os.makedirs(link)
        os.symlink(os.path.join(self.build, "rs"), os.path.join(link, "rs"))
        self.assertEqual(driver.program_files(link), [os.path.join(link, "rs"), os.path.join(os.path.realpath(self.build), "librs.so")])
        os.remove(os.path.join(self.build, "librs.so"))
        with self.assertRaisesRegex(FileNotFoundError, "build holds no librs.so: build it with 'make'"):
            driver.program_files(link)


class Plan(unittest.TestCase):
    def test_settings(self):
        for quick in (False, True):
            plan = tool.plan(list(tool.BY_NAME), quick)
            self.assertEqual(len(plan), len(set(plan)))
            for setting in plan:
                words = page.parts(setting.drop)
                self.assertEqual(list(words), ["ratios", "score", "mode", "protect", "min", "seed"])
        self.assertLess(len(plan), 150)  # the trial

    def test_images(self):
        for quick in (False, True):
            plan = tool.image_plan(list(tool.BY_NAME), quick)
            self.assertEqual(len(plan), len(set(plan)))
            self.assertEqual({p.task for p in plan}, {"images", "fidelity-224", "fidelity-518"})
            for setting in plan + tool.image_final_plan(quick):
                words = page.parts(setting.drop)
                self.assertEqual(list(words), ["ratios", "score", "mode", "protect", "min", "seed"])
                self.assertLessEqual(len(words["ratios"].split(",")), 12)
        self.assertEqual(tool.image_plan(["stsb"], False), [])

    def test_drop_arguments(self):
        self.assertEqual(tool.drop_arguments("ratios=0,0.3 score=-mlp mode=merge protect=cls min=4 seed=1"),
                         ["--drop=0,0.3", "--drop-score=-mlp", "--drop-mode=merge", "--drop-protect=cls", "--drop-min=4", "--drop-seed=1"])


def write_data(folder):
    """A little of everything, of texts that the repository has."""
    texts = [t.replace("\n", " ").replace("\t", " ") for t in driver.builtin_texts()]
    texts = [t for t in texts if len(t) > 40 and not t.startswith(".")][:24]

    def put(name, lines):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.writelines(line + "\n" for line in lines)
    put("cran.all.1400", [".I %d\n.T\n%s\n.A\n\n.B\n\n.W\n%s" % (i + 1, t[:20], t) for i, t in enumerate(texts)])
    put("cran.qry", [".I %d\n.W\n%s" % (i + 1, t[10:60]) for i, t in enumerate(texts[:8])])
    put("cranqrel", ["%d %d %d" % (i + 1, d % len(texts) + 1, g) for i in range(8) for d, g in ((i, 1), (i + 3, 3))])
    put("stsb-test.csv", ["g\tf\t1\t%d\t%.1f\t%s\t%s" % (i, score, t, u) for i, (t, u, score) in enumerate(
        [(t, t[:30], 4.0 + i % 2) for i, t in enumerate(texts[:10])] + [(t, u, i % 3 / 2) for i, (t, u) in enumerate(zip(texts[:10], texts[5:]))])])
    put("sst2-validation.tsv", ["sentence\tlabel"] + ["%s\t%d" % (t, i % 2) for i, t in enumerate(texts)])


class Trial(unittest.TestCase):
    def setUp(self):
        if not os.path.exists(os.path.join(MODELS, "minilm-q8.rsw")):
            self.skipTest("needs the weight files of all-MiniLM-L6-v2 in %s" % MODELS)
        self.tmp = folder_of(self)
        self.data = os.path.join(self.tmp, "data")
        os.makedirs(self.data)
        os.symlink(os.path.abspath(PROGRAM), os.path.join(self.tmp, "rs"))
        self.page = os.path.join(self.tmp, "docs", "results.md")

    def run_tool(self, *args):
        command = [sys.executable, TOOL, "--quick", "--rs", self.tmp, "--data", self.data, "--out", self.page, "--seconds", "0.01",
                   "--model", os.path.join(MODELS, "minilm-{type}.rsw"), "--classifier", os.path.join(MODELS, "sst2-{type}.rsw"), *args]
        r = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ, RS_SHARED="/nowhere"))
        self.assertNotIn("Traceback", r.stderr)
        return r

    def test_page_says_what_was_measured(self):
        write_data(self.data)
        r = self.run_tool()
        self.assertEqual(r.returncode, 0, r.stderr)
        with open(self.page, encoding="utf-8") as f:
            text = f.read()
        with open(os.path.join(self.tmp, "results", "results.json"), encoding="utf-8") as f:
            measured = json.load(f)
        self.assertEqual(measured["layers"], {"all-MiniLM-L6-v2": 6, "sst2-minilm": 6})
        tasks = {x["task"] for x in measured["rows"]}
        self.assertLessEqual({"retrieval", "stsb", "cosine"}, tasks)
        for name in ("curves", "speed"):
            xml.etree.ElementTree.parse(os.path.join(self.tmp, "docs", "results-%s.svg" % name))
            self.assertIn("(results-%s.svg)" % name, text)
        found = tables(text)
        self.assertGreater(len(found), 8)
        # Every score of the plan is in its table, and each number is what rs eval printed.
        head, body = table_with(text, "STS-B `0,0.3`")
        cells = {r[0]: dict(zip(head, r)) for r in body}
        checked = 0
        for x in measured["rows"]:
            words = page.parts(x["drop"])
            if (x["type"], words["mode"], words["min"]) != ("q8", "prune", "0") or words["ratios"] not in page.SCORE_SCHEDULES:
                continue
            before, after = x["full"]["metrics"][x["metric"]], x["dropped"]["metrics"][x["metric"]]
            wanted = {"retrieval": "%+.1f" % (100 * (after - before) / before), "cosine": "%.4f" % after}.get(x["task"], "%+.1f" % (after - before))
            got = cells["`%s`" % words["score"]]["%s `%s`" % (page.NAMES[x["task"]], words["ratios"])]
            self.assertAlmostEqual(float(got.strip("*").replace("−", "-")), float(wanted), delta=0.1001, msg=x["drop"])
            checked += 1
        self.assertGreaterEqual(checked, 2 * 4 * len(tasks - {"sst2"}))
        self.assertEqual(len(table_with(text, "token-layers saved")[1]), len(measured["final"]))
        # Again: what was finished is not measured again, and says the same.
        cache = next(n for n in os.listdir(os.path.join(self.tmp, "results")) if n.endswith(".jsonl") and n != "documents.jsonl")
        before = self.entries(cache)
        self.assertEqual(self.run_tool().returncode, 0)
        after = self.entries(cache)
        timed = {k for k in after if after[k] > 1}
        self.assertEqual({k for k in before if k not in timed}, {k for k in after if k not in timed})
        untimed = {(x["task"], x["type"], x["drop"]) for x in measured["rows"] if not x["timed"]}
        again = {k: n for k, n in after.items() if tuple(json.loads(k)[1:4]) in untimed}
        self.assertGreaterEqual(len(again), 8 * len(tasks))
        self.assertEqual(set(again.values()), {1})

    def entries(self, cache):
        """How often each key is in the file."""
        counts = {}
        with open(os.path.join(self.tmp, "results", cache), encoding="utf-8") as f:
            for line in f:
                key = json.loads(line)["key"]
                counts[key] = counts.get(key, 0) + 1
        return counts

    def test_what_is_missing_is_named(self):
        r = self.run_tool()
        self.assertEqual(r.returncode, 1)
        self.assertIn("left out: stsb: no stsb-test.csv in " + self.data, r.stderr)
        self.assertIn("results: nothing to measure with", r.stderr)
        self.assertFalse(os.path.exists(self.page))
        write_data(self.data)
        r = self.run_tool("--model", os.path.join(self.tmp, "no-{type}.rsw"))
        self.assertEqual(r.returncode, 1)
        self.assertIn("no-q8.rsw is missing", r.stderr)
        os.remove(os.path.join(self.tmp, "rs"))
        r = self.run_tool()
        self.assertEqual(r.returncode, 1)
        self.assertIn("rs is missing: build it with 'make'", r.stderr)

    def test_usage(self):
        for args, words in ((("--tasks", "stsb,poetry"), "no task 'poetry'"), (("--out", "x.txt"), "ends with .md"), (("--threads", "0"), "got '0'")):
            r = self.run_tool(*args)
            self.assertEqual(r.returncode, 2)
            self.assertIn(words, r.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)  # which says why a test skipped
