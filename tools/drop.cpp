#include "options.h"

#include <algorithm>

void add_drop_options(CLI::App *sub, drop_options *options) {
  CLI::Option *ratios = sub->add_option("--drop", options->ratios,
                                        "drop tokens: the share that leaves behind each layer, 0.2,0,0,0.2\n"
                                        "(default: none; layers that are not named drop nothing)")
                            ->type_name("R,R,...");
  CLI::Option *keeps = sub->add_option("--keep", options->keeps, "or how many tokens stay behind each layer, 0: all; 128,0,64")
                           ->type_name("N,N,...")
                           ->excludes(ratios);
  CLI::Option *profile =
      sub->add_option("--drop-profile", options->profile, "a schedule that is stored in the weight file (rs info, rs tune)")
          ->type_name("NAME")
          ->excludes(ratios)
          ->excludes(keeps);
  const auto detail = [&](CLI::Option *option) { option->excludes(profile); };
  detail(sub->add_option("--drop-score", options->score,
                         "what is kept are the tokens with the highest: mlp (default), attention,\n"
                         "block, norm, centre, attn-colsum, attn-cls, random, first; with - in front\n"
                         "the lowest; with :l1, :cos, :out, :bare another distance; sums: norm-0.5mlp;\n"
                         "one for all layers, or one a layer: norm,-mlp")
             ->type_name("SCORE"));
  detail(sub->add_option("--drop-mode", options->mode,
                         "prune (default): what is dropped is gone\n"
                         "restore: it comes back at the end, with its last state\n"
                         "merge: averaged into the kept token that is most like it\n"
                         "fold: into one more token a text")
             ->type_name("MODE")
             ->check(CLI::IsMember({"prune", "restore", "merge", "fold"})));
  detail(sub->add_option("--drop-min", options->least, "never cut a text below so many tokens (default: 0)")
             ->type_name("N")
             ->check(whole_number(0)));
  detail(sub->add_option("--drop-protect", options->protect,
                         "what never leaves: cls (default): the first token; special: those of the\n"
                         "tokenizer's template; prefix: the first text of a pair; none")
             ->type_name("WHAT")
             ->check(CLI::IsMember({"cls", "special", "none", "prefix"})));
  detail(sub->add_option("--drop-seed", options->seed, "of the score random (default: 0)")
             ->type_name("N")
             ->check(whole_number(0, UINT64_MAX)));
  for (const char *name : {"--drop-score", "--drop-mode", "--drop-min", "--drop-protect", "--drop-seed"}) {
    CLI::Option *option = sub->get_option(name);
    option->check(CLI::Validator(
        [=](const std::string &) {
          return ratios->count() + keeps->count() > 0 ? std::string() : std::string("goes with --drop or --keep");
        },
        ""));
  }
}

static std::string without_blanks(std::string text) {
  text.erase(std::remove(text.begin(), text.end(), ' '), text.end());
  return text;
}

drop_choice::drop_choice(const drop_options &options, const rs_model *model) {
  if (!options.profile.empty()) {
    if (rs_model_drop(model, options.profile.c_str(), &drop_, nullptr) != RS_OK) fail_usage("--drop-profile: ", rs_last_error());
    return;
  }
  if (options.ratios.empty() && options.keeps.empty()) return;
  const std::string text = join(options.keeps.empty() ? "ratios=" : "keeps=", without_blanks(options.keeps + options.ratios),
                                " score=", without_blanks(options.score), " mode=", options.mode, " protect=", options.protect,
                                " min=", options.least, " seed=", options.seed);
  own_ = parse_drop(text, model);
  drop_ = own_.get();
  if (const char *warning = rs_drop_warning(model, drop_)) say(join("warning: ", warning, "; rs tune finds what suits your data"));
}

drop_ptr parse_drop(const std::string &text, const rs_model *model, const std::string &place) {
  rs_drop *drop = nullptr;
  if (rs_drop_parse(text.c_str(), &drop) != RS_OK) fail_usage(place, rs_last_error());
  drop_ptr owner(drop);
  const std::string error = drop_error(model, *drop);
  if (!error.empty()) fail_usage(place, error);
  return owner;
}

std::string drop_error(const rs_model *model, const rs_drop &drop) {
  if (rs_drop_check(model, &drop) != RS_OK) return rs_last_error();
  // The library would take the attention of the first patch, which says nothing.
  const bool of_class = std::string_view(drop.score ? drop.score : "").find("attn-cls") != std::string_view::npos;
  return of_class && lacks_class_token(model) ? "score attn-cls: this model has no class token" : "";
}

std::string text_of(const rs_drop &drop) {
  std::string text(256 + 32 * (drop.n_ratios + drop.n_keeps) + std::string_view(drop.score ? drop.score : "").size(), '\0');
  check(rs_drop_format(&drop, text.data(), text.size()));
  text.resize(text.find('\0'));
  return text;
}
