// The kernels as C++, for the processor: the same sources that a GPU's compiler takes.
#include "../scan.cu"
#include "../step.cu"
