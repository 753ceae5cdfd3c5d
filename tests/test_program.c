// Goal: settings, INI files and command lines are read exactly as their tables say, and a mistake
// gets one line that names it. Method: a small program with one command of every kind.
#include "common/cli.h"
#include "common/json.h"
#include "tests/check.h"

typedef struct opts {
    char model[FL_SETTING_TEXT_MAX], note[FL_SETTING_TEXT_MAX];
    int64_t steps, policy;
    double rate;
    uint64_t memory;
    bool json;
} opts;

#define ROW(field) offsetof(opts, field)
static const fl_setting rows[] = {
    {NULL, "MODEL", FL_KIND_TEXT, "FILE", 0, 0, NULL, "the model", NULL, ROW(model)},
    {"tune", "steps", FL_KIND_INTEGER, "steps", 1, 100, "10", "how many", NULL, ROW(steps)},
    {"tune", "rate", FL_KIND_NUMBER, "rate", 0, 1, "0.5", "how fast", NULL, ROW(rate)},
    {"limits", "memory", FL_KIND_SIZE, "SIZE", 0, 0, "300M", "how much", NULL, ROW(memory)},
    {"tune", "policy", FL_KIND_CHOICE, NULL, 0, 0, "luc", "which", "luc|uniform|paper",
     ROW(policy)},
    {"tune", "note", FL_KIND_TEXT, "TEXT", 0, 0, "", "what", NULL, ROW(note)},
    {"tune", "json", FL_KIND_FLAG, NULL, 0, 0, "no", "for machines", NULL, ROW(json)},
};

static opts got;
static int run(const void *options) {
    got = *(const opts *)options;
    return FL_EXIT_OK;
}

static const fl_command tune = {"tune",       "tunes", "prog tune m.gguf", rows, FL_COUNT(rows),
                                sizeof(opts), run};
static const fl_command *const commands[] = {&tune};
static const fl_program program = {"prog", "a test", commands, 1};

static int call(const char *line) {
    char text[256], *argv[16];
    int argc = 0;
    snprintf(text, sizeof(text), "%s", line);
    char *save = NULL;
    for (char *w = strtok_r(text, " ", &save); w != NULL; w = strtok_r(NULL, " ", &save))
        argv[argc++] = w;
    argv[argc] = NULL;
    memset(&got, 0, sizeof(got));
    return fl_cli_main(&program, argc, argv);
}

static void test_command_lines(void) {
    T_EQ(call("prog tune m.gguf"), 0);
    T_STR(got.model, "m.gguf");
    T_EQ(got.steps, 10);
    T_EQ(got.memory, 300u << 20);
    T_EQ(call("prog tune --policy paper --steps=7 m.gguf --memory 1.5K --json --rate 0.25"), 0);
    T_EQ(got.policy, 2);
    T_EQ(got.steps, 7);
    T_EQ(got.memory, 1536);
    T_CHECK(got.json && got.rate == 0.25, "%f", got.rate);
    static const char *const wrong[] = {"prog",
                                        "prog tone m",
                                        "prog tune",
                                        "prog tune a b",
                                        "prog tune m --steps",
                                        "prog tune m --steps 0",
                                        "prog tune m --stepz 3",
                                        "prog tune m --rate nan",
                                        "prog tune m --memory 3X",
                                        "prog tune m --policy best",
                                        "prog tune m --steps 3x"};
    for (size_t i = 0; i < FL_COUNT(wrong); i++)
        T_CHECK(call(wrong[i]) == FL_EXIT_USAGE, "%s", wrong[i]);
}

static fl_status load(const char *text, opts *o, fl_err *err) {
    char path[] = "/tmp/fleetune_conf_XXXXXX";
    const int fd = mkstemp(path);
    T_NEED(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text), "temporary file");
    close(fd);
    const fl_status st = fl_conf_load(path, "FLTEST", rows, FL_COUNT(rows), o, err);
    unlink(path);
    return st;
}

static void test_ini_files(void) {
    opts o;
    fl_err err;
    T_OK(load("# c\n[tune]\nsteps = 12 ; why\n\n[limits]\nmemory=2G\n", &o, &err), err);
    T_EQ(o.steps, 12);
    T_EQ(o.memory, 2ull << 30);
    T_EQ(load("[tune]\nstepz = 12\n", &o, &err), FL_EARG);
    T_CHECK(strstr(err.text, ":2: unknown key 'stepz'") && strstr(err.text, "'steps'"), "%s",
            err.text);
    T_EQ(load("[tune]\n\nsteps = many\n", &o, &err), FL_EARG);
    T_CHECK(strstr(err.text, ":3: steps wants a whole number") != NULL, "%s", err.text);
    T_EQ(load("[tune]\nwhat is this\n", &o, &err), FL_EFORMAT);
    T_EQ(fl_conf_load("/nonexistent/x.ini", "FLTEST", rows, FL_COUNT(rows), &o, &err), FL_ENOENT);
    setenv("FLTEST_TUNE_STEPS", "33", 1);
    T_OK(load("[tune]\nsteps = 12\n", &o, &err), err);
    T_EQ(o.steps, 33);
    setenv("FLTEST_TUNE_STEPS", "0", 1);
    T_EQ(load("", &o, &err), FL_EARG);
    unsetenv("FLTEST_TUNE_STEPS");
}

static void test_printed_settings_read_back(void) {
    opts o, back;
    fl_err err;
    T_OK(load("[tune]\nsteps=3\npolicy=paper\nnote=hello\njson=yes\nrate=0.125\n", &o, &err), err);
    char text[4096] = "";
    FILE *f = fmemopen(text, sizeof(text) - 1, "w");
    fl_conf_print(rows, FL_COUNT(rows), &o, f);
    fclose(f);
    T_OK(load(text, &back, &err), err);
    T_CHECK(back.steps == 3 && back.policy == 2 && back.rate == 0.125 && back.json, "%s", text);
    T_STR(back.note, "hello");
}

static void test_json(void) {
    fl_err err;
    fl_json *root = fl_json_object();
    fl_json_set_number(root, "nll", 2.5);
    fl_json_set_number(root, "bad", NAN);
    fl_json *list = fl_json_add_array(root, "exits");
    fl_json_set_integer(list, NULL, 7);
    char text[256] = "";
    FILE *f = fmemopen(text, sizeof(text) - 1, "w");
    T_OK(fl_json_print(root, f, &err), err);
    fclose(f);
    fl_json_free(root);
    T_STR(text, "{\"nll\":2.5,\"bad\":null,\"exits\":[7]}\n");
    fl_json *back = NULL;
    T_OK(fl_json_parse((fl_bytes){(const uint8_t *)text, strlen(text)}, &back, &err), err);
    T_NEAR(fl_json_number(fl_json_get(back, "nll"), 0), 2.5, 0, "nll");
    T_EQ(fl_json_count(fl_json_get(back, "exits")), 1);
    fl_json_free(back);
    static const char *const wrong[] = {"", "{", "{\"a\":1,\"a\":2}", "[1,]", "{\"a\":1}x"};
    for (size_t i = 0; i < FL_COUNT(wrong); i++) {
        const fl_bytes in = {(const uint8_t *)wrong[i], strlen(wrong[i])};
        T_CHECK(fl_json_parse(in, &back, &err) == FL_EFORMAT, "%s", wrong[i]);
    }
    char deep[200];
    memset(deep, '[', 100);
    memset(deep + 100, ']', 100);
    T_EQ(fl_json_parse((fl_bytes){(const uint8_t *)deep, 200}, &back, &err), FL_ELIMIT);
}

T_MAIN({"command_lines", test_command_lines}, {"ini_files", test_ini_files},
       {"printed_settings_read_back", test_printed_settings_read_back}, {"json", test_json})
