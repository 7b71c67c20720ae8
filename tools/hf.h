// Reader of a Hugging Face model folder: weights and hyper-parameters as rs_convert takes them, and everything else that the
// folder says of how a text becomes a vector.  All of it is untrusted input.
#pragma once
#include "json.h"
#include "safetensors.h"

#include <deque>
#include <map>
#include <set>
#include <utility>

// The tokenizer.* metadata of a weight file (docs/design.md), from whatever files the folder has.
struct hf_tokenizer {
  std::string type = "wordpiece";   // or "bpe"
  std::vector<std::string> tokens;  // in the order of ids; a hole is the empty string
  std::string unk = "[UNK]";
  std::string prefix = "##";  // of a piece that continues a word
  int64_t max_word_chars = 100;
  bool clean_text = true, chinese_chars = true, strip_accents = true, lowercase = true;
  std::vector<int64_t> merges;  // of BPE: ids of the left and the right token, pair after pair
  std::string suffix;           // of a token that ends a word
  bool split_special = false;
  bool compose = false, prefix_space = false, trim_spans = false, ignore_merges = false;  // of BPE without a suffix
  std::vector<int64_t> added_ids, added_flags;
  std::map<std::string, int64_t> special_ids;  // "pad", "cls", "sep", "mask", "bos", "eos": those that exist
  std::vector<int64_t> single, single_types, pair, pair_types;
  std::vector<std::string> notes;  // what a user should know
};

// The files of a folder that speak of the tokenizer; null where there is none.
struct hf_tokenizer_files {
  json tokenizer;       // tokenizer.json
  json config;          // tokenizer_config.json
  json special_tokens;  // special_tokens_map.json
  json added_tokens;    // added_tokens.json
  std::string vocab;    // vocab.txt
  bool has_vocab = false;
  json vocab_json;     // vocab.json
  std::string merges;  // merges.txt
  bool has_merges = false;
  std::string model_class;   // config.json: tokenizer_class, where tokenizer_config.json names none
  std::string model_type;    // config.json: says the class where neither does
  bool lower_input = false;  // sentence_bert_config.json: do_lower_case
};

hf_tokenizer read_hf_tokenizer(const hf_tokenizer_files &files);  // throws failure

// The image.* metadata of a weight file (docs/design.md): how an image becomes the pixels that a model takes.
struct hf_image {
  std::string resize = "none", resample;
  std::vector<int64_t> resize_size, crop_size;  // width, height; empty: none
  std::string crop_rounding = "floor";
  double rescale = 1 / 255.;
  std::vector<float> mean = {0, 0, 0}, std = {1, 1, 1};
};

// preprocessor: that of transformers, or null; then config.json is one of timm and has "pretrained_cfg".  Throws failure.
hf_image read_hf_image(const json &config, const json &preprocessor);
void hf_image_metadata(rs_writer *w, const hf_image &image);

struct hf_folder {
  std::vector<rs_source_value> config;    // config.json, nested keys joined by '.'
  std::vector<rs_source_tensor> tensors;  // point into `weights`
  bool texts = false, images = false;     // that the model takes
  hf_tokenizer tokenizer;                 // of texts
  hf_image image;                         // of images
  std::string pooling = "mean";
  bool normalize = false;
  int64_t max_tokens = 0;                                    // default limit of a sequence; 0: nothing says
  int64_t position_limit = 0;                                // max_position_embeddings; 0: nothing says
  std::vector<std::pair<std::string, std::string>> prompts;  // name, text
  std::string default_prompt;                                // a name, or empty
  std::string name, license, source;                         // empty where unknown
  std::vector<std::string> notes;                            // what a user should know
  std::set<std::string> files;                               // that were read

  rs_source to_source() const;

  std::deque<safetensors_file> weights;
  std::deque<std::string> strings;  // what `config` and `tensors` point to
};

hf_folder read_hf_folder(const std::string &path);  // throws failure
