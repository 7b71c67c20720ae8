// Columns of text, the first to the left and the others to the right.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

class text_table {
 public:
  explicit text_table(std::vector<std::string> head) { add(std::move(head)); }
  void add(std::vector<std::string> row) {
    widths_.resize(std::max(widths_.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths_[i] = std::max(widths_[i], row[i].size());
    rows_.push_back(std::move(row));
  }
  std::string str() const {
    std::string text;
    for (const auto &row : rows_) {
      std::string line;
      for (size_t i = 0; i < row.size(); ++i) {
        std::string fill(widths_[i] - row[i].size(), ' ');
        line += (i > 0 ? "  " : "") + (i > 0 ? fill + row[i] : row[i] + fill);
      }
      line.erase(line.find_last_not_of(' ') + 1);
      text += line + "\n";
    }
    return text;
  }

 private:
  std::vector<std::vector<std::string>> rows_;
  std::vector<size_t> widths_;
};
