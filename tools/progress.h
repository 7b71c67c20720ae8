// One line on a terminal's standard error that says how far the work is.
#pragma once
#include "common.h"

#include <sys/stat.h>
#include <unistd.h>

class progress {
 public:
  explicit progress(bool wanted) : wanted_(wanted && isatty(STDERR_FILENO)), begin_(seconds_now()) {}
  ~progress() { clear(); }
  progress(const progress &) = delete;
  progress &operator=(const progress &) = delete;

  // Not where the results are printed themselves: both would mix.
  static bool wanted_beside(int output) {
    struct stat out {
    }, err{};
    return !isatty(output) || fstat(output, &out) != 0 || fstat(STDERR_FILENO, &err) != 0 || out.st_rdev != err.st_rdev;
  }

  double elapsed() const { return seconds_now() - begin_; }

  // done and total in any unit; total 0 when it is not known.
  void update(double done, double total, const std::string &detail) {
    if (!wanted_) return;
    double now = seconds_now();
    if (now - drawn_ < 0.1) return;
    drawn_ = now;
    std::string line = "\r\033[K" + (total > 0 ? bar(done / total) + " " : std::string()) + detail;
    if (total > 0 && done > 0 && elapsed() > 1) line += ", " + human_duration(elapsed() * (total - done) / done) + " left";
    show(line);
  }

  // Before anything else is printed.
  void clear() {
    if (drawn_ > 0) show("\r\033[K");
    drawn_ = 0;
  }

 private:
  static std::string bar(double share) {
    constexpr int width = 24;
    share = share < 0 ? 0 : share > 1 ? 1 : share;
    int full = int(share * width);
    return format("%3.0f%% [", 100 * share) + std::string(size_t(full), '=') + std::string(size_t(width - full), ' ') + "]";
  }

  static void show(const std::string &text) {
    ssize_t ignored = write(STDERR_FILENO, text.data(), text.size());
    (void)ignored;
  }

  bool wanted_;
  double begin_, drawn_ = 0;
};
