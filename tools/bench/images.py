"""A vision encoder beside its peers: the images part of tools/bench-peers.

Pixels are prepared once and lie in files, so what is timed is the encoder: class features from f32 [batch, 3, size, size].
"""

import array
import glob
import hashlib
import json
import os
import random
import statistics

import driver
import engines
import install
import made_models
import report
from driver import EngineError, note

CASES = ["224x1", "224x8", "224x32", "518x1", "518x8"]  # pixels x batch
CARD_CASES = ["224x1", "224x32", "518x1", "518x32"]
QUICK_CASES = ["224x1", "224x8", "518x1"]
DROP = "ratios=0,0,0.5,0,0.4 score=random"
DROP_SIZE = 518  # what dropping is for: images of many patches
PHOTO_PIXELS = 60 * 224 * 224  # of the photographs that features are compared on: 60 at 224 pixels, 11 at 518
COMPARED_AT_ONCE = 4
NAME = "dinov2-small"


def parse(case):
    """(size, batch) of a case such as 224x8; ValueError where it is none."""
    parts = case.split("x")
    if len(parts) != 2 or not all(s.isdigit() and s == str(int(s)) for s in parts):
        raise ValueError("expected PIXELSxBATCH such as 224x8, got '%s'" % case)
    size, batch = map(int, parts)
    if not (14 <= size <= 2048 and 1 <= batch <= 1024):
        raise ValueError("'%s': expected 14 to 2048 pixels and a batch of 1 to 1024" % case)
    return size, batch


def noise(path, count, size):
    """A file of f32 [count, 3, size, size]: normally distributed, in 256 steps as pixels have them, the same every time."""
    levels = [statistics.NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)]
    rng = random.Random(7)
    with open(path + ".part", "wb") as f:
        for _ in range(count):
            array.array("f", map(levels.__getitem__, rng.randbytes(3 * size * size))).tofile(f)
    os.replace(path + ".part", path)


def model_facts(folder):
    """What decides the shapes; ValueError where it is no model that all peers can be given."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
    except ValueError as e:
        raise ValueError("%s: %s" % (path, e)) from None
    if config.get("model_type") != "dinov2":
        raise ValueError("%s: model_type is %r, wanted 'dinov2'" % (path, config.get("model_type")))
    for key, value in (("use_swiglu_ffn", False), ("hidden_act", "gelu")):
        if config.get(key, value) != value:
            raise ValueError("%s: %s is %r, wanted %r" % (path, key, config[key], value))
    if not isinstance(config.get("patch_size"), int) or config["patch_size"] < 1:
        raise ValueError("%s: no patch_size" % path)
    return {"patch": config["patch_size"]}


class Images:
    """usable is false where the model cannot be had, and then notes say why."""

    def __init__(self, bench):
        self.bench, self.a = bench, bench.a
        self.reasons, self.facts, self.paths, self.files = {}, {}, {}, {}
        self.chosen = []
        for e in self.a.chosen:
            if e.images:
                self.chosen.append(e)
            if e.name == engines.DROPPING and self.a.drop != "none":
                self.chosen.append(engines.dropping(e))
        self.sizes = {}
        for case in self.a.image_cases:
            size, batch = parse(case)
            self.sizes.setdefault(size, []).append(batch)

    def reason(self, name, text):
        if name not in self.reasons:
            self.reasons[name] = text
            note("%s, images: %s" % (name, text))

    # ------------------------------------------------------------ before

    def prepare(self):
        """Raises OSError, ValueError or RuntimeError that says why there is nothing to measure."""
        a = self.a
        if not made_models.has_weights(a.image_model):
            note("making %s" % a.image_model)
            made_models.make(a.make_models, a.image_model)
        self.patch = model_facts(a.image_model)["patch"]
        digest = driver.model_digest(a.image_model)
        self.folder = driver.weights_folder(a.rs, a.image_model, digest)
        kinds = sorted({engines.base_of(e.name).partition("-")[2] for e in self.chosen if e.ours})
        self.paths = {"rs-" + kind: path for kind, path in driver.rs_weights(a.rs, a.image_model, self.folder, kinds).items()}
        os.makedirs(self.folder, exist_ok=True)
        for size, batches in self.sizes.items():
            self.files[size] = os.path.join(self.folder, "noise-%d.f32" % size)
            noise(self.files[size], max(batches), size)
        for size in self.sizes:
            folder = os.path.join(self.folder, str(size))
            os.makedirs(folder, exist_ok=True)
            config = {"model": os.path.abspath(a.image_model), "model stamp": digest, "folder": folder, "image size": size,
                      "reduce_range": self.bench.reduce_range()}
            made = {}
            self.bench.prepare_peers(self.chosen, install.Weights(self.bench.environment, config), made, self.facts, self.reason)
            self.paths.update({(name, size): path for name, path in made.items()})
        self.photos = self.photo_pixels()

    def photo_pixels(self):
        """{size: (file, how many)} of photographs, or of pictures that stand for them; none where there is nothing to prepare them."""
        found = sorted(p for p in glob.glob(os.path.join(self.a.photos, "*")) if p.lower().endswith((".jpg", ".jpeg", ".png")))
        self.about_photos = "photographs" if found else "made pictures (no photographs in %s)" % self.a.photos
        environment, out = self.bench.environment, {}
        try:
            environment.provide(engines.PICTURES)
            for size in self.sizes:
                count = max(1, PHOTO_PIXELS // (size * size))
                count = min(count, 4 if self.a.quick else count, len(found) or count)
                path = os.path.join(self.folder, "photos-%d.f32" % size)
                config = {"model": os.path.abspath(self.a.image_model), "size": size, "photos": found[:count], "made": count, "out": path}
                install.run([environment.python, os.path.join(driver.HERE, "pictures.py"), json.dumps(config)], 600,
                            environment.log("pictures-%d" % size), dict(os.environ, PYTHONDONTWRITEBYTECODE="1"))
                out[size] = (path, count)
        except install.NotThere as why:
            self.bench.notes.append("images: no cosines: %s" % why)
        return out

    # ------------------------------------------------------------ workers

    def usable(self, size):
        return [e for e in self.chosen if e.name not in self.reasons and (e.ours or not e.prepared or (e.name, size) in self.paths)
                and not (engines.drops(e.name) and size != DROP_SIZE)]

    def start(self, engine, size):
        base = engines.base_of(engine.name)
        return self.bench.start_worker(engine, {
            "drop": self.a.drop if engines.drops(engine.name) else None,
            "weights": self.paths.get(base if engine.ours else (base, size)), "model": os.path.abspath(self.a.image_model)})

    def ask(self, worker, name, size, path, count, batch):
        worker.ask("images", name=name, path=path, count=count, size=size, batch=batch)

    # ------------------------------------------------------------ parts

    def memory_and_loading(self, rows):
        """Fresh processes: the peak of one for the least and the largest batch of a size, and the load time at the first size."""
        for size, batches in self.sizes.items():
            for e in self.usable(size):
                row = rows[e.name]
                try:
                    # The first one brings the files into the page cache.
                    for batch in dict.fromkeys([max(batches)] if self.a.quick else [min(batches), max(batches)]):
                        case = "%dx%d" % (size, batch)
                        note("loading and memory, %s: %s" % (case, e.name))
                        w = self.start(e, size)
                        self.ask(w, case, size, self.files[size], batch, batch)
                        w.ask("run", name=case, warm=0, seconds=0, least=2)
                        row["memory"][case] = dict(w.ask("memory"), before=w.loaded["rss before"])
                        row["facts"].update(w.loaded["facts"])
                        row["versions"] = w.loaded["versions"]
                        self.bench.stop([w])
                    for _ in range(self.a.loads if size == min(self.sizes) or not row["load"] else 0):
                        w = self.start(e, size)
                        row["load"].append(w.loaded["seconds"])
                        row["import"].append(w.loaded["import seconds"])
                        self.bench.stop([w])
                except EngineError as why:
                    self.bench.stop(list(self.bench.workers))
                    self.reason(e.name, str(why))
                self.bench.save()

    def measure_size(self, size, batches, cases):
        """Appends to the cases, each from its first turn on."""
        running = []
        for e in self.usable(size):
            try:
                running.append(self.start(e, size))
            except EngineError as why:
                self.reason(e.name, str(why))
        for batch in batches:
            case = {"name": "%dx%d" % (size, batch), "kind": "images", "items": batch, "tokens": {}, "turns": {}, "cosine": {}}
            ready = []
            for w in [w for w in running if w.alive]:
                try:
                    self.ask(w, case["name"], size, self.files[size], batch, batch)
                    case["tokens"][w.name] = batch * (1 + (size // self.patch) ** 2)
                    ready.append(w)
                except EngineError as why:
                    self.failed(case, w, why)
            if not ready:
                continue
            note("images %s: %s" % (case["name"], " ".join(w.name for w in ready)))
            cases.append(case)
            _, failed = driver.take_turns(ready, case["name"], self.a.rounds, self.a.seconds, into=case["turns"])
            for name, why in failed.items():
                self.failed(case, next(w for w in ready if w.name == name), why)
            self.bench.save()
        if size in self.photos and running:
            self.compare(size, [w for w in running if w.alive], cases)
            self.bench.save()
        self.bench.stop(running)

    def failed(self, case, worker, why):
        if worker.alive:
            self.bench.notes.append("images %s of %s: %s" % (case["name"], worker.name, why))
            note(self.bench.notes[-1])
        else:
            self.reason(worker.name, "in case %s: %s" % (case["name"], why))

    def compare(self, size, running, cases):
        """Class features of photographs beside PyTorch's: one figure a size, kept with its first case."""
        path, count = self.photos[size]
        case = {"name": "photos, %d pixels" % size}

        def features(w):
            self.ask(w, case["name"], size, path, count, min(COMPARED_AT_ONCE, count))
            return driver.vectors(w, case["name"], count)

        reference = self.reference(size, features, path)
        found = {}
        if reference is not None:
            note("images: cosines at %d pixels" % size)
            for w in running:
                try:
                    found[w.name] = report.cosines(features(w), reference)
                except (EngineError, ValueError) as why:
                    self.failed(case, w, why)
        for c in cases:
            if c["name"].startswith("%dx" % size):
                c["photos"], c["cosine"] = count, found
                break

    def reference(self, size, features, pixels):
        """What PyTorch computes in f32, in a process of its own; kept, since versions, weights and pixels decide it."""
        environment = self.bench.environment
        digest = hashlib.sha256(json.dumps([environment.have.get("torch"), environment.have.get("transformers")]).encode("ascii"))
        with open(pixels, "rb") as f:
            digest.update(f.read())
        path = os.path.join(self.folder, "reference-%d-%s.json" % (size, digest.hexdigest()[:16]))
        try:
            with open(path, encoding="utf-8") as f:
                return json.load(f)
        except (OSError, ValueError):
            pass
        try:
            environment.provide(engines.BY_NAME["torch-f32"].packages)
            worker = self.start(engines.BY_NAME["torch-f32"], size)
            out = [list(v) for v in features(worker)]
            self.bench.stop([worker])
        except (EngineError, install.NotThere) as why:
            self.bench.notes.append("images: no cosines at %d pixels: PyTorch: %s" % (size, why))
            return None
        driver.write(path, json.dumps(out))
        return out

    # ------------------------------------------------------------ all of it

    def measure(self, results):
        """results["images"], in the form of bench-peers' own: engines, cases; None where nothing can be measured, with a note that says why."""
        results["images"] = None
        try:
            self.prepare()
        except (OSError, ValueError, RuntimeError) as why:
            self.bench.notes.append("images: %s" % why)
            note(self.bench.notes[-1])
            return
        rows = {e.name: {"label": e.label, "ours": e.ours, "bits": e.bits, "facts": dict(self.facts.get(e.name, {})), "versions": {},
                         "load": [], "import": [], "memory": {}} for e in self.chosen}
        results["images"] = {
            "model": os.path.basename(os.path.abspath(self.a.image_model)), "engines": rows, "cases": [],
            "drop": self.a.drop if any(engines.drops(n) for n in rows) else None, "photos": self.about_photos, "machine": self.bench.machine,
            "card": self.bench.card, "settings": {"threads": self.a.threads, "loads": self.a.loads}}
        self.bench.rows.append((rows, self.reasons))
        self.memory_and_loading(rows)
        for size, batches in self.sizes.items():
            self.measure_size(size, batches, results["images"]["cases"])
