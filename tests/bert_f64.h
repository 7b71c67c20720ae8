// BERT as it is written down, in f64, for the small models of tiny_bert.h.
#pragma once
#include "tiny_bert.h"

#include <algorithm>
#include <cmath>
#include <functional>

inline double activation_f64(const std::string &name, double x) {
  if (name == "gelu") return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
  if (name == "gelu_new") return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  if (name == "relu") return std::max(x, 0.0);
  if (name == "silu") return x / (1 + std::exp(-x));
  if (name == "tanh") return std::tanh(x);
  return x / (1 + std::exp(-1.702 * x));  // quick_gelu
}

using matrix64 = std::vector<std::vector<double>>;

// What one layer did: its input, what attention adds, what that comes to, what the MLP adds, its output, [n, C] each; and the
// attention matrix of each head, [n, n].
struct layer_f64 {
  matrix64 x, attn, h, mlp, y;
  std::vector<matrix64> p;
};
// Goes behind each layer: may change the states that the next one gets, and how many tokens each stands for.
using layer_hook = std::function<void(int64_t layer, const layer_f64 &did, matrix64 *x, std::vector<double> *sizes)>;

// Last states [n, C] of the model for one sequence.
inline matrix64 bert_f64(tiny_bert &m, const std::vector<int32_t> &ids, const std::vector<int32_t> &types,
                         const layer_hook &hook = {}) {
  const auto w = [&](const std::string &name) -> const std::vector<float> & { return m.weights.at(m.prefix + name); };
  const size_t c = static_cast<size_t>(m.hidden), d = c / static_cast<size_t>(m.heads);
  const auto norm = [&](std::vector<double> v, const std::string &name) {
    double mean = 0, var = 0;
    for (double x : v) mean += x / static_cast<double>(c);
    for (double x : v) var += (x - mean) * (x - mean) / static_cast<double>(c);
    for (size_t i = 0; i < c; i++) v[i] = (v[i] - mean) / std::sqrt(var + m.eps) * w(name + ".weight")[i] + w(name + ".bias")[i];
    return v;
  };
  const auto dense = [&](const std::vector<double> &x, const std::string &name) {
    const std::vector<float> &weight = w(name + ".weight"), &bias = w(name + ".bias");
    std::vector<double> y(bias.begin(), bias.end());
    for (size_t i = 0; i < y.size(); i++)
      for (size_t j = 0; j < x.size(); j++) y[i] += double(weight[i * x.size() + j]) * x[j];
    return y;
  };
  const auto plus = [](std::vector<double> a, const std::vector<double> &b) {
    for (size_t i = 0; i < a.size(); i++) a[i] += b[i];
    return a;
  };
  matrix64 x;
  for (size_t i = 0; i < ids.size(); i++) {
    std::vector<double> v(c);
    for (size_t j = 0; j < c; j++)
      v[j] = double(w("embeddings.word_embeddings.weight")[static_cast<size_t>(ids[i]) * c + j]) +
             w("embeddings.position_embeddings.weight")[i * c + j] +
             w("embeddings.token_type_embeddings.weight")[static_cast<size_t>(types[i]) * c + j];
    x.push_back(norm(v, "embeddings.LayerNorm"));
  }
  std::vector<double> sizes(x.size(), 1);
  for (int64_t l = 0; l < m.layers; l++) {
    const std::string at = "encoder.layer." + std::to_string(l) + ".";
    const size_t n = x.size();
    matrix64 q, k, v;
    layer_f64 did;
    did.x = x;
    did.p.assign(static_cast<size_t>(m.heads), {});
    for (const auto &row : x) {
      q.push_back(dense(row, at + "attention.self.query"));
      k.push_back(dense(row, at + "attention.self.key"));
      v.push_back(dense(row, at + "attention.self.value"));
    }
    for (size_t i = 0; i < n; i++) {
      std::vector<double> mixed(c);
      for (size_t h = 0; h < static_cast<size_t>(m.heads); h++) {
        std::vector<double> p(n);
        double sum = 0;
        for (size_t j = 0; j < n; j++) {
          for (size_t e = h * d; e < (h + 1) * d; e++) p[j] += q[i][e] * k[j][e] / std::sqrt(static_cast<double>(d));
          sum += p[j] = sizes[j] * std::exp(p[j]);
        }
        for (double &share : p) share /= sum;
        for (size_t j = 0; j < n; j++)
          for (size_t e = h * d; e < (h + 1) * d; e++) mixed[e] += p[j] * v[j][e];
        did.p[h].push_back(p);
      }
      did.attn.push_back(dense(mixed, at + "attention.output.dense"));
      did.h.push_back(norm(plus(did.attn[i], x[i]), at + "attention.output.LayerNorm"));
      std::vector<double> up = dense(did.h[i], at + "intermediate.dense");
      for (double &u : up) u = activation_f64(m.act, u);
      did.mlp.push_back(dense(up, at + "output.dense"));
      did.y.push_back(norm(plus(did.mlp[i], did.h[i]), at + "output.LayerNorm"));
    }
    x = did.y;
    if (hook) hook(l, did, &x, &sizes);
  }
  return x;
}
