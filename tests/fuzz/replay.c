// Runs a fuzz target over the files of a corpus folder: every past finding is a test, with any
// compiler. libFuzzer replaces this main in the fuzz preset. An empty corpus is a failure: a target
// that replays nothing tests nothing.
#include "tests/fuzz/fuzz.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INPUT_MAX = 1 << 22 };

static int replay(const char *path) {
    FILE *f = fopen(path, "rb");
    uint8_t *buf = malloc(INPUT_MAX);
    if (f == NULL || buf == NULL) {
        perror(path);
        free(buf);
        if (f != NULL) fclose(f);
        return 1;
    }
    const size_t size = fread(buf, 1, INPUT_MAX, f);
    fclose(f);
    uint8_t *exact = malloc(size + (size == 0)); // exact size: ASan sees a one-byte over-read
    if (exact == NULL) {
        free(buf);
        return 1;
    }
    memcpy(exact, buf, size);
    free(buf);
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
    return 0;
}

int main(int argc, char **argv) {
    DIR *dir = argc == 2 ? opendir(argv[1]) : NULL;
    if (dir == NULL) {
        fprintf(stderr, "usage: %s CORPUS_FOLDER\n", argv[0]);
        return 2;
    }
    int replayed = 0, failed = 0;
    for (const struct dirent *e = readdir(dir); e != NULL; e = readdir(dir)) {
        if (e->d_name[0] == '.') continue;
        char path[4096];
        snprintf(path, sizeof(path), "%s/%s", argv[1], e->d_name);
        failed |= replay(path);
        replayed++;
    }
    closedir(dir);
    printf("%d inputs replayed\n", replayed);
    return failed || replayed == 0;
}
