#include "datasets.h"

#include "images.h"
#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <random>
#include <set>
#include <unordered_map>

// ---------------------------------------------------------------------------------------------- lists

void text_list::add(std::string text, size_t line) {
  texts.push_back(std::move(text));
  lines.push_back(line);
}

std::string text_list::place(size_t i) const { return join(file, ":", lines[i]); }

template <class T>
static void keep_of(std::vector<T> *values, const std::vector<size_t> &chosen) {
  std::vector<T> kept;
  for (size_t i : chosen) kept.push_back(std::move((*values)[i]));
  *values = std::move(kept);
}

void text_list::keep(const std::vector<size_t> &chosen) {
  keep_of(&texts, chosen);
  keep_of(&lines, chosen);
}

// `count` of `values` at random, in the order that chance gave them: fewer are the first of more.
static void choose(std::vector<size_t> *values, size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  const size_t n = values->size();
  // Not std::shuffle, which is another one in every library.
  for (size_t i = 0; i < count; ++i) std::swap((*values)[i], (*values)[i + size_t(random() % (n - i))]);
}

std::vector<size_t> subset::of(size_t n) const {
  std::vector<size_t> chosen(n);
  std::iota(chosen.begin(), chosen.end(), size_t(0));
  if (limit > 0 && limit < n) {
    if (seed != 0) choose(&chosen, limit, seed);
    chosen.resize(limit);
  }
  if (half != 0 || share < 1) {
    std::sort(chosen.begin(), chosen.end());
    choose(&chosen, chosen.size(), seed + 0x9e3779b97f4a7c15);
    const auto middle = chosen.begin() + std::ptrdiff_t((chosen.size() + 1) / 2);
    if (half == 1) chosen.erase(middle, chosen.end());
    if (half == 2) chosen.erase(chosen.begin(), middle);
    chosen.resize(std::min(chosen.size(), size_t(std::ceil(double(chosen.size()) * share))));
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

// What stands at the places of each class, one of every class in turn, so that any number of the first is balanced.
static std::vector<size_t> in_turns(const std::vector<std::vector<size_t>> &groups) {
  std::vector<size_t> order;
  size_t longest = 0;
  for (const auto &group : groups) longest = std::max(longest, group.size());
  for (size_t i = 0; i < longest; ++i)
    for (const auto &group : groups)
      if (i < group.size()) order.push_back(group[i]);
  return order;
}

std::vector<size_t> subset::balanced(const std::vector<size_t> &classes) const {
  std::vector<size_t> chosen(classes.size());
  std::iota(chosen.begin(), chosen.end(), size_t(0));
  const size_t count = classes.empty() ? 0 : *std::max_element(classes.begin(), classes.end()) + 1;
  const auto by_class = [&] {
    std::vector<std::vector<size_t>> groups(count);
    for (size_t i : chosen) groups[classes[i]].push_back(i);
    return groups;
  };
  if (limit > 0 && limit < chosen.size()) {
    auto groups = by_class();
    for (size_t c = 0; c < count && seed != 0; ++c) choose(&groups[c], groups[c].size(), seed + c);
    chosen = in_turns(groups);
    chosen.resize(limit);
    std::sort(chosen.begin(), chosen.end());
  }
  if (half != 0 || share < 1) {
    auto groups = by_class();
    bool more = true;  // which half gets the odd one, class by class in turn
    for (size_t c = 0; c < count; ++c) {
      std::vector<size_t> &group = groups[c];
      choose(&group, group.size(), seed + c + 0x9e3779b97f4a7c15);
      const bool odd = group.size() % 2 != 0;
      const auto middle = group.begin() + std::ptrdiff_t((group.size() + (odd && more ? 1 : 0)) / 2);
      if (odd) more = !more;
      if (half == 1) group.erase(middle, group.end());
      if (half == 2) group.erase(group.begin(), middle);
    }
    chosen = in_turns(groups);
    chosen.resize(std::min(chosen.size(), size_t(std::ceil(double(chosen.size()) * share))));
    std::sort(chosen.begin(), chosen.end());
  }
  return chosen;
}

// ---------------------------------------------------------------------------------------------- lines, columns

namespace {

// Lines of a file that must be UTF-8, those that are blank left out.
class data_file {
 public:
  explicit data_file(const std::string &path) : path_(path), file_(path), reader_(file_.get(), path) {}

  bool next(std::string_view *line) {
    do {
      line_reader::result result = reader_.next(line);
      if (result == line_reader::result::end) return false;
      ++line_;
      if (result == line_reader::result::too_long) fail(place(), ": the line is longer than ", max_line_bytes, " bytes");
      if (line_ == 1 && line->substr(0, 3) == "\xef\xbb\xbf") line->remove_prefix(3);
      if (!line->empty() && line->back() == '\r') line->remove_suffix(1);
    } while (is_blank(*line));
    if (!is_utf8(*line)) fail(place(), ": not valid UTF-8");
    return true;
  }

  size_t line() const { return line_; }
  const std::string &path() const { return path_; }
  std::string place() const { return join(path_, ":", line_); }

 private:
  std::string path_;
  file_descriptor file_;
  line_reader reader_;
  size_t line_ = 0;
};

std::vector<std::string_view> columns_of(std::string_view line) {
  std::vector<std::string_view> columns;
  for (;;) {
    size_t tab = line.find('\t');
    columns.push_back(line.substr(0, tab));
    if (tab == std::string_view::npos) return columns;
    line.remove_prefix(tab + 1);
  }
}

bool begins_object(std::string_view line) { return line[line.find_first_not_of(" \t")] == '{'; }

// Columns by the names in a heading, or by their places where there is none.
class column_finder {
 public:
  // `names[i]`: what column i of those wanted may be called; `places`: where they are without a heading.
  column_finder(std::vector<std::vector<const char *>> names, std::vector<size_t> places)
      : names_(std::move(names)), places_(std::move(places)) {}

  bool take_heading(const std::vector<std::string_view> &columns) {
    std::vector<size_t> places;
    for (const auto &known : names_)
      for (size_t i = 0; i < columns.size() && places.size() < names_.size(); ++i)
        if (std::find(known.begin(), known.end(), columns[i]) != known.end()) {
          places.push_back(i);
          break;
        }
    if (places.size() < names_.size()) return false;
    places_ = places;
    return true;
  }

  std::vector<std::string_view> pick(const std::vector<std::string_view> &columns, const std::string &place) const {
    const size_t needed = *std::max_element(places_.begin(), places_.end()) + 1;
    if (columns.size() < needed) fail(place, ": ", columns.size(), " columns between tabs, expected at least ", needed);
    std::vector<std::string_view> picked;
    for (size_t i : places_) picked.push_back(columns[i]);
    return picked;
  }

 private:
  std::vector<std::vector<const char *>> names_;
  std::vector<size_t> places_;
};

// Each line of a file, tab-separated or JSON lines, which the first line tells.
template <class OnObject, class OnColumns>
void read_rows(const std::string &path, column_finder finder, OnObject on_object, OnColumns on_columns) {
  data_file file(path);
  bool first = true, objects = false;
  for (std::string_view line; file.next(&line);) {
    const bool heading = std::exchange(first, false);
    if (heading) objects = begins_object(line);
    if (objects) {
      json value = parse_json(line, file.place());
      on_object(json_object(value, file.place()), file.line());
      continue;
    }
    std::vector<std::string_view> columns = columns_of(line);
    if (heading && finder.take_heading(columns)) continue;
    on_columns(finder.pick(columns, file.place()), file);
  }
}

// The first of these keys that is there.
std::string required_string(const json_object &object, std::initializer_list<const char *> keys) {
  std::string wanted;
  for (const char *key : keys) {
    if (auto value = object.string(key)) return *value;
    wanted += (wanted.empty() ? "\"" : " or \"") + std::string(key) + "\"";
  }
  fail(object.where(), ": no ", wanted);
}

double parse_number(std::string_view text, const std::string &place, const char *what) {
  double value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value))
    fail(place, ": ", what, " ", in_quotes(text), " is not a number");
  return value;
}

int64_t parse_integer(std::string_view text, const std::string &place, const char *what) {
  int64_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size())
    fail(place, ": ", what, " ", in_quotes(text), " is not a whole number");
  return value;
}

void need_some(size_t n, const std::string &path, const char *what) {
  if (n == 0) fail(in_quotes(path), ": no ", what, " in it");
}

// n: how many of a half are left.
void need_two(size_t n, const std::string &path, const char *what) {
  if (n == 0) fail(in_quotes(path), ": two halves need at least two ", what, "; there is only one, in all or by --limit");
}

}  // namespace

// ---------------------------------------------------------------------------------------------- texts

text_list read_texts(const std::string &path, const subset &part) {
  std::unique_ptr<text_source> source = texts_of_file(path, input_kind::automatic);
  text_list list;
  list.file = path;
  text_item item;
  while (source->next(&item)) {
    if (!item.error.empty()) fail(source->place(item), ": ", item.error);
    if (!is_utf8(item.text)) fail(source->place(item), ": not valid UTF-8");
    list.add(std::move(item.text), item.line);
  }
  need_some(list.size(), path, "texts");
  list.keep(part.of(list.size()));
  need_two(list.size(), path, "texts");
  return list;
}

scored_pairs read_scored_pairs(const std::string &path, const subset &part) {
  scored_pairs pairs;
  pairs.first.file = pairs.second.file = path;
  const auto add = [&](std::string first, std::string second, double score, size_t line) {
    pairs.first.add(std::move(first), line);
    pairs.second.add(std::move(second), line);
    pairs.scores.push_back(score);
  };
  read_rows(
      path, column_finder({{"score"}, {"sentence1", "text1"}, {"sentence2", "text2"}}, {4, 5, 6}),
      [&](const json_object &row, size_t line) {
        auto score = row.number("score");
        if (!score) fail(row.where(), ": no \"score\"");
        add(required_string(row, {"text1", "sentence1"}), required_string(row, {"text2", "sentence2"}), *score, line);
      },
      [&](const std::vector<std::string_view> &row, const data_file &file) {
        add(std::string(row[1]), std::string(row[2]), parse_number(row[0], file.place(), "the score"), file.line());
      });
  need_some(pairs.scores.size(), path, "pairs");
  std::vector<size_t> chosen = part.of(pairs.scores.size());
  pairs.first.keep(chosen);
  pairs.second.keep(chosen);
  keep_of(&pairs.scores, chosen);
  need_two(pairs.scores.size(), path, "pairs");
  return pairs;
}

labelled_texts read_labelled_texts(const std::string &path, const subset &part) {
  labelled_texts data;
  data.texts.file = path;
  read_rows(
      path, column_finder({{"sentence", "text"}, {"label"}}, {0, 1}),
      [&](const json_object &row, size_t line) {
        data.texts.add(required_string(row, {"text", "sentence"}), line);
        const json *label = row.find("label");
        if (!label) fail(row.where(), ": no \"label\"");
        if (label->is_boolean() || (!label->is_string() && !label->is_number_integer()))
          fail(row.where(), ": 'label' is ", label->type_name(), ", expected a string or a whole number");
        data.labels.push_back(label->is_string() ? label->get<std::string>() : label->dump());
      },
      [&](const std::vector<std::string_view> &row, const data_file &file) {
        data.texts.add(std::string(row[0]), file.line());
        data.labels.emplace_back(row[1]);
        if (data.labels.back().empty()) fail(file.place(), ": the label is empty");
      });
  need_some(data.labels.size(), path, "texts");
  std::vector<size_t> chosen = part.of(data.labels.size());
  data.texts.keep(chosen);
  keep_of(&data.labels, chosen);
  need_two(data.labels.size(), path, "texts");
  return data;
}

// ---------------------------------------------------------------------------------------------- retrieval

const std::vector<std::string> retrieval_files = {"corpus.jsonl",  "queries.jsonl", "qrels/test.tsv",
                                                  "cran.all.1400", "cran.qry",      "cranqrel"};

namespace {

using id_map = std::unordered_map<std::string, size_t>;

void add_id(id_map *ids, const std::string &id, const std::string &place, const char *what) {
  if (id.empty()) fail(place, ": the id of a ", what, " is empty");
  if (!ids->emplace(id, ids->size()).second) fail(place, ": a second ", what, " ", in_quotes(id));
}

size_t find_id(const id_map &ids, std::string_view id, const std::string &place, const char *what) {
  auto found = ids.find(std::string(id));
  if (found == ids.end()) fail(place, ": no ", what, " has the id ", in_quotes(id));
  return found->second;
}

struct raw_retrieval {
  retrieval_set set;
  id_map documents, queries;
  std::set<std::pair<size_t, size_t>> judged;

  void judge(std::string_view query, std::string_view document, double gain, const std::string &place) {
    size_t q = find_id(queries, query, place, "query"), d = find_id(documents, document, place, "document");
    if (!judged.emplace(q, d).second)
      fail(place, ": query ", in_quotes(query), " and document ", in_quotes(document), " are judged twice");
    set.relevant.resize(queries.size());
    if (gain > 0) set.relevant[q].push_back({d, gain});
  }
};

std::string with_title(const std::string &title, const std::string &text) {
  return title.empty() ? text : text.empty() ? title : title + " " + text;
}

// BEIR's ids are strings, but some files have numbers.
std::string id_of(const json_object &row) {
  const json *id = row.find("_id");
  if (!id) fail(row.where(), ": no \"_id\"");
  if (id->is_string()) return id->get<std::string>();
  if (!id->is_number_integer()) fail(row.where(), ": '_id' is ", id->type_name(), ", expected a string");
  return id->dump();
}

template <class OnRow>
void read_objects(const std::string &path, OnRow on_row) {
  data_file file(path);
  for (std::string_view line; file.next(&line);) {
    json value = parse_json(line, file.place());
    on_row(json_object(value, file.place()), file.line());
  }
}

raw_retrieval read_beir(const std::string &folder) {
  raw_retrieval raw;
  raw.set.documents.file = folder + "/corpus.jsonl";
  read_objects(raw.set.documents.file, [&](const json_object &row, size_t line) {
    add_id(&raw.documents, id_of(row), row.where(), "document");
    raw.set.documents.add(with_title(row.string("title").value_or(""), required_string(row, {"text"})), line);
  });
  need_some(raw.set.documents.size(), raw.set.documents.file, "documents");
  raw.set.queries.file = folder + "/queries.jsonl";
  read_objects(raw.set.queries.file, [&](const json_object &row, size_t line) {
    add_id(&raw.queries, id_of(row), row.where(), "query");
    raw.set.queries.add(required_string(row, {"text"}), line);
  });
  const column_finder finder({}, {0, 1, 2});
  data_file judgements(folder + "/qrels/test.tsv");
  for (std::string_view line; judgements.next(&line);) {
    std::vector<std::string_view> row = finder.pick(columns_of(line), judgements.place());
    if (judgements.line() == 1 && row[2] == "score") continue;
    raw.judge(row[0], row[1], parse_number(row[2], judgements.place(), "the score"), judgements.place());
  }
  raw.set.itself.assign(raw.queries.size(), retrieval_set::no_document);
  for (const auto &[id, query] : raw.queries) {
    const auto document = raw.documents.find(id);
    if (document == raw.documents.end() || query >= raw.set.relevant.size()) continue;
    const std::vector<judged_document> &relevant = raw.set.relevant[query];
    const bool judged = std::any_of(relevant.begin(), relevant.end(), [&](auto &r) { return r.document == document->second; });
    if (!judged && raw.set.documents.texts[document->second].find(raw.set.queries.texts[query]) != std::string::npos)
      raw.set.itself[query] = document->second;
  }
  return raw;
}

// ".I 12", and below that sections that begin with a line ".T", ".A", ".B" or ".W".
class cranfield_records {
 public:
  explicit cranfield_records(const std::string &path) : file_(path) {}

  struct record {
    std::string number;
    std::string sections[2];  // title, text
    bool any_section = false;
    size_t line = 0;
  };

  bool next(record *out) {
    std::string_view line;
    if (!begun_) {
      if (!file_.next(&line)) return false;
      if (!is_head(line)) fail(file_.place(), ": got ", in_quotes(line), ", expected '.I' and a number");
      begin(line);
    }
    if (!pending_) return false;
    *out = record();
    out->number = number_;
    out->line = line_;
    pending_ = false;
    std::string *section = nullptr;
    while (file_.next(&line)) {
      if (is_head(line)) {
        begin(line);
        break;
      }
      if (line.size() == 2 && line[0] == '.' && std::string_view("TABW").find(line[1]) != std::string_view::npos) {
        section = line[1] == 'T' ? &out->sections[0] : line[1] == 'W' ? &out->sections[1] : &ignored_;
        out->any_section = true;
        continue;
      }
      if (!section) fail(file_.place(), ": text before a line '.T', '.A', '.B' or '.W'");
      append_words(section, line);
    }
    return true;
  }

  std::string place(const record &r) const { return join(file_.path(), ":", r.line); }

 private:
  static bool is_head(std::string_view line) { return line == ".I" || line.substr(0, 3) == ".I "; }

  void begin(std::string_view line) {
    begun_ = pending_ = true;
    number_ = line.substr(std::min(line.size(), size_t(3)));
    line_ = file_.line();
  }

  static void append_words(std::string *to, std::string_view line) {
    while (!line.empty()) {
      size_t begin = std::min(line.find_first_not_of(" \t"), line.size());
      size_t end = std::min(line.find_first_of(" \t", begin), line.size());
      if (end > begin) (*to += to->empty() ? "" : " ") += line.substr(begin, end - begin);
      line.remove_prefix(end);
    }
  }

  data_file file_;
  bool begun_ = false, pending_ = false;
  std::string number_, ignored_;
  size_t line_ = 0;
};

// Both files end with a head that nothing belongs to.  Everywhere else a record without text is one, if an empty one.
template <class OnRecord>
void read_cranfield_file(const std::string &path, OnRecord on_record) {
  cranfield_records records(path);
  cranfield_records::record current, next;
  for (bool more = records.next(&current); more; current = std::move(next)) {
    more = records.next(&next);
    if (!more && !current.any_section) break;
    on_record(current, records.place(current));
  }
}

raw_retrieval read_cranfield(const std::string &folder) {
  raw_retrieval raw;
  raw.set.documents.file = folder + "/cran.all.1400";
  read_cranfield_file(raw.set.documents.file, [&](const cranfield_records::record &record, const std::string &place) {
    parse_integer(record.number, place, "the number of a document");
    add_id(&raw.documents, record.number, place, "document");
    raw.set.documents.add(with_title(record.sections[0], record.sections[1]), record.line);
  });
  need_some(raw.set.documents.size(), raw.set.documents.file, "documents");
  // The numbers in cran.qry are those of a larger set of queries; cranqrel counts the queries from 1 in their order.
  raw.set.queries.file = folder + "/cran.qry";
  read_cranfield_file(raw.set.queries.file, [&](const cranfield_records::record &record, const std::string &place) {
    add_id(&raw.queries, std::to_string(raw.queries.size() + 1), place, "query");
    raw.set.queries.add(record.sections[1], record.line);
  });
  data_file judgements(folder + "/cranqrel");
  for (std::string_view line; judgements.next(&line);) {
    std::vector<std::string> row;
    std::istringstream words{std::string(line)};
    for (std::string word; words >> word;) row.push_back(word);
    if (row.size() != 3) fail(judgements.place(), ": ", row.size(), " numbers, expected query, document and code");
    const int64_t code = parse_integer(row[2], judgements.place(), "the code");
    if (code < -1 || code == 0 || code > 5) fail(judgements.place(), ": the code ", code, " is not -1 or from 1 to 5");
    raw.judge(row[0], row[1], code > 0 ? double(5 - code) : 0, judgements.place());
  }
  return raw;
}

// Those that are relevant first, in the order of the queries, then the others; `part.limit` of all, or a share of these.  Halves
// are of queries, not of documents.
std::vector<size_t> choose_documents(const retrieval_set &set, const subset &part) {
  size_t limit = part.limit;
  if (part.share < 1) limit = size_t(std::ceil(part.share * double(limit > 0 ? limit : set.documents.size())));
  std::vector<size_t> chosen;
  std::vector<bool> taken(set.documents.size());
  const auto take = [&](size_t document) {
    if (taken[document] || (limit > 0 && chosen.size() >= limit)) return;
    taken[document] = true;
    chosen.push_back(document);
  };
  if (limit > 0)
    for (const auto &relevant : set.relevant)
      for (const judged_document &judged : relevant) take(judged.document);
  std::vector<size_t> others;
  for (size_t i = 0; i < set.documents.size(); ++i)
    if (!taken[i]) others.push_back(i);
  const size_t room = limit > chosen.size() ? limit - chosen.size() : 0;
  if (limit == 0 || room > 0)
    for (size_t i : subset{room, part.seed}.of(others.size())) take(others[i]);
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

void keep_queries(retrieval_set *set, const std::vector<size_t> &chosen) {
  set->queries.keep(chosen);
  keep_of(&set->relevant, chosen);
  keep_of(&set->itself, chosen);
}

void drop_unanswered(retrieval_set *set) {
  std::vector<size_t> answered;
  for (size_t i = 0; i < set->relevant.size(); ++i)
    if (!set->relevant[i].empty()) answered.push_back(i);
  keep_queries(set, answered);
}

void keep_documents(retrieval_set *set, const std::vector<size_t> &chosen) {
  constexpr size_t gone = retrieval_set::no_document;
  std::vector<size_t> moved(set->documents.size(), gone);
  for (size_t i = 0; i < chosen.size(); ++i) moved[chosen[i]] = i;
  set->documents.keep(chosen);
  for (auto &relevant : set->relevant) {
    std::vector<judged_document> left;
    for (const judged_document &judged : relevant)
      if (moved[judged.document] != gone) left.push_back({moved[judged.document], judged.gain});
    relevant = std::move(left);
  }
  for (size_t &itself : set->itself)
    if (itself != gone) itself = moved[itself];
}

}  // namespace

retrieval_set read_retrieval(const std::string &folder, bool binary, const retrieval_subset &part) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(folder, ignored)) fail(in_quotes(folder), ": not a folder");
  const auto has = [&](const char *name) { return std::filesystem::exists(folder + "/" + name, ignored); };
  const bool beir = has("corpus.jsonl");
  if (!beir && !has("cran.all.1400"))
    fail(in_quotes(folder), ": neither corpus.jsonl (BEIR) nor cran.all.1400 (Cranfield) is in it");
  retrieval_set set = std::move((beir ? read_beir(folder) : read_cranfield(folder)).set);
  set.relevant.resize(set.queries.size());
  set.itself.resize(set.queries.size(), retrieval_set::no_document);
  if (binary)
    for (auto &relevant : set.relevant)
      for (judged_document &judged : relevant) judged.gain = 1;
  drop_unanswered(&set);
  keep_queries(&set, part.queries.of(set.queries.size()));
  keep_documents(&set, choose_documents(set, part.documents));
  drop_unanswered(&set);
  need_some(set.queries.size(), folder, "queries with a relevant document");
  return set;
}

// ---------------------------------------------------------------------------------------------- SQuAD

squad_set read_squad(const std::string &path, const subset &part) {
  constexpr size_t most = size_t(1) << 30;
  const std::string name = std::filesystem::path(path).filename();
  const json root = parse_json(read_file(path, most), name);
  squad_set set;
  std::set<std::string> ids;
  size_t article_number = 0;
  const json_object whole(root, name);
  for (const json &article : whole.array("data")) {
    const std::string where = join(name, ": article ", ++article_number);
    const json_object article_object(article, where);
    size_t paragraph_number = 0;
    for (const json &paragraph : article_object.array("paragraphs")) {
      const json_object paragraph_object(paragraph, join(where, ", paragraph ", ++paragraph_number));
      set.contexts.push_back(required_string(paragraph_object, {"context"}));
      size_t number = 0;
      for (const json &question : paragraph_object.array("qas")) {
        const json_object object(question, join(paragraph_object.where(), ", question ", ++number));
        squad_question q{required_string(object, {"id"}), required_string(object, {"question"}), set.contexts.size() - 1, {}};
        if (!ids.insert(q.id).second) fail(object.where(), ": a second question ", in_quotes(q.id));
        for (const json &answer : object.array("answers"))
          q.answers.push_back(required_string(json_object(answer, object.where() + ": answers"), {"text"}));
        set.questions.push_back(std::move(q));
      }
    }
  }
  need_some(set.questions.size(), path, "questions");
  keep_of(&set.questions, part.of(set.questions.size()));
  need_two(set.questions.size(), path, "questions");
  return set;
}

// ---------------------------------------------------------------------------------------------- images

namespace fs = std::filesystem;

std::vector<std::string> image_files(const std::string &folder) {
  std::vector<std::string> files;
  folder_walk walk(folder);
  for (std::string path, error; walk.next(&path, &error);) {
    if (walk.at_file() && !ends_as_image(path)) continue;
    if (!error.empty()) fail(in_quotes(path), ": ", error);
    files.push_back(path);
  }
  return files;
}

image_list read_images(const std::string &folder, const subset &part) {
  image_list list;
  list.files = image_files(folder);
  need_some(list.files.size(), folder, "images");
  keep_of(&list.files, part.of(list.files.size()));
  need_two(list.files.size(), folder, "images");
  return list;
}

labelled_images read_labelled_images(const std::string &folder, const subset &part) {
  labelled_images data;
  std::error_code error;
  if (!fs::is_directory(folder, error)) fail(in_quotes(folder), ": not a folder");
  std::vector<fs::path> entries;
  for (fs::directory_iterator at(folder, error); !error && at != fs::directory_iterator(); at.increment(error))
    entries.push_back(at->path());
  if (error) fail("cannot read folder ", in_quotes(folder), ": ", error.message());
  std::sort(entries.begin(), entries.end());
  for (const fs::path &entry : entries) {
    if (is_hidden(entry.filename().string())) continue;
    if (!fs::is_directory(entry, error)) {
      if (ends_as_image(entry.string()))
        fail(in_quotes(entry.string()), ": an image outside of the folders, which are named as classes");
      if (!fs::exists(entry, error)) fail(in_quotes(entry.string()), ": a link to nothing");
      continue;
    }
    const std::vector<std::string> files = image_files(entry.string());
    need_some(files.size(), entry.string(), "images");
    data.files.insert(data.files.end(), files.begin(), files.end());
    data.labels.resize(data.files.size(), data.names.size());
    data.names.push_back(entry.filename().string());
    data.folders.push_back(entry.string());
  }
  need_some(data.files.size(), folder, "folders of images");
  const std::vector<size_t> chosen = part.balanced(data.labels);
  keep_of(&data.files, chosen);
  keep_of(&data.labels, chosen);
  need_two(data.files.size(), folder, "images");
  return data;
}
