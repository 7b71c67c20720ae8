// Choices between two goods: which of them are worth a look.
#pragma once
#include <cstddef>
#include <vector>

struct tradeoff {
  double quality;  // the higher the better; NaN is worse than any number
  double cost;     // the lower the better
};

// Those that no other one beats: at least as good and as cheap, and better in one.  By rising cost; of equal ones only the first.
std::vector<size_t> pareto_front(const std::vector<tradeoff> &all);

// 0 for the front, 1 for the front of all others, and so on.
std::vector<size_t> pareto_ranks(const std::vector<tradeoff> &all);
