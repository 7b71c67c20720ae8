// Graphs in tests: a session on a row of kernels of choice, weights, inputs, and runs that look for writes out of bounds.
#pragma once
#include "../rs.h"
#include "test_util.h"

#include <cmath>
#include <memory>
#include <random>

using vec = std::vector<float>;

inline vec normal(size_t n, unsigned seed, float sigma = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> d(0, sigma);
  vec v(n);
  for (float &x : v) x = d(rng);
  return v;
}

inline std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (size_t i = 0; rs_isa_available(i); i++) names.push_back(rs_isa_available(i));
  return names;
}

// A session on a row of kernels of choice.
struct session {
  rs_session *s = nullptr;
  explicit session(const std::string &isa = "", int threads = 2, bool profile = false) {
    setenv("RS_ISA", isa.c_str(), 1);
    rs_session_params p = {};
    p.size = sizeof p;
    p.threads = threads;
    p.profile = profile;
    EXPECT_EQ(rs_session_create(nullptr, &p, &s), RS_OK) << rs_last_error();
    unsetenv("RS_ISA");
  }
  ~session() { rs_session_free(s); }
};

// A weight encoded into aligned memory that lives as long as the test.
struct aligned {
  void *p;
  explicit aligned(size_t bytes) : p(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {}
  ~aligned() { std::free(p); }
  aligned(const aligned &) = delete;
};

// A graph with one or more inputs, and the values to bind.
struct harness {
  rs_graph *g = nullptr;
  std::vector<std::unique_ptr<aligned>> weights;
  std::vector<rs_binding> bindings;
  std::vector<std::unique_ptr<std::vector<char>>> memory;

  explicit harness(const rs_model *model = nullptr) { EXPECT_EQ(rs_graph_create(model, &g), RS_OK); }
  ~harness() { rs_graph_free(g); }

  rs_tensor *weight(const char *name, rs_type type, rs_layout layout, std::vector<int64_t> shape, const vec &values) {
    size_t bytes = 0;
    EXPECT_EQ(rs_tensor_bytes(type, layout, static_cast<int>(shape.size()), shape.data(), &bytes), RS_OK) << rs_last_error();
    weights.push_back(std::make_unique<aligned>(bytes));
    EXPECT_EQ(rs_tensor_encode(type, layout, static_cast<int>(shape.size()), shape.data(), values.data(), weights.back()->p, bytes),
              RS_OK)
        << rs_last_error();
    return rs_constant(g, name, type, layout, static_cast<int>(shape.size()), shape.data(), weights.back()->p);
  }
  template <class T>
  rs_tensor *input(const char *name, rs_type type, std::vector<int64_t> shape, const std::vector<T> &values) {
    rs_tensor *t = rs_input(g, name, type, static_cast<int>(shape.size()), shape.data());
    memory.push_back(std::make_unique<std::vector<char>>(values.size() * sizeof(T)));
    if (!values.empty()) memcpy(memory.back()->data(), values.data(), values.size() * sizeof(T));
    bindings.push_back({t, memory.back()->data(), memory.back()->size()});
    return t;
  }
  // Run and return the output [floats].  Sentinels around it must survive.
  vec run(rs_session *s, rs_tensor *out, int64_t tokens, int64_t sequences, size_t floats) {
    rs_output(g, out);
    EXPECT_EQ(rs_graph_finish(g), RS_OK) << rs_last_error();
    return again(s, out, tokens, sequences, floats);
  }
  vec again(rs_session *s, rs_tensor *out, int64_t tokens, int64_t sequences, size_t floats) {
    vec y(floats + 32, 1234.5f);
    std::vector<rs_binding> all = bindings;
    all.push_back({out, y.data() + 16, floats * 4});
    EXPECT_EQ(rs_graph_run(s, g, tokens, sequences, all.data(), all.size()), RS_OK) << rs_last_error();
    for (size_t i = 0; i < 16; i++) {
      EXPECT_EQ(y[i], 1234.5f) << "written before the output";
      EXPECT_EQ(y[floats + 16 + i], 1234.5f) << "written behind the output";
    }
    return {y.begin() + 16, y.end() - 16};
  }
};

// Every element within `tolerance`; NaN is not.
inline void expect_close(const vec &got, const vec &wanted, float tolerance) {
  ASSERT_EQ(got.size(), wanted.size());
  for (size_t i = 0; i < got.size(); i++)
    ASSERT_TRUE(std::fabs(got[i] - wanted[i]) <= tolerance) << "at " << i << ": " << got[i] << ", expected " << wanted[i];
}
