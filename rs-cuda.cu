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

namespace {}  // namespace

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
RS_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
RS_DEVICE int larger(int a, int b) { return a > b ? a : b; }

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

  RS_DEVICE static int column(int i) { return (i * warp_size + lane_of()) * 4; }
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
RS_DEVICE row_quant quant_range(float low, float high, bool nan) {
  const float scale = (high - low) / 255;
  if (nan || !(fabsf(scale) <= FLT_MAX)) return {bits_to_float(0x7fc00000u), 0};
  if (scale < FLT_MIN) return {FLT_MIN, 0};  // nothing but zeros (or denormals)
  return {scale, static_cast<int32_t>(rintf(-low / scale))};
}
RS_DEVICE uint8_t quantize_one(float x, float inverse, int32_t zero) {
  const float v = fminf(fmaxf(rintf(x * inverse), -256.0f), 256.0f);
  return static_cast<uint8_t>(smaller(larger(static_cast<int32_t>(v) + zero, 0), 255));
}

// A row that a warp holds: q has kp columns, those behind the row's the zero point.
template <class R>
RS_DEVICE void quantize_held(const R &row, int n, uint8_t *q, int kp, row_quant *rq) {
  float low = 0, high = 0;
  bool nan = false;
  row.look(n, [&](int, const piece<float, R::width> &v) {
    for (int i = 0; i < R::width; i++) low = fminf(low, v.v[i]), high = fmaxf(high, v.v[i]), nan = nan || v.v[i] != v.v[i];
  });
  const row_quant to = quant_range(warp_min(low), warp_max(high), ballot(nan) != 0);
  const bool shows = to.scale != to.scale;  // zeros, whose scale says what they are
  const float inverse = 1 / to.scale;
  row.look(n, [&](int j, const piece<float, R::width> &v) {
    piece<uint8_t, R::width> u;
    for (int i = 0; i < R::width; i++) u.v[i] = shows ? uint8_t{0} : quantize_one(v.v[i], inverse, to.zero);
    store(q + j, u);
  });
  for (int j = n + lane_of(); j < kp; j += warp_size) q[j] = static_cast<uint8_t>(to.zero);
  if (lane_of() == 0) *rq = to;
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
  float *shift;  // or nullptr
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
  if (a.q) quantize_held(row, a.n, a.q + r * a.kp, a.kp, a.rq + r);
}

// budget: registers 128, shared 0, spills 0
template <int count, bool full>
RS_KERNEL(row_threads, count > 4 ? 2 : 3)
layer_norm_registers(norm_args a) {
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  row_in_registers<count, full> row;
  layer_norm_row(a, r, row);
}
// budget: registers 80, shared 0, spills 0
template <int N>
RS_KERNEL(row_threads, 3)
layer_norm_shared(norm_args a) {
  const int64_t r = static_cast<int64_t>(block_x()) * a.held + warp_of();
  if (r >= *a.rows) return;
  const int bytes = (a.n * 4 + 15) / 16 * 16;
  row_in_memory<shared<piece<float, N>>, N> row = {block_memory<piece<float, N>>(warp_of() * bytes)};
  layer_norm_row(a, r, row);
}
template <int N>
RS_KERNEL(row_threads, 4)
layer_norm_global(norm_args a) {
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
                     reinterpret_cast<uintptr_t>(c.in[3].data) % 16 == 0;
  const row_plan plan = plan_row(n, fours);
  const norm_args a = {c.in[0].f32(),  c.in[1].f32(),    c.in[2].f32(), c.in[3].f32(), c.out.f32(),
                       c.in[0].stride, c.in[1].stride,   c.out.stride,  c.out.rows,    static_cast<int>(n),
                       plan.held,      c.op->params.eps, c.q,           c.rq,          static_cast<int>(c.kp),
                       c.shift,        c.shift_stride};
  if (rows <= 0) return cudaSuccess;
  switch (plan.pieces) { RS_HELD_IN_REGISTERS(layer_norm_registers, rows) }
  if (plan.held)
    return launch(c.stream, dim3(blocks_of(rows, plan.held)), plan.held * warp_size, plan.bytes,
                  fours ? layer_norm_shared<4> : layer_norm_shared<1>, a);
  if (!a.y) return cudaErrorInvalidValue;
  return launch_rows(c, rows, fours ? layer_norm_global<4> : layer_norm_global<1>, a);
}

// ---- quantize: rows that no layer_norm quantized

struct quantize_args {
  const float *x;
  int64_t ldx;
  const int32_t *rows;
  int n, held;
  uint8_t *q;
  row_quant *rq;
  int kp;
};

// budget: registers 80, shared 0, spills 0
template <int count, bool full>
RS_KERNEL(row_threads, 3)
quantize_registers(quantize_args a) {
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  row_in_registers<count, full> row;
  row.make(a.n, [&](int j) { return load<4>(a.x + r * a.ldx + j); });
  quantize_held(row, a.n, a.q + r * a.kp, a.kp, a.rq + r);
}
// budget: registers 64, shared 0, spills 0
template <int N>
RS_KERNEL(row_threads, 4)
quantize_shared(quantize_args a) {
  const int64_t r = static_cast<int64_t>(block_x()) * a.held + warp_of();
  if (r >= *a.rows) return;
  const int bytes = (a.n * 4 + 15) / 16 * 16;
  row_in_memory<shared<piece<float, N>>, N> row = {block_memory<piece<float, N>>(warp_of() * bytes)};
  row.make(a.n, [&](int j) { return load<N>(a.x + r * a.ldx + j); });
  quantize_held(row, a.n, a.q + r * a.kp, a.kp, a.rq + r);
}
template <int N>
RS_KERNEL(row_threads, 4)
quantize_global(quantize_args a) {
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  const row_in_memory<const piece<float, N> *, N> row = {reinterpret_cast<const piece<float, N> *>(a.x + r * a.ldx)};
  quantize_held(row, a.n, a.q + r * a.kp, a.kp, a.rq + r);
}

cudaError_t quantize_rows(const op_call &c, const device_value &x, uint8_t *q, row_quant *rq, int64_t kp) {
  const bool fours = by_fours(x.cols, {&x});
  const row_plan plan = plan_row(x.cols, fours);
  const quantize_args a = {x.f32(), x.stride, x.rows, static_cast<int>(x.cols), plan.held, q, rq, static_cast<int>(kp)};
  if (x.capacity <= 0) return cudaSuccess;
  switch (plan.pieces) { RS_HELD_IN_REGISTERS(quantize_registers, x.capacity) }
  if (plan.held)
    return launch(c.stream, dim3(blocks_of(x.capacity, plan.held)), plan.held * warp_size, plan.bytes,
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
      for_column(x, a.ldx, n, [&](int64_t, float v) { y = v > y ? v : y; });
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

// budget: registers 64, shared 0, spills 0
RS_KERNEL(row_threads, 4) token_drop_kernel(drop_args a) {
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
    float score = a.score[(begin + i) * a.lds];
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
  const int64_t r = row_of();
  if (r >= *a.rows) return;
  copy_row<N>(a.x + a.kept[r].before * a.ldx, a.y + r * a.ldy, a.n);
}

template <int N>
RS_KERNEL(row_threads, 4)
token_restore_kernel(copy_args a) {
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

template <int N>
RS_KERNEL(row_threads, 2)
token_assign_kernel(assign_args a) {
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
    for (int i = 0; i < 4; i++) best[i] = {-bits_to_float(0x7f800000u), INT32_MAX};
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
      // As on the CPU, which takes the first key whatever it is like: if that is NaN, nothing is above it.
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
          const int at = key + tx + 16 * j;
          float like = sum[i][j];
          if (at == begin && like != like) like = bits_to_float(0x7f800000u);
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
      if (tx == 0 && place[row]) a.out[(first + row) * a.ldo] = best[i].at;
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
      const double z = m.of(a.score[i * a.ldscore]);
      weight *= static_cast<float>(exp(a.lowest ? -z : z));
    }
    a.weights[i] = weight;
  }
}

template <int N>
RS_KERNEL(row_threads, 2)
token_merge_kernel(merge_args a) {
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

namespace {}  // namespace
