// Text that goes where characters have a meaning of their own: terminals, HTML, XML.
#pragma once
#include <string>
#include <string_view>

// Control characters, which a terminal would obey and a page may not hold, as the pictures that Unicode has for them.  Tabs and
// line feeds stay.
std::string visible(std::string_view text);

// The same with the characters of markup escaped: for HTML and XML, attributes in quotes too.
std::string markup(std::string_view text);
