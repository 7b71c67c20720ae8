// What rs tune has found so far, a JSON line each, so that a run that was cut off goes on where it was.
//
//   {"rs tune": 1, "settings": {…}}
//   {"file": 0, "rung": 1, "drop": "ratios=…", "quality": 0.98…}
#pragma once
#include "common.h"
#include "json.h"

#include <map>
#include <tuple>

class tune_journal {
 public:
  enum class policy {
    automatic,  // go on where the settings are the same, else begin anew
    resume,     // other settings are an error
    anew
  };
  // Creates the file, or takes what it holds.  A line that is not whole, or not as this class writes it, ends what is taken: it
  // goes, with all behind it.  Throws failure for a file that is no such journal, or that another process writes.
  tune_journal(const std::string &path, const nlohmann::ordered_json &settings, policy how);
  ~tune_journal();
  tune_journal(const tune_journal &) = delete;
  tune_journal &operator=(const tune_journal &) = delete;

  const double *find(size_t file, size_t rung, const std::string &drop) const;
  void add(size_t file, size_t rung, const std::string &drop, double quality);  // NaN: not defined

  size_t taken() const { return taken_; }            // lines that were there
  const std::string &note() const { return note_; }  // for the user: why something was not taken; or empty
  const nlohmann::ordered_json &settings() const {
    return settings_;
  }  // as stored: they may know more than those that were asked for

 private:
  using key = std::tuple<size_t, size_t, std::string>;
  size_t read(const std::string &content, policy how);  // bytes that count
  bool take(const std::string &line);
  void append(const nlohmann::ordered_json &object);

  std::string path_;
  nlohmann::ordered_json settings_;
  std::map<key, double> known_;
  size_t taken_ = 0;
  std::string note_;
  int fd_ = -1;
};

// Hashes: of a file or of what a task reads of a folder (names too; of images, all of them), and of the tensors and metadata of a
// model, stored schedules apart.
std::string hash_of_data(const std::string &path, bool of_images = false);
std::string hash_of_model(const rs_model *model);
