// Images from arguments, and the threads that make pixels of them while the encoder works on those before.
#pragma once
#include "input.h"

#include <sys/types.h>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

inputs inputs_of(const rs_model_info &info);

std::string ending_of(const std::string &name);  // of a file, in lower case: ".png", or ""
// Does the name of a file say that it is an image?  In a folder those are meant; what is named itself may be called anything.
bool ends_as_image(const std::string &name);
bool is_hidden(const std::string &name);  // of a file or a folder, without what it is in: begins with '.'

// The files below a folder, one after the other: of each folder in the order of the names, hidden ones left out.  Links are
// followed, but into no folder that the walk is in already, or there might be no end.
class folder_walk {
 public:
  explicit folder_walk(std::string root) : root_(std::move(root)) { enter(root_); }
  // False at the end.  What cannot be read gives its path, and why.  A link to nothing comes as a file, which opening it tells.
  bool next(std::string *path, std::string *error);
  bool at_file() const { return at_file_; }  // or what next() gave is a folder that cannot be read
  // The components of a path below the root.
  std::vector<std::string> below(const std::string &path) const;

 private:
  struct level {
    std::string folder;
    std::vector<std::string> names;
    size_t at;
    dev_t device;
    ino_t inode;
  };
  void enter(const std::string &folder);

  std::string root_;
  std::vector<level> levels_;
  std::string unreadable_, reason_;
  bool at_file_ = false;
};

// Files, folders (with all below them, in order of their names) and patterns (*, ?, [a-z], and ** for folders in between), and then
// `texts`.  Folders are read one at a time, so that their number does not matter.
std::unique_ptr<text_source> images_of_arguments(std::vector<std::string> arguments, std::vector<std::string> texts);

// The pixels that the model makes of an image file, brought to width x height (0, 0: the model's own size).  Returns what is wrong
// with the file; "" where nothing is.
std::string load_image(const rs_model *model, const std::string &path, int32_t width, int32_t height, std::vector<float> *pixels);

int32_t image_prefix(const rs_model *model);  // tokens before the patches
// A model of images without such tokens (SigLIP): its first token is a patch like others.
bool lacks_class_token(const rs_model *model);
// Pixels of the side of a patch.
int32_t patch_of(const rs_model *model);

// Passes on what `source` has, in its order, the images with pixels or an error.  Up to `ahead` items are taken in advance, of at
// most max_pixel_bytes together (or one image), and prepared by `threads` threads.
class image_loader : public text_source {
 public:
  static constexpr size_t max_pixel_bytes = size_t(32) << 20;

  struct settings {
    int32_t width, height;
    int threads;
    size_t ahead;
  };
  image_loader(std::unique_ptr<text_source> source, const rs_model *model, const settings &wanted);
  ~image_loader() override;

  bool next(text_item *item) override;
  bool ready(int milliseconds) override { return !queue_.empty() || source_->ready(milliseconds); }
  std::string place(const text_item &item) const override { return source_->place(item); }
  double bytes_done() const override { return source_->bytes_done(); }
  double bytes_total() const override { return source_->bytes_total(); }

 private:
  struct slot {
    text_item item;
    bool done;
  };
  bool pull();
  void fill();
  void work();
  void load(slot *s) const;

  std::unique_ptr<text_source> source_;
  const rs_model *model_;
  settings settings_;
  size_t pixel_bytes_ = 0;  // of one image
  size_t images_ = 0;       // of those in the queue
  bool ended_ = false;
  std::deque<slot> queue_;  // only done and item of a slot are shared with the workers, until it is done

  std::mutex mutex_;
  std::condition_variable wanted_, finished_;
  std::deque<slot *> waiting_;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};
