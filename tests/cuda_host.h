// What rs-cuda.cu needs of CUDA, for the CPU: its device primitives (section 1 there has the same for the card) and the part of the
// runtime that a backend calls.  Every thread of a block is a fiber.  Kernels are checked as they run:
//
//    collectives    all 32 lanes of a warp come to the same one, all threads of a block to the same block_sync
//    shared memory  no access outside, none of what nobody wrote, none of what cp_async16 has under way, and no two accesses of a
//    byte
//                   by different threads, one of them a write, without a block_sync between (or, in one warp, a warp_sync:
//                   shuffles, ldmatrix and mma order nothing)
//    global memory  what lies around an allocation stays as it is, looked at after each launch
//
// What breaks that is a fault: the launch returns cudaErrorLaunchFailure, and cuda_host::last_fault() says what was wrong.  Unlike
// on a card, later launches work again.  Launches and copies are done when the call returns.  Calls fail as on a card: launches on
// a stream of another device than the thread's, those of more shared memory than was asked for, and what may not be called while a
// stream captures.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_HOST_ASAN 1
#endif
#endif
#ifndef CUDA_HOST_ASAN
#define CUDA_HOST_ASAN 0
#endif

#if CUDA_HOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#include <sys/mman.h>
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define RS_KERNEL(threads, blocks) [[maybe_unused]] void
#define RS_DEVICE [[maybe_unused]] inline

// ================================================================================ types of the runtime

// Values as in driver_types.h.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorJitCompilationDisabled = 223,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorUnknown = 999
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2
};

namespace cuda_host {
struct graph {
  std::vector<std::function<cudaError_t()>> steps;
};
struct stream {
  int device = 0;
  std::unique_ptr<graph> captured;  // while it captures
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;            // that began to
  std::atomic<bool> invalid{false};  // something was called that makes the capture be of no use: any thread may have
};
struct event {
  std::chrono::steady_clock::time_point when;
  bool recorded = false;
};
}  // namespace cuda_host

using cudaStream_t = cuda_host::stream *;
using cudaGraph_t = cuda_host::graph *;
struct cuda_host_executable;  // a type of its own, so that the two kinds of graph are not mixed up
using cudaGraphExec_t = cuda_host_executable *;
using cudaEvent_t = cuda_host::event *;

// ================================================================================ settings and faults

namespace cuda_host {

struct settings_type {
  uint64_t seed = 0;     // of the order of threads, warps and blocks.  One but 0: blocks on one CPU, unless threads says more
  bool check = true;     // shared memory and what lies around allocations.  Off: much faster
  unsigned threads = 0;  // CPUs that take blocks.  0: all
  size_t memory_limit = size_t(4) << 30;  // of the device
  size_t pinned_limit = size_t(4) << 30;  // of an allocation of page-locked memory
  size_t shared_limit = 163 * 1024;       // of a block
  int devices = 1;
  int capability = 80;                       // of each
  bool waits = true;                         // every thread of a kernel calls wait_for_previous
  std::map<std::string, cudaError_t> fails;  // calls that fail, and how
};

// RS_CUDA_HOST="seed=3,check=0,threads=2,cudaFuncGetAttributes=209"
inline settings_type settings_of_environment() {
  settings_type s;
  const char *text = std::getenv("RS_CUDA_HOST");
  const std::string all = text ? text : "";
  for (size_t at = 0; at < all.size();) {
    const size_t end = std::min(all.find(',', at), all.size());
    const std::string part = all.substr(at, end - at);
    at = end + 1;
    const size_t equals = part.find('=');
    if (equals == std::string::npos) continue;
    const std::string name = part.substr(0, equals);
    const uint64_t v = std::strtoull(part.c_str() + equals + 1, nullptr, 10);
    if (name == "seed") s.seed = v;
    if (name == "check") s.check = v != 0;
    if (name == "threads") s.threads = static_cast<unsigned>(v);
    if (name == "memory_limit") s.memory_limit = v;
    if (name == "pinned_limit") s.pinned_limit = v;
    if (name == "shared_limit") s.shared_limit = v;
    if (name == "devices") s.devices = static_cast<int>(v);
    if (name == "capability") s.capability = static_cast<int>(v);
    if (name.rfind("cuda", 0) == 0) s.fails[name] = static_cast<cudaError_t>(v);
  }
  return s;
}
inline settings_type settings = settings_of_environment();

struct fault_log {
  std::mutex lock;
  std::string text, described;  // described: what cudaGetErrorString returned last, which must live on
};
inline fault_log faults;
inline std::atomic<uint64_t> launch_count{0};
inline thread_local cudaError_t last_error = cudaSuccess;

inline std::string last_fault() {
  const std::lock_guard<std::mutex> guard(faults.lock);
  return faults.text;
}
// Kernels that ran, those of graphs too.
inline uint64_t launches() { return launch_count; }

inline cudaError_t failed(cudaError_t e) {
  if (e != cudaSuccess) last_error = e;
  return e;
}

// A test's word on a call that is about to be made, on the thread that makes it: an error that it fails with, or cudaSuccess.
inline std::function<cudaError_t(const std::string &call)> interfere;
inline cudaError_t injected(const char *call) {
  const auto i = settings.fails.find(call);
  return failed(i != settings.fails.end() ? i->second : interfere ? interfere(call) : cudaSuccess);
}

struct rng {  // xorshift64*
  uint64_t state = 1;
  void start(uint64_t a, uint64_t b) {  // splitmix64, so that near seeds are far apart
    uint64_t z = a * 0x9e3779b97f4a7c15u + b * 0xd1342543de82ef95u + 0x2545f4914f6cdd1du;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    state = (z ^ (z >> 31)) | 1;
  }
  uint32_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<uint32_t>((state * 0x2545f4914f6cdd1du) >> 32);
  }
};
// The first bit that is set from a random one on.
inline int pick_bit(uint32_t mask, uint32_t random) {
  const unsigned r = random & 31;
  const uint32_t turned = r ? (mask >> r) | (mask << (32 - r)) : mask;
  return static_cast<int>((static_cast<unsigned>(__builtin_ctz(turned)) + r) & 31);
}

// ================================================================================ fibers

// A place to go on at.  Fibers stay on one thread of the system.
struct context {
#if defined(__x86_64__) || defined(__aarch64__)
  void *sp = nullptr, *fp = nullptr, *ip = nullptr;
#else
  ucontext_t state = {};
#endif
  const void *bottom = nullptr;  // of its stack
  size_t size = 0;
  void *fake = nullptr;  // AddressSanitizer's
};

// The compiler saves what it needs around the switch, as all registers are named as lost.
__attribute__((noinline)) inline void jump(context *from, context *to) {
#if defined(__x86_64__)
  asm volatile(
      "movq %%rsp, 0(%0)\n\t"
      "movq %%rbp, 8(%0)\n\t"
      "leaq 1f(%%rip), %%rax\n\t"
      "movq %%rax, 16(%0)\n\t"
      "movq 0(%1), %%rsp\n\t"
      "movq 8(%1), %%rbp\n\t"
      "jmp *16(%1)\n"
      "1:\n\t"
      : "+D"(from), "+S"(to)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4",
        "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
#ifdef __AVX512F__
        "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",
        "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7",
#endif
        "cc", "memory");
#elif defined(__aarch64__)
  register context *a asm("x0") = from;
  register context *b asm("x1") = to;
  asm volatile(
      "mov x9, sp\n\t"
      "stp x9, x29, [x0]\n\t"
      "adr x9, 1f\n\t"
      "str x9, [x0, #16]\n\t"
      "ldp x9, x29, [x1]\n\t"
      "ldr x10, [x1, #16]\n\t"
      "mov sp, x9\n\t"
      "br x10\n"
      "1:\n\t"
      : "+r"(a), "+r"(b)
      :
      : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17", "x19", "x20", "x21",
        "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10",
        "v11", "v12", "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27",
        "v28", "v29", "v30", "v31", "cc", "memory");
#else
  swapcontext(&from->state, &to->state);
#endif
}

// last: `from` is not gone on with.
inline void transfer(context &from, context &to, [[maybe_unused]] bool last) {
#if CUDA_HOST_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.bottom, to.size);
#endif
  jump(&from, &to);
#if CUDA_HOST_ASAN
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

constexpr size_t stack_bytes = CUDA_HOST_ASAN ? 256 * 1024 : 64 * 1024;
constexpr size_t stack_guard = 64 * 1024;  // of the largest pages in use

// Stacks of a warp, with a page before each that ends what runs out of it.
struct warp_stacks {
  char *base;
  static constexpr size_t each = stack_bytes + stack_guard;
  warp_stacks() {
    void *p = mmap(nullptr, 32 * each, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    base = static_cast<char *>(p);
    for (int i = 0; i < 32; ++i) {
      if (mprotect(of(i), stack_bytes, PROT_READ | PROT_WRITE) != 0) std::abort();
    }
  }
  ~warp_stacks() {
    unpoison();
    munmap(base, 32 * each);
  }
  warp_stacks(const warp_stacks &) = delete;
  warp_stacks &operator=(const warp_stacks &) = delete;
  char *of(int lane) const { return base + static_cast<size_t>(lane) * each + stack_guard; }
  void unpoison() const {
#if CUDA_HOST_ASAN
    for (int i = 0; i < 32; ++i) __asan_unpoison_memory_region(of(i), stack_bytes);
#endif
  }
};

// ================================================================================ a block

constexpr int max_threads = 1024;

enum class collective : uint8_t {
  warp_sync,
  shuffle_xor,
  shuffle,
  ballot,
  ldmatrix,
  ldmatrix_transposed,
  mma_s8u8,
  mma_f16,
  mma_bf16,
  multiply_s8u8
};
inline const char *name_of(collective c) {
  constexpr const char *names[] = {"warp_sync", "shuffle_xor", "shuffle",  "ballot",       "ldmatrix_x4", "ldmatrix_x4_transposed",
                                   "mma_s8u8",  "mma_f16",     "mma_bf16", "multiply_s8u8"};
  return names[static_cast<int>(c)];
}

// What multiply_s8u8 adds to c once it is waited for.
struct async_sums {
  int32_t (*c)[4];
  int32_t sum[8][4];
};

struct async_copy {
  unsigned char *to;
  const void *from;
  int bytes, group, line;
};

struct fiber {
  context at;
  int line = 0;  // of the last collective or barrier
  bool returned = false, waited = false;
  int groups = 0;  // committed
  std::vector<async_copy> copies;
  // Of products that read shared memory by themselves.
  bool begun = false, fenced = true;  // multiply_begin; fence_shared behind the last copy that landed
  uint32_t landed = 0;                // epoch of that
  std::vector<async_sums> sums;
};

struct warp_state {
  uint32_t exists, runnable, arrived;  // lanes.  arrived: at a collective
  uint32_t syncs;                      // since the last block_sync
  collective kind;
  int line, first;
  void *frame[32];  // what each lane brought to the collective
};

// Who accessed a byte since the last block_sync.  Of several threads one is kept.
struct access {
  static constexpr uint16_t none = 0xffff, several_lanes = 0x400, several_warps = 0x800, index = 0x3ff;
  uint32_t syncs;  // that the warp had behind it
  uint16_t who;
  uint16_t line;
};
enum class touch : uint8_t { read, write, add, fly, land };  // fly, land: cp_async16

struct cell {
  access write, read, add;
  uint32_t epoch;   // block_syncs before, over all blocks of the worker: what is older is in order
  uint16_t flying;  // thread + 1
  bool written, split;
};

struct job {
  std::function<void()> body;
  dim3 grid;
  int threads;
  size_t bytes;
  std::vector<uint32_t> order;  // of blocks
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::string fault;  // of the first that failed
};

// What runs blocks, one at a time, on a thread of the system.
struct worker {
  context main;
  int thread = 0;
  dim3 block, grid;
  const std::function<void()> *body = nullptr;

  int threads = 0, waiting = 0, returned = 0;
  int barrier_line = 0, barrier_first = 0;
  uint32_t warps_runnable = 0;
  rng random;
  warp_state warps[32];
  std::vector<fiber> fibers;
  std::vector<std::unique_ptr<warp_stacks>> stacks;

  unsigned char *memory = nullptr;  // of the block
  size_t bytes = 0, memory_room = 0;
  std::unique_ptr<unsigned char[]> memory_storage;
  std::vector<cell> words, singles;  // a word of which not all bytes have the same history is split into four singles
  uint32_t epoch = 0, first_epoch = 0;

  bool faulted = false;
  char text[512];
};

inline thread_local worker *current = nullptr;
inline bool checking = true;  // settings.check, of the last launch

[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fault(worker &w, const char *format, ...) {
  const int n = std::snprintf(w.text, sizeof w.text, "block (%u, %u): ", w.block.x, w.block.y);
  va_list args;
  va_start(args, format);
  std::vsnprintf(w.text + n, sizeof w.text - static_cast<size_t>(n), format, args);
  va_end(args);
  w.faulted = true;
  transfer(w.fibers[static_cast<size_t>(w.thread)].at, w.main, true);
  std::abort();
}

[[noreturn]] inline void stuck(worker &w, const warp_state &warp, int number) {
  const int missing = __builtin_ctz(~warp.arrived);
  const char *name = name_of(warp.kind);
  if (!(warp.exists >> missing & 1)) {
    fault(w, "%s at line %d in warp %d, which has only %d threads", name, warp.line, number, __builtin_popcount(warp.exists));
  }
  const fiber &other = w.fibers[static_cast<size_t>(number * 32 + missing)];
  if (other.returned) {
    fault(w, "mismatched collectives in warp %d: lane %d is at %s line %d, lane %d has returned", number, warp.first, name,
          warp.line, missing);
  }
  fault(w, "mismatched collectives in warp %d: lane %d is at %s line %d, lane %d at block_sync line %d", number, warp.first, name,
        warp.line, missing, other.line);
}

inline void go(worker &w, int next, bool last) {
  if (next == w.thread) return;
  fiber &from = w.fibers[static_cast<size_t>(w.thread)];
  w.thread = next;
  transfer(from.at, w.fibers[static_cast<size_t>(next)].at, last);
}
inline int pick_in_warp(worker &w, int warp) { return warp * 32 + pick_bit(w.warps[warp].runnable, w.random.next()); }

// Another thread, as this one waits or has returned: of its warp, else of another one.
inline int pick(worker &w) {
  const int warp = w.thread / 32;
  if (w.warps[warp].runnable) return pick_in_warp(w, warp);
  if (w.warps[warp].arrived) stuck(w, w.warps[warp], warp);
  w.warps_runnable &= ~(1u << warp);
  if (!w.warps_runnable) return -1;
  return pick_in_warp(w, pick_bit(w.warps_runnable, w.random.next()));
}
inline void leave(worker &w) {
  const int next = pick(w);
  if (next < 0) fault(w, "threads wait for ever");  // returned threads and barriers are looked at before
  go(w, next, false);
}
inline void yield(worker &w) { go(w, pick_in_warp(w, pick_bit(w.warps_runnable, w.random.next())), false); }

inline void sync_block(int line) {
  worker &w = *current;
  fiber &self = w.fibers[static_cast<size_t>(w.thread)];
  warp_state &warp = w.warps[w.thread / 32];
  self.line = line;
  if (w.returned) {
    int other = 0;
    while (!w.fibers[static_cast<size_t>(other)].returned) ++other;
    fault(w, "divergent barrier at line %d: thread %d waits, thread %d has returned", line, w.thread, other);
  }
  if (w.waiting == 0) {
    w.barrier_line = line, w.barrier_first = w.thread;
  } else if (w.barrier_line != line) {
    fault(w, "divergent barrier at line %d: thread %d waits at line %d, thread %d at line %d", line, w.barrier_first,
          w.barrier_line, w.thread, line);
  }
  warp.runnable &= ~(1u << (w.thread & 31));
  if (++w.waiting < w.threads) {
    leave(w);
    return;
  }
  w.waiting = 0;
  ++w.epoch;
  const int warps = (w.threads + 31) / 32;
  for (int i = 0; i < warps; ++i) w.warps[i].runnable = w.warps[i].exists, w.warps[i].syncs = 0;
  w.warps_runnable = warps == 32 ? ~0u : (1u << warps) - 1;
  yield(w);
}

// run(frames) is called once, when all lanes are here.
template <class F>
inline void converge(collective kind, int line, void *frame, F run) {
  worker &w = *current;
  const int lane = w.thread & 31;
  warp_state &warp = w.warps[w.thread / 32];
  w.fibers[static_cast<size_t>(w.thread)].line = line;
  if (warp.arrived == 0) {
    warp.kind = kind, warp.line = line, warp.first = lane;
  } else if (warp.kind != kind || warp.line != line) {
    fault(w, "mismatched collectives in warp %d: lane %d is at %s line %d, lane %d at %s line %d", w.thread / 32, warp.first,
          name_of(warp.kind), warp.line, lane, name_of(kind), line);
  }
  warp.frame[lane] = frame;
  warp.arrived |= 1u << lane;
  if (warp.arrived == ~0u) {
    run(w, warp);
    warp.arrived = 0;
    warp.runnable = ~0u;
    if (checking && (w.random.next() & 3) == 0) yield(w);
  } else {
    warp.runnable &= ~(1u << lane);
    leave(w);
  }
}

// ================================================================================ shared memory

inline bool conflicts(const access &a, int thread, uint32_t syncs) {
  if (a.who == access::none || a.who == thread) return false;
  if (a.who & access::several_warps) return true;
  if ((a.who & access::index) / 32 != thread / 32) return true;
  return a.syncs == syncs;
}
inline void remember(access &a, int thread, uint32_t syncs, int line) {
  const access now = {syncs, static_cast<uint16_t>(thread), static_cast<uint16_t>(line)};
  if (a.who == access::none) {
    a = now;
  } else if ((a.who & access::index) / 32 != thread / 32) {
    a.who |= access::several_warps;
  } else if (!(a.who & access::several_warps)) {
    if (a.syncs != syncs) a = now;
    else if (a.who != thread) a.who |= access::several_lanes;
  }
}

[[noreturn]] inline void race(worker &w, size_t offset, int thread, int line, const char *does, const access &a, const char *did) {
  const int other = a.who & access::index;
  const char *more = a.who & (access::several_lanes | access::several_warps) ? " and others" : "";
  fault(w, "race on byte %zu of shared memory: thread %d %s it at line %d, thread %d%s %s it at line %d, and no barrier between",
        offset, thread, does, line, other, more, did, a.line);
}

inline void visit(worker &w, cell &c, size_t offset, touch how, int thread, int line) {
  constexpr access nobody = {0, access::none, 0};
  constexpr const char *names[] = {"reads", "writes", "adds to", "copies to", "copies to"};
  const char *does = names[static_cast<int>(how)];
  const uint32_t syncs = w.warps[thread / 32].syncs;
  if (c.epoch < w.first_epoch) c = {nobody, nobody, nobody, w.epoch, 0, false, false};
  if (c.epoch != w.epoch) c.write = c.read = c.add = nobody, c.epoch = w.epoch;
  if (c.flying && how != touch::land) {
    fault(w, "%s of shared memory in flight: thread %d %s byte %zu at line %d, to which thread %d copies",
          how == touch::read ? "read" : "write", thread, does, offset, line, c.flying - 1);
  }
  if (!c.written && (how == touch::read || how == touch::add)) {
    fault(w, "read of uninitialised shared memory: thread %d %s byte %zu at line %d", thread, does, offset, line);
  }
  if (how != touch::land) {
    if (conflicts(c.write, thread, syncs)) race(w, offset, thread, line, does, c.write, "wrote");
    if (how != touch::read && conflicts(c.read, thread, syncs)) race(w, offset, thread, line, does, c.read, "read");
    if (how != touch::add && conflicts(c.add, thread, syncs)) race(w, offset, thread, line, does, c.add, "added to");
  }
  if (how == touch::read) {
    remember(c.read, thread, syncs, line);
  } else if (how == touch::add) {
    remember(c.add, thread, syncs, line);
  } else {
    c.write = {syncs, static_cast<uint16_t>(thread), static_cast<uint16_t>(line)};
    c.read = c.add = nobody;
    if (how != touch::fly) c.written = true;
    c.flying = how == touch::fly ? static_cast<uint16_t>(thread + 1) : 0;
  }
}

// Looks at an access of `size` bytes at p, by a thread of the block, and notes it.
__attribute__((noinline)) inline void note(worker &w, touch how, int thread, const void *p, size_t size, size_t alignment,
                                           int line) {
  const intptr_t at = reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(w.memory);
  if (at < 0 || static_cast<size_t>(at) + size > w.bytes) {
    fault(w, "access outside of shared memory: thread %d, %zu bytes at %zd of %zu at line %d", thread, size,
          static_cast<ssize_t>(at), w.bytes, line);
  }
  const size_t first = static_cast<size_t>(at), end = first + size;
  if (first % alignment != 0) {
    fault(w, "misaligned access of shared memory: thread %d, byte %zu, alignment %zu at line %d", thread, first, alignment, line);
  }
  for (size_t i = first; i < end;) {
    const size_t begin = i / 4 * 4, stop = std::min(end, begin + 4);
    cell &c = w.words[begin / 4];
    if (c.split && c.epoch < w.first_epoch) c.split = false;
    const bool whole = stop - i == 4;
    if (whole && !c.split) {
      visit(w, c, i, how, thread, line);
    } else {
      if (!c.split) {
        for (size_t k = 0; k < 4; ++k) w.singles[begin + k] = c;
        c.split = true;
        if (c.epoch < w.first_epoch) c.epoch = w.first_epoch;
      }
      for (size_t k = i; k < stop; ++k) visit(w, w.singles[k], k, how, thread, line);
      if (whole && (how == touch::write || how == touch::fly || how == touch::land)) c = w.singles[begin];
    }
    i = stop;
  }
}
inline void note(touch how, const void *p, size_t size, size_t alignment, int line) {
  note(*current, how, current->thread, p, size, alignment, line);
}

inline void land(worker &w, const async_copy &c) {
  if (c.bytes > 0) std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
  std::memset(c.to + c.bytes, 0, 16 - static_cast<size_t>(c.bytes));
  if (checking) note(w, touch::land, w.thread, c.to, 16, 16, c.line);
  fiber &self = w.fibers[static_cast<size_t>(w.thread)];
  self.fenced = false, self.landed = w.epoch;
}

// An index, and the line that it stands in.
struct index_at {
  int i, line;
  index_at(int i_, int line_ = __builtin_LINE()) : i(i_), line(line_) {}
};

// An element of shared memory.  Only what s[i] gives can be read or assigned to: a name for it (auto v = s[i]), which would be read
// again wherever it is used, does not compile.
template <class T>
struct element {
  static_assert(std::is_trivially_copyable_v<T>);

  element(T *p, int line) : p_(p), line_(line) {}
  element(const element &) = default;
  ~element() = default;
  operator T() && { return get(); }
  element &operator=(const T &v) && {
    put(v);
    return *this;
  }
  element &operator=(const element &o) && {
    if (this != &o) put(o.get());
    return *this;
  }
  template <class U>
  element &operator+=(const U &v) && {
    return put(static_cast<T>(get() + v));
  }
  template <class U>
  element &operator-=(const U &v) && {
    return put(static_cast<T>(get() - v));
  }
  template <class U>
  element &operator*=(const U &v) && {
    return put(static_cast<T>(get() * v));
  }
  template <class U>
  element &operator|=(const U &v) && {
    return put(static_cast<T>(get() | v));
  }
  T operator++() && {
    const T after = static_cast<T>(get() + 1);
    put(after);
    return after;
  }
  T operator++(int) && {
    const T before = get();
    put(static_cast<T>(before + 1));
    return before;
  }

 private:
  T *p_;
  int line_;

  T get() const {
    if (checking) note(touch::read, p_, sizeof(T), alignof(T), line_);
    T v;
    std::memcpy(static_cast<void *>(&v), p_, sizeof v);
    return v;
  }
  element &put(const T &v) {
    if (checking) note(touch::write, p_, sizeof(T), alignof(T), line_);
    std::memcpy(static_cast<void *>(p_), &v, sizeof v);
    return *this;
  }
};

// ================================================================================ matrices

struct mma_frame {
  void *c;
  const uint32_t *a, *b;
};
struct ldmatrix_frame {
  const unsigned char *row;
  uint32_t *r;
};

inline float half_to_float(uint16_t h) {
  // Moved to where a float has exponent and mantissa, the exponent is 112 too small, which a product mends, of denormals too.
  const uint32_t bits = static_cast<uint32_t>(h & 0x7fff) << 13;
  float v;
  std::memcpy(&v, &bits, 4);
  v *= 0x1p112f;
  uint32_t r;
  std::memcpy(&r, &v, 4);
  r |= static_cast<uint32_t>(h & 0x8000) << 16 | ((h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0);
  std::memcpy(&v, &r, 4);
  return v;
}
inline float bfloat_to_float(uint16_t h) {
  const uint32_t r = static_cast<uint32_t>(h) << 16;
  float v;
  std::memcpy(&v, &r, 4);
  return v;
}
// To nearest, ties to even; what is too large is infinite; every NaN is 0x7fff.
inline uint16_t float_to_half(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // from 65520 on
  if (magnitude < 0x38800000) {  // below 2^-14: the sum is rounded at 2^-24, the last place of a half
    float m;
    std::memcpy(&m, &magnitude, 4);
    m += 0.5f;
    uint32_t r;
    std::memcpy(&r, &m, 4);
    return static_cast<uint16_t>(sign | (r - 0x3f000000));
  }
  const uint32_t rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}
inline uint16_t float_to_bfloat(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void run_ldmatrix(worker &w, const warp_state &warp, bool transposed) {
  uint16_t m[32][8];
  const int first = w.thread & ~31;
  for (int lane = 0; lane < 32; ++lane) {
    const auto &f = *static_cast<const ldmatrix_frame *>(warp.frame[lane]);
    if (checking) note(w, touch::read, first + lane, f.row, 16, 16, warp.line);
    std::memcpy(m[lane], f.row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto &f = *static_cast<const ldmatrix_frame *>(warp.frame[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = transposed ? m[8 * j + 2 * t][g] : m[8 * j + g][2 * t];
      const uint32_t high = transposed ? m[8 * j + 2 * t + 1][g] : m[8 * j + g][2 * t + 1];
      f.r[j] = low | high << 16;
    }
  }
}

inline void run_mma_s8u8(const warp_state &warp) {
  alignas(64) int8_t a8[16][32];
  alignas(64) uint8_t b8[8][32];  // by columns
  for (int lane = 0; lane < 32; ++lane) {
    const auto &f = *static_cast<const mma_frame *>(warp.frame[lane]);
    const int g = lane / 4, t = lane % 4;
    std::memcpy(&a8[g][4 * t], &f.a[0], 4);
    std::memcpy(&a8[g + 8][4 * t], &f.a[1], 4);
    std::memcpy(&a8[g][4 * t + 16], &f.a[2], 4);
    std::memcpy(&a8[g + 8][4 * t + 16], &f.a[3], 4);
    std::memcpy(&b8[g][4 * t], &f.b[0], 4);
    std::memcpy(&b8[g][4 * t + 16], &f.b[1], 4);
  }
  alignas(64) int16_t a[16 * 32], b[8 * 32];
  for (int i = 0; i < 16 * 32; ++i) a[i] = a8[i / 32][i % 32];
  for (int i = 0; i < 8 * 32; ++i) b[i] = b8[i / 32][i % 32];
  int32_t sum[16][8];
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      int32_t s = 0;
      for (int k = 0; k < 32; ++k) s += a[32 * i + k] * b[32 * j + k];
      sum[i][j] = s;
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto *c = static_cast<int32_t *>(static_cast<const mma_frame *>(warp.frame[lane])->c);
    const int g = lane / 4, t = lane % 4;
    for (int k = 0; k < 4; ++k) {  // wraps
      c[k] = static_cast<int32_t>(static_cast<uint32_t>(c[k]) + static_cast<uint32_t>(sum[g + k / 2 * 8][2 * t + k % 2]));
    }
  }
}

struct multiply_frame {
  int32_t (*c)[4];
  const uint32_t *a;
  unsigned char *b;
};

// The 16 rows of a warp.  The sums are with async_sums until multiply_end; what lies in c till then is of no use.
inline void run_multiply(worker &w, const warp_state &warp) {
  const int first = w.thread & ~31;
  const auto &f0 = *static_cast<const multiply_frame *>(warp.frame[0]);
  const ptrdiff_t at = f0.b - w.memory;
  if (at % 32 != 0 || at % 512 >= 64)
    fault(w, "multiply_s8u8 at line %d: b begins at byte %td, not in a row of 512", warp.line, at);
  if (checking) {
    for (int i = 0; i < w.threads; ++i) {
      const fiber &f = w.fibers[static_cast<size_t>(i)];
      if (!f.fenced && f.landed != w.epoch)
        fault(w, "multiply_s8u8 at line %d: a copy of thread %d has no fence_shared behind it", warp.line, i);
    }
  }
  static thread_local uint8_t b[64][32];
  for (int i = 0; i < 64; ++i)
    for (int chunk = 0; chunk < 2; ++chunk) {
      const ptrdiff_t plain = at + i * 64 + chunk * 16, place = plain ^ ((plain >> 7 & 3) << 4);
      if (checking) note(w, touch::read, first, w.memory + place, 16, 16, warp.line);
      std::memcpy(&b[i][chunk * 16], w.memory + place, 16);
    }
  int8_t a[16][32];
  for (int lane = 0; lane < 32; ++lane) {
    const auto &f = *static_cast<const multiply_frame *>(warp.frame[lane]);
    if (f.b != f0.b) fault(w, "multiply_s8u8 at line %d: lanes differ in b", warp.line);
    if (!w.fibers[static_cast<size_t>(first + lane)].begun) fault(w, "multiply_s8u8 at line %d: no multiply_begin", warp.line);
    for (int i = 0; i < 4; ++i) std::memcpy(&a[lane / 4 + i % 2 * 8][lane % 4 * 4 + i / 2 * 16], &f.a[i], 4);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto &f = *static_cast<const multiply_frame *>(warp.frame[lane]);
    std::vector<async_sums> &all = w.fibers[static_cast<size_t>(first + lane)].sums;
    auto to = std::find_if(all.begin(), all.end(), [&](const async_sums &s) { return s.c == f.c; });
    if (to == all.end()) {
      async_sums fresh;
      fresh.c = f.c;
      std::memcpy(fresh.sum, f.c, sizeof(fresh.sum));
      std::memset(f.c, 0xa5, sizeof(fresh.sum));
      to = all.insert(all.end(), fresh);
    }
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 4; ++j) {
        uint32_t sum = static_cast<uint32_t>(to->sum[i][j]);  // wraps
        for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(a[lane / 4 + j / 2 * 8][k] * b[i * 8 + lane % 4 * 2 + j % 2][k]);
        to->sum[i][j] = static_cast<int32_t>(sum);
      }
  }
}

// Products are exact, and added in float in the order of k.  The card adds several at once, in an order and with roundings of its
// own.
template <float (*to_float)(uint16_t)>
inline void run_mma_16(const warp_state &warp) {
  alignas(64) uint16_t a16[16][16], b16[16][8];
  alignas(64) float c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto &f = *static_cast<const mma_frame *>(warp.frame[lane]);
    const int g = lane / 4, t = lane % 4;
    std::memcpy(&a16[g][2 * t], &f.a[0], 4);
    std::memcpy(&a16[g + 8][2 * t], &f.a[1], 4);
    std::memcpy(&a16[g][2 * t + 8], &f.a[2], 4);
    std::memcpy(&a16[g + 8][2 * t + 8], &f.a[3], 4);
    for (int k = 0; k < 2; ++k) {
      b16[2 * t + 8 * k][g] = static_cast<uint16_t>(f.b[k]);
      b16[2 * t + 8 * k + 1][g] = static_cast<uint16_t>(f.b[k] >> 16);
    }
    std::memcpy(&c[g][2 * t], static_cast<const float *>(f.c), 8);
    std::memcpy(&c[g + 8][2 * t], static_cast<const float *>(f.c) + 2, 8);
  }
  alignas(64) float a[16 * 16], b[16 * 8];
  for (int i = 0; i < 16 * 16; ++i) a[i] = to_float(a16[i / 16][i % 16]);
  for (int i = 0; i < 16 * 8; ++i) b[i] = to_float(b16[i / 8][i % 8]);
  for (int i = 0; i < 16; i += 2) {  // two rows at once, as each waits for its sums
    float sum[2][8];
    std::memcpy(sum, c[i], sizeof sum);
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) sum[0][j] += a[16 * i + k] * b[8 * k + j];
      for (int j = 0; j < 8; ++j) sum[1][j] += a[16 * i + 16 + k] * b[8 * k + j];
    }
    std::memcpy(c[i], sum, sizeof sum);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto *r = static_cast<float *>(static_cast<const mma_frame *>(warp.frame[lane])->c);
    const int g = lane / 4, t = lane % 4;
    std::memcpy(r, &c[g][2 * t], 8);
    std::memcpy(r + 2, &c[g + 8][2 * t], 8);
  }
}

// ================================================================================ running a grid

// A thread of a block, from its begin to its end.
[[noreturn]] inline void thread_main() {
  worker &w = *current;
#if CUDA_HOST_ASAN
  const void *bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!w.main.bottom) w.main.bottom = bottom, w.main.size = size;
#endif
  (*w.body)();
  fiber &self = w.fibers[static_cast<size_t>(w.thread)];
  if (!self.copies.empty()) {
    fault(w, "thread %d returns with a cp_async16, of line %d, that it did not wait for", w.thread, self.copies.front().line);
  }
  if (!self.sums.empty()) fault(w, "thread %d returns with a multiply_s8u8 that it did not wait for", w.thread);
  if (settings.waits && !self.waited) fault(w, "thread %d returns without wait_for_previous", w.thread);
  if (w.waiting) {
    fault(w, "divergent barrier at line %d: thread %d waits, thread %d has returned", w.barrier_line, w.barrier_first, w.thread);
  }
  self.returned = true;
  ++w.returned;
  w.warps[w.thread / 32].runnable &= ~(1u << (w.thread & 31));
  const int next = pick(w);
  if (next < 0) transfer(self.at, w.main, true);
  else go(w, next, true);
  std::abort();
}

inline void begin_fiber(worker &w, int thread) {
  const int lane = thread % 32;
  fiber &f = w.fibers[static_cast<size_t>(thread)];
  char *stack = w.stacks[static_cast<size_t>(thread / 32)]->of(lane);
  // Stacks that begin at the same place of a page would share few lines of a cache.
  char *top = stack + stack_bytes - 64 - 128 * lane;
#if CUDA_HOST_ASAN
  __asan_unpoison_memory_region(top - 2048, 2048 + 64);
#endif
  f.at.bottom = stack;
  f.at.size = stack_bytes;
  f.at.fake = nullptr;
#if defined(__x86_64__) || defined(__aarch64__)
  f.at.sp = top;
#if defined(__x86_64__)
  std::memset(top - 8, 0, 8);  // where a caller's address would be
  f.at.sp = top - 8;
#endif
  f.at.fp = nullptr;
  f.at.ip = reinterpret_cast<void *>(&thread_main);
#else
  getcontext(&f.at.state);
  f.at.state.uc_stack.ss_sp = stack;
  f.at.state.uc_stack.ss_size = static_cast<size_t>(top - stack);
  f.at.state.uc_link = nullptr;
  makecontext(&f.at.state, reinterpret_cast<void (*)()>(&thread_main), 0);
#endif
  f.line = 0;
  f.returned = false;
  f.groups = 0;
  f.copies.clear();
  f.waited = f.begun = false, f.fenced = true;
  f.sums.clear();
}

// False: w.text says why not.
inline bool run_block(worker &w, const job &j, uint32_t number) {
  const int warps = (j.threads + 31) / 32;
  w.block = dim3(number % j.grid.x, number / j.grid.x % j.grid.y, number / j.grid.x / j.grid.y);
  w.grid = j.grid;
  w.body = &j.body;
  w.threads = j.threads;
  w.waiting = w.returned = 0;
  w.random.start(settings.seed, number);
  w.warps_runnable = warps == 32 ? ~0u : (1u << warps) - 1;
  if (w.fibers.empty()) w.fibers.resize(max_threads);
  while (w.stacks.size() < static_cast<size_t>(warps)) w.stacks.push_back(std::make_unique<warp_stacks>());
  if (w.faulted) {  // fibers were left where they were
    for (const auto &s : w.stacks) s->unpoison();
    w.faulted = false;
  }
  for (int i = 0; i < warps; ++i) {
    warp_state &s = w.warps[i];
    const int n = std::min(32, j.threads - 32 * i);
    s.exists = s.runnable = n == 32 ? ~0u : (1u << n) - 1;
    s.arrived = s.syncs = 0;
  }
  for (int i = 0; i < j.threads; ++i) begin_fiber(w, i);
  if (w.memory_room < j.bytes || !w.memory) {
    w.memory_room = j.bytes;
    w.memory_storage.reset(new unsigned char[j.bytes + 128]);
    const uintptr_t at = reinterpret_cast<uintptr_t>(w.memory_storage.get());
    w.memory = w.memory_storage.get() + ((128 - at % 128) % 128);
  }
  w.bytes = j.bytes;
  std::memset(w.memory, 0xff, j.bytes);
  if (checking && w.singles.size() < j.bytes + 4) w.words.resize(j.bytes / 4 + 1), w.singles.resize(j.bytes + 4);
  w.first_epoch = ++w.epoch;

  w.thread = pick_in_warp(w, pick_bit(w.warps_runnable, w.random.next()));
  w.main.bottom = nullptr;
  transfer(w.main, w.fibers[static_cast<size_t>(w.thread)].at, false);
  return !w.faulted;
}

struct worker_pool {
  std::mutex lock;
  std::vector<std::unique_ptr<worker>> idle;
};
inline worker_pool pool;

inline void work(job &j) {
  std::unique_ptr<worker> w;
  {
    const std::lock_guard<std::mutex> guard(pool.lock);
    if (!pool.idle.empty()) w = std::move(pool.idle.back()), pool.idle.pop_back();
  }
  if (!w) w = std::make_unique<worker>();
  current = w.get();
  while (!j.failed) {
    const size_t i = j.next++;
    if (i >= j.order.size()) break;
    if (!run_block(*w, j, j.order[i])) {
      const std::lock_guard<std::mutex> guard(faults.lock);
      if (!j.failed) j.fault = w->text;
      j.failed = true;
    }
  }
  current = nullptr;
  const std::lock_guard<std::mutex> guard(pool.lock);
  pool.idle.push_back(std::move(w));
}

// ================================================================================ memory

constexpr size_t red_zone = 1024;
// Around allocations, by address: read as float, f16 or bf16, it is NaN.
constexpr unsigned char red_bytes[2] = {0xa5, 0xff};
inline void paint(unsigned char *from, size_t n) {
  for (size_t i = 0; i < n; ++i) from[i] = red_bytes[reinterpret_cast<uintptr_t>(from + i) % 2];
}

struct allocation {
  unsigned char *storage;
  size_t bytes;
  uint64_t number;  // the how manieth cudaMalloc
  int device;
};
struct device_memory {
  std::mutex lock;
  std::map<uintptr_t, allocation> all;
  std::map<int, size_t> used;  // by device
  uint64_t count = 0;
};
inline device_memory memory;

// What is wrong around an allocation, or nothing.
inline std::string look_around(const allocation &a) {
  const unsigned char *begin = a.storage, *data = begin + red_zone, *end = data + a.bytes + red_zone, *at = begin;
  while (at < end && (at == data || *at == red_bytes[reinterpret_cast<uintptr_t>(at) % 2])) at += at == data ? a.bytes : 1;
  if (at == end) return "";
  return "write outside of device memory: offset " + std::to_string(at - data) + " of allocation " + std::to_string(a.number) +
         " of " + std::to_string(a.bytes) + " bytes";
}
// The same of all, mended so that it is said once.
inline std::string look_around_all() {
  const std::lock_guard<std::mutex> guard(memory.lock);
  std::string text;
  for (const auto &[at, a] : memory.all) {
    const std::string wrong = look_around(a);
    if (wrong.empty()) continue;
    if (text.empty()) text = wrong;
    paint(a.storage, red_zone);
    paint(a.storage + red_zone + a.bytes, red_zone);
  }
  return text;
}
// The device that such memory is of, or -1: it is the host's.
inline int device_of(const void *p, size_t bytes) {
  const std::lock_guard<std::mutex> guard(memory.lock);
  const auto at = reinterpret_cast<uintptr_t>(p);
  auto i = memory.all.upper_bound(at);
  if (i == memory.all.begin()) return -1;
  --i;
  return at - i->first <= i->second.bytes && bytes <= i->second.bytes - (at - i->first) ? i->second.device : -1;
}

inline cudaError_t fail_launch(const std::string &text) {
  const std::lock_guard<std::mutex> guard(faults.lock);
  faults.text = text;
  return failed(cudaErrorLaunchFailure);
}

inline cudaError_t run_grid(dim3 grid, int threads, size_t bytes, const std::function<void()> &body) {
  ++launch_count;
  job j;
  j.body = body, j.grid = grid, j.threads = threads, j.bytes = bytes;
  j.order.resize(size_t(grid.x) * grid.y * grid.z);
  rng random;
  random.start(settings.seed, ~uint64_t(0));
  for (size_t i = 0; i < j.order.size(); ++i) {
    j.order[i] = static_cast<uint32_t>(i);
    std::swap(j.order[i], j.order[random.next() % (i + 1)]);
  }
  checking = settings.check;
  size_t n = settings.threads;
  if (n == 0) n = settings.seed ? 1 : std::max(1u, std::thread::hardware_concurrency());
  n = std::min(n, j.order.size());
  std::vector<std::thread> others;
  for (size_t i = 1; i < n; ++i) others.emplace_back([&j] { work(j); });
  work(j);
  for (std::thread &t : others) t.join();
  const std::string around = settings.check ? look_around_all() : "";
  if (j.failed) return fail_launch(j.fault);
  if (!around.empty()) return fail_launch(around);
  return cudaSuccess;
}

// ================================================================================ streams and graphs

inline thread_local int device = 0;
inline int device_of_stream(const stream *s) { return s ? s->device : device; }

struct capture_state {
  std::mutex lock;
  std::vector<stream *> all;  // that capture
};
inline capture_state captures;

// A call that captures forbid fails, and makes them be of no use.
template <class F>
bool forbidden_by(F which) {
  const std::lock_guard<std::mutex> guard(captures.lock);
  bool any = false;
  for (stream *s : captures.all)
    if (which(*s)) s->invalid = any = true;
  return any;
}
// For what might wait for a capture.  By its mode a capture forbids that to all threads, to its own, or to none.
inline bool forbidden() {
  return forbidden_by([](const stream &s) {
    return s.mode == cudaStreamCaptureModeGlobal ||
           (s.mode == cudaStreamCaptureModeThreadLocal && s.thread == std::this_thread::get_id());
  });
}
// For what surely does, on any thread and in any mode.
inline bool device_captures() {
  return forbidden_by([](const stream &s) { return s.device == device; });
}
inline void end_capture(stream *s) {
  const std::lock_guard<std::mutex> guard(captures.lock);
  captures.all.erase(std::remove(captures.all.begin(), captures.all.end(), s), captures.all.end());
}

inline cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> step) {
  if (!stream || !stream->captured) return failed(step());
  if (stream->invalid) return failed(cudaErrorStreamCaptureInvalidated);
  stream->captured->steps.push_back(std::move(step));
  return cudaSuccess;
}

}  // namespace cuda_host

struct cuda_host_executable {
  cuda_host::graph steps;
};

// ================================================================================ the runtime

inline const char *cudaGetErrorName(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInitializationError:
      return "cudaErrorInitializationError";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorJitCompilerNotFound:
      return "cudaErrorJitCompilerNotFound";
    case cudaErrorUnsupportedPtxVersion:
      return "cudaErrorUnsupportedPtxVersion";
    case cudaErrorJitCompilationDisabled:
      return "cudaErrorJitCompilationDisabled";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorUnknown:
      break;
  }
  return "cudaErrorUnknown";
}
inline const char *cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInitializationError:
      return "initialization error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorJitCompilerNotFound:
      return "PTX JIT compiler library not found";
    case cudaErrorUnsupportedPtxVersion:
      return "the provided PTX was compiled with an unsupported toolchain.";
    case cudaErrorJitCompilationDisabled:
      return "PTX JIT compilation was disabled";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorLaunchFailure: {
      const std::lock_guard<std::mutex> guard(cuda_host::faults.lock);
      cuda_host::faults.described = "unspecified launch failure: " + cuda_host::faults.text;
      return cuda_host::faults.described.c_str();
    }
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorUnknown:
      break;
  }
  return "unknown error";
}
inline cudaError_t cudaPeekAtLastError() { return cuda_host::last_error; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t e = cuda_host::last_error;
  cuda_host::last_error = cudaSuccess;
  return e;
}

// ---------------------------------------------------------------------------------------------------- the device

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlock;
  int regsPerBlock, warpSize, maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
  size_t totalConstMem;
  int major, minor, multiProcessorCount, integrated, concurrentKernels, ECCEnabled, pciBusID, pciDeviceID, pciDomainID;
  int asyncEngineCount, unifiedAddressing, memoryBusWidth, l2CacheSize, maxThreadsPerMultiProcessor;
  size_t sharedMemPerMultiprocessor;
  int regsPerMultiprocessor, managedMemory, isMultiGpuBoard;
  size_t sharedMemPerBlockOptin;
  int maxBlocksPerMultiProcessor;
  size_t reservedSharedMemPerBlock;
};
enum cudaDeviceAttr {
  cudaDevAttrClockRate = 13,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMemoryClockRate = 36,
  cudaDevAttrGlobalMemoryBusWidth = 37,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

inline cudaError_t cudaGetDeviceCount(int *n) {
  *n = cuda_host::settings.devices;
  return *n > 0 ? cudaSuccess : cuda_host::failed(cudaErrorNoDevice);
}
namespace cuda_host {
inline cudaError_t device_error(int d) {
  if (settings.devices <= 0) return failed(cudaErrorNoDevice);
  return d >= 0 && d < settings.devices ? cudaSuccess : failed(cudaErrorInvalidDevice);
}
}  // namespace cuda_host
inline cudaError_t cudaSetDevice(int device) {
  const cudaError_t e = cuda_host::device_error(device);
  if (e == cudaSuccess) cuda_host::device = device;
  return e;
}
inline cudaError_t cudaGetDevice(int *device) {
  *device = cuda_host::device;
  return cuda_host::device_error(*device);
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int device) {
  const cudaError_t e = cuda_host::device_error(device);
  if (e != cudaSuccess) return e;
  *out = {};
  std::snprintf(out->name, sizeof out->name, "host shim");
  out->totalGlobalMem = cuda_host::settings.memory_limit;
  out->sharedMemPerBlock = 48 * 1024;
  out->sharedMemPerBlockOptin = cuda_host::settings.shared_limit;
  out->sharedMemPerMultiprocessor = cuda_host::settings.shared_limit + 1024;
  out->reservedSharedMemPerBlock = 1024;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->warpSize = 32;
  out->maxThreadsPerBlock = cuda_host::max_threads;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024, out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 0x7fffffff, out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->totalConstMem = 65536;
  out->major = cuda_host::settings.capability / 10, out->minor = cuda_host::settings.capability % 10;
  out->multiProcessorCount = 1;
  out->concurrentKernels = out->unifiedAddressing = out->asyncEngineCount = 1;
  out->memoryBusWidth = 64;
  out->l2CacheSize = 1 << 20;
  out->maxThreadsPerMultiProcessor = 2048;
  out->maxBlocksPerMultiProcessor = 32;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *out, cudaDeviceAttr attribute, int device) {
  const cudaError_t e = cuda_host::device_error(device);
  if (e != cudaSuccess) return e;
  switch (attribute) {
    case cudaDevAttrClockRate:
      *out = 1000000;
      break;  // kHz
    case cudaDevAttrMultiProcessorCount:
      *out = 1;
      break;
    case cudaDevAttrMemoryClockRate:
      *out = 1000000;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *out = 64;
      break;
    case cudaDevAttrL2CacheSize:
      *out = 1 << 20;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *out = 8;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *out = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *out = static_cast<int>(cuda_host::settings.shared_limit);
      break;
    default:
      return cuda_host::failed(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int *v) {
  *v = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int *v) {
  *v = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return cuda_host::device_captures() ? cuda_host::failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------- memory

inline cudaError_t cudaMalloc(void **out, size_t bytes) {
  using namespace cuda_host;
  *out = nullptr;
  if (forbidden()) return failed(cudaErrorStreamCaptureUnsupported);
  const cudaError_t e = device_error(device);
  if (e != cudaSuccess) return e;
  if (bytes == 0) return cudaSuccess;
  const std::lock_guard<std::mutex> guard(memory.lock);
  size_t &used = memory.used[device];
  if (bytes > settings.memory_limit || used > settings.memory_limit - bytes) return failed(cudaErrorMemoryAllocation);
  const size_t all = (bytes + 2 * red_zone + 255) / 256 * 256;
  auto *storage = static_cast<unsigned char *>(std::aligned_alloc(256, all));
  if (!storage) return failed(cudaErrorMemoryAllocation);
  paint(storage, all);
  std::memset(storage + red_zone, 0xff, bytes);
  used += bytes;
  *out = storage + red_zone;
  memory.all[reinterpret_cast<uintptr_t>(*out)] = {storage, bytes, memory.count++, device};
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMalloc(T **out, size_t bytes) {
  void *p = nullptr;
  const cudaError_t e = cudaMalloc(&p, bytes);
  *out = static_cast<T *>(p);
  return e;
}
inline cudaError_t cudaFree(void *p) {
  using namespace cuda_host;
  if (!p) return cudaSuccess;
  if (forbidden()) return failed(cudaErrorStreamCaptureUnsupported);
  std::string wrong;
  {
    const std::lock_guard<std::mutex> guard(memory.lock);
    const auto i = memory.all.find(reinterpret_cast<uintptr_t>(p));
    if (i == memory.all.end()) return failed(cudaErrorInvalidValue);
    wrong = look_around(i->second);
    memory.used[i->second.device] -= i->second.bytes;
    std::free(i->second.storage);
    memory.all.erase(i);
  }
  return wrong.empty() ? cudaSuccess : fail_launch(wrong);
}
template <class T>
cudaError_t cudaMallocHost(T **out, size_t bytes) {
  using namespace cuda_host;
  *out = nullptr;
  if (forbidden()) return failed(cudaErrorStreamCaptureUnsupported);
  if (bytes > settings.pinned_limit) return failed(cudaErrorMemoryAllocation);
  const size_t all = (std::max<size_t>(bytes, 1) + 255) / 256 * 256;
  void *p = std::aligned_alloc(256, all);
  if (!p) return failed(cudaErrorMemoryAllocation);
  std::memset(p, 0xff, all);
  *out = static_cast<T *>(p);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void *p) {
  if (p && cuda_host::forbidden()) return cuda_host::failed(cudaErrorStreamCaptureUnsupported);
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  const std::lock_guard<std::mutex> guard(cuda_host::memory.lock);
  *total = cuda_host::settings.memory_limit;
  *unused = *total - std::min(*total, cuda_host::memory.used[cuda_host::device]);
  return cudaSuccess;
}

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};
namespace cuda_host {
// Memory of another device than the stream's is none: on a card that may work, but who copies so has mixed something up.
inline cudaError_t check_copy(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind, const stream *s) {
  if (bytes == 0 || kind == cudaMemcpyDefault) return cudaSuccess;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  const int there = device_of_stream(s);
  return device_of(to, bytes) == (to_device ? there : -1) && device_of(from, bytes) == (from_device ? there : -1)
             ? cudaSuccess
             : failed(cudaErrorInvalidValue);
}
}  // namespace cuda_host
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream = nullptr) {
  const cudaError_t e = cuda_host::check_copy(to, from, bytes, kind, stream);
  if (e != cudaSuccess) return e;
  return cuda_host::submit(stream, [=] {
    if (bytes > 0) std::memmove(to, from, bytes);
    return cudaSuccess;
  });
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
  if (cuda_host::forbidden()) return cuda_host::failed(cudaErrorStreamCaptureUnsupported);
  return cudaMemcpyAsync(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream = nullptr) {
  if (bytes > 0 && cuda_host::device_of(to, bytes) != cuda_host::device_of_stream(stream))
    return cuda_host::failed(cudaErrorInvalidValue);
  return cuda_host::submit(stream, [=] {
    if (bytes > 0) std::memset(to, value, bytes);
    return cudaSuccess;
  });
}
inline cudaError_t cudaMemset(void *to, int value, size_t bytes) {
  if (cuda_host::forbidden()) return cuda_host::failed(cudaErrorStreamCaptureUnsupported);
  return cudaMemsetAsync(to, value, bytes);
}

// ---------------------------------------------------------------------------------------------------- streams, graphs, events

constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned /*flags*/) {
  const cudaError_t e = cuda_host::device_error(cuda_host::device);
  *out = nullptr;
  if (e != cudaSuccess) return e;
  *out = new cuda_host::stream;
  (*out)->device = cuda_host::device;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithFlags(out, cudaStreamDefault); }
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
  if (s) cuda_host::end_capture(s);
  delete s;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  if (!s || !s->captured) return cudaSuccess;
  s->invalid = true;
  return cuda_host::failed(cudaErrorStreamCaptureUnsupported);
}
inline cudaError_t cudaStreamQuery(cudaStream_t s) { return cudaStreamSynchronize(s); }

inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
  if (!s) return cuda_host::failed(cudaErrorStreamCaptureUnsupported);
  if (s->captured) return cuda_host::failed(cudaErrorInvalidValue);
  const cudaError_t e = cuda_host::injected("cudaStreamBeginCapture");
  if (e != cudaSuccess) return e;
  const std::lock_guard<std::mutex> guard(cuda_host::captures.lock);
  s->captured = std::make_unique<cuda_host::graph>();
  s->mode = mode, s->thread = std::this_thread::get_id(), s->invalid = false;
  cuda_host::captures.all.push_back(s);
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *out) {
  *out = nullptr;
  if (!s || !s->captured) return cuda_host::failed(cudaErrorInvalidValue);
  const cudaError_t e = cuda_host::injected("cudaStreamEndCapture");
  cuda_host::end_capture(s);
  std::unique_ptr<cuda_host::graph> g = std::move(s->captured);
  if (e != cudaSuccess) return e;
  if (s->invalid) return cuda_host::failed(cudaErrorStreamCaptureInvalidated);
  *out = g.release();
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t g, unsigned long long /*flags*/ = 0) {
  *out = nullptr;
  if (!g) return cuda_host::failed(cudaErrorInvalidValue);
  const cudaError_t e = cuda_host::injected("cudaGraphInstantiate");
  if (e != cudaSuccess) return e;
  *out = new cuda_host_executable{*g};
  return cudaSuccess;
}
inline cudaError_t cudaGraphUpload(cudaGraphExec_t g, cudaStream_t /*stream*/) {
  return g ? cudaSuccess : cuda_host::failed(cudaErrorInvalidValue);
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t s) {
  if (!g) return cuda_host::failed(cudaErrorInvalidValue);
  if (s && s->captured) return cuda_host::failed(cudaErrorStreamCaptureUnsupported);
  for (const auto &step : g->steps.steps) {
    const cudaError_t e = step();
    if (e != cudaSuccess) return cuda_host::failed(e);
  }
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t g) {
  delete g;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) {
  delete g;
  return cudaSuccess;
}

constexpr unsigned cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2;
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned /*flags*/) {
  *out = new cuda_host::event;
  return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, cudaEventDefault); }
// While a stream captures, it orders what is captured, and no time is taken.
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = nullptr) {
  if (!e) return cuda_host::failed(cudaErrorInvalidResourceHandle);
  if (s && s->captured) return cudaSuccess;
  e->when = std::chrono::steady_clock::now();
  e->recorded = true;
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  return e ? cudaSuccess : cuda_host::failed(cudaErrorInvalidResourceHandle);
}
inline cudaError_t cudaEventQuery(cudaEvent_t e) { return cudaEventSynchronize(e); }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t /*stream*/, cudaEvent_t e, unsigned /*flags*/ = 0) {
  return cudaEventSynchronize(e);
}
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  if (!from || !to || !from->recorded || !to->recorded) return cuda_host::failed(cudaErrorInvalidResourceHandle);
  *ms = std::chrono::duration<float, std::milli>(to->when - from->when).count();
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete e;
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------- kernels

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA, maxDynamicSharedSizeBytes;
};

namespace cuda_host {
constexpr int least_shared = 48 * 1024;  // that a block has without being asked
struct shared_limits {
  std::mutex lock;
  std::map<std::pair<int, const void *>, int> all;  // by device and kernel
};
inline shared_limits limits;
inline int shared_limit_of(const void *kernel) {
  const std::lock_guard<std::mutex> guard(limits.lock);
  const auto i = limits.all.find({device, kernel});
  return i == limits.all.end() ? least_shared : i->second;
}
}  // namespace cuda_host

// The limit of all threads' launches, until it is set again.
inline cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
  using namespace cuda_host;
  const cudaError_t e = device_error(device);
  if (e != cudaSuccess) return e;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || static_cast<size_t>(value) > settings.shared_limit)
    return failed(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> guard(limits.lock);
  limits.all[{device, kernel}] = value;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, const void *kernel) {
  using namespace cuda_host;
  cudaError_t e = device_error(device);
  if (e == cudaSuccess) e = injected("cudaFuncGetAttributes");
  if (e != cudaSuccess) return e;
  *out = {};
  out->maxThreadsPerBlock = max_threads;
  out->ptxVersion = out->binaryVersion = settings.capability;
  out->maxDynamicSharedSizeBytes = shared_limit_of(kernel);
  return cudaSuccess;
}

// ================================================================================ device primitives, as in section 1 of rs-cuda.cu
//
// A line that is not given is that of the call.

inline int thread_index() { return cuda_host::current->thread; }
inline int block_x() { return static_cast<int>(cuda_host::current->block.x); }
inline int block_y() { return static_cast<int>(cuda_host::current->block.y); }
inline int grid_x() { return static_cast<int>(cuda_host::current->grid.x); }

// s[i] is no T but what can be read as one (T v = s[i]) and assigned to: the fields of a structure need a copy of it.
template <class T>
struct shared {
  T *p;
  cuda_host::element<T> operator[](cuda_host::index_at i) const { return {p + i.i, i.line}; }
  shared operator+(int i) const { return {p + i}; }
  template <class U>
  shared<U> as() const {
    return {reinterpret_cast<U *>(p)};
  }
};
template <class T>
shared<T> block_memory(int offset, int line = __builtin_LINE()) {
  cuda_host::worker &w = *cuda_host::current;
  if (cuda_host::checking && (offset < 0 || offset % 16 != 0 || static_cast<size_t>(offset) > w.bytes)) {
    cuda_host::fault(w, "block_memory at line %d: offset %d, of %zu bytes", line, offset, w.bytes);
  }
  return {reinterpret_cast<T *>(w.memory + offset)};
}
inline int shared_add(shared<int> p, int v, int line = __builtin_LINE()) {
  if (cuda_host::checking) cuda_host::note(cuda_host::touch::add, p.p, sizeof(int), alignof(int), line);
  int before;
  std::memcpy(&before, p.p, sizeof before);
  const int after = static_cast<int>(static_cast<unsigned>(before) + static_cast<unsigned>(v));
  std::memcpy(p.p, &after, sizeof after);
  return before;
}
// Blocks run at the same time, so these are atomic in earnest.
// NOLINTNEXTLINE(readability-non-const-parameter): it does not know these builtins
inline int global_add(int *p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
// NOLINTNEXTLINE(readability-non-const-parameter)
inline int global_exchange_if(int *p, int old, int v) {
  __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return old;
}

// Kernels follow each other here; that none forgets it is what can be seen.
inline void wait_for_previous() { cuda_host::current->fibers[static_cast<size_t>(cuda_host::current->thread)].waited = true; }
inline void block_sync(int line = __builtin_LINE()) { cuda_host::sync_block(line); }
inline void warp_sync(int line = __builtin_LINE()) {
  cuda_host::converge(cuda_host::collective::warp_sync, line, nullptr,
                      [](cuda_host::worker &, cuda_host::warp_state &warp) { ++warp.syncs; });
}

namespace cuda_host {
template <class T>
struct shuffle_frame {
  T in, out;
  int from;
};
template <class T>
inline T exchange(collective kind, int line, T v, int from) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  shuffle_frame<T> f = {v, v, from & 31};
  converge(kind, line, &f, [](worker &, warp_state &warp) {
    for (void *p : warp.frame) {
      auto &to = *static_cast<shuffle_frame<T> *>(p);
      to.out = static_cast<const shuffle_frame<T> *>(warp.frame[to.from])->in;
    }
  });
  return f.out;
}
}  // namespace cuda_host
template <class T>
T shuffle_xor(T v, int mask, int line = __builtin_LINE()) {
  return cuda_host::exchange(cuda_host::collective::shuffle_xor, line, v, (thread_index() ^ mask) & 31);
}
template <class T>
T shuffle(T v, int lane, int line = __builtin_LINE()) {
  return cuda_host::exchange(cuda_host::collective::shuffle, line, v, lane);
}
inline uint32_t ballot(bool v, int line = __builtin_LINE()) {
  uint32_t bits = v;
  cuda_host::converge(cuda_host::collective::ballot, line, &bits, [](cuda_host::worker &, cuda_host::warp_state &warp) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= *static_cast<const uint32_t *>(warp.frame[i]) << i;
    for (void *p : warp.frame) *static_cast<uint32_t *>(p) = all;
  });
  return bits;
}

template <class T>
void ldmatrix_x4(uint32_t (&r)[4], shared<T> row, int line = __builtin_LINE()) {
  for (uint32_t &v : r) v = 0;  // for analyzers, which do not see that the last lane writes all
  cuda_host::ldmatrix_frame f = {reinterpret_cast<const unsigned char *>(row.p), r};
  cuda_host::converge(cuda_host::collective::ldmatrix, line, &f,
                      [](cuda_host::worker &w, cuda_host::warp_state &warp) { cuda_host::run_ldmatrix(w, warp, false); });
}
template <class T>
void ldmatrix_x4_transposed(uint32_t (&r)[4], shared<T> row, int line = __builtin_LINE()) {
  for (uint32_t &v : r) v = 0;  // for analyzers, which do not see that the last lane writes all
  cuda_host::ldmatrix_frame f = {reinterpret_cast<const unsigned char *>(row.p), r};
  cuda_host::converge(cuda_host::collective::ldmatrix_transposed, line, &f,
                      [](cuda_host::worker &w, cuda_host::warp_state &warp) { cuda_host::run_ldmatrix(w, warp, true); });
}
inline void mma_s8u8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  cuda_host::mma_frame f = {c, a, b};
  cuda_host::converge(cuda_host::collective::mma_s8u8, line, &f,
                      [](cuda_host::worker &, cuda_host::warp_state &warp) { cuda_host::run_mma_s8u8(warp); });
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  cuda_host::mma_frame f = {c, a, b};
  cuda_host::converge(cuda_host::collective::mma_f16, line, &f, [](cuda_host::worker &, cuda_host::warp_state &warp) {
    cuda_host::run_mma_16<cuda_host::half_to_float>(warp);
  });
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  cuda_host::mma_frame f = {c, a, b};
  cuda_host::converge(cuda_host::collective::mma_bf16, line, &f, [](cuda_host::worker &, cuda_host::warp_state &warp) {
    cuda_host::run_mma_16<cuda_host::bfloat_to_float>(warp);
  });
}

#ifdef RS_CUDA_HOST_WGMMA
#define RS_WGMMA 1
inline void fence_shared() { cuda_host::current->fibers[static_cast<size_t>(cuda_host::current->thread)].fenced = true; }
template <class C>
void multiply_begin(C &) {
  cuda_host::current->fibers[static_cast<size_t>(cuda_host::current->thread)].begun = true;
}
template <class C>
void multiply_end(C &) {
  cuda_host::fiber &self = cuda_host::current->fibers[static_cast<size_t>(cuda_host::current->thread)];
  for (const cuda_host::async_sums &s : self.sums) std::memcpy(s.c, s.sum, sizeof(s.sum));
  self.sums.clear();
  self.begun = false;
}
inline void multiply_s8u8(int32_t (&c)[8][4], const uint32_t (&a)[4], shared<uint8_t> b, int line = __builtin_LINE()) {
  cuda_host::multiply_frame f = {c, a, reinterpret_cast<unsigned char *>(b.p)};
  cuda_host::converge(cuda_host::collective::multiply_s8u8, line, &f,
                      [](cuda_host::worker &w, cuda_host::warp_state &warp) { cuda_host::run_multiply(w, warp); });
}
#endif

// From here until the thread waited for it, nobody may touch the 16 bytes, which are copied only then.
template <class T>
void cp_async16(shared<T> to, const void *from, int bytes, int line = __builtin_LINE()) {
  using namespace cuda_host;
  worker &w = *current;
  const async_copy c = {reinterpret_cast<unsigned char *>(to.p), from, bytes, w.fibers[static_cast<size_t>(w.thread)].groups, line};
  if (!checking) return land(w, c);
  if (bytes < 0 || bytes > 16) fault(w, "cp_async16 at line %d: thread %d, %d bytes", line, w.thread, bytes);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fault(w, "cp_async16 at line %d: thread %d, from an address that is no multiple of 16", line, w.thread);
  }
  note(w, touch::fly, w.thread, to.p, 16, 16, line);
  w.fibers[static_cast<size_t>(w.thread)].copies.push_back(c);
}
inline void cp_async_commit() { ++cuda_host::current->fibers[static_cast<size_t>(cuda_host::current->thread)].groups; }
template <int N>
void cp_async_wait() {
  using namespace cuda_host;
  if (!checking) return;
  worker &w = *current;
  fiber &self = w.fibers[static_cast<size_t>(w.thread)];
  size_t n = 0;  // groups are in order
  while (n < self.copies.size() && self.copies[n].group + N < self.groups) land(w, self.copies[n++]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<ptrdiff_t>(n));
}

inline uint32_t pack_f16(float low, float high) {
  return cuda_host::float_to_half(low) | static_cast<uint32_t>(cuda_host::float_to_half(high)) << 16;
}
inline uint32_t pack_finite_f16(float low, float high) {
  const auto fit = [](float v) { return v > 65504 ? 65504 : v < -65504 ? -65504 : v; };  // NaN stays
  return pack_f16(fit(low), fit(high));
}
inline uint32_t pack_bf16(float low, float high) {
  return cuda_host::float_to_bfloat(low) | static_cast<uint32_t>(cuda_host::float_to_bfloat(high)) << 16;
}
inline float f16_to_float(uint16_t h) { return cuda_host::half_to_float(h); }
inline float power_of_two(float x) {  // as on the card, what is denormal is 0
  const float v = std::exp2(x);
  return v < FLT_MIN ? 0 : v;
}
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
inline float min_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b); }
inline float bits_to_float(uint32_t v) {
  float r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
inline uint32_t float_to_bits(float v) {
  uint32_t r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
inline int low_bits(double v) {  // 32 of them
  int r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

template <class... P, class... A>
cudaError_t launch(cudaStream_t stream, dim3 grid, int threads, size_t bytes, void (*kernel)(P...), A... args) {
  using namespace cuda_host;
  cudaError_t e = device_error(device);
  if (e == cudaSuccess) e = injected("cudaLaunchKernelEx");
  if (e != cudaSuccess) return e;
  if (device_of_stream(stream) != device) return failed(cudaErrorInvalidResourceHandle);
  if (threads < 1 || threads > max_threads || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535) {
    return failed(cudaErrorInvalidConfiguration);
  }
  if (bytes > static_cast<size_t>(shared_limit_of(reinterpret_cast<const void *>(kernel)))) return failed(cudaErrorInvalidValue);
  const std::function<void()> body = [kernel, args...] { kernel(args...); };
  return submit(stream, [grid, threads, bytes, body] { return run_grid(grid, threads, bytes, body); });
}
