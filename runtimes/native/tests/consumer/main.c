#include <affect_edge.h>
#include <stdio.h>

int main(void) {
    affect_model *model = NULL;
    if (affect_edge_abi_version() != AFFECT_EDGE_ABI_VERSION) return 1;
    if (affect_model_open("no/such/folder", &model) != AFFECT_ERROR_FILE || model != NULL) return 1;
    printf("affect-edge %s on %s: %s\n", affect_edge_version(), affect_instruction_set(), affect_last_error());
    return 0;
}
