// Property: whatever is in a model file, its shape is refused or is a number of layers that the
// rest of the coordinator can hold, with updates that it can hold; and a file that is cut off is
// refused or says the same.
#include "coordinator/shape.h"
#include "proto/update.h"
#include "tests/fuzz/fuzz.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    coord_shape shape = {0}, again = {0};
    const fl_status st = coord_shape_read((fl_bytes){data, size}, &shape, NULL);
    FL_ASSERT((st == FL_OK) == (shape.layers != 0) && shape.layers <= COORD_SHAPE_LAYERS_MAX);
    for (uint32_t l = 0; l < shape.layers; l++)
        FL_ASSERT(coord_shape_values(&shape, l, 64, true) <= FL_UPDATE_VALUES_MAX);
    if (st != FL_OK || size == 0) return 0;
    const fl_status cut = coord_shape_read((fl_bytes){data, size / 2}, &again, NULL);
    FL_ASSERT(cut != FL_OK || memcmp(&again, &shape, sizeof(shape)) == 0);
    return 0;
}
