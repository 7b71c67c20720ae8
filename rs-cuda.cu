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
#include <type_traits>
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

namespace {}  // namespace

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
  float *out;  // [T, heads d]
  int64_t out_stride;
  attn_sum *sums;  // [heads][tokens]
  int64_t tokens;
  int d, heads;
  float scale;        // of scores in powers of two
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

RS_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
RS_DEVICE int larger(int a, int b) { return a > b ? a : b; }
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
// budget: registers 168, shared 33792, spills 0
template <int D, bool values>
RS_KERNEL(attn_threads, D >= 64 && values ? 3 : 4)
flash_attn_kernel(attn_call a) {
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
      if (a.sizes) {  // adds 0 where a size is 1: the same bits as without sizes
        const shared<float2> log = (logs + at * keys).template as<float2>();
        for (int i = 0; i < keys / 8; i++) {
          const float2 l = log[4 * i + t];
          for (int j = 0; j < 4; j++) s[i][j] = fused(s[i][j], a.scale, j % 2 ? l.y : l.x);
        }
      } else {
        for (int i = 0; i < keys / 8; i++)
          for (int j = 0; j < 4; j++) s[i][j] *= a.scale;
      }
      if (key + keys > smaller(n, warp_first + a.ahead + 1) || key < warp_last - a.behind)
        for (int i = 0; i < keys / 8; i++)
          for (int j = 0; j < 4; j++) {
            const int column = key + 8 * i + 2 * t + j % 2, from_here = column - (warp_first + lane / 4 + 8 * (j / 2));
            if (column >= n || from_here < -a.behind || from_here > a.ahead) s[i][j] = -INFINITY;
          }

      float keep[2];
      for (int j = 0; j < 2; j++) {
        float largest = most[j];
        for (int i = 0; i < keys / 8; i++) largest = fmaxf(largest, fmaxf(s[i][2 * j], s[i][2 * j + 1]));
        largest = quad_max(largest);
        const float base = largest == -INFINITY ? 0 : largest;  // no key seen yet: weights are 2^-inf, not NaN
        keep[j] = power_of_two(most[j] - base);
        most[j] = largest;
        float sum = 0;
        for (int i = 0; i < keys / 8; i++)
          for (int c = 2 * j; c < 2 * j + 2; c++) {
            s[i][c] = power_of_two(s[i][c] - base);
            sum += s[i][c];
          }
        total[j] = fused(total[j], keep[j], sum);
      }
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
      float *to = a.out + static_cast<int64_t>(begin + row) * a.out_stride + head * a.d;
      for (int i = 0; i < D / 8; i++) {
        const int column = 8 * i + 2 * t;
        const float2 y = {o[i][2 * j] * inverse, o[i][2 * j + 1] * inverse};
        if (a.pairs) {
          if (column < a.d) *reinterpret_cast<float2 *>(to + column) = y;
        } else {
          if (column < a.d) to[column] = y.x;
          if (column + 1 < a.d) to[column + 1] = y.y;
        }
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
cudaError_t find_halves(const op_call &c, int n, half_rows *out, unsigned char *&scratch) {
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
  a.behind = a.ahead = INT_MAX / 2;  // all
  a.scale = p.scale * log2_e;
  return a;
}

size_t flash_attn_work(const backend_op &op) {
  size_t bytes = 0;
  for (int i = 0; i < 3; i++) bytes += halves_bytes(op.in[i], op.params.heads);
  return bytes;
}

// Keys farther than window from a query, on either side, are not seen; 0: all are.
cudaError_t launch_flash_attn(const op_call &c, int window) {
  attn_call a = make_attn_call(c, c.in[3], c.in[4]);
  if (a.d > attn_most_d) return cudaErrorNotSupported;
  if (!c.tile_capacity) return cudaSuccess;
  half_rows x[3];
  auto *scratch = static_cast<unsigned char *>(c.scratch);
  const cudaError_t status = find_halves(c, 3, x, scratch);
  if (status != cudaSuccess) return status;
  a.q = x[0], a.k = x[1], a.v = x[2];
  a.behind = window > 0 ? std::min(window, a.behind) : a.behind, a.ahead = c.op->params.causal ? 0 : a.behind;
  a.out = c.out.f32(), a.out_stride = c.out.stride;
  a.pairs = a.d % 2 == 0 && a.out_stride % 2 == 0 && reinterpret_cast<uintptr_t>(a.out) % 8 == 0;
  const dim3 grid(static_cast<unsigned>(c.tile_capacity), static_cast<unsigned>(c.op->params.heads));
  return with_head_size(a.d, [&](auto size) {
    constexpr int d = decltype(size)::value;
    return launch(c.stream, grid, attn_threads, attn_shared<d, true>, flash_attn_kernel<d, true>, a);
  });
}

cudaError_t flash_attn_cuda(const op_call &c) { return launch_flash_attn(c, 0); }

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
// sides of the product changed: the sum over queries stays in a register.  What heads add up to is summed in their order.

// grid.y: head.  part: [heads][tokens].
// budget: registers 128, shared 33792, spills 0
template <int D>
RS_KERNEL(attn_threads, 4)
attn_columns_kernel(attn_call a, float *part) {
  constexpr int rows = attn_tile_rows, buffer = rows * D;
  if (block_x() >= *a.n_tiles) return;
  const attn_tile tile = a.tiles[block_x()];
  const int head = block_y(), lane = lane_of(), t = lane % 4;
  const int begin = a.cu[tile.sequence], n = a.cu[tile.sequence + 1] - begin;
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
  copy_queries(0, 0);
  cp_async_commit();
  cp_async_wait<1>();
  block_sync();
  uint32_t k[D / 16][4];
  load_rows<D>(k, tiles + buffer + 16 * warp_of() * D);
  const int warp_first = tile.first + 16 * warp_of(), row = warp_first + lane / 4;
  float log[2] = {0, 0}, total[2] = {0, 0};
  for (int j = 0; j < 2; j++)
    if (a.sizes && row + 8 * j < n) log[j] = log_size(a, begin + row + 8 * j);

  for (int query = 0, at = 0; query < n; query += rows, at ^= 1) {
    cp_async_wait<0>();
    block_sync();
    if (query + rows < n) copy_queries(query + rows, at ^ 1);
    cp_async_commit();
    if (warp_first >= n) continue;
    float s[rows / 8][4];
    find_scores<D, rows>(s, k, tiles + at * buffer);
    for (int i = 0; i < rows / 8; i++)
      for (int c = 0; c < 2; c++) {
        const attn_sum sum = sums[at * rows + 8 * i + 2 * t + c];
        for (int j = 0; j < 2; j++) {
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
                  const int32_t *sequences, int d, float scale, int heads, float *part, int64_t tokens) {
  if (block_x() >= *sequences) return;
  const int64_t begin = cu[block_x()], first = static_cast<int64_t>(block_y()) * d;
  const int n = static_cast<int>(cu[block_x() + 1] - begin);
  if (n == 0) return;
  float *w = part + block_y() * tokens + begin;
  sizes.data = sizes.data ? sizes.data + begin * sizes.stride : nullptr;
  const float inverse = find_weights(q + begin * q_stride + first, k + begin * k_stride + first, k_stride, sizes, n, d, scale, w,
                                     block_memory<float>(0));
  for (int i = thread_index(); i < n; i += one_query_threads) w[i] *= inverse / static_cast<float>(heads);
}

RS_KERNEL(256, 4)
attn_add_heads_kernel(const float *part, int64_t tokens, const int32_t *rows, int heads, float *out, int64_t out_stride) {
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
                  p.heads, part, q.capacity);
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
  const cudaError_t status = find_halves(c, 2, x, scratch);
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

namespace {}  // namespace

// ================================================================================ 6  token dropping

namespace {}  // namespace

// ================================================================================ 7  backend: weights, plans, runs

namespace {}  // namespace
