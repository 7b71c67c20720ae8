// BERT's WordPiece and the byte-level BPE of CLIP and GPT-2 (RoBERTa, ModernBERT), as the tokenizers library of Hugging Face does
// them: the same ids and the same spans for every valid text.
//
//   1 UTF-8
//   2 Unicode, as the reference knows it
//   3 added tokens: literals that are cut out of a text before all else
//   4 the tokenizer: vocabulary, settings, template
//   5 normalisation
//   6 what both kinds share: a text's stretches, the word so far
//   7 WordPiece: words and their pieces
//   8 BPE: words and their merges
//   9 checks and loading
//
// The way of a text.  Added tokens ("[MASK]") are cut out of it, what is left is normalised, cut into words, and each word into
// tokens.
//
// WordPiece: control characters are dropped, Chinese characters set apart by spaces, accents taken off, letters made lower case.
// Words end at whitespace and around every punctuation character, and each is cut into the longest pieces that the vocabulary has,
// from left to right.
//
// BPE: CLIP's characters are composed (NFC) and made lower case.  Words are runs of letters, single digits, runs of anything else
// but whitespace, and the ends of English contractions ('s).  Each begins as its bytes, of which the last is marked by a suffix;
// then of all pairs of neighbours that have a merge the one of lowest rank becomes one token, until none is left.  GPT-2's
// characters stay, or are composed.  Its words are runs of digits, too, and have no suffix but the space before them, if there is
// one; what other whitespace there is makes words of its own.
//
// Most text is ASCII, where all of this is a table look-up for each byte and one hash look-up for each word.  So runs of ASCII go
// that way, and only what lies between them is looked at as Unicode.
#include "text.h"

#include "status.h"

#include <utf8proc.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstring>
#include <limits>
#include <new>
#include <string_view>

// ------------------------------------------------------------------------------------------------ 1 UTF-8

size_t rs_valid_utf8(std::string_view s) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(s[i]); };
  const auto continues = [&](size_t i) { return i < s.size() && (byte(i) & 0xC0) == 0x80; };
  size_t i = 0;
  while (i < s.size()) {
    uint64_t eight;
    if (i + sizeof eight <= s.size()) {
      memcpy(&eight, s.data() + i, sizeof eight);
      if (!(eight & 0x8080808080808080u)) {
        i += sizeof eight;
        continue;
      }
    }
    const uint8_t lead = byte(i);
    if (lead < 0x80) {
      i++;
    } else if (lead >= 0xC2 && lead <= 0xDF && continues(i + 1)) {
      i += 2;
    } else if ((lead & 0xF0) == 0xE0 && continues(i + 1) && continues(i + 2)) {
      if (lead == 0xE0 && byte(i + 1) < 0xA0) return i;   // could be shorter
      if (lead == 0xED && byte(i + 1) >= 0xA0) return i;  // a surrogate
      i += 3;
    } else if (lead >= 0xF0 && lead <= 0xF4 && continues(i + 1) && continues(i + 2) && continues(i + 3)) {
      if (lead == 0xF0 && byte(i + 1) < 0x90) return i;   // could be shorter
      if (lead == 0xF4 && byte(i + 1) >= 0x90) return i;  // beyond U+10FFFF
      i += 4;
    } else {
      return i;
    }
  }
  return i;
}

namespace {

// The character at `p`, which is moved past it.  Valid UTF-8 only.
char32_t decode(const char *&p) {
  const auto take = [&] { return static_cast<uint8_t>(*p++); };
  const char32_t lead = take();
  if (lead < 0x80) return lead;
  char32_t c = lead < 0xE0 ? lead & 0x1F : lead < 0xF0 ? lead & 0x0F : lead & 0x07;
  for (int more = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3; more; more--) c = c << 6 | (take() & 0x3F);
  return c;
}

// The character that ends before `p`, which is moved to its beginning.
char32_t decode_back(const char *&p) {
  do p--;
  while ((static_cast<uint8_t>(*p) & 0xC0) == 0x80);
  const char *at = p;
  return decode(at);
}

constexpr size_t max_utf8 = 4;

size_t encode(char32_t c, char *out) {
  const auto put = [&](size_t i, char32_t bits) { out[i] = static_cast<char>(bits); };
  if (c < 0x80) {
    put(0, c);
    return 1;
  }
  const size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
  for (size_t i = n - 1; i > 0; i--, c >>= 6) put(i, 0x80 | (c & 0x3F));
  put(0, (n == 2 ? 0xC0 : n == 3 ? 0xE0 : 0xF0) | c);
  return n;
}

// ------------------------------------------------------------------------------------------------ 2 Unicode
//
// The reference takes its tables from four places, each of another version of Unicode: categories (crate unicode_categories) are
// of 8.0, canonical decomposition (unicode-normalization-alignments) of 9.0, lower case (the standard library of Rust) of 17.0, the
// \w of added tokens (regex) and the letters and numbers of BPE (Oniguruma) of 16.0.  utf8proc has the version of the day: 2.7 that
// of 14.0, 2.8 of 15.0, 2.11 of 17.0.
//
// So that ids depend on neither, the tables below say where to disbelieve utf8proc.  They come from comparing every code point in
// tokenizers 0.23.3 and utf8proc 2.7 to 2.11, and the character database of 18.0.  A range goes as far as it can: it may hold
// letters, which nobody asks it about, and places still empty, so that later versions are met where they are likely to grow.

struct range {
  char32_t first, last;
};

template <size_t N>
bool in_ranges(const range (&ranges)[N], char32_t c) {
  const range *r = std::lower_bound(ranges, ranges + N, c, [](const range &a, char32_t b) { return a.last < b; });
  return r != ranges + N && r->first <= c;
}

// Unicode 8.0 has no combining mark, punctuation, format or control character here; later ones have.
constexpr range no_category[] = {
    {0x05C8, 0x05F2},   {0x061D, 0x061D},   {0x07FA, 0x0815},   {0x085F, 0x08E2},   {0x09E4, 0x0A00},   {0x0A76, 0x0A80},
    {0x0AF1, 0x0B00},   {0x0B4E, 0x0B55},   {0x0C01, 0x0C3D},   {0x0C64, 0x0C80},   {0x0C82, 0x0CBB},   {0x0CE4, 0x0D00},
    {0x0D02, 0x0D40},   {0x0D64, 0x0DC9},   {0x0EBA, 0x0EBA},   {0x0ECE, 0x0F03},   {0x180F, 0x18A8},   {0x1ABE, 0x1AFF},
    {0x1B43, 0x1B59},   {0x1B74, 0x1B7F},   {0x1DF6, 0x1DFB},   {0x2E43, 0x3000},   {0xA827, 0xA873},   {0xA8C5, 0xA8CD},
    {0xA8FD, 0xA925},   {0xA9BD, 0xA9C0},   {0x10B9D, 0x11000}, {0x1104E, 0x1107E}, {0x110C2, 0x110FF}, {0x111CE, 0x111DA},
    {0x1123E, 0x112A8}, {0x11302, 0x1133B}, {0x11375, 0x114B2}, {0x11644, 0x116AA}, {0x116B8, 0x1171C}, {0x1173F, 0x1246F},
    {0x12475, 0x16A6D}, {0x16B45, 0x16F8E}, {0x16F93, 0x1BC9C}, {0x1BCA4, 0x1D166}, {0x1D245, 0x1D9FF}, {0x1DAB0, 0x1E8CF},
    {0x1E8D7, 0xE0000},
};

// Unicode 9.0 has no decomposition and no combining class here; later ones have.
constexpr range no_normalization[] = {
    {0x05C8, 0x060F},   {0x07F4, 0x0815},   {0x085C, 0x08D3},   {0x09E0, 0x0A32},   {0x0BCE, 0x0C47},   {0x0CCE, 0x0D49},
    {0x0EBA, 0x0EC7},   {0x1715, 0x1733},   {0x1ABE, 0x1B05},   {0x1DF6, 0x1DFA},   {0xA807, 0xA8C3},   {0x1037B, 0x10A0C},
    {0x10AE7, 0x11045}, {0x11047, 0x1107E}, {0x112EB, 0x1133B}, {0x11375, 0x11441}, {0x11447, 0x114BA}, {0x1172C, 0x11C3E},
    {0x11C40, 0x16AEF}, {0x16B37, 0x1BC9D}, {0x1BC9F, 0x1D15D}, {0x1D245, 0x1DFFF}, {0x1E02B, 0x1E8CF},
};

// Capital letters of 16.0 and 17.0, with the distance to their small ones.
struct case_range {
  char32_t first, last;
  int32_t to_lower;
};
constexpr case_range new_capitals[] = {
    {0x1C89, 0x1C89, 1},      {0xA7CB, 0xA7CB, 0x0264 - 0xA7CB},
    {0xA7CC, 0xA7CC, 1},      {0xA7CE, 0xA7CE, 1},
    {0xA7D2, 0xA7D2, 1},      {0xA7D4, 0xA7D4, 1},
    {0xA7DA, 0xA7DA, 1},      {0xA7DC, 0xA7DC, 0x019B - 0xA7DC},
    {0x10D50, 0x10D65, 0x20}, {0x16EA0, 0x16EB8, 0x1B},
};

// Letters, marks and digits that came with 15.0 to 16.0.
constexpr range new_word_characters[] = {
    {0x0897, 0x0897},   {0x0CF3, 0x0CF3},   {0x0ECE, 0x0ECE},   {0x1C89, 0x1C8A},   {0xA7CB, 0xA7CD},   {0xA7DA, 0xA7DC},
    {0x105C0, 0x105F3}, {0x10D40, 0x10D65}, {0x10D69, 0x10D6D}, {0x10D6F, 0x10D85}, {0x10EC2, 0x10EC4}, {0x10EFC, 0x10EFF},
    {0x1123F, 0x11241}, {0x11380, 0x11389}, {0x1138B, 0x1138B}, {0x1138E, 0x1138E}, {0x11390, 0x113B5}, {0x113B7, 0x113C0},
    {0x113C2, 0x113C2}, {0x113C5, 0x113C5}, {0x113C7, 0x113CA}, {0x113CC, 0x113D3}, {0x113E1, 0x113E2}, {0x116D0, 0x116E3},
    {0x11BC0, 0x11BE0}, {0x11BF0, 0x11BF9}, {0x11F00, 0x11F10}, {0x11F12, 0x11F3A}, {0x11F3E, 0x11F42}, {0x11F50, 0x11F5A},
    {0x1342F, 0x1342F}, {0x13440, 0x13455}, {0x13460, 0x143FA}, {0x16100, 0x16139}, {0x16D40, 0x16D6C}, {0x16D70, 0x16D79},
    {0x18CFF, 0x18CFF}, {0x1B132, 0x1B132}, {0x1B155, 0x1B155}, {0x1CCF0, 0x1CCF9}, {0x1DF25, 0x1DF2A}, {0x1E030, 0x1E06D},
    {0x1E08F, 0x1E08F}, {0x1E4D0, 0x1E4F9}, {0x1E5D0, 0x1E5FA}, {0x2B739, 0x2B739}, {0x2EBF0, 0x2EE5D}, {0x31350, 0x323AF},
};

// Unicode 16.0 has no letter, mark or digit here; later ones have.
constexpr range no_word_character[] = {
    {0x0557, 0x0558},   {0x0589, 0x0590},   {0x05C8, 0x05CF},   {0x088F, 0x0896},   {0x0B4E, 0x0B54},   {0x0C5B, 0x0C5C},
    {0x0CD7, 0x0CDC},   {0x1ACF, 0x1AFF},   {0x2080, 0x208F},   {0x209D, 0x20CF},   {0xA7CE, 0xA7CF},   {0xA7D2, 0xA7D2},
    {0xA7D4, 0xA7D4},   {0xA7DD, 0xA7F1},   {0xAB6A, 0xAB6F},   {0x107BB, 0x107FF}, {0x1093A, 0x1097F}, {0x10EC5, 0x10EFB},
    {0x11AF9, 0x11BBF}, {0x11DAA, 0x11EDF}, {0x1246F, 0x1247F}, {0x12544, 0x12F8F}, {0x16E80, 0x16EFF}, {0x16FF2, 0x16FFF},
    {0x187F8, 0x187FF}, {0x18CD6, 0x18CFE}, {0x18D09, 0x1AFEF}, {0x1B123, 0x1B131}, {0x1B168, 0x1B16F}, {0x1CF47, 0x1D164},
    {0x1D245, 0x1D3FF}, {0x1D6A6, 0x1D6A7}, {0x1DF1F, 0x1DF24}, {0x1DF2B, 0x1DFFF}, {0x1E5FB, 0x1E7DF}, {0x2B73A, 0x2B73F},
    {0x2B81E, 0x2B81F}, {0x2CEA2, 0x2CEAF}, {0x323B0, 0xE00FF},
};

// Letters and numbers that came with 15.0 to 16.0.
constexpr range new_letters[] = {
    {0x1C89, 0x1C8A},   {0xA7CB, 0xA7CD},   {0xA7DA, 0xA7DC},   {0x105C0, 0x105F3}, {0x10D4A, 0x10D65}, {0x10D6F, 0x10D85},
    {0x10EC2, 0x10EC4}, {0x1123F, 0x11240}, {0x11380, 0x11389}, {0x1138B, 0x1138B}, {0x1138E, 0x1138E}, {0x11390, 0x113B5},
    {0x113B7, 0x113B7}, {0x113D1, 0x113D1}, {0x113D3, 0x113D3}, {0x11BC0, 0x11BE0}, {0x11F02, 0x11F02}, {0x11F04, 0x11F10},
    {0x11F12, 0x11F33}, {0x1342F, 0x1342F}, {0x13441, 0x13446}, {0x13460, 0x143FA}, {0x16100, 0x1611D}, {0x16D40, 0x16D6C},
    {0x18CFF, 0x18CFF}, {0x1B132, 0x1B132}, {0x1B155, 0x1B155}, {0x1DF25, 0x1DF2A}, {0x1E030, 0x1E06D}, {0x1E4D0, 0x1E4EB},
    {0x1E5D0, 0x1E5ED}, {0x1E5F0, 0x1E5F0}, {0x2B739, 0x2B739}, {0x2EBF0, 0x2EE5D}, {0x31350, 0x323AF},
};
constexpr range new_numbers[] = {
    {0x10D40, 0x10D49}, {0x116D0, 0x116E3}, {0x11BF0, 0x11BF9}, {0x11F50, 0x11F59}, {0x16130, 0x16139},
    {0x16D70, 0x16D79}, {0x1CCF0, 0x1CCF9}, {0x1D2C0, 0x1D2D3}, {0x1E4F0, 0x1E4F9}, {0x1E5F1, 0x1E5FA},
};

// Unicode 16.0 has no letter, or no number, here; later ones have.
constexpr range no_letter[] = {
    {0x0557, 0x0558},   {0x0589, 0x05CF},    {0x088F, 0x089F},   {0x0C5B, 0x0C5C},   {0x0CBE, 0x0CDC},   {0x2080, 0x208F},
    {0x209D, 0x2101},   {0xA7CE, 0xA7CF},    {0xA7D2, 0xA7D2},   {0xA7D4, 0xA7D4},   {0xA7DD, 0xA7F1},   {0xAB6A, 0xAB6F},
    {0x107BB, 0x107FF}, {0x1093A, 0x1097F},  {0x10EC5, 0x10EFF}, {0x11AF9, 0x11BBF}, {0x11D99, 0x11EDF}, {0x16E80, 0x16EFF},
    {0x16FE4, 0x16FFF}, {0x187F8, 0x187FF},  {0x18CD6, 0x18CFE}, {0x18D09, 0x1AFEF}, {0x1B123, 0x1B131}, {0x1B168, 0x1B16F},
    {0x1D6A6, 0x1D6A7}, {0x1DF1F, 0x1DF24},  {0x1DF2B, 0x1E02F}, {0x1E5F1, 0x1E7DF}, {0x2B73A, 0x2B73F}, {0x2B81E, 0x2B81F},
    {0x2CEA2, 0x2CEAF}, {0x323B0, 0x10FFFF},
};
constexpr range no_number[] = {{0x11DAA, 0x11F4F}, {0x1246F, 0x1612F}, {0x16E97, 0x1CCEF}};

// Starters that a canonical composition of Unicode 9.0 may end with.
constexpr range joining_starters[] = {
    {0x09BE, 0x09BE},   {0x09D7, 0x09D7},   {0x0B3E, 0x0B3E},   {0x0B56, 0x0B57},   {0x0BBE, 0x0BBE},   {0x0BD7, 0x0BD7},
    {0x0CC2, 0x0CC2},   {0x0CD5, 0x0CD6},   {0x0D3E, 0x0D3E},   {0x0D57, 0x0D57},   {0x0DCF, 0x0DCF},   {0x0DDF, 0x0DDF},
    {0x102E, 0x102E},   {0x1161, 0x1175},   {0x11A8, 0x11C2},   {0x1B35, 0x1B35},   {0x11127, 0x11127}, {0x1133E, 0x1133E},
    {0x11357, 0x11357}, {0x114B0, 0x114B0}, {0x114BA, 0x114BA}, {0x114BD, 0x114BD}, {0x115AF, 0x115AF},
};

const utf8proc_property_t &property(char32_t c) { return *utf8proc_get_property(static_cast<utf8proc_int32_t>(c)); }

enum class char_kind : uint8_t { other, mark, punctuation, control, space };

char_kind kind_of(char32_t c) {
  switch (property(c).category) {
    case UTF8PROC_CATEGORY_MN:
      if (c == 0x111C9) return char_kind::punctuation;  // that was its category until 11.0
      return in_ranges(no_category, c) ? char_kind::other : char_kind::mark;
    case UTF8PROC_CATEGORY_MC:
      return c == 0x1734 || c == 0x1171E ? char_kind::mark : char_kind::other;  // nonspacing until 14.0 and 16.0
    case UTF8PROC_CATEGORY_SO:
      return c == 0x166D ? char_kind::punctuation : char_kind::other;  // until 12.0
    case UTF8PROC_CATEGORY_PC:
    case UTF8PROC_CATEGORY_PD:
    case UTF8PROC_CATEGORY_PS:
    case UTF8PROC_CATEGORY_PE:
    case UTF8PROC_CATEGORY_PI:
    case UTF8PROC_CATEGORY_PF:
    case UTF8PROC_CATEGORY_PO:
      return in_ranges(no_category, c) ? char_kind::other : char_kind::punctuation;
    case UTF8PROC_CATEGORY_CF:
      return in_ranges(no_category, c) ? char_kind::other : char_kind::control;
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CO:
      return char_kind::control;
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return char_kind::space;
    case UTF8PROC_CATEGORY_SC:
    case UTF8PROC_CATEGORY_SK:
    case UTF8PROC_CATEGORY_SM:
      return c < 0x80 ? char_kind::punctuation : char_kind::other;  // $+<=>^`|~
    default:
      return char_kind::other;
  }
}

// Tabs and line ends are both.
bool is_space(char32_t c, char_kind kind) { return kind == char_kind::space || (c >= '\t' && c <= '\r') || c == 0x85; }
bool is_space(char32_t c) { return is_space(c, kind_of(c)); }

// The blocks of CJK ideographs that BERT names, and no later one.
bool is_chinese(char32_t c) {
  return c >= 0x3400 &&
         ((c >= 0x4E00 && c <= 0x9FFF) || c <= 0x4DBF || (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x20000 && c <= 0x2A6DF) ||
          (c >= 0x2A700 && c <= 0x2B81F) || (c >= 0x2B920 && c <= 0x2CEAF) || (c >= 0x2F800 && c <= 0x2FA1F));
}

// One to one; the only letter that becomes two is handled by its caller.
char32_t to_lower(char32_t c) {
  const utf8proc_property_t &p = property(c);
  if (p.lowercase_seqindex != UINT16_MAX) return static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c)));
  if (p.category == UTF8PROC_CATEGORY_CN)
    for (const case_range &r : new_capitals)
      if (c >= r.first && c <= r.last) return static_cast<char32_t>(static_cast<int32_t>(c) + r.to_lower);
  return c;
}

// The \w of regular expressions: Alphabetic, marks, decimal digits, connecting punctuation, joiners.
bool is_word_character(char32_t c) {
  if (in_ranges(new_word_characters, c)) return true;
  if (in_ranges(no_word_character, c)) return false;
  switch (property(c).category) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    case UTF8PROC_CATEGORY_CF:
      return c == 0x200C || c == 0x200D;
    case UTF8PROC_CATEGORY_SO:  // letters in circles and squares
      return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
             (c >= 0x1F170 && c <= 0x1F189);
    default:
      return false;
  }
}

// What BPE makes words of.
enum class bpe_class : uint8_t { letter, number, space, other };

bpe_class bpe_class_of(char32_t c) {
  switch (property(c).category) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      return in_ranges(no_letter, c) ? bpe_class::other : bpe_class::letter;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return in_ranges(no_number, c) ? bpe_class::other : bpe_class::number;
    case UTF8PROC_CATEGORY_CN:
      if (in_ranges(new_letters, c)) return bpe_class::letter;
      return in_ranges(new_numbers, c) ? bpe_class::number : bpe_class::other;
    default:
      return is_space(c) ? bpe_class::space : bpe_class::other;
  }
}

// The character that both compose to in NFC, or 0.
char32_t compose(char32_t a, char32_t b) {
  utf8proc_int32_t both[] = {static_cast<utf8proc_int32_t>(a), static_cast<utf8proc_int32_t>(b)};
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE);
  if (utf8proc_normalize_utf32(both, 2, options) != 1) return 0;
  const auto c = static_cast<char32_t>(both[0]);
  return in_ranges(no_normalization, c) ? 0 : c;
}

// ------------------------------------------------------------------------------------------------ 3 added tokens

struct added_token {
  std::string text;
  int32_t id;
  int64_t flags;
};

// A set of literals, found leftmost first and of those the longest.
class literal_set {
 public:
  bool empty() const { return sorted_.empty(); }

  void add(added_token token) { sorted_.push_back(std::move(token)); }

  // Of equal literals the last stays.
  void finish() {
    std::reverse(sorted_.begin(), sorted_.end());
    std::stable_sort(sorted_.begin(), sorted_.end(), [](const added_token &a, const added_token &b) { return a.text < b.text; });
    const auto equal = [](const added_token &a, const added_token &b) { return a.text == b.text; };
    sorted_.erase(std::unique(sorted_.begin(), sorted_.end(), equal), sorted_.end());
    for (const added_token &token : sorted_) is_first_[static_cast<uint8_t>(token.text[0])] = true;
    only_first_ = std::count(is_first_, is_first_ + 256, true) == 1;
  }

  const std::vector<added_token> &all() const { return sorted_; }

  // The next one at `from` or after it, with its place; nullptr when there is none.
  const added_token *find(std::string_view text, size_t from, size_t *at) const {
    for (size_t i = from; (i = find_first_byte(text, i)) < text.size(); i++)
      if (const added_token *token = longest_at(text, i)) {
        *at = i;
        return token;
      }
    return nullptr;
  }

 private:
  size_t find_first_byte(std::string_view text, size_t i) const {
    if (only_first_) return std::min(text.find(sorted_[0].text[0], i), text.size());
    while (i < text.size() && !is_first_[static_cast<uint8_t>(text[i])]) i++;
    return i;
  }

  // Narrows the literals down to those that share 1, 2, 3 … bytes with the text.
  const added_token *longest_at(std::string_view text, size_t at) const {
    const added_token *best = nullptr;
    auto first = sorted_.begin(), last = sorted_.end();
    for (size_t depth = 0; first != last; depth++) {
      if (first->text.size() == depth) best = &*first++;
      if (at + depth == text.size()) break;
      const auto next = static_cast<uint8_t>(text[at + depth]);
      const auto byte = [depth](const added_token &token) { return static_cast<uint8_t>(token.text[depth]); };
      first = std::lower_bound(first, last, next, [&](const added_token &token, uint8_t b) { return byte(token) < b; });
      last = std::upper_bound(first, last, next, [&](uint8_t b, const added_token &token) { return b < byte(token); });
    }
    return best;
  }

  std::vector<added_token> sorted_;
  bool is_first_[256] = {};
  bool only_first_ = false;  // all begin with the same byte, as "[CLS]" and "[MASK]" do
};

bool touches_word(std::string_view text, size_t begin, size_t end) {
  const char *before = text.data() + begin, *after = text.data() + end;
  return (begin > 0 && is_word_character(decode_back(before))) || (end < text.size() && is_word_character(decode(after)));
}

// Where the whitespace before `end` begins, but not before `limit`.
size_t space_begin(std::string_view text, size_t limit, size_t end) {
  const char *p = text.data() + end, *q = p;
  while (q > text.data() + limit && is_space(decode_back(q))) p = q;
  return static_cast<size_t>(p - text.data());
}

size_t space_end(std::string_view text, size_t begin) {
  const char *const end = text.data() + text.size(), *p = text.data() + begin, *q = p;
  while (q < end && is_space(decode(q))) p = q;
  return static_cast<size_t>(p - text.data());
}

// Cuts `text` at the literals: between(begin, end) for what lies between them, token(id, begin, end) for each.
template <class Between, class Token>
void cut_out(const literal_set &literals, std::string_view text, Between between, Token token) {
  size_t done = 0, at = 0;
  for (size_t from = 0; const added_token *found = literals.find(text, from, &at);) {
    size_t begin = at, end = at + found->text.size();
    from = end;
    if (found->flags & RS_ADDED_SINGLE_WORD && touches_word(text, begin, end)) continue;
    if (found->flags & RS_ADDED_LSTRIP) begin = std::max(space_begin(text, done, begin), done);
    if (found->flags & RS_ADDED_RSTRIP) end = space_end(text, end);
    if (done < begin) between(done, begin);
    if (begin < end) token(found->id, begin, end);
    done = end;  // which may lie in the whitespace that the one before took: it is given back, as the tokenizers library does
  }
  if (done < text.size()) between(done, text.size());
}

// ------------------------------------------------------------------------------------------------ 4 the tokenizer

// A polynomial of the bytes, so that the hash of a word grows byte by byte as the word is read.
constexpr uint64_t hash_step(uint64_t hash, char byte) { return hash * 0x9E3779B97F4A7C15u + static_cast<uint8_t>(byte); }

// Pieces of words: a table with open addressing.  A piece that continues a word is another one than the same bytes at its
// beginning; it is stored without its prefix.
constexpr int max_probes = 1024;  // that a table takes to find a place

class piece_table {
 public:
  static constexpr int32_t none = -1;

  void reserve(size_t pieces) {
    unsigned bits = 4;
    while ((size_t(1) << bits) < 2 * pieces) bits++;
    shift_ = 64 - bits;
    slots_.assign(size_t(1) << bits, slot{0, 0, none, 0});
  }

  // `bytes` lie at `offset` of the text that find() is given.  False when too many pieces hash alike, which only malice can do.
  // `replaced` becomes the id that these bytes had.
  bool insert(const char *text, uint32_t offset, uint32_t length, bool continues, int32_t id, int32_t *replaced = nullptr) {
    uint64_t hash = 0;
    for (uint32_t i = 0; i < length; i++) hash = hash_step(hash, text[offset + i]);
    const uint64_t mixed = mix(hash, continues);
    size_t i = mixed >> shift_;
    for (int probes = 0; slots_[i].id != none; i = (i + 1) & (slots_.size() - 1)) {
      if (is(slots_[i], mixed, text, text + offset, length, continues)) break;
      if (++probes == max_probes) return false;
    }
    if (replaced) *replaced = slots_[i].id;
    slots_[i] = {static_cast<uint32_t>(mixed), offset, id, length << 1 | continues};
    longest_[continues] = std::max(longest_[continues], size_t(length));
    return true;
  }

  int32_t find(const char *text, uint64_t hash, const char *bytes, size_t length, bool continues) const {
    const uint64_t mixed = mix(hash, continues);
    for (size_t i = mixed >> shift_; slots_[i].id != none; i = (i + 1) & (slots_.size() - 1))
      if (is(slots_[i], mixed, text, bytes, length, continues)) return slots_[i].id;
    return none;
  }

  size_t longest(bool continues) const { return longest_[continues]; }

 private:
  struct slot {
    uint32_t tag;  // of the hash, to spare most comparisons
    uint32_t offset;
    int32_t id;
    uint32_t length_continues;
  };

  static uint64_t mix(uint64_t hash, bool continues) {
    hash += continues;
    return (hash ^ hash >> 32) * 0xD6E8FEB86659FD93u;
  }

  static bool is(const slot &s, uint64_t mixed, const char *text, const char *bytes, size_t length, bool continues) {
    return s.tag == static_cast<uint32_t>(mixed) && s.length_continues == (length << 1 | continues) &&
           memcmp(text + s.offset, bytes, length) == 0;
  }

  std::vector<slot> slots_;
  unsigned shift_ = 64;
  size_t longest_[2] = {0, 0};
};

// What becomes of two neighbours in a word.
struct merge {
  int32_t left, right;
  int32_t rank;  // the lowest comes first
  int32_t id;    // of the token that they become
};

// All merges by their pair, with open addressing.
class merge_table {
 public:
  static constexpr int32_t none = -1;

  void reserve(size_t merges) {
    unsigned bits = 4;
    while ((size_t(1) << bits) < 2 * merges) bits++;
    shift_ = 64 - bits;
    slots_.assign(size_t(1) << bits, merge{none, none, none, none});
  }

  // False when too many pairs hash alike.  `known` becomes whether the pair was there before; then it stays as it was.
  bool insert(const merge &m, bool *known) {
    size_t i = first_slot(m.left, m.right);
    for (int probes = 0; slots_[i].left != none; i = next(i)) {
      *known = slots_[i].left == m.left && slots_[i].right == m.right;
      if (*known) return true;
      if (++probes == max_probes) return false;
    }
    *known = false;
    slots_[i] = m;
    return true;
  }

  // nullptr when there is none.
  const merge *find(int32_t left, int32_t right) const {
    for (size_t i = first_slot(left, right); slots_[i].left != none; i = next(i))
      if (slots_[i].left == left && slots_[i].right == right) return &slots_[i];
    return nullptr;
  }

 private:
  size_t first_slot(int32_t left, int32_t right) const {
    uint64_t hash = (static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right)) * 0x9E3779B97F4A7C15u;
    hash = (hash ^ hash >> 32) * 0xD6E8FEB86659FD93u;
    return hash >> shift_;
  }
  size_t next(size_t i) const { return (i + 1) & (slots_.size() - 1); }

  std::vector<merge> slots_;
  unsigned shift_ = 64;
};

// unicode: a byte that only section 5 can deal with.  punctuation: of BPE all that is neither a letter nor a space.
enum class ascii_kind : uint8_t { unicode, word, space, punctuation };

enum class tokenizer_kind : uint8_t { wordpiece, bpe };

struct template_token {
  int32_t id;  // or one of the two below
  int32_t type_id;
};
constexpr int32_t text_slot = -1, pair_slot = -2;

}  // namespace

struct rs_tokenizer {
  tokenizer_kind kind = tokenizer_kind::wordpiece;
  std::vector<char> text;         // of all tokens, a NUL after each
  std::vector<uint32_t> offsets;  // by id
  piece_table pieces;             // of BPE as bytes of `word_bytes`, without the suffix; those without one "continue"
  std::string prefix;             // of a piece that continues a word
  int32_t unk = 0;
  size_t max_word_chars = 0;
  bool clean_text = false, chinese_chars = false, strip_accents = false, lowercase = false;
  literal_set raw, normalized;  // added tokens, by the text that they are sought in
  std::vector<bool> added;      // by id
  std::vector<template_token> single, pair;
  // What becomes of a byte below 128, and of a punctuation character the token.
  ascii_kind kinds[256];
  char lower[128];
  int32_t punctuation[128];

  // BPE.
  std::string suffix;  // of a token that ends a word
  merge_table merges;
  int32_t byte_ids[2][256];  // of a byte inside a word, and of its last
  std::vector<char> word_bytes;
  // Merging makes one token of a word that is in `pieces`, which it need not; by id, found out when it is first met.
  std::unique_ptr<std::atomic<bool>[]> whole;
  bool split_special = false;
  bool gpt2 = false;  // words, and all below, are its; else CLIP's
  bool compose = false, prefix_space = false, trim_spans = false, ignore_merges = false;
  std::vector<std::string> needles;  // a text has at least one wherever a token of `normalized` is; none: that is not known
};

struct combining {
  char32_t c;
  int32_t combining_class;
  uint32_t order;
  bool takes_source;  // not a further part of a decomposition
};

// A token of a word that is being merged.
struct bpe_symbol {
  int32_t id;         // -1: it has become part of the one before
  uint32_t end;       // in the word
  int32_t rank;       // of the merge with the next one
  int32_t merged_id;  // what that would make of both
};
struct bpe_link {
  uint32_t before, after;
};
struct bpe_candidate {
  uint64_t order;  // rank, then place
  int32_t left, right;
};

struct rs_tokenizer_scratch {
  std::vector<char> word;
  std::vector<rs_span> sources;  // for each byte of the word the character that it came from, where they are not side by side
  std::vector<uint64_t> hashes;  // of the word's parts that begin where a piece is sought
  std::vector<combining> marks;  // since the last starter
  std::vector<rs_span> mark_sources;
  std::string normalized;  // a whole stretch of text, where added tokens are sought in it
  std::vector<rs_span> normalized_sources;
  std::vector<bpe_symbol> symbols;
  std::vector<bpe_link> links;
  std::vector<bpe_candidate> candidates;
};

namespace {

// ------------------------------------------------------------------------------------------------ 5 normalisation

constexpr int max_decomposition = 8;  // four is the most that there is

// Canonical decomposition (NFD), one character at a time: part(character, combining class, is it the first) for each.
template <class Part>
void decompose(char32_t c, Part part) {
  const utf8proc_property_t &p = property(c);
  const bool hangul = c >= 0xAC00 && c <= 0xD7A3;
  const bool decomposes = hangul || (p.decomp_seqindex != UINT16_MAX && p.decomp_type == 0);
  if ((!decomposes && p.combining_class == 0) || in_ranges(no_normalization, c)) return part(c, 0, true);
  if (!decomposes) return part(c, p.combining_class, true);
  utf8proc_int32_t parts[max_decomposition];
  const utf8proc_ssize_t n =
      utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c), parts, max_decomposition, UTF8PROC_DECOMPOSE, nullptr);
  for (utf8proc_ssize_t i = 0; i < n; i++)
    part(static_cast<char32_t>(parts[i]), property(static_cast<char32_t>(parts[i])).combining_class, i == 0);
}

void sort_marks(std::vector<combining> *marks) {
  std::sort(marks->begin(), marks->end(), [](const combining &a, const combining &b) {
    return a.combining_class != b.combining_class ? a.combining_class < b.combining_class : a.order < b.order;
  });
}

// Of WordPiece.  Characters go in with their places in the text; normalised ones come out at sink.put(character, place).
//
// Places are those of the reference.  It knows each normalised character as one that takes the place of the next character of the
// text, or as one that was added and shares the place of the one before it.  Where combining marks change their order, places
// therefore stay in order, and are dealt out anew.
template <class Sink>
class bert_normalizer {
 public:
  bert_normalizer(const rs_tokenizer &t, rs_tokenizer_scratch &s, Sink &sink) : t_(t), s_(s), sink_(sink) {
    s_.marks.clear();
    s_.mark_sources.clear();
  }

  void put(char32_t c, rs_span from) {
    if (t_.clean_text) {
      const char_kind kind = kind_of(c);
      if (c == '\t' || c == '\n' || c == '\r' || kind == char_kind::space) c = ' ';
      else if (kind == char_kind::control || c == 0xFFFD) return;
    }
    if (t_.chinese_chars && is_chinese(c)) {
      strip(' ', from);
      strip(c, from);
      strip(' ', from);
    } else {
      strip(c, from);
    }
  }

  // At the end, and before anything that does not go through put().
  void flush() {
    if (s_.marks.empty()) return;
    sort_marks(&s_.marks);
    auto source = s_.mark_sources.begin();
    for (const combining &mark : s_.marks) {
      if (mark.takes_source) source_ = *source++;
      unless_mark(mark.c);
    }
    s_.marks.clear();
    s_.mark_sources.clear();
  }

 private:
  // Canonical decomposition (NFD) without nonspacing marks.
  void strip(char32_t c, rs_span from) {
    if (!t_.strip_accents) {
      source_ = from;
      lower(c);
      return;
    }
    decompose(c, [&](char32_t part, int combining_class, bool first) {
      if (combining_class) mark(part, combining_class, from, first);
      else starter(part, from, first);
    });
  }

  void starter(char32_t c, rs_span from, bool takes_source) {
    flush();
    if (takes_source) source_ = from;
    unless_mark(c);
  }

  void mark(char32_t c, int combining_class, rs_span from, bool takes_source) {
    s_.marks.push_back({c, combining_class, static_cast<uint32_t>(s_.marks.size()), takes_source});
    if (takes_source) s_.mark_sources.push_back(from);
  }

  void unless_mark(char32_t c) {
    if (kind_of(c) != char_kind::mark) lower(c);
  }

  void lower(char32_t c) {
    if (!t_.lowercase) {
      sink_.put(c, source_);
    } else if (c == 0x130) {  // İ becomes i and a dot above
      sink_.put('i', source_);
      sink_.put(0x307, source_);
    } else {
      sink_.put(to_lower(c), source_);
    }
  }

  const rs_tokenizer &t_;
  rs_tokenizer_scratch &s_;
  Sink &sink_;
  rs_span source_ = {0, 0};
};

// Of BPE: canonical composition (NFC), of CLIP also white space as single spaces and lower case.
//
// Here too places are those of the reference: a composed character takes the place of the first of those that it came from.
template <class Sink>
class bpe_normalizer {
 public:
  bpe_normalizer(const rs_tokenizer &t, rs_tokenizer_scratch &s, Sink &sink)
      : s_(s), sink_(sink), composes_(!t.gpt2 || t.compose), folds_(!t.gpt2) {
    clear();
  }

  void put(char32_t c, rs_span from) {
    if (!composes_) return sink_.put(c, from);
    s_.mark_sources.push_back(from);
    decompose(c, [this](char32_t part, int combining_class, bool first) {
      if (combining_class) s_.marks.push_back({part, combining_class, static_cast<uint32_t>(s_.marks.size()), first});
      else starter(part, first);
    });
  }

  // At the end, and before anything that does not go through put().
  void flush() {
    compose_marks();
    emit_all();
    end_space();
    clear();
  }

 private:
  // A starter that was composed of others takes the places of all of them.
  void starter(char32_t c, bool takes_source) {
    compose_marks();
    if (has_starter_ && s_.marks.empty() && in_ranges(joining_starters, c))
      if (const char32_t both = compose(starter_, c)) {
        starter_ = both;
        starter_sources_ += takes_source;
        return;
      }
    emit_all();
    starter_ = c;
    starter_sources_ = takes_source;
    has_starter_ = true;
  }

  // A mark is kept from the starter by one before it that stays and whose class is not lower.
  void compose_marks() {
    if (s_.marks.empty()) return;
    sort_marks(&s_.marks);
    size_t kept = 0;
    for (const combining &mark : s_.marks) {
      const bool reaches = has_starter_ && (kept == 0 || s_.marks[kept - 1].combining_class < mark.combining_class);
      const char32_t both = reaches ? compose(starter_, mark.c) : 0;
      if (both) {
        starter_ = both;
        starter_sources_ += mark.takes_source;
      } else {
        s_.marks[kept++] = mark;
      }
    }
    s_.marks.resize(kept);
  }

  void emit_all() {
    if (has_starter_) emit(starter_, starter_sources_);
    has_starter_ = false;
    for (const combining &mark : s_.marks) emit(mark.c, mark.takes_source);
    s_.marks.clear();
  }

  // `sources`: how many characters of the text it takes the place of.  If none, it shares that of the one before it.
  void emit(char32_t c, size_t sources) {
    if (sources) {
      place_ = s_.mark_sources[next_source_];
      next_source_ += sources;
    } else if (next_source_) {
      place_ = s_.mark_sources[next_source_ - 1];
    }
    if (!folds_) return sink_.put(c, place_);
    if (is_space(c)) {
      has_space_ = true;
      space_ = place_;
      return;
    }
    end_space();
    if (c == 0x130) {  // İ becomes i and a dot above
      sink_.put('i', place_);
      sink_.put(0x307, place_);
    } else {
      sink_.put(to_lower(c), place_);
    }
  }

  // One space for all of them, at the place of the last.
  void end_space() {
    if (has_space_) sink_.put(' ', space_);
    has_space_ = false;
  }

  void clear() {
    s_.marks.clear();
    s_.mark_sources.clear();
    next_source_ = 0;
  }

  rs_tokenizer_scratch &s_;
  Sink &sink_;
  const bool composes_, folds_;
  char32_t starter_ = 0;
  size_t starter_sources_ = 0, next_source_ = 0;
  bool has_starter_ = false, has_space_ = false;
  rs_span place_ = {0, 0}, space_ = {0, 0};
};

// Keeps the normalised text with the place of every byte.
struct normalized_text {
  void put(char32_t c, rs_span from) {
    char bytes[max_utf8];
    const size_t n = encode(c, bytes);
    text.append(bytes, n);
    sources.insert(sources.end(), n, from);
  }

  std::string &text;
  std::vector<rs_span> &sources;
};

// ------------------------------------------------------------------------------------------------ 6 what both kinds share

// The way of a text down to its words.  Kind (sections 7 and 8) has words(begin, end) for a stretch of the text, put(character,
// place) for normalised characters, end_word(), and normalizer_of<Sink>.
template <class Kind>
class word_reader {
 public:
  void run() {
    if (t_.raw.empty()) return stretch(0, text_.size());
    cut_out(
        t_.raw, text_, [this](size_t begin, size_t end) { stretch(begin, end); },
        [this](int32_t id, size_t begin, size_t end) { token(id, span(begin, end)); });
  }

 protected:
  word_reader(const rs_tokenizer &t, rs_tokenizer_scratch &s, std::string_view text, rs_tokens *out)
      : t_(t), s_(s), text_(text), ids_(out->ids), spans_(out->spans) {}

  static rs_span span(size_t begin, size_t end) { return {static_cast<uint32_t>(begin), static_cast<uint32_t>(end)}; }

  void token(int32_t id, rs_span from) {
    ids_.push_back(id);
    spans_.push_back(from);
  }

  size_t offset(const char *p) const { return static_cast<size_t>(p - text_.data()); }

  // The bytes of words from `i` on: as many as are of the kind `word`.
  size_t ascii_run(size_t i, size_t end) {
    if (!chars_) begin_ = static_cast<uint32_t>(i);
    else if (side_by_side_ && begin_ + n_ != i && !is_too_long()) list_sources();  // something was dropped in between
    if (s_.word.size() < n_ + (end - i)) s_.word.resize(n_ + (end - i));
    const size_t begin = i;
    char *word = s_.word.data() + n_;
    uint64_t hash = hash_;
    for (; i < end && t_.kinds[static_cast<uint8_t>(text_[i])] == ascii_kind::word; i++) {
      *word = t_.lower[static_cast<uint8_t>(text_[i])];
      hash = hash_step(hash, *word++);
    }
    end_ = static_cast<uint32_t>(i);
    chars_ += i - begin;
    if (is_too_long()) return i;
    hash_ = hash;
    n_ += i - begin;
    if (!side_by_side_)
      for (size_t k = begin; k < i; k++) s_.sources.push_back(span(k, k + 1));
    return i;
  }

  void append(char32_t c, rs_span from) {
    if (!chars_) begin_ = from.begin;
    end_ = from.end;
    chars_++;
    if (is_too_long()) return;
    if (side_by_side_ && (c >= 0x80 || from.begin != begin_ + n_ || from.end != from.begin + 1)) list_sources();
    if (s_.word.size() < n_ + max_utf8) s_.word.resize(2 * (n_ + max_utf8));
    char *word = s_.word.data() + n_;
    const size_t n = encode(c, word);
    for (size_t i = 0; i < n; i++) hash_ = hash_step(hash_, word[i]);
    if (!side_by_side_) s_.sources.insert(s_.sources.end(), n, from);
    n_ += n;
  }

  // Such a word is unknown, and its bytes are not kept.
  bool is_too_long() const { return chars_ > t_.max_word_chars; }

  // The bytes of the text that bytes [begin, end) of the word came from.
  rs_span source_of(size_t begin, size_t end) const {
    if (side_by_side_) return span(begin_ + begin, begin_ + end);
    return {s_.sources[begin].begin, s_.sources[end - 1].end};
  }

  void clear_word() {
    n_ = chars_ = 0;
    hash_ = 0;
    side_by_side_ = true;
  }

  const rs_tokenizer &t_;
  rs_tokenizer_scratch &s_;
  const std::string_view text_;
  std::vector<int32_t> &ids_;
  std::vector<rs_span> &spans_;

  // The word so far.
  size_t n_ = 0, chars_ = 0;
  uint64_t hash_ = 0;
  uint32_t begin_ = 0, end_ = 0;  // in the text
  bool side_by_side_ = true;      // its bytes are those of the text from begin_ on

 private:
  Kind &kind() { return static_cast<Kind &>(*this); }

  // A part of the text that no word crosses the ends of.
  void stretch(size_t begin, size_t end) {
    if (may_have_normalized(begin, end)) normalized_words(begin, end);
    else kind().words(begin, end);
    kind().end_word();
  }

  bool may_have_normalized(size_t begin, size_t end) const {
    if (t_.normalized.empty()) return false;
    const std::string_view text = text_.substr(begin, end - begin);
    const auto found = [text](const std::string &needle) { return text.find(needle) != text.npos; };
    return t_.needles.empty() || std::any_of(t_.needles.begin(), t_.needles.end(), found);
  }

  // The words of a stretch where added tokens are to be found in the normalised text.
  void normalized_words(size_t begin, size_t end) {
    s_.normalized.clear();
    s_.normalized_sources.clear();
    normalized_text whole{s_.normalized, s_.normalized_sources};
    typename Kind::template normalizer_of<normalized_text> to_whole(t_, s_, whole);
    for (const char *p = text_.data() + begin; p < text_.data() + end;) {
      const size_t at = offset(p);
      const char32_t c = decode(p);
      to_whole.put(c, span(at, offset(p)));
    }
    to_whole.flush();
    const std::string_view text = s_.normalized;
    cut_out(
        t_.normalized, text,
        [&](size_t from, size_t to) {
          for (const char *p = text.data() + from; p < text.data() + to;) {
            const rs_span source = s_.normalized_sources[static_cast<size_t>(p - text.data())];
            const char32_t c = decode(p);
            kind().put(c, source);
          }
          kind().end_word();
        },
        [&](int32_t id, size_t from, size_t to) {
          token(id, {s_.normalized_sources[from].begin, s_.normalized_sources[to - 1].end});
        });
  }

  // From here on the bytes of the word have their places one by one.
  void list_sources() {
    side_by_side_ = false;
    s_.sources.clear();
    for (uint32_t i = 0; i < n_; i++) s_.sources.push_back({begin_ + i, begin_ + i + 1});
  }
};

// ------------------------------------------------------------------------------------------------ 7 WordPiece

class wordpiece_encoder : public word_reader<wordpiece_encoder> {
 public:
  template <class Sink>
  using normalizer_of = bert_normalizer<Sink>;

  wordpiece_encoder(const rs_tokenizer &t, rs_tokenizer_scratch &s, std::string_view text, rs_tokens *out)
      : word_reader(t, s, text, out), normalizer_(t, s, *this) {}

  void words(size_t begin, size_t end) {
    for (size_t i = begin; i < end;) {
      const auto byte = static_cast<uint8_t>(text_[i]);
      switch (t_.kinds[byte]) {
        case ascii_kind::word:
          i = ascii_run(i, end);
          break;
        case ascii_kind::space:
          end_word();
          i++;
          break;
        case ascii_kind::punctuation:
          end_word();
          token(t_.punctuation[byte], span(i, i + 1));
          i++;
          break;
        case ascii_kind::unicode:
          i = unicode_run(i, end);
          break;
      }
    }
  }

  // A normalised character: from section 5.
  void put(char32_t c, rs_span from) {
    const char_kind kind = kind_of(c);
    if (is_space(c, kind)) {
      end_word();
    } else if (kind == char_kind::punctuation) {
      end_word();
      append(c, from);
      end_word();
    } else {
      append(c, from);
    }
  }

  void end_word() {
    if (!chars_) return;
    if (is_too_long()) {
      token(t_.unk, {begin_, end_});
    } else {
      const int32_t id = t_.pieces.find(t_.text.data(), hash_, s_.word.data(), n_, false);
      if (id != piece_table::none) token(id, {begin_, end_});
      else split_word();
    }
    clear_word();
  }

 private:
  // Everything up to the next byte of ASCII that is not dropped.
  size_t unicode_run(size_t i, size_t end) {
    const char *p = text_.data() + i, *const last = text_.data() + end;
    while (p < last && t_.kinds[static_cast<uint8_t>(*p)] == ascii_kind::unicode) {
      const size_t at = offset(p);
      const char32_t c = decode(p);
      normalizer_.put(c, span(at, offset(p)));
    }
    normalizer_.flush();
    return offset(p);
  }

  // The longest piece that the word begins with, then the longest that goes on, and so on; if there is none, the whole word is
  // unknown.
  void split_word() {
    const char *const word = s_.word.data();
    const size_t tokens_before = ids_.size();
    for (size_t begin = 0; begin < n_;) {
      const bool continues = begin > 0;
      size_t length = std::min(n_ - begin, t_.pieces.longest(continues));
      if (s_.hashes.size() < length + 1) s_.hashes.resize(length + 1);
      uint64_t *const hashes = s_.hashes.data();
      hashes[0] = 0;
      for (size_t i = 0; i < length; i++) hashes[i + 1] = hash_step(hashes[i], word[begin + i]);
      int32_t id = piece_table::none;
      for (; length > 0; length--) {
        id = t_.pieces.find(t_.text.data(), hashes[length], word + begin, length, continues);
        if (id != piece_table::none) break;
      }
      if (id == piece_table::none) {
        ids_.resize(tokens_before);
        spans_.resize(tokens_before);
        token(t_.unk, {begin_, end_});
        return;
      }
      token(id, source_of(begin, begin + length));
      begin += length;
    }
  }

  bert_normalizer<wordpiece_encoder> normalizer_;
};

// ------------------------------------------------------------------------------------------------ 8 BPE

class bpe_encoder : public word_reader<bpe_encoder> {
 public:
  template <class Sink>
  using normalizer_of = bpe_normalizer<Sink>;

  bpe_encoder(const rs_tokenizer &t, rs_tokenizer_scratch &s, std::string_view text, rs_tokens *out)
      : word_reader(t, s, text, out), normalizer_(t, s, *this) {}

  void words(size_t begin, size_t end) {
    for (size_t i = begin; i < end;) {
      if (is_unicode(i, end)) {
        i = unicode_run(i, end);
        continue;
      }
      switch (t_.kinds[static_cast<uint8_t>(text_[i])]) {
        case ascii_kind::word:
          i = letters(i, end);
          break;
        case ascii_kind::space:
          put_space(static_cast<char32_t>(text_[i]), span(i, i + 1));
          i++;
          break;
        default:
          put(static_cast<char32_t>(text_[i]), span(i, i + 1));
          i++;
      }
    }
  }

  // A normalised character.
  void put(char32_t c, rs_span from) {
    begin_text(c, from);
    if (contraction_ && goes_on_as_contraction(c, from)) return;
    switch (bpe_class_of(c)) {
      case bpe_class::letter:
        begin_or_go_on(word_kind::letters);
        append(c, from);
        break;
      case bpe_class::number:
        if (t_.gpt2) begin_or_go_on(word_kind::numbers);
        else finish();
        append(c, from);
        if (!t_.gpt2) finish();
        break;
      case bpe_class::space:
        put_space(c, from);
        break;
      case bpe_class::other:
        begin_other(c == '\'');
        append(c, from);
        if (special_ == special::named && n_ == 2 && s_.word[0] == '|' && s_.word[1] == '>') finish();
        break;
    }
  }

  // At an added token and at the end, of CLIP also at whitespace.
  void end_word() {
    if (space_) append_space();
    finish();
    special_ = special::none;
    text_begins_ = true;
  }

 private:
  enum class word_kind : uint8_t { none, letters, numbers, other };
  // Of "<|endoftext|>" in normalised text, where the expression that finds words has it: the words that end at what is there.  Only
  // one that is cut off at its end is not found without it.
  enum class special : uint8_t { none, opened, named };

  // A byte that composition may change has its bit 7 set, or the next one has.
  bool is_unicode(size_t i, size_t end) const {
    return static_cast<uint8_t>(text_[i]) >= 0x80 || (i + 1 < end && static_cast<uint8_t>(text_[i + 1]) >= 0x80);
  }

  // A text that begins without a space gets one, at the place of its first character.
  void begin_text(char32_t c, rs_span from) {
    if (text_begins_ && t_.prefix_space && c != ' ') wait(' ', from);
    text_begins_ = false;
  }

  void put_space(char32_t c, rs_span from) {
    if (!t_.gpt2) return end_word();
    begin_text(c, from);
    wait(c, from);
  }

  // Of GPT-2.  The last character of a run of whitespace waits: if it is a space, it belongs to the word behind it, else it is a
  // word of its own; what is before it is another.  At the end of the text all of them are one word.
  void wait(char32_t c, rs_span from) {
    if (space_) append_space();
    else finish();
    space_ = c;
    space_place_ = from;
  }
  void append_space() {
    append(space_, space_place_);
    space_ = 0;
  }

  size_t unicode_run(size_t i, size_t end) {
    const char *p = text_.data() + i, *const last = text_.data() + end;
    while (p < last && is_unicode(offset(p), end)) {
      const size_t at = offset(p);
      const char32_t c = decode(p);
      normalizer_.put(c, span(at, offset(p)));
    }
    normalizer_.flush();
    return offset(p);
  }

  // Letters of ASCII, but for the last of them if it is before anything else than ASCII.
  size_t letters(size_t i, size_t end) {
    if (contraction_) {
      put(static_cast<char32_t>(t_.lower[static_cast<uint8_t>(text_[i])]), span(i, i + 1));
      return i + 1;
    }
    begin_text('a', span(i, i + 1));
    begin_or_go_on(word_kind::letters);
    size_t stop = i + 1;
    while (stop < end && t_.kinds[static_cast<uint8_t>(text_[stop])] == ascii_kind::word) stop++;
    if (stop < end && static_cast<uint8_t>(text_[stop]) >= 0x80) stop--;
    return ascii_run(i, stop);
  }

  void begin_or_go_on(word_kind kind) {
    const bool joins = space_ == ' ';
    if (space_ || word_kind_ != kind) finish();
    word_kind_ = kind;
    if (!space_) return;
    append_space();
    if (joins) return;
    finish();
    word_kind_ = kind;
  }

  void begin_other(bool quote) {
    const bool begins = word_kind_ != word_kind::other && space_ != ' ';
    begin_or_go_on(word_kind::other);
    contraction_ = begins && quote;
  }

  // After ' at the beginning of a word: s, t, m, d, re, ve and ll end the word, anything else begins another.  True when `c` is
  // dealt with.
  bool goes_on_as_contraction(char32_t c, rs_span from) {
    const auto is_one_of = [c](std::string_view letters) { return c < 0x80 && letters.find(static_cast<char>(c)) != letters.npos; };
    if (n_ == 1 && is_one_of("stmd")) {
      append(c, from);
      contraction_ = false;
      finish();
      return true;
    }
    if (n_ == 1 && is_one_of("rvl")) {
      append(c, from);
      return true;
    }
    if (n_ == 2 && c == (s_.word[1] == 'l' ? U'l' : U'e')) {
      append(c, from);
      contraction_ = false;
      finish();
      return true;
    }
    end_contraction();
    return false;
  }

  // It was none: ' is a word of its own, and a letter behind it begins the next.
  void end_contraction() {
    contraction_ = false;
    if (n_ < 2) return;
    const auto letter = static_cast<char32_t>(s_.word[1]);
    const rs_span quote_place = source_of(0, 1), letter_place = source_of(1, 2);
    clear_word();
    append('\'', quote_place);
    begin_or_go_on(word_kind::letters);
    append(letter, letter_place);
  }

  void finish() {
    if (contraction_) end_contraction();
    word_kind_ = word_kind::none;
    if (!n_) return;
    find_special();
    const int32_t id = t_.pieces.find(t_.word_bytes.data(), hash_, s_.word.data(), n_, false);
    if (id == piece_table::none) {
      merge_word();
    } else if (t_.ignore_merges) {
      token(id, {begin_, end_});
    } else {
      std::atomic<bool> &whole = t_.whole[static_cast<size_t>(id)];
      if (whole.load(std::memory_order_relaxed)) {
        token(id, {begin_, end_});
      } else {
        const size_t before = ids_.size();
        merge_word();
        if (ids_.size() == before + 1 && ids_[before] == id) whole.store(true, std::memory_order_relaxed);
      }
    }
    clear_word();
  }

  void find_special() {
    if (!t_.split_special) return;
    const std::string_view word(s_.word.data(), n_);
    if (word == "<|") special_ = special::opened;
    else if (special_ == special::opened && (word == "startoftext" || word == "endoftext")) special_ = special::named;
    else special_ = special::none;
  }

  void merge_word() {
    const char *const word = s_.word.data();
    if (s_.symbols.size() < n_) s_.symbols.resize(n_);
    for (size_t i = 0; i < n_; i++)
      s_.symbols[i] = {t_.byte_ids[i + 1 == n_][static_cast<uint8_t>(word[i])], static_cast<uint32_t>(i + 1), no_rank, 0};
    const size_t n = n_ <= max_scanned ? merge_by_scan() : merge_by_heap();
    for (size_t i = 0, begin = 0; i < n; i++) {
      token(s_.symbols[i].id, source_of(begin, s_.symbols[i].end));
      begin = s_.symbols[i].end;
    }
  }

  // Looks through all pairs for each merge: the fastest for a word of usual length.  Returns how many symbols are left.
  size_t merge_by_scan() {
    bpe_symbol *const symbols = s_.symbols.data();
    size_t n = n_;
    for (size_t i = 0; i + 1 < n; i++) rank(&symbols[i], symbols[i + 1]);
    while (n > 1) {
      size_t best = 0;
      for (size_t i = 1; i + 1 < n; i++)
        if (symbols[i].rank < symbols[best].rank) best = i;
      if (symbols[best].rank == no_rank) break;
      symbols[best].id = symbols[best].merged_id;
      symbols[best].end = symbols[best + 1].end;
      std::copy(symbols + best + 2, symbols + n, symbols + best + 1);
      n--;
      if (best + 1 < n) rank(&symbols[best], symbols[best + 1]);
      if (best > 0) rank(&symbols[best - 1], symbols[best]);
    }
    return n;
  }

  void rank(bpe_symbol *left, const bpe_symbol &right) const {
    const merge *m = t_.merges.find(left->id, right.id);
    left->rank = m ? m->rank : no_rank;
    left->merged_id = m ? m->id : 0;
  }

  // Of n symbols in n log n time.  A candidate whose symbols have changed since is passed over.
  size_t merge_by_heap() {
    const auto n = static_cast<uint32_t>(n_);
    const auto later = [](const bpe_candidate &a, const bpe_candidate &b) { return a.order > b.order; };
    auto &symbols = s_.symbols;
    auto &links = s_.links;
    auto &heap = s_.candidates;
    if (links.size() < n) links.resize(n);
    heap.clear();
    const auto add = [&](uint32_t at) {
      const int32_t left = symbols[at].id, right = symbols[links[at].after].id;
      if (const merge *m = t_.merges.find(left, right)) heap.push_back({static_cast<uint64_t>(m->rank) << 32 | at, left, right});
      else return false;
      return true;
    };
    for (uint32_t i = 0; i < n; i++) links[i] = {i - 1, i + 1};
    for (uint32_t i = 0; i + 1 < n; i++) add(i);
    std::make_heap(heap.begin(), heap.end(), later);
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end(), later);
      const bpe_candidate c = heap.back();
      heap.pop_back();
      const auto at = static_cast<uint32_t>(c.order);
      const uint32_t next = links[at].after;
      if (symbols[at].id != c.left || next == n || symbols[next].id != c.right) continue;
      symbols[at].id = t_.merges.find(c.left, c.right)->id;
      symbols[at].end = symbols[next].end;
      symbols[next].id = -1;
      const uint32_t after = links[at].after = links[next].after;
      if (after < n) links[after].before = at;
      if (after < n && add(at)) std::push_heap(heap.begin(), heap.end(), later);
      if (at > 0 && add(links[at].before)) std::push_heap(heap.begin(), heap.end(), later);
    }
    size_t left = 0;
    for (uint32_t i = 0; i < n; i = links[i].after) symbols[left++] = symbols[i];
    return left;
  }

  static constexpr int32_t no_rank = std::numeric_limits<int32_t>::max();
  static constexpr size_t max_scanned = 48;

  bpe_normalizer<bpe_encoder> normalizer_;
  word_kind word_kind_ = word_kind::none;
  special special_ = special::none;
  bool contraction_ = false;  // the word is ' or ' and a letter, and may become one of those
  bool text_begins_ = true;
  char32_t space_ = 0;  // of GPT-2: whitespace that waits for what comes; 0: none
  rs_span space_place_ = {0, 0};
};

// ------------------------------------------------------------------------------------------------ 9 checks and loading

// What a file can ask for: no tokenizer in use comes near, and no text takes more than seconds.
constexpr int64_t max_max_word_chars = 100000;
constexpr size_t max_bpe_token = 512;             // bytes: what merges make is looked up at load
constexpr size_t max_bpe_text = size_t(1) << 30;  // NFC may make three times as much of it

constexpr int64_t known_flags =
    RS_ADDED_SINGLE_WORD | RS_ADDED_LSTRIP | RS_ADDED_RSTRIP | RS_ADDED_NORMALIZED | RS_ADDED_SPECIAL | RS_ADDED_OUTSIDE;

rs_status check_utf8(const char *name, size_t index, std::string_view s) {
  const size_t valid = rs_valid_utf8(s);
  if (valid == s.size()) return RS_OK;
  return rs_fail(RS_ERR_FORMAT, "%s[%zu]: invalid UTF-8 at byte %zu (0x%02x)", name, index, valid, static_cast<uint8_t>(s[valid]));
}

rs_status check_settings(const rs_tokenizer_spec &spec) {
  if (spec.type != "wordpiece" && spec.type != "bpe")
    return rs_fail(RS_ERR_UNSUPPORTED, "tokenizer.type: '%s', known are 'wordpiece' and 'bpe'", spec.type.c_str());
  if (spec.tokens.empty()) return rs_fail(RS_ERR_FORMAT, "tokenizer.tokens: the vocabulary is empty");
  if (spec.tokens.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
    return rs_fail(RS_ERR_LIMIT, "tokenizer.tokens: %zu tokens, ids have 31 bits", spec.tokens.size());
  if (spec.type == "bpe") {
    if (rs_valid_utf8(spec.suffix) != spec.suffix.size()) return rs_fail(RS_ERR_FORMAT, "tokenizer.suffix: invalid UTF-8");
    return RS_OK;
  }
  if (spec.max_word_chars < 1 || spec.max_word_chars > max_max_word_chars)
    return rs_fail(RS_ERR_FORMAT, "tokenizer.max_word_chars: %" PRId64 ", allowed are 1 to %" PRId64, spec.max_word_chars,
                   max_max_word_chars);
  if (rs_valid_utf8(spec.prefix) != spec.prefix.size()) return rs_fail(RS_ERR_FORMAT, "tokenizer.prefix: invalid UTF-8");
  return RS_OK;
}

rs_status copy_tokens(const rs_tokenizer_spec &spec, rs_tokenizer *t) {
  uint64_t bytes = 0;
  for (const std::string &token : spec.tokens) bytes += token.size() + 1;
  if (bytes > std::numeric_limits<uint32_t>::max() / 2)
    return rs_fail(RS_ERR_LIMIT, "tokenizer.tokens: %" PRIu64 " bytes, allowed are 2 GiB", bytes);
  t->text.resize(bytes);
  t->offsets.resize(spec.tokens.size());
  uint32_t offset = 0;
  for (size_t id = 0; id < spec.tokens.size(); id++) {
    const std::string &token = spec.tokens[id];
    if (const rs_status status = check_utf8("tokenizer.tokens", id, token)) return status;
    t->offsets[id] = offset;
    memcpy(t->text.data() + offset, token.c_str(), token.size() + 1);
    offset += static_cast<uint32_t>(token.size()) + 1;
  }
  return RS_OK;
}

// An id of a file, inside the vocabulary.
rs_status check_id(const rs_tokenizer_spec &spec, const char *name, int64_t id) {
  if (id >= 0 && static_cast<uint64_t>(id) < spec.tokens.size()) return RS_OK;
  return rs_fail(RS_ERR_FORMAT, "%s: token id %" PRId64 " outside of the vocabulary of %zu", name, id, spec.tokens.size());
}

rs_status check_added(const rs_tokenizer_spec &spec, std::vector<bool> *outside) {
  if (spec.added_ids.size() != spec.added_flags.size())
    return rs_fail(RS_ERR_FORMAT, "tokenizer.added_flags: %zu values for %zu ids", spec.added_flags.size(), spec.added_ids.size());
  std::vector<bool> seen(spec.tokens.size());
  outside->assign(spec.tokens.size(), false);
  for (size_t i = 0; i < spec.added_ids.size(); i++) {
    const int64_t id = spec.added_ids[i], flags = spec.added_flags[i];
    if (const rs_status status = check_id(spec, "tokenizer.added_ids", id)) return status;
    if (flags & ~known_flags)
      return rs_fail(RS_ERR_UNSUPPORTED, "tokenizer.added_flags[%zu]: %" PRId64 " has unknown bits", i, flags);
    const auto at = static_cast<size_t>(id);
    if (spec.tokens[at].empty()) return rs_fail(RS_ERR_FORMAT, "tokenizer.added_ids: token %" PRId64 " is the empty string", id);
    if (seen[at]) return rs_fail(RS_ERR_FORMAT, "tokenizer.added_ids: token id %" PRId64 " twice", id);
    seen[at] = true;
    if (flags & RS_ADDED_OUTSIDE) (*outside)[at] = true;
  }
  return RS_OK;
}

rs_status index_pieces(const rs_tokenizer_spec &spec, const std::vector<bool> &outside, rs_tokenizer *t) {
  const std::string &prefix = spec.prefix;
  const auto continues = [&](const std::string &token) {
    return token.size() > prefix.size() && token.compare(0, prefix.size(), prefix) == 0;
  };
  t->pieces.reserve(spec.tokens.size() + static_cast<size_t>(std::count_if(spec.tokens.begin(), spec.tokens.end(), continues)));
  int32_t unk = piece_table::none;
  for (size_t i = 0; i < spec.tokens.size(); i++) {
    const std::string &token = spec.tokens[i];
    if (token.empty() || outside[i]) continue;
    const auto id = static_cast<int32_t>(i);
    const auto length = static_cast<uint32_t>(token.size()), cut = static_cast<uint32_t>(prefix.size());
    bool fits = t->pieces.insert(t->text.data(), t->offsets[i], length, false, id);
    if (continues(token)) fits = fits && t->pieces.insert(t->text.data(), t->offsets[i] + cut, length - cut, true, id);
    if (!fits) return rs_fail(RS_ERR_FORMAT, "tokenizer.tokens[%zu]: hashes like too many tokens before it", i);
    if (token == spec.unk) unk = id;
  }
  if (unk == piece_table::none) return rs_fail(RS_ERR_FORMAT, "tokenizer.unk: '%s' is not in the vocabulary", spec.unk.c_str());
  t->unk = unk;
  return RS_OK;
}

// Byte-level BPE writes each byte as a character that can be seen: those of Latin-1 that can as themselves, the others from U+0100
// on.
struct byte_alphabet {
  char32_t character[256];
  int16_t byte[0x144];  // of each character; -1: none

  byte_alphabet() {
    std::fill(std::begin(byte), std::end(byte), int16_t(-1));
    char32_t next = 0x100;
    for (char32_t b = 0; b < 256; b++) {
      const bool visible = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xFF && b != 0xAD);
      character[b] = visible ? b : next++;
      byte[character[b]] = static_cast<int16_t>(b);
    }
  }

  // What characters `s` stand for, appended; false where one stands for no byte.
  bool bytes_of(std::string_view s, std::vector<char> *out) const {
    for (const char *p = s.data(); p < s.data() + s.size();) {
      const char32_t c = decode(p);
      if (c >= std::size(byte) || byte[c] < 0) return false;
      out->push_back(static_cast<char>(byte[c]));
    }
    return true;
  }
};

// Tokens by the bytes that they stand for, in `pieces`: without the suffix, as pieces that do not continue, where they have it.
class bpe_index {
 public:
  bpe_index(const rs_tokenizer_spec &spec, const std::vector<bool> &outside, rs_tokenizer *t)
      : spec_(spec), outside_(outside), t_(*t), places_(spec.tokens.size(), place{0, 0, no_bytes}) {}

  rs_status run() {
    if (!alphabet_.bytes_of(spec_.suffix, &suffix_))
      return rs_fail(RS_ERR_UNSUPPORTED, "tokenizer.suffix: '%s' has characters that stand for no byte", spec_.suffix.c_str());
    RS_TRY(add_tokens());
    RS_TRY(find_bytes());
    return add_merges();
  }

 private:
  enum token_form : uint8_t { no_bytes, inside, ends_word };
  struct place {  // in word_bytes
    uint32_t begin, length;
    token_form form;
  };

  rs_status add_tokens() {
    t_.pieces.reserve(spec_.tokens.size());
    t_.word_bytes.reserve(t_.text.size());
    t_.whole = std::make_unique<std::atomic<bool>[]>(spec_.tokens.size());
    for (size_t i = 0; i < spec_.tokens.size(); i++) {
      const std::string &token = spec_.tokens[i];
      if (token.empty() || outside_[i]) continue;
      if (token.size() > max_bpe_token)
        return rs_fail(RS_ERR_LIMIT, "tokenizer.tokens[%zu]: has %zu bytes, allowed are %zu", i, token.size(), max_bpe_token);
      const size_t begin = t_.word_bytes.size();
      if (!alphabet_.bytes_of(token, &t_.word_bytes)) {
        t_.word_bytes.resize(begin);  // no text becomes this
        continue;
      }
      const bool ends = drop_suffix(begin);
      const auto length = static_cast<uint32_t>(t_.word_bytes.size() - begin);
      places_[i] = {static_cast<uint32_t>(begin), length, ends ? ends_word : inside};
      int32_t other = piece_table::none;
      if (!t_.pieces.insert(t_.word_bytes.data(), places_[i].begin, length, !ends, static_cast<int32_t>(i), &other))
        return rs_fail(RS_ERR_FORMAT, "tokenizer.tokens[%zu]: hashes like too many tokens before it", i);
      if (other != piece_table::none)
        return rs_fail(RS_ERR_FORMAT, "tokenizer.tokens[%zu]: '%s' has the id %d too", i, token.c_str(), other);
    }
    return RS_OK;
  }

  // Of the bytes from `begin` on: whether they end with the suffix, which is then taken off.
  // Without one, as of GPT-2, every token is.
  bool drop_suffix(size_t begin) {
    std::vector<char> &bytes = t_.word_bytes;
    if (bytes.size() - begin <= suffix_.size() || !std::equal(suffix_.rbegin(), suffix_.rend(), bytes.rbegin())) return false;
    bytes.resize(bytes.size() - suffix_.size());
    return true;
  }

  int32_t find(const char *bytes, size_t length, bool ends) const {
    uint64_t hash = 0;
    for (size_t i = 0; i < length; i++) hash = hash_step(hash, bytes[i]);
    return t_.pieces.find(t_.word_bytes.data(), hash, bytes, length, !ends);
  }

  rs_status find_bytes() {
    for (size_t b = 0; b < 256; b++)
      for (const bool last : {false, true}) {
        const char byte = static_cast<char>(b);
        t_.byte_ids[last][b] = find(&byte, 1, last || suffix_.empty());
        if (t_.byte_ids[last][b] == piece_table::none)
          return rs_fail(RS_ERR_FORMAT, "tokenizer.tokens: the one of byte 0x%02zx%s is missing", b,
                         last && !suffix_.empty() ? " at the end of a word" : "");
      }
    return RS_OK;
  }

  rs_status add_merges() {
    const size_t n = spec_.merges.size() / 2;
    if (spec_.merges.size() % 2) return rs_fail(RS_ERR_FORMAT, "tokenizer.merges: %zu ids make no pairs", spec_.merges.size());
    if (n >= static_cast<size_t>(std::numeric_limits<int32_t>::max()))
      return rs_fail(RS_ERR_LIMIT, "tokenizer.merges: %zu, ranks have 31 bits", n);
    t_.merges.reserve(n);
    for (size_t i = 0; i < n; i++) {
      const int64_t left = spec_.merges[2 * i], right = spec_.merges[2 * i + 1];
      for (const int64_t id : {left, right}) {
        RS_TRY(check_id(spec_, "tokenizer.merges", id));
        if (places_[static_cast<size_t>(id)].form == no_bytes)
          return rs_fail(RS_ERR_FORMAT, "tokenizer.merges[%zu]: token %" PRId64 " is no part of words", i, id);
      }
      const int32_t id = find_both(static_cast<size_t>(left), static_cast<size_t>(right));
      if (id == piece_table::none)
        return rs_fail(RS_ERR_FORMAT, "tokenizer.merges[%zu]: makes '%s%s', which is not in the vocabulary", i,
                       spec_.tokens[static_cast<size_t>(left)].c_str(), spec_.tokens[static_cast<size_t>(right)].c_str());
      bool known = false;
      if (!t_.merges.insert({static_cast<int32_t>(left), static_cast<int32_t>(right), static_cast<int32_t>(i), id}, &known))
        return rs_fail(RS_ERR_FORMAT, "tokenizer.merges[%zu]: hashes like too many merges before it", i);
      if (known)
        return rs_fail(RS_ERR_FORMAT, "tokenizer.merges[%zu]: tokens %" PRId64 " and %" PRId64 " for the second time", i, left,
                       right);
    }
    return RS_OK;
  }

  // The token whose text is that of both.  Their texts decide, as in the reference: "x<" and "/w>" make "x</w>".
  int32_t find_both(size_t left, size_t right) {
    char both[2 * max_bpe_token];
    size_t n = 0;
    const auto put = [&](const char *bytes, size_t length) {
      std::copy(bytes, bytes + length, both + n);  // there may be none
      n += length;
    };
    const auto put_token = [&](size_t id) { put(t_.word_bytes.data() + places_[id].begin, places_[id].length); };
    put_token(left);
    if (places_[left].form == ends_word) put(suffix_.data(), suffix_.size());
    put_token(right);
    bool ends = places_[right].form == ends_word;
    if (!ends && n > suffix_.size() && !memcmp(both + n - suffix_.size(), suffix_.data(), suffix_.size())) {
      n -= suffix_.size();
      ends = true;
    }
    return find(both, n, ends);
  }

  const rs_tokenizer_spec &spec_;
  const std::vector<bool> &outside_;
  rs_tokenizer &t_;
  const byte_alphabet alphabet_;
  std::vector<char> suffix_;
  std::vector<place> places_;  // by id
};

// What sections 5 and 8 make of a character of ASCII.
void tabulate_bpe_ascii(rs_tokenizer *t) {
  std::fill(std::begin(t->kinds), std::end(t->kinds), ascii_kind::unicode);
  for (char32_t c = 0; c < 128; c++) {
    const bpe_class of = bpe_class_of(c);
    t->lower[c] = static_cast<char>(t->gpt2 ? c : to_lower(c));
    t->kinds[c] = of == bpe_class::letter ? ascii_kind::word : of == bpe_class::space ? ascii_kind::space : ascii_kind::punctuation;
  }
}

// What is in a text wherever a token is in the normalised text: all of it where nothing is normalised; of spaces, which GPT-2
// keeps, two; else a character of ASCII that only comes from itself: letters come from capitals, ; and ` from what is composed to
// them, < = and > may be composed to others.
void find_needles(rs_tokenizer *t) {
  constexpr size_t most = 64;  // each is sought in every stretch of text: a file with thousands is normalised instead
  for (const added_token &token : t->normalized.all()) {
    const size_t at = token.text.find_first_of("!\"#$%&'()*+,-./0123456789:?@[\\]^_{|}~");
    std::string needle = at == token.text.npos ? "" : token.text.substr(at, 1);
    if (t->gpt2 && !t->compose) needle = token.text;
    else if (t->gpt2 && needle.empty() && token.text.find("  ") != token.text.npos) needle = "  ";
    if (needle.empty() || t->needles.size() == most) {
      t->needles.clear();
      return;
    }
    if (std::find(t->needles.begin(), t->needles.end(), needle) == t->needles.end()) t->needles.push_back(needle);
  }
}

// What sections 5 and 7 make of a character of ASCII, once and for all.
void tabulate_ascii(rs_tokenizer *t) {
  std::fill(std::begin(t->kinds), std::end(t->kinds), ascii_kind::unicode);
  for (char32_t c = 0; c < 128; c++) {
    const char_kind kind = kind_of(c);
    const bool kept_control = c == '\t' || c == '\n' || c == '\r' || !t->clean_text;
    const char as_byte = static_cast<char>(c);
    t->lower[c] = static_cast<char>(t->lowercase ? to_lower(c) : c);
    t->punctuation[c] = t->pieces.find(t->text.data(), hash_step(0, as_byte), &as_byte, 1, false);
    if (t->punctuation[c] == piece_table::none) t->punctuation[c] = t->unk;
    if (kind == char_kind::control && !kept_control) continue;
    t->kinds[c] = is_space(c, kind)                ? ascii_kind::space
                  : kind == char_kind::punctuation ? ascii_kind::punctuation
                                                   : ascii_kind::word;
  }
}

template <class Normalizer>
void normalize(const rs_tokenizer &t, rs_tokenizer_scratch *scratch, std::string_view s, normalized_text *out) {
  Normalizer to_out(t, *scratch, *out);
  for (const char *p = s.data(); p < s.data() + s.size();) to_out.put(decode(p), {0, 0});
  to_out.flush();
}

rs_status index_added(const rs_tokenizer_spec &spec, rs_tokenizer *t) {
  rs_tokenizer_scratch scratch;
  t->added.resize(spec.tokens.size());
  for (size_t i = 0; i < spec.added_ids.size(); i++) {
    const auto id = static_cast<int32_t>(spec.added_ids[i]);
    const std::string &token = spec.tokens[static_cast<size_t>(id)];
    t->added[static_cast<size_t>(id)] = true;
    if (!(spec.added_flags[i] & RS_ADDED_NORMALIZED)) {
      t->raw.add({token, id, spec.added_flags[i]});
      continue;
    }
    std::string text;
    std::vector<rs_span> sources;
    normalized_text sink{text, sources};
    if (t->kind == tokenizer_kind::bpe) normalize<bpe_normalizer<normalized_text>>(*t, &scratch, token, &sink);
    else normalize<bert_normalizer<normalized_text>>(*t, &scratch, token, &sink);
    if (text.empty()) return rs_fail(RS_ERR_UNSUPPORTED, "tokenizer.added_ids: nothing is left of token %d when normalised", id);
    t->normalized.add({std::move(text), id, spec.added_flags[i]});
  }
  t->raw.finish();
  t->normalized.finish();
  return RS_OK;
}

rs_status read_template(const rs_tokenizer_spec &spec, const char *name, const std::vector<int64_t> &ids,
                        const std::vector<int64_t> &types, bool pair, std::vector<template_token> *out) {
  if (ids.size() != types.size())
    return rs_fail(RS_ERR_FORMAT, "%s_types: %zu values for %zu tokens", name, types.size(), ids.size());
  size_t texts = 0, pairs = 0;
  for (size_t i = 0; i < ids.size(); i++) {
    if (ids[i] == text_slot) texts++;
    else if (ids[i] == pair_slot && pair) pairs++;
    else if (const rs_status status = check_id(spec, name, ids[i])) return status;
    if (types[i] < 0 || types[i] > std::numeric_limits<int32_t>::max())
      return rs_fail(RS_ERR_FORMAT, "%s_types[%zu]: %" PRId64 " is no type id", name, i, types[i]);
    out->push_back({static_cast<int32_t>(ids[i]), static_cast<int32_t>(types[i])});
  }
  if (texts != 1 || pairs != (pair ? 1 : 0))
    return rs_fail(RS_ERR_FORMAT, "%s: has the text %zu times and its pair %zu times, wanted are 1 and %d", name, texts, pairs,
                   pair);
  return RS_OK;
}

rs_status create(const rs_tokenizer_spec &spec, rs_tokenizer *t) {
  std::vector<bool> outside;
  RS_TRY(check_settings(spec));
  RS_TRY(copy_tokens(spec, t));
  RS_TRY(check_added(spec, &outside));
  if (spec.type == "bpe") {
    t->kind = tokenizer_kind::bpe;
    t->suffix = spec.suffix;
    t->gpt2 = spec.suffix.empty();
    t->split_special = spec.split_special && !t->gpt2;
    t->compose = spec.compose, t->prefix_space = spec.prefix_space && t->gpt2;
    t->trim_spans = spec.trim_spans && t->gpt2, t->ignore_merges = spec.ignore_merges && t->gpt2;
    t->max_word_chars = std::numeric_limits<size_t>::max();
    RS_TRY(bpe_index(spec, outside, t).run());
    tabulate_bpe_ascii(t);
  } else {
    t->prefix = spec.prefix;
    t->max_word_chars = static_cast<size_t>(spec.max_word_chars);
    t->clean_text = spec.clean_text;
    t->chinese_chars = spec.chinese_chars;
    t->strip_accents = spec.strip_accents;
    t->lowercase = spec.lowercase;
    RS_TRY(index_pieces(spec, outside, t));
    tabulate_ascii(t);
  }
  RS_TRY(index_added(spec, t));
  if (t->kind == tokenizer_kind::bpe) find_needles(t);
  RS_TRY(read_template(spec, "tokenizer.single", spec.single, spec.single_types, false, &t->single));
  return read_template(spec, "tokenizer.pair", spec.pair, spec.pair_types, true, &t->pair);
}

rs_status read_meta(const rs_model *model, const char *key, rs_meta_kind kind, const char *kind_name, rs_meta *out) {
  if (rs_model_meta(model, key, out) != RS_OK) return rs_fail(RS_ERR_FORMAT, "%s is missing", key);
  if (out->kind != kind) return rs_fail(RS_ERR_FORMAT, "%s is not %s", key, kind_name);
  return RS_OK;
}

rs_status read_str(const rs_model *model, const char *key, std::string *out) {
  rs_meta meta;
  if (const rs_status status = read_meta(model, key, RS_META_STR, "a string", &meta)) return status;
  out->assign(meta.str, meta.count);
  return RS_OK;
}

rs_status read_bool(const rs_model *model, const char *key, bool *out) {
  rs_meta meta;
  if (const rs_status status = read_meta(model, key, RS_META_BOOL, "true or false", &meta)) return status;
  *out = meta.boolean;
  return RS_OK;
}

rs_status read_i64s(const rs_model *model, const char *key, std::vector<int64_t> *out) {
  rs_meta meta;
  if (const rs_status status = read_meta(model, key, RS_META_I64S, "a list of integers", &meta)) return status;
  if (meta.count) out->assign(meta.i64s, meta.i64s + meta.count);
  return RS_OK;
}

rs_status read_tokens(const rs_model *model, std::vector<std::string> *out) {
  rs_meta meta;
  if (const rs_status status = read_meta(model, "tokenizer.tokens", RS_META_STRS, "a list of strings", &meta)) return status;
  out->reserve(meta.count);
  for (size_t i = 0; i < meta.count; i++) {
    size_t length = 0;
    const char *token = rs_meta_string(&meta, i, &length);
    if (!token) return rs_fail(RS_ERR_FORMAT, "tokenizer.tokens[%zu] cannot be read", i);
    out->emplace_back(token, length);
  }
  return RS_OK;
}

rs_status read_wordpiece(const rs_model *model, rs_tokenizer_spec *spec) {
  RS_TRY(read_str(model, "tokenizer.unk", &spec->unk));
  RS_TRY(read_str(model, "tokenizer.prefix", &spec->prefix));
  rs_meta chars;
  RS_TRY(read_meta(model, "tokenizer.max_word_chars", RS_META_I64, "an integer", &chars));
  spec->max_word_chars = chars.i64;
  RS_TRY(read_bool(model, "tokenizer.clean_text", &spec->clean_text));
  RS_TRY(read_bool(model, "tokenizer.chinese_chars", &spec->chinese_chars));
  RS_TRY(read_bool(model, "tokenizer.strip_accents", &spec->strip_accents));
  return read_bool(model, "tokenizer.lowercase", &spec->lowercase);
}

rs_status read_bpe(const rs_model *model, rs_tokenizer_spec *spec) {
  RS_TRY(read_i64s(model, "tokenizer.merges", &spec->merges));
  RS_TRY(read_str(model, "tokenizer.suffix", &spec->suffix));
  if (!spec->suffix.empty()) return read_bool(model, "tokenizer.split_special", &spec->split_special);
  RS_TRY(read_bool(model, "tokenizer.compose", &spec->compose));
  RS_TRY(read_bool(model, "tokenizer.prefix_space", &spec->prefix_space));
  RS_TRY(read_bool(model, "tokenizer.trim_spans", &spec->trim_spans));
  return read_bool(model, "tokenizer.ignore_merges", &spec->ignore_merges);
}

rs_status read_spec(const rs_model *model, rs_tokenizer_spec *spec) {
  RS_TRY(read_str(model, "tokenizer.type", &spec->type));
  const bool bpe = spec->type == "bpe";
  if (!bpe && spec->type != "wordpiece") return check_settings(*spec);  // the other keys may be those of another type
  RS_TRY(read_tokens(model, &spec->tokens));
  RS_TRY(bpe ? read_bpe(model, spec) : read_wordpiece(model, spec));
  const struct {
    const char *key;
    std::vector<int64_t> *value;
  } lists[] = {{"tokenizer.added_ids", &spec->added_ids}, {"tokenizer.added_flags", &spec->added_flags},
               {"tokenizer.single", &spec->single},       {"tokenizer.single_types", &spec->single_types},
               {"tokenizer.pair", &spec->pair},           {"tokenizer.pair_types", &spec->pair_types}};
  for (const auto &list : lists)
    if (const rs_status status = read_i64s(model, list.key, list.value)) return status;
  // Nothing here reads these, but others will.
  for (const char *key :
       {"tokenizer.pad_id", "tokenizer.cls_id", "tokenizer.sep_id", "tokenizer.mask_id", "tokenizer.bos_id", "tokenizer.eos_id"}) {
    rs_meta id;
    if (rs_model_meta(model, key, &id) != RS_OK) continue;
    if (const rs_status status = read_meta(model, key, RS_META_I64, "an integer", &id)) return status;
    if (const rs_status status = check_id(*spec, key, id.i64)) return status;
  }
  return RS_OK;
}

}  // namespace

void rs_tokenizer_scratch_free::operator()(rs_tokenizer_scratch *p) const { delete p; }

rs_tokenizer_scratch_ptr rs_tokenizer_scratch_new() { return rs_tokenizer_scratch_ptr(new rs_tokenizer_scratch); }

rs_status rs_tokenizer_create(const rs_tokenizer_spec &spec, rs_tokenizer **out) {
  *out = nullptr;
  try {
    auto t = std::make_unique<rs_tokenizer>();
    if (const rs_status status = create(spec, t.get())) return status;
    *out = t.release();
    return RS_OK;
  } catch (const std::bad_alloc &) {
    return rs_fail(RS_ERR_MEMORY, "no memory for a vocabulary of %zu tokens", spec.tokens.size());
  }
}

rs_status rs_tokenizer_load(const rs_model *model, rs_tokenizer **out) {
  *out = nullptr;
  try {
    rs_tokenizer_spec spec;
    if (const rs_status status = read_spec(model, &spec)) return status;
    return rs_tokenizer_create(spec, out);
  } catch (const std::bad_alloc &) {
    return rs_fail(RS_ERR_MEMORY, "no memory for the vocabulary");
  }
}

void rs_tokenizer_free(rs_tokenizer *t) { delete t; }

namespace {

// As the reference does it: a place loses as many characters as its token has spaces on that side, written as GPT-2 does, or as
// they are in the text in case of an added token.  The one that a text was given at its beginning counts as none.
void trim_spans(const rs_tokenizer &t, std::string_view text, size_t first, rs_tokens *tokens) {
  const auto is_trimmed = [](char32_t c) { return c == 0x120 || is_space(c); };
  for (size_t i = first; i < tokens->ids.size(); i++) {
    rs_span &span = tokens->spans[i];
    const char *begin = text.data() + span.begin, *end = text.data() + span.end;
    const bool added = t.added[static_cast<size_t>(tokens->ids[i])];
    const char *const token = added ? begin : rs_tokenizer_token(&t, tokens->ids[i]), *const token_end =
                                                                                          added ? end : token + strlen(token);
    size_t leading = 0, trailing = 0;
    for (const char *p = token; p < token_end && is_trimmed(decode(p));) leading++;
    for (const char *p = token_end; p > token && is_trimmed(decode_back(p));) trailing++;
    if (leading == 1 && t.prefix_space && (i == first || span.begin == 0)) leading = 0;
    for (; leading > 0 && begin < end; leading--) decode(begin);
    const char *trimmed = end;
    for (; trailing > 0 && trimmed > text.data(); trailing--) decode_back(trimmed);
    if (trailing == 0) end = std::max(trimmed, begin);
    span = {static_cast<uint32_t>(begin - text.data()), static_cast<uint32_t>(end - text.data())};
  }
}

}  // namespace

rs_status rs_tokenizer_encode(const rs_tokenizer *t, rs_tokenizer_scratch *scratch, rs_text text, rs_tokens *out) {
  if (!text.data && text.length) return rs_fail(RS_ERR_ARGUMENT, "the text is NULL");
  const std::string_view s(text.data ? text.data : "", text.length == RS_NUL_TERMINATED ? strlen(text.data) : text.length);
  if (s.size() > std::numeric_limits<uint32_t>::max())
    return rs_fail(RS_ERR_LIMIT, "the text has %zu bytes, allowed are 4 GiB", s.size());
  if (t->kind == tokenizer_kind::bpe && s.size() > max_bpe_text)
    return rs_fail(RS_ERR_LIMIT, "the text has %zu bytes, allowed are 1 GiB", s.size());
  const size_t valid = rs_valid_utf8(s);
  if (valid < s.size()) return rs_fail(RS_ERR_TEXT, "invalid UTF-8 at byte %zu (0x%02x)", valid, static_cast<uint8_t>(s[valid]));
  const size_t before = out->ids.size();
  try {
    if (t->kind == tokenizer_kind::bpe) bpe_encoder(*t, *scratch, s, out).run();
    else wordpiece_encoder(*t, *scratch, s, out).run();
    if (t->trim_spans) trim_spans(*t, s, before, out);
    out->type_ids.resize(out->ids.size(), 0);
    return RS_OK;
  } catch (const std::bad_alloc &) {
    out->ids.resize(before);
    out->type_ids.resize(before);
    out->spans.resize(before);
    return rs_fail(RS_ERR_MEMORY, "no memory for the tokens of %zu bytes of text", s.size());
  }
}

void rs_tokenizer_template(const rs_tokenizer *t, const rs_tokens &a, size_t a_begin, size_t a_end, const rs_tokens *b,
                           rs_tokens *out) {
  rs_tokenizer_template(t, a, a_begin, a_end, b, 0, b ? b->ids.size() : 0, out);
}

void rs_tokenizer_template(const rs_tokenizer *t, const rs_tokens &a, size_t a_begin, size_t a_end, const rs_tokens *b,
                           size_t b_begin, size_t b_end, rs_tokens *out) {
  const auto copy = [out](const rs_tokens &from, size_t begin, size_t end, int32_t type_id) {
    out->ids.insert(out->ids.end(), from.ids.begin() + static_cast<ptrdiff_t>(begin),
                    from.ids.begin() + static_cast<ptrdiff_t>(end));
    out->spans.insert(out->spans.end(), from.spans.begin() + static_cast<ptrdiff_t>(begin),
                      from.spans.begin() + static_cast<ptrdiff_t>(end));
    out->type_ids.insert(out->type_ids.end(), end - begin, type_id);
  };
  for (const template_token &token : b ? t->pair : t->single) {
    if (token.id == text_slot) {
      copy(a, a_begin, a_end, token.type_id);
    } else if (token.id == pair_slot) {
      out->pair = out->ids.size();
      if (b) copy(*b, b_begin, b_end, token.type_id);  // only the pair's template has it
    } else {
      out->ids.push_back(token.id);
      out->spans.push_back({0, 0});
      out->type_ids.push_back(token.type_id);
    }
  }
}

namespace {

// What the character is that bytes begin with; of one that is cut off, a letter.
bpe_class first_class(std::string_view bytes) {
  const auto lead = static_cast<uint8_t>(bytes[0]);
  const size_t n = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  const char *p = bytes.data();
  return rs_valid_utf8(bytes.substr(0, n)) == n ? bpe_class_of(decode(p)) : bpe_class::letter;
}

// Of GPT-2: words are runs of one kind of characters, of which both tokens may have a part only.
bool same_word(const char *left, const char *right) {
  static const byte_alphabet alphabet;
  std::vector<char> a, b;
  if (!alphabet.bytes_of(left, &a) || !alphabet.bytes_of(right, &b) || a.empty() || b.empty()) return false;
  const auto inside = [](char byte) { return (static_cast<uint8_t>(byte) & 0xC0) == 0x80; };
  if (inside(b[0])) return true;
  size_t last = a.size() - 1;
  while (last > 0 && inside(a[last])) last--;
  const bpe_class of = first_class({a.data() + last, a.size() - last});
  return of != bpe_class::space && of == first_class({b.data(), b.size()});
}

}  // namespace

bool rs_tokenizer_continues(const rs_tokenizer *t, int32_t before, int32_t id) {
  const char *const token = rs_tokenizer_token(t, id), *const left = rs_tokenizer_token(t, before);
  if (!token || !left) return false;
  if (t->kind == tokenizer_kind::wordpiece)
    return !t->prefix.empty() && !strncmp(token, t->prefix.c_str(), t->prefix.size()) && token[t->prefix.size()];
  if (t->added[static_cast<size_t>(before)] || t->added[static_cast<size_t>(id)]) return false;
  if (t->gpt2) return same_word(left, token);
  const size_t length = strlen(left), suffix = t->suffix.size();
  return length < suffix || memcmp(left + length - suffix, t->suffix.data(), suffix) != 0;
}

int32_t rs_tokenizer_types(const rs_tokenizer *t) {
  int32_t last = 0;
  for (const template_token &token : t->single) last = std::max(last, token.type_id);
  return last < INT32_MAX ? last + 1 : last;
}

size_t rs_tokenizer_special(const rs_tokenizer *t, bool pair) { return pair ? t->pair.size() - 2 : t->single.size() - 1; }

bool rs_tokenizer_in_template(const rs_tokenizer *t, int32_t id) {
  const auto has = [&](const std::vector<template_token> &all) {
    return std::any_of(all.begin(), all.end(), [&](const template_token &token) { return token.id == id; });
  };
  return id >= 0 && (has(t->single) || has(t->pair));
}

size_t rs_tokenizer_vocab(const rs_tokenizer *t) { return t->offsets.size(); }

const char *rs_tokenizer_token(const rs_tokenizer *t, int32_t id) {
  return id >= 0 && static_cast<size_t>(id) < t->offsets.size() ? t->text.data() + t->offsets[static_cast<size_t>(id)] : nullptr;
}
