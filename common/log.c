#include "common/log.h"

#include "common/clock.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static fl_log_level log_level = FL_LOG_INFO;
static bool log_json;

static const struct {
    const char *name;
    int priority; // of syslog
} levels[] = {{"error", 3}, {"warning", 4}, {"info", 6}, {"debug", 7}};

void fl_log_init(fl_log_level level, bool json) {
    log_level = level;
    log_json = json;
}

// Escapes what would break a line or a JSON string; names from peers come through here.
static void escape(const char *in, char *out, size_t size) {
    size_t n = 0;
    for (; *in != '\0' && n + 2 < size; in++) {
        const unsigned char c = (unsigned char)*in;
        if (c < ' ' || c == 0x7f) {
            out[n++] = '?';
        } else {
            if (log_json && (c == '"' || c == '\\')) out[n++] = '\\';
            out[n++] = (char)c;
        }
    }
    out[n] = '\0';
}

void fl_log(fl_log_level level, const char *event, const char *fmt, ...) {
    if (level > log_level) return;
    char text[512], safe[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    escape(text, safe, sizeof(safe));
    if (log_json)
        fprintf(stderr, "{\"time\":%lld,\"level\":\"%s\",\"event\":\"%s\",\"text\":\"%s\"}\n",
                (long long)fl_clock_wall_s(), levels[level].name, event, safe);
    else if (isatty(STDERR_FILENO))
        fprintf(stderr, "%-7s %s: %s\n", levels[level].name, event, safe);
    else
        fprintf(stderr, "<%d>%s: %s\n", levels[level].priority, event, safe);
}
