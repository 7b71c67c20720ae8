#include "op_times.h"

#include "table.h"

#include <algorithm>
#include <cstring>

const std::vector<std::string> op_groupings = {"op", "layer", "each"};

// Weights a call; of each row the input, of 8 bits or of floats, and the result, of 16 bits or more.
static double linear_bytes(const rs_model *model, const rs_profile_row &row) {
  rs_tensor_info weight;
  if (strcmp(row.op, "linear") != 0 || rs_model_tensor(model, (std::string(row.name) + ".weight").c_str(), &weight) != RS_OK)
    return 0;
  const double input = weight.type == RS_W8 || weight.type == RS_W4 ? 1 : 4, result = 2;
  return double(row.calls) * double(weight.bytes) + row.macs * (input / double(weight.shape[0]) + result / double(weight.shape[1]));
}

std::vector<op_time> op_times(const rs_session *session, const rs_model *model) {
  std::vector<op_time> times;
  for (size_t i = 0; i < rs_session_profile_count(session); ++i) {
    rs_profile_row row;
    check(rs_session_profile_at(session, i, &row));
    times.push_back({row.op, row.name, row.type, row.calls, row.seconds, row.macs, linear_bytes(model, row)});
  }
  return times;
}

std::vector<op_time> op_times_since(const rs_session *session, const rs_model *model, const std::vector<op_time> &earlier) {
  std::vector<op_time> times = op_times(session, model);
  for (size_t i = 0; i < earlier.size(); ++i) {  // rows keep their place
    times[i].calls -= earlier[i].calls;
    times[i].seconds -= earlier[i].seconds;
    times[i].macs -= earlier[i].macs;
    times[i].bytes -= earlier[i].bytes;
  }
  return times;
}

peak_rates::peak_rates(const rs_model *model, int threads) : threads_(threads) {
  check(rs_device_get_info(rs_model_device(model), &device));
}

double peak_rates::of(rs_type type) {
  auto known = rates_.find(type);
  if (known != rates_.end()) return known->second;
  double rate = 0;
  check(rs_measure_peak(type, threads_, &rate));
  return rates_[type] = rate;
}

double peak_rates::least(const op_time &time) {
  if (!(time.macs > 0)) return 0;
  if (!on_card()) return time.macs / of(time.type);
  const bool linear = time.op == "linear";
  const double rate = linear && (time.type == RS_W8 || time.type == RS_W4) ? device.int8_macs
                      : linear                                             ? device.f16_macs / 3  // h h, h l, l h of bf16
                                                                           : device.f16_macs;
  if (!(rate > 0)) return 0;
  return std::max(time.macs / rate, device.bytes_per_second > 0 ? time.bytes / device.bytes_per_second : 0);
}

std::string peak_rates::str() const {
  std::string text;
  if (on_card()) {
    const auto rate = [](double value, double unit) { return value > 0 ? format("%.1f", value / unit) : "-"; };
    return format(
        "peaks by the clocks that the card states: int8 %s, f16 %s TMAC/s (floats: three products in bf16), memory %s GB/s\n",
        rate(device.int8_macs, 1e12).c_str(), rate(device.f16_macs, 1e12).c_str(), rate(device.bytes_per_second, 1e9).c_str());
  }
  for (const auto &[type, rate] : rates_)
    text += join(text.empty() ? "peak measured now: " : ", ", rs_type_name(type), format(" %.1f", rate / 1e9));
  if (text.empty()) return text;
  return text + join(" GMAC/s (", rs_isa(), ", ", threads_, threads_ == 1 ? " thread)\n" : " threads)\n");
}

namespace {

struct op_sum {
  std::string op, name;
  double calls = 0, seconds = 0, macs = 0;
  double least = 0;  // seconds that the arithmetic takes at its peak

  void add(const op_time &time, uint64_t runs, peak_rates *peaks) {
    calls += double(time.calls) / double(runs);
    seconds += time.seconds / double(runs);
    macs += time.macs / double(runs);
    least += peaks->least(time) / double(runs);
  }
  bool has_rate() const { return macs > 0 && seconds > 0; }
  bool has_share() const { return has_rate() && least > 0; }
  double share_of(double all) const { return all > 0 ? seconds / all : 0; }
};

// "blk.3.attn.qkv" of all layers becomes one name.
std::string layer_name(const std::string &name) {
  std::string result;
  for (char c : name) {
    bool digit = c >= '0' && c <= '9';
    if (!digit) result += c;
    else if (result.empty() || result.back() != '*') result += '*';
  }
  return result;
}

std::vector<op_sum> grouped(const std::vector<op_time> &times, const std::string &grouping, uint64_t runs, peak_rates *peaks) {
  std::vector<op_sum> sums;
  std::map<std::pair<std::string, std::string>, size_t> places;
  for (const op_time &time : times) {
    std::string name = grouping == "each" ? time.name : grouping == "layer" ? layer_name(time.name) : "";
    auto [place, added] = places.try_emplace({time.op, name}, sums.size());
    if (added) sums.push_back({time.op, name});
    sums[place->second].add(time, runs, peaks);
  }
  std::stable_sort(sums.begin(), sums.end(), [](const op_sum &a, const op_sum &b) { return a.seconds > b.seconds; });
  return sums;
}

op_sum total_of(const std::vector<op_time> &times, uint64_t runs, peak_rates *peaks) {
  op_sum total;
  total.op = "total";
  for (const op_time &time : times) total.add(time, runs, peaks);
  return total;
}

}  // namespace

std::string op_table(const std::vector<op_time> &times, const std::string &grouping, uint64_t runs, peak_rates *peaks) {
  std::vector<op_sum> lines = grouped(times, grouping, runs, peaks);
  lines.push_back(total_of(times, runs, peaks));
  double all = lines.back().seconds;
  std::vector<std::string> head = {"operator", "calls", "ms", "of time", "GMAC/s", "of peak"};
  bool named = grouping != "op";
  if (named) head.insert(head.begin() + 1, "result");
  text_table table(head);
  for (const op_sum &line : lines) {
    const bool with_another = peaks->on_card() && line.seconds == 0;  // a step of what that does
    std::vector<std::string> row = {line.op,
                                    format("%.0f", line.calls),
                                    with_another ? "with another" : format("%.3f", 1e3 * line.seconds),
                                    with_another ? "" : format("%.1f %%", 100 * line.share_of(all)),
                                    line.has_rate() ? format("%.1f", line.macs / line.seconds / 1e9) : "",
                                    line.has_share()  ? format("%.1f %%", 100 * line.least / line.seconds)
                                    : line.has_rate() ? "-"
                                                      : ""};
    if (named) row.insert(row.begin() + 1, line.name);
    table.add(row);
  }
  return table.str();
}

nlohmann::ordered_json op_json(const std::vector<op_time> &times, const std::string &grouping, uint64_t runs, peak_rates *peaks) {
  double all = total_of(times, runs, peaks).seconds;
  auto rows = nlohmann::ordered_json::array();
  for (const op_sum &sum : grouped(times, grouping, runs, peaks)) {
    nlohmann::ordered_json row = {{"op", sum.op}};
    if (grouping != "op") row["name"] = sum.name;
    row["calls"] = sum.calls;
    row["ms"] = 1e3 * sum.seconds;
    row["share"] = sum.share_of(all);
    row["gmacs_per_second"] = nullptr;
    row["share_of_peak"] = nullptr;
    if (sum.has_rate()) {
      row["gmacs_per_second"] = sum.macs / sum.seconds / 1e9;
      if (sum.has_share()) row["share_of_peak"] = sum.least / sum.seconds;
    }
    if (peaks->on_card()) row["with_another"] = sum.seconds == 0;
    rows.push_back(row);
  }
  return rows;
}
