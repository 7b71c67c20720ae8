#include "pareto.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

static double quality_of(const tradeoff &t) { return std::isnan(t.quality) ? -std::numeric_limits<double>::infinity() : t.quality; }

static double cost_of(const tradeoff &t) { return std::isnan(t.cost) ? std::numeric_limits<double>::infinity() : t.cost; }

// The front of those of `among`: what is dearer must be better than all before it.
static std::vector<size_t> front_of(const std::vector<tradeoff> &all, std::vector<size_t> among) {
  std::stable_sort(among.begin(), among.end(), [&](size_t a, size_t b) {
    if (cost_of(all[a]) != cost_of(all[b])) return cost_of(all[a]) < cost_of(all[b]);
    return quality_of(all[a]) > quality_of(all[b]);
  });
  std::vector<size_t> front;
  for (size_t i : among)
    if (front.empty() || quality_of(all[i]) > quality_of(all[front.back()])) front.push_back(i);
  return front;
}

std::vector<size_t> pareto_front(const std::vector<tradeoff> &all) {
  std::vector<size_t> among(all.size());
  std::iota(among.begin(), among.end(), size_t(0));
  return front_of(all, among);
}

std::vector<size_t> pareto_ranks(const std::vector<tradeoff> &all) {
  std::vector<size_t> ranks(all.size()), left(all.size());
  std::iota(left.begin(), left.end(), size_t(0));
  for (size_t rank = 0; !left.empty(); ++rank) {
    std::vector<size_t> others = left;
    for (size_t i : front_of(all, left)) {
      ranks[i] = rank;
      others.erase(std::find(others.begin(), others.end(), i));
    }
    left = std::move(others);
  }
  return ranks;
}
