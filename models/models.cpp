// The registry of model families, and what their converters share.
#include "models.h"

#include "source.h"
#include "status.h"

#include <cstring>

extern const rs_family rs_family_bert;

namespace {
const rs_family *const families[] = {&rs_family_bert};

std::string known_architectures() {
  std::string names;
  for (const rs_family *f : families)
    for (const char *const *a = f->architectures; *a; a++) names += std::string(names.empty() ? "" : ", ") + *a;
  return names;
}
}  // namespace

const rs_family *rs_family_find(const char *name) {
  for (const rs_family *f : families)
    if (!strcmp(f->name, name)) return f;
  return nullptr;
}

rs_status rs_convert(const rs_source *source, const rs_convert_params *params, rs_writer *w) {
  try {
    rs_importer in(source, params, w);
    const char *type = nullptr, *architecture = "";
    RS_TRY(in.config_str("model_type", &type));
    RS_TRY(in.config_str("architectures.0", &architecture, ""));
    for (const rs_family *f : families) {
      if (strcmp(f->name, type)) continue;
      for (const char *const *a = f->architectures; *a; a++)
        if (!*architecture || !strcmp(*a, architecture)) {
          RS_TRY(rs_writer_set_str(w, "general.architecture", f->name));
          RS_TRY(f->convert(in));
          return in.finish();
        }
    }
    return rs_fail(RS_ERR_UNSUPPORTED, "config.json: model_type '%s', architecture '%s' is not supported; rs converts %s", type,
                   architecture, known_architectures().c_str());
  } catch (const std::exception &e) {  // std::bad_alloc
    return rs_fail(RS_ERR_MEMORY, "conversion: %s", e.what());
  }
}
