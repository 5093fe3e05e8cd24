// Replaces common/log.cpp, which starts a thread and colours a terminal: text goes straight to the host's log, or to
// stdout where a command module of upstream's tests prints its results.
#include "log.h"

#include "json.h"
#include "pw.h"

#include <cstdarg>
#include <cstdio>
#include <string>
#include <vector>

struct common_log {};

int common_log_verbosity_thold = LOG_DEFAULT_LLAMA;
static common_log the_log;
static bool jsonl = false;

int  common_log_get_verbosity_thold(void) { return common_log_verbosity_thold; }
void common_log_set_verbosity_thold(int verbosity) { common_log_verbosity_thold = verbosity; }
bool common_log_get_jsonl(void) { return jsonl; }
void common_log_set_jsonl(bool on) { jsonl = on; }

int common_log_get_verbosity(enum ggml_log_level level) {
    switch (level) {
        case GGML_LOG_LEVEL_DEBUG: return LOG_LEVEL_DEBUG;
        case GGML_LOG_LEVEL_INFO:  return LOG_LEVEL_INFO;
        case GGML_LOG_LEVEL_WARN:  return LOG_LEVEL_WARN;
        case GGML_LOG_LEVEL_ERROR: return LOG_LEVEL_ERROR;
        default:                   return LOG_LEVEL_OUTPUT;
    }
}

static void write_text(enum ggml_log_level level, const std::string & text) {
    if (level == GGML_LOG_LEVEL_NONE) {
        fwrite(text.data(), 1, text.size(), stdout);
    } else {
        pw_host_log(level, text.data(), text.size());
    }
}

void common_log_default_callback(enum ggml_log_level level, const char * text, void *) {
    if (common_log_get_verbosity(level) <= common_log_verbosity_thold) {
        write_text(level, text);
    }
}

common_log * common_log_init() { return &the_log; }
common_log * common_log_main() { return &the_log; }
void common_log_pause(common_log *) {}
void common_log_resume(common_log *) {}
void common_log_free(common_log *) {}

void common_log_add(common_log *, enum ggml_log_level level, const char * format, ...) {
    va_list arguments, again;
    va_start(arguments, format);
    va_copy(again, arguments);
    std::string text(vsnprintf(nullptr, 0, format, arguments), '\0');
    vsnprintf(text.data(), text.size() + 1, format, again);
    va_end(again);
    va_end(arguments);
    write_text(level, text);
}

void common_log_add_json(common_log *, const char *, const common_json &) {}
void common_log_set_file(common_log *, const char *) {}
void common_log_set_colors(common_log *, log_colors) {}
bool common_log_get_colors(common_log *) { return false; }
void common_log_set_prefix(common_log *, bool) {}
void common_log_set_timestamps(common_log *, bool) {}
void common_log_flush(common_log *) { fflush(stdout); }
