// Attention of the CUDA backend, on the host shim: against f64, with errors held to those of a plain f16 computation; what it must
// not touch or let in; and that the bits of a sequence depend on nothing beside it.
#define RS_CUDA_HOST
#include "../rs-cuda.cu"

#include "cuda_harness.h"

#include <functional>
#include <numeric>
#include <set>

namespace {

using vec = std::vector<float>;
using ints = std::vector<int32_t>;

constexpr float sentinel = -12345.5f;

float round_f16(float x) { return f16_to_float(static_cast<uint16_t>(pack_f16(x, 0))); }

// A batch: q, k and v are columns of one [T, stride], as the linear layer before them leaves them.
struct batch {
  ints lengths;
  int heads, d;
  float scale;
  bool causal = false, half = false, first_only = false;
  int window = 0;
  int64_t spare = 0;    // capacity beyond the rows
  int64_t padding = 0;  // columns of the storage and of the result that are not attention's
  vec x, sizes;         // sizes: empty where there are none
  ints cu = {0};

  batch(ints lengths_, int heads_, int d_, unsigned seed = 1, float spread = 1)
      : lengths(std::move(lengths_)), heads(heads_), d(d_) {
    scale = 1 / std::sqrt(static_cast<float>(d));
    for (int32_t n : lengths) cu.push_back(cu.back() + n);
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, spread);
    x.resize(static_cast<size_t>(rows() * 3 * cols()));
    for (float &v : x) v = normal(random);
  }
  void add_sizes(unsigned seed) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < rows(); i++) sizes.push_back(static_cast<float>(1 + random() % 5));
  }
  int64_t rows() const { return cu.back(); }
  int64_t cols() const { return static_cast<int64_t>(heads) * d; }
  int64_t sequences() const { return static_cast<int64_t>(lengths.size()); }
  int64_t capacity() const { return rows() + spare; }
  float &at(int which, int64_t row, int64_t head, int64_t i) {
    return x[static_cast<size_t>(row * 3 * cols() + which * cols() + head * d + i)];
  }
  float at(int which, int64_t row, int64_t head, int64_t i) const { return const_cast<batch *>(this)->at(which, row, head, i); }
  batch only(int64_t b) const {
    batch one({lengths[static_cast<size_t>(b)]}, heads, d);
    one.scale = scale, one.causal = causal, one.half = half, one.first_only = first_only, one.window = window;
    const auto begin = cu[static_cast<size_t>(b)], end = cu[static_cast<size_t>(b) + 1];
    one.x.assign(x.begin() + begin * 3 * cols(), x.begin() + end * 3 * cols());
    if (!sizes.empty()) one.sizes.assign(sizes.begin() + begin, sizes.begin() + end);
    return one;
  }
};

// What an operator is called with.  Rows beyond those of the run hold NaN, which nothing may let into a result.
struct call_of {
  const batch &b;
  device_buffer<float> x, sizes, out, query;
  device_buffer<uint16_t> halves;
  device_buffer<int32_t> cu, counts;
  device_buffer<attn_tile> tiles;
  std::unique_ptr<device_buffer<unsigned char>> scratch;
  backend_op op = {};
  op_call c = {};
  int64_t out_rows, out_cols;

  call_of(const batch &b_, op_code code, int64_t out_rows_, int64_t out_cols_)
      : b(b_),
        x(static_cast<size_t>(b.capacity() * stride())),
        sizes(static_cast<size_t>(2 * b.capacity())),
        out(static_cast<size_t>(out_rows_ * (out_cols_ + b.padding))),
        query(static_cast<size_t>(b.cols())),
        halves(static_cast<size_t>(b.capacity() * stride())),
        cu(b.cu),
        counts(3),
        tiles(static_cast<size_t>(b.capacity() / attn_tile_rows + b.sequences() + 3)),
        out_rows(out_rows_),
        out_cols(out_cols_) {
    std::fill(out.begin(), out.end(), sentinel);
    for (int64_t i = 0; i < b.rows(); i++)
      for (int64_t j = 0; j < 3 * b.cols(); j++) {
        const float v = b.x[static_cast<size_t>(i * 3 * b.cols() + j)];
        x[static_cast<size_t>(i * stride() + j)] = v;
        halves[static_cast<size_t>(i * stride() + j)] = static_cast<uint16_t>(pack_f16(v, 0));
      }
    for (size_t i = 0; i < b.sizes.size(); i++) sizes[2 * i] = b.sizes[i];
    counts[0] = static_cast<int32_t>(b.rows()), counts[1] = static_cast<int32_t>(b.sequences()), counts[2] = 0;
    for (int32_t s = 0; s < b.sequences(); s++)
      for (int32_t i = 0; i < b.lengths[static_cast<size_t>(s)]; i += attn_tile_rows)
        tiles[static_cast<size_t>(counts[2]++)] = {s, i};

    op.op = code;
    op.params.heads = b.heads, op.params.scale = b.scale, op.params.causal = b.causal, op.params.first_only = b.first_only;
    op.params.window = b.window;
    c.op = &op;
    c.sequences = counts.data() + 1, c.sequence_capacity = b.sequences() + 2;
    c.tiles = tiles.data(), c.n_tiles = counts.data() + 2, c.tile_capacity = static_cast<int64_t>(tiles.size());
    c.out = {out.data(), counts.data(), out_rows, out_cols, out_cols + b.padding, false};
  }
  int64_t stride() const { return 3 * b.cols() + b.padding; }
  void set_input(int i, const device_value &v, backend_rows rows_are) {
    c.in[i] = v;
    op.in[i] = {};
    op.in[i].place = v.data ? backend_place::result : backend_place::absent;
    op.in[i].rows_are = rows_are;
    op.in[i].type = v.half ? RS_F16 : RS_F32;
    op.in[i].rows = v.capacity, op.in[i].cols = v.cols, op.in[i].stride = v.stride;
  }
  void set_columns(int i, int which) {
    const int64_t first = which * b.cols();
    void *data = b.half ? static_cast<void *>(halves.data() + first) : x.data() + first;
    set_input(i, {data, counts.data(), b.capacity(), b.cols(), stride(), b.half}, backend_rows::tokens);
  }
  void set_starts(int i) { set_input(i, {cu.data(), nullptr, b.sequences() + 3, 1, 1, false}, backend_rows::starts); }
  void set_sizes(int i) {
    set_input(i, {b.sizes.empty() ? nullptr : sizes.data(), counts.data(), b.capacity(), 1, 2, false}, backend_rows::tokens);
  }
  // Runs it, and looks at what it may not write.  -> [rows, out_cols]
  template <class F>
  vec run(size_t work, int64_t rows, const F &f) {
    scratch = std::make_unique<device_buffer<unsigned char>>(work);
    c.scratch = work ? scratch->data() : nullptr;
    const cudaError_t status = f(c);
    expect_no_fault(status);
    vec y;
    for (int64_t i = 0; i < out_rows; i++)
      for (int64_t j = 0; j < out_cols + b.padding; j++) {
        const float v = out[static_cast<size_t>(i * (out_cols + b.padding) + j)];
        if (i < rows && j < out_cols) y.push_back(v);
        else if (v != sentinel) {
          ADD_FAILURE() << "wrote row " << i << " column " << j;
          return y;
        }
      }
    return y;
  }
};

vec flash(const batch &b) {
  call_of call(b, OP_FLASH_ATTN, b.capacity(), b.cols());
  for (int i = 0; i < 3; i++) call.set_columns(i, i);
  call.set_starts(3);
  call.set_sizes(4);
  const size_t work = flash_attn_work(call.op);
  EXPECT_EQ(work == 0, b.half || !b.capacity());
  return call.run(work, b.rows(), flash_attn_cuda);
}

// Softmax weights of one query.  T double: as it is; float: q and k rounded to f16.
template <class T>
std::vector<T> weights_of(const batch &b, int64_t s, int64_t head, int64_t query) {
  const auto begin = b.cu[static_cast<size_t>(s)], n = b.lengths[static_cast<size_t>(s)];
  const auto round = [](float v) { return std::is_same_v<T, float> ? T(round_f16(v)) : T(v); };
  std::vector<T> w(static_cast<size_t>(n));
  T most = -INFINITY, total = 0;
  for (int64_t j = 0; j < n; j++) {
    T &x = w[static_cast<size_t>(j)];
    for (int i = 0; i < b.d; i++) x += round(b.at(0, begin + query, head, i)) * round(b.at(1, begin + j, head, i));
    x *= T(b.scale);
    if (!b.sizes.empty()) x += std::log(T(b.sizes[static_cast<size_t>(begin + j)]));
    if ((b.causal && j > query) || (b.window && std::abs(j - query) > b.window)) x = -INFINITY;
    most = std::max(most, x);
  }
  for (T &x : w) total += x = std::exp(x - most);
  for (T &x : w) x /= total;
  return w;
}

template <class T>
std::vector<double> plain(const batch &b) {
  std::vector<double> y(static_cast<size_t>(b.rows() * b.cols()));
  for (int64_t s = 0; s < b.sequences(); s++)
    for (int64_t head = 0; head < b.heads; head++)
      for (int64_t query = 0; query < b.lengths[static_cast<size_t>(s)]; query++) {
        const std::vector<T> w = weights_of<T>(b, s, head, query);
        const int64_t begin = b.cu[static_cast<size_t>(s)];
        std::vector<T> sum(static_cast<size_t>(b.d));
        for (size_t j = 0; j < w.size(); j++)
          for (int i = 0; i < b.d; i++) {
            const float v = b.at(2, begin + static_cast<int64_t>(j), head, i);
            if constexpr (std::is_same_v<T, float>) sum[static_cast<size_t>(i)] += round_f16(w[j]) * round_f16(v);
            else sum[static_cast<size_t>(i)] += w[j] * double(v);
          }
        for (int i = 0; i < b.d; i++)
          y[static_cast<size_t>((begin + query) * b.cols() + head * b.d + i)] = static_cast<double>(sum[static_cast<size_t>(i)]);
      }
  return y;
}

struct errors {
  double most = 0, square = 0;
};
template <class A>
errors errors_of(const A &y, const std::vector<double> &expected) {
  errors e;
  for (size_t i = 0; i < expected.size(); i++) {
    const double x = std::fabs(static_cast<double>(y[i]) - expected[i]);
    e.most = x <= e.most ? e.most : x;  // NaN shows
    e.square += x * x / static_cast<double>(expected.size());
  }
  return e;
}

constexpr double most_of_plain_f16 = 2;  // times its error
// Where the plain computation has next to no error, as where there is one key: the rounding of f32.
constexpr double f32_rounding = 1e-6;

void expect_near_f64(const batch &b, const vec &y) {
  ASSERT_EQ(y.size(), static_cast<size_t>(b.rows() * b.cols()));
  const std::vector<double> exact = plain<double>(b);
  const errors e = errors_of(y, exact), f16 = errors_of(plain<float>(b), exact);
  EXPECT_LE(e.most, most_of_plain_f16 * f16.most + f32_rounding);
  EXPECT_LE(std::sqrt(e.square), most_of_plain_f16 * std::sqrt(f16.square) + f32_rounding);
}

// Where the 16 bytes are that lanes read together, or copies write together: all 32 banks, once each.
template <int D>
void expect_no_bank_conflicts() {
  SCOPED_TRACE(D);
  std::set<int> all;
  for (int row = 0; row < 64; row += 8)
    for (int chunk = 0; chunk < D / 8; chunk++) {
      std::set<int> banks;
      for (int i = 0; i < 8; i++) {
        const int at = row_chunks<D>(row + i, chunk % 2)[chunk / 2];
        EXPECT_EQ(at % 8, 0);
        EXPECT_EQ(at / D, row + i);
        banks.insert(at / 8 % 8);
        all.insert(at);
      }
      EXPECT_EQ(banks.size(), 8u) << "row " << row << " chunk " << chunk;
    }
  EXPECT_EQ(all.size(), static_cast<size_t>(64 * D / 8));
  for (int i = 0; i < 64 * D / 8; i += 8) {
    std::set<int> banks;
    for (int j = i; j < i + 8; j++) banks.insert(row_chunks<D>(j / (D / 8), j % (D / 8) % 2)[j % (D / 8) / 2] / 8 % 8);
    EXPECT_EQ(banks.size(), 8u) << "copy " << i;
  }
}

TEST(cuda_attention, tiles_have_no_bank_conflicts) {
  expect_no_bank_conflicts<16>();
  expect_no_bank_conflicts<32>();
  expect_no_bank_conflicts<64>();
  expect_no_bank_conflicts<80>();
  expect_no_bank_conflicts<96>();
  expect_no_bank_conflicts<128>();
}

const ints edge_lengths = {1, 63, 0, 64, 65, 127, 128, 129};

TEST(cuda_flash_attn, head_dims) {
  for (const int d : {8, 16, 20, 24, 32, 33, 48, 64, 72, 80, 96, 128}) {
    SCOPED_TRACE(d);
    batch b({1, 70, 0, 33}, d % 3 ? 1 : 3, d, static_cast<unsigned>(d));
    b.spare = 5;
    expect_near_f64(b, flash(b));
    b.causal = true;
    expect_near_f64(b, flash(b));
  }
}

TEST(cuda_flash_attn, lengths_at_tile_edges) {
  for (const int d : {32, 96}) {
    SCOPED_TRACE(d);
    batch b(edge_lengths, 1, d);
    expect_near_f64(b, flash(b));
    b.causal = true;
    expect_near_f64(b, flash(b));
    b.causal = false;
    b.add_sizes(3);
    expect_near_f64(b, flash(b));
  }
}

TEST(cuda_flash_attn, ragged_batch) {
  batch b({1, 600, 17, 0, 0, 250, 5, 333}, 1, 32, 7);
  b.spare = 300, b.padding = 6;
  expect_near_f64(b, flash(b));
}

TEST(cuda_flash_attn, three_heads_of_64) {
  batch b({200, 3, 90}, 3, 64, 8);
  b.padding = 8;
  expect_near_f64(b, flash(b));
}

TEST(cuda_flash_attn, nothing_at_all) {
  EXPECT_TRUE(flash(batch({}, 2, 16)).empty());
  EXPECT_TRUE(flash(batch({0, 0}, 2, 16)).empty());
}

TEST(cuda_flash_attn, windows) {
  for (const int d : {16, 80})
    for (const int window : {1, 14, 15, 16, 20, 46, 62, 63, 64, 65, 100, 1000, INT_MAX}) {
      SCOPED_TRACE(window);
      batch b({150, 1, 65}, 1, d, 9);
      b.window = window;
      expect_near_f64(b, flash(b));
      b.causal = true;
      b.add_sizes(4);
      expect_near_f64(b, flash(b));
    }
}

TEST(cuda_flash_attn, wide_window_changes_no_bit) {
  batch b({150, 20}, 1, 32, 10), w = b;
  w.window = 150;
  EXPECT_EQ(flash(b), flash(w));
}

TEST(cuda_flash_attn, sizes_of_one_are_no_sizes) {
  for (const bool causal : {false, true})
    for (const float scale : {0.2f, 40.0f}) {
      batch b({150, 64, 7}, 2, 24, 11), ones = b;
      b.scale = ones.scale = scale, b.causal = ones.causal = causal;
      ones.sizes.assign(static_cast<size_t>(b.rows()), 1.0f);
      EXPECT_EQ(flash(b), flash(ones));
    }
}

TEST(cuda_flash_attn, any_scale) {
  for (const float scale : {-0.3f, 0.0f, 3.0f}) {
    SCOPED_TRACE(scale);
    batch b({100, 7}, 1, 32, 12);
    b.scale = scale;
    b.causal = true;
    expect_near_f64(b, flash(b));
  }
}

TEST(cuda_flash_attn, halves_are_read_in_place) {
  for (const int d : {8, 32, 72}) {
    batch b({100, 1, 30}, 2, d, 13);
    b.padding = 8, b.spare = 3;
    for (float &v : b.x) v = round_f16(v);
    const vec y = flash(b);
    b.half = true;
    EXPECT_EQ(y, flash(b));
  }
}

// With a result of f16, which only what is quantized reads.  -> what lies in its memory, beside the columns too
std::vector<uint16_t> flash_to_halves(const batch &b) {
  call_of call(b, OP_FLASH_ATTN, b.capacity(), b.cols());
  for (int i = 0; i < 3; i++) call.set_columns(i, i);
  call.set_starts(3);
  call.set_sizes(4);
  device_buffer<uint16_t> halves(static_cast<size_t>(b.capacity() * (b.cols() + b.padding)));
  std::fill(halves.begin(), halves.end(), uint16_t{0xdead});
  call.c.out.data = halves.data(), call.c.out.half = true;
  call.run(flash_attn_work(call.op), 0, flash_attn_cuda);  // no floats
  return {halves.begin(), halves.end()};
}

TEST(cuda_flash_attn, a_result_of_halves_is_that_of_floats_rounded) {
  for (const int d : {32, 7, 80})
    for (const int padding : {0, 2, 3}) {
      SCOPED_TRACE(std::to_string(d) + " and " + std::to_string(padding));
      batch b({100, 1, 30}, 2, d, 18);
      b.padding = padding, b.spare = 3;
      const vec y = flash(b);
      const std::vector<uint16_t> halves = flash_to_halves(b);
      const int64_t stride = b.cols() + padding;
      for (int64_t i = 0; i < b.capacity(); i++)
        for (int64_t j = 0; j < stride; j++) {
          const bool there = i < b.rows() && j < b.cols();
          const auto wanted =
              there ? static_cast<uint16_t>(pack_f16(y[static_cast<size_t>(i * b.cols() + j)], 0)) : uint16_t{0xdead};
          ASSERT_EQ(halves[static_cast<size_t>(i * stride + j)], wanted) << i << "," << j;
        }
    }
}

// Weights are rounded for the product, their sum is not: an average of the largest f16 may be a little more.  Here all weights but
// one are a little above the middle of two f16.
TEST(cuda_flash_attn, halves_stay_finite) {
  batch b({90}, 1, 16, 19);
  b.scale = static_cast<float>(-std::log(0.50027));
  for (int64_t i = 0; i < b.rows(); i++)
    for (int64_t j = 0; j < 16; j++)
      b.at(0, i, 0, j) = j == 0, b.at(1, i, 0, j) = i > 0 && j == 0 ? -1 : 0, b.at(2, i, 0, j) = 1e6f;
  size_t beyond = 0;
  for (const float v : flash(b)) beyond += v >= 65520;  // what rounds to infinity
  EXPECT_GT(beyond, 0u);
  for (const uint16_t v : flash_to_halves(b)) ASSERT_EQ(v, 0x7bff);
}

TEST(cuda_flash_attn, halves_that_no_copy_can_read_are_refused) {
  batch b({4}, 1, 20);
  b.half = true;
  call_of call(b, OP_FLASH_ATTN, b.capacity(), b.cols());
  for (int i = 0; i < 3; i++) call.set_columns(i, i);
  call.set_starts(3);
  EXPECT_EQ(flash_attn_cuda(call.c), cudaErrorInvalidValue);
  batch large({4}, 1, 136);
  call_of other(large, OP_FLASH_ATTN, large.capacity(), large.cols());
  for (int i = 0; i < 3; i++) other.set_columns(i, i);
  other.set_starts(3);
  EXPECT_EQ(flash_attn_cuda(other.c), cudaErrorNotSupported);
}

// Beyond what f16 holds, and scores of 10^10: the largest key has all the weight.
TEST(cuda_flash_attn, large_numbers) {
  batch b({80}, 1, 16, 14, 1e4f);
  expect_near_f64(b, flash(b));
  batch beyond({90, 30}, 1, 16, 15, 1e6f);
  for (const float v : flash(beyond)) ASSERT_LE(std::fabs(v), 65504);
  batch infinite({90}, 1, 16, 16);
  infinite.at(0, 3, 0, 2) = INFINITY, infinite.at(1, 70, 0, 5) = -INFINITY, infinite.at(2, 20, 0, 1) = INFINITY;
  for (const float v : flash(infinite)) ASSERT_LE(std::fabs(v), 65504);
}

TEST(cuda_flash_attn, nan_stays_in_its_sequence) {
  for (int which = 0; which < 3; which++)
    for (const bool sized : {false, true}) {
      batch b({70, 130, 20}, 2, 32, 17);
      if (sized) b.add_sizes(5);
      const vec before = flash(b);
      b.at(which, 70 + 100, 1, 3) = NAN;
      const vec y = flash(b);
      size_t wrong = 0, nan = 0;
      for (int64_t i = 0; i < b.rows(); i++)
        for (int64_t j = 0; j < b.cols(); j++) {
          const auto at = static_cast<size_t>(i * b.cols() + j);
          const bool hit = i >= 70 && i < 200 && j >= 32 && (which != 0 || i == 170) && (which != 2 || j == 35);
          nan += std::isnan(y[at]);
          wrong += hit ? !std::isnan(y[at]) : y[at] != before[at];
        }
      EXPECT_EQ(wrong, 0u) << which;
      EXPECT_GT(nan, 0u);
    }
}

void expect_batch_is_singles(const batch &b, const std::function<vec(const batch &)> &f, int64_t cols) {
  const vec y = f(b);
  for (int64_t s = 0; s < b.sequences(); s++) {
    const auto begin = y.begin() + b.cu[static_cast<size_t>(s)] * cols;
    const vec part(begin, begin + b.lengths[static_cast<size_t>(s)] * cols);
    EXPECT_EQ(part, f(b.only(s))) << "sequence " << s;
  }
}

TEST(cuda_flash_attn, sequence_does_not_depend_on_its_batch) {
  for (const bool causal : {false, true}) {
    batch b({5, 130, 0, 64, 77}, 2, 20, 18);
    b.causal = causal, b.spare = 100, b.padding = 2;
    if (causal) b.add_sizes(6);
    expect_batch_is_singles(b, flash, b.cols());
  }
}

// Runs f with several orders of threads and blocks.
void expect_same_for_seeds(const std::function<vec()> &f) {
  const vec y = f();
  for_seeds(3, [&] { EXPECT_EQ(y, f()); });
}

TEST(cuda_flash_attn, order_of_threads_changes_no_bit) {
  for (const int d : {33, 128}) {
    batch b({90, 1, 150}, 1, d, 19);
    b.add_sizes(7);
    expect_same_for_seeds([&] { return flash(b); });
  }
}

// ---- attn_colsum

vec colsum(const batch &b) {
  call_of call(b, OP_ATTN_COLSUM, b.capacity(), 1);
  for (int i = 0; i < 2; i++) call.set_columns(i, i);
  call.set_starts(2);
  call.set_sizes(3);
  return call.run(attn_colsum_work(call.op), b.rows(), attn_colsum_cuda);
}

template <class T>
std::vector<double> plain_colsum(const batch &b) {
  std::vector<double> y(static_cast<size_t>(b.rows()));
  for (int64_t s = 0; s < b.sequences(); s++) {
    const int64_t queries = b.first_only ? 1 : b.lengths[static_cast<size_t>(s)];
    if (!b.lengths[static_cast<size_t>(s)]) continue;
    for (int64_t head = 0; head < b.heads; head++)
      for (int64_t query = 0; query < queries; query++) {
        const std::vector<T> w = weights_of<T>(b, s, head, query);
        for (size_t j = 0; j < w.size(); j++)
          y[static_cast<size_t>(b.cu[static_cast<size_t>(s)]) + j] +=
              static_cast<double>(w[j]) / static_cast<double>(queries * b.heads);
      }
  }
  return y;
}

void expect_colsum(const batch &b) {
  const vec y = colsum(b);
  const std::vector<double> exact = plain_colsum<double>(b);
  const errors e = errors_of(y, exact), f16 = errors_of(plain_colsum<float>(b), exact);
  // Of one query, nothing is rounded to f16 but what is given so.
  EXPECT_LE(e.most, (b.first_only && !b.half ? 0 : most_of_plain_f16 * f16.most) + f32_rounding);
  for (int64_t s = 0; s < b.sequences(); s++) {
    const auto begin = y.begin() + b.cu[static_cast<size_t>(s)];
    const int32_t n = b.lengths[static_cast<size_t>(s)];
    if (n == 0) continue;
    EXPECT_NEAR(std::accumulate(begin, begin + n, 0.0), 1, 1e-5) << "sequence " << s;
  }
}

TEST(cuda_attn_colsum, near_f64) {
  for (const bool first_only : {false, true})
    for (const int d : {8, 16, 20, 24, 32, 33, 48, 64, 72, 80, 96, 128}) {
      SCOPED_TRACE(d);
      batch b({1, 70, 0, 33}, d == 24 ? 3 : 1, d, static_cast<unsigned>(d));
      b.first_only = first_only, b.spare = 5, b.padding = 3;
      expect_colsum(b);
      b.add_sizes(8);
      expect_colsum(b);
    }
}

TEST(cuda_attn_colsum, lengths_at_tile_edges) {
  for (const bool first_only : {false, true}) {
    batch b(edge_lengths, 2, 32, 21);
    b.first_only = first_only;
    expect_colsum(b);
    batch c({600, 2, 250}, 1, 16, 22);
    c.first_only = first_only;
    expect_colsum(c);
  }
}

TEST(cuda_attn_colsum, windows) {
  for (const bool first_only : {false, true})
    for (const int window : {1, 15, 16, 48, 63, 64, 65, 100, INT_MAX}) {
      SCOPED_TRACE(window);
      batch b({150, 1, 65, 0, 200}, 1, 16, 31);
      b.window = window, b.first_only = first_only;
      if (window % 2) b.add_sizes(4);
      expect_colsum(b);
    }
}

TEST(cuda_attn_colsum, wide_window_changes_no_bit) {
  for (const bool first_only : {false, true}) {
    batch b({150, 20}, 1, 32, 30), w = b;
    b.first_only = w.first_only = first_only, w.window = 150;
    EXPECT_EQ(colsum(b), colsum(w));
  }
}

TEST(cuda_attn_colsum, any_scale) {
  for (const bool first_only : {false, true})
    for (const float scale : {-0.3f, 0.0f, 3.0f}) {
      batch b({100, 7}, 1, 32, 23);
      b.scale = scale, b.first_only = first_only;
      expect_colsum(b);
    }
}

TEST(cuda_attn_colsum, halves_are_read_in_place) {
  for (const bool first_only : {false, true}) {
    batch b({100, 1, 30}, 2, 24, 24);
    b.padding = 8, b.spare = 3, b.first_only = first_only;
    for (float &v : b.x) v = round_f16(v);
    const vec y = colsum(b);
    b.half = true;
    EXPECT_EQ(y, colsum(b));
  }
}

TEST(cuda_attn_colsum, large_scores_still_sum_to_one) {
  batch b({80, 66}, 1, 16, 25, 1e4f);
  expect_colsum(b);
}

TEST(cuda_attn_colsum, nothing_at_all) {
  EXPECT_TRUE(colsum(batch({}, 2, 16)).empty());
  EXPECT_TRUE(colsum(batch({0, 0}, 2, 16)).empty());
}

TEST(cuda_attn_colsum, sequence_does_not_depend_on_its_batch) {
  for (const bool first_only : {false, true}) {
    batch b({5, 130, 0, 64, 77}, 2, 20, 26);
    b.spare = 100, b.padding = 2, b.first_only = first_only;
    b.add_sizes(9);
    expect_batch_is_singles(b, colsum, 1);
  }
}

TEST(cuda_attn_colsum, sizes_of_one_are_no_sizes) {
  for (const bool first_only : {false, true}) {
    batch b({150, 64, 7}, 2, 24, 27), ones = b;
    b.first_only = ones.first_only = first_only;
    ones.sizes.assign(static_cast<size_t>(b.rows()), 1.0f);
    EXPECT_EQ(colsum(b), colsum(ones));
  }
}

TEST(cuda_attn_colsum, nan_stays_in_its_sequence) {
  for (const bool first_only : {false, true})
    for (int which = 0; which < 2; which++) {
      batch b({70, 130, 20}, 2, 32, 28);
      b.first_only = first_only;
      const vec before = colsum(b);
      b.at(which, first_only && which == 0 ? 70 : 70 + 100, 1, 3) = NAN;
      const vec y = colsum(b);
      for (size_t i = 0; i < y.size(); i++)
        if (i >= 70 && i < 200) ASSERT_TRUE(std::isnan(y[i])) << i;
        else ASSERT_EQ(y[i], before[i]) << i;
    }
}

TEST(cuda_attn_colsum, order_of_threads_changes_no_bit) {
  for (const bool first_only : {false, true}) {
    batch b({90, 1, 150}, 2, 33, 29);
    b.first_only = first_only;
    b.add_sizes(7);
    expect_same_for_seeds([&] { return colsum(b); });
  }
}

// ---- attn_pool

vec query_of(const batch &b) {
  vec query(static_cast<size_t>(b.cols()));
  for (size_t i = 0; i < query.size(); i++) query[i] = std::sin(static_cast<float>(3 * i + 1));
  return query;
}

vec attn_pool(const batch &b) {
  call_of call(b, OP_ATTN_POOL, b.sequences() + 2, b.cols());
  const vec query = query_of(b);
  std::copy(query.begin(), query.end(), call.query.begin());
  call.set_input(0, {call.query.data(), nullptr, b.cols(), 1, 1, false}, backend_rows::fixed);
  call.set_columns(1, 1);
  call.set_columns(2, 2);
  call.set_starts(3);
  call.set_sizes(4);
  call.c.out.rows = call.c.sequences;
  return call.run(attn_pool_work(call.op), b.sequences(), attn_pool_cuda);
}

void expect_attn_pool(const batch &b) {
  const vec query = query_of(b), y = attn_pool(b);
  ASSERT_EQ(y.size(), static_cast<size_t>(b.sequences() * b.cols()));
  for (int64_t s = 0; s < b.sequences(); s++)
    for (int64_t head = 0; head < b.heads; head++) {
      const auto begin = b.cu[static_cast<size_t>(s)], n = b.lengths[static_cast<size_t>(s)];
      std::vector<double> w(static_cast<size_t>(n)), sum(static_cast<size_t>(b.d));
      double most = -INFINITY, total = 0;
      for (int64_t j = 0; j < n; j++) {
        double &x = w[static_cast<size_t>(j)];
        for (int i = 0; i < b.d; i++)
          x += static_cast<double>(query[static_cast<size_t>(head * b.d + i)]) * static_cast<double>(b.at(1, begin + j, head, i));
        x *= static_cast<double>(b.scale);
        if (!b.sizes.empty()) x += std::log(static_cast<double>(b.sizes[static_cast<size_t>(begin + j)]));
        most = std::max(most, x);
      }
      for (int64_t j = 0; j < n; j++) {
        const double weight = std::exp(w[static_cast<size_t>(j)] - most);
        total += weight;
        for (int i = 0; i < b.d; i++) sum[static_cast<size_t>(i)] += weight * static_cast<double>(b.at(2, begin + j, head, i));
      }
      for (int i = 0; i < b.d; i++) {
        const float v = y[static_cast<size_t>(s * b.cols() + head * b.d + i)];
        ASSERT_NEAR(static_cast<double>(v), n ? sum[static_cast<size_t>(i)] / total : 0, 4 * f32_rounding) << s << " " << i;
      }
    }
}

TEST(cuda_attn_pool, near_f64) {
  for (const int d : {1, 8, 33, 64, 72, 128, 200}) {
    SCOPED_TRACE(d);
    batch b({1, 70, 0, 33, 300}, d < 70 ? 3 : 1, d, static_cast<unsigned>(d));
    b.spare = 5, b.padding = 3;
    expect_attn_pool(b);
    b.add_sizes(8);
    expect_attn_pool(b);
  }
}

TEST(cuda_attn_pool, sequence_does_not_depend_on_its_batch) {
  batch b({5, 130, 0, 64}, 2, 20, 31);
  b.add_sizes(9);
  const vec y = attn_pool(b);
  for (int64_t s = 0; s < b.sequences(); s++)
    EXPECT_EQ(vec(y.begin() + s * b.cols(), y.begin() + (s + 1) * b.cols()), attn_pool(b.only(s)));
}

TEST(cuda_attn_pool, nan_stays_in_its_sequence) {
  for (const int which : {1, 2}) {
    batch b({70, 130, 20}, 1, 32, 32);
    const vec before = attn_pool(b);
    b.at(which, 70 + 100, 0, 3) = NAN;
    const vec y = attn_pool(b);
    for (size_t i = 0; i < y.size(); i++)
      if (i >= 32 && i < 64 && (which == 1 || i == 35)) ASSERT_TRUE(std::isnan(y[i])) << i;
      else ASSERT_EQ(y[i], before[i]) << i;
  }
}

TEST(cuda_attn_pool, order_of_threads_changes_no_bit) {
  batch b({90, 1, 150}, 2, 33, 33);
  expect_same_for_seeds([&] { return attn_pool(b); });
}

}  // namespace
