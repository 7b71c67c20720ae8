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
#define RS_UNROLL
#else
#include <cuda_runtime.h>

// Loops over arrays that are to be in registers.
#define RS_UNROLL _Pragma("unroll")

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
RS_DEVICE int shared_add(shared<int> p, int v) { return atomicAdd(p.p, v); }               // the value before
RS_DEVICE int global_add(int *p, int v) { return atomicAdd(p, v); }                        // the value before
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

// c [16][8] += a [16][32] u8 times b [32][8] s8.  With g = lane / 4, t = lane % 4: a[0] is row g, k 4t to 4t + 3; a[1] row g + 8;
// a[2], a[3] the same, k + 16.  b[0] is column g, k 4t to 4t + 3; b[1] k + 16.  c[0], c[1]: row g, columns 2t, 2t + 1; c[2], c[3]:
// row g + 8.
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
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
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
  int multiprocessors;

  // layer_norm and linear: what a quantized linear layer behind it needs of the result, or nullptr.
  uint8_t *q;     // [rows][kp]
  row_quant *rq;  // [rows]
  int64_t kp;     // columns, rounded up to group_k
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
// y = act(x w^T + bias) (+ residual).  Weights of 8 and 4 bits stay as they are in the file: a 32-bit word of a K4xN16 panel, 4
// values along K of one channel, is what a thread of mma.m16n8k32 wants of b.  Integer sums are exact, so they equal the CPU's in
// every bit.
//
// A block makes a tile of BM rows by BN channels; its warps make parts of it, and walk along K in steps of 64 bytes that cp.async
// brings in `stages` steps ahead.

namespace {

constexpr int step_k = 64;  // bytes of a row of x in a step

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

RS_DEVICE void store_one(const linear_end &e, int64_t row, int channel, float bias, float v) {
  v = activate(e.act, v + bias);
  if (e.residual) v = e.residual[row * e.residual_stride + channel] + v;
  const int64_t at = row * e.stride + channel;
  if (!e.half) {
    static_cast<float *>(e.y)[at] = v;
    return;
  }
  // Beyond the largest f16, the largest: what attention makes of it is then large, not infinite.
  const float fit = v > 65504.0f ? 65504.0f : v < -65504.0f ? -65504.0f : v;
  static_cast<uint16_t *>(e.y)[at] = static_cast<uint16_t>(pack_f16(fit, 0));
}

// 16 rows of a warp's 32 channels change hands, so that a thread has one channel, whose constants it loads once, and a warp's
// stores are of neighbours.  part: the warp's own, [16][part_stride].  value(sum, row): before the bias.
constexpr int part_stride = 40;  // two rows of fragments, 8 columns each, in different banks
constexpr int part_bytes = 16 * part_stride * 4;
template <class T, class F>
RS_DEVICE void store_part(shared<T> part, const T (&sums)[4][4], int64_t first_row, int rows, int channel, float bias,
                          const linear_end &e, F value) {
  const int lane = lane_of(), g = lane / 4, t = lane % 4;
  warp_sync();  // all have read what was here
  RS_UNROLL
  for (int n = 0; n < 4; n++) {
    RS_UNROLL
    for (int c = 0; c < 4; c++) part[(g + c / 2 * 8) * part_stride + n * 8 + 2 * t + c % 2] = sums[n][c];
  }
  warp_sync();
  const int64_t left = rows - first_row;
  if (channel < e.channels)
    for (int i = 0; i < 16 && i < left; i++)
      store_one(e, first_row + i, channel, bias, value(part[i * part_stride + lane], first_row + i));
}

// ---- 8 and 4 bits

struct quantized_weight {
  const uint8_t *w;       // panels
  const uint8_t *mult;    // w4: multipliers [Np / 16][Kp / 32][16]
  const float *scale;     // [Np]
  const int32_t *colsum;  // [Np]
  int32_t panels, kp;
};

template <bool Four, int BM, int BN>
struct linear_tile {
  static constexpr int stages = 3, warps_m = 2, warps_n = BN / 32, threads = warps_m * warps_n * warp_size;
  static constexpr int rows = BM / warps_m, tiles_m = rows / 16;    // of a warp; a warp has 32 channels
  static constexpr int a_bytes = BM * step_k;                       // of a stage
  static constexpr int b_bytes = BN * step_k / (Four ? 2 : 1);      // panel by panel, K4 row by K4 row
  static constexpr int m_bytes = Four ? BN * step_k / group_k : 0;  // multipliers, panel by panel
  static constexpr int stage_bytes = a_bytes + b_bytes + m_bytes;
  static constexpr int bytes = stages * stage_bytes;
  static constexpr int blocks = Four && BM == 128 ? 1 : 2;  // of a multiprocessor, at least: what registers allow
};

// Chunks of 16 bytes change places so that what the 32 threads of a warp read at a time lies in different banks.  Rows of x are 64
// bytes: two rows fill the banks, and ldmatrix reads 8 rows at one column.  K4 rows of a w8 panel are 64 bytes, too: four rows, 8
// channels of each, are read at a time.
RS_DEVICE int a_chunk(int row, int chunk) { return row * step_k + 16 * (chunk ^ (row >> 1 & 3)); }
RS_DEVICE int b_chunk(int row, int chunk) { return row * 64 + 16 * (chunk ^ (row & 2)); }

// 8 signed bytes, 16 times the values of -8 to 7 that 8 nibbles (0 to 15) stand for.
RS_DEVICE void unpack_nibbles(uint32_t w, uint32_t *low, uint32_t *high) {
  *low = (w << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
  *high = (w & 0xf0f0f0f0u) ^ 0x80808080u;
}

template <bool Four, int BM, int BN>
RS_DEVICE void load_step(shared<uint8_t> stage, const uint8_t *q, int64_t first_row, int rows, const quantized_weight &w,
                         int first_panel, int k) {
  using tile = linear_tile<Four, BM, BN>;
  for (int i = thread_index(); i < BM * 4; i += tile::threads) {
    const int row = i / 4, chunk = i % 4, at = k + chunk * 16;
    const bool there = first_row + row < rows && at < w.kp;
    cp_async16(stage + a_chunk(row, chunk), q + (there ? (first_row + row) * w.kp + at : 0), there ? 16 : 0);
  }
  const shared<uint8_t> b = stage + tile::a_bytes;
  constexpr int chunks = Four ? 2 : 4;  // of a K4 row
  for (int i = thread_index(); i < BN * chunks; i += tile::threads) {
    const int panel = i / (16 * chunks), row = i / chunks % 16, chunk = i % chunks, at = k / panel_k + row;
    const bool there = first_panel + panel < w.panels && at * panel_k < w.kp;
    const int64_t from = (static_cast<int64_t>(first_panel + panel) * (w.kp / panel_k) + at) * (16 * chunks) + 16 * chunk;
    const int to = Four ? (panel * 16 + row) * 32 + 16 * chunk : b_chunk(panel * 16 + row, chunk);
    cp_async16(b + to, w.w + (there ? from : 0), there ? 16 : 0);
  }
  if (Four)
    for (int i = thread_index(); i < BN / 16 * 2; i += tile::threads) {
      const int panel = i / 2, group = k / group_k + i % 2;
      const bool there = first_panel + panel < w.panels && group * group_k < w.kp;
      const int64_t from = (static_cast<int64_t>(first_panel + panel) * (w.kp / group_k) + group) * 16;
      cp_async16(stage + (tile::a_bytes + tile::b_bytes + i * 16), w.mult + (there ? from : 0), there ? 16 : 0);
    }
}

// Where a thread reads in a stage: all else is constants.
struct fragment_places {
  int a[2];  // by half of the step: row lane % 16, the first or the second 16 bytes
  int b;     // w8: chunk g / 4 of the first 8 channels' row; w4: the word of channel g
  int flip;  // w8: to the chunk of the other 8 channels
  template <class Tile>
  RS_DEVICE static fragment_places of(int warp_m, int warp_n, bool four) {
    const int lane = lane_of(), g = lane / 4, t = lane % 4;
    fragment_places p;
    RS_UNROLL
    for (int half = 0; half < 2; half++) p.a[half] = a_chunk(warp_m * Tile::rows + lane % 16, 2 * half + lane / 16);
    p.b = Tile::a_bytes + (four ? (warp_n * 32 + t) * 32 + g * 4 : b_chunk(warp_n * 32 + t, g / 4) + g % 4 * 4);
    p.flip = t & 2 ? -32 : 32;
    return p;
  }
};

// acc += 32 values along K: half 0 or 1 of a step.
template <bool Four, int BM, int BN>
RS_DEVICE void multiply_half(shared<uint8_t> stage, int half, const fragment_places &at, int warp_n,
                             int32_t (&acc)[linear_tile<Four, BM, BN>::tiles_m][4][4]) {
  using tile = linear_tile<Four, BM, BN>;
  const int t = lane_of() % 4;
  constexpr int row_bytes = Four ? 32 : 64;  // of K4
  uint32_t b[4][2];
  RS_UNROLL
  for (int p = 0; p < 2; p++) {  // panels of a warp
    RS_UNROLL
    for (int i = 0; i < 2; i++) {
      const shared<uint8_t> from = stage + at.b + (p * 16 + half * 8 + i * 4) * row_bytes;
      if (Four) {
        unpack_nibbles(from.template as<uint32_t>()[0], &b[2 * p][i], &b[2 * p + 1][i]);
      } else {
        b[2 * p][i] = from.template as<uint32_t>()[0];
        b[2 * p + 1][i] = (from + at.flip).template as<uint32_t>()[0];
      }
    }
  }
  // Of a group of 4-bit weights: its multipliers, for the two channels of each tile that this thread has.
  uint32_t mult[4] = {};
  if (Four) {
    const shared<uint8_t> from = stage + (tile::a_bytes + tile::b_bytes + warp_n * 64 + half * 16 + 2 * t);
    RS_UNROLL
    for (int n = 0; n < 4; n++) mult[n] = (from + (n / 2 * 32 + n % 2 * 8)).template as<uint16_t>()[0];
  }
  RS_UNROLL
  for (int m = 0; m < tile::tiles_m; m++) {
    uint32_t a[4];  // matrices: rows 0 to 7 and 8 to 15 of the first 16 bytes, then of the second
    ldmatrix_x4(a, stage + at.a[half] + m * 16 * step_k);
    RS_UNROLL
    for (int n = 0; n < 4; n++) {
      if (!Four) {
        mma_u8s8(acc[m][n], a, b[n]);
        continue;
      }
      int32_t sum[4] = {};  // 16 times the group's
      mma_u8s8(sum, a, b[n]);
      RS_UNROLL
      for (int c = 0; c < 4; c++) acc[m][n][c] += (sum[c] >> 4) * static_cast<int32_t>(c % 2 ? mult[n] >> 8 : mult[n] & 255);
    }
  }
}

// budget: registers 168, shared 49152, spills 0
template <bool Four, int BM, int BN>
RS_KERNEL((linear_tile<Four, BM, BN>::threads), (linear_tile<Four, BM, BN>::blocks))
linear_quantized(const int32_t *n_rows, const uint8_t *q, const row_quant *rq, quantized_weight w, linear_end e) {
  using tile = linear_tile<Four, BM, BN>;
  const int rows = *n_rows, first_panel = block_x() * (BN / panel_n);
  const int64_t first_row = static_cast<int64_t>(block_y()) * BM;
  if (first_row >= rows) return;
  const shared<uint8_t> memory = block_memory<uint8_t>(0);
  const int warp_m = warp_of() % tile::warps_m, warp_n = warp_of() / tile::warps_m, steps = (w.kp + step_k - 1) / step_k;
  const fragment_places places = fragment_places::of<tile>(warp_m, warp_n, Four);
  int32_t acc[tile::tiles_m][4][4] = {};
  for (int i = 0; i < tile::stages - 1; i++) {
    if (i < steps) load_step<Four, BM, BN>(memory + i * tile::stage_bytes, q, first_row, rows, w, first_panel, i * step_k);
    cp_async_commit();
  }
  for (int i = 0; i < steps; i++) {
    cp_async_wait<tile::stages - 2>();
    block_sync();  // step i is there for all, and all are done with step i - 1, whose place the next one takes
    const int next = i + tile::stages - 1;
    if (next < steps)
      load_step<Four, BM, BN>(memory + next % tile::stages * tile::stage_bytes, q, first_row, rows, w, first_panel, next * step_k);
    cp_async_commit();
    RS_UNROLL
    for (int half = 0; half < 2; half++)
      multiply_half<Four, BM, BN>(memory + i % tile::stages * tile::stage_bytes, half, places, warp_n, acc);
  }
  cp_async_wait<0>();
  block_sync();
  const int channel = first_panel * panel_n + warp_n * 32 + lane_of();
  const bool there = channel < e.channels;
  const float scale = there ? w.scale[channel] : 0, bias = there && e.bias ? e.bias[channel] : 0;
  const int32_t colsum = there ? w.colsum[channel] : 0;
  RS_UNROLL
  for (int m = 0; m < tile::tiles_m; m++)
    store_part(block_memory<int32_t>(warp_of() * part_bytes), acc[m], first_row + warp_m * tile::rows + m * 16, rows, channel, bias,
               e, [&](int32_t sum, int64_t row) {
                 const row_quant x = rq[row];
                 const uint32_t centred =
                     static_cast<uint32_t>(sum) - static_cast<uint32_t>(x.zero) * static_cast<uint32_t>(colsum);
                 return static_cast<float>(static_cast<int32_t>(centred)) * (x.scale * scale);
               });
}

template <bool Four, int BM, int BN>
cudaError_t launch_quantized(const op_call &c, const quantized_weight &w, const linear_end &e) {
  using tile = linear_tile<Four, BM, BN>;
  const dim3 grid(static_cast<unsigned>(ceil_div(w.panels * panel_n, BN)), static_cast<unsigned>(ceil_div(c.out.capacity, BM)));
  return launch(c.stream, grid, tile::threads, tile::bytes, linear_quantized<Four, BM, BN>, c.out.rows,
                static_cast<const uint8_t *>(c.q), static_cast<const row_quant *>(c.rq), w, e);
}

// ---- floats: products of bf16, three for one of f32
//
// x = h + l, both bf16, so that h has 8 bits of it and l 8 more; x w is then h h' + l h' + h l', to 2^-16.  Weights are cut so when
// they come to the device, into words that a thread of mma.m16n8k16 wants: [N / 8][Kp / 16][32 threads] {h, h, l, l}.  Which of the
// 16 values along K is the mma's k-th is free, so long as x and w agree: thread t has 4 t to 4 t + 3, which it reads at once.

struct split_pair {
  uint32_t high, low;
};
RS_DEVICE split_pair split(float a, float b) {
  const uint32_t high = pack_bf16(a, b);
  return {high, pack_bf16(a - bits_to_float(high << 16), b - bits_to_float(high & 0xffff0000u))};
}

constexpr int float_rows = 64, float_channels = 64, float_k = 32, float_stages = 3, float_threads = 128;
constexpr int float_a_bytes = float_rows * float_k * 4, float_b_bytes = float_channels * float_k * 4;
constexpr int float_bytes = float_stages * (float_a_bytes + float_b_bytes);

struct float_weight {
  const uint4 *w;
  int32_t tiles, kp;  // tiles of 8 channels
};

// Rows are 128 bytes, all banks: two rows, four chunks of each, are read at a time.
RS_DEVICE int float_chunk(int row, int chunk) { return row * 128 + 16 * (chunk ^ ((row & 1) << 2 | (row >> 1 & 3))); }

RS_DEVICE void load_float_step(shared<uint8_t> stage, const float *x, int64_t stride, int columns, bool aligned, int64_t first_row,
                               int rows, const float_weight &w, int first_tile, int k) {
  for (int i = thread_index(); i < float_rows * 8; i += float_threads) {
    const int row = i / 8, chunk = i % 8, at = k + chunk * 4;
    const int there = first_row + row < rows ? (columns - at < 4 ? columns - at > 0 ? columns - at : 0 : 4) : 0;
    const float *from = x + (there ? (first_row + row) * stride + at : 0);
    const shared<uint8_t> to = stage + float_chunk(row, chunk);
    if (aligned) cp_async16(to, from, there * 4);
    else
      to.as<float4>()[0] =
          make_float4(there > 0 ? from[0] : 0, there > 1 ? from[1] : 0, there > 2 ? from[2] : 0, there > 3 ? from[3] : 0);
  }
  for (int i = thread_index(); i < float_channels / 8 * 2 * warp_size; i += float_threads) {
    const int tile = first_tile + i / (2 * warp_size), at = k / 16 + i / warp_size % 2;
    const bool there = tile < w.tiles && at * 16 < w.kp;
    const int64_t from = (static_cast<int64_t>(tile) * (w.kp / 16) + at) * warp_size + i % warp_size;
    cp_async16(stage + (float_a_bytes + i * 16), w.w + (there ? from : 0), there ? 16 : 0);
  }
}

// budget: registers 168, shared 49152, spills 0
RS_KERNEL(float_threads, 3)
linear_float(const int32_t *n_rows, const float *x, int64_t stride, int columns, bool aligned, float_weight w, linear_end e) {
  const int rows = *n_rows, first_tile = block_x() * (float_channels / 8);
  const int64_t first_row = static_cast<int64_t>(block_y()) * float_rows;
  if (first_row >= rows) return;
  const shared<uint8_t> memory = block_memory<uint8_t>(0);
  constexpr int stage_bytes = float_a_bytes + float_b_bytes;
  const int lane = lane_of(), g = lane / 4, t = lane % 4, warp_m = warp_of() % 2, warp_n = warp_of() / 2;
  const int steps = (w.kp + float_k - 1) / float_k;
  float acc[2][4][4] = {};
  for (int i = 0; i < float_stages - 1; i++) {
    if (i < steps)
      load_float_step(memory + i * stage_bytes, x, stride, columns, aligned, first_row, rows, w, first_tile, i * float_k);
    cp_async_commit();
  }
  for (int i = 0; i < steps; i++) {
    cp_async_wait<float_stages - 2>();
    block_sync();
    const int next = i + float_stages - 1;
    if (next < steps)
      load_float_step(memory + next % float_stages * stage_bytes, x, stride, columns, aligned, first_row, rows, w, first_tile,
                      next * float_k);
    cp_async_commit();
    const shared<uint8_t> stage = memory + i % float_stages * stage_bytes;
    RS_UNROLL
    for (int half = 0; half < 2; half++) {
      uint32_t high[2][4], low[2][4];
      RS_UNROLL
      for (int m = 0; m < 2; m++) RS_UNROLL
      for (int r = 0; r < 2; r++) {
        const float4 v = (stage + float_chunk(warp_m * 32 + m * 16 + r * 8 + g, half * 4 + t)).as<float4>()[0];
        const split_pair a = split(v.x, v.y), b = split(v.z, v.w);
        high[m][r] = a.high, low[m][r] = a.low;
        high[m][r + 2] = b.high, low[m][r + 2] = b.low;
      }
      RS_UNROLL
      for (int n = 0; n < 4; n++) {
        const uint4 v = (stage + (float_a_bytes + (((warp_n * 4 + n) * 2 + half) * warp_size + lane) * 16)).as<uint4>()[0];
        const uint32_t wh[2] = {v.x, v.y}, wl[2] = {v.z, v.w};
        RS_UNROLL
        for (int m = 0; m < 2; m++) {
          mma_bf16(acc[m][n], low[m], wh);
          mma_bf16(acc[m][n], high[m], wl);
          mma_bf16(acc[m][n], high[m], wh);
        }
      }
    }
  }
  cp_async_wait<0>();
  block_sync();
  const int channel = first_tile * 8 + warp_n * 32 + lane;
  const float bias = channel < e.channels && e.bias ? e.bias[channel] : 0;
  RS_UNROLL
  for (int m = 0; m < 2; m++)
    store_part(block_memory<float>(warp_of() * part_bytes), acc[m], first_row + warp_m * 32 + m * 16, rows, channel, bias, e,
               [](float sum, int64_t) { return sum; });
}

// ---- the operator

bool is_quantized(rs_type type) { return type == RS_W8 || type == RS_W4; }

size_t linear_work(const backend_op &) { return 0; }

cudaError_t linear_cuda(const op_call &c) {
  const backend_tensor &weight = c.op->in[1];
  const int64_t n = weight.rows, np = round_up(n, panel_n), kp = round_up(weight.cols, group_k);
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
    const float_weight w = {static_cast<const uint4 *>(c.in[1].data), static_cast<int32_t>(np / 8), static_cast<int32_t>(kp)};
    const dim3 grid(static_cast<unsigned>(ceil_div(np, float_channels)),
                    static_cast<unsigned>(ceil_div(c.out.capacity, float_rows)));
    return launch(c.stream, grid, float_threads, float_bytes, linear_float, c.out.rows, static_cast<const float *>(x.f32()),
                  x.stride, static_cast<int>(weight.cols), aligned, w, e);
  }
  quantized_weight w = {};
  w.panels = static_cast<int32_t>(np / panel_n), w.kp = static_cast<int32_t>(kp);
  w.w = static_cast<const uint8_t *>(c.in[1].data);
  const uint8_t *behind = w.w + np * kp / (weight.type == RS_W4 ? 2 : 1);
  if (weight.type == RS_W4) w.mult = behind, behind += np * kp / group_k;
  w.scale = reinterpret_cast<const float *>(behind);
  w.colsum = reinterpret_cast<const int32_t *>(w.scale + np);
  // Large tiles read x and w less often; small ones make more blocks, which few rows need.
  const bool large = ceil_div(np, 128) * ceil_div(c.out.capacity, 128) >= c.multiprocessors;
  if (weight.type == RS_W8) return large ? launch_quantized<false, 128, 128>(c, w, e) : launch_quantized<false, 64, 64>(c, w, e);
  return large ? launch_quantized<true, 128, 128>(c, w, e) : launch_quantized<true, 64, 64>(c, w, e);
}

}  // namespace

// ================================================================================ 4  attention

namespace {}  // namespace

// ================================================================================ 5  operators on rows

namespace {}  // namespace

// ================================================================================ 6  token dropping

namespace {}  // namespace

// ================================================================================ 7  backend: weights, plans, runs
//
// A run is one copy to the device (what the caller binds, how many rows there are, cu_seqlens, where tiles of attention begin), the
// launches of its operators, and copies of the outputs back; the host waits once, at the end.  Launches depend on capacities and
// addresses alone, so a run of a known capacity is a recorded CUDA graph.

namespace {

rs_status fail(backend_error *error, rs_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));
rs_status fail(backend_error *error, rs_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(error->text, sizeof error->text, format, args);
  va_end(args);
  return status;
}

rs_status cuda_status(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return RS_OK;
    case cudaErrorMemoryAllocation:
      return RS_ERR_MEMORY;
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorNotSupported:
    case cudaErrorNoKernelImageForDevice:
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

// Memory that grows.
struct device_buffer {
  char *data = nullptr;
  size_t bytes = 0;
  ~device_buffer() { (void)cudaFree(data); }
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
struct pinned_buffer {
  char *data = nullptr;
  size_t bytes = 0;
  ~pinned_buffer() { (void)cudaFreeHost(data); }
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

// Panels of floats, [Np / 16][Kp][16], as linear_float wants them.
std::vector<uint32_t> split_panels(rs_type type, const void *data, int64_t np, int64_t kp) {
  const auto at = [&](int64_t n, int64_t k) {
    const int64_t i = (n / panel_n * kp + k) * panel_n + n % panel_n;
    return type == RS_F32 ? static_cast<const float *>(data)[i] : half_value(static_cast<const uint16_t *>(data)[i]);
  };
  std::vector<uint32_t> out(static_cast<size_t>(np * kp));
  for (int64_t tile = 0; tile < np / 8; tile++)
    for (int64_t step = 0; step < kp / 16; step++)
      for (int64_t lane = 0; lane < warp_size; lane++) {
        uint32_t *to = out.data() + ((tile * (kp / 16) + step) * warp_size + lane) * 4;
        for (int i = 0; i < 2; i++) {
          const int64_t n = tile * 8 + lane / 4, k = step * 16 + lane % 4 * 4 + i * 2;
          const float a = at(n, k), b = at(n, k + 1);
          const uint16_t ah = bf16_of(a), bh = bf16_of(b);
          to[i] = ah | static_cast<uint32_t>(bh) << 16;
          to[i + 2] = bf16_of(a - bf16_value(ah)) | static_cast<uint32_t>(bf16_of(b - bf16_value(bh))) << 16;
        }
      }
  return out;
}

// A copy of a weight, of `bytes` in the host's memory.  Its kernels may read a different form.
rs_status upload_weight(rs_type type, rs_layout layout, int64_t rows, int64_t cols, const void *data, size_t bytes,
                        const char *name, void **out, size_t *taken, backend_error *error) {
  std::vector<uint32_t> cut;
  if (layout == RS_PANELS && !is_quantized(type)) {
    cut = split_panels(type, data, round_up(rows, panel_n), round_up(cols, group_k));
    data = cut.data(), bytes = cut.size() * 4;
  }
  RS_TRY(allocate(out, bytes, name, error));
  const cudaError_t e = cudaMemcpy(*out, data, bytes, cudaMemcpyHostToDevice);
  if (e != cudaSuccess) {
    (void)cudaFree(*out);
    return cuda_failed(error, name, e);
  }
  *taken = bytes;
  return RS_OK;
}

}  // namespace

struct backend_model {
  int device = 0, multiprocessors = 1;
  std::map<const void *, void *> weights;  // by their place in the file
  size_t bytes = 0;

  ~backend_model() {
    (void)cudaSetDevice(device);
    for (const auto &w : weights) (void)cudaFree(w.second);
  }
};

namespace {

// ---- plans

// Where things are in what a run copies to the device, and how large all memory is.
struct run_layout {
  size_t fault = 0, counts = 0, upload_bytes = 0, download_bytes = 0, q_bytes = 0, quant_bytes = 0, scratch_bytes = 0;
  std::vector<size_t> starts, tiles;  // by level
  std::vector<int64_t> tile_capacity;
  std::map<int32_t, size_t> inputs;  // by tensor
};

size_t take(size_t *at, size_t bytes) {
  const size_t here = *at;
  *at += static_cast<size_t>(round_up(static_cast<int64_t>(bytes), 256));
  return here;
}

// Runs of a graph at a capacity.
struct recorded_run {
  std::vector<int64_t> key;  // graph, capacity of sequences, of each level's tokens
  run_layout layout;
  std::vector<backend_op> ops;                 // that the calls are of
  std::vector<std::pair<int, op_call>> calls;  // of an operator; -1: quantize the rows of in[0] for what follows
  uint64_t places = 0;                         // of backend_session when the calls were made
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

}  // namespace

struct backend_session {
  backend_model *model = nullptr;
  cudaStream_t stream = nullptr;
  device_buffer upload, arena, q, quants, scratch;
  pinned_buffer staging, results;
  uint64_t places = 1;                                                          // grows when memory moves
  std::vector<std::unique_ptr<recorded_run>> recorded;                          // the last used at the end
  std::map<std::pair<uint64_t, int32_t>, std::pair<void *, size_t>> constants;  // by graph and tensor

  ~backend_session() {
    (void)cudaSetDevice(model->device);
    recorded.clear();
    for (const auto &c : constants) (void)cudaFree(c.second.first);
    if (stream) (void)cudaStreamDestroy(stream);
  }
};

namespace {

size_t quantized_kp(const backend_tensor &x) { return static_cast<size_t>(round_up(x.cols, group_k)); }

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
  for (size_t i = 0; i < r.n_inputs; i++) l.inputs[r.inputs[i].id] = take(&at, r.inputs[i].capacity);
  l.upload_bytes = at;
  for (size_t i = 0; i < r.n_ops; i++) {
    const backend_op &op = r.ops[i];
    l.scratch_bytes = std::max(l.scratch_bytes, operators[op.op].work(op));
    if (op.op != OP_LINEAR || !is_quantized(op.in[1].type)) continue;
    const auto rows = static_cast<size_t>(op.in[0].rows);
    l.q_bytes = std::max(l.q_bytes, rows * quantized_kp(op.in[0]));
    l.quant_bytes = std::max(l.quant_bytes, rows * sizeof(row_quant));
  }
  return l;
}

// What a run copies to the device.
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
  for (size_t i = 0; i < r.n_inputs; i++) memcpy(to + l.inputs.at(r.inputs[i].id), r.inputs[i].data, r.inputs[i].bytes);
}

// Makes calls of operators: addresses, and what is done together.
struct call_maker {
  backend_session &s;
  const backend_run &r;
  const run_layout &l;
  backend_error *error;
  std::map<int32_t, int> readers;  // of a tensor's elements, by its id
  std::map<int32_t, bool> halves;  // what is stored as f16
  std::vector<char> done;          // operators that another one does
  int32_t quantized = -1;          // whose rows s.q holds
  std::vector<std::pair<int, op_call>> calls;

  call_maker(backend_session &s, const backend_run &r, const run_layout &l, backend_error *error)
      : s(s), r(r), l(l), error(error), done(r.n_ops) {
    for (size_t i = 0; i < r.n_ops; i++)
      for (const backend_tensor &t : r.ops[i].in)
        if (t.place == backend_place::result) readers[t.id]++;
    for (size_t i = 0; i < r.n_ops; i++)
      if (r.ops[i].op == OP_LINEAR) halves[r.ops[i].out.id] = !r.ops[i].out.output && attention_only(r.ops[i].out.id);
  }

  // Do only kernels read that tensor which take f16?
  bool attention_only(int32_t id) const {
    bool any = false;
    for (size_t i = 0; i < r.n_ops; i++) {
      const backend_op &op = r.ops[i];
      for (int j = 0; j < max_sources; j++) {
        if (op.in[j].place != backend_place::result || op.in[j].id != id) continue;
        const bool attention = (op.op == OP_FLASH_ATTN && j < 3) || (op.op == OP_ATTN_COLSUM && j < 2);
        // Heads begin on 16 bytes.
        if (!attention || op.in[j].cols / op.params.heads % 8 || op.in[j].stride % 8 || op.in[j].first % 8) return false;
        any = true;
      }
    }
    return any;
  }

  rs_status constant(const backend_tensor &t, void **out) {
    if (t.of_model) {
      const auto found = s.model->weights.find(t.data);
      if (found == s.model->weights.end()) return fail(error, RS_ERR_NOT_FOUND, "'%s' is not on the device", t.name);
      *out = found->second;
      return RS_OK;
    }
    std::pair<void *, size_t> &c = s.constants[{r.graph, t.id}];
    if (!c.first) {
      RS_TRY(upload_weight(t.type, t.layout, t.rows, t.cols, t.data, t.bytes, t.name, &c.first, &c.second, error));
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
      give_quantized(c, next.in[0]);
      quantized = op.out.id;
      break;
    }
    for (size_t j = i + 1; j < std::min(r.n_ops, i + 3); j++) {
      const backend_op &next = r.ops[j];
      if (next.op != OP_SHIFT || next.params.distance != RS_DISTANCE_L2 || next.in[1].place != backend_place::absent) continue;
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
    }
    return RS_OK;
  }

  void give_quantized(op_call *c, const backend_tensor &x) const {
    c->q = reinterpret_cast<uint8_t *>(s.q.data);
    c->rq = reinterpret_cast<row_quant *>(s.quants.data);
    c->kp = static_cast<int64_t>(quantized_kp(x));
  }

  rs_status make_linear(size_t i, op_call *c) {
    const backend_op &op = r.ops[i];
    const backend_tensor &x = op.in[0];
    const bool quantize = is_quantized(op.in[1].type);
    if (quantize) {
      give_quantized(c, x);
      const bool there = x.place == backend_place::result && x.id == quantized && whole(x);
      if (!there) calls.emplace_back(-1, *c);
      quantized = x.place == backend_place::result && whole(x) ? x.id : -1;
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

rs_status launch_failed(backend_error *error, const op_call &c, cudaError_t e) {
  (void)cudaGetLastError();
  return fail(error, cuda_status(e), "%s '%s': %s", operator_names[c.op->op], c.op->out.name, cudaGetErrorString(e));
}

rs_status launch_all(backend_session &s, const recorded_run &run, backend_error *error) {
  RS_CUDA_CHECK(error, "copy to the device",
                cudaMemcpyAsync(s.upload.data, s.staging.data, run.layout.upload_bytes, cudaMemcpyHostToDevice, s.stream));
  for (const auto &call : run.calls) {
    const cudaError_t e = run_call(call);
    if (e != cudaSuccess) return launch_failed(error, call.second, e);
  }
  return RS_OK;
}

struct event_pair {
  cudaEvent_t begin = nullptr, end = nullptr;
  ~event_pair() {
    if (begin) (void)cudaEventDestroy(begin);
    if (end) (void)cudaEventDestroy(end);
  }
};

rs_status launch_timed(backend_session &s, const recorded_run &run, float *seconds, backend_error *error) {
  RS_CUDA_CHECK(error, "copy to the device",
                cudaMemcpyAsync(s.upload.data, s.staging.data, run.layout.upload_bytes, cudaMemcpyHostToDevice, s.stream));
  event_pair events;
  RS_CUDA_CHECK(error, "events", cudaEventCreate(&events.begin));
  RS_CUDA_CHECK(error, "events", cudaEventCreate(&events.end));
  for (const auto &call : run.calls) {
    RS_CUDA_CHECK(error, "events", cudaEventRecord(events.begin, s.stream));
    const cudaError_t e = run_call(call);
    if (e != cudaSuccess) return launch_failed(error, call.second, e);
    RS_CUDA_CHECK(error, "events", cudaEventRecord(events.end, s.stream));
    RS_CUDA_CHECK(error, "events", cudaEventSynchronize(events.end));
    float milliseconds = 0;
    RS_CUDA_CHECK(error, "events", cudaEventElapsedTime(&milliseconds, events.begin, events.end));
    seconds[call.second.index] += milliseconds / 1000;
  }
  return RS_OK;
}

// The second run of a capacity is recorded; the first may be the only one.
rs_status launch_recorded(backend_session &s, recorded_run &run, backend_error *error) {
  if (!run.exec && run.runs++ == 0) return launch_all(s, run, error);
  if (!run.exec) {
    RS_CUDA_CHECK(error, "recording", cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeThreadLocal));
    const rs_status status = launch_all(s, run, error);
    cudaGraph_t graph = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(s.stream, &graph);
    cudaError_t e = ended;
    if (status == RS_OK && ended == cudaSuccess) e = cudaGraphInstantiate(&run.exec, graph, 0);
    if (graph) (void)cudaGraphDestroy(graph);
    RS_TRY(status);
    if (e != cudaSuccess) return cuda_failed(error, "recording", e);
  }
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

// The recorded run of that capacity: found, or made in the place of the one that was used longest ago.
recorded_run *find_recorded(backend_session &s, const backend_run &r) {
  std::vector<int64_t> key = {static_cast<int64_t>(r.graph), r.sequence_capacity};
  for (size_t i = 0; i < r.n_levels; i++) key.push_back(r.levels[i].capacity);
  for (size_t i = 0; i < s.recorded.size(); i++)
    if (s.recorded[i]->key == key) {
      std::rotate(s.recorded.begin() + static_cast<std::ptrdiff_t>(i), s.recorded.begin() + static_cast<std::ptrdiff_t>(i) + 1,
                  s.recorded.end());
      return s.recorded.back().get();
    }
  if (s.recorded.size() == most_recorded) s.recorded.erase(s.recorded.begin());
  s.recorded.push_back(std::make_unique<recorded_run>());
  s.recorded.back()->key = key;
  s.recorded.back()->layout = lay_out(r);
  return s.recorded.back().get();
}

rs_status reserve_all(backend_session &s, const backend_run &r, const run_layout &l, size_t download, backend_error *error) {
  bool moved = false;
  RS_TRY(s.upload.reserve(l.upload_bytes, "inputs", error, &moved));
  RS_TRY(s.staging.reserve(l.upload_bytes, "inputs", error, &moved));
  RS_TRY(s.arena.reserve(r.arena_bytes, "activations", error, &moved));
  RS_TRY(s.q.reserve(l.q_bytes, "quantized activations", error, &moved));
  RS_TRY(s.quants.reserve(l.quant_bytes, "quantized activations", error, &moved));
  RS_TRY(s.scratch.reserve(l.scratch_bytes, "scratch", error, &moved));
  if (moved) s.places++;
  return s.results.reserve(download, "outputs", error, &moved);
}

rs_status run_graph(backend_session &s, const backend_run &r, backend_error *error) {
  RS_CUDA_CHECK(error, "device", cudaSetDevice(s.model->device));
  recorded_run &run = *find_recorded(s, r);
  size_t download = 0;
  take(&download, sizeof(run_fault));
  for (size_t i = 0; i < r.n_outputs; i++) take(&download, r.outputs[i].bytes);
  RS_TRY(reserve_all(s, r, run.layout, download, error));
  if (run.places != s.places) run.forget();
  fill_upload(r, run.layout, s.staging.data);
  if (run.calls.empty()) {
    run.ops.assign(r.ops, r.ops + r.n_ops);
    backend_run kept = r;
    kept.ops = run.ops.data();
    call_maker maker(s, kept, run.layout, error);
    RS_TRY(maker.make());
    run.calls = std::move(maker.calls);
    run.places = s.places;
  }
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
  for (size_t i = 0; i < r.n_outputs; i++)
    memcpy(r.outputs[i].data, s.results.data + take(&at, r.outputs[i].bytes), r.outputs[i].bytes);
  return RS_OK;
}

// ---- what rs.cpp calls

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

// No driver is no error: then there is no card.
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
  snprintf(out->name, sizeof out->name, "%.64s, %zu MiB, compute capability %d.%d, CUDA %d.%d", p.name, p.totalGlobalMem >> 20,
           p.major, p.minor, driver / 1000, driver % 1000 / 10);
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
    RS_CUDA_CHECK(error, "device", cudaSetDevice(device));
    RS_CUDA_CHECK(error, "device", cudaGetDeviceProperties(&p, device));
    if (p.major < 8)
      return fail(error, RS_ERR_UNSUPPORTED, "%s has compute capability %d.%d, at least 8.0 is needed", p.name, p.major, p.minor);
    auto m = std::make_unique<backend_model>();
    m->device = device;
    m->multiprocessors = p.multiProcessorCount;
    *out = m.release();
    return RS_OK;
  });
}

rs_status add_weight(backend_model *m, const rs_tensor_info *t, backend_error *error) {
  return guarded(error, [&] {
    RS_CUDA_CHECK(error, "device", cudaSetDevice(m->device));
    void *&place = m->weights[t->data];
    size_t taken = 0;
    int64_t rows = 1;
    for (int i = 0; i + 1 < t->rank; i++) rows *= t->shape[i];
    const rs_status status =
        upload_weight(t->type, t->layout, rows, t->shape[t->rank - 1], t->data, t->bytes, t->name, &place, &taken, error);
    if (status != RS_OK) m->weights.erase(t->data);
    m->bytes += taken;
    return status;
  });
}
size_t model_bytes(const backend_model *m) { return m->bytes; }
void close_model(backend_model *m) { delete m; }

rs_status open_session(backend_model *m, backend_session **out, backend_error *error) {
  return guarded(error, [&] {
    RS_CUDA_CHECK(error, "device", cudaSetDevice(m->device));
    auto s = std::make_unique<backend_session>();
    s->model = m;
    RS_CUDA_CHECK(error, "stream", cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    *out = s.release();
    return RS_OK;
  });
}
rs_status run(backend_session *s, const backend_run *r, backend_error *error) {
  return guarded(error, [&] { return run_graph(*s, *r, error); });
}
void forget_graph(backend_session *s, uint64_t graph) {
  (void)cudaSetDevice(s->model->device);
  s->recorded.erase(std::remove_if(s->recorded.begin(), s->recorded.end(),
                                   [&](const auto &run) { return run->key[0] == static_cast<int64_t>(graph); }),
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
size_t session_bytes(const backend_session *s) {
  return s->upload.bytes + s->arena.bytes + s->q.bytes + s->quants.bytes + s->scratch.bytes;
}
void close_session(backend_session *s) { delete s; }

constexpr backend cuda_backend = {backend_version, "cuda",        count_devices, describe,     open_model,
                                  add_weight,      model_bytes,   close_model,   open_session, run,
                                  forget_graph,    session_bytes, close_session};

}  // namespace

extern "C" __attribute__((visibility("default"))) const backend *rs_backend_get(void) { return &cuda_backend; }
