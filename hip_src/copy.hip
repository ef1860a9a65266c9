#include "../cuda_src/portable/copy.cuh"
