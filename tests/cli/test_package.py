#!/usr/bin/env python3
"""What a build gives to others: symbols, an installed tree that programs link against, a build without OpenMP.

Reads RS_BUILD_DIR, RS_SOURCE_DIR, RS_TEST_MODELS, RS_PROGRAM, as CTest sets them.
"""

import os
import re
import shutil
import subprocess
import tempfile
import unittest

SOURCE = os.environ.get("RS_SOURCE_DIR") or os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.environ.get("RS_BUILD_DIR") or os.path.join(SOURCE, "build")
PROGRAM = os.environ.get("RS_PROGRAM") or os.path.join(BUILD, "rs")
MODEL = os.path.join(os.environ.get("RS_TEST_MODELS") or os.path.join(BUILD, "test-models"), "minilm-q8.rsw")
EMBED = os.path.join(SOURCE, "tests", "embed.c")
STRICT = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]


def cache(name):
    """A setting of the build under test."""
    with open(os.path.join(BUILD, "CMakeCache.txt"), encoding="utf-8") as f:
        found = re.search(r"^%s:\w+=(.*)$" % re.escape(name), f.read(), re.M)
    return found.group(1) if found else ""


class Case(unittest.TestCase):
    def call(self, command, env=None, **options):
        """Standard output of a command that must succeed."""
        result = subprocess.run([str(c) for c in command], env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}, capture_output=True, text=True,
                                check=False, **options)
        self.assertEqual(result.returncode, 0, "%s\n%s%s" % (command, result.stdout, result.stderr))
        return result.stdout

    def run_embed(self, program, env=None):
        """Run what was built from tests/embed.c, with a model where there is one; what it printed of the vectors."""
        self.assertIn("/nonexistent/no.rsw", self.call([program], env))
        if not os.path.exists(MODEL):
            return None
        out = self.call([program, MODEL, "How are you?", "naïve café 東京"], env)
        self.assertEqual(len(re.findall(r"norm 1\.0000 dim 384", out)), 2, out)
        return out


class Symbols(Case):
    @classmethod
    def setUpClass(cls):
        with open(os.path.join(SOURCE, "rs.h"), encoding="utf-8") as f:
            text = re.sub(r"/\*.*?\*/", "", f.read(), flags=re.S)
        cls.declared = set(re.findall(r"^RS_API [^(;]*?\b(rs_\w+)\(", text, re.M))

    def defined(self, *options):
        out = self.call(["nm", *options, "--defined-only"])
        return {line.split()[-1] for line in out.splitlines() if len(line.split()) == 3}

    def test_header(self):
        self.assertGreater(len(self.declared), 60)

    def test_shared(self):
        self.assertEqual(self.defined("-D", os.path.join(BUILD, "librs.so")), self.declared)

    def test_static(self):
        # A lock of OpenMP's, which clang names so, is one for a whole program by intent.
        found = {n for n in self.defined("-g", os.path.join(BUILD, "librs.a")) if not n.startswith(".gomp_")}
        self.assertEqual(found, self.declared)

    def test_soname(self):
        self.assertIn("[librs.so.0]", self.call(["readelf", "-d", os.path.join(BUILD, "librs.so")]))


class Sizes(Case):
    def test_stripped(self):
        """Program and library together stay small enough to be shipped with anything."""
        total = 0
        with tempfile.TemporaryDirectory(prefix="rs-size-") as tmp:
            for name in (PROGRAM, os.path.join(BUILD, "librs.so")):
                to = os.path.join(tmp, os.path.basename(name))
                self.call([cache("CMAKE_STRIP") or "strip", "-o", to, name])
                total += os.path.getsize(to)
        self.assertLessEqual(total, 2 << 20)
        print("program and library, stripped: %.2f MiB" % (total / (1 << 20)))


class Install(Case):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory(prefix="rs-install-")
        cls.tmp = cls.folder.name
        # Installed in one place and moved to another: nothing in it may depend on where it was.
        first, cls.prefix = os.path.join(cls.tmp, "first"), os.path.join(cls.tmp, "pre fix")
        subprocess.run(["cmake", "--install", BUILD, "--prefix", first], check=True, stdout=subprocess.DEVNULL)
        os.rename(first, cls.prefix)
        cls.lib = os.path.join(cls.prefix, cache("CMAKE_INSTALL_LIBDIR") or "lib")
        cls.cc, cls.cxx = cache("CMAKE_C_COMPILER") or "cc", cache("CMAKE_CXX_COMPILER") or "c++"

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def flags(self, *options):
        if not shutil.which("pkg-config"):
            self.skipTest("needs pkg-config")
        out = self.call(["pkg-config", *options, "--cflags", "--libs", "rs"],
                        {"PKG_CONFIG_PATH": os.path.join(self.lib, "pkgconfig")})
        return [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|\S)+", out)]

    def path(self, name):
        return os.path.join(self.tmp, name)

    def without_shared(self):
        """A library folder with librs.a alone, so that -lrs means that."""
        folder = self.path("static-only")
        if not os.path.exists(folder):
            os.makedirs(folder)
            shutil.copy(os.path.join(self.lib, "librs.a"), folder)
        return folder

    def test_files(self):
        found = set()
        for where, _, names in os.walk(self.prefix):
            found |= {os.path.relpath(os.path.join(where, n), self.prefix) for n in names}
        lib = os.path.relpath(self.lib, self.prefix)
        for name in ("include/rs.h", "bin/rs", lib + "/librs.a", lib + "/librs.so", lib + "/librs.so.0", lib + "/pkgconfig/rs.pc",
                     lib + "/cmake/rs/rs-config.cmake", "share/doc/rs/LICENSE"):
            self.assertIn(name, found)

    def test_program_moved(self):
        self.assertTrue(self.call([os.path.join(self.prefix, "bin", "rs"), "--version"]).strip())

    def test_destdir(self):
        stage = self.path("stage")
        self.call(["cmake", "--install", BUILD, "--prefix", "/opt/rs"], {"DESTDIR": stage})
        self.assertTrue(os.path.exists(stage + "/opt/rs/include/rs.h"))

    def test_uninstall(self):
        """What `make install` put there goes, whatever was installed from the build folder elsewhere in the meantime."""
        there, elsewhere = self.path("there"), self.path("elsewhere")
        make = ["make", "-C", SOURCE, "-o", "all", "BUILD=" + BUILD, "PREFIX=/usr/local", "DESTDIR=" + there]
        self.call([*make, "install"])
        self.assertTrue(os.path.exists(there + "/usr/local/include/rs.h"))
        self.call(["cmake", "--install", BUILD, "--prefix", "/opt/rs"], {"DESTDIR": elsewhere})
        self.call([*make, "uninstall"])
        self.assertEqual([names for _, _, names in os.walk(there) if names], [])
        self.assertTrue(os.path.exists(elsewhere + "/opt/rs/include/rs.h"))

    def test_header_alone(self):
        for compiler, options in ((self.cc, STRICT), (self.cxx, ["-std=c++17", *STRICT[1:]])):
            source = self.path("header.c" if compiler == self.cc else "header.cpp")
            with open(source, "w", encoding="utf-8") as f:
                f.write("#include <rs.h>\n")
            self.call([compiler, *options, "-fsyntax-only", "-I", os.path.join(self.prefix, "include"), source])

    def test_pkg_config_shared(self):
        program = self.path("pc_shared")
        self.call([self.cc, *STRICT, EMBED, "-o", program, *self.flags(), "-lm"])
        needed = self.call(["readelf", "-d", program])
        self.assertIn("librs.so.0", needed)
        self.assertNotIn("libstdc++", needed)
        self.run_embed(program, {"LD_LIBRARY_PATH": self.lib})

    def test_pkg_config_static(self):
        program = self.path("pc_static")
        self.call([self.cc, *STRICT, EMBED, "-o", program, "-L", self.without_shared(), *self.flags("--static")])
        self.assertNotIn("librs", self.call(["readelf", "-d", program]))
        self.run_embed(program)

    def test_static_in_cpp(self):
        """Templates that program and library both have must not get in each other's way."""
        source, program = self.path("mixed.cpp"), self.path("mixed")
        with open(source, "w", encoding="utf-8") as f:
            f.write("""
#include <rs.h>
#include <cstdio>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>
int main(int argc, char **argv) {
  std::vector<int32_t> ids; std::vector<float> floats; std::vector<rs_span> spans; std::vector<std::string> words;
  std::map<std::string, std::vector<int64_t>> map; std::shared_ptr<std::string> shared = std::make_shared<std::string>("x");
  for (int i = 0; i < 100; ++i) {
    ids.push_back(i); floats.push_back(float(i)); spans.push_back({}); words.push_back(std::to_string(i)); map[words.back()].push_back(i);
  }
  rs_model *model = nullptr;
  try {
    if (rs_model_load(argc > 1 ? argv[1] : "/nonexistent", nullptr, &model) != RS_OK) throw std::runtime_error(rs_last_error());
    rs_model_free(model);
  } catch (const std::exception &e) { std::puts(e.what()); }
  return ids.size() + floats.size() + spans.size() + words.size() + map.size() + shared->size() == 501 ? 0 : 1;
}
""")
        for optimise in ("-O0", "-O2"):
            self.call([self.cxx, "-std=c++17", optimise, source, "-o", program, "-L", self.without_shared(), *self.flags("--static")])
            self.assertIn("/nonexistent", self.call([program]))
            if os.path.exists(MODEL):
                self.assertEqual(self.call([program, MODEL]), "")

    def test_cmake(self):
        project, build = self.path("project"), self.path("project-build")
        os.makedirs(project)
        with open(os.path.join(project, "CMakeLists.txt"), "w", encoding="utf-8") as f:
            f.write("""
cmake_minimum_required(VERSION 3.22)
project(user LANGUAGES C)
find_package(rs 0.1 REQUIRED)
foreach(kind rs rs_static)
  add_executable(${kind}_user "%s")
  target_compile_options(${kind}_user PRIVATE %s)
  target_link_libraries(${kind}_user PRIVATE rs::${kind} m)
endforeach()
""" % (EMBED, " ".join(STRICT)))
        self.call(["cmake", "-S", project, "-B", build, "-DCMAKE_PREFIX_PATH=" + self.prefix, "-DCMAKE_C_COMPILER=" + self.cc])
        self.call(["cmake", "--build", build])
        self.assertIn("librs.so.0", self.call(["readelf", "-d", os.path.join(build, "rs_user")]))
        self.assertNotIn("librs", self.call(["readelf", "-d", os.path.join(build, "rs_static_user")]))
        self.assertEqual(self.run_embed(os.path.join(build, "rs_user")), self.run_embed(os.path.join(build, "rs_static_user")))

    def test_subproject(self):
        """add_subdirectory, with the library alone; what it configures is enough to know."""
        project, build = self.path("parent"), self.path("parent-build")
        os.makedirs(project)
        with open(os.path.join(project, "CMakeLists.txt"), "w", encoding="utf-8") as f:
            f.write("""
cmake_minimum_required(VERSION 3.22)
project(parent LANGUAGES C CXX)
add_subdirectory("%s" rs)
add_executable(user "%s")
target_link_libraries(user PRIVATE rs::rs_static m)
if(TARGET rs_program)
  message(FATAL_ERROR "a subproject builds no program")
endif()
""" % (SOURCE, EMBED))
        self.call(["cmake", "-S", project, "-B", build, "-DCMAKE_CXX_COMPILER=" + self.cxx, "-DCMAKE_C_COMPILER=" + self.cc])


class NoOpenMP(Case):
    def test_build(self):
        build = os.path.join(BUILD, "no-openmp")
        self.call(["cmake", "-S", SOURCE, "-B", build, "-DRS_OPENMP=OFF", "-DRS_TESTS=OFF", "-DRS_WERROR=" + cache("RS_WERROR"),
                   "-DCMAKE_CXX_COMPILER=" + cache("CMAKE_CXX_COMPILER"), "-DCMAKE_C_COMPILER=" + cache("CMAKE_C_COMPILER")])
        self.call(["cmake", "--build", build, "-j2", "--target", "rs_program"])
        program = os.path.join(build, "rs")
        self.assertIsNone(re.search(r"lib(g|i)?omp", self.call(["readelf", "-d", program])))
        self.call([program, "--version"])
        if not os.path.exists(MODEL):
            self.skipTest("built, not run: needs all-MiniLM-L6-v2, which could not be fetched and converted")
        texts = ["How are you?", "naïve café 東京", "a " * 300]
        embed = ["embed", "-m", MODEL, *texts]
        self.assertEqual(self.call([program, *embed]), self.call([PROGRAM, *embed]))


if __name__ == "__main__":
    unittest.main(verbosity=2)  # which says why a test skipped
