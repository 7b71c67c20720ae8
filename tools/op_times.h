// Where the time of a session went, operator by operator, beside what this machine could do at most: the tables of rs bench and of
// rs embed --profile.
#pragma once
#include "common.h"

#include <nlohmann/json.hpp>

#include <map>

// A row of rs_session_profile_at that outlives the session.
struct op_time {
  std::string op;    // "linear"
  std::string name;  // of the result: "blk.0.attn.qkv"
  rs_type type;      // whose arithmetic it is
  uint64_t calls;
  double seconds, macs;
};
std::vector<op_time> op_times(const rs_session *session);
// What came after an earlier look at the same session.
std::vector<op_time> op_times_since(const rs_session *session, const std::vector<op_time> &earlier);

// rs_measure_peak, once for each type that is asked for.
class peak_rates {
 public:
  explicit peak_rates(int threads) : threads_(threads) {}
  double of(rs_type type);  // multiply-accumulates a second
  std::string str() const;  // a line of all that were asked for; empty when none was

 private:
  int threads_;
  std::map<rs_type, double> rates_;
};

extern const std::vector<std::string> op_groupings;  // "op", "layer" (the same result in all layers), "each"

// All numbers are of one run of `runs`; the most time first, a line of totals last.
std::string op_table(const std::vector<op_time> &times, const std::string &grouping, uint64_t runs, peak_rates *peaks);
nlohmann::ordered_json op_json(const std::vector<op_time> &times, const std::string &grouping, uint64_t runs, peak_rates *peaks);
