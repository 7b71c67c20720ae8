#include "scratch.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <utility>

namespace fs = std::filesystem;

// ---------------------------------------------------------------------------------------------- signals

// A signal handler can reach nothing but globals.  It passes the signal on to the watching thread, which may take locks and
// memory as a handler may not.
static int signal_pipe[2] = {-1, -1};

static const int ending_signals[] = {SIGINT, SIGTERM, SIGHUP};

static void pass_on(int number) {
  int saved = errno;
  auto byte = static_cast<unsigned char>(number);
  ssize_t ignored = write(signal_pipe[1], &byte, 1);
  (void)ignored;
  errno = saved;
}

static void set_handler(int number, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigaction(number, &action, nullptr);
}

static sigset_t ending_set() {
  sigset_t set;
  sigemptyset(&set);
  for (int number : ending_signals) sigaddset(&set, number);
  return set;
}

held_signals::held_signals() {
  sigset_t set = ending_set();
  pthread_sigmask(SIG_BLOCK, &set, &before_);
}

held_signals::~held_signals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

removed_on_signal::removed_on_signal(std::string path) : path_(std::move(path)) {
  if (pipe2(signal_pipe, O_CLOEXEC) != 0) fail("cannot make a pipe: ", strerror(errno));
  watcher_ = std::thread([this] { watch(); });
  for (int number : ending_signals) {
    struct sigaction current {};
    sigaction(number, nullptr, &current);
    if (current.sa_handler != SIG_IGN) set_handler(number, pass_on);  // nohup ignores SIGHUP, and so it stays
  }
}

removed_on_signal::~removed_on_signal() {
  for (int number : ending_signals) {
    struct sigaction current {};
    sigaction(number, nullptr, &current);
    if (current.sa_handler == pass_on) set_handler(number, SIG_DFL);
  }
  pass_on(0);
  watcher_.join();
  for (int &fd : signal_pipe) close(std::exchange(fd, -1));
}

void removed_on_signal::watch() {
  unsigned char number = 0;
  while (read(signal_pipe[0], &number, 1) < 0 && errno == EINTR) {
  }
  if (number == 0) return;
  // The other threads go on meanwhile and may put a file where one has just been removed.
  for (int attempt = 0; attempt < 20; ++attempt) {
    std::error_code error;
    fs::remove_all(path_, error);
    if (!error && !fs::exists(path_, error)) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  set_handler(number, SIG_DFL);
  sigset_t set = ending_set();
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  raise(number);
}

// ---------------------------------------------------------------------------------------------- files

static std::vector<std::string> names_in(const std::string &folder) {
  std::vector<std::string> names;
  const std::unique_ptr<DIR, releaser<closedir>> opened(opendir(folder.c_str()));
  for (const dirent *entry; opened && (entry = readdir(opened.get()));) names.emplace_back(entry->d_name);
  return names;
}

static int open_folder(const std::string &path) { return open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC); }

// Only what nobody else can have made: of that mode, with those files in it and no others, and for a while.
static bool is_abandoned(const std::string &path, int fd) {
  constexpr time_t moment = 60;  // until a folder that was made is locked
  struct stat status {};
  if (fstat(fd, &status) != 0 || (status.st_mode & 0777) != 0700 || status.st_mtime + moment > time(nullptr)) return false;
  for (const std::string &name : names_in(path)) {
    const std::string stem = name.substr(0, name.find('.'));  // rs_writer puts an ending there while it writes
    if (stem != "f32" && stem != "typed" && stem != "result" && name != "." && name != "..") return false;
  }
  return flock(fd, LOCK_EX | LOCK_NB) == 0;
}

static void remove_abandoned(const std::string &target) {
  const std::string folder = folder_of(target) + "/", pattern = temporary_beside(target).substr(folder.size());
  for (const std::string &name : names_in(folder)) {
    if (name.size() != pattern.size() || name.compare(0, name.size() - 6, pattern, 0, name.size() - 6) != 0) continue;
    const int fd = open_folder(folder + name);
    if (fd < 0) continue;
    std::error_code ignored;
    if (is_abandoned(folder + name, fd)) fs::remove_all(folder + name, ignored);
    close(fd);
  }
}

scratch_folder::scratch_folder(const std::string &target) : path_(temporary_beside(target)) {
  remove_abandoned(target);
  held_signals held;
  if (!mkdtemp(path_.data())) fail_errno("write in", folder_of(target));
  guard_ = std::make_unique<removed_on_signal>(path_);
  lock_ = open_folder(path_);
  if (lock_ >= 0) flock(lock_, LOCK_EX | LOCK_NB);  // goes with the process, however that ends
}

scratch_folder::~scratch_folder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
  if (lock_ >= 0) close(lock_);
}

std::string output_target(const std::string &path) {
  std::error_code error;
  if (path.empty()) fail("the name of the output is empty");
  if (fs::is_directory(path, error)) fail("cannot write ", in_quotes(path), ": it is a folder");
  // A link whose file is not there yet stays, too.
  fs::path target = path;
  for (int hops = 0; fs::is_symlink(target, error); ++hops) {
    if (hops == 40) errno = ELOOP, fail_errno("write", path);
    target = target.parent_path() / fs::read_symlink(target, error);
  }
  const fs::path whole = fs::canonical(target, error);
  return error ? target.string() : whole.string();
}

std::string folder_of(const std::string &path) {
  std::string folder = fs::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

std::string temporary_beside(const std::string &target) {
  return folder_of(target) + "/." + fs::path(target).filename().string() + ".XXXXXX";
}

void replace_file(const std::string &from, const std::string &to) {
  struct stat before {};
  if (stat(to.c_str(), &before) == 0 && chmod(from.c_str(), before.st_mode & 07777) != 0) fail_errno("write", to);
  if (rename(from.c_str(), to.c_str()) != 0) fail_errno("write", to);
  int folder = open(folder_of(to).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) return;  // the file is in its place; only a power cut in the next seconds could undo that
  fsync(folder);
  close(folder);
}
