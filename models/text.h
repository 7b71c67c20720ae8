// Tokenizers.  Internal to the library: rs_tokenize and rs_encode are the public way in.
#pragma once
#include "../rs.h"

#include <memory>
#include <string>
#include <string_view>
#include <vector>

// Token ids of one sequence with all that belongs to them; reused from text to text so that nothing is allocated after warm-up.
struct rs_tokens {
  std::vector<int32_t> ids, type_ids;
  std::vector<rs_span> spans;
  size_t pair = 0;  // where the second text of a pair begins, or 0
  void clear() {
    ids.clear();
    type_ids.clear();
    spans.clear();
    pair = 0;
  }
};

// Working memory of rs_tokenizer_encode, one a thread.
struct rs_tokenizer_scratch;
struct rs_tokenizer_scratch_free {
  void operator()(rs_tokenizer_scratch *p) const;
};
using rs_tokenizer_scratch_ptr = std::unique_ptr<rs_tokenizer_scratch, rs_tokenizer_scratch_free>;
rs_tokenizer_scratch_ptr rs_tokenizer_scratch_new();

// What added_flags are made of.
enum rs_added_flag {
  RS_ADDED_SINGLE_WORD = 1,  // only where no letter, mark or digit touches it
  RS_ADDED_LSTRIP = 2,       // takes the whitespace on its left with it
  RS_ADDED_RSTRIP = 4,
  RS_ADDED_NORMALIZED = 8,  // sought in the normalised text, itself normalised, instead of the raw text
  RS_ADDED_SPECIAL = 16,
  RS_ADDED_OUTSIDE = 32  // not in the model's own vocabulary: never a piece of a word
};

// All that defines a tokenizer: the tokenizer.* metadata as plain data.
struct rs_tokenizer_spec {
  std::string type = "wordpiece";   // or "bpe"
  std::vector<std::string> tokens;  // by id; a hole is the empty string; of two equal ones the last counts, BPE has none
  // WordPiece.
  std::string unk = "[UNK]", prefix = "##";
  int64_t max_word_chars = 100;  // a longer word is unknown
  bool clean_text = true, chinese_chars = true, strip_accents = true, lowercase = true;
  // BPE.
  std::vector<int64_t> merges;  // ids of the left and the right token, pair after pair, by rank
  std::string suffix = "</w>";  // of a token that ends a word, as CLIP has it; "": words are those of GPT-2
  bool split_special = false;   // of CLIP: "<|startoftext|>" and "<|endoftext|>" are words where they are in the normalised text
  // Of GPT-2: characters are composed; a text that begins without a space gets one; places leave out spaces around a token; a word
  // that is a token is that, whatever its merges make of it.
  bool compose = false, prefix_space = false, trim_spans = false, ignore_merges = false;
  // Both.
  std::vector<int64_t> added_ids, added_flags;
  std::vector<int64_t> single, single_types;  // the template: ids, -1 for the text, with their type ids
  std::vector<int64_t> pair, pair_types;      // -1 for the text, -2 for its pair
};

// How many bytes at the beginning of `s` are whole, valid characters: all of them when the text is valid.
size_t rs_valid_utf8(std::string_view s);

// Immutable once loaded, shared by threads.
struct rs_tokenizer;
rs_status rs_tokenizer_create(const rs_tokenizer_spec &spec, rs_tokenizer **out);  // checks all of it
rs_status rs_tokenizer_load(const rs_model *model, rs_tokenizer **out);            // the same from the tokenizer.* metadata
void rs_tokenizer_free(rs_tokenizer *t);

// The tokens of `text` alone, without special tokens of the template, appended to `out` with type id 0.  Added tokens that occur
// literally in the text ("[MASK]") are matched as the tokenizers library does.  Invalid UTF-8: RS_ERR_TEXT with the byte's offset;
// `out` is then as it was.
rs_status rs_tokenizer_encode(const rs_tokenizer *t, rs_tokenizer_scratch *scratch, rs_text text, rs_tokens *out);

// Wrap a (and b, or nullptr) in the template: [CLS] a [SEP] b [SEP], with type ids.  `a` is tokens [a_begin, a_end) of its list, so
// that windows of a long text need no copy.  Appended to `out`, which is neither of them and notes where b begins.
void rs_tokenizer_template(const rs_tokenizer *t, const rs_tokens &a, size_t a_begin, size_t a_end, const rs_tokens *b,
                           rs_tokens *out);

// The same with tokens [b_begin, b_end) of the pair.
void rs_tokenizer_template(const rs_tokenizer *t, const rs_tokens &a, size_t a_begin, size_t a_end, const rs_tokens *b,
                           size_t b_begin, size_t b_end, rs_tokens *out);

size_t rs_tokenizer_special(const rs_tokenizer *t, bool pair);     // how many tokens the template adds
bool rs_tokenizer_in_template(const rs_tokenizer *t, int32_t id);  // is it one of those?
// Whether token `id` continues the word that the token before it is of: "##ing", one behind a token without "</w>", or, of GPT-2,
// one that begins with what the other ends with: letters, digits, or neither.
bool rs_tokenizer_continues(const rs_tokenizer *t, int32_t before, int32_t id);
int32_t rs_tokenizer_types(const rs_tokenizer *t);  // type ids of a single text are below that
size_t rs_tokenizer_vocab(const rs_tokenizer *t);
const char *rs_tokenizer_token(const rs_tokenizer *t, int32_t id);  // nullptr when out of range
