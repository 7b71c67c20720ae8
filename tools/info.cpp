// rs info: what a weight file is and has.
#include "json.h"
#include "options.h"
#include "output.h"
#include "shapes.h"
#include "table.h"

#include <map>

namespace {

using ordered = nlohmann::ordered_json;

const char *const examples =
    "Examples:\n"
    "  rs info minilm.rsw\n"
    "  rs info minilm.rsw --tensors\n"
    "  rs info minilm.rsw --json | jq .metadata\n"
    "  rs info minilm.rsw --plan 1x512,8x128 --drop 0.5 --drop-score -mlp   # what dropping saves, layer by layer\n"
    "  rs info dinov2.rsw --plan 1,8 --image-size 448                           # of images: how many, and how large\n"
    "--plan tells what running sequences together takes, without running them: tokens that enter each layer, activations in "
    "memory\n"
    "while it runs, at most, and multiply-accumulates.  arena: all of that memory, with the scratch of every thread.\n"
    "Of a model that takes texts and images, images are planned.";

struct info_options {
  std::string model, plan, image_size;
  int threads = 0;
  bool json = false, tensors = false;
  drop_options drop;
};

// ---------------------------------------------------------------------------------------------- metadata

template <class T>
std::string array_summary(const T *values, size_t n) {
  constexpr size_t shown = 8;
  std::ostringstream text;
  for (size_t i = 0; i < std::min(n, shown); ++i) text << (i > 0 ? ", " : "") << values[i];
  if (n > shown) text << ", … (" << n << ")";
  return "[" + text.str() + "]";
}

std::string meta_summary(const rs_meta &meta) {
  switch (meta.kind) {
    case RS_META_BOOL:
      return meta.boolean ? "true" : "false";
    case RS_META_I64:
      return std::to_string(meta.i64);
    case RS_META_F64:
      return join(meta.f64);
    case RS_META_STR:
      return in_quotes({meta.str, meta.count});
    case RS_META_I64S:
      return array_summary(meta.i64s, meta.count);
    case RS_META_F32S:
      return array_summary(meta.f32s, meta.count);
    case RS_META_STRS:
      break;
  }
  std::vector<std::string> shown;
  for (size_t i = 0; i < std::min<size_t>(meta.count, 9); ++i) shown.push_back(in_quotes(rs_meta_string(&meta, i, nullptr)));
  constexpr size_t readable = 100;
  std::string text;
  size_t used = 0;
  while (used < shown.size() && used < 8 && text.size() + shown[used].size() < readable)
    text += (used > 0 ? ", " : "") + shown[used], ++used;
  return "[" + text + (used < meta.count ? join(used > 0 ? ", " : "", "… (", meta.count, ")") : "") + "]";
}

ordered meta_json(const rs_meta &meta) {
  switch (meta.kind) {
    case RS_META_BOOL:
      return meta.boolean;
    case RS_META_I64:
      return meta.i64;
    case RS_META_F64:
      return meta.f64;
    case RS_META_STR:
      return std::string(meta.str, meta.count);
    case RS_META_I64S:
      return std::vector<int64_t>(meta.i64s, meta.i64s + meta.count);
    case RS_META_F32S:
      return std::vector<float>(meta.f32s, meta.f32s + meta.count);
    case RS_META_STRS:
      return strings_of(meta);
  }
  return nullptr;
}

std::vector<rs_meta> all_metadata(const rs_model *model) {
  std::vector<rs_meta> all(rs_model_meta_count(model));
  for (size_t i = 0; i < all.size(); ++i) check(rs_model_meta_at(model, i, &all[i]));
  return all;
}

// ---------------------------------------------------------------------------------------------- tensors

std::vector<rs_tensor_info> all_tensors(const rs_model *model) {
  std::vector<rs_tensor_info> all(rs_model_tensor_count(model));
  for (size_t i = 0; i < all.size(); ++i) check(rs_model_tensor_at(model, i, &all[i]));
  return all;
}

const char *layout_name(rs_layout layout) { return layout == RS_PANELS ? "panels" : "rows"; }

std::string shape_text(const rs_tensor_info &tensor) {
  std::string text;
  for (int i = 0; i < tensor.rank; ++i) text += (i > 0 ? "," : "") + std::to_string(tensor.shape[i]);
  return "[" + text + "]";
}

std::string totals_table(const std::vector<rs_tensor_info> &tensors) {
  struct total {
    size_t tensors = 0, bytes = 0;
  };
  std::map<std::pair<std::string, std::string>, total> totals;
  for (const rs_tensor_info &tensor : tensors) {
    total &t = totals[{rs_type_name(tensor.type), layout_name(tensor.layout)}];
    ++t.tensors;
    t.bytes += tensor.bytes;
  }
  text_table table({"type", "layout", "tensors", "MiB"});
  for (const auto &[key, t] : totals)
    table.add({key.first, key.second, std::to_string(t.tensors), format("%.2f", double(t.bytes) / (1 << 20))});
  return table.str();
}

std::string tensors_table(const std::vector<rs_tensor_info> &tensors) {
  text_table table({"tensor", "type", "layout", "shape", "bytes", "offset"});
  for (const rs_tensor_info &tensor : tensors)
    table.add({tensor.name, rs_type_name(tensor.type), layout_name(tensor.layout), shape_text(tensor), std::to_string(tensor.bytes),
               std::to_string(tensor.offset)});
  return table.str();
}

// ---------------------------------------------------------------------------------------------- the two forms

rs_image_shape shape_of(const rs_model *model, const image_size &size) {
  rs_image_shape shape{};
  check(rs_image_get_shape(model, size.width, size.height, &shape));
  return shape;
}

// How the metadata say that images are prepared, in words.
std::string preparation(const rs_model *model) {
  const auto size = [&](const char *key) -> std::string {
    rs_meta meta;
    if (!find_meta(model, key, &meta) || meta.kind != RS_META_I64S || meta.count != 2) return "";
    return join(meta.i64s[0], "x", meta.i64s[1]);
  };
  const auto word = [&](const char *key) -> std::string {
    rs_meta meta;
    return find_meta(model, key, &meta) && meta.kind == RS_META_STR ? std::string(meta.str, meta.count) : "";
  };
  std::string text;
  const auto add = [&](const std::string &part) { text += (text.empty() ? "" : ", ") + part; };
  const std::string resize = word("image.resize");
  if (resize == "exact") add("to " + size("image.resize_size"));
  if (resize == "shortest_edge") add("shortest edge to " + size("image.resize_size"));
  if (!resize.empty() && resize != "none") text += " (" + word("image.resample") + ")";
  if (!size("image.crop_size").empty()) add("the middle " + size("image.crop_size"));
  return one_line(text, 200);
}

template <class Line>
std::string image_lines(const rs_model *model, const rs_model_info &info, Line line) {
  const rs_image_shape shape = shape_of(model, {});
  std::string out;
  if (info.text_hidden > 0) out += line("image layers", std::to_string(info.image_layers));
  out += line("images", join(shape.width, "x", shape.height, " (--image-size takes others)"));
  out += line("patches", join(shape.columns, "x", shape.rows, " of ", patch_of(model), "x", patch_of(model), " pixels"));
  out += line("image tokens", join(shape.tokens, ", ", shape.prefix, " of them before the patches"));
  out += line("preparation", preparation(model));
  return out;
}

rs_device_info device_of(const rs_model *model) {
  auto device = sized<rs_device_info>();
  check(rs_device_get_info(rs_model_device(model), &device));
  return device;
}

std::string as_text(const rs_model *model, bool with_tensors) {
  rs_model_info info = model_info(model);
  std::vector<rs_tensor_info> tensors = all_tensors(model);
  auto line = [](const char *name, const std::string &value) { return format("%-16s", name) + value + "\n"; };
  std::string out;
  out += line("name", info.name);
  out += line("architecture", info.architecture);
  out += line("weights", info.weight_type);
  out += line("parameters", std::to_string(info.parameters));
  out += line("dimensions", std::to_string(info.dim));
  out += line("layers", std::to_string(info.layers));
  out += line("heads", std::to_string(info.heads));
  const bool texts = info.text_hidden > 0;
  if (texts) out += line("vocabulary", std::to_string(info.vocab));
  if (info.head != RS_HEAD_NONE)
    out += line("head", join(rs_head_name(info.head), ", ", info.labels, info.labels == 1 ? " label" : " labels"));
  if (texts) out += line("max tokens", join(info.max_tokens, " (up to ", info.position_limit, ")"));
  if (info.image_hidden > 0) out += image_lines(model, info, line);
  out += line("file", join(info.file_bytes, " bytes (", human_bytes(double(info.file_bytes)), ")"));
  const rs_device_info device = device_of(model);
  out += line("runs on", format("%s, %s", device.device, device.name));
  out += "\n";
  for (const rs_meta &meta : all_metadata(model)) out += format("%-28s", meta.key) + " " + meta_summary(meta) + "\n";
  out += "\n" + totals_table(tensors);
  if (with_tensors) out += "\n" + tensors_table(tensors);
  return out;
}

ordered tensor_json(const rs_tensor_info &tensor) {
  return {{"name", tensor.name},
          {"type", rs_type_name(tensor.type)},
          {"layout", layout_name(tensor.layout)},
          {"shape", std::vector<int64_t>(tensor.shape, tensor.shape + tensor.rank)},
          {"bytes", tensor.bytes},
          {"offset", tensor.offset}};
}

std::string as_json(const rs_model *model) {
  rs_model_info info = model_info(model);
  ordered root = {{"name", info.name},
                  {"architecture", info.architecture},
                  {"weight_type", info.weight_type},
                  {"parameters", info.parameters},
                  {"dim", info.dim},
                  {"layers", info.layers},
                  {"heads", info.heads},
                  {"vocab", info.vocab},
                  {"head", rs_head_name(info.head)},
                  {"labels", info.labels},
                  {"max_tokens", info.max_tokens},
                  {"position_limit", info.position_limit},
                  {"file_bytes", info.file_bytes}};
  const rs_device_info device = device_of(model);
  root["device"] = device.device;
  root["device_name"] = device.name;
  if (info.image_hidden > 0) {
    const rs_image_shape shape = shape_of(model, {});
    root["image"] = {{"width", shape.width},     {"height", shape.height},      {"patch", patch_of(model)},
                     {"columns", shape.columns}, {"rows", shape.rows},          {"prefix", shape.prefix},
                     {"tokens", shape.tokens},   {"layers", info.image_layers}, {"preparation", preparation(model)}};
    root["takes"] = info.text_hidden > 0 ? "texts and images" : "images";
  }
  root["metadata"] = ordered::object();
  for (const rs_meta &meta : all_metadata(model)) root["metadata"][meta.key] = meta_json(meta);
  root["tensors"] = ordered::array();
  for (const rs_tensor_info &tensor : all_tensors(model)) root["tensors"].push_back(tensor_json(tensor));
  return root.dump(1, ' ', false, ordered::error_handler_t::replace) + "\n";
}

// ---------------------------------------------------------------------------------------------- plans

struct plan {
  std::vector<rs_plan_layer> layers;
  size_t arena = 0;
  rs_plan_layer sum() const {  // of the layers alone
    rs_plan_layer total{};
    for (size_t i = 0; i + 1 < layers.size(); ++i)
      total.tokens += layers[i].tokens, total.bytes += layers[i].bytes, total.macs += layers[i].macs;
    return total;
  }
};

// What a plan is for: some sequences of equal length.
struct planned {
  size_t batch, tokens;
  std::string name;
};

plan plan_of(rs_session *session, const rs_model_info &info, const planned &what, const image_size &size, const rs_drop *drop) {
  auto params = sized<rs_encode_params>();
  params.drop = drop;
  params.image_width = size.width;
  params.image_height = size.height;
  std::vector<int32_t> lengths(what.batch, int32_t(what.tokens));
  plan result;
  result.layers.resize(size_t(info.image_hidden > 0 ? info.image_layers : info.layers) + 1);
  check(rs_plan(session, lengths.data(), lengths.size(), &params, result.layers.data(), &result.arena));
  return result;
}

std::vector<planned> parse_plans(const std::string &list, const rs_model *model, const rs_model_info &info,
                                 const image_size &size) {
  std::vector<planned> plans;
  if (info.image_hidden == 0) {
    for (const shape &shape : parse_shapes("--plan", list)) {
      if (shape.tokens > size_t(info.position_limit))
        fail_usage("--plan: ", shape.str(), ": ", shape.tokens, " tokens are more than the ", info.position_limit,
                   " positions of this model");
      plans.push_back({shape.batch, shape.tokens, shape.str()});
    }
    return plans;
  }
  const rs_image_shape image = shape_of(model, size);
  for (size_t n : parse_counts("--plan", list, "images; --image-size says how large they are"))
    plans.push_back({n, size_t(image.tokens), join(n, n == 1 ? " image of " : " images of ", image.width, "x", image.height)});
  return plans;
}

// Columns of a plan; beside those of another one, how much less they are.
std::string percent_less(double value, double before) { return before > 0 ? format("%.1f %%", 100 * (value / before - 1)) : ""; }

std::string plan_table(const planned &what, const plan &whole, const plan *dropped) {
  std::vector<std::string> head = {what.name, "tokens", "activations", "MMAC"};
  if (dropped)
    for (const char *column : {"dropping: tokens", "activations", "MMAC", "tokens", "activations", "MMAC"}) head.push_back(column);
  text_table table(head);
  const auto add = [&](const std::string &name, const rs_plan_layer &a, const rs_plan_layer *b) {
    std::vector<std::string> row = {name, std::to_string(a.tokens), human_bytes(double(a.bytes)), format("%.1f", a.macs / 1e6)};
    if (b)
      for (const std::string &column : {std::to_string(b->tokens), human_bytes(double(b->bytes)), format("%.1f", b->macs / 1e6),
                                        percent_less(double(b->tokens), double(a.tokens)),
                                        percent_less(double(b->bytes), double(a.bytes)), percent_less(b->macs, a.macs)})
        row.push_back(column);
    table.add(row);
  };
  const size_t layers = whole.layers.size() - 1;
  for (size_t i = 0; i < layers; ++i) add(join("layer ", i), whole.layers[i], dropped ? &dropped->layers[i] : nullptr);
  const rs_plan_layer all = whole.sum(), left = dropped ? dropped->sum() : rs_plan_layer{};
  add("sum", all, dropped ? &left : nullptr);
  std::string text = table.str() + "arena " + human_bytes(double(whole.arena));
  if (dropped) text += ", dropping " + human_bytes(double(dropped->arena));
  return text + "\n";
}

ordered plan_json(const plan &p) {
  ordered layers = ordered::array();
  for (const rs_plan_layer &l : p.layers) layers.push_back({{"tokens", l.tokens}, {"activation_bytes", l.bytes}, {"macs", l.macs}});
  return {{"layers", layers}, {"arena_bytes", p.arena}};
}

int print_plans(const info_options &options, const rs_model *model) {
  const drop_choice drop(options.drop, model);
  const rs_model_info info = model_info(model);
  const session_ptr session = create_session(model, options.threads, false);
  const image_size size = image_size_of(options.image_size, model);
  std::string text;
  for (const planned &what : parse_plans(options.plan, model, info, size)) {
    const plan whole = plan_of(session.get(), info, what, size, nullptr);
    plan dropped;
    if (drop.get()) dropped = plan_of(session.get(), info, what, size, drop.get());
    if (options.json) {
      ordered row = {{"batch", what.batch}, {"tokens", what.tokens}, {"plan", plan_json(whole)}};
      if (drop.get()) row["drop"] = text_of(*drop.get()), row["dropping"] = plan_json(dropped);
      text += row.dump() + "\n";
    } else {
      text += (text.empty() ? "" : "\n") + plan_table(what, whole, drop.get() ? &dropped : nullptr);
    }
  }
  print(text);
  return 0;
}

int run_info(const info_options &options) {
  model_ptr model = load_model(options.model, false);
  if (!options.plan.empty()) return print_plans(options, model.get());
  if (!options.drop.ratios.empty() || !options.drop.keeps.empty() || !options.drop.profile.empty())
    fail_usage("a drop schedule goes with --plan");
  if (!options.image_size.empty()) fail_usage("--image-size goes with --plan");
  print(options.json ? as_json(model.get()) : as_text(model.get(), options.tensors));
  return 0;
}

}  // namespace

void add_info(CLI::App *app, command_line *line) {
  auto options = std::make_shared<info_options>();
  CLI::App *sub = add_command(app, "info", "what a weight file is and has", examples, options, run_info, line);
  add_model_option(sub, &options->model, true);
  sub->add_flag("--json", options->json, "everything, as one JSON object");
  CLI::Option *plan =
      sub->add_option(
             "--plan", options->plan,
             "what sequences by tokens take to run, instead of the rest: 8x128,1x512;\nof a model that takes images, alone or "
             "beside texts, how many of these: 1,8")
          ->type_name("BxT,...");
  add_image_size_option(sub, &options->image_size);
  add_threads_option(sub, &options->threads);
  add_drop_options(sub, &options->drop);
  sub->add_flag("--tensors", options->tensors, "list every tensor")->excludes(plan);
}
