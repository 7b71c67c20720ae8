// Temporary files that go whatever happens: at the end of a scope, by an error, or when a signal ends the program.
#pragma once
#include "common.h"

#include <csignal>
#include <thread>

// Signals that end the program wait while it lives: between making a file and telling removed_on_signal of it.
class held_signals {
 public:
  held_signals();
  ~held_signals();
  held_signals(const held_signals &) = delete;
  held_signals &operator=(const held_signals &) = delete;

 private:
  sigset_t before_;
};

// While it lives, SIGINT, SIGTERM and SIGHUP remove `path` (a file, or a folder with all in it) before they end the program.
class removed_on_signal {
 public:
  explicit removed_on_signal(std::string path);
  ~removed_on_signal();
  removed_on_signal(const removed_on_signal &) = delete;
  removed_on_signal &operator=(const removed_on_signal &) = delete;

 private:
  void watch();
  std::string path_;
  std::thread watcher_;
};

// A hidden folder beside the file that is to be made, so that a rename can put the result in its place.  Locked, so that a later
// one for the same file knows one that SIGKILL has left, and removes it.
class scratch_folder {
 public:
  explicit scratch_folder(const std::string &target);
  ~scratch_folder();
  scratch_folder(const scratch_folder &) = delete;
  scratch_folder &operator=(const scratch_folder &) = delete;
  std::string operator/(const std::string &name) const { return path_ + "/" + name; }  // f32, typed or result

 private:
  std::string path_;
  std::unique_ptr<removed_on_signal> guard_;
  int lock_ = -1;
};

// The file that a path stands for once symbolic links are followed.  Throws failure for a folder.
std::string output_target(const std::string &path);
std::string folder_of(const std::string &path);
std::string temporary_beside(const std::string &target);  // a pattern for mkstemp and mkdtemp
// rename(2), with the mode of the file that was there, and the folder's entry on disk.
void replace_file(const std::string &from, const std::string &to);
