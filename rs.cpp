// rs.cpp: the runtime.  rs.h is its manual; docs/design.md tells how the parts fit together.
//
// Contents
//    1  limits, target macros, CPU features
//    2  status, last error
//    3  checked arithmetic, CRC32C
//    4  threads
//    5  types and blocks: how each (type, layout) is stored; quantizers
//    6  reference kernels: scalar, always built, the oracle of the tests
//    7  ISA kernels: AVX2, AVX-VNNI, AVX512-VNNI, AVX512-BF16, AMX, NEON
//    8  kernel table
//    9  graph: tensors, builders
//   10  operators, one block each
//   11  graph: validate, plan, run, profile
//   12  backend hook: devices that run graphs instead of the CPU
//   13  weight file: reader
//   14  weight file: writer
//   15  model
//   16  session: texts and images to vectors
//   17  calibration: what the quantizers should know of the inputs

#ifdef RS_VECTOR_PART
// ================================================================================ the part of section 7 that every vector ISA
// shares
//
// Compiled once an ISA, inside of its namespace, by section 7, which says what vf, load, fma … are.  `lanes` floats at a time; the
// last few of a row take the same way as the others, so that a value does not depend on its place.

// Tiles of R rows by P panels of 16 channels; what is left over takes a tile of fewer rows or panels.  Each element
// is a chain over k in order, whatever the tile.
template <int R, int P, class Load>
RS_TARGET void float_rows(const float *a, size_t lda, int rows, Load load_b, Load next, size_t stride, size_t k, float *c,
                          size_t ldc, bool add) {
  constexpr int width = panel_n / lanes;
  for (int ahead = 0; rows >= R; rows -= R, a += R * lda, c += R * ldc) {
    vf acc[R][P * width];
    for (int r = 0; r < R; r++)
      for (int h = 0; h < P * width; h++) acc[r][h] = add ? load(c + r * ldc + h * lanes) : set1(0);
    // The first tiles fetch a panel each of the part that comes next.  Behind the last that does no harm.
    const auto *fetch = next.b + static_cast<size_t>(ahead) * stride;
    if (ahead < P - 1) ahead++;
    for (size_t i = 0; i < k; i++) {
      __builtin_prefetch(fetch + i * panel_n);
      vf b[P * width];
      for (int h = 0; h < P * width; h++) b[h] = load_b(h / width * stride + i * panel_n + h % width * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const vf x = set1(a[r * lda + i]);
        for (int h = 0; h < P * width; h++) acc[r][h] = fma(x, b[h], acc[r][h]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int h = 0; h < P * width; h++) store(c + r * ldc + h * lanes, acc[r][h]);
  }
  if constexpr (R > 1)
    if (rows) float_rows<R - 1, P>(a, lda, rows, load_b, next, stride, k, c, ldc, add);
}
// K goes by in parts, so that the panels' part stays in L1 while the rows go by.
template <int P, class Load>
RS_TARGET void float_panels(const float *a, size_t lda, int rows, Load load_b, size_t stride, int panels, size_t k, float *c,
                            size_t ldc, bool add) {
  constexpr size_t part = l1_steps / P;
  for (; panels >= P; panels -= P, load_b.b += P * stride, c += P * panel_n)
    for (size_t i = 0; i == 0 || i < k; i += part)
      float_rows<float_tile_rows, P>(a + i, lda, rows, Load{load_b.b + i * panel_n},
                                     Load{load_b.b + (i + part < k ? (i + part) * panel_n : P * stride)}, stride,
                                     std::min(part, k - i), c, ldc, add || i > 0);
  if constexpr (P > 1)
    if (panels) float_panels<P - 1>(a, lda, rows, load_b, stride, panels, k, c, ldc, add);
}

struct load_f32 {
  const float *b;
  RS_INLINE vf operator()(size_t i) const { return load(b + i); }
};
struct load_f16 {
  const uint16_t *b;
  RS_INLINE vf operator()(size_t i) const { return load_half(b + i); }
};
void f32_panels(const float *a, size_t lda, int rows, const float *b, size_t stride, int panels, size_t k, float *c, size_t ldc,
                bool add) {
  float_panels<float_tile_panels>(a, lda, rows, load_f32{b}, stride, panels, k, c, ldc, add);
}
void f16_panels(const float *a, size_t lda, int rows, const uint16_t *b, size_t stride, int panels, size_t k, float *c,
                size_t ldc) {
  float_panels<float_tile_panels>(a, lda, rows, load_f16{b}, stride, panels, k, c, ldc, false);
}

// Inputs of a linear layer, times `scale` where there is one.
RS_INLINE vf scaled(const float *x, const float *scale, size_t i) {
  return scale ? mul(load(x + i), load(scale + i)) : load(x + i);
}
// How a row is quantized, by its smallest and its largest value.
RS_TARGET row_quant row_range(const float *x, const float *scale, size_t k) {
  vf low[2] = {set1(-0.0f), set1(-0.0f)}, high[2] = {set1(0), set1(0)};
  size_t i = 0;
  for (; i + 2 * lanes <= k; i += 2 * lanes)
    for (int j = 0; j < 2; j++) widen(low[j], high[j], scaled(x, scale, i + j * lanes));
  for (; i + lanes <= k; i += lanes) widen(low[0], high[0], scaled(x, scale, i));
  widen(low[0], high[0], low[1]);
  widen(low[0], high[0], high[1]);
  bool nan = any_nan(low[0]) || any_nan(high[0]);
  float lo = -largest(sub(set1(0), low[0])), hi = largest(high[0]);
  if (i < k) nan |= range_rest(x, scale, i, k, &lo, &hi);
  return nan ? row_quant{NAN, 0} : quant_range(lo, hi);
}
RS_TARGET void quantize_row(const float *x, const float *scale, size_t k, size_t kp, row_quant rq, uint8_t *q) {
  if (std::isnan(rq.scale)) {
    memset(q, 0, kp);
    return;
  }
  const float inverse = 1 / rq.scale;  // so that no product is beyond 255
  constexpr size_t step = 4 * lanes;
  const auto quantize_step = [&](const float *x, const float *scale, uint8_t *q) __attribute__((always_inline)) RS_TARGET {
    vf v[4];
    for (int j = 0; j < 4; j++) v[j] = mul(scaled(x, scale, j * lanes), set1(inverse));
    store_u8(q, v, rq.zero);
  };
  size_t i = 0;
  for (; i + step <= k; i += step) quantize_step(x + i, scale ? scale + i : nullptr, q + i);
  if (i < k) {
    float rest[step] = {}, factors[step] = {};
    uint8_t bytes[step];
    memcpy(rest, x + i, (k - i) * sizeof *x);
    if (scale) memcpy(factors, scale + i, (k - i) * sizeof *x);
    quantize_step(rest, scale ? factors : nullptr, bytes);
    memcpy(q + i, bytes, k - i);
  }
  if (kp > k) memset(q + k, rq.zero, kp - k);
}
// Some rows at a time, so that nothing waits for what follows from one's range.
RS_TARGET void quantize(const float *x, size_t ldx, const float *scale, int64_t rows, size_t k, size_t kp, row_quant *rq,
                        uint8_t *q) {
  for (int64_t n; rows > 0; rows -= n, x += n * ldx, rq += n, q += n * kp) {
    n = std::min<int64_t>(rows, 4);
    for (int64_t r = 0; r < n; r++) rq[r] = row_range(x + r * ldx, scale, k);
    for (int64_t r = 0; r < n; r++) quantize_row(x + r * ldx, scale, k, kp, rq[r], q + r * kp);
  }
}

// Elementary functions.  The ULP stated are the largest found over the floats of all exponents, which tests/test_ulp.cpp holds them
// to; NaN stays NaN.  No step depends on the number of lanes, so that all vector rows give the same bits.

// e^x: x = n ln 2 + r, |r| <= ln 2 / 2, e^r by a minimax polynomial of degree 6 (relative error 3e-9).  1.3 ULP.  Below -87.33654
// the result is 0 (no denormals), above 88.72284 infinite.
RS_INLINE vf exp_rest(vf x, vf n) {       // e^r
  vf r = fnma(n, set1(0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = fnma(n, set1(-2.12194440e-4f), r);
  const vf square = mul(r, r), low = fma(set1(0.166665206f), r, set1(0.499999934f));
  const vf high = fma(set1(0.00138145985f), square, fma(set1(0.00836871696f), r, set1(0.0416683881f)));
  return fma(square, fma(high, square, low), add(r, set1(1)));
}
RS_INLINE vf exp(vf x) {
  x = min(set1(89), x);  // infinity too; this order of operands lets NaN through
  const vf n = round(mul(x, set1(1.44269504f)));
  return if_less(x, set1(-87.33654f), set1(0), scale2(exp_rest(x, n), n));
}
// The same for x <= 0, or above it by roundings, in fewer operations.
RS_INLINE vf exp_negative(vf x) {
  const vf rounding = set1(whole_numbers);
  const vf t = fma(x, set1(1.44269504f), rounding), n = sub(t, rounding);
  return if_less(x, set1(-87.33654f), set1(0), times_pow2(exp_rest(x, n), n, t));
}

// The normal distribution function less 1/2, half of erf(x / sqrt 2): x P(x^2) / Q(x^2), both of degree 5, minimax on [0, sqrt 32]
// (relative error 2.5e-8), 1/2 exactly from 5.6 on.
RS_INLINE vf normal(vf x) {
  x = min(set1(5.6f), max(set1(-5.6f), x));  // this order of operands lets NaN through
  const vf t = mul(x, x);
  vf p = set1(normal_p[5]), q = add(t, set1(normal_q[4]));
  for (int i = 4; i > 0; i--) p = fma(p, t, set1(normal_p[i])), q = fma(q, t, set1(normal_q[i - 1]));
  return div(mul(x, fma(p, t, set1(normal_p[0]))), q);
}

// tanh(x) = 1 - 2 / (e^2x + 1); near 0, where that cancels, x - x^3/3 + 2 x^5/15 - 17 x^7/315.  7.3 ULP for x >= 0, 10.2 for x < 0,
// both just beyond |x| = 0.2, where the first formula takes over.
RS_INLINE vf tanh(vf x) {
  const vf one = set1(1), t = mul(x, x);
  const vf far = sub(one, div(set1(2), add(exp(add(x, x)), one)));
  vf p = fma(t, set1(-17.0f / 315), set1(2.0f / 15));
  p = fma(p, t, set1(-1.0f / 3));
  return if_less(t, set1(0.04f), fma(mul(x, t), p, x), far);
}

// x / (1 + e^(-slope x)): 2 ULP for x >= 0.  For x < 0, 3 ULP with slope 1 (silu); with 1.702 (quick_gelu) the rounding of the
// product is as large as e^x makes it, 82 ULP near -50, where the result is 1e-35.  Zero where e^(-slope x) overflows: 2.7e-37 may
// be lost.
RS_INLINE vf sigmoid_times(vf x, float slope) { return div(x, add(set1(1), exp(mul(x, set1(-slope))))); }

// gelu: 2.3 ULP for x >= 0, 4 ULP of x / 2 for x < 0, where x / 2 and x / 2 erf(..) cancel.  gelu by tanh: 2.1, and 3.3 of x / 2.
RS_INLINE vf activate_one(rs_activation act, vf x) {
  const vf half = mul(set1(0.5f), x);
  switch (act) {
    case RS_ACT_GELU:
      return mul(x, add(set1(0.5f), normal(x)));
    case RS_ACT_GELU_TANH: {
      const vf cube = mul(mul(x, x), x), inner = mul(set1(0.79788456f), fma(set1(0.044715f), cube, x));
      return fma(half, tanh(inner), half);
    }
    case RS_ACT_RELU:
      return max(set1(0), x);
    case RS_ACT_SILU:
      return sigmoid_times(x, 1);
    case RS_ACT_TANH:
      return tanh(x);
    case RS_ACT_QUICK_GELU:
      return sigmoid_times(x, 1.702f);
    case RS_ACT_NONE:
      break;
  }
  return x;
}

// Of P panels, whose sums lie `stride` apart, side by side: what belongs to a row is loaded once.
template <rs_activation act, int P>
RS_TARGET void finish_as(std::integral_constant<int, P>, const int32_t *acc, size_t stride, int rows, const linear_result &to) {
  constexpr int width = panel_n / lanes;
  const row_quant *rq = to.rq;
  float *y = to.y;
  vf scale[P * width], bias[P * width];
  for (int h = 0; h < P * width; h++) {
    scale[h] = load(to.scale + h * lanes);
    bias[h] = to.bias ? load(to.bias + h * lanes) : set1(0);
  }
  for (int r = 0; r < rows; r++, acc += panel_n, y += to.ldy)
#pragma GCC unroll 6
    for (int h = 0; h < P * width; h++) {
      // Multiply, then add: a fused operation would round otherwise than the scalar row.
      const int32_t *sum = acc + static_cast<size_t>(h / width) * stride + h % width * lanes;
      vf v = mul(centred(sum, rq[r].zero, to.colsum + h * lanes), mul(set1(rq[r].scale), scale[h]));
      if (to.bias) v = add(v, bias[h]);
      store(y + h * lanes, act == RS_ACT_GELU ? RS_NOISY_GELU(v) : activate_one(act, v));
    }
}

template <rs_activation act>
RS_TARGET void finish_f32_as(const float *bias, int rows, float *y, size_t ldy) {
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < panel_n; j += lanes) {
      const vf v = load(y + r * ldy + j);
      store(y + r * ldy + j, activate_one(act, bias ? add(v, load(bias + j)) : v));
    }
}

// The activation is chosen once a panel.
void finish(const int32_t *acc, int rows, const linear_result &to) {
  const std::integral_constant<int, 1> one;
  RS_FOR_ACTIVATION(to.act, finish_as, one, acc, 0, rows, to)
}
// Side by side where that is faster, and common.
template <int P>
void finish_panels(const int32_t *acc, size_t stride, int rows, const linear_result &to) {
  if (P == 3 && to.act == RS_ACT_GELU) return finish_as<RS_ACT_GELU>(std::integral_constant<int, P>(), acc, stride, rows, to);
  for (int p = 0; p < P; p++) finish(acc + static_cast<size_t>(p) * stride, rows, to.from(0, p));
}
void finish_f32(const float *bias, int rows, rs_activation act, float *y, size_t ldy) {
  RS_FOR_ACTIVATION(act, finish_f32_as, bias, rows, y, ldy)
}

// Sums over a row in four chains, so that none waits for the addition before: f(i, chain) for every register of it.  Returns where
// what fills no register begins.
template <class F>
RS_INLINE size_t in_chains(size_t n, F f) {
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
    for (size_t j = 0; j < 4; j++) f(i + j * lanes, j);
  for (; i + lanes <= n; i += lanes) f(i, 0);
  return i;
}
RS_INLINE float sum_chains(const vf *x) { return sum(add(add(x[0], x[1]), add(x[2], x[3]))); }

RS_TARGET
void layer_norm(const float *x, const float *residual, const float *gamma, const float *beta, float eps, size_t n, float *y) {
  vf total[4] = {set1(0), set1(0), set1(0), set1(0)}, squares[4] = {set1(0), set1(0), set1(0), set1(0)};
  size_t i = in_chains(
      n, [&](size_t at, size_t chain) __attribute__((always_inline)) RS_TARGET {
        const vf v = residual ? add(load(x + at), load(residual + at)) : load(x + at);
        store(y + at, v);
        total[chain] = add(total[chain], v);
      });
  const float mean = (sum_chains(total) + (i < n ? norm_rest_sum(x, residual, i, n, y) : 0)) / static_cast<float>(n);
  const vf m = set1(mean);
  i = in_chains(
      n, [&](size_t at, size_t chain) __attribute__((always_inline)) RS_TARGET {
        const vf v = sub(load(y + at), m);
        squares[chain] = fma(v, v, squares[chain]);
      });
  const float factor =
      1 / std::sqrt((sum_chains(squares) + (i < n ? norm_rest_squares(y, mean, i, n) : 0)) / static_cast<float>(n) + eps);
  for (i = 0; i + lanes <= n; i += lanes)
    store(y + i, fma(mul(sub(load(y + i), m), set1(factor)), load(gamma + i), load(beta + i)));
  if (i < n) norm_rest(mean, factor, gamma, beta, i, n, y);
}

// from may be nullptr: zeros.
RS_TARGET float shift(const float *to, const float *from, size_t n, rs_distance distance) {
  const auto at = [&](const float *x, size_t i) __attribute__((always_inline)) RS_TARGET {
    if (n - i >= lanes) return load(x + i);
    float rest[lanes] = {};
    memcpy(rest, x + i, (n - i) * sizeof *x);
    return load(rest);
  };
  vf sums = set1(0), left = set1(0), right = set1(0);
  if (distance == RS_DISTANCE_COS) {
    for (size_t i = 0; i < n; i += lanes) {
      const vf a = at(to, i), b = at(from, i);
      sums = fma(a, b, sums), left = fma(a, a, left), right = fma(b, b, right);
    }
    return one_minus_cosine(sum(sums), sum(left), sum(right));
  }
  const bool l1 = distance == RS_DISTANCE_L1;
  for (size_t i = 0; i < n; i += lanes) {
    const vf d = from ? sub(at(to, i), at(from, i)) : at(to, i);
    sums = l1 ? add(sums, max(d, sub(set1(0), d))) : fma(d, d, sums);
  }
  return l1 ? sum(sums) : std::sqrt(sum(sums));
}

// Lanes at and behind n - i become `other`.
RS_INLINE vf first_lanes(vf x, size_t i, size_t n, float other) {
  static const float index[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return n - i >= lanes ? x : if_less(load(index), set1(static_cast<float>(n - i)), x, set1(other));
}

RS_TARGET void softmax(float *scores, size_t ld, int rows, size_t n, float scale, bool first, float *most, float *total,
                       float *correction) {
  const vf a = set1(scale);
  for (int r = 0; r < rows; r++, scores += ld) {
    vf m = set1(-INFINITY), m1 = m, all = set1(0);
    size_t j = 0;
    for (; j + 2 * lanes <= n; j += 2 * lanes) m = max(m, load(scores + j)), m1 = max(m1, load(scores + j + lanes));
    for (; j < n; j += lanes) m = max(m, first_lanes(load(scores + j), j, n, -INFINITY));
    m = max(m, m1);
    const float here = scale * largest(m), before = first ? here : most[r], now = std::max(before, here);
    const vf b = set1(-now);
    for (size_t i = 0; i < n; i += lanes) {
      const vf e = first_lanes(exp_negative(fma(load(scores + i), a, b)), i, n, 0);
      store(scores + i, e);
      all = add(all, e);
    }
    alignas(align_data) float change[lanes];
    store(change, exp_negative(set1(before - now)));
    correction[r] = change[0];
    total[r] = first ? sum(all) : total[r] * change[0] + sum(all);
    most[r] = now;
  }
}

// Products and sums, not fused ones: the same bits in every row of kernels.
RS_TARGET void rope(const float *x, const float *table, size_t heads, size_t d, size_t half, float *y) {
  const float *cosines = table, *sines = table + half;
  for (size_t head = 0; head < heads; head++, x += d, y += d) {
    size_t i = 0;
    for (; i + lanes <= half; i += lanes) {
      const vf a = load(x + i), b = load(x + half + i), c = load(cosines + i), s = load(sines + i);
      store(y + i, sub(mul(a, c), mul(b, s)));
      store(y + half + i, add(mul(b, c), mul(a, s)));
    }
    rotate_rest(x, table, i, d, half, y);
  }
}

// For rs_measure_peak: chains of fused multiply-adds, as many as there are registers for.
RS_TARGET double f32_peak(size_t steps) {
  constexpr int chains = lanes == 8 ? 12 : 24;
  vf acc[chains], x = set1(0.5f), b = set1(0.25f);
#pragma GCC unroll 24
  for (vf &sum : acc) hide(sum = set1(0));
  for (size_t i = 0; i < steps; i++) {
#pragma GCC unroll 24
    for (vf &sum : acc) sum = fma(x, b, sum);
  }
#pragma GCC unroll 24
  for (vf &sum : acc) hide(sum);
  return static_cast<double>(steps) * chains * lanes;
}

#elif defined(RS_INTEGER_PART)
// ================================================================================ the part of section 7 that the vector units of
// x86 share: integer products
//
// Compiled like the part above, against `vi`, an integer register, of which a panel's step takes panel_width.  With RS_W4_GROUPS w4
// is left to the ISA.

// P panels of bytes: those of w8, or w4 unpacked.
struct byte_panels {
  const int8_t *w;
  size_t n, stride;  // inputs; bytes from one panel to the next
  bool first, last;  // inputs of K: before them there are sums in memory, or behind them is nothing to come
  // What is read next and waits in L2 or L3: of the first panel, and bytes from one panel to the next.
  const void *next;
  size_t next_stride;
};

// Tiles of R rows by P panels: sums to acc [P][acc_stride], or, of a whole tile without an activation, what becomes of them to y.
// That takes few operations where the sums are in registers; an activation is faster over all rows at once.
template <int R, int P>
RS_TARGET void byte_rows(const uint8_t *a, size_t kp, int rows, const byte_panels &panels, int32_t *acc_out, size_t acc_stride,
                         linear_result to) {
  constexpr int width = P * panel_width, lanes = panel_n / panel_width;
  // Where register h is, of what has `stride` of something a panel and `part` of it a register.
  const auto at = [](int h, size_t stride, size_t part) {
    return static_cast<size_t>(h / panel_width) * stride + static_cast<size_t>(h % panel_width) * part;
  };
  const char *next = static_cast<const char *>(panels.next);
  for (int left = P; rows >= R; rows -= R, a += R * kp, acc_out += R * panel_n, to = to.from(R, 0)) {
    vi acc[R][width];
    for (int r = 0; r < R; r++)
      for (int h = 0; h < width; h++)
        acc[r][h] = panels.first ? zero_int() : load_int(acc_out + r * panel_n + at(h, acc_stride, lanes));
    for (size_t k = 0; k < panels.n; k += panel_k) {
      __builtin_prefetch(next + k * panel_n);
      vi b[width];
      for (int h = 0; h < width; h++) b[h] = load_int(panels.w + k * panel_n + at(h, panels.stride, sizeof(vi)));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const vi x = broadcast4(a + r * kp + k);
        for (int h = 0; h < width; h++) acc[r][h] = dot(acc[r][h], x, b[h]);
      }
    }
    if (--left > 0) next += panels.next_stride;  // the first tiles fetch a panel each; behind the last that does no harm
    if (R == byte_tile_rows && P == byte_tile_panels && panels.last && to.act == RS_ACT_NONE) {  // as finish does it
#pragma GCC unroll 8
      for (int h = 0; h < width; h++) {
        const vf scale = load(to.scale + h * lanes), bias = to.bias ? load(to.bias + h * lanes) : set1(0);
        const vi colsum = load_int(to.colsum + h * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const vf v = mul(centred(acc[r][h], to.rq[r].zero, colsum), mul(set1(to.rq[r].scale), scale));
          store(to.y + r * to.ldy + h * lanes, to.bias ? add(v, bias) : v);
        }
      }
      continue;
    }
    for (int r = 0; r < R; r++)
      for (int h = 0; h < width; h++) store_int(acc_out + r * panel_n + at(h, acc_stride, lanes), acc[r][h]);
  }
  if constexpr (R > 1)
    if (rows) byte_rows<R - 1, P>(a, kp, rows, panels, acc_out, acc_stride, to);
}
// What byte_rows left of sums over all of K.
template <int P>
RS_TARGET void finish_rest(const int32_t *acc, int rows, const linear_result &to) {
  const int done = P == byte_tile_panels && to.act == RS_ACT_NONE ? rows / byte_tile_rows * byte_tile_rows : 0;
  finish_panels<P>(acc + done * panel_n, acc_panel(rows), rows - done, to.from(done, 0));
}

template <int P>
RS_TARGET void w8_tiles(const uint8_t *a, size_t kp, int rows, const int8_t *w, int panels, linear_result to) {
  alignas(align_data) int32_t acc[P * acc_panel(product_rows)];
  const size_t stride = kp * panel_n;
  for (; panels >= P; panels -= P, w += P * stride, to = to.from(0, P)) {
    const byte_panels bytes = {w, kp, stride, true, true, w + P * stride, stride};
    byte_rows<byte_tile_rows, P>(a, kp, rows, bytes, acc, acc_panel(rows), to);
    finish_rest<P>(acc, rows, to);
  }
  if constexpr (P > 1)
    if (panels) w8_tiles<P - 1>(a, kp, rows, w, panels, to);
}
void w8_panels(const uint8_t *a, size_t kp, int rows, const int8_t *w, int panels, const linear_result &to) {
  w8_tiles<byte_tile_panels>(a, kp, rows, w, panels, to);
}

#ifndef RS_W4_GROUPS
// A part of K at a time is unpacked, once for all rows, and stays in L1.
template <int P>
RS_TARGET void w4_tiles(const uint8_t *a, size_t kp, int rows, const uint8_t *w, const uint8_t *mult, int panels,
                        linear_result to) {
  alignas(align_data) int8_t bytes[P * w4_part * panel_n];
  alignas(align_data) int32_t acc[P * acc_panel(product_rows)];
  const size_t stride = kp * panel_n / 2;
  for (; panels >= P; panels -= P, w += P * stride, mult += P * kp / group_k * panel_n, to = to.from(0, P)) {
    for (size_t k = 0, n; k < kp; k += n) {
      n = std::min(w4_part, kp - k);
      for (size_t p = 0; p < P; p++)
        w4_unpack(w + p * stride + k * 8, mult + (p * kp + k) / group_k * panel_n, n, bytes + p * w4_part * panel_n);
      const bool last = k + n == kp;
      const byte_panels part = {bytes, n, w4_part * panel_n, k == 0, last, last ? w + P * stride : w + (k + n) * 8, stride};
      byte_rows<byte_tile_rows, P>(a + k, kp, rows, part, acc, acc_panel(rows), to);
    }
    finish_rest<P>(acc, rows, to);
  }
  if constexpr (P > 1)
    if (panels) w4_tiles<P - 1>(a, kp, rows, w, mult, panels, to);
}
void w4_panels(const uint8_t *a, size_t kp, int rows, const uint8_t *w, const uint8_t *mult, int panels, const linear_result &to) {
  w4_tiles<byte_tile_panels>(a, kp, rows, w, mult, panels, to);
}
#endif

// For rs_measure_peak: what a tile needs in any case, on registers.
RS_TARGET double w8_peak(size_t steps) {
  const uint8_t inputs[4] = {5, 5, 5, 5}, weights[4] = {3, 3, 3, 3};
  vi acc[peak_chains], x = broadcast4(inputs);
  const vi b = broadcast4(weights);
#pragma GCC unroll 24
  for (vi &sum : acc) hide(sum = zero_int());
  for (size_t i = 0; i < steps; i++) {
#pragma GCC unroll 24
    for (vi &sum : acc) {
      hide(x);  // or the product is made once
      sum = dot(sum, x, b);
    }
  }
#pragma GCC unroll 24
  for (vi &sum : acc) hide(sum);
  return static_cast<double>(steps) * peak_chains * sizeof(vi);
}

#ifndef RS_W4_GROUPS
double peak(rs_type type, size_t steps) { return type == RS_F32 ? f32_peak(steps) : w8_peak(steps); }
#endif

#else  // the file as a whole
#include "rs-backend.h"

#include "models/image.h"
#include "models/models.h"
#include "models/status.h"
#include "models/text.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

// ================================================================================ 1  limits, target macros, CPU features

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own AVX-512 header (bug 105593)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#define RS_X86 1
#define RS_AVX2 __attribute__((target("avx2,fma,f16c")))
#define RS_SSE42 __attribute__((target("sse4.2")))
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#define RS_NEON 1
#endif

// A function that is compiled once, and not anew for those of its callers whose arguments are constants: smaller, and what
// rs_measure_peak times is what runs.
#if defined(__clang__)
#define RS_ONCE __attribute__((noinline))
#else
#define RS_ONCE __attribute__((noinline, noclone))
#endif

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the weight file is little-endian and used in place; this machine is not"
#endif

namespace {

// Limits are generous for any encoder that exists, and small enough that products of a few stay far from overflow.
constexpr int64_t max_dim = int64_t(1) << 31;  // of a tensor
constexpr int64_t max_row = int64_t(1) << 30;  // values of a tensor's row
constexpr int64_t max_features = 65536;        // K of a linear layer: keeps int32 sums of u8 x s8 exact
constexpr uint64_t max_entries = 65536;        // tensors, metadata keys
constexpr size_t max_key = 255;                // bytes
constexpr int max_threads = 1024;
constexpr size_t align_data = 64;  // a cache line, and the widest vector

constexpr int panel_n = 16;      // output channels of a panel
constexpr int panel_k = 4;       // input features that lie together: one 32-bit lane of a dot product
constexpr int group_k = 32;      // input features that share a W4 scale, and what K is padded to
constexpr int w4_mult_max = 16;  // of panels
static_assert(int64_t{255} * 8 * w4_mult_max * max_features <= INT32_MAX, "no sum over K leaves int32");

}  // namespace

#ifdef RS_X86
namespace {

// What the CPU offers and the operating system saves (XCR0).  Asked once; not __builtin_cpu_supports, which does not know all of
// these in every compiler.
struct cpu_features {
  bool sse42, avx2, fma, f16c, avxvnni, avx512vnni, avx512bf16, amx;
  cpu_features() {
    unsigned a, b, c = 0, d, b7 = 0, c7 = 0, d7 = 0, a71 = 0;
    __get_cpuid(1, &a, &b, &c, &d);
    if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) __get_cpuid_count(7, 1, &a71, &b, &a, &d);
    const uint64_t saved = c >> 27 & 1 ? xcr0() : 0;
    const bool os_saves_ymm = (saved & 6) == 6, os_saves_zmm = (saved & 0xe6) == 0xe6, os_saves_tiles = (saved >> 17 & 3) == 3;
    sse42 = c >> 20 & 1;
    fma = os_saves_ymm && (c >> 12 & 1);
    f16c = os_saves_ymm && (c >> 29 & 1);
    avx2 = os_saves_ymm && (b7 >> 5 & 1);
    avxvnni = os_saves_ymm && (a71 >> 4 & 1);
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    avx512vnni = os_saves_zmm && (b7 & avx512) == avx512 && (c7 >> 11 & 1);
    avx512bf16 = os_saves_zmm && (a71 >> 5 & 1);
    amx = os_saves_tiles && (d7 >> 24 & 1) && (d7 >> 25 & 1) && (d7 >> 22 & 1);  // tiles, int8, bf16
  }

 private:
  static uint64_t xcr0() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
  }
};

const cpu_features &cpu() {
  static const cpu_features features;
  return features;
}

}  // namespace
#endif

// ================================================================================ 2  status, last error

namespace {
thread_local char last_error[1024] = "no error";
}

rs_status rs_fail(rs_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  char text[sizeof last_error];  // apart from last_error, which may be among the arguments
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  for (char *p = text; *p; p++)
    if (static_cast<unsigned char>(*p) < 0x20 || *p == 0x7f) *p = '?';  // names from a file must not break the line
  memcpy(last_error, text, sizeof text);
  return status;
}

rs_status rs_guarded_call(rs_status (*call)(void *), void *what) {
  char before[sizeof last_error];
  const size_t length =
      strlen(last_error) + 1;  // short as a rule, where calls may be, too: rs_tokenize takes less than a microsecond
  memcpy(before, last_error, length);
  rs_status status;
  try {
    status = call(what);
  } catch (const std::bad_alloc &) {
    return rs_fail(RS_ERR_MEMORY, "out of memory");
  } catch (const std::exception &e) {
    return rs_fail(RS_ERR_MEMORY, "internal: %s", e.what());
  }
  if (status == RS_OK) memcpy(last_error, before, length);
  return status;
}

const char *rs_last_error(void) { return last_error; }
const char *rs_version(void) { return RS_VERSION; }

const char *rs_status_name(rs_status status) {
  switch (status) {
    case RS_OK:
      return "ok";
    case RS_ERR_ARGUMENT:
      return "argument error";
    case RS_ERR_IO:
      return "i/o error";
    case RS_ERR_FORMAT:
      return "format error";
    case RS_ERR_UNSUPPORTED:
      return "unsupported";
    case RS_ERR_LIMIT:
      return "limit exceeded";
    case RS_ERR_MEMORY:
      return "out of memory";
    case RS_ERR_TEXT:
      return "text error";
    case RS_ERR_NUMERIC:
      return "numeric error";
    case RS_ERR_IMAGE:
      return "image error";
    case RS_ERR_NOT_FOUND:
      return "not found";
  }
  return "unknown status";
}

namespace {

// For a message, which has no room for all that a file may hold.
struct name_list {
  std::string all;
  void add(const char *name) {
    if (all.size() < 512) all += (all.empty() ? "" : ", ") + std::string(name);
  }
  const char *text() const { return all.empty() ? "none" : all.c_str(); }
};

RS_ONCE std::string shape_text(int rank, const int64_t *shape) {
  std::string s = "[";
  for (int i = 0; i < rank; i++) {
    if (i) s += ',';
    switch (shape[i]) {
      case RS_DIM_TOKENS:
        s += 'T';
        break;
      case RS_DIM_SEQUENCES:
        s += 'B';
        break;
      case RS_DIM_CU_SEQLENS:
        s += "B+1";
        break;
      default:
        s += std::to_string(shape[i]);
    }
  }
  return s + "]";
}

}  // namespace

// ================================================================================ 3  checked arithmetic, CRC32C

namespace {

bool mul_overflows(size_t a, size_t b, size_t *out) { return __builtin_mul_overflow(a, b, out); }

// For sizes that are already known to be small against SIZE_MAX.
constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// CRC32C (Castagnoli, reflected polynomial 0x82f63b78), eight bytes a step by tables.
struct crc_tables {
  uint32_t t[8][256];
  crc_tables() {
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t c = i;
      for (int k = 0; k < 8; k++) c = (c >> 1) ^ (0x82f63b78u & (0u - (c & 1)));
      t[0][i] = c;
    }
    for (int j = 1; j < 8; j++)
      for (uint32_t i = 0; i < 256; i++) t[j][i] = (t[j - 1][i] >> 8) ^ t[0][t[j - 1][i] & 255];
  }
};

uint32_t crc32c_tables(uint32_t crc, const unsigned char *p, size_t n) {
  static const crc_tables tables;
  const auto &t = tables.t;
  for (; n >= 8; n -= 8, p += 8) {
    uint64_t v;
    memcpy(&v, p, 8);
    v ^= crc;
    crc = t[7][v & 255] ^ t[6][v >> 8 & 255] ^ t[5][v >> 16 & 255] ^ t[4][v >> 24 & 255] ^ t[3][v >> 32 & 255] ^
          t[2][v >> 40 & 255] ^ t[1][v >> 48 & 255] ^ t[0][v >> 56];
  }
  for (; n; n--, p++) crc = (crc >> 8) ^ t[0][(crc ^ *p) & 255];
  return crc;
}

#ifdef RS_X86
RS_SSE42 uint32_t crc32c_sse42(uint32_t crc, const unsigned char *p, size_t n) {
  uint64_t c = crc;
  for (; n >= 8; n -= 8, p += 8) {
    uint64_t v;
    memcpy(&v, p, 8);
    c = _mm_crc32_u64(c, v);
  }
  for (; n; n--, p++) c = _mm_crc32_u8(static_cast<uint32_t>(c), *p);
  return static_cast<uint32_t>(c);
}
#endif

// Of `n` bytes at `data`, going on from `crc` (0 to begin).
uint32_t crc32c(uint32_t crc, const void *data, size_t n) {
  const auto *p = static_cast<const unsigned char *>(data);
#ifdef RS_X86
  if (cpu().sse42) return ~crc32c_sse42(~crc, p, n);
#endif
  return ~crc32c_tables(~crc, p, n);
}

}  // namespace

// ================================================================================ 4  threads

namespace {

// CPUs that the scheduler may give to this process.
int affinity_cpus() {
  for (size_t cpus = 1024; cpus <= 65536; cpus *= 2) {  // the kernel's mask may be wider than a cpu_set_t
    cpu_set_t *set = CPU_ALLOC(cpus);
    if (!set) break;
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    const int count = sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (count > 0) return count;
  }
  const long online = sysconf(_SC_NPROCESSORS_ONLN);
  return online > 0 ? static_cast<int>(online) : 1;
}

bool read_two_numbers(const std::string &path, double *a, double *b) {
  FILE *f = fopen(path.c_str(), "re");
  if (!f) return false;
  const int n = b ? fscanf(f, "%lf %lf", a, b) : fscanf(f, "%lf", a);  // "max 100000" gives 0: no limit
  fclose(f);
  return n == (b ? 2 : 1);
}

// CPUs that cgroup quotas leave, in this group and every group around it; `most` where there is no quota.
[[gnu::cold]] int cgroup_cpus(int most) {
  FILE *f = fopen("/proc/self/cgroup", "re");
  if (!f) return most;
  double cpus = most;
  char line[4096];
  while (fgets(line, sizeof line, f)) {
    line[strcspn(line, "\n")] = 0;
    char *controllers = strchr(line, ':');
    char *path = controllers ? strchr(controllers + 1, ':') : nullptr;
    if (!path) continue;
    *path++ = 0;
    controllers++;
    const bool v2 = !*controllers;
    if (!v2 && !strstr(controllers, "cpu")) continue;
    // Inside a container the path may be of the host, and the group is mounted at the root: that is the last one tried.
    for (std::string at = path;; at.erase(at.rfind('/'))) {
      double quota, period;
      const std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
      const bool limited = v2 ? read_two_numbers(root + at + "/cpu.max", &quota, &period)
                              : read_two_numbers(root + at + "/cpu.cfs_quota_us", &quota, nullptr) &&
                                    read_two_numbers(root + at + "/cpu.cfs_period_us", &period, nullptr);
      if (limited && quota > 0 && period > 0) cpus = std::min(cpus, quota / period);
      if (at.find('/') == std::string::npos) break;
    }
  }
  fclose(f);
  return std::max(1, static_cast<int>(std::ceil(cpus)));
}

int default_threads() {
  if (const char *text = getenv("OMP_NUM_THREADS")) {
    const long n = strtol(text, nullptr, 10);
    if (n >= 1) return static_cast<int>(std::min<long>(n, max_threads));
  }
  const int cpus = affinity_cpus();
  return std::min({cpus, cgroup_cpus(cpus), max_threads});
}

// Where the threads of a team meet.  Waiting spins for some microseconds, which is what one operator's shares differ by, and then
// yields: when there are more runnable threads than CPUs, the one that all wait for gets its turn.  (libgomp's own barrier spins
// for milliseconds by default: on a busy machine that made a small graph a hundred times slower.)
class meeting_point {
 public:
  void wait_for(int threads) {
    const unsigned round = rounds.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      dealt.store(0, std::memory_order_relaxed);
      rounds.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; rounds.load(std::memory_order_acquire) == round; spins++) {
      if (spins < 2000) pause();
      else sched_yield();
    }
  }

  int64_t deal() { return dealt.fetch_add(1, std::memory_order_relaxed); }

 private:
  static void pause() {
#ifdef RS_X86
    _mm_pause();
#endif
  }
  alignas(align_data) std::atomic<int> arrived{0};
  alignas(align_data) std::atomic<unsigned> rounds{0};
  alignas(align_data) std::atomic<int64_t> dealt{0};
};

// One thread of a team, as operators see it.
struct worker {
  meeting_point &team;
  int thread, threads;

  void barrier() const {
    if (threads > 1) team.wait_for(threads);
  }
  struct range {
    int64_t begin, end;
  };
  range share(int64_t n) const { return {n * thread / threads, n * (thread + 1) / threads}; }
  // Units dealt out to whoever is free, so that a thread which the system has put aside keeps nobody waiting for long:
  // for (unit = next(-1); unit < n; unit = next(unit)).  One such loop between two barriers.
  int64_t next(int64_t done) const { return threads > 1 ? team.deal() : done + 1; }
  worker alone() const { return {team, 0, 1}; }
};

#ifdef _OPENMP
// The team that OpenMP was last asked for by the calling thread, which it keeps, and the process that this was.
thread_local int kept_threads = 1;
thread_local pid_t kept_process;

void *wait_for_lock(void *lock) {
  pthread_mutex_lock(static_cast<pthread_mutex_t *>(lock));
  pthread_mutex_unlock(static_cast<pthread_mutex_t *>(lock));
  return nullptr;
}

// How many of these can be there at once.  libgomp ends the process where it can't start one: those that it lacks are tried first,
// beside some memory of which it then makes its tables.  And a forked child would wait for ever for a team that only its parent
// has.
[[gnu::cold]] int threads_to_be_had(int threads) {
  const pid_t process = getpid();
  if (kept_threads > 1 && kept_process != process) return 1;
  kept_process = process;
  if (threads <= kept_threads) return kept_threads = threads;
  void *const tables = malloc(1 << 20);
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_t tried[max_threads];
  int n = 0;
  pthread_mutex_lock(&lock);
  while (tables && kept_threads + n < threads && !pthread_create(&tried[n], nullptr, wait_for_lock, &lock)) n++;
  pthread_mutex_unlock(&lock);
  for (int i = 0; i < n; i++) pthread_join(tried[i], nullptr);
  free(tables);
  return kept_threads += n;
}
#endif

// Run f(worker) on every thread of a team, which may have fewer than that.
template <class F>
void run_team(int threads, F f) {
  meeting_point team;
#ifdef _OPENMP
  if (threads > 1) threads = threads_to_be_had(threads);
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    f(worker{team, omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  (void)threads;
  f(worker{team, 0, 1});
}

double now_seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

// ================================================================================ 5  types and blocks
//
// Where the bytes of each (type, layout) lie.  One codec says how many bytes there are, how f32 values are encoded and decoded,
// and what a file must fulfil.  Np and Kp are N and K rounded up to 16 and 32.
//
//   f32, f16, i32 rows     row major, nothing else
//   w8 rows                each row: f32 scale, K int8
//   w4 rows                each row: f32 scale, Kp/32 u8 multipliers, Kp/2 bytes of nibbles (low nibble: even k)
//   f32, f16 panels        [Np/16][Kp][16]
//   w8 panels              int8 [Np/16][Kp/4][16][4], then f32 scale [Np], then i32 column sum [Np]
//   w4 panels              nibbles [Np/16][Kp/4][32 bytes: low nibbles are channels 0-7, high nibbles channels 8-15, each x 4 k],
//                          u8 multiplier [Np/16][Kp/32][16], f32 scale [Np], i32 column sum [Np]
//
// w8: value = scale[n] w.  The AVX2 product vpmaddubsw adds two neighbouring u8 x s8 products in 16 bits.  It stays exact where two
//     neighbours (k = 2i, 2i + 1) of the same sign have |w| + |w'| <= 128, since 255 * 128 < 2^15.  So weights use all of
//     [-127, 127], and the encoder picks scales that make the few pairs over the limit cost least.
// w4: value = scale[n] m[g,n] w with w in [-8, 7] and m in [1, 16]: the scale of a group is an integer multiple of the row's, so
//     that a whole dot product is one exact integer, the same on every ISA.  m w is a byte: unpacked, w4 is w8.  But pairs may be
//     over the limit, so on AVX2 a group sums up u8 x w in 16 bits (2 * 255 * 8 * 8 steps = 32,640 < 2^15), and vpmaddwd, which
//     widens that in any case, multiplies by m instead of by one.
// The column sum is sum over k of m w: it takes the zero point of the activations out of the product.

namespace {

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  uint32_t bits;
  if (exponent == 31) bits = sign | 0x7f800000 | mantissa << 13;
  else if (exponent) bits = sign | (exponent + 112) << 23 | mantissa << 13;
  else {  // subnormal: exact as an integer times 2^-24
    const float f = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -f : f;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; too large becomes infinity, which the encoder refuses.
uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 65536 and more
  if (magnitude < 0x38800000) {                       // below the smallest normal: an integer times 2^-24
    float a;
    memcpy(&a, &magnitude, 4);
    return sign | static_cast<uint16_t>(std::lrint(std::ldexp(a, 24)));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

struct matrix {  // a tensor as rows of `k` values
  size_t n, k;
  size_t np() const { return round_up(n, panel_n); }
  size_t kp() const { return round_up(k, group_k); }
};

rs_status as_matrix(int rank, const int64_t *shape, matrix *out) {
  if (rank < 1 || rank > RS_MAX_RANK) return rs_fail(RS_ERR_ARGUMENT, "rank %d, expected 1 to %d", rank, RS_MAX_RANK);
  size_t n = 1;
  for (int i = 0; i < rank; i++) {
    if (shape[i] < 1 || shape[i] > max_dim)
      return rs_fail(RS_ERR_ARGUMENT, "shape %s: dimension %d is out of range", shape_text(rank, shape).c_str(), i);
    if (i + 1 < rank && (mul_overflows(n, static_cast<size_t>(shape[i]), &n) || n > SIZE_MAX / 2))
      return rs_fail(RS_ERR_ARGUMENT, "shape %s is too large", shape_text(rank, shape).c_str());
  }
  *out = {n, static_cast<size_t>(shape[rank - 1])};
  return RS_OK;
}

// Sections of a quantized matrix; 64-byte aligned because Np and Kp are multiples of 16 and 32.
struct w8_panels {
  const int8_t *w;
  const float *scale;
  const int32_t *colsum;
  w8_panels(const void *data, matrix m)
      : w(static_cast<const int8_t *>(data)),
        scale(reinterpret_cast<const float *>(w + m.np() * m.kp())),
        colsum(reinterpret_cast<const int32_t *>(scale + m.np())) {}
};
struct w4_panels {
  const uint8_t *w, *mult;
  const float *scale;
  const int32_t *colsum;
  w4_panels(const void *data, matrix m)
      : w(static_cast<const uint8_t *>(data)),
        mult(w + m.np() * m.kp() / 2),
        scale(reinterpret_cast<const float *>(mult + m.np() * m.kp() / group_k)),
        colsum(reinterpret_cast<const int32_t *>(scale + m.np())) {}
};

size_t w8_at(matrix m, size_t n, size_t k) {
  return (n / panel_n * (m.kp() / panel_k) + k / panel_k) * 64 + n % panel_n * panel_k + k % panel_k;
}
size_t w4_byte(matrix m, size_t n, size_t k) {
  return (n / panel_n * (m.kp() / panel_k) + k / panel_k) * 32 + n % 8 * panel_k + k % panel_k;
}
unsigned w4_shift(size_t n) { return n % panel_n < 8 ? 0 : 4; }
size_t w4_mult_at(matrix m, size_t n, size_t g) { return (n / panel_n * (m.kp() / group_k) + g) * panel_n + n % panel_n; }

// ---- quantizers: one row of f32 weights to integers

// How to round with what goes into a layer in mind: GPTQ (Frantar et al., arXiv 2210.17323).  With H the second moment of the
// layer's inputs, and U upper triangular with U^T U = H^-1, the error made at column j is made good by the columns behind it:
// w[l] -= (w[j] - q[j]) U[j,l] / U[j,j].  Without it every weight is rounded for itself.
struct rounding {
  size_t k;
  std::vector<float> u;           // [k, k]
  std::vector<float> importance;  // [k] diagonal of H: how much an error at that column matters when a scale is chosen
};

float max_abs(const float *x, size_t n) {
  float m = 0;
  for (size_t i = 0; i < n; i++) m = std::max(m, std::fabs(x[i]));
  return m;
}

int round_clamp(float v, int lo, int hi) { return static_cast<int>(std::lrint(std::min(std::max(v, float(lo)), float(hi)))); }

// Walk along a row.  quant(j, w) looks at the weights from j on as they are by now, stores the integer of j and returns its value.
template <class Quant>
void round_row(const float *x, size_t k, const rounding *r, std::vector<float> *w, Quant quant) {
  w->assign(x, x + k);
  for (size_t j = 0; j < k; j++) {
    const float value = quant(j, w->data());
    if (!r) continue;
    const float *u = r->u.data() + j * k, error = ((*w)[j] - value) / u[j];
    float *rest = w->data();
    for (size_t l = j + 1; l < k; l++) rest[l] -= error * u[l];
  }
}

// Of two neighbours of the same sign, |a| + |b| may be 128: see above.
constexpr int pair_limit = 128;
int limit_second(int first, int second) {
  if (first > 0) return std::min(second, pair_limit - first);
  if (first < 0) return std::max(second, -pair_limit - first);
  return second;
}
// Both at once: each gives half of the excess.
void limit_pair(int *a, int *b) {
  const int excess = std::abs(*a + *b) - pair_limit;
  if ((*a > 0) != (*b > 0) || excess <= 0) return;
  const int sign = *a > 0 ? 1 : -1;
  *a -= sign * (excess / 2);
  *b = limit_second(*a, *b);
}

// Rows that hold nothing larger are zeros: their scale would be a denormal number or zero, which no file may have.
constexpr float least_top = 256 * FLT_MIN;

// The scale of a row for w8.  It is searched between the one that uses 63 steps, where no pair is over its limit, and finer ones,
// where some pairs and perhaps the largest weights are clipped.
float best_scale_w8(const float *x, size_t k, const rounding *r) {
  const float top = max_abs(x, k);
  float best_scale = 1;
  double best = INFINITY;
  for (int steps = 63; steps <= 140 && top >= least_top; steps++) {
    const float scale = top / static_cast<float>(steps), inverse = 1 / scale;
    double error = 0;
    for (size_t i = 0; i < k; i += 2) {
      int w[2] = {round_clamp(x[i] * inverse, -127, 127), i + 1 < k ? round_clamp(x[i + 1] * inverse, -127, 127) : 0};
      limit_pair(&w[0], &w[1]);
      for (size_t j = i; j < std::min(k, i + 2); j++) {
        const double e = double(x[j]) - double(scale) * w[j - i];
        error += e * e * (r ? r->importance[j] : 1);
      }
    }
    if (error < best) best = error, best_scale = scale;
  }
  return best_scale;
}

float quantize_row_w8(const float *x, size_t k, const rounding *r, std::vector<float> *work, int8_t *q) {
  const float scale = best_scale_w8(x, k, r), inverse = 1 / scale;
  round_row(x, k, r, work, [&](size_t j, const float *w) {
    int v = round_clamp(w[j] * inverse, -127, 127);
    if (j % 2) v = limit_second(q[j - 1], v);
    else if (j + 1 < k) {  // the second of the pair will need some of the room
      int next = round_clamp(w[j + 1] * inverse, -127, 127);
      limit_pair(&v, &next);
    }
    q[j] = static_cast<int8_t>(v);
    return scale * static_cast<float>(v);
  });
  return scale;
}

// The scale in s * [-8, 7] that fits `x` best: a grid around max / 7, each refined by least squares.
float best_scale_w4(const float *x, size_t k, const float *importance) {
  const float top = max_abs(x, k);
  if (top == 0) return 0;
  float best_scale = top / 7;
  double best = INFINITY;
  for (int i = 0; i <= 24; i++) {
    const float scale = top / (5.5f + 0.15f * static_cast<float>(i));
    double xq = 0, qq = 0, xx = 0;
    for (size_t j = 0; j < k; j++) {
      const double q = round_clamp(x[j] / scale, -8, 7), h = importance ? importance[j] : 1;
      xq += h * x[j] * q, qq += h * q * q, xx += h * x[j] * x[j];
    }
    if (qq == 0) continue;
    const double error = xx - xq * xq / qq;  // of the least squares scale xq / qq for these integers
    if (error < best) best = error, best_scale = static_cast<float>(xq / qq);
  }
  return best_scale;
}

// int4 with a multiplier, 1 … m_max, each group of 32: m_g scale ~ the group's own best scale.
float quantize_row_w4(const float *x, size_t k, const rounding *r, int m_max, std::vector<float> *work, int8_t *q, uint8_t *mult) {
  const auto group_scale = [&](const float *w, size_t begin) {
    return best_scale_w4(w + begin, std::min<size_t>(group_k, k - begin), r ? r->importance.data() + begin : nullptr);
  };
  float top = 0;
  for (size_t begin = 0; begin < k; begin += group_k) top = std::max(top, group_scale(x, begin));
  if (top < least_top) top = 1;
  const float scale = top / static_cast<float>(m_max);
  float step = 0;
  round_row(x, k, r, work, [&](size_t j, const float *w) {
    if (j % group_k == 0) {
      const size_t g = j / group_k;
      mult[g] = static_cast<uint8_t>(round_clamp(group_scale(w, j) / scale, 1, m_max));
      step = scale * static_cast<float>(mult[g]);
    }
    q[j] = static_cast<int8_t>(round_clamp(w[j] / step, -8, 7));
    return step * static_cast<float>(q[j]);
  });
  return scale;
}

// H (any scale), damped, to what round_row needs.  H = R R^T with R upper triangular is a Cholesky decomposition of H with rows and
// columns in reverse, and U = R^-1.
rs_status make_rounding(const float *h, size_t k, size_t stride, rounding *out) {
  double mean = 0;
  for (size_t i = 0; i < k; i++) mean += h[i * stride + i] / static_cast<double>(k);
  if (!(mean > 0) || !std::isfinite(mean))
    return rs_fail(RS_ERR_NUMERIC, "calibration: a layer's inputs are all zero, or not finite");
  const double damping = 0.01 * mean;  // as in the paper
  std::vector<double> l(k * k), inverse(k * k);
  for (size_t i = 0; i < k; i++)
    for (size_t j = 0; j <= i; j++) l[i * k + j] = h[(k - 1 - i) * stride + (k - 1 - j)] + (i == j ? damping : 0);
  for (size_t i = 0; i < k; i++) {
    double *row = l.data() + i * k;
    for (size_t j = 0; j <= i; j++) {
      const double *other = l.data() + j * k;
      double v = row[j];
#pragma omp simd reduction(- : v)
      for (size_t c = 0; c < j; c++) v -= row[c] * other[c];
      if (i == j && !(v > 0))
        return rs_fail(RS_ERR_NUMERIC, "calibration: the second moment of a layer's inputs is not positive definite");
      row[j] = i == j ? std::sqrt(v) : v / other[j];
    }
  }
  for (size_t i = 0; i < k; i++) {
    double *row = inverse.data() + i * k;
    row[i] = 1;
    for (size_t c = 0; c < i; c++) {
      const double factor = l[i * k + c], *other = inverse.data() + c * k;
      for (size_t j = 0; j <= c; j++) row[j] -= factor * other[j];
    }
    for (size_t j = 0; j <= i; j++) row[j] /= l[i * k + i];
  }
  out->k = k;
  out->u.resize(k * k);
  out->importance.resize(k);
  for (size_t i = 0; i < k; i++) {
    out->importance[i] = static_cast<float>(h[i * stride + i] / mean + 0.01);
    for (size_t j = i; j < k; j++) out->u[i * k + j] = static_cast<float>(inverse[(k - 1 - i) * k + (k - 1 - j)]);
  }
  return RS_OK;
}

// ---- codecs

bool all_finite(const float *x, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (!std::isfinite(x[i])) return false;
  return true;
}

// What of a stored tensor is wrong, or nullptr.  `deep`: look at every weight, not only at scales.
using codec_check = const char *(*)(const void *data, matrix m, bool deep);

const char *check_scales(const float *scale, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (!(scale[i] > 0) || !std::isfinite(scale[i])) return "a scale is not finite and positive";
  return nullptr;
}

size_t f32_rows_bytes(matrix m) { return m.n * m.k * 4; }
void f32_rows_encode(const float *src, matrix m, void *dst, const rounding *) { memcpy(dst, src, m.n * m.k * 4); }
void f32_rows_decode(const void *src, matrix m, float *dst) { memcpy(dst, src, m.n * m.k * 4); }
const char *f32_rows_check(const void *data, matrix m, bool deep) {
  if (!deep && m.n > 1) return nullptr;  // vectors always, tables only when asked
  return all_finite(static_cast<const float *>(data), m.n * m.k) ? nullptr : "a value is NaN or infinite";
}

size_t f16_rows_bytes(matrix m) { return m.n * m.k * 2; }
void f16_rows_encode(const float *src, matrix m, void *dst, const rounding *) {
  auto *d = static_cast<uint16_t *>(dst);
  for (size_t i = 0; i < m.n * m.k; i++) d[i] = float_to_half(src[i]);
}
#ifdef RS_X86
RS_AVX2 void eight_halves(const uint16_t *s, float *dst) {
  _mm256_storeu_ps(dst, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(s))));
}
#endif
void f16_rows_decode(const void *src, matrix m, float *dst) {
  const auto *s = static_cast<const uint16_t *>(src);
  const size_t n = m.n * m.k;
  size_t i = 0;
#ifdef RS_X86
  if (cpu().avx2 && cpu().f16c)  // positions are looked up for every token
    for (; i + 8 <= n; i += 8) eight_halves(s + i, dst + i);
#endif
  for (; i < n; i++) dst[i] = half_to_float(s[i]);
}
bool halves_finite(const void *data, size_t n) {
  const auto *h = static_cast<const uint16_t *>(data);
  for (size_t i = 0; i < n; i++)
    if ((h[i] & 0x7c00) == 0x7c00) return false;
  return true;
}
const char *f16_rows_check(const void *data, matrix m, bool deep) {
  return !deep || halves_finite(data, m.n * m.k) ? nullptr : "a value is NaN or infinite";
}

size_t w8_rows_stride(matrix m) { return 4 + m.k; }
size_t w8_rows_bytes(matrix m) { return m.n * w8_rows_stride(m); }
void w8_rows_encode(const float *src, matrix m, void *dst, const rounding *) {
  for (size_t i = 0; i < m.n; i++) {
    char *row = static_cast<char *>(dst) + i * w8_rows_stride(m);
    const float *x = src + i * m.k, top = max_abs(x, m.k), scale = top >= least_top ? top / 127 : 1;
    memcpy(row, &scale, 4);
    for (size_t j = 0; j < m.k; j++) row[4 + j] = static_cast<char>(round_clamp(x[j] / scale, -127, 127));
  }
}
void w8_rows_decode(const void *src, matrix m, float *dst) {
  for (size_t i = 0; i < m.n; i++) {
    const auto *row = static_cast<const signed char *>(src) + i * w8_rows_stride(m);
    float scale;
    memcpy(&scale, row, 4);
    for (size_t j = 0; j < m.k; j++) dst[i * m.k + j] = scale * static_cast<float>(row[4 + j]);
  }
}
const char *row_scales_check(const void *data, size_t n, size_t stride) {
  for (size_t i = 0; i < n; i++) {
    float scale;
    memcpy(&scale, static_cast<const char *>(data) + i * stride, 4);
    if (const char *wrong = check_scales(&scale, 1)) return wrong;
  }
  return nullptr;
}
const char *w8_rows_check(const void *data, matrix m, bool deep) {
  return deep ? row_scales_check(data, m.n, w8_rows_stride(m)) : nullptr;
}

size_t w4_rows_stride(matrix m) { return 4 + m.kp() / group_k + m.kp() / 2; }
size_t w4_rows_bytes(matrix m) { return m.n * w4_rows_stride(m); }
void w4_rows_encode(const float *src, matrix m, void *dst, const rounding *) {
  std::vector<int8_t> q(m.kp());
  std::vector<float> work;
  for (size_t i = 0; i < m.n; i++) {
    auto *row = static_cast<uint8_t *>(dst) + i * w4_rows_stride(m), *nibbles = row + 4 + m.kp() / group_k;
    const float scale = quantize_row_w4(src + i * m.k, m.k, nullptr, 255, &work, q.data(), row + 4);
    memcpy(row, &scale, 4);
    for (size_t j = 0; j < m.kp(); j += 2) nibbles[j / 2] = static_cast<uint8_t>((q[j] + 8) | (q[j + 1] + 8) << 4);
  }
}
void w4_rows_decode(const void *src, matrix m, float *dst) {
  for (size_t i = 0; i < m.n; i++) {
    const auto *row = static_cast<const uint8_t *>(src) + i * w4_rows_stride(m), *nibbles = row + 4 + m.kp() / group_k;
    float scale;
    memcpy(&scale, row, 4);
    for (size_t j = 0; j < m.k; j++) {
      const uint8_t mult = row[4 + j / group_k];
      dst[i * m.k + j] = scale * static_cast<float>(mult) * static_cast<float>((nibbles[j / 2] >> (j % 2 * 4) & 15) - 8);
    }
  }
}
const char *w4_rows_check(const void *data, matrix m, bool deep) {
  return deep ? row_scales_check(data, m.n, w4_rows_stride(m)) : nullptr;
}

size_t f32_panels_bytes(matrix m) { return m.np() * m.kp() * 4; }
size_t float_panel_at(matrix m, size_t n, size_t k) { return (n / panel_n * m.kp() + k) * panel_n + n % panel_n; }
void f32_panels_encode(const float *src, matrix m, void *dst, const rounding *) {
  auto *d = static_cast<float *>(dst);
  memset(dst, 0, f32_panels_bytes(m));
  for (size_t i = 0; i < m.n; i++)
    for (size_t j = 0; j < m.k; j++) d[float_panel_at(m, i, j)] = src[i * m.k + j];
}
void f32_panels_decode(const void *src, matrix m, float *dst) {
  const auto *s = static_cast<const float *>(src);
  for (size_t i = 0; i < m.n; i++)
    for (size_t j = 0; j < m.k; j++) dst[i * m.k + j] = s[float_panel_at(m, i, j)];
}
const char *f32_panels_check(const void *data, matrix m, bool deep) {
  return !deep || all_finite(static_cast<const float *>(data), m.np() * m.kp()) ? nullptr : "a value is NaN or infinite";
}

size_t f16_panels_bytes(matrix m) { return m.np() * m.kp() * 2; }
void f16_panels_encode(const float *src, matrix m, void *dst, const rounding *) {
  auto *d = static_cast<uint16_t *>(dst);
  memset(dst, 0, f16_panels_bytes(m));
  for (size_t i = 0; i < m.n; i++)
    for (size_t j = 0; j < m.k; j++) d[float_panel_at(m, i, j)] = float_to_half(src[i * m.k + j]);
}
void f16_panels_decode(const void *src, matrix m, float *dst) {
  const auto *s = static_cast<const uint16_t *>(src);
  for (size_t i = 0; i < m.n; i++)
    for (size_t j = 0; j < m.k; j++) dst[i * m.k + j] = half_to_float(s[float_panel_at(m, i, j)]);
}
const char *f16_panels_check(const void *data, matrix m, bool deep) {
  return !deep || halves_finite(data, m.np() * m.kp()) ? nullptr : "a value is NaN or infinite";
}

// Quantizing takes long: all CPUs, a panel at a time.  f(row, scratch) for every row; scratch holds one row's integers.
struct row_scratch {
  std::vector<float> work;
  std::vector<int8_t> q;
  std::vector<uint8_t> mult;
};
template <class F>
void for_rows(matrix m, F f) {
  const int threads = default_threads();
  std::vector<row_scratch> scratch(static_cast<size_t>(threads));
  for (row_scratch &s : scratch) {  // here, since nothing may throw on another thread
    s.work.reserve(m.k);
    s.q.resize(m.kp());
    s.mult.resize(m.kp() / group_k);
  }
  run_team(threads, [&](const worker &me) {
    const auto [begin, end] = me.share(static_cast<int64_t>(m.np() / panel_n));
    for (size_t i = static_cast<size_t>(begin) * panel_n; i < std::min(m.n, static_cast<size_t>(end) * panel_n); i++)
      f(i, &scratch[static_cast<size_t>(me.thread)]);
  });
}

size_t w8_panels_bytes(matrix m) { return m.np() * m.kp() + m.np() * 8; }
void w8_panels_encode(const float *src, matrix m, void *dst, const rounding *r) {
  memset(dst, 0, w8_panels_bytes(m));
  auto *w = static_cast<int8_t *>(dst);
  auto *scale = reinterpret_cast<float *>(w + m.np() * m.kp());
  auto *colsum = reinterpret_cast<int32_t *>(scale + m.np());
  std::fill(scale, scale + m.np(), 1.0f);
  for_rows(m, [&](size_t i, row_scratch *s) {
    scale[i] = quantize_row_w8(src + i * m.k, m.k, r, &s->work, s->q.data());
    for (size_t j = 0; j < m.k; j++) w[w8_at(m, i, j)] = s->q[j], colsum[i] += s->q[j];
  });
}
void w8_panels_decode(const void *src, matrix m, float *dst) {
  const w8_panels p(src, m);
  for (size_t i = 0; i < m.n; i++)
    for (size_t j = 0; j < m.k; j++) dst[i * m.k + j] = p.scale[i] * static_cast<float>(p.w[w8_at(m, i, j)]);
}
const char *w8_panels_check(const void *data, matrix m, bool deep) {
  const w8_panels p(data, m);
  if (const char *wrong = check_scales(p.scale, m.np())) return wrong;
  if (!deep) return nullptr;
  for (size_t i = 0; i < m.np(); i++) {
    int32_t sum = 0;
    for (size_t j = 0; j < m.kp(); j += 2) {
      int a = p.w[w8_at(m, i, j)], b = p.w[w8_at(m, i, j + 1)], a0 = a, b0 = b;
      limit_pair(&a, &b);
      if (a != a0 || b != b0) return "a pair of weights is over the limit";
      if (a == -128 || b == -128) return "a weight is outside [-127, 127]";
      sum += a + b;
    }
    if (sum != p.colsum[i]) return "a column sum does not match its weights";
  }
  return nullptr;
}

size_t w4_panels_bytes(matrix m) { return m.np() * m.kp() / 2 + m.np() * m.kp() / group_k + m.np() * 8; }
void w4_panels_encode(const float *src, matrix m, void *dst, const rounding *r) {
  const size_t groups = m.kp() / group_k;
  auto *w = static_cast<uint8_t *>(dst), *mult = w + m.np() * m.kp() / 2;
  auto *scale = reinterpret_cast<float *>(mult + m.np() * groups);
  auto *colsum = reinterpret_cast<int32_t *>(scale + m.np());
  memset(w, 0x88, m.np() * m.kp() / 2);  // nibble 8 stands for weight 0
  memset(mult, 1, m.np() * groups);
  std::fill(scale, scale + m.np(), 1.0f);
  std::fill(colsum, colsum + m.np(), 0);
  for_rows(m, [&](size_t i, row_scratch *s) {
    scale[i] = quantize_row_w4(src + i * m.k, m.k, r, w4_mult_max, &s->work, s->q.data(), s->mult.data());
    for (size_t g = 0; g < groups; g++) mult[w4_mult_at(m, i, g)] = s->mult[g];
    for (size_t j = 0; j < m.k; j++) {
      uint8_t &byte = w[w4_byte(m, i, j)];
      byte = static_cast<uint8_t>((byte & (0xf0 >> w4_shift(i))) | (s->q[j] + 8) << w4_shift(i));
      colsum[i] += s->q[j] * s->mult[j / group_k];
    }
  });
}
int w4_value(const w4_panels &p, matrix m, size_t n, size_t k) { return (p.w[w4_byte(m, n, k)] >> w4_shift(n) & 15) - 8; }
void w4_panels_decode(const void *src, matrix m, float *dst) {
  const w4_panels p(src, m);
  for (size_t i = 0; i < m.n; i++)
    for (size_t j = 0; j < m.k; j++)
      dst[i * m.k + j] =
          p.scale[i] * static_cast<float>(p.mult[w4_mult_at(m, i, j / group_k)]) * static_cast<float>(w4_value(p, m, i, j));
}
const char *w4_panels_check(const void *data, matrix m, bool deep) {
  const w4_panels p(data, m);
  if (const char *wrong = check_scales(p.scale, m.np())) return wrong;
  uint8_t most_mult = 0;  // not max_element, which takes five times as long: every load does this
  for (size_t i = 0; i < m.np() * m.kp() / group_k; i++) most_mult = std::max(most_mult, p.mult[i]);
  if (most_mult > w4_mult_max)
    return "a multiplier of a group is above 16, as older versions of rs wrote them; convert the model again";
  if (!deep) return nullptr;
  for (size_t i = 0; i < m.np(); i++) {
    int64_t sum = 0, most = 0;
    for (size_t j = 0; j < m.kp(); j++) {
      const int v = w4_value(p, m, i, j) * p.mult[w4_mult_at(m, i, j / group_k)];
      sum += v, most += std::abs(v);
    }
    if (most * 255 > INT32_MAX) return "a channel's weights can overflow a 32-bit sum";
    if (sum != p.colsum[i]) return "a column sum does not match its weights";
  }
  return nullptr;
}

size_t i32_rows_bytes(matrix m) { return m.n * m.k * 4; }
const char *i32_rows_check(const void *, matrix, bool) { return nullptr; }

struct codec {
  rs_type type;
  rs_layout layout;
  size_t widest;  // bytes an element at most, padding aside: for the overflow check
  size_t (*bytes)(matrix);
  void (*encode)(const float *, matrix, void *, const rounding *);  // nullptr: not from f32
  void (*decode)(const void *, matrix, float *);
  codec_check check;
  size_t (*row_stride)(matrix);  // tables whose rows can be read one by one; else nullptr
};

size_t f32_rows_stride(matrix m) { return m.k * 4; }
size_t f16_rows_stride(matrix m) { return m.k * 2; }

constexpr codec codecs[] = {
    {RS_F32, RS_ROWS, 4, f32_rows_bytes, f32_rows_encode, f32_rows_decode, f32_rows_check, f32_rows_stride},
    {RS_F16, RS_ROWS, 2, f16_rows_bytes, f16_rows_encode, f16_rows_decode, f16_rows_check, f16_rows_stride},
    {RS_I32, RS_ROWS, 4, i32_rows_bytes, nullptr, nullptr, i32_rows_check, nullptr},
    {RS_W8, RS_ROWS, 5, w8_rows_bytes, w8_rows_encode, w8_rows_decode, w8_rows_check, w8_rows_stride},
    {RS_W4, RS_ROWS, 5, w4_rows_bytes, w4_rows_encode, w4_rows_decode, w4_rows_check, w4_rows_stride},
    {RS_F32, RS_PANELS, 4, f32_panels_bytes, f32_panels_encode, f32_panels_decode, f32_panels_check, nullptr},
    {RS_F16, RS_PANELS, 2, f16_panels_bytes, f16_panels_encode, f16_panels_decode, f16_panels_check, nullptr},
    {RS_W8, RS_PANELS, 9, w8_panels_bytes, w8_panels_encode, w8_panels_decode, w8_panels_check, nullptr},
    {RS_W4, RS_PANELS, 9, w4_panels_bytes, w4_panels_encode, w4_panels_decode, w4_panels_check, nullptr},
};

const char *layout_name(rs_layout layout) { return layout == RS_PANELS ? "panels" : "rows"; }

// The codec of a tensor and its shape as a matrix, with every limit checked before anything is multiplied out; nullptr with an
// error (always RS_ERR_ARGUMENT) where there is none.
const codec *find_codec(rs_type type, rs_layout layout, int rank, const int64_t *shape, matrix *m) {
  const auto fail = [](rs_status) -> const codec * { return nullptr; };
  if (as_matrix(rank, shape, m) != RS_OK) return nullptr;
  for (const codec &c : codecs) {
    if (c.type != type || c.layout != layout) continue;
    if (layout == RS_PANELS && (rank != 2 || shape[1] > max_features))
      return fail(rs_fail(RS_ERR_ARGUMENT, "shape %s: panels need [N,K] with K <= %lld", shape_text(rank, shape).c_str(),
                          static_cast<long long>(max_features)));
    size_t bytes;
    if (mul_overflows(m->n + panel_n, m->k + group_k, &bytes) || mul_overflows(bytes, c.widest, &bytes) || bytes > SIZE_MAX / 2)
      return fail(rs_fail(RS_ERR_ARGUMENT, "shape %s is too large", shape_text(rank, shape).c_str()));
    return &c;
  }
  return fail(rs_fail(RS_ERR_ARGUMENT, "there is no type %s in %s", rs_type_name(type), layout_name(layout)));
}

}  // namespace

const char *rs_type_name(rs_type type) {
  switch (type) {
    case RS_F32:
      return "f32";
    case RS_F16:
      return "f16";
    case RS_BF16:
      return "bf16";
    case RS_I32:
      return "i32";
    case RS_W8:
      return "w8";
    case RS_W4:
      return "w4";
  }
  return "?";
}

rs_status rs_tensor_bytes(rs_type type, rs_layout layout, int rank, const int64_t *shape, size_t *bytes) {
  return rs_guarded([&]() -> rs_status {
    matrix m = {};
    const codec *c = find_codec(type, layout, rank, shape, &m);
    if (!c) return RS_ERR_ARGUMENT;
    *bytes = c->bytes(m);
    return RS_OK;
  });
}

namespace {

rs_status encode(rs_type type, rs_layout layout, int rank, const int64_t *shape, const float *src, const rounding *r, void *dst,
                 size_t capacity) {
  matrix m = {};
  const codec *c = find_codec(type, layout, rank, shape, &m);
  if (!c) return RS_ERR_ARGUMENT;
  if (!c->encode) return rs_fail(RS_ERR_ARGUMENT, "type %s in %s can't be made from f32", rs_type_name(type), layout_name(layout));
  if (capacity < c->bytes(m)) return rs_fail(RS_ERR_LIMIT, "capacity is %zu bytes, needed %zu", capacity, c->bytes(m));
  if (!all_finite(src, m.n * m.k)) return rs_fail(RS_ERR_NUMERIC, "a value is NaN or infinite");
  if (type == RS_F16 && max_abs(src, m.n * m.k) >= 65520.0f) return rs_fail(RS_ERR_NUMERIC, "a value is too large for f16");
  c->encode(src, m, dst, r);
  return RS_OK;
}

}  // namespace

rs_status rs_tensor_encode(rs_type type, rs_layout layout, int rank, const int64_t *shape, const float *src, void *dst,
                           size_t capacity) {
  return rs_guarded([&] { return encode(type, layout, rank, shape, src, nullptr, dst, capacity); });
}

rs_status rs_tensor_decode(rs_type type, rs_layout layout, int rank, const int64_t *shape, const void *src, float *dst,
                           size_t capacity_elements) {
  return rs_guarded([&]() -> rs_status {
    matrix m = {};
    const codec *c = find_codec(type, layout, rank, shape, &m);
    if (!c) return RS_ERR_ARGUMENT;
    if (!c->decode)
      return rs_fail(RS_ERR_ARGUMENT, "type %s in %s can't be made into f32", rs_type_name(type), layout_name(layout));
    if (capacity_elements < m.n * m.k)
      return rs_fail(RS_ERR_LIMIT, "capacity is %zu elements, needed %zu", capacity_elements, m.n * m.k);
    c->decode(src, m, dst);
    return RS_OK;
  });
}

// ================================================================================ 6  reference kernels
//
// A row of kernels is all that an ISA has to supply.  The scalar row is always built; the tests compare every other row with it:
// integer kernels and everything that a quantized linear layer computes bit for bit, the rest within a stated error.

namespace {

struct row_quant {  // an activation row as u8: x = scale (q - zero)
  float scale;
  int32_t zero;
};

constexpr int product_rows = 64;

// 1.5 * 2^23: what is added to it (up to 2^22) is rounded to a whole number, which is the sum's last bits.
constexpr float whole_numbers = 12582912;
constexpr size_t acc_panel(int rows) { return round_up(static_cast<size_t>(rows), 16) * panel_n; }
constexpr size_t l1_steps = 384;  // steps of an f32 panel that take 24 KiB
constexpr size_t w4_part = 512;   // inputs of a w4 panel that are unpacked at a time: 8 KiB as bytes

// What becomes of the sums of an integer product: y = act((sum - zero colsum) (row scale x channel scale) + bias).
struct linear_result {
  const row_quant *rq;  // of the rows
  const float *scale;   // of the channels, like the next two
  const int32_t *colsum;
  const float *bias;  // or nullptr
  rs_activation act;
  float *y;
  size_t ldy;
  linear_result from(int row, int panel) const {
    const int channel = panel * panel_n;
    return {rq + row, scale + channel, colsum + channel, bias ? bias + channel : nullptr, act, y + row * ldy + channel, ldy};
  }
};

constexpr int linear_group = 3;  // panels of an integer product: their weights and their sums stay in L1

// Parts of a thread's scratch, one behind the other; with `memory` nullptr, only how many bytes they take.
struct scratch_parts {
  char *memory;
  size_t bytes = 0;
  explicit scratch_parts(char *memory) : memory(memory) {}
  template <class T = float>
  T *take(size_t n) {
    T *at = reinterpret_cast<T *>(memory + bytes);
    bytes += round_up(n * sizeof(T), align_data);
    return at;
  }
};

// Attention of one head of some queries of a sequence, for q, k and v that are quantized layers' results, where the ISA has
// something faster than f32 for what is noisy anyway.
constexpr int attn_keys = 128, attn_rows = 64, attn_most_d = 128;
struct attn_input {  // rows of d
  const void *data;
  int64_t stride;  // in values
  bool bf16;       // or f32
};
struct attn_problem {
  attn_input q, k, v;            // from the first query on, and from the first key of the sequence
  int64_t first_query, queries;  // first_query: its place in the sequence, a multiple of 16
  int64_t first_key, keys;       // whole blocks of attn_keys that any of them sees: places of the first key and behind the last
  int64_t behind, ahead;         // how far from a query the keys are that it sees
  size_t d;                      // at most attn_most_d
  float scale;
  const float *sizes;  // of the keys, or nullptr
  int64_t ld_sizes;
  float *out;
  int64_t ldo;
  char *scratch;  // scratch_bytes(d, queries), 64-byte aligned
};
struct attn_kernels {
  rs_type type;  // of its products
  size_t (*scratch_bytes)(size_t d, size_t queries);
  void (*attend)(const attn_problem &p);
  // x [rows][ldx] as bf16 to y [rows][ldy], n columns of them: what `attend` would round by itself.
  void (*round_rows)(const float *x, size_t ldx, int rows, size_t n, uint16_t *y, int64_t ldy);
};

struct kernel_row {
  const char *name;
  bool (*available)();

  // Products of at most product_rows rows and any number of panels.
  // c [rows][ldc] (+)= a [rows][lda] times k steps of 16 values, f32 or f16; a panel begins `stride` values after the one before.
  // An element does not depend on the other rows and panels of the call.
  void (*f32_panels)(const float *a, size_t lda, int rows, const float *b, size_t stride, int panels, size_t k, float *c,
                     size_t ldc, bool add);
  void (*f16_panels)(const float *a, size_t lda, int rows, const uint16_t *b, size_t stride, int panels, size_t k, float *c,
                     size_t ldc);
  // What becomes of the sums over k of a [rows][kp] u8 times w8 panels, at most linear_group of them.  A kernel may read rows of
  // `a` up to the next multiple of 16: there is memory, of no meaning.
  void (*w8_panels)(const uint8_t *a, size_t kp, int rows, const int8_t *w, int panels, const linear_result &to);
  // The same for w4 panels and their multipliers [kp / 32][16].
  void (*w4_panels)(const uint8_t *a, size_t kp, int rows, const uint8_t *w, const uint8_t *mult, int panels,
                    const linear_result &to);

  // x [rows][k], times `scale` [k] where that is not nullptr, to q [rows][kp], the padding filled with the zero point (any value
  // would do: the weights there are zero).
  void (*quantize)(const float *x, size_t ldx, const float *scale, int64_t rows, size_t k, size_t kp, row_quant *rq, uint8_t *q);
  // y [rows][ldy] = act(y + bias), 16 channels, in place: what follows a product of floats.  bias may be nullptr.
  void (*finish_f32)(const float *bias, int rows, rs_activation act, float *y, size_t ldy);

  void (*layer_norm)(const float *x, const float *residual, const float *gamma, const float *beta, float eps, size_t n, float *y);

  // rs_shift of one row.
  float (*shift)(const float *to, const float *from, size_t n, rs_distance distance);

  // A block of keys in an online softmax (arXiv 1805.02867).  scores [rows][ld], ld a multiple of 16: the first n of a row become
  // exp(scale score - m), those up to the next multiple of 16 zero.  most [rows]: m, the largest scale score so far.  correction:
  // exp(old m - m), by which what was made of earlier blocks has to be multiplied.  total: the sum of all.
  void (*softmax)(float *scores, size_t ld, int rows, size_t n, float scale, bool first, float *most, float *total,
                  float *correction);
  // rs_rope of a row of heads of d columns: cosines [half], sines [half] of the row.
  void (*rope)(const float *x, const float *table, size_t heads, size_t d, size_t half, float *y);
  const attn_kernels *coarse_attn;  // for q, k, v of quantized layers; nullptr: as for others

  // `steps` times the instructions that products with weights of that type (F32, W8, W4) cannot do without, on registers, in chains
  // enough to hide their latency.  Returns the multiply-accumulates that this is worth.
  double (*peak)(rs_type type, size_t steps);
};

// For rows of kernels that make all sums of a call, acc_panel(rows) a panel and [rows][16] in it, before anything becomes of them.
// They may write rows up to the next multiple of 16.
template <auto sums, auto finish>
void w8_in_steps(const uint8_t *a, size_t kp, int rows, const int8_t *w, int panels, const linear_result &to) {
  alignas(align_data) int32_t acc[linear_group * acc_panel(product_rows)];
  sums(a, kp, rows, w, panels, acc);
  for (int p = 0; p < panels; p++) finish(acc + static_cast<size_t>(p) * acc_panel(rows), rows, to.from(0, p));
}
template <auto sums, auto finish>
void w4_in_steps(const uint8_t *a, size_t kp, int rows, const uint8_t *w, const uint8_t *mult, int panels,
                 const linear_result &to) {
  alignas(align_data) int32_t acc[linear_group * acc_panel(product_rows)];
  sums(a, kp, rows, w, mult, panels, acc);
  for (int p = 0; p < panels; p++) finish(acc + static_cast<size_t>(p) * acc_panel(rows), rows, to.from(0, p));
}

RS_ONCE void f32_panels_scalar(const float *a, size_t lda, int rows, const float *b, size_t stride, int panels, size_t k, float *c,
                               size_t ldc, bool add) {
  for (int p = 0; p < panels; p++, b += stride, c += panel_n)
    for (int r = 0; r < rows; r++) {
      float acc[panel_n] = {};
      if (add) memcpy(acc, c + r * ldc, sizeof acc);
      for (size_t i = 0; i < k; i++)
        for (int j = 0; j < panel_n; j++) acc[j] += a[r * lda + i] * b[i * panel_n + j];
      memcpy(c + r * ldc, acc, sizeof acc);
    }
}

void f16_panels_scalar(const float *a, size_t lda, int rows, const uint16_t *b, size_t stride, int panels, size_t k, float *c,
                       size_t ldc) {
  float wide[256 * panel_n];  // as f32, some steps at a time
  for (int p = 0; p < panels; p++, b += stride, c += panel_n)
    for (size_t i = 0; i < k; i += 256) {
      const size_t steps = std::min<size_t>(256, k - i);
      for (size_t j = 0; j < steps * panel_n; j++) wide[j] = half_to_float(b[i * panel_n + j]);
      f32_panels_scalar(a + i, lda, rows, wide, 0, 1, steps, c, ldc, i > 0);
    }
}

RS_ONCE void w8_panels_scalar(const uint8_t *a, size_t kp, int rows, const int8_t *w, int panels, int32_t *acc) {
  for (int p = 0; p < panels; p++, w += kp * panel_n, acc += acc_panel(rows))
    for (int r = 0; r < rows; r++) {
      uint32_t sum[panel_n] = {};  // unsigned: weights of a hostile file may wrap, which must not be undefined
      for (size_t k = 0; k < kp; k++)
        for (int j = 0; j < panel_n; j++)
          sum[j] += static_cast<uint32_t>(a[r * kp + k] * w[(k / panel_k * panel_n + j) * panel_k + k % panel_k]);
      memcpy(acc + r * panel_n, sum, sizeof sum);
    }
}

RS_ONCE void w4_panels_scalar(const uint8_t *a, size_t kp, int rows, const uint8_t *w, const uint8_t *mult, int panels,
                              int32_t *acc) {
  for (int p = 0; p < panels; p++, w += kp * panel_n / 2, mult += kp / group_k * panel_n, acc += acc_panel(rows))
    for (int r = 0; r < rows; r++) {
      uint32_t sum[panel_n] = {};
      for (size_t k = 0; k < kp; k++)
        for (int j = 0; j < panel_n; j++) {
          const int nibble = w[k / panel_k * 32 + j % 8 * panel_k + k % panel_k] >> (j < 8 ? 0 : 4) & 15;
          sum[j] += static_cast<uint32_t>(a[r * kp + k] * (nibble - 8) * mult[k / group_k * panel_n + j]);
        }
      memcpy(acc + r * panel_n, sum, sizeof sum);
    }
}

// 255 steps from the smallest to the largest value (low <= 0 <= high, so that zero stays exact).  Shared by all rows of kernels:
// the same bits everywhere.  A row that holds NaN or infinity gets the scale NaN, so that the result shows it.
row_quant quant_range(float low, float high) {
  const float scale = (high - low) / 255;
  if (!std::isfinite(scale)) return {NAN, 0};
  if (scale < FLT_MIN) return {FLT_MIN, 0};  // nothing but zeros (or denormals)
  return {scale, static_cast<int32_t>(std::lrint(-low / scale))};
}

uint8_t quantize_one(float x, float inverse, int32_t zero) {
  const float v = std::min(std::max(std::nearbyint(x * inverse), -256.0f), 256.0f);
  return static_cast<uint8_t>(std::min(std::max(static_cast<int32_t>(v) + zero, 0), 255));
}

float scaled_one(const float *x, const float *scale, size_t i) { return scale ? x[i] * scale[i] : x[i]; }

// Of columns from i on, behind the last whole register: whether one is NaN.
RS_ONCE bool range_rest(const float *x, const float *scale, size_t i, size_t k, float *low, float *high) {
  bool nan = false;
  for (; i < k; i++) {
    const float v = scaled_one(x, scale, i);
    *low = std::min(*low, v), *high = std::max(*high, v), nan |= std::isnan(v);
  }
  return nan;
}

row_quant quantize_row_scalar(const float *x, const float *scale, size_t k, size_t kp, uint8_t *q) {
  float low = 0, high = 0;
  const bool nan = range_rest(x, scale, 0, k, &low, &high);
  const row_quant rq = nan ? row_quant{NAN, 0} : quant_range(low, high);
  if (std::isnan(rq.scale)) {
    memset(q, 0, kp);
    return rq;
  }
  const float inverse = 1 / rq.scale;
  for (size_t i = 0; i < k; i++) q[i] = quantize_one(scaled_one(x, scale, i), inverse, rq.zero);
  memset(q + k, rq.zero, kp - k);
  return rq;
}
void quantize_scalar(const float *x, size_t ldx, const float *scale, int64_t rows, size_t k, size_t kp, row_quant *rq, uint8_t *q) {
  for (; rows > 0; rows--, x += ldx, q += kp) *rq++ = quantize_row_scalar(x, scale, k, kp, q);
}

float activate_one(rs_activation act, float x) {
  switch (act) {
    case RS_ACT_NONE:
      return x;
    case RS_ACT_GELU:
      return 0.5f * x * (1 + std::erf(x * 0.70710678f));
    case RS_ACT_GELU_TANH:
      return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case RS_ACT_RELU:
      return x < 0 ? 0 : x;  // this way round NaN stays NaN
    case RS_ACT_SILU:
      return x / (1 + std::exp(-x));
    case RS_ACT_TANH:
      return std::tanh(x);
    case RS_ACT_QUICK_GELU:
      return x / (1 + std::exp(-1.702f * x));
  }
  return x;
}

void finish_scalar(const int32_t *acc, int rows, const linear_result &to) {
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < panel_n; j++) {
      const uint32_t centred =
          static_cast<uint32_t>(acc[r * panel_n + j]) - static_cast<uint32_t>(to.rq[r].zero) * static_cast<uint32_t>(to.colsum[j]);
      const float v = static_cast<float>(static_cast<int32_t>(centred)) * (to.rq[r].scale * to.scale[j]);
      to.y[r * to.ldy + j] = activate_one(to.act, to.bias ? v + to.bias[j] : v);
    }
}

void finish_f32_scalar(const float *bias, int rows, rs_activation act, float *y, size_t ldy) {
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < panel_n; j++) y[r * ldy + j] = activate_one(act, y[r * ldy + j] + (bias ? bias[j] : 0));
}

// layer_norm's rests: x and residual to y, and their sum; squares of what is left less the mean; the result.
RS_ONCE float norm_rest_sum(const float *x, const float *residual, size_t i, size_t n, float *y) {
  float sum = 0;
  for (; i < n; i++) sum += y[i] = residual ? x[i] + residual[i] : x[i];
  return sum;
}
RS_ONCE float norm_rest_squares(const float *y, float mean, size_t i, size_t n) {
  float sum = 0;
  for (; i < n; i++) sum += (y[i] - mean) * (y[i] - mean);
  return sum;
}
RS_ONCE void norm_rest(float mean, float factor, const float *gamma, const float *beta, size_t i, size_t n, float *y) {
  for (; i < n; i++) y[i] = (y[i] - mean) * factor * gamma[i] + beta[i];
}

void layer_norm_scalar(const float *x, const float *residual, const float *gamma, const float *beta, float eps, size_t n,
                       float *y) {
  double sum = 0, sum_sq = 0;
  for (size_t i = 0; i < n; i++) sum += y[i] = residual ? x[i] + residual[i] : x[i];
  const auto mean = static_cast<float>(sum / static_cast<double>(n));
  for (size_t i = 0; i < n; i++) {
    y[i] -= mean;
    sum_sq += y[i] * y[i];
  }
  const float factor = 1 / std::sqrt(static_cast<float>(sum_sq / static_cast<double>(n)) + eps);
  for (size_t i = 0; i < n; i++) y[i] = y[i] * factor * gamma[i] + beta[i];
}

// Of the sums a b, a a and b b.  A row of zeros is as far from others as an orthogonal one.
float one_minus_cosine(float ab, float aa, float bb) {
  const float norms = std::sqrt(aa) * std::sqrt(bb);
  return norms == 0 ? 1 : 1 - ab / norms;
}

float shift_scalar(const float *to, const float *from, size_t n, rs_distance distance) {
  double ab = 0, aa = 0, bb = 0, sum = 0;
  for (size_t i = 0; i < n; i++) {
    const double a = to[i], b = from ? from[i] : 0;
    ab += a * b, aa += a * a, bb += b * b;
    sum += distance == RS_DISTANCE_L1 ? std::fabs(a - b) : (a - b) * (a - b);
  }
  if (distance == RS_DISTANCE_COS) return one_minus_cosine(static_cast<float>(ab), static_cast<float>(aa), static_cast<float>(bb));
  return static_cast<float>(distance == RS_DISTANCE_L1 ? sum : std::sqrt(sum));
}

void softmax_scalar(float *scores, size_t ld, int rows, size_t n, float scale, bool first, float *most, float *total,
                    float *correction) {
  for (int r = 0; r < rows; r++, scores += ld) {
    float here = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) here = std::max(here, scores[i]);
    here *= scale;
    const float before = first ? here : most[r], now = std::max(before, here);
    for (size_t i = 0; i < round_up(n, panel_n); i++) sum += scores[i] = i < n ? std::exp(scale * scores[i] - now) : 0;
    correction[r] = std::exp(before - now);
    total[r] = first ? sum : total[r] * correction[r] + sum;
    most[r] = now;
  }
}

// A head of rs_rope from column i < half on: of both halves, and all behind them.
__attribute__((noinline)) void rotate_rest(const float *x, const float *table, size_t i, size_t d, size_t half, float *y) {
  for (; i < half; i++) {
    const float a = x[i], b = x[half + i], c = table[i], s = table[half + i];
    y[i] = a * c - b * s;
    y[half + i] = b * c + a * s;
  }
  for (i = 2 * half; i < d; i++) y[i] = x[i];
}
void rope_scalar(const float *x, const float *table, size_t heads, size_t d, size_t half, float *y) {
  for (size_t head = 0; head < heads; head++, x += d, y += d) rotate_rest(x, table, 0, d, half, y);
}

// The compiler chooses the instructions of this row, so its kernels themselves are measured, on data in L1.
double peak_scalar(rs_type type, size_t steps) {
  constexpr int rows = 4, k = 2 * group_k;
  struct {
    float a[rows * k], b[k * panel_n], c[rows * panel_n];
    uint8_t q[rows * k], w4[k * panel_n / 2], mult[k / group_k * panel_n];
    int8_t w8[k * panel_n];
    int32_t acc[rows * panel_n];
  } data = {};
  for (size_t i = 0; i < steps; i++) {
    __asm__ volatile("" : : "r"(&data) : "memory");  // to the compiler, every step has new operands and a reader of its results
    if (type == RS_W8) w8_panels_scalar(data.q, k, rows, data.w8, 1, data.acc);
    else if (type == RS_W4) w4_panels_scalar(data.q, k, rows, data.w4, data.mult, 1, data.acc);
    else f32_panels_scalar(data.a, k, rows, data.b, 0, 1, k, data.c, panel_n, false);
  }
  return static_cast<double>(steps) * rows * k * panel_n;
}

// gelu's rational function: see `normal` among the vector kernels.  Q ends with t^5; the last bits are such that gelu's error is
// least.
constexpr float normal_p[] = {341157.25f,          29258.087890625f,   4013.70556640625f,
                              146.75836181640625f, 5.377216339111328f, 0.01877174898982048f};
constexpr float normal_q[] = {855154.3125f, 215864.578125f, 24660.28515625f, 1625.544677734375f, 63.36388397216797f};

// The same for |x| in 32 parts by their parabolas, of f in -1/2 … 1/2 about k / scale, through the function at three points.  From
// the last on it is 1/2.  Error 8e-6.
struct normal_parts {
  static constexpr float scale = 6.4f;
  alignas(align_data) float c[3][32] = {};
  constexpr normal_parts() {
    constexpr double f = 0.4330127018922193;  // sqrt(3) / 4, of Chebyshev
    for (int k = 0; k < 31; k++) {
      const double low = value(k - f), middle = value(k), high = value(k + f);
      c[0][k] = static_cast<float>(middle);
      c[1][k] = static_cast<float>((high - low) / (2 * f));
      c[2][k] = static_cast<float>((high + low - 2 * middle) / (2 * f * f));
    }
    c[0][31] = 0.5f;
  }

 private:
  static constexpr double value(double at) {
    const double x = at / static_cast<double>(scale), t = x * x;
    double p = static_cast<double>(normal_p[5]), q = 1;
    for (int i = 4; i >= 0; i--) p = p * t + static_cast<double>(normal_p[i]), q = q * t + static_cast<double>(normal_q[i]);
    return x * p / q;
  }
};
constexpr normal_parts normal_table;

bool always() { return true; }

// Call f<act>(...) of the activation that `act` is.
#define RS_FOR_ACTIVATION(act, f, ...) \
  switch (act) { \
    case RS_ACT_NONE: \
      return f<RS_ACT_NONE>(__VA_ARGS__); \
    case RS_ACT_GELU: \
      return f<RS_ACT_GELU>(__VA_ARGS__); \
    case RS_ACT_GELU_TANH: \
      return f<RS_ACT_GELU_TANH>(__VA_ARGS__); \
    case RS_ACT_RELU: \
      return f<RS_ACT_RELU>(__VA_ARGS__); \
    case RS_ACT_SILU: \
      return f<RS_ACT_SILU>(__VA_ARGS__); \
    case RS_ACT_TANH: \
      return f<RS_ACT_TANH>(__VA_ARGS__); \
    case RS_ACT_QUICK_GELU: \
      return f<RS_ACT_QUICK_GELU>(__VA_ARGS__); \
  }

constexpr kernel_row scalar_row = {
    "scalar",
    always,
    f32_panels_scalar,
    f16_panels_scalar,
    w8_in_steps<w8_panels_scalar, finish_scalar>,
    w4_in_steps<w4_panels_scalar, finish_scalar>,
    quantize_scalar,
    finish_f32_scalar,
    layer_norm_scalar,
    shift_scalar,
    softmax_scalar,
    rope_scalar,
    nullptr,
    peak_scalar,
};

}  // namespace

// ================================================================================ 7  ISA kernels

#ifdef RS_X86
namespace {

// Vector code is written once, against a handful of primitives that each ISA defines in a namespace of its own; this file then
// includes the part of itself at its top, RS_VECTOR_PART, which defines everything else there: layer_norm, softmax … What is left
// to each ISA is the integer dot product, where they really differ.
//
// min and max return the second operand where one is NaN.

// ---- AVX2 + FMA + F16C: 8 floats

namespace avx2 {

bool available() { return cpu().avx2 && cpu().fma && cpu().f16c; }

#define RS_TARGET RS_AVX2
#define RS_INLINE RS_AVX2 inline __attribute__((always_inline))
#define RS_NOISY_GELU(x) activate_one(RS_ACT_GELU, x)
using vf = __m256;
constexpr int lanes = 8;
constexpr int float_tile_rows = 6, float_tile_panels = 1;  // 12 sums, two of b, one of a: of 16 registers

RS_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
RS_INLINE vf load(const float *p) { return _mm256_loadu_ps(p); }
RS_INLINE vf load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
RS_INLINE void store(float *p, vf x) { _mm256_storeu_ps(p, x); }
RS_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
RS_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
RS_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
RS_INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
RS_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
RS_INLINE vf fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
RS_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
RS_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
RS_INLINE vf round(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
RS_INLINE vf if_less(vf a, vf b, vf yes, vf no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
RS_INLINE vf pow2(vf n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// p 2^n for whole n, in two factors, so that n = 128 does not overflow before its time.
RS_INLINE vf scale2(vf p, vf n) {
  const vf cut = min(max(n, set1(-200)), set1(200)), half = round(mul(cut, set1(0.5f)));
  return mul(mul(p, pow2(half)), pow2(sub(cut, half)));
}
// p 2^n for n from -126 to 127; t = 1.5 * 2^23 + n, in whose last bits it is.
RS_INLINE vf times_pow2(vf p, vf, vf t) {
  return mul(p, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t), 23), _mm256_set1_epi32(127 << 23))));
}
RS_INLINE bool any_nan(vf x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
// low <= -0 and 0 <= high, the range of what was seen so far, to take in x, of which NaN stays.  As integers: floats of a sign are
// in the order of their bits, NaN last.
RS_INLINE void widen(vf &low, vf &high, vf x) {
  low = _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(low), _mm256_castps_si256(x)));
  high = _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(high), _mm256_castps_si256(x)));
}
RS_INLINE float largest(vf x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
RS_INLINE float sum(vf x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
// acc - zero colsum, as floats.
RS_INLINE vf centred(__m256i acc, int32_t zero, __m256i colsum) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(acc, _mm256_mullo_epi32(_mm256_set1_epi32(zero), colsum)));
}
RS_INLINE vf centred(const int32_t *acc, int32_t zero, const int32_t *colsum) {
  return centred(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(acc)), zero,
                 _mm256_loadu_si256(reinterpret_cast<const __m256i *>(colsum)));
}
// Four registers of x rounded, plus zero, cut to 0 … 255.  |x| <= 256.
RS_INLINE void store_u8(uint8_t *q, const vf *x, int32_t zero) {
  const __m256i add = _mm256_set1_epi16(static_cast<int16_t>(zero));
  const __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
  const __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32(x[2]), _mm256_cvtps_epi32(x[3]));
  // Either half of `bytes` is four values of each of the registers.
  const __m256i bytes = _mm256_packus_epi16(_mm256_add_epi16(a, add), _mm256_add_epi16(b, add));
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(q), _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0)));
}
// To the compiler, x is changed and read here: what rs_measure_peak times must be computed, and neither once for all steps nor once
// for all chains.
template <class V>
RS_INLINE void hide(V &x) {
  __asm__ volatile("" : "+x"(x));
}

#define RS_VECTOR_PART
#include "rs.cpp"  // NOLINT(bugprone-suspicious-include)
#undef RS_VECTOR_PART

using vi = __m256i;
constexpr int panel_width = 2;
constexpr int byte_tile_rows = 4, byte_tile_panels = 1;  // 8 sums
constexpr int peak_chains = 10;

RS_INLINE vi zero_int() { return _mm256_setzero_si256(); }
RS_INLINE vi load_int(const void *p) { return _mm256_loadu_si256(static_cast<const vi *>(p)); }
RS_INLINE void store_int(void *p, vi x) { _mm256_storeu_si256(static_cast<vi *>(p), x); }
RS_INLINE vi broadcast4(const uint8_t *a) {
  int32_t four;
  memcpy(&four, a, 4);
  return _mm256_set1_epi32(four);
}
RS_INLINE vi dot(vi acc, vi x, vi b) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, b), _mm256_set1_epi16(1)));
}
#define RS_W4_GROUPS
#define RS_INTEGER_PART
#include "rs.cpp"  // NOLINT(bugprone-suspicious-include)
#undef RS_INTEGER_PART
#undef RS_W4_GROUPS

// ---- w4 in groups: 32 inputs sum up in 16 bits, then vpmaddwd, which widens, multiplies by the group's scale

// A step's nibbles to bytes: -8 … 7.
RS_INLINE void unpack_step(const uint8_t *w, int8_t *to) {
  const vi low = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8), nibbles = load_int(w);
  store_int(to, _mm256_sub_epi8(_mm256_and_si256(nibbles, low), eight));
  store_int(to + 32, _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(nibbles, 4), low), eight));
}
RS_INLINE vi group_dot(vi sum, vi x, vi b) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, b)); }
RS_INLINE vi group_scale(const uint8_t *mult) {  // of 8 channels, twice in a lane, once for either 16-bit sum of the channel
  const vi m = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(mult)));
  return _mm256_or_si256(m, _mm256_slli_epi32(m, 16));
}
RS_INLINE vi group_add(vi acc, vi sum, vi m) { return _mm256_add_epi32(acc, _mm256_madd_epi16(sum, m)); }

// += over n inputs of a panel in bytes, a group at a time.  The sums of 32 bits stay in memory: beside those of 16 there are no
// registers for them.  `next` [n / 2 * 16]: nibbles to be fetched.
template <int R>
RS_TARGET void group_rows(const uint8_t *a, size_t kp, size_t n, int rows, const int8_t *w, const uint8_t *mult,
                          const uint8_t *next, int32_t *acc) {
  for (; rows >= R; rows -= R, a += R * kp, acc += R * panel_n)
    for (size_t group = 0; group < n; group += group_k) {
      vi sum[2 * R];
#pragma GCC unroll 8
      for (vi &s : sum) s = zero_int();
#pragma GCC unroll 8
      for (size_t step = 0; step < group_k / panel_k; step++) {
        const size_t k = group + step * panel_k;
        if (step % 2 == 0) __builtin_prefetch(next + k * 8);
        vi b[2] = {load_int(w + k * panel_n), load_int(w + k * panel_n + 32)};
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const vi x = broadcast4(a + r * kp + k);
          sum[2 * r] = group_dot(sum[2 * r], x, b[0]);
          sum[2 * r + 1] = group_dot(sum[2 * r + 1], x, b[1]);
          hide(sum[2 * r]);  // or the compiler takes the steps in another order, and runs out of registers
          hide(sum[2 * r + 1]);
        }
      }
      const uint8_t *group_mult = mult + group / group_k * panel_n;
      const vi m[2] = {group_scale(group_mult), group_scale(group_mult + 8)};
#pragma GCC unroll 8
      for (int i = 0; i < 2 * R; i++) store_int(acc + i * 8, group_add(load_int(acc + i * 8), sum[i], m[i % 2]));
    }
  if constexpr (R > 1)
    if (rows) group_rows<R - 1>(a, kp, n, rows, w, mult, next, acc);
}

RS_TARGET void w4_panels(const uint8_t *a, size_t kp, int rows, const uint8_t *w, const uint8_t *mult, int panels,
                         const linear_result &to) {
  alignas(align_data) int8_t bytes[w4_part * panel_n];
  alignas(align_data) int32_t acc[acc_panel(product_rows)];
  for (int p = 0; p < panels; p++) {
    memset(acc, 0, static_cast<size_t>(rows) * panel_n * sizeof *acc);
    for (size_t k = 0, n; k < kp; k += n, w += n * 8, mult += n / group_k * panel_n) {
      n = std::min(w4_part, kp - k);
      for (size_t i = 0; i < n; i += panel_k) unpack_step(w + i * 8, bytes + i * panel_n);
      group_rows<4>(a + k, kp, n, rows, bytes, mult, w + n * 8, acc);
    }
    finish_panels<1>(acc, acc_panel(rows), rows, to.from(0, p));
  }
}

RS_TARGET double w4_peak(size_t steps) {  // a step: a group
  constexpr int chains = peak_chains / 2;
  const uint8_t inputs[4] = {5, 5, 5, 5}, weights[4] = {3, 3, 3, 3}, scales[8] = {7, 7, 7, 7, 7, 7, 7, 7};
  vi acc[chains], sum[chains], x = broadcast4(inputs);
  const vi b = broadcast4(weights), m = group_scale(scales);
#pragma GCC unroll 12
  for (vi &total : acc) hide(total = zero_int());
  for (size_t i = 0; i < steps; i++) {
#pragma GCC unroll 12
    for (vi &part : sum) part = zero_int();
#pragma GCC unroll 8
    for (int k = 0; k < group_k; k += panel_k) {
#pragma GCC unroll 12
      for (vi &part : sum) {
        hide(x);
        part = group_dot(part, x, b);
        hide(part);  // or the compiler makes a tree of the chain, and runs out of registers
      }
    }
#pragma GCC unroll 12
    for (int c = 0; c < chains; c++) acc[c] = group_add(acc[c], sum[c], m);
  }
#pragma GCC unroll 12
  for (vi &total : acc) hide(total);
  const size_t lanes32 = sizeof(vi) / panel_k;
  return static_cast<double>(steps * chains * lanes32 * group_k);
}
double peak(rs_type type, size_t steps) {
  return type == RS_W8 ? w8_peak(steps) : type == RS_W4 ? w4_peak(steps) : f32_peak(steps);
}

constexpr kernel_row row = {"avx2",     available,  f32_panels, f16_panels, w8_panels, w4_panels, quantize,
                            finish_f32, layer_norm, shift,      softmax,    rope,      nullptr,   peak};

#undef RS_TARGET
#undef RS_INLINE
#undef RS_NOISY_GELU

}  // namespace avx2

// ---- AVX-VNNI: the floats of AVX2, and vpdpbusd, which adds four u8 x s8 products into 32 bits

namespace avxvnni {

bool available() { return avx2::available() && cpu().avxvnni; }

#define RS_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define RS_INLINE RS_TARGET inline __attribute__((always_inline))
using avx2::broadcast4, avx2::f32_peak, avx2::finish_panels, avx2::vf, avx2::load, avx2::set1, avx2::mul, avx2::add, avx2::centred,
    avx2::store, avx2::hide, avx2::load_int, avx2::panel_width, avx2::store_int, avx2::vi, avx2::zero_int;
constexpr int byte_tile_rows = 6, byte_tile_panels = 1;  // 12 sums
constexpr int peak_chains = 12;

RS_INLINE vi dot(vi acc, vi x, vi b) { return _mm256_dpbusd_avx_epi32(acc, x, b); }
// n inputs of a panel of nibbles, times their multipliers, to bytes.  Two nibbles, 0 … 15, in 16 bits are multiplied at once:
// neither product is over 240.  Then less 8 m.
RS_TARGET void w4_unpack(const uint8_t *w, const uint8_t *mult, size_t n, int8_t *to) {
  const vi low = _mm256_set1_epi8(15);
  for (size_t k = 0; k < n; k += group_k, mult += panel_n) {
    const vi m[2] = {avx2::group_scale(mult), avx2::group_scale(mult + 8)};
    vi eight[2];
    for (int h = 0; h < 2; h++) eight[h] = _mm256_slli_epi16(_mm256_or_si256(m[h], _mm256_slli_epi16(m[h], 8)), 3);
    for (int i = 0; i < group_k; i += panel_k, w += 32, to += 64) {
      const vi nibbles = load_int(w), high = _mm256_srli_epi16(nibbles, 4);
      store_int(to, _mm256_sub_epi8(_mm256_mullo_epi16(_mm256_and_si256(nibbles, low), m[0]), eight[0]));
      store_int(to + 32, _mm256_sub_epi8(_mm256_mullo_epi16(_mm256_and_si256(high, low), m[1]), eight[1]));
    }
  }
}

#define RS_INTEGER_PART
#include "rs.cpp"  // NOLINT(bugprone-suspicious-include)
#undef RS_INTEGER_PART

constexpr kernel_row row = {
    "avxvnni",        available,        avx2::f32_panels, avx2::f16_panels, w8_panels,  w4_panels, avx2::quantize,
    avx2::finish_f32, avx2::layer_norm, avx2::shift,      avx2::softmax,    avx2::rope, nullptr,   peak};

#undef RS_TARGET
#undef RS_INLINE

}  // namespace avxvnni

// ---- AVX-512 (F, BW, DQ, VL) + VNNI: 16 floats, a panel is one register wide

namespace avx512vnni {

bool available() { return avx2::available() && cpu().avx512vnni; }

#define RS_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define RS_INLINE RS_TARGET inline __attribute__((always_inline))
#define RS_NOISY_GELU noisy_gelu
using vf = __m512;
constexpr int lanes = 16;
constexpr int float_tile_rows = 8, float_tile_panels = 3;  // 24 sums, three of b, one of a: of 32 registers

RS_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
RS_INLINE vf load(const float *p) { return _mm512_loadu_ps(p); }
RS_INLINE vf load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
RS_INLINE void store(float *p, vf x) { _mm512_storeu_ps(p, x); }
RS_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
RS_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
RS_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
RS_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
RS_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
RS_INLINE vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
RS_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
RS_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
RS_INLINE vf round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
RS_INLINE vf if_less(vf a, vf b, vf yes, vf no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
RS_INLINE vf scale2(vf p, vf n) { return _mm512_scalef_ps(p, n); }
RS_INLINE vf times_pow2(vf p, vf n, vf) { return _mm512_scalef_ps(p, n); }
RS_INLINE bool any_nan(vf x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
RS_INLINE void widen(vf &low, vf &high, vf x) {
  low = _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(low), _mm512_castps_si512(x)));
  high = _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(high), _mm512_castps_si512(x)));
}
RS_INLINE float largest(vf x) { return _mm512_reduce_max_ps(x); }
RS_INLINE float sum(vf x) { return _mm512_reduce_add_ps(x); }
RS_INLINE vf centred(__m512i acc, int32_t zero, __m512i colsum) {
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(acc, _mm512_mullo_epi32(_mm512_set1_epi32(zero), colsum)));
}
RS_INLINE vf centred(const int32_t *acc, int32_t zero, const int32_t *colsum) {
  return centred(_mm512_loadu_si512(acc), zero, _mm512_loadu_si512(colsum));
}
RS_INLINE void store_u8(uint8_t *q, const vf *x, int32_t zero) {
  const __m512i add = _mm512_set1_epi16(static_cast<int16_t>(zero));
  const __m512i a = _mm512_packs_epi32(_mm512_cvtps_epi32(x[0]), _mm512_cvtps_epi32(x[1]));
  const __m512i b = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2]), _mm512_cvtps_epi32(x[3]));
  // Each 128 bits of `bytes` are four values of each of the registers.
  const __m512i bytes = _mm512_packus_epi16(_mm512_add_epi16(a, add), _mm512_add_epi16(b, add));
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  _mm512_storeu_si512(q, _mm512_permutexvar_epi32(order, bytes));
}
template <class V>
RS_INLINE void hide(V &x) {
  __asm__ volatile("" : "+v"(x));
}
// gelu to 8e-6 of x: of quantized layers, whose noise is more.  Three quarters of the time of the exact one.
RS_INLINE vf noisy_gelu(vf x) {
  const vf rounding = set1(whole_numbers);
  const vf size = _mm512_abs_ps(x), u = min(set1(31), mul(size, set1(normal_parts::scale)));  // NaN stays
  const vf t = add(u, rounding), f = sub(u, sub(t, rounding));
  const auto c = [&](int i) __attribute__((always_inline)) RS_TARGET {
    return _mm512_permutex2var_ps(load(normal_table.c[i]), _mm512_castps_si512(t), load(normal_table.c[i] + 16));
  };
  return fma(size, fma(fma(c(2), f, c(1)), f, c(0)), mul(set1(0.5f), x));
}

#define RS_VECTOR_PART
#include "rs.cpp"  // NOLINT(bugprone-suspicious-include)
#undef RS_VECTOR_PART

using vi = __m512i;
constexpr int panel_width = 1;
constexpr int byte_tile_rows = 8, byte_tile_panels = 3;  // 24 sums, three of weights, one of inputs: of 32 registers
constexpr int peak_chains = 24;

RS_INLINE vi zero_int() { return _mm512_setzero_si512(); }
RS_INLINE vi load_int(const void *p) { return _mm512_loadu_si512(p); }
RS_INLINE void store_int(void *p, vi x) { _mm512_storeu_si512(p, x); }
RS_INLINE vi broadcast4(const uint8_t *a) {
  int32_t four;
  memcpy(&four, a, 4);
  return _mm512_set1_epi32(four);
}
RS_INLINE vi dot(vi acc, vi x, vi b) { return _mm512_dpbusd_epi32(acc, x, b); }
RS_TARGET void w4_unpack(const uint8_t *w, const uint8_t *mult, size_t n, int8_t *to) {  // see avxvnni
  const __m256i low = _mm256_set1_epi8(15);
  for (size_t k = 0; k < n; k += group_k, mult += panel_n) {
    const vi wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(mult)));
    const vi m = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16)),
             eight = _mm512_slli_epi16(_mm512_or_si512(m, _mm512_slli_epi16(m, 8)), 3);
#pragma GCC unroll 8
    for (int i = 0; i < group_k; i += panel_k, w += 32, to += 64) {
      const __m256i nibbles = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w));
      const vi both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(nibbles, low)),
                                         _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), low), 1);
      store_int(to, _mm512_sub_epi8(_mm512_mullo_epi16(both, m), eight));
    }
  }
}

#define RS_INTEGER_PART
#include "rs.cpp"  // NOLINT(bugprone-suspicious-include)
#undef RS_INTEGER_PART

// ---- attention by bytes, for q, k and v of quantized layers: a head of a sequence at a time
//
// Scores are products of q, of which each row is scaled by its largest value, and k, of which 16 rows are, without the mean of the
// sequence's first keys: that would change all scores of a query by the same (SageAttention, arXiv 2410.02367).  They are made
// transposed, 16 keys by 16 queries a tile, so that a register holds a key's scores for 16 queries: largest and sum of a query are
// then sums of registers.
//
// Weights are bytes of which 254.5 is a block's largest, and what is lost where one is cut to a byte is added to the next but
// three, as error diffusion does with the brightness of pixels (Floyd and Steinberg 1976): many small weights, each below half a
// step, then still count as what they are together.  docs/kernels.md has what that is worth.

constexpr size_t tile_bytes = 1024;  // 16 rows of 64
constexpr int attn_group = 32;       // queries whose scores are made together
constexpr float most_growth = 6;     // of a query's largest score, in powers of two, before its sums are scaled anew
constexpr float log2_e = 1.44269504f;
constexpr float score_zero = whole_numbers;  // a whole number of up to 2^22 added to its bits is added to its value
size_t attn_columns(size_t d) { return round_up(d, panel_n) / panel_n; }

// 16 rows of 16 times 32 bits: each column to to(column, values).
template <class F>
RS_INLINE void transpose_16(const vi *rows, const F &to) {
  vi t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      u[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      u[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
    // u[4 a + c]: in its 128-bit part b, column 4 b + c of rows 4 a … 4 a + 3
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const vi a01 = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x88), a23 = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x88);
    const vi b01 = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xdd), b23 = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xdd);
    to(c, _mm512_shuffle_i32x4(a01, a23, 0x88));
    to(4 + c, _mm512_shuffle_i32x4(b01, b23, 0x88));
    to(8 + c, _mm512_shuffle_i32x4(a01, a23, 0xdd));
    to(12 + c, _mm512_shuffle_i32x4(b01, b23, 0xdd));
  }
}
RS_INLINE void store_transposed(const vi *rows, void *to) {
  transpose_16(
      rows, [&](int column, vi x) __attribute__((always_inline))
            RS_TARGET { store_int(static_cast<char *>(to) + 64 * column, x); });
}
// The largest of each of 16 registers, without signs.
RS_INLINE vi largest_of_each(const vi *x) {
  vi t[8], u[4], v[2];
  for (int i = 0; i < 8; i++)
    t[i] = _mm512_max_epu32(_mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; i++)
    u[i] = _mm512_max_epu32(_mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
  for (int i = 0; i < 2; i++)
    v[i] = _mm512_max_epu32(_mm512_shuffle_i32x4(u[2 * i], u[2 * i + 1], 0x88), _mm512_shuffle_i32x4(u[2 * i], u[2 * i + 1], 0xdd));
  return _mm512_max_epu32(_mm512_shuffle_i32x4(v[0], v[1], 0x88), _mm512_shuffle_i32x4(v[0], v[1], 0xdd));
}

// Which of the 16 columns from 16 c on there are.
inline __mmask16 columns_of(size_t d, size_t c) {
  const size_t left = d - c * panel_n;
  return static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
}

// What a group of queries sees of a block of keys: those of [begin, end), of which begin is a multiple of 32.  What it leaves out
// weighs nothing, so where a group begins does not show in the result.
struct attn_part {
  int begin, end;
  bool first;  // nothing was seen before
};
inline attn_part attn_seen(const attn_problem &p, size_t group, int64_t key, int n) {
  const int64_t query = p.first_query + static_cast<int64_t>(group) * attn_group, from = std::max<int64_t>(0, query - p.behind),
                to = query + attn_group + p.ahead;
  return {static_cast<int>(std::clamp<int64_t>(from - key, 0, n) / 32 * 32), static_cast<int>(std::clamp<int64_t>(to - key, 0, n)),
          from >= key};
}

// Do 16 queries from place `query` on see all keys from `key` on to behind `end`?
inline bool attn_sees_all(const attn_problem &p, int64_t query, int64_t key, int64_t end) {
  return key >= query + 15 - p.behind && end - 1 <= query + p.ahead;
}
// Which of them see a key.
RS_TARGET inline __mmask16 attn_visible(const attn_problem &p, int64_t query, int64_t key) {
  const vi places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const vi distance = _mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>(key - query + p.behind)), places);  // 0: the farthest
  return _mm512_cmple_epu32_mask(distance, _mm512_set1_epi32(static_cast<int>(p.behind + p.ahead)));
}

// out: [D / 16][16][16] of 16 queries, transposed, `stride` values before the next 16; total: of a query, what it is divided by.
RS_TARGET void attn_write(const attn_problem &p, const float *out, size_t stride, const float *total) {
  for (int64_t i = 0; i < p.queries; i += 16, out += stride, total += panel_n) {
    const vf inverse = div(set1(1), load(total));
    for (size_t c = 0; c < attn_columns(p.d); c++) {
      const __mmask16 there = columns_of(p.d, c);
      vi columns[16];
#pragma GCC unroll 16
      for (size_t j = 0; j < 16; j++) columns[j] = _mm512_castps_si512(mul(load(out + (c * panel_n + j) * panel_n), inverse));
      float *to = p.out + i * p.ldo + static_cast<int64_t>(c * panel_n);
      transpose_16(
          columns, [&](int row, vi x) __attribute__((always_inline)) RS_TARGET {
            if (i + row < p.queries) _mm512_mask_storeu_epi32(to + row * p.ldo, there, x);
          });
    }
  }
}

// The nearest bf16, in the upper half of 32 bits; NaN stays.
RS_INLINE vi to_bf16(vf x) {
  const vi bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const vi rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const vi safe = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits);
  return _mm512_and_si512(safe, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}
RS_TARGET void round_rows(const float *x, size_t ldx, int rows, size_t n, uint16_t *y, int64_t ldy) {
  for (int i = 0; i < rows; i++, x += ldx, y += ldy)
    for (size_t c = 0; c < n; c += panel_n) {
      const __mmask16 there = columns_of(n, c / panel_n);
      const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(to_bf16(_mm512_maskz_loadu_ps(there, x + c)), 16));
      _mm256_mask_storeu_epi16(y + c, there, half);
    }
}
// 16 columns of a row, as floats; those that are not there are zero.
RS_INLINE vf attn_load(const uint16_t *x, size_t c, __mmask16 there) {
  const __m256i half = _mm256_maskz_loadu_epi16(there, x + c * panel_n);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// 32 bf16 without their signs: in the order of their bits, NaN last.
RS_INLINE vi half_sizes(const uint16_t *x, __mmask32 there) {
  return _mm512_and_si512(_mm512_maskz_loadu_epi16(there, x), _mm512_set1_epi16(0x7fff));
}

// What a unit works on, in its scratch.
struct attn_bytes : scratch_parts {
  size_t columns, steps;                   // of d, 16 and 64 at a time
  __mmask16 there[attn_most_d / 16] = {};  // which columns there are, 16 at a time
  __mmask32 wide[attn_most_d / 32] = {};   // 32 at a time
  size_t query_stride, out_stride;
  uint8_t *keys;        // tiles of 16 keys by 64 of d, plus 128, of a block of attn_keys
  int8_t *values;       // tiles of 16 of d by 64 keys
  int8_t *queries;      // of 16 queries: [64 steps / 4][16][4]
  float *scores;        // [2][attn_keys][16] of a group: score_zero and the sum of products
  uint8_t *weights;     // [attn_keys / 4][16][4] where the scores of 16 queries were
  uint16_t *rows;       // [attn_keys][16 columns]: what is not bf16 becomes it here
  float *means;         // [16 columns] of the first keys
  float *value_scales;  // [16 columns] of the block
  float *factors;       // [16] of 16 queries: their scores' scale, in powers of two, and
  int32_t *starts;      // [16]: what their sums begin with: score_zero's bits less what 128 too much in the keys come to
  float *tops;          // [16]: the largest score of the block
  float *shares;        // [16]: two to the power of that, relative to `most`
  float *most, *total, *out;
  float *key_scales;        // [attn_keys / 16] of 16 keys, and
  float largest_scale = 0;  // not finite where a key is not

  attn_bytes(char *memory, size_t d, size_t n_queries)
      : scratch_parts(memory),
        columns(attn_columns(d)),
        steps(round_up(d, 64) / 64),
        query_stride(steps * tile_bytes),
        out_stride(columns * panel_n * panel_n) {
    for (size_t c = 0; c < columns; c++) {
      there[c] = columns_of(d, c);
      wide[c / 2] |= static_cast<__mmask32>(there[c]) << 16 * (c % 2);
    }
    const size_t groups = round_up(n_queries, attn_group), tiles = groups / panel_n;
    keys = take<uint8_t>(attn_keys / 16 * steps * tile_bytes);
    values = take<int8_t>(attn_keys / 64 * columns * tile_bytes);
    queries = take<int8_t>(tiles * query_stride);
    scores = take(2 * attn_keys * panel_n);
    weights = reinterpret_cast<uint8_t *>(scores);
    rows = take<uint16_t>(attn_keys * columns * panel_n);
    means = take(columns * panel_n);
    value_scales = take(round_up(columns, 2) * panel_n);
    key_scales = take(attn_keys / 16);
    starts = take<int32_t>(groups);
    factors = take(groups);
    tops = take(groups);
    shares = take(groups);
    most = take(groups);
    total = take(groups);
    out = take(tiles * out_stride);
  }
};

// n rows of x from `first` on, as bf16: where they are, or m.rows.
struct attn_rows {
  const uint16_t *data;
  int64_t stride;
  const uint16_t *row(int64_t i) const { return data + i * stride; }
};
__attribute__((noinline)) RS_TARGET attn_rows attn_take(const attn_input &x, int64_t first, int64_t n, size_t d,
                                                        const attn_bytes &m) {
  if (x.bf16) return {static_cast<const uint16_t *>(x.data) + first * x.stride, x.stride};
  const auto stride = static_cast<int64_t>(m.columns * panel_n);
  round_rows(static_cast<const float *>(x.data) + first * x.stride, static_cast<size_t>(x.stride), static_cast<int>(n), d, m.rows,
             stride);
  return {m.rows, stride};
}
// By what numbers of up to x are multiplied, so that 127 is the largest.
RS_INLINE vf byte_scale(vf x) { return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(x, set1(0), _CMP_NEQ_UQ), set1(127), x); }
// 64 values of a row times `by`, plus `add` (16 each), as bytes; `columns`: how many sixteens of them there are, and which of each.
RS_INLINE vi row_bytes(const uint16_t *x, size_t columns, const __mmask16 *there, vf by, const vf *add) {
  vi v[4];
#pragma GCC unroll 4
  for (size_t j = 0; j < 4; j++) v[j] = j < columns ? _mm512_cvtps_epi32(fma(attn_load(x, j, there[j]), by, add[j])) : zero_int();
  const vi bytes = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
  const vi order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_permutexvar_epi32(order, bytes);
}

__attribute__((noinline)) RS_TARGET void attn_take_queries(const attn_problem &p, const attn_bytes &m) {
  const vf none[4] = {set1(0), set1(0), set1(0), set1(0)};
  for (int64_t i = 0; i < p.queries; i += 16) {
    const int64_t n = std::min<int64_t>(16, p.queries - i);
    const attn_rows from = attn_take(p.q, i, n, p.d, m);
    // Where there are no queries, the last one again: nobody reads what becomes of them.
    const auto row = [&](int64_t j) { return from.row(std::min(j, n - 1)); };
    vi rows[16];
    for (int64_t j = 0; j < 16; j++) {
      vi largest = zero_int();
      for (size_t step = 0; 32 * step < p.d; step++)
        largest = _mm512_max_epu16(largest, half_sizes(row(j) + 32 * step, m.wide[step]));
      rows[j] = _mm512_max_epu16(largest, _mm512_slli_epi32(largest, 16));
    }
    const vf largest = _mm512_castsi512_ps(_mm512_and_si512(largest_of_each(rows), _mm512_set1_epi32(0x7fff0000)));
    alignas(64) float by[panel_n];
    store(m.factors + i, mul(largest, set1(p.scale * log2_e / 127)));
    store(by, byte_scale(largest));
    int8_t *to = m.queries + static_cast<size_t>(i / 16) * m.query_stride;
    vi sum = zero_int();
    for (size_t step = 0; step < m.steps; step++, to += tile_bytes) {
      for (int64_t j = 0; j < 16; j++)
        rows[j] = row_bytes(row(j) + 64 * step, m.columns - 4 * step, m.there + 4 * step, set1(by[j]), none);
      transpose_16(
          rows, [&](int four, vi x) __attribute__((always_inline)) RS_TARGET {
            store_int(to + 64 * four, x);
            sum = dot(sum, _mm512_set1_epi8(1), x);
          });
    }
    store_int(m.starts + i, _mm512_sub_epi32(_mm512_castps_si512(set1(score_zero)), _mm512_slli_epi32(sum, 7)));
  }
}

__attribute__((noinline)) RS_TARGET void attn_find_means(const attn_problem &p, const attn_bytes &m) {
  const int64_t n = std::min<int64_t>(attn_group, p.keys);
  const attn_rows from = attn_take(p.k, 0, n, p.d, m);
  for (size_t c = 0; c < m.columns; c++) {
    vf sum = set1(0);
    for (int64_t i = 0; i < n; i++) sum = add(sum, attn_load(from.row(i), c, m.there[c]));
    store(m.means + c * panel_n, mul(sum, set1(1 / static_cast<float>(n))));
  }
}

__attribute__((noinline)) RS_TARGET void attn_take_keys(const attn_problem &p, attn_bytes &m, int64_t first, int n) {
  const attn_rows from = attn_take(p.k, first, n, p.d, m);
  int32_t largest_bits = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const auto row = [&](int64_t j) { return from.row(std::min<int64_t>(i + j, n - 1)); };
    vi most = zero_int();
    for (size_t c = 0; c < m.columns; c++) {
      const vf mean = load(m.means + c * panel_n);
      for (int64_t j = 0; j < 16; j++)
        most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(sub(attn_load(row(j), c, m.there[c]), mean))));
    }
    const auto bits = static_cast<int32_t>(_mm512_reduce_max_epu32(most));
    float largest;
    memcpy(&largest, &bits, 4);
    largest_bits = std::max(largest_bits, bits);
    m.key_scales[i / 16] = largest / 127;
    const vf by = byte_scale(set1(largest));
    for (size_t step = 0; step < m.steps; step++) {
      uint8_t *to = m.keys + (static_cast<size_t>(i / 16) * m.steps + step) * tile_bytes;
      vf less[4];
      for (size_t j = 0; j < 4; j++)
        less[j] = 4 * step + j < m.columns ? fnma(load(m.means + (4 * step + j) * panel_n), by, set1(0)) : set1(0);
      for (int64_t j = 0; j < 16; j++)
        store_int(to + 64 * j, _mm512_xor_si512(row_bytes(row(j) + 64 * step, m.columns - 4 * step, m.there + 4 * step, by, less),
                                                _mm512_set1_epi8(-128)));
    }
  }
  memcpy(&m.largest_scale, &largest_bits, 4);
  m.largest_scale /= 127;
}

// Of four vectors, the byte `from` of each 32 bits, side by side.
template <int From>
RS_INLINE vi interleave_bytes(const vi *x) {
  const vi all = _mm512_set1_epi32(From * 0x01010101), base = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  const vi from = _mm512_add_epi8(all, base);
  vi y = _mm512_shuffle_epi8(x[0], from);
  y = _mm512_mask_shuffle_epi8(y, 0x2222222222222222, x[1], from);
  y = _mm512_mask_shuffle_epi8(y, 0x4444444444444444, x[2], from);
  return _mm512_mask_shuffle_epi8(y, 0x8888888888888888, x[3], from);
}

__attribute__((noinline)) RS_TARGET void attn_take_values(const attn_problem &p, const attn_bytes &m, int64_t first, int n) {
  const attn_rows from = attn_take(p.v, first, n, p.d, m);
  for (size_t step = 0; 32 * step < p.d; step++) {
    vi largest = zero_int();
    for (int64_t i = 0; i < n; i++) largest = _mm512_max_epu16(largest, half_sizes(from.row(i) + 32 * step, m.wide[step]));
    store(m.value_scales + 32 * step,
          _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(largest)), 16)));
    store(m.value_scales + 32 * step + 16,
          _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(largest, 1)), 16)));
  }
  for (size_t c = 0; c < m.columns; c++) {
    const vf largest = load(m.value_scales + c * panel_n), by = byte_scale(largest);
    store(m.value_scales + c * panel_n, mul(largest, set1(1.0f / 127)));
    for (int key = 0; key < n; key += 64) {
      vi rows[16];
      for (int j = 0; j < 16; j++) {
        if (key + 4 * j >= n) {
          rows[j] = zero_int();
          continue;
        }
        vi four[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
          four[i] = _mm512_cvtps_epi32(mul(attn_load(from.row(std::min(key + 4 * j + i, n - 1)), c, m.there[c]), by));
        rows[j] = interleave_bytes<0>(four);
      }
      store_transposed(rows, m.values + (c * (attn_keys / 64) + static_cast<size_t>(key / 64)) * tile_bytes);
    }
  }
}

// For 8 rows of tiles of bytes and Q times 16 queries, b_next behind each other: start + a b, over fours [begin, end) of b
// [fours][16][4], each sum to to(row, which of Q, sum).
template <size_t Q, class A, class B, class F>
RS_INLINE void byte_products(const A *a, const B *b, size_t b_next, size_t begin, size_t end, const vi *start, const F &to) {
  vi acc[8][Q];  // 16 sums, two of b, one of a: of 32 registers
#pragma GCC unroll 8
  for (size_t r = 0; r < 8; r++)
    for (size_t i = 0; i < Q; i++) acc[r][i] = start[i];
  for (size_t k = begin; k < end; k++) {
    const A *x = a + k / 16 * tile_bytes + k % 16 * 4;
    vi y[Q];
    for (size_t i = 0; i < Q; i++) y[i] = load_int(b + i * b_next + k * 64);
#pragma GCC unroll 8
    for (size_t r = 0; r < 8; r++) {
      const vi four = broadcast4(reinterpret_cast<const uint8_t *>(x) + r * 64);
      for (size_t i = 0; i < Q; i++) acc[r][i] = std::is_signed_v<A> ? dot(acc[r][i], y[i], four) : dot(acc[r][i], four, y[i]);
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < 8; r++)
    for (size_t i = 0; i < Q; i++) to(r, i, acc[r][i]);
}

template <size_t Q>
RS_TARGET void attn_scores(const attn_problem &p, const attn_bytes &m, size_t tile, attn_part part) {
  vi start[Q];
  for (size_t i = 0; i < Q; i++) start[i] = load_int(m.starts + (tile + i) * panel_n);
  for (int key = part.begin; key < part.end; key += 8) {
    float *to = m.scores + key * panel_n;
    byte_products<Q>(
        m.keys + static_cast<size_t>(key / 16) * m.steps * tile_bytes + key % 16 * 64, m.queries + tile * m.query_stride,
        m.query_stride, 0, (p.d + 3) / 4, start, [&](size_t r, size_t i, vi sum) __attribute__((always_inline)) RS_TARGET {
          store_int(to + i * attn_keys * panel_n + r * panel_n, sum);
        });
  }
}

template <size_t Q>
RS_TARGET void attn_mix(const attn_bytes &m, size_t tile, attn_part part) {
  const size_t begin = static_cast<size_t>(part.begin) / 4, end = (static_cast<size_t>(part.end) + 3) / 4;
  vi start[Q];
  vf share[Q];
  for (size_t i = 0; i < Q; i++) start[i] = zero_int(), share[i] = load(m.shares + (tile + i) * panel_n);
  for (size_t row = 0; row < m.columns * panel_n; row += 8) {
    float *to = m.out + tile * m.out_stride + row * panel_n;
    byte_products<Q>(
        m.values + row / 16 * (attn_keys / 64) * tile_bytes + row % 16 * 64, m.weights, attn_keys * panel_n * 4, begin, end,
        start, [&](size_t r, size_t i, vi sum) __attribute__((always_inline)) RS_TARGET {
          float *at = to + i * m.out_stride + r * panel_n;
          store(at, fma(mul(_mm512_cvtepi32_ps(sum), set1(m.value_scales[row + r])), share[i], load(at)));
        });
  }
}

// 2^x by a polynomial of degree 3, to 7.5e-5 of it (minimax): x = r + f, r whole, 0 <= f < 1.  What is too small becomes 0; NaN
// stays.
RS_INLINE vf power_of_two(vf x) {
  const vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const vf y = fma(fma(fma(set1(0.0780245215f), f, set1(0.226067156f)), f, set1(0.695833564f)), f, set1(0.999925196f));
  return _mm512_scalef_ps(y, x);
}

// The largest scores of 16 queries among the keys of a block that they see, and what these do to the sums so far.  query, key:
// places of the first query, and of the block, in the sequence; logs: of sizes, in powers of two, read unless all is Plain: all
// keys are seen and count the same.
template <bool Plain>
RS_TARGET void attn_largest(const attn_problem &p, const attn_bytes &m, size_t tile, int64_t query, int64_t key, attn_part part,
                            const float *logs) {
  const float *scores = m.scores + tile % 2 * attn_keys * panel_n;
  const vf factor = load(m.factors + tile * panel_n), zero = set1(score_zero), none = set1(-1e30f);
  vf top = none;
  for (int begin = part.begin; begin < part.end; begin += 16) {
    const int end = std::min(begin + 16, part.end);
    const vf a = mul(factor, set1(m.key_scales[begin / 16]));
    if (Plain) {
      vf chain[4] = {set1(0), set1(0), set1(0), set1(0)};  // scores are floats of 2^23 and more
      int i = begin;
      for (; i + 4 <= end; i += 4)
        for (int j = 0; j < 4; j++) chain[j] = max(chain[j], load(scores + (i + j) * panel_n));
      for (; i < end; i++) chain[0] = max(chain[0], load(scores + i * panel_n));
      top = max(top, mul(sub(max(max(chain[0], chain[1]), max(chain[2], chain[3])), zero), a));
    } else {
      for (int i = begin; i < end; i++) {
        const vf s = add(mul(sub(load(scores + i * panel_n), zero), a), set1(logs[i]));
        top = max(top, _mm512_mask_mov_ps(none, attn_visible(p, query, key + i), s));
      }
    }
  }
  // The products of score_zero and a are off by 3/4 of a at most, of the largest a: no weight is more than a byte.  NaN where a key
  // is.
  top = fma(factor, set1(m.largest_scale), top);
  float *most = m.most + tile * panel_n, *total = m.total + tile * panel_n, *out = m.out + tile * m.out_stride;
  store(m.tops + tile * panel_n, top);
  vf now = part.first ? top : load(most);
  if (part.first) {
    store(most, top);
    store(total, set1(0));
    memset(out, 0, m.out_stride * 4);
  } else if (_mm512_cmp_ps_mask(top, add(now, set1(most_growth)), _CMP_GT_OQ)) {
    const vf before = now;
    now = max(before, top);
    // 1 exactly where nothing grew.
    const vf by = _mm512_mask_mov_ps(power_of_two(sub(before, now)), _mm512_cmp_ps_mask(now, before, _CMP_EQ_OQ), set1(1));
#pragma GCC unroll 4
    for (size_t i = 0; i < m.out_stride; i += panel_n) store(out + i, mul(load(out + i), by));
    store(total, mul(load(total), by));
    store(most, now);
  }
  store(m.shares + tile * panel_n, power_of_two(sub(top, now)));
}

// Weights of 16 queries for the keys of a block that they see.  Sizes of 1 give the same bits as none.
template <bool Plain>
RS_TARGET void attn_weights(const attn_problem &p, const attn_bytes &m, size_t tile, int64_t query, int64_t key, attn_part part,
                            const float *logs) {
  const float *scores = m.scores + tile % 2 * attn_keys * panel_n;
  uint8_t *weights = m.weights + tile % 2 * attn_keys * panel_n * 4;
  const vf factor = load(m.factors + tile * panel_n), top = load(m.tops + tile * panel_n);
  // What is left of four keys' weights, below the byte: floats of 2^15 and more have a step of 2^-8, so that bits 8 to 15 are the
  // whole part of what is added to 2^15.
  const vi keep = _mm512_set1_epi32(static_cast<int>(0xffff00ff));
  vi left[4], sums[4], total = zero_int();
  for (vi &x : left) x = _mm512_castps_si512(set1(0x1p15f + 0.5f));
  for (int begin = part.begin; begin < part.end; begin += 16) {
    const vf a = mul(factor, set1(m.key_scales[begin / 16])), least = fnma(set1(score_zero), a, sub(set1(0), top));
    for (int i = begin; i < std::min(begin + 16, part.end); i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        sums[j] = left[j];
        if (i + j < part.end) {
          const vf x = fma(load(scores + (i + j) * panel_n), a, Plain ? least : add(least, set1(logs[i + j])));
          // 254.5 2^x, as power_of_two but of degree 2, to 1.8e-3.
          const vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
          const vf y = fma(fma(set1(254.5f * 0.337189436f), f, set1(254.5f * 0.657636285f)), f, set1(254.5f * 1.00172472f));
          vf weight = _mm512_scalef_ps(y, x);
          if (!Plain) weight = _mm512_maskz_mov_ps(attn_visible(p, query, key + i + j), weight);
          sums[j] = _mm512_castps_si512(add(_mm512_castsi512_ps(left[j]), weight));
        }
        left[j] = _mm512_and_si512(sums[j], keep);
      }
      const vi bytes = interleave_bytes<1>(sums);
      store_int(weights + i * panel_n, bytes);
      total = dot(total, bytes, _mm512_set1_epi8(1));
    }
  }
  float *to = m.total + tile * panel_n;
  store(to, fma(_mm512_cvtepi32_ps(total), load(m.shares + tile * panel_n), load(to)));
}

template <size_t Q>
RS_TARGET void attn_tiles(const attn_problem &p, const attn_bytes &m, size_t tile, int64_t key, attn_part part, const float *logs) {
  attn_scores<Q>(p, m, tile, part);
  for (size_t i = tile; i < tile + Q; i++) {
    const int64_t query = p.first_query + static_cast<int64_t>(16 * i);
    const bool plain = !p.sizes && attn_sees_all(p, query, key + part.begin, key + part.end);
    (plain ? attn_largest<true> : attn_largest<false>)(p, m, i, query, key, part, logs);
    (plain ? attn_weights<true> : attn_weights<false>)(p, m, i, query, key, part, logs);
  }
  attn_mix<Q>(m, tile, part);
}

// All keys, a block after the other, each for all queries that see some of it.
RS_TARGET void attend(const attn_problem &p) {
  float logs[attn_keys] = {};  // of sizes of 1
  attn_bytes m(p.scratch, p.d, static_cast<size_t>(p.queries));
  const size_t tiles = round_up(static_cast<size_t>(p.queries), panel_n) / panel_n;
  attn_take_queries(p, m);
  attn_find_means(p, m);
  for (int64_t key = p.first_key; key < p.keys; key += attn_keys) {
    const int n = static_cast<int>(std::min<int64_t>(attn_keys, p.keys - key));
    attn_take_keys(p, m, key, n);
    attn_take_values(p, m, key, n);
    for (int i = 0; p.sizes && i < n; i++) logs[i] = std::log2(p.sizes[(key + i) * p.ld_sizes]);
    for (size_t tile = 0; tile < tiles; tile += 2) {
      const attn_part part = attn_seen(p, tile / 2, key, n);
      if (part.begin < part.end) (tile + 1 < tiles ? attn_tiles<2> : attn_tiles<1>)(p, m, tile, key, part, logs);
    }
  }
  attn_write(p, m.out, m.out_stride, m.total);
}

size_t attn_scratch_bytes(size_t d, size_t queries) { return attn_bytes(nullptr, d, queries).bytes; }
constexpr attn_kernels attention = {RS_W8, attn_scratch_bytes, attend, round_rows};

constexpr kernel_row row = {"avx512vnni", available,  f32_panels, f16_panels, w8_panels, w4_panels,  quantize,
                            finish_f32,   layer_norm, shift,      softmax,    rope,      &attention, peak};

#undef RS_TARGET
#undef RS_INLINE
#undef RS_NOISY_GELU

}  // namespace avx512vnni

// ---- AMX: the floats of AVX-512, and int8 products of whole tiles, 16 rows by 64 inputs by 16 channels an instruction
//
// A tile of weights is 16 steps of a panel as they lie in the file.  Rows are worked on 16 at a time: kernel_row lets a kernel read
// and write up to the next multiple of 16.

namespace amx {

constexpr int tile_rows = 16;

// Linux gives the 8 KiB of tile registers to a process that asks.
bool available() {
  static const bool permitted = avx512vnni::available() && cpu().avx512bf16 && cpu().amx &&
                                syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return permitted;
}

#define RS_TARGET \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")))

struct alignas(64) tile_config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sums in tiles 0 … 3, of two rows of tiles by two panels; inputs in 4 and 5, weights in 6 and 7.  `bytes` of K an instruction: 64,
// or 32 where Kp is no multiple of 64.
RS_TARGET void configure(size_t bytes) {
  tile_config c;
  for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.rows[i] = tile_rows;
  c.row_bytes[4] = c.row_bytes[5] = static_cast<uint16_t>(bytes);
  c.rows[6] = c.rows[7] = static_cast<uint8_t>(bytes / 4);
  __asm__ volatile("" : : "m"(c));  // GCC 12 believes that the instruction reads no more than 8 bytes
  _tile_loadconfig(&c);
}

// R rows of tiles by P panels, whose bytes begin `stride` one after the other: += over n inputs of K, the first ones or not.
template <int R, int P>
RS_TARGET void byte_tiles(const uint8_t *a, size_t kp, size_t n, size_t step, const int8_t *w, size_t stride, bool first,
                          int32_t *acc, size_t acc_stride) {
  const int8_t *w1 = w + stride;
  int32_t *acc1 = acc + acc_stride, *below = acc + tile_rows * panel_n, *below1 = acc1 + tile_rows * panel_n;
  if (first) {
    _tile_zero(0);
    if (P > 1) _tile_zero(1);
    if (R > 1) _tile_zero(2);
    if (R > 1 && P > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, acc, 64);
    if (P > 1) _tile_loadd(1, acc1, 64);
    if (R > 1) _tile_loadd(2, below, 64);
    if (R > 1 && P > 1) _tile_loadd(3, below1, 64);
  }
  for (size_t k = 0; k < n; k += step) {
    _tile_loadd(6, w + k * panel_n, 64);
    _tile_loadd(4, a + k, kp);
    _tile_dpbusd(0, 4, 6);
    if (P > 1) {
      _tile_loadd(7, w1 + k * panel_n, 64);
      _tile_dpbusd(1, 4, 7);
    }
    if (R > 1) {
      _tile_loadd(5, a + tile_rows * kp + k, kp);
      _tile_dpbusd(2, 5, 6);
    }
    if (R > 1 && P > 1) _tile_dpbusd(3, 5, 7);
  }
  _tile_stored(0, acc, 64);
  if (P > 1) _tile_stored(1, acc1, 64);
  if (R > 1) _tile_stored(2, below, 64);
  if (R > 1 && P > 1) _tile_stored(3, below1, 64);
}

// All rows by one panel or two.
RS_TARGET void byte_rows(const uint8_t *a, size_t kp, size_t n, size_t step, int rows, const int8_t *w, size_t stride, int panels,
                         bool first, int32_t *acc) {
  const auto acc_stride = acc_panel(rows);
  for (int i = 0; i < rows; i += 2 * tile_rows, a += 2 * tile_rows * kp, acc += 2 * tile_rows * panel_n) {
    const bool two_rows = rows - i > tile_rows, two_panels = panels > 1;
    if (two_rows && two_panels) byte_tiles<2, 2>(a, kp, n, step, w, stride, first, acc, acc_stride);
    else if (two_panels) byte_tiles<1, 2>(a, kp, n, step, w, stride, first, acc, acc_stride);
    else if (two_rows) byte_tiles<2, 1>(a, kp, n, step, w, stride, first, acc, acc_stride);
    else byte_tiles<1, 1>(a, kp, n, step, w, stride, first, acc, acc_stride);
  }
}

RS_TARGET void w8_panels(const uint8_t *a, size_t kp, int rows, const int8_t *w, int panels, int32_t *acc) {
  const size_t step = kp % 64 ? 32 : 64, stride = kp * panel_n;
  configure(step);
  for (int p = 0; p < panels; p += 2, w += 2 * stride, acc += 2 * acc_panel(rows))
    byte_rows(a, kp, kp, step, rows, w, stride, panels - p, true, acc);
  _tile_release();
}

RS_TARGET void w4_panels(const uint8_t *a, size_t kp, int rows, const uint8_t *w, const uint8_t *mult, int panels, int32_t *acc) {
  alignas(64) int8_t bytes[2][w4_part * panel_n];
  const size_t step = kp % 64 ? 32 : 64;
  configure(step);
  for (int p = 0; p < panels; p += 2, acc += 2 * acc_panel(rows)) {
    const int now = std::min(panels - p, 2);
    for (size_t k = 0, n; k < kp; k += n) {
      n = std::min(w4_part, kp - k);
      for (int i = 0; i < now; i++) {
        const size_t at = static_cast<size_t>(p + i) * kp + k;
        avx512vnni::w4_unpack(w + at * panel_n / 2, mult + at / group_k * panel_n, n, bytes[i]);
      }
      byte_rows(a + k, kp, n, step, rows, bytes[0], sizeof bytes[0], now, k == 0, acc);
    }
  }
  _tile_release();
}

// Six sums of tiles, which is what a configuration has.
RS_TARGET double tile_peak(rs_type type, size_t steps) {
  configure(64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (size_t i = 0; i < steps; i++) {
    if (type == RS_BF16) {
      _tile_dpbf16ps(0, 6, 7);
      _tile_dpbf16ps(1, 6, 7);
      _tile_dpbf16ps(2, 6, 7);
      _tile_dpbf16ps(3, 6, 7);
      _tile_dpbf16ps(4, 6, 7);
      _tile_dpbf16ps(5, 6, 7);
      continue;
    }
    _tile_dpbusd(0, 6, 7);
    _tile_dpbusd(1, 6, 7);
    _tile_dpbusd(2, 6, 7);
    _tile_dpbusd(3, 6, 7);
    _tile_dpbusd(4, 6, 7);
    _tile_dpbusd(5, 6, 7);
  }
  _tile_release();
  const double products = type == RS_BF16 ? 3 : 6;  // one of bf16 is of half as many inputs
  return static_cast<double>(steps) * products * tile_rows * 64 * panel_n;
}

double peak(rs_type type, size_t steps) { return type == RS_F32 ? avx512vnni::f32_peak(steps) : tile_peak(type, steps); }

// ---- attention by tiles, in bf16
//
// Rounded to 8 bits, q, k, p and v have errors of up to 2^-9, less than those of the 8-bit layers that q, k and v come from. Scores
// lie as in attention by bytes.  Two keys' weights, rounded side by side, are a row of the tile that values are multiplied by.  exp
// is 2^x by a polynomial of degree 3 (2^-13), since p is rounded anyway.  What a query's largest score was so far is only replaced
// where it grew by more than 2^most_growth, so that sums are seldom rescaled (FlashAttention-4 does the same).

using avx512vnni::attn_columns, avx512vnni::attn_group, avx512vnni::attn_part, avx512vnni::attn_seen, avx512vnni::attn_sees_all,
    avx512vnni::attn_visible, avx512vnni::columns_of, avx512vnni::log2_e, avx512vnni::most_growth, avx512vnni::store_transposed;
constexpr size_t tile_values = 512;  // bf16 of a tile
size_t attn_steps(size_t d) { return round_up(d, 32) / 32; }

// What a unit works on, in its scratch.
struct attn_memory : scratch_parts {
  size_t query_stride, out_stride;  // values of 16 queries
  uint16_t *keys;                   // tiles of 16 keys by 32 of d, for attn_keys keys
  uint16_t *values;                 // tiles of 16 of d by 32 keys
  uint16_t *queries;                // a group: tiles of 16 pairs of d by 16 queries, for each of its two tiles of queries
  float *out;                       // [D / 16][16][16] of 16 queries, transposed
  float *most, *total;              // [16] each, of 16 queries; most in powers of two
  float *scores[2];                 // [2][attn_keys][16] of a group; two groups take turns
  uint16_t *weights[2];             // [2][attn_keys / 2][16][2], likewise

  attn_memory(char *memory, size_t d, size_t n_queries)
      : scratch_parts(memory), query_stride(attn_steps(d) * tile_values), out_stride(attn_columns(d) * panel_n * panel_n) {
    const size_t tiles = round_up(n_queries, attn_group) / panel_n;
    keys = take<uint16_t>(attn_keys / 16 * query_stride);
    values = take<uint16_t>(attn_columns(d) * (attn_keys / 32) * tile_values);
    queries = take<uint16_t>(tiles * query_stride);
    out = take(tiles * out_stride);
    most = take(tiles * panel_n);
    total = take(tiles * panel_n);
    for (float *&x : scores) x = take(2 * attn_keys * panel_n);
    for (uint16_t *&x : weights) x = take<uint16_t>(2 * attn_keys * panel_n);
  }
};

// Which of the 32 columns from 32 step on there are.
struct step_columns {
  __mmask16 low, high;
  step_columns(size_t d, size_t step) : low(columns_of(d, 2 * step)), high(d > 32 * step + 16 ? columns_of(d, 2 * step + 1) : 0) {}
  __mmask32 all() const { return static_cast<__mmask32>(high) << 16 | low; }
};

// 32 values from x as bf16; those that are not there are zero.
__attribute__((always_inline)) RS_TARGET inline __m512i load_32(const float *x, step_columns valid) {
  const __m512 a = _mm512_maskz_loadu_ps(valid.low, x), b = _mm512_maskz_loadu_ps(valid.high, x + 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
}
__attribute__((always_inline)) RS_TARGET inline __m512i load_32(const uint16_t *x, step_columns valid) {
  return _mm512_maskz_loadu_epi16(valid.all(), x);
}

// Of 16 columns, the values of the first half of x and of the second side by side.
__attribute__((always_inline)) RS_TARGET inline __m512i pair_halves(__m512i x) {
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(pairs, x);
}
__attribute__((always_inline)) RS_TARGET inline __m512i round_pairs(__m512 a, __m512 b) {
  return pair_halves(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
}
// Of two rows, 16 columns.
__attribute__((always_inline)) RS_TARGET inline __m512i load_pairs(const float *a, __mmask16 valid_a, const float *b,
                                                                   __mmask16 valid_b) {
  return round_pairs(_mm512_maskz_loadu_ps(valid_a, a), _mm512_maskz_loadu_ps(valid_b, b));
}
__attribute__((always_inline)) RS_TARGET inline __m512i load_pairs(const uint16_t *a, __mmask16 valid_a, const uint16_t *b,
                                                                   __mmask16 valid_b) {
  return pair_halves(
      _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(valid_a, a)), _mm256_maskz_loadu_epi16(valid_b, b), 1));
}

template <class T>
RS_TARGET void attn_pack_queries(const attn_problem &p, const attn_memory &m) {
  for (size_t step = 0; step < attn_steps(p.d); step++) {
    const step_columns valid(p.d, step);
    const T *q = static_cast<const T *>(p.q.data) + 32 * step;
    for (int64_t i = 0; i < p.queries; i += 16) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; j++)  // where there are no queries, the last one again: nobody reads what becomes of them
        rows[j] = load_32(q + std::min(i + j, p.queries - 1) * p.q.stride, valid);
      store_transposed(rows, m.queries + static_cast<size_t>(i) / 16 * m.query_stride + step * tile_values);
    }
  }
  // The second half of the last group, where there are no queries.
  if (ceil_div(p.queries, 16) % 2)
    memset(m.queries + static_cast<size_t>(ceil_div(p.queries, 16)) * m.query_stride, 0, m.query_stride * 2);
}

// Keys, or values, of a block of n; those up to the next multiple of 32 are zero.
template <class T>
RS_TARGET void attn_pack_keys(const attn_problem &p, const attn_memory &m, int64_t first, int n) {
  const size_t steps = attn_steps(p.d);
  const int padded = static_cast<int>(round_up(static_cast<size_t>(n), 32));
  for (size_t step = 0; step < steps; step++) {
    const step_columns valid(p.d, step);
    const T *k = static_cast<const T *>(p.k.data) + first * p.k.stride + static_cast<int64_t>(32 * step);
    for (int key = 0; key < padded; key++, k += p.k.stride) {
      uint16_t *to = m.keys + (static_cast<size_t>(key / 16) * steps + step) * tile_values + key % 16 * 32;
      _mm512_storeu_si512(to, key < n ? load_32(k, valid) : _mm512_setzero_si512());
    }
  }
}
template <class T>
RS_TARGET void attn_pack_values(const attn_problem &p, const attn_memory &m, int64_t first, int n) {
  const int padded = static_cast<int>(round_up(static_cast<size_t>(n), 32));
  uint16_t *tile = m.values;
  for (size_t c = 0; c < attn_columns(p.d); c++) {
    const __mmask16 valid = columns_of(p.d, c);
    for (int key = 0; key < attn_keys; key += 32, tile += tile_values) {
      if (key >= padded) continue;
      __m512i rows[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++) {
        const int at = key + 2 * j;
        const T *v = static_cast<const T *>(p.v.data) + (first + at) * p.v.stride + static_cast<int64_t>(c * panel_n);
        rows[j] = load_pairs(v, at < n ? valid : 0, v + p.v.stride, at + 1 < n ? valid : 0);
      }
      store_transposed(rows, tile);
    }
  }
}

// 2^x for x <= most_growth; 2^-125 where it is below that.  Cody and Waite: x = r + f, r whole, |f| <= 1/2; degree 3, of which the
// relative error is at most 7.5e-5 (minimax).
__attribute__((always_inline)) RS_TARGET inline __m512 power_of_two(__m512 x) {
  const __m512 shift = _mm512_set1_ps(whole_numbers);
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-125), x);  // NaN stays
  const __m512 t = _mm512_add_ps(clamped, shift), f = _mm512_sub_ps(clamped, _mm512_sub_ps(t, shift));
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.0551716685f), f, _mm512_set1_ps(0.242611125f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693260968f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.999928057f));
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}

// The largest scores of 16 queries among keys [begin, end) of a block, and what these do to the sums so far.  query, key: places of
// the first query, and of the block, in the sequence; logs: of sizes, in powers of two, or nullptr.
template <bool Masked>
RS_TARGET void attn_largest(const attn_problem &p, const attn_memory &m, float factor, size_t tile, int64_t query, int64_t key,
                            attn_part part, const float *logs) {
  float *scores = m.scores[tile / 2 % 2] + tile % 2 * attn_keys * panel_n;
  const __m512 a = _mm512_set1_ps(factor), none = _mm512_set1_ps(-1e30f);
  __m512 largest = none;
  if (Masked || logs) {
    for (int i = part.begin; i < part.end; i++) {
      __m512 s = _mm512_load_ps(scores + i * panel_n);
      if (Masked) s = _mm512_mask_mov_ps(none, attn_visible(p, query, key + i), s);
      s = _mm512_mul_ps(s, a);
      largest = _mm512_max_ps(largest, logs ? _mm512_add_ps(s, _mm512_set1_ps(logs[i])) : s);
    }
  } else {
    __m512 chain[4] = {none, none, none, none};
    int i = part.begin;
    for (; i + 4 <= part.end; i += 4)
      for (int j = 0; j < 4; j++) chain[j] = _mm512_max_ps(chain[j], _mm512_load_ps(scores + (i + j) * panel_n));
    for (; i < part.end; i++) chain[0] = _mm512_max_ps(chain[0], _mm512_load_ps(scores + i * panel_n));
    largest = _mm512_mul_ps(_mm512_max_ps(_mm512_max_ps(chain[0], chain[1]), _mm512_max_ps(chain[2], chain[3])), a);
  }
  float *most = m.most + tile * panel_n, *total = m.total + tile * panel_n;
  if (part.first) {
    _mm512_store_ps(most, largest);
    _mm512_store_ps(total, _mm512_setzero_ps());
    return;
  }
  const __m512 before = _mm512_load_ps(most);
  if (!_mm512_cmp_ps_mask(largest, _mm512_add_ps(before, _mm512_set1_ps(most_growth)), _CMP_GT_OQ)) return;
  // 1 exactly where nothing grew.
  const __m512 now = _mm512_max_ps(before, largest);
  const __m512 by =
      _mm512_mask_mov_ps(power_of_two(_mm512_sub_ps(before, now)), _mm512_cmp_ps_mask(now, before, _CMP_EQ_OQ), _mm512_set1_ps(1));
  float *out = m.out + tile * m.out_stride;
  for (size_t i = 0; i < m.out_stride; i += panel_n) _mm512_store_ps(out + i, _mm512_mul_ps(_mm512_load_ps(out + i), by));
  _mm512_store_ps(total, _mm512_mul_ps(_mm512_load_ps(total), by));
  _mm512_store_ps(most, now);
}

// Weights of 16 queries for keys [begin, end) of the block, begin a multiple of 32; zero up to the next one.  Sizes of 1 give the
// same bits as none.
template <bool Sized, bool Masked>
RS_TARGET inline void attn_weights(const attn_problem &p, const attn_memory &m, float factor, size_t tile, int begin, int end,
                                   const float *logs, int64_t query, int64_t key) {
  const float *scores = m.scores[tile / 2 % 2] + tile % 2 * attn_keys * panel_n;
  uint16_t *weights = m.weights[tile / 2 % 2] + tile % 2 * attn_keys * panel_n;
  const __m512 a = _mm512_set1_ps(factor), most = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_load_ps(m.most + tile * panel_n));
  const auto weight = [&](int i) __attribute__((always_inline)) RS_TARGET {
    const __m512 b = Sized ? _mm512_add_ps(most, _mm512_set1_ps(logs[i])) : most;
    const __m512 x = _mm512_fmadd_ps(_mm512_load_ps(scores + i * panel_n), a, b);
    const __m512 e = power_of_two(x);
    return Masked ? _mm512_maskz_mov_ps(attn_visible(p, query, key + i), e) : e;
  };
  __m512 even = _mm512_load_ps(m.total + tile * panel_n), odd = _mm512_setzero_ps();
  for (int i = begin; i < begin + 32; i += 2) {
    __m512 left = _mm512_setzero_ps(), right = _mm512_setzero_ps();
    if (i < end) left = weight(i);
    if (i + 1 < end) right = weight(i + 1);
    even = _mm512_add_ps(even, left);
    odd = _mm512_add_ps(odd, right);
    _mm512_store_si512(weights + i * panel_n, round_pairs(left, right));
  }
  _mm512_store_ps(m.total + tile * panel_n, _mm512_add_ps(even, odd));
}

// The kernels above for a tile of queries.  Not inline: four kernels would be, wherever one is called.
__attribute__((noinline)) RS_TARGET void find_largest(const attn_problem &p, const attn_memory &m, size_t tile, int64_t key,
                                                      attn_part part, const float *logs) {
  const int64_t query = p.first_query + static_cast<int64_t>(16 * tile);
  const auto find = attn_sees_all(p, query, key + part.begin, key + part.end) ? attn_largest<false> : attn_largest<true>;
  find(p, m, p.scale * log2_e, tile, query, key, part, logs);
}
__attribute__((noinline)) RS_TARGET void find_weights(const attn_problem &p, const attn_memory &m, size_t tile, int64_t key,
                                                      int begin, int end, const float *logs) {
  const int64_t query = p.first_query + static_cast<int64_t>(16 * tile);
  const auto weigh = attn_sees_all(p, query, key + begin, key + std::min(begin + 32, end))
                         ? logs ? attn_weights<true, false> : attn_weights<false, false>
                     : logs ? attn_weights<true, true>
                            : attn_weights<false, true>;
  weigh(p, m, p.scale * log2_e, tile, begin, end, logs, query, key);
}

// Scores of 32 keys from `key` on, of the block, for 32 queries.
RS_TARGET inline void attn_scores(const attn_memory &m, size_t d, size_t group, int key) {
  const size_t steps = attn_steps(d);
  const uint16_t *q0 = m.queries + 2 * group * m.query_stride, *q1 = q0 + m.query_stride,
                 *k0 = m.keys + static_cast<size_t>(key / 16) * steps * tile_values, *k1 = k0 + steps * tile_values;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (size_t i = 0; i < steps; i++) {
    _tile_loadd(4, k0 + i * tile_values, 64);
    _tile_loadd(6, q0 + i * tile_values, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, q1 + i * tile_values, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, k1 + i * tile_values, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  float *to = m.scores[group % 2] + key * panel_n, *other = to + attn_keys * panel_n;
  _tile_stored(0, to, 64);
  _tile_stored(1, other, 64);
  _tile_stored(2, to + 16 * panel_n, 64);
  _tile_stored(3, other + 16 * panel_n, 64);
}

// Two columns of tiles of the group's sums of values, from column c on, by the weights of what it sees of a block of keys.
RS_TARGET inline void attn_mix(const attn_memory &m, size_t d, size_t group, size_t c, attn_part part) {
  const size_t next = attn_keys / 32 * tile_values;
  float *out0 = m.out + 2 * group * m.out_stride + c * panel_n * panel_n, *out1 = out0 + m.out_stride;
  const bool two = attn_columns(d) - c > 1;
  const uint16_t *v = m.values + c * next + static_cast<size_t>(part.begin) / 32 * tile_values;
  if (!part.first) {
    _tile_loadd(0, out0, 64);
    _tile_loadd(1, out1, 64);
    if (two) _tile_loadd(2, out0 + panel_n * panel_n, 64);
    if (two) _tile_loadd(3, out1 + panel_n * panel_n, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int key = part.begin; key < part.end; key += 32, v += tile_values) {
    const uint16_t *w = m.weights[group % 2] + key * panel_n;
    _tile_loadd(4, v, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + attn_keys * panel_n, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (!two) continue;
    _tile_loadd(5, v + next, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out0, 64);
  _tile_stored(1, out1, 64);
  if (two) _tile_stored(2, out0 + panel_n * panel_n, 64);
  if (two) _tile_stored(3, out1 + panel_n * panel_n, 64);
}

// All queries that see some of a block of n keys, a group after the other.  While the vector units make the weights of a group, the
// tiles have the scores of the next one and the values of the one before: what they wait for is then never far away.
RS_TARGET void attn_block(const attn_problem &p, const attn_memory &m, int64_t key, int n, const float *logs) {
  const auto groups = static_cast<size_t>(ceil_div(p.queries, attn_group));
  const size_t columns = attn_columns(p.d);
  size_t group = 0;
  attn_part before = {}, now = attn_seen(p, group, key, n);
  while (now.begin >= now.end && ++group < groups) now = attn_seen(p, group, key, n);
  if (group == groups) return;
  for (int i = now.begin; i < now.end; i += 32) attn_scores(m, p.d, group, i);
  for (bool mixes = false; mixes || now.begin < now.end; group++) {
    const attn_part next = group + 1 < groups ? attn_seen(p, group + 1, key, n) : attn_part{};
    int ahead = next.begin;  // of the next group's scores
    size_t c = mixes ? 0 : columns;
    for (size_t tile = 2 * group; now.begin < now.end && tile < 2 * group + 2; tile++) find_largest(p, m, tile, key, now, logs);
    for (int i = now.begin; i < now.end; i += 32) {
      if (ahead < next.end) attn_scores(m, p.d, group + 1, ahead), ahead += 32;
      find_weights(p, m, 2 * group, key, i, now.end, logs);
      if (c < columns) attn_mix(m, p.d, group - 1, c, before), c += 2;
      find_weights(p, m, 2 * group + 1, key, i, now.end, logs);
    }
    for (; ahead < next.end; ahead += 32) attn_scores(m, p.d, group + 1, ahead);
    for (; c < columns; c += 2) attn_mix(m, p.d, group - 1, c, before);
    mixes = now.begin < now.end;
    before = now, now = next;
  }
}

// All keys, a block after the other, each for all queries that see some of it.
RS_TARGET void attend(const attn_problem &p) {
  alignas(64) float logs[attn_keys];
  const attn_memory m(p.scratch, p.d, static_cast<size_t>(p.queries));
  configure(64);
  (p.q.bf16 ? attn_pack_queries<uint16_t> : attn_pack_queries<float>)(p, m);
  for (int64_t key = p.first_key; key < p.keys; key += attn_keys) {
    const int n = static_cast<int>(std::min<int64_t>(attn_keys, p.keys - key));
    (p.k.bf16 ? attn_pack_keys<uint16_t> : attn_pack_keys<float>)(p, m, key, n);
    (p.v.bf16 ? attn_pack_values<uint16_t> : attn_pack_values<float>)(p, m, key, n);
    for (int i = 0; p.sizes && i < n; i++) logs[i] = std::log2(p.sizes[(key + i) * p.ld_sizes]);
    attn_block(p, m, key, n, p.sizes ? logs : nullptr);
  }
  _tile_release();
  avx512vnni::attn_write(p, m.out, m.out_stride, m.total);
}

size_t attn_scratch_bytes(size_t d, size_t queries) { return attn_memory(nullptr, d, queries).bytes; }
constexpr attn_kernels attention = {RS_BF16, attn_scratch_bytes, attend, avx512vnni::round_rows};

constexpr kernel_row row = {"amx",
                            available,
                            avx512vnni::f32_panels,
                            avx512vnni::f16_panels,
                            w8_in_steps<w8_panels, avx512vnni::finish>,
                            w4_in_steps<w4_panels, avx512vnni::finish>,
                            avx512vnni::quantize,
                            avx512vnni::finish_f32,
                            avx512vnni::layer_norm,
                            avx512vnni::shift,
                            avx512vnni::softmax,
                            avx512vnni::rope,
                            &attention,
                            peak};

#undef RS_TARGET

}  // namespace amx

}  // namespace
#endif

#ifdef RS_NEON
namespace {

// ---- NEON with dot products (Armv8.2): 4 floats, a panel is four registers wide

namespace neon {

bool available() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

#define RS_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define RS_INLINE RS_TARGET inline __attribute__((always_inline))
#define RS_NOISY_GELU(x) activate_one(RS_ACT_GELU, x)
using vf = float32x4_t;
constexpr int lanes = 4;
constexpr int float_tile_rows = 6, float_tile_panels = 1;  // 24 sums, four of b, one of a: of 32 registers

RS_INLINE vf set1(float x) { return vdupq_n_f32(x); }
RS_INLINE vf load(const float *p) { return vld1q_f32(p); }
RS_INLINE vf load_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
RS_INLINE void store(float *p, vf x) { vst1q_f32(p, x); }
RS_INLINE vf add(vf a, vf b) { return vaddq_f32(a, b); }
RS_INLINE vf sub(vf a, vf b) { return vsubq_f32(a, b); }
RS_INLINE vf mul(vf a, vf b) { return vmulq_f32(a, b); }
RS_INLINE vf div(vf a, vf b) { return vdivq_f32(a, b); }
RS_INLINE vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
RS_INLINE vf fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
RS_INLINE vf min(vf a, vf b) { return vminq_f32(a, b); }  // either NaN
RS_INLINE vf max(vf a, vf b) { return vmaxq_f32(a, b); }
RS_INLINE vf round(vf x) { return vrndnq_f32(x); }
RS_INLINE vf if_less(vf a, vf b, vf yes, vf no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
RS_INLINE vf pow2(vf n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23)); }
RS_INLINE vf scale2(vf p, vf n) {
  const vf cut = min(max(n, set1(-200)), set1(200)), half = round(mul(cut, set1(0.5f)));
  return mul(mul(p, pow2(half)), pow2(sub(cut, half)));
}
RS_INLINE vf times_pow2(vf p, vf, vf t) {  // see avx2
  return mul(p, vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(t), 23), vdupq_n_s32(127 << 23))));
}
RS_INLINE bool any_nan(vf x) { return vminvq_u32(vceqq_f32(x, x)) == 0; }
RS_INLINE void widen(vf &low, vf &high, vf x) {
  low = vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(low), vreinterpretq_u32_f32(x)));
  high = vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(high), vreinterpretq_s32_f32(x)));
}
RS_INLINE float largest(vf x) { return vmaxvq_f32(x); }
RS_INLINE float sum(vf x) { return vaddvq_f32(x); }
RS_INLINE vf centred(const int32_t *acc, int32_t zero, const int32_t *colsum) {
  return vcvtq_f32_s32(vmlsq_n_s32(vld1q_s32(acc), vld1q_s32(colsum), zero));
}
RS_INLINE void store_u8(uint8_t *q, const vf *x, int32_t zero) {
  uint16x4_t words[4];
  for (int i = 0; i < 4; i++) words[i] = vqmovun_s32(vaddq_s32(vcvtnq_s32_f32(x[i]), vdupq_n_s32(zero)));
  vst1q_u8(q, vcombine_u8(vqmovn_u16(vcombine_u16(words[0], words[1])), vqmovn_u16(vcombine_u16(words[2], words[3]))));
}
// To the compiler, x is changed and read here: see avx2.
template <class V>
RS_INLINE void hide(V &x) {
  __asm__ volatile("" : "+w"(x));
}

#define RS_VECTOR_PART
#include "rs.cpp"  // NOLINT(bugprone-suspicious-include)
#undef RS_VECTOR_PART

// The dot product takes signed bytes on both sides: activations less 128, and 128 times the sum of the weights put back at the end.
RS_INLINE int8x16_t broadcast4(const uint8_t *a) {
  uint32_t four;
  memcpy(&four, a, 4);
  return vreinterpretq_s8_u32(vdupq_n_u32(four ^ 0x80808080u));
}

// Over n inputs of a panel of bytes, the first ones of K or not.
template <int R>
RS_TARGET void byte_rows(const uint8_t *a, size_t kp, size_t n, int rows, const int8_t *w, bool first, int32_t *acc_out) {
  for (; rows >= R; rows -= R, a += R * kp, acc_out += R * panel_n) {
    int32x4_t acc[R][4], sum[4];
    for (int h = 0; h < 4; h++) {
      sum[h] = vdupq_n_s32(0);
      for (int r = 0; r < R; r++) acc[r][h] = first ? vdupq_n_s32(0) : vld1q_s32(acc_out + r * panel_n + 4 * h);
    }
    for (size_t k = 0; k < n; k += panel_k) {
      int8x16_t b[4];
      for (int h = 0; h < 4; h++) {
        b[h] = vld1q_s8(w + k * panel_n + 16 * h);
        sum[h] = vdotq_s32(sum[h], b[h], vdupq_n_s8(1));
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const int8x16_t x = broadcast4(a + r * kp + k);
        for (int h = 0; h < 4; h++) acc[r][h] = vdotq_s32(acc[r][h], x, b[h]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 4; h++) vst1q_s32(acc_out + r * panel_n + 4 * h, vaddq_s32(acc[r][h], vshlq_n_s32(sum[h], 7)));
  }
  if constexpr (R > 1)
    if (rows) byte_rows<R / 2>(a, kp, n, rows, w, first, acc_out);
}
void w8_panels(const uint8_t *a, size_t kp, int rows, const int8_t *w, int panels, int32_t *acc) {
  for (int p = 0; p < panels; p++, w += kp * panel_n, acc += acc_panel(rows)) byte_rows<4>(a, kp, kp, rows, w, true, acc);
}

// n inputs of a panel of nibbles, times their multipliers, to bytes.
RS_TARGET void w4_unpack(const uint8_t *w, const uint8_t *mult, size_t n, int8_t *to) {
  for (size_t k = 0; k < n; k += group_k, mult += panel_n) {
    uint8x16_t m[4], eight[4];  // each channel's four times
    for (int h = 0; h < 4; h++) {
      const uint8x16_t four = vreinterpretq_u8_u32(uint32x4_t{0, 0x01010101, 0x02020202, 0x03030303});
      m[h] = vqtbl1q_u8(vld1q_u8(mult), vaddq_u8(four, vdupq_n_u8(static_cast<uint8_t>(4 * h))));
      eight[h] = vshlq_n_u8(m[h], 3);
    }
    for (int i = 0; i < group_k; i += panel_k, w += 32, to += 64)
      for (int h = 0; h < 4; h++) {
        const uint8x16_t nibbles = vld1q_u8(w + h % 2 * 16),
                         value = h < 2 ? vandq_u8(nibbles, vdupq_n_u8(15)) : vshrq_n_u8(nibbles, 4);
        vst1q_s8(to + 16 * h, vreinterpretq_s8_u8(vsubq_u8(vmulq_u8(value, m[h]), eight[h])));
      }
  }
}
RS_TARGET void w4_panels(const uint8_t *a, size_t kp, int rows, const uint8_t *w, const uint8_t *mult, int panels, int32_t *acc) {
  alignas(align_data) int8_t bytes[w4_part * panel_n];
  for (int p = 0; p < panels; p++, acc += acc_panel(rows))
    for (size_t k = 0, n; k < kp; k += n, w += n * 8, mult += n / group_k * panel_n) {
      n = std::min(w4_part, kp - k);
      w4_unpack(w, mult, n, bytes);
      byte_rows<4>(a + k, kp, n, rows, bytes, k == 0, acc);
    }
}

RS_TARGET double w8_peak(size_t steps) {
  constexpr int chains = 24;
  const int8x16_t x = vdupq_n_s8(5), b = vdupq_n_s8(3);
  int32x4_t acc[chains];
#pragma GCC unroll 24
  for (int32x4_t &sum : acc) hide(sum = vdupq_n_s32(0));
  for (size_t i = 0; i < steps; i++) {
#pragma GCC unroll 24
    for (int32x4_t &sum : acc) sum = vdotq_s32(sum, x, b);
  }
#pragma GCC unroll 24
  for (int32x4_t &sum : acc) hide(sum);
  return static_cast<double>(steps) * chains * 4 * panel_k;
}

double peak(rs_type type, size_t steps) { return type == RS_F32 ? f32_peak(steps) : w8_peak(steps); }

constexpr kernel_row row = {"neon",
                            available,
                            f32_panels,
                            f16_panels,
                            w8_in_steps<w8_panels, finish>,
                            w4_in_steps<w4_panels, finish>,
                            quantize,
                            finish_f32,
                            layer_norm,
                            shift,
                            softmax,
                            rope,
                            nullptr,
                            peak};

#undef RS_TARGET
#undef RS_INLINE
#undef RS_NOISY_GELU

}  // namespace neon

}  // namespace
#endif

// ================================================================================ 8  kernel table

namespace {

// Best first.
const kernel_row *const kernel_rows[] = {
#ifdef RS_X86
    &amx::row,   &avx512vnni::row, &avxvnni::row, &avx2::row,
#endif
#ifdef RS_NEON
    &neon::row,
#endif
    &scalar_row,
};

// The row that RS_ISA names, or the best available; nullptr with an error for a name that is unknown or not available.
const kernel_row *choose_kernels() {
  const char *wanted = getenv("RS_ISA");
  for (const kernel_row *row : kernel_rows)
    if (row->available() && (!wanted || !*wanted || !strcmp(wanted, row->name))) return row;
  (void)rs_guarded([&] {
    name_list known;
    for (const kernel_row *row : kernel_rows)
      if (row->available()) known.add(row->name);
    return rs_fail(RS_ERR_UNSUPPORTED, "RS_ISA=%s: this build on this CPU has %s", wanted, known.text());
  });
  return nullptr;
}

}  // namespace

const char *rs_isa_available(size_t i) {
  for (const kernel_row *row : kernel_rows)
    if (row->available() && i-- == 0) return row->name;
  return nullptr;
}

const char *rs_isa(void) {
  const kernel_row *row = choose_kernels();
  return row ? row->name : "none";
}

// All threads at once, each for itself: the best of bursts so short that even on a busy machine some run undisturbed.  Bursts
// before them, which also wake the CPU up, find out how many steps that is.  They are counted, not timed as a whole: one long
// interruption must not take the place of all.
rs_status rs_measure_peak(rs_type type, int32_t threads, double *macs_per_second) {
  return rs_guarded([&] {
    if (type != RS_F32 && type != RS_F16 && type != RS_BF16 && type != RS_W8 && type != RS_W4)
      return rs_fail(RS_ERR_ARGUMENT, "type is %s (%d), expected f32, f16, bf16, w8 or w4", rs_type_name(type),
                     static_cast<int>(type));
    if (threads < 0 || threads > max_threads)
      return rs_fail(RS_ERR_ARGUMENT, "threads is %d, expected 1 to %d, or 0 for all", threads, max_threads);
    const kernel_row *kernels = choose_kernels();
    if (!kernels) return RS_ERR_UNSUPPORTED;
    constexpr double burst_seconds = 0.5e-3;
    const rs_type arithmetic = type == RS_F16 || (type == RS_BF16 && !kernels->coarse_attn) ? RS_F32 : type;
    int n = threads ? threads : default_threads();
#ifndef _OPENMP
    n = 1;
#endif
    const int cpus = affinity_cpus();
    const double at_once = std::min(1.0, static_cast<double>(cgroup_cpus(cpus)) / n);  // of the threads, where they outnumber CPUs
    const int bursts = std::max(3, static_cast<int>(50 * at_once));
    std::vector<double> best(static_cast<size_t>(n));  // by thread
    run_team(n, [&](const worker &me) {
      size_t steps = 1024;
      double most = 0;
      me.barrier();
      for (int counted = 0; counted < bursts;) {
        const double start = now_seconds(), macs = kernels->peak(arithmetic, steps), seconds = now_seconds() - start;
        if (seconds < burst_seconds) {
          steps *= 2;
        } else {
          most = std::max(most, macs / seconds);
          counted++;
        }
      }
      best[static_cast<size_t>(me.thread)] = most;
    });
    *macs_per_second = at_once * std::accumulate(best.begin(), best.end(), 0.0);
    return RS_OK;
  });
}

// ================================================================================ 9  graph: tensors, builders

namespace {

enum tensor_kind { tensor_input, tensor_weight, tensor_op, tensor_view, tensor_starts };

struct op_run;    // one operator at run time: section 11
struct op_macs {  // multiply-accumulates, and the type whose arithmetic they are (rs_measure_peak)
  double count;
  rs_type type;
};
struct work_bytes {  // memory that an operator needs beside its result
  size_t shared, each_thread;
};

}  // namespace

struct rs_tensor {
  rs_graph *graph;
  int id;  // index in the graph; inputs of an operator have smaller ones
  std::string name;
  tensor_kind kind;
  rs_type type;
  rs_layout layout;
  int rank;
  int64_t shape[RS_MAX_RANK];
  int level;  // of RS_DIM_TOKENS: 0 all tokens, k those that the k-th rs_token_drop of the graph leaves
  bool output;

  op_code op;
  op_params params;
  rs_tensor *src[max_sources];  // nullptr where an optional input is left out

  const void *data;  // tensor_weight
  rs_tensor *base;   // tensor_view: columns [first, first + shape[rank - 1]) of it
  int64_t first;

  // Set by rs_graph_finish.
  int last_use;   // id of the last operator that reads it, INT_MAX for outputs
  int stage;      // tensor_op: index in rs_graph.stages
  bool in_block;  // made and read in one chain
  int scores;     // the level of the drop that alone needs it, to choose by; or not_scores
};

namespace {
const rs_tensor *storage_of(const rs_tensor *t) {
  while (t->kind == tensor_view) t = t->base;
  return t;
}
}  // namespace

struct graph_stage {  // operators [begin, end) of the graph, in order
  int begin, end;
  int last;      // id of the last of them
  bool by_rows;  // a chain
  int level;     // of the tokens
};

struct rs_graph {
  uint64_t id;  // not used by another graph before or after: a session knows its plan by it
  const rs_model *model;
  std::vector<std::unique_ptr<rs_tensor>> tensors;
  bool finished = false;
  std::vector<rs_tensor *> drops;  // k makes the tokens of level k + 1
  std::vector<graph_stage> stages;
  int ops = 0;
  size_t chain_weights = 0;  // bytes of the matrices that every token goes through
  rs_status status = RS_OK;  // of the first call that failed, and what it said
  std::string error;
};

namespace {

struct op_row {
  const char *name;
  int inputs;
  bool by_rows, one_level;
  rs_status (*infer)(rs_tensor &out);
  work_bytes (*work)(const op_run &);
  op_macs (*macs)(const op_run &);
  void (*cpu)(const op_run &, const worker &me);
};

#define X(op, name, n, by_rows, one_level) \
  rs_status name##_infer(rs_tensor &out); \
  work_bytes name##_work(const op_run &); \
  op_macs name##_macs(const op_run &); \
  void name##_cpu(const op_run &, const worker &me);
RS_OPS(X)
#undef X

constexpr op_row op_rows[op_count] = {
#define X(op, name, n, by_rows, one_level) {#name, n, by_rows, one_level, name##_infer, name##_work, name##_macs, name##_cpu},
    RS_OPS(X)
#undef X
};

// Remember the first error of a graph, unless it is finished: then nothing changes it.  Always nullptr, so that builders read
// `return graph_fail(…)`.
rs_tensor *graph_fail(rs_graph *g, rs_status status) {
  if (g->status == RS_OK && !g->finished) {
    g->status = status;
    g->error = last_error;
  }
  return nullptr;
}

rs_status same_name(const char *name) { return rs_fail(RS_ERR_ARGUMENT, "two tensors of the graph are named '%s'", name); }
rs_status other_graph(const rs_tensor &x) { return rs_fail(RS_ERR_ARGUMENT, "'%s' belongs to another graph", x.name.c_str()); }

// What a builder does, unless the graph has failed already.  Nothing leaves it as an exception.
template <class F>
rs_tensor *built(rs_graph *g, F build) {
  if (!g || g->status != RS_OK) return nullptr;
  try {
    return build();
  } catch (const std::bad_alloc &) {
    return graph_fail(g, rs_fail(RS_ERR_MEMORY, "out of memory"));
  } catch (const std::exception &e) {
    return graph_fail(g, rs_fail(RS_ERR_MEMORY, "internal: %s", e.what()));
  }
}

rs_tensor *new_tensor(rs_graph *g, tensor_kind kind) {
  if (g->status != RS_OK) return nullptr;
  if (g->finished) return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "the graph is finished: nothing can be added"));
  g->tensors.push_back(std::make_unique<rs_tensor>());
  rs_tensor *t = g->tensors.back().get();
  t->graph = g;
  t->id = static_cast<int>(g->tensors.size()) - 1;
  t->kind = kind;
  return t;
}

rs_status set_shape(rs_tensor *t, int rank, const int64_t *shape) {
  if (rank < 1 || rank > RS_MAX_RANK)
    return rs_fail(RS_ERR_ARGUMENT, "'%s': rank %d, expected 1 to %d", t->name.c_str(), rank, RS_MAX_RANK);
  for (int i = 0; i < rank; i++)
    if (shape[i] > max_dim || (shape[i] < 1 && (i > 0 || shape[i] < RS_DIM_CU_SEQLENS || shape[i] == 0)))
      return rs_fail(RS_ERR_ARGUMENT, "'%s': shape %s: dimension %d is out of range", t->name.c_str(),
                     shape_text(rank, shape).c_str(), i);
  // With that, and first dimensions of at most max_dim, no number of bytes overflows.
  int64_t row = 1;
  for (int i = 1; i < rank; i++)
    if ((row *= shape[i]) > max_row)
      return rs_fail(RS_ERR_ARGUMENT, "'%s': shape %s: rows of more than %lld values", t->name.c_str(),
                     shape_text(rank, shape).c_str(), static_cast<long long>(max_row));
  t->rank = rank;
  std::copy(shape, shape + rank, t->shape);
  return RS_OK;
}

bool same_shape(const rs_tensor &t, int rank, const int64_t *shape) {
  return t.rank == rank && std::equal(shape, shape + rank, t.shape);
}

bool has_level(const rs_tensor &t) { return t.shape[0] == RS_DIM_TOKENS || t.shape[0] == RS_DIM_CU_SEQLENS; }

rs_status expect_level(const rs_tensor &op, const rs_tensor &x, int level) {
  if (!has_level(x) || x.level == level) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: '%s' is of the tokens behind %d drops, expected %d", op_rows[op.op].name, x.name.c_str(),
                 x.level, level);
}

rs_status expect_one_level(const rs_tensor &op) {
  for (const rs_tensor *x : op.src)
    if (x) RS_TRY(expect_level(op, *x, op.level));
  return RS_OK;
}

[[gnu::cold]] rs_tensor *add_op(rs_graph *g, op_code op, const op_params &params, std::initializer_list<rs_tensor *> src,
                                unsigned optional = 0) {
  return built(g, [&]() -> rs_tensor * {
    int i = 0;
    for (const rs_tensor *s : src) {
      if (!s && !(optional >> i & 1)) return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "%s: input %d is NULL", op_rows[op].name, i));
      if (s && s->graph != g)
        return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "%s: '%s' belongs to another graph", op_rows[op].name, s->name.c_str()));
      i++;
    }
    rs_tensor *t = new_tensor(g, tensor_op);
    if (!t) return nullptr;
    t->op = op;
    t->params = params;
    t->name = std::string(op_rows[op].name) + "." + std::to_string(t->id);
    t->type = RS_F32;
    std::copy(src.begin(), src.end(), t->src);
    t->level = t->src[0]->level;
    rs_status status = op_rows[op].infer(*t);
    if (status == RS_OK && op_rows[op].one_level) status = expect_one_level(*t);
    return status == RS_OK ? t : graph_fail(g, status);
  });
}

// ---- what infer functions check

rs_status expect_f32_matrix(const rs_tensor &op, const rs_tensor &x, const char *what) {
  if (x.type == RS_F32 && x.layout == RS_ROWS && x.rank == 2 && x.kind != tensor_weight) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: %s '%s' is %s %s, expected activations f32 [T,C]", op_rows[op.op].name, what, x.name.c_str(),
                 rs_type_name(x.type), shape_text(x.rank, x.shape).c_str());
}

// A row a token, where an operator goes by the bounds of sequences.
rs_status expect_token_rows(const rs_tensor &op, const rs_tensor &x, const char *what) {
  RS_TRY(expect_f32_matrix(op, x, what));
  if (x.shape[0] == RS_DIM_TOKENS) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: %s '%s' is %s, expected a row a token, [T,C]", op_rows[op.op].name, what, x.name.c_str(),
                 shape_text(x.rank, x.shape).c_str());
}

rs_status expect_f32_vector(const rs_tensor &op, const rs_tensor &x, const char *what, int64_t n) {
  if (x.type == RS_F32 && x.layout == RS_ROWS && x.kind == tensor_weight && same_shape(x, 1, &n)) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: %s '%s' is %s %s, expected f32 [%lld]", op_rows[op.op].name, what, x.name.c_str(),
                 rs_type_name(x.type), shape_text(x.rank, x.shape).c_str(), static_cast<long long>(n));
}

rs_status expect_i32(const rs_tensor &op, const rs_tensor &x, const char *what, int64_t dim) {
  if (x.type == RS_I32 && same_shape(x, 1, &dim)) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: %s '%s' is %s %s, expected i32 %s", op_rows[op.op].name, what, x.name.c_str(),
                 rs_type_name(x.type), shape_text(x.rank, x.shape).c_str(), shape_text(1, &dim).c_str());
}

rs_status expect_activation(const rs_tensor &op) {
  if (op.params.act >= RS_ACT_NONE && op.params.act <= RS_ACT_QUICK_GELU) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: activation %d", op_rows[op.op].name, static_cast<int>(op.params.act));
}

rs_status result_like(rs_tensor &out, const rs_tensor &x) { return set_shape(&out, x.rank, x.shape); }

rs_status result_scores(rs_tensor &out) {
  const int64_t shape[] = {RS_DIM_TOKENS, 1};
  return set_shape(&out, 2, shape);
}

// A number a token.
rs_status expect_scores(const rs_tensor &op, const rs_tensor &x, const char *what) {
  RS_TRY(expect_token_rows(op, x, what));
  if (x.shape[1] == 1) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: %s '%s' is %s, expected [T,1]", op_rows[op.op].name, what, x.name.c_str(),
                 shape_text(x.rank, x.shape).c_str());
}

}  // namespace

rs_status rs_graph_create(const rs_model *model, rs_graph **out) {
  return rs_guarded([&] {
    static std::atomic<uint64_t> graphs{0};
    *out = nullptr;
    *out = new rs_graph();
    (*out)->id = ++graphs;
    (*out)->model = model;
    return RS_OK;
  });
}

void rs_graph_free(rs_graph *graph) { delete graph; }

rs_tensor *rs_input(rs_graph *g, const char *name, rs_type type, int rank, const int64_t *shape) {
  return built(g, [&]() -> rs_tensor * {
    if (!g->finished && rs_graph_tensor(g, name)) return graph_fail(g, same_name(name));
    rs_tensor *t = new_tensor(g, tensor_input);
    if (!t) return nullptr;
    t->name = name;
    t->type = type;
    if (type != RS_F32 && type != RS_I32)
      return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "input '%s' is %s, expected f32 or i32", name, rs_type_name(type)));
    const rs_status status = set_shape(t, rank, shape);
    return status == RS_OK ? t : graph_fail(g, status);
  });
}

rs_tensor *rs_weight(rs_graph *g, const char *name, int rank, const int64_t *shape) {
  return built(g, [&]() -> rs_tensor * {
    if (!g->model) return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "'%s': the graph has no model to take weights from", name));
    rs_tensor_info info = {};
    const rs_status found = rs_model_tensor(g->model, name, &info);
    if (found != RS_OK) return graph_fail(g, found);
    if (info.rank != rank || !std::equal(shape, shape + rank, info.shape))
      return graph_fail(g, rs_fail(RS_ERR_FORMAT, "'%s': shape %s, expected %s", name, shape_text(info.rank, info.shape).c_str(),
                                   shape_text(rank, shape).c_str()));
    return rs_constant(g, name, info.type, info.layout, rank, shape, info.data);
  });
}

rs_tensor *rs_constant(rs_graph *g, const char *name, rs_type type, rs_layout layout, int rank, const int64_t *shape,
                       const void *data) {
  return built(g, [&]() -> rs_tensor * {
    size_t bytes;
    const rs_status status = rs_tensor_bytes(type, layout, rank, shape, &bytes);
    if (status != RS_OK) return graph_fail(g, status);
    if (!data || reinterpret_cast<uintptr_t>(data) % align_data)
      return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "constant '%s' is NULL or not %zu-byte aligned", name, align_data));
    rs_tensor *t = new_tensor(g, tensor_weight);
    if (!t) return nullptr;
    t->name = name;
    t->type = type;
    t->layout = layout;
    t->data = data;
    t->rank = rank;
    std::copy(shape, shape + rank, t->shape);
    return t;
  });
}

[[gnu::cold]] rs_tensor *rs_columns(rs_graph *g, rs_tensor *x, int64_t first, int64_t count) {
  return built(g, [&]() -> rs_tensor * {
    if (!x) return nullptr;
    if (x->graph != g) return graph_fail(g, other_graph(*x));
    if (x->rank != 2 || x->type != RS_F32 || x->kind == tensor_weight || first < 0 || count < 1 || first > x->shape[1] - count)
      return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "%lld columns from %lld on of '%s' %s", static_cast<long long>(count),
                                   static_cast<long long>(first), x->name.c_str(), shape_text(x->rank, x->shape).c_str()));
    rs_tensor *t = new_tensor(g, tensor_view);
    if (!t) return nullptr;
    t->name = x->name + "[" + std::to_string(first) + ":" + std::to_string(first + count) + "]";
    t->type = RS_F32;
    t->rank = 2;
    t->shape[0] = x->shape[0];
    t->shape[1] = count;
    t->level = x->level;
    t->base = x;
    t->first = first;
    return t;
  });
}

rs_tensor *rs_output(rs_graph *g, rs_tensor *x) {
  return built(g, [&]() -> rs_tensor * {
    if (!x) return nullptr;
    if (x->graph != g) return graph_fail(g, other_graph(*x));
    if (x->kind != tensor_op)
      return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "output '%s' is not the result of an operator", x->name.c_str()));
    if (g->finished && !x->output)
      return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "output '%s': the graph is finished", x->name.c_str()));
    x->output = true;
    return x;
  });
}

rs_tensor *rs_name(rs_graph *g, rs_tensor *x, const char *name) {
  return built(g, [&]() -> rs_tensor * {
    if (!x) return nullptr;
    if (x->graph != g) return graph_fail(g, other_graph(*x));
    if (g->finished) return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "name '%s': the graph is finished", name));
    const rs_tensor *named = rs_graph_tensor(g, name);
    if (named && named != x) return graph_fail(g, same_name(name));
    x->name = name;
    return x;
  });
}

rs_tensor *rs_graph_tensor(const rs_graph *g, const char *name) {
  for (const auto &t : g->tensors)
    if (t->name == name) return t.get();
  return nullptr;
}

// ================================================================================ 10  operators

namespace {

// A tensor at run time: rows of `cols` elements of `width` bytes, `stride` elements apart.  Of f32 and i32, four bytes; of results
// that exist as bf16, because only kernels that take it read them, two (plan_widths).
struct value {
  char *data;
  int64_t rows, cols, stride, width;
  char *at(int64_t row, int64_t col) const { return data + (row * stride + col) * width; }
};

struct op_run {
  const rs_tensor *t;
  const kernel_row *kernels;
  value out, in[max_sources];
  int64_t first_row;  // of `out` and `in` where they are a block of a larger tensor
  char *shared;       // scratch of all threads
  char *each;         // scratch of thread i at each + i * each_bytes
  size_t each_bytes;
  struct run_error *error;

  const float *f32(int i) const { return reinterpret_cast<const float *>(in[i].data); }
  const int32_t *i32(int i) const { return reinterpret_cast<const int32_t *>(in[i].data); }
  float *result() const { return reinterpret_cast<float *>(out.data); }
  char *scratch(int thread) const { return each + each_bytes * static_cast<size_t>(thread); }
};

// What went wrong on any thread of a run: the first report wins.
struct run_error {
  std::atomic<int> taken{0};
  rs_status status = RS_OK;
  char text[sizeof last_error];
  void set(rs_status s) {
    if (taken.exchange(1)) return;
    status = s;
    memcpy(text, last_error, sizeof text);
  }
};

// ---- embed: ids [T] i32, table [V, C] -> [T, C]

rs_status embed_infer(rs_tensor &out) {
  const rs_tensor &ids = *out.src[0], &table = *out.src[1];
  RS_TRY(expect_i32(out, ids, "ids", RS_DIM_TOKENS));
  if (table.kind != tensor_weight || table.layout != RS_ROWS || table.rank != 2 || table.type == RS_I32)
    return rs_fail(RS_ERR_ARGUMENT, "embed: table '%s' is %s in %s %s, expected a table in rows [V,C]", table.name.c_str(),
                   rs_type_name(table.type), layout_name(table.layout), shape_text(table.rank, table.shape).c_str());
  const int64_t shape[] = {RS_DIM_TOKENS, table.shape[1]};
  return set_shape(&out, 2, shape);
}
work_bytes embed_work(const op_run &) { return {0, 0}; }
op_macs embed_macs(const op_run &) { return {0, RS_F32}; }
void embed_cpu(const op_run &r, const worker &me) {
  const rs_tensor &table = *r.t->src[1];
  matrix m = {};
  const codec *c = find_codec(table.type, table.layout, table.rank, table.shape, &m);
  if (!c) return r.error->set(RS_ERR_ARGUMENT);
  const matrix row{1, m.k};
  const size_t stride = c->row_stride(m);
  const auto [begin, end] = me.share(r.out.rows);
  for (int64_t i = begin; i < end; i++) {
    const int32_t id = r.i32(0)[i];
    if (id < 0 || static_cast<size_t>(id) >= m.n) {
      rs_fail(RS_ERR_ARGUMENT, "embed: id %d at position %lld is outside of '%s' [0,%zu)", id,
              static_cast<long long>(r.first_row + i), table.name.c_str(), m.n);
      return r.error->set(RS_ERR_ARGUMENT);
    }
    c->decode(static_cast<const char *>(table.data) + static_cast<size_t>(id) * stride, row, r.result() + i * r.out.stride);
  }
}

// ---- add: a + b

rs_status add_infer(rs_tensor &out) {
  const rs_tensor &a = *out.src[0], &b = *out.src[1];
  RS_TRY(expect_f32_matrix(out, a, "a"));
  RS_TRY(expect_f32_matrix(out, b, "b"));
  if (!same_shape(a, b.rank, b.shape))
    return rs_fail(RS_ERR_ARGUMENT, "add: '%s' %s and '%s' %s differ", a.name.c_str(), shape_text(a.rank, a.shape).c_str(),
                   b.name.c_str(), shape_text(b.rank, b.shape).c_str());
  return result_like(out, a);
}
work_bytes add_work(const op_run &) { return {0, 0}; }
op_macs add_macs(const op_run &) { return {0, RS_F32}; }
void add_cpu(const op_run &r, const worker &me) {
  const auto [begin, end] = me.share(r.out.rows);
  for (int64_t i = begin; i < end; i++) {
    const float *a = r.f32(0) + i * r.in[0].stride, *b = r.f32(1) + i * r.in[1].stride;
    float *y = r.result() + i * r.out.stride;
    for (int64_t j = 0; j < r.out.cols; j++) y[j] = a[j] + b[j];
  }
}

// ---- linear: act(x w^T + bias)
//
// With a scale of inputs s (quantized weights only): act((x s) w^T + bias).  What x has in channels that vary most would leave few
// of its 255 steps to the others; the file has w / s, and rounds that (SmoothQuant, arXiv 2211.10438).
//
// Work is cut into units of a block of rows by a run of panels.  A block of rows stays in L2 while the panels go by; a panel stays
// in L1 while the tiles of the block go by.  Quantized weights: every row of x is quantized once, then all threads meet.

constexpr int64_t linear_block_rows = product_rows;
constexpr int linear_float_group = 24;  // panels a product of floats: what its sums take stays in L2

bool is_quantized(rs_type type) { return type == RS_W8 || type == RS_W4; }

rs_status linear_infer(rs_tensor &out) {
  const rs_tensor &x = *out.src[0], &w = *out.src[1];
  RS_TRY(expect_f32_matrix(out, x, "x"));
  RS_TRY(expect_activation(out));
  if (w.kind != tensor_weight || w.layout != RS_PANELS)
    return rs_fail(RS_ERR_ARGUMENT, "linear: '%s' is in %s, expected a weight in panels", w.name.c_str(), layout_name(w.layout));
  if (w.shape[1] != x.shape[1])
    return rs_fail(RS_ERR_ARGUMENT, "linear: '%s' %s times '%s' %s: the inner dimensions differ", x.name.c_str(),
                   shape_text(x.rank, x.shape).c_str(), w.name.c_str(), shape_text(w.rank, w.shape).c_str());
  if (out.src[2]) RS_TRY(expect_f32_vector(out, *out.src[2], "bias", w.shape[0]));
  if (out.src[3] && !is_quantized(w.type))
    return rs_fail(RS_ERR_FORMAT, "linear: '%s' is %s, but has a scale of inputs, which only w8 and w4 have", w.name.c_str(),
                   rs_type_name(w.type));
  if (out.src[3]) RS_TRY(expect_f32_vector(out, *out.src[3], "scale of inputs", w.shape[1]));
  const int64_t shape[] = {x.shape[0], w.shape[0]};
  return set_shape(&out, 2, shape);
}

matrix linear_weight(const op_run &r) {
  return {static_cast<size_t>(r.t->src[1]->shape[0]), static_cast<size_t>(r.t->src[1]->shape[1])};
}

// The quantized rows of x end on a multiple of 16: kernel_row.
size_t linear_padded_rows(size_t rows) { return round_up(rows, 16); }

work_bytes linear_work(const op_run &r) {
  if (!is_quantized(r.t->src[1]->type)) return {0, 0};
  const size_t rows = static_cast<size_t>(r.out.rows);
  return {linear_padded_rows(rows) * linear_weight(r).kp() + rows * sizeof(row_quant), 0};
}

op_macs linear_macs(const op_run &r) {
  const rs_tensor &w = *r.t->src[1];
  return {static_cast<double>(r.out.rows) * static_cast<double>(w.shape[0]) * static_cast<double>(w.shape[1]), w.type};
}

// Where the quantized rows of x are, in the shared scratch.
struct quantized_rows {
  uint8_t *q;     // [T, Kp]
  row_quant *rq;  // [T]
  quantized_rows(const op_run &r, matrix m)
      : q(reinterpret_cast<uint8_t *>(r.shared)),
        rq(reinterpret_cast<row_quant *>(r.shared + linear_padded_rows(static_cast<size_t>(r.out.rows)) * m.kp())) {}
};

// y [rows][ldy] = act(x w^T + bias) for `rows` rows from row `i` and `panels` panels from panel `p`.
void linear_float_panels(const op_run &r, matrix m, int64_t i, int rows, int64_t p, int panels, const float *bias, float *y,
                         size_t ldy) {
  const kernel_row &k = *r.kernels;
  const rs_tensor &w = *r.t->src[1];
  const float *a = r.f32(0) + i * r.in[0].stride;
  const auto lda = static_cast<size_t>(r.in[0].stride);
  const size_t stride = panel_n * m.kp(), at = static_cast<size_t>(p) * stride;
  if (w.type == RS_F32) k.f32_panels(a, lda, rows, static_cast<const float *>(w.data) + at, stride, panels, m.k, y, ldy, false);
  else k.f16_panels(a, lda, rows, static_cast<const uint16_t *>(w.data) + at, stride, panels, m.k, y, ldy);
  for (int q = 0; q < panels; q++) k.finish_f32(bias ? bias + q * panel_n : nullptr, rows, r.t->params.act, y + q * panel_n, ldy);
}

void linear_quantized_panels(const op_run &r, matrix m, const quantized_rows &x, int64_t i, int rows, int64_t p, int panels,
                             const float *bias, float *y, size_t ldy) {
  const kernel_row &k = *r.kernels;
  const rs_tensor &w = *r.t->src[1];
  const uint8_t *a = x.q + static_cast<size_t>(i) * m.kp();
  const auto at = static_cast<size_t>(p);
  linear_result to = {};
  to.rq = x.rq + i, to.bias = bias, to.act = r.t->params.act, to.y = y, to.ldy = ldy;
  if (w.type == RS_W8) {
    const w8_panels weights(w.data, m);
    to.scale = weights.scale + at * panel_n, to.colsum = weights.colsum + at * panel_n;
    k.w8_panels(a, m.kp(), rows, weights.w + at * panel_n * m.kp(), panels, to);
  } else {
    const w4_panels weights(w.data, m);
    to.scale = weights.scale + at * panel_n, to.colsum = weights.colsum + at * panel_n;
    k.w4_panels(a, m.kp(), rows, weights.w + at * panel_n * m.kp() / 2, weights.mult + at * panel_n * m.kp() / group_k, panels, to);
  }
}

void linear_cpu(const op_run &r, const worker &me) {
  const matrix m = linear_weight(r);
  const quantized_rows x(r, m);
  const bool quantized = is_quantized(r.t->src[1]->type);
  if (quantized) {
    const auto [begin, end] = me.share(r.out.rows);
    r.kernels->quantize(r.f32(0) + begin * r.in[0].stride, static_cast<size_t>(r.in[0].stride), r.t->src[3] ? r.f32(3) : nullptr,
                        end - begin, m.k, m.kp(), x.rq + begin, x.q + static_cast<size_t>(begin) * m.kp());
    me.barrier();
  }
  const float *bias = r.t->src[2] ? r.f32(2) : nullptr;
  const bool rounds = r.out.width == 2;  // to bf16
  const auto product = [&](int64_t i, int rows, int64_t p, int panels, const float *b, float *y, size_t ldy) {
    if (quantized) linear_quantized_panels(r, m, x, i, rows, p, panels, b, y, ldy);
    else linear_float_panels(r, m, i, rows, p, panels, b, y, ldy);
  };
  // `n` channels of `panels` panels, by way of the cache: what a kernel cannot write where it belongs.
  alignas(align_data) float part[linear_block_rows * linear_group * panel_n];
  const auto by_way_of_part = [&](int64_t i, int rows, int64_t p, int64_t panels, size_t n, const float *b) {
    const auto ld = static_cast<size_t>(panels * panel_n);
    product(i, rows, p, static_cast<int>(panels), b, part, ld);
    char *y = r.out.at(i, p * panel_n);
    if (rounds) return r.kernels->coarse_attn->round_rows(part, ld, rows, n, reinterpret_cast<uint16_t *>(y), r.out.stride);
    for (int j = 0; j < rows; j++, y += r.out.stride * 4) memcpy(y, part + static_cast<size_t>(j) * ld, n * 4);
  };
  const int64_t panels = static_cast<int64_t>(m.np() / panel_n), whole = static_cast<int64_t>(m.n / panel_n);
  const int64_t blocks = ceil_div(r.out.rows, linear_block_rows), group = quantized ? linear_group : linear_float_group;
  // A few units a thread, so that shares come out even; one column of units where there are blocks enough.
  const int64_t runs = std::min(panels, ceil_div(4 * me.threads, std::max<int64_t>(1, blocks)));
  for (int64_t unit = me.next(-1); unit < blocks * runs; unit = me.next(unit)) {
    const int64_t i = unit / runs * linear_block_rows, end = (unit % runs + 1) * panels / runs;
    const int rows = static_cast<int>(std::min(r.out.rows - i, linear_block_rows));
    int64_t p = unit % runs * panels / runs;
    for (int64_t n; p < std::min(end, whole); p += n) {
      n = std::min(group, std::min(end, whole) - p);
      const float *b = bias ? bias + p * panel_n : nullptr;
      if (rounds) by_way_of_part(i, rows, p, n, static_cast<size_t>(n * panel_n), b);
      else
        product(i, rows, p, static_cast<int>(n), b, reinterpret_cast<float *>(r.out.at(i, p * panel_n)),
                static_cast<size_t>(r.out.stride));
    }
    if (p == end) continue;
    // The last panel, of fewer than 16 channels.
    const size_t n = m.n % panel_n;
    float padded_bias[panel_n] = {};
    if (bias) memcpy(padded_bias, bias + p * panel_n, n * 4);
    by_way_of_part(i, rows, p, 1, n, padded_bias);
  }
}

// ---- layer_norm: gamma (v - mean) / sqrt(var + eps) + beta, v = x + residual

rs_status layer_norm_infer(rs_tensor &out) {
  const rs_tensor &x = *out.src[0];
  RS_TRY(expect_f32_matrix(out, x, "x"));
  if (const rs_tensor *residual = out.src[1]) {
    RS_TRY(expect_f32_matrix(out, *residual, "residual"));
    if (!same_shape(x, residual->rank, residual->shape))
      return rs_fail(RS_ERR_ARGUMENT, "layer_norm: '%s' %s and residual '%s' %s differ", x.name.c_str(),
                     shape_text(x.rank, x.shape).c_str(), residual->name.c_str(),
                     shape_text(residual->rank, residual->shape).c_str());
  }
  RS_TRY(expect_f32_vector(out, *out.src[2], "gamma", x.shape[1]));
  RS_TRY(expect_f32_vector(out, *out.src[3], "beta", x.shape[1]));
  if (!(out.params.eps >= 0) || !std::isfinite(out.params.eps))
    return rs_fail(RS_ERR_ARGUMENT, "layer_norm: eps %g", static_cast<double>(out.params.eps));
  return result_like(out, x);
}
work_bytes layer_norm_work(const op_run &) { return {0, 0}; }
op_macs layer_norm_macs(const op_run &) { return {0, RS_F32}; }
void layer_norm_cpu(const op_run &r, const worker &me) {
  const auto [begin, end] = me.share(r.out.rows);
  for (int64_t i = begin; i < end; i++)
    r.kernels->layer_norm(r.f32(0) + i * r.in[0].stride, r.t->src[1] ? r.f32(1) + i * r.in[1].stride : nullptr, r.f32(2), r.f32(3),
                          r.t->params.eps, static_cast<size_t>(r.out.cols), r.result() + i * r.out.stride);
}

// ---- flash_attn: softmax(q k^T scale) v, varlen
//
// A unit is one head of some queries of one sequence.  Keys and values go by in blocks, packed once for all queries of the unit;
// queries go by in parts of attn_rows, whose scores stay in L1.  Blocks are counted from the start of the sequence: the order of
// all sums depends on the sequence alone.  The softmax is online; a sequence of one block is an ordinary softmax.
//
// What no query of a part sees, behind it (causal) or out of its window, is not computed; what some of them do not see weighs 0
// there, which changes no sum.  So a result does not depend on how queries were parted.

struct attn_reach {  // how far from a query the keys are that it sees
  int64_t behind, ahead;
};
attn_reach reach_of(const op_params &p) {
  const int64_t either = std::min(p.window ? p.window : INT32_MAX, INT32_MAX / 2);  // twice that fits in 32 bits
  return {either, p.causal ? 0 : either};
}

// How many pairs of a query and a key that it sees there are in all sequences, or of their first queries only.
double seen_pairs(const op_params &p, const int32_t *cu, int64_t sequences) {
  const attn_reach reach = reach_of(p);
  const auto one_side = [](int64_t n, int64_t most) {  // the sum of min(i, most)
    const int64_t ramp = std::min(n, most + 1);
    return ramp * (ramp - 1) / 2 + (n - ramp) * most;
  };
  int64_t pairs = 0;
  for (int64_t b = 0; cu && b < sequences; b++) {
    const int64_t n = cu[b + 1] - cu[b];
    pairs += p.first_only ? std::min(n, reach.ahead + 1) : n + one_side(n, reach.behind) + one_side(n, reach.ahead);
  }
  return static_cast<double>(pairs);
}

rs_status expect_heads(const rs_tensor &op, const rs_tensor &x) {
  if (op.params.heads >= 1 && x.shape[1] % op.params.heads == 0) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: %d heads do not divide %lld columns", op_rows[op.op].name, op.params.heads,
                 static_cast<long long>(x.shape[1]));
}

rs_status expect_attention(const rs_tensor &op, const rs_tensor &q, const rs_tensor *sizes) {
  RS_TRY(expect_heads(op, q));
  if (!(op.params.scale > 0) || !std::isfinite(op.params.scale))
    return rs_fail(RS_ERR_ARGUMENT, "%s: scale %g, expected a positive one", op_rows[op.op].name,
                   static_cast<double>(op.params.scale));
  return sizes ? expect_scores(op, *sizes, "sizes") : RS_OK;
}

rs_status flash_attn_infer(rs_tensor &out) {
  const rs_tensor &q = *out.src[0];
  static const char *const names[] = {"q", "k", "v"};
  for (int i = 0; i < 3; i++) {
    RS_TRY(expect_token_rows(out, *out.src[i], names[i]));
    if (!same_shape(q, 2, out.src[i]->shape))
      return rs_fail(RS_ERR_ARGUMENT, "flash_attn: q %s and %s %s differ", shape_text(2, q.shape).c_str(), names[i],
                     shape_text(2, out.src[i]->shape).c_str());
  }
  RS_TRY(expect_i32(out, *out.src[3], "cu_seqlens", RS_DIM_CU_SEQLENS));
  RS_TRY(expect_attention(out, q, out.src[4]));
  return result_like(out, q);
}

constexpr int64_t attn_unit_queries = 256, attn_coarse_queries = 512;

size_t head_size(const op_run &r) { return static_cast<size_t>(r.out.cols / r.t->params.heads); }

// Are the values of t results of a layer with quantized weights, so that they carry its noise?
bool from_quantized(const rs_tensor &t) {
  const rs_tensor &made = *storage_of(&t);
  if (made.kind == tensor_op && made.op == OP_ROPE) return from_quantized(*made.src[0]);  // which only turns it
  return made.kind == tensor_op && made.op == OP_LINEAR && is_quantized(made.src[1]->type);
}

// How many of its sources, from the first on, attention or what scores by it may take as bf16.
int coarse_sources(const rs_tensor &t) { return t.op == OP_FLASH_ATTN ? 3 : t.op == OP_ATTN_COLSUM ? 2 : 0; }
const attn_kernels *coarse_kernels(const kernel_row &kernels, const rs_tensor &t) {
  for (int i = 0; i < coarse_sources(t); i++)
    if (!from_quantized(*t.src[i])) return nullptr;
  return t.src[0]->shape[1] / t.params.heads <= attn_most_d ? kernels.coarse_attn : nullptr;
}
const attn_kernels *coarse_kernels(const op_run &r) { return coarse_kernels(*r.kernels, *r.t); }

// Does an operator take its source i as bf16?
bool takes_bf16(const kernel_row &kernels, const rs_tensor &t, int i) {
  return i < coarse_sources(t) && coarse_kernels(kernels, t);
}

// Products of f32 for every ISA, by the tile kernel of linear layers: keys [attn_keys / 16][D][16], values [Dp /
// 16][attn_keys][16].
struct attn_scratch : scratch_parts {
  float *keys = nullptr, *values = nullptr;  // of a block
  float *scores = nullptr;                   // [attn_rows][attn_keys]
  float *out = nullptr;                      // [attn_unit_queries][Dp]
  float *most = nullptr, *total = nullptr;   // [attn_unit_queries]
  float *correction = nullptr;               // [attn_rows]
  float *log_sizes = nullptr;                // [attn_keys]
  size_t dp;

  attn_scratch(char *memory, const op_run &r) : scratch_parts(memory), dp(round_up(head_size(r), panel_n)) {
    if (const attn_kernels *coarse = coarse_kernels(r)) {  // lays it out by itself
      bytes = coarse->scratch_bytes(head_size(r), static_cast<size_t>(std::min(attn_coarse_queries, r.in[0].rows)));
      return;
    }
    keys = take(attn_keys * head_size(r));
    values = take(attn_keys * dp);
    scores = take(attn_rows * attn_keys);
    out = take(attn_unit_queries * dp);
    most = take(attn_unit_queries);
    total = take(attn_unit_queries);
    correction = take(attn_rows);
    log_sizes = take(attn_keys);
  }
};

work_bytes flash_attn_work(const op_run &r) { return {0, attn_scratch(nullptr, r).bytes}; }
op_macs flash_attn_macs(const op_run &r) {
  const double pairs = seen_pairs(r.t->params, r.i32(3), r.in[3].cols - 1);
  return {2 * pairs * static_cast<double>(r.out.cols), coarse_kernels(r) ? coarse_kernels(r)->type : RS_F32};
}

// n keys [n][d] to panels [np / 16][d][16], the keys that fill up the last panel zero.
void pack_keys(const float *from, int64_t stride, int64_t n, size_t d, float *to) {
  for (; n > 0; n -= panel_n, from += panel_n * stride, to += d * panel_n) {
    const int64_t here = std::min<int64_t>(n, panel_n);
    if (here < panel_n) memset(to, 0, d * panel_n * 4);
    size_t done = 0;
#ifdef RS_X86
    for (; here == panel_n && done + 4 <= d; done += 4)
      for (int64_t j = 0; j < panel_n; j += 4) {
        const float *x = from + j * stride + done;
        __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(x + stride), c = _mm_loadu_ps(x + 2 * stride),
               e = _mm_loadu_ps(x + 3 * stride);
        _MM_TRANSPOSE4_PS(a, b, c, e);
        float *y = to + done * panel_n + j;
        _mm_storeu_ps(y, a);
        _mm_storeu_ps(y + panel_n, b);
        _mm_storeu_ps(y + 2 * panel_n, c);
        _mm_storeu_ps(y + 3 * panel_n, e);
      }
#endif
    for (size_t i = done; i < d; i++)
      for (int64_t j = 0; j < here; j++) to[i * panel_n + static_cast<size_t>(j)] = from[j * stride + static_cast<int64_t>(i)];
  }
}

// n values [n][d] to panels [dp / 16][attn_keys][16], the columns that fill up the last panel zero.
void pack_values(const float *from, int64_t stride, int64_t n, size_t d, size_t dp, float *to) {
  for (size_t i = 0; i < dp; i += panel_n, to += attn_keys * panel_n)
    for (int64_t j = 0; j < n; j++) {
      const float *x = from + j * stride + i;
      if (i + panel_n <= d) memcpy(to + j * panel_n, x, panel_n * 4);
      else
        for (size_t c = 0; c < panel_n; c++) to[static_cast<size_t>(j) * panel_n + c] = i + c < d ? x[c] : 0;
    }
}

// What a score gets, before it is multiplied by scale, of a key that stands for several tokens.
void find_log_sizes(const value &sizes, int64_t first, int n, float scale, float *out) {
  const auto *x = reinterpret_cast<const float *>(sizes.data) + first * sizes.stride;
  for (int i = 0; i < n; i++) out[i] = std::log(x[i * sizes.stride]) / scale;
}
void add_to_rows(float *scores, size_t ld, int rows, int n, const float *x) {
  for (int i = 0; i < rows; i++, scores += ld)
    for (int j = 0; j < n; j++) scores[j] += x[j];
}

// Scores of keys that a query does not see, of n keys from place `key` on.  Finite, since exp of the kernels is of finite numbers;
// what is left of it is 0.  Where a query sees none of a block that others see, all of its weights there are exp(0) until it sees
// one: a power of two times any scale is exact, so that nothing is left of the difference, and what they came to is then multiplied
// by 0.
constexpr float masked_score = -0x1p100f;
void mask_unseen_keys(float *scores, size_t ld, int rows, int n, int64_t query, int64_t key, attn_reach reach) {
  for (int i = 0; i < rows; i++, scores += ld, query++) {
    const int64_t begin = std::clamp<int64_t>(query - reach.behind - key, 0, n),
                  end = std::clamp<int64_t>(query + reach.ahead + 1 - key, begin, n);
    std::fill(scores, scores + begin, masked_score);
    std::fill(scores + end, scores + n, masked_score);
  }
}

// Places of the keys that queries [begin, end) of a sequence of n see, the first rounded down to a multiple of `step`.
struct attn_range {
  int64_t begin, end;
};
attn_range seen_keys(int64_t begin, int64_t end, int64_t n, attn_reach reach, int64_t step) {
  return {std::max<int64_t>(0, begin - reach.behind) / step * step, std::min(n, end + reach.ahead)};
}

void attn_coarse_unit(const op_run &r, const attn_kernels &coarse, char *scratch, int64_t head, int64_t seq_begin, int64_t seq_end,
                      int64_t query_begin, int64_t query_end) {
  const auto d = static_cast<int64_t>(head_size(r));
  const auto from = [&](int i, int64_t row) { return attn_input{r.in[i].at(row, head * d), r.in[i].stride, r.in[i].width == 2}; };
  attn_problem p = {};
  p.q = from(0, query_begin), p.k = from(1, seq_begin), p.v = from(2, seq_begin);
  p.first_query = query_begin - seq_begin;
  p.queries = query_end - query_begin;
  const attn_reach reach = reach_of(r.t->params);
  const attn_range keys = seen_keys(p.first_query, query_end - seq_begin, seq_end - seq_begin, reach, attn_keys);
  // Whole blocks: what is common to a block's keys must not depend on how queries are shared out.
  p.first_key = keys.begin;
  p.keys = std::min(seq_end - seq_begin, static_cast<int64_t>(round_up(static_cast<size_t>(keys.end), attn_keys)));
  p.behind = reach.behind, p.ahead = reach.ahead;
  p.d = static_cast<size_t>(d);
  p.scale = r.t->params.scale;
  if (r.t->src[4]) p.sizes = r.f32(4) + seq_begin * r.in[4].stride, p.ld_sizes = r.in[4].stride;
  p.out = r.result() + query_begin * r.out.stride + head * d;
  p.ldo = r.out.stride;
  p.scratch = scratch;
  coarse.attend(p);
}

void attn_unit(const op_run &r, const attn_scratch &s, int64_t head, int64_t seq_begin, int64_t seq_end, int64_t query_begin,
               int64_t query_end) {
  const kernel_row &k = *r.kernels;
  if (const attn_kernels *coarse = coarse_kernels(r))
    return attn_coarse_unit(r, *coarse, s.memory, head, seq_begin, seq_end, query_begin, query_end);
  const size_t d = head_size(r);
  const int64_t column = head * static_cast<int64_t>(d);
  const auto ldq = static_cast<size_t>(r.in[0].stride);
  const attn_reach reach = reach_of(r.t->params);
  // Places of queries and keys are in the sequence.
  const int64_t n_keys = seq_end - seq_begin, first_query = query_begin - seq_begin, queries_end = query_end - seq_begin;
  const attn_range all = seen_keys(first_query, queries_end, n_keys, reach, attn_keys);
  for (int64_t key = all.begin; key < all.end; key += attn_keys) {
    const int64_t n = std::min<int64_t>(attn_keys, all.end - key), at_key = seq_begin + key;
    const int value_panels = static_cast<int>(s.dp / panel_n);
    if (r.t->src[4]) find_log_sizes(r.in[4], at_key, static_cast<int>(n), r.t->params.scale, s.log_sizes);
    pack_keys(r.f32(1) + at_key * r.in[1].stride + column, r.in[1].stride, n, d, s.keys);
    pack_values(r.f32(2) + at_key * r.in[2].stride + column, r.in[2].stride, n, d, s.dp, s.values);
    for (int64_t query = first_query; query < queries_end; query += attn_rows) {
      const int rows = static_cast<int>(std::min<int64_t>(attn_rows, queries_end - query));
      // Of whole panels: softmax then adds what lies in them as it would among all.
      const attn_range seen = seen_keys(query, query + rows, n_keys, reach, panel_n);
      const int64_t begin = std::max(seen.begin - key, int64_t(0)), end = std::min(seen.end - key, n);
      if (begin >= end) continue;
      const bool first = seen.begin >= key;
      const int64_t at = query - first_query;
      const auto skipped = static_cast<size_t>(begin);
      const int some = static_cast<int>(end - begin);
      const float *q = r.f32(0) + (seq_begin + query) * r.in[0].stride + column;
      float *out = s.out + at * static_cast<int64_t>(s.dp), *correction = s.correction, *scores = s.scores + begin;
      k.f32_panels(q, ldq, rows, s.keys + skipped * d, d * panel_n, static_cast<int>(ceil_div(some, panel_n)), d, scores, attn_keys,
                   false);
      if (r.t->src[4]) add_to_rows(scores, attn_keys, rows, some, s.log_sizes + begin);
      if (seen.begin < query + rows - 1 - reach.behind || seen.end > query + reach.ahead + 1)
        mask_unseen_keys(scores, attn_keys, rows, some, query, key + begin, reach);
      k.softmax(scores, attn_keys, rows, static_cast<size_t>(some), r.t->params.scale, first, s.most + at, s.total + at,
                correction);
      for (int i = 0; !first && i < rows; i++)
        for (size_t j = 0; j < s.dp; j++) out[static_cast<size_t>(i) * s.dp + j] *= correction[i];
      k.f32_panels(scores, attn_keys, rows, s.values + skipped * panel_n, attn_keys * panel_n, value_panels,
                   static_cast<size_t>(some), out, s.dp, !first);
    }
  }
  for (int64_t i = 0; i < query_end - query_begin; i++) {
    const float inverse = 1 / s.total[i], *from = s.out + i * static_cast<int64_t>(s.dp);
    float *to = r.result() + (query_begin + i) * r.out.stride + column;
    for (size_t j = 0; j < d; j++) to[j] = from[j] * inverse;
  }
}

// Queries of a unit, for a sequence of n: as many as `most` allows, in even parts, since keys and values are packed once a unit;
// fewer where the threads would else have unequal shares.
int64_t attn_queries(int64_t n, int64_t most, int64_t units_before, int threads) {
  const auto part = [&](int64_t parts) { return static_cast<int64_t>(round_up(static_cast<size_t>(ceil_div(n, parts)), 16)); };
  int64_t parts = std::max<int64_t>(1, ceil_div(n, most));
  for (; units_before < 4 * threads && part(parts) > attn_rows; parts++) {
    const int64_t units = units_before * ceil_div(n, part(parts));
    if (10 * ceil_div(units, threads) * threads <= 11 * units) break;
  }
  return part(parts);
}

void flash_attn_cpu(const op_run &r, const worker &me) {
  const attn_scratch scratch(r.scratch(me.thread), r);
  const int32_t *cu = r.i32(3);
  const int64_t sequences = r.in[3].cols - 1, heads = r.t->params.heads;
  const int64_t most = coarse_kernels(r) ? attn_coarse_queries : attn_unit_queries;
  int64_t unit = 0, mine = me.next(-1);
  for (int64_t b = 0; b < sequences; b++) {
    const int64_t queries = attn_queries(cu[b + 1] - cu[b], most, heads * sequences, me.threads);
    for (int64_t head = 0; head < heads; head++)
      for (int64_t query = cu[b]; query < cu[b + 1]; query += queries, unit++)
        if (unit == mine) {
          attn_unit(r, scratch, head, cu[b], cu[b + 1], query, std::min<int64_t>(query + queries, cu[b + 1]));
          mine = me.next(mine);
        }
  }
}

// ---- attn_pool: attention of one query that is the same for every sequence

rs_status attn_pool_infer(rs_tensor &out) {
  const rs_tensor &k = *out.src[1], &v = *out.src[2];
  RS_TRY(expect_token_rows(out, k, "k"));
  RS_TRY(expect_token_rows(out, v, "v"));
  if (!same_shape(k, 2, v.shape))
    return rs_fail(RS_ERR_ARGUMENT, "attn_pool: k %s and v %s differ", shape_text(2, k.shape).c_str(),
                   shape_text(2, v.shape).c_str());
  RS_TRY(expect_f32_vector(out, *out.src[0], "query", k.shape[1]));
  RS_TRY(expect_i32(out, *out.src[3], "cu_seqlens", RS_DIM_CU_SEQLENS));
  RS_TRY(expect_attention(out, k, out.src[4]));
  out.level = k.level;
  const int64_t shape[] = {RS_DIM_SEQUENCES, k.shape[1]};
  return set_shape(&out, 2, shape);
}
work_bytes attn_pool_work(const op_run &) { return {0, 0}; }
op_macs attn_pool_macs(const op_run &r) {
  return {2 * static_cast<double>(r.in[1].rows) * static_cast<double>(r.out.cols), RS_F32};
}

// Online softmax, a key at a time: this runs once a sequence.
void attn_pool_head(const op_run &r, int64_t b, int64_t head) {
  const int32_t *cu = r.i32(3);
  const int64_t d = r.out.cols / r.t->params.heads, column = head * d;
  const float *q = r.f32(0) + column, scale = r.t->params.scale;
  float *y = r.result() + b * r.out.stride + column;
  std::fill(y, y + d, 0.0f);
  float most = -INFINITY, total = 0;
  for (int64_t i = cu[b]; i < cu[b + 1]; i++) {
    const float *k = r.f32(1) + i * r.in[1].stride + column, *v = r.f32(2) + i * r.in[2].stride + column;
    float score = 0;
    for (int64_t j = 0; j < d; j++) score += q[j] * k[j];
    score *= scale;
    if (r.t->src[4]) score += std::log(r.f32(4)[i * r.in[4].stride]);
    const float largest = std::max(most, score), keep = std::exp(most - largest), weight = std::exp(score - largest);
    for (int64_t j = 0; j < d; j++) y[j] = y[j] * keep + weight * v[j];
    total = total * keep + weight;
    most = largest;
  }
  for (int64_t j = 0; total > 0 && j < d; j++) y[j] /= total;
}

void attn_pool_cpu(const op_run &r, const worker &me) {
  const int64_t heads = r.t->params.heads, units = r.out.rows * heads;
  for (int64_t unit = me.next(-1); unit < units; unit = me.next(unit)) attn_pool_head(r, unit / heads, unit % heads);
}

// ---- gate: act(x[:, :F]) x[:, F:]

rs_status gate_infer(rs_tensor &out) {
  const rs_tensor &x = *out.src[0];
  RS_TRY(expect_f32_matrix(out, x, "x"));
  RS_TRY(expect_activation(out));
  if (x.shape[1] % 2)
    return rs_fail(RS_ERR_ARGUMENT, "gate: '%s' %s has no two halves", x.name.c_str(), shape_text(2, x.shape).c_str());
  const int64_t shape[] = {x.shape[0], x.shape[1] / 2};
  return set_shape(&out, 2, shape);
}
work_bytes gate_work(const op_run &) { return {0, 0}; }
op_macs gate_macs(const op_run &) { return {0, RS_F32}; }
void gate_cpu(const op_run &r, const worker &me) {
  const auto [begin, end] = me.share(r.out.rows);
  const int64_t f = r.out.cols;
  for (int64_t i = begin; i < end; i++) {
    const float *x = r.f32(0) + i * r.in[0].stride;
    float *y = r.result() + i * r.out.stride;
    // finish_f32 takes 16 channels of a row at a time.
    int64_t j = 0;
    for (; j + panel_n <= f; j += panel_n) {
      memcpy(y + j, x + j, panel_n * 4);
      r.kernels->finish_f32(nullptr, 1, r.t->params.act, y + j, panel_n);
    }
    if (j < f) {
      float part[panel_n] = {};
      memcpy(part, x + j, static_cast<size_t>(f - j) * 4);
      r.kernels->finish_f32(nullptr, 1, r.t->params.act, part, panel_n);
      memcpy(y + j, part, static_cast<size_t>(f - j) * 4);
    }
    for (j = 0; j < f; j++) y[j] *= x[f + j];
  }
}

// ---- rope_table: cos and sin of position times frequency

rs_status rope_table_infer(rs_tensor &out) {
  const rs_tensor &frequencies = *out.src[1];
  RS_TRY(expect_i32(out, *out.src[0], "positions", RS_DIM_TOKENS));
  RS_TRY(expect_f32_vector(out, frequencies, "frequencies", frequencies.rank == 1 ? frequencies.shape[0] : 1));
  const int64_t shape[] = {RS_DIM_TOKENS, 2 * frequencies.shape[0]};
  return set_shape(&out, 2, shape);
}

// By series in f64, with an error below 2^-36 where |x| < 2^24: what is rounded to f32 is then the same on every machine and
// device. Pi / 2 has two parts, of which the first times a whole number below 2^24 is exact.
void cos_sin(float x, float *cosine, float *sine) {
  const double whole = 0x1.8p52, shifted = x * 0.63661977236758134 + whole, turns = shifted - whole;  // rounded: quarters of a turn
  int64_t quarter;
  memcpy(&quarter, &shifted, sizeof quarter);
  const double r = (x - turns * 0x1.921fb54p+0) - turns * 0x1.10b4611a62633p-30, t = r * r;
  const double s = r + r * t * (-1.0 / 6 + t * (1.0 / 120 + t * (-1.0 / 5040 + t * (1.0 / 362880 - t / 39916800))));
  const double c = 1 + t * (-0.5 + t * (1.0 / 24 + t * (-1.0 / 720 + t * (1.0 / 40320 + t * (-1.0 / 3628800 + t / 479001600)))));
  const auto a = static_cast<float>(quarter & 1 ? s : c), b = static_cast<float>(quarter & 1 ? c : s);
  *cosine = (quarter + 1) & 2 ? -a : a;
  *sine = quarter & 2 ? -b : b;
}

work_bytes rope_table_work(const op_run &) { return {0, 0}; }
op_macs rope_table_macs(const op_run &) { return {0, RS_F32}; }
void rope_table_cpu(const op_run &r, const worker &me) {
  const auto [begin, end] = me.share(r.out.rows);
  const int64_t half = r.out.cols / 2;
  for (int64_t i = begin; i < end; i++) {
    float *y = r.result() + i * r.out.stride;
    for (int64_t j = 0; j < half; j++) cos_sin(static_cast<float>(r.i32(0)[i]) * r.f32(1)[j], y + j, y + half + j);
  }
}

// ---- rope: pairs of columns of each head, turned by the angles of their token

rs_status rope_infer(rs_tensor &out) {
  const rs_tensor &x = *out.src[0], &table = *out.src[1];
  RS_TRY(expect_f32_matrix(out, x, "x"));
  RS_TRY(expect_f32_matrix(out, table, "table"));
  RS_TRY(expect_heads(out, x));
  if (table.shape[0] != x.shape[0] || table.shape[1] % 2 || table.shape[1] > x.shape[1] / out.params.heads)
    return rs_fail(RS_ERR_ARGUMENT, "rope: '%s' %s by '%s' %s: expected a row of at most %lld columns a token, two for each angle",
                   x.name.c_str(), shape_text(2, x.shape).c_str(), table.name.c_str(), shape_text(2, table.shape).c_str(),
                   static_cast<long long>(x.shape[1] / out.params.heads));
  return result_like(out, x);
}
work_bytes rope_work(const op_run &) { return {0, 0}; }
op_macs rope_macs(const op_run &) { return {0, RS_F32}; }
void rope_cpu(const op_run &r, const worker &me) {
  const auto [begin, end] = me.share(r.out.rows);
  const auto heads = static_cast<size_t>(r.t->params.heads);
  for (int64_t i = begin; i < end; i++)
    r.kernels->rope(r.f32(0) + i * r.in[0].stride, r.f32(1) + i * r.in[1].stride, heads, static_cast<size_t>(r.out.cols) / heads,
                    static_cast<size_t>(r.in[1].cols / 2), r.result() + i * r.out.stride);
}

// ---- pool: [T, C] -> [B, C]

rs_status pool_infer(rs_tensor &out) {
  const rs_tensor &x = *out.src[0];
  RS_TRY(expect_token_rows(out, x, "x"));
  RS_TRY(expect_i32(out, *out.src[1], "cu_seqlens", RS_DIM_CU_SEQLENS));
  if (out.params.pooling < RS_POOL_MEAN || out.params.pooling > RS_POOL_LAST)
    return rs_fail(RS_ERR_ARGUMENT, "pool: pooling %d", static_cast<int>(out.params.pooling));
  if (out.params.skip < 0) return rs_fail(RS_ERR_ARGUMENT, "pool: skip %d", out.params.skip);
  if (out.src[2]) RS_TRY(expect_scores(out, *out.src[2], "sizes"));
  const int64_t shape[] = {RS_DIM_SEQUENCES, x.shape[1]};
  return set_shape(&out, 2, shape);
}
work_bytes pool_work(const op_run &) { return {0, 0}; }
op_macs pool_macs(const op_run &) { return {0, RS_F32}; }
void pool_cpu(const op_run &r, const worker &me) {
  const int32_t *cu = r.i32(1);
  const auto [begin, end] = me.share(r.out.rows);
  for (int64_t b = begin; b < end; b++) {
    float *y = r.result() + b * r.out.stride;
    const int64_t first = int64_t{cu[b]} + r.t->params.skip, n = cu[b + 1] - first;
    const auto row = [&](int64_t i) { return r.f32(0) + (first + i) * r.in[0].stride; };
    std::fill(y, y + r.out.cols, 0.0f);
    if (n <= 0) continue;
    const rs_pooling pooling = r.t->params.pooling;
    if (pooling == RS_POOL_CLS || pooling == RS_POOL_LAST) {
      memcpy(y, row(pooling == RS_POOL_CLS ? 0 : n - 1), static_cast<size_t>(r.out.cols) * 4);
      continue;
    }
    if (pooling == RS_POOL_MAX) {
      memcpy(y, row(0), static_cast<size_t>(r.out.cols) * 4);
      for (int64_t i = 1; i < n; i++)
        for (int64_t j = 0; j < r.out.cols; j++) y[j] = row(i)[j] > y[j] || std::isnan(row(i)[j]) ? row(i)[j] : y[j];
      continue;
    }
    const bool weighted = pooling == RS_POOL_WEIGHTED_MEAN;
    double count = 0;
    for (int64_t i = 0; i < n; i++) {
      const float weight = weighted ? static_cast<float>(i + 1) : r.t->src[2] ? r.f32(2)[(first + i) * r.in[2].stride] : 1;
      const float *x = row(i);
      for (int64_t j = 0; j < r.out.cols; j++) y[j] += weight * x[j];
      count += static_cast<double>(weight);
    }
    const auto factor = static_cast<float>(1 / (pooling == RS_POOL_MEAN_SQRT_LEN ? std::sqrt(count) : count));
    for (int64_t j = 0; j < r.out.cols; j++) y[j] *= factor;
  }
}

// ---- l2_normalize: each row divided by its norm

void l2_normalize_row(const float *x, int64_t n, float *y) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += static_cast<double>(x[i]) * x[i];
  const auto factor = static_cast<float>(sum > 0 ? 1 / std::sqrt(sum) : std::isnan(sum) ? sum : 1);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor;
}

rs_status l2_normalize_infer(rs_tensor &out) {
  RS_TRY(expect_f32_matrix(out, *out.src[0], "x"));
  return result_like(out, *out.src[0]);
}
work_bytes l2_normalize_work(const op_run &) { return {0, 0}; }
op_macs l2_normalize_macs(const op_run &) { return {0, RS_F32}; }
void l2_normalize_cpu(const op_run &r, const worker &me) {
  const auto [begin, end] = me.share(r.out.rows);
  for (int64_t i = begin; i < end; i++) l2_normalize_row(r.f32(0) + i * r.in[0].stride, r.out.cols, r.result() + i * r.out.stride);
}

// ---- shift: how far each row moved

rs_status shift_infer(rs_tensor &out) {
  const rs_tensor &to = *out.src[0];
  RS_TRY(expect_f32_matrix(out, to, "to"));
  if (const rs_tensor *from = out.src[1]) {
    RS_TRY(expect_f32_matrix(out, *from, "from"));
    if (!same_shape(to, from->rank, from->shape))
      return rs_fail(RS_ERR_ARGUMENT, "shift: '%s' %s and '%s' %s differ", to.name.c_str(), shape_text(to.rank, to.shape).c_str(),
                     from->name.c_str(), shape_text(from->rank, from->shape).c_str());
  }
  const rs_distance d = out.params.distance;
  if (d < RS_DISTANCE_L2 || d > RS_DISTANCE_COS || (d == RS_DISTANCE_COS && !out.src[1]))
    return rs_fail(RS_ERR_ARGUMENT, "shift: distance is %d, expected 0 to %d", static_cast<int>(d),
                   out.src[1] ? RS_DISTANCE_COS : RS_DISTANCE_L1);
  const int64_t shape[] = {to.shape[0], 1};
  return set_shape(&out, 2, shape);
}
work_bytes shift_work(const op_run &) { return {0, 0}; }
op_macs shift_macs(const op_run &) { return {0, RS_F32}; }
void shift_cpu(const op_run &r, const worker &me) {
  const auto [begin, end] = me.share(r.out.rows);
  for (int64_t i = begin; i < end; i++)
    r.result()[i * r.out.stride] =
        r.kernels->shift(r.f32(0) + i * r.in[0].stride, r.t->src[1] ? r.f32(1) + i * r.in[1].stride : nullptr,
                         static_cast<size_t>(r.in[0].cols), r.t->params.distance);
}

// ---- centre_distance: L2 distance of each row from the mean of its sequence

rs_status centre_distance_infer(rs_tensor &out) {
  RS_TRY(expect_token_rows(out, *out.src[0], "x"));
  RS_TRY(expect_i32(out, *out.src[1], "cu_seqlens", RS_DIM_CU_SEQLENS));
  return result_scores(out);
}
work_bytes centre_distance_work(const op_run &r) { return {0, static_cast<size_t>(r.in[0].cols) * 4}; }
op_macs centre_distance_macs(const op_run &) { return {0, RS_F32}; }
void centre_distance_cpu(const op_run &r, const worker &me) {
  const int32_t *cu = r.i32(1);
  const int64_t c = r.in[0].cols;
  auto *mean = reinterpret_cast<float *>(r.scratch(me.thread));
  for (int64_t b = me.next(-1); b < r.in[1].cols - 1; b = me.next(b)) {
    const auto row = [&](int64_t i) { return r.f32(0) + i * r.in[0].stride; };
    std::fill(mean, mean + c, 0.0f);
    for (int64_t i = cu[b]; i < cu[b + 1]; i++)
      for (int64_t j = 0; j < c; j++) mean[j] += row(i)[j];
    const float factor = 1 / static_cast<float>(cu[b + 1] - cu[b]);
    for (int64_t j = 0; j < c; j++) mean[j] *= factor;
    for (int64_t i = cu[b]; i < cu[b + 1]; i++)
      r.result()[i * r.out.stride] = r.kernels->shift(row(i), mean, static_cast<size_t>(c), RS_DISTANCE_L2);
  }
}

// ---- attn_colsum: the attention that each key gets
//
// A unit is a head of a sequence, whose sums of columns come into [H, T]; heads are added when all are there.  A block of queries
// has its scores for all keys of the sequence side by side, [attn_rows, n]: a column can only be summed when the softmax of its
// rows is known.

rs_status attn_colsum_infer(rs_tensor &out) {
  const rs_tensor &q = *out.src[0], &k = *out.src[1];
  RS_TRY(expect_token_rows(out, q, "q"));
  RS_TRY(expect_token_rows(out, k, "k"));
  if (!same_shape(q, 2, k.shape))
    return rs_fail(RS_ERR_ARGUMENT, "attn_colsum: q %s and k %s differ", shape_text(2, q.shape).c_str(),
                   shape_text(2, k.shape).c_str());
  RS_TRY(expect_i32(out, *out.src[2], "cu_seqlens", RS_DIM_CU_SEQLENS));
  RS_TRY(expect_attention(out, q, out.src[3]));
  return result_scores(out);
}

struct colsum_scratch : scratch_parts {  // for the longest sequence that the tokens may be
  float *keys;                           // panels [n / 16][D][16]
  float *scores;                         // [attn_rows][n]
  float *log_sizes;                      // [n]
  float *rows;                           // largest, sum and correction, [attn_rows] each
  float *widened;                        // [attn_rows][D], values of bf16
  uint16_t *rounded;                     // the same as bf16

  colsum_scratch(char *memory, const op_run &r) : scratch_parts(memory) {
    const auto n = round_up(static_cast<size_t>(r.in[0].rows), panel_n), d = static_cast<size_t>(r.in[0].cols / r.t->params.heads);
    keys = take(n * d);
    scores = take(attn_rows * n);
    log_sizes = take(n);
    rows = take(3 * attn_rows);
    widened = take(attn_rows * d);
    rounded = reinterpret_cast<uint16_t *>(take(attn_rows * d / 2));
  }
};
work_bytes attn_colsum_work(const op_run &r) {
  return {static_cast<size_t>(r.t->params.heads * r.in[0].rows) * 4, colsum_scratch(nullptr, r).bytes};
}
op_macs attn_colsum_macs(const op_run &r) {
  return {seen_pairs(r.t->params, r.i32(2), r.in[2].cols - 1) * static_cast<double>(r.in[0].cols), RS_F32};
}

// Columns [column, column + d) of n rows of q or k from `row` on: what flash attention takes them for, as f32.
struct colsum_rows {
  const float *data;
  int64_t stride;

  colsum_rows(const op_run &r, int i, int64_t row, int64_t column, int64_t n, int64_t d, const colsum_scratch &s)
      : data(reinterpret_cast<const float *>(r.in[i].at(row, column))), stride(r.in[i].stride) {
    const attn_kernels *coarse = coarse_kernels(r);
    if (!coarse) return;
    const auto *from = reinterpret_cast<const uint16_t *>(data);
    if (r.in[i].width == 4) {
      coarse->round_rows(data, static_cast<size_t>(stride), static_cast<int>(n), static_cast<size_t>(d), s.rounded, d);
      from = s.rounded, stride = d;
    }
    for (int64_t at = 0; at < n; at++, from += stride)
      for (int64_t j = 0; j < d; j++) {
        const uint32_t bits = static_cast<uint32_t>(from[j]) << 16;
        memcpy(s.widened + at * d + j, &bits, 4);
      }
    data = s.widened, stride = d;
  }
};

// sums: [n], of the sequence that is rows [begin, end).
void attn_colsum_head(const op_run &r, const colsum_scratch &s, int64_t begin, int64_t end, int64_t head, float *sums) {
  const int64_t n = end - begin, queries = r.t->params.first_only ? std::min<int64_t>(n, 1) : n;
  const int64_t d = r.in[0].cols / r.t->params.heads, column = head * d;
  const auto ld = round_up(static_cast<size_t>(n), panel_n), k = static_cast<size_t>(d);
  const float scale = r.t->params.scale;
  const attn_reach reach = reach_of(r.t->params);
  std::fill(sums, sums + n, 0.0f);
  if (r.t->src[3]) find_log_sizes(r.in[3], begin, static_cast<int>(n), scale, s.log_sizes);
  for (int64_t key = 0; key < n; key += attn_rows) {
    const int64_t keys = std::min<int64_t>(attn_rows, n - key);
    const colsum_rows from(r, 1, begin + key, column, keys, d, s);
    pack_keys(from.data, from.stride, keys, k, s.keys + key * d);
  }
  for (int64_t query = 0; query < queries; query += attn_rows) {
    const int rows = static_cast<int>(std::min<int64_t>(attn_rows, queries - query));
    const attn_range seen = seen_keys(query, query + rows, n, reach, panel_n);
    const int some = static_cast<int>(seen.end - seen.begin);
    const colsum_rows from(r, 0, begin + query, column, rows, d, s);
    r.kernels->f32_panels(from.data, static_cast<size_t>(from.stride), rows, s.keys + seen.begin * d, k * panel_n,
                          static_cast<int>(ceil_div(some, panel_n)), k, s.scores, ld, false);
    if (r.t->src[3]) add_to_rows(s.scores, ld, rows, some, s.log_sizes + seen.begin);
    if (r.t->params.window) mask_unseen_keys(s.scores, ld, rows, some, query, seen.begin, reach);
    float *total = s.rows + attn_rows;
    r.kernels->softmax(s.scores, ld, rows, static_cast<size_t>(some), scale, true, s.rows, total, total + attn_rows);
    for (int i = 0; i < rows; i++) {
      const float weight = 1 / (total[i] * static_cast<float>(r.t->params.heads) * static_cast<float>(queries));
      const float *row = s.scores + static_cast<size_t>(i) * ld;
      for (int64_t j = 0; j < some; j++) sums[seen.begin + j] += row[j] * weight;
    }
  }
}
void attn_colsum_cpu(const op_run &r, const worker &me) {
  const colsum_scratch scratch(r.scratch(me.thread), r);
  const int32_t *cu = r.i32(2);
  const int64_t heads = r.t->params.heads, tokens = r.in[0].rows, units = (r.in[2].cols - 1) * heads;
  auto *of_heads = reinterpret_cast<float *>(r.shared);
  for (int64_t unit = me.next(-1); unit < units; unit = me.next(unit)) {
    const int64_t b = unit / heads, head = unit % heads;
    attn_colsum_head(r, scratch, cu[b], cu[b + 1], head, of_heads + head * tokens + cu[b]);
  }
  me.barrier();
  const auto [begin, end] = me.share(tokens);
  for (int64_t i = begin; i < end; i++) {
    float sum = 0;
    for (int64_t head = 0; head < heads; head++) sum += of_heads[head * tokens + i];
    r.result()[i * r.out.stride] = sum;
  }
}

// ---- position_score: by place, or by chance

rs_status position_score_infer(rs_tensor &out) {
  RS_TRY(expect_i32(out, *out.src[0], "cu_seqlens", RS_DIM_CU_SEQLENS));
  return result_scores(out);
}
work_bytes position_score_work(const op_run &) { return {0, 0}; }
op_macs position_score_macs(const op_run &) { return {0, RS_F32}; }
// splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
uint64_t mix_bits(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}
void position_score_cpu(const op_run &r, const worker &me) {
  const int32_t *cu = r.i32(0);
  for (int64_t b = me.next(-1); b < r.in[0].cols - 1; b = me.next(b)) {
    const auto n = static_cast<uint64_t>(cu[b + 1] - cu[b]);
    for (uint64_t i = 0; i < n; i++) {
      const uint64_t bits = mix_bits(mix_bits(mix_bits(r.t->params.seed) + n) + i) >> 40;
      r.result()[(cu[b] + static_cast<int64_t>(i)) * r.out.stride] =
          r.t->params.random ? static_cast<float>(bits) * 0x1p-24f : -static_cast<float>(i);
    }
  }
}

// ---- standardize: mean 0, deviation `weight` over each sequence

rs_status standardize_infer(rs_tensor &out) {
  RS_TRY(expect_scores(out, *out.src[0], "x"));
  RS_TRY(expect_i32(out, *out.src[1], "cu_seqlens", RS_DIM_CU_SEQLENS));
  return result_scores(out);
}
work_bytes standardize_work(const op_run &) { return {0, 0}; }
op_macs standardize_macs(const op_run &) { return {0, RS_F32}; }

struct moments {
  double mean, deviation;
  moments(const float *x, int64_t stride, int64_t n) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) sum += static_cast<double>(x[i * stride]);
    mean = sum / static_cast<double>(n);
    for (int64_t i = 0; i < n; i++)
      squares += (static_cast<double>(x[i * stride]) - mean) * (static_cast<double>(x[i * stride]) - mean);
    deviation = std::sqrt(squares / static_cast<double>(n));
  }
  double of(float x) const {
    return deviation > 0 ? (static_cast<double>(x) - mean) / deviation : std::isnan(deviation) ? deviation : 0;
  }
};
// Cold is small: vectors of all kinds of strides would be 7 KB for a number a token.
[[gnu::cold]] void standardize_cpu(const op_run &r, const worker &me) {
  const int32_t *cu = r.i32(1);
  for (int64_t b = me.next(-1); b < r.in[1].cols - 1; b = me.next(b)) {
    const moments m(r.f32(0) + cu[b] * r.in[0].stride, r.in[0].stride, cu[b + 1] - cu[b]);
    for (int64_t i = cu[b]; i < cu[b + 1]; i++)
      r.result()[i * r.out.stride] =
          static_cast<float>(static_cast<double>(r.t->params.weight) * m.of(r.f32(0)[i * r.in[0].stride]));
  }
}

// ---- token_drop: which tokens stay

struct drop_count {
  int64_t kept, extra;
};
// Of n tokens, `protect` of which must stay.
drop_count drop_rule_count(const rs_drop_rule &rule, int64_t n, int64_t protect) {
  int64_t keep = rule.keep > 0 ? rule.keep : n - static_cast<int64_t>(static_cast<double>(n) * rule.ratio);
  keep = std::min(n, std::max<int64_t>({keep, rule.least, protect, 1}));
  if (!rule.fold) return {keep, 0};
  // One token folded into one would be a copy of it.
  return n - keep > 1 ? drop_count{keep, 1} : drop_count{n, 0};
}

// Is the last of `all` tokens, of n before, one that others were folded into?
bool has_extra(const rs_drop_rule &rule, int64_t n, int64_t all) { return rule.fold && all < n; }

// The same behind a layer of a schedule, which may drop nothing.
int32_t drop_layer_count(const rs_drop_schedule::layer &l, int32_t n, int32_t protect) {
  if (!l.drops || n == 0) return n;
  const drop_count count = drop_rule_count(l.rule, n, protect);
  return static_cast<int32_t>(count.kept + count.extra);
}

// Of the sequence that is rows [begin, end) of the graph's inputs.
int64_t protected_tokens(const rs_drop_rule &rule, const int32_t *protect, int64_t begin, int64_t end) {
  if (begin == end) return 0;
  int64_t n = rule.keep_first && !(protect && protect[begin]) ? 1 : 0;
  for (int64_t i = begin; protect && i < end; i++) n += protect[i] != 0;
  return n;
}

rs_status token_drop_infer(rs_tensor &out) {
  const rs_tensor &score = *out.src[0], &starts = *out.src[1];
  const rs_drop_rule &rule = out.params.rule;
  RS_TRY(expect_scores(out, score, "score"));
  RS_TRY(expect_i32(out, starts, "cu_seqlens", RS_DIM_CU_SEQLENS));
  RS_TRY(expect_level(out, starts, score.level));
  if (starts.kind != tensor_input && starts.kind != tensor_starts)
    return rs_fail(RS_ERR_ARGUMENT, "token_drop: '%s' is neither an input nor from rs_token_starts", starts.name.c_str());
  if (const rs_tensor *protect = out.src[2]) {
    RS_TRY(expect_i32(out, *protect, "protect", RS_DIM_TOKENS));
    if (protect->kind != tensor_input)
      return rs_fail(RS_ERR_ARGUMENT, "token_drop: protect '%s' is not an input of the graph", protect->name.c_str());
  }
  if (!(rule.ratio >= 0 && rule.ratio < 1))
    return rs_fail(RS_ERR_ARGUMENT, "token_drop: ratio %g, expected 0 to below 1", rule.ratio);
  if (rule.keep < 0 || rule.least < 0) return rs_fail(RS_ERR_ARGUMENT, "token_drop: keep %d, least %d", rule.keep, rule.least);
  out.type = RS_I32;
  const int64_t shape[] = {RS_DIM_TOKENS, 2};
  return set_shape(&out, 2, shape);
}
work_bytes token_drop_work(const op_run &r) { return {static_cast<size_t>(r.in[0].rows) * sizeof(uint64_t), 0}; }
op_macs token_drop_macs(const op_run &) { return {0, RS_F32}; }

// Kept rows: the row at the level before, and that of the graph's inputs.
struct kept_rows {
  int32_t *rows;
  explicit kept_rows(const value &v) : rows(reinterpret_cast<int32_t *>(v.data)) {}
  int32_t &before(int64_t i) const { return rows[2 * i]; }
  int32_t &origin(int64_t i) const { return rows[2 * i + 1]; }
};

// Protected tokens first, then by falling score, then by rising position: in descending order of one integer.
constexpr int position_bits = 31;
uint64_t drop_order(bool protect, float score, int64_t position) {
  uint32_t bits;
  score += 0.0f;  // one zero
  memcpy(&bits, &score, 4);
  bits = bits >> 31 ? ~bits : bits | 1u << 31;
  return static_cast<uint64_t>(protect) << 63 | static_cast<uint64_t>(bits) << position_bits |
         static_cast<uint64_t>(INT32_MAX - position);
}

void token_drop_cpu(const op_run &r, const worker &me) {
  const rs_drop_rule &rule = r.t->params.rule;
  const int32_t *from = r.i32(1), *to = r.i32(4), *protect = r.t->src[2] ? r.i32(2) : nullptr;
  const kept_rows out(r.out), previous(r.in[3]);
  for (int64_t b = me.next(-1); b < r.in[1].cols - 1; b = me.next(b)) {
    const int64_t n = from[b + 1] - from[b], all = to[b + 1] - to[b];
    const auto origin = [&](int64_t i) { return r.t->src[3] ? previous.origin(from[b] + i) : static_cast<int32_t>(from[b] + i); };
    const int64_t keep = has_extra(rule, n, all) ? all - 1 : all;
    uint64_t *order = reinterpret_cast<uint64_t *>(r.shared) + from[b];
    for (int64_t i = 0; i < n && keep == n; i++) {  // whatever the scores: there may be none (graph_plan::idle)
      out.before(to[b] + i) = from[b] + static_cast<int32_t>(i);
      out.origin(to[b] + i) = origin(i);
    }
    if (keep == n) continue;
    for (int64_t i = 0; i < n; i++) {
      float score = r.f32(0)[(from[b] + i) * r.in[0].stride];
      if (std::isnan(score)) {
        rs_fail(RS_ERR_NUMERIC, "'%s': the score of token %lld of sequence %lld is NaN", r.t->src[0]->name.c_str(),
                static_cast<long long>(i), static_cast<long long>(b));
        r.error->set(RS_ERR_NUMERIC);
        score = 0;  // the operators behind this one get rows that exist
      }
      const bool stays = (rule.keep_first && i == 0) || (protect && origin(i) >= 0 && protect[origin(i)]);
      order[i] = drop_order(stays, rule.lowest ? -score : score, i);
    }
    std::nth_element(order, order + keep, order + n, std::greater<>());
    for (int64_t i = 0; i < keep; i++) order[i] = INT32_MAX - (order[i] & INT32_MAX);
    std::sort(order, order + keep);
    for (int64_t i = 0; i < keep; i++) {
      out.before(to[b] + i) = from[b] + static_cast<int32_t>(order[i]);
      out.origin(to[b] + i) = origin(static_cast<int64_t>(order[i]));
    }
    if (keep < all) out.before(to[b + 1] - 1) = out.origin(to[b + 1] - 1) = -1;
  }
}

// ---- token_gather: the rows that stay

// A tensor that rs_token_drop made, and one of the level that it chose from.
rs_status expect_kept(const rs_tensor &op, const rs_tensor &kept) {
  if (kept.kind == tensor_op && kept.op == OP_TOKEN_DROP) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: '%s' is not what rs_token_drop returned", op_rows[op.op].name, kept.name.c_str());
}
int level_before(const rs_tensor &kept) { return kept.src[0]->level; }

rs_status token_gather_infer(rs_tensor &out) {
  const rs_tensor &x = *out.src[0], &kept = *out.src[1];
  RS_TRY(expect_token_rows(out, x, "x"));
  RS_TRY(expect_kept(out, kept));
  RS_TRY(expect_level(out, x, level_before(kept)));
  if (kept.params.rule.fold) return rs_fail(RS_ERR_ARGUMENT, "token_gather: '%s' folds, use rs_token_merge", kept.name.c_str());
  out.level = kept.level;
  return result_like(out, x);
}
work_bytes token_gather_work(const op_run &) { return {0, 0}; }
op_macs token_gather_macs(const op_run &) { return {0, RS_F32}; }
void token_gather_cpu(const op_run &r, const worker &me) {
  const kept_rows kept(r.in[1]);
  const auto [begin, end] = me.share(r.out.rows);
  for (int64_t i = begin; i < end; i++)
    memcpy(r.result() + i * r.out.stride, r.f32(0) + kept.before(i) * r.in[0].stride, static_cast<size_t>(r.out.cols) * 4);
}

// ---- token_restore: dropped rows back among those that stayed

rs_status token_restore_infer(rs_tensor &out) {
  const rs_tensor &x = *out.src[0], &before = *out.src[1], &kept = *out.src[2];
  RS_TRY(expect_token_rows(out, x, "x"));
  RS_TRY(expect_token_rows(out, before, "before"));
  RS_TRY(expect_kept(out, kept));
  RS_TRY(expect_level(out, x, kept.level));
  RS_TRY(expect_level(out, before, level_before(kept)));
  if (kept.params.rule.fold)
    return rs_fail(RS_ERR_ARGUMENT, "token_restore: '%s' folds: there is nothing to restore", kept.name.c_str());
  if (!same_shape(x, before.rank, before.shape))
    return rs_fail(RS_ERR_ARGUMENT, "token_restore: '%s' %s and '%s' %s differ", x.name.c_str(),
                   shape_text(x.rank, x.shape).c_str(), before.name.c_str(), shape_text(before.rank, before.shape).c_str());
  out.level = before.level;
  return result_like(out, before);
}
work_bytes token_restore_work(const op_run &) { return {0, 0}; }
op_macs token_restore_macs(const op_run &) { return {0, RS_F32}; }
void token_restore_cpu(const op_run &r, const worker &me) {
  const kept_rows kept(r.in[2]);
  const auto copy = [&](int64_t to, const value &from, int64_t row) {
    memcpy(r.result() + to * r.out.stride, reinterpret_cast<const float *>(from.data) + row * from.stride,
           static_cast<size_t>(r.out.cols) * 4);
  };
  // Rows that stayed are in order, so each share of them has a range of all rows to itself.
  const auto [begin, end] = me.share(r.in[0].rows);
  int64_t at = begin == 0 ? 0 : kept.before(begin - 1) + 1;
  for (int64_t i = begin; i < end; i++) {
    for (; at < kept.before(i); at++) copy(at, r.in[1], at);
    copy(at++, r.in[0], i);
  }
  if (end == r.in[0].rows && me.thread == me.threads - 1)
    for (; at < r.out.rows; at++) copy(at, r.in[1], at);
}

// ---- token_assign: the row that each token becomes part of

rs_status expect_assignment(const rs_tensor &op, const rs_tensor &kept, const rs_tensor &starts) {
  RS_TRY(expect_kept(op, kept));
  if (kept.src[1] == &starts) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: cu_seqlens is '%s', but '%s' was chosen by '%s'", op_rows[op.op].name, starts.name.c_str(),
                 kept.name.c_str(), kept.src[1]->name.c_str());
}

rs_status token_assign_infer(rs_tensor &out) {
  const rs_tensor &x = *out.src[0], &kept = *out.src[1];
  RS_TRY(expect_token_rows(out, x, "x"));
  RS_TRY(expect_assignment(out, kept, *out.src[2]));
  RS_TRY(expect_level(out, x, level_before(kept)));
  out.type = RS_I32;
  return result_scores(out);
}

// A unit is a share of a sequence's rows.  Those that were dropped become panels by which the rows that stay are multiplied: of
// floats, or, where x comes out of quantized layers and has their noise anyway, of bytes.
constexpr int64_t assign_rows = 128, assign_keys = product_rows;

bool assigns_by_bytes(const rs_tensor &t) {
  const rs_tensor *from = t.src[0];
  while (from && from->kind == tensor_op && from->op != OP_LINEAR) from = from->src[0];
  return from && from->kind == tensor_op && is_quantized(from->src[1]->type);
}

struct assign_scratch : scratch_parts {
  float *likeness;          // [assign_keys][assign_rows]
  float *rows = nullptr;    // [assign_keys][C], gathered
  float *panels = nullptr;  // [assign_rows / 16][C][16]
  // Or, by bytes:
  size_t kp;
  uint8_t *q = nullptr;       // [assign_keys][Kp]
  row_quant *rq = nullptr;    // [assign_keys]
  int8_t *weights = nullptr;  // [assign_rows / 16][Kp / 4][16][4]
  int8_t *row = nullptr;      // [Kp]
  float *scale = nullptr;     // [assign_rows], like the next
  int32_t *colsum = nullptr;

  assign_scratch(char *memory, const op_run &r) : scratch_parts(memory) {
    const auto c = static_cast<size_t>(r.in[0].cols);
    likeness = take(assign_keys * assign_rows);
    kp = round_up(c, group_k);
    if (assigns_by_bytes(*r.t)) {
      q = take<uint8_t>(assign_keys * kp);
      rq = take<row_quant>(assign_keys);
      weights = take<int8_t>(assign_rows * kp);
      row = take<int8_t>(kp);
      scale = take(assign_rows);
      colsum = take<int32_t>(assign_rows);
    } else {
      rows = take(assign_keys * c);
      panels = take(assign_rows * c);
    }
  }
};
work_bytes token_assign_work(const op_run &r) { return {0, r.t->src[1]->params.rule.fold ? 0 : assign_scratch(nullptr, r).bytes}; }
op_macs token_assign_macs(const op_run &r) {
  double pairs = 0;
  const int32_t *from = r.i32(2), *to = r.i32(3);
  if (from && to && !r.t->src[1]->params.rule.fold)
    for (int64_t b = 0; b + 1 < r.in[2].cols; b++) {
      const double all = from[b + 1] - from[b], kept = to[b + 1] - to[b];
      pairs += (all - kept) * kept;
    }
  return {pairs * static_cast<double>(r.in[0].cols), assigns_by_bytes(*r.t) ? RS_W8 : RS_F32};
}

// A row as channel n of w8 panels, but for its scale, which ranks nothing.  63 steps: no pair is over its limit.
void assign_encode(const assign_scratch &s, const float *x, size_t c, size_t n) {
  int32_t top = 0;  // the largest |x|: floats without a sign are in the order of their bits
  for (size_t i = 0; i < c; i++) {
    int32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    top = std::max(top, bits & INT32_MAX);
  }
  float largest;
  memcpy(&largest, &top, sizeof top);
  const float inverse = largest >= least_top ? 63 / largest : 0;  // 0, also of infinity and NaN: like nothing
  int32_t sum = 0;
  memset(s.row, 0, s.kp);
  for (size_t i = 0; inverse > 0 && i < c; i++) {
    const float v = x[i] * inverse + whole_numbers;
    int32_t bits;
    memcpy(&bits, &v, sizeof bits);
    s.row[i] = static_cast<int8_t>(bits);
    sum += s.row[i];
  }
  s.scale[n] = 1;
  s.colsum[n] = sum;
  int8_t *to = s.weights + n / panel_n * s.kp * panel_n + n % panel_n * panel_k;
  for (size_t i = 0; i < s.kp; i += panel_k) memcpy(to + i * panel_n, s.row + i, panel_k);
}

// rows: [n], rows of x that were dropped.  The cosine with a row that stays, but for the own norm, which ranks nothing.
void assign_block(const op_run &r, const assign_scratch &s, const int64_t *rows, int n, int64_t begin, int64_t end) {
  const kernel_row &k = *r.kernels;
  const kept_rows kept(r.in[1]);
  const auto c = static_cast<size_t>(r.in[0].cols);
  const bool by_bytes = assigns_by_bytes(*r.t);
  const int panels = static_cast<int>(ceil_div(n, panel_n));
  const auto x = [&](int64_t row) { return r.f32(0) + row * r.in[0].stride; };
  for (int i = 0; by_bytes && i < n; i++) assign_encode(s, x(rows[i]), c, static_cast<size_t>(i));
  for (int i = 0; !by_bytes && i < n; i += assign_keys) {
    const int here = std::min<int>(n - i, assign_keys);
    for (int j = 0; j < here; j++) memcpy(s.rows + static_cast<size_t>(j) * c, x(rows[i + j]), c * sizeof(float));
    pack_keys(s.rows, static_cast<int64_t>(c), here, c, s.panels + static_cast<size_t>(i) * c);
  }
  float best[assign_rows];
  int32_t where[assign_rows];
  std::fill(best, best + n, -INFINITY);
  std::fill(where, where + n, static_cast<int32_t>(begin));
  for (int64_t key = begin; key < end; key += assign_keys) {
    const int keys = static_cast<int>(std::min(assign_keys, end - key));
    for (int j = 0; j < keys; j++) {
      const auto at = static_cast<size_t>(j);
      if (by_bytes) k.quantize(x(kept.before(key + j)), c, nullptr, 1, c, s.kp, s.rq + at, s.q + at * s.kp);
      else memcpy(s.rows + at * c, x(kept.before(key + j)), c * sizeof(float));
    }
    const linear_result to = {s.rq, s.scale, s.colsum, nullptr, RS_ACT_NONE, s.likeness, assign_rows};
    for (int p = 0; by_bytes && p < panels; p += linear_group)
      k.w8_panels(s.q, s.kp, keys, s.weights + static_cast<size_t>(p) * s.kp * panel_n, std::min(linear_group, panels - p),
                  to.from(0, p));
    if (!by_bytes) k.f32_panels(s.rows, c, keys, s.panels, c * panel_n, panels, c, s.likeness, assign_rows, false);
    for (int j = 0; j < keys; j++) {
      const float norm = k.shift(x(kept.before(key + j)), nullptr, c, RS_DISTANCE_L2);
      const float factor = norm > 0 ? 1 / norm : 0, *likeness = s.likeness + j * assign_rows;
      for (int i = 0; i < n; i++) {
        const float like = likeness[i] * factor;
        const bool better = like > best[i];  // of equal ones the first
        best[i] = better ? like : best[i];
        where[i] = better ? static_cast<int32_t>(key) + j : where[i];
      }
    }
  }
  for (int i = 0; i < n; i++) reinterpret_cast<int32_t *>(r.out.data)[rows[i]] = where[i];
}

// The sequence that was rows [first, last) and keeps rows [begin, end) in shares of dropped rows, at most assign_rows each.
struct assign_shares {
  int64_t kept, dropped, count;
  bool fold;

  assign_shares(const op_run &r, int64_t first, int64_t last, int64_t begin, int64_t end, int threads) {
    const rs_drop_rule &rule = r.t->src[1]->params.rule;
    fold = rule.fold;
    kept = end - begin - (has_extra(rule, last - first, end - begin) ? 1 : 0);
    dropped = last - first - kept;
    const int64_t wanted =
        ceil_div(threads, std::max<int64_t>(r.in[2].cols - 1, 1));  // where there are fewer sequences than threads
    count = std::max({ceil_div(dropped, assign_rows), std::min(wanted, ceil_div(dropped, panel_n)), int64_t{1}});
  }
};

void assign_share(const op_run &r, int thread, const assign_shares &of, int64_t share, int64_t first, int64_t begin, int64_t end) {
  const kept_rows kept(r.in[1]);
  auto *result = reinterpret_cast<int32_t *>(r.out.data);
  const auto from = [&](int64_t n) { return n * share / of.count; };
  const auto to = [&](int64_t n) { return n * (share + 1) / of.count; };
  for (int64_t j = begin + from(of.kept); j < begin + to(of.kept); j++) result[kept.before(j)] = static_cast<int32_t>(j);

  // `next` rows stay before the first that was dropped here: those with no more dropped ones before them than it has.
  int64_t next = 0;
  for (int64_t above = of.kept; next < above;) {
    const int64_t middle = next + (above - next) / 2;
    if (kept.before(begin + middle) - first - middle <= from(of.dropped)) next = middle + 1;
    else above = middle;
  }
  int64_t rows[assign_rows];
  int n = 0;
  for (int64_t i = first + from(of.dropped) + next; n < to(of.dropped) - from(of.dropped); i++) {
    if (next < of.kept && kept.before(begin + next) == i) next++;
    else rows[n++] = i;
  }
  if (of.fold)
    for (int i = 0; i < n; i++) result[rows[i]] = static_cast<int32_t>(end) - 1;
  else if (n) assign_block(r, assign_scratch(r.scratch(thread), r), rows, n, begin, end);
}

void token_assign_cpu(const op_run &r, const worker &me) {
  const int32_t *from = r.i32(2), *to = r.i32(3);
  int64_t unit = 0, mine = me.next(-1);
  for (int64_t b = 0; b < r.in[2].cols - 1; b++) {
    const assign_shares of(r, from[b], from[b + 1], to[b], to[b + 1], me.threads);
    for (int64_t share = 0; share < of.count; share++)
      if (unit++ == mine) {
        assign_share(r, me.thread, of, share, from[b], to[b], to[b + 1]);
        mine = me.next(mine);
      }
  }
}

// ---- token_merge: weighted means of the rows that become one

constexpr int64_t merge_unit_rows = 64;  // of the result

rs_status expect_assign(const rs_tensor &op, const rs_tensor &assign, const rs_tensor &kept) {
  if (assign.kind == tensor_op && assign.op == OP_TOKEN_ASSIGN && assign.src[1] == &kept) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: '%s' is not what rs_token_assign made of '%s'", op_rows[op.op].name, assign.name.c_str(),
                 kept.name.c_str());
}
rs_status expect_sizes(const rs_tensor &op, const rs_tensor *sizes, const char *what, int level) {
  if (!sizes) return RS_OK;
  RS_TRY(expect_scores(op, *sizes, what));
  return expect_level(op, *sizes, level);
}

rs_status token_merge_infer(rs_tensor &out) {
  const rs_tensor &x = *out.src[0], &kept = *out.src[1];
  RS_TRY(expect_token_rows(out, x, "x"));
  RS_TRY(expect_assignment(out, kept, *out.src[2]));
  RS_TRY(expect_assign(out, *out.src[4], kept));
  RS_TRY(expect_level(out, x, level_before(kept)));
  RS_TRY(expect_sizes(out, out.src[5], "sizes", level_before(kept)));
  RS_TRY(expect_sizes(out, out.src[6], "score", level_before(kept)));
  out.level = kept.level;
  return result_like(out, x);
}
work_bytes token_merge_work(const op_run &) { return {0, 0}; }
op_macs token_merge_macs(const op_run &) { return {0, RS_F32}; }

// Rows [begin, end) of the result, of the sequence that was rows [first, last).
void merge_rows(const op_run &r, int64_t first, int64_t last, int64_t begin, int64_t end, int64_t extra) {
  const kept_rows kept(r.in[1]);
  const int32_t *assign = r.i32(4);
  const auto c = static_cast<size_t>(r.out.cols);
  const bool ranked = r.t->src[6] && extra >= begin && extra < end;
  const moments m(ranked ? r.f32(6) + first * r.in[6].stride : nullptr, r.in[6].stride, ranked ? last - first : 0);
  const auto weight = [&](int64_t i) {
    const float size = r.t->src[5] ? r.f32(5)[i * r.in[5].stride] : 1;
    if (!ranked || assign[i] != extra) return size;
    const double z = std::clamp(m.of(r.f32(6)[i * r.in[6].stride]), -fold_z, fold_z);
    return size * static_cast<float>(std::exp(r.t->src[1]->params.rule.lowest ? -z : z));
  };
  const auto is_here = [&](int64_t i) { return assign[i] >= begin && assign[i] < end; };
  float sums[merge_unit_rows] = {};
  for (int64_t i = first; i < last; i++)
    if (is_here(i)) sums[assign[i] - begin] += weight(i);
  const auto add = [&](int64_t i, bool starts) {
    float *y = r.result() + assign[i] * r.out.stride;
    const float *x = r.f32(0) + i * r.in[0].stride,
                share = weight(i) / sums[assign[i] - begin];  // exactly 1 where nothing joins it
    if (starts)
      for (size_t k = 0; k < c; k++) y[k] = x[k] * share;
    else
      for (size_t k = 0; k < c; k++) y[k] += x[k] * share;
  };
  for (int64_t j = begin; j < end; j++)
    if (j == extra) std::fill_n(r.result() + j * r.out.stride, c, 0.0f);
    else add(kept.before(j), true);
  for (int64_t i = first; i < last; i++)
    if (is_here(i) && (assign[i] == extra || kept.before(assign[i]) != i)) add(i, false);
}

void token_merge_cpu(const op_run &r, const worker &me) {
  const int32_t *from = r.i32(2), *to = r.i32(3);
  int64_t unit = 0, mine = me.next(-1);
  for (int64_t b = 0; b < r.in[2].cols - 1; b++) {
    const int64_t extra = has_extra(r.t->src[1]->params.rule, from[b + 1] - from[b], to[b + 1] - to[b]) ? to[b + 1] - 1 : -1;
    for (int64_t begin = to[b]; begin < to[b + 1]; begin += merge_unit_rows)
      if (unit++ == mine) {
        merge_rows(r, from[b], from[b + 1], begin, std::min<int64_t>(begin + merge_unit_rows, to[b + 1]), extra);
        mine = me.next(mine);
      }
  }
}

// ---- token_sizes: how many tokens each stands for

rs_status token_sizes_infer(rs_tensor &out) {
  const rs_tensor &kept = *out.src[1];
  RS_TRY(expect_assignment(out, kept, *out.src[2]));
  RS_TRY(expect_assign(out, *out.src[0], kept));
  RS_TRY(expect_sizes(out, out.src[4], "sizes", level_before(kept)));
  out.level = kept.level;
  return result_scores(out);
}
work_bytes token_sizes_work(const op_run &) { return {0, 0}; }
op_macs token_sizes_macs(const op_run &) { return {0, RS_F32}; }
void token_sizes_cpu(const op_run &r, const worker &me) {
  const int32_t *assign = r.i32(0), *from = r.i32(2), *to = r.i32(3);
  for (int64_t b = me.next(-1); b < r.in[2].cols - 1; b = me.next(b)) {
    for (int64_t j = to[b]; j < to[b + 1]; j++) r.result()[j * r.out.stride] = 0;
    for (int64_t i = from[b]; i < from[b + 1]; i++)
      r.result()[assign[i] * r.out.stride] += r.t->src[4] ? r.f32(4)[i * r.in[4].stride] : 1;
  }
}

}  // namespace

const char *rs_op_name(size_t i) { return i < op_count ? op_rows[i].name : nullptr; }

// ---- builders

rs_tensor *rs_embed(rs_graph *g, rs_tensor *ids, rs_tensor *table) { return add_op(g, OP_EMBED, {}, {ids, table}); }
rs_tensor *rs_add(rs_graph *g, rs_tensor *a, rs_tensor *b) { return add_op(g, OP_ADD, {}, {a, b}); }
namespace {
const rs_tensor_info *find_input_scale(const rs_model *m, const void *weight);  // section 13
}
rs_tensor *rs_linear(rs_graph *g, rs_tensor *x, rs_tensor *w, rs_tensor *bias, rs_activation act) {
  return built(g, [&]() -> rs_tensor * {
    op_params p = {};
    p.act = act;
    const rs_tensor_info *of_file = w && w->kind == tensor_weight ? find_input_scale(g->model, w->data) : nullptr;
    rs_tensor *scale = of_file ? rs_weight(g, of_file->name, 1, &w->shape[1]) : nullptr;
    if (of_file && !scale) return nullptr;
    return add_op(g, OP_LINEAR, p, {x, w, bias, scale}, 1u << 2 | 1u << 3);
  });
}
rs_tensor *rs_layer_norm(rs_graph *g, rs_tensor *x, rs_tensor *residual, rs_tensor *gamma, rs_tensor *beta, float eps) {
  op_params p = {};
  p.eps = eps;
  return add_op(g, OP_LAYER_NORM, p, {x, residual, gamma, beta}, 1u << 1);
}
namespace {
op_params attention_params(int heads, float scale, bool causal) {
  op_params p = {};
  p.heads = heads;
  p.scale = scale;
  p.causal = causal;
  return p;
}
rs_tensor *add_windowed(rs_graph *g, op_code op, op_params p, int window, std::initializer_list<rs_tensor *> src,
                        unsigned optional) {
  if (window < 1)  // 0, in op_params, says that there is none
    return built(g, [&] {
      return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "%s: a window of %d places, expected at least 1", op_rows[op].name, window));
    });
  p.window = window;
  return add_op(g, op, p, src, optional);
}
}  // namespace
rs_tensor *rs_flash_attn(rs_graph *g, rs_tensor *q, rs_tensor *k, rs_tensor *v, rs_tensor *cu_seqlens, rs_tensor *sizes, int heads,
                         float scale) {
  return add_op(g, OP_FLASH_ATTN, attention_params(heads, scale, false), {q, k, v, cu_seqlens, sizes}, 1u << 4);
}
rs_tensor *rs_flash_attn_causal(rs_graph *g, rs_tensor *q, rs_tensor *k, rs_tensor *v, rs_tensor *cu_seqlens, rs_tensor *sizes,
                                int heads, float scale) {
  return add_op(g, OP_FLASH_ATTN, attention_params(heads, scale, true), {q, k, v, cu_seqlens, sizes}, 1u << 4);
}
rs_tensor *rs_flash_attn_window(rs_graph *g, rs_tensor *q, rs_tensor *k, rs_tensor *v, rs_tensor *cu_seqlens, rs_tensor *sizes,
                                int heads, float scale, int window) {
  return add_windowed(g, OP_FLASH_ATTN, attention_params(heads, scale, false), window, {q, k, v, cu_seqlens, sizes}, 1u << 4);
}
rs_tensor *rs_rope_table(rs_graph *g, rs_tensor *positions, rs_tensor *frequencies) {
  return add_op(g, OP_ROPE_TABLE, {}, {positions, frequencies});
}
rs_tensor *rs_rope(rs_graph *g, rs_tensor *x, rs_tensor *table, int heads) {
  op_params p = {};
  p.heads = heads;
  return add_op(g, OP_ROPE, p, {x, table});
}
rs_tensor *rs_attn_pool(rs_graph *g, rs_tensor *query, rs_tensor *k, rs_tensor *v, rs_tensor *cu_seqlens, rs_tensor *sizes,
                        int heads, float scale) {
  return add_op(g, OP_ATTN_POOL, attention_params(heads, scale, false), {query, k, v, cu_seqlens, sizes}, 1u << 4);
}
rs_tensor *rs_gate(rs_graph *g, rs_tensor *x, rs_activation act) {
  op_params p = {};
  p.act = act;
  return add_op(g, OP_GATE, p, {x});
}
rs_tensor *rs_pool(rs_graph *g, rs_tensor *x, rs_tensor *cu_seqlens, rs_tensor *sizes, rs_pooling pooling, int skip) {
  op_params p = {};
  p.pooling = pooling;
  p.skip = skip;
  return add_op(g, OP_POOL, p, {x, cu_seqlens, sizes}, 1u << 2);
}
rs_tensor *rs_l2_normalize(rs_graph *g, rs_tensor *x) { return add_op(g, OP_L2_NORMALIZE, {}, {x}); }
rs_tensor *rs_shift(rs_graph *g, rs_tensor *to, rs_tensor *from, rs_distance distance) {
  op_params p = {};
  p.distance = distance;
  return add_op(g, OP_SHIFT, p, {to, from}, 1u << 1);
}
rs_tensor *rs_centre_distance(rs_graph *g, rs_tensor *x, rs_tensor *cu_seqlens) {
  return add_op(g, OP_CENTRE_DISTANCE, {}, {x, cu_seqlens});
}
rs_tensor *rs_attn_colsum(rs_graph *g, rs_tensor *q, rs_tensor *k, rs_tensor *cu_seqlens, rs_tensor *sizes, int heads, float scale,
                          bool class_only) {
  op_params p = attention_params(heads, scale, false);
  p.first_only = class_only;
  return add_op(g, OP_ATTN_COLSUM, p, {q, k, cu_seqlens, sizes}, 1u << 3);
}
rs_tensor *rs_attn_colsum_window(rs_graph *g, rs_tensor *q, rs_tensor *k, rs_tensor *cu_seqlens, rs_tensor *sizes, int heads,
                                 float scale, bool class_only, int window) {
  op_params p = attention_params(heads, scale, false);
  p.first_only = class_only;
  return add_windowed(g, OP_ATTN_COLSUM, p, window, {q, k, cu_seqlens, sizes}, 1u << 3);
}
rs_tensor *rs_position_score(rs_graph *g, rs_tensor *cu_seqlens, bool random, uint64_t seed) {
  op_params p = {};
  p.random = random;
  p.seed = seed;
  return add_op(g, OP_POSITION_SCORE, p, {cu_seqlens});
}
rs_tensor *rs_standardize(rs_graph *g, rs_tensor *x, rs_tensor *cu_seqlens, float weight) {
  op_params p = {};
  p.weight = weight;
  return add_op(g, OP_STANDARDIZE, p, {x, cu_seqlens});
}
rs_tensor *rs_token_drop(rs_graph *g, rs_tensor *score, rs_tensor *cu_seqlens, rs_tensor *protect, const rs_drop_rule *rule) {
  return built(g, [&]() -> rs_tensor * {
    if (!rule) return graph_fail(g, rs_fail(RS_ERR_ARGUMENT, "token_drop: rule is NULL"));
    if (!score || score->graph != g) return add_op(g, OP_TOKEN_DROP, {}, {score, cu_seqlens, protect});  // the error that it is
    rs_tensor *starts = new_tensor(g, tensor_starts);
    if (!starts) return nullptr;
    const int level = static_cast<int>(g->drops.size()) + 1;
    starts->name = "token_starts." + std::to_string(starts->id);
    starts->type = RS_I32;
    starts->rank = 1;
    starts->shape[0] = RS_DIM_CU_SEQLENS;
    starts->level = level;
    op_params p = {};
    p.rule = *rule;
    rs_tensor *before = score->level ? g->drops[static_cast<size_t>(score->level) - 1] : nullptr;
    rs_tensor *kept = add_op(g, OP_TOKEN_DROP, p, {score, cu_seqlens, protect, before, starts}, 3u << 2);
    if (!kept) return nullptr;
    kept->level = level;
    g->drops.push_back(kept);
    return kept;
  });
}
rs_tensor *rs_token_starts(rs_graph *g, rs_tensor *kept) {
  return built(g, [&]() -> rs_tensor * {
    if (!kept) return nullptr;
    if (kept->graph == g && kept->kind == tensor_op && kept->op == OP_TOKEN_DROP) return kept->src[4];
    return graph_fail(
        g, rs_fail(RS_ERR_ARGUMENT, "token_starts: '%s' is not what rs_token_drop of this graph returned", kept->name.c_str()));
  });
}
rs_tensor *rs_token_gather(rs_graph *g, rs_tensor *x, rs_tensor *kept) { return add_op(g, OP_TOKEN_GATHER, {}, {x, kept}); }
rs_tensor *rs_token_restore(rs_graph *g, rs_tensor *x, rs_tensor *before, rs_tensor *kept) {
  return add_op(g, OP_TOKEN_RESTORE, {}, {x, before, kept});
}
rs_tensor *rs_token_assign(rs_graph *g, rs_tensor *x, rs_tensor *cu_seqlens, rs_tensor *kept) {
  return add_op(g, OP_TOKEN_ASSIGN, {}, {x, kept, cu_seqlens, rs_token_starts(g, kept)});
}
rs_tensor *rs_token_merge(rs_graph *g, rs_tensor *x, rs_tensor *assign, rs_tensor *kept, rs_tensor *cu_seqlens, rs_tensor *sizes,
                          rs_tensor *score) {
  return add_op(g, OP_TOKEN_MERGE, {}, {x, kept, cu_seqlens, rs_token_starts(g, kept), assign, sizes, score}, 3u << 5);
}
rs_tensor *rs_token_sizes(rs_graph *g, rs_tensor *assign, rs_tensor *kept, rs_tensor *cu_seqlens, rs_tensor *sizes) {
  return add_op(g, OP_TOKEN_SIZES, {}, {assign, kept, cu_seqlens, rs_token_starts(g, kept), sizes}, 1u << 4);
}

// ================================================================================ 11  graph: validate, plan, run, profile

namespace {

// Operators that follow each other and work row by row on the same tokens form a chain: a block of rows can go through all of them
// before the next one starts, by one thread, while its intermediate results stay in the cache.  Every other operator is a stage of
// its own.
constexpr int not_scores = -1;

// What only the choice of a drop needs: where that leaves all tokens, there is nothing to compute (graph_plan::idle).
void find_scores(rs_graph *g) {
  constexpr int unread = -2;
  for (const auto &t : g->tensors) t->scores = t->output ? not_scores : unread;
  for (auto at = g->tensors.rbegin(); at != g->tensors.rend(); ++at) {  // readers first
    rs_tensor &t = **at;
    if (t.kind != tensor_op) continue;
    if (t.scores == unread) t.scores = not_scores;
    for (int i = 0; i < max_sources; i++) {
      if (!t.src[i]) continue;
      const bool chooses = (t.op == OP_TOKEN_DROP && i == 0) || (t.op == OP_TOKEN_MERGE && i == 6);
      const int reader = !chooses ? t.scores : t.op == OP_TOKEN_DROP ? t.level : t.src[1]->level;
      int &scores = g->tensors[static_cast<size_t>(storage_of(t.src[i])->id)]->scores;
      scores = scores == unread || scores == reader ? reader : not_scores;
    }
  }
}

void find_stages(rs_graph *g) {
  g->stages.clear();
  g->ops = 0, g->chain_weights = 0;
  for (const auto &t : g->tensors) {
    t->last_use = t->output ? INT_MAX : t->id;
    if (t->kind != tensor_op) continue;
    for (rs_tensor *s : t->src)
      if (s) {
        int &last = g->tensors[static_cast<size_t>(storage_of(s)->id)]->last_use;
        last = std::max(last, t->id);
      }
    const bool by_rows = op_rows[t->op].by_rows && t->shape[0] == RS_DIM_TOKENS;
    if (!by_rows || g->stages.empty() || !g->stages.back().by_rows || g->stages.back().level != t->level)
      g->stages.push_back({g->ops, g->ops, t->id, by_rows, t->level});
    g->stages.back().end = ++g->ops;
    g->stages.back().last = t->id;
    size_t bytes = 0;
    if (by_rows && t->op == OP_LINEAR) (void)rs_tensor_bytes(t->src[1]->type, RS_PANELS, 2, t->src[1]->shape, &bytes);
    g->chain_weights += bytes;
    t->stage = static_cast<int>(g->stages.size()) - 1;
  }
  // What only the operators of one chain read exists a block at a time.
  for (const auto &t : g->tensors)
    if (t->kind == tensor_op && t->last_use != INT_MAX)
      t->in_block =
          g->stages[static_cast<size_t>(t->stage)].by_rows && g->tensors[static_cast<size_t>(t->last_use)]->stage == t->stage;
}

}  // namespace

rs_status rs_graph_finish(rs_graph *g) {
  return rs_guarded([&] {
    if (g->status != RS_OK) return rs_fail(g->status, "%s", g->error.c_str());
    if (g->finished) return RS_OK;
    if (std::none_of(g->tensors.begin(), g->tensors.end(), [](const auto &t) { return t->output; }))
      return rs_fail(RS_ERR_ARGUMENT, "the graph has no output: mark one by rs_output");
    find_stages(g);
    find_scores(g);
    g->finished = true;
    return RS_OK;
  });
}

namespace {

// Time spent in an operator of that name.
struct profile_entry {
  std::string name;
  const char *op;
  uint64_t calls;
  double seconds, macs;
  rs_type type;  // of the arithmetic
};

// The tokens of a level at one run.
struct token_level {
  int64_t tokens = 0;
  int64_t block_rows = 0;   // of the blocks of a chain; 0: chains run operator by operator
  std::vector<int32_t> cu;  // [B + 1] starts; level 0 has those of the caller
};

// Rows of the input "pixels", a row a token: of a patch its pixels, of a token before the patches zeros.  They are made of images
// [3, height, width] where a run wants to have them, by its threads.
struct pixel_rows {
  const rs_tensor *input = nullptr;  // nullptr: the graph has none, or it is bound
  rs_image_shape shape = {};
  int32_t patch = 0;
  const float *const *images = nullptr;

  void write(int64_t first, int64_t n, float *out) const {
    switch (patch) {  // copies of a known length are a few moves, in place of a call
      case 14:
        return write_patches<14>(first, n, out);
      case 16:
        return write_patches<16>(first, n, out);
      default:
        return write_patches<0>(first, n, out);
    }
  }

 private:
  template <size_t known_patch>
  void write_patches(int64_t first, int64_t n, float *out) const {
    const size_t p = known_patch ? known_patch : static_cast<size_t>(patch), width = static_cast<size_t>(shape.width),
                 plane = width * static_cast<size_t>(shape.height), columns = static_cast<size_t>(shape.columns);
    for (int64_t row = first; row < first + n; row++) {
      const int64_t token = row % shape.tokens - shape.prefix;
      if (token < 0) {
        out = std::fill_n(out, 3 * p * p, 0.0f);
        continue;
      }
      const auto at = static_cast<size_t>(token);
      const float *from = images[row / shape.tokens] + at / columns * p * width + at % columns * p;
      for (size_t channel = 0; channel < 3; channel++)
        for (size_t y = 0; y < p; y++, out += p) memcpy(out, from + channel * plane + y * width, p * 4);
    }
  }
};

// What a session keeps of a graph that it runs: sizes and places for the last (T, B).  Its vectors are made once a graph.
struct graph_plan {
  const rs_graph *graph;
  uint64_t graph_id;
  int64_t sequences = -1;
  std::vector<token_level> levels;
  std::vector<value> values;    // by tensor id
  std::vector<size_t> offsets;  // in the arena, or in a block
  std::vector<size_t> bytes;
  std::vector<void *> bound;  // memory of the caller's for inputs and outputs, or nullptr
  pixel_rows pixels;
  std::vector<op_run> ops;  // in order
  struct place {
    int id, end;  // lives from operator `id` to operator `end`
    size_t bytes, offset;
  };
  std::vector<place> order, live;  // while planning: the largest first; those that have a place, by offset
  std::vector<size_t> profile;     // index into the session's profile, by op
  std::vector<double> seconds;     // of the run that is profiled: [threads][ops]
  // Of the arena: tensors, scratch of all threads, then for each thread: scratch, block (tensors, scratch of all operators).
  size_t tensor_bytes = 0, shared_bytes = 0, scratch_bytes = 0, block_tensor_bytes = 0, each_bytes = 0;

  int64_t tokens(const rs_tensor &t) const { return levels[static_cast<size_t>(t.level)].tokens; }
  int64_t block_rows(const rs_tensor &t) const { return levels[static_cast<size_t>(t.level)].block_rows; }
  bool in_block(const rs_tensor &t) const { return t.in_block && block_rows(t); }
  // Is there nothing to do for an operator, because nobody needs what it makes?
  bool idle(const rs_tensor &t) const {
    return t.scores != not_scores &&
           tokens(*graph->drops[static_cast<size_t>(t.scores) - 1]->src[0]) == levels[static_cast<size_t>(t.scores)].tokens;
  }
  // The last operator that a result in the arena has to be there for.  Blocks are at different operators of a chain at one time, so
  // what one of them reads is there for all.
  int lives_until(const rs_tensor &t) const {
    if (t.last_use == INT_MAX) return INT_MAX;
    const rs_tensor &last = *graph->tensors[static_cast<size_t>(t.last_use)];
    return block_rows(last) ? graph->stages[static_cast<size_t>(last.stage)].last : t.last_use;
  }
  // Is it for the plan to say where that is?
  bool placed(const rs_tensor &t) const { return (t.kind == tensor_op || &t == pixels.input) && !bound[static_cast<size_t>(t.id)]; }
};

int64_t dim_at(int64_t dim, int64_t tokens, int64_t sequences) {
  switch (dim) {
    case RS_DIM_TOKENS:
      return tokens;
    case RS_DIM_SEQUENCES:
      return sequences;
    case RS_DIM_CU_SEQLENS:
      return sequences + 1;
    default:
      return dim;
  }
}

// A quantized layer's result is bf16 where all who read it take that.  kernels: nullptr on a device, which has its own way.
void plan_widths(graph_plan &p, const kernel_row *kernels) {
  for (const auto &t : p.graph->tensors) {
    const bool narrow = kernels && kernels->coarse_attn && t->kind == tensor_op && t->op == OP_LINEAR &&
                        is_quantized(t->src[1]->type) && !t->output;
    p.values[t->id].width = narrow ? 2 : 4;
    for (int i = 0; t->kind == tensor_op && i < max_sources; i++)
      if (t->src[i] && !(kernels && takes_bf16(*kernels, *t, i))) p.values[storage_of(t->src[i])->id].width = 4;
  }
  for (const auto &t : p.graph->tensors) p.values[t->id].width = p.values[storage_of(t.get())->id].width;
}

void plan_shapes(graph_plan &p) {
  for (const auto &t : p.graph->tensors) {
    value &v = p.values[t->id];
    v.rows = 1;
    for (int i = 0; i + 1 < t->rank; i++) v.rows *= dim_at(t->shape[i], p.tokens(*t), p.sequences);
    v.cols = dim_at(t->shape[t->rank - 1], p.tokens(*t), p.sequences);
    v.stride = t->kind == tensor_view ? p.values[t->base->id].stride : v.cols;
    p.bytes[t->id] = static_cast<size_t>(v.rows) * static_cast<size_t>(v.cols) * static_cast<size_t>(v.width);
  }
}

// Rows of a block: few enough that what a chain makes of them stays in the L2 cache, and so that no thread gets one more than the
// others, if that can be had.  Each block goes through all weights, so fewer rows than pay for that run operator by operator, cut
// along channels.  Weights that fit into a last cache, of which most machines have as much, come from there as fast as they are
// needed, but not for any number of threads; others come from memory.
constexpr int64_t most_block_rows = 64, block_row_step = 2;
constexpr size_t cached_weights = 16 << 20;
constexpr int64_t cached_cost = 2, cached_least = 4, other_cost = 10, other_least = 40;  // in rows: docs/kernels.md

int64_t choose_block_rows(int64_t tokens, int threads, size_t weight_bytes) {
  const bool cached = weight_bytes <= cached_weights;
  const int64_t least_each = cached ? std::min<int64_t>(cached_least * std::max(1, threads / 2), other_least) : other_least;
  if (tokens <= least_each * (threads - 1)) return 0;
  int64_t best = 0, least = 0;
  for (int64_t rows = block_row_step; rows <= most_block_rows; rows += block_row_step) {
    const int64_t cost = ceil_div(ceil_div(tokens, rows), threads) * (rows + (cached ? cached_cost : other_cost));
    if (!best || cost < least) best = rows, least = cost;
  }
  return best;
}

// Places by liveness, in the arena or in a block: the largest first, each in the lowest gap between those that live when it does
// (greedy by size; arXiv 2001.03288).  An operator's result is never over what it reads.  Returns the bytes in use at most.
size_t plan_places(graph_plan &p, bool in_block) {
  p.order.clear(), p.live.clear();
  for (const auto &t : p.graph->tensors) {
    if (!p.placed(*t) || p.in_block(*t) != in_block) continue;
    const value &v = p.values[t->id];
    const size_t bytes = in_block ? static_cast<size_t>(p.block_rows(*t) * v.cols * v.width) : p.bytes[t->id];
    auto at = p.order.end();
    while (at != p.order.begin() && at[-1].bytes < bytes) --at;
    p.order.insert(at, {t->id, in_block ? t->last_use : p.lives_until(*t), bytes, 0});
  }
  size_t most = 0;
  for (graph_plan::place &x : p.order) {
    auto at = p.live.begin();
    for (; at != p.live.end(); ++at) {
      if (at->id > x.end || x.id > at->end) continue;
      if (at->offset >= x.offset + x.bytes) break;
      x.offset = std::max(x.offset, round_up(at->offset + at->bytes, align_data));
    }
    while (at != p.live.begin() && at[-1].offset > x.offset) --at;
    p.live.insert(at, x);
    p.offsets[x.id] = x.offset;
    most = std::max(most, round_up(x.offset + x.bytes, align_data));
  }
  return most;
}

void plan_ops(graph_plan &p, const kernel_row *kernels) {
  p.ops.clear();
  p.shared_bytes = p.scratch_bytes = 0;
  size_t block_shared = 0;
  for (const auto &t : p.graph->tensors) {
    if (t->kind != tensor_op) continue;
    op_run r = {};
    r.t = t.get();
    r.kernels = kernels;
    r.out = p.values[t->id];
    for (int i = 0; i < max_sources; i++)
      if (t->src[i]) r.in[i] = p.values[t->src[i]->id];
    p.ops.push_back(r);
    const bool blocks = p.block_rows(*t) && p.graph->stages[static_cast<size_t>(t->stage)].by_rows;
    if (blocks) r.out.rows = p.block_rows(*t);
    const work_bytes work = op_rows[t->op].work(r);
    size_t &shared = blocks ? block_shared : p.shared_bytes;
    shared = std::max(shared, round_up(work.shared, align_data));
    p.scratch_bytes = std::max(p.scratch_bytes, round_up(work.each_thread, align_data));
  }
  p.each_bytes = p.scratch_bytes + p.block_tensor_bytes + block_shared;
}

rs_status check_cu_seqlens(const rs_tensor &t, const int32_t *cu, int64_t tokens, int64_t sequences) {
  bool ok = cu[0] == 0 && cu[sequences] == tokens;
  for (int64_t b = 0; b < sequences; b++) ok &= cu[b] <= cu[b + 1];
  return ok ? RS_OK : rs_fail(RS_ERR_ARGUMENT, "'%s' must rise from 0 to %lld", t.name.c_str(), static_cast<long long>(tokens));
}

// What one run needs for itself: memory and plans.  A session has one, and one a thread where parts of a batch run side by side.
struct lane {
  char *arena = nullptr;
  size_t arena_bytes = 0;
  std::vector<std::unique_ptr<graph_plan>> plans;
};

}  // namespace

struct rs_session {
  const rs_model *model;
  const kernel_row *kernels;
  int threads;
  int64_t max_batch_tokens;
  rs_thread_mode thread_mode;
  rs_allocator allocator;
  bool profile;

  std::vector<std::unique_ptr<lane>> lanes;  // the first, and one a thread once parts ran side by side
  std::vector<profile_entry> profile_rows;
  std::unique_ptr<struct encoder> encoder;        // section 16; nullptr without a model
  std::unique_ptr<struct device_session> device;  // section 12; nullptr: the CPU

  ~rs_session();
};

namespace {

void forget_on_device(const rs_session *s, uint64_t graph);

// Graphs that a session's encoder keeps, the last used at the end.  More than any program needs that does not try out drop
// schedules; one that does shall not grow with each.
constexpr size_t most_graphs = 16;
constexpr size_t most_plans = 2 * most_graphs;  // that a lane keeps

graph_plan *plan_of(const rs_session *s, lane *l, const rs_graph *g) {
  const auto known = std::find_if(l->plans.begin(), l->plans.end(), [&](const auto &p) { return p->graph_id == g->id; });
  if (known != l->plans.end()) {
    std::rotate(known, known + 1, l->plans.end());  // the last used at the end
    return l->plans.back().get();
  }
  // Nobody tells when a graph is freed.  One at this address before was, and of many the one that was used longest ago may have
  // been.
  const graph_plan *oldest = l->plans.size() >= most_plans ? l->plans.front().get() : nullptr;
  const auto is_old = [&](const auto &p) { return p->graph == g || p.get() == oldest; };
  for (const auto &p : l->plans)
    if (is_old(p) && s->device) forget_on_device(s, p->graph_id);
  l->plans.erase(std::remove_if(l->plans.begin(), l->plans.end(), is_old), l->plans.end());
  auto p = std::make_unique<graph_plan>();
  const size_t n = g->tensors.size();
  p->graph = g;
  p->graph_id = g->id;
  p->values.resize(n);
  p->offsets.resize(n);
  p->bytes.resize(n);
  p->bound.resize(n);
  p->order.reserve(n);
  p->live.reserve(n);
  p->ops.reserve(n);
  p->levels.resize(g->drops.size() + 1);
  plan_widths(*p, s->device ? nullptr : s->kernels);
  l->plans.push_back(std::move(p));
  return l->plans.back().get();
}

void forget_plans(rs_session *s, const rs_graph *g) {
  for (const auto &l : s->lanes)
    l->plans.erase(std::remove_if(l->plans.begin(), l->plans.end(), [&](const auto &p) { return p->graph_id == g->id; }),
                   l->plans.end());
  if (s->device) forget_on_device(s, g->id);
}

// A graph of one call leaves nothing behind in the session.
struct forget_at_end {
  rs_session *s;
  const rs_graph *g;
  forget_at_end(rs_session *s, const rs_graph *g) : s(s), g(g) {}
  ~forget_at_end() { forget_plans(s, g); }
  forget_at_end(const forget_at_end &) = delete;
  forget_at_end &operator=(const forget_at_end &) = delete;
};

rs_status check_binding(const graph_plan &p, const rs_binding &b) {
  const rs_tensor &t = *b.tensor;
  if (p.bound[t.id]) return rs_fail(RS_ERR_ARGUMENT, "'%s' is bound twice", t.name.c_str());
  if (b.bytes != p.bytes[t.id])
    return rs_fail(RS_ERR_ARGUMENT, "'%s' has %zu bytes, expected %zu", t.name.c_str(), b.bytes, p.bytes[t.id]);
  return b.data || !b.bytes ? RS_OK : rs_fail(RS_ERR_ARGUMENT, "'%s' is bound to NULL", t.name.c_str());
}
// Not nullptr, which is what is not bound, even where there are no bytes.
void *bound_data(const rs_binding &b) {
  static char nothing;
  return b.data ? b.data : &nothing;
}

rs_status bind_inputs(graph_plan &p, const rs_binding *bindings, size_t n) {
  std::fill(p.bound.begin(), p.bound.end(), nullptr);
  for (size_t i = 0; i < n; i++) {
    const rs_tensor *t = bindings[i].tensor;
    if (!t || t->graph != p.graph) return rs_fail(RS_ERR_ARGUMENT, "binding %zu is not a tensor of this graph", i);
    if (t->kind != tensor_input && !t->output)
      return rs_fail(RS_ERR_ARGUMENT, "'%s' is neither an input nor an output", t->name.c_str());
    if (t->kind != tensor_input) continue;
    RS_TRY(check_binding(p, bindings[i]));
    p.bound[t->id] = bound_data(bindings[i]);
  }
  for (const auto &t : p.graph->tensors) {
    if (t->kind != tensor_input) continue;
    if (t.get() == p.pixels.input) continue;
    if (!p.bound[t->id]) return rs_fail(RS_ERR_ARGUMENT, "input '%s' is not bound", t->name.c_str());
    if (t->type == RS_I32 && t->rank == 1 && t->shape[0] == RS_DIM_CU_SEQLENS)
      RS_TRY(check_cu_seqlens(*t, static_cast<const int32_t *>(p.bound[t->id]), p.levels[0].tokens, p.sequences));
  }
  return RS_OK;
}

rs_status bind_outputs(graph_plan &p, const rs_binding *bindings, size_t n) {
  for (size_t i = 0; i < n; i++) {
    if (bindings[i].tensor->kind == tensor_input) continue;
    RS_TRY(check_binding(p, bindings[i]));
    p.bound[bindings[i].tensor->id] = bound_data(bindings[i]);
  }
  return RS_OK;
}

// How many tokens each drop leaves.  That depends on lengths and on how many tokens are protected, both of which the caller has
// bound, and on nothing that a run finds out.
void plan_levels(graph_plan &p) {
  for (size_t i = 0; i < p.graph->drops.size(); i++) {
    const rs_tensor &drop = *p.graph->drops[i], &starts = *drop.src[1];
    const auto starts_of = [&](const rs_tensor &t) {
      return t.kind == tensor_starts ? p.levels[static_cast<size_t>(t.level)].cu.data()
                                     : static_cast<const int32_t *>(p.bound[t.id]);
    };
    const rs_tensor *all = &starts;  // of the graph's inputs: what `protect` goes by
    while (all->kind == tensor_starts) all = p.graph->drops[static_cast<size_t>(all->level) - 1]->src[1];
    const int32_t *from = starts_of(starts), *whole = starts_of(*all),
                  *protect = drop.src[2] ? static_cast<const int32_t *>(p.bound[drop.src[2]->id]) : nullptr;
    std::vector<int32_t> &to = p.levels[i + 1].cu;
    to.resize(static_cast<size_t>(p.sequences) + 1);
    to[0] = 0;
    for (int64_t b = 0; b < p.sequences; b++) {
      const drop_count count = drop_rule_count(drop.params.rule, from[b + 1] - from[b],
                                               protected_tokens(drop.params.rule, protect, whole[b], whole[b + 1]));
      to[static_cast<size_t>(b) + 1] = to[static_cast<size_t>(b)] + static_cast<int32_t>(count.kept + count.extra);
    }
    p.levels[i + 1].tokens = to.back();
  }
}

rs_status reserve_arena(rs_session *s, lane *l, size_t bytes) {
  if (bytes <= l->arena_bytes) return RS_OK;
  if (l->arena) s->allocator.free(s->allocator.ctx, l->arena, l->arena_bytes);
  l->arena_bytes = 0;
  l->arena = static_cast<char *>(s->allocator.alloc(s->allocator.ctx, bytes, align_data));
  if (!l->arena) return rs_fail(RS_ERR_MEMORY, "no memory for %zu bytes of activations", bytes);
  l->arena_bytes = bytes;
  return RS_OK;
}

void place(const lane &l, graph_plan &p, run_error *error) {
  for (const auto &t : p.graph->tensors) {
    value &v = p.values[t->id];
    switch (t->kind) {
      case tensor_weight:
        v.data = static_cast<char *>(const_cast<void *>(t->data));
        break;
      case tensor_input:
      case tensor_op:  // what is in a block: run_block moves it there
        v.data = static_cast<char *>(p.bound[t->id]);
        if (!v.data && l.arena) v.data = l.arena + p.offsets[t->id];
        break;
      case tensor_view:
        v.data = p.values[t->base->id].data;
        if (v.data) v.data += t->first * v.width;
        break;
      case tensor_starts:
        v.data = reinterpret_cast<char *>(p.levels[static_cast<size_t>(t->level)].cu.data());
        break;
    }
  }
  for (op_run &r : p.ops) {
    r.out = p.values[r.t->id];
    for (int i = 0; i < max_sources; i++)
      if (r.t->src[i]) r.in[i] = p.values[r.t->src[i]->id];
    r.shared = l.arena ? l.arena + p.tensor_bytes : nullptr;  // a plan that is only looked at has none
    r.each = l.arena ? r.shared + p.shared_bytes : nullptr;
    r.each_bytes = p.each_bytes;
    r.error = error;
  }
}

profile_entry &profile_of(rs_session *s, graph_plan &p, size_t i) {
  const op_run &r = p.ops[i];
  if (p.profile.empty()) p.profile.assign(p.ops.size(), SIZE_MAX);
  if (size_t &at = p.profile[i]; at == SIZE_MAX) {  // its first run in this graph: find the row of that name, or make one
    at = 0;
    while (at < s->profile_rows.size() && s->profile_rows[at].name != r.t->name) at++;
    if (at == s->profile_rows.size())
      s->profile_rows.push_back({r.t->name, op_rows[r.t->op].name, 0, 0, 0, op_rows[r.t->op].macs(r).type});
  }
  return s->profile_rows[p.profile[i]];
}

// One thread's way through a graph.
struct graph_runner {
  rs_session *s;
  graph_plan &p;
  const worker me;

  void run() const {
    if (p.pixels.input) {
      const value &v = p.values[static_cast<size_t>(p.pixels.input->id)];
      const worker::range mine = me.share(v.rows);
      p.pixels.write(mine.begin, mine.end - mine.begin, reinterpret_cast<float *>(v.data) + mine.begin * v.stride);
      me.barrier();
    }
    for (const graph_stage &stage : p.graph->stages) {
      const token_level &level = p.levels[static_cast<size_t>(stage.level)];
      if (level.block_rows && stage.by_rows) {
        for (int64_t b = me.next(-1); b * level.block_rows < level.tokens; b = me.next(b))
          run_block(stage, level, b * level.block_rows);
        me.barrier();
        continue;
      }
      for (int i = stage.begin; i < stage.end; i++) {
        if (p.idle(*p.ops[static_cast<size_t>(i)].t)) continue;
        timed(i, [&] {
          const op_run &r = p.ops[static_cast<size_t>(i)];
          op_rows[r.t->op].cpu(r, me);
          me.barrier();
        });
      }
    }
  }

 private:
  // Rows [first, first + block_rows) through all operators of a chain.
  void run_block(const graph_stage &stage, const token_level &level, int64_t first) const {
    const int64_t rows = std::min(level.block_rows, level.tokens - first);
    char *scratch = p.ops[0].scratch(me.thread), *block = scratch + p.scratch_bytes;
    const auto slice = [&](const rs_tensor &t, value *v) {
      const rs_tensor &whole = *storage_of(&t);
      (t.rank == 1 ? v->cols : v->rows) = rows;
      if (p.in_block(whole)) v->data = block + p.offsets[whole.id] + (v->data - p.values[whole.id].data);
      else v->data += first * (t.rank == 1 ? 1 : v->stride) * v->width;
    };
    for (int i = stage.begin; i < stage.end; i++) {
      if (p.idle(*p.ops[static_cast<size_t>(i)].t)) continue;
      timed(i, [&] {
        op_run r = p.ops[static_cast<size_t>(i)];
        slice(*r.t, &r.out);
        for (int j = 0; j < max_sources; j++)
          if (r.t->src[j] && r.t->src[j]->kind != tensor_weight && r.t->src[j]->level == stage.level) slice(*r.t->src[j], &r.in[j]);
        r.first_row = first;
        r.shared = block + p.block_tensor_bytes;
        r.each = scratch;
        op_rows[r.t->op].cpu(r, me.alone());
      });
    }
  }

  template <class F>
  void timed(int i, F f) const {
    if (!s->profile) return f();
    const double start = now_seconds();
    f();
    p.seconds[static_cast<size_t>(me.thread) * p.ops.size() + static_cast<size_t>(i)] += now_seconds() - start;
  }
};

// One run: T tokens, B sequences and what is bound.
struct run_request {
  rs_graph *graph;
  int64_t tokens, sequences;
  const rs_binding *bindings;
  size_t n_bindings;
  pixel_rows pixels = {};
};

// What a part of a batch binds: ids and type ids, or pixels that are there as rows; positions, cu_seqlens, vectors, and protect
// where tokens are dropped with regard to it.
using part_bindings = std::array<rs_binding, 7>;

// Shapes, and what is bound.
rs_status plan_request(graph_plan &p, const run_request &q) {
  p.sequences = q.sequences;
  p.levels[0].tokens = q.tokens;
  p.pixels = q.pixels;
  plan_shapes(p);
  RS_TRY(bind_inputs(p, q.bindings, q.n_bindings));
  plan_levels(p);
  if (p.levels.size() > 1) plan_shapes(p);
  return bind_outputs(p, q.bindings, q.n_bindings);
}

// All but memory.  Allocates nothing.
rs_status make_plan(const rs_session *s, int threads, graph_plan &p, const run_request &q) {
  RS_TRY(plan_request(p, q));
  for (token_level &l : p.levels) l.block_rows = choose_block_rows(l.tokens, threads, p.graph->chain_weights);
  p.tensor_bytes = plan_places(p, false);
  p.block_tensor_bytes = plan_places(p, true);
  plan_ops(p, s->kernels);
  return RS_OK;
}

size_t arena_bytes_of(const graph_plan &p, int threads) {
  return p.tensor_bytes + p.shared_bytes + p.each_bytes * static_cast<size_t>(threads);
}

// Throughput: every thread takes the next of n independent parts and runs it alone, with no one to wait for.
// request(i, bindings) says what part i is; any thread may ask.
template <class F>
rs_status run_parts(rs_session *s, int64_t n, const F &request) {
  while (s->lanes.size() < static_cast<size_t>(s->threads)) s->lanes.push_back(std::make_unique<lane>());
  // Memory and plans are made here, since the caller's allocator is not to be called on other threads.
  size_t bytes = 0;
  for (int64_t i = 0; i < n; i++) {
    part_bindings bindings;
    const run_request q = request(i, &bindings);
    graph_plan &p = *plan_of(s, s->lanes[0].get(), q.graph);
    RS_TRY(make_plan(s, 1, p, q));
    bytes = std::max(bytes, arena_bytes_of(p, 1));
    for (const auto &l : s->lanes) {
      std::vector<token_level> &levels = plan_of(s, l.get(), q.graph)->levels;
      for (size_t j = 0; j < levels.size(); j++) levels[j].cu.reserve(p.levels[j].cu.size());
    }
  }
  for (const auto &l : s->lanes) RS_TRY(reserve_arena(s, l.get(), bytes));
  run_error error;
  run_team(s->threads, [&](const worker &me) {
    lane *l = s->lanes[static_cast<size_t>(me.thread)].get();
    for (int64_t i = me.next(-1); i < n && !error.taken; i = me.next(i)) {
      part_bindings bindings;
      const run_request q = request(i, &bindings);
      graph_plan &p = *plan_of(s, l, q.graph);
      if (const rs_status status = make_plan(s, 1, p, q)) return error.set(status);
      place(*l, p, &error);
      graph_runner{s, p, me.alone()}.run();
    }
  });
  return error.taken ? rs_fail(error.status, "%s", error.text) : RS_OK;
}

rs_status run_on_device(rs_session *s, graph_plan &p, const run_request &q);
void count_calls(rs_session *s, graph_plan &p) {
  for (size_t i = 0; i < p.ops.size(); i++) {
    if (p.idle(*p.ops[i].t)) continue;
    profile_entry &e = profile_of(s, p, i);
    e.calls++;
    e.macs += op_rows[p.ops[i].t->op].macs(p.ops[i]).count;
    // The thread that took longest: of a few rows, one may do all.
    double longest = 0;
    for (size_t at = i; at < p.seconds.size(); at += p.ops.size()) longest = std::max(longest, p.seconds[at]);
    e.seconds += longest;
  }
}

// All threads on one run.
rs_status run_whole(rs_session *s, const run_request &q) {
  lane *l = s->lanes[0].get();
  graph_plan &p = *plan_of(s, l, q.graph);
  if (s->device) return run_on_device(s, p, q);
  RS_TRY(make_plan(s, s->threads, p, q));
  RS_TRY(reserve_arena(s, l, arena_bytes_of(p, s->threads)));
  run_error error;
  place(*l, p, &error);
  p.seconds.assign(s->profile ? p.ops.size() * static_cast<size_t>(s->threads) : 0, 0);
  run_team(s->threads, [&](const worker &me) { graph_runner{s, p, me}.run(); });
  if (s->profile) count_calls(s, p);
  return error.taken ? rs_fail(error.status, "%s", error.text) : RS_OK;
}

}  // namespace

rs_status rs_graph_run(rs_session *s, rs_graph *graph, int64_t tokens, int64_t sequences, const rs_binding *bindings,
                       size_t n_bindings) {
  return rs_guarded([&] {
    if (!graph->finished) return rs_fail(RS_ERR_ARGUMENT, "the graph is not finished: call rs_graph_finish first");
    if (tokens < 0 || sequences < 0 || tokens > INT32_MAX || sequences > INT32_MAX)
      return rs_fail(RS_ERR_ARGUMENT, "%lld tokens, %lld sequences", static_cast<long long>(tokens),
                     static_cast<long long>(sequences));
    return run_whole(s, {graph, tokens, sequences, bindings, n_bindings});
  });
}

size_t rs_session_profile_count(const rs_session *s) { return s->profile_rows.size(); }

rs_status rs_session_profile_at(const rs_session *s, size_t i, rs_profile_row *out) {
  if (i >= s->profile_rows.size()) return rs_fail(RS_ERR_ARGUMENT, "profile row %zu of %zu", i, s->profile_rows.size());
  const profile_entry &e = s->profile_rows[i];
  *out = {e.name.c_str(), e.op, e.calls, e.seconds, e.macs, e.type};
  return RS_OK;
}

// Sections 12 to 15, and all from plans on, are to be small: what is there runs once a model or a text, or takes next to no time
// beside what runs with it.
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#pragma GCC push_options
#pragma GCC optimize("Os")
#endif

// ================================================================================ 12  backend hook
//
// A backend is a library of its own, so that one build of rs serves machines with and without a driver: librs-cuda.so, looked for
// when a device is asked for, beside this library and then where the system looks; RS_CUDA_LIBRARY names another.

namespace {

struct backend_library {
  const backend *b = nullptr;
  std::string error;  // why there is none
};

backend_library open_backend() {
  backend_library l;
  std::string path = "librs-cuda.so";
  if (const char *named = getenv("RS_CUDA_LIBRARY"); named && *named) {
    path = named;
  } else {
    Dl_info self;
    const bool found = dladdr(reinterpret_cast<const void *>(rs_version), &self) && self.dli_fname;
    const std::string file = found ? self.dli_fname : "", beside = file.substr(0, file.rfind('/') + 1) + path;
    if (found && access(beside.c_str(), F_OK) == 0) path = beside;
  }
  void *handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    const char *why = dlerror();
    l.error = why ? why : path;
    return l;
  }
  const auto get = reinterpret_cast<const backend *(*)()>(dlsym(handle, "rs_backend_get"));
  const backend *b = get ? get() : nullptr;
  if (b && b->version == backend_version && b->ops == op_count && !strcmp(b->library, RS_VERSION)) l.b = b;
  else l.error = path + " is not of this version of rs";
  return l;
}

rs_status find_backend(const backend **out) {
  static const backend_library library = open_backend();  // once a process
  *out = library.b;
  return library.b ? RS_OK : rs_fail(RS_ERR_UNSUPPORTED, "no CUDA backend ('make CUDA=1' builds it): %s", library.error.c_str());
}

// A device that a model or session is on.  b is nullptr: the CPU.
struct device_choice {
  const backend *b = nullptr;
  int index = 0;
  std::string name() const { return b ? std::string(b->name) + ":" + std::to_string(index) : "cpu"; }
};

rs_status find_card(int index, device_choice *out) {
  const backend *b;
  RS_TRY(find_backend(&b));
  backend_error error = {};
  int n = 0;
  const rs_status status = b->count_devices(&n, &error);
  if (status != RS_OK) return rs_fail(status, "%s: %s", b->name, error.text);
  if (index >= n)
    return rs_fail(RS_ERR_NOT_FOUND, "%s:%d: this machine has %d such device%s", b->name, index, n, n == 1 ? "" : "s");
  out->b = b;
  out->index = index;
  return RS_OK;
}

// "cpu", "cuda", "cuda:N" or "auto": the first card that answers, else the CPU.  nullptr: RS_DEVICE, or the CPU.
rs_status choose_device(const char *name, device_choice *out) {
  if (!name) name = getenv("RS_DEVICE");
  *out = {};
  if (!name || !*name || !strcmp(name, "cpu")) return RS_OK;
  if (!strcmp(name, "auto")) {
    device_choice card;
    for (int i = 0; find_card(i, &card) == RS_OK; i++) {
      backend_model *trial = nullptr;
      backend_error ignored = {};
      if (card.b->open_model(i, &trial, &ignored) != RS_OK) continue;  // too old, or taken
      card.b->close_model(trial);
      *out = card;
      break;
    }
    return RS_OK;
  }
  int index = 0, end = 0;
  if (strcmp(name, "cuda") != 0 && (sscanf(name, "cuda:%3d%n", &index, &end) != 1 || name[end] || index < 0))
    return rs_fail(RS_ERR_ARGUMENT, "device '%s': expected cpu, cuda, cuda:N or auto", name);
  return find_card(index, out);
}

}  // namespace

// Weights on a device.  Sessions of a model share them.
struct device {
  device_choice choice;
  std::string name;
  backend_model *model = nullptr;

  ~device() {
    if (model) choice.b->close_model(model);
  }
  rs_status open(const device_choice &to) {
    choice = to;
    name = to.name();
    backend_error error = {};
    const rs_status status = choice.b->open_model(choice.index, &model, &error);
    return status == RS_OK ? RS_OK : rs_fail(status, "%s: %s", name.c_str(), error.text);
  }
};

struct device_session {
  std::shared_ptr<const device> on;
  backend_session *session = nullptr;
  // Of the last run; kept, so that runs allocate nothing.
  std::vector<backend_op> ops;
  std::vector<char> idle;  // operators of the graph that are not among them
  std::vector<backend_level> levels;
  std::vector<backend_input> inputs;
  std::vector<backend_output> outputs;
  std::vector<float> seconds;
  int32_t starts = -1;  // the input that is levels[0].cu
  pixel_rows pixels;
  int threads = 1;  // that write them

  ~device_session() {
    if (session) on->choice.b->close_session(session);
  }
  rs_status open(std::shared_ptr<const device> to) {
    on = std::move(to);
    backend_error error = {};
    const rs_status status = on->choice.b->open_session(on->model, &session, &error);
    return status == RS_OK ? RS_OK : rs_fail(status, "%s: %s", on->name.c_str(), error.text);
  }
};

namespace {

void forget_on_device(const rs_session *s, uint64_t graph) { s->device->on->choice.b->forget_graph(s->device->session, graph); }

// Launches are recorded for a capacity, so that runs of nearly the same size share them: at most an eighth is in vain.  Of as many
// tokens as the backend takes, no more than that.
int64_t token_capacity(int64_t n, int64_t most) {
  int64_t step = 64;
  while (step * 16 <= n) step *= 2;
  const int64_t capacity = std::max<int64_t>(1, ceil_div(n, step)) * step;
  return n <= most ? std::min(capacity, most) : capacity;
}
int64_t sequence_capacity(int64_t n) {
  int64_t c = 1;
  while (c < n) c *= 2;
  return c;
}

bool in_file(const rs_model *m, const void *data);  // section 13

backend_tensor device_tensor(const graph_plan &p, const rs_tensor *t) {
  backend_tensor d = {};
  if (!t) return d;
  const rs_tensor &whole = *storage_of(t);
  const value &v = p.values[t->id];
  d.place = whole.kind == tensor_weight  ? backend_place::weight
            : whole.kind == tensor_input ? backend_place::input
            : whole.kind == tensor_op    ? backend_place::result
                                         : backend_place::starts;
  d.rows_are = t->shape[0] == RS_DIM_TOKENS      ? backend_rows::tokens
               : t->shape[0] == RS_DIM_SEQUENCES ? backend_rows::sequences
               : t->shape[0] > 0                 ? backend_rows::fixed
                                                 : backend_rows::starts;
  d.type = t->type, d.layout = t->layout;
  d.id = whole.id;
  d.level = t->level;
  d.output = whole.output;
  d.of_model = whole.kind == tensor_weight && in_file(t->graph->model, whole.data);
  d.rows = t->rank == 1 ? v.cols : v.rows;
  d.cols = t->rank == 1 ? 1 : v.cols;
  d.stride = t->rank == 1 ? 1 : v.stride;
  for (const rs_tensor *at = t; at->kind == tensor_view; at = at->base) d.first += at->first;
  d.offset = p.offsets[whole.id];
  if (whole.kind == tensor_weight) {
    d.data = whole.data;
    (void)rs_tensor_bytes(t->type, t->layout, t->rank, t->shape, &d.bytes);  // rs_constant has seen it
  }
  d.name = t->name.c_str();
  return d;
}

// What a backend calls for pixels: all threads write, each its share of a part.  One that is woken for less than a share would cost
// more than it does.
void write_pixels(const void *context, void *to, int64_t part, void (*written)(void *, int64_t, int64_t), void *of) {
  constexpr int64_t least_share = 128 << 10;
  const auto &d = *static_cast<const device_session *>(context);
  const int64_t rows = d.levels[0].tokens, cols = d.pixels.input->shape[1];
  const auto threads = std::clamp<int64_t>(std::min(part, rows) * cols * 4 / least_share, 1, d.threads);
  run_team(static_cast<int>(threads), [&](const worker &me) {
    for (int64_t first = 0; first < rows; first += part) {
      const int64_t n = std::min(part, rows - first);
      const worker::range mine = me.share(n);
      d.pixels.write(first + mine.begin, mine.end - mine.begin, static_cast<float *>(to) + (first + mine.begin) * cols);
      me.barrier();
      if (me.thread == 0) written(of, first, n);
    }
  });
}

// What is bound, by the true numbers of tokens.
void collect_bound(const graph_plan &p, device_session *d) {
  d->levels.clear(), d->inputs.clear(), d->outputs.clear();
  const int64_t most = d->on->choice.b->most_tokens;
  for (const token_level &l : p.levels) d->levels.push_back({l.tokens, token_capacity(l.tokens, most), l.cu.data()});
  d->levels[0].cu = nullptr;
  d->starts = -1;
  for (const auto &t : p.graph->tensors) {
    void *data = p.bound[t->id];
    if (t.get() == p.pixels.input)
      d->inputs.push_back({t->id, t->type, nullptr, p.bytes[t->id], 0, {write_pixels, d, p.tokens(*t)}});
    if (!data) continue;
    if (t->kind == tensor_op) d->outputs.push_back({t->id, data, p.bytes[t->id]});
    if (t->kind != tensor_input) continue;
    d->inputs.push_back({t->id, t->type, data, p.bytes[t->id], 0, {}});
    if (t->type != RS_I32 || t->rank != 1 || t->shape[0] != RS_DIM_CU_SEQLENS || d->levels[0].cu) continue;
    d->levels[0].cu = static_cast<const int32_t *>(data);
    d->starts = t->id;
  }
}

// Places in the arena, for the capacity.  Results have one even where the caller reads them.
void plan_capacity(graph_plan &p, int64_t sequences, const std::vector<backend_level> &levels) {
  p.sequences = sequences;
  p.pixels = {};  // the backend has a place for them
  for (size_t i = 0; i < levels.size(); i++) p.levels[i].tokens = levels[i].capacity, p.levels[i].block_rows = 0;
  plan_shapes(p);
  for (const auto &t : p.graph->tensors)
    if (t->kind == tensor_op) p.bound[t->id] = nullptr;
  p.tensor_bytes = plan_places(p, false);
}

rs_status run_on_device(rs_session *s, graph_plan &p, const run_request &q) {
  device_session &d = *s->device;
  RS_TRY(plan_request(p, q));
  if (s->profile) {  // multiplications are counted by the true numbers
    plan_ops(p, s->kernels);
    place(*s->lanes[0], p, nullptr);
    count_calls(s, p);
  }
  d.pixels = q.pixels;
  d.threads = s->threads;
  d.idle.clear();  // as is that
  for (const auto &t : p.graph->tensors)
    if (t->kind == tensor_op) d.idle.push_back(p.idle(*t));
  collect_bound(p, &d);
  backend_run run = {};
  run.sequence_capacity = sequence_capacity(q.sequences);
  plan_capacity(p, run.sequence_capacity, d.levels);
  for (backend_input &i : d.inputs) i.capacity = p.bytes[i.id];
  d.ops.clear();
  auto idle = d.idle.begin();
  for (const auto &t : p.graph->tensors) {
    if (t->kind != tensor_op) continue;
    if (t->shape[0] != RS_DIM_TOKENS && t->shape[0] != RS_DIM_SEQUENCES)
      return rs_fail(RS_ERR_UNSUPPORTED, "'%s' %s: on %s, results have a row a token or a sequence", t->name.c_str(),
                     shape_text(t->rank, t->shape).c_str(), d.on->name.c_str());
    if (*idle++) continue;
    backend_op op = {};
    op.op = t->op;
    op.params = t->params;
    if (t->op == OP_TOKEN_MERGE) op.params.rule = t->src[1]->params.rule;  // how it weighs is the drop's affair
    op.out = device_tensor(p, t.get());
    for (int i = 0; i < max_sources; i++) op.in[i] = device_tensor(p, t->src[i]);
    d.ops.push_back(op);
  }
  run.graph = q.graph->id;
  run.ops = d.ops.data(), run.n_ops = d.ops.size();
  run.sequences = q.sequences;
  run.levels = d.levels.data(), run.n_levels = d.levels.size();
  run.inputs = d.inputs.data(), run.n_inputs = d.inputs.size();
  run.outputs = d.outputs.data(), run.n_outputs = d.outputs.size();
  run.starts = d.starts;
  run.arena_bytes = p.tensor_bytes;
  d.seconds.assign(d.ops.size(), 0);
  run.seconds = s->profile ? d.seconds.data() : nullptr;
  backend_error error = {};
  const rs_status status = d.on->choice.b->run(d.session, &run, &error);
  if (status != RS_OK) return rs_fail(status, "%s", error.text);
  for (size_t i = 0, ran = 0; s->profile && i < d.idle.size(); i++)
    if (!d.idle[i]) profile_of(s, p, i).seconds += static_cast<double>(d.seconds[ran++]);
  return RS_OK;
}

}  // namespace

rs_status rs_device_get_info(const char *name, rs_device_info *info) {
  return rs_guarded([&] {
    if (info->size < sizeof(uint32_t))
      return rs_fail(RS_ERR_ARGUMENT, "rs_device_info.size is %u: set it to sizeof(rs_device_info)", info->size);
    device_choice choice;
    RS_TRY(choose_device(name, &choice));
    rs_device_info full = {};
    snprintf(full.device, sizeof full.device, "%s", choice.name().c_str());
    if (choice.b) {
      backend_device_info card = {};
      backend_error error = {};
      const rs_status status = choice.b->describe(choice.index, &card, &error);
      if (status != RS_OK) return rs_fail(status, "%s: %s", full.device, error.text);
      snprintf(full.name, sizeof full.name, "%s", card.name);
      full.memory_bytes = card.memory_bytes;
      full.int8_macs = card.int8_macs, full.f16_macs = card.f16_macs;
      full.bytes_per_second = card.bytes_per_second;
    } else {
      snprintf(full.name, sizeof full.name, "%s kernels", rs_isa());
    }
    full.size = info->size;
    memcpy(info, &full, std::min<size_t>(info->size, sizeof full));
    return RS_OK;
  });
}

// ================================================================================ 13  weight file: reader
//
//   header 128 bytes | data | metadata | tensor directory | CRC32C of each 64 KiB of data
//
// Regions follow each other without holes, each 64-byte aligned, padded with zeros.  The header has a checksum of itself and one of
// everything behind the data; both are checked at load, the blocks of data by rs_model_verify and, where asked, at load.

namespace {

constexpr char file_magic[8] = {'R', 'S', 'W', '\r', '\n', 0x1a, '\n', 0};  // shows what a text-mode transfer breaks
constexpr uint32_t file_version = 1;
constexpr uint32_t feature_input_scale = 1;  // some matrices want their layer's inputs scaled: find_input_scale
constexpr size_t crc_block = 65536;

struct file_header {
  char magic[8];
  uint32_t version;
  uint32_t required;  // feature bits that a reader must know: feature_input_scale
  uint64_t file_size;
  uint64_t data_offset, data_size;
  uint64_t meta_offset, meta_size;
  uint64_t dir_offset, dir_size;
  uint64_t crc_offset, crc_size;
  uint32_t meta_count, tensor_count;
  uint32_t tail_crc;  // of [meta_offset, file_size)
  uint32_t zero[6];
  uint32_t header_crc;  // of all before it
};
static_assert(sizeof(file_header) == 128 && offsetof(file_header, header_crc) == 124, "the header is 128 bytes");

struct file_tensor {  // an entry of the directory, sorted by name
  char name[64];      // NUL padded
  uint32_t type, layout, rank, zero;
  uint64_t shape[RS_MAX_RANK];
  uint64_t offset, bytes;  // absolute
};
static_assert(sizeof(file_tensor) == 128, "a directory entry is 128 bytes");

struct file_meta {  // followed by the key, NUL, padding to 8, the value, padding to 8
  uint32_t key_bytes, kind;
  uint64_t value_bytes;
};

bool is_zero(const void *p, size_t n) {
  const auto *c = static_cast<const char *>(p);
  for (size_t i = 0; i < n; i++)
    if (c[i]) return false;
  return true;
}

bool is_printable(const char *p, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (p[i] <= ' ' || p[i] > '~') return false;
  return n > 0;
}

}  // namespace

struct stored_drop {  // names and notes are of the metadata
  const char *name, *note;
  std::unique_ptr<rs_drop, void (*)(rs_drop *)> drop;
};

struct rs_model {
  std::string path;
  int fd = -1;
  const char *map = nullptr;
  size_t map_bytes = 0;
  file_header header;
  std::vector<rs_meta> meta;
  std::vector<rs_tensor_info> tensors;
  const rs_family *family = nullptr;
  rs_tokenizer *tokenizer = nullptr;  // of a text tower
  rs_model_info info = {};
  rs_model_shape shape;
  rs_image_spec image;  // of an image tower
  rs_pooling pooling = RS_POOL_MEAN;
  bool normalize = false;
  const char *default_prompt = "";
  std::vector<stored_drop> drops;
  std::shared_ptr<const struct device> device;  // nullptr: the CPU

  ~rs_model() {
    rs_tokenizer_free(tokenizer);
    if (map) munmap(const_cast<char *>(map), map_bytes);
    if (fd >= 0) close(fd);
  }
};

namespace {

bool in_file(const rs_model *m, const void *data) {
  return m && static_cast<const char *>(data) >= m->map && static_cast<const char *>(data) < m->map + m->map_bytes;
}

// What stands beside a matrix in the file for what goes into its layer: "<name>.input_scale", or nullptr.  By where the matrix
// lies, since a graph may call it otherwise.
constexpr char input_scale_suffix[] = ".input_scale";
bool is_input_scale(const char *name) {
  const size_t n = strlen(name), suffix = strlen(input_scale_suffix);
  return n >= suffix && !strcmp(name + n - suffix, input_scale_suffix);
}
const rs_tensor_info *find_input_scale(const rs_model *m, const void *weight) {
  if (!in_file(m, weight)) return nullptr;
  for (const rs_tensor_info &w : m->tensors) {
    if (w.data != weight) continue;
    const std::string name = std::string(w.name) + input_scale_suffix;
    for (const rs_tensor_info &t : m->tensors)
      if (name == t.name) return &t;
  }
  return nullptr;
}

rs_status bad_file(const rs_model &m, const char *format, ...) __attribute__((format(printf, 2, 3)));
rs_status bad_file(const rs_model &m, const char *format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  return rs_fail(RS_ERR_FORMAT, "%s: %s", m.path.c_str(), text);
}

rs_status map_file(rs_model *m) {
  const char *path = m->path.c_str();
  m->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // non-blocking: opening a FIFO must not wait for a writer
  if (m->fd < 0) return rs_fail(RS_ERR_IO, "%s: %s", path, strerror(errno));
  struct stat st;
  if (fstat(m->fd, &st)) return rs_fail(RS_ERR_IO, "%s: %s", path, strerror(errno));
  if (S_ISDIR(st.st_mode)) return rs_fail(RS_ERR_IO, "%s: is a directory, expected a weight file", path);
  if (!S_ISREG(st.st_mode)) return rs_fail(RS_ERR_IO, "%s: is not a regular file", path);
  if (st.st_size == 0) return bad_file(*m, "is empty, expected a weight file");
  if (static_cast<size_t>(st.st_size) < sizeof(file_header))
    return bad_file(*m, "has %lld bytes, fewer than the header of a weight file (%zu)", static_cast<long long>(st.st_size),
                    sizeof(file_header));
  m->map_bytes = static_cast<size_t>(st.st_size);
  void *map = mmap(nullptr, m->map_bytes, PROT_READ, MAP_SHARED, m->fd, 0);
  if (map == MAP_FAILED) return rs_fail(RS_ERR_IO, "%s: can't map %zu bytes: %s", path, m->map_bytes, strerror(errno));
  m->map = static_cast<const char *>(map);
  return RS_OK;
}

// A region must begin where the one before it ends, rounded up, with zeros between.
rs_status check_region(const rs_model &m, const char *what, uint64_t *end, uint64_t offset, uint64_t size) {
  if (offset != round_up(*end, align_data) || offset > m.map_bytes || size > m.map_bytes - offset)
    return bad_file(m, "%s: offset %llu, size %llu: not within the file's %zu bytes behind offset %llu", what,
                    static_cast<unsigned long long>(offset), static_cast<unsigned long long>(size), m.map_bytes,
                    static_cast<unsigned long long>(*end));
  if (!is_zero(m.map + *end, offset - *end))
    return bad_file(m, "the padding before offset %llu (%s) is not zero", static_cast<unsigned long long>(offset), what);
  *end = offset + size;
  return RS_OK;
}

rs_status read_header(rs_model *m) {
  file_header &h = m->header;
  memcpy(&h, m->map, sizeof h);
  if (memcmp(h.magic, file_magic, 3))
    return bad_file(*m, "is not a weight file (begins with 0x%02x%02x%02x, expected \"RSW\")", m->map[0] & 255, m->map[1] & 255,
                    m->map[2] & 255);
  if (memcmp(h.magic, file_magic, sizeof file_magic))
    return bad_file(*m, "the signature is damaged, as by a transfer in text mode");
  if (h.version != file_version)
    return rs_fail(RS_ERR_UNSUPPORTED, "%s: format version %u, this library reads %u", m->path.c_str(), h.version, file_version);
  if (const uint32_t crc = crc32c(0, &h, offsetof(file_header, header_crc)); crc != h.header_crc)
    return bad_file(*m, "the header is damaged: checksum %08x, expected %08x", crc, h.header_crc);
  if (const uint32_t unknown = h.required & ~feature_input_scale)
    return rs_fail(RS_ERR_UNSUPPORTED, "%s: needs features 0x%x that this library does not have", m->path.c_str(), unknown);
  if (h.file_size != m->map_bytes)
    return bad_file(*m, "has %zu bytes, the header says %llu: %s", m->map_bytes, static_cast<unsigned long long>(h.file_size),
                    m->map_bytes < h.file_size ? "truncated" : "something was appended");
  if (!is_zero(h.zero, sizeof h.zero)) return bad_file(*m, "reserved bytes of the header are not zero");
  if (h.meta_count > max_entries || h.tensor_count > max_entries)
    return bad_file(*m, "%u metadata keys, %u tensors: more than %llu", h.meta_count, h.tensor_count,
                    static_cast<unsigned long long>(max_entries));
  uint64_t end = sizeof h;
  RS_TRY(check_region(*m, "data", &end, h.data_offset, h.data_size));
  RS_TRY(check_region(*m, "metadata", &end, h.meta_offset, h.meta_size));
  RS_TRY(check_region(*m, "tensor directory", &end, h.dir_offset, h.dir_size));
  RS_TRY(check_region(*m, "checksums", &end, h.crc_offset, h.crc_size));
  if (end != m->map_bytes)
    return bad_file(*m, "%llu bytes behind the last region", static_cast<unsigned long long>(m->map_bytes - end));
  if (h.dir_size != h.tensor_count * sizeof(file_tensor))
    return bad_file(*m, "tensor directory: %llu bytes for %u tensors", static_cast<unsigned long long>(h.dir_size), h.tensor_count);
  if (h.crc_size != 4 * static_cast<uint64_t>(ceil_div(static_cast<int64_t>(h.data_size), crc_block)))
    return bad_file(*m, "checksums: %llu bytes for %llu bytes of data", static_cast<unsigned long long>(h.crc_size),
                    static_cast<unsigned long long>(h.data_size));
  if (const uint32_t crc = crc32c(0, m->map + h.meta_offset, m->map_bytes - h.meta_offset); crc != h.tail_crc)
    return bad_file(*m, "metadata or directory are damaged: checksum %08x, expected %08x", crc, h.tail_crc);
  return RS_OK;
}

// An array of strings: u64 count, u32 offsets [count + 1] into what follows, each string NUL terminated.
struct strs_header {
  uint64_t count;
};
const uint32_t *strs_offsets(const void *strs) {
  return reinterpret_cast<const uint32_t *>(static_cast<const char *>(strs) + sizeof(strs_header));
}

bool strs_are_sound(const char *p, uint64_t bytes, size_t *count) {
  if (bytes < sizeof(strs_header) + 4) return false;
  strs_header h;
  memcpy(&h, p, sizeof h);
  if (h.count > (bytes - sizeof h) / 4 - 1) return false;
  const uint32_t *offsets = strs_offsets(p);
  const char *text = reinterpret_cast<const char *>(offsets + h.count + 1);
  const uint64_t text_bytes = bytes - sizeof h - 4 * (h.count + 1);
  if (offsets[0] != 0 || offsets[h.count] != text_bytes) return false;
  for (uint64_t i = 0; i < h.count; i++)
    if (offsets[i + 1] <= offsets[i] || offsets[i + 1] > text_bytes || text[offsets[i + 1] - 1]) return false;
  *count = h.count;
  return true;
}

rs_status read_meta_value(const rs_model &m, uint32_t kind, const char *p, uint64_t bytes, rs_meta *out) {
  out->count = 1;
  bool ok = false;
  switch (kind) {
    case RS_META_BOOL:
      ok = bytes == 1 && (*p == 0 || *p == 1);
      if (ok) out->boolean = *p;
      break;
    case RS_META_I64:
      ok = bytes == 8;
      if (ok) memcpy(&out->i64, p, 8);
      break;
    case RS_META_F64:
      ok = bytes == 8;
      if (ok) memcpy(&out->f64, p, 8), ok = std::isfinite(out->f64);
      break;
    case RS_META_STR:
      ok = bytes > 0 && !p[bytes - 1];
      out->str = p, out->count = bytes - 1;
      break;
    case RS_META_I64S:
      ok = bytes % 8 == 0;
      out->i64s = reinterpret_cast<const int64_t *>(p), out->count = bytes / 8;
      break;
    case RS_META_F32S:
      ok = bytes % 4 == 0;
      out->f32s = reinterpret_cast<const float *>(p), out->count = bytes / 4;
      break;
    case RS_META_STRS:
      ok = strs_are_sound(p, bytes, &out->count);
      out->strs = p;
      break;
    default:
      return bad_file(m, "metadata '%s': unknown kind %u", out->key, kind);
  }
  if (!ok)
    return bad_file(m, "metadata '%s': the value is malformed (%llu bytes of kind %u)", out->key,
                    static_cast<unsigned long long>(bytes), kind);
  out->kind = static_cast<rs_meta_kind>(kind);
  return RS_OK;
}

rs_status read_metadata(rs_model *m) {
  const char *p = m->map + m->header.meta_offset;
  uint64_t left = m->header.meta_size;
  const char *previous = "";
  m->meta.reserve(m->header.meta_count);
  for (uint32_t i = 0; i < m->header.meta_count; i++) {
    file_meta h;
    if (left < sizeof h) return bad_file(*m, "metadata end within entry %u of %u", i, m->header.meta_count);
    memcpy(&h, p, sizeof h);
    const uint64_t key_room = round_up(uint64_t{h.key_bytes} + 1, 8);
    if (h.key_bytes == 0 || h.key_bytes > max_key || key_room > left - sizeof h || h.value_bytes > left - sizeof h - key_room ||
        round_up(h.value_bytes, 8) > left - sizeof h - key_room)
      return bad_file(*m, "metadata entry %u: key of %u bytes, value of %llu bytes, %llu left", i, h.key_bytes,
                      static_cast<unsigned long long>(h.value_bytes), static_cast<unsigned long long>(left));
    const char *key = p + sizeof h, *data = key + key_room;
    if (!is_printable(key, h.key_bytes) || !is_zero(key + h.key_bytes, key_room - h.key_bytes))
      return bad_file(*m, "metadata entry %u: the key is not printable", i);
    if (strcmp(previous, key) >= 0) return bad_file(*m, "metadata '%s' is not in order", key);
    if (!is_zero(data + h.value_bytes, round_up(h.value_bytes, 8) - h.value_bytes))
      return bad_file(*m, "metadata '%s': padding is not zero", key);
    rs_meta value = {};
    value.key = previous = key;
    RS_TRY(read_meta_value(*m, h.kind, data, h.value_bytes, &value));
    m->meta.push_back(value);
    p = data + round_up(h.value_bytes, 8);
    left -= sizeof h + key_room + round_up(h.value_bytes, 8);
  }
  return left ? bad_file(*m, "%llu bytes behind the last metadata entry", static_cast<unsigned long long>(left)) : RS_OK;
}

rs_status read_tensor(const rs_model &m, const file_tensor &f, const char *name, rs_tensor_info *t) {
  t->name = name;
  if (f.rank < 1 || f.rank > RS_MAX_RANK) return bad_file(m, "tensor '%s': rank %u, expected 1 to %d", name, f.rank, RS_MAX_RANK);
  if (f.zero) return bad_file(m, "tensor '%s': a reserved field is %u, expected 0", name, static_cast<unsigned>(f.zero));
  if (f.type > RS_W4 || f.type == RS_BF16 || f.layout > RS_PANELS)
    return bad_file(m, "tensor '%s': unknown type %u, layout %u", name, f.type, f.layout);
  t->type = static_cast<rs_type>(f.type);
  t->layout = static_cast<rs_layout>(f.layout);
  t->rank = static_cast<int>(f.rank);
  for (uint32_t i = 0; i < RS_MAX_RANK; i++) {
    if (i < f.rank ? f.shape[i] < 1 || f.shape[i] > static_cast<uint64_t>(max_dim) : f.shape[i] != 0)
      return bad_file(m, "tensor '%s': dimension %u is %llu", name, i, static_cast<unsigned long long>(f.shape[i]));
    t->shape[i] = static_cast<int64_t>(f.shape[i]);
  }
  if (rs_tensor_bytes(t->type, t->layout, t->rank, t->shape, &t->bytes) != RS_OK)
    return bad_file(m, "tensor '%s': %s", name, std::string(last_error).c_str());
  if (t->bytes != f.bytes)
    return bad_file(m, "tensor '%s': %llu bytes, a %s of shape %s has %zu", name, static_cast<unsigned long long>(f.bytes),
                    rs_type_name(t->type), shape_text(t->rank, t->shape).c_str(), t->bytes);
  const file_header &h = m.header;
  if (f.offset < h.data_offset || f.offset % align_data || f.offset - h.data_offset > h.data_size ||
      f.bytes > h.data_size - (f.offset - h.data_offset))
    return bad_file(m, "tensor '%s': offset %llu, %llu bytes: not within the data", name, static_cast<unsigned long long>(f.offset),
                    static_cast<unsigned long long>(f.bytes));
  t->offset = f.offset;
  t->data = m.map + f.offset;
  return RS_OK;
}

rs_status check_tensor(const rs_model &m, const rs_tensor_info &t, bool deep) {
  matrix shape = {};
  const codec *c = find_codec(t.type, t.layout, t.rank, t.shape, &shape);
  if (!c) return RS_ERR_FORMAT;
  const char *wrong = c->check(t.data, shape, deep);
  return wrong ? bad_file(m, "tensor '%s': %s", t.name, wrong) : RS_OK;
}

rs_status read_directory(rs_model *m) {
  const auto *dir = reinterpret_cast<const file_tensor *>(m->map + m->header.dir_offset);
  m->tensors.resize(m->header.tensor_count);
  std::vector<size_t> order(m->tensors.size());
  for (size_t i = 0; i < m->tensors.size(); i++) {
    const char *name = dir[i].name;
    const size_t n = strnlen(name, sizeof dir[i].name);
    if (n == sizeof dir[i].name || !is_printable(name, n) || !is_zero(name + n, sizeof dir[i].name - n))
      return bad_file(*m, "the name of tensor %zu is malformed", i);
    if (i && strcmp(dir[i - 1].name, name) >= 0) return bad_file(*m, "tensor '%s' is not in order", name);
    RS_TRY(read_tensor(*m, dir[i], name, &m->tensors[i]));
    order[i] = i;
  }
  // Data without holes and without overlaps.
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return m->tensors[a].offset < m->tensors[b].offset; });
  uint64_t end = m->header.data_offset;
  for (size_t i : order) {
    const rs_tensor_info &t = m->tensors[i];
    if (t.offset != round_up(end, align_data))
      return bad_file(*m, "tensor '%s' is at offset %llu, expected %zu", t.name, static_cast<unsigned long long>(t.offset),
                      round_up(end, align_data));
    if (!is_zero(m->map + end, t.offset - end)) return bad_file(*m, "the padding before tensor '%s' is not zero", t.name);
    end = t.offset + t.bytes;
  }
  if (end != m->header.data_offset + m->header.data_size)
    return bad_file(*m, "the data end at %llu, the last tensor at %llu",
                    static_cast<unsigned long long>(m->header.data_offset + m->header.data_size),
                    static_cast<unsigned long long>(end));
  bool scales = false;
  for (const rs_tensor_info &t : m->tensors) {
    RS_TRY(check_tensor(*m, t, false));
    scales |= is_input_scale(t.name);
  }
  if (scales != (m->header.required == feature_input_scale))
    return bad_file(*m, "scales of inputs: %s by the header, %s by the tensors", scales ? "none" : "some",
                    scales ? "some" : "none");
  return RS_OK;
}

const rs_tensor_info *tensor_at_offset(const rs_model &m, uint64_t offset) {
  for (const rs_tensor_info &t : m.tensors)
    if (offset < t.offset + t.bytes && offset + crc_block > t.offset) return &t;
  return nullptr;
}

// By pread, so that a check does not make the whole map resident.
rs_status check_blocks(const rs_model &m) {
  std::vector<char> block(crc_block);
  const auto *crcs = reinterpret_cast<const uint32_t *>(m.map + m.header.crc_offset);
  for (uint64_t at = 0; at < m.header.data_size; at += crc_block) {
    const auto n = static_cast<size_t>(std::min<uint64_t>(crc_block, m.header.data_size - at));
    for (size_t got = 0; got < n;) {
      const ssize_t r = pread(m.fd, block.data() + got, n - got, static_cast<off_t>(m.header.data_offset + at + got));
      if (r < 0 && errno == EINTR) continue;
      if (r <= 0)
        return rs_fail(RS_ERR_IO, "%s: read at %llu: %s", m.path.c_str(),
                       static_cast<unsigned long long>(m.header.data_offset + at + got), r ? strerror(errno) : "end of file");
      got += static_cast<size_t>(r);
    }
    const uint32_t crc = crc32c(0, block.data(), n), wanted = crcs[at / crc_block];
    if (crc == wanted) continue;
    const rs_tensor_info *t = tensor_at_offset(m, m.header.data_offset + at);
    return bad_file(m, "data are damaged within bytes %llu to %llu (tensor '%s'): checksum %08x, expected %08x",
                    static_cast<unsigned long long>(m.header.data_offset + at),
                    static_cast<unsigned long long>(m.header.data_offset + at + n), t ? t->name : "?", crc, wanted);
  }
  return RS_OK;
}

}  // namespace

size_t rs_model_meta_count(const rs_model *m) { return m->meta.size(); }

rs_status rs_model_meta_at(const rs_model *m, size_t i, rs_meta *out) {
  if (i >= m->meta.size()) return rs_fail(RS_ERR_ARGUMENT, "metadata entry %zu of %zu", i, m->meta.size());
  *out = m->meta[i];
  return RS_OK;
}

rs_status rs_model_meta(const rs_model *m, const char *key, rs_meta *out) {
  const auto it =
      std::lower_bound(m->meta.begin(), m->meta.end(), key, [](const rs_meta &a, const char *k) { return strcmp(a.key, k) < 0; });
  if (it == m->meta.end() || strcmp(it->key, key))
    return rs_fail(RS_ERR_NOT_FOUND, "%s: there is no metadata '%s'", m->path.c_str(), key);
  *out = *it;
  return RS_OK;
}

const char *rs_meta_string(const rs_meta *meta, size_t i, size_t *length) {
  if (meta->kind != RS_META_STRS || i >= meta->count) return nullptr;
  const uint32_t *offsets = strs_offsets(meta->strs);
  if (length) *length = offsets[i + 1] - offsets[i] - 1;
  return reinterpret_cast<const char *>(offsets + meta->count + 1) + offsets[i];
}

size_t rs_model_tensor_count(const rs_model *m) { return m->tensors.size(); }

rs_status rs_model_tensor_at(const rs_model *m, size_t i, rs_tensor_info *out) {
  if (i >= m->tensors.size()) return rs_fail(RS_ERR_ARGUMENT, "tensor %zu of %zu", i, m->tensors.size());
  *out = m->tensors[i];
  return RS_OK;
}

rs_status rs_model_tensor(const rs_model *m, const char *name, rs_tensor_info *out) {
  const auto it = std::lower_bound(m->tensors.begin(), m->tensors.end(), name,
                                   [](const rs_tensor_info &a, const char *n) { return strcmp(a.name, n) < 0; });
  if (it == m->tensors.end() || strcmp(it->name, name))
    return rs_fail(RS_ERR_NOT_FOUND, "%s: there is no tensor '%s'", m->path.c_str(), name);
  *out = *it;
  return RS_OK;
}

rs_status rs_model_verify(const rs_model *m) {
  return rs_guarded([&] {
    RS_TRY(check_blocks(*m));
    for (const rs_tensor_info &t : m->tensors) RS_TRY(check_tensor(*m, t, true));
    return RS_OK;
  });
}

// ================================================================================ 14  weight file: writer

struct rs_writer {
  std::string path, temporary;  // the latter in `folder`, wherever the process goes to
  int fd = -1, folder = -1;
  bool finished = false;
  rs_status status = RS_OK;  // of the first write that failed: the file can't be finished any more
  uint64_t at = sizeof(file_header);
  uint32_t crc = 0;
  std::vector<uint32_t> crcs;
  std::vector<file_tensor> tensors;  // by name
  struct entry {
    rs_meta_kind kind;
    std::string value;
  };
  std::map<std::string, entry> meta;

  ~rs_writer() {
    if (fd >= 0) close(fd);
    if (!finished && !temporary.empty()) unlinkat(folder, temporary.c_str(), 0);
    if (folder >= 0) close(folder);
  }
};

namespace {

std::string folder_of(const std::string &path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}
const char *name_in_folder(const rs_writer &w) { return w.path.c_str() + (w.path.rfind('/') + 1); }  // npos + 1 is 0

rs_status write_failed(rs_writer *w, const char *what = "write") {
  return w->status = rs_fail(RS_ERR_IO, "%s: %s: %s", w->path.c_str(), what, strerror(errno));
}

// Can anything still go in?
rs_status check_writable(const rs_writer *w) {
  if (w->finished) return rs_fail(RS_ERR_ARGUMENT, "%s is finished already", w->path.c_str());
  return w->status == RS_OK ? RS_OK : rs_fail(w->status, "%s: an earlier write failed", w->path.c_str());
}

rs_status write_bytes(rs_writer *w, const void *data, size_t n) {
  RS_TRY(check_writable(w));
  for (const char *p = static_cast<const char *>(data); n;) {
    const ssize_t r = write(w->fd, p, std::min<size_t>(n, 1 << 30));
    if (r < 0 && errno == EINTR) continue;
    if (r < 0) return write_failed(w);
    p += r, n -= static_cast<size_t>(r), w->at += static_cast<uint64_t>(r);
  }
  return RS_OK;
}

// Data bytes: written, and counted into the checksum of their block.
rs_status write_data(rs_writer *w, const void *data, size_t n) {
  const auto *p = static_cast<const char *>(data);
  while (n) {
    const uint64_t in_block = (w->at - sizeof(file_header)) % crc_block;
    const auto part = static_cast<size_t>(std::min<uint64_t>(n, crc_block - in_block));
    w->crc = crc32c(in_block ? w->crc : 0, p, part);
    RS_TRY(write_bytes(w, p, part));
    if (in_block + part == crc_block) w->crcs.push_back(w->crc);
    p += part, n -= part;
  }
  return RS_OK;
}

constexpr char zeros[align_data] = {};

rs_status set_meta(rs_writer *w, const char *key, rs_meta_kind kind, std::string value) {
  RS_TRY(check_writable(w));
  const size_t n = strlen(key);
  if (!is_printable(key, n) || n > max_key)
    return rs_fail(RS_ERR_ARGUMENT, "metadata key '%s': expected 1 to %zu printable characters", key, max_key);
  if (w->meta.count(key)) return rs_fail(RS_ERR_ARGUMENT, "metadata '%s' is set twice", key);
  if (w->meta.size() == max_entries)
    return rs_fail(RS_ERR_LIMIT, "more than %llu metadata keys", static_cast<unsigned long long>(max_entries));
  w->meta[key] = {kind, std::move(value)};
  return RS_OK;
}

template <class T>
std::string bytes_of(const T *values, size_t n) {
  return n ? std::string(reinterpret_cast<const char *>(values), n * sizeof(T)) : std::string();
}

// NULL that is not empty has a byte, which whoever takes the text refuses.
size_t text_length(const rs_text &t) {
  if (t.length != RS_NUL_TERMINATED) return t.length;
  return t.data ? strlen(t.data) : 1;
}

std::string serialize_meta(const std::map<std::string, rs_writer::entry> &meta) {
  std::string out;
  for (const auto &[key, e] : meta) {
    const file_meta h = {static_cast<uint32_t>(key.size()), static_cast<uint32_t>(e.kind), e.value.size()};
    out += bytes_of(&h, 1) + key;
    out.append(round_up(key.size() + 1, 8) - key.size(), '\0');
    out += e.value;
    out.append(round_up(e.value.size(), 8) - e.value.size(), '\0');
  }
  return out;
}

}  // namespace

rs_status rs_writer_open(const char *path, rs_writer **out) {
  return rs_guarded([&] {
    *out = nullptr;
    struct stat st;
    if (!*path) return rs_fail(RS_ERR_ARGUMENT, "the path of the weight file is empty");
    const bool exists = stat(path, &st) == 0;
    if (exists && !S_ISREG(st.st_mode))
      return rs_fail(RS_ERR_IO, "%s: is %s, expected a file that can be replaced", path,
                     S_ISDIR(st.st_mode) ? "a directory" : "not a regular file");
    auto w = std::make_unique<rs_writer>();
    w->path = path;
    w->folder = open(folder_of(w->path).c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC);
    // As readable as the file before, or as any other: mkstemp would make it 0600, and no thread can ask for the umask but by
    // changing it.
    static std::atomic<uint64_t> files{0};
    std::string temporary;
    do {
      char suffix[32];
      snprintf(suffix, sizeof suffix, ".%lx-%llx", static_cast<unsigned long>(getpid()), static_cast<unsigned long long>(files++));
      temporary = name_in_folder(*w) + std::string(suffix);
      if (w->folder >= 0) w->fd = openat(w->folder, temporary.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (w->fd < 0 && errno == EEXIST);
    if (w->fd < 0)
      return rs_fail(RS_ERR_IO, "%s: can't create a file in %s: %s", path, folder_of(w->path).c_str(), strerror(errno));
    w->temporary = temporary;
    if (exists && fchmod(w->fd, st.st_mode & 07777)) return write_failed(w.get());
    const file_header h = {};
    w->at = 0;
    RS_TRY(write_bytes(w.get(), &h, sizeof h));
    *out = w.release();
    return RS_OK;
  });
}

void rs_writer_free(rs_writer *w) { delete w; }

namespace {
rs_status check_text(const char *key, size_t i, std::string_view text) {
  const size_t valid = rs_valid_utf8(text);
  return valid == text.size() ? RS_OK : rs_fail(RS_ERR_TEXT, "metadata '%s': text %zu: invalid UTF-8 at byte %zu", key, i, valid);
}

rs_status check_finite(const char *what, const char *name, const void *values, size_t n) {
  for (size_t i = 0; i < n; i++) {
    float v;  // of no alignment
    memcpy(&v, static_cast<const char *>(values) + 4 * i, 4);
    if (!std::isfinite(v)) return rs_fail(RS_ERR_NUMERIC, "%s '%s': value %zu is NaN or infinite", what, name, i);
  }
  return RS_OK;
}
}  // namespace

rs_status rs_writer_set_bool(rs_writer *w, const char *key, bool value) {
  return rs_guarded([&] { return set_meta(w, key, RS_META_BOOL, std::string(1, value ? '\1' : '\0')); });
}
rs_status rs_writer_set_i64(rs_writer *w, const char *key, int64_t value) {
  return rs_guarded([&] { return set_meta(w, key, RS_META_I64, bytes_of(&value, 1)); });
}
rs_status rs_writer_set_f64(rs_writer *w, const char *key, double value) {
  return rs_guarded([&] {
    if (!std::isfinite(value)) return rs_fail(RS_ERR_NUMERIC, "metadata '%s' is NaN or infinite", key);
    return set_meta(w, key, RS_META_F64, bytes_of(&value, 1));
  });
}
rs_status rs_writer_set_str(rs_writer *w, const char *key, const char *value) {
  return rs_guarded([&] {
    RS_TRY(check_text(key, 0, {value, strlen(value)}));
    return set_meta(w, key, RS_META_STR, std::string(value, strlen(value) + 1));
  });
}
rs_status rs_writer_set_i64s(rs_writer *w, const char *key, const int64_t *values, size_t n) {
  return rs_guarded([&] { return set_meta(w, key, RS_META_I64S, bytes_of(values, n)); });
}
rs_status rs_writer_set_f32s(rs_writer *w, const char *key, const float *values, size_t n) {
  return rs_guarded([&] {
    RS_TRY(check_finite("metadata", key, values, n));
    return set_meta(w, key, RS_META_F32S, bytes_of(values, n));
  });
}
rs_status rs_writer_set_strs(rs_writer *w, const char *key, const rs_text *values, size_t n) {
  return rs_guarded([&] {
    const strs_header h = {n};
    std::vector<uint32_t> offsets(n + 1);
    std::string text;
    for (size_t i = 0; i < n; i++) {
      if (!values[i].data && values[i].length) return rs_fail(RS_ERR_ARGUMENT, "metadata '%s': text %zu is NULL", key, i);
      const std::string_view part(values[i].data, text_length(values[i]));
      RS_TRY(check_text(key, i, part));
      text += part;
      text += '\0';
      if (text.size() > UINT32_MAX) return rs_fail(RS_ERR_LIMIT, "metadata '%s' has more than 4 GiB of text", key);
      offsets[i + 1] = static_cast<uint32_t>(text.size());
    }
    return set_meta(w, key, RS_META_STRS, bytes_of(&h, 1) + bytes_of(offsets.data(), n + 1) + text);
  });
}

rs_status rs_writer_add(rs_writer *w, const char *name, rs_type type, rs_layout layout, int rank, const int64_t *shape,
                        const void *data, size_t bytes) {
  return rs_guarded([&] {
    RS_TRY(check_writable(w));
    file_tensor t = {};
    const size_t n = strlen(name);
    if (!is_printable(name, n) || n >= sizeof t.name)
      return rs_fail(RS_ERR_ARGUMENT, "tensor name '%s': expected 1 to %zu printable characters", name, sizeof t.name - 1);
    const auto place =
        std::find_if(w->tensors.begin(), w->tensors.end(), [&](const file_tensor &other) { return strcmp(other.name, name) >= 0; });
    if (place != w->tensors.end() && !strcmp(place->name, name))
      return rs_fail(RS_ERR_ARGUMENT, "tensor '%s' is added twice", name);
    if (w->tensors.size() == max_entries)
      return rs_fail(RS_ERR_LIMIT, "more than %llu tensors", static_cast<unsigned long long>(max_entries));
    size_t expected = 0;
    RS_TRY(rs_tensor_bytes(type, layout, rank, shape, &expected));
    if (bytes != expected)
      return rs_fail(RS_ERR_ARGUMENT, "tensor '%s': %zu bytes, a %s of shape %s has %zu", name, bytes, rs_type_name(type),
                     shape_text(rank, shape).c_str(), expected);
    if (type == RS_F32 && rank == 1) RS_TRY(check_finite("tensor", name, data, bytes / 4));  // a load looks at these
    RS_TRY(write_data(w, zeros, round_up(w->at, align_data) - w->at));
    memcpy(t.name, name, n);
    t.type = type, t.layout = layout, t.rank = static_cast<uint32_t>(rank);
    for (int i = 0; i < rank; i++) t.shape[i] = static_cast<uint64_t>(shape[i]);
    t.offset = w->at, t.bytes = bytes;
    RS_TRY(write_data(w, data, bytes));
    w->tensors.insert(place, t);
    return RS_OK;
  });
}

rs_status rs_writer_copy(rs_writer *w, const rs_model *model) {
  return rs_guarded([&] {
    const char *p = model->map + model->header.meta_offset;
    for (const rs_meta &m : model->meta) {
      file_meta h;
      memcpy(&h, p, sizeof h);
      const char *value = p + sizeof h + round_up(uint64_t{h.key_bytes} + 1, 8);
      p = value + round_up(h.value_bytes, 8);
      if (!w->meta.count(m.key)) RS_TRY(set_meta(w, m.key, m.kind, std::string(value, h.value_bytes)));
    }
    std::vector<const rs_tensor_info *> order;  // as the file has them: tables last
    for (const rs_tensor_info &t : model->tensors) order.push_back(&t);
    std::sort(order.begin(), order.end(), [](const rs_tensor_info *a, const rs_tensor_info *b) { return a->offset < b->offset; });
    for (const rs_tensor_info *t : order)
      RS_TRY(rs_writer_add(w, t->name, t->type, t->layout, t->rank, t->shape, t->data, t->bytes));
    return RS_OK;
  });
}

rs_status rs_writer_finish(rs_writer *w) {
  return rs_guarded([&] {
    RS_TRY(check_writable(w));
    file_header h = {};
    memcpy(h.magic, file_magic, sizeof h.magic);
    h.version = file_version;
    for (const file_tensor &t : w->tensors)
      if (is_input_scale(t.name)) h.required |= feature_input_scale;
    h.data_offset = sizeof h;
    h.data_size = w->at - sizeof h;
    if (h.data_size % crc_block) w->crcs.push_back(w->crc);
    h.meta_count = static_cast<uint32_t>(w->meta.size());
    h.tensor_count = static_cast<uint32_t>(w->tensors.size());
    // Everything behind the data in one piece; it begins at the first multiple of 64 behind them.
    RS_TRY(write_bytes(w, zeros, round_up(w->at, align_data) - w->at));
    std::string tail;
    const auto append = [&](const std::string &region, uint64_t *offset, uint64_t *size) {
      tail.append(round_up(tail.size(), align_data) - tail.size(), '\0');
      *offset = w->at + tail.size();
      *size = region.size();
      tail += region;
    };
    append(serialize_meta(w->meta), &h.meta_offset, &h.meta_size);
    append(bytes_of(w->tensors.data(), w->tensors.size()), &h.dir_offset, &h.dir_size);
    append(bytes_of(w->crcs.data(), w->crcs.size()), &h.crc_offset, &h.crc_size);
    h.file_size = w->at + tail.size();
    h.tail_crc = crc32c(0, tail.data(), tail.size());
    h.header_crc = crc32c(0, &h, offsetof(file_header, header_crc));
    RS_TRY(write_bytes(w, tail.data(), tail.size()));
    if (pwrite(w->fd, &h, sizeof h, 0) != static_cast<ssize_t>(sizeof h) || fsync(w->fd)) return write_failed(w);
    const int fd = w->fd;
    w->fd = -1;
    if (close(fd)) return write_failed(w);
    if (renameat(w->folder, w->temporary.c_str(), w->folder, name_in_folder(*w))) return write_failed(w, "rename");
    w->finished = true;
    // The rename itself must survive a power cut.  A file system that can't sync a folder is no reason to fail.
    const int folder = openat(w->folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder >= 0) {
      fsync(folder);
      close(folder);
    }
    return RS_OK;
  });
}

// ================================================================================ 15  model

namespace {

rs_status meta_of_kind(const rs_model &m, const char *key, rs_meta_kind kind, rs_meta *out) {
  RS_TRY(rs_model_meta(&m, key, out));
  return out->kind == kind ? RS_OK : bad_file(m, "metadata '%s' is of kind %d, expected %d", key, out->kind, kind);
}

rs_status positive(const rs_model &m, const std::string &key, int32_t *out) {
  rs_meta v;
  RS_TRY(meta_of_kind(m, key.c_str(), RS_META_I64, &v));
  if (v.i64 < 1 || v.i64 > INT32_MAX) return bad_file(m, "metadata '%s' is %lld", key.c_str(), static_cast<long long>(v.i64));
  *out = static_cast<int32_t>(v.i64);
  return RS_OK;
}

const char *optional_str(const rs_model &m, const char *key, const char *otherwise) {
  rs_meta v;
  return meta_of_kind(m, key, RS_META_STR, &v) == RS_OK ? v.str : otherwise;
}

// Hyper-parameters that every family has.
rs_status read_info(rs_model *m) {
  rs_meta v;
  RS_TRY(meta_of_kind(*m, "general.architecture", RS_META_STR, &v));
  m->info.architecture = v.str;
  m->family = rs_family_find(v.str);
  if (!m->family) return rs_fail(RS_ERR_UNSUPPORTED, "%s: architecture '%s' is not known to this library", m->path.c_str(), v.str);
  const rs_status status = m->family->shape(m, &m->shape);
  if (status != RS_OK) return rs_fail(status, "%s: %s", m->path.c_str(), std::string(last_error).c_str());
  const rs_model_shape &shape = m->shape;
  const rs_tower_shape &first = shape.text.hidden ? shape.text : shape.image;
  m->info.dim = shape.dim;
  m->info.layers = first.layers;
  m->info.heads = first.heads;
  m->info.vocab = shape.vocab;
  m->info.position_limit = shape.positions;
  m->info.text_hidden = shape.text.hidden;
  m->info.image_hidden = shape.image.hidden;
  m->info.image_layers = shape.image.layers;
  m->info.logit_scale = shape.logit_scale;
  m->info.logit_bias = shape.logit_bias;
  if (shape.text.hidden) {
    RS_TRY(positive(*m, "encode.max_tokens", &m->info.max_tokens));
    if (m->info.max_tokens > m->info.position_limit)
      return bad_file(*m, "encode.max_tokens is %d, more than the %d positions", m->info.max_tokens, m->info.position_limit);
  }
  if (shape.image.hidden) {
    const rs_status image = rs_image_spec_load(m, &m->image);
    if (image != RS_OK) return rs_fail(image, "%s: %s", m->path.c_str(), std::string(last_error).c_str());
    m->info.image_width = m->image.width();
    m->info.image_height = m->image.height();
    rs_image_shape native;
    RS_TRY(rs_image_get_shape(m, 0, 0, &native));
  }
  m->info.name = optional_str(*m, "general.name", "");
  m->info.weight_type = optional_str(*m, "general.weight_type", "");
  m->info.file_bytes = m->map_bytes;
  for (const rs_tensor_info &t : m->tensors) {
    if (is_input_scale(t.name)) continue;  // no parameter: part of how its weight is stored
    int64_t n = 1;
    for (int i = 0; i < t.rank; i++)
      if (__builtin_mul_overflow(n, t.shape[i], &n)) return bad_file(*m, "tensor '%s' is too large", t.name);
    if (__builtin_add_overflow(m->info.parameters, n, &m->info.parameters)) return bad_file(*m, "too many parameters");
  }
  return RS_OK;
}

rs_status read_encode_settings(rs_model *m) {
  rs_meta v;
  RS_TRY(meta_of_kind(*m, "encode.pooling", RS_META_STR, &v));
  if (rs_pooling_parse(v.str, &m->pooling) != RS_OK || m->pooling == RS_POOL_DEFAULT || m->pooling == RS_POOL_NONE)
    return bad_file(*m, "encode.pooling is '%s'", v.str);
  RS_TRY(meta_of_kind(*m, "encode.normalize", RS_META_BOOL, &v));
  m->normalize = v.boolean;
  rs_meta names, texts;
  if (rs_model_meta(m, "prompt.names", &names) == RS_OK) {
    RS_TRY(meta_of_kind(*m, "prompt.names", RS_META_STRS, &names));
    RS_TRY(meta_of_kind(*m, "prompt.texts", RS_META_STRS, &texts));
    if (names.count != texts.count) return bad_file(*m, "%zu prompt.names, %zu prompt.texts", names.count, texts.count);
    if (rs_model_meta(m, "prompt.default", &v) == RS_OK) {
      RS_TRY(meta_of_kind(*m, "prompt.default", RS_META_STR, &v));
      if (rs_model_prompt(m, v.str, &m->default_prompt) != RS_OK)
        return bad_file(*m, "prompt.default '%s' is not among prompt.names", v.str);
    }
  }
  return RS_OK;
}

// Schedules stored in the file.
rs_status read_drops(rs_model *m) {
  rs_meta names, texts, notes;
  if (rs_model_meta(m, "drop.names", &names) != RS_OK) return RS_OK;
  RS_TRY(meta_of_kind(*m, "drop.names", RS_META_STRS, &names));
  RS_TRY(meta_of_kind(*m, "drop.texts", RS_META_STRS, &texts));
  RS_TRY(meta_of_kind(*m, "drop.notes", RS_META_STRS, &notes));
  if (names.count != texts.count || names.count != notes.count)
    return bad_file(*m, "%zu drop.names, %zu drop.texts, %zu drop.notes", names.count, texts.count, notes.count);
  for (size_t i = 0; i < names.count; i++) {
    const char *name = rs_meta_string(&names, i, nullptr);
    rs_drop *drop;
    rs_status status = rs_drop_parse(rs_meta_string(&texts, i, nullptr), &drop);
    if (status == RS_OK) {
      m->drops.push_back({name, rs_meta_string(&notes, i, nullptr), {drop, rs_drop_free}});
      status = rs_drop_check(m, drop);
    }
    if (status != RS_OK) return bad_file(*m, "drop schedule '%.40s': %s", name, std::string(last_error).c_str());
  }
  return RS_OK;
}

}  // namespace

rs_status rs_image_get_shape(const rs_model *m, int32_t width, int32_t height, rs_image_shape *out) {
  constexpr int32_t most_tokens = 1 << 18;
  if (!m->shape.image.hidden) return rs_fail(RS_ERR_ARGUMENT, "%s: the model takes no images", m->path.c_str());
  if (!width && !height) width = m->image.width(), height = m->image.height();
  const int32_t patch = m->shape.patch;
  if (width < patch || height < patch || width > rs_image_most_side || height > rs_image_most_side)
    return rs_fail(RS_ERR_ARGUMENT, "an image of %dx%d pixels, expected %d (a patch) to %d on each side", width, height, patch,
                   rs_image_most_side);
  const int32_t columns = width / patch, rows = height / patch;
  if (static_cast<int64_t>(columns) * rows > most_tokens - m->shape.prefix)
    return rs_fail(RS_ERR_LIMIT, "an image of %dx%d pixels has %lld patches of %d, the limit is %d", width, height,
                   static_cast<long long>(columns) * rows, patch, most_tokens - m->shape.prefix);
  *out = {width, height, columns, rows, m->shape.prefix, m->shape.prefix + columns * rows};
  return RS_OK;
}

namespace {

// What is added to the tokens of an image of that size, which a graph keeps.
struct image_rows {
  rs_image_shape shape = {};
  rs_image_grid grid = {};
  std::unique_ptr<float, void (*)(void *)> memory{nullptr, std::free};

  rs_status find(const rs_model &m, int32_t width, int32_t height) {
    RS_TRY(rs_image_get_shape(&m, width, height, &shape));
    const size_t floats = static_cast<size_t>(shape.tokens) * static_cast<size_t>(m.shape.image.hidden);
    memory.reset(static_cast<float *>(std::aligned_alloc(align_data, round_up(floats * 4, align_data))));
    if (!memory) return rs_fail(RS_ERR_MEMORY, "no memory for %zu bytes, the positions of an image", floats * 4);
    grid = {shape.columns, shape.rows, memory.get()};
    return m.family->image_rows(&m, shape.columns, shape.rows, memory.get());
  }
};

constexpr const char *head_names[] = {"none", "sequence", "tokens", "spans"};
constexpr const char *head_activation_names[] = {"none", "softmax", "sigmoid"};

// head.* metadata.  A file without them has no head.
rs_status read_head(rs_model *m) {
  rs_meta v;
  if (rs_model_meta(m, "head.labels", &v) != RS_OK) return RS_OK;
  RS_TRY(meta_of_kind(*m, "head.labels", RS_META_STRS, &v));
  if (v.count < 1 || v.count > INT32_MAX / sizeof(float)) return bad_file(*m, "%zu head.labels", v.count);
  m->info.labels = static_cast<int32_t>(v.count);
  m->info.head_activation = v.count == 1 ? RS_HEAD_SIGMOID : RS_HEAD_SOFTMAX;
  if (rs_model_meta(m, "head.type", &v) != RS_OK) return RS_OK;  // an early file: see check_heads
  const auto read = [&](const char *key, const char *const *names, size_t begin, size_t end, size_t *out) -> rs_status {
    RS_TRY(meta_of_kind(*m, key, RS_META_STR, &v));
    for (*out = begin; *out < end; ++*out)
      if (!strcmp(v.str, names[*out])) return RS_OK;
    return bad_file(*m, "%s is '%s'", key, v.str);
  };
  size_t head, activation;
  RS_TRY(read("head.type", head_names, RS_HEAD_SEQUENCE, std::size(head_names), &head));
  RS_TRY(read("head.activation", head_activation_names, 0, std::size(head_activation_names), &activation));
  m->info.head = static_cast<rs_head>(head);
  m->info.head_activation = static_cast<rs_head_activation>(activation);
  if (m->info.head == RS_HEAD_SPANS && m->info.labels != 2)
    return bad_file(*m, "%d head.labels for the beginning and the end of a span", m->info.labels);
  return RS_OK;
}

// Build a whole tower, and what is on top of it, once and throw it away: every shape is then known to fit.
rs_status check_tower(const rs_model &m, rs_tower tower, rs_head head) {
  rs_graph *g;
  RS_TRY(rs_graph_create(&m, &g));
  rs_states states = {};
  rs_image_shape image = {};
  alignas(align_data) static const float unread = 0;  // a graph that does not run reads no positions
  rs_status status = tower == rs_tower::image ? rs_image_get_shape(&m, 0, 0, &image) : RS_OK;
  const rs_image_grid grid = {image.columns, image.rows, &unread};
  if (status == RS_OK) status = m.family->build(&m, g, tower, m.shape.of(tower).layers, nullptr, &grid, &states);
  rs_tensor *logits;
  if (status == RS_OK && head != RS_HEAD_NONE) status = m.family->head(&m, g, head, m.info.labels, states, &logits);
  if (status == RS_OK && m.family->embed)
    if (const rs_tensor *vectors = m.family->embed(&m, g, tower, states); vectors && vectors->shape[1] != m.info.dim)
      status = rs_fail(RS_ERR_FORMAT, "embeddings have %lld dimensions, expected %d", static_cast<long long>(vectors->shape[1]),
                       m.info.dim);
  if (status == RS_OK && g->status != RS_OK) status = rs_fail(g->status, "%s", g->error.c_str());
  rs_graph_free(g);
  return status == RS_OK ? RS_OK : rs_fail(status, "%s: %s", m.path.c_str(), std::string(last_error).c_str());
}

rs_status check_architecture(const rs_model &m, rs_head head) {
  for (const rs_tower tower : {rs_tower::text, rs_tower::image})
    if (m.shape.of(tower).hidden) RS_TRY(check_tower(m, tower, head));
  return RS_OK;
}

// Early files have labels but do not say what of: of texts, unless the weights are not there that this takes.
rs_status check_heads(rs_model *m) {
  if (m->info.head == RS_HEAD_NONE && m->info.labels > 0) {
    for (rs_head head : {RS_HEAD_SEQUENCE, RS_HEAD_TOKENS})
      if (check_architecture(*m, head) == RS_OK) {
        m->info.head = head;
        return RS_OK;
      }
    m->info.labels = 0;
  }
  return check_architecture(*m, m->info.head);
}

rs_status load_tokenizer(rs_model *m) {
  if (!m->shape.text.hidden) return RS_OK;
  const rs_status status = rs_tokenizer_load(m, &m->tokenizer);
  if (status != RS_OK) return rs_fail(status, "%s: %s", m->path.c_str(), std::string(last_error).c_str());
  if (rs_tokenizer_vocab(m->tokenizer) > static_cast<size_t>(m->info.vocab))
    return bad_file(*m, "the tokenizer has %zu tokens, the embedding table %d", rs_tokenizer_vocab(m->tokenizer), m->info.vocab);
  if (m->shape.types && rs_tokenizer_types(m->tokenizer) > m->shape.types)
    return bad_file(*m, "the tokenizer has type ids up to %d, the model %d of them", rs_tokenizer_types(m->tokenizer) - 1,
                    m->shape.types);
  if (rs_tokenizer_special(m->tokenizer, false) >= static_cast<size_t>(m->info.max_tokens))
    return bad_file(*m, "encode.max_tokens %d leaves no room for text", m->info.max_tokens);
  return RS_OK;
}

// Weights go to the device once, whatever number of sessions the model has.
rs_status load_device(rs_model *m, const char *name) {
  device_choice choice;
  RS_TRY(choose_device(name, &choice));
  if (!choice.b) return RS_OK;
  auto d = std::make_shared<device>();
  RS_TRY(d->open(choice));
  for (const rs_tensor_info &t : m->tensors) {
    backend_error error = {};
    const rs_status status = choice.b->add_weight(d->model, &t, &error);
    if (status != RS_OK) return rs_fail(status, "%s: '%s' to %s: %s", m->path.c_str(), t.name, d->name.c_str(), error.text);
  }
  m->device = std::move(d);
  return RS_OK;
}

}  // namespace

rs_status rs_model_load(const char *path, const rs_load_params *params, rs_model **out) {
  return rs_guarded([&] {
    *out = nullptr;
    rs_load_params p;
    RS_TRY(rs_read_params(params, "rs_load_params", &p));
    auto m = std::make_unique<rs_model>();
    m->path = path;
    RS_TRY(map_file(m.get()));
    RS_TRY(read_header(m.get()));
    RS_TRY(read_metadata(m.get()));
    RS_TRY(read_directory(m.get()));
    if (p.check_data) RS_TRY(check_blocks(*m));
    RS_TRY(read_info(m.get()));
    RS_TRY(read_encode_settings(m.get()));
    RS_TRY(read_drops(m.get()));
    RS_TRY(read_head(m.get()));
    RS_TRY(check_heads(m.get()));
    RS_TRY(load_tokenizer(m.get()));
    RS_TRY(load_device(m.get(), p.device));
    *out = m.release();
    return RS_OK;
  });
}

void rs_model_free(rs_model *model) { delete model; }

const char *rs_model_device(const rs_model *m) { return m->device ? m->device->name.c_str() : "cpu"; }

rs_status rs_model_get_info(const rs_model *m, rs_model_info *info) {
  if (info->size < sizeof(uint32_t))
    return rs_fail(RS_ERR_ARGUMENT, "rs_model_info.size is %u: set it to sizeof(rs_model_info)", info->size);
  const uint32_t size = std::min<uint32_t>(info->size, sizeof *info);
  rs_model_info full = m->info;
  full.size = info->size;
  memcpy(info, &full, size);
  return RS_OK;
}

const char *rs_model_label(const rs_model *m, int32_t label) {
  rs_meta labels = {};
  if (label < 0 || label >= m->info.labels || rs_model_meta(m, "head.labels", &labels) != RS_OK) return nullptr;
  return rs_meta_string(&labels, static_cast<size_t>(label), nullptr);
}

const char *rs_head_name(rs_head head) { return head >= RS_HEAD_NONE && head <= RS_HEAD_SPANS ? head_names[head] : "?"; }

const char *rs_head_activation_name(rs_head_activation how) {
  return how >= RS_HEAD_RAW && how <= RS_HEAD_SIGMOID ? head_activation_names[how] : "?";
}

rs_status rs_model_prompt(const rs_model *m, const char *name, const char **text) {
  return rs_guarded([&] {
    rs_meta names = {}, texts = {};
    name_list known;
    if (rs_model_meta(m, "prompt.names", &names) == RS_OK && rs_model_meta(m, "prompt.texts", &texts) == RS_OK)
      for (size_t i = 0; i < names.count; i++) {
        const char *candidate = rs_meta_string(&names, i, nullptr);
        if (!strcmp(candidate, name)) {
          *text = rs_meta_string(&texts, i, nullptr);
          return RS_OK;
        }
        known.add(candidate);
      }
    return rs_fail(RS_ERR_NOT_FOUND, "there is no prompt '%s' (stored: %s)", name, known.text());
  });
}

rs_status rs_model_drop(const rs_model *m, const char *name, const rs_drop **drop, const char **note) {
  return rs_guarded([&] {
    name_list known;
    for (const stored_drop &d : m->drops) {
      if (!strcmp(d.name, name)) {
        *drop = d.drop.get();
        if (note) *note = d.note;
        return RS_OK;
      }
      known.add(d.name);
    }
    return rs_fail(RS_ERR_NOT_FOUND, "there is no drop schedule '%s' (stored: %s)", name, known.text());
  });
}

namespace {
// Of a model that takes images, its schedules are for these.
rs_tower drop_tower(const rs_model &m) { return m.shape.image.hidden ? rs_tower::image : rs_tower::text; }

rs_status resolve_drop(const rs_model &m, const rs_drop &drop, rs_drop_schedule *out) {
  const rs_tower tower = drop_tower(m);
  RS_TRY(rs_drop_resolve(drop, m.shape.of(tower).layers, out));
  if (tower == rs_tower::text)
    return m.shape.drops_texts ? RS_OK : rs_fail(RS_ERR_UNSUPPORTED, "%s: tokens of its texts can't be dropped", m.path.c_str());
  if (drop.protect == RS_PROTECT_NONE && m.shape.prefix)
    return rs_fail(RS_ERR_ARGUMENT, "drop protect none: the tokens before the patches can't be dropped");
  // They are the special tokens of an image; where there is one, its place tells.
  const bool one = m.shape.prefix == 1;
  out->protect = one ? RS_PROTECT_CLS : m.shape.prefix ? RS_PROTECT_SPECIAL : RS_PROTECT_NONE;
  for (rs_drop_schedule::layer &l : out->layers) l.rule.keep_first = one;
  return RS_OK;
}
}  // namespace

rs_status rs_drop_check(const rs_model *m, const rs_drop *drop) {
  return rs_guarded([&] {
    rs_drop d;
    rs_drop_schedule schedule;
    RS_TRY(rs_read_params(drop, "rs_drop", &d));
    return resolve_drop(*m, d, &schedule);
  });
}

const char *rs_drop_warning(const rs_model *m, const rs_drop *drop) {
  const char *warning = nullptr;
  (void)rs_guarded([&] {
    rs_drop d;
    rs_drop_schedule schedule;
    RS_TRY(rs_read_params(drop, "rs_drop", &d));
    RS_TRY(resolve_drop(*m, d, &schedule));
    if (m->family->drop_warning) warning = m->family->drop_warning(schedule);
    return RS_OK;
  });
  return warning;
}

rs_status rs_drop_counts(const rs_model *m, const rs_drop *drop, int32_t tokens, int32_t protect, int32_t *counts) {
  return rs_guarded([&] {
    if (tokens < 0 || protect < 0 || protect > tokens)
      return rs_fail(RS_ERR_ARGUMENT, "%d tokens, %d of them protected", tokens, protect);
    rs_drop d;
    rs_drop_schedule schedule;
    RS_TRY(rs_read_params(drop, "rs_drop", &d));
    RS_TRY(resolve_drop(*m, d, &schedule));
    counts[0] = tokens;
    for (size_t i = 0; i < schedule.layers.size(); i++) counts[i + 1] = drop_layer_count(schedule.layers[i], counts[i], protect);
    return RS_OK;
  });
}

namespace {
constexpr const char *pooling_names[] = {"default", "mean", "cls", "max", "mean_sqrt_len", "weighted_mean", "last", "none"};
}

const char *rs_pooling_name(rs_pooling pooling) {
  return pooling >= RS_POOL_DEFAULT && pooling <= RS_POOL_NONE ? pooling_names[pooling] : "?";
}

rs_status rs_pooling_parse(const char *name, rs_pooling *out) {
  for (int i = RS_POOL_DEFAULT; i <= RS_POOL_NONE; i++)
    if (!strcmp(name, pooling_names[i])) {
      *out = static_cast<rs_pooling>(i);
      return RS_OK;
    }
  return rs_fail(RS_ERR_ARGUMENT, "pooling '%s': expected default, mean, cls, max, mean_sqrt_len, weighted_mean, last or none",
                 name);
}

#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#pragma GCC pop_options
#endif

// ================================================================================ 16  session: texts and images to vectors

namespace {

// rs_encode_params with every default resolved.
struct encode_settings {
  rs_tower tower;
  int32_t image_width, image_height;  // of the image tower
  rs_pooling pooling;                 // RS_POOL_DEFAULT: what the family makes of the states
  bool head;                          // logits instead of states
  bool per_token;                     // a row a token instead of one a sequence
  int32_t width;                      // of a row, before dim cuts it
  bool normalize;
  int32_t max_tokens, chunk_overlap, dim;
  rs_long_text long_text;
  const char *prompt = "";
  int layers;
  const rs_drop *drop;  // nullptr: none; else `drop_fields`
  rs_drop drop_fields;
};

// A graph that ends in the states of one layer, pooled or not, or in the logits of the model's head.
struct encoder_graph {
  rs_tower tower = rs_tower::text;
  int layers;
  rs_pooling pooling;
  bool head = false;
  std::shared_ptr<image_rows> image;    // of the image tower; graphs of one size share it
  std::unique_ptr<rs_owned_drop> drop;  // nullptr: none
  rs_drop_schedule schedule;            // of it
  rs_graph *graph = nullptr;
  rs_tensor *ids, *type_ids, *pixels, *positions, *cu_seqlens, *protect, *result;  // nullptr where the graph has none

  ~encoder_graph() { rs_graph_free(graph); }
  rs_status set(const rs_model &model, const encode_settings &to) {
    tower = to.tower;
    layers = to.layers;
    pooling = to.pooling;
    head = to.head;
    if (tower == rs_tower::image && !image) {
      image = std::make_shared<image_rows>();
      RS_TRY(image->find(model, to.image_width, to.image_height));
    }
    if (!to.drop) return RS_OK;
    RS_TRY(resolve_drop(model, *to.drop, &schedule));
    drop = std::make_unique<rs_owned_drop>(*to.drop);
    return RS_OK;
  }
  // Is it of images of the size that is wanted?
  bool of_size(const encode_settings &wanted) const {
    return image && image->shape.width == wanted.image_width && image->shape.height == wanted.image_height;
  }
  bool is(const encode_settings &wanted) const {
    return tower == wanted.tower && layers == wanted.layers && pooling == wanted.pooling && head == wanted.head &&
           !drop == !wanted.drop && (!drop || rs_drop_same(*drop, *wanted.drop)) && (tower == rs_tower::text || of_size(wanted));
  }
};

// One sequence of the batch that is being packed: a text, a window of one, or an image.
struct window {
  size_t text;  // or image: its index
  int32_t tokens;
  bool first, last;   // of its text
  int32_t kept = 0;   // tokens that the last layer leaves
  bool whole = true;  // no layer drops any of them
};

// Windows that run together: [begin, end) of those that wait, from `token` on; their starts are at cu_seqlens[begin + index].
struct batch_part {
  size_t begin, end;
  int64_t token, tokens;
  int64_t row;  // of `vectors` where its first one goes
};

}  // namespace

// Everything that rs_encode needs from call to call, so that it allocates nothing after warm-up.
struct encoder {
  std::vector<std::unique_ptr<encoder_graph>> graphs;
  rs_tokenizer_scratch_ptr scratch;
  std::string prompted;  // prompt + text
  rs_tokens tokens, pair_tokens, wrapped;
  std::vector<int32_t> ids, type_ids, positions, cu_seqlens, protect;
  std::vector<const float *> images;         // [3, height, width] of each that waits: the caller's, or
  std::vector<std::vector<float>> prepared;  // of those that came as files or RGB; the first n_prepared are in use
  size_t n_prepared = 0;
  std::vector<window> windows;
  std::vector<batch_part> parts;
  std::vector<int64_t> busy;
  std::vector<float> vectors;  // of the windows, before they are joined
  std::vector<float> logits;   // of rs_answer_question
  size_t failed = SIZE_MAX;
};

rs_session::~rs_session() {
  for (const auto &l : lanes)
    if (l->arena) allocator.free(allocator.ctx, l->arena, l->arena_bytes);
}

namespace {

void *default_alloc(void *, size_t bytes, size_t align) { return std::aligned_alloc(align, round_up(bytes, align)); }
void default_free(void *, void *memory, size_t) { std::free(memory); }

// The model's device; of a session without a model, the one that is asked for.
rs_status open_device(rs_session *s, const char *name) {
  std::shared_ptr<const device> on = s->model ? s->model->device : nullptr;
  device_choice choice;
  if (!s->model || name) RS_TRY(choose_device(name, &choice));
  if (s->model && name && choice.name() != rs_model_device(s->model))
    return rs_fail(RS_ERR_ARGUMENT, "device '%s': the model is on %s", name, rs_model_device(s->model));
  if (!s->model) {
    if (choice.b) {
      auto own = std::make_shared<device>();
      RS_TRY(own->open(choice));
      on = std::move(own);
    }
  }
  if (!on) return RS_OK;
  s->device = std::make_unique<device_session>();
  return s->device->open(std::move(on));
}

}  // namespace

[[gnu::cold]] rs_status rs_session_create(const rs_model *model, const rs_session_params *params, rs_session **out) {
  return rs_guarded([&] {
    *out = nullptr;
    rs_session_params p;
    RS_TRY(rs_read_params(params, "rs_session_params", &p));
    if (p.threads < 0 || p.threads > max_threads)
      return rs_fail(RS_ERR_ARGUMENT, "threads is %d, expected 1 to %d, or 0 for all", p.threads, max_threads);
    if (p.max_batch_tokens < 0) return rs_fail(RS_ERR_ARGUMENT, "max_batch_tokens is %d", p.max_batch_tokens);
    if (p.thread_mode < RS_THREADS_AUTO || p.thread_mode > RS_THREADS_THROUGHPUT)
      return rs_fail(RS_ERR_ARGUMENT, "thread_mode is %d", static_cast<int>(p.thread_mode));
    if (p.allocator && (!p.allocator->alloc || !p.allocator->free))
      return rs_fail(RS_ERR_ARGUMENT, "the allocator lacks alloc or free");
    auto s = std::make_unique<rs_session>();
    s->kernels = choose_kernels();
    if (!s->kernels) return RS_ERR_UNSUPPORTED;
    s->model = model;
    s->threads = p.threads ? p.threads : default_threads();
#ifndef _OPENMP
    s->threads = 1;
#endif
    RS_TRY(open_device(s.get(), p.device));
    // A card wants many tokens at once; the cores of a CPU are busy with few.
    s->max_batch_tokens = p.max_batch_tokens ? p.max_batch_tokens : s->device ? 32768 : 1024;
    s->allocator = p.allocator ? *p.allocator : rs_allocator{default_alloc, default_free, nullptr};
    s->profile = p.profile;
    s->thread_mode = s->profile || s->device ? RS_THREADS_LATENCY : p.thread_mode;
    s->lanes.push_back(std::make_unique<lane>());
    if (model) {
      s->encoder = std::make_unique<encoder>();
      s->encoder->scratch = rs_tokenizer_scratch_new();
    }
    *out = s.release();
    return RS_OK;
  });
}

void rs_session_free(rs_session *session) { delete session; }
int32_t rs_session_threads(const rs_session *s) { return s->threads; }
size_t rs_session_arena_bytes(const rs_session *s) {
  size_t bytes = 0;
  for (const auto &l : s->lanes) bytes += l->arena_bytes;
  if (s->device) bytes += s->device->on->choice.b->session_bytes(s->device->session);
  return bytes;
}
size_t rs_encode_failed(const rs_session *s) { return s->encoder ? s->encoder->failed : SIZE_MAX; }

namespace {

// mark(graph) may declare more outputs.
template <class F>
rs_status build_encoder_graph(const rs_model *model, encoder_graph *e, F mark) {
  rs_graph *g = e->graph;
  rs_states states = {};
  RS_TRY(model->family->build(model, g, e->tower, e->layers, e->drop ? &e->schedule : nullptr, e->image ? &e->image->grid : nullptr,
                              &states));
  e->ids = rs_graph_tensor(g, "ids");
  e->type_ids = rs_graph_tensor(g, "type_ids");
  e->pixels = rs_graph_tensor(g, "pixels");
  e->positions = rs_graph_tensor(g, "positions");
  e->cu_seqlens = rs_graph_tensor(g, "cu_seqlens");
  e->protect = rs_graph_tensor(g, "protect");
  rs_tensor *result = states.x;
  if (e->head) RS_TRY(model->family->head(model, g, model->info.head, model->info.labels, states, &result));
  else if (e->pooling == RS_POOL_DEFAULT) result = rs_name(g, model->family->embed(model, g, e->tower, states), "embedding");
  else if (e->pooling != RS_POOL_NONE) {
    const bool patches = e->tower == rs_tower::image && e->pooling != RS_POOL_CLS;
    result = rs_pool(g, states.x, states.cu_seqlens, states.sizes, e->pooling, patches ? model->shape.prefix : 0);
    result = rs_name(g, result, "pooled");
  }
  e->result = rs_output(g, result);
  mark(g);
  return rs_graph_finish(g);
}

rs_status get_encoder_graph(rs_session *s, const encode_settings &set, const encoder_graph **out) {
  auto &graphs = s->encoder->graphs;
  const auto known = std::find_if(graphs.begin(), graphs.end(), [&](const auto &g) { return g->is(set); });
  if (known != graphs.end()) {
    std::rotate(known, known + 1, graphs.end());
    *out = graphs.back().get();
    return RS_OK;
  }
  auto e = std::make_unique<encoder_graph>();
  if (set.tower == rs_tower::image)
    for (const auto &g : graphs)
      if (g->of_size(set)) e->image = g->image;
  RS_TRY(e->set(*s->model, set));
  RS_TRY(rs_graph_create(s->model, &e->graph));
  RS_TRY(build_encoder_graph(s->model, e.get(), [](rs_graph *) {}));
  if (graphs.size() == most_graphs) {
    forget_plans(s, graphs.front()->graph);
    graphs.erase(graphs.begin());
  }
  graphs.push_back(std::move(e));
  *out = graphs.back().get();
  return RS_OK;
}

// For rs_encode_failed.
void forget_failure(const rs_session &s) {
  if (s.encoder) s.encoder->failed = SIZE_MAX;
}

rs_status check_switch(const char *what, rs_tristate value) {
  if (value >= RS_OFF && value <= RS_ON) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s is %d, expected -1 to 1", what, static_cast<int>(value));
}

rs_status resolve(const rs_session &s, const rs_encode_params *params, rs_tower tower, encode_settings *out) {
  if (!s.model) return rs_fail(RS_ERR_ARGUMENT, "the session has no model");
  rs_encode_params p;
  RS_TRY(rs_read_params(params, "rs_encode_params", &p));
  const rs_model &m = *s.model;
  const rs_tower_shape &shape = m.shape.of(tower);
  if (!shape.hidden)
    return rs_fail(RS_ERR_ARGUMENT, "%s: the model takes no %s", m.path.c_str(), tower == rs_tower::text ? "texts" : "images");
  out->tower = tower;
  if (p.pooling < RS_POOL_DEFAULT || p.pooling > RS_POOL_NONE)
    return rs_fail(RS_ERR_ARGUMENT, "pooling is %d", static_cast<int>(p.pooling));
  RS_TRY(check_switch("normalize", p.normalize));
  if (p.long_text < RS_LONG_TRUNCATE || p.long_text > RS_LONG_CHUNK)
    return rs_fail(RS_ERR_ARGUMENT, "long_text is %d", static_cast<int>(p.long_text));
  if (p.max_tokens < 0 || p.max_tokens > m.info.position_limit)
    return rs_fail(RS_ERR_ARGUMENT, "max_tokens is %d, the model has %d positions", p.max_tokens, m.info.position_limit);
  if (p.layer_plus_one < 0 || p.layer_plus_one > shape.layers + 1)
    return rs_fail(RS_ERR_ARGUMENT, "layer_plus_one is %d, the model has %d layers", p.layer_plus_one, shape.layers);
  out->layers = p.layer_plus_one ? p.layer_plus_one - 1 : shape.layers;
  // Where a family makes more of the states than a pooling, that is its own embedding, of the last layer.
  const bool own = p.pooling == RS_POOL_DEFAULT && m.family->embed && out->layers == shape.layers;
  out->pooling = own ? RS_POOL_DEFAULT : p.pooling == RS_POOL_DEFAULT ? m.pooling : p.pooling;
  out->width = own ? m.info.dim : shape.hidden;
  if (p.dim < 0 || p.dim > out->width) return rs_fail(RS_ERR_ARGUMENT, "dim is %d, the model has %d", p.dim, out->width);
  if (out->pooling == RS_POOL_NONE && p.long_text == RS_LONG_CHUNK)
    return rs_fail(RS_ERR_ARGUMENT, "chunks can't be joined without pooling");
  out->normalize = p.normalize == RS_ON || (p.normalize == RS_DEFAULT && (m.normalize || p.dim > 0));
  out->max_tokens = p.max_tokens ? p.max_tokens : m.info.max_tokens;
  out->per_token = out->pooling == RS_POOL_NONE;
  out->dim = p.dim ? p.dim : out->width;
  out->long_text = p.long_text;
  out->prompt = p.prompt ? p.prompt : m.default_prompt;
  if (p.drop && tower != drop_tower(m))
    return rs_fail(RS_ERR_UNSUPPORTED, "%s: tokens of texts can't be dropped in a model that takes images", m.path.c_str());
  if (p.drop) {
    RS_TRY(rs_read_params(p.drop, "rs_drop", &out->drop_fields));
    RS_TRY(rs_drop_check_fields(out->drop_fields));
    out->drop = &out->drop_fields;
  }
  if (tower == rs_tower::image) {
    rs_image_shape image = {};
    RS_TRY(rs_image_get_shape(&m, p.image_width, p.image_height, &image));
    out->image_width = image.width;
    out->image_height = image.height;
    return RS_OK;
  }
  const auto content = out->max_tokens - static_cast<int32_t>(rs_tokenizer_special(m.tokenizer, false));
  if (content < 1) return rs_fail(RS_ERR_ARGUMENT, "max_tokens is %d: no room for text beside the special tokens", out->max_tokens);
  if (p.chunk_overlap < -1 || p.chunk_overlap >= content)
    return rs_fail(RS_ERR_ARGUMENT, "chunk_overlap is %d, expected -1 (none) to %d", p.chunk_overlap, content - 1);
  out->chunk_overlap = p.chunk_overlap == 0 ? content / 8 : std::max(0, p.chunk_overlap);
  return RS_OK;
}

// The same for rs_classify: the head decides what a row is.
rs_status resolve_head(const rs_session &s, const rs_encode_params *params, rs_tower tower, encode_settings *out) {
  rs_encode_params p;
  forget_failure(s);
  RS_TRY(rs_read_params(params, "rs_encode_params", &p));
  if (!p.prompt) p.prompt = "";  // the model's own is for vectors
  RS_TRY(resolve(s, &p, tower, out));
  const rs_model_info &info = s.model->info;
  if (info.head == RS_HEAD_NONE) return rs_fail(RS_ERR_ARGUMENT, "%s: the model has no head", s.model->path.c_str());
  if (out->layers != s.model->shape.of(tower).layers)
    return rs_fail(RS_ERR_ARGUMENT, "layer_plus_one: the head is on the last layer");
  out->head = true;
  out->pooling = RS_POOL_NONE;  // the head's own
  out->per_token = info.head != RS_HEAD_SEQUENCE;
  if (out->per_token) out->drop_fields.mode = RS_DROP_RESTORE;  // a dropped token may still be what is looked for
  out->width = out->dim = info.labels;
  out->normalize = false;
  if (out->per_token && out->long_text == RS_LONG_CHUNK)
    return rs_fail(RS_ERR_ARGUMENT, "windows of a head of %s can't be joined", rs_head_name(info.head));
  return RS_OK;
}

// The tokens of a sequence that never leave, as the input "protect" has them; returns how many these are.  pair: where the second
// text begins, or 0.
int32_t mark_protected(const rs_tokenizer *t, rs_drop_protect protect, const int32_t *ids, size_t pair, size_t n, int32_t *flags) {
  const size_t first = protect == RS_PROTECT_NONE ? 0 : protect == RS_PROTECT_PREFIX && pair ? pair : 1;
  int32_t count = 0;
  for (size_t i = 0; i < n; i++) {
    flags[i] = protect == RS_PROTECT_SPECIAL ? rs_tokenizer_in_template(t, ids[i]) : i < first;
    count += flags[i];
  }
  return count;
}

// The same of an image.
int32_t mark_prefix(const rs_model &m, size_t n, int32_t *flags) {
  for (size_t i = 0; i < n; i++) flags[i] = i < static_cast<size_t>(m.shape.prefix);
  return m.shape.prefix;
}

// Tokens that the last layer of a graph leaves; *whole: no layer drops any.
int32_t kept_tokens(const encoder_graph &g, int32_t protect, int32_t tokens, bool *whole = nullptr) {
  int32_t left = tokens;
  bool all = true;
  for (int i = 0; g.drop && i < g.layers; i++) {
    const int32_t before = left;
    left = drop_layer_count(g.schedule.layers[static_cast<size_t>(i)], left, protect);
    all &= left == before;
  }
  if (whole) *whole = all;
  return g.drop && g.schedule.mode == RS_DROP_RESTORE ? tokens : left;
}

// Sequences as the inputs of an encoder's graph, and where its result goes.
struct packed_sequences {
  int32_t *ids, *type_ids;  // of texts
  float *pixels;            // of images, as rows; nullptr where the run makes them
  int32_t *positions, *cu_seqlens, *protect;
  size_t tokens, sequences;
  float *result;
  size_t floats;
};
// Those that the graph has; returns how many.
size_t bind_packed(const encoder_graph &g, const packed_sequences &p, part_bindings *out) {
  size_t n = 0;
  const auto bind = [&](rs_tensor *t, void *data, size_t bytes) {
    if (t) (*out)[n++] = {t, data, bytes};
  };
  bind(g.ids, p.ids, p.tokens * 4);
  bind(g.type_ids, p.type_ids, p.tokens * 4);
  if (p.pixels) bind(g.pixels, p.pixels, p.tokens * static_cast<size_t>(g.pixels->shape[1]) * 4);
  bind(g.positions, p.positions, p.tokens * 4);
  bind(g.cu_seqlens, p.cu_seqlens, (p.sequences + 1) * 4);
  bind(g.result, p.result, p.floats * 4);
  bind(g.protect, p.protect, p.tokens * 4);
  return n;
}

// The rows of "pixels" of such images.
pixel_rows rows_of(const rs_model &m, const encoder_graph &g, const float *const *images) {
  if (!g.pixels) return {};
  return {g.pixels, g.image->shape, m.shape.patch, images};
}

// The pixels of an image [3, height, width] as the model wants them: the caller's, or `prepared`.
rs_status image_pixels(const rs_model *m, const rs_image_shape &shape, const rs_image &image, std::vector<float> *prepared,
                       const float **pixels, rs_image_info *info) {
  if (image.kind == RS_IMAGE_PIXELS) {
    if (image.width != shape.width || image.height != shape.height)
      return rs_fail(RS_ERR_ARGUMENT, "pixels of %dx%d, expected %dx%d", image.width, image.height, shape.width, shape.height);
    if (!image.data) return rs_fail(RS_ERR_ARGUMENT, "pixels that are not there");
    info->width = image.width, info->height = image.height;
    *pixels = static_cast<const float *>(image.data);
    return RS_OK;
  }
  prepared->resize(3 * static_cast<size_t>(shape.width) * static_cast<size_t>(shape.height));
  int32_t size[2];
  RS_TRY(rs_image_prepare(m, &image, shape.width, shape.height, prepared->data(), prepared->size(), size));
  info->width = size[0], info->height = size[1];
  *pixels = prepared->data();
  return RS_OK;
}

// Packs sequences, runs them in parts of the token budget, and joins the vectors of a text's windows.
class batch {
 public:
  batch(rs_session *session, const encode_settings &settings, float *out, size_t capacity)
      : s(session), e(*session->encoder), set(settings), out(out), capacity(capacity) {
    e.failed = SIZE_MAX;
    // Threads that take parts of their own share a supply of them.  A vector a token would make that large.
    supply = s->thread_mode == RS_THREADS_LATENCY || set.per_token ? s->max_batch_tokens : 4 * s->max_batch_tokens;
    clear();
  }

  rs_status open() {
    RS_TRY(get_encoder_graph(s, set, &graph));
    if (!graph->drop) return RS_OK;
    encode_settings without = set;
    without.drop = nullptr;
    return get_encoder_graph(s, without, &whole_graph);
  }

  // *kept, which may be nullptr, grows by the tokens that the last layer leaves.
  // pair: where the second text of a pair begins, or 0.
  rs_status add(window w, const int32_t *ids, const int32_t *type_ids, size_t pair, int32_t *kept) {
    RS_TRY(make_room(w));
    e.ids.insert(e.ids.end(), ids, ids + w.tokens);
    if (type_ids) e.type_ids.insert(e.type_ids.end(), type_ids, type_ids + w.tokens);
    else e.type_ids.resize(e.ids.size(), 0);
    place(w, pair, kept);
    return RS_OK;
  }
  rs_status add(window w, const rs_tokens &tokens, int32_t *kept) {
    return add(w, tokens.ids.data(), tokens.type_ids.data(), tokens.pair, kept);
  }

  rs_status add_image(size_t image, const rs_image &of, rs_image_info *info) {
    const rs_image_shape &shape = graph->image->shape;
    const window w = {image, shape.tokens, true, true};
    RS_TRY(make_room(w));
    const float *pixels;
    if (e.prepared.size() == e.n_prepared) e.prepared.emplace_back();
    if (const rs_status status = image_pixels(s->model, shape, of, &e.prepared[e.n_prepared], &pixels, info)) {
      e.failed = image;
      return status;
    }
    e.n_prepared += of.kind != RS_IMAGE_PIXELS;
    e.images.push_back(pixels);
    info->tokens = shape.tokens;
    place(w, 0, &info->kept);
    return RS_OK;
  }

  rs_status flush() {
    if (e.windows.empty()) return RS_OK;
    const bool side_by_side = cut_for_throughput();
    if (!side_by_side) cut(s->max_batch_tokens);
    lay_out();
    rs_status status = side_by_side ? run_parts(s, static_cast<int64_t>(e.parts.size()),
                                                [&](int64_t i, part_bindings *b) { return request(static_cast<size_t>(i), b); })
                                    : run_in_turn();
    if (status == RS_ERR_NUMERIC) {  // a score of a token is NaN: once more, each window by itself, to know whose
      cut(1);
      lay_out();
      status = run_in_turn();
    }
    RS_TRY(status);
    const auto width = static_cast<size_t>(set.width);
    size_t row = 0;
    for (const window &w : e.windows) {
      const size_t n = vectors_of(w);
      for (size_t i = 0; i < n; i++) RS_TRY(deliver(w, e.vectors.data() + (row + i) * width));
      row += n;
    }
    clear();
    return RS_OK;
  }

 private:
  void clear() {
    e.ids.clear(), e.type_ids.clear(), e.images.clear(), e.positions.clear(), e.protect.clear(), e.windows.clear();
    e.n_prepared = 0;
  }

  rs_status make_room(const window &w) {
    return !e.windows.empty() && static_cast<int64_t>(e.positions.size()) + w.tokens > supply ? flush() : RS_OK;
  }

  void place(window w, size_t pair, int32_t *kept) {
    const size_t at = e.positions.size();
    for (int32_t i = 0; i < w.tokens; i++) e.positions.push_back(i);
    w.kept = kept_tokens(*graph, protect(at, w.tokens, pair), w.tokens, &w.whole);
    if (kept) *kept += w.kept;
    e.windows.push_back(w);
  }

  // Marks which of the tokens from `at` on may not leave; returns how many these are.
  int32_t protect(size_t at, int32_t tokens, size_t pair) {
    if (!graph->drop) return 0;
    const size_t n = static_cast<size_t>(tokens);
    e.protect.resize(at + n);
    if (graph->tower == rs_tower::image) return mark_prefix(*s->model, n, e.protect.data() + at);
    return mark_protected(s->model->tokenizer, graph->schedule.protect, e.ids.data() + at, pair, n, e.protect.data() + at);
  }

  size_t vectors_of(const window &w) const { return set.per_token ? static_cast<size_t>(w.kept) : 1; }

  // Where the vectors of each part go; returns how many there are.
  size_t place_vectors() {
    size_t row = 0;
    for (batch_part &p : e.parts) {
      p.row = static_cast<int64_t>(row);
      for (size_t i = p.begin; i < p.end; i++) row += vectors_of(e.windows[i]);
    }
    return row;
  }

  // The buffers of all parts.
  void lay_out() {
    e.vectors.resize(place_vectors() * static_cast<size_t>(set.width));
    // Each part has starts of its own, from 0.
    e.cu_seqlens.clear();
    for (const batch_part &p : e.parts) {
      e.cu_seqlens.push_back(0);
      for (size_t i = p.begin; i < p.end; i++) e.cu_seqlens.push_back(e.cu_seqlens.back() + e.windows[i].tokens);
    }
  }

  rs_status run_in_turn() {
    for (size_t i = 0; i < e.parts.size(); i++) {
      part_bindings bindings;
      if (const rs_status status = run_whole(s, request(i, &bindings))) {
        if (status == RS_ERR_NUMERIC && e.parts[i].end - e.parts[i].begin == 1) e.failed = e.windows[e.parts[i].begin].text;
        return status;
      }
    }
    return RS_OK;
  }

  // Parts of at most `most` tokens, or one window.
  void cut(int64_t most) {
    e.parts.clear();
    int64_t token = 0;
    for (size_t i = 0; i < e.windows.size(); i++) {
      const int64_t n = e.windows[i].tokens;
      if (e.parts.empty() || e.parts.back().tokens + n > most) e.parts.push_back({i, i, token, 0, 0});
      e.parts.back().end++;
      e.parts.back().tokens += n;
      token += n;
    }
  }

  // Parts for all threads to take from; false where all threads had better work on one part after the other.
  bool cut_for_throughput() {
    if (s->thread_mode == RS_THREADS_LATENCY) return false;
    // Some parts a thread, so that all end together, neither so small that weights are fetched for little work nor so large that
    // activations leave the cache: that gains even where there is one thread.
    constexpr int64_t least = 64, most = 192;
    const int64_t parts_a_thread = s->threads > 1 ? 4 : 1;
    const auto total = static_cast<int64_t>(e.positions.size());
    const int64_t budget = std::max<int64_t>(1, s->max_batch_tokens / s->threads);
    cut(std::min(budget, std::clamp(ceil_div(total, parts_a_thread * s->threads), least, most)));
    if (s->thread_mode == RS_THREADS_THROUGHPUT) return true;
    // The last thread ends at most one part after the others.  All threads on one part lose a tenth or more to waiting.
    int64_t largest = 0;
    for (const batch_part &p : e.parts) largest = std::max(largest, p.tokens);
    return largest <= budget && 10 * makespan() * s->threads <= 11 * total;
  }

  // Tokens of the busiest thread, when each takes the next part as it becomes free.
  int64_t makespan() {
    e.busy.assign(static_cast<size_t>(s->threads), 0);
    for (const batch_part &p : e.parts) *std::min_element(e.busy.begin(), e.busy.end()) += p.tokens;
    return *std::max_element(e.busy.begin(), e.busy.end());
  }

  // The run of part i; bindings is where its bindings go.
  run_request request(size_t i, part_bindings *bindings) const {
    const batch_part &p = e.parts[i];
    const size_t width = static_cast<size_t>(set.width), n = p.end - p.begin;
    size_t rows = 0;
    bool whole = whole_graph != nullptr;
    for (size_t j = p.begin; j < p.end; j++) {
      rows += vectors_of(e.windows[j]);
      whole &= e.windows[j].whole;
    }
    // Where no token of the part is dropped, there is nothing to score either.
    const encoder_graph &g = whole ? *whole_graph : *graph;
    const size_t bound = bind_packed(
        g,
        {g.ids ? e.ids.data() + p.token : nullptr, g.type_ids ? e.type_ids.data() + p.token : nullptr, nullptr,
         e.positions.data() + p.token, e.cu_seqlens.data() + p.begin + i, g.protect ? e.protect.data() + p.token : nullptr,
         static_cast<size_t>(p.tokens), n, e.vectors.data() + static_cast<size_t>(p.row) * width, rows * width},
        bindings);
    return {g.graph,          p.tokens, static_cast<int64_t>(n),
            bindings->data(), bound,    rows_of(*s->model, g, g.pixels ? e.images.data() + p.begin : nullptr)};
  }

  rs_status deliver(const window &w, const float *x) {
    const auto dim = static_cast<size_t>(set.dim);
    if (written + dim > capacity)
      return rs_fail(RS_ERR_LIMIT, "the output holds %zu floats, %s %zu ends at %zu", capacity,
                     set.tower == rs_tower::text ? "text" : "image", w.text, written + dim);
    float *y = out + written;
    if (w.first && w.last) memcpy(y, x, dim * 4);
    else {
      const auto weight = static_cast<float>(w.tokens);
      for (size_t i = 0; i < dim; i++) y[i] = w.first ? weight * x[i] : y[i] + weight * x[i];
      weights = w.first ? weight : weights + weight;
      if (!w.last) return RS_OK;
      for (size_t i = 0; i < dim; i++) y[i] /= weights;
    }
    if (set.normalize) l2_normalize_row(y, set.dim, y);
    if (!all_finite(y, dim)) {
      e.failed = w.text;
      return rs_fail(RS_ERR_NUMERIC, "the result is NaN or infinite: the weights%s are damaged, or overflow their type",
                     set.tower == rs_tower::image ? " or pixels" : "");
    }
    written += dim;
    return RS_OK;
  }

  rs_session *s;
  encoder &e;
  const encode_settings &set;
  const encoder_graph *graph = nullptr;
  const encoder_graph *whole_graph = nullptr;  // where graph drops tokens: the same without
  int64_t supply;                              // tokens that wait at most
  float *out;
  size_t capacity, written = 0;
  float weights = 0;  // of the windows so far of the text that is being joined
};

rs_status tokenize(rs_session *s, const rs_text &text, rs_tokens *out) {
  out->clear();
  return rs_tokenizer_encode(s->model->tokenizer, s->encoder->scratch.get(), {text.data, text_length(text)}, out);
}

rs_status tokenize_text(rs_session *s, const encode_settings &set, const rs_text &text) {
  encoder &e = *s->encoder;
  const size_t prompt_bytes = strlen(set.prompt);
  if (!prompt_bytes || (!text.data && text.length)) return tokenize(s, text, &e.tokens);
  e.prompted.assign(set.prompt, prompt_bytes);
  if (text.data) e.prompted.append(text.data, text_length(text));
  const rs_status status = tokenize(s, {e.prompted.data(), e.prompted.size()}, &e.tokens);
  if (status == RS_OK) return RS_OK;
  const std::string error = last_error;
  RS_TRY(tokenize(s, text, &e.tokens));  // places in its error are of the text
  return rs_fail(status, "behind the prompt: %s", error.c_str());
}

rs_status too_long(rs_session *s, size_t text, const char *what, size_t tokens, const encode_settings &set) {
  s->encoder->failed = text;
  return rs_fail(RS_ERR_LIMIT, "the %s has %zu tokens, the limit is %d", what, tokens, set.max_tokens);
}

rs_status check_pair_room(const encode_settings &set, size_t special) {
  if (static_cast<size_t>(set.max_tokens) > special) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "max_tokens is %d: no room for a pair beside the special tokens", set.max_tokens);
}

// The sequence of the text in e.tokens and its pair in e.pair_tokens.
rs_status add_pair(rs_session *s, const encode_settings &set, batch *b, size_t text, rs_text_info *info) {
  encoder &e = *s->encoder;
  const size_t special = rs_tokenizer_special(s->model->tokenizer, true), n = e.tokens.ids.size(), m = e.pair_tokens.ids.size();
  size_t first = n, second = m;
  RS_TRY(check_pair_room(set, special));
  rs_cut_pair(&first, &second, static_cast<size_t>(set.max_tokens) - special);
  if (n + m > INT32_MAX - special || (first + second < n + m && set.long_text == RS_LONG_ERROR))
    return too_long(s, text, "pair", n + m + special, set);
  e.wrapped.clear();
  rs_tokenizer_template(s->model->tokenizer, e.tokens, 0, first, &e.pair_tokens, 0, second, &e.wrapped);
  *info = {};
  info->tokens = static_cast<int32_t>(first + second + special);
  info->total = static_cast<int32_t>(n + m + special);
  info->chunks = 1;
  info->truncated = info->tokens < info->total;
  return b->add({text, info->tokens, true, true}, e.wrapped, &info->kept);
}

// The windows of the text in e.tokens.
rs_status add_windows(rs_session *s, const encode_settings &set, batch *b, size_t text, rs_text_info *info) {
  encoder &e = *s->encoder;
  const rs_tokenizer *t = s->model->tokenizer;
  const size_t special = rs_tokenizer_special(t, false), n = e.tokens.ids.size(),
               content = static_cast<size_t>(set.max_tokens) - special;
  if (n > INT32_MAX - special || (n > content && set.long_text == RS_LONG_ERROR))
    return too_long(s, text, "text", n + special, set);
  const bool chunks = n > content && set.long_text == RS_LONG_CHUNK;
  size_t begin = 0;
  info->total = static_cast<int32_t>(n + special);
  info->chunks = info->kept = 0;
  for (bool last = false; !last;) {
    const size_t end = std::min(n, begin + content);
    last = !chunks || end == n;
    e.wrapped.clear();
    rs_tokenizer_template(t, e.tokens, begin, end, nullptr, &e.wrapped);
    RS_TRY(b->add({text, static_cast<int32_t>(e.wrapped.ids.size()), begin == 0, last}, e.wrapped, &info->kept));
    info->chunks++;
    info->tokens = chunks ? info->total : static_cast<int32_t>(e.wrapped.ids.size());
    begin = end - static_cast<size_t>(set.chunk_overlap);
  }
  info->truncated = info->tokens < info->total;
  return RS_OK;
}

rs_status run_images(rs_session *s, const encode_settings &set, const rs_image *images, size_t n, float *out, size_t capacity,
                     rs_image_info *infos) {
  batch b(s, set, out, capacity);
  RS_TRY(b.open());
  for (size_t i = 0; i < n; i++) {
    rs_image_info info = {};
    RS_TRY(b.add_image(i, images[i], &info));
    if (infos) infos[i] = info;
  }
  return b.flush();
}

// Texts, one after the other: tokenized, cut, run.
rs_status run_texts(rs_session *s, const encode_settings &set, const rs_text *texts, const rs_text *pairs, size_t n, float *out,
                    size_t capacity, rs_text_info *infos) {
  encoder &e = *s->encoder;
  batch b(s, set, out, capacity);
  RS_TRY(b.open());
  for (size_t i = 0; i < n; i++) {
    rs_text_info info = {};
    rs_status status = tokenize_text(s, set, texts[i]);
    if (status == RS_OK && pairs) {
      status = tokenize(s, pairs[i], &e.pair_tokens);
      if (status != RS_OK) status = rs_fail(status, "the pair: %s", std::string(last_error).c_str());
    }
    if (status != RS_OK) {
      e.failed = i;
      return status;
    }
    RS_TRY(pairs ? add_pair(s, set, &b, i, &info) : add_windows(s, set, &b, i, &info));
    if (infos) infos[i] = info;
  }
  return b.flush();
}

}  // namespace

rs_status rs_image_prepare(const rs_model *m, const rs_image *image, int32_t width, int32_t height, float *pixels, size_t capacity,
                           int32_t source_size[2]) {
  return rs_guarded([&] {
    rs_image_shape shape = {};
    RS_TRY(rs_image_get_shape(m, width, height, &shape));
    const size_t floats = 3 * static_cast<size_t>(shape.width) * static_cast<size_t>(shape.height);
    if (capacity < floats) return rs_fail(RS_ERR_LIMIT, "the pixels are %zu floats, the output holds %zu", floats, capacity);
    rs_image_spec spec = m->image;
    RS_TRY(rs_image_spec_resize(&spec, shape.width, shape.height));
    rs_rgb decoded;
    const auto *rgb = static_cast<const uint8_t *>(image->data);
    int32_t w = image->width, h = image->height;
    switch (image->kind) {
      case RS_IMAGE_FILE:
        if (!image->data && image->length) return rs_fail(RS_ERR_ARGUMENT, "an image file of %zu bytes at NULL", image->length);
        if (const rs_status status = rs_image_decode(image->data, image->length, 0, &decoded)) {
          // A damaged image is not a damaged weight file.
          const bool of_image = status == RS_ERR_FORMAT || status == RS_ERR_UNSUPPORTED;
          return of_image ? rs_fail(RS_ERR_IMAGE, "%s", std::string(last_error).c_str()) : status;
        }
        rgb = decoded.data.data(), w = decoded.width, h = decoded.height;
        break;
      case RS_IMAGE_RGB:
        if (!rgb || w < 1 || h < 1) return rs_fail(RS_ERR_ARGUMENT, "an image of %dx%d", w, h);
        break;
      default:
        return rs_fail(RS_ERR_ARGUMENT, "image kind %d, expected a file or RGB", static_cast<int>(image->kind));
    }
    if (source_size) source_size[0] = w, source_size[1] = h;
    return rs_image_pixels(spec, rgb, w, h, pixels);
  });
}

rs_status rs_encode_images(rs_session *s, const rs_image *images, size_t n, const rs_encode_params *params, float *out,
                           size_t capacity, rs_image_info *infos) {
  return rs_guarded([&] {
    forget_failure(*s);
    encode_settings set = {};
    RS_TRY(resolve(*s, params, rs_tower::image, &set));
    return run_images(s, set, images, n, out, capacity, infos);
  });
}

rs_status rs_classify_images(rs_session *s, const rs_image *images, size_t n, const rs_encode_params *params, float *logits,
                             size_t capacity, rs_image_info *infos) {
  return rs_guarded([&] {
    encode_settings set = {};
    RS_TRY(resolve_head(*s, params, rs_tower::image, &set));
    return run_images(s, set, images, n, logits, capacity, infos);
  });
}

rs_status rs_encode(rs_session *s, const rs_text *texts, size_t n, const rs_encode_params *params, float *out, size_t capacity,
                    rs_text_info *infos) {
  return rs_guarded([&] {
    forget_failure(*s);
    encode_settings set = {};
    RS_TRY(resolve(*s, params, rs_tower::text, &set));
    return run_texts(s, set, texts, nullptr, n, out, capacity, infos);
  });
}

rs_status rs_classify(rs_session *s, const rs_text *texts, const rs_text *pairs, size_t n, const rs_encode_params *params,
                      float *logits, size_t capacity, rs_text_info *infos) {
  return rs_guarded([&] {
    encode_settings set = {};
    RS_TRY(resolve_head(*s, params, rs_tower::text, &set));
    if (pairs && set.long_text == RS_LONG_CHUNK) return rs_fail(RS_ERR_ARGUMENT, "windows of pairs can't be joined");
    return run_texts(s, set, texts, pairs, n, logits, capacity, infos);
  });
}

void rs_cut_pair(size_t *text, size_t *pair, size_t room) {
  if (*text <= room && *pair <= room - *text) return;
  size_t shorter = std::min(*text, *pair), longer = shorter > room ? shorter : room - shorter;
  if (longer < shorter || shorter > room) {  // both are too long
    shorter = room / 2;
    longer = shorter + room % 2;
  }
  const bool first_longer = *text > *pair;
  *text = first_longer ? longer : shorter;
  *pair = first_longer ? shorter : longer;
}

rs_status rs_encode_ids(rs_session *s, const int32_t *ids, const int32_t *type_ids, const size_t *starts, size_t n,
                        const rs_encode_params *params, float *out, size_t capacity) {
  return rs_guarded([&] {
    forget_failure(*s);
    encode_settings set = {};
    RS_TRY(resolve(*s, params, rs_tower::text, &set));
    batch b(s, set, out, capacity);
    RS_TRY(b.open());
    for (size_t i = 0; i < n; i++) {
      const size_t tokens = starts[i + 1] - starts[i];
      if (starts[i + 1] <= starts[i] || tokens > static_cast<size_t>(s->model->info.position_limit)) {
        s->encoder->failed = i;
        return rs_fail(RS_ERR_LIMIT, "sequence %zu: ids [%zu,%zu), expected 1 to %d", i, starts[i], starts[i + 1],
                       s->model->info.position_limit);
      }
      for (size_t j = starts[i]; j < starts[i + 1]; j++)
        if (ids[j] < 0 || ids[j] >= s->model->info.vocab) {
          s->encoder->failed = i;
          return rs_fail(RS_ERR_ARGUMENT, "sequence %zu: id %d at position %zu, expected 0 to %d", i, ids[j], j - starts[i],
                         s->model->info.vocab - 1);
        }
      const int32_t *types = type_ids ? type_ids + starts[i] : nullptr;
      size_t pair = 0;
      for (size_t j = tokens; types && j-- > 0;) {
        const int32_t known = s->model->shape.types;
        if (known && (types[j] < 0 || types[j] >= known)) {
          s->encoder->failed = i;
          return rs_fail(RS_ERR_ARGUMENT, "sequence %zu: type id %d at position %zu, expected 0 to %d", i, types[j], j, known - 1);
        }
        if (types[j]) pair = j;
      }
      RS_TRY(b.add({i, static_cast<int32_t>(tokens), true, true}, ids + starts[i], types, pair, nullptr));
    }
    return b.flush();
  });
}

#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#pragma GCC push_options
#pragma GCC optimize("Os")
#endif

// ---- plans

namespace {

// Bytes of the results that lie in the arena while operator t runs.
size_t live_bytes(const graph_plan &p, const rs_tensor &t) {
  size_t bytes = 0;
  for (const auto &x : p.graph->tensors) {
    if (p.placed(*x) && !p.in_block(*x) && x->id <= t.id && p.lives_until(*x) >= t.id)
      bytes += round_up(p.bytes[x->id], align_data);
  }
  return bytes;
}

// What a plan comes to, layer by layer: what follows a layer's output, until the next begins, belongs to the layer that drops.
void sum_plan(const graph_plan &p, int layers, rs_plan_layer *out) {
  const rs_tensor *input = rs_graph_tensor(p.graph, "cu_seqlens");
  int layer = 0;
  bool ended = false;  // the layer's output is made
  std::fill(out, out + layers + 1, rs_plan_layer{});
  out[0].tokens = p.tokens(*input);
  for (const op_run &r : p.ops) {
    const std::string &name = r.t->name;
    if (ended && name.rfind("drop.", 0) != 0) layer++, ended = false;
    rs_plan_layer &to = out[std::min(layer, layers)];
    // Operators of a drop are of the tokens before it, or behind it: a layer has those that its first operator has.
    if (!to.macs && r.t->op == OP_LINEAR && r.t->shape[0] == RS_DIM_TOKENS) to.tokens = p.tokens(*r.t);
    if (layer == layers && !to.tokens && r.t->src[0]->shape[0] == RS_DIM_TOKENS) to.tokens = p.tokens(*r.t->src[0]);
    to.bytes = std::max(to.bytes, live_bytes(p, *r.t));
    if (!p.idle(*r.t)) to.macs += op_rows[r.t->op].macs(r).count;
    ended |= name == "blk." + std::to_string(layer) + ".out";
  }
}

}  // namespace

rs_status rs_plan(rs_session *s, const int32_t *lengths, size_t n, const rs_encode_params *params, rs_plan_layer *layers,
                  size_t *arena_bytes) {
  return rs_guarded([&] {
    if (!s->model) return rs_fail(RS_ERR_ARGUMENT, "the session has no model");
    const rs_tower tower = drop_tower(*s->model);
    const int32_t all_layers = s->model->shape.of(tower).layers;
    encode_settings set = {};
    RS_TRY(resolve(*s, params, tower, &set));
    if (set.layers != all_layers) return rs_fail(RS_ERR_ARGUMENT, "a plan is of all layers");
    const encoder_graph *g;
    RS_TRY(get_encoder_graph(s, set, &g));
    std::vector<int32_t> starts = {0}, flags;
    size_t rows = 0;
    for (size_t i = 0; i < n; i++) {
      if (g->pixels && lengths[i] != g->image->shape.tokens)
        return rs_fail(RS_ERR_ARGUMENT, "image %zu: %d tokens, but %dx%d pixels have %d", i, lengths[i], set.image_width,
                       set.image_height, g->image->shape.tokens);
      if (!g->pixels && (lengths[i] < 1 || lengths[i] > s->model->info.position_limit))
        return rs_fail(RS_ERR_LIMIT, "sequence %zu: %d tokens, expected 1 to %d", i, lengths[i], s->model->info.position_limit);
      if (lengths[i] > INT32_MAX - starts.back()) return rs_fail(RS_ERR_LIMIT, "more than %d tokens", INT32_MAX);
      starts.push_back(starts.back() + lengths[i]);
      flags.resize(static_cast<size_t>(starts.back()));
      if (g->pixels) {
        (void)mark_prefix(*s->model, static_cast<size_t>(lengths[i]), flags.data() + starts[i]);
      } else {  // without texts, special tokens are the first and the last
        flags[static_cast<size_t>(starts[i])] = g->schedule.protect != RS_PROTECT_NONE;
        if (g->schedule.protect == RS_PROTECT_SPECIAL) flags.back() = 1;
      }
      const int32_t protect = static_cast<int32_t>(std::count(flags.end() - lengths[i], flags.end(), 1));
      rows += set.pooling == RS_POOL_NONE ? static_cast<size_t>(kept_tokens(*g, protect, lengths[i])) : 1;
    }
    const size_t tokens = flags.size();
    std::vector<int32_t> zeros(tokens);
    std::vector<float> vectors(rows * static_cast<size_t>(set.width));
    part_bindings bindings;
    const size_t bound = bind_packed(
        *g,
        {zeros.data(), zeros.data(), nullptr, zeros.data(), starts.data(), flags.data(), tokens, n, vectors.data(), vectors.size()},
        &bindings);
    lane l;
    graph_plan &p = *plan_of(s, &l, g->graph);
    RS_TRY(make_plan(s, s->threads, p,
                     {g->graph, static_cast<int64_t>(tokens), static_cast<int64_t>(n), bindings.data(), bound,
                      rows_of(*s->model, *g, nullptr)}));  // how many there are counts, not what they are
    place(l, p, nullptr);                                  // multiplications of attention depend on the starts
    sum_plan(p, all_layers, layers);
    *arena_bytes = arena_bytes_of(p, s->threads);
    return RS_OK;
  });
}

// ---- traces

struct rs_trace {
  struct step {
    int32_t layer, kept_count;
    std::vector<int32_t> positions, into;
    std::vector<float> scores;
    std::vector<uint8_t> kept;
  };
  rs_tokens tokens;  // of a text
  size_t n = 0;      // tokens
  size_t pair = 0;   // where it begins
  std::vector<step> steps;
  std::vector<int32_t> kept;
};

namespace {

// A graph of the encoder that keeps what each drop went by, and what it chose.
struct trace_graph {
  struct step {
    int layer;
    bool lowest;  // the score is to be read the other way round
    rs_tensor *score, *kept, *into;
  };
  encoder_graph e;
  std::vector<step> steps;

  rs_status build(const rs_model *model, const encode_settings &set) {
    RS_TRY(e.set(*model, set));
    RS_TRY(rs_graph_create(model, &e.graph));
    return build_encoder_graph(model, &e, [&](rs_graph *g) {
      for (int i = 0; i < e.layers; i++) {
        const std::string name = "drop." + std::to_string(i);
        const auto find = [&](const char *what) { return rs_output(g, rs_graph_tensor(g, (name + what).c_str())); };
        if (rs_tensor *kept = find(".kept")) steps.push_back({i, kept->params.rule.lowest, find(".score"), kept, find(".into")});
      }
    });
  }
};

// What a step of the graph came to, given the position of each row at its level; these then become those of the next level.
void read_step(const trace_graph::step &from, const std::vector<int32_t> &kept, const std::vector<int32_t> &assign,
               std::vector<int32_t> *positions, rs_trace::step *to) {
  const size_t n = positions->size();
  std::vector<int32_t> next(kept.size() / 2);
  for (size_t i = 0; i < next.size(); i++) next[i] = kept[2 * i + 1];
  to->layer = from.layer;
  to->positions = *positions;
  to->kept.resize(n);
  for (size_t i = 0; i < next.size(); i++)
    if (kept[2 * i] >= 0) to->kept[static_cast<size_t>(kept[2 * i])] = 1, to->kept_count++;
  if (from.into && !from.kept->params.rule.fold)
    for (const int32_t row : assign) to->into.push_back(next[static_cast<size_t>(row)]);
  if (from.lowest)
    for (float &score : to->scores) score = -score;
  *positions = std::move(next);
}

// image: its pixels, or nullptr for a text.
rs_status trace_sequence(rs_session *s, const trace_graph &g, const float *image, rs_trace *t) {
  const size_t n = t->n;
  std::vector<int32_t> positions(n), flags(n), starts = {0, static_cast<int32_t>(n)};
  std::iota(positions.begin(), positions.end(), 0);
  int32_t protect = 0;
  if (g.e.pixels) protect = mark_prefix(*s->model, n, flags.data());
  else if (g.e.drop)
    protect = mark_protected(s->model->tokenizer, g.e.schedule.protect, t->tokens.ids.data(), t->tokens.pair, n, flags.data());
  const size_t kept = static_cast<size_t>(kept_tokens(g.e, protect, static_cast<int32_t>(n)));
  std::vector<float> result((g.e.pooling == RS_POOL_NONE ? kept : 1) * static_cast<size_t>(g.e.result->shape[1]));
  part_bindings bound;
  const size_t n_bound = bind_packed(g.e,
                                     {t->tokens.ids.data(), t->tokens.type_ids.data(), nullptr, positions.data(), starts.data(),
                                      flags.data(), n, 1, result.data(), result.size()},
                                     &bound);
  std::vector<rs_binding> bindings(bound.begin(), bound.begin() + static_cast<std::ptrdiff_t>(n_bound));
  std::vector<std::vector<int32_t>> rows(g.steps.size()), assign(g.steps.size());
  t->steps.resize(g.steps.size());
  size_t at = n;
  for (size_t i = 0; i < g.steps.size(); i++) {
    const trace_graph::step &step = g.steps[i];
    const auto left = static_cast<size_t>(
        drop_layer_count(g.e.schedule.layers[static_cast<size_t>(step.layer)], static_cast<int32_t>(at), protect));
    t->steps[i].scores.resize(at);
    rows[i].resize(2 * left);
    assign[i].resize(step.into ? at : 0);
    bindings.push_back({step.score, t->steps[i].scores.data(), at * 4});
    bindings.push_back({step.kept, rows[i].data(), 2 * left * 4});
    if (step.into) bindings.push_back({step.into, assign[i].data(), at * 4});
    at = left;
  }
  const forget_at_end forget(s, g.e.graph);
  RS_TRY(run_whole(s, {g.e.graph, static_cast<int64_t>(n), 1, bindings.data(), bindings.size(), rows_of(*s->model, g.e, &image)}));
  for (size_t i = 0; i < g.steps.size(); i++) read_step(g.steps[i], rows[i], assign[i], &positions, &t->steps[i]);
  t->kept = std::move(positions);
  return RS_OK;
}

}  // namespace

rs_status rs_trace_text(rs_session *s, const rs_text *text, const rs_text *pair, const rs_encode_params *params, rs_trace **out) {
  return rs_guarded([&] {
    *out = nullptr;
    encode_settings set = {};
    RS_TRY(resolve(*s, params, rs_tower::text, &set));
    if (set.long_text == RS_LONG_CHUNK) return rs_fail(RS_ERR_ARGUMENT, "a trace is of one sequence, not of chunks");
    auto t = std::make_unique<rs_trace>();
    encoder &e = *s->encoder;
    RS_TRY(tokenize_text(s, set, *text));
    rs_tokens second;
    if (pair) RS_TRY(rs_tokenizer_encode(s->model->tokenizer, e.scratch.get(), {pair->data, text_length(*pair)}, &second));
    const size_t special = rs_tokenizer_special(s->model->tokenizer, pair != nullptr), n = e.tokens.ids.size() + second.ids.size();
    RS_TRY(check_pair_room(set, special));  // of a single text, resolve has seen to it
    const size_t room = static_cast<size_t>(set.max_tokens) - special;
    if (n > room && set.long_text == RS_LONG_ERROR)
      return rs_fail(RS_ERR_LIMIT, "the text has %zu tokens, the limit is %d", n + special, set.max_tokens);
    size_t first_end = e.tokens.ids.size(), second_end = second.ids.size();
    rs_cut_pair(&first_end, &second_end, room);
    rs_tokenizer_template(s->model->tokenizer, e.tokens, 0, first_end, pair ? &second : nullptr, 0, second_end, &t->tokens);
    t->n = t->tokens.ids.size();
    t->pair = pair ? t->tokens.pair : t->n;
    trace_graph g;
    RS_TRY(g.build(s->model, set));
    RS_TRY(trace_sequence(s, g, nullptr, t.get()));
    *out = t.release();
    return RS_OK;
  });
}

rs_status rs_trace_image(rs_session *s, const rs_image *image, const rs_encode_params *params, rs_trace **out) {
  return rs_guarded([&] {
    *out = nullptr;
    encode_settings set = {};
    RS_TRY(resolve(*s, params, rs_tower::image, &set));
    auto t = std::make_unique<rs_trace>();
    trace_graph g;
    RS_TRY(g.build(s->model, set));
    const rs_image_shape &shape = g.e.image->shape;
    rs_image_info info;
    std::vector<float> prepared;
    const float *pixels;
    RS_TRY(image_pixels(s->model, shape, *image, &prepared, &pixels, &info));
    t->n = t->pair = static_cast<size_t>(shape.tokens);
    RS_TRY(trace_sequence(s, g, pixels, t.get()));
    *out = t.release();
    return RS_OK;
  });
}

void rs_trace_free(rs_trace *t) { delete t; }

size_t rs_trace_tokens(const rs_trace *t, const int32_t **ids, const int32_t **type_ids, const rs_span **spans) {
  const bool text = !t->tokens.ids.empty();
  if (ids) *ids = text ? t->tokens.ids.data() : nullptr;
  if (type_ids) *type_ids = text ? t->tokens.type_ids.data() : nullptr;
  if (spans) *spans = text ? t->tokens.spans.data() : nullptr;
  return t->n;
}

size_t rs_trace_pair(const rs_trace *t) { return t->pair; }

size_t rs_trace_steps(const rs_trace *t) { return t->steps.size(); }

rs_status rs_trace_step_at(const rs_trace *t, size_t i, rs_trace_step *out) {
  if (i >= t->steps.size()) return rs_fail(RS_ERR_ARGUMENT, "step %zu of %zu", i, t->steps.size());
  const rs_trace::step &s = t->steps[i];
  *out = {s.layer,       static_cast<int32_t>(s.positions.size()), s.kept_count, s.positions.data(), s.scores.data(),
          s.kept.data(), s.into.empty() ? nullptr : s.into.data()};
  return RS_OK;
}

size_t rs_trace_kept(const rs_trace *t, const int32_t **positions) {
  if (positions) *positions = t->kept.data();
  return t->kept.size();
}

// ---- answers

namespace {

// A window of the context: its tokens, and where its logits and those of its part of the context begin.
struct answer_window {
  size_t begin, end, row, context_row;
};

struct answer_candidate {
  float logit, score;
  size_t begin, last;  // tokens of the context
};

// Best first; of equal ones the earlier, then the shorter.
bool better(const answer_candidate &a, const answer_candidate &b) {
  return std::tuple(-a.logit, a.begin, a.last) < std::tuple(-b.logit, b.begin, b.last);
}

// The windows of the context in e.pair_tokens beside the question in e.tokens, but for context_row, and how many rows they have.
rs_status cut_context(rs_session *s, const encode_settings &set, int32_t overlap, std::vector<answer_window> *windows,
                      size_t *rows) {
  encoder &e = *s->encoder;
  const size_t n = e.pair_tokens.ids.size(), taken = e.tokens.ids.size() + rs_tokenizer_special(s->model->tokenizer, true);
  e.failed = 0;
  if (taken >= static_cast<size_t>(set.max_tokens))
    return rs_fail(RS_ERR_LIMIT, "the question has %zu tokens, which leaves no room for the context in windows of %d",
                   e.tokens.ids.size(), set.max_tokens);
  const size_t content = static_cast<size_t>(set.max_tokens) - taken;
  size_t shared = overlap < 0 ? 0 : static_cast<size_t>(overlap);
  if (overlap == 0) shared = std::min<size_t>(128, content / 2);
  if (shared >= content)
    return rs_fail(RS_ERR_LIMIT, "overlap is %d, but the question leaves room for %zu tokens of the context in a window", overlap,
                   content);
  e.failed = SIZE_MAX;
  *rows = 0;
  for (size_t begin = 0, end = 0; windows->empty() || end < n; begin = end - shared) {
    end = std::min(n, begin + content);
    windows->push_back({begin, end, *rows, 0});
    *rows += taken + end - begin;
  }
  return RS_OK;
}

// What softmax over the context and the first token divides by, and the largest logit.
struct softmax_sum {
  double most, sum;
  softmax_sum(const float *logits, const answer_window &w) : most(logits[2 * w.row]), sum(0) {
    const size_t rows = w.end - w.begin;
    for (size_t i = 0; i < rows; i++) most = std::max<double>(most, logits[2 * (w.context_row + i)]);
    sum = std::exp(logits[2 * w.row] - most);
    for (size_t i = 0; i < rows; i++) sum += std::exp(logits[2 * (w.context_row + i)] - most);
  }
  double share(float logit) const { return std::exp(logit - most) / sum; }
};

// The best `most` spans of a window, appended.
void answer_spans(const float *logits, const answer_window &w, size_t max_tokens, size_t most, std::vector<answer_candidate> *out) {
  const softmax_sum begins(logits, w), ends(logits + 1, w);
  const auto first = out->size();
  for (size_t i = w.begin; i < w.end; i++)
    for (size_t j = i; j < std::min(w.end, i + max_tokens); j++) {
      const float start = logits[2 * (w.context_row + i - w.begin)], end = logits[2 * (w.context_row + j - w.begin) + 1];
      answer_candidate c = {start + end, 0, i, j};
      const auto heap = out->begin() + static_cast<std::ptrdiff_t>(first);
      if (out->size() - first == most) {
        if (!better(c, *heap)) continue;  // the worst is at the front
        std::pop_heap(heap, out->end(), better);
        out->pop_back();
      }
      c.score = static_cast<float>(begins.share(start) * ends.share(end));
      out->push_back(c);
      std::push_heap(out->begin() + static_cast<std::ptrdiff_t>(first), out->end(), better);
    }
}

// The bytes of the context that a candidate stands for.
rs_span answer_bytes(const rs_model &m, const rs_tokens &context, answer_candidate c, bool whole_words) {
  if (whole_words) {
    while (c.begin > 0 && rs_tokenizer_continues(m.tokenizer, context.ids[c.begin - 1], context.ids[c.begin])) c.begin--;
    while (c.last + 1 < context.ids.size() && rs_tokenizer_continues(m.tokenizer, context.ids[c.last], context.ids[c.last + 1]))
      c.last++;
  }
  return {context.spans[c.begin].begin, context.spans[c.last].end};
}

}  // namespace

rs_status rs_answer_question(rs_session *s, const rs_text *question, const rs_text *context, const rs_answer_params *params,
                             rs_answer *answers, size_t capacity, size_t *n) {
  return rs_guarded([&] {
    rs_answer_params p;
    RS_TRY(rs_read_params(params, "rs_answer_params", &p));
    *n = 0;
    forget_failure(*s);
    auto encode_params = rs_encode_params();
    encode_params.size = sizeof encode_params;
    encode_params.max_tokens = p.max_tokens;
    encode_params.drop = p.drop;
    encode_settings set = {};
    RS_TRY(resolve_head(*s, &encode_params, rs_tower::text, &set));
    const rs_model &m = *s->model;
    if (m.info.head != RS_HEAD_SPANS)
      return rs_fail(RS_ERR_ARGUMENT, "%s: answers need a head of spans, the model's is of %s", m.path.c_str(),
                     rs_head_name(m.info.head));
    if (p.max_answer_tokens < 0) return rs_fail(RS_ERR_ARGUMENT, "max_answer_tokens is %d", p.max_answer_tokens);
    RS_TRY(check_switch("whole_words", p.whole_words));
    if (p.overlap < -1) return rs_fail(RS_ERR_ARGUMENT, "overlap is %d", p.overlap);
    if (!p.max_tokens) set.max_tokens = std::min(set.max_tokens, 384);
    encoder &e = *s->encoder;
    const rs_text *const texts[] = {question, context};
    rs_tokens *const tokens[] = {&e.tokens, &e.pair_tokens};
    for (size_t i = 0; i < 2; i++)
      if (const rs_status status = tokenize(s, *texts[i], tokens[i])) {
        e.failed = i;
        return rs_fail(status, "the %s: %s", i ? "context" : "question", std::string(last_error).c_str());
      }

    std::vector<answer_window> windows;
    size_t rows = 0;
    RS_TRY(cut_context(s, set, p.overlap, &windows, &rows));
    e.logits.resize(2 * rows);
    batch b(s, set, e.logits.data(), e.logits.size());
    RS_TRY(b.open());
    for (answer_window &w : windows) {
      e.wrapped.clear();
      rs_tokenizer_template(m.tokenizer, e.tokens, 0, e.tokens.ids.size(), &e.pair_tokens, w.begin, w.end, &e.wrapped);
      w.context_row = w.row + e.wrapped.pair;
      RS_TRY(b.add({1, static_cast<int32_t>(e.wrapped.ids.size()), true, true}, e.wrapped, nullptr));
    }
    RS_TRY(b.flush());

    // As the pipeline of transformers does it: more than are wanted of each window, since some come to the same words.
    const size_t most = 2 * std::min<size_t>(capacity, INT32_MAX) + 10,
                 longest = p.max_answer_tokens ? static_cast<size_t>(p.max_answer_tokens) : 30;
    std::vector<answer_candidate> candidates;
    float no_logit = INFINITY, no_score = INFINITY;
    for (const answer_window &w : windows) {
      const float *logits = e.logits.data(), *first = logits + 2 * w.row;
      no_logit = std::min(no_logit, first[0] + first[1]);
      no_score = std::min(no_score,
                          static_cast<float>(softmax_sum(logits, w).share(first[0]) * softmax_sum(logits + 1, w).share(first[1])));
      answer_spans(logits, w, longest, most, &candidates);
    }
    const rs_answer nothing = {0, 0, 0, 0, no_logit, no_score, static_cast<int32_t>(windows.size()), static_cast<int32_t>(rows)};
    if (capacity > 0) answers[0] = nothing;
    std::sort(candidates.begin(), candidates.end(), better);
    for (const answer_candidate &c : candidates) {
      if (*n == capacity) break;
      const rs_span bytes = answer_bytes(m, e.pair_tokens, c, p.whole_words != RS_OFF);
      if (std::any_of(answers, answers + *n, [&](const rs_answer &a) { return a.begin == bytes.begin && a.end == bytes.end; }))
        continue;
      rs_answer &answer = answers[(*n)++] = nothing;
      answer.logit = c.logit;
      answer.score = c.score;
      answer.begin = bytes.begin;
      answer.end = bytes.end;
    }
    return RS_OK;
  });
}

rs_status rs_tokenize(const rs_model *model, const rs_text *text, const rs_text *pair, int32_t *ids, int32_t *type_ids,
                      rs_span *spans, size_t capacity, size_t *n) {
  return rs_guarded([&] {
    if (!model->tokenizer) return rs_fail(RS_ERR_ARGUMENT, "%s: the model takes no texts", model->path.c_str());
    const rs_tokenizer_scratch_ptr scratch = rs_tokenizer_scratch_new();
    rs_tokens a, b, all;
    RS_TRY(rs_tokenizer_encode(model->tokenizer, scratch.get(), {text->data, text_length(*text)}, &a));
    if (pair) RS_TRY(rs_tokenizer_encode(model->tokenizer, scratch.get(), {pair->data, text_length(*pair)}, &b));
    rs_tokenizer_template(model->tokenizer, a, 0, a.ids.size(), pair ? &b : nullptr, &all);
    *n = all.ids.size();
    if (*n > capacity && (ids || type_ids || spans))
      return rs_fail(RS_ERR_LIMIT, "the text has %zu tokens, the output holds %zu", *n, capacity);
    if (ids) std::copy(all.ids.begin(), all.ids.end(), ids);
    if (type_ids) std::copy(all.type_ids.begin(), all.type_ids.end(), type_ids);
    if (spans) std::copy(all.spans.begin(), all.spans.end(), spans);
    return RS_OK;
  });
}

const char *rs_token(const rs_model *model, int32_t id) {
  return model->tokenizer ? rs_tokenizer_token(model->tokenizer, id) : nullptr;
}

// ================================================================================ 17  calibration: what the quantizers should know
// of the inputs

// The inputs of linear layers, by the name of the weight.
struct rs_calibration {
  struct layer {
    std::string weight;
    size_t k, stride;            // stride: k rounded up to a panel
    std::vector<float> h;        // [stride, stride] sum of x x^T
    std::vector<float> largest;  // [k] of |x|
    std::vector<float> sample;   // [n, k] every `every`-th row
    size_t seen = 0, every = 1;
  };
  std::vector<layer> layers;
};

namespace {

// At most `sample_rows` of all rows, evenly: where there is no room, every other one goes.
constexpr size_t sample_rows = 256;
void add_to_sample(const value &x, rs_calibration::layer *to) {
  const size_t k = to->k;
  for (int64_t i = 0; i < x.rows; i++) {
    const float *row = reinterpret_cast<const float *>(x.at(i, 0));
    for (size_t j = 0; j < k; j++) to->largest[j] = std::max(to->largest[j], std::fabs(row[j]));
    if (to->seen++ % to->every) continue;
    if (to->sample.size() == sample_rows * k) {
      for (size_t n = 1; n < sample_rows / 2; n++) std::copy_n(to->sample.data() + 2 * n * k, k, to->sample.data() + n * k);
      to->sample.resize(sample_rows / 2 * k);
      to->every *= 2;
      if ((to->seen - 1) % to->every) continue;
    }
    to->sample.resize(to->sample.size() + k);
    std::copy_n(row, k, to->sample.end() - static_cast<std::ptrdiff_t>(k));
  }
}

// h += x^T x, as products of the tile kernel: x transposed times panels of 16 columns of x.
void add_second_moment(const kernel_row &k, const value &x, int threads, rs_calibration::layer *to) {
  const auto rows = static_cast<size_t>(x.rows), columns = to->k;
  const auto *from = reinterpret_cast<const float *>(x.data);
  std::vector<float> transposed(to->stride * rows), panels(to->stride * rows);
  for (size_t i = 0; i < rows; i++)
    for (size_t j = 0; j < columns; j++) {
      const float v = from[i * static_cast<size_t>(x.stride) + j];
      transposed[j * rows + i] = v;
      panels[j / panel_n * rows * panel_n + i * panel_n + j % panel_n] = v;
    }
  run_team(threads, [&](const worker &me) {
    const auto [begin, end] = me.share(static_cast<int64_t>(to->stride / panel_n));
    for (auto p = static_cast<size_t>(begin); p < static_cast<size_t>(end); p++)
      for (size_t j = 0; j < to->stride; j += product_rows)
        k.f32_panels(transposed.data() + j * rows, rows, static_cast<int>(std::min<size_t>(product_rows, to->stride - j)),
                     panels.data() + p * rows * panel_n, 0, 1, rows, to->h.data() + j * to->stride + p * panel_n, to->stride, true);
  });
}

// A graph of the encoder that keeps what goes into every linear layer, and the sequences that wait for it.
struct calibration_graph {
  encoder_graph e;
  std::vector<rs_tensor *> linears;
  size_t first = 0;  // the layer of the calibration that is linears[0]'s
  rs_tokens packed;
  std::vector<float> pixels;
  std::vector<int32_t> positions, starts = {0};

  rs_status build(const rs_model *model, const encode_settings &set, rs_calibration *c) {
    RS_TRY(e.set(*model, set));
    RS_TRY(rs_graph_create(model, &e.graph));
    RS_TRY(build_encoder_graph(model, &e, [&](rs_graph *g) {
      for (const auto &t : g->tensors)
        if (t->kind == tensor_op && t->op == OP_LINEAR) {
          if (t->src[0]->kind == tensor_op) rs_output(g, t->src[0]);
          linears.push_back(t.get());
        }
    }));
    first = c->layers.size();
    for (const rs_tensor *t : linears) {
      const auto k = static_cast<size_t>(t->src[0]->shape[1]), stride = round_up(k, panel_n);
      c->layers.push_back({t->src[1]->name, k, stride, std::vector<float>(stride * stride), std::vector<float>(k), {}});
    }
    return RS_OK;
  }

  void end_sequence(size_t tokens) {
    for (size_t i = 0; i < tokens; i++) positions.push_back(static_cast<int32_t>(i));
    starts.push_back(static_cast<int32_t>(positions.size()));
  }

  // Run what waits, and add up what went into each layer.
  rs_status run(rs_session *s, rs_calibration *c) {
    const size_t tokens = positions.size(), sequences = starts.size() - 1;
    if (!tokens) return RS_OK;
    std::vector<float> result((e.pooling == RS_POOL_NONE ? tokens : sequences) * static_cast<size_t>(e.result->shape[1]));
    part_bindings bound;
    const size_t n_bound = bind_packed(e,
                                       {packed.ids.data(), packed.type_ids.data(), pixels.data(), positions.data(), starts.data(),
                                        nullptr, tokens, sequences, result.data(), result.size()},
                                       &bound);
    std::vector<rs_binding> bindings(bound.begin(), bound.begin() + static_cast<std::ptrdiff_t>(n_bound));
    std::vector<std::vector<float>> inputs;
    std::vector<const float *> from;
    for (const rs_tensor *t : linears) {
      if (t->src[0]->kind != tensor_op) {
        from.push_back(pixels.data());
        continue;
      }
      const int64_t rows = t->src[0]->shape[0] == RS_DIM_SEQUENCES ? static_cast<int64_t>(sequences) : static_cast<int64_t>(tokens);
      inputs.emplace_back(static_cast<size_t>(rows * t->src[0]->shape[1]));
      from.push_back(inputs.back().data());
      const auto same = std::find_if(bindings.begin(), bindings.end(), [&](const rs_binding &b) { return b.tensor == t->src[0]; });
      if (same != bindings.end()) from.back() = static_cast<const float *>(same->data);
      else bindings.push_back({t->src[0], inputs.back().data(), inputs.back().size() * 4});
    }
    RS_TRY(
        rs_graph_run(s, e.graph, static_cast<int64_t>(tokens), static_cast<int64_t>(sequences), bindings.data(), bindings.size()));
    for (size_t i = 0; i < linears.size(); i++) {
      const rs_tensor &x = *linears[i]->src[0];
      const int64_t rows = x.shape[0] == RS_DIM_SEQUENCES ? static_cast<int64_t>(sequences) : static_cast<int64_t>(tokens);
      char *data = const_cast<char *>(reinterpret_cast<const char *>(from[i]));  // read only
      const value inputs_of = {data, rows, x.shape[1], x.shape[1], 4};
      add_second_moment(*s->kernels, inputs_of, s->threads, &c->layers[first + i]);
      add_to_sample(inputs_of, &c->layers[first + i]);
    }
    packed.clear();
    pixels.clear();
    positions.clear();
    starts.assign(1, 0);
    return RS_OK;
  }
};

// The texts, then `random` sequences of 8, 16 … 512 tokens of the vocabulary, as long as the model takes them.
rs_status calibrate_texts(rs_session *s, const rs_text *texts, size_t n, size_t random, rs_calibration *c) {
  encode_settings set = {};
  RS_TRY(resolve(*s, nullptr, rs_tower::text, &set));
  calibration_graph g;
  RS_TRY(g.build(s->model, set, c));
  const forget_at_end forget(s, g.e.graph);
  const size_t special = rs_tokenizer_special(s->model->tokenizer, false), content = static_cast<size_t>(set.max_tokens) - special,
               longest = static_cast<size_t>(s->model->info.position_limit) - special;
  encoder &e = *s->encoder;
  const auto add = [&](size_t tokens) {
    rs_tokenizer_template(s->model->tokenizer, e.tokens, 0, tokens, nullptr, &g.packed);
    g.end_sequence(g.packed.ids.size() - g.positions.size());
    return static_cast<int64_t>(g.positions.size()) >= s->max_batch_tokens ? g.run(s, c) : RS_OK;
  };
  for (size_t i = 0; i < n; i++) {
    if (const rs_status status = tokenize_text(s, set, texts[i])) {
      e.failed = i;
      return status;
    }
    RS_TRY(add(std::min(e.tokens.ids.size(), content)));
  }
  const auto vocab = static_cast<uint64_t>(rs_tokenizer_vocab(s->model->tokenizer));
  uint64_t drawn = 0;
  for (size_t i = 0; i < random; i++) {
    const size_t tokens = std::min<size_t>(8u << i % 7, longest);
    e.tokens.clear();
    e.tokens.ids.resize(tokens);
    e.tokens.spans.resize(tokens);
    for (int32_t &id : e.tokens.ids) id = static_cast<int32_t>(mix_bits(drawn++) % vocab);
    RS_TRY(add(tokens));
  }
  return g.run(s, c);
}

rs_status calibrate_images(rs_session *s, const rs_image *images, size_t n, rs_calibration *c) {
  encode_settings set = {};
  RS_TRY(resolve(*s, nullptr, rs_tower::image, &set));
  calibration_graph g;
  RS_TRY(g.build(s->model, set, c));
  const forget_at_end forget(s, g.e.graph);
  const rs_image_shape &shape = g.e.image->shape;
  const auto tokens = static_cast<size_t>(shape.tokens), row = static_cast<size_t>(g.e.pixels->shape[1]);
  std::vector<float> prepared;
  for (size_t i = 0; i < n; i++) {
    const float *pixels;
    rs_image_info info;
    if (const rs_status status = image_pixels(s->model, shape, images[i], &prepared, &pixels, &info)) {
      s->encoder->failed = i;
      return status;
    }
    g.pixels.resize((g.positions.size() + tokens) * row);
    rows_of(*s->model, g.e, &pixels).write(0, shape.tokens, g.pixels.data() + g.positions.size() * row);
    g.end_sequence(tokens);
    if (static_cast<int64_t>(g.positions.size()) >= s->max_batch_tokens) RS_TRY(g.run(s, c));
  }
  return g.run(s, c);
}

// ---- a scale of inputs: x's channel j times f[j], w's by 1 / f[j] (SmoothQuant: Xiao et al., arXiv 2211.10438)
//
// A row of x has 255 steps.  The few channels that are large in every row of a transformer leave as few as ten of them to the
// others; a row of w, which has about as many, has no such channels.  f[j] = w_j^(1-a) / x_j^a, with w_j and x_j the largest of
// their channel, shares out what is uneven between the two.  Which a is best, and whether any is, the layer's own error tells: of
// some of its outputs, on some of its inputs, both rounded as they will be.

struct scale_search {
  const rs_calibration::layer &l;
  const rs_type type;
  const kernel_row *const kernels = choose_kernels();
  const size_t k = l.k, rows = l.sample.size() / k;
  size_t n = 0;                // channels that are looked at
  std::vector<float> w;        // [n, k] of theirs
  std::vector<float> exact;    // [rows, n]
  std::vector<float> largest;  // [k] of |w|, of all channels

  scale_search(const rs_calibration::layer &layer, rs_type to, size_t channels, const float *weights)
      : l(layer), type(to), largest(layer.k) {
    constexpr size_t most = 128;
    for (size_t i = 0; i < channels; i++) {
      const float *row = weights + i * k;
      for (size_t j = 0; j < k; j++) largest[j] = std::max(largest[j], std::fabs(row[j]));
      if (i % ceil_div(channels, most)) continue;
      w.resize(++n * k);
      std::copy_n(row, k, w.end() - static_cast<std::ptrdiff_t>(k));
    }
  }

  // y [rows, n] = x w^T
  rs_status product(const float *x, const float *weights, std::vector<float> *y) const {
    const int64_t shape[] = {static_cast<int64_t>(n), static_cast<int64_t>(k)};
    const matrix m = {n, k};
    std::vector<float> panels(m.np() * m.kp());
    RS_TRY(encode(RS_F32, RS_PANELS, 2, shape, weights, nullptr, panels.data(), panels.size() * sizeof(float)));
    y->assign(rows * m.np(), 0);
    for (size_t i = 0; i < rows; i += product_rows)
      kernels->f32_panels(x + i * k, k, static_cast<int>(std::min<size_t>(product_rows, rows - i)), panels.data(), panel_n * m.kp(),
                          static_cast<int>(m.np() / panel_n), k, y->data() + i * m.np(), m.np(), false);
    return RS_OK;
  }

  rs_status error_of(const std::vector<float> &f, double *out) const {
    const int64_t shape[] = {static_cast<int64_t>(n), static_cast<int64_t>(k)};
    std::vector<float> weights(n * k), x(rows * k), y;
    for (size_t i = 0; i < n * k; i++) weights[i] = w[i] / f[i % k];
    size_t bytes;
    RS_TRY(rs_tensor_bytes(type, RS_PANELS, 2, shape, &bytes));
    std::vector<char> encoded(bytes);
    RS_TRY(encode(type, RS_PANELS, 2, shape, weights.data(), nullptr, encoded.data(), bytes));
    RS_TRY(rs_tensor_decode(type, RS_PANELS, 2, shape, encoded.data(), weights.data(), weights.size()));
    std::vector<uint8_t> q(k);
    for (size_t i = 0; i < rows; i++) {
      const row_quant rq = quantize_row_scalar(l.sample.data() + i * k, f.data(), k, k, q.data());
      for (size_t j = 0; j < k; j++) x[i * k + j] = static_cast<float>(q[j] - rq.zero) * rq.scale;
    }
    RS_TRY(product(x.data(), weights.data(), &y));
    *out = 0;
    for (size_t i = 0; i < y.size(); i++) *out += (double(y[i]) - exact[i]) * (double(y[i]) - exact[i]);
    return RS_OK;
  }

  std::vector<float> factors(double a) const {
    std::vector<float> f(k);
    double mean = 0;  // of logarithms
    for (size_t j = 0; j < k; j++)
      if (l.largest[j] > 0 && largest[j] > 0) {
        const double log = (1 - a) * std::log(double(largest[j])) - a * std::log(double(l.largest[j]));
        mean += log / static_cast<double>(k);
        f[j] = static_cast<float>(log);
      }
    for (size_t j = 0; j < k; j++) f[j] = l.largest[j] > 0 && largest[j] > 0 ? static_cast<float>(std::exp(f[j] - mean)) : 1;
    return f;
  }

  // All 1 where it would not make the error a good deal smaller.
  rs_status best(std::vector<float> *out) {
    constexpr double worth = 0.8;
    out->assign(k, 1);
    if (!kernels) return RS_ERR_UNSUPPORTED;
    RS_TRY(product(l.sample.data(), w.data(), &exact));
    double least, error;
    RS_TRY(error_of(*out, &least));
    least *= worth;
    for (int eighths = 2; eighths <= 7; eighths++) {
      std::vector<float> f = factors(eighths / 8.0);
      RS_TRY(error_of(f, &error));
      if (error < least) least = error, *out = std::move(f);
    }
    return RS_OK;
  }
};

}  // namespace

rs_status rs_calibrate(rs_session *s, const rs_text *texts, size_t n_texts, size_t n_random, const rs_image *images,
                       size_t n_images, rs_calibration **out) {
  return rs_guarded([&] {
    *out = nullptr;
    forget_failure(*s);
    auto c = std::make_unique<rs_calibration>();
    if (n_texts || n_random) RS_TRY(calibrate_texts(s, texts, n_texts, n_random, c.get()));
    if (n_images) RS_TRY(calibrate_images(s, images, n_images, c.get()));
    *out = c.release();
    return RS_OK;
  });
}

void rs_calibration_free(rs_calibration *c) { delete c; }

rs_status rs_tensor_encode_calibrated(const rs_calibration *c, const char *name, rs_type type, rs_layout layout, int rank,
                                      const int64_t *shape, const float *src, void *dst, size_t capacity, float *input_scale) {
  return rs_guarded([&] {
    const rs_calibration::layer *layer = nullptr;
    for (const rs_calibration::layer &l : c->layers)
      if (l.weight == name) layer = &l;
    size_t bytes;
    RS_TRY(rs_tensor_bytes(type, layout, rank, shape, &bytes));
    if (input_scale && rank == 2) std::fill_n(input_scale, shape[1], 1.0f);
    if (!layer || !is_quantized(type)) return encode(type, layout, rank, shape, src, nullptr, dst, capacity);
    if (rank != 2 || shape[1] != static_cast<int64_t>(layer->k))
      return rs_fail(RS_ERR_ARGUMENT, "'%s': shape %s, calibrated with %zu inputs", name, shape_text(rank, shape).c_str(),
                     layer->k);
    const size_t k = layer->k, n = static_cast<size_t>(shape[0]);
    rounding r;
    std::vector<float> f, h = layer->h, w(src, src + n * k);
    f.assign(k, 1);
    if (input_scale) RS_TRY(scale_search(*layer, type, n, src).best(&f));
    for (size_t i = 0; i < k; i++)
      for (size_t j = 0; j < k; j++) h[i * layer->stride + j] *= f[i] * f[j];
    for (size_t i = 0; i < n * k; i++) w[i] /= f[i % k];
    RS_TRY(make_rounding(h.data(), k, layer->stride, &r));
    RS_TRY(encode(type, layout, rank, shape, w.data(), &r, dst, capacity));
    if (input_scale) std::copy(f.begin(), f.end(), input_scale);
    return RS_OK;
  });
}

#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#pragma GCC pop_options
#endif

#endif  // RS_VECTOR_PART
