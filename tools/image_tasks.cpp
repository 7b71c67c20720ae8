// Tasks of images.  What is timed is the encoder: pixels are prepared outside of the clock, and kept as far as they fit into
// kept_pixels, so that most data is decoded once.
#include "images.h"
#include "metrics.h"
#include "scores.h"
#include "task_parts.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

namespace {

constexpr size_t kept_pixels = size_t(256) << 20;  // bytes
constexpr size_t kept_patches = size_t(1) << 30;   // bytes of patch features to compare with

// Two weight files prepare images alike where this is the same.
std::string preparation_of(const rs_model *model, const rs_image_shape &shape) {
  std::string text = join(shape.width, "x", shape.height);
  for (size_t i = 0; i < rs_model_meta_count(model); ++i) {
    rs_meta meta;
    check(rs_model_meta_at(model, i, &meta));
    if (std::string_view(meta.key).substr(0, 6) != "image.") continue;
    text += join("\n", meta.key, " ", int(meta.kind), " ");
    switch (meta.kind) {
      case RS_META_STR:
        text += std::string(meta.str, meta.count);
        break;
      case RS_META_I64S:
        for (size_t k = 0; k < meta.count; ++k) text += join(meta.i64s[k], ",");
        break;
      case RS_META_F32S:
        for (size_t k = 0; k < meta.count; ++k) text += format("%a,", double(meta.f32s[k]));
        break;
      case RS_META_STRS:
        for (const std::string &one : strings_of(meta)) text += one + ",";
        break;
      default:
        text += format("%d %lld %a", int(meta.boolean), static_cast<long long>(meta.i64), meta.f64);
    }
  }
  return text;
}

// Pixels of files as models want them; one for all tasks, since rs tune has several of the same files.
class pixel_store {
 public:
  // What is not kept lives in `own` until the next call with it.
  std::vector<rs_image> get(const rs_model *model, const rs_image_shape &shape, const std::string *begin, const std::string *end,
                            std::vector<std::vector<float>> *own) {
    auto &kept = of_[preparation_of(model, shape)];
    std::vector<rs_image> images;
    own->clear();
    for (const std::string *file = begin; file != end; ++file) {
      const auto found = kept.find(*file);
      const float *pixels = found != kept.end() ? found->second.data() : nullptr;
      if (!pixels) {
        std::vector<float> made = prepare(model, shape, *file);
        pixels = made.data();  // which stay there wherever the vector goes
        if (bytes_ + made.size() * sizeof(float) > kept_pixels) {
          own->push_back(std::move(made));
        } else {
          bytes_ += made.size() * sizeof(float);
          kept.emplace(*file, std::move(made));
        }
      }
      images.push_back({RS_IMAGE_PIXELS, pixels, 0, shape.width, shape.height});
    }
    return images;
  }

 private:
  static std::vector<float> prepare(const rs_model *model, const rs_image_shape &shape, const std::string &file) {
    std::vector<float> pixels;
    const std::string error = load_image(model, file, shape.width, shape.height, &pixels);
    if (!error.empty()) fail(file, ": ", error);
    return pixels;
  }

  std::map<std::string, std::unordered_map<std::string, std::vector<float>>> of_;  // by preparation, by file
  size_t bytes_ = 0;
};

pixel_store &pixels() {
  static pixel_store store;
  return store;
}

rs_image_shape shape_of(const eval_setting &setting) {
  rs_image_shape shape;
  check(rs_image_get_shape(setting.model, setting.texts.image_width, setting.texts.image_height, &shape));
  return shape;
}

class image_task : public eval_task {
 public:
  explicit image_task(int batch) : batch_(size_t(batch)) {}
  bool of_images() const override { return true; }
  std::string what() const override { return join(files_.size(), files_.size() == 1 ? " image" : " images"); }
  void check(const rs_model *model) const override {
    if (model_info(model).image_hidden == 0) fail("this model takes no images, which ", in_quotes(folder_), " is a folder of");
  }
  size_t units() const override { return (files_.size() + batch_ - 1) / batch_; }
  std::unique_ptr<eval_run> begin(const eval_setting &setting) const override;

  virtual size_t width(const eval_setting &setting) const = 0;  // of what an image becomes
  virtual rs_status compute(const eval_setting &setting, const std::vector<rs_image> &images, float *out, size_t capacity,
                            rs_image_info *infos) const = 0;
  // More to be compared, of images from `begin` on, which is not timed; metrics of all that was compared and computed.
  virtual void compare(const eval_setting &, const std::vector<rs_image> &, size_t, eval_run *) const {}
  virtual std::vector<eval_metric> judge(const eval_setting &setting, const std::vector<float> &out, const eval_run &run) const = 0;

 protected:
  std::string folder_;
  std::vector<std::string> files_;

 private:
  friend class image_run;
  size_t batch_;
};

// Similarities of patch features, as far as they were compared.
struct patch_sums {
  double sum = 0, least = 1;
  size_t images = 0;
  void add(double cosine) {
    sum += cosine;
    least = std::min(least, cosine);
    ++images;
  }
};

class image_run : public eval_run {
 public:
  image_run(const image_task &task, const eval_setting &setting)
      : task_(task),
        setting_(setting),
        shape_(shape_of(setting)),
        width_(task.width(setting)),
        out_(task.files_.size() * width_),
        infos_(task.files_.size()) {}

  void load(size_t unit) override {
    const std::string *files = task_.files_.data();
    images_ = pixels().get(setting_.model, shape_, files + begin_of(unit), files + end_of(unit), &own_);
  }
  void run(size_t unit) override {
    const size_t begin = begin_of(unit), n = images_.size();
    ::check(task_.compute(setting_, images_, out_.data() + begin * width_, n * width_, infos_.data() + begin));
  }
  void compare(size_t unit) override { task_.compare(setting_, images_, begin_of(unit), this); }
  void finish(evaluation *result) override {
    layer_counter counter(setting_.model, true, result);
    for (const rs_image_info &info : infos_) counter.add_image(info.tokens, setting_.texts.drop);
    result->metrics = task_.judge(setting_, out_, *this);
  }

  const std::vector<float> &out() const { return out_; }
  patch_sums patches;

 private:
  size_t begin_of(size_t unit) const { return unit * task_.batch_; }
  size_t end_of(size_t unit) const { return std::min(task_.files_.size(), (unit + 1) * task_.batch_); }

  const image_task &task_;
  const eval_setting &setting_;
  rs_image_shape shape_;
  size_t width_;
  std::vector<float> out_;  // [n, width]
  std::vector<rs_image_info> infos_;
  std::vector<rs_image> images_;         // of the unit that was loaded
  std::vector<std::vector<float>> own_;  // pixels of these that are not kept
};

std::unique_ptr<eval_run> image_task::begin(const eval_setting &setting) const {
  return std::make_unique<image_run>(*this, setting);
}

// ---------------------------------------------------------------------------------------------- classification

// Mean of -log p of the right label, by softmax.
double log_loss(const std::vector<size_t> &wanted, const float *logits, size_t labels) {
  double sum = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const float *row = logits + i * labels;
    const double most = *std::max_element(row, row + labels);
    double total = 0;
    for (size_t k = 0; k < labels; ++k) total += std::exp(row[k] - most);
    sum += std::log(total) + most - row[wanted[i]];
  }
  return sum / double(wanted.size());
}

class image_classification : public image_task {
 public:
  explicit image_classification(const task_options &options)
      : image_task(options.batch),
        data_(read_labelled_images(options.data, {size_t(options.limit), options.seed, options.half, options.share})) {
    folder_ = options.data;
    files_ = data_.files;
  }

  void check(const rs_model *model) const override {
    image_task::check(model);
    need_head(model, {RS_HEAD_SEQUENCE}, "eval", "classification");
    labels_of(model);
  }
  size_t width(const eval_setting &setting) const override { return size_t(model_info(setting.model).labels); }
  rs_status compute(const eval_setting &setting, const std::vector<rs_image> &images, float *out, size_t capacity,
                    rs_image_info *infos) const override {
    return rs_classify_images(setting.session, images.data(), images.size(), &setting.texts, out, capacity, infos);
  }
  std::vector<eval_metric> judge(const eval_setting &setting, const std::vector<float> &logits, const eval_run &) const override {
    const std::vector<size_t> of_class = labels_of(setting.model);
    std::vector<size_t> wanted;
    for (size_t label : data_.labels) wanted.push_back(of_class[label]);
    std::vector<eval_metric> metrics = judge_labels(wanted, logits.data(), width(setting));
    // Accuracy counts images that changed sides; this tells smaller harm, too.
    if (width(setting) > 1) metrics.push_back({"log-loss", log_loss(wanted, logits.data(), width(setting)), 4});
    return metrics;
  }

 private:
  // The label of the model that each folder stands for.
  std::vector<size_t> labels_of(const rs_model *model) const {
    const label_finder finder(model);
    std::vector<size_t> result;
    for (size_t i = 0; i < data_.names.size(); ++i) result.push_back(finder.find(data_.names[i], data_.folders[i]));
    return result;
  }

  labelled_images data_;
};

// ---------------------------------------------------------------------------------------------- fidelity

// Vectors, and features of patches, beside those without dropping.  Patches have a counterpart only where all of them are there in
// the end: without dropping and with RS_DROP_RESTORE.
class image_cosine : public image_task {
 public:
  explicit image_cosine(const task_options &options) : image_task(options.batch) {
    folder_ = options.data;
    files_ = read_images(options.data, {size_t(options.limit), options.seed, options.half, options.share}).files;
  }

  size_t width(const eval_setting &setting) const override { return size_t(setting.dim); }
  rs_status compute(const eval_setting &setting, const std::vector<rs_image> &images, float *out, size_t capacity,
                    rs_image_info *infos) const override {
    return rs_encode_images(setting.session, images.data(), images.size(), &setting.texts, out, capacity, infos);
  }

  void prepare(const eval_setting &reference) override {
    const rs_image_shape shape = shape_of(reference);
    const double bytes = double(files_.size()) * (shape.tokens - shape.prefix) * hidden(reference) * sizeof(float);
    if (bytes > double(kept_patches))
      fail("patch features of ", files_.size(), " images of ", shape.width, "x", shape.height, " take ", human_bytes(bytes),
           ", more than ", human_bytes(double(kept_patches)), ": --limit compares fewer");
    image_run run(*this, reference);
    shape_ = shape;
    hidden_ = hidden(reference);
    patches_.clear();
    ready_ = false;
    for (size_t unit = 0; unit < units(); ++unit) {
      run.load(unit);
      run.run(unit);
      run.compare(unit);  // which keeps the first that it sees
    }
    vectors_ = run.out();
    ready_ = true;
  }

  void compare(const eval_setting &setting, const std::vector<rs_image> &images, size_t begin, eval_run *run) const override {
    if (setting.texts.drop && setting.texts.drop->mode != RS_DROP_RESTORE) return;
    const rs_image_shape shape = shape_of(setting);
    if (hidden(setting) != hidden_ || shape.columns != shape_.columns || shape.rows != shape_.rows) return;
    rs_encode_params params = setting.texts;
    params.pooling = RS_POOL_NONE;
    params.normalize = RS_OFF;
    params.dim = 0;
    const size_t patches = size_t(shape.tokens - shape.prefix), row = size_t(hidden_);
    std::vector<float> all(images.size() * size_t(shape.tokens) * row);
    ::check(rs_encode_images(setting.session, images.data(), images.size(), &params, all.data(), all.size(), nullptr));
    for (size_t i = 0; i < images.size(); ++i) {
      const float *mine = all.data() + (i * size_t(shape.tokens) + size_t(shape.prefix)) * row;
      if (!ready_) {
        patches_.insert(patches_.end(), mine, mine + patches * row);
        continue;
      }
      const float *wanted = patches_.data() + (begin + i) * patches * row;
      double sum = 0;
      for (size_t k = 0; k < patches; ++k) sum += cosine(mine + k * row, wanted + k * row, row);
      static_cast<image_run *>(run)->patches.add(sum / double(patches));
    }
  }

  std::vector<eval_metric> judge(const eval_setting &setting, const std::vector<float> &out, const eval_run &run) const override {
    const size_t dim = width(setting);
    if (out.size() != vectors_.size())
      fail("vectors of ", dim, " values cannot be compared with vectors of ", vectors_.size() / files_.size());
    double sum = 0, least = 1;
    for (size_t i = 0; i < files_.size(); ++i) {
      const double value = cosine(out.data() + i * dim, vectors_.data() + i * dim, dim);
      sum += value;
      least = std::min(least, value);
    }
    const patch_sums &patches = static_cast<const image_run &>(run).patches;
    const bool compared = patches.images == files_.size();
    return {{"cosine", sum / double(files_.size()), 5},
            {"lowest", least, 5},
            {"patches", compared ? patches.sum / double(patches.images) : std::nan(""), 5},
            {"lowest image", compared ? patches.least : std::nan(""), 5}};
  }

 private:
  static int32_t hidden(const eval_setting &setting) { return model_info(setting.model).image_hidden; }

  std::vector<float> vectors_;          // without dropping
  mutable std::vector<float> patches_;  // [n, patches, hidden]
  rs_image_shape shape_ = {};
  int32_t hidden_ = 0;
  bool ready_ = false;
};

}  // namespace

std::unique_ptr<eval_task> load_image_task(const std::string &name, const task_options &options) {
  if (name == "cosine") return std::make_unique<image_cosine>(options);
  return std::make_unique<image_classification>(options);
}
