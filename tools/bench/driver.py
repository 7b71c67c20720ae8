"""Workers, and the turns they take; models and weights: what tools/bench-peers, tools/bench-check and tools/results share."""

import argparse
import array
import base64
import hashlib
import json
import math
import os
import random
import re
import select
import signal
import subprocess
import sys
import time

import engines
import rslib

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


class EngineError(Exception):
    """An engine cannot do what it was asked; the others can still."""


def note(text):
    print(text, file=sys.stderr, flush=True)


def write(path, text, told=True):
    """A file appears whole or not at all."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    part = path + ".part"
    with open(part, "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(part, path)
    if told:
        note("wrote %s" % path)


def commit():
    """What git calls these sources; "unknown" without git, and of sources out of a tarball: that these lie in another project's repository
    makes them no commit of it."""
    env = dict(os.environ, GIT_CEILING_DIRECTORIES=os.path.dirname(ROOT))
    try:
        found = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env=env, text=True, check=False).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


# ---------------------------------------------------------------------------------------------------- arguments

def comma_list(text):
    out = [s.strip() for s in text.split(",") if s.strip()]
    if not out:
        raise argparse.ArgumentTypeError("expected names with commas between them, got '%s'" % text)
    return out


def at_least(low, kind):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value < 1e6:
            raise argparse.ArgumentTypeError("expected a number from %g, got '%s'" % (low, text))
        return value
    return parse


# ---------------------------------------------------------------------------------------------------- workers

class Worker:
    """An engine in its process.  Between questions the process is stopped, so that whatever its threads spin on, they take no
    time from the engine whose turn it is."""

    def __init__(self, config, python, log_folder, timeout=600):
        self.name, self.timeout = config.get("name", config["engine"]), timeout
        os.makedirs(log_folder, exist_ok=True)
        self.log = os.path.join(log_folder, self.name.replace("@", "-") + ".log")
        env = dict(os.environ, OMP_NUM_THREADS=str(config["threads"]), RAYON_NUM_THREADS=str(config["threads"]),
                   TOKENIZERS_PARALLELISM="true" if config["threads"] > 1 else "false", HF_HUB_OFFLINE="1",
                   PYTHONWARNINGS="ignore", PYTHONDONTWRITEBYTECODE="1", OPENVINO_TELEMETRY_DISABLE="1")
        env.pop("RS_ISA", None)
        env["RS_DEVICE"] = config.get("device") or "cpu"
        isa = engines.isa_of(config["engine"])
        if isa:
            env["RS_ISA"] = isa
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([python, os.path.join(HERE, "worker.py"), json.dumps(config)], env=env,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self.rest = b""
        self.stopped = False

    def last_words(self):
        try:
            with open(self.log, encoding="utf-8", errors="replace") as f:
                lines = [s.strip() for s in f if s.strip()]
        except OSError:
            lines = []
        return lines[-1] if lines else "it said nothing"

    def send(self, question):
        if self.process.poll() is not None:
            raise EngineError("its process has ended (%s)" % self.last_words())
        self.wake()
        try:
            self.process.stdin.write(json.dumps(question).encode("utf-8") + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise EngineError("its process has ended (%s)" % self.last_words()) from None

    def receive(self):
        until = time.monotonic() + self.timeout
        fd = self.process.stdout.fileno()
        while b"\n" not in self.rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                self.close()
                raise EngineError("no answer within %d s" % self.timeout)
            data = os.read(fd, 1 << 20)
            if not data:
                status = self.process.wait()
                how = "by signal %d" % -status if status < 0 else "with exit status %d" % status
                raise EngineError("its process ended %s (%s)" % (how, self.last_words()))
            self.rest += data
        self.sleep()
        line, _, self.rest = self.rest.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def ask(self, what, **rest):
        self.send(dict(rest, do=what))
        return self.receive()

    def sleep(self):
        if not self.stopped and self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)
            self.stopped = True

    def wake(self):
        if self.stopped:
            self.process.send_signal(signal.SIGCONT)
            self.stopped = False

    @property
    def alive(self):
        return self.process.poll() is None

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def vectors(worker, name, count):
    """What the worker computes for a case: `count` arrays of floats."""
    values = array.array("f")
    values.frombytes(base64.b64decode(worker.ask("vectors", name=name)["floats"]))
    if count == 0 or len(values) % count:
        raise EngineError("%d values for %d vectors" % (len(values), count))
    dim = len(values) // count
    return [values[i * dim:(i + 1) * dim] for i in range(count)]


def take_turns(workers, name, rounds, seconds, warm=2, least=2, every_warm=True, cpu_time=False, into=None):
    """Ask the workers in turn, round after round, for calls of a case; each round begins with another one.
    {engine: [times of calls, or None, a round]} and {engine: reason} of those that failed; one that fails once is not asked again.
    warm: calls that are not counted, before each turn, or before the first one alone (every_warm false).
    into: a dict that has the former turn by turn, for those who are interrupted."""
    out, failed = {} if into is None else into, {}
    out.update((w.name, []) for w in workers)
    for r in range(rounds):
        shift = r % len(workers)
        for w in workers[shift:] + workers[:shift]:
            times = None
            if w.name not in failed:
                try:
                    times = w.ask("run", name=name, warm=warm if every_warm or r == 0 else 0, seconds=seconds, least=least,
                                  **{"cpu time": cpu_time})["times"]
                except EngineError as e:
                    failed[w.name] = str(e)
            out[w.name].append(times)
    return out, failed


def random_ids(case, vocab, seed=7):
    """Sequences of random ids for a case "BxS"."""
    count, length = map(int, case.split("x"))
    rng = random.Random(seed)
    first = min(1000, vocab // 2)
    return [[101 % vocab] + [rng.randrange(first, vocab) for _ in range(length - 2)] + [102 % vocab] for _ in range(count)]


# ---------------------------------------------------------------------------------------------------- the machine

INTERESTING_FLAGS = ("avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16 "
                     "asimd asimddp i8mm bf16 sve sve2").split()


def machine():
    """CPU, its flags, memory and system, as far as /proc tells."""
    facts = {"cpu": os.uname().machine, "flags": [], "system": "%s %s" % (os.uname().sysname, os.uname().release)}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            text = f.read().split("\n\n")[0]
        rows = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in text.splitlines() if ":" in line)
        facts["flags"] = [w for w in INTERESTING_FLAGS if w in (rows.get("flags") or rows.get("Features", "")).split()]
        parts = [rows[k] for k in ("cpu family", "model", "stepping", "CPU implementer", "CPU part") if k in rows]
        facts["cpu"] = "%s (%s)" % (rows.get("model name", facts["cpu"]), "/".join(parts))
    except OSError:
        pass
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            facts["memory"] = int(f.readline().split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    facts["cpus"], facts["bound to"] = available_cpus(), affinity_cpus()
    return facts


def affinity_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota_cpus(groups="/proc/self/cgroup", mounted="/sys/fs/cgroup"):
    """CPUs that cgroup quotas leave, in this process's group and every group around it, or None where there is no quota: as rs counts them
    (cgroup_cpus in rs.cpp), so that all engines get the threads that rs would take."""
    def numbers(path):
        try:
            with open(path, encoding="ascii") as f:
                return [float(word) for word in f.read().split()]
        except (OSError, ValueError):  # not there, or "max"
            return []

    least = None
    try:
        with open(groups, encoding="utf-8", errors="replace") as f:
            lines = [line.rstrip("\n").split(":", 2) for line in f]
    except OSError:
        return None
    for controllers, at in (line[1:] for line in lines if len(line) == 3):
        if controllers and "cpu" not in controllers:
            continue
        # Inside a container the path may be of the host, and the group is mounted at the root: that is the last one tried.
        while True:
            if controllers:
                found = numbers(mounted + "/cpu" + at + "/cpu.cfs_quota_us") + numbers(mounted + "/cpu" + at + "/cpu.cfs_period_us")
            else:
                found = numbers(mounted + at + "/cpu.max")
            if len(found) == 2 and min(found) > 0:  # a quota of -1 is none
                least = min(found[0] / found[1], least or math.inf)
            if "/" not in at:
                break
            at = at[:at.rindex("/")]
    return max(1, math.ceil(least)) if least else None


def available_cpus():
    """Those that this process may run on, or what a quota leaves of them."""
    return min(affinity_cpus(), quota_cpus() or affinity_cpus())


# ---------------------------------------------------------------------------------------------------- the model

def model_facts(folder):
    """What peers must be told of a model folder.  Only what all of them can do is measured: BERT, mean or first-token pooling."""
    def read(name, default=None):
        path = os.path.join(folder, *name.split("/"))
        try:
            with open(path, encoding="utf-8") as f:
                return json.load(f)
        except FileNotFoundError:
            if default is None:
                raise ValueError("%s is missing" % path) from None
            return default
        except ValueError as e:
            raise ValueError("%s: %s" % (path, e)) from None

    config = read("config.json")
    if config.get("model_type") != "bert":
        raise ValueError("%s/config.json: model_type is %r, wanted 'bert'" % (folder, config.get("model_type")))
    pooling = read("1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    modes = [k for k, v in pooling.items() if k.startswith("pooling_mode_") and v is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError("%s/1_Pooling/config.json: %s: wanted mean or cls" % (folder, ", ".join(modes) or "no pooling mode"))
    limit = config["max_position_embeddings"]
    return {"pooling": known[modes[0]], "pad_id": config.get("pad_token_id", 0), "vocab": config["vocab_size"], "positions": limit,
            "max_tokens": min(read("sentence_bert_config.json", {}).get("max_seq_length") or limit, limit)}


def model_digest(folder):
    digest = hashlib.sha256()
    with open(os.path.join(folder, "model.safetensors"), "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def weights_folder(build, model, digest):
    """Where all weights made from a model are kept."""
    return os.path.abspath(os.path.join(build, "bench", "%s-%s" % (os.path.basename(os.path.abspath(model)), digest[:8])))


def program_files(build):
    """The program of a build folder, and the shared library with the kernels, which it finds beside itself: where the program is a link,
    beside what that points to."""
    program = os.path.join(build, "rs")
    return [program, rslib.library_path(os.path.dirname(os.path.realpath(program)))]


def rs_weights(build, model, folder, kinds):
    """Weight files of rs, converted again where the program or the model is newer."""
    program, paths = os.path.join(build, "rs"), {}
    if not os.access(program, os.X_OK):
        raise FileNotFoundError("%s is missing: build it with 'make', or name its folder with --rs" % program)
    os.makedirs(folder, exist_ok=True)
    source = os.path.join(model, "model.safetensors")
    newest = max(os.path.getmtime(p) for p in program_files(build) + [source])
    for kind in kinds:
        paths[kind] = path = os.path.join(folder, "rs-%s.rsw" % kind)
        if os.path.exists(path) and os.path.getmtime(path) > newest:
            continue
        note("rs convert --type %s" % kind)
        result = subprocess.run([program, "convert", model, "-o", path, "--type", kind], stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError("rs convert --type %s: exit status %d: %s" % (kind, result.returncode, result.stderr.strip()))
    return paths


def ensure_model(folder):
    """The folder with a model; the default one is fetched where it is missing."""
    if os.path.exists(os.path.join(folder, "model.safetensors")):
        return
    name = os.path.basename(os.path.normpath(folder))
    if os.path.normpath(folder) != os.path.normpath(default_model()):
        raise FileNotFoundError("%s holds no model.safetensors: fetch it with 'tools/fetch-model NAME %s'" % (folder, folder))
    if subprocess.run([sys.executable, os.path.join(ROOT, "tools", "fetch-model"), name, folder], check=False).returncode != 0:
        raise RuntimeError("cannot fetch %s: see above" % name)


def default_model():
    return os.path.join(ROOT, "build", "models", "all-MiniLM-L6-v2")


def builtin_texts():
    """The texts that rs convert calibrates on, out of its source: short and long, of many kinds."""
    path = os.path.join(ROOT, "tools", "calibration.cpp")
    with open(path, encoding="utf-8") as f:
        body = f.read().split("calibration_texts", 1)[-1]
    texts, literal = [], r'"(?:[^"\\]|\\.)*"'
    for item in re.findall(r"(?:%s\s*)+[,}]" % literal, body):
        texts.append("".join(json.loads(s) for s in re.findall(literal, item)))
    if len(texts) < 50:
        raise ValueError("%s: found %d texts, wanted at least 50" % (path, len(texts)))
    return texts
