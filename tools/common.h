// What every subcommand needs: errors, owned handles, files read whole, text for people.
#pragma once
#include "../rs.h"

#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

// ---------------------------------------------------------------------------------------------- errors
// The program throws; main() turns that into one line and an exit status.

struct failure : std::runtime_error {  // exit status 1
  using std::runtime_error::runtime_error;
};
struct usage_failure : failure {  // exit status 2
  using failure::failure;
};
struct closed_pipe : failure {  // standard output has no reader any more: exit status 1, and nothing to say
  using failure::failure;
};

// As what a part is joined: literals of all lengths alike, and numbers of all sizes, so that the functions below are few.  One for
// each combination of types would be 3 % of the program.
template <class T>
using piece = std::conditional_t<std::is_convertible_v<const T &, const char *>, const char *,
                                 std::conditional_t<std::is_integral_v<T> && (sizeof(T) > 1),
                                                    std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>, const T &>>;
template <class... P>
std::string join_pieces(P... pieces) {
  std::ostringstream text;
  (text << ... << pieces);
  return text.str();
}
template <class Failure, class... P>
[[noreturn]] void fail_with(P... pieces) {
  throw Failure(join_pieces<P...>(pieces...));
}

// "a", 1, "b" -> "a1b"
template <class... T>
[[gnu::always_inline]] inline std::string join(const T &...parts) {
  return join_pieces<piece<T>...>(parts...);
}
template <class... T>
[[noreturn, gnu::always_inline]] inline void fail(const T &...parts) {
  fail_with<failure, piece<T>...>(parts...);
}
template <class... T>
[[noreturn, gnu::always_inline]] inline void fail_usage(const T &...parts) {
  fail_with<usage_failure, piece<T>...>(parts...);
}
// "cannot open 'x': No such file or directory", from errno.
[[noreturn]] void fail_errno(const char *action, const std::string &path);
// rs_last_error() of a library call that did not succeed.
void check(rs_status status);

// "rs: <message>" on standard error; control characters are escaped, so that it stays one line whatever a file put into it.
void say(const std::string &message);
// A name from a file or a user, in quotes, escaped and cut to a readable length.
std::string in_quotes(std::string_view name);

// ---------------------------------------------------------------------------------------------- handles

template <auto release>
struct releaser {
  template <class T>
  void operator()(T *handle) const {
    release(handle);
  }
};
using model_ptr = std::unique_ptr<rs_model, releaser<rs_model_free>>;
using session_ptr = std::unique_ptr<rs_session, releaser<rs_session_free>>;
using writer_ptr = std::unique_ptr<rs_writer, releaser<rs_writer_free>>;
using calibration_ptr = std::unique_ptr<rs_calibration, releaser<rs_calibration_free>>;

// A parameter struct of rs.h with `size` set and defaults for the rest.
template <class T>
T sized() {
  T params{};
  params.size = sizeof params;
  return params;
}

// device: as rs_load_params.device.
model_ptr load_model(const std::string &path, bool check_data, const char *device = nullptr);
session_ptr create_session(const rs_model *model, int threads, bool profile, rs_thread_mode mode = RS_THREADS_AUTO);
writer_ptr open_writer(const std::string &path);
rs_model_info model_info(const rs_model *model);
bool find_meta(const rs_model *model, const char *key, rs_meta *meta);  // false when the file has no such key
std::vector<std::string> strings_of(const rs_meta &meta);
inline rs_text view_of(const std::string &text) { return {text.data(), text.size()}; }

// ---------------------------------------------------------------------------------------------- files, numbers

std::string read_file(const std::string &path, size_t limit);  // "-" stands for standard input

std::string format(const char *pattern, ...) __attribute__((format(printf, 1, 2)));
std::string one_line(const std::string &text, size_t characters);  // its beginning, without control characters
std::string human_bytes(double bytes);                             // "21.4 MiB"
std::string human_duration(double seconds);                        // "1:07", "2:05:59"
double seconds_now();                                              // of a clock that never jumps
// The most memory that was ever resident; nothing where the system does not tell.  (getrusage would count what this process was
// before it became rs.)
std::optional<size_t> peak_resident_bytes();
double cosine(const float *a, const float *b, size_t n);
