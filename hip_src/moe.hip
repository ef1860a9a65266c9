#include "../cuda_src/portable/moe.cuh"
