// rs-cuda.cu: the CUDA backend of rs, a library of its own that rs.cpp looks for at run time.  docs/cuda.md says how its kernels work.
//
//    1  device primitives: all PTX is here; with RS_CUDA_HOST, tests/cuda_host.h has the same for the CPU
//    2  what kernels share
//    3  linear layers
//    4  attention
//    5  operators on rows
//    6  token dropping
//    7  backend: weights, plans, runs
//
// The same source is compiled as C++ with RS_CUDA_HOST, where every thread of a block is a fiber: the tests run each kernel so.
#include "rs-backend.h"

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// ================================================================================ 1  device primitives
//
// Collectives (shuffles, ballot, ldmatrix, mma, warp_sync) are called by all 32 threads of a warp, block_sync by all of a block.

#ifdef RS_CUDA_HOST
#include "tests/cuda_host.h"
#else
#include <cuda_runtime.h>

#define RS_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define RS_DEVICE __device__ __forceinline__

namespace {

RS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
RS_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
RS_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
RS_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }

// Memory of a block.  On the CPU, accesses go through this type so that those that nothing orders are found.
template <class T>
struct shared {
  T *p;
  RS_DEVICE T &operator[](int i) const { return p[i]; }
  RS_DEVICE shared operator+(int i) const { return {p + i}; }
  template <class U>
  RS_DEVICE shared<U> as() const {
    return {reinterpret_cast<U *>(p)};
  }
};
// What the launch asked for, from a byte offset that is a multiple of 16.
template <class T>
RS_DEVICE shared<T> block_memory(int offset) {
  extern __shared__ __align__(128) unsigned char memory[];
  return {reinterpret_cast<T *>(memory + offset)};
}
RS_DEVICE int shared_add(shared<int> p, int v) { return atomicAdd(p.p, v); }       // the value before
RS_DEVICE int global_add(int *p, int v) { return atomicAdd(p, v); }                // the value before
RS_DEVICE int global_exchange_if(int *p, int old, int v) { return atomicCAS(p, old, v); }  // the value before

RS_DEVICE void block_sync() { __syncthreads(); }
RS_DEVICE void warp_sync() { __syncwarp(); }
template <class T>
RS_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
RS_DEVICE T shuffle(T v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
RS_DEVICE uint32_t ballot(bool v) { return __ballot_sync(0xffffffffu, v); }

RS_DEVICE uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit elements (or 8x16 bytes): thread i says where row i % 8 of matrix i / 8 is, 16 bytes, aligned so;
// r[j] of thread i is elements 2 (i % 4) and the next one of row i / 4 of matrix j.
template <class T>
RS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row.p))
               : "memory");
}
// The same of the transposed matrices: r[j] of thread i is elements i / 4 of rows 2 (i % 4) and the next one.
template <class T>
RS_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row.p))
               : "memory");
}

// c [16][8] += a [16][32] u8 times b [32][8] s8.  With g = lane / 4, t = lane % 4: a[0] is row g, k 4t to 4t + 3; a[1] row g + 8; a[2],
// a[3] the same, k + 16.  b[0] is column g, k 4t to 4t + 3; b[1] k + 16.  c[0], c[1]: row g, columns 2t, 2t + 1; c[2], c[3]: row g + 8.
RS_DEVICE void mma_u8s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c [16][8] += a [16][16] times b [16][8].  a[0] is row g, k 2t (low half) and 2t + 1; a[1] row g + 8; a[2], a[3] the same, k + 8.
// b[0] is column g, k 2t and 2t + 1; b[1] k + 8.  c as above.
RS_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
RS_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes to shared memory, both ends aligned so: the first `bytes` (0 to 16) from `from`, zeros behind them.  They are there, for
// the thread that asked, when cp_async_wait<N> left no more than N later groups (what lies between two commits) unfinished; for the
// others, after a block_sync behind that.
template <class T>
RS_DEVICE void cp_async16(shared<T> to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(shared_address(to.p)), "l"(from), "r"(bytes) : "memory");
}
RS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int N>
RS_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

RS_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
RS_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
RS_DEVICE float f16_to_float(uint16_t h) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h));
  return r;
}
RS_DEVICE float power_of_two(float x) {  // 2^x, 2 ULP; 0 for -inf
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
RS_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
RS_DEVICE float bits_to_float(uint32_t v) { return __uint_as_float(v); }
RS_DEVICE uint32_t float_to_bits(float v) { return __float_as_uint(v); }

// Threads are of one block; shared: bytes of its memory.
template <class... P, class... A>
cudaError_t launch(cudaStream_t stream, dim3 grid, int threads, size_t bytes, void (*kernel)(P...), A... args) {
  if (bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, static_cast<unsigned>(threads), bytes, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace
#endif

// ================================================================================ 2  what kernels share

namespace {

constexpr int warp_size = 32;
constexpr int panel_n = 16, panel_k = 4, group_k = 32;  // as in rs.cpp, section 1

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct row_quant {  // an activation row as u8: x = scale (q - zero)
  float scale;
  int32_t zero;
};

// The first thing that went wrong in a run.  Zeros: nothing.
struct run_fault {
  int32_t status, op, at, what;  // rs_status; index of the operator; position; id or sequence
};
RS_DEVICE void report(run_fault *fault, rs_status status, int op, int at, int what) {
  if (global_exchange_if(&fault->status, 0, status) != 0) return;
  fault->op = op, fault->at = at, fault->what = what;
}

RS_DEVICE int warp_of() { return thread_index() / warp_size; }
RS_DEVICE int lane_of() { return thread_index() % warp_size; }

RS_DEVICE float warp_sum(float v) {
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}
RS_DEVICE double warp_sum(double v) {
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}
RS_DEVICE int warp_sum(int v) {
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}
RS_DEVICE float warp_max(float v) {
  for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}
RS_DEVICE float warp_min(float v) {
  for (int mask = 16; mask > 0; mask /= 2) v = fminf(v, shuffle_xor(v, mask));
  return v;
}

// A tensor of a run on the device.  Launches are for `capacity` rows; how many a run has is at *rows, on the device, so that one
// recorded launch serves every run of a capacity.
struct device_value {
  void *data;           // nullptr: an optional input that is left out
  const int32_t *rows;  // nullptr for weights
  int64_t capacity, cols, stride;
  bool half;  // elements are f16: what only attention reads

  float *f32() const { return static_cast<float *>(data); }
  int32_t *i32() const { return static_cast<int32_t *>(data); }
  uint16_t *f16() const { return static_cast<uint16_t *>(data); }
};

// Where attention begins, for blocks: sequence, and the first row of a tile in that sequence.
struct attn_tile {
  int32_t sequence, first;
};
constexpr int attn_tile_rows = 64;

// An operator of a run.
struct op_call {
  cudaStream_t stream;
  const backend_op *op;
  int index;  // for report()
  run_fault *fault;
  device_value out, in[max_sources];
  const int32_t *sequences;  // how many
  int64_t sequence_capacity;
  const attn_tile *tiles;  // of the level of the operator's tokens, in the order of rows
  const int32_t *n_tiles;
  int64_t tile_capacity;
  void *scratch;  // what name##_work asked for

  // layer_norm and linear: what a quantized linear layer behind it needs of the result, or nullptr.
  uint8_t *q;       // [rows][kp]
  row_quant *rq;    // [rows]
  int64_t kp;       // columns, rounded up to group_k
  // layer_norm: rs_shift of its first input, which is then not computed by itself, or nullptr.
  float *shift;
  int64_t shift_stride;
  // linear: a row of it is added behind the activation, or nullptr.
  const float *residual;
  int64_t residual_stride;
};

}  // namespace

// ================================================================================ 3  linear layers

namespace {

}  // namespace

// ================================================================================ 4  attention

namespace {

}  // namespace

// ================================================================================ 5  operators on rows

namespace {

}  // namespace

// ================================================================================ 6  token dropping

namespace {

}  // namespace

// ================================================================================ 7  backend: weights, plans, runs

namespace {

}  // namespace
