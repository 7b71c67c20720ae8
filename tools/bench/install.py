"""The peers' virtual environment, and their weights: what tools/bench-peers makes before it measures."""

import glob
import json
import os
import shutil
import subprocess
import sys
import tarfile

import engines
from driver import HERE, note

PIP_LIMIT_S = 3600
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# With all that this CPU can do, and without the parts that are not measured.
LLAMA_CMAKE = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF"


# What a Python has of what peers on a card need: whether PyTorch sees a card, and the providers of ONNX Runtime; null where not installed.
CARD_SCRIPT = """import json
there = {"torch": None, "onnxruntime": None}
try:
  import torch
  there["torch"] = torch.cuda.is_available()
except Exception: pass
try:
  import onnxruntime
  there["onnxruntime"] = onnxruntime.get_available_providers()
except Exception: pass
print(json.dumps(there))"""


class NotThere(Exception):
    """Why something that an engine needs could not be had."""


def run(command, limit, log, env=None):
    """Run to the end with its output in a log file; NotThere with the line that says most, where it fails."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "wb") as f:
        try:
            status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT, env=env, timeout=limit,
                                    check=False).returncode
        except subprocess.TimeoutExpired:
            raise NotThere("not done within %d s (%s)" % (limit, log)) from None
        except OSError as e:
            raise NotThere("%s: %s" % (command[0], e.strerror)) from None
    if status != 0:
        with open(log, encoding="utf-8", errors="replace") as f:
            lines = [s.strip() for s in f if s.strip()] or ["it said nothing"]
        errors = [s for s in lines if "error" in s.lower()] or lines
        raise NotThere("%s (%s)" % (errors[-1][:300], log))


class Environment:
    """folder None: the packages of the Python that runs this, as they are."""

    def __init__(self, folder, install, build_limit, work):
        self.folder, self.install, self.build_limit, self.work = folder, install and folder is not None, build_limit, work
        self.python = os.path.join(folder, "bin", "python") if folder else sys.executable
        self.pins = engines.read_pins()
        self.why_not = {}  # package: reason
        self.have = {}

    def log(self, name):
        return os.path.join(self.work, "logs", name + ".log")

    def pip(self, name, args, limit, env=None):
        run([self.python, "-m", "pip", "--disable-pip-version-check", "--no-input"] + args, limit, self.log(name), env)

    def prepare(self):
        """Make the environment where it is missing, and look what it has."""
        if not os.access(self.python, os.X_OK):
            if not self.install:
                raise NotThere("%s is no virtual environment, and --no-install was given" % self.folder)
            self.check_python(sys.executable, sys.version_info)
            run([sys.executable, "-m", "venv", self.folder], 600, self.log("venv"))
        elif self.install:
            self.check_python(self.python, self.say("import json, sys\nprint(json.dumps(sys.version_info[:3]))"))
        self.look()

    def check_python(self, python, version):
        """pip would say the same of each package by itself, at length, and not what to do."""
        if tuple(version[:2]) < engines.PINS_PYTHON:
            raise NotThere("the pinned versions need Python %d.%d or later, and %s is Python %s: run tools/bench-peers with a later one%s" % (
                *engines.PINS_PYTHON, python, ".".join(map(str, version[:3])), ", without %s" % self.folder if python == self.python else ""))

    def look(self):
        names = sorted({p for e in engines.ALL for p in e.packages} | set(engines.PICTURES))
        script = ("import importlib.metadata as m, json, sys\nhave = {}\nfor n in sys.argv[1:]:\n  try: have[n] = m.version(n)\n"
                  "  except m.PackageNotFoundError: pass\nprint(json.dumps(have))")
        self.have = self.say(script, names)

    def say(self, script, names=()):
        result = subprocess.run([self.python, "-c", script] + list(names), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            raise NotThere("%s: %s" % (self.python, (result.stderr.strip().splitlines() or ["it said nothing"])[-1]))
        return json.loads(result.stdout.splitlines()[-1])

    def right(self, package):
        """There, and at the pinned version (a local version such as +cpu is the same one)."""
        have = self.have.get(package)
        return have is not None and (not self.install or have.partition("+")[0] == self.pins[package.lower()])

    def ensure(self, packages):
        """Install what is missing of these; NotThere with the first reason why not.  A package that failed is not tried again."""
        for package in packages:
            if package in self.why_not:
                raise NotThere(self.why_not[package])
            if self.right(package):
                continue
            if not self.install:
                raise NotThere("%s is not in %s, and --no-install was given" % (package, os.path.basename(self.folder)) if self.folder
                               else "%s is not installed for %s" % (package, self.python))
            note("installing %s %s" % (package, self.pins[package.lower()]))
            try:
                {"torch": self.install_torch, "llama-cpp-python": self.install_llama}.get(package, self.install_plain)(package)
            except NotThere as e:
                self.why_not[package] = "%s cannot be installed: %s" % (package, e)
                raise NotThere(self.why_not[package]) from None
            self.look()

    def provide(self, packages):
        """The same for one who cannot know whether anybody made the environment before: with engines of rs alone, nobody did."""
        if not self.have:
            self.prepare()
        self.ensure(packages)

    def pinned(self, package):
        return "%s==%s" % (package, self.pins[package.lower()])

    def install_plain(self, package):
        self.pip("pip-" + package, ["install", "-c", engines.PINS, self.pinned(package)], PIP_LIMIT_S)

    def install_torch(self, package):
        # PyPI's wheel for Linux brings four gigabytes of CUDA; the project's own index has one for CPUs, where it can be reached.
        self.install_plain("numpy")
        try:
            self.pip("pip-torch-cpu", ["install", "--no-deps", "--retries", "0", "--timeout", "10", "--index-url", TORCH_CPU_INDEX,
                                       self.pinned(package)], PIP_LIMIT_S)
        except NotThere:
            note("  not from %s; from PyPI, with its CUDA packages" % TORCH_CPU_INDEX)
        self.install_plain(package)  # what it depends on, or all of it

    def llama_archive(self):
        """The sources of llama-cpp-python: what is compiled, and where the converter to GGUF lies."""
        folder = os.path.join(self.work, "llama")
        pattern = os.path.join(folder, "llama_cpp_python-%s.tar.gz" % self.pins["llama-cpp-python"])
        if not glob.glob(pattern):
            self.pip("pip-llama-source", ["download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", folder,
                                          self.pinned("llama-cpp-python")], PIP_LIMIT_S)
        if not os.path.exists(pattern):
            raise NotThere("pip brought no %s" % pattern)
        return pattern

    def install_llama(self, _):
        env = dict(os.environ, CMAKE_ARGS=LLAMA_CMAKE)
        self.pip("pip-llama-cpp-python", ["install", "-c", engines.PINS, self.llama_archive()], self.build_limit, env)

    def llama_sources(self):
        """llama.cpp as that package carries it, unpacked: only the converter, which is Python."""
        folder = os.path.join(self.work, "llama", "source-" + self.pins["llama-cpp-python"])
        if os.path.isdir(folder):
            return folder
        part = folder + ".part"
        shutil.rmtree(part, ignore_errors=True)
        inside = "/vendor/llama.cpp/"
        with tarfile.open(self.llama_archive()) as archive:
            for member in archive:
                name = member.name.partition(inside)[2]
                if not member.isfile() or ".." in name or not name.startswith(("convert_hf_to_gguf.py", "conversion/", "gguf-py/")):
                    continue
                path = os.path.join(part, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with archive.extractfile(member) as source, open(path, "wb") as out:
                    shutil.copyfileobj(source, out)
        os.rename(part, folder)
        return folder


class Weights:
    """The peers' weights in a folder, made where they are missing or came from other versions."""

    def __init__(self, environment, config):
        self.environment, self.config = environment, config
        self.failed = {}

    def stamp(self, name):
        """What decides how the file comes out: made again when any of it changes."""
        packages = {p for e in engines.ALL if e.prepared == name != "onnx" for p in e.packages} or set(engines.ONNX)
        with open(os.path.join(HERE, "prepare.py"), encoding="utf-8") as f:
            source = f.read()
        config = {k: v for k, v in self.config.items() if k in ("model stamp", "pooling", "max_tokens", "reduce_range", "image size")}
        return {"versions": {p: self.environment.have.get(p) for p in sorted(packages)}, "config": config, "maker": source}

    def ensure(self, name):
        """The path of the weights `name`, and facts about them; NotThere where they cannot be made."""
        if name in self.failed:
            raise NotThere(self.failed[name])
        if name in engines.MADE_FROM:
            self.ensure(engines.MADE_FROM[name])
        path = os.path.join(self.config["folder"], engines.PREPARED[name])
        stamp_path, stamp = path + ".stamp.json", self.stamp(name)
        try:
            with open(stamp_path, encoding="utf-8") as f:
                old = json.load(f)
            if old["stamp"] == stamp and os.path.exists(path):
                return path, old["facts"]
        except (OSError, ValueError, KeyError):
            pass
        note("preparing %s" % engines.PREPARED[name])
        try:
            config = dict(self.config)
            if name.startswith("llama"):
                config["llama"] = self.environment.llama_sources()
            log = self.environment.log("prepare-" + name)
            env = dict(os.environ, HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore", PYTHONDONTWRITEBYTECODE="1")
            run([self.environment.python, os.path.join(HERE, "prepare.py"), name, json.dumps(config)], PIP_LIMIT_S, log, env)
            with open(log, encoding="utf-8", errors="replace") as f:
                facts = json.loads([s for s in f.read().splitlines() if s.startswith("{")][-1])
        except NotThere as e:
            self.failed[name] = "%s cannot be made: %s" % (engines.PREPARED[name], e)
            raise NotThere(self.failed[name]) from None
        with open(stamp_path, "w", encoding="utf-8") as f:
            json.dump({"stamp": stamp, "facts": facts}, f)
        return path, facts
