#include "images.h"

#include <fnmatch.h>
#include <glob.h>
#include <sys/stat.h>
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <new>
#include <system_error>
#include <utility>

namespace fs = std::filesystem;

inputs inputs_of(const rs_model_info &info) {
  if (info.image_hidden == 0) return inputs::texts;
  return info.text_hidden > 0 ? inputs::both : inputs::images;
}

// ---------------------------------------------------------------------------------------------- folders

namespace {

// Of files that the library decodes.
const char *const endings[] = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".ppm", ".pgm", ".pnm"};

const char *const not_regular = "not a regular file";

std::vector<std::string> components(std::string_view path) {
  std::vector<std::string> parts;
  while (!path.empty()) {
    size_t slash = std::min(path.find('/'), path.size());
    if (slash > 0) parts.emplace_back(path.substr(0, slash));
    path.remove_prefix(std::min(slash + 1, path.size()));
  }
  return parts;
}

}  // namespace

std::string ending_of(const std::string &name) {
  std::string end = fs::path(name).extension().string();
  std::transform(end.begin(), end.end(), end.begin(), [](unsigned char c) { return char(tolower(c)); });
  return end;
}

bool ends_as_image(const std::string &name) {
  return std::find(std::begin(endings), std::end(endings), ending_of(name)) != std::end(endings);
}

bool is_hidden(const std::string &name) { return name[0] == '.'; }

bool folder_walk::next(std::string *path, std::string *error) {
  error->clear();
  for (;;) {
    if (!unreadable_.empty()) {
      *path = std::exchange(unreadable_, "");
      *error = reason_;
      at_file_ = false;
      return true;
    }
    while (!levels_.empty() && levels_.back().at == levels_.back().names.size()) levels_.pop_back();
    if (levels_.empty()) return false;
    level &top = levels_.back();
    std::string found = (fs::path(top.folder) / top.names[top.at++]).string();
    struct stat status {};
    const bool known = stat(found.c_str(), &status) == 0;
    if (known && S_ISDIR(status.st_mode)) {
      const auto is_it = [&](const level &l) { return l.device == status.st_dev && l.inode == status.st_ino; };
      if (std::none_of(levels_.begin(), levels_.end(), is_it)) enter(found);
      continue;
    }
    // Reading a pipe would wait for whoever writes it.
    if (known && !S_ISREG(status.st_mode)) *error = not_regular;
    *path = std::move(found);
    return at_file_ = true;
  }
}

std::vector<std::string> folder_walk::below(const std::string &path) const {
  return components(std::string_view(path).substr(root_.size()));
}

void folder_walk::enter(const std::string &folder) {
  struct stat status {};
  stat(folder.c_str(), &status);
  level entered{folder, {}, 0, status.st_dev, status.st_ino};
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    std::string name = entry->path().filename().string();
    if (!is_hidden(name)) entered.names.push_back(std::move(name));
  }
  if (error) {
    unreadable_ = folder;
    reason_ = "cannot read the folder: " + error.message();
  }
  std::sort(entered.names.begin(), entered.names.end());
  levels_.push_back(std::move(entered));
}

// ---------------------------------------------------------------------------------------------- arguments

namespace {

bool is_folder(const std::string &path) {
  struct stat status {};
  return stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

bool exists(const std::string &path) {
  struct stat status {};
  return stat(path.c_str(), &status) == 0;
}

bool is_pattern(std::string_view text) { return text.find_first_of("*?[") != std::string_view::npos; }

// Of a path and a pattern in their components: ** stands for any number of them.
bool matches(const std::vector<std::string> &path, const std::vector<std::string> &pattern) {
  // reached[j]: the components so far match the first j of the pattern.
  std::vector<char> reached(pattern.size() + 1, 0);
  const auto pass_over = [&] {
    for (size_t j = 0; j < pattern.size(); ++j)
      if (reached[j] && pattern[j] == "**") reached[j + 1] = 1;
  };
  reached[0] = 1;
  pass_over();
  for (const std::string &part : path) {
    std::vector<char> next(reached.size(), 0);
    for (size_t j = 0; j < pattern.size(); ++j) {
      if (!reached[j]) continue;
      if (pattern[j] == "**") next[j] = 1;
      else if (fnmatch(pattern[j].c_str(), part.c_str(), FNM_PERIOD) == 0) next[j + 1] = 1;
    }
    reached = std::move(next);
    pass_over();
  }
  return reached.back();
}

class image_arguments : public text_source {
 public:
  image_arguments(std::vector<std::string> arguments, std::vector<std::string> texts)
      : arguments_(std::move(arguments)), texts_(std::move(texts)) {}

  bool next(text_item *item) override {
    *item = text_item();
    if (next_image(item)) return true;
    if (next_text_ == texts_.size()) return false;
    item->text = texts_[next_text_++];
    item->line = next_text_;
    return true;
  }

  bool ready(int) override { return true; }
  std::string place(const text_item &item) const override {
    return !item.has_image ? join("text ", item.line) : item.image.empty() ? "''" : item.image;
  }
  double bytes_done() const override { return 0; }
  double bytes_total() const override { return 0; }

 private:
  bool next_image(text_item *item) {
    item->has_image = true;
    for (;;) {
      if (walk_) {
        if (next_of_walk(item)) return true;
        walk_.reset();
        if (walk_found_) continue;
        item->image = walked_;
        item->error = tail_.empty() ? "no image in this folder" : "no file matches";
        return true;
      }
      if (!found_.empty()) {
        take(found_.front(), item);
        found_.pop_front();
        std::error_code ignored;
        if (fs::is_other(item->image, ignored)) item->error = not_regular;
        if (!item->image.empty()) return true;
      } else if (next_argument_ < arguments_.size()) {
        if (open(arguments_[next_argument_++], item)) return true;
      } else {
        item->has_image = false;
        return false;
      }
    }
  }

  // An argument: itself, or what it stands for.
  bool open(const std::string &argument, text_item *item) {
    if (exists(argument) || !is_pattern(argument)) {
      take(argument, item);
      return walk_ == nullptr;
    }
    const std::vector<std::string> parts = components(argument);
    if (std::find(parts.begin(), parts.end(), "**") != parts.end()) {
      walk_pattern(argument, parts);
      return false;
    }
    glob_t result{};
    const int status = glob(argument.c_str(), GLOB_ERR, nullptr, &result);
    for (size_t i = 0; status == 0 && i < result.gl_pathc; ++i) found_.emplace_back(result.gl_pathv[i]);
    globfree(&result);
    if (status == 0) return false;
    item->image = argument;
    item->error = status == GLOB_NOSPACE   ? "not enough memory"
                  : status == GLOB_ABORTED ? "a folder cannot be read"
                                           : "no file matches";
    return true;
  }

  void take(const std::string &path, text_item *item) {
    if (is_folder(path)) walk(path, path, {});
    else item->image = path;
  }

  // From the folder in front of the first part with a special character.
  void walk_pattern(const std::string &argument, const std::vector<std::string> &parts) {
    size_t fixed = 0;
    std::string root = argument[0] == '/' ? "/" : "";
    for (; !is_pattern(parts[fixed]); ++fixed) root = (fs::path(root) / parts[fixed]).string();
    walk(root.empty() ? "." : root, argument, {parts.begin() + ptrdiff_t(fixed), parts.end()});
  }

  void walk(const std::string &root, const std::string &argument, std::vector<std::string> pattern) {
    walk_ = std::make_unique<folder_walk>(root);
    walked_ = argument;
    tail_ = std::move(pattern);
    walk_found_ = false;
  }

  bool next_of_walk(text_item *item) {
    std::string path;
    while (walk_->next(&path, &item->error)) {
      const bool wanted = tail_.empty() || tail_.back() == "**" ? ends_as_image(path) : true;
      if (walk_->at_file() && (!wanted || (!tail_.empty() && !matches(walk_->below(path), tail_)))) continue;
      walk_found_ = true;
      item->image = std::move(path);
      return true;
    }
    return false;
  }

  std::vector<std::string> arguments_, texts_;
  size_t next_argument_ = 0, next_text_ = 0;
  std::deque<std::string> found_;  // by the pattern at hand
  std::unique_ptr<folder_walk> walk_;
  std::string walked_;             // the argument that the walk is for
  std::vector<std::string> tail_;  // of its pattern, below the root; empty for a folder
  bool walk_found_ = false;
};

}  // namespace

std::unique_ptr<text_source> images_of_arguments(std::vector<std::string> arguments, std::vector<std::string> texts) {
  return std::make_unique<image_arguments>(std::move(arguments), std::move(texts));
}

// ---------------------------------------------------------------------------------------------- one image

static constexpr size_t max_file_bytes = size_t(256) << 20;

static std::string read_image_file(const std::string &path, std::vector<char> *bytes) {
  if (path.empty()) return "an empty path";
  if (path.find('\0') != std::string::npos) return "cannot open: a NUL in the path";
  std::unique_ptr<FILE, releaser<fclose>> file(fopen(path.c_str(), "rbe"));
  if (!file) return join("cannot open: ", strerror(errno));
  struct stat status {};
  const bool plain = fstat(fileno(file.get()), &status) == 0 && S_ISREG(status.st_mode);
  std::string too_large = "larger than " + human_bytes(double(max_file_bytes));
  if (plain && size_t(status.st_size) > max_file_bytes) return too_large;
  bytes->resize(plain ? size_t(status.st_size) + 1 : size_t(1) << 16);  // one more than there is: reading that finds the end
  size_t used = 0;
  for (size_t n; (n = fread(bytes->data() + used, 1, bytes->size() - used, file.get())) > 0;) {
    used += n;
    if (used > max_file_bytes) return too_large;
    if (used == bytes->size()) bytes->resize(2 * used);
  }
  if (ferror(file.get())) return join("cannot read: ", strerror(errno));
  bytes->resize(used);
  return "";
}

std::string load_image(const rs_model *model, const std::string &path, int32_t width, int32_t height, std::vector<float> *pixels) {
  try {
    std::vector<char> bytes;
    std::string error = read_image_file(path, &bytes);
    if (!error.empty()) return error;
    rs_image_shape shape{};
    if (rs_image_get_shape(model, width, height, &shape) != RS_OK) return rs_last_error();
    pixels->resize(size_t(3) * size_t(shape.width) * size_t(shape.height));
    rs_image image{};
    image.kind = RS_IMAGE_FILE;
    image.data = bytes.data();
    image.length = bytes.size();
    if (rs_image_prepare(model, &image, width, height, pixels->data(), pixels->size(), nullptr) == RS_OK) return "";
    *pixels = {};
    return rs_last_error();
  } catch (const std::bad_alloc &) {
    *pixels = {};
    return "not enough memory";
  }
}

int32_t image_prefix(const rs_model *model) {
  rs_image_shape shape;
  check(rs_image_get_shape(model, 0, 0, &shape));
  return shape.prefix;
}

bool lacks_class_token(const rs_model *model) { return model_info(model).image_hidden > 0 && image_prefix(model) == 0; }

int32_t patch_of(const rs_model *model) {
  rs_image_shape shape{};
  check(rs_image_get_shape(model, 0, 0, &shape));
  int32_t side = 1;  // the smallest image is one patch
  while (rs_image_get_shape(model, side, side, &shape) != RS_OK) ++side;
  return side;
}

// ---------------------------------------------------------------------------------------------- image_loader

image_loader::image_loader(std::unique_ptr<text_source> source, const rs_model *model, const settings &wanted)
    : source_(std::move(source)), model_(model), settings_(wanted) {
  rs_image_shape shape{};
  check(rs_image_get_shape(model, wanted.width, wanted.height, &shape));
  pixel_bytes_ = size_t(3) * size_t(shape.width) * size_t(shape.height) * sizeof(float);
  try {
    while (workers_.size() < size_t(wanted.threads)) workers_.emplace_back([this] { work(); });
  } catch (const std::system_error &) {
    // The system has no more threads; these are enough, or next() does it itself.
  }
}

image_loader::~image_loader() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wanted_.notify_all();
  for (std::thread &worker : workers_) worker.join();
}

void image_loader::load(slot *s) const {
  s->item.error = load_image(model_, s->item.image, settings_.width, settings_.height, &s->item.pixels);
}

void image_loader::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wanted_.wait(lock, [&] { return stop_ || !waiting_.empty(); });
    if (stop_) return;
    slot *s = waiting_.front();
    waiting_.pop_front();
    lock.unlock();
    load(s);
    lock.lock();
    s->done = true;
    finished_.notify_one();
  }
}

// One more item into the queue; false at the end.
bool image_loader::pull() {
  text_item item;
  ended_ = !source_->next(&item);
  if (ended_) return false;
  const bool to_load = item.has_image && item.error.empty();
  images_ += item.has_image;
  queue_.push_back({std::move(item), !to_load});
  if (!to_load) return true;
  if (workers_.empty()) {
    load(&queue_.back());
    queue_.back().done = true;
    return true;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(&queue_.back());
  }
  wanted_.notify_one();
  return true;
}

// As far as there is something already.
void image_loader::fill() {
  while (!ended_ && queue_.size() < settings_.ahead && (images_ + 1) * pixel_bytes_ <= max_pixel_bytes && source_->ready(0)) pull();
}

bool image_loader::next(text_item *item) {
  if (queue_.empty() && (ended_ || !pull())) return false;
  fill();
  {
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [&] { return queue_.front().done; });
  }
  *item = std::move(queue_.front().item);
  queue_.pop_front();
  images_ -= item->has_image;
  fill();  // so that the threads have work while the encoder has
  return true;
}
