// Readers of the data that models are judged by.  Whatever is wrong with a file is a failure that names file, line, and what was
// wanted.
#pragma once
#include "common.h"

struct text_list {
  std::string file;
  std::vector<std::string> texts;
  std::vector<size_t> lines;  // of that file, from 1

  size_t size() const { return texts.size(); }
  void add(std::string text, size_t line);
  std::string place(size_t i) const;  // "texts.jsonl:12"
  void keep(const std::vector<size_t> &chosen);
};

// Part of what there is: the first `limit`, or with a seed that many of all at random (0: no limit, and no seed).  Of these, one
// of two random halves, where `half` is 1 or 2; and of these a random share.  Smaller shares are part of larger ones.
struct subset {
  size_t limit = 0;
  uint64_t seed = 0;
  int half = 0;
  double share = 1;
  std::vector<size_t> of(size_t n) const;  // in order
  // The same of things that have a class each: of every class as many, as far as there are.
  std::vector<size_t> balanced(const std::vector<size_t> &classes) const;
};

// "text", plain or JSON lines.
text_list read_texts(const std::string &path, const subset &part);

// STS-B: tab-separated with the score in column 5 and the sentences in 6 and 7, or with a heading that names "score",
// "sentence1" and "sentence2"; or JSON lines with these, or with "text1" and "text2".
struct scored_pairs {
  text_list first, second;
  std::vector<double> scores;
};
scored_pairs read_scored_pairs(const std::string &path, const subset &part);

// SST-2: tab-separated with a heading that names "sentence" (or "text") and "label", or just two columns; or JSON lines with these.
// A label is a name or a whole number, kept as it is written.
struct labelled_texts {
  text_list texts;
  std::vector<std::string> labels;
};
labelled_texts read_labelled_texts(const std::string &path, const subset &part);

// Retrieval: a folder of BEIR (corpus.jsonl, queries.jsonl, qrels/test.tsv) or Cranfield (cran.all.1400, cran.qry, cranqrel).
// Queries that nothing is relevant to are left out.
struct judged_document {
  size_t document;
  double gain;  // more than 0
};
struct retrieval_set {
  text_list documents;  // "title text"
  text_list queries;
  std::vector<std::vector<judged_document>> relevant;  // to each query
  // Of queries that are documents of the set (BEIR's ArguAna: equal ids, the text in it, not judged relevant), that document, which
  // does not count among what is found; or no_document.
  static constexpr size_t no_document = SIZE_MAX;
  std::vector<size_t> itself;
};
struct retrieval_subset {
  subset queries, documents;  // of documents, those that are relevant to a query come first
};
// Cranfield's codes 1 (best) to 4 are gains 4 to 1; -1 and 5 mean of no interest.  BEIR's scores are gains as they are.  `binary`:
// 1 for all of them.
extern const std::vector<std::string> retrieval_files;  // of a folder, BEIR's and Cranfield's: those that there are are read
retrieval_set read_retrieval(const std::string &folder, bool binary, const retrieval_subset &part);

// SQuAD, versions 1.1 and 2.0.
struct squad_question {
  std::string id, text;
  size_t context;
  std::vector<std::string> answers;  // none: the text does not say
};
struct squad_set {
  std::vector<std::string> contexts;
  std::vector<squad_question> questions;
};
squad_set read_squad(const std::string &path, const subset &part);

// Images, by the names of their files; what is in them is read later.
struct image_list {
  std::vector<std::string> files;  // as folder_walk comes to them
};
// All files below a folder whose names say that they are images (ends_as_image), but for hidden ones.
image_list read_images(const std::string &folder, const subset &part);

// A folder of folders, each with the images of one class and named as it is.
struct labelled_images {
  std::vector<std::string> files;
  std::vector<size_t> labels;        // of each file, into names
  std::vector<std::string> names;    // of all classes, sorted
  std::vector<std::string> folders;  // of each class, for errors
};
labelled_images read_labelled_images(const std::string &folder, const subset &part);
std::vector<std::string> image_files(const std::string &folder);  // as read_images, whatever there is
