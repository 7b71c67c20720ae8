# The short way to build, try and test rs.  CMakeLists.txt does the work; `make help` lists what there is.

BUILD ?= build
PREFIX ?= /usr/local
OPENMP ?= 1
CUDA ?= 0
WERROR ?= 0
FUZZ_SECONDS ?= 60
FUZZ_CXX ?= $(or $(shell command -v clang++ || command -v clang++-14),clang++)
FUZZ_CC ?= $(subst ++,,$(FUZZ_CXX))
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

# make -j shares its jobs with the build below it; plain make lets that use all CPUs.
jobs = $(if $(findstring jobserver,$(MAKEFLAGS)),,-j $(JOBS))
# A setting that is given is kept by the build folder, so that `make install` installs what `make CUDA=1` built.
setting = $(if $(filter-out file,$(origin $1)),-DRS_$1=$(if $(filter 0,$($1)),OFF,ON))
CONFIGURE = cmake -S . $(call setting,OPENMP) $(call setting,WERROR) $(call setting,CUDA)
CTEST = tools/run-ctest --output-on-failure --test-dir
MODEL = build/models/all-MiniLM-L6-v2
DEMO_MODEL = build/models/minilm-q8.rsw
SOURCES = $(wildcard *.h *.cpp *.cu models/*.h models/*.cpp tools/*.h tools/*.cpp tests/*.h tests/*.cpp tests/*.c examples/*.c examples/*.cpp)

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := all
.PHONY: all deps demo test test-asan fuzz test-arm bench-peers bench-check results lint format install uninstall clean distclean help

# Targets that need more than a compiler install it first; all does not, so it says what is missing.
all: ## build build/rs, build/librs.a and build/librs.so (CUDA=1: and build/librs-cuda.so)
	@[ -e $(BUILD)/CMakeCache.txt ] || OPENMP=$(OPENMP) tools/install-deps --check build
	@$(CONFIGURE) -B $(BUILD) $(quiet)
	+@cmake --build $(BUILD) $(jobs) --target rs_parts

# CMake's own report is of use only when it fails.
quiet = > build.log 2>&1 || { cat build.log >&2; rm -f build.log; exit 1; }; grep '^-- No OpenMP' build.log; rm -f build.log

deps: ## install what is missing to build, try and test (apt, with sudo where not root)
	@OPENMP=$(OPENMP) tools/install-deps build demo test

demo: ## build, fetch a real model, convert it and compare a few sentences
	@OPENMP=$(OPENMP) tools/install-deps build demo
	+@$(MAKE) all
	@tools/fetch-model all-MiniLM-L6-v2 $(MODEL)
	@[ $(DEMO_MODEL) -nt $(BUILD)/rs ] || $(BUILD)/rs convert $(MODEL) -o $(DEMO_MODEL) --type q8
	@$(BUILD)/rs similarity -m $(DEMO_MODEL) \
	  "How do I reset my password?" \
	  "I forgot my login and can't get into my account." \
	  "The cat sleeps on the warm windowsill." \
	  "A kitten is napping in the sun." \
	  "Interest rates rose by half a percent." \
	  "The central bank made borrowing more expensive."

test: ## install what is missing, build and run every test
	@OPENMP=$(OPENMP) tools/install-deps build test
	@$(CONFIGURE) -B $(BUILD) -DRS_TESTS=ON $(quiet)
	+@cmake --build $(BUILD) $(jobs)
	@$(CTEST) $(BUILD)

test-asan: ## the same with AddressSanitizer and UndefinedBehaviorSanitizer, in build-asan
	@OPENMP=$(OPENMP) tools/install-deps build test
	@$(CONFIGURE) -B build-asan -DRS_TESTS=ON -DRS_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  "-DRS_MODEL_CACHE=$(CURDIR)/build/models" $(quiet)
	+@cmake --build build-asan $(jobs)
	@$(CTEST) build-asan

bench-peers: ## measure rs and its peers in turns, into docs/benchmarks.md (installs the peers, some GB; ARGS=--quick: a trial, elsewhere)
	@OPENMP=$(OPENMP) tools/install-deps build demo bench
	+@$(MAKE) all
	@tools/bench-peers --rs $(BUILD) $(ARGS)

results: ## measure what token dropping costs and saves, into docs/results.md (wants ../shared or RS_SHARED; ARGS=--quick: a trial)
	@OPENMP=$(OPENMP) tools/install-deps build demo bench
	+@$(MAKE) all
	@tools/results --rs $(BUILD) $(ARGS)

bench-check: ## fail where rs is more than 10 % slower than tests/bench-baseline.json says (ARGS=--update stores anew)
	@OPENMP=$(OPENMP) tools/install-deps build demo bench
	+@$(MAKE) all
	@tools/bench-check --rs $(BUILD) $(ARGS)

fuzz: ## spoilt images through the decoder for FUZZ_SECONDS (60), with clang and its sanitizers; finds stay in build-fuzz
	@OPENMP=0 tools/install-deps build fuzz
	@CC=$(FUZZ_CC) CXX=$(FUZZ_CXX) cmake -S . -B build-fuzz -DRS_FUZZ=ON -DRS_TOOLS=OFF -DRS_INSTALL=OFF -DRS_OPENMP=OFF \
	  -DRS_SANITIZE=address,undefined,fuzzer-no-link -DCMAKE_BUILD_TYPE=RelWithDebInfo $(quiet)
	+@cmake --build build-fuzz $(jobs) --target fuzz_image
	@mkdir -p build-fuzz/corpus
	cd build-fuzz && ./fuzz_image -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
	  corpus ../tests/images

test-arm: ## the NEON row of kernels: cross-compiled, run under qemu (skips where these cannot be had)
	@JOBS=$(JOBS) WERROR=$(WERROR) tests/test-arm build-arm

lint: ## check the layout of every source (clang-format) and look for mistakes (clang-tidy, shellcheck)
	@OPENMP=$(OPENMP) tools/install-deps build test lint
	clang-format-14 --dry-run -Werror $(SOURCES)
	shellcheck tools/install-deps tools/run-ctest tests/test-arm tests/gpu.sh .ci/run
	@CC=clang-14 CXX=clang++-14 $(CONFIGURE) -B build-lint -DRS_TESTS=ON -DCMAKE_EXPORT_COMPILE_COMMANDS=ON $(quiet)
	printf '%s\n' $(filter %.cpp %.c,$(SOURCES)) | xargs -P $(JOBS) -n 1 clang-tidy-14 -p build-lint --quiet

format: ## lay out every source as lint wants it
	clang-format-14 -i $(SOURCES)

install: all ## install to PREFIX (/usr/local), below DESTDIR if set
	@$(CONFIGURE) -B $(BUILD) -DCMAKE_INSTALL_PREFIX=$(PREFIX) $(quiet)
	@cmake --install $(BUILD)
	@cp $(BUILD)/install_manifest.txt $(BUILD)/installed.txt
	@[ -n "$(DESTDIR)" ] || ldconfig 2>/dev/null || true

# Not CMake's own list: whoever installs from the build folder elsewhere, as the tests do, writes that anew.
uninstall: ## remove what the last install put there
	xargs -d '\n' -I{} rm -fv "$(DESTDIR){}" < $(BUILD)/installed.txt

clean: ## remove all that was built; fetched models stay
	rm -rf build-arm build-asan build-fuzz build-gpu build-lint gpu
	[ ! -d $(BUILD) ] || find $(BUILD) -mindepth 1 -maxdepth 1 ! -name models -exec rm -rf {} +

distclean: clean ## remove the fetched models too
	rm -rf $(BUILD)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo "  settings: BUILD=build PREFIX=/usr/local DESTDIR= OPENMP=1 WERROR=0 JOBS=$(JOBS)"
