#include "../cuda_src/portable/quantise.cuh"
