// The registry of model families, and what their converters share.
#include "models.h"

#include "source.h"
#include "status.h"

#include <cstring>

extern const rs_family rs_family_bert, rs_family_modernbert, rs_family_vit, rs_family_clip;

namespace {
const rs_family *const families[] = {&rs_family_bert, &rs_family_modernbert, &rs_family_vit, &rs_family_clip};

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
// The one that config.json names; nullptr, and *status says why, where there is none.
const rs_family *find_family(rs_importer &in, rs_status *status) {
  const char *type = nullptr, *architecture = "", *interpolation;
  const auto ok = [&](rs_status s) { return (*status = s) == RS_OK; };
  // timm writes no model_type, but always how its images are resized.
  if (!ok(in.config_str("architectures.0", &architecture, "")) ||
      !ok(in.config_str("pretrained_cfg.interpolation", &interpolation, nullptr)) ||
      !ok(interpolation ? in.config_str("model_type", &type, "timm") : in.config_str("model_type", &type)))
    return nullptr;
  for (const rs_family *f : families)
    if (contains(f->types, type) && (!*architecture || contains(f->architectures, architecture))) return f;
  *status = rs_fail(RS_ERR_UNSUPPORTED, "config.json: model_type '%s', architecture '%s' is not supported; rs converts %s", type,
                    architecture, known_architectures().c_str());
  return nullptr;
}
}  // namespace

rs_status rs_source_inputs(const rs_source *source, bool *texts, bool *images) {
  return rs_guarded([&] {
    rs_importer in(source, nullptr, nullptr);
    rs_status status;
    const rs_family *f = find_family(in, &status);
    if (!f) return status;
    return f->inputs(in, texts, images);
  });
}

rs_status rs_convert(const rs_source *source, const rs_convert_params *params, rs_writer *w) {
  return rs_guarded([&] {
    rs_importer in(source, params, w);
    rs_status status;
    const rs_family *f = find_family(in, &status);
    if (!f) return status;
    RS_TRY(rs_writer_set_str(w, "general.architecture", f->name));
    RS_TRY(f->convert(in));
    return in.finish();
  });
}
