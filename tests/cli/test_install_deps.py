#!/usr/bin/env python3
"""tools/install-deps where every program it asks for is one that this test made."""

import os
import subprocess
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TOOL = os.path.join(ROOT, "tools", "install-deps")
# What a system has before anything is installed.
UTILITIES = ("sh", "sed", "awk", "cut", "tr", "cat", "env", "rm")
ALL_HEADERS = ("utf8proc.h", "stb/stb_image.h", "nlohmann/json.hpp", "CLI/CLI.hpp", "gtest/gtest.h")


class InstallDeps(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="rs-deps-")
        self.addCleanup(folder.cleanup)
        self.tmp = folder.name
        self.bin = os.path.join(self.tmp, "bin")
        self.include = os.path.join(self.tmp, "include")
        self.log = os.path.join(self.tmp, "log")
        os.makedirs(self.bin)
        for name in UTILITIES:
            found = [d + "/" + name for d in ("/usr/bin", "/bin") if os.path.exists(d + "/" + name)]
            os.symlink(found[0], os.path.join(self.bin, name))
        self.program("id", "echo 0")
        self.program("apt-get", 'echo "apt-get $*" >> "$LOG"; [ ! -e "$FAIL" ] || { rm "$FAIL"; exit 100; }')
        self.program("apt-cache", 'echo "apt-cache $*" >> "$LOG"; [ ! -e "$UNKNOWN" ]')
        for name in ("cc", "cmake", "pkg-config", "python3"):
            self.program(name, "exit 0")
        # A compiler that knows one question: which headers are there.
        self.program("c++", """
[ "$1" = --version ] && { echo c++ 1; exit 0; }
while read -r line; do
  case $line in
    "#if "*) header=${line#*<}; header=${header%>*} ;;
    missing*) [ -e "$INCLUDE/$header" ] || echo "$line" ;;
  esac
done""")
        for name in ALL_HEADERS:
            self.header(name)

    def program(self, name, text):
        path = os.path.join(self.bin, name)
        with open(path, "w", encoding="utf-8") as f:
            f.write("#!/bin/sh\n%s\n" % text)
        os.chmod(path, 0o755)

    def header(self, name):
        path = os.path.join(self.include, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8"):
            pass

    def remove(self, *names):
        for name in names:
            os.remove(os.path.join(self.include if name.endswith(("h", "hpp")) else self.bin, name))

    def touch(self, name):
        path = os.path.join(self.tmp, name)
        with open(path, "w", encoding="utf-8"):
            pass

    def run_tool(self, *args, **variables):
        env = {"PATH": self.bin, "LOG": self.log, "INCLUDE": self.include, "SSL_CERT_FILE": "/dev/null",
               "FAIL": os.path.join(self.tmp, "fail"), "UNKNOWN": os.path.join(self.tmp, "unknown"), **variables}
        result = subprocess.run([TOOL, *args], env=env, capture_output=True, text=True, timeout=60, check=False)
        calls = []
        if os.path.exists(self.log):
            with open(self.log, encoding="utf-8") as f:
                calls = [s for s in f.read().splitlines() if s.startswith("apt-get")]
            os.remove(self.log)
        return result, calls

    def installed(self, calls):
        return set(calls[-1].split("--no-install-recommends")[1].split())

    def test_all_there(self):
        result, calls = self.run_tool("build", "demo", "test")
        self.assertEqual((result.returncode, result.stdout, result.stderr, calls), (0, "", "", []))

    def test_installs_what_is_missing(self):
        self.remove("utf8proc.h", "cmake", "gtest/gtest.h")
        result, calls = self.run_tool("build", "demo")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(len(calls), 1)  # no update where the packages are known
        self.assertEqual(self.installed(calls), {"libutf8proc-dev", "cmake"})  # the demo needs no GoogleTest
        self.assertIn("libutf8proc-dev", result.stdout)
        self.assertIn("tables of the tokenizer", result.stdout)
        result, calls = self.run_tool("test")
        self.assertEqual(self.installed(calls), {"libutf8proc-dev", "cmake", "libgtest-dev"})

    def test_arm(self):
        _, calls = self.run_tool("arm")
        self.assertEqual(self.installed(calls), {"g++-aarch64-linux-gnu", "gcc-aarch64-linux-gnu", "qemu-user"})
        for name in ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-gcc", "qemu-aarch64"):
            self.program(name, "exit 0")
        self.assertEqual(self.run_tool("arm")[1], [])

    def test_no_compiler(self):
        self.remove("c++")
        _, calls = self.run_tool("build")
        self.assertEqual(self.installed(calls), {"g++", "libutf8proc-dev", "libstb-dev", "nlohmann-json3-dev", "libcli11-dev"})

    def test_python_without_pip(self):
        self.program("python3", "exit 1")
        _, calls = self.run_tool("demo")
        self.assertEqual(self.installed(calls), {"python3-pip"})

    def test_bench(self):
        result, calls = self.run_tool("bench")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(self.installed(calls), {"valgrind"})
        self.program("valgrind", "exit 0")
        self.program("python3", '[ "$2" != "import ensurepip" ]')
        _, calls = self.run_tool("bench")
        self.assertEqual(self.installed(calls), {"python3-venv"})

    def test_clang_wants_its_openmp(self):
        self.program("clang++", '[ "$1" = --version ] && { echo clang version 14; exit 0; }; exec c++ "$@"')
        result, calls = self.run_tool("build", CXX="clang++")
        self.assertEqual((result.returncode, self.installed(calls)), (0, {"libomp-dev"}), result.stderr)
        self.assertIn("threads with clang", result.stdout)
        self.assertEqual(self.run_tool("build", CXX="clang++", OPENMP="0")[1], [])  # which wants no threads
        self.assertEqual(self.run_tool("build")[1], [])  # c++ is no clang
        self.header("omp.h")
        self.assertEqual(self.run_tool("build", CXX="clang++")[1], [])

    def test_update_when_unknown_or_stale(self):
        self.remove("cmake")
        self.touch("unknown")
        result, calls = self.run_tool("build")
        self.assertEqual(result.returncode, 0)
        self.assertEqual([("update" in c) for c in calls], [True, False])
        os.remove(os.path.join(self.tmp, "unknown"))
        self.touch("fail")
        result, calls = self.run_tool("build")
        self.assertEqual(result.returncode, 0)
        self.assertEqual([("update" in c) for c in calls], [False, True, False])

    def test_apt_fails(self):
        self.remove("cmake")
        self.program("apt-get", "exit 100")
        result, _ = self.run_tool("build")
        self.assertEqual(result.returncode, 1)
        self.assertIn("'apt-get update' failed", result.stderr)

    def test_sudo(self):
        self.remove("cmake")
        self.program("id", "echo 1000")
        result, calls = self.run_tool("build")
        self.assertEqual((result.returncode, calls), (1, []))
        self.assertIn("as root, run 'apt-get install cmake'", result.stderr)
        self.program("sudo", 'echo "apt-get by sudo" >> "$LOG"; exec "$@"')
        result, calls = self.run_tool("build")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(calls[0], "apt-get by sudo")
        self.assertIn("sudo apt-get", result.stdout)

    def test_no_apt(self):
        self.remove("cmake", "CLI/CLI.hpp", "apt-get")
        result, _ = self.run_tool("build")
        self.assertEqual(result.returncode, 1)
        for word in ("cmake", "libcli11-dev", "no apt-get here"):
            self.assertIn(word, result.stderr)

    def test_check(self):
        self.remove("cmake", "utf8proc.h")
        result, calls = self.run_tool("--check", "build")
        self.assertEqual((result.returncode, calls, result.stdout), (1, [], ""))
        self.assertEqual(result.stderr, "install-deps: missing: cmake libutf8proc-dev (as Debian names them); 'make deps' installs them\n")

    def test_usage(self):
        for args in ((), ("--check",), ("everything",), ("--frob", "build")):
            self.assertEqual(self.run_tool(*args)[0].returncode, 2, args)


if __name__ == "__main__":
    unittest.main(verbosity=2)  # which says why a test skipped
