#include "markup.h"

std::string visible(std::string_view text) {
  std::string out;
  for (char c : text) {
    auto byte = static_cast<unsigned char>(c);
    if ((byte >= 0x20 && byte != 0x7f) || c == '\t' || c == '\n') out += c;
    else out.append("\xe2\x90").append(1, char(byte == 0x7f ? 0xa1 : 0x80 + byte));  // U+2400 and on
  }
  return out;
}

std::string markup(std::string_view text) {
  std::string out;
  for (char c : visible(text)) {
    if (c == '&') out += "&amp;";
    else if (c == '<') out += "&lt;";
    else if (c == '>') out += "&gt;";
    else if (c == '"') out += "&quot;";
    else if (c == '\'') out += "&#39;";
    else out += c;
  }
  return out;
}
