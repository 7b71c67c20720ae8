// rs-cuda.cu: the CUDA backend of rs, a library of its own that rs.cpp looks for at run time.  docs/cuda.md says how its kernels
// work.
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
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

// ================================================================================ 1  device primitives
//
// Collectives (shuffles, ballot, ldmatrix, mma) are called by all 32 threads of a warp, block_sync by all of a block.

#ifdef RS_CUDA_HOST
#include "tests/cuda_host.h"
#define RS_UNROLL
#define RS_NO_UNROLL
#else
#include <cuda_runtime.h>

// Loops over arrays that are to be in registers.
#define RS_UNROLL _Pragma("unroll")
#define RS_NO_UNROLL _Pragma("unroll 1")

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
// What the launch asked for, from a byte offset that is a multiple of 16.  It begins on 1024 bytes: hardware that swaps chunks by
// bits of their address (multiply_s8u8) wants a tile's first row where these are 0.
template <class T>
RS_DEVICE shared<T> block_memory(int offset) {
  extern __shared__ __align__(1024) unsigned char memory[];
  return {reinterpret_cast<T *>(memory + offset)};
}
RS_DEVICE int shared_add(shared<int> p, int v) { return atomicAdd(p.p, v); }               // the value before
RS_DEVICE int global_exchange_if(int *p, int old, int v) { return atomicCAS(p, old, v); }  // the value before

// Blocks of a kernel may be there before the kernel before it in the stream has ended (from compute capability 9.0 on); from here
// on all that it wrote is to be seen, and so on back to the first.  Every thread of every kernel calls it before it touches what
// another kernel wrote or reads.
RS_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

RS_DEVICE void block_sync() { __syncthreads(); }
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

// c [16][8] += a [16][32] s8 times b [32][8] u8.  With g = lane / 4, t = lane % 4: a[0] is row g, k 4t to 4t + 3; a[1] row g + 8;
// a[2], a[3] the same, k + 16.  b[0] is column g, k 4t to 4t + 3; b[1] k + 16.  c[0], c[1]: row g, columns 2t, 2t + 1; c[2], c[3]:
// row g + 8.
RS_DEVICE void mma_s8u8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
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
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Products of four warps at once, of compute capability 9.0 alone: the second factor is read from shared memory, by hardware beside
// the warps' own accesses.  c [64][64] += a [64][32] s8 times b [32][64] u8, of which a warp has 16 rows, as mma_s8u8 has them:
// c[i] are columns 8i to 8i + 7.  b: 64 columns, 64 bytes from one to the next, of which 32 from `b` on (the first or the second
// half of them) are read; 16-byte chunk c of column r lies at c xor (r / 2 mod 4), from a multiple of 512 bytes on.
//
// What cp_async16 and others wrote there is seen behind a fence_shared of who wrote it and a block_sync.  Between multiply_begin
// and multiply_end no one touches a and c, and until multiply_end no one writes b.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RS_WGMMA 1
RS_DEVICE void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }
// For the compiler: what was done to c is done, and what follows comes behind.
template <int N>
RS_DEVICE void settle(int32_t (&c)[N][8][4]) {
  RS_UNROLL
  for (int i = 0; i < N * 32; i++) asm volatile("" : "+r"(c[i / 32][i / 4 % 8][i % 4]) : : "memory");
}
template <int N>
RS_DEVICE void multiply_begin(int32_t (&c)[N][8][4]) {
  settle(c);
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}
template <int N>
RS_DEVICE void multiply_end(int32_t (&c)[N][8][4]) {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" : : : "memory");
  settle(c);
}
RS_DEVICE void multiply_s8u8(int32_t (&c)[8][4], const uint32_t (&a)[4], shared<uint8_t> b) {
  // Address, and from 8 columns to the next, in 16 bytes; the second field is not used; swizzled within 64 bytes.
  const uint64_t place = (shared_address(b.p) & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{512 / 16} << 32 | uint64_t{2} << 62;
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.u8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
      "%26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, add;\n}"
      : "+r"(c[0][0]), "+r"(c[0][1]), "+r"(c[0][2]), "+r"(c[0][3]), "+r"(c[1][0]), "+r"(c[1][1]), "+r"(c[1][2]), "+r"(c[1][3]),
        "+r"(c[2][0]), "+r"(c[2][1]), "+r"(c[2][2]), "+r"(c[2][3]), "+r"(c[3][0]), "+r"(c[3][1]), "+r"(c[3][2]), "+r"(c[3][3]),
        "+r"(c[4][0]), "+r"(c[4][1]), "+r"(c[4][2]), "+r"(c[4][3]), "+r"(c[5][0]), "+r"(c[5][1]), "+r"(c[5][2]), "+r"(c[5][3]),
        "+r"(c[6][0]), "+r"(c[6][1]), "+r"(c[6][2]), "+r"(c[6][3]), "+r"(c[7][0]), "+r"(c[7][1]), "+r"(c[7][2]), "+r"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(place)
      : "memory");
}
#endif

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
// Beyond the largest f16, the largest; NaN stays.
RS_DEVICE uint32_t pack_finite_f16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
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
// NaN where one of both is.
RS_DEVICE float max_or_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
RS_DEVICE float min_or_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
RS_DEVICE float bits_to_float(uint32_t v) { return __uint_as_float(v); }
RS_DEVICE uint32_t float_to_bits(float v) { return __float_as_uint(v); }
RS_DEVICE int low_bits(double v) { return __double2loint(v); }

// Threads are of one block; bytes: of its shared memory, for more than 48 KiB of which launch_large asks.
template <class... P, class... A>
cudaError_t launch(cudaStream_t stream, dim3 grid, int threads, size_t bytes, void (*kernel)(P...), A... args) {
  // Only code that waits may begin early, and only such drivers record that.
  cudaFuncAttributes code = {};
  int driver = 0;
  cudaError_t status = cudaFuncGetAttributes(&code, kernel);
  if (status == cudaSuccess) status = cudaDriverGetVersion(&driver);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = &early, config.numAttrs = code.ptxVersion >= 90 && driver >= 12030 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

}  // namespace
#endif

// ================================================================================ 2  what kernels share

namespace {

// A launch that may take more than the 48 KiB of shared memory that a block has without being asked.  What is asked for is the
// kernel's, for all threads of the process, so it is always the most that any launch of it takes: were it what this one takes,
// another thread could ask for less before this one is launched.
constexpr size_t unasked_shared = 48 * 1024;
template <class... P, class... A>
cudaError_t launch_large(size_t most, cudaStream_t stream, dim3 grid, int threads, size_t bytes, void (*kernel)(P...), A... args) {
  if (bytes > unasked_shared) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
    if (status != cudaSuccess) return status;
  }
  return launch(stream, grid, threads, bytes, kernel, args...);
}

constexpr int warp_size = 32;
constexpr int panel_n = 16, panel_k = 4, group_k = 32;  // as in rs.cpp, section 1

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct row_quant {  // an activation row as u8: x = scale (q - zero)
  float scale;
  int32_t zero;
};
// Quantized rows lie as linear_quantized wants them in shared memory, where it copies them in one piece: tiles of 128 rows by 64
// columns, [rows / 128][Kp / 64][128][64], in which chunks of 16 bytes change places so that 8 rows at one column lie in different
// banks: two rows of 64 bytes fill them.
constexpr int q_rows = 128, q_columns = 64, q_tile = q_rows * q_columns;
RS_DEVICE int q_chunk(int row, int chunk) { return row * q_columns + 16 * (chunk ^ (row >> 1 & 3)); }
constexpr int64_t quantized_kp(int64_t cols) { return round_up(cols, q_columns); }
constexpr int64_t quantized_bytes(int64_t rows, int64_t cols) { return round_up(rows, q_rows) * quantized_kp(cols); }

// The first thing that went wrong in a run.  Zeros: nothing.
struct run_fault {
  int32_t status, op, at, what;  // rs_status; index of the operator; position; id or sequence
};
RS_DEVICE void report(run_fault *fault, rs_status status, int op, int at, int what) {
  if (global_exchange_if(&fault->status, 0, status) != 0) return;
  fault->op = op, fault->at = at, fault->what = what;
}

RS_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
RS_DEVICE int larger(int a, int b) { return a > b ? a : b; }

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
RS_DEVICE float activate(rs_activation act, float x) {
  switch (act) {
    case RS_ACT_NONE:
      return x;
    case RS_ACT_GELU:
      return 0.5f * x * (1 + erff(x * 0.70710678f));
    case RS_ACT_GELU_TANH:
      return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case RS_ACT_RELU:
      return x < 0 ? 0 : x;  // this way round NaN stays NaN
    case RS_ACT_SILU:
      return x / (1 + expf(-x));
    case RS_ACT_TANH:
      return tanhf(x);
    case RS_ACT_QUICK_GELU:
      return x / (1 + expf(-1.702f * x));
  }
  return x;
}

// GELU for a result that is rounded to f16: Phi(x) - 1/2 as an odd polynomial, minimax on [-4.2, 4.2] and 1/2 at its end, within
// 1.4e-5.  Half of erff's instructions, which took longer than the product before it.
RS_DEVICE float gelu_for_f16(float x) {
  const float u = fminf(fmaxf(x, -4.2f), 4.2f), s = u * u;
  float p = fused(7.3952129e-11f, s, -6.7105508e-9f);
  p = fused(p, s, 2.6876108e-7f);
  p = fused(p, s, -6.3478806e-6f);
  p = fused(p, s, 1.0034300e-4f);
  p = fused(p, s, -1.1468016e-3f);
  p = fused(p, s, 9.9305501e-3f);
  p = fused(p, s, -6.6504963e-2f);
  p = fused(p, s, 0.39897373f);
  return x * fused(u, p, 0.5f);
}

// half: the result is rounded to f16.
RS_DEVICE float activate(rs_activation act, bool half, float x) {
  return half && act == RS_ACT_GELU ? gelu_for_f16(x) : activate(act, x);
}

// A tensor of a run on the device.  Launches are for `capacity` rows; how many a run has is at *rows, on the device, so that one
// recorded launch serves every run of a capacity.
struct device_value {
  void *data;           // nullptr: an optional input that is left out
  const int32_t *rows;  // nullptr for weights
  int64_t capacity, cols, stride;
  bool half;  // elements are f16: what only attention and the quantization of rows read

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
  int multiprocessors;

  // layer_norm and linear: what a quantized linear layer behind it needs of the result, or nullptr.
  uint8_t *q;          // tiles of rows
  row_quant *rq;       // [rows]
  int64_t kp;          // columns, rounded up to q_columns
  const float *scale;  // [columns] what they are multiplied by before, or nullptr
  // layer_norm: rs_shift of its first input, which is then not computed by itself, or nullptr.
  float *shift;
  int64_t shift_stride;
  // linear: a row of it is added behind the activation, or nullptr.
  const float *residual;
  int64_t residual_stride;
};

}  // namespace

// ================================================================================ 3  linear layers
//
// y = act(x w^T + bias) (+ residual).  Weights of 8 and 4 bits are the integers of the file, in the order in which threads of
// mma.m16n8k32 want them; sums are exact, so they equal the CPU's in every bit.
//
// The rows of the mma's first factor are channels, those of the second are tokens: x comes by ldmatrix, w as it lies.  Which of a
// warp's 32 channels a row is, is free: rows g and g + 8 of both its mmas are channels 4g to 4g + 3, so that a thread has four
// neighbours of each of its tokens, loads their constants once, and stores them at once; 8 lanes store a row's 128 bytes.
//
// A block makes a tile of BM tokens by BN channels; its warps make parts of it, and walk along K in steps of 64 bytes that cp.async
// brings in `stages` steps ahead.

namespace {

constexpr int step_k = q_columns;  // bytes of a row of x in a step
#ifdef RS_WGMMA
constexpr bool has_wgmma = true;
#else
constexpr bool has_wgmma = false;
#endif

// What is done to a tile before it is stored.
struct linear_end {
  const float *bias;  // [N] or nullptr
  rs_activation act;
  const float *residual;  // or nullptr
  int64_t residual_stride;
  void *y;
  int64_t stride;
  int32_t channels;  // N
  bool half;         // y is f16
};

// 4 neighbouring channels of a row, of which `count` are there.  wide: they are, and lie on 16 bytes.
RS_DEVICE void load_residual(const linear_end &e, int64_t row, int channel, int count, bool wide, float (&v)[4]) {
  const float *r = e.residual + row * e.residual_stride + channel;
  if (wide) {
    const float4 x = *reinterpret_cast<const float4 *>(r);
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
    return;
  }
  RS_UNROLL
  for (int i = 0; i < 4; i++) v[i] = i < count ? r[i] : 0;
}

// Whole fours, on 16 bytes (f16: 8).  What does not fit in f16 becomes its largest: what attention makes of that is large, not
// infinite.
RS_DEVICE void store_halves(uint16_t *y, const float (&v)[4]) {
  *reinterpret_cast<uint2 *>(y) = make_uint2(pack_finite_f16(v[0], v[1]), pack_finite_f16(v[2], v[3]));
}
RS_DEVICE void store_floats(float *y, const float (&v)[4]) { *reinterpret_cast<float4 *>(y) = make_float4(v[0], v[1], v[2], v[3]); }
RS_DEVICE void store_four(const linear_end &e, int64_t row, int channel, int count, bool wide, const float (&v)[4]) {
  const int64_t at = row * e.stride + channel;
  float *floats = static_cast<float *>(e.y) + at;
  uint16_t *halves = static_cast<uint16_t *>(e.y) + at;
  if (wide) return e.half ? store_halves(halves, v) : store_floats(floats, v);
  RS_UNROLL
  for (int i = 0; i < 4; i++) {
    if (i >= count) continue;
    if (e.half) halves[i] = static_cast<uint16_t>(pack_finite_f16(v[i], 0));
    else floats[i] = v[i];
  }
}

constexpr int warp_channels = 32;
RS_DEVICE int thread_channel() { return lane_of() / 4 * 4; }                         // the first of the thread's 4
RS_DEVICE int thread_token(int i) { return i / 2 * 8 + lane_of() % 4 * 2 + i % 2; }  // its i-th of a warp's
// What a thread has of its i-th token; sums: of both mmas, by 8 tokens.
template <class T, int Tiles>
RS_DEVICE T thread_sum(const T (&sums)[2][Tiles][4], int i, int channel) {
  return sums[channel / 2][i / 2][channel % 2 * 2 + i % 2];
}

// What may be stored: any tokens and channels of a tile, with any activation and residual.  The values go through memory, so that
// the loop behind it, which activations make long, need not be unrolled.
template <int Count, class F>
RS_DEVICE void store_any_tile(int64_t first_row, int rows, int channel, bool wide, const linear_end &e, F values) {
  const int count = e.channels - channel;
  float all[Count][4];
  RS_UNROLL
  for (int i = 0; i < Count; i++) values(i, all[i]);
  if (count <= 0) return;
  RS_NO_UNROLL
  for (int i = 0; i < Count; i++) {
    const int64_t row = first_row + thread_token(i);
    if (row >= rows) continue;
    const bool whole = wide && count >= 4;
    float v[4], residual[4] = {};
    if (e.residual) load_residual(e, row, channel, count, whole, residual);
    RS_UNROLL
    for (int j = 0; j < 4; j++) {
      v[j] = activate(e.act, e.half, all[i][j]);
      if (e.residual) v[j] = residual[j] + v[j];
    }
    store_four(e, row, channel, count, whole, v);
  }
}

// The forms that layers of encoders have, of tiles that are all there: straight from registers.
template <rs_activation Act, bool Half, bool Residual, int Count, class F>
RS_DEVICE void store_whole_tile(int64_t first_row, int channel, const linear_end &e, F values) {
  using stored = std::conditional_t<Half, uint16_t, float>;
  const int64_t row = first_row + thread_token(0);
  stored *y = static_cast<stored *>(e.y) + (row * e.stride + channel);
  const float *from = Residual ? e.residual + (row * e.residual_stride + channel) : nullptr;
  RS_UNROLL
  for (int i = 0; i < Count; i++) {
    float v[4];
    values(i, v);
    RS_UNROLL
    for (int j = 0; j < 4; j++) v[j] = activate(Act, Half, v[j]);
    if constexpr (Residual) {
      const float4 r = *reinterpret_cast<const float4 *>(from);
      v[0] = r.x + v[0], v[1] = r.y + v[1], v[2] = r.z + v[2], v[3] = r.w + v[3];
      from += (i % 2 ? 7 : 1) * e.residual_stride;
    }
    if constexpr (Half) store_halves(y, v);
    else store_floats(y, v);
    y += (i % 2 ? 7 : 1) * e.stride;  // as thread_token
  }
}

// A warp's tile, of which a thread has `Count` tokens; first_row: of the warp, channel: of the thread.  values(i, v): v[4] of its
// i-th token, before the activation.  whole: the block's tile is all there, on 16 bytes.
template <int Count, class F>
RS_DEVICE void store_tile(int64_t first_row, int rows, int channel, bool whole, bool wide, const linear_end &e, F values) {
  if (whole && e.act == RS_ACT_NONE && e.half && !e.residual)
    store_whole_tile<RS_ACT_NONE, true, false, Count>(first_row, channel, e, values);
  else if (whole && e.act == RS_ACT_NONE && !e.half && !e.residual)
    store_whole_tile<RS_ACT_NONE, false, false, Count>(first_row, channel, e, values);
  else if (whole && e.act == RS_ACT_NONE && !e.half)
    store_whole_tile<RS_ACT_NONE, false, true, Count>(first_row, channel, e, values);
  else if (whole && e.act == RS_ACT_GELU && e.half && !e.residual)
    store_whole_tile<RS_ACT_GELU, true, false, Count>(first_row, channel, e, values);
  else store_any_tile<Count>(first_row, rows, channel, wide, e, values);
}

// Do rows of 4 elements lie on what a thread stores at once?
RS_DEVICE bool is_wide(const linear_end &e) {
  const bool result = e.stride % 4 == 0 && reinterpret_cast<uintptr_t>(e.y) % (e.half ? 8 : 16) == 0;
  return result && (!e.residual || (e.residual_stride % 4 == 0 && reinterpret_cast<uintptr_t>(e.residual) % 16 == 0));
}
// Of the channels of a thread.  Absent: -0, which changes no sum.
RS_DEVICE void load_bias(const linear_end &e, int channel, float (&bias)[4]) {
  RS_UNROLL
  for (int i = 0; i < 4; i++) bias[i] = e.bias && channel + i < e.channels ? e.bias[channel + i] : -0.0f;
}

// ---- 8 and 4 bits

// w as threads want it: what a step has of 32 channels is a piece, in which lie, lane by lane, the 16 bytes that a thread needs of
// 32 values along K.  8 bits: of the first mma, behind it of the second; 4 bits: the first has the low nibbles, the second the high
// ones, and behind both halves of the step come the multipliers of these two groups.
struct quantized_weight {
  const uint8_t *w;       // [Np / 128][Kp / 64][4] pieces
  const float *scale;     // [Np]
  const int32_t *colsum;  // [Np]
  int32_t blocks, kp;     // Np / 32
};
constexpr int block_channels = 128;
template <bool Four>
constexpr int piece_bytes = Four ? warp_channels *step_k / 2 + warp_channels *step_k / group_k : warp_channels *step_k;

template <bool Four, int BM, int BN>
struct linear_tile {
  static constexpr int stages = 3, warps_m = 2, warps_n = BN / 32, threads = warps_m * warps_n * warp_size;
  static constexpr int tokens = BM / warps_m, tiles = tokens / 8;         // of a warp
  static constexpr int a_bytes = BM * step_k;                             // of a stage
  static constexpr int b_bytes = BN / warp_channels * piece_bytes<Four>;  // the same of w
  static constexpr int stage_bytes = a_bytes + b_bytes;
  static constexpr int quant_bytes = BM * static_cast<int>(sizeof(row_quant));
  static constexpr int bytes = quant_bytes + stages * stage_bytes;
  static constexpr int blocks = BM == 128 ? Four ? 1 : 2 : 4;                     // of a multiprocessor: what registers allow
  static constexpr bool together = has_wgmma && BM == 128 && BN == 128 && !Four;  // products of four warps
};

// 4 signed bytes, 16 times the values of -8 to 7 that 4 nibbles (0 to 15) stand for: the low ones, shift 4, or the high ones, 0.
RS_DEVICE uint32_t unpack_nibbles(uint32_t w, int shift) { return (w << shift & 0xf0f0f0f0u) ^ 0x80808080u; }

// What a thread brings into each stage: every so-many-th chunk of 16 bytes of x, and of w.
template <bool Four, int BM, int BN>
struct step_loader {
  using tile = linear_tile<Four, BM, BN>;
  static constexpr int once = tile::threads * 16;  // bytes that all threads bring at once
  const uint8_t *a, *b;

  // The tile's first row and block of w.
  RS_DEVICE step_loader(const uint8_t *q, int first_row, const quantized_weight &w, int first_block) {
    const int steps = w.kp / step_k, block = first_block / (block_channels / warp_channels);
    a = q + (static_cast<int64_t>(first_row / q_rows) * steps * q_tile + first_row % q_rows * step_k + thread_index() * 16);
    b = w.w +
        (static_cast<int64_t>(block) * steps * (block_channels / warp_channels) + first_block % (block_channels / warp_channels)) *
            piece_bytes<Four> +
        thread_index() * 16;
  }
  RS_DEVICE void load_x(shared<uint8_t> stage) {
    RS_UNROLL
    for (int i = 0; i < tile::a_bytes; i += once) cp_async16(stage + (thread_index() * 16 + i), a + i, 16);
    a += q_tile;
  }
  RS_DEVICE void load_w(shared<uint8_t> stage) {
    RS_UNROLL
    for (int i = 0; i < tile::b_bytes; i += once)
      if (i + once <= tile::b_bytes || i + thread_index() * 16 < tile::b_bytes)
        cp_async16(stage + (tile::a_bytes + thread_index() * 16 + i), b + i, 16);
    b += block_channels / warp_channels * piece_bytes<Four>;
  }
};

// Where a thread reads in a stage: all else is constants.
struct fragment_places {
  int x[2];  // by half of the step: 16 tokens, the first and the second 16 bytes of each
  int w, mult;
  template <class Tile>
  RS_DEVICE static fragment_places of(int warp_m, int warp_n, bool four) {
    const int lane = lane_of();
    fragment_places p;
    RS_UNROLL
    for (int half = 0; half < 2; half++)
      p.x[half] = q_chunk(warp_m * Tile::tokens + lane / 16 * 8 + lane % 8, 2 * half + lane / 8 % 2);
    p.w = Tile::a_bytes + warp_n * (four ? piece_bytes<true> : piece_bytes<false>)+lane * 16;
    p.mult = p.w - lane * 16 + warp_channels * step_k / 2 + thread_channel();
    return p;
  }
};

// acc += 32 values along K: half 0 or 1 of a step.
template <bool Four, int BM, int BN>
RS_DEVICE void multiply_half(shared<uint8_t> stage, int half, const fragment_places &at,
                             int32_t (&acc)[2][linear_tile<Four, BM, BN>::tiles][4]) {
  using tile = linear_tile<Four, BM, BN>;
  uint32_t w[2][4];
  RS_UNROLL
  for (int m = 0; m < (Four ? 1 : 2); m++) {
    const uint4 v = (stage + (at.w + (Four ? half : half * 2 + m) * 512)).template as<uint4>()[0];
    w[m][0] = v.x, w[m][1] = v.y, w[m][2] = v.z, w[m][3] = v.w;
  }
  uint32_t mult = 0;  // of a group of 4-bit weights: its multipliers, of the thread's channels
  if (Four) {
    mult = (stage + (at.mult + half * 32)).template as<uint32_t>()[0];
    RS_UNROLL
    for (int i = 0; i < 4; i++) w[1][i] = unpack_nibbles(w[0][i], 0), w[0][i] = unpack_nibbles(w[0][i], 4);
  }
  RS_UNROLL
  for (int n = 0; n < tile::tiles; n += 2) {
    uint32_t x[4];  // matrices: 8 tokens, the first and the second 16 bytes, then the next 8 tokens
    ldmatrix_x4(x, stage + (at.x[half] + n * 8 * step_k));
    RS_UNROLL
    for (int i = 0; i < 4; i++) {
      const uint32_t pair[2] = {x[i / 2 * 2], x[i / 2 * 2 + 1]};
      int32_t(&to)[4] = acc[i % 2][n + i / 2];
      if (!Four) {
        mma_s8u8(to, w[i % 2], pair);
        continue;
      }
      int32_t sum[4] = {};  // 16 times the group's
      mma_s8u8(sum, w[i % 2], pair);
      RS_UNROLL
      for (int c = 0; c < 4; c++) to[c] += (sum[c] >> 4) * static_cast<int32_t>(mult >> (i % 2 * 2 + c / 2) * 8 & 255);
    }
  }
}

#ifdef RS_WGMMA
// acc += a step, by wgmma: the four warps of the same tokens have 128 channels.
RS_DEVICE void multiply_step(shared<uint8_t> stage, const fragment_places &at, int warp_m, int32_t (&acc)[2][8][4]) {
  uint32_t w[2][2][4];
  RS_UNROLL
  for (int i = 0; i < 4; i++) {
    const uint4 v = (stage + (at.w + i * 512)).as<uint4>()[0];
    w[i / 2][i % 2][0] = v.x, w[i / 2][i % 2][1] = v.y, w[i / 2][i % 2][2] = v.z, w[i / 2][i % 2][3] = v.w;
  }
  multiply_begin(acc);
  RS_UNROLL
  for (int i = 0; i < 4; i++) multiply_s8u8(acc[i % 2], w[i / 2][i % 2], stage + (warp_m * 64 * step_k + i / 2 * 32));
  multiply_end(acc);
}
#endif

// Blocks stay, and take every gridDim-th tile, whose first steps are on their way while the one before is stored.
// budget: registers 240, shared 50176, spills 0
template <bool Four, int BM, int BN>
RS_KERNEL((linear_tile<Four, BM, BN>::threads), (linear_tile<Four, BM, BN>::blocks))
linear_quantized(const int32_t *n_rows, const uint8_t *q, const row_quant *rq, quantized_weight w, linear_end e) {
  using tile = linear_tile<Four, BM, BN>;
  const int rows = *n_rows, columns = w.blocks * warp_channels / BN, tiles = (rows + BM - 1) / BM * columns;
  const shared<row_quant> quants = block_memory<row_quant>(0);
  const shared<uint8_t> stages = block_memory<uint8_t>(tile::quant_bytes);
  const int warp_m = warp_of() / tile::warps_n, warp_n = warp_of() % tile::warps_n, steps = w.kp / step_k;
  const fragment_places places = fragment_places::of<tile>(warp_m, warp_n, Four);
  const auto row_of_tile = [&](int i) { return i / columns * BM; };
  const auto block_of_tile = [&](int i) { return i % columns * (BN / warp_channels); };
  int here = 0;  // the stage whose turn it is
  const auto stage = [&](int ahead) {
    const int i = here + ahead;
    return stages + (i < tile::stages ? i : i - tile::stages) * tile::stage_bytes;
  };
  const auto load_first_steps = [&](step_loader<Four, BM, BN> &loader, bool there, bool first) {
    // Weights are there from the start.
    RS_UNROLL
    for (int j = 0; j < tile::stages - 1; j++)
      if (there && j < steps) loader.load_w(stage(j));
    if (first) wait_for_previous();
    RS_UNROLL
    for (int j = 0; j < tile::stages - 1; j++) {
      if (there && j < steps) loader.load_x(stage(j));
      cp_async_commit();
    }
  };
  step_loader<Four, BM, BN> loader(q, row_of_tile(block_x()), w, block_of_tile(block_x()));
  load_first_steps(loader, block_x() < tiles, true);
  for (int i = block_x(); i < tiles; i += grid_x()) {
    const int first_row = row_of_tile(i), first_block = block_of_tile(i);
    row_quant mine = {};  // of a row for each of the first BM threads
    if (thread_index() < BM && first_row + thread_index() < rows) mine = rq[first_row + thread_index()];
    int32_t acc[2][tile::tiles][4] = {};
    for (int j = 0; j < steps; j++) {
      cp_async_wait<tile::stages - 2>();
#ifdef RS_WGMMA
      if (tile::together) fence_shared();
#endif
      block_sync();  // step j is there for all, and all are done with the one before it, whose place is free
      if (j + tile::stages - 1 < steps) loader.load_w(stage(tile::stages - 1)), loader.load_x(stage(tile::stages - 1));
      cp_async_commit();
      if (j == 0 && thread_index() < BM) quants[thread_index()] = mine;
#ifdef RS_WGMMA
      if constexpr (tile::together) multiply_step(stage(0), places, warp_m, acc);
#endif
      RS_UNROLL
      for (int half = 0; half < (tile::together ? 0 : 2); half++) multiply_half<Four, BM, BN>(stage(0), half, places, acc);
      here = here + 1 == tile::stages ? 0 : here + 1;
    }
    if (steps == 1) block_sync();  // quants are there
    const int next = i + grid_x();
    loader = step_loader<Four, BM, BN>(q, row_of_tile(next), w, block_of_tile(next));
    load_first_steps(loader, next < tiles, false);
    const int channel = (first_block + warp_n) * warp_channels + thread_channel();
    const bool wide = is_wide(e);
    float scale[4], bias[4];
    int32_t colsum[4];
    load_bias(e, channel, bias);
    RS_UNROLL
    for (int j = 0; j < 4; j++) scale[j] = w.scale[channel + j], colsum[j] = w.colsum[channel + j];
    const bool whole = wide && first_row + BM <= rows && first_block * warp_channels + BN <= e.channels;
    const shared<row_quant> warp_quants = quants + warp_m * tile::tokens;
    store_tile<tile::tiles * 2>(first_row + warp_m * tile::tokens, rows, channel, whole, wide, e, [&](int token, float(&v)[4]) {
      const row_quant x = warp_quants[thread_token(token)];
      RS_UNROLL
      for (int j = 0; j < 4; j++) {
        const auto sum = static_cast<uint32_t>(thread_sum(acc, token, j));
        const uint32_t centred = sum - static_cast<uint32_t>(x.zero) * static_cast<uint32_t>(colsum[j]);
        v[j] = static_cast<float>(static_cast<int32_t>(centred)) * (x.scale * scale[j]) + bias[j];
      }
    });
  }
}

template <bool Four, int BM, int BN>
cudaError_t launch_quantized(const op_call &c, const quantized_weight &w, const linear_end &e) {
  using tile = linear_tile<Four, BM, BN>;
  const int64_t tiles = w.blocks * warp_channels / BN * ceil_div(c.out.capacity, BM);
  const auto grid = static_cast<unsigned>(std::min<int64_t>(tiles, int64_t{tile::blocks} * c.multiprocessors));
  return launch_large(tile::bytes, c.stream, dim3(grid), tile::threads, tile::bytes, linear_quantized<Four, BM, BN>, c.out.rows,
                      static_cast<const uint8_t *>(c.q), static_cast<const row_quant *>(c.rq), w, e);
}

// ---- floats: products of bf16, three for one of f32
//
// x = h + l, both bf16, so that h has 8 bits of it and l 8 more; x w is then h h' + l h' + h l', to 2^-16.  Weights are cut so when
// they come to the device, into words that a thread of mma.m16n8k16 wants: [Np / 32][Kp / 16][mma 2][h, l][32 lanes][4].  Which of
// the 16 values along K is the mma's k-th is free, so long as x and w agree: thread t has 4t to 4t + 3, which it reads at once.

struct split_pair {
  uint32_t high, low;
};
RS_DEVICE split_pair split(float a, float b) {
  const uint32_t high = pack_bf16(a, b);
  return {high, pack_bf16(a - bits_to_float(high << 16), b - bits_to_float(high & 0xffff0000u))};
}

constexpr int float_bm = 64, float_bn = 64, float_k = 32, float_stages = 3, float_threads = 128;
constexpr int float_a_bytes = float_bm * float_k * 4, float_b_bytes = float_bn * float_k * 4;
constexpr int float_bytes = float_stages * (float_a_bytes + float_b_bytes);

constexpr int float_chunks = 2 * 2 * warp_size;  // of 16 bytes, of a block of 32 channels and 16 values along K

struct float_weight {
  const uint4 *w;
  int32_t blocks, kp;  // Np / 32
};

// Rows are 128 bytes, all banks: two rows, four chunks of each, are read at a time.
RS_DEVICE int float_chunk(int row, int chunk) { return row * 128 + 16 * (chunk ^ ((row & 1) << 2 | (row >> 1 & 3))); }

RS_DEVICE void load_float_step(shared<uint8_t> stage, const float *x, int64_t stride, int columns, bool aligned, int64_t first_row,
                               int rows, const float_weight &w, int first_block, int k) {
  for (int i = thread_index(); i < float_bm * 8; i += float_threads) {
    const int row = i / 8, chunk = i % 8, at = k + chunk * 4;
    const int there = first_row + row < rows ? (columns - at < 4 ? columns - at > 0 ? columns - at : 0 : 4) : 0;
    const float *from = x + (there ? (first_row + row) * stride + at : 0);
    const shared<uint8_t> to = stage + float_chunk(row, chunk);
    if (aligned) cp_async16(to, from, there * 4);
    else
      to.as<float4>()[0] =
          make_float4(there > 0 ? from[0] : 0, there > 1 ? from[1] : 0, there > 2 ? from[2] : 0, there > 3 ? from[3] : 0);
  }
  constexpr int chunks = float_k / 16 * float_chunks;  // of a block of w
  for (int i = thread_index(); i < float_bn / warp_channels * chunks; i += float_threads) {
    const int block = first_block + i / chunks;
    const bool there = block < w.blocks && k + i % chunks / float_chunks * 16 < w.kp;
    const int64_t from = (static_cast<int64_t>(block) * (w.kp / 16) + k / 16) * float_chunks + i % chunks;
    cp_async16(stage + (float_a_bytes + i * 16), w.w + (there ? from : 0), there ? 16 : 0);
  }
}

// budget: registers 120, shared 49152, spills 0
RS_KERNEL(float_threads, 3)
linear_float(const int32_t *n_rows, const float *x, int64_t stride, int columns, bool aligned, float_weight w, linear_end e) {
  wait_for_previous();
  const int rows = *n_rows, first_block = block_x() * (float_bn / warp_channels);
  const int64_t first_row = static_cast<int64_t>(block_y()) * float_bm;
  if (first_row >= rows) return;
  const shared<uint8_t> memory = block_memory<uint8_t>(0);
  constexpr int stage_bytes = float_a_bytes + float_b_bytes;
  const int lane = lane_of(), g = lane / 4, t = lane % 4, warp_m = warp_of() % 2, warp_n = warp_of() / 2;
  const int steps = (w.kp + float_k - 1) / float_k;
  float acc[2][4][4] = {};  // of 32 tokens
  for (int i = 0; i < float_stages - 1; i++) {
    if (i < steps)
      load_float_step(memory + i * stage_bytes, x, stride, columns, aligned, first_row, rows, w, first_block, i * float_k);
    cp_async_commit();
  }
  for (int i = 0; i < steps; i++) {
    cp_async_wait<float_stages - 2>();
    block_sync();
    const int next = i + float_stages - 1;
    if (next < steps)
      load_float_step(memory + next % float_stages * stage_bytes, x, stride, columns, aligned, first_row, rows, w, first_block,
                      next * float_k);
    cp_async_commit();
    const shared<uint8_t> stage = memory + i % float_stages * stage_bytes;
    RS_UNROLL
    for (int half = 0; half < 2; half++) {
      uint32_t high[4][2], low[4][2];
      RS_UNROLL
      for (int n = 0; n < 4; n++) {
        const float4 v = (stage + float_chunk(warp_m * 32 + n * 8 + g, half * 4 + t)).as<float4>()[0];
        const split_pair a = split(v.x, v.y), b = split(v.z, v.w);
        high[n][0] = a.high, low[n][0] = a.low;
        high[n][1] = b.high, low[n][1] = b.low;
      }
      RS_UNROLL
      for (int m = 0; m < 2; m++) {
        const shared<uint4> from = (stage + (float_a_bytes + (warp_n * 2 + half) * float_chunks * 16)).as<uint4>() + lane;
        const uint4 h = from[(m * 2) * warp_size], l = from[(m * 2 + 1) * warp_size];
        const uint32_t wh[4] = {h.x, h.y, h.z, h.w}, wl[4] = {l.x, l.y, l.z, l.w};
        RS_UNROLL
        for (int n = 0; n < 4; n++) {
          mma_bf16(acc[m][n], wh, low[n]);
          mma_bf16(acc[m][n], wl, high[n]);
          mma_bf16(acc[m][n], wh, high[n]);
        }
      }
    }
  }
  const int channel = (first_block + warp_n) * warp_channels + thread_channel();
  const bool wide = is_wide(e);
  float bias[4];
  load_bias(e, channel, bias);
  const bool whole = wide && first_row + float_bm <= rows && first_block * warp_channels + float_bn <= e.channels;
  store_tile<8>(first_row + warp_m * 32, rows, channel, whole, wide, e, [&](int i, float(&v)[4]) {
    RS_UNROLL
    for (int j = 0; j < 4; j++) v[j] = thread_sum(acc, i, j) + bias[j];
  });
}

// ---- the operator

bool is_quantized(rs_type type) { return type == RS_W8 || type == RS_W4; }

size_t linear_work(const backend_op &) { return 0; }

cudaError_t linear_cuda(const op_call &c) {
  const backend_tensor &weight = c.op->in[1];
  const int64_t n = weight.rows;
  linear_end e = {};
  e.bias = c.in[2].f32();
  e.act = c.op->params.act;
  e.residual = c.residual, e.residual_stride = c.residual_stride;
  e.y = c.out.data, e.stride = c.out.stride;
  e.channels = static_cast<int32_t>(n);
  e.half = c.out.half;
  if (!is_quantized(weight.type)) {
    const device_value &x = c.in[0];
    const bool aligned = x.stride % 4 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    const int64_t np = round_up(n, warp_channels), kp = round_up(weight.cols, group_k);
    const float_weight w = {static_cast<const uint4 *>(c.in[1].data), static_cast<int32_t>(np / warp_channels),
                            static_cast<int32_t>(kp)};
    const dim3 grid(static_cast<unsigned>(ceil_div(np, float_bn)), static_cast<unsigned>(ceil_div(c.out.capacity, float_bm)));
    return launch(c.stream, grid, float_threads, float_bytes, linear_float, c.out.rows, static_cast<const float *>(x.f32()),
                  x.stride, static_cast<int>(weight.cols), aligned, w, e);
  }
  const int64_t np = round_up(n, block_channels), kp = quantized_kp(weight.cols);
  quantized_weight w = {};
  w.blocks = static_cast<int32_t>(np / warp_channels), w.kp = static_cast<int32_t>(kp);
  w.w = static_cast<const uint8_t *>(c.in[1].data);
  w.scale = reinterpret_cast<const float *>(w.w + np / warp_channels * (kp / step_k) *
                                                      (weight.type == RS_W4 ? piece_bytes<true> : piece_bytes<false>));
  w.colsum = reinterpret_cast<const int32_t *>(w.scale + np);
  // Large tiles read x and w less often; small ones make more blocks, which few rows need.
  const bool large = ceil_div(np, 128) * ceil_div(c.out.capacity, 128) >= c.multiprocessors;
  if (weight.type == RS_W8) return large ? launch_quantized<false, 128, 128>(c, w, e) : launch_quantized<false, 64, 64>(c, w, e);
  return large ? launch_quantized<true, 128, 128>(c, w, e) : launch_quantized<true, 64, 64>(c, w, e);
}

}  // namespace

// ================================================================================ 4  attention

namespace {

// FlashAttention-2 (Dao, arXiv 2307.08691), varlen.  A block has 64 queries of one sequence and one head, 16 a warp; keys and
// values go by in tiles, of which two fit in shared memory: while one is multiplied, cp.async brings the next.  Products are of f16
// with sums of f32, the softmax is online and in powers of two.  Everything is counted from the start of the sequence, and what
// lies beyond its end is zeros: a sequence gets the same bits whatever is beside it.

constexpr int attn_threads = 128, attn_most_d = 128;
constexpr float log2_e = 1.44269504f;

// Rows of a key tile.  Above D = 64 the sums of the result take so many registers that the scores of 64 keys do not fit beside
// them; without values there are no such sums.
template <int D, bool values>
constexpr int attn_key_rows = values && (D > 64) ? 32 : 64;
// Two tiles, and for each key a logarithm of its size or, without values, an attn_sum.
template <int D, bool values>
constexpr int attn_shared = 2 * (values ? 4 * D + 4 : 2 * D + 8) * attn_key_rows<D, values>;

// f16 [T][heads][8 chunks]: of token t and head h at data + t row + h head.  Rows begin at multiples of 16 bytes.
struct half_rows {
  const uint16_t *data;
  int64_t row, head;
  int chunks;
};

struct alignas(8) attn_sum {  // of a query and head, of 2^score: the largest score, and 1 / the sum of 2^(score - most)
  float most, inverse;
};

struct attn_call {
  half_rows q, k, v;
  const int32_t *cu;
  const attn_tile *tiles;
  const int32_t *n_tiles;
  const float *sizes;
  int64_t size_stride;
  void *out;  // [T, heads d]
  int64_t out_stride;
  bool half_out;
  attn_sum *sums;  // [heads][tokens]
  int64_t tokens;
  int d, heads;
  float scale;        // of scores in powers of two
  float factor;       // the same where it is positive, which keeps their order; else 1
  bool pairs;         // two columns of out may be written at once
  int behind, ahead;  // how far from a query the keys are that it sees
};

// ---- tiles of f16 rows in shared memory
//
// ldmatrix reads 8 rows of 16 bytes at the same column, and would read all of them from the same 4 banks of 32 if rows were 128
// bytes and began there.  So chunk c of row r lies where chunk c xor f(r) would: with g = 2, 4 or 8 chunks that divide the row, 8 /
// g rows begin at different places modulo 128 bytes as they are, and f(r) = r g / 8 mod g makes the next ones differ.  The 8 rows
// then cover all 32 banks.  A copy writes 8 chunks side by side in 128 bytes, only their order differs: no conflicts there either.

template <int D>
constexpr int chunk_group = D % 64 == 0   ? 8
                            : D % 32 == 0 ? 4
                                          : 2;

// Where chunks c, 2 + c, 4 + c.. of a row are, in elements: for c of 0 or 1, the sum is an xor, and most of it is known beforehand.
template <int D>
struct row_chunks {
  int row, x;
  RS_DEVICE row_chunks(int r, int c) : row(r * D), x(c ^ (r / (8 / chunk_group<D>)) % chunk_group<D>) {}
  RS_DEVICE int operator[](int k) const {
    constexpr int group = chunk_group<D>;
    return row + (2 * k / group * group + ((2 * k % group) ^ x)) * 8;
  }
};

// Rows of D from f16 rows that begin at `from`, of which `there` are: what is not is zeros.  A thread copies the same chunk of some
// rows, a multiple of 8 apart, so that they all have the same f(r).
template <int D, int rows>
RS_DEVICE void copy_rows(shared<uint16_t> to, const uint16_t *from, int64_t stride, int there, int there_chunks) {
  constexpr int chunks = D / 8, step = chunks <= 2 ? 64 : chunks <= 4 ? 32 : chunks <= 8 ? 16 : 8;
  static_assert(step * chunks <= attn_threads && rows % step == 0, "a step is of whole rows");
  const int row = thread_index() / chunks, chunk = thread_index() % chunks;
  if (row >= step) return;
  const row_chunks<D> place(row, chunk % 2);
  const shared<uint16_t> at = to + place[chunk / 2];
  const uint16_t *x = from + row * stride + chunk * 8;
  const int bytes = chunk < there_chunks ? 16 : 0;
  for (int i = 0; i < rows; i += step, x += step * stride) {
    cp_async16(at + i * D, x, row + i < there ? bytes : 0);
  }
}

// What a thread of a warp reads of 16 rows: all three kinds of fragments take it from the same places.
template <int D>
RS_DEVICE row_chunks<D> fragment() {
  return {lane_of() % 16, lane_of() / 16};
}

// 16 rows of a tile as the left side of products.
template <int D>
RS_DEVICE void load_rows(uint32_t (&a)[D / 16][4], shared<uint16_t> from) {
  const row_chunks<D> place = fragment<D>();
  for (int k = 0; k < D / 16; k++) ldmatrix_x4(a[k], from + place[k]);
}

// s [16][n] = the 16 rows times those of a tile [n][D].
template <int D, int n>
RS_DEVICE void find_scores(float (&s)[n / 8][4], const uint32_t (&a)[D / 16][4], shared<uint16_t> tile) {
  const row_chunks<D> place = fragment<D>();
  for (int i = 0; i < n / 8; i++)
    for (int j = 0; j < 4; j++) s[i][j] = 0;
  for (int k = 0; k < D / 16; k++)
    for (int i = 0; i < n / 16; i++) {
      uint32_t r[4];
      ldmatrix_x4(r, tile + 16 * i * D + place[k]);
      const uint32_t low[2] = {r[0], r[2]}, high[2] = {r[1], r[3]};
      mma_f16(s[2 * i], a[k], low);
      mma_f16(s[2 * i + 1], a[k], high);
    }
}

// o [16][D] += weights [16][n] times a tile of values [n][D].  The places of sums in a product are those of its left side: weights
// never leave the registers.
template <int D, int n>
RS_DEVICE void add_values(float (&o)[D / 8][4], const float (&p)[n / 8][4], shared<uint16_t> tile) {
  const row_chunks<D> place = fragment<D>();
  for (int k = 0; k < n / 16; k++) {
    const uint32_t a[4] = {pack_f16(p[2 * k][0], p[2 * k][1]), pack_f16(p[2 * k][2], p[2 * k][3]),
                           pack_f16(p[2 * k + 1][0], p[2 * k + 1][1]), pack_f16(p[2 * k + 1][2], p[2 * k + 1][3])};
    for (int i = 0; i < D / 16; i++) {
      uint32_t r[4];
      ldmatrix_x4_transposed(r, tile + 16 * k * D + place[i]);
      const uint32_t low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
      mma_f16(o[2 * i], a, low);
      mma_f16(o[2 * i + 1], a, high);
    }
  }
}

RS_DEVICE float quad_sum(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}
RS_DEVICE float quad_max(float v) {
  v = fmaxf(v, shuffle_xor(v, 1));
  return fmaxf(v, shuffle_xor(v, 2));
}

RS_DEVICE float log_size(const attn_call &a, int64_t token) { return log2f(a.sizes[token * a.size_stride]); }

// ---- flash_attn
//
// With values: out.  Without: what the softmax of each query is divided by, for attn_colsum.  fmaxf passes over NaN, but the sum of
// weights does not: a row with a NaN among its scores is NaN.
//
// Two neighbouring columns of the result, of which `left` are there.
RS_DEVICE void store_pair(const attn_call &a, int64_t at, int left, float2 v) {
  if (left <= 0) return;
  const uint32_t halves = pack_finite_f16(v.x, v.y);  // weights are rounded, their sum is not: a little beyond the values
  float *floats = static_cast<float *>(a.out) + at;
  uint16_t *to = static_cast<uint16_t *>(a.out) + at;
  if (a.pairs) {
    if (a.half_out) *reinterpret_cast<uint32_t *>(to) = halves;
    else *reinterpret_cast<float2 *>(floats) = v;
    return;
  }
  if (a.half_out) to[0] = static_cast<uint16_t>(halves);
  else floats[0] = v.x;
  if (left < 2) return;
  if (a.half_out) to[1] = static_cast<uint16_t>(halves >> 16);
  else floats[1] = v.y;
}

// budget: registers 200, shared 33792, spills 0
template <int D, bool values>
RS_KERNEL(attn_threads, D < 32              ? 5
                        : !values || D < 64 ? 4
                        : D <= 96           ? 3
                                            : 2)
flash_attn_kernel(attn_call a) {
  wait_for_previous();
  constexpr int keys = attn_key_rows<D, values>, buffer = keys * D * (values ? 2 : 1);
  if (block_x() >= *a.n_tiles) return;
  const attn_tile tile = a.tiles[block_x()];
  const int head = block_y(), lane = lane_of(), t = lane % 4;
  const int begin = a.cu[tile.sequence], n = a.cu[tile.sequence + 1] - begin;
  const int last = smaller(n, tile.first + attn_tile_rows) - 1;  // query
  const int first_key = larger(0, tile.first - a.behind) / keys * keys, end = smaller(n - 1, last + a.ahead) + 1;
  const int warp_first = tile.first + 16 * warp_of(), warp_last = smaller(last, warp_first + 15);
  const shared<uint16_t> tiles = block_memory<uint16_t>(0);
  const shared<float> logs = block_memory<float>(2 * buffer * 2);

  // Queries lie where the second tile will: they are in registers when that comes.
  static_assert(attn_tile_rows * D <= buffer, "the queries fit in a buffer");
  const auto copy_head = [&](auto rows, shared<uint16_t> to, const half_rows &x, int first) {
    const uint16_t *from = x.data + static_cast<int64_t>(begin + first) * x.row + head * x.head;
    copy_rows<D, decltype(rows)::value>(to, from, x.row, n - first, x.chunks);
  };
  copy_head(std::integral_constant<int, attn_tile_rows>(), tiles + buffer, a.q, tile.first);
  cp_async_commit();
  const auto copy_keys = [&](int key, int to) {
    const std::integral_constant<int, keys> rows;
    copy_head(rows, tiles + to * buffer, a.k, key);
    if (values) copy_head(rows, tiles + to * buffer + keys * D, a.v, key);
    if (a.sizes && thread_index() < keys)
      logs[to * keys + thread_index()] = key + thread_index() < n ? log_size(a, begin + key + thread_index()) : 0;
  };
  copy_keys(first_key, 0);
  cp_async_commit();
  cp_async_wait<1>();
  block_sync();
  uint32_t q[D / 16][4];
  load_rows<D>(q, tiles + buffer + 16 * warp_of() * D);

  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, o[D / 8][4];
  for (int i = 0; i < D / 8; i++)
    for (int j = 0; j < 4; j++) o[i][j] = 0;

  for (int key = first_key, at = 0; key < end; key += keys, at ^= 1) {
    cp_async_wait<0>();
    block_sync();  // this tile is there, and nobody reads the one before it any more
    if (key + keys < end) copy_keys(key + keys, at ^ 1);
    cp_async_commit();
    // Some query of this warp sees some key of the tile.
    if (warp_first <= warp_last && key <= warp_last + a.ahead && key + keys > warp_first - a.behind) {
      float s[keys / 8][4];
      find_scores<D, keys>(s, q, tiles + at * buffer);
      if (!(a.scale > 0))
        for (int i = 0; i < keys / 8; i++)
          for (int j = 0; j < 4; j++) s[i][j] *= a.scale;
      if (key + keys > smaller(n, warp_first + a.ahead + 1) || key < warp_last - a.behind)
        for (int i = 0; i < keys / 8; i++)
          for (int j = 0; j < 4; j++) {
            const int column = key + 8 * i + 2 * t + j % 2, from_here = column - (warp_first + lane / 4 + 8 * (j / 2));
            if (column >= n || from_here < -a.behind || from_here > a.ahead) s[i][j] = -INFINITY;
          }

      // A score is s times the factor + log(size), which is 0 where a size is 1: the same bits as without sizes.
      const shared<float2> log = (logs + at * keys).template as<float2>();
      float keep[2], base[2];
      for (int j = 0; j < 2; j++) {
        float largest = -INFINITY;
        if (a.sizes) {
          for (int i = 0; i < keys / 8; i++) {
            const float2 l = log[4 * i + t];
            largest = fmaxf(largest, fmaxf(fused(s[i][2 * j], a.factor, l.x), fused(s[i][2 * j + 1], a.factor, l.y)));
          }
        } else {
          for (int i = 0; i < keys / 8; i++) largest = fmaxf(largest, fmaxf(s[i][2 * j], s[i][2 * j + 1]));
          largest *= a.factor;
        }
        largest = quad_max(fmaxf(most[j], largest));
        base[j] = largest == -INFINITY ? 0 : largest;  // no key seen yet: weights are 2^-inf, not NaN
        keep[j] = power_of_two(most[j] - base[j]);
        most[j] = largest;
      }
      // exponent(s, i, which of the two columns, base)
      const auto weigh = [&](auto exponent) {
        for (int j = 0; j < 2; j++) {
          float sum = 0;
          for (int i = 0; i < keys / 8; i++)
            for (int c = 0; c < 2; c++) sum += s[i][2 * j + c] = power_of_two(exponent(s[i][2 * j + c], i, c, base[j]));
          total[j] = fused(total[j], keep[j], sum);
        }
      };
      const auto log_of = [&](int i, int c) {
        const float2 l = log[4 * i + t];
        return c ? l.y : l.x;
      };
      // The subtraction is part of the product, but where scores are so large that what the largest one's rounding left out of it
      // would count.
      const bool fits = fmaxf(fabsf(base[0]), fabsf(base[1])) < 65536;
      if (fits && !a.sizes) weigh([&](float x, int, int, float b) { return fused(x, a.factor, -b); });
      else if (fits) weigh([&](float x, int i, int c, float b) { return fused(x, a.factor, log_of(i, c) - b); });
      else weigh([&](float x, int i, int c, float b) { return fused(x, a.factor, a.sizes ? log_of(i, c) : 0) - b; });
      if (values) {
        if (ballot(keep[0] != 1 || keep[1] != 1))
          for (int i = 0; i < D / 8; i++)
            for (int j = 0; j < 4; j++) o[i][j] *= keep[j / 2];
        add_values<D, keys>(o, s, tiles + at * buffer + keys * D);
      }
    }
  }

  for (int j = 0; j < 2; j++) total[j] = quad_sum(total[j]);
  for (int j = 0; j < 2; j++) {
    const float inverse = 1 / total[j];
    const int row = warp_first + lane / 4 + 8 * j;
    if (row >= n) continue;
    if (values) {
      const int64_t at = static_cast<int64_t>(begin + row) * a.out_stride + head * a.d;
      for (int i = 0; i < D / 8; i++) {
        const int column = 8 * i + 2 * t;
        store_pair(a, at + column, a.d - column, {o[i][2 * j] * inverse, o[i][2 * j + 1] * inverse});
      }
    } else if (t == 0) {
      a.sums[head * a.tokens + begin + row] = {most[j], inverse};
    }
  }
}

// Calls f with the smallest size that kernels are made for and d fits in.
template <class F>
cudaError_t with_head_size(int64_t d, const F &f) {
  if (d <= 16) return f(std::integral_constant<int, 16>());
  if (d <= 32) return f(std::integral_constant<int, 32>());
  if (d <= 64) return f(std::integral_constant<int, 64>());
  if (d <= 80) return f(std::integral_constant<int, 80>());
  if (d <= 96) return f(std::integral_constant<int, 96>());
  if (d <= attn_most_d) return f(std::integral_constant<int, attn_most_d>());
  return cudaErrorNotSupported;
}

// ---- f32 to f16

struct halves_call {
  const float *from;
  int64_t stride;
  uint16_t *to;  // [T][heads][8 chunks]
};

// f16 has no numbers beyond: they become the largest, but NaN stays.
RS_DEVICE float within_f16(float x) { return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x; }

// A thread makes 8 elements.  grid.y: which of the tensors.
// budget: registers 32, shared 0, spills 0
RS_KERNEL(256, 4) attn_halves_kernel(halves_call x, halves_call y, halves_call z, const int32_t *rows, int heads, int d) {
  wait_for_previous();
  const halves_call a = block_y() == 0 ? x : block_y() == 1 ? y : z;
  const int chunks = (d + 7) / 8, i = block_x() * 256 + thread_index(), row = i / (heads * chunks);
  if (row >= *rows) return;
  const int head = i % (heads * chunks) / chunks, first = i % chunks * 8;
  const float *from = a.from + row * a.stride + head * d;
  float v[8];
  for (int j = 0; j < 8; j++) v[j] = first + j < d ? within_f16(from[first + j]) : 0;
  const uint4 packed = {pack_f16(v[0], v[1]), pack_f16(v[2], v[3]), pack_f16(v[4], v[5]), pack_f16(v[6], v[7])};
  *reinterpret_cast<uint4 *>(a.to + static_cast<int64_t>(i) * 8) = packed;
}

size_t halves_bytes(const backend_tensor &x, int heads) {
  const int64_t d = x.cols / heads;
  return x.type == RS_F16 ? 0 : static_cast<size_t>(round_up(x.rows * heads * round_up(d, 8) * 2, 256));
}

// The first n inputs as f16: in place where they are, else made in the scratch, which then begins behind them.
cudaError_t give_halves(const op_call &c, int n, half_rows *out, unsigned char *&scratch) {
  const int heads = c.op->params.heads;
  const int64_t d = c.in[0].cols / heads, chunks = ceil_div(d, 8);
  halves_call calls[3] = {};
  unsigned made = 0;
  for (int i = 0; i < n; i++) {
    const device_value &x = c.in[i];
    if (x.half) {
      if (d % 8 || x.stride % 8 || reinterpret_cast<uintptr_t>(x.data) % 16) return cudaErrorInvalidValue;
      out[i] = {x.f16(), x.stride, d, static_cast<int>(chunks)};
      continue;
    }
    auto *to = reinterpret_cast<uint16_t *>(scratch);
    scratch += round_up(x.capacity * heads * chunks * 16, 256);
    calls[made++] = {x.f32(), x.stride, to};
    out[i] = {to, heads * chunks * 8, chunks * 8, static_cast<int>(chunks)};
  }
  if (!made || !c.in[0].capacity) return cudaSuccess;
  const int64_t all = c.in[0].capacity * heads * chunks;
  if (all > INT_MAX - 256) return cudaErrorNotSupported;
  const auto blocks = static_cast<unsigned>(ceil_div(all, 256));
  return launch(c.stream, dim3(blocks, made), 256, 0, attn_halves_kernel, calls[0], calls[1], calls[2], c.in[0].rows, heads,
                static_cast<int>(d));
}

attn_call make_attn_call(const op_call &c, const device_value &cu, const device_value &sizes) {
  const op_params &p = c.op->params;
  attn_call a = {};
  a.cu = cu.i32();
  a.tiles = c.tiles, a.n_tiles = c.n_tiles;
  a.sizes = sizes.f32(), a.size_stride = sizes.stride;
  a.tokens = c.in[0].capacity;
  a.d = static_cast<int>(c.in[0].cols / p.heads), a.heads = p.heads;
  a.behind = p.window ? std::min(p.window, INT_MAX / 2) : INT_MAX / 2, a.ahead = p.causal ? 0 : a.behind;
  a.scale = p.scale * log2_e, a.factor = a.scale > 0 ? a.scale : 1;
  return a;
}

size_t flash_attn_work(const backend_op &op) {
  size_t bytes = 0;
  for (int i = 0; i < 3; i++) bytes += halves_bytes(op.in[i], op.params.heads);
  return bytes;
}

cudaError_t flash_attn_cuda(const op_call &c) {
  attn_call a = make_attn_call(c, c.in[3], c.in[4]);
  if (a.d > attn_most_d) return cudaErrorNotSupported;
  if (!c.tile_capacity) return cudaSuccess;
  half_rows x[3];
  auto *scratch = static_cast<unsigned char *>(c.scratch);
  const cudaError_t status = give_halves(c, 3, x, scratch);
  if (status != cudaSuccess) return status;
  a.q = x[0], a.k = x[1], a.v = x[2];
  a.out = c.out.data, a.out_stride = c.out.stride, a.half_out = c.out.half;
  a.pairs = a.d % 2 == 0 && a.out_stride % 2 == 0 && reinterpret_cast<uintptr_t>(a.out) % (a.half_out ? 4 : 8) == 0;
  const dim3 grid(static_cast<unsigned>(c.tile_capacity), static_cast<unsigned>(c.op->params.heads));
  return with_head_size(a.d, [&](auto size) {
    constexpr int d = decltype(size)::value;
    return launch(c.stream, grid, attn_threads, attn_shared<d, true>, flash_attn_kernel<d, true>, a);
  });
}

// ---- attention of one query: attn_pool, and attn_colsum of class tokens
//
// A block of 256 threads has one sequence and one head, in f32: this reads keys and values once.

constexpr int one_query_threads = 256, one_query_warps = one_query_threads / warp_size;

// A scratch of the block: one_query_warps floats.  The result is the same for all threads.
template <class F>
RS_DEVICE float block_reduce(float v, shared<float> parts, const F &f) {
  for (int mask = 16; mask > 0; mask /= 2) v = f(v, shuffle_xor(v, mask));
  if (lane_of() == 0) parts[warp_of()] = v;
  block_sync();
  v = parts[0];
  for (int i = 1; i < one_query_warps; i++) v = f(v, static_cast<float>(parts[i]));
  block_sync();
  return v;
}

RS_DEVICE float as_float(float x) { return x; }
RS_DEVICE float as_float(uint16_t x) { return f16_to_float(x); }

struct float_rows {
  const float *data;
  int64_t stride;
};

// Weights of n keys, [d] each, for a query: 2^(score - the largest), in `weights`.  -> 1 / their sum.  Both are there for all
// threads.
template <class T>
RS_DEVICE float find_weights(const T *query, const T *keys, int64_t stride, float_rows sizes, int n, int d, float scale,
                             float *weights, shared<float> parts) {
  constexpr int at_once = 4;  // keys of a warp, so that their loads and shuffles overlap
  for (int first = at_once * warp_of(); first < n; first += at_once * one_query_warps) {
    float s[at_once] = {};
    for (int i = lane_of(); i < d; i += warp_size) {
      const float q = as_float(query[i]);
      for (int j = 0; j < at_once; j++) s[j] = fused(q, as_float(keys[smaller(first + j, n - 1) * stride + i]), s[j]);
    }
    for (int j = 0; j < at_once; j++) s[j] = warp_sum(s[j]);
    for (int j = 0; j < at_once; j++)
      if (lane_of() == j && first + j < n)
        weights[first + j] = s[j] * scale + (sizes.data ? log2f(sizes.data[(first + j) * sizes.stride]) : 0);
  }
  block_sync();
  float most = -INFINITY, total = 0;
  for (int i = thread_index(); i < n; i += one_query_threads) most = fmaxf(most, weights[i]);
  most = block_reduce(most, parts, [](float a, float b) { return fmaxf(a, b); });
  for (int i = thread_index(); i < n; i += one_query_threads) {
    const float w = power_of_two(weights[i] - most);
    weights[i] = w;
    total += w;
  }
  return 1 / block_reduce(total, parts, [](float a, float b) { return a + b; });
}

constexpr int pool_columns = 4 * warp_size;  // at once
constexpr int pool_shared = (warp_size + one_query_warps * pool_columns) * 4;

// grid.y: head.  weights: scratch [heads][tokens].
// budget: registers 64, shared 4224, spills 0
RS_KERNEL(one_query_threads, 4)
attn_pool_kernel(const float *query, float_rows k, float_rows v, const int32_t *cu, float_rows sizes, const int32_t *sequences,
                 int d, float scale, float *weights, int64_t tokens, float *out, int64_t out_stride) {
  wait_for_previous();
  if (block_x() >= *sequences) return;
  const int64_t begin = cu[block_x()], first = static_cast<int64_t>(block_y()) * d;
  const int n = static_cast<int>(cu[block_x() + 1] - begin), lane = lane_of();
  float *to = out + block_x() * out_stride + first, *w = weights + block_y() * tokens + begin;
  if (n == 0) {
    for (int i = thread_index(); i < d; i += one_query_threads) to[i] = 0;
    return;
  }
  const shared<float> parts = block_memory<float>(0), sums = parts + warp_size;  // sums: [warps][pool_columns]
  sizes.data = sizes.data ? sizes.data + begin * sizes.stride : nullptr;
  const float inverse = find_weights(query + first, k.data + begin * k.stride + first, k.stride, sizes, n, d, scale, w, parts);
  for (int column = 0; column < d; column += pool_columns) {
    const float *from = v.data + begin * v.stride + first + column;
    const int there = smaller(pool_columns, d - column);
    float sum[4] = {};
    for (int i = warp_of(); i < n; i += one_query_warps)
      for (int j = 0; j < 4; j++) sum[j] = fused(w[i], from[i * v.stride + smaller(lane + warp_size * j, there - 1)], sum[j]);
    for (int j = 0; j < 4; j++) sums[warp_of() * pool_columns + lane + warp_size * j] = sum[j];
    block_sync();
    if (thread_index() < there) {
      float total = 0;
      for (int i = 0; i < one_query_warps; i++) total += sums[i * pool_columns + thread_index()];
      to[column + thread_index()] = total * inverse;
    }
    block_sync();
  }
}

size_t attn_pool_work(const backend_op &op) { return static_cast<size_t>(op.in[1].rows * op.params.heads) * 4; }

cudaError_t attn_pool_cuda(const op_call &c) {
  const op_params &p = c.op->params;
  if (!c.sequence_capacity) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(c.sequence_capacity), static_cast<unsigned>(p.heads));
  const auto rows = [](const device_value &x) { return float_rows{x.f32(), x.stride}; };
  return launch(c.stream, grid, one_query_threads, pool_shared, attn_pool_kernel, c.in[0].f32(), rows(c.in[1]), rows(c.in[2]),
                c.in[3].i32(), rows(c.in[4]), c.sequences, static_cast<int>(c.in[1].cols / p.heads), p.scale * log2_e,
                static_cast<float *>(c.scratch), c.in[1].capacity, c.out.f32(), c.out.stride);
}

// ---- attn_colsum
//
// What a key gets is a column of weights, which are known when the softmax of their rows is: flash_attn without values finds what
// that divides by, then a block takes 64 keys of a head and goes through the queries, as flash_attn does through keys, with the
// sides of the product changed: the sum over queries stays in a register.  What heads add up to is summed in their order.  Queries
// that see none of the 64 keys are left out.

// grid.y: head.  part: [heads][tokens].
// budget: registers 128, shared 33792, spills 0
template <int D>
RS_KERNEL(attn_threads, 4)
attn_columns_kernel(attn_call a, float *part) {
  wait_for_previous();
  constexpr int rows = attn_tile_rows, buffer = rows * D;
  if (block_x() >= *a.n_tiles) return;
  const attn_tile tile = a.tiles[block_x()];
  const int head = block_y(), lane = lane_of(), t = lane % 4;
  const int begin = a.cu[tile.sequence], n = a.cu[tile.sequence + 1] - begin, last = smaller(n, tile.first + rows) - 1;
  const int first_query = larger(0, tile.first - a.ahead) / rows * rows, end = smaller(n - 1, last + a.behind) + 1;
  const shared<uint16_t> tiles = block_memory<uint16_t>(0);
  const shared<attn_sum> sums = block_memory<attn_sum>(2 * buffer * 2);

  const auto copy = [&](int buffer_at, const half_rows &x, int first) {
    const uint16_t *from = x.data + static_cast<int64_t>(begin + first) * x.row + head * x.head;
    copy_rows<D, rows>(tiles + buffer_at * buffer, from, x.row, n - first, x.chunks);
  };
  const auto copy_queries = [&](int query, int to) {
    copy(to, a.q, query);
    const int at = query + thread_index();
    if (thread_index() < rows) sums[to * rows + thread_index()] = at < n ? a.sums[head * a.tokens + begin + at] : attn_sum{0, 0};
  };
  copy(1, a.k, tile.first);
  cp_async_commit();
  copy_queries(first_query, 0);
  cp_async_commit();
  cp_async_wait<1>();
  block_sync();
  uint32_t k[D / 16][4];
  load_rows<D>(k, tiles + buffer + 16 * warp_of() * D);
  const int warp_first = tile.first + 16 * warp_of(), row = warp_first + lane / 4;
  float log[2] = {0, 0}, total[2] = {0, 0};
  for (int j = 0; j < 2; j++)
    if (a.sizes && row + 8 * j < n) log[j] = log_size(a, begin + row + 8 * j);

  for (int query = first_query, at = 0; query < end; query += rows, at ^= 1) {
    cp_async_wait<0>();
    block_sync();
    if (query + rows < end) copy_queries(query + rows, at ^ 1);
    cp_async_commit();
    if (warp_first >= n) continue;
    const bool all_seen = warp_first + 15 - query <= a.ahead && query + rows - 1 - warp_first <= a.behind;
    float s[rows / 8][4];
    find_scores<D, rows>(s, k, tiles + at * buffer);
    for (int i = 0; i < rows / 8; i++)
      for (int c = 0; c < 2; c++) {
        const attn_sum sum = sums[at * rows + 8 * i + 2 * t + c];
        for (int j = 0; j < 2; j++) {
          const int from_there = row + 8 * j - (query + 8 * i + 2 * t + c);
          if (!all_seen && (from_there < -a.behind || from_there > a.ahead)) continue;
          // Not above 0: were a sum of products other than before, scores of 10^10 would differ by more than 2^x can take.
          const float x = fminf(fused(s[i][2 * j + c], a.scale, log[j]) - sum.most, 0);
          total[j] = fused(power_of_two(x), sum.inverse, total[j]);
        }
      }
  }
  for (int j = 0; j < 2; j++) total[j] = quad_sum(total[j]);
  const float weight = 1 / (static_cast<float>(a.heads) * static_cast<float>(n));
  for (int j = 0; j < 2; j++)
    if (t == 0 && row + 8 * j < n) part[head * a.tokens + begin + row + 8 * j] = total[j] * weight;
}

// What keys get of the first query.  grid.y: head.  part: [heads][tokens].
template <class T>
RS_KERNEL(one_query_threads, 4)
attn_first_kernel(const T *q, const T *k, int64_t q_stride, int64_t k_stride, const int32_t *cu, float_rows sizes,
                  const int32_t *sequences, int d, float scale, int ahead, int heads, float *part, int64_t tokens) {
  wait_for_previous();
  if (block_x() >= *sequences) return;
  const int64_t begin = cu[block_x()], first = static_cast<int64_t>(block_y()) * d;
  const int n = static_cast<int>(cu[block_x() + 1] - begin);
  if (n == 0) return;
  const int seen = smaller(n - 1, ahead) + 1;
  float *w = part + block_y() * tokens + begin;
  sizes.data = sizes.data ? sizes.data + begin * sizes.stride : nullptr;
  const float inverse = find_weights(q + begin * q_stride + first, k + begin * k_stride + first, k_stride, sizes, seen, d, scale, w,
                                     block_memory<float>(0));
  for (int i = thread_index(); i < n; i += one_query_threads) w[i] = i < seen ? w[i] * (inverse / static_cast<float>(heads)) : 0;
}

RS_KERNEL(256, 4)
attn_add_heads_kernel(const float *part, int64_t tokens, const int32_t *rows, int heads, float *out, int64_t out_stride) {
  wait_for_previous();
  const int i = block_x() * 256 + thread_index();
  if (i >= *rows) return;
  float sum = 0;
  for (int head = 0; head < heads; head++) sum += part[head * tokens + i];
  out[i * out_stride] = sum;
}

// The scratch: part, and sums and f16 inputs where all queries count.
size_t attn_colsum_work(const backend_op &op) {
  const int heads = op.params.heads;
  const auto each = static_cast<size_t>(op.in[0].rows * heads);
  const size_t part = static_cast<size_t>(round_up(static_cast<int64_t>(each * sizeof(float)), 256));
  if (op.params.first_only) return part;
  return part + static_cast<size_t>(round_up(static_cast<int64_t>(each * sizeof(attn_sum)), 256)) + halves_bytes(op.in[0], heads) +
         halves_bytes(op.in[1], heads);
}

cudaError_t launch_attn_first(const op_call &c, float *part) {
  const op_params &p = c.op->params;
  const device_value &q = c.in[0], &k = c.in[1];
  const dim3 grid(static_cast<unsigned>(c.sequence_capacity), static_cast<unsigned>(p.heads));
  const auto start = [&](auto kernel, auto from_q, auto from_k) {
    return launch(c.stream, grid, one_query_threads, warp_size * 4, kernel, from_q, from_k, q.stride, k.stride, c.in[2].i32(),
                  float_rows{c.in[3].f32(), c.in[3].stride}, c.sequences, static_cast<int>(q.cols / p.heads), p.scale * log2_e,
                  make_attn_call(c, c.in[2], c.in[3]).ahead, p.heads, part, q.capacity);
  };
  if (q.half != k.half) return cudaErrorInvalidValue;
  using halves = const uint16_t *;
  using floats = const float *;
  if (q.half) return start(attn_first_kernel<uint16_t>, halves(q.f16()), halves(k.f16()));
  return start(attn_first_kernel<float>, floats(q.f32()), floats(k.f32()));
}

cudaError_t launch_attn_columns(const op_call &c, float *part, unsigned char *scratch) {
  attn_call a = make_attn_call(c, c.in[2], c.in[3]);
  if (a.d > attn_most_d) return cudaErrorNotSupported;
  a.sums = reinterpret_cast<attn_sum *>(scratch);
  scratch += round_up(a.tokens * a.heads * static_cast<int64_t>(sizeof(attn_sum)), 256);
  half_rows x[2];
  const cudaError_t status = give_halves(c, 2, x, scratch);
  if (status != cudaSuccess) return status;
  a.q = x[0], a.k = x[1];
  const dim3 grid(static_cast<unsigned>(c.tile_capacity), static_cast<unsigned>(a.heads));
  return with_head_size(a.d, [&](auto size) {
    constexpr int d = decltype(size)::value;
    const cudaError_t found = launch(c.stream, grid, attn_threads, attn_shared<d, false>, flash_attn_kernel<d, false>, a);
    if (found != cudaSuccess) return found;
    return launch(c.stream, grid, attn_threads, attn_shared<d, false>, attn_columns_kernel<d>, a, part);
  });
}

cudaError_t attn_colsum_cuda(const op_call &c) {
  const int heads = c.op->params.heads;
  const int64_t tokens = c.in[0].capacity;
  if (!tokens || !c.tile_capacity || !c.sequence_capacity) return cudaSuccess;
  auto *part = static_cast<float *>(c.scratch);
  auto *behind = static_cast<unsigned char *>(c.scratch) + round_up(tokens * heads * 4, 256);
  const cudaError_t status = c.op->params.first_only ? launch_attn_first(c, part) : launch_attn_columns(c, part, behind);
  if (status != cudaSuccess) return status;
  return launch(c.stream, dim3(static_cast<unsigned>(ceil_div(tokens, 256))), 256, 0, attn_add_heads_kernel, part, tokens,
                c.in[0].rows, heads, c.out.f32(), c.out.stride);
}

}  // namespace

// ================================================================================ 5  operators on rows
//
// A warp a row, 4 columns a lane at a time where everything is aligned for it, else one.  No kernel makes more of the rows than
// *value.rows says, and none lets a row depend on another one (or, pool and the like, a sequence on another one).

namespace {

constexpr int row_threads = 256, block_rows = row_threads / warp_size;

// `N` neighbours, read and written at once.
template <class T, int N>
struct alignas(sizeof(T) * N) piece {
  T v[N];
};
template <int N, class T>
RS_DEVICE piece<T, N> load(const T *from) {
  return *reinterpret_cast<const piece<T, N> *>(from);
}
template <class T, int N>
RS_DEVICE void store(T *to, const piece<T, N> &v) {
  *reinterpret_cast<piece<T, N> *>(to) = v;
}

// Whether rows of `cols` floats of these tensors can be taken by fours.  Tensors that are left out can.
bool by_fours(int64_t cols, std::initializer_list<const device_value *> values) {
  bool can = cols % 4 == 0;
  for (const device_value *v : values)
    can = can && reinterpret_cast<uintptr_t>(v->data) % 16 == 0 && (!v->data || v->stride % 4 == 0);
  return can;
}

unsigned blocks_of(int64_t n, int64_t each) { return static_cast<unsigned>(ceil_div(n, each)); }

// A kernel that takes a warp a row, for `rows` of them.
template <class... P, class... A>
cudaError_t launch_rows(const op_call &c, int64_t rows, void (*kernel)(P...), A... args) {
  return rows > 0 ? launch(c.stream, dim3(blocks_of(rows, block_rows)), row_threads, 0, kernel, args...) : cudaSuccess;
}
// One that takes a block a sequence.
template <class... P, class... A>
cudaError_t launch_sequences(const op_call &c, size_t bytes, void (*kernel)(P...), A... args) {
  if (c.sequence_capacity <= 0) return cudaSuccess;
  return launch(c.stream, dim3(static_cast<unsigned>(c.sequence_capacity)), row_threads, bytes, kernel, args...);
}

RS_DEVICE int64_t row_of() { return static_cast<int64_t>(block_x()) * block_rows + warp_of(); }

RS_DEVICE int count_bits(uint32_t v) {
  v -= v >> 1 & 0x55555555u;
  v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
  return static_cast<int>(((v + (v >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}
RS_DEVICE int lowest_bit(uint32_t v) { return count_bits((v & (~v + 1)) - 1); }

// The first of [begin, end) for which `before` does not hold: a warp looks at 32 places at once.
template <class F>
RS_DEVICE int warp_partition(int begin, int end, F before) {
  while (begin < end) {
    const int step = (end - begin + warp_size - 1) / warp_size, at = begin + lane_of() * step;
    const int parts = count_bits(ballot(at < end && before(at)));
    if (parts == 0) return begin;
    end = smaller(begin + parts * step, end);
    begin += (parts - 1) * step + 1;
  }
  return begin;
}
// The sequence that has a row.  Empty ones have none.
RS_DEVICE int warp_sequence(const int32_t *cu, int sequences, int row) {
  return warp_partition(0, sequences + 1, [&](int i) { return cu[i] <= row; }) - 1;
}

// A sum over a block of row_threads, in an order of its own; every thread gets it.  `memory`: block_rows values.
RS_DEVICE double block_sum(double v, shared<double> memory) {
  v = warp_sum(v);
  block_sync();  // whoever still reads the sum before this one
  if (lane_of() == 0) memory[warp_of()] = v;
  block_sync();
  double sum = 0;
  for (int i = 0; i < block_rows; i++) sum += memory[i];
  return sum;
}

// ---- embed

// Bytes from one row of a table to the next; the codecs of rs.cpp, section 5, say what is in them.
constexpr int64_t w4_groups(int64_t k) { return ceil_div(k, group_k); }
int64_t table_stride(rs_type type, int64_t k) {
  switch (type) {
    case RS_F32:
      return k * 4;
    case RS_F16:
      return k * 2;
    case RS_W8:
      return 4 + k;
    case RS_W4:
      return 4 + w4_groups(k) + w4_groups(k) * group_k / 2;
    default:
      return 0;
  }
}

RS_DEVICE float float_of_bytes(const uint8_t *p) {  // of any alignment
  return bits_to_float(static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
                       static_cast<uint32_t>(p[3]) << 24);
}

// Columns j to j + N - 1 of a row of a table of k columns.
template <rs_type type, int N>
RS_DEVICE piece<float, N> table_columns(const uint8_t *row, int k, int j) {
  piece<float, N> y;
  if constexpr (type == RS_F32) {
    y = load<N>(reinterpret_cast<const float *>(row) + j);
  } else if constexpr (type == RS_F16) {
    const piece<uint16_t, N> h = load<N>(reinterpret_cast<const uint16_t *>(row) + j);
    for (int i = 0; i < N; i++) y.v[i] = f16_to_float(h.v[i]);
  } else if constexpr (type == RS_W8) {
    const float scale = float_of_bytes(row);
    const piece<int8_t, N> w = load<N>(reinterpret_cast<const int8_t *>(row) + 4 + j);
    for (int i = 0; i < N; i++) y.v[i] = scale * static_cast<float>(w.v[i]);
  } else {
    const int groups = (k + group_k - 1) / group_k;
    const float scale = float_of_bytes(row) * static_cast<float>(row[4 + j / group_k]);
    for (int i = 0; i < N; i++) {
      const int nibble = row[4 + groups + (j + i) / 2] >> ((j + i) % 2 * 4) & 15;
      y.v[i] = scale * static_cast<float>(nibble - 8);
    }
  }
  return y;
}

struct embed_args {
  const int32_t *ids, *rows;
  const uint8_t *table;
  float *y;
  int64_t stride, ldy;
  int n_ids, k, index;
  run_fault *fault;
};

template <rs_type type, int N>
RS_KERNEL(row_threads, 4)
embed_kernel(embed_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  const int id = a.ids[r];
  const bool known = id >= 0 && id < a.n_ids;
  if (!known && lane_of() == 0) report(a.fault, RS_ERR_ARGUMENT, a.index, static_cast<int>(r), id);
  const uint8_t *row = a.table + (known ? id : 0) * a.stride;
  for (int j = lane_of() * N; j < a.k; j += warp_size * N) {
    piece<float, N> v = {};
    if (known) v = table_columns<type, N>(row, a.k, j);
    store(a.y + r * a.ldy + j, v);
  }
}

size_t embed_work(const backend_op &) { return 0; }
cudaError_t embed_cuda(const op_call &c) {
  const rs_type type = c.op->in[1].type;
  const int64_t k = c.out.cols;
  const embed_args a = {c.in[0].i32(),
                        c.out.rows,
                        static_cast<const uint8_t *>(c.in[1].data),
                        c.out.f32(),
                        table_stride(type, k),
                        c.out.stride,
                        static_cast<int>(std::min<int64_t>(c.in[1].capacity, INT_MAX)),
                        static_cast<int>(k),
                        c.index,
                        c.fault};
  const bool fours = by_fours(k, {&c.out}) && reinterpret_cast<uintptr_t>(a.table) % 16 == 0;
  switch (type) {
    case RS_F32:
      return launch_rows(c, c.out.capacity, fours ? embed_kernel<RS_F32, 4> : embed_kernel<RS_F32, 1>, a);
    case RS_F16:
      return launch_rows(c, c.out.capacity, fours ? embed_kernel<RS_F16, 4> : embed_kernel<RS_F16, 1>, a);
    case RS_W8:
      return launch_rows(c, c.out.capacity, fours ? embed_kernel<RS_W8, 4> : embed_kernel<RS_W8, 1>, a);
    case RS_W4:
      return launch_rows(c, c.out.capacity, fours ? embed_kernel<RS_W4, 4> : embed_kernel<RS_W4, 1>, a);
    default:
      return cudaErrorInvalidValue;
  }
}

// ---- add

struct add_args {
  const float *a, *b;
  float *y;
  int64_t lda, ldb, ldy;
  const int32_t *rows;
  int n;
};

template <int N>
RS_KERNEL(row_threads, 4)
add_kernel(add_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  for (int j = lane_of() * N; j < a.n; j += warp_size * N) {
    piece<float, N> v = load<N>(a.a + r * a.lda + j);
    const piece<float, N> w = load<N>(a.b + r * a.ldb + j);
    for (int i = 0; i < N; i++) v.v[i] += w.v[i];
    store(a.y + r * a.ldy + j, v);
  }
}

size_t add_work(const backend_op &) { return 0; }
cudaError_t add_cuda(const op_call &c) {
  const add_args a = {c.in[0].f32(),  c.in[1].f32(), c.out.f32(), c.in[0].stride,
                      c.in[1].stride, c.out.stride,  c.out.rows,  static_cast<int>(c.out.cols)};
  return launch_rows(c, c.out.capacity, by_fours(c.out.cols, {&c.out, &c.in[0], &c.in[1]}) ? add_kernel<4> : add_kernel<1>, a);
}

// ---- shift: how far each row moved

// Of one row of n columns, as rs_shift; every lane gets it.  Sums are of f32, as those of the vector units of a CPU.
template <int N>
RS_DEVICE float warp_distance(const float *to, const float *from, int n, rs_distance distance) {
  float sum = 0, left = 0, right = 0;  // COS: the product, and the squares of both
  for (int j = lane_of() * N; j < n; j += warp_size * N) {
    const piece<float, N> a = load<N>(to + j);
    piece<float, N> b = {};
    if (from) b = load<N>(from + j);
    for (int i = 0; i < N; i++) {
      const float x = a.v[i], y = b.v[i], d = x - y;
      if (distance == RS_DISTANCE_L1) sum += fabsf(d);
      else if (distance == RS_DISTANCE_L2) sum = fused(d, d, sum);
      else sum = fused(x, y, sum), left = fused(x, x, left), right = fused(y, y, right);
    }
  }
  sum = warp_sum(sum);
  if (distance == RS_DISTANCE_L1) return sum;
  if (distance == RS_DISTANCE_L2) return sqrtf(sum);
  const float norms = sqrtf(warp_sum(left)) * sqrtf(warp_sum(right));
  return norms == 0 ? 1 : 1 - sum / norms;
}

struct shift_args {
  const float *to, *from;
  float *y;
  int64_t ldt, ldf, ldy;
  const int32_t *rows;
  int n;
  rs_distance distance;
};

template <int N>
RS_KERNEL(row_threads, 4)
shift_kernel(shift_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  const float far = warp_distance<N>(a.to + r * a.ldt, a.from ? a.from + r * a.ldf : nullptr, a.n, a.distance);
  if (lane_of() == 0) a.y[r * a.ldy] = far;
}

size_t shift_work(const backend_op &) { return 0; }
cudaError_t shift_cuda(const op_call &c) {
  const shift_args a = {c.in[0].f32(),        c.in[1].f32(), c.out.f32(), c.in[0].stride,
                        c.in[1].stride,       c.out.stride,  c.out.rows,  static_cast<int>(c.in[0].cols),
                        c.op->params.distance};
  return launch_rows(c, c.out.capacity, by_fours(c.in[0].cols, {&c.in[0], &c.in[1]}) ? shift_kernel<4> : shift_kernel<1>, a);
}

// ---- layer_norm, and the quantization of rows
//
// Memory is what these wait for, so a warp reads its row once and keeps it: in registers where it is at most 8 pieces a lane, else
// in shared memory, and where even that is too small, in the result.  A lane only ever looks at columns of its own.

// full: 128 columns for each piece, so that nothing is asked before a read and all are on their way together.
template <int count, bool full>
struct row_in_registers {
  static constexpr int width = 4;
  piece<float, 4> v[count];

  RS_DEVICE static int column(int i) { return lane_of() * width + i * (warp_size * width); }
  // f(column) -> piece: what the row is
  template <class F>
  RS_DEVICE void make(int n, F f) {
    for (int i = 0; i < count; i++)
      if (full || column(i) < n) v[i] = f(column(i));
  }
  // f(column, piece &)
  template <class F>
  RS_DEVICE void change(int n, F f) {
    for (int i = 0; i < count; i++)
      if (full || column(i) < n) f(column(i), v[i]);
  }
  // f(column, piece)
  template <class F>
  RS_DEVICE void look(int n, F f) const {
    for (int i = 0; i < count; i++)
      if (full || column(i) < n) f(column(i), v[i]);
  }
};

// f16: what is only quantized.  Two columns a register.
RS_DEVICE piece<float, 4> four_floats(const uint2 &v) {
  return {{f16_to_float(static_cast<uint16_t>(v.x)), f16_to_float(static_cast<uint16_t>(v.x >> 16)),
           f16_to_float(static_cast<uint16_t>(v.y)), f16_to_float(static_cast<uint16_t>(v.y >> 16))}};
}
template <int count, bool full>
struct halves_in_registers {
  static constexpr int width = 4;
  uint2 v[count];

  RS_DEVICE halves_in_registers(int n, const uint16_t *x) {
    const uint16_t *mine = x + column(0);  // the rest of a column is a constant
    for (int i = 0; i < count; i++)
      if (full || column(i) < n) v[i] = *reinterpret_cast<const uint2 *>(mine + (column(i) - column(0)));
  }
  RS_DEVICE static int column(int i) { return lane_of() * width + i * (warp_size * width); }
  template <class F>
  RS_DEVICE void look(int n, F f) const {
    for (int i = 0; i < count; i++)
      if (full || column(i) < n) f(column(i), four_floats(v[i]));
  }
};
struct halves_in_memory {
  static constexpr int width = 4;
  const uint16_t *at;

  template <class F>
  RS_DEVICE void look(int n, F f) const {
    for (int j = lane_of() * width; j < n; j += warp_size * width) f(j, four_floats(*reinterpret_cast<const uint2 *>(at + j)));
  }
};

template <class P, int N>  // P: a pointer to pieces
struct row_in_memory {
  static constexpr int width = N;
  P at;

  template <class F>
  RS_DEVICE void make(int n, F f) {
    for (int j = lane_of(); j < n / N; j += warp_size) at[j] = f(j * N);
  }
  template <class F>
  RS_DEVICE void change(int n, F f) {
    for (int j = lane_of(); j < n / N; j += warp_size) {
      piece<float, N> v = at[j];
      f(j * N, v);
      at[j] = v;
    }
  }
  template <class F>
  RS_DEVICE void look(int n, F f) const {
    for (int j = lane_of(); j < n / N; j += warp_size) {
      const piece<float, N> v = at[j];
      f(j * N, v);
    }
  }
};

// 255 steps from the smallest to the largest value, as quant_range and quantize_one of rs.cpp, section 6, to the bit.
RS_DEVICE row_quant quant_range(float low, float high) {  // NaN, where the row has one
  const float scale = (high - low) / 255;
  if (!(fabsf(scale) <= FLT_MAX)) return {bits_to_float(0x7fc00000u), 0};
  if (scale < FLT_MIN) return {FLT_MIN, 0};  // nothing but zeros (or denormals)
  return {scale, static_cast<int32_t>(rintf(-low / scale))};
}

// Row r, which a warp holds, times `scale` where there is one.  Columns behind the row's are the zero point.
template <class R>
RS_DEVICE void quantize_held(const R &row, int64_t r, int n, const float *scale, uint8_t *q, int kp, row_quant *rq) {
  const auto scaled = [&](int j, piece<float, R::width> v) {
    if (scale) {
      const piece<float, R::width> s = load<R::width>(scale + j);
      for (int i = 0; i < R::width; i++) v.v[i] *= s.v[i];
    }
    return v;
  };
  float low = 0, high = 0;
  row.look(n, [&](int j, const piece<float, R::width> &held) {
    const piece<float, R::width> v = scaled(j, held);
    for (int i = 0; i < R::width; i++) low = min_or_nan(low, v.v[i]), high = max_or_nan(high, v.v[i]);
  });
  for (int mask = 16; mask > 0; mask /= 2)
    low = min_or_nan(low, shuffle_xor(low, mask)), high = max_or_nan(high, shuffle_xor(high, mask));
  const row_quant to = quant_range(low, high);
  const bool shows = to.scale != to.scale;  // zeros, whose scale says what they are
  const float inverse = shows ? 0 : 1 / to.scale, least = -static_cast<float>(to.zero), most = 255 + least;
  // In a float between 2^23 and 2^24, the last bit is 1: the sum is rounded as rint() would, and its last byte is the result.
  const float whole = 12582912;
  const int in_tile = static_cast<int>(r % q_rows);
  q += r / q_rows * (kp / q_columns) * q_tile;
  const auto place = [&](int j) { return j / q_columns * q_tile + q_chunk(in_tile, j / 16 % 4) + j % 16; };
  row.look(n, [&](int j, const piece<float, R::width> &held) {
    const piece<float, R::width> v = scaled(j, held);
    piece<uint8_t, R::width> u;
    for (int i = 0; i < R::width; i++) {
      const float step = fminf(fmaxf(v.v[i] * inverse, least), most);  // NaN: the least, 0
      u.v[i] = static_cast<uint8_t>(float_to_bits(step + whole) + static_cast<uint32_t>(to.zero));
    }
    store(q + place(j), u);
  });
  for (int j = n + lane_of(); j < kp; j += warp_size) q[place(j)] = static_cast<uint8_t>(to.zero);
  if (lane_of() == 0) rq[r] = to;
}

struct norm_args {
  const float *x, *residual, *gamma, *beta;  // residual: or nullptr
  float *y;                                  // or nullptr, where no one reads it but as q
  int64_t ldx, ldr, ldy;
  const int32_t *rows;
  int n, held;  // held: rows of a block
  float eps;
  uint8_t *q;  // or nullptr
  row_quant *rq;
  int kp;
  const float *scale;  // of q, or nullptr
  float *shift;        // or nullptr
  int64_t shift_stride;
};

template <class R>
RS_DEVICE void layer_norm_row(const norm_args &a, int64_t r, R &row) {
  constexpr int N = R::width;
  const auto n = static_cast<float>(a.n);
  const float *x = a.x + r * a.ldx;
  row.make(a.n, [&](int j) { return load<N>(x + j); });
  if (a.shift) {
    float squares = 0;
    row.look(a.n, [&](int, const piece<float, N> &v) {
      for (int i = 0; i < N; i++) squares = fused(v.v[i], v.v[i], squares);
    });
    squares = warp_sum(squares);
    if (lane_of() == 0) a.shift[r * a.shift_stride] = sqrtf(squares);
  }
  if (a.residual) {
    const float *residual = a.residual + r * a.ldr;
    row.change(a.n, [&](int j, piece<float, N> &v) {
      const piece<float, N> more = load<N>(residual + j);
      for (int i = 0; i < N; i++) v.v[i] += more.v[i];
    });
  }
  float sum = 0, squares = 0;
  row.look(a.n, [&](int, const piece<float, N> &v) {
    for (int i = 0; i < N; i++) sum += v.v[i];
  });
  const float mean = warp_sum(sum) / n;
  row.look(a.n, [&](int, const piece<float, N> &v) {
    for (int i = 0; i < N; i++) squares = fused(v.v[i] - mean, v.v[i] - mean, squares);
  });
  const float factor = 1 / sqrtf(warp_sum(squares) / n + a.eps);
  row.change(a.n, [&](int j, piece<float, N> &v) {
    const piece<float, N> gamma = load<N>(a.gamma + j), beta = load<N>(a.beta + j);
    for (int i = 0; i < N; i++) v.v[i] = fused((v.v[i] - mean) * factor, gamma.v[i], beta.v[i]);
  });
  // Not before all of gamma and beta are on their way: to the compiler, a write may change them.
  if (a.y) row.look(a.n, [&](int j, const piece<float, N> &v) { store(a.y + r * a.ldy + j, v); });
  if (a.q) quantize_held(row, r, a.n, a.scale, a.q, a.kp, a.rq);
}

// budget: registers 128, shared 0, spills 0
template <int count, bool full>
RS_KERNEL(row_threads, count > 4 ? 2 : 3)
layer_norm_registers(norm_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  row_in_registers<count, full> row;
  layer_norm_row(a, r, row);
}
// budget: registers 80, shared 98304, spills 0
template <int N>
RS_KERNEL(row_threads, 3)
layer_norm_shared(norm_args a) {
  wait_for_previous();
  const int64_t r = static_cast<int64_t>(block_x()) * a.held + warp_of();
  if (r >= *a.rows) return;
  const int bytes = (a.n * 4 + 15) / 16 * 16;
  row_in_memory<shared<piece<float, N>>, N> row = {block_memory<piece<float, N>>(warp_of() * bytes)};
  layer_norm_row(a, r, row);
}
template <int N>
RS_KERNEL(row_threads, 4)
layer_norm_global(norm_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  row_in_memory<piece<float, N> *, N> row = {reinterpret_cast<piece<float, N> *>(a.y + r * a.ldy)};
  layer_norm_row(a, r, row);
}

// How rows of n floats are held: pieces a lane in registers, or 0; then how many rows a block has in shared memory, or 0.
struct row_plan {
  int pieces, held;
  size_t bytes;  // of shared memory
};
constexpr int64_t shared_budget = 48 * 1024, shared_most = 96 * 1024;  // a block: as a rule, and where one row takes more
// Does layer_norm read a row once?  Its floats then need not be stored.
bool norm_keeps_rows(int64_t n) { return n * 4 <= shared_most; }
row_plan plan_row(int64_t n, bool fours) {
  for (const int pieces : {1, 2, 3, 4, 6, 8})
    if (fours && n <= pieces * 4 * warp_size) return {pieces, block_rows, 0};
  const int64_t bytes = round_up(n * 4, 16), held = std::max<int64_t>(1, std::min<int64_t>(block_rows, shared_budget / bytes));
  if (bytes > shared_most) return {0, 0, 0};
  return {0, static_cast<int>(held), static_cast<size_t>(held * bytes)};
}

// The cases of a switch over row_plan::pieces.
#define RS_HELD_IN(pieces, kernel, rows) \
  case pieces: \
    return launch_rows(c, rows, a.n == pieces * 4 * warp_size ? kernel<pieces, true> : kernel<pieces, false>, a);
#define RS_HELD_IN_REGISTERS(kernel, rows) \
  RS_HELD_IN(1, kernel, rows) \
  RS_HELD_IN(2, kernel, rows) \
  RS_HELD_IN(3, kernel, rows) \
  RS_HELD_IN(4, kernel, rows) \
  RS_HELD_IN(6, kernel, rows) \
  RS_HELD_IN(8, kernel, rows)

size_t layer_norm_work(const backend_op &) { return 0; }
cudaError_t layer_norm_cuda(const op_call &c) {
  const int64_t n = c.out.cols, rows = c.out.capacity;
  const bool fours = by_fours(n, {&c.out, &c.in[0], &c.in[1]}) && reinterpret_cast<uintptr_t>(c.in[2].data) % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(c.in[3].data) % 16 == 0 && reinterpret_cast<uintptr_t>(c.scale) % 16 == 0;
  const row_plan plan = plan_row(n, fours);
  const norm_args a = {c.in[0].f32(),  c.in[1].f32(),    c.in[2].f32(), c.in[3].f32(), c.out.f32(),
                       c.in[0].stride, c.in[1].stride,   c.out.stride,  c.out.rows,    static_cast<int>(n),
                       plan.held,      c.op->params.eps, c.q,           c.rq,          static_cast<int>(c.kp),
                       c.scale,        c.shift,          c.shift_stride};
  if (rows <= 0) return cudaSuccess;
  switch (plan.pieces) { RS_HELD_IN_REGISTERS(layer_norm_registers, rows) }
  if (plan.held)
    return launch_large(shared_most, c.stream, dim3(blocks_of(rows, plan.held)), plan.held * warp_size, plan.bytes,
                        fours ? layer_norm_shared<4> : layer_norm_shared<1>, a);
  if (!a.y) return cudaErrorInvalidValue;
  return launch_rows(c, rows, fours ? layer_norm_global<4> : layer_norm_global<1>, a);
}

// ---- quantize: rows that no layer_norm quantized

template <class T>  // float, or the bits of an f16
struct quantize_args {
  const T *x;
  int64_t ldx;
  const int32_t *rows;
  int n, held;  // held: rows of a block, where they are in shared memory
  uint8_t *q;
  row_quant *rq;
  int kp;
  const float *scale;  // or nullptr
};

// budget: registers 96, shared 0, spills 0
template <int count, bool full>
RS_KERNEL(row_threads, count > 6 ? 2 : 3)
quantize_registers(quantize_args<float> a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  row_in_registers<count, full> row;
  row.make(a.n, [&](int j) { return load<4>(a.x + r * a.ldx + j); });
  quantize_held(row, r, a.n, a.scale, a.q, a.kp, a.rq);
}
// budget: registers 64, shared 98304, spills 0
template <int N>
RS_KERNEL(row_threads, 4)
quantize_shared(quantize_args<float> a) {
  wait_for_previous();
  const int64_t r = static_cast<int64_t>(block_x()) * a.held + warp_of();
  if (r >= *a.rows) return;
  const int bytes = (a.n * 4 + 15) / 16 * 16;
  row_in_memory<shared<piece<float, N>>, N> row = {block_memory<piece<float, N>>(warp_of() * bytes)};
  row.make(a.n, [&](int j) { return load<N>(a.x + r * a.ldx + j); });
  quantize_held(row, r, a.n, a.scale, a.q, a.kp, a.rq);
}
template <int N>
RS_KERNEL(row_threads, 4)
quantize_global(quantize_args<float> a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  const row_in_memory<const piece<float, N> *, N> row = {reinterpret_cast<const piece<float, N> *>(a.x + r * a.ldx)};
  quantize_held(row, r, a.n, a.scale, a.q, a.kp, a.rq);
}

// budget: registers 128, shared 0, spills 0
template <int count, bool full>
RS_KERNEL(row_threads, count > 12  ? 2
                       : count > 8 ? 3
                                   : 4)
quantize_halves(quantize_args<uint16_t> a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  const halves_in_registers<count, full> row(a.n, a.x + r * a.ldx);
  quantize_held(row, r, a.n, a.scale, a.q, a.kp, a.rq);
}
RS_KERNEL(row_threads, 4) quantize_many_halves(quantize_args<uint16_t> a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  quantize_held(halves_in_memory{a.x + r * a.ldx}, r, a.n, a.scale, a.q, a.kp, a.rq);
}

// What quantize_rows can read as f16.
bool quantizes_halves(int64_t cols, int64_t stride, int64_t first) { return cols % 4 == 0 && stride % 4 == 0 && first % 4 == 0; }

// The cases of a switch over how many times all lanes read.
#define RS_HALVES_IN(count) \
  case count: \
    return launch_rows(c, x.capacity, a.n == count * 4 * warp_size ? quantize_halves<count, true> : quantize_halves<count, false>, \
                       a);
cudaError_t quantize_half_rows(const op_call &c, const device_value &x, uint8_t *q, row_quant *rq, int64_t kp) {
  if (!quantizes_halves(x.cols, x.stride, 0) || reinterpret_cast<uintptr_t>(x.data) % 8 ||
      reinterpret_cast<uintptr_t>(c.scale) % 16)
    return cudaErrorInvalidValue;
  const quantize_args<uint16_t> a = {x.f16(), x.stride, x.rows, static_cast<int>(x.cols), 0, q, rq, static_cast<int>(kp), c.scale};
  int64_t counts = ceil_div(x.cols, 4 * warp_size);
  counts = round_up(counts, counts <= 4 ? 1 : counts <= 8 ? 2 : counts <= 16 ? 4 : 8);
  switch (counts) {
    RS_HALVES_IN(1)
    RS_HALVES_IN(2)
    RS_HALVES_IN(3)
    RS_HALVES_IN(4)
    RS_HALVES_IN(6)
    RS_HALVES_IN(8)
    RS_HALVES_IN(12)
    RS_HALVES_IN(16)
    RS_HALVES_IN(24)
    default:
      return launch_rows(c, x.capacity, quantize_many_halves, a);
  }
}

cudaError_t quantize_rows(const op_call &c, const device_value &x, uint8_t *q, row_quant *rq, int64_t kp) {
  if (x.half) return quantize_half_rows(c, x, q, rq, kp);
  const bool fours = by_fours(x.cols, {&x}) && reinterpret_cast<uintptr_t>(c.scale) % 16 == 0;
  const row_plan plan = plan_row(x.cols, fours);
  const quantize_args<float> a = {x.f32(), x.stride, x.rows, static_cast<int>(x.cols), plan.held, q, rq, static_cast<int>(kp),
                                  c.scale};
  if (x.capacity <= 0) return cudaSuccess;
  switch (plan.pieces) { RS_HELD_IN_REGISTERS(quantize_registers, x.capacity) }
  if (plan.held)
    return launch_large(shared_most, c.stream, dim3(blocks_of(x.capacity, plan.held)), plan.held * warp_size, plan.bytes,
                        fours ? quantize_shared<4> : quantize_shared<1>, a);
  return launch_rows(c, x.capacity, fours ? quantize_global<4> : quantize_global<1>, a);
}

// ---- gate

struct gate_args {
  const float *x;
  float *y;
  int64_t ldx, ldy;
  const int32_t *rows;
  int n;
  rs_activation act;
};

template <int N>
RS_KERNEL(row_threads, 4)
gate_kernel(gate_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  const float *x = a.x + r * a.ldx;
  for (int j = lane_of() * N; j < a.n; j += warp_size * N) {
    piece<float, N> v = load<N>(x + j);
    const piece<float, N> w = load<N>(x + a.n + j);
    for (int i = 0; i < N; i++) v.v[i] = activate(a.act, v.v[i]) * w.v[i];
    store(a.y + r * a.ldy + j, v);
  }
}

size_t gate_work(const backend_op &) { return 0; }
cudaError_t gate_cuda(const op_call &c) {
  const gate_args a = {c.in[0].f32(),   c.out.f32(), c.in[0].stride, c.out.stride, c.out.rows, static_cast<int>(c.out.cols),
                       c.op->params.act};
  return launch_rows(c, c.out.capacity, by_fours(c.out.cols, {&c.out, &c.in[0]}) ? gate_kernel<4> : gate_kernel<1>, a);
}

// ---- rope_table

struct rope_table_args {
  const int32_t *positions, *rows;
  const float *frequencies;
  float *y;
  int64_t ldy;
  int half;
};

// As cos_sin of rs.cpp, to the bit.
RS_DEVICE void cos_sin(float x, float *cosine, float *sine) {
  const double whole = 0x1.8p52, shifted = x * 0.63661977236758134 + whole, turns = shifted - whole;
  const int quarter = low_bits(shifted);
  const double r = (x - turns * 0x1.921fb54p+0) - turns * 0x1.10b4611a62633p-30, t = r * r;
  const double s = r + r * t * (-1.0 / 6 + t * (1.0 / 120 + t * (-1.0 / 5040 + t * (1.0 / 362880 - t / 39916800))));
  const double c = 1 + t * (-0.5 + t * (1.0 / 24 + t * (-1.0 / 720 + t * (1.0 / 40320 + t * (-1.0 / 3628800 + t / 479001600)))));
  const float a = static_cast<float>(quarter & 1 ? s : c), b = static_cast<float>(quarter & 1 ? c : s);
  *cosine = (quarter + 1) & 2 ? -a : a;
  *sine = quarter & 2 ? -b : b;
}

// budget: registers 64, shared 0, spills 0
RS_KERNEL(row_threads, 4) rope_table_kernel(rope_table_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  float *y = a.y + r * a.ldy;
  for (int j = lane_of(); j < a.half; j += warp_size)
    cos_sin(static_cast<float>(a.positions[r]) * a.frequencies[j], y + j, y + a.half + j);
}

size_t rope_table_work(const backend_op &) { return 0; }
cudaError_t rope_table_cuda(const op_call &c) {
  const rope_table_args a = {c.in[0].i32(), c.out.rows, c.in[1].f32(), c.out.f32(), c.out.stride, static_cast<int>(c.out.cols / 2)};
  return launch_rows(c, c.out.capacity, rope_table_kernel, a);
}

// ---- rope

struct rope_args {
  const float *x, *table;
  void *y;  // f32, or f16 where only attention reads it
  int64_t ldx, ldt, ldy;
  const int32_t *rows;
  int n, d, half;
};

// Products and sums are not fused, so that the bits are the CPU's.
// budget: registers 48, shared 0, spills 0
template <int N, class T>
RS_KERNEL(row_threads, 4)
rope_kernel(rope_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  const float *x = a.x + r * a.ldx, *table = a.table + r * a.ldt;
  for (int j = lane_of() * N; j < a.n; j += warp_size * N) {
    const int column = j % a.d, angle = column < a.half ? column : column - a.half;
    piece<float, N> v = load<N>(x + j);
    if (angle < a.half) {
      const bool second = column >= a.half;
      const piece<float, N> other = load<N>(second ? x + j - a.half : x + j + a.half);
      const piece<float, N> c = load<N>(table + angle), s = load<N>(table + a.half + angle);
      for (int i = 0; i < N; i++) {
        const float kept = v.v[i] * c.v[i], turned = other.v[i] * s.v[i];
        v.v[i] = second ? kept + turned : kept - turned;
      }
    }
    T *y = static_cast<T *>(a.y) + r * a.ldy + j;
    if constexpr (sizeof(T) == 4) {
      store(y, v);
    } else {
      piece<uint16_t, N> halves;
      for (int i = 0; i < N; i++) halves.v[i] = static_cast<uint16_t>(pack_f16(within_f16(v.v[i]), 0));
      store(y, halves);
    }
  }
}

size_t rope_work(const backend_op &) { return 0; }
cudaError_t rope_cuda(const op_call &c) {
  const int64_t half = c.in[1].cols / 2, d = c.out.cols / c.op->params.heads;
  const rope_args a = {c.in[0].f32(),       c.in[1].f32(),         c.out.data, c.in[0].stride,
                       c.in[1].stride,      c.out.stride,          c.out.rows, static_cast<int>(c.out.cols),
                       static_cast<int>(d), static_cast<int>(half)};
  const bool fours = half % 4 == 0 && d % 4 == 0 && by_fours(c.out.cols, {&c.out, &c.in[0], &c.in[1]});
  if (c.out.half) return launch_rows(c, c.out.capacity, fours ? rope_kernel<4, uint16_t> : rope_kernel<1, uint16_t>, a);
  return launch_rows(c, c.out.capacity, fours ? rope_kernel<4, float> : rope_kernel<1, float>, a);
}

// ---- pool
//
// A thread a column, which takes the rows in order, as the CPU does: the results have its bits.

constexpr int pool_threads = 128, pool_ahead = 8;  // rows that are read before the first is needed

struct pool_args {
  const float *x, *sizes;
  float *y;
  int64_t ldx, lds, ldy;
  const int32_t *cu, *sequences;
  int n, skip;
  rs_pooling pooling;
};

// f(row, value) of a column of n rows, in order.
template <class F>
RS_DEVICE void for_column(const float *x, int64_t stride, int64_t n, F f) {
  int64_t i = 0;
  for (; i + pool_ahead <= n; i += pool_ahead) {
    float v[pool_ahead];
    for (int k = 0; k < pool_ahead; k++) v[k] = x[(i + k) * stride];
    for (int k = 0; k < pool_ahead; k++) f(i + k, v[k]);
  }
  for (; i < n; i++) f(i, x[i * stride]);
}

RS_KERNEL(pool_threads, 4) pool_kernel(pool_args a) {
  wait_for_previous();
  const int b = block_x(), j = block_y() * pool_threads + thread_index();
  if (b >= *a.sequences || j >= a.n) return;
  const int64_t first = static_cast<int64_t>(a.cu[b]) + a.skip, n = a.cu[b + 1] - first;
  float y = 0;
  if (n > 0) {
    const float *x = a.x + first * a.ldx + j;
    if (a.pooling == RS_POOL_CLS) {
      y = x[0];
    } else if (a.pooling == RS_POOL_LAST) {
      y = x[(n - 1) * a.ldx];
    } else if (a.pooling == RS_POOL_MAX) {
      y = x[0];
      for_column(x, a.ldx, n, [&](int64_t, float v) { y = v > y || v != v ? v : y; });
    } else {
      double count = 0;
      if (a.pooling == RS_POOL_WEIGHTED_MEAN) {
        for_column(x, a.ldx, n, [&](int64_t i, float v) { y += static_cast<float>(i + 1) * v; });
        count = static_cast<double>(n) * static_cast<double>(n + 1) / 2;
      } else if (a.sizes) {
        const float *sizes = a.sizes + first * a.lds;
        for_column(x, a.ldx, n,
                   [&](int64_t i, float v) { y += sizes[i * a.lds] * v, count += static_cast<double>(sizes[i * a.lds]); });
      } else {
        for_column(x, a.ldx, n, [&](int64_t, float v) { y += v; });
        count = static_cast<double>(n);
      }
      y *= static_cast<float>(1 / (a.pooling == RS_POOL_MEAN_SQRT_LEN ? sqrt(count) : count));
    }
  }
  a.y[b * a.ldy + j] = y;
}

size_t pool_work(const backend_op &) { return 0; }
cudaError_t pool_cuda(const op_call &c) {
  const pool_args a = {c.in[0].f32(),     c.in[2].f32(),       c.out.f32(),
                       c.in[0].stride,    c.in[2].stride,      c.out.stride,
                       c.in[1].i32(),     c.sequences,         static_cast<int>(c.out.cols),
                       c.op->params.skip, c.op->params.pooling};
  if (c.sequence_capacity <= 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(c.sequence_capacity), blocks_of(c.out.cols, pool_threads));
  return launch(c.stream, grid, pool_threads, 0, pool_kernel, a);
}

// ---- l2_normalize

struct normalize_args {
  const float *x;
  float *y;
  int64_t ldx, ldy;
  const int32_t *rows;
  int n;
};

template <int N>
RS_KERNEL(row_threads, 4)
l2_normalize_kernel(normalize_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  double sum = 0;
  for (int j = lane_of() * N; j < a.n; j += warp_size * N) {
    const piece<float, N> v = load<N>(a.x + r * a.ldx + j);
    for (int i = 0; i < N; i++) sum += static_cast<double>(v.v[i]) * static_cast<double>(v.v[i]);
  }
  sum = warp_sum(sum);
  const auto factor = static_cast<float>(sum > 0 ? 1 / sqrt(sum) : sum != sum ? sum : 1);
  for (int j = lane_of() * N; j < a.n; j += warp_size * N) {
    piece<float, N> v = load<N>(a.x + r * a.ldx + j);
    for (int i = 0; i < N; i++) v.v[i] *= factor;
    store(a.y + r * a.ldy + j, v);
  }
}

size_t l2_normalize_work(const backend_op &) { return 0; }
cudaError_t l2_normalize_cuda(const op_call &c) {
  const normalize_args a = {c.in[0].f32(), c.out.f32(), c.in[0].stride, c.out.stride, c.out.rows, static_cast<int>(c.out.cols)};
  return launch_rows(c, c.out.capacity, by_fours(c.out.cols, {&c.out, &c.in[0]}) ? l2_normalize_kernel<4> : l2_normalize_kernel<1>,
                     a);
}

// ---- centre_distance: the means of all sequences, [sequences][cols] in scratch, then a warp a row

struct centre_args {
  const float *x;
  float *mean, *y;
  int64_t ldx, ldy;
  const int32_t *cu, *sequences, *rows;
  int n;
};

RS_KERNEL(pool_threads, 4) centre_kernel(centre_args a) {
  wait_for_previous();
  const int b = block_x(), j = block_y() * pool_threads + thread_index();
  if (b >= *a.sequences || j >= a.n) return;
  const int n = a.cu[b + 1] - a.cu[b];
  float sum = 0;
  for_column(a.x + a.cu[b] * a.ldx + j, a.ldx, n, [&](int64_t, float v) { sum += v; });
  const float factor = 1 / static_cast<float>(n);
  a.mean[static_cast<int64_t>(b) * a.n + j] = sum * factor;
}

template <int N>
RS_KERNEL(row_threads, 4)
centre_distance_kernel(centre_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  const int b = warp_sequence(a.cu, *a.sequences, static_cast<int>(r));
  const float far = warp_distance<N>(a.x + r * a.ldx, a.mean + static_cast<int64_t>(b) * a.n, a.n, RS_DISTANCE_L2);
  if (lane_of() == 0) a.y[r * a.ldy] = far;
}

size_t centre_distance_work(const backend_op &op) {
  return static_cast<size_t>(std::max<int64_t>(0, op.in[1].rows - 1) * op.in[0].cols) * 4;
}
cudaError_t centre_distance_cuda(const op_call &c) {
  const centre_args a = {
      c.in[0].f32(), static_cast<float *>(c.scratch), c.out.f32(), c.in[0].stride, c.out.stride, c.in[1].i32(), c.sequences,
      c.out.rows,    static_cast<int>(c.in[0].cols)};
  if (c.sequence_capacity <= 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(c.sequence_capacity), blocks_of(a.n, pool_threads));
  const cudaError_t status = launch(c.stream, grid, pool_threads, 0, centre_kernel, a);
  if (status != cudaSuccess) return status;
  return launch_rows(c, c.out.capacity, by_fours(a.n, {&c.in[0]}) ? centre_distance_kernel<4> : centre_distance_kernel<1>, a);
}

// ---- position_score

RS_DEVICE uint64_t mix_bits(uint64_t x) {  // splitmix64, as in rs.cpp
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

RS_KERNEL(row_threads, 4)
position_score_kernel(float *y, int64_t ldy, const int32_t *cu, const int32_t *sequences, bool random, uint64_t seed) {
  wait_for_previous();
  const int b = block_x();
  if (b >= *sequences) return;
  const int n = cu[b + 1] - cu[b];
  const uint64_t start = mix_bits(mix_bits(seed) + static_cast<uint64_t>(n));
  for (int i = thread_index(); i < n; i += row_threads)
    y[(cu[b] + i) * ldy] =
        random ? static_cast<float>(mix_bits(start + static_cast<uint64_t>(i)) >> 40) * 0x1p-24f : -static_cast<float>(i);
}

size_t position_score_work(const backend_op &) { return 0; }
cudaError_t position_score_cuda(const op_call &c) {
  return launch_sequences(c, 0, position_score_kernel, c.out.f32(), c.out.stride, c.in[0].i32(), c.sequences, c.op->params.random,
                          c.op->params.seed);
}

// ---- standardize

// Of n scores, by a block; the order of the sums depends on n alone.
struct moments {
  double mean, deviation;
  RS_DEVICE double of(float x) const {
    return deviation > 0 ? (static_cast<double>(x) - mean) / deviation : deviation != deviation ? deviation : 0;
  }
};
RS_DEVICE moments block_moments(const float *x, int64_t stride, int n, shared<double> memory) {
  double sum = 0, squares = 0;
  for (int i = thread_index(); i < n; i += row_threads) sum += static_cast<double>(x[i * stride]);
  const double mean = block_sum(sum, memory) / n;
  for (int i = thread_index(); i < n; i += row_threads) {
    const double d = static_cast<double>(x[i * stride]) - mean;
    squares += d * d;
  }
  return {mean, sqrt(block_sum(squares, memory) / n)};
}

RS_KERNEL(row_threads, 4)
standardize_kernel(const float *x, int64_t ldx, float *y, int64_t ldy, const int32_t *cu, const int32_t *sequences, float weight) {
  wait_for_previous();
  const int b = block_x();
  if (b >= *sequences) return;
  const int begin = cu[b], n = cu[b + 1] - begin;
  if (n <= 0) return;
  const moments m = block_moments(x + begin * ldx, ldx, n, block_memory<double>(0));
  for (int i = thread_index(); i < n; i += row_threads)
    y[(begin + i) * ldy] = static_cast<float>(static_cast<double>(weight) * m.of(x[(begin + i) * ldx]));
}

size_t standardize_work(const backend_op &) { return 0; }
cudaError_t standardize_cuda(const op_call &c) {
  return launch_sequences(c, block_rows * sizeof(double), standardize_kernel, c.in[0].f32(), c.in[0].stride, c.out.f32(),
                          c.out.stride, c.in[1].i32(), c.sequences, c.op->params.weight);
}

}  // namespace

// ================================================================================ 6  token dropping
//
// How many tokens of each sequence stay is known before a run, so every row has its place: which tokens they are is all that is
// found here.  Nothing depends on the order in which threads come to something: floats are added in the order of the rows.

namespace {

struct kept_row {
  int32_t before, origin;  // the row at the level before, and that of the graph's inputs; both -1: others are folded into it
};

// ---- token_drop: a block a sequence

constexpr int drop_cached = 1024;  // keys that are kept in shared memory; those of longer sequences are in scratch
constexpr int drop_digits = 256, drop_position_bits = 31;

// Protected tokens first, then by falling score, then by rising position, as in rs.cpp: no two are equal.
RS_DEVICE uint64_t drop_order(bool protect, float score, int position) {
  score += 0.0f;  // one zero
  uint32_t bits = float_to_bits(score);
  bits = bits >> 31 ? ~bits : bits | 1u << 31;
  return static_cast<uint64_t>(protect) << 63 | static_cast<uint64_t>(bits) << drop_position_bits |
         static_cast<uint64_t>(INT32_MAX - position);
}

struct drop_args {
  const float *score;
  int64_t lds;
  const int32_t *from, *to, *protect, *sequences;  // protect: or nullptr
  const kept_row *previous;                        // or nullptr
  kept_row *out;
  uint64_t *keys;
  bool lowest, keep_first, fold;
  int index;
  run_fault *fault;
};

// Where the parts of a block's memory are, in bytes.
constexpr int drop_counts_at = drop_cached * 8, drop_warps_at = drop_counts_at + drop_digits * 4,
              drop_chosen_at = drop_warps_at + block_rows * 4, drop_bytes = drop_chosen_at + 16;

// budget: registers 64, shared 9264, spills 0
RS_KERNEL(row_threads, 4) token_drop_kernel(drop_args a) {
  wait_for_previous();
  const int b = block_x();
  if (b >= *a.sequences) return;
  const int begin = a.from[b], n = a.from[b + 1] - begin, to = a.to[b], all = a.to[b + 1] - to;
  if (n <= 0 || all <= 0) return;
  const int keep = a.fold && all < n ? all - 1 : all, lane = lane_of(), warp = warp_of();
  // A warp has a range of positions to itself, and a lane always the same ones: no one else looks at their keys.
  const int each = (n + row_threads - 1) / row_threads * warp_size, first = smaller(warp * each, n),
            last = smaller(first + each, n);
  const shared<uint64_t> cache = block_memory<uint64_t>(0);
  const shared<int> counts = block_memory<int>(drop_counts_at), warps = block_memory<int>(drop_warps_at),
                    chosen = block_memory<int>(drop_chosen_at);
  const bool cached = n <= drop_cached;
  uint64_t *keys = a.keys + begin;
  const auto origin = [&](int i) { return a.previous ? a.previous[begin + i].origin : begin + i; };

  for (int i = first + lane; i < last; i += warp_size) {
    float score = keep < n ? a.score[(begin + i) * a.lds] : 0;  // where all stay, no score counts: there may be none
    if (score != score) {
      report(a.fault, RS_ERR_NUMERIC, a.index, i, b);
      score = 0;  // the operators behind this one get rows that exist
    }
    bool stays = a.keep_first && i == 0;
    if (a.protect && !stays) {
      const int at = origin(i);
      stays = at >= 0 && a.protect[at] != 0;
    }
    const uint64_t key = drop_order(stays, a.lowest ? -score : score, i);
    if (cached) cache[i] = key;
    else keys[i] = key;
  }
  const auto key_of = [&](int i) {
    const uint64_t key = cached ? static_cast<uint64_t>(cache[i]) : keys[i];
    return key;
  };

  // The keep-th largest key, by digits from the highest on: those with a larger prefix are in, those with a smaller one out.  It is
  // found when all that share the prefix are in.
  uint64_t least = keep > 0 ? 0 : ~uint64_t{0};
  if (keep > 0 && keep < n) {
    int wanted = keep;
    for (int shift = 56; shift >= 0; shift -= 8) {
      counts[thread_index()] = 0;
      block_sync();
      for (int base = first; base < last; base += warp_size) {
        const int i = base + lane;
        const uint64_t key = i < last ? key_of(i) : 0;
        const bool in = i < last && (shift == 56 || key >> (shift + 8) == least >> (shift + 8));
        const int digit = static_cast<int>(key >> shift & 255);
        // Scores are much alike in their high digits: what the first of a warp has is counted once for all.
        const uint32_t some = ballot(in);
        if (some == 0) continue;
        const int leader = lowest_bit(some), common = shuffle(digit, leader);
        const uint32_t same = ballot(in && digit == common);
        if (lane == leader) shared_add(counts + digit, count_bits(same));
        else if (in && !(same >> lane & 1)) shared_add(counts + digit, 1);
      }
      block_sync();
      if (warp == 0) {  // a lane has 8 digits, the first of them the highest
        int mine = 0;
        for (int k = 0; k < 8; k++) mine += counts[255 - 8 * lane - k];
        int above = mine;  // of the lanes up to this one
        for (int step = 1; step < warp_size; step *= 2) {
          const int other = shuffle(above, lane >= step ? lane - step : lane);
          if (lane >= step) above += other;
        }
        above -= mine;
        if (above < wanted && wanted <= above + mine) {
          for (int k = 0; k < 8; k++) {
            const int digit = 255 - 8 * lane - k, count = counts[digit];
            if (above < wanted && wanted <= above + count) chosen[0] = digit, chosen[1] = wanted - above, chosen[2] = count;
            above += count;
          }
        }
      }
      block_sync();
      const int digit = chosen[0], count = chosen[2];
      wanted = chosen[1];
      least |= static_cast<uint64_t>(digit) << shift;
      if (wanted == count) break;
    }
  }

  // Those that stay, in the order of their positions.
  int staying = 0;
  for (int base = first; base < last; base += warp_size) {
    const int i = base + lane;
    staying += count_bits(ballot(i < last && key_of(i) >= least));
  }
  if (lane == 0) warps[warp] = staying;
  block_sync();
  int at = to;
  for (int w = 0; w < warp; w++) at += warps[w];
  for (int base = first; base < last; base += warp_size) {
    const int i = base + lane;
    const bool in = i < last && key_of(i) >= least;
    const uint32_t some = ballot(in);
    if (in) a.out[at + count_bits(some & ((1u << lane) - 1))] = {begin + i, origin(i)};
    at += count_bits(some);
  }
  if (keep < all && thread_index() == 0) a.out[to + all - 1] = {-1, -1};
}

size_t token_drop_work(const backend_op &op) { return static_cast<size_t>(op.in[0].rows) * sizeof(uint64_t); }
cudaError_t token_drop_cuda(const op_call &c) {
  const rs_drop_rule &rule = c.op->params.rule;
  const drop_args a = {c.in[0].f32(),
                       c.in[0].stride,
                       c.in[1].i32(),
                       c.in[4].i32(),
                       c.in[2].i32(),
                       c.sequences,
                       static_cast<const kept_row *>(c.in[3].data),
                       static_cast<kept_row *>(c.out.data),
                       static_cast<uint64_t *>(c.scratch),
                       rule.lowest,
                       rule.keep_first,
                       rule.fold,
                       c.index,
                       c.fault};
  return launch_sequences(c, drop_bytes, token_drop_kernel, a);
}

// ---- token_gather, token_restore

struct copy_args {
  const float *x, *before;  // before: token_restore
  float *y;
  int64_t ldx, ldb, ldy;
  const kept_row *kept;
  const int32_t *rows, *kept_rows;
  int n;
};

// Several pieces are read before the first is written: to the compiler, a write may change what is read behind it.
template <int N>
RS_DEVICE void copy_row(const float *from, float *to, int n) {
  constexpr int ahead = 4, step = warp_size * N;
  for (int j = lane_of() * N; j < n; j += ahead * step) {
    piece<float, N> v[ahead];
    for (int i = 0; i < ahead; i++)
      if (j + i * step < n) v[i] = load<N>(from + j + i * step);
    for (int i = 0; i < ahead; i++)
      if (j + i * step < n) store(to + j + i * step, v[i]);
  }
}

// budget: registers 40, shared 0, spills 0
template <int N>
RS_KERNEL(row_threads, 4)
token_gather_kernel(copy_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  copy_row<N>(a.x + a.kept[r].before * a.ldx, a.y + r * a.ldy, a.n);
}

template <int N>
RS_KERNEL(row_threads, 4)
token_restore_kernel(copy_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  const int kept = *a.kept_rows, at = warp_partition(0, kept, [&](int i) { return a.kept[i].before < r; });
  const bool stayed = at < kept && a.kept[at].before == r;
  copy_row<N>(stayed ? a.x + at * a.ldx : a.before + r * a.ldb, a.y + r * a.ldy, a.n);
}

size_t token_gather_work(const backend_op &) { return 0; }
cudaError_t token_gather_cuda(const op_call &c) {
  const copy_args a = {c.in[0].f32(),
                       nullptr,
                       c.out.f32(),
                       c.in[0].stride,
                       0,
                       c.out.stride,
                       static_cast<const kept_row *>(c.in[1].data),
                       c.out.rows,
                       nullptr,
                       static_cast<int>(c.out.cols)};
  return launch_rows(c, c.out.capacity, by_fours(a.n, {&c.out, &c.in[0]}) ? token_gather_kernel<4> : token_gather_kernel<1>, a);
}

size_t token_restore_work(const backend_op &) { return 0; }
cudaError_t token_restore_cuda(const op_call &c) {
  const copy_args a = {c.in[0].f32(),
                       c.in[1].f32(),
                       c.out.f32(),
                       c.in[0].stride,
                       c.in[1].stride,
                       c.out.stride,
                       static_cast<const kept_row *>(c.in[2].data),
                       c.out.rows,
                       c.in[0].rows,
                       static_cast<int>(c.out.cols)};
  return launch_rows(c, c.out.capacity,
                     by_fours(a.n, {&c.out, &c.in[0], &c.in[1]}) ? token_restore_kernel<4> : token_restore_kernel<1>, a);
}

// ---- token_assign: the row that each token becomes part of
//
// A block has 64 rows, and of each sequence that they are of, the rows that stay by 64: products of 64 x 64, 32 columns at a time,
// each the sum of its columns in order whatever block it falls into.

constexpr int assign_tile = 64, assign_k = 32,
              assign_ld = assign_k / 4 + 1;  // in pieces: one more, so that rows lie in other banks
constexpr int assign_keys_at = assign_tile * assign_ld * 16, assign_place_at = 2 * assign_keys_at,
              assign_any_at = assign_place_at + assign_tile * 4, assign_bytes = assign_any_at + 16;

struct assign_args {
  const float *x;
  int64_t ldx;
  const kept_row *kept;
  const int32_t *from, *to, *sequences, *rows, *kept_rows;
  float *factors;  // [kept rows]: 1 / norm
  int32_t *out;
  int64_t ldo;
  int n;
};

template <int N>
RS_KERNEL(row_threads, 4)
assign_factors_kernel(assign_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.kept_rows) return;
  const int row = a.kept[r].before;
  if (row < 0) return;
  const float norm = warp_distance<N>(a.x + row * a.ldx, nullptr, a.n, RS_DISTANCE_L2);
  if (lane_of() == 0) a.factors[r] = norm > 0 ? 1 / norm : 0;
}

// Columns j to j + 3 of a row of n; zeros behind its end.
template <int N>
RS_DEVICE piece<float, 4> load_columns(const float *row, int j, int n) {
  piece<float, 4> v = {};
  if constexpr (N == 4) {
    if (j < n) v = load<4>(row + j);
  } else {
    for (int i = 0; i < 4; i++)
      if (j + i < n) v.v[i] = row[j + i];
  }
  return v;
}

// The larger product, of equal ones the first.
struct likeness {
  float like;
  int32_t at;
  RS_DEVICE void see(float other, int32_t place) {
    if (other > like || (other == like && place < at)) like = other, at = place;
  }
};

// budget: registers 96, shared 18704, spills 0
template <int N>
RS_KERNEL(row_threads, 2)
token_assign_kernel(assign_args a) {
  wait_for_previous();
  const int first = block_x() * assign_tile, last = smaller(first + assign_tile, *a.rows), t = thread_index();
  if (first >= last) return;
  const shared<piece<float, 4>> left = block_memory<piece<float, 4>>(0), right = block_memory<piece<float, 4>>(assign_keys_at);
  const shared<int> place = block_memory<int>(assign_place_at), any = block_memory<int>(assign_any_at);
  const int sequences = *a.sequences;
  for (int b = warp_sequence(a.from, sequences, first); b < sequences && a.from[b] < last; b++) {
    const int begin = a.to[b], end = a.to[b + 1], low = larger(first, a.from[b]), high = smaller(last, a.from[b + 1]);
    if (low >= high || begin >= end) continue;
    const bool extra = a.kept[end - 1].before < 0;
    // Rows that stay, and those that are folded into the last one, need no products.
    if (t < assign_tile) {
      const int row = first + t;
      int at = -1;
      bool open = row >= low && row < high;
      if (open) {
        int next = begin, above = extra ? end - 1 : end;
        while (next < above) {
          const int middle = next + (above - next) / 2;
          if (a.kept[middle].before < row) next = middle + 1;
          else above = middle;
        }
        if (next < (extra ? end - 1 : end) && a.kept[next].before == row) at = next;
        else if (extra) at = end - 1;
        if (at >= 0) a.out[row * a.ldo] = at;
        open = at < 0;
      }
      place[t] = open ? 1 : 0;
      const uint32_t some = ballot(open);
      if (lane_of() == 0) any[warp_of()] = some != 0;
    }
    block_sync();
    const int open = any[0] | any[1];
    block_sync();  // before the next sequence
    if (!open) continue;

    const int tx = t % 16, ty = t / 16;
    likeness best[4];
    const float least = -bits_to_float(0x7f800000u);
    for (int i = 0; i < 4; i++) best[i] = {least, INT32_MAX};
    for (int key = begin; key < end; key += assign_tile) {
      float sum[4][4] = {};
      for (int k = 0; k < a.n; k += assign_k) {
        for (int i = t; i < assign_tile * (assign_k / 4); i += row_threads) {
          const int row = i / (assign_k / 4), column = i % (assign_k / 4);
          piece<float, 4> v = {}, w = {};
          if (first + row < last) v = load_columns<N>(a.x + (first + row) * a.ldx, k + column * 4, a.n);
          if (key + row < end) {
            w = load_columns<N>(a.x + a.kept[key + row].before * a.ldx, k + column * 4, a.n);
            const float factor = a.factors[key + row];
            for (int e = 0; e < 4; e++) w.v[e] *= factor;
          }
          left[row * assign_ld + column] = v;
          right[row * assign_ld + column] = w;
        }
        block_sync();
        for (int column = 0; column < assign_k / 4; column++) {
          piece<float, 4> v[4], w[4];
          for (int i = 0; i < 4; i++) v[i] = left[(ty + 16 * i) * assign_ld + column];
          for (int i = 0; i < 4; i++) w[i] = right[(tx + 16 * i) * assign_ld + column];
          for (int e = 0; e < 4; e++)
            for (int i = 0; i < 4; i++)
              for (int j = 0; j < 4; j++) sum[i][j] = fused(v[i].v[e], w[j].v[e], sum[i][j]);
        }
        block_sync();
      }
      // As on the CPU: what is like NaN is passed over.
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
          const int at = key + tx + 16 * j;
          const float like = sum[i][j];
          if (at < end && like == like) best[i].see(like, at);
        }
    }
    for (int i = 0; i < 4; i++) {
      for (int mask = 8; mask > 0; mask /= 2) {
        const float like = shuffle_xor(best[i].like, mask);
        const int32_t at = shuffle_xor(best[i].at, mask);
        best[i].see(like, at);
      }
      const int row = ty + 16 * i;
      // And where none is above the least that there is, the first.
      if (tx == 0 && place[row]) a.out[(first + row) * a.ldo] = best[i].like > least ? best[i].at : begin;
    }
    block_sync();
  }
}

size_t token_assign_work(const backend_op &op) { return static_cast<size_t>(op.in[1].rows) * 4; }
cudaError_t token_assign_cuda(const op_call &c) {
  const assign_args a = {c.in[0].f32(), c.in[0].stride, static_cast<const kept_row *>(c.in[1].data),
                         c.in[2].i32(), c.in[3].i32(),  c.sequences,
                         c.out.rows,    c.in[1].rows,   static_cast<float *>(c.scratch),
                         c.out.i32(),   c.out.stride,   static_cast<int>(c.in[0].cols)};
  if (c.out.capacity <= 0) return cudaSuccess;
  const bool fours = by_fours(a.n, {&c.in[0]});
  const cudaError_t status = launch_rows(c, c.in[1].capacity, fours ? assign_factors_kernel<4> : assign_factors_kernel<1>, a);
  if (status != cudaSuccess) return status;
  return launch(c.stream, dim3(blocks_of(c.out.capacity, assign_tile)), row_threads, assign_bytes,
                fours ? token_assign_kernel<4> : token_assign_kernel<1>, a);
}

// ---- token_merge, token_sizes: a warp has a row that stays, and looks for those that become part of it

// f(mask, base): bit i of mask says that row base + i is one.
template <class F>
RS_DEVICE void for_members(const int32_t *assign, int64_t stride, int begin, int end, int j, F f) {
  for (int base = begin; base < end; base += warp_size) {
    const int i = base + lane_of();
    const uint32_t mask = ballot(i < end && assign[i * stride] == j);
    if (mask) f(mask, base);
  }
}

constexpr int merge_columns = 256, merge_ahead = 4;  // columns of a warp; rows that are read before the first is needed

struct merge_args {
  const float *x, *sizes, *score;  // sizes, score: or nullptr
  int64_t ldx, lds, ldscore;
  const kept_row *kept;
  const int32_t *from, *to, *assign, *sequences, *rows;
  int64_t lda;
  float *weights;  // [rows before]
  float *y;
  int64_t ldy;
  int n;
  bool lowest;
};

RS_KERNEL(row_threads, 4) merge_weights_kernel(merge_args a) {
  wait_for_previous();
  const int b = block_x();
  if (b >= *a.sequences) return;
  const int begin = a.from[b], n = a.from[b + 1] - begin, end = a.to[b + 1];
  if (n <= 0) return;
  const bool folds = a.score && end > a.to[b] && a.kept[end - 1].before < 0;
  moments m = {};
  if (folds) m = block_moments(a.score + begin * a.ldscore, a.ldscore, n, block_memory<double>(0));
  for (int i = begin + thread_index(); i < begin + n; i += row_threads) {
    float weight = a.sizes ? a.sizes[i * a.lds] : 1;
    if (folds && a.assign[i * a.lda] == end - 1) {
      double z = m.of(a.score[i * a.ldscore]);
      z = z < -fold_z ? -fold_z : z > fold_z ? fold_z : z;
      weight *= static_cast<float>(exp(a.lowest ? -z : z));
    }
    a.weights[i] = weight;
  }
}

// budget: registers 80, shared 0, spills 0
template <int N>
RS_KERNEL(row_threads, 2)
token_merge_kernel(merge_args a) {
  wait_for_previous();
  constexpr int pieces = merge_columns / warp_size / N;
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  const int j = static_cast<int>(r), b = warp_sequence(a.to, *a.sequences, j), begin = a.from[b], end = a.from[b + 1];
  const int own = a.kept[r].before, lane = lane_of(), column = block_y() * merge_columns + lane * N;
  float sum = 0;
  for_members(a.assign, a.lda, begin, end, j, [&](uint32_t mask, int base) {
    const float weight = mask >> lane & 1 ? a.weights[base + lane] : 0;
    for (; mask; mask &= mask - 1) sum += shuffle(weight, lowest_bit(mask));
  });

  piece<float, N> y[pieces] = {};
  if (own >= 0) {
    const float share = a.weights[own] / sum;  // exactly 1 where nothing joins it
    for (int p = 0; p < pieces; p++) {
      const int k = column + p * warp_size * N;
      if (k >= a.n) continue;
      y[p] = load<N>(a.x + own * a.ldx + k);
      for (int e = 0; e < N; e++) y[p].v[e] *= share;
    }
  }
  for_members(a.assign, a.lda, begin, end, j, [&](uint32_t mask, int base) {
    if (own >= base && own < base + warp_size) mask &= ~(1u << (own - base));
    const float share = mask >> lane & 1 ? a.weights[base + lane] / sum : 0;
    while (mask) {
      piece<float, N> x[merge_ahead][pieces];
      float shares[merge_ahead];
      int count = 0;
      for (int i = 0; i < merge_ahead; i++) {
        if (!mask) continue;
        const int from = lowest_bit(mask);
        mask &= mask - 1, count++;
        shares[i] = shuffle(share, from);
        for (int p = 0; p < pieces; p++) {
          const int k = column + p * warp_size * N;
          if (k < a.n) x[i][p] = load<N>(a.x + (base + from) * a.ldx + k);
        }
      }
      for (int i = 0; i < merge_ahead; i++)
        for (int p = 0; p < pieces; p++)
          for (int e = 0; e < N; e++)
            if (i < count) y[p].v[e] += x[i][p].v[e] * shares[i];
    }
  });
  for (int p = 0; p < pieces; p++) {
    const int k = column + p * warp_size * N;
    if (k < a.n) store(a.y + r * a.ldy + k, y[p]);
  }
}

size_t token_merge_work(const backend_op &op) { return static_cast<size_t>(op.in[0].rows) * 4; }
cudaError_t token_merge_cuda(const op_call &c) {
  const merge_args a = {c.in[0].f32(),
                        c.in[5].f32(),
                        c.in[6].f32(),
                        c.in[0].stride,
                        c.in[5].stride,
                        c.in[6].stride,
                        static_cast<const kept_row *>(c.in[1].data),
                        c.in[2].i32(),
                        c.in[3].i32(),
                        c.in[4].i32(),
                        c.sequences,
                        c.out.rows,
                        c.in[4].stride,
                        static_cast<float *>(c.scratch),
                        c.out.f32(),
                        c.out.stride,
                        static_cast<int>(c.out.cols),
                        c.op->params.rule.lowest};
  const cudaError_t status = launch_sequences(c, block_rows * sizeof(double), merge_weights_kernel, a);
  if (status != cudaSuccess || c.out.capacity <= 0) return status;
  const dim3 grid(blocks_of(c.out.capacity, block_rows), blocks_of(a.n, merge_columns));
  return launch(c.stream, grid, row_threads, 0, by_fours(a.n, {&c.out, &c.in[0]}) ? token_merge_kernel<4> : token_merge_kernel<1>,
                a);
}

struct sizes_args {
  const int32_t *assign, *from, *to, *sequences, *rows;
  int64_t lda;
  const float *sizes;  // or nullptr
  int64_t lds;
  float *y;
  int64_t ldy;
};

RS_KERNEL(row_threads, 4) token_sizes_kernel(sizes_args a) {
  wait_for_previous();
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  const int j = static_cast<int>(r), b = warp_sequence(a.to, *a.sequences, j), lane = lane_of();
  float sum = 0;
  for_members(a.assign, a.lda, a.from[b], a.from[b + 1], j, [&](uint32_t mask, int base) {
    const float size = a.sizes && mask >> lane & 1 ? a.sizes[(base + lane) * a.lds] : 1;
    for (; mask; mask &= mask - 1) sum += shuffle(size, lowest_bit(mask));
  });
  if (lane == 0) a.y[r * a.ldy] = sum;
}

size_t token_sizes_work(const backend_op &) { return 0; }
cudaError_t token_sizes_cuda(const op_call &c) {
  const sizes_args a = {c.in[0].i32(),  c.in[2].i32(), c.in[3].i32(),  c.sequences, c.out.rows,
                        c.in[0].stride, c.in[4].f32(), c.in[4].stride, c.out.f32(), c.out.stride};
  return launch_rows(c, c.out.capacity, token_sizes_kernel, a);
}

}  // namespace

// ================================================================================ 7  backend: weights, plans, runs
//
// A run is one copy to the device (what the caller binds, how many rows there are, cu_seqlens, where tiles of attention begin), the
// launches of its operators, and copies of the outputs back; the host waits once, at the end.  Launches depend on capacities and
// addresses alone, so a run of a known capacity is a recorded CUDA graph.  Pixels, which are much, go up before it, a part on its
// way while the next one is written.

namespace {

rs_status fail(backend_error *error, rs_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));
rs_status fail(backend_error *error, rs_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(error->text, sizeof error->text, format, args);
  va_end(args);
  return status;
}

// Has this library no code that the card runs, and no PTX that the driver makes such code of?
bool has_no_code(cudaError_t e) {
  switch (e) {
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilationDisabled:
      return true;
    default:
      return false;
  }
}

rs_status cuda_status(cudaError_t e) {
  if (has_no_code(e)) return RS_ERR_UNSUPPORTED;
  switch (e) {
    case cudaSuccess:
      return RS_OK;
    case cudaErrorMemoryAllocation:
      return RS_ERR_MEMORY;
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorNotSupported:
      return RS_ERR_UNSUPPORTED;
    default:
      return RS_ERR_IO;
  }
}

rs_status cuda_failed(backend_error *error, const char *what, cudaError_t e) {
  (void)cudaGetLastError();  // it is reported; the next call shall not report it again
  return fail(error, cuda_status(e), "%s: %s (%s)", what, cudaGetErrorString(e), cudaGetErrorName(e));
}

#define RS_CUDA_CHECK(error, what, call) \
  do { \
    const cudaError_t e_ = (call); \
    if (e_ != cudaSuccess) return cuda_failed(error, what, e_); \
  } while (0)

#define RS_TRY(call) \
  do { \
    const rs_status status_ = (call); \
    if (status_ != RS_OK) return status_; \
  } while (0)

rs_status allocate(void **out, size_t bytes, const char *what, backend_error *error) {
  const cudaError_t e = cudaMalloc(out, bytes);
  if (e == cudaSuccess) return RS_OK;
  (void)cudaGetLastError();
  size_t free_bytes = 0, all = 0;
  (void)cudaMemGetInfo(&free_bytes, &all);
  return fail(error, cuda_status(e), "%zu bytes for %s, %zu of %zu are free: %s", bytes, what, free_bytes, all,
              cudaGetErrorString(e));
}

// The thread's device is `device` while this lives, and then the caller's again.
class device_scope {
 public:
  explicit device_scope(int device) : device_(device), status_(cudaGetDevice(&before_)) {
    if (status_ == cudaSuccess)
      status_ = cudaSetDevice(device);  // also where it is: the driver's API may have a context of its own there
  }
  ~device_scope() {
    if (before_ >= 0 && before_ != device_) (void)cudaSetDevice(before_);
  }
  device_scope(const device_scope &) = delete;
  cudaError_t status() const { return status_; }

 private:
  int device_, before_ = -1;
  cudaError_t status_;
};

// Memory that grows.
struct card_memory {
  char *data = nullptr;
  size_t bytes = 0;
  ~card_memory() { (void)cudaFree(data); }
  rs_status reserve(size_t wanted, const char *what, backend_error *error, bool *moved) {
    if (wanted <= bytes) return RS_OK;
    (void)cudaFree(data);
    data = nullptr, bytes = 0;
    *moved = true;
    void *p;
    RS_TRY(allocate(&p, wanted, what, error));
    data = static_cast<char *>(p), bytes = wanted;
    return RS_OK;
  }
};
struct pinned_memory {
  char *data = nullptr;
  size_t bytes = 0;
  ~pinned_memory() { (void)cudaFreeHost(data); }
  rs_status reserve(size_t wanted, const char *what, backend_error *error, bool *moved) {
    if (wanted <= bytes) return RS_OK;
    (void)cudaFreeHost(data);
    data = nullptr, bytes = 0;
    *moved = true;
    void *p;
    const cudaError_t e = cudaMallocHost(&p, wanted);
    if (e != cudaSuccess) {
      (void)cudaGetLastError();
      return fail(error, cuda_status(e), "%zu bytes of page-locked memory for %s: %s", wanted, what, cudaGetErrorString(e));
    }
    data = static_cast<char *>(p), bytes = wanted;
    return RS_OK;
  }
};

// ---- weights

float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
float half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float v = exponent == 31  ? (mantissa ? NAN : INFINITY)
                  : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                  : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return h >> 15 ? -v : v;
}
float bf16_value(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }
uint16_t bf16_of(float v) {  // to the nearest, of two the even one
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if (std::isnan(v)) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Where a thread's i-th word (of 4) of the m-th mma of a block lies in w: channel, and how many words along K from the block's
// start on.  A word is 4 values of 8 bits, or 2 of 16, of which linear_float pairs neighbours.
struct fragment_word {
  int64_t channel, k;
};
fragment_word word_of(int64_t m, int64_t lane, int64_t i) { return {lane / 4 * 4 + m * 2 + i % 2, i / 2}; }

// Panels of floats, [Np / 16][Kp][16], as linear_float wants them.
std::vector<uint8_t> split_panels(rs_type type, const void *data, int64_t np, int64_t kp) {
  const auto at = [&](int64_t n, int64_t k) {
    if (n >= np) return 0.0f;
    const int64_t i = (n / panel_n * kp + k) * panel_n + n % panel_n;
    return type == RS_F32 ? static_cast<const float *>(data)[i] : half_value(static_cast<const uint16_t *>(data)[i]);
  };
  const int64_t blocks = ceil_div(np, warp_channels);
  std::vector<uint8_t> out(static_cast<size_t>(blocks * warp_channels * kp * 4));
  auto *to = reinterpret_cast<uint32_t *>(out.data());
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t step = 0; step < kp / 16; step++)
      for (int64_t m = 0; m < 2; m++, to += 2 * warp_size * 4)
        for (int64_t j = 0; j < warp_size * 4; j++) {
          const fragment_word word = word_of(m, j / 4, j % 4);
          const int64_t n = block * warp_channels + word.channel, k = step * 16 + j / 4 % 4 * 4 + word.k * 2;
          const float a = at(n, k), b = at(n, k + 1);
          const uint16_t ah = bf16_of(a), bh = bf16_of(b);
          to[j] = ah | static_cast<uint32_t>(bh) << 16;
          to[warp_size * 4 + j] = bf16_of(a - bf16_value(ah)) | static_cast<uint32_t>(bf16_of(b - bf16_value(bh))) << 16;
        }
  return out;
}

// Panels of 8 and 4 bits with what is behind them (rs.cpp, section 5), as linear_quantized wants them.  What fills up steps and
// blocks is zeros.
std::vector<uint8_t> order_panels(rs_type type, const void *data, int64_t np, int64_t kp) {
  const bool four = type == RS_W4;
  const int64_t to_np = round_up(np, block_channels), to_kp = quantized_kp(kp), groups = kp / group_k, row_words = four ? 8 : 16;
  const auto *panels = static_cast<const uint32_t *>(data);
  const auto *mult = reinterpret_cast<const uint8_t *>(panels + np * kp / (four ? 8 : 4));
  const uint8_t *behind = mult + (four ? np * groups : 0);
  const int64_t pieces = to_np / warp_channels * (to_kp / step_k), bytes = four ? piece_bytes<true> : piece_bytes<false>;
  std::vector<uint8_t> out(static_cast<size_t>(pieces * bytes + to_np * 8));
  // Of a channel, the bytes (nibbles, in the low half of each) of 4 values along K.
  const auto values = [&](int64_t n, int64_t k4) {
    const uint32_t none = four ? 0x08080808 : 0;
    if (n >= np || k4 >= kp / panel_k) return none;
    const uint32_t word = panels[(n / panel_n * (kp / panel_k) + k4) * row_words + (four ? n % 8 : n % panel_n)];
    return !four ? word : (n % panel_n < 8 ? word : word >> 4) & 0x0f0f0f0f;
  };
  constexpr int64_t in_block = block_channels / warp_channels;
  for (int64_t piece = 0; piece < pieces; piece++) {
    auto *to = reinterpret_cast<uint32_t *>(out.data() + piece * bytes);
    const int64_t step = piece / in_block % (to_kp / step_k);
    const int64_t channel = (piece / in_block / (to_kp / step_k) * in_block + piece % in_block) * warp_channels;
    for (int64_t half = 0; half < 2; half++)
      for (int64_t m = 0; m < (four ? 1 : 2); m++)
        for (int64_t j = 0; j < warp_size * 4; j++) {
          const auto of = [&](int64_t mma) {
            const fragment_word word = word_of(mma, j / 4, j % 4);
            return values(channel + word.channel, step * 16 + half * 8 + word.k * 4 + j / 4 % 4);
          };
          *to++ = four ? of(0) | of(1) << 4 : of(m);
        }
    auto *at = reinterpret_cast<uint8_t *>(to);
    for (int64_t group = step * 2; four && group < step * 2 + 2; group++)
      for (int64_t n = channel; n < channel + warp_channels; n++)
        *at++ = n < np && group < groups ? mult[(n / panel_n * groups + group) * panel_n + n % panel_n] : 0;
  }
  uint8_t *at = out.data() + pieces * bytes;
  memcpy(at, behind, static_cast<size_t>(np * 4));
  memcpy(at + to_np * 4, behind + np * 4, static_cast<size_t>(np * 4));
  return out;
}

// A copy of a weight, of `bytes` in the host's memory.  Its kernels may read a different form.  It is there for all streams when
// this returns, which waits for `stream` alone: to wait for the device fails, and spoils what other threads record, while one of
// them does.
rs_status upload_weight(cudaStream_t stream, rs_type type, rs_layout layout, int64_t rows, int64_t cols, const void *data,
                        size_t bytes, const char *name, void **out, size_t *taken, backend_error *error) {
  std::vector<uint8_t> ordered;
  if (layout == RS_PANELS) {
    ordered = (is_quantized(type) ? order_panels : split_panels)(type, data, round_up(rows, panel_n), round_up(cols, group_k));
    data = ordered.data(), bytes = ordered.size();
  }
  RS_TRY(allocate(out, bytes, name, error));
  cudaError_t e = cudaMemcpyAsync(*out, data, bytes, cudaMemcpyHostToDevice, stream);
  if (e == cudaSuccess) e = cudaStreamSynchronize(stream);
  if (e != cudaSuccess) {
    (void)cudaFree(*out);
    *out = nullptr;
    return cuda_failed(error, name, e);
  }
  *taken = bytes;
  return RS_OK;
}

}  // namespace

struct backend_model {
  int device = 0, multiprocessors = 1;
  cudaStream_t stream = nullptr;           // on which weights go up
  std::map<const void *, void *> weights;  // by their place in the file

  ~backend_model() {  // in a device_scope
    if (stream) (void)cudaStreamDestroy(stream);
    for (const auto &w : weights) (void)cudaFree(w.second);
  }
};

namespace {

// ---- plans

// Where things are in what a run copies to the device, and how large all memory is.
struct run_layout {
  size_t fault = 0, counts = 0, q_bytes = 0, quant_bytes = 0, scratch_bytes = 0;
  size_t recorded_bytes = 0;          // that the copy of a recorded run has
  size_t upload_bytes = 0;            // with the inputs that have a source, which lie behind
  std::vector<size_t> starts, tiles;  // by level
  std::vector<int64_t> tile_capacity;
  std::map<int32_t, size_t> inputs;  // by tensor
};

size_t take(size_t *at, size_t bytes) {
  const size_t here = *at;
  *at += static_cast<size_t>(round_up(static_cast<int64_t>(bytes), 256));
  return here;
}

// Runs of a graph at a capacity, of the same operators.
struct recorded_run {
  uint64_t graph = 0;
  int64_t sequences = 0;        // capacity
  std::vector<int64_t> tokens;  // the same, of each level
  run_layout layout;
  std::vector<backend_op> ops;                 // that the calls are of
  std::vector<std::pair<int, op_call>> calls;  // of an operator; -1: quantize the rows of in[0] for what follows
  uint64_t places = 0;                         // of the session when the calls were made
  cudaGraphExec_t exec = nullptr;
  int runs = 0;

  ~recorded_run() { forget(); }
  void forget() {
    if (exec) (void)cudaGraphExecDestroy(exec);
    exec = nullptr;
    calls.clear();
    runs = 0;
  }
};

constexpr size_t most_recorded = 32;

struct card_session {
  backend_model *model = nullptr;
  cudaStream_t stream = nullptr;
  card_memory upload, arena, q, quants, scratch;
  pinned_memory staging, results;
  uint64_t places = 1;                                                          // grows when memory moves
  std::vector<std::unique_ptr<recorded_run>> recorded;                          // the last used at the end
  std::map<std::pair<uint64_t, int32_t>, std::pair<void *, size_t>> constants;  // by graph and tensor

  ~card_session() {  // in a device_scope
    recorded.clear();
    for (const auto &c : constants) (void)cudaFree(c.second.first);
    if (stream) (void)cudaStreamDestroy(stream);
  }
};

struct operator_row {
  size_t (*work)(const backend_op &op);
  cudaError_t (*run)(const op_call &c);
};
constexpr operator_row operators[op_count] = {
#define X(op, name, n, by_rows, one_level) {name##_work, name##_cuda},
    RS_OPS(X)
#undef X
};
constexpr const char *operator_names[op_count] = {
#define X(op, name, n, by_rows, one_level) #name,
    RS_OPS(X)
#undef X
};

// Does the operator take its j-th input as f16?
bool takes_halves(const backend_op &op, int j) {
  const backend_tensor &x = op.in[j];
  if (op.op == OP_LINEAR) return j == 0 && is_quantized(op.in[1].type) && quantizes_halves(x.cols, x.stride, x.first);
  const bool attention = (op.op == OP_FLASH_ATTN && j < 3) || (op.op == OP_ATTN_COLSUM && j < 2);
  return attention && x.cols / op.params.heads % 8 == 0 && x.stride % 8 == 0 && x.first % 8 == 0;  // heads begin on 16 bytes
}
// Do all operators that read that tensor?
bool halves_do(const backend_run &r, int32_t id) {
  bool any = false;
  for (size_t i = 0; i < r.n_ops; i++)
    for (int j = 0; j < max_sources; j++) {
      if (r.ops[i].in[j].place != backend_place::result || r.ops[i].in[j].id != id) continue;
      if (!takes_halves(r.ops[i], j)) return false;
      any = true;
    }
  return any;
}

// What is stored as f16, by tensor.
std::map<int32_t, bool> find_halves(const backend_run &r) {
  std::map<int32_t, bool> halves;
  for (size_t i = 0; i < r.n_ops; i++)
    if (r.ops[i].op == OP_LINEAR || r.ops[i].op == OP_ROPE || r.ops[i].op == OP_FLASH_ATTN)
      halves[r.ops[i].out.id] = !r.ops[i].out.output && halves_do(r, r.ops[i].out.id);
  // Column sums take q and k of one kind.
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t i = 0; i < r.n_ops; i++) {
      const backend_op &op = r.ops[i];
      const auto half = [&](int j) {
        return op.in[j].place == backend_place::result && halves.count(op.in[j].id) && halves[op.in[j].id];
      };
      if (op.op != OP_ATTN_COLSUM || half(0) == half(1)) continue;
      halves[op.in[half(0) ? 0 : 1].id] = false;
      changed = true;
    }
  }
  return halves;
}

run_layout lay_out(const backend_run &r) {
  run_layout l;
  size_t at = 0;
  l.fault = take(&at, sizeof(run_fault));
  l.counts = take(&at, (1 + 2 * r.n_levels) * sizeof(int32_t));
  for (size_t i = 0; i < r.n_levels; i++) {
    l.starts.push_back(take(&at, static_cast<size_t>(r.sequence_capacity + 1) * sizeof(int32_t)));
    l.tile_capacity.push_back(r.levels[i].capacity / attn_tile_rows + r.sequence_capacity);
    l.tiles.push_back(take(&at, static_cast<size_t>(l.tile_capacity[i]) * sizeof(attn_tile)));
  }
  for (const bool from_source : {false, true}) {
    for (size_t i = 0; i < r.n_inputs; i++)
      if (!r.inputs[i].data == from_source) l.inputs[r.inputs[i].id] = take(&at, r.inputs[i].capacity);
    (from_source ? l.upload_bytes : l.recorded_bytes) = at;
  }
  std::map<int32_t, bool> halves = find_halves(r);
  for (size_t i = 0; i < r.n_ops; i++) {
    backend_op op = r.ops[i];
    for (backend_tensor &t : op.in)
      if (t.place == backend_place::result && halves.count(t.id) && halves[t.id]) t.type = RS_F16;
    l.scratch_bytes = std::max(l.scratch_bytes, operators[op.op].work(op));
    if (op.op != OP_LINEAR || !is_quantized(op.in[1].type)) continue;
    l.q_bytes = std::max(l.q_bytes, static_cast<size_t>(quantized_bytes(op.in[0].rows, op.in[0].cols)));
    l.quant_bytes = std::max(l.quant_bytes, static_cast<size_t>(op.in[0].rows) * sizeof(row_quant));
  }
  return l;
}

// What a run's one copy takes to the device.
void fill_upload(const backend_run &r, const run_layout &l, char *to) {
  memset(to + l.fault, 0, sizeof(run_fault));
  auto *counts = reinterpret_cast<int32_t *>(to + l.counts);
  counts[0] = static_cast<int32_t>(r.sequences);
  for (size_t i = 0; i < r.n_levels; i++) {
    counts[1 + i] = static_cast<int32_t>(r.levels[i].tokens);
    auto *tiles = reinterpret_cast<attn_tile *>(to + l.tiles[i]);
    int32_t n = 0;
    if (const int32_t *cu = r.levels[i].cu) {
      memcpy(to + l.starts[i], cu, static_cast<size_t>(r.sequences + 1) * sizeof(int32_t));
      for (int32_t b = 0; b < r.sequences; b++)
        for (int32_t first = 0; first < cu[b + 1] - cu[b]; first += attn_tile_rows) tiles[n++] = {b, first};
    }
    counts[1 + r.n_levels + i] = n;
  }
  for (size_t i = 0; i < r.n_inputs; i++)
    if (r.inputs[i].data) memcpy(to + l.inputs.at(r.inputs[i].id), r.inputs[i].data, r.inputs[i].bytes);
}

// An input that has a source, on its way to the device.
struct source_upload {
  card_session &s;
  size_t begin, row;  // of its rows: where the first is, bytes
  cudaError_t status = cudaSuccess;

  static void written(void *of, int64_t first, int64_t n) {
    auto &u = *static_cast<source_upload *>(of);
    const size_t at = u.begin + static_cast<size_t>(first) * u.row;
    if (u.status == cudaSuccess)
      u.status = cudaMemcpyAsync(u.s.upload.data + at, u.s.staging.data + at, static_cast<size_t>(n) * u.row,
                                 cudaMemcpyHostToDevice, u.s.stream);
  }
};

// A part of it is copied while the next one is written.
constexpr size_t upload_part = 4 << 20;
rs_status upload_sources(card_session &s, const backend_run &r, const run_layout &l, backend_error *error) {
  for (size_t i = 0; i < r.n_inputs; i++) {
    const backend_input &input = r.inputs[i];
    if (input.data || input.source.rows == 0) continue;
    source_upload u = {s, l.inputs.at(input.id), input.bytes / static_cast<size_t>(input.source.rows)};
    const auto part = static_cast<int64_t>(std::max<size_t>(1, upload_part / u.row));
    input.source.write(input.source.context, s.staging.data + u.begin, part, source_upload::written, &u);
    RS_CUDA_CHECK(error, "copy to the device", u.status);
  }
  return RS_OK;
}

// Makes calls of operators: addresses, and what is done together.
struct call_maker {
  card_session &s;
  const backend_run &r;
  const run_layout &l;
  backend_error *error;
  std::map<int32_t, int> readers;          // of a tensor's elements, by its id
  std::map<int32_t, bool> halves;          // what is stored as f16
  std::vector<char> done;                  // operators that another one does
  int32_t quantized = -1;                  // whose rows s.q holds,
  const float *quantized_scale = nullptr;  // and times what
  std::vector<std::pair<int, op_call>> calls;

  call_maker(card_session &s, const backend_run &r, const run_layout &l, backend_error *error)
      : s(s), r(r), l(l), error(error), halves(find_halves(r)), done(r.n_ops) {
    for (size_t i = 0; i < r.n_ops; i++)
      for (const backend_tensor &t : r.ops[i].in)
        if (t.place == backend_place::result) readers[t.id]++;
  }

  rs_status constant(const backend_tensor &t, void **out) {
    if (t.of_model) {
      const auto found = s.model->weights.find(t.data);
      if (found != s.model->weights.end()) {
        *out = found->second;
        return RS_OK;
      }  // else of another model, or a part of a tensor: as a constant
    }
    std::pair<void *, size_t> &c = s.constants[{r.graph, t.id}];
    if (!c.first) {
      RS_TRY(upload_weight(s.stream, t.type, t.layout, t.rows, t.cols, t.data, t.bytes, t.name, &c.first, &c.second, error));
    }
    *out = c.first;
    return RS_OK;
  }

  rs_status value(const backend_tensor &t, device_value *v) {
    *v = {};
    if (t.place == backend_place::absent) return RS_OK;
    v->capacity = t.rows, v->cols = t.cols, v->stride = t.stride;
    const auto *counts = reinterpret_cast<const int32_t *>(s.upload.data + l.counts);
    if (t.rows_are == backend_rows::tokens) v->rows = counts + 1 + t.level;
    if (t.rows_are == backend_rows::sequences) v->rows = counts;
    switch (t.place) {
      case backend_place::weight:
        return constant(t, &v->data);
      case backend_place::input:
        v->data = s.upload.data + l.inputs.at(t.id) + t.first * 4;
        break;
      case backend_place::starts:
        v->data = s.upload.data + l.starts[static_cast<size_t>(t.level)];
        break;
      default: {
        const auto half = halves.find(t.id);
        v->half = half != halves.end() && half->second;
        v->data = s.arena.data + t.offset + t.first * (v->half ? 2 : 4);
      }
    }
    return RS_OK;
  }

  rs_status call_of(size_t i, op_call *c) {
    const backend_op &op = r.ops[i];
    *c = {};
    c->stream = s.stream;
    c->op = &op;
    c->index = static_cast<int>(i);
    c->multiprocessors = s.model->multiprocessors;
    c->fault = reinterpret_cast<run_fault *>(s.upload.data + l.fault);
    c->sequences = reinterpret_cast<const int32_t *>(s.upload.data + l.counts);
    c->sequence_capacity = r.sequence_capacity;
    // Attention's tiles are of its queries: of a level's tokens, as all that such an operator reads is.
    const auto level = static_cast<size_t>(op.out.level);
    c->tiles = reinterpret_cast<const attn_tile *>(s.upload.data + l.tiles[level]);
    c->n_tiles = c->sequences + 1 + r.n_levels + level;
    c->tile_capacity = l.tile_capacity[level];
    c->scratch = s.scratch.data;
    RS_TRY(value(op.out, &c->out));
    for (int j = 0; j < max_sources; j++) RS_TRY(value(op.in[j], &c->in[j]));
    return RS_OK;
  }

  // May the result of `a`, which is done earlier than planned, be written while `b` is read?
  static bool apart(const backend_tensor &a, const backend_tensor &b) {
    if (b.place != backend_place::result) return true;
    const size_t a_end = a.offset + static_cast<size_t>(a.rows * a.stride) * 4,
                 b_end = b.offset + static_cast<size_t>(b.rows * b.stride) * 4;
    return a_end <= b.offset || b_end <= a.offset;
  }

  bool whole(const backend_tensor &t) const { return t.first == 0 && t.stride == t.cols; }

  rs_status make() {
    for (size_t i = 0; i < r.n_ops; i++) {
      if (done[i]) continue;
      const backend_op &op = r.ops[i];
      op_call c;
      RS_TRY(call_of(i, &c));
      const backend_tensor &starts = op.in[op.op == OP_FLASH_ATTN ? 3 : 2];
      if ((op.op == OP_FLASH_ATTN || op.op == OP_ATTN_COLSUM) && starts.place == backend_place::input && starts.id != r.starts)
        return fail(error, RS_ERR_UNSUPPORTED, "'%s': attention by '%s', but a graph has one cu_seqlens on a card", op.out.name,
                    starts.name);
      if (op.op == OP_LAYER_NORM) RS_TRY(make_layer_norm(i, &c));
      else if (op.op == OP_LINEAR) RS_TRY(make_linear(i, &c));
      else if (op.op == OP_FLASH_ATTN && op.out.cols / op.params.heads > 128)
        return fail(error, RS_ERR_UNSUPPORTED, "%s: heads of %lld columns, at most 128 on a card", op.out.name,
                    static_cast<long long>(op.out.cols / op.params.heads));
      calls.emplace_back(static_cast<int>(i), c);
    }
    return RS_OK;
  }

  // The norm's own result is quantized while it is at hand, where the next quantized layer reads it; and the norm of its first
  // input, the score of Representation Shift, costs no pass of its own.
  rs_status make_layer_norm(size_t i, op_call *c) {
    const backend_op &op = r.ops[i];
    for (size_t j = i + 1; j < r.n_ops; j++) {
      const backend_op &next = r.ops[j];
      if (next.op != OP_LINEAR || !is_quantized(next.in[1].type)) continue;
      if (next.in[0].id != op.out.id || !whole(next.in[0]) || next.in[0].cols != op.out.cols) break;
      RS_TRY(give_quantized(c, next));
      quantized = op.out.id, quantized_scale = c->scale;
      if (readers[op.out.id] == 1 && !op.out.output && norm_keeps_rows(op.out.cols))
        c->out.data = nullptr;  // the floats are of no use
      break;
    }
    for (size_t j = i + 1; j < std::min(r.n_ops, i + 3); j++) {
      const backend_op &next = r.ops[j];
      if (done[j] || next.op != OP_SHIFT || next.params.distance != RS_DISTANCE_L2 || next.in[1].place != backend_place::absent)
        continue;
      const backend_tensor &x = op.in[0], &of = next.in[0];
      if (x.place != of.place || x.id != of.id || x.first != of.first || x.cols != of.cols) continue;
      bool free = true;
      for (const backend_tensor &t : {op.in[0], op.in[1], op.out}) free &= apart(next.out, t);
      for (size_t k = i + 1; k < j; k++) {
        free &= apart(next.out, r.ops[k].out);
        for (const backend_tensor &t : r.ops[k].in) free &= apart(next.out, t);
      }
      if (!free) continue;
      device_value shift;
      RS_TRY(value(next.out, &shift));
      c->shift = shift.f32(), c->shift_stride = shift.stride;
      done[j] = 1;
      break;
    }
    return RS_OK;
  }

  // As the linear layer `op` wants its inputs.
  rs_status give_quantized(op_call *c, const backend_op &op) {
    device_value scale;
    RS_TRY(value(op.in[3], &scale));
    c->q = reinterpret_cast<uint8_t *>(s.q.data);
    c->rq = reinterpret_cast<row_quant *>(s.quants.data);
    c->kp = quantized_kp(op.in[0].cols);
    c->scale = scale.f32();
    return RS_OK;
  }

  rs_status make_linear(size_t i, op_call *c) {
    const backend_op &op = r.ops[i];
    const backend_tensor &x = op.in[0];
    const bool quantize = is_quantized(op.in[1].type);
    if (quantize) {
      RS_TRY(give_quantized(c, op));
      const bool there = x.place == backend_place::result && x.id == quantized && whole(x) && c->scale == quantized_scale;
      if (!there) calls.emplace_back(-1, *c);
      quantized = x.place == backend_place::result && whole(x) ? x.id : -1;
      quantized_scale = c->scale;
    }
    // The sum that follows at once is the product's last step.
    if (i + 1 == r.n_ops || c->out.half || op.out.output || readers[op.out.id] != 1) return RS_OK;
    const backend_op &next = r.ops[i + 1];
    if (next.op != OP_ADD) return RS_OK;
    const int mine = next.in[1].id == op.out.id && next.in[1].place == backend_place::result ? 1 : 0;
    const backend_tensor &other = next.in[1 - mine];
    if (next.in[mine].place != backend_place::result || next.in[mine].id != op.out.id || !whole(next.in[mine]) ||
        next.in[mine].cols != op.out.cols || (!quantize && !apart(next.out, x)))
      return RS_OK;
    device_value residual, out;
    RS_TRY(value(other, &residual));
    RS_TRY(value(next.out, &out));
    if (residual.half) return RS_OK;
    c->residual = residual.f32(), c->residual_stride = residual.stride;
    c->out = out;
    done[i + 1] = 1;
    return RS_OK;
  }
};

cudaError_t run_call(const std::pair<int, op_call> &call) {
  const op_call &c = call.second;
  return call.first < 0 ? quantize_rows(c, c.in[0], c.q, c.rq, c.kp) : operators[c.op->op].run(c);
}

// What went wrong first, and with which call: none, where it was the copy.
struct launch_result {
  cudaError_t status;
  const op_call *call;

  rs_status said(backend_error *error) const {
    if (status == cudaSuccess) return RS_OK;
    if (!call) return cuda_failed(error, "copy to the device", status);
    (void)cudaGetLastError();
    return fail(error, cuda_status(status), "%s '%s': %s", operator_names[call->op->op], call->op->out.name,
                cudaGetErrorString(status));
  }
};

cudaError_t copy_inputs(card_session &s, const recorded_run &run) {
  return cudaMemcpyAsync(s.upload.data, s.staging.data, run.layout.recorded_bytes, cudaMemcpyHostToDevice, s.stream);
}

launch_result launch_all(card_session &s, const recorded_run &run) {
  launch_result r = {copy_inputs(s, run), nullptr};
  for (size_t i = 0; r.status == cudaSuccess && i < run.calls.size(); i++) r = {run_call(run.calls[i]), &run.calls[i].second};
  return r;
}

struct event_pair {
  cudaEvent_t begin = nullptr, end = nullptr;
  ~event_pair() {
    if (begin) (void)cudaEventDestroy(begin);
    if (end) (void)cudaEventDestroy(end);
  }
};

rs_status launch_timed(card_session &s, const recorded_run &run, float *seconds, backend_error *error) {
  RS_TRY((launch_result{copy_inputs(s, run), nullptr}.said(error)));
  event_pair events;
  RS_CUDA_CHECK(error, "events", cudaEventCreate(&events.begin));
  RS_CUDA_CHECK(error, "events", cudaEventCreate(&events.end));
  for (const auto &call : run.calls) {
    RS_CUDA_CHECK(error, "events", cudaEventRecord(events.begin, s.stream));
    RS_TRY((launch_result{run_call(call), &call.second}.said(error)));
    RS_CUDA_CHECK(error, "events", cudaEventRecord(events.end, s.stream));
    RS_CUDA_CHECK(error, "events", cudaEventSynchronize(events.end));
    float milliseconds = 0;
    RS_CUDA_CHECK(error, "events", cudaEventElapsedTime(&milliseconds, events.begin, events.end));
    seconds[call.second.index] += milliseconds / 1000;
  }
  return RS_OK;
}

// Did another thread call what may not be called while a stream of the device records?
bool is_disturbed(cudaError_t e) { return e == cudaErrorStreamCaptureUnsupported || e == cudaErrorStreamCaptureInvalidated; }

// Where that is so, nothing is wrong with the run, and run.exec stays none.
rs_status record(card_session &s, recorded_run &run, backend_error *error) {
  cudaError_t e = cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeThreadLocal);
  launch_result launched = {cudaSuccess, nullptr};
  if (e == cudaSuccess) {
    launched = launch_all(s, run);
    cudaGraph_t graph = nullptr;
    e = cudaStreamEndCapture(s.stream, &graph);
    if (launched.status == cudaSuccess && e == cudaSuccess) e = cudaGraphInstantiate(&run.exec, graph, 0);
    if (graph) (void)cudaGraphDestroy(graph);
  }
  if (launched.status == cudaSuccess && e == cudaSuccess) return RS_OK;
  run.exec = nullptr;
  (void)cudaGetLastError();  // of both, one is said
  if (is_disturbed(launched.status != cudaSuccess ? launched.status : e)) return RS_OK;
  RS_TRY(launched.said(error));
  return cuda_failed(error, "recording", e);
}

// The second run of a capacity is recorded; the first may be the only one.
rs_status launch_recorded(card_session &s, recorded_run &run, backend_error *error) {
  if (!run.exec && run.runs++ > 0) RS_TRY(record(s, run, error));
  if (!run.exec) return launch_all(s, run).said(error);  // the next one is recorded
  RS_CUDA_CHECK(error, "launch", cudaGraphLaunch(run.exec, s.stream));
  return RS_OK;
}

rs_status fault_status(const backend_run &r, const run_fault &f, backend_error *error) {
  if (!f.status) return RS_OK;
  const backend_op &op = r.ops[f.op];
  if (op.op == OP_EMBED)
    return fail(error, RS_ERR_ARGUMENT, "embed: id %d at position %d is outside of '%s' [0,%lld)", f.what, f.at, op.in[1].name,
                static_cast<long long>(op.in[1].rows));
  return fail(error, static_cast<rs_status>(f.status), "'%s': the score of token %d of sequence %d is NaN", op.in[0].name, f.at,
              f.what);
}

bool is_of(const recorded_run &run, const backend_run &r) {
  bool same = run.graph == r.graph && run.sequences == r.sequence_capacity && run.ops.size() == r.n_ops;
  for (size_t i = 0; same && i < r.n_levels; i++) same = run.tokens[i] == r.levels[i].capacity;
  for (size_t i = 0; same && i < r.n_ops; i++) same = run.ops[i].out.id == r.ops[i].out.id;
  return same;
}

// The recorded run of that capacity and those operators: found, or made in the place of the one that was used longest ago.
recorded_run *find_recorded(card_session &s, const backend_run &r) {
  const auto found = std::find_if(s.recorded.begin(), s.recorded.end(), [&](const auto &run) { return is_of(*run, r); });
  if (found != s.recorded.end()) {
    std::rotate(found, found + 1, s.recorded.end());
    return s.recorded.back().get();
  }
  if (s.recorded.size() == most_recorded) s.recorded.erase(s.recorded.begin());
  auto run = std::make_unique<recorded_run>();
  run->graph = r.graph, run->sequences = r.sequence_capacity;
  for (size_t i = 0; i < r.n_levels; i++) run->tokens.push_back(r.levels[i].capacity);
  run->layout = lay_out(r);
  run->ops.assign(r.ops, r.ops + r.n_ops);
  s.recorded.push_back(std::move(run));
  return s.recorded.back().get();
}

rs_status reserve_all(card_session &s, const backend_run &r, const run_layout &l, size_t download, backend_error *error) {
  bool moved = false;
  const auto reserve = [&] {
    RS_TRY(s.upload.reserve(l.upload_bytes, "inputs", error, &moved));
    RS_TRY(s.staging.reserve(l.upload_bytes, "inputs", error, &moved));
    RS_TRY(s.arena.reserve(r.arena_bytes, "activations", error, &moved));
    const size_t before = s.q.bytes;
    RS_TRY(s.q.reserve(l.q_bytes, "quantized activations", error, &moved));
    // Tiles are copied whole: of rows that no run has, what is there is of no account, but it is there.
    if (s.q.bytes != before) RS_CUDA_CHECK(error, "quantized activations", cudaMemsetAsync(s.q.data, 0, s.q.bytes, s.stream));
    RS_TRY(s.quants.reserve(l.quant_bytes, "quantized activations", error, &moved));
    return s.scratch.reserve(l.scratch_bytes, "scratch", error, &moved);
  };
  const rs_status status = reserve();
  if (moved) s.places++;  // also where a later one failed: what was recorded has addresses of before
  RS_TRY(status);
  return s.results.reserve(download, "outputs", error, &moved);
}

constexpr int64_t most_tokens = 65535 * 64;  // tiles of rows are along the second dimension of a grid

rs_status run_graph(card_session &s, const backend_run &r, backend_error *error) {
  if (r.levels[0].tokens > most_tokens)
    return fail(error, RS_ERR_LIMIT, "a run of %lld tokens, at most %lld on a card", static_cast<long long>(r.levels[0].tokens),
                static_cast<long long>(most_tokens));
  const device_scope scope(s.model->device);
  RS_CUDA_CHECK(error, "device", scope.status());
  recorded_run &run = *find_recorded(s, r);
  size_t download = 0;
  take(&download, sizeof(run_fault));
  for (size_t i = 0; i < r.n_outputs; i++) take(&download, r.outputs[i].bytes);
  RS_TRY(reserve_all(s, r, run.layout, download, error));
  if (run.places != s.places) run.forget();
  fill_upload(r, run.layout, s.staging.data);
  if (run.calls.empty()) {
    backend_run kept = r;
    kept.ops = run.ops.data();
    call_maker maker(s, kept, run.layout, error);
    RS_TRY(maker.make());
    run.calls = std::move(maker.calls);
    run.places = s.places;
  }
  RS_TRY(upload_sources(s, r, run.layout, error));
  RS_TRY(r.seconds ? launch_timed(s, run, r.seconds, error) : launch_recorded(s, run, error));
  // Outputs are at the same places in every run of this capacity.
  size_t at = 0;
  auto *fault = reinterpret_cast<run_fault *>(s.results.data + take(&at, sizeof(run_fault)));
  RS_CUDA_CHECK(error, "copy from the device",
                cudaMemcpyAsync(fault, s.upload.data + run.layout.fault, sizeof *fault, cudaMemcpyDeviceToHost, s.stream));
  for (size_t i = 0; i < r.n_outputs; i++)
    for (size_t j = 0; j < r.n_ops; j++)
      if (r.ops[j].out.id == r.outputs[i].id)
        RS_CUDA_CHECK(error, "copy from the device",
                      cudaMemcpyAsync(s.results.data + take(&at, r.outputs[i].bytes), s.arena.data + r.ops[j].out.offset,
                                      r.outputs[i].bytes, cudaMemcpyDeviceToHost, s.stream));
  RS_CUDA_CHECK(error, "run", cudaStreamSynchronize(s.stream));
  RS_TRY(fault_status(r, *fault, error));
  at = 0;
  take(&at, sizeof(run_fault));
  for (size_t i = 0; i < r.n_outputs; i++) {
    const char *from = s.results.data + take(&at, r.outputs[i].bytes);
    if (r.outputs[i].bytes) memcpy(r.outputs[i].data, from, r.outputs[i].bytes);  // of no tokens, there may be no place either
  }
  return RS_OK;
}

// ---- what rs.cpp calls

// To rs.cpp, a type that it knows nothing of.
card_session *session_of(backend_session *s) { return reinterpret_cast<card_session *>(s); }
const card_session *session_of(const backend_session *s) { return reinterpret_cast<const card_session *>(s); }

// Nothing is thrown across the libraries.
template <class F>
rs_status guarded(backend_error *error, F f) {
  try {
    return f();
  } catch (const std::bad_alloc &) {
    return fail(error, RS_ERR_MEMORY, "out of memory");
  } catch (const std::exception &e) {
    return fail(error, RS_ERR_MEMORY, "internal: %s", e.what());
  }
}

rs_status count_devices(int *n, backend_error *error) {
  *n = 0;
  const cudaError_t e = cudaGetDeviceCount(n);
  if (e == cudaSuccess) return RS_OK;
  (void)cudaGetLastError();
  *n = 0;
  return fail(error, RS_ERR_UNSUPPORTED, "%s (%s)", cudaGetErrorString(e), cudaGetErrorName(e));
}

// Multiply-accumulates a clock and multiprocessor of dense mma: 8-bit; f16 with f32 sums.
struct mma_rate {
  int capability;
  double int8, f16;
};
constexpr mma_rate mma_rates[] = {{80, 2048, 1024}, {86, 1024, 256}, {87, 2048, 1024}, {89, 1024, 256}, {90, 4096, 2048}};

rs_status describe(int device, backend_device_info *out, backend_error *error) {
  cudaDeviceProp p;
  RS_CUDA_CHECK(error, "device", cudaGetDeviceProperties(&p, device));
  int driver = 0, clock = 0, memory_clock = 0, bus = 0;
  (void)cudaDriverGetVersion(&driver);
  (void)cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, device);  // kHz
  (void)cudaDeviceGetAttribute(&memory_clock, cudaDevAttrMemoryClockRate, device);
  (void)cudaDeviceGetAttribute(&bus, cudaDevAttrGlobalMemoryBusWidth, device);
  *out = {};
  const auto small = [](int v) { return static_cast<unsigned>(static_cast<uint8_t>(v)); };
  snprintf(out->name, sizeof out->name, "%.48s, %zu MiB, compute capability %u.%u, CUDA %u.%u", p.name, p.totalGlobalMem >> 20,
           small(p.major), small(p.minor), small(driver / 1000), small(driver % 1000 / 10));
  out->memory_bytes = p.totalGlobalMem;
  const double clocks = 1e3 * clock * p.multiProcessorCount;
  for (const mma_rate &m : mma_rates)
    if (m.capability == p.major * 10 + p.minor) out->int8_macs = m.int8 * clocks, out->f16_macs = m.f16 * clocks;
  out->bytes_per_second = 2e3 * memory_clock * bus / 8;
  return RS_OK;
}

rs_status open_model(int device, backend_model **out, backend_error *error) {
  return guarded(error, [&] {
    cudaDeviceProp p;
    RS_CUDA_CHECK(error, "device", cudaGetDeviceProperties(&p, device));
    if (p.major < 8)
      return fail(error, RS_ERR_UNSUPPORTED, "%s has compute capability %d.%d, at least 8.0 is needed", p.name, p.major, p.minor);
    const device_scope scope(device);
    RS_CUDA_CHECK(error, "device", scope.status());
    // Code comes to a card when it is first asked for: what a run would fail with, a choice of cards is to know.
    cudaFuncAttributes code = {};
    const cudaError_t e = cudaFuncGetAttributes(&code, reinterpret_cast<const void *>(token_sizes_kernel));
    if (has_no_code(e)) {
      (void)cudaGetLastError();
      return fail(error, RS_ERR_UNSUPPORTED, "%s: no code for compute capability %d.%d: %s (%s)", p.name, p.major, p.minor,
                  cudaGetErrorString(e), cudaGetErrorName(e));
    }
    RS_CUDA_CHECK(error, "code", e);
    auto m = std::make_unique<backend_model>();
    m->device = device;
    m->multiprocessors = p.multiProcessorCount;
    RS_CUDA_CHECK(error, "stream", cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking));
    *out = m.release();
    return RS_OK;
  });
}

rs_status add_weight(backend_model *m, const rs_tensor_info *t, backend_error *error) {
  return guarded(error, [&] {
    const device_scope scope(m->device);
    RS_CUDA_CHECK(error, "device", scope.status());
    void *&place = m->weights[t->data];
    size_t taken = 0;
    int64_t rows = 1;
    for (int i = 0; i + 1 < t->rank; i++) rows *= t->shape[i];
    const rs_status status = upload_weight(m->stream, t->type, t->layout, rows, t->shape[t->rank - 1], t->data, t->bytes, t->name,
                                           &place, &taken, error);
    if (status != RS_OK) m->weights.erase(t->data);
    return status;
  });
}
void close_model(backend_model *m) {
  const device_scope scope(m->device);
  delete m;
}

rs_status open_session(backend_model *m, backend_session **out, backend_error *error) {
  return guarded(error, [&] {
    const device_scope scope(m->device);
    RS_CUDA_CHECK(error, "device", scope.status());
    auto s = std::make_unique<card_session>();
    s->model = m;
    RS_CUDA_CHECK(error, "stream", cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    *out = reinterpret_cast<backend_session *>(s.release());
    return RS_OK;
  });
}
rs_status run(backend_session *s, const backend_run *r, backend_error *error) {
  return guarded(error, [&] { return run_graph(*session_of(s), *r, error); });
}
void forget_graph(backend_session *session, uint64_t graph) {
  card_session *s = session_of(session);
  const device_scope scope(s->model->device);
  s->recorded.erase(std::remove_if(s->recorded.begin(), s->recorded.end(), [&](const auto &run) { return run->graph == graph; }),
                    s->recorded.end());
  for (auto i = s->constants.begin(); i != s->constants.end();) {
    if (i->first.first == graph) {
      (void)cudaFree(i->second.first);
      i = s->constants.erase(i);
    } else {
      ++i;
    }
  }
}
size_t session_bytes(const backend_session *session) {
  const card_session *s = session_of(session);
  size_t bytes = s->upload.bytes + s->arena.bytes + s->q.bytes + s->quants.bytes + s->scratch.bytes;
  for (const auto &c : s->constants) bytes += c.second.second;
  return bytes;
}
void close_session(backend_session *session) {
  card_session *s = session_of(session);
  const device_scope scope(s->model->device);
  delete s;
}

constexpr backend cuda_backend = {backend_version, op_count, RS_VERSION,   "cuda",        most_tokens,
                                  count_devices,   describe, open_model,   add_weight,    close_model,
                                  open_session,    run,      forget_graph, session_bytes, close_session};

}  // namespace

extern "C" __attribute__((visibility("default"))) const backend *rs_backend_get(void) { return &cuda_backend; }
