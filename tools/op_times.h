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
  double bytes;  // of a linear layer: that it reads and writes at least; 0 of all else
};
std::vector<op_time> op_times(const rs_session *session, const rs_model *model);
// What came after an earlier look at the same session.
std::vector<op_time> op_times_since(const rs_session *session, const rs_model *model, const std::vector<op_time> &earlier);

// What the machine could do at most where a model runs.  On the CPU: rs_measure_peak, once for each type that is asked for; on a
// card what that states, of arithmetic and memory.
class peak_rates {
 public:
  peak_rates(const rs_model *model, int threads);
  bool on_card() const { return device.memory_bytes > 0; }
  double least(const op_time &time);  // seconds; 0: nothing is multiplied, or the card's peaks are not known
  std::string str() const;            // a line of all that were asked for; empty when none was

  rs_device_info device = sized<rs_device_info>();

 private:
  double of(rs_type type);  // multiply-accumulates a second
  int threads_;
  std::map<rs_type, double> rates_;
};

extern const std::vector<std::string> op_groupings;  // "op", "layer" (the same result in all layers), "each"

// All numbers are of one run of `runs`; the most time first, a line of totals last.
std::string op_table(const std::vector<op_time> &times, const std::string &grouping, uint64_t runs, peak_rates *peaks);
nlohmann::ordered_json op_json(const std::vector<op_time> &times, const std::string &grouping, uint64_t runs, peak_rates *peaks);
