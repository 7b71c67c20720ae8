// The program rs.  Every subcommand is a file of its own; here are the options of the program itself and the way out.
//
// Exit status: 0 all went well, 1 something failed, 2 the command line makes no sense.
#include "options.h"
#include "output.h"

#include <fcntl.h>
#include <unistd.h>
#include <algorithm>
#include <csignal>
#include <new>

static const char *const examples =
    "Examples:\n"
    "  rs convert all-MiniLM-L6-v2 -o minilm.rsw --type q8   # a Hugging Face folder -> a weight file\n"
    "  rs embed -m minilm.rsw 'a text' 'another'             # texts -> vectors, as JSON lines\n"
    "  rs embed -m minilm.rsw -f texts.txt -o vectors.npy --format npy\n"
    "  rs similarity -m minilm.rsw 'a cat' 'a kitten'\n"
    "'rs COMMAND --help' has the rest.  Exit status: 0 all went well, 1 something failed, 2 wrong usage.";

// CLI11's help without the checks of each value, which the descriptions tell better.
class help_formatter : public CLI::Formatter {
 public:
  std::string make_option_name(const CLI::Option *option, bool positional) const override {
    std::string name = CLI::Formatter::make_option_name(option, positional);
    size_t value = name.find('{');  // of a flag that may have one: CLI11 writes --ops{op}
    return value == std::string::npos ? name : name.substr(0, value) + "[=HOW]";
  }
  std::string make_option_opts(const CLI::Option *option) const override {
    std::string type = option->get_type_name();
    type = type.substr(0, type.find(':'));
    return (type.empty() ? "" : " " + type) + (option->get_required() ? " (required)" : "");
  }
  std::string make_option_usage(const CLI::Option *option) const override {
    std::string name = option->get_type_name();
    return option->get_required() ? name : "[" + name + "]";
  }
  std::string make_usage(const CLI::App *app, std::string name) const override {
    std::string usage = CLI::Formatter::make_usage(app, name);
    usage.erase(usage.find_last_not_of('\n') + 1);
    if (!takes_texts(*app)) return usage + "\n";
    return usage + (app->get_option_no_throw("--image-size") ? " [TEXT|IMAGE...]\n" : " [TEXT...]\n");
  }
};

// To CLI11 "--name=" is an option whose value is the next argument; to whoever wrote it, one whose value is empty.  An empty value
// comes from a shell variable that was never set, and must not pass for an option that was not given: only texts may be empty.
static void see_to_empty_values(const CLI::App &sub, std::vector<std::string> *arguments) {
  for (size_t i = 1; i < arguments->size() && (*arguments)[i] != "--"; ++i) {
    std::string name = (*arguments)[i];
    const bool empty = name.size() > 3 && name[1] == '-' && name.back() == '=';
    if (empty) name.pop_back();
    const CLI::Option *option = name[0] == '-' ? sub.get_option_no_throw(name) : nullptr;
    if (!option || option->get_expected_min() == 0) continue;  // no option, or a flag
    if (empty) (*arguments)[i] = name, arguments->insert(arguments->begin() + ptrdiff_t(i) + 1, "");
    if (++i == arguments->size() || !(*arguments)[i].empty()) continue;
    const std::string type = option->get_type_name();
    if (type != "TEXT" && type != "PROMPT") fail_usage(option->get_name(), ": is empty");
  }
}

// CLI11 keeps what it parses back to front.  command: "rs", which becomes "rs embed" where that is the subcommand.
static std::vector<std::string> split_arguments(const CLI::App &app, int argc, char **argv, command_line *line,
                                                std::string *command) {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  const CLI::App *sub = nullptr;
  if (arguments.empty()) fail_usage("a command is missing");
  for (const CLI::App *known : app.get_subcommands([](const CLI::App *) { return true; }))
    if (known->get_name() == arguments[0]) sub = known;
  if (!sub && !app.get_option_no_throw(arguments[0])) fail_usage("unknown command ", in_quotes(arguments[0]));
  if (sub) *command += " " + sub->get_name();
  if (sub) see_to_empty_values(*sub, &arguments);
  if (sub && takes_texts(*sub)) {
    auto dashes = std::find(arguments.begin(), arguments.end(), "--");
    if (dashes != arguments.end()) line->trailing.assign(dashes + 1, arguments.end());
    arguments.erase(dashes, arguments.end());
    // To CLI11 it would be the end of the subcommand.
    if (std::count(arguments.begin(), arguments.end(), "++") > 0) fail_usage("the text '++' goes after '--'");
  }
  std::reverse(arguments.begin(), arguments.end());
  return arguments;
}

static int usage_error(const std::string &command, const std::string &message) {
  say(message + "; see '" + command + " --help'");
  return 2;
}

static int run_program(CLI::App &app, int argc, char **argv) {
  command_line line;
  std::string command = "rs";
  for (auto add : {add_convert, add_embed, add_classify, add_rerank, add_answer, add_tokenize, add_similarity, add_info, add_verify,
                   add_bench, add_eval, add_trace, add_tune})
    add(&app, &line);
  try {
    try {
      app.parse(split_arguments(app, argc, argv, &line, &command));
    } catch (const CLI::Success &e) {  // --help, --version
      std::ostringstream text;
      app.exit(e, text, text);
      print(text.str());
      return 0;
    }
    return line.run();
  } catch (const CLI::ParseError &e) {
    std::string what = e.what();
    const std::pair<const char *, const char *> words[] = {{": At Most 1 required", ": is given more than once"},
                                                           {": 1 required ", ": has no value"}};
    for (const auto &[theirs, ours] : words)
      if (const size_t at = what.find(theirs); at != std::string::npos) what.replace(at, std::string::npos, ours);
    return usage_error(command, what);
  } catch (const usage_failure &e) {
    return usage_error(command, e.what());
  } catch (const closed_pipe &) {  // whoever reads has enough, as in "rs … | head -1"
  } catch (const failure &e) {
    say(e.what());
  } catch (const std::bad_alloc &) {
    say("out of memory");
  } catch (const std::exception &e) {
    say(e.what());
  }
  return 1;
}

// A program may be started with a standard stream closed.  The next file that is opened would get its number, and error messages
// would go into a weight file.  Opened the wrong way round, using the stream is the error that it should be.
static void fill_standard_streams() {
  for (int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (fcntl(fd, F_GETFD) < 0) open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY);
}

int main(int argc, char **argv) {
  fill_standard_streams();
  // A closed pipe and the largest file that is allowed are errors of write(), which clean up like any other.
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
  CLI::App app("Texts and images to vectors with transformer encoders, from one weight file.", "rs");
  app.set_version_flag("--version", std::string("rs ") + rs_version(), "print the version");
  app.set_help_flag("-h,--help", "print this help");
  app.footer(examples);
  app.require_subcommand(1);
  app.formatter(std::make_shared<help_formatter>());
  app.get_formatter()->column_width(26);
  return run_program(app, argc, argv);
}
