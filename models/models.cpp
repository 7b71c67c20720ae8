// The registry of model families, and what their converters share.
#include "models.h"

#include "source.h"
#include "status.h"

#include <cstring>

extern const rs_family rs_family_bert, rs_family_vit, rs_family_clip;

namespace {
const rs_family *const families[] = {&rs_family_bert, &rs_family_vit, &rs_family_clip};

std::string known_architectures() {
  std::string names;
  for (const rs_family *f : families)
    for (const char *const *a = f->architectures; *a; a++) names += std::string(names.empty() ? "" : ", ") + *a;
  return names;
}

bool contains(const char *const *names, const char *name) {
  for (; *names; names++)
    if (!strcmp(*names, name)) return true;
  return false;
}
}  // namespace

const rs_family *rs_family_find(const char *name) {
  for (const rs_family *f : families)
    if (!strcmp(f->name, name)) return f;
  return nullptr;
}

namespace {
rs_status find_family(rs_importer &in, const rs_family **out) {
  const char *type = nullptr, *architecture = "", *interpolation;
  RS_TRY(in.config_str("architectures.0", &architecture, ""));
  // timm writes no model_type, but always how its images are resized.
  RS_TRY(in.config_str("pretrained_cfg.interpolation", &interpolation, nullptr));
  RS_TRY(interpolation ? in.config_str("model_type", &type, "timm") : in.config_str("model_type", &type));
  for (const rs_family *f : families)
    if (contains(f->types, type) && (!*architecture || contains(f->architectures, architecture))) {
      *out = f;
      return RS_OK;
    }
  return rs_fail(RS_ERR_UNSUPPORTED, "config.json: model_type '%s', architecture '%s' is not supported; rs converts %s", type,
                 architecture, known_architectures().c_str());
}
}  // namespace

rs_status rs_source_inputs(const rs_source *source, bool *texts, bool *images) {
  try {
    rs_importer in(source, nullptr, nullptr);
    const rs_family *f = nullptr;
    RS_TRY(find_family(in, &f));
    return f->inputs(in, texts, images);
  } catch (const std::exception &e) {  // std::bad_alloc
    return rs_fail(RS_ERR_MEMORY, "%s", e.what());
  }
}

rs_status rs_convert(const rs_source *source, const rs_convert_params *params, rs_writer *w) {
  try {
    rs_importer in(source, params, w);
    const rs_family *f = nullptr;
    RS_TRY(find_family(in, &f));
    RS_TRY(rs_writer_set_str(w, "general.architecture", f->name));
    RS_TRY(f->convert(in));
    return in.finish();
  } catch (const std::exception &e) {  // std::bad_alloc
    return rs_fail(RS_ERR_MEMORY, "conversion: %s", e.what());
  }
}
