// preprocessor_config.json, or timm's pretrained_cfg, as what a model wants of an image.  What the processor would do and rs does
// not is an error that names key and value: pixels that are nearly right are found out by no one.
#include "common.h"
#include "hf.h"

#include <algorithm>
#include <cmath>

namespace {

// ---------------------------------------------------------------------------------------------- processors of transformers

struct channels {
  double of[3];
};
constexpr channels half = {{0.5, 0.5, 0.5}};  // IMAGENET_STANDARD
constexpr channels imagenet_mean = {{0.485, 0.456, 0.406}}, imagenet_std = {{0.229, 0.224, 0.225}};
constexpr channels clip_mean = {{0.48145466, 0.4578275, 0.40821073}}, clip_std = {{0.26862954, 0.26130258, 0.27577711}};

// What a class does where its file is silent.  The classes that newer files call …Fast, and older ones …FeatureExtractor, do the
// same.
struct processor {
  const char *name, *model_type;  // ViTImageProcessor, "vit"
  bool square;                    // a size of one number is a square, not the shortest edge
  bool crops;
  int size, resample;
  channels mean, std;
};
constexpr processor processors[] = {
    {"ViT", "vit", true, false, 224, 2, half, half},
    {"DeiT", "deit", true, true, 256, 3, half, half},
    {"Beit", "beit", true, true, 256, 3, half, half},
    {"Bit", "dinov2", false, true, 224, 3, clip_mean, clip_std},
    {"CLIP", "clip", false, true, 224, 3, clip_mean, clip_std},
    {"Siglip", "siglip", true, false, 224, 3, half, half},
};
constexpr int64_t default_crop = 224;

const char *const resamples[] = {"nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"};  // by Pillow's numbers

const processor &find_processor(const json &config, const json_object &file) {
  std::string name = file.string("image_processor_type").value_or(file.string("feature_extractor_type").value_or(""));
  if (name.empty()) {  // then the model tells, as for AutoImageProcessor
    const std::string type = json_object(config, "config.json").string("model_type").value_or("");
    for (const processor &p : processors)
      if (type == p.model_type) return p;
    fail(file.where(), ": neither 'image_processor_type' nor a model_type that rs knows the images of (", in_quotes(type), ")");
  }
  for (const processor &p : processors)
    for (const char *ending : {"ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"})
      if (name == p.name + std::string(ending)) return p;
  std::string known;
  for (const processor &p : processors) known += (known.empty() ? "" : ", ") + std::string(p.name);
  fail(file.where(), ": 'image_processor_type' is ", in_quotes(name), "; rs knows those of ", known);
}

// The keys that are read below, or that say nothing of pixels.
bool is_known(const std::string &key) {
  static const char *const keys[] = {"image_processor_type",
                                     "feature_extractor_type",
                                     "processor_class",
                                     "_processor_class",
                                     "_valid_processor_keys",
                                     "do_resize",
                                     "size",
                                     "default_to_square",
                                     "resample",
                                     "do_center_crop",
                                     "crop_size",
                                     "do_rescale",
                                     "rescale_factor",
                                     "do_normalize",
                                     "image_mean",
                                     "image_std",
                                     "do_convert_rgb",
                                     "data_format",
                                     "input_data_format",
                                     "device",
                                     "return_tensors",
                                     "disable_grouping",
                                     "image_seq_length"};
  return std::any_of(std::begin(keys), std::end(keys), [&](const char *k) { return key == k; });
}

[[noreturn]] void not_understood(const std::string &where, const std::string &key, const json &value,
                                 const std::string &wanted = "") {
  fail(where, ": '", one_line(key, 60), "' is ",
       one_line(nlohmann::ordered_json(value).dump(-1, ' ', false, json::error_handler_t::replace), 100), ", ",
       wanted.empty() ? "which rs does not understand" : "expected " + wanted);
}

constexpr int64_t most_side = 16384;  // as the library has it

int64_t side(const std::string &where, const char *key, const json &value) {
  const bool fits = value.is_number_integer() && !(value.is_number_unsigned() && value.get<uint64_t>() > uint64_t(most_side));
  if (!fits || value.get<int64_t>() < 1 || value.get<int64_t>() > most_side)
    not_understood(where, key, value, join("1 to ", most_side));
  return value.get<int64_t>();
}

// {"height": …, "width": …} and nothing else, as [width, height].
bool is_box(const json &value) {
  return value.is_object() && value.size() == 2 && value.contains("height") && value.contains("width");
}
std::vector<int64_t> box(const std::string &where, const char *key, const json &value) {
  return {side(where, key, value["width"]), side(where, key, value["height"])};
}

void read_resize(const json_object &file, const processor &p, hf_image *out) {
  if (!file.boolean("do_resize").value_or(true)) return;
  const json fallback = p.square ? json{{"height", p.size}, {"width", p.size}} : json{{"shortest_edge", p.size}};
  const json *given = file.find("size");
  const json &size = given ? *given : fallback;
  const bool square = file.boolean("default_to_square").value_or(p.square);
  if (is_box(size)) {
    out->resize = "exact";
    out->resize_size = box(file.where(), "size", size);
  } else if (size.is_object() && size.size() == 1 && size.contains("shortest_edge")) {
    out->resize = "shortest_edge";
    out->resize_size.assign(2, side(file.where(), "size", size["shortest_edge"]));
  } else if (size.is_number()) {
    out->resize = square ? "exact" : "shortest_edge";
    out->resize_size.assign(2, side(file.where(), "size", size));
  } else {
    not_understood(file.where(), "size", size, "a number, {\"shortest_edge\"} or {\"height\", \"width\"}");
  }
  const json *number = file.find("resample");
  const int64_t resample = file.integer("resample").value_or(p.resample);
  if (resample < 0 || resample >= int64_t(std::size(resamples))) not_understood(file.where(), "resample", *number, "0 to 5");
  out->resample = resamples[resample];
}

void read_crop(const json_object &file, const processor &p, hf_image *out) {
  const std::optional<bool> wanted = file.boolean("do_center_crop");
  // Some of these classes carry the key along and ignore it.
  if (wanted.value_or(false) && !p.crops)
    fail(file.where(), ": 'do_center_crop' is true, which ", p.name, "ImageProcessor does not do");
  if (!wanted.value_or(p.crops)) return;
  const json *size = file.find("crop_size");
  if (!size) out->crop_size.assign(2, default_crop);
  else if (is_box(*size)) out->crop_size = box(file.where(), "crop_size", *size);
  else if (size->is_number()) out->crop_size.assign(2, side(file.where(), "crop_size", *size));
  else not_understood(file.where(), "crop_size", *size, "a number or {\"height\", \"width\"}");
}

void read_channels(const json_object &file, const char *key, const channels &otherwise, bool positive, std::vector<float> *out) {
  const json *values = file.find(key);
  out->assign(otherwise.of, otherwise.of + 3);
  if (!values) return;
  if (!values->is_array() || values->size() != 3) not_understood(file.where(), key, *values, "three numbers");
  for (size_t c = 0; c < 3; ++c) {
    const json &value = (*values)[c];
    const double v = value.is_number() ? value.get<double>() : NAN;
    if (!(std::fabs(v) <= 1e6) || (positive && !(v >= 1e-6)))
      not_understood(file.where(), key, *values, positive ? "three numbers above 0" : "three numbers");
    (*out)[c] = float(v);
  }
}

hf_image read_preprocessor(const json &config, const json &preprocessor) {
  const json_object file(preprocessor, "preprocessor_config.json");
  const processor &p = find_processor(config, file);
  for (const auto &[key, value] : preprocessor.items()) {
    const bool off = value.is_null() || (value.is_boolean() && !value.get<bool>());
    if (!off && !is_known(key)) not_understood(file.where(), key, value);
  }
  const json *format = file.find("data_format");
  if (format && *format != "channels_first") not_understood(file.where(), "data_format", *format, "\"channels_first\"");
  hf_image out;
  read_resize(file, p, &out);
  read_crop(file, p, &out);
  out.rescale = 1;
  if (file.boolean("do_rescale").value_or(true)) {
    out.rescale = file.number("rescale_factor").value_or(1 / 255.);
    if (!(out.rescale > 0 && out.rescale <= 1e6))
      not_understood(file.where(), "rescale_factor", *file.find("rescale_factor"), "above 0");
  }
  if (file.boolean("do_normalize").value_or(true)) {
    read_channels(file, "image_mean", p.mean, false, &out.mean);
    read_channels(file, "image_std", p.std, true, &out.std);
  }
  if (out.crop_size.empty() && out.resize != "exact")
    fail(file.where(), ": neither a crop nor a size of {\"height\", \"width\"}: pixels would differ in size from image to image");
  return out;
}

// ---------------------------------------------------------------------------------------------- timm

hf_image read_timm(const json &config) {
  const json_object file = json_object(config, "config.json").object("pretrained_cfg");
  const json &input = file.array("input_size");
  if (input.size() != 3 || input[0] != 3) not_understood(file.where(), "input_size", input, "[3, height, width]");
  const int64_t height = side(file.where(), "input_size", input[1]), width = side(file.where(), "input_size", input[2]);
  if (width != height) not_understood(file.where(), "input_size", input, "a square");
  const std::string mode = file.string("crop_mode").value_or("center");
  if (mode != "center") not_understood(file.where(), "crop_mode", mode, "\"center\"");
  const double share = file.number("crop_pct").value_or(0.875);
  if (!(share > 0.01 && share <= 1)) not_understood(file.where(), "crop_pct", share, "above 0, at most 1");
  hf_image out;
  out.resize = "shortest_edge";
  out.resize_size.assign(2, int64_t(std::floor(double(width) / share)));
  out.resample = file.string("interpolation").value_or("bicubic");
  if (std::find(std::begin(resamples), std::end(resamples), out.resample) == std::end(resamples))
    not_understood(file.where(), "interpolation", out.resample, "one of Pillow's filters");
  out.crop_size = {width, height};
  out.crop_rounding = "round";  // torchvision's
  read_channels(file, "mean", imagenet_mean, false, &out.mean);
  read_channels(file, "std", imagenet_std, true, &out.std);
  if (out.resize_size[0] > most_side) not_understood(file.where(), "crop_pct", share, join("an edge of at most ", most_side));
  return out;
}

}  // namespace

hf_image read_hf_image(const json &config, const json &preprocessor) {
  if (!preprocessor.is_null()) return read_preprocessor(config, preprocessor);
  if (config.is_object() && config.contains("pretrained_cfg")) return read_timm(config);
  fail("nothing says how an image becomes pixels: neither preprocessor_config.json nor 'pretrained_cfg' in config.json");
}

void hf_image_metadata(rs_writer *w, const hf_image &image) {
  check(rs_writer_set_str(w, "image.resize", image.resize.c_str()));
  if (image.resize != "none") {
    check(rs_writer_set_i64s(w, "image.resize_size", image.resize_size.data(), image.resize_size.size()));
    check(rs_writer_set_str(w, "image.resample", image.resample.c_str()));
  }
  if (!image.crop_size.empty()) {
    check(rs_writer_set_i64s(w, "image.crop_size", image.crop_size.data(), image.crop_size.size()));
    check(rs_writer_set_str(w, "image.crop_rounding", image.crop_rounding.c_str()));
  }
  check(rs_writer_set_f64(w, "image.rescale", image.rescale));
  check(rs_writer_set_f32s(w, "image.mean", image.mean.data(), image.mean.size()));
  check(rs_writer_set_f32s(w, "image.std", image.std.data(), image.std.size()));
}
