// What the tests share: where the data is, a temporary folder, running a program, reading .npy.
// Everything that may be absent is reported as "" or false, so that a test can GTEST_SKIP() with a line that says what it lacks.
#pragma once
#include <gtest/gtest.h>

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

// The larger (smaller) one, and NaN for good where one was: a maximum of errors passes over none.
inline double larger_or_nan(double a, double b) { return std::isnan(a) || b <= a ? a : b; }
inline double smaller_or_nan(double a, double b) { return std::isnan(a) || b >= a ? a : b; }

// CTest sets the RS_… variables.  The definitions come from the build, so that a test can also be started by hand.
#ifndef RS_DEFAULT_SOURCE_DIR
#define RS_DEFAULT_SOURCE_DIR ""
#define RS_DEFAULT_PROGRAM ""
#define RS_DEFAULT_TEST_MODELS ""
#define RS_DEFAULT_TEST_MODEL_DIR ""
#endif

// ------------------------------------------------------------------------------------------------ where things are

inline std::string env_or(const char *name, const std::string &fallback) {
  const char *value = std::getenv(name);
  return value && *value ? value : fallback;
}

inline bool file_exists(const std::string &path) {
  std::error_code ignored;
  return !path.empty() && std::filesystem::exists(path, ignored);
}

inline std::string path_if_exists(const std::string &path) { return file_exists(path) ? path : ""; }

// The root of the repository.
inline std::string source_dir() { return env_or("RS_SOURCE_DIR", RS_DEFAULT_SOURCE_DIR); }

// Reference data: $RS_SHARED, else ../shared beside the repository; "" when there is none.
inline std::string shared_dir() { return path_if_exists(env_or("RS_SHARED", source_dir() + "/../shared")); }

// A file of it, "" when absent: shared_file("golden/wordpiece.jsonl").
inline std::string shared_file(const std::string &name) {
  return shared_dir().empty() ? "" : path_if_exists(shared_dir() + "/" + name);
}

// The program rs.
inline std::string program() { return env_or("RS_PROGRAM", RS_DEFAULT_PROGRAM); }

// all-MiniLM-L6-v2 converted to "f32", "f16", "q8" or "q4"; "" when it could not be had.
inline std::string model_path(const std::string &type) {
  return path_if_exists(env_or("RS_TEST_MODELS", RS_DEFAULT_TEST_MODELS) + "/minilm-" + type + ".rsw");
}

// Its published weights, as a folder; "" when they could not be had.
inline std::string model_dir() {
  const std::string dir = env_or("RS_TEST_MODEL_DIR", RS_DEFAULT_TEST_MODEL_DIR);
  return file_exists(dir + "/model.safetensors") ? dir : "";
}

// At the head of a test that needs data.
#define RS_NEED_SHARED(name) \
  if (shared_file(name).empty()) GTEST_SKIP() << "needs " << (name) << " in $RS_SHARED or ../shared, which is not there"
#define RS_NEED_MODEL(type) \
  if (model_path(type).empty()) GTEST_SKIP() << "needs all-MiniLM-L6-v2 as " << (type) << ", which could not be fetched"
#define RS_NEED_MODEL_DIR() \
  if (model_dir().empty()) GTEST_SKIP() << "needs the weights of all-MiniLM-L6-v2, which could not be fetched"

// ------------------------------------------------------------------------------------------------ files

inline std::string read_file(const std::string &path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << "cannot read " << path;
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

inline void write_file(const std::string &path, std::string_view bytes) {
  std::ofstream out(path, std::ios::binary);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  out.close();
  EXPECT_TRUE(out.good()) << "cannot write " << path;
}

// A new empty folder that goes, with all that is in it, at the end of the scope.
class temp_dir {
 public:
  temp_dir() : path_(std::filesystem::temp_directory_path().string() + "/rs-test-XXXXXX") {
    if (!mkdtemp(path_.data())) ADD_FAILURE() << "cannot make " << path_ << ": " << std::strerror(errno);
  }
  ~temp_dir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  temp_dir(const temp_dir &) = delete;
  temp_dir &operator=(const temp_dir &) = delete;

  const std::string &path() const { return path_; }
  std::string operator/(const std::string &name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// A little-endian float32 array in C order, as numpy.save writes it.  A file that is anything else fails the test and gives {}.
inline std::vector<float> read_npy_f32(const std::string &path, std::vector<int64_t> *shape) {
  const std::string file = read_file(path);
  shape->clear();
  const auto fail = [&](const char *what) {
    ADD_FAILURE() << path << ": " << what;
    shape->clear();
    return std::vector<float>();
  };
  const auto byte = [&](size_t i) { return static_cast<size_t>(static_cast<unsigned char>(file[i])); };
  if (file.size() < 12 || file.compare(0, 6, "\x93NUMPY") != 0) return fail("not a .npy file");
  // The length of the header takes two bytes in version 1 and four after that.
  size_t begin = 10, length = byte(8) | byte(9) << 8;
  if (byte(6) > 1) begin = 12, length |= byte(10) << 16 | byte(11) << 24;
  if (length > file.size() - begin) return fail("truncated header");
  const std::string header = file.substr(begin, length);
  if (header.find("'<f4'") == std::string::npos) return fail("not little-endian float32");
  if (header.find("'fortran_order': False") == std::string::npos) return fail("not in C order");
  size_t at = header.find("'shape': (");
  if (at == std::string::npos) return fail("no shape");
  size_t count = 1;
  const char *p = header.c_str() + at + std::strlen("'shape': (");
  while (*p && *p != ')') {
    char *end = nullptr;
    const long long n = std::strtoll(p, &end, 10);
    if (end == p || n < 0) return fail("malformed shape");
    if (n > 0 && count > file.size() / static_cast<size_t>(n)) return fail("shape larger than the file");
    shape->push_back(n);
    count *= static_cast<size_t>(n);
    for (p = end; *p == ',' || *p == ' ';) ++p;
  }
  if (file.size() - begin - length != count * sizeof(float)) return fail("data does not fit the shape");
  std::vector<float> values(count);
  if (count) std::memcpy(values.data(), file.data() + begin + length, count * sizeof(float));
  return values;
}

// ------------------------------------------------------------------------------------------------ running a program

struct run_options {
  std::string input;             // for standard input, which is then closed
  std::vector<std::string> env;  // "NAME=value", on top of the environment of the test
  std::string dir;               // working folder; "" for the test's own
  int timeout_s = 300;           // then the program is killed
};

struct run_result {
  int code = -1;  // exit status; 128 + signal when a signal ended it, as in a shell; 127 when it could not be started
  std::string out, err;
  bool crashed() const { return code > 128; }
};

inline std::ostream &operator<<(std::ostream &to, const run_result &r) {
  return to << "exit " << r.code << "\nstdout: " << r.out << "\nstderr: " << r.err;
}

inline run_result run(const std::vector<std::string> &argv, const run_options &options = {}) {
  run_result result;
  int in[2], out[2], err[2];
  if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC)) {
    ADD_FAILURE() << "pipe: " << std::strerror(errno);
    return result;
  }
  std::vector<char *> args;  // made before the fork: the child must not allocate
  args.reserve(argv.size() + 1);
  for (const std::string &a : argv) args.push_back(const_cast<char *>(a.c_str()));
  args.push_back(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(in[0], 0);
    dup2(out[1], 1);
    dup2(err[1], 2);
    signal(SIGPIPE, SIG_DFL);
    if (!options.dir.empty() && chdir(options.dir.c_str())) _exit(127);
    for (const std::string &e : options.env) putenv(const_cast<char *>(e.c_str()));
    execvp(args[0], args.data());
    const char *why = std::strerror(errno);
    if (write(2, why, std::strlen(why)) < 0) _exit(126);
    _exit(127);
  }
  close(in[0]);
  close(out[1]);
  close(err[1]);
  if (child < 0) ADD_FAILURE() << "fork: " << std::strerror(errno);

  // A program may stop reading early; that must not end the test.
  struct sigaction ignore = {}, before = {};
  ignore.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &ignore, &before);
  fcntl(in[1], F_SETFL, O_NONBLOCK);
  size_t written = 0;
  pollfd fds[3] = {{in[1], POLLOUT, 0}, {out[0], POLLIN, 0}, {err[0], POLLIN, 0}};
  std::string *texts[3] = {nullptr, &result.out, &result.err};
  const auto shut = [](pollfd &f) { close(f.fd), f.fd = -1; };
  if (options.input.empty()) shut(fds[0]);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(options.timeout_s);
  while (child > 0 && (fds[0].fd >= 0 || fds[1].fd >= 0 || fds[2].fd >= 0)) {
    if (std::chrono::steady_clock::now() > deadline) {
      ADD_FAILURE() << argv[0] << ": still running after " << options.timeout_s << " s, killed";
      kill(child, SIGKILL);
      break;
    }
    if (poll(fds, 3, 100) < 0 && errno != EINTR) break;
    if (fds[0].fd >= 0 && fds[0].revents) {
      const ssize_t n = write(fds[0].fd, options.input.data() + written, options.input.size() - written);
      if (n > 0) written += static_cast<size_t>(n);
      if ((n < 0 && errno != EAGAIN) || written == options.input.size()) shut(fds[0]);
    }
    for (int i = 1; i < 3; ++i) {
      if (fds[i].fd < 0 || !fds[i].revents) continue;
      char buffer[65536];
      const ssize_t n = read(fds[i].fd, buffer, sizeof buffer);
      if (n > 0) texts[i]->append(buffer, static_cast<size_t>(n));
      else shut(fds[i]);
    }
  }
  for (pollfd &f : fds)
    if (f.fd >= 0) shut(f);
  sigaction(SIGPIPE, &before, nullptr);
  int status = 0;
  if (child > 0 && waitpid(child, &status, 0) == child)
    result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return result;
}

// The same with a line for /bin/sh.  A template, so that run({"a", "b"}) can only mean a list of arguments.
template <class Text, class = std::enable_if_t<std::is_convertible_v<const Text &, std::string_view>>>
inline run_result run(const Text &shell, const run_options &options = {}) {
  return run(std::vector<std::string>{"/bin/sh", "-c", std::string(std::string_view(shell))}, options);
}
