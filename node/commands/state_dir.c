#include "node/commands/state_dir.h"

#include "common/file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

fl_status node_state_dir_make(char *path, fl_err *err) {
    for (char *p = path + 1; *p != '\0'; p++) {
        if (*p != '/') continue;
        *p = '\0';
        const fl_status st = fl_folder_make(path, err);
        *p = '/';
        FL_TRY(st);
    }
    return fl_folder_make(path, err);
}

fl_status node_state_dir(const char *given, char *path, size_t size, fl_err *err) {
    const char *env = getenv("FLEETUNE_STATE"), *unit = getenv("STATE_DIRECTORY");
    const char *home = getenv("HOME");
    int n;
    if (given != NULL && given[0] != '\0')
        n = snprintf(path, size, "%s", given);
    else if (env != NULL && env[0] != '\0')
        n = snprintf(path, size, "%s", env);
    else if (unit != NULL && unit[0] != '\0')
        n = snprintf(path, size, "%s", unit);
    else if (home != NULL && home[0] != '\0')
        n = snprintf(path, size, "%s/.local/state/fleetune", home);
    else
        return FL_FAIL(err, FL_EARG, "no folder for the state: set FLEETUNE_STATE or give --state");
    if (n < 0 || (size_t)n >= size)
        return FL_FAIL(err, FL_EARG, "the state folder's path is too long");
    return FL_OK;
}
